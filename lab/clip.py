"""toy-clip: a tower of CLIP's architecture, trained to match pictures with texts.

Its class token sees whole pictures and their captions, as in CLIP (arXiv:2103.00020). Its patches, where
a VLM reads them, see the phrases that are true of the thing they show ("a big red cat at the top left",
"a green thing", "a sign that says OPEN"), as in RegionCLIP (arXiv:2112.09106). With v of a picture or
patch and t of a text, both of unit length:
    s_iq = e^tau <v_i, t_q>
    L    = mean over true (i, q) of  log(e^s_iq + sum of e^s over what is false) - s_iq
once for the texts that are false of i, once for the pictures or patches that q is false of.

Half of the phrases are a true one with one word changed, most often the kind: colors and places alone go
a long way. What would make a pair that training never shows counts neither as true nor as false: see
holds(). Two of five things wear a paint that has no name, as the things of the world do: see
common.repaint().

toy-clip-tiles has also met parts of scenes, as the tiles of a picture show them, in a share of its pictures.
"""

import math
import random
import re
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import toyworld
from data import pad_rows
from lab.common import (
    NOTHING,
    UNKNOWN,
    VALUES,
    WHOLE,
    Fact,
    draw_pixels,
    fit_part,
    half_cosine,
    held_out_scenes,
    look_through,
    patch_owners,
    random_window,
    repaint_some,
    scene_facts,
    share_right,
    write_half,
)
from model import PRESETS, Decoder
from support.export import TO_CLIP, clip_json
from support.start import init_weights
from vision import ViT

FALSE, TRUE, UNTOLD = 0, 1, 2    # of a phrase and a thing
EMPTY = Fact(kind="picture of nothing")                          # of a patch without a thing or a sign


def make_clip(out, tok, cfg):
    rng = random.Random(cfg.seed)
    clip = CLIP(PRESETS["toy"], tok)

    def lr_at(step):
        return 6e-4 * min(1, step / 100) * half_cosine(step, cfg.steps)

    def loss_at(step):
        pixels, whole, captions, texts, patches, holding = contrastive_batch(rng, 48, cfg.parts)
        seen, seen_patches = clip(pixels)
        scale = clip.tau.exp()
        s_whole = clip.compare(seen, captions) * scale
        s_patch = clip.compare(seen_patches, texts) * scale
        return (contrastive_loss(s_whole[whole], torch.eye(len(whole)))
                + contrastive_loss(s_patch.flatten(0, 1)[patches], holding))

    def look():
        names = {"^": "vision_model.^"} | TO_CLIP
        write_half(out, clip.vision.state_dict(), names, clip_json(clip.vision.cfg))
        return words_found(clip)

    fit_part(out, cfg, clip, lr_at, loss_at, look)


class CLIP(nn.Module):
    def __init__(self, cfg, tok):
        super().__init__()
        self.tok = tok
        self.vision = init_weights(ViT(cfg.vision))
        self.text = init_weights(Decoder(replace(cfg.decoder, vocab_size=tok.vocab_size, n_layer=2)))
        self.patch_proj = nn.Linear(cfg.vision.n_embd, 128, bias=False)
        self.class_proj = nn.Linear(cfg.vision.n_embd, 128, bias=False)
        self.text_proj = nn.Linear(cfg.decoder.n_embd, 128, bias=False)
        self.tau = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, pixels):
        """-> (B, D) of the class tokens and (B, N, D) of the patches, of unit length."""
        x = self.vision.embed(pixels)                    # (B, 1 + N, D_vision)
        *blocks, last_block = self.vision.blocks
        for block in blocks:
            x = block(x)
        parts = self.patch_proj(self.vision.norm(x[:, 1:]))                 # (B, N, D), what a VLM reads
        whole = self.class_proj(self.vision.norm(last_block(x)[:, 0]))      # (B, D)
        return F.normalize(whole, dim=-1), F.normalize(parts, dim=-1)

    def compare(self, seen, texts):
        """(..., D) of pictures or patches, Q texts -> cosines (..., Q). A text is read at its end token."""
        tokens = pad_rows([self.tok.encode(text) + [self.tok.eos] for text in texts], self.tok.pad)
        h = self.text(self.text.embed_tokens(tokens))
        return seen @ F.normalize(self.text_proj(h[tokens == self.tok.eos]), dim=-1).T


def contrastive_loss(s, holding):
    """s (P, Q), holding (P, Q): TRUE, FALSE or UNTOLD, whether that text holds of that picture or patch."""
    true = holding == TRUE
    i, q = true.nonzero(as_tuple=True)
    right = s[i, q]
    false = s.masked_fill(holding != FALSE, -math.inf)
    loss = 0
    for dim, row in ((1, i), (0, q)):
        wrong = false.logsumexp(dim)[row]
        each = torch.logaddexp(wrong, right) - right
        each = each / true.sum(dim)[row]                 # every text and every patch weighs the same
        loss = loss + each.sum() / true.any(dim).sum()
    return loss


# ---- a batch ----


def contrastive_batch(rng, size, parts):
    """-> pixels (size, 3, S, S), whole, captions, texts of Q phrases, patches (P,), holding (P, Q).

    whole are the pictures that show all of a scene, and captions theirs. patches, of size * N, are those that
    the phrases are compared with; holding says which phrase is true of which.
    """
    scenes = [toyworld.random_scene(rng) for _ in range(size)]
    # Signs are scarce: half of the scenes without one are thrown again.
    scenes = [scene if scene.sign or rng.random() < 0.5 else toyworld.random_scene(rng) for scene in scenes]
    scenes = [repaint_some(scene, rng, 0.4) for scene in scenes]
    windows = [random_window(rng, parts) for _ in scenes]
    seen = list(map(look_through, scenes, windows))
    phrases = random_phrases(seen, rng) + [EMPTY]

    patches, holding = [], []
    for k, scene in enumerate(seen):
        owners = patch_owners(scene)
        shows_part = [n for n, owner in enumerate(owners) if owner >= 0]
        shows_nothing = [n for n, owner in enumerate(owners) if owner == NOTHING]
        facts = scene_facts(scene) + [EMPTY]             # facts[NOTHING] is the last
        rows = [[holds(phrase, fact) for phrase in phrases] for fact in facts]
        n_empty = min(len(shows_part), len(shows_nothing))
        for n in shows_part + rng.sample(shows_nothing, n_empty):
            patches.append(k * len(owners) + n)
            holding.append(rows[owners[n]])

    texts = [phrase_text(phrase) for phrase in phrases]
    whole = [k for k, window in enumerate(windows) if window == WHOLE]
    captions = [re.sub("#[0-9a-f]+ ", "", toyworld.caption(scenes[k])) for k in whole]
    pixels = draw_pixels(scenes, rng, windows)
    return pixels, whole, captions, texts, torch.tensor(patches), torch.tensor(holding)


def random_phrases(scenes, rng):
    """Of each thing and sign a phrase that is true, and one that is not. None is of an UNSEEN pair."""
    phrases = []
    for scene in scenes:
        for fact in scene_facts(scene):
            if fact.word == UNKNOWN:                     # nothing is known of half a sign
                continue
            true = leave_out_words(fact, rng)
            phrases += [true, change_a_word(true, rng)]
    # Each once, in their order.
    return [phrase for phrase in dict.fromkeys(phrases) if (phrase.kind, phrase.color) not in toyworld.UNSEEN]


def leave_out_words(fact, rng):
    """Say only some attributes, each with its probability, so that every one must be learned for itself."""
    keep = Fact(size=0.4, color=0.5, kind=0.95, place=0.5, word=0.8)
    known = Fact(*[None if value == UNKNOWN else value for value in fact])
    said = [value if value == "sign" or rng.random() < p else None for value, p in zip(known, keep)]
    return Fact(*said) if set(said) - {None, "sign"} else known


def change_a_word(phrase, rng):
    """Another value in place of one that is said. Kinds are the hard part: three times as often as others."""
    said = [name for name, value in zip(VALUES, phrase) if value not in (None, "sign")]
    name = rng.choice([name for name in said for _ in range(3 if name == "kind" else 1)])
    others = [value for value in VALUES[name] if value != getattr(phrase, name)]
    return phrase._replace(**{name: rng.choice(others)})


def holds(phrase, fact):
    """Is the phrase TRUE or FALSE of a thing?

    UNTOLD is what the picture does not tell, and what would make an UNSEEN pair of the phrase's kind and the
    thing's color or the other way round: blue things are never cats in training, and a tower that is told so
    learns to look at colors instead of shapes.
    """
    instead = {b for a, b in zip(phrase, fact) if a not in (None, b)}       # of what the phrase says
    if not instead:
        return TRUE
    if instead == {UNKNOWN}:
        return UNTOLD
    mixed = {(phrase.kind, fact.color), (fact.kind, phrase.color)}
    return UNTOLD if mixed & toyworld.UNSEEN else FALSE


def phrase_text(phrase):
    if phrase.word:
        what = f"sign that says {phrase.word}"
    else:
        what = " ".join(filter(None, (phrase.size, phrase.color, phrase.kind or "thing")))
    place = f" at the {phrase.place}" if phrase.place else ""
    return f"a {what}{place}"


@torch.no_grad()
def words_found(clip):
    """{attribute: share of held-out things' patches where the right word is nearer than all others}"""
    scenes = held_out_scenes(128)
    _, patches = clip(draw_pixels(scenes))
    found = {}
    for name, values in VALUES.items():
        texts = [phrase_text(Fact(**{name: value})) for value in values]
        found[name] = share_right(clip.compare(patches, texts), scenes, name)
    return found
