"""Ask a trained model about pictures.

    python sample.py --image cat.jpg                                  # says what it sees; on a terminal you can then go on asking
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image a.png b.png --prompt "What differs?"     # several pictures, in this order

Without --model the newest finished run under out/ answers. The answer is printed while it is written. In the chat every question
is asked with all turns before it; an empty line, Ctrl-D or Ctrl-C ends it. Greedy unless --temperature is above 0. Pictures stand
before the first question; an <image> or </s> in what is typed is text.
"""

import argparse
import sys

import torch

from data import as_text, cut_at_stop, encode_prompt, parse_args, run, stop_ids
from train import Flags, newest_run, one_of, open_model, pick_device
from vision import MODES, UserError, cut_tiles, join, open_image

DESCRIBE = "Provide a one-sentence caption for the provided image."


def main(argv=None):
    cfg = parse(argv)
    device, images = pick_device(cfg.device), [open_image(path) for path in cfg.image]           # what is wrong with them is said at once
    chat = not cfg.prompt and sys.stdin is not None and sys.stdin.isatty()
    if not (cfg.prompt or images or chat):
        raise UserError("nothing to answer: give --image, --prompt or both")
    vlm, tok = open_model(cfg.model or newest_run(), device, cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)
    pictures = [cut_tiles(image, vlm.cfg.vision, vlm.cfg.image_mode) for image in images]
    pixels, layout = (x.to(device) for x in join(pictures)) if pictures else (None, None)

    turns, question = [], cfg.prompt or (DESCRIBE if images else ask())
    if not cfg.prompt and images:
        print(f"> {question}")
    while question:
        front = "<image>" * len(images) + "\n" if images and not turns else ""
        turns.append(("human", front + as_text(question)))
        prompt = torch.tensor([encode_prompt(tok, turns, vlm.cfg.template, [len(cut) for _, cut in pictures])], device=device)
        answer = say(vlm, tok, prompt, pixels, layout, cfg)
        turns = turns + [("gpt", as_text(answer))] if answer else turns[:-1]  # an empty answer is no turn to go on from
        question = ask() if chat else None
    return 0


def say(vlm, tok, prompt, pixels, layout, cfg):
    """Print the answer word by word and return it."""
    T, longest, template = prompt.shape[1], vlm.cfg.decoder.block_size, vlm.cfg.template
    if T >= longest:
        raise UserError(f"question and earlier turns are {T} tokens, the model takes {longest} with its answer; ask less, or begin a new chat")
    ids, shown, stop = [], "", stop_ids(tok, template)
    for new in vlm.stream(prompt, pixels, min(cfg.max_new_tokens, longest - T), cfg.temperature, cfg.top_p, cfg.top_k, seed=cfg.seed, stop=stop,
                          layout=layout):
        ids.append(int(new))
        text = tok.decode(ids, partial=True)
        said = cut_at_stop(text, template, partial=True).strip()            # a space at the end waits for the word after it
        print(said[len(shown) :], end="", flush=True)
        shown = said
        if cut_at_stop(text, template) != text:                             # a stop that is no token: ### or a newline
            break
    whole = tok.decode(ids)
    text = cut_at_stop(whole, template)
    ended, text = ids[-1] in stop or text != whole, text.strip()
    print(text[len(shown) :], flush=True)
    if not ended:
        why = "raise --max-new-tokens" if len(ids) == cfg.max_new_tokens else f"with the prompt's {T} these are all {longest} the model takes"
        print(f"[cut off after {len(ids)} tokens; {why}]", file=sys.stderr)
    elif not text:
        print("[the model gave an empty answer]", file=sys.stderr)
    return text


def ask():
    """One line from the terminal; None when the user is done."""
    try:
        question = input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return question or None


def parse(argv):
    cli = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures, in the order the question speaks of them")
    cli.add_argument("--prompt", default="", help="one question; empty: describe the picture, then chat if this is a terminal")
    cli.add_argument("--model", default="", metavar="DIR", help="model directory; empty: the newest finished run under out/")
    cli.add_argument("--vision", metavar="DIR[,DIR]", help="tower of a model that was published without (python model.py convert puts it in)")
    cli.add_argument("--llm", metavar="DIR", help="base of a LoRA")
    cli.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word, more draws at random (default 0)")
    cli.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set of words holding this probability (default 1)")
    cli.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest words; 0: all (default 0)")
    cli.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    cli.add_argument("--template", default="", help="conversation template; empty: the model's own")
    cli.add_argument("--image-mode", default="", help=f"{', '.join(MODES)}; empty: the model's own (python model.py info DIR says which)")
    cli.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    cli.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default auto)")
    cli.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                     help="of the weights; auto: as they are stored, but bfloat16 for float16 on a CPU (default auto)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    for flag, value, fits, rule in (("temperature", cfg.temperature, 0 <= cfg.temperature < float("inf"), "0 or more"),
                                    ("top-p", cfg.top_p, 0 < cfg.top_p <= 1, "above 0 and at most 1"), ("top-k", cfg.top_k, cfg.top_k >= 0, "0 or more"),
                                    ("max-new-tokens", cfg.max_new_tokens, cfg.max_new_tokens >= 1, "at least 1"), ("seed", cfg.seed, cfg.seed >= 0, "0 or more")):
        if not fits:
            raise UserError(f"--{flag} {value}: must be {rule}")
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    return cfg


if __name__ == "__main__":
    sys.exit(run(main))
