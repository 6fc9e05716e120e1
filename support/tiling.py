"""Several tiles of one picture: which grid, and which visual tokens the decoder reads, in which order.

    hd         LLaVA-1.5-HD (arXiv:2310.03744v2, 3.4 and A.1), which was never released
    anyres     LLaVA-NeXT, as its code has it
    internvl   InternVL-2.5 (arXiv:2412.05271), as its code has it

LLaVA pads the picture to fill the grid. The decoder reads row after row of patches across all tiles, without
the patches of padding, and a learned embedding ends each row. InternVL stretches the picture over the grid
(by_tile), and the decoder reads one tile after the other. Either may see the whole picture in one more tile.

HD's paper gives the grids (14, of up to six tiles), the choice among them (most detail, then least waste),
the dropping of padding, the row ends, and the padded global view. What it does not say is done as in
LLaVA-NeXT's code: the global view comes first and has no row ends; how much padding is dropped; that a row
end begins as N(0, 1/D). Three things are our own: the padding has the mean colour, as in LLaVA-1.5; of a very
thin picture one row of patches is kept; a picture that one tile holds gets no global view, which would show
the same pixels.

Here are the choices and the layout, in whole numbers; the pixels are cut in vision.py.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch

from support.cli import UserError

MAX_TILES = 100  # of a picture; the originals take at most 40


@dataclass
class Tiling:
    """How a picture becomes a grid of tiles. The defaults are LLaVA-1.5-HD's."""

    mode: str
    grids: tuple                     # (columns, rows) of tiles; of equally good ones the first is taken
    by_tile: bool = False            # else row by row, and a learned embedding ends each row
    margin: str = "mean"             # colour of the padding: the tower's mean, or black
    global_view: str = "first"       # where the tile of the whole picture stands: first, last or none
    global_mode: str = "pad"         # how the picture becomes square there: one of SQUARE_MODES
    least: int = 1                   # fewest rows or columns of visual tokens to keep

    def __post_init__(self):
        self.grids = tuple(map(tuple, self.grids))  # config.json has lists
        if self.global_view not in ("first", "last", "none"):
            raise UserError(f"global_view is {self.global_view!r}; choose one of first, last, none")
        fits = [min(grid) > 0 and math.prod(grid) <= MAX_TILES for grid in self.grids]
        if not fits or not all(fits):
            raise UserError(f"grids of tiles are {self.grids}; each needs 1 to {MAX_TILES} tiles")


def grids_up_to(n):
    """All (columns, rows) of at most n tiles, smaller first: 14 for six (HD), 35 for twelve (InternVL)."""
    if not 1 <= n <= MAX_TILES:
        raise UserError(f"{n} tiles a picture; choose 1 to {MAX_TILES}")
    pairs = product(range(1, n + 1), repeat=2)
    return tuple(sorted((pair for pair in pairs if math.prod(pair) <= n), key=math.prod))


# LLaVA-NeXT's image_grid_pinpoints, which its code reads as (width, height); there is none of one tile.
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
TILINGS = {
    "hd": Tiling("hd", grids_up_to(6)),
    "anyres": Tiling("anyres", NEXT_GRIDS, margin="black", global_mode="resize", least=0),
    "internvl": Tiling("internvl", grids_up_to(12), by_tile=True, global_view="last", global_mode="resize"),
}


def layout_by_rows(size, columns, rows, g, tiling):
    """(width, height) of a picture that is padded onto a grid of tiles of g x g visual tokens -> which tiles
    show it, and the layout (M, 2) of the tokens that do: tile and place in it, row by row across the tiles.

    [-1, 0] ends each row, as in [[0, 0], [0, 1], [-1, 0], [0, 2], [0, 3], [-1, 0]] of one tile of 2 x 2.
    What shows padding alone is dropped by LLaVA-NeXT's rule, but in whole numbers: in floating point the
    original gets one row less where 36 - 1e-15 is rounded down.
    """
    w, h = size
    n_across, n_down = columns * g, rows * g
    least = 1 if tiling.global_view == "none" else tiling.least  # something is kept where no other view is
    # A picture wider than the grid is padded above and below, a higher one on both sides.
    above = max(0, n_down - max(least, h * n_across // w)) // 2
    left = max(0, n_across - max(least, w * n_down // h)) // 2
    y = torch.arange(above, n_down - above)[:, None]
    x = torch.arange(left, n_across - left)[None]
    tile = y // g * columns + x // g
    place = y % g * g + x % g
    used, tile = tile.unique(return_inverse=True)  # the others show padding; these are numbered anew
    layout = torch.stack([tile, place], dim=-1)  # (rows of tokens, columns of tokens, 2)
    ends = torch.tensor([-1, 0]).expand(len(layout), 1, 2)
    return used, torch.cat([layout, ends], dim=1).flatten(0, 1)


def choose_grid(size, S, tiling, n_picture=1):
    """(width, height) of a picture -> (columns, rows) of tiles of S px."""
    w, h = size

    def shape_match(grid):
        """InternVL takes the grid whose shape is nearest to the picture's. Ties: the largest grid whose area
        the picture fills by more than half; if none, the first."""
        columns, rows = grid
        area = columns * rows * S * S
        is_half_full = w * h > 0.5 * area
        return -abs(w / h - columns / rows), area if is_half_full else 0

    def detail(grid):
        """LLaVA takes the grid that keeps most pixels of the picture. Of equals it takes the smallest."""
        W, H = grid[0] * S, grid[1] * S
        scale = min(W / w, H / h)
        n_kept = min(int(w * scale) * int(h * scale), w * h)
        return n_kept, -W * H

    if not tiling.by_tile:
        return max(tiling.grids, key=detail)

    # InternVL's rule, for every mode that is read by tile: the pictures of a conversation share the tiles.
    most = max(math.prod(grid) for grid in tiling.grids) // n_picture
    fitting = [grid for grid in tiling.grids if math.prod(grid) <= most]
    return max(fitting, key=shape_match, default=(1, 1))
