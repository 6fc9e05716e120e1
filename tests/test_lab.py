"""The toy's ingredients: what they are taught is true, and holds nothing that only held-out pictures may show."""
import itertools
import math
import random
import re

import pytest
import torch
from PIL import ImageColor

import lab.ingredients as lab
import toyworld
import train
from data import IGNORE
from lab.ingredients import FALSE, NOTHING, TRUE, UNTOLD
from toyworld import COLORS, KINDS, Scene, Sign, Thing, UNSEEN
import lab.ingredients as lab_ingredients

CAT = Thing("cat", "red", "big", "top left", (0.0, 0.0, 0.25, 0.25))                    # 2 x 2 of the 8 x 8 patches
SCENE = Scene("meadow", (CAT,), Sign("OPEN", "bottom", (0.25, 0.75, 0.75, 1.0)))        # 4 x 2


def test_a_spelled_picture_tells_of_each_patch_its_column_its_row_and_what_it_shows(tok):
    said = [{tok.decode([i]).strip() for i in ids if i >= 0} for ids in lab_ingredients.spell(SCENE, tok)]
    assert said[0] == {"a", "1", "cat", "red", "big", "top", "left"} and said[9] == {"b", "2", "cat", "red", "big", "top", "left"}
    assert said[2] == {"c", "1"} and said[63] == {"h", "8"}
    assert said[8 * 6 + 2] == {"c", "7", "sign", "OPEN", "bottom"} and sum("sign" in words for words in said) == 8


def test_a_lesson_is_terse_bare_or_a_conversation_about_a_spelled_picture(tok):
    forms = set()
    for i, progress in itertools.product(range(60), (0.1, 0.25, 0.4, 0.9)):
        tokens, labels, spelled = lab_ingredients.lesson(tok, random.Random(f"{i} {progress}"), progress)
        assert len(tokens) == len(labels) and len(spelled) == tokens.count(tok.image) == 64 and any(label != IGNORE for label in labels)
        text = tok.decode([id for id in lab_ingredients.plain_lesson(tok, random.Random(f"{i} {progress}"), progress)[0] if id < tok.n_text])
        forms.add("conversation" if "USER:" in text else "terse" if "how many" in text else "bare")
    assert forms == {"conversation", "terse", "bare"}


def test_words_that_stand_for_a_kind_or_a_color_do_so_in_the_picture_and_in_what_is_said(tok):
    renamed = 0
    for i in range(40):
        plain, lesson = lab_ingredients.plain_lesson(tok, random.Random(i), 0.9), lab_ingredients.lesson(tok, random.Random(i), 0.9)
        pairs = {(a, b) for before, after in zip((plain[0], plain[1], *plain[2]), (lesson[0], lesson[1], *lesson[2]), strict=True)
                 for a, b in zip(before, after, strict=True)}
        assert len({a for a, _ in pairs}) == len(pairs)                     # each word by one other, everywhere
        changed = {a: b for a, b in pairs if a != b}
        assert {tok.decode([a]).strip() for a in changed} <= {*COLORS, *KINDS, *(toyworld.plural(kind) for kind in KINDS)}
        assert not any(tok.decode([b]).strip() in {*COLORS, *KINDS} for b in changed.values())
        renamed += bool(changed)
    assert 5 < renamed < 35


def test_terse_questions_have_the_true_answer():
    two = Scene("snow", (CAT, Thing("cat", "black", "small", "right", (0.7, 0.4, 0.9, 0.6))), SCENE.sign)
    said = dict(lab_ingredients.terse(two, random.Random(0)))
    assert said["first"] == "red cat" and said["after red cat"] == "black cat" and said["after black cat"] == "OPEN" and said["after OPEN"] == "none"
    assert said["how many cat"] == "2" and said["size red cat"] == "big" and said["place black cat"] == "right" and said["thing top left"] == "cat"
    assert said["sign"] == "OPEN" and said["any red cat"] == "yes" and said["all"] == toyworld.caption(two)
    letters = [(question, answer) for question, answer in lab_ingredients.terse(two, random.Random(0)) if answer in "ABCD"]
    assert len(letters) == 4
    for question, letter in letters[1::2]:                                  # the word is the last one, after its list
        assert question.endswith(re.search(rf"{letter}\. ([\w ]+?)(?= [A-D]\.| {question.split()[-1]}$)", question)[1])


def test_a_phrase_is_true_false_or_left_untold_of_a_thing():
    fact = ("big", "red", "cat", "top left", None)
    assert lab_ingredients.holds((None, "red", "cat", None, None), fact) == lab_ingredients.holds((None, None, None, "top left", None), fact) == TRUE
    assert lab_ingredients.holds((None, "red", "dog", None, None), fact) == lab_ingredients.holds(("small", "red", "cat", None, None), fact) == FALSE
    assert lab_ingredients.holds((None, None, "fish", None, None), fact) == UNTOLD                 # a red fish is never drawn in training
    assert lab_ingredients.holds((None, "blue", None, None, None), fact) == UNTOLD                 # nor a blue cat


def test_of_a_thing_in_a_nameless_paint_no_color_is_true_or_false():
    fact = lab_ingredients.facts(Scene("meadow", (lab_ingredients.repaint(CAT, random.Random(0)),)))[0]
    assert fact == ("big", None, "cat", "top left", None)
    assert lab_ingredients.holds((None, None, "cat", None, None), fact) == TRUE and lab_ingredients.holds((None, None, "dog", None, None), fact) == FALSE
    assert lab_ingredients.holds((None, "red", "cat", None, None), fact) == UNTOLD and lab_ingredients.holds(("small", "red", None, None, None), fact) == FALSE


def test_no_paint_comes_near_the_color_of_an_unseen_pair():
    rng = random.Random(0)
    for kind, color in sorted(UNSEEN):
        paints = [ImageColor.getrgb(lab_ingredients.repaint(Thing(kind, "red", "big", "top", (0, 0, 1, 1)), rng).color) for _ in range(300)]
        assert min(sum(abs(a - b) for a, b in zip(paint, COLORS[color])) for paint in paints) >= 110
        assert max(map(min, paints)) > 150 and min(map(max, paints)) < 110             # yet there are pale ones and dark ones


def test_the_contrastive_loss_equals_a_number_worked_out_by_hand():
    s = torch.tensor([[2.0, 0.0, 1.0]])                                     # one patch, three texts: true, false, untold
    with_texts = math.log(math.exp(2) + math.exp(0)) - 2                    # the untold one counts nowhere
    assert lab_ingredients.contrastive_loss(s, torch.tensor([[TRUE, FALSE, UNTOLD]])).item() == pytest.approx(with_texts, abs=1e-6)      # and no other patch to be wrong


def test_a_patch_belongs_to_what_covers_most_of_it():
    shown = lab_ingredients.covered(SCENE).view(8, 8)
    assert (shown[:2, :2] == 0).all() and (shown[6:, 2:6] == 1).all() and (shown == NOTHING).sum() == 64 - 4 - 8
    for share, whose in (0.3, 0), (0.2, lab_ingredients.UNSURE), (0.01, NOTHING):
        cat = Thing("cat", "red", "big", "top left", (0.0, 0.0, (1 + share) / 8, 1 / 8))
        assert lab_ingredients.covered(Scene("meadow", (cat,)))[:2].tolist() == [0, whose]


def test_contrastive_batches_name_no_unseen_pair_and_hold_as_many_empty_patches_as_full_ones():
    pixels, captions, texts, patches, holding = lab_ingredients.contrastive_batch(random.Random(0), 6)
    assert pixels.shape == (6, 3, 96, 96) and len(captions) == 6 and holding.shape == (len(patches), len(texts))
    assert not any(f"{color} {kind}" in text for kind, color in UNSEEN for text in texts + captions)
    assert texts[-1] == "a picture of nothing" and (holding[:, -1] == TRUE).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (holding == TRUE).any(1).all() and len(COLORS) == len(KINDS) == 8


def test_the_chain_of_preference_learning_draws_up_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toyworld.write_world(n_train=16, n_val=4)
    monkeypatch.setattr(toyworld, "write_world", lambda out: None)          # the 6,240 pictures of the usual one
    few = ["--max-steps", "1", "--batch-size", "2", "--eval-every", "0", "--no-final-eval", "--workers", "0"]
    assert train.main(["--stage", "finetune", "--out", "before", *few]) == 0
    assert lab_ingredients.main(["mpo", "--model", "before", "--seeds", "1", "--questions", "16", "--samples", "4", "--steps", "1", "--held-out", "4"]) == 0
    table = (tmp_path / "out/lab-mpo/table.md").read_text()
    assert all(f"| {name} | " in table for name in ["before", *lab_ingredients.VARIANTS]) and all(claim in table for claim, *_ in lab_ingredients.CLAIMS)
    assert "in 0." in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out/lab-mpo/seed0").glob("*.jsonl")} == {"correctness.jsonl", *(f"dropout{r}.jsonl" for r in (0.25, 0.5, 0.75))}
