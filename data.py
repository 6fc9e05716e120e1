"""Records of a file to examples, and examples to batches for the model.

The way of a record:
    FILE  --Records-->       {"id", "images": [name], "turns": [("human", "<image>\\nWhat?"), ("gpt", ...)]},
                             by support/data_files.py; "number", its place among all records; "group",
                             the number of the first question of the same record; "file", a DataFile that
                             knows the folder of the pictures; "where", its file and line, for errors
          --Examples-->      its tensors: pixels (n, 3, S, S) uint8 of its n tiles; layout (M, 2), of each
                             of the M visual tokens they become its tile and its place there, by vision.py;
                             tokens (T,) and labels (T,), where a picture is a run of image-token ids, one
                             a visual token, by conversation.py
          --collate-->       a batch: tokens (B, T), labels (B, T), padded on the right;
                             pixels and layout of all its pictures
draw_steps says which records a step shows, micro_batches cuts their examples into batches that fit in
memory, and load_steps does all this in worker processes, ahead of the training.

FILE is a JSON list, or has one record per line (JSON lines). A record is one of these:
    {"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"question_id", "image", "text", "answer"}       a question; "question" may stand for "text"
    {"image", "question", "chosen", "rejected"}      a preference pair; here its answer is the chosen one
"image", or "images", is a file name below --image-root, a list of them, or not there. Each <image> in a
question is the place of one.

Where this departs from LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL
(arXiv:2411.10442):
  - a conversation that is too long is an error or a counted skip. They cut it, or set all its labels to
    IGNORE.
  - each step is drawn from all records. For speed LLaVA's stage 2 draws each from records of about one
    length, all with a picture or all without; here only micro-batches are of one length (--token-budget).

    python -m tools.show FILE --image-root DIR           # one record as the model meets it
    python -m tools.show check FILE --image-root DIR     # missing and broken pictures, lengths, labels
"""

import multiprocessing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import vision
from conversation import Tokenizer, encode_conversation, find_template
from model import IGNORE
from support.cli import UserError
from support.data_files import Records, picture_paths
from support.picture_files import open_image
from support.processes import in_loader_process, rank, share_by_rank, world_size

# ---- examples and batches ----


@dataclass(eq=False)
class Examples(Dataset):
    """Records as the model takes them: {"tokens" (T,), "labels" (T,), "pixels" (n, 3, S, S), "layout" (M, 2),
    "n_visual" (visual tokens of each picture), "id", "number" (the record's)}, or {"skipped": why, "number"}.
    """

    records: Records
    tok: Tokenizer
    template: str
    vision_cfg: vision.VisionConfig
    image_mode: str
    max_length: int  # of a record in tokens
    last_pictures: tuple = (None, None, None)  # see load_pictures

    def __post_init__(self):
        find_template(self.template)  # an unknown one is an error before any work

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.make_example(self.records[i])
        except UserError as error:  # all processes decide whether to stop: Run in support/checkpoint.py
            return {"skipped": str(error), "number": i}

    def make_example(self, record):
        """UserError for a record that cannot be used whole."""
        try:
            (pixels, layout), n_visual = self.load_pictures(record)
            example = self.encode(record, n_visual)
        except UserError as error:
            raise UserError(f"{record['where']}: {error}") from None
        return example | {"pixels": pixels, "layout": layout, "id": record["id"], "number": record["number"]}

    def load_pictures(self, record):
        """-> (pixels, layout) of all its pictures, and how many visual tokens each becomes.

        Those of the last record are kept: the next question of the same record (--split-questions) gets the
        same tensors, and these go through the tower once (vision.join_tiles).
        """
        key = record["group"], record["images"]
        kept_key, pictures, n_visual = self.last_pictures
        if kept_key != key:
            images = [self.open_picture(path, record) for path in picture_paths(record)]
            cut = [vision.cut_tiles(image, self.vision_cfg, self.image_mode, len(images)) for image in images]
            pictures = vision.join_tiles(cut, self.vision_cfg.image_size)
            n_visual = [len(layout) for _, layout in cut]
            self.last_pictures = key, pictures, n_visual
        return pictures, n_visual

    # mpo.py has other forms of open_picture and encode, for preference pairs.

    def open_picture(self, path, record):
        return open_image(path, "the path and --image-root")

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


def collate(examples, pad, multiple=1, more=None):
    """Examples of unequal length -> one batch, padded on the right to a multiple of so many tokens.

    more: {name: padding} of further rows beside tokens and labels.
    """
    used = [e for e in examples if "skipped" not in e]
    batch = {
        "lengths": torch.tensor([length_of(e) for e in used], dtype=torch.int64),
        "record_ids": [e["id"] for e in used],
        "skipped": [e["skipped"] for e in examples if "skipped" in e],  # why the others are not in it
    }
    for name, padding in {"tokens": pad, "labels": IGNORE, **(more or {})}.items():
        batch[name] = pad_rows([e[name] for e in used], padding, multiple)  # (B, T)

    # Pictures (n, 3, S, S) and (M, 2). Those that questions share go through the towers once.
    pictures = [(e["pixels"], e["layout"]) for e in used]
    batch["pixels"], batch["layout"] = vision.join_tiles(pictures)
    return batch


def pad_rows(rows, padding, multiple=1):
    """Lists or tensors (T,) of unequal length -> (B, T), padded on the right to a multiple of so many."""
    width = round_up(max(map(len, rows), default=0), multiple)
    padded = torch.full((len(rows), width), padding)
    for place, row in zip(padded, rows):
        place[: len(row)] = torch.as_tensor(row)
    return padded


def micro_batches(examples, size, pad, budget=0, collate=collate):
    """Cut a step's examples into batches that fit in memory: `size` rows each (0: all), or `budget` tokens.

    Which records share a batch changes nothing in the gradient but the order of its sum.
    """
    if budget:
        return [collate(group, pad, multiple=32) for group in group_by_length(examples, budget)]
    size = size or max(1, len(examples))
    return [collate(examples[i : i + size], pad) for i in range(0, len(examples), size)]


def group_by_length(examples, budget, waste=64):
    """Longest first, so that a lack of memory shows at once. A row that would be padded by more than `waste`
    starts a new batch."""
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

    def endless_epochs():
        while True:
            for k in torch.randperm(len(end), generator=draw).numpy():
                yield from range(end[k] - group_sizes[k], end[k])

    order = endless_epochs()
    for _ in range(n_step):
        yield list(islice(order, size))


# ---- the loader ----


def load_steps(cfg, task, run):
    """Yield (step, its micro-batches), from the first step that is still to do.

    Worker processes prepare them ahead. With several GPUs each gets its share of every step's records.
    """
    records = task.examples.records
    n_token = run.vlm.cfg.vision.n_token
    order = draw_steps(records.group_sizes, cfg.batch_size, run.n_step, cfg.seed)
    of_this_process = (
        share_by_rank(numbers, records, n_token, rank(), world_size())
        for numbers in islice(order, run.first_step - 1, None))
    to_micro_batches = partial(
        micro_batches, size=cfg.micro_batch_size, pad=run.tok.pad, budget=cfg.token_budget,
        collate=task.collate)

    # What the loader takes for one batch is a step: a list of micro-batches.
    loaded = iter(DataLoader(
        task.examples, batch_sampler=of_this_process, num_workers=cfg.workers, collate_fn=to_micro_batches,
        pin_memory=run.vlm.device.type == "cuda", worker_init_fn=in_loader_process))
    workers = multiprocessing.active_children()
    for step, batches in enumerate(loaded, run.first_step):
        run.note_bad_records(batches)
        torch.manual_seed(hash((cfg.seed, step, rank())))  # for augment and dropout, in a resumed run, too
        if cfg.augment:
            for batch in batches:
                augment(batch["pixels"])
        yield step, batches
        # PyTorch tells of a killed loader only once, amid whatever runs then, which may swallow the error.
        if any(process.exitcode for process in workers):
            raise RuntimeError("DataLoader worker was killed")
