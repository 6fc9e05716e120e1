"""A picture file to upright 8-bit RGB.

Transparent pictures are laid on white; the originals drop the alpha channel and show what was under it. EXIF
rotation is applied; the originals ignore it. A picture of an extreme shape loses its far ends, and a very
large one is scaled down: else the square around 20000 x 10 pixels would take 1.2 GB.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.cli import UserError
from support.io import reading

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would start Ghostscript for an EPS
MAX_PIXELS = 100_000_000  # a picture of more is refused unread: it may be a decompression bomb
MAX_SIDE = 1_000_000  # Pillow needs memory for each row, too


def open_image(path, to_check="the path"):
    """A picture file, whatever its name, or its bytes -> upright 8-bit RGB, the first frame of an animation.
    """
    file = path
    if isinstance(path, bytes):
        file = io.BytesIO(path)
        path = "the bytes of a picture"
    with reading(path, hint="save it again as JPEG or PNG, or drop the record"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF is no news, and our own limit speaks below
        if file == path and not Path(path).exists():
            raise UserError(f"{path}: no such picture; check {to_check}")
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                most = f"{MAX_PIXELS:,} pixels in all or {MAX_SIDE:,} on a side"
                raise UserError(f"{path}: more than {most}; scale it down before use")
            return limit_size(to_rgb(ImageOps.exif_transpose(image)))


def limit_size(image):
    """The middle of what is more than 64 times as long as wide; at most 10,000 pixels a side."""
    w, h = image.size
    left, top = max(0, w - 64 * h) // 2, max(0, h - 64 * w) // 2
    image = image.crop((left, top, w - left, h - top))
    image.thumbnail((10_000, 10_000))
    return image


def to_rgb(image):
    """Pillow's own convert("RGB") clips 16 bits to white and forgets transparency."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):  # 16 bits a pixel
        high_bytes = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(high_bytes.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
