"""The eye: a vision transformer (ViT, arXiv:2010.11929), and the geometry that brings a picture into it.

    PIL picture --open_image--> upright RGB --cut_tiles--> tiles (n, 3, S, S) uint8, and the layout (M, 2) of their M visual tokens
    tiles --ViT--> features (n, N, D), one row for each patch, taken after an inner block as LLaVA-1.5 does (arXiv:2310.03744)

A layout says of each visual token, in the order the decoder reads them, which tile and which patch of it this is; (-1, 0) is the learned
embedding that ends a row. So a model packs its features by one indexing, whatever cut the tiles, and M is counted nowhere else.

One class with switches is CLIP, SigLIP, DINOv2, InternViT and the plain ImageNet ViT: a class token or not, registers or not, a norm
before the blocks or not, which GELU, a bias on the patch convolution or not, layer-scale or not, and after which block the features are
taken. Their public tensor names, in Hugging Face's words, timm's and OpenAI's, are one table (TOWER_NAMES).
CLIP's quirks that the switches stand for: no patch bias, QuickGELU, and a LayerNorm before the first block, whose public name is
misspelled (`pre_layrnorm`). LLaVA takes hidden state -2: the last block and the final norm never run, so here they are skipped.

Deviations: pictures with transparency are laid on white (the originals drop the alpha channel and show whatever was under it), EXIF
rotation is applied (the originals ignore it), and of an extreme shape the far ends are cut before the crop (beyond 64:1), or the whole
is scaled before the padding (beyond 10,000 px). Where a model has two towers (Prismatic) both see the same tile, letterboxed in the
first one's mean colour; the originals pad once for each. Their best models squash instead of padding, which is the same for both.
A tile of which no patch is kept is not looked at (LLaVA-NeXT runs it and drops its features).
"""

from dataclasses import dataclass
import math
import warnings

from PIL import Image, ImageOps
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.cli import UserError



CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
SQUARE_MODES = ("pad", "letterbox", "crop", "resize")                             # one tile: fit
MODES = (*SQUARE_MODES, "hd", "anyres", "internvl")                               # and several: TILINGS



@dataclass
class VisionConfig:
    image_size: int = 336            # S, pixels a side
    patch_size: int = 14             # P, pixels a side
    n_embd: int = 1024               # D
    n_layer: int = 24
    n_head: int = 16
    n_hidden: int = 4096             # width of the MLP
    activation: str = "quick_gelu"   # quick_gelu (CLIP) | gelu (exact) | gelu_tanh
    norm_eps: float = 1e-5
    class_token: bool = True
    n_register: int = 0              # DINOv2's registers, between the class token and the patches; they carry no position
    pre_norm: bool = True            # a LayerNorm between the position table and the first block (CLIP)
    patch_bias: bool = False
    layer_scale: bool = False        # a learned factor per channel on each branch (DINOv2, InternViT)
    final_norm: bool = True
    rms_norm: bool = False           # InternViT-6B: norms without mean and bias, queries and keys normed too, and no bias on q, k and v
    merge: int = 1                   # InternVL: that many patches a side become one visual token, merge^2 times as wide (pixel shuffle v2)
    feature_layer: int = -2          # hidden state whose patches the connector reads: 0 = before block 1, -1 = after the last block
    mean: tuple = CLIP_MEAN
    std: tuple = CLIP_STD
    tiling: "Tiling | None" = None   # of a model that tiles, where it differs from its mode's in TILINGS

    def __post_init__(self):
        if isinstance(self.tiling, dict):                                   # as config.json has it
            self.tiling = Tiling(**self.tiling)
        if self.n_embd % self.n_head:
            raise UserError(f"a tower {self.n_embd} channels wide cannot share them among {self.n_head} heads")
        if self.image_size < self.patch_size:
            raise UserError(f"an image size of {self.image_size} px holds no patch of {self.patch_size} px")
        if self.grid % self.merge:
            raise UserError(f"{self.grid} patches a side cannot be merged by {self.merge}")
        if not 0 <= self.depth <= self.n_layer:
            raise UserError(f"feature layer {self.feature_layer} does not exist in a tower of {self.n_layer} layers")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation {self.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")

    @property
    def grid(self):                  # patches a side; a remainder (SigLIP: 384 = 27*14 + 6) is left unseen, as the convolution does
        return self.image_size // self.patch_size

    @property
    def n_token(self):               # visual tokens of one tile
        return (self.grid // self.merge) ** 2

    @property
    def n_feature(self):             # width of a visual token
        return self.n_embd * self.merge**2

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def n_prefix(self):              # rows before the first patch
        return self.class_token + self.n_register

    @property
    def depth(self):                 # blocks to run for `feature_layer`
        return self.feature_layer if self.feature_layer >= 0 else self.n_layer + 1 + self.feature_layer



class ViT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, P = cfg, cfg.n_embd, cfg.patch_size
        self.patch = nn.Conv2d(3, D, kernel_size=P, stride=P, bias=cfg.patch_bias)
        if cfg.class_token:
            self.class_token = nn.Parameter(random_normal(D, std=D**-0.5))
        if cfg.n_register:
            self.registers = nn.Parameter(random_normal(cfg.n_register, D, std=D**-0.5))
        self.pos = nn.Parameter(wave_positions(cfg.grid, D, int(cfg.class_token)))
        self.pre_norm = nn.LayerNorm(D, eps=cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()

    def forward(self, pixels):
        """The visual tokens as the connector reads them: (n, 3, S, S) -> (n, N, D). uint8 pixels are normalised here; floats already are."""
        x = self.embed(pixels)
        for block in self.blocks[: self.cfg.depth]:
            x = block(x)
        x, m, g = x[:, self.cfg.n_prefix :], self.cfg.merge, self.cfg.grid // self.cfg.merge            # (n, grid^2, n_embd)
        if m > 1:                                                           # out[i, j] = the m x m patches of that square, row by row
            x = x.view(len(x), g, m, g, m, -1).transpose(2, 3).reshape(len(x), g * g, -1)
        return x                                                            # (n, N, D)

    def pooled(self, pixels):
        """The class token after every block and the final norm, which is what CLIP compares with a text: (n, 3, S, S) -> (n, D)."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def embed(self, pixels):
        """ViT Eq. 1: (n, 3, S, S) -> (n, prefix + N, D)."""
        x = normalize_pixels(pixels, self.cfg, self.patch.weight.dtype)
        x = self.patch(x).flatten(2).transpose(1, 2)                        # (n, N, D), row by row
        if self.cfg.class_token:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = x + self.pos
        if self.cfg.n_register:
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
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



def make_norm(cfg):
    return (nn.RMSNorm if cfg.rms_norm else nn.LayerNorm)(cfg.n_embd, eps=cfg.norm_eps)



class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(cfg.n_embd, cfg.n_embd, bias=not cfg.rms_norm) for _ in range(3))
        self.out_proj = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.q_norm, self.k_norm = (make_norm(cfg) if cfg.rms_norm else nn.Identity() for _ in range(2))         # over all heads at once

    def forward(self, x):                                                   # (n, T, D)
        n, T, D = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (z.view(n, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)                         # (n, H, T, D/H); every patch sees every patch
        return self.out_proj(y.transpose(1, 2).reshape(n, T, D))



class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.n_embd, cfg.n_hidden)
        self.fc2 = nn.Linear(cfg.n_hidden, cfg.n_embd)
        self.act = ACTIVATIONS[cfg.activation]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))



ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}



def random_normal(*shape, std=1.0, device=None, dtype=None):
    """N(0, std^2). On the meta device nothing but the shape: to compute there PyTorch imports its whole compiler, over a second and 75 MB."""
    device = device or torch.get_default_device()
    return torch.empty(shape, device=device, dtype=dtype) if device.type == "meta" else torch.randn(shape, device=device, dtype=dtype) * std



def wave_positions(grid, D, n_class=0):
    """Where a fresh position table starts: zeros for the class token, then sines and cosines of row and column, (n_class + grid^2, D). Random
    rows as small as a fresh table's are drowned by the pixels of a bright patch; these are as large as what they stand beside."""
    device = torch.get_default_device()                                     # said, because transformers 5 makes linspace forget a `with device`
    if device.type == "meta":                                               # as in draw
        return torch.empty(n_class + grid**2, D)
    freq = math.pi * 2 ** torch.linspace(-1, math.log2(max(grid, 2) / 2), D // 4, device=device)    # from half a wave a side to one in two patches
    angle = (torch.arange(grid) + 0.5)[:, None] / grid * freq
    one = torch.cat([angle.sin(), angle.cos()], dim=1)                      # (grid, D/2)
    both = torch.cat([one[:, None].expand(grid, grid, -1), one[None].expand(grid, grid, -1)], dim=-1).flatten(0, 1)
    return 0.7 * F.pad(both, (0, D - both.shape[1], n_class, 0))



def normalize_pixels(pixels, cfg, dtype):
    """uint8 (n, 3, S, S) -> (x/255 - mean)/std per channel. Done on the tower's device: bytes are a quarter of the floats to move."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean, std = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (cfg.mean, cfg.std))
    return ((pixels.float() / 255 - mean) / std).to(dtype)



MAX_PIXELS = 100_000_000             # a picture of more is refused unread: it may be a decompression bomb



def open_image(path):
    """Any picture file -> upright 8-bit RGB, the first frame of an animation. Raises UserError with the file and what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                 # our own limit speaks below; odd EXIF is no news
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return to_rgb(ImageOps.exif_transpose(image))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such picture; check the path and --image-root") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a picture") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; check its permissions") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down before use") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that Pillow can read; convert it to JPEG or PNG") from None
    except Exception as error:                                              # broken files make Pillow's decoders raise anything
        raise UserError(f"{path}: broken or cut off ({error}); replace the file or drop the record") from None



def to_rgb(image):
    """Pillow's own convert("RGB") clips 16 bits to white and forgets transparency."""
    if image.mode.startswith("I"):                                          # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point pixels have no fixed white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")



@dataclass(frozen=True)
class Tiling:
    """How a picture becomes several tiles. TILINGS holds the three systems; the defaults are LLaVA-1.5-HD's (arXiv:2310.03744v2, 3.4 and A.1).

    Its paper says: 14 grids of up to six tiles, the one that keeps most detail and wastes least; padding-only features dropped, a learned
    embedding at each row's end, beside a padded global view. It leaves open, and here is chosen as LLaVA-NeXT's code has it: the order
    (global_view), whether the global view has row ends too, how the kept rows are rounded (unpad), what decides between grids (the
    published formula), the row end's init (N(0, 1/D)). Chosen otherwise: margins in the mean colour, as LLaVA-1.5 pads; one row of patches
    is left of the thinnest picture (least); a picture that one tile holds has no global view beside it, which would be the same pixels.
    """
    mode: str
    grids: tuple                     # (columns, rows) of tiles; the first of equals is taken
    squash: bool = False             # stretched over the grid nearest in shape, read tile by tile (InternVL); else padded, and read row by row
    fill: str = "mean"               # colour of the margins: the tower's mean, or black
    global_view: str = "first"       # the whole picture in one tile: before the other tiles, last, or none
    global_fit: str = "pad"          # how it becomes square
    row_end: bool = True             # a learned embedding after each row
    global_row_end: bool = False     # and after those of the global view
    unpad: str = "floor"             # patches kept along the padded side: floor of the picture's share, centred (NeXT); touch: all it touches
    least: int = 1                   # and never fewer than this

    def __post_init__(self):
        try:
            object.__setattr__(self, "grids", tuple((int(c), int(r)) for c, r in self.grids))
        except (TypeError, ValueError):
            raise UserError(f"grids are {self.grids!r}; they must be pairs of (columns, rows)") from None
        if not self.grids or min(map(min, self.grids)) < 1:
            raise UserError(f"grids are {self.grids!r}; at least one is needed, of one tile or more")
        for name, known in (("mode", MODES[len(SQUARE_MODES) :]), ("fill", ("mean", "black")), ("global_view", ("first", "last", "none")),
                            ("global_fit", SQUARE_MODES), ("unpad", ("floor", "touch"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")



def grids_up_to(n):
    """All (columns, rows) of at most n tiles, the smaller first: 14 for six tiles (LLaVA-1.5-HD), 35 for twelve (InternVL)."""
    return tuple(sorted(((c, r) for c in range(1, n + 1) for r in range(1, n // c + 1)), key=math.prod))



TILINGS = {
    "hd": Tiling("hd", grids_up_to(6)),
    # LLaVA-NeXT's image_grid_pinpoints, which its code reads as (width, height); there is none of one tile
    "anyres": Tiling("anyres", ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), fill="black", global_fit="resize", least=0),
    "internvl": Tiling("internvl", grids_up_to(12), squash=True, global_view="last", global_fit="resize", row_end=False),
}



def find_tiling(cfg, mode):
    """The Tiling of a mode: the model's own if it was made for this mode. None for a mode of one tile."""
    if mode not in MODES:
        raise UserError(f"image mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    return cfg.tiling if cfg.tiling and cfg.tiling.mode == mode else TILINGS.get(mode)



def cut_tiles(image, cfg, mode):
    """PIL RGB -> tiles (n, 3, S, S) uint8, and their layout (M, 2) int64: tile and patch of each visual token, (-1, 0) where a row ends.

    M is the number of visual tokens; this is the only place that knows it.
    """
    t, S, g = find_tiling(cfg, mode), cfg.image_size, cfg.grid // cfg.merge
    if t is None:
        return to_pixels([make_square(image, cfg, mode)]), patch_layout([[0]], g)
    columns, rows = choose_grid(image.size, S, t)
    if t.squash:
        canvas, layout = image.resize((columns * S, rows * S), Image.BICUBIC), patch_layout([[i] for i in range(columns * rows)], g)
    else:
        canvas, box = pad_to_canvas(image, columns * S, rows * S, (0, 0, 0) if t.fill == "black" else mean_color(cfg))
        layout = patch_layout(torch.arange(columns * rows).view(rows, columns).tolist(), g, kept_patches(image.size, box, columns, rows, cfg, t), t.row_end)
    tiles = [canvas.crop((c * S, r * S, (c + 1) * S, (r + 1) * S)) for r in range(rows) for c in range(columns)]
    seen = [i for i in range(len(tiles)) if (layout[:, 0] == i).any()]
    number = torch.full((len(tiles) + 1,), -1)                              # the last one is for tile -1, the row ends
    number[seen] = torch.arange(len(seen))
    tiles, layout[:, 0] = [tiles[i] for i in seen], number[layout[:, 0]]
    alike = t.squash == (t.global_fit == "resize")                          # then a grid of one tile is the global view
    if t.global_view != "none" and not (columns * rows == 1 and alike):
        whole = to_pixels([make_square(image, cfg, t.global_fit)]), patch_layout([[0]], g, row_end=t.global_row_end)
        rest = to_pixels(tiles) if tiles else torch.empty((0, 3, S, S), dtype=torch.uint8), layout
        return join_pictures([whole, rest] if t.global_view == "first" else [rest, whole])
    return to_pixels(tiles), layout



def join_pictures(pictures):
    """[(tiles, layout), ...] of several pictures -> the same of them all, their tiles counted through."""
    before, layouts = 0, []
    for tiles, layout in pictures:
        layouts.append(torch.where(layout[:, :1] < 0, layout, layout + torch.tensor([before, 0])))
        before += len(tiles)
    return torch.cat([tiles for tiles, _ in pictures]), torch.cat(layouts)



def to_pixels(tiles):
    return torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).contiguous()      # (n, 3, S, S)



def patch_layout(tiles, g, keep=None, row_end=False):
    """A map of tiles [[tile, ...], ...], g x g patches each -> layout of its patches row by row; of each patch (tile, patch).

    `keep` ((first row, end), (first column, end)) cuts the map, in patches.
    """
    tiles = torch.tensor(tiles)
    (top, bottom), (left, right) = keep or ((0, tiles.shape[0] * g), (0, tiles.shape[1] * g))
    y, x = torch.arange(top, bottom)[:, None], torch.arange(left, right)[None]
    layout = torch.stack([tiles[y // g, x // g], y % g * g + x % g], dim=-1)             # (rows, columns, 2)
    if row_end:
        layout = torch.cat([layout, torch.tensor([-1, 0]).expand(len(layout), 1, 2)], dim=1)
    return layout.flatten(0, 1)



def choose_grid(size, S, t):
    """(width, height) -> (columns, rows) of tiles of S px."""
    w, h = size
    if t.squash:                                                            # nearest shape; a larger grid of the same wins if the picture fills half of it
        best, least = (1, 1), math.inf
        for c, r in t.grids:
            off = abs(w / h - c / r)
            if off < least or off == least and w * h > 0.5 * S * S * c * r:
                best, least = (c, r), off
        return best

    def value(grid):                                                        # most pixels of the picture kept, then fewest of the canvas wasted
        W, H = grid[0] * S, grid[1] * S
        scale = min(W / w, H / h)
        effective = min(int(w * scale) * int(h * scale), w * h)
        return effective, effective - W * H

    return max(t.grids, key=value)



def pad_to_canvas(image, W, H, fill):
    """Scaled to touch two sides of a W x H canvas and centred there -> canvas, (left, top, right, bottom) of the picture on it."""
    w, h = image.size
    new = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
    left, top = (W - new[0]) // 2, (H - new[1]) // 2
    canvas = Image.new("RGB", (W, H), fill)
    canvas.paste(image.resize(new, Image.BICUBIC), (left, top))
    return canvas, (left, top, left + new[0], top + new[1])



def kept_patches(size, box, columns, rows, cfg, t):
    """Which patches of the map are not dropped as padding: (first row, end), (first column, end).

    floor: LLaVA-NeXT's unpad, in whole numbers: transformers rounds to 7 digits, the original lets 36 - 1e-15 become 35.
    """
    (w, h), S, g = size, cfg.image_size, cfg.grid // cfg.merge
    W, H = columns * g, rows * g
    if t.unpad == "touch":
        left, top, right, bottom = box
        return (top * g // S, -(-bottom * g // S)), (left * g // S, -(-right * g // S))
    if w * H > W * h:                                                       # wider than the grid: padded above and below
        pad = (H - max(t.least, h * W // w)) // 2
        return (pad, H - pad), (0, W)
    pad = (W - max(t.least, w * H // h)) // 2
    return (0, H), (pad, W - pad)



def make_square(image, cfg, mode):
    """PIL RGB of any size -> S x S. The four ways of LLaVA-1.5 and Prismatic, with Pillow's bicubic filter:

    pad        square canvas in the mean colour, picture in the middle, then scale (LLaVA-1.5, stage 2)
    letterbox  the same, but both margins are floored, so an odd difference leaves one pixel to the final crop (Prismatic)
    crop       scale the short side to S, keep the middle of the long one (LLaVA v1, LLaVA-1.5 stage 1)
    resize     scale both sides to S, whatever the shape (Prismatic's best)
    """
    S, (w, h) = cfg.image_size, image.size
    if mode not in SQUARE_MODES:
        raise UserError(f"image mode {mode!r} is unknown; choose one of {', '.join(SQUARE_MODES)}")
    if mode == "resize":
        return image.resize((S, S), Image.BICUBIC)
    if mode == "crop":
        middle = center_crop(image, min(w, 64 * h), min(h, 64 * w))         # else 20000 x 10 would become 672000 x 336 on its way
        return center_crop(resize_short(middle, S), S, S)
    if max(w, h) > 10_000:                                                  # the square around 20000 x 10 would take 1.2 GB
        scale = 2500 / max(w, h)
        image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.BICUBIC)
        w, h = image.size
    side, fill = max(w, h), mean_color(cfg)
    left, top = (side - w) // 2, (side - h) // 2
    canvas = Image.new("RGB", (side, side) if mode == "pad" else (w + 2 * left, h + 2 * top), fill)
    canvas.paste(image, (left, top))
    return center_crop(resize_short(canvas, S), S, S)



def mean_color(cfg):
    """The mean colour, which is near 0 for the tower."""
    return tuple(int(255 * m) for m in cfg.mean)



def resize_short(image, S):
    """Short side to S, the long one to int(S * long / short)."""
    w, h = image.size
    return image.resize((S, int(S * h / w)) if w <= h else (int(S * w / h), S), Image.BICUBIC)



def center_crop(image, w, h):
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))
