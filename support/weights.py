"""Public weights -> a model: each layout's names and config.json, and strict loading.

    files      --open_weights-->  {public name: tensor}, memory-mapped: nothing is read before it is used
    names      --our_names-->     {our name: tensor}     by the tables below, which are literal
    config     --read_config-->   VLMConfig              one reader for each layout
    shapes     --fit_shapes-->    positions resized to the model's grid, InternLM2's wqkv taken apart
    a VLM      --load_strict-->   filled; a tensor missing, unused or of another shape is an error

    vlm = load_model(DIR, vision="DIR,DIR", llm=DIR)     # what VLM.from_pretrained calls

Layouts: llava-hf and LLaVA-NeXT (transformers), the original LLaVA and its LoRA, Prismatic (native, and as
OpenVLA wrote it), InternVL2.5, and plainvlm's own. Towers alone: CLIP, SigLIP, DINOv2, ViT and InternViT, in
the names of transformers and timm. Decoders alone: Llama, Mistral, InternLM2.
The way back, from our names to public ones, is support/export.py.
"""

import math
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from model import PRESETS, VLM, DecoderConfig, VLMConfig
from support.cli import UserError
from support.io import read_json, reading
from vision import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SQUARE_MODES,
    TILINGS,
    VisionConfig,
    find_tiling,
    grids_up_to,
)

# ---- names: (public, ours) ---------------------------------------------------------------------------------
# A row that begins with a dot stands for an inner part of a name, any other for its start.
# Of the starts the first that fits counts.

CLIP_NAMES = [                       # and SigLIP, in transformers
    ("embeddings.patch_embedding.", "patch."),
    ("embeddings.class_embedding", "class_token"),
    ("embeddings.position_embedding.weight", "pos"),
    ("pre_layrnorm.", "pre_norm."),  # misspelled in the original
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
]
DINOV2_NAMES = [                     # and the ImageNet ViT, in transformers
    ("embeddings.patch_embeddings.projection.", "patch."),
    ("embeddings.cls_token", "class_token"),
    ("embeddings.register_tokens", "registers"),
    ("embeddings.position_embeddings", "pos"),
    ("layernorm.", "norm."),
    ("encoder.layer.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.attention.query.", ".attn.q_proj."),
    (".attention.attention.key.", ".attn.k_proj."),
    (".attention.attention.value.", ".attn.v_proj."),
    (".attention.output.dense.", ".attn.out_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layer_scale1.lambda1", ".scale1"),
    (".layer_scale2.lambda1", ".scale2"),
]
TIMM_NAMES = [                       # any tower as timm writes it, and so Prismatic
    ("patch_embed.proj.", "patch."),
    ("cls_token", "class_token"),
    ("reg_token", "registers"),
    ("pos_embed", "pos"),
    ("norm_pre.", "pre_norm."),
    (".attn.proj.", ".attn.out_proj."),
    (".ls1.gamma", ".scale1"),
    (".ls2.gamma", ".scale2"),
    (".ls1.scale_factor", ".scale1"),    # OpenVLA's word for it
    (".ls2.scale_factor", ".scale2"),
]
INTERNVIT_NAMES = [                  # InternVL's tower, where it is called neither as CLIP's nor as timm's
    ("embeddings.position_embedding", "pos"),
    (".ls1", ".scale1"),
    (".ls2", ".scale2"),
]
TOWER_NAMES = CLIP_NAMES + DINOV2_NAMES + TIMM_NAMES + INTERNVIT_NAMES  # the longer names come first
# What towers' files hold beyond the tower as it is used here.
TOWER_UNUSED = re.compile(
    r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b"
    r"|^(head|attn_pool|pooler|classifier|fc_norm)\b|mask_token|position_ids"
)

# Llama, Mistral and Vicuna call everything as we do.
INTERNLM2_NAMES = [                  # its wqkv is taken apart in split_wqkv
    ("tok_embeddings.", "embed_tokens."),
    ("output.", "lm_head."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
]

# Where the parts of a whole model are, after a leading "model." and PEFT's "base_model.model." were dropped.
LLAVA_NAMES = [
    # llava-hf, in all the ways that transformers has named it
    ("vision_tower.vision_model.", "vision."),
    ("multi_modal_projector.", "connector."),
    ("image_newline", "connector.row_end"),
    ("language_model.model.", "decoder."),
    ("language_model.", "decoder."),
    # the original LLaVA: v1 has one linear layer, 1.5 has two
    ("vision_tower.vision_tower.vision_model.", "vision."),
    ("vision_tower.", "vision."),
    ("mm_projector.0.", "connector.linear_1."),
    ("mm_projector.2.", "connector.linear_2."),
    ("mm_projector.", "connector.linear_1."),
    # a Llama's or an InternLM2's own, which the original LLaVA leaves as they are
    ("embed_tokens.", "decoder.embed_tokens."),
    ("layers.", "decoder.layers."),
    ("norm.", "decoder.norm."),
    ("lm_head.", "decoder.lm_head."),
    ("tok_embeddings.", "decoder.tok_embeddings."),
    ("output.", "decoder.output."),
]
PRISMATIC_NAMES = [
    # native
    ("vision_backbone.featurizer.", "vision."),
    ("vision_backbone.dino_featurizer.", "vision."),
    ("vision_backbone.siglip_featurizer.", "vision2."),
    ("vision_backbone.clip_featurizer.", "vision2."),
    ("projector.projector.0.", "connector.linear_1."),
    ("projector.projector.2.", "connector.linear_2."),
    ("projector.projector.4.", "connector.linear_3."),
    ("projector.projector.", "connector.linear_1."),
    ("llm_backbone.llm.model.", "decoder."),
    ("llm_backbone.llm.", "decoder."),
    # in the layout of Hugging Face, where it differs
    ("vision_backbone.fused_featurizer.", "vision2."),
    ("projector.fc1.", "connector.linear_1."),
    ("projector.fc2.", "connector.linear_2."),
    ("projector.fc3.", "connector.linear_3."),
]
INTERNVL_NAMES = [                   # its decoder is called as in llava-hf
    ("vision_model.", "vision."),
    ("mlp1.0.", "connector.norm."),
    ("mlp1.1.", "connector.linear_1."),
    ("mlp1.3.", "connector.linear_2."),
]
PART_NAMES = LLAVA_NAMES + PRISMATIC_NAMES + INTERNVL_NAMES


def rename(name, table):
    """Translate a tensor's name by a table of rows (from, to) as above."""
    for old, new in table:
        if old.startswith("."):
            name = name.replace(old, new)
    for old, new in table:
        if name.startswith(old):     # an inner part begins with a dot, which no name does
            return new + name[len(old) :]
    return name


def our_names(tensors):
    """{public name: tensor} of a whole model, a decoder, a connector or an adapter -> {our name: tensor}."""
    named = {}
    for name, tensor in tensors.items():
        if not name.endswith(("inv_freq", "position_ids")):  # computed, not learned
            named[part_name(name)] = tensor

    # Inside the parts names differ by family.
    found = {name: t for name, t in named.items() if not name.startswith(("vision.", "vision2.", "decoder."))}
    for part in "vision", "vision2":
        found |= with_part(part, tower_tensors(part_of(part, named)))
    for name, tensor in part_of("decoder", named).items():
        found["decoder." + rename(name, INTERNLM2_NAMES)] = tensor
    return found


def part_name(name):
    """A public name -> ours as far as the part; what is inside it keeps its name."""
    name = re.sub(r"^(base_model\.)?(model\.)*", "", name)
    name = re.sub(r"(lora_[AB])\.weight$", r"\1", name)  # as support/lora.py calls them
    return rename(name, PART_NAMES)


def part_of(part, found):
    return {name.removeprefix(part + "."): t for name, t in found.items() if name.startswith(part + ".")}


def with_part(part, found):
    return {f"{part}.{name}": t for name, t in found.items()}


def tower_tensors(tensors):
    """{public name: tensor} of a tower of any family -> {our name: tensor}.

    timm and InternViT fuse q, k and v: here they are cut in three. A position table without a row for the
    class token (timm folds that row into the token itself) gets a row of zeros.
    """
    found = {}
    for public, tensor in tensors.items():
        public = re.sub(r"^(vision_model|vit)\.", "", public)  # beside a text tower or a classifier
        if TOWER_UNUSED.search(public):
            continue
        name = rename(public, TOWER_NAMES)
        if ".attn.qkv." in name:
            for own, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                found[name.replace("qkv", own)] = third
        elif name == "class_token":
            found[name] = tensor.flatten()                                  # (1, 1, D) -> (D,)
        elif name in ("registers", "pos") and tensor.ndim > 2:
            found[name] = tensor.flatten(0, -2)                             # (1, N, D) -> (N, D)
        else:
            found[name] = tensor

    # A square number of rows beside a class token: its row is lacking.
    pos = found.get("pos")
    if pos is not None and "class_token" in found and math.isqrt(len(pos)) ** 2 == len(pos):
        found["pos"] = F.pad(pos, (0, 0, 1, 0))
    return found


# ---- shapes ------------------------------------------------------------------------------------------------


def fit_shapes(found, cfg):
    """{our name: tensor} as a file has them -> the same with the shapes of a VLMConfig."""
    found = dict(found)
    for part, tower in ("vision", cfg.vision), ("vision2", cfg.vision2):
        pos = found.get(f"{part}.pos")
        if tower and pos is not None:
            found[f"{part}.pos"] = resize_positions(pos, tower)
    for name in list(found):
        if ".attention.wqkv." in name:
            for own, rows in split_wqkv(found.pop(name), cfg.decoder).items():
                found[name.replace("attention.wqkv", f"self_attn.{own}")] = rows
    if cfg.decoder.tied and "decoder.embed_tokens.weight" in found:
        found.setdefault("decoder.lm_head.weight", found["decoder.embed_tokens.weight"])
    return found


def resize_positions(pos, cfg):
    """A position table for another grid: bicubic with antialiasing, as timm and DINOv2 with registers do.

    The class token's row stays. A table that is no square is left alone: its shape will be reported.
    """
    n_class, D = int(cfg.class_token), pos.shape[1]
    side = math.isqrt(len(pos) - n_class)
    if side == cfg.grid or side**2 != len(pos) - n_class:
        return pos
    table = pos[n_class:].float().view(1, side, side, D).permute(0, 3, 1, 2)  # (1, D, side, side)
    table = F.interpolate(table, size=(cfg.grid, cfg.grid), mode="bicubic", antialias=True)
    return torch.cat([pos[:n_class].float(), table.permute(0, 2, 3, 1).reshape(-1, D)])


def split_wqkv(wqkv, cfg):
    """InternLM2's rows lie by key-value head: its queries, its key, its value."""
    group = cfg.n_head // cfg.n_kv_head
    heads = wqkv.view(cfg.n_kv_head, group + 2, cfg.head_dim, -1)           # (H_kv, group + 2, d, D)
    return {
        "q_proj": heads[:, :group].flatten(0, 2),
        "k_proj": heads[:, group].flatten(0, 1),
        "v_proj": heads[:, group + 1].flatten(0, 1),
    }


def grow_words(found, rows):
    """Both tables of words with more rows (<image>, <pad>), the new ones the mean of the old."""
    found = dict(found)
    for name in "decoder.embed_tokens.weight", "decoder.lm_head.weight":
        table = found.get(name)
        if table is not None and len(table) < rows:
            mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
            found[name] = torch.cat([table, mean.expand(rows - len(table), -1)])
    return found


# ---- files -------------------------------------------------------------------------------------------------

FILES = ("model.safetensors", "pytorch_model.bin", "checkpoints/latest-checkpoint.pt", "mm_projector.bin")


def weights_file(path):
    """The file with the weights, or the one whose name with .index.json lists the shards, or None."""
    if path.is_file():
        return path
    for name in FILES:
        if (path / name).exists() or (path / f"{name}.index.json").exists():
            return path / name
    return None


def read_tensors(path):
    """All weights of a file, or of a directory in one file or in shards: {public name: mapped tensor}."""
    path = Path(path)
    file = weights_file(path)
    if file is None:
        raise UserError(f"{path}: holds none of {', '.join(FILES)}; copy the weights there")
    shards = [file]
    index = file.with_name(f"{file.name}.index.json")
    if path.is_dir() and index.exists():
        with reading(index):
            shards = [file.with_name(name) for name in sorted(set(read_json(index)["weight_map"].values()))]
    tensors = {}
    for shard in shards:
        tensors |= open_weights(shard)
    return tensors


def open_weights(file):
    """{public name: tensor} of a .safetensors, .bin or .pt file, memory-mapped."""
    with reading(file, "copy it anew"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}
        is_zip = zipfile.is_zipfile(file)  # before 2020 torch wrote none: read whole
        try:
            return flatten(torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip))
        except pickle.UnpicklingError:
            raise UserError(f"{file}: damaged, or holds more than tensors; get it from its authors") from None


def flatten(content, prefix=""):
    """Dicts in dicts, as torch.save wrote them -> {"outer.inner.name": tensor}; only tensors."""
    found = {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
    return found


# ---- into a model ------------------------------------------------------------------------------------------


def load_model(directory, device="cpu", dtype=torch.float32, vision=None, llm=None):
    """A directory of any layout -> VLM.

    dtype None: as the words are stored, but bfloat16 for float16 on a CPU, which is slower at that.
    """
    cfg, found, lora = read_model(directory, vision, llm)
    if dtype is None:
        dtype = stored_dtype(found)
        if dtype == torch.float16 and torch.device(device).type == "cpu":
            dtype = torch.bfloat16
    return fill_model(cfg, found, lora, directory, device, dtype)


def read_model(directory, vision=None, llm=None):
    """A directory of any layout -> VLMConfig, {our name: mapped tensor}, {our name: (A, B, scale) of a LoRA}.

    vision: DIR or DIR,DIR, towers of a model that was published without; llm: what a LoRA was trained over.
    """
    directory = Path(directory)
    if llm and not is_lora(directory):
        raise UserError(f"{directory}: is a whole model; --llm is for presets, and for the base of a LoRA")
    c = config_json(directory)
    find_reader(c, directory)  # an unknown architecture is said first
    if is_lora(directory):
        found, lora = read_lora(directory, llm)
    else:
        found, lora = our_names(read_tensors(directory)), {}

    # A tower in the model, or one that is given.
    paths = vision.split(",") if vision else []
    lacks = bool(part_of("decoder", found)) and not part_of("vision", found)
    if lacks and not paths:
        wanted = c.get("mm_vision_tower") or prismatic_fields(c).get("vision_backbone_id")
        named = f" (its config names {wanted})" if wanted else ""
        raise UserError(
            f"{directory}: holds no vision tower{named}; give the directory of that tower by --vision DIR, "
            "two of them by --vision DIR,DIR"
        )
    if paths and not lacks:
        raise UserError(
            f"{directory}: has its own vision tower; --vision is for presets ({', '.join(PRESETS)}) "
            "and for models published without"
        )
    cfg = read_config(directory, found, [read_tower(path) for path in paths])
    for part, path in zip(("vision", "vision2"), paths):
        found |= with_part(part, tower_tensors(read_tensors(path)))
    return cfg, fit_shapes(found, cfg), lora


def stored_dtype(found):
    words = found.get("decoder.embed_tokens.weight")  # load_strict says that they are missing
    return torch.float32 if words is None or words.dtype == torch.float64 else words.dtype


@torch.no_grad()
def fill_model(cfg, found, lora, source, device="cpu", dtype=torch.float32):
    """What read_model found -> VLM. A LoRA is merged, W + alpha/r B A in place of W, one matrix at a time."""
    with torch.device("meta"):
        vlm = VLM(cfg)
    load_strict(vlm, found, source, device, dtype)
    for name, (A, B, scale) in lora.items():
        weight = vlm.get_parameter(name)
        delta = scale * B.float() @ A.float()
        weight.copy_(weight.float() + delta.to(device))
    return vlm.eval()


def load_strict(module, found, source, device="cpu", dtype=torch.float32):
    """Fill every parameter from {our name: tensor}. Each is copied out of its mapped file to its device."""
    state = module.state_dict()
    missing = sorted(state.keys() - found.keys())
    unused = sorted(found.keys() - state.keys())
    if missing or unused:
        raise UserError(
            f"{source}: its tensors do not fit this architecture: {len(missing)} missing, {len(unused)} "
            f"unused, such as {(missing or unused)[0]}. Check config.json against the weights"
        )
    weights = {}
    for name, own in state.items():
        tensor = found[name]
        if tensor.shape != own.shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{tuple(own.shape)}; config and weights are of different models"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: tensor {name} is {kind}; only 16 bits or more can be read")
        weights[name] = torch.empty(tensor.shape, device=device, dtype=dtype).copy_(tensor)
    module.load_state_dict(weights, strict=True, assign=True)
    print(f"loaded {len(state)} tensors from {source}, 0 missing, 0 unused", file=sys.stderr)


def load_vision(vit, path):
    """A tower's directory or file, of any family, into a ViT; its positions are resized to the ViT's grid."""
    found = tower_tensors(read_tensors(path))
    if "pos" in found:
        found["pos"] = resize_positions(found["pos"], vit.cfg)
    load_strict(vit, found, path)


def load_decoder(decoder, directory):
    """A Llama, Mistral or InternLM2 directory into a decoder, which may have more words."""
    found = fit_shapes(our_names(read_tensors(directory)), replace(PRESETS["toy"], decoder=decoder.cfg))
    found = grow_words(found, decoder.cfg.vocab_size)
    load_strict(decoder, part_of("decoder", found), directory)


def load_connector(connector, path):
    """The connector of a whole model, or what stage 1 wrote, here or in the original code."""
    if not Path(path).exists():
        raise UserError(
            f"--projector {path}: no such model; give a directory that --stage pretrain wrote, "
            "its model.safetensors, or a mm_projector.bin"
        )
    found = part_of("connector", our_names(read_tensors(path)))
    if connector.row_end is not None:  # after a stage 1 without tiles: as it began
        found.setdefault("row_end", connector.row_end.detach())
    load_strict(connector, found, f"--projector {path}")


# ---- LoRA --------------------------------------------------------------------------------------------------


def is_lora(directory):
    return (Path(directory) / "adapter_config.json").exists()


def base_of(directory, llm=None):
    """The directory under a LoRA: --llm, or what adapter_config.json names, there or beside the LoRA."""
    directory = Path(directory)
    named = llm or read_json(directory / "adapter_config.json").get("base_model_name_or_path") or ""
    base = Path(named)
    if base.name:
        for place in base, directory / base.name, directory.parent / base.name:
            if place.is_dir():
                return place
    raise UserError(f"{directory}: is a LoRA over {named!r}, no directory here; give it by --llm DIR")


def tokenizer_home(directory, llm=None):
    """Where a model's tokenizer lies: in its own directory, or, of a LoRA without one, in its base's."""
    has_own = (Path(directory) / "tokenizer.model").exists()
    return Path(directory) if has_own or not is_lora(directory) else base_of(directory, llm)


def read_lora(directory, llm=None):
    """-> {our name: tensor} of the base and what was trained whole, {our name: (A, B, scale)} to be added."""
    base = base_of(directory, llm)
    found = our_names(read_tensors(base))
    extra = directory / "non_lora_trainables.bin"  # LLaVA's own code keeps the connector there
    if extra.exists():
        found |= our_names(open_weights(extra))

    file = directory / "adapter_config.json"
    with naming(file):
        c = read_json(file)
        only_values(c, bias="none", use_dora=False, use_rslora=False, fan_in_fan_out=False)
        scale = c["lora_alpha"] / c["r"]

    file = directory / "adapter_model.safetensors"
    adapter = our_names(open_weights(file if file.exists() else file.with_suffix(".bin")))
    lora = {}
    for name, tensor in adapter.items():
        target, is_pair, _ = name.partition(".lora_")
        if not is_pair:
            found[name] = tensor                                            # PEFT's modules_to_save
            continue
        A, B = adapter.get(f"{target}.lora_A"), adapter.get(f"{target}.lora_B")
        weight = found.get(f"{target}.weight")
        if A is None or B is None or weight is None or weight.shape != (len(B), A.shape[1]):
            raise UserError(f"{directory}: its LoRA of {target} does not fit {base}; give its base by --llm")
        lora[f"{target}.weight"] = A, B, scale
    return found, lora


@torch.no_grad()
def load_adapter(vlm, directory):
    """Put what save_adapter wrote back into a model that has such a LoRA and trains the same parts."""
    file = Path(directory) / "adapter_model.safetensors"
    found = our_names(open_weights(file))
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    for name in sorted(found.keys() | trained.keys()):
        if name not in found or name not in trained or found[name].shape != trained[name].shape:
            raise UserError(f"{file}: tensors do not fit, such as {name}; were --lora-r and --train others?")
    for name, p in trained.items():
        p.copy_(found[name])


# ---- config.json -------------------------------------------------------------------------------------------
# Absent fields, and null, mean the defaults of the code that a config was written by.

# Of a tower those of its class in transformers, InternViT's in its own code.
SIGLIP = VisionConfig(
    image_size=224, patch_size=16, n_embd=768, n_layer=12, n_head=12, n_hidden=3072,
    activation="gelu_tanh", norm_eps=1e-6, class_token=False, pre_norm=False, patch_bias=True,
    mean=HALF, std=HALF,
)  # fmt: skip
VIT = replace(SIGLIP, activation="gelu", norm_eps=1e-12, class_token=True)
DINOV2 = replace(VIT, patch_size=14, norm_eps=1e-6, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
TOWERS = {
    "clip_vision_model": VisionConfig(224, 32, n_embd=768, n_layer=12, n_head=12, n_hidden=3072),
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, patch_size=16, n_register=4),
    "intern_vit_6b": replace(
        DINOV2, n_embd=3200, n_layer=48, n_head=25, n_hidden=12800,
        final_norm=False, rms_norm=True, feature_layer=-1,
    ),  # fmt: skip
}
WITH_TEXT_TOWER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
DECODERS = {
    "llama": DecoderConfig(block_size=2048, norm_eps=1e-6),
    "mistral": DecoderConfig(n_kv_head=8, n_hidden=14336, block_size=131072, norm_eps=1e-6),
    "internlm2": DecoderConfig(vocab_size=103168, block_size=2048, norm_eps=1e-6),
}
CLIP_FIELDS = {                      # ours: public
    "image_size": "image_size",
    "patch_size": "patch_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_hidden": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "n_hidden": "intermediate_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}


def given_fields(c, names):
    """The fields that a public config gives, by {our name: its name}."""
    return {ours: c[theirs] for ours, theirs in names.items() if c.get(theirs) is not None}


def field_or(c, name, default):
    return default if c.get(name) is None else c[name]


def only_values(c, **supported):
    """Refuse what would be computed wrongly: of these fields just one value is implemented."""
    for name, value in supported.items():
        if c.get(name) not in (None, value):
            raise UserError(f"{name} is {c[name]!r}; only {value!r} is implemented")


@contextmanager
def naming(path):
    """Whatever is wrong with a config is said with its path in front."""
    with reading(path, "copy it anew"):
        try:
            yield
        except UserError as error:
            raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None


def config_json(directory):
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"{file}: not found, so {directory} is not a model directory; give one that is")
    return read_json(file)


def processor_json(directory):
    """How pictures are cut and normalised: preprocessor_config.json, or what transformers 5 writes."""
    file = Path(directory) / "preprocessor_config.json"
    if file.exists():
        return read_json(file)
    file = file.with_name("processor_config.json")
    with naming(file):
        return dict(read_json(file, {}).get("image_processor") or {})


def read_config(directory, found=None, towers=()):
    """config.json of any layout -> VLMConfig.

    found: {our name: tensor}, whose shapes say what some layouts leave unsaid; towers: VisionConfigs given.
    """
    c, processor = config_json(directory), processor_json(directory)
    read = find_reader(c, directory)
    with naming(Path(directory) / "config.json"):
        return read(c, processor, found or {}, towers)


def is_whole_model(c):
    """Whether a config.json is of a vision-language model, and not of a tower or a decoder alone."""
    return layout_of(c) in READERS


def layout_of(c):
    """A key of READERS, or the model_type of something else."""
    if "mm_hidden_size" in c or "mm_vision_tower" in c:
        return "original LLaVA"
    if prismatic_fields(c) is not c or c.get("model_type") in ("prismatic", "openvla"):
        return "Prismatic"
    return c.get("model_type")


def find_reader(c, directory):
    if not is_whole_model(c):
        raise UserError(
            f"{Path(directory) / 'config.json'}: model_type is {c.get('model_type')!r}; only "
            f"{', '.join(READERS)} can be opened. A language model alone goes to --llm, a tower to --vision"
        )
    return READERS[layout_of(c)]


def llava_hf_config(c, processor, found, towers):
    """transformers' llava and llava_next."""
    only_values(c, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    only_values(c["vision_config"], model_type="clip_vision_model")
    tower = vision_config(c["vision_config"], processor)
    crops = processor.get("do_center_crop") and not processor.get("do_pad")
    mode, tiling = picture_mode(c, tower.image_size, "crop" if crops else "pad")
    image = field_or(c, "image_token_id", field_or(c, "image_token_index", 32000))
    return VLMConfig(
        vision=replace(tower, feature_layer=field_or(c, "vision_feature_layer", -2), tiling=tiling),
        decoder=decoder_config(c["text_config"]),
        connector=field_or(c, "mm_projector_type", "mlp2x_gelu"),
        image_token=image,
        pad_token=field_or(c, "pad_token_id", image + 1),
        bos_token=field_or(c, "bos_token_id", 1),
        eos_token=field_or(c, "eos_token_id", 2),
        image_mode=mode,
        template=default_template(c),
    )


def original_llava_config(c, processor, found, towers):
    """liuhaotian/llava-*: a Llama's config with the fields mm_*. Its table may end before <image>."""
    only_values(c, mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False)
    tower, *_ = towers or towers_inside(found) or [VisionConfig()]
    mode, tiling = picture_mode(c, tower.image_size)
    return VLMConfig(
        vision=replace(tower, feature_layer=field_or(c, "mm_vision_select_layer", -2), tiling=tiling),
        decoder=decoder_config(c | {"model_type": "llama"}),
        connector=c.get("mm_projector_type") or "linear",
        image_mode=mode,
        template=default_template(c),
    )


def internvl_config(c, processor, found, towers):
    """OpenGVLab/InternVL2.5-*. <IMG_CONTEXT> is the third of the nine tokens at the end of the table."""
    only_values(c, ps_version="v2", downsample_ratio=0.5)
    tower = vision_config(c["vision_config"])
    decoder = decoder_config(c["llm_config"])
    mode, tiling = picture_mode(c, tower.image_size)
    return VLMConfig(
        vision=replace(
            tower,
            image_size=field_or(c, "force_image_size", tower.image_size),
            feature_layer=field_or(c, "select_layer", -1),
            merge=2,
            tiling=tiling,
        ),
        decoder=decoder,
        connector="norm_gelu",
        image_token=decoder.vocab_size - 7,
        pad_token=2,
        image_mode=mode,
        template=default_template(c),
    )


PRISMATIC_MODES = {"letterbox": "letterbox", "resize-naive": "resize", "resize-crop": "crop"}


def prismatic_config(c, processor, found, towers):
    """TRI-ML/prismatic-vlms name their parts; the sizes are in the tensors."""
    c = prismatic_fields(c)
    tower_id, llm_id, arch = c["vision_backbone_id"], c["llm_backbone_id"], c["arch_specifier"]
    if not llm_id.startswith(("vicuna", "llama2", "mistral")):
        raise UserError(f"llm_backbone_id is {llm_id!r}; only vicuna, llama2 and mistral are implemented")
    if not found:
        raise UserError("its sizes are in its weights, which are not here")

    # One tower, or DINOv2 beside SigLIP or CLIP. Every tower runs with the exact GELU but CLIP alone.
    is_fused = "dinosiglip" in tower_id or "dinoclip" in tower_id
    towers = towers or towers_inside(found)
    if len(towers) != 1 + is_fused:
        takes = "two towers, DINOv2 first: --vision DIR,DIR" if is_fused else "one tower: --vision DIR"
        raise UserError(f"vision_backbone_id {tower_id!r} takes {takes}")
    size = re.search(r"(\d+)px", tower_id)
    towers = [
        replace(
            tower,
            image_size=int(size[1]) if size else 224,
            feature_layer=-2,
            activation="quick_gelu" if tower.pre_norm and not is_fused else "gelu",
        )
        for tower in towers
    ]
    connector = "fused_gelu" if arch.endswith("fused-gelu-mlp") else "mlp2x_gelu"
    return VLMConfig(
        vision=towers[0],
        vision2=towers[1] if is_fused else None,
        decoder=decoder_by_shapes(part_of("decoder", found)),
        connector="linear" if arch == "linear" else connector,
        image_token=32001,
        pad_token=32000,
        image_mode=PRISMATIC_MODES[c["image_resize_strategy"]],
        template=default_template(c),
    )


def own_config(c, processor, found, towers):
    """What VLM.save_pretrained writes where no public layout holds the model."""

    def tower(fields):
        return VisionConfig(**fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    c = {name: value for name, value in c.items() if name not in ("model_type", "dtype")}
    c["vision"] = tower(c["vision"])
    c["vision2"] = tower(c["vision2"]) if c["vision2"] else None
    c["decoder"] = DecoderConfig(**c["decoder"])
    return VLMConfig(**c)


READERS = {
    "llava": llava_hf_config,
    "llava_next": llava_hf_config,
    "original LLaVA": original_llava_config,
    "internvl_chat": internvl_config,
    "Prismatic": prismatic_config,
    "plainvlm": own_config,
}


# ---- the parts' configs ------------------------------------------------------------------------------------


def read_tower(path):
    """A tower's directory or file -> VisionConfig: by config.json, or by its shapes where it is timm's."""
    path = Path(path)
    c = {} if path.is_file() else config_json(path)
    with naming(path):
        if "model_type" in c or "vision_config" in c:
            return vision_config(c, processor_json(path))
        return tower_by_shapes(tower_tensors(read_tensors(path)))


def vision_config(c, processor=None):
    """config.json of a tower, alone or in a larger model's, and of its image processor -> VisionConfig."""
    processor = processor or {}
    inner = c.get("vision_config") or c
    kind = inner.get("model_type") or c.get("model_type") or "clip"
    kind = WITH_TEXT_TOWER.get(kind, kind)
    if kind not in TOWERS:
        raise UserError(f"model_type is {kind!r}; only {', '.join(TOWERS)} are implemented")
    base = TOWERS[kind]
    found = given_fields(inner, CLIP_FIELDS)
    if found.get("activation") == "gelu_pytorch_tanh":
        found["activation"] = "gelu_tanh"

    only_values(inner, use_swiglu_ffn=False)
    if kind == "intern_vit_6b":  # 6B has RMS norms and no bias, 300M has not
        is_rms = inner.get("norm_type", "rms_norm") == "rms_norm"
        only_values({"qk_normalization": True, **inner}, qkv_bias=not is_rms, qk_normalization=is_rms)
        found["rms_norm"] = is_rms
    else:
        only_values(inner, qkv_bias=True)
    if kind.startswith("dinov2"):
        found["n_hidden"] = found.get("n_embd", base.n_embd) * (inner.get("mlp_ratio") or 4)
    if base.n_register:
        found["n_register"] = inner.get("num_register_tokens") or base.n_register
    for ours, theirs in ("mean", "image_mean"), ("std", "image_std"):
        if processor.get(theirs):
            found[ours] = tuple(processor[theirs])
    return replace(base, **found)


def decoder_config(c):
    """config.json of a Llama, Mistral or InternLM2 -> DecoderConfig."""
    kind = c.get("model_type", "llama")
    if kind not in DECODERS:
        raise UserError(f"model_type is {kind!r}; only {', '.join(DECODERS)} are implemented")
    only_values(c, hidden_act="silu", attention_bias=False, mlp_bias=False, bias=False)
    rope = (c.get("rope_parameters") or {}) | (c.get("rope_scaling") or {})
    if "dynamic" not in rope.values():  # changes nothing up to the longest sequence
        only_values(rope, rope_type="default", type="default")

    base = DECODERS[kind]
    found = given_fields(c, LLAMA_FIELDS) | given_fields(rope, {"rope_theta": "rope_theta"})
    n_head = found.setdefault("n_head", base.n_head)
    found.setdefault("n_kv_head", base.n_kv_head if kind == "mistral" else n_head)
    found.setdefault("head_dim", found.get("n_embd", base.n_embd) // n_head)
    if kind == "mistral":  # one window; null: none, as in v0.2
        longest = found.get("block_size", base.block_size)
        found["block_size"] = min(longest, c.get("sliding_window", 4096) or longest)
    return replace(base, **found, tied=c.get("tie_word_embeddings") is True)


def towers_inside(found):
    return [tower_by_shapes(part_of(part, found)) for part in ("vision", "vision2") if part_of(part, found)]


def tower_by_shapes(tensors):
    """Our named tensors of a tower in timm's layout, which brings no numbers of its own -> VisionConfig.

    Heads are 64 wide, 72 in SO400M. Families differ by what they have: a norm before the blocks is CLIP,
    layer-scale DINOv2, no class token SigLIP, and none of these the ImageNet ViT.
    """
    shape = {name: tensor.shape for name, tensor in tensors.items()}
    if not {"patch.weight", "pos", "blocks.0.mlp.fc1.weight"} <= shape.keys():
        raise UserError("holds no tower: no patch embedding, position table or blocks under any known name")
    is_clip, is_dino = "pre_norm.weight" in shape, "blocks.0.scale1" in shape
    has_class = "class_token" in shape
    D, patch_size = shape["patch.weight"][0], shape["patch.weight"][-1]
    mean, std = HALF, HALF
    if is_clip:
        mean, std = CLIP_MEAN, CLIP_STD
    elif is_dino:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return VisionConfig(
        image_size=patch_size * math.isqrt(shape["pos"][0] - has_class),
        patch_size=patch_size,
        n_embd=D,
        n_layer=count_blocks(tensors, "blocks."),
        n_head=16 if D == 1152 else max(1, D // 64),
        n_hidden=shape["blocks.0.mlp.fc1.weight"][0],
        activation="quick_gelu" if is_clip else "gelu",
        norm_eps=1e-5 if is_clip else 1e-6,
        class_token=has_class,
        n_register=shape["registers"][0] if "registers" in shape else 0,
        pre_norm=is_clip,
        patch_bias="patch.bias" in shape,
        layer_scale=is_dino,
        mean=mean,
        std=std,
    )


def decoder_by_shapes(tensors):
    """Our named tensors of a Llama -> DecoderConfig; heads are 128 wide."""
    if "embed_tokens.weight" not in tensors:
        raise UserError(
            "its checkpoint holds no language model; after the align stage it has only a connector, "
            "which goes to --projector"
        )
    V, D = tensors["embed_tokens.weight"].shape
    return DecoderConfig(
        vocab_size=V,
        n_layer=count_blocks(tensors, "layers."),
        n_head=D // 128,
        n_kv_head=len(tensors["layers.0.self_attn.k_proj.weight"]) // 128,
        n_embd=D,
        n_hidden=len(tensors["layers.0.mlp.gate_proj.weight"]),
    )


def count_blocks(tensors, start):
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith(start))


# ---- pictures and templates --------------------------------------------------------------------------------


def picture_mode(c, S, default="pad"):
    """Any config.json, side of its tile -> image mode, and its Tiling where that is not the mode's usual."""
    kind = c.get("model_type")
    is_original = "mm_hidden_size" in c
    mode = c.get("image_aspect_ratio") or ("square" if is_original else default)
    if kind == "internvl_chat":
        mode = "internvl" if c.get("dynamic_image_size") else "resize"
        low, high = c.get("min_dynamic_patch") or 1, c.get("max_dynamic_patch") or 6
        grids = tuple((columns, rows) for columns, rows in grids_up_to(high) if columns * rows >= low)
        view = "last" if c.get("use_thumbnail") else "none"
        tiling = replace(TILINGS["internvl"], grids=grids, global_view=view)
    elif kind == "llava_next" or mode == "anyres" and is_original:
        mode = "anyres"
        tiling = replace(TILINGS["anyres"], grids=next_grids(c, S))
    else:
        return ("crop" if mode == "square" else mode), None
    return mode, None if mode in SQUARE_MODES or tiling == TILINGS[mode] else tiling


def next_grids(c, S):
    """LLaVA-NeXT's image_grid_pinpoints -> (columns, rows) of tiles.

    They are pixels, which the original reads as (width, height) and transformers as (height, width): of
    equally good grids the two take another one.
    """
    if c.get("model_type") != "llava_next" and c.get("mm_patch_merge_type") != "spatial_unpad":
        raise UserError("mm_patch_merge_type is not spatial_unpad, the only one that is implemented")
    sizes = c.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    if any(a % S or b % S for a, b in sizes):
        raise UserError(f"image_grid_pinpoints are {sizes}; must be whole multiples of the tower's {S} px")
    if c.get("model_type") == "llava_next":
        return tuple((width // S, height // S) for height, width in sizes)
    return tuple((width // S, height // S) for width, height in sizes)


def default_template(c):
    """The conversation template that a model was trained with, by the fields of its config.json.

    LLaVA with one linear layer is taken for v1 on Vicuna: its config does not tell that from v0 or
    Llama-2-chat, which need --template.
    """
    if c.get("template"):  # InternVL writes it down, and so do we
        return c["template"]
    llm_id = prismatic_llm(c)
    if llm_id:  # vicuna-v15-7b, llama2-7b-pure, llama2-13b-chat
        if llm_id.startswith("vicuna"):
            return "prism_vicuna"
        kind = llm_id.split("-")[-1]
        return {"pure": "prism_pure", "chat": "prism_llama_2", "instruct": "prism_mistral"}.get(kind, llm_id)
    if str(c.get("model_type")).startswith("intern"):
        return "internvl2_5"
    is_linear = c.get("mm_projector_type", "linear") == "linear"
    return "llava_v1" if "mm_hidden_size" in c and is_linear else "vicuna_v1"


def prismatic_fields(c):
    """Where a config of Prismatic's has its fields: in "model", or in the HF layout at the top."""
    return c["model"] if isinstance(c.get("model"), dict) else c


def prismatic_llm(c):
    """Prismatic's name of its language model; None where the config is not Prismatic's."""
    return prismatic_fields(c).get("llm_backbone_id")


def check_tokenizer(vlm, tok):
    """A tokenizer and a model that do not belong together would fail deep inside, or not at all."""
    words, image = vlm.cfg.decoder.vocab_size, vlm.cfg.image_token
    if tok.n_text > words or tok.image != image:
        raise UserError(
            f"{tok.path}: has {tok.n_text:,} pieces and <image> at {tok.image:,}, the model an embedding of "
            f"{words:,} rows and <image> at {image:,}; they are of different models"
        )


def check_image_mode(vlm, mode, directory):
    tiling = find_tiling(vlm.cfg.vision, mode)
    if tiling and tiling.row_end and vlm.connector.row_end is None:
        raise UserError(
            f"--image-mode {mode}: {directory} has never learned how the rows of several tiles end; "
            "finetune it with this mode first"
        )
