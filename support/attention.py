"""Where in the pictures the decoder looked while it wrote the words of an answer.

A layer's attention from the token before a word, which writes it, to each visual token:

    a = softmax(q k^T / sqrt(d))            mean over heads and the later half of the layers
    heat = max(0, a - mean(a))              mean over all text after the pictures: the question and the answer

Some visual tokens draw attention from every word; the mean takes them out. One pass over the embeddings
of prompt and answer, which the chat still has, gives it for all words: the tower is not run again.
"""

import math
from collections import defaultdict
from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from benchmarks.common import draw_boxes
from model import rotary_angles
from support.io import write_whole
from vision import join_tiles


@torch.no_grad()
def mean_weights(decoder, x, rows):
    """Embeddings (1, T, D); the positions (K,) of those that look -> (K, T)."""
    rope = rotary_angles(torch.arange(x.shape[1], device=x.device)[None], decoder.cfg)
    n_early = len(decoder.layers) // 2
    found = []
    for i, layer in enumerate(decoder.layers):
        if i >= n_early:
            weights = attention_weights(layer.self_attn, layer.input_layernorm(x), rope, rows)
            found.append(weights.mean(0))
        x = layer(x, rope)
    return sum(found) / len(found)


def attention_weights(attn, x, rope, rows):
    """What CausalAttention never shows: the softmax of some rows, (1, T, D) -> (H, K, T)."""
    T = x.shape[1]
    q, k, _ = attn.project(x, rope)
    q, k = q[0], k[0]                                                       # (H or H_kv, T, d)
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    scores = q[:, rows].float() @ k.float().transpose(1, 2)                 # (H, K, T)
    scores = scores / math.sqrt(attn.head_dim)
    is_later = torch.arange(T, device=x.device) > rows[:, None]             # (K, T)
    return scores.masked_fill(is_later, -math.inf).softmax(-1)


class Look:
    """Where the decoder looked for each word of a chat's last answer; computed when it is asked for."""

    def __init__(self, chat):
        self.chat = copy(chat)                                              # as it stands now
        self.x = chat.history.x                                             # (1, T, D)
        self.prompt, self.pictures = chat.prompt
        self.tiles, self.layout = join_tiles(self.pictures)                 # (n, 3, S, S), (M, 2)
        self.words = chat.answer.text.split()

    @cached_property
    def heat(self):
        """-> (words, M)"""
        tok, answer = self.chat.tok, self.chat.answer
        is_image = torch.tensor(self.prompt) == tok.image
        first = int(is_image.nonzero()[-1]) + 1                             # of the text after the pictures
        rows = torch.arange(first, self.x.shape[1], device=self.x.device)
        seen = mean_weights(self.chat.vlm.decoder, self.x, rows).cpu()               # (K, T)
        seen = seen[:, : len(self.prompt)][:, is_image]                     # (K, M)
        seen = (seen - seen.mean(0)).clamp(min=0)                           # (K, M)

        # Each token of the answer is written by the one before it. A comma looks at what comes next, so the
        # punctuation after a word is left out.
        ids = answer.ids[:-1] if answer.whole else answer.ids
        rows_of = defaultdict(list)                                         # of each word
        for k, token in enumerate(ids):
            word = len(tok.decode(ids[: k + 1]).split()) - 1
            if word not in rows_of or any(map(str.isalnum, tok.piece(token))):
                rows_of[word].append(len(self.prompt) - 1 + k - first)
        heats = [seen[rows_of[n]].mean(0) for n in range(len(self.words))]
        return torch.stack(heats)

    def draw(self, n, side=240):
        """The tiles in the order in which they were read, bright where the decoder looked for word n; and the
        boxes of the answer."""
        cfg = self.chat.vlm.cfg
        g = cfg.vision.token_grid
        bright = torch.zeros(len(self.tiles), g * g)
        is_patch = self.layout[:, 0] >= 0                                   # not the end of a row
        tile, place = self.layout[is_patch].T
        bright[tile, place] = self.heat[n, is_patch]
        bright = bright.view(-1, 1, g, g)
        bright = bright / self.heat.max().clamp(min=1e-9)                   # a word may see little
        bright = F.interpolate(bright, size=self.tiles.shape[-2:], mode="bilinear")
        lit = (self.tiles * (0.2 + 0.8 * bright)).byte()                    # (n, 3, S, S)
        strip = torch.cat(list(lit), dim=-1).permute(1, 2, 0)               # (S, n S, 3)
        image = Image.fromarray(strip.numpy())
        image = image.resize((side * len(lit), side), Image.BICUBIC)

        # Of one picture, in the tile that shows all of it, if there is one.
        view = cfg.tiling.global_view if cfg.tiling else "first"
        whole = {"first": 0, "last": len(lit) - 1}.get(view)
        if len(self.pictures) == 1 and whole is not None:
            draw_boxes(ImageDraw.Draw(image), self.chat.answer.text, side * whole, 0, side, "#ff3030")
        return image

    def save(self, path):
        """Write a PNG of all words, each under its picture."""
        panels = [self.draw(n) for n in range(len(self.words))]
        width, height = panels[0].size
        step_x, step_y = width + 10, height + 34
        n_column = max(1, 1250 // step_x)
        n_row = -(-len(panels) // n_column)
        sheet = Image.new("RGB", (step_x * min(n_column, len(panels)), step_y * n_row), "white")
        pen = ImageDraw.Draw(sheet)
        for n, panel in enumerate(panels):
            x, y = n % n_column * step_x, n // n_column * step_y
            sheet.paste(panel, (x, y))
            below = x + width / 2, y + height + 22
            pen.text(below, self.words[n], fill="black", anchor="ms", font_size=18)
        write_whole(path, lambda tmp: sheet.save(tmp, "PNG"))
