"""A model -> the files that others open: llava-hf and LLaVA-NeXT, a LoRA in PEFT's layout, tokenizer.json.

    save_model      config.json and model.safetensors: VLM.save_pretrained
    save_adapter    what a LoRA run trained, over the directory of its base
    save_processor  what transformers' AutoProcessor wants beside the weights

A model that llava-hf cannot hold (fits_llava) is written under our own names, with model_type "plainvlm". Of
the ways in which transformers has named llava-hf's tensors, the oldest is written, which every version reads.
"""

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import sentencepiece
from safetensors.torch import save_file

from model import IGNORE
from support.configs import CLIP_FIELDS, LLAMA_FIELDS, TOWERS
from support.io import write_json, write_whole
from support.lora import merged_state
from support.weights import CLIP_NAMES, rename
from vision import TILINGS

# ---- names: ours -> public ---------------------------------------------------------------------------------

LLAVA_HF_NAMES = {
    "connector.row_end": "image_newline",
    "connector.": "multi_modal_projector.",
    "decoder.lm_head.": "language_model.lm_head.",
    "decoder.": "language_model.model.",
}


def clip_name(name):
    return rename(name, {ours: public for public, ours in CLIP_NAMES.items()})


def llama_name(name):
    return name if name.startswith("lm_head.") else "model." + name


def llava_name(name):
    if name.startswith("vision."):
        return "vision_tower.vision_model." + clip_name(name.removeprefix("vision."))
    return rename(name, LLAVA_HF_NAMES)


def adapter_name(name, public):
    """The PEFT library's name over transformers' Llava; our own where the model is not that."""
    name = re.sub(r"(lora_[AB])$", r"\1.weight", public(name))
    if public is str:
        return name
    if name.startswith("language_model.model."):
        name = "model.language_model." + name.removeprefix("language_model.model.")
    elif name.startswith("language_model."):
        name = name.removeprefix("language_model.")                         # the head
    elif name.startswith(("vision_tower.", "multi_modal_projector.")):
        name = "model." + name
    return "base_model.model." + name


# ---- config.json -------------------------------------------------------------------------------------------


def public_layout(vlm):
    """-> the function from our names to those of the layout it is saved in, and that layout's config.json."""
    dtype = str(vlm.decoder.lm_head.weight.dtype).removeprefix("torch.")
    if fits_llava(vlm.cfg):
        return llava_name, llava_config(vlm.cfg, dtype)
    return str, {"model_type": "plainvlm", "dtype": dtype, **asdict(vlm.cfg)}


def fits_llava(cfg):
    """A CLIP, a Llama, one of LLaVA's two connectors, and one tile, or several as LLaVA-NeXT cuts them."""
    if cfg.vision2 or cfg.connector not in ("linear", "mlp2x_gelu"):
        return False
    if cfg.tiling:
        is_next = replace(cfg.tiling, grids=TILINGS["anyres"].grids) == TILINGS["anyres"]
        if not is_next or cfg.connector != "mlp2x_gelu":
            return False
    clip = TOWERS["clip_vision_model"]
    switches = "class_token n_register pre_norm patch_bias layer_scale final_norm rms_norm merge".split()
    return all(getattr(cfg.vision, name) == getattr(clip, name) for name in switches)


def clip_json(cfg):
    sizes = {public: getattr(cfg, ours) for public, ours in CLIP_FIELDS.items()}
    return {"model_type": "clip_vision_model", "projection_dim": cfg.n_embd, **sizes}


def llama_json(cfg):
    sizes = {public: getattr(cfg, ours) for public, ours in LLAMA_FIELDS.items()}
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }


def llava_config(cfg, dtype):
    name = "LlavaNext" if cfg.tiling else "Llava"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if cfg.tiling else "llava",
        "dtype": dtype,
        "vision_config": clip_json(cfg.vision),
        "text_config": llama_json(cfg.decoder),
        "image_token_index": cfg.image_token,
        "pad_token_id": cfg.pad_token,
        "bos_token_id": cfg.bos_token,
        "eos_token_id": cfg.eos_token,
        "ignore_index": IGNORE,
        "image_seq_length": cfg.vision.n_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": cfg.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        # What transformers does not ask for, and we do.
        "mm_projector_type": cfg.connector,
        "image_aspect_ratio": cfg.image_mode,
        "template": cfg.template,
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
    public, config = public_layout(vlm)
    state = merged_state(vlm) if state is None else state
    write_model(directory, {public(name): tensor for name, tensor in state.items()}, config)


def save_adapter(vlm, directory, base, state=None):
    """What trains, in PEFT's layout: the LoRA, and whole what trains beside it. base: directory under it.

    The directory opens like any other model; `python -m tools.weights convert` makes a whole one of it.
    """
    if state is None:
        state = {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad}
    parts = {"multi_modal_projector": vlm.connector, "vision_tower": vlm.vision}
    whole = [name for name, part in parts.items() if any(p.requires_grad for p in part.parameters())]
    targets = "|".join(vlm.lora["targets"])
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "r": vlm.lora["r"],
        "lora_alpha": vlm.lora["lora_alpha"],
        "lora_dropout": vlm.lora["lora_dropout"],
        "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({targets})",
        "modules_to_save": whole or None,
        "inference_mode": True,
    }
    write_json(Path(directory) / "adapter_config.json", adapter_config)
    public, config = public_layout(vlm)
    tensors = {adapter_name(name, public): tensor for name, tensor in state.items()}
    write_tensors(Path(directory) / "adapter_model.safetensors", tensors)
    write_json(Path(directory) / "config.json", config)


def write_model(directory, tensors, config):
    """The weights, then config.json: a directory with a config is a whole model."""
    write_tensors(Path(directory) / "model.safetensors", tensors)
    write_json(Path(directory) / "config.json", config)


def write_tensors(file, tensors):
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(file, lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))


# ---- tokenizer and image processor -------------------------------------------------------------------------


def save_processor(directory, tokenizer_file, cfg):
    """What transformers' AutoProcessor wants beside the weights."""
    directory = Path(directory)
    kind = {"processor_class": "LlavaNextProcessor" if cfg.tiling else "LlavaProcessor"}
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer_file, cfg), indent=None)
    write_json(directory / "tokenizer_config.json", kind | tokenizer_config(cfg))
    write_json(directory / "generation_config.json", {
        "bos_token_id": cfg.bos_token,
        "eos_token_id": cfg.eos_token,
        "pad_token_id": cfg.pad_token,
        "suppress_tokens": list(range(cfg.image_token, cfg.decoder.vocab_size)),
    })  # fmt: skip
    if not cfg.tiling or fits_llava(cfg):                                   # it knows none of our own tilings
        write_json(directory / "preprocessor_config.json", kind | preprocessor_config(cfg))
        write_json(directory / "processor_config.json", kind | {
            "patch_size": cfg.vision.patch_size,
            "image_token": "<image>",
            "num_additional_image_tokens": cfg.vision.n_prefix,
            "vision_feature_select_strategy": "default",
        })  # fmt: skip
    write_whole(directory / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))


def preprocessor_config(cfg):
    """The picture's way in. transformers has no letterbox, which differs from pad by a pixel at most."""
    S = cfg.vision.image_size
    kinds = {"crop": "CLIP", "resize": "CLIP", "anyres": "LlavaNext"}
    kind = kinds.get(cfg.image_mode, "Llava")
    squashes = cfg.image_mode == "resize"
    return grid_pinpoints(cfg) | {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_pad": kind != "CLIP",
        "do_resize": True,
        "size": {"height": S, "width": S} if squashes else {"shortest_edge": S},
        "resample": 3,                                                      # bicubic
        "do_center_crop": not squashes,
        "crop_size": {"height": S, "width": S},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.vision.mean),
        "image_std": list(cfg.vision.std),
    }


def tokenizer_config(cfg):
    added = {str(cfg.image_token): added_token("<image>")}
    if cfg.pad_token != cfg.eos_token:
        added[str(cfg.pad_token)] = added_token("<pad>")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": added,
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": cfg.decoder.block_size,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }


def added_token(name):
    plain = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": name, "special": True, "normalized": name == "</s>", **plain}


def tokenizer_json(file, cfg):
    """A sentencepiece BPE model in the words of Hugging Face's tokenizers, with the ids of encode_prompt.

    A stretch of text gets a space in front, also after <image>, but not after </s>: that one is looked for
    after the spaces are set.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}

    # Merges: every way to make a word of two others, the best word first.
    words = [word for word, i in ids.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
    words.sort(key=lambda word: -sp.get_score(ids[word]))
    splits = [(word[:k], word[k:]) for word in words for k in range(1, len(word))]
    merges = [[left, right] for left, right in splits if left in ids and right in ids]

    special = {
        "<unk>": sp.unk_id(),
        "<s>": cfg.bos_token,
        "</s>": cfg.eos_token,
        "<image>": cfg.image_token,
        "<pad>": cfg.pad_token,
    }
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **added_token(name)} for name, i in special.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replace_rule("Regex", r"\A(?!</s>)", "▁"), replace_rule("String", " ", "▁")],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": {"<s>": {"id": "<s>", "ids": [cfg.bos_token], "tokens": ["<s>"]}},
            "single": [start, first],
            "pair": [first, second],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace_rule("String", "▁", " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }


def replace_rule(kind, old, new):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}
