"""support.checkpoint: moved here; to be rewritten."""

from dataclasses import asdict
from pathlib import Path
import contextlib
import json
import os
import pickle
import shutil
import signal

from torch.distributed.tensor import DTensor
import torch

from support.cli import UserError
from support.distributed import mine, rank, wait, whole, world
from support.export import save_adapter, save_processor
from support.io import write_whole
from support.weights import adapter_name, open_weights, public_layout



FREE_TO_CHANGE = {"resume", "out", "workers", "device", "log_every", "final_eval", "eval_limit", "save_every", "eval_every", "micro_batch_size",
                  "token_budget", "recompute", "compile", "shard", "cache_features", "dry_run"}           # on --resume



@contextlib.contextmanager
def catch_ctrl_c():
    """Yields a list that is empty until the first Ctrl-C, which lets the step end and saves; the second ends the program at once."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nCtrl-C: ending this step, then saving; once more to stop at once\n")     # print is not safe in a handler

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)



def save_model(directory, vlm, tok, state=None):
    """A self-contained model directory; config.json comes last, so a directory that has one is whole. Of a LoRA, its adapter."""
    state = what_to_save(vlm) if state is None else state
    if rank() == 0:
        save_processor(directory, tok.path, vlm.cfg)
        save_adapter(vlm, directory, vlm.lora["base"], state) if vlm.lora else vlm.save_pretrained(directory, state)



def what_to_save(vlm):
    """{our name: tensor}: all weights, or what trains if that is a LoRA. Of shares process 0 gets the whole, one tensor after the other."""
    state = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad or not vlm.lora:
            full = whole(p.detach())                                        # all processes take part
            if rank() == 0:
                state[name] = full.cpu() if isinstance(p, DTensor) else full
    return state



def save_checkpoint(out, step, vlm, tok, optimizer, cfg, skipped, lesson=None):
    """out/checkpoint-N, built under a hidden name, read again, and renamed when it is on the disk; only then does the older one go, hidden
    first: whatever is called checkpoint-N is whole, at any moment. Sharded, each process writes the moments that it has."""
    final = out / f"checkpoint-{step:06d}"
    hidden = out / f".{final.name}.tmp"
    try:
        tensors = what_to_save(vlm)
        save_model(hidden, vlm, tok, tensors)
        wait()                                                              # process 0 has made the folder
        names = {p: name for name, p in vlm.named_parameters()}
        moments = {names[p]: {key: mine(t) for key, t in state.items()} for p, state in optimizer.state.items()}
        state = {"step": step, "config": asdict(cfg), "skipped": skipped, "lesson": lesson or {}}
        files = {hidden / "trainer.pt": state | ({} if cfg.shard and world() > 1 else {"optimizer": moments})} if rank() == 0 else {}
        if cfg.shard and world() > 1:
            files[hidden / f"optimizer-{rank()}-of-{world()}.pt"] = moments
        for file, content in files.items():
            write_whole(file, lambda path: torch.save(content, path))
            if not equal(torch.load(file, weights_only=True, map_location="cpu", mmap=True), content):
                raise UserError(f"{file} reads otherwise than it was written; check the disk")
        public = public_layout(vlm)[0]
        again = open_weights(hidden / f"{'adapter_' if vlm.lora else ''}model.safetensors") if rank() == 0 else {}
        for name, t in tensors.items():
            if not torch.equal(again[adapter_name(name, public) if vlm.lora else public(name)], t.cpu()):
                raise UserError(f"{hidden}: {name} reads otherwise than it was written; check the disk")
        wait()
        if rank() == 0:
            os.replace(hidden, final)
            for old in checkpoints(out)[:-1]:
                os.replace(old, hidden)
                shutil.rmtree(hidden)
    except (UserError, OSError) as error:
        raise UserError(f"the checkpoint of step {step} could not be saved: {error}; --resume goes on from the one before it") from None
    finally:
        if rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
    wait()



def equal(a, b):
    """Whether two dicts of dicts hold the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b.cpu()) if isinstance(a, torch.Tensor) else a == b



def restore(vlm, optimizer, checkpoint, state):
    """The optimizer's moments from one trainer.pt or from the shares of however many processes: they are rows, in the order of the processes."""
    shares = [state["optimizer"]] if "optimizer" in state else []
    if not shares:
        files = sorted(checkpoint.glob("optimizer-*-of-*.pt"), key=lambda f: int(f.name.split("-")[1]))
        if not files or len(files) != int(files[0].stem.split("-")[-1]):
            raise UserError(f"{checkpoint}: has {len(files)} of its optimizer-*.pt; copy all of them")
        shares = [torch.load(f, weights_only=True, map_location="cpu", mmap=True) for f in files]
    for name, p in vlm.named_parameters():
        if not p.requires_grad or name not in shares[0]:
            continue
        for key, t in shares[0][name].items():
            if t.ndim == p.ndim and t.ndim:
                t = torch.cat([s[name][key] for s in shares]) if len(shares) > 1 else t
                if isinstance(p, DTensor):
                    n, r = p.device_mesh.size(), rank()
                    rows = -(-len(t) // n)                                  # FSDP2 cuts as torch.chunk does
                    t = DTensor.from_local(t[r * rows : (r + 1) * rows].to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            optimizer.state[p][key] = t.to(p.device, copy=True) if key != "step" or p.is_cuda else t.clone()



def checkpoints(out):
    return sorted((p for p in out.glob("checkpoint-[0-9]*") if p.is_dir()), key=lambda p: int(p.name.removeprefix("checkpoint-")))



def find_checkpoint(out, cfg):
    """For --resume: the newest checkpoint and its training state. Refuses flags that would make it another run."""
    if not checkpoints(out):
        if not (out / "log.jsonl").exists():
            raise UserError(f"--resume: there is no run in {out}; check --out, or leave out --resume")
        print(f"--resume: no checkpoint in {out} yet; starting from the beginning")
        return None, {"step": 0, "skipped": 0}
    newest = checkpoints(out)[-1]
    try:
        state = torch.load(newest / "trainer.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{newest}/trainer.pt: damaged ({str(error).splitlines()[0]}); remove {newest} and start anew") from None
    for name, now in asdict(cfg).items():
        if name not in FREE_TO_CHANGE and state["config"].get(name) != now:
            raise UserError(f"--resume: {newest} was trained with --{name.replace('_', '-')} {state['config'].get(name)!r}, now it is {now!r}; "
                            "give the same flags, or start a new run in another --out")
    print(f"resuming after step {state['step']}")
    return newest, state



def rewind(out, step):
    """Bring the folder back to where the checkpoint was taken: drop later log lines, a torn last one, and what a kill left half-written."""
    log = out / "log.jsonl"
    log.touch()
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(log, lambda tmp: tmp.write_text("".join(lines)))
    for left in out.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()



def move_aside(out, cfg):
    """A new run never overwrites an old one: out/finetune becomes out/finetune.1, .2, ..."""
    if any(out.glob("checkpoint-*")) or any((out / name).exists() for name in ("log.jsonl", "config.json", "tokenizer.model")):
        for name in ("model", "data", "image_root", "val", "vision", "llm", "tokenizer", "projector"):
            if (asdict(cfg)[name] and Path(asdict(cfg)[name]).resolve().is_relative_to(out.resolve())):
                raise UserError(f"--{name.replace('_', '-')} {asdict(cfg)[name]} is in --out {out}, which would be moved aside; give another --out")
        free = next(f for f in (out.with_name(f"{out.name}.{i}") for i in range(1, 10**6)) if not f.exists())
        out.rename(free)
        print(f"{out} held an earlier run; it is now {free}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror}); choose another") from None
