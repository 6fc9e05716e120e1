"""What eval.py reads, asks and scores: the official scorers' worked cases, and cases worked out by hand."""

import base64
import io
import json
from pathlib import Path
from threading import current_thread, main_thread

import pytest
from common import ROOT, errors
from PIL import Image

import eval as ev
import sample
import toyworld
import train
from benchmarks import choice, common, own, reasoning, vqa, yes_no
from benchmarks.scoring import bootstrap
from model import VLM
from support import asking
from support.cli import UserError, run_program
from support.heldout import HeldOut
from support.io import Progress

CASES = ROOT.parent / "shared/benchmarks"
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="needs ../shared/benchmarks, the official scorers' cases"
)


def evaluate(*flags):
    return run_program(lambda: ev.main([str(flag) for flag in flags]))


def scored(tmp_path, name, data, predictions, *flags):
    out = tmp_path / "out"
    assert (
        evaluate("--benchmark", name, "--data", data, "--predictions", predictions, "--out", out, *flags) == 0
    )
    return json.loads((out / "results.json").read_text())


def complaint(capfd):
    """The one line on stderr."""
    (line,) = errors(capfd)
    return line


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def expected(name):
    return json.loads((CASES / name / "expected.json").read_text())


# ---- the worked cases ----


@needs_cases
@pytest.mark.parametrize(
    "name, predictions, score",
    [
        ("textvqa", "predictions.json", 75.32258065),
        ("textvqa", "predictions_llava.jsonl", 75.32258065),
        ("vizwiz", "predictions.json", 64.45),
        ("pope", "predictions_llava.jsonl", 78.50918145),
        ("gqa", "predictions_llava.jsonl", 58.94),
        ("gqa", "testdev_balanced_predictions.json", 58.94),
        ("gqa", "predictions_nopunct.json", 68.21),
        ("scienceqa", "predictions_llava.jsonl", 46.25),
        ("mmbench", "predictions.jsonl", 70.45454545),
        ("mathvista", "predictions.json", 41.30434783),
        ("m3cot", "predictions_direct.jsonl", 33.75),
        ("m3cot", "predictions_cot.jsonl", 31.25),
    ],
)
def test_the_official_scorers_figures_come_out(tmp_path, name, predictions, score):
    result = scored(tmp_path, name, CASES / name, CASES / name / predictions)
    assert result["score"] == pytest.approx(score, abs=1e-6)
    assert result["ci95"][0] <= result["score"] <= result["ci95"][1]


@needs_cases
def test_each_question_of_textvqa_and_vizwiz_scores_as_officially(tmp_path):
    result = scored(tmp_path, "textvqa", CASES / "textvqa", CASES / "textvqa/predictions.json")
    for record in result["records"]:
        assert record["score"] == pytest.approx(expected("textvqa")["per_question"][str(record["id"])])
    result = scored(tmp_path, "vizwiz", CASES / "vizwiz", CASES / "vizwiz/predictions.json")
    for record in result["records"]:
        assert 100 * record["score"] == pytest.approx(expected("vizwiz")["per_image"][record["id"]])


@needs_cases
def test_each_record_of_mathvista_m3cot_and_mmbench_is_judged_as_officially(tmp_path):
    result = scored(tmp_path, "mathvista", CASES / "mathvista", CASES / "mathvista/predictions.json")
    for record in result["records"]:
        verdict = expected("mathvista")["records"][record["id"]]
        assert (record["parsed"], record["score"] == 1) == (verdict["prediction"], verdict["true_false"])
    for kind in "direct", "cot":
        result = scored(tmp_path, "m3cot", CASES / "m3cot", CASES / f"m3cot/predictions_{kind}.jsonl")
        assert {r["id"]: r["score"] == 1 for r in result["records"]} == expected("m3cot")[kind]["records"]
    result = scored(tmp_path, "mmbench", CASES / "mmbench", CASES / "mmbench/predictions.jsonl")
    assert {str(r["id"]): r["parsed"] for r in result["records"]} == expected("mmbench")["inferred_letter"]


@needs_cases
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_popes_figures_are_the_official_ones_of_one_split_or_of_all(tmp_path, split):
    figures = {key: x for key, x in expected("pope")[split].items() if key not in ("num", "pred")}
    alone = scored(
        tmp_path, "pope", CASES / "pope", CASES / f"pope/predictions_{split}.json", "--split", split
    )
    merged = scored(tmp_path, "pope", CASES / "pope", CASES / "pope/predictions_llava.jsonl")
    for result in alone, merged:
        assert result["categories"][split]["more"] == pytest.approx(figures)
    assert list(alone["categories"]) == [split] and alone["score"] == pytest.approx(100 * figures["f1"])


@needs_cases
def test_mmes_subtasks_are_the_official_ones(tmp_path):
    rows = []
    for path in (CASES / "mme/results").glob("*.txt"):
        for line in path.read_text().splitlines():
            image, text, _, said = line.split("\t")
            rows.append({"question_id": f"{path.stem}/{image}", "prompt": text, "text": said})
    result = scored(tmp_path, "mme", CASES / "mme", put(tmp_path, "told.jsonl", jsonl(rows)))
    assert result["score"] == pytest.approx(925.0)
    assert result["categories"]["cognition"]["score"] == pytest.approx(expected("mme")["cognition_total"])
    for task, figures in expected("mme")["tasks"].items():
        found = result["categories"][task]
        assert found["score"] == pytest.approx(figures["score"])
        assert found["more"] == pytest.approx({key: figures[key] for key in ("acc", "acc_plus")})


@needs_cases
def test_scienceqas_breakdown_is_the_official_one(tmp_path):
    result = scored(tmp_path, "scienceqa", CASES / "scienceqa", CASES / "scienceqa/predictions_llava.jsonl")
    names = {
        "acc_natural": "natural science",
        "acc_has_text": "text context",
        "acc_has_image": "image context",
    }
    names |= {"acc_no_context": "no context", "acc_grade_1_6": "grades 1-6", "acc_grade_7_12": "grades 7-12"}
    for theirs, ours in names.items():
        figure = f"{result['categories'][ours]['score']:.2f}"
        assert figure == expected("scienceqa")["official_breakdown"][theirs]


@needs_cases
def test_the_tables_of_strings_agree():
    for text, label in json.loads((CASES / "pope/parse_table.json").read_text()).items():
        assert yes_no.pope_label(text, {}) == label, text
    for text, label in json.loads((CASES / "mme/parse_table.json").read_text()).items():
        assert (yes_no.mme_label(text, {}) or "other") == label, text
    for row in json.loads((CASES / "textvqa/normalisation.json").read_text()):
        assert common.evalai(row["raw"]) == row["normalised"], row


# ---- text to label ----


@pytest.mark.parametrize(
    "text, plain",
    [
        ("salt,pepper", "salt pepper"),
        ("salt, pepper", "salt pepper"),
        ("7,8 or up/down", "78 or updown"),  # one digit comma: all marks are deleted
        ("fast-food - fries", "fastfood fries"),
        ("tea / milk", "tea milk"),
        ("9.1.", "9.1"),
        ("p.m.", "pm"),
        ("the", ""),
        ("Dont", "don't"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("." * 40, "." * 8),  # 32 of them: a flag that landed in `count`
    ],
)
def test_the_vqa_normaliser_keeps_its_oddities(text, plain):
    assert common.normalise(text) == plain


def test_the_contractions_are_the_official_120_and_vizwiz_has_backticks_in_most():
    assert len(common.CONTRACTIONS) == 120
    assert common.CONTRACTIONS["couldnt've"] == common.CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert common.CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert common.normalise("dont", vqa.BACKTICKS) == "don`t"
    assert common.normalise("hadn'tve weve", vqa.BACKTICKS) == "hadn`t`ve we've"
    kept = "hed've somebody'd mightn'tve"  # keys with a backtick never meet a word
    assert common.normalise(kept, vqa.BACKTICKS) == kept


@pytest.mark.parametrize("n, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_leaves_each_annotator_out_in_turn(n, score):
    assert vqa.agreement("a", ["a"] * n + ["b"] * (10 - n)) == pytest.approx(score)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B. wood", "B"),
        ("B.", None),
        ("(B)", None),
        ("The answer is B", None),
        ("The answer is Blue", "B"),
    ],
)
def test_scienceqas_letters(text, letter):
    assert choice.scienceqa_letter(text, {}) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("(B)", "B"),
        ("It is B, I think, because of the long red tail", None),
        ("answer is **b**", "B"),
        ("a red dog", "B"),
        ("cat or red dog", None),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
    ],
)
def test_mmbenchs_letters(text, letter):
    assert choice.mmbench_letter(text, {"choices": ["cat", "red dog"]}) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("(A) or (b)", "B"),
        ("[Answer] (A) [Rationale] (B)", "A"),
        ("A cat, no, a dog", "B"),
        ("B", "B"),
        ("take a look", "A"),
        ("none", None),
    ],
)
def test_m3cots_letters(text, letter):
    assert reasoning.m3cot_letter(text, {"choices": ["a cat", "a dog"]}) == letter


@pytest.mark.parametrize("text", ["B", "B.", "(B)", "B. leaf", "B) leaf"])
def test_ai2ds_letters(text):
    assert choice.ai2d_letter(text, {}) == "B"


@pytest.mark.parametrize("text", ["Bee", "A leaf", "B and C", ""])
def test_what_is_no_letter_of_ai2d(text):
    assert choice.ai2d_letter(text, {}) is None


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4]),
        ("It is at (0, 0, 1, 1).", [0, 0, 1, 1]),
        ("<box>[[100, 200, 300, 400]]</box>", [0.1, 0.2, 0.3, 0.4]),
        ("[0.1, 0.2, 0.3]", None),
        ("[nan, 0, 1, 1]", None),
        ("The box.", None),
    ],
)
def test_a_box_is_four_fractions_or_thousandths_in_brackets(text, box):
    assert common.read_box(text) == box


def test_reversed_corners_enclose_nothing():
    assert common.iou([0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.2]) == pytest.approx(0.5)
    assert common.iou([0.3, 0.3, 0.1, 0.1], [0.1, 0.1, 0.3, 0.3]) == 0


@pytest.mark.parametrize("text, n", [("3", 3), ("There are three.", 3), ("twelve or 13", 12), ("none", None)])
def test_the_first_number_of_an_answer_is_its_count(text, n):
    assert common.count_in(text) == n


def test_mathvistas_numbers_are_rounded_and_its_texts_are_the_nearest_option():
    item = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None}
    assert reasoning.mathvista_normal("3.46", item) == "3.5"
    assert reasoning.mathvista_normal("about 3", item) is None
    item = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
    item |= {"choices": ["sixty", "ten"]}
    for text, option in (("(b)", "ten"), ("B", "ten"), ("sixteen", "sixty"), ("", "ten")):
        assert reasoning.mathvista_normal(text, item) == option
    assert reasoning.mathvista_extract(item, "So it is (A), or rather (B).") == "(B)"


def test_the_final_answer_is_the_rest_of_the_first_triggers_line():
    assert common.final_answer("Steps.\nFinal answer: 4\nAnswer: 5") == "4"
    assert common.final_answer("just 4") == "just 4"


# ---- benchmarks without a worked case: official files small enough to score by hand ----


def ten(answer, n=10):
    return [{"answer": answer if i < n else f"other{i}", "answer_confidence": "yes"} for i in range(10)]


def png(color):
    raw = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(raw, "PNG")
    return raw.getvalue()


def write_mmbench(folder):
    """Two questions of two rotations; their rows stand in any order."""
    rows = [
        (1_000_005, "狗", "猫", "A"),
        (5, "猫", "狗", "B"),
        (6, "树", "车", "A"),
        (1_000_006, "车", "树", "B"),
    ]
    lines = ["index question hint A B C D answer category image source l2-category".split()]
    picture = base64.b64encode(png("red")).decode()
    for index, a, b, answer in rows:
        lines.append([str(index), "这是什么?", "", a, b, "", "", answer, "kind", picture, "toy", "FP-S"])
    put(folder, "mmbench_dev_cn_20231003.tsv", "\n".join("\t".join(line) for line in lines) + "\n")
    return {
        1_000_005: "B",
        5: "B.",
        6: "A",
        1_000_006: "B",
    }, 50.0  # question 5 is right in its first pass only


def write_vqav2(folder):
    asked = [(420, 42, "What color?"), (421, 42, "Is it?"), (430, 43, "How many?")]
    questions = [{"image_id": image, "question": text, "question_id": id} for id, image, text in asked]
    put(folder, "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    told = [(420, ten("red", 2), "other"), (421, ten("yes"), "yes/no"), (430, ten("2", 3), "number")]
    labels = [{"answers": answers, "answer_type": kind, "question_id": id} for id, answers, kind in told]
    put(folder, "v2_mscoco_val2014_annotations.json", {"annotations": labels})
    return {420: "Red.", 421: "Yes", 430: "two"}, 50.0  # 0.6; verbatim, so 0; 0.9


def write_seed(folder):
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "3", "choice_d": "4"}
    image = {"answer": "A", "data_id": "1_2", "data_type": "image", "question": "How?", "question_type_id": 1}
    video = {
        "answer": "B",
        "data_id": "v_1",
        "data_type": "video",
        "question": "What?",
        "question_type_id": 10,
    }
    questions = [choices | image | {"question_id": "101"}, choices | video | {"question_id": "v1"}]
    kinds = {"Scene Understanding": 1, "Action Recognition": 10}
    put(folder, "SEED-Bench.json", {"question_type": kinds, "questions": questions})
    return {"101": "A", "v1": "B."}, 50.0  # LLaVA's scorer takes the whole text


def write_ai2d(folder):
    def asked(id, label, answer):
        return {
            "abcLabel": label,
            "answerTexts": ["a", "b", "c", "d"],
            "correctAnswer": answer,
            "questionId": id,
        }

    questions = {"What is A?": asked("7.png-0", True, 2), "What is B?": asked("7.png-1", False, 0)}
    put(folder, "ai2d/questions/7.png.json", {"imageName": "7.png", "questions": questions})
    put(
        folder,
        "ai2d/questions/8.png.json",
        {"imageName": "8.png", "questions": {"Where?": asked("8.png-0", False, 1)}},
    )
    put(folder, "ai2d_test_ids.csv", "7\n")
    return {"7.png-0": "C", "7.png-1": "B. root"}, 50.0


def write_tallyqa(folder):
    first = {
        "answer": 3,
        "image": "VG_100K_2/1.jpg",
        "issimple": False,
        "question": "How many cups?",
        "question_id": 30,
    }
    second = {
        "answer": 1,
        "image": "VG_100K/2.jpg",
        "issimple": True,
        "question": "How many dogs?",
        "question_id": 31,
    }
    put(folder, "test.json", [first, second])
    return {30: "There are three cups", 31: "2"}, 50.0


def write_vsr(folder):
    first = {"image": "42.jpg", "caption": "The cup is left of the plate.", "label": 1, "relation": "left of"}
    second = {"image": "43.jpg", "caption": "The cup is under the plate.", "label": 0, "relation": "under"}
    put(folder, "test.jsonl", jsonl([first, second]))
    return {"0": "true", "1": "It is True, not false."}, 50.0


def write_refcoco(folder):
    region = {"image": "a.jpg", "bbox": [20, 10, 120, 60], "width": 200, "height": 100}
    put(folder, f"{folder.name}_val.jsonl", jsonl([region | {"sent": "car"}, region | {"sent": "red"}]))
    return {"0": "[0.1, 0.1, 0.6, 0.6]", "1": "[0.6, 0.6, 0.9, 0.9]"}, 50.0


def write_ocid(folder):
    rows = {}
    for i, take in enumerate((0, 12, 20)):
        rows[str(i)] = {
            "take_id": take,
            "scene_path": f"{i}.png",
            "sentence": "The bowl.",
            "bbox": "[64, 48, 320, 240]",
        }
    put(folder, "val_expressions.json", rows)
    answers = {"0": "[0.1, 0.1, 0.5, 0.25]", "1": "[0.1, 0.1, 0.5, 0.5]", "2": "bowl"}
    return answers, 200 / 3  # IoU 0.375 is enough here


def write_llava_bench(folder):
    asked = {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is it?"}
    put(folder, "questions.jsonl", jsonl([asked]))
    put(folder, "context.jsonl", jsonl([{"image": "001.jpg", "caption": ["A cat.", "On a mat."]}]))
    put(folder, "answers_gpt4.jsonl", jsonl([{"question_id": 0, "text": "a red cat"}]))
    return {0: "red dog"}, None


def write_mm_vet(folder):
    asked = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    }
    put(folder, "mm-vet.json", {"v1_0": asked})
    return {"v1_0": "x is -5"}, None


BY_HAND = {
    "mmbench-cn": write_mmbench,
    "vqav2": write_vqav2,
    "seed-bench": write_seed,
    "ai2d": write_ai2d,
    "tallyqa": write_tallyqa,
    "vsr": write_vsr,
    "refcoco": write_refcoco,
    "refcoco+": write_refcoco,
    "refcocog": write_refcoco,
    "ocid-ref": write_ocid,
    "llava-bench": write_llava_bench,
    "mm-vet": write_mm_vet,
}


@pytest.fixture
def by_hand(tmp_path):
    """by_hand(name) -> folder with small official files, file of answers, the score they deserve."""

    def by_hand(name):
        answers, score = BY_HAND[name](tmp_path / name)
        told = put(
            tmp_path, "answers.jsonl", jsonl({"question_id": id, "text": x} for id, x in answers.items())
        )
        return tmp_path / name, told, score

    return by_hand


@pytest.mark.parametrize("name", BY_HAND)
def test_the_rule_of_each_other_benchmark_by_hand(tmp_path, by_hand, name):
    folder, told, score = by_hand(name)
    result = scored(tmp_path, name, folder, told)
    assert result["score"] == (None if score is None else pytest.approx(score))
    assert result["n"] == len(told.read_text().splitlines()) and result["missing"] == 0


@pytest.mark.parametrize(
    "name, categories",
    [
        ("vqav2", {"other": 60, "yes/no": 0, "number": 90}),
        ("ocid-ref", {"Minimum": 100, "Medium": 100, "Maximum": 0}),
        ("tallyqa", {"complex": 100, "simple": 0}),
        ("seed-bench", {"Scene Understanding": 100, "image": 100, "Action Recognition": 0, "video": 0}),
    ],
)
def test_a_score_is_broken_down_by_category(tmp_path, by_hand, name, categories):
    folder, told, _ = by_hand(name)
    found = scored(tmp_path, name, folder, told)["categories"]
    assert {category: figures["score"] for category, figures in found.items()} == pytest.approx(categories)


def test_the_judge_is_asked_in_the_authors_words_and_its_grades_are_the_score(tmp_path, by_hand):
    folder, told, _ = by_hand("llava-bench")
    scored(tmp_path, "llava-bench", folder, told)
    request = json.loads((tmp_path / "out/judge_requests.jsonl").read_text())
    assert request["messages"][1]["content"].startswith(
        "[Context]\nA cat.\nOn a mat.\n\n[Question]\nWhat is it?\n\n"
        "[Assistant 1]\na red cat\n\n[End of Assistant 1]\n\n[Assistant 2]\nred dog"
    )
    reviews = put(
        tmp_path, "reviews.jsonl", jsonl([{"question_id": 0, "content": "8 6\nThe first is better."}])
    )
    assert scored(tmp_path, "llava-bench", folder, reviews)["score"] == 75.0

    folder, told, _ = by_hand("mm-vet")
    assert scored(tmp_path, "mm-vet", folder, told)["unparsed"] == 0  # what nobody has graded is not unreadable
    request = json.loads((tmp_path / "out/judge_requests.jsonl").read_text())
    assert request["messages"][0]["content"].endswith("\nWhat is x? | -1 <AND> -5 | x is -5 | ")
    grades = put(tmp_path, "grades.json", {"v1_0": {"score": [0.5, 0.7]}})
    assert scored(tmp_path, "mm-vet", folder, grades)["score"] == 60.0
    assert json.loads((tmp_path / "out/judge_requests.jsonl").read_text()) == request  # not about the grade
    assert json.loads((tmp_path / "out/answers.jsonl").read_text())["text"] == "x is -5"


@pytest.mark.parametrize("right, vizwiz, gqa", [(23, 14.38, 14.37), (49, 30.62, 30.63)])
def test_percentages_are_rounded_in_the_order_of_each_scorers_arithmetic(right, vizwiz, gqa):
    """Of 160: 100 * 23 / 160 is 14.375, halfway; 100 * (23 / 160) is 14.374999999999998."""
    units = [[{"score": float(k < right)}] for k in range(160)]
    assert common.rounded_percent(units) == vizwiz and vqa.score_gqa(units) == gqa


def test_a_test_file_alone_is_for_handing_in(tmp_path, capfd):
    questions = [{"image_id": k, "question": "What?", "question_id": k} for k in (1, 2)]
    put(tmp_path, "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions})
    told = put(
        tmp_path, "told.json", [{"question_id": 1, "answer": "Two cats."}, {"question_id": 2, "answer": "x"}]
    )
    result = scored(tmp_path, "vqav2", tmp_path, told)
    assert (result["score"], result["n"]) == (None, 2)
    assert result["records"][0]["image"] == "test2015/COCO_test2015_000000000001.jpg"
    handed_in = json.loads((tmp_path / "out/vqav2_answers.json").read_text())
    assert handed_in[0] == {"question_id": 1, "answer": "2 cats"}
    assert "no score without labels" in capfd.readouterr().out


def test_mmbenchs_table_is_handed_in_with_the_answers_in_its_seventh_column(tmp_path, by_hand):
    folder, told, _ = by_hand("mmbench-cn")
    scored(tmp_path, "mmbench-cn", folder, told)
    head, first, *_ = (tmp_path / "out/mmbench.tsv").read_text().splitlines()
    assert head.split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert first.split("\t") == ["1000005", "这是什么?", "狗", "猫", "", "", "B", "A"]


def test_what_stands_in_mathvistas_extraction_is_normalised_and_not_read_again(tmp_path):
    base = {
        "question": "?",
        "query": "Hint: Please answer.\nQuestion: ?",
        "image": "images/1.jpg",
        "precision": None,
        "metadata": {"task": "t"},
    }
    choice_one = {
        "choices": ["Nine", "Four"],
        "answer": "Nine",
        "question_type": "multi_choice",
        "answer_type": "text",
    }
    number = {"choices": None, "answer": "3", "question_type": "free_form", "answer_type": "integer"}
    list_one = {"choices": None, "answer": "[1, 2]", "question_type": "free_form", "answer_type": "list"}
    put(tmp_path, "testmini.json", {"1": base | choice_one, "2": base | number, "3": base | list_one})
    told = {
        "1": {"response": "", "extraction": None},
        "2": {"extraction": "3.9"},
        "3": {"extraction": [1, 2]},
    }
    result = scored(tmp_path, "mathvista", tmp_path, put(tmp_path, "told.json", told))
    # "None" is two edits from "Nine", three from "Four".
    assert [record["parsed"] for record in result["records"]] == ["Nine", "3", "[1, 2]"]
    assert result["score"] == 100


def test_a_row_that_repeats_its_problem_does_not_answer_with_the_truth(tmp_path, capfd):
    row = {"id": "a-1", "choices": ["3", "4"], "answer": "B", "domain": "mathematics", "topic": "algebra"}
    told = put(tmp_path, "told.jsonl", jsonl([row]))
    flags = ("--benchmark", "m3cot", "--data", tmp_path, "--predictions", told, "--out", tmp_path / "out")
    assert evaluate(*flags) == 1 and "line 1: no answer in it" in complaint(capfd)
    told = put(tmp_path, "told.jsonl", jsonl([row | {"messages": []}, row | {"messages": ["which?", "(B)"]}]))
    result = scored(tmp_path, "m3cot", tmp_path, told)
    assert (result["score"], result["n"], result["unparsed"]) == (0.0, 1, 1.0)  # an id's first record counts


def test_a_question_asked_twice_about_one_picture_takes_its_answers_in_turn(tmp_path):
    words = ((1, "stop"), (2, "open"))
    asked = [
        {"question": "What word?", "image_id": "a", "question_id": k, "answers": [w] * 10} for k, w in words
    ]
    put(tmp_path, "TextVQA_0.5.1_val.json", {"data": asked})
    row = {"question_id": "a", "prompt": f"What word?\n{common.SHORT}"}
    told = put(tmp_path, "told.jsonl", jsonl([row | {"text": "Stop."}, row | {"text": "open"}]))
    assert scored(tmp_path, "textvqa", tmp_path, told)["score"] == 100
    told = put(tmp_path, "told.jsonl", jsonl([row | {"text": "stop"}]))
    result = scored(tmp_path, "textvqa", tmp_path, told)
    assert (result["score"], result["missing"]) == (50, 1)


POPE_ROW = {"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"}


def test_pope_ids_may_be_text(tmp_path):
    put(tmp_path, "coco_pope_random.json", jsonl([POPE_ROW, POPE_ROW | {"question_id": 2, "label": "no"}]))
    told = put(
        tmp_path,
        "told.jsonl",
        jsonl([{"question_id": "1", "text": "Yes"}, {"question_id": "2", "text": "None"}]),
    )
    figures = scored(tmp_path, "pope", tmp_path, told)["categories"]["random"]["more"]
    assert [figures[name] for name in ("TP", "FP", "TN", "FN")] == [1, 1, 0, 0]


def test_answers_to_another_version_of_pope_are_refused(tmp_path, capfd):
    put(tmp_path, "coco_pope_random.json", jsonl([POPE_ROW, POPE_ROW | {"question_id": 2}]))
    told = put(
        tmp_path, "told.jsonl", jsonl([{"question_id": 1, "question": "Is there a dog?", "answer": "yes"}])
    )
    assert (
        evaluate("--benchmark", "pope", "--data", tmp_path, "--predictions", told, "--out", tmp_path / "out")
        == 1
    )
    assert "answers another question, 'Is there a dog?', than '1'" in complaint(capfd)


def test_a_missing_answer_counts_as_wrong_but_vqav2_refuses(tmp_path, by_hand, capfd):
    folder, _, _ = by_hand("tallyqa")
    result = scored(
        tmp_path, "tallyqa", folder, put(tmp_path, "told.json", [{"question_id": 30, "answer": "3"}])
    )
    assert (result["score"], result["missing"]) == (50.0, 1)
    folder, _, _ = by_hand("vqav2")
    told = put(tmp_path, "told.json", [{"question_id": 420, "answer": "red"}])
    assert (
        evaluate("--benchmark", "vqav2", "--data", folder, "--predictions", told, "--out", tmp_path / "out")
        == 1
    )
    assert "no answer to 421 (2 of 3 are missing)" in complaint(capfd)


# ---- what is wrong with a file is said in one line ----

GOOD = {"question_id": 1, "image": "a.jpg", "question": "How many?", "answer": 1}
TOLD = {"question_id": 1, "text": "3"}


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("test.json", "[{", "test.json: damaged"),
        ("test.json", "[]", "no question of tallyqa"),
        ("test.json", "7", "test.json: damaged or of another kind"),
        ("test.json", [{"question_id": 1, "image": "a.jpg", "question": "How many?"}], "record 0: damaged"),
        ("test.json", [GOOD | {"question": 7}], "record 0: damaged"),
        ("test.json", ["x"], "record 0: damaged"),
        ("test.json", b"\xff\xfe", "test.json: damaged or of another kind (UnicodeDecodeError: 'utf-8' codec"),
        ("test.json", [GOOD, GOOD], "two questions of tallyqa have the id '1'"),
        ("other.json", "[]", "no test.json in it"),
        ("answers.jsonl", jsonl([TOLD]) + '{"question_id": 1', "answers.jsonl, line 2: damaged"),
        ("answers.jsonl", jsonl([TOLD | {"question_id": 9}]), "'9', which is no question of"),
        ("answers.jsonl", jsonl([{"text": "3"}]), "no id in it"),
        ("answers.jsonl", jsonl([TOLD | {"text": None}]), "no answer in it"),
        ("answers.jsonl", "", "is empty"),
        ("answers.jsonl", "[]", "holds no answers"),
        ("answers.jsonl", jsonl([TOLD] * 2), "line 2: a second answer to 1"),
        ("answers.jsonl", "\n\n" + jsonl([TOLD]) + "\n" + jsonl([{"text": "3"}]), "line 5: no id in it"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path, capfd, file, content, said):
    if file != "other.json":
        put(tmp_path, "test.json", [GOOD])
    told = put(tmp_path, "answers.jsonl", jsonl([TOLD]))
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        put(tmp_path, file, content)
    assert (
        evaluate(
            "--benchmark", "tallyqa", "--data", tmp_path, "--predictions", told, "--out", tmp_path / "out"
        )
        == 1
    )
    assert said in complaint(capfd)


def test_a_picture_without_size_has_no_boxes(tmp_path, capfd):
    row = {"image": "a.jpg", "sent": "car", "bbox": [0, 0, 5, 5], "width": 0, "height": 9}
    put(tmp_path, "refcoco_val.jsonl", jsonl([row]))
    told = put(tmp_path, "told.jsonl", jsonl([{"question_id": 0, "text": "[0, 0, 1, 1]"}]))
    assert (
        evaluate(
            "--benchmark", "refcoco", "--data", tmp_path, "--predictions", told, "--out", tmp_path / "out"
        )
        == 1
    )
    assert "line 1" in complaint(capfd)


def places(found, at=()):
    """Where something stands in a file: of a list the first two are enough."""
    if at:
        yield at
    keys = found if isinstance(found, dict) else range(min(len(found), 2)) if isinstance(found, list) else ()
    for key in keys:
        yield from places(found[key], (*at, key))


@pytest.mark.parametrize("name", BY_HAND)
def test_no_field_of_another_type_ends_in_a_traceback(by_hand, tmp_path, capfd, name):
    """Each value of each official file, replaced by what it cannot be, is an error of one line or no harm."""
    folder, told, _ = by_hand(name)
    for file in sorted(folder.rglob("*.json*")):
        whole = file.read_text()

        def load(text, by_line=file.suffix == ".jsonl"):
            return [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)

        for at in places(load(whole)):
            for value in None, "x", [[1]]:
                broken = load(whole)
                inner = broken
                for step in at[:-1]:
                    inner = inner[step]
                inner[at[-1]] = value
                file.write_text(jsonl(broken) if file.suffix == ".jsonl" else json.dumps(broken))
                code = evaluate(
                    "--benchmark", name, "--data", folder, "--predictions", told, "--out", tmp_path / "out"
                )
                assert (code, len(errors(capfd))) in ((0, 0), (1, 1)), (file.name, at, value)
        file.write_text(whole)


def test_an_unknown_benchmark_is_told_the_nearest(capfd):
    assert evaluate("--benchmark", "vizwis") == 1 and "did you mean vizwiz" in complaint(capfd)


# ---- with a model ----


def write_pictures(name, flags, root):
    """A small picture where each item's official path says."""
    cfg = ev.parse(ev.EvalConfig, [str(flag) for flag in flags])
    cfg.family = "llava"
    for k, item in enumerate(ev.SUITE[name].read(cfg)):
        if isinstance(item["image"], str):
            path = root / item["image"]
            path = path if path.suffix else path.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + k % 3 * 10, 30), (k * 37 % 256, k * 91 % 256, 90)).save(path)


@pytest.fixture
def asked(tiny, tmp_path):
    """asked(name, folder, *flags) -> results.json of the tiny model; the pictures are made up."""

    def asked(name, folder, *flags):
        flags = [
            "--benchmark",
            name,
            "--data",
            folder,
            "--image-root",
            tmp_path / "pictures",
            "--limit",
            8,
            *flags,
        ]
        (tmp_path / "pictures").mkdir(exist_ok=True)
        write_pictures(name, flags, tmp_path / "pictures")
        assert evaluate(*flags, "--model", tiny, "--max-new-tokens", 4, "--out", tmp_path / "run") == 0
        return json.loads((tmp_path / "run/results.json").read_text())

    return asked


@pytest.mark.parametrize("name", BY_HAND)
def test_the_whole_way_from_official_files_to_a_score(asked, by_hand, name):
    result = asked(name, by_hand(name)[0])
    assert result["missing"] == 0 and len(result["records"]) == result["n"]
    assert all(record["answer"] is not None and record["prompt"] for record in result["records"])


@needs_cases
@pytest.mark.parametrize(
    "name", ["textvqa", "textvqa-ocr", "vizwiz", "pope", "mme", "gqa", "scienceqa", "mmbench", "mathvista"]
)
def test_the_whole_way_on_the_official_files(asked, name):
    result = asked(name, CASES / name.removesuffix("-ocr"))
    answered = [record for record in result["records"] if record["answer"] is not None]
    assert result["missing"] + len(answered) == len(result["records"]) >= 6


@needs_cases
def test_a_chain_of_thought_and_the_direct_answer_stand_side_by_side(asked, tmp_path):
    rows = []
    for line in (CASES / "m3cot/predictions_direct.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = row["messages"][0].split("[Question]\n")[1].split("\n")[0]
        rows.append(
            {key: row[key] for key in ("id", "choices", "answer", "domain", "topic")} | {"question": text}
        )
    put(tmp_path, "m3cot/test.jsonl", jsonl(rows))
    result = asked("m3cot", tmp_path / "m3cot", "--cot", "--blind", "none")
    assert list(result["columns"]) == ["direct", "no pictures"]
    assert all("step by step" in record["prompt"] for record in result["records"])


@pytest.mark.parametrize(
    "name, flags, prompt",
    [
        ("vqav2", [], f"What color?\n{common.SHORT}"),
        ("vqav2", ["--cot"], f"{common.COT}What color?"),
        ("seed-bench", [], f"How?\nA. One\nB. Two\nC. 3\nD. 4\n{common.LETTER}"),
        (
            "vsr",
            [],
            'Based on the image, is this statement "True" or "False"? The cup is left of the plate.\n'
            'Respond with "True" or "False" directly.',
        ),
        (
            "refcoco",
            [],
            'Please provide the bounding box coordinate of the region this sentence describes: "car"',
        ),
        (
            "refcoco",
            ["--family", "internvl"],
            "Please provide the bounding box coordinate of the region this sentence describes: "
            "<ref>car</ref>",
        ),
        ("tallyqa", [], f"How many cups?\n{common.SHORT}"),
    ],
)
def test_prompts_are_the_papers(by_hand, name, flags, prompt):
    folder, _, _ = by_hand(name)
    cfg = ev.parse(ev.EvalConfig, ["--benchmark", name, "--data", str(folder), *flags])
    column = "chain of thought" if cfg.cot else "direct"
    assert ev.phrase(ev.read_items(name, cfg)[0], column, [], cfg)["prompt"] == prompt


@pytest.fixture
def toy(tiny, world, tmp_path):
    """toy(*flags, out=...) -> exit code of the tiny model on the small toy world's own questions."""
    base = ["--data", world, "--model", tiny, "--max-new-tokens", 6, "--batch-size", 2]
    return lambda *flags, out="toy": evaluate(*base, "--out", tmp_path / out, *flags)


def test_without_a_name_the_own_questions_are_asked_beside_two_baselines(toy, world, tmp_path, capfd):
    assert toy() == 0
    result = json.loads((tmp_path / "toy/results.json").read_text())
    asked = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()]
    assert {record["prompt"] for record in result["records"]} == {row["text"] for row in asked}
    assert set(result["categories"]) == set(toyworld.CATEGORIES)
    assert list(result["columns"]) == ["shuffled pictures", "most frequent answer"]
    out = capfd.readouterr().out
    assert all(f"\n  {category}" in out for category in toyworld.CATEGORIES)


def test_two_runs_and_one_killed_and_resumed_write_the_same_results(toy, tmp_path, monkeypatch):
    assert toy(out="a") == 0 and toy(out="b") == 0
    whole = (tmp_path / "a/results.json").read_bytes()
    assert (tmp_path / "b/results.json").read_bytes() == whole

    calls, answer = [], sample.answer

    def dies(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(sample, "answer", dies)
    assert toy(out="c") == 130 and not (tmp_path / "c/results.json").exists()
    with open(tmp_path / "c/progress.jsonl", "a") as log:
        log.write('{"column": "direct", "id"')  # a line torn by the kill
    assert toy("--resume", out="c") == 0
    assert (tmp_path / "c/results.json").read_bytes() == whole
    n_batches = 2 * len(json.loads(whole)["records"]) / 2  # two columns, batches of two
    assert len(calls) == n_batches + 1  # only the one that died came again


def test_batches_are_answered_one_after_the_other_by_the_thread_that_has_the_device(toy, monkeypatch):
    answer, threads = sample.answer, []  # shards answer together: each process the same batch at a time
    monkeypatch.setattr(sample, "answer", lambda *args: threads.append(current_thread()) or answer(*args))
    assert toy() == 0 and set(threads) == {main_thread()}


def test_show_draws_wrong_answers_under_their_pictures(toy, tmp_path):
    assert toy("--show", 3) == 0
    with Image.open(tmp_path / "toy/wrong.png") as sheet:
        assert sheet.size == (1024, 3 * 248) and len(sheet.convert("RGB").getcolors(1 << 20)) > 10


def test_results_of_an_earlier_run_are_not_replaced_in_silence(toy, capfd):
    assert toy() == 0 and "are replaced" not in capfd.readouterr().out
    assert toy() == 0 and "toy: the results of an earlier run are replaced" in capfd.readouterr().out


def test_a_wrong_box_is_drawn_in_red_and_the_true_one_in_green(tmp_path):
    Image.new("RGB", (80, 80), "white").save(tmp_path / "a.png")
    boxes = {"answer": "[0.5, 0.5, 0.75, 0.75]", "truth": "[0.25, 0.25, 0.5, 0.5]"}
    record = {"id": 1, "image": ["a.png"], "score": 0.0, "prompt": "Where?"} | boxes
    cfg = ev.EvalConfig(data="val.jsonl", image_root=str(tmp_path), show=1)
    ev.draw_wrong([record], cfg, tmp_path / "wrong.png")
    with Image.open(tmp_path / "wrong.png") as sheet:
        assert sheet.getpixel((180, 150)) == (255, 0, 0)     # the right side of one, of 240 px
        assert sheet.getpixel((60, 90)) == (0, 128, 0)       # the left side of the other


def test_resume_refuses_other_flags(toy, capfd):
    assert toy() == 0
    assert toy("--resume", "--cot") == 1 and "written with cot False, now it is True" in complaint(capfd)


def test_resume_refuses_other_questions_behind_the_same_flags(toy, tmp_path, tiny, world, capfd):
    rows = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()[:4]]
    data = put(tmp_path, "val.jsonl", jsonl(rows))
    flags = ["--data", data, "--image-root", world, "--model", tiny, "--max-new-tokens", 2]
    flags += ["--out", tmp_path / "out"]
    assert evaluate(*flags) == 0
    put(tmp_path, "val.jsonl", jsonl([rows[0] | {"text": "Why?"}, *rows[1:]]))
    assert evaluate(*flags, "--resume") == 1 and "questions of checksum" in complaint(capfd)


def test_limit_keeps_circular_groups_whole(tmp_path, by_hand):
    folder, told, _ = by_hand("mmbench-cn")
    result = scored(tmp_path, "mmbench-cn", folder, told, "--limit", 1)
    assert len(result["records"]) == 2 and len({record["unit"] for record in result["records"]}) == 1


def test_compare_pairs_the_questions_of_two_runs(tmp_path, by_hand, capsys):
    folder, _, _ = by_hand("tallyqa")
    good = put(
        tmp_path, "good.json", [{"question_id": 30, "answer": "3"}, {"question_id": 31, "answer": "1"}]
    )
    bad = put(tmp_path, "bad.json", [{"question_id": 30, "answer": "3"}, {"question_id": 31, "answer": "4"}])
    scored(tmp_path, "tallyqa", folder, bad)
    (tmp_path / "out").rename(tmp_path / "theirs")
    theirs = tmp_path / "theirs/results.json"
    found = scored(tmp_path, "tallyqa", folder, good, "--compare", theirs)["compare"]
    assert (found["n"], found["difference"], found["better"], found["worse"]) == (2, 50.0, 1, 0)
    assert found["ci95"] == [0, 100]  # two questions tell little
    assert f"against {theirs}: +50.00 (+0.00 to +100.00), 1 better, 0 worse of 2" in capsys.readouterr().out


def test_the_interval_of_a_mean_is_that_of_the_binomial():
    units = [[{"score": float(k < 60)}] for k in range(100)]
    low, high = bootstrap(units, common.percent_right)
    assert low == pytest.approx(60 - 9.6, abs=1.5) and high == pytest.approx(
        60 + 9.6, abs=1.5
    )  # 1.96 sqrt(0.24 / 100)


def test_evaluation_looks_once_at_a_picture_of_several_questions(toy, world, tmp_path, monkeypatch):
    looked = []
    open_image = asking.open_image
    look = lambda path, to_check: looked.append(path) or open_image(path, to_check)
    monkeypatch.setattr(asking, "open_image", look)
    assert toy("--batch-size", 1000) == 0
    pictures = {json.loads(line)["image"] for line in (world / "val.jsonl").read_text().splitlines()}
    assert len(looked) == 2 * len(pictures)  # once for the score, once for the shuffled pictures


# ---- held-out questions of a training run ----

PICTURE, OTHER = "images/val_00000.png", "images/val_00001.png"


def conversation(images, *turns):
    """A record in which a person and the model speak in turns; "gpt: ..." is the model's."""
    said = []
    for turn in turns:
        role = "gpt" if turn.startswith("gpt: ") else "human"
        said.append({"from": role, "value": turn.removeprefix("gpt: ")})
    return {"id": "c", "image": images, "conversations": said}


def test_held_out_records_may_be_all_that_training_takes_and_each_question_is_asked(go, world, tmp_path):
    two = conversation([PICTURE, OTHER], "<image>\nWhat?", "gpt: a cat", "<image>\nAnd this?", "gpt: a dog")
    greeting = conversation(PICTURE, "gpt: Hello.", "<image>\nWhat?", "gpt: a cat")
    val = put(tmp_path, "val.jsonl", jsonl([two, greeting]))
    assert go("--val", val, "--image-root", world, "--max-steps", 1, "--eval-every", 1, "--final-eval") == 0
    records = json.loads((tmp_path / "run/results.json").read_text())["records"]
    assert [(record["id"], record["truth"]) for record in records] == [
        ("c", "a cat"), ("c#2", "a dog"), ("c#3", "a cat")]


def test_a_held_out_record_that_ends_with_a_question_has_no_answer(tmp_path, capfd):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = put(tmp_path, "val.jsonl", jsonl([conversation("a.png", "gpt: Hello.", "<image>\nWhat?")]))
    assert evaluate("--data", data, "--predictions", data, "--out", tmp_path / "out") == 1
    assert "line 1 (id 'c'): no answer" in complaint(capfd)


def test_a_picture_that_is_missing_from_ones_own_file_is_said_before_the_first_answer(tiny, tmp_path, capfd):
    rows = [{"id": k, "image": f"{k}.png", "text": "What?", "answer": "x"} for k in range(2)]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    data = put(tmp_path, "val.jsonl", jsonl(rows))
    assert evaluate("--data", data, "--model", tiny, "--batch-size", 1, "--out", tmp_path / "out") == 1
    assert "1.png: no such picture" in complaint(capfd)
    (flags,) = (tmp_path / "out/progress.jsonl").read_text().splitlines()           # and no answer


@pytest.mark.parametrize("category", ["", None])
def test_a_question_of_no_category_is_one_of_all(tmp_path, category):
    data = put(tmp_path, "val.jsonl", jsonl([{"text": "What?", "answer": "x", "category": category}]))
    item, = ev.read_own(ev.EvalConfig(data=str(data)))
    assert item["category"] == ["all"] and own.most_frequent([item]) == {item["id"]: {"answer": "x"}}


def test_any_held_out_picture_that_does_not_open_is_said_before_the_training(tiny, tok, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    put(tmp_path, "1.png", "no picture")
    rows = [{"id": k, "image": f"{k}.png", "text": "What?", "answer": "x"} for k in range(2)]
    cfg = train.TrainConfig(val=str(put(tmp_path, "val.jsonl", jsonl(rows))), image_root=str(tmp_path))
    with pytest.raises(UserError, match="line 2 .*1.png"):                          # the loss is of the first
        HeldOut(cfg, VLM.from_pretrained(tiny), tok, train.Answering, n=1)


def test_where_all_questions_share_one_picture_nothing_is_said_of_pictures(go, world, tmp_path, capfd):
    rows = [{"id": k, "image": PICTURE, "text": f"{k}?", "answer": "x"} for k in range(2)]
    val = put(tmp_path, "val.jsonl", jsonl(rows))
    assert go("--val", val, "--image-root", world, "--max-steps", 1, "--eval-every", 1, "--final-eval") == 0
    said = capfd.readouterr().out
    assert "held-out loss" in said and "held-out accuracy" in said
    assert "shuffled" not in said and "no use of the pictures" not in said


def test_shuffled_a_question_sees_all_tiles_of_one_other_picture(tiny, tok, tmp_path):
    vlm = VLM.from_pretrained(tiny)
    vlm.cfg.image_mode = "internvl"
    sizes = {"wide.png": (96, 32), "square.png": (32, 32)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
    rows = [{"id": name, "image": name, "text": "What?", "answer": "x"} for name in sizes]
    cfg = train.TrainConfig(val=str(put(tmp_path, "val.jsonl", jsonl(rows))), image_root=str(tmp_path))
    held_out = HeldOut(cfg, vlm, tok, train.Answering)
    (seen,), (shuffled,) = held_out.batches, held_out.shuffled
    assert len(seen["pixels"]) == len(shuffled["pixels"]) == 4 + 1          # three tiles and the whole; one
    assert shuffled["lengths"].tolist() == seen["lengths"].tolist()[::-1]


def test_a_finished_model_on_ones_own_file_gets_the_table_that_training_printed(go, world, tmp_path, capfd):
    assert go("--final-eval", "--max-steps", 2) == 0
    printed = capfd.readouterr().out
    flags = ["--data", world / "val.jsonl", "--image-root", world, "--model", tmp_path / "run"]
    compared = ["--compare", tmp_path / "run/results.json", "--show", 2]
    assert evaluate(*flags, "--out", tmp_path / "exam", *compared) == 0
    said = capfd.readouterr().out
    table = said[said.index("score") :].strip()
    assert len(table.splitlines()) == 1 + 1 + len(toyworld.CATEGORIES) and table in printed
    assert f"against {tmp_path / 'run/results.json'}: +0.00 (+0.00 to +0.00)" in said
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("exam", "run"))
    for name in ("records", "columns", "categories", "score", "ci95"):
        assert ours[name] == theirs[name]


# ---- what is answered by whom ----


@pytest.mark.parametrize("text", [float("nan"), True, None, ["yes"]])
def test_an_answer_is_text_or_a_number(tmp_path, capfd, text):
    put(tmp_path, "test.json", [GOOD])
    told = put(tmp_path, "told.json", [{"question_id": 1, "text": text}])
    flags = ["--benchmark", "tallyqa", "--data", tmp_path, "--predictions", told, "--out", tmp_path / "out"]
    assert evaluate(*flags) == 1
    assert "record 0: no answer in it" in complaint(capfd)


@needs_cases
def test_answers_that_stand_one_row_too_far_are_refused(tmp_path, capfd):
    rows = [json.loads(line) for line in open(CASES / "scienceqa/predictions_llava.jsonl")]
    ids = [row["question_id"] for row in rows]
    shifted = [row | {"question_id": id} for row, id in zip(rows, ids[1:])]
    told = put(tmp_path, "told.jsonl", jsonl(shifted))
    flags = ["--benchmark", "scienceqa", "--data", CASES / "scienceqa", "--predictions", told]
    assert evaluate(*flags, "--out", tmp_path / "out") == 1
    assert "answers another question" in complaint(capfd)


def test_popes_own_lines_have_no_ids_but_the_questions_in_order(tmp_path, capfd):
    dog = POPE_ROW | {"question_id": 2, "text": "Is there a dog in the image?", "label": "no"}
    put(tmp_path, "coco_pope_random.json", jsonl([POPE_ROW, dog]))
    rows = [{"question": row["text"], "answer": row["label"]} for row in (POPE_ROW, dog)]
    assert scored(tmp_path, "pope", tmp_path, put(tmp_path, "told.jsonl", jsonl(rows)))["score"] == 100
    told = put(tmp_path, "told.jsonl", jsonl(rows[::-1]))
    assert evaluate("--benchmark", "pope", "--data", tmp_path, "--predictions", told) == 1
    assert "line 1: answers another question" in complaint(capfd)


def test_a_split_that_nobody_answered_is_left_out_and_not_called_wrong(tmp_path, capsys):
    questions = jsonl([POPE_ROW, POPE_ROW | {"question_id": 2, "label": "no"}])
    for split in ("random", "popular"):
        put(tmp_path, f"coco_pope_{split}.json", questions)
    rows = [{"question_id": 10_000_000 + k, "text": text} for k, text in ((1, "Yes"), (2, "No"))]
    result = scored(tmp_path, "pope", tmp_path, put(tmp_path, "told.jsonl", jsonl(rows)))
    assert (result["score"], result["n"], list(result["categories"])) == (100, 2, ["random"])
    said = capsys.readouterr().out
    assert "nothing of popular is answered, so it is left out" in said and "wrong" not in said


def test_an_answer_without_a_review_is_left_out_and_not_called_wrong(tmp_path, capsys):
    asked = {"imagename": "a.png", "question": "What is x?", "answer": "1", "capability": ["math"]}
    put(tmp_path, "mm-vet.json", {"v1_0": asked, "v1_1": asked})
    result = scored(tmp_path, "mm-vet", tmp_path, put(tmp_path, "grades.json", {"v1_0": {"score": 0.5}}))
    assert (result["score"], result["n"]) == (50, 1)
    said = capsys.readouterr().out
    assert "1 not scored, for want of a label or a review" in said and "wrong" not in said


def test_limit_takes_as_many_as_it_says_and_keeps_the_last_unit_whole():
    items = [{"id": k, "unit": k} for k in range(100)]
    for n in (1, 7, 99):
        assert len(ev.draw_some(items, n)) == n
    pairs = [{"id": k, "unit": k // 2} for k in range(100)]
    assert [len(ev.draw_some(pairs, n)) for n in (1, 2, 3)] == [2, 2, 4]


def test_other_questions_under_the_same_ids_are_not_compared(tmp_path, by_hand, capfd):
    folder, told, _ = by_hand("tallyqa")
    flags = ["--benchmark", "tallyqa", "--data", folder, "--predictions", told]
    assert evaluate(*flags, "--out", tmp_path / "a") == 0
    ours, theirs = tmp_path / "a/results.json", tmp_path / "b.json"
    result = json.loads(ours.read_text())
    result["records"][0]["asked"] = "How many cats?"
    theirs.write_text(json.dumps(result))
    assert evaluate(*flags, "--out", tmp_path / "c", "--compare", theirs) == 1
    said = complaint(capfd)
    assert "b.json" in said and "'How many cats?' there" in said


@pytest.mark.parametrize("theirs", [
    [],
    {},
    {"records": 7},
    {"records": [{"unit": 1, "score": "x"}]},
    {"records": [{"unit": 30, "score": float("nan"), "category": []}]},
    {"records": [{"unit": 30, "score": {}}]},
])
def test_odd_values_in_the_file_to_compare_with_are_one_line(tmp_path, by_hand, capfd, theirs):
    folder, told, _ = by_hand("tallyqa")
    other = put(tmp_path, "theirs.json", theirs)
    flags = ["--benchmark", "tallyqa", "--data", folder, "--predictions", told, "--out", tmp_path / "out"]
    assert evaluate(*flags, "--compare", other) == 1
    assert "theirs.json" in complaint(capfd)


# ---- progress ----


def test_progress_keeps_any_text_and_is_cut_at_a_damaged_line(tmp_path):
    path = tmp_path / "progress.jsonl"
    texts = ["a\u2028b", "c\u0085d", "\ud800", "e"]
    Progress(path, {"flag": 1}).add([{"answer": text} for text in texts])
    assert [row["answer"] for row in Progress(path, {"flag": 1}).rows] == texts
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], b"\xff" + lines[2][5:], *lines[3:]]))
    assert [row["answer"] for row in Progress(path, {"flag": 1}).rows] == texts[:1]
    Progress(path, {"flag": 1}).add([{"answer": "again"}])
    assert [row["answer"] for row in Progress(path, {"flag": 1}).rows] == [texts[0], "again"]


def test_a_full_disk_is_said_in_a_line(tmp_path):
    progress = Progress(tmp_path / "progress.jsonl", {})
    progress.path = Path("/dev/full")
    with pytest.raises(UserError, match="could not be written .* free some space, and go on with --resume"):
        progress.add([{"answer": "x"}])
