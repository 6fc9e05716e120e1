"""Ask a trained model about pictures.

    python sample.py --image cat.jpg                  # what it sees; on a terminal you can go on asking
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image a.png b.png --prompt "What differs?"       # several pictures, in this order

Without --model the newest finished run under out/ answers. The answer is printed while it is written. In the
chat every question is asked with all turns before it; an empty line, Ctrl-D or Ctrl-C ends it. Greedy
unless --temperature is above 0. Pictures stand before the first question; an <image> or </s> in what is typed
is text.

A *prompt* is what a model continues: (token ids, [(tiles, layout) of each picture, in their order]).
encode_question makes one; answer() completes any number of them, and everything here that asks a model many
questions does so through it.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from conversation import Tokenizer, as_text, cut_at_stop, encode_prompt, find_template, stop_ids
from model import VLM
from support.cli import UserError, arg, parse, pick_device, run
from support.weights import check_image_mode, check_tokenizer, tokenizer_home
from vision import MODES, cut_tiles, join_pictures, open_image

DESCRIBE = "Provide a one-sentence caption for the provided image."
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class AskConfig:
    """Which model answers, and how; pairs.py has these flags, too."""

    model: str = arg("", "model directory; empty: the newest finished run under out/")
    vision: str = arg("", "tower of a model that was published without, DIR or DIR,DIR")
    llm: str = arg("", "directory of the base of a LoRA")
    template: str = arg("", "conversation template; empty: the model's own")
    image_mode: str = arg("", "how a picture becomes tiles; empty: the model's own", choices=MODES)
    temperature: float = arg(
        0.0, "0 takes the likeliest word, more draws at random", at_least=0, below=math.inf
    )
    top_p: float = arg(
        1.0, "draw from the smallest set of words that holds this probability", above=0, at_most=1
    )
    top_k: int = arg(0, "draw from this many likeliest words; 0: all", at_least=0)
    max_new_tokens: int = arg(256, "longest answer in tokens", at_least=1)
    seed: int = arg(0, "of the draws", at_least=0, below=2**30)
    device: str = arg("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = arg(
        "auto", "of the weights; auto: as stored, but bfloat16 for float16 on a CPU", choices=DTYPES
    )


@dataclass
class SampleConfig(AskConfig):
    image: tuple = arg((), "picture files, in the order the question speaks of them")
    prompt: str = arg("", "one question; empty: describe the picture, then chat if this is a terminal")


# ---- open a model ----


def open_asked(cfg):
    """The model of an AskConfig, whose name it then holds."""
    cfg.model = cfg.model or str(newest_run())
    device = pick_device(cfg.device)
    return open_model(cfg.model, device, cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)


def open_model(directory, device="cpu", dtype="auto", vision=None, llm=None, template="", image_mode=""):
    """-> VLM, whose cfg holds the template and the image mode that were asked for, and its Tokenizer."""
    if template:
        find_template(template)  # an unknown name is said before gigabytes are read
    dtype = None if dtype == "auto" else getattr(torch, dtype)
    vlm = VLM.from_pretrained(directory, device, dtype, vision, llm)
    tok = Tokenizer(tokenizer_home(directory, llm))
    check_tokenizer(vlm, tok)

    template = template or vlm.cfg.template
    image_mode = image_mode or vlm.cfg.image_mode
    check_image_mode(vlm, image_mode, directory)
    vlm.cfg = replace(vlm.cfg, template=template, image_mode=image_mode)
    return vlm, tok


def newest_run(root="out"):
    """The model directory under out/ that was finished last: config.json is the last file a run writes."""
    finished = Path(root).glob("*/config.json")
    newest = max(finished, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"no finished run under {root}/; train one (python train.py --stage finetune), or give "
            "--model DIR, such as the checkpoint-N of an unfinished one"
        )
    return newest.parent


# ---- prompts and answers ----


class Answer(NamedTuple):
    text: str  # without the stop and the spaces around
    whole: bool  # the stop came; else the tokens ran out
    ids: list  # every token it cost, the stop among them


def open_picture(vlm, path):
    """A picture file -> tiles (n, 3, S, S) and layout (M, 2), as this model looks at pictures."""
    return cut_tiles(open_image(path), vlm.cfg.vision, vlm.cfg.image_mode)


def encode_question(vlm, tok, text, pictures=(), earlier=()):
    """A question after the turns `earlier` -> a prompt. Pictures stand where <image> does, else in front."""
    turns = [*earlier, ("human", text)]
    if pictures and not any("<image>" in words for _, words in turns):
        role, first = turns[0]
        turns[0] = (role, "<image>" * len(pictures) + "\n" + first)
    n_visual = [len(layout) for _, layout in pictures]
    return encode_prompt(tok, turns, vlm.cfg.template, n_visual), list(pictures)


@torch.no_grad()
def answer(vlm, tok, prompts, max_new_tokens=96, batch_size=48, seed=0, **choices):
    """Prompts of any number -> [Answer, ...] in their order.

    Greedy, unless `choices` say temperature, top_p or top_k.
    """
    # Prompts of about one length go together, so that little is padded. In a batch they keep their order.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    answers = [None] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = sorted(by_length[start : start + batch_size])
        batch = make_batch(vlm, tok, [prompts[i] for i in rows], max_new_tokens)
        new = vlm.generate(**batch, seed=seed + start, **choices)
        for i, ids in zip(rows, new.tolist()):
            answers[i] = read_answer(tok, vlm.cfg.template, ids)
    return answers


def make_batch(vlm, tok, prompts, max_new_tokens):
    """What vlm.generate and vlm.stream need of prompts. An answer ends where the model's context does."""
    lengths = [len(ids) for ids, _ in prompts]
    T, block_size = max(lengths), vlm.cfg.decoder.block_size
    if T >= block_size:
        raise UserError(
            f"a prompt of {T} tokens leaves no room for an answer: the model takes {block_size} "
            "with its answer; ask less, or begin a new chat"
        )
    device = vlm.decoder.lm_head.weight.device
    padded = [ids + [tok.pad] * (T - len(ids)) for ids, _ in prompts]
    pixels, layout = gather_pictures(prompts, device)
    return {
        "tokens": torch.tensor(padded, device=device),  # (B, T)
        "lengths": lengths,
        "pixels": pixels,
        "layout": layout,
        "max_new_tokens": min(max_new_tokens, block_size - T),
        "stop": stop_ids(tok, vlm.cfg.template),
    }


def gather_pictures(prompts, device):
    """All tiles (n, 3, S, S) and the layout (M, 2) of a batch, or two None without pictures."""
    pictures = [picture for _, its_pictures in prompts for picture in its_pictures]
    if not pictures:
        return None, None
    tiles, layout = join_pictures(pictures)
    return tiles.to(device), layout.to(device)


def read_answer(tok, template, ids):
    """New ids -> Answer. Most templates end an answer by a token, some by a string such as ###."""
    stops = stop_ids(tok, template)
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    if end is not None:
        ids = ids[: end + 1]
    text = tok.decode(ids)
    before_stop = cut_at_stop(text, template)
    whole = end is not None or before_stop != text
    return Answer(before_stop.strip(), whole, ids)


# ---- stream and chat ----


def stream_answer(vlm, tok, prompt, cfg):
    """Print the answer word by word -> Answer."""
    template = vlm.cfg.template
    batch = make_batch(vlm, tok, [prompt], cfg.max_new_tokens)
    choices = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k, "seed": cfg.seed}
    ids, shown = [], ""
    for new in vlm.stream(**batch, **choices):
        ids.append(int(new))
        said = read_answer(tok, template, ids)
        if said.whole:
            break

        # Half a character, the beginning of a stop and a space wait for what follows.
        text = cut_at_stop(tok.decode(ids, partial=True), template, partial=True).strip()
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(said.text[len(shown) :], flush=True)

    if not said.whole:
        limit = f"with the prompt these are all {vlm.cfg.decoder.block_size} the model takes"
        if len(ids) == cfg.max_new_tokens:
            limit = "raise --max-new-tokens"
        print(f"[cut off after {len(ids)} tokens; {limit}]", file=sys.stderr)
    elif not said.text:
        print("[the model gave an empty answer]", file=sys.stderr)
    return said


def read_question():
    """One line from the terminal; empty when the user is done."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main(argv=None):
    cfg = parse(SampleConfig, argv, description=__doc__)
    images = [open_image(path) for path in cfg.image]  # before a model is read: they may not be there
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    chat = on_terminal and not cfg.prompt
    if not (cfg.prompt or images or chat):
        raise UserError("nothing to answer: give --image, --prompt or both")
    vlm, tok = open_asked(cfg)
    pictures = [cut_tiles(image, vlm.cfg.vision, vlm.cfg.image_mode) for image in images]

    # The first question: the user's, else for a caption, else the first that is typed.
    question = cfg.prompt
    if not question and images:
        question = DESCRIBE
        print(f"> {question}")
    question = question or read_question()

    turns = []
    while question:
        prompt = encode_question(vlm, tok, as_text(question), pictures, turns)
        said = stream_answer(vlm, tok, prompt, cfg)
        if said.text:  # an empty answer is no turn to go on from
            turns += [("human", as_text(question)), ("gpt", as_text(said.text))]
        question = read_question() if chat else ""
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
