"""Ask a model all questions of a benchmark, judge its answers, and print a table.

    python eval.py                                      # the newest run on the toy's held-out questions
    python eval.py --benchmark pope --data DIR --image-root DIR    # official files, official names
    python eval.py --benchmark gqa --data DIR --predictions FILE   # somebody else's answers, no model
    python eval.py --data val.jsonl --image-root DIR    # one's own questions: text, answer, category

What a benchmark asks and how its authors score it stands in benchmarks/, one file a family; scoring.py there
adds up. support/asking.py has the questions answered, in batches. Here is the way from files to a table: what
is asked, in which ways, and what is written. --out gets results.json (every prompt, answer and verdict),
answers.jsonl (LLaVA's form, which --predictions reads), what an official server takes, and progress.jsonl,
from which --resume goes on.

Where this departs from the originals:
  - several questions at once, and each picture goes through the tower once for all of its questions in a
    batch; the originals ask one by one. Answers are the same but for float rounding;
  - a question too long for the model is counted as wrong, and reported; the originals cut it;
  - every answer is written. Prismatic's harness takes the likeliest of a few words in POPE, VSR, AI2D and
    TallyQA (there of sixteen letters);
  - what GPT-4 grades ends with requests to it (benchmarks/judged.py), and MathVista's answers are extracted
    by rule (benchmarks/reasoning.py).
"""

import json
import os
import sys
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import sample
from benchmarks import BENCHMARKS, PUBLISHED
from benchmarks.common import COT, Benchmark, as_said, data_folder, draw_boxes, question
from benchmarks.own import most_frequent, own_right
from benchmarks.predictions import drop_unanswered_splits, match_predictions
from benchmarks.scoring import compare, describe_comparison, grade
from conversation import as_text
from support.asking import ask, resume_flags
from support.cli import UserError, arg, one_of, parse, run_program
from support.data_files import Records
from support.flags import ModelConfig
from support.io import Progress, json_lines, lock, read_json, reading, write_text, write_whole
from support.picture_files import open_image


@dataclass
class EvalConfig(ModelConfig):
    benchmark: tuple = arg(
        ("own",), "own: the questions of a val.jsonl, such as the toy world's", choices=("own", *BENCHMARKS)
    )
    data: str = arg("toyworld", "folder with the official files, or the one; of own: val.jsonl or its folder")
    image_root: str = arg("", "folder that the pictures' official paths start from; empty: --data")
    predictions: str = arg("", "score these answers, JSON or JSON lines of an id and a text")
    split: str = arg("", "val, test, testA, ...; empty: the one with public labels")
    limit: int = arg(0, "so many questions, drawn at random but always the same; 0: all")
    out: str = arg("", "folder for results.json and the rest; of several one each; empty: out/eval/NAME")
    show: int = arg(0, "draw this many wrong answers into wrong.png")
    resume: bool = arg(False, "leave out the questions that an interrupted run has answered")
    blind: str = arg("", "baseline column: no picture, or another record's", choices=("none", "other"))
    cot: bool = arg(False, "ask for a chain of thought, and directly beside it; also: read --predictions so")
    compare: str = arg("", "results.json of another model: the difference on the same questions")
    family: str = arg(
        "", "whose boxes; llava: Prismatic's, too; empty: by the template", choices=("llava", "internvl")
    )
    batch_size: int = arg(32, "questions answered at once", at_least=1)
    max_new_tokens: int = arg(0, "longest answer in tokens; 0: the benchmark's, 16 to 1024")


def main(argv=None):
    cfg = parse(EvalConfig, argv, __doc__)
    if cfg.predictions and (len(cfg.benchmark) > 1 or cfg.blind or cfg.resume):
        raise UserError("--predictions goes with one --benchmark, without --blind or --resume")
    vlm, tok = (None, None) if cfg.predictions else sample.open_asked(cfg)

    if not cfg.family:
        cfg.family = "internvl" if vlm and vlm.cfg.template.startswith("intern") else "llava"

    results = []
    for name in cfg.benchmark:
        out = Path(cfg.out or "out/eval")
        if len(cfg.benchmark) > 1 or not cfg.out:
            out /= name
        with lock(out / "lock"):
            results.append(evaluate_benchmark(name, cfg, vlm, tok, out))
    print("\n" + table(results))
    return 0


def evaluate_benchmark(name, cfg, vlm, tok, out):
    """One benchmark from its files to results.json, which is returned."""
    bench = SUITE[name]
    items = read_items(name, cfg)
    progress = given = None
    if cfg.predictions:
        given = match_predictions(bench, items, cfg.predictions)
        items = draw_some(drop_unanswered_splits(items, given), cfg.limit)
    else:
        items = draw_some(items, cfg.limit)
        flags = resume_flags(cfg)
        asked = repr([(item["id"], item["text"]) for item in items])
        flags |= {"benchmark": name, "questions of checksum": zlib.crc32(asked.encode())}
        progress = Progress(out / "progress.jsonl", flags, cfg.resume)
    result = evaluate(items, cfg, vlm, tok, progress, given)

    result["model"] = cfg.model
    if cfg.compare:
        with reading(cfg.compare, "give a results.json of eval.py"):
            found = compare(bench, result["records"], read_json(cfg.compare)["records"])
            result["compare"] = found | {"with": cfg.compare}
    if (out / "results.json").exists() and not cfg.resume:
        print(f"{out}: the results of an earlier run are replaced; another --out keeps both")
    files = write_results(bench, result, items, out)
    if cfg.show:
        files.append(draw_wrong(result["records"], cfg, out / "wrong.png"))
    print(f"{report(result)}\n  {', '.join(map(str, files))}")
    return result


def evaluate(items, cfg, vlm, tok, progress=None, given=None):
    """Ask all questions in every way, unless the answers are given, and add up -> what results.json holds.

    The first way is the score. A training run ends with this, too.
    """
    name = items[0]["benchmark"]
    bench = SUITE[name]
    graded = {}
    for column, questions in columns_of(items, cfg).items():
        answers = given or ask(vlm, tok, questions, cfg.batch_size, progress)
        graded[column] = grade(bench, questions, answers)
    if name == "own":
        graded["most frequent answer"] = grade(bench, questions, most_frequent(questions))
    first = next(iter(graded))
    result = {"benchmark": name, "column": first, "metric": bench.metric, "paper": PUBLISHED.get(name, "")}
    return result | graded.pop(first) | {"columns": graded}


# ---- questions ----


def read_items(name, cfg):
    bench = SUITE[name]
    with reading(cfg.data):
        items = [item | {"benchmark": name} for item in bench.read(cfg)]
    if not items:
        raise UserError(f"{cfg.data}: no question of {name} in it; check --data and --split")
    id, n = Counter(str(item["id"]) for item in items).most_common(1)[0]
    if n > 1:
        raise UserError(f"{cfg.data}: two questions of {name} have the id {id!r}; get the files again")
    return items


def read_own(cfg):
    """Every question of every record that has an answer, such as the toy world's val.jsonl."""
    one_of("--split", cfg.split, ["val"])
    path = Path(cfg.data)
    if path.is_dir():
        path /= "val.jsonl"
    records = Records(path, cfg.image_root).split_questions(with_earlier=True)
    n_seen = Counter()
    for record in records:
        match record["turns"]:
            case [*earlier, ("human", text), ("gpt", truth)]:
                id = record["id"]
                n_seen[id] += 1
                if n_seen[id] > 1:  # another question of this record, or another record of this name
                    id = f"{id}#{n_seen[id]}"
                category = str(record.get("category") or "all")
                yield question(id, record["images"], text, "", truth, category, earlier=earlier)
            case _:
                raise UserError(f'{record["where"]}: no answer; a question needs "text" and "answer"')


SUITE = BENCHMARKS | {"own": Benchmark(read_own, as_said, own_right, max_new_tokens=96)}


def draw_some(items, limit):
    """--limit: a random sample, always the same, in file order. The last unit drawn stays whole."""
    size = Counter(item["unit"] for item in items)
    units = list(size)
    drawn = set()
    n = 0
    for i in np.random.default_rng(21).permutation(len(units)):
        if not limit or n < limit:
            drawn.add(units[i])
            n += size[units[i]]
    return [item for item in items if item["unit"] in drawn]


# ---- the ways to ask them, each a column of the table ----


def columns_of(items, cfg):
    """-> {name: questions}; the first is the score."""
    if cfg.predictions:
        return {"given": [phrase(item, "given", [], cfg) for item in items]}
    pictures = find_pictures(items, cfg)
    pictures_of_column = {"chain of thought": pictures} if cfg.cot else {}
    pictures_of_column["direct"] = pictures
    if cfg.blind == "none":
        pictures_of_column["no pictures"] = [[]] * len(items)
    elif cfg.blind or items[0]["benchmark"] == "own":
        other = other_pictures(pictures)
        if len(other) > 1:
            pictures_of_column["shuffled pictures"] = [
                [other[picture] for picture in found] for found in pictures
            ]
    return {
        column: [phrase(item, column, found, cfg) for item, found in zip(items, pictures)]
        for column, pictures in pictures_of_column.items()
    }


def phrase(item, column, pictures, cfg):
    """A question as it is asked: with its prompt, its pictures and the most tokens of its answer."""
    prompt = f"{item['text']}\n{item['suffix']}".removesuffix("\n")
    limit = SUITE[item["benchmark"]].max_new_tokens
    worked = cfg.cot and column != "direct"
    if worked:  # InternVL's frame takes the place of the instruction
        prompt = item.get("cot", COT + item["text"])
        limit = 4096

    # In an official question <image> is a word, in one's own it is the place of a picture.
    typed = prompt if item["benchmark"] == "own" else as_text(prompt)
    turns = [*item.get("earlier", ()), ("human", typed)]
    return item | {
        "column": column,
        "worked": worked,
        "prompt": prompt,
        "turns": turns,
        "pictures": pictures,
        "limit": cfg.max_new_tokens or limit,
    }


def other_pictures(pictures):
    """[[picture, ...], ...] -> {picture: one far away}; what is right about that was not seen."""
    some = list(dict.fromkeys(picture for its_pictures in pictures for picture in its_pictures))
    half = len(some) // 2
    return dict(zip(some, some[half:] + some[:half]))


def find_pictures(items, cfg):
    """[[path or bytes, ...] of each question]; what is missing is an error before the first answer."""
    root = Path(os.path.abspath(cfg.image_root or data_folder(cfg)))
    pictures = []
    for item in items:
        images = item["image"] if isinstance(item["image"], list) else [item["image"]]  # own: several
        pictures.append([find_picture(root, image) for image in images if image])
    return pictures


def find_picture(root, name):
    """Where the official path says, under the bare name, or in images/. SEED-Bench's names have no ending."""
    if isinstance(name, bytes):  # MMBench's picture itself
        return name
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise UserError(f"picture {name!r} lies outside --image-root {root}; move it there")
    for folder in (path.parent, path.parent / "images", root, root / "images"):
        for ending in ("", ".jpg", ".png"):
            file = folder / (path.name + ending)
            if file.is_file():
                return file
    raise UserError(f"{path}: no such picture; check the path and --image-root")


# ---- results ----


def write_results(bench, result, items, out):
    """-> the files that were written."""
    records = result["records"]
    whole = json.dumps(result, indent=1, default=lambda picture: None)  # MMBench's are bytes
    files = {"results.json": whole}
    if not any("is_review" in record for record in records):  # of reviews nothing is handed in
        answers = [
            {"question_id": r["id"], "prompt": r["prompt"], "text": r["answer"], "model_id": result["model"]}
            for r in records
        ]
        files["answers.jsonl"] = json_lines(answers)
        if bench.submit:
            name, files[name] = bench.submit(items, records)
    for name, text in files.items():
        write_text(out / name, text)
    return [out / name for name in files]


def report(result):
    """What else must be known of one benchmark."""
    records = result["records"]
    n_missing = sum(r["answer"] is None and r["score"] is not None for r in records)
    counts = {
        "without an answer, counted as wrong": n_missing,
        "not scored, for want of a label or a review": len(records) - result["n"],
        "answers cut off": result["cut_off"],
    }
    notes = [f"{result['benchmark']}: {result['n']} questions, {result['column']}"]
    notes += [f"{n} {what}" for what, n in counts.items() if n]
    if result["score"] is None:
        notes.append("no score without labels or grades: hand it in, or send judge_requests.jsonl to GPT-4")
    if "compare" in result:
        notes.append(f"against {result['compare']['with']}: {describe_comparison(result['compare'])}")
    return "; ".join(notes)


def table(results):
    """A row for each benchmark and each of its categories: score, interval, baselines, papers."""
    others = list(dict.fromkeys(column for result in results for column in result["columns"]))
    rows = [["", "score", "95% interval", "n", "unparsed", *others, ""]]
    for result in results:
        baselines = [result["columns"].get(name) for name in others]
        notes = f"{result['metric']}  {result['paper']}"
        rows.append(table_row(result["benchmark"], result, f"{result['unparsed']:.1%}", baselines, notes))
        for category, figures in result["categories"].items():
            of_category = [baseline and baseline["categories"][category] for baseline in baselines]
            more = ", ".join(f"{name} {figure:.4g}" for name, figure in figures["more"].items())
            rows.append(table_row(f"  {category}", figures, "", of_category, more))

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *cells, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def table_row(name, figures, unparsed, baselines, notes):
    interval = "{:.2f} to {:.2f}".format(*figures["ci95"]) if figures["ci95"] else "-"
    scores = map(score_cell, baselines)
    return [name, score_cell(figures), interval, str(figures["n"]), unparsed, *scores, notes]


def score_cell(figures):
    """A dash where nothing was scored, or a benchmark was not asked in this way."""
    return "-" if figures is None or figures["score"] is None else f"{figures['score']:.2f}"


def draw_wrong(records, cfg, path):
    """--show: wrong answers, spread over the file: the picture, beside it question, answer and truth."""
    wrong = [record for record in records if record["score"] is not None and record["score"] < 0.5]
    chosen = wrong[:: max(1, len(wrong) // cfg.show)][: cfg.show]
    sheet = Image.new("RGB", (1024, max(1, len(chosen)) * 248), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for record, pictures in zip(chosen, find_pictures(chosen, cfg)):
        for picture in pictures[:1]:
            sheet.paste(ImageOps.pad(open_image(picture), (240, 240), color="white"), (0, top))
            for field, color in ("truth", "green"), ("answer", "red"):
                draw_boxes(pen, str(record[field]), 0, top, 240, color)
        text = f"{record['prompt']}\nsaid: {record['answer']}\ntruth: {record['truth']}"
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 100)]
        pen.text((248, top), "\n".join(lines[:16]), fill="black", font_size=12)
        top += 248
    write_whole(path, lambda tmp: sheet.save(tmp, format="PNG"))
    return path


if __name__ == "__main__":
    sys.exit(run_program(main))
