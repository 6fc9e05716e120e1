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

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time

from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
import numpy as np
import torch
import torch.distributed as dist

import toyworld
from conversation import Tokenizer, encode_conversation
from data import Examples, collate, Questions, Records, batches, micro_batches, open_records, share
from eval import answer_questions, examine
from model import IGNORE, PRESETS, VLM, init_weights
from support.checkpoint import catch_ctrl_c, find_checkpoint, move_aside, restore, rewind, save_checkpoint, save_model
from support.cli import Flags, UserError, arg, one_of, parse_args, run
from support.distributed import gather, meet, mine, rank, spread, wait, whole, world
from support.export import save_processor
from support.io import write_whole
from support.lora import LORA_TARGETS, add_lora
from support.optim import make_optimizer, part_of
from support.plan import dry_run
from support.plots import add_points, plot
from support.weights import check_tokenizer, decoder_config, load_adapter, load_connector, load_decoder, load_vision, read_json, read_tower, tokenizer_home
from vision import MODES, TILINGS, find_tiling, grids_up_to



HERE = Path(__file__).parent



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
    loader = iter(DataLoader(examples, batch_sampler=(share(batch, records, vlm.cfg.vision.n_token, rank(), world()) for batch in order), num_workers=cfg.workers,
                             pin_memory=device.type == "cuda", collate_fn=functools.partial(
                                 micro_batches, size=cfg.micro_batch_size, pad=tok.pad, budget=cfg.token_budget, collate=lesson.collate)))
    autocast = precision(cfg, device)

    # The curves of the steps that a resumed run has behind it.
    curves = {}
    if first and (out / "log.jsonl").exists():
        for line in open(out / "log.jsonl"):
            add_points(curves, json.loads(line))

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
            line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **measured, "time": round(time.time() - began, 2)}
            add_points(curves, line)
            log.write(json.dumps(line | ({"skipped": bad} if bad else {})) + "\n")
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
                line = {"step": step, "val_loss": val_loss, "val_loss_shuffled": shuffled}
                add_points(curves, line)
                log.write(json.dumps(line) + "\n")
                bar.write(f"held-out loss {val_loss:.4f}, with pictures shuffled {shuffled:.4f}"
                          + (": the model makes no use of the pictures" if shuffled < 1.01 * val_loss and any(len(m["pixels"]) for m in looks) else "")
                          + "\n" + said)
            if rank() == 0 and (step % 50 == 0 or step == steps or halt):
                train_loss, held_out = curves.get("loss", ([], [])), curves.get("val_loss", ([], []))
                plot(out / "loss.png", {"loss per supervised token": {"training": train_loss, "held-out": held_out}})
                lesson.draw(out, curves)
            sys.stdout.flush()
            if halt or step == steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson.state())
            if halt:
                bar.write(f"interrupted: step {step} is saved; go on with the same command and --resume")
                return 130
    shown = steps * cfg.batch_size
    if skipped == shown:
        raise UserError(f"{cfg.data}: not one record could be used; the reasons are above, or: python -m tools.show check {cfg.data} --image-root {cfg.image_root}")
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

    def draw(self, out, curves):                 # a picture beside loss.png
        pass



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



def set_mode(vlm, cfg):
    """How the flags want pictures cut, where they say so."""
    mode, choices = cfg.image_mode or vlm.cfg.image_mode, dict(global_view=cfg.global_view) if cfg.global_view else {}
    if cfg.max_tiles and mode == "anyres":
        raise UserError("--max-tiles is for modes hd and internvl; anyres has its five grids")
    vlm.set_image_mode(mode, **choices, **(dict(grids=grids_up_to(cfg.max_tiles)) if cfg.max_tiles else {}))



def lora_base(cfg):
    """The whole model that a LoRA is over: --model, or what a preset, a --projector, a --vision or tiles made of it, saved beside the run."""
    return Path(cfg.model) if not (cfg.model in PRESETS or cfg.projector or cfg.vision or cfg.llm or cfg.image_mode in TILINGS) else Path(cfg.out) / "base"



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



def n_step(cfg, records):
    return cfg.max_steps or math.ceil(len(records) * cfg.epochs / cfg.batch_size)



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



def sample_answers(vlm, tok, questions, step, n=3):
    """A few held-out questions, other ones at each look, with the model's answer and the truth."""
    chosen = [questions[(step * 7 + i * len(questions) // n) % len(questions)] for i in range(n)]
    said = answer_questions(vlm, tok, chosen)
    lines = [q["text"].replace("<image>", "").strip().split("\n") for q in chosen]
    asked = [next((line for line in some if "?" in line), some[0]) for some in lines]            # the question, without its format prompt
    return "\n".join(f"  Q: {text}\n  A: {a!r}   truth: {q['answer']!r}" for q, text, (a, *_) in zip(chosen, asked, said))


if __name__ == "__main__":
    sys.exit(run(main))
