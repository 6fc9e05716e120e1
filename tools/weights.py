"""tools.weights: moved here; to be rewritten."""

from dataclasses import asdict
from pathlib import Path
import argparse
import math
import shutil
import sys

import torch

from model import Decoder, DecoderConfig, PRESETS, VLM
from support.cli import UserError, run
from support.export import save_processor
from support.io import write_whole
from support.weights import base_of, config_reader, decoder_config, fits_llava, grow_words, is_lora, load_strict, open_weights, read_config, read_json, read_model, read_processor, read_tensors, read_tower, stored_dtype, weights_file, write_model
from vision import ViT, VisionConfig



def main(argv=None):
    cli = argparse.ArgumentParser(description="Turn public weights into safetensors, or say what a model is made of.")
    commands = cli.add_subparsers(dest="command", required=True)
    convert_cli = commands.add_parser("convert", help=".bin and .pt to safetensors; a whole model to the llava-hf layout where that can hold it")
    convert_cli.add_argument("src", help="directory or file to read")
    convert_cli.add_argument("out", metavar="DIR", help="directory to write")
    info_cli = commands.add_parser("info", help="parts, parameters, visual tokens, memory; reads no weights")
    info_cli.add_argument("model", metavar="DIR|PRESET")
    for command in convert_cli, info_cli:
        command.add_argument("--vision", metavar="DIR[,DIR]", help="tower of a model published without")
        command.add_argument("--llm", metavar="DIR", help="base of a LoRA; convert takes its tokenizer.model where SRC has none")
    args = cli.parse_args(argv)
    try:
        info(args.model, args.vision, args.llm) if args.command == "info" else convert(Path(args.src), Path(args.out), args.vision, args.llm)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0



def whole(path):
    """Whether a directory holds a vision-language model, and no tower or decoder alone."""
    return is_lora(path) or config_reader(read_json(path / "config.json", {})) is not None



def convert(src, out, vision=None, llm=None):
    if out.exists() and out.resolve() == (src if src.is_dir() else src.parent).resolve():
        raise UserError(f"{out}: is where the weights are read from; choose another directory to write")
    if not whole(src):                                                      # its names stay, only the files change
        files = sorted({t.file for t in read_tensors(src).values()})
        tensors = {name: t.contiguous().clone() for file in files for name, t in open_weights(file).items() if not name.endswith("inv_freq")}
        for file in src.glob("*") if src.is_dir() else ():
            if file.suffix == ".json" and ".index." not in file.name and file.name != "config.json" or file.name == "tokenizer.model":
                write_whole(out / file.name, lambda tmp: shutil.copyfile(file, tmp))
        write_model(out, tensors, read_json(src / "config.json", {}))
        print(f"{out}: {len(tensors)} tensors under their own names")
        return
    lora = is_lora(src)
    cfg, found, tensors, public = read_model(src, vision, llm if lora else None)
    dtype = stored_dtype(found)
    rows = max(cfg.image_token, cfg.pad_token) + 1
    if cfg.decoder.vocab_size < rows:                                       # llava-hf has rows for <image> and <pad>, the original has none
        cfg.decoder.vocab_size = -(-rows // 64) * 64
        found = grow_words(found, cfg.decoder.vocab_size)
    with torch.device("meta"):
        vlm = VLM(cfg)
    load_strict(vlm, found, src, tensors, dtype=dtype, public=public)
    tokenizer = next((Path(d) / "tokenizer.model" for d in (src, llm or lora and base_of(src)) if d and (Path(d) / "tokenizer.model").exists()), None)
    if tokenizer:
        save_processor(out, tokenizer, cfg)
    vlm.save_pretrained(out)
    print(f"{out}: in {'the llava-hf layout' if fits_llava(cfg) else 'our own layout, since no public one of ours holds this model'}"
          + ("" if tokenizer else f"; {src} has no tokenizer.model, put one beside it"))



def info(name, vision=None, llm=None):
    folder = Path(name)
    if name in PRESETS:
        cfg = PRESETS[name]
    elif not folder.is_dir():
        raise UserError(f"{name}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")
    elif whole(folder):                                                     # of a config without weights what it says is told
        cfg = read_model(folder, vision, llm)[0] if weights_file(folder) or is_lora(folder) else read_config(folder)
    else:
        c = read_json(folder / "config.json", {})
        cfg = decoder_config(c) if c.get("model_type") in ("llama", "mistral", "internlm2") else read_tower(folder)
    with torch.device("meta"):
        parts = {"decoder": Decoder(cfg)} if isinstance(cfg, DecoderConfig) else {"vision": ViT(cfg)} if isinstance(cfg, VisionConfig) else dict(
            VLM(cfg).named_children())
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    for part, n in count.items():
        c = getattr(cfg, part, cfg)                                         # a tower or decoder alone is its own part
        print(f"{part:10} {n:>16,} parameters   " + (c if isinstance(c, str) else ", ".join(
            f"{key} {value}" for key, value in asdict(c).items() if key not in ("mean", "std", "tiling"))))
    total, trained = sum(count.values()), sum(n for part, n in count.items() if not part.startswith("vision"))
    print(f"{'total':10} {total:>16,} parameters")
    if "connector" in count:
        grids = cfg.tiling and f" of up to {max(map(math.prod, cfg.tiling.grids))} tiles, global view {cfg.tiling.global_view}"
        print(f"pictures   {cfg.vision.n_token} visual tokens for a tile of {cfg.vision.image_size} px, mode {cfg.image_mode}{grids or ''}, "
              f"template {cfg.template}")
        said = "image_aspect_ratio" in read_json(folder / "config.json", {})
        if cfg.image_mode == "crop" and read_processor(folder).get("do_center_crop") and not said:
            print("           crop because its image processor is set so; LLaVA-1.5 itself was trained with pad: --image-mode pad")
    GB = 1e9                                                                # training: float32 weight, gradient and two Adam moments
    print(f"memory     {2 * total / GB:.2f} GB in bfloat16; to train all but the towers {(16 * trained + 4 * (total - trained)) / GB:.2f} GB "
          "(float32, Adam), and activations")


if __name__ == "__main__":
    sys.exit(run(main))
