"""Several processes: torchrun starts the same program on every GPU, and each takes its part of every step's records.

--no-shard is DDP: each process holds the whole model, and gradients are averaged. --shard is FSDP2: each holds a slice of
every weight, gradient and moment. Rank 0 prints, logs and saves.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from support.cli import UserError, pick_device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def start_processes(cfg):
    """Join the other processes, if torchrun started any; -> this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(cfg.device)
    if cfg.shard and cfg.weights == "bfloat16":
        raise UserError("--shard --weights bfloat16: shards are kept in float32 already; leave out --weights")
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else cfg.device)
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def gather_numbers(numbers):
    """A few numbers of each process -> (world_size, n), the same everywhere."""
    own = torch.tensor(numbers, dtype=torch.float64)
    if world_size() == 1:
        return own[None]
    rows = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows)


def uses_autocast(cfg, device):
    """Whether float32 weights are worked with in bfloat16."""
    is_half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    return is_half and cfg.weights == "float32"


def precision(cfg, device):
    return torch.autocast(device.type, torch.bfloat16) if uses_autocast(cfg, device) else contextlib.nullcontext()


def parallelize(vlm, cfg, device):
    """-> the model as training calls it: its blocks compiled where --compile asks, wrapped where there are several processes."""
    towers = [vlm.vision, vlm.vision2] if vlm.cfg.vision2 else [vlm.vision]
    blocks = [block for tower in towers for block in tower.blocks] + list(vlm.decoder.layers)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, up to a second; flash does not
    if cfg.compile:
        for block in blocks:
            block.compile(dynamic=True)  # one graph for all lengths
    if world_size() == 1:
        return vlm

    vlm.always_look = True
    if not cfg.shard:
        return DistributedDataParallel(vlm, broadcast_buffers=False)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16 if uses_autocast(cfg, device) else None, torch.float32)
    for module in [*blocks, vlm]:  # vlm last: what is in no block, the tables, head, norms and connector
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(vlm, "generate")
    return vlm


def full_tensor(t):
    """A tensor of which each process may hold a shard -> all of it. Every process must take part."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_shard(t):
    """The part of it that this process holds."""
    return t.to_local() if isinstance(t, DTensor) else t
