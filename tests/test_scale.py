"""Training at scale: LoRA, precision, batches, several processes. Every name is a claim; models are tiny."""

import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import QUICK, ROOT, call, fork, losses, tiny_config, trained_tensors, weights
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import data
import model
import support.export as support_export
import support.optim as support_optim
import tools.weights as tools_weights
import train
from conversation import Tokenizer
from model import IGNORE, VLM
from support.cli import Bar, UserError
from support.data_files import Records, picture_paths
from support.export import save_adapter, write_model
from support.lora import add_lora, lora_off, merged_state
from support.processes import share_by_rank
from support.weights import load_adapter, model_files


def a_batch(cfg, rows=3, length=40):
    """-> tokens, pixels, labels; a picture in each row, and labels of unequal number."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 900, (rows, length), generator=draw)
    tokens[:, 1 : 1 + cfg.vision.n_token] = cfg.image_token
    last_of_prompt = torch.tensor([[20], [30], [38]])[:rows]
    labels = torch.where(torch.arange(length) > last_of_prompt, tokens, IGNORE)
    return tokens, torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=draw), labels


# ---- LoRA ----


def with_lora(directory, seed=1):
    vlm = VLM.from_pretrained(directory)
    vlm.requires_grad_(False)
    vlm.connector.requires_grad_(True)
    torch.manual_seed(seed)
    add_lora(vlm, 4, 8.0)
    return vlm


def taught(vlm, steps=3):
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        vlm(*a_batch(vlm.cfg)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return vlm


def test_a_lora_begins_as_its_base_and_trains_nothing_but_itself_and_the_connector(tiny):
    base, vlm = VLM.from_pretrained(tiny), with_lora(tiny)
    tokens, pixels, labels = a_batch(base.cfg)
    assert torch.equal(vlm(tokens, pixels), base(tokens, pixels))
    taught(vlm)
    moved = {name for name, t in base.state_dict().items() if not torch.equal(t, vlm.state_dict()[name])}
    assert {name.split(".")[0] for name in moved} == {"connector"}
    assert not torch.equal(vlm(tokens, pixels), base(tokens, pixels))


def test_a_lora_that_is_switched_off_is_its_base_bit_for_bit(tiny):
    base, vlm = VLM.from_pretrained(tiny), taught(with_lora(tiny))
    base.connector.load_state_dict(vlm.connector.state_dict())
    tokens, pixels, _ = a_batch(base.cfg)
    with lora_off():
        assert torch.equal(vlm(tokens, pixels), base(tokens, pixels))
    assert not torch.equal(vlm(tokens, pixels), base(tokens, pixels))


def test_a_merged_lora_equals_the_unmerged_one(tiny, tmp_path):
    vlm = taught(with_lora(tiny))
    vlm.save_pretrained(tmp_path / "merged")
    save_adapter(vlm, tmp_path / "adapter", tiny, trained_tensors(vlm))
    tokens, pixels, _ = a_batch(vlm.cfg)
    for directory in "merged", "adapter":  # an adapter's directory opens like any other
        assert_close(
            VLM.from_pretrained(tmp_path / directory)(tokens, pixels),
            vlm(tokens, pixels),
            rtol=1e-5,
            atol=1e-5,
        )
    assert tools_weights.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "converted")]) == 0
    assert all(
        torch.equal(t, merged_state(vlm)[name])
        for name, t in VLM.from_pretrained(tmp_path / "converted").state_dict().items()
    )


def test_a_saved_adapter_loads_back_exactly_and_only_into_what_it_was_trained_as(tiny, tmp_path):
    vlm = taught(with_lora(tiny))
    save_adapter(vlm, tmp_path / "adapter", tiny, trained_tensors(vlm))
    again = with_lora(tiny, seed=2)
    load_adapter(again, tmp_path / "adapter")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in vlm.state_dict().items())
    other = VLM.from_pretrained(tiny)
    add_lora(other, 2, 8.0)
    with pytest.raises(UserError, match="do not fit"):
        load_adapter(other, tmp_path / "adapter")


def test_a_model_in_our_own_layout_has_adapters_too(tok, tmp_path):
    torch.manual_seed(0)
    VLM(tiny_config(tok, connector="norm_gelu")).save_pretrained(tmp_path / "base")
    vlm = taught(with_lora(tmp_path / "base"))
    save_adapter(vlm, tmp_path / "adapter", tmp_path / "base", trained_tensors(vlm))
    tokens, pixels, _ = a_batch(vlm.cfg)
    assert_close(
        VLM.from_pretrained(tmp_path / "adapter")(tokens, pixels), vlm(tokens, pixels), rtol=1e-5, atol=1e-5
    )


def test_the_peft_library_opens_the_adapter_over_transformers_model(tiny, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    vlm = taught(with_lora(tiny))
    save_adapter(vlm, tmp_path / "adapter", tiny, trained_tensors(vlm))
    theirs = peft.PeftModel.from_pretrained(
        transformers.LlavaForConditionalGeneration.from_pretrained(tiny), tmp_path / "adapter"
    ).eval()
    tokens, pixels, _ = a_batch(vlm.cfg)
    mean, std = (torch.tensor(x)[:, None, None] for x in (vlm.cfg.vision.mean, vlm.cfg.vision.std))
    logits = theirs(input_ids=tokens, pixel_values=(pixels / 255 - mean) / std).logits
    assert_close(logits, vlm(tokens, pixels), rtol=1e-4, atol=1e-4)


# ---- activations that are made twice ----


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(tiny, lora):
    grads = []
    for k in (0, 1, 2):
        vlm = VLM.from_pretrained(tiny).train()
        if lora:
            torch.manual_seed(1)
            add_lora(vlm, 4, 8.0, dropout=0.5)  # dropped twice alike
        vlm.decoder.recompute = k
        torch.manual_seed(3)
        vlm(*a_batch(vlm.cfg)).backward()
        grads.append([p.grad for p in vlm.parameters() if p.grad is not None])
    assert len(grads[0]) and all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


# ---- several processes ----


def write_mixed(folder):
    """Sixteen records, every second one a text, with answers of very unequal length."""

    def record(name, question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns}

    records = []
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 90, 200 - 20 * i)).save(folder / f"{i}.png")
        with_picture = record(f"picture {i}", "<image>\nWhat color?", "blue " * (1 + i))
        records.append(with_picture | {"image": f"{i}.png"})
        answer = "There are two cats. " * (1 + 3 * (i % 4))
        records.append(record(f"text {i}", "How many cats are there?", answer))
    (folder / "mixed.json").write_text(json.dumps(records))
    return folder / "mixed.json"


def twenty_steps(tiny, mixed):
    return ["--model", tiny, "--data", mixed, *QUICK, "--batch-size", 2, "--max-steps", 20, "--save-every", 0]


@pytest.fixture
def mixed(tmp_path):
    return write_mixed(tmp_path)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert call(train.main, *twenty_steps(tiny, write_mixed(folder)), "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def go(tiny, mixed, tmp_path, monkeypatch):
    """go("--lr", 1, out="a", n=2): train in n processes; -> the exit codes of all."""
    monkeypatch.chdir(tmp_path)

    def start(*flags, out="run", n=1, during=None):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = str(s.getsockname()[1])

        def one(rank):
            if n > 1:
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
                os.environ.update(ranks, MASTER_ADDR="localhost", MASTER_PORT=port)
            os._exit(call(train.main, *twenty_steps(tiny, mixed), "--out", out, *flags))

        children = [fork(target=one, args=(r,)) for r in range(n)]
        for child in children:
            child.start()
        if during:
            during(children)
        for child in children:
            child.join(600)
            if child.exitcode != 0:  # torchrun ends the others, so do we; None: it hangs
                [other.kill() for other in children]
        return {child.exitcode for child in children}

    return start


def close_runs(a, b, tolerance=1e-5):
    assert_close(losses(a), losses(b), rtol=tolerance, atol=tolerance)
    for name, t in weights(a).items():
        assert_close(t, weights(b)[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flag", ["--no-shard", "--shard"])
def test_two_processes_give_the_losses_and_the_model_of_one(go, whole, flag):
    assert go(flag, n=2) == {0}
    assert len(losses("run")) == 20
    close_runs(whole, "run")


@pytest.mark.parametrize("flags", [
    ["--shard", "--micro-batch-size", 1],
    ["--no-shard", "--token-budget", 64],
])
def test_two_processes_train_all_parts_as_one_does(go, flags):
    flags = [*flags, "--train", "connector,llm,vision", "--max-steps", 10]
    assert go(*flags, out="one") == {0} and go(*flags, out="two", n=2) == {0}
    close_runs("one", "two")


def test_two_processes_agree_on_the_best_model_and_keep_it_whole(go, mixed):
    flags = ["--val", mixed, "--eval-every", 5, "--max-steps", 10]
    assert go(*flags, out="one") == {0}
    for flag in "--shard", "--no-shard":
        out = "two" + flag
        assert go(flag, *flags, out=out, n=2) == {0}
        for name, t in weights("one/best").items():
            assert_close(weights(f"{out}/best")[name], t, rtol=1e-3, atol=2e-4)
        assert go(flag, *flags, "--resume", out=out, n=2) == {0}


@pytest.mark.parametrize("before, after", [
    ((2, "--shard"), (1, "--no-shard")),
    ((1, "--no-shard"), (2, "--shard")),
    ((2, "--shard"), (3, "--shard")),
    ((2, "--no-shard"), (2, "--shard")),
])
def test_what_some_processes_saved_others_resume(go, whole, before, after):
    (n, flag), stop = before, lambda children: kill_after(children, "run/checkpoint-000008")
    go("--save-every", 8, flag, n=n, during=stop)
    assert go("--save-every", 8, after[1], "--resume", n=after[0]) == {0}
    close_runs("run", whole)


@pytest.mark.parametrize("flag", ["--no-shard", "--shard"])
def test_two_processes_stop_at_a_bad_record_of_one_and_save_first(go, mixed, flag):
    (mixed.parent / "7.png").unlink()
    codes = go(flag, "--batch-size", 1, out="bad", n=2)
    steps = [json.loads(line)["step"] for line in open("bad/log.jsonl")]
    assert codes == {1} and 0 < steps[-1] < 16
    assert [path.name for path in Path("bad").glob("checkpoint-*")] == [f"checkpoint-{steps[-1]:06d}"]
    assert go(flag, "--batch-size", 1, "--resume", "--bad-records", "skip", out="bad", n=2) == {0}


def test_what_any_process_skips_is_named(go, mixed, capfd):
    for k in range(4):
        (mixed.parent / f"{k}.png").unlink()
    assert go("--bad-records", "skip", "--max-steps", 8, out="bad", n=2) == {0}
    reasons = [why for line in map(json.loads, open("bad/log.jsonl")) for why in line.get("skipped", [])]
    assert sorted(re.search(r"\d\.png", why)[0] for why in reasons) == ["0.png", "1.png", "2.png", "3.png"]
    out = capfd.readouterr().out
    assert all(f"skipped: {why}" in out for why in reasons) and "4 of 16 records skipped" in out


def test_one_process_saves_whatever_rank_a_cluster_gives_it(go, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert go("--max-steps", 1) == {0}
    assert weights("run")


def test_shares_are_even_and_together_the_batch():
    class Sized:
        def guess_tokens(self, i, tokens_per_tile):
            return 25 * (i % 7) + 12.5 + tokens_per_tile * (i % 3 == 0)

    hands = [share_by_rank(list(range(64)), Sized(), 576, rank, 4) for rank in range(4)]
    assert sorted(i for hand in hands for i in hand) == list(range(64))
    load = [sum(25 * (i % 7) + 12.5 + 576 * (i % 3 == 0) for i in hand) for hand in hands]
    assert max(load) < 1.05 * min(load)


# ---- precision, rates, batches ----


def test_bfloat16_weights_with_their_lower_halves_are_float32_adamw_bit_for_bit():
    torch.manual_seed(0)
    start = torch.cat([torch.randn(100), torch.ones(8), torch.zeros(4), torch.tensor([1e-30, -3e38])])
    exact = torch.nn.Parameter(start.bfloat16().float())
    split = torch.nn.Parameter(start.bfloat16())
    one = torch.optim.AdamW([exact], lr=2e-5, weight_decay=0.1, fused=True)
    two = support_optim.SplitAdamW([split], lr=2e-5)
    two.param_groups[0]["weight_decay"] = 0.1
    for _ in range(50):
        split.grad = torch.randn(114).bfloat16()
        exact.grad = split.grad.float()
        one.step()
        two.step()
        upper = split.view(torch.int16).int() << 16
        assert torch.equal((upper + two.state[split]["lower"]).view(torch.float32), exact.detach())
        nearest = exact.detach().bfloat16()
        assert torch.equal(split.detach()[:112], nearest[:112])
    plain = torch.nn.Parameter(torch.ones(8).bfloat16())
    trap = torch.optim.AdamW([plain], lr=2e-5)
    for _ in range(50):
        plain.grad = torch.ones(8).bfloat16()
        trap.step()
    assert torch.equal(plain.detach(), torch.ones(8).bfloat16())  # what plain bfloat16 does


def test_bfloat16_weights_train_and_resume_bit_for_bit(go, whole):
    flags = ["--weights", "bfloat16", "--micro-batch-size", 1, "--save-every", 5]
    assert go(*flags, out="undisturbed") == {0}
    assert_close(losses("undisturbed"), losses(whole), rtol=0.03, atol=0.03)
    go(*flags, during=lambda children: kill_after(children, "run/checkpoint-000010"))
    assert go(*flags, "--resume") == {0} and losses("run") == losses("undisturbed")
    expected = weights("undisturbed")
    for name, t in weights("run").items():
        assert t.dtype == torch.bfloat16 and torch.equal(t, expected[name])


@pytest.mark.parametrize("flags", [["--micro-batch-size", 1], ["--token-budget", 64], []])
def test_bfloat16_weights_train_in_two_processes_as_in_one(go, flags):
    flags = ["--weights", "bfloat16", "--lora-r", 4, "--max-steps", 4, *flags]
    assert go(*flags, out="one") == {0} and go(*flags, out="two", n=2) == {0}
    assert_close(losses("one"), losses("two"), rtol=0.02, atol=0.02)


def kill_after(children, file):
    while not Path(file).exists() and any(c.is_alive() for c in children):
        time.sleep(0.002)
    [child.kill() for child in children]


def test_each_part_has_its_learning_rate_and_unlisted_parts_have_none(tiny):
    vlm = VLM.from_pretrained(tiny)
    cfg = train.TrainConfig(
        model=str(tiny), train="connector,llm", lr=2e-4, lr_connector=2e-5, weight_decay=0.1
    )
    train.make_trainable(vlm, cfg)
    names = {p: name for name, p in vlm.named_parameters()}
    groups = {}
    for group in support_optim.make_optimizer(vlm, cfg).param_groups:
        for p in group["params"]:
            key = support_optim.part_of(names[p]), p.ndim < 2
            groups[key] = group["peak_lr"], group["weight_decay"]
    assert groups == {
        ("connector", False): (pytest.approx(2e-5), 0.1),
        ("connector", True): (pytest.approx(2e-5), 0.0),
        ("llm", False): (2e-4, 0.1),
        ("llm", True): (2e-4, 0.0),
    }


def test_a_lora_run_saves_an_adapter_leaves_the_rest_alone_and_resumes_bit_for_bit(go, tiny):
    flags = ["--lora-r", 4, "--lora-dropout", 0.1, "--lora-target", "q_proj,v_proj", "--save-every", 5]
    assert go(*flags, out="whole") == {0}
    go(*flags, during=lambda children: kill_after(children, "run/checkpoint-000010"))
    assert go(*flags, "--resume") == {0} and losses("run") == losses("whole")
    a, b = (load_file(f"{out}/adapter_model.safetensors") for out in ("run", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
    assert {name.split(".")[-3] for name in a if "lora" in name} == {"q_proj", "v_proj"}
    assert not Path("run/model.safetensors").exists()
    base, merged = state(tiny), state("run")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(moved) == 8
    for name in moved:
        assert name.startswith("connector") or name.endswith(("q_proj.weight", "v_proj.weight"))


def test_a_lora_over_a_preset_saves_its_base_beside_it(go):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    flags = ["--model", "toy", "--max-steps", 2, "--lora-r", 2]
    assert go(*flags) == {0}
    before = state("run")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained("run")  # finds the base from here
    base = theirs.get_parameter("model.language_model.layers.0.self_attn.q_proj.base_layer.weight")
    assert torch.equal(base, state("run/base")["decoder.layers.0.self_attn.q_proj.weight"])
    Path("run").rename("moved")
    assert all(torch.equal(t, before[name]) for name, t in state("moved").items())
    base, merged = VLM.from_pretrained("moved/base").state_dict(), VLM.from_pretrained("moved").state_dict()
    assert base.keys() == merged.keys() and not all(torch.equal(base[name], merged[name]) for name in base)


def state(directory):
    return VLM.from_pretrained(directory).state_dict()


def test_a_lora_over_a_lora_opens_and_goes_on(go):
    flags = ["--lora-r", 2, "--save-every", 2, "--max-steps", 4]
    assert go("--lora-r", 2, "--max-steps", 4, out="one") == {0}
    assert go(*flags, "--model", "one", out="whole") == {0}
    go(*flags, "--model", "one", during=lambda children: kill_after(children, "run/checkpoint-000002"))
    assert go(*flags, "--model", "one", "--resume") == {0} and losses("run") == losses("whole")
    below, above = state("one"), state("run")
    assert all(torch.equal(t, state("run/base")[name]) for name, t in below.items())
    assert any(not torch.equal(t, above[name]) for name, t in below.items())


def test_a_lora_that_was_moved_keeps_its_base_and_takes_no_other(go, tiny, tmp_path, capfd):
    flags = ["--model", "toy", "--max-steps", 2, "--lora-r", 2]
    assert go(*flags) == {0}
    before = state("run")
    assert go(*flags, "--seed", 1) == {0}  # moves the first aside
    assert all(torch.equal(t, before[name]) for name, t in state("run.1").items())
    assert not all(torch.equal(t, before[name]) for name, t in state("run").items())
    for file in Path("run").rglob("adapter_config.json"):
        assert str(tmp_path) not in file.read_text()

    # The model that it is over lies elsewhere, and another one comes in its place.
    shutil.copytree(tiny, "mine")
    flags = ["--model", "mine", "--lora-r", 2, "--max-steps", 2]
    assert go(*flags, out="lora") == {0}
    assert go("--max-steps", 2, out="mine") == {0}  # moves it aside
    with pytest.raises(UserError, match="is another model by now"):
        VLM.from_pretrained("lora")
    assert go(*flags, "--resume", out="lora") == {1}
    assert "is another model by now" in capfd.readouterr().err
    VLM.from_pretrained("lora", llm="mine.1")


def test_a_lora_without_llm_in_train_is_refused(go, capfd):
    assert go("--lora-r", 4, "--train", "connector") == {1} and "add llm to --train" in capfd.readouterr().err


def llava_like(n, seed=0):
    """Lengths of records like LLaVA-665K's: 94% with 576 visual tokens, texts of 250 tokens on average."""
    draw = np.random.default_rng(seed)
    pictures = np.where(draw.random(n) < 0.94, 576, 0)
    texts = np.clip(draw.lognormal(5.15, 0.85, n), 20, 1400)
    return (pictures + texts).astype(int).tolist()


def test_batches_under_a_token_budget_waste_less_than_5_percent_on_llava_like_lengths():
    n_seen = n_padded = 0
    widths = set()
    no_picture = {
        "pixels": torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        "layout": torch.empty(0, 2, dtype=torch.int64),
    }
    for step in range(20):
        rows = []
        for length in llava_like(128, step):
            zeros = torch.zeros(length, dtype=torch.int64)
            rows.append({"tokens": zeros, "labels": zeros, "id": str(length)} | no_picture)
        made = data.micro_batches(rows, 0, 0, budget=16384)
        assert sorted(i for batch in made for i in batch["record_ids"]) == sorted(row["id"] for row in rows)
        for batch in made:
            tokens = batch["tokens"]
            assert tokens.numel() <= 16384 and tokens.shape == batch["labels"].shape
            assert tokens.shape[1] % 32 == 0
            n_seen += int(batch["lengths"].sum())
            n_padded += tokens.numel()
            widths.add(tokens.shape[1])
    assert 1 - n_seen / n_padded < 0.05 and len(widths) <= 60


def test_a_token_budget_changes_the_memory_and_not_the_training(go):
    flags = ["--batch-size", 8, "--max-steps", 10]
    assert go(*flags, out="one") == {0}
    assert go(*flags, "--token-budget", 128, out="two") == {0}
    close_runs("one", "two")


# ---- mixtures ----


def write_lines(path, n, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "a"}]
    lines = [{"id": f"{name}{i}", "image": "p.png", "conversations": turns} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_mixture_shows_each_file_as_often_as_its_weight_says(tmp_path):
    a, b = write_lines(tmp_path / "a.jsonl", 10, "a"), write_lines(tmp_path / "b.json", 4, "b")
    mixed = Records(f"{a},{b}", tmp_path, "0.5,2.25")
    ids = [mixed[i]["id"] for i in range(len(mixed))]
    assert sum(i.startswith("a") for i in ids) == len({i for i in ids if i.startswith("a")}) == 5
    assert sorted(ids.count(f"b{i}") for i in range(4)) == [2, 2, 2, 3]
    assert mixed[0]["where"].startswith(str(a)) and mixed[len(mixed) - 1]["where"].startswith(str(b))
    with pytest.raises(UserError, match="--data-weights 1: .* one number for each file"):
        Records(f"{a},{b}", tmp_path, "1")


def test_a_smaller_fraction_is_part_of_a_larger_and_the_seed_decides(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", 100, "a")

    def ids(fraction, seed=0):
        records = Records(str(file), tmp_path, "", fraction, seed)
        return {records[i]["id"] for i in range(len(records))}

    assert [len(ids(f)) for f in (0.1, 0.5, 1.0)] == [10, 50, 100]
    assert ids(0.1) < ids(0.5) and ids(0.1) != ids(0.1, seed=1)


def test_a_meta_json_as_mmprs_is_a_mixture_each_with_its_own_folder_of_pictures(tmp_path):
    for name, n in (("x", 4), ("y", 6)):
        write_lines(tmp_path / name / "lines.jsonl", n, name)
    meta = {}
    for name, times in ("x", 2), ("y", 0.5):
        entry = {"root": name, "annotation": f"{name}/lines.jsonl", "data_augment": False, "length": 5}
        meta[name] = entry | {"repeat_time": times}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    mixed = Records(str(tmp_path / "meta.json"))
    rows = [mixed[i] for i in range(len(mixed))]
    assert [sum(r["id"].startswith(name) for r in rows) for name in "xy"] == [8, 3]
    assert {str(path) for r in rows for path in picture_paths(r)} == {
        str(tmp_path / name / "p.png") for name in "xy"
    }
    (tmp_path / "meta.json").write_text(json.dumps({"x": meta["x"] | {"root": "/the/authors/cluster"}}))
    with pytest.raises(UserError, match="'x'.*no such folder. Write your own paths"):
        Records(str(tmp_path / "meta.json"))


# ---- tripwires ----


def test_each_evaluation_compares_with_shuffled_pictures(go, mixed):
    asked = {"text": "What color?", "answer": "blue"}
    rows = [asked | {"question_id": i, "image": f"{i}.png"} for i in range(6)]
    (mixed.parent / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go("--val", mixed.parent / "val.jsonl", "--eval-every", 10) == {0}
    looks = [line for line in map(json.loads, open("run/log.jsonl")) if "val_loss" in line]
    assert len(looks) == 2 and all(line["val_loss_shuffled"] > 0 for line in looks)


def test_a_dry_run_says_it_all_and_reads_no_weights(go, tiny, capfd, tok, tmp_path):
    cfg = tiny_config(tok)
    clip, llama = support_export.clip_json(cfg.vision), support_export.llama_json(cfg.decoder)
    for part, config in ("clip", clip), ("llama", llama):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))  # and no weights at all
    shutil.copy(tok.path, tmp_path / "llama")
    flags = ["--model", "llava-1.5-7b", "--vision", tmp_path / "clip", "--llm", tmp_path / "llama"]
    assert go(*flags, "--lora-r", 4, "--max-length", 512, "--dry-run") == {0}
    said = capfd.readouterr().out
    for word in "data ", "steps ", "memory ", "1 x A100", "hours", "LoRA of rank 4", "frozen", "GB":
        assert word in said, word
    assert not Path("run").exists()


def without_content(path, shapes):
    """A safetensors file that has its true size and holds nothing."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_what_does_not_fit_together_is_said_before_any_weight_is_read(go, tiny, tok, tmp_path, capfd, more):
    def refused(*flags):
        assert go(*flags, *more) == {1}
        said = capfd.readouterr().err
        assert "loaded" not in said
        return said

    assert "error: nowhere: " in refused("--projector", "nowhere")
    without_content(tmp_path / "p.safetensors", {"model.mm_projector.weight": (32, 8)})
    assert "p.safetensors: " in refused("--projector", tmp_path / "p.safetensors")

    clip = str(ROOT / "assets" / "toy-clip")
    assert "names 3 towers" in refused("--model", "toy", "--vision", ",".join([clip] * 3))

    for flag in "--model", "--vision", "--llm":
        preset = [] if flag == "--model" else ["--model", "llava-1.5-7b"]
        assert "hf download some/model-7b --local-dir DIR" in refused(*preset, flag, "some/model-7b")

    # The words of another decoder; a tower of another width than the connector's.
    llama = support_export.llama_json(replace(tiny_config(tok).decoder, vocab_size=300))
    clip = support_export.clip_json(model.PRESETS["toy"].vision)
    for name, config in ("llama", llama), ("clip", clip):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    ingredients = ["--model", "toy", "--llm", tmp_path / "llama", "--tokenizer", ROOT / "assets/toy-vicuna"]
    assert "they do not belong together" in refused(*ingredients)
    assert "--image-size and --from-scratch are for presets" in refused("--model", tiny, "--image-size", 32)
    (tmp_path / "llama/config.json").write_text(json.dumps(llama | {"model_type": {}}))
    assert refused(*ingredients).startswith(f"error: {tmp_path / 'llama'}")
    towerless = tmp_path / "towerless"
    save_without_tower(tiny, towerless)
    assert "towerless" in refused("--model", towerless, "--vision", tmp_path / "clip")


def save_without_tower(directory, out):
    """As liuhaotian's are: a config that names its tower, and everything else."""
    kept = {name: t for name, t in weights(directory).items() if "vision" not in name}
    config = json.loads((directory / "config.json").read_text())
    write_model(out, kept, {}, config)
    shutil.copy(directory / "tokenizer.model", out)


# ---- kill -9 ----


@pytest.mark.parametrize("flag", ["--no-shard", "--shard"])
def test_two_processes_killed_at_random_moments_end_with_the_uninterrupted_weights(go, flag):
    flags = [flag, "--max-steps", 40, "--save-every", 1]
    draw, n_killed = random.Random(0), 0
    assert go(*flags, "--save-every", 0, out="undisturbed", n=2) == {0}

    def newest():
        return max(Path("run").glob("checkpoint-*"), default=None)

    def kill(children):
        nonlocal n_killed
        began, before = time.time(), newest()
        while newest() == before and time.time() - began < 30 and any(child.is_alive() for child in children):
            time.sleep(0.005)  # some progress is made between two kills
        time.sleep(draw.random() * 0.05)
        n_killed += any(child.is_alive() for child in children)
        for child in children:
            child.kill()

    for _ in range(3):
        resume = ["--resume"] if Path("run/log.jsonl").exists() else []
        go(*flags, *resume, n=2, during=kill)
        for checkpoint in Path("run").glob("checkpoint-*"):
            VLM.from_pretrained(checkpoint)
            Tokenizer(checkpoint)
            torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert go(*flags, "--resume", "--save-every", 0, n=2) == {0} and n_killed == 3
    assert losses("run") == losses("undisturbed")
    assert all(torch.equal(t, weights("undisturbed")[name]) for name, t in weights("run").items())
    assert not list(Path("run").rglob(".*"))  # half a save is not left behind


# ---- recipes ----

# The others are in test_mpo.py.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if "mpo" not in path.stem)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_planned_at_true_size_without_any_weights(
    recipe, tok, mixed, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    seven = model.PRESETS["llava-1.5-7b"]
    is_v1 = "v1-" in recipe.stem and "1.5" not in recipe.stem
    clip = replace(seven.vision, image_size=224 if is_v1 else 336)
    llama = support_export.llama_json(replace(seven.decoder, vocab_size=tok.vocab_size))
    tower = {"patch_size": 14, "num_attention_heads": 16}
    dino = {"image_size": 518, "hidden_size": 1024, "num_hidden_layers": 24}
    siglip = {"image_size": 384, "hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304}
    configs = {
        "CLIP": support_export.clip_json(clip),
        "VICUNA": llama,
        "LLAMA": llama,
        "DINO": tower | dino | {"model_type": "dinov2_with_registers"},
        "SIGLIP": tower | siglip | {"model_type": "siglip_vision_model"},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        shutil.copy(tok.path, tmp_path / name)
    if is_v1:
        connector = {"weight": (4096, 1024), "bias": (4096,)}
    else:
        connector = {"0.weight": (4096, 1024), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
    shapes = {f"model.mm_projector.{name}": shape for name, shape in connector.items()}
    without_content(tmp_path / "stage1.safetensors", shapes)

    files = {"PROJECTOR": tmp_path / "stage1.safetensors", "DATA": mixed, "IMAGES": mixed.parent}
    files |= {name: tmp_path / name for name in configs}
    environment = os.environ | {"LAUNCH": "echo"} | {name: str(path) for name, path in files.items()}
    command = [recipe, "--dry-run", "--device", "cpu"]
    echo = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    if "pretrain" in recipe.stem:  # captions: each record has a picture
        records = [r for r in json.loads(mixed.read_text()) if "image" in r]
        mixed.write_text(json.dumps(records))
    assert call(train.main, *echo.split()[1:]) == 0
    said = capfd.readouterr().out
    assert re.search(r"llm +6,[0-9]{3}", said) and "frozen" in said and "GB" in said


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda path: path.stem)
def test_a_recipe_without_a_variable_says_which_and_what_to_put_there(recipe):
    text = recipe.read_text()
    needed = re.findall(r': "\${(\w+):\?', text)
    used = set(re.findall(r'\$([A-Z]+)\b', text)) - {"OUT"}
    assert set(needed) == used
    for missing in needed:
        others = {name: "there" for name in needed if name != missing}
        done = subprocess.run(
            ["sh", recipe], env={"PATH": os.environ["PATH"], "LAUNCH": "echo", **others},
            capture_output=True, text=True)
        assert done.returncode != 0
        assert f"{missing}: set it to " in done.stderr


def test_a_log_file_gets_a_line_now_and_then_and_no_bar(capfd, monkeypatch):
    for _ in Bar(range(50), "check"):
        time.sleep(0.005)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(Bar, "SECONDS", 0.1)
    for _ in Bar(range(50), "check"):
        time.sleep(0.01)
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 6
    assert all(re.fullmatch(r"check: \d+ of 50, [\d:]+ left", line) for line in lines)


def test_answers_depend_on_the_weights_of_a_model_in_any_format_and_on_those_under_a_lora(go, tmp_path):
    go("--lora-r", 2, "--max-steps", 1, out="lora")
    names = [path.name for path in model_files("lora")]
    assert names == ["adapter_model.safetensors", "model.safetensors"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").touch()
    assert model_files("old") == [Path("old/pytorch_model.bin")]
