"""The folder of a run: its log and plots, its checkpoints, at its end the model; Ctrl-C and SIGTERM.

    lock                              held by the run that writes here
    log.jsonl  *.png                  a line for each step and each held-out loss; plots
    tokenizer.model ...               and what transformers' AutoProcessor wants beside it
    base/                             of a LoRA over a preset: the model under it
    checkpoint-000100/                a whole model directory; AdamW's moments in optimizer.pt;
                                      step, flags, log and the task's state in trainer.pt
    best/                             the model when the held-out loss was lowest
    model.safetensors config.json     the model; config.json comes last, so a directory that has one is whole

A checkpoint is built under a hidden name and renamed when it is on the disk. Only then does the older one go,
hidden first. So whatever is called checkpoint-N is whole, at any moment.
"""

import contextlib
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from support.cli import UserError, flag_of
from support.distributed import gather_on_first, placed_like
from support.export import fits_llava, save_adapter
from support.io import check_flags, fingerprint, json_lines, lock, reading, write_json_lines, write_whole
from support.plots import plot
from support.processes import END_SIGNALS, gather, rank, world_size
from support.processor import save_processor
from support.start import saves_base

# What --resume may change; any other flag would make it another run.
FREE_TO_CHANGE = (
    "resume out workers threads device dry_run compile shard recompute micro_batch_size token_budget "
    "log_every save_every final_eval eval_limit bad_records").split()
# What trainer.pt holds of a Run.
SAVED = ("step", "n_step", "skipped", "task_state", "flags", "lines")


class Run:
    """Every process calls the same methods; rank 0 writes."""

    checkpoint = None  # from which it goes on
    step = 0  # the last that is done
    skipped = 0  # records, since the run began
    task_state = {}  # after the step
    n_token = 0  # since this program began
    half_done = False  # whether a step has begun to change the weights
    pressed = False  # whether a signal came to this process
    interrupted = False  # or to any, as all know after each step

    def __init__(self, cfg, n_step, data_files=()):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.base = self.out / "base"  # where a LoRA's is saved, if need be
        flags = {flag_of(name): value for name, value in asdict(cfg).items() if name not in FREE_TO_CHANGE}
        self.flags = flags | {"--data of checksum": fingerprint(data_files)}
        self.locks = []  # kept open: closing any handle of a file drops all this process's locks on it
        if rank() == 0 and self.out.is_dir():
            self.locks.append(lock(self.out / "lock"))
        self.n_step = 10**12 if cfg.minutes else n_step  # until count_steps knows better
        self.lines = []  # of log.jsonl
        if cfg.resume:
            self.find_checkpoint()
        cfg.resume = self.checkpoint is not None  # killed before its first checkpoint, a run begins anew
        self.saved = self.step  # the last that is on the disk
        self.first_step = self.step + 1

    def find_checkpoint(self):
        """The newest: what its trainer.pt holds is true of this Run now. What would make it another run is
        refused."""
        found = checkpoints(self.out)
        if not found:
            if not (self.out / "log.jsonl").exists():
                raise UserError(f"--resume: there is no run in {self.out}; check --out, or leave it out")
            print(f"--resume: no checkpoint in {self.out} yet; starting from the beginning")
            return
        self.checkpoint = found[-1]
        file = self.checkpoint / "trainer.pt"
        with reading(file, f"remove {self.checkpoint} and start anew"):
            state = torch.load(file, weights_only=True, map_location="cpu")
            check_flags(file, state["flags"], self.flags)
            for name in SAVED:
                setattr(self, name, state[name])
        print(f"resuming after step {self.step}")

    def open(self, vlm, tok, task):
        """Make the folder: that of the checkpoint is rewound to it, an earlier run's is moved aside."""
        self.vlm, self.tok, self.task = vlm, tok, task
        if rank() == 0:
            if self.checkpoint:
                self.remove_older()
                for left in list(self.out.rglob(".*.tmp")):  # what a kill left half-written
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            else:
                move_aside(self.out, self.cfg)
                self.locks.append(lock(self.out / "lock"))
            write_json_lines(self.out / "log.jsonl", self.lines)  # from now on --resume finds a run
            if vlm.lora and saves_base(self.cfg) and not self.checkpoint:
                save_processor(self.base, tok.path, vlm.cfg)
                vlm.save_pretrained(self.base)  # B is still 0
            save_processor(self.out, tok.path, vlm.cfg)
        gather("done")
        tok.path = self.out / "tokenizer.model"  # the checkpoint that it may have come from will be deleted

    def restore(self, optimizer):
        """Bring back the task's state and the moments, by whatever number of processes they were saved."""
        self.optimizer = optimizer
        if not self.checkpoint:
            return
        with reading(self.checkpoint, "files of it are missing, or of another version; start anew"):
            self.task.load_state_dict(self.task_state)
            file = self.checkpoint / "optimizer.pt"
            moments = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
            params = dict(self.vlm.named_parameters())
            for name, state in moments.items():
                p = params[name]
                optimizer.state[p] = {key: placed_like(p, t) for key, t in state.items()}

    # ---- while it goes ----

    def __enter__(self):
        self.began = time.time()
        self.bar = tqdm(total=self.n_step, initial=self.first_step - 1, unit="step", dynamic_ncols=True,
                        disable=True if rank() > 0 else None)  # None: where there is no terminal
        self.old_handlers = {number: signal.signal(number, self.on_signal) for number in END_SIGNALS}
        return self

    def __exit__(self, kind, error, trace):
        # Whatever error ends the run, the steps before it are saved. Of several processes it may end only
        # one, which the others would not join in saving.
        can_save = world_size() == 1 and not self.half_done
        if isinstance(error, Exception) and can_save and self.step > self.saved:
            with contextlib.suppress(Exception):  # the first error says more
                self.save()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.bar.close()

    def on_signal(self, *_):
        """The first lets the step end and saves it; the second ends the program at once.

        Under torchrun there is no second: each process gets the terminal's, and once more torchrun's.
        """
        self.pressed = True
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN if world_size() > 1 else self.old_handlers[number])
        with contextlib.suppress(OSError):
            # print is not safe in a handler
            more = b"; once more to stop at once" if world_size() == 1 else b""
            os.write(2, b"\nending this step, then saving" + more + b"\n")

    def note_bad_records(self, batches):
        """Those of a step. If --bad-records stops at them, what was done before is saved first."""
        found = gather([reason for batch in batches for reason in batch["skipped"]])
        self.reasons = sum(found, [])  # of all processes
        if self.reasons and self.cfg.bad_records == "stop":
            if self.step > self.saved:
                self.save()
            todo = "go on without such by --resume" if self.step else "or"
            raise UserError(f"{self.reasons[0]}; {todo} --bad-records skip")

    def log_step(self, step, batches, loss, metrics):
        """Log a step, and print it now and then. Afterwards `interrupted` is the same in every process."""
        self.step = step
        self.half_done = False
        self.task_state = self.task.state_dict()  # as mpo.py's delta
        metrics = metrics | self.task_state
        for reason in self.reasons[: max(0, 5 - self.skipped)]:  # later ones stand in the log alone
            self.say(f"skipped: {reason}")
        if self.reasons:
            self.skipped += len(self.reasons)
            metrics = metrics | {"skipped": self.reasons}

        # What all processes saw, and whether any of them was interrupted.
        n_token = sum(gather(sum(int(batch["lengths"].sum()) for batch in batches)))
        self.n_token += n_token
        self.interrupted = any(gather(self.pressed))
        if step == 1 and metrics.get("supervised"):
            n = metrics["supervised"]  # nothing, or everything: that would be a fault of the template
            self.say(f"first step: {n:,} of {n_token:,} tokens are supervised ({n / n_token:.0%})")

        elapsed = time.time() - self.began
        self.log(step, loss=loss, **metrics, time=round(elapsed, 2))

        text = "no usable record" if loss is None else f"loss {loss:.4f}"
        for name in self.task.shown:
            if name in metrics:
                text += f"  {name} {metrics[name]:.3f}"
        text += f"  {self.n_token / elapsed:,.0f} tokens/s"
        self.bar.set_postfix_str(text)
        self.bar.update()
        if step % self.cfg.log_every == 0 or step in (self.first_step, self.n_step):
            left = tqdm.format_interval(elapsed / (step - self.first_step + 1) * (self.n_step - step))
            self.say(f"step {step:5d}/{self.n_step}  {text}  lr {metrics['lr']:.2e}  {left} left")
        if rank() == 0 and (step % max(50, self.n_step // 100) == 0 or step == self.n_step):
            self.draw_plots()

    def draw_plots(self):
        for file, panels in self.task.plots.items():
            try:
                plot(self.out / file, self.lines, panels)
            except Exception as error:  # of a full disk, or of a loss of 1e19: no reason to end a run
                self.say(f"{file} is not drawn: {error}")

    def log(self, step, **values):
        self.lines.append({"step": step, **values})
        if rank() == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json_lines(self.lines[-1:]))

    def say(self, text):
        self.bar.write(text)

    def save(self):
        """Write checkpoint-N, all that the next step depends on, then remove the one before it."""
        self.saved = self.step  # or it fails, and is not tried again
        final = self.out / f"checkpoint-{self.step:06d}"
        hidden = self.out / f".{final.name}.tmp"
        try:
            self.save_model(hidden)
            moments = {}
            for name, p in self.vlm.named_parameters():
                if p in self.optimizer.state:
                    moments[name] = {key: gather_on_first(t) for key, t in self.optimizer.state[p].items()}
            if rank() == 0:
                state = {name: getattr(self, name) for name in SAVED}
                write_whole(hidden / "optimizer.pt", lambda tmp: torch.save(moments, tmp))
                write_whole(hidden / "trainer.pt", lambda tmp: torch.save(state, tmp))
                os.replace(hidden, final)
                self.remove_older()
            gather("done")
        except UserError as error:
            raise UserError(f"{error}. --resume goes on from the checkpoint before") from None
        finally:
            if rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)

    def remove_older(self):
        for old in checkpoints(self.out)[:-1]:
            hidden = self.out / f".{old.name}.tmp"
            os.replace(old, hidden)
            shutil.rmtree(hidden)

    def finish(self):
        """Say what was learnt from, and write the model."""
        cfg = self.cfg
        shown = self.n_step * cfg.batch_size
        if self.skipped == shown:
            raise UserError(f"{cfg.data}: not one record could be used; the reasons are above")
        n_done = self.n_step - self.first_step + 1
        seconds = time.time() - self.began
        print(f"trained {n_done} steps in {seconds:.0f} s; {self.skipped} of {shown} records skipped")
        self.save_model(self.out)

    def looks(self):
        """{step: held-out loss}"""
        return {line["step"]: line["val_loss"] for line in self.lines if "val_loss" in line}

    def say_results(self):
        out, looks = self.out, self.looks()
        print(f"the model is in {out}; ask it: python sample.py --model {out} --image FILE --prompt TEXT")
        best = min(looks, key=looks.get, default=self.n_step)
        if best < self.n_step:
            print(f"held-out loss was lowest at step {best} ({looks[best]:.4f}): that model is in {out}/best")
            print("which of the two answers better, eval.py says")
        if not fits_llava(self.vlm.cfg):
            print("transformers has no class for its parts and cannot open it; sample.py and eval.py can")

    def save_model(self, directory):
        """A model directory that needs nothing else; of a LoRA what trains, and the name of its base."""
        vlm = self.vlm
        tensors = {}
        for name, p in vlm.named_parameters():
            if p.requires_grad or not vlm.lora:
                tensors[name] = gather_on_first(p.detach())
        if rank() > 0:
            return
        save_processor(directory, self.tok.path, vlm.cfg)
        if vlm.lora:
            # As the run may be moved, a base in it is named from here.
            base = os.path.relpath(self.base) if saves_base(self.cfg) else os.path.abspath(self.cfg.model)
            save_adapter(vlm, directory, base, tensors)
        else:
            vlm.save_pretrained(directory, tensors)


def checkpoints(out):
    """Oldest first; a copy such as checkpoint-000100.bak is none."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def move_aside(out, cfg):
    """A new run never overwrites an old one: out/finetune becomes out/finetune.1, .2, ..."""
    if not any((out / name).exists() for name in ("tokenizer.model", "config.json")):
        return
    for name in "model data image_root val vision llm tokenizer projector".split():
        value = getattr(cfg, name)
        if value and Path(value).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{flag_of(name)} {value} is in --out {out}, which would be moved aside")
    k = 1
    while (free := out.with_name(f"{out.name}.{k}")).exists():
        k += 1
    with lock(out / "lock"):  # it may have begun since this program looked first
        out.rename(free)
    print(f"{out} held an earlier run; it is now {free}")
