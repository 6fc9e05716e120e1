"""Several processes: torchrun starts the program on every GPU; each takes its part of every step's records.

Rank 0 prints, logs and saves. The loader of data.py has processes of its own.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist

from support.cli import UserError, pick_device

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a cluster sends before it takes the machine


def rank():
    return dist.get_rank() if dist.is_initialized() else 0  # clusters may set RANK for a lone program, too


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


@contextlib.contextmanager
def processes(cfg):
    """Join the others, if torchrun started any. Inside, this process has its device; what the machine lacks
    is a one-line error."""
    device = pick_device(cfg.device)
    try:
        if world_size() > 1:
            if cfg.shard and cfg.weights == "bfloat16":
                raise UserError("--shard --weights bfloat16: shards are kept in float32; leave out --weights")
            if device.type == "cuda":
                device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if rank() > 0:
                sys.stdout = open(os.devnull, "w")
        yield device
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]  # a loader process sends its whole traceback
        if isinstance(error, torch.OutOfMemoryError):
            todo = "lower --token-budget or --micro-batch-size, or raise --recompute"
        elif reason.startswith("DataLoader worker"):
            todo = "most often memory is short: try --workers 0"
        elif isinstance(error, OSError):
            todo = "what was saved before is untouched: put it right"
        else:
            raise
        raise UserError(f"{reason}; {todo}, and go on with --resume") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gather(own):
    """-> a list of what each process has, the same everywhere. All wait for the last."""
    found = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, own)
    return found


def in_loader_process(_):
    """Whatever ends the run, the parent wants this step's records first; without a parent nobody does.

    Tensors go there through the pipe, as arrays: Docker's shared memory may hold less than a batch.
    """
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=die_with, args=[os.getppid()], daemon=True).start()
    ForkingPickler.register(torch.Tensor, lambda t: (torch.from_numpy, (t.numpy(),)))


def die_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # whatever it waits for


def share_by_rank(numbers, records, tokens_per_tile, rank, world):
    """What this process takes of a step's records: dealt out longest first, each to whoever has least so far.
    """
    if world == 1:
        return numbers
    tokens = {i: records.guess_tokens(i, tokens_per_tile) for i in numbers}
    hands = [[] for _ in range(world)]
    for i in sorted(numbers, key=tokens.get, reverse=True):
        emptiest = min(hands, key=lambda hand: sum(map(tokens.get, hand)))
        emptiest.append(i)
    return hands[rank]
