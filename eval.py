"""Ask a model all questions of a benchmark, judge its answers, and print a table.

    python eval.py                                      # the newest run on the toy's held-out questions
    python eval.py --benchmark pope --data DIR --image-root DIR    # official files, official names
    python eval.py --benchmark gqa --data DIR --predictions FILE   # somebody else's answers, no model

What a benchmark asks and how its authors score it stands in benchmarks/, one file a family; scoring.py there
adds up. Here its questions are put in batches and answered. --out gets results.json (every prompt, answer and
verdict), answers.jsonl (LLaVA's form, which --predictions reads), what an official server takes, and
progress.jsonl, from which --resume goes on.

Where this departs from the originals:
  - several questions at once, each picture looked at once for all of its questions in a batch; the originals
    ask one by one. Answers are the same but for float rounding;
  - a question too long for the model is counted as wrong, and said; the originals cut it;
  - what GPT-4 grades ends with requests to it (benchmarks/judged.py), and MathVista's answers are extracted
    by rule (benchmarks/reasoning.py).
"""

import io
import json
import math
import os
import sys
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import sample
from benchmarks import BENCHMARKS
from benchmarks.common import COT, LETTER, SHORT, Benchmark, final_part, is_right, question
from benchmarks.predictions import match_predictions
from benchmarks.scoring import compare, grade
from conversation import as_text
from data import Records, picture_paths
from support.cli import UserError, arg, parse, run
from support.io import json_lines, read_json, reading, write_json, write_whole
from vision import MODES, cut_tiles, open_image, to_rgb


@dataclass
class EvalConfig:
    benchmark: tuple = arg(
        ("own",), "own: the questions of a val.jsonl, such as the toy world's", choices=("own", *BENCHMARKS)
    )
    data: str = arg("", "folder with the official files, or the one file; of own: val.jsonl or its folder")
    image_root: str = arg("", "folder that the pictures' official paths start from; empty: --data")
    predictions: str = arg("", "score these answers, JSON or JSON lines of an id and a text")
    split: str = arg("", "val, test, testA, ...; empty: the one with public labels")
    limit: int = arg(0, "about this many questions, drawn at random but always the same; 0: all", at_least=0)
    out: str = arg("", "folder for results.json and the rest; of several one each; empty: out/eval/NAME")
    show: int = arg(0, "draw this many wrong answers into wrong.png", at_least=0)
    resume: bool = arg(False, "leave out the questions that an interrupted run has answered")
    blind: str = arg("", "baseline column: no picture, or another record's", choices=("none", "other"))
    cot: bool = arg(False, "ask for a chain of thought, and directly beside it; also: read --predictions so")
    compare: str = arg("", "results.json of another model: the difference on the same questions")
    family: str = arg(
        "", "whose prompts and readers; empty: by the template", choices=("llava", "prismatic", "internvl")
    )
    likelihood: str = arg(
        "auto", "take the likeliest candidate; auto: of Prismatic's models", choices=("auto", "yes", "no")
    )
    model: str = arg("", "model directory; empty: the newest finished run under out/")
    vision: str = arg("", "tower of a model that was published without, DIR or DIR,DIR")
    llm: str = arg("", "directory of the base of a LoRA")
    template: str = arg("", "conversation template; empty: the model's own")
    image_mode: str = arg("", "how a picture becomes tiles; empty: the model's own", choices=MODES)
    batch_size: int = arg(32, "questions answered at once", at_least=1)
    max_new_tokens: int = arg(0, "longest answer in tokens; 0: the benchmark's, 16 to 1024", at_least=0)
    device: str = arg("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = arg("float32", "of the weights", choices=("float32", "bfloat16", "float16"))


def main(argv=None):
    cfg = parse(EvalConfig, argv, __doc__)
    if cfg.predictions and (len(cfg.benchmark) > 1 or cfg.blind or cfg.resume):
        raise UserError("--predictions goes with one --benchmark, without --blind or --resume")
    vlm, tok = (None, None) if cfg.predictions else sample.open_asked(cfg)

    # Whose prompts the model knows, and how its authors take an answer
    template = vlm.cfg.template if vlm else ""
    families = {"intern": "internvl", "prism_": "prismatic"}
    cfg.family = cfg.family or families.get(template[:6], "llava")
    if cfg.likelihood == "auto":
        cfg.likelihood = "yes" if vlm and cfg.family == "prismatic" else "no"

    results = []
    for name in cfg.benchmark:
        out = Path(cfg.out or "out/eval")
        if len(cfg.benchmark) > 1 or not cfg.out:
            out = out / name
        results.append(evaluate(name, cfg, vlm, tok, out))
    print("\n" + table(results))
    return 0


def evaluate(name, cfg, vlm, tok, out):
    """One benchmark from its files to results.json, which is returned."""
    bench = SUITE[name]
    items = read_items(name, bench, cfg)
    if cfg.predictions:
        columns = {"given": match_predictions(bench, items, cfg.predictions)}
        items = draw_some(items, cfg.limit)
    else:
        items = draw_some(items, cfg.limit)
        head = asdict(cfg) | {"benchmark": name, "questions": len(items), "weights": weights_stamp(cfg.model)}
        progress = Progress(out / "progress.jsonl", head, cfg.resume)
        columns = ask_columns(vlm, tok, items, cfg, progress)

    result = score_columns(name, items, columns, cfg)
    if cfg.compare:
        with reading(cfg.compare, "give a results.json of eval.py"):
            theirs = read_json(cfg.compare)["records"]
            result["compare"] = compare(bench, result["records"], theirs) | {"with": cfg.compare}
    files = write_results(result, items, out)
    if cfg.show:
        files.append(draw_wrong(items, result["records"], cfg, out / "wrong.png"))
    print(report(result) + "\n  " + ", ".join(files), flush=True)
    return result


# ---- questions ----


def read_items(name, bench, cfg):
    if name == "own" and not cfg.data:
        cfg.data = "toyworld"
    if not cfg.data or not Path(cfg.data).exists():
        raise UserError(f"--data {cfg.data}: no such folder; give the one with the files of {name}")
    with reading(cfg.data):
        items = [item | {"benchmark": name} for item in bench.read(cfg)]
    if not items:
        raise UserError(f"{cfg.data}: no question of {name} in it; check --data and --split")
    id, n = Counter(str(item["id"]) for item in items).most_common(1)[0]
    if n > 1:
        raise UserError(f"{cfg.data}: two questions of {name} have the id {id!r}; get the files again")
    return items


def draw_some(items, limit):
    """--limit: a random sample, always the same, in file order. Units stay whole, so a few more may come."""
    if not limit or limit >= len(items):
        return items
    units = list(dict.fromkeys(item.get("unit", item["id"]) for item in items))
    n = max(1, round(limit * len(units) / len(items)))
    order = np.random.default_rng(21).permutation(len(units))
    kept = {units[i] for i in order[:n]}
    return [item for item in items if item.get("unit", item["id"]) in kept]


def prompt_of(item, cot=False):
    """The text after the picture. cot: InternVL's frame, or the benchmark's, replaces the instruction."""
    if cot:
        return item.get("cot", COT + item["text"])
    return item["text"] + ("\n" + item["suffix"] if item["suffix"] else "")


def find_pictures(items, cfg):
    """{id: [path or bytes, ...]}; what is missing is said before the first answer."""
    folder = Path(cfg.data).parent if Path(cfg.data).is_file() else cfg.data
    root = Path(os.path.abspath(cfg.image_root or folder))
    find = cache(lambda name: find_picture(root, name))
    pictures = {}
    for item in items:
        image = item["image"]
        if isinstance(image, str):
            image = find(image)
        pictures[item["id"]] = image if isinstance(image, list) else [image] if image else []
    return pictures


def find_picture(root, name):
    """Where the official path says, under the bare name, or in images/. SEED-Bench's names have no ending."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise UserError(f"picture {name!r} lies outside --image-root {root}; move it there")
    names = [path.name]
    for ending in (".jpg", ".png"):
        names += [path.name + ending, path.stem + ending]
    for folder in (path.parent, path.parent / "images", root, root / "images"):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"{path}: no such picture; check the path and --image-root")


# ---- asking ----


@dataclass
class Column:
    """One way to ask all questions: a column of the table."""

    name: str
    cot: bool  # with a chain of thought?
    pictures: dict  # {question id: [path or bytes, ...]}


def columns_of(items, cfg):
    """The main column first."""
    pictures = find_pictures(items, cfg)
    columns = [Column("direct", False, pictures)]
    if cfg.cot:
        columns.insert(0, Column("chain of thought", True, pictures))
    is_own = items[0]["benchmark"] == "own"
    if cfg.blind == "other" or (is_own and not cfg.blind):
        columns.append(Column("shuffled pictures", cfg.cot, other_pictures(pictures)))
    if cfg.blind == "none":
        columns.append(Column("no pictures", cfg.cot, dict.fromkeys(pictures, [])))
    return columns


def other_pictures(pictures):
    """To each question the pictures of one far away: what is right all the same was not seen."""
    some = list(dict.fromkeys(picture for found in pictures.values() for picture in found))
    half = max(1, len(some) // 2)
    other = {picture: some[(i + half) % len(some)] for i, picture in enumerate(some)}
    return {id: [other[picture] for picture in found] for id, found in pictures.items()}


def ask_columns(vlm, tok, items, cfg, progress):
    return {column.name: ask(vlm, tok, items, column, cfg, progress) for column in columns_of(items, cfg)}


def ask(vlm, tok, items, column, cfg, progress):
    """-> {id: {"text", ...}}; {"missing"} of a question that is too long for the model.

    Batches are cut from all items, and --resume leaves out whole batches only: each answer comes from the
    same arithmetic as in an uninterrupted run.
    """
    done = progress.done[column.name]
    batches = cut_batches(items, column.cot, cfg.batch_size)
    todo = [batch for batch in batches if any(item["id"] not in done for item in batch)]
    n_done = len(items) - sum(map(len, todo))

    def encode_batch(batch):
        look = cache(lambda picture: open_picture(vlm, picture))  # once for all of its questions
        prompts = []
        for item in batch:
            pictures = [look(picture) for picture in column.pictures[item["id"]]]
            prompts.append(sample.encode_question(vlm, tok, typed_prompt(item, column.cot), pictures))
        return prompts

    quiet = not sys.stderr.isatty()
    with tqdm(total=len(items), initial=n_done, unit="question", desc=column.name, disable=quiet) as bar:
        for batch, prompts in one_ahead(encode_batch, todo):
            rows = answer_items(vlm, tok, batch, prompts, column, cfg)
            progress.write(column.name, batch, rows)
            bar.update(len(batch))
    return done


def cut_batches(items, cot, size):
    """Questions for answers of one kind, of about one length; those about one picture side by side."""
    longest = defaultdict(int)
    for item in items:
        picture = str(item["image"])
        longest[picture] = max(longest[picture], len(prompt_of(item, cot)))

    def order(item):
        prompt, picture = prompt_of(item, cot), str(item["image"])
        wants_a_word = SHORT in prompt or LETTER in prompt  # a batch runs until its longest answer has ended
        return COT in prompt, wants_a_word, longest[picture], picture, len(prompt)

    ordered = sorted(items, key=order)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def one_ahead(work, jobs):
    """(job, work(job)) of each job; the next one is worked on while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(work, job) for job in jobs[:1]]
        for k, job in enumerate(jobs):
            coming += [pool.submit(work, job) for job in jobs[k + 1 : k + 2]]
            yield job, coming.pop(0).result()


def read_image(picture):
    """MMBench's pictures are bytes that stand in its table; all others are files."""
    return to_rgb(Image.open(io.BytesIO(picture))) if isinstance(picture, bytes) else open_image(picture)


def open_picture(vlm, picture):
    return cut_tiles(read_image(picture), vlm.cfg.vision, vlm.cfg.image_mode)


def typed_prompt(item, cot):
    """In an official question <image> is a word; in one's own it is a picture's place."""
    prompt = prompt_of(item, cot)
    return prompt if item["benchmark"] == "own" else as_text(prompt)


def answer_items(vlm, tok, batch, prompts, column, cfg):
    """-> {"text", ...} of each, in order."""
    limit = cfg.max_new_tokens or (4096 if column.cot else SUITE[batch[0]["benchmark"]].max_new_tokens)
    limit = min(limit, vlm.cfg.decoder.block_size // 2)
    if cfg.likelihood == "yes" and "candidates" in batch[0] and not column.cot:
        return likeliest(vlm, tok, prompts, batch[0]["candidates"])
    rows = generate(vlm, tok, prompts, limit)

    # M3CoT asks a second time, for the letter; an empty first answer is no turn to go on from.
    again = [k for k, item in enumerate(batch) if "then" in item and rows[k].get("text")]
    second = []
    for k in again:
        earlier = [("human", typed_prompt(batch[k], column.cot)), ("gpt", as_text(rows[k]["text"]))]
        second.append(sample.encode_question(vlm, tok, batch[k]["then"], prompts[k][1], earlier))
    for k, row in zip(again, generate(vlm, tok, second, limit)):
        rows[k] = row | {"first": rows[k]["text"]}
    return rows


def generate(vlm, tok, prompts, limit):
    """Greedy. A prompt near the model's length is asked alone: nobody's answer depends on its neighbours."""
    longest = vlm.cfg.decoder.block_size
    lengths = [len(ids) for ids, _ in prompts]
    roomy = [k for k, n in enumerate(lengths) if n + limit <= longest]
    tight = [k for k, n in enumerate(lengths) if longest - limit < n < longest]
    rows = [{"missing": True} for _ in prompts]  # too long
    for group, batch_size in ((roomy, len(prompts)), (tight, 1)):
        if not group:
            continue
        answers = sample.answer(vlm, tok, [prompts[k] for k in group], limit, batch_size)
        for k, found in zip(group, answers):
            rows[k] = {"text": found.text, "cut_off": not found.whole}
    return rows


@torch.no_grad()
def likeliest(vlm, tok, prompts, candidates):
    """Prismatic's way: softmax at the first answer position over the candidates' single tokens."""
    choices = [tok.encode(candidate) for candidate in candidates]
    for candidate, ids in zip(candidates, choices):
        if len(ids) != 1:
            raise UserError(f"--likelihood: {candidate!r} is not one token of {tok.path}; --likelihood no")
    batch = sample.make_batch(vlm, tok, prompts, max_new_tokens=1)
    x = vlm.embed(batch["tokens"], vlm.features(batch["pixels"]), batch["layout"])  # (B, T, D)
    ends = [i * x.shape[1] + length - 1 for i, length in enumerate(batch["lengths"])]
    rows = torch.tensor(ends, device=x.device)  # (B,) each prompt's last row
    logits = vlm.decoder.lm_head(vlm.decoder(x, wanted=rows)).float()  # (B, V)
    p = logits[:, [id for (id,) in choices]].softmax(-1).cpu()  # (B, candidates)
    return [{"text": candidates[int(row.argmax())], "p": [round(x, 6) for x in row.tolist()]} for row in p]


class Progress:
    """progress.jsonl: the flags, then a line for each answer, from which --resume goes on."""

    def __init__(self, path=None, head=None, resume=False):
        self.path = path
        self.done = defaultdict(dict)  # {column: {question id: row}}
        if path is None:
            return
        lines = [json.dumps(head) + "\n"]
        if resume and path.exists():
            written = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in written if line.endswith("\n")]  # a kill may tear the last one
            check_flags(path, json.loads(whole[0]) if whole else {}, json.loads(lines[0]))
            lines += whole[1:]
        for line in lines[1:]:
            row = json.loads(line)
            self.done[row["column"]][row["id"]] = row
        write_whole(path, lambda tmp: tmp.write_text("".join(lines), encoding="utf-8"))

    def write(self, column, batch, rows):
        rows = [{"column": column, "id": item["id"]} | row for item, row in zip(batch, rows)]
        self.done[column] |= {row["id"]: row for row in rows}
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))


def check_flags(path, before, now):
    for name in now:
        if name not in ("out", "resume", "device", "compare", "show") and before.get(name) != now[name]:
            raise UserError(
                f"--resume: {path} was written with {name} {before.get(name)!r}, now it is {now[name]!r}; "
                "give the same flags, or leave out --resume"
            )


def weights_stamp(directory):
    """Size and time of the weights: two models under one name must not mix."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


# ---- questions of one's own ----


def read_own(cfg):
    """Records of a question and an answer, such as the toy world's val.jsonl, and perhaps a category."""
    path = Path(cfg.data)
    path = path / "val.jsonl" if path.is_dir() else path
    records = Records(path, cfg.image_root or path.parent)
    for i in range(len(records)):
        record = records[i]
        (_, text), (_, truth) = record["turns"][:2]
        paths = picture_paths(record)
        yield own_question(record["id"], paths, text, truth, record.get("category", "all"))


def own_question(id, paths, text, answer, category):
    item = question(id, None, text, "", answer, category=str(category))
    return item | {"image": [str(path) for path in paths]}


def own_answer(text, item):
    return text


def own_right(answer, item):
    return float(is_right(answer, item["truth"]))


def most_frequent(items):
    """A baseline: to every question of a category its most frequent answer."""
    answers = {}
    for category in {item["category"] for item in items}:
        truths = [item["truth"] for item in items if item["category"] == category]
        top = Counter(map(final_part, truths)).most_common(1)[0][0]
        answers[category] = next(truth for truth in truths if final_part(truth) == top)
    return {item["id"]: {"text": answers[item["category"]]} for item in items}


def examine(vlm, tok, questions, out=None):
    """Answer held-out questions, print the score by category beside two baselines, write out/results.json.

    questions: [{"id", "paths", "text", "answer", "category"}, ...]
    """
    cfg = EvalConfig(batch_size=48)
    items = []
    for k, asked in enumerate(questions):
        item = own_question(k, asked["paths"], asked["text"], asked["answer"], asked["category"])
        items.append(item | {"benchmark": "own"})
    columns = ask_columns(vlm, tok, items, cfg, Progress())
    result = score_columns("own", items, columns, cfg)
    print(f"\nheld-out accuracy\n{table([result])}")
    print(f"{result['cut_off']} of {len(items)} answers were cut off for being too long")
    if out:
        write_json(out / "results.json", result | {"table": shares(result)})
    return result


def shares(result):
    """{category, and all: what share of it is right, by the model and by both baselines}"""
    names = {"most_frequent": "most frequent answer", "shuffled": "shuffled pictures"}
    rows = {}
    for category in [*result["categories"], "all"]:
        of_it = lambda figures, c=category: figures if c == "all" else figures["categories"][c]
        rows[category] = {"n": of_it(result)["n"], "accuracy": of_it(result)["score"] / 100}
        rows[category] |= {key: of_it(result["columns"][name])["score"] / 100 for key, name in names.items()}
    return rows


def answer_questions(vlm, tok, questions):
    """[{"text", "paths"}, ...] -> [sample.Answer, ...]"""
    look = cache(lambda path: open_picture(vlm, path))
    prompts = []
    for asked in questions:
        pictures = [look(path) for path in asked["paths"]]
        prompts.append(sample.encode_question(vlm, tok, asked["text"], pictures))
    return sample.answer(vlm, tok, prompts, SUITE["own"].max_new_tokens)


SUITE = BENCHMARKS | {"own": Benchmark(read_own, own_answer, own_right, max_new_tokens=96)}


# ---- results ----


def score_columns(name, items, columns, cfg):
    """{column: {question id: answer}} -> what results.json holds; the first column is the score."""
    bench = SUITE[name]
    if name == "own":
        columns = columns | {"most frequent answer": most_frequent(items)}
    graded = {}
    for column, answers in columns.items():
        graded[column] = grade(bench, items, answers, cot=cfg.cot and column != "direct")
    main = next(iter(graded))
    result = {"benchmark": name, "metric": bench.metric, "paper": bench.paper}
    result |= graded.pop(main) | {"columns": graded}
    for item, record in zip(items, result["records"]):
        record["prompt"] = prompt_of(item, main == "chain of thought")
        record["image"] = item["image"] if not isinstance(item["image"], bytes) else None
    if cfg.model:
        result |= {"model": cfg.model, "prompts": f"{cfg.family}, {main}", "likelihood": cfg.likelihood}
    return result


def write_results(result, items, out):
    """-> the files that were written."""
    bench, records = SUITE[result["benchmark"]], result["records"]
    model = result.get("model", "")
    answers = [
        {"question_id": record["id"], "prompt": record["prompt"], "text": record["answer"], "model_id": model}
        for record in records
    ]
    files = {"results.json": json.dumps(result, indent=1, ensure_ascii=False)}
    files["answers.jsonl"] = json_lines(answers)
    if bench.submit:
        name, text = bench.submit(items, records)
        files[name] = text
    for name, text in files.items():
        write_whole(out / name, lambda tmp, text=text: tmp.write_text(text, encoding="utf-8"))
    return [str(out / name) for name in files]


def report(result):
    """What else must be known of one benchmark."""
    said = [f"{result['benchmark']}: {result['n']} questions"]
    if "prompts" in result:
        said.append(f"prompts {result['prompts']}, by likelihood {result['likelihood']}")
    if result["missing"]:
        said.append(f"{result['missing']} without an answer, counted as wrong")
    if result["cut_off"]:
        said.append(f"{result['cut_off']} answers cut off")
    if result["score"] is None:
        said.append("no score without labels or grades: hand it in, or send judge_requests.jsonl to GPT-4")
    if "compare" in result:
        said.append(f"against {result['compare']['with']}: {describe_comparison(result['compare'])}")
    return "; ".join(said)


def describe_comparison(found):
    low, high = found["ci95"]
    counts = f"{found['better']} better, {found['worse']} worse of {found['n']}"
    return f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), {counts}"


def table(results):
    """A row for each benchmark and each of its categories: score, interval, baselines, papers."""
    others = list(dict.fromkeys(column for result in results for column in result["columns"]))
    rows = [["", "score", "95% interval", "n", "unparsed", *others, ""]]
    for result in results:
        columns = [result["columns"].get(name) for name in others]
        last = f"{result['metric']}  {result['paper']}".rstrip()
        rows.append(table_row(result["benchmark"], result, columns, f"{result['unparsed']:.1%}", last))
        for category, figures in result["categories"].items():
            beside = [column and column["categories"].get(category) for column in columns]
            more = ", ".join(f"{name} {figure:.4g}" for name, figure in figures["more"].items())
            rows.append(table_row(f"  {category}", figures, beside, last=more))

    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for first, *cells, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def table_row(name, figures, columns, unparsed="", last=""):
    low_high = figures["ci95"]
    interval = "{:.2f} to {:.2f}".format(*low_high) if low_high else "-"
    scores = [f"{f['score']:.2f}" if f and f["score"] is not None else "-" for f in (figures, *columns)]
    return [name, scores[0], interval, str(figures["n"]), unparsed, *scores[1:], last]


def draw_wrong(items, records, cfg, path, columns=4, side=240):
    """--show: wrong answers, spread over the file, each with picture, question, answer and truth."""
    wrong = [pair for pair in zip(items, records) if pair[1]["score"] is not None and pair[1]["score"] < 0.5]
    n = min(cfg.show, len(wrong))
    chosen = [wrong[i * len(wrong) // n] for i in range(n)]
    pictures = find_pictures([item for item, _ in chosen], cfg)

    # A cell holds a picture and up to nine lines of text below it.
    width, height = side + 16, side + 150
    n_rows = max(1, math.ceil(n / columns))
    sheet = Image.new("RGB", (columns * width, n_rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (item, record) in enumerate(chosen):
        x = k % columns * width
        y = k // columns * height
        for picture in pictures[item["id"]][:1]:
            sheet.paste(ImageOps.pad(read_image(picture), (side, side), color="white"), (x, y))
        lines = textwrap.wrap(item["text"], 38)[:5]
        lines += textwrap.wrap(f"said: {record['answer']}", 38)[:2]
        lines += textwrap.wrap(f"truth: {record['truth']}", 38)[:2]
        pen.text((x, y + side), "\n".join(lines), fill="black", font_size=12)
    write_whole(path, lambda tmp: sheet.save(tmp, format="PNG"))
    return str(path)


if __name__ == "__main__":
    sys.exit(run(main))
