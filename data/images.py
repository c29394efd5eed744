"""The only place that opens an image file. docs/method.md, Views and Data.

EXIF orientation is ignored, the content decides and not the ending, and files are never written to.

The decoder is Pillow's, for every format: for JPEGs it is as fast as torchvision's. Copying Pillow's pixels, four bytes
wide, into an array took longer than decoding; `pixels_of` reads them where they are, through Pillow's Arrow interface.
"""

import hashlib
import io
import os
import stat
import warnings
from pathlib import Path

import nanoarrow
import numpy as np
from PIL import Image

from utils import first_line

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as ImageFolder's

PIXEL_LAYOUT = """+w:4 [{b'image': b'{"bands": ["R", "G", "B", "X"]}'}]"""  # an Arrow list of 4 bytes for each pixel

Image.MAX_IMAGE_PIXELS = None  # our own check comes before any decoding and names the setting
Image.core.set_use_block_allocator(1)  # all of an image in one piece, which `pixels_of` needs


class UnreadableImage(Exception):
    """A file that cannot be decoded, with the reason as its message."""


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later, by `Image.load`.

    Raises:
        UnreadableImage: not an image, or more than `max_pixels` pixels.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise UnreadableImage("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which we do not use
            image = Image.open(path)
    except UnreadableImage:
        raise
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
        UnreadableImage: the file cannot be decoded.
    """
    with open_image(path, max_pixels) as image:
        return decode(image)


def resaved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    """A decoded image as it comes back from a file in memory.

    Raises:
        UnreadableImage: such a file cannot hold it.
    """
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
        with Image.open(buffer) as saved:
            return decode(saved)
    except OSError as error:
        raise UnreadableImage(f"it cannot be saved as {kind}: {_reason(error)}") from error


def reencoded(image: Image.Image, reencode_jpeg: int) -> Image.Image:
    """A decoded image as training, testing and predicting use it: saved as JPEG first, as the setting asks.

    Args:
        reencode_jpeg: the setting; quality from 1 to 100, or 0, which leaves the image as it is.
    """
    return resaved(image, "JPEG", quality=reencode_jpeg) if reencode_jpeg else image


def grey_thumbnail(image: Image.Image, side: int) -> Image.Image:
    """An opened image in grey, resized to side x side pixels without keeping its aspect ratio.

    A JPEG is decoded at the smallest of its scales (1/8 to 1) that is still twice as large, which is much faster.

    Raises:
        UnreadableImage: the file is truncated or damaged.
    """
    image.draft("RGB", (2 * side, 2 * side))
    return decode(image).convert("L").resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3)


def pixels_of(image: Image.Image) -> np.ndarray:
    """The pixels of a decoded RGB image without a copy: uint8 (H, W, 4), read-only, the fourth byte without a meaning.

    Raises:
        ValueError: Pillow keeps pixels in another layout.
    """
    try:
        array = nanoarrow.c_array(image)
    except ValueError:  # a large image that was loaded before this module was imported lies in several pieces
        array = nanoarrow.c_array(image.copy())
    layout = f"{array.schema.format} {[dict(child.metadata or {}) for child in array.schema.children]}"
    if layout != PIXEL_LAYOUT:
        raise ValueError(f"Pillow {Image.__version__} keeps this {image.mode} image as {layout}, not as {PIXEL_LAYOUT}")
    return np.frombuffer(array.child(0).view().buffer(1), np.uint8).reshape(image.height, image.width, 4)


def pixel_key(image: Image.Image) -> str:
    """What a decoded image is called by when crops are drawn: a hash of its size and of some 4,000 of its pixels.

    Every n-th pixel of every n-th row counts; the file's name and format do not.
    """
    pixels = pixels_of(image)
    rows, columns = (max(1, side // 64) for side in pixels.shape[:2])
    sample = np.ascontiguousarray(pixels[::rows, ::columns, :3])
    return hashlib.blake2b(sample.tobytes() + str(pixels.shape).encode(), digest_size=16).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the reader knows
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    reason = first_line(error)
    return "not an image" if "cannot identify image file" in reason else reason
