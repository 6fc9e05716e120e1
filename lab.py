"""The toy's own CLIP and Vicuna, from nothing: what LLaVA starts from, at a size that a laptop trains in half an hour.

    python lab.py ingredients                   # writes assets/toy-clip (21 minutes on one core) and assets/toy-vicuna (12 on two)

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

hd          The toy world with words that one tile of 96 px cannot show, trained with `pad`, with LLaVA-1.5-HD's tiles, and with these but
            without the global view, at the same budget of training tokens: held-out accuracy, mean and standard deviation over seeds
            (the paper's own ablation, arXiv:2310.03744v2, A.1). Runs that are finished are not repeated.
tile-speed  Training tokens/s of the decoder with HD's packing and without, at equal sequence length and equally many tiles.

    python lab.py hd --out out/hd --tokens 3000000 --seeds 3
    python lab.py tile-speed
"""

import argparse
import json
import math
import random
import statistics
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
import train
from data import IGNORE, Examples, Records, Tokenizer, encode_conversation, parse_args, run
from model import PRESETS, VLM, Decoder, clip_json, init_weights, llama_json, rename, LLAMA_NAMES, write_model
from vision import CLIP_NAMES, TILINGS, UserError, ViT, cut_tiles, join

ATTRIBUTES = ("size", "color", "kind", "place", "word")
VALUES = (("small", "big"), tuple(toyworld.COLORS), toyworld.KINDS, toyworld.PLACES, toyworld.WORDS)


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["ingredients", "hd", "tile-speed"], help="ingredients: make toy-clip and toy-vicuna; hd, tile-speed: see above")
    cli.add_argument("--out", default="", help="folder to write to (default assets, of hd out/hd)")
    cli.add_argument("--clip-steps", type=int, default=2000, help="steps of 64 pictures (default 2000)")
    cli.add_argument("--vicuna-steps", type=int, default=1500, help="steps of 32 texts (default 1500)")
    cli.add_argument("--only", default="", choices=["", "clip", "vicuna"], help="make one of the two")
    cli.add_argument("--seed", type=int, default=0, help="(default 0)")
    cli.add_argument("--tokens", type=int, default=3_000_000, help="hd: training tokens of each run (default 3000000)")
    cli.add_argument("--seeds", type=int, default=3, help="hd: runs of each kind (default 3)")
    cli.add_argument("--eval-limit", type=int, default=0, help="hd: answer only this many of the held-out questions; 0: all (default 0)")
    cli.add_argument("--pictures", type=int, default=6000, help="hd: training pictures (default 6000)")
    cfg = parse_args(cli, sys.argv[1:] if argv is None else argv)
    if cfg.what == "hd":
        return hd(Path(cfg.out or "out/hd"), cfg)
    if cfg.what == "tile-speed":
        return tile_speed()
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


# ---- hd ----------------------------------------------------------------------------------------------------------------

WAYS = {"pad": ("pad", {}), "hd": ("hd", {}), "hd, no global view": ("hd", {"global_view": "none"})}


def hd(out, cfg, batch_size=16, size=192, words=0.5):
    """Signs of a 192 px picture are as large as those of the usual 96 px world where two by two tiles show it, half as large in one tile."""
    if cfg.seeds < 1 or cfg.tokens < 1 or cfg.pictures < batch_size:
        raise UserError(f"--seeds {cfg.seeds}, --tokens {cfg.tokens}, --pictures {cfg.pictures}: at least 1, 1 and {batch_size} are needed")
    world = out / f"world-{cfg.pictures}"
    toyworld.write_world(world, cfg.pictures, 240, size, 0, words)
    records, tok, tables = Records(world / "train.json", world), Tokenizer(train.TOY["llm"]), {}
    for way, (mode, choices) in WAYS.items():
        tower = replace(PRESETS["toy"].vision, tiling=replace(TILINGS[mode], **choices) if choices else None)
        some = Examples(records, tok, "vicuna_v1", tower, mode, PRESETS["toy"].decoder.block_size)
        length = statistics.mean(len(some[i]["tokens"]) for i in range(0, len(some), max(1, len(some) // 200)))
        steps = max(1, round(cfg.tokens / length / batch_size))
        print(f"{way}: {length:.0f} tokens a record, {steps} steps", flush=True)
        for seed in range(cfg.seeds):
            run_dir = out / f"{way.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
            if not (run_dir / "results.json").exists():
                flags = {"stage": "finetune", "data": world / "train.json", "image-mode": mode, "batch-size": batch_size, "max-steps": steps, "seed": seed,
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
        pixels, layout = join([cut_tiles(picture, tower, mode)] * (n * B))
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


if __name__ == "__main__":
    sys.exit(run(main))
