"""The folder of a run: its log and plots, its checkpoints, at its end the model; and Ctrl-C.

    log.jsonl  *.png                  a line for each step and each look at held-out questions; plots
    tokenizer.model ...               and what transformers' AutoProcessor wants beside it
    base/                             of a LoRA over a preset: the model under it
    checkpoint-000100/                a whole model directory; trainer.pt: step, flags, moments, task's state
        optimizer-0-of-8.pt ...       under --shard each process writes its own moments
    model.safetensors config.json     the model; config.json comes last, so a directory that has one is whole

A checkpoint is built under a hidden name and renamed when it is on the disk. Only then does the older one go,
hidden first. So whatever is called checkpoint-N is whole, at any moment.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from support.cli import UserError
from support.distributed import barrier, full_tensor, gather_numbers, local_shard, rank, world_size
from support.export import save_adapter, save_processor
from support.io import reading, write_whole
from support.plots import add_points, plot

# What --resume may change; any other flag would make it another run.
FREE_TO_CHANGE = {
    "resume", "out", "workers", "device", "dry_run", "compile", "shard", "recompute", "micro_batch_size",
    "token_budget", "log_every", "eval_every", "save_every", "final_eval", "eval_limit",
}


class Run:
    """Every process calls the same methods; rank 0 writes."""

    def __init__(self, cfg, n_step):
        self.cfg, self.n_step = cfg, n_step
        self.out = Path(cfg.out)
        self.checkpoint, self.state = find_checkpoint(self.out, cfg) if cfg.resume else (None, {})
        cfg.resume = self.checkpoint is not None  # killed before its first checkpoint, a run begins anew
        self.first_step = self.state.get("step", 0) + 1
        self.skipped = self.state.get("skipped", 0)  # records, since the run began
        self.n_token = self.n_padded = 0  # tokens since this program began; those with padding
        self.curves = {}  # name of a logged value -> (steps, values), for the plots
        self.pressed = self.interrupted = False

    def open(self, vlm, tok, task):
        """Make the folder: that of the checkpoint is rewound to it, an earlier run's is moved aside."""
        self.vlm, self.tok, self.task = vlm, tok, task
        if rank() == 0:
            if self.checkpoint:
                self.rewind()
            else:
                move_aside(self.out, self.cfg)
            save_processor(self.out, tok.path, vlm.cfg)
            base = self.out / "base"
            if vlm.lora and not self.checkpoint and Path(vlm.lora["base"]) == base.absolute():
                save_processor(base, tok.path, vlm.cfg)
                vlm.save_pretrained(base)  # B is still 0
        barrier()
        tok.path = self.out / "tokenizer.model"  # the checkpoint that it may have come from will be deleted

    def rewind(self):
        """Drop log lines after the checkpoint, a torn last one, and what a kill left half-written."""
        log = self.out / "log.jsonl"
        log.touch()
        kept = []
        for text in log.read_text().splitlines(keepends=True):
            if text.endswith("\n") and json.loads(text)["step"] < self.first_step:
                kept.append(text)
                add_points(self.curves, json.loads(text))
        write_whole(log, lambda tmp: tmp.write_text("".join(kept)))
        for left in self.out.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def restore(self, optimizer):
        """Bring back the task's state, and the moments as whatever number of processes left them."""
        if not self.checkpoint:
            return
        self.task.load_state_dict(self.state["task"])
        moments = self.state.get("optimizer")
        shards = [moments] if moments is not None else read_shards(self.checkpoint)
        for name, p in self.vlm.named_parameters():
            for key in shards[0].get(name, ()):
                optimizer.state[p][key] = place_moment([shard[name][key] for shard in shards], p)

    # ---- while it goes ----

    def __enter__(self):
        self.began = time.time()
        self.mark = self.began  # when the last step, look or save ended
        self.seconds = 0.0  # spent on steps alone
        self.file = open(self.out / "log.jsonl" if rank() == 0 else os.devnull, "a", buffering=1)
        hide = not sys.stderr.isatty() or rank() > 0
        n_done = self.first_step - 1
        self.bar = tqdm(total=self.n_step, initial=n_done, unit="step", dynamic_ncols=True, disable=hide)
        self.old_handler = signal.signal(signal.SIGINT, self.on_ctrl_c)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.old_handler)
        self.bar.close()
        self.file.close()

    def on_ctrl_c(self, *_):
        """The first Ctrl-C lets the step end and saves it; the second ends the program at once."""
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # print is not safe in a handler
        os.write(2, b"\nCtrl-C: ending this step, then saving; once more to stop at once\n")

    def log_step(self, step, batches, loss, metrics):
        """Log a step, and print it now and then. Afterwards `interrupted` is the same in every process."""
        skipped = [reason for batch in batches for reason in batch["skipped"]]
        for k, reason in enumerate(skipped, self.skipped + 1):
            if k <= 5:
                self.say(f"skipped: {reason}" + ("; from here on they are only counted" if k == 5 else ""))

        # What all processes saw, and whether any of them was interrupted.
        n_token = sum(int(batch["lengths"].sum()) for batch in batches)
        n_padded = sum(batch["tokens"].numel() for batch in batches)
        counts = gather_numbers([n_token, n_padded, len(skipped), self.pressed]).sum(0).tolist()
        self.n_token += int(counts[0])
        self.n_padded += int(counts[1])
        self.skipped += int(counts[2])
        self.interrupted = counts[3] > 0

        self.seconds += time.time() - self.mark
        elapsed = time.time() - self.began
        more = {"skipped": skipped} if skipped else {}
        self.log(step, loss=loss, **metrics, time=round(elapsed, 2), **more)

        text = "no usable record" if loss is None else f"loss {loss:.4f}"
        for name in self.task.shown:
            if name in metrics:
                text += f"  {name} {metrics[name]:.3f}"
        rate = f"{self.n_token / self.seconds:,.0f} tokens/s"
        self.bar.set_postfix_str(f"{text}, {rate}")
        self.bar.update()
        if step % self.cfg.log_every == 0 or step in (self.first_step, self.n_step):
            left = tqdm.format_interval(elapsed / (step - self.first_step + 1) * (self.n_step - step))
            self.say(f"step {step:5d}/{self.n_step}  {text}  lr {metrics['lr']:.2e}  {rate}  {left} left")
        if rank() == 0 and (step % 50 == 0 or step == self.n_step or self.interrupted):
            self.draw()

    def log(self, step, **values):
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        add_points(self.curves, line)
        self.mark = time.time()

    def say(self, text):
        self.bar.write(text)
        sys.stdout.flush()

    def draw(self):
        """The task's plots, {file: {title: {label: name in the log}}}."""
        for file, panels in self.task.plots.items():
            drawn = {}
            for title, names in panels.items():
                drawn[title] = {label: self.curves.get(name, ([], [])) for label, name in names.items()}
            plot(self.out / file, drawn)

    def save(self, step, optimizer):
        """Write checkpoint-N, then remove the one before it."""
        final = self.out / f"checkpoint-{step:06d}"
        hidden = self.out / f".{final.name}.tmp"
        try:
            save_model(hidden, self.vlm, self.tok)
            barrier()  # rank 0 has made the folder
            self.save_state(hidden, step, optimizer)
            barrier()
            if rank() == 0:
                os.replace(hidden, final)
                for old in checkpoints(self.out)[:-1]:
                    os.replace(old, hidden)
                    shutil.rmtree(hidden)
        except (UserError, OSError) as error:
            raise UserError(f"the checkpoint of step {step} could not be saved: {error}; "
                            "--resume goes on from the one before it") from None
        finally:
            if rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
        barrier()
        self.mark = time.time()

    def save_state(self, directory, step, optimizer):
        """All that a step depends on besides the weights."""
        names = {p: name for name, p in self.vlm.named_parameters()}
        moments = {}
        for p, state in optimizer.state.items():
            moments[names[p]] = {key: local_shard(t) for key, t in state.items()}
        state = {"step": step, "skipped": self.skipped}
        state |= {"config": asdict(self.cfg), "task": self.task.state_dict()}
        if self.cfg.shard and world_size() > 1:
            own = directory / f"optimizer-{rank()}-of-{world_size()}.pt"
            write_whole(own, lambda tmp: torch.save(moments, tmp))
        else:
            state["optimizer"] = moments
        if rank() == 0:
            write_whole(directory / "trainer.pt", lambda tmp: torch.save(state, tmp))

    def finish(self, optimizer):
        """Say what was learnt from, and write the model."""
        cfg = self.cfg
        shown = self.n_step * cfg.batch_size
        if self.skipped == shown:
            raise UserError(f"{cfg.data}: not one record could be used; the reasons are above, or: "
                            f"python -m tools.show check {cfg.data} --image-root {cfg.image_root}")
        n_done = self.n_step - self.first_step + 1
        seconds = time.time() - self.began
        padding = 1 - self.n_token / max(self.n_padded, 1)
        print(f"trained {n_done} steps in {seconds:.0f} s; {self.skipped} of {shown} records skipped; "
              f"{padding:.1%} of the tokens were padding")
        trains = [name for name, p in self.vlm.named_parameters() if p.requires_grad]
        idle = [name for name in trains if self.vlm.get_parameter(name) not in optimizer.state]
        if idle:
            print(f"{len(idle)} trainable tensors never got a gradient, such as {idle[0]}")
        save_model(self.out, self.vlm, self.tok)


def save_model(directory, vlm, tok):
    """A model directory that needs nothing else; of a LoRA its adapter, which names its base."""
    tensors = tensors_to_save(vlm)
    if rank() > 0:
        return
    save_processor(directory, tok.path, vlm.cfg)
    if vlm.lora:
        save_adapter(vlm, directory, vlm.lora["base"], tensors)
    else:
        vlm.save_pretrained(directory, tensors)


def tensors_to_save(vlm):
    """{our name: tensor}: all weights, or of a LoRA what trains. Rank 0 gathers the shards, one by one."""
    tensors = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad or not vlm.lora:
            full = full_tensor(p.detach())  # every process takes part
            if rank() == 0:
                tensors[name] = full.cpu() if isinstance(p, DTensor) else full
    return tensors


def read_shards(checkpoint):
    """The moments that each process of a sharded run wrote, in the order of the processes."""
    files = sorted(checkpoint.glob("optimizer-*-of-*.pt"), key=lambda file: int(file.name.split("-")[1]))
    if not files or len(files) != int(files[0].stem.split("-")[-1]):
        raise UserError(f"{checkpoint}: has {len(files)} of its optimizer-*.pt; copy all of them")
    return [torch.load(file, weights_only=True, map_location="cpu", mmap=True) for file in files]


def place_moment(parts, p):
    """One of AdamW's tensors for parameter p. Shards are rows of it; each has the count of steps."""
    if parts[0].ndim != p.ndim:
        return parts[0].to(p.device, copy=True)
    full = torch.cat(parts)
    if not isinstance(p, DTensor):
        return full.to(p.device, copy=True)
    n_row = -(-len(full) // p.device_mesh.size())  # FSDP2 cuts as torch.chunk does
    local = full[rank() * n_row : (rank() + 1) * n_row].to(p.device, copy=True)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def checkpoints(out):
    found = [path for path in out.glob("checkpoint-[0-9]*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(out, cfg):
    """The newest checkpoint and what its trainer.pt holds. Refuses flags that would make it another run."""
    if not checkpoints(out):
        if not (out / "log.jsonl").exists():
            raise UserError(f"--resume: there is no run in {out}; check --out, or leave out --resume")
        print(f"--resume: no checkpoint in {out} yet; starting from the beginning")
        return None, {}
    newest = checkpoints(out)[-1]
    with reading(newest / "trainer.pt", f"remove {newest} and start anew"):
        state = torch.load(newest / "trainer.pt", weights_only=True, map_location="cpu")
    for name, now in asdict(cfg).items():
        before = state["config"].get(name)
        if name not in FREE_TO_CHANGE and before != now:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume: {newest} was trained with {flag} {before!r}, now it is {now!r}; "
                            "give the same flags, or start a new run in another --out")
    print(f"resuming after step {state['step']}")
    return newest, state


def move_aside(out, cfg):
    """A new run never overwrites an old one: out/finetune becomes out/finetune.1, .2, ..."""
    old = [out / name for name in ("log.jsonl", "config.json", "tokenizer.model")]
    if any(out.glob("checkpoint-*")) or any(path.exists() for path in old):
        for name in ("model", "data", "image_root", "val", "vision", "llm", "tokenizer", "projector"):
            value = getattr(cfg, name)
            if value and Path(value).resolve().is_relative_to(out.resolve()):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value} is in --out {out}, which would be moved aside")
        k = 1
        while (free := out.with_name(f"{out.name}.{k}")).exists():
            k += 1
        out.rename(free)
        print(f"{out} held an earlier run; it is now {free}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror}); choose another") from None
