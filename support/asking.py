"""Many questions to a model, in batches: each picture is opened once for all of its questions in a batch, and
the next batch is prepared while this one is answered.

    question  {"id", "turns": [("human", text)], "pictures": [path or bytes, ...], "limit": tokens, ...}
    answer    {"id", "answer": text, "cut_off": whether the limit came before its end}
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import sample
from benchmarks.common import COT, LETTER, SHORT
from support.cli import Bar, UserError
from support.data_files import Records, picture_paths
from support.io import Progress, fingerprint, lock, write_json_lines
from support.picture_files import open_image
from support.weights import model_files


def ask(vlm, tok, questions, batch_size, progress=None):
    """-> {id: answer}

    Batches are cut from all questions, and --resume leaves out whole batches only: each answer comes from the
    same arithmetic as in an uninterrupted run.
    """
    column = questions[0]["column"]
    rows = progress.rows if progress else []
    done = {row["id"]: row for row in rows if row["column"] == column}
    batches = cut_batches(questions, batch_size)
    todo = [batch for batch in batches if any(item["id"] not in done for item in batch)]
    n_done = len(questions) - sum(map(len, todo))
    bar = Bar(total=len(questions), initial=n_done, unit="question", desc=column)
    with bar, ThreadPoolExecutor(1) as pool:
        prepare = partial(pool.submit, encode_questions, vlm, tok)
        coming = prepare(todo[0] if todo else [])
        for batch, following in zip(todo, [*todo[1:], []]):
            prompts = coming.result()
            coming = prepare(following)
            rows = write_answers(vlm, tok, batch, prompts)
            done |= {row["id"]: row for row in rows}
            if progress:
                progress.add(rows)
            bar.update(len(batch))
    return done


def cut_batches(questions, size):
    """Answers of one kind side by side, and among them the questions about a picture."""

    def kind(item):  # a batch runs until its longest answer has ended
        _, text = item["turns"][-1]
        wants_a_word = SHORT in text or LETTER in text
        return COT in text, wants_a_word, str(item["pictures"])

    alike = sorted(questions, key=kind)
    return [alike[i : i + size] for i in range(0, len(alike), size)]


def encode_questions(vlm, tok, questions):
    """-> prompts, as sample.answer takes them"""

    @cache
    def look(picture, n_picture):
        image = open_image(picture, "the path and --image-root")
        return sample.cut_picture(vlm, image, n_picture)

    prompts = []
    for item in questions:
        *earlier, (_, text) = item["turns"]
        pictures = [look(picture, len(item["pictures"])) for picture in item["pictures"]]
        prompts.append(sample.encode_question(vlm, tok, text, pictures, earlier))
    return prompts


def write_answers(vlm, tok, questions, prompts):
    """Greedy, unless the questions say "sampling"; nothing to one that is too long for the model."""
    block_size = vlm.cfg.decoder.block_size
    limit = min(questions[0]["limit"], block_size // 2)
    fitting = {k: prompt for k, prompt in enumerate(prompts) if len(prompt[0]) < block_size}

    # Near the model's length each is asked alone: nobody's answer depends on its neighbours.
    longest = max(len(ids) for ids, _ in prompts)
    batch_size = len(prompts) if longest + limit <= block_size else 1
    sampling = questions[0].get("sampling", {})
    answers = sample.answer(vlm, tok, list(fitting.values()), limit, batch_size, **sampling)
    rows = [{"column": item["column"], "id": item["id"]} for item in questions]
    for k, found in zip(fitting, answers):
        rows[k] |= {"answer": found.text, "cut_off": not found.whole}
    return rows


def resume_flags(cfg, files=()):
    """What must be the same for a run to go on: its flags, the data files, and the weights."""
    may_change = ("out", "device", "resume", "compare", "show")
    flags = {flag: value for flag, value in asdict(cfg).items() if flag not in may_change}
    files = [*files, *model_files(cfg.model, cfg.llm)]
    return flags | {"data and weights": fingerprint(files)}


@contextmanager
def new_file(out):
    """What --out names: a file that is not there yet, and that one program alone writes."""
    out = Path(out)
    with lock(out.with_name(f".{out.name}.lock")):
        if out.exists():
            raise UserError(f"--out {out} is there already; remove it, or give another")
        yield out


# ---- sample.py --file ----


def answer_file(cfg):
    """LLaVA's file of questions -> its file of answers, in the same order."""
    if not (cfg.file and cfg.out) or cfg.image or cfg.prompt or cfg.trace:
        raise UserError("--file FILE and --out FILE go together, without --image, --prompt and --trace")
    with new_file(cfg.out) as out:
        records = Records(cfg.file, cfg.image_root)
        questions = [file_question(record, cfg) for record in records]
        vlm, tok = sample.open_asked(cfg)
        progress = Progress(f"{out}.part", resume_flags(cfg, records.paths), cfg.resume)
        found = ask(vlm, tok, questions, 48, progress)
        rows = []
        for item in questions:
            text = found[item["id"]].get("answer", "")
            rows.append(item["row"] | {"text": text, "model_id": cfg.model})
        write_json_lines(out, rows)
        progress.path.unlink()
    n_cut = sum(answer.get("cut_off", False) for answer in found.values())
    n_long = sum("answer" not in answer for answer in found.values())
    print(f"{len(rows):,} answers are in {out}; {n_cut} were cut off, raise --max-new-tokens; {n_long} are "
          "empty, to questions too long for the model")
    return 0


def file_question(record, cfg):
    turns = record["turns"]
    if turns[-1][0] == "gpt":
        turns = turns[:-1]
    if not turns:
        raise UserError(f"{record['where']}: no question")
    pictures = picture_paths(record)
    for path in pictures:
        if not path.exists():
            raise UserError(f"{record['where']}: {path}: no such picture; check the path and --image-root")
    asked = {"id": record["number"], "turns": turns, "pictures": pictures, "column": "answers"}
    row = {"question_id": record.get("question_id", record["id"]), "prompt": turns[-1][1]}
    return asked | {"limit": cfg.max_new_tokens, "sampling": cfg.sampling, "row": row}
