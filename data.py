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
import os
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
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import vision
from vision import UserError

IGNORE = -100                        # label of a position that costs nothing; what F.cross_entropy ignores by default
TURN = '{"from": "human" or "gpt", "value": text}'
RECORD = '{"id", "image", "conversations": [' + TURN + ", ...]}"
MAX_RECORD = 64 * 2**20              # bytes; a JSON record of more is taken for a broken file


class Tokenizer:
    """A Llama sentencepiece model, with two ids of our own behind its pieces: <image> and <pad> (the llava-hf numbering)."""

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer there ({error.strerror}); give a sentencepiece tokenizer.model or its folder") from None
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
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)


def encode_prompt(tok, turns, template, n_visual):
    """The same conversation up to where the next answer begins: the last turn is a question. -> tokens (a list)"""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)[0]


def arrange(turns, template, n_image):
    """Check the turns, and bring every <image> to its place: at the front of its turn if it stood at either end, else where it is."""
    form = find_template(template)
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if not turns:
        raise UserError("no answer to learn from; a human turn and a gpt turn after it are needed")
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
    if (n_marker, n_image) == (0, 1):
        turns, n_marker = [("human", "<image>\n" + turns[0][1]), *turns[1:]], 1
    if n_marker != n_image:
        raise UserError(f"{n_marker} <image> but {n_image} picture{'s' * (n_image != 1)}; write one <image> in the questions for each picture")
    if not form.keep_question and not n_image:
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
        for part, special, kind in (before, "(</?s>)", "control"), (text, "(<image>)", "image"), (after, "(</?s>)", "control"):
            for j, piece in enumerate(re.split(special, part)):            # text, special, text, special, ..., text
                if j % 2:
                    spans.append([kind, piece, role == "gpt"])
                elif spans and spans[-1][::2] == ["text", role == "gpt"]:
                    spans[-1][1] += piece
                elif piece:
                    spans.append(["text", piece, role == "gpt"])

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


def find_template(name):
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)
        raise UserError(f"template {name!r} is unknown; did you mean {near[0]!r}? Known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# ---- files ----------------------------------------------------------------------------------------------------------

class Records:
    """The records of a file, each read when it is asked for: in memory there are 8 bytes a record, where it begins in the file."""

    def __init__(self, path, image_root=None):
        self.path, self.image_root = Path(path), image_root and Path(image_root).resolve()
        if image_root and not self.image_root.is_dir():
            raise UserError(f"--image-root {image_root}: no such folder")
        try:
            with open(path, "rb") as file:
                head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]  # Windows editors put three bytes in front
                self.is_list = head == b"["
                starts = list_starts(file, path) if self.is_list else line_starts(file)
                end = file.tell()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        if not starts:
            raise UserError(f"{path}: holds no record; expected a JSON list of records, or one record per line")
        self.starts = np.append(np.frombuffer(starts, dtype=np.int64), end)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        """The record as it is in the file, with three keys sure to be there: "id" (text), "images" (names) and "turns" [(role, text)]."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        with open(self.path, "rb") as file:                                # opened anew each time: loader processes must not share a position
            file.seek(self.starts[i])
            raw = file.read(int(self.starts[i + 1] - self.starts[i]))
        try:
            record = json.loads(raw.rstrip(b"], \r\n\t") if self.is_list else raw)
        except (ValueError, RecursionError) as error:                      # not JSON, not UTF-8, or brackets in brackets without end
            raise UserError(f"{self.where(i)}: not valid JSON ({error}); expected a JSON list of records, or one record per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.where(i)}: a {type(record).__name__}, not a record; expected {RECORD}")
        record["id"] = str(record.get("id", record.get("question_id", i)))
        images, turns = record.get("image"), record.get("conversations")
        record["images"] = [] if images is None else images if isinstance(images, list) else [images]
        if not all(isinstance(name, str) and name for name in record["images"]):
            raise UserError(f"{self.where(i, record['id'])}: \"image\" is {images!r}; it must be a file name or a list of file names")
        if "conversations" not in record and isinstance(record.get("text"), str):
            turns = [{"from": "human", "value": record["text"]}]
            turns += [{"from": "gpt", "value": record["answer"]}] if "answer" in record else []
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{self.where(i, record['id'])}: no conversation; expected {RECORD}, or a question in \"text\"")
        for k, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
                raise UserError(f"{self.where(i, record['id'])}: turn {k} is {str(turn)[:80]}; expected {TURN}")
        record["turns"] = [(turn["from"], turn["value"]) for turn in turns]
        return record

    def where(self, i, id=None):
        """How an error names a record: by its line where the file has one record per line."""
        place, at = f"record {i}", 0
        if not self.is_list:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if at == self.starts[i]:
                        place = f"line {number}"
                        break
                    at += len(line)
        return f"{self.path}, {place}" + (f" (id {id!r})" if id is not None else "")

    def find(self, id):
        """Index of the first record with this id; the file is read up to it."""
        for i in range(len(self)):
            if self[i]["id"] == id:
                return i
        raise UserError(f"{self.path}: no record has the id {id!r}; use --index 0 to see the first one and its id")

    def image_path(self, name):
        """Where a picture lies. Nothing outside the image root is ever opened: not by "..", not by a full path, not through a link."""
        if self.image_root is None:
            raise UserError(f"picture {name!r}: in which folder? Give --image-root")
        try:
            path = (self.image_root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:               # too long, a zero byte, links in a circle
            raise UserError(f"picture {name[:80]!r}: no usable file name ({error}); correct the record") from None
        if not path.is_relative_to(self.image_root):
            raise UserError(f"picture {name!r} lies outside --image-root {self.image_root}; move it there, or give a folder that holds both")
        return path


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

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        S, stage, record = self.vision_cfg.image_size, "record", {"id": str(i)}
        try:
            record = self.records[i]
            stage = "picture"
            pixels, n_visual = [torch.empty((0, 3, S, S), dtype=torch.uint8)], []
            for name in record["images"]:
                tiles, n = vision.cut_tiles(vision.open_image(self.records.image_path(name)), self.vision_cfg, self.image_mode)
                pixels.append(tiles)
                n_visual.append(n)
            stage = "conversation"
            tokens, labels = encode_conversation(self.tok, record["turns"], self.template, n_visual)
            if len(tokens) > self.max_length:                              # nothing is cut: half a picture or half an answer teaches nonsense
                raise UserError(f"{len(tokens)} tokens ({sum(n_visual)} of them visual), {self.max_length} allowed; "
                                "raise --max-length, or drop or split the record")
            if all(label == IGNORE for label in labels):
                raise UserError("no supervised token; drop the record")
        except UserError as error:
            reason = str(error) if stage == "record" else f"{self.records.where(i, record['id'])}: {error}"
            if self.bad == "stop":
                raise UserError(reason) from None
            return {"skipped": reason, "stage": stage, "id": record["id"], "index": i}
        return {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "pixels": torch.cat(pixels),
                "n_picture": len(n_visual), "id": record["id"], "index": i}


def collate(examples, pad):
    """Examples of unequal length -> one batch; `skipped` says why each of the others is not in it."""
    used = [e for e in examples if "skipped" not in e]
    lengths = torch.tensor([len(e["tokens"]) for e in used], dtype=torch.int64)              # (B,)
    shape = (len(used), max(lengths.tolist(), default=0))
    tokens, labels = torch.full(shape, pad), torch.full(shape, IGNORE)                       # (B, T)
    for row, e in enumerate(used):
        tokens[row, : lengths[row]] = e["tokens"]
        labels[row, : lengths[row]] = e["labels"]
    pixels = torch.cat([e["pixels"] for e in used]) if used else torch.empty((0, 3, 0, 0), dtype=torch.uint8)  # (N, 3, S, S)
    return {"tokens": tokens, "labels": labels, "pixels": pixels, "lengths": lengths, "ids": [e["id"] for e in used],
            "skipped": [e["skipped"] for e in examples if "skipped" in e]}


# ---- programs -------------------------------------------------------------------------------------------------------

def show(args):
    """Print one record token by token, the supervised ones marked, and save its tiles as the network sees them."""
    records, examples = open_examples(args, bad="stop")
    i = args.index if args.id is None else records.find(args.id)
    if not 0 <= i < len(records):
        raise UserError(f"{args.file}: no record {i}; it holds {len(records)}, counted from 0")
    example, tok, cfg = examples[i], examples.tok, examples.vision_cfg
    tokens, labels = example["tokens"].tolist(), example["labels"].tolist()
    print(records.where(i, example["id"]))
    print(f"template {args.template}, pictures {cfg.image_size} px in patches of {cfg.patch_size} px, mode {args.image_mode}")
    print(f"{'position':>11} {'id':>6} {'label':>6}  piece")
    at = 0
    while at < len(tokens):
        end = at + 1
        while tokens[at] == tok.image and end < len(tokens) and tokens[end] == tok.image:
            end += 1
        run, times = (f"{at}..{end - 1}", f" x {end - at}") if end - at > 1 else (at, "")
        print(f"{run:>11} {tokens[at]:>6} {labels[at] if labels[at] != IGNORE else '.':>6}  {tok.piece(tokens[at])}{times}")
        at = end
    n_label = sum(label != IGNORE for label in labels)
    print(f"{len(tokens)} tokens, {tokens.count(tok.image)} of them visual, {n_label} supervised (those with a label)")
    if len(example["pixels"]):
        tiles = example["pixels"].permute(2, 0, 3, 1).flatten(1, 2)        # (n, 3, S, S) -> (S, n*S, 3), side by side
        try:
            Image.fromarray(tiles.numpy()).save(args.out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out {args.out}: cannot be written ({error}); give a path that ends in .png") from None
        print(f"tiles saved as {args.out}")
    return 0


def check(args):
    """Read every record as training would, and say what is in the file and what is wrong with it."""
    records, examples = open_examples(args, bad="skip")
    n = min(args.limit or len(records), len(records))
    problems, stages, ids, pictures, lengths, n_label = [], Counter(), Counter(), Counter(), [], 0
    loader = DataLoader(Subset(examples, range(n)), batch_size=None, num_workers=args.workers)
    for example in tqdm(loader, desc="check", unit="record", disable=None):
        if "skipped" in example:
            problems.append(example["skipped"])
            stages[example["stage"]] += 1
            continue
        ids[example["id"]] += 1
        pictures[example["n_picture"]] += 1
        lengths.append(len(example["tokens"]))
        n_label += int((example["labels"] != IGNORE).sum())
    print(f"{args.file}: {n} records read, {len(lengths)} good, {len(problems)} wrong")
    if lengths:
        low, mid, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
        print(f"  tokens per record    min {low}, median {mid}, 95% {high}, max {top}; {sum(lengths):,} in all")
        print(f"  supervised           {n_label:,} tokens, {n_label / sum(lengths):.1%}")
        print(f"  pictures per record  {', '.join(f'{k}: {pictures[k]} records' for k in sorted(pictures))}")
    print(f"  ids used repeatedly  {sum(count > 1 for count in ids.values())} (no fault: nothing is looked up by id)")
    print(f"  wrong                {stages['record']} unreadable records, {stages['picture']} with a missing or broken picture, "
          f"{stages['conversation']} with a conversation that cannot be used")
    for problem in problems[:20]:
        print(f"wrong: {problem}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    return 1 if problems else 0


def open_examples(args, bad):
    records = Records(args.file, args.image_root)
    return records, Examples(records, Tokenizer(args.model), args.template, vision_of(args.model), args.image_mode, args.max_length, bad)


def vision_of(model):
    """Image and patch size from a model folder's config.json. The toy's where that says nothing of pictures, as a language model's."""
    try:
        found = json.loads((Path(model) / "config.json").read_text()).get("vision_config", {})
    except (FileNotFoundError, NotADirectoryError):
        found = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{model}/config.json: cannot be read as JSON ({error}); copy it anew") from None
    return vision.VisionConfig(image_size=found.get("image_size", 96), patch_size=found.get("patch_size", 12))


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
    programs = cli.add_subparsers(required=True, metavar="{show,check}")
    for program in (show, check):
        sub = programs.add_parser(program.__name__, help=program.__doc__, description=program.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(program=program)
        sub.add_argument("file", help="JSON list or JSONL of records")
        sub.add_argument("--image-root", help="folder that the picture names in FILE start from")
        sub.add_argument("--model", default=str(Path(__file__).parent / "assets" / "toy-vicuna"), help="folder with tokenizer.model and config.json")
        sub.add_argument("--template", default="vicuna_v1", choices=TEMPLATES, help="how turns become text")
        sub.add_argument("--image-mode", default="pad", choices=vision.MODES, help="how a picture becomes square")
        sub.add_argument("--max-length", type=int, default=2048, help="tokens; a longer record counts as wrong")
        if program is show:
            sub.add_argument("--index", type=int, default=0, help="which record, counted from 0")
            sub.add_argument("--id", help="which record, by its id")
            sub.add_argument("--out", default="show.png", help="file for the tiles, side by side")
        else:
            sub.add_argument("--limit", type=int, default=0, help="records to read at most, 0 for all")
            sub.add_argument("--workers", type=int, default=0, help="processes that open pictures beside this one")
    args = parse_args(cli, sys.argv[1:] if argv is None else argv)
    return args.program(args)


if __name__ == "__main__":
    sys.exit(run(main))
