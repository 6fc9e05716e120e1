"""toy-connector: from toy-clip to toy-vicuna by least squares.

What the tower sees in a patch becomes the sum of the embeddings of the words that are true of it.
(LLaVA's first stage finds the way from captions alone, but from 558,000 of them; train.py --stage
pretrain does as LLaVA.) Three of ten things wear a paint that has no name, as in lab/clip.py, and a share of
the pictures may be parts of scenes: what a picture does not tell is left open, the colors' part of the sum,
or that of sizes and places.
"""

import math
import random

import torch

import toyworld
from lab.common import (
    WHOLE,
    draw_pixels,
    fit_part,
    held_out_scenes,
    label_patches,
    look_through,
    random_window,
    repaint_some,
    share_right,
    spell,
    sum_of_words,
)
from model import PRESETS, VLM
from support.export import public_layout, write_model
from support.weights import load_decoder, load_vision


def make_connector(out, tok, cfg):
    rng = random.Random(cfg.seed)
    vlm = VLM(PRESETS["toy"])
    load_vision(vlm.vision, out.parent / "toy-clip")
    load_decoder(vlm.decoder, out.parent / "toy-vicuna")

    def take_out(words):
        """What takes out of a row all that the embeddings of these words span (D, D)."""
        spanned = vlm.decoder.embed_tokens.weight.detach()[[tok.encode(word)[-1] for word in words]]
        return torch.eye(vlm.cfg.decoder.n_embd) - torch.linalg.pinv(spanned) @ spanned

    colorless = take_out(toyworld.COLORS)
    placeless = take_out([*toyworld.SIZES, *" ".join(toyworld.PLACES).split()])

    # Features and targets of all the pictures, in lots of 50.
    print("toy-connector: looks at the pictures first")
    n_lot = math.ceil(min(8000, cfg.steps * 32) / 50)
    lots = [see_patches(vlm, tok, rng, cfg.parts) for _ in range(n_lot)]
    features, targets, nameless, cut = (torch.cat(parts) for parts in zip(*lots))
    variance = targets.var()

    def lr_at(step):
        return 4e-3 * min(1, step / 200) * (1 - (step - 1) / cfg.steps)

    def loss_at(step):
        i = torch.randint(len(targets), (32,))
        error = vlm.connector(features[i]).view_as(targets[i]) - targets[i]
        error = torch.where(nameless[i][..., None], error @ colorless, error)
        error = torch.where(cut[i][..., None], error @ placeless, error)
        return error.square().mean() / variance

    @torch.no_grad()
    def look():
        connector = {f"connector.{name}": p for name, p in vlm.connector.state_dict().items()}
        write_model(out, connector, *public_layout(vlm))
        scenes = held_out_scenes(128)
        visual = vlm.connector(vlm.vision(draw_pixels(scenes))).view(128, 64, -1)
        return {"kinds that patches tell": kinds_told(vlm, tok, scenes, visual)}

    fit_part(out, cfg, vlm.connector, lr_at, loss_at, look)


@torch.no_grad()
def see_patches(vlm, tok, rng, parts):
    """The patches of 50 pictures: what the tower sees of each, what is true of it, and what is left open.

    (50, 64, D_vision), (50, 64, D), has it a nameless paint (50, 64), is it of a part of a scene (50, 64)
    """
    scenes = [repaint_some(toyworld.random_scene(rng), rng, 0.3) for _ in range(50)]
    windows = [random_window(rng, parts) for _ in scenes]
    features = vlm.vision(draw_pixels(scenes, rng, windows))
    scenes = list(map(look_through, scenes, windows))

    spelled = torch.tensor([spell(scene, tok) for scene in scenes])
    targets = sum_of_words(spelled, vlm.decoder.embed_tokens.weight)
    has_kind = label_patches(scenes, "kind") >= 0
    has_color = label_patches(scenes, "color") >= 0
    cut = torch.tensor([window != WHOLE for window in windows])[:, None].expand_as(has_kind)
    return features, targets, has_kind & ~has_color, cut


def kinds_told(vlm, tok, scenes, visual):
    """How often a visual token (B, N, D) of a thing is nearer to its kind's word than to all the others'."""
    words = vlm.decoder.embed_tokens.weight[[tok.encode(kind)[0] for kind in toyworld.KINDS]]
    words = words - words.mean(0)
    return share_right(visual @ words.T, scenes, "kind")
