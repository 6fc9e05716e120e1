"""Held-out questions: while a run trains, their loss and a few answers; at its end the table of eval.py."""

import math
import random
from contextlib import contextmanager

import torch

import sample
from data import Examples, micro_batches
from eval import EvalConfig, columns_of, draw_some, evaluate, other_pictures, read_items, table
from support.asking import encode_questions
from support.data_files import Records
from support.io import write_json
from support.processes import gather, rank


class HeldOut:
    """The questions of --val: now and then their loss and some answers, at the end the table."""

    def __init__(self, cfg, vlm, tok, Task, n=128):
        """Task: a class such as train.Answering, whose loss is measured on n records spread over the file."""
        self.cfg, self.vlm, self.tok, self.Task = cfg, vlm, tok, Task
        self.exam = EvalConfig(data=cfg.val, image_root=cfg.image_root)
        self.questions = read_items("own", self.exam)
        records = Records(cfg.val, cfg.image_root)
        examples = Examples(
            records, tok, vlm.cfg.template, vlm.cfg.vision, vlm.cfg.image_mode, vlm.cfg.decoder.block_size)
        for record in records:  # what is wrong with any, as a picture that does not open, ends the run now
            examples.make_example(record)
        some = [records[i] for i in range(0, len(records), math.ceil(len(records) / n))]
        examples.records = some
        self.batches = micro_batches(list(examples), 32, tok.pad)

        # The same records about other pictures, unless there is only one.
        other = other_pictures(record["images"] for record in some)
        self.shuffled = []
        if len(other) > 1:
            examples.records = [r | {"images": [other[name] for name in r["images"]]} for r in some]
            self.shuffled = micro_batches(list(examples), 32, tok.pad)

    def measure(self, run, step):
        """Log the loss, with each question's pictures and with others, and print a few answers.

        The model whose loss is the lowest so far is kept in best/.
        """
        with not_training(self.vlm):
            loss = self.mean_loss(self.batches)
            values = {"val_loss": loss}
            text = f"held-out loss {loss:.4f}"
            if self.shuffled:
                shuffled = self.mean_loss(self.shuffled)
                values["val_loss_shuffled"] = shuffled
                text += f", with pictures shuffled {shuffled:.4f}"
                if shuffled < 1.01 * loss:
                    text += ": the model makes no use of the pictures"
            answers = self.some_answers(step)
        run.log(step, **values)
        looks = run.looks()
        best = min(looks, key=looks.get)
        if best == step:
            run.save_model(run.out / "best")
        n_worse = sum(later > best for later in looks)
        if n_worse >= 3:
            text += (f"\nit has been higher for {n_worse} looks than at step {best} ({looks[best]:.4f}): "
                     f"the model overfits; that of step {best} is in {run.out}/best")
        run.say(text + "\n" + answers)

    @torch.no_grad()
    def mean_loss(self, batches):
        loss = n = 0
        for batch in batches:
            count = self.Task.count(batch)
            mean, _ = self.Task.loss(self.vlm, batch)
            loss += count * mean.item()
            n += count
        return gather(loss / n)[0]  # the same everywhere

    def some_answers(self, step):
        """A few questions, other ones each time, with the model's answers."""
        chosen = random.Random(step).sample(self.questions, min(3, len(self.questions)))
        prompts = encode_questions(self.vlm, self.tok, columns_of(chosen, self.exam)["direct"])
        answers = sample.answer(self.vlm, self.tok, prompts, max_new_tokens=96)
        shown = []
        for question, found in zip(chosen, answers, strict=True):
            asked, *_ = question["text"].replace("<image>", "").strip().split("\n")  # no format prompt
            shown.append(f"  Q: {asked}\n  A: {found.text!r}   truth: {question['truth']!r}")
        return "\n".join(shown)

    def evaluate(self, out):
        items = draw_some(self.questions, self.cfg.eval_limit)
        with not_training(self.vlm):
            result = evaluate(items, self.exam, self.vlm, self.tok)
        print(f"\nheld-out accuracy\n{table([result])}")
        print(f"{result['cut_off']} of {len(items)} answers were cut off for being too long")
        if rank() == 0:
            write_json(out / "results.json", result)


@contextmanager
def not_training(vlm):
    """Inside, the model neither trains nor runs compiled: answers would take five more graphs."""
    vlm.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    vlm.train()
