"""Pictures: a file to tiles of pixels, and the vision transformer (ViT, arXiv:2010.11929) that encodes them.

    file --open_image--> upright RGB --cut_tiles--> tiles (n, 3, S, S) uint8, layout (M, 2) of M visual tokens
    tiles --ViT--> features (n, N, D_f), taken after an inner block of the ViT

A layout lists the visual tokens in the order in which the decoder reads them: the number of its tile, and its
place among the N of that tile. LLaVA-1.5 makes one tile of a picture, 336 px a side. These are
(336 / 14)^2 = 576 patches, of each a feature of 1,024 channels, and it reads them all:
    [[0, 0], [0, 1], ..., [0, 575]]
Of several tiles the order may run across them, tokens of padding may be left out, and [-1, 0] stands for the
learned embedding that ends a row (support/tiling.py). The model picks its features by one indexing, however
the tiles were cut, and M is counted nowhere else.

ViT is one class with switches for CLIP, SigLIP, DINOv2, InternViT and the plain ImageNet ViT. The defaults
are CLIP's: no bias on the patches, QuickGELU, and a LayerNorm before the first block. LLaVA-1.5
(arXiv:2310.03744) reads hidden state -2, so its last block and its final norm never run.

Where this departs from the originals:
  - Prismatic's two towers see the same tile, letterboxed in the mean colour of the first; the original pads
    once for each (its best models resize, which is the same for both);
  - a tile of which no visual token is kept is not run; LLaVA-NeXT runs it and drops its features.

Letters: n tiles, S pixels a side of a tile, P of a patch, D_v channels inside the ViT, T tokens inside it, N
features of a tile (one for each patch, or for merge x merge of them), D_f = merge^2 D_v their channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from support.cli import UserError
from support.tiling import TILINGS, Tiling, choose_grid, layout_by_rows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class VisionConfig:
    image_size: int = 336            # S, pixels a side
    patch_size: int = 14             # P, pixels a side
    n_embd: int = 1024               # D_v
    n_layer: int = 24
    n_head: int = 16
    n_hidden: int = 4096             # width of the MLP
    activation: str = "quick_gelu"   # one of ACTIVATIONS
    norm_eps: float = 1e-5
    feature_layer: int = -2          # hidden state to read: 0 = before block 1, -1 = after the last block
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    tiling: Tiling | None = None     # None: TILINGS[image_mode]; a trained or a public model has its own

    # What other towers have otherwise. Leave it for later.
    class_token: bool = True
    n_register: int = 0              # DINOv2's, between class token and patches; they carry no position
    pre_norm: bool = True            # a LayerNorm between the position table and the first block (CLIP)
    patch_bias: bool = False
    layer_scale: bool = False        # a learned factor per channel on each branch (DINOv2, InternViT)
    final_norm: bool = True          # kept so that every tensor of the file has a place; never run
    rms_norm: bool = False           # InternViT-6B: RMSNorm, of queries and keys, too; q, k, v without bias
    merge: int = 1                   # InternVL: merge x merge patches become one token, merge^2 as wide

    @property
    def grid(self):  # patches a side; a remainder (SigLIP: 384 = 27 * 14 + 6) stays unseen
        return self.image_size // self.patch_size

    @property
    def token_grid(self):  # visual tokens a side
        return self.grid // self.merge

    @property
    def n_token(self):  # N, visual tokens of one tile
        return self.token_grid**2

    @property
    def feature_width(self):  # D_f, channels of a feature
        return self.n_embd * self.merge**2

    @property
    def n_prefix(self):  # tokens before the first patch
        return self.class_token + self.n_register

    @property
    def depth(self):  # blocks to run for `feature_layer`
        return self.feature_layer if self.feature_layer >= 0 else self.n_layer + 1 + self.feature_layer


# ---- the tower ----


class ViT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D_v, P = cfg.n_embd, cfg.patch_size
        self.patch = nn.Conv2d(3, D_v, kernel_size=P, stride=P, bias=cfg.patch_bias)
        if cfg.class_token:
            self.class_token = nn.Parameter(torch.empty(D_v))
            nn.init.normal_(self.class_token, std=D_v**-0.5)
        if cfg.n_register:
            self.registers = nn.Parameter(torch.empty(cfg.n_register, D_v))
            nn.init.normal_(self.registers, std=D_v**-0.5)
        # Zeros until loaded; a fresh tower gets sine waves (support/start.py).
        self.pos = nn.Parameter(torch.zeros(int(cfg.class_token) + cfg.grid**2, D_v))
        self.pre_norm = nn.LayerNorm(D_v, eps=cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()

    def forward(self, pixels):
        """(n, 3, S, S), uint8 or normalised floats -> features (n, N, D_f)."""
        x = self.embed(pixels)
        for block in self.blocks[: self.cfg.depth]:
            x = block(x)
        return merge_patches(x[:, self.cfg.n_prefix :], self.cfg.merge)

    def embed(self, pixels):
        """ViT Eq. 1: (n, 3, S, S) -> (n, T, D_v), class token and registers in front of the patches."""
        x = normalize_pixels(pixels, self.cfg, self.patch.weight.dtype)
        x = self.patch(x).flatten(2).transpose(1, 2)  # (n, grid^2, D_v), row by row
        if self.cfg.class_token:
            class_token = self.class_token.expand(len(x), 1, -1)
            x = torch.cat([class_token, x], dim=1)
        x = x + self.pos
        if self.cfg.n_register:
            registers = self.registers.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return self.pre_norm(x)


class Block(nn.Module):
    """ViT Eq. 2 and 3, the norm before each branch."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.scale1 = nn.Parameter(torch.ones(cfg.n_embd)) if cfg.layer_scale else 1.0
        self.scale2 = nn.Parameter(torch.ones(cfg.n_embd)) if cfg.layer_scale else 1.0

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.scale1
        return x + self.mlp(self.norm2(x)) * self.scale2


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D_v = cfg.n_embd
        self.n_head = cfg.n_head
        self.q_proj = nn.Linear(D_v, D_v, bias=not cfg.rms_norm)
        self.k_proj = nn.Linear(D_v, D_v, bias=not cfg.rms_norm)
        self.v_proj = nn.Linear(D_v, D_v, bias=not cfg.rms_norm)
        self.out_proj = nn.Linear(D_v, D_v)
        self.q_norm = make_norm(cfg) if cfg.rms_norm else nn.Identity()  # over all heads at once
        self.k_norm = make_norm(cfg) if cfg.rms_norm else nn.Identity()

    def forward(self, x):
        n, T, D_v = x.shape  # T: prefix and patches
        split_heads = lambda y: y.view(n, T, self.n_head, -1).transpose(1, 2)  # (n, H, T, D_v/H)
        q = split_heads(self.q_norm(self.q_proj(x)))
        k = split_heads(self.k_norm(self.k_proj(x)))
        v = split_heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v)  # every patch sees every patch
        return self.out_proj(y.transpose(1, 2).reshape(n, T, D_v))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.n_embd, cfg.n_hidden)
        self.fc2 = nn.Linear(cfg.n_hidden, cfg.n_embd)
        self.act = ACTIVATIONS[cfg.activation]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def make_norm(cfg):
    norm_class = nn.RMSNorm if cfg.rms_norm else nn.LayerNorm
    return norm_class(cfg.n_embd, eps=cfg.norm_eps)


def merge_patches(x, m):
    """InternVL's pixel shuffle: m x m patches become one feature, (n, grid^2, D_v) -> (n, N, m^2 D_v)."""
    if m == 1:
        return x
    n, n_patch, D_v = x.shape
    side = math.isqrt(n_patch) // m
    x = x.view(n, side, m, side, m, D_v).transpose(2, 3)  # (n, side, side, m, m, D_v)
    return x.reshape(n, side * side, m * m * D_v)


def normalize_pixels(pixels, cfg, dtype):
    """uint8 -> (x / 255 - mean) / std of each channel; on the tower's device: bytes move faster."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean, std = torch.tensor([cfg.mean, cfg.std], device=pixels.device)[:, :, None, None]  # (3, 1, 1) each
    return ((pixels.float() / 255 - mean) / std).to(dtype)


# ---- a picture to one tile ----
# Pillow's bicubic filter everywhere, as in the originals.

SQUARE_MODES = ("pad", "letterbox", "crop", "resize")  # one tile: make_square
MODES = (*SQUARE_MODES, *TILINGS)


def find_tiling(cfg, mode):
    """The Tiling of a mode: the model's own if it was made for this mode. None for a mode of one tile."""
    if mode not in MODES:
        raise UserError(f"image mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if cfg.tiling and cfg.tiling.mode == mode:
        return cfg.tiling
    return TILINGS.get(mode)


def cut_tiles(image, cfg, mode, n_picture=1):
    """PIL RGB -> tiles (n, 3, S, S) uint8 and their layout (M, 2) int64. M is the number of visual tokens.

    n_picture: how many pictures stand in the conversation; InternVL's share the tiles.
    """
    tiling = find_tiling(cfg, mode)
    if tiling is None:
        return tile_by_tile(make_square(image, cfg, mode), cfg)
    return cut_grid(image, cfg, tiling, n_picture)


def make_square(image, cfg, mode):
    """PIL RGB of any size -> S x S. The four ways of LLaVA-1.5 and Prismatic:

    pad        square canvas in the mean colour, picture in the middle, then scale (LLaVA-1.5, stage 2)
    letterbox  the same with equal margins: an odd difference leaves the canvas 1 px narrower (Prismatic)
    crop       scale the short side to S, keep the middle of the long one (LLaVA v1, LLaVA-1.5 stage 1)
    resize     scale both sides to S, whatever the shape (Prismatic's best)
    """
    S = cfg.image_size
    if mode == "resize":
        return image.resize((S, S), Image.BICUBIC)
    if mode in ("pad", "letterbox"):
        w, h = image.size
        side = max(w, h)
        canvas_size = side, side
        if mode == "letterbox":
            canvas_size = w + (side - w) // 2 * 2, h + (side - h) // 2 * 2
        image = center_on_canvas(image, canvas_size, mean_color(cfg))
    return center_crop(scale_short(image, S), S, S)  # of a square there is nothing to crop


def mean_color(cfg):
    """The mean colour, which normalize_pixels makes nearly 0."""
    return tuple(int(255 * m) for m in cfg.mean)


def center_on_canvas(image, size, color):
    canvas = Image.new("RGB", size, color)
    left, top = (canvas.width - image.width) // 2, (canvas.height - image.height) // 2
    canvas.paste(image, (left, top))
    return canvas


def center_crop(image, w, h):
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def scale_short(image, S):
    """Short side to S, the long one to int(S * long / short)."""
    w, h = image.size
    size = int(S * w / min(w, h)), int(S * h / min(w, h))
    return image.resize(size, Image.BICUBIC)


def split_canvas(canvas, S):
    """A picture of whole tiles -> (n, 3, S, S) uint8, row by row."""
    pixels = torch.from_numpy(np.array(canvas))
    pixels = pixels.view(canvas.height // S, S, canvas.width // S, S, 3)
    return pixels.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()


def tile_by_tile(canvas, cfg):
    """A picture of whole tiles -> tiles and layout: all visual tokens of a tile, then those of the next."""
    tiles = split_canvas(canvas, cfg.image_size)
    layout = torch.cartesian_prod(torch.arange(len(tiles)), torch.arange(cfg.n_token))
    return tiles, layout


# ---- a picture to several tiles: support/tiling.py chooses the grid ----


def cut_grid(image, cfg, tiling, n_picture):
    """-> tiles and layout of the picture on a grid of tiles, and of the whole picture in one tile more."""
    S = cfg.image_size
    columns, rows = choose_grid(image.size, S, tiling, n_picture)
    if tiling.by_tile:
        grid_mode = "resize"
        local_view = tile_by_tile(image.resize((columns * S, rows * S), Image.BICUBIC), cfg)
    else:
        grid_mode = "pad"
        local_view = row_by_row(image, columns, rows, cfg, tiling)

    # A grid of one tile may show what the global view would.
    shows_same = columns * rows == 1 and grid_mode == tiling.global_mode
    if tiling.global_view == "none" or shows_same:
        return local_view
    global_view = tile_by_tile(make_square(image, cfg, tiling.global_mode), cfg)
    if tiling.global_view == "first":
        return join_tiles([global_view, local_view])
    return join_tiles([local_view, global_view])


def row_by_row(image, columns, rows, cfg, tiling):
    """Centred on the grid -> tiles and layout: each row runs across all tiles, without the padding."""
    S = cfg.image_size
    size = columns * S, rows * S
    color = (0, 0, 0) if tiling.margin == "black" else mean_color(cfg)
    canvas = center_on_canvas(scale_into(image, *size), size, color)
    used, layout = layout_by_rows(image.size, columns, rows, cfg.token_grid, tiling)
    return split_canvas(canvas, S)[used], layout


def scale_into(image, W, H):
    """As large as fits into W x H."""
    w, h = image.size
    scale = min(W / w, H / h)
    size = min(math.ceil(w * scale), W), min(math.ceil(h * scale), H)
    return image.resize(size, Image.BICUBIC)


def join_tiles(parts, S=0):
    """[(tiles, layout), ...] of several pictures, or of the views of one -> (tiles, layout) of them all.

    Tiles are numbered through. Two questions about a picture bring the same tensor of tiles, which is taken
    once, and goes through the tower once. No parts at all are no tiles of S pixels a side.
    """
    if not parts:
        return torch.empty((0, 3, S, S), dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)
    all_tiles, layouts = [], []
    n_tile = 0
    first_tile = {}  # of each tensor of tiles; a tensor is a key by itself, as in optimizer.state
    for tiles, layout in parts:
        if tiles not in first_tile:
            first_tile[tiles] = n_tile
            n_tile += len(tiles)
            all_tiles.append(tiles)
        is_row_end = layout[:, :1] < 0
        moved = layout + torch.tensor([first_tile[tiles], 0])
        layouts.append(torch.where(is_row_end, layout, moved))
    return torch.cat(all_tiles), torch.cat(layouts)
