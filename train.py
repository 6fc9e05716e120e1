"""The one training loop: show the model pictures and questions, and teach it the answers (arXiv:2310.03744).

    --stage pretrain    the connector alone learns to caption: tower features become words of the decoder
    --stage finetune    connector and decoder learn to follow instructions about pictures; the tower is frozen
    (and in either all that starts from random weights, as a preset's tower without --vision)

    L = - sum_t log p(token_t | picture, tokens before t) / n
    over the n supervised tokens of the whole step: -log of arXiv:2304.08485, Eq. 3, a token

A micro-batch counts by its share of these n tokens. (The original averages the micro-batches' means, so that
short answers weigh more; its curves differ a little.)

    python train.py --stage finetune                       # the toy: draws its world, trains, is evaluated
    python train.py --model out/finetune --data FILE.json --image-root DIR --out out/mine
    python train.py --model llava-1.5-7b --vision CLIP --llm VICUNA --data MIX.json --image-root DIR --dry-run
    torchrun --nproc-per-node 8 train.py --shard ...       # FSDP2: each GPU keeps an eighth of the weights

--help shows the defaults of the --model and --stage given beside it. All that is drawn at random follows
--seed: on a CPU the same command with the same --threads gives the same weights, bit for bit.

A run writes to --out: log.jsonl and loss.png while it goes, now and then checkpoint-N/, at the end the model;
where there are held-out questions also best/, the model whose loss on them was lowest, and results.json.
--resume goes on from the newest checkpoint, and ends where the uninterrupted run would have, bit for bit on a
CPU. Ctrl-C and SIGTERM save a checkpoint first; a second one ends the run at once.
"""

import math
import os
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass

# PyTorch's threads wait for each other thousands of times a step, spinning. By default they do so for long:
# beside other programs each spins for one that has no core, and two threads are ten times as slow as one. If
# they slept at once, two threads would be no faster than one on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is loaded

import torch

from conversation import find_template
from data import Examples, collate, load_steps
from model import IGNORE, PRESETS
from support.checkpoint import FREE_TO_CHANGE, Run
from support.cli import UserError, arg, run_program
from support.data_files import Records, fill_in_paths
from support.distributed import (
    average_gradients,
    compiles,
    full_tensor,
    parallelize,
    precision,
    with_fillers,
)
from support.flags import MoreFlags, parse_with_recipe
from support.heldout import HeldOut
from support.lora import add_lora_of_flags
from support.optim import PARTS, make_optimizer, part_of
from support.plan import count_steps, dry_run, print_parameters
from support.processes import gather, processes, world_size
from support.start import ASSETS, TOY, build
from support.threads import add_gradients, make_twins
from support.weights import load_adapter
from vision import MODES

# ---- flags and recipes ----


@dataclass
class TrainConfig(MoreFlags):
    """Further flags, for large and for unusual runs, are in support/flags.py."""

    # What is taught to what
    stage: str = arg("finetune", "what is taught; see above", choices=("pretrain", "finetune"))
    model: str = arg("toy", f"a preset ({', '.join(PRESETS)}) or a model directory to go on from")
    data: str = arg("",
        "LLaVA-format JSON or JSONL file; FILE,FILE: several as one; a meta.json as MMPR's; empty: the toy "
        "world, drawn into toyworld/ on first use")
    image_root: str = arg("", "folder that the records' image paths start from; empty: that of their file")
    val: str = arg("",
        "held-out questions (JSONL: image, text, answer, category); empty: val.jsonl beside --data, if any")
    out: str = arg("", "folder for the run; empty: out/STAGE. An earlier run that is there is moved aside")

    # Where the weights come from
    vision: str = arg("",
        "directory or file of the tower (CLIP, SigLIP, DINOv2, ViT) of a preset or of a model published "
        "without; DIR,DIR: two towers; empty: random weights")
    llm: str = arg("",
        "Llama, Mistral or InternLM2 directory for decoder and tokenizer of a preset, or the base of a LoRA; "
        "empty: random weights")
    projector: str = arg("",
        "connector to start from: a model directory that stage 1 wrote, its model.safetensors, or a "
        "mm_projector.bin; empty: the model's own")

    # What trains, and how a record becomes tokens
    train: str = arg("",
        "parts to train; empty: those of the stage, and all that start from random weights", choices=PARTS)
    template: str = arg("", "conversation template; empty: the model's own, in stage pretrain its captions'")
    image_mode: str = arg("",
        "pad, letterbox, crop or resize: one tile a picture; hd (LLaVA-1.5-HD), anyres (LLaVA-NeXT) or "
        "internvl: several; empty: the model's own", choices=MODES)
    max_length: int = arg(0, "longest record in tokens; 0: the decoder's block size")

    # Steps and rates
    batch_size: int = arg(16, "records a step", at_least=1, at_most=2**20)
    micro_batch_size: int = arg(0, "records in memory at once; 0: all of the step's")
    lr: float = arg(1e-3, "peak learning rate, after warmup", above=0)
    weight_decay: float = arg(0.0, "AdamW's, on matrices only")
    warmup: float = arg(0.03, "share of the steps with a rising learning rate", at_most=1)
    clip: float = arg(1.0, "largest norm of the gradient; inf: no limit", above=0, at_most=math.inf)
    epochs: float = arg(1.0, "passes over the data", above=0, at_most=1e6)
    max_steps: int = arg(0, "steps; 0: as --epochs says", at_most=10**12)
    seed: int = arg(0, "for weights and the order of the records", below=2**63)

    # Now and then
    eval_every: int = arg(100,
        "steps between held-out losses and answers; the best model so far is kept; 0: never")
    save_every: int = arg(100, "steps between checkpoints; 0: only at the end")
    final_eval: bool = arg(True, "at the end, answer the held-out questions and print the table")
    resume: bool = arg(False,
        f"go on from the newest checkpoint in --out, with the same flags but for {', '.join(FREE_TO_CHANGE)}")


# What a preset changes; a flag on the command line still wins. llava-1.5 has the published values: their
# DeepSpeed settings name no limit of the gradient's norm, so nothing was clipped.
LLAVA = dict(clip=math.inf, max_length=2048)
LLAVA_PRETRAIN = LLAVA | dict(lr=1e-3, batch_size=256, image_mode="crop", token_budget=16384)
LLAVA_FINETUNE = LLAVA | dict(lr=2e-5, batch_size=128, token_budget=8192)
RECIPES = {
    # LLaVA's stage 1 uses template "plain"; the toy's uses vicuna_v1, the only format its decoder has seen.
    ("toy", "pretrain"): TOY | dict(lr=1e-2, max_steps=1500, template="vicuna_v1"),
    ("toy", "finetune"): TOY | dict(
        lr=4e-4, max_steps=280, token_budget=2048, projector=str(ASSETS / "toy-connector")),
    ("photo", "finetune"): dict(lr=1e-3, batch_size=128, epochs=10, split_questions=True),
}
LLAVAS = ("llava-1.5-7b", "llava-1.5-hd-7b", "llava-1.5-13b")
RECIPES |= {(llava, "pretrain"): LLAVA_PRETRAIN for llava in LLAVAS}  # stage 1 of HD sees no tiles either
RECIPES |= {(llava, "finetune"): LLAVA_FINETUNE for llava in LLAVAS}


def parse_flags(argv=None, Config=TrainConfig, description=__doc__):
    return parse_with_recipe(Config, argv, description, RECIPES)


# ---- set up ----


def main(argv=None):
    cfg = parse_flags(argv)
    if cfg.resume and not cfg.data and not os.path.exists("toyworld"):
        raise UserError("--resume: give the --data of the run, too; the toy world was never drawn here")
    cfg.data = cfg.data or draw_toy_world(cfg.stage)
    return teach(cfg, Answering)


def draw_toy_world(stage):
    """-> the file of records of that stage"""
    import toyworld

    toyworld.write_world("toyworld")
    return "toyworld/pretrain.json" if stage == "pretrain" else "toyworld/train.json"


def teach(cfg, Task):
    """A training from its flags to its exit code. Task: the class of what is taught, Answering below or
    mpo.Preferring."""
    fill_in_paths(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with processes(cfg) as device:
        cfg.compile = compiles(cfg, device)
        print({name: value for name, value in asdict(cfg).items() if value not in ("", False)})

        # The records, and how many steps they make.
        records = Records(cfg.data, cfg.image_root, cfg.data_weights, cfg.data_fraction, cfg.seed)
        if cfg.split_questions:
            records.split_questions()
        n_step = cfg.max_steps or math.ceil(len(records) * cfg.epochs / cfg.batch_size)

        if cfg.dry_run:
            vlm, tok = build(cfg, device="meta")  # shapes without weights
            make_trainable(vlm, cfg)
            return dry_run(cfg, Task(cfg, records, vlm, tok).examples, n_step, vlm, device)

        # The model, as --resume left it or from its ingredients; and which of its parameters train.
        run = Run(cfg, n_step, records.paths)
        torch.manual_seed(cfg.seed)
        vlm, tok = build(cfg, run.checkpoint)
        make_trainable(vlm, cfg)
        if vlm.lora and run.checkpoint:
            load_adapter(vlm, run.checkpoint)
        vlm.to(device).train()

        # What is learned, and what is held out: an error in either comes before the folder is made.
        task = Task(cfg, records, vlm, tok)
        held_out = HeldOut(cfg, vlm, tok, Answering) if cfg.val else None

        run.open(vlm, tok, task)
        print_parameters(cfg, vlm)
        task.prepare(run)
        return fit(cfg, task, run, held_out)


def make_trainable(vlm, cfg):
    """Choose what learns: the parts of --train, or those of the stage and all that start from random weights.
    All else is frozen. Then what changes the parameters themselves: bfloat16, a LoRA."""
    if cfg.train:
        chosen = cfg.train.split(",")
    else:
        chosen = {"pretrain": ["connector"], "finetune": ["connector", "llm"]}[cfg.stage]
        for part, file in ("llm", cfg.llm), ("vision", cfg.vision):
            if cfg.model in PRESETS and not file:  # it starts from random weights
                chosen.append(part)
    for name, p in vlm.named_parameters():
        p.requires_grad = part_of(name) in chosen
    for tower in vlm.towers:  # its features are taken before its last blocks, which never run
        tower.blocks[tower.cfg.depth :].requires_grad_(False)
        tower.norm.requires_grad_(False)

    if cfg.weights == "bfloat16":
        vlm.bfloat16()
    add_lora_of_flags(vlm, cfg)  # after the cast, so that the adapter keeps float32
    vlm.decoder.recompute = cfg.recompute


# ---- the loop ----


def fit(cfg, task, run, held_out=None):
    """The loop. -> exit code

    run: what goes on (support/checkpoint.py): vlm, tok, the number of the next step; the folder with the log
        and the checkpoints.
    held_out: the questions of --val (support/heldout.py).
    task: what is taught. It has
        examples, collate   a Dataset of records as tensors; a list of those -> a batch
        count(batch)        how many of `unit` (supervised tokens, pairs) a batch has
        loss(vlm, batch)    -> L, the mean over what count counts; more such means by name, for the log
        prepare(run)        before the first step of a run, new or resumed
        state_dict(), load_state_dict()   numbers for checkpoints and the log, besides weights and optimizer
        unit, shown, plots  names for the log: what is counted, what is printed, what is drawn
    """
    vlm = run.vlm
    autocast = precision(cfg, vlm.device)
    parallelize(vlm, cfg, vlm.device)
    params = [p for p in vlm.parameters() if p.requires_grad]  # after parallelize: FSDP2 replaces them
    optimizer = make_optimizer(vlm, cfg)
    run.restore(optimizer)
    models = [vlm, *make_twins(vlm, task, cfg)]
    if cfg.minutes and not run.checkpoint:  # some steps are tried, to count how many there will be
        trial = (backward(models, task, batches, autocast) for _, batches in load_steps(cfg, task, run))
        run.n_step = count_steps(cfg.minutes, task, vlm, trial)
    print(f"{run.n_step:,} steps of {cfg.batch_size}, from {len(task.examples):,} records")

    with run:
        for step, batches in load_steps(cfg, task, run):
            lr = lr_at(step, run.n_step, cfg.lr, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * (group["peak_lr"] / cfg.lr)

            # One step: the gradient of all its micro-batches, clipped, then AdamW.
            loss, metrics = backward(models, task, batches, autocast)
            grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(params, cfg.clip)).item()
            check_finite(step, loss, grad_norm, batches)
            run.half_done = True  # until log_step: an error on the way must not save this step
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            run.log_step(step, batches, loss, metrics | {"lr": lr, "grad_norm": grad_norm})

            # Now and then: ask held-out questions, then save, so that a resumed run knows of all looks before
            # its checkpoint. The last step is saved even at save_every 0.
            is_last = step == run.n_step
            if held_out and cfg.eval_every and (is_last or step % cfg.eval_every == 0):
                held_out.measure(run, step)
            if is_last or run.interrupted or cfg.save_every and step % cfg.save_every == 0:
                run.save()
            if run.interrupted:
                run.say(f"interrupted: step {step} is saved; go on with the same command and --resume")
                return 130  # the shell's code for Ctrl-C

    run.finish()
    if held_out and cfg.final_eval:
        held_out.evaluate(run.out)
    run.say_results()
    return 0


def backward(models, task, batches, autocast=None):
    """Add the gradient of a step's L to models[0] -> L, or None where no record could be used; what else to
    log. With one process and one thread it is, of n supervised tokens in all,

        for each batch:  (task.loss(vlm, batch)[0] * task.count(batch) / n).backward()

    Further models are its twins, for further threads (support/threads.py).
    """
    batches = [batch for batch in batches if task.count(batch)]  # of the others all records were skipped
    counts = [task.count(batch) for batch in batches]
    n = sum(gather(sum(counts)))
    if n == 0:
        return None, {task.unit: 0}

    def add_part(vlm, batch, count):
        with autocast or nullcontext():
            mean, more = task.loss(vlm, batch)
        share = count / n * world_size()  # of which average_gradients takes the mean; 1 without torchrun
        part = mean * share
        if part.requires_grad:  # texts alone teach a connector nothing
            part.backward()
        return part.item(), {name: value * share for name, value in more.items()}

    loss, metrics = 0.0, Counter({task.unit: n})
    for part, more in add_gradients(add_part, models, with_fillers(batches, counts)):
        loss += part
        metrics.update(more)
    average_gradients(models[0], batches)
    return sum(gather(loss)) / world_size(), dict(metrics)


def check_finite(step, loss, grad_norm, batches):
    if not math.isfinite((loss or 0.0) + grad_norm):
        ids = ", ".join(record_id for batch in batches for record_id in batch["record_ids"])
        raise UserError(f"step {step}: the loss is {loss}, the norm of its gradient {grad_norm}; "
                        f"lower --lr, or look at the records {ids}")


def lr_at(step, n_step, peak, warmup):
    """From 0 in a line to the peak, over a share of the steps; then half a cosine, to 0 after the last step.

    `step` counts from 1, and the first moves nothing. As LLaVA's and InternVL's code has it; Prismatic's
    rounds the warmup down.
    """
    n_done, n_warmup = step - 1, math.ceil(warmup * n_step)
    if n_done < n_warmup:
        return peak * n_done / n_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (n_done - n_warmup) / (n_step - n_warmup)))


# ---- the task of answering ----


class Answering:
    """The task of LLaVA: to give the answers of conversations. fit says what a task has."""

    unit = "supervised"  # what count() counts, in the words of the log
    shown = ()  # metrics to print beside the loss
    plots = {"loss.png": {"loss per supervised token": {"training": "loss", "held-out": "val_loss"}}}
    collate = staticmethod(collate)

    def __init__(self, cfg, records, vlm, tok):
        self.examples = make_examples(Examples, cfg, records, vlm, tok)

    @staticmethod
    def count(batch):
        """How many supervised tokens there are. The model shifts the labels: the first never counts."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    @staticmethod
    def loss(vlm, batch):
        """-> the mean over the supervised tokens; no further means."""
        batch = to_device(batch, vlm.device)
        mean = vlm(batch["tokens"], batch["pixels"], batch["labels"], batch["layout"])
        return mean, {}

    def prepare(self, run):
        """Here nothing. The run's folder is there, and a new run's model is as it was before training."""

    @staticmethod
    def state_dict():
        """What a checkpoint must hold besides weights and optimizer: here nothing."""
        return {}

    def load_state_dict(self, state):
        pass


def make_examples(Kind, cfg, records, vlm, tok):
    """Records -> a Kind of data.Examples, with the flags' template, tiles and length."""
    template = cfg.template or vlm.cfg.template
    if cfg.stage == "pretrain" and not cfg.template:
        template = find_template(template).captions
    if cfg.augment and vlm.cfg.tiling:
        raise UserError(f"--augment is for one tile a picture; mode {vlm.cfg.image_mode} cuts several")
    longest = vlm.cfg.decoder.block_size
    if cfg.max_length > longest:  # what is learned beyond it could never be asked
        raise UserError(f"--max-length {cfg.max_length}: the decoder takes {longest} tokens, and no more")
    return Kind(records, tok, template, vlm.cfg.vision, vlm.cfg.image_mode, cfg.max_length or longest)


def to_device(batch, device):
    """The tensors of a batch."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items() if torch.is_tensor(x)}


if __name__ == "__main__":
    sys.exit(run_program(main))
