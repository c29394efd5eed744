"""The only place that opens an image file. SPEC, Views and Data.

EXIF orientation is ignored, the content decides and not the ending, and files are never written to.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # as ImageFolder's

Image.MAX_IMAGE_PIXELS = None  # our own check comes before any decoding and names the setting


class UnreadableImage(Exception):
    """A file that gives no image, with the reason as its message."""


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later, by `Image.load`.

    Raises:
        UnreadableImage: not an image, or more than `max_pixels` pixels.
    """
    try:
        image = Image.open(path)
    except Exception as error:  # decoders raise many kinds; each means the same to us
        raise UnreadableImage(_reason(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UnreadableImage(f"{width}x{height} pixels are more than max_image_pixels = {max_pixels}")
    return image


def decode(image: Image.Image) -> Image.Image:
    """The pixels of an opened image as 8-bit RGB.

    Palette images lose their transparency; 16-bit greys keep their upper eight bits.

    Raises:
        UnreadableImage: the file is truncated or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of palette transparency; we drop it knowingly
            image.load()
            if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip them to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def read_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Decode a file to an 8-bit RGB image of its stored orientation.

    Raises:
        UnreadableImage: the file gives no image.
    """
    with open_image(path, max_pixels) as image:
        return decode(image)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the reader knows
    first_line = (str(error).splitlines() or [""])[0]
    if "cannot identify image file" in first_line:
        return "not an image"
    return first_line or type(error).__name__
