"""The towers against transformers', the geometry against its image processors, and what becomes of odd picture files."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.cli import UserError
from support.weights import CLIP_NAMES, rename
from vision import CLIP_MEAN, CLIP_STD, MODES, ViT, VisionConfig, cut_tiles, make_square, normalize_pixels, open_image

transformers = pytest.importorskip("transformers")
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14)
OURS = dict(image_size=28, patch_size=14, n_embd=32, n_layer=3, n_head=2, n_hidden=64)
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def twin(theirs, table, **switches):
    """Our tower with the weights of theirs, all of them random; and the names of theirs that it has no use for."""
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours, state = ViT(VisionConfig(**OURS | switches)), theirs.state_dict()
    public = {name: rename(name, table) for name in ours.state_dict()}
    ours.load_state_dict({name: state[public[name]].view_as(p) for name, p in ours.state_dict().items()}, strict=True)
    return ours.eval(), theirs.eval(), set(state) - set(public.values())


# ---- towers ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_clip_equals_transformers_at_every_layer_and_pooled():
    ours, theirs, unused = twin(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)), [(ours, public) for public, ours in CLIP_NAMES])
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == set()
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1:])               # what LLaVA reads: all but the class token
    assert_close(ours.pooled(PIXELS), out.pooler_output)
    for layer in (0, 1, 2, 3, -1, -4):
        ours.cfg.feature_layer = layer
        assert_close(ours(PIXELS), out.hidden_states[layer][:, 1:])


@torch.no_grad()
def test_siglip_is_the_same_tower_without_class_token_and_pre_norm():
    table = [("patch.", "embeddings.patch_embedding."), ("pos", "embeddings.position_embedding.weight"), ("norm.", "post_layernorm."),
             ("blocks.", "encoder.layers."), (".attn.", ".self_attn."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2.")]
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY | dict(image_size=31)))
    ours, theirs, unused = twin(theirs, table, image_size=31, class_token=False, pre_norm=False, patch_bias=True, activation="gelu_tanh",
                                norm_eps=1e-6)
    pixels = torch.randn(2, 3, 31, 31)                                      # 31 = 2 * 14 + 3: a remainder that no patch sees
    assert all(name.startswith("head.") for name in unused)
    assert_close(ours(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2])


@torch.no_grad()
@pytest.mark.parametrize("n_register", [0, 4])
def test_dinov2_is_the_same_tower_with_layer_scale_with_and_without_registers(n_register):
    table = [("patch.", "embeddings.patch_embeddings.projection."), ("class_token", "embeddings.cls_token"), ("norm.", "layernorm."),
             ("pos", "embeddings.position_embeddings"), ("registers", "embeddings.register_tokens"), ("blocks.", "encoder.layer."),
             (".scale1", ".layer_scale1.lambda1"), (".scale2", ".layer_scale2.lambda1"),
             (".attn.out_proj.", ".attention.o_proj."), (".attn.", ".attention.")]
    size = {k: v for k, v in TINY.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
    theirs = (transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**size, num_register_tokens=n_register)) if n_register
              else transformers.Dinov2Model(transformers.Dinov2Config(**size)))
    ours, theirs, unused = twin(theirs, table, n_register=n_register, pre_norm=False, patch_bias=True, layer_scale=True, activation="gelu",
                                norm_eps=1e-6)
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == {"embeddings.mask_token"}
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1 + n_register :], rtol=1e-4, atol=1e-4)
    assert_close(ours.pooled(PIXELS), out.pooler_output, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_plain_vit_is_the_same_tower():
    table = [("patch.", "embeddings.patch_embeddings.projection."), ("class_token", "embeddings.cls_token"), ("norm.", "layernorm."),
             ("pos", "embeddings.position_embeddings"), ("blocks.", "layers."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
             (".attn.out_proj.", ".attention.o_proj."), (".attn.", ".attention.")]
    theirs = transformers.ViTModel(transformers.ViTConfig(**TINY), add_pooling_layer=False)
    ours, theirs, unused = twin(theirs, table, pre_norm=False, patch_bias=True, activation="gelu", norm_eps=1e-12)
    out = theirs(PIXELS, output_hidden_states=True)
    assert unused == set()
    assert_close(ours(PIXELS), out.hidden_states[-2][:, 1:])
    assert_close(ours.pooled(PIXELS), out.last_hidden_state[:, 0])


def test_clip_large_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(VisionConfig()).parameters()) == 303_507_456                    # 336 px
        assert sum(p.numel() for p in ViT(VisionConfig(image_size=224)).parameters()) == 303_179_776


def test_bytes_and_normalised_floats_give_the_same_features():
    tower, tiles = ViT(VisionConfig(**OURS)), torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    assert_close(tower(tiles), tower((tiles / 255 - mean) / std))


@pytest.mark.parametrize("wrong, says", [(dict(n_head=3), "3 heads"), (dict(feature_layer=-5), "feature layer -5"),
                                         (dict(feature_layer=4), "3 layers"), (dict(patch_size=29), "no patch of 29"),
                                         (dict(activation="relu"), "'relu'")])
def test_an_impossible_tower_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        VisionConfig(**OURS | wrong)


# ---- geometry -------------------------------------------------------------------------------------------------------

SIZES = [(96, 96), (160, 90), (90, 160), (97, 64), (64, 97), (33, 200), (5, 7), (1, 1), (301, 300)]       # width, height
CFG = VisionConfig(image_size=56)


def noise(w, h):
    return Image.fromarray(np.random.default_rng(w * h).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_pad_and_crop_equal_the_image_processors_of_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    way = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    for mode, processor in ("crop", CLIPImageProcessorPil(**way)), ("pad", LlavaImageProcessorPil(**way, do_pad=True)):
        tiles, layout = cut_tiles(noise(*size), CFG, mode)
        theirs = processor(noise(*size), return_tensors="pt")["pixel_values"]
        assert len(layout) == 16 and tiles.dtype == torch.uint8
        assert_close(normalize_pixels(tiles, CFG, torch.float32), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_equals_prismatics_and_resize_a_plain_squash(size):
    w, h = size
    left, top = (max(size) - w) // 2, (max(size) - h) // 2                  # both margins floored: 97 x 64 becomes 97 x 96
    canvas = Image.new("RGB", (w + 2 * left, h + 2 * top), (122, 116, 104))
    canvas.paste(noise(w, h), (left, top))
    short = 56 / min(canvas.size)
    canvas = canvas.resize((int(canvas.width * short + 1e-9), int(canvas.height * short + 1e-9)), Image.BICUBIC)
    x, y = (canvas.width - 56) // 2, (canvas.height - 56) // 2
    assert make_square(noise(w, h), CFG, "letterbox").tobytes() == canvas.crop((x, y, x + 56, y + 56)).tobytes()
    assert make_square(noise(w, h), CFG, "resize").tobytes() == noise(w, h).resize((56, 56), Image.BICUBIC).tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (9_999, 3), (1, 5_000)])
def test_a_picture_of_extreme_shape_costs_little_memory(size, mode, monkeypatch):
    biggest, new, resize = [0], Image.new, Image.Image.resize               # the pixels of whatever is made on the way
    monkeypatch.setattr(Image, "new", lambda m, s, *a: biggest.append(s[0] * s[1]) or new(m, s, *a))
    monkeypatch.setattr(Image.Image, "resize", lambda i, s, *a, **k: biggest.append(s[0] * s[1]) or resize(i, s, *a, **k))
    assert cut_tiles(new("RGB", size, "red"), VisionConfig(), mode)[0].shape[2:] == (336, 336)
    assert max(biggest) <= 100_000_000


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(UserError, match="'stretch' is unknown; choose one of pad, letterbox, crop, resize"):
        make_square(noise(4, 4), CFG, "stretch")


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """Save a picture and open it again."""
    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        return open_image(tmp_path / name)
    return save


def test_a_photo_that_lies_on_its_side_is_set_upright(saved):
    image, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    image.paste("blue", (0, 0, 20, 20))                                     # left half blue
    exif[0x0112] = 6                                                        # "turn me a quarter to the right"
    upright = saved(image, "side.jpg", exif=exif, quality=95)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200       # left has become top


def test_sixteen_bits_keep_their_grey(saved):
    for deep, grey in (0, 0), (0x8000, 128), (0xFFFF, 255):
        assert saved(Image.fromarray(np.full((4, 4), deep, dtype=np.uint16)), "deep.png").getpixel((0, 0)) == (grey,) * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(saved, mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode) if mode != "P" else Image.new("P", (4, 4), 0)
    options = {"transparency": 0} if mode == "P" else {}
    assert saved(clear, "clear.png", **options).getpixel((0, 0)) == (255, 255, 255)


def test_printers_colours_and_single_bits_become_rgb(saved):
    assert saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "print.jpg", quality=95).getpixel((0, 0))[0] > 200
    assert saved(Image.new("1", (8, 8), 1), "bit.png").getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("RGB", (1, 1), "red"), "dot.png").getpixel((0, 0)) == (255, 0, 0)


def test_of_an_animation_the_first_frame_is_taken(saved):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert saved(frames[0], "moving.gif", save_all=True, append_images=frames[1:]).getpixel((0, 0)) == (255, 0, 0)


def png(width, height, palette=b""):
    """A PNG that claims a size and holds almost nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3 if palette else 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + (chunk(b"PLTE", palette) if palette else b"") + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg(path):
    noise(64, 64).save(path, "JPEG")
    return path.read_bytes()


@pytest.mark.parametrize("name, content, says", [
    ("text.jpg", lambda p: b"this is no picture", "not a picture that Pillow can read"),
    ("empty.png", lambda p: b"", "not a picture that Pillow can read"),
    ("cut.jpg", lambda p: jpeg(p)[:1200], "broken or cut off"),
    ("palette.png", lambda p: png(4, 4, b"\x01\x02"), "broken or cut off"),
    ("bomb.png", lambda p: png(60_000, 60_000), "more than 100,000,000 pixels"),
    ("large.png", lambda p: png(10_001, 10_000), "more than 100,000,000 pixels"),
    ("float.tiff", lambda p: Image.new("F", (4, 4), 0.5).save(p) or p.read_bytes(), "floating-point")])
def test_a_file_that_is_no_good_picture_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content(tmp_path / name))
    with pytest.raises(UserError, match=f"{name}: .*{says}"):
        open_image(tmp_path / name)


def test_a_missing_file_a_folder_and_an_impossible_name_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, says in ((tmp_path / "none.jpg", "no such picture"), (tmp_path, "is a folder"), (tmp_path / "file" / "a.jpg", "no such picture"),
                       ("a\0b", "broken")):
        with pytest.raises(UserError, match=says):
            open_image(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_damage_gives_a_picture_or_one_clear_error(tmp_path, format):
    rng, path = np.random.default_rng(0), tmp_path / "damaged"
    noise(24, 20).save(path, format)
    whole = path.read_bytes()
    for _ in range(40):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, min(len(raw), 400), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(raw[: rng.integers(1, len(raw) + 1)].tobytes())
        try:
            assert open_image(path).mode == "RGB"
        except UserError as error:
            assert str(path) in str(error)
