"""tools.photos: a folder of photos, or a table of questions, becomes records that train."""

import io
import json
import re

import pytest
from common import QUICK, call, errors, save
from PIL import Image

import sample
import train
from support.data_files import Records
from support.start import build
from tools import photos, show

KINDS = {"cat": "red", "ice_bear": "white", "dog": "blue"}
COLORS = {"cat": (255, 0, 0), "ice bear": (255, 255, 255), "dog": (0, 0, 255)}
MIDDLES = {"top left": (8, 8), "top right": (24, 8), "bottom left": (8, 24), "bottom right": (24, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three kinds, ten photos of each, in its color; each of another width, so that it can be told again."""
    root = tmp_path_factory.mktemp("photos") / "mine"
    for name, color in KINDS.items():
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (10 + i, 16), color).save(root / name / f"{i}.png")
    (root / ".git").mkdir()
    (root / ".git/x.jpg").write_text("no picture")
    (root / "cat/._0.png").write_text("a twin as macOS makes them")
    (root / "README.txt").write_text("no folder")
    return root


def held_out(out):
    return [json.loads(line) for line in open(out / "val.jsonl")]


def said(out):
    """[(picture, question without its format prompt, answer), ...] of train.json"""
    found = []
    for record in json.loads((out / "train.json").read_text()):
        texts = [turn["value"].removeprefix("<image>\n").split("\n")[0] for turn in record["conversations"]]
        found += [(out / record["image"], *pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return found


def color_of(path, x, y):
    """The nearest of the three; JPEG changes them a little."""
    pixel = Image.open(path).getpixel((x, y))
    return min(COLORS, key=lambda kind: sum(abs(a - b) for a, b in zip(pixel, COLORS[kind])))


def test_each_photo_is_asked_what_it_is_and_a_tenth_of_each_kind_is_held_out(folder, tmp_path, capsys):
    assert call(photos.main, folder, "--out", tmp_path / "a") == 0
    assert "27 pictures to train on; 3 held out, 3 questions" in capsys.readouterr().out
    for path, question, answer in said(tmp_path / "a"):
        assert question == "What is in the picture?"
        assert color_of(path, 4, 4) == answer
    assert sorted(line["answer"] for line in held_out(tmp_path / "a")) == sorted(COLORS)
    for line in held_out(tmp_path / "a"):
        assert line["category"] == "what"
        assert color_of(tmp_path / "a" / line["image"], 4, 4) == line["answer"]

    # Widths tell photos apart: each kind's ten are there, each of them once.
    sizes = [(color_of(path, 4, 4), Image.open(path).width) for path in (tmp_path / "a/images").iterdir()]
    assert sorted(sizes) == sorted((kind, 10 + i) for kind in COLORS for i in range(10))


def test_twice_the_same_files(folder, tmp_path):
    for out in "ab":
        assert call(photos.main, folder, "--out", tmp_path / out, "--four") == 0
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 2 + 27 // 4 + 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_answer_about_four_photos_is_true(folder, tmp_path):
    assert call(photos.main, folder, "--out", tmp_path / "a", "--four", "--size", 32) == 0
    asked = said(tmp_path / "a")
    for line in held_out(tmp_path / "a"):
        asked.append((tmp_path / "a" / line["image"], line["text"].split("\n")[0], line["answer"]))
    seen = set()
    for path, question, answer in asked:
        assert Image.open(path).size == (32, 32)
        kinds = {place: color_of(path, *middle) for place, middle in MIDDLES.items()}
        shown = list(kinds.values())
        if found := re.fullmatch(r"What is at the (.*)\?", question):
            truth = kinds[found[1]]
        elif found := re.fullmatch(r"Where is the (.*)\?", question):
            truth = next(place for place, kind in kinds.items() if kind == found[1])
            assert shown.count(found[1]) == 1
        elif found := re.fullmatch(r"How many of the photos are of the kind (.*)\?", question):
            truth = str(shown.count(found[1]))
        elif found := re.fullmatch(r"Is any of the photos of the kind (.*)\?", question):
            truth = "yes" if found[1] in shown else "no"
        assert answer == truth, question
        seen.add(question.split()[0])
    assert seen == {"What", "Where", "How", "Is"}


def test_a_large_photo_is_made_smaller_and_keeps_its_shape(folder, tmp_path):
    for name in "ab":
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (400, 200)).save(tmp_path / "mine" / name / f"{i}.jpg")
    assert call(photos.main, tmp_path / "mine", "--out", tmp_path / "a") == 0
    assert {Image.open(path).size for path in (tmp_path / "a/images").iterdir()} == {(64, 32)}


def test_a_table_brings_its_own_questions_and_no_picture_is_on_both_sides(folder, tmp_path):
    rows = [f'cat/{i}.png,"Which, then?",number {i}\ncat/{i}.png,What color?,red\n' for i in range(10)]
    (folder / "table.csv").write_text("\ufeffimage,question,answer,note\n" + "".join(rows), encoding="utf-8")
    assert call(photos.main, folder / "table.csv", "--out", tmp_path / "a") == 0
    for path, question, answer in said(tmp_path / "a"):
        if question == "Which, then?":
            assert answer == f"number {Image.open(path).width - 10}"
        else:
            assert (question, answer) == ("What color?", "red")
    assert len(said(tmp_path / "a")) == 18
    first, second = held_out(tmp_path / "a")
    assert first["image"] == second["image"] and second["text"] == "What color?"
    assert first["answer"] not in {answer for _, _, answer in said(tmp_path / "a")}


def test_what_it_writes_passes_the_check_and_trains(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(photos.main, folder, "--out", "a", "--four") == 0
    assert call(show.main, "check", "a/train.json") == 0
    assert call(show.main, "check", "a/val.jsonl") == 0
    assert len(Records("a/train.json")) == 27 // 4
    assert call(train.main, "--model", tiny, "--data", "a/train.json", *QUICK) == 0


def test_a_chat_asks_a_model_of_photos_for_no_caption(folder, tmp_path, monkeypatch, capsys):
    vlm, tok = build(train.TrainConfig(model="photo"))
    save(vlm, tok, tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is in the picture?\n"))
    assert call(sample.main, "--model", tmp_path / "model", "--image", folder / "cat/0.png") == 0
    assert "caption" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["mine/cat"], "mine/cat: photos in 0 of its folders, .*; expected mine/cat/cat/1.jpg"),
        (["nowhere"], "nowhere: photos in 0 of its folders"),
        (["nowhere.csv"], "nowhere.csv: cannot be read .No such file or directory.; check the path"),
        (["one"], "one: b: fewer than two photos"),
        (["bad.csv"], "bad.csv: line 2: one of image, .* is missing; its first line names .* image, text"),
        (["semi.csv"], "semi.csv: line 2: .* names these columns, between commas: image;question;answer"),
        (["short.csv"], "short.csv: line 3: one of image, question, answer is missing"),
        (["short.csv", "--four"], "--four is for a folder of photos"),
        (["broken"], r"broken/./1.png: cannot be read .*\. 2 photos cannot be used, such as broken/./1.png$"),
        (["broken", "--four"], "broken/./1.png: cannot be read"),
        (["mine", "--size", 1], "--size 1: must be at least 2"),
        (["mine", "--out", "full"], "--out full: a train.json is there"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(flags, says, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to(folder)
    for path in "one/a/1 one/a/2 one/b/1 broken/a/2 broken/b/2".split():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{path}.png")
    (tmp_path / "broken/a/1.png").write_text("no picture")
    (tmp_path / "broken/b/1.png").write_text("no picture")
    (tmp_path / "semi.csv").write_text("image;question;answer\na.png;What?;A cat\n")
    (tmp_path / "bad.csv").write_text("image,text\na.png,What?\n")
    (tmp_path / "short.csv").write_text("image,question,answer\na.png,What?,A cat\nb.png,What?\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/train.json").write_text("[]")
    assert call(photos.main, "--out", "new", *flags) == 1
    (line,) = errors(capfd)
    assert re.match(f"error: {says}", line)
    assert not (tmp_path / "new/train.json").exists()
