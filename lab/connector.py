"""toy-connector: from toy-clip to toy-vicuna by least squares.

What the tower sees in a patch becomes the sum of the embeddings of the words that are true of it.
(LLaVA's first stage finds the way from captions alone, but from 558,000 of them; train.py --stage
pretrain does as LLaVA.) Three of ten things wear a paint that has no name, as in lab/clip.py; of these
the colors' part of the sum is left open.
"""

import math
import random

import torch

import toyworld
from conversation import Tokenizer
from lab.common import draw_pixels, fit_part, patch_owners, repaint_some, spell, sum_of_words
from model import PRESETS, VLM
from support.export import public_layout, write_model
from support.weights import load_decoder, load_vision


def make_connector(out, n_steps, seed, batch_size=32, lr=4e-3):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tok = Tokenizer(out / "toy-vicuna")
    vlm = VLM(PRESETS["toy"])
    load_vision(vlm.vision, out / "toy-clip")
    load_decoder(vlm.decoder, out / "toy-vicuna")
    table = vlm.decoder.embed_tokens.weight.detach()

    # Takes out of a row what the embeddings of the colors span.
    colors = table[[tok.encode(color)[-1] for color in toyworld.COLORS]]
    colorless = torch.eye(vlm.connector.D) - torch.linalg.pinv(colors) @ colors

    # Features and targets of all the pictures, in lots of 50.
    print("toy-connector: looks at the pictures first", flush=True)
    lots = []
    for _ in range(math.ceil(min(8000, n_steps * batch_size) / 50)):
        scenes = [repaint_some(toyworld.random_scene(rng), rng, 0.3) for _ in range(50)]
        lots.append((*see_patches(vlm, tok, scenes, rng), mark_patches(scenes, is_nameless)))
    features, targets, nameless = (torch.cat(parts) for parts in zip(*lots))
    variance = targets.var()

    scenes = [toyworld.random_scene(rng, held_out=True) for _ in range(300)]
    val_features, val_targets = see_patches(vlm, tok, scenes)
    unseen = mark_patches(scenes, is_unseen)

    def lr_at(step):
        return lr * min(1, step / 200) * (1 - (step - 1) / n_steps)

    def loss_at(step):
        i = torch.randint(len(targets), (batch_size,))
        error = vlm.connector(features[i]).view_as(targets[i]) - targets[i]
        error = torch.where(nameless[i][..., None], error @ colorless, error)
        return error.square().mean() / variance

    @torch.no_grad()
    def look():
        public_name, config = public_layout(vlm)
        connector = {name: p for name, p in vlm.state_dict().items() if name.startswith("connector.")}
        write_model(out / "toy-connector", {public_name(name): p for name, p in connector.items()}, config)
        found = vlm.connector(val_features).view_as(val_targets)
        error = (found - val_targets).square().mean(-1) / variance
        return (f"error on held-out pictures {error.mean():.1%} of the variance, "
                f"on their unseen pairs {error[unseen].mean():.1%}")

    fit_part("toy-connector", vlm.connector, n_steps, lr_at, loss_at, look)


@torch.no_grad()
def see_patches(vlm, tok, scenes, rng=None):
    """-> what the tower sees (B, 64, D_vision), what toy-vicuna was told of the same patches (B, 64, D)."""
    spelled = torch.tensor([spell(scene, tok) for scene in scenes])
    targets = sum_of_words(spelled, vlm.decoder.embed_tokens.weight)
    return vlm.vision(draw_pixels(scenes, rng)), targets


def mark_patches(scenes, is_marked):
    """Where a thing of that sort is shown -> (B, 64) bool."""
    marks = []
    for scene in scenes:
        marked = [i for i, thing in enumerate(scene.things) if is_marked(thing)]
        marks.append([owner in marked for owner in patch_owners(scene).tolist()])
    return torch.tensor(marks)


def is_nameless(thing):
    return thing.color not in toyworld.COLORS


def is_unseen(thing):
    return (thing.kind, thing.color) in toyworld.UNSEEN
