"""Records to tokens, labels and pixels: everything between a file on disk and a batch the model can take.

The way of a record:
    FILE  --Records-->  {"id", "images": [name, ...], "turns": [("human", "<image>\\nWhat is this?"), ("gpt", "A cat."), ...]}
      --vision.py-->  tiles (n, 3, S, S) uint8, and for every picture the number of visual tokens it will become
      --encode_conversation-->  tokens (T,) and labels (T,); a picture is a run of that many image-token ids
      --collate-->  tokens (B, T), labels (B, T), pixels (N, 3, S, S), padded on the right
Labels stand under their own token (the model shifts them): the token's id where it is supervised, IGNORE elsewhere. A position is
marked when its text is appended, so nothing is tokenised twice, compared or guessed afterwards.

FILE is a LLaVA list [{"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}, ...], the same
with one record per line (JSONL), or questions {"question_id", "image", "text", "answer"}, one per line.

Where this departs from LLaVA's own code (arXiv:2310.03744):
  - a conversation that does not fit is an error or a counted skip; the original cuts it, or sets all its labels to IGNORE;
  - `<image>` is moved to the front of its turn only from the very end of it ("question\\n<image>"); the original moves it from anywhere
    and merges several into one, here several pictures stay where they were written;
  - "</s>" or "<s>" typed by a user stays text; the original turns it into the control token;
  - after </s> comes "USER" without a leading space, one id in Llama's vocabulary, which is what `legacy=false` in the public
    tokenizer configs means today; the weights were probably trained with a version that split it in two.

    python data.py show FILE --image-root DIR       # one record as the model meets it, its tiles in show.png
    python data.py check FILE --image-root DIR      # missing and broken pictures, lengths, labels; exit 1 if anything is wrong
"""

import argparse
import difflib
import json
import re
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import vision
from vision import UserError

IGNORE = -100                        # label of a position that costs nothing; what F.cross_entropy ignores by default
MAX_RECORD = 64 * 2**20              # bytes; a JSON record of more is taken for a broken file


class Tokenizer:
    """A Llama sentencepiece model, with two ids of our own behind its pieces: <image> and <pad> (the llava-hf numbering)."""

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer there ({error.strerror}); give a sentencepiece `tokenizer.model` or a folder that holds one") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=raw or b"empty")
            # The same model without the space it puts before a text. Two protobufs written one after the other are merged, the
            # later field wins: this one says normalizer_spec (field 3) { add_dummy_prefix (field 3): false }.
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(f"{self.path}: not a sentencepiece model, or cut off ({len(raw):,} bytes); copy the file again") from None
        self.n_text = self.processor.vocab_size()
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.image, self.pad = self.n_text, self.n_text + 1
        self.vocab_size = -(-(self.n_text + 2) // 64) * 64               # rows of the embedding: 32000 -> 32064
        self.control = {"<s>": self.bos, "</s>": self.eos}
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{self.path}: has no <s> or no </s>; train it with both, as Llama's has")
        if self.bare.decode(self.bare.encode("a  b\n")) != "a  b\n":     # else newlines would vanish and the pieces of a prompt not add up
            raise UserError(f"{self.path}: does not keep spaces and newlines; train it as Llama's was: normalization_rule_name='identity', "
                            "remove_extra_whitespaces=False, byte_fallback=True")

    def encode(self, text, dummy_prefix=True):
        """Ids of a text, without <s> and </s>, and never a control token whatever the text says.

        `dummy_prefix` is sentencepiece's habit of putting a space before the text. Wanted at the start of a text, wrong in the middle.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text with half a surrogate pair at character {error.start}: {text[:40]!a}; write it as valid Unicode") from None
        return (self.processor if dummy_prefix else self.bare).encode(text)

    def decode(self, ids, partial=False):
        """Text of ids; <s>, </s>, <image>, <pad> and the leading space are dropped.

        `partial` is for printing while ids still come in: a character of which only some bytes are there is held back, so that each
        text begins with the one before it.
        """
        ids = [int(i) for i in ids]
        text = self.bare.decode([i for i in ids if 0 <= i < self.n_text and i not in (self.bos, self.eos)]).removeprefix(" ")
        return text.rstrip("\ufffd") if partial else text

    def piece(self, i):
        """How one id is written in a table."""
        names = {self.image: "<image>", self.pad: "<pad>"}
        return self.processor.id_to_piece(i) if i < self.n_text else names.get(i, "<unused>")


# ---- conversations --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """How turns become one text. "{}" is the place of the turn's own text; <s> and </s> are control tokens here and nowhere else."""
    first: str                       # the first question and all that stands around it
    human: str | None                # each later question; None: there can be no later one
    answer: str                      # an answer: the whole of it is supervised
    keep_question: bool = True       # False: of a question only its pictures stay


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = {
    "vicuna_v1": Template(VICUNA + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", " {}</s>"),  # LLaVA-1.5, stage 2
    "plain": Template("{}", None, "{}\n", keep_question=False),                                # stage 1: picture, caption, newline
}


def encode_conversation(tok, turns, template, n_visual):
    """[("human", text), ("gpt", text), ...] -> tokens, labels (two lists). n_visual: visual tokens of each <image>, in order.

    A leading answer is dropped, as in the original, and so is a question left without an answer at the end (it would cost nothing).
    """
    turns = turns[:-1] if turns and turns[-1][0] == "human" else turns
    turns = arrange(turns, template, len(n_visual))
    if not turns:
        raise UserError("no answer to learn from; add a gpt turn after the human one")
    return encode_turns(tok, turns, template, n_visual)


def encode_prompt(tok, turns, template, n_visual):
    """The same conversation up to where the next answer begins: the last turn is a question. -> tokens (a list)"""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)[0]


def arrange(turns, template, n_image):
    """Check the turns, and bring every <image> to its place: at the front of its turn if it stood at either end, else where it is."""
    form = find_template(template)
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    for k, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[k % 2]:
            raise UserError(f"turn {k + 1} is from {role!r}; turns must go human, gpt, human, gpt")
        if role == "gpt" and not text.strip():
            raise UserError(f"the answer in turn {k + 1} is empty; write it or drop the record")
        if role == "gpt" and "<image>" in text:
            raise UserError(f"the answer in turn {k + 1} holds <image>; pictures can only stand in a question")
    if len(turns) > 2 and form.human is None:
        raise UserError(f"template {template} is for one question and one answer, here are {len(turns)} turns; use another --template")
    n_marker = sum(text.count("<image>") for _, text in turns)
    if (n_marker, n_image) == (0, 1) and turns:
        turns, n_marker = [("human", "<image>\n" + turns[0][1]), *turns[1:]], 1
    if n_marker != n_image:
        raise UserError(f"{n_marker} <image> but {n_image} picture{'s' * (n_image != 1)}; write one <image> in the questions for each picture")
    if not form.keep_question and not n_image and turns:
        raise UserError(f"template {template} needs a picture; use another --template for text alone")
    return [(role, to_front(text) if text.count("<image>") == 1 else text) for role, text in turns]


def to_front(text):
    rest = text.strip()
    if rest.startswith("<image>") or rest.endswith("\n<image>"):
        return ("<image>\n" + rest.replace("<image>", "").strip()).strip()
    return text


def encode_turns(tok, turns, template, n_visual):
    """First one list of spans, then each span to ids. Where a span may end without changing the ids of its neighbours:

    - before the space that opens an answer: "ASSISTANT:" and " A cat." give the ids of "ASSISTANT: A cat.", since a Llama piece
      has spaces only at its start and none can lie across (a piece in the middle gets no dummy prefix);
    - around a control token, as always;
    - around a picture the original encodes each side by itself, with its own dummy prefix. So do we: ":", " ", <image>..., " ", "\\n".
    """
    form, spans = find_template(template), []                              # [kind, text, supervised]
    for k, (role, text) in enumerate(turns):
        if role == "human" and not form.keep_question:
            text = "<image>" * text.count("<image>")
        before, after = (form.answer if role == "gpt" else form.human if k else form.first).split("{}")
        for part, special in (before, "control"), (text, "image"), (after, "control"):
            for piece in re.split("(<image>)" if special == "image" else "(</?s>)", part):
                kind = special if piece in ("<image>", "<s>", "</s>") and piece in SPECIAL[special] else "text"
                if kind == "text" and spans and spans[-1][::2] == ["text", role == "gpt"]:
                    spans[-1][1] += piece
                elif piece:
                    spans.append([kind, piece, role == "gpt"])

    tokens, labels, n_visual = [tok.bos], [IGNORE], iter(n_visual)
    fresh = True                                                           # the next text opens a stretch: it gets the dummy prefix
    for kind, text, supervised in spans:
        if kind == "text":
            ids = tok.encode(text, dummy_prefix=fresh)
        else:
            ids = [tok.image] * next(n_visual) if kind == "image" else [tok.control[text]]
        tokens += ids
        labels += ids if supervised else [IGNORE] * len(ids)
        fresh = kind == "image"
    return tokens, labels
