"""What a run will be: `train.py --dry-run`, from configs and a look at some records, without any weight; and
how many steps fit in --minutes."""

import math
import time
from itertools import islice

import torch

from support.cli import UserError
from support.distributed import uses_autocast
from support.optim import lr_of, part_of
from support.processes import gather, world_size


def dry_run(cfg, examples, n_step, vlm, device):
    """vlm: on the meta device, with what trains marked."""
    look = look_at_records(examples)
    n_token, n_picture, n_tile = look.mean(0).tolist()
    n_record = n_step * cfg.batch_size
    print_parameters(cfg, vlm)
    print(f"data       {len(examples):,} records; in {len(look)} of them {n_token:.0f} tokens each "
          f"(the longest {look[:, 0].max():.0f}), {n_picture:.2f} pictures in {n_tile:.2f} tiles")
    print(f"steps      {n_step:,} of {cfg.batch_size} records, {n_record * n_token / 1e6:,.1f}M tokens")
    if cfg.minutes:
        print("           so many without --minutes, whose steps are counted when training begins")

    memory = count_memory(cfg, vlm, n_token, device)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    total = sum(memory.values()) / 1e9
    print(f"memory     {parts}: {total:.1f} GB in each of {world_size()} processes")

    # A good run reaches half the speed of a matrix product.
    flops = count_flops(cfg, vlm, n_token, n_tile) * n_record
    hours = flops / (0.5 * 312e12) / 3600 / world_size()
    print(f"time       {flops:.3g} FLOPs; {world_size()} x A100, at half of its 312 TFLOP/s in bfloat16: "
          f"{hours:,.1f} hours")
    return 0


def look_at_records(examples, n=200):
    """Tokens, pictures and tiles of about n records, (n, 3)."""
    counts = []
    for i in range(0, len(examples), math.ceil(len(examples) / n)):
        example = examples[i]
        if "skipped" not in example:
            counts.append([len(example["tokens"]), len(example["n_visual"]), len(example["pixels"])])
    if not counts:
        raise UserError(f"no record could be used: {example['skipped']}")
    return torch.tensor(counts, dtype=torch.float64)


def count_parts(vlm):
    """{part: [its parameters, those of them that train]}"""
    parts = {}
    for name, p in vlm.named_parameters():
        counts = parts.setdefault(part_of(name), [0, 0])
        counts[0] += p.numel()
        counts[1] += p.numel() * p.requires_grad
    return parts


def print_parameters(cfg, vlm):
    for part, (n_all, n_train) in count_parts(vlm).items():
        lr = lr_of(part, cfg)
        text = f"{n_train / 1e6:,.2f}M train at {lr:g}" if n_train else "frozen"
        if n_train and lr > 0.1:
            text += ", and AdamW moves each weight by about that in a step: do you mean it?"
        if cfg.lora_r and part == "llm":
            text += f" (LoRA of rank {cfg.lora_r})"
        print(f"{part:10} {n_all / 1e6:11,.2f}M parameters, {text}")


def count_memory(cfg, vlm, n_token, device):
    """Bytes in each process. Weights, gradients and moments are sure. Activations are a guess: of a block
    about 10 rows as wide as the model and 4 as wide as its MLP."""
    decoder = vlm.cfg.decoder
    is_split = cfg.weights == "bfloat16"
    has_copies = uses_autocast(cfg, device)
    n_byte = 2 if is_split or has_copies else 4
    n_all, n_train = map(sum, zip(*count_parts(vlm).values()))
    small_gradients = is_split and not cfg.token_budget and not cfg.micro_batch_size
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in vlm.parameters()),
        "their bfloat16 copies": 2 * n_all if has_copies else 0,
        "gradients": n_train * (2 if small_gradients else 4),
        "optimizer": n_train * (10 if is_split else 8),
    }
    if cfg.shard:
        memory = {name: size / world_size() for name, size in memory.items()}

    in_memory = cfg.token_budget or (cfg.micro_batch_size or cfg.batch_size) * n_token
    a_block = 10 * decoder.n_embd + 4 * decoder.n_hidden
    n_again = min(cfg.recompute, decoder.n_layer)  # of these only the input is kept
    a_token = a_block * (decoder.n_layer - n_again) + decoder.n_embd * n_again
    return memory | {"activations, about": in_memory * a_token * n_byte}


def count_flops(cfg, vlm, n_token, n_tile):
    """Of a record. For each weight and token 2 forward, 2 for the inputs' gradients, 2 for its own."""
    decoder, vision = vlm.cfg.decoder, vlm.cfg.vision
    parts = count_parts(vlm)
    trains_llm = parts["llm"][1] and not cfg.lora_r
    blocks = sum(p.numel() for p in vlm.decoder.layers.parameters())
    head = vlm.decoder.lm_head.weight.numel()
    again = 2 * blocks * min(cfg.recompute / decoder.n_layer, 1)
    flops = n_token * ((6 if trains_llm else 4) * (blocks + head) + again)

    n_all, n_train = parts["vision"]
    return flops + (6 if n_train else 2) * n_all * n_tile * vision.grid**2


def count_steps(minutes, task, vlm, trial):
    """How many steps fit, at the speed of nine of a trial, which move nothing and are forgotten."""
    state = task.state_dict()
    times = [time.time()]
    for _ in islice(trial, 9):
        vlm.zero_grad()
        times.append(time.time())
    task.load_state_dict(state)

    seconds = (times[-1] - times[1]) / 8  # the first waits for the loader and the compiler
    left = 60 * minutes - (times[-1] - times[0])
    n_step = max(1, int(min(gather(left / seconds))))
    print(f"{60 / seconds:.1f} steps a minute, so --minutes {minutes:g} is --max-steps {n_step}")
    return n_step
