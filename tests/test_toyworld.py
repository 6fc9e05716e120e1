"""The toy world is right by construction: pictures show the scene, answers follow from it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image, ImageColor

import toyworld
from benchmarks.common import COT, INSUFFICIENT, LETTER, SHORT
from lab.vicuna import BRIEF, sayings
from support.cli import UserError
from support.templates import SYSTEM_VICUNA
from tools.tokenizer import train_tokenizer
from toyworld import (
    COLORS,
    KINDS,
    PLACES,
    UNSEEN,
    Scene,
    Sign,
    Thing,
    ask_all,
    caption,
    describe,
    draw_scene,
    random_scene,
)

CAT = Thing("cat", "red", "big", "top left", (0.05, 0.05, 0.35, 0.35))
BALL = Thing("ball", "orange", "small", "right", (0.70, 0.40, 0.90, 0.60))
SCENE = Scene("meadow", (CAT, BALL), Sign("OPEN", "bottom", (0.30, 0.75, 0.70, 0.95)))


def scenes(n, held_out=False):
    return [random_scene(random.Random(i), held_out) for i in range(n)]


def asked(n, held_out=False):
    """(scene, category, question without its format prompt, answer) of n scenes, five rounds each."""
    for i, scene in enumerate(scenes(n, held_out)):
        for k in range(5):
            for category, question, answer in ask_all(scene, random.Random(f"{i} {k}")):
                yield scene, category, question, answer


# ---- pictures ----
def test_the_same_scene_gives_the_same_pixels():
    assert draw_scene(SCENE).tobytes() == draw_scene(SCENE).tobytes()
    assert [random_scene(random.Random(7)) for _ in range(2)] == [random_scene(random.Random(7))] * 2


def test_a_large_picture_made_small_is_the_small_picture():
    for scene in scenes(10):
        large = np.asarray(draw_scene(scene, 480).reduce(5), int)
        small = np.asarray(draw_scene(scene, 96), int)
        assert np.abs(large - small).mean() < 2.5


def test_every_thing_and_sign_fills_its_box_tightly():
    """Without the background, what is left of one thing reaches all four sides of its box, not beyond."""
    for scene in scenes(60):
        empty = np.asarray(draw_scene(Scene(scene.background, ()), 200), int)
        for part in scene.parts:
            alone = Scene(scene.background, (), part)
            if isinstance(part, Thing):
                alone = Scene(scene.background, (part,))
            differs = np.abs(np.asarray(draw_scene(alone, 200), int) - empty).max(2) > 20
            ys, xs = np.nonzero(differs)
            found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(found - 200 * np.array(part.box)).max() <= 2.5, (part, found)


def test_a_thing_shows_its_color_more_than_any_other():
    every = scenes(100) + scenes(50, held_out=True)
    colors = np.array([ImageColor.getrgb(code) for code in COLORS.values()])
    for thing in (thing for scene in every for thing in scene.things):
        x1, y1, x2, y2 = (round(96 * v) for v in thing.box)
        picture = draw_scene(Scene("snow", (thing,)))
        empty = np.asarray(draw_scene(Scene("snow", ())), int)[y1:y2, x1:x2]
        patch = np.asarray(picture, int)[y1:y2, x1:x2]
        pixels = patch[np.abs(patch - empty).max(2) > 8]
        nearest = np.abs(pixels[:, None] - colors).sum(2)
        shown = Counter(nearest.argmin(1)[nearest.min(1) < 60])  # shades and details count for nobody
        assert list(COLORS)[shown.most_common(1)[0][0]] == thing.color, thing


def test_every_letter_of_every_word_can_be_drawn():
    assert set("".join(toyworld.WORDS)) <= set(toyworld.LETTERS)


# ---- scenes ----
def test_unseen_pairs_are_never_in_training_and_always_in_validation():
    def pairs(scene):
        return {(thing.kind, thing.color) for thing in scene.things}

    assert not any(pairs(scene) & UNSEEN for scene in scenes(2000))
    assert all(pairs(scene) & UNSEEN for scene in scenes(500, held_out=True))
    assert sorted(kind for kind, _ in UNSEEN) == sorted(KINDS)
    assert sorted(color for _, color in UNSEEN) == sorted(COLORS)


def test_training_questions_never_name_an_unseen_pair():
    for _, _, question, _ in asked(300):
        assert not any(f"{color} {kind} " in question for kind, color in UNSEEN), question


def test_boxes_are_on_the_grid_inside_disjoint_and_where_their_place_says():
    for scene in scenes(500) + scenes(100, held_out=True):
        assert 1 <= len(scene.things) <= 4
        assert len({part.place for part in scene.parts}) == len(scene.parts)
        assert len({(thing.kind, thing.color) for thing in scene.things}) == len(scene.things)
        for i, part in enumerate(scene.parts):
            x1, y1, x2, y2 = part.box
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            assert all(v == float(f"{v:.2f}") and round(v * 20) / 20 == v for v in part.box)
            assert PLACES[int((y1 + y2) / 2 * 3) * 3 + int((x1 + x2) / 2 * 3)] == part.place
            for a1, b1, a2, b2 in (other.box for other in scene.parts[:i]):
                assert a2 <= x1 or x2 <= a1 or b2 <= y1 or y2 <= b1
        places = [PLACES.index(part.place) for part in scene.parts]
        assert places == sorted(places)


# ---- text and answers ----
def test_caption_and_description_read_like_this():
    assert caption(SCENE) == "A red cat, an orange ball and a sign that says OPEN."
    assert caption(Scene("meadow", (CAT,))) == "A red cat."
    assert describe(SCENE) == (
        "a big red cat at the top left [0.05, 0.05, 0.35, 0.35]; a small orange ball at the right "
        "[0.70, 0.40, 0.90, 0.60]; a sign at the bottom that says OPEN [0.30, 0.75, 0.70, 0.95]"
    )
    assert describe(SCENE, boxes=False).endswith("; a sign at the bottom that says OPEN")


def parse(text):
    """An independent reading of describe(): [(kind, color, size, place, box)] and the sign's word or None."""
    parts = re.findall(r"a (big|small) (\w+) (\w+) (?:at|in) the ([a-z ]+) \[([^]]*)\]", text)
    sign = re.findall(r"that says (\w+)", text)
    return [(k, c, s, p, [float(v) for v in b.split(",")]) for s, c, k, p, b in parts], (sign or [None])[0]


def named(things, phrase):
    """The things a phrase such as 'red cat', 'cat at the top left' or 'cats' can mean."""
    words, _, place = re.sub(r" (at|in) the ", "@", phrase).partition("@")
    singular = lambda w: w if w == "fish" else w.removesuffix("s")
    words = [singular(w) for w in words.split()]
    return [t for t in things if all(w in (t[0], t[1], "thing") for w in words) and place in ("", t[3])]


def answer_of(text, question):
    """What a reader of the description alone would answer; None for questions this reader does not know."""
    things, word = parse(text)

    def one(phrase):
        assert len(named(things, phrase)) == 1, f"{phrase} is not one thing: {text}"
        return named(things, phrase)[0]

    maybe = "Unanswerable" in question
    q = question.split("Question:\n\n")[-1].split("\n")[0]
    if m := re.fullmatch(r"Is there an? (.*) in the image\?", q):
        return "yes" if named(things, m[1]) else "no"
    if m := re.fullmatch(r"How many (.*) and (.*) are there together\?", q):
        return str(len(named(things, m[1])) + len(named(things, m[2])))
    if m := re.fullmatch(r"How many more (.*) than (.*) are there\?", q):
        return str(len(named(things, m[1])) - len(named(things, m[2])))
    if m := re.fullmatch(r"How many (.*) are there\?", q):
        return str(len(named(things, m[1])))
    if q.startswith("How many legs"):
        return str(sum({"cat": 4, "bird": 2}.get(t[0], 0) for t in things))
    if m := re.search(r"if every (\w+) thing", q):
        return str(sum(t[1] != m[1] for t in things))
    if q == "What word is on the sign?":
        return word or "Unanswerable"
    if m := re.fullmatch(r"What color is the (.*)\?", q):
        return "Unanswerable" if maybe and not named(things, m[1]) else one(m[1])[1]
    if m := re.fullmatch(r"Is the (.*) small or big\?", q):
        return "Unanswerable" if maybe and not named(things, m[1]) else one(m[1])[2]
    if m := re.fullmatch(r"What is the thing (?:at|in) the (.*)\?", q):
        return next(t[0] for t in things if t[3] == m[1])
    if m := re.fullmatch(r"Where is the (.*)\?", q):
        return one(m[1])[3]
    if m := re.fullmatch(r"Is the (.*) (above|below|to the left of|to the right of) the (.*)\?", q):
        middle = lambda t, axis: (t[4][axis] + t[4][axis + 2]) / 2
        axis = 0 if m[2].startswith("to") else 1
        gap = middle(one(m[1]), axis) - middle(one(m[3]), axis)
        assert abs(gap) > 0.19, "too close to call"
        return "yes" if (gap < 0) == (m[2] in ("above", "to the left of")) else "no"
    if m := re.search(r"describes: the (.*)\.$", question):
        return "[" + ", ".join(f"{v:.2f}" for v in one(m[1])[4]) + "]"


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_can_be_worked_out_again_from_the_description(held_out):
    known = Counter()
    for scene, category, question, answer in asked(150, held_out):
        if category == "caption":
            assert answer == caption(scene)
            continue
        expected = answer_of(describe(scene), question)
        assert expected is not None, question
        if category == "choice":
            choices = dict(re.findall(r"^([A-D])\. (.*)$", question, re.M))
            assert len(set(choices.values())) == 4
            answer = choices[answer]
        if category == "cot":
            assert "\nFinal answer: " in answer
            for left, right in re.findall(r"([\d +-]+) = (\d+)\.", answer):
                terms = re.findall(r"[+-]?\d+", left.replace(" ", ""))
                assert sum(map(int, terms)) == int(right), answer
            answer = answer.split("Final answer: ")[1]
        assert answer == expected, (describe(scene), question, answer)
        known[category] += 1
    assert len(known) == 10


def test_no_question_tells_its_own_answer():
    for _, category, question, answer in asked(150):
        if category in ("attribute", "unanswerable") and answer in COLORS:
            assert answer not in question.split("\n")[0]


def test_format_prompts_are_attached():
    other = {"caption": toyworld.CAPTION, "choice": LETTER, "box": ".", "cot": "?"}
    for _, category, question, _ in asked(20):
        assert question.endswith(other.get(category, SHORT))
        assert (INSUFFICIENT in question) == (category == "unanswerable")


def test_who_guesses_blindly_does_badly():
    bound = {
        "existence": 0.55,
        "spatial": 0.55,
        "unanswerable": 0.55,
        "count": 0.3,
        "choice": 0.3,
        "reasoning": 0.3,
        "cot": 0.3,
        "attribute": 0.25,
        "reading": 0.15,
        "caption": 0.05,
        "box": 0.05,
    }
    answers = defaultdict(Counter)
    for _, category, _, answer in asked(400):
        answers[category][answer.split("Final answer: ")[-1]] += 1
    assert set(answers) == set(toyworld.ASK)
    for category, counter in answers.items():
        _, most = counter.most_common(1)[0]
        assert most / counter.total() < bound[category], (category, counter.most_common(3))


def test_chat_asks_without_a_format_prompt_and_answers_in_a_true_sentence():
    said = dict(toyworld.ask_chat(toyworld.HELLO, random.Random(i)) for i in range(3000))
    for question in toyworld.LOOK:
        assert said[question] == "A blue ball, a red cat and a sign that says EXIT."
    true = {
        "Where is the ball?": "It is at the top right.",
        "Where is the sign?": "It is at the bottom right.",
        "What color is the cat?": "It is red.",
        "Is the cat small or big?": "It is big.",
        "How many cats are there?": "There is 1 cat.",
        "How many trees are there?": "There are no trees.",
        "What is at the left?": "It is a red cat.",
        "What is at the bottom right?": "It is a sign that says EXIT.",
        "What is at the bottom?": "There is nothing.",
        "What does the sign say?": "It says EXIT.",
        "Is there a red cat?": "Yes.",
        "Is there a fish?": "No.",
        "Is the cat to the left of the ball?": "Yes.",
        "Is the cat above the ball?": "No.",
    }
    assert {question: said.get(question) for question in true} == true
    signless = Scene("snow", (CAT,))
    signless = dict(toyworld.ask_chat(signless, random.Random(i)) for i in range(300))
    assert {signless[question] for question in signless if "sign" in question} == {"There is no sign."}


# ---- files ----
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "toyworld"
    toyworld.write_world(out, n_train=30, n_val=60, size=96, seed=0)
    return out


def test_files_have_the_formats_of_llava(world):
    train = json.loads((world / "train.json").read_text())
    pretrain = json.loads((world / "pretrain.json").read_text())
    assert len(train) == len(pretrain) == 30
    for record in train + pretrain:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert "".join(turn["value"] for turn in turns).count("<image>") == 1
        assert Image.open(world / record["image"]).size == (96, 96)
    assert all(14 <= len(record["conversations"]) < 22 for record in train)
    assert all(len(record["conversations"]) == 2 for record in pretrain)
    assert len({record["id"] for record in train + pretrain}) == 60


def test_validation_has_as_many_questions_of_each_category(world):
    lines = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()]
    counter = Counter(line["category"] for line in lines)
    assert set(counter) == set(toyworld.CATEGORIES)
    assert counter.pop("reading") > 9                    # as many as there are signs
    assert set(counter.values()) == {18}
    assert len({line["question_id"] for line in lines}) == len(lines)
    for line in lines:
        assert set(line) == {"question_id", "image", "text", "answer", "category"}
        assert (world / line["image"]).is_file() and "<image>" not in line["text"]
    yes = [line["answer"] for line in lines if line["category"] in ("existence", "spatial")]
    assert yes.count("yes") == yes.count("no")


def test_the_same_seed_writes_the_same_world_and_a_finished_world_is_left_alone(world, tmp_path, capsys):
    toyworld.write_world(tmp_path / "again", 30, 60, 96, 0)
    for path in sorted(p for p in world.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(world)).read_bytes()
    toyworld.write_world(world, 30, 60, 96, 0)
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="not this world"):
        toyworld.write_world(world, 30, 60, 96, seed=1)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(made, limit):
        raise KeyboardInterrupt

    monkeypatch.setattr(toyworld, "pick_val", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toyworld.write_world(tmp_path / "toyworld", 4, 2)
    assert os.listdir(tmp_path) == []


def run(*flags, **kwargs):
    program = Path(toyworld.__file__)
    return subprocess.run(
        [sys.executable, program, *map(str, flags)], capture_output=True, text=True, **kwargs
    )


def test_errors_are_one_line_without_traceback(tmp_path):
    (tmp_path / "file").write_text("in the way")
    taken = run("--out", tmp_path / "file", "--train", 2, "--val", 2)
    nowhere = run("--out", tmp_path / "file" / "toyworld", "--train", 2, "--val", 2)
    full = run(
        "--out", tmp_path / "full", "--train", 200, "--val", 2, preexec_fn=file_size_limit
    )  # as on a full disk
    for result in (taken, nowhere, full):
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert os.listdir(tmp_path) == ["file"]
    assert "did you mean --seed?" in run("--sed", 3).stderr


def file_size_limit():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # pictures fit, train.json does not


def test_hello_writes_one_picture_and_another_with_a_seed(tmp_path):
    pictures = set()
    for seed in (0, 0, 1, 2):
        assert run("--hello", tmp_path / "cat.png", "--seed", seed).returncode == 0
        image = Image.open(tmp_path / "cat.png")
        assert image.size == (480, 480)
        pictures.add(image.tobytes())
    assert len(pictures) == 3


def test_a_drawing_process_that_is_killed_ends_in_one_line(tmp_path, monkeypatch):
    me = os.getpid()
    picture = toyworld.random_scene
    monkeypatch.setattr(toyworld, "random_scene", lambda *args, **flags: (
        os.getpid() != me and os.kill(os.getpid(), signal.SIGKILL), picture(*args, **flags))[1])
    with pytest.raises(UserError, match="could not be drawn"):
        toyworld.write_world(tmp_path / "world", 40, 2, 32)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_are_no_forks_draw_the_same_world(tmp_path, world):
    """As on Windows and macOS."""
    code = f"""
        import multiprocessing, toyworld
        multiprocessing.set_start_method("spawn")
        toyworld.write_world({str(tmp_path / "world")!r}, 30, 60, 96, 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(toyworld.__file__).parent)
    assert done.returncode == 0
    assert (tmp_path / "world/val.jsonl").read_text() == (world / "val.jsonl").read_text()


def test_a_torn_world_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world/world.json").write_text('{"version": 4, "tra')
    with pytest.raises(UserError, match="world.json: damaged"):
        toyworld.write_world(tmp_path / "world", 2, 2)


# ---- tokenizer ----
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, sayings(), 896, required=",]")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_tokenizer_is_laid_out_like_llamas(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in (0, 1, 2, 3, 258)]
    assert pieces == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.pad_id() == -1


def test_tokenizer_round_trips_any_text(tokenizer):
    for text in (
        "A cat.\n\nB  two spaces",
        " leading",
        "Größe 猫 \U0001f431 ~{}",
        COT + "How many?",
        describe(SCENE),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_word_of_a_question_with_its_format_prompt_is_one_piece_and_every_box_eight(tokenizer):
    train = [text for _, _, *pair in asked(60) for text in pair] + [describe(scene) for scene in scenes(30)]
    lists = [*KINDS, *COLORS, *PLACES, *toyworld.SIZES, *toyworld.WORDS, *BRIEF]
    lists += [SYSTEM_VICUNA, "USER ASSISTANT"]
    words = {word for text in train + lists for word in re.findall("[A-Za-z]+", text)}
    assert [w for w in words if len(tokenizer.encode(w)) > 1] == []
    for x in range(21):
        assert len(tokenizer.encode(toyworld.coordinates([x / 20] * 4))) == 8


def test_training_the_tokenizer_twice_gives_the_same_file(tmp_path):
    train_tokenizer(tmp_path / "a", sayings(300), 896)
    train_tokenizer(tmp_path / "b", sayings(300), 896)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
