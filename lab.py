"""The toy's own CLIP and Vicuna, from nothing: what LLaVA starts from, at a size that a laptop trains in half an hour.

    python lab.py ingredients                   # writes assets/toy-clip (21 minutes on one core) and assets/toy-vicuna (12 on two)
    python lab.py mpo                           # preference learning in miniature: finetune, pairs, every loss, three seeds, one table

toy-clip    A tower of CLIP's architecture, trained to match pictures with phrases that are true of them ("a big red cat at the top
            left", "a green thing", "a sign that says OPEN"). The similarity of a picture and a phrase is that of the best patch
            (FILIP, arXiv:2111.07783, Eq. 5): a VLM reads patches, so it is they that must know.
                s_iq = e^tau max_n <v_in, t_q>                                          v, t of unit length
                L = - mean over true (i, q) of log e^s_iq / (e^s_iq + sum of e^s over what is false), once for the phrases q' that are
                    false of picture i, once for the pictures i' that phrase q is false of (CLIP's two directions, arXiv:2103.00020).
            Half of the phrases are a true one with one word changed, most often the kind: colors and places alone go a long way.
toy-vicuna  A Llama trained on texts in which words stand where the picture will be ("a big red cat at the top left [0.05, 0.10,
            0.35, 0.40]; ..."): it knows the questions and how to reason about things, and has never seen one.

Both see training scenes only: no (kind, color) pair of toyworld.UNSEEN is ever drawn or named.
"""

import argparse
import contextlib
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import mpo
import toyworld
import train
from data import IGNORE, Tokenizer, encode_conversation, parse_args, run
from model import PRESETS, VLM, Decoder, clip_json, init_weights, llama_json, rename, LLAMA_NAMES, write_model
from vision import CLIP_NAMES, ViT

ATTRIBUTES = ("size", "color", "kind", "place", "word")
VALUES = (("small", "big"), tuple(toyworld.COLORS), toyworld.KINDS, toyworld.PLACES, toyworld.WORDS)


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["ingredients", "mpo"], help="ingredients: make toy-clip and toy-vicuna; mpo: compare preference losses")
    cli.add_argument("--out", default="", help="folder to write to (default assets, or out/lab-mpo)")
    cli.add_argument("--clip-steps", type=int, default=2000, help="steps of 64 pictures (default 2000)")
    cli.add_argument("--vicuna-steps", type=int, default=1500, help="steps of 32 texts (default 1500)")
    cli.add_argument("--only", default="", choices=["", "clip", "vicuna"], help="make one of the two")
    cli.add_argument("--seed", type=int, default=0, help="(default 0)")
    cli.add_argument("--model", default="out/finetune", help="mpo: the model before; trained first where it is not there (default out/finetune)")
    cli.add_argument("--seeds", type=int, default=3, help="mpo: of pairs and of training, 0 to N - 1 (default 3)")
    cli.add_argument("--questions", type=int, default=300, help="mpo: training pictures to ask about, for each method (default 300)")
    cli.add_argument("--samples", type=int, default=8, help="mpo: answers to each question (default 8)")
    cli.add_argument("--steps", type=int, default=60, help="mpo: steps of 16 pairs (default 60)")
    cli.add_argument("--held-out", type=int, default=200, help="mpo: held-out pictures to ask about, each directly, step by step and for a caption (default 200)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    if cfg.what == "mpo":
        return compare_losses(cfg)
    out = Path(cfg.out or "assets")
    (out / "toy-vicuna").mkdir(parents=True, exist_ok=True)
    if not (out / "toy-vicuna/tokenizer.model").exists() or not cfg.only:
        toyworld.train_tokenizer(out / "toy-vicuna/tokenizer.model")
    if cfg.only in ("", "clip"):
        make_clip(out, cfg)
    if cfg.only in ("", "vicuna"):
        make_vicuna(out, cfg)


# ---- toy-clip ----------------------------------------------------------------------------------------------------------


def make_clip(out, cfg, size=64, lr=6e-4):
    torch.manual_seed(cfg.seed)
    rng, tok, began = random.Random(cfg.seed), Tokenizer(out / "toy-vicuna"), time.time()
    clip = CLIP(PRESETS["toy"], tok.vocab_size)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = tqdm(range(1, cfg.clip_steps + 1), desc="toy-clip", dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / cfg.clip_steps))
        pixels, phrases, true = contrastive_batch(rng, size)
        loss = clip_loss(clip(pixels, *tokenize(tok, phrases)), true)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 250 == 0 or step == cfg.clip_steps:
            scores = told_apart(clip, tok)
            bar.write(f"step {step}  loss {loss.item():.3f}  told apart, unseen pairs: " + "  ".join(f"{k} {v:.1%}" for k, v in scores.items()))
    vision = {"vision_model." + rename(name, CLIP_NAMES): p.half() for name, p in clip.vision.state_dict().items()}
    write_model(out / "toy-clip", vision, clip_json(clip.vision.cfg))
    print(f"toy-clip: {cfg.clip_steps} steps in {(time.time() - began) / 60:.1f} minutes, {len(vision)} tensors in {out / 'toy-clip'}")


class CLIP(nn.Module):
    def __init__(self, cfg, vocab_size, n_embd=128):
        super().__init__()
        self.vision = init_weights(ViT(cfg.vision))
        self.text = init_weights(Decoder(replace(cfg.decoder, vocab_size=vocab_size, n_layer=2)))
        self.see, self.read = nn.Linear(cfg.vision.n_embd, n_embd, bias=False), nn.Linear(cfg.decoder.n_embd, n_embd, bias=False)
        self.tau = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, pixels, tokens, last):
        """(B, 3, S, S), phrases (Q, T) that end at `last` (Q,) -> similarities s (B, Q)."""
        x = self.vision.embed(pixels)
        for block in self.vision.blocks:
            x = block(x)
        v = F.normalize(self.see(self.vision.norm(x)), dim=-1)              # (B, 1 + N, D)
        h = self.text(self.text.embed_tokens(tokens))[torch.arange(len(tokens)), last]
        t = F.normalize(self.read(h), dim=-1)                               # (Q, D)
        return torch.einsum("bnd,qd->bnq", v, t).amax(dim=1) * self.tau.exp()


def clip_loss(s, true):
    """s (B, Q), true (B, Q) bool: which phrase holds of which picture. Other true ones are no negatives."""
    i, q = true.nonzero(as_tuple=True)
    false, right = s.masked_fill(true, -math.inf), s[i, q]
    return sum((torch.logaddexp(false.logsumexp(dim)[at], right) - right).mean() for dim, at in ((1, i), (0, q)))


def contrastive_batch(rng, size):
    """Pictures, phrases (those true of some picture, and each with one word changed), and which holds of which."""
    scenes = [toyworld.random_scene(rng) for _ in range(size)]
    phrases = {}
    for fact in (fact for scene in scenes for fact in facts(scene)):
        said = thin_out(fact, rng)
        phrases[said] = phrases[change_a_word(said, rng)] = None            # a dict keeps the order and drops what was said before
    phrases = list(phrases)
    true = torch.tensor([[holds(phrase, facts(scene)) for phrase in phrases] for scene in scenes])
    keep = [q for q, phrase in enumerate(phrases) if (phrase[2], phrase[1]) not in toyworld.UNSEEN]
    return draw(scenes), [phrases[q] for q in keep], true[:, keep]


def facts(scene):
    """Each thing as (size, color, kind, place, word); None where it has no such attribute."""
    return [(t.size, t.color, t.kind, t.place, None) for t in scene.things] + (
        [(None, None, "sign", scene.sign.place, scene.sign.word)] if scene.sign else [])


def thin_out(fact, rng):
    """Leave some attributes unsaid, so that every one must be learned for itself."""
    keep = (0.4, 0.5, 0.95, 0.5, 0.8)
    said = tuple(x if x == "sign" or rng.random() < p else None for x, p in zip(fact, keep))
    return said if any(x not in (None, "sign") for x in said) else fact


def change_a_word(fact, rng):
    i = rng.choice([i for i, x in enumerate(fact) if x not in (None, "sign") for _ in range(3 if i == 2 else 1)])   # kinds are the hard part
    return (*fact[:i], rng.choice([x for x in VALUES[i] if x != fact[i]]), *fact[i + 1 :])


def holds(phrase, scene_facts):
    return any(all(a is None or a == b for a, b in zip(phrase, fact)) for fact in scene_facts)


def words(phrase):
    size, color, kind, place, word = phrase
    what = f"sign that says {word}" if word else " ".join(x for x in (size, color, kind or "thing") if x)
    return f"a {what}" + (f" at the {place}" if place else "")


def tokenize(tok, phrases):
    """-> tokens (Q, T), index of each phrase's end token (Q,)."""
    ids = [tok.encode(words(p)) + [tok.eos] for p in phrases]
    T = max(map(len, ids))
    return torch.tensor([x + [tok.pad] * (T - len(x)) for x in ids]), torch.tensor([len(x) - 1 for x in ids])


def draw(scenes):
    return torch.from_numpy(np.stack([np.asarray(toyworld.draw(s, PRESETS["toy"].vision.image_size)) for s in scenes])).permute(0, 3, 1, 2)


@torch.no_grad()
def told_apart(clip, tok, n=128):
    """How often a full phrase beats the same with one attribute changed, on held-out pictures: chance is 50%."""
    rng = random.Random(1)
    scenes = [toyworld.random_scene(rng, held_out=True) for _ in range(n)]
    trials = []
    for k, scene in enumerate(scenes):
        for fact in facts(scene):
            for i, x in enumerate(fact):
                if x not in (None, "sign"):
                    wrong = (*fact[:i], rng.choice([y for y in VALUES[i] if y != x]), *fact[i + 1 :])
                    trials.append((k, fact, wrong, ATTRIBUTES[i]))
    s = clip(draw(scenes), *tokenize(tok, [t[1] for t in trials] + [t[2] for t in trials]))
    wins = {name: [] for name in ATTRIBUTES}
    for r, (k, _, _, name) in enumerate(trials):
        wins[name].append((s[k, r] > s[k, len(trials) + r]).item())
    return {name: sum(w) / len(w) for name, w in wins.items()}


# ---- toy-vicuna --------------------------------------------------------------------------------------------------------


def make_vicuna(out, cfg, lr=1e-3):
    torch.manual_seed(cfg.seed)
    tok, began, n = Tokenizer(out / "toy-vicuna"), time.time(), cfg.vicuna_steps
    decoder = init_weights(Decoder(replace(PRESETS["toy"].decoder, vocab_size=tok.n_text)))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = tqdm(range(1, n + 1), desc="toy-vicuna", dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * max(0, 2 * step - n) / n))
        loss, _ = text_loss(decoder, tok, [lesson(tok, random.Random(f"{cfg.seed} text {step} {i}"), step / n) for i in range(32)])
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 250 == 0 or step == n:
            bar.write(f"step {step}  loss {loss.item():.3f}  told, unseen pairs: " + "  ".join(f"{k} {v:.0%}" for k, v in told(decoder, tok).items()))
            sys.stdout.flush()
    tensors = {rename(name, LLAMA_NAMES): p.half() for name, p in decoder.state_dict().items()}
    write_model(out / "toy-vicuna", tensors, llama_json(decoder.cfg) | {"architectures": ["LlamaForCausalLM"]})
    print(f"toy-vicuna: {n} steps in {(time.time() - began) / 60:.1f} minutes, {len(tensors)} tensors in {out / 'toy-vicuna'}")


def text_loss(decoder, tok, lessons):
    """Mean loss over the answers' tokens, and which of them are right: one list of bool per lesson."""
    T = max(len(tokens) for tokens, _ in lessons)
    tokens = torch.tensor([t + [tok.pad] * (T - len(t)) for t, _ in lessons]).clamp(max=tok.n_text - 1)
    labels = torch.tensor([l + [IGNORE] * (T - len(l)) for _, l in lessons])[:, 1:]
    h, keep = decoder(decoder.embed_tokens(tokens))[:, :-1], labels != IGNORE
    logits = decoder.lm_head(h[keep])
    right = (logits.argmax(-1) == labels[keep]).split(keep.sum(1).tolist())
    return F.cross_entropy(logits, labels[keep]), [r.tolist() for r in right]


def lesson(tok, rng, progress):
    """A scene in words, then what there is to say of it -> tokens, labels. First words ("color cat": "red"), then bare questions,
    then whole conversations: where the answer follows the word it depends on, finding it is learned within 300 steps; with a format
    prompt between them, not within 1,600."""
    scene = toyworld.random_scene(rng)
    shares = (1, 0, 0) if progress < 0.35 else (0.3, 0.7, 0) if progress < 0.6 else (0, 0.2, 0.8)
    form = rng.choices(("words", "questions", "conversation"), shares)[0]
    asked = [q for _ in range(3 if form == "questions" else 1) for q in toyworld.questions(scene, rng)]
    if form == "conversation":
        asked = rng.sample(asked, min(4, len(asked)))
        turns = [turn for _, question, answer in asked for turn in (("human", question), ("gpt", answer))]
        turns[0] = ("human", toyworld.describe(scene) + "\n" + turns[0][1])
        return encode_conversation(tok, turns, "vicuna_v1", [])
    pairs = terse(scene, rng) if form == "words" else [(bare(q), a) for c, q, a in dict.fromkeys(asked) if c not in ("caption", "cot")]
    rng.shuffle(pairs)
    tokens = [tok.bos, *tok.encode(toyworld.describe(scene, boxes=form == "questions" or rng.random() < 0.3))]
    labels = [IGNORE] * len(tokens)
    for question, answer in pairs[:16]:
        q, a = tok.encode("\n" + question, dummy_prefix=False), tok.encode(" " + answer, dummy_prefix=False)
        tokens, labels = tokens + q + a, labels + [IGNORE] * len(q) + a
    return tokens, labels


def terse(scene, rng):
    """Questions of two or three words, the last one the thing asked about."""
    kinds = [t.kind for t in scene.things]
    pairs = [("how many " + k, str(toyworld.count(scene, kind=k))) for k in rng.sample(toyworld.KINDS, 2) + kinds[:1]]
    pairs += [("how many " + c, str(toyworld.count(scene, color=c))) for c in rng.sample(list(toyworld.COLORS), 1) + [scene.things[0].color]]
    for t in scene.things:
        name = t.kind if kinds.count(t.kind) == 1 else f"{t.color} {t.kind}"
        pairs += [("color " + t.kind, t.color)] * (name == t.kind) + [("size " + name, t.size), ("place " + name, t.place), ("thing " + t.place, t.kind)]
        pairs += [(f"any {t.color} {t.kind}", "yes")]
        other, near = (rng.choice(toyworld.KINDS), rng.choice(list(toyworld.COLORS))), rng.choice([(t.kind, c) for c in toyworld.COLORS] + [(k, t.color) for k in toyworld.KINDS])
        pairs += [(f"any {c} {k}", "no") for k, c in [rng.choice((other, near))] if not toyworld.count(scene, k, c) and (k, c) not in toyworld.UNSEEN]
    return pairs + ([("sign", scene.sign.word)] if scene.sign else [])


def bare(question):
    """A question without its format prompt."""
    for prompt in (toyworld.SHORT, toyworld.LETTER, toyworld.INSUFFICIENT):
        question = question.replace("\n" + prompt, "")
    return question


@torch.no_grad()
def told(decoder, tok, n=32):
    """Share of questions answered right (every token, given those before it) about held-out scenes that are told, not shown."""
    wins = {}
    for category in toyworld.ASK:
        lessons = []
        for i in range(n):
            rng = random.Random(f"told {i}")
            scene = toyworld.random_scene(rng, held_out=True)
            lessons += [encode_conversation(tok, [("human", toyworld.describe(scene) + "\n" + q), ("gpt", a)], "vicuna_v1", [])
                        for c, q, a in toyworld.questions(scene, rng) if c == category]
        right = text_loss(decoder, tok, lessons)[1]
        wins[category] = sum(map(all, right)) / len(right)
    return wins


# ---- preference learning in miniature ----------------------------------------------------------------------------------

VARIANTS = {                                     # row of the table -> (--loss, its pairs: correctness, and DropoutNTP's at these ratios)
    "SFT on chosen": ("sft", True, 0.5), "DPO": ("dpo", True, 0.5), "DPO+sft": ("dpo+sft", True, 0.5), "BCO+sft": ("bco+sft", True, 0.5),
    "MPO": ("mpo", True, 0.5), "MPO, DropoutNTP 0.25 alone": ("mpo", False, 0.25), "MPO, DropoutNTP 0.5 alone": ("mpo", False, 0.5),
    "MPO, DropoutNTP 0.75 alone": ("mpo", False, 0.75)}
COLUMNS = {"direct": "direct", "cot": "step by step", "no_format": "no final answer", "hallucinated": "things that are not there", "captions": "captions with one"}
CLAIMS = (                                       # (what the paper says, the difference that must then be above 0), a column being (row, name)
    ("MPO is better than SFT on the chosen answers, step by step (Table 3)", ("MPO", "cot"), ("SFT on chosen", "cot")),
    ("DPO alone makes step by step worse than direct (Table 6)", ("DPO", "direct"), ("DPO", "cot")),
    ("with SFT beside it DPO is better step by step (Table 6)", ("DPO+sft", "cot"), ("DPO", "cot")),
    ("DPO alone loses the format, SFT keeps it (section 10)", ("DPO", "no_format"), ("DPO+sft", "no_format")),
    ("MPO is better than DPO+sft, step by step (Table 6)", ("MPO", "cot"), ("DPO+sft", "cot")),
    ("DropoutNTP lessens hallucination (Table 4)", ("before", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")),
    ("and at half of the answer more than at a quarter (Table 9)", ("MPO, DropoutNTP 0.25 alone", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")),
    ("or at three quarters (Table 9)", ("MPO, DropoutNTP 0.75 alone", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")))


def compare_losses(cfg):
    """Finetune, let the model make its own pairs, train each variant on them, examine all: out/lab-mpo/table.md (arXiv:2411.10442v2).

    The questions to make pairs from are about training pictures, those of the examination about held-out ones. What is there already,
    pairs or a finished run, is not made again: remove the folder for that.
    """
    out, began = Path(cfg.out or "out/lab-mpo"), time.time()
    out.mkdir(parents=True, exist_ok=True)
    toyworld.write_world("toyworld")
    quietly(out, train, ["--stage", "finetune", "--out", cfg.model, "--eval-every", 0, "--save-every", 0, "--no-final-eval", "--seed", cfg.seed], Path(cfg.model))
    write_questions(out, cfg.questions)
    exam = make_exam(cfg.held_out)
    rows = {"before": [take_exam(cfg.model, exam)]}
    print(f"before: {line_of(rows['before'])}", flush=True)
    for seed in range(cfg.seeds):
        here = out / f"seed{seed}"
        common = ["--model", cfg.model, "--image-root", "toyworld", "--seed", seed]
        quietly(out, mpo, ["pairs", "--method", "correctness", *common, "--data", out / "reasoning.jsonl", "--out", here / "correctness.jsonl",
                           "--samples", cfg.samples, "--min-newlines", 1, "--max-new-tokens", 96], here / "correctness.jsonl")
        for ratio in (0.25, 0.5, 0.75):
            quietly(out, mpo, ["pairs", "--method", "dropout-ntp", *common, "--data", out / "captions.jsonl", "--out", here / f"dropout{ratio}.jsonl",
                               "--ratio", ratio, "--max-new-tokens", 96], here / f"dropout{ratio}.jsonl")
        for name, (loss, correctness, ratio) in VARIANTS.items():
            files = [here / "correctness.jsonl"] * correctness + [here / f"dropout{ratio}.jsonl"]
            run_dir = here / re.sub(r"\W+", "-", name.lower())
            meta = here / f"{run_dir.name}.json"
            meta.write_text(json.dumps({f.stem: {"root": str(Path("toyworld").absolute()), "annotation": str(f.absolute())} for f in files}))
            quietly(out, mpo, ["train", *common, "--data", meta, "--out", run_dir, "--loss", loss, "--max-steps", cfg.steps, "--save-every", 0, "--eval-every", 0,
                               "--no-final-eval"], run_dir)
            rows.setdefault(name, []).append(take_exam(run_dir, exam))
            print(f"seed {seed}, {name}: {line_of(rows[name][-1:])}", flush=True)
    table = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS), *(f"| {name} | {line_of(found, ' | ')} |" for name, found in rows.items())]
    for claim, (row, column), (other, column2) in CLAIMS:
        gaps = [a[column] - b[column2] for a, b in zip(rows[row] * (cfg.seeds if row == "before" else 1), rows[other])]
        shows = "shows" if min(gaps) > 0 else "the contrary shows" if max(gaps) < 0 else "not to be told at this size"
        table.append(f"- {claim}: {shows} ({', '.join(f'{100 * g:+.1f}' for g in gaps)} points by seed)")
    (out / "table.md").write_text("\n".join(table) + "\n")
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table) + f"\nin {(time.time() - began) / 60:.1f} minutes; the runs, their logs and the table are in {out}")
    return 0


def quietly(out, program, flags, made):
    """Run one of our programs unless what it makes is there; what it prints goes to a file."""
    if not (made / "config.json" if made.suffix != ".jsonl" else made).exists():
        with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            program.main([str(word) for word in flags])


def line_of(found, between=", "):
    """Mean of the seeds, and half the distance from the lowest to the highest."""
    cells = []
    for key, name in COLUMNS.items():
        values = [100 * f[key] for f in found]
        cells.append(f"{statistics.mean(values):.1f}%" + (f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else "") + (f" {name}" if between == ", " else ""))
    return between.join(cells)


def scene_of(split, i):
    """The scene of a picture of the toy world, and its generator, as toyworld.make_picture had them."""
    rng = random.Random(f"0 {split} {i}")
    return toyworld.random_scene(rng, held_out=split == "val"), random.Random(f"lab {split} {i}")


def write_questions(out, n):
    """reasoning.jsonl with answers, captions.jsonl without, both about the first n training pictures."""
    reasoning, captions = [], []
    for i in range(n):
        scene, rng = scene_of("train", i)
        question, truth, _ = toyworld.reason(scene, rng)
        image = f"images/train_{i:05d}.png"
        reasoning.append({"image": image, "question": f"{question}\n{toyworld.SHORT}", "answer": str(truth)})
        captions.append({"image": image, "question": toyworld.CAPTION})
    for name, lines in (("reasoning", reasoning), ("captions", captions)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_exam(n):
    """[(picture, question, answer, scene)] about held-out pictures."""
    exam = []
    for i in range(min(n, 240)):
        scene, rng = scene_of("val", i)
        question, truth, _ = toyworld.reason(scene, rng)
        exam.append((Path(f"toyworld/images/val_{i:05d}.png"), question, str(truth), scene))
    return exam


def take_exam(model, exam):
    """-> shares: right answers asked directly and step by step, worked answers without a final one, things in captions that are not in the picture."""
    vlm, tok = VLM.from_pretrained(model), Tokenizer(model)
    ask = lambda question: [said for said, _ in train.answer(vlm, tok, [([p], question(q)) for p, q, _, _ in exam], torch.device("cpu"))]
    direct, worked, captions = ask(lambda q: f"{q}\n{toyworld.SHORT}"), ask(lambda q: mpo.worked(q, 1, "en")), ask(lambda q: toyworld.CAPTION)
    final = [mpo.parse_answer(said, 1) for said in worked]
    wrong = [made_up(said, scene) for said, (*_, scene) in zip(captions, exam)]
    share = lambda found: sum(found) / len(exam)
    return {"direct": share(mpo.judge(said, truth) for said, (_, _, truth, _) in zip(direct, exam)),
            "cot": share(bool(f) and mpo.judge(f[1], truth) for f, (_, _, truth, _) in zip(final, exam)), "no_format": share(f is None for f in final),
            "hallucinated": sum(n for n, _ in wrong) / max(1, sum(n for _, n in wrong)), "captions": share(n > 0 for n, _ in wrong)}


def made_up(caption, scene):
    """-> how many of the things a caption names are not in the picture, how many it names (CHAIR, arXiv:1809.02156). A sign counts by its word."""
    named = Counter(re.findall(rf"({'|'.join(toyworld.COLORS)}) ({'|'.join(toyworld.KINDS)})\b", caption)) + Counter(re.findall(r"says (\w+)", caption))
    there = Counter((thing.color, thing.kind) for thing in scene.things) + Counter([scene.sign.word] if scene.sign else [])
    return (named - there).total(), named.total()


if __name__ == "__main__":
    sys.exit(run(main))
