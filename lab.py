"""The toy's own CLIP and Vicuna, from nothing: what LLaVA starts from, at a size that a laptop trains in half an hour.

    python lab.py ingredients                   # writes assets/toy-clip and assets/toy-vicuna, MINUTES on two cores

toy-clip    A tower of CLIP's architecture, trained to match pictures with phrases that are true of them ("a big red cat at the top
            left", "a green thing", "a sign that says OPEN"). The similarity of a picture and a phrase is that of the best patch
            (FILIP, arXiv:2111.07783, Eq. 5): a VLM reads patches, and the class token alone takes many times longer to learn kinds.
                s_iq = e^tau max_n <v_in, t_q>                                          v, t of unit length
                L = - mean over true (i, q) of log e^s_iq / (e^s_iq + sum of e^s over what is false), once for the phrases q' that are
                    false of picture i, once for the pictures i' that phrase q is false of (CLIP's two directions, arXiv:2103.00020).
            Half of the phrases are a true one with one word changed: else colors and places suffice, and kinds are never learned.
toy-vicuna  A Llama trained by train.py on conversations in which words stand where the picture will be ("a big red cat at the top
            left [0.05, 0.10, 0.35, 0.40]; ..."): it knows the questions and how to reason about things, and has never seen one.

Both see training scenes only: no (kind, color) pair of toyworld.UNSEEN is ever drawn or named.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import toyworld
import train
from data import Tokenizer, parse_args, run
from model import PRESETS, VLM, Decoder, clip_json, init_weights, llama_json, rename, LLAMA_NAMES, write_model, write_whole
from vision import CLIP_NAMES, ViT

ATTRIBUTES = ("size", "color", "kind", "place", "word")
VALUES = (("small", "big"), tuple(toyworld.COLORS), toyworld.KINDS, toyworld.PLACES, toyworld.WORDS)


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["ingredients"], help="ingredients: make toy-clip and toy-vicuna")
    cli.add_argument("--out", default="assets", help="folder to write them to (default assets)")
    cli.add_argument("--clip-steps", type=int, default=2000, help="steps of 64 pictures (default 2000)")
    cli.add_argument("--vicuna-steps", type=int, default=1600, help="steps of 16 conversations (default 1600)")
    cli.add_argument("--only", default="", choices=["", "clip", "vicuna"], help="make one of the two")
    cli.add_argument("--seed", type=int, default=0, help="(default 0)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    out = Path(cfg.out)
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


def make_vicuna(out, cfg, size=16):
    began = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "text.jsonl"
        with open(file, "w") as f:
            for i in range(min(cfg.vicuna_steps * size, 40_000)):
                f.write(json.dumps(text_record(i, cfg.seed)) + "\n")
        train.main(["--model", "toy", "--from-scratch", "--train", "llm", "--tokenizer", str(out / "toy-vicuna"), "--data", str(file),
                    "--batch-size", str(size), "--lr", "1e-3", "--max-steps", str(cfg.vicuna_steps), "--out", f"{tmp}/run",
                    "--seed", str(cfg.seed), "--save-every", "0", "--log-every", "100"])
        decoder, tok = VLM.from_pretrained(f"{tmp}/run").decoder, Tokenizer(out / "toy-vicuna")
    tensors = {rename(name, LLAMA_NAMES): p.half().contiguous() for name, p in decoder.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: tok.n_text].clone()                 # the rows of <image> and <pad> are the VLM's business
    write_model(out / "toy-vicuna", tensors, llama_json(replace(decoder.cfg, vocab_size=tok.n_text)) | {"architectures": ["LlamaForCausalLM"]})
    print(f"toy-vicuna: {cfg.vicuna_steps} steps in {(time.time() - began) / 60:.1f} minutes, {len(tensors)} tensors in {out / 'toy-vicuna'}")


def text_record(i, seed):
    """A conversation about a scene that is told, not shown."""
    rng = random.Random(f"{seed} text {i}")
    scene = toyworld.random_scene(rng)
    asked = toyworld.questions(scene, rng)
    turns = rng.sample(asked, min(7, len(asked)))
    record = toyworld.record(f"text-{i}", None, [pair for _, *pair in turns])
    del record["image"]
    first = record["conversations"][0]
    first["value"] = first["value"].replace("<image>\n", toyworld.describe(scene) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(run(main))
