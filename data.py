"""Records to tokens, labels and pixels: everything between a file on disk and a batch the model can take.

The way of a record:
    FILE  --Records-->  {"id", "images": [name, ...], "turns": [("human", "<image>\\nWhat is this?"), ("gpt", "A cat."), ...]}
      --vision.py-->  tiles (n, 3, S, S) uint8, and their layout (M, 2): the M visual tokens they will become
      --encode_conversation-->  tokens (T,) and labels (T,); a picture is a run of that many image-token ids
      --collate-->  tokens (B, T), labels (B, T), padded on the right; pixels (N, 3, S, S) and layout (M, 2) of all pictures in a row
Labels stand under their own token (the model shifts them): the token's id where it is supervised, IGNORE elsewhere. A position is
marked when its text is appended, so nothing is tokenised twice, compared or guessed afterwards.

FILE is a LLaVA list [{"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}, ...], the same
with one record per line (JSONL), or questions {"question_id", "image", "text", "answer"}, one per line; "question" may stand for "text",
and of a preference pair {"image", "question", "chosen", "rejected"} the chosen answer is the answer.

Where this departs from the code of LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL (arXiv:2411.10442):
  - a conversation that does not fit is an error or a counted skip; the originals cut it, or set all its labels to IGNORE;
  - in LLaVA `<image>` is moved to the front of its turn only from the very end of it ("question\\n<image>"); the original moves it from
    anywhere and merges several into one, here several pictures stay where they were written;
  - "</s>", "<|im_end|>" or "<IMG_CONTEXT>" typed by a user stays text; the originals turn it into the control token. ("###", which
    parts the turns of llava_v0, is no control token: there a user who types it ends his turn, as in the original.)
  - after </s> comes "USER" without a leading space, one id in Llama's vocabulary, which is what `legacy=false` in the public
    tokenizer configs means today; the weights were probably trained with a version that split it in two. Folders that say
    `legacy: true` are read the same way.

    python data.py show FILE --image-root DIR       # one record as the model meets it, its tiles in show.png
    python data.py check FILE --image-root DIR      # missing and broken pictures, lengths, labels; exit 1 if anything is wrong
    python data.py tokenizer FILE --out DIR         # the records' own words as tokens, for a decoder that starts from random weights
"""

import argparse
import csv
import difflib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import vision
from vision import UserError, default_template, prismatic_llm

IGNORE = -100                        # label of a position that costs nothing; what F.cross_entropy ignores by default
TURN = '{"from": "human" or "gpt", "value": text}'
RECORD = '{"id", "image", "conversations": [' + TURN + ", ...]}"
MAX_RECORD = 64 * 2**20              # bytes; a JSON record of more is taken for a broken file


class Tokenizer:
    """A sentencepiece model, and the table of its control tokens, {string: id}: those are never read from a text, only placed.

    Llama: <s> and </s>. InternLM2: also six placeholder pieces of the model, and InternVL's nine tokens behind them. Then whatever
    added_tokens.json and tokenizer_config.json of the same folder declare. `image` stands for one visual token and `pad` fills up a
    batch; where no file names them they take the next free ids, 32000 and 32001 in Llama as in llava-hf. Prismatic adds <PAD> as
    32000 and has no token for a picture: 32001 then, a row that it never uses.
    """

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer there ({error.strerror}); copy there the tokenizer.model, a sentencepiece model, "
                            "that belongs to its language model") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=raw or b"empty")
            # The same model without the space it puts before a text. Two protobufs written one after the other are merged, the
            # later field wins: this one says normalizer_spec (field 3) { add_dummy_prefix (field 3): false }.
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(f"{self.path}: not a sentencepiece model, or cut off ({len(raw):,} bytes); copy the file again") from None
        self.n_text = self.processor.vocab_size()
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{self.path}: has no <s> or no </s>; train it with both, as Llama's has")
        if self.bare.decode(self.bare.encode("a  b\n")) != "a  b\n":     # else newlines would vanish and the pieces of a prompt not add up
            raise UserError(f"{self.path}: does not keep spaces and newlines; train it as Llama's was: normalization_rule_name='identity', "
                            "remove_extra_whitespaces=False, byte_fallback=True")
        self.prefix = " " * (self.processor.encode("a") != self.bare.encode("a"))    # InternLM2 puts no space before a text
        self.control = self.control_tokens(self.path.parent)
        free = count(max(self.n_text, *(i + 1 for i in self.control.values())))
        image, pad = ([self.control[name] for name in names.split() if name in self.control] for names in ("<IMG_CONTEXT> <image>", "<pad> <PAD>"))
        self.image = image[0] if image else next(free)
        self.pad = pad[0] if pad else self.eos if "<|im_end|>" in self.control else next(free)       # InternLM2 pads with </s>
        self.names = {self.image: "<image>", self.pad: "<pad>"} | {i: name for name, i in self.control.items()}
        self.n_id = max(self.n_text - 1, *self.names) + 1                # every id is below this; rows of a new embedding: 32064, or 92553
        self.vocab_size = self.n_id if "<IMG_CONTEXT>" in self.control else -(-self.n_id // 64) * 64
        # A control token that is a piece like others, "[UNUSED_TOKEN_145]", would be found in a text: there the text is cut in two
        pieces = [self.processor.id_to_piece(i) for i in self.names if i < self.n_text]
        pieces = [p for p in pieces if self.bare.encode(p) == [self.processor.piece_to_id(p)]]
        self.typed = re.compile("|".join(f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in pieces) or "(?!)")

    def control_tokens(self, folder):
        """{string: id} of <s>, </s>, what InternLM2 means by its placeholder pieces, and what the files beside the model declare."""
        found = {"<s>": self.bos, "</s>": self.eos}
        placeholders = [self.processor.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in range(141, 147)]
        if placeholders[-1] != self.processor.unk_id():
            found |= zip("<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|>".split(), placeholders)
            found |= zip("<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split(), count(self.n_text))   # InternVL's
        config, added, declared = (read_json(folder / f"{name}.json") for name in ("config", "added_tokens", "tokenizer_config"))
        if prismatic_llm(config):
            found["<PAD>"] = self.n_text
        try:
            found |= {name: int(i) for name, i in added.items()}
            for i, token in declared.get("added_tokens_decoder", {}).items():
                if token.get("special") or int(i) >= self.n_text:
                    found[token["content"]] = int(i)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: added_tokens.json or tokenizer_config.json do not list tokens and ids ({error!r}); copy both") from None
        return found

    def encode(self, text, dummy_prefix=True):
        """Ids of a text, without <s> and </s>, and never a control token whatever the text says.

        `dummy_prefix` is sentencepiece's habit of putting a space before the text. Wanted at the start of a text, wrong in the middle.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text with half a surrogate pair at character {error.start}: {text[:40]!a}; write it as valid Unicode") from None
        text, *rest = self.typed.split(text)
        return (self.processor if dummy_prefix else self.bare).encode(text) + [i for part in rest for i in self.bare.encode(part)]

    def decode(self, ids, partial=False):
        """Text of ids; control tokens, <image>, <pad> and the leading space are dropped.

        `partial` is for printing while ids still come in: a character of which only some bytes are there is held back, so that each
        text begins with the one before it.
        """
        ids = [int(i) for i in ids]
        text = self.bare.decode([i for i in ids if 0 <= i < self.n_text and i not in self.names]).removeprefix(self.prefix)
        return text.rstrip("\ufffd") if partial else text

    def piece(self, i):
        """How one id is written in a table."""
        return self.names.get(i) or (self.processor.id_to_piece(i) if i < self.n_text else "<unused>")

    def place(self, name):
        """The id of a control token that a template wants."""
        if name not in self.control:
            raise UserError(f"{self.path}: has no token {name}; use another --template, or the tokenizer that belongs to this one")
        return self.control[name]


# ---- conversations --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """How turns become one text. "{}" is the turn's own text, and what stands between « and » is supervised. <s>, </s>, <|im_start|>
    and <|im_end|> are control tokens here and nowhere else; an <image> is the place of all pictures."""
    first: str                       # the first question and all that stands around it
    human: str | None                # each later question; None: there can be no later one
    answer: str
    stop: str = "</s>"               # what ends an answer: a control token, or else a string to look for (cut_at_stop)
    turn: str = "front"              # what is done to a turn: "front" puts its <image> there, "strip" strips it, "" nothing
    around: tuple = ()               # control tokens before and after each picture
    keep_question: bool = True       # False: of a question only its pictures stay


VICUNA, HUMAN = (f"A chat between a curious {who} and an artificial intelligence assistant. "
               f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions." for who in ("user", "human"))
LLAMA_2 = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
           "and assist the user with a variety of tasks using natural language.")
INTERNVL2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
INTERNVL2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
ASK, ASK_LINES = (f"<|im_start|>user\n{{}}<|im_end|>{end}<|im_start|>assistant\n" for end in ("", "\n"))
INTERN = {"stop": "<|im_end|>", "around": ("<img>", "</img>")}
# Prismatic encodes each turn by itself, with its own dummy prefix: that is the space before a later question, a byte that its strings
# lack and its ids have. It puts the pictures right after <s>. "<<SYS>" is its own misspelling, which its weights have learned.
TEMPLATES = {
    "vicuna_v1": Template(VICUNA + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),                   # LLaVA-1.5, stage 2
    "llava_v1": Template(HUMAN + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),
    # llava_v0 is trained here as it is asked; the original trained with "\n\n### Human: q\n### Assistant: a\n### ", same parts supervised
    "llava_v0": Template(HUMAN + "###Human: {}«###Assistant:»", "Human: {}«###Assistant:»", "« {}###»", stop="###"),
    "llava_llama_2": Template(f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", "<s>[INST] {} [/INST]", "« {} </s>»"),
    "plain": Template("{}", None, "«{}\n»", stop="\n", keep_question=False),                                      # LLaVA, stage 1
    "prism_plain": Template("{}", None, "«{}</s>»", turn="strip", keep_question=False),                           # Prismatic's align stage
    "prism_pure": Template("<image>In: {}\nOut:", " In: {}\nOut:", "« {}</s>»", turn="strip"),
    "prism_vicuna": Template(f"<image>{VICUNA} USER: {{}} ASSISTANT:", " USER: {} ASSISTANT:", "« {}</s>»", turn="strip"),
    "prism_llama_2": Template(f"<image>[INST] <<SYS>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", " [INST] {} [/INST]", "« {}</s>»", turn="strip"),
    "prism_mistral": Template("<image>[INST] {} [/INST]", " [INST] {} [/INST]", "« {}</s>»", turn="strip"),
    "internlm2-chat": Template(f"<|im_start|>system\n{INTERNVL2}<|im_end|>{ASK}", ASK, "«{}<|im_end|>»", turn="strip", **INTERN),
    "internvl2_5": Template(f"<|im_start|>system\n{INTERNVL2_5}<|im_end|>\n{ASK_LINES}", ASK_LINES, "«{}<|im_end|>»\n", turn="", **INTERN),
}


def find_template(name):
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0.0)
        raise UserError(f"template {name!r} is unknown; did you mean {near[0]!r}? Known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def stop_ids(tok, template):
    """Ids that end an answer: </s>, and the template's own."""
    stop = find_template(template).stop
    return [tok.eos, tok.place(stop)] if stop.startswith("<|") else [tok.eos]


def cut_at_stop(text, template, partial=False):
    """The answer in a text, where the stop is no id but a string, ### or a newline. `partial`: what may be its beginning is held back."""
    stop = find_template(template).stop
    if stop.startswith("<"):
        return text
    text, found, _ = text.partition(stop)
    return text.rstrip(stop[0]) if partial and not found else text         # both are runs of one character


def train_tokenizer(path, lines, vocab_size, required=""):
    """Write Llama's kind of sentencepiece model: byte pairs, characters that no line has as bytes, no piece for a newline or two spaces.

    `required`: characters that become pieces however rare they are. The same lines give the same file.
    """
    if vocab_size < 260:
        raise UserError(f"no tokenizer of {vocab_size} tokens: bytes and marks alone are 259, and then come characters and words; give more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line.strip() for line in lines), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            required_chars=required, split_digits=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    except (RuntimeError, TypeError, ValueError) as error:                 # also where half a character (a lone surrogate) is in a text
        why = str(error).rpartition("] ")[2].split(" or decrease character_coverage")[0] or "they hold no words"
        raise UserError(f"no tokenizer of {vocab_size} tokens can be made of these texts: {why}") from None
    Path(path).write_bytes(model.getvalue())


def encode_conversation(tok, turns, template, n_visual):
    """[("human", text), ("gpt", text), ...] -> tokens, labels (two lists). n_visual: visual tokens of each <image>, in order.

    A leading answer is dropped, as in the original, and so is a question left without an answer at the end (it would cost nothing).
    """
    turns = turns[:-1] if turns and turns[-1][0] == "human" else turns
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)


def encode_prompt(tok, turns, template, n_visual):
    """The same conversation up to where the next answer begins: the last turn is a question. -> tokens (a list)"""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)[0]


def arrange(turns, template, n_image):
    """Check the turns, and bring every <image> to its place. In a record without pictures "<image>" is a word like any other."""
    form = find_template(template)
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if not turns:
        raise UserError("no answer to learn from; a human turn and a gpt turn after it are needed")
    for k, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[k % 2]:
            raise UserError(f"turn {k + 1} is from {role!r}; turns must go human, gpt, human, gpt")
        if role == "gpt" and not text.strip():
            raise UserError(f"the answer in turn {k + 1} is empty; write it or drop the record")
        if role == "gpt" and "<image>" in text and n_image:
            raise UserError(f"the answer in turn {k + 1} holds <image>; pictures can only stand in a question")
    if len(turns) > 2 and form.human is None:
        raise UserError(f"template {template} is for one question and one answer, here are {len(turns)} turns; use another --template")
    if not form.keep_question and not n_image:
        raise UserError(f"template {template} needs a picture; use another --template for text alone")
    n_marker = sum(text.count("<image>") for _, text in turns) if n_image else 0
    if (n_marker, n_image) == (0, 1):
        turns, n_marker = [("human", "<image>\n" + turns[0][1]), *turns[1:]], 1
    if n_marker != n_image:
        raise UserError(f"{n_marker} <image> but {n_image} picture{'s' * (n_image != 1)}; write one <image> in the questions for each picture")
    return [(role, tidy(text, role, form, n_image)) for role, text in turns]


def tidy(text, role, form, n_image):
    """A turn's text as the original model's data code leaves it. LLaVA's <image> goes to the front if it stood at either end."""
    if role == "human" and not form.keep_question:
        return "<image>" * text.count("<image>")
    if "<image>" in form.first:
        text = text.replace("<image>", "")
    rest = text.strip()
    if form.turn == "front" and n_image and text.count("<image>") == 1 and (rest.startswith("<image>") or rest.endswith("\n<image>")):
        return ("<image>\n" + rest.replace("<image>", "").strip()).strip()
    return rest if form.turn == "strip" else text


TYPED = "<\0image>"                  # how as_text writes an <image>. Nobody can type a NUL


def as_text(text):
    """What a user or a model has written, of which <image> is a word and no picture's place, for a conversation that has pictures."""
    return text.replace("<image>", TYPED)


CONTROL = r"(</?s>|<\|im_start\|>|<\|im_end\|>|<image>|[«»])"           # what a template's own strings are cut at


def encode_turns(tok, turns, template, n_visual):
    """First one list of spans, then each span to ids. Where a span may end without changing the ids of its neighbours:

    - before the space that opens an answer: "ASSISTANT:" and " A cat." give the ids of "ASSISTANT: A cat.", since a Llama piece
      has spaces only at its start and none can lie across (a piece in the middle gets no dummy prefix);
    - around a control token, as always;
    - around a picture LLaVA encodes each side by itself, with its own dummy prefix. So do we: ":", " ", <image>..., " ", "\\n".
    Where a span ends elsewhere (before ### in llava_v0, after "assistant\\n" in InternVL) the prompt of generation ends there too.
    """
    form, spans, supervised = find_template(template), [], False           # [special, text, supervised]
    for k, (role, text) in enumerate(turns):
        frame = form.answer if role == "gpt" else form.human if k else form.first.replace("<image>", "<image>" * len(n_visual))
        before, after = frame.split("{}")
        for part, special in (before, CONTROL), (text, "(<image>)" if n_visual else "((?!))"), (after, CONTROL):
            for j, piece in enumerate(re.split(special, part)):            # text, special, text, special, ..., text
                if piece in ("«", "»") and j % 2:
                    supervised = piece == "«"
                elif j % 2 or piece and (not spans or spans[-1][::2] != [False, supervised]):
                    spans.append([j % 2 == 1, piece, supervised])
                elif piece:
                    spans[-1][1] += piece

    tokens, labels, n_visual = [tok.bos], [IGNORE], iter(n_visual)
    fresh = True                                                           # the next text opens a stretch: it gets the dummy prefix
    for special, text, supervised in spans:
        if not special:
            ids = tok.encode(text.replace(TYPED, "<image>"), dummy_prefix=fresh)
        elif text == "<image>":
            ids = [tok.image] * next(n_visual)
            if form.around:
                ids = [tok.place(form.around[0]), *ids, tok.place(form.around[1])]
        else:
            ids = [tok.place(text)]
        tokens += ids
        labels += ids if supervised else [IGNORE] * len(ids)
        fresh = special and text == "<image>" and not form.around
    return tokens, labels


# ---- files ----------------------------------------------------------------------------------------------------------

class Records:
    """The records of a file, each read when it is asked for: in memory there are 8 bytes a record, where it begins in the file."""

    recompress = False               # whether mpo.py compresses their pictures anew

    def __init__(self, path, image_root=None):
        self.path, self.image_root, self.parts = Path(path), image_root and Path(os.path.abspath(image_root)), [self]
        if image_root and not self.image_root.is_dir():
            raise UserError(f"--image-root {image_root}: no such folder")
        with reading(path, "cannot be read"), open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]      # Windows editors put three bytes in front
            self.is_list = head == b"["
            starts = list_starts(file, path) if self.is_list else line_starts(file)
            end = file.tell()
        if not starts:
            raise UserError(f"{path}: holds no record; expected a JSON list of records, or one record per line")
        self.starts = np.append(np.frombuffer(starts, dtype=np.int64), end)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        """The record as it is in the file, with three keys sure to be there: "id" (text), "images" (names) and "turns" [(role, text)]."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            record = json.loads(self.raw(i).rstrip(b"], \r\n\t") if self.is_list else self.raw(i))
        except (ValueError, RecursionError) as error:                      # not JSON, not UTF-8, or brackets in brackets without end
            raise UserError(f"{self.where(i)}: not valid JSON ({error}); expected a JSON list of records, or one record per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.where(i)}: a {type(record).__name__}, not a record; expected {RECORD}")
        record["id"] = str(record.get("id", record.get("question_id", i)))
        images, turns = record.get("image"), record.get("conversations")
        record["images"] = [] if images is None else images if isinstance(images, list) else [images]
        if not all(isinstance(name, str) and name for name in record["images"]):
            raise UserError(f"{self.where(i, record['id'])}: \"image\" is {images!r}; it must be a file name or a list of file names")
        question, said = record.get("text", record.get("question")), record.get("chosen", record.get("answer"))
        if "conversations" not in record and isinstance(question, str):
            turns = [{"from": "human", "value": question}]
            turns += [{"from": "gpt", "value": said}] if said is not None else []
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{self.where(i, record['id'])}: no conversation; expected {RECORD}, or a question in \"text\"")
        for k, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
                raise UserError(f"{self.where(i, record['id'])}: turn {k} is {str(turn)[:80]}; expected {TURN}")
        record["turns"] = [(turn["from"], turn["value"]) for turn in turns]
        return record

    def where(self, i, id=None):
        """How an error names a record: by its line where the file has one record per line."""
        place = f"record {i}"
        if not self.is_list:
            with open(self.path, "rb") as file:
                starts = iter(lambda: file.read(min(2**20, int(self.starts[i]) - file.tell())), b"")
                place = f"line {1 + sum(chunk.count(10) for chunk in starts)}"
        return f"{self.path}, {place}" + (f" (id {id!r})" if id is not None else "")

    def find(self, id):
        """Index of the first record with this id; the file is read up to it."""
        for i in range(len(self)):
            if self[i]["id"] == id:
                return i
        raise UserError(f"{self.path}: no record has the id {id!r}; use --index 0 to see the first one and its id")

    def image_path(self, name):
        """Where a picture lies: no name may climb out of the image root. A link inside it may lead anywhere, its owner put it there."""
        if self.image_root is None:
            raise UserError(f"picture {name!r}: in which folder? Give --image-root")
        path = Path(os.path.normpath(self.image_root / name))              # "a/../b" is "b" here, wherever the link a may lead
        if not path.is_relative_to(self.image_root):
            raise UserError(f"picture {name!r} lies outside --image-root {self.image_root}; move it there, or link a folder into it")
        return path

    def n_bytes(self, i):
        return int(self.starts[i + 1] - self.starts[i])

    def raw(self, i):
        with open(self.path, "rb") as file:                                # opened anew each time: loader processes must not share a position
            file.seek(self.starts[i])
            return file.read(self.n_bytes(i))

    def has_picture(self, i):
        """At a glance, without parsing: good enough to share out work."""
        return b'"image"' in self.raw(i)


class Mixture:
    """Records of several files in an order of their own: each row of `picks` (n, 3) says which file, which of its records, and which
    question of that, -1 for all of them. Pictures are named by their whole paths."""

    def __init__(self, parts, picks):
        self.parts, self.picks = parts, np.asarray(picks, dtype=np.int32)

    def __len__(self):
        return len(self.picks)

    def at(self, i):
        """-> the file's Records, which of them, which of its questions."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        part, row, question = self.picks[i].tolist()
        return self.parts[part], row, question

    def __getitem__(self, i):
        part, row, question = self.at(i)
        record = part[row]
        pairs = pairs_of(record["turns"])
        if question >= 0 and len(pairs) > 1:
            (role, text), answer = pairs[question]
            missing = len(record["images"]) - text.count("<image>")        # pictures that other questions brought along
            record["turns"] = [(role, "<image>\n" * missing + text), answer]
        try:
            record["images"] = [str(part.image_path(name)) for name in record["images"]]
        except UserError as error:
            raise UserError(f"{self.where(i, record['id'])}: {error}") from None
        return record

    def where(self, i, id=None):
        part, row, question = self.at(i)
        return part.where(row, id) + (f", question {question + 1}" if question >= 0 else "")

    def image_path(self, name):
        return Path(name)

    def n_bytes(self, i):
        part, row, _ = self.at(i)
        return part.n_bytes(row)

    def has_picture(self, i):
        part, row, _ = self.at(i)
        return part.has_picture(row)


class Questions(Mixture):
    """The same records, but every question with its answer is one of its own. The records are read once, to count their questions.

    A decoder that starts from nothing learns from short rows which words matter, long before it does so in long ones. `runs` says how
    many questions each record has: those of one stay together (train.batches), so that in a batch their pictures are looked at once (collate).
    """

    def __init__(self, records):
        picks, self.runs = [], []
        for i in range(len(records)):
            part, row, _ = records.picks[i].tolist() if isinstance(records, Mixture) else (0, i, -1)
            try:
                n = len(pairs_of(records[i]["turns"]))
            except UserError:                                              # said, or counted, when it is asked for
                n = 1
            picks += [(part, row, k) for k in range(max(1, n))]
            self.runs.append(max(1, n))
        super().__init__(records.parts, picks)


def pairs_of(turns):
    """[(question, answer), ...], each (role, text): where somebody asks and the other answers."""
    return [(a, b) for a, b in zip(turns, turns[1:]) if (a[0], b[0]) == ("human", "gpt")]


def open_records(path, image_root=None, weights="", fraction=1.0, seed=0):
    """FILE, or FILE,FILE with weights "X,X", or a meta.json as MMPR's {name: {"root", "annotation", "repeat_time"}} -> Records or a Mixture.

    The records of a file come `weight` times; of a broken number, some once more, drawn by the seed.
    """
    parts = read_meta(str(path), image_root) or [(Records(p, image_root), 1.0) for p in str(path).split(",")]
    if weights:
        try:
            given = [float(w) for w in weights.split(",")]
        except ValueError:
            raise UserError(f"--data-weights {weights}: not numbers; write one for each file, as 1,0.5") from None
        if len(given) != len(parts) or min(given) <= 0:
            raise UserError(f"--data-weights {weights}: {len(given)} for {len(parts)} files; give one above 0 for each")
        parts = [(records, w) for (records, _), w in zip(parts, given)]
    if len(parts) == 1 and parts[0][1] == fraction == 1:
        return parts[0][0]
    picks = []
    for k, (records, weight) in enumerate(parts):
        n = len(records)
        times, rest = divmod(max(1, round(n * weight * fraction)), n)
        drawn = np.random.default_rng([seed, k]).permutation(n)[:rest]      # of a larger share these are the first: fractions are nested
        rows = np.concatenate([np.tile(np.arange(n), times), np.sort(drawn)])
        picks.append(np.stack([np.full_like(rows, k), rows, np.full_like(rows, -1)], axis=1))
        print(f"{records.path}: {len(rows):,} of an epoch's records (it holds {n:,}, weight {weight:g}"
              + (f", fraction {fraction:g})" if fraction < 1 else ")"))
    return Mixture([records for records, _ in parts], np.concatenate(picks))


def read_meta(path, image_root=None):
    """MMPR's meta.json -> [(Records, repeat_time)]; [] if the file is none. Relative paths start at --image-root, or at its folder.

    data_augment becomes Records.recompress, which mpo.py minds; the other fields are not used.
    """
    if not path.endswith(".json") or "," in path or os.path.getsize(path) > 2**24:
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return []                                                          # Records will say what is wrong with it
    if not isinstance(content, dict) or not all(isinstance(one, dict) and isinstance(one.get("annotation"), str) for one in content.values()):
        return []
    parts, base = [], Path(image_root or Path(path).parent)
    for name, one in content.items():
        repeat, root = one.get("repeat_time", 1), one.get("root", "")
        if not isinstance(repeat, (int, float)) or repeat <= 0 or not isinstance(root, str):
            raise UserError(f"{path}: {name!r} has repeat_time {repeat!r} and root {root!r}; they must be a number above 0 and a folder")
        try:
            parts.append((Records(base / one["annotation"], str(base / root)), float(repeat)))
        except UserError as error:
            raise UserError(f"{path}, {name!r}: {error}. The released files hold their authors' paths: write yours") from None
        parts[-1][0].recompress = bool(one.get("data_augment"))
    if tiled := [name for name, one in content.items() if one.get("max_dynamic_patch", 1) != 1]:
        print(f"{path}: max_dynamic_patch of {', '.join(tiled)} is not used: pictures are cut as the model's image mode says")
    return parts


def line_starts(file):
    """Byte offset of each line that is not blank."""
    starts, at = array("q"), 0
    file.seek(0)
    for line in file:
        if line.strip():
            starts.append(at)
        at += len(line)
    return starts


def list_starts(file, path):
    """Byte offset of each object of a JSON list, in one pass over the file through a sliding window.

    The window is decoded as latin-1, whatever the file is in: then one byte is one character and offsets are exact, and since all
    that gives JSON its structure is ASCII, and no byte of a longer UTF-8 character is, the parser sees the same structure.
    """
    starts, text, base, at, before = array("q"), "", 0, 0, ""              # text[at] is the file's byte base + at; before: "[" "," "}" or "]"
    decode, spaces = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n\xef\xbb\xbf]*")
    file.seek(0)

    def refill():
        nonlocal text, base, at
        more = file.read(max(2**20, len(text) - at))                       # doubled each time, or a long record would be parsed n times
        text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
        return more

    def broken(what):
        return UserError(f"{path}: {what} at byte {base + at:,}, after {len(starts):,} whole records; "
                         "get the file again, or end the list there with ]")

    while True:
        at = spaces.match(text, at).end()
        if at == len(text):
            if refill():
                continue
            if before == "]":
                return starts
            raise broken("cut off")
        sign = text[at]
        if sign == {"": "[", "}": ","}.get(before) or sign == "]" and before in ("[", "}"):
            before, at = sign, at + 1
        elif sign == "{" and before in ("[", ","):
            try:
                end = decode(text, at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                if len(text) - at < MAX_RECORD and refill():
                    continue
                raise broken(f"cut off or not valid JSON ({str(error).split(':')[0]})") from None
            starts.append(base + at)
            before, at = "}", end
        else:
            raise broken(f"{sign!r} instead of a record" if before in ("[", ",") else f"unexpected {sign!r}")


# ---- batches --------------------------------------------------------------------------------------------------------

class Examples(Dataset):
    """Records as the model takes them. `bad` says what to do with one that cannot be used whole: "stop", or "skip" and say why."""

    def __init__(self, records, tok, template, vision_cfg, image_mode, max_length, bad="stop"):
        find_template(template)
        if bad not in ("stop", "skip"):
            raise UserError(f"bad={bad!r} is unknown; choose stop or skip")
        self.records, self.tok, self.template, self.bad = records, tok, template, bad
        self.vision_cfg, self.image_mode, self.max_length = vision_cfg, image_mode, max_length
        self.last = None, []                                                # a record, and what its pictures became: its other questions want them, too

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        stage, record = "record", {"id": str(i)}
        shows = self.records.picks[i, :2].tolist() if isinstance(self.records, Questions) else i
        try:
            record = self.records[i]
            stage = "picture"
            if self.last[0] != shows:
                self.last = shows, [vision.cut_tiles(self.picture(i, name), self.vision_cfg, self.image_mode) for name in record["images"]]
            pictures, stage = self.last[1], "conversation"
            example = self.encode(record, [len(layout) for _, layout in pictures])
        except UserError as error:
            reason = str(error) if stage == "record" else f"{self.records.where(i, record['id'])}: {error}"
            if self.bad == "stop":
                raise UserError(reason) from None
            return {"skipped": reason, "stage": stage, "id": record["id"], "index": i}
        pixels, layout = vision.join(pictures or [no_picture(self.vision_cfg.image_size)])
        return example | {"pixels": pixels, "layout": layout, "shows": shows, "id": record["id"], "index": i}

    def picture(self, i, name):
        return vision.open_image(self.records.image_path(name))

    def encode(self, record, n_visual):
        tokens, labels = encode_conversation(self.tok, record["turns"], self.template, n_visual)
        self.check_length(len(tokens), n_visual)
        if all(label == IGNORE for label in labels):
            raise UserError("no supervised token; drop the record")
        return {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "n_visual": n_visual,
                "marker_is_text": not n_visual and any("<image>" in text for _, text in record["turns"])}

    def check_length(self, n, n_visual):
        if n > self.max_length:                                            # nothing is cut: half a picture or half an answer teaches nonsense
            raise UserError(f"{n} tokens ({sum(n_visual)} of them visual), {self.max_length} allowed; "
                            "raise --max-length, or drop or split the record")


def no_picture(S):
    return torch.empty((0, 3, S, S), dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)


def collate(examples, pad, **more):
    """Examples of unequal length -> one batch, padded on the right; `skipped` says why each of the others is not in it.

    Neighbours that are questions of one record share its tiles, so the towers look once. `more`: rows beside tokens and labels (B, T), and what they are padded with.
    """
    used, none = [e for e in examples if "skipped" not in e], torch.zeros(0, dtype=torch.int64)
    rows = {name: pad_sequence([e[name] for e in used] or [none], batch_first=True, padding_value=value)[: len(used)]
            for name, value in {"tokens": pad, "labels": IGNORE, **more}.items()}
    alike = [list(some) for _, some in groupby(used, key=lambda e: e.get("shows", id(e)))]
    pixels, layout = vision.join([(some[0]["pixels"], torch.cat([e["layout"] for e in some])) for some in alike] or [no_picture(0)])  # (N, 3, S, S), (M, 2)
    return rows | {"pixels": pixels, "layout": layout, "lengths": torch.tensor([len(e["tokens"]) for e in used], dtype=torch.int64),
                   "ids": [e["id"] for e in used], "skipped": [e["skipped"] for e in examples if "skipped" in e]}


# ---- other people's files: JSON, JSON lines, TSV, XLSX, pickles ------------------------------------------------------

@contextmanager
def reading(path, wrong, broken=(ValueError, RecursionError)):
    """What goes wrong with a file inside is one line: which file, what is wrong with it, what to do."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); get the file again") from None
    except broken as error:
        raise UserError(f"{path}: {wrong} ({error}); get the file again") from None


def read_json(path):
    """A JSON object, empty where there is no such file."""
    if not path.exists():
        return {}
    with reading(path, "cannot be read as JSON"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, not a JSON object; copy it anew")
    return found


def read_any(path):
    """JSON, JSON lines, TSV or XLSX, told apart by content -> (a list or dict, name): name(k) says in a message where record k stands."""
    path = Path(path)
    with reading(path, "not valid JSON"):
        raw = path.read_bytes()
        if raw.startswith(b"PK\x03\x04") or path.suffix == ".tsv":
            numbered = read_xlsx(path) if raw.startswith(b"PK") else read_tsv(raw.decode("utf-8-sig"), path)
            return [row for _, row in numbered], lambda k: f"{path}, row {numbered[k][0]}"
        text = raw.decode("utf-8-sig")
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]     # blank lines count, and hold nothing
        if not numbered:
            raise UserError(f"{path}: is empty; get the file again")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = json_lines(numbered, path)
            if not found:
                raise
            return found, lambda k: f"{path}, line {numbered[k][0]}"
    if isinstance(found, dict) and (path.suffix == ".jsonl" or {"question_id", "questionId", "id", "pid"} & found.keys()):
        return [found], lambda k: f"{path}, line {numbered[k][0]}"          # one record per line, and only one line
    return found, lambda k: f"{path}, record {k!r}"


def json_lines(numbered, path):
    """Records of the numbered lines; [] where the file never was one record per line."""
    rows = []
    for i, line in numbered:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not rows or numbered[0][1].lstrip()[0] == "[":
                return []
            raise UserError(f"{path}, line {i}: not valid JSON ({error}); expected one record per line") from None
    return rows if all(isinstance(row, dict) for row in rows) else []


def read_tsv(text, path):
    """-> [(number, {column: cell}), ...]; row 1 is the one below the names."""
    csv.field_size_limit(2**31 - 1)                                         # a cell may hold a whole picture in base64
    with reading(path, "not a table with tabs", csv.Error):
        head, *rows = [*csv.reader(io.StringIO(text, newline=""), delimiter="\t")] or [[]]
    for i, row in enumerate(rows, 1):
        if row and len(row) != len(head):
            raise UserError(f"{path}, row {i}: {len(row)} cells under {len(head)} column names; get the file again")
    if not any(rows):
        raise UserError(f"{path}: {'holds no row' if head else 'is empty'}; get the file again")
    return [(i, dict(zip(head, row))) for i, row in enumerate(rows, 1) if row]


OFFICE, PACKAGE = "http://schemas.openxmlformats.org/officeDocument/2006", "http://schemas.openxmlformats.org/package/2006"
SHEET, KIND = "http://schemas.openxmlformats.org/spreadsheetml/2006/main", "application/vnd.openxmlformats-officedocument.spreadsheetml"


def read_xlsx(path):
    """The first sheet as [(number, {column: cell}), ...], named by its first row: a zip of XML, cells inline or in a table of strings."""
    space, shared, rows = {"": SHEET}, [], []
    words = lambda node: "".join(t.text or "" for t in node.iter(f"{{{SHEET}}}t"))
    with (reading(path, "not an .xlsx that can be read", (zipfile.BadZipFile, KeyError, IndexError, ValueError, ElementTree.ParseError)),
          zipfile.ZipFile(path) as box):
        if "xl/sharedStrings.xml" in box.namelist():
            shared = [words(si) for si in ElementTree.fromstring(box.read("xl/sharedStrings.xml")).findall("si", space)]
        for row in ElementTree.fromstring(box.read("xl/worksheets/sheet1.xml")).findall("sheetData/row", space):
            rows.append({})
            for cell in row.findall("c", space):
                value = words(cell) if cell.get("t") == "inlineStr" else cell.findtext("v", "", space)
                rows[-1][re.sub(r"\d", "", cell.get("r", ""))] = shared[int(value)] if cell.get("t") == "s" else value
    head, *rows = rows or [{}]
    return [(i, {name: row.get(column, "") for column, name in head.items()}) for i, row in enumerate(rows, 1)]


def write_xlsx(rows, numeric=()):
    """[{column: text}] -> the bytes of a workbook with one sheet, the same for the same rows; the columns `numeric` hold numbers."""
    names = list(rows[0])
    column = lambda i: (chr(64 + i // 26) if i >= 26 else "") + chr(65 + i % 26)
    legal = lambda text: escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f]", "", str(text)))

    def cell(r, i, name, value):
        if name in numeric and r > 1:
            return f'<c r="{column(i)}{r}"><v>{value}</v></c>'
        return f'<c r="{column(i)}{r}" t="inlineStr"><is><t xml:space="preserve">{legal(value)}</t></is></c>'
    sheet = "".join(f'<row r="{r}">' + "".join(cell(r, i, name, row[name]) for i, name in enumerate(names)) + "</row>"
                    for r, row in enumerate([dict(zip(names, names)), *rows], 1))
    related = lambda kind, file: (f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" Type="{OFFICE}/relationships/{kind}" '
                                  f'Target="{file}"/></Relationships>')
    files = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
                               '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
                               '<Default Extension="xml" ContentType="application/xml"/>'
                               f'<Override PartName="/xl/workbook.xml" ContentType="{KIND}.sheet.main+xml"/>'
                               f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{KIND}.worksheet+xml"/></Types>',
        "_rels/.rels": related("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{SHEET}" xmlns:r="{OFFICE}/relationships">'
                           '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": related("worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEET}"><sheetData>{sheet}</sheetData></worksheet>'}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as box:
        for name, text in files.items():
            box.writestr(zipfile.ZipInfo(name), '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n' + text, zipfile.ZIP_DEFLATED)
    return raw.getvalue()


class PlainUnpickler(pickle.Unpickler):
    """REFER's annotations are lists, dicts, strings and numbers, for which a pickle need not name any class: one that does is refused,
    because to load it would be to run it."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}; only plain lists, dicts, strings and numbers are read")


def read_pickle(path):
    with reading(path, "not a pickle of plain containers", Exception), open(path, "rb") as file:      # a broken one may raise anything
        try:
            return PlainUnpickler(file, encoding="ASCII").load()
        except UnicodeDecodeError:                                          # written by Python 2, whose strings were bytes
            file.seek(0)
            return PlainUnpickler(file, encoding="latin1").load()


def entries(path, key=None):
    """(where, key, row) of each record of a file; `key`: the list lies under this name of a JSON object."""
    found, name = read_any(path)
    if key is not None:
        if not isinstance(found, dict) or not isinstance(found.get(key), (list, dict)):
            raise UserError(f'{path}: no list "{key}" in it; it does not look like the official file')
        found = found[key]
    if not isinstance(found, (list, dict)):
        raise UserError(f"{path}: a {type(found).__name__}, neither a list nor an object of records")
    for k, row in found.items() if isinstance(found, dict) else enumerate(found):
        if not isinstance(row, dict):
            raise UserError(f"{name(k)}: {str(row)[:60]!r} is not a record")
        yield name(k), k, row


def need(where, row, **kinds):
    """Values of the named fields, each of its type; what is missing or of another type is an error that names file and record."""
    values = []
    for name, kind in kinds.items():
        kind = kind if isinstance(kind, tuple) else (kind,)
        value = row.get(name)
        if name not in row and type(None) not in kind:
            raise UserError(f'{where}: no field "{name}"')
        if not isinstance(value, kind) or isinstance(value, bool) and bool not in kind:
            raise UserError(f'{where}: "{name}" is {str(value)[:60]!r}; expected {" or ".join(k.__name__ for k in kind)}')
        values.append(value)
    return values[0] if len(values) == 1 else values


# ---- programs -------------------------------------------------------------------------------------------------------

def tokenizer(args):
    """Learn a tokenizer from the words of the records, for a decoder that starts from random weights (train.py --tokenizer)."""
    path, records, words = Path(args.out) / "tokenizer.model", Records(args.file), []
    if (path.parent / "config.json").exists():
        raise UserError(f"--out {args.out}: a model is there, and its tokenizer belongs to it; give another folder")
    for i in range(len(records)):
        words += [word for _, text in records[i]["turns"] for word in text.replace("<image>", " ").split()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(path, (word[k : k + 1000] for word in words for k in range(0, len(word), 1000)), args.vocab_size)   # it drops long lines
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); give another folder") from None
    plain = Counter(word for text in words for word in re.findall(r"\w+", text))
    tok, n = Tokenizer(path), plain.total()
    whole = sum(k for word, k in plain.items() if len(tok.encode(word)) == 1)
    print(f"{path}: {args.vocab_size} tokens; of {n:,} words in {len(records):,} records {whole / max(1, n):.1%} are one token")
    return 0


def show(args):
    """Print one record token by token, the supervised ones marked, and save its tiles as the network sees them."""
    records, examples = open_examples(args, bad="stop")
    i = args.index if args.id is None else records.find(args.id)
    if not 0 <= i < len(records):
        raise UserError(f"{args.file}: no record {i}; it holds {len(records)}, counted from 0")
    example, tok, cfg = examples[i], examples.tok, examples.vision_cfg
    tokens, labels = example["tokens"].tolist(), example["labels"].tolist()
    print(records.where(i, example["id"]))
    print(f"template {examples.template}, pictures {cfg.image_size} px in patches of {cfg.patch_size} px, mode {examples.image_mode}")
    print(f"{'position':>11} {'id':>6} {'label':>6}  piece")
    for _, run in groupby(range(len(tokens)), lambda k: -1 if tokens[k] == tok.image else k):   # a picture's tokens in one line
        at, n = next(run), 1 + sum(1 for _ in run)
        where, times = (f"{at}..{at + n - 1}", f" x {n}") if n > 1 else (at, "")
        print(f"{where:>11} {tokens[at]:>6} {labels[at] if labels[at] != IGNORE else '.':>6}  {tok.piece(tokens[at])}{times}")
    n_label = sum(label != IGNORE for label in labels)
    print(f"{len(tokens)} tokens, {tokens.count(tok.image)} of them visual, {n_label} supervised (those with a label)")
    if len(example["pixels"]):
        place, at, drawn = [k for k, token in enumerate(tokens) if token == tok.image], 0, []
        for name, n in zip(records[i]["images"], example["n_visual"]):
            layout, where = example["layout"][at : at + n], place[at : at + n]
            seen, at = layout[layout[:, 0] >= 0], at + n
            print(f"{name}: {len(seen[:, 0].unique())} tiles, {n} visual tokens, {n - len(seen)} of them row ends")
            drawn.append(draw_picture(example["pixels"], layout, where, cfg))
        try:
            stack(drawn).save(args.out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out {args.out}: cannot be written ({error}); give a path that ends in .png") from None
        print(f"tiles saved as {args.out}")
    return 0


def draw_picture(pixels, layout, place, cfg, width=1600):
    """One picture as the network meets it: its tiles in the order of their tokens, patches that were dropped as padding dark, a red bar for
    each row end, and where in the text each tile or row begins and ends. Tiles that share rows stand on one canvas.

    pixels (n, 3, S, S) of the record, layout (M, 2) of the picture, `place` (M,) the position of each of its tokens in the text.
    """
    S, g, P = cfg.image_size, cfg.grid // cfg.merge, cfg.patch_size * cfg.merge
    rows, n = [tuple(row) for row in layout.tolist()], g * g
    seen = torch.zeros(len(pixels), n, dtype=torch.bool)
    seen[[tile for tile, _ in rows if tile >= 0], [patch for tile, patch in rows if tile >= 0]] = True
    seen = seen.view(-1, g, 1, g, 1).expand(-1, g, P, g, P).reshape(-1, 1, g * P, g * P)
    seen = torch.nn.functional.pad(seen, (0, S - g * P, 0, S - g * P))
    tiles = torch.where(seen, pixels, pixels // 4).permute(0, 2, 3, 1).numpy()
    alone = {i for i, (tile, patch) in enumerate(rows) if tile >= 0 and not patch and rows[i : i + n] == [(tile, k) for k in range(n)]}
    cuts = sorted({0, len(rows)} | alone | {i + n for i in alone})
    blocks = []
    for start, end in zip(cuts, cuts[1:]):
        ends = [k for k in range(start, end) if rows[k][0] < 0]
        order = list(dict.fromkeys(tile for tile, _ in rows[start:end] if tile >= 0))
        columns = len({tile for tile, _ in rows[start : ends[0]]}) if ends else 1
        if not order:                                                       # a picture so thin that of its map only row ends are left
            continue
        corner = {tile: (i % columns * (S + 2), 16 + i // columns * (S + 2)) for i, tile in enumerate(order)}
        block = Image.new("RGB", (columns * (S + 2) + (80 if ends else 2), 18 + -(-len(order) // columns) * (S + 2)), "#303030")
        pen = ImageDraw.Draw(block)
        pen.text((2, 2), f"{place[start]}..{place[end - 1]}", fill="white", font_size=11)
        for tile, spot in corner.items():
            block.paste(Image.fromarray(tiles[tile]), spot)
        for begin, k in zip([start] + [k + 1 for k in ends], ends):
            (tile, patch), x = rows[k - 1], columns * (S + 2)
            y = corner[tile][1] + patch // g * P
            pen.rectangle((x + 1, y + 1, x + 6, y + P - 2), fill="#f03030")
            pen.text((x + 10, y), f"{place[begin]}..{place[k]}", fill="#d0d0d0", font_size=10)
        blocks.append(block)
    return stack(blocks, width)


def stack(images, width=0):
    """Pictures one below the other, or beside each other as far as the width goes."""
    spots, x, y, low = [], 0, 0, 0
    for image in images:
        if x and x + image.width > width:
            x, y = 0, low
        spots.append((x, y))
        x, low = x + image.width, max(low, y + image.height)
    sheet = Image.new("RGB", (max(x + image.width for (x, _), image in zip(spots, images)), low), "#303030")
    for spot, image in zip(spots, images):
        sheet.paste(image, spot)
    return sheet


def check(args):
    """Read every record as training would, and say what is in the file and what is wrong with it."""
    records, examples = open_examples(args, bad="skip")
    n = min(args.limit or len(records), len(records))
    problems, stages, ids, pictures, lengths, n_label, n_word = [], Counter(), Counter(), Counter(), [], 0, 0
    loader = DataLoader(Subset(examples, range(n)), batch_size=None, num_workers=args.workers)
    for example in tqdm(loader, desc="check", unit="record", disable=None):
        if "skipped" in example:
            problems.append(example["skipped"])
            stages[example["stage"]] += 1
            continue
        ids[example["id"]] += 1
        pictures[len(example["n_visual"])] += 1
        lengths.append(len(example["tokens"]))
        n_label += int((example["labels"] != IGNORE).sum())
        n_word += example["marker_is_text"]
    print(f"{args.file}: {n} records read, {len(lengths)} good, {len(problems)} wrong")
    if lengths:
        low, mid, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
        print(f"  tokens per record    min {low}, median {mid}, 95% {high}, max {top}; {sum(lengths):,} in all\n"
              f"  supervised           {n_label:,} tokens, {n_label / sum(lengths):.1%}\n"
              f"  pictures per record  {', '.join(f'{k}: {pictures[k]} records' for k in sorted(pictures))}")
    print(f"  ids used repeatedly  {sum(count > 1 for count in ids.values())} (no fault: nothing is looked up by id)\n"
          f"  <image> as a word    {n_word} records (no fault: they have no picture, so it stands for none)\n"
          f"  wrong                {stages['record']} unreadable records, {stages['picture']} with a missing or broken picture, "
          f"{stages['conversation']} with a conversation that cannot be used")
    for problem in problems[:20]:
        print(f"wrong: {problem}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    return 1 if problems else 0


def open_examples(args, bad):
    """The file as training with this model would read it. A config.json that says nothing of pictures, as a language model's, means the toy's."""
    config, records = read_json(Path(args.model) / "config.json"), Records(args.file, args.image_root)
    if config.get("model_type") == "plainvlm":
        tower, mode = vision.VisionConfig(**config["vision"]), config["image_mode"]
    else:
        sizes = config.get("vision_config", {"image_size": 336, "patch_size": 14} if "mm_hidden_size" in config else {})
        tower = vision.VisionConfig(image_size=config.get("force_image_size") or sizes.get("image_size", 96), patch_size=sizes.get("patch_size", 12),
                                    merge=2 if config.get("model_type") == "internvl_chat" else 1)
        mode, tiling = vision.picture_mode(config, tower.image_size)
        preset = args.image_mode == "internvl" and not sizes                # which train.py gives pixel shuffle
        tower = replace(tower, tiling=tiling, merge=2 if preset else tower.merge)
    template = args.template or default_template(config)
    return records, Examples(records, Tokenizer(args.model), template, tower, args.image_mode or mode, args.max_length, bad)


def parse_args(parser, argv):
    """argparse, but --image_root is --image-root, and an unknown flag is told which known one it resembles."""
    argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        known = [flag for p in (parser, *(p for a in subs for p in a.choices.values())) for flag in p._option_string_actions]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.5)
        parser.error(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return args


def run(program):
    """Call a program and return its exit code. What the user got wrong is one line on stderr, not a traceback."""
    try:
        return program()
    except UserError as error:
        text = str(error)
        if text.startswith("Caught UserError in DataLoader worker"):       # torch wraps a loader process's error in its traceback
            text = text.rpartition("UserError: ")[2].strip()
        print(f"error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                                                # `python data.py show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(argv=None):
    cli = argparse.ArgumentParser(prog="data.py", description="Look at training data as the model meets it.")
    programs = cli.add_subparsers(required=True, metavar="{show,check,tokenizer}")
    for program in (show, check):
        sub = programs.add_parser(program.__name__, help=program.__doc__, description=program.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(program=program)
        sub.add_argument("file", help="JSON list or JSONL of records")
        sub.add_argument("--image-root", help="folder that the picture names in FILE start from")
        sub.add_argument("--model", default=str(Path(__file__).parent / "assets" / "toy-vicuna"), help="folder with tokenizer.model and config.json")
        sub.add_argument("--template", default="", help=f"how turns become text: {', '.join(TEMPLATES)}; empty: the model's own")
        sub.add_argument("--image-mode", default="", choices=["", *vision.MODES], help="how a picture becomes tiles; empty: the model's own")
        sub.add_argument("--max-length", type=int, default=2048, help="tokens; a longer record counts as wrong")
        if program is show:
            sub.add_argument("--index", type=int, default=0, help="which record, counted from 0")
            sub.add_argument("--id", help="which record, by its id")
            sub.add_argument("--out", default="show.png", help="file for the tiles, as the network meets them")
        else:
            sub.add_argument("--limit", type=int, default=0, help="records to read at most, 0 for all")
            sub.add_argument("--workers", type=int, default=0, help="processes that open pictures beside this one")
    sub = programs.add_parser("tokenizer", help=tokenizer.__doc__, description=tokenizer.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.set_defaults(program=tokenizer)
    sub.add_argument("file", help="JSON list or JSONL of records")
    sub.add_argument("--vocab-size", type=int, default=512, help="tokens in all: 259 are bytes and marks, the others characters, parts of words and words")
    sub.add_argument("--out", required=True, help="folder for tokenizer.model")
    args = parse_args(cli, sys.argv[1:] if argv is None else argv)
    return args.program(args)


if __name__ == "__main__":
    sys.exit(run(main))
