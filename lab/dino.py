"""toy-dino: a tower of DINOv2's architecture (arXiv:2304.07193), taught by pictures alone, without a word.

A student and its teacher sort what they see by K prototypes, which have no meaning but what the two make of
them. With z the similarity of a token with each prototype:
    q = sinkhorn(z_teacher / 0.02)     p = softmax(z_student / 0.1)     L = mean of  - sum over K of q log p
    class tokens   both see a window of the same picture, each another one       (DINO, arXiv:2104.14294)
    patches        of what is masked for the student, the teacher sees all       (iBOT, arXiv:2111.07832)

The teacher is a running mean of the student. They could agree by always saying the same: sinkhorn() has the
teacher use all prototypes alike, as in DINOv2, so such a student would pay log K. DINOv2 has more: small
windows for the student alone, a penalty (KoLeo), and a K of 131,072.
"""

import copy
import random
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import toyworld
from lab.common import (
    VALUES,
    bfloat16,
    draw_pixels,
    fit_part,
    half_cosine,
    label_patches,
    random_window,
    repaint_some,
    share_right,
    write_half,
)
from support.configs import CLIP_FIELDS, DINOV2
from support.export import public_fields
from support.start import init_weights
from support.weights import DINO_NAMES
from vision import ViT

TOWER = replace(DINOV2, image_size=96, patch_size=12, n_embd=128, n_layer=5, n_head=4, n_hidden=512)


def make_dino(out, tok, cfg):
    """tok goes unused: there are no words. With --steps 1 the teacher stays as it began."""
    rng = random.Random(cfg.seed)
    student = Sorter()
    teacher = copy.deepcopy(student).requires_grad_(False)

    def lr_at(step):
        return 1.5e-3 * min(1, step / 50) * half_cosine(step, cfg.steps)

    def loss_at(step):
        follow(teacher, student, 0.02 * half_cosine(step, cfg.steps))
        return sorting_loss(student, teacher, two_windows(rng, 16))

    def look():
        save_tower(teacher, out)
        return probe(teacher.vit)

    fit_part(out, cfg, student, lr_at, loss_at, look)


class Sorter(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = init_weights(ViT(TOWER))
        self.mask_token = nn.Parameter(torch.zeros(TOWER.n_embd))
        self.class_head = Head()
        self.patch_head = Head()

    def forward(self, pixels, masked):
        """(n, 3, S, S), masked (n, N) -> z of the class tokens (n, K) and of the patches (n, N, K)."""
        x = self.vit.embed(pixels)                       # (n, 1 + N, D)
        unseen = self.mask_token + self.vit.pos[1:]      # a masked patch keeps its place
        patches = torch.where(masked[:, :, None], unseen, x[:, 1:])
        x = torch.cat([x[:, :1], patches], dim=1)
        with bfloat16():
            for block in self.vit.blocks:
                x = block(x)
        x = self.vit.norm(x.float())
        return self.class_head(x[:, 0]), self.patch_head(x[:, 1:])


class Head(nn.Module):
    def __init__(self, D=TOWER.n_embd, D_narrow=32, K=512):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D_narrow))
        self.prototypes = nn.Parameter(torch.randn(K, D_narrow))

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def sorting_loss(student, teacher, pixels):
    """pixels (2B, 3, S, S): of B pictures a window each, then another."""
    n = len(pixels)
    share = torch.empty(n, 1).uniform_(0.2, 0.6)
    masked = torch.rand(n, TOWER.grid**2) < share
    z_class, z_patch = student(pixels, masked)
    with torch.no_grad():
        told_class, told_patch = teacher(pixels, torch.zeros_like(masked))
    q_class = sinkhorn(told_class).roll(n // 2, 0)       # of the other window
    q_patch = sinkhorn(told_patch[masked])
    return cross_entropy(q_class, z_class) + cross_entropy(q_patch, z_patch[masked])


def cross_entropy(q, z):
    """(P, K) each -> the mean over P of  - sum over K of q log softmax(z / 0.1)"""
    return F.cross_entropy(z / 0.1, q)


def sinkhorn(z):
    """z (P, K) -> q (P, K): rows sum to 1, and all columns to nearly the same (SwAV, arXiv:2006.09882)."""
    log_q = z / 0.02
    for _ in range(3):
        log_q = log_q.log_softmax(dim=0).log_softmax(dim=1)
    return log_q.exp()


@torch.no_grad()
def follow(teacher, student, share):
    """Every weight of the teacher goes that share of the way to the student's."""
    for told, learned in zip(teacher.parameters(), student.parameters()):
        told.lerp_(learned, share)


def two_windows(rng, size):
    """Pixels (2 size, 3, S, S), and nothing of what they show."""
    scenes = [repaint_some(toyworld.random_scene(rng), rng, 0.4) for _ in range(size)]
    windows = [random_window(rng, parts=0.5) for _ in range(2 * size)]
    return draw_pixels(scenes + scenes, rng, windows)


def save_tower(sorter, directory):
    """As facebook/dinov2-* are laid out."""
    state = sorter.vit.state_dict()
    state["class_token"] = state["class_token"].view(1, 1, -1)
    state["pos"] = state["pos"][None]
    state["embeddings.mask_token"] = sorter.mask_token.detach()[None]
    names = {ours: public for public, ours in DINO_NAMES.items()}
    config = {"model_type": "dinov2", "mlp_ratio": 4, **public_fields(TOWER, CLIP_FIELDS)}
    write_half(directory, state, names, config)


@torch.no_grad()
def probe(vit):
    """{attribute: how often a linear map of its features tells it of a held-out thing's patch}

    The map is fitted by least squares to 400 training pictures.
    """
    rng = random.Random(1)
    train = [toyworld.random_scene(rng) for _ in range(400)]
    held_out = [toyworld.random_scene(rng, held_out=True) for _ in range(200)]
    seen, unseen = (F.pad(vit(draw_pixels(scenes)), (0, 1), value=1.0) for scenes in (train, held_out))
    shares = {}
    for name in "kind", "color", "place":
        labels = label_patches(train, name)
        right = F.one_hot(labels[labels >= 0], len(VALUES[name])).float()
        linear = torch.linalg.lstsq(seen[labels >= 0], right).solution
        shares[name] = share_right(unseen @ linear, held_out, name)
    return shares
