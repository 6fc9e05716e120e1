"""What the toy's three parts share: pictures of scenes, what each patch of one shows, and a training loop."""

import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import toyworld
from model import PRESETS
from support.cli import Bar
from vision import cut_tiles

NOTHING = -1                     # a patch shows none of the parts
UNSURE = -2                      # or too little of one to say


# ---- pictures ----


def draw_pixels(scenes, rng=None):
    """-> (B, 3, S, S). With rng some are drawn larger and made smaller, as a user's are: edges differ."""
    cfg = PRESETS["toy"].vision
    tiles = []
    for scene in scenes:
        scale = rng.choice((1, 1, 4 / 3, 2, 3)) if rng else 1
        picture = toyworld.draw_scene(scene, round(scale * cfg.image_size))
        tiles.append(cut_tiles(picture, cfg, "pad")[0])
    return torch.cat(tiles)


def repaint(thing, rng):
    """The thing in a paint without a name: who has seen cats of every hue looks at their shape, even if blue.

    Never a paint that is less than 110 (summed over red, green and blue) from the color of the kind's
    UNSEEN pair.
    """
    unseen = next(toyworld.COLORS[color] for kind, color in toyworld.UNSEEN if kind == thing.kind)
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


# ---- patches ----


def scene_parts(scene):
    """The things and then the sign: what the numbers of patch_owners() count."""
    return scene.things + ((scene.sign,) if scene.sign else ())


def patch_owners(scene, side=8, enough=0.25):
    """The part that covers most of each patch -> (side * side,), in reading order.

    NOTHING where no part covers any of it, UNSURE where the part covers less than `enough`.
    """
    def overlap(low, high):          # of each row or column of patches, the share between low and high
        start = np.arange(side) / side
        shared = np.minimum(high, start + 1 / side) - np.maximum(low, start)
        return side * np.clip(shared, 0, None)

    covered = []
    for part in scene_parts(scene):
        x1, y1, x2, y2 = part.box
        covered.append(np.outer(overlap(y1, y2), overlap(x1, x2)).ravel())

    most = np.max(covered, axis=0)
    owner = np.argmax(covered, axis=0)
    unclear = np.where(most <= 0.02, NOTHING, UNSURE)
    return torch.from_numpy(np.where(most >= enough, owner, unclear))


def spell(scene, tok, rng=None):
    """A picture in words, what the tower knows of each patch -> ids (64, 7), -1 where no more is to be said.

    A patch's column (a to h), its row (1 to 8), and of what it shows the kind, the color and the size, or
    what is written, and the place. A paint without a name goes unsaid. With rng, now and then a word is
    missing, and the edges are a little off.
    """
    descriptions = [f"{thing.kind} {thing.color} {thing.size} {thing.place}" for thing in scene.things]
    if scene.sign:
        descriptions.append(f"sign {scene.sign.word} {scene.sign.place}")

    enough = rng.choice((0.2, 0.3, 0.4)) if rng else 0.25
    spelled = []
    for n, owner in enumerate(patch_owners(scene, enough=enough).tolist()):
        words = ["abcdefgh"[n % 8], str(1 + n // 8)]
        if owner >= 0:
            words += [word for word in descriptions[owner].split() if word[0] != "#"]
        ids = [tok.encode(word)[-1] for word in words]
        if rng:
            ids = [i for i in ids if rng.random() > 0.08]
        spelled.append(ids + [-1] * (7 - len(ids)))
    return spelled


def sum_of_words(spelled, table):
    """Ids (B, 64, 7) as spell() gives them -> (B, 64, D), the sum of each patch's embeddings."""
    embeddings = F.embedding(spelled.clamp(min=0), table)
    return (embeddings * (spelled >= 0)[..., None]).sum(2)


# ---- training ----


def shares_line(shares, digits):
    return "  ".join(f"{name} {share:.{digits}%}" for name, share in shares.items())


def fit_part(name, module, n_steps, lr_at, loss_at, look):
    """AdamW at lr_at(step) on loss_at(step). Now and then look() saves the part and says how good it is."""
    began = time.time()
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    bar = Bar(range(1, n_steps + 1), name)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr_at(step)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 250 == 0 or step == n_steps:
            bar.write(f"step {step}  loss {loss.item():.3f}  {look()}")
            sys.stdout.flush()
    print(f"{name}: {n_steps} steps in {(time.time() - began) / 60:.1f} minutes")
