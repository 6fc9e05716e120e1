"""Ask a trained model about pictures.

    python sample.py --image cat.jpg                                  # says what it sees; on a terminal you can then go on asking
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image a.png b.png --prompt "What differs?"     # several pictures, in this order

Without --model the newest finished run under out/ answers. The answer is printed while it is written. In the chat every question
is asked with all turns before it; an empty line, Ctrl-D or Ctrl-C ends it. Greedy unless --temperature is above 0. Pictures stand
before the first question; an <image> or </s> in what is typed is text.
"""

from dataclasses import replace
from pathlib import Path
import argparse
import sys

import torch

from conversation import Tokenizer, as_text, cut_at_stop, encode_prompt, find_template, stop_ids
from model import VLM
from support.cli import Flags, UserError, one_of, parse_args, pick_device, run
from support.weights import check_image_mode, check_tokenizer, tokenizer_home
from vision import MODES, cut_tiles, join_pictures, open_image



def open_model(directory, device="cpu", dtype="auto", vision=None, llm=None, template="", image_mode=""):
    """A model that others ask, by their flags of these names -> VLM, which has the template and the image mode in its cfg, and its Tokenizer."""
    if template:
        find_template(template)                                             # said before gigabytes are read
    vlm = VLM.from_pretrained(directory, device, None if dtype == "auto" else getattr(torch, dtype), vision, llm)
    tok = Tokenizer(tokenizer_home(directory, llm))
    check_tokenizer(vlm, tok)
    mode = image_mode or vlm.cfg.image_mode
    check_image_mode(vlm, mode, directory)
    vlm.cfg = replace(vlm.cfg, template=template or vlm.cfg.template, image_mode=mode)
    return vlm, tok



def answer(vlm, tok, questions, max_new_tokens=96, size=48):
    """Greedy answers to [([picture file, ...], text), ...] -> [(answer, whole), ...]; `whole` is False where the tokens ran out."""
    answers, by_length = [None] * len(questions), sorted(range(len(questions)), key=lambda i: len(questions[i][1]))
    for start in range(0, len(questions), size):
        some, prompts = by_length[start : start + size], []
        for paths, text in (questions[i] for i in some):
            pictures = [cut_tiles(open_image(p), vlm.cfg.vision, vlm.cfg.image_mode) for p in paths]
            text = text if "<image>" in text or not paths else "<image>" * len(paths) + "\n" + text
            prompts.append((encode_prompt(tok, [("human", text)], vlm.cfg.template, [len(layout) for _, layout in pictures]), pictures))
        for i, (ids, ended, _) in zip(some, complete(vlm, tok, prompts, max_new_tokens)):
            answers[i] = text_of(tok, vlm.cfg.template, ids, ended)
    return answers



def complete(vlm, tok, prompts, max_new_tokens, **choices):
    """A batch [(prompt ids, [(tiles, layout), ...]), ...] -> [(new ids without the stop, whether it came, tokens generated), ...]

    `choices`: what VLM.generate takes, such as temperature and seed; without them greedy.
    """
    stop, device, longest = stop_ids(tok, vlm.cfg.template), vlm.decoder.lm_head.weight.device, max(len(ids) for ids, _ in prompts)
    pictures, room = [picture for _, pictures in prompts for picture in pictures], min(max_new_tokens, vlm.cfg.decoder.block_size - longest)
    if room < 1:
        raise UserError(f"a question of {longest} tokens leaves no room for an answer in {vlm.cfg.decoder.block_size}; shorten it")
    tokens = torch.tensor([ids + [tok.pad] * (longest - len(ids)) for ids, _ in prompts], device=device)
    pixels, layout = (x.to(device) for x in join_pictures(pictures)) if pictures else (None, None)
    new = vlm.generate(tokens, pixels, room, lengths=[len(ids) for ids, _ in prompts], stop=stop, layout=layout, **choices).tolist()
    ends = [next((k for k, t in enumerate(ids) if t in stop), None) for ids in new]
    return [(ids[:end], end is not None, len(ids) if end is None else end + 1) for ids, end in zip(new, ends)]



def text_of(tok, template, ids, ended):
    """-> text, whether it is whole. Some templates end an answer by a string and not by a token."""
    text = tok.decode(ids)
    said = cut_at_stop(text, template)
    return said.strip(), ended or said != text



def newest_run(root="out"):
    """The model directory under out/ that was finished last: config.json is the last file a run writes."""
    newest = lambda pattern: max(Path(root).glob(pattern), key=lambda p: p.stat().st_mtime, default=None)
    if found := newest("*/config.json"):
        return found.parent
    half = newest("*/checkpoint-*/config.json")
    raise UserError(f"no finished run under {root}/; train one (python train.py --stage finetune) or give --model DIR"
                    + (f". From an unfinished one there is --model {half.parent}" if half else ""))



DESCRIBE = "Provide a one-sentence caption for the provided image."



def main(argv=None):
    cfg = parse(argv)
    device, images = pick_device(cfg.device), [open_image(path) for path in cfg.image]           # what is wrong with them is said at once
    chat = not cfg.prompt and sys.stdin is not None and sys.stdin.isatty()
    if not (cfg.prompt or images or chat):
        raise UserError("nothing to answer: give --image, --prompt or both")
    vlm, tok = open_model(cfg.model or newest_run(), device, cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)
    pictures = [cut_tiles(image, vlm.cfg.vision, vlm.cfg.image_mode) for image in images]
    pixels, layout = (x.to(device) for x in join_pictures(pictures)) if pictures else (None, None)

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
    cli.add_argument("--vision", metavar="DIR[,DIR]", help="tower of a model that was published without (python -m tools.weights convert puts it in)")
    cli.add_argument("--llm", metavar="DIR", help="base of a LoRA")
    cli.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word, more draws at random (default 0)")
    cli.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set of words holding this probability (default 1)")
    cli.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest words; 0: all (default 0)")
    cli.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    cli.add_argument("--template", default="", help="conversation template; empty: the model's own")
    cli.add_argument("--image-mode", default="", help=f"{', '.join(MODES)}; empty: the model's own (python -m tools.weights info DIR says which)")
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
