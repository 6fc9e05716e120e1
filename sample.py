"""Ask a trained model about pictures.

    python sample.py --image cat.jpg                                  # says what it sees; on a terminal you can then go on asking
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image a.png b.png --prompt "What differs?"     # several pictures, in this order

Without --model the newest finished run under out/ answers. The answer is printed while it is written. In the chat every question
is asked with all turns before it; an empty line, Ctrl-D or Ctrl-C ends it. Greedy unless --temperature is above 0.
"""

import argparse
import sys
from pathlib import Path

import torch

from data import Tokenizer, encode_prompt, parse_args, run
from model import VLM
from vision import UserError, cut_tiles, open_image

DESCRIBE = "Provide a one-sentence caption for the provided image."


def main(argv=None):
    cfg = parse(argv)
    directory = cfg.model or newest_run()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    vlm, tok = VLM.from_pretrained(directory, device, getattr(torch, cfg.dtype)), Tokenizer(directory)
    tiles, n_visual = [], []
    for path in cfg.image:
        pixels, n = cut_tiles(open_image(path), vlm.cfg.vision, cfg.image_mode or vlm.cfg.image_mode)
        tiles.append(pixels)
        n_visual.append(n)
    pixels = torch.cat(tiles).to(device) if tiles else None

    turns, chat = [], not cfg.prompt and sys.stdin.isatty()
    question = cfg.prompt or (DESCRIBE if tiles else ask() if chat else "")
    if not question:
        raise UserError("nothing to answer: give --image, --prompt or both")
    if not cfg.prompt and tiles:
        print(f"> {question}")
    while question:
        if "<image>" in question:
            raise UserError("<image> in a question has no picture of its own; name the files with --image, they come first")
        turns.append(("human", "<image>" * len(tiles) + "\n" + question if tiles and not turns else question))
        prompt = torch.tensor([encode_prompt(tok, turns, cfg.template or vlm.cfg.template, n_visual)], device=device)
        turns.append(("gpt", say(vlm, tok, prompt, pixels, cfg)))
        question = ask() if chat else None


def say(vlm, tok, prompt, pixels, cfg):
    """Print the answer word by word and return it."""
    ids, shown = [], ""
    for new in vlm.stream(prompt, pixels, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, seed=cfg.seed):
        ids.append(int(new))
        text = tok.decode(ids, partial=True).strip()                        # a space at the end waits for the word after it
        print(text[len(shown) :], end="", flush=True)
        shown = text
    text = tok.decode(ids).strip()
    print(text[len(shown) :])
    if ids[-1] != tok.eos:
        print(f"[cut off after {cfg.max_new_tokens} tokens; raise --max-new-tokens]", file=sys.stderr)
    return text


def ask():
    """One line from the terminal; None when the user is done."""
    try:
        return input("\n> ").strip() or None
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def newest_run(root="out"):
    """The model directory under out/ that was finished last: config.json is the last file a run writes."""
    runs = sorted(Path(root).glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"no finished run under {root}/; train one (python train.py --stage finetune) or give --model DIR")
    return runs[-1].parent


def parse(argv):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures, in the order the question speaks of them")
    cli.add_argument("--prompt", default="", help="one question; empty: describe the picture, then chat if this is a terminal")
    cli.add_argument("--model", default="", metavar="DIR", help="model directory; empty: the newest finished run under out/")
    cli.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word, more draws at random (default 0)")
    cli.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set of words holding this probability (default 1)")
    cli.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest words; 0: all (default 0)")
    cli.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    cli.add_argument("--template", default="", help="conversation template; empty: the model's own")
    cli.add_argument("--image-mode", default="", help="pad, letterbox, crop or resize; empty: the model's own")
    cli.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    cli.add_argument("--device", default="auto", help="cpu, cuda or auto (default auto)")
    cli.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights (default float32)")
    return parse_args(cli, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(run(main))
