"""Mixed Preference Optimization: teach a finetuned VLM to prefer its better answers (arXiv:2411.10442v2).

For a prompt x (picture and question), a chosen answer y_c and a rejected one y_r:
    s(y) = sum over the tokens of y of log pi(token | x, tokens before)         a sum, not a mean: beta 0.1 is made for sums
    r(y) = beta (s(y) - s_ref(y))                                               the reward; the reference is the model before training
    L    = w_p L_p + w_q L_q + w_g L_g      L_p  which of the two is better (DPO)
                                            L_q  is each one good by itself (BCO, rewards shifted by delta)
                                            L_g  keep writing good answers  (SFT on y_c, mean over its tokens)

    python mpo.py pairs --method correctness --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
    python mpo.py pairs --method dropout-ntp --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
    python mpo.py train --model DIR --data PAIRS.jsonl --image-root DIR         # through train.py's loop: its checkpoints, logs, --resume

A pair is one row, [picture and question | chosen | rejected]: the rejected answer stands at the positions of the chosen one and neither
sees the other, so the sums are those of two rows, and picture and question are computed once. A frozen tower looks once for policy and
reference. Deviations from the authors' code, all of them:
  - delta, the running mean of all rewards, is saved in the checkpoint (the original restarts it at 0); as there it grows with every
    micro-batch, but each pair counts the same. So --micro-batch-size changes nothing but delta within a step;
  - L_g is the mean over the pairs of each one's mean over its tokens, as the paper has it (the code: one mean over the tokens of a batch);
  - a pair that does not fit is skipped, counted and named in log.jsonl; the original cuts it and trains on the rest;
  - answers that ran out of tokens make no pair; the original takes them for wrong ones, or for whole ones.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import model
from data import IGNORE, Examples, Mixture, Records, collate, encode_conversation, encode_prompt, find_template, open_records, parse_args, run
from model import PRESETS, write_whole
from train import (Flags, TrainConfig, arg, build, complete, few, find_files, fit, guarded, is_right, newest_run, one_of, open_model, pick_device,
                   precision, read_flags, text_of)
from vision import MODES, UserError, cut_tiles, open_image


# ---- the losses: each a mean over pairs of what its equation says, of tensors (B,) ---------------------------------------


def dpo_loss(r_c, r_r):
    """L_p = -log s(r_c - r_r)                                       arXiv:2305.18290, Eq. 7"""
    return -F.logsigmoid(r_c - r_r).mean()


def bco_loss(r_c, r_r, delta):
    """L_q = -log s(r_c - delta) - log s(-(r_r - delta))             arXiv:2404.04656; a sum of two terms, not their mean"""
    return -(F.logsigmoid(r_c - delta) + F.logsigmoid(delta - r_r)).mean()


def sft_loss(s_c, n_c):
    """L_g = -log pi(y_c | x) / |y_c|                                arXiv:2411.10442v2, Eq. 5: here the mean over tokens"""
    return -(s_c / n_c).mean()


def shift(delta, n, r_c, r_r):
    """The reward shift: the mean of all rewards so far, these included. (delta, n) of n pairs -> (delta, n) with the new ones; no gradient."""
    total = n + len(r_c)
    return delta + (torch.cat([r_c, r_r]).detach().mean().item() - delta) * len(r_c) / total, total


def cdpo_loss(r_c, r_r, epsilon):
    """-(1 - e) log s(r_c - r_r) - e log s(r_r - r_c)                ericmitchell.ai/cdpo.pdf: a label is wrong with probability e"""
    return -((1 - epsilon) * F.logsigmoid(r_c - r_r) + epsilon * F.logsigmoid(r_r - r_c)).mean()


def robust_dpo_loss(r_c, r_r, epsilon):
    """(-(1 - e) log s(r_c - r_r) + e log s(r_r - r_c)) / (1 - 2e)   arXiv:2403.00409, Eq. 12: unbiased under such labels"""
    return (epsilon * F.logsigmoid(r_r - r_c) - (1 - epsilon) * F.logsigmoid(r_c - r_r)).mean() / (1 - 2 * epsilon)


def hinge_loss(r_c, r_r):
    """max(0, 1 - (r_c - r_r))                                       RSO, arXiv:2309.06657, Eq. 8"""
    return F.relu(1 - (r_c - r_r)).mean()


def ipo_loss(d_c, d_r, n_c, n_r, beta):
    """(d_c / |y_c| - d_r / |y_r| - 1 / 2 beta)^2, d = s - s_ref      arXiv:2310.12036, Eq. 17; means over tokens, as in the ablation"""
    return (d_c / n_c - d_r / n_r - 1 / (2 * beta)).square().mean()


def sppo_loss(d_c, d_r, beta):
    """(d_c - 1 / 2 beta)^2 + (d_r + 1 / 2 beta)^2                   arXiv:2405.00675, Eq. 4.7, the winner winning surely"""
    return ((d_c - 0.5 / beta).square() + (d_r + 0.5 / beta).square()).mean()


def aot_loss(gap, gap_ref, beta):
    """-log s(beta (sort(gap) - sort(gap_ref))), gap = s_c - s_r     arXiv:2406.05882, paired; sorted over the batch: of one pair it is DPO"""
    return -F.logsigmoid(beta * (gap.sort().values - gap_ref.sort().values)).mean()


def orpo_loss(s_c, s_r, n_c, n_r):
    """-log s(log odds_c - log odds_r), odds = p / (1 - p), p = exp(s / |y|)         arXiv:2403.07691, Eq. 7; no reference"""
    odds = lambda mean: mean - torch.log(-torch.expm1(mean))               # log p - log(1 - p), p so near 1 that 1 - p must not be rounded
    return -F.logsigmoid(odds(s_c / n_c) - odds(s_r / n_r)).mean()


TERMS = {                                        # name -> the term, of what preference() gives
    "dpo": lambda p: dpo_loss(p.r_c, p.r_r), "tr-dpo": lambda p: dpo_loss(p.r_c, p.r_r), "bco": lambda p: bco_loss(p.r_c, p.r_r, p.delta),
    "sft": lambda p: sft_loss(p.s_c, p.n_c), "cdpo": lambda p: cdpo_loss(p.r_c, p.r_r, p.epsilon),
    "robust-dpo": lambda p: robust_dpo_loss(p.r_c, p.r_r, p.epsilon), "hinge": lambda p: hinge_loss(p.r_c, p.r_r),
    "rso": lambda p: hinge_loss(p.r_c, p.r_r), "ipo": lambda p: ipo_loss(p.d_c, p.d_r, p.n_c, p.n_r, p.beta),
    "sppo": lambda p: sppo_loss(p.d_c, p.d_r, p.beta), "aot": lambda p: aot_loss(p.s_c - p.s_r, p.ref_c - p.ref_r, p.beta),
    "orpo": lambda p: orpo_loss(p.s_c, p.s_r, p.n_c, p.n_r),
}


def loss_weights(cfg):
    """--loss -> {term: weight}. ORPO brings its own NLL, with its term at the paper's 0.1 beside it."""
    name, plus, sft = cfg.loss.partition("+")
    one_of("--loss", name, ["mpo", *TERMS])
    if plus and (sft != "sft" or name in ("mpo", "sft", "orpo")):
        raise UserError(f"--loss {cfg.loss}: " + (f"{name} has the SFT term already" if sft == "sft" else "only +sft can follow a name"))
    if name in ("mpo", "orpo"):
        return {"dpo": cfg.w_p, "bco": cfg.w_q, "sft": cfg.w_g} if name == "mpo" else {"sft": cfg.w_g, "orpo": 0.1}
    return {name: 1.0} | ({"sft": cfg.w_g} if plus else {})


# ---- log-probabilities -------------------------------------------------------------------------------------------------


def log_probs(vlm, batch, seen=None, rows=1024):
    """A batch of pairs -> s (B, 2) float32, n (B, 2): sums of log-probabilities and numbers of tokens of chosen and rejected answers.

    Prompt, picture and padding count zero. The head is run on answer tokens only, `rows` of them at a time, each time once more on
    the way back: no more than (rows, V) logits exist at any moment. (model.head_loss makes its gradient on the way there, when it
    is not yet known how much each answer weighs in L.) `seen`: the pictures' vlm.features, if they are known.
    """
    part, keep = batch["part"], batch["labels"] != IGNORE                                    # (B, T)
    now = torch.arange(part.shape[1], device=part.device)
    mask = (now[:, None] >= now) & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))      # (B, T, T)
    row = keep.nonzero()[:, 0]
    x = vlm.embed(batch["tokens"], batch["pixels"] if seen is None else seen, batch["layout"])
    h = vlm.decoder(x, at=batch["at"], mask=mask[:, None], rows=row * part.shape[1] + batch["source"][keep])
    y, slot = batch["labels"][keep], 2 * row + (part[keep] == REJECTED)
    one = lambda h, y: -F.cross_entropy(vlm.decoder.lm_head(h).float(), y, reduction="none")
    many = len(y) > rows and torch.is_grad_enabled()
    s = torch.cat([checkpoint(one, *some, use_reentrant=False) if many else one(*some) for some in zip(h.split(rows), y.split(rows))])
    add = lambda values: torch.zeros(2 * len(part), device=h.device).index_add(0, slot, values).view(-1, 2)
    return add(s), add(torch.ones_like(s))


PREFIX, CHOSEN, REJECTED, PADDING = range(4)     # the parts of a row; each sees the prefix and itself
PairFiles = open_records                         # a file of pairs is a file of records


class PairExamples(Examples):
    """Pairs as rows: what data.Examples is for conversations."""

    def picture(self, i, name):
        part = self.records.parts[self.records.picks[i][0]] if isinstance(self.records, Mixture) else self.records
        image = super().picture(i, name)
        return recompressed(image, i) if part.recompress else image

    def encode(self, record, n_visual):
        for name in "question", "chosen", "rejected":
            if not isinstance(record.get(name), str):
                raise UserError(f'"{name}" is {record.get(name)!r}; a pair is {{"image", "question", "chosen", "rejected"}}')
        prefix, chosen, rejected = encode_pair(self.tok, record["question"], record["chosen"], record["rejected"], self.template, n_visual)
        if chosen == rejected or record["chosen"].strip() == record["rejected"].strip():
            raise UserError("chosen and rejected are the same answer; drop the pair")
        self.check_length(len(prefix) + max(len(chosen), len(rejected)), n_visual)
        return pair_row(prefix, chosen, rejected)


def pair_row(prefix, chosen, rejected):
    """Three lists of ids -> one row of all: tokens, labels, their positions, the row that predicts each, the part it belongs to; (T,) each."""
    p, c, r = len(prefix), len(chosen), len(rejected)
    at = [*range(p + c), *range(p, p + r)]                                 # the rejected answer stands where the chosen one does
    before = [*range(-1, p + c - 1), p - 1, *range(p + c, p + c + r - 1)]
    return {"tokens": torch.tensor(prefix + chosen + rejected), "labels": torch.tensor([IGNORE] * p + chosen + rejected), "at": torch.tensor(at),
            "source": torch.tensor(before).clamp(min=0), "part": torch.tensor([PREFIX] * p + [CHOSEN] * c + [REJECTED] * r)}


def encode_pair(tok, question, chosen, rejected, template, n_visual):
    """-> ids of the common prefix, of the chosen answer and of the rejected one; an answer ends with its stop token."""
    rows = []
    for name, answer in ("chosen", chosen), ("rejected", rejected):
        try:
            tokens, labels = encode_conversation(tok, [("human", question), ("gpt", answer)], template, n_visual)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        answered = [k for k, label in enumerate(labels) if label != IGNORE]
        if answered != list(range(answered[0], answered[-1] + 1)):
            raise UserError(f"template {template} supervises an answer in pieces; use another --template")
        rows.append((tokens[: answered[0]], tokens[answered[0] : answered[-1] + 1]))
    assert rows[0][0] == rows[1][0], "the prompt of a pair depends on its answer"
    return rows[0][0], rows[0][1], rows[1][1]


def collate_pairs(examples, pad):
    """data.collate, with all that a pair's row has."""
    return collate(examples, pad, at=0, source=0, part=PADDING) | {"index": [e["index"] for e in examples if "skipped" not in e]}


def recompressed(image, i):
    """A picture after JPEG at a quality of 75 to 100, drawn by the pair's number: data_augment."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=random.Random(i).randint(75, 100))
    return Image.open(file)


# ---- training: what the loop of train.py teaches -----------------------------------------------------------------------


@dataclass
class MPOConfig(TrainConfig):
    model: str = arg("", "model directory to go on from, and the reference; empty: the newest finished run under out/")
    data: str = arg("", "pairs: JSONL of {image, question, chosen, rejected} (MMPR), FILE,FILE, or a meta.json that mixes such files")
    out: str = arg("out/mpo", "folder for the run. An earlier run that is there is moved aside")
    loss: str = arg("mpo", f"mpo (w_p dpo + w_q bco + w_g sft), or one of {', '.join(TERMS)}, alone or with +sft")
    beta: float = arg(0.1, "scale of the rewards")
    w_p: float = arg(0.8, "weight of the preference term, DPO, in mpo")
    w_q: float = arg(0.2, "weight of the quality term, BCO, in mpo")
    w_g: float = arg(1.0, "weight of the generation term, SFT, in mpo, in orpo and behind +sft")
    epsilon: float = arg(0.1, "share of wrong labels that cdpo and robust-dpo assume, 0 to 0.5")
    reference: str = arg("precomputed", "precomputed (once, kept in reference/ beside --out), copy (a second model) or lora-off (the policy "
                                        "without its LoRA)")
    ref_alpha: float = arg(0.6, "tr-dpo: the reference becomes alpha policy + (1 - alpha) reference")
    ref_every: int = arg(512, "tr-dpo: steps between such updates")
    lr: float = arg(1e-4, "peak learning rate, after warmup; the toy's. The published ones are 5e-6 (8B) and 1e-6")
    weight_decay: float = arg(0.05, "AdamW's, on matrices only")
    bad_records: str = arg("skip", "what to do with a pair that cannot be used: stop, or skip, count and name in log.jsonl")
    stage: str = arg("finetune", "")             # without a help text: no flag
    from_scratch: bool = arg(False, "")
    projector: str = arg("", "")
    tokenizer: str = arg("", "")
    image_size: int = arg(0, "")
    token_budget: int = arg(0, "")
    shard: bool = arg(False, "")
    cache_features: float = arg(0.0, "")
    split_questions: bool = arg(False, "")
    dry_run: bool = arg(False, "")


class Pairs:
    """The lesson of preference learning; train.Answers is the other one."""
    shown, collate = ("margin", "accuracy"), staticmethod(collate_pairs)

    def __init__(self, cfg, records, vlm, tok, device, state):
        self.cfg, self.vlm, self.device, self.terms, saved = cfg, vlm, device, loss_weights(cfg), state.get("lesson") or {}
        self.examples = PairExamples(records, tok, cfg.template or vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode,
                                     cfg.max_length or vlm.cfg.decoder.block_size, cfg.bad_records)
        self.delta, self.n_delta = saved.get("delta", 0.0), saved.get("n_delta", 0)
        self.frozen_tower = not any(p.requires_grad for name, p in vlm.named_parameters() if name.startswith("vision"))
        first = lambda: vlm if state["step"] == 0 else build(cfg)[0].to(device)             # the model before training
        if cfg.reference == "precomputed":
            self.sums = self.precompute(first, tok, records)
        elif cfg.reference == "copy":
            self.ref = build(cfg)[0].to(device).requires_grad_(False)
            if self.frozen_tower:                                           # one tower is enough for both
                self.ref.vision = vlm.vision
                if vlm.cfg.vision2:
                    self.ref.vision2 = vlm.vision2
            self.ref.load_state_dict(saved.get("reference", {}), strict=False)              # tr-dpo's has moved
        elif beside := [name for name, p in vlm.named_parameters() if p.requires_grad and ".lora_" not in name]:
            raise UserError(f"--reference lora-off: {len(beside)} tensors train that are no LoRA, such as {beside[0]}, so the policy without its "
                            "LoRA is not what it began as; give --lora-r N --train llm, or --reference precomputed")

    @staticmethod
    def read(cfg):
        return open_records(cfg.data, cfg.image_root, cfg.data_weights, cfg.data_fraction, cfg.seed)

    def blame(self, net, micro, autocast):
        return few([name for m in micro for name in m["ids"]])

    def backward(self, net, micro, autocast):
        """Add the gradient of L over all pairs of a step; -> L (None: no pair could be used), what the log should hold."""
        n_pair, sums = sum(len(m["ids"]) for m in micro), Counter()
        for m in micro:
            if not m["ids"]:
                continue
            batch, share = to(m, self.device), len(m["ids"]) / n_pair
            with autocast:
                seen = self.look(batch)
                s, n = log_probs(self.vlm, batch, seen)
                p = preference(s, self.reference(batch, seen), n, self.cfg)
            self.delta, self.n_delta = shift(self.delta, self.n_delta, p.r_c, p.r_r)
            p.delta = self.delta
            terms = {name: TERMS[name](p) for name in self.terms}
            loss = sum(self.terms[name] * term for name, term in terms.items())
            (loss * share).backward()
            found = terms | {"loss": loss, "reward_chosen": p.r_c, "reward_rejected": p.r_r, "margin": p.r_c - p.r_r,
                             "accuracy": (p.r_c > p.r_r).float(), "logp_chosen": p.s_c, "logp_rejected": p.s_r, "nll": sft_loss(p.s_c, p.n_c)}
            for name, value in found.items():
                sums[name] += share * value.detach().mean().item()
        return (sums.pop("loss") if n_pair else None), {"pairs": n_pair, **sums, "delta": self.delta}

    @torch.no_grad()
    def look(self, batch):
        """The pictures' features for policy and reference alike, where the tower stays as it is; else None, and each looks by itself."""
        return self.vlm.features(batch["pixels"]) if self.frozen_tower and len(batch["pixels"]) else None

    @torch.no_grad()
    def reference(self, batch, seen):
        """s_ref (B, 2)."""
        if self.cfg.reference == "precomputed":
            return self.sums[batch["index"]].to(self.device)
        with model.lora_off(self.vlm) if self.cfg.reference == "lora-off" else contextlib.nullcontext():
            return log_probs(self.vlm if self.cfg.reference == "lora-off" else self.ref, batch, seen)[0]

    @torch.no_grad()
    def precompute(self, first, tok, records):
        """s_ref of every pair, (n, 2), from a file named by all it depends on; what of it is missing is computed by first() and appended."""
        cfg, n, began = self.cfg, len(self.examples), time.time()
        what = [self.examples.template, self.examples.image_mode, str(self.examples.vision_cfg.tiling), self.examples.max_length, cfg.dtype,
                self.device.type, records.picks.tolist() if isinstance(records, Mixture) else []]
        files = dict.fromkeys([*map(Path, cfg.data.split(",")), *(part.path for part in records.parts)])
        key = fingerprint(model_files(cfg), list(files), what)
        path = Path(cfg.out).parent / "reference" / f"{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        done = whole_lines(path)
        if len(done) < n:
            vlm, size = first(), cfg.micro_batch_size or cfg.batch_size
            training = vlm.training
            vlm.eval()                                                      # no dropout in a reference
            loader = DataLoader(Subset(self.examples, range(len(done), n)), batch_size=size, num_workers=cfg.workers, collate_fn=list)
            with (open(path, "a") as file, precision(cfg, self.device),
                  tqdm(total=n, initial=len(done), desc="reference", unit="pair", disable=None) as bar):
                for examples in loader:
                    batch = to(collate_pairs(examples, tok.pad), self.device)
                    found = dict(zip(batch["index"], log_probs(vlm, batch)[0].tolist())) if batch["ids"] else {}
                    lines = [found.get(e["index"], [0.0, 0.0]) for e in examples]           # of a skipped pair nobody will ask
                    file.write("".join(json.dumps(line) + "\n" for line in lines))
                    file.flush()
                    done += lines
                    bar.update(len(lines))
            vlm.train(training)
            print(f"reference log-probabilities of {n:,} pairs in {time.time() - began:.0f} s, kept in {path}")
        return torch.tensor(done)

    def stepped(self, step):
        """TR-DPO (arXiv:2404.09656, Eq. 3): the reference follows the policy."""
        if "tr-dpo" in self.terms and step % self.cfg.ref_every == 0:
            with torch.no_grad():
                for p, ref in zip(self.vlm.parameters(), self.ref.parameters()):
                    if p.requires_grad:
                        ref.lerp_(p, self.cfg.ref_alpha)

    def state(self):
        moved = {name: t for name, t in self.ref.state_dict().items() if not name.startswith("vision")} if "tr-dpo" in self.terms else {}
        return {"delta": self.delta, "n_delta": self.n_delta} | ({"reference": moved} if moved else {})

    def draw(self, out):
        draw_rewards(out / "mpo.png", out / "log.jsonl")


def preference(s, s_ref, n, cfg):
    """All that the terms are made of, each (B,): sums, differences to the reference, rewards, lengths."""
    d = s - s_ref
    r = cfg.beta * d
    return SimpleNamespace(s_c=s[:, 0], s_r=s[:, 1], ref_c=s_ref[:, 0], ref_r=s_ref[:, 1], d_c=d[:, 0], d_r=d[:, 1], r_c=r[:, 0], r_r=r[:, 1],
                           n_c=n[:, 0], n_r=n[:, 1], beta=cfg.beta, epsilon=cfg.epsilon, delta=0.0)


def to(batch, device):
    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def model_files(cfg):
    """The directories that a model is read from: its own, its towers', and of a LoRA its base's."""
    base = model.base_of(cfg.model, cfg.llm) if model.is_lora(cfg.model) else ""
    return [Path(p) for p in (cfg.model, *cfg.vision.split(","), base) if p]


def fingerprint(models, files, more):
    """16 characters that change when a weight, a config or a byte of the files does. Of a directory its weights and JSON files count."""
    said = hashlib.blake2b(json.dumps(more).encode())
    counts = lambda p: p.suffix in (".safetensors", ".bin", ".pt") or p.name in ("config.json", "adapter_config.json")
    for path in [p for m in models for p in (sorted(filter(counts, m.iterdir())) if m.is_dir() else [m])] + list(files):
        said.update(path.name.encode())
        with open(path, "rb") as file:
            said.update(hashlib.file_digest(file, "blake2b").digest())
    return said.hexdigest()[:16]


def whole_lines(path):
    """The lines of a JSONL file that a kill may have torn: its last half line is cut off the file."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        raw = raw[: raw.rfind(b"\n") + 1]
        with open(path, "r+b") as file:
            file.truncate(len(raw))
    return [json.loads(line) for line in raw.splitlines()]


def draw_rewards(path, log, width=800, height=760):
    """mpo.png: rewards and their margin; share of pairs told apart; delta; NLL. Each line is the mean of the steps around it."""
    lines = [line for line in map(json.loads, open(log)) if line.get("margin") is not None]
    if not lines:
        return
    panels = {"rewards, beta (s - s_ref)": ["reward_chosen", "reward_rejected", "margin"],
              "share of pairs with the chosen answer ahead": ["accuracy"],
              "delta, the mean of all rewards so far": ["delta"],
              "NLL of the chosen answer per token": ["nll"]}
    colors, tall, w = ("#1f6fb5", "#d6502b", "#3a9a4a"), (height - 30) // len(panels), len(lines) // 50
    image = Image.new("RGB", (width, height), "white")
    pen, steps = ImageDraw.Draw(image), [line["step"] for line in lines]
    write = lambda at, text, anchor, fill="#555555": pen.text(at, text, fill=fill, anchor=anchor, font_size=13)
    x = lambda step: 70 + (width - 94) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
    near = [lines[max(0, i - w) : i + w + 1] for i in range(len(lines))]
    for k, (title, names) in enumerate(panels.items()):
        curves = {name: [sum(line[name] for line in some) / len(some) for some in near] for name in names}
        values = [v for curve in curves.values() for v in curve] + ([0.0, 1.0] if "accuracy" in names else [])
        low, high, top = min(values), max(values), k * tall + 30
        low, high = (low - 0.05, high + 0.05) if high - low < 1e-6 else (low, high)
        y = lambda v: top + (tall - 44) * (high - v) / (high - low)
        for v in (low, 0.0 if low < 0 < high else (low + high) / 2, high):
            pen.line([(70, y(v)), (width - 24, y(v))], fill="#e6e6e6")
            write((62, y(v)), f"{v:.3g}", "rm")
        write((70, top - 18), title, "lt", "#222222")
        for j, (name, curve) in enumerate(curves.items()):
            pen.line([(x(s), y(v)) for s, v in zip(steps, curve)], fill=colors[j], width=2)
            write((width - 24 - 170 * (len(names) - 1 - j), top - 18), f"{name.replace('_', ' ')} {curve[-1]:.3f}", "rt", colors[j])
    write((70, height - 18), f"step {steps[0]:,} to {steps[-1]:,}", "lt")
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))


# ---- building pairs ----------------------------------------------------------------------------------------------------

PROMPTS = {                                      # for step-by-step answers, exactly the authors' (MMPR v1, v1.1 and their CoT evaluation)
    "en": "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to answer, "
          'please use the format "Final answer: .."\n\nQuestion:\n\n{question}',
    "zh": "你的任务是回答以下问题。在回答之前，请逐步推理说明您的思路。当你准备好给出答案时，请使用以下格式：\"答案: ...\"\n\n问题:\n\n{question}",
}
TRIGGERS = ("Final answer:", "Final Answer:", "答案:")
DIRECT = ("Answer the question using a single word or phrase.", "Answer with the option's letter from the given choices directly.",
          "Please answer Yes or No.", r"Please answer the question and put the final answer within \boxed{}.")
NUMBERS = {word: str(i) for i, word in enumerate("none one two three four five six seven eight nine ten".split())} | {"zero": "0"}


def parse_answer(response, min_newlines=2):
    """A worked answer -> (the rationale with its trigger, the final answer), or None where the format was not kept: a trigger once or twice,
    the last of them counts; something before it; newlines, because reasoning has lines; one line after it."""
    trigger = next((t for t in TRIGGERS if t in response), None)
    if trigger is None or response.count(trigger) > 2 or response.count("\n") < min_newlines:
        return None
    rationale, _, final = response.rpartition(trigger)
    if not rationale.strip() or not final.strip() or "\n" in final.strip():
        return None
    return rationale + trigger, final.strip()


def letter(text):
    """B of "B", "B. cat", "(B)"; else None."""
    found = re.match(r"\(?([A-N])\)?(?:[.:)\s]|$)", text.strip().strip("*"))
    return found and found[1]


def judge(said, truth):
    """Is this the answer? Case, articles and punctuation do not matter, two for 2 is right, numbers agree to 1 part in 1000, letters by
    themselves, boxes by IoU. (MMPR's fourth scorer, math-verify, is not here: formulas must be written alike.)"""
    if len(truth.strip()) == 1 and letter(truth):
        return letter(said) == letter(truth)
    bare = lambda text: re.sub(r"[^\w\s.%/+-]|\.(?!\d)|(?<=\d),(?=\d{3})", "", text.lower()).split()
    plain = lambda text: " ".join(NUMBERS.get(w, w) for w in bare(text) if w not in ("a", "an", "the"))
    a, b = plain(said), plain(truth)
    if a == b and b:
        return True
    try:
        a, b = (float(re.sub(r"(degrees?|cm|%)$", "", text).strip()) for text in (a, b))
        return abs(a - b) <= 1e-3 * abs(b)
    except ValueError:
        return is_right(said, truth)


def fix_answer(response, truth, min_newlines):
    """A right answer's last line as the truth writes it, and without bold: so that the model learns that form."""
    head, final = parse_answer(response, min_newlines)
    bare = final.strip("*").strip()
    lines = (head + " " + (truth if truth.lower() in bare.lower().replace(",", "").strip(".") else bare)).split("\n")
    return "\n".join(lines[:-1] + [lines[-1].replace("**Final", "Final")])


def read_questions(records, method):
    """-> [{"where", "image", "paths", "question", "truth", "chosen", ...}], one for each question of each record; and why others are none.

    `whole` and `tokens` are of the chosen answer, as it is given: that of a file is whole and cost nothing.
    """
    found, wrong = [], []
    for i in range(len(records)):
        try:
            record = records[i]
            paths = [records.image_path(name) for name in record["images"]]
        except UserError as error:
            wrong.append(str(error))
            continue
        turns = record["turns"] if record["turns"][0][0] == "human" else record["turns"][1:]
        for k in range(0, len(turns), 2):
            where = records.where(i, record["id"]) + (f", turn {k + 1}" if len(turns) > 2 else "")
            truth, text = turns[k + 1][1].strip() if k + 1 < len(turns) else "", turns[k][1]
            if method == "correctness" and not truth:
                wrong.append(f"{where}: no answer to judge by")
            elif not text.replace("<image>", "").strip():
                wrong.append(f"{where}: no question")
            else:
                found.append({"where": where, "image": record.get("image"), "paths": paths, "question": text, "truth": truth,
                              "chosen": record.get("chosen"), "whole": True, "tokens": 0})
    return found, wrong


def worked(question, n_image, prompt):
    """The question in the step-by-step prompt: without the ending that asks for a short answer, its one picture in front."""
    text = question.replace("<image>", "").strip() if n_image <= 1 else question.strip()
    for ending in DIRECT:
        text = text.removesuffix(ending).strip()
    return "<image>\n" * (n_image == 1) + PROMPTS[prompt].replace("{question}", text)


def draw_answers(vlm, tok, rows, cfg, seed):
    """train.complete, cfg.batch_size rows at a time."""
    cuts = range(0, len(rows), cfg.batch_size)
    return [row for at in cuts for row in complete(vlm, tok, rows[at : at + cfg.batch_size], cfg.max_new_tokens, temperature=cfg.temperature,
                                                   top_p=cfg.top_p, top_k=cfg.top_k, seed=seed + at)]


def pairs_by_correctness(vlm, tok, asked, cfg, seed):
    """Sample answers to each question, and pair the right with the wrong and with those that kept no format -> [(pairs, counts), ...]"""
    results, said = [], iter(draw_answers(vlm, tok, [q["row"] for q in asked for _ in range(cfg.samples)], cfg, seed))
    for q in asked:
        count, right, wrong = Counter(), {}, {}
        for ids, ended, n in islice(said, cfg.samples):
            text, whole = text_of(tok, vlm.cfg.template, ids, ended)
            found = parse_answer(text, cfg.min_newlines)
            kind = ("cut off" if not whole else "empty" if not text else "no format" if not found
                    else "right" if judge(found[1], q["truth"]) else "wrong")
            count.update({"answers": 1, "tokens": n, f"answers {kind}": 1})
            if kind == "right":
                right[fix_answer(text, q["truth"], cfg.min_newlines)] = found[1]
            elif kind in ("wrong", "no format"):
                wrong[text] = found and found[1]
        made = []
        for (good, a), (bad, b) in product(right.items(), wrong.items()):
            if b is not None and a.lower() in b.lower():                    # "2" in "12 or 2": perhaps right after all
                count["pairs in doubt"] += 1
            else:
                made.append({"image": q["image"], "question": q["prompt"], "chosen": good, "rejected": bad, "answer_gt": q["truth"],
                             "rule": "format" if b is None else "answer"})
        kept = random.Random(f"{cfg.seed} {q['where']}").sample(made, min(len(made), cfg.pairs_per_question))
        count.update({"pairs beyond the cap": len(made) - len(kept),
                      f"questions {'all right' if not wrong else 'none right' if not right else 'right and wrong'}": 1})
        results.append((kept, count))
    return results


def pairs_by_dropout(vlm, tok, asked, cfg, seed):
    """DropoutNTP: keep the first words of an answer that was given with the picture, and complete it without -> [(pairs, counts), ...]"""
    form, results = vlm.cfg.template, []
    own = [q for q in asked if q["chosen"] is None]                         # the others have their answer from the file
    for q, (ids, ended, n) in zip(own, draw_answers(vlm, tok, [q["row"] for q in own], cfg, seed)):
        q["tokens"], (q["chosen"], q["whole"]) = n, text_of(tok, form, ids, ended)
    begun = [q for q in asked if q["chosen"].strip() and q["whole"]]
    lead = find_template(form).answer.split("{}")[0].replace("«", "")       # the space that opens an answer in LLaVA's templates
    for q in begun:
        words = q["chosen"].strip().split(" ")
        begin = " ".join(words[: int(len(words) * cfg.ratio)]).strip()
        q["begin"] = tok.encode(lead + begin, dummy_prefix=False) if begin else []
        ids, pictures = q["row"] if cfg.load_image else encode_asked(vlm, tok, q["question"].replace("<image>", "").strip(), [])
        q["row"] = ids + q["begin"], pictures
    said = iter(draw_answers(vlm, tok, [q["row"] for q in begun], cfg, seed + 2**31))
    for q in asked:
        count, chosen = Counter(tokens=q["tokens"]), q["chosen"].strip()
        if not chosen or not q["whole"]:
            results.append(([], count + Counter(["answers cut off" if not q["whole"] else "answers empty"])))
            continue
        ids, ended, n = next(said)
        rejected, whole = text_of(tok, form, q["begin"] + ids, ended)
        wrong = "cut off" if not whole else "empty" if not rejected else "the same" if rejected == chosen else ""
        count.update({"tokens": n, "answers": 1} | ({f"completions {wrong}": 1} if wrong else {}))
        front = "<image>\n" if len(q["paths"]) == 1 and "<image>" not in q["question"] else ""
        results.append(([] if wrong else [{"image": q["image"], "question": front + q["question"], "chosen": chosen, "rejected": rejected}], count))
    return results


def encode_asked(vlm, tok, question, paths):
    """-> prompt ids and [(tiles, layout), ...]"""
    pictures = [cut_tiles(open_image(p), vlm.cfg.vision, vlm.cfg.image_mode) for p in paths]
    ids = encode_prompt(tok, [("human", question)], vlm.cfg.template, [len(layout) for _, layout in pictures])
    if len(ids) >= vlm.cfg.decoder.block_size * 3 // 4:
        raise UserError(f"a question of {len(ids)} tokens leaves little room for an answer in {vlm.cfg.decoder.block_size}")
    return ids, pictures


def make_pairs(argv):
    """Groups of questions, one after the other; what a group gave is appended to PAIRS.jsonl.part at once, so a killed run goes on there."""
    cfg = parse_pairs(argv)
    out, by_truth = Path(cfg.out), cfg.method == "correctness"
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    records = Records(cfg.data, cfg.image_root)
    vlm, tok = open_model(cfg.model, pick_device(cfg.device), cfg.dtype, cfg.vision, cfg.llm, cfg.template, cfg.image_mode)
    asked, wrong = read_questions(records, cfg.method)
    asked = asked[:: math.ceil(len(asked) / cfg.limit)][: cfg.limit] if cfg.limit else asked
    if not asked:
        raise UserError(f"{cfg.data}: no question that could be used" + (f"; the first: {wrong[0]}" if wrong else ""))
    for reason in wrong[:5]:
        print(f"skipped: {reason}" + ("; the others are only counted" if reason == wrong[4:5] else ""))
    flags = {k: v for k, v in vars(cfg).items() if k not in ("out", "device", "model", "data", "image_root")}
    head = {"made by": "mpo.py pairs", "key": fingerprint(model_files(cfg), [Path(cfg.data)], flags), **flags}
    out.parent.mkdir(parents=True, exist_ok=True)
    before = whole_lines(part) or [head]
    if before[0] != head:
        raise UserError(f"{part} was begun with another model, data or flags; give the same ones, or remove it")
    size = max(1, cfg.batch_size // (cfg.samples if by_truth else 1))
    first = len(before) - 1 if len(before) > len(asked) else (len(before) - 1) // size * size      # a half-written group is made again
    done = before[1 : 1 + first]
    write_whole(part, lambda tmp: tmp.write_text(to_lines([head, *done]), encoding="utf-8"))
    print(f"{len(asked):,} questions in groups of {size}" + (f"; {first:,} were answered before" if first else ""), flush=True)
    began, total = time.time(), sum((Counter(line["counts"]) for line in done), Counter(unreadable=len(wrong)))
    n_before = total["tokens"]
    with open(part, "a", encoding="utf-8") as file, tqdm(total=len(asked), initial=first, desc=cfg.method, unit="question",
                                                         disable=not sys.stderr.isatty()) as bar:
        for at in range(first, len(asked), size):
            group = [dict(q) for q in asked[at : at + size]]                # their pictures go when the group is done
            for q in group:
                q["prompt"] = worked(q["question"], len(q["paths"]), cfg.prompt) if by_truth else q["question"]
                try:
                    q["row"] = encode_asked(vlm, tok, q["prompt"], q["paths"])
                except UserError as error:
                    q["why"] = f"{q['where']}: {error}"
            usable = [q for q in group if "row" in q]
            found = iter((pairs_by_correctness if by_truth else pairs_by_dropout)(vlm, tok, usable, cfg, cfg.seed * 2**32 + at * 2**12))
            for q in group:
                pairs, count = next(found) if "row" in q else ([], Counter(["unusable"]))
                count.update({"questions": 1, "pairs": len(pairs)})
                done.append({"pairs": pairs, "counts": dict(+count)} | ({"why": q["why"]} if "why" in q else {}))
                total += count
            file.write(to_lines(done[at:]))
            file.flush()
            rate = f"{total['pairs']:,} pairs, {(total['tokens'] - n_before) / (time.time() - began):,.0f} tokens/s"
            bar.update(len(group))
            bar.set_postfix_str(rate)
            if not sys.stderr.isatty() and (len(done) * 10 // len(asked) > at * 10 // len(asked)):
                print(f"{len(done):,} of {len(asked):,} questions, {rate}", flush=True)
    made = [pair for line in done for pair in line["pairs"]]
    for why in [line["why"] for line in done if "why" in line][:5]:
        print(f"skipped: {why}")
    report(made, dict(total), tok, out)
    if not made:
        raise UserError(f"not one pair could be made; the counts are above, {part} holds what there is")
    write_whole(out, lambda tmp: tmp.write_text(to_lines(made), encoding="utf-8"))
    part.unlink()
    print(f"{len(made):,} pairs are in {out}; train on them: python mpo.py train --model {cfg.model} --data {out} --image-root {cfg.image_root}")
    return 0


def to_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def report(made, counts, tok, out):
    """Print what was kept, what was dropped and why, and how long the answers are; the same as JSON beside the pairs."""
    for name in sorted(counts):
        print(f"{name:26s}{counts[name]:10,}")
    summary = {"counts": counts}
    if made:
        lengths = {name: [len(tok.encode(pair[name])) for pair in made] for name in ("question", "chosen", "rejected")}
        summary |= {"tokens_generated_per_pair": counts["tokens"] / len(made),
                    "tokens": {name: {"mean": sum(n) / len(n), "min": min(n), "max": max(n)} for name, n in lengths.items()}}
        print(f"{'tokens generated per pair':26s}{summary['tokens_generated_per_pair']:10.1f}")
        for name, n in summary["tokens"].items():
            print(f"{'tokens of the ' + name:26s}{n['mean']:10.1f}   {n['min']} to {n['max']}")
    write_whole(out.with_name(out.name + ".stats.json"), lambda tmp: tmp.write_text(json.dumps(summary, indent=1) + "\n"))


# ---- programs ----------------------------------------------------------------------------------------------------------


def must(cfg, names, fits, rule):
    for name in names.split():
        if not fits(getattr(cfg, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {rule}")


def train(argv):
    cli = Flags(prog="mpo.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cfg = read_flags(cli, MPOConfig, {}, argv)
    one_of("--reference", cfg.reference, ["precomputed", "copy", "lora-off"])
    terms = loss_weights(cfg)
    must(cfg, "beta", lambda x: x > 0, "above 0")
    must(cfg, "epsilon", lambda x: 0 <= x < 0.5, "from 0 to below 0.5")
    must(cfg, "ref_alpha", lambda x: 0 < x <= 1, "above 0, at most 1")
    must(cfg, "ref_every", lambda x: x >= 1, "at least 1")
    must(cfg, "w_p w_q w_g", lambda x: x >= 0, "0 or more")
    if "tr-dpo" in terms and cfg.reference != "copy":
        raise UserError(f"--loss {cfg.loss} moves its reference: add --reference copy")
    if "tr-dpo" in terms and cfg.lora_r:
        raise UserError(f"--loss {cfg.loss}: the reference follows the policy's own weights, and a LoRA is beside them; leave out --lora-r")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("mpo.py train runs in one process: start it without torchrun")
    if not cfg.data:
        raise UserError("--data: which pairs? python mpo.py pairs makes some")
    if cfg.model in PRESETS:
        raise UserError(f"--model {cfg.model} is a preset: preferences are for a model that can answer; give its directory, such as out/finetune")
    cfg.model = cfg.model or str(newest_run())
    return guarded(lambda: fit(find_files(cfg), Pairs))


PAIRS_FLAGS = [                                  # name, default (None: the flag must be given), help
    ("method", None, "correctness: right against wrong answers to questions with one true answer; dropout-ntp: answers against their completion "
                     "without the picture"),
    ("data", None, "questions: JSONL of {image, question, answer}, or LLaVA's JSON; for dropout-ntp \"chosen\" in a record is taken for the answer, "
                   "else the model gives it"),
    ("out", None, "JSONL for the pairs"),
    ("model", "", "model directory; empty: the newest finished run under out/"),
    ("vision", "", "tower of a model that was published without, DIR or DIR,DIR"),
    ("llm", "", "directory of the base of a LoRA"),
    ("image-root", "", "folder that the pictures' names start from; empty: that of --data"),
    ("samples", 32, "correctness: answers to each question"),
    ("pairs-per-question", 15, "correctness: at most so many, drawn at random"),
    ("min-newlines", 2, "correctness: an answer with fewer has not reasoned in lines"),
    ("prompt", "en", f"correctness: language of the step-by-step prompt, {' or '.join(PROMPTS)}"),
    ("ratio", 0.5, "dropout-ntp: share of an answer's words that is kept, 0 to 1"),
    ("load-image", False, "dropout-ntp: complete with the picture after all"),
    ("temperature", 1.0, "0 takes the likeliest word, more draws at random"),
    ("top-k", 50, "draw from so many likeliest words; 0: all"),
    ("top-p", 1.0, "draw from the smallest set of words holding this probability"),
    ("max-new-tokens", 1024, "longest answer in tokens; one that reaches it makes no pair"),
    ("batch-size", 64, "answers generated at once"),
    ("limit", 0, "questions, evenly spread over the file; 0: all"),
    ("template", "", "conversation template; empty: the model's own"),
    ("image-mode", "", f"{', '.join(MODES)}; empty: the model's own"),
    ("seed", 0, "of the draws"),
    ("device", "auto", "cpu, cuda, cuda:N or auto"),
    ("dtype", "float32", "of the weights: float32, bfloat16, float16, or auto: as they are stored, but bfloat16 for float16 on a CPU"),
]


def parse_pairs(argv):
    cli = Flags(prog="mpo.py pairs", description=make_pairs.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, said in PAIRS_FLAGS:
        kind = str if default is None else type(default)
        shown = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind], "required": default is None}
        cli.add_argument(f"--{name}", default=default, help=said, **shown)
    cfg = parse_args(cli, argv)
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    one_of("--method", cfg.method, ["correctness", "dropout-ntp"])
    one_of("--prompt", cfg.prompt, list(PROMPTS))
    one_of("--dtype", cfg.dtype, ["auto", "float32", "bfloat16", "float16"])
    must(cfg, "ratio", lambda x: 0 <= x < 1, "from 0 to below 1")
    must(cfg, "temperature", lambda x: 0 <= x < math.inf, "0 or more")
    must(cfg, "seed", lambda x: 0 <= x < 2**30, "from 0 to 2^30 - 1")
    must(cfg, "min_newlines limit top_k", lambda x: x >= 0, "0 or more")
    must(cfg, "samples pairs_per_question max_new_tokens batch_size", lambda x: x >= 1, "at least 1")
    cfg.model, cfg.image_root = cfg.model or str(newest_run()), cfg.image_root or str(Path(cfg.data).parent)
    return cfg


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__ + "\npython mpo.py pairs --help and python mpo.py train --help list the flags.")
        return 0 if argv else 1
    one_of("mpo.py", argv[0], ["pairs", "train"])
    return (make_pairs if argv[0] == "pairs" else train)(argv[1:])


if __name__ == "__main__":
    sys.exit(run(main))
