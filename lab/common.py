"""What the toy's parts share: pictures of scenes, what each patch of one shows, and a training loop."""

import math
import random
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageColor

import toyworld
from model import PRESETS
from support.cli import Bar
from support.export import write_model
from vision import cut_tiles

NOTHING = -1                     # a patch shows none of the parts
UNSURE = -2                      # or too little of one to say
UNKNOWN = "unknown"              # an attribute that the picture does not tell
WHOLE = (0.0, 0.0, 1.0)          # a window: left, top and side, as shares of the picture's


# ---- pictures ----


def draw_pixels(scenes, rng=None, windows=None):
    """-> (B, 3, S, S), what each scene shows in its window.

    With rng some are drawn larger and made smaller, as a user's are: edges differ.
    """
    cfg = PRESETS["toy"].vision
    tiles = []
    for scene, (left, top, side) in zip(scenes, windows or [WHOLE] * len(scenes)):
        scale = rng.choice((1, 1, 4 / 3, 2, 3)) if rng else 1
        px = round(min(scale, 3 * side) / side * cfg.image_size)
        corners = (left, top, left + side, top + side)
        picture = toyworld.draw_scene(scene, px).crop([round(px * v) for v in corners])
        tiles.append(cut_tiles(picture, cfg, "pad")[0])
    return torch.cat(tiles)


def random_window(rng, parts):
    """That share of them shows a part of a scene, larger, as a tile of LLaVA-1.5-HD does; the others all."""
    if rng.random() >= parts:
        return WHOLE
    side = rng.uniform(0.5, 0.8)
    return rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side


def look_through(scene, window):
    """The scene as a window shows it. A part of a picture does not tell how large things are or where."""
    if window == WHOLE:
        return scene
    left, top, side = window

    def move(part):
        x1, y1, x2, y2 = part.box
        box = ((x1 - left) / side, (y1 - top) / side, (x2 - left) / side, (y2 - top) / side)
        part = replace(part, box=box, place=UNKNOWN)
        if isinstance(part, toyworld.Thing):
            return replace(part, size=UNKNOWN)
        is_whole = min(box) >= 0 and max(box) <= 1
        return part if is_whole else replace(part, word=UNKNOWN)

    return move_parts(scene, move)


def move_parts(scene, move):
    sign = scene.sign and move(scene.sign)
    return replace(scene, things=tuple(map(move, scene.things)), sign=sign)


def repaint(thing, rng):
    """The thing in a paint without a name: who has seen cats of every hue looks at their shape, even if blue.

    Never a paint that is less than 110 (summed over red, green and blue) from the color of the kind's
    UNSEEN pair.
    """
    unseen = ImageColor.getrgb(toyworld.COLORS[dict(toyworld.UNSEEN)[thing.kind]])
    while True:
        vivid = rng.randrange(256), 255
        gray = rng.randrange(256), 40
        dark_or_pale = rng.choice((75, 210)), 25
        light, spread = rng.choice((vivid, gray, dark_or_pale))
        paint = [light + rng.randint(-spread, spread) for _ in range(3)]
        paint = [min(255, max(0, value)) for value in paint]
        if sum(abs(a - b) for a, b in zip(paint, unseen)) >= 110:
            return replace(thing, color="#%02x%02x%02x" % tuple(paint))


def repaint_some(scene, rng, share):
    things = [repaint(thing, rng) if rng.random() < share else thing for thing in scene.things]
    return replace(scene, things=tuple(things))


# ---- what is true of a thing or a sign, and of the patches that show it ----


VALUES = {                           # of each attribute; no color is a paint without a name
    "size": toyworld.SIZES,
    "color": toyworld.COLORS,
    "kind": toyworld.KINDS,
    "place": toyworld.PLACES,
    "word": toyworld.WORDS,
}
# A thing or a sign, or a phrase about one. None: it has no such attribute, or the phrase does not speak of
# it. UNKNOWN: it has one, which the picture does not tell.
Fact = namedtuple("Fact", VALUES, defaults=[None] * len(VALUES))


def scene_facts(scene):
    """A Fact of each thing and then of the sign. A paint may have no name."""
    facts = []
    for thing in scene.things:
        color = thing.color if thing.color in toyworld.COLORS else UNKNOWN
        facts.append(Fact(thing.size, color, thing.kind, thing.place))
    if scene.sign:
        facts.append(Fact(kind="sign", place=scene.sign.place, word=scene.sign.word))
    return facts


def patch_owners(scene, side=8, enough=0.25):
    """Which of the things, or of them and the sign, covers most of each patch, in reading order.

    NOTHING where none covers any of it, UNSURE where it covers less than `enough`.
    """
    def overlap(low, high):          # of each row or column of patches, the share between low and high
        start = np.arange(side) / side
        shared = np.minimum(high, start + 1 / side) - np.maximum(low, start)
        return side * np.clip(shared, 0, None)

    covered = []
    for part in [*scene.things, scene.sign] if scene.sign else scene.things:
        x1, y1, x2, y2 = part.box
        covered.append(np.outer(overlap(y1, y2), overlap(x1, x2)).ravel())

    most = np.max(covered, axis=0)
    owner = np.argmax(covered, axis=0)
    unclear = np.where(most <= 0.02, NOTHING, UNSURE)
    return np.where(most >= enough, owner, unclear).tolist()


def label_patches(scenes, name, side=8):
    """Which of the VALUES of an attribute each patch shows -> (B, side * side), -1 where it shows none."""
    number = {value: i for i, value in enumerate(VALUES[name])}
    labels = []
    for scene in scenes:
        numbers = [number.get(getattr(fact, name), -1) for fact in scene_facts(scene)]
        numbers += [-1, -1]          # where the owner is UNSURE = -2 or NOTHING = -1
        labels.append([numbers[owner] for owner in patch_owners(scene, side)])
    return torch.tensor(labels)


def held_out_scenes(n):
    rng = random.Random(1)
    return [toyworld.random_scene(rng, held_out=True) for _ in range(n)]


def share_right(scores, scenes, name):
    """How often a patch that shows one of the VALUES has its highest score (B, N, V) for that one."""
    labels = label_patches(scenes, name, math.isqrt(scores.shape[1]))
    right = scores.argmax(-1) == labels
    return right[labels >= 0].float().mean().item()


def spell(scene, tok, rng=None):
    """A picture in words, what the tower knows of each patch -> ids (64, 7), -1 where no more is to be said.

    A patch's column (a to h), its row (1 to 8), and of what it shows the kind, the color and the size, or
    what is written, and the place. What is UNKNOWN goes unsaid. With rng, now and then a word is
    missing, and the edges are a little off.
    """
    facts = scene_facts(scene)
    enough = rng.choice((0.2, 0.3, 0.4)) if rng else 0.25
    spelled = []
    for n, owner in enumerate(patch_owners(scene, enough=enough)):
        words = ["abcdefgh"[n % 8], str(1 + n // 8)]
        if owner >= 0:
            fact = facts[owner]
            words += [fact.kind, fact.color, fact.size, fact.word, *fact.place.split()]
        ids = [tok.encode(word)[-1] for word in words if word not in (None, UNKNOWN)]
        if rng:
            ids = [i for i in ids if rng.random() > 0.08]
        spelled.append(ids + [-1] * (7 - len(ids)))
    return spelled


def sum_of_words(spelled, table):
    """Ids (B, 64, 7) as spell() gives them -> (B, 64, D), the sum of each patch's embeddings."""
    embeddings = F.embedding(spelled.clamp(min=0), table)
    return (embeddings * (spelled >= 0)[..., None]).sum(2)


# ---- training ----


def half_cosine(step, n_steps):
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def bfloat16():
    """Where the processor has it: there it is 1.6 times as fast, elsewhere far slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def write_half(out, state, names, config):
    """As support.export.write_model, in float16."""
    write_model(out, {name: tensor.half() for name, tensor in state.items()}, names, config)


def fit_part(out, cfg, module, lr_at, loss_at, look):
    """AdamW at lr_at(step) on loss_at(step), cfg.steps times. out: the folder of the part.

    Now and then look() saves the part -> {what: share of right ones} of held-out scenes.
    """
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = Bar(range(1, cfg.steps + 1), out.name)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr_at(step)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 250 == 0 or step == cfg.steps:
            shares = "  ".join(f"{what} {share:.1%}" for what, share in look().items())
            bar.write(f"{out.name}, step {step}: loss {loss.item():.3f}  held-out, right: {shares}")
            sys.stdout.flush()
