"""support.weights: moved here; to be rewritten."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
import json
import math
import pickle
import re
import sys
import zipfile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import torch
import torch.nn.functional as F

from model import DecoderConfig, IGNORE, PRESETS, VLMConfig
from support.cli import UserError
from support.io import write_json, write_whole
from vision import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, SQUARE_MODES, TILINGS, VisionConfig, find_tiling, grids_up_to



# Our names -> the public ones of CLIP: (start of a name, or an inner part when it begins with a dot, what it becomes).
CLIP_NAMES = [
    ("patch.", "embeddings.patch_embedding."), ("class_token", "embeddings.class_embedding"),
    ("pos", "embeddings.position_embedding.weight"), ("pre_norm.", "pre_layrnorm."), ("norm.", "post_layernorm."),
    ("blocks.", "encoder.layers."), (".attn.", ".self_attn."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
]



def rename(name, table):
    """Translate one tensor name by a table such as CLIP_NAMES."""
    for ours, theirs in table:
        if ours.startswith("."):
            name = name.replace(ours, theirs)
        elif name.startswith(ours):
            return rename(theirs + name[len(ours) :], [row for row in table if row[0].startswith(".")])
    return name



# Public names -> ours, of every family of towers, applied in this order. Names that match nothing stay as they are and count as unused.
TOWER_NAMES = [
    # CLIP, SigLIP | DINOv2, ViT, InternViT | timm | OpenAI
    (r"^(embeddings\.patch_embedding|embeddings\.patch_embeddings\.projection|patch_embed\.proj|conv1)\.", "patch."),
    (r"^(embeddings\.class_embedding|embeddings\.cls_token|cls_token|class_embedding)$", "class_token"),
    (r"^(embeddings\.register_tokens|reg_token|register_tokens)$", "registers"),
    (r"^(embeddings\.position_embeddings?(\.weight)?|pos_embed|positional_embedding)$", "pos"),
    (r"^(pre_layrnorm|norm_pre|ln_pre)\.", "pre_norm."),
    (r"^(post_layernorm|layernorm|ln_post)\.", "norm."),
    (r"^(encoder\.layers?|transformer\.resblocks)\.", "blocks."),
    (r"\.(layer_norm|ln_)([12])\.", r".norm\2."), (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1_proj."), (r"\.self_attn\.", ".attn."),
    (r"\.(attention\.output\.dense|attn\.proj)\.", ".attn.out_proj."), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.(intermediate\.dense|mlp\.c_fc)\.", ".mlp.fc1."), (r"\.(output\.dense|mlp\.c_proj)\.", ".mlp.fc2."),
    (r"\.(layer_scale|ls)([12])(\.lambda1|\.gamma|\.scale_factor)?$", r".scale\2"),
]
# What belongs to these files and not to the tower as it is used here.
TOWER_UNUSED = (r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias|text)\b|^(head|attn_pool|pooler|classifier|fc_norm|proj)\b|"
                r"mask_token|position_ids")



def tower_tensors(tensors, cfg=None):
    """{public name: tensor still in its file} of any family -> {our name: the same, cut to our shapes}. Positions are resized to cfg's grid.

    Fused q, k, v (timm, OpenAI, InternViT) are cut in three. A position table without a row for the class token (timm folds that row
    into the token itself) gets a row of zeros.
    """
    for prefix in "vision_model.", "vision_tower.", "visual.", "vit.":       # a file of two towers: what lies outside the prefix is the text tower
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    found = {}
    for name, t in tensors.items():
        name = name.removeprefix("trunk.")                                  # open_clip around timm
        if re.search(TOWER_UNUSED, name):
            continue
        for pattern, ours in TOWER_NAMES:
            name = re.sub(pattern, ours, name)
        if ".attn.qkv." in name:
            for i, one in enumerate(("q_proj", "k_proj", "v_proj")):
                found[name.replace("qkv", one)] = t.cut(lambda x, i=i: x.chunk(3)[i])
        elif name in ("class_token", "registers", "pos"):
            end = -1 if name == "class_token" else -2                        # (1, 1, D) -> (D,); (1, N, D) -> (N, D)
            found[name] = t.cut(lambda x, end=end: x.flatten(0, end)) if len(t.shape) > 1 else t
        else:
            found[name] = t
    pos = found.get("pos")
    if pos is not None and len(pos.shape) == 2 and "class_token" in found and math.isqrt(pos.shape[0]) ** 2 == pos.shape[0]:
        pos = found["pos"] = pos.cut(lambda x: F.pad(x, (0, 0, 1, 0)))
    if cfg and pos is not None and len(pos.shape) == 2 and pos.shape[0] != cfg.class_token + cfg.grid**2:
        found["pos"] = pos.cut(lambda x: resize_positions(x, cfg))
    return found



def resize_positions(pos, cfg):
    """A position table for another grid: bicubic with antialiasing, as timm and DINOv2 with registers do; the class token's row stays."""
    n, D = int(cfg.class_token), pos.shape[1]
    old = math.isqrt(len(pos) - n)
    if old**2 != len(pos) - n:
        return pos                                                          # no square: its shape will be reported
    table = pos[n:].float().view(1, old, old, D).permute(0, 3, 1, 2)         # (1, D, old, old)
    table = F.interpolate(table, size=(cfg.grid, cfg.grid), mode="bicubic", antialias=True)
    return torch.cat([pos[:n].float(), table.permute(0, 2, 3, 1).reshape(-1, D)])



def tower_by_shapes(tensors, image_size=None, quick_gelu=True):
    """Our named tensors of a tower in timm's or OpenAI's layout, which brings no numbers of its own -> VisionConfig.

    Heads are 64 wide, 72 in SO400M. Families differ by what they have: a norm before the blocks is CLIP, layer-scale DINOv2, no class
    token SigLIP, and none of these the ImageNet ViT.
    """
    t = {name: tensor.shape for name, tensor in tensors.items()}
    if not {"patch.weight", "pos", "blocks.0.mlp.fc1.weight"} <= t.keys():
        raise UserError("holds no tower: no patch embedding, position table or blocks under any known name")
    D, P = t["patch.weight"][0], t["patch.weight"][-1]
    clip, dino, cls = "pre_norm.weight" in t, "blocks.0.scale1" in t, "class_token" in t
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (IMAGENET_MEAN, IMAGENET_STD) if dino else (HALF, HALF)
    return VisionConfig(image_size or P * math.isqrt(t["pos"][0] - cls), P, D, 1 + max(int(n.split(".")[1]) for n in t if n.startswith("blocks.")),
                        16 if D == 1152 else max(1, D // 64), t["blocks.0.mlp.fc1.weight"][0], "quick_gelu" if clip and quick_gelu else "gelu",
                        1e-5 if clip else 1e-6, cls, t["registers"][0] if "registers" in t else 0, clip, "patch.bias" in t, dino, mean=mean, std=std)



def picture_mode(c, S, default="pad"):
    """Fields of any public config.json, side of its tile in pixels -> image mode, and its Tiling where that is not the usual one of the mode.

    LLaVA-NeXT's image_grid_pinpoints are pixels, which the original reads as (width, height) and transformers as (height, width): of
    equally good grids they take another one. Absent fields mean the defaults of the code a config was written by.
    """
    kind, is_int = c.get("model_type"), lambda x: type(x) is int and x > 0
    mode = c.get("image_aspect_ratio") or ("square" if "mm_hidden_size" in c else default)
    mode = "crop" if mode == "square" else mode
    if kind == "llava_next" or mode == "anyres" and "mm_hidden_size" in c:
        if kind != "llava_next" and c.get("mm_patch_merge_type") != "spatial_unpad":
            raise UserError(f"mm_patch_merge_type is {c.get('mm_patch_merge_type', 'flat')!r}; only 'spatial_unpad' is implemented")
        sizes = c.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        if not isinstance(sizes, list) or not all(isinstance(p, list) and len(p) == 2 and all(is_int(x) and x % S == 0 for x in p) for p in sizes):
            raise UserError(f"image_grid_pinpoints are {sizes!r}; they must be pairs of whole multiples of the tower's {S} px")
        mode, tiling = "anyres", replace(TILINGS["anyres"], grids=[(a // S, b // S)[:: -1 if kind == "llava_next" else 1] for a, b in sizes])
    elif kind == "internvl_chat":
        low, high = (c.get(name) or default for name, default in (("min_dynamic_patch", 1), ("max_dynamic_patch", 6)))
        if not is_int(low) or not is_int(high) or low > high:
            raise UserError(f"min_dynamic_patch is {low!r}, max_dynamic_patch {high!r}; they must be whole numbers, in this order")
        mode, tiling = "internvl" if c.get("dynamic_image_size") else "resize", replace(
            TILINGS["internvl"], grids=[(i, j) for i, j in grids_up_to(high) if i * j >= low], global_view="last" if c.get("use_thumbnail") else "none")
    else:
        return mode, None
    return mode, None if tiling == TILINGS.get(mode) or mode in SQUARE_MODES else tiling



def default_template(c):
    """The conversation template that a model was trained with, by the fields of its config.json.

    LLaVA with one linear layer is taken for v1 on Vicuna: its config does not tell that from v0 or Llama-2-chat, which need --template.
    """
    llm, linear = prismatic_llm(c), c.get("mm_projector_type", "linear") == "linear"
    if "template" in c:                                                     # InternVL writes it down, and so do we
        return c["template"]
    if llm:                                                                 # vicuna-v15-7b, llama2-7b-pure, llama2-13b-chat, ...
        name = {"pure": "prism_pure", "chat": "prism_llama_2", "instruct": "prism_mistral"}.get(llm.split("-")[-1], llm)
        return "prism_vicuna" if llm.startswith("vicuna") else name
    return ("internvl2_5" if str(c.get("model_type")).startswith("intern") else
            "llava_v1" if "mm_hidden_size" in c and linear else "vicuna_v1")



def prismatic_llm(c):
    """Prismatic's name of its language model, from its native config.json or the one in the HF layout; else None."""
    return (c["model"] if isinstance(c.get("model"), dict) else c).get("llm_backbone_id")



def public_layout(vlm):
    """-> how our names are called in the layout that it is saved in, and that layout's config.json."""
    dtype = str(vlm.decoder.lm_head.weight.dtype).removeprefix("torch.")
    if fits_llava(vlm.cfg):
        return llava_name, llava_config(vlm.cfg, dtype)
    return str, {"model_type": "plainvlm", "dtype": dtype, **asdict(vlm.cfg)}



def adapter_name(name, public):
    """One of our names -> that of the PEFT library over transformers' Llava; our own where that is not what is trained."""
    name = re.sub(r"(lora_[AB])$", r"\1.weight", public(name))
    if public is str:
        return name
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head.")
    return "base_model.model." + ("model." if name.startswith(("vision_tower.", "multi_modal_projector.")) else "") + name



def load_adapter(vlm, directory):
    """Put what save_adapter wrote back into a model that has such a LoRA and trains the same parts, strictly."""
    file = Path(directory) / "adapter_model.safetensors"
    found, mine = open_weights(file), {adapter_name(name, public_layout(vlm)[0]): p for name, p in vlm.named_parameters() if p.requires_grad}
    if odd := found.keys() ^ mine.keys() or {name for name in mine if mine[name].shape != found[name].shape}:
        raise UserError(f"{file}: {len(odd)} tensors do not fit, such as {sorted(odd)[0]}; it was trained with other --lora or --train flags")
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(found[name])



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
    """A tower's directory or file, of any family in TOWER_NAMES, into a ViT, strictly; its positions are resized to the ViT's grid."""
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



def write_model(directory, tensors, config, file="model.safetensors"):
    """The weights, then config.json: a directory with a config is a whole model."""
    write_whole(Path(directory) / file, lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
    write_json(Path(directory) / "config.json", config)
