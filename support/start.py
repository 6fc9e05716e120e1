"""The model that a run starts from: a preset with its ingredients, a model directory, or a checkpoint.

A preset names sizes only. Its ingredients are --vision (one tower or two), --llm, --tokenizer, --projector;
what is not given starts from random weights.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from conversation import Tokenizer
from model import PRESETS, VLM
from support.cli import UserError, one_of
from support.configs import check_tower, read_decoder
from support.tiling import TILINGS, grids_up_to
from support.weights import (
    NothingDrawn,
    base_of,
    check_tokenizer,
    is_lora,
    load_connector,
    load_decoder,
    load_vision,
    read_tower,
    tokenizer_home,
)
from vision import ViT, find_tiling

ASSETS = Path(__file__).parent.parent / "assets"
TOY = {"vision": str(ASSETS / "toy-clip"), "llm": str(ASSETS / "toy-vicuna")}


def build(cfg, checkpoint=None, device="cpu"):
    """-> the model, with all its weights, and its tokenizer.

    device "meta": as --dry-run has it, without weights. What does not fit together is an error there, too, so
    that is tried before gigabytes are read.
    """
    if device != "meta" and not checkpoint:
        build(cfg, device="meta")
    if checkpoint:
        # A LoRA's checkpoint holds the LoRA alone.
        vlm, tok = open_directory(base_of(checkpoint) if cfg.lora_r else checkpoint)
    elif cfg.model in PRESETS:
        vlm, tok = build_preset(cfg, device)
    else:
        if "/" not in cfg.model and not Path(cfg.model).is_dir():
            one_of("--model", cfg.model, [*PRESETS, "a model directory"])
        if cfg.tokenizer or cfg.from_scratch or cfg.connector or cfg.image_size:
            other = "--tokenizer, --connector, --image-size and --from-scratch are for presets"
            raise UserError(f"--model {cfg.model} is whole; {other}")
        vlm, tok = open_directory(cfg.model, cfg.vision, cfg.llm, device)
    check_tokenizer(vlm, tok)
    grids = grids_up_to(cfg.max_tiles) if cfg.max_tiles else ()
    with torch.device(device), NothingDrawn():
        set_image_mode(vlm, cfg.image_mode or vlm.cfg.image_mode, grids, cfg.global_view)
    if cfg.projector and not checkpoint:
        load_connector(vlm.connector, cfg.projector, device)
    if cfg.stage == "finetune":  # with this template it will be asked, not with that of the captions
        vlm.cfg.template = cfg.template or vlm.cfg.template
    return vlm, tok


def open_directory(directory, vision="", llm="", device="cpu"):
    """vision, llm: where a model that was published without them finds its tower and its base."""
    vlm = VLM.from_pretrained(directory, device, vision=vision, llm=llm)
    return vlm, Tokenizer(tokenizer_home(directory, llm))


def build_preset(cfg, device):
    plan, tok = preset_plan(cfg)
    with torch.device(device), NothingDrawn():
        vlm = VLM(plan)
    if device == "meta":  # of the ingredients their configs are enough
        return vlm, tok
    if cfg.vision:
        for tower, path in zip(vlm.towers, cfg.vision.split(","), strict=True):
            load_vision(tower, path)
    else:
        init_weights(vlm.vision)
    if cfg.llm:
        load_decoder(vlm.decoder, cfg.llm)
    else:
        init_weights(vlm.decoder)
    return vlm, tok


def init_weights(module):
    """For towers and decoders that start from nothing: N(0, 1/fan_in). The usual 0.02 is right at width 2,500
    and too small at the toy's 128."""
    for name, p in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(p)
        elif name.endswith(".weight") and p.ndim > 1:
            fan_in = p[0].numel()
            nn.init.normal_(p, std=fan_in**-0.5)
        if re.search(r"(o_proj|down_proj|out_proj|fc2)\.weight$", name):
            p.data *= 0.3  # what is added to the residual stream starts quiet
    for part in module.modules():
        if isinstance(part, ViT):
            part.pos.data.copy_(wave_positions(part.cfg))
    return module


def wave_positions(cfg):
    """A fresh position table (1 + grid^2, D): zeros for the class token, sines and cosines of row and column.

    The usual small random rows are lost beside the pixels of a bright patch; these are as large as those.
    """
    n_class, grid, D = int(cfg.class_token), cfg.grid, cfg.n_embd

    # From half a wave over the tile's side to one wave over two patches.
    octaves = torch.linspace(-1, math.log2(max(grid, 2) / 2), D // 4)
    angle = (torch.arange(grid) + 0.5)[:, None] / grid * (math.pi * 2**octaves)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D/2)
    # Of the row, then of the column: (grid^2, D), or a few channels less.
    table = torch.cat([waves.repeat_interleave(grid, dim=0), waves.repeat(grid, 1)], dim=1)
    return 0.7 * F.pad(table, (0, D - table.shape[1], n_class, 0))


def preset_plan(cfg):
    """A preset and the configs of its ingredients -> VLMConfig, Tokenizer."""
    preset = PRESETS[cfg.model]
    # Towers look at tiles of one size; two are fused. Mode internvl has its own pixel shuffle and connector.
    towers = [read_tower(path) for path in cfg.vision.split(",")] if cfg.vision else [preset.vision]
    changes = {"image_size": cfg.image_size or towers[-1].image_size}
    parts = {}
    if cfg.image_mode == "internvl":
        changes["merge"] = 2
        parts["connector"] = "norm_gelu"
    towers = [check_tower(replace(tower, **changes)) for tower in towers]
    if len(towers) > 2:
        raise UserError(f"--vision {cfg.vision}: names {len(towers)} towers; give one, or two")
    if len(towers) == 2:
        parts = {"vision2": towers[1], "connector": "fused_gelu"}
    if cfg.connector:
        parts["connector"] = cfg.connector

    decoder = read_decoder(cfg.llm) if cfg.llm else preset.decoder
    tok = Tokenizer(cfg.tokenizer or cfg.llm or TOY["llm"])
    if cfg.llm and not tok.n_text <= decoder.vocab_size <= tok.vocab_size + 64:  # some are padded
        raise UserError(
            f"{tok.path}: has {tok.n_text:,} pieces, --llm {cfg.llm} an embedding of "
            f"{decoder.vocab_size:,} rows; they do not belong together, give the decoder's own tokenizer"
        )
    parts |= {"image_token": tok.image, "pad_token": tok.pad, "bos_token": tok.bos, "eos_token": tok.eos}
    decoder = replace(decoder, vocab_size=tok.vocab_size)
    return replace(preset, vision=towers[0], decoder=decoder, **parts), tok


def set_image_mode(vlm, mode, grids=(), global_view=""):
    """How pictures become tiles from now on; grids and global_view if not those of the model or the mode."""
    tiling = find_tiling(vlm.cfg.vision, mode)
    if grids and mode == "anyres":
        raise UserError("--max-tiles is for modes hd and internvl; anyres has its five grids")
    if tiling:
        view = global_view or tiling.global_view
        tiling = replace(tiling, grids=grids or tiling.grids, global_view=view)
    elif grids or global_view:
        raise UserError(f"image mode {mode} cuts no tiles, so --max-tiles and --global-view change nothing")
    vlm.cfg = replace(vlm.cfg, image_mode=mode, vision=replace(vlm.cfg.vision, tiling=tiling))
    vlm.connector.set_row_end(vlm.cfg.ends_rows)


def saves_base(cfg):
    """Whether a LoRA's base is saved beside the run: where it is not the model directory --model as it is."""
    is_changed = cfg.model in PRESETS or cfg.projector or cfg.vision or cfg.llm or cfg.image_mode in TILINGS
    return is_changed or is_lora(cfg.model)
