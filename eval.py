"""Every benchmark of the three papers, scored as its authors score it.

    python eval.py                                                       # the newest run under out/ on the toy world's benchmarks
    python eval.py --benchmark pope --data DIR --image-root DIR          # official files under their official names
    python eval.py --benchmark gqa --data DIR --predictions FILE         # answers that somebody else produced; no model is opened

A benchmark is a row of BENCHMARKS near the end of this file, a few functions of a few lines each:
    read   official files -> items {"id", "image", "question", "suffix", "truth", ...}; the prompt is the question, a newline, the suffix
    judge  (item, answer) -> {"parsed", "score"}: text to label to verdict (0 to 1), one answer at a time
    total  records -> further metrics, by their official names
    units  records -> for each unit of the benchmark (question, picture, circular group) a row of counts whose column sums give the
           headline figure. So the 95% interval is a bootstrap over units, of that very figure.
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

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
import argparse
import ast
import base64
import functools
import io
import json
import math
import os
import re
import sys
import time

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
import numpy as np
import torch

import toyworld
from conversation import cut_at_stop, encode_prompt, stop_ids
import sample as asking
from sample import newest_run, open_model
from support.cli import Flags, UserError, one_of, parse_args, pick_device, run
from support.distributed import rank
from support.io import entries, need, read_any, read_pickle, write_whole, write_xlsx
from toyworld import COT, INSUFFICIENT, LETTER, SHORT
from vision import MODES, cut_tiles, join_pictures, open_image



def examine(vlm, tok, questions, out):
    """Answer every held-out question, print accuracy by category beside two baselines, and write results.json."""
    began = time.time()
    names = list(dict.fromkeys(path for q in questions for path in q["paths"]))
    other = {name: names[(i + len(names) // 2) % len(names)] for i, name in enumerate(names)}      # each question meets another picture
    said = answer_questions(vlm, tok, questions)
    blind = answer_questions(vlm, tok, [q | {"paths": [other[p] for p in q["paths"]]} for q in questions])
    commonest = {}                                                          # by category, of what is compared: of a worked answer its end
    for c in {q["category"] for q in questions}:
        truths = [q["answer"] for q in questions if q["category"] == c]
        top = Counter(map(final, truths)).most_common(1)[0][0]
        commonest[c] = next(t for t in truths if final(t) == top)
    right = [{"accuracy": is_right(a, q["answer"]), "most_frequent": is_right(commonest[q["category"]], q["answer"]), "shuffled": is_right(b, q["answer"])}
             for q, (a, *_), (b, *_) in zip(questions, said, blind)]
    table = {}
    for category in [*dict.fromkeys(q["category"] for q in questions), "all"]:
        rows = [r for q, r in zip(questions, right) if category in (q["category"], "all")]
        table[category] = {"n": len(rows)} | {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    print(f"\nheld-out accuracy, {len(questions)} questions in {time.time() - began:.0f} s"
          f"\n{'':14s}{'n':>6s}{'accuracy':>10s}{'most frequent answer':>22s}{'shuffled pictures':>19s}")
    for name, row in table.items():
        print(f"{name:14s}{row['n']:6d}{row['accuracy']:10.1%}{row['most_frequent']:22.1%}{row['shuffled']:19.1%}")
    n_cut = sum(not given.whole for given in said)
    print(f"{n_cut} of {len(said)} answers were cut off for being too long")
    answers = [{"question_id": q["id"], "category": q["category"], "prompt": q["text"], "text": a, "truth": q["answer"], "right": r["accuracy"], "cut_off": not whole}
               for q, (a, whole, _), r in zip(questions, said, right)]
    if rank() == 0:
        write_whole(out / "results.json", lambda tmp: tmp.write_text(json.dumps({"table": table, "cut_off": n_cut, "records": answers}, indent=1)))



def answer_questions(vlm, tok, questions):
    """[{"text", "paths"}, ...] -> [Answer, ...]"""
    pictures = {path: asking.open_picture(vlm, path) for q in questions for path in q["paths"]}
    prompts = [asking.encode_question(vlm, tok, q["text"], [pictures[p] for p in q["paths"]]) for q in questions]
    return asking.answer(vlm, tok, prompts)



def is_right(said, truth):
    """Exact match but for case and a final dot; of a worked answer what follows `Final answer:`; of a box, IoU >= 0.5 (RefCOCO)."""
    box = re.compile(r"\[(\d\.\d+), (\d\.\d+), (\d\.\d+), (\d\.\d+)\]")
    if box.fullmatch(truth):
        found = box.search(said)
        return bool(found) and iou(*([float(x) for x in m.groups()] for m in (found, box.fullmatch(truth)))) >= 0.5
    return ("Final answer:" in said) == ("Final answer:" in truth) and final(said) == final(truth)



def final(text):
    return text.rsplit("Final answer:", 1)[-1].strip().rstrip(".").lower()



def iou(a, b):
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    area = lambda x1, y1, x2, y2: max(0.0, x2 - x1) * max(0.0, y2 - y1)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / max(area(*a) + area(*b) - both, 1e-9)



LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"



def main(argv=None):
    cfg = parse(argv)
    model = None if cfg.predictions else Model(cfg)
    results = [evaluate(name, cfg, model) for name in cfg.benchmark]
    print("\n" + table(results))
    return 0



def evaluate(name, cfg, model):
    """One benchmark from its files to results.json, which is returned."""
    official, began = name.removeprefix("toy-"), time.time()
    bench = BENCHMARKS[official]
    out = Path(cfg.out) if cfg.out and len(cfg.benchmark) == 1 else Path(cfg.out or "out/eval") / name
    cfg = but(cfg, name=official, family=cfg.family or (model.family if model else "llava"))
    if cfg.likelihood is None:
        cfg.likelihood = bool(model) and cfg.family == "prismatic"
    if name.startswith("toy-"):
        cfg = but(cfg, image_root=cfg.image_root or cfg.data or "toyworld", data=toy_files(official, cfg, out / "official"))
    if not cfg.data:
        raise UserError(f"--benchmark {name}: give --data DIR, the folder with its official files, and --image-root DIR")
    if not Path(cfg.data).exists():
        raise UserError(f"--data {cfg.data}: no such folder; give the one with the official files of {name}")
    items = list(bench.read(cfg))
    if not items:
        raise UserError(f"{cfg.data}: no question of {name} in it; check --data and --split")
    if twice := [id for id, n in Counter(item["id"] for item in items).items() if n > 1]:
        raise UserError(f"{cfg.data}: two questions of {name} have the id {twice[0]!r}, so their answers cannot be told apart; get the files again")
    if cfg.predictions:
        rows = match_up(bench, items, cfg)
        items = some_of(items, cfg.limit)
        columns = {"score": grade(bench, items, rows, cfg, cfg.cot)}
    else:
        items = some_of(items, cfg.limit)
        modes = ({"cot": True} if cfg.cot else {}) | {"direct": False} | ({"blind": cfg.cot} if cfg.blind else {})     # is it a chain of thought?
        answers = ask(model, bench, items, modes, cfg, out)
        columns = {mode: grade(bench, items, answers[mode], cfg, cot) for mode, cot in modes.items()}
    main_mode, *others = columns
    result = {"benchmark": name} | columns[main_mode]
    records = result.pop("records")
    if model:
        result |= {"model": model.name, "prompts": f"{cfg.family}, {main_mode}",
                   "answers": "likelihood" if cfg.likelihood and "candidates" in items[0] else "generated"}
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
    rows = [{"question_id": r["id"], "prompt": r["prompt"], "text": r["answer"], "answer_id": f"{name}-{k}",
             "model_id": result.get("model", ""), "metadata": {}} for k, r in enumerate(records)]
    files = {"answers.jsonl": rows} | bench.submit(items, records)
    for file, content in (files | {"results.json": json.dumps(result, indent=1, ensure_ascii=False)}).items():
        write_whole(out / file, lambda tmp: tmp.write_bytes(packed(file, content)))
    if cfg.show:
        contact_sheet(items, records, cfg, out / "wrong.png")
    report(result, len({str(item["image"]) for item in items if item["image"]}), files, out, time.time() - began)
    return result



def but(cfg, **changes):
    return argparse.Namespace(**vars(cfg) | changes)



def grade(bench, items, rows, cfg, cot):
    """Answers {item id: row} -> the result of one column, with its records. A missing answer counts as wrong."""
    records = []
    for item in items:
        row, picture = rows.get(item["id"]), item["image"]
        record = {"id": item["id"], "image": picture if isinstance(picture, (str, list)) else None, "prompt": prompt_of(item, cot),
                  "answer": None, "parsed": None, "truth": item["truth"], "score": 0.0}
        if row is None:
            record["missing"] = True
        else:
            record["answer"] = text = answer_in(row) or ""
            record |= {k: row[k] for k in ("cut_off", "p", "first") if k in row}
            record |= bench.judge(item, final_answer(text) if cot and "then" not in item else text, row, cfg)
        if item["truth"] is None:                                           # labels are hidden
            record["score"] = None
        if "unit" in item:
            record["unit"] = item["unit"]
        records.append(record | {"item": item})
    metrics, scored, score, ci = {}, [r for r in records if r["score"] is not None], None, None
    if scored:
        metrics, (tally, headline) = bench.total(scored), bench.units(scored)
        if len(tally):
            tally = np.asarray(tally, dtype=float)
            score = metrics[bench.figure] if bench.figure in metrics else headline(tally.sum(0))
            ci = interval(tally, headline)
    for r in records:
        del r["item"]
    given = [r for r in records if "missing" not in r]
    bad = sum(r["parsed"] in (None, "") for r in given)
    judged = metrics.pop("judged", False) or not bench.proxy
    figures = {"score": score, "ci95": ci} if judged else {"score": None, "ci95": None, "proxy": score, "proxy_ci95": ci}
    return {"n": metrics.pop("n", len(records))} | figures | {
        "unparsed": bad / len(given) if given else 0.0, "n_unparsed": bad, "missing": len(records) - len(given),
        "cut_off": sum("cut_off" in r for r in records), "metric": bench.metric} | metrics | {"records": records}



def interval(tally, headline, n=1000):
    """95% percentile bootstrap over the rows of `tally`, the benchmark's units; the same every time."""
    draw, u = np.random.default_rng(0), len(tally)
    figures = [headline(np.bincount(draw.integers(u, size=u), minlength=u) @ tally) for _ in range(n)]
    figures = [f for f in figures if f is not None and math.isfinite(f)]
    return [float(x) for x in np.percentile(figures, [2.5, 97.5])] if figures else None



def compare(records, file):
    """Paired test against another results.json: the same units, their difference, and how often chance signs alone give as much."""
    other, _ = read_any(file)
    theirs = other.get("records") if isinstance(other, dict) else None
    if not isinstance(theirs, list) or not all(isinstance(r, dict) and "id" in r and "score" in r for r in theirs):
        raise UserError(f"--compare {file}: not a results.json of eval.py; it has no records with id and score")
    ours, theirs = per_unit(records), per_unit(theirs)
    both = [unit for unit in ours if unit in theirs]
    if not both:
        raise UserError(f"--compare {file}: shares no scored question with this run; compare runs of the same benchmark")
    d = np.array([ours[unit] - theirs[unit] for unit in both])
    draw, sizes = np.random.default_rng(0), Counter(np.round(abs(d[d != 0]), 9).tolist())
    chance = sum(size * (2 * draw.binomial(k, 0.5, 100_000) - k) for size, k in sizes.items()) if sizes else np.zeros(100_000)
    p = (1 + np.sum(np.abs(chance) >= abs(d.sum()) - 1e-9)) / 100_001
    return {"with": str(file), "n": len(both), "ours": 100 * mean(ours[u] for u in both), "theirs": 100 * mean(theirs[u] for u in both),
            "difference": 100 * float(d.mean()), "ci95": interval(np.stack([d, np.ones_like(d)], 1), percent),
            "better": int((d > 0).sum()), "worse": int((d < 0).sum()), "p": float(p),
            "test": "paired sign-flip permutation of per-unit scores, two-sided"}



def per_unit(records):
    """{question, picture or circular group: its score}"""
    scores = defaultdict(list)
    for r in records:
        if r["score"] is not None:
            scores[r.get("unit", r["id"])].append(r.get("unit_score", r["score"]))
    return {unit: mean(found) for unit, found in scores.items()}



def percent(sums):
    """Mean in percent, of columns (score, 1)."""
    return 100 * float(sums[0] / sums[1]) if sums[1] else None



def mean(scores):
    scores = list(scores)
    return sum(scores) / len(scores) if scores else None



class Model:
    """A VLM, its tokenizer, and which family's prompts it is asked with."""

    def __init__(self, cfg):
        self.device, directory = pick_device(cfg.device), cfg.model or newest_run()
        self.vlm, self.tok = open_model(directory, self.device, cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)
        self.name, self.template, self.mode = str(directory), self.vlm.cfg.template, self.vlm.cfg.image_mode
        self.family = "internvl" if self.template.startswith("intern") else "prismatic" if self.template.startswith("prism_") else "llava"
        self.longest = self.vlm.cfg.decoder.block_size
        self.stop = stop_ids(self.tok, self.template)

    def cut(self, picture):
        return cut_tiles(open_picture(picture), self.vlm.cfg.vision, self.mode)

    def encode(self, turns, pictures, cut=None):
        """-> prompt ids (T,), (tiles (n, 3, S, S), layout (M, 2)) or None. `cut`: self.cut, or one that remembers."""
        cut = [(cut or self.cut)(p) for p in pictures]
        words = [(role, text.replace("<image>", "image") if cut else text) for role, text in turns]      # its text has no places for pictures
        words[0] = ("human", "<image>" * len(cut) + "\n" * bool(cut) + words[0][1])
        return encode_prompt(self.tok, words, self.template, [len(layout) for _, layout in cut]), join_pictures(cut) if cut else None

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
        logits = self.vlm(tokens, **pictures)[torch.arange(len(encoded)), torch.tensor(lengths) - 1].float()            # (B, V)
        p = logits[:, [i for i, in ids]].softmax(-1).cpu()                  # (B, candidates): the rest of the vocabulary divides out
        return [(candidates[int(row.argmax())], [round(x, 6) for x in row.tolist()]) for row in p]

    def batch(self, encoded):
        """-> tokens (B, T), lengths, {pixels, layout}: a picture that questions share is looked at once."""
        lengths = [len(ids) for ids, _ in encoded]
        tokens = torch.tensor([ids + [self.tok.pad] * (max(lengths) - len(ids)) for ids, _ in encoded], device=self.device)
        first, tiles, layouts = {}, [], []
        for _, picture in encoded:
            if picture is None:
                continue
            key = picture[0].numpy().tobytes()
            if key not in first:
                first[key] = sum(map(len, tiles))
                tiles.append(picture[0])
            layouts.append(torch.where(picture[1][:, :1] < 0, picture[1], picture[1] + torch.tensor([first[key], 0])))
        pixels, layout = (torch.cat(x).to(self.device) for x in (tiles, layouts)) if tiles else (None, None)
        return tokens, lengths, {"pixels": pixels, "layout": layout}



def ask(model, bench, items, modes, cfg, out):
    """Every item in every mode -> {mode: {id: {"text", ...}}}. Batches are cut once, by length, from all items: --resume leaves out whole
    batches only, so that each answer comes from the same arithmetic as in an uninterrupted run."""
    progress, done = out / "progress.jsonl", {}
    head = {k: v for k, v in vars(cfg).items() if k not in ("out", "resume", "device", "show", "compare", "benchmark", "predictions")} | {
        "model": model.name, "weights": stamp(model.name), "questions": len(items)}
    head = json.loads(json.dumps(head, default=str))
    if cfg.resume and progress.exists():
        whole = [line for line in progress.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        before, *rows = [json.loads(line) for line in whole] or [{}]
        if changed := [k for k in head if before.get(k) != head[k]]:
            raise UserError(f"--resume: {progress} was written with {changed[0]} {before.get(changed[0])!r}, now it is {head[changed[0]]!r}; "
                            "give the same flags, or leave out --resume")
        done = {(row["mode"], row["id"]): row for row in rows}
    write_whole(progress, lambda tmp: tmp.write_text(lines([head, *done.values()]), encoding="utf-8"))
    jobs = []
    for mode, cot in modes.items():
        by_length, about = sorted(items, key=lambda item: len(prompt_of(item, cot))), {}      # ends with the longest about each picture
        for item in by_length:
            about[str(item["image"]), form_of(item, cot)] = len(prompt_of(item, cot))
        order = sorted(by_length, key=lambda item: (form_of(item, cot), about[str(item["image"]), form_of(item, cot)], str(item["image"])))
        jobs += [(mode, order[i : i + cfg.batch_size]) for i in range(0, len(order), cfg.batch_size)]
    pictures, todo = pictures_of(items, cfg), [job for job in jobs if any((job[0], item["id"]) not in done for item in job[1])]
    total, left = len(items) * len(modes), sum(len(batch) for _, batch in todo)

    def prepare(job):
        mode, batch = job
        turns = [[("human", prompt_of(item, modes[mode]))] for item in batch]
        shown = [pictures[item["id"]][mode == "blind"] for item in batch]
        cut = functools.cache(model.cut)                                    # a picture of several questions is opened once
        return turns, shown, [model.encode(t, p, cut) for t, p in zip(turns, shown)]

    with (open(progress, "a", encoding="utf-8") as log, ThreadPoolExecutor(1) as ahead,
          tqdm(total=total, initial=total - left, unit="question", desc=cfg.name, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar):
        waiting = ahead.submit(prepare, todo[0]) if todo else None
        for k, (mode, batch) in enumerate(todo):
            turns, shown, encoded = waiting.result()
            waiting = ahead.submit(prepare, todo[k + 1]) if k + 1 < len(todo) else None      # pictures of the next batch, while this one is answered
            for item, row in zip(batch, answer(model, bench, batch, turns, shown, encoded, modes[mode], cfg)):
                done[mode, item["id"]] = row = {"mode": mode, "id": item["id"]} | row
                log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            bar.update(len(batch))
    return {mode: {item["id"]: row for item in items if not (row := done[mode, item["id"]]).get("too_long")} for mode in modes}



def answer(model, bench, batch, turns, shown, encoded, cot, cfg):
    """One batch -> rows {"text", ...} in its order. A question near the model's length is asked alone: nobody's answer depends on its neighbours."""
    if cfg.likelihood and "candidates" in batch[0] and not cot:
        return [{"text": text, "p": p} for text, p in model.likeliest(encoded, batch[0]["candidates"])]
    want = min(cfg.max_new_tokens or (4096 if cot else bench.longest), model.longest // 2)
    rows = [None] * len(batch)

    def generate(which, encoded):
        fit = [k for k in which if len(encoded[k][0]) + want <= model.longest]
        for group in [fit] * bool(fit) + [[k] for k in which if k not in fit]:
            room = want if group is fit else min(want, model.longest - len(encoded[group[0]][0]))
            if room < 1:
                rows[group[0]] = {"text": "", "too_long": len(encoded[group[0]][0])}
                continue
            for k, (text, whole) in zip(group, model.generate([encoded[k] for k in group], room)):
                rows[k] = {"text": text} | ({} if whole else {"cut_off": True})

    generate(list(range(len(batch))), encoded)
    again = [k for k, item in enumerate(batch) if item.get("then") and rows[k]["text"]]      # M3CoT asks a second time; an empty turn is no turn
    if again:
        first = {k: rows[k]["text"] for k in again}
        generate(again, {k: model.encode(turns[k] + [("gpt", first[k]), ("human", batch[k]["then"])], shown[k]) for k in again})
        for k in again:
            rows[k]["first"] = first[k]
    return rows



def prompt_of(item, cot):
    """The text after the picture. `cot`: the direct instruction makes way for InternVL's frame, or for the benchmark's own."""
    if cot:
        return item.get("cot", COT + item["question"])
    return item["question"] + ("\n" + item["suffix"] if item["suffix"] else "")



def form_of(item, cot):
    """How long the answer will be, as far as the prompt tells (steps, or a word or letter): a batch runs until its longest one has ended."""
    prompt = prompt_of(item, cot)
    return COT in prompt, SHORT in prompt or LETTER in prompt



def pictures_of(items, cfg):
    """{id: (its pictures, the pictures of the blind baseline: none, or another record's)}; what is missing is said before the first answer."""
    root = Path(os.path.abspath(cfg.image_root or folder(cfg.data)))
    if not root.is_dir():
        raise UserError(f"--image-root {cfg.image_root}: no such folder")
    found, known = {}, {}
    for item in items:
        names = item["image"] if isinstance(item["image"], list) else [] if item["image"] is None else [item["image"]]
        for name in names:
            if name not in known:
                known[name] = name if isinstance(name, bytes) else find_picture(root, name, item["id"])
        found[item["id"]] = [known[name] for name in names]
    some = list(dict.fromkeys(p[0] for p in found.values() if p))
    other = {p: some[(i + max(1, len(some) // 2)) % len(some)] for i, p in enumerate(some)} if cfg.blind == "other" else {}
    return {id: (paths, [other.get(p, p) for p in paths] if cfg.blind == "other" else []) for id, paths in found.items()}



def find_picture(root, name, id):
    """The official place under the image root, or the bare name in it, or in a folder images/; as .jpg or .png, for SEED-Bench's names
    have no ending."""
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
    few more may come."""
    units = list(dict.fromkeys(item.get("unit", item["id"]) for item in items))
    if not limit or limit >= len(items):
        return items
    kept = set(sample(units, limit * len(units) / len(items)))
    return [item for item in items if item.get("unit", item["id"]) in kept]



def sample(rows, n):
    """About n of them, in their order. Not the first ones, which would be of one kind, nor every k-th: POPE's answers alternate."""
    return [rows[i] for i in sorted(np.random.default_rng(21).permutation(len(rows))[: max(1, round(n))])]



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



def split_of(cfg, files):
    """--split, or the first of {split: file} that is there (those with public labels stand first) -> split, path"""
    there = [split for split, name in files.items() if Path(cfg.data).name == name or find(cfg.data, name, optional=True)]
    split = cfg.split or (there or list(files))[0]
    one_of("--split", split, list(files))
    return split, find(cfg.data, files[split])



def named(form, *splits):
    return {split: form.format(split) for split in splits}



def beside(cfg, name, optional=False):
    """A further file, in the same folder as what --data names."""
    return find(folder(cfg.data), name, optional=optional)



def within(where, name, value, known):
    """A field that must have one of a few values."""
    if value not in known:
        raise UserError(f'{where}: "{name}" is {value!r}; it must be one of {", ".join(map(str, known))}')



def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)



def packed(file, content):
    """What is written under this name: text and bytes as they are, rows as JSON Lines, all else as JSON."""
    if not isinstance(content, (str, bytes)):
        content = lines(content) if file.endswith(".jsonl") else json.dumps(content, ensure_ascii=False)
    return content if isinstance(content, bytes) else content.encode()



def toy_files(name, cfg, out):
    """Write the toy world's held-out questions of one kind as that benchmark's official files, which `read` then reads like any others:
    all of them, or what --limit asks for. -> the folder"""
    world = Path(cfg.data or "toyworld")
    if str(world) == "toyworld" and not world.exists():
        toyworld.write_world(world)
    rows = [(k, row) for _, k, row in entries(world / "val.jsonl") if row.get("category") in toyworld.OFFICIAL[name].split()]
    if cfg.limit and not cfg.predictions:
        rows = sample(rows, cfg.limit / toyworld.PER_LINE.get(name, 1))
    for file, content in toyworld.official(name, rows, world).items():
        write_whole(out / file, lambda tmp: tmp.write_text(content, encoding="utf-8"))
    return out



TEXT_KEYS = ("text", "prediction", "response", "answer", "extraction", "content", "output")
ID_KEYS = ("question_id", "questionId", "index", "pid", "id", "sent_id", "image")
QUESTION_KEYS = ("question", "prompt", "caption", "sent", "sentence")



def answer_in(row):
    """The answer in a result row of any benchmark's own format, None where there is none."""
    if isinstance(row.get("messages"), list):                               # of a conversation, the last turn
        return str(row["messages"][-1]) if row["messages"] else ""
    keys = [k for k in TEXT_KEYS if k != "answer" or "choices" not in row]  # a row that repeats its problem has the truth there
    return next((str(row[k]) for k in keys if isinstance(row.get(k), (str, int, float))), None)



def match_up(bench, items, cfg):
    """--predictions -> {item id: row}, joined by id and never by position. Unknown and repeated ids are errors."""
    found, index = {}, defaultdict(list)
    for item in items:
        for key in [str(item["id"]), *item.get("keys", [])]:
            index[key].append(item["id"])
    for where, row in (bench.predictions or predicted)(cfg, items):
        ids = [str(row[k]) for k in ID_KEYS if isinstance(row.get(k), (str, int, float))]
        asked = [line.strip().lower() for k in QUESTION_KEYS if isinstance(row.get(k), str) for line in row[k].split("\n")]
        meant = next((index[key] for key in [row.get("key"), *ids, *((i, q) for i in ids for q in asked)] if key in index), None)
        if not ids and "key" not in row:
            raise UserError(f"{where}: no id in it; one of {', '.join(ID_KEYS)} is needed")
        if meant is None:
            raise UserError(f"{where}: answers {ids[0] if ids else row['key']!r}, which is no question of {cfg.data}")
        if answer_in(row) is None and not {"tuple", "score"} & row.keys():
            raise UserError(f"{where}: no answer in it; one of {', '.join(TEXT_KEYS)} is needed, as text")
        id = next((i for i in meant if i not in found), None)               # the same question about one picture may be asked twice
        if id is not None:
            found[id] = row
        elif cfg.name != "m3cot":                                           # there the first record of an id counts
            raise UserError(f"{where}: a second answer to {meant[0]!r}; each question is answered once")
    lost = [item["id"] for item in items if item["id"] not in found]
    if lost and bench.all_needed:
        raise UserError(f"{cfg.predictions}: no answer to {lost[0]!r} ({len(lost)} of {len(items)} are missing); "
                        "the official scorer refuses such a file")
    return found



def predicted(cfg, items):
    """(where, row) of a file in any of the usual forms; {id: text} and {id: {...}} become rows too."""
    path = Path(cfg.predictions)
    if not path.is_file():
        raise UserError(f"--predictions {path}: no such file")
    found, name = read_any(path)
    if isinstance(found, dict) and isinstance(found.get("results"), dict):
        found = found["results"]
    if not isinstance(found, (list, dict)) or not found:
        raise UserError(f"{path}: holds no answers; expected a list or an object of them")
    for k, row in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(found, dict):
            row = {"id": k} | (row if isinstance(row, dict) else {"text": row})
        if not isinstance(row, dict):
            raise UserError(f"{name(k)}: {str(row)[:60]!r} is not a record")
        yield name(k), row



PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'                                      # in the official order; not ' : % $ # & * ~ ^ |
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
# The official table maps a word that lacks one of its apostrophes to the whole word, for these words, and has three entries of another kind
WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's I'd've
I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in WHOLE for i, mark in enumerate(word) if mark == "'"} | {
    "let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
# VizWiz's own copy of the scorer has backticks for apostrophes, on both sides. So "dont" there never meets an annotator's "don't", and a key
# with a backtick never fires, as backticks are punctuation and gone by then; these were forgotten
STRAIGHT = ("couldn'tve", "hadn'tve"), "aint arent cant couldve couldnt weve wheres whove".split()
BACKTICKS = {k: v if k in STRAIGHT[1] else v.replace("'", "`") for k, v in CONTRACTIONS.items() if "'" not in k or k in STRAIGHT[0]}



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



def true_or_false(text):
    found = re.search(r"\b(true|false)\b", text, re.IGNORECASE)
    return found[1].capitalize() if found else None



def option_letter(text, n):
    """AI2D: the letter alone, or `B.`, `(B)`, `B. leaf`, `B) leaf`, `B: leaf` -> letter or None."""
    found = re.match(r"\(?([A-Z])(?:$|[.):](?:\s|$))", text.strip())
    return found[1] if found and found[1] in LETTERS[:n] else None



REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.", "I'm sorry, but without the image provided",
            "Cannot determine the answer")



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



def internvl_letter(text, choices):
    """InternVL's own reading of M3CoT: a lone character, a leading letter, an option's text, `A.`, `(A)`; the first of these that occurs."""
    text, pairs = text.strip(), list(zip(LETTERS, choices))
    if len(text) == 1:
        return text if text in LETTERS else None
    if text and text[0] in dict(pairs):
        return text[0]
    for form in (lambda letter, choice: choice in text, lambda letter, choice: f"{letter}." in text, lambda letter, choice: f"({letter})" in text):
        if there := [letter for letter, choice in pairs if form(letter, choice)]:
            return there[0]
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
        if item["answer_type"] == "integer":
            return str(int(float(extraction)))
        if item["answer_type"] == "float":
            return str(round(float(extraction), int(precision)))
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction)



def mathvista_extract(text, item):
    """What the official pipeline asks GPT-4 for, by rule: its own short cuts, then the last option letter or the last number.
    -> text, was a rule of ours needed?"""
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



WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
         "nineteen twenty").split()



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
    """Convention K: -> pixel box in float32; None, which overlaps with nothing, where none was found."""
    found = re.search(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*", text)
    try:
        box = np.array([float(x) for x in found.groups()], dtype=np.float32)
    except (AttributeError, ValueError):
        return None
    if not np.isfinite(box).all():                                          # float() reads "nan" and "inf", of which no IoU is a number
        return None
    return (box / np.float32(1000) if box.sum() >= 4 else box) * np.array([w, h, w, h], dtype=np.float32)



def iou32(a, b):
    """IoU in float32 as torchvision's, without repair of reversed corners."""
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    side = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = side[0] * side[1]
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return float(both / union) if union else 0.0



def ask_for(id, image, question, suffix, truth, **more):
    """An item. `more`: `keys` by which an answer may be known besides the id, `unit`, `candidates` for --likelihood, what judge and total want."""
    return {"id": id, "image": image, "question": question, "suffix": suffix, "truth": truth} | more



def options(choices):
    return "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))



def bracketed(choices):
    return "".join(f"\n({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))



def right(label, truth):
    return {"parsed": label, "score": float(label is not None and label == truth)}



def reads(label):
    """The judge of a benchmark whose answers are labels: label(text, item) -> one of them, or None."""
    return lambda item, text, row, cfg: right(label(text, item), item["truth"])



def groups(records, name):
    """{value: records} by what their items say of `name`; where they say a list, a record is in several groups."""
    found = defaultdict(list)
    for r in records:
        said = r["item"].get(name)
        for value in said if isinstance(said, list) else [said]:
            found[str(value)].append(r)
    return found



def share(records):
    return mean(r["score"] for r in records)



def vqa_percent(records):
    """Rounded as the VQA scorers do, which multiply before they divide."""
    return round(100 * sum(r["score"] for r in records) / len(records), 2) if records else None



def two_decimals(records):
    """Rounded as GQA's and ScienceQA's scorers do, which divide before they multiply."""
    return round(100 * share(records), 2) if records else None



def per(records, name, figure=lambda records: 100 * share(records)):
    return {value: figure(rs) for value, rs in groups(records, name).items()}



def correct_of(records):
    return {"correct": int(sum(r["score"] for r in records)), "total": len(records)}



def accuracy(records):
    return {"accuracy": share(records)}



def each(records):
    """The units of a benchmark whose figure is the mean score."""
    return [[r["score"], 1] for r in records], percent



def tally_of(units, part, cells, headline):
    """Of lists of records, each a unit of one part (split, subtask): cells(records) -> four counts. -> a row per unit, with its counts in the
    columns of its part, and headline({part: counts}) as a function of the column sums."""
    parts = list(dict.fromkeys(unit[0]["item"][part] for unit in units))
    tally = np.zeros((len(units), len(parts), 4))
    for row, unit in zip(tally, units):
        row[parts.index(unit[0]["item"][part])] = cells(unit)
    return tally.reshape(len(units), -1), lambda sums: float(headline(dict(zip(parts, sums.reshape(-1, 4)))))



def answers_as(name, id_key="question_id", text_key="answer", clean=str):
    return lambda items, records: {name: [{id_key: r["id"], text_key: clean(r["answer"] or "")} for r in records]}



def nothing(items, records):
    return {}                                                               # answers.jsonl is all there is to hand in



def answer_texts(where, answers):
    return [need(f"{where}, answer {k}", a if isinstance(a, dict) else {}, answer=str) for k, a in enumerate(answers)]



def ranking(scores, positive):
    """Areas under the ROC curve and under the precision-recall curve (average precision), as scikit-learn has them."""
    scores, positive = np.array(scores, dtype=float), np.array(positive, dtype=float)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.diff(scores[order]) != 0, True)                     # equal scores are one threshold
    hits, said = np.cumsum(positive[order])[ends], np.arange(1, len(scores) + 1)[ends]
    recall, false = np.append(0, hits / max(hits[-1], 1)), np.append(0, (said - hits) / max(said[-1] - hits[-1], 1))
    return {"roc_auc": float(np.sum(np.diff(false) * (recall[1:] + recall[:-1]) / 2)), "pr_auc": float(np.sum(np.diff(recall) * hits / said))}



def ranked(records, yes):
    """--likelihood: how well the first candidate's probability tells the true statements from the others."""
    asked = [r for r in records if "p" in r]
    return ranking([r["p"][0] for r in asked], [r["truth"] == yes for r in asked]) if asked else {}



def read_vqav2(cfg):
    stem = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
    (split, path), labels = split_of(cfg, {s: f"v2_OpenEnded_mscoco_{year}_questions.json" for s, year in stem.items()}), {}
    if split == "val":
        where_from = beside(cfg, "v2_mscoco_val2014_annotations.json")
        for where, _, row in entries(where_from, "annotations"):
            id, answers, _ = need(where, row, question_id=int, answers=list, answer_type=str)
            labels[id] = row | {"answers": answer_texts(where, answers)}
    whole = None if split == "val" else beside(cfg, "v2_OpenEnded_mscoco_test2015_questions.json", optional=True)
    for where, _, row in entries(path, "questions"):
        id, image, question = need(where, row, question_id=int, image_id=int, question=str)
        if split == "val" and id not in labels:
            raise UserError(f"{where}: no annotation of question {id} in {where_from}")
        kind, label = ("val2014" if split == "val" else "test2015"), labels.get(id, {})
        yield ask_for(id, f"{kind}/COCO_{kind}_{image:012d}.jpg", question, SHORT, label.get("answers"), whole=whole,
                      answer_type=label.get("answer_type"), question_type=label.get("question_type"))



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



def total_vqav2(records):
    parts = lambda name: dict(sorted(per(records, name, vqa_percent).items()))
    return {"overall": vqa_percent(records), "perAnswerType": parts("answer_type"), "perQuestionType": parts("question_type"),
            "per_question": {str(r["id"]): vqa_percent([r]) for r in records}}



def submit_vqav2(items, records):
    """All of test2015 must be in the file; what was not asked gets an empty answer."""
    answers = {r["id"]: evalai(r["answer"] or "") for r in records}
    whole = items[0]["whole"]
    ids = [row["question_id"] for _, _, row in entries(whole, "questions")] if whole else answers
    return {"vqav2_answers.json": [{"question_id": i, "answer": answers.get(i, "")} for i in ids]}



def read_gqa(cfg):
    for where, id, row in entries(find(cfg.data, "testdev_balanced_questions.json", "testdev_balanced_questions_*.json")):
        question, image, truth, balanced = need(where, row, question=str, imageId=str, answer=OPTIONAL, isBalanced=bool)
        types, program, group = need(where, row, types=dict, semantic=list, groups=dict)
        structural, semantic = need(f"{where}, types", types, structural=str, semantic=str)
        steps = [f"{op.get('operation')}: {op.get('argument')}" for op in program if isinstance(op, dict)]
        yield ask_for(str(id), f"images/{image}.jpg", question, SHORT, truth, balanced=balanced, binary=structural != "query",
                      structural=structural, semantic=semantic, group=group.get("global"), words=len(question.split()),
                      steps=sum(not any(x in step for x in ("exist", "query: name", "choose name")) for step in steps))



def gqa_text(text):
    """LLaVA's conversion of what a model says; the scorer then compares strings."""
    return text.rstrip(".").lower()



def gqa_judge(item, text, row, cfg):
    return right(text if "prediction" in row else gqa_text(text), item["truth"]) | {"balanced": item["balanced"]}



def balanced(records):
    return [r for r in records if r["item"]["balanced"]]



def total_gqa(records):
    scored, everything = balanced(records), len(records)
    figure = lambda rs: {"score": two_decimals(rs), "count": len(rs)}
    parts = lambda name, order=str: {k: figure(rs) for k, rs in sorted(groups(scored, name).items(), key=lambda pair: order(pair[0]))}
    chi = []                                                                # chi-square of each global group's answers, times its size
    for rs in groups([r for r in scored if r["item"]["group"] is not None], "group").values():
        gold, said = Counter(r["truth"] for r in rs), Counter(r["parsed"] for r in rs)
        chi.append((sum((said[a] - n) ** 2 / n for a, n in gold.items()) * len(rs), len(rs)))
    return {"n": len(scored), "num_questions": everything, "num_balanced": len(scored), "correct_balanced": int(sum(r["score"] for r in scored)),
            "accuracy": two_decimals(scored), "binary": two_decimals([r for r in scored if r["item"]["binary"]]),
            "open": two_decimals([r for r in scored if not r["item"]["binary"]]),
            "distribution": round(sum(c for c, _ in chi) / sum(n for _, n in chi) / 100, 2) if chi else None,
            "accuracy_per_structural_type": parts("structural"), "accuracy_per_semantic_type": parts("semantic"),
            "accuracy_per_steps_number": parts("steps", int), "accuracy_per_words_number": parts("words", int)}



def read_vizwiz(cfg):
    split, path = split_of(cfg, named("{}.json", "val", "test", "train"))
    for where, _, row in entries(path):
        image, question, answers = need(where, row, image=str, question=str, answers=(list, type(None)))
        yield ask_for(image, f"{split}/{image}", question, f"{INSUFFICIENT}\n{SHORT}", answer_texts(where, answers) if answers else None,
                      answerable=row.get("answerable"))



def total_vizwiz(records):
    unanswerable, answerable = ([r for r in records if r["item"]["answerable"] == k] for k in (0, 1))
    said_so = [r["parsed"] == "unanswerable" for r in records]
    average = ranking(said_so, [r["item"]["answerable"] == 0 for r in records])["pr_auc"]
    f1 = 2 * sum(r["parsed"] == "unanswerable" for r in unanswerable) / max(sum(said_so) + len(unanswerable), 1)
    return {"overall": vqa_percent(records), "unanswerability": {"average_precision": round(100 * average, 2), "f1_score": round(100 * f1, 2)},
            "answerable": vqa_percent(answerable), "unanswerable": vqa_percent(unanswerable),
            "per_image": {r["id"]: vqa_percent([r]) for r in records}, "num": len(records)}



def read_textvqa(cfg):
    (split, path), ocr = split_of(cfg, named("TextVQA_0.5.1_{}.json", "val", "test", "train")), {}
    if cfg.name == "textvqa-ocr":
        for where, _, row in entries(beside(cfg, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"), "data"):
            image, words = need(where, row, image_id=str, ocr_tokens=list)
            ocr[image] = "\nReference OCR token: " + ", ".join(map(str, words))
    for where, _, row in entries(path, "data"):
        id, image, question, answers = need(where, row, question_id=int, image_id=str, question=str, answers=(list, type(None)))
        if answers and not all(isinstance(a, str) for a in answers):
            raise UserError(f'{where}: "answers" holds something that is no text')
        if cfg.name == "textvqa-ocr" and image not in ocr:
            raise UserError(f"{where}: no OCR tokens of picture {image} in TextVQA_Rosetta_OCR_v0.2_{split}.json")
        yield ask_for(id, f"{'test' if split == 'test' else 'train'}_images/{image}.jpg", question[:1].upper() + question[1:] + ocr.get(image, ""),
                      SHORT, answers or None, keys=[(image, question.strip().lower())])



def total_textvqa(records):
    return {"accuracy": share(records), "accuracy_percent_2dp": two_decimals(records), "num": len(records),
            "per_question": {str(r["id"]): r["score"] for r in records}}



POPE_SPLITS = ("random", "popular", "adversarial")
POPE_OFFSET, POPE_MERGED = 10_000_000, {0: "adversarial", 1: "random", 2: "popular"}      # of the ids in LLaVA's one file



def read_pope(cfg):
    splits = [cfg.split] if cfg.split else POPE_SPLITS
    one_of("--split", splits[0], POPE_SPLITS)
    sources = ("coco", "gqa", "aokvqa", "gqa_pope_seem", "aokvqa_pope_seem")
    names = {split: [f"{source}_pope_{split}.json" for source in sources] for split in splits}
    paths = {split: find(cfg.data, *names[split], optional=True) for split in splits}
    if Path(cfg.data).is_file():
        paths = {next((s for s in POPE_SPLITS if s in Path(cfg.data).name), "random"): Path(cfg.data)}
    if not any(paths.values()):
        find(cfg.data, *names[splits[0]])                                   # which says so
    for split, path in paths.items():
        for where, _, row in entries(path) if path else ():
            id, image, text, label = need(where, row, question_id=int, image=str, text=str, label=str)
            within(where, "label", label, ("yes", "no"))
            yield ask_for(f"{split}/{id}", f"val2014/{image}" if image.startswith("COCO_val2014") else image, text, SHORT, label,
                          split=split, question_id=id, candidates=("Yes", "No"))



def pope_predictions(cfg, items):
    """POPE's own files have one split each and number from 1 in each; LLaVA's merged file has offsets. A file is cut where an id returns,
    and each part belongs to the split that asks just these questions."""
    path, asked = Path(cfg.predictions), defaultdict(dict)
    for item in items:
        asked[item["split"]][item["question_id"]] = item["question"].strip().lower()
    files = [f for split in asked for f in sorted(path.glob(f"*{split}*.json*"))] if path.is_dir() else [path]
    if not files:
        raise UserError(f"--predictions {path}: no *random*, *popular* or *adversarial* .json in it")
    for file in files:
        parts = [{}]
        for where, row in predicted(but(cfg, predictions=file), items):
            id = str(row.get("question_id"))
            if re.fullmatch(r"\w+/\d+", id):                                # our own answers.jsonl
                yield where, row | {"key": id}
                continue
            if not re.fullmatch(r"\d+", id):
                raise UserError(f'{where}: "question_id" is {row.get("question_id")!r}; it must be a number')
            if int(id) in parts[-1]:
                parts.append({})
            parts[-1][int(id)] = where, row
        merged = any(id >= POPE_OFFSET for part in parts for id in part)
        for part in filter(None, parts):
            split = "" if merged else pope_split(part, asked, file.name, cfg.data)
            for id, (where, row) in part.items():
                lot, number = divmod(id, POPE_OFFSET)
                yield where, row | {"key": f"{split or POPE_MERGED.get(lot)}/{number}"}



def pope_split(part, asked, file, data):
    """The split whose questions these are, {id: (where, row)}; where several fit, the file's name may tell."""
    text = lambda row: str(row.get("question", row.get("prompt", ""))).split("\n")[0].strip().lower()
    fits = [s for s in asked if all(id in asked[s] and text(row) in ("", asked[s][id]) for id, (_, row) in part.items())]
    fits = [s for s in fits if s in file] or fits
    if len(fits) == 1:
        return fits[0]
    lost = [where for id, (where, _) in part.items() if not any(id in questions for questions in asked.values())]
    where = (lost or [where for where, _ in part.values()])[0]
    raise UserError(f"{where}: " + (f"could be of {' or '.join(fits)}; give --split, or name the split in the file's name" if fits else
                                    f"its questions are not those of one split in {data}; check that both are the same version of POPE"))



def pope_cells(records):
    """TP, FP, TN, FN; yes is positive, and a missing answer is wrong."""
    count = lambda truth, said: sum(r["truth"] == truth and (r["parsed"] == said) for r in records)
    n = Counter(r["truth"] for r in records)
    tp, tn = count("yes", "yes"), count("no", "no")
    return [tp, n["no"] - tn, tn, n["yes"] - tp]



def pope_figures(tp, fp, tn, fn):
    n, ratio = tp + fp + tn + fn, lambda a, b: a / b if b else 0.0
    return {"accuracy": ratio(tp + tn, n), "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn), "yes_ratio": ratio(tp + fp, n)}



def pope_answered(records):
    """{split: records}; a split without a single answer is left out."""
    found = groups(records, "split")
    return {s: found[s] for s in POPE_SPLITS if any("missing" not in r for r in found.get(s, []))}



def units_pope(records):
    """The headline is the mean F1 of the splits."""
    units = [[r] for rs in pope_answered(records).values() for r in rs]
    return tally_of(units, "split", pope_cells, lambda counts: 100 * mean(pope_figures(*cells)["f1"] for cells in counts.values()))



def total_pope(records):
    metrics, splits = {}, pope_answered(records)
    for split, rs in splits.items():
        cells = pope_cells(rs)
        metrics[split] = dict(zip(("TP", "FP", "TN", "FN"), cells)) | pope_figures(*cells) | {
            "num": len(rs), "pred": [int(r["parsed"] == "yes") for r in rs]} | ranked(rs, "yes")
    if splits:
        metrics["mean_over_splits"] = {name: mean(metrics[s][name] for s in splits) for name in pope_figures(0, 0, 0, 0)}
    return {"n": sum(map(len, splits.values())), "splits": list(splits)} | metrics



def submit_pope(items, records):
    rows = defaultdict(list)
    for item, r in zip(items, records):
        rows[item["split"]].append({"question": item["question"], "answer": r["answer"] or "", "question_id": item["question_id"]})
    return {f"pope_{split}.json": lines(of_split) for split, of_split in rows.items()}



PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")



def bare(question):
    """MME's question without the sentence for which LLaVA puts its own format prompt."""
    return re.sub(r"\s*Please answer yes or no\.\s*$", "", question)



def tab_lines(path):
    """(where, cells) of each line of a text between whose cells are tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return [(f"{path}, line {i}", line.split("\t")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]



def mme_rows(root, task):
    """(where, [picture, question, answer]) of the tool's <subtask>.txt, or of the release's one text per picture."""
    if (root / f"{task}.txt").is_file():
        yield from tab_lines(root / f"{task}.txt")
    for text in sorted([*(root / task).glob("*.txt"), *(root / task / "questions_answers_YN").glob("*.txt")]):
        names = [f"{text.stem}{end}" for end in (".jpg", ".png", ".jpeg")]
        picture = next((name for name in names if (text.parent / name).is_file() or (root / task / "images" / name).is_file()), names[0])
        yield from ((where, [picture, *cells]) for where, cells in tab_lines(text))



def read_mme(cfg):
    """The release's folders (one text per picture), or the tool's Your_Results/ (one text per subtask)."""
    release = "MME_Benchmark_release_version"
    roots = [root / name for root in (folder(cfg.data), folder(cfg.data) / release) for name in (".", "Your_Results", release)]
    root = next((r for r in roots if any((r / f"{t}.txt").is_file() or (r / t).is_dir() for t in PERCEPTION + COGNITION)), None)
    if root is None:
        raise UserError(f"{cfg.data}: neither Your_Results/<subtask>.txt nor {release}/<subtask>/ in it; "
                        f"subtasks are {', '.join(PERCEPTION + COGNITION)}")
    seen = Counter()
    for task in PERCEPTION + COGNITION:
        for where, cells in mme_rows(root, task):
            if len(cells) < 3 or cells[2].strip().lower() not in ("yes", "no"):
                raise UserError(f"{where}: expected picture, question and Yes or No between tabs, found {cells}")
            image, question, label = cells[0].strip(), cells[1], cells[2].strip().lower()
            unit = f"{task}/{image}"
            seen[unit] += 1
            yield ask_for(f"{unit}#{seen[unit]}", unit, bare(question), SHORT, label, unit=unit, task=task, official=question,
                          keys=[(unit, bare(question).strip().lower())])
    if odd := [unit for unit, n in seen.items() if n != 2]:
        raise UserError(f"{root}: {odd[0]} has {seen[odd[0]]} question(s); every picture of MME has two")



def mme_predictions(cfg, items):
    """results/<subtask>.txt of picture, question, label, response; or answers in LLaVA's form. A line of another number of fields is
    skipped, as the official script does, but said."""
    if not Path(cfg.predictions).is_dir():
        for where, row in predicted(cfg, items):
            if "#" not in str(row.get("question_id")):                      # LLaVA's ids are task/picture, twice
                row = row | {"key": (str(row.get("question_id")), bare(str(row.get("prompt", "")).split("\n")[0]).strip().lower())}
            yield where, row
        return
    files = [Path(cfg.predictions) / f"{task}.txt" for task in dict.fromkeys(item["task"] for item in items)]
    if not any(f.is_file() for f in files):
        raise UserError(f"--predictions {cfg.predictions}: no <subtask>.txt in it, such as {files[0].name}")
    for file in (f for f in files if f.is_file()):
        for where, cells in tab_lines(file):
            whole = len(cells) == 4
            if not whole:
                print(f"{where}: {len(cells)} fields instead of 4; not scored, as in the official script", file=sys.stderr)
            row = {"text": cells[3]} if whole else {"text": "", "skipped_line": True}
            key = (f"{file.stem}/{cells[0].strip()}", bare(cells[1]).strip().lower() if len(cells) > 1 else "")
            if whole or any(key in item["keys"] for item in items):
                yield where, row | {"key": key}



def mme_judge(item, text, row, cfg):
    label = mme_label(text.replace("\t", " ").replace("\n", " "))
    verdict = {"parsed": label if label != "other" else None, "score": float(label == item["truth"]), "label": label}
    return verdict | ({"skipped_line": True} if "skipped_line" in row else {})



def mme_counts(records):
    """Right answers and answered lines; pictures with both answers right and pictures."""
    counted, pictures = [r for r in records if "skipped_line" not in r], groups(records, "unit").values()
    return [sum(r["score"] for r in counted), len(counted), sum(sum(r["score"] for r in pair) == 2 for pair in pictures), len(pictures)]



def mme_score(n_right, answered, both, pictures):
    return 100 * (n_right / answered if answered else 0.0) + 100 * (both / pictures if pictures else 0.0)



def units_mme(records):
    """The unit is the picture with its two questions; the headline is Perception, or Cognition where a folder holds nothing else."""
    wanted = set(groups(records, "task"))
    wanted = wanted & set(PERCEPTION) or wanted
    return tally_of(list(groups(records, "unit").values()), "task", mme_counts,
                    lambda counts: sum(mme_score(*counts[task]) for task in wanted))



def total_mme(records):
    """Subtask = 100 acc + 100 acc+; Perception and Cognition are sums."""
    figures = {}
    for task, rs in groups(records, "task").items():
        n_right, answered, both, pictures = counts = mme_counts(rs)
        said = Counter((r["truth"], r["parsed"]) for r in rs if "skipped_line" not in r)
        cells = {"TP": said["yes", "yes"], "FN": said["yes", "no"], "TN": said["no", "no"], "FP": said["no", "yes"]}
        figures[task] = cells | {
            "precision": cells["TP"] / max(cells["TP"] + cells["FP"], 1), "recall": cells["TP"] / max(cells["TP"] + cells["FN"], 1),
            "other_num": said["yes", None] + said["no", None], "acc": n_right / answered if answered else 0.0, "acc_plus": both / pictures,
            "score": mme_score(*counts)}
    part = lambda names: float(sum(figures[t]["score"] for t in names if t in figures))
    return {"perception_total": part(PERCEPTION), "cognition_total": part(COGNITION), "tasks": figures}



def submit_mme(items, records):
    files = defaultdict(str)
    for item, r in zip(items, records):
        flat = (r["answer"] or "").replace("\t", " ").replace("\n", " ")
        picture = item["unit"].partition("/")[2]
        files[f"results/{item['task']}.txt"] += f"{picture}\t{item['official']}\t{item['truth'].capitalize()}\t{flat}\n"
    return files



def read_scienceqa(cfg):
    home, split = folder(cfg.data), cfg.split or "test"
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
        within(where, "answer", truth, range(len(choices)))
        context = f"{'' if cfg.family == 'internvl' else 'Context: '}{hint}\n" if hint else ""
        yield ask_for(id, f"images/{row.get('split', split)}/{id}/{image}" if image else None, context + question + options(choices), LETTER, truth,
                      choices=choices, hint=hint or "", **{k: str(row.get(k, "")) for k in ("subject", "grade", "topic")})



def scienceqa_judge(item, text, row, cfg):
    if isinstance(row.get("text"), int):                                    # the official result file: {"results": {id: index}}
        letter = LETTERS[row["text"]] if 0 <= row["text"] < 26 else None
    else:
        letter = scienceqa_letter(text)
    there = letter is not None and letter in LETTERS[: min(5, len(item["choices"]))]
    index = LETTERS.index(letter) if there else -1
    return {"parsed": letter, "score": float(index == item["truth"]), "index": index}



def total_scienceqa(records):
    pictured, given = [r for r in records if r["item"]["image"]], [r for r in records if "missing" not in r]
    parts = {"acc_has_text": lambda item: item["hint"], "acc_has_image": lambda item: item["image"],
             "acc_no_context": lambda item: not item["hint"] and not item["image"],
             "acc_grade_1_6": lambda item: item["grade"] in [f"grade{k}" for k in range(1, 7)],
             "acc_grade_7_12": lambda item: item["grade"] in [f"grade{k}" for k in range(7, 13)], "acc_average": lambda item: True}
    found = {f"acc_{subject.removesuffix(' science')}": rs for subject, rs in groups(records, "subject").items()}
    found |= {name: [r for r in records if test(r["item"])] for name, test in parts.items()}
    found |= {f"acc_{topic}": rs for topic, rs in sorted(groups(records, "topic").items())}
    return {"total": len(records), "correct": int(sum(r["score"] for r in records)), "accuracy": 100 * share(records),
            "accuracy_2dp": two_decimals(records), "img_accuracy_2dp": two_decimals(pictured), "img_total": len(pictured),
            "parsed_letter": {r["id"]: r["parsed"] or "FAILED" for r in given}, "predicted_index": {r["id"]: r["index"] for r in given},
            "official_breakdown": {name: f"{100 * share(rs):.2f}" for name, rs in found.items() if rs}}



def submit_scienceqa(items, records):
    return {"scienceqa_results.json": {"results": {r["id"]: r.get("index", -1) for r in records}}}



def read_mmbench(cfg):
    chinese = cfg.name == "mmbench-cn"
    names = [n for split in ("dev", "test") for n in (
        [f"mmbench_{split}_cn_20231003.tsv", f"MMBench_{split.upper()}_CN.tsv"] if chinese else
        [f"mmbench_{split}_20230712.tsv", f"mmbench_{split}_en_20231003.tsv", f"MMBench_{split.upper()}_EN.tsv"])]
    rows = list(entries(find(cfg.data, *[n for n in names if not cfg.split or f"_{cfg.split}_" in n.lower()])))
    pictures, seen = {str(row.get("index")): row.get("image", "") for _, _, row in rows}, set()
    for where, _, row in rows:
        row = {k: "" if v in ("nan", "NaN") else v for k, v in row.items()}
        index, question, hint, image, answer = need(where, row, index=str, question=str, hint=OPTIONAL, image=str, answer=OPTIONAL)
        choices = {}
        for letter in "ABCD":                                           # an empty cell ends the options
            if not row.get(letter):
                break
            choices[letter] = row[letter]
        if not re.fullmatch(r"\d+(\.0)?", index) or int(float(index)) in seen:
            raise UserError(f'{where}: "index" is {index!r}; it must be a number of its own')
        if not choices:
            raise UserError(f"{where}: no option A")
        within(where, "answer", answer or "A", choices)
        if 0 < len(image) <= 64 and image in pictures:
            image = pictures[image]                                     # later releases keep a picture once, in one row of its group
        try:
            picture = base64.b64decode(image, validate=True)
        except ValueError:
            raise UserError(f'{where}: "image" is not base64 ({image[:20]!r}...)') from None
        index = int(float(index))
        seen.add(index)
        yield ask_for(index, picture or None, (f"{hint}\n" if hint else "") + question + options(choices.values()),
                      "请直接回答选项字母。" if chinese else LETTER, answer or None, choices=choices, unit=index % 1_000_000,
                      category=row.get("category", ""), l2=row.get("l2-category", ""), row=row)



def units_mmbench(records):
    """Circular: a question counts if all of its rows, the options rotated, are answered right."""
    return [[float(all(r["score"] for r in rs)), 1] for rs in groups(records, "unit").values()], percent



def total_mmbench(records):
    first, hit = [], {}
    for unit, rs in groups(records, "unit").items():
        first.append(min(rs, key=lambda r: r["id"]))                        # wherever the file has it
        hit[unit] = int(all(r["score"] for r in rs))
        for r in rs:
            r["unit_score"] = hit[unit]
    circular = lambda rs: mean(r["unit_score"] for r in rs)
    return {"n": len(hit), "rows": len(records), "groups": len(hit), "circular_accuracy": circular(first),
            "vanilla_first_pass_exact_matching": share(first), "group_hit": hit, "per_category": per(first, "category", circular),
            "per_l2_category": per(first, "l2", circular), "inferred_letter": {str(r["id"]): r["parsed"] for r in records}}



def submit_mmbench(items, records):
    """The server's workbook: the file's columns without six of them, `prediction` as the seventh."""
    drop, rows = {"hint", "category", "source", "image", "comment", "l2-category"}, []
    for item, r in zip(items, records):
        cells = [(k, v) for k, v in item["row"].items() if k not in drop]
        rows.append(dict(cells[:6] + [("prediction", r["answer"] or "")] + cells[6:]))
    return {"mmbench.xlsx": write_xlsx(rows, numeric=["index"])}



def read_seed(cfg):
    path, cell = find(cfg.data, "SEED-Bench.json"), (str, int, float)
    rows = list(entries(path, "questions"))
    names = need(str(path), read_any(path)[0], question_type=dict)
    kinds = {number: name for name, number in names.items() if isinstance(number, int)}
    for where, _, row in rows:
        id, kind, question, truth, data, media = need(where, row, question_id=(str, int), question_type_id=int, question=str, answer=OPTIONAL,
                                                      data_id=str, data_type=OPTIONAL)
        choices = need(where, row, choice_a=cell, choice_b=cell, choice_c=cell, choice_d=cell)
        video = (media or ("video" if kind > 9 else "image")) == "video"
        yield ask_for(str(id), f"SEED-Bench-video-image/{kind}_{id}.png" if video else f"SEED-Bench-image/{data}", question + options(choices),
                      LETTER, truth, type=kinds.get(kind, str(kind)), media="video" if video else "image")



def seed_judge(item, text, row, cfg):
    label = text[:1] if cfg.family == "internvl" else text                  # LLaVA compares the whole text, InternVL its first character
    return right(label if label in list("ABCD") else None, item["truth"])



def total_seed(records):
    return {"accuracy": 100 * share(records), "per_type": per(records, "type"), "per_media": per(records, "media")}



def read_ai2d(cfg):
    root = next((p for p in (folder(cfg.data), folder(cfg.data) / "ai2d") if (p / "questions").is_dir()), None)
    if root is None:
        raise UserError(f"{cfg.data}: no folder questions/ with <n>.png.json in it; unpack ai2d-all.zip there")
    ids, split = beside(cfg, "ai2d_test_ids.csv", optional=True), cfg.split or "test"
    one_of("--split", split, ["test", "val", "all"])
    if split != "all" and not ids:
        raise UserError(f"{cfg.data}: no ai2d_test_ids.csv, which says what is test; add it, or give --split all")
    test = set(ids.read_text(encoding="utf-8-sig").split()) if ids else set()
    for path in sorted((root / "questions").glob("*.json"), key=lambda p: (len(p.name), p.name)):
        found, _ = read_any(path)
        image, questions = need(str(path), found if isinstance(found, dict) else {}, imageName=str, questions=dict)
        part = "test" if image.split(".")[0] in test else "val"
        for text, row in questions.items() if split in ("all", part) else ():
            where = f"{path}, question {text[:40]!r}"
            choices, truth, id = need(where, row if isinstance(row, dict) else {}, answerTexts=list, correctAnswer=int, questionId=str)
            within(where, "correctAnswer", truth, range(len(choices)))
            yield ask_for(id, f"images/{image}", text + options(choices), LETTER, LETTERS[truth], n=len(choices), split=part,
                          letters="drawn" if row.get("abcLabel") else "none", candidates=tuple("ABCD"))



def total_ai2d(records):
    return {"accuracy": per(records, "split") | {"final": 100 * share(records)}, "abcLabel": per(records, "letters"),
            "note": "raw pictures: the letters of abcLabel questions are not drawn in"}



def read_tallyqa(cfg):
    for where, _, row in entries(split_of(cfg, named("{}.json", "test", "train"))[1]):
        id, image, question, truth, simple = need(where, row, question_id=int, image=str, question=str, answer=int, issimple=(bool, type(None)))
        if cfg.likelihood:                                                  # Prismatic asks for one of A. 0 ... P. 15
            question += options(range(16))
        yield ask_for(id, image, question, LETTER if cfg.likelihood else SHORT, truth, kind="complex" if simple is False else "simple",
                      candidates=tuple(LETTERS[:16]))



def total_tallyqa(records):
    read = [r for r in records if r["parsed"] is not None]
    error = lambda rs: math.sqrt(mean((r["parsed"] - r["truth"]) ** 2 for r in rs)) if rs else None
    rmse = {"simple": None, "complex": None} | per(read, "kind", error) | {"final": error(read)}
    return {"accuracy": per(records, "kind") | {"final": 100 * share(records)}, "rmse": rmse}



def read_vsr(cfg):
    kinds = {}
    if categories := beside(cfg, "rel_meta_category_dict.txt", optional=True):
        for line in categories.read_text(encoding="utf-8").splitlines():
            name, _, relations = line.partition(":")
            kinds |= {relation.strip(): name.strip() for relation in relations.split(",")}
    for k, (where, _, row) in enumerate(entries(split_of(cfg, named("{}.jsonl", "test", "dev", "train"))[1])):
        image, caption, label = need(where, row, image=str, caption=str, label=int)
        relation = str(row.get("relation", ""))
        yield ask_for(str(row.get("id", k)), image, f'Based on the image, is this statement "True" or "False"? {caption}',
                      'Respond with "True" or "False" directly.', ("False", "True")[label == 1], relation=relation, kind=kinds.get(relation, ""),
                      keys=[(image, caption.strip().lower())], candidates=("True", "False"))



def total_vsr(records):
    return accuracy(records) | ranked(records, "True") | {
        "always_true": mean(float(r["truth"] == "True") for r in records), "per_relation": per(records, "relation"),
        "per_meta_category": per(records, "kind")}



def four(where, box):
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
        raise UserError(f'{where}: "bbox" is {box}; it must be four numbers')
    return box



def region(where, id, image, sentence, box, w, h, cfg, **more):
    """The item of one sentence; `box` has corners in pixels."""
    if not all(isinstance(side, (int, float)) and side > 0 for side in (w, h)):
        raise UserError(f"{where}: the picture is {w} x {h} pixels; both sides must be above 0")
    quoted = f"<ref>{sentence}</ref>" if cfg.family == "internvl" else f'"{sentence}"'
    return ask_for(id, image, f"Please provide the bounding box coordinate of the region this sentence describes: {quoted}", "", four(where, box),
                   size=(w, h), keys=[(image, sentence.strip().lower())], **more)



def read_refcoco(cfg):
    name, split = cfg.name, cfg.split or "val"
    ready = find(cfg.data, f"{name}_{split}.jsonl", optional=not Path(cfg.data).is_file())
    if ready and ready.suffix == ".jsonl":                                  # converted: one sentence a line, corners in pixels
        for k, (where, _, row) in enumerate(entries(ready)):
            image, sentence, box, w, h = need(where, row, image=str, sent=str, bbox=list, width=int, height=int)
            yield region(where, str(row.get("sent_id", k)), image, sentence, box, w, h, cfg)
        return
    home = folder(cfg.data) / name if (folder(cfg.data) / name).is_dir() else folder(cfg.data)
    refs, instances = find(home, "refs(umd).p" if name == "refcocog" else "refs(unc).p"), find(home, "instances.json")
    boxes = {need(where, row, id=int): (where, row.get("bbox")) for where, _, row in entries(instances, "annotations")}
    sizes = {need(where, row, id=int): (row.get("width"), row.get("height")) for where, _, row in entries(instances, "images")}
    listed = read_pickle(refs)
    for k, ref in enumerate(listed if isinstance(listed, list) else [listed]):
        where = f"{refs}, record {k}"
        if not isinstance(ref, dict):
            raise UserError(f"{where}: not a reference; get the file again")
        ann, image, part, sentences = need(where, {str(k): v for k, v in ref.items()}, ann_id=int, image_id=int, split=str, sentences=list)
        if part != split:
            continue
        if ann not in boxes or image not in sizes:
            raise UserError(f"{where}: annotation {ann} or image {image} is not in instances.json; take both from one download")
        x, y, w, h = four(*boxes[ann])
        for s in sentences:
            id, sentence = need(where, s if isinstance(s, dict) else {}, sent_id=int, sent=str)
            yield region(where, id, f"train2014/COCO_train2014_{image:012d}.jpg", sentence, [x, y, x + w, y + h], *sizes[image], cfg)



def region_judge(least):
    """Convention N (fractions, truth rounded to two decimals) for LLaVA and Prismatic, K (float32, pixels) for InternVL."""
    def judge(item, text, row, cfg):
        sides, square = item["size"] * 2, max(item["size"])
        truth = [round(x / side, 2) for x, side in zip(item["truth"], sides)]

        def unpad(box):
            if not box or cfg.box_frame != "square":
                return box
            return [(x * square - (square - side) // 2) / side for x, side in zip(box, sides)]
        box, loose = unpad(strict_box(text)), unpad(tolerant_box(text))
        overlap = iou(box, truth) if box else 0.0
        if cfg.family == "internvl":
            box = internvl_box(text, *item["size"])
            overlap = 0.0 if box is None else iou32(box, item["truth"])
            box = None if box is None else box.tolist()
        return {"parsed": box, "score": float(overlap >= least), "iou": overlap, "tolerant": float(bool(loose) and iou(loose, truth) >= least)}
    return judge



def total_region(records):
    return accuracy(records) | {"invalid": sum(r["parsed"] is None and "missing" not in r for r in records),
                                "accuracy_tolerant_reading": mean(r.get("tolerant", 0.0) for r in records)}



def total_ocid(records):
    parts = per(records, "clutter")
    return total_region(records) | {name: parts[name] for name in ("Minimum", "Medium", "Maximum") if name in parts} | {"All": 100 * share(records)}



def read_ocid(cfg):
    for where, id, row in entries(split_of(cfg, named("{}_expressions.json", "val", "test", "train"))[1]):
        sentence, path, raw, take = need(where, row, sentence=str, scene_path=str, bbox=(str, list), take_id=int)
        try:
            x1, y1, x2, y2 = box = json.loads(raw) if isinstance(raw, str) else raw
            if not (x1 < x2 <= 640 and y1 < y2 <= 480):                     # corners, whatever the dataset's note says
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(f'{where}: "bbox" is {raw!r}; it must be [x1, y1, x2, y2] within 640 x 480 pixels') from None
        yield region(where, str(id), f"OCID-dataset/{path}", sentence, box, 640, 480, cfg,
                     clutter="Minimum" if take <= 9 else "Medium" if take <= 16 else "Maximum")



HINT = "Hint: Please answer the question {} and provide the {}, e.g., {}, at the end."
FLOAT = "requiring a floating-point number with {} decimal place{}"
HINTS = {"choice": "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
         "integer": HINT.format("requiring an integer answer", "final value", "1, 2, 3"),
         "float1": HINT.format(FLOAT.format("one", ""), "final value", "1.2, 1.3, 1.4"),
         "float2": HINT.format(FLOAT.format("two", "s"), "final value", "1.23, 1.34, 1.45"),
         "list": HINT.format("requiring a Python list as an answer", "final list", "[1, 2, 3], [1.2, 1.3, 1.4]")}
MATHVISTA_GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")



def read_mathvista(cfg):
    path, asked = split_of(cfg, named("{}.json", "testmini", "test"))[1], beside(cfg, "query.json", optional=True)
    queries = read_any(asked)[0] if asked else {}
    for where, pid, row in entries(path):
        question, image, choices, unit, truth = need(where, row, question=str, image=str, choices=(list, type(None)), unit=OPTIONAL, answer=OPTIONAL)
        kind, answer_type = need(where, row, question_type=str, answer_type=str)
        precision = row.get("precision")
        told = kind != "multi_choice" or choices and all(isinstance(c, str) for c in choices)
        if not told or answer_type not in ("text", "integer", "float", "list"):
            raise UserError(f'{where}: a {kind} question of type {answer_type} with "choices" {choices}')
        which = "choice" if kind == "multi_choice" else f"float{int(precision or 1)}" if answer_type == "float" else answer_type
        shown = f"Question: {question}" + (f" (Unit: {unit})" if unit else "") + ("\nChoices:" + bracketed(choices) if choices else "")
        given = queries.get(str(pid)) if isinstance(queries, dict) else None
        query = given or need(where, row, query=OPTIONAL) or f"{HINTS.get(which, HINTS['integer'])}\n{shown}"
        if not isinstance(query, str):
            raise UserError(f"{asked}, record {pid!r}: {str(query)[:60]!r} is no prompt")
        without = query.partition("\n")[2] if query.startswith("Hint: ") else query.removesuffix(f"\n{SHORT}")
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        yield ask_for(str(pid), image, query, "", truth or None, cot=COT + without, choices=choices, precision=precision,
                      **{k: metadata.get(k) for k in MATHVISTA_GROUPS} | {"question_type": kind, "answer_type": answer_type})



def mathvista_judge(item, text, row, cfg):
    """Scoring starts from `extraction`. Where there is none, as from a model, a rule stands in for the official GPT-4."""
    extraction, ours = (row["extraction"], False) if "extraction" in row else mathvista_extract(text, item)
    label = mathvista_normal(extraction, item)
    score = float(label is not None and label == item["truth"])
    return {"parsed": label, "score": score, "extraction": extraction, "prediction": label, "true_false": bool(score),
            "by_rule": ours, "rule_extracted": "extraction" not in row}



def total_mathvista(records):
    names = [k for k in MATHVISTA_GROUPS if any(r["item"].get(k) is not None for r in records)]
    metrics = correct_of(records) | accuracy(records) | {"groups": {k: per(records, k, correct_of) for k in names}}
    if any(r.get("rule_extracted") for r in records):
        metrics |= {"metric": "accuracy %, rule-extracted (the official pipeline asks GPT-4)",
                    "extracted_by_rule": sum(r.get("by_rule", False) for r in records)}
    return metrics



def submit_mathvista(items, records):
    return {"mathvista_predictions.json": {
        r["id"]: {"pid": r["id"], "response": r["answer"] or "", "extraction": r.get("extraction", "")} for r in records}}



def read_m3cot(cfg):
    """test.jsonl; without it the predictions, whose lines carry choices, answer, domain and topic too."""
    split, seen = {"validation": "dev"}.get(cfg.split, cfg.split) or "test", set()
    path = find(cfg.data, f"{split}.jsonl", optional=bool(cfg.predictions) and not Path(cfg.data).is_file())
    for where, _, row in entries(path or cfg.predictions):
        id, choices, truth, domain, topic = need(where, row, id=str, choices=list, answer=OPTIONAL, domain=str, topic=str)
        question, context = need(where, row, question=OPTIONAL, context=OPTIONAL)
        if id in seen:                                                      # the first record of an id counts
            continue
        need(where, dict(zip(LETTERS, choices)), **dict.fromkeys(LETTERS[: len(choices)], str))
        within(where, "answer", truth or "A", list(LETTERS[: len(choices)]))
        seen.add(id)
        more = {"choices": choices, "domain": domain, "topic": topic}
        image, text = row.get("image_path") or f"images/{row.get('image_id') or id}.png", question or ""
        if cfg.family == "internvl":
            yield ask_for(id, image, (f"{context}\n" if context else "") + text + options(choices), LETTER, truth, **more)
            continue
        text = (f"[Context]\n{context}\n" if context else "") + f"[Question]\n{text}\n[Choices]" + bracketed(choices)
        letters = ",".join(f'"({letter})"' for letter, _ in zip(LETTERS, choices))
        yield ask_for(id, image, text, "", truth, cot=f"{text}\n\nLet's think step-by-step!",
                      then=f"Please select the correct answer from the [{letters}] options.", **more)



def m3cot_judge(item, text, row, cfg):
    letter = (internvl_letter if cfg.family == "internvl" else m3cot_letter)(text, item["choices"])
    return right(letter, item["truth"])



def total_m3cot(records):
    for r in records:
        r["correct"] = r["score"] == 1
    return {"total": correct_of(records) | {"acc": share(records)}, "domain": per(records, "domain", correct_of),
            "topic": per(records, "domain", lambda rs: per(rs, "topic", correct_of))}



def submit_m3cot(items, records):
    said = lambda item, r: [r["prompt"], *([r["first"], item["then"]] if "first" in r else []), r["answer"] or ""]
    return {"m3cot.jsonl": [{k: item[k] for k in ("id", "choices", "domain", "topic")} | {"answer": r["truth"], "messages": said(item, r)}
                            for item, r in zip(items, records)]}



RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question displayed above. The user "
    "asks the question on observing an image. For your reference, the visual content in the image is represented with a few sentences "
    "describing the image. \nPlease rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\nPlease first output a single line "
    "containing only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the "
    "subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order "
    "in which the responses were presented does not affect your judgment.")



def read_llava_bench(cfg):
    captions = {need(where, row, image=str): row.get("caption") for where, _, row in entries(beside(cfg, "context.jsonl"))}
    reference = {need(where, row, question_id=int): row.get("text") for where, _, row in entries(beside(cfg, "answers_gpt4.jsonl"))}
    for where, _, row in entries(find(cfg.data, "questions.jsonl")):
        id, image, category, text = need(where, row, question_id=int, image=str, category=str, text=str)
        if not isinstance(reference.get(id), str) or captions.get(image) is None:
            raise UserError(f"{where}: no reference answer in answers_gpt4.jsonl, or no caption of {image} in context.jsonl")
        caption = captions[image] if isinstance(captions[image], list) else [captions[image]]
        yield ask_for(id, f"images/{image}", text, "", reference[id], category=category.removeprefix("llava_bench_"),
                      caption="\n".join(map(str, caption)))



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
        pair = [float(x) for x in row["tuple"]] if isinstance(row.get("tuple"), list) else judge_pair(str(row.get("content")))
        return {"parsed": pair if pair != [-1, -1] else None, "score": pair[1] / 10, "pair": pair}
    said, truth = (Counter(normalise(t).split()) for t in (text, item["truth"]))
    both = sum((said & truth).values())
    return {"parsed": text, "score": 2 * both / max(sum(said.values()) + sum(truth.values()), 1)}



def relative_score(sums):
    """100 model / reference of the mean scores, each rounded as the official summary does: of columns (reference, model, 1)."""
    reference, model = (round(float(x / sums[2]), 3) for x in sums[:2])
    return round(model / reference * 100, 1) if reference > 0 else None



def units_llava_bench(records):
    reviewed = [[*r["pair"], 1] for r in records if "pair" in r]            # a missing review has no say
    return (reviewed, relative_score) if reviewed else each(records)



def total_llava_bench(records):
    parts = {"all": records} | groups(records, "category")
    if any("pair" in r for r in records):
        sums = {name: np.sum([[*r["pair"], 1] for r in rs if "pair" in r], axis=0) for name, rs in parts.items()}
        return {"judged": True, "relative_score": {
            name: [relative_score(s), *(round(10 * round(float(x / s[2]), 3), 1) for x in s[:2])] for name, s in sums.items() if np.any(s)}}
    return {"proxy_parts": {name: {"count": len(rs), "mean_words": mean(len((r["answer"] or "").split()) for r in rs),
                                   "empty": sum(not r["answer"] for r in rs), "unigram_f1": share(rs)} for name, rs in parts.items()}}



def request(r, model, temperature, tokens, *messages, **more):
    """One line of judge_requests.jsonl, ready to send."""
    return {"question_id": r["id"]} | more | {"model": model, "temperature": temperature, "max_tokens": tokens,
                                              "messages": [{"role": role, "content": text} for role, text in messages]}



def submit_llava_bench(items, records):
    block = lambda item, r: (f"[Context]\n{item['caption']}\n\n[Question]\n{item['question']}\n\n"
                             f"[Assistant 1]\n{item['truth']}\n\n[End of Assistant 1]\n\n"
                             f"[Assistant 2]\n{r['answer'] or ''}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n")
    system = ("system", "You are a helpful and precise assistant for checking the quality of the answer.")
    return {"judge_requests.jsonl": [request(r, "gpt-4-0314", 0.2, 1024, system, ("user", block(item, r)), category=item["category"])
                                     for item, r in zip(items, records)]}



MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. "
    "Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is "
    "saying that the person has trust issues because the names of these countries do not accurately represent their landscapes. | ")
EQUATION = "What is x in the equation? | -1 <AND> -5 | x = "
MM_VET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the ground truth means "
    "it is totally right only when all elements in the ground truth are present in the prediction, and <OR> means it is totally right when "
    "any one element in the ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, "
    "0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    f"{EQUATION}3 | 0.0\n{EQUATION}-1 | 0.5\n{EQUATION}-5 | 0.5\n{EQUATION}-5 or 5 | 0.5\n{EQUATION}-1 or x = -5 | 1.0\n"
    f"{MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and Greenland "
    f"isn't very green. | 0.4\n{MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust issues' "
    "is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme is derived from the "
    "unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0\n")



def read_mm_vet(cfg):
    for where, id, row in entries(find(cfg.data, "mm-vet.json")):
        question, truth, capability, image = need(where, row, question=str, answer=str, capability=list, imagename=OPTIONAL)
        yield ask_for(str(id), f"images/{image or f'{id}.png'}", question, "", truth, capability=capability,
                      combination="_".join(map(str, capability)))



def mm_vet_judge(item, text, row, cfg):
    """A grade of the official judge (`score`, a number or the list of its runs) is the score. An answer gets a proxy: of the best <OR>
    branch, the share of its <AND> parts found in it."""
    if "score" in row:
        grades = row["score"] if isinstance(row["score"], list) else [row["score"]]
        if not grades or not all(isinstance(g, (int, float)) and 0 <= g <= 1 for g in grades):
            raise UserError(f'{cfg.predictions}, record {item["id"]!r}: "score" is {row["score"]!r}; it must be numbers from 0 to 1')
        return {"parsed": text, "score": mean(grades), "judged": True}
    said = normalise(text)
    found = lambda branch: mean(float(normalise(part) in said) for part in branch.split("<AND>"))
    return {"parsed": text, "score": max(found(branch) for branch in item["truth"].split("<OR>"))}



def total_mm_vet(records):
    one_decimal = lambda rs: round(100 * share(rs), 1)
    parts = {f"per_{name}": per(records, name, lambda rs: {"score": one_decimal(rs), "count": len(rs)}) for name in ("capability", "combination")}
    return {"judged": True, "total": one_decimal(records)} | parts if any("judged" in r for r in records) else {"proxy_parts": parts}



def submit_mm_vet(items, records):
    padded = lambda truth: truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    ask = lambda item, r: f"{MM_VET}\n" + " | ".join([item["question"], padded(item["truth"]), r["answer"] or "", ""])
    return {"mm_vet.json": {r["id"]: r["answer"] or "" for r in records},
            "judge_requests.jsonl": [request(r, "gpt-4-0613", 0, 3, ("user", ask(item, r))) for item, r in zip(items, records)]}



@dataclass(frozen=True)
class Benchmark:
    read: object
    judge: object
    total: object = accuracy
    submit: object = nothing
    units: object = each
    paper: dict = field(default_factory=dict)    # {model: the published figure}
    longest: int = 16                            # new tokens of an answer
    figure: str = ""                             # the metric that is the headline, where the official scorer itself rounds
    metric: str = "accuracy %"
    proxy: bool = False                          # the official figure needs a judge; ours has another name
    predictions: object = None                   # reader of result files that `predicted` cannot read
    all_needed: bool = False                     # the official scorer refuses a file that lacks an answer



def paper(llava7=None, llava13=None, prism7=None, prism13=None, **others):
    """LLaVA-1.5 by its own table 3 and 4 or, where it has none, by Prismatic's table; Prism is DINOSigLIP."""
    named = {"LLaVA-1.5-7B": llava7, "LLaVA-1.5-13B": llava13, "Prism-7B": prism7, "Prism-13B": prism13} | others
    return {k: v for k, v in named.items() if v is not None}



CIRCULAR = {"judge": reads(lambda text, item: mmbench_letter(text, item["choices"])), "total": total_mmbench, "units": units_mmbench,
            "submit": submit_mmbench, "metric": "circular accuracy %"}
REGION = {"judge": region_judge(0.5), "total": total_region, "longest": 100, "metric": "accuracy % at IoU 0.5"}
BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, vqa_judge("official"), total_vqav2, submit_vqav2, paper=paper(78.5, 80.0, 80.97, 81.66), figure="overall",
                       metric="VQA accuracy %", all_needed=True),
    "gqa": Benchmark(read_gqa, gqa_judge, total_gqa, answers_as("testdev_balanced_predictions.json", "questionId", "prediction", gqa_text),
                     lambda records: each(balanced(records)), paper(62.0, 63.3, 65.27, 66.13), figure="accuracy", all_needed=True),
    "vizwiz": Benchmark(read_vizwiz, vqa_judge("vizwiz"), total_vizwiz, answers_as("vizwiz_upload.json", "image", clean=evalai),
                        paper=paper(50.0, 53.6, 52.82, 58.01), figure="overall", metric="VQA accuracy %"),
    "scienceqa": Benchmark(read_scienceqa, scienceqa_judge, total_scienceqa, submit_scienceqa,
                           paper=paper(**{"LLaVA-1.5-7B, IMG": 66.8, "LLaVA-1.5-13B, IMG": 71.6}, llava13=74.39)),
    "textvqa": Benchmark(read_textvqa, vqa_judge("evalai"), total_textvqa, answers_as("textvqa_answers.json"),
                         paper=paper(46.13, 48.99, 55.64, 57.08), metric="VQA accuracy %, without OCR tokens"),
    "textvqa-ocr": Benchmark(read_textvqa, vqa_judge("evalai"), total_textvqa, answers_as("textvqa_answers.json"),
                             paper=paper(58.2, 61.3, 59.71, 62.89), metric="VQA accuracy %, with OCR tokens"),
    "pope": Benchmark(read_pope, reads(lambda text, item: pope_label(text)), total_pope, submit_pope, units_pope,
                      paper(85.9, 85.9, **{"Prism-7B, accuracy": 88.12, "Prism-13B, accuracy": 88.07, "InternVL2-8B-MPO": 88.1}),
                      metric="mean F1 % of the splits", predictions=pope_predictions),
    "mme": Benchmark(read_mme, mme_judge, total_mme, submit_mme, units_mme, paper(1510.7, 1531.3), metric="perception, of 2000",
                     predictions=mme_predictions),
    "mmbench": Benchmark(read_mmbench, paper=paper(64.3, 67.7, **{"InternVL2.5-8B-MPO, v1.1": 82.4}), **CIRCULAR),
    "mmbench-cn": Benchmark(read_mmbench, paper=paper(58.3, 63.6), **CIRCULAR),
    "seed-bench": Benchmark(read_seed, seed_judge, total_seed, answers_as("seed_bench.jsonl", text_key="prediction"),
                            paper=paper(58.6, 61.6)),
    "llava-bench": Benchmark(read_llava_bench, llava_bench_judge, total_llava_bench, submit_llava_bench, units_llava_bench, paper(65.4, 72.5),
                             longest=1024, metric="relative score by GPT-4", proxy=True),
    "mm-vet": Benchmark(read_mm_vet, mm_vet_judge, total_mm_vet, submit_mm_vet, paper=paper(31.1, 36.1, **{"InternVL2.5-8B-MPO": 66.9}),
                        longest=1024, figure="total", metric="score by GPT-4, of 100", proxy=True),
    "refcoco": Benchmark(read_refcoco, paper=paper(55.12, 66.75, 77.78, 79.39), **REGION),
    "refcoco+": Benchmark(read_refcoco, paper=paper(49.47, 61.36, 73.08, 75.55), **REGION),
    "refcocog": Benchmark(read_refcoco, paper=paper(50.92, 60.85, 71.04, 72.73), **REGION),
    "ocid-ref": Benchmark(read_ocid, region_judge(0.25), total_ocid, paper=paper(35.07, 45.56, 54.12, 54.62), longest=100,
                          metric="accuracy % at IoU 0.25"),
    "vsr": Benchmark(read_vsr, reads(lambda text, item: true_or_false(text)), total_vsr, paper=paper(51.47, 69.07, 59.57, 72.18)),
    "tallyqa": Benchmark(read_tallyqa, reads(lambda text, item: counted(text)), total_tallyqa, paper=paper(62.06, 64.83, 66.70, 70.41)),
    "ai2d": Benchmark(read_ai2d, reads(lambda text, item: option_letter(text, item["n"])), total_ai2d,
                      paper=paper(54.10, 57.13, 55.65, 57.96, **{"InternVL2.5-8B-MPO": 84.5})),
    "m3cot": Benchmark(read_m3cot, m3cot_judge, total_m3cot, submit_m3cot, paper=paper(**{"InternVL2-8B-MPO": 79.2}), longest=128),
    "mathvista": Benchmark(read_mathvista, mathvista_judge, total_mathvista, submit_mathvista, paper=paper(**{"InternVL2.5-8B-MPO": 68.9}),
                           longest=128),
}
ALIASES = {"seed": "seed-bench", "llavabenchinthewild": "llava-bench", "llavabenchwild": "llava-bench", "llavaw": "llava-bench",
           "sqa": "scienceqa", "vqa": "vqav2"}



def table(results):
    """Score with interval, items, unparsed, the other columns, the papers' figures."""
    number = lambda x: "-" if x is None else f"{x:.2f}"
    others = [mode for mode in ("direct", "blind") if any(mode in r for r in results)]
    head = ["benchmark", "score", "95% interval", "n", "unparsed", *others, "", "papers"]
    rows = [head]
    for r in results:
        score, ci = (r["proxy"], r["proxy_ci95"]) if "proxy" in r else (r["score"], r["ci95"])
        rows.append([r["benchmark"], number(score), f"{number(ci[0])} to {number(ci[1])}" if ci else "-", str(r["n"]), f"{r['unparsed']:.1%}",
                     *(number(r[m].get("proxy", r[m]["score"]) if m in r else None) for m in others),
                     "proxy, compares with nothing" if "proxy" in r else r["metric"], ", ".join(f"{k} {v}" for k, v in r["paper"].items())])
    width, words = [max(map(len, column)) for column in zip(*rows)], (0, len(head) - 2, len(head) - 1)
    return "\n".join("  ".join(cell.ljust(width[k]) if k in words else cell.rjust(width[k]) for k, cell in enumerate(row)).rstrip() for row in rows)



def report(result, pictures, files, out, seconds):
    """What else must be known of one benchmark, in a line or two."""
    said = [f"{result['benchmark']}: {len(result['records'])} questions on {pictures} pictures in {seconds:.1f} s"]
    if "prompts" in result:
        said.append(f"prompts {result['prompts']}, answers {'by ' * (result['answers'] == 'likelihood')}{result['answers']}")
    if result["missing"]:
        said.append(f"{result['missing']} without an answer, counted as wrong")
    if result["cut_off"]:
        said.append(f"{result['cut_off']} answers cut off")
    if result["score"] is None and "proxy" not in result:
        said.append("its labels are hidden: no score can be computed, hand in the submission")
    if "proxy" in result:
        said.append("its score needs GPT-4: judge_requests.jsonl is ready to send")
    if c := result.get("compare"):
        said.append(f"against {c['with']}: {c['difference']:+.2f} points ({c['ci95'][0]:+.2f} to {c['ci95'][1]:+.2f}), "
                     f"{c['better']} better, {c['worse']} worse of {c['n']}, p = {c['p']:.3g}")
    print("; ".join(said) + f"\n  {out / 'results.json'}, {', '.join(files)}", flush=True)



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
            sheet.paste(ImageOps.pad(open_picture(source), (side, side), color="white"), (x, y))
        row = y + side + 6
        captions = ("", item["question"], "#222222", 5), ("said: ", r["answer"], "#c03020", 2), ("truth: ", r["truth"], "#207030", 2)
        for label, value, color, most in captions:
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
    add, toys = cli.add_argument, [f"toy-{name}" for name in toyworld.OFFICIAL]
    switch = argparse.BooleanOptionalAction
    add("--benchmark", nargs="+", default=toys, metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}; or, on the toy world, {', '.join(toys)} (default: all of the toy's)")
    add("--data", default="", metavar="DIR", help="folder with the official files under their official names, or the one annotation file; "
                                                  "of toy-...: the toy world (default toyworld)")
    add("--image-root", default="", metavar="DIR", help="folder that the pictures' official paths start from (default: --data)")
    add("--predictions", default="", metavar="FILE", help="score these answers, in the benchmark's own result format or LLaVA's; no model is opened")
    add("--split", default="", help="val, test, testA, ...; empty: the one with public labels")
    add("--limit", type=int, default=0, metavar="N", help="about this many questions, drawn at random but always the same; "
                                                          "pairs and circular groups stay whole (default 0: all)")
    add("--out", default="", metavar="DIR", help="folder for results.json and the rest; with several benchmarks one folder in it each "
                                                 "(default out/eval/NAME)")
    add("--resume", action=switch, default=False, help="leave out the questions that an interrupted run has answered")
    add("--blind", default="", choices=["", "none", "other"], help="baseline column: ask without picture, or with another record's")
    add("--cot", action=switch, default=False,
        help="ask for a chain of thought, and directly in a column beside it; also: read --predictions so")
    add("--compare", default="", metavar="RESULTS", help="results.json of another model: paired test")
    add("--show", type=int, default=0, metavar="N", help="draw N wrong answers with picture, question, answer and truth into wrong.png")
    add("--family", default="", choices=["", "llava", "prismatic", "internvl"],
        help="whose prompts and readers, where they differ (default: the model's, by its template)")
    add("--likelihood", action=switch, default=None,
        help="POPE, VSR, TallyQA, AI2D: the likeliest of the candidates' tokens (default: Prismatic's models)")
    add("--box-frame", default="original", choices=["original", "square"],
        help="what the model's boxes are fractions of: the picture, or its padded square (default original)")
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
    for flag, least in ("limit", 0), ("show", 0), ("batch_size", 1), ("max_new_tokens", 0):
        if getattr(cfg, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: must be at least {least}")
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    if cfg.predictions and (len(cfg.benchmark) > 1 or cfg.blind):
        raise UserError("--predictions goes with one --benchmark, and without --blind: there is no model to ask again")
    if cfg.resume and cfg.predictions:
        raise UserError("--resume is for a model's answers; --predictions has them all")
    return cfg



def find_name(name):
    """MMBench, mm_vet, seed: any spelling of one name."""
    known = {re.sub(r"[^a-z0-9+]", "", n.lower()): n for n in [*BENCHMARKS, *(f"toy-{t}" for t in toyworld.OFFICIAL)]} | ALIASES
    key = re.sub(r"[^a-z0-9+]", "", name.lower())
    if key not in known:
        one_of("--benchmark", name, sorted(set(known.values())))
    return known[key]


if __name__ == "__main__":
    sys.exit(run(main))
