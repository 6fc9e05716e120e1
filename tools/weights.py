"""Public weights: say what a model is made of, or write it anew, a LoRA merged.

    python -m tools.weights info DIR|PRESET     # parts, parameters, visual tokens, memory; no weight is read
    python -m tools.weights convert SRC DIR     # safetensors, in the llava-hf layout where that can hold it
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from model import PRESETS, VLM, Decoder
from support.cli import REQUIRED, UserError, arg, parse, run_program
from support.configs import DECODERS, READERS, config_file, layout_of, processor_json, read_decoder
from support.export import fits_llava
from support.io import read_json
from support.processor import save_processor
from support.weights import (
    NothingDrawn,
    fill_model,
    grow_words,
    is_lora,
    read_model,
    read_tower,
    stored_dtype,
    tokenizer_home,
)
from vision import ViT


@dataclass
class WeightsConfig:
    command: str = arg(REQUIRED, "what to do", choices=("info", "convert"), positional=True)
    model: str = arg(REQUIRED, "a model's directory; of info also a preset", positional=True)
    out: str = arg("", "of convert: the directory to write", positional=True)
    vision: str = arg("", "DIR or DIR,DIR: towers of a model published without")
    llm: str = arg("", "DIR: base of a LoRA; its tokenizer.model is taken where MODEL has none")


def main(argv=None):
    cfg = parse(WeightsConfig, argv, __doc__)
    if cfg.command == "info":
        info(cfg)
    else:
        convert(cfg)
    return 0


# ---- convert -----------------------------------------------------------------------------------------------


def convert(cfg):
    src, out = Path(cfg.model), Path(cfg.out)
    if not cfg.out or out.resolve() == src.resolve():
        raise UserError(f"OUT {cfg.out!r}: give a directory to write, not that of the weights to be read")
    plan, parts = read_model(src, cfg.vision, cfg.llm if is_lora(src) else "")
    n_row = max(plan.image_token, plan.pad_token) + 1
    if plan.decoder.vocab_size < n_row:              # llava-hf has rows for <image> and <pad>
        plan.decoder.vocab_size = -(-n_row // 64) * 64
        grow_words(parts["decoder"], plan.decoder.vocab_size)
    vlm = fill_model(plan, parts, src, stored_dtype(parts))

    tokenizer = tokenizer_home(src, cfg.llm) / "tokenizer.model"
    if tokenizer.exists():
        save_processor(out, tokenizer, plan)
    else:
        print(f"{src} has no tokenizer.model; put one beside it")
    vlm.save_pretrained(out)
    layout = "the llava-hf layout" if fits_llava(plan) else "our own layout: llava-hf cannot hold this model"
    print(f"{out}: in {layout}")


# ---- info --------------------------------------------------------------------------------------------------


def info(args):
    module = build_on_meta(Path(args.model), args.vision, args.llm)
    cfg = module.cfg
    if isinstance(module, VLM):
        for part, child in module.named_children():
            print(f"{part:10} {count(child):>16,} parameters   {getattr(cfg, part)}")
        print_pictures(cfg, Path(args.model))
        print(f"{'total':10} {count(module):>16,} parameters")
    else:
        print(f"{count(module):,} parameters   {cfg}")

    # Training keeps a float32 weight, its gradient and Adam's two moments: 16 bytes.
    size = count(module) / 1e9
    print(f"memory     {2 * size:.2f} GB in bfloat16; to train all {16 * size:.2f} GB, and activations")


def count(module):
    return sum(p.numel() for p in module.parameters())


def build_on_meta(folder, vision, llm):
    """A preset, or a model's, a decoder's or a tower's directory -> its module, without the numbers."""
    layout = layout_of(read_json(folder / "config.json", {}))
    if is_lora(folder) or layout in READERS:
        return VLM.from_pretrained(folder, "meta", vision=vision, llm=llm)
    with torch.device("meta"), NothingDrawn():
        if str(folder) in PRESETS:
            return VLM(PRESETS[str(folder)])
        if not folder.is_dir():
            raise UserError(f"{folder}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")
        return Decoder(read_decoder(folder)) if layout in DECODERS else ViT(read_tower(folder))


def print_pictures(cfg, folder):
    print(
        f"pictures   {cfg.vision.n_token} visual tokens for a tile of {cfg.vision.image_size} px, "
        f"mode {cfg.image_mode}, template {cfg.template}"
    )
    if cfg.tiling:
        most = max(map(math.prod, cfg.tiling.grids))
        print(f"           up to {most} tiles, global view {cfg.tiling.global_view}")
    says_mode = "image_aspect_ratio" in read_json(config_file(folder), {})
    if cfg.image_mode == "crop" and not says_mode and processor_json(folder).get("do_center_crop"):
        print("           crop because its image processor is set so; LLaVA-1.5 itself was trained with pad:")
        print("           --image-mode pad")


if __name__ == "__main__":
    sys.exit(run_program(main))
