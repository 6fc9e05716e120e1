"""Records of a file to batches for the model.

The way of a record:
    FILE  --Records-->       {"id", "images": [name], "turns": [("human", "<image>\\nWhat?"), ("gpt", ...)]}
      --vision.py-->         tiles (n, 3, S, S) uint8; layout (M, 2) of the M visual tokens they will become
      --conversation.py-->   tokens (T,), labels (T,); a picture is a run of that many image-token ids
      --collate-->           tokens (B, T), labels (B, T), padded on the right;
                             pixels (N, 3, S, S) and layout (M, 2) of all pictures of the batch

FILE is a JSON list, or has one record per line (JSON lines). A record is one of these:
    {"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"question_id", "image", "text", "answer"}       a question; "question" may stand for "text"
    {"image", "question", "chosen", "rejected"}      a preference pair; here its answer is the chosen one
"image" is a file name below --image-root, a list of them, or not there.

Where this departs from LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL
(arXiv:2411.10442): a conversation that is too long is an error or a counted skip. They cut it, or set all
its labels to IGNORE.

    python -m tools.show FILE --image-root DIR           # one record as the model meets it
    python -m tools.show check FILE --image-root DIR     # missing and broken pictures, lengths, labels
"""

import io
import json
import os
from array import array
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import vision
from conversation import encode_conversation, find_template
from model import IGNORE
from support.cli import UserError
from support.io import read_json, reading

TURN = '{"from": "human" or "gpt", "value": text}'
RECORD = '{"id", "image", "conversations": [' + TURN + ", ...]}"


class Records:
    """The records of one file or of several, each parsed when it is asked for.

    `index` (n, 5) has a row for each: its file, its number there, its first byte, the byte behind its last,
    and which of its questions is meant, -1 for all. A weight of 2 has every row twice, a fraction of 0.1 a
    tenth of them.
    """

    def __init__(self, data, image_root=None, weights="", fraction=1.0, seed=0):
        """data: FILE, or FILE,FILE with weights "X,X", or a meta.json as MMPR's."""
        self.files = open_files(str(data), image_root)
        if weights:
            with reading(f"--data-weights {weights}", "give one number for each file, as 1,0.5"):
                for file, weight in zip(self.files, weights.split(","), strict=True):
                    file.weight = float(weight)
        parts = []
        for k, file in enumerate(self.files):
            rows = file.find_rows(k)
            if len(self.files) > 1 or file.weight * fraction != 1:
                chosen = choose_rows(len(rows), file.weight * fraction, [seed, k])
                share = f"{len(chosen):,} of {len(rows):,} records"
                print(f"{file.path}: {share} an epoch (weight {file.weight:g})")
                rows = rows[chosen]
            parts.append(rows)
        self.index = np.concatenate(parts) if len(parts) > 1 else rows

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """The record as it is in the file, and beside: id (text), images (names), turns [(role, text)], and
        where it comes from: where (for errors), file (a DataFile), row (i)."""
        k, number, start, end, question = self.index[i].tolist()
        file = self.files[k]
        where = file.place(number)
        with reading(where, f"expected {RECORD}"):
            record = json.loads(file.read(start, end))
            record["id"] = str(record.get("id", record.get("question_id", number)))
        where += f" (id {record['id']!r})"
        with reading(where, f'expected {RECORD}, or a question in "text"'):
            images, turns = read_images(record), read_turns(record)

        # One question of several: it needs the pictures that others have brought along, too.
        questions = find_questions(turns)
        if question >= 0 and len(questions) > 1:
            (role, text), answer = questions[question]
            n_missing = len(images) - text.count("<image>")
            turns = [(role, "<image>\n" * n_missing + text), answer]
        if question >= 0:
            where += f", question {question + 1}"
        return record | {"images": images, "turns": turns, "where": where, "file": file, "row": i}

    def split_questions(self):
        """Make a row of every question with its answer. All records are read once, to count their questions.

        A decoder that starts from nothing learns from short rows which words matter, long before it does so
        in long ones.
        """
        counts = []
        for i in range(len(self)):
            try:
                counts.append(max(1, len(find_questions(self[i]["turns"]))))
            except UserError:  # said, or counted, when it is this record's turn
                counts.append(1)
        self.index = self.index.repeat(counts, axis=0)
        self.index[:, 4] = np.concatenate([np.arange(n) for n in counts])
        return self

    @property
    def runs(self):
        """How many neighbours are questions of one record each time: those stay together in an epoch."""
        first = np.flatnonzero(self.index[:, 4] <= 0)
        return np.diff(first, append=len(self))

    def guess_tokens(self, i, n_visual):
        """Good enough to share out work, and without parsing: 4 bytes a token, one picture of n_visual
        tokens."""
        k, _, start, end, _ = self.index[i].tolist()
        has_picture = b'"image"' in self.files[k].read(start, end)
        return (end - start) / 4 + n_visual * has_picture


class DataFile:
    """One file of records. JSON lines stay on the disk; a JSON list is read once and kept as JSON lines, in
    bytes."""

    weight = 1.0
    recompress = False  # MMPR's data_augment, which mpo.py minds

    def __init__(self, path, image_root=None):
        self.path = Path(path)
        self.image_root = image_root and Path(os.path.abspath(image_root))
        self.lines = None
        if image_root and not self.image_root.is_dir():
            raise UserError(f"--image-root {image_root}: no such folder")
        if file_head(path).startswith(b"["):
            with reading(path):
                records = json.loads(self.path.read_bytes())
                self.lines = b"\n".join(json.dumps(record).encode() for record in records)

    def open_lines(self):  # anew each time: loader processes must not share a position
        return open(self.path, "rb") if self.lines is None else io.BytesIO(self.lines)

    def find_rows(self, k):
        """Rows of Records.index for the records of this file, the k-th: 40 bytes each."""
        index = array("q")
        start = 0
        with self.open_lines() as lines:
            for number, line in enumerate(lines):
                end = start + len(line)
                if not line.isspace():
                    index.extend((k, number, start, end, -1))
                start = end
        if not index:
            raise UserError(f"{self.path}: holds no record; expected a JSON list, or one record per line")
        return np.frombuffer(index, dtype=np.int64).reshape(-1, 5)

    def read(self, start, end):
        with self.open_lines() as lines:
            lines.seek(start)
            return lines.read(end - start)

    def place(self, number):
        """How an error names a record."""
        return f"{self.path}, line {number + 1}" if self.lines is None else f"{self.path}, record {number}"

    def image_path(self, name):
        """Where a picture lies. No name may climb out of the image root; a link in it may lead anywhere."""
        if self.image_root is None:
            raise UserError(f"picture {name!r}: in which folder? Give --image-root")
        path = Path(os.path.normpath(self.image_root / name))  # "a/../b" is "b", wherever the link a may lead
        if not path.is_relative_to(self.image_root):
            raise UserError(f"picture {name!r} lies outside --image-root {self.image_root}; link it in")
        return path


def file_head(path):
    """The first bytes of a file, without white space and the mark that Windows editors put in front."""
    with reading(path), open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def open_files(data, image_root=None):
    """-> [DataFile]. MMPR's meta.json is {name: {"root", "annotation", "repeat_time", "data_augment"}}; its
    paths start at --image-root, or at its own folder."""
    paths = data.split(",")
    if len(paths) > 1 or not data.endswith(".json") or b'"annotation"' not in file_head(data):
        return [DataFile(path, image_root) for path in paths]
    base = Path(image_root or Path(data).parent)
    files = []
    for name, entry in read_json(data).items():
        try:
            file = DataFile(base / entry["annotation"], base / entry.get("root", ""))
        except UserError as error:
            raise UserError(f"{data}, {name!r}: {error}. Write your own paths there") from None
        file.weight = float(entry.get("repeat_time", 1))
        file.recompress = bool(entry.get("data_augment"))
        files.append(file)
    return files


def choose_rows(n, share, seed):
    """Which of n rows an epoch shows. A share of 0.1 shows a tenth; 2.5 shows all twice, and half of them
    once more."""
    if share <= 0:
        raise UserError(f"a weight of {share:g}: every weight must be above 0")
    times, n_drawn = divmod(max(1, round(n * share)), n)
    # These are the first of a larger share: fractions are nested.
    drawn = np.random.default_rng(seed).permutation(n)[:n_drawn]
    return np.concatenate([np.tile(np.arange(n), times), np.sort(drawn)])


def read_images(record):
    """-> the names of its pictures"""
    images = record.get("image")
    if images is None:
        return []
    names = images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f'"image" is {images!r}, not a file name or a list of file names')
    return names


def read_turns(record):
    """-> [(role, text), ...]"""
    if "conversations" in record:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    else:
        question = record.get("text", record.get("question"))
        answer = record.get("chosen", record.get("answer"))
        turns = [("human", question), ("gpt", answer)]
        turns = [(role, text) for role, text in turns if text is not None]

    if not turns:
        raise ValueError("no conversation")
    for k, (role, text) in enumerate(turns, 1):
        if role not in ("human", "gpt") or not isinstance(text, str):
            raise TypeError(f"turn {k} is {text!r:.80} from {role!r}")
    return turns


def find_questions(turns):
    """-> [(question, answer), ...], each (role, text)"""
    return [pair for pair in zip(turns, turns[1:]) if (pair[0][0], pair[1][0]) == ("human", "gpt")]


class Examples(Dataset):
    """Records as the model takes them. bad: "stop" at one that cannot be used whole, or "skip" it and say
    why."""

    def __init__(self, records, tok, template, vision_cfg, image_mode, max_length, bad="stop"):
        find_template(template)  # an unknown one is said before any work
        self.records = records
        self.tok = tok
        self.template = template
        self.vision_cfg = vision_cfg
        self.image_mode = image_mode
        self.max_length = max_length
        self.bad = bad
        self.last_cut = None, []  # the last record, and its pictures: its other questions want them, too

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.make_example(self.records[i])
        except UserError as error:
            if self.bad == "stop":
                raise
            return {"skipped": str(error), "index": i}

    def make_example(self, record):
        i = record["row"]
        first = i - max(0, int(self.records.index[i, 4]))  # the row of this record's first question
        try:
            if self.last_cut[0] != first:
                self.last_cut = first, self.cut_pictures(record)
            pictures = self.last_cut[1]
            example = self.encode(record, [len(layout) for _, layout in pictures])
        except UserError as error:
            raise UserError(f"{record['where']}: {error}") from None
        pixels, layout = vision.join_pictures(pictures or [no_picture(self.vision_cfg.image_size)])
        example |= {"pixels": pixels, "layout": layout, "pictures_of": first}
        return example | {"id": record["id"], "index": i}

    def cut_pictures(self, record):
        """-> [(tiles, layout), ...]"""
        images = [self.open_picture(path, record) for path in picture_paths(record)]
        return [vision.cut_tiles(image, self.vision_cfg, self.image_mode) for image in images]

    def open_picture(self, path, record):
        return vision.open_image(path)

    def encode(self, record, n_visual):
        tokens, labels = encode_conversation(self.tok, record["turns"], self.template, n_visual)
        self.check_length(len(tokens), n_visual)
        if set(labels) == {IGNORE}:
            raise UserError("no supervised token; drop the record")
        return {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "n_visual": n_visual}

    def check_length(self, n, n_visual):
        if n > self.max_length:  # nothing is cut: half a picture or half an answer teaches nonsense
            raise UserError(f"{n} tokens ({sum(n_visual)} of them visual), {self.max_length} allowed; "
                            "raise --max-length, or drop or split the record")


def picture_paths(record):
    return [record["file"].image_path(name) for name in record["images"]]


def no_picture(S):
    return torch.empty((0, 3, S, S), dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)


def collate(examples, pad, multiple=1, more=None):
    """Examples of unequal length -> one batch, padded on the right to a multiple of so many tokens.

    more: {name: padding} of further rows beside tokens and labels.
    """
    used = [e for e in examples if "skipped" not in e]
    lengths = [n_tokens(e) for e in used]
    batch = {
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "ids": [e["id"] for e in used],
        "skipped": [e["skipped"] for e in examples if "skipped" in e],  # why the others are not in it
    }

    # Rows (B, T).
    width = round_up(max(lengths, default=0), multiple)
    for name, padding in {"tokens": pad, "labels": IGNORE, **(more or {})}.items():
        batch[name] = torch.full((len(used), width), padding)
        for row, example in zip(batch[name], used):
            row[: n_tokens(example)] = example[name]

    # Pictures. Neighbours that are questions of one record share its tiles, so the towers look at them once.
    pictures = []
    for _, same in groupby(used, key=lambda e: e["pictures_of"]):
        same = list(same)
        pictures.append((same[0]["pixels"], torch.cat([e["layout"] for e in same])))
    pixels, layout = vision.join_pictures(pictures or [no_picture(0)])
    batch["pixels"], batch["layout"] = pixels, layout  # (N, 3, S, S), (M, 2)
    return batch


def micro_batches(examples, size, pad, budget=0, collate=collate):
    """Cut a step's examples into batches that fit in memory: `size` rows each (0: all), or `budget` tokens.

    Which records share a batch changes nothing in the gradient but the order of its sum.
    """
    if budget:
        return [collate(group, pad, multiple=32) for group in group_by_length(examples, budget)]
    size = size or max(1, len(examples))
    return [collate(examples[i : i + size], pad) for i in range(0, len(examples), size)]


def group_by_length(examples, budget, waste=64):
    """Longest first: if memory is short, it is at once. Rows that would be padded by more than `waste` start
    anew."""
    groups = []
    width = 0
    for example in sorted(examples, key=n_tokens, reverse=True):
        length = n_tokens(example)
        has_room = groups and (len(groups[-1]) + 1) * width <= budget
        if not has_room or width - length > waste:
            groups.append([])
            width = round_up(length, 32)  # so that few shapes occur
        groups[-1].append(example)
    return groups


def n_tokens(example):
    return len(example.get("tokens", ()))  # a skipped record has none


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def draw_batches(runs, size, steps, seed):
    """Lists of indices, one a step. Every epoch has all of them in a new order; a batch may reach into the
    next.

    runs: how many neighbours stay together each time (Records.runs); in all, as many as there are indices.
    """
    draw = torch.Generator().manual_seed(seed)
    end = np.cumsum(runs)

    def endless():
        while True:
            for k in torch.randperm(len(runs), generator=draw).numpy():
                yield from range(end[k] - runs[k], end[k])

    order = endless()
    for _ in range(steps):
        yield list(islice(order, size))


def share_by_rank(batch, records, n_visual, rank=0, world=1):
    """What this process takes of a step's records: dealt out longest first, each to whoever has least so far.
    """
    if world == 1:
        return batch
    tokens = {i: records.guess_tokens(i, n_visual) for i in batch}
    hands = [[] for _ in range(world)]
    load = [0] * world
    for i in sorted(batch, key=lambda i: -tokens[i]):
        least = load.index(min(load))
        hands[least].append(i)
        load[least] += tokens[i]
    return hands[rank]
