"""Mixed Preference Optimization: teach a finetuned VLM to prefer its better answers (arXiv:2411.10442v2).

For a prompt x (picture and question), a chosen answer y_c and a rejected one y_r:
    s(y) = sum over the tokens of y of log pi(token | x, tokens before)         a sum, not a mean: beta 0.1 is made for sums
    r(y) = beta (s(y) - s_ref(y))                                               the reward; the reference is the model before training
    L    = w_p L_p + w_q L_q + w_g L_g      L_p  which of the two is better (DPO)
                                            L_q  is each one good by itself (BCO, rewards shifted by delta)
                                            L_g  keep writing good answers  (SFT on y_c, mean over its tokens)

    python pairs.py --method correctness --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
    python pairs.py --method dropout-ntp --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
    python mpo.py --model DIR --data PAIRS.jsonl --image-root DIR         # through train.py's loop: its checkpoints, logs, --resume

A pair is one row, [picture and question | chosen | rejected]: the rejected answer stands at the positions of the chosen one and neither
sees the other, so the sums are those of two rows, and picture and question are computed once. A frozen tower looks once for policy and
reference. Deviations from the authors' code, all of them:
  - delta, the running mean of all rewards, is saved in the checkpoint (the original restarts it at 0); as there it grows with every
    micro-batch, but each pair counts the same. So --micro-batch-size changes nothing but delta within a step;
  - L_g is the mean over the pairs of each one's mean over its tokens, as the paper has it (the code: one mean over the tokens of a batch);
  - a pair that does not fit is skipped, counted and named in log.jsonl; the original cuts it and trains on the rest;
  - answers that ran out of tokens make no pair; the original takes them for wrong ones, or for whole ones.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import time

from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
import torch
import torch.nn.functional as F

from conversation import encode_conversation
from data import Examples, Records, collate
from lab.losses import aot_loss, cdpo_loss, hinge_loss, ipo_loss, orpo_loss, robust_dpo_loss, sppo_loss
from model import IGNORE, PRESETS, token_log_probs
from sample import newest_run
from support.cli import must, UserError, arg, one_of, parse, run
from support.lora import lora_off
from support.weights import base_of, is_lora
from support.distributed import precision
from support.start import build
from train import Answering, TrainConfig, find_files, teach



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



TERMS = {                                        # name -> the term, of what preference() gives
    "dpo": lambda p: dpo_loss(p.r_c, p.r_r), "bco": lambda p: bco_loss(p.r_c, p.r_r, p.delta),
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



def log_probs(vlm, batch, seen=None):
    """A batch of pairs -> s (B, 2) float32, n (B, 2): sums of log-probabilities and numbers of tokens of chosen and rejected answers.

    Prompt, picture and padding count zero. `seen`: the pictures' vlm.features, if they are known.
    """
    part, keep = batch["part"], batch["labels"] != IGNORE                                    # (B, T)
    now = torch.arange(part.shape[1], device=part.device)
    mask = (now[:, None] >= now) & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))      # (B, T, T)
    row = keep.nonzero()[:, 0]
    x = vlm.embed(batch["tokens"], vlm.features(batch["pixels"]) if seen is None else seen, batch["layout"])
    h = vlm.decoder(x, positions=batch["at"], mask=mask[:, None], rows=row * part.shape[1] + batch["source"][keep])
    y, slot = batch["labels"][keep], 2 * row + (part[keep] == REJECTED)
    s = token_log_probs(h, vlm.decoder.lm_head.weight, y)
    add = lambda values: torch.zeros(2 * len(part), device=h.device).index_add(0, slot, values).view(-1, 2)
    return add(s), add(torch.ones_like(s))



PREFIX, CHOSEN, REJECTED, PADDING = range(4)     # the parts of a row; each sees the prefix and itself
PairFiles = Records                              # a file of pairs is a file of records



class PairExamples(Examples):
    """Pairs as rows: what data.Examples is for conversations."""

    def open_picture(self, path, record):
        image = super().open_picture(path, record)
        return recompressed(image, record["row"]) if record["file"].recompress else image

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
    return collate(examples, pad, more={"at": 0, "source": 0, "part": PADDING}) | {"index": [e["index"] for e in examples if "skipped" not in e]}



def recompressed(image, i):
    """A picture after JPEG at a quality of 75 to 100, drawn by the pair's number: data_augment."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=random.Random(i).randint(75, 100))
    return Image.open(file)



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
    split_questions: bool = arg(False, "")
    dry_run: bool = arg(False, "")



class Pairs:
    """The task of preference learning; train.Answering is the other one."""

    unit = "pairs"
    shown = ("margin", "accuracy")
    plots = Answering.plots | {"mpo.png": {
        "rewards, beta (s - s_ref)": {"chosen": "reward_chosen", "rejected": "reward_rejected", "margin": "margin"},
        "share of pairs with the chosen answer ahead": {"accuracy": "accuracy"},
        "delta, the mean of all rewards so far": {"delta": "delta"},
        "NLL of the chosen answer per token": {"nll": "nll"},
    }}
    collate = staticmethod(collate_pairs)

    def __init__(self, cfg, records, vlm, tok):
        self.cfg, self.vlm, self.device, self.terms = cfg, vlm, next(vlm.parameters()).device, loss_weights(cfg)
        self.examples = PairExamples(records, tok, cfg.template or vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode,
                                     cfg.max_length or vlm.cfg.decoder.block_size, cfg.bad_records)
        self.delta, self.n_delta = 0.0, 0
        self.frozen_tower = not any(p.requires_grad for name, p in vlm.named_parameters() if name.startswith("vision"))
        first = lambda: build(cfg)[0].to(self.device) if cfg.resume else vlm               # the model before training
        if cfg.reference == "precomputed":
            self.sums = self.precompute(first, tok, records)
        elif cfg.reference == "copy":
            self.ref = build(cfg)[0].to(self.device).requires_grad_(False)
            if self.frozen_tower:                                           # one tower is enough for both
                self.ref.vision = vlm.vision
                if vlm.cfg.vision2:
                    self.ref.vision2 = vlm.vision2
        elif beside := [name for name, p in vlm.named_parameters() if p.requires_grad and ".lora_" not in name]:
            raise UserError(f"--reference lora-off: {len(beside)} tensors train that are no LoRA, such as {beside[0]}, so the policy without its "
                            "LoRA is not what it began as; give --lora-r N --train llm, or --reference precomputed")

    @staticmethod
    def weight(batch):
        return len(batch["ids"])

    def loss(self, net, batch):
        """-> the sum of L over the pairs of a batch, and of what the log should hold the mean."""
        batch, n_pair = to(batch, self.device), len(batch["ids"])
        seen = self.look(batch)
        s, n = log_probs(self.vlm, batch, seen)
        p = preference(s, self.reference(batch, seen), n, self.cfg)
        self.delta, self.n_delta = shift(self.delta, self.n_delta, p.r_c, p.r_r)
        p.delta = self.delta
        terms = {name: TERMS[name](p) for name in self.terms}
        loss = sum(self.terms[name] * term for name, term in terms.items())
        found = terms | {"reward_chosen": p.r_c, "reward_rejected": p.r_r, "margin": p.r_c - p.r_r, "accuracy": (p.r_c > p.r_r).float(),
                         "logp_chosen": p.s_c, "logp_rejected": p.s_r, "nll": sft_loss(p.s_c, p.n_c)}
        return loss * n_pair, {name: value.detach().mean().item() * n_pair for name, value in found.items()}

    @torch.no_grad()
    def look(self, batch):
        """The pictures' features for policy and reference alike, where the tower stays as it is; else None, and each looks by itself."""
        return self.vlm.features(batch["pixels"]) if self.frozen_tower and len(batch["pixels"]) else None

    @torch.no_grad()
    def reference(self, batch, seen):
        """s_ref (B, 2)."""
        if self.cfg.reference == "precomputed":
            return self.sums[batch["index"]].to(self.device)
        with lora_off(self.vlm) if self.cfg.reference == "lora-off" else contextlib.nullcontext():
            return log_probs(self.vlm if self.cfg.reference == "lora-off" else self.ref, batch, seen)[0]

    @torch.no_grad()
    def precompute(self, first, tok, records):
        """s_ref of every pair, (n, 2), from a file named by all it depends on; what of it is missing is computed by first() and appended."""
        cfg, n, began = self.cfg, len(self.examples), time.time()
        what = [self.examples.template, self.examples.image_mode, str(self.examples.vision_cfg.tiling), self.examples.max_length, cfg.dtype,
                self.device.type, records.index.tolist()]
        files = dict.fromkeys([*map(Path, cfg.data.split(",")), *(file.path for file in records.files)])
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

    def state_dict(self):
        return {"delta": self.delta, "n_delta": self.n_delta}

    def load_state_dict(self, state):
        self.delta, self.n_delta = state["delta"], state["n_delta"]



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
    base = base_of(cfg.model, cfg.llm) if is_lora(cfg.model) else ""
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



def main(argv=None):
    cfg = parse(MPOConfig, argv, description=__doc__)
    one_of("--reference", cfg.reference, ["precomputed", "copy", "lora-off"])
    loss_weights(cfg)
    must(cfg, "beta", lambda x: x > 0, "above 0")
    must(cfg, "epsilon", lambda x: 0 <= x < 0.5, "from 0 to below 0.5")
    must(cfg, "w_p w_q w_g", lambda x: x >= 0, "0 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("mpo.py runs in one process: start it without torchrun")
    if not cfg.data:
        raise UserError("--data: which pairs? python pairs.py makes some")
    if cfg.model in PRESETS:
        raise UserError(f"--model {cfg.model} is a preset: preferences are for a model that can answer; give its directory, such as out/finetune")
    cfg.model = cfg.model or str(newest_run())
    return teach(find_files(cfg), Pairs)



if __name__ == "__main__":
    sys.exit(run(main))
