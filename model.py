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

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vision import CLIP_NAMES, MODES, UserError, VisionConfig, ViT, rename

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


PRESETS = {
    # The toy: its tower and decoder are in assets/, made by lab.py. 64 visual tokens a picture.
    "toy": VLMConfig(
        VisionConfig(image_size=96, patch_size=12, n_embd=128, n_layer=5, n_head=4, n_hidden=512),
        DecoderConfig(vocab_size=960, n_layer=6, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_hidden=352, block_size=1024)),
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
        if longest > self.cfg.decoder.block_size:
            raise ValueError(f"{T} prompt tokens + {max_new_tokens} new ones exceed the decoder's {self.cfg.decoder.block_size}: "
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
        cfg = read_config(directory)
        with torch.device("meta"):
            vlm = cls(cfg)
        load_strict(vlm, read_tensors(directory), llava_name, directory, device, dtype)
        return vlm.eval()

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors in the llava-hf layout (tensor-name family A). Each file replaces the old one whole."""
        tensors = {public: p.detach().contiguous().cpu() for name, p in self.state_dict().items() for public in [llava_name(name)]}
        write_model(directory, tensors, llava_config(self.cfg, str(next(iter(tensors.values())).dtype).removeprefix("torch.")))


class Connector(nn.Module):
    """Visual features -> word-embedding space: (n, N, D_vision) -> (n, N, D). Fresh weights keep PyTorch's default, as LLaVA's do."""

    def __init__(self, cfg):
        super().__init__()
        self.linear_1 = nn.Linear(cfg.vision.n_embd, cfg.decoder.n_embd)
        if cfg.connector == "mlp2x_gelu":
            self.linear_2 = nn.Linear(cfg.decoder.n_embd, cfg.decoder.n_embd)
        elif cfg.connector != "linear":
            raise UserError(f"connector {cfg.connector!r} is unknown; choose mlp2x_gelu or linear")

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
    tensors = {k.removeprefix("vision_model."): v for k, v in read_tensors(directory).items()
               if not k.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale")) and "position_ids" not in k}
    load_strict(vit, tensors, lambda name: rename(name, CLIP_NAMES), directory)


def load_decoder(decoder, directory):
    """A Llama directory into a decoder, strictly. Rows that our vocabulary adds (<image>, <pad>) become the mean of the old ones."""
    tensors = {k: v for k, v in read_tensors(directory).items() if not k.endswith("inv_freq")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, rows = tensors.get(name), decoder.cfg.vocab_size
        if old is not None and len(old) < rows:
            tensors[name] = torch.cat([old.float(), old.float().mean(0, keepdim=True).expand(rows - len(old), -1)])
    load_strict(decoder, tensors, lambda name: rename(name, LLAMA_NAMES), directory)


def load_strict(module, tensors, public_name, source, device="cpu", dtype=torch.float32):
    """Fill every parameter from `tensors` under its public name; whatever is missing, left over or of another shape is an error."""
    if isinstance(module, VLM):
        tensors = {family_a(k): v for k, v in tensors.items()}
    wanted = {name: public_name(name) for name in module.state_dict()}
    missing, unused = set(wanted.values()) - set(tensors), set(tensors) - set(wanted.values())
    if missing or unused:
        some = "; ".join(f"{len(s)} {what}, such as {sorted(s)[0]}" for what, s in (("missing", missing), ("unused", unused)) if s)
        raise UserError(f"{source}: its tensors do not fit this architecture: {some}. Check config.json against the weights")
    state = module.state_dict()
    for name, public in wanted.items():
        if state[name].shape != tensors[public].shape:
            raise UserError(f"{source}: tensor {public} has shape {tuple(tensors[public].shape)}, the config asks for {tuple(state[name].shape)}")
    module.load_state_dict({name: tensors[public].to(device, dtype) for name, public in wanted.items()}, strict=True, assign=True)
    print(f"loaded {len(wanted)} of {len(tensors)} tensors from {source}, 0 missing, 0 unused", file=sys.stderr)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found, so {Path(path).parent} is not a model directory; give one that holds "
                        "config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it anew") from None


def read_tensors(directory):
    """All tensors of model.safetensors or of the shards its index names, memory-mapped: {public name: tensor}."""
    directory = Path(directory)
    files = [directory / "model.safetensors"]
    if (directory / "model.safetensors.index.json").exists():
        files = [directory / f for f in sorted(set(read_json(directory / "model.safetensors.index.json")["weight_map"].values()))]
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}
        except FileNotFoundError:
            raise UserError(f"{file}: not found; {directory} is no complete model directory, copy the file there") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or damaged ({error}); copy it anew") from None
    return tensors


def read_config(directory):
    """config.json (and preprocessor_config.json) of a llava-hf directory -> VLMConfig. Absent fields mean transformers' defaults."""
    c = read_json(Path(directory) / "config.json")
    if c.get("model_type") != "llava":
        raise UserError(f"{directory}/config.json: model_type is {c.get('model_type')!r}; only 'llava' can be opened")
    try:
        vision, text = vision_config(c["vision_config"]), decoder_config(c["text_config"])
    except KeyError as error:
        raise UserError(f"{directory}/config.json: the field {error} is missing; copy it anew") from None
    vision = replace(vision, feature_layer=c.get("vision_feature_layer", -2))
    prep = Path(directory) / "preprocessor_config.json"
    prep = read_json(prep) if prep.exists() else {}
    mode = c.get("image_aspect_ratio") or ("crop" if prep.get("do_center_crop") and not prep.get("do_pad") else "pad")
    if mode not in MODES:
        raise UserError(f"{directory}/config.json: image_aspect_ratio is {mode!r}; known are {', '.join(MODES)}")
    vision = replace(vision, mean=tuple(prep.get("image_mean", vision.mean)), std=tuple(prep.get("image_std", vision.std)))
    image = c.get("image_token_index", c.get("image_token_id", 32000))
    return VLMConfig(vision, text, c.get("mm_projector_type", "mlp2x_gelu"), image, c.get("pad_token_id") or image + 1,
                     image_mode=mode, template=c.get("template", "vicuna_v1"))


def vision_config(c):
    """config.json of a CLIP vision tower -> VisionConfig; absent fields are CLIPVisionConfig's defaults."""
    return VisionConfig(image_size=c.get("image_size", 224), patch_size=c.get("patch_size", 32), n_embd=c.get("hidden_size", 768),
                        n_layer=c.get("num_hidden_layers", 12), n_head=c.get("num_attention_heads", 12),
                        n_hidden=c.get("intermediate_size", 3072), activation=c.get("hidden_act", "quick_gelu"),
                        norm_eps=c.get("layer_norm_eps", 1e-5))


def decoder_config(c):
    """config.json of a Llama -> DecoderConfig; absent fields are LlamaConfig's defaults."""
    n_embd, n_head = c.get("hidden_size", 4096), c.get("num_attention_heads", 32)
    rope = c.get("rope_parameters") or {}
    return DecoderConfig(vocab_size=c.get("vocab_size", 32000), n_layer=c.get("num_hidden_layers", 32), n_head=n_head,
                         n_kv_head=c.get("num_key_value_heads") or n_head, n_embd=n_embd, head_dim=c.get("head_dim") or n_embd // n_head,
                         n_hidden=c.get("intermediate_size", 11008), block_size=c.get("max_position_embeddings", 2048),
                         norm_eps=c.get("rms_norm_eps", 1e-6), rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)))


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
    S, extra = cfg.vision.image_size, {cfg.image_token: "<image>", cfg.pad_token: "<pad>"}
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | extra
    added = {str(i): dict(content=s, special=True, lstrip=False, rstrip=False, normalized=False, single_word=False) for i, s in names.items()}
    crop = {"do_center_crop": True, "do_resize": True, "size": {"shortest_edge": S}}
    ways = {"pad": crop | {"do_pad": True}, "letterbox": crop | {"do_pad": True}, "crop": crop,
            "resize": {"do_center_crop": False, "do_resize": True, "size": {"height": S, "width": S}}}
    kind = {"image_processor_type": "LlavaImageProcessor" if cfg.image_mode in ("pad", "letterbox") else "CLIPImageProcessor"}
    files = {
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
                                  "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                                  "added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "padding_side": "left",
                                  "extra_special_tokens": {"image_token": "<image>"}, "processor_class": "LlavaProcessor"},
        "preprocessor_config.json": kind | ways[cfg.image_mode] | {
            "crop_size": {"height": S, "width": S}, "resample": 3, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(cfg.vision.mean), "image_std": list(cfg.vision.std), "processor_class": "LlavaProcessor"},
        "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": cfg.vision.patch_size, "image_token": "<image>",
                                  "num_additional_image_tokens": cfg.vision.n_prefix, "vision_feature_select_strategy": "default"},
        "generation_config.json": {"bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token, "pad_token_id": cfg.pad_token},
    }
    for name, content in files.items():
        write_whole(Path(directory) / name, lambda tmp, content=content: tmp.write_text(json.dumps(content, indent=2)))
    write_whole(Path(directory) / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))


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
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError, RuntimeError) as error:               # torch.save and safetensors wrap a full disk in their own
        raise UserError(f"{path}: could not be written ({error}); free some space or choose another --out. What was there is untouched") from None
    finally:
        tmp.unlink(missing_ok=True)
