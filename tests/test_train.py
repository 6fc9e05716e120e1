"""What a training run promises. Every name is a claim; models are tiny and random."""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
from common import ROOT, call, errors, fork, in_child, losses, tiny_config, weights
from PIL import Image

import data
import eval
import pairs
import support.plots as support_plots
import support.start as support_start
import support.threads as support_threads
import train
from benchmarks.common import question
from benchmarks.own import is_right
from conversation import Tokenizer
from data import Examples, collate
from model import IGNORE, PRESETS, VLM
from support.checkpoint import Run
from support.cli import UserError
from support.data_files import Records
from support.export import clip_json, llama_json, write_model
from support.io import lock, write_json
from support.processor import save_processor
from support.threads import make_twins


def same(a, b):
    return losses(a) == losses(b) and same_weights(a, b)


def same_weights(a, b):
    return all(torch.equal(p, weights(b)[name]) for name, p in weights(a).items())


def leftovers(out):
    return [p.name for p in Path(out).rglob(".*")]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): call do() in the middle of the n-th step from now."""

    def at_step(n, do):
        calls, original = [], train.backward

        def backward(*args):
            calls.append(None)
            if len(calls) == n:
                do()
            return original(*args)

        monkeypatch.setattr(train, "backward", backward)

    return at_step


# ---- the loss, the schedule, the order ----


@pytest.fixture
def mixed(tok, tmp_path):
    """Six records: one, two or no pictures, answers of very different length."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 40), "blue").save(tmp_path / "b.png")
    turns = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    records = [
        {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat color?", "red")},
        {
            "id": "two",
            "image": ["a.png", "b.png"],
            "conversations": turns("<image> and <image>\nBoth?", "A red one and a blue one. " * 6),
        },
        {"id": "text", "conversations": turns("How many cats are there?", "2")},
        {
            "id": "long",
            "image": "b.png",
            "conversations": turns("<image>\nSay it.", "There are 3 things. " * 12) + turns("Yes?", "yes"),
        },
        {"id": "text2", "conversations": turns("Is there a cat?", "no, there is a big dog")},
        {"id": "last", "image": "b.png", "conversations": turns("<image>\nIs it blue?", "yes")},
    ]
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    cfg = tiny_config(tok)
    examples = Examples(Records(tmp_path / "mixed.json", tmp_path), tok, "vicuna_v1", cfg.vision, "pad", 512)
    return [examples[i] for i in range(len(examples))]


def gradients(tiny, rows, size, pad, n_thread=1):
    vlm = VLM.from_pretrained(tiny)
    torch.set_num_threads(n_thread)
    models = [vlm, *make_twins(vlm, train.Answering, train.TrainConfig(compile=False))]
    loss, counts = train.backward(models, train.Answering, data.micro_batches(rows, size, pad))
    torch.set_num_threads(1)
    grads = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
    return loss, counts["supervised"], grads


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_of_any_size_give_the_loss_and_gradient_of_the_whole_batch(tiny, tok, mixed, size):
    whole, n, expected = gradients(tiny, mixed, 0, tok.pad)
    loss, m, found = gradients(tiny, mixed, size, tok.pad)
    assert m == n and math.isclose(loss, whole, rel_tol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_twins_in_threads_of_their_own_give_that_gradient_too_and_the_same_bits_each_time(tiny, tok, mixed):
    expected_loss, n, expected = gradients(tiny, mixed, 1, tok.pad)
    (loss, m, grads), again = (gradients(tiny, mixed, 1, tok.pad, n_thread=2) for _ in range(2))
    assert m == n and math.isclose(loss, expected_loss, rel_tol=1e-6) and loss == again[0]
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(grads[name], again[2][name])


def test_only_a_small_model_whose_micro_batches_may_come_in_any_order_has_twins(tiny, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    vlm, cfg = VLM.from_pretrained(tiny), train.TrainConfig(compile=False)
    twins = make_twins(vlm, train.Answering, cfg)
    assert len(twins) == 2
    for p, twin in zip(vlm.parameters(), twins[1].parameters(), strict=True):
        assert p is not twin and p.data_ptr() == twin.data_ptr() and p.requires_grad == twin.requires_grad
    with_delta = SimpleNamespace(state_dict=lambda: {"delta": 0.0})
    assert not make_twins(vlm, with_delta, cfg)
    assert not make_twins(vlm, train.Answering, replace(cfg, lora_dropout=0.1))
    assert not make_twins(vlm, train.Answering, replace(cfg, compile=True))
    monkeypatch.setattr(support_threads, "SMALL", 1000)
    assert not make_twins(vlm, train.Answering, cfg)


def test_the_loss_is_the_sum_over_supervised_tokens_divided_once(tiny, tok, mixed):
    vlm, total, n = VLM.from_pretrained(tiny), 0.0, 0
    for row in mixed:  # the oracle: one record at a time, all logits, by hand
        b = collate([row], tok.pad)
        with torch.no_grad():
            log_p = vlm(b["tokens"], b["pixels"])[0].log_softmax(-1)
        for t, label in enumerate(b["labels"][0].tolist()):
            if label != IGNORE:
                total, n = total - log_p[t - 1, label].item(), n + 1
    loss, m, _ = gradients(tiny, mixed, 2, tok.pad)
    assert m == n and math.isclose(loss, total / n, rel_tol=1e-5)


def test_a_step_without_a_usable_record_has_no_loss_and_no_gradient(tiny, tok):
    assert gradients(tiny, [{"skipped": "broken"}] * 3, 2, tok.pad) == (None, 0, {})


def test_the_learning_rate_rises_from_zero_for_the_warmup_and_falls_to_nearly_zero():
    lr = [train.lr_at(step, 100, 1.0, 0.1) for step in range(1, 101)]
    assert lr[0] == 0 and lr[1] == 0.1 and lr[10] == 1.0
    assert math.isclose(lr[55], 0.5) and 0 < lr[99] < 1e-3
    assert train.lr_at(5, 10, 1.0, 1.0) == 0.4
    # What a log of LLaVA-1.5's stage 2 has after 22 of its 5,198 steps, which are those of 665,298 records.
    assert f"{train.lr_at(23, math.ceil(665_298 / 128), 2e-5, 0.03):.4e}" == "2.8205e-06"


def test_every_epoch_shows_each_record_once_in_an_order_of_the_seed():
    order = [i for batch in data.draw_steps([1] * 10, 4, 5, seed=1) for i in batch]
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert order != [i for batch in data.draw_steps([1] * 10, 4, 5, seed=2) for i in batch]
    assert [len(batch) for batch in data.draw_steps([1] * 3, 8, 2, seed=0)] == [8, 8]


def test_the_questions_of_one_record_stay_together_in_an_epoch():
    order = [i for batch in data.draw_steps([2, 1, 3], 3, 4, seed=0) for i in batch]
    first, second = order[:6], order[6:]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    for epoch in first, second:
        shown = "".join(map(str, epoch))
        assert "01" in shown and "345" in shown


def test_split_questions_look_once_at_a_picture_that_several_questions_of_a_step_are_about(go, monkeypatch):
    tiles, look = [], VLM.features
    monkeypatch.setattr(VLM, "features", lambda self, pixels: tiles.append(len(pixels)) or look(self, pixels))
    flags = ["--batch-size", 32, "--max-steps", 3]
    assert go(*flags, "--split-questions") == 0
    assert len(tiles) == 3 and max(tiles) < 32
    tiles.clear()
    assert go(*flags, out="unsplit") == 0 and set(tiles) == {32}


def test_accumulation_and_the_full_batch_train_the_same_model(go, whole):
    assert go("--micro-batch-size", 3, out="micro") == 0
    torch.testing.assert_close(losses("micro"), losses(whole), rtol=1e-4, atol=1e-4)


def test_bfloat16_trains_the_same_within_its_precision(go, whole):
    assert go("--dtype", "bfloat16", out="half") == 0
    assert losses("half") != losses(whole)
    assert all(p.dtype == torch.float32 for p in weights("half").values())
    torch.testing.assert_close(losses("half"), losses(whole), rtol=0.02, atol=0.02)


# ---- what trains ----


@pytest.mark.parametrize(
    "flags, moving",
    [
        (["--stage", "pretrain", "--data", "pretrain.json"], {"multi_modal_projector"}),
        ([], {"multi_modal_projector", "language_model"}),
        (["--train", "llm"], {"language_model"}),
        (["--train", "connector,vision"], {"multi_modal_projector", "vision_tower"}),
    ],
)
def test_each_stage_moves_its_own_parts_and_no_other(go, tiny, world, flags, moving):
    assert go("--max-steps", 2, *[world / f if f.endswith("json") else f for f in flags]) == 0
    before = weights(tiny)
    moved = [name for name, p in weights("run").items() if not torch.equal(p, before[name])]
    assert {name.split(".")[0] for name in moved} == moving


def test_the_template_of_stage_2_is_saved_with_the_model_that_of_stage_1_is_not(go, world):
    stage_1 = ["--stage", "pretrain", "--data", world / "pretrain.json"]
    assert go(*stage_1, "--template", "plain", "--max-steps", 1, out="one") == 0
    assert go("--template", "llava_v1", "--max-steps", 1, out="two") == 0
    assert VLM.from_pretrained("one").cfg.template == "vicuna_v1"
    assert VLM.from_pretrained("two").cfg.template == "llava_v1"


@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(stage="pretrain", vision="clip", llm="vicuna"), {"connector"}),
        (dict(stage="finetune", vision="clip", llm="vicuna"), {"connector", "decoder"}),
        (dict(stage="finetune", llm="vicuna"), {"vision", "connector", "decoder"}),
        (dict(stage="pretrain"), {"vision", "connector", "decoder"}),
    ],
)
def test_what_starts_from_random_weights_trains_in_either_stage(tok, flags, parts):
    vlm = VLM(tiny_config(tok))
    train.make_trainable(vlm, train.TrainConfig(model="toy", **flags))
    assert {name.split(".")[0] for name, p in vlm.named_parameters() if p.requires_grad} == parts


def test_a_preset_reads_its_ingredients_and_from_scratch_does_not(
    go, tok, tiny, world, monkeypatch, tmp_path
):
    def part(prefix):
        return {k.removeprefix(prefix): t for k, t in weights(tiny).items() if k.startswith(prefix)}

    write_model(tmp_path / "clip", part("vision_tower."), {}, clip_json(tiny_config(tok).vision))
    write_model(tmp_path / "vicuna", part("language_model."), {}, llama_json(tiny_config(tok).decoder))
    shutil.copy(tok.path, tmp_path / "vicuna")
    monkeypatch.setitem(PRESETS, "tiny", tiny_config(tok))
    monkeypatch.setitem(train.RECIPES, ("tiny", "pretrain"), dict(vision="clip", llm="vicuna", lr=0.5))
    flags = ["--model", "tiny", "--stage", "pretrain"]
    assert train.parse_flags([*flags, "--data", str(tmp_path / "vicuna/config.json")]).lr == 0.5
    flags += ["--data", world / "pretrain.json", "--max-steps", 2]
    assert go(*flags, out="warm") == go(*flags, "--from-scratch", out="cold") == 0
    warm, cold = weights("warm"), weights("cold")
    for name, p in weights(tiny).items():
        if "projector" not in name:
            assert torch.equal(p, warm[name])
            assert p.ndim < 2 or not torch.equal(p, cold[name])


def test_epochs_on_the_command_line_win_over_the_steps_of_a_recipe(world):
    flags = ["--data", str(world / "train.json")]
    assert train.parse_flags(flags).max_steps == train.RECIPES["toy", "finetune"]["max_steps"]
    assert train.parse_flags([*flags, "--epochs", "2"]).max_steps == 0


def test_the_steps_of_the_photo_preset_follow_the_number_of_records(go, world, capfd):
    n_record = len(Records(world / "train.json").split_questions())
    assert go("--model", "photo", "--max-steps", 0, "--batch-size", 128, "--dry-run") == 0
    n_step = math.ceil(10 * n_record / 128)
    assert f"steps      {n_step} of 128 records" in capfd.readouterr().out


def test_stage_2_starts_from_the_connector_of_stage_1(go, tiny, world):
    assert go("--stage", "pretrain", "--data", world / "pretrain.json", out="one") == 0
    name = "multi_modal_projector.linear_1.weight"
    learned = weights("one")[name]
    assert not torch.equal(learned, weights(tiny)[name])
    for projector in "one", "one/model.safetensors":
        vlm, _ = support_start.build(train.TrainConfig(model=str(tiny), projector=projector))
        assert torch.equal(vlm.connector.layers[0].weight, learned)


# ---- the same run again ----


def test_the_same_seed_gives_the_same_weights_whoever_prepares_the_records(go, whole):
    for n_worker in 0, 1, 2:
        out = f"by {n_worker}"
        assert go("--workers", n_worker, out=out) == 0
        assert same(whole, out)
    assert go("--seed", 1) == 0
    assert not same(whole, "run")


# Before the first checkpoint, in the step after one, between two, at the end.
@pytest.mark.parametrize("kill_at", [2, 4, 5, 8])
def test_a_killed_and_resumed_run_ends_where_the_uninterrupted_one_does(go, whole, at_step, kill_at):
    def killed():
        at_step(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        go("--save-every", 3)

    assert in_child(killed) == -signal.SIGKILL
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # a torn last line
    assert go("--save-every", 3, "--resume", "--workers", 1) == 0
    assert same(whole, "run") and leftovers("run") == []
    assert [line["step"] for line in map(json.loads, open("run/log.jsonl"))] == list(range(1, 9))


def test_augmented_pictures_are_the_same_in_a_resumed_run_and_other_ones_than_without(
    go, whole, at_step, capfd
):
    assert go("--augment", out="augmented") == 0 and not same(whole, "augmented")
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert go("--augment") == 130
    at_step(99, None)
    assert go("--augment", "--resume", "--workers", 1) == 0 and same("augmented", "run")
    assert go("--augment", "--image-mode", "hd", out="hd") == 1
    assert "--augment is for one tile" in errors(capfd)[-1]


def test_a_run_killed_three_times_still_has_its_tokenizer(go, whole, at_step):
    """The checkpoint that it came from is gone by then."""

    def killed(*flags):
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        go("--save-every", 1, *flags)

    for flags in [], ["--resume"], ["--resume"]:
        assert in_child(lambda: killed(*flags)) == -signal.SIGKILL
    assert go("--resume", "--save-every", 1) == 0 and same(whole, "run")


def open_checkpoint(checkpoint):
    """Fails where anything of it is torn."""
    VLM.from_pretrained(checkpoint)
    Tokenizer(checkpoint)
    torch.load(checkpoint / "trainer.pt", weights_only=True)


def die_at_call(k, monkeypatch):
    """End the process in the k-th of the calls that change a folder."""
    calls = []

    def counted(original):
        def call(*args, **flags):
            calls.append(None)
            if len(calls) == k:
                os._exit(9)
            return original(*args, **flags)

        return call

    for name in ("fsync", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def test_a_save_that_dies_at_any_point_leaves_the_old_checkpoint_or_the_new_one(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cfg = train.TrainConfig(model=str(tiny), out=str(out))
    run = Run(cfg, 9)
    run.vlm, run.tok = support_start.build(cfg)
    run.task = train.Answering
    run.optimizer = torch.optim.AdamW(run.vlm.parameters())

    def dying_save(k):
        die_at_call(k, monkeypatch)
        run.step = 2
        run.save()

    code, deaths = 9, 0
    while code == 9:
        shutil.rmtree(out, ignore_errors=True)
        run.step = 1
        run.save()
        code = in_child(lambda: dying_save(deaths + 1))  # noqa: B023 (it is called at once)
        names = [checkpoint.name for checkpoint in out.glob("checkpoint-*")]
        assert names and set(names) <= {"checkpoint-000001", "checkpoint-000002"}
        for name in names:
            open_checkpoint(out / name)
        deaths += code == 9
    assert code == 0 and deaths > 15 and names == ["checkpoint-000002"] and leftovers(out) == []


def test_ctrl_c_saves_the_step_and_a_second_one_ends_at_once(go, whole, at_step, capfd, ctrl_c_arrives):
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert go() == 130
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-000003"]
    assert not Path("run/config.json").exists()
    assert "step 3 is saved" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    at_step(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert go("--resume") == 130
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-000004"]
    at_step(99, None)
    assert go("--resume") == 0 and same(whole, "run")


def newest_step(out):
    return max(int(path.name.removeprefix("checkpoint-")) for path in Path(out).glob("checkpoint-*"))


def last_logged(out):
    return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_lets_the_loader_finish_the_step_which_is_saved(
    go, world, beside, monkeypatch, number, ctrl_c_arrives
):
    original = data.micro_batches

    def slow(examples, **flags):
        if examples[0]["number"] in later:  # of step 3, the loader is two ahead
            Path("there").touch()
            time.sleep(0.5)
        return original(examples, **flags)

    records = Records(world / "train.json", world)
    steps = list(data.draw_steps(records.group_sizes, 4, 8, seed=0))
    later = {rows[0] for rows in steps[2:]}
    monkeypatch.setattr(data, "micro_batches", slow)

    def alone():
        os.setpgrp()
        os._exit(go("--workers", 1, "--save-every", 0))

    child = beside(alone)
    wait_for("there")
    os.killpg(child.pid, number)
    child.join(60)
    assert child.exitcode == 130 and newest_step("run") == last_logged("run") < 8


def test_under_torchrun_a_signal_comes_twice_and_the_step_is_saved(eight_steps, tmp_path, beside):
    def train_under_torchrun():
        os.setsid()
        torchrun = ["--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")]
        flags = [*eight_steps, "--max-steps", 100_000, "--save-every", 0, "--out", tmp_path / "run"]
        torch.distributed.run.main([*torchrun, *map(str, flags)])

    child = beside(train_under_torchrun)
    log = tmp_path / "run/log.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    os.killpg(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode not in (0, None)
    assert newest_step(tmp_path / "run") == last_logged(tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(go, whole):
    shutil.copytree(whole, "run")
    assert go("--resume") == 0 and same(whole, "run")


# ---- two runs in one folder ----


@pytest.fixture
def beside():
    """beside(function) runs it in another process, which lives on until the test is over or kills it."""
    children = []

    def beside(function):
        children.append(fork(target=function))
        children[-1].start()
        return children[-1]

    yield beside
    for child in children:
        child.kill()
        child.join()


def wait_for(path):
    wait_until(lambda: Path(path).exists())


def wait_until(is_so):
    began = time.time()
    while not is_so():
        assert time.time() - began < 60
        time.sleep(0.01)


def processes():
    """{pid: (state, pid of the parent)} of this machine, if it is Linux."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            found[int(file.parent.name)] = state, int(parent)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_in_which_a_run_still_writes_is_refused_until_that_is_killed(
    go, whole, at_step, beside, capfd, workers
):
    def stop_at_5():
        at_step(5, lambda: (Path("there").touch(), time.sleep(600)))
        go("--workers", workers)

    child = beside(stop_at_5)
    wait_for("there")
    loaders = [pid for pid, (_, parent) in processes().items() if parent == child.pid]
    assert len(loaders) == workers
    before = sorted(path.name for path in Path("run").iterdir())
    capfd.readouterr()
    for flags in [], ["--resume"]:
        assert go(*flags) == 1 and "run/lock: held by another run" in errors(capfd)[-1]
    assert sorted(path.name for path in Path("run").iterdir()) == before and not Path("run.1").exists()
    child.kill()
    child.join()
    assert go("--resume") == 0 and same(whole, "run")
    # No loader process outlives its parent.
    wait_until(lambda: all(processes().get(pid, "Z")[0] == "Z" for pid in loaders))


def test_a_folder_that_was_made_beforehand_has_one_writer_too(go, beside, at_step, capfd):
    def train_slowly():
        at_step(1, lambda: (Path("there").touch(), time.sleep(600)))
        go("--workers", 0)

    Path("run").mkdir()
    beside(train_slowly)
    wait_for("there")
    assert go() == 1 and "run/lock: held by another run" in errors(capfd)[-1]


def test_of_two_runs_that_begin_at_once_one_is_refused(go, beside, monkeypatch, capfd):
    original = support_start.VLM.from_pretrained

    def from_pretrained(*args, **flags):
        beside(lambda: (lock("run/lock"), Path("there").touch(), time.sleep(600)))
        wait_for("there")
        return original(*args, **flags)

    monkeypatch.setattr(support_start.VLM, "from_pretrained", from_pretrained)
    assert go() == 1 and "held by another run" in errors(capfd)[-1]


@pytest.mark.parametrize("program, held, flags", [
    (pairs, ".pairs.jsonl.lock", ["--method", "correctness", "--out", "pairs.jsonl"]),
    (eval, "score/lock", ["--out", "score"]),
])
def test_pairs_and_scores_have_one_writer_too(tiny, world, tmp_path, monkeypatch, beside, capfd, program,
                                              held, flags):
    monkeypatch.chdir(tmp_path)
    beside(lambda: (lock(held), Path("there").touch(), time.sleep(600)))
    wait_for("there")
    flags += ["--model", tiny, "--data", world / "val.jsonl", "--image-root", world, "--limit", 1]
    assert call(program.main, *flags) == 1 and f"{held}: held by another run" in errors(capfd)[-1]


# ---- a full disk ----


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # larger writes fail, as on a full disk


def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(go, whole, at_step, capfd):
    def full():
        at_step(3, small_files)
        return go()

    assert in_child(full) == 1
    (error,) = errors(capfd)
    assert "could not be written" in error and "--resume" in error
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-000002"]
    assert leftovers("run") == []
    assert go("--resume") == 0 and same(whole, "run")


def test_a_full_disk_at_the_final_model_leaves_the_last_checkpoint(go, whole, monkeypatch, capfd):
    def full():
        original = Run.save_model

        def save_model(run, directory):
            if directory == Path("run"):
                small_files()
            original(run, directory)

        monkeypatch.setattr(Run, "save_model", save_model)
        return go()

    assert in_child(full) == 1
    error = errors(capfd)
    assert error[-1].startswith("error: run/model.safetensors: could not be written")
    assert "Traceback" not in "".join(error)
    assert leftovers("run") == [] and not Path("run/config.json").exists()
    assert go("--resume") == 0 and same(whole, "run")


def test_a_full_disk_while_logging_is_one_line_too(go, at_step, capfd):
    def full():
        at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)))
        return go()

    assert in_child(full) == 1
    error = errors(capfd)
    assert len(error) == 1 and "--resume" in error[0]


# ---- errors ----


def test_records_longer_than_the_decoder_takes_are_refused_not_trained(go, capfd):
    assert go("--max-length", 513) == 1
    assert "--max-length 513: the decoder takes 512 tokens" in errors(capfd)[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "file"], "file: this folder cannot be made"),
        (["--out", "file/run"], "file/run: this folder cannot be made"),
        (["--out", "/proc/no/run"], "/proc/no/run: this folder cannot be made"),
        (["--data", "none.json"], "none.json: cannot be read (No such file or directory); check the path"),
        (["--val", "none.jsonl"], "none.jsonl: cannot be read (No such file or directory); check the path"),
        (["--image-root", "none"], "--image-root none: no such folder"),
        (["--projector", "none"], "none: holds none of model.safetensors"),
        (["--projector", "narrow"], "--projector narrow: tensor"),
        (["--model", "toy", "--vision", "folder"], "folder/config.json: not found"),
        (["--model", "toy", "--llm", "folder"], "folder/config.json: not found"),
        (["--vision", "folder"], "is for presets"),
        (["--model", "photto"], "did you mean photo?"),
        (["--model", "folder"], "folder/config.json: not found"),
        (["--stage", "pretrian"], "did you mean pretrain?"),
        (["--train", "llm,conector"], "--train conector: unknown; did you mean connector?"),
        (["--image-mode", "padd"], "did you mean pad?"),
        (["--template", "vicuna"], "did you mean vicuna_v1"),
        (["--bad-records", "drop"], "Known are stop, skip"),
        (["--dtype", ""], "--dtype '': unknown"),
        (["--train", "llm,,vision"], "--train '': unknown"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--micro-batch-size", "-1"], "--micro-batch-size -1: must be at least 0"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--lr", "inf"], "--lr inf: must be below inf"),
        (["--epochs", "inf"], "--epochs inf: must be at most 1e+06"),
        (["--seed", "20000000000000000000"], "--seed 20000000000000000000: must be below 9.22337e+18"),
        (["--batch-size", "1000000000000"], "must be at most"),
        (["--learning-rate", "1"], "unknown argument --learning-rate; did you mean --lr?"),
        (["--device", "mps"], "--device mps: PyTorch sees"),
        (["--max-steps", "-3"], "--max-steps -3: must be at least 0"),
        (["--epochs", "0"], "--epochs 0.0: must be above 0"),
        (["--log-every", "0"], "--log-every 0: must be at least 1"),
        (["--max-tiles", "1000000000"], "--max-tiles 1000000000: must be at most 100"),
        (["--image-size", "1000000000"], "--image-size 1000000000: must be at most 4096"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--device", "foo"], "--device foo: PyTorch sees cpu here; choose one, or auto"),
        (["--dtype", "foo"], "Known are float32, bfloat16, auto"),
        (["--resume"], "--resume: there is no run in run"),
        (["--lr", "abc"], "argument --lr: invalid float value: 'abc'"),
        (["--batchsize", "3"], "did you mean --batch-size?"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_1(go, capfd, tok, flags, words):
    Path("file").write_text("")
    Path("folder").mkdir()
    cfg = tiny_config(tok)
    vlm = VLM(replace(cfg, vision=replace(cfg.vision, n_embd=16)))
    save_processor("narrow", tok.path, cfg)
    vlm.save_pretrained("narrow")
    capfd.readouterr()
    assert go(*flags) == 1
    error = errors(capfd)
    assert len(error) == 1 and error[0].startswith("error: ") and words in error[0], error
    assert not Path("run").exists()


def write_records(world, path, bad, n=8):
    records = json.loads((world / "train.json").read_text())[:n]
    for i in bad:
        records[i]["image"] = f"images/gone_{i}.png"
    Path(path).write_text(json.dumps(records))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_stops_the_run_and_is_named(go, world, capfd, workers):
    write_records(world, "bad.json", [5])
    assert go("--data", "bad.json", "--image-root", world, "--workers", workers) == 1
    (error,) = errors(capfd)
    assert "record 5 (id 'train-5')" in error and "gone_5.png: no such picture" in error


def test_a_run_that_stops_at_a_bad_record_saves_first_and_goes_on_without_it(go, world, capfd):
    write_records(world, "bad.json", [5])
    flags = ["--data", "bad.json", "--image-root", world, "--batch-size", 1, "--save-every", 0]
    assert go(*flags, "--bad-records", "skip", out="whole") == 0
    assert go(*flags) == 1
    (error,) = errors(capfd)
    assert "gone_5.png: no such picture" in error and "--resume --bad-records skip" in error
    assert newest_step("run") == last_logged("run") > 0
    assert go(*flags, "--resume", "--bad-records", "skip") == 0 and same("whole", "run")


def test_bad_records_are_skipped_and_counted_even_where_a_whole_step_is_bad(go, world, capfd):
    write_records(world, "bad.json", [0, 1, 2, 3, 4, 5], n=8)
    assert go("--data", "bad.json", "--image-root", world, "--bad-records", "skip", "--batch-size", 2) == 0
    out = capfd.readouterr().out
    assert "12 of 16 records skipped" in out and "gone_" in out and "no usable record" in out
    assert None in losses("run") and any(losses("run")) and Path("run/loss.png").exists()


def test_a_file_without_any_usable_record_is_an_error(go, world, capfd):
    write_records(world, "bad.json", range(8))
    assert go("--data", "bad.json", "--image-root", world, "--bad-records", "skip") == 1
    assert "not one record could be used" in errors(capfd)[-1]


def test_a_record_without_an_answer_is_named(go, capfd, tmp_path):
    (tmp_path / "q.json").write_text(
        json.dumps([{"id": "lonely", "conversations": [{"from": "human", "value": "Why?"}]}])
    )
    assert go("--data", tmp_path / "q.json") == 1 and "(id 'lonely')" in errors(capfd)[-1]


def test_a_loss_that_is_no_number_stops_the_run(go, capfd):
    assert go("--lr", "1e30") == 1
    assert "lower --lr" in errors(capfd)[-1]


def test_a_loader_process_that_is_killed_is_one_line(go, monkeypatch, capfd):
    me, original = os.getpid(), data.micro_batches

    def micro_batches(*args, **flags):
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **flags)

    monkeypatch.setattr(data, "micro_batches", micro_batches)
    assert go("--workers", 1) == 1
    error = errors(capfd)[-1]
    assert error.startswith("error: DataLoader worker") and "--workers 0" in error


def break_loss(monkeypatch):
    """The loss of the fifth step is no number."""
    calls, original = [], train.Answering.loss

    def loss(*args):
        if torch.is_grad_enabled():  # not a held-out one
            calls.append(None)
        mean, more = original(*args)
        return mean * (math.nan if len(calls) == 5 else 1), more

    monkeypatch.setattr(train.Answering, "loss", staticmethod(loss))


def kill_loader(monkeypatch):
    """When the fifth step begins."""
    calls, original = [], train.backward

    def backward(*args):
        calls.append(None)
        if len(calls) == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(10)  # PyTorch sees it, and raises
        return original(*args)

    monkeypatch.setattr(train, "backward", backward)


def lose_picture(monkeypatch):
    """A held-out one is gone after the fourth step."""

    def measure(held_out, run, step):
        if step == 4:
            raise UserError("p.png: no such picture")

    monkeypatch.setattr(train.HeldOut, "measure", measure)


@pytest.mark.parametrize("stop, words", [
    (break_loss, "the loss is nan"),
    (kill_loader, "DataLoader worker"),
    (lose_picture, "no such picture"),
])
def test_whatever_error_ends_a_run_the_steps_before_it_are_saved(go, whole, monkeypatch, capfd, stop, words):
    flags = ["--save-every", 0, "--workers", 1, "--eval-every", 4]
    with monkeypatch.context() as patch:
        stop(patch)
        assert go(*flags) == 1 and words in errors(capfd)[-1]
    assert newest_step("run") == 4
    assert go(*flags, "--resume") == 0 and same(whole, "run")


def test_a_killed_loader_ends_the_run_though_its_error_was_swallowed(go, at_step, beside, capfd):
    def swallow():
        with contextlib.suppress(RuntimeError):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(10)

    def train_with_a_loader():
        at_step(3, lambda: (time.sleep(1), swallow()))  # by then the loader is amid a batch of 72 kB
        os._exit(go("--workers", 1, "--batch-size", 24))

    process = beside(train_with_a_loader)
    process.join(30)
    assert process.exitcode == 1 and "DataLoader worker" in errors(capfd)[-1]


def test_an_error_in_the_middle_of_an_update_saves_nothing(go, monkeypatch):
    original = train.make_optimizer

    def make_optimizer(*args):
        optimizer = original(*args)
        calls, update = [], optimizer.step

        def step():
            calls.append(None)
            if len(calls) == 4:
                raise UserError("half done")
            update()

        monkeypatch.setattr(optimizer, "step", step)
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    assert go() == 1 and newest_step("run") == 2


def test_a_loader_needs_no_shared_memory(go, beside, monkeypatch):
    """Docker gives 64 MB of it, where a batch of pictures may be larger."""
    me, original = os.getpid(), data.micro_batches

    def with_little(*args, **flags):
        if os.getpid() != child.pid:
            small_files()  # in the loader process; it holds for shared memory, too
        return original(*args, **flags)

    def train_with_a_loader():
        child.pid = os.getpid()
        monkeypatch.setattr(data, "micro_batches", with_little)
        os._exit(go("--workers", 1, "--batch-size", 24, "--max-steps", 3))

    child = SimpleNamespace(pid=me)
    process = beside(train_with_a_loader)
    process.join(60)
    assert process.exitcode == 0


def test_resuming_with_other_flags_or_from_another_version_is_refused(go, capfd):
    assert go("--max-steps", 2) == 0
    assert go("--max-steps", 2, "--eval-every", 1, "--resume") == 1  # best/ may be of a look that was undone
    assert "written with --eval-every 0, now it is 1" in errors(capfd)[-1]
    assert go("--max-steps", 2, "--lr", "0.5", "--resume") == 1
    assert "--lr 0.003, now it is 0.5" in errors(capfd)[-1]
    moments = torch.load("run/checkpoint-000002/optimizer.pt")
    moments["of_another_version"] = moments.popitem()[1]
    torch.save(moments, "run/checkpoint-000002/optimizer.pt")
    assert go("--max-steps", 2, "--resume") == 1
    assert "checkpoint-000002: damaged or of another kind" in errors(capfd)[-1]
    file = Path("run/checkpoint-000002/trainer.pt")
    torch.save({}, "empty.pt")
    for damaged in Path("empty.pt").read_bytes(), b"", b"PK\x03\x04 cut":
        file.write_bytes(damaged)
        assert go("--max-steps", 2, "--resume") == 1 and "trainer.pt: damaged" in errors(capfd)[-1]


def test_resuming_over_other_records_is_refused(go, world, capfd):
    records = json.loads((world / "train.json").read_text())
    write_json("own.json", records)
    flags = ["--data", "own.json", "--image-root", world]
    assert go(*flags, "--max-steps", 2) == 0
    records[3]["conversations"][1]["value"] = "another answer"
    write_json("own.json", records)
    assert go(*flags, "--max-steps", 2, "--resume") == 1 and "--data of checksum" in errors(capfd)[-1]


def test_resuming_with_other_repeats_in_meta_json_is_refused(go, world, capfd):
    entry = {"root": str(world), "annotation": str(world / "train.json")}
    write_json("meta.json", {"x": entry})
    flags = ["--data", "meta.json", "--max-steps", 2]
    assert go(*flags) == 0
    write_json("meta.json", {"x": entry | {"repeat_time": 2}})
    assert go(*flags, "--resume") == 1 and "--data of checksum" in errors(capfd)[-1]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_an_earlier_run_is_moved_aside_whole_and_only_when_the_new_one_can_begin(go, capfd, tiny):
    flags = ["--max-steps", 3]
    assert go(*flags, out="out/x") == 0
    before = contents("out/x")
    assert go("--projector", "none", out="out/x") == 1 and go("--model", "out/x", out="out/x") == 1
    assert "--model out/x is in --out out/x" in errors(capfd)[-1] and not Path("out/x.1").exists()
    for seed in 1, 2:
        assert go(*flags, "--seed", seed, out="out/x") == 0
    assert contents("out/x.1") == before
    assert not same("out/x.1", "out/x.2") and not same("out/x", "out/x.2")


def test_what_others_put_or_broke_in_the_folder_ends_no_run(go, capfd):
    assert go("--save-every", 2, "--max-steps", 4, "--eval-every", 0) == 0
    newest = Path("run/checkpoint-000004")
    shutil.copytree(newest, "run/checkpoint-000004.bak")
    shutil.copytree(newest, "run/checkpoint-000002")  # as a kill leaves it between the save and the removal
    log = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    damaged = ['{"step": 2, "lo\x00\n', '{"step": "x"}\n', "[2]\n", "[" * 9999 + "\n"]
    Path("run/log.jsonl").write_text("".join([log[0], *damaged, *log[2:]]))
    Path("run/loss.png").unlink()
    Path("run/loss.png").mkdir()
    assert go("--save-every", 2, "--max-steps", 4, "--resume") == 0
    assert sorted(path.name for path in Path("run").glob("check*")) == [newest.name, f"{newest.name}.bak"]
    assert [line["step"] for line in map(json.loads, open("run/log.jsonl"))] == [1, 2, 3, 4]

    Path("run2/loss.png").mkdir(parents=True)
    assert go("--max-steps", 2, out="run2") == 0
    assert "loss.png: could not be written" in capfd.readouterr().out


def test_a_folder_of_other_things_is_not_moved(go):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    assert go("--max-steps", 1, out="mine") == 0 and Path("mine/notes.txt").read_text() == "keep"


# ---- held-out questions ----


def test_a_run_ends_with_a_table_beside_two_baselines(go, world, capfd):
    assert go("--final-eval", "--eval-every", 4) == 0
    out = capfd.readouterr().out
    assert "held-out loss" in out and "  Q: " in out and "truth: " in out and "answers were cut off" in out
    for word in "accuracy", "most frequent answer", "shuffled pictures", "existence", "reading":
        assert word in out
    results = json.loads(Path("run/results.json").read_text())
    questions = (world / "val.jsonl").read_text().splitlines()
    assert results["n"] == len(results["records"]) == len(questions)
    assert [line["step"] for line in map(json.loads, open("run/log.jsonl")) if "val_loss" in line] == [4, 8]


def test_looking_at_held_out_questions_does_not_change_the_run(go, whole):
    assert go("--eval-every", 3) == 0 and same(whole, "run")


def write_val(world, lines):
    Path("val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--val", "val.jsonl", "--image-root", str(world), "--final-eval", "--max-steps", 1]


PICTURE, OTHER = "images/val_00000.png", "images/val_00001.png"


def test_held_out_questions_may_have_no_category_no_picture_or_several_and_one_id_for_all(go, world, capfd):
    turns = [{"from": "human", "value": "<image>\nYes?"}, {"from": "gpt", "value": "yes"}]
    two = {"image": [PICTURE, OTHER], "text": "<image> or <image>\nWhich?", "answer": "the first"}
    flags = write_val(world, [
        {"question_id": 1, "image": PICTURE, "text": "What?", "answer": "a cat"},
        {"question_id": 1, "text": "How many?", "answer": "2"},
        {"question_id": 1} | two,
        {"id": "c", "image": OTHER, "conversations": turns},
    ])
    assert go(*flags, "--eval-every", 1) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert list(results["categories"]) == ["all"] and results["n"] == len(results["records"]) == 4


@pytest.mark.parametrize(
    "line, words",
    [
        ({"image": PICTURE, "text": "What?"}, 'needs "text" and "answer"'),
        ({"image": PICTURE, "text": "What?", "answer": " "}, "is empty"),
        ({"image": "images/gone.png", "text": "What?", "answer": "x"}, "gone.png: no such picture"),
        ({"image": [PICTURE, OTHER], "text": "What?", "answer": "x"}, "2 pictures"),
    ],
)
def test_a_bad_held_out_question_is_named_before_the_training(go, world, capfd, line, words):
    good = {"image": PICTURE, "text": "What?", "answer": "a cat"}
    assert go(*write_val(world, [good, {"question_id": "q", **line}])) == 1
    error = errors(capfd)[-1]
    assert "val.jsonl, line 2 (id 'q')" in error and words in error and not Path("run").exists()


def test_data_without_a_val_file_trains_without_a_table(go, world, capfd):
    write_records(world, "own.json", [])
    assert go("--data", "own.json", "--image-root", world, "--final-eval", "--eval-every", 1) == 0
    assert not Path("run/results.json").exists() and "accuracy" not in capfd.readouterr().out


def test_the_table_of_known_answers_has_these_numbers(tmp_path, monkeypatch):
    asked = [("count", "2"), ("count", "2"), ("count", "1")]
    asked += [("cot", "One.\nFinal answer: 3"), ("cot", "Another.\nFinal answer: 3")]
    items = []
    for k, (category, truth) in enumerate(asked):
        item = question(k, None, "?", "", truth, category=category)
        items.append(item | {"image": f"{k}.png", "benchmark": "own"})
        (tmp_path / f"{k}.png").touch()
    said = {
        "direct": ["2.", "1", "1", "So.\nFinal answer: 3", "3"],
        "shuffled pictures": ["2", "2", "2", "no", "no"],
    }
    seen = {}

    def ask(vlm, tok, questions, batch_size, progress):
        column = questions[0]["column"]
        seen[column] = [item["pictures"] for item in questions]
        answers = {k: {"answer": text} for k, text in enumerate(said[column])}
        if column == "direct":
            answers[2]["cut_off"] = True
        return answers

    monkeypatch.setattr(eval, "ask", ask)
    results = eval.evaluate(items, eval.EvalConfig(image_root=str(tmp_path)), None, None)
    table = {
        "count": (3, 2 / 3, 2 / 3, 2 / 3),
        "cot": (2, 1 / 2, 1, 0),
        "all": (5, 3 / 5, 4 / 5, 2 / 5),
    }
    others = results["columns"]
    for category, row in table.items():
        columns = [results, others["most frequent answer"], others["shuffled pictures"]]
        if category != "all":
            columns = [column["categories"][category] for column in columns]
        scores = [column["score"] / 100 for column in columns]
        assert (columns[0]["n"], *scores) == pytest.approx(row)
    assert results["cut_off"] == 1
    right, other = seen["direct"], seen["shuffled pictures"]
    assert all(a != b for a, b in zip(right, other, strict=True)) and sorted(right) == sorted(other)


@pytest.mark.parametrize(
    "said, truth, right",
    [
        ("Yes.", "yes", True),
        ("no", "yes", False),
        ("a red cat", "A red cat.", True),
        ("a red cat.\n", "A blue cat.", False),
        ("1 + 1 = 2.\nFinal answer: 2", "Two things.\nFinal answer: 2", True),
        ("2", "Two things.\nFinal answer: 2", False),
        ("[0.10, 0.10, 0.50, 0.50]", "[0.10, 0.10, 0.50, 0.60]", True),
        ("[0.10, 0.10, 0.30, 0.30]", "[0.10, 0.10, 0.50, 0.50]", False),
        ("at the top", "[0.10, 0.10, 0.50, 0.50]", False),
    ],
)
def test_what_counts_as_right(said, truth, right):
    assert is_right(said, truth) is right


# ---- held-out loss, and time ----


def rising_after(monkeypatch, best):
    """Make the held-out loss fall until step `best`, then rise."""
    monkeypatch.setattr(train.HeldOut, "mean_loss", lambda self, batches: self.found)
    original = train.HeldOut.measure

    def measure(self, run, step):
        self.found = 1 + abs(step - best) / 100
        original(self, run, step)

    monkeypatch.setattr(train.HeldOut, "measure", measure)


def test_a_run_that_overfits_says_since_when_and_keeps_its_best_model(go, monkeypatch, at_step, capfd):
    rising_after(monkeypatch, best=2)
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert go("--eval-every", 1, out="stopped") == 130
    capfd.readouterr()
    at_step(99, None)
    assert go("--eval-every", 1) == 0
    lines = capfd.readouterr().out.splitlines()
    told = [line for line in lines if "the model overfits" in line]
    assert len(told) == 4 and told[0] == (
        "it has been higher for 3 looks than at step 2 (1.0000): the model overfits; "
        "that of step 2 is in run/best")
    assert "held-out loss was lowest at step 2 (1.0000): that model is in run/best" in lines
    kept, then = weights("run/best"), weights("stopped/checkpoint-000002")
    assert all(torch.equal(kept[name], p) for name, p in then.items()) and not same_weights("run", "run/best")
    Tokenizer("run/best")


def test_a_run_whose_last_look_is_its_best_does_not_speak_of_another(go, monkeypatch, capfd):
    rising_after(monkeypatch, best=8)
    assert go("--eval-every", 2) == 0
    out = capfd.readouterr().out
    assert "overfits" not in out and "lowest" not in out and same_weights("run", "run/best")


def test_a_killed_and_resumed_run_knows_its_best_model(go, monkeypatch, at_step, capfd):
    rising_after(monkeypatch, best=2)
    flags = ["--eval-every", 2, "--save-every", 3]
    assert go(*flags, out="undisturbed") == 0

    def train_until(kill_at, out):
        at_step(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        go(*flags, out=out)

    for kill_at in 4, 6, 7:  # steps 3 and 6 are saved, after 2, 4 and 6 it looks
        out = f"killed at {kill_at}"
        assert in_child(lambda: train_until(kill_at, out)) == -signal.SIGKILL
        capfd.readouterr()
        assert go(*flags, "--resume", out=out) == 0
        assert same("undisturbed", out) and same_weights("undisturbed/best", f"{out}/best")
        assert "higher for 3 looks than at step 2" in capfd.readouterr().out


def test_minutes_are_the_steps_that_fit_and_change_nothing_else(go, at_step, capfd, steps_of_a_second):
    at_step(12, lambda: os.kill(os.getpid(), signal.SIGINT))  # of them, nine measure
    assert go("--minutes", 0.25) == 130 and newest_step("run") == 3
    assert "60.0 steps a minute, so --minutes 0.25 is --max-steps 6" in capfd.readouterr().out
    at_step(10**9, None)
    assert go("--minutes", 0.25, "--resume") == 0 and "steps a minute" not in capfd.readouterr().out
    assert go("--max-steps", 6, out="same") == 0 and same("same", "run")
    assert go("--minutes", 1, "--dry-run") == 0 and "without --minutes" in capfd.readouterr().out


def test_to_resume_without_data_draws_no_world(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert call(train.main, "--resume", "--out", "mine") == 1
    assert "give the --data of the run" in errors(capfd)[-1] and not Path("toyworld").exists()


def test_threads_spin_for_a_moment_alone_and_their_number_is_a_flag(go, monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    assert go("--max-steps", 1) == go("--max-steps", 1, "--threads", 3) == 0 and numbers == [3]
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_what_deserves_a_doubt_is_said(go, capfd):
    """A rate that is far too high; a model that transformers cannot open."""
    assert go("--lr-connector", 3, "--max-steps", 1) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "do you mean it?" in line]
    assert line.startswith("connector ") and "train at 3, " in line
    assert go("--max-steps", 1, out="llava") == 0 and "transformers" not in capfd.readouterr().out
    assert go("--max-steps", 1, "--image-mode", "hd", out="hd") == 0
    assert "transformers has no class for its parts" in capfd.readouterr().out


def test_an_eval_limit_is_the_number_of_questions_that_are_asked(go, world):
    assert go("--max-steps", 1, "--final-eval", "--eval-limit", 7) == 0
    assert json.loads(Path("run/results.json").read_text())["n"] == 7


# ---- what one sees ----


@pytest.mark.parametrize("values", [
    [2.0],
    [None, 3.0, 1.0],
    [7.0, 0.0, 1e4],
    [1.0] * 60,
    [0.002, 4e8],
])
def test_the_curve_is_drawn_whatever_the_values(tmp_path, values):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(values, 1)]
    lines.append({"step": 1, "val_loss": 2.5})
    panel = {"training": "loss", "never": "margin", "held-out": "val_loss"}
    support_plots.plot(tmp_path / "loss.png", lines, {"loss": panel, "nothing": {}})
    image = Image.open(tmp_path / "loss.png")
    assert image.size == (800, 460) and len(image.getcolors(10_000)) > 3


@pytest.mark.parametrize("low, high, is_log, ticks", [
    (0.137, 2.92, False, [0.5, 1, 1.5, 2, 2.5, 3]),
    (1, 400, False, [0, 100, 200, 300, 400]),
    (0.07, 1.8, True, [0.1, 0.2, 0.5, 1]),
    (3, 3, False, [2.6, 2.8, 3.0, 3.2, 3.4]),
])
def test_beside_an_axis_stand_round_numbers(low, high, is_log, ticks):
    found, to_pixel = support_plots.make_axis(np.array([low, high]), 70, 776, is_log)
    assert found == pytest.approx(ticks)
    assert all(70 <= to_pixel(tick) <= 776 for tick in ticks)


def test_help_gives_every_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    shown = capsys.readouterr().out
    entries = {
        line.split()[0].rstrip(","): line
        for line in re.split(r"\n(?=  -)", shown.split("options:")[1])
        if line.strip()
    }
    for f in fields(train.TrainConfig):
        entry = " ".join(entries["--" + f.name.replace("_", "-")].split())
        assert ("empty: " if f.type is str and f.default == "" else "(default ") in entry, entry
        assert {str: " TEXT ", int: " N ", float: " X ", bool: "--no-"}[f.type] in entry, entry
    assert f"(default {train.RECIPES['toy', 'finetune']['lr']})" in entries["--lr"]
    assert "assets/toy-clip)" in "".join(entries["--vision"].split())


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(go, beside, capfd):
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def train_on_terminal():
        sys.stderr = open(terminal, "w")
        os._exit(go("--max-steps", 12))

    child = beside(train_on_terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(reader, 4096):
            shown += part
    child.join()
    lines = capfd.readouterr().out
    assert child.exitcode == 0 and "step    10/12  loss " in lines and "left" in lines
    assert b"12/12" in shown and b"loss" in shown and b"tokens/s" in shown


def test_a_run_goes_on_when_nobody_reads_its_output(eight_steps, tmp_path):
    flags = [*eight_steps, "--log-every", 1, "--out", tmp_path / "run"]
    command = [sys.executable, "-u", ROOT / "train.py", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([str(word) for word in command], **streams)
    for end in child.stdout, child.stderr:
        end.readline()
        end.close()
    assert child.wait() == 0 and (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("end, name", [(1, "stdout"), (2, "stderr")])
def test_a_run_goes_on_when_an_output_is_closed_from_the_start(go, capfd, end, name):
    def train_without():
        os.close(end)
        setattr(sys, name, None)  # as Python finds it
        return go()

    assert in_child(train_without) == 0
    assert "Error" not in capfd.readouterr().err
    assert Path("run/config.json").exists()


def test_what_the_terminal_cannot_show_ends_no_run(go, world, capfd):
    write_json("val.json", [{"image": PICTURE, "text": "这是什么？", "answer": "红色。"}], indent=None)

    def train_on_windows():
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="cp1252", closefd=False)
        code = go("--val", "val.json", "--image-root", world, "--eval-every", 1, "--max-steps", 2)
        sys.stdout.flush()
        return code

    assert in_child(train_on_windows) == 0
    assert r"truth: '\u7ea2\u8272\u3002'" in capfd.readouterr().out


def test_a_run_whose_loader_processes_are_no_forks_is_the_same(go, whole):
    """As on Windows and macOS."""

    def train_without_forks():
        multiprocessing.set_start_method("spawn", force=True)
        return go("--workers", 1)

    assert in_child(train_without_forks) == 0
    assert same(whole, "run")


def test_flags_of_a_lora_without_one_are_refused(go, capfd):
    assert go("--lora-alpha", 16) == 1
    assert "give --lora-r" in errors(capfd)[-1]


def test_a_checkpoint_that_does_not_say_its_step_is_one_line(go, capfd):
    assert go("--max-steps", 2, "--save-every", 1) == 0
    file = Path("run/checkpoint-000002/trainer.pt")
    state = torch.load(file, weights_only=True)
    del state["step"]
    torch.save(state, file)
    assert go("--max-steps", 2, "--save-every", 1, "--resume") == 1
    assert "trainer.pt" in errors(capfd)[-1]
