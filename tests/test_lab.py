"""The toy's parts: what they are taught is true, and holds nothing that only held-out pictures may show."""

import itertools
import json
import math
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from common import ROOT
from layouts import features_of
from PIL import Image, ImageColor

import lab.run
import lab.vicuna
import mpo
import pairs
import toyworld
import train
from benchmarks.common import COT, INSUFFICIENT, LETTER, SHORT
from lab.base import make_statements, make_text
from lab.clip import FALSE, TRUE, UNTOLD, contrastive_batch, contrastive_loss, holds
from lab.common import (
    NOTHING,
    UNKNOWN,
    UNSURE,
    Fact,
    draw_pixels,
    held_out_scenes,
    label_patches,
    look_through,
    patch_owners,
    repaint,
    scene_facts,
    spell,
)
from lab.connector import kinds_told
from lab.dino import Sorter, cross_entropy, follow, sinkhorn, sorting_loss, two_windows
from lab.experiments import EXPERIMENTS, FILES, MEASURES, add_text, measure, scene_of, widen_pictures
from lab.ingredients import IngredientsConfig
from lab.ingredients import main as make_parts
from lab.losses import LossConfig
from lab.run import CLAIM
from lab.vicuna import make_lesson, plain_lesson, terse_pairs
from model import IGNORE, PRESETS
from support.cli import UserError, parse
from support.io import write_text
from support.start import ASSETS, build
from support.weights import load_vision, read_tower
from toyworld import COLORS, KINDS, UNSEEN, Scene, Sign, Thing
from vision import ViT, cut_tiles, join_tiles

CAT = Thing("cat", "red", "big", "top left", (0.0, 0.0, 0.25, 0.25))              # 2 x 2 of the 8 x 8 patches
SCENE = Scene("meadow", (CAT,), Sign("OPEN", "bottom", (0.25, 0.75, 0.75, 1.0)))  # 4 x 2


def test_a_spelled_picture_tells_of_each_patch_its_column_its_row_and_what_it_shows(tok):
    words = [{tok.decode([i]).strip() for i in ids if i >= 0} for ids in spell(SCENE, tok)]
    assert words[0] == {"a", "1", "cat", "red", "big", "top", "left"}
    assert words[9] == {"b", "2", "cat", "red", "big", "top", "left"}
    assert words[2] == {"c", "1"}
    assert words[63] == {"h", "8"}
    assert words[8 * 6 + 2] == {"c", "7", "sign", "OPEN", "bottom"}
    assert sum("sign" in some for some in words) == 8


def test_a_lesson_is_terse_bare_or_a_conversation_about_a_spelled_picture(tok):
    forms = set()
    for i, progress in itertools.product(range(30), (0.1, 0.25, 0.4, 0.9)):
        tokens, labels, spelled = make_lesson(tok, random.Random(f"{i} {progress}"), progress)
        assert len(tokens) == len(labels)
        assert len(spelled) == tokens.count(tok.image) == 64
        assert any(label != IGNORE for label in labels)

        tokens, _, _ = plain_lesson(tok, random.Random(f"{i} {progress}"), progress)
        text = tok.decode([token for token in tokens if token < tok.n_text])
        forms.add("conversation" if "USER:" in text else "terse" if "how many" in text else "bare")
    assert forms == {"conversation", "terse", "bare"}


def test_words_that_stand_for_a_kind_or_a_color_do_so_in_the_picture_and_in_what_is_said(tok):
    n_renamed = 0
    for i in range(40):
        tokens, labels, spelled = plain_lesson(tok, random.Random(i), 0.9)
        new_tokens, new_labels, new_spelled = make_lesson(tok, random.Random(i), 0.9)
        pairs = {*zip(tokens, new_tokens), *zip(labels, new_labels)}
        for old, new in zip(spelled, new_spelled):
            pairs |= {*zip(old, new)}
        assert len({old for old, _ in pairs}) == len(pairs)      # each word by one other, everywhere

        changed = [pair for pair in pairs if pair[0] != pair[1]]
        before = {tok.decode([old]).strip() for old, _ in changed}
        after = {tok.decode([new]).strip() for _, new in changed}
        assert before <= {*COLORS, *KINDS, *map(toyworld.plural, KINDS)}
        assert not after & {*COLORS, *KINDS}
        n_renamed += bool(changed)
    assert 5 < n_renamed < 35


def test_terse_questions_have_the_true_answer():
    black_cat = Thing("cat", "black", "small", "right", (0.7, 0.4, 0.9, 0.6))
    two = Scene("snow", (CAT, black_cat), SCENE.sign)
    pairs = terse_pairs(two, random.Random(0))
    answers = dict(pairs)
    expected = {
        "first": "red cat",
        "after red cat": "black cat",
        "after black cat": "OPEN",
        "after OPEN": "none",
        "how many cat": "2",
        "size red cat": "big",
        "place black cat": "right",
        "thing top left": "cat",
        "sign": "OPEN",
        "any red cat": "yes",
        "all": toyworld.caption(two),
    }
    assert {question: answers[question] for question in expected} == expected

    # Of each thing the letter of the right option, then of a given word: the last one, after its list.
    letters = [(question, answer) for question, answer in pairs if answer in "ABCD"]
    assert len(letters) == 4
    for question, letter in letters[1::2]:
        word = question.split()[-1]
        option = re.search(rf"{letter}\. ([\w ]+?)(?= [A-D]\.| {word}$)", question)[1]
        assert question.endswith(option)


def test_toy_base_reads_no_question_no_template_and_no_format_prompt(tok):
    prompts = (SHORT, LETTER, INSUFFICIENT, COT, toyworld.BOX, toyworld.CAPTION, toyworld.DETAIL)
    for i, progress in itertools.product(range(150), (0.0, 0.9)):
        tokens, labels, spelled = make_text(tok, random.Random(i), progress)
        assert tokens[: 1 + 64] == [tok.bos] + [tok.image] * 64
        assert labels == [IGNORE] * 65 + tokens[65:]             # all of the text is supervised
        assert len(spelled) == 64
        text = tok.decode(tokens)
        assert not any(prompt.strip() in text for prompt in prompts)
        assert not re.search(r"\?|[Hh]ow many|USER:|ASSISTANT:|In:|Out:|Final answer:|\b[A-D]\.", text)


def named(phrase, scene):
    """The things that a phrase means: "the red cat", "fish", "a sign at the left that says OPEN", ..."""
    written = re.findall(r"that says (\w+)", phrase)
    phrase = re.sub(r" that says \w+| besides the sign", "", phrase).lower()
    phrase, _, place = re.sub(r"\b(at|in) the ", "|", phrase).partition("|")
    singular = {toyworld.plural(kind): kind for kind in KINDS}
    words = {singular.get(word, word) for word in phrase.split()} | set(written)
    words -= {"a", "an", "the", "thing", "things"}
    parts = [(thing.place, {thing.kind, thing.color, thing.size}, thing) for thing in scene.things]
    if scene.sign and (place or "sign" in words):
        parts.append((scene.sign.place, {"sign", scene.sign.word}, scene.sign))
    return [part for at, said, part in parts if words <= said and place in ("", at)]


def stands(a, words, b, scene):
    (a,), (b,) = named(a, scene), named(b, scene)
    x = a.box[0] + a.box[2] - b.box[0] - b.box[2]
    y = a.box[1] + a.box[3] - b.box[1] - b.box[3]
    return {"to the left of": x < 0, "to the right of": x > 0, "above": y < 0, "below": y > 0}[words]


def one_by_one(scene):
    return [[part] for part in scene.parts]


SENTENCES = {                        # what a sentence of toy-base says, and whether that is true of a scene
    r"(An? .+) is in the image": lambda scene, a: named(a, scene),
    r"(An? .+) is not in the image": lambda scene, a: not named(a, scene),
    r"That (.+) is (to the \w+ of|above|below) (.+) is so": lambda scene, *said: stands(*said, scene),
    r"That (.+) is (to the \w+ of|above|below) (.+) is not so":
        lambda scene, *said: not stands(*said, scene),
    r"Of (.+) there are (\d)": lambda scene, a, n: len(named(a, scene)) == int(n),
    r"There (?:is|are) no (.+)": lambda scene, a: not named(a, scene),
    r"There (?:is|are) (\d) (.+)": lambda scene, n, a: len(named(a, scene)) == int(n),
    r"(\d) things? (?:is|are) (\w+)": lambda scene, n, color: len(named(color, scene)) == int(n),
    r"(\d) (\w+) (?:has|have) (\d+) legs":
        lambda scene, n, a, legs: sum(toyworld.LEGS[thing.kind] for thing in named(a, scene)) == int(legs),
    r"([\d +-]+) = (\d+)": lambda scene, left, right: eval(left) == int(right),
    r"The region of (.+) is (\[.+\])":
        lambda scene, a, box: [list(x.box) for x in named(a, scene)] == [json.loads(box)],
    r"The color of (.+) is (\w+)": lambda scene, a, color: [x.color for x in named(a, scene)] == [color],
    r"The sign says (\w+)": lambda scene, word: scene.sign.word == word,
    r"(The .+) can be found (.+)":
        lambda scene, a, place: named(a, scene) == named(f"{a} {place}", scene) != [],
    r"(The .+) is (?:a )?(\w+)(?: one)?": lambda scene, a, b: named(a, scene) == named(f"{b} {a}", scene) != [],
    r"((?:At|In) the .+) is no thing": lambda scene, place: not named(f"thing {place}", scene),
    r"((?:At|In) the .+) is (an? .+)": lambda scene, place, a: named(f"{a} {place}", scene),
    r"(?:The picture has )?(an? .+)":
        lambda scene, all_of: [named(a, scene) for a in re.split("; |, | and ", all_of)] == one_by_one(scene),
}


def is_true(text, scene):
    for sentence in text.replace("|", "").removesuffix(".").split(". "):
        found = (re.fullmatch(pattern, sentence, re.IGNORECASE) for pattern in SENTENCES)
        match = next(filter(None, found))
        if not SENTENCES[match.re.pattern](scene, *match.groups()):
            return False
    return True


def test_every_statement_that_toy_base_reads_is_true():
    for i in range(300):
        rng = random.Random(i)
        scene = toyworld.random_scene(rng, held_out=i % 4 == 0)
        for _, text in make_statements(scene, rng):
            assert is_true(text, scene), text


BIG_RED_CAT = Fact("big", "red", "cat", "top left", None)
SOMETHING = Fact(None, None, None, None, None)


@pytest.mark.parametrize("said, truth", [
    ({"color": "red", "kind": "cat"}, TRUE),
    ({"place": "top left"}, TRUE),
    ({"color": "red", "kind": "dog"}, FALSE),
    ({"size": "small", "color": "red", "kind": "cat"}, FALSE),
    ({"kind": "fish"}, UNTOLD),                                  # a red fish is never drawn in training
    ({"color": "blue"}, UNTOLD),                                 # nor a blue cat
])
def test_a_phrase_is_true_false_or_left_untold_of_a_thing(said, truth):
    assert holds(SOMETHING._replace(**said), BIG_RED_CAT) == truth


@pytest.mark.parametrize("said, truth", [
    ({"kind": "cat"}, TRUE),
    ({"kind": "dog"}, FALSE),
    ({"color": "red", "kind": "cat"}, UNTOLD),
    ({"size": "small", "color": "red"}, FALSE),
])
def test_of_a_thing_in_a_nameless_paint_no_color_is_true_or_false(said, truth):
    fact, = scene_facts(Scene("meadow", (repaint(CAT, random.Random(0)),)))
    assert fact == BIG_RED_CAT._replace(color=UNKNOWN)
    assert holds(SOMETHING._replace(**said), fact) == truth


@pytest.mark.parametrize("said, truth", [
    ({"kind": "cat", "color": "red"}, TRUE),
    ({"kind": "cat", "size": "small"}, UNTOLD),
    ({"place": "bottom"}, UNTOLD),
    ({"kind": "dog", "size": "small"}, FALSE),
])
def test_a_part_of_a_picture_does_not_tell_how_large_things_are_or_where(said, truth):
    scene = look_through(Scene("meadow", (CAT,)), (0.0, 0.0, 0.5))
    fact, = scene_facts(scene)
    assert holds(SOMETHING._replace(**said), fact) == truth
    assert scene.things[0].box == tuple(2 * v for v in CAT.box)


def test_a_window_shows_that_part_of_the_drawing_larger():
    seen = draw_pixels([SCENE], windows=[(0.25, 0.5, 0.5)])
    part = toyworld.draw_scene(SCENE, 192).crop((48, 96, 144, 192))
    assert torch.equal(seen, cut_tiles(part, PRESETS["toy"].vision, "pad")[0])


def test_half_a_sign_tells_no_word():
    cut, whole = (look_through(SCENE, (0.0, top, 0.8)) for top in (0.0, 0.2))
    assert scene_facts(cut)[1].word == UNKNOWN
    assert scene_facts(whole)[1].word == "OPEN"


def test_no_paint_comes_near_the_color_of_an_unseen_pair():
    rng = random.Random(0)
    for kind, color in sorted(UNSEEN):
        unseen = ImageColor.getrgb(COLORS[color])
        thing = Thing(kind, "red", "big", "top", (0, 0, 1, 1))
        paints = [ImageColor.getrgb(repaint(thing, rng).color) for _ in range(300)]
        distances = [sum(abs(a - b) for a, b in zip(paint, unseen)) for paint in paints]
        assert min(distances) >= 110
        assert max(map(min, paints)) > 150                       # yet there are pale ones
        assert min(map(max, paints)) < 110                       # and dark ones


def test_the_contrastive_loss_equals_a_number_worked_out_by_hand():
    s = torch.tensor([[2.0, 0.0, 1.0]])                          # one patch, three texts
    loss = contrastive_loss(s, torch.tensor([[TRUE, FALSE, UNTOLD]]))
    with_texts = math.log(math.exp(2) + math.exp(0)) - 2         # the untold one counts nowhere
    with_patches = 0                                             # there is no other to be wrong
    assert loss.item() == pytest.approx(with_texts + with_patches, abs=1e-6)


def test_a_patch_belongs_to_what_covers_most_of_it():
    owners = torch.tensor(patch_owners(SCENE)).view(8, 8)
    assert (owners[:2, :2] == 0).all()
    assert (owners[6:, 2:6] == 1).all()
    assert (owners == NOTHING).sum() == 64 - 4 - 8
    for share, owner in (0.3, 0), (0.2, UNSURE), (0.01, NOTHING):
        cat = Thing("cat", "red", "big", "top left", (0.0, 0.0, (1 + share) / 8, 1 / 8))
        assert patch_owners(Scene("meadow", (cat,)))[:2] == [0, owner]


def test_a_patch_is_labelled_with_what_its_thing_has_of_the_values():
    kinds, = label_patches([SCENE], "kind").view(1, 8, 8)
    assert (kinds[:2, :2] == KINDS.index("cat")).all()
    assert (kinds >= 0).sum() == 4                               # a sign is none of the kinds
    words, = label_patches([SCENE], "word").view(1, 8, 8)
    assert (words[6:, 2:6] == toyworld.WORDS.index("OPEN")).all()


@pytest.mark.parametrize("parts, in_four", [("", (0.2, 0.5)), ("-tiles", (0.6, 0.9))])
def test_patches_tell_the_kind_in_one_tile_and_in_four_if_the_tower_has_met_parts_of_scenes(parts, in_four):
    own = ["--vision", f"{ASSETS}/toy-clip{parts}", "--projector", f"{ASSETS}/toy-connector{parts}"]
    scenes = held_out_scenes(8)

    @torch.no_grad()
    def share_told(flags):
        vlm, tok = build(train.parse_flags(own + flags))
        pictures = [toyworld.draw_scene(scene, 192) for scene in scenes]
        cut = [cut_tiles(picture, vlm.cfg.vision, vlm.cfg.image_mode) for picture in pictures]
        tiles, layout = join_tiles(cut)
        visual = vlm.connector(vlm.vision(tiles), layout)[layout[:, 0] >= 0]     # of patches, not of row ends
        return kinds_told(vlm, tok, scenes, visual.view(len(scenes), -1, visual.shape[1]))

    assert share_told([]) > 0.9
    assert in_four[0] < share_told(["--image-mode", "hd", "--global-view", "none"]) < in_four[1]


def test_contrastive_batches_name_no_unseen_pair_and_hold_as_many_empty_patches_as_full_ones():
    pixels, whole, captions, texts, patches, holding = contrastive_batch(random.Random(0), 6, parts=0.0)
    assert pixels.shape == (6, 3, 96, 96)
    assert len(captions) == len(whole) == 6
    assert holding.shape == (len(patches), len(texts))
    names = [f"{color} {kind}" for kind, color in UNSEEN]
    assert not any(name in text for name in names for text in texts + captions)
    assert (holding == TRUE).any(1).all()
    assert texts[-1] == "a picture of nothing"
    assert (holding[:, -1] == TRUE).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_only_a_picture_that_shows_all_of_its_scene_has_a_caption():
    _, whole, captions, *_ = contrastive_batch(random.Random(0), 12, parts=0.5)
    assert 0 < len(captions) == len(whole) < 12


def test_one_part_can_be_made_over_the_others(tok, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.clip, "words_found", lambda *_: {"kind": 0.5})
    (tmp_path / "toy-vicuna").mkdir()
    (tmp_path / "toy-vicuna/tokenizer.model").write_bytes(tok.path.read_bytes())
    make_parts(["--only", "clip", "--steps", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"toy-vicuna", "toy-clip"}
    assert "toy-clip, step 1: loss" in capsys.readouterr().out


def test_toy_dino_learns_from_pixels_alone():
    pixels = two_windows(random.Random(0), 2)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (4, 3, 96, 96)                        # two pictures, then both through another window

    student, teacher = Sorter(), Sorter().requires_grad_(False)
    sorting_loss(student, teacher, pixels).backward()
    assert all(p.grad is not None for p in student.vit.blocks.parameters())
    assert all(p.grad is None for p in teacher.parameters())     # it is not taught to agree


def test_a_student_and_a_teacher_who_always_say_the_same_gain_nothing():
    always_the_third = torch.zeros(64, 8)
    always_the_third[:, 3] = 1.0
    q = sinkhorn(always_the_third)
    assert torch.allclose(q, torch.full_like(q, 1 / 8))          # each prototype for as many

    different = torch.randn(64, 8) * 0.02
    q = sinkhorn(different)
    assert torch.allclose(q.sum(1), torch.ones(64))
    assert torch.allclose(q.sum(0), torch.full((8,), 64 / 8), atol=1)
    assert cross_entropy(q, always_the_third) > math.log(8) > cross_entropy(q, different)


def test_a_student_does_not_see_masked_patches_but_knows_where_they_are():
    pixels = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    changed = pixels.clone()
    changed[:, :, :12, :24] = 0                                  # the first two of 8 x 8 patches
    masked = torch.zeros(1, 64, dtype=torch.bool)
    student = Sorter()
    assert not torch.equal(student(pixels, masked)[1], student(changed, masked)[1])
    masked[:, :2] = True
    _, z = student(pixels, masked)
    assert torch.equal(z, student(changed, masked)[1])
    assert not torch.allclose(z[0, 0], z[0, 1])


def test_the_teacher_goes_a_share_of_the_way_to_the_student():
    student, teacher = Sorter(), Sorter().requires_grad_(False)
    student.mask_token.data.fill_(1.0)
    for share, expected in (0.25, 0.25), (0.5, 0.625):
        follow(teacher, student, share)
        assert teacher.mask_token.unique().item() == expected


def test_toy_dino_opens_as_a_dinov2_of_transformers_and_as_a_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.dino, "probe", lambda vit: {"kind": 0.5})
    lab.dino.make_dino(tmp_path / "toy-dino", None, IngredientsConfig(steps=2))
    cfg = read_tower(tmp_path / "toy-dino")
    assert cfg == lab.dino.TOWER
    tower = ViT(cfg)
    load_vision(tower, tmp_path / "toy-dino")
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path / "toy-dino", dtype=torch.float32)
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.allclose(tower(pixels), features_of(theirs, pixels), atol=1e-5)


def test_toy_base_is_written_with_its_tokenizer_where_llm_finds_it(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.vicuna, "answers_found", lambda *_: {"count": 0.5})
    (tmp_path / "toy-vicuna").mkdir()
    (tmp_path / "toy-vicuna/tokenizer.model").write_bytes(tok.path.read_bytes())
    make_parts(["--only", "base", "--steps", "2", "--out", str(tmp_path)])
    vlm, own = build(train.parse_flags(["--llm", str(tmp_path / "toy-base")]))
    assert own.path == tmp_path / "toy-base/tokenizer.model"
    assert vlm.decoder.cfg == build(train.parse_flags([]), device="meta")[0].decoder.cfg


# ---- experiments ----


PARSERS = {
    "train": train.parse_flags,
    "mpo": partial(parse, mpo.MPOConfig),
    "losses": partial(parse, LossConfig),
    "pairs": partial(parse, pairs.PairsConfig),
}


def test_every_experiment_has_rows_that_parse_and_claims_about_its_own_cells(tmp_path):
    for name, rows in EXPERIMENTS.items():
        page = (ROOT / f"results/{name}.md").read_text()
        columns, *cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
        assert [row for row, *_ in cells] == list(rows)
        assert set(columns) <= set(MEASURES)
        claims = list(CLAIM.finditer(page))
        assert claims
        for first, _, second in (claim.groups() for claim in claims):
            assert {first, second} <= {f"{row}, {column}" for row in rows for column in columns}
        for commands in rows.values():
            for k, command in enumerate(commands.split(" && ")):
                program, _, flags = command.partition(" ")
                flags = flags.format(*range(k), **{name: tmp_path / "data" for name in FILES})
                parse_flags = PARSERS[program]
                cfg = parse_flags([*flags.split(), "--out", "x"])
                assert cfg.data != ""                            # never a world drawn beside


def test_a_page_keeps_its_words_and_gets_a_table_and_a_verdict_on_each_claim(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", "results")
    scores = {"with prompts": [0.5, 0.6, 0.7], "without": [0.4, 0.5, 0.6]}
    runs = []

    def pretend_to_train(argv):
        flags = dict(zip(argv[::2], argv[1::2]))
        runs.append(flags)
        row = "without" if "bare" in flags["--data"] else "with prompts"
        score = scores[row][int(flags["--seed"])]
        records = [{"category": [name], "score": score, "answer": "red"} for name in ("count", "chat")]
        Path(flags["--out"]).mkdir(parents=True)
        (Path(flags["--out"]) / "results.json").write_text(json.dumps({"records": records}))
        return 0

    monkeypatch.setattr(train, "main", pretend_to_train)
    monkeypatch.setattr(lab.run, "make_file", lambda folder, name, quick: folder / f"{name}.json")
    Path("out/lab").mkdir(parents=True)
    for _ in range(2):                                           # the second time all is there
        assert lab.run.main(["formats"]) == 0
    assert len(runs) == 6
    page = Path("results/formats.md").read_text()
    assert "MME rises from 1,197.0 to 1,323.8" in page
    assert "of 3 seeds; 0 minutes in all" in page
    assert "| with prompts | 60.0% ± 10.0 |" in page
    assert "short answers: **shows** (+10.0, +10.0, +10.0 points by seed)" in page
    assert "in one word: **does not show** (+0.0, +0.0, +0.0 points by seed)" in page
    before = (ROOT / "results/formats.md").read_text()
    assert len(page.splitlines()) == len(before.splitlines())
    assert page.splitlines()[-1] == before.splitlines()[-1]
    assert Image.open("results/formats.png").width > 500


def test_the_list_of_experiments_has_papers_minutes_and_claims(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lab.run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == [
        "formats", "LLaVA-1.5 (arXiv:2310.03744v2), section 3.2 and Table 2; 6 minutes a seed"]
    assert lines[1].strip().startswith("- with prompts, short answers > without, short answers: **shows**")
    assert sum(line.endswith("minutes a seed") for line in lines) == len(EXPERIMENTS) == 17


def test_a_difference_is_what_all_seeds_agree_in():
    def verdict(sign, *gaps):
        results = {"a, all": [0.5 + gap for gap in gaps], "b, all": [0.5 for _ in gaps]}
        return lab.run.judge(results, CLAIM.match(f"- a, all {sign} b, all")).split("**")[1]

    assert verdict(">", 0.1, 0.2) == "shows"
    assert verdict(">", -0.1, -0.2) == "the contrary shows"
    assert verdict(">", 0.1, -0.2) == "does not show"
    assert verdict("=", 0.1, -0.2) == "no difference shows"
    assert verdict("=", 0.1, 0.2) == "does not show: the first is higher"
    assert verdict("=", -0.1, -0.2) == "does not show: the second is higher"
    assert verdict(">", 0.1) == "not to be told from one seed"


def test_preference_learning_runs_from_finetuning_to_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = ("before", "MPO")
    monkeypatch.setitem(EXPERIMENTS, "losses", {row: EXPERIMENTS["losses"][row] for row in two})
    page = "| | reasoning | cot |\n|---|---|---|\n| before |\n| MPO |\n\n- MPO, cot > before, cot\n"
    write_text(Path("results/losses.md"), page)
    assert lab.run.main(["losses", "--quick", "--seeds", "1"]) == 0
    page = Path("out/lab-quick/losses.md").read_text()
    assert "| MPO | " in page
    assert "not to be told from one seed" in page


def test_things_that_captions_make_up_are_counted_once_each():
    truth = 'A red cat and a sign that says OPEN.'
    answers = ["A red cat.", "A blue cat, a red cat and a sign that says EXIT."]
    records = [{"category": ["caption"], "answer": answer, "truth": truth} for answer in answers]
    assert measure("made up", records) == 2 / 4


def test_a_wide_picture_shows_the_scene_of_the_square_one(tmp_path):
    toyworld.write_world(tmp_path / "world", 1, 1)
    for path in sorted(tmp_path.glob("world/images/*.png")):
        assert toyworld.draw_scene(scene_of(path)).tobytes() == Image.open(path).tobytes()
    widen_pictures(tmp_path / "world")
    assert {Image.open(path).size for path in tmp_path.glob("world/images/*.png")} == {(144, 96)}


def test_a_text_only_record_has_the_description_in_place_of_the_picture():
    pairs = [("What color is the cat?", "red"), (toyworld.DETAIL, "a big red cat at the left")]
    kept, text = add_text(toyworld.llava_record("train-5", "5.png", pairs))
    assert kept["image"] == "5.png"
    assert "image" not in text
    values = [turn["value"] for turn in text["conversations"]]
    assert values == ["a big red cat at the left\nWhat color is the cat?", "red"]
    assert len(add_text(toyworld.llava_record("train-6", "6.png", pairs))) == 1


def test_a_run_that_does_not_finish_ends_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", "results")
    monkeypatch.setattr(train, "main", lambda argv: 130)
    with pytest.raises(UserError, match="not finished"):
        lab.run.main(["formats", "--quick"])


def test_a_linear_connector_is_one_flag(tmp_path):
    vlm, _ = build(train.parse_flags(["--connector", "linear"]), device="meta")
    assert len(vlm.connector.layers) == 1
