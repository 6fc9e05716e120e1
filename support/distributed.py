"""Several processes: torchrun starts the program on every GPU; each takes its part of every step's records.

--no-shard is data parallelism: each process holds the whole model, and gradients are averaged once a step.
--shard is FSDP2: each holds a slice of every weight, gradient and moment. Rank 0 prints, logs and saves.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from itertools import islice
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from data import draw_steps, micro_batches
from support.cli import UserError, pick_device
from support.optim import part_of
from vision import join_tiles

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


def load_steps(cfg, task, run):
    """The steps that are still to do, each a list of micro-batches."""
    records = task.examples.records
    n_token = run.vlm.cfg.vision.n_token
    steps = draw_steps(records.group_sizes, cfg.batch_size, run.n_step, cfg.seed)
    of_this_rank = (
        share_by_rank(numbers, records, n_token, rank(), world_size())
        for numbers in islice(steps, run.first_step - 1, None))
    to_micro_batches = partial(
        micro_batches, size=cfg.micro_batch_size, pad=run.tok.pad, budget=cfg.token_budget,
        collate=task.collate)

    # What the loader takes for one batch is a step: a list of micro-batches.
    loaded = iter(DataLoader(
        task.examples, batch_sampler=of_this_rank, num_workers=cfg.workers, collate_fn=to_micro_batches,
        pin_memory=run.vlm.device.type == "cuda", worker_init_fn=in_loader_process))
    workers = multiprocessing.active_children()
    for batches in loaded:
        run.note_bad_records(batches)
        yield batches
        # PyTorch tells of a killed loader only once, amid whatever runs then, which may swallow the error.
        if any(process.exitcode for process in workers):
            raise RuntimeError("DataLoader worker was killed")


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
