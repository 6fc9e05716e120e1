"""The vision-language model: a ViT looks, a connector translates, a Llama-style decoder reads and writes
(arXiv:2310.03744).

    pixels     --ViT--> features of patches --connector--> visual tokens, as wide as the embeddings of text
    tokens     --embed--> embeddings, of which visual tokens replace those at the image-token positions
    embeddings --decoder--> hidden states --lm_head--> logits of the next token

The decoder is Llama's (arXiv:2302.13971): norms before each branch, rotary positions, no biases.

    vlm    = VLM.from_pretrained(DIR)       # LLaVA in both its layouts and as a LoRA, Prismatic, InternVL2.5
    logits = vlm(tokens, pixels)            # (B, T) int64, (n, 3, S, S) -> (B, T, V)
    loss   = vlm(tokens, pixels, labels)    # the mean over the supervised tokens
    ids    = vlm.generate(tokens, pixels, max_new_tokens=64)
    vlm.save_pretrained(DIR)                # transformers opens it, if its tower is a CLIP

Flags call the decoder llm, the tower vision, and a connector's file projector.
Letters: B rows of a batch, T tokens of a row, n tiles of all pictures, S pixels a side of a tile, N features
of a tile, D_f channels of a feature, M visual tokens of all pictures, K wanted positions of all B T,
D channels of the decoder, H heads, d channels of a head, V tokens of the vocabulary.

Rows are padded on the right: under a causal mask no token ever sees the padding behind it, so no mask is
needed. Only the answers to a batch come behind padding, which stream masks. Where this departs from the
originals:
  - the last block of a tower whose features are taken before it is not run;
  - a head that shares its table with the embedding is a copy of it from the moment it is loaded;
  - Mistral's sliding window is not implemented: the longest sequence is one window, in which nothing slides;
  - InternLM2's positions are not stretched beyond its own longest sequence.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.cache import prefill
from support.cli import UserError
from support.log_probs import token_log_probs
from vision import VisionConfig, ViT, find_tiling

IGNORE = -100                        # the label of a token that is not supervised

# ---- configs ----


@dataclass
class DecoderConfig:
    vocab_size: int = 32000          # V, entries of the embedding table
    n_layer: int = 32
    n_head: int = 32                 # H
    n_kv_head: int = 32              # grouped-query attention: each serves n_head / n_kv_head query heads
    n_embd: int = 4096               # D
    head_dim: int = 128              # d
    n_hidden: int = 11008            # width of SwiGLU
    block_size: int = 4096           # longest sequence
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    head_from_embedding: bool = False  # the file has no head of its own: it starts as a copy of the embedding

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} query heads cannot share {self.n_kv_head} key-value heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"rotary positions turn channels in pairs; a head cannot have {self.head_dim}")


class ConnectorKind(NamedTuple):
    n_linear: int                    # linear layers; between two stands a GELU
    norm: bool = False               # a LayerNorm before them
    widening: int = 0                # the first is so many times as wide as its input; 0: D wide, as the rest


CONNECTORS = {
    "linear": ConnectorKind(1),                                             # LLaVA v1
    "mlp2x_gelu": ConnectorKind(2),                                         # LLaVA-1.5
    "norm_gelu": ConnectorKind(2, norm=True),                               # InternVL
    "fused_gelu": ConnectorKind(3, widening=4),                             # Prismatic
}


@dataclass
class VLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    connector: str = "mlp2x_gelu"    # one of CONNECTORS
    image_token: int = 32000         # stands for one visual token
    pad_token: int = 32001
    bos_token: int = 1
    eos_token: int = 2
    image_mode: str = "pad"          # how a picture becomes tiles: one of vision.MODES
    template: str = "vicuna_v1"      # how a conversation becomes one text: one of conversation.TEMPLATES
    vision2: VisionConfig | None = None  # Prismatic: a second tower, whose features stand beside the first's

    def __post_init__(self):
        if self.connector not in CONNECTORS:
            raise UserError(f"connector {self.connector!r} is unknown; choose one of {', '.join(CONNECTORS)}")
        if self.vision2:
            first = self.vision.image_size, self.vision.n_token
            second = self.vision2.image_size, self.vision2.n_token
            if first != second:
                raise UserError(f"two towers need the same pixels and visual tokens; {first} is not {second}")
        if self.image_token <= max(self.bos_token, self.eos_token):
            raise UserError(f"image token {self.image_token} lies among the words; it must come after them")
        find_tiling(self.vision, self.image_mode)  # an unknown mode is an error here

    @property
    def tiling(self):
        """How a picture is cut; None where it is one tile."""
        return find_tiling(self.vision, self.image_mode)

    @property
    def feature_width(self):
        """D_f, channels of a feature, of both towers together."""
        return self.vision.feature_width + (self.vision2.feature_width if self.vision2 else 0)

    @property
    def ends_rows(self):
        """Whether a learned embedding ends each row of a picture's visual tokens."""
        return self.tiling is not None and not self.tiling.by_tile

    @property
    def never_generated(self):
        """The ids that no answer may have."""
        # InternVL (the family that pads with </s>) has control tokens after <image>; only <image> is
        # forbidden. Others: everything from the first of <image>, <pad> on.
        if self.pad_token == self.eos_token:
            return slice(self.image_token, self.image_token + 1)
        return slice(min(self.image_token, self.pad_token), None)


# Sizes only: vocab_size and the ids become those of the tokenizer that a run is given.
# toy: its tower and decoder are in assets/, made by lab/. 64 visual tokens a picture.
TOY_TOWER = VisionConfig(image_size=96, patch_size=12, n_embd=128, n_layer=5, n_head=4, n_hidden=512)
TOY_DECODER = DecoderConfig(
    vocab_size=960, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024
)
# photo: from random weights, for your own pictures (README). Four visual tokens, one each for --four photos.
PHOTO_TOWER = replace(TOY_TOWER, image_size=64, patch_size=16, n_layer=4, feature_layer=-1, merge=2)
TOWER_224 = VisionConfig(image_size=224)
VICUNA_7B = DecoderConfig(vocab_size=32064)
VICUNA_13B = DecoderConfig(vocab_size=32064, n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, n_hidden=13824)

PRESETS = {
    "toy": VLMConfig(TOY_TOWER, TOY_DECODER),
    "photo": VLMConfig(PHOTO_TOWER, replace(TOY_DECODER, n_layer=3), template="prism_pure"),
    "llava-1.5-7b": VLMConfig(decoder=VICUNA_7B),
    "llava-1.5-13b": VLMConfig(decoder=VICUNA_13B),
    "llava-1.5-hd-7b": VLMConfig(TOWER_224, VICUNA_7B, image_mode="hd"),  # never released: the paper's A.1
    "llava-v1-7b": VLMConfig(TOWER_224, VICUNA_7B, "linear", image_mode="crop", template="llava_v0"),
}


# ---- the model ----


class VLM(nn.Module):
    lora = None                      # what support.lora.add_lora was asked for

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = ViT(cfg.vision)
        if cfg.vision2:
            self.vision2 = ViT(cfg.vision2)
        self.connector = Connector(cfg)
        self.decoder = Decoder(cfg.decoder)

    def forward(self, tokens, pixels=None, labels=None, layout=None):
        """(B, T) int64, (n, 3, S, S) -> logits (B, T, V); with labels (B, T) -> their loss, a scalar.

        A picture is a run of image tokens, one for each of its visual tokens.
        layout (M, 2): of which tile each visual token is, and at which place in it (vision.py), so that two
        runs can show one picture. Without it the runs show all of each tile, in order.
        labels stand under their own token, not shifted; IGNORE where it is not supervised. The loss is the
        mean over the others of - log p(token | tokens before it), Eq. 3 of arXiv:2304.08485v2.
        """
        x = self.embed(tokens, self.features(pixels), layout)               # (B, T, D)
        if labels is None:
            return self.decoder.lm_head(self.decoder(x))                    # (B, T, V)

        # Position t predicts token t + 1, and only those that predict a supervised one go on to the head.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()      # (B T,)
        wanted = (targets != IGNORE).nonzero()[:, 0]                        # (K,)
        if len(wanted) == 0:
            raise ValueError("no supervised token in the batch, so no loss; see python -m tools.show check")
        h = self.decoder(x, wanted=wanted)                                  # (K, D)
        # Cross-entropy, F.cross_entropy(self.decoder.lm_head(h), targets[wanted]), in less memory.
        return -token_log_probs(h, self.decoder.lm_head.weight, targets[wanted]).mean()

    @property
    def device(self):
        return self.decoder.lm_head.weight.device

    @property
    def towers(self):
        return [self.vision, self.vision2] if self.cfg.vision2 else [self.vision]

    def features(self, pixels):
        """Tiles (n, 3, S, S) -> features (n, N, D_f) of all towers. None where there is no picture."""
        if pixels is None or len(pixels) == 0:
            return None
        return torch.cat([tower(pixels) for tower in self.towers], dim=-1)

    def embed(self, tokens, features=None, layout=None):
        """Embed the tokens (B, T) -> (B, T, D). The connector turns features (n, N, D_f) into M visual
        tokens, which replace the embeddings at the M image-token positions."""
        # The ids of <image> and <pad> may lie outside the table (32000 and 32001 with LLaVA's own): look up
        # row 0. The embedding is replaced, or never seen.
        is_image = tokens == self.cfg.image_token                           # (B, T)
        no_row = is_image
        if self.cfg.pad_token >= self.cfg.decoder.vocab_size:
            no_row = no_row | (tokens == self.cfg.pad_token)
        x = self.decoder.embed_tokens(tokens.masked_fill(no_row, 0))        # (B, T, D)

        visual = x.new_empty(0, x.shape[-1])                                # (M, D)
        if features is not None:
            visual = self.connector(features, layout)
        n_image_token = int(is_image.sum())
        if n_image_token != len(visual):
            raise ValueError(
                f"{n_image_token} image tokens in the batch, {len(visual)} visual tokens from the pictures: "
                "each picture needs an image token for each entry of its layout (conversation.py makes them)"
            )
        return x.masked_scatter(is_image[:, :, None], visual.to(x.dtype))

    def generate(self, tokens, pixels=None, max_new_tokens=256, **options):
        """Continue each row: (B, T) -> new ids (B, n <= max_new_tokens), <pad> after a row's end.

        The options are those of stream. A row without a stop among its n ids was cut off by max_new_tokens.
        """
        return torch.stack(list(self.stream(tokens, pixels, max_new_tokens, **options)), dim=1)

    @torch.inference_mode()
    def stream(
        self, tokens, pixels, max_new_tokens, layout=None, lengths=None, stop=None, history=None, **sampling
    ):
        """The same, a token of each row at a time: yields ids (B,) until every row has ended.

        lengths (B,): how many tokens of each row are prompt, where rows are padded on the right.
        stop: the ids that end an answer, if not </s> alone.
        history: a support.cache.KVHistory, the same for all questions of a chat (B = 1): no turn twice.
        sampling: temperature, top_p, top_k and seed, the fields of Sampling; greedy without them.
        """
        B, T = tokens.shape
        device = tokens.device
        sampling = Sampling(**sampling)
        generator = None
        if sampling.seed is not None:
            generator = torch.Generator(device).manual_seed(sampling.seed)
        n_free = self.cfg.decoder.block_size - T
        if not 1 <= max_new_tokens <= n_free:
            raise UserError(f"max_new_tokens is {max_new_tokens}; after a prompt of {T} it is 1 to {n_free}")
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=device)
        stop = torch.tensor(stop or [self.cfg.eos_token], device=device)

        # Prefill. In the cache every row's answer begins at place T, and sees no padding; of two rows, with A
        # and a their answers and . padding:    x x x x x A A A
        #                                       y y y . . a a a
        cache = self.decoder.new_cache(B, T + max_new_tokens)
        features = history.features(self, pixels) if history else self.features(pixels)
        x = self.embed(tokens, features, layout)                            # (B, T, D)
        h = prefill(self.decoder, x, tokens == self.cfg.image_token, lengths, cache, history)  # (B, D)
        places = torch.arange(T + max_new_tokens, device=device)
        is_seen = (places < lengths[:, None]) | (places >= T)               # (B, places)
        mask = None if is_seen.all() else is_seen[:, None, None]            # (B, 1, 1, places)

        # Decode, one token a row and step.
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            logits = self.decoder.lm_head(h).float()                        # (B, V)
            logits[:, self.cfg.never_generated] = -math.inf
            new = pick_token(logits, sampling, generator)                   # (B,)
            yield new.masked_fill(ended, self.cfg.pad_token)
            ended = ended | torch.isin(new, stop)
            if ended.all() or step + 1 == max_new_tokens:
                return
            x = self.decoder.embed_tokens(new)                              # (B, D)
            seen = mask if mask is None else mask[..., : T + step + 1]
            h = self.decoder(x[:, None], (lengths + step)[:, None], seen, cache=cache)[:, 0]
            if history:
                history.x = torch.cat([history.x, x[None]], dim=1)

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32, vision=None, llm=None, int8=False):
        """Open a model directory of any layout in support.weights. UserError names what does not fit.

        vision (DIR or DIR,DIR) is the tower of a model that was published without one; llm is what a LoRA was
        trained over. dtype None: as stored, but bfloat16 for float16 on a CPU, which is slow at that.
        int8: the decoder's matrices in 8 bits (support/quantize.py), to be asked and not trained.
        """
        from support.weights import load_model

        return load_model(directory, device, dtype, vision, llm, int8)

    def save_pretrained(self, directory, state=None):
        """Write config.json and model.safetensors, in the llava-hf layout if that can hold the model.

        A LoRA is merged. state: the weights to write, if not those here.
        """
        from support.export import save_model

        save_model(self, directory, state)


class Connector(nn.Module):
    """Features (n, N, D_f) -> visual tokens (M, D), which the decoder reads like embeddings of text.

    One linear layer is Eq. 1 of the first LLaVA paper (arXiv:2304.08485v2); LLaVA-1.5 has two.
    """

    def __init__(self, cfg):
        super().__init__()
        kind = CONNECTORS[cfg.connector]
        n_in, D = cfg.feature_width, cfg.decoder.n_embd
        self.norm = nn.LayerNorm(n_in) if kind.norm else nn.Identity()
        widths = [D] * kind.n_linear
        if kind.widening:
            widths[0] = kind.widening * n_in
        layers = []
        for width in widths:
            layers += [nn.Linear(n_in, width), nn.GELU()]                   # fresh weights are PyTorch's own
            n_in = width
        self.layers = nn.Sequential(*layers[:-1])                           # no GELU after the last
        self.row_end = None
        self.set_row_end(cfg.ends_rows)

    def set_row_end(self, ends_rows):
        if not ends_rows:
            self.row_end = None
        elif self.row_end is None:
            self.row_end = nn.Parameter(torch.empty_like(self.layers[-1].bias))
            nn.init.normal_(self.row_end, std=len(self.row_end) ** -0.5)

    def forward(self, features, layout=None):
        """Features of all tiles (n, N, D_f) -> visual tokens (M, D) in the order of the layout.

        Without a layout these are all features of each tile, and no row ends.
        """
        N = features.shape[-2]
        x = features.flatten(0, -2)                                         # (n N, D_f)
        if layout is None:
            if self.row_end is not None:
                raise ValueError("this model's pictures come with a layout (vision.cut_tiles); give it, too")
            return self.layers(self.norm(x))

        index = layout[:, 0] * N + layout[:, 1]                             # (M,), negative for a row end
        x = x.index_select(0, index.clamp(min=0))                           # (M, D_f)
        x = self.layers(self.norm(x))                                       # (M, D)
        if self.row_end is not None:
            return torch.where(index[:, None] < 0, self.row_end.to(x.dtype), x)
        if (index < 0).any():
            raise ValueError("the pictures have row ends and the model none: cut them in its own mode")
        return x


# ---- the decoder ----


class Decoder(nn.Module):
    recompute = 0  # so many blocks keep only their input in training, and run again in the backward pass

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    def forward(self, x, positions=None, mask=None, wanted=None, cache=None):
        """Embeddings (B, T, D) -> hidden states (B, T, D), ready for lm_head.

        positions (1 or B, T): 0 to T - 1 without.
        wanted (K,): flat positions b * T + t whose outputs are returned, as (K, D). The last block drops the
        others after attention.
        cache: a LayerCache for each layer. x continues the tokens that these have read.
        mask (1 or B, 1, T, tokens read + T), True where a token may attend to another. Without it attention
        is causal; behind tokens in a cache x needs one, unless it is a single token a row.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]     # (1, T)
        if cache is None:
            cache = [None] * len(self.layers)
        rope = rotary_angles(positions, self.cfg)
        for i, layer in enumerate(self.layers):
            is_last = i + 1 == len(self.layers)
            inputs = x, rope, mask, wanted if is_last else None, cache[i]
            if i < self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.norm(x)

    def new_cache(self, B, length):
        """For `length` tokens of B rows."""
        shape = 2, B, self.cfg.n_kv_head, length, self.cfg.head_dim
        return [LayerCache(self.embed_tokens.weight.new_empty(shape)) for _ in self.layers]


class DecoderBlock(nn.Module):
    """h = x + Attention(RMSNorm(x)), out = h + SwiGLU(RMSNorm(h))

    RMSNorm(x) = x / rms(x) * weight: arXiv:1910.07467, Eq. 4; its statistics in float32, as in Llama
    """

    def __init__(self, cfg):
        super().__init__()
        # The norms have the names of the public Llama weights.
        self.input_layernorm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = CausalAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(self, x, rope, mask=None, wanted=None, cache=None):
        y = self.self_attn(self.input_layernorm(x), rope, mask, wanted, cache)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)                     # (K, D)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v               arXiv:1706.03762, Eq. 1; grouped queries: arXiv:2305.13245"""

    def __init__(self, cfg):
        super().__init__()
        D, d = cfg.n_embd, cfg.head_dim
        self.head_dim = d
        self.is_grouped = cfg.n_kv_head != cfg.n_head
        self.q_proj = nn.Linear(D, cfg.n_head * d, bias=False)
        self.k_proj = nn.Linear(D, cfg.n_kv_head * d, bias=False)
        self.v_proj = nn.Linear(D, cfg.n_kv_head * d, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * d, D, bias=False)

    def forward(self, x, rope, mask=None, wanted=None, cache=None):
        q, k, v = self.project(x, rope)
        if cache is not None:  # these tokens see those before them, too
            k, v = cache.append(k, v)
        is_causal = mask is None and (cache is None or cache.n_read == x.shape[1])  # nothing was read before
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=self.is_grouped)
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, H d)
        if wanted is not None:
            y = y.flatten(0, 1).index_select(0, wanted)                     # (K, H d)
        return self.o_proj(y)

    def project(self, x, rope):
        """(B, T, D) -> queries (B, H, T, d), keys and values (B, H_kv, T, d)"""
        heads = *x.shape[:2], -1, self.head_dim
        q = self.q_proj(x).view(heads).transpose(1, 2)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return rotate(q, *rope), rotate(k, *rope), v


class LayerCache:
    """The keys and values of all tokens that a layer has read."""

    def __init__(self, room):
        self.room = room             # (2, B, H_kv, length, d), for these and more
        self.n_read = 0

    def append(self, k, v):
        """Keys and values (B, H_kv, T, d) of the next tokens -> those of all."""
        end = self.n_read + k.shape[2]
        self.room[:, :, :, self.n_read : end] = torch.stack([k, v])
        self.n_read = end
        return self.room[:, :, :, :end]


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)                                     arXiv:2002.05202, Eq. 6"""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.down_proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_angles(positions, cfg):
    """Positions (1 or B, T) -> cosines and signed sines (1 or B, 1, T, d) in float32, arXiv:2104.09864v5,
    section 3.2.2: the sines of the first half of the channels are negative, as rotate wants them."""
    pairs = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    frequency = cfg.rope_theta ** (-pairs / cfg.head_dim)                   # (d/2,)
    angle = positions[:, None, :, None].float() * frequency                 # (1 or B, 1, T, d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)    # (1 or B, 1, T, d)


def rotate(x, cos, signed_sin):
    """Turn each pair of channels by its angle, Eq. 34 of arXiv:2104.09864v5. Channels i and i + d/2 are a
    pair, as in the public Llama weights; in the paper neighbours are."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin).to(x.dtype)


# ---- the choice of a token ----


@dataclass
class Sampling:
    temperature: float = 0.0         # 0: the likeliest token
    top_p: float = 1.0               # draw from the smallest set of tokens that holds this probability
    top_k: int = 0                   # draw from this many likeliest tokens; 0: from all
    seed: int | None = None

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise UserError(f"{self}: temperature and top_k must be 0 or more, top_p above 0 and at most 1")


def pick_token(logits, sampling, generator=None):
    """(B, V) -> ids (B,)"""
    if sampling.temperature < 1e-30:  # 0, or what float32 may take for 0
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature, however small, overflows
    p, ids = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    if sampling.top_k:
        p[:, sampling.top_k :] = 0
    p = p / p.sum(-1, keepdim=True)

    # A token goes when those above it already hold top_p. The likeliest has none above it, and stays.
    above = p.cumsum(-1) - p
    p[:, 1:][above[:, 1:] >= sampling.top_p] = 0
    drawn = torch.multinomial(p, 1, generator=generator)                    # (B, 1)
    return ids.gather(-1, drawn)[:, 0]
