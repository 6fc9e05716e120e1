"""config.json of any public layout -> VLMConfig.

    read_config       a whole model's; READERS has one function for each layout
    vision_config     a tower's, decoder_config a decoder's: alone, or inside a larger model's
    tower_by_shapes   in timm's layout, and decoder_by_shapes in Prismatic's: these files bring no numbers

Tables say what a public field is called here, and read_fields reads them. A field that is absent, or null,
means the default of the code that wrote the config.
"""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

from model import DecoderConfig, VLMConfig
from support.cli import UserError
from support.io import read_json, reading
from support.tiling import TILINGS, Tiling, grids_up_to
from vision import ACTIVATIONS, VisionConfig

# ---- tables ------------------------------------------------------------------------------------------------

# Their field: ours.
CLIP_FIELDS = {                          # of a tower
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_hidden",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}
LLAMA_FIELDS = {                         # of a decoder
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "n_hidden",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
LLAVA_FIELDS = {                         # of a whole model
    "image_token_index": "image_token",
    "pad_token_id": "pad_token",
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "image_aspect_ratio": "image_mode",  # for which transformers does not ask, and we do
    "template": "template",
}
MODEL_FIELDS = LLAVA_FIELDS | {"image_token_id": "image_token", "mm_projector_type": "connector"}
TOWER_FIELDS = CLIP_FIELDS | {           # and what DINOv2 has beside it, an image processor, a whole model
    "num_register_tokens": "n_register",
    "image_mean": "mean",
    "image_std": "std",
    "force_image_size": "image_size",
    "vision_feature_layer": "feature_layer",
    "select_layer": "feature_layer",
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)                   # SigLIP's mean and std

# What a config leaves out: as of the class in transformers; InternViT's and InternLM2's as in their own code.
CLIP = VisionConfig(224, 32, n_embd=768, n_layer=12, n_head=12, n_hidden=3072)
SIGLIP = VisionConfig(
    image_size=224, patch_size=16, n_embd=768, n_layer=12, n_head=12, n_hidden=3072,
    activation="gelu_tanh", norm_eps=1e-6, class_token=False, pre_norm=False, patch_bias=True,
    mean=HALF, std=HALF,
)  # fmt: skip
VIT = replace(SIGLIP, activation="gelu", norm_eps=1e-12, class_token=True)
DINOV2 = replace(VIT, patch_size=14, norm_eps=1e-6, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
TOWERS = {
    "clip": CLIP,                        # a config of both its towers
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, patch_size=16, n_register=4),
    "intern_vit_6b": replace(DINOV2, final_norm=False, feature_layer=-1),    # its own say all sizes
}
LLAMA = {"n_head": 32, "n_embd": 4096, "block_size": 2048, "norm_eps": 1e-6}
DECODERS = {
    "llama": LLAMA,
    "internlm2": LLAMA,
    "mistral": LLAMA | {"n_kv_head": 8, "n_hidden": 14336, "block_size": 131072},
}
PRISMATIC_MODES = {"letterbox": "letterbox", "resize-naive": "resize", "resize-crop": "crop"}
PRISMATIC_CONNECTORS = {"linear": "linear", "gelu-mlp": "mlp2x_gelu", "fused-gelu-mlp": "fused_gelu"}
PRISMATIC_TEMPLATES = {                  # by a word in the name of the language model
    "vicuna": "prism_vicuna",
    "pure": "prism_pure",
    "chat": "prism_llama_2",
    "instruct": "prism_mistral",
}

# The smallest and the largest of our numbers that are taken; of all others 1 and 2**24. No model comes near;
# damage and typing errors do.
SMALLEST = {
    "n_register": 0,
    "norm_eps": 0,
    "bos_token": 0,
    "eos_token": 0,
    "least": 0,
    "image_token": -1000,                # LLaVA's own code has -200, of which VLMConfig says more
    "feature_layer": -1000,
}
LARGEST = {"image_size": 4096, "n_layer": 1000, "norm_eps": 1, "rope_theta": 1e12}
# In our own layout: configs inside others.
PARTS = {"vision": VisionConfig, "vision2": VisionConfig, "decoder": DecoderConfig, "tiling": Tiling}


def read_fields(c, Config, names=None):
    """{our name: value} of the fields that a config gives, each of the type that our class declares.

    names: {their name: ours}; None: theirs are ours.
    """
    kinds = {field.name: field.type for field in fields(Config)}
    found = {}
    for theirs, ours in (names or dict(zip(kinds, kinds))).items():
        value, kind = c.get(theirs), kinds[ours]
        if value is None:
            continue
        if ours in PARTS:
            kind = PARTS[ours]
            value = kind(**read_fields(value, kind))
        if kind is tuple or kind is float and type(value) is int:
            value = kind(value)          # JSON has lists, and whole numbers
        if type(value) is not kind:
            raise TypeError(f"{theirs} is {value!r}, not {kind.__name__}")
        smallest, largest = SMALLEST.get(ours, 1), LARGEST.get(ours, 2**24)
        if kind in (int, float) and not smallest <= value <= largest:       # NaN is not
            raise UserError(f"{theirs} is {value}; it must be {smallest} to {largest}")
        found[ours] = value
    return found


def only_values(c, **supported):
    """Refuse what would be computed wrongly: of these fields just one value is implemented."""
    for name, value in supported.items():
        if c.get(name) not in (None, value):
            raise UserError(f"{name} is {c[name]!r}; only {value!r} is implemented")


# ---- a whole model -----------------------------------------------------------------------------------------


def config_file(directory):
    """config.json; of our LoRAs plainvlm.json, since others take what has a config.json for a whole model."""
    own = Path(directory) / "plainvlm.json"
    return own if own.exists() else own.with_name("config.json")


def config_json(directory):
    file = config_file(directory)
    if not file.exists():
        todo = "give one that is"
        if config_file(f"out/{directory}").exists():
            todo = f"did you mean out/{directory}?"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)) and not Path(directory).exists():
            todo = f"if it is a name on huggingface.co: hf download {directory} --local-dir DIR, and give DIR"
        raise UserError(f"{file}: not found, so {directory} is not a model directory; {todo}")
    return read_json(file)


def processor_json(directory):
    """How pictures are cut and normalised: preprocessor_config.json, or what transformers 5 writes."""
    file = Path(directory) / "processor_config.json"
    with reading(file):
        newer = dict(read_json(file, {}).get("image_processor") or {})
    return read_json(file.with_name("preprocessor_config.json"), newer)


def layout_of(c):
    """A key of READERS, or the model_type of something else."""
    if "mm_hidden_size" in c or "mm_vision_tower" in c:
        return "original LLaVA"
    if prismatic_fields(c) is not c or c.get("model_type") in ("prismatic", "openvla"):
        return "Prismatic"
    return str(c.get("model_type"))


def read_config(directory, parts, given):
    """config.json of any layout -> VLMConfig.

    parts: {part: {our name: tensor}}, whose shapes say what some layouts leave unsaid.
    given: the VisionConfigs of towers that are not among them.
    """
    c, processor = config_json(directory), processor_json(directory)
    with reading(config_file(directory), "get it and preprocessor_config.json again"):
        read = find_kind(layout_of(c), READERS, ". A language model alone goes to --llm, a tower to --vision")
        cfg = read(c, processor, parts, given)
        for tower in filter(None, (cfg.vision, cfg.vision2)):
            check_tower(tower)
        return cfg


def check_tower(cfg):
    """What a ViT cannot be is an error before it is built."""
    colors = *cfg.mean, *cfg.std
    if len(colors) != 6 or 0 in cfg.std or not all(0 <= number <= 1 for number in colors):
        raise UserError(f"image_mean {cfg.mean} and image_std {cfg.std} of preprocessor_config.json must be "
                        "three numbers of 0 to 1, std no 0")
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"a tower {cfg.n_embd} wide cannot be shared by {cfg.n_head} heads")
    if not cfg.grid or cfg.grid % cfg.merge:
        raise UserError(f"{cfg.grid} patches in {cfg.image_size} px cannot be merged by {cfg.merge}")
    if not 0 <= cfg.depth <= cfg.n_layer:
        raise UserError(f"feature layer {cfg.feature_layer} does not exist in {cfg.n_layer} layers")
    if cfg.activation not in ACTIVATIONS:
        raise UserError(f"activation {cfg.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return cfg


def find_kind(kind, known, more=""):
    if kind not in known:
        raise UserError(f"model_type is {kind!r}; only {', '.join(known)} can be opened{more}")
    return known[kind]


def llava_hf(c, processor, parts, given):
    """transformers' llava and llava_next."""
    only_values(c, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    only_values(c["vision_config"], model_type="clip_vision_model")
    tower = vision_config(c["vision_config"], processor | c)
    found = read_fields(c, VLMConfig, MODEL_FIELDS)
    found.setdefault("pad_token", found.get("image_token", 32000) + 1)
    if c["model_type"] == "llava_next":  # transformers reads sizes in pixels as (height, width)
        found["image_mode"] = "anyres"
        grids = [(columns, rows) for rows, columns in count_tiles(c, tower)]
        tower.tiling = replace(TILINGS["anyres"], grids=grids)
        if c["text_config"].get("model_type") == "mistral":
            found.setdefault("template", "mistral_instruct")
    elif processor.get("do_center_crop") and not processor.get("do_pad"):
        found.setdefault("image_mode", "crop")
    return VLMConfig(tower, decoder_config(c["text_config"], c), **found)


def original_llava(c, processor, parts, given):
    """liuhaotian/llava-*: a Llama's config with the fields mm_*. Its words may end before <image>.

    One linear layer is taken for v1 on Vicuna: the config does not tell that from v0 or Llama-2-chat, which
    need --template.
    """
    only_values(c, mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False)
    towers = given or towers_inside(parts)
    if len(towers) != 1:
        raise UserError(
            f"holds no vision tower (its config names {c.get('mm_vision_tower')}); give the directory of "
            "that one tower by --vision DIR"
        )
    tower = replace(towers[0], **read_fields(c, VisionConfig, {"mm_vision_select_layer": "feature_layer"}))
    connector = c.get("mm_projector_type") or "linear"
    template = "llava_v1" if connector == "linear" else "vicuna_v1"
    if c.get("model_type") == "llava_mistral":
        template = "mistral_instruct"
    mode = (c.get("image_aspect_ratio") or "square").replace("square", "crop")
    if mode == "anyres":                 # as LLaVA-NeXT, whose own code reads sizes as (width, height)
        only_values({"mm_patch_merge_type": "flat", **c}, mm_patch_merge_type="spatial_unpad")
        tower.tiling = replace(TILINGS["anyres"], grids=count_tiles(c, tower))
    return VLMConfig(
        tower,
        decoder_config(c | {"model_type": "llama"}),
        connector,
        image_mode=mode,
        template=c.get("template") or template,
    )


def internvl(c, processor, parts, given):
    """OpenGVLab/InternVL2.5-*. <IMG_CONTEXT> is the third of the nine tokens at the end of the table."""
    only_values(c, ps_version="v2", downsample_ratio=0.5, min_dynamic_patch=1)
    tower = replace(vision_config(c["vision_config"], c), merge=2)
    decoder = decoder_config(c["llm_config"], c)
    grids = grids_up_to(c.get("max_dynamic_patch") or 6)
    view = "last" if c.get("use_thumbnail") else "none"
    tower.tiling = replace(TILINGS["internvl"], grids=grids, global_view=view)
    return VLMConfig(
        tower,
        decoder,
        "norm_gelu",
        image_token=decoder.vocab_size - 7,
        pad_token=2,
        image_mode="internvl" if c.get("dynamic_image_size") else "resize",
        template=c.get("template") or "internvl2_5",
    )


def prismatic(c, processor, parts, given):
    """TRI-ML/prismatic-vlms name their parts; the sizes are in the tensors."""
    c = prismatic_fields(c)
    tower_id, llm_id, arch = c["vision_backbone_id"], c["llm_backbone_id"], c["arch_specifier"]
    templates = [name for word, name in PRISMATIC_TEMPLATES.items() if word in llm_id]
    if not templates:
        raise UserError(f"llm_backbone_id is {llm_id!r}; only vicuna, llama2 and mistral are implemented")

    # One tower, or DINOv2 beside SigLIP or CLIP.
    is_fused = "dinosiglip" in tower_id or "dinoclip" in tower_id
    towers = given or towers_inside(parts)
    if len(towers) != 1 + is_fused:
        raise UserError(f"vision_backbone_id {tower_id!r} wants --vision DIR, or two: --vision DIR,DIR")
    image_size = int(re.search(r"(\d+)px|$", tower_id)[1] or 224)
    towers = [replace(tower, image_size=image_size, activation="gelu") for tower in towers]
    if towers[0].pre_norm:               # every tower runs with the exact GELU but CLIP alone
        towers[0].activation = "quick_gelu"
    return VLMConfig(
        vision=towers[0],
        vision2=towers[1] if is_fused else None,
        decoder=decoder_by_shapes(parts["decoder"]),
        connector=PRISMATIC_CONNECTORS[arch.split("+")[-1]],
        image_token=32001,
        pad_token=32000,
        image_mode=PRISMATIC_MODES[c["image_resize_strategy"]],
        template=templates[0],
    )


def prismatic_fields(c):
    """Where a config of Prismatic's has its fields: in "model", or in the HF layout at the top."""
    return c["model"] if isinstance(c.get("model"), dict) else c


def own_layout(c, processor, parts, given):
    """What VLM.save_pretrained writes where no public layout holds the model."""
    return VLMConfig(**read_fields(c, VLMConfig))


def count_tiles(c, tower):
    """LLaVA-NeXT's image_grid_pinpoints, pairs of sizes in pixels -> pairs of numbers of tiles."""
    S = tower.image_size
    sizes = c.get("image_grid_pinpoints") or [(336 * a, 336 * b) for a, b in TILINGS["anyres"].grids]
    if any(a % S or b % S for a, b in sizes):
        raise UserError(f"image_grid_pinpoints are {sizes}; must be whole multiples of the tower's {S} px")
    return [(a // S, b // S) for a, b in sizes]


READERS = {
    "llava": llava_hf,
    "llava_next": llava_hf,
    "original LLaVA": original_llava,
    "internvl_chat": internvl,
    "Prismatic": prismatic,
    "plainvlm": own_layout,
}


# ---- a tower or a decoder ----------------------------------------------------------------------------------


def vision_config(c, beside=None):
    """config.json of a tower, and what is said beside it, of the image processor and of a larger model
    -> VisionConfig."""
    inner = c.get("vision_config") or c  # beside a text tower
    kind = inner.get("model_type") or c.get("model_type") or "clip"
    base = find_kind(kind, TOWERS)
    found = read_fields((beside or {}) | inner, VisionConfig, TOWER_FIELDS)
    if found.get("activation") == "gelu_pytorch_tanh":
        found["activation"] = "gelu_tanh"
    if kind == "intern_vit_6b":          # 6B has RMS norms, 300M has not
        found["rms_norm"] = inner.get("norm_type", "rms_norm") == "rms_norm"
    if kind.startswith("dinov2"):
        found["n_hidden"] = int(found.get("n_embd", base.n_embd) * (inner.get("mlp_ratio") or 4))
    return replace(base, **found)


def read_decoder(directory):
    """A decoder's directory -> DecoderConfig."""
    c = config_json(directory)
    with reading(config_file(directory)):
        return decoder_config(c)


def decoder_config(c, whole=None):
    """config.json of a Llama, Mistral or InternLM2 -> DecoderConfig. whole: that of the larger model."""
    kind = c.get("model_type", "llama")
    defaults = find_kind(kind, DECODERS)
    only_values(c, hidden_act="silu", attention_bias=False, mlp_bias=False, bias=False)
    rope = (c.get("rope_parameters") or {}) | (c.get("rope_scaling") or {})
    if "dynamic" not in rope.values():   # changes nothing up to the longest sequence
        only_values(rope, rope_type="default", type="default")

    found = defaults | read_fields(c | rope, DecoderConfig, LLAMA_FIELDS)
    found["head_from_embedding"] = any(part.get("tie_word_embeddings") for part in (c, whole or {}))
    found.setdefault("n_kv_head", found["n_head"])
    found.setdefault("head_dim", found["n_embd"] // found["n_head"])
    if kind == "mistral":                # one window; null: none, as in v0.2
        found["block_size"] = min(found["block_size"], c.get("sliding_window", 4096) or math.inf)
    return DecoderConfig(**found)


def towers_inside(parts):
    return [tower_by_shapes(parts[part]) for part in ("vision", "vision2") if parts[part]]


def tower_by_shapes(tensors):
    """Our named tensors of a tower in timm's layout, which brings no numbers of its own -> VisionConfig.

    Families differ by what they have: a norm before the blocks is CLIP, layer-scale DINOv2, no class token
    SigLIP, and none of these the ImageNet ViT. Heads are 64 wide, 72 in SO400M.
    """
    shape = {name: tensor.shape for name, tensor in tensors.items()}
    if "pre_norm.weight" in shape:
        family = CLIP
    elif "blocks.0.scale1" in shape:
        family = DINOV2
    else:
        family = replace(VIT, norm_eps=1e-6, class_token="class_token" in shape)
    n_embd, _, _, patch_size = shape["patch.weight"]
    return replace(
        family,
        image_size=patch_size * math.isqrt(shape["pos"][0]),                # with the class row or without
        patch_size=patch_size,
        n_embd=n_embd,
        n_layer=sum(name.endswith(".mlp.fc1.weight") for name in shape),
        n_head=16 if n_embd == 1152 else n_embd // 64,
        n_hidden=shape["blocks.0.mlp.fc1.weight"][0],
        n_register=shape.get("registers", [0])[0],
    )


def decoder_by_shapes(tensors):
    """Our named tensors of a Llama -> DecoderConfig; heads are 128 wide."""
    if not tensors:
        raise UserError("no weights of a language model here; a connector alone goes to --projector")
    vocab_size, n_embd = tensors["embed_tokens.weight"].shape
    return DecoderConfig(
        vocab_size=vocab_size,
        n_layer=sum(name.endswith(".mlp.gate_proj.weight") for name in tensors),
        n_head=n_embd // 128,
        n_kv_head=len(tensors["layers.0.self_attn.k_proj.weight"]) // 128,
        n_embd=n_embd,
        n_hidden=len(tensors["layers.0.mlp.gate_proj.weight"]),
    )
