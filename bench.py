"""How fast, beside a peer: the same model from the same weights, here and in transformers, doing the same work in turn.

    python bench.py train --peer transformers                       # one optimizer step of LLaVA's second stage, 10M parameters
    python bench.py train --preset 100m --dtype bfloat16 --peer transformers --compile
    python bench.py train --grow length                             # time and memory against one size; a table, and bench.png
    python bench.py sample --peer transformers                      # greedy decoding

Two runs on a busy machine cannot be compared, so both sides run step by step in turn in one process, each ratio is of two neighbouring
steps, and the median of the ratios counts. On a CPU time is the process's own, on one thread: what others do on the machine is not in it.
Memory is the highest a process of its own ever held, with and without what it held before its first step.

Model FLOPs of a step, with n_t tokens through the decoder's blocks (P weights) and n_s supervised ones through the head, n_v patch rows
through the frozen tower (W weights) and connector (C weights), attention causal:
    6 (P n_t + V D n_s) + 12 L D T n_t / 2 + 2 W n_v + 4 S D_v L_v n_v + 6 C n_v
The peer's head runs on every token; that is work nobody asked for and is not counted. MFU is against a square matrix product in the same run.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import parse_args, run
from model import PRESETS, VLM, DecoderConfig, VLMConfig, init_weights
from train import Flags, matmul_rate, one_of, pick_device
from vision import UserError, VisionConfig

# Sizes, and a batch: records, words a record, of which supervised
SIZES = {
    "10m": (VLMConfig(VisionConfig(112, 14, 192, 4, 3, 768), DecoderConfig(2048, 6, 4, 4, 256, 64, 704, 1024), image_token=2046, pad_token=2047), 32, 48, 32),
    "100m": (VLMConfig(VisionConfig(168, 14, 384, 8, 6, 1536), DecoderConfig(32000, 10, 10, 10, 640, 64, 1728, 1024), image_token=31998, pad_token=31999), 8, 112, 64),
    "llava-1.5-7b": (PRESETS["llava-1.5-7b"], 10, 240, 160),
}
GROW = {"length": ("words", (32, 64, 128, 256, 512)), "pictures": ("pictures", (0, 1, 2, 4, 8)), "vocab": ("vocab", (2048, 8192, 32000, 92553)),
        "batch": ("rows", (4, 8, 16, 32, 64))}


def main(argv=None):
    cli = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = cli.add_subparsers(required=True, dest="program", metavar="{train,sample}")
    for name in "train", "sample":
        sub = programs.add_parser(name, help="one optimizer step" if name == "train" else "greedy decoding",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--preset", default="10m", help=f"the model's size: {', '.join(SIZES)}")
        sub.add_argument("--peer", default="", help="transformers: LlavaForConditionalGeneration (sdpa); empty: none")
        sub.add_argument("--rows", type=int, default=0, help="records in the batch; 0: as the preset says, one for sample")
        sub.add_argument("--words", type=int, default=0, help="text tokens a record; 0: as the preset says")
        sub.add_argument("--supervised", type=int, default=0, help="of them supervised; 0: as the preset says")
        sub.add_argument("--pictures", type=int, default=1, help="pictures a record")
        sub.add_argument("--vocab", type=int, default=0, help="words in the vocabulary; 0: as the preset says")
        sub.add_argument("--layers", type=int, default=0, help="decoder blocks; 0: as the preset says")
        sub.add_argument("--dtype", default="float32", help="float32, or bfloat16 (autocast, on both sides)")
        sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile: here the blocks, there the model")
        sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory in processes of their own")
        sub.add_argument("--repeats", type=int, default=7, help="steps of each side that count, after two that do not")
        sub.add_argument("--new-tokens", type=int, default=64, help="sample: tokens to generate")
        sub.add_argument("--threads", type=int, default=1, help="CPU threads; above 1 the time is the clock's, and a busy machine is in it")
        sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        sub.add_argument("--grow", default="", help=f"train: step through sizes of one of {', '.join(GROW)}, alone or beside the peer")
        sub.add_argument("--side", default="both", help=argparse.SUPPRESS)      # for the processes that measure memory
        sub.add_argument("--out", default="bench", help="name of the files .json and, of --grow, .png")
    args = parse_args(cli, sys.argv[1:] if argv is None else argv)
    one_of("--preset", args.preset, list(SIZES))
    one_of("--peer", args.peer, ["", "transformers"])
    one_of("--dtype", args.dtype, ["float32", "bfloat16"])
    torch.set_num_threads(args.threads)
    if args.side != "both":
        return alone(args)
    if args.grow:
        one_of("--grow", args.grow, list(GROW))
        return grow(args)
    result = compare(args)
    report(result)
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1))
    return 0


def setting(args):
    """-> VLMConfig, (rows, words, supervised) with the flags put in."""
    cfg, rows, words, supervised = SIZES[args.preset]
    words, V = args.words or words, args.vocab or cfg.decoder.vocab_size
    length = cfg.vision.n_token * args.pictures + words + (args.new_tokens if args.program == "sample" else 0)
    decoder = replace(cfg.decoder, vocab_size=V, n_layer=args.layers or cfg.decoder.n_layer, block_size=max(cfg.decoder.block_size, length))
    cfg = replace(cfg, decoder=decoder, image_token=V - 2, pad_token=V - 1)
    return cfg, (args.rows or (rows if args.program == "train" else 1), words, min(args.supervised or supervised, words - 1))


def batch_of(cfg, args, rows, words, supervised, device):
    """Random ids and pixels: tokens and labels (B, T), pixels (n, 3, S, S), normalised as the peer wants them."""
    draw = torch.Generator().manual_seed(0)
    n_visual, S = cfg.vision.n_token * args.pictures, cfg.vision.image_size
    tokens = torch.randint(3, cfg.image_token, (rows, n_visual + words), generator=draw)
    tokens[:, 1 : 1 + n_visual] = cfg.image_token
    labels = torch.where(torch.arange(n_visual + words) >= n_visual + words - supervised, tokens, -100)
    pixels = torch.randn(rows * args.pictures, 3, S, S, generator=draw)
    return tokens.to(device), labels.to(device), pixels.to(device)


def sides(args, cfg, device):
    """{name: (model, step)}; both models have the same weights. A step returns its loss (train) or the ids (sample)."""
    rows, words, supervised = setting(args)[1]
    tokens, labels, pixels = batch_of(cfg, args, rows, words, supervised, device)
    torch.manual_seed(0)
    vlm = init_weights(VLM(cfg))
    models = {"plainvlm": vlm}
    if args.peer:
        try:
            from transformers import LlavaForConditionalGeneration
        except ImportError:
            raise UserError("--peer transformers: it is not installed here (pip install transformers), or leave out --peer") from None
        with tempfile.TemporaryDirectory() as directory:
            vlm.save_pretrained(directory)
            models["transformers"] = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
    if args.side != "both":
        models = {args.side: models[args.side]}
    made = {}
    for name, model in models.items():
        model.to(device)
        tower = model.vision if name == "plainvlm" else model.model.vision_tower
        tower.requires_grad_(False)                                         # as in LLaVA's second stage
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        if name == "plainvlm" and args.compile:
            for block in [*model.decoder.layers, *model.vision.blocks]:
                block.compile(dynamic=None)
        call = torch.compile(model) if name != "plainvlm" and args.compile else model
        if args.program == "train" and name == "plainvlm":
            loss_of = lambda call=call: call(tokens, pixels, labels)
        elif args.program == "train":
            mask = torch.ones_like(tokens)
            loss_of = lambda call=call: call(input_ids=tokens, attention_mask=mask, pixel_values=pixels if len(pixels) else None, labels=labels).loss
        made[name] = model, (lambda loss_of=loss_of, optimizer=optimizer: step_of(loss_of, optimizer, args, device)) if args.program == "train" else (
            decoding(name, model.eval(), tokens, pixels, args))
    return made


def step_of(loss_of, optimizer, args, device):
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def decoding(name, model, tokens, pixels, args):
    """Greedy, and past any end token: both sides make as many tokens."""
    n, dtype = args.new_tokens, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    model.to(dtype)
    if name == "plainvlm":
        return lambda: model.generate(tokens, pixels.to(dtype), n, stop=[model.cfg.pad_token])
    unsaid = [model.config.image_token_id, model.config.image_token_id + 1]
    return lambda: model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels.to(dtype), max_new_tokens=n, min_new_tokens=n,
                                  do_sample=False, suppress_tokens=unsaid, pad_token_id=0)[:, tokens.shape[1] :]


def seconds(step, args, device):
    """One step -> its time, what it returned."""
    clock = clock_of(args, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    said = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, said


def clock_of(args, device):
    return time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter


def compare(args):
    """Run the sides in turn; -> a dict of what report() prints."""
    device = pick_device(args.device)
    cfg, (rows, words, supervised) = setting(args)
    made = sides(args, cfg, device)
    times, said = {name: [] for name in made}, {name: [] for name in made}
    for i in range(args.repeats + 2):                                       # the first is compiled and warms up, the second makes nothing new
        for name, (_, step) in made.items():
            took, value = seconds(step, args, device)
            times[name] += [took] * (i >= 2)
            said[name].append(value.tolist() if args.program == "sample" else value.item())
    if args.peer and args.program == "train":
        ours, theirs = said["plainvlm"], said["transformers"]
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs))
        if worst > (1e-3 if args.dtype == "float32" else 3e-2):
            raise UserError(f"the losses differ by {worst:.1e}: {ours[:3]} here, {theirs[:3]} there; this would compare two different things")
    same = None if not args.peer else worst if args.program == "train" else sum(a == b for a, b in zip(
        sum(said["plainvlm"][0], []), sum(said["transformers"][0], []))) / (rows * args.new_tokens)
    d, v = cfg.decoder, cfg.vision
    n_t, n_v, T = rows * (words + v.n_token * args.pictures), rows * args.pictures * (v.grid**2 + v.n_prefix), words + v.n_token * args.pictures
    vlm = made["plainvlm"][0]
    size = lambda ps: sum(p.numel() for p in ps)
    flops = (6 * (size(vlm.decoder.layers.parameters()) * n_t + d.vocab_size * d.n_embd * rows * supervised) + 6 * d.n_layer * d.n_head * d.head_dim * T * n_t
             + 2 * size(vlm.vision.blocks[: v.depth].parameters()) * n_v + 4 * (v.grid**2 + v.n_prefix) * v.n_embd * v.depth * n_v
             + 6 * size(vlm.connector.parameters()) * rows * args.pictures * v.n_token)
    result = {"program": args.program, "preset": args.preset, "parameters": size(vlm.parameters()), "dtype": args.dtype, "compile": args.compile, "rows": rows, "tokens": T,
              "supervised": supervised, "vocab": d.vocab_size, "pictures": args.pictures, "device": str(device), "threads": args.threads, "torch": torch.__version__,
              "matmul": matmul_rate(device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32, clock=clock_of(args, device)), "flops": flops,
              "agreement": same, "sides": {}}
    for name in made:
        middle = statistics.median(times[name])
        result["sides"][name] = {"seconds": middle, "least": min(times[name]), "most": max(times[name]),
                                 "tokens_per_second": (n_t if args.program == "train" else rows * args.new_tokens) / middle}
        if args.program == "train":
            result["sides"][name]["mfu"] = flops / middle / result["matmul"]
    if args.peer:
        ratios = sorted(b / a for a, b in zip(times["plainvlm"], times["transformers"]))
        result["ratio"], result["ratio_spread"] = statistics.median(ratios), [ratios[0], ratios[-1]]
    if args.memory and device.type == "cpu":
        for name in made:
            result["sides"][name] |= memory_of(args, name)
    return result


def memory_of(args, name):
    """Peak memory of a process that does nothing but two steps of one side."""
    flags = [x for key in ("preset", "peer", "rows", "words", "supervised", "pictures", "vocab", "layers", "dtype", "new_tokens", "threads", "device")
             for x in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    said = subprocess.run([sys.executable, __file__, args.program, *flags, "--side", name], capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"the process that measures the memory of {name} failed: {said.stderr.strip().splitlines()[-1]}")
    return json.loads(said.stdout.strip().splitlines()[-1])


def alone(args):
    device = pick_device(args.device)
    (_, step), = sides(args, setting(args)[0], device).values()
    before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
    open("/proc/self/clear_refs", "w").write("5")                           # what was held for a moment while building does not count
    step(), step()
    peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"peak_bytes": peak, "step_bytes": peak - before}))
    return 0


def report(r):
    what = f"{r['rows']} records of {r['tokens']} tokens" + (f", {r['supervised']} supervised" if r["program"] == "train" else "")
    print(f"{r['program']}: {r['preset']}, {r['parameters'] / 1e6:.1f}M parameters, vocabulary {r['vocab']:,}, {what}, {r['dtype']}{', compiled' if r['compile'] else ''}, "
          f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] > 1)}, torch {r['torch']}")
    print(f"{'':14}{'ms':>9}{'least':>9}{'most':>9}{'tokens/s':>11}{'MFU':>7}{'peak MB':>9}{'step MB':>9}")
    for name, s in r["sides"].items():
        print(f"{name:14}{1e3 * s['seconds']:9.1f}{1e3 * s['least']:9.1f}{1e3 * s['most']:9.1f}{s['tokens_per_second']:11,.0f}"
              + (f"{s['mfu']:7.1%}" if "mfu" in s else f"{'':7}") + (f"{s['peak_bytes'] / 1e6:9,.0f}{s['step_bytes'] / 1e6:9,.0f}" if "peak_bytes" in s else ""))
    if "ratio" in r:
        a, b = r["sides"]["plainvlm"], r["sides"]["transformers"]
        print(f"{r['ratio']:.2f} times as fast ({r['ratio_spread'][0]:.2f} to {r['ratio_spread'][1]:.2f})"
              + (f"; peak memory {a['peak_bytes'] / b['peak_bytes']:.2f}, of the step alone {a['step_bytes'] / b['step_bytes']:.2f} times" if "peak_bytes" in a else "")
              + (f"; losses agree to {r['agreement']:.0e}" if r["program"] == "train" else f"; {r['agreement']:.0%} of the tokens are the same"))
    print(f"a square matrix product: {r['matmul'] / 1e9:,.0f} GFLOP/s" + (f"; a step: {r['flops'] / 1e9:,.1f} GFLOP" if r["program"] == "train" else ""))


def grow(args):
    """A table and a plot of time and memory against one size; the power says how they grow: 1 is linear."""
    flag, values = GROW[args.grow]
    results = []
    for value in values:
        results.append(compare(argparse.Namespace(**vars(args) | {flag: value, "supervised": args.supervised or 16})))
        s = results[-1]["sides"]["plainvlm"]
        print(f"{args.grow} {value:6}  {1e3 * s['seconds']:9.1f} ms  {s.get('step_bytes', 0) / 1e6:9,.0f} MB  {s['tokens_per_second']:9,.0f} tokens/s"
              + (f"  {results[-1]['ratio']:.2f} times the peer" if args.peer else ""), flush=True)
    for what in ("seconds", "step_bytes"):
        ys = [r["sides"]["plainvlm"].get(what) for r in results]
        if all(ys) and values[-2]:
            print(f"{what} grows with {args.grow} to the power {math.log(ys[-1] / ys[-2]) / math.log(values[-1] / values[-2]):.2f} (last two)")
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1))
    plot(f"{args.out}.png", args.grow, values, {name: [r["sides"][name]["seconds"] for r in results] for name in results[0]["sides"]})
    return 0


def plot(path, name, values, lines, width=640, height=400):
    """Milliseconds a step against a size, both from 0: what is linear looks it."""
    image = Image.new("RGB", (width, height), "white")
    draw, most = ImageDraw.Draw(image), max(map(max, lines.values()))
    x, y = lambda v: 64 + (width - 96) * v / values[-1], lambda s: height - 44 - (height - 84) * s / most
    draw.line([(64, 40), (64, height - 44), (width - 32, height - 44)], fill="#999999")
    for v in values:
        draw.text((x(v), height - 36), f"{v:,}", fill="#555555", anchor="mt", font_size=13)
    for part in (0.25, 0.5, 0.75, 1.0):
        draw.text((58, y(part * most)), f"{1e3 * part * most:.0f}", fill="#555555", anchor="rm", font_size=13)
    for (side, ys), color in zip(lines.items(), ("#1f6fb5", "#d6502b")):
        draw.line([(x(v), y(s)) for v, s in zip(values, ys)], fill=color, width=2)
        draw.text((x(values[-1]), y(ys[-1]) - 6), side, fill=color, anchor="rb", font_size=13)
    draw.text((64, 14), f"ms a step against {name}", fill="#222222", font_size=14)
    image.save(path)


if __name__ == "__main__":
    sys.exit(run(main))
