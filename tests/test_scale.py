"""Training at scale: the loss without logits, LoRA, precision, batches, several processes. Every name is a claim; models are tiny and random."""

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import model
import train
from data import IGNORE, Tokenizer, run
from model import VLM, DecoderConfig, VLMConfig, add_lora, head_loss, load_adapter, lora_off, merged_state, save_adapter, save_processor
from vision import UserError, VisionConfig

ROOT = Path(train.__file__).parent
fork = multiprocessing.get_context("fork").Process


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tok():
    return Tokenizer(ROOT / "assets/toy-vicuna")


def tiny_config(tok, **changes):
    return VLMConfig(VisionConfig(image_size=32, patch_size=8, n_embd=32, n_layer=2, n_head=2, n_hidden=64),
                     DecoderConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_hidden=64, block_size=512),
                     image_token=tok.image, pad_token=tok.pad, **changes)


@pytest.fixture
def tiny(tok, tmp_path):
    torch.manual_seed(0)
    vlm, directory = VLM(tiny_config(tok)), tmp_path / "tiny"
    save_processor(directory, tok.path, vlm.cfg)
    vlm.save_pretrained(directory)
    return directory


def a_batch(cfg, rows=3, length=40):
    """-> tokens, pixels, labels; a picture in each row, and labels of unequal number."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 900, (rows, length), generator=draw)
    tokens[:, 1 : 1 + cfg.vision.n_token] = cfg.image_token
    labels = torch.where(torch.arange(length) > torch.tensor([[20], [30], [38]])[:rows], tokens, IGNORE)
    return tokens, torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=draw), labels


# ---- the loss without logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [50, 30_000])                                 # one slice, and several: a slice holds 2^23 logits
def test_the_head_loss_and_both_its_gradients_are_those_of_autograd(V):
    draw = torch.Generator().manual_seed(0)
    h, W, y = torch.randn(601, 16, generator=draw), torch.randn(V, 16, generator=draw), torch.randint(0, V, (601,), generator=draw)
    ours, theirs = ([t.clone().requires_grad_() for t in (h, W)] for _ in range(2))
    a, b = head_loss(*ours, y) / 7, F.cross_entropy(F.linear(*theirs), y, reduction="sum") / 7
    a.backward(), b.backward()
    assert_close(a, b)
    for mine, autograds in zip(ours, theirs):
        assert_close(mine.grad, autograds.grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_without_grad_there_is_none_at_all():
    h, W, y = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.tensor([1, 2, 3, 4, 8])
    head_loss(h, W, y).backward()
    assert h.grad is not None and W.grad is None
    with torch.no_grad():
        assert not head_loss(h, W, y).requires_grad


def test_the_head_loss_of_huge_logits_is_finite_and_nan_stays_nan():
    W, y = torch.eye(3), torch.tensor([0])
    assert_close(head_loss(torch.tensor([[0.0, 1e4, 0.0]]), W, y), torch.tensor(1e4))
    assert head_loss(torch.tensor([[0.0, float("nan"), 0.0]]), W, y).isnan()


def test_under_autocast_the_head_runs_in_bfloat16_and_its_gradient_stays_float32():
    torch.manual_seed(0)
    h, W, y = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True), torch.randint(0, 500, (64,))
    exact = F.cross_entropy(h @ W.T, y, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(h, W, y)
    loss.backward()
    assert loss.dtype == W.grad.dtype == torch.float32
    assert_close(loss, exact, rtol=1e-2, atol=0.0)
    assert_close(W.grad, torch.autograd.grad(exact, W)[0], rtol=0.05, atol=0.05)


def test_no_tensor_of_the_size_of_all_logits_is_ever_made():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out
    h, W = torch.randn(2048, 8, requires_grad=True), torch.randn(32_000, 8, requires_grad=True)
    with Watch():
        head_loss(h, W, torch.randint(0, 32_000, (2048,))).backward()
    assert max(sizes) <= 2**23 < 2048 * 32_000 / 7


# ---- LoRA ------------------------------------------------------------------------------------------------------------


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


def test_switched_off_it_is_the_base_bit_for_bit(tiny):
    base, vlm = VLM.from_pretrained(tiny), taught(with_lora(tiny))
    base.connector.load_state_dict(vlm.connector.state_dict())
    tokens, pixels, _ = a_batch(base.cfg)
    with lora_off(vlm):
        assert torch.equal(vlm(tokens, pixels), base(tokens, pixels))
    assert not torch.equal(vlm(tokens, pixels), base(tokens, pixels))


def test_merged_equals_unmerged(tiny, tmp_path):
    vlm = taught(with_lora(tiny))
    vlm.save_pretrained(tmp_path / "merged")
    save_adapter(vlm, tmp_path / "adapter", tiny)
    tokens, pixels, _ = a_batch(vlm.cfg)
    for directory in "merged", "adapter":                                   # an adapter's directory opens like any other
        assert_close(VLM.from_pretrained(tmp_path / directory)(tokens, pixels), vlm(tokens, pixels), rtol=1e-5, atol=1e-5)
    assert model.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "converted")]) == 0
    assert all(torch.equal(t, merged_state(vlm)[name]) for name, t in VLM.from_pretrained(tmp_path / "converted").state_dict().items())


def test_a_saved_adapter_loads_back_exactly_and_only_into_what_it_was_trained_as(tiny, tmp_path):
    vlm = taught(with_lora(tiny))
    save_adapter(vlm, tmp_path / "adapter", tiny)
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
    save_adapter(vlm, tmp_path / "adapter", tmp_path / "base")
    tokens, pixels, _ = a_batch(vlm.cfg)
    assert_close(VLM.from_pretrained(tmp_path / "adapter")(tokens, pixels), vlm(tokens, pixels), rtol=1e-5, atol=1e-5)


def test_the_peft_library_opens_the_adapter_over_transformers_model(tiny, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    vlm = taught(with_lora(tiny))
    save_adapter(vlm, tmp_path / "adapter", tiny)
    theirs = peft.PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(tiny), tmp_path / "adapter").eval()
    tokens, pixels, _ = a_batch(vlm.cfg)
    mean, std = (torch.tensor(x)[:, None, None] for x in (vlm.cfg.vision.mean, vlm.cfg.vision.std))
    logits = theirs(input_ids=tokens, pixel_values=(pixels / 255 - mean) / std).logits
    assert_close(logits, vlm(tokens, pixels), rtol=1e-4, atol=1e-4)


# ---- activations that are made twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(tiny, lora):
    grads = []
    for k in (0, 1, 2):
        vlm = VLM.from_pretrained(tiny).train()
        if lora:
            torch.manual_seed(1)
            add_lora(vlm, 4, 8.0, dropout=0.5)                              # dropped twice alike
        vlm.decoder.recompute = k
        torch.manual_seed(3)
        vlm(*a_batch(vlm.cfg)).backward()
        grads.append([p.grad for p in vlm.parameters() if p.grad is not None])
    assert len(grads[0]) and all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


# ---- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Sixteen records, every second one a text, with answers of very unequal length."""
    turns = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    records = []
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 90, 200 - 20 * i)).save(tmp_path / f"{i}.png")
        records.append({"id": f"picture {i}", "image": f"{i}.png", "conversations": turns("<image>\nWhat color?", "blue " * (1 + i))})
        records.append({"id": f"text {i}", "conversations": turns("How many cats are there?", "There are two cats. " * (1 + 3 * (i % 4)))})
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    return tmp_path / "mixed.json"


@pytest.fixture
def go(tiny, mixed, tmp_path, monkeypatch):
    """go("--lr", 1, out="a", n=2): train in n processes; -> the exit codes of all."""
    monkeypatch.chdir(tmp_path)
    base = ["--model", tiny, "--data", mixed, "--batch-size", 2, "--max-steps", 20, "--save-every", 0, "--lr", "3e-3", "--eval-every", 0,
            "--no-final-eval", "--workers", 0, "--device", "cpu"]

    def start(*flags, out="run", n=1, during=None):
        flags = [str(word) for word in [*base, "--out", out, *flags]]
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = str(s.getsockname()[1])

        def one(rank):
            if n > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=port)
            os._exit(run(lambda: train.main(flags)))
        children = [fork(target=one, args=(r,)) for r in range(n)]
        for child in children:
            child.start()
        if during:
            during(children)
        for child in children:
            child.join(120)
            if child.exitcode:                                              # torchrun ends the others, so do we
                [other.kill() for other in children]
        return {child.exitcode for child in children}
    return start


def losses(out):
    return [line["loss"] for line in map(json.loads, open(Path(out) / "log.jsonl")) if "loss" in line]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def close_runs(a, b, tolerance=1e-5):
    assert_close(losses(a), losses(b), rtol=tolerance, atol=tolerance)
    for name, t in weights(a).items():
        assert_close(t, weights(b)[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flags", [["--no-shard"], ["--shard"], ["--shard", "--train", "connector,llm,vision", "--micro-batch-size", 1],
                                   ["--no-shard", "--train", "connector,llm,vision", "--token-budget", 64]])
def test_two_processes_give_the_losses_and_the_model_of_one(go, flags):
    assert go(*flags, out="one") == {0} and go(*flags, out="two", n=2) == {0}
    assert len(losses("two")) == 20
    close_runs("one", "two")


@pytest.mark.parametrize("before, after", [((2, "--shard"), (1, "--no-shard")), ((1, "--no-shard"), (2, "--shard")), ((2, "--shard"), (3, "--shard")),
                                           ((2, "--no-shard"), (2, "--shard"))])
def test_what_some_processes_saved_others_resume(go, before, after):
    def stop(children):
        while not Path("run/checkpoint-000008").exists() and any(c.is_alive() for c in children):
            time.sleep(0.01)
        [child.kill() for child in children]
    assert go(out="whole") == {0}
    go("--save-every", 8, before[1], n=before[0], during=stop)
    assert go("--save-every", 8, after[1], "--resume", n=after[0]) == {0}
    close_runs("run", "whole")


def test_shares_are_even_and_together_the_batch(monkeypatch):
    class Sized:
        n_bytes = lambda self, i: 100 * (i % 7) + 50
        has_picture = lambda self, i: i % 3 == 0
    monkeypatch.setattr(train, "world", lambda: 4)
    hands = []
    for r in range(4):
        monkeypatch.setattr(train, "rank", lambda: r)
        hands.append(train.share(list(range(64)), Sized(), 576))
    assert sorted(i for hand in hands for i in hand) == list(range(64))
    load = [sum(25 * (i % 7) + 12.5 + 576 * (i % 3 == 0) for i in hand) for hand in hands]
    assert max(load) < 1.05 * min(load)
