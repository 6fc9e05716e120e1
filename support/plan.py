"""support.plan: moved here; to be rewritten."""

import math
import os
import time

import torch

from conversation import Tokenizer, encode_conversation

from model import IGNORE, PRESETS, VLM
from support.cli import UserError
from support.optim import lr_of, part_of
from support.weights import read_model, tokenizer_home
from vision import TILINGS, cut_tiles, open_image



def dry_run(cfg, records, device, n=200):
    """Print what the run would be, from configs and a look at n records; no weight is read."""
    from train import blueprint, freeze, is_half, n_step, set_mode
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
        raise UserError(f"{cfg.data}: not one of {bad} records looked at could be used; see python -m tools.show check")
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
