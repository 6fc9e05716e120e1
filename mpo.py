"""Mixed Preference Optimization: teach a finetuned VLM to prefer its better answers (arXiv:2411.10442v2).

For a prompt x (picture and question), a chosen answer y_c and a rejected one y_r:

    s(y) = sum over the tokens of y of log pi(token | x, tokens before)
    r(y) = beta (s(y) - s_ref(y))                 the reward; the reference is the model before training
    beta = 0.1                                    made for sums over tokens, not for means
    L    = w_p L_p + w_q L_q + w_g L_g            L_p  which of the two is better (DPO)
                                                  L_q  is each one good by itself (BCO, rewards minus delta)
                                                  L_g  keep writing good answers (SFT on y_c)

    python mpo.py --model out/finetune --data PAIRS.jsonl --image-root DIR      # pairs.py makes pairs
    python mpo.py --w-p 1 --w-q 0 --w-g 0 ...                    # DPO; other losses: python -m lab.losses

It is train.py's loop, with its checkpoints, logs and --resume, and another task: Preferring. A pair is one
row of a batch (below: a pair as one row). The default rate is the toy's; published are 5e-6 for
InternVL2-8B-MPO and 1e-6 for InternVL2.5-MPO.

s_ref of every pair is computed before the first step, in the batches of training, so that rewards begin at
exactly 0. It is kept in the run's folder with a checksum of the pair. A pair that is not what it was then, or
whose picture was missing, is skipped like any that cannot be used.

Where this departs from the authors' code:
  - delta, the running mean of all rewards, is saved in the checkpoint (the original restarts it at 0). As
    there it takes in each micro-batch before its loss, but weighted by its pairs: --micro-batch-size changes
    nothing but delta within a step;
  - L_g is the mean over the pairs of each one's mean over its tokens, as the paper has it (the code: one mean
    over the tokens of a batch);
  - a pair that does not fit is skipped, counted and named in log.jsonl (the original cuts it).
"""

import io
import math
import os
import random
import sys
import zlib
from dataclasses import dataclass
from itertools import islice

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import torch
import torch.nn.functional as F
from PIL import Image

from conversation import encode_conversation
from data import Examples, collate, load_steps
from model import IGNORE, PRESETS
from support.cli import REQUIRED, Bar, UserError, arg, parse, run_program
from support.distributed import precision
from support.io import reading, write_whole
from support.log_probs import token_log_probs
from support.lora import lora_off
from support.processes import world_size
from support.weights import newest_run
from train import TrainConfig, make_examples, teach, to_device

# ---- the losses ----


def dpo_loss(r_c, r_r):
    """L_p = -log sigma(r_c - r_r)                               arXiv:2305.18290, Eq. 7"""
    return -F.logsigmoid(r_c - r_r).mean()


def bco_loss(r_c, r_r, delta):
    """L_q = -log sigma(r_c - delta) - log sigma(-(r_r - delta))     arXiv:2404.04656; a sum, not a mean"""
    return -(F.logsigmoid(r_c - delta) + F.logsigmoid(delta - r_r)).mean()


def sft_loss(s_c, n_c):
    """L_g = -log pi(y_c | x) / |y_c|                       arXiv:2411.10442v2, Eq. 5; a mean over tokens"""
    return -(s_c / n_c).mean()


def mpo_terms(rewards, s, n_token, delta, cfg):
    """The terms of L: {name: (weight, term)}. rewards, s, n_token are (B, 2): chosen, rejected."""
    r_c, r_r = rewards.unbind(1)
    return {
        "dpo": (cfg.w_p, dpo_loss(r_c, r_r)),
        "bco": (cfg.w_q, bco_loss(r_c, r_r, delta)),
        "sft": (cfg.w_g, sft_loss(s[:, 0], n_token[:, 0])),
    }


def update_delta(delta, n_pair, rewards):
    """The mean of all rewards so far: delta of n_pair pairs, and those of a batch (B, 2) -> the new two."""
    n_new = len(rewards)
    mean = rewards.detach().mean().item()
    return delta + (mean - delta) * n_new / (n_pair + n_new), n_pair + n_new


# ---- a pair as one row ----
#
#                  prompt, with its pictures |  chosen     | rejected           4 + 2 + 3 tokens
#     tokens       <s>   <image>  Color  ?   |  red   </s> | sky   blue  </s>
#     part         0     0        0      0   |  1     1    | 2     2     2      it sees part 0 and its own,
#     positions    0     1        2      3   |  4     5    | 4     5     6      of both what stands before it
#     predictor    -     -        -      -   |  3     4    | 3     6     7      whose output predicts it
#
# Neither answer sees the other, and the rejected one stands where the chosen one does: the sums are those of
# two rows, and prompt and pictures, most of the tokens, are computed once.

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3


def pair_row(prompt, chosen, rejected):
    """Three lists of ids -> the row, (T,) each."""
    p, c, r = len(prompt), len(chosen), len(rejected)
    predictor = list(range(-1, p + c + r - 1))
    predictor[p + c] = p - 1                 # both answers follow the prompt
    row = {
        "tokens": prompt + chosen + rejected,
        "labels": [IGNORE] * p + chosen + rejected,
        "part": [PROMPT] * p + [CHOSEN] * c + [REJECTED] * r,
        "positions": [*range(p + c), *range(p, p + r)],
        "predictor": predictor,
    }
    return {name: torch.tensor(numbers) for name, numbers in row.items()}


def collate_pairs(examples, pad, multiple=1):
    """data.collate, with all that a pair's row has, which pairs they are, and what is known of them."""
    batch = collate(examples, pad, multiple, {"part": PADDING, "positions": 0, "predictor": 0})
    used = [example for example in examples if "skipped" not in example]
    for name in "number", "checksum", "s_ref":  # s_ref is empty until the reference has been asked: prepare
        batch[name] = torch.tensor([example[name] for example in used if name in example])
    return batch


def pair_log_probs(vlm, batch, features=None):
    """-> s (B, 2) float32 and the number of tokens (B, 2). features: those of the pictures, if known."""
    part = batch["part"]  # (B, T)
    B, T = part.shape
    column = torch.arange(T, device=part.device)
    is_before = column[:, None] >= column  # (T, T), itself included
    same_part = part[:, :, None] == part[:, None, :]  # (B, T, T)
    mask = is_before & (same_part | (part == PROMPT)[:, None, :])

    # Only the outputs that predict a token of an answer go through the head.
    is_answer = batch["labels"] != IGNORE  # (B, T)
    row, _ = is_answer.nonzero(as_tuple=True)  # (n,)
    predictors = row * T + batch["predictor"][is_answer]
    if features is None:
        features = vlm.features(batch["pixels"])
    x = vlm.embed(batch["tokens"], features, batch["layout"])  # (B, T, D)
    h = vlm.decoder(x, positions=batch["positions"], mask=mask[:, None], wanted=predictors)  # (n, D)
    log_probs = token_log_probs(h, vlm.decoder.lm_head.weight, batch["labels"][is_answer])  # (n,)

    # Sum them by answer: two a row.
    slot = 2 * row + (part[is_answer] == REJECTED)
    zeros = torch.zeros(2 * B, device=h.device)
    s = zeros.index_add(0, slot, log_probs)
    n_token = zeros.index_add(0, slot, torch.ones_like(log_probs))
    return s.view(B, 2), n_token.view(B, 2)


# ---- the task of preferring ----


class Preferring:
    """What train.py's loop teaches here; train.Answering is the other task."""

    unit = "pairs"
    shown = ("margin", "accuracy")
    collate = staticmethod(collate_pairs)
    terms = staticmethod(mpo_terms)

    def __init__(self, cfg, records, vlm, tok):
        self.cfg = cfg
        self.examples = make_examples(PairExamples, cfg, records, vlm, tok)
        self.delta, self.n_delta = 0.0, 0  # the running mean of all rewards; of how many pairs

    def loss(self, vlm, batch):
        """-> the mean of L over the pairs of a batch; further means for the log."""
        batch = to_device(batch, vlm.device)
        features = None
        s_ref = batch["s_ref"]
        if self.cfg.reference == "lora-off":
            with torch.no_grad():
                features = vlm.features(batch["pixels"])  # of a frozen tower: computed once for both
                with lora_off():
                    s_ref, _ = pair_log_probs(vlm, batch, features)
        s, n_token = pair_log_probs(vlm, batch, features)

        rewards = self.cfg.beta * (s - s_ref)
        self.delta, self.n_delta = update_delta(self.delta, self.n_delta, rewards)
        terms = self.terms(rewards, s, n_token, self.delta, self.cfg)
        loss = sum(weight * term for weight, term in terms.values())

        r_c, r_r = rewards.unbind(1)
        margin = r_c - r_r
        metrics = {name: term for name, (_, term) in terms.items()} | {
            "reward_chosen": r_c,
            "reward_rejected": r_r,
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "logp_chosen": s[:, 0],
            "logp_rejected": s[:, 1],
        }
        return loss, {name: value.detach().mean().item() for name, value in metrics.items()}

    @staticmethod
    def count(batch):
        return len(batch["record_ids"])

    def prepare(self, run):
        """Before the first step the policy is the reference."""
        if self.cfg.reference == "lora-off":
            return
        file = run.out / "reference.pt"
        if not self.cfg.resume:
            reference = self.ask_reference(run)
            write_whole(file, lambda tmp: torch.save(reference, tmp))
        with reading(file, "start the run anew, without --resume"):
            self.examples.reference = torch.load(file, weights_only=True)

    @torch.no_grad()
    def ask_reference(self, run):
        """-> (n_pair, 3) float64: of each pair of the first epoch a checksum, and s_ref of both answers.

        NaN where a pair was skipped, or comes in no step.
        """
        n_pair = len(self.examples)
        reference = torch.full((n_pair, 3), math.nan, dtype=torch.float64)
        n_step = min(run.n_step, math.ceil(n_pair / self.cfg.batch_size))
        steps = islice(load_steps(self.cfg, self, run), n_step)
        vlm = run.vlm
        vlm.eval()  # no dropout in a reference
        with precision(self.cfg, vlm.device):
            for _, batches in Bar(steps, "reference", n_step, unit="step"):
                for batch in batches:
                    if self.count(batch):
                        s, _ = pair_log_probs(vlm, to_device(batch, vlm.device))
                        reference[batch["number"], 0] = batch["checksum"].double()
                        reference[batch["number"], 1:] = s.double().cpu()
        vlm.train()
        return reference

    def state_dict(self):
        return {"delta": self.delta, "n_delta": self.n_delta}

    def load_state_dict(self, state):
        self.delta, self.n_delta = state["delta"], state["n_delta"]

    plots = {
        "loss.png": {
            "loss of a pair": {"training": "loss"},
            "held-out loss per supervised token": {"held-out": "val_loss"},
        },
        "mpo.png": {
            "rewards, beta (s - s_ref)": {
                "chosen": "reward_chosen",
                "rejected": "reward_rejected",
                "margin": "margin",
            },
            "share of pairs with the chosen answer ahead": {"accuracy": "accuracy"},
            "delta, the mean of all rewards so far": {"delta": "delta"},
            "NLL of the chosen answer per token": {"nll": "sft"},
        },
    }


class PairExamples(Examples):
    """Pairs as rows: what data.Examples is for conversations."""

    reference = None  # what reference.pt holds

    def make_example(self, record):
        example = super().make_example(record)
        content = example["tokens"].numpy().tobytes() + example["pixels"].numpy().tobytes()
        example["checksum"] = zlib.crc32(content)
        if self.reference is not None:
            checksum, *example["s_ref"] = self.reference[record["number"]].tolist()
            if checksum != example["checksum"]:
                raise UserError(
                    f"{record['where']}: the reference was asked about another pair before step 1, or about "
                    "another picture; start the run anew"
                )
        return example

    def open_picture(self, path, record):
        image = super().open_picture(path, record)
        if record["file"].recompress:  # MMPR's data_augment: JPEG at a quality of 75 to 100
            file = io.BytesIO()
            quality = random.Random(record["number"]).randint(75, 100)
            image.save(file, "JPEG", quality=quality)
            image = Image.open(file)
        return image

    def encode(self, record, n_visual):
        texts = [record.get(name) for name in ("question", "chosen", "rejected")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"question, chosen and rejected are {texts}; a pair has all three as text")
        question, chosen, rejected = texts
        if chosen.strip() == rejected.strip():
            raise UserError("chosen and rejected are the same answer; drop the pair")
        prompt, chosen = self.encode_answer(question, chosen, n_visual)
        _, rejected = self.encode_answer(question, rejected, n_visual)
        self.check_length(len(prompt) + max(len(chosen), len(rejected)), n_visual)
        return pair_row(prompt, chosen, rejected) | {"n_visual": n_visual}

    def encode_answer(self, question, answer, n_visual):
        """-> ids of the prompt, ids of the answer with its stop."""
        turns = [("human", question), ("gpt", answer)]
        tokens, labels = encode_conversation(self.tok, turns, self.template, n_visual)
        answer = [label for label in labels if label != IGNORE]
        return tokens[: labels.index(answer[0])], answer


# ---- flags ----


@dataclass
class MPOConfig(TrainConfig):
    model: str = arg(
        "", "model directory to go on from, and the reference; empty: the newest finished run under out/"
    )
    data: str = arg(
        REQUIRED,
        "pairs: JSONL of {image, question, chosen, rejected} (MMPR), FILE,FILE, or a meta.json that "
        "mixes such files",
    )
    beta: float = arg(0.1, "scale of the rewards", above=0)
    w_p: float = arg(0.8, "weight of the preference term, DPO")
    w_q: float = arg(0.2, "weight of the quality term, BCO")
    w_g: float = arg(1.0, "weight of the generation term, SFT")
    reference: str = arg(
        "precomputed",
        "its log-probabilities: computed once, or by the policy without its LoRA in each step",
        choices=("precomputed", "lora-off"),
    )

    # Fields of TrainConfig that are no flags here, being without arg().
    stage: str = "finetune"
    from_scratch: bool = False
    connector: str = ""
    projector: str = ""
    tokenizer: str = ""
    image_size: int = 0
    augment: bool = False
    shard: bool = False
    split_questions: bool = False


DEFAULTS = dict(out="out/mpo", lr=1e-4, weight_decay=0.05, bad_records="skip")


def main(argv=None, Config=MPOConfig, Task=Preferring, description=__doc__):
    cfg = parse(Config, argv, description, DEFAULTS)
    if world_size() > 1:
        raise UserError("mpo.py runs in one process: start it without torchrun")
    if cfg.model in PRESETS:
        raise UserError(
            f"--model {cfg.model} is a preset: preferences are for a model that can answer; give its "
            "directory, such as out/finetune"
        )
    if cfg.reference == "lora-off" and not (cfg.lora_r and cfg.train == "llm"):
        raise UserError(
            "--reference lora-off: the policy without its LoRA must stay what it began as; give "
            "--lora-r N --train llm, or --reference precomputed"
        )
    cfg.model = cfg.model or newest_run()
    return teach(cfg, Task)


if __name__ == "__main__":
    sys.exit(run_program(main))
