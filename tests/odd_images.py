"""Image files at the edges of strips, patches and formats; damaged ones, wrong endings, odd names."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data.cache.pixel_cache import STRIP_WIDTH

RNG = np.random.default_rng(606)
# What is said of each file that cannot be decoded.
PROBLEMS = {
    "fake/text.jpg": "not an image",
    "fake/empty.png": "not an image",
    "fake/truncated.jpg": "image file is truncated",
    "fake/gone.jpg": "No such file or directory",
}


def noise(width: int, height: int) -> Image.Image:
    """An image that no two calls share."""
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_odd_images(root: Path) -> None:
    fake, real = root / "fake", root / "real"
    (fake / "nested" / "deep").mkdir(parents=True)
    real.mkdir()
    noise(1, 1).save(fake / "nested" / "deep" / "pixel.bmp")
    noise(5000, 1).save(fake / "row.png")
    noise(1, 5000).save(fake / "column.png")
    noise(STRIP_WIDTH - 1, 31).save(fake / "below a strip.png")
    noise(STRIP_WIDTH, 32).save(fake / "one strip.png")
    noise(2 * STRIP_WIDTH + 1, 33).save(fake / "above two strips.png")
    noise(100, 50).save(fake / "really a png.jpg", format="PNG")
    noise(300, 200).save(fake / "photo.JPG", quality=90, subsampling=2)
    noise(301, 203).save(fake / "progressive.jpg", progressive=True)
    Image.fromarray(np.tile(np.arange(6000, dtype=np.uint16).astype(np.uint8), (470, 1))).save(fake / "wide.jpg")
    noise(150, 140).convert("L").save(real / "grey.jpg")
    noise(150, 140).convert("LA").save(real / "grey alpha.png")
    noise(64, 64).quantize(16).save(real / "palette.png", transparency=bytes([0, 50] + [255] * 14))
    noise(260, 250).convert("RGBA").save(real / "alpha.webp", lossless=True)
    noise(260, 250).convert("CMYK").save(real / "cmyk.jpg")
    noise(90, 80).convert("1").save(real / "bits.tiff")
    Image.fromarray(RNG.integers(0, 65536, (140, 130), dtype=np.uint16)).save(real / "grey16.PNG")
    noise(120, 130).save(real / "line\nbreak, é.png")
    shutil.copy(fake / "photo.JPG", real / "the same photo.jpg")
    with open(os.fsencode(real) + b"/no text \xff.png", "wb") as file:
        noise(121, 130).save(file, "PNG")
    (fake / "text.jpg").write_text("hello")
    (fake / "empty.png").write_bytes(b"")
    (fake / "truncated.jpg").write_bytes((fake / "photo.JPG").read_bytes()[:9000])
    (fake / "gone.jpg").symlink_to("nowhere.jpg")
    (fake / "notes.txt").write_text("no image")
    (real / "Thumbs.db").write_bytes(b"\0")
