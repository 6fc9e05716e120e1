"""A model -> config.json and weights that others open: llava-hf and LLaVA-NeXT, a LoRA in PEFT's layout.

    save_model      config.json and model.safetensors: VLM.save_pretrained
    save_adapter    what a LoRA run trained, over the directory of its base

A model that llava-hf cannot hold (fits_llava) is written under our own names, with model_type "plainvlm". Of
the ways in which transformers has named llava-hf's tensors, the oldest is written, which every version reads.
The tokenizer and what else AutoProcessor wants is support/processor.py.
"""

from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file

from support.configs import CLIP, CLIP_FIELDS, LLAMA_FIELDS, LLAVA_FIELDS
from support.io import fingerprint, write_json, write_whole
from support.lora import merged_state
from support.tiling import TILINGS
from support.weights import CLIP_NAMES, rename, weight_files

# ---- names: ours to public ---------------------------------------------------------------------------------

TO_CLIP = {ours: public for public, ours in CLIP_NAMES.items()}
TO_LLAVA = {
    "^vision.": "vision_tower.vision_model.^",
    "^connector.row_end": "image_newline",
    "^connector.layers.0.": "multi_modal_projector.linear_1.",
    "^connector.layers.2.": "multi_modal_projector.linear_2.",
    "^decoder.lm_head.": "language_model.lm_head.",
    "^decoder.": "language_model.model.",
} | TO_CLIP
TO_PEFT = {                          # over the model as transformers 5 names it inside
    "^vision.": "base_model.model.model.vision_tower.^",
    "^connector.row_end": "base_model.model.model.image_newline",
    "^connector.layers.0.": "base_model.model.model.multi_modal_projector.linear_1.",
    "^connector.layers.2.": "base_model.model.model.multi_modal_projector.linear_2.",
    "^decoder.lm_head.": "base_model.model.lm_head.",
    "^decoder.": "base_model.model.model.language_model.",
    ".lora_A": ".lora_A.weight",
    ".lora_B": ".lora_B.weight",
} | TO_CLIP
TO_LLAMA = {"^": "model.", "model.lm_head.": "lm_head."}


# ---- config.json -------------------------------------------------------------------------------------------


def public_layout(vlm):
    """-> the table from our names to those of the layout it is saved in, and that layout's config.json."""
    dtype = str(vlm.decoder.lm_head.weight.dtype).removeprefix("torch.")
    if fits_llava(vlm.cfg):
        return TO_LLAVA, llava_config(vlm.cfg, dtype)
    return {}, {"model_type": "plainvlm", "dtype": dtype, **asdict(vlm.cfg)}


def fits_llava(cfg):
    """A CLIP, two linear layers, a Llama; and one tile, or several as LLaVA-NeXT cuts them."""
    if cfg.vision2 or cfg.connector != "mlp2x_gelu":
        return False
    if cfg.tiling and replace(cfg.tiling, grids=TILINGS["anyres"].grids) != TILINGS["anyres"]:
        return False
    switches = "class_token n_register pre_norm patch_bias layer_scale final_norm rms_norm merge".split()
    return all(getattr(cfg.vision, name) == getattr(CLIP, name) for name in switches)


def public_fields(cfg, names):
    return {theirs: getattr(cfg, ours) for theirs, ours in names.items()}


def clip_json(cfg):
    return {"model_type": "clip_vision_model", **public_fields(cfg, CLIP_FIELDS)}


def llama_json(cfg):
    return {"model_type": "llama", **public_fields(cfg, LLAMA_FIELDS)}


def llava_config(cfg, dtype):
    """Without what is the default in transformers."""
    name = "LlavaNext" if cfg.tiling else "Llava"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if cfg.tiling else "llava",
        "dtype": dtype,
        "vision_config": clip_json(cfg.vision),
        "text_config": llama_json(cfg.decoder),
        "image_seq_length": cfg.vision.n_token,
        "vision_feature_layer": cfg.vision.feature_layer,
        "tie_word_embeddings": False,
        **public_fields(cfg, LLAVA_FIELDS),
        **grid_pinpoints(cfg),
    }


def grid_pinpoints(cfg):
    """The grids of tiles in pixels, which transformers reads as (height, width)."""
    if not cfg.tiling:
        return {}
    S = cfg.vision.image_size
    return {"image_grid_pinpoints": [[rows * S, columns * S] for columns, rows in cfg.tiling.grids]}


# ---- weights -----------------------------------------------------------------------------------------------


def save_model(vlm, directory, state=None):
    """A whole model, a LoRA merged. state: {our name: tensor}, if not the weights in vlm."""
    state = merged_state(vlm) if state is None else state
    write_model(directory, state, *public_layout(vlm))


def save_adapter(vlm, directory, base, state):
    """What trains, in PEFT's layout: the LoRA, and whole what trains beside it.

    base: the directory under it, absolute or as seen from the working directory, where PEFT looks for it.
    Ours looks beside the adapter first (support/weights.py: base_of), so a run may be moved with its base.
    state: {our name: tensor} of what trains.

    The directory opens like any other model, with PEFT too where its base opens in transformers.
    `python -m tools.weights convert` makes a whole one of it.
    """
    directory = Path(directory)
    parts = {rename(name, TO_LLAVA).partition(".")[0] for name in state}
    whole = sorted(parts & {"multi_modal_projector", "vision_tower"})
    beside = {"base_model_name_or_path": str(base), "modules_to_save": whole or None}
    write_json(directory / "adapter_config.json", vlm.lora | beside)
    write_tensors(directory / "adapter_model.safetensors", state, TO_PEFT if fits_llava(vlm.cfg) else {})
    found = {"base_fingerprint": fingerprint(weight_files(base))}
    write_json(directory / "plainvlm.json", public_layout(vlm)[1] | found)


def write_model(directory, tensors, names, config):
    """The weights under these public names, then config.json: a directory with a config is a whole model."""
    write_tensors(Path(directory) / "model.safetensors", tensors, names)
    write_json(Path(directory) / "config.json", config)


def write_tensors(file, tensors, names):
    tensors = {rename(name, names): tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(file, lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
