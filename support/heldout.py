"""Held-out questions: while a run trains, their loss and a few answers; at its end the table of eval.py."""

import contextlib
import math

import torch

from conversation import encode_conversation
from data import Examples, Records, micro_batches, picture_paths
from eval import answer_questions, examine
from support.cli import UserError
from support.distributed import rank


class HeldOut:
    """The questions of --val: now and then their loss and some answers, at the end the table."""

    def __init__(self, cfg, vlm, tok, task, n=128):
        """task: whose loss is looked at, that of n questions spread over the file."""
        self.cfg, self.vlm, self.tok, self.task = cfg, vlm, tok, task
        records = Records(cfg.val, cfg.image_root)
        self.questions = [self.read_question(records, i) for i in range(len(records))]
        examples = Examples(
            records, tok, vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode, vlm.cfg.decoder.block_size)
        some = [examples[i] for i in range(0, len(records), math.ceil(len(records) / n))]
        self.batches = micro_batches(some, 32, tok.pad)

    def read_question(self, records, i):
        record = records[i]
        try:
            if len(record["turns"]) < 2:
                raise UserError('no answer; a held-out question needs "text" and "answer"')
            n_visual = [1] * len(record["images"])
            encode_conversation(self.tok, record["turns"][:2], self.vlm.cfg.template, n_visual)
            paths = picture_paths(record)
            for path in paths:
                if not path.exists():
                    raise UserError(f"{path}: no such picture; check the path and --image-root")
        except UserError as error:
            raise UserError(f"{record['where']}: {error}") from None
        (_, text), (_, truth) = record["turns"][:2]
        category = str(record.get("category", "all"))
        return {"id": record["id"], "paths": paths, "text": text, "answer": truth, "category": category}

    def look(self, run, step):
        """Log the loss, with each question's picture and with another's, and print a few answers."""
        with not_training(self.vlm, self.cfg):
            loss = self.mean_loss(self.batches)
            loss_shuffled = self.mean_loss([with_other_pictures(batch) for batch in self.batches])
            answers = self.some_answers(step)
        text = f"held-out loss {loss:.4f}, with pictures shuffled {loss_shuffled:.4f}"
        if loss_shuffled < 1.01 * loss and any(len(batch["pixels"]) for batch in self.batches):
            text += ": the model makes no use of the pictures"
        run.log(step, val_loss=loss, val_loss_shuffled=loss_shuffled)
        run.say(text + "\n" + answers)

    @torch.no_grad()
    def mean_loss(self, batches):
        counts = [self.task.count(batch) for batch in batches]
        means = [self.task.loss(self.vlm, batch)[0].item() for batch in batches]
        return sum(n * mean for n, mean in zip(counts, means)) / sum(counts)

    def some_answers(self, step, n=3):
        """A few questions, other ones at each look, with the model's answers."""
        n_all = len(self.questions)
        chosen = [self.questions[(step * 7 + i * n_all // n) % n_all] for i in range(n)]
        lines = []
        for question, found in zip(chosen, answer_questions(self.vlm, self.tok, chosen), strict=True):
            asked = question["text"].replace("<image>", "").strip().split("\n")
            asked = next((line for line in asked if "?" in line), asked[0])  # without its format prompt
            lines.append(f"  Q: {asked}\n  A: {found.text!r}   truth: {question['answer']!r}")
        return "\n".join(lines)

    def examine(self, out):
        every = math.ceil(len(self.questions) / self.cfg.eval_limit) if self.cfg.eval_limit else 1
        with not_training(self.vlm, self.cfg):
            examine(self.vlm, self.tok, self.questions[::every], out if rank() == 0 else None)


def with_other_pictures(batch):
    """Each question about a picture half a batch away."""
    pixels = batch["pixels"]
    return batch | {"pixels": pixels.roll(len(pixels) // 2, 0)}


@contextlib.contextmanager
def not_training(vlm, cfg):
    """Inside, the model neither trains nor runs compiled: answers would take five more graphs."""
    vlm.eval()
    with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():
        yield
    vlm.train()
