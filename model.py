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

    python -m tools.weights convert SRC DIR             # weights to safetensors, whole models to the llava-hf layout where it can hold them
    python -m tools.weights info DIR|PRESET             # parts, parameters, visual tokens, memory; reads no weights
"""

from dataclasses import dataclass, field, replace
import math
import re

from torch.utils.checkpoint import checkpoint
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.cli import UserError
from vision import TILINGS, ViT, VisionConfig, find_tiling, random_normal



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
    image_mode: str = "pad"          # how a picture becomes tiles: vision.make_square, vision.TILINGS (and vision.tiling, where the model differs)
    template: str = "vicuna_v1"      # how a conversation becomes one text: TEMPLATES
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
            raise ValueError("no supervised token in the batch: its loss would be 0/0; check the labels (python -m tools.show show)")
        return -token_log_probs(self.decoder(x, rows=rows), self.decoder.lm_head.weight, target[rows]).mean()

    def embed(self, tokens, pixels, layout=None):
        """Word embeddings with the pictures written over their rows: (B, T), (n, 3, S, S), (M, 2) -> (B, T, D)."""
        here = tokens == self.cfg.image_token                               # (B, T)
        beyond = tokens == max(self.cfg.pad_token, self.cfg.decoder.vocab_size)             # <pad>, where it lies beyond the table as
        x = self.decoder.embed_tokens(tokens.masked_fill(here | beyond, 0))                 # <image> may too: LLaVA's own has 32000 rows
        N, row_ends = self.cfg.vision.n_token, self.connector.row_end is not None
        n_slot, n_visual = int(here.sum()), 0 if pixels is None else len(pixels) * N if layout is None else len(layout)
        if n_slot != n_visual:
            raise ValueError(f"{n_slot} image tokens in the batch, {n_visual} visual tokens from the pictures: each picture needs a run "
                             f"{f'of {N}' if layout is None else 'as long as its layout'} (encode_conversation makes it)")
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
        from support.weights import load_model

        return load_model(directory, device, dtype, vision, llm)

    def save_pretrained(self, directory, state=None):
        """Write config.json and model.safetensors, each file replacing the old one whole: in the llava-hf layout (tensor-name family A) where
        it can hold the model, else under our own names, with model_type "plainvlm". A LoRA is merged. `state`: the weights, if not those here."""
        from support.export import save_model

        save_model(self, directory, state)



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
            self.row_end = nn.Parameter(random_normal(self.D, std=self.D**-0.5, device=like.device, dtype=like.dtype)) if wanted else None

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
        self.embed_tokens = nn.Embedding.from_pretrained(random_normal(cfg.vocab_size, cfg.n_embd), freeze=False)
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



def token_log_probs(h, W, targets):
    """log softmax(h W^T)[target] of every row: (n, D), (V, D), (n,) -> (n,) float32.

    SFT minimises minus their mean over all supervised tokens, DPO compares their sums over two answers.
    """
    device = h.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
    return TokenLogProbs.apply(h, W, targets, dtype, torch.is_grad_enabled())


class TokenLogProbs(torch.autograd.Function):
    """A slice of rows at a time: no (n, V) logits exist at any moment.

    What a log-probability says to its logits is onehot(target) - p. The first slices keep it for the way back,
    in the place of their logits; beyond them there might be no room, and it is computed once more.
    """

    slice_size = {"cpu": 2**23, "cuda": 2**26}  # logits: 32 MB in float32, about a cache; 256 MB
    n_kept = 8                                  # slices

    @staticmethod
    def forward(ctx, h, W, targets, dtype, learn):
        ctx.rows = max(1, TokenLogProbs.slice_size[h.device.type] // len(W))
        ctx.dtype, ctx.kept = dtype, []
        ctx.save_for_backward(h, W, targets)
        log_probs = []
        w = W.to(dtype)
        for x, target in zip(h.split(ctx.rows), targets.split(ctx.rows)):
            log_prob, gradient = TokenLogProbs.one_slice(x.to(dtype), w, target)
            log_probs.append(log_prob)
            if learn and len(ctx.kept) < TokenLogProbs.n_kept:
                ctx.kept.append(gradient)
        return torch.cat(log_probs)

    @staticmethod
    def one_slice(x, w, target):
        """-> log-probabilities (r,) and onehot(target) - p (r, V), all in the memory of one slice's logits."""
        target = target[:, None]                                            # (r, 1)
        logits = (x @ w.T).float()                                          # (r, V)
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, target)
        p = logits.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        gradient = p.div_(-total).scatter_add_(1, target, torch.ones_like(chosen))
        return (chosen - top - total.log())[:, 0], gradient.to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        h, W, targets = ctx.saved_tensors
        h_wanted, W_wanted = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h) if h_wanted else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if W_wanted else None
        w = W.to(ctx.dtype)
        for at in range(0, len(h), ctx.rows):
            some = slice(at, at + ctx.rows)
            x = h[some].to(ctx.dtype)
            gradient = ctx.kept.pop(0) if ctx.kept else TokenLogProbs.one_slice(x, w, targets[some])[1]
            if h_wanted:
                grad_h[some] = (gradient @ w) * upstream[some, None]
            if W_wanted:
                grad_W += gradient.T @ (x * upstream[some, None]).to(ctx.dtype)
        return grad_h, grad_W if grad_W is None else grad_W.to(W.dtype), None, None, None



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
