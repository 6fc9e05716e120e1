"""The files of --data as bytes: where each record stands in them, and where their pictures lie.

JSON lines stay on the disk: of each record only its place is kept. A JSON list is read once and kept in
memory as JSON lines, in bytes.
"""

import io
import json
import os
from array import array
from pathlib import Path

import numpy as np

from support.cli import UserError
from support.io import read_json, reading

# A record's place: its file, its number there, its first byte, the byte behind its last; and which of its
# questions is meant, -1 for all.
ROW = np.dtype([(name, np.int64) for name in ("file", "number", "start", "end", "question")])


def open_files(data, image_root="", weights=""):
    """FILE, or FILE,FILE, or a meta.json as MMPR's; weights "X,X", one for each file. -> [DataFile]"""
    paths = [Path(path) for path in data.split(",")]
    if len(paths) == 1 and paths[0].suffix == ".json" and b'"annotation"' in file_head(paths[0]):
        files = open_meta(paths[0], Path(image_root or paths[0].parent))
    else:
        files = [DataFile(path, image_root or path.parent) for path in paths]
    if weights:
        with reading(f"--data-weights {weights}", "give one number for each file, as 1,0.5"):
            for file, weight in zip(files, weights.split(","), strict=True):
                file.weight = float(weight)
    return files


def open_meta(meta, base):
    """{name: {"root", "annotation", "repeat_time", "data_augment"}}, whose paths start at `base`"""
    files = []
    for name, entry in read_json(meta).items():
        try:
            file = DataFile(base / entry["annotation"], base / entry.get("root", ""))
        except UserError as error:
            raise UserError(f"{meta}, {name!r}: {error}. Write your own paths there") from None
        file.weight = float(entry.get("repeat_time", 1))
        file.recompress = bool(entry.get("data_augment"))
        files.append(file)
    return files


def file_head(path):
    """The first bytes of a file, without white space and the mark that Windows editors put in front."""
    with reading(path), open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


class DataFile:
    weight = 1.0  # how often an epoch shows each of its records
    recompress = False  # MMPR's data_augment, which mpo.py minds

    def __init__(self, path, image_root):
        self.path = path
        self.image_root = Path(os.path.abspath(image_root))
        if not self.image_root.is_dir():
            raise UserError(f"image root {image_root}: no such folder")
        self.is_list = file_head(path).startswith(b"[")
        if self.is_list:
            with reading(path):
                records = json.loads(path.read_bytes())
                self.lines = b"\n".join(json.dumps(record).encode() for record in records)

    def open_lines(self):  # anew each time: loader processes must not share a position
        return io.BytesIO(self.lines) if self.is_list else open(self.path, "rb")

    def read(self, start, end):
        with self.open_lines() as lines:
            lines.seek(start)
            return lines.read(end - start)

    def name_record(self, number):
        """For errors."""
        return f"{self.path}, record {number}" if self.is_list else f"{self.path}, line {number + 1}"

    def find_rows(self, k):
        """-> (n,) of ROW, the places of its records. It is the k-th file."""
        rows = array("q")
        start = 0
        with self.open_lines() as lines:
            for number, line in enumerate(lines):
                end = start + len(line)
                if not line.isspace():
                    rows.extend((k, number, start, end, -1))
                start = end
        if not rows:
            raise UserError(f"{self.path}: holds no record; expected a JSON list, or one record per line")
        return np.frombuffer(rows, dtype=ROW)

    def image_path(self, name):
        """Where a picture lies. No name may climb out of the image root; a link in it may lead anywhere."""
        path = Path(os.path.normpath(self.image_root / name))  # "a/../b" is "b", wherever the link a may lead
        if not path.is_relative_to(self.image_root):
            raise UserError(f"picture {name!r} lies outside --image-root {self.image_root}; link it in")
        return path


def choose_rows(rows, share, seed):
    """What an epoch shows: with a share of 0.1 a tenth; with 2.5 all twice, and half of them once more.

    A smaller share is part of a larger one.
    """
    if share <= 0:
        raise UserError(f"a weight of {share:g}: every weight must be above 0")
    order = np.random.default_rng(seed).permutation(len(rows))
    repeated = np.resize(order, max(1, round(len(rows) * share)))
    return rows[np.sort(repeated)]
