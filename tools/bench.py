"""How fast, beside a peer: the same model and weights, here and in transformers, doing the same work.

    python -m tools.bench train --peer transformers      # a step of LLaVA's second stage, 10M parameters
    python -m tools.bench train --preset 100m --dtype bfloat16 --peer transformers --compile
    python -m tools.bench mpo --peer transformers        # a step of preference learning
    python -m tools.bench sample --peer transformers     # greedy decoding

Two runs on a busy machine cannot be compared. So both sides run step by step in turn in one process, each
ratio is of two neighbouring steps, and the median of the ratios counts. Time is the process's own, on one CPU
thread: what others do on the machine is not in it. Memory is the highest a process of its own ever held, with
and without what it held before its first step.

A step of mpo: pairs with 256 visual tokens and 60 tokens an answer, and the three losses of mpo.py on both
sides. Here a pair is one row, its picture is looked at once, and what the reference says is known
(--no-precomputed: asked in every step). The peer does it the usual way: two rows a pair, the picture encoded
for each, the reference asked in every step, a log-softmax of all logits.
"""

import copy
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import mpo
from model import IGNORE, VLM, DecoderConfig, VLMConfig
from support.cli import REQUIRED, UserError, arg, parse, run_program
from support.quantize import join_products
from support.start import init_weights
from vision import VisionConfig

N_STEP = 7                           # of each side that count, after two that do not
N_NEW = 64                           # tokens that sample generates


class Work(NamedTuple):
    """What both sides do in a step."""
    cfg: VLMConfig
    rows: int                        # records, or pairs
    words: int                       # text tokens of a record, or of a pair before its answers
    n_answer: int                    # supervised tokens of a record, or tokens of each of a pair's answers


SIZES = {
    "10m": Work(
        VLMConfig(
            VisionConfig(image_size=112, patch_size=14, n_embd=192, n_layer=4, n_head=3, n_hidden=768),
            DecoderConfig(2048, n_layer=6, n_head=4, n_kv_head=4, n_embd=256, head_dim=64, n_hidden=704),
        ),
        rows=32, words=48, n_answer=32,
    ),
    "100m": Work(
        VLMConfig(
            VisionConfig(image_size=168, patch_size=14, n_embd=384, n_layer=8, n_head=6, n_hidden=1536),
            DecoderConfig(32000, n_layer=10, n_head=10, n_kv_head=10, n_embd=640, head_dim=64, n_hidden=1728),
        ),
        rows=8, words=112, n_answer=64,
    ),
}


@dataclass
class BenchConfig:
    program: str = arg(REQUIRED, "what a step is", choices=("train", "mpo", "sample"), positional=True)
    preset: str = arg("10m", "the model's size", choices=tuple(SIZES))
    peer: str = arg("", "LlavaForConditionalGeneration beside it; empty: none", choices=("transformers",))
    dtype: str = arg("float32", "bfloat16 is autocast, on both sides", choices=("float32", "bfloat16"))
    vocab: int = arg(0, "words in the vocabulary; 0: as the preset says")
    rows: int = arg(0, "records or pairs in the batch; 0: as the preset says, one for sample")
    precomputed: bool = arg(True, "mpo: here the reference is not asked again in every step")
    compile: bool = arg(False, "torch.compile: here the blocks, there the model")
    compile_peer: bool = arg(True, "--no-compile-peer: --compile leaves the peer as it is")


def main(argv=None):
    cfg = parse(BenchConfig, argv, description=__doc__)
    torch.set_num_threads(1)
    work = plan_work(cfg)
    n_word = work.cfg.decoder.vocab_size
    print(f"{cfg.program}: {cfg.preset}, {n_word:,} words, {work.rows} rows, {cfg.dtype}, "
          f"torch {torch.__version__}")
    seconds, outputs = run_in_turn(cfg, work)
    for name, times in seconds.items():
        peak, before = measure_memory(cfg, name)
        print(f"{name:12} {1e3 * statistics.median(times):9.1f} ms, peak memory {peak / 1e6:,.0f} MB, "
              f"of the step alone {(peak - before) / 1e6:,.0f} MB")
    if cfg.peer:
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
        agreement = check_agreement(cfg, *outputs.values())
        print(f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
              f"{agreement}")
    return 0


def run_in_turn(cfg, work):
    """-> {side: seconds of each step that counts}, {side: what each step gave}"""
    steps = {name: make_step(model, cfg, work) for name, model in make_models(cfg, work).items()}
    seconds = {name: [] for name in steps}
    outputs = {name: [] for name in steps}
    # The first step compiles and warms up, the second makes nothing new: neither counts.
    for i in range(N_STEP + 2):
        for name, step in steps.items():
            began = time.process_time()
            outputs[name].append(step().tolist())
            if i >= 2:
                seconds[name].append(time.process_time() - began)
    return seconds, outputs


def check_agreement(cfg, ours, theirs):
    """Both must have computed the same: how well do the losses agree, or how many tokens of the answers?"""
    if cfg.program == "sample":
        same = torch.tensor(ours[0]) == torch.tensor(theirs[0])
        return f"{same.float().mean():.0%} of the tokens are the same"
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs))
    if worst > (1e-3 if cfg.dtype == "float32" else 3e-2):
        raise UserError(
            f"the losses differ by {worst:.1e}: {ours[:3]} here, {theirs[:3]} there; "
            "this would compare two different things"
        )
    return f"the losses agree to {worst:.0e}"


# ---- the work ----


def plan_work(cfg):
    work = copy.deepcopy(SIZES[cfg.preset])
    plan = work.cfg
    if cfg.program == "mpo":
        plan.vision.image_size = 16 * plan.vision.patch_size
        work = work._replace(rows=8, words=32, n_answer=60)
    elif cfg.program == "sample":
        work = work._replace(rows=1)
    plan.decoder.vocab_size = cfg.vocab or plan.decoder.vocab_size
    plan.image_token = plan.decoder.vocab_size - 2
    plan.pad_token = plan.decoder.vocab_size - 1
    return work._replace(rows=cfg.rows or work.rows)


def random_batch(cfg, work):
    """-> tokens and labels (B, T), pixels (B, 3, S, S), normalised as the peer wants them."""
    torch.manual_seed(0)
    vision = work.cfg.vision
    T = vision.n_token + work.words
    if cfg.program == "mpo":
        T += 2 * work.n_answer
    tokens = torch.randint(3, work.cfg.image_token, (work.rows, T))
    tokens[:, 1 : 1 + vision.n_token] = work.cfg.image_token
    labels = tokens.clone()
    labels[:, : -work.n_answer] = IGNORE
    pixels = torch.randn(work.rows, 3, vision.image_size, vision.image_size)
    return tokens, labels, pixels


def make_models(cfg, work):
    """{side: model}, with the same weights."""
    torch.manual_seed(0)
    vlm = init_weights(VLM(work.cfg))
    if not cfg.peer:
        return {"plainvlm": vlm}
    try:
        from transformers import LlavaForConditionalGeneration
    except ImportError:
        raise UserError("--peer transformers: pip install transformers, or leave out --peer") from None
    with tempfile.TemporaryDirectory() as directory:
        vlm.save_pretrained(directory)
        theirs = LlavaForConditionalGeneration.from_pretrained(
            directory, attn_implementation="sdpa", dtype=torch.float32
        )
    return {"plainvlm": vlm, "transformers": Peer(theirs)}


class Peer(nn.Module):
    """A model of transformers, called as a VLM is."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.vision = model.model.vision_tower

    def forward(self, tokens, pixels, labels=None):
        mask = torch.ones_like(tokens)
        found = self.model(input_ids=tokens, attention_mask=mask, pixel_values=pixels, labels=labels)
        return found.logits if labels is None else found.loss

    def generate(self, tokens, pixels, n, stop):
        """It never stops either: n tokens at least, none of `stop`."""
        ids = self.model.generate(
            input_ids=tokens, pixel_values=pixels, do_sample=False, max_new_tokens=n, min_new_tokens=n,
            suppress_tokens=stop, pad_token_id=0,
        )
        return ids[:, tokens.shape[1] :]


def make_step(model, cfg, work):
    """-> a function that does the work once, and returns the loss or the new ids."""
    is_ours = isinstance(model, VLM)
    model.vision.requires_grad_(False)                   # as in LLaVA's second stage
    if cfg.compile and (is_ours or cfg.compile_peer):
        for part in [*model.decoder.layers, *model.vision.blocks] if is_ours else [model]:
            part.compile()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, labels, pixels = random_batch(cfg, work)
    if cfg.program == "train":
        compute = partial(model, tokens, pixels, labels)
    elif cfg.program == "mpo":
        with autocast:
            compute = pair_loss(model, cfg, tokens, pixels, work.n_answer)
    else:
        model.eval()
        if is_ours:
            join_products(model)                         # as sample.py does
        # Past any end token, so that both sides make as many tokens: none is ever <image> or <pad>.
        never = [work.cfg.image_token, work.cfg.pad_token]
        compute = partial(model.generate, tokens, pixels, N_NEW, stop=never)

    def step():
        with autocast:
            found = compute()
        if cfg.program != "sample":
            found.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return step


# ---- preferences ----


def pair_loss(model, cfg, tokens, pixels, n):
    """-> a function: the loss of mpo.py, of pairs with n tokens an answer."""
    is_ours = isinstance(model, VLM)
    parts = tokens.split([tokens.shape[1] - 2 * n, n, n], dim=1)    # prompt, chosen, rejected
    sums = partial(sums_of_rows if is_ours else sums_of_two_rows, parts, pixels)
    known = []
    nets = [model]
    if is_ours and cfg.precomputed:
        with torch.no_grad():
            known = sums(nets)
    else:
        nets.append(copy.deepcopy(model).requires_grad_(False))
    loss_cfg = mpo.MPOConfig()

    def compute():
        s, s_ref = sums(nets) + known
        rewards = loss_cfg.beta * (s - s_ref)
        terms = mpo.mpo_terms(rewards, s, torch.full_like(s, n), 0.0, loss_cfg)
        return sum(weight * term for weight, term in terms.values())

    return compute


def sums_of_rows(parts, pixels, nets):
    """-> the sums (B, 2) of each of some nets. A pair is one row, its picture looked at once."""
    rows = [mpo.pair_row(*ids) for ids in zip(*[part.tolist() for part in parts])]
    pairs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"layout": None}
    features = nets[0].features(pixels)
    return [mpo.pair_log_probs(net, pairs, features)[0] for net in nets]


def sums_of_two_rows(parts, pixels, nets):
    """The same of 2 B rows, the chosen answers first."""
    prompt, *answers = parts
    rows = torch.cat([prompt.repeat(2, 1), torch.cat(answers)], dim=1)  # (2 B, T)
    found = []
    for net in nets:
        logits = net(rows, pixels.repeat(2, 1, 1, 1)).float()
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])
        of_answers = log_probs[:, prompt.shape[1] - 1 :, 0]         # (2 B, n)
        found.append(of_answers.sum(1).view(2, -1).T)
    return found


# ---- memory ----


def measure_memory(cfg, name):
    """-> bytes at most, and before the first step, of a process that does two steps of one side."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(memory_of_two_steps, (replace(cfg, compile=False), name))


def memory_of_two_steps(cfg, name):
    torch.set_num_threads(1)
    work = plan_work(cfg)
    step = make_step(make_models(cfg, work)[name], cfg, work)
    before = process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")        # what was held for a moment earlier does not count
    step()
    step()
    return process_bytes("VmHWM"), before


def process_bytes(key):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s*(\d+)", status)[1]) * 1024


if __name__ == "__main__":
    sys.exit(run_program(main))
