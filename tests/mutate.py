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

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ONE_STEP = " ".join([*QUICK, "--max-steps", "1"])
TRAIN = f"--model model --data world/train.json {ONE_STEP}"
ASK = "--model model --max-new-tokens 3"
COMMANDS = {                         # name -> program and flags
    "check": "tools.show check world/train.json --model model --workers 0",
    "check pairs": "tools.show check pairs.jsonl --image-root world --model model --workers 0",
    "train": f"train {TRAIN} --out new",
    "train val": f"train {TRAIN} --val world/val.jsonl --final-eval --out new",
    "parts": f"train {TRAIN} --model toy --vision clip --llm vicuna --dry-run",
    "resume": f"train {TRAIN} --max-steps 2 --resume --out run",
    "sample": f"sample {ASK} --image world/images/train_00000.png --prompt What?",
    "eval": f"eval {ASK} --data world/val.jsonl --limit 6 --out new",
    "score": "eval --data world/val.jsonl --predictions predictions.jsonl --out new",
    "compare": "eval --data world/val.jsonl --predictions predictions.jsonl --compare results.json --out new",
    "pairs": f"pairs {ASK} --method dropout-ntp --data world/val.jsonl --image-root world --out new.jsonl",
    "mpo": f"mpo --model model --data pairs.jsonl --image-root world {ONE_STEP} --out new",
    "meta": f"mpo --model model --data meta.json --image-root . {ONE_STEP} --out new",
    "info": "tools.weights info model",
    "convert": "tools.weights convert model new",
    "convert lora": "tools.weights convert lora new",
}
FILES = {                            # file -> the commands that read it
    "world/images/train_00000.png": ["check", "train", "sample"], "world/train.json": ["check", "train"],
    "world/val.jsonl": ["train val", "eval", "score", "pairs"], "pairs.jsonl": ["check pairs", "mpo"],
    "meta.json": ["meta"], "predictions.jsonl": ["score"], "results.json": ["compare"],
    "model/config.json": ["sample", "info", "convert", "train", "eval", "mpo"],
    "model/model.safetensors": ["sample", "convert", "train", "info"],
    "model/tokenizer.model": ["sample", "train", "check"],
    "model/tokenizer_config.json": ["sample", "train"], "model/preprocessor_config.json": ["sample", "info"],
    "clip/config.json": ["parts"], "vicuna/config.json": ["parts"], "vicuna/tokenizer.model": ["parts"],
    "lora/adapter_config.json": ["convert lora"], "lora/adapter_model.safetensors": ["convert lora"],
    "run/log.jsonl": ["resume"], "run/checkpoint-000001/trainer.pt": ["resume"],
}
VALUES = [None, True, "", "x", -1, 0, 1.5, 1e308, float("nan"), 10**30, [], {}, [[]], ["x"], {"x": 1},
          "\ud800", "x" * 100_000, "a\u2028b", "../..", "<image>" * 3]
WORDS = ["nan", "inf", "-inf", "-1", "0", "1e9", "1e-320", "1" * 20, "", "x", "x,y", "../..", "["]


def main(n_case, out):
    out = Path(out).absolute()
    make_good_set(out / "good")
    usual = {}
    for name in COMMANDS:
        shutil.copytree(out / "good", out / name)
        usual[name] = call_command(name, out / name)
        assert usual[name][0] in (0, 1), usual[name]

    ends = []
    for i in range(int(n_case)):
        rng = random.Random(f"case {i}")
        case = out / f"case-{i:04d}"
        shutil.copytree(out / "good", case)
        if rng.random() < 0.8:
            file = rng.choice(list(FILES))
            name = rng.choice(FILES[file])
            done, odd = f"{file}, {damage(case / file, rng)}", []
        else:
            file = None
            name = rng.choice(list(COMMANDS))
            done, odd = "a flag", odd_flag(rng, name)
        code, said = call_command(name, case, odd)
        end = judge(code, said, usual[name], file)
        ends.append(end)
        if end == "fine":
            shutil.rmtree(case)
        else:
            print(f"{end:9} {case.name}  {done}\n    python -m {COMMANDS[name]} {odd}", flush=True)
            print(f"    {code} {ascii(said.strip().splitlines()[-1:])[:200]}", flush=True)
    print(f"{n_case} cases: {dict(Counter(ends))}")


def make_good_set(good):
    """A tiny world and model, and what comes of them."""
    good.mkdir(parents=True)
    os.chdir(good)
    toyworld.write_world("world", 8, 6, 32)
    tok = Tokenizer(ROOT / "assets/toy-vicuna")
    save(VLM(tiny_config(tok)), tok, Path("model"))
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


def call_command(name, case, odd=()):
    """-> its exit code, or "hang"; all that it printed"""
    words = [sys.executable, "-m", *COMMANDS[name].split(), *odd]
    with open(case / "said.txt", "w") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        try:
            code = subprocess.call(words, cwd=case, env=ENVIRONMENT, timeout=60, **streams)
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
    """-> what was done to it"""
    raw = path.read_bytes()
    if path.suffix not in (".json", ".jsonl", ".safetensors") or rng.random() < 0.25:
        path.write_bytes(change_bytes(raw, rng))
        return "bytes"
    head, text, tensors = b"", raw, b""
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(raw[:8], "little")
        text, tensors = raw[8:end], raw[end:]
    lines = text.decode().splitlines() if path.suffix == ".jsonl" else [text.decode()]
    k = rng.randrange(len(lines))
    lines[k], what = change_value(json.loads(lines[k]), rng)
    text = "\n".join(lines).encode()
    if path.suffix == ".safetensors":
        head = len(text).to_bytes(8, "little")
    path.write_bytes(head + text + tensors)
    return f"line {k + 1}: {what}"


def change_value(tree, rng):
    """Another value somewhere in a JSON tree, or a key or an item less -> its text, and what was done."""
    value = rng.choice([*VALUES, "gone", "gone", "gone"])
    node, key = {"": tree}, ""                           # so that the whole can be another, too
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9:
        node = node[key]
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if value == "gone" and key != "":
        del node[key]
    else:
        node[key] = value
    return json.dumps(tree if key != "" else node[""]), f"{key} = {ascii(value)[:60]}"


def change_bytes(raw, rng):
    k = rng.randrange(len(raw))
    cut_off, torn, longer = raw[:k], raw[:k] + bytes(len(raw) - k), raw[:k] + rng.randbytes(50) + raw[k:]
    utf16, one_byte = raw.decode("latin1").encode("utf-16"), raw[:k] + rng.randbytes(1) + raw[k + 1 :]
    return rng.choice([b"", b"[" * 100_000, rng.randbytes(1000), cut_off, torn, longer, utf16, one_byte])


def judge(code, said, usual, damaged):
    if code == "hang":
        return "hang"
    if "Traceback" in said or code not in (0, 1):
        return "traceback"
    if not damaged:  # an odd value may be a good one
        return "fine"
    words, usual_words = [without_numbers(text) for text in (said, usual[1])]
    if (code, words) == (usual[0], usual_words):
        return "silent"
    error = said[max(0, said.rfind("error: ")) :]
    return "fine" if code == 0 or any(part in error for part in Path(damaged).parts) else "unnamed"


def without_numbers(text):
    return sorted(word for word in text.split() if not re.search(r"\d", word))


if __name__ == "__main__":
    main(*sys.argv[1:])
