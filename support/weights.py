"""Public weights -> a model: each layout's names, and strict loading.

    files      --read_tensors-->  {public name: tensor}, memory-mapped: nothing is read before it is used
    names      --our_parts-->     {part: {our name: tensor}} by the tables below
    config     --read_config-->   VLMConfig: support/configs.py
    shapes     --fit_tower, fit_decoder-->  positions resized to the model's grid, InternLM2's wqkv in three
    a VLM      --load_strict-->   filled; a tensor missing, unused or of another shape is an error

    vlm = VLM.from_pretrained(DIR, vision="DIR,DIR", llm=DIR)               # calls load_model

Layouts: llava-hf and LLaVA-NeXT (transformers), the original LLaVA and its LoRA, Prismatic (native, and as
OpenVLA wrote it), InternVL2.5, and plainvlm's own. Towers alone: CLIP, SigLIP, DINOv2, ViT and InternViT, in
the names of transformers and timm. Decoders alone: Llama, Mistral, InternLM2.
The way back, from our names to public ones, is support/export.py.
"""

import math
import re
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from model import VLM
from support.cli import UserError
from support.configs import (
    check_tower,
    config_json,
    only_values,
    processor_json,
    read_config,
    tower_by_shapes,
    vision_config,
)
from support.io import fingerprint, read_json, reading
from support.lora import merge_weight
from support.quantize import use_int8

# ---- names: public to ours ---------------------------------------------------------------------------------
# Rows apply in order, and wherever they fit. ^ is the beginning of a name, or where a row puts it.

CLIP_NAMES = {                       # and SigLIP, in transformers
    "^embeddings.patch_embedding.": "^patch.",
    "^embeddings.class_embedding": "^class_token",
    "^embeddings.position_embedding.weight": "^pos",
    "^pre_layrnorm.": "^pre_norm.",  # misspelled in the original
    "^post_layernorm.": "^norm.",
    "^encoder.layers.": "^blocks.",
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
DINO_NAMES = {                       # DINOv2's, in transformers
    "^embeddings.patch_embeddings.projection.": "^patch.",
    "^embeddings.cls_token": "^class_token",
    "^embeddings.register_tokens": "^registers",
    "^embeddings.position_embeddings": "^pos",
    "^layernorm.": "^norm.",
    "^encoder.layer.": "^blocks.",
    ".attention.attention.query.": ".attn.q_proj.",
    ".attention.attention.key.": ".attn.k_proj.",
    ".attention.attention.value.": ".attn.v_proj.",
    ".attention.output.dense.": ".attn.out_proj.",
    ".layer_scale1.lambda1": ".scale1",
    ".layer_scale2.lambda1": ".scale2",
}
TOWER_NAMES = {                      # however deep it lies
    "^vision_tower.": "^",
    "^vision_model.": "^",
    "^vit.": "^",
} | CLIP_NAMES | DINO_NAMES | {
    # the ImageNet ViT, in transformers
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    # any tower as timm writes it, and so Prismatic
    "^patch_embed.proj.": "^patch.",
    "^cls_token": "^class_token",
    "^reg_token": "^registers",
    "^pos_embed": "^pos",
    "^norm_pre.": "^pre_norm.",
    ".attn.proj.": ".attn.out_proj.",
    ".ls1": ".scale1",               # InternViT's alone, in timm .ls1.gamma, of OpenVLA .ls1.scale_factor
    ".ls2": ".scale2",
    ".gamma": "",
    ".scale_factor": "",
    # InternViT, where it is called neither as CLIP nor as timm calls it
    "^embeddings.position_embedding": "^pos",
}
QKV = ("q_proj", "k_proj", "v_proj")     # what some files have in one matrix
# What files hold beyond the model: of towers what is not used here; what is computed, not learned.
UNUSED = re.compile(
    r"(^|\.)(text_model|text_projection|visual_projection|logit_scale|logit_bias"
    r"|head|attn_pool|pooler|classifier|fc_norm|mask_token|position_ids|inv_freq)\b"
)
# Where the parts of a whole model are, after a leading "model." and PEFT's "base_model.model." were dropped.
PART_NAMES = {
    # llava-hf, in all the ways that transformers has named it
    "^vision_tower.": "vision.",
    "^multi_modal_projector.": "connector.",
    "^image_newline": "connector.row_end",
    "^language_model.": "decoder.",
    # Prismatic: native, in the layout of Hugging Face, or both
    "^vision_backbone.featurizer.": "vision.",
    "^vision_backbone.dino_featurizer.": "vision.",
    "^vision_backbone.siglip_featurizer.": "vision2.",
    "^vision_backbone.clip_featurizer.": "vision2.",
    "^vision_backbone.fused_featurizer.": "vision2.",
    "^llm_backbone.llm.": "decoder.",
    "^projector.projector.": "connector.layers.",
    "^projector.fc": "connector.linear_",
    # the original LLaVA, in which a single layer has no number
    "^mm_projector.weight": "connector.layers.0.weight",
    "^mm_projector.bias": "connector.layers.0.bias",
    "^mm_projector.": "connector.layers.",
    # InternVL, whose decoder is called as in llava-hf
    "^vision_model.": "vision.",
    "^mlp1.0.": "connector.norm.",
    "^mlp1.1.": "connector.layers.0.",
    "^mlp1.3.": "connector.layers.2.",
    # Of linear layers we count the GELUs between them, too, as LLaVA does.
    "connector.linear_1.": "connector.layers.0.",
    "connector.linear_2.": "connector.layers.2.",
    "connector.linear_3.": "connector.layers.4.",
    # our own layout
    "^vision": "vision",
    "^connector.": "connector.",
    "^decoder.": "decoder.",
    # What is left is a decoder's own, alone or in the original LLaVA.
    "^": "decoder.",
    # PEFT
    ".lora_A.weight": ".lora_A",
    ".lora_B.weight": ".lora_B",
    # Llama, Mistral and Vicuna call everything as we do, but for a "model." in front
    "decoder.model.": "decoder.",
    # InternLM2, whose wqkv is taken apart in fit_decoder
    "decoder.tok_embeddings.": "decoder.embed_tokens.",
    "decoder.output.": "decoder.lm_head.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


def rename(name, table):
    name = "^" + name
    for old, new in table.items():
        name = name.replace(old, new)
    return name.replace("^", "")


def our_parts(tensors):
    """{public name: tensor} of a whole model, or any part but a tower alone -> {part: {our name: tensor}}."""
    parts = defaultdict(dict)
    for public, tensor in tensors.items():
        name = re.sub(r"^(base_model\.)?(model\.)*", "", public)
        part, _, inner = rename(name, PART_NAMES).partition(".")
        parts[part][inner] = tensor
    for part in "vision", "vision2":
        parts[part] = tower_tensors(parts[part])
    return parts


def tower_tensors(tensors):
    """{public name: tensor} of a tower of any family -> {our name: tensor}.

    timm and InternViT fuse q, k and v: here they are cut in three.
    """
    found = {}
    for public, tensor in tensors.items():
        name = rename(public, TOWER_NAMES)
        if name == "class_token":
            tensor = tensor.flatten()                                       # (1, 1, D) -> (D,)
        if name in ("registers", "pos"):
            tensor = tensor.flatten(0, -2)                                  # (1, N, D) -> (N, D)
        if ".attn.qkv." in name:
            for own, third in zip(QKV, tensor.chunk(3)):
                found[name.replace("qkv", own)] = third
        else:
            found[name] = tensor
    return found


# ---- shapes ------------------------------------------------------------------------------------------------


def fit_tower(tensors, cfg, is_timm=False):
    """Give a tower's position table the grid of its config: bicubic, in float32. The class token's row stays.

    timm folds that row into the token itself: then it is zeros here. With antialiasing, as timm does for all;
    of transformers' towers DINOv2 without registers and InternViT do without.
    """
    pos = tensors["pos"]
    n_class, side = int(cfg.class_token), math.isqrt(len(pos))
    lacking = pos.new_zeros(n_class + side**2 - len(pos), pos.shape[1])
    pos = torch.cat([lacking, pos])
    if side != cfg.grid:
        smooth = is_timm or not cfg.layer_scale or cfg.n_register > 0
        pos = pos.float()
        table = pos[n_class:].T.unflatten(1, (side, side))                  # (D, side, side)
        table = F.interpolate(table[None], cfg.grid, mode="bicubic", antialias=smooth)
        pos = torch.cat([pos[:n_class], table[0].flatten(1).T])
    tensors["pos"] = pos


def fit_decoder(tensors, cfg):
    """Take InternLM2's q, k and v apart, and a decoder without a head its embedding as one.

    InternLM2's rows lie by key-value head: its queries, its key, its value.
    """
    group = cfg.n_head // cfg.n_kv_head
    for name in [name for name in tensors if ".attention.wqkv." in name]:
        heads = tensors.pop(name).view(cfg.n_kv_head, group + 2, cfg.head_dim, -1)
        for own, rows in zip(QKV, heads.split((group, 1, 1), dim=1)):
            tensors[name.replace("attention.wqkv", f"self_attn.{own}")] = rows.flatten(0, 2)
    if cfg.head_from_embedding:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])


def grow_words(tensors, n_row):
    """Both tables of a decoder's words get more rows (<image>, <pad>), the mean of the others."""
    for name in {"embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        table = tensors[name]
        mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
        tensors[name] = torch.cat([table, mean.expand(n_row - len(table), -1)])


# ---- files -------------------------------------------------------------------------------------------------

FILES = ("model.safetensors", "pytorch_model.bin", "checkpoints/latest-checkpoint.pt", "mm_projector.bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(path):
    """The files with all weights: the path itself, or what its directory holds, one or the shards; of a LoRA
    its own."""
    path = Path(path)
    if path.is_file():
        return [path]
    for name in ADAPTERS + FILES:
        index = path / f"{name}.index.json"
        if index.exists():
            with reading(index):
                return [path / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
        if (path / name).exists():
            beside = path / "non_lora_trainables.bin"                       # what LLaVA trains with a LoRA
            return [path / name, beside] if beside.exists() else [path / name]
    return []


def read_tensors(path):
    """All weights of a file or a directory that are of use: {public name: mapped tensor}."""
    files = weight_files(path)
    if not files:
        raise UserError(f"{path}: holds none of {', '.join(FILES + ADAPTERS)}; copy the weights there")
    tensors = {}
    for file in files:
        tensors |= open_weights(file)
    return {name: tensor for name, tensor in tensors.items() if not UNUSED.search(name)}


def open_weights(file):
    """{public name: tensor} of a .safetensors, .bin or .pt file, memory-mapped."""
    with reading(file, "get a file from its authors that holds no more than tensors"):
        file.open("rb").close()          # safetensors says that a file is not there when it may not be read
        if file.suffix == ".safetensors":
            return load_file(file)
        is_zip = zipfile.is_zipfile(file)  # before 2020 torch wrote none: read whole
        return flatten(torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip))


def read_parts(path):
    """All weights of a model, or of any part but a tower alone -> {part: {our name: tensor}}."""
    return our_parts(read_tensors(path))


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


def newest_run(root="out"):
    """The model directory under out/ that was finished last: its config is the last file a run writes."""
    finished = [*Path(root).glob("*/config.json"), *Path(root).glob("*/plainvlm.json")]
    if not finished:
        raise UserError(
            f"no finished run under {root}/; train one (python train.py --stage finetune), or give "
            "--model DIR, such as the checkpoint-N of an unfinished one"
        )
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent)


def load_model(directory, device, dtype, vision, llm, int8):
    """A directory of any layout -> VLM.

    dtype None: as the words are stored, but bfloat16 for float16 on a CPU, which is slower at that.
    int8: the decoder's matrices in 8 bits (support/quantize.py).
    """
    if int8 and is_lora(directory):
        raise UserError(f"{directory}: merge the LoRA first: python -m tools.weights convert {directory} DIR")
    cfg, parts = read_model(directory, vision, llm)
    if dtype is None:
        dtype = stored_dtype(parts)
        if dtype == torch.float16 and torch.device(device).type == "cpu":
            dtype = torch.bfloat16
    return fill_model(cfg, parts, directory, dtype, device, int8)


def read_model(directory, vision, llm):
    """A directory of any layout -> VLMConfig, mapped tensors (our_parts), a LoRA's among them.

    vision: DIR or DIR,DIR, towers of a model that was published without; llm: what a LoRA was trained over.
    """
    paths = vision.split(",") if vision else []
    with reading(directory, "look at its files and config.json"):
        config_json(directory)           # first: an error where it is lacking
        parts = read_parts(directory)
        if is_lora(directory):           # over its base, and so is what was trained whole beside it
            trained, parts = parts, read_parts(base_of(directory, llm))
            for part in trained:
                parts[part] |= trained[part]
        elif llm:
            raise UserError("is a whole model; --llm is for presets, and for the base of a LoRA")

        if paths and parts["vision"]:
            raise UserError("has its own vision tower; --vision is for presets and models published without")
        cfg = read_config(directory, parts, [read_tower(path) for path in paths])
        for part, tower in ("vision", cfg.vision), ("vision2", cfg.vision2):
            if paths:
                parts[part] = read_fitted(paths.pop(0), tower)
            elif "pos" in parts[part]:
                fit_tower(parts[part], tower)
        fit_decoder(parts["decoder"], cfg.decoder)
    return cfg, parts


def stored_dtype(parts):
    # Without words load_strict says that they are missing.
    return parts["decoder"].get("embed_tokens.weight", torch.empty(0)).dtype


class NothingDrawn(TorchFunctionMode):
    """On the meta device no normal numbers are drawn: PyTorch would import its compiler for that, which costs
    a second and 75 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def fill_model(cfg, parts, source, dtype, device="cpu", int8=False):
    """What read_model found -> VLM, a LoRA merged into one matrix at a time."""
    with reading(source), torch.device("meta"), NothingDrawn():
        vlm = VLM(cfg)
    found = flatten(parts)
    lora = {name: found.pop(name) for name in list(found) if ".lora_" in name}
    if is_lora(source) and not lora:
        raise UserError(f"{source}: no LoRA lies beside adapter_config.json; copy {ADAPTERS[0]} there")
    alpha = lora_alpha(source) if lora else 0
    load_strict(vlm, found, source, device, dtype, int8)
    for name, A in lora.items():
        if name.endswith(".lora_B"):
            continue
        target = name.replace(".lora_A", ".weight")
        with reading(source, f"its LoRA of {target} does not fit; give its base by --llm"):
            weight, B = vlm.get_parameter(target), lora[name.replace(".lora_A", ".lora_B")]
            weight.copy_(merge_weight(weight, A, B, alpha / len(A)))        # A has a row for each rank
    return vlm.eval()


@torch.no_grad()
def load_strict(module, found, source, device="cpu", dtype=torch.float32, int8=False):
    """Fill every parameter from {our name: tensor}. Each is copied out of its mapped file to its device."""
    own = module.state_dict()
    check_fit(own, found, source)
    if torch.device(device).type == "meta":
        return
    module.load_state_dict(found, assign=True)                              # mapped still
    if int8:
        use_int8(module.decoder.layers, device)
    for p in module.parameters():
        p.data = torch.empty(p.shape, device=device, dtype=dtype).copy_(p)
    print(f"loaded {len(own)} tensors from {source}, 0 missing, 0 unused", file=sys.stderr)


def check_fit(own, found, source):
    """{name: tensor} of a module, and what was found for it: the same names and shapes?"""
    missing = sorted(own.keys() - found.keys())
    unused = sorted(found.keys() - own.keys())
    if missing or unused:
        raise UserError(
            f"{source}: its tensors do not fit this architecture: {len(missing)} missing, {len(unused)} "
            f"unused, such as {(missing or unused)[0]}. Check config.json against the weights"
        )
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{tuple(own[name].shape)}; config and weights are of different models"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(f"{source}: tensor {name} is {tensor.dtype}; only 16 bits or more can be read")


# ---- parts of a preset, and what may be wrong with a choice ------------------------------------------------


def read_tower(path):
    """A tower's directory or file -> VisionConfig: by config.json, or by its shapes where it is timm's."""
    c = {} if Path(path).is_file() else config_json(path)
    with reading(path):
        if "model_type" in c or "vision_config" in c:
            cfg = vision_config(c, processor_json(path))
        else:
            cfg = tower_by_shapes(tower_tensors(read_tensors(path)))
        return check_tower(cfg)


def load_vision(vit, path):
    """A tower's directory or file, of any family, into a ViT; its positions are resized to the ViT's grid."""
    load_strict(vit, read_fitted(path, vit.cfg), path)


def read_fitted(path, cfg):
    """A tower's directory or file -> {our name: tensor}, for the grid of this VisionConfig."""
    with reading(path):
        public = read_tensors(path)
        found = tower_tensors(public)
        fit_tower(found, cfg, is_timm="pos_embed" in public)
        return found


def load_decoder(decoder, directory):
    """A Llama, Mistral or InternLM2 directory into a decoder, which may have more words."""
    with reading(directory):
        found = read_parts(directory)["decoder"]
        fit_decoder(found, decoder.cfg)
        grow_words(found, decoder.cfg.vocab_size)
    load_strict(decoder, found, directory)


def load_connector(connector, path, device="cpu"):
    """The connector of a whole model, or what stage 1 wrote, here or in the original code."""
    with reading(path, "give what --stage pretrain wrote, or a mm_projector.bin"):
        found = read_parts(path)["connector"]
    if connector.row_end is not None:  # after a stage 1 without tiles: as it began
        found.setdefault("row_end", connector.row_end.detach())
    load_strict(connector, found, f"--projector {path}", device)


def check_tokenizer(vlm, tok):
    """A tokenizer and a model that do not belong together would fail deep inside, or not at all."""
    words, image = vlm.cfg.decoder.vocab_size, vlm.cfg.image_token
    if tok.n_text > words or tok.image != image:
        raise UserError(
            f"{tok.path}: has {tok.n_text:,} pieces and <image> at {tok.image:,}, the model an embedding of "
            f"{words:,} rows and <image> at {image:,}; they are of different models"
        )


def check_image_mode(vlm, directory):
    if vlm.cfg.ends_rows and vlm.connector.row_end is None:
        raise UserError(
            f"--image-mode {vlm.cfg.image_mode}: {directory} has never learned how the rows of several tiles "
            "end; finetune it with this mode first"
        )


# ---- LoRA --------------------------------------------------------------------------------------------------


def is_lora(directory):
    return (Path(directory) / "adapter_config.json").exists()


def base_of(directory, llm=None):
    """The directory under a LoRA: --llm, or what adapter_config.json names, beside the LoRA or elsewhere.

    Ours know their base by its fingerprint: another model in its place is not taken for it.
    """
    if llm:
        return Path(llm)
    directory = Path(directory)
    named = read_json(directory / "adapter_config.json").get("base_model_name_or_path") or "a model unnamed"
    wanted = read_json(directory / "plainvlm.json", {}).get("base_fingerprint")
    base = Path(named)
    for place in directory / base.name, directory.parent / base.name, base:
        files = weight_files(place)
        if files and wanted in (None, fingerprint(files)):
            return place
    raise UserError(f"{directory}: is a LoRA over {named!r}, which is not here, or is another model by now; "
                    "put it back, or give it by --llm DIR")


def model_files(directory, llm=None):
    """All files of weights that answers depend on: of a LoRA its own, and those of its base."""
    base = weight_files(base_of(directory, llm)) if is_lora(directory) else []
    return weight_files(directory) + base


def tokenizer_home(directory, llm=None):
    """Where a model's tokenizer lies: in its own directory, else in --llm or a LoRA's base."""
    directory = Path(directory)
    if (directory / "tokenizer.model").exists() or not (llm or is_lora(directory)):
        return directory
    return base_of(directory, llm)


def lora_alpha(directory):
    file = Path(directory) / "adapter_config.json"
    with reading(file):
        c = read_json(file)
        only_values(c, bias="none", use_dora=False, use_rslora=False, fan_in_fan_out=False, alpha_pattern={})
        return float(c["lora_alpha"])


def load_adapter(vlm, directory):
    """Put what save_adapter wrote back into a model that has such a LoRA and trains the same parts."""
    found = flatten(read_parts(directory))
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    check_fit(trained, found, directory)
    vlm.load_state_dict(found, strict=False)
