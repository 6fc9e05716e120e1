"""support.export: moved here; to be rewritten."""

from pathlib import Path
import shutil

import sentencepiece

from support.io import write_json, write_whole
from support.weights import adapter_name, fits_llava, pinpoints, public_layout, write_model



def save_adapter(vlm, directory, base, state=None):
    """What trains, in the PEFT library's layout: the LoRA, and whole what trains beside it. `base`: directory of the model under it.

    The directory opens like any other model (VLM.from_pretrained merges), and `python -m tools.weights convert` makes a whole one of it.
    """
    state = {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad} if state is None else state
    children = {"multi_modal_projector": vlm.connector, "vision_tower": vlm.vision}
    whole = [name for name, child in children.items() if any(p.requires_grad for p in child.parameters())]
    public, config = public_layout(vlm)
    write_json(Path(directory) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none", "use_dora": False, "use_rslora": False,
        "fan_in_fan_out": False, "r": vlm.lora["r"], "lora_alpha": vlm.lora["lora_alpha"], "lora_dropout": vlm.lora["lora_dropout"],
        "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(vlm.lora['targets'])})", "modules_to_save": whole or None,
        "inference_mode": True})
    write_model(directory, {adapter_name(name, public): t.contiguous().cpu() for name, t in state.items()}, config, "adapter_model.safetensors")



def save_processor(directory, tokenizer_file, cfg):
    """What transformers' AutoProcessor wants beside the weights: the tokenizer with its two added tokens, and the picture's way in.

    It knows no letterbox, which differs from pad by a pixel at most, and none of our own tilings: with those no way in is written.
    """
    S, directory = cfg.vision.image_size, Path(directory)
    short = ("LlavaImageProcessor", {"shortest_edge": S}, True)             # class, size, whether the middle is cut out
    kind, size, crop = {"crop": ("CLIPImageProcessor", *short[1:]), "resize": ("CLIPImageProcessor", {"height": S, "width": S}, False),
                        "anyres": ("LlavaNextImageProcessor", *short[1:])}.get(cfg.image_mode, short)
    llava = {"processor_class": "LlavaNextProcessor" if cfg.tiling else "LlavaProcessor"}
    special = {"bos_token_id": cfg.bos_token, "eos_token_id": cfg.eos_token, "pad_token_id": cfg.pad_token}
    names = {cfg.image_token: "<image>"} | ({cfg.pad_token: "<pad>"} if cfg.pad_token != cfg.eos_token else {})
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer_file, cfg), indent=None)
    write_json(directory / "tokenizer_config.json", llava | {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "added_tokens_decoder": {str(i): added_token(name) for i, name in names.items()},
        "extra_special_tokens": {"image_token": "<image>"}, "model_max_length": cfg.decoder.block_size, "clean_up_tokenization_spaces": False,
        "padding_side": "left"})
    write_json(directory / "generation_config.json", special | {"suppress_tokens": list(range(cfg.image_token, cfg.decoder.vocab_size))})
    if not cfg.tiling or fits_llava(cfg):
        write_json(directory / "preprocessor_config.json", llava | pinpoints(cfg) | {
            "image_processor_type": kind, "do_pad": kind != "CLIPImageProcessor", "do_resize": True, "size": size, "resample": 3,
            "do_center_crop": crop, "crop_size": {"height": S, "width": S}, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(cfg.vision.mean), "image_std": list(cfg.vision.std)})
        write_json(directory / "processor_config.json", llava | {
            "patch_size": cfg.vision.patch_size, "image_token": "<image>", "num_additional_image_tokens": cfg.vision.n_prefix,
            "vision_feature_select_strategy": "default"})
    write_whole(directory / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))



def added_token(name):
    return {"content": name, "special": True, "normalized": name == "</s>", "lstrip": False, "rstrip": False, "single_word": False}



def tokenizer_json(file, cfg):
    """A sentencepiece BPE model in the words of Hugging Face's tokenizers, such that its ids are those of encode_prompt.

    A stretch of text gets a space in front, also after <image>, but not after </s>: that one is looked for after the spaces are set.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    words = sorted((w for w, i in ids.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))), key=lambda w: -sp.get_score(ids[w]))
    merges = [[w[:k], w[k:]] for w in words for k in range(1, len(w)) if w[:k] in ids and w[k:] in ids]     # the best word is joined first
    special = {"<unk>": sp.unk_id(), "<s>": cfg.bos_token, "</s>": cfg.eos_token, "<image>": cfg.image_token, "<pad>": cfg.pad_token}
    replace_by = lambda kind, old, new: {"type": "Replace", "pattern": {kind: old}, "content": new}
    sequence = lambda id, type_id: {"Sequence": {"id": id, "type_id": type_id}}
    return {"version": "1.0", "added_tokens": [{"id": i} | added_token(name) for name, i in special.items()],
            "normalizer": {"type": "Sequence", "normalizers": [replace_by("Regex", r"\A(?!</s>)", "▁"), replace_by("String", " ", "▁")]},
            "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [cfg.bos_token], "tokens": ["<s>"]}},
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence("A", 0)],
                               "pair": [sequence("A", 0), sequence("B", 1)]},
            "decoder": {"type": "Sequence", "decoders": [replace_by("String", "▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                                                         {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": merges}}
