"""The files of --data as one list of records: where each stands, what it says, where its pictures lie.

JSON lines stay on the disk: of each record only its place is kept. A JSON list is read once and kept in
memory as JSON lines, in bytes. data.py shows what a record may look like.
"""

import io
import json
import os
import re
from pathlib import Path

import numpy as np

from support.cli import UserError
from support.io import read_json, reading

RECORD = '{"id", "image", "conversations": [{"from": "human" or "gpt", "value": text}, ...]}'


def fill_in_paths(cfg):
    """What was not given stands beside --data."""
    folder = Path(cfg.data.split(",")[0]).parent
    cfg.out = cfg.out or f"out/{cfg.stage}"
    if not cfg.val and (folder / "val.jsonl").exists():
        cfg.val = str(folder / "val.jsonl")
    if cfg.val:  # read at last, when the model is there: that it cannot be is said now
        file_head(Path(cfg.val))


class Records:
    """The records of one file or of several, each parsed when it is asked for.

    `index` has a row of four numbers for each: its file, its line there, its first byte; and which of its
    questions is meant, -1 for all. A weight of 2 has every row twice, a fraction of 0.1 a tenth of them.
    """

    with_earlier = False  # see split_questions

    def __init__(self, data, image_root="", weights="", fraction=1.0, seed=0):
        """data: FILE, or FILE,FILE with weights "X,X", or a meta.json as MMPR's. Pictures lie below
        image_root, or below the folder of their file."""
        given = [Path(path) for path in str(data).split(",")]
        if image_root and not Path(image_root).is_dir():
            raise UserError(f"--image-root {image_root}: no such folder")
        if len(given) == 1 and given[0].suffix == ".json" and b'"annotation"' in file_head(given[0]):
            self.files = open_meta(given[0], Path(image_root or given[0].parent))
        else:
            self.files = [DataFile(path, image_root or path.parent) for path in given]
        self.paths = list(dict.fromkeys([file.path for file in self.files] + given))  # a meta.json, too
        if weights:
            with reading(f"--data-weights {weights}", "give one number for each file, as 1,0.5"):
                for file, weight in zip(self.files, weights.split(","), strict=True):
                    file.weight = float(weight)

        parts = []
        for k, file in enumerate(self.files):
            if not 0 < file.weight <= 1000:
                raise UserError(f"{file.path}: a weight of {file.weight:g}; give more than 0, at most 1000")
            rows = np.fromiter(file.find_rows(k), np.dtype((np.int64, 4)))
            n_all = len(rows)
            if not n_all:
                raise UserError(f"{file.path}: holds no record; expected a JSON list, or one record per line")
            share = file.weight * fraction
            if len(self.files) > 1 or share != 1:
                # With a share of 2.5 all twice, and half of them once more. A smaller share is part of a
                # larger one.
                order = np.random.default_rng([seed, k]).permutation(n_all)
                chosen = np.resize(order, max(1, round(n_all * share)))
                rows = rows[np.sort(chosen)]
                print(f"{file.path}: {len(rows):,} of {n_all:,} records an epoch (weight {file.weight:g})")
            parts.append(rows)
        self.index = np.concatenate(parts)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """The record as it is in the file, and beside: id (text), images (names), turns [(role, text)]; and
        where it comes from: where (for errors), file (a DataFile), number (i), group (the number of the first
        question of the same record).
        """
        k, line, start, question = self.index[i].tolist()
        record = self.files[k].read_record(line, start)
        record |= {"number": i, "group": i - max(0, question)}
        return record if question < 0 else one_question(record, question, self.with_earlier)

    def split_questions(self, with_earlier=False):
        """Make a record of every question with its answer; with_earlier: and with the turns before it.

        All records are read once, to count their questions.
        """
        self.with_earlier = with_earlier
        counts, questions = [], []
        for i in range(len(self)):
            try:
                n = len(ends_of_questions(self[i]["turns"]))
            except UserError:  # raised, or counted, when it is this record's turn
                n = 0
            counts.append(max(1, n))
            questions += range(n) or [-1]
        self.index = self.index.repeat(counts, axis=0)
        self.index[:, -1] = questions
        return self

    @property
    def group_sizes(self):
        """How many neighbours are questions of one record each time: those stay together in an epoch."""
        first = np.flatnonzero(self.index[:, -1] <= 0)
        return np.diff(first, append=len(self))

    def guess_tokens(self, i, tokens_per_tile):
        """Good enough to share out work, and without parsing: 4 bytes a token, one picture of one tile."""
        k, _, start, _ = self.index[i].tolist()
        line = self.files[k].read_line(start)
        return len(line) / 4 + tokens_per_tile * (b'"image' in line)


def picture_paths(record):
    return [record["file"].image_path(name) for name in record["images"]]


def open_meta(meta, base):
    """{name: {"root", "annotation", "repeat_time", "data_augment"}}, with paths from `base` -> [DataFile]"""
    files = []
    for name, entry in read_json(meta).items():
        with reading(f"{meta}, {name!r}", "write your own paths there, in the form of MMPR's"):
            file = DataFile(base / entry["annotation"], base / entry.get("root", ""))
            file.weight = float(entry.get("repeat_time", 1))
            file.recompress = bool(entry.get("data_augment"))
            if not file.image_root.is_dir():
                raise UserError(f"{file.image_root}: no such folder. Write your own paths there")
        files.append(file)
    return files


def file_head(path):
    """The first bytes of a file, without white space and the mark that Windows editors put in front."""
    with reading(path, "give a file of UTF-8 text"):
        with open(path, "rb") as file:
            head = file.read(4096)
        if b"\0" in head:
            raise ValueError("zero bytes in it, as UTF-16 has")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


class DataFile:
    """One file of records; a folder for the names of its pictures."""

    weight = 1.0  # how often an epoch shows each of its records
    recompress = False  # MMPR's data_augment, which mpo.py minds

    def __init__(self, path, image_root):
        self.path = path
        self.image_root = Path(os.path.abspath(image_root))
        self.is_list = file_head(path).startswith(b"[")
        if self.is_list:
            with reading(path):
                records = json.loads(path.read_bytes())
                self.lines = b"\n".join(json.dumps(record).encode() for record in records)

    def open_lines(self):  # anew each time: loader processes must not share a position
        return io.BytesIO(self.lines) if self.is_list else open(self.path, "rb")

    def read_line(self, start):
        with self.open_lines() as lines:
            lines.seek(start)
            return lines.readline()

    def read_record(self, line, start):
        where = f"{self.path}, record {line}" if self.is_list else f"{self.path}, line {line + 1}"
        with reading(where, f"expected {RECORD}"):
            record = json.loads(self.read_line(start))
            record["id"] = str(record.get("id", record.get("question_id", line)))
        where += f" (id {record['id']!r:.80})"
        with reading(where, f'expected {RECORD}, or a question in "text"'):
            images, turns = read_images(record), read_turns(record)
            n_marker = count_markers(turns)
            if n_marker not in (0, len(images)):
                raise UserError(f"{n_marker} <image> for {len(images)} pictures; name each in \"image\"")
        return record | {"images": images, "turns": turns, "where": where, "file": self}

    def find_rows(self, k):
        """Yield rows of Records.index. It is the k-th file."""
        start = 0
        with self.open_lines() as lines:
            for number, line in enumerate(lines):
                if not line.isspace():
                    yield k, number, start, -1
                start += len(line)

    def image_path(self, name):
        """Where a picture lies. No name may climb out of the image root; a link in it may lead anywhere."""
        path = Path(os.path.normpath(self.image_root / name))  # "a/../b" is "b", wherever the link a may lead
        if not path.is_relative_to(self.image_root):
            raise UserError(f"picture {name!r} lies outside --image-root {self.image_root}; link it in")
        return path


def read_images(record):
    """-> the names of its pictures"""
    found = [record[name] for name in ("image", "images") if record.get(name)]
    lists = [names if isinstance(names, list) else [names] for names in found] or [[]]
    if lists[0] != lists[-1]:
        raise UserError('"image" and "images" name different pictures; keep one of the two')
    if not all(isinstance(name, str) and name for name in lists[0]):
        raise TypeError(f'"image" is {found[0]!r:.80}, not a file name or a list of file names')

    # What a record shows besides must not get lost in silence.
    pictures = "image|img|picture|photo|frame|media|visual|file_?name"
    other_media = "video|audio" if found else f"video|audio|{pictures}"
    suffix = r"_?(path|file|name|url|src|list|data|base64|bytes|\d)s?"  # as in image_file_name, images_1
    for name in record:
        if re.fullmatch(f"({other_media})s?({suffix})*", name, re.IGNORECASE) and record[name]:
            raise UserError(f'"{name}" is not read; name pictures in "image", or drop the record')
    return lists[0]


def read_turns(record):
    """-> [(role, text), ...]"""
    if "conversations" in record:
        said = [(f"turn {k}", t["from"], t["value"]) for k, t in enumerate(record["conversations"], 1)]
    else:
        asked = "text" if "text" in record else "question"
        answered = "chosen" if "chosen" in record else "answer"
        fields = (asked, "human"), (answered, "gpt")
        said = [(f'"{name}"', role, record[name]) for name, role in fields if record.get(name) is not None]
    if not said:
        raise ValueError("no conversation")
    for place, role, text in said:
        if role not in ("human", "gpt") or not isinstance(text, str):
            raise TypeError(f"{place} is {text!r:.80} from {role!r}")
    return [(role, text) for _, role, text in said]


def count_markers(turns):
    return sum(text.count("<image>") for role, text in turns if role == "human")


def ends_of_questions(turns):
    """-> how many turns there are up to each answer to a question, itself included"""
    roles = [role for role, _ in turns]
    return [end for end in range(2, len(turns) + 1) if roles[end - 2 : end] == ["human", "gpt"]]


def one_question(record, number, with_earlier):
    """A record of one question and its answer, with the pictures up to it and, or not, the turns before it.

    Pictures of turns that are left out stand in front.
    """
    turns, images = record["turns"], record["images"]
    end = ends_of_questions(turns)[number]
    n_shown = count_markers(turns[:end]) if count_markers(turns) else len(images)
    *earlier, (role, text), answer = turns[:end]
    if not with_earlier:
        text = "<image>\n" * count_markers(earlier) + text
        earlier = []
    where = f"{record['where']}, question {number + 1}"
    return record | {"turns": [*earlier, (role, text), answer], "images": images[:n_shown], "where": where}
