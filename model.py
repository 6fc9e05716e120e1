"""The vision-language model: a ViT looks, a connector translates, a Llama-style decoder reads both and writes (arXiv:2310.03744).

    pixels --vision.ViT--> patches --connector--> rows as wide as word embeddings, written over the <image> rows of the prompt
    prompt with picture --decoder--> logits of the next token

    h   = x + Attention(RMSNorm(x))             the decoder of Llama (arXiv:2302.13971): pre-norm, rotary positions, no biases
    out = h + SwiGLU(RMSNorm(h))                SwiGLU(x) = W_down (silu(W_gate x) * W_up x)

    vlm    = VLM.from_pretrained(DIR)           # a directory in the llava-hf layout
    logits = vlm(tokens, pixels)                # (B, T) int64, (n, 3, S, S) -> (B, T, V)
    loss   = vlm(tokens, pixels, labels)        # mean over the supervised tokens
    ids    = vlm.generate(tokens, pixels, max_new_tokens=64)
    vlm.save_pretrained(DIR)                    # transformers opens it as LlavaForConditionalGeneration

Rows of a batch are padded on the right, in training and in generation alike: under a causal mask no valid position ever sees the
padding, so no attention mask is needed. Deviation from the original: the unused last block of the tower is not run.
"""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vision import CLIP_MEAN, CLIP_NAMES, CLIP_STD, MODES, UserError, VisionConfig, ViT, rename

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

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} query heads cannot be shared among {self.n_kv_head} key-value heads")
        if self.head_dim % 2:
            raise UserError(f"a head of {self.head_dim} channels cannot be turned in pairs; rotary positions need an even number")


@dataclass
class VLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    connector: str = "mlp2x_gelu"    # or "linear" (LLaVA v1)
    image_token: int = 32000         # id that stands for one visual token; ids from here on are never generated
    pad_token: int = 32001
    bos_token: int = 1
    eos_token: int = 2
    image_mode: str = "pad"          # how a picture becomes square: vision.fit
    template: str = "vicuna_v1"      # how a conversation becomes one text: data.TEMPLATES

    def __post_init__(self):
        if self.connector not in ("mlp2x_gelu", "linear"):
            raise UserError(f"connector {self.connector!r} is unknown; choose mlp2x_gelu or linear")
        if self.image_mode not in MODES:
            raise UserError(f"image mode {self.image_mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.image_token <= max(self.bos_token, self.eos_token):
            raise UserError(f"image token {self.image_token} lies among the words; ids from it on are never generated, so it must come after them")


PRESETS = {
    # The toy: its tower and decoder are in assets/, made by lab.py. 64 visual tokens a picture.
    "toy": VLMConfig(
        VisionConfig(image_size=96, patch_size=12, n_embd=128, n_layer=5, n_head=4, n_hidden=512),
        DecoderConfig(vocab_size=960, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024)),
    # For small real photos, from random weights: patches of 8 px because the photos have only 64 a side.
    "photo": VLMConfig(
        VisionConfig(image_size=64, patch_size=8, n_embd=192, n_layer=5, n_head=6, n_hidden=768, feature_layer=-1),
        DecoderConfig(vocab_size=960, n_layer=3, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024)),
    "llava-1.5-7b": VLMConfig(decoder=DecoderConfig(vocab_size=32064)),
    "llava-1.5-13b": VLMConfig(decoder=DecoderConfig(vocab_size=32064, n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, n_hidden=13824)),
}


class VLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = ViT(cfg.vision)
        self.connector = Connector(cfg)
        self.decoder = Decoder(cfg.decoder)

    def forward(self, tokens, pixels=None, labels=None):
        """(B, T) int64, (n, 3, S, S) -> logits (B, T, V); with labels (B, T), not shifted, IGNORE where unsupervised -> scalar loss.

        Every image is a run of image tokens exactly as long as its visual tokens; pixels come in the order of the runs.
        The loss is the mean over supervised tokens. ValueError when runs and pictures differ, or nothing is supervised.
        """
        h = self.decoder(self.embed(tokens, pixels))                        # (B, T, D)
        if labels is None:
            return self.decoder.lm_head(h)                                  # (B, T, V)
        target = labels[:, 1:]                                              # position t predicts token t + 1
        keep = target != IGNORE
        if not keep.any():
            raise ValueError("no supervised token in the batch: its loss would be 0/0; check the labels (python data.py show)")
        logits = self.decoder.lm_head(h[:, :-1][keep])                      # (supervised, V): the head is run where it is asked
        return F.cross_entropy(logits.float(), target[keep])

    def embed(self, tokens, pixels):
        """Word embeddings with the pictures written over their rows: (B, T), (n, 3, S, S) -> (B, T, D)."""
        here = tokens == self.cfg.image_token                               # (B, T)
        x = self.decoder.embed_tokens(tokens.masked_fill(here, 0))          # the id may lie beyond the table: LLaVA's own has 32000 rows
        n_slot, n_visual = int(here.sum()), 0 if pixels is None else len(pixels) * self.cfg.vision.n_token
        if n_slot != n_visual:
            raise ValueError(f"{n_slot} image tokens in the batch, {n_visual} visual tokens from the pictures: "
                             f"each picture needs a run of {self.cfg.vision.n_token} (data.encode_conversation makes it)")
        if n_visual:
            visual = self.connector(self.vision(pixels))                    # (n, N, D)
            x = x.masked_scatter(here[:, :, None], visual.flatten(0, 1).to(x.dtype))
        return x

    def generate(self, tokens, pixels=None, max_new_tokens=128, temperature=0.0, top_p=1.0, top_k=0, lengths=None, seed=None):
        """Continue each row: (B, T) -> new ids (B, n <= max_new_tokens), the pad token after a row's end token.

        A row whose n ids hold no end token was cut off by max_new_tokens. `lengths` (B,) says how many tokens of each row are
        prompt when rows are padded on the right. temperature 0 is greedy; otherwise top_k, then top_p (nucleus) limit the choice.
        """
        return torch.stack(list(self.stream(tokens, pixels, max_new_tokens, temperature, top_p, top_k, lengths, seed)), dim=1)

    @torch.no_grad()
    def stream(self, tokens, pixels=None, max_new_tokens=128, temperature=0.0, top_p=1.0, top_k=0, lengths=None, seed=None):
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
        draw = torch.Generator(device).manual_seed(seed) if seed is not None else None
        cache = self.decoder.new_cache(B, longest)
        h = self.decoder(self.embed(tokens, pixels), cache=cache)           # prefill; padding writes rows that are overwritten unseen
        h = h[torch.arange(B, device=device), pos - 1]                      # (B, D) at each row's last prompt token
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            logits = self.decoder.lm_head(h).float()                        # (B, V)
            logits[:, self.cfg.image_token :] = -math.inf                   # <image>, <pad> and unused rows are not words
            new = sample(logits, temperature, top_p, top_k, draw).masked_fill(ended, self.cfg.pad_token)
            yield new
            ended = ended | (new == self.cfg.eos_token)
            if ended.all() or step + 1 == max_new_tokens:
                return
            x = self.decoder.embed_tokens(new.masked_fill(ended, 0))[:, None]
            h = self.decoder(x, cache=cache, pos=pos, end=T + step + 1)[:, 0]
            pos = pos + 1

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """Open a LLaVA directory in the llava-hf layout, any of its four families of tensor names. UserError names what does not fit."""
        with torch.device("meta"):
            vlm = cls(read_config(directory))
        load_strict(vlm, {family_a(name): t for name, t in read_tensors(directory).items()}, llava_name, directory, device, dtype)
        return vlm.eval()

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors in the llava-hf layout (tensor-name family A). Each file replaces the old one whole."""
        tensors = {llava_name(name): t.contiguous().cpu() for name, t in self.state_dict().items()}
        dtype = str(self.decoder.lm_head.weight.dtype).removeprefix("torch.")
        write_model(directory, tensors, llava_config(self.cfg, dtype))


class Connector(nn.Module):
    """Visual features -> word-embedding space: (n, N, D_vision) -> (n, N, D). Fresh weights keep PyTorch's default, as LLaVA's do."""

    def __init__(self, cfg):
        super().__init__()
        self.linear_1 = nn.Linear(cfg.vision.n_embd, cfg.decoder.n_embd)
        if cfg.connector == "mlp2x_gelu":
            self.linear_2 = nn.Linear(cfg.decoder.n_embd, cfg.decoder.n_embd)

    def forward(self, x):
        x = self.linear_1(x)
        return self.linear_2(F.gelu(x)) if hasattr(self, "linear_2") else x


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    def forward(self, x, cache=None, pos=None, end=None):
        """(B, T, D) embeddings -> (B, T, D) ready for lm_head, causally.

        With a cache and no `pos`: positions 0..T-1 are computed and remembered. With `pos` (B,): T is 1, each row's token stands at
        its own position and sees its cache up to there; `end` bounds all positions so that the unused tail is not read.
        """
        at = torch.arange(x.shape[1], device=x.device)[None] if pos is None else pos[:, None]                       # (1 or B, T)
        rope, mask = rotary(at, self.cfg), None if pos is None else (torch.arange(end, device=x.device) <= at)[:, None, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache is None else cache[i], pos, mask)
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

    def forward(self, x, rope, cache, pos, mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, pos, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalAttention(nn.Module):
    """Attention with rotary positions and grouped queries (arXiv:2305.13245)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim, self.grouped = cfg.head_dim, cfg.n_kv_head != cfg.n_head
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, rope, cache, pos, mask):                           # (B, T, D)
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)                           # (B, H, T, d), (B, H_kv, T, d)
        if cache is not None and pos is None:
            cache[0, :, :, :T], cache[1, :, :, :T] = k, v
        elif cache is not None:
            rows = torch.arange(B, device=x.device)
            cache[0, rows, :, pos], cache[1, rows, :, pos] = k[:, :, 0], v[:, :, 0]
            k, v = cache[0, :, :, : mask.shape[-1]], cache[1, :, :, : mask.shape[-1]]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.down_proj = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467); the statistics in float32, as Llama has them."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rotary(at, cfg):
    """Angles of RoPE (arXiv:2104.09864): positions (1 or B, T) -> cos, sin (1 or B, 1, T, d), float32, halves repeated."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=at.device).float() / cfg.head_dim)           # (d/2,)
    angle = (at[:, None, :, None].float() * freq).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) by its angle: the rotate-half layout of the public Llama weights."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


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


# ---- reading and writing model directories --------------------------------------------------------------------------

# Our names -> those of the llava-hf layout, the older family that every version of transformers reads ("A"); the tower's first.
LLAVA_NAMES = [
    ("vision.", "vision_tower.vision_model."), ("connector.", "multi_modal_projector."),
    ("decoder.lm_head.", "language_model.lm_head."), ("decoder.", "language_model.model."),
]
LLAMA_NAMES = [("lm_head.", "lm_head."), ("", "model.")]                    # and of a language model alone: Vicuna, Llama-2
# Families B, C and D of the same layout, brought back to A.
TO_FAMILY_A = [
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""), (r"^lm_head", "language_model.lm_head"),
    (r"^language_model\.(?!model\.|lm_head)", "language_model.model."), (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
]


def llava_name(name):
    """One of our names -> its public one, family A."""
    if name.startswith("vision."):
        return "vision_tower.vision_model." + rename(name.removeprefix("vision."), CLIP_NAMES)
    return rename(name, LLAVA_NAMES)


def family_a(name):
    for pattern, new in TO_FAMILY_A:
        name = re.sub(pattern, new, name)
    return name


def load_vision(vit, directory):
    """A CLIP directory (both towers or vision only, HF names) into a ViT, strictly."""
    tensors = {name.removeprefix("vision_model."): t for name, t in read_tensors(directory).items()
               if not name.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale"))}
    load_strict(vit, tensors, lambda name: rename(name, CLIP_NAMES), directory)


def load_decoder(decoder, directory):
    """A Llama directory into a decoder, strictly. Rows that our vocabulary adds (<image>, <pad>) become the mean of the old ones."""
    tensors, rows = read_tensors(directory), decoder.cfg.vocab_size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = tensors.get(name)
        if old is not None and old.dim() == 2 and len(old) < rows:
            tensors[name] = torch.cat([old.float(), old.float().mean(0, keepdim=True).expand(rows - len(old), -1)])
    load_strict(decoder, tensors, lambda name: rename(name, LLAMA_NAMES), directory)


def load_strict(module, tensors, public_name, source, device="cpu", dtype=torch.float32):
    """Fill every parameter from `tensors` under its public name; whatever is missing, left over or of another shape is an error."""
    state = module.state_dict()
    wanted = {public_name(name): name for name in state}
    missing, unused = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unused:
        some = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in (("missing", missing), ("unused", unused)) if names)
        raise UserError(f"{source}: its tensors do not fit this architecture: {some}. Check config.json against the weights")
    for public, name in wanted.items():
        t = tensors[public]
        if t.shape != state[name].shape:
            raise UserError(f"{source}: tensor {public} has shape {tuple(t.shape)}, the config asks for {tuple(state[name].shape)}; "
                            "config and weights are of different models")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"{source}: tensor {public} is {str(t.dtype).removeprefix('torch.')}; quantised weights cannot be read, "
                            "get them in float16")
    module.load_state_dict({name: tensors[public].to(device, dtype) for public, name in wanted.items()}, strict=True, assign=True)
    print(f"loaded {len(wanted)} tensors from {source}, 0 missing, 0 unused", file=sys.stderr)


def read_json(path):
    """A JSON file that holds an object -> dict."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not found, so {Path(path).parent} is not a model directory; give one that holds "
                        "config.json and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not an object in braces; copy it anew")
    return found


def read_tensors(directory):
    """All weights of model.safetensors or of the shards its index names, memory-mapped: {public name: tensor}."""
    files, index = [Path(directory) / "model.safetensors"], Path(directory) / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{index}: has no weight_map from tensors to files; copy it anew")
        files = [Path(directory) / name for name in sorted(set(shards.values()))]
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}
        except FileNotFoundError:
            raise UserError(f"{file}: not found; {directory} is no complete model directory, copy the file there") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({error}); copy it anew") from None
    return {name: t for name, t in tensors.items() if not name.endswith(("position_ids", "inv_freq"))}      # computed, not learned


def read_config(directory):
    """config.json (and preprocessor_config.json) of a llava-hf directory -> VLMConfig. Absent fields mean transformers' defaults."""
    file = Path(directory) / "config.json"
    c, prep = read_json(file), file.with_name("preprocessor_config.json")
    prep = read_json(prep) if prep.exists() else {}
    try:
        if c.get("model_type") != "llava":
            raise UserError(f"model_type is {c.get('model_type')!r}; only 'llava' can be opened")
        only(c, projector_hidden_act="gelu", vision_feature_select_strategy="default")
        vision = replace(vision_config(take(c, "vision_config", dict)), feature_layer=take(c, "vision_feature_layer", int, -2),
                         mean=take(prep, "image_mean", tuple, CLIP_MEAN), std=take(prep, "image_std", tuple, CLIP_STD))
        image = take(c, "image_token_id" if "image_token_id" in c else "image_token_index", int, 32000)
        mode = "crop" if prep.get("do_center_crop") and not prep.get("do_pad") else "pad"
        return VLMConfig(vision, decoder_config(take(c, "text_config", dict)), take(c, "mm_projector_type", str, "mlp2x_gelu"),
                         image, take(c, "pad_token_id", int, image + 1), take(c, "bos_token_id", int, 1), take(c, "eos_token_id", int, 2),
                         take(c, "image_aspect_ratio", str, mode), take(c, "template", str, "vicuna_v1"))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def vision_config(c):
    """config.json of a CLIP (or of its vision tower) -> VisionConfig; absent fields are CLIPVisionConfig's defaults."""
    c = take(c, "vision_config", dict, c)
    only(c, model_type="clip_vision_model")
    return VisionConfig(image_size=take(c, "image_size", int, 224), patch_size=take(c, "patch_size", int, 32),
                        n_embd=take(c, "hidden_size", int, 768), n_layer=take(c, "num_hidden_layers", int, 12),
                        n_head=take(c, "num_attention_heads", int, 12), n_hidden=take(c, "intermediate_size", int, 3072),
                        activation=take(c, "hidden_act", str, "quick_gelu"), norm_eps=take(c, "layer_norm_eps", float, 1e-5))


def decoder_config(c):
    """config.json of a Llama -> DecoderConfig; absent fields are LlamaConfig's defaults."""
    only(c, model_type="llama", hidden_act="silu")
    n_embd, n_head = take(c, "hidden_size", int, 4096), take(c, "num_attention_heads", int, 32)
    rope = take(c, "rope_parameters", dict, {}) | take(c, "rope_scaling", dict, {})
    only(rope, rope_type="default", type="default")
    return DecoderConfig(vocab_size=take(c, "vocab_size", int, 32000), n_layer=take(c, "num_hidden_layers", int, 32), n_head=n_head,
                         n_kv_head=take(c, "num_key_value_heads", int, n_head), n_embd=n_embd, head_dim=take(c, "head_dim", int, n_embd // n_head),
                         n_hidden=take(c, "intermediate_size", int, 11008), block_size=take(c, "max_position_embeddings", int, 2048),
                         norm_eps=take(c, "rms_norm_eps", float, 1e-6),
                         rope_theta=take(rope, "rope_theta", float, take(c, "rope_theta", float, 10000.0)))


def take(c, name, kind, default=None):
    """A field of a config, of the right kind and, where it counts something, above zero. Absent and null both mean the default."""
    value = default if c.get(name) is None else c[name]
    if kind is tuple and isinstance(value, list):
        value = tuple(value) if len(value) == 3 and all(isinstance(v, (int, float)) for v in value) else None
    right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if right and kind in (int, float) and name != "vision_feature_layer":
        right = value >= (0 if name.endswith("_id") else 1 if kind is int else 1e-30)
    if not right:
        what = {int: "a whole number", float: "a number above 0", dict: "an object", str: "a text", tuple: "three numbers"}[kind]
        raise UserError(f"{name} is {'missing' if name not in c else repr(c[name])}; it must be {what}. Copy the file anew")
    return value


def only(c, **supported):
    """Refuse what would be computed wrongly: fields that, where present, have just one value we implement."""
    for name, value in supported.items():
        if c.get(name) not in (None, value):
            raise UserError(f"{name} is {c[name]!r}; only {value!r} is implemented")


def clip_json(v):
    return {"model_type": "clip_vision_model", "image_size": v.image_size, "patch_size": v.patch_size, "hidden_size": v.n_embd,
            "num_hidden_layers": v.n_layer, "num_attention_heads": v.n_head, "intermediate_size": v.n_hidden,
            "hidden_act": v.activation, "layer_norm_eps": v.norm_eps, "projection_dim": v.n_embd}


def llama_json(d):
    return {"model_type": "llama", "vocab_size": d.vocab_size, "hidden_size": d.n_embd, "num_hidden_layers": d.n_layer,
            "num_attention_heads": d.n_head, "num_key_value_heads": d.n_kv_head, "head_dim": d.head_dim, "intermediate_size": d.n_hidden,
            "max_position_embeddings": d.block_size, "rms_norm_eps": d.norm_eps, "rope_theta": d.rope_theta,
            "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}


def llava_config(cfg, dtype):
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": dtype,
            "vision_config": clip_json(cfg.vision), "text_config": llama_json(cfg.decoder),
            "image_token_index": cfg.image_token, "pad_token_id": cfg.pad_token, "bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token,
            "ignore_index": IGNORE, "image_seq_length": cfg.vision.n_token, "projector_hidden_act": "gelu",
            "vision_feature_layer": cfg.vision.feature_layer, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
            "mm_projector_type": cfg.connector, "image_aspect_ratio": cfg.image_mode, "template": cfg.template}


def save_processor(directory, tokenizer_file, cfg):
    """What transformers' AutoProcessor wants beside the weights: the tokenizer with its two added tokens, and the picture's way in."""
    S = cfg.vision.image_size
    ways = {"pad": ("LlavaImageProcessor", {"shortest_edge": S}, True), "crop": ("CLIPImageProcessor", {"shortest_edge": S}, True),
            "resize": ("CLIPImageProcessor", {"height": S, "width": S}, False)}
    kind, size, crop = ways["pad" if cfg.image_mode == "letterbox" else cfg.image_mode]     # transformers knows no letterbox
    files = {
        "tokenizer.json": tokenizer_json(tokenizer_file, cfg),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
                                  "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                                  "extra_special_tokens": {"image_token": "<image>"}, "model_max_length": cfg.decoder.block_size,
                                  "clean_up_tokenization_spaces": False, "padding_side": "left", "processor_class": "LlavaProcessor"},
        "preprocessor_config.json": {
            "image_processor_type": kind, "do_pad": kind == "LlavaImageProcessor", "do_resize": True, "size": size, "resample": 3,
            "do_center_crop": crop, "crop_size": {"height": S, "width": S}, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(cfg.vision.mean), "image_std": list(cfg.vision.std), "processor_class": "LlavaProcessor"},
        "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": cfg.vision.patch_size, "image_token": "<image>",
                                  "num_additional_image_tokens": cfg.vision.n_prefix, "vision_feature_select_strategy": "default"},
        "generation_config.json": {"bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token, "pad_token_id": cfg.pad_token,
                                   "suppress_tokens": list(range(cfg.image_token, cfg.decoder.vocab_size))},
    }
    for name, content in files.items():
        write_whole(Path(directory) / name, lambda tmp: tmp.write_text(json.dumps(content, indent=2 if name != "tokenizer.json" else None)))
    write_whole(Path(directory) / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))


def tokenizer_json(file, cfg):
    """A sentencepiece BPE model in the words of Hugging Face's tokenizers, such that its ids are those of data.encode_prompt.

    A stretch of text gets a space in front, also after <image>, but not after </s>: that one is looked for after the spaces are set.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    words = sorted((w for w, i in ids.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))), key=lambda w: -sp.get_score(ids[w]))
    merges = [[w[:k], w[k:]] for w in words for k in range(1, len(w)) if w[:k] in ids and w[k:] in ids]     # the best word is joined first
    special = {"<unk>": sp.unk_id(), "<s>": cfg.bos_token, "</s>": cfg.eos_token, "<image>": cfg.image_token, "<pad>": cfg.pad_token}
    added = [{"id": i, "content": w, "special": True, "normalized": w == "</s>", "lstrip": False, "rstrip": False, "single_word": False}
             for w, i in special.items()]
    replace_by = lambda kind, old, new: {"type": "Replace", "pattern": {kind: old}, "content": new}
    return {"version": "1.0", "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [replace_by("Regex", r"\A(?!</s>)", "▁"), replace_by("String", " ", "▁")]},
            "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [cfg.bos_token], "tokens": ["<s>"]}},
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                               "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]},
            "decoder": {"type": "Sequence", "decoders": [replace_by("String", "▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                                                         {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": merges}}


def write_model(directory, tensors, config):
    """model.safetensors, then config.json: a directory with a config is a whole model."""
    write_whole(Path(directory) / "model.safetensors", lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
    write_whole(Path(directory) / "config.json", lambda tmp: tmp.write_text(json.dumps(config, indent=2)))


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
