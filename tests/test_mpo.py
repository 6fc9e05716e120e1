"""What preference learning promises. Every name is a claim; models are tiny and random, pictures 32 pixels wide."""

import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import model
import mpo
import toyworld
import train
from conversation import Tokenizer, encode_conversation
from data import IGNORE, Records
from support.cli import parse, run
from model import DecoderConfig, VLM, VLMConfig
from support.export import save_processor
from support.cli import UserError
from vision import VisionConfig
import lab.losses as lab_losses
import pairs
import sample

ROOT = Path(mpo.__file__).parent
fork = multiprocessing.get_context("fork").Process
pytestmark = pytest.mark.usefixtures("one_thread")
T = lambda *values: torch.tensor(values, dtype=torch.float64)
CFG = SimpleNamespace(beta=0.1, epsilon=0.1, w_p=0.8, w_q=0.2, w_g=1.0, loss="mpo")
ONE = dict(s=T([-120.0, -161.0]), s_ref=T([-123.0, -160.0]), n=T([60.0, 80.0]))        # the vectors of internvl_mpo.md 1.3
TWO = dict(s=T([-118.0, -167.0]), s_ref=T([-123.0, -160.0]), n=T([60.0, 80.0]))


@pytest.fixture(scope="session")
def vlm(tok):
    torch.manual_seed(0)
    return VLM(VLMConfig(VisionConfig(image_size=32, patch_size=8, n_embd=32, n_layer=2, n_head=2, n_hidden=64),
                         DecoderConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_hidden=64, block_size=256),
                         image_token=tok.image, pad_token=tok.pad)).eval()


@pytest.fixture(scope="session")
def tiny(vlm, tok, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_processor(directory, tok.path, vlm.cfg)
    vlm.save_pretrained(directory)
    return directory


PAIRS = [{"image": "a.png", "question": "<image>\nWhat color?", "chosen": "It is red.", "rejected": "There are 3 blue cats in the picture."},
         {"image": "b.png", "question": "Is it blue?", "chosen": "yes, it is blue and big", "rejected": "no"},
         {"image": ["a.png", "b.png"], "question": "<image> and <image>\nBoth?", "chosen": "A red one.", "rejected": "A green one."},
         {"question": "How many legs has a cat?", "chosen": "4", "rejected": "A cat has 5 legs, I think."}]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 40), "blue").save(tmp_path / "b.png")
    write(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path


def examples(folder, tok, vlm, file="pairs.jsonl", bad="stop"):
    return mpo.PairExamples(Records(folder / file, folder), tok, "vicuna_v1", vlm.cfg.vision, "pad", 256, bad)


def go(tiny, folder, *flags, out="run", data="pairs.jsonl"):
    base = ["--model", tiny, "--data", folder / data, "--image-root", folder, "--batch-size", 4, "--max-steps", 4, "--save-every", 2, "--lr", "3e-3",
            "--eval-every", 0, "--no-final-eval", "--workers", 0, "--out", out]
    return run(lambda: mpo.main([str(word) for word in [*base, *flags]]))


def log(out):
    return [line for line in map(json.loads, open(Path(out) / "log.jsonl")) if "loss" in line]


def errors(capfd):
    return [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith("loaded")]


# ---- each loss is a number ---------------------------------------------------------------------------------------------


def terms_of(case, delta=0.0):
    p = mpo.preference(case["s"][None] if case["s"].ndim == 1 else case["s"], case["s_ref"].reshape(-1, 2), case["n"].reshape(-1, 2), CFG)
    p.delta = delta
    return p


def near(value, number):
    assert abs(float(value) - number) < 1e-5, (float(value), number)


@pytest.mark.parametrize("name, number", [
    ("dpo", 0.513015), ("cdpo", 0.553015), ("robust-dpo", 0.463015), ("hinge", 0.6), ("rso", 0.6), ("sppo", 20.0),
    ("aot", 0.513015), ("sft", 2.0)])
def test_the_loss_equals_its_vector(name, number):
    near(mpo.TERMS[name](terms_of(ONE)), number)


def test_bco_without_a_shift_and_with_the_cumulative_one_over_two_steps():
    near(mpo.TERMS["bco"](terms_of(ONE)), 1.198752)
    delta, n = 0.0, 0
    for case, shift, dpo, bco, weighted in ((ONE, 0.1, 0.513015, 1.196278, 0.649668), (TWO, 0.0, 0.263282, 0.877263, 0.386079)):
        p = terms_of(case)
        delta, n = mpo.shift(delta, n, p.r_c, p.r_r)
        near(delta, shift)
        near(mpo.dpo_loss(p.r_c, p.r_r), dpo)
        near(mpo.bco_loss(p.r_c, p.r_r, delta), bco)
        near(0.8 * mpo.dpo_loss(p.r_c, p.r_r) + 0.2 * mpo.bco_loss(p.r_c, p.r_r, delta), weighted)


def test_ipo_takes_means_over_tokens_and_one_token_each_gives_its_vector_on_sums():
    assert abs(mpo.TERMS["ipo"](terms_of(ONE)) - 24.3789) < 1e-4
    near(lab_losses.ipo_loss(T(3.0), T(-1.0), T(1.0), T(1.0), 0.1), 1.0)


def test_orpo_equals_its_vector_and_survives_a_certain_answer():
    near(lab_losses.orpo_loss(T(-2.0 * 60), T(-2.0125 * 80), T(60.0), T(80.0)), 0.685952)
    s = torch.tensor([-1e-6], requires_grad=True)
    lab_losses.orpo_loss(s, torch.tensor([-30.0]), torch.ones(1), torch.ones(1)).backward()
    assert s.grad.isfinite().all()


def test_an_undecided_model_costs_one_coin_flip_in_dpo_and_two_in_bco():
    r = torch.full((4,), 0.7)
    near(mpo.dpo_loss(r, r), math.log(2))
    near(mpo.bco_loss(r, r, 0.7), 2 * math.log(2))


def test_aot_sorts_over_the_batch():
    gap, ref = T(3.0, -1.0, 2.0), T(0.0, 5.0, 1.0)
    near(lab_losses.aot_loss(gap, ref, 0.1), -sum(math.log(1 / (1 + math.exp(-0.1 * (a - b)))) for a, b in zip((-1, 2, 3), (0, 1, 5))) / 3)


def by_hand(name, s, ref, n, beta, e, delta):
    """The same losses once more, from softplus and plain arithmetic, pair by pair."""
    soft, total = lambda x: math.log1p(math.exp(x)) if isinstance(x, float) else torch.log1p(torch.exp(x)), 0
    for (c, r), (rc, rr), (nc, nr) in zip(s, ref, n):
        a, b = c - rc, r - rr
        h = beta * (a - b)
        total = total + {"dpo": lambda: soft(-h), "bco": lambda: soft(delta - beta * a) + soft(beta * b - delta), "sft": lambda: -c / nc,
                         "cdpo": lambda: (1 - e) * soft(-h) + e * soft(h), "robust-dpo": lambda: ((1 - e) * soft(-h) - e * soft(h)) / (1 - 2 * e),
                         "hinge": lambda: torch.clamp(1 - h, min=0), "ipo": lambda: (a / nc - b / nr - 0.5 / beta) ** 2,
                         "sppo": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
                         "orpo": lambda: soft(-(c / nc - r / nr - torch.log(1 - torch.exp(c / nc)) + torch.log(1 - torch.exp(r / nr))))}[name]()
    return total / len(s)


@pytest.mark.parametrize("name", ["dpo", "bco", "sft", "cdpo", "robust-dpo", "hinge", "ipo", "sppo", "orpo"])
def test_value_and_gradient_agree_with_a_formula_written_independently(name):
    torch.manual_seed(3)
    s = (-50 * torch.rand(6, 2, dtype=torch.float64) - 5).requires_grad_()
    ref, n = s.detach() + 5 * torch.randn(6, 2, dtype=torch.float64), torch.randint(3, 40, (6, 2)).double()
    p = mpo.preference(s, ref, n, CFG)
    p.delta = 0.3
    mine, theirs = mpo.TERMS[name](p), by_hand(name, s, ref, n, 0.1, 0.1, 0.3)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, s)[0], torch.autograd.grad(theirs, s)[0])


@pytest.mark.parametrize("name", [name for name in mpo.TERMS if name != "aot"])
def test_a_batch_costs_the_mean_of_its_pairs(name):
    torch.manual_seed(4)
    s, ref, n = -30 * torch.rand(8, 2) - 1, -30 * torch.rand(8, 2) - 1, torch.randint(2, 20, (8, 2)).float()
    loss = lambda rows: mpo.TERMS[name](terms_of(dict(s=s[rows], s_ref=ref[rows], n=n[rows]), 0.2))
    torch.testing.assert_close(loss(slice(None)), sum(loss(slice(i, i + 1)) for i in range(8)) / 8)


def test_delta_is_the_mean_of_all_rewards_however_they_are_cut():
    r = torch.randn(2, 12)
    delta, n = 0.0, 0
    for cut in (slice(0, 1), slice(1, 5), slice(5, 12)):
        delta, n = mpo.shift(delta, n, r[0, cut], r[1, cut])
    near(delta, r.mean())


def test_what_a_name_stands_for():
    weights = lambda loss: mpo.loss_weights(SimpleNamespace(**{**vars(CFG), "loss": loss}))
    assert weights("mpo") == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
    assert weights("dpo") == {"dpo": 1.0} and weights("bco+sft") == {"bco": 1.0, "sft": 1.0} and weights("orpo") == {"sft": 1.0, "orpo": 0.1}
    for wrong, word in (("dpo+ipo", r"only \+sft"), ("mpo+sft", "already"), ("ippo", "did you mean")):
        with pytest.raises(UserError, match=word):
            weights(wrong)


# ---- TRL ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trl_loss():
    """trl_loss(name, s, ref, epsilon) -> losses (B,). TRL 0.28 is the last version whose bco_pair keeps delta; 0.29 and later have none."""
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed: pip install trl==0.28.0")
    import transformers.utils.import_utils as utils
    have = utils._is_package_available                   # it takes the answer for true or false; transformers 5 gives (is it there, version)
    utils._is_package_available = lambda *a, **k: type("Answer", (tuple,), {"__bool__": lambda self: bool(self[0])})(have(*a, **k))
    try:
        from accelerate import Accelerator
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.utils import RunningMoments
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this TRL has no DPOTrainer.dpo_loss: {error}")
    finally:
        utils._is_package_available = have
    cpu = Accelerator(cpu=True)
    me = SimpleNamespace(accelerator=cpu, reference_free=False, f_divergence_type="reverse_kl", beta=0.1, label_smoothing=0.0, running=RunningMoments(cpu))

    def loss(name, s, ref, epsilon=0.0):
        me.label_smoothing = epsilon
        return DPOTrainer.dpo_loss(me, s[:, 0], s[:, 1], ref[:, 0], ref[:, 1], name)[0]
    return loss


@pytest.mark.parametrize("name, theirs, epsilon", [("dpo", "sigmoid", 0.0), ("cdpo", "sigmoid", 0.1), ("robust-dpo", "robust", 0.1), ("hinge", "hinge", 0.0),
                                                   ("sppo", "sppo_hard", 0.0), ("aot", "aot", 0.0)])
def test_the_term_is_that_of_trl(trl_loss, name, theirs, epsilon):
    torch.manual_seed(5)
    s, ref = -30 * torch.rand(8, 2), -30 * torch.rand(8, 2)
    near(mpo.TERMS[name](terms_of(dict(s=s, s_ref=ref, n=torch.ones(8, 2)))), trl_loss(theirs, s, ref, epsilon).mean())


def test_ipo_of_trl_is_given_means_and_ours_makes_them(trl_loss):
    s, ref, n = -30 * torch.rand(8, 2), -30 * torch.rand(8, 2), torch.randint(2, 20, (8, 2)).float()
    near(mpo.TERMS["ipo"](terms_of(dict(s=s, s_ref=ref, n=n))), trl_loss("ipo", s / n, ref / n).mean())


def test_delta_runs_as_in_trl_028_over_batches_of_equal_size(trl_loss):
    torch.manual_seed(6)
    delta, n = 0.0, 0
    for _ in range(3):
        s, ref = -30 * torch.rand(4, 2), -30 * torch.rand(4, 2)
        p = terms_of(dict(s=s, s_ref=ref, n=torch.ones(4, 2)))
        delta, n = mpo.shift(delta, n, p.r_c, p.r_r)
        near(mpo.bco_loss(p.r_c, p.r_r, delta), trl_loss("bco_pair", s, ref).mean())


# ---- log-probabilities: a pair as one row ------------------------------------------------------------------------------


def two_rows(vlm, tok, record, pixels, template="vicuna_v1"):
    """s and n of a pair the usual way: two rows, whole logits, float32 log-softmax of all of them."""
    found = []
    for answer in (record["chosen"], record["rejected"]):
        n_image = len(pixels)
        tokens, labels = encode_conversation(tok, [("human", record["question"]), ("gpt", answer)], template, [vlm.cfg.vision.n_token] * n_image)
        logp = vlm(torch.tensor([tokens]), pixels if n_image else None)[0].float().log_softmax(-1)
        found.append((sum(logp[t - 1, y] for t, y in enumerate(labels) if y != IGNORE), sum(y != IGNORE for y in labels)))
    return found


def test_one_row_gives_the_sums_of_two_and_padding_prompt_and_picture_count_zero(vlm, tok, folder):
    made = examples(folder, tok, vlm)
    batch = mpo.collate_pairs([made[i] for i in range(4)], tok.pad)
    s, n = mpo.log_probs(vlm, batch)
    for i, record in enumerate(PAIRS):
        for k, (value, count) in enumerate(two_rows(vlm, tok, record, made[i]["pixels"])):
            assert abs(s[i, k].item() - value.item()) < 1e-4 and n[i, k] == count
        alone = mpo.log_probs(vlm, mpo.collate_pairs([made[i]], tok.pad))[0]
        torch.testing.assert_close(alone[0], s[i], atol=1e-4, rtol=0)


def test_gradients_through_one_row_are_those_of_two(vlm, tok, folder):
    made = examples(folder, tok, vlm)
    weight = torch.tensor([[0.3, -0.7], [1.0, 0.2], [-0.5, 0.5], [0.1, 0.9]])

    def gradient(value):
        vlm.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    usual = gradient(sum(w * value for i, r in enumerate(PAIRS) for w, (value, _) in zip(weight[i], two_rows(vlm, tok, r, made[i]["pixels"]))))
    batch = mpo.collate_pairs([made[i] for i in range(4)], tok.pad)
    mine = gradient((mpo.log_probs(vlm, batch)[0] * weight).sum())
    assert mine.keys() == usual.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], usual[name], atol=2e-5, rtol=1e-3)
    vlm.zero_grad()


def test_the_two_answers_cannot_see_each_other(vlm, tok, folder):
    e = examples(folder, tok, vlm)[0]
    s = mpo.log_probs(vlm, mpo.collate_pairs([e], tok.pad))[0]
    changed = dict(e, tokens=e["tokens"].clone())
    changed["tokens"][e["part"] == mpo.CHOSEN] = 100
    other = mpo.log_probs(vlm, mpo.collate_pairs([changed], tok.pad))[0]
    assert other[0, 1] == s[0, 1] and other[0, 0] != s[0, 0]


@pytest.mark.parametrize("template", ["llava_v0", "prism_pure", "llava_llama_2", "plain"])
def test_every_template_has_one_row_for_two(vlm, tok, folder, template):
    made = mpo.PairExamples(Records(folder / "pairs.jsonl", folder), tok, template, vlm.cfg.vision, "pad", 256, "stop")
    s, _ = mpo.log_probs(vlm, mpo.collate_pairs([made[0]], tok.pad))
    for k, (value, _) in enumerate(two_rows(vlm, tok, PAIRS[0], made[0]["pixels"], template)):
        assert abs(s[0, k].item() - value.item()) < 1e-4


# ---- training ----------------------------------------------------------------------------------------------------------


def test_the_first_step_costs_its_coin_flips_and_the_nll(tiny, folder, vlm, tok):
    assert go(tiny, folder) == 0
    first, nll = log("run")[0], 0
    for i, record in enumerate(PAIRS):
        (s, n), _ = two_rows(vlm, tok, record, examples(folder, tok, vlm)[i]["pixels"])
        nll -= float(s) / n / 4
    near(first["loss"], 0.8 * math.log(2) + 0.4 * math.log(2) + nll)
    assert abs(first["margin"]) < 1e-5 and abs(first["delta"]) < 1e-5 and first["pairs"] == 4
    assert first.keys() >= {"reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected", "delta", "nll", "dpo", "bco", "sft"}
    assert Image.open("run/mpo.png").size == (800, 760) and Path("run/loss.png").exists()


def test_every_reference_gives_the_same_losses(tiny, folder):
    for kind in ("precomputed", "copy"):
        assert go(tiny, folder, "--reference", kind, out=kind) == 0
    for a, b in zip(log("precomputed"), log("copy"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6 and abs(a["margin"] - b["margin"]) < 1e-5
    assert abs(log("copy")[-1]["margin"]) > 0.1                             # and it did learn something in between


def test_the_policy_without_its_lora_is_the_reference(tiny, folder):
    for kind in ("precomputed", "lora-off"):
        assert go(tiny, folder, "--reference", kind, "--lora-r", 4, "--train", "llm", out=kind) == 0
    for a, b in zip(log("precomputed"), log("lora-off"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6


def test_lora_off_without_a_lora_is_refused(tiny, folder, capfd):
    assert go(tiny, folder, "--reference", "lora-off") == 1 and "no LoRA, such as" in errors(capfd)[-1]


def test_the_reference_is_computed_once_and_anew_for_other_weights_or_pairs(tiny, folder, capfd):
    assert go(tiny, folder, out="out/a") == 0 and "reference log-probabilities of 4 pairs" in capfd.readouterr().out
    file, = Path("out/reference").iterdir()
    assert len(file.read_text().splitlines()) == 4
    assert go(tiny, folder, out="out/b") == 0 and "reference log-probabilities" not in capfd.readouterr().out
    file.write_text(file.read_text()[:-9])                                  # a kill tore it: only the rest is made again
    assert go(tiny, folder, out="out/c") == 0 and "reference log-probabilities" in capfd.readouterr().out
    assert log("out/a") == [dict(line, time=log("out/a")[i]["time"]) for i, line in enumerate(log("out/c"))]
    write(folder / "other.jsonl", PAIRS[:3])
    assert go(tiny, folder, out="out/d", data="other.jsonl") == 0
    assert go("out/a", folder, out="out/e") == 0
    assert len(list(Path("out/reference").iterdir())) == 3


def test_micro_batches_change_nothing_but_delta(tiny, folder):
    for size in (4, 1):
        assert go(tiny, folder, "--micro-batch-size", size, "--loss", "dpo+sft", out=f"by{size}") == 0
    for a, b in zip(log("by4"), log("by1"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4


@pytest.mark.parametrize("reference", ["precomputed", "copy"])
def test_an_interrupted_run_ends_where_the_whole_one_does(tiny, folder, reference, monkeypatch):
    assert go(tiny, folder, "--reference", reference, out="whole") == 0
    steps, original = [], mpo.Pairs.loss

    def loss(*args):
        steps.append(None)
        if len(steps) == 4:
            os._exit(9)
        return original(*args)
    monkeypatch.setattr(mpo.Pairs, "loss", loss)
    child = fork(target=lambda: os._exit(go(tiny, folder, "--reference", reference)))
    child.start()
    child.join()
    monkeypatch.setattr(mpo.Pairs, "loss", original)
    assert child.exitcode == 9 and go(tiny, folder, "--reference", reference, "--resume") == 0
    strip = lambda out: [{k: v for k, v in line.items() if k != "time"} for line in log(out)]
    assert strip("whole") == strip("run")                                   # delta and rewards included
    assert Path("whole/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", [*mpo.TERMS, "dpo+sft"])
def test_every_loss_trains(tiny, folder, loss):
    assert go(tiny, folder, "--loss", loss, "--max-steps", 12, "--save-every", 0) == 0
    assert log("run")[-1]["loss"] < log("run")[0]["loss"]


def test_four_pairs_are_told_apart_in_forty_steps(tiny, folder):
    assert go(tiny, folder, "--max-steps", 40, "--save-every", 0, "--lr", "5e-3") == 0
    last = log("run")[-1]
    assert last["accuracy"] == 1 and last["margin"] > 1 and last["nll"] < 0.5 * log("run")[0]["nll"]


def test_with_the_tower_in_training_the_reference_keeps_its_own(tiny, folder):
    for kind in ("precomputed", "copy"):
        assert go(tiny, folder, "--train", "connector,llm,vision", "--reference", kind, out=kind) == 0
    for a, b in zip(log("precomputed"), log("copy"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6


# ---- bad pairs ---------------------------------------------------------------------------------------------------------


def test_bad_pairs_are_counted_and_named_and_never_trained_on(tiny, folder, capfd):
    good = PAIRS[0]
    bad = [dict(good, rejected=" "), dict(good, rejected=good["chosen"] + " "), dict(good, image="gone.png"), dict(good, chosen="word " * 300),
           {k: v for k, v in good.items() if k != "rejected"}, dict(good, image="../secret.png"), dict(good, question=7)]
    write(folder / "mixed.jsonl", [good, *bad])
    with open("mixed.jsonl", "a") as file:
        file.write('{"image": "a.png", "question"\n')
    assert go(tiny, folder, "--batch-size", 9, "--max-steps", 1, data="mixed.jsonl") == 0
    line, = log("run")
    assert line["pairs"] == 1 and len(line["skipped"]) == 8
    for number, word in enumerate(("answer", "same answer", "gone.png", "allowed", "rejected", "outside", "conversation", "JSON"), 2):
        assert any(f"mixed.jsonl, line {number}" in reason and word in reason for reason in line["skipped"]), (number, word, line["skipped"])
    assert "8 of 9 records skipped" in capfd.readouterr().out
    assert go(tiny, folder, "--bad-records", "stop", out="b", data="mixed.jsonl") == 1 and "mixed.jsonl, line " in errors(capfd)[-1]


def test_the_same_row_costs_the_same_beside_a_bad_pair(tiny, folder):
    write(folder / "one.jsonl", PAIRS[:1])
    write(folder / "two.jsonl", [PAIRS[0], dict(PAIRS[1], rejected="")])
    assert go(tiny, folder, "--batch-size", 1, "--max-steps", 1, out="one", data="one.jsonl") == 0
    assert go(tiny, folder, "--batch-size", 2, "--max-steps", 1, out="two", data="two.jsonl") == 0
    near(log("one")[0]["loss"], log("two")[0]["loss"])


@pytest.mark.parametrize("flags, word", [(["--data", "none.jsonl"], "no such file"), (["--loss", "mpoo"], "did you mean mpo"), (["--beta", "0"], "above 0"),
                                         (["--reference", "none"], "--reference"), (["--model", "toy"], "is a preset"), (["--epsilon", "0.5"], "below 0.5"),
                                         (["--stage", "finetune"], "--stage"), (["--split-questions"], "--split-questions"), (["--out", "tiny"], None)])
def test_a_flag_that_cannot_be_is_one_clear_line(tiny, folder, capfd, flags, word):
    if word:
        assert go(tiny, folder, *flags) == 1
        said = errors(capfd)
        assert len(said) == 1 and word in said[0]


def test_meta_json_mixes_files_with_their_own_roots_and_repeats(tiny, folder, tok, vlm, capfd):
    (folder / "red").mkdir()
    os.rename("a.png", "red/a.png")
    write(folder / "red.jsonl", [PAIRS[0]] * 3)
    write(folder / "text.jsonl", [dict(PAIRS[3], chosen=f"{i} legs") for i in range(10)])
    meta = {"red": {"root": "red", "annotation": "red.jsonl", "data_augment": True, "max_dynamic_patch": 12, "repeat_time": 2, "length": 3},
            "text": {"root": ".", "annotation": "text.jsonl", "repeat_time": 0.3}}
    (folder / "meta.json").write_text(json.dumps(meta))
    made = examples(folder, tok, vlm, "meta.json")
    assert len(made) == 9 and "max_dynamic_patch of red is not used" in capfd.readouterr().out
    assert [made[i]["pixels"].shape[0] for i in range(9)] == [1] * 6 + [0] * 3
    assert len({made[i]["tokens"].tolist().__repr__() for i in range(6, 9)}) == 3
    assert go(tiny, folder, data="meta.json") == 0 and log("run")[0]["pairs"] == 4
    (folder / "meta.json").write_text(json.dumps({"red": dict(meta["red"], root="/cluster/images")}))
    assert go(tiny, folder, data="meta.json", out="b") == 1 and "write yours" in errors(capfd)[-1]


# ---- building pairs: reading answers -----------------------------------------------------------------------------------


def test_the_final_answer_is_behind_the_last_trigger():
    assert pairs.parse_answer("First.\nSecond.\nFinal answer: 4")[1] == "4"
    assert pairs.parse_answer("Final answer: 3 at first.\nNo.\nFinal answer: 4")[1] == "4"
    assert pairs.parse_answer("一。\n二。\n答案: 四")[1] == "四"


@pytest.mark.parametrize("text", ["4", "Final answer: 4", "One line. Final answer: 4", "a\nFinal answer: 4", "a\nb\nFinal answer:", "a\nb\nFinal answer: 4\nor 5",
                                  "\n\nFinal answer: 4", "a\nFinal answer: 1\nFinal answer: 2\nFinal answer: 3"])
def test_other_forms_are_no_answer(text):
    assert pairs.parse_answer(text) is None


@pytest.mark.parametrize("said, truth, right", [
    ("Yes", "yes", True), ("the cat.", "cat", True), ("two", "2", True), ("3.1416", "3.14159", True), ("3.2", "3.14159", False), ("1,000", "1000", True),
    ("B. dog", "B", True), ("(B)", "B", True), ("C", "B", False), ("bird", "B", False), ("12", "2", False), ("90 degrees", "90", True), ("", "a", False),
    ("[0.10, 0.10, 0.50, 0.50]", "[0.10, 0.10, 0.50, 0.55]", True), ("[0.60, 0.60, 0.90, 0.90]", "[0.10, 0.10, 0.50, 0.55]", False), ("nan", "4", False)])
def test_the_judge(said, truth, right):
    assert pairs.judge_answer(said, truth) is right


def test_the_step_by_step_prompt_is_the_authors_and_drops_the_short_answer_ending():
    said = pairs.ask_step_by_step("How many?\n<image>\nAnswer the question using a single word or phrase.", 1, "en")
    assert said == ("<image>\nYour task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to answer, "
                    'please use the format "Final answer: .."\n\nQuestion:\n\nHow many?')
    assert pairs.ask_step_by_step("Is it?\nAnswer the question using a single word or phrase.", 1, "en") == "<image>\n" + toyworld.COT + "Is it?"


def test_a_right_answer_is_written_as_the_truth_is():
    assert pairs.write_as_truth("a\nb\n**Final answer:** **Red**", "red", 2) == "a\nb\nFinal answer: red"
    assert pairs.write_as_truth("a\nb\nFinal answer: A Red one", "red", 2) == "a\nb\nFinal answer: red"


# ---- building pairs: the program ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(folder):
    write(folder / "questions.jsonl", [{"image": "a.png", "question": f"How many? {i}", "answer": str(i % 3)} for i in range(6)]
          + [{"image": "gone.png", "question": "Where?", "answer": "there"}, {"question": "Why?", "answer": "so"}, {"image": "a.png"}])
    return folder / "questions.jsonl"


def build(tiny, folder, method, *flags, out="pairs/made.jsonl"):
    base = ["--method", method, "--model", tiny, "--data", folder / "questions.jsonl", "--image-root", folder, "--out", out, "--samples", 4,
            "--batch-size", 8, "--max-new-tokens", 12]
    return run(lambda: pairs.main([str(word) for word in [*base, *flags]]))


@pytest.fixture
def talkative(monkeypatch):
    """A model that answers from a list, so that right and wrong answers come at will; its tokens are those of the texts."""
    def says(*texts):
        tok, calls = Tokenizer(ROOT / "assets/toy-vicuna"), []

        def complete(vlm, tok_, rows, cfg, seed):
            calls.append(rows)
            picked = [texts[(seed + i) % len(texts)] for i in range(len(rows))]
            return [sample.read_answer(tok, "vicuna_v1", tok.encode(text) + [tok.eos] * (not text.endswith("..."))) for text in picked]
        monkeypatch.setattr(pairs, "draw_answers", complete)
        return calls
    return says


def lines(path):
    return [json.loads(line) for line in open(path)]


def test_right_answers_meet_wrong_ones_and_those_without_form(tiny, folder, asked, talkative, capfd):
    talkative("One.\nTwo.\nFinal answer: 1", "One.\nTwo.\nFinal answer: 2", "I do not know.", "One.\nTwo.\nFinal ...")
    assert build(tiny, folder, "correctness") == 0
    made = lines("pairs/made.jsonl")
    assert {(p["answer_gt"], p["rule"], pairs.parse_answer(p["chosen"])[1]) for p in made} == {(t, rule, t) for t in "12" for rule in ("answer", "format")}
    assert all(p["question"].startswith("<image>\nYour task") and p["image"] == "a.png" and set(p) >= {"chosen", "rejected"} for p in made)
    said = capfd.readouterr().out
    stats = json.loads(Path("pairs/made.jsonl.stats.json").read_text())
    assert stats["counts"]["answers cut off"] == 7 and stats["counts"]["questions none right"] == 3 and stats["counts"]["unusable"] == 1
    assert stats["counts"]["unreadable"] == 1 and "no such" in said and stats["tokens_generated_per_pair"] == stats["counts"]["tokens"] / len(made)
    assert stats["tokens"]["chosen"]["mean"] > 0 and "tokens generated per pair" in said


def test_a_prediction_within_the_other_is_no_pair_and_pairs_are_capped(tiny, folder, asked, talkative):
    talkative("One.\nTwo.\nFinal answer: 1", "One.\nTwo.\nFinal answer: 1 or 2", "I.\nJ.\nFinal answer: 5", "K.\nL.\nFinal answer: 6")
    assert build(tiny, folder, "correctness", "--pairs-per-question", 1) == 0
    counts = json.loads(Path("pairs/made.jsonl.stats.json").read_text())["counts"]
    assert counts["pairs"] == 2 and counts["pairs in doubt"] == 2 and counts["pairs beyond the cap"] == 2      # questions whose truth is 1


def test_dropout_keeps_words_and_completes_them_without_the_picture(tiny, folder, asked, tok, talkative):
    write(folder / "questions.jsonl", [{"image": "a.png", "question": "<image>\nDescribe.", "chosen": "A red cat and a big dog."}])
    calls = talkative("blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--ratio", 0.5) == 0
    pair, = lines("pairs/made.jsonl")
    assert pair["chosen"] == "A red cat and a big dog." and pair["rejected"] == "A red cat blue bird." and pair["image"] == "a.png"
    (ids, tiles), = calls[1]
    assert calls[0] == [] and not tiles and tok.image not in ids            # it is asked without picture
    whole = encode_conversation(tok, [("human", "Describe."), ("gpt", "A red cat")], "vicuna_v1", [])[0]
    assert ids == whole[:-1]                                                # exactly as training would write it, left open


@pytest.mark.parametrize("ratio, begin", [(0.25, "A"), (0.75, "A red cat and a"), (0.0, "")])
def test_the_ratio_counts_words_and_rounds_down(tiny, folder, asked, talkative, ratio, begin):
    write(folder / "questions.jsonl", [{"image": "a.png", "question": "Describe.", "chosen": "A red cat and a big dog."}])
    talkative("blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--ratio", ratio) == 0
    assert lines("pairs/made.jsonl")[0]["rejected"] == f"{begin} blue bird.".strip()


def test_cut_off_and_same_completions_make_no_pair(tiny, folder, asked, talkative, capfd):
    write(folder / "questions.jsonl", [{"image": "a.png", "question": "Describe.", "chosen": "A red cat and a big dog."}])
    for text, why in (("and a ...", "completions cut off"), ("and a big dog.", "completions the same")):
        talkative(text)
        assert build(tiny, folder, "dropout-ntp") == 1 and "not one pair" in errors(capfd)[-1]
        assert json.loads(Path("pairs/made.jsonl.stats.json").read_text())["counts"][why] == 1
        Path("pairs/made.jsonl.part").unlink()


def test_without_a_chosen_answer_the_model_gives_its_own_with_the_picture(tiny, folder, asked, talkative):
    calls = talkative("one two three four", "blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--batch-size", 2) == 0
    assert len(calls) == 2 * 4 and calls[0][0][1] and not calls[1][0][1]


@pytest.mark.parametrize("method", ["correctness", "dropout-ntp"])
def test_a_killed_builder_goes_on_and_writes_what_an_undisturbed_one_would(tiny, folder, asked, method, monkeypatch):
    monkeypatch.setattr(pairs, "judge_answer", lambda said, truth: True)             # a random model never answers: anything is an answer here
    monkeypatch.setattr(pairs, "parse_answer", lambda text, n=2: (text, text[:3]) if len(text) % 2 else None)
    monkeypatch.setattr(pairs, "write_as_truth", lambda text, *_: text)
    monkeypatch.setattr(sample, "read_answer", lambda tok, template, ids: sample.Answer(tok.decode(ids).strip(), True, ids))
    monkeypatch.setattr(pairs, "read_answer", sample.read_answer)
    assert build(tiny, folder, method, out="whole.jsonl") == 0
    calls, original = [], pairs.draw_answers

    def draw_answers(*args):
        calls.append(None)
        if len(calls) == 3:
            with open("made.jsonl.part", "a") as file:
                file.write('{"pairs": [')                                   # the kill comes while a line is written
            os._exit(9)
        return original(*args)
    monkeypatch.setattr(pairs, "draw_answers", draw_answers)
    flags = ["--batch-size", 8 if method == "correctness" else 2]
    child = fork(target=lambda: os._exit(build(tiny, folder, method, *flags, out="made.jsonl")))
    child.start()
    child.join()
    assert child.exitcode == 9 and Path("made.jsonl.part").exists() and not Path("made.jsonl").exists()
    monkeypatch.setattr(pairs, "draw_answers", original)
    assert build(tiny, folder, method, *flags, "--seed", 1, out="made.jsonl") == 1          # other flags: refused
    assert build(tiny, folder, method, *flags, out="made.jsonl") == 0 and not Path("made.jsonl.part").exists()
    if method == "dropout-ntp":
        assert build(tiny, folder, method, *flags, out="whole2.jsonl") == 0
    assert Path("made.jsonl").read_text() == Path("whole.jsonl" if method == "correctness" else "whole2.jsonl").read_text()


@pytest.mark.parametrize("flags, word", [(["--method", "corectness"], "did you mean correctness"), (["--ratio", "1"], "below 1"), (["--samples", "0"], "at least 1"),
                                         (["--data", "none.jsonl"], "none.jsonl"), (["--sampels", "3"], "--samples"), (["--out", "a.png"], "is there already")])
def test_a_wrong_flag_of_the_builder_is_one_clear_line(tiny, folder, asked, capfd, flags, word):
    assert build(tiny, folder, "correctness", *flags) == 1
    said = errors(capfd)
    assert len(said) == 1 and word in said[0]


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*mpo*.sh")))
def test_a_recipe_has_only_flags_that_there_are(recipe, monkeypatch, folder, tiny):
    """Each command of the script, with its folders filled in, gets as far as reading files."""
    text = (ROOT / "recipes" / recipe).read_text()
    commands = re.findall(r"(mpo|pairs)\.py\"? ((?:[^\n\\]|\\\n)*)", text)
    monkeypatch.setattr(mpo, "teach", lambda cfg, *_: 0)
    assert commands
    for program, command in commands:
        words = shlex.split(command.replace("\\\n", " ").replace('"$@"', ""))
        words = [str(folder / "pairs.jsonl") if w in ("$META", "$PAIRS", "$OUT/pairs.jsonl", "toyworld/val.jsonl") else str(folder) if w.startswith("$") else w for w in words]
        if program == "pairs":
            parse(pairs.PairsConfig, words)
        else:
            assert mpo.main(words) == 0
