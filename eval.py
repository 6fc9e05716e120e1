"""Every benchmark of the three papers, scored as its authors score it.

    python eval.py                                                       # the newest run under out/ on the toy world's benchmarks
    python eval.py --benchmark pope --data DIR --image-root DIR          # official files under their official names
    python eval.py --benchmark gqa --data DIR --predictions FILE         # answers that somebody else produced; no model is opened

A benchmark is a row of BENCHMARKS at the end of this file, four functions of a few lines each:
    read   official files -> items {"id", "image", "question", "suffix", "truth", ...}; the prompt is the question, a newline, the suffix
    judge  (item, answer) -> {"parsed", "score"}: text to label to verdict (0 to 1), one answer at a time
    total  records -> further metrics, and for each unit of the benchmark (question, picture, circular group) a row of counts whose
           column sums give the headline figure. So the 95% interval is a bootstrap over units, of that very figure.
    submit what the official server or script takes

--out gets results.json (n, score in the authors' unit, ci95, unparsed (share of the answers), further metrics by their official names,
all prompts, answers and verdicts), answers.jsonl (LLaVA's form), the submission, and progress.jsonl, from which --resume goes on.
Scores are arXiv:2310.03744 tables 3 and 4, arXiv:2402.07865 tables 2 to 4 and arXiv:2411.10442 tables 2 and 3.

Where this departs from the originals:
  - several questions at once, sorted by length, each picture looked at once for all of its questions in a batch; the originals ask one
    by one. Answers are the same but for float rounding;
  - a question too long for the model is counted as wrong, and said; the originals cut it;
  - where the official figure needs GPT as a judge, the judge's input is written and a `proxy` printed that compares with nothing;
  - MathVista's answers are extracted by rule where no `extraction` is given, and the figure says so.
"""

import argparse
import ast
import base64
import csv
import io
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import toyworld
from data import Tokenizer, cut_at_stop, encode_prompt, parse_args, run, stop_ids
from model import VLM, check_image_mode, check_tokenizer, write_whole
from toyworld import COT, INSUFFICIENT, LETTER, SHORT
from train import Flags, iou, newest_run, one_of, pick_device
from vision import MODES, UserError, cut_tiles, join, open_image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main(argv=None):
    cfg = parse(argv)
    model = None if cfg.predictions else Model(cfg)
    results = [evaluate(name, cfg, model) for name in cfg.benchmark]
    print("\n" + table(results))
    return 0


def evaluate(name, cfg, model):
    """One benchmark from its files to results.json, which is returned."""
    bench, began = BENCHMARKS[name.removeprefix("toy-")], time.time()
    out = Path(cfg.out) if cfg.out and len(cfg.benchmark) == 1 else Path(cfg.out or "out/eval") / name
    cfg = argparse.Namespace(**vars(cfg) | {"family": cfg.family or (model.family if model else "llava"), "name": name.removeprefix("toy-")})
    if cfg.likelihood is None:
        cfg.likelihood = bool(model) and cfg.family == "prismatic"
    if name.startswith("toy-"):
        cfg.image_root = cfg.image_root or cfg.data or "toyworld"
        cfg.data = toy_files(cfg.name, Path(cfg.data or "toyworld"), out / "official")
    if not cfg.data or not Path(cfg.data).exists():
        raise UserError(f"--data {cfg.data or '(not given)'}: no such folder; give the one with the official files of {name}" if cfg.data else
                        f"--benchmark {name}: give --data DIR, the folder with its official files, and --image-root DIR")
    items = bench.read(cfg)
    if not items:
        raise UserError(f"{cfg.data}: no question of {name} in it; check --data and --split")
    if cfg.predictions:
        rows = match_up(bench, items, cfg)
        items = some_of(items, cfg.limit)
        columns = {"score": grade(bench, items, rows, cfg)}
    else:
        items = some_of(items, cfg.limit)
        modes = ["cot", "direct"] if cfg.cot else ["direct"]
        said = ask(model, bench, items, modes + (["blind"] if cfg.blind else []), cfg, out)
        columns = {mode: grade(bench, items, said[mode], argparse.Namespace(**vars(cfg) | {"cot": mode == "cot" or mode == "blind" and cfg.cot}))
                   for mode in said}
    main_mode, *others = columns
    result = {"benchmark": name} | columns[main_mode]
    records = result.pop("records")
    if model:
        result |= {"model": model.name, "prompts": f"{cfg.family}, {main_mode}", "answers": "likelihood" if cfg.likelihood and "candidates" in items[0] else "generated"}
    for mode in others:                                                     # a baseline is figures, and its answers beside the main ones
        result[mode] = {k: columns[mode][k] for k in ("score", "ci95", "proxy", "proxy_ci95", "unparsed") if k in columns[mode]}
        for record, other in zip(records, columns[mode]["records"]):
            record[mode] = {k: other[k] for k in ("answer", "parsed", "score")}
    if "blind" in others:
        result["blind"]["picture"] = cfg.blind
    result["paper"] = {} if name.startswith("toy-") else bench.paper
    if cfg.compare:
        result["compare"] = compare(records, cfg.compare)
    result["records"] = records
    rows = [{"question_id": r["id"], "prompt": r["prompt"], "text": r["answer"], "answer_id": f"{name}-{k}", "model_id": result.get("model", ""), "metadata": {}}
            for k, r in enumerate(records)]
    files = {"answers.jsonl": lines(rows)} | bench.submit(items, records, cfg)
    for file, content in files.items():
        write_whole(out / file, lambda tmp: tmp.write_bytes(content if isinstance(content, bytes) else content.encode()))
    write_whole(out / "results.json", lambda tmp: tmp.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8"))
    if cfg.show:
        contact_sheet(items, records, cfg, out / "wrong.png")
    report(result, files, out, time.time() - began)
    return result


def grade(bench, items, rows, cfg):
    """Answers {item id: row} -> the result of one column, with its records. A missing answer counts as wrong."""
    records = []
    for item in items:
        row, truth = rows.get(item["id"]), item["truth"]
        record = {"id": item["id"], "image": item["image"] if isinstance(item["image"], (str, list)) else None, "prompt": prompt_of(item, cfg),
                  "answer": None, "parsed": None, "truth": truth, "score": None if truth is None else 0.0}
        if row is not None:
            text = said(row)
            record["answer"] = text
            if row.get("cut_off"):
                record["cut_off"] = True
            final = final_answer(text) if cfg.cot and not (cfg.name == "m3cot" and cfg.family != "internvl") else text
            verdict = bench.judge(item, final, row, cfg)
            record |= verdict if truth is not None else verdict | {"score": None}
        else:
            record["missing"] = True
        records.append(record)
    metrics, tally, headline = bench.total(records, items)
    tally, given = np.asarray(tally, dtype=float), [r for r in records if "missing" not in r]
    bad = sum(r["parsed"] is None or r["parsed"] == "" for r in given)
    score = headline(tally.sum(0)) if len(tally) else None
    ci = interval(tally, headline) if len(tally) else None
    if score is not None and bench.digits is not None:
        score = round(score, bench.digits)
    judged = metrics.pop("judged", False)
    figures = {"score": score, "ci95": ci} if judged or not bench.proxy else {"score": None, "ci95": None, "proxy": score, "proxy_ci95": ci}
    n = metrics.pop("n", len(records))
    return {"n": n} | figures | {"unparsed": bad / len(given) if given else 0.0, "n_unparsed": bad, "missing": len(records) - len(given),
                                 "cut_off": sum("cut_off" in r for r in records), "metric": bench.metric} | metrics | {"records": records}


def interval(tally, headline, n=1000):
    """95% percentile bootstrap over the rows of `tally`, the benchmark's units; the same every time."""
    draw, u = np.random.default_rng(0), len(tally)
    figures = [headline(np.bincount(draw.integers(u, size=u), minlength=u) @ tally) for _ in range(n)]
    figures = [f for f in figures if f is not None and math.isfinite(f)]
    return [float(x) for x in np.percentile(figures, [2.5, 97.5])] if figures else None


def compare(records, file):
    """Paired test against another results.json: the same units, their difference, and how often chance signs alone give as much."""
    other, _ = read_any(Path(file))
    theirs = other.get("records") if isinstance(other, dict) else None
    if not isinstance(theirs, list) or not all(isinstance(r, dict) and "id" in r and "score" in r for r in theirs):
        raise UserError(f"--compare {file}: not a results.json of eval.py; it has no records with id and score")
    per_unit = lambda rs: {r.get("unit", r["id"]): r.get("unit_score", r["score"]) for r in rs if r["score"] is not None}
    ours, theirs = per_unit(records), per_unit(theirs)
    both = [unit for unit in ours if unit in theirs]
    if not both:
        raise UserError(f"--compare {file}: shares no scored question with this run; compare runs of the same benchmark")
    d = np.array([ours[unit] - theirs[unit] for unit in both])
    draw, sizes = np.random.default_rng(0), Counter(np.round(abs(d[d != 0]), 9).tolist())
    chance = sum(size * (2 * draw.binomial(k, 0.5, 100_000) - k) for size, k in sizes.items()) if sizes else np.zeros(100_000)
    p = (1 + np.sum(np.abs(chance) >= abs(d.sum()) - 1e-9)) / 100_001
    low, high = interval(np.stack([d, np.ones_like(d)], 1), percent)
    return {"with": str(file), "n": len(both), "ours": 100 * float(np.mean([ours[u] for u in both])), "theirs": 100 * float(np.mean([theirs[u] for u in both])),
            "difference": 100 * float(d.mean()), "ci95": [low, high], "better": int((d > 0).sum()), "worse": int((d < 0).sum()),
            "p": float(p), "test": "paired sign-flip permutation of per-unit scores, two-sided"}


def percent(sums):
    """Mean in percent, of columns (score, 1)."""
    return 100 * float(sums[0] / sums[1]) if sums[1] else None


def mean(scores):
    scores = list(scores)
    return sum(scores) / len(scores) if scores else None


def plain(records):
    """The tally of a benchmark whose figure is the mean score."""
    return [[r["score"], 1] for r in records if r["score"] is not None]


# ---- the model's answers -----------------------------------------------------------------------------------------------


class Model:
    """A VLM, its tokenizer, and which family's prompts it is asked with."""

    def __init__(self, cfg):
        self.device, directory = pick_device(cfg.device), cfg.model or newest_run()
        self.vlm = VLM.from_pretrained(directory, self.device, getattr(torch, cfg.dtype), cfg.vision, cfg.llm)
        base = cfg.llm and not (Path(directory) / "tokenizer.model").exists()           # a LoRA is published without
        self.tok, self.name = Tokenizer(cfg.llm if base else directory), str(directory)
        check_tokenizer(self.vlm, self.tok)
        self.template, self.mode = cfg.template or self.vlm.cfg.template, cfg.image_mode or self.vlm.cfg.image_mode
        check_image_mode(self.vlm, self.mode, directory)
        self.family = "internvl" if self.template.startswith("intern") else "prismatic" if self.template.startswith("prism_") else "llava"
        self.longest = self.vlm.cfg.decoder.block_size
        self.stop = stop_ids(self.tok, self.template)

    def encode(self, turns, pictures):
        """-> prompt ids (T,), (tiles (n, 3, S, S), layout (M, 2)) or None"""
        cut = [cut_tiles(open_picture(p), self.vlm.cfg.vision, self.mode) for p in pictures]
        words = [(role, text.replace("<image>", "image") if cut else text) for role, text in turns]      # a benchmark's text has no places for pictures
        words[0] = ("human", "<image>" * len(cut) + "\n" * bool(cut) + words[0][1])
        return encode_prompt(self.tok, words, self.template, [len(layout) for _, layout in cut]), join(cut) if cut else None

    def generate(self, encoded, room):
        """Greedy answers to [(ids, pictures), ...] of any lengths -> [(text, whole), ...]; `whole` is False where `room` tokens did not do."""
        tokens, lengths, pictures = self.batch(encoded)
        answers = []
        for ids in self.vlm.generate(tokens, max_new_tokens=room, lengths=lengths, stop=self.stop, **pictures).tolist():
            end = next((k for k, t in enumerate(ids) if t in self.stop), None)
            text = self.tok.decode(ids[:end])
            kept = cut_at_stop(text, self.template)
            answers.append((kept.strip(), end is not None or kept != text))
        return answers

    @torch.no_grad()
    def likeliest(self, encoded, candidates):
        """Prismatic's way: softmax at the first answer position, kept to the candidates' single tokens -> [(candidate, [probability, ...]), ...]"""
        ids = [self.tok.encode(c) for c in candidates]
        if wrong := [c for c, i in zip(candidates, ids) if len(i) != 1]:
            raise UserError(f"--likelihood: {wrong[0]!r} is not one token of {self.tok.path}; use --no-likelihood")
        tokens, lengths, pictures = self.batch(encoded)
        cache = self.vlm.decoder.new_cache(*tokens.shape)
        h = self.vlm.prefill(tokens, cache=cache, lengths=torch.tensor(lengths, device=self.device), **pictures)         # (B, D)
        logits = self.vlm.decoder.lm_head(h).float()
        p = logits[:, [i for i, in ids]].softmax(-1).cpu()                  # (B, candidates): the rest of the vocabulary divides out
        return [(candidates[int(row.argmax())], [round(x, 6) for x in row.tolist()]) for row in p]

    def batch(self, encoded):
        """-> tokens (B, T), lengths, {pixels, layout, shared}: where all rows begin alike up to a picture, each picture is looked at once."""
        lengths = [len(ids) for ids, _ in encoded]
        tokens = torch.tensor([ids + [self.tok.pad] * (max(lengths) - len(ids)) for ids, _ in encoded], device=self.device)
        pictures, shared, known = [p for _, p in encoded if p is not None], None, {}
        begun = {len(ids) - ids[::-1].index(self.tok.image) if self.tok.image in ids else 0 for ids, _ in encoded}
        if len(begun) == 1 and len(pictures) == len(encoded) > 1:
            shared = [known.setdefault((tuple(ids[: max(begun)]), *(t.numpy().tobytes() for t in p)), len(known)) for ids, p in encoded]
            pictures = [encoded[shared.index(i)][1] for i in range(len(known))]
        pixels, layout = (x.to(self.device) for x in join(pictures)) if pictures else (None, None)
        return tokens, lengths, {"pixels": pixels, "layout": layout, "shared": shared}


def ask(model, bench, items, modes, cfg, out):
    """Every item in every mode -> {mode: {id: {"text", ...}}}. Batches are cut once, by length, from all items: --resume leaves out whole
    batches only, so that each answer comes from the same arithmetic as in an uninterrupted run."""
    progress, done = out / "progress.jsonl", {}
    head = {k: v for k, v in vars(cfg).items() if k not in ("out", "resume", "device", "show", "compare", "benchmark", "predictions")} | {
        "model": model.name, "weights": stamp(model.name), "questions": len(items)}
    head = json.loads(json.dumps(head, default=str))
    if cfg.resume and progress.exists():
        before, *rows = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")] or [{}]
        if changed := [k for k in head if before.get(k) != head[k]]:
            raise UserError(f"--resume: {progress} was written with {changed[0]} {before.get(changed[0])!r}, now it is {head[changed[0]]!r}; "
                            "give the same flags, or leave out --resume")
        done = {(row["mode"], row["id"]): row for row in rows}
    write_whole(progress, lambda tmp: tmp.write_text(lines([head, *done.values()]), encoding="utf-8"))
    jobs = []
    for mode in modes:
        cot = mode == "cot" or mode == "blind" and cfg.cot
        longest = defaultdict(int)                                          # sorted by length, the questions about one picture together
        for item in items:
            longest[str(item["image"])] = max(longest[str(item["image"])], len(prompt_of(item, cfg, cot)))
        order = sorted(items, key=lambda item: (longest[str(item["image"])], str(item["image"]), len(prompt_of(item, cfg, cot))))
        jobs += [(mode, cot, order[i : i + cfg.batch_size]) for i in range(0, len(order), cfg.batch_size)]
    pictures, todo = pictures_of(items, cfg), [job for job in jobs if any((job[0], item["id"]) not in done for item in job[2])]
    total, left = len(items) * len(modes), sum(len(job[2]) for job in todo)

    def prepare(job):
        mode, cot, batch = job
        turns = [[("human", prompt_of(item, cfg, cot))] for item in batch]
        shown = [pictures[item["id"]][mode == "blind"] for item in batch]
        return job, turns, shown, [model.encode(t, p) for t, p in zip(turns, shown)]

    with (open(progress, "a", encoding="utf-8") as log, ThreadPoolExecutor(1) as ahead,
          tqdm(total=total, initial=total - left, unit="question", desc=cfg.name, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar):
        waiting = ahead.submit(prepare, todo[0]) if todo else None
        for k in range(len(todo)):
            (mode, cot, batch), turns, shown, encoded = waiting.result()
            waiting = ahead.submit(prepare, todo[k + 1]) if k + 1 < len(todo) else None      # pictures of the next batch, while this one is answered
            for item, row in zip(batch, answer(model, bench, batch, turns, shown, encoded, cot, cfg)):
                done[mode, item["id"]] = row = {"mode": mode, "id": item["id"]} | row
                log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            bar.update(len(batch))
    return {mode: {item["id"]: row for item in items if not (row := done[mode, item["id"]]).get("too_long")} for mode in modes}


def answer(model, bench, batch, turns, shown, encoded, cot, cfg):
    """One batch -> rows {"text", ...} in its order. A question near the model's length is asked alone: nobody's answer depends on its neighbours."""
    if cfg.likelihood and "candidates" in batch[0] and not cot:
        return [{"text": text, "p": p} for text, p in model.likeliest(encoded, batch[0]["candidates"])]
    want = cfg.max_new_tokens or (1024 if cot else bench.longest)
    want = min(want, model.longest // 2)
    rows = [None] * len(batch)

    def generate(which, encoded):
        fit = [k for k in which if len(encoded[k][0]) + want <= model.longest]
        for group in [fit] * bool(fit) + [[k] for k in which if k not in fit]:
            room = min(want, model.longest - len(encoded[group[0]][0])) if group is not fit else want
            if room < 1:
                rows[group[0]] = {"text": "", "too_long": len(encoded[group[0]][0])}
                continue
            for k, (text, whole) in zip(group, model.generate([encoded[k] for k in group], room)):
                rows[k] = {"text": text} | ({} if whole else {"cut_off": True})

    generate(list(range(len(batch))), encoded)
    again = [k for k, item in enumerate(batch) if item.get("then") and rows[k]["text"]]      # M3CoT asks a second time; an empty turn is no turn
    if again:
        first = {k: rows[k]["text"] for k in again}
        second = {k: model.encode(turns[k] + [("gpt", first[k]), ("human", batch[k]["then"])], shown[k]) for k in again}
        generate(again, second)
        for k in again:
            rows[k]["first"] = first[k]
    return rows


def prompt_of(item, cfg, cot=None):
    """The text after the picture. `cot`: the direct instruction makes way for InternVL's frame, or for the benchmark's own."""
    if cfg.cot if cot is None else cot:
        return item["cot"] if "cot" in item else COT + item["question"]
    return item["question"] + ("\n" + item["suffix"] if item["suffix"] else "")


def pictures_of(items, cfg):
    """{id: (its pictures, the pictures of the blind baseline: none, or another record's)}; what is missing is said before the first answer."""
    root = Path(os.path.abspath(cfg.image_root or folder(cfg.data)))
    if not root.is_dir():
        raise UserError(f"--image-root {cfg.image_root}: no such folder")
    found = {}
    for item in items:
        names = item["image"] if isinstance(item["image"], list) else [] if item["image"] is None else [item["image"]]
        found[item["id"]] = [name if isinstance(name, bytes) else find_picture(root, name, item["id"]) for name in names]
    some = list(dict.fromkeys(p[0] for p in found.values() if p))
    other = {p: some[(i + max(1, len(some) // 2)) % len(some)] for i, p in enumerate(some)} if cfg.blind == "other" else {}
    return {id: (paths, [other.get(p, p) for p in paths] if cfg.blind == "other" else []) for id, paths in found.items()}


def find_picture(root, name, id):
    """The official place under the image root, or the bare name in it, or in a folder images/; as .jpg or .png, for SEED-Bench's names have no ending."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise UserError(f"record {id}: picture {name!r} lies outside --image-root {root}; move it there")
    places = [path, path.parent / "images" / path.name, root / path.name, root / "images" / path.name]
    for place in places + [other for p in places for end in (".jpg", ".png") for other in (p.with_name(p.name + end), p.with_suffix(end))]:
        if place.is_file():
            return place
    raise UserError(f"{path}: no such picture (record {id}); check the path and --image-root")


def open_picture(source):
    return open_image(io.BytesIO(source) if isinstance(source, bytes) else source)


def stamp(directory):
    """Size and time of the weights: --resume must not mix two models under one name."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(Path(directory).glob("*.safetensors"))]


def some_of(items, limit):
    """--limit: a random sample, the same every time, in file order. Units (MME's pictures, MMBench's circular groups) stay whole, so a
    few more may come. Not the first ones, which would be of one kind, nor every k-th: POPE's answers alternate."""
    units = list(dict.fromkeys(item.get("unit", item["id"]) for item in items))
    if not limit or limit >= len(items):
        return items
    n = max(1, round(limit * len(units) / len(items)))
    kept = {units[i] for i in np.random.default_rng(21).permutation(len(units))[:n]}
    return [item for item in items if item.get("unit", item["id"]) in kept]


# ---- files -------------------------------------------------------------------------------------------------------------


def read_any(path):
    """JSON, JSON lines, TSV or XLSX -> (a list or dict, "record" or "line"), told apart by content."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:4] == b"PK\x03\x04":
            return read_xlsx(path), "row"
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if path.suffix == ".tsv":
        return read_tsv(text, path), "row"
    if not text.strip():
        raise UserError(f"{path}: is empty; get the file again")
    try:
        found = json.loads(text)
        alone = isinstance(found, dict) and (path.suffix == ".jsonl" or {"question_id", "questionId", "id", "pid"} & found.keys())
        return ([found], "line") if alone else (found, "record")             # one record per line, and only one line
    except (ValueError, RecursionError) as error:
        whole = error
    rows, more = [], [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, line in more:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if len(rows) == 0 or len(more) == 1 or text.lstrip()[:1] == "[":               # it never was one record per line
                raise UserError(f"{path}: not valid JSON ({whole}); get the file again") from None
            raise UserError(f"{path}, line {i}: not valid JSON ({error}); expected one record per line") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not valid JSON ({whole}); get the file again")
    return rows, "line"


def read_tsv(text, path):
    csv.field_size_limit(2**31 - 1)                                         # a cell holds a whole base64 picture
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    except csv.Error as error:
        raise UserError(f"{path}: not a table with tabs ({error}); get the file again") from None
    if len(rows) < 2:
        raise UserError(f"{path}: holds no row; get the file again")
    head, *rows = rows
    for i, row in enumerate(rows, 1):                                       # row 1 is the one below the names
        if row and len(row) != len(head):
            raise UserError(f"{path}, row {i}: {len(row)} cells under {len(head)} column names; get the file again")
    return [dict(zip(head, row)) for row in rows if row]


def read_xlsx(path):
    """The first sheet's rows as dicts by the names in its first row: a zip of XML, cells either inline or in a table of strings."""
    space = {"": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    words = lambda node: "".join(t.text or "" for t in node.iter(f"{{{space['']}}}t"))
    try:
        with zipfile.ZipFile(path) as box:
            shared = [words(si) for si in ElementTree.fromstring(box.read("xl/sharedStrings.xml")).findall("si", space)] if "xl/sharedStrings.xml" in box.namelist() else []
            rows = []
            for row in ElementTree.fromstring(box.read("xl/worksheets/sheet1.xml")).findall("sheetData/row", space):
                cells = {}
                for cell in row.findall("c", space):
                    value = words(cell) if cell.get("t") == "inlineStr" else cell.findtext("v", "", space)
                    cells[re.sub(r"\d", "", cell.get("r", ""))] = shared[int(value)] if cell.get("t") == "s" else value
                rows.append(cells)
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not an .xlsx that can be read ({error}); save it again") from None
    head, *rows = rows or [{}]
    return [{name: row.get(column, "") for column, name in head.items()} for row in rows]


def write_xlsx(rows):
    """[{column: text}] -> the bytes of a workbook with one sheet; the same bytes for the same rows."""
    names = list(rows[0])
    column = lambda i: (LETTERS[i // 26 - 1] if i >= 26 else "") + LETTERS[i % 26]
    legal = lambda text: escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f]", "", str(text)))
    sheet = "".join(f'<row r="{r}">' + "".join(f'<c r="{column(i)}{r}"><v>{row[n]}</v></c>' if n == "index" and r > 1 else
                    f'<c r="{column(i)}{r}" t="inlineStr"><is><t xml:space="preserve">{legal(row[n])}</t></is></c>' for i, n in enumerate(names)) + "</row>"
                    for r, row in enumerate([dict(zip(names, names)), *rows], 1))
    office, package = "http://schemas.openxmlformats.org/officeDocument/2006", "http://schemas.openxmlformats.org/package/2006"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
                               f'<Default Extension="xml" ContentType="application/xml"/><Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
                               f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" Type="{office}/relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{office}/relationships"><sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" Type="{office}/relationships/worksheet" '
                                      'Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f"<worksheet {main}><sheetData>{sheet}</sheetData></worksheet>"}
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
    for encoding in ("ASCII", "latin1"):                                    # written by Python 2, whose strings were bytes
        try:
            with open(path, "rb") as file:
                return PlainUnpickler(file, encoding=encoding).load()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:                                          # a broken pickle makes the unpickler raise anything
            raise UserError(f"{path}: not a pickle of plain containers ({error}); get REFER's refs file again") from None


def entries(path, key=None):
    """(where, key, row) of each record of a file; `key`: the list lies under this name of a JSON object."""
    found, word = read_any(path)
    if key is not None:
        if not isinstance(found, dict) or not isinstance(found.get(key), (list, dict)):
            raise UserError(f'{path}: no list "{key}" in it; it does not look like the official file')
        found = found[key]
    if not isinstance(found, (list, dict)):
        raise UserError(f"{path}: a {type(found).__name__}, neither a list nor an object of records")
    pairs = found.items() if isinstance(found, dict) else enumerate(found, word != "record")
    for k, row in pairs:
        where = f"{path}, {word} {k!r}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: {str(row)[:60]!r} is not a record")
        yield where, k, row


def need(where, row, **kinds):
    """Values of the named fields, each of its type; what is missing or of another type is an error that names file and record."""
    values = []
    for name, kind in kinds.items():
        name = name.replace("__", "-")
        kinds_ = kind if isinstance(kind, tuple) else (kind,)
        if name not in row and type(None) not in kinds_:
            raise UserError(f'{where}: no field "{name}"')
        value = row.get(name)
        if not isinstance(value, kinds_) or isinstance(value, bool) and bool not in kinds_:
            raise UserError(f'{where}: "{name}" is {str(value)[:60]!r}; expected {" or ".join(k.__name__ for k in kinds_)}')
        values.append(value)
    return values[0] if len(values) == 1 else values


OPTIONAL = (str, type(None))


def folder(data):
    return Path(data).parent if Path(data).is_file() else Path(data)


def find(data, *names, optional=False):
    """The first of these official names in the data folder or two folders down; where --data is a file, it is the one that is meant."""
    if Path(data).is_file() and not optional:
        return Path(data)
    for name in names:
        for pattern in (name, f"*/{name}", f"*/*/{name}"):
            if found := sorted(folder(data).glob(pattern.replace("[", "[[]"))):
                return found[0]
    if optional:
        return None
    raise UserError(f"{data}: no {' or '.join(names)} in it; --data is the folder with the official files, under their official names")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def dump(value):
    return json.dumps(value, ensure_ascii=False)


# ---- answers that somebody else produced ---------------------------------------------------------------------------------

TEXT_KEYS = ("text", "prediction", "response", "answer", "extraction", "content", "output")
ID_KEYS = ("question_id", "questionId", "index", "pid", "id", "sent_id", "image")


def said(row):
    """The answer in a result row of any benchmark's own format."""
    if row.get("messages"):
        return str(row["messages"][-1])
    return str(next((row[k] for k in TEXT_KEYS if row.get(k) is not None), ""))


def match_up(bench, items, cfg):
    """--predictions -> {item id: row}, joined by id and never by position. Unknown and repeated ids are errors."""
    found, index = {}, {}
    for item in items:
        for key in [str(item["id"]), *item.get("keys", [])]:
            index.setdefault(key, item["id"])
    for where, row in (bench.predictions or predicted)(cfg, items):
        ids = [str(row[k]) for k in ID_KEYS if isinstance(row.get(k), (str, int, float))]
        asked = [str(row[k]).split("\n")[0].strip().lower() for k in ("question", "prompt", "caption", "sent", "sentence") if isinstance(row.get(k), str)]
        id = next((index[key] for key in [row.get("key"), *ids, *((i, q) for i in ids for q in asked)] if key in index), None)
        if not ids and "key" not in row:
            raise UserError(f"{where}: no id in it; one of {', '.join(ID_KEYS)} is needed")
        if id is None:
            raise UserError(f"{where}: answers {ids[0] if ids else row['key']!r}, which is no question of {cfg.data}")
        if not ({"messages", "tuple", "score"} & row.keys()) and not any(isinstance(row.get(k), (str, int, float)) for k in TEXT_KEYS):
            raise UserError(f"{where}: no answer in it; one of {', '.join(TEXT_KEYS)} is needed, as text")
        if id in found and cfg.name != "m3cot":                             # there the first record of an id counts
            raise UserError(f"{where}: a second answer to {id!r}; each question is answered once")
        found.setdefault(id, row)
    lost = [item["id"] for item in items if item["id"] not in found]
    if lost and bench.all_needed:
        raise UserError(f"{cfg.predictions}: no answer to {lost[0]!r} ({len(lost)} of {len(items)} are missing); the official scorer refuses such a file")
    return found


def predicted(cfg, items):
    """(where, row) of a file in any of the usual forms; {id: text} and {id: {...}} become rows too."""
    path = Path(cfg.predictions)
    if not path.is_file():
        raise UserError(f"--predictions {path}: no such file")
    found, word = read_any(path)
    if isinstance(found, dict) and isinstance(found.get("results"), dict):
        found = found["results"]
    if not isinstance(found, (list, dict)) or not found:
        raise UserError(f"{path}: holds no answers; expected a list or an object of them")
    for k, row in found.items() if isinstance(found, dict) else enumerate(found, word != "record"):
        where = f"{path}, {word} {k!r}"
        if isinstance(found, dict):
            row = {"id": k} | (row if isinstance(row, dict) else {"text": row})
        if not isinstance(row, dict):
            raise UserError(f"{where}: {str(row)[:60]!r} is not a record")
        yield where, row


# ---- text to label -------------------------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'                                      # in the official order; not ' : % $ # & * ~ ^ |
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = dict(pair.split(":") for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't
hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll
hows:how's Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't
ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll
somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've there'dve:there'd've
therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't
wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've""".split())
# VizWiz's own copy of the scorer has backticks in all but these; so "dont" there never meets an annotator's "don't"
BACKTICKS = {k: v if k in "aint arent cant couldve couldnt weve wheres whove".split() else v.replace("'", "`") for k, v in CONTRACTIONS.items()}


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text, contractions=CONTRACTIONS):
    """The VQA scorer's processPunctuation and processDigitArticle, oddities included."""
    out = text
    for p in PUNCTUATION:                                                   # always tested on the untouched text
        out = out.replace(p, "" if p + " " in text or " " + p in text or re.search(r"\d,\d", text) else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)                            # 32: the value of re.UNICODE, which landed in `count`
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ("a", "an", "the"))


def evalai(text):
    """TextVQA's normaliser (EvalAI, M4C), which LLaVA also applies to what it uploads for VQAv2 and VizWiz."""
    return normalise(one_line(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()))


def agreement(said, answers):
    """Mean over the annotators of min(1, matches among the others / 3): 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, more matches of ten."""
    n = sum(a == said for a in answers)
    return mean(min(1, (n - (a == said)) / 3) for a in answers)


def final_answer(text):
    """InternVL's extraction from a chain of thought: the first trigger, the rest of its line; without one the whole text."""
    found = re.search(r"(Final answer:|Answer:)\s*(.*)", text, re.IGNORECASE)
    return found[2].strip() if found else text


def pope_label(text):
    """Before the first period, without commas, one of the words No, no, not -> no; all else, nothing too -> yes."""
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def mme_label(text):
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def scienceqa_letter(text):
    """LLaVA's reader: the letter alone, `B. ...`, or exactly one `The answer is B` with one more character behind it."""
    if text in list("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def option_letter(text, n):
    """AI2D: the letter alone, or `B.`, `(B)`, `B. leaf`, `B) leaf`, `B: leaf` -> letter or None."""
    found = re.match(r"\(?([A-Z])(?:$|[.):](?:\s|$))", text.strip())
    return found[1] if found and found[1] in LETTERS[:n] else None


REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.", "I'm sorry, but without the image provided", "Cannot determine the answer")


def mmbench_letter(text, options):
    """VLMEvalKit's exact matching, {letter: option text} -> letter, Z (says that none fits), or None (a judge would be asked)."""
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    there = [letter for letter in options if letter in words]
    if len(there) == 1 and words.index(there[0]) > len(words) - 5:
        return there[0]
    if not there and "Z" in words:
        return "Z"
    if (found := re.search(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text, re.IGNORECASE)) and found[1].upper() in options:
        return found[1].upper()
    low = text.lower()
    if len(low) <= 2 * sum(len(option) for option in options.values()):
        there = [letter for letter, option in options.items() if option.lower() in low]
        return there[0] if len(there) == 1 else None
    return None


def m3cot_letter(text, choices):
    """The official judge of the last reply. Late matches win; even the article "a" may become option A."""
    if "[Answer]" in text:
        text = text.rsplit("[Answer]", 1)[1].split("[Rationale]")[0].split("[Context]")[0]
    letters = LETTERS[: len(choices)]
    if found := re.findall(r"\(([A-Za-z])\)", text):
        return found[-1].upper()
    if there := [letter for letter, choice in zip(letters, choices) if choice.lower() in text.lower()]:
        return there[-1]
    words = re.sub(r"[\n.,!?]", " ", text).split(" ")
    for case in letters, letters.lower():
        if there := [letter for letter in case if letter in words]:
            return there[-1].upper()
    return None


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def mathvista_normal(extraction, item):
    """The official normalisation: a letter becomes its option's text, other text the nearest option; numbers are rounded as asked. None: failed."""
    choices, precision = item["choices"], item["precision"]
    if item["question_type"] == "multi_choice":
        text = str(extraction).strip()
        if found := re.findall(r"\(([a-zA-Z])\)", text):
            text = found[0].upper()
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return choices[LETTERS.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice))
    try:
        return {"integer": lambda: str(int(float(extraction))), "float": lambda: str(round(float(extraction), int(precision))), "list": lambda: str(extraction)}[
            item["answer_type"]]()
    except (ValueError, TypeError, OverflowError, KeyError):
        return None


def mathvista_extract(text, item):
    """What the official pipeline asks GPT-4 for, by rule: its own short cuts, then the last option letter or the last number. -> text, was a rule of ours needed"""
    kind, text = item["answer_type"], text.strip()
    if not text or item["question_type"] == "multi_choice" and text in item["choices"]:
        return text, False
    try:
        return {"integer": lambda: str(int(text)), "float": lambda: str(float(text))}[kind](), False
    except (KeyError, ValueError):
        pass
    if found := re.search(r'The answer is "(.*)"\.', text):
        return found[1], False
    if item["question_type"] == "multi_choice":
        letters = LETTERS[: len(item["choices"])]
        found = re.findall(rf"\(([{letters}{letters.lower()}])\)", text) or re.findall(rf"\b([{letters}])\b", text)
        return (f"({found[-1]})" if found else text), True
    found = re.findall(r"\[[^\[\]]*\]", text) if kind == "list" else re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return (found[-1] if found else ""), True


WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty").split()


def counted(text):
    """TallyQA: a letter of the sixteen options (A. 0 ... P. 15), else the first integer or number word."""
    if re.fullmatch("[A-P]", text):
        return LETTERS.index(text)
    found = re.search(rf"\d+|\b(?:{'|'.join(WORDS)})\b", text, re.IGNORECASE)
    return None if not found else int(found[0]) if found[0].isdigit() else WORDS.index(found[0].lower())


def strict_box(text):
    """Convention N: the whole text is a Python list of four numbers in [0, 1], x1 < x2, y1 < y2; anything else is None."""
    try:
        box = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) and 0 <= x <= 1 for x in box):
        return None
    return [float(x) for x in box] if box[0] < box[2] and box[1] < box[3] else None


def tolerant_box(text):
    """The first four numbers in brackets, thousandths or fractions."""
    found = re.search(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d*\.?\d+)"] * 4) + r"\s*[\])]", text)
    box = [float(x) for x in found.groups()] if found else None
    return [x / 1000 for x in box] if box and sum(box) >= 4 else box


def internvl_box(text, w, h):
    """Convention K: -> pixel box in float32; (0, 0, 0, 0) where nothing was found."""
    found = re.search(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*", text)
    try:
        box = np.array([float(x) for x in found.groups()], dtype=np.float32)
    except (AttributeError, ValueError):
        return None
    return (box / np.float32(1000) if box.sum() >= 4 else box) * np.array([w, h, w, h], dtype=np.float32)


def iou32(a, b):
    """IoU in float32 as torchvision's, without repair of reversed corners."""
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    side = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = side[0] * side[1]
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return float(both / union) if union else 0.0


# ---- the benchmarks: read, judge, total, submit ----------------------------------------------------------------------------


def options(choices):
    return "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))


def right(label, truth):
    return {"parsed": label, "score": float(label is not None and label == truth)}


def by(records, name, of="score"):
    """{group: {"correct", "total"}} of the records' metadata; a record may be in several groups."""
    groups = defaultdict(list)
    for r in records:
        for group in r["meta"][name] if isinstance(r["meta"].get(name), list) else [r["meta"].get(name)]:
            groups[str(group)].append(r[of])
    return {group: {"correct": int(sum(x)), "total": len(x)} for group, x in groups.items()}


def accuracies(records, name):
    return {group: 100 * x["correct"] / x["total"] for group, x in by(records, name).items()}


def with_meta(records, items):
    """Each scored record beside what its item says of groups (kept out of results.json)."""
    return [r | {"meta": item} for r, item in zip(records, items) if r["score"] is not None]


def total_mean(records, items):
    return {"accuracy": mean(r["score"] for r in records if r["score"] is not None)}, plain(records), percent


def answers_as(name, id_key="question_id", text_key="answer", clean=lambda text: text):
    return lambda items, records, cfg: {name: dump([{id_key: r["id"], text_key: clean(r["answer"] or "")} for r in records])}


def nothing(items, records, cfg):
    return {}                                                               # answers.jsonl is all there is to hand in


def read_vqav2(cfg):
    stem = {"val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
    split = cfg.split or ("val" if find(cfg.data, "v2_OpenEnded_mscoco_val2014_questions.json", optional=True) else "test-dev")
    one_of("--split", split, list(stem))
    path = find(cfg.data, f"v2_OpenEnded_mscoco_{stem[split]}_questions.json")
    labels, items = {}, []
    if split == "val":
        where_from = find(folder(cfg.data), "v2_mscoco_val2014_annotations.json")
        for where, _, row in entries(where_from, "annotations"):
            id, answers, _ = need(where, row, question_id=int, answers=list, answer_type=str)
            labels[id] = row | {"answers": [need(f"{where}, answer {k}", a, answer=str) if isinstance(a, dict) else need(where, {}, answer=str) for k, a in enumerate(answers)]}
    for where, _, row in entries(path, "questions"):
        id, image, question = need(where, row, question_id=int, image_id=int, question=str)
        if split == "val" and id not in labels:
            raise UserError(f"{where}: no annotation of question {id} in {where_from}")
        kind, label = ("val2014" if split == "val" else "test2015"), labels.get(id, {})
        items.append({"id": id, "image": f"{kind}/COCO_{kind}_{image:012d}.jpg", "question": question, "suffix": SHORT, "truth": label.get("answers"),
                      "answer_type": label.get("answer_type"), "question_type": label.get("question_type")})
    return items


def vqa_judge(style):
    def judge(item, text, row, cfg):
        answers, text = item["truth"] or [], one_line(text)
        if style == "official":
            answers = [one_line(a) for a in answers]
            if len(set(answers)) > 1:                                       # ten identical answers are compared verbatim
                text, answers = normalise(text), [normalise(a) for a in answers]
        elif style == "evalai":
            text, answers = evalai(text), [evalai(a) for a in answers]
        else:
            text = normalise(text, BACKTICKS)
        return {"parsed": text, "score": agreement(text, answers) if answers else 0.0}
    return judge


def total_vqav2(records, items):
    scored = with_meta(records, items)
    part = lambda name: {k: round(100 * mean(r["score"] for r in scored if r["meta"][name] == k), 2) for k in sorted({str(r["meta"][name]) for r in scored})}
    overall = round(100 * mean(r["score"] for r in scored), 2) if scored else None
    return {"overall": overall, "perAnswerType": part("answer_type"), "perQuestionType": part("question_type")}, plain(records), percent


def submit_vqav2(items, records, cfg):
    """All of test2015 must be in the file; what was not asked gets an empty answer."""
    answers = {r["id"]: evalai(r["answer"] or "") for r in records}
    whole = items[0]["truth"] is None and find(folder(cfg.data), "v2_OpenEnded_mscoco_test2015_questions.json", optional=True)
    ids = [row["question_id"] for _, _, row in entries(whole, "questions")] if whole else answers
    return {"vqav2_answers.json": dump([{"question_id": i, "answer": answers.get(i, "")} for i in ids])}


def read_gqa(cfg):
    items = []
    for where, id, row in entries(find(cfg.data, "testdev_balanced_questions.json", "testdev_balanced_questions_*.json")):
        question, image, truth, balanced, types, semantic, groups = need(where, row, question=str, imageId=str, answer=OPTIONAL, isBalanced=bool, types=dict, semantic=list, groups=dict)
        kinds = need(f"{where}, types", types, structural=str, semantic=str)
        steps = [f"{op.get('operation')}: {op.get('argument')}" for op in semantic if isinstance(op, dict)]
        items.append({"id": str(id), "image": f"images/{image}.jpg", "question": question, "suffix": SHORT, "truth": truth, "balanced": balanced,
                      "structural": kinds[0], "semantic": kinds[1], "global": groups.get("global"), "words": len(question.split()),
                      "steps": sum(not any(x in step for x in ("exist", "query: name", "choose name")) for step in steps)})
    return items


def gqa_judge(item, text, row, cfg):
    """A scorer file's `prediction` is compared as it is; a model's text loses its trailing periods and capitals first, as LLaVA's did."""
    return right(text if "prediction" in row else text.rstrip(".").lower(), item["truth"])


def total_gqa(records, items):
    for r, item in zip(records, items):
        r["balanced"] = item["balanced"]
    scored = [r for r in with_meta(records, items) if r["meta"]["balanced"]]
    two = lambda rs: round(100 * mean([r["score"] for r in rs]), 2) if rs else None
    def part(name, order=str):
        return {str(k): {"score": two(rs), "count": len(rs)} for k in sorted({r["meta"][name] for r in scored}, key=order)
                for rs in [[r for r in scored if r["meta"][name] == k]]}
    gold, said = defaultdict(Counter), defaultdict(Counter)                 # per global group: how often each answer
    for r in scored:
        if r["meta"]["global"] is not None:
            gold[r["meta"]["global"]][r["truth"]] += 1
            said[r["meta"]["global"]][r["parsed"]] += 1
    chi = {g: sum((said[g][a] - n) ** 2 / n for a, n in gold[g].items()) for g in gold}
    n_gold = sum(sum(c.values()) for c in gold.values())
    metrics = {"n": len(scored), "num_questions": len(items), "num_balanced": len(scored), "correct_balanced": int(sum(r["score"] for r in scored)), "accuracy": two(scored),
               "binary": two([r for r in scored if r["meta"]["structural"] != "query"]), "open": two([r for r in scored if r["meta"]["structural"] == "query"]),
               "distribution": round(sum(chi[g] * sum(gold[g].values()) for g in gold) / n_gold / 100, 2) if n_gold else None,
               "accuracy_per_structural_type": part("structural"), "accuracy_per_semantic_type": part("semantic"),
               "accuracy_per_steps_number": part("steps", int), "accuracy_per_words_number": part("words", int)}
    return metrics, plain(scored), percent


def submit_gqa(items, records, cfg):
    return {"testdev_balanced_predictions.json": dump([{"questionId": r["id"], "prediction": (r["answer"] or "").rstrip(".").lower()} for r in records])}


def read_vizwiz(cfg):
    split = cfg.split or ("val" if find(cfg.data, "val.json", optional=True) or not find(cfg.data, "test.json", optional=True) else "test")
    items = []
    for where, _, row in entries(find(cfg.data, f"{split}.json")):
        image, question, answers = need(where, row, image=str, question=str, answers=(list, type(None)))
        truth = [need(f"{where}, answers", a, answer=str) for a in answers] if answers else None
        items.append({"id": image, "image": f"{split}/{image}", "question": question, "suffix": f"{INSUFFICIENT}\n{SHORT}", "truth": truth, "answerable": row.get("answerable")})
    return items


def total_vizwiz(records, items):
    scored = with_meta(records, items)
    part = lambda rs: round(100 * mean([r["score"] for r in rs]), 2) if rs else None
    truth, said = ([f(r) for r in scored] for f in (lambda r: r["meta"]["answerable"] == 0, lambda r: r["parsed"] == "unanswerable"))
    tp, n = sum(t and s for t, s in zip(truth, said)), len(scored)
    precision, recall, base = tp / max(sum(said), 1), tp / max(sum(truth), 1), sum(truth) / max(n, 1)
    average = recall * precision + (1 - recall) * base                      # two thresholds: said so, or everything
    metrics = {"overall": part(scored), "unanswerability": {"average_precision": round(100 * average, 2), "f1_score": round(200 * tp / max(sum(said) + sum(truth), 1), 2)},
               "answerable": part([r for r in scored if r["meta"]["answerable"] == 1]), "unanswerable": part([r for r in scored if r["meta"]["answerable"] == 0]),
               "per_image": {r["id"]: round(100 * r["score"], 2) for r in scored}, "num": n}
    return metrics if scored else {"num": 0}, plain(records), percent


def read_textvqa(ocr):
    def read(cfg):
        split = cfg.split or "val"
        path = find(cfg.data, f"TextVQA_0.5.1_{split}.json")
        tokens, items = {}, []
        if ocr:
            for where, _, row in entries(find(folder(cfg.data), f"TextVQA_Rosetta_OCR_v0.2_{split}.json"), "data"):
                image, words = need(where, row, image_id=str, ocr_tokens=list)
                tokens[image] = ", ".join(map(str, words))
        for where, _, row in entries(path, "data"):
            id, image, question, answers = need(where, row, question_id=int, image_id=str, question=str, answers=(list, type(None)))
            if answers and not all(isinstance(a, str) for a in answers):
                raise UserError(f'{where}: "answers" holds something that is no text')
            asked = question[:1].upper() + question[1:]
            if ocr and image not in tokens:
                raise UserError(f"{where}: no OCR tokens of picture {image} in TextVQA_Rosetta_OCR_v0.2_{split}.json")
            items.append({"id": id, "image": f"{'test' if split == 'test' else 'train'}_images/{image}.jpg", "truth": answers or None, "suffix": SHORT,
                          "question": asked + (f"\nReference OCR token: {tokens[image]}" if ocr else ""), "keys": [(image, question.strip().lower())]})
        return items
    return read


def total_textvqa(records, items):
    scored = [r for r in records if r["score"] is not None]
    accuracy = mean(r["score"] for r in scored)
    return {"accuracy": accuracy, "accuracy_percent_2dp": None if accuracy is None else round(100 * accuracy, 2), "num": len(scored),
            "per_question": {str(r["id"]): r["score"] for r in scored}}, plain(records), percent


POPE_SPLITS = ("random", "popular", "adversarial")
POPE_OFFSET = {"random": 10_000_000, "popular": 20_000_000, "adversarial": 0}    # of the ids in LLaVA's merged question file


def read_pope(cfg):
    splits = [cfg.split] if cfg.split else POPE_SPLITS
    for split in splits:
        one_of("--split", split, POPE_SPLITS)
    single = Path(cfg.data).is_file()
    named = lambda split: [f"{source}_pope_{split}.json" for source in ("coco", "gqa", "aokvqa", "gqa_pope_seem", "aokvqa_pope_seem")]
    paths = {split: find(cfg.data, *named(split), optional=True) for split in splits}
    if single:
        paths = {next((s for s in POPE_SPLITS if s in Path(cfg.data).name), "random"): Path(cfg.data)}
    if not any(paths.values()):
        find(cfg.data, *named(splits[0]))
    items = []
    for split, path in paths.items():
        for where, _, row in entries(path) if path else ():
            id, image, text, label = need(where, row, question_id=int, image=str, text=str, label=str)
            if label not in ("yes", "no"):
                raise UserError(f'{where}: "label" is {label!r}; it must be yes or no')
            items.append({"id": f"{split}/{id}", "image": f"val2014/{image}" if image.startswith("COCO_val2014") else image, "question": text, "suffix": SHORT, "truth": label,
                          "split": split, "question_id": id, "candidates": ("Yes", "No")})
    return items


def pope_predictions(cfg, items):
    """POPE's own files have one split each and number from 1 in each; LLaVA's merged file has offsets. A file is cut where an id returns,
    and each part belongs to the split that asks just these questions."""
    path = Path(cfg.predictions)
    splits = list(dict.fromkeys(item["split"] for item in items))
    files = [path] if not path.is_dir() else [f for split in splits for f in sorted(path.glob(f"*{split}*.json*"))]
    if not files:
        raise UserError(f"--predictions {path}: no *random*, *popular* or *adversarial* .json in it")
    asked = {split: {item["question_id"]: item["question"].strip().lower() for item in items if item["split"] == split} for split in splits}
    for file in files:
        rows = list(predicted(argparse.Namespace(predictions=file), items))
        ids = [row.get("question_id") for _, row in rows]
        for (where, row), id in zip(rows, ids):
            if isinstance(id, str) and re.fullmatch(r"\w+/\d+", id):        # our own answers.jsonl
                row["key"] = id
            elif not isinstance(id, int):
                raise UserError(f'{where}: "question_id" is {id!r}; it must be a number')
        if any("key" in row for _, row in rows):
            yield from rows
            continue
        if max(ids) >= 10_000_000:
            for (where, row), id in zip(rows, ids):
                split = next((s for s in splits if id // 10_000_000 * 10_000_000 == POPE_OFFSET[s]), "?")
                yield where, row | {"key": f"{split}/{id % 10_000_000}"}
            continue
        parts, seen = [[]], set()
        for where, row in rows:
            if row["question_id"] in seen:
                parts.append([])
                seen = set()
            seen.add(row["question_id"])
            parts[-1].append((where, row))
        for part in parts:
            text = lambda row: str(row.get("question", row.get("prompt", ""))).split("\n")[0].strip().lower()
            fits = [s for s in splits if all(row["question_id"] in asked[s] and text(row) in ("", asked[s][row["question_id"]]) for _, row in part)]
            fits = [s for s in fits if s in file.name] or fits
            if len(fits) != 1:
                lost = next((where for where, row in part if not any(row["question_id"] in asked[s] for s in splits)), part[0][0])
                raise UserError(f"{lost}: " + (f"could be of {' or '.join(fits)}; give --split, or name the split in the file's name" if fits else
                                               f"its questions are not those of one split in {cfg.data}; check that both are the same version of POPE"))
            for where, row in part:
                yield where, row | {"key": f"{fits[0]}/{row['question_id']}"}


def pope_figures(tp, fp, tn, fn):
    n, ratio = tp + fp + tn + fn, lambda a, b: a / b if b else 0.0
    return {"accuracy": ratio(tp + tn, n), "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn), "f1": ratio(2 * tp, 2 * tp + fp + fn), "yes_ratio": ratio(tp + fp, n)}


def total_pope(records, items):
    """The headline is the mean F1 of the splits; a split without a single answer is left out."""
    splits = [s for s in POPE_SPLITS if any(item["split"] == s and "missing" not in r for r, item in zip(records, items))]
    tally, metrics = [], {}
    for r, item in zip(records, items):
        cell = (0 if r["parsed"] == "yes" else 3) if r["truth"] == "yes" else (1 if r["parsed"] != "no" else 2)      # TP FP TN FN; missing is wrong
        if item["split"] in splits:
            tally.append([float(4 * splits.index(item["split"]) + cell == k) for k in range(4 * len(splits))])
    sums = np.sum(tally, axis=0) if tally else []
    for k, split in enumerate(splits):
        cells = [int(x) for x in sums[4 * k : 4 * k + 4]]
        metrics[split] = dict(zip(("TP", "FP", "TN", "FN"), cells)) | pope_figures(*cells) | {
            "num": sum(cells), "pred": [int(r["parsed"] == "yes") for r, item in zip(records, items) if item["split"] == split]}
    if splits:
        metrics["mean_over_splits"] = {name: mean(metrics[s][name] for s in splits) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
    headline = lambda sums: 100 * mean(pope_figures(*sums[4 * k : 4 * k + 4])["f1"] for k in range(len(splits)))
    return {"n": len(tally), "splits": splits} | metrics, tally, headline


def submit_pope(items, records, cfg):
    return {f"pope_{split}.json": lines({"question": item["question"], "answer": r["answer"] or "", "question_id": item["question_id"]}
                                        for item, r in zip(items, records) if item["split"] == split) for split in dict.fromkeys(item["split"] for item in items)}


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def bare(question):
    """MME's question without the sentence for which LLaVA puts its own format prompt."""
    return re.sub(r"\s*Please answer yes or no\.\s*$", "", question)


def tab_lines(path):
    try:
        return [(f"{path}, line {i}", line.split("\t")) for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_mme(cfg):
    """The release's folders (one text per picture), or the tool's Your_Results/ (one text per subtask)."""
    roots = [root / name for root in (folder(cfg.data), folder(cfg.data) / "MME_Benchmark_release_version") for name in (".", "Your_Results", "MME_Benchmark_release_version")]
    root = next((r for r in roots if any((r / f"{t}.txt").is_file() or (r / t).is_dir() for t in PERCEPTION + COGNITION)), None)
    if root is None:
        raise UserError(f"{cfg.data}: neither Your_Results/<subtask>.txt nor MME_Benchmark_release_version/<subtask>/ in it; subtasks are {', '.join(PERCEPTION + COGNITION)}")
    items, seen = [], Counter()
    for task in PERCEPTION + COGNITION:
        if (root / f"{task}.txt").is_file():
            rows = [(where, cells) for where, cells in tab_lines(root / f"{task}.txt")]
        else:
            texts = sorted([*(root / task).glob("*.txt"), *(root / task / "questions_answers_YN").glob("*.txt")])
            picture = lambda text: next((f"{text.stem}{end}" for end in (".jpg", ".png", ".jpeg") for home in (text.parent, root / task / "images") if (home / f"{text.stem}{end}").is_file()),
                                        f"{text.stem}.jpg")
            rows = [(where, [picture(text), *cells]) for text in texts for where, cells in tab_lines(text)]
        for where, cells in rows:
            if len(cells) < 3 or cells[2].strip().lower() not in ("yes", "no"):
                raise UserError(f"{where}: expected picture, question and Yes or No between tabs, found {cells}")
            image, question, label = cells[0].strip(), cells[1], cells[2].strip().lower()
            unit = f"{task}/{image}"
            seen[unit] += 1
            items.append({"id": f"{unit}#{seen[unit]}", "image": unit, "question": bare(question), "suffix": SHORT, "truth": label, "unit": unit, "task": task,
                          "official": question, "keys": [(unit, bare(question).strip().lower())]})
    if odd := [unit for unit, n in seen.items() if n != 2]:
        raise UserError(f"{root}: {odd[0]} has {seen[odd[0]]} question(s); every picture of MME has two")
    return items


def mme_predictions(cfg, items):
    """results/<subtask>.txt of picture, question, label, response; or answers in LLaVA's form. A line of another number of fields is
    skipped, as the official script does, but said."""
    if not Path(cfg.predictions).is_dir():
        for where, row in predicted(cfg, items):
            if "#" not in str(row.get("question_id")):                      # LLaVA's ids are task/picture, twice
                question = bare(str(row.get("prompt", "")).split("\n")[0]).strip().lower()
                row = row | {"key": (str(row.get("question_id")), question)}
            yield where, row
        return
    files = [Path(cfg.predictions) / f"{task}.txt" for task in dict.fromkeys(item["task"] for item in items)]
    if not any(f.is_file() for f in files):
        raise UserError(f"--predictions {cfg.predictions}: no <subtask>.txt in it, such as {files[0].name}")
    for file in (f for f in files if f.is_file()):
        for where, cells in tab_lines(file):
            if len(cells) != 4:
                print(f"{where}: {len(cells)} fields instead of 4; not scored, as in the official script", file=sys.stderr)
                for item in items:
                    if len(cells) > 1 and (item["unit"], item["official"].strip()) == (f"{file.stem}/{cells[0].strip()}", cells[1].strip()):
                        yield where, {"key": item["id"], "text": "", "skipped_line": True}
                continue
            yield where, {"key": (f"{file.stem}/{cells[0].strip()}", bare(cells[1]).strip().lower()), "text": cells[3]}


def mme_judge(item, text, row, cfg):
    label = mme_label(text.replace("\t", " ").replace("\n", " "))
    verdict = {"parsed": label if label != "other" else None, "score": float(label == item["truth"]), "label": label}
    return verdict | ({"skipped_line": True} if "skipped_line" in row else {})


def total_mme(records, items):
    """Subtask = 100 acc + 100 acc+; Perception and Cognition are sums. The unit is the picture with its two questions."""
    tasks, units = list(dict.fromkeys(item["task"] for item in items)), defaultdict(list)
    for r, item in zip(records, items):
        r["unit"] = item["unit"]
        units[item["unit"]].append((r, item["task"]))
    tally = np.zeros((len(units), len(tasks), 4))                           # right, answered lines, both right, pictures
    for row, pair in zip(tally, units.values()):
        lines_ = [r for r, _ in pair if "skipped_line" not in r]
        row[tasks.index(pair[0][1])] = sum(r["score"] for r in lines_), len(lines_), sum(r["score"] for r in lines_) == 2, 1
    score = lambda t: 100 * (t[0] / t[1] if t[1] else 0.0) + 100 * (t[2] / t[3] if t[3] else 0.0)
    figures = {}
    for k, task in enumerate(tasks):
        rs = [r for r, item in zip(records, items) if item["task"] == task and "skipped_line" not in r]
        count = lambda truth, said: sum(r["truth"] == truth and r["parsed"] == said for r in rs)
        cells = {"TP": count("yes", "yes"), "FN": count("yes", "no"), "TN": count("no", "no"), "FP": count("no", "yes")}
        t = tally[:, k].sum(0)
        figures[task] = cells | {"precision": cells["TP"] / max(cells["TP"] + cells["FP"], 1), "recall": cells["TP"] / max(cells["TP"] + cells["FN"], 1),
                                 "other_num": sum(r["parsed"] is None for r in rs), "acc": t[0] / t[1] if t[1] else 0.0, "acc_plus": t[2] / t[3], "score": score(t)}
    part = lambda names: float(sum(figures[t]["score"] for t in names if t in figures))
    wanted = [k for k, t in enumerate(tasks) if t in PERCEPTION] or range(len(tasks))           # a folder may hold cognition alone
    headline = lambda sums: float(sum(score(t) for t in (sums.reshape(len(tasks), 4)[k] for k in wanted)))
    return {"perception_total": part(PERCEPTION), "cognition_total": part(COGNITION), "tasks": figures}, tally.reshape(len(units), -1), headline


def submit_mme(items, records, cfg):
    flat = lambda text: (text or "").replace("\t", " ").replace("\n", " ")
    return {f"results/{task}.txt": "".join(f"{item['unit'].partition('/')[2]}\t{item['official']}\t{item['truth'].capitalize()}\t{flat(r['answer'])}\n"
                                            for item, r in zip(items, records) if item["task"] == task) for task in dict.fromkeys(item["task"] for item in items)}


def read_scienceqa(cfg):
    home, split, items = folder(cfg.data), cfg.split or "test", []
    splits, _ = read_any(find(home, "pid_splits.json"))
    ids = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(ids, list):
        raise UserError(f"{home}/pid_splits.json: no list of ids for the split {split!r}")
    problems = {id: (where, row) for where, id, row in entries(find(home, "problems.json"))}
    for id in map(str, ids):
        if id not in problems:
            raise UserError(f"{home}/pid_splits.json: {split} names problem {id!r}, which problems.json has not")
        where, row = problems[id]
        question, choices, truth, hint, image = need(where, row, question=str, choices=list, answer=int, hint=OPTIONAL, image=OPTIONAL)
        if not 0 <= truth < len(choices):
            raise UserError(f"{where}: \"answer\" is {truth}, of {len(choices)} choices")
        hint, context = hint or "", "" if cfg.family == "internvl" else "Context: "
        items.append({"id": id, "image": f"images/{row.get('split', split)}/{id}/{image}" if image else None, "suffix": LETTER, "truth": truth, "choices": choices,
                      "question": (f"{context}{hint}\n" if hint else "") + question + options(choices), "hint": hint,
                      **{k: str(row.get(k, "")) for k in ("subject", "grade", "topic")}})
    return items


def scienceqa_judge(item, text, row, cfg):
    if isinstance(row.get("text"), int):                                    # the official result file: {"results": {id: index}}
        letter = LETTERS[row["text"]] if 0 <= row["text"] < 26 else None
    else:
        letter = scienceqa_letter(text)
    index = LETTERS.index(letter) if letter and letter in LETTERS[:5] and LETTERS.index(letter) < len(item["choices"]) else -1
    return {"parsed": letter, "score": float(index == item["truth"]), "index": index}


def total_scienceqa(records, items):
    scored = with_meta(records, items)
    two = lambda rs: round(100 * mean(r["score"] for r in rs), 2) if rs else None
    some = lambda test: [r for r in scored if test(r["meta"])]
    pictured = some(lambda m: m["image"])
    parts = {f"acc_{name}": some(lambda m, s=f"{name} science": m["subject"] == s) for name in ("natural", "social", "language")} | {
        "acc_has_text": some(lambda m: m["hint"]), "acc_has_image": pictured, "acc_no_context": some(lambda m: not m["hint"] and not m["image"]),
        "acc_grade_1_6": some(lambda m: m["grade"] in [f"grade{k}" for k in range(1, 7)]), "acc_grade_7_12": some(lambda m: m["grade"] in [f"grade{k}" for k in range(7, 13)]),
        "acc_average": scored} | {f"acc_{topic}": some(lambda m, t=topic: m["topic"] == t) for topic in sorted({r["meta"]["topic"] for r in scored})}
    metrics = {"total": len(scored), "correct": int(sum(r["score"] for r in scored)), "accuracy": percent(np.sum(plain(scored), axis=0)) if scored else None, "accuracy_2dp": two(scored),
               "img_accuracy_2dp": two(pictured), "img_total": len(pictured), "parsed_letter": {r["id"]: r["parsed"] or "FAILED" for r in scored if "missing" not in r},
               "predicted_index": {r["id"]: r["index"] for r in scored if "missing" not in r},
               "official_breakdown": {name: f"{100 * mean(r['score'] for r in rs):.2f}" for name, rs in parts.items() if rs}}
    return metrics, plain(scored), percent


def submit_scienceqa(items, records, cfg):
    return {"scienceqa_results.json": dump({"results": {r["id"]: r.get("index", -1) for r in records}})}


def read_mmbench(chinese):
    names = [n for split in ("dev", "test") for n in ([f"mmbench_{split}_cn_20231003.tsv", f"MMBench_{split.upper()}_CN.tsv"] if chinese else
             [f"mmbench_{split}_20230712.tsv", f"mmbench_{split}_en_20231003.tsv", f"MMBench_{split.upper()}_EN.tsv"])]

    def read(cfg):
        path = find(cfg.data, *[n for n in names if not cfg.split or f"_{cfg.split}_" in n.lower()])
        rows = list(entries(path))
        pictures = {str(row.get("index")): row.get("image", "") for _, _, row in rows}
        items, seen = [], set()
        for where, _, row in rows:
            row = {k: "" if v in ("", "nan", "NaN") else v for k, v in row.items()}
            index, question, hint, image, answer = need(where, row, index=str, question=str, hint=OPTIONAL, image=str, answer=OPTIONAL)
            choices = {}
            for letter in "ABCD":                                           # an empty cell ends the options
                if not row.get(letter):
                    break
                choices[letter] = row[letter]
            if not re.fullmatch(r"\d+(\.0)?", index) or int(float(index)) in seen:
                raise UserError(f'{where}: "index" is {index!r}; it must be a number of its own')
            if not choices or answer and answer not in choices:
                raise UserError(f"{where}: " + (f'"answer" is {answer!r}, the options are {", ".join(choices)}' if choices else "no option A"))
            if 0 < len(image) <= 64 and image in pictures:
                image = pictures[image]                                     # later releases keep a picture once, in one row of its group
            try:
                picture = base64.b64decode(image, validate=True)
            except ValueError:
                raise UserError(f'{where}: "image" is not base64 ({image[:20]!r}...)') from None
            index = int(float(index))
            seen.add(index)
            items.append({"id": index, "image": picture or None, "question": (f"{hint}\n" if hint else "") + question + options(choices.values()), "suffix": "请直接回答选项字母。" if chinese else LETTER,
                          "truth": answer or None, "choices": choices, "unit": index % 1_000_000, "category": row.get("category", ""), "l2": row.get("l2-category", ""), "row": row})
        return items
    return read


def mmbench_judge(item, text, row, cfg):
    return right(mmbench_letter(text, item["choices"]), item["truth"])


def total_mmbench(records, items):
    """Circular: a question counts if all of its rows, the options rotated, are answered right."""
    groups, first = defaultdict(list), {}
    for r, item in zip(records, items):
        r["unit"] = item["unit"]
        if r["score"] is not None:
            groups[item["unit"]].append(r["score"])
            first.setdefault(item["unit"], (r["score"], item))
    hit = {unit: int(all(scores)) for unit, scores in groups.items()}
    for r in records:
        if r["unit"] in hit:
            r["unit_score"] = hit[r["unit"]]
    part = lambda name: {str(v): mean(hit[u] for u, (_, item) in first.items() if item[name] == v) for v in dict.fromkeys(item[name] for _, item in first.values())}
    metrics = {"n": len(hit) or len(records), "rows": len(records), "groups": len(hit), "circular_accuracy": mean(hit.values()),
               "vanilla_first_pass_exact_matching": mean(score for score, _ in first.values()), "group_hit": {str(u): h for u, h in hit.items()},
               "per_category": part("category"), "per_l2_category": part("l2"), "inferred_letter": {str(r["id"]): r["parsed"] for r in records}}
    return metrics, [[h, 1] for h in hit.values()], percent


def submit_mmbench(items, records, cfg):
    """The server's workbook: the file's columns without six of them, `prediction` as the seventh."""
    drop, rows = {"hint", "category", "source", "image", "comment", "l2-category"}, []
    for item, r in zip(items, records):
        cells = [(k, v) for k, v in item["row"].items() if k not in drop]
        rows.append(dict(cells[:6] + [("prediction", r["answer"] or "")] + cells[6:]))
    return {"mmbench.xlsx": write_xlsx(rows)}


def read_seed(cfg):
    path, items = find(cfg.data, "SEED-Bench.json"), []
    found, _ = read_any(path)
    kinds = {v: k for k, v in found.get("question_type", {}).items()} if isinstance(found, dict) else {}
    for where, _, row in entries(path, "questions"):
        id, kind, question, truth, a, b, c, d, data, media = need(where, row, question_id=(str, int), question_type_id=int, question=str, answer=OPTIONAL, choice_a=(str, int, float),
                                                                 choice_b=(str, int, float), choice_c=(str, int, float), choice_d=(str, int, float), data_id=str, data_type=OPTIONAL)
        video = (media or ("video" if kind > 9 else "image")) == "video"
        items.append({"id": str(id), "image": f"SEED-Bench-video-image/{kind}_{id}.png" if video else f"SEED-Bench-image/{data}", "question": question + options((a, b, c, d)),
                      "suffix": LETTER, "truth": truth, "type": kinds.get(kind, str(kind)), "media": "video" if video else "image"})
    return items


def seed_judge(item, text, row, cfg):
    label = text[:1] if cfg.family == "internvl" else text                  # LLaVA compares the whole text, InternVL its first character
    return right(label if label in list("ABCD") else None, item["truth"])


def total_seed(records, items):
    scored = with_meta(records, items)
    return {"accuracy": percent(np.sum(plain(scored), axis=0)) if scored else None, "per_type": accuracies(scored, "type"), "per_media": accuracies(scored, "media")}, plain(scored), percent


def submit_seed(items, records, cfg):
    return {"seed_bench.jsonl": lines({"question_id": r["id"], "prediction": r["answer"] or ""} for r in records)}


def read_ai2d(cfg):
    root = next((p for p in (folder(cfg.data), folder(cfg.data) / "ai2d") if (p / "questions").is_dir()), None)
    if root is None:
        raise UserError(f"{cfg.data}: no folder questions/ with <n>.png.json in it; unpack ai2d-all.zip there")
    ids = find(cfg.data, "ai2d_test_ids.csv", optional=True)
    split = cfg.split or "test"
    one_of("--split", split, ["test", "val", "all"])
    if split != "all" and not ids:
        raise UserError(f"{cfg.data}: no ai2d_test_ids.csv, which says what is test; add it, or give --split all")
    test = set(ids.read_text(encoding="utf-8-sig").split()) if ids else set()
    items = []
    for path in sorted((root / "questions").glob("*.json"), key=lambda p: (len(p.name), p.name)):
        found, _ = read_any(path)
        image, questions = need(str(path), found if isinstance(found, dict) else {}, imageName=str, questions=dict)
        part = "test" if image.split(".")[0] in test else "val"
        for text, row in questions.items():
            where = f"{path}, question {text[:40]!r}"
            choices, truth, id = need(where, row if isinstance(row, dict) else {}, answerTexts=list, correctAnswer=int, questionId=str)
            if not 0 <= truth < len(choices):
                raise UserError(f'{where}: "correctAnswer" is {truth}, of {len(choices)} answers')
            if split in ("all", part):
                items.append({"id": id, "image": f"images/{image}", "question": text + options(choices), "suffix": LETTER, "truth": LETTERS[truth], "n": len(choices), "split": part,
                              "letters": "drawn" if row.get("abcLabel") else "none", "candidates": tuple("ABCD")})
    return items


def total_ai2d(records, items):
    scored = with_meta(records, items)
    return {"accuracy": accuracies(scored, "split") | {"final": percent(np.sum(plain(scored), axis=0)) if scored else None}, "abcLabel": accuracies(scored, "letters"),
            "note": "raw pictures: the letters of abcLabel questions are not drawn in"}, plain(scored), percent


def read_tallyqa(cfg):
    split, items = cfg.split or "test", []
    for where, _, row in entries(find(cfg.data, f"{split}.json")):
        id, image, question, truth, simple = need(where, row, question_id=int, image=str, question=str, answer=int, issimple=(bool, type(None)))
        sixteen = options(range(16))                                        # Prismatic asks for one of A. 0 ... P. 15
        items.append({"id": id, "image": image, "question": question + (sixteen if cfg.likelihood else ""), "suffix": LETTER if cfg.likelihood else SHORT, "truth": truth,
                      "kind": "complex" if simple is False else "simple", "candidates": tuple(LETTERS[:16])})
    return items


def total_tallyqa(records, items):
    scored = with_meta(records, items)
    error = lambda rs: math.sqrt(mean((r["parsed"] - r["truth"]) ** 2 for r in rs)) if rs else None
    known = [r for r in scored if r["parsed"] is not None]
    rmse = {kind: error([r for r in known if r["meta"]["kind"] == kind]) for kind in ("simple", "complex")} | {"final": error(known)}
    return {"accuracy": accuracies(scored, "kind") | {"final": percent(np.sum(plain(scored), axis=0)) if scored else None}, "rmse": rmse}, plain(scored), percent


def read_vsr(cfg):
    items, meta = [], {}
    if categories := find(folder(cfg.data), "rel_meta_category_dict.txt", optional=True):
        for line in categories.read_text(encoding="utf-8").splitlines():
            name, _, relations = line.partition(":")
            meta |= {relation.strip(): name.strip() for relation in relations.split(",")}
    for where, k, row in entries(find(cfg.data, f"{cfg.split or 'test'}.jsonl")):
        image, caption, label = need(where, row, image=str, caption=str, label=int)
        relation = str(row.get("relation", ""))
        items.append({"id": str(row.get("id", len(items))), "image": image, "question": f'Based on the image, is this statement "True" or "False"? {caption}',
                      "suffix": 'Respond with "True" or "False" directly.', "truth": ("False", "True")[label == 1], "relation": relation, "meta_category": meta.get(relation, ""),
                      "keys": [(image, caption.strip().lower())], "candidates": ("True", "False")})
    return items


def vsr_judge(item, text, row, cfg):
    found = re.search(r"\b(true|false)\b", text, re.IGNORECASE)
    return right(found[1].capitalize() if found else None, item["truth"])


def total_vsr(records, items):
    scored = with_meta(records, items)
    return {"accuracy": mean(r["score"] for r in scored), "always_true": mean(float(r["truth"] == "True") for r in scored), "per_relation": accuracies(scored, "relation"),
            "per_meta_category": accuracies(scored, "meta_category")}, plain(scored), percent


def region_prompt(sentence, cfg):
    sentence = f"<ref>{sentence}</ref>" if cfg.family == "internvl" else f'"{sentence}"'
    return f"Please provide the bounding box coordinate of the region this sentence describes: {sentence}"


def read_refcoco(cfg):
    name, split, items = cfg.name, cfg.split or "val", []
    ready = find(cfg.data, f"{name}_{split}.jsonl", optional=not Path(cfg.data).is_file())
    if ready and ready.suffix == ".jsonl":                                  # converted: one sentence a line, corners in pixels
        for where, k, row in entries(ready):
            image, sentence, box, w, h = need(where, row, image=str, sent=str, bbox=list, width=int, height=int)
            items.append(region(where, str(row.get("sent_id", len(items))), image, sentence, box, w, h, cfg))
        return items
    home = folder(cfg.data) / name if (folder(cfg.data) / name).is_dir() else folder(cfg.data)
    refs = find(home, "refs(umd).p" if name == "refcocog" else "refs(unc).p")
    found, _ = read_any(find(home, "instances.json"))
    try:
        boxes = {a["id"]: a for a in found["annotations"]}
        sizes = {i["id"]: (i["width"], i["height"]) for i in found["images"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{home}/instances.json: not COCO's form ({error!r}); get it with REFER's data") from None
    listed = read_pickle(refs)
    for k, ref in enumerate(listed if isinstance(listed, list) else [listed]):
        where = f"{refs}, record {k}"
        if not isinstance(ref, dict):
            raise UserError(f"{where}: not a reference; get the file again")
        ref = {str(key): value for key, value in ref.items()}
        ann, image, part, sentences = need(where, ref, ann_id=int, image_id=int, split=str, sentences=list)
        if part != split:
            continue
        if ann not in boxes or image not in sizes:
            raise UserError(f"{where}: annotation {ann} or image {image} is not in instances.json; take both from one download")
        try:
            x, y, w, h = boxes[ann]["bbox"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{home}/instances.json, annotation {ann}: no bbox of four numbers") from None
        for s in sentences:
            id, sentence = need(where, s if isinstance(s, dict) else {}, sent_id=int, sent=str)
            items.append(region(where, id, f"train2014/COCO_train2014_{image:012d}.jpg", sentence, [x, y, x + w, y + h], *sizes[image], cfg))
    return items


def region(where, id, image, sentence, box, w, h, cfg, **more):
    if len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
        raise UserError(f'{where}: "bbox" is {box}; it must be four numbers')
    return {"id": id, "image": image, "question": region_prompt(sentence, cfg), "suffix": "", "truth": box, "size": (w, h), "keys": [(image, sentence.strip().lower())]} | more


def region_judge(least):
    """Convention N (fractions, truth rounded to two decimals) for LLaVA and Prismatic, K (float32, pixels) for InternVL."""
    def judge(item, text, row, cfg):
        (w, h), loose = item["size"], tolerant_box(text)
        truth = [round(x / side, 2) for x, side in zip(item["truth"], (w, h, w, h))]
        unpad = lambda box: [((x * max(w, h) - (max(w, h) - side) // 2) / side) for x, side in zip(box, (w, h, w, h))] if box and cfg.box_frame == "square" else box
        if cfg.family == "internvl":
            box = internvl_box(text, w, h)
            overlap = 0.0 if box is None else iou32(box, item["truth"])
            box = None if box is None else [float(x) for x in box]
        else:
            box = unpad(strict_box(text))
            overlap = iou(box, truth) if box else 0.0
        return {"parsed": box, "score": float(overlap >= least), "iou": overlap, "tolerant": float(bool(loose) and iou(unpad(loose), truth) >= least)}
    return judge


def total_region(records, items):
    scored = [r for r in records if r["score"] is not None]
    metrics = {"accuracy": mean(r["score"] for r in scored), "invalid": sum(r["parsed"] is None and "missing" not in r for r in scored),
               "accuracy_tolerant_reading": mean(r.get("tolerant", 0.0) for r in scored)}
    if "clutter" in items[0]:
        parts = accuracies(with_meta(records, items), "clutter")
        metrics |= {name: parts[name] for name in ("Minimum", "Medium", "Maximum") if name in parts} | {"All": percent(np.sum(plain(scored), axis=0))}
    return metrics, plain(scored), percent


def read_ocid(cfg):
    items = []
    for where, id, row in entries(find(cfg.data, f"{cfg.split or 'val'}_expressions.json")):
        sentence, path, raw, take = need(where, row, sentence=str, scene_path=str, bbox=(str, list), take_id=int)
        try:
            box = json.loads(raw) if isinstance(raw, str) else raw
            x1, y1, x2, y2 = box
            if not (x1 < x2 <= 640 and y1 < y2 <= 480):                     # corners, whatever the dataset's note says
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(f'{where}: "bbox" is {raw!r}; it must be [x1, y1, x2, y2] within 640 x 480 pixels') from None
        clutter = "Minimum" if take <= 9 else "Medium" if take <= 16 else "Maximum"
        items.append(region(where, str(id), f"OCID-dataset/{path}", sentence, box, 640, 480, cfg, clutter=clutter))
    return items


HINTS = {
    "choice": "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end."}


def read_mathvista(cfg):
    split = cfg.split or ("test" if not find(cfg.data, "testmini.json", optional=True) and find(cfg.data, "test.json", optional=True) else "testmini")
    asked = find(folder(cfg.data), "query.json", optional=True)
    queries, items = read_any(asked)[0] if asked else {}, []
    for where, pid, row in entries(find(cfg.data, f"{split}.json")):
        question, image, choices, unit, truth, kind, answer_type = need(where, row, question=str, image=str, choices=(list, type(None)), unit=OPTIONAL, answer=OPTIONAL, question_type=str, answer_type=str)
        precision = row.get("precision")
        if kind == "multi_choice" and not choices or answer_type not in ("text", "integer", "float", "list"):
            raise UserError(f'{where}: a {kind} question of type {answer_type} with "choices" {choices}')
        shown = f"Question: {question}" + (f" (Unit: {unit})" if unit else "") + ("\nChoices:" + "".join(f"\n({LETTERS[i]}) {c}" for i, c in enumerate(choices)) if choices else "")
        which = "choice" if kind == "multi_choice" else f"float{int(precision or 1)}" if answer_type == "float" else answer_type
        query = queries.get(str(pid)) or row.get("query") or f"{HINTS.get(which, HINTS['integer'])}\n{shown}"
        plain_ = "\n".join(query.split("\n")[1:]) if query.startswith("Hint: ") else query.removesuffix(f"\n{SHORT}")
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        items.append({"id": str(pid), "image": image, "question": query, "suffix": "", "cot": COT + plain_, "truth": truth or None, "choices": choices, "precision": precision,
                      "question_type": kind, "answer_type": answer_type, **{k: metadata.get(k) for k in ("language", "source", "category", "task", "context", "grade", "skills")}})
    return items


def mathvista_judge(item, text, row, cfg):
    """Scoring starts from `extraction`. Where there is none, as from a model, a rule stands in for the official GPT-4."""
    if row.get("extraction") is not None:
        extraction, ours = row["extraction"], False
    else:
        extraction, ours = mathvista_extract(text, item)
    label = mathvista_normal(extraction, item)
    score = float(label == item["truth"])
    return {"parsed": label, "score": score, "extraction": extraction, "prediction": label, "true_false": bool(score), "by_rule": ours, "rule_extracted": row.get("extraction") is None}


def total_mathvista(records, items):
    scored = with_meta(records, items)
    names = [k for k in ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills") if any(r["meta"].get(k) is not None for r in scored)]
    ours = any(r.get("rule_extracted") for r in scored)
    metrics = {"correct": int(sum(r["score"] for r in scored)), "total": len(scored), "accuracy": mean(r["score"] for r in scored), "groups": {k: by(scored, k) for k in names}}
    return metrics | ({"metric": "accuracy %, rule-extracted (the official pipeline asks GPT-4)", "extracted_by_rule": sum(r.get("by_rule", False) for r in scored)} if ours else {}), plain(scored), percent


def submit_mathvista(items, records, cfg):
    return {"mathvista_predictions.json": dump({r["id"]: {"pid": r["id"], "response": r["answer"] or "", "extraction": r.get("extraction", "")} for r in records})}


def read_m3cot(cfg):
    """test.jsonl; without it the predictions, whose lines carry choices, answer, domain and topic too."""
    split = {"validation": "dev"}.get(cfg.split, cfg.split) or "test"
    path = find(cfg.data, f"{split}.jsonl", optional=not Path(cfg.data).is_file())
    if path is None and not cfg.predictions:
        find(cfg.data, f"{split}.jsonl")
    items, seen = [], set()
    for where, _, row in entries(path or cfg.predictions):
        id, choices, truth, domain, topic, question, context = need(where, row, id=str, choices=list, answer=OPTIONAL, domain=str, topic=str, question=OPTIONAL, context=OPTIONAL)
        if id in seen and path is None:
            continue
        if truth and truth not in list(LETTERS[: len(choices)]) or not all(isinstance(c, str) for c in choices):
            raise UserError(f'{where}: "answer" is {truth!r}, of {len(choices)} choices; it must be one of their letters')
        seen.add(id)
        shown, letters = "".join(f"\n({LETTERS[i]}) {c}" for i, c in enumerate(choices)), ",".join(f'"({LETTERS[i]})"' for i in range(len(choices)))
        item = {"id": id, "image": row.get("image_path") or f"images/{row.get('image_id') or id}.png", "truth": truth, "choices": choices, "domain": domain, "topic": topic}
        if cfg.family == "internvl":
            item |= {"question": (f"{context}\n" if context else "") + (question or "") + options(choices), "suffix": LETTER}
        else:
            asked = (f"[Context]\n{context}\n" if context else "") + f"[Question]\n{question or ''}\n[Choices]{shown}"
            item |= {"question": asked, "suffix": "", "cot": asked + "\n\nLet's think step-by-step!", "then": f"Please select the correct answer from the [{letters}] options."}
        items.append(item)
    return items


def m3cot_judge(item, text, row, cfg):
    letter = option_letter(text, len(item["choices"])) if cfg.family == "internvl" else None
    return right(letter or m3cot_letter(text, item["choices"]), item["truth"]) | ({"first": row["first"]} if "first" in row else {})


def total_m3cot(records, items):
    scored = with_meta(records, items)
    for r in records:
        r["correct"] = r["score"] == 1
    domains = list(dict.fromkeys(r["meta"]["domain"] for r in scored))
    correct = int(sum(r["score"] for r in scored))
    return {"total": {"correct": correct, "total": len(scored), "acc": correct / len(scored) if scored else None}, "domain": by(scored, "domain"),
            "topic": {d: by([r for r in scored if r["meta"]["domain"] == d], "topic") for d in domains}}, plain(scored), percent


def submit_m3cot(items, records, cfg):
    return {"m3cot.jsonl": lines({"id": r["id"], "choices": item["choices"], "answer": r["truth"], "domain": item["domain"], "topic": item["topic"],
                                  "messages": [r["prompt"], *([r["first"], item["then"]] if "first" in r else []), r["answer"] or ""]} for item, r in zip(items, records))}


RULE = ("We would like to request your feedback on the performance of two AI assistants in response to the user question displayed above. The user asks the question on "
        "observing an image. For your reference, the visual content in the image is represented with a few sentences describing the image. \nPlease rate the helpfulness, "
        "relevance, accuracy, level of details of their responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better overall "
        "performance.\nPlease first output a single line containing only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a "
        "space.\nIn the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in which the "
        "responses were presented does not affect your judgment.")


def read_llava_bench(cfg):
    captions = {row.get("image"): row.get("caption") for _, _, row in entries(find(folder(cfg.data), "context.jsonl"))}
    reference = {row.get("question_id"): row.get("text") for _, _, row in entries(find(folder(cfg.data), "answers_gpt4.jsonl"))}
    items = []
    for where, _, row in entries(find(cfg.data, "questions.jsonl")):
        id, image, category, text = need(where, row, question_id=int, image=str, category=str, text=str)
        if not isinstance(reference.get(id), str) or captions.get(image) is None:
            raise UserError(f"{where}: no reference answer in answers_gpt4.jsonl, or no caption of {image} in context.jsonl")
        caption = captions[image] if isinstance(captions[image], str) else "\n".join(captions[image])
        items.append({"id": id, "image": f"images/{image}", "question": text, "suffix": "", "truth": reference[id], "category": category.removeprefix("llava_bench_"), "caption": caption})
    return items


def judge_pair(text):
    """The two scores on the first line of GPT-4's review; anything else is (-1, -1), which the official mean does not drop."""
    try:
        pair = [float(x) for x in text.split("\n")[0].replace(",", " ").split(" ")]
    except ValueError:
        pair = []
    return pair if len(pair) == 2 else [-1.0, -1.0]


def llava_bench_judge(item, text, row, cfg):
    """A review of GPT-4 (`content`, or `tuple`) is its score. An answer gets a proxy: F1 of its words against the reference's."""
    if "content" in row or "tuple" in row:
        pair = row["tuple"] if isinstance(row.get("tuple"), list) else judge_pair(row["content"])
        return {"parsed": pair if pair != [-1, -1] else None, "score": pair[1] / 10, "pair": [float(x) for x in pair]}
    said_, truth = (Counter(normalise(t).split()) for t in (text, item["truth"]))
    both = sum((said_ & truth).values())
    return {"parsed": text, "score": 2 * both / max(sum(said_.values()) + sum(truth.values()), 1)}


def total_llava_bench(records, items):
    groups = {"all": records} | {c: [r for r, item in zip(records, items) if item["category"] == c] for c in dict.fromkeys(item["category"] for item in items)}
    if any("pair" in r for r in records):                                   # missing reviews have no say
        def relative(rs):
            a, b = (round(mean(r["pair"][k] for r in rs if "pair" in r), 3) for k in (0, 1))
            return [round(100 * b / a, 1) if a else None, round(10 * a, 1), round(10 * b, 1)]
        judged = {name: relative(rs) for name, rs in groups.items() if any("pair" in r for r in rs)}
        tally = [[*r["pair"], 1] for r in records if "pair" in r]
        return {"judged": True, "relative_score": judged}, tally, lambda s: round(100 * round(s[1] / s[2], 3) / round(s[0] / s[2], 3), 1) if s[0] > 0 else None
    words = lambda rs: mean(len((r["answer"] or "").split()) for r in rs)
    parts = {name: {"count": len(rs), "mean_words": words(rs), "empty": sum(not r["answer"] for r in rs), "unigram_f1": mean(r["score"] for r in rs)} for name, rs in groups.items()}
    return {"proxy_parts": parts}, plain(records), percent


def submit_llava_bench(items, records, cfg):
    block = lambda item, r: (f"[Context]\n{item['caption']}\n\n[Question]\n{item['question']}\n\n[Assistant 1]\n{item['truth']}\n\n[End of Assistant 1]\n\n"
                             f"[Assistant 2]\n{r['answer'] or ''}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n")
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    return {"judge_requests.jsonl": lines({"question_id": item["id"], "category": item["category"], "model": "gpt-4-0314", "temperature": 0.2, "max_tokens": 1024, "messages": [
        {"role": "system", "content": system}, {"role": "user", "content": block(item, r)}]} for item, r in zip(items, records))}


MEME = ("Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite its name, Iceland is known "
        "for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
        "countries do not accurately represent their landscapes. | ")
EQUATION = "What is x in the equation? | -1 <AND> -5 | x = "
MM_VET = ("Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the ground truth means it is totally right only when all "
          "elements in the ground truth are present in the prediction, and <OR> means it is totally right when any one element in the ground truth is present in the prediction. The "
          "correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.\n\n"
          "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
          f"{EQUATION}3 | 0.0\n{EQUATION}-1 | 0.5\n{EQUATION}-5 | 0.5\n{EQUATION}-5 or 5 | 0.5\n{EQUATION}-1 or x = -5 | 1.0\n"
          f"{MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and Greenland isn't very green. | 0.4\n"
          f"{MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is "
          "mostly covered in ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor "
          "in this meme is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0\n")


def read_mm_vet(cfg):
    items = []
    for where, id, row in entries(find(cfg.data, "mm-vet.json")):
        question, truth, capability, image = need(where, row, question=str, answer=str, capability=list, imagename=OPTIONAL)
        items.append({"id": str(id), "image": f"images/{image or f'{id}.png'}", "question": question, "suffix": "", "truth": truth, "capability": capability,
                      "combination": "_".join(map(str, capability))})
    return items


def mm_vet_judge(item, text, row, cfg):
    """A grade of the official judge (`score`, a number or the list of its runs) is the score. An answer gets a proxy: of the best <OR>
    branch, the share of its <AND> parts found in it."""
    if "score" in row:
        grades = row["score"] if isinstance(row["score"], list) else [row["score"]]
        if not grades or not all(isinstance(g, (int, float)) and 0 <= g <= 1 for g in grades):
            raise UserError(f'{cfg.predictions}, record {item["id"]!r}: "score" is {row["score"]!r}; it must be numbers from 0 to 1')
        return {"parsed": text, "score": mean(grades), "judged": True}
    said_ = normalise(text)
    share = max(mean(float(normalise(part) in said_) for part in branch.split("<AND>")) for branch in item["truth"].split("<OR>"))
    return {"parsed": text, "score": share}


def total_mm_vet(records, items):
    scored = with_meta(records, items)
    group = lambda name: {k: {"score": 100 * mean(rs), "count": len(rs)} for k, rs in _grouped(scored, name).items()}
    parts = {"per_capability": group("capability"), "per_combination": group("combination")}
    return {"judged": True} | parts if any("judged" in r for r in records) else {"proxy_parts": parts}, plain(records), percent


def _grouped(scored, name):
    groups = defaultdict(list)
    for r in scored:
        for key in r["meta"][name] if isinstance(r["meta"][name], list) else [r["meta"][name]]:
            groups[str(key)].append(r["score"])
    return groups


def submit_mm_vet(items, records, cfg):
    padded = lambda truth: truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return {"mm_vet.json": dump({r["id"]: r["answer"] or "" for r in records}), "judge_requests.jsonl": lines(
        {"question_id": r["id"], "model": "gpt-4-0613", "temperature": 0, "max_tokens": 3, "messages": [
            {"role": "user", "content": f"{MM_VET}\n" + " | ".join([item["question"], padded(item["truth"]), r["answer"] or "", ""])}]} for item, r in zip(items, records))}


@dataclass(frozen=True)
class Benchmark:
    read: object
    judge: object
    total: object = total_mean
    submit: object = nothing
    paper: dict = field(default_factory=dict)    # {model: the published figure}
    longest: int = 16                            # new tokens of an answer
    digits: int | None = None                    # decimals to which the official scorer itself rounds
    metric: str = "accuracy %"
    proxy: bool = False                          # the official figure needs a judge; ours has another name
    predictions: object = None                   # reader of result files that `predicted` cannot read
    all_needed: bool = False                     # the official scorer refuses a file that lacks an answer


def paper(llava7=None, llava13=None, prism7=None, prism13=None, **others):
    """LLaVA-1.5 by its own table 3 and 4 or, where it has none, by Prismatic's table; Prism is DINOSigLIP."""
    named = {"LLaVA-1.5-7B": llava7, "LLaVA-1.5-13B": llava13, "Prism-7B": prism7, "Prism-13B": prism13} | {k.replace("_", "-"): v for k, v in others.items()}
    return {k: v for k, v in named.items() if v is not None}


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, vqa_judge("official"), total_vqav2, submit_vqav2, paper(78.5, 80.0, 80.97, 81.66), digits=2, metric="VQA accuracy %", all_needed=True),
    "gqa": Benchmark(read_gqa, gqa_judge, total_gqa, submit_gqa, paper(62.0, 63.3, 65.27, 66.13), digits=2, all_needed=True),
    "vizwiz": Benchmark(read_vizwiz, vqa_judge("vizwiz"), total_vizwiz, answers_as("vizwiz_upload.json", "image", clean=evalai), paper(50.0, 53.6, 52.82, 58.01), digits=2,
                        metric="VQA accuracy %"),
    "scienceqa": Benchmark(read_scienceqa, scienceqa_judge, total_scienceqa, submit_scienceqa, {"LLaVA-1.5-7B, IMG": 66.8, "LLaVA-1.5-13B, IMG": 71.6, "LLaVA-1.5-13B": 74.39}),
    "textvqa": Benchmark(read_textvqa(False), vqa_judge("evalai"), total_textvqa, answers_as("textvqa_answers.json"), paper(46.13, 48.99, 55.64, 57.08), metric="VQA accuracy %, without OCR tokens"),
    "textvqa-ocr": Benchmark(read_textvqa(True), vqa_judge("evalai"), total_textvqa, answers_as("textvqa_answers.json"), paper(58.2, 61.3, 59.71, 62.89),
                             metric="VQA accuracy %, with OCR tokens"),
    "pope": Benchmark(read_pope, lambda item, text, row, cfg: right(pope_label(text), item["truth"]), total_pope, submit_pope,
                      paper(85.9, 85.9, **{"Prism-7B, accuracy": 88.12, "Prism-13B, accuracy": 88.07}, InternVL2_8B_MPO=88.1), metric="mean F1 % of the splits", predictions=pope_predictions),
    "mme": Benchmark(read_mme, mme_judge, total_mme, submit_mme, paper(1510.7, 1531.3), metric="perception, of 2000", predictions=mme_predictions),
    "mmbench": Benchmark(read_mmbench(False), mmbench_judge, total_mmbench, submit_mmbench, paper(64.3, 67.7, **{"InternVL2.5-8B-MPO, v1.1": 82.4}), metric="circular accuracy %"),
    "mmbench-cn": Benchmark(read_mmbench(True), mmbench_judge, total_mmbench, submit_mmbench, paper(58.3, 63.6), metric="circular accuracy %"),
    "seed-bench": Benchmark(read_seed, seed_judge, total_seed, submit_seed, paper(58.6, 61.6)),
    "llava-bench": Benchmark(read_llava_bench, llava_bench_judge, total_llava_bench, submit_llava_bench, paper(65.4, 72.5), 1024, metric="relative score by GPT-4", proxy=True),
    "mm-vet": Benchmark(read_mm_vet, mm_vet_judge, total_mm_vet, submit_mm_vet, paper(31.1, 36.1, **{"InternVL2.5-8B-MPO": 66.9}), 1024, 1, "score by GPT-4, of 100", proxy=True),
    "refcoco": Benchmark(read_refcoco, region_judge(0.5), total_region, paper=paper(55.12, 66.75, 77.78, 79.39), longest=100, metric="accuracy % at IoU 0.5"),
    "refcoco+": Benchmark(read_refcoco, region_judge(0.5), total_region, paper=paper(49.47, 61.36, 73.08, 75.55), longest=100, metric="accuracy % at IoU 0.5"),
    "refcocog": Benchmark(read_refcoco, region_judge(0.5), total_region, paper=paper(50.92, 60.85, 71.04, 72.73), longest=100, metric="accuracy % at IoU 0.5"),
    "ocid-ref": Benchmark(read_ocid, region_judge(0.25), total_region, paper=paper(35.07, 45.56, 54.12, 54.62), longest=100, metric="accuracy % at IoU 0.25"),
    "vsr": Benchmark(read_vsr, vsr_judge, total_vsr, paper=paper(51.47, 69.07, 59.57, 72.18)),
    "tallyqa": Benchmark(read_tallyqa, lambda item, text, row, cfg: right(counted(text), item["truth"]), total_tallyqa, paper=paper(62.06, 64.83, 66.70, 70.41)),
    "ai2d": Benchmark(read_ai2d, lambda item, text, row, cfg: right(option_letter(text, item["n"]), item["truth"]), total_ai2d,
                      paper=paper(54.10, 57.13, 55.65, 57.96, **{"InternVL2.5-8B-MPO": 84.5})),
    "m3cot": Benchmark(read_m3cot, m3cot_judge, total_m3cot, submit_m3cot, paper(InternVL2_8B_MPO=79.2), 128),
    "mathvista": Benchmark(read_mathvista, mathvista_judge, total_mathvista, submit_mathvista, paper(**{"InternVL2.5-8B-MPO": 68.9}), 128),
}
ALIASES = {"seed": "seed-bench", "llavabenchinthewild": "llava-bench", "llavabenchwild": "llava-bench", "llavaw": "llava-bench", "sqa": "scienceqa", "vqa": "vqav2"}


# ---- the toy world in the official formats -----------------------------------------------------------------------------------

TOY = {"pope": "existence", "tallyqa": "count", "gqa": "attribute", "mme": "spatial", "refcoco": "box", "mmbench": "choice", "textvqa": "reading", "vizwiz": "unanswerable",
       "mathvista": "reasoning cot", "llava-bench": "caption"}


def toy_files(name, world, out):
    """Write the toy world's held-out questions of one kind as that benchmark's official files, which `read` then reads like any others."""
    if str(world) == "toyworld" and not world.exists():
        toyworld.write_world(world)
    rows = [(k, r) for k, (_, _, r) in enumerate(entries(world / "val.jsonl")) if r.get("category") in TOY[name].split()]
    text = lambda r: r["text"].removeprefix(COT).removesuffix(f"\n{LETTER}").removesuffix(f"\n{SHORT}").removesuffix(f"\n{INSUFFICIENT}")
    stem = lambda r: Path(r["image"]).stem
    ten = lambda answer: [{"answer": answer, "answer_confidence": "yes"}] * 10
    if name == "pope":
        files = {"coco_pope_random.json": lines({"question_id": k, "image": r["image"], "text": text(r), "label": r["answer"]} for k, r in rows)}
    elif name == "tallyqa":
        files = {"test.json": dump([{"question_id": k, "image": r["image"], "question": text(r), "answer": int(r["answer"]), "issimple": True} for k, r in rows])}
    elif name == "gqa":
        files = {"testdev_balanced_questions.json": dump({str(k): {
            "semantic": [], "question": text(r), "imageId": stem(r), "isBalanced": True, "groups": {"global": None}, "answer": r["answer"],
            "types": {"structural": "choose" if " or " in text(r) else "query", "semantic": "attr"}} for k, r in rows})}
    elif name == "mme":                                                     # a picture's second question: the opposite relation
        turned = {"to the left of": "to the right of", "to the right of": "to the left of", " above ": " below ", " below ": " above "}
        turn = lambda q: next(q.replace(a, b) for a, b in turned.items() if a in q)
        files = {"Your_Results/position.txt": "".join(f"{Path(r['image']).name}\t{q} Please answer yes or no.\t{label}\n" for _, r in rows for q, label in (
            (text(r), r["answer"].capitalize()), (turn(text(r)), "No" if r["answer"] == "yes" else "Yes")))}
    elif name == "refcoco":
        side = 1000                                                         # fractions of two decimals: any side says them exactly
        files = {"refcoco_val.jsonl": lines({"image": r["image"], "sent": text(r).removeprefix(toyworld.BOX).removesuffix("."), "width": side, "height": side,
                                             "bbox": [x * side for x in json.loads(r["answer"])], "sent_id": k} for k, r in rows)}
    elif name == "mmbench":
        table_ = ["index question hint A B C D answer category image source l2-category".split()]
        for turn in range(4):
            for k, r in rows:
                question, *choices = text(r).split("\n")
                choices = [c[3:] for c in choices]
                turned = choices[-turn:] + choices[:-turn] if turn else choices
                answer = LETTERS[turned.index(choices[LETTERS.index(r["answer"])])]
                picture = base64.b64encode((world / r["image"]).read_bytes()).decode()
                table_.append([k + turn * 1_000_000, question, "", *turned, answer, question.split()[0], picture, "toy", "toy"])
        sheet = io.StringIO()
        csv.writer(sheet, delimiter="\t", lineterminator="\n").writerows(table_)
        files = {"mmbench_dev_20230712.tsv": sheet.getvalue()}
    elif name == "textvqa":
        files = {"TextVQA_0.5.1_val.json": dump({"data": [{"question": text(r), "image_id": stem(r), "answers": [r["answer"]] * 10, "question_id": k} for k, r in rows]})}
    elif name == "vizwiz":                                                  # annotators write in lower case
        files = {"val.json": dump([{"image": Path(r["image"]).name, "question": text(r), "answers": ten(r["answer"].lower()), "answerable": int(r["answer"] != "Unanswerable")} for _, r in rows])}
    elif name == "mathvista":                                               # query.json holds the prompts: here the toy's own
        files = {"testmini.json": dump({str(k): {"question": text(r), "image": r["image"], "choices": None, "unit": None, "precision": None, "answer": r["answer"].rsplit(": ", 1)[-1],
                                                 "question_type": "free_form", "answer_type": "integer", "metadata": {"task": r["category"]}} for k, r in rows}),
                 "query.json": dump({str(k): f"{text(r)}\n{SHORT}" for k, r in rows})}
    else:
        files = {"questions.jsonl": lines({"question_id": k, "image": Path(r["image"]).name, "category": "detail", "text": text(r)} for k, r in rows),
                 "context.jsonl": lines({"image": Path(r["image"]).name, "caption": r["answer"]} for _, r in rows),
                 "answers_gpt4.jsonl": lines({"question_id": k, "text": r["answer"]} for k, r in rows)}
    for file, content in files.items():
        write_whole(out / file, lambda tmp: tmp.write_text(content, encoding="utf-8"))
    return out


# ---- what people look at ---------------------------------------------------------------------------------------------------


def table(results):
    """Score with interval, items, unparsed, the other columns, the papers' figures."""
    number = lambda x: "-" if x is None else f"{x:.2f}"
    others = [mode for mode in ("direct", "blind") if any(mode in r for r in results)]
    head = ["benchmark", "score", "95% interval", "n", "unparsed", *others, "", "papers"]
    rows = [head]
    for r in results:
        score, ci = (r["proxy"], r["proxy_ci95"]) if "proxy" in r else (r["score"], r["ci95"])
        rows.append([r["benchmark"], number(score), f"{number(ci[0])} to {number(ci[1])}" if ci else "-", str(r["n"]), f"{r['unparsed']:.1%}",
                     *(number(r[m].get("proxy", r[m]["score"]) if m in r else None) for m in others), "proxy, compares with nothing" if "proxy" in r else r["metric"],
                     ", ".join(f"{k} {v}" for k, v in r["paper"].items())])
    width = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) if k in (0, len(head) - 1, len(head) - 2) else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, width))).rstrip() for row in rows)


def report(result, files, out, seconds):
    """What else must be known of one benchmark, in a line or two."""
    said_ = [f"{result['benchmark']}: {len(result['records'])} questions in {seconds:.1f} s"]
    said_ += [f"{result['missing']} without an answer, counted as wrong"] * bool(result["missing"]) + [f"{result['cut_off']} answers cut off"] * bool(result["cut_off"])
    if result["score"] is None and "proxy" not in result:
        said_.append("its labels are hidden: no score can be computed, hand in the submission")
    if "proxy" in result:
        said_.append("its score needs GPT-4: judge_requests.jsonl is ready to send")
    if c := result.get("compare"):
        said_.append(f"against {c['with']}: {c['difference']:+.2f} points ({c['ci95'][0]:+.2f} to {c['ci95'][1]:+.2f}), {c['better']} better, {c['worse']} worse of {c['n']}, p = {c['p']:.3g}")
    print("; ".join(said_) + f"\n  {out / 'results.json'}, {', '.join(files)}", flush=True)


def contact_sheet(items, records, cfg, path, columns=4, side=240):
    """--show: wrong answers, spread over the file, each with picture, question, answer and truth."""
    wrong = [(item, r) for item, r in zip(items, records) if r["score"] is not None and r["score"] < 0.5]
    wrong = [wrong[i * len(wrong) // cfg.show] for i in range(cfg.show)] if len(wrong) > cfg.show else wrong
    if not wrong:
        print("--show: no wrong answer to show")
        return
    pictures, high = pictures_of([item for item, _ in wrong], cfg), side + 150
    columns = min(columns, len(wrong))
    sheet = Image.new("RGB", (columns * (side + 16) + 16, -(-len(wrong) // columns) * high + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (item, r) in enumerate(wrong):
        x, y = 16 + k % columns * (side + 16), 16 + k // columns * high
        for source in pictures[item["id"]][0][:1]:
            picture = open_picture(source)
            scale = side / max(picture.size)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.BICUBIC)
            sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        row = y + side + 6
        for label, value, color, most in (("", item["question"], "#222222", 5), ("said: ", r["answer"], "#c03020", 2), ("truth: ", r["truth"], "#207030", 2)):
            for line in wrapped(f"{label}{value if value not in (None, '') else '(nothing)'}", pen, side)[:most]:
                pen.text((x, row), line, fill=color, font_size=12)
                row += 15
    write_whole(path, lambda tmp: sheet.save(tmp, format="PNG"))
    print(f"{len(wrong)} wrong answers are in {path}")


def wrapped(text, pen, side):
    """The text in lines that fit, also where a language has no spaces."""
    found = []
    for line in text.split("\n"):
        found.append("")
        for word in re.findall(r"\S{1,16}\s*", line):
            if found[-1] and pen.textlength(found[-1] + word.rstrip(), font_size=12) > side:
                found.append("")
            found[-1] += word
    return found


def parse(argv):
    cli = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, toys = cli.add_argument, [f"toy-{name}" for name in TOY]
    add("--benchmark", nargs="+", default=toys, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; or, on the toy world, {', '.join(toys)} (default: all of the toy's)")
    add("--data", default="", metavar="DIR", help="folder with the official files under their official names, or the one annotation file; of toy-...: the toy world (default toyworld)")
    add("--image-root", default="", metavar="DIR", help="folder that the pictures' official paths start from (default: --data)")
    add("--predictions", default="", metavar="FILE", help="score these answers, in the benchmark's own result format or LLaVA's; no model is opened")
    add("--split", default="", help="val, test, testA, ...; empty: the one with public labels")
    add("--limit", type=int, default=0, metavar="N", help="about this many questions, drawn at random but always the same; pairs and circular groups stay whole (default 0: all)")
    add("--out", default="", metavar="DIR", help="folder for results.json and the rest; with several benchmarks one folder in it each (default out/eval/NAME)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help="leave out the questions that an interrupted run has answered")
    add("--blind", default="", choices=["", "none", "other"], help="baseline column: ask without picture, or with another record's")
    add("--cot", action=argparse.BooleanOptionalAction, default=False, help="ask for a chain of thought, and directly in a column beside it; also: read --predictions so")
    add("--compare", default="", metavar="RESULTS", help="results.json of another model: paired test")
    add("--show", type=int, default=0, metavar="N", help="draw N wrong answers with picture, question, answer and truth into wrong.png")
    add("--family", default="", choices=["", "llava", "prismatic", "internvl"], help="whose prompts and readers, where they differ (default: the model's, by its template)")
    add("--likelihood", action=argparse.BooleanOptionalAction, default=None, help="POPE, VSR, TallyQA, AI2D: the likeliest of the candidates' tokens (default: Prismatic's models)")
    add("--box-frame", default="original", choices=["original", "square"], help="what the model's boxes are fractions of: the picture, or its padded square (default original)")
    add("--model", default="", metavar="DIR", help="model directory; empty: the newest finished run under out/")
    add("--vision", metavar="DIR[,DIR]", help="tower of a model that was published without")
    add("--llm", metavar="DIR", help="base of a LoRA")
    add("--template", default="", help="conversation template; empty: the model's own")
    add("--image-mode", default="", help=f"{', '.join(MODES)}; empty: the model's own")
    add("--batch-size", type=int, default=32, metavar="N", help="questions answered at once (default 32)")
    add("--max-new-tokens", type=int, default=0, metavar="N", help="longest answer in tokens (default 0: the benchmark's, 16 to 1024)")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto (default auto)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights (default float32)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    cfg.benchmark = [find_name(name) for name in cfg.benchmark]
    for flag, value, least in ("limit", cfg.limit, 0), ("show", cfg.show, 0), ("batch-size", cfg.batch_size, 1), ("max-new-tokens", cfg.max_new_tokens, 0):
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    if cfg.predictions and (len(cfg.benchmark) > 1 or cfg.blind):
        raise UserError("--predictions goes with one --benchmark, and without --blind: there is no model to ask again")
    if cfg.resume and cfg.predictions:
        raise UserError("--resume is for a model's answers; --predictions has them all")
    return cfg


def find_name(name):
    """MMBench, mm_vet, seed: any spelling of one name."""
    known = {re.sub(r"[^a-z0-9+]", "", n.lower()): n for n in [*BENCHMARKS, *(f"toy-{t}" for t in TOY)]} | ALIASES
    key = re.sub(r"[^a-z0-9+]", "", name.lower())
    if key not in known:
        one_of("--benchmark", name, sorted(set(known.values())))
    return known[key]


if __name__ == "__main__":
    sys.exit(run(main))
