"""Damage an input, give it to the real commands, and see whether they say in one line what is wrong.

    python tests/mutate.py 500 DIR                       # half an hour; no part of the test suite

A case is a copy of a small good set with one damaged file, or a command with one odd flag. Kept in DIR are:
    traceback   anything but a line; an exit code besides 0 and 1
    hang        nothing after a minute
    unnamed     an error that does not name the file
    silent      exit code 0 and no word besides the usual ones. To be judged by eye: some damage is none
"""

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import QUICK, ROOT, save, tiny_config

import eval
import toyworld
import train
from conversation import Tokenizer
from model import VLM
from support.io import json_lines
from support.start import init_weights

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ONE_STEP = " ".join([*QUICK, "--max-steps", "1"])
TRAIN = f"--model model --data world/train.json {ONE_STEP}"
ASK = "--model model --max-new-tokens 3"
COMMANDS = {                         # name -> program and flags
    "show": "tools.show world/train.json --model model",
    "check": "tools.show check world/train.json --model model --workers 0",
    "check val": "tools.show check world/val.jsonl --model model --workers 0",
    "check pairs": "tools.show check pairs.jsonl --image-root world --model model --workers 0",
    "train": f"train {TRAIN} --out new",
    "train val": f"train {TRAIN} --val world/val.jsonl --final-eval --out new",
    "parts": f"train {TRAIN} --model toy --vision clip --llm vicuna --dry-run",
    "resume": f"train {TRAIN} --max-steps 2 --resume --out run",
    "sample": f"sample {ASK} --image world/images/train_00000.png --prompt What?",
    "eval": f"eval {ASK} --data world/val.jsonl --limit 6 --out new",
    "score": "eval --data world/val.jsonl --predictions predictions.jsonl --out new",
    "compare": "tools.compare results.json results.json",
    "pairs": f"pairs {ASK} --method dropout-ntp --data world/val.jsonl --image-root world --out new.jsonl",
    "mpo": f"mpo --model model --data pairs.jsonl --image-root world {ONE_STEP} --out new",
    "meta": f"mpo --model model --data meta.json --image-root . {ONE_STEP} --out new",
    "info": "tools.weights info model",
    "convert": "tools.weights convert model new",
    "convert lora": "tools.weights convert lora new",
}
FILES = {                            # file -> the commands that read it
    "world/images/train_00000.png": ["check", "show", "train", "sample"],
    "world/train.json": ["check", "show", "train"],
    "world/val.jsonl": ["check val", "train val", "eval", "score", "pairs"],
    "pairs.jsonl": ["check pairs", "mpo"],
    "meta.json": ["meta"], "predictions.jsonl": ["score"], "results.json": ["compare"],
    "model/config.json": ["sample", "info", "convert", "train", "eval", "mpo"],
    "model/model.safetensors": ["sample", "convert", "train", "info"],
    "model/tokenizer.model": ["sample", "train", "check"],
    "model/tokenizer_config.json": ["sample", "train"], "model/preprocessor_config.json": ["sample", "info"],
    "clip/config.json": ["parts"], "vicuna/config.json": ["parts"], "vicuna/tokenizer.model": ["parts"],
    "lora/adapter_config.json": ["convert lora"], "lora/adapter_model.safetensors": ["convert lora"],
    "run/log.jsonl": ["resume"], "run/checkpoint-000001/trainer.pt": ["resume"],
    "run/checkpoint-000001/optimizer.pt": ["resume"],
}
VALUES = [None, True, "", "x", -1, 0, 1.5, 1e308, float("nan"), 10**30, [], {}, [[]], ["x"], {"x": 1},
          "\ud800", "x" * 100_000, "a\u2028b", "../..", "<image>" * 3]
WORDS = ["nan", "inf", "-inf", "-1", "0", "1e9", "1e-320", "1" * 20, "", "x", "x,y", "../..", "["]


def main(n_case, out):
    out = Path(out).absolute()
    make_good_set(out / "good")
    usual = {}
    for name in COMMANDS:
        usual[name] = call_command(name, out / "good", out / "case")
        assert usual[name][0] in (0, 1), usual[name]

    ends = Counter()
    for i in range(int(n_case)):
        rng = random.Random(i)
        case = out / f"case-{i:04d}"
        damaged = rng.choice([*FILES, *["a flag"] * (len(FILES) // 4)])
        name = rng.choice(FILES.get(damaged, list(COMMANDS)))
        odd = odd_flag(rng, name) if damaged == "a flag" else []
        code, said = call_command(name, out / "good", case, damaged, rng, odd)
        end = judge(code, said, usual[name], damaged)
        ends[end] += 1
        if end == "fine":
            shutil.rmtree(case)
            continue
        last = said.strip().splitlines()[-1:]
        print(f"{end:9} {case.name}  {damaged}: python -m {COMMANDS[name]} {odd}\n"
              f"          {code} {ascii(last)[:200]}", flush=True)
    print(f"{n_case} cases: " + ", ".join(f"{n} {end}" for end, n in ends.most_common()))


def make_good_set(good):
    """A tiny world and model, and what comes of them."""
    good.mkdir(parents=True)
    os.chdir(good)
    toyworld.write_world("world", 8, 6, 32)
    vlm = VLM(tiny_config(Tokenizer(ROOT / "assets/toy-vicuna")))
    init_weights(vlm.decoder)
    save(vlm, Tokenizer(ROOT / "assets/toy-vicuna"), Path("model"))
    for part in "clip", "vicuna":
        shutil.copytree(ROOT / f"assets/toy-{part}", part, ignore=shutil.ignore_patterns("*.safetensors"))

    ids = [json.loads(line)["question_id"] for line in open("world/val.jsonl")]
    Path("predictions.jsonl").write_text(json_lines([{"question_id": i, "text": "yes"} for i in ids]))
    pair = {"image": "images/train_00000.png", "question": "What?", "chosen": "A cat.", "rejected": "No."}
    Path("pairs.jsonl").write_text(json_lines([pair | {"id": str(i)} for i in range(4)]))
    Path("meta.json").write_text(json.dumps({"a": {"root": "world", "annotation": "pairs.jsonl"}}))
    assert train.main([*TRAIN.split(), "--out", "lora", "--lora-r", "2"]) == 0
    assert train.main([*TRAIN.split(), "--out", "run", "--max-steps", "2", "--save-every", "1"]) == 0
    Path("run/checkpoint-000002").rename("run/checkpoint-000001")
    assert eval.main("--data world/val.jsonl --predictions predictions.jsonl --out scored".split()) == 0
    shutil.copy("scored/results.json", "results.json")


def call_command(name, good, case, damaged="", rng=None, odd=()):
    """-> its exit code, or "hang"; all that it printed"""
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(good, case)
    if damaged in FILES:
        damage(case / damaged, rng)
    words = [sys.executable, "-m", *COMMANDS[name].split(), *odd]
    with open(case / "said.txt", "w") as said:
        try:
            code = subprocess.call(words, cwd=case, env=ENVIRONMENT, timeout=60, stdin=subprocess.DEVNULL,
                                   stdout=said, stderr=said)
        except subprocess.TimeoutExpired:
            code = "hang"
    return code, (case / "said.txt").read_text(errors="replace")


def odd_flag(rng, name):
    """One flag more, with a value that nobody means."""
    program = importlib.import_module(COMMANDS[name].split()[0])
    kinds = [value for kind, value in vars(program).items() if kind.endswith("Config")]
    Config = rng.choice([kind for kind in kinds if kind.__module__ == program.__name__])
    names = [f.name for f in fields(Config) if f.metadata.get("help") and f.type is not bool]
    return ["--" + rng.choice(names).replace("_", "-"), rng.choice(WORDS)]


def damage(path, rng):
    raw = path.read_bytes()
    is_bytes = rng.random() < 0.25
    if path.suffix == ".safetensors" and not is_bytes:
        n = int.from_bytes(raw[:8], "little")
        header = json.dumps(change_value(json.loads(raw[8 : 8 + n]), rng)).encode()
        raw = len(header).to_bytes(8, "little") + header + raw[8 + n :]
    elif path.suffix in (".json", ".jsonl") and not is_bytes:
        lines = raw.decode().splitlines() if path.suffix == ".jsonl" else [raw.decode()]
        k = rng.randrange(len(lines))
        lines[k] = json.dumps(change_value(json.loads(lines[k]), rng))
        raw = "\n".join(lines).encode()
    else:
        raw = change_bytes(raw, rng)
    path.write_bytes(raw)


def change_value(tree, rng):
    """Another value somewhere in a JSON tree, or a key or an item less."""
    if rng.random() < 0.05:
        return rng.choice(VALUES)
    node = tree
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return tree


def change_bytes(raw, rng):
    k = rng.randrange(len(raw))
    changed = [raw[:k], raw[:k] + rng.randbytes(1) + raw[k + 1 :], raw[:k] + rng.randbytes(50) + raw[k:]]
    changed += [raw[:k] + bytes(len(raw) - k)]           # what a full disk leaves
    changed += [b"", b"[" * 100_000, raw.decode("latin1").encode("utf-16"), b"\xef\xbb\xbf" + raw]
    return rng.choice([*changed, rng.randbytes(1000)])


def judge(code, said, usual, damaged):
    if code == "hang":
        return "hang"
    if "Traceback" in said or code not in (0, 1):
        return "traceback"
    if damaged not in FILES:
        return "fine"                                    # an odd value may be a good one
    words, usual_words = [sorted(re.sub(r"\S*\d\S*", "", text).split()) for text in (said, usual[1])]
    if (code, words) == (usual[0], usual_words):
        return "silent"
    error = said[said.rfind("error: ") :]
    return "fine" if code == 0 or any(part in error for part in Path(damaged).parts) else "unnamed"


if __name__ == "__main__":
    main(*sys.argv[1:])
