"""Pictures of any size: which grid, which tiles in which order, which patches, and that every part of the
program counts them alike."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import QUICK, ROOT, call, save, tiny_config
from PIL import Image
from torch.testing import assert_close

import sample
import tools.show as tools_show
import tools.weights as tools_weights
import toyworld
import train
from conversation import encode_prompt
from data import Examples, collate
from model import PRESETS, VLM, Connector, DecoderConfig, VLMConfig
from support.cli import UserError
from support.configs import read_config
from support.data_files import Records, picture_paths
from support.picture_files import open_image
from support.start import set_image_mode
from support.templates import SYSTEM_VICUNA
from support.tiling import TILINGS, choose_grid, grids_up_to, layout_by_rows
from vision import MODES, VisionConfig, cut_tiles, find_tiling, normalize_pixels

transformers = pytest.importorskip("transformers")
ROOT = Path(train.__file__).parent
HD, NEXT, INTERN = (
    VisionConfig(image_size=224),
    VisionConfig(image_size=336),
    VisionConfig(image_size=448, merge=2),
)
TINY = dict(image_size=28, patch_size=7, n_embd=32, n_layer=2, n_head=2, n_hidden=64)  # 4 x 4 patches
TOWERS = {
    "hd": VisionConfig(**TINY),
    "anyres": VisionConfig(**TINY),
    "internvl": VisionConfig(**TINY, merge=2),
}


def noise(w, h):
    return Image.fromarray(np.random.default_rng(w * 7 + h).integers(0, 256, (h, w, 3), dtype=np.uint8))


def sizes(n, seed=0, longest=4000):
    """Random widths and heights, as often tiny as large, and the extremes."""
    rng = random.Random(seed)
    some = [tuple(round(longest ** rng.random()) for _ in range(2)) for _ in range(n)]
    return some + [
        (1, 1),
        (1, longest),
        (longest, 1),
        (longest, longest),
        (longest, longest // 2),
        (longest // 3, longest),
        (200, 200),
        (300, 10),
    ]


# ---- the published numbers --------


def test_hd_has_14_grids_of_up_to_six_tiles_and_internvl_35_of_up_to_twelve():
    hd, internvl = TILINGS["hd"].grids, TILINGS["internvl"].grids
    assert len(hd) == 14 and {(3, 2), (2, 3), (1, 6)} <= set(hd)
    assert len(internvl) == 35 and max(columns * rows for columns, rows in internvl) == 12


@pytest.mark.parametrize(
    "mode, cfg, size, grid, rows, columns, tokens",
    [
        ("hd", HD, (640, 480), (3, 2), 32, 42, 42 * 32 + 32 + 256),
        ("hd", HD, (1000, 1000), (2, 2), 32, 32, 1024 + 32 + 256),
        ("hd", HD, (672, 448), (3, 2), 32, 48, 1536 + 32 + 256),
        ("hd", HD, (448, 672), (2, 3), 48, 32, 1536 + 48 + 256),
        ("anyres", NEXT, (640, 480), (2, 2), 36, 48, 576 + 1728 + 36),
        ("anyres", NEXT, (1000, 1000), (2, 2), 48, 48, 2928),
    ],
)
def test_grid_kept_rows_and_columns_and_tokens_are_the_published_ones(
    mode, cfg, size, grid, rows, columns, tokens
):
    tiles, layout = cut_tiles(Image.new("RGB", size), cfg, mode)
    assert choose_grid(size, cfg.image_size, TILINGS[mode]) == grid
    assert len(tiles) == 1 + grid[0] * grid[1]
    assert len(layout) == tokens
    global_view, local = layout[: cfg.n_token], layout[cfg.n_token :]
    assert global_view.tolist() == [[0, patch] for patch in range(cfg.n_token)]
    assert (local[:, 0] < 0).sum() == rows
    ends = local.view(rows, columns + 1, 2)[:, -1]
    assert (ends[:, 0] == -1).all()


def test_a_224_px_picture_does_not_choose_448():
    assert choose_grid((224, 224), 224, TILINGS["hd"]) == (1, 1)
    assert choose_grid((225, 225), 224, TILINGS["hd"]) == (2, 2)


@pytest.mark.parametrize(
    "size, six, twelve",
    [
        ((448, 448), (1, 1), (1, 1)),
        ((640, 640), (2, 2), (2, 2)),
        ((960, 960), (2, 2), (3, 3)),
        ((640, 480), (3, 2), (4, 3)),
        ((800, 600), (3, 2), (4, 3)),
        ((1024, 768), (3, 2), (4, 3)),
        ((500, 375), (3, 2), (4, 3)),
        ((1280, 720), (2, 1), (4, 2)),
        ((1920, 1080), (2, 1), (4, 2)),
        ((1200, 300), (4, 1), (4, 1)),
        ((300, 1200), (1, 4), (1, 4)),
        ((336, 448), (2, 3), (3, 4)),
        ((633, 633), (1, 1), (1, 1)),
        ((634, 634), (2, 2), (2, 2)),
        ((950, 950), (2, 2), (2, 2)),
        ((951, 951), (2, 2), (3, 3)),
    ],
)
def test_internvl_cuts_the_published_grids_and_adds_a_thumbnail_last(size, six, twelve):
    for grid, n in (six, 6), (twelve, 12):
        cfg = replace(INTERN, tiling=replace(TILINGS["internvl"], grids=grids_up_to(n)))
        tiles, layout = cut_tiles(noise(*size), cfg, "internvl")
        n_tile = grid[0] * grid[1] + (grid != (1, 1))
        assert choose_grid(size, 448, cfg.tiling) == grid
        assert (len(tiles), len(layout)) == (n_tile, 256 * n_tile)
        thumbnail = noise(*size).resize((448, 448), Image.BICUBIC)
        assert (tiles[-1].permute(1, 2, 0).numpy() == np.asarray(thumbnail)).all()


@pytest.mark.parametrize("n_picture, n_tile", [(1, 12), (2, 6), (5, 2), (7, 1), (30, 1)])
def test_pictures_of_one_conversation_share_the_tiles_that_internvl_gives_to_one(n_picture, n_tile):
    tiles, _ = cut_tiles(noise(2000, 170), INTERN, "internvl", n_picture)
    assert len(tiles) == n_tile + (n_tile > 1)  # each has its thumbnail
    assert len(cut_tiles(noise(2000, 170), HD, "hd", n_picture)[0]) == 7  # LLaVA shares nothing


@pytest.mark.parametrize("n", [0, 101, 10**9])
def test_an_impossible_number_of_tiles_is_refused_at_once(n):
    with pytest.raises(UserError, match=f"{n} tiles a picture; choose 1 to 100"):
        grids_up_to(n)
    with pytest.raises(UserError, match="each needs 1 to 100 tiles"):
        replace(TILINGS["hd"], grids=[[n, 1]])


def test_tiles_go_row_by_row_and_tokens_in_hd_too_across_the_tiles_of_a_row():
    quarters = Image.new("RGB", (2, 2))
    colors = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    quarters.putdata(colors)
    picture = quarters.resize((56, 56), Image.NEAREST)
    for mode, at in ("hd", 1), ("anyres", 1), ("internvl", 0):
        cfg = replace(TOWERS[mode], tiling=replace(TILINGS[mode], grids=((2, 2),)))
        tiles, layout = cut_tiles(picture, cfg, mode)
        middles = [tuple(tile[:, 14, 14].tolist()) for tile in tiles[at : at + 4]]
        assert middles == colors
    _, layout = cut_tiles(picture, TOWERS["hd"], "hd")
    first_row = [[tile, patch] for tile in (1, 2) for patch in range(4)] + [[-1, 0]]
    assert layout[16:25].tolist() == first_row
    assert layout[25].tolist() == [1, 4]  # of the second row of patches


# ---- what holds for any picture --------


@pytest.mark.parametrize("mode", ["hd", "anyres", "internvl"])
def test_every_pixel_is_in_a_tile_and_no_tile_is_of_padding_only(mode):
    cfg, tiling, S = TOWERS[mode], TILINGS[mode], 28
    padding = torch.tensor([0 if mode == "anyres" else int(255 * m) for m in cfg.mean]).view(3, 1, 1)
    for w, h in sizes(100):
        tiles, layout = cut_tiles(Image.new("RGB", (w, h), "red"), cfg, mode)
        assert (tiles != padding).flatten(1).any(dim=1).all(), (w, h)
        is_red = (tiles == torch.tensor([255, 0, 0]).view(3, 1, 1)).all(dim=1)  # (n, S, S)
        columns, rows = choose_grid((w, h), S, tiling)
        n_local = len(tiles) - (tiling.global_view != "none" and (mode == "anyres" or columns * rows > 1))
        if mode != "hd":  # the whole picture, squashed
            assert is_red[0 if mode == "anyres" else -1].all()
        if mode == "hd" or n_local == columns * rows:
            local = is_red[-n_local:] if tiling.global_view == "first" else is_red[:n_local]
            assert local.sum() == pixels_filled(w, h, columns * S, rows * S, tiling.by_tile), (w, h)

        # Every tile that the tower runs is read, no other is named.
        used = layout[layout[:, 0] >= 0]
        assert set(used[:, 0].tolist()) == set(range(len(tiles)))
        assert len(used.unique(dim=0)) == len(used) and used[:, 1].max() < cfg.n_token


def pixels_filled(w, h, W, H, is_squashed):
    """How many pixels of a canvas a picture covers that was made to fit, its shorter side rounded up."""
    if is_squashed:
        return W * H
    if W / w < H / h:
        return W * min(H, math.ceil(h * (W / w)))
    return H * min(W, math.ceil(w * (H / h)))


def test_hd_keeps_patches_of_the_picture_and_loses_full_ones_only_at_the_two_rims():
    cfg = TOWERS["hd"]
    for size in sizes(100, seed=1):
        tiles, layout = cut_tiles(Image.new("RGB", size, "red"), cfg, "hd")
        if len(tiles) > 1:  # without the global view
            tiles, layout = tiles[1:], layout[cfg.n_token :] - torch.tensor([1, 0])
        tile, patch = layout[layout[:, 0] >= 0].T  # no row ends
        patches = tiles[:, 0].unfold(1, 7, 7).unfold(2, 7, 7).flatten(1, 2)  # (n, 16, 7, 7), their red
        red_share = (patches == 255).float().mean(dim=(2, 3))
        assert len(tile) and (red_share[tile, patch] > 0).float().mean() >= 0.5, size


def test_grids_and_token_counts_equal_transformers_for_any_size():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
    from transformers.models.llava_next.image_processing_pil_llava_next import select_best_resolution
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    pinpoints = [[r * 28, c * 28] for c, r in TILINGS["anyres"].grids]
    for w, h in sizes(400, seed=2):
        assert choose_grid((w, h), 28, TILINGS["internvl"]) == get_optimal_tiled_canvas(
            (h, w), (28, 28), 1, 12
        )
        columns, rows = choose_grid((w, h), 28, TILINGS["anyres"])
        assert (rows * 28, columns * 28) == select_best_resolution((h, w), pinpoints)
        patches, ends = LlavaNextProcessor._get_unpadded_features(None, h, w, 4, 4, rows, columns)
        if w * h < 10**6:
            _, layout = cut_tiles(Image.new("RGB", (w, h)), TOWERS["anyres"], "anyres")
            assert len(layout) == 16 + patches + ends, (w, h)


@pytest.mark.parametrize("size", [
    (640, 480), (97, 64), (64, 97), (300, 40), (5, 7), (123, 456), (200, 200),
])
def test_the_tiles_are_those_of_transformers_image_processors(size):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    picture = noise(*size)
    square = {"height": 28, "width": 28}

    def normalized(mode):
        tiles, _ = cut_tiles(picture, TOWERS[mode], mode)
        return normalize_pixels(tiles, TOWERS[mode], torch.float32)

    pinpoints = [[r * 28, c * 28] for c, r in TILINGS["anyres"].grids]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=pinpoints)
    pixels = theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert_close(normalized("anyres"), pixels, rtol=0, atol=1e-5)
    theirs = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=12)
    pixels = theirs(picture, return_tensors="pt")["pixel_values"]
    assert_close(normalized("internvl"), pixels, rtol=0, atol=1e-5)


# ---- the model --------


def lively(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return module.eval()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def tiny(tok, mode, **changes):
    connector = "norm_gelu" if mode == "internvl" else "mlp2x_gelu"
    tower = TOWERS.get(mode, TOWERS["hd"])
    cfg = tiny_config(tok, block_size=1024, vision=tower, connector=connector, image_mode=mode)
    return lively(VLM(replace(cfg, **changes)))


@torch.no_grad()
@pytest.mark.parametrize("grids", [TILINGS["anyres"].grids, ((1, 1), (2, 1), (1, 2), (3, 2))])
def test_an_anyres_model_opens_in_transformers_as_llava_next_and_says_the_same(tmp_path, tok, grids):
    tower = replace(TOWERS["anyres"], tiling=replace(TILINGS["anyres"], grids=grids))
    ours = tiny(tok, "anyres", vision=tower)
    save(ours, tok, tmp_path)
    Theirs = transformers.LlavaNextForConditionalGeneration
    theirs, report = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    processor, question = transformers.AutoProcessor.from_pretrained(tmp_path), "<image>\nWhat is this?"
    text = f"{SYSTEM_VICUNA} USER: {question} ASSISTANT:"
    for size in (28, 28), (60, 31), (31, 60), (100, 90), (300, 40), (200, 5), (2, 300):
        pixels, layout = cut_tiles(noise(*size), ours.cfg.vision, "anyres")
        tokens = torch.tensor([encode_prompt(tok, [("human", question)], "vicuna_v1", [len(layout)])])
        inputs = processor(images=noise(*size), text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == tokens.tolist(), size
        # Theirs are resized without Pillow: ours get the same, to compare the packing.
        pictures = inputs["pixel_values"][0]
        if len(pictures) == len(pixels):
            logits = theirs.eval()(**inputs).logits
            assert_close(ours(tokens, pictures, layout=layout), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_llava_next_of_transformers_opens_here_with_its_grids(tmp_path, tok):
    ours = tiny(tok, "anyres")
    save(ours, tok, tmp_path / "a")
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "a")
    theirs.config.image_grid_pinpoints = [[28, 56], [56, 28], [84, 84]]  # (height, width)
    theirs.save_pretrained(tmp_path / "b")
    again = VLM.from_pretrained(tmp_path / "b")
    assert again.cfg.image_mode == "anyres"
    assert find_tiling(again.cfg.vision, "anyres").grids == ((2, 1), (1, 2), (3, 3))
    assert_close(again.connector.row_end, ours.connector.row_end)
    assert same(ours, again)


def test_the_original_llava_reads_its_pinpoints_width_first(tmp_path, tok):
    c = {
        "model_type": "llava_llama",
        "mm_hidden_size": 1024,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "image_grid_pinpoints": [[336, 672], [1008, 336]],
    }
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert find_tiling(read_config(tmp_path, {}, [VisionConfig()]).vision, "anyres").grids == ((1, 2), (3, 1))
    for wrong, says in (
        (dict(image_grid_pinpoints=[[300, 336]]), "whole multiples"),
        (dict(mm_patch_merge_type="flat"), "only .spatial_unpad."),
    ):
        (tmp_path / "config.json").write_text(json.dumps(c | wrong))
        with pytest.raises(UserError, match=f"config.json: .*{says}"):
            read_config(tmp_path, {}, [VisionConfig()])


def test_a_layout_names_the_tile_and_the_place_of_each_visual_token():
    _, layout = layout_by_rows((1, 1), 1, 1, 2, TILINGS["hd"])  # its docstring's example
    assert layout.tolist() == [[0, 0], [0, 1], [-1, 0], [0, 2], [0, 3], [-1, 0]]
    used, layout = layout_by_rows((3, 1), 3, 3, 1, TILINGS["hd"])  # 3 x 3 tiles, the picture in the middle row
    assert used.tolist() == [3, 4, 5] and layout.tolist() == [[0, 0], [1, 0], [2, 0], [-1, 0]]


@torch.no_grad()
def test_a_row_end_stands_where_the_layout_says_and_a_patch_everywhere_else():
    connector = lively(Connector(VLMConfig(TOWERS["hd"], DecoderConfig(n_embd=32), image_mode="hd")))
    tiles, layout = cut_tiles(noise(60, 28), TOWERS["hd"], "hd")
    features = torch.randn(len(tiles), 16, 32)
    translated = connector.layers[2](F.gelu(connector.layers[0](features)))
    for row, (tile, patch) in zip(connector(features, layout), layout.tolist(), strict=True):
        assert_close(row, connector.row_end if tile < 0 else translated[tile, patch])


MIXED = [
    [(100, 60)],
    [],
    [(28, 28), (90, 300), (5, 5)],
    [(400, 30)],
]  # sizes of the pictures of four records, one of text alone


@pytest.fixture
def records(tmp_path):
    rows = []
    for i, some in enumerate(MIXED):
        for k, size in enumerate(some):
            noise(*size).save(tmp_path / f"{i}{k}.png")
        rows.append(
            {
                "id": str(i),
                "image": [f"{i}{k}.png" for k in range(len(some))],
                "conversations": [
                    {"from": "human", "value": "<image>" * len(some) + "\nWhat?"},
                    {"from": "gpt", "value": "a cat " * (i + 1)},
                ],
            }
        )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Records(tmp_path / "data.json", tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_many_sizes_and_text_alone_in_a_batch_equal_each_by_itself(records, tok, mode):
    vlm = tiny(tok, mode)
    examples = [Examples(records, tok, "vicuna_v1", vlm.cfg.vision, mode, 1024)[i] for i in range(4)]
    batch = collate(examples, tok.pad)
    assert (batch["tokens"] == tok.image).sum() == len(batch["layout"])
    assert [len(e["pixels"]) for e in examples][1] == 0 and len(batch["pixels"]) == sum(
        len(e["pixels"]) for e in examples
    )
    together = vlm(batch["tokens"], batch["pixels"], layout=batch["layout"])
    for row, e in enumerate(examples):
        alone = vlm(e["tokens"][None], e["pixels"], layout=e["layout"])[0]
        assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_the_tower_looks_at_each_tile_once_and_not_at_all_for_text_alone(records, tok):
    vlm, seen = tiny(tok, "hd"), []
    vlm.vision.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    examples = Examples(records, tok, "vicuna_v1", vlm.cfg.vision, "hd", 1024)
    for rows in ([1], [0, 1], [1, 2]):
        batch = collate([examples[i] for i in rows], tok.pad)
        train.Answering.loss(vlm, batch)[0].backward()
    assert seen == [len(examples[0]["pixels"]), len(examples[2]["pixels"])]


def test_text_alone_teaches_a_connector_nothing_and_stops_nobody(records, tok):
    vlm = tiny(tok, "hd")
    vlm.requires_grad_(False).connector.requires_grad_(True)
    batch = collate([Examples(records, tok, "vicuna_v1", vlm.cfg.vision, "hd", 1024)[1]], tok.pad)
    loss, counts = train.backward([vlm], train.Answering, [batch])
    assert loss > 0 and counts["supervised"] > 0 and vlm.connector.row_end.grad is None


def test_llava_1_5_hd_takes_up_to_1824_visual_tokens_and_learns_its_connector_without_tiles():
    cfg = PRESETS["llava-1.5-hd-7b"]
    counts = [
        len(cut_tiles(Image.new("RGB", size), cfg.vision, cfg.image_mode)[1])
        for size in ((672, 448), (640, 480), (2000, 900))
    ]
    assert (cfg.vision.n_token, counts[:2]) == (256, [1824, 1632]) and max(counts) == 1824
    assert (
        train.RECIPES["llava-1.5-hd-7b", "pretrain"]["image_mode"] == "crop"
        and "image_mode" not in train.RECIPES["llava-1.5-hd-7b", "finetune"]
    )


def test_training_and_sampling_count_the_same_tokens(records, tok):
    for mode in MODES:
        vlm, examples = tiny(tok, mode), []
        examples = Examples(records, tok, "vicuna_v1", tiny(tok, mode).cfg.vision, mode, 1024)
        seen = []
        vlm.generate = lambda tokens, **flags: (
            seen.append((tokens, flags["layout"])) or torch.full((len(tokens), 1), tok.eos)
        )
        paths = picture_paths(records[2])
        pictures = [sample.cut_picture(vlm, open_image(path), len(paths)) for path in paths]
        sample.answer(vlm, tok, [sample.encode_question(vlm, tok, "What?", pictures)], max_new_tokens=8)
        ((tokens, layout),) = seen
        assert torch.equal(layout, examples[2]["layout"]) and (tokens == tok.image).sum() == (
            examples[2]["tokens"] == tok.image
        ).sum() == len(layout)


def test_a_model_with_row_ends_does_not_take_pictures_without_a_layout_nor_the_reverse(tok):
    pixels, layout = cut_tiles(noise(60, 30), TOWERS["hd"], "hd")
    whole, ended = torch.full((1, len(pixels) * 16), tok.image), torch.full((1, len(layout)), tok.image)
    with pytest.raises(ValueError, match="come with a layout"):
        tiny(tok, "hd")(whole, pixels)
    with pytest.raises(ValueError, match="row ends and the model none"):
        tiny(tok, "pad")(ended, pixels, layout=layout)
    with pytest.raises(
        ValueError, match=f"{len(layout) - 1} image tokens in the batch, {len(layout)} visual"
    ):
        tiny(tok, "hd")(ended[:, 1:], pixels, layout=layout)


# ---- directories, training, programs --------


@torch.no_grad()
@pytest.mark.parametrize("mode", ["hd", "anyres", "internvl"])
def test_a_saved_model_is_the_same_with_all_its_choices(tmp_path, tok, mode, capsys):
    choices = (
        dict(global_view="none") if mode == "anyres" else dict(grids=grids_up_to(3), global_view="first")
    )
    vlm = tiny(tok, mode)
    set_image_mode(vlm, mode, **choices)
    again = VLM.from_pretrained(save(vlm, tok, tmp_path))
    assert again.cfg == vlm.cfg and find_tiling(again.cfg.vision, mode).global_view == choices["global_view"]
    pixels, layout = cut_tiles(noise(90, 50), again.cfg.vision, mode)
    tokens = torch.full((1, len(layout)), tok.image)
    assert torch.equal(again(tokens, pixels, layout=layout), vlm(tokens, pixels, layout=layout))
    tools_weights.main(["info", str(tmp_path)])
    assert f"global view {choices['global_view']}" in capsys.readouterr().out


def test_an_impossible_tiling_is_refused():
    with pytest.raises(UserError, match="'middle'; choose one of first, last, none"):
        replace(TILINGS["hd"], global_view="middle")


@pytest.fixture
def go(tok, large_world, tmp_path, monkeypatch):
    """go(mode, flags..., out="a") trains a tiny model on a world of pictures larger than its tile."""
    (tmp_path / "world").symlink_to(large_world)
    save(tiny(tok, "pad"), tok, tmp_path / "start")
    monkeypatch.chdir(tmp_path)

    def go(mode, *flags, out, model="start"):
        base = ["--model", model, "--data", "world/train.json", "--image-mode", mode, "--out", out, *QUICK]
        return call(train.main, *base, *flags)

    return go


@pytest.mark.parametrize("mode", ["hd", "anyres", "internvl"])
def test_a_run_with_tiles_saves_loads_and_resumes_bit_for_bit_and_answers_its_questions(
    go, tok, mode, monkeypatch
):
    monkeypatch.setitem(PRESETS, "tiny", replace(tiny(tok, "pad").cfg, vision=TOWERS["hd"]))
    preset = ("--llm", "", "--tokenizer", tok.path, "--model", "tiny")
    assert go(mode, *preset, "--final-eval", "--eval-limit", 6, out="whole") == 0

    original, calls = torch.optim.AdamW.step, []

    def step(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert go(mode, *preset, out="half") == 130
    assert go(mode, *preset, "--resume", out="half") == 0
    a, b = (VLM.from_pretrained(name) for name in ("whole", "half"))
    assert same(a, b)
    assert a.cfg.image_mode == mode and json.loads(Path("whole/results.json").read_text())["categories"]
    is_internvl = mode == "internvl"
    assert is_internvl == (a.cfg.vision.merge == 2) == (a.connector.row_end is None)
    flags = ["--model", "whole", "--image", "world/images/val_00000.png", "--prompt", "What?"]
    assert call(sample.main, *flags, "--max-new-tokens", 3, "--device", "cpu") == 0


def test_the_row_end_learns_with_the_connector_and_stands_still_without(go):
    def row_end(part, lr):
        out = f"{part} {lr}"
        assert go("hd", "--train", part, "--lr", lr, out=out) == 0
        return VLM.from_pretrained(out).connector.row_end

    assert not torch.allclose(row_end("connector", 3e-3), row_end("connector", 1e-9), atol=1e-4)
    assert torch.equal(row_end("llm", 3e-3), row_end("llm", 1e-9))


def test_hd_starts_from_a_connector_that_never_saw_a_tile(go, capsys):
    assert go("pad", "--train", "connector", "--max-steps", 2, out="stage1") == 0
    assert go("hd", "--projector", "stage1", "--lr", "1e-9", "--max-steps", 1, out="stage2") == 0
    one, two = VLM.from_pretrained("stage1"), VLM.from_pretrained("stage2")
    assert_close(
        one.connector.layers[0].weight, two.connector.layers[0].weight
    ) and two.connector.row_end is not None


def test_a_choice_of_tiles_that_cannot_be_is_one_line(go, capfd):
    for flags, says in (
        (("hd", "--global-view", "lsat"), "did you mean last"),
        (("pad", "--global-view", "none"), "cuts no tiles"),
        (("anyres", "--max-tiles", 3), "five grids"),
        (("hdd",), "did you mean hd"),
    ):
        assert go(*flags, out="x") == 1
        assert says in capfd.readouterr().err.splitlines()[-1]
    flags = ["--model", "start", "--image", "world/images/val_00000.png", "--image-mode", "hd"]
    assert call(sample.main, *flags, "--prompt", "?") == 1
    assert "never learned how the rows of several tiles end" in capfd.readouterr().err


@pytest.mark.parametrize("mode", MODES)
def test_show_draws_every_tile_with_its_positions_and_row_ends(tmp_path, records, tok, mode, capsys):
    save(tiny(tok, mode), tok, tmp_path / "m")
    flags = ["--image-root", tmp_path, "--model", tmp_path / "m", "--id", "2", "--out", tmp_path / "s.png"]
    assert call(tools_show.main, records.files[0].path, *flags) == 0
    text, cfg = capsys.readouterr().out, tiny(tok, mode).cfg.vision
    cut = [cut_tiles(noise(*size), cfg, mode, len(MIXED[2])) for size in MIXED[2]]
    for (tiles, layout), name in zip(cut, ("20.png", "21.png", "22.png")):
        assert (
            f"{name}: {len(tiles)} tiles, {len(layout)} visual tokens, "
            f"{(layout[:, 0] < 0).sum()} of them row ends"
        ) in text
    assert f"mode {mode}" in text and f"{sum(len(layout) for _, layout in cut)} of them visual" in text
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    red = (sheet == (240, 48, 48)).all(-1).any(1)  # a bar, 5 px high, for each row end
    assert red.any() == (mode in ("hd", "anyres"))


def test_show_draws_the_patches_that_have_a_token_as_they_are_and_no_other():
    cfg = VisionConfig(image_size=96, patch_size=12, n_embd=8, n_head=1)
    tiles, layout = cut_tiles(Image.new("RGB", (320, 240), "red"), cfg, "hd")
    sheet = np.asarray(tools_show.draw_tokens(tiles, layout, list(range(len(layout))), cfg))
    assert len(layout) == 64 + 16 * (22 + 1)  # of 24 columns the outer two are padding
    assert sheet.shape == ((8 + 16) * 12, 23 * 12 + 60, 3)
    red = (tiles[:, 0] == 255) & (tiles[:, 1] == 0)
    assert (sheet == (255, 0, 0)).all(-1).sum() == red.sum() > 256 * 192
    margin = (sheet == (122, 116, 104)).all(-1).sum()
    # Of the global view, where 2 x 2 rows are blended, and of two columns.
    assert margin == 2 * 10 * 96 + 2 * 4 * 192


# ---- the experiment --------


def test_small_words_are_drawn_small_and_nothing_else_changes(tmp_path):
    usual, small = tmp_path / "usual", tmp_path / "small"
    toyworld.write_world(usual, 12, 4, 96)
    toyworld.write_world(small, 12, 4, 96, words=0.5)
    n_changed = 0
    for name in sorted(p.name for p in (usual / "images").iterdir()):
        rng = random.Random(f"0 {name[:-10]} {int(name[-9:-4])}")
        sign = toyworld.random_scene(rng, held_out=name.startswith("val")).sign
        a, b = (np.asarray(Image.open(world / "images" / name)).astype(int) for world in (usual, small))
        rows, columns = np.nonzero((a != b).any(-1))
        assert bool(len(rows)) == bool(sign), name
        if sign:
            x1, y1, x2, y2 = (v * 96 for v in sign.box)
            assert x1 - 2 <= columns.min() and columns.max() <= x2 + 2
            assert y1 - 2 <= rows.min() and rows.max() <= y2 + 2
            n_changed += 1
    assert n_changed and (usual / "train.json").read_bytes() == (small / "train.json").read_bytes()
    assert "words" not in json.loads((usual / "world.json").read_text())
