"""The toy's own CLIP and Vicuna, from nothing: what LLaVA starts from, at a size that a laptop trains in two hours.

    python lab.py ingredients                   # writes assets/toy-clip and assets/toy-vicuna

toy-clip    A tower of CLIP's architecture, trained to match pictures with texts. Its class token: whole pictures with captions, as in
            CLIP (arXiv:2103.00020). Its patches, where a VLM reads them: each with the phrases that are true of the thing it shows ("a
            big red cat at the top left", "a green thing", "a sign that says OPEN"), as RegionCLIP does it (arXiv:2112.09106).
                s_iq = e^tau <v_i, t_q>                                                 v, t of unit length
                L = mean over true (i, q) of log (e^s_iq + sum of e^s over what is false) - s_iq, once for the texts q' that are
                    false of i, once for the pictures or patches i' that q is false of.
            Half of the phrases are a true one with one word changed, most often the kind: colors and places alone go a long way.
            What would make a pair that training never shows counts neither as true nor as false: see holds().
toy-vicuna  A Llama that has never seen a picture, trained on pictures that are spelled: 64 places in reading order, each the sum of the
            embeddings of the words that are true there (column "c", row "5", "red", "cat", "small"), then questions and answers. So
            it knows words, counting and space, and all that is left for the connector is to turn patches into such words.
            (A real Vicuna learned from text alone, and LLaVA shows it 1.2 million pictures before it reads them well.)

Both learn from training scenes only: no (kind, color) pair of toyworld.UNSEEN is ever drawn or named.
"""

import argparse
import math
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import toyworld
from data import IGNORE, Tokenizer, encode_conversation, parse_args, run
from model import LLAMA_NAMES, PRESETS, Decoder, clip_json, init_weights, llama_json, load_decoder, rename, write_model
from train import is_right
from vision import CLIP_NAMES, ViT

ATTRIBUTES = ("size", "color", "kind", "place", "word")
VALUES = (toyworld.SIZES, tuple(toyworld.COLORS), toyworld.KINDS, toyworld.PLACES, toyworld.WORDS)
FALSE, TRUE, UNTOLD = 0, 1, 2                    # of a phrase and a thing
HARD = ("choice", "spatial", "caption")
NOTHING, UNSURE = -1, -2                         # of a patch that shows none of the things, or too little of one to say


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["ingredients"], help="ingredients: make toy-clip and toy-vicuna")
    cli.add_argument("--out", default="assets", help="folder to write them to (default assets)")
    cli.add_argument("--clip-steps", type=int, default=3000, help="steps of 48 pictures (default 3000)")
    cli.add_argument("--vicuna-steps", type=int, default=4200, help="steps of 32 texts (default 4200)")
    cli.add_argument("--go-on", action="store_true", help="begin toy-vicuna's second round, from what the first has left in OUT")
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


def make_clip(out, cfg, size=48, lr=6e-4):
    torch.manual_seed(cfg.seed)
    rng, tok, began = random.Random(cfg.seed), Tokenizer(out / "toy-vicuna"), time.time()
    clip = CLIP(PRESETS["toy"], tok.vocab_size)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = tqdm(range(1, cfg.clip_steps + 1), desc="toy-clip", dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / cfg.clip_steps))
        pixels, captions, phrases, patches, holding = contrastive_batch(rng, size)
        whole, parts = clip(pixels, tokenize(tok, captions), tokenize(tok, phrases))
        loss = contrastive_loss(whole, torch.eye(size)) + contrastive_loss(parts.flatten(0, 1)[patches], holding)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 250 == 0 or step == cfg.clip_steps:
            bar.write(f"step {step}  loss {loss.item():.3f}  unseen pairs, right word of: " + "  ".join(f"{k} {v:.1%}" for k, v in named(clip, tok).items()))
            sys.stdout.flush()
            write_clip(out, clip)
    print(f"toy-clip: {cfg.clip_steps} steps in {(time.time() - began) / 60:.1f} minutes, now in {out / 'toy-clip'}")


def write_clip(out, clip):
    vision = {"vision_model." + rename(name, CLIP_NAMES): p.half() for name, p in clip.vision.state_dict().items()}
    write_model(out / "toy-clip", vision, clip_json(clip.vision.cfg))


class CLIP(nn.Module):
    def __init__(self, cfg, vocab_size, n_embd=128):
        super().__init__()
        self.vision = init_weights(ViT(cfg.vision))
        self.text = init_weights(Decoder(replace(cfg.decoder, vocab_size=vocab_size, n_layer=2)))
        self.see, self.see_whole = (nn.Linear(cfg.vision.n_embd, n_embd, bias=False) for _ in range(2))
        self.read = nn.Linear(cfg.decoder.n_embd, n_embd, bias=False)
        self.tau = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, pixels, captions, phrases):
        """(B, 3, S, S), texts of b captions and Q phrases -> similarities s of class tokens (B, b) and of patches (B, N, Q)."""
        x = self.vision.embed(pixels)
        for block in self.vision.blocks:
            read, x = x, block(x)                                           # a VLM reads what goes into the last block
        whole = F.normalize(self.see_whole(self.vision.norm(x[:, 0])), dim=-1)
        parts = F.normalize(self.see(self.vision.norm(read[:, 1:])), dim=-1)
        return (whole @ self.embed(*captions).T * self.tau.exp(), parts @ self.embed(*phrases).T * self.tau.exp())

    def embed(self, tokens, last):
        """Texts (Q, T) that end at `last` (Q,) -> (Q, D) of unit length."""
        h = self.text(self.text.embed_tokens(tokens))[torch.arange(len(tokens)), last]
        return F.normalize(self.read(h), dim=-1)


def contrastive_loss(s, holding):
    """s (P, Q), holding (P, Q): TRUE, FALSE or UNTOLD, whether that text holds of that picture or patch."""
    true = holding == TRUE
    i, q = true.nonzero(as_tuple=True)
    false, right = s.masked_fill(holding != FALSE, -math.inf), s[i, q]
    loss = 0
    for dim, at in ((1, i), (0, q)):
        each = torch.logaddexp(false.logsumexp(dim)[at], right) - right
        loss = loss + (each / true.sum(dim)[at]).sum() / true.any(dim).sum()     # every text and every patch weighs the same
    return loss


def contrastive_batch(rng, size):
    """Pictures, their captions, phrases (those true of some thing, and each with one word changed), the patches that are compared with
    them, and which phrase holds of which."""
    scenes = [toyworld.random_scene(rng) for _ in range(size)]
    scenes = [scene if scene.sign or rng.random() < 0.5 else toyworld.random_scene(rng) for scene in scenes]       # signs are scarce
    phrases = {}
    for fact in (fact for scene in scenes for fact in facts(scene)):
        said = thin_out(fact, rng)
        phrases[said] = phrases[change_a_word(said, rng)] = None            # a dict keeps the order and drops what was said before
    phrases = [p for p in phrases if (p[2], p[1]) not in toyworld.UNSEEN]
    holding, patches = [], []
    for k, scene in enumerate(scenes):
        rows = [[holds(phrase, fact) for phrase in phrases] + [FALSE] for fact in facts(scene)] + [[FALSE] * len(phrases) + [TRUE]]
        shown = covered(scene)
        n_part = (shown >= 0).sum().item()
        empty = rng.sample((shown == NOTHING).nonzero()[:, 0].tolist(), min(n_part, (shown == NOTHING).sum().item()))   # as many as things have
        for n in (shown >= 0).nonzero()[:, 0].tolist() + empty:
            patches.append(k * len(shown) + n)
            holding.append(rows[shown[n]])                                  # NOTHING is -1: the last row
    texts = [words(phrase) for phrase in phrases] + ["a picture of nothing"]
    return draw(scenes), [toyworld.caption(scene) for scene in scenes], texts, torch.tensor(patches), torch.tensor(holding)


def covered(scene, g=8, enough=0.25):
    """Whose patch is it? (g * g,) in reading order: the index of the part (things, then the sign) that covers most of it, NOTHING, or
    UNSURE where it covers less than `enough` of the patch."""
    low = np.arange(g) / g
    shares = []
    for part in scene.things + ((scene.sign,) if scene.sign else ()):
        x1, y1, x2, y2 = part.box
        across, down = (g * np.clip(np.minimum(high, low + 1 / g) - np.maximum(start, low), 0, None) for start, high in ((x1, x2), (y1, y2)))
        shares.append((down[:, None] * across[None]).ravel())
    most, who = np.max(shares, 0), np.argmax(shares, 0)
    return torch.from_numpy(np.where(most >= enough, who, np.where(most <= 0.02, NOTHING, UNSURE)))


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


def holds(phrase, fact):
    """What would make an UNSEEN pair of the phrase's kind and the thing's color, or the other way round, stays UNTOLD: blue things are
    never cats in training, and a tower that is told so learns to look at colors instead of shapes."""
    if all(a is None or a == b for a, b in zip(phrase, fact)):
        return TRUE
    return UNTOLD if {(phrase[2], fact[1]), (fact[2], phrase[1])} & toyworld.UNSEEN else FALSE


def words(phrase):
    size, color, kind, place, word = phrase
    what = f"sign that says {word}" if word else " ".join(x for x in (size, color, kind or "thing") if x)
    return f"a {what}" + (f" at the {place}" if place else "")


def tokenize(tok, texts):
    """-> tokens (Q, T), index of each text's end token (Q,)."""
    ids = [tok.encode(text) + [tok.eos] for text in texts]
    T = max(map(len, ids))
    return torch.tensor([x + [tok.pad] * (T - len(x)) for x in ids]), torch.tensor([len(x) - 1 for x in ids])


def draw(scenes):
    return torch.from_numpy(np.stack([np.asarray(toyworld.draw(s, PRESETS["toy"].vision.image_size)) for s in scenes])).permute(0, 3, 1, 2)


@torch.no_grad()
def named(clip, tok, n=128):
    """Of the patches of held-out things: how often is the right word nearer than every other word of its attribute?"""
    rng = random.Random(1)
    scenes = [toyworld.random_scene(rng, held_out=True) for _ in range(n)]
    single = [tuple(x if i == j else None for j in range(5)) for i, values in enumerate(VALUES) for x in values]
    s = clip(draw(scenes), tokenize(tok, ["a picture"]), tokenize(tok, [words(phrase) for phrase in single]))[1]
    wins = {name: [] for name in ATTRIBUTES}
    for k, scene in enumerate(scenes):
        shown = covered(scene)
        for i, (name, values) in enumerate(zip(ATTRIBUTES, VALUES)):
            first = sum(map(len, VALUES[:i]))
            for p, fact in enumerate(facts(scene)):
                if fact[i] in values:
                    guess = s[k, shown == p, first : first + len(values)].argmax(-1)
                    wins[name] += (guess == values.index(fact[i])).tolist()
    return {name: sum(w) / len(w) for name, w in wins.items()}


# ---- toy-vicuna --------------------------------------------------------------------------------------------------------


def make_vicuna(out, cfg):
    """Two rounds, the second with more of what is hard: choosing among letters, comparing places, naming everything."""
    torch.manual_seed(cfg.seed)
    tok, began, first = Tokenizer(out / "toy-vicuna"), time.time(), round(cfg.vicuna_steps * 5 / 7)
    decoder = init_weights(Decoder(replace(PRESETS["toy"].decoder, vocab_size=tok.n_text)))
    if cfg.go_on:
        load_decoder(decoder, out / "toy-vicuna")
    else:
        teach(decoder, tok, out, first, lambda step, i: lesson(tok, random.Random(f"{cfg.seed} {step} {i}"), step / first))
    teach(decoder, tok, out, cfg.vicuna_steps - first, lambda step, i: lesson(tok, random.Random(f"{cfg.seed} again {step} {i}"), 1.0, hard=True))
    print(f"toy-vicuna: {cfg.vicuna_steps - first * cfg.go_on} steps in {(time.time() - began) / 60:.1f} minutes, now in {out / 'toy-vicuna'}")


def teach(decoder, tok, out, n, prepare, lr=1e-3):
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = tqdm(range(1, n + 1), desc="toy-vicuna", dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100, (n - step) / (0.4 * n))
        loss, _ = text_loss(decoder, tok, [prepare(step, i) for i in range(32)], noise=0.2)
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


def spell(scene, tok, rng=None):
    """A picture in words: of each of 8 x 8 places its column (a to h), its row (1 to 8) and what is there -> ids (64, 5), -1 where
    there is nothing more to say. With rng, now and then a word is missing, and the edges of things are a little off."""
    shown = covered(scene, enough=rng.choice((0.2, 0.3, 0.4)) if rng else 0.25).tolist()
    parts = [(t.kind, t.color, t.size) for t in scene.things] + ([("sign", scene.sign.word)] if scene.sign else [])
    said = []
    for n, who in enumerate(shown):
        ids = [tok.encode(word)[0] for word in ("abcdefgh"[n % 8], str(1 + n // 8), *(parts[who] if who >= 0 else ()))]
        ids = [i for i in ids if not rng or rng.random() > 0.08]
        said.append(ids + [-1] * (5 - len(ids)))
    return said


def text_loss(decoder, tok, lessons, noise=0.0):
    """Mean loss over the answers' tokens, and what was guessed for each: one list of ids per lesson."""
    T = math.ceil(max(len(tokens) for tokens, *_ in lessons) / 32) * 32
    tokens = torch.tensor([t + [tok.pad] * (T - len(t)) for t, *_ in lessons])
    labels = torch.tensor([l + [IGNORE] * (T - len(l)) for _, l, _ in lessons])[:, 1:]
    said, table = torch.tensor([s for *_, s in lessons]), decoder.embed_tokens.weight
    places = (F.embedding(said.clamp(min=0), table) * (said >= 0)[..., None]).sum(2)                     # (B, 64, D)
    places = places + noise * table.detach().std() * torch.randn_like(places)
    x = decoder.embed_tokens(tokens.clamp(max=tok.n_text - 1))
    x = x.masked_scatter((tokens == tok.image)[..., None], places)
    h, keep = decoder(x)[:, :-1], labels != IGNORE
    logits = decoder.lm_head(h[keep])
    return F.cross_entropy(logits, labels[keep]), [g.tolist() for g in logits.argmax(-1).split(keep.sum(1).tolist())]


def lesson(tok, rng, progress, hard=False):
    """A picture in words, then what there is to say of it -> tokens, labels, spelled. First terse questions ("color cat": "red"),
    then bare ones, then whole conversations: where the answer follows the word it depends on, finding it is learned within 300 steps;
    with a format prompt between them, not within 1,600."""
    scene = toyworld.random_scene(rng)
    shares = (1, 0, 0) if progress < 0.2 else (0.3, 0.7, 0) if progress < 0.35 else (0.1, 0.5, 0.4) if progress < 0.55 else (0, 0.2, 0.8)
    form = rng.choices(("terse", "bare", "conversation"), shares)[0]
    spelled = spell(scene, tok, rng)
    if form == "conversation":
        asked = toyworld.questions(scene, rng)
        asked += [item for _ in range(2 * hard) for item in toyworld.questions(scene, rng) if item[0] in HARD and item not in asked]
        turns = [turn for _, question, answer in rng.sample(asked, min(5, len(asked))) for turn in (("human", question), ("gpt", answer))]
        return *encode_conversation(tok, turns, "vicuna_v1", [len(spelled)]), spelled
    pairs = terse(scene, rng) if form == "terse" else [(bare(q), a) for _ in range(2) for _, q, a in toyworld.questions(scene, rng)]
    pairs = list(dict.fromkeys(pairs))
    rng.shuffle(pairs)
    tokens, labels = [tok.bos] + [tok.image] * len(spelled), [IGNORE] * (1 + len(spelled))
    for question, answer in pairs:
        q, a = tok.encode("\n" + question, dummy_prefix=False), tok.encode(" " + answer, dummy_prefix=False)
        if len(tokens) + len(q) + len(a) <= 256:
            tokens, labels = tokens + q + a, labels + [IGNORE] * len(q) + a
    return tokens, labels, spelled


def terse(scene, rng):
    """Questions of a few words, the last of them what is asked about."""
    kinds = [t.kind for t in scene.things]
    pairs = [("how many " + k, str(toyworld.count(scene, kind=k))) for k in rng.sample(toyworld.KINDS, 2) + kinds[:1]]
    pairs += [("how many " + c, str(toyworld.count(scene, color=c))) for c in rng.sample(list(toyworld.COLORS), 1) + [scene.things[0].color]]
    for t in scene.things:
        name = t.kind if kinds.count(t.kind) == 1 else f"{t.color} {t.kind}"
        pairs += [("color " + t.kind, t.color)] * (name == t.kind) + [("size " + name, t.size), ("place " + name, t.place), ("thing " + t.place, t.kind)]
        pairs += [("box " + name, toyworld.coordinates(t.box)), (f"any {t.color} {t.kind}", "yes")]
        other, near = (rng.choice(toyworld.KINDS), rng.choice(list(toyworld.COLORS))), rng.choice([(t.kind, c) for c in toyworld.COLORS] + [(k, t.color) for k in toyworld.KINDS])
        pairs += [(f"any {c} {k}", "no") for k, c in [rng.choice((other, near))] if not toyworld.count(scene, k, c) and (k, c) not in toyworld.UNSEEN]
        what, question, values = rng.choice((("kind", "thing " + t.place, toyworld.KINDS), ("place", "place " + name, toyworld.PLACES),
                                             ("color", f"color {t.kind} {t.place}", [c for c in toyworld.COLORS if (t.kind, c) not in toyworld.UNSEEN])))
        options = rng.sample([v for v in values if v != getattr(t, what)], 3)
        options.insert(rng.randrange(4), getattr(t, what))
        pairs += [(" ".join([question, *(f"{letter}. {v}" for letter, v in zip("ABCD", options))]), "ABCD"[options.index(getattr(t, what))])]
    for found in filter(None, (toyworld.ask_spatial(scene, rng) for _ in range(3))):
        pairs += [(re.sub(r"^Is | ?\bthe\b|\?\n.*", "", found[0]).strip(), found[1])]
    return pairs + [("all", toyworld.caption(scene)), ("sign", scene.sign.word if scene.sign else "none")]


def bare(question):
    """A question without its format prompt."""
    for prompt in (toyworld.SHORT, toyworld.LETTER, toyworld.INSUFFICIENT):
        question = question.replace("\n" + prompt, "")
    return question


@torch.no_grad()
def told(decoder, tok, n=64):
    """Share of questions answered right (each token, given the true ones before it) about held-out pictures that are told in words."""
    wins = {}
    for category in toyworld.ASK:
        lessons = []
        for i in range(n):
            rng = random.Random(f"told {i}")
            scene = toyworld.random_scene(rng, held_out=True)
            lessons += [(*encode_conversation(tok, [("human", q), ("gpt", a)], "vicuna_v1", [64]), spell(scene, tok))
                        for c, q, a in toyworld.questions(scene, rng) if c == category]
        guesses = text_loss(decoder, tok, lessons)[1]
        answers = [[i for i in labels if i != IGNORE] for _, labels, _ in lessons]
        wins[category] = sum(is_right(tok.decode(g[:-1]), tok.decode(a[:-1])) for g, a in zip(guesses, answers)) / len(answers)
    return wins


if __name__ == "__main__":
    sys.exit(run(main))
