"""The one training loop: show the model pictures and questions, and teach it the answers (arXiv:2310.03744, sections 3 and 4).

    --stage pretrain    the connector alone learns to caption: it aligns the tower's features with the decoder's words
    --stage finetune    connector and decoder learn to follow instructions about pictures; the tower stays frozen

    L = - sum_t log p(token_t | picture, tokens before t) / n         arXiv:2304.08485, Eq. 3; t over the n supervised tokens of the whole step

The division happens once per step: micro-batches hold unequal numbers of supervised tokens, and the mean of their means would weigh
short answers more. (The original averages the means; so its loss curves differ a little from ours at equal data.)

    python train.py --stage finetune                                  # the toy: draws its world, trains, and is examined
    python train.py --stage finetune --model photo --data FILE.json --image-root DIR
    python train.py --model llava-1.5-7b --vision CLIP --llm VICUNA --data MIX.json --image-root DIR --dry-run      # what it would take
    torchrun --nproc-per-node 8 train.py --shard ...                  # FSDP2: weights, gradients and moments in eighths; --no-shard: DDP

Weights, order of the records and all else follow --seed: on a CPU the same command gives the same weights, bit for bit.
A run writes to --out: log.jsonl and loss.png while it goes, checkpoint-N/ now and then (a whole model directory; --resume goes on
from the newest, and ends where the uninterrupted run would have, bit for bit on a CPU), and at the end the model itself, with
results.json when there were held-out questions. Ctrl-C saves a checkpoint first; a second one ends the run at once.
"""

import argparse
import contextlib
import difflib
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import toyworld
from data import (IGNORE, Examples, Questions, Records, Tokenizer, collate, cut_at_stop, encode_conversation, encode_prompt, find_template, open_records,
                  parse_args, run, stop_ids)
from model import (LORA_TARGETS, PRESETS, VLM, adapter_name, add_lora, check_image_mode, check_tokenizer, decoder_config, init_weights, load_adapter,
                   load_connector, load_decoder, load_vision, open_weights, public_layout, read_json, read_model, read_tower, save_adapter,
                   save_processor, tokenizer_home, write_whole)
from vision import MODES, TILINGS, UserError, cut_tiles, find_tiling, grids_up_to, join, open_image

HERE = Path(__file__).parent


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    stage: str = arg("finetune", "pretrain (connector only, captions) or finetune (connector and decoder, conversations)")
    model: str = arg("toy", f"a preset ({', '.join(PRESETS)}) or a model directory to go on from")
    data: str = arg("", "LLaVA-format JSON or JSONL file; FILE,FILE: several as one; a meta.json as MMPR's; empty: the toy world, drawn into toyworld/ on first use")
    data_weights: str = arg("", "how often an epoch shows each file of --data, X,X; empty: once, or as meta.json says")
    data_fraction: float = arg(1.0, "share of the records to train on, above 0 to 1; a smaller share is part of a larger one of the same --seed")
    split_questions: bool = arg(False, "each question of a conversation and its answer as a record of its own; the file is read once before")
    image_root: str = arg("", "folder that the records' image paths start from; empty: the folder of --data")
    val: str = arg("", "held-out questions (JSONL: image, text, answer, category); empty: val.jsonl beside --data, if it is there")
    out: str = arg("", "folder for the run; empty: out/STAGE. An earlier run that is there is moved aside")
    vision: str = arg("", "directory or file of the tower (CLIP, SigLIP, DINOv2, ViT) of a preset or of a model published without; "
                           "DIR,DIR: two towers; empty: random weights")
    llm: str = arg("", "Llama, Mistral or InternLM2 directory for decoder and tokenizer of a preset, or the base of a LoRA; empty: random weights")
    tokenizer: str = arg("", "sentencepiece tokenizer.model of a preset, or a directory that holds one; empty: the decoder's own")
    projector: str = arg("", "connector to start from: a model directory that stage 1 wrote, its model.safetensors, or a mm_projector.bin; empty: the model's own")
    from_scratch: bool = arg(False, "start from random weights where the preset has trained ones")
    train: str = arg("", "parts to train, of connector,llm,vision; empty: those of the stage, and all that start from random weights")
    lora_r: int = arg(0, "rank of a LoRA on the decoder, which is trained instead of it; 0: none")
    lora_alpha: float = arg(0.0, "a LoRA counts alpha / r times; 0: twice r, as LLaVA has it")
    lora_dropout: float = arg(0.0, "share of a LoRA's inputs that are dropped, from 0 to below 1")
    lora_target: str = arg("", f"linear layers of the decoder with a LoRA, of {','.join(LORA_TARGETS)}; empty: all")
    template: str = arg("", "conversation template; empty: plain in stage pretrain, the model's own otherwise")
    image_size: int = arg(0, "pixels a side of the tile that a preset's --vision looks at; 0: the tower's own, of two the second one's")
    image_mode: str = arg("", "pad, letterbox, crop or resize: one tile a picture; hd (LLaVA-1.5-HD), anyres (LLaVA-NeXT) or internvl: several; "
                              "empty: the model's own")
    max_tiles: int = arg(0, "most tiles of a picture in modes hd and internvl; 0: the model's own, or 6 and 12")
    global_view: str = arg("", "the whole picture as one more tile: first, last or none; empty: as the mode has it")
    batch_size: int = arg(16, "records a step")
    micro_batch_size: int = arg(0, "records in memory at once; 0: all of the step's")
    token_budget: int = arg(0, "tokens in memory at once, padding counted: a step's records are sorted by length and cut to fit; 0: as --micro-batch-size")
    lr: float = arg(1e-3, "peak learning rate, after warmup")
    lr_connector: float = arg(0.0, "the connector's own; 0: as --lr")
    lr_vision: float = arg(0.0, "the towers' own; 0: as --lr")
    weight_decay: float = arg(0.0, "AdamW's, on matrices only")
    warmup: float = arg(0.03, "share of the steps with a rising learning rate, 0 to 1")
    clip: float = arg(1.0, "largest norm of the gradient; inf: no limit")
    epochs: float = arg(1.0, "passes over the data")
    max_steps: int = arg(0, "steps; 0: as --epochs says")
    max_length: int = arg(0, "longest record in tokens; 0: the decoder's block size")
    bad_records: str = arg("stop", "what to do with a record that cannot be used: stop, or skip and count")
    eval_every: int = arg(100, "steps between looks at held-out loss and sample answers; 0: never")
    save_every: int = arg(100, "steps between checkpoints; 0: only at the end")
    log_every: int = arg(10, "steps between printed lines")
    final_eval: bool = arg(True, "at the end, answer the held-out questions and print the table")
    eval_limit: int = arg(0, "answer only this many of them, evenly spread over the file; 0: all")
    resume: bool = arg(False, "go on from the newest checkpoint in --out; all flags that matter must be as they were")
    workers: int = arg(1, "processes that prepare records; 0: none")
    seed: int = arg(0, "for weights and the order of the records")
    device: str = arg("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = arg("auto", "float32, bfloat16 (autocast) or auto: bfloat16 on a GPU, float32 on a CPU")
    weights: str = arg("float32", "float32, or bfloat16: what that cuts off is kept beside the optimizer, so that no small step is lost")
    recompute: int = arg(0, "blocks of the decoder, from the first, that keep no activations but compute them twice: less memory, more time")
    compile: bool = arg(False, "torch.compile the blocks: a minute or two first, then faster")
    shard: bool = arg(False, "under torchrun: FSDP2, weights and optimizer in shares; --no-shard: DDP, each process has all of them")
    cache_features: float = arg(0.0, "GB at most for the frozen towers' features of all records, computed once and kept in --out; 0: none are kept")
    dry_run: bool = arg(False, "say what the run would train, need and take, read no weights, and end")


# What a preset changes, by (model, stage); a flag on the command line still wins. llava-1.5 has the published values.
TOY = dict(vision=str(HERE / "assets/toy-clip"), llm=str(HERE / "assets/toy-vicuna"))
RECIPES = {
    ("toy", "pretrain"): TOY | dict(lr=1e-2, batch_size=16, max_steps=1500, template="vicuna_v1"),         # its decoder knows no other
    ("toy", "finetune"): TOY | dict(projector=str(HERE / "assets/toy-connector"), lr=3e-4, batch_size=16, max_steps=400),
    ("photo", "finetune"): dict(lr=1e-3, batch_size=128, max_steps=3000, split_questions=True, eval_every=250, save_every=500),
    ("llava-1.5-7b", "pretrain"): dict(lr=1e-3, batch_size=256, clip=math.inf, image_mode="crop", max_length=2048, token_budget=16384, compile=True),
    ("llava-1.5-7b", "finetune"): dict(lr=2e-5, batch_size=128, clip=math.inf, max_length=2048, token_budget=8192, compile=True),
}
RECIPES |= {("llava-1.5-hd-7b", stage): RECIPES["llava-1.5-7b", stage] for stage in ("pretrain", "finetune")}     # stage 1 sees no tiles either
RECIPES |= {("llava-1.5-13b", stage): RECIPES["llava-1.5-7b", stage] for stage in ("pretrain", "finetune")}
FREE_TO_CHANGE = {"resume", "out", "workers", "device", "log_every", "final_eval", "eval_limit", "save_every", "eval_every", "micro_batch_size",
                  "token_budget", "recompute", "compile", "shard", "cache_features", "dry_run"}           # on --resume


def main(argv=None):
    return guarded(lambda: fit(parse(argv)))


def guarded(train):
    """train(), with what went wrong outside of us said in one line."""
    try:
        return train()
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as error:                                # not our mistake, nor quite the user's: the machine's
        last = str(error).strip().splitlines()[-1]                          # a loader process sends its whole traceback
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"the GPU's memory is full ({last}); lower --token-budget or --micro-batch-size, or raise --recompute, "
                            "and go on with --resume") from None
        if last.startswith("DataLoader worker"):
            raise UserError(f"{last}: most often memory is short; try --workers 0, and go on with --resume") from None
        if isinstance(error, OSError):                                      # full disk, a file taken away
            raise UserError(f"{last}; what was saved before is untouched: put it right and go on with --resume") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fit(cfg, lesson=None):
    """The loop. What it teaches is a lesson: Answers, or the pairs of mpo.py."""
    lesson = lesson or Answers
    # Data, model, optimizer.
    device = meet(cfg)
    print(f"config: {json.dumps({k: v for k, v in asdict(cfg).items() if v not in ('', False)})}", flush=True)
    out = Path(cfg.out)
    records = lesson.read(cfg)
    if cfg.dry_run:
        return dry_run(cfg, records, device)
    checkpoint, state = find_checkpoint(out, cfg) if cfg.resume else (None, {"step": 0, "skipped": 0})
    torch.manual_seed(cfg.seed)
    vlm, tok = build(cfg, checkpoint)
    freeze(vlm, cfg, checkpoint)
    vlm.to(device).train()
    questions, looks = read_held_out(cfg, vlm, tok) if cfg.val else ([], [])
    first, steps = state["step"], n_step(cfg, records)
    lesson = lesson(cfg, records, vlm, tok, device, state)
    count = lambda ps: f"{sum(p.numel() for p in ps) / 1e6:.2f}M"
    print(f"{count(p for p in vlm.parameters() if p.requires_grad)} of {count(vlm.parameters())} parameters train, on {len(records):,} records, {steps:,} steps of {cfg.batch_size}", flush=True)
    half, examples = is_half(cfg, device), lesson.examples
    if rank() == 0:
        rewind(out, first) if checkpoint else move_aside(out, cfg)
        save_processor(out, tok.path, vlm.cfg)
        if vlm.lora and not checkpoint and lora_base(cfg) == out / "base":
            save_processor(out / "base", tok.path, vlm.cfg)
            vlm.save_pretrained(out / "base")                               # B is still 0
    wait()
    if cfg.cache_features:
        examples = cache_features(examples, vlm, cfg, device, out, half)
    net = spread(vlm, cfg, device, half)
    params = [p for p in vlm.parameters() if p.requires_grad]               # FSDP2 has put others in their place
    optimizer = make_optimizer(vlm, cfg)
    if checkpoint:
        restore(vlm, optimizer, checkpoint, state)
    tok.path = out / "tokenizer.model"                                      # the checkpoint it may have come from will be deleted
    order = itertools.islice(batches(getattr(records, "runs", torch.ones(len(records), dtype=torch.int64)), cfg.batch_size, steps, cfg.seed), first, None)
    loader = iter(DataLoader(examples, batch_sampler=(share(batch, records, vlm.cfg.vision.n_token) for batch in order), num_workers=cfg.workers,
                             pin_memory=device.type == "cuda", collate_fn=functools.partial(
                                 micro_batches, size=cfg.micro_batch_size, pad=tok.pad, budget=cfg.token_budget, collate=lesson.collate)))
    autocast = precision(cfg, device)

    # The loop.
    began, busy, seen, padded, skipped, untested = time.time(), 0.0, 0, 0, state["skipped"], True
    with (catch_ctrl_c() as stop, open(out / "log.jsonl" if rank() == 0 else os.devnull, "a", buffering=1) as log,
          tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty() or rank() > 0) as bar):
        for step in range(first + 1, steps + 1):
            start = time.time()
            lr = lr_at(step, steps, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            if cfg.lora_dropout:
                torch.manual_seed(hash((cfg.seed, step, rank())))           # so that a resumed run drops the same
            micro = next(loader)
            if step == 1:
                say_coverage(micro)
            loss, measured = lesson.backward(net, micro, autocast)
            norm = whole(torch.nn.utils.clip_grad_norm_(params, cfg.clip)).item()
            if not math.isfinite((loss or 0) + norm):
                raise UserError(f"step {step}: the loss is {loss}, the norm of its gradient {norm}; lower --lr, or look at the records "
                                + lesson.blame(net, micro, autocast))
            before = fingerprints(vlm) if untested and norm > 0 else None
            optimizer.step()
            if before:
                check_moved(vlm, before, optimizer, step)
                untested = False
            optimizer.zero_grad(set_to_none=True)
            lesson.stepped(step)

            bad = [reason for m in micro for reason in m["skipped"]]
            for k, reason in enumerate(bad[: max(0, 5 - skipped)], skipped + 1):
                bar.write(f"skipped: {reason}" + ("; from here on they are only counted" if k == 5 else ""))
            totals = gather([sum(int(m["lengths"].sum()) for m in micro), sum(m["tokens"].numel() for m in micro), len(bad), len(stop)])
            seen, padded, skipped, halt = (int(a + b) for a, b in zip((seen, padded, skipped, 0), totals.sum(0)))
            busy += time.time() - start
            left = (time.time() - began) / (step - first) * (steps - step)
            log.write(json.dumps({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **measured, "time": round(time.time() - began, 2)}
                                 | ({"skipped": bad} if bad else {})) + "\n")
            said, rate = "no usable record" if loss is None else f"loss {loss:.4f}", f"{seen / busy:,.0f} tokens/s"
            said += "".join(f"  {name} {measured[name]:.3f}" for name in lesson.shown if loss is not None)
            bar.set_postfix_str(f"{said}, {rate}")
            bar.update()
            if step % cfg.log_every == 0 or step in (first + 1, steps):
                bar.write(f"step {step:5d}/{steps}  {said}  lr {lr:.2e}  {rate}  {bar.format_interval(left)} left")
            if looks and cfg.eval_every and (step % cfg.eval_every == 0 or step == steps):
                with as_written(vlm, cfg):
                    val_loss, shuffled = held_out_loss(vlm, looks, device), held_out_loss(vlm, looks, device, shuffled=True)
                    said = sample_answers(vlm, tok, questions, step)
                log.write(json.dumps({"step": step, "val_loss": val_loss, "val_loss_shuffled": shuffled}) + "\n")
                bar.write(f"held-out loss {val_loss:.4f}, with pictures shuffled {shuffled:.4f}"
                          + (": the model makes no use of the pictures" if shuffled < 1.01 * val_loss and any(len(m["pixels"]) for m in looks) else "")
                          + "\n" + said)
            if rank() == 0 and (step % 50 == 0 or step == steps or halt):
                draw_curve(out / "loss.png", out / "log.jsonl")
                lesson.draw(out)
            sys.stdout.flush()
            if halt or step == steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson.state())
            if halt:
                bar.write(f"interrupted: step {step} is saved; go on with the same command and --resume")
                return 130
    shown = steps * cfg.batch_size
    if skipped == shown:
        raise UserError(f"{cfg.data}: not one record could be used; the reasons are above, or: python data.py check {cfg.data} --image-root {cfg.image_root}")
    still = [name for name, p in vlm.named_parameters() if p.requires_grad and p not in optimizer.state]
    print(f"trained {steps - first} steps in {time.time() - began:.0f} s; {skipped} of {shown} records skipped; "
          f"{1 - seen / max(padded, 1):.1%} of the tokens were padding"
          + (f"; {len(still)} trainable tensors never got a gradient, such as {still[0]}" if still else ""))
    save_model(out, vlm, tok)
    if questions and cfg.final_eval:
        every = math.ceil(len(questions) / cfg.eval_limit) if cfg.eval_limit > 0 else 1
        with as_written(vlm, cfg):
            examine(vlm, tok, questions[::every], out)
    print(f"the model is in {out}; ask it: python sample.py --model {out} --image FILE --prompt TEXT")
    return 0


class Answers:
    """What the loop teaches: to give the answers of the conversations. Another lesson has the same methods (mpo.Pairs)."""
    shown, collate = (), staticmethod(collate)   # what of `measured` is printed beside the loss; examples -> batch

    def __init__(self, cfg, records, vlm, tok, device, state):
        self.device, template = device, cfg.template or ("plain" if cfg.stage == "pretrain" else vlm.cfg.template)
        self.examples = Examples(records, tok, template, vlm.cfg.vision, vlm.cfg.image_mode, cfg.max_length or vlm.cfg.decoder.block_size, cfg.bad_records)

    @staticmethod
    def read(cfg):
        records = open_records(cfg.data, cfg.image_root, cfg.data_weights, cfg.data_fraction, cfg.seed)
        return Questions(records) if cfg.split_questions else records

    def backward(self, net, micro, autocast):    # -> loss of the step (None: nothing could be used), what else the log should hold
        loss, supervised = backward(net, micro, self.device, autocast)
        return loss, {"supervised": supervised}

    def blame(self, net, micro, autocast):       # the ids of records whose loss is no number
        return blame(net, micro, self.device, autocast)

    def stepped(self, step):                     # after each step of the optimizer
        pass

    def state(self):                             # what a checkpoint must hold besides weights and optimizer
        return {}

    def draw(self, out):                         # a picture beside loss.png
        pass


# ---- the parts, in the order of their use ------------------------------------------------------------------------------


def parse(argv=None):
    """One flag per field of TrainConfig; the recipe of (--model, --stage) replaces defaults, the command line replaces both."""
    argv = sys.argv[1:] if argv is None else argv
    cli = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                usage="python train.py [--stage {pretrain,finetune}] [--model PRESET|DIR] [--data FILE] [any flag below]",
                epilog="The defaults shown are those of the --model and --stage given beside --help.")
    cfg = read_flags(cli, TrainConfig, recipe_of(argv), argv)
    if not cfg.data:
        try:
            toyworld.write_world("toyworld")
        except OSError as error:
            raise UserError(f"the toy world could not be drawn: {error}; or give your own --data") from None
        cfg = replace(cfg, data="toyworld/pretrain.json" if cfg.stage == "pretrain" else "toyworld/train.json")
    return find_files(cfg)


def recipe_of(argv):
    """What some flags change in the defaults of others."""
    peek = argparse.ArgumentParser(add_help=False)                          # the flags that decide on the defaults of others
    peek.add_argument("--model", default="toy")
    peek.add_argument("--stage", default="finetune")
    peek.add_argument("--epochs")
    peek.add_argument("--from-scratch", "--from_scratch", action="store_true")
    for flag in "--vision", "--llm", "--image-mode", "--image_mode":
        peek.add_argument(flag)
    choice, _ = peek.parse_known_args(argv)
    recipe = RECIPES.get((choice.model, choice.stage), {}) | (dict(max_steps=0) if choice.epochs else {})
    if choice.from_scratch:
        return recipe | dict(vision="", llm="", projector="")
    other = choice.vision or choice.llm or choice.image_mode == "internvl"  # the connector was made for none of these
    return recipe | (dict(projector="") if other else {})


def read_flags(cli, Config, recipe, argv):
    """A flag for each field that has a help text; -> Config, its values checked."""
    for f in (f for f in fields(Config) if f.metadata["help"]):
        default = recipe.get(f.name, f.default)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar={int: "N", float: "X", str: "TEXT"}[f.type])
        said = "" if default == "" else f" (default {('no', 'yes')[default] if f.type is bool else default})"
        cli.add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"] + said, **kind)
    cfg = Config(**vars(parse_args(cli, argv)))
    one_of("--stage", cfg.stage, ["pretrain", "finetune"])
    one_of("--bad-records", cfg.bad_records, ["stop", "skip"])
    one_of("--image-mode", cfg.image_mode or MODES[0], MODES)
    one_of("--global-view", cfg.global_view or "first", ["first", "last", "none"])
    one_of("--dtype", cfg.dtype, ["float32", "bfloat16", "auto"])
    one_of("--weights", cfg.weights, ["float32", "bfloat16"])
    for name in filter(None, cfg.lora_target.split(",")):
        one_of("--lora-target", name, LORA_TARGETS)
    for names, fits, rule in ((("batch_size", "log_every"), lambda x: x >= 1, "at least 1"), (("lr", "clip", "epochs"), lambda x: x > 0, "above 0"),
                              (("warmup",), lambda x: 0 <= x <= 1, "from 0 to 1"), (("seed",), lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"),
                              (("data_fraction",), lambda x: 0 < x <= 1, "above 0 and at most 1"), (("lora_dropout",), lambda x: 0 <= x < 1, "from 0 to below 1"),
                              (("micro_batch_size", "token_budget", "weight_decay", "max_steps", "max_tiles", "max_length", "eval_every", "save_every", "workers", "lora_r",
                                "lora_alpha", "lr_connector", "lr_vision", "recompute", "cache_features"), lambda x: x >= 0, "0 or more")):
        for name in names:
            if not fits(asdict(cfg)[name]):
                raise UserError(f"--{name.replace('_', '-')} {asdict(cfg)[name]}: must be {rule}")
    return cfg


def find_files(cfg):
    """Fill in the paths that were not given, and check that the files are there."""
    beside = Path(cfg.data).parent
    cfg = replace(cfg, image_root=cfg.image_root or str(beside), out=cfg.out or f"out/{cfg.stage}",
                  val=cfg.val or (str(beside / "val.jsonl") if (beside / "val.jsonl").exists() else ""))
    for flag, file in (("--data", cfg.data), ("--val", cfg.val)):
        for one in file.split(",") if file else ():
            if not Path(one).is_file():
                raise UserError(f"{flag} {one}: no such file; give a LLaVA-format JSON or JSONL file")
    return cfg


class Flags(argparse.ArgumentParser):
    def error(self, message):                    # argparse's own way: forty lines of usage and exit code 2
        raise UserError(f"{message}; see --help")


def one_of(flag, value, known):
    if value not in known:
        raise UserError(f"{flag} {value}: did you mean {difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]}? Known are {', '.join(known)}")


def pick_device(name):
    """cpu, cuda, cuda:N or auto -> torch.device, one that is there."""
    n = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if n else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: choose cpu, cuda, cuda:N or auto")
    if name != "cpu" and int(name[5:] or 0) >= n:
        raise UserError(f"--device {name}: PyTorch sees {n} GPUs here; choose cpu or auto" + (f", or cuda:0 to cuda:{n - 1}" if n else ""))
    return torch.device(name)


def is_half(cfg, device):
    return cfg.weights == "float32" and (cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda")


def precision(cfg, device):
    return torch.autocast(device.type, torch.bfloat16) if is_half(cfg, device) else contextlib.nullcontext()


def blueprint(cfg):
    """What a preset becomes with its ingredients, of which only the configs are read: VLMConfig, Tokenizer, and the towers' paths."""
    tok, preset = Tokenizer(cfg.tokenizer or cfg.llm or TOY["llm"]), PRESETS[cfg.model]
    paths = cfg.vision.split(",") if cfg.vision else []
    towers = [read_tower(path) for path in paths] or [preset.vision]
    shuffle = cfg.image_mode == "internvl"                                  # whose pixel shuffle and connector belong to the mode
    towers = [replace(t, image_size=cfg.image_size or towers[-1].image_size, merge=2 if shuffle else t.merge) for t in towers]
    decoder = decoder_config(read_json(Path(cfg.llm) / "config.json")) if cfg.llm else preset.decoder
    connector = "fused_gelu" if towers[1:] else "norm_gelu" if shuffle else preset.connector
    return replace(preset, vision=towers[0], vision2=towers[1] if towers[1:] else None, connector=connector,
                   decoder=replace(decoder, vocab_size=tok.vocab_size),
                   image_token=tok.image, pad_token=tok.pad, bos_token=tok.bos, eos_token=tok.eos), tok, paths


def build(cfg, checkpoint=None):
    """The model to train and its tokenizer: from a checkpoint, a model directory, or a preset with its ingredients."""
    if checkpoint and cfg.lora_r:                # it holds the LoRA; what that is over stands beside the run, or is --model
        checkpoint = lora_base(cfg)
    if checkpoint or cfg.model not in PRESETS:
        directory = checkpoint or cfg.model
        if not Path(directory).is_dir():
            one_of("--model", cfg.model, [*PRESETS, "a model directory"])
        if not checkpoint and (cfg.tokenizer or cfg.from_scratch):
            raise UserError(f"--model {cfg.model} is a whole model; --tokenizer and --from-scratch are for presets ({', '.join(PRESETS)})")
        given = (None, None) if checkpoint and directory != cfg.model else (cfg.vision or None, cfg.llm or None)
        vlm, tok = VLM.from_pretrained(directory, vision=given[0], llm=given[1]), Tokenizer(tokenizer_home(directory, given[1]))
    else:
        plan, tok, paths = blueprint(cfg)
        vlm = VLM(plan)
        for tower, path in zip((vlm.vision, *([vlm.vision2] if plan.vision2 else [])), paths):
            load_vision(tower, path)
        if not paths:
            init_weights(vlm.vision)
        load_decoder(vlm.decoder, cfg.llm) if cfg.llm else init_weights(vlm.decoder)
    check_tokenizer(vlm, tok)
    set_mode(vlm, cfg)
    if cfg.projector and not checkpoint:
        load_connector(vlm.connector, cfg.projector)
    if cfg.stage == "finetune":                  # what a model is asked with later is the template of its conversations, not of its captions
        vlm.cfg.template = cfg.template or vlm.cfg.template
    return vlm, tok


def open_model(directory, device="cpu", dtype="auto", vision=None, llm=None, template="", image_mode=""):
    """A model that others ask, by their flags of these names -> VLM, which has the template and the image mode in its cfg, and its Tokenizer."""
    if template:
        find_template(template)                                             # said before gigabytes are read
    vlm = VLM.from_pretrained(directory, device, None if dtype == "auto" else getattr(torch, dtype), vision, llm)
    tok = Tokenizer(tokenizer_home(directory, llm))
    check_tokenizer(vlm, tok)
    mode = image_mode or vlm.cfg.image_mode
    check_image_mode(vlm, mode, directory)
    vlm.cfg = replace(vlm.cfg, template=template or vlm.cfg.template, image_mode=mode)
    return vlm, tok


def set_mode(vlm, cfg):
    """How the flags want pictures cut, where they say so."""
    mode, choices = cfg.image_mode or vlm.cfg.image_mode, dict(global_view=cfg.global_view) if cfg.global_view else {}
    if cfg.max_tiles and mode == "anyres":
        raise UserError("--max-tiles is for modes hd and internvl; anyres has its five grids")
    vlm.set_image_mode(mode, **choices, **(dict(grids=grids_up_to(cfg.max_tiles)) if cfg.max_tiles else {}))


def lora_base(cfg):
    """The whole model that a LoRA is over: --model, or what a preset, a --projector, a --vision or tiles made of it, saved beside the run."""
    return Path(cfg.model) if not (cfg.model in PRESETS or cfg.projector or cfg.vision or cfg.llm or cfg.image_mode in TILINGS) else Path(cfg.out) / "base"


def part_of(name):
    """A parameter's name -> its part as --train calls it."""
    return {"decoder": "llm", "vision2": "vision"}.get(name.split(".")[0], name.split(".")[0])


def freeze(vlm, cfg, checkpoint=None):
    """Only the parts of --train get gradients, of the decoder only its LoRA if there is one; returns their parameters."""
    fresh = [name for name, source in (("llm", cfg.llm), ("vision", cfg.vision)) if cfg.model in PRESETS and not source]
    chosen = cfg.train.split(",") if cfg.train else ["connector", *fresh, *(["llm"] if cfg.stage == "finetune" else [])]
    for name in chosen:
        one_of("--train", name, ["connector", "llm", "vision"])
    for name, p in vlm.named_parameters():
        p.requires_grad = part_of(name) in chosen
    for tower in [vlm.vision, *([vlm.vision2] if vlm.cfg.vision2 else [])]:
        tower.blocks[tower.cfg.depth :].requires_grad_(False)               # they never run
        tower.norm.requires_grad_(False)
    if cfg.weights == "bfloat16":
        vlm.bfloat16()
    if cfg.lora_r:
        if "llm" not in chosen:
            raise UserError(f"--lora-r {cfg.lora_r} --train {cfg.train}: a LoRA is trained in the decoder; add llm to --train, or leave out --lora-r")
        add_lora(vlm, cfg.lora_r, cfg.lora_alpha or 2 * cfg.lora_r, cfg.lora_dropout, cfg.lora_target.split(",") if cfg.lora_target else LORA_TARGETS)
        vlm.lora["base"] = lora_base(cfg).absolute()
        if checkpoint:
            load_adapter(vlm, checkpoint)
    vlm.decoder.recompute = cfg.recompute
    params = [p for p in vlm.parameters() if p.requires_grad]
    for p in params:                             # many small gradients are added up in float32; PyTorch before 2.10 adds in bfloat16
        if p.dtype == torch.bfloat16 and (cfg.token_budget or cfg.micro_batch_size) and hasattr(p, "grad_dtype"):
            p.grad_dtype = torch.float32
    return params


class SplitAdamW(torch.optim.Optimizer):
    """AdamW that loses nothing over bfloat16 weights: the lower half of each float32 weight is kept here, in 16 bits.

    weight = upper * 2^16 + lower, as bits; the upper half, rounded, is the bfloat16 that the model works with. Alone it could not follow: a
    step of 2e-5 is 200 times less than what a bfloat16 of 1.0 can move by. Weights in float32 (a LoRA's) are stepped as ever.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                    state |= {"lower": torch.zeros_like(p, dtype=torch.int16)} if p.dtype == torch.bfloat16 else {}
                w = ((p.view(torch.int16).int() << 16) + state["lower"]).view(torch.float32) if "lower" in state else p
                adamw([w], [p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True, amsgrad=False, maximize=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])
                if "lower" in state:
                    bits = w.view(torch.int32)
                    upper = (bits + 2**15) >> 16                            # to the nearest: the lower half is from -2^15 to 2^15 - 1
                    state["lower"].copy_(bits - (upper << 16))
                    p.copy_(upper.to(torch.int16).view(torch.bfloat16))


def lr_of(part, cfg):
    return {"connector": cfg.lr_connector, "vision": cfg.lr_vision}.get(part) or cfg.lr


def make_optimizer(vlm, cfg):
    """AdamW; each part with its learning rate as a share of --lr, weight decay on matrices only."""
    groups = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, part_of(name)), []).append(p)
    groups = [{"params": ps, "weight_decay": 0.0 if vector else cfg.weight_decay, "share": lr_of(part, cfg) / cfg.lr}
              for (vector, part), ps in sorted(groups.items(), key=lambda kv: kv[0])]
    if cfg.weights == "bfloat16":
        return SplitAdamW(groups, lr=cfg.lr)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=True)


def n_step(cfg, records):
    return cfg.max_steps or math.ceil(len(records) * cfg.epochs / cfg.batch_size)


def batches(runs, size, steps, seed):
    """Index lists, one a step: each epoch a fresh permutation of all indices, cut without regard to where an epoch ends. `runs`: how many
    neighbours each time stay together, as the questions of one record do; they add up to the number of indices."""
    draw, queue, length = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64), torch.as_tensor(runs)
    first = length.cumsum(0) - length                                       # index of each run
    for _ in range(steps):
        while len(queue) < size:
            order = torch.randperm(len(length), generator=draw)
            n = length[order]
            queue = torch.cat([queue, torch.arange(int(n.sum())) + (first[order] - (n.cumsum(0) - n)).repeat_interleave(n)])
        yield queue[:size].tolist()
        queue = queue[size:]


def share(batch, records, n_token):
    """What this process takes of a step's records. Dealt out longest first, each to whoever has least so far; length as in the file, 4 bytes a token."""
    if world() == 1:
        return batch
    hands, load, tokens = [[] for _ in range(world())], [0] * world(), {i: records.n_bytes(i) / 4 + n_token * records.has_picture(i) for i in batch}
    for i in sorted(batch, key=lambda i: -tokens[i]):
        least = load.index(min(load))
        hands[least].append(i)
        load[least] += tokens[i]
    return hands[rank()]


def micro_batches(rows, size, pad, budget=0, collate=collate):
    """The examples of a step -> batches of at most `size` of them (0: one batch), done in the loader process.

    With a budget, instead: sorted by length and cut where that pads least, no batch having more tokens than that, its padding counted. Lengths are
    rounded up to multiples of 32, so that few shapes occur. Which records share a batch changes nothing in the gradient but the order of its sum.
    """
    if not budget:
        size = size or max(len(rows), 1)
        return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]
    rows = sorted(rows, key=lambda row: len(row.get("tokens", ())))
    up, made = [max(32, -(-len(row.get("tokens", ())) // 32) * 32) for row in rows], []
    best, cut = [0.0], [0]                                                  # of the first e rows: the least cost, and where the last batch begins
    for e in range(1, len(rows) + 1):
        fits = [s for s in range(e) if up[e - 1] * (e - s) <= budget] or [e - 1]
        cost, start = min((best[s] + up[e - 1] * (e - s) + 256, s) for s in fits)           # a batch of its own costs like 256 tokens
        best.append(cost)
        cut.append(start)
    e = len(rows)
    while e:                                                                # longest first: if memory is short, it is at once
        batch = collate(rows[cut[e] : e], pad)
        extra = up[e - 1] - batch["tokens"].shape[1]
        made.append(batch | {"tokens": F.pad(batch["tokens"], (0, extra), value=pad), "labels": F.pad(batch["labels"], (0, extra), value=IGNORE)})
        e = cut[e]
    return made


class Cached(Dataset):
    """Examples whose pictures are already features: `pixels` is (n, N, D_vision). Tokens and labels lie beside them."""

    def __init__(self, folder, index, shape, dtype):
        self.index, self.shape, self.dtype = index, shape, dtype           # index: (records, 3) where tokens and features begin, how many tokens
        self.words = np.memmap(folder / "words.bin", np.int32, "r").reshape(-1, 4)         # token, label; of a visual token its layout, else -2
        self.features = np.memmap(folder / "features.bin", np.int16 if dtype == torch.bfloat16 else np.float32, "r") if index[-1, 1] else None

    def __len__(self):
        return len(self.index) - 1

    def __getitem__(self, i):
        (at, row, n), (_, end, _) = self.index[i], self.index[i + 1]
        words, size = torch.from_numpy(self.words[at : at + n].astype(np.int64)), math.prod(self.shape)
        features = torch.from_numpy(self.features[row * size : end * size].copy()).view(self.dtype) if end > row else torch.empty(0, dtype=self.dtype)
        return {"tokens": words[:, 0], "labels": words[:, 1], "layout": words[words[:, 2] > -2, 2:], "pixels": features.view(-1, *self.shape), "id": str(i), "index": i}


@torch.no_grad()
def cache_features(examples, vlm, cfg, device, out, half):
    """Run every record's pictures through the frozen towers, once; -> a Cached over what was written, in --out/features."""
    if any(p.requires_grad for name, p in vlm.named_parameters() if part_of(name) == "vision") or world() > 1 or cfg.bad_records != "stop":
        raise UserError("--cache-features: for frozen towers, one process, and --bad-records stop; leave it out")
    folder, shape, dtype = out / "features", (vlm.cfg.vision.n_token, vlm.cfg.n_feature), torch.bfloat16 if half or cfg.weights == "bfloat16" else torch.float32
    size, most = math.prod(shape) * (2 if dtype == torch.bfloat16 else 4), "at least" if find_tiling(vlm.cfg.vision, vlm.cfg.image_mode) else "about"
    about = size * sum(examples.records.has_picture(i) for i in range(len(examples))) / 1e9
    print(f"features: {most} {about:.2f} GB for {len(examples):,} records, {size / 1e6:.2f} MB a tile; --cache-features allows {cfg.cache_features:g} GB")
    if about > cfg.cache_features or about > shutil.disk_usage(out).free / 1e9:
        raise UserError(f"--cache-features {cfg.cache_features:g}: {about:.2f} GB are needed and {shutil.disk_usage(out).free / 1e9:.2f} GB free in {out}; "
                        "raise it, or leave it out")
    key = {"towers": [n for name, n in fingerprints(vlm).items() if part_of(name) == "vision"], "data": [cfg.data, os.path.getsize(cfg.data.split(",")[0])],
           "weights": cfg.data_weights, "fraction": cfg.data_fraction, "seed": cfg.seed, "mode": [vlm.cfg.image_mode, str(vlm.cfg.vision.tiling)], "template": examples.template, "dtype": str(dtype)}
    if (folder / "index.pt").exists():
        kept = torch.load(folder / "index.pt", weights_only=True)
        if kept["key"] == key:
            return Cached(folder, kept["index"].numpy(), shape, dtype)
    folder.mkdir(exist_ok=True)
    index, loader = [[0, 0, 0]], DataLoader(examples, batch_size=None, num_workers=cfg.workers)
    with open(folder / "words.bin", "wb") as words, open(folder / "features.bin", "wb") as features:
        for e in tqdm(loader, desc="features", disable=None):
            if len(e["pixels"]):
                found = vlm.features(e["pixels"].to(device)).to(dtype).cpu().contiguous()
                if features.tell() + found.numel() * found.element_size() > cfg.cache_features * 1e9:
                    raise UserError(f"--cache-features {cfg.cache_features:g}: that many GB are full after {len(index) - 1:,} of {len(examples):,} records")
                features.write(found.view(torch.int16 if dtype == torch.bfloat16 else torch.float32).numpy().tobytes())
            rows = torch.stack([e["tokens"], e["labels"], torch.full_like(e["tokens"], -2), torch.full_like(e["tokens"], -2)], dim=1)      # (T, 4)
            rows[e["tokens"] == vlm.cfg.image_token, 2:] = e["layout"]
            words.write(rows.to(torch.int32).numpy().tobytes())
            index[-1][2] = len(e["tokens"])
            index.append([index[-1][0] + len(e["tokens"]), index[-1][1] + len(e["pixels"]), 0])
    index = torch.tensor(index)
    write_whole(folder / "index.pt", lambda path: torch.save({"key": key, "index": index}, path))
    return Cached(folder, index.numpy(), shape, dtype)


def lr_at(step, steps, cfg):
    """Linear warmup to --lr, then half a cosine, which would reach 0 one step after the last. `step` counts from 1."""
    warmup = max(1, int(cfg.warmup * steps))
    if step <= warmup:
        return cfg.lr * step / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def backward(net, micro, device, autocast=contextlib.nullcontext()):
    """Add the gradient of L over all micro-batches of a step, those of all processes; -> L (None if nothing could be used), number of supervised tokens.

    The processes' gradients are averaged, so each part is multiplied by their number; and all take part in as many micro-batches as the one
    that has most, with an empty one at weight 0.
    """
    used = [(m, n_supervised(m)) for m in micro if n_supervised(m)]         # of the others all records were skipped
    counts = gather([sum(n for _, n in used), len(used), sum(len(m["pixels"]) for m, _ in used)])
    total, most = int(counts[:, 0].sum()), int(counts[:, 1].max())
    used += [(empty_batch(), 0)] * (most - len(used)) if world() > 1 else []
    loss = torch.zeros((), device=device)
    for i, (m, n) in enumerate(used):
        with contextlib.nullcontext() if i + 1 == len(used) or not isinstance(net, DistributedDataParallel) else net.no_sync():
            with autocast:
                part = loss_of(net, m, device) * (n / total * world())      # the model's mean, back to a share of the step's
            if part.requires_grad:                                          # texts alone teach a connector nothing
                part.backward()
        loss += part.detach() / world()
    if world() > 1 and not counts[:, 2].any():                              # no picture anywhere: what one process would leave alone has here
        for name, p in (net.module if isinstance(net, DistributedDataParallel) else net).named_parameters():    # a gradient of 0, and AdamW
            p.grad = None if part_of(name) in ("vision", "connector") else p.grad                                # would move it by its momentum
    return gather([loss.item()]).sum().item() if total else None, total


def n_supervised(batch):
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def loss_of(net, batch, device):
    return net(*(batch[k].to(device, non_blocking=True) for k in ("tokens", "pixels", "labels", "layout")))


def empty_batch():
    """A text of two tokens, for a process that has nothing left to do in a step."""
    return {"tokens": torch.ones(1, 2, dtype=torch.int64), "labels": torch.ones(1, 2, dtype=torch.int64), "pixels": torch.empty(0, 3, 0, 0, dtype=torch.uint8),
            "layout": torch.empty(0, 2, dtype=torch.int64)}


def dry_run(cfg, records, device, n=200):
    """Print what the run would be, from configs and a look at n records; no weight is read."""
    if cfg.model in PRESETS:
        plan, tok, _ = blueprint(cfg)
    else:
        plan, tok = read_model(cfg.model, cfg.vision or None, cfg.llm or None)[0], Tokenizer(tokenizer_home(cfg.model, cfg.llm))
    with torch.device("meta"):
        vlm = VLM(plan)
        set_mode(vlm, cfg)
        freeze(vlm, cfg)
    mode = vlm.cfg.image_mode
    v, d, half = vlm.cfg.vision, plan.decoder, cfg.weights == "bfloat16" or is_half(cfg, device)
    template, lengths, supervised, pictures, tiles, bad = cfg.template or ("plain" if cfg.stage == "pretrain" else plan.template), [], 0, 0, 0, 0
    for i in range(0, len(records), -(-len(records) // n)):
        try:
            record = records[i]
            cut = [cut_tiles(open_image(records.image_path(name)), v, mode) if mode in TILINGS else (range(1), range(v.n_token)) for name in record["images"]]
            tokens, labels = encode_conversation(tok, record["turns"], template, [len(layout) for _, layout in cut])
        except UserError:
            bad += 1
            continue
        lengths.append(len(tokens))
        supervised, pictures, tiles = supervised + sum(label != IGNORE for label in labels), pictures + len(cut), tiles + sum(len(some) for some, _ in cut)
    if not lengths:
        raise UserError(f"{cfg.data}: not one of {bad} records looked at could be used; see python data.py check")
    print(f"model      {cfg.model}, decoder of {d.n_layer} blocks {d.n_embd} wide, {v.n_token} visual tokens for a tile of {v.image_size} px, template {template}")
    parts = {}
    for name, p in vlm.named_parameters():
        row = parts.setdefault(part_of(name), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + p.numel(), row[1] + p.numel() * p.requires_grad, row[2] + p.numel() * p.element_size()
    for part, (total, trained, _) in parts.items():
        print(f"  {part:9} {total / 1e6:11,.2f}M parameters, " + (f"{trained / 1e6:,.2f}M train at {lr_of(part, cfg):g}"
              + (f" (LoRA of rank {cfg.lora_r})" if cfg.lora_r and part == "llm" else "") if trained else "frozen"))
    mean, steps = sum(lengths) / len(lengths), n_step(cfg, records)
    print(f"data       {len(records):,} records; in {len(lengths)} of them {mean:.0f} tokens each ({min(lengths)} to {max(lengths)}), {pictures / len(lengths):.2f} pictures in {tiles / len(lengths):.2f} tiles, "
          f"{supervised / sum(lengths):.0%} supervised" + (f"; {bad} could not be used" if bad else ""))
    print(f"steps      {steps:,} of {cfg.batch_size} records, {steps * cfg.batch_size * mean / 1e6:,.1f}M tokens")
    # Memory: what is sure, and activations as one float for each of these: about 10 rows as wide as the model and 4 as wide as its MLP a block
    trained, weights = sum(row[1] for row in parts.values()), sum(row[2] for row in parts.values())
    held = cfg.token_budget or (cfg.micro_batch_size or cfg.batch_size) * mean
    per_token = (10 * d.n_embd + 4 * d.n_hidden) * (2 if half else 4)
    split = cfg.weights == "bfloat16"
    memory = {"weights": weights, "their bfloat16 copies": 2 * sum(row[0] for row in parts.values()) if half and not split else 0,
              "gradients": trained * (2 if split and not cfg.token_budget and not cfg.micro_batch_size else 4), "optimizer": trained * (10 if split else 8),
              "activations, about": held * (per_token * max(0, d.n_layer - cfg.recompute) + min(cfg.recompute, d.n_layer) * d.n_embd * (2 if half else 4))}
    n_share = int(os.environ.get("WORLD_SIZE", 1)) if cfg.shard else 1
    memory = {name: size / (1 if name.startswith("activations") else n_share) for name, size in memory.items()}
    print("memory     " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items()) + f": {sum(memory.values()) / 1e9:.1f} GB"
          + (f" in each of {n_share} processes" if n_share > 1 else ""))
    # Time: forward 2 FLOPs for each weight and token, as much again for the inputs' gradients, and for the weights' where they train
    blocks, train_llm = sum(p.numel() for p in vlm.decoder.layers.parameters()), any(p.requires_grad for p in vlm.decoder.parameters()) and not cfg.lora_r
    head = plan.decoder.vocab_size * d.n_embd * supervised / sum(lengths)
    tower = sum(p.numel() for name, p in vlm.named_parameters() if part_of(name) == "vision") * (3 if parts["vision"][1] else 1)
    again = 2 * blocks * min(cfg.recompute / d.n_layer, 1)
    per_record = mean * ((6 if train_llm else 4) * (blocks + head) + again) + 2 * tower * tiles / len(lengths) * v.grid**2
    flops, speed = per_record * steps * cfg.batch_size, matmul_rate(device, torch.bfloat16 if half else torch.float32)
    print(f"time       {flops:.3g} FLOPs; at half of the {speed / 1e12:.2f} TFLOP/s that a matrix product reaches here: "
          f"{flops / speed / 0.5 / 3600 / int(os.environ.get('WORLD_SIZE', 1)):,.1f} hours")
    model = trained * 4 if cfg.lora_r else weights
    print(f"disk       {model / 1e9:.2f} GB the model, {(model + memory['optimizer'] * n_share) / 1e9:.2f} GB a checkpoint, of which there are two for a moment")
    return 0


def matmul_rate(device, dtype, n=1024, clock=time.perf_counter):
    """FLOP/s of a square matrix product, the best of a few."""
    n, best = n if device.type == "cpu" else 8 * n, math.inf
    x = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(5):
        began = clock()
        y = x @ x
        y[0, 0].item()                                                      # waits for a GPU
        best = min(best, clock() - began)
    return 2 * n**3 / best


# ---- several processes -------------------------------------------------------------------------------------------------
# torchrun starts the same program on every GPU. Each takes its share of every step's records; process 0 prints, logs and saves.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    if world() > 1:
        dist.barrier()


def meet(cfg):
    """Meet the other processes, if torchrun started any; -> this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(cfg.device)
    if cfg.shard and cfg.weights == "bfloat16":
        raise UserError("--shard --weights bfloat16: shares are kept in float32 and worked with in bfloat16 as it is; leave out --weights")
    device = pick_device(cfg.device if cfg.device == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def gather(numbers):
    """A few numbers of each process -> (processes, numbers), the same everywhere."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(world())]
    if world() == 1:
        return mine[None]
    dist.all_gather(rows, mine)
    return torch.stack(rows)


def spread(vlm, cfg, device, half):
    """-> the model as it is called in training: compiled where asked for, and one with its copies or shares in the other processes."""
    towers = [vlm.vision, *([vlm.vision2] if vlm.cfg.vision2 else [])]
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)                         # builds a plan for each new shape, up to a second; flash does not
    if cfg.compile:
        for block in vlm.decoder.layers:
            block.compile(dynamic=True)                                     # one graph for all lengths
        for block in (block for tower in towers for block in tower.blocks):
            block.compile(dynamic=True)
    if world() == 1:
        return vlm
    vlm.always_look = True
    if not cfg.shard:
        return DistributedDataParallel(vlm, broadcast_buffers=False)
    mesh, policy = init_device_mesh(device.type, (world(),)), MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)
    for block in [*(block for tower in towers for block in tower.blocks), *vlm.decoder.layers]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(vlm, mesh=mesh, mp_policy=policy)                           # the rest: tables, head, norms, connector
    register_fsdp_forward_method(vlm, "generate")
    return vlm


def whole(t):
    """A tensor of which each process may hold a share -> all of it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def mine(t):
    """The share of it that is here."""
    return t.to_local() if isinstance(t, DTensor) else t


# ---- tripwires ---------------------------------------------------------------------------------------------------------


def say_coverage(micro):
    """What the first step learns from: a template that supervises nothing, or everything, is seen here and not after a day."""
    n, all_tokens, rows = sum(map(n_supervised, micro)), sum(int(m["lengths"].sum()) for m in micro), sum(len(m["lengths"]) for m in micro)
    if rows:
        print(f"first step: {n:,} of {all_tokens:,} tokens are supervised ({n / all_tokens:.0%}), {n / rows:.0f} in each of {rows} records")


def blame(net, micro, device, autocast):
    """Ids of the records whose loss is no number; of all, if each has one (it is the gradient then)."""
    found, everyone = [], [i for m in micro for i in m["ids"]]
    if world() > 1:                                                         # a look at single records would have to be taken together
        return f"{few(everyone)}, or of another process"
    with torch.no_grad(), autocast:
        for m in (m for m in micro if n_supervised(m)):
            for row, name in enumerate(m["ids"]):
                alone = torch.full_like(m["labels"], IGNORE)
                alone[row] = m["labels"][row]
                if (alone[:, 1:] != IGNORE).any() and not loss_of(net, m | {"labels": alone}, device).isfinite():
                    found.append(name)
    return few(found or everyone)


def few(ids, n=8):
    return ", ".join(ids[:n]) + (f" and {len(ids) - n} more" if len(ids) > n else "")


def fingerprints(vlm):
    """{name: [sum of its bits read as integers, its norm]}: any moved weight shows; in the sum alone ups and downs of 128 gains may cancel."""
    bits = lambda t: t.view(torch.int16 if t.element_size() == 2 else torch.int32).sum(dtype=torch.int64)
    norm = lambda t: torch.linalg.vector_norm(t, dtype=torch.float64).view(torch.int64)
    names, marks = zip(*((name, torch.stack([bits(w), norm(w)])) for name, p in vlm.named_parameters() for w in [mine(p).detach()]))
    return dict(zip(names, torch.stack(marks).tolist()))


def check_moved(vlm, before, optimizer, step):
    """After the first step: what is frozen has not moved, and what trains has."""
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    after = fingerprints(vlm)
    for name, p in vlm.named_parameters():
        if not p.requires_grad and before[name] != after[name]:
            raise UserError(f"step {step} has changed {name}, which is frozen; nothing that follows could be trusted")
        if p.requires_grad and p.grad is not None and before[name] == after[name] and step == 1:
            w, g = mine(p), mine(p.grad)
            lower = optimizer.state[p].get("lower")
            # AdamW's first step is about lr, whatever the gradient: weights of less than lr * 2^20 cannot have stood still in float32
            if ((g.abs() > 1e-6) & (w.abs() < rate[p] * 2**20)).any() and not (lower is not None and lower.any()):
                raise UserError(f"step {step} has not changed {name}, which should train; raise --lr ({rate[p]:.1e} in this step)")


@contextlib.contextmanager
def catch_ctrl_c():
    """Yields a list that is empty until the first Ctrl-C, which lets the step end and saves; the second ends the program at once."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nCtrl-C: ending this step, then saving; once more to stop at once\n")     # print is not safe in a handler

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- held-out questions ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_written(vlm, cfg):
    """Inside, the model neither trains nor is compiled: to look and to answer would take five more graphs, as long to make as those of training."""
    vlm.eval()
    with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():
        yield
    vlm.train()


def read_held_out(cfg, vlm, tok, n=128, size=32):
    """-> all questions [{"id", "paths", "text", "answer", "category"}]; and up to n of them, evenly spread, in batches for the loss.

    What is wrong with them is said here, before the training and not after it.
    """
    records, questions = Records(cfg.val, cfg.image_root), []
    for i in range(len(records)):
        r = records[i]
        try:
            if len(r["turns"]) < 2:
                raise UserError('no answer; a held-out question needs "text" and "answer"')
            encode_conversation(tok, r["turns"][:2], vlm.cfg.template, [1] * len(r["images"]))
            paths = [records.image_path(name) for name in r["images"]]
            if missing := [path for path in paths if not path.exists()]:
                raise UserError(f"{missing[0]}: no such picture; check the path and --image-root")
        except UserError as error:
            raise UserError(f"{records.where(i, r['id'])}: {error}") from None
        (_, text), (_, truth) = r["turns"][:2]
        questions.append({"id": r["id"], "paths": paths, "text": text, "answer": truth, "category": str(r.get("category", "all"))})
    examples = Examples(records, tok, vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode, vlm.cfg.decoder.block_size, "stop")
    some = [examples[i] for i in range(0, len(records), math.ceil(len(records) / n))]
    return questions, micro_batches(some, size, tok.pad)


@torch.no_grad()
def held_out_loss(vlm, looks, device, shuffled=False):
    """Mean loss per supervised token; `shuffled`: each question about a picture half a batch away."""
    if shuffled:
        looks = [batch | {"pixels": batch["pixels"].roll(len(batch["pixels"]) // 2, 0)} for batch in looks]
    return sum(loss_of(vlm, batch, device).item() * n_supervised(batch) for batch in looks) / sum(map(n_supervised, looks))


def answer(vlm, tok, questions, max_new_tokens=96, size=48):
    """Greedy answers to [([picture file, ...], text), ...] -> [(answer, whole), ...]; `whole` is False where the tokens ran out."""
    answers, by_length = [None] * len(questions), sorted(range(len(questions)), key=lambda i: len(questions[i][1]))
    for start in range(0, len(questions), size):
        some, prompts = by_length[start : start + size], []
        for paths, text in (questions[i] for i in some):
            pictures = [cut_tiles(open_image(p), vlm.cfg.vision, vlm.cfg.image_mode) for p in paths]
            text = text if "<image>" in text or not paths else "<image>" * len(paths) + "\n" + text
            prompts.append((encode_prompt(tok, [("human", text)], vlm.cfg.template, [len(layout) for _, layout in pictures]), pictures))
        for i, (ids, ended, _) in zip(some, complete(vlm, tok, prompts, max_new_tokens)):
            answers[i] = text_of(tok, vlm.cfg.template, ids, ended)
    return answers


def complete(vlm, tok, prompts, max_new_tokens, **choices):
    """A batch [(prompt ids, [(tiles, layout), ...]), ...] -> [(new ids without the stop, whether it came, tokens generated), ...]

    `choices`: what VLM.generate takes, such as temperature and seed; without them greedy.
    """
    stop, device, longest = stop_ids(tok, vlm.cfg.template), vlm.decoder.lm_head.weight.device, max(len(ids) for ids, _ in prompts)
    pictures, room = [picture for _, pictures in prompts for picture in pictures], min(max_new_tokens, vlm.cfg.decoder.block_size - longest)
    if room < 1:
        raise UserError(f"a question of {longest} tokens leaves no room for an answer in {vlm.cfg.decoder.block_size}; shorten it")
    tokens = torch.tensor([ids + [tok.pad] * (longest - len(ids)) for ids, _ in prompts], device=device)
    pixels, layout = (x.to(device) for x in join(pictures)) if pictures else (None, None)
    new = vlm.generate(tokens, pixels, room, lengths=[len(ids) for ids, _ in prompts], stop=stop, layout=layout, **choices).tolist()
    ends = [next((k for k, t in enumerate(ids) if t in stop), None) for ids in new]
    return [(ids[:end], end is not None, len(ids) if end is None else end + 1) for ids, end in zip(new, ends)]


def text_of(tok, template, ids, ended):
    """-> text, whether it is whole. Some templates end an answer by a string and not by a token."""
    text = tok.decode(ids)
    said = cut_at_stop(text, template)
    return said.strip(), ended or said != text


def sample_answers(vlm, tok, questions, step, n=3):
    """A few held-out questions, other ones at each look, with the model's answer and the truth."""
    chosen = [questions[(step * 7 + i * len(questions) // n) % len(questions)] for i in range(n)]
    said = answer(vlm, tok, [(q["paths"], q["text"]) for q in chosen])
    lines = [q["text"].replace("<image>", "").strip().split("\n") for q in chosen]
    asked = [next((line for line in some if "?" in line), some[0]) for some in lines]            # the question, without its format prompt
    return "\n".join(f"  Q: {text}\n  A: {a!r}   truth: {q['answer']!r}" for q, text, (a, _) in zip(chosen, asked, said))


def examine(vlm, tok, questions, out):
    """Answer every held-out question, print accuracy by category beside two baselines, and write results.json."""
    began = time.time()
    names = list(dict.fromkeys(path for q in questions for path in q["paths"]))
    other = {name: names[(i + len(names) // 2) % len(names)] for i, name in enumerate(names)}      # each question meets another picture
    said = answer(vlm, tok, [(q["paths"], q["text"]) for q in questions])
    blind = answer(vlm, tok, [([other[p] for p in q["paths"]], q["text"]) for q in questions])
    commonest = {}                                                          # by category, of what is compared: of a worked answer its end
    for c in {q["category"] for q in questions}:
        truths = [q["answer"] for q in questions if q["category"] == c]
        top = Counter(map(final, truths)).most_common(1)[0][0]
        commonest[c] = next(t for t in truths if final(t) == top)
    right = [{"accuracy": is_right(a, q["answer"]), "most_frequent": is_right(commonest[q["category"]], q["answer"]), "shuffled": is_right(b, q["answer"])}
             for q, (a, _), (b, _) in zip(questions, said, blind)]
    table = {}
    for category in [*dict.fromkeys(q["category"] for q in questions), "all"]:
        rows = [r for q, r in zip(questions, right) if category in (q["category"], "all")]
        table[category] = {"n": len(rows)} | {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    print(f"\nheld-out accuracy, {len(questions)} questions in {time.time() - began:.0f} s"
          f"\n{'':14s}{'n':>6s}{'accuracy':>10s}{'most frequent answer':>22s}{'shuffled pictures':>19s}")
    for name, row in table.items():
        print(f"{name:14s}{row['n']:6d}{row['accuracy']:10.1%}{row['most_frequent']:22.1%}{row['shuffled']:19.1%}")
    n_cut = sum(not whole for _, whole in said)
    print(f"{n_cut} of {len(said)} answers were cut off for being too long")
    answers = [{"question_id": q["id"], "category": q["category"], "prompt": q["text"], "text": a, "truth": q["answer"], "right": r["accuracy"], "cut_off": not whole}
               for q, (a, whole), r in zip(questions, said, right)]
    if rank() == 0:
        write_whole(out / "results.json", lambda tmp: tmp.write_text(json.dumps({"table": table, "cut_off": n_cut, "records": answers}, indent=1)))


def is_right(said, truth):
    """Exact match but for case and a final dot; of a worked answer what follows `Final answer:`; of a box, IoU >= 0.5 (RefCOCO)."""
    box = re.compile(r"\[(\d\.\d+), (\d\.\d+), (\d\.\d+), (\d\.\d+)\]")
    if box.fullmatch(truth):
        found = box.search(said)
        return bool(found) and iou(*([float(x) for x in m.groups()] for m in (found, box.fullmatch(truth)))) >= 0.5
    return ("Final answer:" in said) == ("Final answer:" in truth) and final(said) == final(truth)


def final(text):
    return text.rsplit("Final answer:", 1)[-1].strip().rstrip(".").lower()


def iou(a, b):
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    area = lambda x1, y1, x2, y2: max(0.0, x2 - x1) * max(0.0, y2 - y1)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / max(area(*a) + area(*b) - both, 1e-9)


# ---- what a run leaves on disk -----------------------------------------------------------------------------------------


def save_model(directory, vlm, tok, state=None):
    """A self-contained model directory; config.json comes last, so a directory that has one is whole. Of a LoRA, its adapter."""
    state = what_to_save(vlm) if state is None else state
    if rank() == 0:
        save_processor(directory, tok.path, vlm.cfg)
        save_adapter(vlm, directory, vlm.lora["base"], state) if vlm.lora else vlm.save_pretrained(directory, state)


def what_to_save(vlm):
    """{our name: tensor}: all weights, or what trains if that is a LoRA. Of shares process 0 gets the whole, one tensor after the other."""
    state = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad or not vlm.lora:
            full = whole(p.detach())                                        # all processes take part
            if rank() == 0:
                state[name] = full.cpu() if isinstance(p, DTensor) else full
    return state


def save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson=None):
    """out/checkpoint-N, built under a hidden name, read again, and renamed when it is on the disk; only then does the older one go, hidden
    first: whatever is called checkpoint-N is whole, at any moment. Sharded, each process writes the moments that it has."""
    final = out / f"checkpoint-{step:06d}"
    hidden = out / f".{final.name}.tmp"
    try:
        tensors = what_to_save(vlm)
        save_model(hidden, vlm, tok, tensors)
        wait()                                                              # process 0 has made the folder
        names = {p: name for name, p in vlm.named_parameters()}
        moments = {names[p]: {key: mine(t) for key, t in state.items()} for p, state in optimizer.state.items()}
        state = {"step": step, "config": asdict(cfg), "skipped": skipped, "lesson": lesson or {}}
        files = {hidden / "trainer.pt": state | ({} if cfg.shard and world() > 1 else {"optimizer": moments})} if rank() == 0 else {}
        if cfg.shard and world() > 1:
            files[hidden / f"optimizer-{rank()}-of-{world()}.pt"] = moments
        for file, content in files.items():
            write_whole(file, lambda path: torch.save(content, path))
            if not equal(torch.load(file, weights_only=True, map_location="cpu", mmap=True), content):
                raise UserError(f"{file} reads otherwise than it was written; check the disk")
        public = public_layout(vlm)[0]
        again = open_weights(hidden / f"{'adapter_' if vlm.lora else ''}model.safetensors") if rank() == 0 else {}
        for name, t in tensors.items():
            if not torch.equal(again[adapter_name(name, public) if vlm.lora else public(name)], t.cpu()):
                raise UserError(f"{hidden}: {name} reads otherwise than it was written; check the disk")
        wait()
        if rank() == 0:
            os.replace(hidden, final)
            for old in checkpoints(out)[:-1]:
                os.replace(old, hidden)
                shutil.rmtree(hidden)
    except (UserError, OSError) as error:
        raise UserError(f"the checkpoint of step {step} could not be saved: {error}; --resume goes on from the one before it") from None
    finally:
        if rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
    wait()


def equal(a, b):
    """Whether two dicts of dicts hold the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b.cpu()) if isinstance(a, torch.Tensor) else a == b


def restore(vlm, optimizer, checkpoint, state):
    """The optimizer's moments from one trainer.pt or from the shares of however many processes: they are rows, in the order of the processes."""
    shares = [state["optimizer"]] if "optimizer" in state else []
    if not shares:
        files = sorted(checkpoint.glob("optimizer-*-of-*.pt"), key=lambda f: int(f.name.split("-")[1]))
        if not files or len(files) != int(files[0].stem.split("-")[-1]):
            raise UserError(f"{checkpoint}: has {len(files)} of its optimizer-*.pt; copy all of them")
        shares = [torch.load(f, weights_only=True, map_location="cpu", mmap=True) for f in files]
    for name, p in vlm.named_parameters():
        if not p.requires_grad or name not in shares[0]:
            continue
        for key, t in shares[0][name].items():
            if t.ndim == p.ndim and t.ndim:
                t = torch.cat([s[name][key] for s in shares]) if len(shares) > 1 else t
                if isinstance(p, DTensor):
                    n, r = p.device_mesh.size(), rank()
                    rows = -(-len(t) // n)                                  # FSDP2 cuts as torch.chunk does
                    t = DTensor.from_local(t[r * rows : (r + 1) * rows].to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            optimizer.state[p][key] = t.to(p.device, copy=True) if key != "step" or p.is_cuda else t.clone()


def checkpoints(out):
    return sorted((p for p in out.glob("checkpoint-[0-9]*") if p.is_dir()), key=lambda p: int(p.name.removeprefix("checkpoint-")))


def find_checkpoint(out, cfg):
    """For --resume: the newest checkpoint and its training state. Refuses flags that would make it another run."""
    if not checkpoints(out):
        if not (out / "log.jsonl").exists():
            raise UserError(f"--resume: there is no run in {out}; check --out, or leave out --resume")
        print(f"--resume: no checkpoint in {out} yet; starting from the beginning")
        return None, {"step": 0, "skipped": 0}
    newest = checkpoints(out)[-1]
    try:
        state = torch.load(newest / "trainer.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{newest}/trainer.pt: damaged ({str(error).splitlines()[0]}); remove {newest} and start anew") from None
    for name, now in asdict(cfg).items():
        if name not in FREE_TO_CHANGE and state["config"].get(name) != now:
            raise UserError(f"--resume: {newest} was trained with --{name.replace('_', '-')} {state['config'].get(name)!r}, now it is {now!r}; "
                            "give the same flags, or start a new run in another --out")
    print(f"resuming after step {state['step']}")
    return newest, state


def newest_run(root="out"):
    """The model directory under out/ that was finished last: config.json is the last file a run writes."""
    newest = lambda pattern: max(Path(root).glob(pattern), key=lambda p: p.stat().st_mtime, default=None)
    if found := newest("*/config.json"):
        return found.parent
    half = newest("*/checkpoint-*/config.json")
    raise UserError(f"no finished run under {root}/; train one (python train.py --stage finetune) or give --model DIR"
                    + (f". From an unfinished one there is --model {half.parent}" if half else ""))


def rewind(out, step):
    """Bring the folder back to where the checkpoint was taken: drop later log lines, a torn last one, and what a kill left half-written."""
    log = out / "log.jsonl"
    log.touch()
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(log, lambda tmp: tmp.write_text("".join(lines)))
    for left in out.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def move_aside(out, cfg):
    """A new run never overwrites an old one: out/finetune becomes out/finetune.1, .2, ..."""
    if any(out.glob("checkpoint-*")) or any((out / name).exists() for name in ("log.jsonl", "config.json", "tokenizer.model")):
        for name in ("model", "data", "image_root", "val", "vision", "llm", "tokenizer", "projector"):
            if (asdict(cfg)[name] and Path(asdict(cfg)[name]).resolve().is_relative_to(out.resolve())):
                raise UserError(f"--{name.replace('_', '-')} {asdict(cfg)[name]} is in --out {out}, which would be moved aside; give another --out")
        free = next(f for f in (out.with_name(f"{out.name}.{i}") for i in range(1, 10**6)) if not f.exists())
        out.rename(free)
        print(f"{out} held an earlier run; it is now {free}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror}); choose another") from None


def draw_curve(path, log, width=800, height=460):
    """loss.png: the loss of each step, the mean of the steps around it, and the held-out loss as dots, on a logarithmic axis."""
    lines = [json.loads(line) for line in open(log)]
    train, val = ([(r["step"], max(r[key], 1e-4)) for r in lines if r.get(key) is not None] for key in ("loss", "val_loss"))
    if not train:
        return
    losses, w = [loss for _, loss in train], len(train) // 50 + 1
    mean = [sum(near) / len(near) for near in (losses[max(0, i - w) : i + w + 1] for i in range(len(losses)))]
    left, right, top, bottom = 64, width - 24, 44, height - 52              # the frame, in pixels
    values, last = [v for _, v in train + val], max(train[-1][0], 2)
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    x = lambda step: left + (right - left) * (step - 1) / (last - 1)
    y = lambda loss: top + (bottom - top) * (high - math.log(loss)) / (high - low)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    write = lambda at, text, anchor, fill="#555555": draw.text(at, text, fill=fill, anchor=anchor, font_size=14)
    for tick in (t for t in (t * 10.0**e for e in range(-4, 4) for t in (1, 1.5, 2, 3, 4, 5, 7)) if low < math.log(t) < high):
        draw.line([(left, y(tick)), (right, y(tick))], fill="#e6e6e6")
        write((left - 8, y(tick)), f"{tick:g}", "rm")
    apart = next(a for a in (t * 10**e for e in range(9) for t in (1, 2, 5)) if last / a <= 8)
    for tick in range(apart, last + 1, apart):
        draw.line([(x(tick), bottom), (x(tick), bottom + 5)], fill="#999999")
        write((x(tick), bottom + 8), f"{tick:,}", "mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#999999")
    draw.line([(x(s), y(v)) for s, v in train], fill="#b9d2ea")
    draw.line([(x(s), y(v)) for (s, _), v in zip(train, mean)], fill="#1f6fb5", width=2)
    for s, v in val:
        draw.ellipse([x(s) - 4, y(v) - 4, x(s) + 4, y(v) + 4], fill="#d6502b")
    write((left, 14), "loss per supervised token", "lt", "#222222")
    write((right, height - 12), "step", "rb")
    write((right, 14), f"step {train[-1][0]:,}: training {mean[-1]:.3f} (mean of the last steps)", "rt", "#1f6fb5")
    if val:
        write((right, 32), f"held-out {val[-1][1]:.3f}", "rt", "#d6502b")
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))


if __name__ == "__main__":
    sys.exit(run(main))
