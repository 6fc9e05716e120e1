"""What eval.py reads, asks and scores. The worked cases come from the official scorers; the rest is small enough to check by hand."""

import base64
import io
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as ev
import toyworld
from support.cli import run
from support.io import read_pickle
from test_train import ROOT, errors, tiny, world  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = ROOT.parent / "shared/benchmarks" if (ROOT.parent / "shared").is_dir() else Path("/nowhere")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/benchmarks, the worked cases of the official scorers")


def scored(tmp_path, name, *flags):
    out = tmp_path / "out"
    assert run(lambda: ev.main([str(x) for x in ["--benchmark", name, "--out", out, *flags]])) == 0
    return json.loads((out / "results.json").read_text())


def complaint(capfd):
    """The one line on stderr."""
    line, = errors(capfd)
    return line


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


# ---- text to label ----------------------------------------------------------------------------------------------------------


def test_the_vqa_normaliser_keeps_its_oddities():
    assert ev.normalise("salt,pepper") == "salt pepper" and ev.normalise("salt, pepper") == "salt pepper"
    assert ev.normalise("7,8 or up/down") == "78 or updown"                  # one digit comma: all marks are deleted
    assert ev.normalise("fast-food - fries") == "fastfood fries" and ev.normalise("tea / milk") == "tea milk"
    assert ev.normalise("9.1.") == "9.1" and ev.normalise("p.m.") == "pm" and ev.normalise("the") == ""
    assert ev.normalise("Dont") == "don't" and ev.normalise("shes") == "shes" and ev.normalise("somebody'd") == "somebodyd"
    assert ev.normalise("." * 40) == "." * 8                                 # 32 of them: a flag that landed in `count`
    assert ev.normalise("dont", ev.BACKTICKS) == "don`t" and len(ev.CONTRACTIONS) == 120
    assert ev.CONTRACTIONS["couldnt've"] == ev.CONTRACTIONS["couldn'tve"] == "couldn't've" and ev.CONTRACTIONS["'ow'sat"] == "'ow's'at"
    kept = "hed've somebody'd mightn'tve"                                    # VizWiz: keys with a backtick never meet a word
    assert ev.normalise(kept, ev.BACKTICKS) == kept and ev.normalise("hadn'tve weve", ev.BACKTICKS) == "hadn`t`ve we've"


@pytest.mark.parametrize("n, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_leaves_each_annotator_out_in_turn(n, score):
    assert ev.agreement("a", ["a"] * n + ["b"] * (10 - n)) == pytest.approx(score)


def test_letters_are_read_as_each_benchmark_reads_them():
    assert [ev.scienceqa_letter(t) for t in ("B", "B. wood", "B.", "(B)", "The answer is B", "The answer is B.", "The answer is Blue")] == ["B", "B", None, None, None, "B", "B"]
    options = {"A": "cat", "B": "red dog"}
    said = ["A", "(B)", "It is B, I think, because of the long red tail", "answer is **b**", "a red dog", "cat or red dog", "Cannot determine the answer", "Z"]
    assert [ev.mmbench_letter(t, options) for t in said] == ["A", "B", None, "B", "B", None, "Z", "Z"]
    choices = ["a cat", "a dog"]
    assert [ev.m3cot_letter(t, choices) for t in ("(A) or (b)", "[Answer] (A) [Rationale] (B)", "A cat, no, a dog", "B", "take a look", "none")] == ["B", "A", "B", "B", "A", None]
    said = ["b", "B", "Because", "It is a dog", "So B. it is", "say (A)", "none", ""]
    assert [ev.internvl_letter(t, choices) for t in said] == [None, "B", "B", "B", "B", "A", None, None]
    assert [ev.option_letter(t, 4) for t in ("B", "B.", "(B)", "B. leaf", "B) leaf", "Bee", "E", "b", "")] == ["B"] * 5 + [None] * 4


@pytest.mark.parametrize("text, box", [
    ("[0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4]), ("[0, 0, 1, 1]", [0, 0, 1, 1]), ("(0.1, 0.2, 0.3, 0.4)", None), ("0.1, 0.2, 0.3, 0.4", None), ("[[0.1, 0.2, 0.3, 0.4]]", None),
    ("[0.1, 0.2, 0.3]", None), ("[0.3, 0.2, 0.1, 0.4]", None), ("[10, 20, 30, 40]", None), ("['0.1', 0.2, 0.3, 0.4]", None), ("[0.1, 0.2, 0.3, 0.4].", None), ("The box.", None), ("", None)])
def test_a_box_is_a_list_literal_of_four_fractions_or_nothing(text, box):
    assert ev.strict_box(text) == box


def test_internvls_boxes_are_thousandths_when_they_are_large():
    assert ev.internvl_box("<box>[[100, 200, 300, 400]]</box>", 100, 50).tolist() == pytest.approx([10, 10, 30, 20])
    assert ev.internvl_box("[0.1, 0.2, 0.3, 0.4]", 100, 50).tolist() == pytest.approx([10, 10, 30, 20])
    assert ev.internvl_box("[nan, 0, 1, 1]", 100, 50) is None and ev.internvl_box("[inf, 0, 1, 1]", 100, 50) is None
    assert ev.internvl_box("nothing", 100, 50) is None and ev.iou32([30, 30, 10, 10], [10, 10, 30, 30]) == 0


def test_numbers_are_counted_and_rounded():
    assert [ev.counted(t) for t in ("3", "There are three.", "D", "twelve or 13", "none", "many")] == [3, 3, 3, 12, None, None]
    item = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None}
    assert ev.mathvista_normal("3.46", item) == "3.5" and ev.mathvista_normal("about 3", item) is None
    item = {"question_type": "multi_choice", "answer_type": "text", "precision": None, "choices": ["sixty", "ten"]}
    assert [ev.mathvista_normal(t, item) for t in ("(b)", "B", "sixteen", "")] == ["ten", "ten", "sixty", "ten"]
    assert ev.mathvista_extract("So it is (A), or rather (B).", item) == ("(B)", True)
    assert ev.final_answer("Steps.\nFinal answer: 4\nAnswer: 5") == "4" and ev.final_answer("just 4") == "just 4"


# ---- benchmarks without a worked case: official files small enough to score by hand ---------------------------------------------


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def ten(answer, n=10, other="other"):
    return [{"answer": answer if i < n else f"{other}{i}", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


PIXEL = base64.b64encode((lambda raw: Image.new("RGB", (8, 8), "red").save(raw, "PNG") or raw.getvalue())(io.BytesIO())).decode()
REFS = [{"sent_ids": [0, 1], "file_name": "x_7.jpg", "ann_id": 7, "ref_id": 3, "image_id": 42, "split": "val", "category_id": 1,
         "sentences": [{"tokens": ["car"], "raw": "Car.", "sent_id": 0, "sent": "car"}, {"tokens": ["red"], "raw": "Red", "sent_id": 1, "sent": "red"}]},
        {"sent_ids": [2], "file_name": "x_8.jpg", "ann_id": 7, "ref_id": 4, "image_id": 42, "split": "testA", "category_id": 1,
         "sentences": [{"tokens": ["bus"], "raw": "Bus", "sent_id": 2, "sent": "bus"}]}]


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """One small folder per benchmark in the official form -> (folder, name -> (answers as {id: text}, score))."""
    root, world = tmp_path_factory.mktemp("official"), {}
    table = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category"]
    for index, a, b, answer in ((1_000_005, "狗", "猫", "A"), (5, "猫", "狗", "B"), (6, "树", "车", "A"), (1_000_006, "车", "树", "B")):
        table.append(f"{index}\t这是什么?\t\t{a}\t{b}\t\t\t{answer}\tkind\t{PIXEL}\ttoy\tFP-S")
    put(root, "mmbench-cn/mmbench_dev_cn_20231003.tsv", "\n".join(table) + "\n")
    world["mmbench-cn"] = {1_000_005: "B", 5: "B.", 6: "A", 1_000_006: "B"}, 50.0     # question 5 is right in its first pass only
    put(root, "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [
        {"image_id": 42, "question": "What color?", "question_id": 420}, {"image_id": 42, "question": "Is it?", "question_id": 421}, {"image_id": 43, "question": "How many?", "question_id": 430}]})
    put(root, "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_type": "what color", "answers": ten("red", 2), "image_id": 42, "answer_type": "other", "question_id": 420},
        {"question_type": "is it", "answers": ten("yes"), "image_id": 42, "answer_type": "yes/no", "question_id": 421},
        {"question_type": "how many", "answers": ten("2", 3), "image_id": 43, "answer_type": "number", "question_id": 430}]})
    world["vqav2"] = {420: "Red.", 421: "Yes", 430: "two"}, 50.0             # 0.6; verbatim, so 0; 0.9
    put(root, "seed-bench/SEED-Bench.json", {"question_type": {"Scene Understanding": 1, "Action Recognition": 10}, "questions": [
        {"answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "3", "choice_d": "4", "data_id": "1_2", "data_type": "image", "question": "How?", "question_id": "101", "question_type_id": 1},
        {"answer": "B", "choice_a": "One", "choice_b": "Two", "choice_c": "3", "choice_d": "4", "data_id": "v_1", "data_type": "video", "question": "What?", "question_id": "v1", "question_type_id": 10}]})
    world["seed-bench"] = {"101": "A", "v1": "B."}, 50.0                     # LLaVA's scorer takes the whole text
    for n, rows in ((7, {"What is A?": {"abcLabel": True, "answerTexts": ["leaf", "root", "stem", "soil"], "correctAnswer": 2, "questionId": "7.png-0"},
                         "What is B?": {"abcLabel": False, "answerTexts": ["leaf", "root", "stem", "soil"], "correctAnswer": 0, "questionId": "7.png-1"}}),
                    (8, {"Where?": {"abcLabel": False, "answerTexts": ["a", "b", "c", "d"], "correctAnswer": 1, "questionId": "8.png-0"}})):
        put(root, f"ai2d/ai2d/questions/{n}.png.json", {"imageName": f"{n}.png", "questions": rows})
    put(root, "ai2d/ai2d_test_ids.csv", "7\n")
    world["ai2d"] = {"7.png-0": "C", "7.png-1": "B. root"}, 50.0
    put(root, "tallyqa/test.json", [{"answer": 3, "data_source": "amt", "image": "VG_100K_2/1.jpg", "image_id": 9, "issimple": False, "question": "How many cups?", "question_id": 30},
                                    {"answer": 1, "data_source": "amt", "image": "VG_100K/2.jpg", "image_id": 9, "issimple": True, "question": "How many dogs?", "question_id": 31}])
    world["tallyqa"] = {30: "There are three cups", 31: "2"}, 50.0
    put(root, "vsr/test.jsonl", jsonl([{"image": "000000000042.jpg", "caption": "The cup is left of the plate.", "label": 1, "relation": "left of", "subj": "cup", "obj": "plate"},
                                       {"image": "000000000043.jpg", "caption": "The cup is under the plate.", "label": 0, "relation": "under", "subj": "cup", "obj": "plate"}]))
    world["vsr"] = {"0": "true", "1": "It is True, not false."}, 50.0
    for name in ("refcoco", "refcoco+", "refcocog"):
        put(root, f"{name}/{name}/instances.json", {"images": [{"id": 42, "width": 200, "height": 100}], "annotations": [{"id": 7, "bbox": [20, 10, 100, 50]}], "categories": []})
        (root / f"{name}/{name}/refs({'umd' if name == 'refcocog' else 'unc'}).p").write_bytes(pickle.dumps(REFS, protocol=2))
        world[name] = {0: "[0.1, 0.1, 0.6, 0.6]", 1: "[0.6, 0.6, 0.9, 0.9]"}, 50.0
    put(root, "ocid-ref/val_expressions.json", {str(i): {"take_id": take, "scene_path": f"ARID20/{i}.png", "sentence": "The bowl.", "bbox": "[64, 48, 320, 240]"} for i, take in enumerate((0, 12, 20))})
    world["ocid-ref"] = {"0": "[0.1, 0.1, 0.5, 0.25]", "1": "[0.1, 0.1, 0.5, 0.5]", "2": "bowl"}, 200 / 3    # IoU 0.375 is enough here
    put(root, "llava-bench/questions.jsonl", jsonl([{"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is it?"}]))
    put(root, "llava-bench/context.jsonl", jsonl([{"image": "001.jpg", "caption": ["A cat.", "On a mat."]}]))
    put(root, "llava-bench/answers_gpt4.jsonl", jsonl([{"question_id": 0, "text": "a red cat", "answer_id": "x"}]))
    world["llava-bench"] = {0: "red dog"}, None
    put(root, "mm-vet/mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "imagesource": "", "capability": ["ocr", "math"]}})
    world["mm-vet"] = {"v1_0": "x is -5"}, None
    return root, world


BY_HAND = ["vqav2", "seed-bench", "ai2d", "tallyqa", "vsr", "refcoco", "refcoco+", "refcocog", "ocid-ref", "llava-bench", "mm-vet", "mmbench-cn"]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_rule_of_each_other_benchmark_by_hand(tmp_path, official, name):
    root, world = official
    answers, score = world[name]
    told = put(tmp_path, "answers.jsonl", jsonl([{"question_id": id, "text": text} for id, text in answers.items()]))
    result = scored(tmp_path, name, "--data", root / name, "--predictions", told)
    assert result["score"] == (None if score is None else pytest.approx(score))
    assert result["n"] == (2 if name == "mmbench-cn" else len(answers))
    if name == "vqav2":
        assert result["overall"] == 50.0 and result["perAnswerType"] == {"number": 90.0, "other": 60.0, "yes/no": 0.0}
    if name == "ocid-ref":
        assert (result["Minimum"], result["Medium"], result["Maximum"]) == (100, 100, 0) and result["invalid"] == 1
    if name == "tallyqa":
        assert result["accuracy"] == {"complex": 100, "simple": 0, "final": 50}
    if name == "llava-bench":
        assert result["proxy"] == pytest.approx(50) and result["ci95"] is None     # "red" of {red, cat} and {red, dog}
        request = json.loads((tmp_path / "out/judge_requests.jsonl").read_text())
        assert request["messages"][1]["content"].startswith("[Context]\nA cat.\nOn a mat.\n\n[Question]\nWhat is it?\n\n[Assistant 1]\na red cat\n\n[End of Assistant 1]\n\n[Assistant 2]\nred dog")
    if name == "mm-vet":
        assert result["proxy"] == 50.0                                        # one of two <AND> parts
    if name == "mmbench-cn":                                                  # the first pass is the row of the lower index, wherever it stands
        assert result["vanilla_first_pass_exact_matching"] == 1 and result["group_hit"] == {"5": 0, "6": 1} and result["circular_accuracy"] == 0.5


@pytest.mark.parametrize("right, vqa, gqa", [(23, 14.38, 14.37), (49, 30.62, 30.63)])
def test_percentages_are_rounded_in_the_order_of_each_scorers_arithmetic(tmp_path, right, vqa, gqa):
    """Of 160: 100 * 23 / 160 is 14.375, halfway; 100 * (23 / 160) is 14.374999999999998."""
    put(tmp_path, "vizwiz/val.json", [{"image": f"{k}.jpg", "question": "What?", "answers": ten("cup"), "answerable": 1} for k in range(160)])
    put(tmp_path, "gqa/testdev_balanced_questions.json", {str(k): {
        "semantic": [], "question": "What?", "imageId": "n1", "isBalanced": True, "groups": {"global": None}, "answer": "cup",
        "types": {"structural": "query", "semantic": "obj"}} for k in range(160)})
    told = put(tmp_path, "vizwiz.json", [{"image": f"{k}.jpg", "answer": "cup" if k < right else "hat"} for k in range(160)])
    assert scored(tmp_path, "vizwiz", "--data", tmp_path / "vizwiz", "--predictions", told)["score"] == vqa
    told = put(tmp_path, "gqa.json", [{"questionId": str(k), "prediction": "cup" if k < right else "hat"} for k in range(160)])
    assert scored(tmp_path, "gqa", "--data", tmp_path / "gqa", "--predictions", told)["score"] == gqa


def test_gqas_distribution_is_chi_square_weighted_by_group(tmp_path):
    questions = [("color", "red", "red"), ("color", "red", "blue"), ("color", "blue", "blue"), ("size", "big", "small"), (None, "yes", "no")]
    put(tmp_path, "testdev_balanced_questions.json", {str(k): {
        "semantic": [{"operation": "select", "argument": "hat (1)"}, {"operation": "exist", "argument": "?"}], "question": "Is it so?", "imageId": "n1",
        "isBalanced": True, "groups": {"global": group}, "answer": gold, "types": {"structural": "query", "semantic": "attr"}}
        for k, (group, gold, _) in enumerate(questions)})
    told = put(tmp_path, "told.json", [{"questionId": str(k), "prediction": text} for k, (_, _, text) in enumerate(questions)])
    result = scored(tmp_path, "gqa", "--data", tmp_path, "--predictions", told)
    assert result["distribution"] == round((3 * (1 / 2 + 1 / 1) + 1 * 1) / 4 / 100, 2) == 0.01     # red 1 of 2, blue 2 of 1; big 0 of 1
    assert result["accuracy_per_steps_number"] == {"1": {"score": 40.0, "count": 5}}               # "exist" is no step


def test_a_row_that_repeats_its_problem_does_not_answer_with_the_truth(tmp_path, capfd):
    row = {"id": "a-1", "choices": ["3", "4"], "answer": "B", "domain": "mathematics", "topic": "algebra"}
    told = put(tmp_path, "told.jsonl", jsonl([row]))
    assert run(lambda: ev.main(["--benchmark", "m3cot", "--data", str(tmp_path), "--predictions", str(told), "--out", str(tmp_path / "out")])) == 1
    assert "line 1: no answer in it" in complaint(capfd)
    told = put(tmp_path, "told.jsonl", jsonl([row | {"messages": []}, row | {"messages": ["which?", "(B)"]}]))
    result = scored(tmp_path, "m3cot", "--data", tmp_path, "--predictions", told)
    assert (result["score"], result["n"], result["n_unparsed"]) == (0.0, 1, 1)                     # an id's first record counts


def test_ranking_counts_ties_as_one_threshold():
    assert ev.ranking([0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0]) == pytest.approx({"roc_auc": 3 / 4, "pr_auc": (1 + 2 / 3) / 2})     # 3 of 4 pairs in order
    assert ev.ranking([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx({"roc_auc": 1 / 2, "pr_auc": 1 / 2})
    assert ev.ranking([1, 0, 0, 0], [1, 1, 0, 0]) == pytest.approx({"roc_auc": 3 / 4, "pr_auc": 1 / 2 * 1 + 1 / 2 * 1 / 2})    # 2 pairs right, 2 ties of 4


def test_the_split_is_the_one_whose_file_is_there(tmp_path):
    """Public labels first; a test file alone is for handing in, and then nothing can be scored."""
    put(tmp_path, "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": [{"image_id": k, "question": "What?", "question_id": k} for k in (1, 2)]})
    told = put(tmp_path, "told.json", [{"question_id": 1, "answer": "Two cats."}, {"question_id": 2, "answer": "x"}])
    result = scored(tmp_path, "vqav2", "--data", tmp_path, "--predictions", told)
    assert (result["score"], result["n"], result["records"][0]["image"]) == (None, 2, "test2015/COCO_test2015_000000000001.jpg")
    assert json.loads((tmp_path / "out/vqav2_answers.json").read_text())[0] == {"question_id": 1, "answer": "2 cats"}
    cfg = ev.argparse.Namespace(data=str(put(tmp_path, "test.json", [])), split="")
    assert ev.split_of(cfg, ev.named("{}.json", "val", "test"))[0] == "test"                        # a file says its split by its name


def test_mathvista_normalises_whatever_stands_in_extraction(tmp_path):
    base = {"question": "?", "image": "images/1.jpg", "unit": None, "precision": None, "metadata": {"skills": ["a", "b"]}}
    put(tmp_path, "testmini.json", {
        "1": base | {"choices": ["Nine", "Four"], "answer": "Nine", "question_type": "multi_choice", "answer_type": "text"},
        "2": base | {"choices": None, "answer": "3", "question_type": "free_form", "answer_type": "integer"},
        "3": base | {"choices": None, "answer": "[1, 2]", "question_type": "free_form", "answer_type": "list"}})
    told = put(tmp_path, "told.json", {"1": {"response": "", "extraction": None}, "2": {"response": "3", "extraction": "3.9"},
                                       "3": {"response": "[1, 2]", "extraction": [1, 2]}})
    result = scored(tmp_path, "mathvista", "--data", tmp_path, "--predictions", told)
    assert [r["prediction"] for r in result["records"]] == ["Nine", "3", "[1, 2]"]                 # "None" is two edits from "Nine", three from "Four"
    assert result["correct"] == 3 and result["groups"]["skills"]["b"] == {"correct": 3, "total": 3}


def test_a_question_asked_twice_about_one_picture_takes_its_answers_in_turn(tmp_path):
    put(tmp_path, "TextVQA_0.5.1_val.json", {"data": [
        {"question": "What word?", "image_id": "a", "question_id": k, "answers": [word] * 10} for k, word in ((1, "stop"), (2, "open"))]})
    row = {"question_id": "a", "prompt": f"What word?\n{toyworld.SHORT}"}
    told = put(tmp_path, "told.jsonl", jsonl([row | {"text": "Stop."}, row | {"text": "open"}]))
    assert scored(tmp_path, "textvqa", "--data", tmp_path, "--predictions", told)["score"] == 100
    told = put(tmp_path, "told.jsonl", jsonl([row | {"prompt": "Reference OCR token: x\n" + row["prompt"], "text": "stop"}]))
    result = scored(tmp_path, "textvqa", "--data", tmp_path, "--predictions", told)
    assert (result["score"], result["missing"]) == (50, 1)


def test_pope_ids_may_be_written_as_text(tmp_path):
    rows = [{"question_id": k, "image": "1.jpg", "text": f"Is there a {thing} in the image?", "label": label}
            for k, (thing, label) in enumerate([("cat", "yes"), ("dog", "yes"), ("car", "no"), ("hat", "no")], 1)]
    put(tmp_path, "coco_pope_random.json", jsonl(rows))
    told = put(tmp_path, "told.jsonl", jsonl([{"question_id": str(k), "text": text} for k, text in enumerate(["Yes", "No, none.", "yes no", "None"], 1)]))
    result = scored(tmp_path, "pope", "--data", tmp_path, "--predictions", told)
    assert [result["random"][k] for k in ("TP", "FP", "TN", "FN", "f1", "yes_ratio")] == [1, 1, 1, 1, 0.5, 0.5] and result["score"] == 50


def test_what_a_judge_gave_is_the_official_score(tmp_path, official):
    root, _ = official
    told = put(tmp_path, "reviews.jsonl", jsonl([{"question_id": 0, "content": "8 6\nThe first is better."}]))
    assert scored(tmp_path, "llava-bench", "--data", root / "llava-bench", "--predictions", told)["score"] == 75.0
    told = put(tmp_path, "grades.json", {"v1_0": {"score": [0.5, 0.7]}})
    assert scored(tmp_path, "mm-vet", "--data", root / "mm-vet", "--predictions", told)["score"] == 60.0


def test_a_missing_answer_counts_as_wrong_but_vqav2_and_gqa_refuse(tmp_path, official, capfd):
    root, _ = official
    told = put(tmp_path, "answers.json", [{"question_id": 30, "answer": "3"}])
    result = scored(tmp_path, "tallyqa", "--data", root / "tallyqa", "--predictions", told)
    assert (result["score"], result["missing"]) == (50.0, 1)
    told = put(tmp_path, "answers.json", [{"question_id": 420, "answer": "red"}])
    assert run(lambda: ev.main(["--benchmark", "vqav2", "--data", str(root / "vqav2"), "--predictions", str(told), "--out", str(tmp_path)])) == 1
    assert "no answer to 421 (2 of 3 are missing)" in complaint(capfd)


def test_an_mme_picture_counts_double_when_both_its_questions_are_right(tmp_path):
    put(tmp_path, "data/Your_Results/count.txt", "1.png\tIs one? Please answer yes or no.\tYes\n1.png\tIs two?  Please answer yes or no.\tNo\n"
                                                 "2.png\tIs one? Please answer yes or no.\tYes\n2.png\tIs two? Please answer yes or no.\tNo\n")
    put(tmp_path, "res/count.txt", "1.png\tIs one? Please answer yes or no.\tYes\tyes\n1.png\tIs two?  Please answer yes or no.\tNo\tNo.\n"
                                   "2.png\tIs one? Please answer yes or no.\tYes\tYes\n2.png\tIs two? Please answer yes or no.\tNo\tyes\tindeed\n")
    result = scored(tmp_path, "mme", "--data", tmp_path / "data", "--predictions", tmp_path / "res")
    assert result["tasks"]["count"]["acc"] == 1 and result["tasks"]["count"]["acc_plus"] == 0.5 and result["score"] == 150    # the line with a tab too many: not scored


# ---- what is wrong with a file is said in one line -------------------------------------------------------------------------------


@pytest.mark.parametrize("file, content, said", [
    ("test.json", "[{", "test.json: not valid JSON"), ("test.json", "[]", "no question of tallyqa"), ("test.json", "7", "neither a list nor an object"),
    ("test.json", [{"question_id": 1, "image": "a.jpg", "question": "How many?"}], 'test.json, record 0: no field "answer"'),
    ("test.json", [{"question_id": 1, "image": "a.jpg", "question": 7, "answer": 1}], 'record 0: "question" is \'7\'; expected str'),
    ("test.json", ["x"], "record 0: 'x' is not a record"), ("test.json", b"\xff\xfe", "not UTF-8"), ("other.json", "[]", "no test.json in it"),
    ("answers.jsonl", '{"question_id": 1, "text": "3"}\n{"question_id": 1', "answers.jsonl, line 2: not valid JSON"),
    ("answers.jsonl", jsonl([{"question_id": 9, "text": "3"}]), "'9', which is no question of"), ("answers.jsonl", jsonl([{"text": "3"}]), "no id in it"),
    ("answers.jsonl", jsonl([{"question_id": 1, "text": None}]), "no answer in it"), ("answers.jsonl", "", "is empty"), ("answers.jsonl", "[]", "holds no answers"),
    ("answers.jsonl", jsonl([{"question_id": 1, "text": "3"}] * 2), "line 2: a second answer to 1"),
    ("answers.jsonl", "\n\n" + jsonl([{"question_id": 1, "text": "3"}]) + "\n" + jsonl([{"text": "3"}]), "line 5: no id in it"),    # blank lines are lines
    ("test.json", [{"question_id": 1, "image": "a.jpg", "question": "How many?", "answer": 1}] * 2, "two questions of tallyqa have the id 1")])
def test_a_malformed_file_is_one_clear_line(tmp_path, capfd, file, content, said):
    if file != "other.json":
        put(tmp_path, "test.json", [{"question_id": 1, "image": "a.jpg", "question": "How many?", "answer": 1}])
    put(tmp_path, "answers.jsonl", jsonl([{"question_id": 1, "text": "3"}]))
    (tmp_path / file).write_bytes(content) if isinstance(content, bytes) else put(tmp_path, file, content)
    assert run(lambda: ev.main(["--benchmark", "tallyqa", "--data", str(tmp_path), "--predictions", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "out")])) == 1
    assert said in complaint(capfd)


def test_a_picture_without_size_has_no_boxes(tmp_path, capfd):
    put(tmp_path, "refcoco_val.jsonl", jsonl([{"image": "a.jpg", "sent": "car", "bbox": [0, 0, 5, 5], "width": 0, "height": 9}]))
    told = put(tmp_path, "told.jsonl", jsonl([{"question_id": 0, "text": "[0, 0, 1, 1]"}]))
    assert run(lambda: ev.main(["--benchmark", "refcoco", "--data", str(tmp_path), "--predictions", str(told), "--out", str(tmp_path / "out")])) == 1
    assert "line 1: the picture is 0 x 9 pixels" in complaint(capfd)


def places(x, at=()):
    """Where something stands in a file: of a list the first two are enough."""
    yield from [at] if at else []
    for k in list(x) if isinstance(x, dict) else range(min(len(x), 2)) if isinstance(x, list) else ():
        yield from places(x[k], (*at, k))


@pytest.mark.parametrize("name", BY_HAND)
def test_no_field_of_another_type_ends_in_a_traceback(tmp_path, official, capfd, name):
    """Each value of each official JSON file and of the answers, replaced by what it cannot be, is one line of error, or does no harm."""
    root, world = official
    shutil.copytree(root / name, tmp_path / "data")
    told = put(tmp_path, "data/told.jsonl", jsonl([{"question_id": id, "text": text} for id, text in world[name][0].items()]))
    for file in sorted((tmp_path / "data").rglob("*.json*")):
        whole = file.read_text()
        for k, (at, value) in enumerate((at, value) for at in places(json.loads(whole) if file.suffix == ".json" else [json.loads(line) for line in whole.splitlines()])
                                        for value in (None, "x", [[1]])):
            broken = json.loads(whole) if file.suffix == ".json" else [json.loads(line) for line in whole.splitlines()]
            inner = broken
            for step in at[:-1]:
                inner = inner[step]
            inner[at[-1]] = value
            file.write_text(json.dumps(broken) if file.suffix == ".json" else jsonl(broken))
            ended = run(lambda: ev.main(["--benchmark", name, "--data", str(tmp_path / "data"), "--predictions", str(told), "--out", str(tmp_path / "out")]))
            said = errors(capfd)
            assert (ended, len(said)) in ((0, 0), (1, 1)), (file.name, at, value, said)
        file.write_text(whole)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pickle-was-run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capfd):
    put(tmp_path, "refcoco/instances.json", {"images": [], "annotations": []})
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Evil()]))
    assert run(lambda: ev.main(["--benchmark", "refcoco", "--data", str(tmp_path), "--predictions", "x.jsonl", "--out", str(tmp_path / "out")])) == 1
    assert "only plain lists, dicts, strings and numbers" in complaint(capfd) and not Path("/tmp/pickle-was-run").exists()


def test_python_2_pickles_open(tmp_path):
    (tmp_path / "old.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa.")
    assert read_pickle(tmp_path / "old.p") == [{"sent": "caf\xe9"}]


def test_an_unknown_benchmark_is_told_the_nearest(capfd):
    assert run(lambda: ev.main(["--benchmark", "vizwis"])) == 1 and "did you mean vizwiz" in complaint(capfd)


# ---- with a model -------------------------------------------------------------------------------------------------------------


def stand_ins(items, root):
    """A small picture where each item's official path says."""
    for k, item in enumerate(items):
        for name in [item["image"]] if isinstance(item["image"], str) else []:
            path = root / name
            path = path if path.suffix else path.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.new("RGB", (40 + k % 3 * 10, 30), (k * 37 % 256, k * 91 % 256, 90)).save(path)


@pytest.fixture
def asked(tiny, tmp_path):
    """asked(name, data, *flags) -> results.json of the tiny model on a few questions, its pictures made up."""
    def asked(name, data, *flags, out="run", n=8):
        flags = [str(f) for f in ("--benchmark", name, "--data", data, "--limit", n, "--image-root", tmp_path / "pictures", *flags)]
        cfg = ev.parse(flags)
        cfg.family, cfg.likelihood, cfg.name = "llava", False, name
        (tmp_path / "pictures").mkdir(exist_ok=True)
        stand_ins(ev.BENCHMARKS[name].read(cfg), tmp_path / "pictures")
        assert run(lambda: ev.main([*flags, "--model", str(tiny), "--max-new-tokens", "4", "--out", str(tmp_path / out)])) == 0
        return json.loads((tmp_path / out / "results.json").read_text())
    return asked


@pytest.mark.parametrize("name", BY_HAND)
def test_the_whole_way_from_official_files_to_a_score(asked, official, name):
    result = asked(name, official[0] / name)
    assert result["missing"] == 0 and len(result["records"]) == result.get("rows", result["n"])
    assert all(r["answer"] is not None and r["prompt"] for r in result["records"])


@needs_cases
@pytest.mark.parametrize("name", ["textvqa", "textvqa-ocr", "vizwiz", "pope", "mme", "gqa", "scienceqa", "mmbench", "mathvista", "m3cot"])
def test_the_whole_way_on_the_official_files(asked, tmp_path, name):
    data = CASES / name.removesuffix("-ocr")
    if name == "m3cot":                                                      # its case has answers only: the questions stand in their prompts
        rows = [json.loads(line) for line in (data / "predictions_direct.jsonl").read_text().splitlines()]
        data = tmp_path / "m3cot"
        put(data, "test.jsonl", jsonl([{k: r[k] for k in ("id", "choices", "answer", "domain", "topic")} | {"question": r["messages"][0].split("[Question]\n")[1].split("\n")[0]} for r in rows]))
    result = asked(name, data, "--cot" if name == "m3cot" else "--no-cot")
    assert result["missing"] + sum(r["answer"] is not None for r in result["records"]) == len(result["records"]) >= 6
    assert name != "m3cot" or set(result["direct"]) >= {"score", "ci95"}
    files = {"gqa": "testdev_balanced_predictions.json", "mmbench": "mmbench.xlsx", "mme": "results", "scienceqa": "scienceqa_results.json", "textvqa": "textvqa_answers.json"}
    assert name not in files or (tmp_path / "run" / files[name]).exists()


@needs_cases
@pytest.mark.parametrize("name, file", [("mmbench", "mmbench.xlsx"), ("scienceqa", "scienceqa_results.json"), ("textvqa", "textvqa_answers.json"), ("mathvista", "mathvista_predictions.json"),
                                        ("m3cot", "m3cot.jsonl"), ("mme", "results"), ("pope", "."), ("gqa", "testdev_balanced_predictions.json")])
def test_what_is_handed_in_scores_the_same(tmp_path, name, file):
    told = {"mmbench": "predictions.jsonl", "m3cot": "predictions_cot.jsonl", "mme": "results", "gqa": "predictions_llava.jsonl", "pope": ".", "mathvista": "predictions.json", "textvqa": "predictions.json",
            "scienceqa": "predictions_llava.jsonl"}
    first = scored(tmp_path, name, "--data", CASES / name, "--predictions", CASES / name / told[name])
    (tmp_path / "out").rename(tmp_path / "first")
    again = scored(tmp_path, name, "--data", CASES / name, "--predictions", tmp_path / "first" / file)
    assert again["score"] == first["score"] and [r["score"] for r in again["records"]] == [r["score"] for r in first["records"]]


def test_prompts_are_the_papers(official, tmp_path):
    root, _ = official
    cfg = lambda name, *flags: ev.argparse.Namespace(**vars(ev.parse(["--benchmark", name, "--data", str(root / name), *flags])) | {"name": name, "likelihood": "--likelihood" in flags})
    first = lambda name, *flags: ev.prompt_of(next(ev.BENCHMARKS[name].read(cfg(name, *flags))), "--cot" in flags)
    assert first("vqav2") == "What color?\nAnswer the question using a single word or phrase."
    assert first("seed-bench") == "How?\nA. One\nB. Two\nC. 3\nD. 4\nAnswer with the option's letter from the given choices directly."
    assert first("vsr") == 'Based on the image, is this statement "True" or "False"? The cup is left of the plate.\nRespond with "True" or "False" directly.'
    assert first("refcoco") == 'Please provide the bounding box coordinate of the region this sentence describes: "car"'
    assert first("refcoco", "--family", "internvl").endswith("describes: <ref>car</ref>")
    assert "\nP. 15\nAnswer with the option's letter" in first("tallyqa", "--likelihood") and first("tallyqa").startswith("How many cups?\nAnswer the question using")
    assert first("vqav2", "--cot") == toyworld.COT + "What color?"


@pytest.fixture
def toy(tiny, world, tmp_path):
    """toy(name, *flags, out=...) -> exit code of the tiny model on the small toy world."""
    return lambda *flags, out="toy": run(lambda: ev.main([str(x) for x in ["--data", world, "--model", tiny, "--max-new-tokens", 6, "--batch-size", 2, "--out", tmp_path / out, *flags]]))


def test_the_toy_benchmarks_ask_what_the_toy_was_trained_on(toy, world, tmp_path):
    assert toy() == 0
    trained = {json.loads(line)["text"] for line in (world / "val.jsonl").read_text().splitlines()}
    trained |= {f"{text.removeprefix(toyworld.COT)}\n{toyworld.SHORT}" for text in trained if text.startswith(toyworld.COT)}      # a worked question, asked directly
    for name in toyworld.OFFICIAL:
        result = json.loads((tmp_path / f"toy/toy-{name}/results.json").read_text())
        prompts = [r["prompt"] for r in result["records"]]
        assert result["n"] and (name in ("refcoco", "mme", "mmbench") or set(prompts) <= trained), name   # quoted; mirrored; rotated
        assert any(p in trained for p in prompts) or name == "refcoco", name


def test_two_runs_and_one_killed_and_resumed_write_the_same_results(toy, tmp_path, monkeypatch):
    flags = ("--benchmark", "toy-mmbench", "--blind", "other")
    assert toy(*flags, out="a") == 0 and toy(*flags, out="b") == 0
    whole, calls, generate = (tmp_path / "a/results.json").read_bytes(), [], ev.Model.generate
    assert (tmp_path / "b/results.json").read_bytes() == whole

    def dies(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)
    monkeypatch.setattr(ev.Model, "generate", dies)
    assert toy(*flags, out="c") == 130 and not (tmp_path / "c/results.json").exists()
    with open(tmp_path / "c/progress.jsonl", "a") as log:
        log.write('{"mode": "direct", "id"')                                 # a line torn by the kill
    assert toy(*flags, "--resume", out="c") == 0
    assert (tmp_path / "c/results.json").read_bytes() == whole
    assert len(calls) == len(json.loads(whole)["records"]) + 1               # batches of two, two columns: only the one that died came again


def test_resume_refuses_other_flags(toy, capfd):
    assert toy("--benchmark", "toy-pope") == 0
    assert toy("--benchmark", "toy-pope", "--resume", "--cot") == 1 and "written with cot False, now it is True" in complaint(capfd)


def test_limit_keeps_circular_groups_and_pairs_whole(toy, tmp_path):
    assert toy("--benchmark", "toy-mmbench", "--limit", 8) == 0
    result = json.loads((tmp_path / "toy/results.json").read_text())
    assert (result["groups"], result["rows"]) == (2, 8)
    assert len((tmp_path / "toy/official/mmbench_dev_20230712.tsv").read_text().splitlines()) == 1 + 8     # no more is written than asked for


def test_compare_pairs_the_questions_of_two_runs(tmp_path, official):
    root, _ = official
    good = put(tmp_path, "good.json", [{"question_id": 30, "answer": "3"}, {"question_id": 31, "answer": "1"}])
    bad = put(tmp_path, "bad.json", [{"question_id": 30, "answer": "3"}, {"question_id": 31, "answer": "4"}])
    scored(tmp_path, "tallyqa", "--data", root / "tallyqa", "--predictions", bad)
    (tmp_path / "out").rename(tmp_path / "theirs")
    got = scored(tmp_path, "tallyqa", "--data", root / "tallyqa", "--predictions", good, "--compare", tmp_path / "theirs/results.json")["compare"]
    assert (got["n"], got["difference"], got["better"], got["worse"], got["p"]) == (2, 50.0, 1, 0, 1.0)     # one difference tells nothing


def test_compare_weighs_both_questions_of_a_picture():
    record = lambda id, unit, score: {"id": id, "unit": unit, "score": score}
    assert ev.per_unit([record("1#1", "1", 1.0), record("1#2", "1", 0.0), {"id": "2", "score": 1.0}, {"id": "3", "score": None}]) == {"1": 0.5, "2": 1.0}


def test_the_interval_of_a_mean_is_that_of_the_binomial():
    low, high = ev.interval(np.array([[1, 1]] * 60 + [[0, 1]] * 40, dtype=float), ev.percent)
    assert low == pytest.approx(60 - 9.6, abs=1.5) and high == pytest.approx(60 + 9.6, abs=1.5)     # 1.96 sqrt(0.24 / 100)


def test_wrong_answers_are_drawn(toy, tmp_path):
    assert toy("--benchmark", "toy-gqa", "--show", 3) == 0
    assert Image.open(tmp_path / "toy/wrong.png").width > 240


def test_candidates_must_be_single_tokens(toy, capfd):
    assert toy("--benchmark", "toy-tallyqa", "--likelihood") in (0, 1)       # letters may be single tokens of the toy's tokenizer, or not
    said = capfd.readouterr().err
    assert "Traceback" not in said


def test_sharing_a_picture_changes_no_answer(tiny):
    """Ten questions about two pictures, which the tower sees once each."""
    model = ev.Model(ev.parse(["--model", str(tiny)]))
    pictures = [io.BytesIO() for _ in range(2)]
    for picture, color in zip(pictures, ("red", "blue")):
        Image.new("RGB", (40, 30), color).save(picture, "PNG")
    encoded = [model.encode([("human", f"Is there a {kind} in the image?" + " Say it." * (k % 3))], [pictures[k % 2].getvalue()]) for k, kind in enumerate([*toyworld.KINDS, "dog", "sign"])]
    assert len(model.batch(encoded)[2]["pixels"]) == 2
    one_by_one = [model.generate([e], 8)[0] for e in encoded]
    assert model.generate(encoded, 8) == one_by_one
