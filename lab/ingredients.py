"""lab.ingredients: moved here; to be rewritten."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
import argparse
import contextlib
import json
import math
import random
import re
import statistics
import sys
import time

from tqdm import tqdm
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import mpo
import toyworld
import train
from conversation import Tokenizer, encode_conversation, train_tokenizer
from data import Examples, Records
from eval import answer_questions, is_right
from model import IGNORE, Decoder, PRESETS, VLM, init_weights
from pairs import ask_step_by_step, judge_answer, parse_answer
from support.cli import UserError, parse_args, run
from support.export import clip_json, clip_name, llama_json, llama_name, public_layout, write_model
from support.weights import load_decoder, load_vision
from vision import TILINGS, ViT, cut_tiles, join_pictures



ATTRIBUTES = ("size", "color", "kind", "place", "word")
VALUES = (toyworld.SIZES, tuple(toyworld.COLORS), toyworld.KINDS, toyworld.PLACES, toyworld.WORDS)
FALSE, TRUE, UNTOLD = 0, 1, 2                    # of a phrase and a thing
HARD = ("choice", "count", "box")
NOTHING, UNSURE = -1, -2                         # of a patch that shows none of the things, or too little of one to say



def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["ingredients", "hd", "tile-speed", "mpo"],
                     help="ingredients: make toy-clip, toy-vicuna and toy-connector; the others: see above")
    cli.add_argument("--out", default="", help="folder to write to (default assets, of hd out/hd, of mpo out/lab-mpo)")
    cli.add_argument("--clip-steps", type=int, default=4000, help="steps of 48 pictures (default 4000)")
    cli.add_argument("--vicuna-steps", type=int, default=5500, help="steps of 32 texts (default 5500)")
    cli.add_argument("--connector-steps", type=int, default=8000, help="steps of 32 pictures (default 8000)")
    cli.add_argument("--only", default="", choices=["", "clip", "vicuna", "connector"], help="make one of the three")
    cli.add_argument("--seed", type=int, default=0, help="(default 0)")
    cli.add_argument("--tokens", type=int, default=3_000_000, help="hd: training tokens of each run (default 3000000)")
    cli.add_argument("--seeds", type=int, default=3, help="hd, mpo: runs of each kind (default 3)")
    cli.add_argument("--eval-limit", type=int, default=0, help="hd: answer only this many of the held-out questions; 0: all (default 0)")
    cli.add_argument("--pictures", type=int, default=6000, help="hd: training pictures (default 6000)")
    cli.add_argument("--model", default="out/finetune", help="mpo: the model before; trained first where it is not there (default out/finetune)")
    cli.add_argument("--questions", type=int, default=300, help="mpo: training pictures to ask about, for each method (default 300)")
    cli.add_argument("--samples", type=int, default=8, help="mpo: answers to each question (default 8)")
    cli.add_argument("--steps", type=int, default=60, help="mpo: steps of 16 pairs (default 60)")
    cli.add_argument("--held-out", type=int, default=200, help="mpo: held-out pictures to ask about, each directly, step by step and for a caption (default 200)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    if cfg.what == "hd":
        return hd(Path(cfg.out or "out/hd"), cfg)
    if cfg.what == "tile-speed":
        return tile_speed()
    if cfg.what == "mpo":
        return compare_losses(cfg)
    out = Path(cfg.out or "assets")
    (out / "toy-vicuna").mkdir(parents=True, exist_ok=True)
    if not (out / "toy-vicuna/tokenizer.model").exists() or not cfg.only:
        train_tokenizer(out / "toy-vicuna/tokenizer.model", toyworld.sayings(), 896, required=",]")
    if cfg.only in ("", "clip"):
        make_clip(out, cfg)
    if cfg.only in ("", "vicuna"):
        make_vicuna(out, cfg)
    if cfg.only in ("", "connector"):
        make_connector(out, cfg)



def make_clip(out, cfg, size=48, lr=6e-4):
    torch.manual_seed(cfg.seed)
    rng, tok, began, n = random.Random(cfg.seed), Tokenizer(out / "toy-vicuna"), time.time(), cfg.clip_steps
    clip = CLIP(PRESETS["toy"], tok.vocab_size)

    def loss_at(step):
        pixels, captions, phrases, patches, holding = contrastive_batch(rng, size)
        whole, parts = clip(pixels, tokenize(tok, captions), tokenize(tok, phrases))
        return contrastive_loss(whole, torch.eye(size)) + contrastive_loss(parts.flatten(0, 1)[patches], holding)

    def look():
        write_clip(out, clip)
        return "unseen pairs, right word of: " + "  ".join(f"{k} {v:.1%}" for k, v in named(clip, tok).items())

    descend("toy-clip", clip, n, lambda step: lr * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / n)), loss_at, look)
    print(f"toy-clip: {n} steps in {(time.time() - began) / 60:.1f} minutes, now in {out / 'toy-clip'}")



def descend(name, module, n, lr_at, loss_at, look):
    """The loop of both: n steps of AdamW at lr_at(step) on loss_at(step), and now and then a look, which also saves."""
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = tqdm(range(1, n + 1), desc=name, dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr_at(step)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 250 == 0 or step == n:
            bar.write(f"step {step}  loss {loss.item():.3f}  {look()}")
            sys.stdout.flush()



def write_clip(out, clip):
    vision = {"vision_model." + clip_name(name): p.half() for name, p in clip.vision.state_dict().items()}
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
    scenes = [repainted(scene, rng, 0.4) for scene in scenes]
    phrases = {}
    for fact in (fact for scene in scenes for fact in facts(scene)):
        said = thin_out(fact, rng)
        phrases[said] = phrases[change_a_word(said, rng)] = None            # a dict keeps the order and drops what was said before
    phrases = [p for p in phrases if (p[2], p[1]) not in toyworld.UNSEEN]
    holding, patches = [], []
    for k, scene in enumerate(scenes):
        rows = [[holds(phrase, fact) for phrase in phrases] + [FALSE] for fact in facts(scene)] + [[FALSE] * len(phrases) + [TRUE]]
        shown = covered(scene)
        full, empty = (at.nonzero()[:, 0].tolist() for at in (shown >= 0, shown == NOTHING))
        for n in full + rng.sample(empty, min(len(full), len(empty))):      # as many that show nothing
            patches.append(k * len(shown) + n)
            holding.append(rows[shown[n]])                                  # NOTHING is -1: the last row
    texts = [words(phrase) for phrase in phrases] + ["a picture of nothing"]
    captions = [re.sub("#[0-9a-f]+ ", "", toyworld.caption(scene)) for scene in scenes]
    return draw(scenes, rng), captions, texts, torch.tensor(patches), torch.tensor(holding)



def repaint(thing, rng):
    """The thing in a paint that has no name: a tower that has seen cats of every hue looks at their shape, even of a blue one. Never a paint
    that is less than 110 (summed over red, green and blue) from the color of the kind's UNSEEN pair."""
    color = next(color for kind, color in toyworld.UNSEEN if kind == thing.kind)
    while True:
        light, spread = rng.choice(((rng.randrange(256), 255), (rng.randrange(256), 40), (rng.choice((75, 210)), 25)))     # vivid, gray, dark or pale
        paint = [min(255, max(0, light + rng.randint(-spread, spread))) for _ in range(3)]
        if sum(abs(a - b) for a, b in zip(paint, toyworld.COLORS[color])) >= 110:
            return replace(thing, color="#%02x%02x%02x" % tuple(paint))



def repainted(scene, rng, share):
    return replace(scene, things=tuple(repaint(thing, rng) if rng.random() < share else thing for thing in scene.things))



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
    """Each thing as (size, color, kind, place, word); None where it has no such attribute, or its paint no name."""
    return [(t.size, t.color if t.color in toyworld.COLORS else None, t.kind, t.place, None) for t in scene.things] + (
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
    never cats in training, and a tower that is told so learns to look at colors instead of shapes. So does what color a nameless paint is."""
    agree = [a is None or a == b for a, b in zip(phrase, fact)]
    if all(agree):
        return TRUE
    nameless = fact[1] is None and fact[2] != "sign"
    if nameless and all(agree[:1] + agree[2:]):
        return UNTOLD
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



def draw(scenes, rng=None):
    """-> (B, 3, S, S). With rng some are drawn larger and made smaller as any user's picture is, which draws edges a little differently."""
    cfg = PRESETS["toy"].vision
    sides = [rng.choice((1, 1, 4 / 3, 2, 3)) if rng else 1 for _ in scenes]
    return torch.cat([cut_tiles(toyworld.draw_scene(s, round(k * cfg.image_size)), cfg, "pad")[0] for s, k in zip(scenes, sides)])



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



def make_vicuna(out, cfg, size=32, lr=1e-3):
    torch.manual_seed(cfg.seed)
    tok, began, n = Tokenizer(out / "toy-vicuna"), time.time(), cfg.vicuna_steps
    decoder = init_weights(Decoder(replace(PRESETS["toy"].decoder, vocab_size=tok.n_text)))

    def loss_at(step):
        lessons = [lesson(tok, random.Random(f"{cfg.seed} {step} {i}"), step / n) for i in range(size)]
        with torch.autocast("cpu", torch.bfloat16):                         # where the processor has bfloat16, 1.6 times as fast
            return text_loss(decoder, tok, lessons, noise=0.2)[0]

    def look():
        tensors = {llama_name(name): p.half() for name, p in decoder.state_dict().items()}
        write_model(out / "toy-vicuna", tensors, llama_json(decoder.cfg) | {"architectures": ["LlamaForCausalLM"]})
        return "told, unseen pairs: " + "  ".join(f"{k} {v:.0%}" for k, v in told(decoder, tok).items())

    descend("toy-vicuna", decoder, n, lambda step: lr * min(1, step / 100, (n - step) / (0.4 * n)), loss_at, look)
    print(f"toy-vicuna: {n} steps in {(time.time() - began) / 60:.1f} minutes, now in {out / 'toy-vicuna'}")



def spell(scene, tok, rng=None):
    """A picture in words: of each of 8 x 8 patches its column (a to h), its row (1 to 8), and of what it shows the kind, the color and the
    size, or what is written, and the place -> ids (64, 7), -1 where there is nothing more to say. It is what the tower knows of a patch.
    A paint without a name goes unsaid. With rng, now and then a word is missing, and the edges of things are a little off."""
    shown = covered(scene, enough=rng.choice((0.2, 0.3, 0.4)) if rng else 0.25).tolist()
    parts = [(t.kind, t.color, t.size, *t.place.split()) for t in scene.things]
    parts += [("sign", scene.sign.word, *scene.sign.place.split())] if scene.sign else []
    said = []
    for n, who in enumerate(shown):
        ids = [tok.encode(word)[-1] for word in ("abcdefgh"[n % 8], str(1 + n // 8), *(parts[who] if who >= 0 else ())) if word[0] != "#"]
        ids = [i for i in ids if not rng or rng.random() > 0.08]
        said.append(ids + [-1] * (7 - len(ids)))
    return said



def text_loss(decoder, tok, lessons, noise=0.0):
    """Mean loss over the answers' tokens, and what was guessed for each: one list of ids per lesson."""
    T = math.ceil(max(len(tokens) for tokens, *_ in lessons) / 32) * 32
    tokens = torch.tensor([t + [tok.pad] * (T - len(t)) for t, *_ in lessons])
    labels = torch.tensor([l + [IGNORE] * (T - len(l)) for _, l, _ in lessons])[:, 1:]
    said, table = torch.tensor([s for *_, s in lessons]), decoder.embed_tokens.weight
    places = spelled_rows(said, table)
    places = places + noise * table.detach().std() * torch.randn_like(places)
    x = decoder.embed_tokens(tokens.clamp(max=tok.n_text - 1))
    x = x.masked_scatter((tokens == tok.image)[..., None], places)
    h, keep = decoder(x)[:, :-1], labels != IGNORE
    logits = decoder.lm_head(h[keep])
    return F.cross_entropy(logits, labels[keep]), [g.tolist() for g in logits.argmax(-1).split(keep.sum(1).tolist())]



def spelled_rows(said, table):
    """Ids (B, 64, 7) as spell() gives them -> (B, 64, D), the sums of their embeddings."""
    return (F.embedding(said.clamp(min=0), table) * (said >= 0)[..., None]).sum(2)



def lesson(tok, rng, progress):
    """-> tokens, labels, spelled. In half of the lessons some kinds and colors go by words that mean something else, or nothing: to name
    what a patch says, whatever that is, is a better habit than to know which kinds have which colors."""
    *told, spelled = plain_lesson(tok, rng, progress)
    if rng.random() < 0.5 or any(id in tok.encode("legs") for id in told[0]):            # who could count the legs of a word?
        return *told, spelled
    names = [tok.encode(toyworld.plural(kind)) + tok.encode(kind) for kind in toyworld.KINDS] + [tok.encode(color) for color in toyworld.COLORS]
    taken = {id for name in names for id in name}.union(told[0], *spelled)
    free = [id for id in range(tok.n_text) if re.fullmatch(r"\u2581[A-Za-z]{3,}", tok.processor.id_to_piece(id)) and id not in taken]
    other = {id: new for name, new in zip(names, rng.sample(free, len(names))) if rng.random() < 0.5 for id in name}
    return *([other.get(id, id) for id in ids] for ids in told), [[other.get(id, id) for id in ids] for ids in spelled]



def plain_lesson(tok, rng, progress):
    """A picture in words, then what there is to say of it -> tokens, labels, spelled. First terse questions ("color cat": "red"),
    then bare ones, then whole conversations: where the answer follows the word it depends on, finding it is learned within 300 steps;
    with a format prompt between them, not within 1,600."""
    scene = toyworld.random_scene(rng, held_out=rng.random() < 0.25)        # it has read of blue cats, though nobody has seen one
    shares = (1, 0, 0) if progress < 0.15 else (0.4, 0.6, 0) if progress < 0.3 else (0.2, 0.4, 0.4) if progress < 0.5 else (0.05, 0.2, 0.75)
    form = rng.choices(("terse", "bare", "conversation"), shares)[0]
    spelled = spell(scene, tok, rng)
    asked = toyworld.ask_all(scene, rng)                                  # and more of what is hard
    asked += [item for _ in range(2) for item in toyworld.ask_all(scene, rng) if item[0] in HARD and item not in asked]
    if form == "conversation":
        pairs = [(bare(q) if rng.random() < 0.25 else q, a) for _, q, a in rng.sample(asked, min(5, len(asked)))]
        pairs += [(toyworld.DETAIL, toyworld.describe(scene))] * (rng.random() < 0.3)
        turns = [turn for question, answer in pairs for turn in (("human", question), ("gpt", answer))]
        return *encode_conversation(tok, turns, "vicuna_v1", [len(spelled)]), spelled
    pairs = terse(scene, rng) if form == "terse" else [(bare(q), a) for _, q, a in asked]
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
    kinds, names = [t.kind for t in scene.things], [f"{p.color} {p.kind}" if p in scene.things else p.word for p in scene.parts]
    pairs = [("how many " + k, str(toyworld.count_things(scene, kind=k))) for k in rng.sample(toyworld.KINDS, 2) + kinds[:1]]
    pairs += [("how many " + c, str(toyworld.count_things(scene, color=c))) for c in rng.sample(list(toyworld.COLORS), 1) + [scene.things[0].color]]
    pairs += [("after " + a, b) for a, b in zip(names, names[1:] + ["none"])] + [("first", names[0])]          # a caption, step by step
    for t in scene.things:
        name = t.kind if kinds.count(t.kind) == 1 else f"{t.color} {t.kind}"
        pairs += [("color " + t.kind, t.color)] * (name == t.kind) + [("size " + name, t.size), ("place " + name, t.place), ("thing " + t.place, t.kind)]
        pairs += [("box " + name, toyworld.coordinates(t.box)), (f"any {t.color} {t.kind}", "yes")]
        other, near = (rng.choice(toyworld.KINDS), rng.choice(list(toyworld.COLORS))), rng.choice([(t.kind, c) for c in toyworld.COLORS] + [(k, t.color) for k in toyworld.KINDS])
        pairs += [(f"any {c} {k}", "no") for k, c in [rng.choice((other, near))] if not toyworld.count_things(scene, k, c) and (k, c) in toyworld.nameable_pairs(scene)]
        what, question, values = rng.choice((("kind", "thing " + t.place, toyworld.KINDS), ("place", "place " + name, toyworld.PLACES),
                                             ("color", f"color {t.kind} {t.place}", [c for k, c in toyworld.nameable_pairs(scene) if k == t.kind])))
        right = getattr(t, what)
        options = rng.sample([v for v in values if v != right], 3)
        options.insert(rng.randrange(4), right)
        listed = " ".join(f"{letter}. {v}" for letter, v in zip("ABCD", options))
        pairs += [(f"{question} {listed}", "ABCD"[options.index(right)]), (f"{listed} {right}", "ABCD"[options.index(right)])]    # the letter of a given word, too
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
                        for c, q, a in toyworld.ask_all(scene, rng) if c == category]
        guesses = text_loss(decoder, tok, lessons)[1]
        answers = [[i for i in labels if i != IGNORE] for _, labels, _ in lessons]
        wins[category] = sum(is_right(tok.decode(g[:-1]), tok.decode(a[:-1])) for g, a in zip(guesses, answers)) / len(answers)
    return wins



def make_connector(out, cfg, n=8000, size=32, lr=4e-3):
    """Least squares over the patches of n pictures: what toy-clip sees in one -> the row that toy-vicuna was told of it."""
    torch.manual_seed(cfg.seed)
    rng, tok, began, steps = random.Random(cfg.seed), Tokenizer(out / "toy-vicuna"), time.time(), cfg.connector_steps
    vlm = VLM(PRESETS["toy"])
    load_vision(vlm.vision, out / "toy-clip")
    load_decoder(vlm.decoder, out / "toy-vicuna")
    table = vlm.decoder.embed_tokens.weight.detach()
    colors = table[[tok.encode(color)[-1] for color in toyworld.COLORS]]
    colorless = torch.eye(vlm.connector.D) - torch.linalg.pinv(colors) @ colors            # takes out of a row what the colors span

    @torch.no_grad()
    def see(scenes, mark, rng=None):                                        # -> (B, 64, D_vision), (B, 64, D), and (B, 64) where a marked thing is
        rows = spelled_rows(torch.tensor([spell(scene, tok) for scene in scenes]), table)
        marked = [[0 <= i < len(s.things) and mark(s.things[i]) for i in covered(s).tolist()] for s in scenes]
        return vlm.vision(draw(scenes, rng)), rows, torch.tensor(marked)

    print("toy-connector: looks at the pictures first", flush=True)
    lots = ([repainted(toyworld.random_scene(rng), rng, 0.3) for _ in range(50)] for _ in range(-(-min(n, steps * size) // 50)))
    seen = [see(scenes, lambda thing: thing.color not in toyworld.COLORS, rng) for scenes in lots]
    features, rows, nameless = (torch.cat(part) for part in zip(*seen))
    held = see([toyworld.random_scene(rng, held_out=True) for _ in range(300)], lambda thing: (thing.kind, thing.color) in toyworld.UNSEEN)
    spread = rows.var()

    def loss_at(step):
        i = torch.randint(len(rows), (size,))
        off = vlm.connector(features[i]) - rows[i]
        return torch.where(nameless[i][..., None], off @ colorless, off).square().mean() / spread

    @torch.no_grad()
    def look():
        public, config = public_layout(vlm)
        write_model(out / "toy-connector", {public(name): p for name, p in vlm.state_dict().items() if name.startswith("connector.")}, config)
        off = (vlm.connector(held[0]) - held[1]).square().mean(-1) / spread
        return f"error on held-out pictures {off.mean():.1%} of the variance, on their unseen pairs {off[held[2]].mean():.1%}"

    descend("toy-connector", vlm.connector, steps, lambda step: lr * min(1, step / 200) * (1 - (step - 1) / steps), loss_at, look)
    print(f"toy-connector: {steps} steps in {(time.time() - began) / 60:.1f} minutes, now in {out / 'toy-connector'}")



WAYS = {"pad": ("pad", {}), "hd": ("hd", {}), "hd, no global view": ("hd", {"global_view": "none"})}



def hd(out, cfg, batch_size=8, lr=1e-3, size=192, words=0.5):
    """Signs of a 192 px picture are as large as those of the usual 96 px world where two by two tiles show it, half as large in one tile."""
    if cfg.seeds < 1 or cfg.tokens < 1 or cfg.pictures < batch_size:
        raise UserError(f"--seeds {cfg.seeds}, --tokens {cfg.tokens}, --pictures {cfg.pictures}: at least 1, 1 and {batch_size} are needed")
    world = out / f"world-{cfg.pictures}"
    toyworld.write_world(world, cfg.pictures, 240, size, 0, words)
    records, tok, tables = Records(world / "train.json", world), Tokenizer(train.TOY["llm"]), {}
    print(f"kinds that a patch tells before training: {kinds_told(size // 2):.1%} in one tile, {kinds_told(size):.1%} in 2 x 2, where things are twice as large")
    for way, (mode, choices) in WAYS.items():
        tower = replace(PRESETS["toy"].vision, tiling=replace(TILINGS[mode], **choices) if choices else None)
        some = Examples(records, tok, "vicuna_v1", tower, mode, PRESETS["toy"].decoder.block_size)
        length = statistics.mean(len(some[i]["tokens"]) for i in range(0, len(some), max(1, len(some) // 200)))
        steps = max(1, round(cfg.tokens / length / batch_size))
        print(f"{way}: {length:.0f} tokens a record, {steps} steps", flush=True)
        for seed in range(cfg.seeds):
            run_dir = out / f"{way.replace(', ', '-').replace(' ', '-')}-{steps}x{batch_size}-{seed}"
            if not (run_dir / "results.json").exists():
                flags = {"stage": "finetune", "data": world / "train.json", "image-mode": mode, "batch-size": batch_size, "max-steps": steps, "lr": lr, "seed": seed,
                         "out": run_dir, "eval-every": 0, "save-every": 0, "eval-limit": cfg.eval_limit} | {name.replace("_", "-"): value for name, value in choices.items()}
                if code := train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))]):
                    return code
            tables.setdefault(way, []).append(json.loads((run_dir / "results.json").read_text())["table"])
    said = [f"{'':14s}" + "".join(f"{way:>22s}" for way in tables)]
    for category in tables["pad"][0]:
        said.append(f"{category:14s}" + "".join(f"{statistics.mean(a):15.1%} +- {statistics.stdev(a) if len(a) > 1 else 0:4.1%}" for a in (
            [table[category]["accuracy"] for table in runs] for runs in tables.values())))
    print(f"\nheld-out accuracy, mean +- standard deviation of {cfg.seeds} seeds, {cfg.tokens:,} training tokens each\n" + "\n".join(said))
    (out / "hd.json").write_text(json.dumps({"tokens": cfg.tokens, "pictures": cfg.pictures, "tables": tables}, indent=1))
    return 0



@torch.no_grad()
def kinds_told(size, n=128, S=96):
    """Of the patches of held-out things in pictures of `size` px, cut into tiles: how often is the visual token, as tower and connector are
    before training, nearer to the word for the kind than to every other kind's?"""
    vlm, tok = train.build(train.parse_flags(["--stage", "finetune"]))
    words, rng, right, k = vlm.decoder.embed_tokens.weight[[tok.encode(kind)[0] for kind in toyworld.KINDS]], random.Random(1), [], size // S
    for scene in (toyworld.random_scene(rng, held_out=True) for _ in range(n)):
        picture = toyworld.draw_scene(scene, size)
        tiles = [cut_tiles(picture.crop((S * c, S * r, S * c + S, S * r + S)), vlm.cfg.vision, "pad")[0] for r in range(k) for c in range(k)]
        said = vlm.connector(vlm.vision(torch.cat(tiles)).flatten(0, 1)) @ (words - words.mean(0)).T
        said = said.view(k, k, 8, 8, -1).transpose(1, 2).reshape(64 * k * k, -1).argmax(-1)             # the patches of all tiles, row by row
        for p, thing in enumerate(scene.things):
            right += (said[covered(scene, 8 * k) == p] == toyworld.KINDS.index(thing.kind)).tolist()
    return sum(right) / len(right)



def tile_speed(B=8, size=192, rounds=15):
    """One training step of the toy from tokens to gradients, HD against as many whole pictures of one tile, at the same sequence length.

    In processor time, which is the same on a busy machine.
    """
    vlm, rng = VLM(PRESETS["toy"]), np.random.default_rng(0)
    vlm.vision.requires_grad_(False)
    picture = train.Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    batches = {}
    for mode, n in ("pad", 5), ("hd", 1):
        tower = vlm.cfg.vision
        pixels, layout = join_pictures([cut_tiles(picture, tower, mode)] * (n * B))
        batches[mode] = pixels, layout
    T = 64 + max(len(layout) for _, layout in batches.values()) // B
    seconds = {name: [] for name in ("pad", "hd", "tower")}
    for _ in range(rounds):                                                 # in turns, so that what else runs here slows them alike
        for mode, (pixels, layout) in batches.items():
            vlm.set_image_mode(mode)
            tokens = torch.full((B, T), 5)
            tokens[:, 1 : 1 + len(layout) // B] = vlm.cfg.image_token
            labels = torch.where(tokens == 5, tokens, IGNORE)
            labels[:, : T - 40] = IGNORE                                    # as many supervised tokens in both
            began = time.process_time()
            vlm(tokens, pixels, labels, layout).backward()
            seconds[mode].append(time.process_time() - began)
            vlm.zero_grad(set_to_none=True)
        began = time.process_time()
        with torch.no_grad():
            vlm.vision(pixels)
        seconds["tower"].append(time.process_time() - began)
    tower, mid = statistics.median(seconds["tower"]), statistics.median
    print(f"{B} records of {T} tokens, {len(pixels)} tiles a step, {rounds} rounds, medians of processor seconds; the tower alone takes {tower:.3f}")
    for mode in batches:
        step = mid(seconds[mode])
        print(f"{mode:4s} {step:.3f} a step: {B * T / step:,.0f} tokens/s with the tower, {B * T / (step - tower):,.0f} in connector and decoder")
    print(f"hd/pad, median of the rounds: {mid(b / a for a, b in zip(seconds['pad'], seconds['hd'])):.3f} of the time of a step, "
          f"{mid((b - tower) / (a - tower) for a, b in zip(seconds['pad'], seconds['hd'])):.3f} without the tower")
    return 0



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
        question, truth, _ = toyworld.two_step_question(scene, rng)
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
        question, truth, _ = toyworld.two_step_question(scene, rng)
        exam.append((Path(f"toyworld/images/val_{i:05d}.png"), question, str(truth), scene))
    return exam



def take_exam(model, exam):
    """-> shares: right answers asked directly and step by step, worked answers without a final one, things in captions that are not in the picture."""
    vlm, tok = VLM.from_pretrained(model), Tokenizer(model)
    ask = lambda question: [said.text for said in answer_questions(vlm, tok, [{"paths": [p], "text": question(q)} for p, q, _, _ in exam])]
    direct, worked, captions = ask(lambda q: f"{q}\n{toyworld.SHORT}"), ask(lambda q: ask_step_by_step(q, 1)), ask(lambda q: toyworld.CAPTION)
    final = [parse_answer(said, 1) for said in worked]
    wrong = [made_up(said, scene) for said, (*_, scene) in zip(captions, exam)]
    share = lambda found: sum(found) / len(exam)
    return {"direct": share(judge_answer(said, truth) for said, (_, _, truth, _) in zip(direct, exam)),
            "cot": share(bool(f) and judge_answer(f[1], truth) for f, (_, _, truth, _) in zip(final, exam)), "no_format": share(f is None for f in final),
            "hallucinated": sum(n for n, _ in wrong) / max(1, sum(n for _, n in wrong)), "captions": share(n > 0 for n, _ in wrong)}



def made_up(caption, scene):
    """-> how many of the things a caption names are not in the picture, how many it names (CHAIR, arXiv:1809.02156). A sign counts by its word."""
    named = Counter(re.findall(rf"({'|'.join(toyworld.COLORS)}) ({'|'.join(toyworld.KINDS)})\b", caption)) + Counter(re.findall(r"says (\w+)", caption))
    there = Counter((thing.color, thing.kind) for thing in scene.things) + Counter([scene.sign.word] if scene.sign else [])
    return (named - there).total(), named.total()


if __name__ == "__main__":
    sys.exit(run(main))
