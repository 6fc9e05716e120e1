"""support.distributed: moved here; to be rewritten."""

import os
import sys

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import torch
import torch.distributed as dist

from support.cli import UserError, pick_device



# torchrun starts the same program on every GPU. Each takes its share of every step's records; process 0 prints, logs and saves.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0



def world():
    return dist.get_world_size() if dist.is_initialized() else 1



def wait():
    if world() > 1:
        dist.barrier()



def meet(cfg):
    """Meet the other processes, if torchrun started any; -> this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(cfg.device)
    if cfg.shard and cfg.weights == "bfloat16":
        raise UserError("--shard --weights bfloat16: shares are kept in float32 and worked with in bfloat16 as it is; leave out --weights")
    device = pick_device(cfg.device if cfg.device == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device



def gather(numbers):
    """A few numbers of each process -> (processes, numbers), the same everywhere."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(world())]
    if world() == 1:
        return mine[None]
    dist.all_gather(rows, mine)
    return torch.stack(rows)



def spread(vlm, cfg, device, half):
    """-> the model as it is called in training: compiled where asked for, and one with its copies or shares in the other processes."""
    towers = [vlm.vision, *([vlm.vision2] if vlm.cfg.vision2 else [])]
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)                         # builds a plan for each new shape, up to a second; flash does not
    if cfg.compile:
        for block in vlm.decoder.layers:
            block.compile(dynamic=True)                                     # one graph for all lengths
        for block in (block for tower in towers for block in tower.blocks):
            block.compile(dynamic=True)
    if world() == 1:
        return vlm
    vlm.always_look = True
    if not cfg.shard:
        return DistributedDataParallel(vlm, broadcast_buffers=False)
    mesh, policy = init_device_mesh(device.type, (world(),)), MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)
    for block in [*(block for tower in towers for block in tower.blocks), *vlm.decoder.layers]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(vlm, mesh=mesh, mp_policy=policy)                           # the rest: tables, head, norms, connector
    register_fsdp_forward_method(vlm, "generate")
    return vlm



def whole(t):
    """A tensor of which each process may hold a share -> all of it."""
    return t.full_tensor() if isinstance(t, DTensor) else t



def mine(t):
    """The share of it that is here."""
    return t.to_local() if isinstance(t, DTensor) else t
