"""How the model is laid out on the machine: autocast, torch.compile, several GPUs.

--no-shard is data parallelism: each process holds the whole model, and gradients are averaged once a step.
--shard is FSDP2: each holds a slice of every weight, gradient and moment.
"""

import os
import shutil

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from support.optim import part_of
from support.processes import gather, rank, world_size
from vision import join_tiles


def uses_autocast(cfg, device):
    """Whether float32 weights are worked with in bfloat16."""
    is_half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    return is_half and cfg.weights == "float32"


def precision(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_autocast(cfg, device))


def compiles(cfg, device):
    """Whether --compile, or its auto, can be had: PyTorch's compiler needs one for C++ on any device."""
    wanted = device.type == "cuda" if cfg.compile is None else cfg.compile
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl"))
    if wanted and not found:
        print("no C++ compiler is found (g++, clang++ or $CXX), so nothing is compiled: slower, and the same")
    return wanted and found


def parallelize(vlm, cfg, device):
    """Compile if --compile asks; with several processes, shard if --shard does."""
    blocks = [block for tower in vlm.towers for block in tower.blocks] + list(vlm.decoder.layers)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, up to a second
    if cfg.compile:
        for block in blocks:
            block.compile(dynamic=True)  # one graph for all lengths
    if world_size() == 1:
        return
    vlm.register_forward_pre_hook(add_blank_tile)
    if cfg.shard:
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16 if uses_autocast(cfg, device) else None, torch.float32)
        for module in [*blocks, vlm]:  # vlm last: what is in no block, the tables, head, norms and connector
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(vlm, "generate")


def add_blank_tile(vlm, batch):
    """Before each forward pass: a batch without pictures gets a blank tile, which no image token shows.

    Other processes have pictures, and wait for this one's share of the towers and the connector: zeros.
    """
    tokens, pixels, labels, layout = batch
    if len(pixels):
        return batch
    S = vlm.cfg.vision.image_size
    return tokens, pixels.new_zeros(1, 3, S, S), labels, layout


def with_fillers(batches, counts):
    """-> [(batch, count), ...], as many as the process has that has most: what is missing counts nothing."""
    n_filler = max(gather(len(batches))) - len(batches)
    ones = torch.ones(1, 2, dtype=torch.int64)
    pixels, layout = join_tiles([])
    filler = {"tokens": ones, "labels": ones, "pixels": pixels, "layout": layout}
    return [*zip(batches, counts), *[(filler, 0)] * n_filler]


def average_gradients(vlm, batches):
    """Over the processes, once a step; FSDP2 has averaged its own."""
    if world_size() == 1:
        return
    n_picture = sum(gather(sum(len(batch["pixels"]) for batch in batches)))
    for name, p in vlm.named_parameters():
        if n_picture == 0 and part_of(name) in ("vision", "connector"):
            p.grad = None  # that of the blank tiles: one process would have none
        elif p.grad is not None and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= world_size()


def full_tensor(t):
    """A tensor of which each process may hold a shard -> all of it. Every process must take part."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gather_on_first(t):
    """The same, in the memory of rank 0 alone: elsewhere None."""
    t = full_tensor(t)
    return t.cpu() if rank() == 0 else None


def placed_like(p, t):
    """A whole tensor from a file -> where parameter p is, and cut as that is; the count of steps never is."""
    t = t.to(p.device, copy=True)
    is_cut = isinstance(p, DTensor) and t.ndim
    return distribute_tensor(t, p.device_mesh, p.placements) if is_cut else t
