"""The only place that opens an image file. docs/method.md, Views and Data.

EXIF orientation is ignored, the content decides and not the ending, and files are never written to.

Pillow decodes every format: JPEGs as fast as torchvision does. Copying its pixels, four bytes each, into an array took
longer than decoding; `pixels_of` reads them without a copy, through Pillow's Arrow interface.
"""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock

import nanoarrow
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data.formats import ADVICE, FORMATS, HEAD_BYTES, unsupported, with_longer_scan, without_metadata
from utils import first_line

IMAGE_ENDINGS = (  # ImageFolder's, and four more
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic", ".heif",
)  # fmt: skip


def is_image_name(name: str) -> bool:
    """Whether a file has the ending of an image; `name` is its path relative to the folder that was searched.

    Not so hidden files, such as macOS's "._" companions, and those in the __MACOSX folder of macOS's archives.
    """
    parts = name.split("/")
    return name.lower().endswith(IMAGE_ENDINGS) and not any(part[:1] == "." or part == "__MACOSX" for part in parts)


PIXEL_LAYOUT = """+w:4 [{b'image': b'{"bands": ["R", "G", "B", "X"]}'}]"""  # an Arrow list of 4 bytes for each pixel

Image.core.set_use_block_allocator(1)  # all of an image in one piece, which `pixels_of` needs


JPEG_SIDE = 65_500  # pixels; libjpeg writes no larger side
MISSING = {(128, 128, 128), (63, 63, 63), (64, 64, 64)}  # colours where a JPEG's data ends early, two of them for CMYK
REDUCED_IMAGE, DNG_VERSION = 254, 50706  # tags of a TIFF: NewSubfileType, which is 1 for a preview, and DNGVersion
TRANSPARENT, TURNED = "transparent parts", "EXIF orientation"  # notes
_lock, _restore = Lock(), ExitStack()  # of `pillow_unlimited`
_threads_inside = 0


class UnreadableImage(Exception):
    """A file that cannot be decoded, with the reason as its message."""


@contextmanager
def pillow_unlimited() -> Iterator[None]:
    """In the block, Pillow opens images of any size (our own limit is checked before any decoding) and does not warn.

    Both settings are the whole process's: the first of our threads to enter changes them, the last to leave restores
    them.
    """
    global _threads_inside
    with _lock:
        if not _threads_inside:
            _restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            _restore.enter_context(warnings.catch_warnings(action="ignore"))  # of metadata, of palette transparency
            Image.MAX_IMAGE_PIXELS = None
        _threads_inside += 1
    try:
        yield
    finally:
        with _lock:
            _threads_inside -= 1
            if not _threads_inside:
                _restore.close()


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later, by `decode`.

    Raises:
        UnreadableImage: not an image, of a format that is not supported, or more than `max_pixels` pixels.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
            raise UnreadableImage("not a file")
        try:
            image = _open(path)
        except Exception as error:  # decoders raise many kinds
            image = _open_without_metadata(path, error)
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        if tags.get(REDUCED_IMAGE) == 1 or DNG_VERSION in tags:
            raise UnreadableImage(f"the preview of a raw photo, {ADVICE}")
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(_reason(error, path)) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UnreadableImage(f"{width}x{height} pixels are more than max_image_pixels = {max_pixels}")
    return image


def _open(source: str | Path | io.BytesIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    with pillow_unlimited():
        return Image.open(source, formats=formats)


def format_of(data: bytes) -> str:
    """The format of an image file's content, such as jpeg; empty if such files are not opened here."""
    with suppress(Exception), _open(io.BytesIO(data)) as image:
        return str(image.format).lower()
    return ""


def _open_without_metadata(path: str | Path, error: Exception) -> Image.Image:
    """Open a file that failed with `error` without its metadata; raises `error` if that does not help."""
    if not path or isinstance(error, MemoryError):
        raise error
    data = Path(path).read_bytes()
    needed = without_metadata(data)
    if needed == data:
        raise error
    try:
        image = _open(io.BytesIO(needed))
    except Exception:
        raise error from None
    image.filename = path
    return image


def decode(image: Image.Image) -> Image.Image:
    """The pixels of an opened image as 8-bit RGB.

    Transparency is dropped, as in the paper, so that hidden colours count. Of 16 bits, the upper eight are kept.

    Raises:
        UnreadableImage: the file is truncated or damaged, fully transparent, or its samples have no known range.
    """
    try:
        with pillow_unlimited():
            image = _load(image)
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PPM's are of 16 bits
                raise UnreadableImage(
                    "its samples have 32 bits or a sign, and no known range: save it with 8 or 16 bits"
                )
            if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip them to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            alpha = _to_rgba(image)
            if alpha and not alpha.getbbox():
                raise UnreadableImage("fully transparent: nothing of it is meant to be seen")
            decoded = image if image.mode == "RGB" else image.convert("RGB")
            corner = decoded.getpixel((image.width - 1, image.height - 1))
            if image.format in ("JPEG", "MPO") and corner in MISSING and _ends_early(image):
                raise UnreadableImage("damaged: its data ends before the picture does")
            return decoded
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def _load(image: Image.Image) -> Image.Image:
    """Decode an opened image; if its metadata is damaged, returns another image, opened without it."""
    try:
        image.load()
    except Exception as error:
        image = _open_without_metadata(_path_of(image), error)
        image.load()
    return image


def _path_of(image: Image.Image) -> str | Path:
    return getattr(image, "filename", "")


def _to_rgba(image: Image.Image) -> Image.Image | None:
    """A loaded image as RGBA; None if it has no transparency."""
    if not image.has_transparency_data:
        return None
    return image if image.mode == "RGBA" else image.convert("RGBA")


def notes_on(image: Image.Image) -> tuple[str, ...]:
    """What to tell the user of an image that `decode` can decode: TRANSPARENT parts, TURNED (an ignored orientation).

    The decoders of TIFF and HEIC turn an image themselves, and leave no orientation.
    """
    image, notes = _load(image), ()
    alpha = _to_rgba(image) if not image.mode.startswith("I") else None
    if alpha is not None and alpha.getchannel("A").getextrema()[0] < 255:
        notes = (TRANSPARENT,)
    with suppress(Exception):  # metadata may be damaged
        notes += (TURNED,) * (1 < image.getexif().get(ExifTags.Base.Orientation, 1) <= 8)
    return notes


def _ends_early(image: Image.Image) -> bool:
    """Whether a JPEG whose last pixel has a colour of MISSING lacks data: then longer data give another picture.

    The decoder fills missing parts with grey; Pillow ignores its warning.
    """
    if image.info.get("progressive") or not os.path.isfile(_path_of(image)):  # less sharp, not grey; in memory
        return False
    data, pictures = without_metadata(Path(image.filename).read_bytes()), []
    for content in (data, with_longer_scan(data)):
        picture = _open(io.BytesIO(content), ("JPEG",))
        picture.draft(None, (picture.width // 8, picture.height // 8))  # at an eighth of its size, in little memory
        pictures.append(picture.tobytes())
    return pictures[0] != pictures[1]


def read_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Decode a file to an 8-bit RGB image of its stored orientation.

    Raises:
        UnreadableImage: the file cannot be decoded.
    """
    with open_image(path, max_pixels) as image:
        return decode(image)


def resaved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    """A decoded image, saved in memory as `kind` and decoded again.

    Raises:
        UnreadableImage: `kind` cannot hold it.
    """
    buffer = io.BytesIO()
    try:
        _detach(image).save(buffer, kind, **options)
        with _open(buffer, (kind,)) as saved:
            return decode(saved)
    except OSError as error:
        raise UnreadableImage(f"it cannot be saved as {kind}: {_reason(error)}") from error


def _detach(image: Image.Image) -> Image.Image:
    """Another image of the same pixels, without a copy: Pillow stores encoder settings on the image that is saved,
    which other threads may be saving too."""
    try:
        return Image.fromarrow(image, image.mode, image.size)
    except ValueError:  # several pieces, as in `pixels_of`
        return image.copy()


def check_reencoding(size: tuple[int, int], reencode_jpeg: int) -> None:
    """Raises UnreadableImage if `reencoded` cannot save an image of this width and height."""
    if reencode_jpeg and max(size) > JPEG_SIDE:
        raise UnreadableImage(f"{size[0]}x{size[1]} pixels are too long for a JPEG ({JPEG_SIDE}), see reencode_jpeg")


def reencoded(image: Image.Image, reencode_jpeg: int) -> Image.Image:
    """A decoded image as models see it: saved as JPEG first, if the setting says so.

    Args:
        reencode_jpeg: the setting: quality from 1 to 100, or 0 for the image unchanged.

    Raises:
        UnreadableImage: as `check_reencoding`.
    """
    check_reencoding(image.size, reencode_jpeg)
    return resaved(image, "JPEG", quality=reencode_jpeg) if reencode_jpeg else image


def grey_thumbnail(image: Image.Image, side: int) -> Image.Image:
    """An opened image in grey, resized to side x side pixels without keeping its aspect ratio.

    A JPEG is decoded at the smallest scale (1/8 to 1) that is at least twice that size, which is much faster.

    Raises:
        UnreadableImage: the file is truncated or damaged.
    """
    image.draft("RGB", (2 * side, 2 * side))
    return decode(image).convert("L").resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3)


def pixels_of(image: Image.Image) -> np.ndarray:
    """The pixels of a decoded RGB image without a copy: uint8 (H, W, 4), read-only, the fourth byte meaningless.

    Raises:
        ValueError: it is not RGB, or Pillow stores pixels in another layout.
    """
    if image.mode != "RGB":  # Pillow 12.3 crashes on a grey image
        raise ValueError(f"an image of mode {image.mode} is not decoded: its mode must be RGB")
    try:
        array = nanoarrow.c_array(image)
    except ValueError:  # a large image that was loaded before this module was imported is in several pieces
        array = nanoarrow.c_array(image.copy())
    layout = f"{array.schema.format} {[dict(child.metadata or {}) for child in array.schema.children]}"
    if layout != PIXEL_LAYOUT:
        raise ValueError(f"Pillow {Image.__version__} stores this {image.mode} image as {layout}, not {PIXEL_LAYOUT}")
    return np.frombuffer(array.child(0).view().buffer(1), np.uint8).reshape(image.height, image.width, 4)


def pixel_key(image: Image.Image) -> str:
    """A hash of a decoded image's size and of some 4,000 of its pixels, by which crops are drawn.

    It uses every n-th pixel of every n-th row, and not the file's name and format.
    """
    pixels = pixels_of(image)
    rows, columns = (max(1, side // 64) for side in pixels.shape[:2])
    sample = np.ascontiguousarray(pixels[::rows, ::columns, :3])
    return hashlib.blake2b(sample.tobytes() + str(pixels.shape).encode(), digest_size=16).hexdigest()


def _reason(error: Exception, path: str | Path = "") -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the reader knows
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if not path or not isinstance(error, UnidentifiedImageError):
        return first_line(error)
    with open(path, "rb") as file:
        return unsupported(file.read(HEAD_BYTES)) or "not an image"
