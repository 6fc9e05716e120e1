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

    python -m tools.show show FILE --image-root DIR       # one record as the model meets it, its tiles in show.png
    python -m tools.show check FILE --image-root DIR      # missing and broken pictures, lengths, labels; exit 1 if anything is wrong
    python -m tools.show tokenizer FILE --out DIR         # the records' own words as tokens, for a decoder that starts from random weights
"""

from array import array
from itertools import groupby
from pathlib import Path
import json
import os
import re

from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
import numpy as np
import torch
import torch.nn.functional as F

import vision
from conversation import encode_conversation, find_template
from model import IGNORE
from support.cli import UserError
from support.io import reading



TURN = '{"from": "human" or "gpt", "value": text}'
RECORD = '{"id", "image", "conversations": [' + TURN + ", ...]}"
MAX_RECORD = 64 * 2**20              # bytes; a JSON record of more is taken for a broken file



class Records:
    """The records of a file, each read when it is asked for: in memory there are 8 bytes a record, where it begins in the file."""

    recompress = False               # whether mpo.py compresses their pictures anew

    def __init__(self, path, image_root=None):
        self.path, self.image_root, self.parts = Path(path), image_root and Path(os.path.abspath(image_root)), [self]
        if image_root and not self.image_root.is_dir():
            raise UserError(f"--image-root {image_root}: no such folder")
        with reading(path), open(path, "rb") as file:
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
    many questions each record has: those of one stay together (batches), so that in a batch their pictures are looked at once (collate).
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
        pixels, layout = vision.join_pictures(pictures or [no_picture(self.vision_cfg.image_size)])
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
    pixels, layout = vision.join_pictures([(some[0]["pixels"], torch.cat([e["layout"] for e in some])) for some in alike] or [no_picture(0)])  # (N, 3, S, S), (M, 2)
    return rows | {"pixels": pixels, "layout": layout, "lengths": torch.tensor([len(e["tokens"]) for e in used], dtype=torch.int64),
                   "ids": [e["id"] for e in used], "skipped": [e["skipped"] for e in examples if "skipped" in e]}



def batches(runs, size, steps, seed):
    """Index lists, one a step: each epoch a fresh permutation of all indices, cut without regard to where an epoch ends. `runs`: how many
    neighbours each time stay together, as the questions of one record do; they add up to the number of indices."""
    draw, queue, length = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64), torch.as_tensor(runs)
    first = length.cumsum(0) - length                                       # index of each run
    for _ in range(steps):
        while len(queue) < size:
            order = torch.randperm(len(length), generator=draw)
            n = length[order]
            queue = torch.cat([queue, torch.arange(int(n.sum())) + (first[order] - (n.cumsum(0) - n)).repeat_interleave(n)])
        yield queue[:size].tolist()
        queue = queue[size:]



def share(batch, records, n_token, rank=0, world=1):
    """What this process takes of a step's records. Dealt out longest first, each to whoever has least so far; length as in the file, 4 bytes a token."""
    if world == 1:
        return batch
    hands, load, tokens = [[] for _ in range(world)], [0] * world, {i: records.n_bytes(i) / 4 + n_token * records.has_picture(i) for i in batch}
    for i in sorted(batch, key=lambda i: -tokens[i]):
        least = load.index(min(load))
        hands[least].append(i)
        load[least] += tokens[i]
    return hands[rank]



def micro_batches(rows, size, pad, budget=0, collate=collate):
    """The examples of a step -> batches of at most `size` of them (0: one batch), done in the loader process.

    With a budget, instead: sorted by length and cut where that pads least, no batch having more tokens than that, its padding counted. Lengths are
    rounded up to multiples of 32, so that few shapes occur. Which records share a batch changes nothing in the gradient but the order of its sum.
    """
    if not budget:
        size = size or max(len(rows), 1)
        return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]
    rows = sorted(rows, key=lambda row: len(row.get("tokens", ())))
    up, made = [max(32, -(-len(row.get("tokens", ())) // 32) * 32) for row in rows], []
    best, cut = [0.0], [0]                                                  # of the first e rows: the least cost, and where the last batch begins
    for e in range(1, len(rows) + 1):
        fits = [s for s in range(e) if up[e - 1] * (e - s) <= budget] or [e - 1]
        cost, start = min((best[s] + up[e - 1] * (e - s) + 256, s) for s in fits)           # a batch of its own costs like 256 tokens
        best.append(cost)
        cut.append(start)
    e = len(rows)
    while e:                                                                # longest first: if memory is short, it is at once
        batch = collate(rows[cut[e] : e], pad)
        extra = up[e - 1] - batch["tokens"].shape[1]
        made.append(batch | {"tokens": F.pad(batch["tokens"], (0, extra), value=pad), "labels": F.pad(batch["labels"], (0, extra), value=IGNORE)})
        e = cut[e]
    return made
