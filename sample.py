"""Ask a trained model about pictures.

    python sample.py --image cat.jpg                  # what it sees; on a terminal you can go on asking
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image a.png b.png --prompt "What differs?"       # several pictures, in this order
    python sample.py --image cat.jpg < questions.txt  # a caption, then an answer each, up to an empty line
    python sample.py --file QUESTIONS.jsonl --image-root DIR --out ANSWERS.jsonl   # LLaVA's files, in batches
    python sample.py --image cat.jpg --attention look.png      # where it looked for each word of the answer
    python sample.py --image cat.jpg --trace                   # shapes, times and likeliest tokens on the way

Without --model the newest finished run under out/ answers. The answer is printed while it is written. In the
chat (support/chat.py) every question is asked with all turns before it, and one can show other pictures.
Greedy unless --temperature is above 0. Pictures stand where --prompt has <image>, else before the question;
an <image> or </s> in what is typed is text.

A *prompt* is what a model continues: (token ids, [(tiles, layout) of each picture, in their order]).
encode_question makes one; answer() completes any number of them, and every program that asks a model many
questions does so through it. In Python:

    vlm, tok = open_asked(ModelConfig())              # or ModelConfig(model=DIR)
    print(answer_one(vlm, tok, "Where is the ball?", ["cat.jpg"]))
"""

import sys
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch

from conversation import Tokenizer, cut_at_stop, encode_prompt, put_in_front, stop_ids
from data import pad_rows
from model import VLM
from support.cli import UserError, arg, parse, pick_device, run_program
from support.flags import AskConfig, ModelConfig
from support.picture_files import open_image
from support.quantize import join_products, widen_products
from support.weights import check_image_mode, check_tokenizer, newest_run, tokenizer_home
from vision import cut_tiles, join_tiles

DESCRIBE = "Provide a one-sentence caption for the provided image."


@dataclass
class SampleConfig(AskConfig):
    """Which model answers and how it draws its words: support/flags.py."""

    image: tuple = arg((), "picture files, in the order the question speaks of them")
    prompt: str = arg("", "one question; empty: describe the picture, then what is typed or piped")
    file: str = arg("", "questions to answer, JSON lines of {question_id, image, text}; they go to --out")
    image_root: str = arg("", "folder that the pictures' names in --file start from; empty: that of --file")
    out: str = arg("", "file for the answers to --file, JSON lines of {question_id, prompt, text, model_id}")
    resume: bool = arg(False, "go on with the answers of an interrupted --file")
    attention: str = arg("", "PNG for where in the pictures the decoder looked, word by word")
    trace: bool = arg(False, "print shapes, milliseconds and likeliest words on the way through the model")


def main(argv=None):
    cfg = parse(SampleConfig, argv, __doc__)
    if cfg.attention and not cfg.image:
        raise UserError("--attention needs a picture to look at: give --image, too")
    if cfg.file or cfg.out or cfg.resume or cfg.image_root:
        from support.asking import answer_file  # which imports this file

        return answer_file(cfg)
    if not (cfg.prompt or cfg.image or sys.stdin):
        raise UserError("nothing to answer: give --image, --prompt or both")
    from support.chat import Chat, talk

    images = [open_image(path) for path in cfg.image]  # before a model is read: they may not be there
    vlm, tok = open_asked(cfg)
    return talk(Chat(vlm, tok, cfg), images)


def open_asked(cfg: ModelConfig):
    """-> the VLM, whose cfg holds the template and the image mode asked for, and its Tokenizer.

    An empty cfg.model becomes the name of the run that answers.
    """
    cfg.model = cfg.model or newest_run()
    dtype = None if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    int8 = cfg.quantize == "int8"
    vlm = VLM.from_pretrained(cfg.model, pick_device(cfg.device), dtype, cfg.vision, cfg.llm, int8)
    widen_products(vlm)  # 16 bits on a CPU: prompts in float32, far faster without bfloat16 instructions
    join_products(vlm)  # 32 bits on a CPU: faster steps
    tok = Tokenizer(tokenizer_home(cfg.model, cfg.llm))
    check_tokenizer(vlm, tok)
    vlm.cfg.template = cfg.template or vlm.cfg.template
    vlm.cfg.image_mode = cfg.image_mode or vlm.cfg.image_mode
    check_image_mode(vlm, cfg.model)
    return vlm, tok


# ---- one question ----


def answer_one(vlm, tok, question, files=(), max_new_tokens=256):
    """A question about picture files -> the text of the answer. A chat (support/chat.py) goes the same way,
    turn by turn, but for the last step: stream_answer shows the answer while it is written."""
    images = [open_image(file) for file in files]
    pictures = [cut_picture(vlm, image, len(images)) for image in images]
    prompt = encode_question(vlm, tok, question, pictures)
    [found] = answer(vlm, tok, [prompt], max_new_tokens)
    return found.text


def cut_picture(vlm, image, n_picture=1):
    """One of a prompt's n_picture pictures -> its tiles (n, 3, S, S) and layout (M, 2) for this model."""
    return cut_tiles(image, vlm.cfg.vision, vlm.cfg.image_mode, n_picture)


def encode_question(vlm, tok, text, pictures=(), earlier=()):
    """A question after the turns `earlier` -> a prompt. Pictures stand where <image> does, else in front."""
    turns = put_in_front([*earlier, ("human", text)], len(pictures))
    n_visual = [len(layout) for _, layout in pictures]
    return encode_prompt(tok, turns, vlm.cfg.template, n_visual), list(pictures)


def stream_answer(vlm, tok, prompt, cfg, history=None):
    """Yield the Answer as it grows, with each token. history: the KVHistory of a chat."""
    batch = make_batch(vlm, tok, [prompt], cfg.max_new_tokens)
    ids = []
    for new in vlm.stream(**batch, history=history, **cfg.sampling):
        ids.append(int(new))
        so_far = read_answer(tok, vlm.cfg.template, ids)
        if so_far.whole:
            break

        # Half a character, the beginning of a stop and a space wait for what follows.
        text = cut_at_stop(tok.decode(ids, partial=True), vlm.cfg.template, partial=True)
        yield so_far._replace(text=text.strip())
    yield so_far


class Answer(NamedTuple):
    text: str  # without the stop and the spaces around
    whole: bool  # the stop came; else the tokens ran out
    ids: list  # every token it cost, the stop among them


def make_batch(vlm, tok, prompts, max_new_tokens):
    """What vlm.generate and vlm.stream need of prompts. An answer ends where the model's context does."""
    lengths = [len(ids) for ids, _ in prompts]
    T = max(lengths)
    block_size = vlm.cfg.decoder.block_size
    if T >= block_size:
        raise UserError(
            f"a prompt of {T} tokens leaves no room for an answer: the model takes {block_size} "
            "with its answer; ask less, or begin a new chat"
        )
    pixels, layout = join_tiles([picture for _, pictures in prompts for picture in pictures])
    return {
        "tokens": pad_rows([ids for ids, _ in prompts], tok.pad).to(vlm.device),  # (B, T)
        "lengths": lengths,
        "pixels": pixels.to(vlm.device),  # (n, 3, S, S), all tiles of the batch
        "layout": layout.to(vlm.device),  # (M, 2)
        "max_new_tokens": min(max_new_tokens, block_size - T),
        "stop": stop_ids(tok, vlm.cfg.template),
    }


def read_answer(tok, template, ids):
    """New ids -> Answer. Most templates end an answer by a token, some by a string such as ###."""
    stops = stop_ids(tok, template)
    before = list(takewhile(lambda token: token not in stops, ids))
    decoded = tok.decode(before)
    text = cut_at_stop(decoded, template)
    whole = len(before) < len(ids) or text != decoded
    return Answer(text.strip(), whole, ids[: len(before) + 1])


# ---- many questions at once ----


def answer(vlm, tok, prompts, max_new_tokens, batch_size=48, seed=0, **sampling):
    """Prompts of any number -> [Answer, ...] in their order.

    sampling: temperature, top_p, top_k, as vlm.stream takes them; greedy without.
    """
    order = order_prompts(prompts)
    answers = [None] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        batch = make_batch(vlm, tok, [prompts[i] for i in rows], max_new_tokens)
        new = vlm.generate(**batch, seed=seed + start, **sampling)
        for i, ids in zip(rows, new.tolist()):
            answers[i] = read_answer(tok, vlm.cfg.template, ids)
    return answers


def order_prompts(prompts):
    """-> indices of prompts: those with the same pictures side by side, so that what they share is computed
    once; and by length, so that little is padded."""
    groups = {}
    for i, (_, pictures) in enumerate(prompts):
        same_tiles = tuple(tiles for tiles, _ in pictures)  # the same tensors; see vision.join_tiles
        groups.setdefault(same_tiles or i, []).append(i)
    by_length = sorted(groups.values(), key=lambda group: max(len(prompts[i][0]) for i in group))
    return [i for group in by_length for i in group]


if __name__ == "__main__":
    sys.exit(run_program(main))
