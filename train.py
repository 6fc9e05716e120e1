"""The one training loop: show the model pictures and questions, and teach it the answers (arXiv:2310.03744, sections 3 and 4).

    --stage pretrain    the connector alone learns to caption: it aligns the tower's features with the decoder's words
    --stage finetune    connector and decoder learn to follow instructions about pictures; the tower stays frozen

    L = - sum_t log p(token_t | picture, tokens before t) / n         t over the n supervised tokens of the whole step

The division happens once per step: micro-batches hold unequal numbers of supervised tokens, and the mean of their means would weigh
short answers more. (The original averages the means; so its loss curves differ a little from ours at equal data.)

    python train.py --stage finetune                                  # the toy: draws its world, trains, and is examined
    python train.py --stage finetune --model photo --data FILE.json --image-root DIR --max-steps 3000
    torch.manual_seed, the order of the records and everything else follow --seed: the same command gives the same weights.

A run writes to --out: log.jsonl and loss.png while it goes, checkpoint-N/ now and then (--resume goes on from the newest, bit for bit
on a CPU), and at the end the model itself, with results.json when there were held-out questions.
"""

import argparse
import contextlib
import json
import math
import os
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
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import toyworld
from data import IGNORE, Examples, Records, Tokenizer, collate, encode_prompt, parse_args, run
from model import PRESETS, VLM, decoder_config, init_weights, load_decoder, load_vision, read_json, save_processor, vision_config, write_whole
from vision import UserError, cut_tiles, open_image

HERE = Path(__file__).parent


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    stage: str = arg("finetune", "pretrain (connector only, captions) or finetune (connector and decoder, conversations)")
    model: str = arg("toy", f"a preset ({', '.join(PRESETS)}) or a model directory to go on from")
    data: str = arg("", "LLaVA-format JSON or JSONL file; empty: the toy world, drawn on first use")
    image_root: str = arg("", "folder that the records' image paths start from; empty: the folder of --data")
    val: str = arg("", "held-out questions (JSONL: image, text, answer, category); empty: val.jsonl beside --data, if it is there")
    out: str = arg("", "folder for the run; empty: out/STAGE")
    vision: str = arg("", "CLIP directory for the tower of a preset; empty: the preset's own (toy) or random weights")
    llm: str = arg("", "Llama directory for the decoder and tokenizer of a preset; empty: the preset's own (toy) or random weights")
    tokenizer: str = arg("", "sentencepiece tokenizer.model, or a directory that holds one; empty: the decoder's own")
    projector: str = arg("", "connector to start from: a model directory that stage 1 wrote, or its model.safetensors")
    from_scratch: bool = arg(False, "start every part from random weights, whatever the preset has")
    train: str = arg("", "parts to train, of connector,llm,vision; empty: as the stage says (from scratch: all)")
    template: str = arg("", "conversation template; empty: plain in stage pretrain, the model's own otherwise")
    image_mode: str = arg("", "pad, letterbox, crop or resize; empty: the model's own")
    batch_size: int = arg(16, "records a step")
    micro_batch_size: int = arg(0, "records in memory at once; 0: all of the step's")
    lr: float = arg(1e-3, "peak learning rate, after warmup")
    weight_decay: float = arg(0.0, "AdamW's, on matrices only")
    warmup: float = arg(0.03, "share of the steps with a rising learning rate")
    clip: float = arg(1.0, "largest norm of the gradient")
    epochs: float = arg(1.0, "passes over the data")
    max_steps: int = arg(0, "steps; 0: as --epochs says")
    max_length: int = arg(0, "longest record in tokens; 0: the decoder's block size")
    bad_records: str = arg("stop", "what to do with a record that cannot be used: stop, or skip and count")
    eval_every: int = arg(100, "steps between looks at held-out loss and sample answers; 0: never")
    save_every: int = arg(100, "steps between checkpoints; 0: only at the end")
    log_every: int = arg(10, "steps between printed lines")
    final_eval: bool = arg(True, "at the end, answer all held-out questions and print the table")
    resume: bool = arg(False, "go on from the newest checkpoint in --out")
    workers: int = arg(1, "processes that prepare records; 0: none")
    seed: int = arg(0, "for weights and the order of the records")
    device: str = arg("auto", "cpu, cuda or auto")
    dtype: str = arg("auto", "float32, bfloat16 (autocast) or auto: bfloat16 on a GPU")


# What a preset changes, by (model, stage); a flag on the command line still wins. llava-1.5 has the published values.
TOY = dict(vision=str(HERE / "assets/toy-clip"), llm=str(HERE / "assets/toy-vicuna"))
RECIPES = {
    ("toy", "pretrain"): TOY | dict(lr=2e-3, batch_size=32, max_steps=150),
    ("toy", "finetune"): TOY | dict(lr=1e-3, batch_size=16, max_steps=500),
    ("photo", "finetune"): dict(lr=1e-3, batch_size=32, max_steps=3000, eval_every=500, save_every=500),
    ("llava-1.5-7b", "pretrain"): dict(lr=1e-3, batch_size=256, clip=math.inf, image_mode="crop", max_length=2048),
    ("llava-1.5-7b", "finetune"): dict(lr=2e-5, batch_size=128, clip=math.inf, max_length=2048),
}
RECIPES |= {("llava-1.5-13b", stage): RECIPES["llava-1.5-7b", stage] for stage in ("pretrain", "finetune")}
FREE_TO_CHANGE = {"resume", "out", "workers", "device", "log_every", "final_eval", "save_every", "eval_every"}   # on --resume


def main(argv=None):
    cfg = parse(argv)
    out = Path(cfg.out)
    newest = newest_checkpoint(out) if cfg.resume else None
    if newest is None:
        move_aside(out)
    print(f"config: {json.dumps({k: v for k, v in asdict(cfg).items() if v not in ('', False)})}", flush=True)

    # Data, model, optimizer.
    torch.manual_seed(cfg.seed)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    vlm, tok = build(cfg, newest)
    vlm.to(device)
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    records = Records(cfg.data, cfg.image_root)
    template = cfg.template or ("plain" if cfg.stage == "pretrain" else vlm.cfg.template)
    examples = Examples(records, tok, template, vlm.cfg.vision, vlm.cfg.image_mode, cfg.max_length or vlm.cfg.decoder.block_size, cfg.bad_records)
    steps = cfg.max_steps or max(1, math.ceil(len(records) * cfg.epochs / cfg.batch_size))
    held_out = Records(cfg.val, cfg.image_root) if cfg.val else None
    params = freeze(vlm, cfg)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
         {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    first, skipped = resume(newest, cfg, optimizer, out) if newest else (0, 0)
    count = lambda ps: f"{sum(p.numel() for p in ps) / 1e6:.2f}M"
    print(f"{count(params)} of {count(vlm.parameters())} parameters train, on {len(records):,} records, {steps:,} steps of {cfg.batch_size}", flush=True)

    # The loop.
    stop = catch_ctrl_c()
    log = open(out / "log.jsonl", "a")
    order = list(batches(len(records), cfg.batch_size, steps, cfg.seed))[first:]
    loader = iter(DataLoader(examples, batch_sampler=order, collate_fn=list, num_workers=cfg.workers))
    bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
    vlm.train()
    began, seen = time.time(), 0
    for step in range(first + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, cfg)
        rows = next(loader)
        micro = [collate(rows[i : i + (cfg.micro_batch_size or len(rows))], tok.pad) for i in range(0, len(rows), cfg.micro_batch_size or len(rows))]
        n = [int((m["labels"][:, 1:] != IGNORE).sum()) for m in micro]
        loss = 0.0
        for m, n_micro in zip(micro, n):
            if n_micro:
                with autocast:
                    part = vlm(m["tokens"].to(device), m["pixels"].to(device), m["labels"].to(device)) * (n_micro / sum(n))
                part.backward()
                loss += part.item()
        skipped += sum(len(m["skipped"]) for m in micro)
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; lower --lr, or look at the records {', '.join(i for m in micro for i in m['ids'])}")
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen += sum(m["tokens"].numel() for m in micro)
        line = {"step": step, "loss": loss, "lr": lr_at(step, steps, cfg), "grad_norm": norm, "supervised": sum(n), "time": round(time.time() - began, 2)}
        log.write(json.dumps(line) + "\n")
        log.flush()
        rate = f"{seen / (time.time() - began):,.0f} tokens/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {rate}")
        bar.update()
        if step % cfg.log_every == 0 or step == first + 1:
            bar.write(f"step {step:5d}/{steps}  loss {loss:.4f}  lr {line['lr']:.2e}  {rate}")
            sys.stdout.flush()
        if held_out and cfg.eval_every and (step % cfg.eval_every == 0 or step == steps):
            line = {"step": step, "val_loss": held_out_loss(vlm, tok, held_out, device)}
            log.write(json.dumps(line) + "\n")
            bar.write(f"held-out loss {line['val_loss']:.4f}\n" + sample_answers(vlm, tok, held_out, step, device))
        if step % 50 == 0 or step == steps:
            draw_curve(out / "loss.png", out / "log.jsonl")
        if stop.is_set or step == steps or cfg.save_every and step % cfg.save_every == 0:
            save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped)
        if stop.is_set:
            bar.close()
            print(f"interrupted: step {step} is saved; go on with the same command and --resume")
            return 130
    bar.close()
    print(f"trained {steps - first} steps in {time.time() - began:.0f} s; {skipped} records skipped")
    save_model(out, vlm, tok)
    if held_out and cfg.final_eval:
        examine(vlm, tok, held_out, out, device)
    print(f"the model is in {out}; ask it: python sample.py --model {out} --image FILE --prompt TEXT")


# ---- the parts, in the order of their use ------------------------------------------------------------------------------


def parse(argv=None):
    """One flag per field of TrainConfig; the recipe of (--model, --stage) replaces defaults, the command line replaces both."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    for f in fields(TrainConfig):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        cli.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--model", default="toy")
    known.add_argument("--stage", default="finetune")
    choice, _ = known.parse_known_args(argv)
    cli.set_defaults(**RECIPES.get((choice.model, choice.stage), {}))
    cfg = TrainConfig(**vars(parse_args(cli, sys.argv[1:] if argv is None else argv)))
    if cfg.stage not in ("pretrain", "finetune"):
        raise UserError(f"--stage {cfg.stage}: choose pretrain or finetune")
    if cfg.bad_records not in ("stop", "skip"):
        raise UserError(f"--bad-records {cfg.bad_records}: choose stop or skip")
    for name in ("batch_size", "log_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    if cfg.from_scratch:
        cfg = replace(cfg, vision="", llm="")
    if not cfg.data:
        toyworld.write_world("toyworld")
        cfg = replace(cfg, data="toyworld/pretrain.json" if cfg.stage == "pretrain" else "toyworld/train.json")
    cfg = replace(cfg, image_root=cfg.image_root or str(Path(cfg.data).parent), out=cfg.out or f"out/{cfg.stage}")
    if not cfg.val and (Path(cfg.data).parent / "val.jsonl").exists():
        cfg = replace(cfg, val=str(Path(cfg.data).parent / "val.jsonl"))
    return cfg


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def build(cfg, checkpoint=None):
    """The model to train and its tokenizer: from a checkpoint, a model directory, or a preset with its ingredients."""
    directory = checkpoint or cfg.model
    if checkpoint or cfg.model not in PRESETS:
        if not Path(directory).is_dir():
            raise UserError(f"--model {directory}: neither a preset ({', '.join(PRESETS)}) nor a directory")
        vlm, tok = VLM.from_pretrained(directory), Tokenizer(directory)
    else:
        tok = Tokenizer(cfg.tokenizer or cfg.llm or TOY["llm"])
        preset = PRESETS[cfg.model]
        vision = vision_config(read_json(Path(cfg.vision) / "config.json")) if cfg.vision else preset.vision
        decoder = decoder_config(read_json(Path(cfg.llm) / "config.json")) if cfg.llm else preset.decoder
        vlm = VLM(replace(preset, vision=vision, decoder=replace(decoder, vocab_size=tok.vocab_size),
                          image_token=tok.image, pad_token=tok.pad, bos_token=tok.bos, eos_token=tok.eos))
        init_weights(vlm.vision)
        init_weights(vlm.decoder)
        if cfg.vision:
            load_vision(vlm.vision, cfg.vision)
        if cfg.llm:
            load_decoder(vlm.decoder, cfg.llm)
    if cfg.projector and not checkpoint:
        load_projector(vlm, cfg.projector)
    vlm.cfg.image_mode = cfg.image_mode or vlm.cfg.image_mode
    return vlm, tok


def load_projector(vlm, path):
    """The connector of a model that stage 1 wrote into `vlm`."""
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(f"--projector {path}: no such file; give a directory that --stage pretrain wrote")
    found = {k.removeprefix("multi_modal_projector."): v.float() for k, v in load_file(file).items() if k.startswith("multi_modal_projector.")}
    try:
        vlm.connector.load_state_dict(found, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file}: its connector does not fit this tower and decoder: {' '.join(str(error).split())}") from None


def freeze(vlm, cfg):
    """Only the parts of --train get gradients; returns their parameters."""
    parts = {"connector": vlm.connector, "llm": vlm.decoder, "vision": vlm.vision}
    default = "connector,llm,vision" if cfg.from_scratch or not cfg.vision and cfg.model in PRESETS else "connector,llm"
    chosen = (cfg.train or ("connector" if cfg.stage == "pretrain" else default)).split(",")
    if set(chosen) - set(parts):
        raise UserError(f"--train {cfg.train}: {sorted(set(chosen) - set(parts))[0]!r} is none of {', '.join(parts)}")
    vlm.requires_grad_(False)
    for name in chosen:
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


def lr_at(step, steps, cfg):
    """Linear warmup to --lr, then cosine to 0. `step` counts from 1."""
    warmup = max(1, int(cfg.warmup * steps))
    if step <= warmup:
        return cfg.lr * step / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class catch_ctrl_c:
    """The first Ctrl-C lets the step end and saves; the second ends the program at once."""

    def __init__(self):
        self.is_set = False
        signal.signal(signal.SIGINT, self.set)

    def set(self, *_):
        self.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- held-out questions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(vlm, tok, held_out, device, n=128, size=32):
    """Mean loss per supervised token on up to n held-out questions, evenly spread over the file."""
    every = range(0, len(held_out), max(1, len(held_out) // n))
    examples = Examples(held_out, tok, vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode, vlm.cfg.decoder.block_size, "stop")
    loss = total = 0
    for i in range(0, len(every), size):
        batch = collate([examples[j] for j in every[i : i + size]], tok.pad)
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        loss += vlm(batch["tokens"].to(device), batch["pixels"].to(device), batch["labels"].to(device)).item() * count
        total += count
    return loss / total


def answer(vlm, tok, questions, device, max_new_tokens=96, size=48):
    """Greedy answers to [(picture or None, text)], picture an uint8 tile stack (n, 3, S, S). Batches of similar length, original order."""
    prompts = []
    for pixels, text in questions:
        turn = [("human", "<image>\n" + text if pixels is not None else text)]
        prompts.append(encode_prompt(tok, turn, vlm.cfg.template, [] if pixels is None else [len(pixels) * vlm.cfg.vision.n_token]))
    answers, by_length = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), size):
        rows = by_length[start : start + size]
        lengths = [len(prompts[i]) for i in rows]
        tokens = torch.tensor([prompts[i] + [tok.pad] * (max(lengths) - len(prompts[i])) for i in rows], device=device)
        pixels = [questions[i][0] for i in rows if questions[i][0] is not None]
        new = vlm.generate(tokens, torch.cat(pixels).to(device) if pixels else None, max_new_tokens, lengths=lengths)
        for i, ids in zip(rows, new.tolist()):
            answers[i] = tok.decode(ids[: ids.index(tok.eos)] if tok.eos in ids else ids).strip()
    return answers


def sample_answers(vlm, tok, held_out, step, device, n=3):
    """A few held-out questions, other ones at each look, with the model's answer and the truth."""
    chosen = [held_out[(step * 7 + i * len(held_out) // n) % len(held_out)] for i in range(n)]
    said = answer(vlm, tok, [(picture(vlm, held_out, r), r["text"]) for r in chosen], device)
    return "\n".join(f"  Q: {r['text'].splitlines()[0]}\n  A: {a!r}   truth: {r['answer']!r}" for r, a in zip(chosen, said))


def picture(vlm, records, record):
    return cut_tiles(open_image(records.image_path(record["images"][0])), vlm.cfg.vision, vlm.cfg.image_mode)[0]


def examine(vlm, tok, held_out, out, device):
    """Answer every held-out question, print accuracy by category beside two baselines, and write results.json."""
    vlm.eval()
    began, records = time.time(), [held_out[i] for i in range(len(held_out))]
    pixels = {r["image"]: picture(vlm, held_out, r) for r in records}
    names = list(pixels)
    other = {name: names[(i + len(names) // 2) % len(names)] for i, name in enumerate(names)}      # each question meets another picture
    said = answer(vlm, tok, [(pixels[r["image"]], r["text"]) for r in records], device)
    blind = answer(vlm, tok, [(pixels[other[r["image"]]], r["text"]) for r in records], device)
    table = {}
    for category in list(dict.fromkeys(r["category"] for r in records)) + ["all"]:
        rows = [i for i, r in enumerate(records) if category in (r["category"], "all")]
        commonest = {c: Counter(r["answer"] for r in records if r["category"] == c).most_common(1)[0][0] for c in {records[i]["category"] for i in rows}}
        share = lambda given: sum(is_right(given(i), records[i]["answer"]) for i in rows) / len(rows)
        table[category] = {"n": len(rows), "accuracy": share(lambda i: said[i]), "shuffled": share(lambda i: blind[i]),
                           "most_frequent": share(lambda i: commonest[records[i]["category"]])}
    print(f"\nheld-out accuracy, {len(records)} questions in {time.time() - began:.0f} s"
          f"\n{'':14s}{'n':>6s}{'accuracy':>10s}{'most frequent answer':>22s}{'shuffled pictures':>19s}")
    for name, row in table.items():
        print(f"{name:14s}{row['n']:6d}{row['accuracy']:10.1%}{row['most_frequent']:22.1%}{row['shuffled']:19.1%}")
    answers = [{"question_id": r["id"], "category": r["category"], "prompt": r["text"], "text": a, "truth": r["answer"], "right": is_right(a, r["answer"])}
               for r, a in zip(records, said)]
    write_whole(out / "results.json", lambda tmp: tmp.write_text(json.dumps({"table": table, "records": answers}, indent=1)))


def is_right(said, truth):
    """Exact match but for case and a final dot; of a worked answer what follows `Final answer:`; of a box, IoU >= 0.5 (RefCOCO)."""
    box = re.compile(r"\[(\d\.\d+), (\d\.\d+), (\d\.\d+), (\d\.\d+)\]")
    if box.fullmatch(truth):
        found = box.search(said)
        return bool(found) and iou(*([float(x) for x in m.groups()] for m in (found, box.fullmatch(truth)))) >= 0.5
    plain = lambda s: s.rsplit("Final answer:", 1)[-1].strip().rstrip(".").lower()
    return ("Final answer:" in said) == ("Final answer:" in truth) and plain(said) == plain(truth)


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


def save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped):
    """out/checkpoint-N, built under another name and renamed when it is on the disk; older ones go only after that."""
    final = out / f"checkpoint-{step:06d}"
    tmp = out / f".{final.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        save_model(tmp, vlm, tok)
        state = {"optimizer": optimizer.state_dict(), "step": step, "config": asdict(cfg), "skipped": skipped}
        write_whole(tmp / "trainer.pt", lambda path: torch.save(state, path))
        os.replace(tmp, final)
    except (UserError, OSError) as error:
        raise UserError(f"checkpoint of step {step} could not be saved ({error}); the one before it is untouched: free some space and --resume") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    for old in checkpoints(out)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(out):
    return sorted(p for p in Path(out).glob("checkpoint-*") if (p / "trainer.pt").exists())


def newest_checkpoint(out):
    found = checkpoints(out)
    if not found:
        print(f"--resume: no checkpoint in {out}; starting from the beginning")
    return found[-1] if found else None


def resume(checkpoint, cfg, optimizer, out):
    """Put optimizer and log back to where the checkpoint was taken; refuse flags that would make it another run."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    changed = [k for k, v in asdict(cfg).items() if k not in FREE_TO_CHANGE and state["config"].get(k) != v]
    if changed:
        name = changed[0]
        raise UserError(f"--resume: {checkpoint} was trained with --{name.replace('_', '-')} {state['config'].get(name)!r}, now it is "
                        f"{getattr(cfg, name)!r}; give the same flags, or start a new run in another --out")
    optimizer.load_state_dict(state["optimizer"])
    lines = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    write_whole(out / "log.jsonl", lambda tmp: tmp.write_text("".join(lines)))
    print(f"resuming after step {state['step']}")
    return state["step"], state["skipped"]


def move_aside(out):
    """A new run never overwrites an old one: out/finetune becomes out/finetune.1, .2, ..."""
    if out.exists() and any(out.iterdir()):
        free = next(i for i in range(1, 10**6) if not out.with_name(f"{out.name}.{i}").exists())
        out.rename(out.with_name(f"{out.name}.{free}"))
        print(f"{out} held an earlier run; it is now {out}.{free}")
    out.mkdir(parents=True, exist_ok=True)


def draw_curve(path, log, width=720, height=400):
    """loss.png: the loss of each step, its running mean, and the held-out loss as dots, on a logarithmic axis."""
    lines = [json.loads(line) for line in open(log)]
    train, val = ([(r["step"], r[key]) for r in lines if key in r] for key in ("loss", "val_loss"))
    values = [v for _, v in train + val]
    low, high, last = math.log(max(min(values), 1e-4)) - 0.1, math.log(max(values)) + 0.1, max(train[-1][0], 2)
    at = lambda s, v: (50 + (width - 70) * (s - 1) / (last - 1), 20 + (height - 60) * (high - math.log(max(v, 1e-4))) / (high - low))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for tick in (t * 10.0**e for e in range(-4, 3) for t in (1, 2, 5)):
        if low < math.log(tick) < high:
            draw.line([(50, at(1, tick)[1]), (width - 20, at(1, tick)[1])], fill="#e4e4e4")
            draw.text((8, at(1, tick)[1] - 6), f"{tick:g}", fill="#666666")
    smooth, mean = [], train[0][1]
    for s, v in train:
        mean += 0.1 * (v - mean)
        smooth.append(at(s, mean))
    if len(train) > 1:
        draw.line([at(s, v) for s, v in train], fill="#b9d2ea")
        draw.line(smooth, fill="#1f6fb5", width=2)
    for s, v in val:
        x, y = at(s, v)
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill="#d6502b")
    draw.text((50, height - 30), f"step 1 to {last}    loss {train[-1][1]:.3f}" + (f"    held-out {val[-1][1]:.3f} (dots)" if val else ""), fill="#333333")
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))


if __name__ == "__main__":
    sys.exit(run(main))
