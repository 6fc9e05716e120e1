"""Records of a file to examples, and examples to batches for the model.

The way of a record:
    FILE  --Records-->       {"id", "images": [name], "turns": [("human", "<image>\\nWhat?"), ("gpt", ...)]}
          --Examples-->      its tensors: pixels (n, 3, S, S) uint8 of its n tiles, and layout (M, 2) of the M
                             visual tokens they become, by vision.py; tokens (T,) and labels (T,), where a
                             picture is a run of image-token ids, one a visual token, by conversation.py
          --collate-->       a batch: tokens (B, T), labels (B, T), padded on the right;
                             pixels and layout of all its pictures

FILE is a JSON list, or has one record per line (JSON lines). A record is one of these:
    {"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"question_id", "image", "text", "answer"}       a question; "question" may stand for "text"
    {"image", "question", "chosen", "rejected"}      a preference pair; here its answer is the chosen one
"image", or "images", is a file name below --image-root, a list of them, or not there. Each <image> in a
question is the place of one.

Where this departs from LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL
(arXiv:2411.10442): a conversation that is too long is an error or a counted skip. They cut it, or set all
its labels to IGNORE.

    python -m tools.show FILE --image-root DIR           # one record as the model meets it
    python -m tools.show check FILE --image-root DIR     # missing and broken pictures, lengths, labels
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import vision
from conversation import Tokenizer, encode_conversation, find_template
from model import IGNORE
from support.cli import UserError
from support.data_files import answered_questions, ask_alone, choose_rows, open_files

# ---- examples and batches ----


@dataclass(eq=False)
class Examples(Dataset):
    """Records as the model takes them: {"tokens" (T,), "labels" (T,), "pixels" (n, 3, S, S), "layout" (M, 2),
    "n_visual" (visual tokens of each picture), "id", "number" (the record's)}, or {"skipped": why, "number"}.
    """

    records: "Records"
    tok: Tokenizer
    template: str
    vision_cfg: vision.VisionConfig
    image_mode: str
    max_length: int  # of a record in tokens
    last_pictures: tuple = (None, None, None)  # of the record before; see load_pictures

    def __post_init__(self):
        find_template(self.template)  # an unknown one is an error before any work

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.make_example(self.records[i])
        except UserError as error:  # whether to stop is for all processes to decide: Run.stop_at_bad_records
            return {"skipped": str(error), "number": i}

    def make_example(self, record):
        """UserError for a record that cannot be used whole."""
        try:
            (pixels, layout), n_visual = self.load_pictures(record)
            example = self.encode(record, n_visual)
        except UserError as error:
            raise UserError(f"{record['where']}: {error}") from None
        example |= {"pixels": pixels, "layout": layout}
        return example | {"id": record["id"], "number": record["number"]}

    def load_pictures(self, record):
        """-> (pixels, layout) of all its pictures, and how many visual tokens each becomes.

        The last record's pictures are cached. Consecutive questions on the same pictures share the same
        tensor objects, which vision.join_tiles recognises by id() and stacks once.
        """
        cached_for, pictures, n_visual = self.last_pictures
        wanted_for = record["group"], record["images"]
        if cached_for != wanted_for:
            cut = self.cut_pictures(record)
            pictures = vision.join_tiles(cut or [no_picture(self.vision_cfg.image_size)])
            n_visual = [len(layout) for _, layout in cut]
            self.last_pictures = wanted_for, pictures, n_visual
        return pictures, n_visual

    def cut_pictures(self, record):
        """-> [(tiles, layout), ...]"""
        images = [self.open_picture(path, record) for path in picture_paths(record)]
        return [vision.cut_tiles(image, self.vision_cfg, self.image_mode, len(images)) for image in images]

    def open_picture(self, path, record):
        return vision.open_image(path, "the path and --image-root")

    def encode(self, record, n_visual):
        tokens, labels = encode_conversation(self.tok, record["turns"], self.template, n_visual)
        self.check_length(len(tokens), n_visual)
        if set(labels) == {IGNORE}:
            raise UserError("no supervised token; drop the record")
        return {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "n_visual": n_visual}

    def check_length(self, n, n_visual):
        if n > self.max_length:  # nothing is cut: half a picture or half an answer teaches nonsense
            raise UserError(f"{n} tokens ({sum(n_visual)} of them visual), {self.max_length} allowed; "
                            "drop or split the record, or raise --max-length if the decoder takes more")


def no_picture(S):
    return torch.empty((0, 3, S, S), dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)


def collate(examples, pad, multiple=1, more=None):
    """Examples of unequal length -> one batch, padded on the right to a multiple of so many tokens.

    more: {name: padding} of further rows beside tokens and labels.
    """
    used = [e for e in examples if "skipped" not in e]
    lengths = [length_of(e) for e in used]
    batch = {
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "record_ids": [e["id"] for e in used],
        "skipped": [e["skipped"] for e in examples if "skipped" in e],  # why the others are not in it
    }

    # Rows (B, T).
    width = round_up(max(lengths, default=0), multiple)
    for name, padding in {"tokens": pad, "labels": IGNORE, **(more or {})}.items():
        batch[name] = torch.full((len(used), width), padding)
        for row, example in zip(batch[name], used):
            row[: length_of(example)] = example[name]

    # Pictures (n, 3, S, S) and (M, 2). Those that questions share go through the towers once.
    pictures = [(e["pixels"], e["layout"]) for e in used]
    batch["pixels"], batch["layout"] = vision.join_tiles(pictures or [no_picture(0)])
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
    """Longest first, so that running out of memory happens at once. A row that would be padded by more than
    `waste` starts a new batch."""
    groups = []
    width = 0
    for example in sorted(examples, key=length_of, reverse=True):
        length = length_of(example)
        has_room = groups and (len(groups[-1]) + 1) * width <= budget
        if not has_room or width - length > waste:
            groups.append([])
            width = round_up(length, 32)  # so that few shapes occur
        groups[-1].append(example)
    return groups


def augment(pixels):
    """Tiles (n, 3, S, S), each replaced by a part at least three quarters as wide; half are mirrored."""
    S = pixels.shape[-1]
    for tile in pixels:
        cut, down, right, mirror = torch.rand(4).tolist()
        size = S - int(cut * S / 4)
        top = int(down * (S - size))
        left = int(right * (S - size))
        part = tile[:, top : top + size, left : left + size]
        if mirror < 0.5:
            part = part.flip(-1)
        tile.copy_(F.interpolate(part[None], S, mode="bilinear")[0])


def length_of(example):
    return len(example.get("tokens", ()))  # a skipped record has none


def round_up(n, multiple):
    return -(-n // multiple) * multiple


# ---- the order of an epoch ----


def draw_steps(group_sizes, size, n_step, seed):
    """The numbers of `size` records for each step. Every epoch has all in a new order; a step may reach into
    the next epoch.

    group_sizes: how many neighbours stay together each time, the questions of one record. Of [3, 1] the
    epoch 0 1 2 3 or the epoch 3 0 1 2 is drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    end = np.cumsum(group_sizes)

    def endless():
        while True:
            for k in torch.randperm(len(end), generator=draw).numpy():
                yield from range(end[k] - group_sizes[k], end[k])

    order = endless()
    for _ in range(n_step):
        yield list(islice(order, size))


# ---- records ----


class Records:
    """The records of one file or of several, each parsed when it is asked for.

    `index` says where each stands (support/data_files.py, ROW). A weight of 2 has every row twice, a fraction
    of 0.1 a tenth of them.
    """

    with_earlier = False  # see split_questions

    def __init__(self, data, image_root="", weights="", fraction=1.0, seed=0):
        """data: FILE, or FILE,FILE with weights "X,X", or a meta.json as MMPR's. Pictures lie below
        image_root, or below the folder of their file."""
        self.files = open_files(str(data), image_root, weights)
        given = [Path(path) for path in str(data).split(",")]
        self.paths = list(dict.fromkeys([file.path for file in self.files] + given))  # a meta.json, too
        parts = []
        for k, file in enumerate(self.files):
            rows = file.find_rows(k)
            if len(self.files) > 1 or file.weight * fraction != 1:
                n_all = len(rows)
                rows = choose_rows(rows, file.weight * fraction, [seed, k])
                share = f"{len(rows):,} of {n_all:,} records"
                print(f"{file.path}: {share} an epoch (weight {file.weight:g})")
            parts.append(rows)
        self.index = np.concatenate(parts)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """The record as it is in the file, and beside: id (text), images (names), turns [(role, text)]; and
        where it comes from: where (for errors), file (a DataFile), number (i), group (the number of the first
        question of the same record).
        """
        k, line, start, end, question = self.index[i].tolist()
        record = self.files[k].read_record(line, start, end)
        record |= {"number": i, "group": i - max(0, question)}
        if question < 0:
            return record
        asked = answered_questions(record)[question]
        return asked if self.with_earlier else ask_alone(asked)

    def split_questions(self, with_earlier=False):
        """Make a record of every question with its answer; with_earlier: and with the turns before it.

        All records are read once, to count their questions.
        """
        self.with_earlier = with_earlier
        counts = []
        for i in range(len(self)):
            try:
                counts.append(len(answered_questions(self[i])))
            except UserError:  # raised, or counted, when it is this record's turn
                counts.append(0)
        self.index = self.index.repeat(np.maximum(counts, 1))
        self.index["question"] = np.concatenate([np.arange(n) if n else [-1] for n in counts])
        return self

    @property
    def group_sizes(self):
        """How many neighbours are questions of one record each time: those stay together in an epoch."""
        first = np.flatnonzero(self.index["question"] <= 0)
        return np.diff(first, append=len(self))

    def guess_tokens(self, i, tokens_per_tile):
        """Good enough to share out work, and without parsing: 4 bytes a token, one picture of one tile."""
        k, _, start, end, _ = self.index[i].tolist()
        has_picture = b'"image' in self.files[k].read(start, end)
        return (end - start) / 4 + tokens_per_tile * has_picture


def picture_paths(record):
    return [record["file"].image_path(name) for name in record["images"]]
