"""The one training loop: show the model pictures and questions, and teach it the answers (arXiv:2310.03744, sections 3 and 4).

    --stage pretrain    the connector alone learns to caption: it aligns the tower's features with the decoder's words
    --stage finetune    connector and decoder learn to follow instructions about pictures; the tower stays frozen

    L = - sum_t log p(token_t | picture, tokens before t) / n         t over the n supervised tokens of the whole step

The division happens once per step: micro-batches hold unequal numbers of supervised tokens, and the mean of their means would weigh
short answers more. (The original averages the means; so its loss curves differ a little from ours at equal data.)

    python train.py --stage finetune                                  # the toy: draws its world, trains, and is examined
    python train.py --stage finetune --model photo --data FILE.json --image-root DIR --max-steps 3000

Weights, order of the records and all else follow --seed: on a CPU the same command gives the same weights, bit for bit.
A run writes to --out: log.jsonl and loss.png while it goes, checkpoint-N/ now and then (a whole model directory; --resume goes on
from the newest, and ends where the uninterrupted run would have, bit for bit on a CPU), and at the end the model itself, with
results.json when there were held-out questions. Ctrl-C saves a checkpoint first; a second one ends the run at once.
"""

import argparse
import contextlib
import difflib
import functools
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

import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

import toyworld
from data import IGNORE, Examples, Records, Tokenizer, collate, cut_at_stop, encode_conversation, encode_prompt, parse_args, run, stop_ids
from model import (PRESETS, VLM, check_tokenizer, decoder_config, init_weights, load_connector, load_decoder, load_vision, read_json, read_tower,
                   save_processor, write_whole)
from vision import MODES, UserError, cut_tiles, open_image

HERE = Path(__file__).parent


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    stage: str = arg("finetune", "pretrain (connector only, captions) or finetune (connector and decoder, conversations)")
    model: str = arg("toy", f"a preset ({', '.join(PRESETS)}) or a model directory to go on from")
    data: str = arg("", "LLaVA-format JSON or JSONL file; empty: the toy world, drawn into toyworld/ on first use")
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
    template: str = arg("", "conversation template; empty: plain in stage pretrain, the model's own otherwise")
    image_size: int = arg(0, "pixels a side of the tile that a preset's --vision looks at; 0: the tower's own, of two the second one's")
    image_mode: str = arg("", "pad, letterbox, crop or resize; empty: the model's own")
    batch_size: int = arg(16, "records a step")
    micro_batch_size: int = arg(0, "records in memory at once; 0: all of the step's")
    lr: float = arg(1e-3, "peak learning rate, after warmup")
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


# What a preset changes, by (model, stage); a flag on the command line still wins. llava-1.5 has the published values.
TOY = dict(vision=str(HERE / "assets/toy-clip"), llm=str(HERE / "assets/toy-vicuna"))
RECIPES = {
    ("toy", "pretrain"): TOY | dict(lr=2e-3, batch_size=32, max_steps=150),
    ("toy", "finetune"): TOY | dict(lr=1e-3, batch_size=16, max_steps=420),
    ("photo", "finetune"): dict(lr=1e-3, batch_size=32, max_steps=3000, eval_every=500, save_every=500),
    ("llava-1.5-7b", "pretrain"): dict(lr=1e-3, batch_size=256, clip=math.inf, image_mode="crop", max_length=2048),
    ("llava-1.5-7b", "finetune"): dict(lr=2e-5, batch_size=128, clip=math.inf, max_length=2048),
}
RECIPES |= {("llava-1.5-13b", stage): RECIPES["llava-1.5-7b", stage] for stage in ("pretrain", "finetune")}
FREE_TO_CHANGE = {"resume", "out", "workers", "device", "log_every", "final_eval", "eval_limit", "save_every", "eval_every"}   # on --resume


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
            raise UserError(f"the GPU's memory is full ({last}); lower --micro-batch-size, and go on with --resume") from None
        if last.startswith("DataLoader worker"):
            raise UserError(f"{last}: most often memory is short; try --workers 0, and go on with --resume") from None
        if isinstance(error, OSError):                                      # full disk, a file taken away
            raise UserError(f"{last}; what was saved before is untouched: put it right and go on with --resume") from None
        raise


def fit(cfg, lesson=None, open_records=Records):
    """The loop. What it teaches is a lesson: Answers, or the pairs of mpo.py."""
    # Data, model, optimizer.
    print(f"config: {json.dumps({k: v for k, v in asdict(cfg).items() if v not in ('', False)})}", flush=True)
    out, device = Path(cfg.out), pick_device(cfg.device)
    checkpoint, state = find_checkpoint(out, cfg) if cfg.resume else (None, {"step": 0, "skipped": 0})
    torch.manual_seed(cfg.seed)
    records = open_records(cfg.data, cfg.image_root)
    vlm, tok = build(cfg, checkpoint)
    vlm.to(device)
    questions, looks = read_held_out(cfg, vlm, tok) if cfg.val else ([], [])
    first, steps = state["step"], cfg.max_steps or math.ceil(len(records) * cfg.epochs / cfg.batch_size)
    params = freeze(vlm, cfg)
    lesson = (lesson or Answers)(cfg, records, vlm, tok, device, state)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
         {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    if checkpoint:
        optimizer.load_state_dict(state["optimizer"])
        rewind(out, first)
    else:
        move_aside(out, cfg)
    save_processor(out, tok.path, vlm.cfg)
    tok.path = out / "tokenizer.model"                                      # the checkpoint it may have come from will be deleted
    order = list(batches(len(records), cfg.batch_size, steps, cfg.seed))[first:]
    loader = iter(DataLoader(lesson.examples, batch_sampler=order, num_workers=cfg.workers, pin_memory=device.type == "cuda",
                             collate_fn=functools.partial(micro_batches, size=cfg.micro_batch_size, pad=tok.pad, collate=lesson.collate)))
    autocast = precision(cfg, device)
    count = lambda ps: f"{sum(p.numel() for p in ps) / 1e6:.2f}M"
    print(f"{count(params)} of {count(vlm.parameters())} parameters train, on {len(records):,} records, {steps:,} steps of {cfg.batch_size}", flush=True)

    # The loop.
    began, busy, seen, skipped = time.time(), 0.0, 0, state["skipped"]
    with (catch_ctrl_c() as stop, open(out / "log.jsonl", "a", buffering=1) as log,
          tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar):
        for step in range(first + 1, steps + 1):
            start = time.time()
            lr = lr_at(step, steps, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micro = next(loader)
            loss, measured = lesson.backward(micro, autocast)
            norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip).item()
            if not math.isfinite((loss or 0) + norm):
                raise UserError(f"step {step}: the loss is {loss}, the norm of its gradient {norm}; lower --lr, or look at the records "
                                + ", ".join([i for m in micro for i in m["ids"]][:8]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lesson.stepped(step)

            for reason in (reason for m in micro for reason in m["skipped"]):
                skipped += 1
                if skipped <= 5:
                    bar.write(f"skipped: {reason}" + ("; from here on they are only counted" if skipped == 5 else ""))
            seen, busy = seen + sum(int(m["lengths"].sum()) for m in micro), busy + time.time() - start
            left = (time.time() - began) / (step - first) * (steps - step)
            log.write(json.dumps({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **measured, "time": round(time.time() - began, 2)}
                                 | ({"skipped": wrong} if (wrong := [reason for m in micro for reason in m["skipped"]]) else {})) + "\n")
            said, rate = "no usable record" if loss is None else f"loss {loss:.4f}", f"{seen / busy:,.0f} tokens/s"
            said += "".join(f"  {name} {measured[name]:.3f}" for name in lesson.shown if loss is not None)
            bar.set_postfix_str(f"{said}, {rate}")
            bar.update()
            if step % cfg.log_every == 0 or step in (first + 1, steps):
                bar.write(f"step {step:5d}/{steps}  {said}  lr {lr:.2e}  {rate}  {bar.format_interval(left)} left")
            if looks and cfg.eval_every and (step % cfg.eval_every == 0 or step == steps):
                val_loss = held_out_loss(vlm, looks, device)
                log.write(json.dumps({"step": step, "val_loss": val_loss}) + "\n")
                bar.write(f"held-out loss {val_loss:.4f}\n" + sample_answers(vlm, tok, questions, step, device))
            if step % 50 == 0 or step == steps or stop:
                draw_curve(out / "loss.png", out / "log.jsonl")
                lesson.draw(out)
            sys.stdout.flush()
            if stop or step == steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson.state())
            if stop:
                bar.write(f"interrupted: step {step} is saved; go on with the same command and --resume")
                return 130
    shown = steps * cfg.batch_size
    if skipped == shown:
        raise UserError(f"{cfg.data}: not one record could be used; the reasons are above, or: python data.py check {cfg.data} --image-root {cfg.image_root}")
    still = [name for name, p in vlm.named_parameters() if p.requires_grad and p not in optimizer.state]
    print(f"trained {steps - first} steps in {time.time() - began:.0f} s; {skipped} of {shown} records skipped"
          + (f"; {len(still)} trainable tensors never got a gradient, such as {still[0]}" if still else ""))
    save_model(out, vlm, tok)
    if questions and cfg.final_eval:
        every = math.ceil(len(questions) / cfg.eval_limit) if cfg.eval_limit > 0 else 1
        examine(vlm, tok, questions[::every], out, device)
    print(f"the model is in {out}; ask it: python sample.py --model {out} --image FILE --prompt TEXT")
    return 0


class Answers:
    """What the loop teaches: to give the answers of the conversations. Another lesson has the same five methods (mpo.Pairs)."""
    shown, collate = (), staticmethod(collate)   # what of `measured` is printed beside the loss; examples -> batch

    def __init__(self, cfg, records, vlm, tok, device, state):
        self.vlm, self.device = vlm, device
        template = cfg.template or ("plain" if cfg.stage == "pretrain" else vlm.cfg.template)
        self.examples = Examples(records, tok, template, vlm.cfg.vision, vlm.cfg.image_mode, cfg.max_length or vlm.cfg.decoder.block_size, cfg.bad_records)

    def backward(self, micro, autocast):         # -> loss of the step (None: nothing could be used), what else the log should hold
        loss, supervised = backward(self.vlm, micro, self.device, autocast)
        return loss, {"supervised": supervised}

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
    """What the flags --model, --stage, --epochs and --from-scratch change in the defaults of others."""
    peek = argparse.ArgumentParser(add_help=False)                          # the flags that decide on the defaults of others
    peek.add_argument("--model", default="toy")
    peek.add_argument("--stage", default="finetune")
    peek.add_argument("--epochs")
    peek.add_argument("--from-scratch", "--from_scratch", action="store_true")
    choice, _ = peek.parse_known_args(argv)
    recipe = RECIPES.get((choice.model, choice.stage), {})
    return recipe | (dict(vision="", llm="") if choice.from_scratch else {}) | (dict(max_steps=0) if choice.epochs else {})


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
    one_of("--dtype", cfg.dtype, ["float32", "bfloat16", "auto"])
    for names, fits, rule in ((("batch_size", "log_every"), lambda x: x >= 1, "at least 1"), (("lr", "clip", "epochs"), lambda x: x > 0, "above 0"),
                              (("warmup",), lambda x: 0 <= x <= 1, "from 0 to 1"), (("seed",), lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"),
                              (("micro_batch_size", "weight_decay", "max_steps", "max_length", "eval_every", "save_every", "workers"), lambda x: x >= 0, "0 or more")):
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
        if file and not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file; give a LLaVA-format JSON or JSONL file")
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


def precision(cfg, device):
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


def build(cfg, checkpoint=None):
    """The model to train and its tokenizer: from a checkpoint, a model directory, or a preset with its ingredients."""
    if checkpoint or cfg.model not in PRESETS:
        directory = checkpoint or cfg.model
        if not Path(directory).is_dir():
            one_of("--model", cfg.model, [*PRESETS, "a model directory"])
        if not checkpoint and (cfg.tokenizer or cfg.from_scratch):
            raise UserError(f"--model {cfg.model} is a whole model; --tokenizer and --from-scratch are for presets ({', '.join(PRESETS)})")
        given = (None, None) if checkpoint else (cfg.vision or None, cfg.llm or None)
        vlm, tok = VLM.from_pretrained(directory, vision=given[0], llm=given[1]), Tokenizer(directory)
    else:
        tok, preset = Tokenizer(cfg.tokenizer or cfg.llm or TOY["llm"]), PRESETS[cfg.model]
        paths = cfg.vision.split(",") if cfg.vision else []
        towers = [read_tower(path) for path in paths] or [preset.vision]
        towers = [replace(t, image_size=cfg.image_size or towers[-1].image_size) for t in towers]
        decoder = decoder_config(read_json(Path(cfg.llm) / "config.json")) if cfg.llm else preset.decoder
        vlm = VLM(replace(preset, vision=towers[0], vision2=towers[1] if towers[1:] else None, connector="fused_gelu" if towers[1:] else preset.connector,
                          decoder=replace(decoder, vocab_size=tok.vocab_size),
                          image_token=tok.image, pad_token=tok.pad, bos_token=tok.bos, eos_token=tok.eos))
        for tower, path in zip((vlm.vision, *([vlm.vision2] if towers[1:] else [])), paths):
            load_vision(tower, path)
        if not paths:
            init_weights(vlm.vision)
        load_decoder(vlm.decoder, cfg.llm) if cfg.llm else init_weights(vlm.decoder)
    check_tokenizer(vlm, tok)
    if cfg.projector and not checkpoint:
        load_connector(vlm.connector, cfg.projector)
    vlm.cfg.image_mode = cfg.image_mode or vlm.cfg.image_mode
    if cfg.stage == "finetune":                  # what a model is asked with later is the template of its conversations, not of its captions
        vlm.cfg.template = cfg.template or vlm.cfg.template
    return vlm, tok


def freeze(vlm, cfg):
    """Only the parts of --train get gradients; returns their parameters."""
    parts = {"connector": vlm.connector, "llm": vlm.decoder, "vision": torch.nn.ModuleList([vlm.vision, *([vlm.vision2] if vlm.cfg.vision2 else [])])}
    fresh = [name for name, source in (("llm", cfg.llm), ("vision", cfg.vision)) if cfg.model in PRESETS and not source]
    chosen = cfg.train.split(",") if cfg.train else ["connector", *fresh, *(["llm"] if cfg.stage == "finetune" else [])]
    vlm.requires_grad_(False)
    for name in chosen:
        one_of("--train", name, list(parts))
        parts[name].requires_grad_(True)
    return [p for p in vlm.parameters() if p.requires_grad]


def batches(n, size, steps, seed):
    """Index lists, one a step: each epoch a fresh permutation of 0..n-1, cut without regard to where an epoch ends."""
    draw, queue = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(queue) < size:
            queue += torch.randperm(n, generator=draw).tolist()
        yield queue[:size]
        queue = queue[size:]


def micro_batches(rows, size, pad, collate=collate):
    """The examples of a step -> batches of at most `size` of them (0: one batch). Done in the loader process."""
    size = size or len(rows)
    return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]


def lr_at(step, steps, cfg):
    """Linear warmup to --lr, then half a cosine, which would reach 0 one step after the last. `step` counts from 1."""
    warmup = max(1, int(cfg.warmup * steps))
    if step <= warmup:
        return cfg.lr * step / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def backward(vlm, micro, device, autocast=contextlib.nullcontext()):
    """Add the gradient of L over all micro-batches of a step; -> L (None if nothing could be used), number of supervised tokens."""
    n = [n_supervised(m) for m in micro]
    loss = torch.zeros((), device=device)
    for m, n_micro in zip(micro, n):
        if n_micro:                                                         # else all its records were skipped
            with autocast:
                part = loss_of(vlm, m, device) * (n_micro / sum(n))         # the model's mean, back to a share of the step's
            part.backward()
            loss += part.detach()
    return loss.item() if sum(n) else None, sum(n)


def n_supervised(batch):
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def loss_of(vlm, batch, device):
    return vlm(*(batch[k].to(device, non_blocking=True) for k in ("tokens", "pixels", "labels")))


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
def held_out_loss(vlm, looks, device):
    """Mean loss per supervised token."""
    return sum(loss_of(vlm, batch, device).item() * n_supervised(batch) for batch in looks) / sum(map(n_supervised, looks))


def answer(vlm, tok, questions, device, max_new_tokens=96, size=48):
    """Greedy answers to [([picture file, ...], text), ...] -> [(answer, whole), ...]; `whole` is False where the tokens ran out."""
    answers, by_length = [None] * len(questions), sorted(range(len(questions)), key=lambda i: len(questions[i][1]))
    for start in range(0, len(questions), size):
        rows, prompts, pixels = by_length[start : start + size], [], []
        for paths, text in (questions[i] for i in rows):
            tiles, n_visual = zip(*(cut_tiles(open_image(p), vlm.cfg.vision, vlm.cfg.image_mode) for p in paths)) if paths else ((), ())
            text = text if "<image>" in text or not paths else "<image>" * len(paths) + "\n" + text
            prompts.append(encode_prompt(tok, [("human", text)], vlm.cfg.template, n_visual))
            pixels += tiles
        lengths = [len(p) for p in prompts]
        room = min(max_new_tokens, vlm.cfg.decoder.block_size - max(lengths))
        if room < 1:
            raise UserError(f"a question of {max(lengths)} tokens leaves no room for an answer in {vlm.cfg.decoder.block_size}; shorten it")
        tokens = torch.tensor([p + [tok.pad] * (max(lengths) - len(p)) for p in prompts], device=device)
        stop = set(stop_ids(tok, vlm.cfg.template))
        new = vlm.generate(tokens, torch.cat(pixels).to(device) if pixels else None, room, lengths=lengths, stop=list(stop))
        for i, ids in zip(rows, new.tolist()):
            end = next((k for k, t in enumerate(ids) if t in stop), None)
            text = tok.decode(ids[:end])
            said = cut_at_stop(text, vlm.cfg.template)
            answers[i] = said.strip(), end is not None or said != text
    return answers


def sample_answers(vlm, tok, questions, step, device, n=3):
    """A few held-out questions, other ones at each look, with the model's answer and the truth."""
    chosen = [questions[(step * 7 + i * len(questions) // n) % len(questions)] for i in range(n)]
    said = answer(vlm, tok, [(q["paths"], q["text"]) for q in chosen], device)
    lines = [q["text"].replace("<image>", "").strip().split("\n") for q in chosen]
    asked = [next((line for line in some if "?" in line), some[0]) for some in lines]            # the question, without its format prompt
    return "\n".join(f"  Q: {text}\n  A: {a!r}   truth: {q['answer']!r}" for q, text, (a, _) in zip(chosen, asked, said))


def examine(vlm, tok, questions, out, device):
    """Answer every held-out question, print accuracy by category beside two baselines, and write results.json."""
    began = time.time()
    names = list(dict.fromkeys(path for q in questions for path in q["paths"]))
    other = {name: names[(i + len(names) // 2) % len(names)] for i, name in enumerate(names)}      # each question meets another picture
    said = answer(vlm, tok, [(q["paths"], q["text"]) for q in questions], device)
    blind = answer(vlm, tok, [([other[p] for p in q["paths"]], q["text"]) for q in questions], device)
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


def save_model(directory, vlm, tok):
    """A self-contained model directory; config.json comes last, so a directory that has one is whole."""
    save_processor(directory, tok.path, vlm.cfg)
    vlm.save_pretrained(directory)


def save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson=None):
    """out/checkpoint-N, built under a hidden name and renamed when it is on the disk; only then does the older one go, hidden first:
    whatever is called checkpoint-N is whole, at any moment."""
    final = out / f"checkpoint-{step:06d}"
    hidden = out / f".{final.name}.tmp"
    try:
        save_model(hidden, vlm, tok)
        state = {"optimizer": optimizer.state_dict(), "step": step, "config": asdict(cfg), "skipped": skipped, "lesson": lesson}
        write_whole(hidden / "trainer.pt", lambda path: torch.save(state, path))
        os.replace(hidden, final)
        for old in checkpoints(out)[:-1]:
            os.replace(old, hidden)
            shutil.rmtree(hidden)
    except (UserError, OSError) as error:
        raise UserError(f"the checkpoint of step {step} could not be saved: {error}; --resume goes on from the one before it") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


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
