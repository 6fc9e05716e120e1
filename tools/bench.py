"""tools.bench: moved here; to be rewritten."""

import argparse
import copy
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import mpo
from conversation import Tokenizer, encode_conversation
from data import Examples, Records, micro_batches, picture_paths
from model import PRESETS, VLM, DecoderConfig, VLMConfig, init_weights
from support.cli import Flags, UserError, one_of, parse_args, pick_device, run
from support.plan import matmul_rate
from train import TOY
from vision import VisionConfig, cut_tiles, open_image

# Sizes, and a batch: records, words a record, of which supervised
SIZES = {
    "10m": (VLMConfig(VisionConfig(112, 14, 192, 4, 3, 768), DecoderConfig(2048, 6, 4, 4, 256, 64, 704, 1024), image_token=2046, pad_token=2047), 32, 48, 32),
    "100m": (VLMConfig(VisionConfig(168, 14, 384, 8, 6, 1536), DecoderConfig(32000, 10, 10, 10, 640, 64, 1728, 1024), image_token=31998, pad_token=31999), 8, 112, 64),
    "llava-1.5-7b": (PRESETS["llava-1.5-7b"], 10, 240, 160),
}
GROW = {"length": ("words", (32, 64, 128, 256, 512)), "pictures": ("pictures", (0, 1, 2, 4, 8)), "vocab": ("vocab", (2048, 8192, 32000, 92553)),
        "batch": ("rows", (4, 8, 16, 32, 64))}
WHAT = {"train": "one optimizer step", "mpo": "one step of preference learning", "sample": "greedy decoding",
        "data": "records a second that one core prepares, and that a step takes"}



def main(argv=None):
    args = read(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads)
    if args.side != "both":
        return alone(args)
    if args.grow:
        one_of("--grow", args.grow, list(GROW))
        return grow(args)
    result = data_path(args) if args.program == "data" else compare(args)
    if args.program != "data":
        report(result)
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1))
    return 0



def read(argv):
    """Flags -> their values, checked."""
    cli = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = cli.add_subparsers(required=True, dest="program", metavar=f"{{{','.join(WHAT)}}}")
    for name in WHAT:
        sub = programs.add_parser(name, help=WHAT[name], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--preset", default="10m", help=f"the model's size: {', '.join(SIZES)}")
        sub.add_argument("--peer", default="", help="transformers: LlavaForConditionalGeneration (sdpa); empty: none")
        sub.add_argument("--rows", type=int, default=0, help="records or pairs in the batch; 0: as the preset says, one for sample")
        sub.add_argument("--words", type=int, default=0, help="text tokens a record, for mpo without the answers; 0: as the preset says")
        sub.add_argument("--supervised", type=int, default=0, help="of them supervised, for mpo the length of an answer; 0: as the preset says")
        sub.add_argument("--pictures", type=int, default=1, help="pictures a record")
        sub.add_argument("--vocab", type=int, default=0, help="words in the vocabulary; 0: as the preset says")
        sub.add_argument("--layers", type=int, default=0, help="decoder blocks; 0: as the preset says")
        sub.add_argument("--dtype", default="float32", help="float32, or bfloat16 (autocast, on both sides)")
        sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile: here the blocks, there the model")
        sub.add_argument("--compile-peer", action=argparse.BooleanOptionalAction, default=True, help="--no-compile-peer: --compile leaves the peer as it is")
        sub.add_argument("--precomputed", action=argparse.BooleanOptionalAction, default=True, help="mpo: here the reference is not asked again in every step")
        sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory in processes of their own")
        sub.add_argument("--repeats", type=int, default=7, help="steps of each side that count, after two that do not")
        sub.add_argument("--new-tokens", type=int, default=64, help="sample: tokens to generate")
        sub.add_argument("--threads", type=int, default=1, help="CPU threads; above 1 the time is the clock's, and a busy machine is in it")
        sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        sub.add_argument("--grow", default="", help=f"train: step through sizes of one of {', '.join(GROW)}, alone or beside the peer")
        sub.add_argument("--records", type=int, default=3_000_000, help="data: lines of the JSONL file that is opened")
        sub.add_argument("--side", default="both", help=argparse.SUPPRESS)      # for the processes that measure memory
        sub.add_argument("--out", default="bench", help="name of the files .json and, of --grow, .png")
    args = parse_args(cli, argv)
    args.command = shlex.join(["python", "bench.py", *argv])
    one_of("--preset", args.preset, list(SIZES))
    one_of("--peer", args.peer, ["", "transformers"])
    one_of("--dtype", args.dtype, ["float32", "bfloat16"])
    return args



def setting(args):
    """-> VLMConfig, (rows, words, supervised) with the flags put in; for mpo (pairs, words of the question, words of an answer)."""
    cfg, rows, words, supervised = SIZES[args.preset]
    if args.program == "mpo":
        cfg, rows, words, supervised = replace(cfg, vision=replace(cfg.vision, image_size=16 * cfg.vision.patch_size)), 8, 32, 60
    words, supervised, V = args.words or words, args.supervised or supervised, args.vocab or cfg.decoder.vocab_size
    length = cfg.vision.n_token * args.pictures + words + {"sample": args.new_tokens, "mpo": 2 * supervised}.get(args.program, 0)
    decoder = replace(cfg.decoder, vocab_size=V, n_layer=args.layers or cfg.decoder.n_layer, block_size=max(cfg.decoder.block_size, length))
    cfg = replace(cfg, decoder=decoder, image_token=V - 2, pad_token=V - 1)
    return cfg, (args.rows or (1 if args.program == "sample" else rows), words, supervised if args.program == "mpo" else min(supervised, words - 1))



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
    """{name: (model, step)}; both models have the same weights. A step returns its loss, or the ids (sample)."""
    rows, words, supervised = setting(args)[1]
    tokens, labels, pixels = batch_of(cfg, args, rows, words + 2 * supervised * (args.program == "mpo"), supervised, device)
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
        call = torch.compile(model) if name != "plainvlm" and args.compile and args.compile_peer else model
        if args.program == "sample":
            made[name] = model, decoding(name, model.eval(), tokens, pixels, args)
            continue
        if args.program == "mpo":
            loss_of = (pairs_here if name == "plainvlm" else pairs_there)(model, call, tokens, pixels, supervised, args)
        elif name == "plainvlm":
            loss_of = lambda call=call: call(tokens, pixels, labels)
        else:
            mask = torch.ones_like(tokens)
            loss_of = lambda call=call: call(input_ids=tokens, attention_mask=mask, pixel_values=pixels if len(pixels) else None, labels=labels).loss
        made[name] = model, lambda loss_of=loss_of, optimizer=optimizer: step_of(loss_of, optimizer, args, device)
    return made



def pairs_here(model, call, tokens, pixels, n, args):
    """tokens (B, prefix + 2n) hold a pair as one row, and are collated as mpo.py does it."""
    p, N = tokens.shape[1] - 2 * n, model.cfg.vision.n_token
    layout = torch.cartesian_prod(torch.arange(args.pictures), torch.arange(N))
    examples = [mpo.pair_row(row[:p], row[p:-n], row[-n:]) | {"pixels": some, "layout": layout, "id": "", "index": 0, "pictures_of": k}
                for k, (row, some) in enumerate(zip(tokens.tolist(), pixels.split(args.pictures)))]
    batch = mpo.to_device(mpo.collate_pairs(examples, model.cfg.pad_token), tokens.device)
    ref = None
    if args.precomputed:
        with torch.no_grad(), half(args, tokens.device):
            known = mpo.pair_log_probs(model, batch)[0]
    else:
        ref = copy.deepcopy(model).requires_grad_(False)
        ref.vision = model.vision                                           # frozen: one is enough

    def loss_of():
        with torch.no_grad():
            seen = model.features(batch["pixels"])
            s_ref = known if ref is None else mpo.pair_log_probs(ref, batch, seen)[0]
        return pair_loss(mpo.pair_log_probs(call, batch, seen)[0], s_ref, n)
    return loss_of



def pairs_there(model, call, tokens, pixels, n, args):
    """The same pairs as 2 B rows, the chosen answers first."""
    two = torch.cat([tokens[:, :-n], torch.cat([tokens[:, : -2 * n], tokens[:, -n:]], dim=1)])              # (2B, prefix + n)
    both, mask, ref = torch.cat([pixels, pixels]), torch.ones_like(two), copy.deepcopy(model).requires_grad_(False)
    answer = torch.arange(1, two.shape[1], device=two.device) >= two.shape[1] - n

    def sums(model):
        logits = model(input_ids=two, attention_mask=mask, pixel_values=both).logits[:, :-1].float()
        return (logits.log_softmax(-1).gather(-1, two[:, 1:, None])[:, :, 0] * answer).sum(1).view(2, -1).T              # (B, 2)

    def loss_of():
        with torch.no_grad():
            s_ref = sums(ref)
        return pair_loss(sums(call), s_ref, n)
    return loss_of



def pair_loss(s, s_ref, n, cfg=mpo.MPOConfig()):
    delta, _ = mpo.update_delta(0.0, 0, cfg.beta * (s - s_ref))
    terms = mpo.mpo_terms(s, s_ref, torch.full_like(s, n), delta, cfg)
    return sum(weight * term for weight, term in terms.values())



def half(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")



def step_of(loss_of, optimizer, args, device):
    with half(args, device):
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
    if args.peer and args.program != "sample":
        ours, theirs = said["plainvlm"], said["transformers"]
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs))
        if worst > (1e-3 if args.dtype == "float32" else 3e-2):
            raise UserError(f"the losses differ by {worst:.1e}: {ours[:3]} here, {theirs[:3]} there; this would compare two different things")
    same = None if not args.peer else worst if args.program != "sample" else sum(a == b for a, b in zip(
        sum(said["plainvlm"][0], []), sum(said["transformers"][0], []))) / (rows * args.new_tokens)
    T = words + cfg.vision.n_token * args.pictures + (2 * supervised if args.program == "mpo" else 0)
    flops, matmul = flops_of(cfg, rows, T, supervised, args.pictures), matmul_rate(
        device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32, clock=clock_of(args, device))
    result = {"command": args.command, "program": args.program, "preset": args.preset, "parameters": size(made["plainvlm"][0].parameters()), "dtype": args.dtype,
              "compile": args.compile, "compile_peer": args.compile and args.compile_peer, "rows": rows, "tokens": T,
              "supervised": supervised, "vocab": cfg.decoder.vocab_size, "pictures": args.pictures, "device": str(device), "threads": args.threads, "torch": torch.__version__,
              "matmul": matmul, "flops": flops, "agreement": same, "sides": {}}
    # How many tokens each side sends through a decoder in a step
    computed = {"train": dict.fromkeys(made, rows * T), "sample": dict.fromkeys(made, rows * args.new_tokens),
                "mpo": {"plainvlm": rows * T * (1 if args.precomputed else 2), "transformers": 2 * 2 * rows * (T - supervised)}}[args.program]
    for name in made:
        middle = statistics.median(times[name])
        result["sides"][name] = {"seconds": middle, "least": min(times[name]), "most": max(times[name]),
                                 "tokens": computed[name], "tokens_per_second": computed[name] / middle, "rows_per_second": rows / middle}
        if args.program == "train":
            result["sides"][name]["mfu"] = flops / middle / matmul
    if args.peer:
        ratios = sorted(b / a for a, b in zip(times["plainvlm"], times["transformers"]))
        result["ratio"], result["ratio_spread"] = statistics.median(ratios), [ratios[0], ratios[-1]]
    if args.memory and device.type == "cpu":
        for name in made:
            result["sides"][name] |= memory_of(args, name)
    return result



def size(parameters):
    return sum(p.numel() for p in parameters)



def flops_of(cfg, rows, T, supervised, pictures):
    """Of a training step, as the docstring above counts them."""
    d, v = cfg.decoder, cfg.vision
    with torch.device("meta"):
        vlm = VLM(cfg)
    n_t, n_s, n_v, end = rows * T, rows * supervised, rows * pictures * (v.grid**2 + v.n_prefix), vlm.decoder.layers[-1]
    late = size([*end.mlp.parameters(), *end.self_attn.o_proj.parameters()])
    return (6 * ((size(vlm.decoder.layers.parameters()) - late) * n_t + (late + d.vocab_size * d.n_embd) * n_s) + 6 * d.n_layer * d.n_head * d.head_dim * T * n_t
            + 2 * size(vlm.vision.blocks[: v.depth].parameters()) * n_v + 4 * (v.grid**2 + v.n_prefix) * v.n_embd * v.depth * n_v
            + 6 * size(vlm.connector.parameters()) * rows * pictures * v.n_token)



def memory_of(args, name):
    """Peak memory of a process that does nothing but two steps of one side."""
    flags = [x for key in ("preset", "peer", "rows", "words", "supervised", "pictures", "vocab", "layers", "dtype", "new_tokens", "threads", "device")
             for x in (f"--{key.replace('_', '-')}", str(getattr(args, key)))] + ["--precomputed" if args.precomputed else "--no-precomputed"]
    said = subprocess.run([sys.executable, __file__, args.program, *flags, "--side", name], capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"the process that measures the memory of {name} failed: {said.stderr.strip().splitlines()[-1]}")
    return json.loads(said.stdout.strip().splitlines()[-1])



def alone(args):
    device = pick_device(args.device)
    (_, step), = sides(args, setting(args)[0], device).values()
    before, peak = held_while(lambda: (step(), step()))
    print(json.dumps({"peak_bytes": peak, "step_bytes": peak - before}))
    return 0



def held_while(work):
    """Bytes that this process held before, and at most during work()."""
    status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                                     # what was held for a moment earlier does not count
    work()
    return before, status("VmHWM")



def report(r):
    what = f"{r['rows']} records of {r['tokens']} tokens" + (f", {r['supervised']} supervised" if r["program"] == "train" else "")
    if r["program"] == "mpo":
        what = f"{r['rows']} pairs of {r['tokens'] - 2 * r['supervised']} tokens and {r['supervised']} each answer"
    print(f"$ {r['command']}")
    print(f"{r['program']}: {r['preset']}, {r['parameters'] / 1e6:.1f}M parameters, vocabulary {r['vocab']:,}, {what}, {r['dtype']}{', compiled' if r['compile'] else ''}{' here alone' if r['compile'] > r['compile_peer'] else ''}, "
          f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] > 1)}, torch {r['torch']}")
    if r["program"] == "mpo":
        print("tokens through a decoder: " + ", ".join(f"{s['tokens']:,} {name}" for name, s in r["sides"].items()))
    print(f"{'':14}{'ms':>9}{'least':>9}{'most':>9}{'tokens/s':>11}{'MFU':>7}{'peak MB':>9}{'step MB':>9}")
    for name, s in r["sides"].items():
        print(f"{name:14}{1e3 * s['seconds']:9.1f}{1e3 * s['least']:9.1f}{1e3 * s['most']:9.1f}{s['tokens_per_second']:11,.0f}"
              + (f"{s['mfu']:7.1%}" if "mfu" in s else f"{'':7}") + (f"{s['peak_bytes'] / 1e6:9,.0f}{s['step_bytes'] / 1e6:9,.0f}" if "peak_bytes" in s else ""))
    if "ratio" in r:
        a, b = r["sides"]["plainvlm"], r["sides"]["transformers"]
        print(f"{r['ratio']:.2f} times as fast ({r['ratio_spread'][0]:.2f} to {r['ratio_spread'][1]:.2f})"
              + (f"; peak memory {a['peak_bytes'] / b['peak_bytes']:.2f}, of the step alone {a['step_bytes'] / b['step_bytes']:.2f} times" if "peak_bytes" in a else "")
              + (f"; losses agree to {r['agreement']:.0e}" if r["program"] != "sample" else f"; {r['agreement']:.0%} of the tokens are the same"))
    print(f"a square matrix product: {r['matmul'] / 1e9:,.0f} GFLOP/s" + (f"; a step: {r['flops'] / 1e9:,.1f} GFLOP" if r["program"] == "train" else "")
          + ("; on a GPU: not measured" if r["device"] == "cpu" else ""))



def grow(args):
    """A table and a plot of time and memory against one size. The power says how they grow over the last two sizes: 1 is linear."""
    flag, values = GROW[args.grow]
    results = []
    print(f"$ {args.command}\n{args.grow:>10}{'ms':>10}{'step MB':>10}{'tokens/s':>11}" + f"{'times the peer':>16}" * bool(args.peer), flush=True)
    for value in values:
        results.append(compare(argparse.Namespace(**vars(args) | {flag: value, "supervised": args.supervised or 16})))
        s = results[-1]["sides"]["plainvlm"]
        print(f"{results[-1]['tokens'] if args.grow == 'length' else value:10,}{1e3 * s['seconds']:10.1f}{s.get('step_bytes', 0) / 1e6:10,.0f}{s['tokens_per_second']:11,.0f}"
              + (f"{results[-1]['ratio']:16.2f}" if args.peer else ""), flush=True)
    if args.grow == "length":                                               # of a whole record, its picture included
        values = [r["tokens"] for r in results]
    lines = {}
    for name, what, unit, scale in ("time", "seconds", "ms", 1e3), ("memory", "step_bytes", "MB", 1e-6):
        ys = [r["sides"]["plainvlm"].get(what) for r in results]
        if all(ys):
            lines[unit] = {side: [scale * r["sides"][side][what] for r in results] for side in results[0]["sides"]}
            if values[-2]:
                print(f"{name} grows with {args.grow} to the power {math.log(ys[-1] / ys[-2]) / math.log(values[-1] / values[-2]):.2f} (last two)")
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1))
    plot(f"{args.out}.png", args.grow, values, lines)
    return 0



def plot(path, name, values, panels, width=640, height=400):
    """Time, and memory if it was measured, of a step against a size, all from 0: what is linear looks it."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for left, (unit, lines) in zip(range(0, width * len(panels), width), panels.items()):
        most = max(map(max, lines.values()))
        x, y = lambda v: left + 64 + (width - 96) * v / values[-1], lambda s: height - 44 - (height - 84) * s / most
        draw.line([(x(0), y(most)), (x(0), y(0)), (x(values[-1]), y(0))], fill="#999999")
        for v in values:
            draw.text((x(v), height - 36), f"{v:,}", fill="#555555", anchor="mt", font_size=13)
        for part in (0.25, 0.5, 0.75, 1.0):
            draw.text((x(0) - 6, y(part * most)), f"{part * most:.0f}", fill="#555555", anchor="rm", font_size=13)
        for (side, ys), color in zip(lines.items(), ("#1f6fb5", "#d6502b")):
            draw.line([(x(v), y(s)) for v, s in zip(values, ys)], fill=color, width=2)
            draw.text((x(values[-1]), y(ys[-1]) - 6), side, fill=color, anchor="rb", font_size=13)
        draw.text((x(0), 14), f"{unit} a step against {name}", fill="#222222", font_size=14)
    image.save(path)



def data_path(args, pictures=16, some=96):
    """One core: a long file is opened; `some` of its records are prepared, piece by piece, then as train.py's loader does; beside what a step takes."""
    cfg, (rows, *_) = setting(args)
    clock, took, tok, template = clock_of(args, torch.device("cpu")), {}, Tokenizer(TOY["llm"]), "vicuna_v1"

    def timed(name, work, *given):
        began = clock()
        made = work(*given)
        took[name] = took.get(name, 0.0) + clock() - began
        return made

    print(f"$ {args.command}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.jsonl"
        draw_photos(folder, pictures)
        said = [("human", "<image>\nWhat can be seen in this picture?"), ("gpt", "A dog lies on a lawn, and behind it stands a house. ")]
        lines = "".join(json.dumps({"id": str(i), "image": f"{i % pictures}.jpg", "conversations": [
            {"from": who, "value": text * (1 + i % 8 * (who == "gpt"))} for who, text in said]}) + "\n" for i in range(min(args.records, 1000)))
        with open(file, "w") as f:
            for _ in range(max(1, args.records // 1000)):
                f.write(lines)
        kept = []
        before, most = held_while(lambda: kept.append(timed("open", Records, file, folder)))
        records, opened, n_bytes = kept[0], took.pop("open"), file.stat().st_size
        examples = Examples(records, tok, template, cfg.vision, cfg.image_mode, 10**6)
        picked = [int(i) for i in np.linspace(0, len(records) - 1, some)]
        for i in picked:
            record = timed("find and parse the record", records.__getitem__, i)
            image = timed("decode the JPEG", open_image, picture_paths(record)[0])
            _, layout = timed("pad and resize", cut_tiles, image, cfg.vision, cfg.image_mode)
            tokens, _ = timed("tokenise", encode_conversation, tok, record["turns"], template, [len(layout)])
        each = [timed("prepare", examples.__getitem__, i) for i in picked]
        timed("batch", micro_batches, each, rows, tok.pad)
    prepare = took.pop("prepare")
    print(f"{len(records):,} records, {n_bytes / 1e6:,.0f} MB of JSONL: opened in {opened:.1f} s, {(most - before) / 1e6:,.0f} MB more held")
    for name, seconds in took.items():
        print(f"{name:28}{1e3 * seconds / some:9.3f} ms a record")
    rate = some / (prepare + took["batch"])
    print(f"{'all, as in training':28}{1e3 / rate:9.3f} ms a record: {rate:,.0f} records a second and core ({image.width}x{image.height} JPEG to {cfg.vision.image_size} px)")
    result = {"command": args.command, "records": len(records), "open_seconds": opened, "open_bytes": most - before, "rate": rate,
              "milliseconds": {name: 1e3 * seconds / some for name, seconds in took.items()}}
    if args.preset in PRESETS:                                              # too large to be run here
        flops = flops_of(cfg, *setting(args)[1][:1], cfg.vision.n_token + setting(args)[1][1], setting(args)[1][2], 1) / rows
        print(f"a record of {args.preset} is {flops / 1e12:.1f} TFLOP: one core keeps up with a GPU that does {rate * flops / 1e12:,.0f} TFLOP/s of them (computed); its step: not measured")
        return result | {"flops": flops}
    step = compare(argparse.Namespace(**vars(args) | {"program": "train", "peer": "", "memory": False}))["sides"]["plainvlm"]
    print(f"a training step of {args.preset} takes {step['rows_per_second']:,.1f} records a second and core: {rate / step['rows_per_second']:.1f} times that is ready. On a GPU: not measured")
    return result | {"step_rate": step["rows_per_second"], "times": rate / step["rows_per_second"]}



def draw_photos(folder, n, w=640, h=480):
    """JPEGs as large as COCO's, soft shapes with grain: flat drawings would be decoded faster than photos are."""
    draw = np.random.default_rng(0)
    for i in range(n):
        soft = Image.fromarray(draw.integers(0, 256, (h // 32, w // 32, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
        Image.fromarray((np.asarray(soft) + draw.normal(0, 8, (h, w, 1))).clip(0, 255).astype(np.uint8)).save(Path(folder) / f"{i}.jpg", quality=90)


if __name__ == "__main__":
    sys.exit(run(main))
