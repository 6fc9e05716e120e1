"""`train.py --dry-run`: what a run would be, from configs and a look at some records. No weight is read."""

import math
import os
import time

import torch

from conversation import encode_conversation
from data import picture_paths
from model import IGNORE
from support.cli import UserError
from support.distributed import uses_autocast
from support.optim import lr_of, part_of
from vision import TILINGS, cut_tiles, open_image


def dry_run(cfg, records, n_step, vlm, tok, device):
    """vlm: on the meta device, with what trains marked."""
    look = look_at_records(cfg, records, vlm, tok)
    n_process = int(os.environ.get("WORLD_SIZE", 1))
    n_record = n_step * cfg.batch_size
    decoder, vision = vlm.cfg.decoder, vlm.cfg.vision
    template = template_of(cfg, vlm)
    print(f"model      {cfg.model}, decoder of {decoder.n_layer} blocks {decoder.n_embd} wide, "
          f"{vision.n_token} visual tokens for a tile of {vision.image_size} px, template {template}")
    n_train = print_parameters(cfg, vlm)
    print_data(records, look)
    n_token = n_record * look["n_token"] / 1e6
    print(f"steps      {n_step:,} of {cfg.batch_size} records, {n_token:,.1f}M tokens")

    memory = count_memory(cfg, vlm, n_train, look["n_token"], device)
    n_shard = n_process if cfg.shard else 1
    for name in memory:
        if name != "activations, about":
            memory[name] /= n_shard
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    total = sum(memory.values()) / 1e9
    print(f"memory     {parts}: {total:.1f} GB" + (f" in each of {n_shard} processes" if n_shard > 1 else ""))

    flops = count_flops(cfg, vlm, look) * n_record
    speed = matmul_rate(device, torch.bfloat16 if in_bfloat16(cfg, device) else torch.float32)
    hours = flops / speed / 0.5 / 3600 / n_process
    print(f"time       {flops:.3g} FLOPs; at half of the {speed / 1e12:.2f} TFLOP/s "
          f"that a matrix product reaches here: {hours:,.1f} hours")
    saved = 4 * n_train if cfg.lora_r else memory["weights"] * n_shard
    checkpoint = saved + memory["optimizer"] * n_shard
    print(f"disk       {saved / 1e9:.2f} GB the model, {checkpoint / 1e9:.2f} GB a checkpoint, "
          "of which there are two for a moment")
    return 0


def template_of(cfg, vlm):
    return cfg.template or ("plain" if cfg.stage == "pretrain" else vlm.cfg.template)


def in_bfloat16(cfg, device):
    return cfg.weights == "bfloat16" or uses_autocast(cfg, device)


def look_at_records(cfg, records, vlm, tok, n=200):
    """Means over n records: tokens, supervised, pictures, tiles. Only tilings open the pictures."""
    vision, mode = vlm.cfg.vision, vlm.cfg.image_mode
    lengths, n_bad = [], 0
    n_supervised = n_picture = n_tile = 0
    for i in range(0, len(records), -(-len(records) // n)):
        try:
            record = records[i]
            n_visual = [vision.n_token] * len(record["images"])
            n_cut = len(n_visual)
            if mode in TILINGS:
                images = [open_image(path) for path in picture_paths(record)]
                cut = [cut_tiles(image, vision, mode) for image in images]
                n_visual = [len(layout) for _, layout in cut]
                n_cut = sum(len(tiles) for tiles, _ in cut)
            tokens, labels = encode_conversation(tok, record["turns"], template_of(cfg, vlm), n_visual)
        except UserError:
            n_bad += 1
            continue
        lengths.append(len(tokens))
        n_supervised += sum(label != IGNORE for label in labels)
        n_picture += len(n_visual)
        n_tile += n_cut
    if not lengths:
        raise UserError(f"{cfg.data}: none of {n_bad} records could be used; see python -m tools.show check")
    n = len(lengths)
    return {
        "n": n, "n_bad": n_bad, "shortest": min(lengths), "longest": max(lengths),
        "n_token": sum(lengths) / n, "supervised": n_supervised / sum(lengths),
        "pictures": n_picture / n, "tiles": n_tile / n,
    }


def print_parameters(cfg, vlm):
    """A line for each part; -> how many parameters train."""
    parts = {}
    for name, p in vlm.named_parameters():
        counts = parts.setdefault(part_of(name), [0, 0])
        counts[0] += p.numel()
        counts[1] += p.numel() * p.requires_grad
    for part, (n_all, n_train) in parts.items():
        text = f"{n_train / 1e6:,.2f}M train at {lr_of(part, cfg):g}" if n_train else "frozen"
        if cfg.lora_r and part == "llm":
            text += f" (LoRA of rank {cfg.lora_r})"
        print(f"  {part:9} {n_all / 1e6:11,.2f}M parameters, {text}")
    return sum(n_train for _, n_train in parts.values())


def print_data(records, look):
    bad = f"; {look['n_bad']} could not be used" if look["n_bad"] else ""
    print(f"data       {len(records):,} records; in {look['n']} of them {look['n_token']:.0f} tokens each "
          f"({look['shortest']} to {look['longest']}), "
          f"{look['pictures']:.2f} pictures in {look['tiles']:.2f} tiles, "
          f"{look['supervised']:.0%} supervised{bad}")


def count_memory(cfg, vlm, n_train, n_token, device):
    """Bytes. Weights, gradients and moments are sure. Activations are a guess: of a block about 10 rows as
    wide as the model and 4 as wide as its MLP."""
    decoder = vlm.cfg.decoder
    half = in_bfloat16(cfg, device)
    is_split = cfg.weights == "bfloat16"
    n_byte = 2 if half else 4
    in_memory = cfg.token_budget or (cfg.micro_batch_size or cfg.batch_size) * n_token
    a_block = (10 * decoder.n_embd + 4 * decoder.n_hidden) * n_byte
    n_again = min(cfg.recompute, decoder.n_layer)  # of these only the input is kept
    a_token = a_block * (decoder.n_layer - n_again) + n_again * decoder.n_embd * n_byte
    small_gradients = is_split and not cfg.token_budget and not cfg.micro_batch_size
    return {
        "weights": sum(p.numel() * p.element_size() for p in vlm.parameters()),
        "their bfloat16 copies": 2 * sum(p.numel() for p in vlm.parameters()) if half and not is_split else 0,
        "gradients": n_train * (2 if small_gradients else 4),
        "optimizer": n_train * (10 if is_split else 8),
        "activations, about": in_memory * a_token,
    }


def count_flops(cfg, vlm, look):
    """Of a record. For each weight and token 2 forward, 2 for the inputs' gradients, 2 for its own."""
    decoder, vision = vlm.cfg.decoder, vlm.cfg.vision
    trains_llm = any(p.requires_grad for p in vlm.decoder.parameters()) and not cfg.lora_r
    blocks = sum(p.numel() for p in vlm.decoder.layers.parameters())
    head = decoder.vocab_size * decoder.n_embd * look["supervised"]  # it runs on supervised tokens only
    again = 2 * blocks * min(cfg.recompute / decoder.n_layer, 1)
    flops = look["n_token"] * ((6 if trains_llm else 4) * (blocks + head) + again)

    tower = [p for name, p in vlm.named_parameters() if part_of(name) == "vision"]
    per_weight = 6 if any(p.requires_grad for p in tower) else 2
    return flops + per_weight * sum(p.numel() for p in tower) * look["tiles"] * vision.grid**2


def matmul_rate(device, dtype, n=1024, clock=time.perf_counter):
    """FLOP/s of a square matrix product, the best of a few."""
    if device.type == "cuda":
        n *= 8
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = clock()
        (x @ x)[0, 0].item()  # .item() waits for a GPU
        best = min(best, clock() - began)
    return 2 * n**3 / best
