"""Official files beside the plain case, and files that are wrong: what each benchmark makes of them."""

import json

import pytest
from test_eval import (  # noqa: F401 (by_hand is a fixture)
    BY_HAND,
    CASES,
    by_hand,
    complaint,
    evaluate,
    jsonl,
    needs_cases,
    put,
    scored,
    ten,
)

from benchmarks import BENCHMARKS
from benchmarks.common import question


def refused(capfd, tmp_path, name, data, told, *flags):
    """The one line that the command ends with."""
    out = tmp_path / "out"
    flags = ["--benchmark", name, "--data", data, "--predictions", told, "--out", out, *flags]
    assert evaluate(*flags) == 1
    return complaint(capfd)


# ---- which files, which splits ----


@pytest.mark.parametrize("name", [*BENCHMARKS, "own"])
def test_a_split_that_a_benchmark_does_not_have_is_refused(tmp_path, capfd, name):
    put(tmp_path, "pid_splits.json", {"test": []})
    for file in "context.jsonl", "answers_gpt4.jsonl":
        put(tmp_path, file, jsonl([{"image": "a.jpg", "question_id": 0}]))
    told = put(tmp_path, "told.json", [])
    said = refused(capfd, tmp_path, name, tmp_path, told, "--split", "valid")
    assert "--split valid: unknown" in said and "Known are" in said


@pytest.mark.parametrize("file", ["MMBench_DEV_CN.tsv", "MMBench_DEV_CN_V11.tsv", "MMBench_TEST_CN_V11.tsv"])
def test_later_releases_of_mmbench_are_found(tmp_path, by_hand, file):
    folder, told, score = by_hand("mmbench-cn")
    (folder / "mmbench_dev_cn_20231003.tsv").rename(folder / file)
    assert scored(tmp_path, "mmbench-cn", folder, told)["score"] == score


@pytest.mark.parametrize("split, n, score", [("image", 1, 100), ("video", 1, 0)])
def test_seeds_images_can_be_asked_without_its_videos(tmp_path, by_hand, split, n, score):
    folder, _, _ = by_hand("seed-bench")
    told = put(tmp_path, "told.json", {"101": "A"} if split == "image" else {"v1": "B."})
    result = scored(tmp_path, "seed-bench", folder, told, "--split", split)
    assert (result["n"], result["score"], list(result["categories"])[-1]) == (n, score, split)


@needs_cases
def test_scienceqa_prints_the_figure_of_the_papers_under_their_name_for_it(tmp_path, capsys):
    result = scored(tmp_path, "scienceqa", CASES / "scienceqa", CASES / "scienceqa/predictions_llava.jsonl")
    assert f"{result['categories']['image context']['score']:.2f}" == "46.58"
    assert "image context: LLaVA-1.5-7B 66.8" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["coco_pope", "aokvqa_pope_seem", "gqa_pope_seem"])
def test_pope_is_found_under_the_names_of_its_release(tmp_path, source):
    row = {"image": "1.jpg", "text": "Is there a cat?", "label": "yes", "question_id": 1}
    for split in "random", "popular", "adversarial":
        put(tmp_path, f"output/{source}_{split}.json", [row])
    told = put(tmp_path, "told.json", {"1": "yes", "10000001": "yes", "20000001": "no"})
    assert scored(tmp_path, "pope", tmp_path, told)["score"] == pytest.approx(200 / 3)


def test_of_vsrs_two_ways_to_split_the_papers_zero_shot_one_is_taken(tmp_path):
    row = {"image": "42.jpg", "caption": "The cup is under the plate.", "label": 0, "relation": "under"}
    put(tmp_path, "splits/random/test.jsonl", jsonl([row, row]))
    put(tmp_path, "splits/zeroshot/test.jsonl", jsonl([row]))
    told = put(tmp_path, "told.json", {"0": "False"})
    assert scored(tmp_path, "vsr", tmp_path / "splits", told)["n"] == 1


TWIN = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xb0\xff"


def test_twins_that_macos_puts_beside_files_are_no_files(tmp_path, by_hand):
    folder, told, score = by_hand("ai2d")
    for path in [*folder.rglob("*")]:
        if path.is_file():
            path.with_name("._" + path.name).write_bytes(TWIN)
    put(folder, "__MACOSX/ai2d_test_ids.csv", "8\n")
    assert scored(tmp_path, "ai2d", folder, told)["score"] == score

    lines = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    task = put(tmp_path, "mme/existence/0001.txt", lines).parent
    (task / "._0001.txt").write_bytes(TWIN)
    row = {"question_id": "existence/0001.jpg", "text": "Yes"}
    told = put(tmp_path, "told.jsonl", jsonl([row | {"prompt": "Is there a dog?"}]))
    assert scored(tmp_path, "mme", tmp_path / "mme", told)["n"] == 2


def test_a_file_of_m3cot_under_another_name_is_not_passed_over_for_the_answers_own_labels(tmp_path):
    row = {"id": "a-1", "choices": ["3", "4"], "domain": "mathematics", "topic": "algebra"}
    data = put(tmp_path, "mine.jsonl", jsonl([row | {"answer": "A"}]))
    told = put(tmp_path, "told.jsonl", jsonl([row | {"answer": "B", "messages": ["which?", "(A)"]}]))
    assert scored(tmp_path, "m3cot", data, told)["score"] == 100


# ---- what is handed in ----


def test_a_submission_of_vqav2_holds_all_of_test2015_empty_where_not_asked(tmp_path, capfd):
    asked = [{"image_id": k, "question": "What?", "question_id": k} for k in (1, 2, 3)]
    put(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked[:1]})
    told = put(tmp_path, "told.json", [{"question_id": 1, "answer": "Two cats."}])

    scored(tmp_path, "vqav2", tmp_path, told)
    assert "refuses less than all of" in capfd.readouterr().out
    put(tmp_path, "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": asked})
    scored(tmp_path, "vqav2", tmp_path, told, "--split", "test-dev")
    assert "empty where not asked" in capfd.readouterr().out
    rows = json.loads((tmp_path / "out/vqav2_answers.json").read_text())
    assert [(row["question_id"], row["answer"]) for row in rows] == [(1, "2 cats"), (2, ""), (3, "")]


@pytest.mark.parametrize("name", ["mmbench-cn", "vqav2"])
def test_half_a_surrogate_in_an_answer_can_be_handed_in(tmp_path, by_hand, name):
    folder, told, _ = by_hand(name)
    rows = [json.loads(line) | {"text": "\ud83d"} for line in told.read_text().splitlines()]
    scored(tmp_path, name, folder, put(tmp_path, "told.jsonl", jsonl(rows)))


# ---- POPE's answers ----


@needs_cases
def test_popes_own_lines_have_no_ids_and_are_taken_in_order(tmp_path, capfd):
    lines = (CASES / "pope/predictions_random.json").read_text().splitlines()
    rows = [{name: json.loads(line)[name] for name in ("question", "answer")} for line in lines]
    told = put(tmp_path, "told.json", jsonl(rows))
    result = scored(tmp_path, "pope", CASES / "pope", told, "--split", "random")
    assert result["score"] == pytest.approx(69.84, abs=0.01)
    assert "for each question of --data and --split" in refused(capfd, tmp_path, "pope", CASES / "pope", told)
    told = put(tmp_path, "told.json", jsonl(rows[1:] + rows[:1]))
    said = refused(capfd, tmp_path, "pope", CASES / "pope", told, "--split", "random")
    assert "answers another question" in said


def test_llavas_numbers_of_merged_splits_are_known_where_one_split_stands_alone(tmp_path):
    row = {"image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes", "question_id": 1}
    put(tmp_path, "coco_pope_random.json", jsonl([row, row | {"question_id": 2, "label": "no"}]))
    for first in 1, 10_000_001:
        rows = [{"question_id": first, "text": "Yes"}, {"question_id": first + 1, "text": "No"}]
        told = put(tmp_path, "told.jsonl", jsonl(rows))
        assert scored(tmp_path, "pope", tmp_path, told)["score"] == 100


def test_mathvistas_own_result_files_say_what_was_asked_in_their_query(tmp_path):
    """In 62 of them the numbers of `question` are masked."""
    row = {"image": "images/6.jpg", "choices": ["6cm", "7cm"], "answer": "6cm"}
    row |= {"question_type": "multi_choice", "answer_type": "text", "question": "If CB = 4.0, what is AC?"}
    row |= {"precision": None, "metadata": {"task": "t"}}
    row["query"] = f"Hint: Please answer.\nQuestion: {row['question']}\nChoices:\n(A) 6cm\n(B) 7cm"
    put(tmp_path, "testmini.json", {"6": row})
    told = row | {"question": "If CB = N_0, what is AC?", "extraction": "A"}
    assert scored(tmp_path, "mathvista", tmp_path, put(tmp_path, "told.json", {"6": told}))["score"] == 100


# ---- labels and options that cannot be ----


@pytest.mark.parametrize("truth", [True, 1.5, float("nan"), {}, b"A"])
def test_a_label_is_text_a_whole_number_or_a_list(truth):
    with pytest.raises(ValueError, match="the label is"):
        question(1, "a.jpg", "What?", "", truth)


@pytest.mark.parametrize("truth", ["C", "Z", "b", ""])
def test_a_label_is_one_of_the_options(truth):
    with pytest.raises(ValueError, match="is none of 2 options"):
        question(1, "a.jpg", "What?", "", truth, choices=["cat", "dog"])


def spoil(folder, file, change):
    """Change the first record of an official file of JSON or JSON lines."""
    text = (folder / file).read_text()
    if file.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows[0])
        put(folder, file, jsonl(rows))
    else:
        content = json.loads(text)
        rows = content
        for name in ("questions", "annotations"):
            rows = rows.get(name, rows) if isinstance(rows, dict) else rows
        change(rows[0] if isinstance(rows, list) else next(iter(rows.values())))
        put(folder, file, content)


@pytest.mark.parametrize(
    "name, file, fields",
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", {"answers": None}),
        ("seed-bench", "SEED-Bench.json", {"answer": None}),
        ("seed-bench", "SEED-Bench.json", {"answer": "E"}),
        ("seed-bench", "SEED-Bench.json", {"choice_c": None}),
        ("ai2d", "ai2d/questions/7.png.json", {"correctAnswer": -1}),
        ("ai2d", "ai2d/questions/7.png.json", {"answerTexts": ["a", 2]}),
        ("tallyqa", "test.json", {"answer": 1.5}),
        ("vsr", "test.jsonl", {"label": "True"}),
        ("vsr", "test.jsonl", {"caption": None}),
        ("vsr", "test.jsonl", {"image": None}),
        ("tallyqa", "test.json", {"image": None}),
        ("ai2d", "ai2d/questions/7.png.json", {"answerTexts": []}),
        ("refcoco", "refcoco_val.jsonl", {"width": -200}),
        ("refcoco", "refcoco_val.jsonl", {"width": float("nan")}),
        ("refcoco", "refcoco_val.jsonl", {"bbox": [120, 10, 20, 60]}),
        ("refcoco", "refcoco_val.jsonl", {"sent": None}),
        ("ocid-ref", "val_expressions.json", {"bbox": "[64, 48, 700, 240]"}),
    ],
)
def test_a_record_without_a_possible_label_is_never_scored_in_silence(
    tmp_path, capfd, by_hand, name, file, fields
):
    folder, told, _ = by_hand(name)
    spoil(folder, file, lambda row: row.update(fields))
    assert file in refused(capfd, tmp_path, name, folder, told)


def test_answers_of_people_may_be_hidden_in_a_test_split_alone(tmp_path, capfd):
    row = {"image": "a.jpg", "question": "What?"}
    told = put(tmp_path, "told.json", [{"question_id": "a.jpg", "text": "x"}])
    put(tmp_path, "test.json", [row])
    assert scored(tmp_path, "vizwiz", tmp_path, told)["score"] is None
    put(tmp_path, "val.json", [row | {"answers": ten("x")}])
    assert scored(tmp_path, "vizwiz", tmp_path, told)["score"] == 100
    put(tmp_path, "val.json", [row])
    assert "val.json, record 0" in refused(capfd, tmp_path, "vizwiz", tmp_path, told)


@pytest.mark.parametrize("grade", [float("nan"), 7, -1, "good", [], [0.5, None], "", True])
def test_a_grade_of_mm_vet_is_a_number_from_0_to_1(tmp_path, capfd, by_hand, grade):
    folder, _, _ = by_hand("mm-vet")
    told = put(tmp_path, "grades.json", {"v1_0": {"score": grade}})
    assert "v1_0" in refused(capfd, tmp_path, "mm-vet", folder, told)


def test_a_grade_under_another_name_is_told_where_it_should_stand(tmp_path, capfd, by_hand):
    folder, _, _ = by_hand("mm-vet")
    told = put(tmp_path, "told.json", {"v1_0": {"content": "0.5"}})
    assert "output, score is needed" in refused(capfd, tmp_path, "mm-vet", folder, told)


@pytest.mark.parametrize("review", ["nan 5", "8 inf", "8", "", "8 6 4", "eight six"])
def test_a_review_that_cannot_be_read_counts_as_its_authors_count_it(tmp_path, by_hand, review):
    folder, _, _ = by_hand("llava-bench")
    told = put(tmp_path, "reviews.jsonl", jsonl([{"question_id": 0, "content": review}]))
    result = scored(tmp_path, "llava-bench", folder, told)
    assert (result["n"], result["unparsed"], result["records"][0]["score"]) == (1, 1.0, 0.0)


@pytest.mark.parametrize("messages", [True, 3, {}, "x"])
def test_messages_that_are_no_list_are_no_traceback(tmp_path, capfd, by_hand, messages):
    folder, _, _ = by_hand("tallyqa")
    told = put(tmp_path, "told.json", [{"id": 30, "messages": messages}])
    assert "no answer in it" in refused(capfd, tmp_path, "tallyqa", folder, told)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "[null]", "[[]]", "\0", "[" * 9999])
def test_an_official_file_of_nothing_is_one_line_or_does_no_harm(tmp_path, capfd, by_hand, name, content):
    folder, told, _ = by_hand(name)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = file.read_text()
        file.write_text(content)
        flags = ["--benchmark", name, "--data", folder, "--predictions", told, "--out", tmp_path / "out"]
        if evaluate(*flags) == 1:
            complaint(capfd)
        else:
            assert capfd.readouterr().err == ""
        file.write_text(whole)
