"""The towers against transformers', the geometry against its image processors, and odd picture files."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.cli import UserError
from support.configs import check_tower
from support.picture_files import open_image
from support.weights import CLIP_NAMES, rename
from vision import (
    CLIP_MEAN,
    CLIP_STD,
    MODES,
    VisionConfig,
    ViT,
    cut_tiles,
    make_square,
    normalize_pixels,
)

transformers = pytest.importorskip("transformers")
SIZE = dict(num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, hidden_size=32)
THEIRS = SIZE | dict(intermediate_size=64)
OURS = dict(image_size=28, patch_size=14, n_embd=32, n_layer=3, n_head=2, n_hidden=64)
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def copy_tower(theirs, names, **switches):
    """Our tower with their weights, all of them random; and those of their names that it has no use for."""
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = ViT(VisionConfig(**OURS | switches))
    own, unused = ours.state_dict(), set()
    for name, tensor in theirs.state_dict().items():
        our_name = rename(name, dict(names))
        if our_name in own:
            own[our_name] = tensor.view_as(own[our_name])
        else:
            unused.add(name)
    ours.load_state_dict(own, strict=True)
    return ours.eval(), theirs.eval(), unused


def pooled(tower, pixels):
    """The class token after every block and the final norm, which CLIP compares with a text."""
    x = tower.embed(pixels)
    for block in tower.blocks:
        x = block(x)
    return tower.norm(x[:, 0])


# ---- towers ----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_clip_equals_transformers_at_every_layer_and_pooled():
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**THEIRS))
    ours, theirs, unused = copy_tower(theirs, CLIP_NAMES)
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == set()
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1:])  # what LLaVA reads: all but the class token
    assert_close(pooled(ours, PIXELS), out.pooler_output)
    for layer in (0, 1, 2, 3, -1, -4):
        ours.cfg.feature_layer = layer
        assert_close(ours(PIXELS), out.hidden_states[layer][:, 1:])


@torch.no_grad()
def test_siglip_is_the_same_tower_without_class_token_and_pre_norm():
    switches = dict(class_token=False, pre_norm=False, patch_bias=True, activation="gelu_tanh", norm_eps=1e-6)
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**THEIRS | dict(image_size=31)))
    ours, theirs, unused = copy_tower(theirs, CLIP_NAMES, image_size=31, **switches)
    pixels = torch.randn(2, 3, 31, 31)  # 31 = 2 * 14 + 3: a remainder that no patch sees
    assert all(name.startswith("head.") for name in unused)
    assert_close(ours(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2])


DINO_AND_VIT = [
    ("embeddings.patch_embeddings.projection.", "patch."),
    ("embeddings.cls_token", "class_token"),
    ("layernorm.", "norm."),
    ("embeddings.position_embeddings", "pos"),
    (".attention.o_proj.", ".attn.out_proj."),  # before the next row, which it is part of
    (".attention.", ".attn."),
]


@torch.no_grad()
@pytest.mark.parametrize("n_register", [0, 4])
def test_dinov2_is_the_same_tower_with_layer_scale_with_and_without_registers(n_register):
    names = DINO_AND_VIT + [
        ("embeddings.register_tokens", "registers"),
        ("encoder.layer.", "blocks."),
        (".layer_scale1.lambda1", ".scale1"),
        (".layer_scale2.lambda1", ".scale2"),
    ]
    if n_register:
        cfg = transformers.Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2, num_register_tokens=n_register)
        theirs = transformers.Dinov2WithRegistersModel(cfg)
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, mlp_ratio=2))
    switches = dict(pre_norm=False, patch_bias=True, layer_scale=True, activation="gelu", norm_eps=1e-6)
    ours, theirs, unused = copy_tower(theirs, names, n_register=n_register, **switches)
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == {"embeddings.mask_token"}
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1 + n_register :], rtol=1e-4, atol=1e-4)
    assert_close(pooled(ours, PIXELS), out.pooler_output, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_plain_vit_is_the_same_tower():
    names = DINO_AND_VIT + [
        ("layers.", "blocks."),
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
    ]
    theirs = transformers.ViTModel(transformers.ViTConfig(**THEIRS), add_pooling_layer=False)
    switches = dict(pre_norm=False, patch_bias=True, activation="gelu", norm_eps=1e-12)
    ours, theirs, unused = copy_tower(theirs, names, **switches)
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == set()
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1:])
    assert_close(pooled(ours, PIXELS), out.last_hidden_state[:, 0])


def test_clip_large_has_the_published_number_of_parameters():
    for image_size, published in (336, 303_507_456), (224, 303_179_776):
        with torch.device("meta"):
            tower = ViT(VisionConfig(image_size=image_size))
        assert sum(p.numel() for p in tower.parameters()) == published


def test_bytes_and_normalised_floats_give_the_same_features():
    tower = ViT(VisionConfig(**OURS))
    tiles = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    assert_close(tower(tiles), tower((tiles / 255 - mean) / std))


@pytest.mark.parametrize("wrong, says", [
    (dict(feature_layer=-5), "feature layer -5"),
    (dict(feature_layer=4), "3 layers"),
    (dict(patch_size=29), "0 patches in 28 px"),
    (dict(merge=3), "2 patches in 28 px cannot be merged by 3"),
    (dict(activation="relu"), "'relu'"),
    (dict(std=(0.5, 0.5, 0.0)), "std no 0"),
    (dict(mean=(0.5, 0.5)), "three numbers"),
])
def test_an_impossible_tower_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        check_tower(VisionConfig(**OURS | wrong))


# ---- geometry --------------------------------------------------------------------------------------------

# width, height
SIZES = [(96, 96), (160, 90), (90, 160), (97, 64), (64, 97), (33, 200), (5, 7), (1, 1), (301, 300)]
CFG = VisionConfig(image_size=56)


def noise(w, h):
    return Image.fromarray(np.random.default_rng(w * h).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_pad_and_crop_equal_the_image_processors_of_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    flags = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processors = {"crop": CLIPImageProcessorPil(**flags), "pad": LlavaImageProcessorPil(**flags, do_pad=True)}
    for mode, processor in processors.items():
        tiles, layout = cut_tiles(noise(*size), CFG, mode)
        theirs = processor(noise(*size), return_tensors="pt")["pixel_values"]
        assert len(layout) == 16 and tiles.dtype == torch.uint8
        assert_close(normalize_pixels(tiles, CFG, torch.float32), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_equals_prismatics_and_resize_a_plain_squash(size):
    # Both margins are floored: 97 x 64 becomes 97 x 96.
    w, h = size
    left, top = (max(size) - w) // 2, (max(size) - h) // 2
    canvas = Image.new("RGB", (w + 2 * left, h + 2 * top), (122, 116, 104))
    canvas.paste(noise(w, h), (left, top))

    # The short side becomes 56, and the middle is kept.
    scale = 56 / min(canvas.size)
    canvas = canvas.resize([int(side * scale + 1e-9) for side in canvas.size], Image.BICUBIC)
    x, y = (canvas.width - 56) // 2, (canvas.height - 56) // 2
    expected = canvas.crop((x, y, x + 56, y + 56))
    assert make_square(noise(w, h), CFG, "letterbox").tobytes() == expected.tobytes()

    squashed = noise(w, h).resize((56, 56), Image.BICUBIC)
    assert make_square(noise(w, h), CFG, "resize").tobytes() == squashed.tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (9_999, 3), (1, 5_000)])
def test_a_picture_of_extreme_shape_costs_little_memory(size, mode, tmp_path, monkeypatch):
    n_pixels = []  # of whatever is made on the way
    new, resize = Image.new, Image.Image.resize

    def counted_new(kind, size, *rest):
        n_pixels.append(size[0] * size[1])
        return new(kind, size, *rest)

    def counted_resize(image, size, *rest, **options):
        n_pixels.append(size[0] * size[1])
        return resize(image, size, *rest, **options)

    monkeypatch.setattr(Image, "new", counted_new)
    monkeypatch.setattr(Image.Image, "resize", counted_resize)
    new("RGB", size, "red").save(tmp_path / "long.png")
    tiles, _ = cut_tiles(open_image(tmp_path / "long.png"), VisionConfig(), mode)
    assert tiles.shape[2:] == (336, 336)
    assert max(n_pixels) <= 100_000_000


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(UserError, match="'stretch' is unknown; choose one of pad, letterbox, crop, resize"):
        cut_tiles(noise(4, 4), CFG, "stretch")


# ---- files -----------------------------------------------------------------------------------------------

@pytest.fixture
def reopen(tmp_path):
    """Save a picture and open it again."""
    def save_and_open(image, name, **options):
        image.save(tmp_path / name, **options)
        return open_image(tmp_path / name)
    return save_and_open


def test_a_photo_that_lies_on_its_side_is_set_upright(reopen):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter to the right"
    upright = reopen(image, "side.jpg", exif=exif, quality=95)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[2] > 200  # left has become top
    assert upright.getpixel((10, 35))[0] > 200


@pytest.mark.parametrize("deep, grey", [(0, 0), (0x8000, 128), (0xFFFF, 255)])
def test_sixteen_bits_keep_their_grey(reopen, deep, grey):
    image = Image.fromarray(np.full((4, 4), deep, dtype=np.uint16))
    assert reopen(image, "deep.png").getpixel((0, 0)) == (grey, grey, grey)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(reopen, mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {}
    if mode == "P":
        clear, options = Image.new("P", (4, 4), 0), {"transparency": 0}
    assert reopen(clear, "clear.png", **options).getpixel((0, 0)) == (255, 255, 255)


def test_printers_colours_and_single_bits_become_rgb(reopen):
    red_ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert reopen(red_ink, "print.jpg", quality=95).getpixel((0, 0))[0] > 200
    assert reopen(Image.new("1", (8, 8), 1), "bit.png").getpixel((0, 0)) == (255, 255, 255)
    assert reopen(Image.new("RGB", (1, 1), "red"), "dot.png").getpixel((0, 0)) == (255, 0, 0)


def test_of_an_animation_the_first_frame_is_taken(reopen):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first = reopen(red, "moving.gif", save_all=True, append_images=[blue])
    assert first.getpixel((0, 0)) == (255, 0, 0)


def png_bytes(width, height, palette=b""):
    """A PNG that claims a size and holds almost nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    color_type = 3 if palette else 2
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    colors = chunk(b"PLTE", palette) if palette else b""
    return b"\x89PNG\r\n\x1a\n" + header + colors + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved_bytes(image, path, kind):
    image.save(path, kind)
    return path.read_bytes()


@pytest.mark.parametrize("name, says", [
    ("text.jpg", "cannot identify image file.*save it again as JPEG or PNG"),
    ("empty.png", "cannot identify image file"),
    ("cut.jpg", "image file is truncated.*or drop the record"),
    ("palette.png", "cannot be read"),
    ("bomb.png", "exceeds limit"),
    ("large.png", "more than 100,000,000 pixels"),
    ("long.png", "or 1,000,000 on a side"),
    ("print.jpg", "cannot identify image file"),
    ("float.tiff", "floating-point"),
])
def test_a_file_that_is_no_good_picture_is_named(tmp_path, name, says):
    path = tmp_path / name
    content = {
        "text.jpg": b"this is no picture",
        "empty.png": b"",
        "cut.jpg": saved_bytes(noise(64, 64), path, "JPEG")[:1200],
        "palette.png": png_bytes(4, 4, palette=b"\x01\x02"),
        "bomb.png": png_bytes(60_000, 60_000),
        "large.png": png_bytes(10_001, 10_000),
        "long.png": png_bytes(90_000_000, 1),
        "print.jpg": saved_bytes(noise(4, 4), path, "EPS"),  # Pillow would start Ghostscript
        "float.tiff": saved_bytes(Image.new("F", (4, 4), 0.5), path, "TIFF"),
    }
    path.write_bytes(content[name])
    with pytest.raises(UserError, match=f"{name}: .*{says}"):
        open_image(path)


def test_a_missing_file_a_folder_and_an_impossible_name_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, says in [
        (tmp_path / "none.jpg", "no such picture"),
        (tmp_path / "file" / "a.jpg", "no such picture"),
        (tmp_path, "Is a directory"),
        ("a\0b", "no such picture"),
    ]:
        with pytest.raises(UserError, match=says):
            open_image(path)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "cat.jpg")
    with pytest.raises(UserError, match="a named pipe"):
        open_image(tmp_path / "cat.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_damage_gives_a_picture_or_one_clear_error(tmp_path, kind):
    rng, path = np.random.default_rng(0), tmp_path / "damaged"
    whole = saved_bytes(noise(24, 20), path, kind)
    for _ in range(40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, min(len(whole), 400), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged[: rng.integers(1, len(whole) + 1)].tobytes())
        try:
            assert open_image(path).mode == "RGB"
        except UserError as error:
            assert str(path) in str(error)
