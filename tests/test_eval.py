"""What eval.py reads, asks and scores. The worked cases come from the official scorers; the rest is small enough to check by hand."""

import base64
import contextlib
import csv
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as ev
import toyworld
from data import run
from test_train import ROOT, errors, one_thread, tiny, tok, world  # noqa: F401 (fixtures)

CASES = ROOT.parent / "shared/benchmarks" if (ROOT.parent / "shared").is_dir() else Path("/nowhere")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/benchmarks, the worked cases of the official scorers")


def scored(tmp_path, name, *flags):
    out = tmp_path / "out"
    assert run(lambda: ev.main([str(x) for x in ["--benchmark", name, "--out", out, *flags]])) == 0
    return json.loads((out / "results.json").read_text())


def agrees(ours, theirs, at=""):
    """Every value of expected.json stands in ours at the same place: floats to 1e-6, all else exactly."""
    if isinstance(theirs, dict):
        for k, v in theirs.items():
            assert k in ours, f"{at}/{k}"
            agrees(ours[k], v, f"{at}/{k}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-6), at
    else:
        assert ours == theirs, at


# ---- the worked cases -----------------------------------------------------------------------------------------------------


@needs_cases
@pytest.mark.parametrize("name, predictions, part, score", [
    ("textvqa", "predictions.json", None, 75.32258064516129), ("textvqa", "predictions_llava.jsonl", None, 75.32258064516129), ("vizwiz", "predictions.json", None, 64.45),
    ("pope", "predictions_llava.jsonl", None, 78.50918145), ("pope", ".", None, 78.50918145), ("mme", "results", None, 925.0),
    ("gqa", "predictions_llava.jsonl", "llava_conversion", 58.94), ("gqa", "testdev_balanced_predictions.json", "llava_conversion", 58.94),
    ("gqa", "predictions_nopunct.json", "strip_all_punctuation_lower", 68.21), ("gqa", "predictions_raw.json", "raw_text", 0.0),
    ("scienceqa", "predictions_llava.jsonl", None, 46.25), ("mmbench", "predictions.jsonl", None, 70.45454545), ("mathvista", "predictions.json", None, 41.30434783),
    ("m3cot", "predictions_direct.jsonl", "direct", 33.75), ("m3cot", "predictions_cot.jsonl", "cot", 31.25)])
def test_the_official_scorers_figures_come_out(tmp_path, name, predictions, part, score):
    result = scored(tmp_path, name, "--data", CASES / name, "--predictions", CASES / name / predictions)
    expected = json.loads((CASES / name / "expected.json").read_text())
    assert result["score"] == pytest.approx(score, abs=1e-6) and result["ci95"][0] <= result["score"] <= result["ci95"][1]
    records = {r["id"]: r for r in result["records"]}
    if part:
        expected = expected[part] | {k: v for k, v in expected.items() if k.startswith("num_")}
    verdicts = expected.pop("records", {})
    for id, verdict in verdicts.items():                                     # MathVista and M3CoT: of each record
        agrees(records[id], verdict) if isinstance(verdict, dict) else agrees(records[id]["correct"], verdict)
    agrees(result, expected)


@needs_cases
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_a_pope_file_is_known_by_its_questions(tmp_path, split):
    copy = tmp_path / "answers.json"                                        # the name tells nothing
    copy.write_bytes((CASES / f"pope/predictions_{split}.json").read_bytes())
    result = scored(tmp_path, "pope", "--data", CASES / "pope", "--predictions", copy)
    agrees(result[split], json.loads((CASES / "pope/expected.json").read_text())[split])
    assert result["splits"] == [split] and result["n"] == 60


@needs_cases
def test_scienceqa_scores_the_official_result_file_of_indices(tmp_path):
    result = scored(tmp_path, "scienceqa", "--data", CASES / "scienceqa", "--predictions", CASES / "scienceqa/result_indices.json")
    expected = json.loads((CASES / "scienceqa/expected.json").read_text())
    agrees(result["official_breakdown"], expected["official_breakdown"])


@needs_cases
def test_the_tables_of_strings_agree():
    for text, label in json.loads((CASES / "pope/parse_table.json").read_text()).items():
        assert ev.pope_label(text) == label, text
    for text, label in json.loads((CASES / "mme/parse_table.json").read_text()).items():
        assert ev.mme_label(text) == label, text
    for row in json.loads((CASES / "textvqa/normalisation.json").read_text()):
        assert ev.evalai(row["raw"]) == row["normalised"], row
