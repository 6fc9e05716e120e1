"""pairs: moved here; to be rewritten."""

from collections import Counter
from itertools import islice, product
from pathlib import Path
import argparse
import json
import math
import random
import re
import sys
import time

from tqdm import tqdm

from conversation import encode_prompt, find_template
from data import Records
from eval import is_right
from mpo import fingerprint, model_files, whole_lines
from sample import answer, newest_run, open_model, read_answer
from support.cli import must, run, Flags, UserError, one_of, parse_args, pick_device
from support.io import write_whole
from vision import MODES, cut_tiles, open_image



PROMPTS = {                                      # for step-by-step answers, exactly the authors' (MMPR v1, v1.1 and their CoT evaluation)
    "en": "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to answer, "
          'please use the format "Final answer: .."\n\nQuestion:\n\n{question}',
    "zh": "你的任务是回答以下问题。在回答之前，请逐步推理说明您的思路。当你准备好给出答案时，请使用以下格式：\"答案: ...\"\n\n问题:\n\n{question}",
}
TRIGGERS = ("Final answer:", "Final Answer:", "答案:")
DIRECT = ("Answer the question using a single word or phrase.", "Answer with the option's letter from the given choices directly.",
          "Please answer Yes or No.", r"Please answer the question and put the final answer within \boxed{}.")
NUMBERS = {word: str(i) for i, word in enumerate("none one two three four five six seven eight nine ten".split())} | {"zero": "0"}



def parse_answer(response, min_newlines=2):
    """A worked answer -> (the rationale with its trigger, the final answer), or None where the format was not kept: a trigger once or twice,
    the last of them counts; something before it; newlines, because reasoning has lines; one line after it."""
    trigger = next((t for t in TRIGGERS if t in response), None)
    if trigger is None or response.count(trigger) > 2 or response.count("\n") < min_newlines:
        return None
    rationale, _, final = response.rpartition(trigger)
    if not rationale.strip() or not final.strip() or "\n" in final.strip():
        return None
    return rationale + trigger, final.strip()



def letter(text):
    """B of "B", "B. cat", "(B)"; else None."""
    found = re.match(r"\(?([A-N])\)?(?:[.:)\s]|$)", text.strip().strip("*"))
    return found and found[1]



def judge(said, truth):
    """Is this the answer? Case, articles and punctuation do not matter, two for 2 is right, numbers agree to 1 part in 1000, letters by
    themselves, boxes by IoU. (MMPR's fourth scorer, math-verify, is not here: formulas must be written alike.)"""
    if len(truth.strip()) == 1 and letter(truth):
        return letter(said) == letter(truth)
    bare = lambda text: re.sub(r"[^\w\s.%/+-]|\.(?!\d)|(?<=\d),(?=\d{3})", "", text.lower()).split()
    plain = lambda text: " ".join(NUMBERS.get(w, w) for w in bare(text) if w not in ("a", "an", "the"))
    a, b = plain(said), plain(truth)
    if a == b and b:
        return True
    try:
        a, b = (float(re.sub(r"(degrees?|cm|%)$", "", text).strip()) for text in (a, b))
        return abs(a - b) <= 1e-3 * abs(b)
    except ValueError:
        return is_right(said, truth)



def fix_answer(response, truth, min_newlines):
    """A right answer's last line as the truth writes it, and without bold: so that the model learns that form."""
    head, final = parse_answer(response, min_newlines)
    bare = final.strip("*").strip()
    lines = (head + " " + (truth if truth.lower() in bare.lower().replace(",", "").strip(".") else bare)).split("\n")
    return "\n".join(lines[:-1] + [lines[-1].replace("**Final", "Final")])



def read_questions(records, method):
    """-> [{"where", "image", "paths", "question", "truth", "chosen", ...}], one for each question of each record; and why others are none.

    `whole` and `tokens` are of the chosen answer, as it is given: that of a file is whole and cost nothing.
    """
    found, wrong = [], []
    for i in range(len(records)):
        try:
            record = records[i]
            paths = [records.image_path(name) for name in record["images"]]
        except UserError as error:
            wrong.append(str(error))
            continue
        turns = record["turns"] if record["turns"][0][0] == "human" else record["turns"][1:]
        for k in range(0, len(turns), 2):
            where = records.where(i, record["id"]) + (f", turn {k + 1}" if len(turns) > 2 else "")
            truth, text = turns[k + 1][1].strip() if k + 1 < len(turns) else "", turns[k][1]
            if method == "correctness" and not truth:
                wrong.append(f"{where}: no answer to judge by")
            elif not text.replace("<image>", "").strip():
                wrong.append(f"{where}: no question")
            else:
                found.append({"where": where, "image": record.get("image"), "paths": paths, "question": text, "truth": truth,
                              "chosen": record.get("chosen"), "whole": True, "tokens": 0})
    return found, wrong



def worked(question, n_image, prompt):
    """The question in the step-by-step prompt: without the ending that asks for a short answer, its one picture in front."""
    text = question.replace("<image>", "").strip() if n_image <= 1 else question.strip()
    for ending in DIRECT:
        text = text.removesuffix(ending).strip()
    return "<image>\n" * (n_image == 1) + PROMPTS[prompt].replace("{question}", text)



def draw_answers(vlm, tok, rows, cfg, seed):
    return answer(vlm, tok, rows, cfg.max_new_tokens, cfg.batch_size, seed, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k)



def pairs_by_correctness(vlm, tok, asked, cfg, seed):
    """Sample answers to each question, and pair the right with the wrong and with those that kept no format -> [(pairs, counts), ...]"""
    results, said = [], iter(draw_answers(vlm, tok, [q["row"] for q in asked for _ in range(cfg.samples)], cfg, seed))
    for q in asked:
        count, right, wrong = Counter(), {}, {}
        for text, whole, ids in islice(said, cfg.samples):
            n = len(ids)
            found = parse_answer(text, cfg.min_newlines)
            kind = ("cut off" if not whole else "empty" if not text else "no format" if not found
                    else "right" if judge(found[1], q["truth"]) else "wrong")
            count.update({"answers": 1, "tokens": n, f"answers {kind}": 1})
            if kind == "right":
                right[fix_answer(text, q["truth"], cfg.min_newlines)] = found[1]
            elif kind in ("wrong", "no format"):
                wrong[text] = found and found[1]
        made = []
        for (good, a), (bad, b) in product(right.items(), wrong.items()):
            if b is not None and a.lower() in b.lower():                    # "2" in "12 or 2": perhaps right after all
                count["pairs in doubt"] += 1
            else:
                made.append({"image": q["image"], "question": q["prompt"], "chosen": good, "rejected": bad, "answer_gt": q["truth"],
                             "rule": "format" if b is None else "answer"})
        kept = random.Random(f"{cfg.seed} {q['where']}").sample(made, min(len(made), cfg.pairs_per_question))
        count.update({"pairs beyond the cap": len(made) - len(kept),
                      f"questions {'all right' if not wrong else 'none right' if not right else 'right and wrong'}": 1})
        results.append((kept, count))
    return results



def pairs_by_dropout(vlm, tok, asked, cfg, seed):
    """DropoutNTP: keep the first words of an answer that was given with the picture, and complete it without -> [(pairs, counts), ...]"""
    form, results = vlm.cfg.template, []
    own = [q for q in asked if q["chosen"] is None]                         # the others have their answer from the file
    for q, said in zip(own, draw_answers(vlm, tok, [q["row"] for q in own], cfg, seed)):
        q["tokens"], q["chosen"], q["whole"] = len(said.ids), said.text, said.whole
    begun = [q for q in asked if q["chosen"].strip() and q["whole"]]
    lead = find_template(form).answer.split("{}")[0].replace("«", "")       # the space that opens an answer in LLaVA's templates
    for q in begun:
        words = q["chosen"].strip().split(" ")
        begin = " ".join(words[: int(len(words) * cfg.ratio)]).strip()
        q["begin"] = tok.encode(lead + begin, dummy_prefix=False) if begin else []
        ids, pictures = q["row"] if cfg.load_image else encode_asked(vlm, tok, q["question"].replace("<image>", "").strip(), [])
        q["row"] = ids + q["begin"], pictures
    said = iter(draw_answers(vlm, tok, [q["row"] for q in begun], cfg, seed + 2**31))
    for q in asked:
        count, chosen = Counter(tokens=q["tokens"]), q["chosen"].strip()
        if not chosen or not q["whole"]:
            results.append(([], count + Counter(["answers cut off" if not q["whole"] else "answers empty"])))
            continue
        ids = next(said).ids
        n, (rejected, whole, _) = len(ids), read_answer(tok, form, q["begin"] + ids)
        wrong = "cut off" if not whole else "empty" if not rejected else "the same" if rejected == chosen else ""
        count.update({"tokens": n, "answers": 1} | ({f"completions {wrong}": 1} if wrong else {}))
        front = "<image>\n" if len(q["paths"]) == 1 and "<image>" not in q["question"] else ""
        results.append(([] if wrong else [{"image": q["image"], "question": front + q["question"], "chosen": chosen, "rejected": rejected}], count))
    return results



def encode_asked(vlm, tok, question, paths):
    """-> prompt ids and [(tiles, layout), ...]"""
    pictures = [cut_tiles(open_image(p), vlm.cfg.vision, vlm.cfg.image_mode) for p in paths]
    ids = encode_prompt(tok, [("human", question)], vlm.cfg.template, [len(layout) for _, layout in pictures])
    if len(ids) >= vlm.cfg.decoder.block_size * 3 // 4:
        raise UserError(f"a question of {len(ids)} tokens leaves little room for an answer in {vlm.cfg.decoder.block_size}")
    return ids, pictures



def make_pairs(argv):
    """Groups of questions, one after the other; what a group gave is appended to PAIRS.jsonl.part at once, so a killed run goes on there."""
    cfg = parse_pairs(argv)
    out, by_truth = Path(cfg.out), cfg.method == "correctness"
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    records = Records(cfg.data, cfg.image_root)
    vlm, tok = open_model(cfg.model, pick_device(cfg.device), cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)
    asked, wrong = read_questions(records, cfg.method)
    asked = asked[:: math.ceil(len(asked) / cfg.limit)][: cfg.limit] if cfg.limit else asked
    if not asked:
        raise UserError(f"{cfg.data}: no question that could be used" + (f"; the first: {wrong[0]}" if wrong else ""))
    for reason in wrong[:5]:
        print(f"skipped: {reason}" + ("; the others are only counted" if reason == wrong[4:5] else ""))
    flags = {k: v for k, v in vars(cfg).items() if k not in ("out", "device", "model", "data", "image_root")}
    head = {"made by": "pairs.py", "key": fingerprint(model_files(cfg), [Path(cfg.data)], flags), **flags}
    out.parent.mkdir(parents=True, exist_ok=True)
    before = whole_lines(part) or [head]
    if before[0] != head:
        raise UserError(f"{part} was begun with another model, data or flags; give the same ones, or remove it")
    size = max(1, cfg.batch_size // (cfg.samples if by_truth else 1))
    first = len(before) - 1 if len(before) > len(asked) else (len(before) - 1) // size * size      # a half-written group is made again
    done = before[1 : 1 + first]
    write_whole(part, lambda tmp: tmp.write_text(to_lines([head, *done]), encoding="utf-8"))
    print(f"{len(asked):,} questions in groups of {size}" + (f"; {first:,} were answered before" if first else ""), flush=True)
    began, total = time.time(), sum((Counter(line["counts"]) for line in done), Counter(unreadable=len(wrong)))
    n_before = total["tokens"]
    with open(part, "a", encoding="utf-8") as file, tqdm(total=len(asked), initial=first, desc=cfg.method, unit="question",
                                                         disable=not sys.stderr.isatty()) as bar:
        for at in range(first, len(asked), size):
            group = [dict(q) for q in asked[at : at + size]]                # their pictures go when the group is done
            for q in group:
                q["prompt"] = worked(q["question"], len(q["paths"]), cfg.prompt) if by_truth else q["question"]
                try:
                    q["row"] = encode_asked(vlm, tok, q["prompt"], q["paths"])
                except UserError as error:
                    q["why"] = f"{q['where']}: {error}"
            usable = [q for q in group if "row" in q]
            found = iter((pairs_by_correctness if by_truth else pairs_by_dropout)(vlm, tok, usable, cfg, cfg.seed * 2**32 + at * 2**12))
            for q in group:
                pairs, count = next(found) if "row" in q else ([], Counter(["unusable"]))
                count.update({"questions": 1, "pairs": len(pairs)})
                done.append({"pairs": pairs, "counts": dict(+count)} | ({"why": q["why"]} if "why" in q else {}))
                total += count
            file.write(to_lines(done[at:]))
            file.flush()
            rate = f"{total['pairs']:,} pairs, {(total['tokens'] - n_before) / (time.time() - began):,.0f} tokens/s"
            bar.update(len(group))
            bar.set_postfix_str(rate)
            if not sys.stderr.isatty() and (len(done) * 10 // len(asked) > at * 10 // len(asked)):
                print(f"{len(done):,} of {len(asked):,} questions, {rate}", flush=True)
    made = [pair for line in done for pair in line["pairs"]]
    for why in [line["why"] for line in done if "why" in line][:5]:
        print(f"skipped: {why}")
    report(made, dict(total), tok, out)
    if not made:
        raise UserError(f"not one pair could be made; the counts are above, {part} holds what there is")
    write_whole(out, lambda tmp: tmp.write_text(to_lines(made), encoding="utf-8"))
    part.unlink()
    print(f"{len(made):,} pairs are in {out}; train on them: python mpo.py --model {cfg.model} --data {out} --image-root {cfg.image_root}")
    return 0



def to_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)



def report(made, counts, tok, out):
    """Print what was kept, what was dropped and why, and how long the answers are; the same as JSON beside the pairs."""
    for name in sorted(counts):
        print(f"{name:26s}{counts[name]:10,}")
    summary = {"counts": counts}
    if made:
        lengths = {name: [len(tok.encode(pair[name])) for pair in made] for name in ("question", "chosen", "rejected")}
        summary |= {"tokens_generated_per_pair": counts["tokens"] / len(made),
                    "tokens": {name: {"mean": sum(n) / len(n), "min": min(n), "max": max(n)} for name, n in lengths.items()}}
        print(f"{'tokens generated per pair':26s}{summary['tokens_generated_per_pair']:10.1f}")
        for name, n in summary["tokens"].items():
            print(f"{'tokens of the ' + name:26s}{n['mean']:10.1f}   {n['min']} to {n['max']}")
    write_whole(out.with_name(out.name + ".stats.json"), lambda tmp: tmp.write_text(json.dumps(summary, indent=1) + "\n"))



PAIRS_FLAGS = [                                  # name, default (None: the flag must be given), help
    ("method", None, "correctness: right against wrong answers to questions with one true answer; dropout-ntp: answers against their completion "
                     "without the picture"),
    ("data", None, "questions: JSONL of {image, question, answer}, or LLaVA's JSON; for dropout-ntp \"chosen\" in a record is taken for the answer, "
                   "else the model gives it"),
    ("out", None, "JSONL for the pairs"),
    ("model", "", "model directory; empty: the newest finished run under out/"),
    ("vision", "", "tower of a model that was published without, DIR or DIR,DIR"),
    ("llm", "", "directory of the base of a LoRA"),
    ("image-root", "", "folder that the pictures' names start from; empty: that of --data"),
    ("samples", 32, "correctness: answers to each question"),
    ("pairs-per-question", 15, "correctness: at most so many, drawn at random"),
    ("min-newlines", 2, "correctness: an answer with fewer has not reasoned in lines"),
    ("prompt", "en", f"correctness: language of the step-by-step prompt, {' or '.join(PROMPTS)}"),
    ("ratio", 0.5, "dropout-ntp: share of an answer's words that is kept, 0 to 1"),
    ("load-image", False, "dropout-ntp: complete with the picture after all"),
    ("temperature", 1.0, "0 takes the likeliest word, more draws at random"),
    ("top-k", 50, "draw from so many likeliest words; 0: all"),
    ("top-p", 1.0, "draw from the smallest set of words holding this probability"),
    ("max-new-tokens", 1024, "longest answer in tokens; one that reaches it makes no pair"),
    ("batch-size", 64, "answers generated at once"),
    ("limit", 0, "questions, evenly spread over the file; 0: all"),
    ("template", "", "conversation template; empty: the model's own"),
    ("image-mode", "", f"{', '.join(MODES)}; empty: the model's own"),
    ("seed", 0, "of the draws"),
    ("device", "auto", "cpu, cuda, cuda:N or auto"),
    ("dtype", "float32", "of the weights: float32, bfloat16, float16, or auto: as they are stored, but bfloat16 for float16 on a CPU"),
]



def parse_pairs(argv):
    cli = Flags(prog="pairs.py", description=make_pairs.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, said in PAIRS_FLAGS:
        kind = str if default is None else type(default)
        shown = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind], "required": default is None}
        cli.add_argument(f"--{name}", default=default, help=said, **shown)
    cfg = parse_args(cli, argv)
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    one_of("--method", cfg.method, ["correctness", "dropout-ntp"])
    one_of("--prompt", cfg.prompt, list(PROMPTS))
    one_of("--dtype", cfg.dtype, ["auto", "float32", "bfloat16", "float16"])
    must(cfg, "ratio", lambda x: 0 <= x < 1, "from 0 to below 1")
    must(cfg, "temperature", lambda x: 0 <= x < math.inf, "0 or more")
    must(cfg, "seed", lambda x: 0 <= x < 2**30, "from 0 to 2^30 - 1")
    must(cfg, "min_newlines limit top_k", lambda x: x >= 0, "0 or more")
    must(cfg, "samples pairs_per_question max_new_tokens batch_size", lambda x: x >= 1, "at least 1")
    cfg.model, cfg.image_root = cfg.model or str(newest_run()), cfg.image_root or str(Path(cfg.data).parent)
    return cfg


def main(argv=None):
    return make_pairs(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(run(main))
