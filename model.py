"""The vision-language model: a ViT looks, a connector translates, a Llama-style decoder reads both and writes (arXiv:2310.03744).

    pixels --vision.ViT--> patches --connector--> rows as wide as word embeddings, written over the <image> rows of the prompt,
                                                  in the order of their layout where pictures have several tiles (vision.cut_tiles)
    prompt with picture --decoder--> logits of the next token

    h   = x + Attention(RMSNorm(x))             the decoder of Llama (arXiv:2302.13971): pre-norm, rotary positions, no biases
    out = h + SwiGLU(RMSNorm(h))                SwiGLU(x) = W_down (silu(W_gate x) * W_up x)

    vlm    = VLM.from_pretrained(DIR)           # LLaVA in both its layouts and as LoRA, Prismatic, InternVL2.5: see "reading"
    logits = vlm(tokens, pixels)                # (B, T) int64, (n, 3, S, S) -> (B, T, V); layout=(M, 2) where pictures are tiled
    loss   = vlm(tokens, pixels, labels)        # mean over the supervised tokens
    ids    = vlm.generate(tokens, pixels, max_new_tokens=64)
    vlm.save_pretrained(DIR)                    # transformers opens it as LlavaForConditionalGeneration, if its tower is a CLIP

Rows of a batch are padded on the right, in training and in generation alike: under a causal mask no valid position ever sees the
padding, so no attention mask is needed. Deviations from the originals: the unused last block of the tower is not run; a head that
shares its table with the embedding is a copy of it from the moment it is loaded; Mistral's sliding window is not implemented, instead
the longest sequence is one window (inside it nothing slides); nor are InternLM2's positions stretched beyond its own longest sequence.

    python model.py convert SRC DIR             # weights to safetensors, whole models to the llava-hf layout where it can hold them
    python model.py info DIR|PRESET             # parts, parameters, visual tokens, memory; reads no weights
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from vision import (CLIP_NAMES, HALF, IMAGENET_MEAN, IMAGENET_STD, TILINGS, UserError, VisionConfig, ViT, default_template, draw, find_tiling,
                    picture_mode, rename, tower_by_shapes, tower_tensors)

IGNORE = -100                        # the label of a token that is not supervised


@dataclass
class DecoderConfig:
    vocab_size: int = 32000          # V, rows of the embedding table
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32              # grouped-query attention: each serves n_head / n_kv_head query heads
    n_embd: int = 4096               # D
    head_dim: int = 128
    n_hidden: int = 11008            # width of SwiGLU
    block_size: int = 4096           # longest sequence
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False               # the file has no head of its own: it starts as a copy of the embedding

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} query heads cannot be shared among {self.n_kv_head} key-value heads")
        if self.head_dim % 2:
            raise UserError(f"a head of {self.head_dim} channels cannot be turned in pairs; rotary positions need an even number")


@dataclass
class VLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    connector: str = "mlp2x_gelu"    # one of CONNECTORS
    image_token: int = 32000         # id that stands for one visual token; ids from here on are never generated
    pad_token: int = 32001
    bos_token: int = 1
    eos_token: int = 2
    image_mode: str = "pad"          # how a picture becomes tiles: vision.fit, vision.TILINGS (and vision.tiling, where the model differs)
    template: str = "vicuna_v1"      # how a conversation becomes one text: data.TEMPLATES
    vision2: VisionConfig | None = None      # a second tower on the same tile, its features beside the first one's (Prismatic)

    def __post_init__(self):
        if self.connector not in CONNECTORS:
            raise UserError(f"connector {self.connector!r} is unknown; choose one of {', '.join(CONNECTORS)}")
        if self.vision2 and (self.vision2.image_size, self.vision2.n_token) != (self.vision.image_size, self.vision.n_token):
            raise UserError(f"two towers need the same tile and grid, here are {self.vision.image_size} px with {self.vision.n_token} visual tokens "
                            f"and {self.vision2.image_size} px with {self.vision2.n_token}")
        find_tiling(self.vision, self.image_mode)                           # an unknown mode is said here
        if self.image_token <= max(self.bos_token, self.eos_token):
            raise UserError(f"image token {self.image_token} lies among the words; ids from it on are never generated, so it must come after them")

    @property
    def unsaid(self):                # ids that are never generated: <image>, <pad> and the rest of the table. InternVL has words behind <image>
        first, last = (self.image_token, self.image_token + 1) if self.pad_token == self.eos_token else (min(self.image_token, self.pad_token), None)
        return slice(first, last)

    @property
    def n_feature(self):             # width of a visual token before the connector
        return self.vision.n_feature + (self.vision2.n_feature if self.vision2 else 0)

    @property
    def tiling(self):                # None where a picture is one tile
        return find_tiling(self.vision, self.image_mode)

    @property
    def row_end(self):               # whether a learned embedding ends the rows of a picture's tiles
        return self.tiling is not None and (self.tiling.row_end or self.tiling.global_row_end)


CONNECTORS = {                       # name -> what its linear layers make of n_in visual features: D channels in the end, a GELU between them
    "mlp2x_gelu": lambda n_in, D: (D, D),                   # LLaVA-1.5
    "linear": lambda n_in, D: (D,),                         # LLaVA v1
    "fused_gelu": lambda n_in, D: (4 * n_in, D, D),         # Prismatic, over two towers
    "norm_gelu": lambda n_in, D: (D, D),                    # InternVL, with a LayerNorm before them
}
PRESETS = {
    # The toy: its tower and decoder are in assets/, made by lab.py. 64 visual tokens a picture.
    "toy": VLMConfig(
        VisionConfig(image_size=96, patch_size=12, n_embd=128, n_layer=5, n_head=4, n_hidden=512),
        DecoderConfig(vocab_size=960, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024)),
    # For 64 px pictures of four small real photos, from random weights: 16 patches that the tower reads, merged to one visual token a photo.
    "photo": VLMConfig(
        VisionConfig(image_size=64, patch_size=16, n_embd=128, n_layer=4, n_head=4, n_hidden=512, feature_layer=-1, merge=2),
        DecoderConfig(vocab_size=960, n_layer=3, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024),
        template="prism_pure"),
    "llava-1.5-7b": VLMConfig(decoder=DecoderConfig(vocab_size=32064)),
    "llava-v1-7b": VLMConfig(VisionConfig(image_size=224), DecoderConfig(vocab_size=32064), "linear", image_mode="crop", template="llava_v0"),
    "llava-1.5-hd-7b": VLMConfig(VisionConfig(image_size=224), DecoderConfig(vocab_size=32064), image_mode="hd"),    # never released: the paper's A.1
    "llava-1.5-13b": VLMConfig(decoder=DecoderConfig(vocab_size=32064, n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, n_hidden=13824)),
}


class VLM(nn.Module):
    always_look = False              # train.py sets it where several processes train together
    lora = None                      # add_lora's numbers

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = ViT(cfg.vision)
        if cfg.vision2:
            self.vision2 = ViT(cfg.vision2)
        self.connector = Connector(cfg)
        self.decoder = Decoder(cfg.decoder)

    def forward(self, tokens, pixels=None, labels=None, layout=None):
        """(B, T) int64, (n, 3, S, S) -> logits (B, T, V); with labels (B, T), not shifted, IGNORE where unsupervised -> scalar loss.

        Every image is a run of image tokens exactly as long as its visual tokens; pixels come in the order of the runs, and so does
        layout (M, 2), which picks the visual tokens from their features (vision.cut_tiles; None: all features in their order); with it, runs
        may share a picture.
        The loss, - log of Eq. 3 in arXiv:2304.08485, is the mean over supervised tokens. ValueError when runs and pictures differ, or nothing
        is supervised.
        """
        x = self.embed(tokens, pixels, layout)                              # (B, T, D)
        if labels is None:
            return self.decoder.lm_head(self.decoder(x))                    # (B, T, V)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()       # (B T,): position t predicts token t + 1
        rows = (target != IGNORE).nonzero()[:, 0]
        if not len(rows):
            raise ValueError("no supervised token in the batch: its loss would be 0/0; check the labels (python data.py show)")
        return head_loss(self.decoder(x, rows=rows), self.decoder.lm_head.weight, target[rows]) / len(rows)

    def embed(self, tokens, pixels, layout=None):
        """Word embeddings with the pictures written over their rows: (B, T), (n, 3, S, S), (M, 2) -> (B, T, D)."""
        here = tokens == self.cfg.image_token                               # (B, T)
        beyond = tokens == max(self.cfg.pad_token, self.cfg.decoder.vocab_size)             # <pad>, where it lies beyond the table as
        x = self.decoder.embed_tokens(tokens.masked_fill(here | beyond, 0))                 # <image> may too: LLaVA's own has 32000 rows
        N, row_ends = self.cfg.vision.n_token, self.connector.row_end is not None
        n_slot, n_visual = int(here.sum()), 0 if pixels is None else len(pixels) * N if layout is None else len(layout)
        if n_slot != n_visual:
            raise ValueError(f"{n_slot} image tokens in the batch, {n_visual} visual tokens from the pictures: each picture needs a run "
                             f"{f'of {N}' if layout is None else 'as long as its layout'} (data.encode_conversation makes it)")
        if n_visual and (row_ends if layout is None else not row_ends and bool((layout < 0).any())):
            raise ValueError("the pictures have row ends and the model none: cut them in its own mode" if layout is not None else
                             f"pictures of mode {self.cfg.image_mode} come with a layout (vision.cut_tiles); give it beside the pixels")
        if n_visual:
            visual = self.features(pixels).flatten(0, 1)                    # (n N, D_vision)
            visual = self.connector(visual, layout if layout is None else layout[:, 0] * N + layout[:, 1])      # (M, D)
            x = x.masked_scatter(here[:, :, None], visual.to(x.dtype))
        elif self.always_look and torch.is_grad_enabled():                  # one of several processes, whose batch has no picture: the
            S = self.cfg.vision.image_size                                  # others wait for its share of the towers and the connector
            blank = torch.zeros(1, 3, S, S, dtype=torch.uint8, device=x.device)
            x = x + 0 * self.connector(self.features(blank).flatten(0, 1), torch.tensor([0, -1], device=x.device)).sum().to(x.dtype)
        return x

    def features(self, pixels):
        """What the connector reads: (n, 3, S, S) -> (n, N, D_vision). Features that were kept (train.py, --cache-features; mpo.py) pass."""
        if pixels.ndim == 3:
            return pixels.to(self.connector.linear_1.weight.dtype)
        return torch.cat([self.vision(pixels), self.vision2(pixels)], dim=-1) if self.cfg.vision2 else self.vision(pixels)

    def generate(self, tokens, pixels=None, max_new_tokens=128, temperature=0.0, top_p=1.0, top_k=0, lengths=None, seed=None, stop=None, shared=None,
                 layout=None):
        """Continue each row: (B, T) -> new ids (B, n <= max_new_tokens), the pad token after a row's end token.

        A row whose n ids hold no end token was cut off by max_new_tokens. `stop`: ids that end an answer, if not only </s>. `lengths` (B,)
        says how many tokens of each row are prompt when rows are padded on the right. temperature 0 is greedy; otherwise top_k, then top_p
        (nucleus) limit the choice.
        `shared` (B,): which of several beginnings each row has, all of one length and ending with the last picture; `pixels` are then
        those of each beginning once, in their order, and questions about one picture are spared to look at it again.
        """
        return torch.stack(list(self.stream(tokens, pixels, max_new_tokens, temperature, top_p, top_k, lengths, seed, stop, shared, layout)), dim=1)

    @torch.no_grad()
    def stream(self, tokens, pixels=None, max_new_tokens=128, temperature=0.0, top_p=1.0, top_k=0, lengths=None, seed=None, stop=None, shared=None,
               layout=None):
        """The same, one step at a time: yields (B,) ids until every row has ended."""
        B, T = tokens.shape
        device, longest = tokens.device, T + max_new_tokens
        for name, value, right, must in (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                         ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
                                         ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"), ("top_k", top_k, top_k >= 0, "0 or more")):
            if not right:
                raise UserError(f"{name} is {value}; it must be {must}")
        if longest > self.cfg.decoder.block_size:
            raise UserError(f"{T} prompt tokens + {max_new_tokens} new ones exceed the decoder's {self.cfg.decoder.block_size}: "
                            "ask for fewer or shorten the prompt")
        pos = torch.full((B,), T, device=device) if lengths is None else torch.as_tensor(lengths, device=device)    # next free place
        stop = torch.tensor(stop or [self.cfg.eos_token], device=device)
        draw = torch.Generator(device).manual_seed(seed) if seed is not None else None
        cache = self.decoder.new_cache(B, longest)
        h = self.prefill(tokens, pixels, cache, pos, shared, layout)        # (B, D) at each row's last prompt token
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            logits = self.decoder.lm_head(h).float()                        # (B, V)
            logits[:, self.cfg.unsaid] = -math.inf
            new = sample(logits, temperature, top_p, top_k, draw).masked_fill(ended, self.cfg.pad_token)
            yield new
            ended = ended | torch.isin(new, stop)
            if ended.all() or step + 1 == max_new_tokens:
                return
            x = self.decoder.embed_tokens(new.masked_fill(ended, 0))[:, None]
            h = self.decoder(x, cache=cache, pos=pos, end=T + step + 1)[:, 0]
            pos = pos + 1

    def prefill(self, tokens, pixels, cache, lengths, shared=None, layout=None):
        """Fill the cache with the prompts (B, T) -> h (B, D) at the last token of each, of `lengths` (B,). What padding writes is never read."""
        (B, T), last = tokens.shape, lengths - 1
        if shared is None:
            return self.decoder(self.embed(tokens, pixels, layout), cache=cache, rows=torch.arange(B, device=tokens.device) * T + last)
        shared = torch.as_tensor(shared, device=tokens.device)
        begun = int((tokens[0] == self.cfg.image_token).nonzero()[-1]) + 1  # one past the last picture, the same in all rows
        first = [int((shared == i).nonzero()[0]) for i in range(int(shared.max()) + 1)]      # a row of each beginning
        few = self.decoder.new_cache(len(first), begun)
        self.decoder(self.embed(tokens[first, :begun], pixels, layout), cache=few, rows=last[:0])            # of these the cache alone is wanted
        for layer, once in zip(cache, few):
            layer[:, :, :, :begun] = once[:, shared]
        x = self.embed(tokens[:, begun:], None)                             # (B, T - begun, D)
        rows = torch.arange(B, device=tokens.device) * (T - begun) + last - begun
        return self.decoder(x, cache=cache, pos=torch.full((B,), begun, device=tokens.device), end=T, rows=rows)

    def set_image_mode(self, mode, **choices):
        """How pictures become tiles from now on; `choices` are fields of vision.Tiling. A row-end embedding comes with the modes that want one."""
        tiling = find_tiling(self.cfg.vision, mode)
        if choices and tiling is None:
            raise UserError(f"image mode {mode} cuts no tiles, so it has no {' or '.join(choices)} to choose")
        tiling = tiling and replace(tiling, **choices)
        self.cfg = replace(self.cfg, image_mode=mode, vision=replace(self.cfg.vision, tiling=None if tiling == TILINGS.get(mode) else tiling))
        self.connector.want_row_end(self.cfg.row_end)

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32, vision=None, llm=None):
        """Open a model directory of any layout told apart below. UserError names what does not fit.

        `vision` (DIR or DIR,DIR) and `llm`: the towers of a model that was published without, and what a LoRA was trained over.
        `dtype` None: as the words are stored, but bfloat16 for float16 on a CPU, which is many times slower at float16.
        """
        cfg, found, tensors, public = read_model(directory, vision, llm)
        if dtype is None:
            dtype = stored_dtype(found)
            dtype = torch.bfloat16 if dtype == torch.float16 and torch.device(device).type == "cpu" else dtype
        with torch.device("meta"):
            vlm = cls(cfg)
        load_strict(vlm, found, directory, tensors, device, dtype, public)
        return vlm.eval()

    def save_pretrained(self, directory, state=None):
        """Write config.json and model.safetensors, each file replacing the old one whole: in the llava-hf layout (tensor-name family A) where
        it can hold the model, else under our own names, with model_type "plainvlm". A LoRA is merged. `state`: the weights, if not those here."""
        public, config = public_layout(self)
        state = merged_state(self) if state is None else state
        write_model(directory, {public(name): t.contiguous().cpu() for name, t in state.items()}, config)


def public_layout(vlm):
    """-> how our names are called in the layout that it is saved in, and that layout's config.json."""
    dtype = str(vlm.decoder.lm_head.weight.dtype).removeprefix("torch.")
    if fits_llava(vlm.cfg):
        return llava_name, llava_config(vlm.cfg, dtype)
    return str, {"model_type": "plainvlm", "dtype": dtype, **asdict(vlm.cfg)}


class Connector(nn.Module):
    """Visual features -> word-embedding space: (n, D_vision) -> (n, D), LLaVA's Eq. 1 (arXiv:2304.08485). Fresh weights keep PyTorch's default.

    With `index` (M,) only the features it names are translated, in its order -> (M, D); where it is negative stands the row end.
    """

    def __init__(self, cfg):
        super().__init__()
        n_in, self.D = cfg.n_feature, cfg.decoder.n_embd
        self.norm = nn.LayerNorm(n_in) if cfg.connector == "norm_gelu" else nn.Identity()
        widths = CONNECTORS[cfg.connector](n_in, self.D)
        for i, (a, b) in enumerate(zip((n_in, *widths), widths), 1):
            setattr(self, f"linear_{i}", nn.Linear(a, b))
        self.register_parameter("row_end", None)
        self.want_row_end(cfg.row_end)

    def want_row_end(self, wanted):
        if wanted != (self.row_end is not None):
            like = self.linear_1.bias
            self.row_end = nn.Parameter(draw(self.D, std=self.D**-0.5, device=like.device, dtype=like.dtype)) if wanted else None

    def forward(self, x, index=None):
        x = x if index is None else x.index_select(0, index.clamp(min=0))
        norm, linear, *more = self.children()
        x = linear(norm(x))
        for linear in more:
            x = linear(F.gelu(x))
        return x if index is None or self.row_end is None else torch.where(index[:, None] < 0, self.row_end.to(x.dtype), x)


class Decoder(nn.Module):
    recompute = 0                    # the first so many blocks keep only their input in training, and are run again on the way back

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding.from_pretrained(draw(cfg.vocab_size, cfg.n_embd), freeze=False)
        self.layers = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    def forward(self, x, cache=None, pos=None, end=None, at=None, mask=None, rows=None):
        """(B, T, D) embeddings -> (B, T, D) ready for lm_head, causally; or at the positions `at` (B, T) and seeing what `mask` (B, 1, T, T) lets.
        `rows` (n,), of the B T ones: -> (n, D), and the last block is spared what it would compute for the others after they were attended to.

        With a cache and no `pos`: positions 0..T-1 are computed and remembered. With `pos` (B,): each row's tokens stand from its own
        position on and see its cache up to themselves; `end` bounds all positions so that the unused tail is not read.
        """
        if at is None:
            at = torch.arange(x.shape[1], device=x.device)[None]            # (1, T)
            at = at if pos is None else pos[:, None] + at                   # (B, T)
        if pos is not None:
            mask = (torch.arange(end, device=x.device) <= at[:, :, None])[:, None]          # (B, 1, T, end)
        rope = rotary(at, self.cfg)
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            given = (x, rope, None if cache is None else cache[i], None if pos is None else at, mask, rows if last else None)
            x = checkpoint(layer, *given, use_reentrant=False) if i < self.recompute and torch.is_grad_enabled() else layer(*given)
        return self.norm(x)

    def new_cache(self, B, length):
        """Room for keys and values of every layer: n_layer x 2 x (B, H_kv, length, head_dim)."""
        w, c = self.embed_tokens.weight, self.cfg
        return [torch.zeros(2, B, c.n_kv_head, length, c.head_dim, device=w.device, dtype=w.dtype) for _ in range(c.n_layer)]


class DecoderBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = CausalAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(self, x, rope, cache, pos, mask, rows=None):
        y = self.self_attn(self.input_layernorm(x), rope, cache, pos, mask, rows)
        x = y + (x if rows is None else x.flatten(0, 1).index_select(0, rows))
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, Eq. 1), with rotary positions and grouped queries (arXiv:2305.13245)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim, self.grouped = cfg.head_dim, cfg.n_kv_head != cfg.n_head
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, rope, cache, pos, mask, rows=None):                # (B, T, D) -> the same, or (n, D)
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)                           # (B, H, T, d), (B, H_kv, T, d)
        if cache is not None and pos is None:
            cache[0, :, :, :T], cache[1, :, :, :T] = k, v
        elif cache is not None:
            each = torch.arange(B, device=x.device)[:, None]                # pos is (B, T) here
            cache[0, each, :, pos], cache[1, each, :, pos] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = cache[0, :, :, : mask.shape[-1]], cache[1, :, :, : mask.shape[-1]]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y if rows is None else y.flatten(0, 1).index_select(0, rows))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)                                     arXiv:2002.05202, Eq. 6"""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.down_proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight                                                  arXiv:1910.07467, Eq. 4; the statistics in float32, as in Llama"""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rotary(at, cfg):
    """Angles of RoPE (arXiv:2104.09864, section 3.2.2): positions (1 or B, T) -> cos, sin (1 or B, 1, T, d), float32, halves repeated."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=at.device).float() / cfg.head_dim)           # (d/2,)
    angle = (at[:, None, :, None].float() * freq).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) by its angle (RoPE, Eq. 34, there for pairs of neighbours): the rotate-half layout of the public Llama weights."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def head_loss(h, W, y):
    """- sum over n rows of log softmax(h W^T)[y]: (n, D), (V, D), (n,) -> scalar. No (n, V) logits exist at any moment."""
    dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else W.dtype
    return HeadLoss.apply(h, W, y, dtype, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """Both gradients of a slice of rows are made while its logits are there, p - onehot(y) in their place; backward only scales them."""

    @staticmethod
    def forward(ctx, h, W, y, dtype, learn):
        rows = max(1, (2**26 if h.is_cuda else 2**23) // len(W))            # float32 logits of 256 MB there, 32 MB here: about a cache
        to_h, to_W = (learn and needed for needed in ctx.needs_input_grad[:2])
        grad_h, grad_W = torch.empty_like(h) if to_h else None, torch.empty_like(W, dtype=torch.float32) if to_W else None
        loss, w = torch.zeros((), device=h.device), W.to(dtype)
        with torch.autocast(h.device.type, enabled=False):
            for at in range(0, len(y), rows):
                x, target = h[at : at + rows].to(dtype), y[at : at + rows, None]
                p = (x @ w.T).float()                                       # logits, and in the same memory what becomes of them
                top, said = p.amax(-1, keepdim=True), p.gather(1, target)
                total = p.sub_(top).exp_().sum(-1, keepdim=True)
                loss += (total.log() + top - said).sum()
                if to_h or to_W:
                    p = p.div_(total).scatter_add_(1, target, torch.full_like(said, -1.0)).to(dtype)
                if to_h:
                    grad_h[at : at + rows] = p @ w
                if to_W and dtype == torch.float32:
                    torch.addmm(grad_W, p.T, x, beta=float(at > 0), out=grad_W)
                elif to_W:
                    grad_W = grad_W.add_(p.T @ x) if at else grad_W.copy_(p.T @ x)
        ctx.save_for_backward(grad_h, grad_W)
        ctx.dtype = W.dtype
        return loss

    @staticmethod
    def backward(ctx, g):
        grad_h, grad_W = ctx.saved_tensors
        return None if grad_h is None else grad_h * g, None if grad_W is None else grad_W.mul_(g).to(ctx.dtype), None, None, None


def sample(logits, temperature, top_p, top_k, draw):
    """(B, V) -> (B,). Greedy at temperature 0; else draw from the top_k likeliest, then from the smallest set holding top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)                         # so that no temperature, however small, overflows
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        p[:, top_k:] = 0
    p = p / p.sum(-1, keepdim=True)
    p[p.cumsum(-1) - p >= top_p] = 0                                        # drop a word once those above it already hold top_p
    return ids.gather(-1, torch.multinomial(p, 1, generator=draw))[:, 0]


def init_weights(module):
    """Fresh towers and decoders: N(0, 1/fan_in). The usual 0.02 is right at width 2,500 and too small at the toy's 128."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=m.weight.shape[1] ** -0.5)
    for name, p in module.named_parameters():
        if re.search(r"(o_proj|down_proj|out_proj|fc2)\.weight$", name):    # what is added to the residual stream starts quiet
            p.data *= 0.3
    return module


# ---- LoRA (arXiv:2106.09685) ------------------------------------------------------------------------------------------

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """y = W x + alpha/r B A dropout(x), Eq. 3 of the paper: W stays, A (r, in) and B (out, r) learn, and B begins at zero, so y begins as it was."""

    def __init__(self, linear, r, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = linear.in_features, linear.out_features, linear.weight, linear.bias
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, self.in_features, device=self.weight.device), a=5**0.5))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.weight.device))
        self.scale, self.dropout, self.on = alpha / r, nn.Dropout(dropout), True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return y + self.scale * F.linear(low, self.lora_B.to(low.dtype))


def add_lora(vlm, r, alpha, dropout=0.0, targets=LORA_TARGETS):
    """Put a LoRA on the decoder's linear layers of these names; of the decoder nothing else trains from here on."""
    vlm.decoder.requires_grad_(False)
    for block in vlm.decoder.layers:
        for owner in (block.self_attn, block.mlp):
            for name, linear in list(owner.named_children()):
                if name in targets:
                    setattr(owner, name, LoRALinear(linear, r, alpha, dropout))
    vlm.lora = {"base": None, "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "targets": list(targets)}


@contextmanager
def lora_off(vlm):
    """Inside, the model is its base: the reference of preference learning, without a second copy of the weights."""
    def switch(on):
        for m in vlm.modules():
            if isinstance(m, LoRALinear):
                m.on = on
    switch(False)
    try:
        yield
    finally:
        switch(True)


def merged_state(vlm):
    """The weights without LoRA, W + alpha/r B A in its place: {our name: tensor}."""
    state = {name: t for name, t in vlm.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, m in vlm.named_modules():
        if isinstance(m, LoRALinear):
            state[f"{name}.weight"] = (m.weight.float() + m.scale * m.lora_B.detach().float() @ m.lora_A.detach().float()).to(m.weight.dtype)
    return state


def adapter_name(name, public):
    """One of our names -> that of the PEFT library over transformers' Llava; our own where that is not what is trained."""
    name = re.sub(r"(lora_[AB])$", r"\1.weight", public(name))
    if public is str:
        return name
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head.")
    return "base_model.model." + ("model." if name.startswith(("vision_tower.", "multi_modal_projector.")) else "") + name


def save_adapter(vlm, directory, base, state=None):
    """What trains, in the PEFT library's layout: the LoRA, and whole what trains beside it. `base`: directory of the model under it.

    The directory opens like any other model (VLM.from_pretrained merges), and `python model.py convert` makes a whole one of it.
    """
    state = {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad} if state is None else state
    children = {"multi_modal_projector": vlm.connector, "vision_tower": vlm.vision}
    whole = [name for name, child in children.items() if any(p.requires_grad for p in child.parameters())]
    public, config = public_layout(vlm)
    write_json(Path(directory) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none", "use_dora": False, "use_rslora": False,
        "fan_in_fan_out": False, "r": vlm.lora["r"], "lora_alpha": vlm.lora["lora_alpha"], "lora_dropout": vlm.lora["lora_dropout"],
        "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(vlm.lora['targets'])})", "modules_to_save": whole or None,
        "inference_mode": True})
    write_model(directory, {adapter_name(name, public): t.contiguous().cpu() for name, t in state.items()}, config, "adapter_model.safetensors")


def load_adapter(vlm, directory):
    """Put what save_adapter wrote back into a model that has such a LoRA and trains the same parts, strictly."""
    file = Path(directory) / "adapter_model.safetensors"
    found, mine = open_weights(file), {adapter_name(name, public_layout(vlm)[0]): p for name, p in vlm.named_parameters() if p.requires_grad}
    if odd := found.keys() ^ mine.keys() or {name for name in mine if mine[name].shape != found[name].shape}:
        raise UserError(f"{file}: {len(odd)} tensors do not fit, such as {sorted(odd)[0]}; it was trained with other --lora or --train flags")
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(found[name])


# ---- reading and writing model directories --------------------------------------------------------------------------

# Our names -> those of the llava-hf layout, the older family that every version of transformers reads ("A"); the tower's first.
LLAVA_NAMES = [
    ("connector.row_end", "image_newline"), ("vision.", "vision_tower.vision_model."), ("connector.", "multi_modal_projector."),
    ("decoder.lm_head.", "language_model.lm_head."), ("decoder.", "language_model.model."),
]
LLAMA_NAMES = [("lm_head.", "lm_head."), ("", "model.")]                    # and of a language model alone: Vicuna, Llama-2

# Reading goes the other way. Public names -> our parts, of every layout: the first row that matches counts.
PART_NAMES = [
    # llava-hf in its four families, the original LLaVA, InternVL | Prismatic, native and in the HF layout
    (r"^(model\.)?image_newline$", "connector.row_end"),
    (r"^((model\.)?vision_tower\.(vision_tower\.)?|vision_model\.|(model\.)?vision_backbone\.(dino_)?featurizer\.)", "vision."),
    (r"^(model\.)?vision_backbone\.(siglip_|clip_|fused_)featurizer\.", "vision2."),
    (r"^(model\.)?multi_modal_projector\.", "connector."),
    (r"^mlp1\.0\.", "connector.norm."), (r"^mlp1\.1\.", "connector.linear_1."), (r"^mlp1\.3\.", "connector.linear_2."),
    (r"^([\w.]+\.)?(mm_)?projector\.(0\.|fc1\.|(?=weight|bias))", "connector.linear_1."),
    (r"^([\w.]+\.)?(mm_)?projector\.(2|fc2)\.", "connector.linear_2."), (r"^([\w.]+\.)?(mm_)?projector\.(4|fc3)\.", "connector.linear_3."),
    (r"^((model\.)?language_model\.|model\.llm_backbone\.llm\.)(model\.)?", "decoder."),
    (r"^model\.(?=embed_tokens|tok_embeddings|layers|norm)|^(?=lm_head|output\.weight)", "decoder."),
]
# InternLM2 -> Llama; its wqkv is taken apart in decoder_tensors.
INTERNLM2_NAMES = [
    ("tok_embeddings.", "embed_tokens."), ("output.", "lm_head."), (".attention.wo.", ".self_attn.o_proj."), (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."), (".feed_forward.w2.", ".mlp.down_proj."), (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
]
MAPPED = 2**27                       # bytes to read of a mapped file before it is opened anew: till then, pages once read count as ours
FILES = ("model.safetensors", "pytorch_model.bin", "checkpoints/latest-checkpoint.pt", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
         "mm_projector.bin")


def llava_name(name):
    """One of our names -> its public one, family A."""
    if name.startswith("vision."):
        return "vision_tower.vision_model." + rename(name.removeprefix("vision."), CLIP_NAMES)
    return rename(name, LLAVA_NAMES)


class Stored:
    """A tensor that still lies in its file. Its shape is known; cut(f) lets f be done to the numbers when they are read."""

    def __init__(self, file, name, meta, cuts=()):
        self.file, self.name, self.meta, self.cuts, self.shape = file, name, meta, cuts, meta.shape

    def cut(self, f):
        return Stored(self.file, self.name, f(self.meta), (*self.cuts, f))

    def of(self, tensors):
        t = tensors[self.name]
        for f in self.cuts:
            t = f(t)
        return t


def weights_file(path):
    """The file that holds the weights, or whose name with .index.json names the shards; None if there is none."""
    return path if path.is_file() else next((path / f for f in FILES if (path / f).exists() or (path / f"{f}.index.json").exists()), None)


def read_tensors(path):
    """All weights of a file, or of a directory in one file or in the shards that an index names: {public name: Stored}."""
    path = Path(path)
    file = weights_file(path)
    if file is None:
        raise UserError(f"{path / FILES[0]}: not found, nor {', '.join(FILES[1:])}; {path} is no complete model directory, copy the weights there")
    index, named = file.with_name(f"{file.name}.index.json"), {}
    if not path.is_file() and index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{index}: has no weight_map from tensors to files; copy it anew")
    tensors = {}
    for file in sorted({file.with_name(name) for name in named.values()} or [file]):
        tensors |= {name: Stored(file, name, t.to("meta")) for name, t in open_weights(file).items()}
    if lost := sorted(named.keys() - tensors.keys()):
        raise UserError(f"{index}: names {lost[0]}, but {named[lost[0]]} does not hold it; index and weights are of different models")
    return tensors


def open_weights(file):
    """{public name: tensor} of a .safetensors, .bin or .pt file, memory-mapped: nothing is read before it is touched."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}
        return flatten(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped(file)))
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {file.parent} is no complete model directory, copy the file there") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: truncated or damaged, or holds more than tensors ({str(error).splitlines()[0] if str(error) else error!r}); "
                        "copy it anew") from None


def mapped(file):
    """torch.save before 2020 wrote no zip: such a file can only be read whole."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def stored_dtype(found):
    words = found.get("decoder.embed_tokens.weight")                        # without them load_strict will say what is missing
    return torch.float32 if words is None or words.meta.dtype == torch.float64 else words.meta.dtype


def flatten(content, prefix=""):
    """Dicts in dicts, as torch.save wrote them -> {"outer.inner.name": tensor}. What is no tensor (a step counter) is left out."""
    if isinstance(content, torch.Tensor):
        return {prefix[:-1]: content.detach()}
    items = content.items() if isinstance(content, dict) else ()
    return {name: t for key, value in items for name, t in flatten(value, f"{prefix}{key}.").items()}


def load_strict(module, found, source, tensors, device="cpu", dtype=torch.float32, public=str):
    """Fill every parameter from `found` {our name: Stored}; whatever is missing, left over or of another shape is an error.

    `tensors` is all that lies in the files; what `found` leaves out of it is known to be of no use. `public` is how a missing one is called.
    Each tensor is copied out of its mapped file once, straight to its device and dtype; a table of words in pieces, as it is large.
    """
    state = module.state_dict()
    odd = {"missing": sorted(public(name) for name in state.keys() - found.keys()),
           "unused": sorted(found[name].name for name in found.keys() - state.keys())}
    if any(odd.values()):
        some = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in odd.items() if names)
        raise UserError(f"{source}: its tensors do not fit this architecture: {some}. Check config.json against the weights")
    for name, mine in state.items():
        t = found[name]
        if t.shape != mine.shape:
            raise UserError(f"{source}: tensor {t.name} has shape {tuple(t.shape)}, the config asks for {tuple(mine.shape)} "
                            f"({t.file.name}, here {name}); config and weights are of different models")
        if not t.meta.is_floating_point() or t.meta.element_size() < 2:
            raise UserError(f"{source}: tensor {t.name} is {str(t.meta.dtype).removeprefix('torch.')}; quantised weights cannot be read, "
                            "get them in float16")
    file, n_read, weights = None, 0, {}
    for name in sorted(state, key=lambda name: str(found[name].file)):
        t = found[name]
        n_bytes = t.meta.numel() * t.meta.element_size()
        n = 1 if t.cuts else 1 + 2 * n_bytes // MAPPED
        weights[name] = torch.empty(t.shape, device=device, dtype=dtype)
        for k, piece in enumerate(weights[name].tensor_split(n)):
            if t.file != file or n_read + n_bytes // n > MAPPED and mapped(file):
                opened, file, n_read = None, t.file, 0
                opened = open_weights(file)
            piece.copy_(t.of(opened).tensor_split(n)[k])
            n_read += n_bytes // n
    module.load_state_dict(weights, strict=True, assign=True)
    used = {(t.file, t.name) for t in found.values()}
    rest = [t.name for t in tensors.values() if (t.file, t.name) not in used]
    known = re.compile(r"inv_freq|position_ids|mask_token|\bhead\b|attn_pool|pooler|classifier")
    kinds = Counter((known.search(name) or [name.split(".")[0]])[0] for name in rest)
    print(f"loaded {len(tensors) - len(rest)} of {len(tensors)} tensors from {source}, 0 missing, 0 unused"
          + (f", {len(rest)} of no use here ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if rest else ""), file=sys.stderr)


def load_vision(vit, path):
    """A tower's directory or file, of any family in vision.TOWER_NAMES, into a ViT, strictly; its positions are resized to the ViT's grid."""
    tensors = read_tensors(path)
    load_strict(vit, tower_tensors(tensors, vit.cfg), path, tensors)


def load_decoder(decoder, directory):
    """A Llama, Mistral or InternLM2 directory into a decoder, strictly. Rows that our vocabulary adds (<image>, <pad>) become the mean of the old."""
    tensors, rows = read_tensors(directory), decoder.cfg.vocab_size
    found = grow_words(our_names(tensors, replace(PRESETS["toy"], decoder=decoder.cfg)), rows)
    load_strict(decoder, part_of(found, "decoder"), directory, tensors)


def grow_words(found, rows):
    """The same with more rows in both tables of words, the new ones the mean of the old."""
    grow = lambda x: torch.cat([x, x.mean(0, keepdim=True, dtype=torch.float32).to(x.dtype).expand(rows - len(x), -1)])
    tables = {name: found[name] for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight") if name in found}
    return found | {name: t.cut(grow) for name, t in tables.items() if len(t.shape) == 2 and t.shape[0] < rows}


def load_connector(connector, path):
    """The connector in a whole model, in the model.safetensors or mm_projector.bin that stage 1 wrote, here or in the original code."""
    if not Path(path).exists():
        raise UserError(f"--projector {path}: no such model; give a directory that --stage pretrain wrote, its model.safetensors, "
                        "or a mm_projector.bin")
    tensors = read_tensors(path)
    found = part_of(our_names(tensors), "connector")
    fresh = connector.row_end
    if "row_end" not in found:                                              # of a stage 1 without tiles: the row end stays as it began
        connector.row_end = None
    load_strict(connector, found, f"--projector {path}", tensors)
    connector.row_end = fresh if "row_end" not in found else connector.row_end


def our_names(tensors, cfg=None):
    """{public name: Stored} of a whole model -> {our name: Stored cut to our shapes}. With no cfg nothing is resized or taken apart."""
    parts = {"vision": {}, "vision2": {}, "decoder": {}}
    found = {}
    for name, t in tensors.items():
        if name.endswith(("inv_freq", "position_ids")):                     # computed, not learned
            continue
        ours = part_name(name)
        part, _, inner = ours.partition(".")
        parts.get(part, found)[inner if part in parts else ours] = t
    for part in "vision", "vision2":
        found |= {f"{part}.{name}": t for name, t in tower_tensors(parts[part], cfg and getattr(cfg, part)).items()}
    return found | {f"decoder.{name}": t for name, t in decoder_tensors(parts["decoder"], cfg and cfg.decoder).items()}


def part_name(name):
    """A public name with our name of its part, by PART_NAMES."""
    return next((re.sub(pattern, part, name) for pattern, part in PART_NAMES if re.search(pattern, name)), name)


def decoder_tensors(tensors, cfg=None):
    """Names of Llama, Mistral and InternLM2 without "model." -> ours. InternLM2's wqkv goes by key-value head: its queries, its key, its value."""
    found = {}
    for name, t in tensors.items():
        if ".attention.wqkv." in name and cfg and t.shape[0] == (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim:
            g = cfg.n_head // cfg.n_kv_head                                 # (H_kv, g + 2, head_dim, D): g queries, a key, a value
            for one, rows in ("q_proj", slice(g)), ("k_proj", slice(g, g + 1)), ("v_proj", slice(g + 1, None)):
                found[name.replace("attention.wqkv", f"self_attn.{one}")] = t.cut(
                    lambda x, rows=rows: x.view(cfg.n_kv_head, g + 2, cfg.head_dim, -1)[:, rows].flatten(0, 2))
        else:
            found[rename(name, INTERNLM2_NAMES)] = t
    if cfg and cfg.tied and "embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["embed_tokens.weight"])
    return found


@contextmanager
def named(path):
    """What is wrong inside is said with this path in front, if it does not begin with it anyway."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None


def read_json(path, absent=None):
    """A JSON file that holds an object -> dict. `absent`: what to return where there is no such file, if that is no error."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if absent is not None:
            return absent
        raise UserError(f"{path}: not found, so {Path(path).parent} is not a model directory; give one that holds "
                        "config.json and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not an object in braces; copy it anew")
    return found


def read_model(directory, vision=None, llm=None):
    """A directory of any layout -> VLMConfig, {our name: Stored}, {public name: Stored}, and how our names are called there."""
    directory = Path(directory)
    tensors = read_lora(directory, llm) if is_lora(directory) else None
    if llm and tensors is None:
        raise UserError(f"{directory}: is a whole model; --llm is for presets, and for the base of a LoRA")
    c = read_json(directory / "config.json")
    config_reader(c, directory / "config.json")                             # an unknown architecture is said before anything about its weights
    tensors = tensors or read_tensors(directory)
    own, paths = our_names(tensors), vision.split(",") if vision else []
    lacks = not any(name.startswith("vision.") for name in own) and any(name.startswith("decoder.") for name in own)
    if lacks and not paths:
        wanted = c.get("mm_vision_tower") or prismatic(c).get("vision_backbone_id")
        raise UserError(f"{directory}: holds no vision tower{f' (its config names {wanted})' if wanted else ''}; give the directory of that tower "
                        "by --vision DIR, two of them by --vision DIR,DIR")
    if paths and not lacks:
        raise UserError(f"{directory}: has its own vision tower; --vision is for presets ({', '.join(PRESETS)}) and for models published without")
    cfg = read_config(directory, own, [read_tower(path) for path in paths])
    found = our_names(tensors, cfg)
    for part, path in zip(("vision", "vision2"), paths):
        stored = read_tensors(path)
        found |= {f"{part}.{name}": t for name, t in tower_tensors(stored, getattr(cfg, part)).items()}
        tensors = tensors | {f"{part}: {name}": t for name, t in stored.items()}
    return cfg, found, tensors, llava_name if fits_llava(cfg) else str


def is_lora(directory):
    return (Path(directory) / "adapter_config.json").exists()


def base_of(directory, llm=None):
    """The directory of the model that a LoRA is over: --llm, or the one that adapter_config.json names, there or beside the LoRA."""
    directory = Path(directory)
    base = Path(llm or take(read_json(directory / "adapter_config.json"), "base_model_name_or_path", str, ""))
    beside = (directory / base.name, directory.parent / base.name)          # where train.py saves the base of a preset
    base = next((d for d in (base, *beside) if base.name and d.is_dir()), base)
    if not base.is_dir():
        raise UserError(f"{directory}: is a LoRA over {str(base)!r}, which is no directory here; give that model's by --llm DIR")
    return base


def tokenizer_home(directory, llm=None):
    """Where the tokenizer of a model lies: in its own directory, or, of a LoRA that was published without, in its base's."""
    own = (Path(directory) / "tokenizer.model").exists() or not is_lora(directory)
    return Path(directory) if own else base_of(directory, llm)


def read_lora(directory, llm=None):
    """What LLaVA's LoRA training writes, over its base: {public name: Stored} with W + alpha/r B A where W is read."""
    c, base = read_json(directory / "adapter_config.json"), base_of(directory, llm)
    only(c, bias="none", use_dora=False, use_rslora=False, fan_in_fan_out=False)
    scale = take(c, "lora_alpha", float) / take(c, "r", int)
    file = next((directory / f for f in ("adapter_model.safetensors", "adapter_model.bin") if (directory / f).exists()), None)
    rest = directory / "non_lora_trainables.bin"
    if file is None:
        raise UserError(f"{directory / 'adapter_model.safetensors'}: not found, nor adapter_model.bin; copy the LoRA anew")
    short = lambda name: re.sub(r"^base_model\.(model\.(?=model\.|lm_head))?", "", name)
    tensors = read_tensors(base) | ({short(name): t for name, t in read_tensors(rest).items()} if rest.exists() else {})
    lora, names, used = {part_name(short(name)): (name, t) for name, t in open_weights(file).items()}, {part_name(name): name for name in tensors}, 0
    for ours, (name, a) in lora.items():
        weight, other = names.get(ours.replace(".lora_A.", ".")), lora.get(ours.replace(".lora_A.", ".lora_B."))
        if ours in names:                                                   # trained whole beside it: PEFT's modules_to_save
            tensors[names[ours]] = Stored(file, name, a.to("meta"))
            used += 1
        elif weight and other and ".lora_A." in ours:
            b = other[1]
            if (len(b), a.shape[1]) != tuple(tensors[weight].shape) or len(a) != b.shape[1]:
                raise UserError(f"{file}: the LoRA of {weight} has shapes {tuple(a.shape)} and {tuple(b.shape)}, the base's tensor is "
                                f"{tuple(tensors[weight].shape)}; it was trained over another model")
            tensors[weight] = tensors[weight].cut(lambda w, a=a, b=b: w if w.is_meta else w.float() + scale * b.float() @ a.float())
            used += 2
    if used != len(lora):
        raise UserError(f"{file}: {len(lora) - used} of its {len(lora)} tensors belong to nothing in {base}; it was trained over another model")
    return tensors


def read_tower(path):
    """A tower's directory or file -> VisionConfig: from its config.json, or from the shapes if it is timm's, open_clip's or OpenAI's."""
    path = Path(path)
    clip = read_json(path / "open_clip_config.json", {})
    c = read_json(path / "config.json", {} if path.is_file() or clip else None)
    with named(path):
        if "model_type" not in c and "vision_config" not in c:
            return tower_by_shapes(tower_tensors(read_tensors(path)), quick_gelu=take(clip, "model_cfg", dict, {}).get("quick_gelu", True))
        return vision_config(c, read_processor(path))


def read_config(directory, own={}, towers=()):
    """config.json (and preprocessor_config.json) of any layout -> VLMConfig. Absent fields mean the defaults of the code it was written by.

    `own`: the model's tensors under our names, whose shapes say what some layouts leave unsaid; `towers`: VisionConfigs given from outside.
    """
    file = Path(directory) / "config.json"
    c, prep = read_json(file), read_processor(file.parent)
    with named(file):
        return config_reader(c, file)(c, prep, own, towers)


def read_processor(folder):
    """How pictures were cut and normalised: preprocessor_config.json, or what transformers 5 writes in its stead. Empty where neither is."""
    file = folder / "processor_config.json"
    with named(file):
        inner = take(read_json(file, {}), "image_processor", dict, {})
    return read_json(folder / "preprocessor_config.json", inner)


def config_reader(c, file=None):
    """Which layout a config.json is of -> the function that reads it. Of a tower or a decoder alone: None, or an error that names `file`."""
    if prismatic(c) is not c or c.get("model_type") in ("prismatic", "openvla"):
        return prismatic_config
    if "mm_hidden_size" in c or "mm_vision_tower" in c:
        return original_llava_config
    readers = {"llava": llava_hf_config, "llava_next": llava_hf_config, "internvl_chat": internvl_config, "plainvlm": own_config}
    if file and c.get("model_type") not in readers:
        raise UserError(f"{file}: model_type is {c.get('model_type')!r}; only {', '.join(map(repr, readers))}, the original LLaVA and Prismatic can "
                        "be opened. A language model alone goes to --llm, a tower to --vision")
    return readers.get(c.get("model_type"))


def prismatic(c):
    """Where a config of Prismatic's has its fields: in "model", or in the HF layout at the top."""
    return c["model"] if isinstance(c.get("model"), dict) else c


def llava_hf_config(c, prep, own, towers):
    only(c, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    only(take(c, "vision_config", dict), model_type="clip_vision_model")
    vision = replace(vision_config(c, prep), feature_layer=take(c, "vision_feature_layer", int, -2))
    image = take(c, "image_token_id" if "image_token_id" in c else "image_token_index", int, 32000)
    mode, tiling = picture_mode(c, vision.image_size, "crop" if prep.get("do_center_crop") and not prep.get("do_pad") else "pad")
    return VLMConfig(replace(vision, tiling=tiling), decoder_config(take(c, "text_config", dict)), take(c, "mm_projector_type", str, "mlp2x_gelu"),
                     image, take(c, "pad_token_id", int, image + 1), take(c, "bos_token_id", int, 1), take(c, "eos_token_id", int, 2),
                     mode, take({"template": default_template(c | {"mm_projector_type": "mlp"})}, "template", str))


def original_llava_config(c, prep, own, towers):
    """liuhaotian/llava-*: a Llama's config with the fields mm_*. Its table may end before <image>, which the code puts behind it."""
    only(c, mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False)
    tower = towers[0] if towers else tower_by_shapes(part_of(own, "vision")) if own else VisionConfig()
    mode, tiling = picture_mode(c, tower.image_size)
    tower = replace(tower, feature_layer=take(c, "mm_vision_select_layer", int, -2), tiling=tiling)
    return VLMConfig(tower, decoder_config(c | {"model_type": "llama"}), take(c, "mm_projector_type", str, "linear"), image_mode=mode,
                     template=default_template(c))


def prismatic_config(c, prep, own, towers):
    """TRI-ML/prismatic-vlms name their parts; the sizes are in the tensors. Every tower runs with the exact GELU except CLIP alone."""
    c = prismatic(c)
    tower_id, arch, llm = (take(c, name, str) for name in ("vision_backbone_id", "arch_specifier", "llm_backbone_id"))
    if not llm.startswith(("vicuna", "llama2", "mistral")):
        raise UserError(f"llm_backbone_id is {llm!r}; only vicuna, llama2 and mistral are implemented")
    if not own:
        raise UserError("its sizes are in its weights, which are not here")
    px = re.search(r"(\d+)px", tower_id)
    towers = list(towers) or [tower_by_shapes(part_of(own, part)) for part in ("vision", "vision2") if part_of(own, part)]
    fused = "dinosiglip" in tower_id or "dinoclip" in tower_id
    if len(towers) != 1 + fused:
        takes = "two towers, DINOv2 first: --vision DIR,DIR" if fused else "one tower: --vision DIR"
        raise UserError(f"vision_backbone_id {tower_id!r} takes {takes}")
    towers = [replace(t, image_size=int(px[1]) if px else 224, feature_layer=-2, activation="quick_gelu" if t.pre_norm and not fused else "gelu")
              for t in towers]
    connector = "linear" if arch == "linear" else "fused_gelu" if arch.endswith("fused-gelu-mlp") else "mlp2x_gelu"
    modes = {"letterbox": "letterbox", "resize-naive": "resize", "resize-crop": "crop"}
    mode = take(c, "image_resize_strategy", str)
    if mode not in modes:
        raise UserError(f"image_resize_strategy is {mode!r}; known are {', '.join(modes)}")
    t = {name: tensor.shape for name, tensor in part_of(own, "decoder").items()}
    if not {"embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight"} <= t.keys():
        raise UserError("its checkpoint holds no language model; after the align stage it has only a connector, which goes to --projector")
    V, D = t["embed_tokens.weight"]
    decoder = DecoderConfig(V, 1 + max(int(name.split(".")[1]) for name in t if name.startswith("layers.")), D // 128,
                            t["layers.0.self_attn.k_proj.weight"][0] // 128, D, 128, t["layers.0.mlp.gate_proj.weight"][0])
    return VLMConfig(towers[0], decoder, connector, image_token=32001, pad_token=32000, image_mode=modes[mode], template=default_template(c),
                     vision2=towers[1] if fused else None)


def internvl_config(c, prep, own, towers):
    """OpenGVLab/InternVL2.5-*. <IMG_CONTEXT> is the third of the nine tokens at the end of the table; absent fields: one tile, squashed."""
    only(c, ps_version="v2", downsample_ratio=0.5)
    decoder = decoder_config(take(c, "llm_config", dict))
    tower = replace(vision_config(c), feature_layer=take(c, "select_layer", int, -1), merge=2)
    mode, tiling = picture_mode(c, tower.image_size)
    tower = replace(tower, image_size=take(c, "force_image_size", int, tower.image_size), tiling=tiling)
    return VLMConfig(tower, decoder, "norm_gelu", decoder.vocab_size - 7, pad_token=2, image_mode=mode, template=default_template(c))


def own_config(c, prep, own, towers):
    try:
        tower = lambda v: v and VisionConfig(**v | {"mean": tuple(v["mean"]), "std": tuple(v["std"])})
        parts = {"vision": tower(c["vision"]), "vision2": tower(c["vision2"]), "decoder": DecoderConfig(**c["decoder"])}
        return VLMConfig(**{k: v for k, v in c.items() if k not in ("model_type", "dtype")} | parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"is not what save_pretrained writes ({error}); copy it anew") from None


def part_of(own, part):
    return {name.removeprefix(part + "."): t for name, t in own.items() if name.startswith(part + ".")}


def fits_llava(cfg):
    """Whether the llava-hf layout can hold the model: a CLIP, a Llama, one of LLaVA's two connectors, and one tile, or several as LLaVA-NeXT
    cuts them."""
    v, clip, tiling = cfg.vision, TOWERS["clip_vision_model"], cfg.tiling
    several = tiling and (replace(tiling, grids=TILINGS["anyres"].grids) != TILINGS["anyres"] or cfg.connector != "mlp2x_gelu")
    return (not cfg.vision2 and not several and cfg.connector in ("linear", "mlp2x_gelu")
            and all(getattr(v, name) == getattr(clip, name) for name in ("class_token", "n_register", "pre_norm", "patch_bias", "layer_scale",
                                                                         "final_norm", "rms_norm", "merge")))


# Absent fields of a tower's config mean these: the defaults of its class in transformers, InternViT's in its own code.
TOWERS = {
    "clip_vision_model": VisionConfig(224, 32, 768, 12, 12, 3072),
    "siglip_vision_model": VisionConfig(224, 16, 768, 12, 12, 3072, "gelu_tanh", 1e-6, False, 0, False, True, mean=HALF, std=HALF),
    "dinov2": VisionConfig(224, 14, 768, 12, 12, 3072, "gelu", 1e-6, True, 0, False, True, True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "dinov2_with_registers": VisionConfig(224, 16, 768, 12, 12, 3072, "gelu", 1e-6, True, 4, False, True, True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "vit": VisionConfig(224, 16, 768, 12, 12, 3072, "gelu", 1e-12, True, 0, False, True, mean=HALF, std=HALF),
    "intern_vit_6b": VisionConfig(224, 14, 3200, 48, 25, 12800, "gelu", 1e-6, True, 0, False, True, True, False, True, feature_layer=-1,
                                  mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


CLIP_FIELDS = {"image_size": "image_size", "patch_size": "patch_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
               "n_head": "num_attention_heads", "n_hidden": "intermediate_size", "activation": "hidden_act", "norm_eps": "layer_norm_eps"}
# Of a language model's config, absent fields mean the defaults of its class; and of both, what the fields are called there.
LANGUAGE = {
    "llama": DecoderConfig(block_size=2048, norm_eps=1e-6),
    "mistral": DecoderConfig(n_kv_head=8, n_hidden=14336, block_size=4096 * 32, norm_eps=1e-6),
    "internlm2": DecoderConfig(vocab_size=103168, block_size=2048, norm_eps=1e-6),
}
LLAMA_FIELDS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
                "n_embd": "hidden_size", "head_dim": "head_dim", "n_hidden": "intermediate_size", "block_size": "max_position_embeddings",
                "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}


def take_fields(c, names, absent):
    """{our name: value} of a public config's fields; `absent`: {our name: what it is where it is not said}."""
    return {ours: take(c, theirs, type(absent[ours]), absent[ours]) for ours, theirs in names.items()}


def vision_config(c, prep={}):
    """config.json of a tower, alone or inside that of a larger model, and of its image processor -> VisionConfig."""
    inner = take(c, "vision_config", dict, None if "llm_config" in c else c)
    kind = inner.get("model_type") or c.get("model_type") or "clip"
    kind = {"siglip": "siglip_vision_model"}.get(kind, "clip_vision_model" if kind in ("clip", "llava", "llava_next") else kind)
    if kind not in TOWERS:
        raise UserError(f"model_type is {kind!r}; only {', '.join(map(repr, TOWERS))} are implemented")
    base, intern = TOWERS[kind], kind == "intern_vit_6b"
    only(inner, use_swiglu_ffn=False, qkv_bias=not intern or inner.get("norm_type") == "layer_norm")
    rms = intern and inner.get("norm_type", "rms_norm") == "rms_norm"
    if intern and inner.get("qk_normalization", True) != rms:
        raise UserError(f"qk_normalization is {not rms} with norm_type {inner.get('norm_type')!r}; only 300M (neither) and 6B (both) are implemented")
    found = take_fields(inner, CLIP_FIELDS, vars(base))
    if kind.startswith("dinov2"):
        found["n_hidden"] = found["n_embd"] * take(inner, "mlp_ratio", int, 4)
        found["n_register"] = base.n_register and take(inner, "num_register_tokens", int, base.n_register)
    found["activation"] = {"gelu_pytorch_tanh": "gelu_tanh"}.get(found["activation"], found["activation"])
    return replace(base, **found, rms_norm=rms, mean=take(prep, "image_mean", tuple, base.mean), std=take(prep, "image_std", tuple, base.std))


def clip_json(v):
    return {"model_type": "clip_vision_model", "projection_dim": v.n_embd} | {theirs: getattr(v, ours) for ours, theirs in CLIP_FIELDS.items()}


def decoder_config(c):
    """config.json of a Llama, Mistral or InternLM2 -> DecoderConfig."""
    kind = c.get("model_type", "llama")
    if kind not in LANGUAGE:
        raise UserError(f"model_type is {kind!r}; only 'llama', 'mistral' and 'internlm2' are implemented")
    only(c, hidden_act="silu", attention_bias=False, mlp_bias=False, bias=False)
    rope = take(c, "rope_parameters", dict, {}) | take(c, "rope_scaling", dict, {})
    if "dynamic" not in rope.values():                                      # which changes nothing up to max_position_embeddings
        only(rope, rope_type="default", type="default")
    absent, n_head = vars(LANGUAGE[kind]), take(c, "num_attention_heads", int, 32)
    absent = absent | {"n_kv_head": 8 if kind == "mistral" else n_head, "head_dim": take(c, "hidden_size", int, 4096) // n_head}
    found = take_fields(c, LLAMA_FIELDS, absent)
    window = c.get("sliding_window", 4096) if kind == "mistral" else None   # null: none, as in Mistral v0.2
    return DecoderConfig(**found | {"block_size": min(found["block_size"], window or found["block_size"]),
                                    "rope_theta": take(rope, "rope_theta", float, found["rope_theta"])}, tied=c.get("tie_word_embeddings") is True)


def llama_json(d):
    return {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | {
        theirs: getattr(d, ours) for ours, theirs in LLAMA_FIELDS.items()}


def take(c, name, kind, default=None):
    """A field of a config, of the right kind and, where it counts something, above zero. Absent and null both mean the default."""
    value = default if c.get(name) is None else c[name]
    if kind is tuple and isinstance(value, list):
        value = tuple(value) if len(value) == 3 and all(isinstance(v, (int, float)) for v in value) else None
    right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if right and kind in (int, float) and name not in ("vision_feature_layer", "mm_vision_select_layer", "select_layer"):
        right = value >= (0 if name.endswith("_id") else 1 if kind is int else 1e-30)
    if not right:
        what = {int: "a whole number", float: "a number above 0", dict: "an object", str: "a text", tuple: "three numbers", list: "a list"}[kind]
        raise UserError(f"{name} is {'missing' if name not in c else repr(c[name])}; it must be {what}. Copy the file anew")
    return value


def only(c, **supported):
    """Refuse what would be computed wrongly: fields that, where present, have just one value we implement."""
    for name, value in supported.items():
        if c.get(name) not in (None, value):
            raise UserError(f"{name} is {c[name]!r}; only {value!r} is implemented")


def llava_config(cfg, dtype):
    kind = ("LlavaForConditionalGeneration", "llava") if cfg.tiling is None else ("LlavaNextForConditionalGeneration", "llava_next")
    return {"architectures": [kind[0]], "model_type": kind[1], "dtype": dtype, "vision_config": clip_json(cfg.vision),
            "text_config": llama_json(cfg.decoder), "image_token_index": cfg.image_token, "pad_token_id": cfg.pad_token,
            "bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token, "ignore_index": IGNORE, "image_seq_length": cfg.vision.n_token,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": cfg.vision.feature_layer, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
            "mm_projector_type": cfg.connector, "image_aspect_ratio": cfg.image_mode, "template": cfg.template} | pinpoints(cfg)


def pinpoints(cfg):
    """The grids of tiles in pixels, which transformers reads as (height, width)."""
    S = cfg.vision.image_size
    return {"image_grid_pinpoints": [[r * S, c * S] for c, r in cfg.tiling.grids]} if cfg.tiling else {}


def check_tokenizer(vlm, tok):
    """A tokenizer and a model that do not belong together would fail deep inside, or not at all."""
    if tok.n_text > vlm.cfg.decoder.vocab_size or tok.image != vlm.cfg.image_token:
        raise UserError(f"{tok.path}: has {tok.n_text:,} pieces and <image> at {tok.image:,}, the model an embedding of "
                        f"{vlm.cfg.decoder.vocab_size:,} rows and <image> at {vlm.cfg.image_token:,}; they are of different models")


def check_image_mode(vlm, mode, directory):
    tiling = find_tiling(vlm.cfg.vision, mode)
    if tiling and tiling.row_end and vlm.connector.row_end is None:
        raise UserError(f"--image-mode {mode}: {directory} has never learned how the rows of several tiles end; finetune it with this mode first")


def save_processor(directory, tokenizer_file, cfg):
    """What transformers' AutoProcessor wants beside the weights: the tokenizer with its two added tokens, and the picture's way in.

    It knows no letterbox, which differs from pad by a pixel at most, and none of our own tilings: with those no way in is written.
    """
    S, directory = cfg.vision.image_size, Path(directory)
    short = ("LlavaImageProcessor", {"shortest_edge": S}, True)             # class, size, whether the middle is cut out
    kind, size, crop = {"crop": ("CLIPImageProcessor", *short[1:]), "resize": ("CLIPImageProcessor", {"height": S, "width": S}, False),
                        "anyres": ("LlavaNextImageProcessor", *short[1:])}.get(cfg.image_mode, short)
    llava = {"processor_class": "LlavaNextProcessor" if cfg.tiling else "LlavaProcessor"}
    special = {"bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token, "pad_token_id": cfg.pad_token}
    names = {cfg.image_token: "<image>"} | ({cfg.pad_token: "<pad>"} if cfg.pad_token != cfg.eos_token else {})
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer_file, cfg), indent=None)
    write_json(directory / "tokenizer_config.json", llava | {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "added_tokens_decoder": {str(i): added_token(name) for i, name in names.items()},
        "extra_special_tokens": {"image_token": "<image>"}, "model_max_length": cfg.decoder.block_size, "clean_up_tokenization_spaces": False,
        "padding_side": "left"})
    write_json(directory / "generation_config.json", special | {"suppress_tokens": list(range(cfg.image_token, cfg.decoder.vocab_size))})
    if not cfg.tiling or fits_llava(cfg):
        write_json(directory / "preprocessor_config.json", llava | pinpoints(cfg) | {
            "image_processor_type": kind, "do_pad": kind != "CLIPImageProcessor", "do_resize": True, "size": size, "resample": 3,
            "do_center_crop": crop, "crop_size": {"height": S, "width": S}, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(cfg.vision.mean), "image_std": list(cfg.vision.std)})
        write_json(directory / "processor_config.json", llava | {
            "patch_size": cfg.vision.patch_size, "image_token": "<image>", "num_additional_image_tokens": cfg.vision.n_prefix,
            "vision_feature_select_strategy": "default"})
    write_whole(directory / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))


def added_token(name):
    return {"content": name, "special": True, "normalized": name == "</s>", "lstrip": False, "rstrip": False, "single_word": False}


def tokenizer_json(file, cfg):
    """A sentencepiece BPE model in the words of Hugging Face's tokenizers, such that its ids are those of data.encode_prompt.

    A stretch of text gets a space in front, also after <image>, but not after </s>: that one is looked for after the spaces are set.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    words = sorted((w for w, i in ids.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))), key=lambda w: -sp.get_score(ids[w]))
    merges = [[w[:k], w[k:]] for w in words for k in range(1, len(w)) if w[:k] in ids and w[k:] in ids]     # the best word is joined first
    special = {"<unk>": sp.unk_id(), "<s>": cfg.bos_token, "</s>": cfg.eos_token, "<image>": cfg.image_token, "<pad>": cfg.pad_token}
    replace_by = lambda kind, old, new: {"type": "Replace", "pattern": {kind: old}, "content": new}
    sequence = lambda id, type_id: {"Sequence": {"id": id, "type_id": type_id}}
    return {"version": "1.0", "added_tokens": [{"id": i} | added_token(name) for name, i in special.items()],
            "normalizer": {"type": "Sequence", "normalizers": [replace_by("Regex", r"\A(?!</s>)", "▁"), replace_by("String", " ", "▁")]},
            "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [cfg.bos_token], "tokens": ["<s>"]}},
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence("A", 0)],
                               "pair": [sequence("A", 0), sequence("B", 1)]},
            "decoder": {"type": "Sequence", "decoders": [replace_by("String", "▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                                                         {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": merges}}


def write_model(directory, tensors, config, file="model.safetensors"):
    """The weights, then config.json: a directory with a config is a whole model."""
    write_whole(Path(directory) / file, lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
    write_json(Path(directory) / "config.json", config)


def write_json(path, content, indent=2):
    write_whole(path, lambda tmp: tmp.write_text(json.dumps(content, indent=indent)))


def write_whole(path, write):
    """Call write(temporary path beside `path`), bring it to the disk, then rename: a reader finds the old file or the new, never a part."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: this folder cannot be made ({error.strerror}); choose another --out") from None
    try:
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError, RuntimeError) as error:               # torch.save and safetensors wrap a full disk in their own
        raise UserError(f"{path}: could not be written ({error}); free some space or choose another --out. What was there is untouched") from None
    finally:
        tmp.unlink(missing_ok=True)


# ---- the program ----------------------------------------------------------------------------------------------------

def main(argv=None):
    cli = argparse.ArgumentParser(description="Turn public weights into safetensors, or say what a model is made of.")
    commands = cli.add_subparsers(dest="command", required=True)
    convert_cli = commands.add_parser("convert", help=".bin and .pt to safetensors; a whole model to the llava-hf layout where that can hold it")
    convert_cli.add_argument("src", help="directory or file to read")
    convert_cli.add_argument("out", metavar="DIR", help="directory to write")
    info_cli = commands.add_parser("info", help="parts, parameters, visual tokens, memory; reads no weights")
    info_cli.add_argument("model", metavar="DIR|PRESET")
    for command in convert_cli, info_cli:
        command.add_argument("--vision", metavar="DIR[,DIR]", help="tower of a model published without")
        command.add_argument("--llm", metavar="DIR", help="base of a LoRA; convert takes its tokenizer.model where SRC has none")
    args = cli.parse_args(argv)
    try:
        info(args.model, args.vision, args.llm) if args.command == "info" else convert(Path(args.src), Path(args.out), args.vision, args.llm)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def whole(path):
    """Whether a directory holds a vision-language model, and no tower or decoder alone."""
    return is_lora(path) or config_reader(read_json(path / "config.json", {})) is not None


def convert(src, out, vision=None, llm=None):
    if out.exists() and out.resolve() == (src if src.is_dir() else src.parent).resolve():
        raise UserError(f"{out}: is where the weights are read from; choose another directory to write")
    if not whole(src):                                                      # its names stay, only the files change
        files = sorted({t.file for t in read_tensors(src).values()})
        tensors = {name: t.contiguous().clone() for file in files for name, t in open_weights(file).items() if not name.endswith("inv_freq")}
        for file in src.glob("*") if src.is_dir() else ():
            if file.suffix == ".json" and ".index." not in file.name and file.name != "config.json" or file.name == "tokenizer.model":
                write_whole(out / file.name, lambda tmp: shutil.copyfile(file, tmp))
        write_model(out, tensors, read_json(src / "config.json", {}))
        print(f"{out}: {len(tensors)} tensors under their own names")
        return
    lora = is_lora(src)
    cfg, found, tensors, public = read_model(src, vision, llm if lora else None)
    dtype = stored_dtype(found)
    rows = max(cfg.image_token, cfg.pad_token) + 1
    if cfg.decoder.vocab_size < rows:                                       # llava-hf has rows for <image> and <pad>, the original has none
        cfg.decoder.vocab_size = -(-rows // 64) * 64
        found = grow_words(found, cfg.decoder.vocab_size)
    with torch.device("meta"):
        vlm = VLM(cfg)
    load_strict(vlm, found, src, tensors, dtype=dtype, public=public)
    tokenizer = next((Path(d) / "tokenizer.model" for d in (src, llm or lora and base_of(src)) if d and (Path(d) / "tokenizer.model").exists()), None)
    if tokenizer:
        save_processor(out, tokenizer, cfg)
    vlm.save_pretrained(out)
    print(f"{out}: in {'the llava-hf layout' if fits_llava(cfg) else 'our own layout, since no public one of ours holds this model'}"
          + ("" if tokenizer else f"; {src} has no tokenizer.model, put one beside it"))


def info(name, vision=None, llm=None):
    folder = Path(name)
    if name in PRESETS:
        cfg = PRESETS[name]
    elif not folder.is_dir():
        raise UserError(f"{name}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")
    elif whole(folder):                                                     # of a config without weights what it says is told
        cfg = read_model(folder, vision, llm)[0] if weights_file(folder) or is_lora(folder) else read_config(folder)
    else:
        c = read_json(folder / "config.json", {})
        cfg = decoder_config(c) if c.get("model_type") in ("llama", "mistral", "internlm2") else read_tower(folder)
    with torch.device("meta"):
        parts = {"decoder": Decoder(cfg)} if isinstance(cfg, DecoderConfig) else {"vision": ViT(cfg)} if isinstance(cfg, VisionConfig) else dict(
            VLM(cfg).named_children())
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    for part, n in count.items():
        c = getattr(cfg, part, cfg)                                         # a tower or decoder alone is its own part
        print(f"{part:10} {n:>16,} parameters   " + (c if isinstance(c, str) else ", ".join(
            f"{key} {value}" for key, value in asdict(c).items() if key not in ("mean", "std", "tiling"))))
    total, trained = sum(count.values()), sum(n for part, n in count.items() if not part.startswith("vision"))
    print(f"{'total':10} {total:>16,} parameters")
    if "connector" in count:
        grids = cfg.tiling and f" of up to {max(map(math.prod, cfg.tiling.grids))} tiles, global view {cfg.tiling.global_view}"
        print(f"pictures   {cfg.vision.n_token} visual tokens for a tile of {cfg.vision.image_size} px, mode {cfg.image_mode}{grids or ''}, "
              f"template {cfg.template}")
        said = "image_aspect_ratio" in read_json(folder / "config.json", {})
        if cfg.image_mode == "crop" and read_processor(folder).get("do_center_crop") and not said:
            print("           crop because its image processor is set so; LLaVA-1.5 itself was trained with pad: --image-mode pad")
    GB = 1e9                                                                # training: float32 weight, gradient and two Adam moments
    print(f"memory     {2 * total / GB:.2f} GB in bfloat16; to train all but the towers {(16 * trained + 4 * (total - trained)) / GB:.2f} GB "
          "(float32, Adam), and activations")


if __name__ == "__main__":
    sys.exit(main())
