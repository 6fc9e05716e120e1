"""Conversations to tokens and labels: prompts, templates, tokenizer.

    [("human", "<image>\\nWhat is this?"), ("gpt", "A cat.")]
      --template-->    "A chat between a curious user and an artificial intelligence assistant. The assistant
                       gives helpful, detailed, and polite answers to the user's questions. USER: <image>\\n
                       What is this? ASSISTANT:« A cat.</s>»"       « » around what is supervised
      --tokenizer-->   tokens (T,), in which a picture is a run of image-token ids, one a visual token
                       labels (T,): under each token its own id where it is supervised, IGNORE elsewhere
A position is marked when its text is appended: nothing is tokenised twice, compared or guessed afterwards.

An <image> is LLaVA's marker in a text: here stands a picture. Among the tokens it becomes as many image
tokens (Tokenizer.image) as the picture has visual tokens. An "<image>" that a user typed is a word (TYPED).

Where this departs from the code of LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL
(arXiv:2411.10442):
  - LLaVA moves every <image> to the front of its question, and makes one of several. Here only a question
    with a single <image>, at its end ("question\\n<image>"), is changed so; others stay as they were written.
  - "</s>", "<|im_end|>" or "<IMG_CONTEXT>" typed by a user stays text. The originals turn it into the
    control token.
  - After </s> comes "USER" without a leading space, one id in Llama's vocabulary, which is what
    `legacy=false` in the public tokenizer configs means today. The weights were probably trained with a
    version that split it in two. Folders that say `legacy: true` are read the same way.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from model import IGNORE
from support.cli import UserError, nearest
from support.control_tokens import NOWHERE, find_control_tokens, find_cuts, read_sentencepiece
from support.io import reading
from support.templates import OTHER_TEMPLATES, SYSTEM_VICUNA

CONTROL = r"(</?s>|<\|im_start\|>|<\|im_end\|>|<image>|[«»])"  # what is special in a template
TYPED = "<\0image>"                  # an <image> that is a word, until it is encoded

# ---- templates ----


@dataclass(frozen=True)
class Template:
    """How turns become one text. "{}" is the turn's own text, and what stands between « and » is supervised.

    <s>, </s>, <|im_start|> and <|im_end|> are control tokens here and nowhere else. An <image> in `first` is
    the place of all pictures.
    """
    first: str                       # the first question and all that stands around it
    human: str | None                # each later question; None: there can be no later one
    answer: str
    stop: str = "</s>"               # what ends an answer: a token in < >, or a text (cut_at_stop)
    tidy: str = "image first"        # of a turn's text: a lone <image> to its front; or "strip", or "none"
    picture: tuple = ("<image>",)    # an <image> and the control tokens around it
    keep_question: bool = True       # False: of a question only its pictures stay
    captions: str = "plain"          # the template of this model's stage 1, which learns captions


TEMPLATES = {
    # LLaVA-1.5 is vicuna_v1, as above, and its stage 1 plain.
    "vicuna_v1": Template(SYSTEM_VICUNA + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),
    "plain": Template("{}", None, "«{}\n»", stop="\n", keep_question=False),
}
TEMPLATES |= {name: Template(**fields) for name, fields in OTHER_TEMPLATES.items()}


def find_template(name):
    name = str(name)  # a config.json may hold anything
    if name not in TEMPLATES:
        hint = nearest(name, TEMPLATES, cutoff=0)
        raise UserError(f"template {name!r} is unknown{hint} Known are {', '.join(TEMPLATES)}. The model's "
                        "config.json names it; give another by --template")
    return TEMPLATES[name]


# ---- conversations ----


def encode_conversation(tok, turns, template_name, n_visual):
    """[("human", text), ("gpt", text), ...] -> tokens, labels (lists).

    n_visual: how many visual tokens each <image> becomes. A leading answer is dropped, as in the original,
    and so is a last question that has no answer: nothing of it is supervised.
    """
    if turns and turns[-1][0] == "human":
        turns = turns[:-1]
    return encode_turns(tok, turns, template_name, n_visual)


def encode_prompt(tok, turns, template_name, n_visual):
    """A conversation that ends in a question -> its tokens (a list), up to where the answer begins."""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    tokens, _ = encode_turns(tok, turns, template_name, n_visual)
    return tokens


def encode_turns(tok, turns, template_name, n_visual):
    """-> tokens, labels.

    Adjacent texts are encoded as one. Cuts are made at control tokens, at pictures, and where supervision
    begins or ends; hence the ids of a prompt are the first ids of the training example. Cutting "ASSISTANT:"
    from " A cat." yields the ids of the uncut text, since a Llama piece has a space only at its start.
    """
    turns = arrange_turns(turns, template_name, len(n_visual))
    pieces = split_turns(turns, find_template(template_name), len(n_visual))
    lengths = iter(n_visual)
    tokens, labels = [tok.bos], [IGNORE]
    # Whether the next text gets sentencepiece's space: at the start, and after a picture of LLaVA.
    dummy_prefix = True
    for (special, supervised), same in groupby(pieces, key=lambda piece: (piece.special, piece.supervised)):
        texts = [piece.text for piece in same]
        if not special:
            ids = tok.encode("".join(texts).replace(TYPED, "<image>"), dummy_prefix)
            dummy_prefix = False
        else:
            ids = []
            for text in texts:
                ids += [tok.image] * next(lengths) if text == "<image>" else [tok.control_id(text)]
            dummy_prefix = texts[-1] == "<image>"
        tokens += ids
        labels += ids if supervised else [IGNORE] * len(ids)
    return tokens, labels


def arrange_turns(turns, template_name, n_picture):
    """Check the turns, and bring every <image> to its place."""
    template = find_template(template_name)
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns:
        raise UserError("no answer to learn from; a human turn and a gpt turn after it are needed")
    for k, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[k % 2]:
            raise UserError(f"turn {k + 1} is from {role!r}; turns must go human, gpt, human, gpt")
        if role == "gpt" and not text.strip():
            raise UserError(f"the answer in turn {k + 1} is empty; write it or drop the record")
        if role == "gpt" and "<image>" in text and n_picture:
            raise UserError(f"the answer in turn {k + 1} holds <image>; pictures stand in questions")
    if len(turns) > 2 and template.human is None:
        raise UserError(f"template {template_name} takes one question and one answer, not {len(turns)} turns")
    if not template.keep_question and not n_picture:
        raise UserError(f"template {template_name} needs a picture; use another --template for text alone")

    # One <image> for each picture. A single picture may come without.
    if n_picture == 1:
        turns = put_in_front(turns, 1)
    n_marker = sum(text.count("<image>") for _, text in turns)
    if n_picture and n_marker != n_picture:
        raise UserError(f"{n_marker} <image> for {n_picture} pictures; write one for each in the questions")
    return [(role, tidy_text(text, role, template, n_picture)) for role, text in turns]


def tidy_text(text, role, template, n_picture):
    """A turn's text as the original model's data code leaves it."""
    stripped = text.strip()
    if role == "human" and not template.keep_question:  # stage 1
        return "<image>" * text.count("<image>")
    if template.tidy == "image first":  # LLaVA: a lone picture at either end of a question comes to the front
        at_an_end = stripped.startswith("<image>") or stripped.endswith("\n<image>")
        if n_picture and text.count("<image>") == 1 and at_an_end:
            return ("<image>\n" + stripped.replace("<image>", "").strip()).strip()
    if "<image>" in template.first:  # Prismatic: all pictures stand right after <s>
        stripped = text.replace("<image>", "").strip()
    return stripped if template.tidy == "strip" else text


def put_in_front(turns, n_picture):
    """Begin the first question with an <image> for each picture, if no turn says where they stand."""
    if not n_picture or any("<image>" in text for _, text in turns):
        return turns
    role, text = turns[0]
    return [(role, "<image>" * n_picture + "\n" + text), *turns[1:]]


def as_text(text):
    """What a user or a model has written, where <image> is a word, for a conversation that has pictures."""
    return text.replace("<image>", TYPED)


class Piece(NamedTuple):
    text: str
    special: bool     # a control token of the template, or an <image>
    supervised: bool


def split_turns(turns, template, n_picture):
    """Cut a conversation into texts and the special tokens between them. -> [Piece]"""
    pieces = []
    supervised = False
    for k, (role, text) in enumerate(turns):
        if role == "gpt":
            frame = template.answer
        elif k > 0:
            frame = template.human
        else:
            frame = template.first.replace("<image>", "<image>" * n_picture)
        before, after = frame.split("{}")

        # Control tokens come from the template alone. What a user types may hold pictures, nothing else;
        # where there are none, "<image>" is a word.
        typed = "(<image>)" if n_picture else NOWHERE
        for part, specials in (before, CONTROL), (text, typed), (after, CONTROL):
            for j, stretch in enumerate(re.split(specials, part)):  # text, special, text, ..., special, text
                is_special = j % 2 == 1
                if is_special and stretch in ("«", "»"):
                    supervised = stretch == "«"
                elif is_special and stretch == "<image>":
                    pieces += [Piece(token, True, supervised) for token in template.picture]
                elif stretch:
                    pieces.append(Piece(stretch, is_special, supervised))
    return pieces


# ---- where an answer ends ----


def stop_ids(tok, template_name):
    """Ids that end an answer: </s>, and the template's own if that is a token.

    A text as stop, such as ###, ends nothing: answers run on, and cut_at_stop cuts them.
    """
    stop = find_template(template_name).stop
    is_token = stop.startswith("<") and stop != "</s>"
    return [tok.eos, tok.control_id(stop)] if is_token else [tok.eos]


def cut_at_stop(text, template_name, partial=False):
    """The answer in a text, where the stop is no id but a text, ### or a newline.

    `partial`: more is to come, so what may be the beginning of the stop is held back.
    """
    stop = find_template(template_name).stop
    if stop.startswith("<"):
        return text
    text, found, _ = text.partition(stop)
    if partial and not found:
        # "###" and "\n" each repeat one character, so trailing ones may begin a stop.
        text = text.rstrip(stop[0])
    return text


# ---- tokenizer ----


class Tokenizer:
    """A sentencepiece model, and its control tokens {string: id}, which never come from a text.

    `image` stands for one visual token, and `pad` fills up a batch.
    """

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        # Llama's processor puts a space before a text; the second, which is ours, does not.
        self.processor, self.without_space = read_sentencepiece(self.path)
        self.n_text = self.processor.vocab_size()
        self.bos = self.processor.bos_id()
        self.eos = self.processor.eos_id()

        # What never comes from a text
        self.control, self.image, self.pad = find_control_tokens(self.processor, self.path.parent)
        self.names = {self.image: "<image>", self.pad: "<pad>"}
        self.names |= {i: name for name, i in self.control.items()}
        self.cuts = find_cuts(self.processor, self.without_space, self.names)  # see encode

        # Rows of a new embedding: one an id, 92553 for InternVL; else a multiple of 64, 32064 for Llama.
        n = max(self.n_text, max(self.names) + 1)
        self.vocab_size = n if "<IMG_CONTEXT>" in self.control else -(-n // 64) * 64

    def encode(self, text, dummy_prefix=True):
        """Ids of a text, without <s> and </s>, and never a control token whatever the text says.

        dummy_prefix: put a space before it, as sentencepiece does, which is wanted at the start alone.
        A text is cut inside what would otherwise become a control token of InternLM2.
        """
        with reading(f"the text {text[:40]!a}", "it holds half a surrogate pair; write it as valid Unicode"):
            text.encode()
        first, *others = self.cuts.split(text)
        ids = (self.processor if dummy_prefix else self.without_space).encode(first)
        for part in others:
            ids += self.without_space.encode(part)
        return ids

    def decode(self, ids, partial=False):
        """Text of ids; control tokens, <image>, <pad> and the leading space are dropped.

        `partial`: more is to come, so a character of which only some bytes are there is held back.
        """
        ids = [int(i) for i in ids if 0 <= i < self.n_text and int(i) not in self.names]
        text = self.processor.decode(ids)
        return text.rstrip("\ufffd") if partial else text

    def piece(self, i):
        """How one id is written in a table."""
        return self.names.get(i) or (self.processor.id_to_piece(i) if i < self.n_text else "<unused>")

    def control_id(self, name):
        """The id of a control token that a template wants."""
        if name not in self.control:
            raise UserError(f"{self.path}: has no token {name}; use another --template, or another tokenizer")
        return self.control[name]
