"""Public weights: say what a model is made of, or write it anew.

    python -m tools.weights info DIR|PRESET     # parts, parameters, visual tokens, memory; reads no weights
    python -m tools.weights convert SRC DIR     # .bin and .pt to safetensors; a whole model to the llava-hf
                                                # layout, where that can hold it
"""

import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model import PRESETS, VLM, Decoder, DecoderConfig
from support.cli import REQUIRED, UserError, arg, parse, run
from support.export import fits_llava, save_processor, write_model
from support.io import read_json, write_whole
from support.weights import (
    DECODERS,
    decoder_config,
    fill_model,
    grow_words,
    is_lora,
    is_whole_model,
    processor_json,
    read_config,
    read_model,
    read_tensors,
    read_tower,
    stored_dtype,
    tokenizer_home,
    weights_file,
)
from vision import VisionConfig, ViT


@dataclass
class InfoConfig:
    model: str = arg(REQUIRED, "a model's directory, or a preset", positional=True)
    vision: str = arg("", "DIR or DIR,DIR: towers of a model published without")
    llm: str = arg("", "DIR: base of a LoRA")


@dataclass
class ConvertConfig:
    src: str = arg(REQUIRED, "directory or file to read", positional=True)
    out: str = arg(REQUIRED, "directory to write", positional=True)
    vision: str = arg("", "DIR or DIR,DIR: towers of a model published without")
    llm: str = arg("", "DIR: base of a LoRA; its tokenizer.model is taken where SRC has none")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    if command == "info":
        info(parse(InfoConfig, argv[1:], __doc__))
    elif command == "convert":
        convert(parse(ConvertConfig, argv[1:], __doc__))
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise UserError(f"{command or 'nothing'}: say `info DIR` or `convert SRC DIR`; see --help")
    return 0


def is_whole(folder):
    """Whether a directory holds a vision-language model, and no tower or decoder alone."""
    return is_lora(folder) or is_whole_model(read_json(folder / "config.json", {}))


# ---- convert -----------------------------------------------------------------------------------------------


def convert(cfg):
    src, out = Path(cfg.src), Path(cfg.out)
    folder = src if src.is_dir() else src.parent
    if out.exists() and out.resolve() == folder.resolve():
        raise UserError(f"{out}: is where the weights are read from; choose another directory to write")
    if is_whole(src):
        convert_model(src, out, cfg.vision, cfg.llm)
    else:
        convert_part(src, out)


def convert_part(src, out):
    """A tower, a decoder or a connector: its names stay, only the files change."""
    tensors = {name: t.contiguous().clone() for name, t in read_tensors(src).items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("inv_freq")}
    for file in src.glob("*") if src.is_dir() else ():
        is_setting = file.suffix == ".json" and ".index." not in file.name and file.name != "config.json"
        if is_setting or file.name == "tokenizer.model":
            write_whole(out / file.name, lambda tmp, file=file: shutil.copyfile(file, tmp))
    write_model(out, tensors, read_json(src / "config.json", {}))
    print(f"{out}: {len(tensors)} tensors under their own names")


def convert_model(src, out, vision, llm):
    cfg, found, lora = read_model(src, vision, llm if is_lora(src) else "")
    rows = max(cfg.image_token, cfg.pad_token) + 1
    if cfg.decoder.vocab_size < rows:  # llava-hf has rows for <image> and <pad>
        cfg.decoder.vocab_size = -(-rows // 64) * 64
        found = grow_words(found, cfg.decoder.vocab_size)
    vlm = fill_model(cfg, found, lora, src, dtype=stored_dtype(found))

    tokenizer = tokenizer_home(src, llm) / "tokenizer.model"
    if llm and not tokenizer.exists():
        tokenizer = Path(llm) / "tokenizer.model"
    if tokenizer.exists():
        save_processor(out, tokenizer, cfg)
    vlm.save_pretrained(out)
    layout = "the llava-hf layout" if fits_llava(cfg) else "our own layout: llava-hf cannot hold this model"
    print(f"{out}: in {layout}")
    if not tokenizer.exists():
        print(f"{src} has no tokenizer.model; put one beside it")


# ---- info --------------------------------------------------------------------------------------------------


def info(args):
    folder = Path(args.model)
    cfg = find_config(args.model, args.vision, args.llm)
    with torch.device("meta"):
        if isinstance(cfg, DecoderConfig):
            parts = {"decoder": Decoder(cfg)}
        elif isinstance(cfg, VisionConfig):
            parts = {"vision": ViT(cfg)}
        else:
            parts = dict(VLM(cfg).named_children())

    # The parts, and their sum.
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    for part, n in count.items():
        c = getattr(cfg, part, cfg)                  # a tower or decoder alone is its own part
        facts = {part: c} if isinstance(c, str) else asdict(c)
        shown = [f"{name} {value}" for name, value in facts.items() if name not in ("mean", "std", "tiling")]
        print(f"{part:10} {n:>16,} parameters   {', '.join(shown)}")
    total = sum(count.values())
    print(f"{'total':10} {total:>16,} parameters")
    if "connector" in count:
        print_pictures(cfg, folder)

    # Training keeps a float32 weight, its gradient and Adam's two moments: 16 bytes. A frozen weight has 4.
    frozen = sum(n for part, n in count.items() if part.startswith("vision"))
    training = 16 * (total - frozen) + 4 * frozen
    print(
        f"memory     {2 * total / 1e9:.2f} GB in bfloat16; to train all but the towers "
        f"{training / 1e9:.2f} GB (float32, Adam), and activations"
    )


def find_config(name, vision, llm):
    folder = Path(name)
    if name in PRESETS:
        return PRESETS[name]
    if not folder.is_dir():
        raise UserError(f"{name}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")
    if is_whole(folder):
        has_weights = weights_file(folder) or is_lora(folder)
        return read_model(folder, vision, llm)[0] if has_weights else read_config(folder)
    c = read_json(folder / "config.json", {})
    return decoder_config(c) if c.get("model_type") in DECODERS else read_tower(folder)


def print_pictures(cfg, folder):
    tiles = ""
    if cfg.tiling:
        most = max(map(math.prod, cfg.tiling.grids))
        tiles = f" of up to {most} tiles, global view {cfg.tiling.global_view}"
    print(
        f"pictures   {cfg.vision.n_token} visual tokens for a tile of {cfg.vision.image_size} px, "
        f"mode {cfg.image_mode}{tiles}, template {cfg.template}"
    )
    says_mode = "image_aspect_ratio" in read_json(folder / "config.json", {})
    if cfg.image_mode == "crop" and not says_mode and processor_json(folder).get("do_center_crop"):
        print("           crop because its image processor is set so; LLaVA-1.5 itself was trained with pad:")
        print("           --image-mode pad")


if __name__ == "__main__":
    sys.exit(run(main))
