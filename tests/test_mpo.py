"""What preference learning promises. Every name is a claim; models are tiny and random."""

import importlib.util
import json
import math
import os
import random
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import QUICK, ROOT, call, errors, fork, in_child, losses, save
from PIL import Image

import lab.losses as lab_losses
import mpo
import pairs
import sample
from benchmarks.common import COT
from benchmarks.own import is_right
from conversation import Tokenizer, encode_conversation
from model import IGNORE, VLM, DecoderConfig, VLMConfig
from support.cli import run_program
from support.data_files import Records
from support.flags import ModelConfig
from tools import show
from vision import VisionConfig

# Two steps of one pair: log pi of chosen and rejected answer under policy and reference, and their tokens.
FIRST = {"s": [-120.0, -161.0], "s_ref": [-123.0, -160.0], "n": [60.0, 80.0]}
SECOND = {"s": [-118.0, -167.0], "s_ref": [-123.0, -160.0], "n": [60.0, 80.0]}


@pytest.fixture(scope="session")
def vlm(tok):
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=8, n_embd=32, n_layer=2, n_head=2, n_hidden=64)
    decoder = DecoderConfig(
        vocab_size=tok.vocab_size,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=8,
        n_hidden=64,
        block_size=256,
    )
    return VLM(VLMConfig(vision, decoder, image_token=tok.image, pad_token=tok.pad)).eval()


@pytest.fixture(scope="session")
def tiny(vlm, tok, tmp_path_factory):
    return save(vlm, tok, tmp_path_factory.mktemp("models") / "tiny")


def make_pair(image, question, chosen, rejected):
    return {"image": image, "question": question, "chosen": chosen, "rejected": rejected}


PAIRS = [
    make_pair("a.png", "<image>\nWhat color?", "It is red.", "There are 3 blue cats in the picture."),
    make_pair("b.png", "Is it blue?", "yes, it is blue and big", "no"),
    make_pair(["a.png", "b.png"], "<image> and <image>\nBoth?", "A red one.", "A green one."),
    {"question": "How many legs has a cat?", "chosen": "4", "rejected": "A cat has 5 legs, I think."},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 40), "blue").save(tmp_path / "b.png")
    write(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path


def examples(folder, tok, vlm, file="pairs.jsonl", template="vicuna_v1"):
    records = Records(folder / file, folder)
    return mpo.PairExamples(records, tok, template, vlm.cfg.vision, "pad", 256)


def go(tiny, folder, *flags, out="run", data="pairs.jsonl", program=mpo.main):
    base = ["--model", tiny, "--data", folder / data, "--image-root", folder, "--out", out, *QUICK]
    return call(program, *base, *flags)


def log(out):
    lines = [json.loads(line) for line in open(Path(out) / "log.jsonl")]
    return [line for line in lines if "loss" in line]


def near(value, number, tolerance=1e-5):
    assert abs(float(value) - number) < tolerance, (float(value), number)


# ---- each loss is a number ----


def rows(case):
    """s, s_ref, n of one pair, (1, 2) each."""
    return [torch.tensor([case[name]], dtype=torch.float64) for name in ("s", "s_ref", "n")]


def rewards(case, beta=0.1):
    s, s_ref, _ = rows(case)
    return beta * (s - s_ref)


def lab_loss(name, s, s_ref, n):
    cfg = SimpleNamespace(beta=0.1, epsilon=0.1, loss=name, w_g=0)
    return lab_losses.loss_terms(cfg.beta * (s - s_ref), s, n, 0.0, cfg)[name][1]


def random_pairs(n_pair, dtype=torch.float32):
    torch.manual_seed(3)
    s = -30 * torch.rand(n_pair, 2, dtype=dtype) - 1
    s_ref = -30 * torch.rand(n_pair, 2, dtype=dtype) - 1
    return s, s_ref, torch.randint(2, 20, (n_pair, 2)).to(dtype)


def test_dpo_bco_and_sft_equal_their_vectors():
    ((r_c, r_r),) = rewards(FIRST)
    near(mpo.dpo_loss(r_c, r_r), 0.513015)
    near(mpo.bco_loss(r_c, r_r, delta=0.0), 1.198752)
    near(mpo.sft_loss(torch.tensor([-120.0]), torch.tensor([60.0])), 2.0)


@pytest.mark.parametrize(
    "name, number",
    [
        ("cdpo", 0.553015),
        ("robust-dpo", 0.463015),
        ("hinge", 0.6),
        ("sppo", 20.0),
        ("aot", 0.513015),
        ("ipo", 24.3789),
    ],
)
def test_a_loss_of_the_ablation_equals_its_vector(name, number):
    near(lab_loss(name, *rows(FIRST)), number, 1e-4)


def test_bco_with_the_cumulative_shift_over_two_steps():
    delta, n_pair = 0.0, 0
    for case, shift, dpo, bco in ((FIRST, 0.1, 0.513015, 1.196278), (SECOND, 0.0, 0.263282, 0.877263)):
        delta, n_pair = mpo.update_delta(delta, n_pair, rewards(case))
        near(delta, shift)
        ((r_c, r_r),) = rewards(case)
        near(mpo.dpo_loss(r_c, r_r), dpo)
        near(mpo.bco_loss(r_c, r_r, delta), bco)


def test_the_three_terms_have_the_weights_of_the_flags():
    cfg = mpo.MPOConfig(w_p=0.5, w_q=0.3, w_g=2.0)
    s, _, n = rows(FIRST)
    terms = mpo.mpo_terms(rewards(FIRST), s, n, 0.1, cfg)
    assert {name: weight for name, (weight, _) in terms.items()} == {"dpo": 0.5, "bco": 0.3, "sft": 2.0}
    near(terms["dpo"][1], 0.513015)
    near(terms["bco"][1], 1.196278)
    near(terms["sft"][1], 2.0)


def test_an_undecided_model_costs_one_coin_flip_in_dpo_and_two_in_bco():
    r = torch.full((4,), 0.7)
    near(mpo.dpo_loss(r, r), math.log(2))
    near(mpo.bco_loss(r, r, 0.7), 2 * math.log(2))


def test_ipo_of_one_token_answers_is_its_vector_on_sums():
    s = torch.tensor([[3.0, -1.0]])
    near(lab_loss("ipo", s, torch.zeros(1, 2), torch.ones(1, 2)), 1.0)


def test_orpo_equals_its_vector_and_survives_a_certain_answer():
    n = torch.tensor([[60.0, 80.0]])
    s = n * torch.tensor([[-2.0, -2.0125]])
    near(lab_loss("orpo", s, torch.zeros(1, 2), n), 0.685952)
    certain = torch.tensor([[-1e-6, -30.0]], requires_grad=True)
    lab_loss("orpo", certain, torch.zeros(1, 2), torch.ones(1, 2)).backward()
    assert certain.grad.isfinite().all()


def test_aot_sorts_over_the_batch():
    gap, gap_ref = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([0.0, 5.0, 1.0])
    sorted_pairs = ((-1, 0), (2, 1), (3, 5))
    expected = sum(math.log1p(math.exp(-0.1 * (a - b))) for a, b in sorted_pairs) / 3
    zeros = torch.zeros(3)
    s, s_ref = torch.stack([gap, zeros], 1), torch.stack([gap_ref, zeros], 1)
    near(lab_loss("aot", s, s_ref, torch.ones(3, 2)), expected)


def test_a_batch_costs_the_mean_of_its_pairs():
    s, s_ref, n = random_pairs(8)
    cfg = mpo.MPOConfig()

    def costs(part):
        r = 0.1 * (s[part] - s_ref[part])
        terms = mpo.mpo_terms(r, s[part], n[part], 0.2, cfg)
        found = {name: term for name, (_, term) in terms.items()}
        for name in set(lab_losses.NAMES) - {"aot"}:
            found[name] = lab_loss(name, s[part], s_ref[part], n[part])
        return found

    single = [costs(slice(i, i + 1)) for i in range(8)]
    for name, value in costs(slice(None)).items():
        torch.testing.assert_close(value, sum(costs_of_one[name] for costs_of_one in single) / 8)


def test_delta_is_the_mean_of_all_rewards_however_they_are_cut():
    r = torch.randn(12, 2)
    delta, n_pair = 0.0, 0
    for cut in (slice(0, 1), slice(1, 5), slice(5, 12)):
        delta, n_pair = mpo.update_delta(delta, n_pair, r[cut])
    near(delta, r.mean())
    assert n_pair == 12


# ---- TRL ----


@pytest.fixture(scope="session")
def trl_loss():
    """trl_loss(name, s, s_ref, epsilon) -> losses (B,).

    TRL 0.28 is the last version whose bco_pair keeps delta; 0.29 and later have none.
    """
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed: pip install trl==0.28.0")
    import transformers.utils.import_utils as utils

    # It takes the answer for true or false; transformers 5 gives (is it there, version).
    original = utils._is_package_available
    Found = type("Found", (tuple,), {"__bool__": lambda self: bool(self[0])})
    utils._is_package_available = lambda *args, **flags: Found(original(*args, **flags))
    try:
        from accelerate import Accelerator
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.utils import RunningMoments
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this TRL has no DPOTrainer.dpo_loss: {error}")
    finally:
        utils._is_package_available = original
    cpu = Accelerator(cpu=True)
    trainer = SimpleNamespace(
        accelerator=cpu,
        reference_free=False,
        f_divergence_type="reverse_kl",
        beta=0.1,
        label_smoothing=0.0,
        running=RunningMoments(cpu),
    )

    def loss(name, s, s_ref, epsilon=0.0):
        trainer.label_smoothing = epsilon
        return DPOTrainer.dpo_loss(trainer, s[:, 0], s[:, 1], s_ref[:, 0], s_ref[:, 1], name)[0]

    return loss


def test_dpo_is_that_of_trl(trl_loss):
    s, s_ref, _ = random_pairs(8)
    r_c, r_r = (0.1 * (s - s_ref)).unbind(1)
    near(mpo.dpo_loss(r_c, r_r), trl_loss("sigmoid", s, s_ref).mean())


@pytest.mark.parametrize(
    "name, theirs, epsilon",
    [
        ("cdpo", "sigmoid", 0.1),
        ("robust-dpo", "robust", 0.1),
        ("hinge", "hinge", 0.0),
        ("sppo", "sppo_hard", 0.0),
        ("aot", "aot", 0.0),
    ],
)
def test_a_loss_of_the_ablation_is_that_of_trl(trl_loss, name, theirs, epsilon):
    s, s_ref, n = random_pairs(8)
    expected = trl_loss(theirs, s, s_ref, epsilon).mean()
    torch.testing.assert_close(lab_loss(name, s, s_ref, n), expected)


def test_ipo_of_trl_is_given_means_and_ours_makes_them(trl_loss):
    s, s_ref, n = random_pairs(8)
    torch.testing.assert_close(lab_loss("ipo", s, s_ref, n), trl_loss("ipo", s / n, s_ref / n).mean())


def test_delta_runs_as_in_trl_028_over_batches_of_equal_size(trl_loss):
    torch.manual_seed(6)
    delta, n_pair = 0.0, 0
    for _ in range(3):
        s, s_ref = -30 * torch.rand(4, 2), -30 * torch.rand(4, 2)
        r = 0.1 * (s - s_ref)
        delta, n_pair = mpo.update_delta(delta, n_pair, r)
        near(mpo.bco_loss(r[:, 0], r[:, 1], delta), trl_loss("bco_pair", s, s_ref).mean())


# ---- log-probabilities: a pair as one row ----


def test_the_row_in_the_drawing():
    row = mpo.pair_row([1, 9, 50, 51], [60, 2], [70, 71, 2])
    assert row["tokens"].tolist() == [1, 9, 50, 51, 60, 2, 70, 71, 2]
    assert row["part"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert row["predictor"].tolist()[4:] == [3, 4, 3, 6, 7]
    assert row["labels"].tolist() == [IGNORE] * 4 + [60, 2, 70, 71, 2]


def two_rows(vlm, tok, record, pixels, template="vicuna_v1"):
    """(s, n) of both answers the usual way: two rows, all logits, their log-softmax in float32."""
    found = []
    n_visual = [vlm.cfg.vision.n_token] * len(pixels)
    for answer in (record["chosen"], record["rejected"]):
        turns = [("human", record["question"]), ("gpt", answer)]
        tokens, labels = encode_conversation(tok, turns, template, n_visual)
        logits = vlm(torch.tensor([tokens]), pixels if len(pixels) else None)[0]
        log_probs = logits.float().log_softmax(-1)
        of_answer = [log_probs[t - 1, y] for t, y in enumerate(labels) if y != IGNORE]
        found.append((sum(of_answer), len(of_answer)))
    return found


def test_one_row_gives_the_sums_of_two_and_padding_prompt_and_picture_count_zero(vlm, tok, folder):
    made = examples(folder, tok, vlm)
    s, n_token = mpo.pair_log_probs(vlm, mpo.collate_pairs([made[i] for i in range(4)], tok.pad))
    for i, record in enumerate(PAIRS):
        for k, (value, count) in enumerate(two_rows(vlm, tok, record, made[i]["pixels"])):
            near(s[i, k], value.item(), 1e-4)
            assert n_token[i, k] == count
        alone, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([made[i]], tok.pad))
        torch.testing.assert_close(alone[0], s[i], atol=1e-4, rtol=0)


def test_gradients_through_one_row_are_those_of_two(vlm, tok, folder):
    made = examples(folder, tok, vlm)
    weight = torch.tensor([[0.3, -0.7], [1.0, 0.2], [-0.5, 0.5], [0.1, 0.9]])

    def gradient(value):
        vlm.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}

    total = 0
    for i, record in enumerate(PAIRS):
        for k, (value, _) in enumerate(two_rows(vlm, tok, record, made[i]["pixels"])):
            total = total + weight[i, k] * value
    usual = gradient(total)
    s, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([made[i] for i in range(4)], tok.pad))
    ours = gradient((s * weight).sum())
    assert ours.keys() == usual.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], usual[name], atol=2e-5, rtol=1e-3)
    vlm.zero_grad()


def test_the_two_answers_cannot_see_each_other(vlm, tok, folder):
    example = examples(folder, tok, vlm)[0]
    s, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([example], tok.pad))
    changed = dict(example, tokens=example["tokens"].clone())
    changed["tokens"][example["part"] == mpo.CHOSEN] = 100
    other, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([changed], tok.pad))
    assert other[0, 1] == s[0, 1]
    assert other[0, 0] != s[0, 0]


@pytest.mark.parametrize("template", ["llava_v0", "prism_pure", "llava_llama_2", "plain"])
def test_every_template_has_one_row_for_two(vlm, tok, folder, template):
    example = examples(folder, tok, vlm, template=template)[0]
    s, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([example], tok.pad))
    for k, (value, _) in enumerate(two_rows(vlm, tok, PAIRS[0], example["pixels"], template)):
        near(s[0, k], value.item(), 1e-4)


# ---- training ----


def test_the_first_step_costs_its_coin_flips_and_the_nll(tiny, folder, vlm, tok):
    assert go(tiny, folder) == 0
    first = log("run")[0]
    made = examples(folder, tok, vlm)
    nll = 0
    for i, record in enumerate(PAIRS):
        (s, n_token), _ = two_rows(vlm, tok, record, made[i]["pixels"])
        nll -= float(s) / n_token / 4
    near(first["loss"], 0.8 * math.log(2) + 0.4 * math.log(2) + nll)
    near(first["margin"], 0)
    near(first["delta"], 0)
    assert first["pairs"] == 4
    logged = "reward_chosen reward_rejected margin accuracy logp_chosen logp_rejected delta dpo bco sft"
    assert first.keys() >= set(logged.split())
    assert Image.open("run/mpo.png").size == (800, 760)
    assert Path("run/loss.png").exists()


def test_the_policy_without_its_lora_is_the_reference(tiny, folder):
    for kind in ("precomputed", "lora-off"):
        assert go(tiny, folder, "--reference", kind, "--lora-r", 4, "--train", "llm", out=kind) == 0
    assert losses("precomputed") == pytest.approx(losses("lora-off"), abs=1e-6)
    assert abs(log("lora-off")[-1]["margin"]) > 0.01


def test_lora_off_without_a_lora_is_refused(tiny, folder, capfd):
    assert go(tiny, folder, "--reference", "lora-off") == 1
    assert "give --lora-r N --train llm" in errors(capfd)[-1]


def test_the_reference_of_a_run_is_kept_in_its_folder(tiny, folder, vlm, tok):
    assert go(tiny, folder, "--train", "connector,llm,vision") == 0
    kept = torch.load("run/reference.pt", weights_only=True)[:, 1:].float()
    made = examples(folder, tok, vlm)
    expected, _ = mpo.pair_log_probs(vlm, mpo.collate_pairs([made[i] for i in range(4)], tok.pad))
    torch.testing.assert_close(kept, expected.detach(), atol=1e-4, rtol=0)
    assert abs(log("run")[-1]["margin"]) > 0.1  # the policy has moved, tower included


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--micro-batch-size", 1],
        ["--token-budget", 300],
        ["--weights", "bfloat16"],
        ["--dtype", "bfloat16"],
        ["--lora-r", 4, "--train", "llm", "--reference", "lora-off"],
    ],
)
def test_before_the_first_step_every_reward_is_exactly_zero(tiny, folder, flags):
    assert go(tiny, folder, *flags) == 0
    first, *_, last = log("run")
    assert first["reward_chosen"] == first["reward_rejected"] == first["delta"] == 0
    assert last["reward_chosen"] != 0


@pytest.mark.parametrize("at_first", ["missing", "another"])
def test_a_pair_that_the_reference_has_not_seen_so_is_never_trained_on(tiny, folder, monkeypatch, at_first):
    os.rename("b.png", "away.png")
    if at_first == "another":
        Image.new("RGB", (20, 40), "green").save("b.png")
    with monkeypatch.context() as patch:
        die_at(patch, mpo.Preferring, "loss", call=4)
        assert in_child(lambda: go(tiny, folder)) == 9
    os.replace("away.png", "b.png")
    assert go(tiny, folder, "--resume") == 0
    before, *_, after = log("run")
    assert before["pairs"] == (2 if at_first == "missing" else 4)
    assert after["pairs"] == 2
    assert all("the reference was asked about another pair" in reason for reason in after["skipped"])


def test_minutes_of_preferring_are_the_steps_that_fit_from_a_fresh_delta(tiny, folder, steps_of_a_second):
    assert go(tiny, folder, "--minutes", 0.2) == 0
    assert go(tiny, folder, "--max-steps", 3, out="same") == 0
    assert losses("run") == losses("same") and len(losses("run")) == 3
    assert [line["delta"] for line in log("run")] == [line["delta"] for line in log("same")]


def test_a_reference_is_asked_about_no_more_pairs_than_the_steps_will_show(tiny, folder):
    assert go(tiny, folder, "--batch-size", 1, "--max-steps", 3) == 0
    checksums_and_sums = torch.load("run/reference.pt", weights_only=True)
    assert checksums_and_sums.isnan().all(1).sum() == checksums_and_sums.isnan().any(1).sum() == 1


def test_the_held_out_loss_of_a_token_is_not_drawn_beside_the_loss_of_a_pair():
    for panels in mpo.Preferring.plots.values():
        for names in panels.values():
            assert "val_loss" not in names.values() or len(names) == 1


def test_a_dry_run_of_preferences_says_their_length_and_reads_no_weights(tiny, folder, capfd):
    assert go(tiny, folder, "--dry-run") == 0
    assert "in 4 of them" in capfd.readouterr().out
    assert not Path("run").exists()


def test_a_resumed_run_without_its_reference_says_so(tiny, folder, capfd):
    assert go(tiny, folder) == 0
    Path("run/reference.pt").unlink()
    assert go(tiny, folder, "--resume") == 1
    assert "reference.pt: cannot be read" in errors(capfd)[-1]


def test_micro_batches_change_nothing_but_delta(tiny, folder):
    for size in (4, 1):
        assert go(tiny, folder, "--micro-batch-size", size, "--w-q", 0, out=f"by{size}") == 0
    assert losses("by4") == pytest.approx(losses("by1"), abs=1e-4)


def die_at(monkeypatch, owner, name, call):
    """The process ends, as if killed, in this call of owner.name."""
    original, calls = getattr(owner, name), []

    def dying(*args, **flags):
        calls.append(None)
        if len(calls) == call:
            os._exit(9)
        return original(*args, **flags)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("name, call", [("loss", 4), ("ask_reference", 1)])
def test_an_interrupted_run_ends_where_the_whole_one_does(tiny, folder, monkeypatch, name, call):
    assert go(tiny, folder, out="whole") == 0
    with monkeypatch.context() as patch:
        die_at(patch, mpo.Preferring, name, call)
        assert in_child(lambda: go(tiny, folder)) == 9
    assert go(tiny, folder, "--resume") == 0
    whole, resumed = log("whole"), log("run")
    for line in whole + resumed:
        del line["time"]
    assert whole == resumed  # delta and rewards included
    assert Path("whole/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


def test_a_step_that_fails_leaves_no_trace_in_the_delta_that_is_saved(tiny, folder, monkeypatch):
    original, calls = mpo.Preferring.loss, []

    def loss(*args):
        calls.append(None)
        mean, more = original(*args)
        return mean * (float("nan") if len(calls) == 4 else 1), more

    assert go(tiny, folder, out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(mpo.Preferring, "loss", loss)
        assert go(tiny, folder) == 1
    assert go(tiny, folder, "--resume") == 0
    assert [line.get("delta") for line in log("whole")] == [line.get("delta") for line in log("run")]


def test_a_huge_loss_is_drawn_and_ends_no_run(tiny, folder, capfd):
    assert go(tiny, folder, "--w-q", "1e19", "--max-steps", 1) == 0
    assert "is not drawn" not in capfd.readouterr().out


@pytest.mark.parametrize("w_p, w_q, w_g", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_every_term_trains(tiny, folder, w_p, w_q, w_g):
    weights = ["--w-p", w_p, "--w-q", w_q, "--w-g", w_g]
    assert go(tiny, folder, *weights, "--max-steps", 12, "--save-every", 0) == 0
    assert losses("run")[-1] < losses("run")[0]


@pytest.mark.parametrize("name", lab_losses.NAMES)
def test_every_loss_of_the_ablation_trains(tiny, folder, name):
    program = lambda words: mpo.main(words, lab_losses.LossConfig, lab_losses.Comparing)
    flags = ["--loss", name, "--w-g", 0, "--max-steps", 12, "--save-every", 0]
    assert go(tiny, folder, *flags, program=program) == 0
    assert losses("run")[-1] < losses("run")[0]
    assert name in log("run")[0]
    assert go(tiny, folder, *flags, "--w-p", 1, program=program) == 1  # it would change nothing


def test_four_pairs_are_told_apart_in_forty_steps(tiny, folder):
    assert go(tiny, folder, "--max-steps", 40, "--save-every", 0, "--lr", "5e-3") == 0
    first, *_, last = log("run")
    assert last["accuracy"] == 1
    assert last["margin"] > 1
    assert last["sft"] < 0.5 * first["sft"]


# ---- bad pairs ----


def test_bad_pairs_are_counted_and_named_and_never_trained_on(tiny, folder, capfd):
    good = PAIRS[0]
    without_rejected = {key: value for key, value in good.items() if key != "rejected"}
    bad = [
        (dict(good, rejected=" "), "answer"),
        (dict(good, rejected=good["chosen"] + " "), "same answer"),
        (dict(good, image="gone.png"), "gone.png"),
        (dict(good, chosen="word " * 300), "allowed"),
        (without_rejected, "rejected"),
        (dict(good, image="../secret.png"), "outside"),
        (dict(good, question=7), "conversation"),
    ]
    write(folder / "mixed.jsonl", [good] + [record for record, _ in bad])
    with open("mixed.jsonl", "a") as file:
        file.write('{"image": "a.png", "question"\n')
    words = [word for _, word in bad] + ["JSON"]

    flags = ["--batch-size", 9, "--max-steps", 1]
    assert go(tiny, folder, *flags, data="mixed.jsonl") == 0
    (line,) = log("run")
    assert line["pairs"] == 1
    assert len(line["skipped"]) == 8
    for number, word in enumerate(words, 2):
        place = f"mixed.jsonl, line {number}"
        assert any(place in reason and word in reason for reason in line["skipped"]), (
            number,
            word,
            line["skipped"],
        )
    assert "8 of 9 records skipped" in capfd.readouterr().out
    assert go(tiny, folder, "--bad-records", "stop", out="b", data="mixed.jsonl") == 1
    assert "mixed.jsonl, line " in errors(capfd)[-1]


def test_the_same_row_costs_the_same_beside_a_bad_pair(tiny, folder):
    write(folder / "one.jsonl", PAIRS[:1])
    write(folder / "two.jsonl", [PAIRS[0], dict(PAIRS[1], rejected="")])
    assert go(tiny, folder, "--batch-size", 1, "--max-steps", 1, out="one", data="one.jsonl") == 0
    assert go(tiny, folder, "--batch-size", 2, "--max-steps", 1, out="two", data="two.jsonl") == 0
    near(losses("one")[0], losses("two")[0])


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--data", "none.jsonl"], "No such file"),
        (["--beta", "0"], "above 0"),
        (["--reference", "none"], "--reference"),
        (["--model", "toy"], "is a preset"),
        (["--stage", "finetune"], "--stage"),
        (["--w-p", "-1"], "at least 0"),
        (["--split-questions"], "--split-questions"),
    ],
)
def test_a_flag_that_cannot_be_is_one_clear_line(tiny, folder, capfd, flags, word):
    assert go(tiny, folder, *flags) == 1
    said = errors(capfd)
    assert len(said) == 1
    assert word in said[0]


def test_check_finds_pairs_without_a_rejected_answer(tiny, folder, capsys):
    flags = ["--image-root", folder, "--model", tiny, "--workers", 0]
    write(folder / "pairs.jsonl", PAIRS[:2])
    assert call(show.main, "check", "pairs.jsonl", *flags) == 0
    write(folder / "pairs.jsonl", [PAIRS[0], dict(PAIRS[1], rejected=None)])
    assert call(show.main, "check", "pairs.jsonl", *flags) == 1
    said = capsys.readouterr().out
    assert "1 good, 1 wrong" in said
    assert "a pair has all three as text" in said


def test_preferences_over_a_lora_train_what_can_be_opened(tiny, folder):
    lora = ["--lora-r", 4, "--train", "llm", "--save-every", 0]
    assert go(tiny, folder, *lora, out="one") == 0
    assert go("one", folder, *lora, out="two") == 0
    assert log("two")[0]["margin"] == 0
    one, _ = sample.open_asked(ModelConfig(model="one"))
    two, tok = sample.open_asked(ModelConfig(model="two"))
    moved = [not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters())]
    assert any(moved)
    assert sample.answer(two, tok, [sample.encode_question(two, tok, "Why?")], 4)


@pytest.fixture
def meta(folder):
    """A meta.json as MMPR's, of a file about a picture, twice, and of three tenths of a file without."""
    (folder / "red").mkdir()
    os.rename("a.png", "red/a.png")
    write(folder / "red.jsonl", [PAIRS[0]] * 3)
    write(folder / "text.jsonl", [dict(PAIRS[3], chosen=f"{i} legs") for i in range(10)])
    meta = {
        "red": {
            "root": "red",
            "annotation": "red.jsonl",
            "data_augment": True,
            "max_dynamic_patch": 12,
            "repeat_time": 2,
            "length": 3,
        },
        "text": {"root": ".", "annotation": "text.jsonl", "repeat_time": 0.3},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def test_meta_json_mixes_files_with_their_own_roots_and_repeats(tiny, folder, meta, tok, vlm):
    made = examples(folder, tok, vlm, "meta.json")
    assert [len(made[i]["pixels"]) for i in range(len(made))] == [1] * 6 + [0] * 3
    drawn = {str(made[i]["tokens"].tolist()) for i in range(6, 9)}
    assert len(drawn) == 3
    assert go(tiny, folder, data="meta.json") == 0
    assert log("run")[0]["pairs"] == 4


def test_a_root_of_another_machine_in_meta_json_is_one_line(tiny, folder, meta, capfd):
    (folder / "meta.json").write_text(json.dumps({"red": dict(meta["red"], root="/cluster/images")}))
    assert go(tiny, folder, data="meta.json") == 1
    assert "Write your own paths" in errors(capfd)[-1]


# ---- building pairs: reading answers ----


@pytest.mark.parametrize(
    "text, final",
    [
        ("First.\nSecond.\nFinal answer: 4", "4"),
        ("Final answer: 3 at first.\nNo.\nFinal answer: 4", "4"),
        ("一。\n二。\n答案: 四", "四"),
    ],
)
def test_the_final_answer_is_behind_the_last_trigger(text, final):
    assert pairs.parse_answer(text)[1] == final


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "Final answer: 4",
        "One line. Final answer: 4",
        "a\nFinal answer: 4",
        "a\nb\nFinal answer:",
        "a\nb\nFinal answer: 4\nor 5",
        "\n\nFinal answer: 4",
        "a\nFinal answer: 1\nFinal answer: 2\nFinal answer: 3",
    ],
)
def test_other_forms_are_no_answer(text):
    assert pairs.parse_answer(text) is None


@pytest.mark.parametrize(
    "said, truth, right",
    [
        ("Yes", "yes", True),
        ("the cat.", "cat", True),
        ("two", "2", True),
        ("1,000", "1000", True),
        ("12", "2", False),
        ("3.1416", "3.14159", True),
        ("3.2", "3.14159", False),
        ("90 degrees", "90", True),
        ("nan", "4", False),
        ("B. dog", "B", True),
        ("(B)", "B", True),
        ("C", "B", False),
        ("bird", "B", False),
        ("", "a", False),
        ("[0.10, 0.10, 0.50, 0.50]", "[0.10, 0.10, 0.50, 0.55]", True),
        ("[0.60, 0.60, 0.90, 0.90]", "[0.10, 0.10, 0.50, 0.55]", False),
        ("-5", "5", False),
        ("+", "+", True),
        ("-", "+", False),
        ("The", "the", True),
        ("3-5", "35", False),
        ("1,2", "12", False),
        # a letter is an option, and one alone
        ("c", "C", True),
        ("(c)", "C", True),
        ("C.", "C", True),
        ("(C) cat", "C", True),
        ("**C**", "C", True),
        ("A dog", "A", False),
        ("A red car at the top", "A", False),
        ("A or C", "A", False),
        ("(A) or (C)", "A", False),
        ("A. C.", "A", False),
        ("A) C)", "A", False),
        ("(A) (C) cat", "A", False),
        ("A.\nC.", "A", False),
        ("A. & C.", "A", False),
        ("A. A", "A", True),
        ("A. U.S. flag", "A", True),
        ("A. I see a cat", "A", True),
        ("B and C", "B", False),
        ("I think B", "I", False),
        # a mark between words is a space, or nothing
        ("black-and-white", "black and white", True),
        ("red/blue", "red blue", True),
        ("x-ray", "x ray", True),
        ("xray", "x-ray", True),
        ("It's a dog?", "it's dog", True),
    ],
)
def test_the_judge(said, truth, right):
    assert is_right(said, truth) is right


def test_the_step_by_step_prompt_is_the_authors_and_drops_the_short_answer_ending():
    asked = "How many?\n<image>\nAnswer the question using a single word or phrase."
    assert pairs.ask_step_by_step(asked, 1) == (
        "<image>\nYour task is to answer the question below. Give step by step reasoning before you answer, "
        "and when "
        'you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\nHow many?'
    )
    asked = "Is it?\nAnswer the question using a single word or phrase."
    assert pairs.ask_step_by_step(asked, 1) == "<image>\n" + COT + "Is it?"
    asked = "<image>\n" + COT + "Is it?"
    assert pairs.ask_step_by_step(asked, 1) == asked


def test_a_right_answer_is_written_as_the_truth_is():
    for text in ("a\nb\n**Final answer:** **Red**", "a\nb\nFinal answer: A Red one"):
        assert pairs.write_as_truth(*pairs.parse_answer(text), "red") == "a\nb\nFinal answer: red"


# ---- building pairs: the program ----


@pytest.fixture
def asked(folder):
    """Six questions that can be used; a lost picture, no picture and no question after them."""
    questions = [{"image": "a.png", "question": f"How many? {i}", "answer": str(i % 3)} for i in range(6)]
    questions.append({"image": "gone.png", "question": "Where?", "answer": "there"})
    questions.append({"question": "Why?", "answer": "so"})
    questions.append({"image": "a.png"})
    return write(folder / "questions.jsonl", questions)


@pytest.fixture
def described(folder):
    chosen = "A red cat and a big dog."
    return write(
        folder / "questions.jsonl", [{"image": "a.png", "question": "<image>\nDescribe.", "chosen": chosen}]
    )


def build(tiny, folder, method, *flags, out="pairs/made.jsonl"):
    base = [
        "--method",
        method,
        "--model",
        tiny,
        "--data",
        folder / "questions.jsonl",
        "--image-root",
        folder,
        "--out",
        out,
    ]
    base += ["--samples", 4, "--batch-size", 8, "--max-new-tokens", 12]
    return run_program(lambda: pairs.main([str(word) for word in [*base, *flags]]))


@pytest.fixture
def talkative(monkeypatch):
    """says(text, ...) -> the prompts of each call. The model answers from this list in turn.

    What ends with ... is cut off.
    """
    tok = Tokenizer(ROOT / "assets/toy-vicuna")

    def says(*texts):
        calls = []

        def draw_answers(vlm, tok_, prompts, cfg, seed):
            calls.append(prompts)
            answers = []
            for i in range(len(prompts)):
                text = texts[(seed + i) % len(texts)]
                ids = tok.encode(text)
                if not text.endswith("..."):
                    ids.append(tok.eos)
                answers.append(sample.read_answer(tok, "vicuna_v1", ids))
            return answers

        monkeypatch.setattr(pairs, "draw_answers", draw_answers)
        return calls

    return says


def lines(path):
    return [json.loads(line) for line in open(path)]


def stats():
    return json.loads(Path("pairs/made.jsonl.stats.json").read_text())


def test_right_answers_meet_wrong_ones_and_those_without_form(tiny, folder, asked, talkative, capfd):
    begin = "One.\nTwo.\nFinal "
    talkative(begin + "answer: 1", begin + "answer: 2", "I do not know.", begin + "...")
    assert build(tiny, folder, "correctness") == 0
    made = lines("pairs/made.jsonl")
    found = {(pair["answer_gt"], pair["rule"], pairs.parse_answer(pair["chosen"])[1]) for pair in made}
    assert found == {("1", "answer", "1"), ("1", "format", "1"), ("2", "answer", "2"), ("2", "format", "2")}
    for pair in made:
        assert pair["question"].startswith("<image>\nYour task")
        assert pair["image"] == "a.png"

    said = capfd.readouterr().out
    assert "no such" in said
    assert "tokens generated per pair" in said
    counts = stats()["counts"]
    assert counts["answers empty or cut off"] == 7
    assert counts["questions none right"] == 3
    assert counts["skipped"] == 2
    assert counts["tokens generated per pair"] == round(counts["tokens"] / len(made), 1)


def test_a_truth_that_is_worked_out_is_judged_by_its_end(tiny, folder, talkative):
    question = {"image": "a.png", "question": "How many?", "answer": "1 + 1 = 2.\nFinal answer: 2"}
    write(folder / "questions.jsonl", [question])
    talkative("One.\nTwo.\nFinal answer: 2", "One.\nTwo.\nFinal answer: 3")
    assert build(tiny, folder, "correctness") == 0
    (pair,) = lines("pairs/made.jsonl")
    assert pairs.parse_answer(pair["chosen"])[1] == "2"
    assert pair["answer_gt"] == "2"


def test_a_prediction_within_the_other_is_no_pair_and_pairs_are_capped(tiny, folder, asked, talkative):
    talkative(
        "One.\nTwo.\nFinal answer: 1",
        "One.\nTwo.\nFinal answer: 1 or 2",
        "I.\nJ.\nFinal answer: 5",
        "K.\nL.\nFinal answer: 6",
    )
    assert build(tiny, folder, "correctness", "--pairs-per-question", 1) == 0
    counts = stats()["counts"]  # two questions have the truth 1
    assert counts["pairs"] == counts["pairs in doubt"] == counts["pairs beyond the cap"] == 2


def test_dropout_keeps_words_and_completes_them_without_the_picture(tiny, folder, described, tok, talkative):
    calls = talkative("blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--ratio", 0.5) == 0
    (pair,) = lines("pairs/made.jsonl")
    assert pair["chosen"] == "A red cat and a big dog."
    assert pair["rejected"] == "A red cat blue bird."
    assert pair["image"] == "a.png"

    for_chosen, ((ids, pictures),) = calls
    assert for_chosen == []
    assert pictures == []
    turns = [("human", "Describe."), ("gpt", "A red cat")]
    whole, _ = encode_conversation(tok, turns, "vicuna_v1", [])
    assert ids == whole[:-1]  # exactly as training would write it, left open


@pytest.mark.parametrize("ratio, begin", [(0.25, "A"), (0.75, "A red cat and a"), (0.0, "")])
def test_the_ratio_counts_words_and_rounds_down(tiny, folder, described, talkative, ratio, begin):
    talkative("blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--ratio", ratio) == 0
    assert lines("pairs/made.jsonl")[0]["rejected"] == f"{begin} blue bird.".strip()


@pytest.mark.parametrize("text, why", [("and a ...", "cut off"), ("and a big dog.", "empty or the same")])
def test_cut_off_and_same_completions_make_no_pair(tiny, folder, described, talkative, capfd, text, why):
    talkative(text)
    assert build(tiny, folder, "dropout-ntp") == 1
    assert "not one pair" in errors(capfd)[-1]
    assert stats()["counts"][f"completions {why}"] == 1


def test_a_pair_keeps_the_pictures_of_its_question_whatever_the_record_calls_them(tiny, folder, talkative):
    talkative("one two three four", "blue bird.")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    later = [{"from": "human", "value": "<image>\nAnd now?"}, {"from": "gpt", "value": "That."}]
    records = [{"images": ["a.png"], "question": "What?"}]
    records.append({"image": ["a.png", "b.png"], "conversations": turns + later})
    write(folder / "questions.jsonl", records)
    assert build(tiny, folder, "dropout-ntp") == 0
    assert [pair["image"] for pair in lines("pairs/made.jsonl")] == ["a.png", "a.png", ["a.png", "b.png"]]


def test_without_a_chosen_answer_the_model_gives_its_own_with_the_picture(tiny, folder, asked, talkative):
    calls = talkative("one two three four", "blue bird.")
    assert build(tiny, folder, "dropout-ntp", "--batch-size", 2) == 0
    assert len(calls) == 2 * 5
    (_, with_picture), *_ = calls[0]
    (_, without), *_ = calls[1]
    assert with_picture and not without


def test_dropout_skips_a_question_without_a_picture(tiny, folder, asked, talkative, capfd):
    talkative("one two three four", "blue bird.")
    assert build(tiny, folder, "dropout-ntp") == 0
    assert {pair["image"] for pair in lines("pairs/made.jsonl")} == {"a.png"}
    assert stats()["counts"]["skipped"] == 3
    where = "questions.jsonl, line 8 (id '7'), question 1"
    assert f"{where}: no picture that could be left out" in capfd.readouterr().out


@pytest.mark.parametrize("limit", [1, 4, 7, 8, 100])
def test_a_limit_takes_so_many_questions_spread_over_the_file(tiny, folder, asked, talkative, limit):
    calls = talkative("One.\nTwo.\nFinal answer: 1", "One.\nTwo.\nFinal answer: 2")
    build(tiny, folder, "correctness", "--limit", limit)
    assert stats()["counts"]["questions"] == min(limit, 9)
    assert len(calls) == math.ceil(min(limit, 9) / 2)


def test_a_model_that_answers_directly_is_told_of_the_format_and_makes_pairs_without_it(
    tiny, folder, asked, talkative, capfd
):
    talkative("1", "2", "two cats")
    assert build(tiny, folder, "correctness", "--limit", 4) == 1
    said = capfd.readouterr().out
    assert '"Final answer: ...", or --prompt direct: ' in said
    assert stats()["counts"]["answers no format"] == 3 * 4

    assert build(tiny, folder, "correctness", "--limit", 4, "--prompt", "direct") == 0
    found = {(pair["question"], pair["chosen"], pair["rejected"]) for pair in lines("pairs/made.jsonl")}
    assert ("<image>\nHow many? 2", "2", "two cats") in found


def test_other_questions_under_the_same_name_are_refused(tiny, folder, asked, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        die_at(patch, pairs, "draw_answers", call=2)
        assert in_child(lambda: build(tiny, folder, "correctness")) == 9
    text = asked.read_text()
    asked.write_text(text.replace("How many", "How few"))
    assert build(tiny, folder, "correctness") == 1
    assert "made.jsonl.part was written with data and weights" in errors(capfd)[-1]


@pytest.mark.parametrize("method, size", [("correctness", 8), ("dropout-ntp", 2)])
def test_a_killed_builder_goes_on_and_writes_what_an_undisturbed_one_would(
    tiny, folder, asked, method, size, monkeypatch
):
    # A random model never answers: here anything is an answer, and a whole one.
    monkeypatch.setattr(pairs, "is_right", lambda said, truth: True)
    monkeypatch.setattr(pairs, "parse_answer", lambda text, n=2: (text, text[:3]) if len(text) % 2 else None)
    monkeypatch.setattr(pairs, "write_as_truth", lambda text, *_: text)
    whole = lambda tok, template, ids: sample.Answer(tok.decode(ids).strip(), True, ids)
    for program in (sample, pairs):
        monkeypatch.setattr(program, "read_answer", whole)
    flags = ["--batch-size", size]
    assert build(tiny, folder, method, *flags, out="whole.jsonl") == 0

    with monkeypatch.context() as patch:
        die_at(patch, pairs, "draw_answers", call=3)
        assert in_child(lambda: build(tiny, folder, method, *flags, out="made.jsonl")) == 9
    assert not Path("made.jsonl").exists()
    with open("made.jsonl.part", "a") as file:
        file.write('{"pairs": [')  # the kill came while a line was written
    assert build(tiny, folder, method, *flags, "--seed", 1, out="made.jsonl") == 1  # another flag: refused
    assert build(tiny, folder, method, *flags, out="made.jsonl") == 0
    assert Path("made.jsonl").read_text() == Path("whole.jsonl").read_text()
    assert not Path("made.jsonl.part").exists()


def test_ten_kills_lose_nothing_and_make_nothing_twice(tiny, folder, monkeypatch):
    questions = [{"image": "a.png", "question": f"What? {i}"} for i in range(30)]
    write(folder / "questions.jsonl", questions)
    whole = lambda tok, template, ids: sample.Answer(tok.decode(ids).strip(), True, ids)
    for program in (sample, pairs):
        monkeypatch.setattr(program, "read_answer", whole)  # a random model never ends its answers
    flags = ["--batch-size", 1]
    assert build(tiny, folder, "dropout-ntp", *flags, out="whole.jsonl") == 0

    n_kill = 0
    rng = random.Random(0)
    part = Path("made.jsonl.part")
    count_lines = lambda: part.read_bytes().count(b"\n") if part.exists() else 0
    for _ in range(10):
        before = count_lines()
        wanted = before + rng.randint(0, 2)
        child = fork(target=lambda: os._exit(build(tiny, folder, "dropout-ntp", *flags, out="made.jsonl")))
        child.start()
        while child.is_alive() and count_lines() < wanted:
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        n_kill += child.exitcode == -9
        assert count_lines() >= before or Path("made.jsonl").exists()
    assert n_kill >= 8
    assert Path("made.jsonl").exists() or build(tiny, folder, "dropout-ntp", *flags, out="made.jsonl") == 0
    assert Path("made.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert Path("made.jsonl.stats.json").read_bytes() == Path("whole.jsonl.stats.json").read_bytes()


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--method", "corectness"], "did you mean correctness"),
        (["--ratio", "1"], "below 1"),
        (["--samples", "0"], "at least 1"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--sampels", "3"], "--samples"),
        (["--out", "a.png"], "is there already"),
    ],
)
def test_a_wrong_flag_of_the_builder_is_one_clear_line(tiny, folder, asked, capfd, flags, word):
    assert build(tiny, folder, "correctness", *flags) == 1
    said = errors(capfd)
    assert len(said) == 1
    assert word in said[0]


# The toy's is run by test_readme.py.
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*mpo*.sh") if path.stem != "mpo-toy")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_only_flags_that_there_are(recipe, monkeypatch, folder):
    """Its command, with the folders filled in, gets as far as reading files."""
    text = (ROOT / "recipes" / recipe).read_text()
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)  # a variable's default
    (command,) = re.findall(r"mpo\.py\"? ((?:[^\n\\]|\\\n)*)", text)
    monkeypatch.setattr(mpo, "teach", lambda cfg, Task: 0)
    words = []
    for word in shlex.split(command.replace("\\\n", " ").replace('"$@"', "")):
        if word in ("$META", "$PAIRS"):
            word = str(folder / "pairs.jsonl")
        elif word.startswith("$"):
            word = str(folder)
        words.append(word)
    assert mpo.main(words) == 0
