"""What an image file says of itself before a pixel is decoded: sizes, compression, and who made it."""

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

ENDING_OF = {  # format -> endings that tell the truth
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),  # a JPEG with further pictures behind the first
    "PPM": ("ppm", "pgm"),
    "TIFF": ("tif", "tiff"),
}
SUBSAMPLING_OF = {(1, 1): "4:4:4", (2, 1): "4:2:2", (1, 2): "4:4:0", (2, 2): "4:2:0", (4, 1): "4:1:1"}

# What generators write, searched for in metadata without its zero bytes (so that UTF-16 reads as ASCII does). In PNGs
# a text chunk's name and keyword come before its text.
GENERATORS = {
    "a1111": rb"[tiz][TE][Xx]tparameters|Negative prompt: |Steps: \d+, Sampler: ",
    "comfyui": rb"[tiz][TE][Xx]tworkflow|[tiz][TE][Xx]tprompt\{|\"class_type\": ?\"",
    "invokeai": rb"invokeai_metadata|[tiz][TE][Xx]tsd-metadata",
    "novelai": rb"NovelAI",
    "midjourney": rb"(?i)midjourney",
    "firefly": rb"Adobe Firefly",
    "openai": rb"DALL.E|ChatGPT|GPT-4o|OpenAI",
    "google": rb"Made with Google AI|Imagen \d",
    "stable diffusion": rb"(?i)stable[ _-]?diffusion",
    "iptc": rb"rainedAlgorithmicMedia",  # IPTC's digital source types (composite)trainedAlgorithmicMedia
}

_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
    51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
    101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99,
    *[99] * 36,
)  # fmt: skip


def _ijg_tables() -> np.ndarray:
    """The IJG's quantisation tables (Annex K of the JPEG standard, scaled) of qualities 1 to 100: (100, 2, 64)."""
    quality = np.arange(1, 101)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None]
    return ((np.array([_LUMINANCE, _CHROMINANCE]) * percent + 50) // 100).clip(1, 255)


IJG_TABLES = _ijg_tables()


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Where a format has no such thing, numbers are NaN and texts empty."""

    format: str  # of the content, such as JPEG
    ending: str  # of the name, in lower case and without its dot
    ending_fits: bool
    bytes: int
    width: int
    height: int
    aspect: float  # width / height
    megapixels: float
    divisible_by_8: bool  # both sides
    divisible_by_16: bool
    divisible_by_64: bool
    mode: str  # Pillow's, such as RGB or P
    bits_per_pixel: float  # of the whole file
    jpeg_quality: float  # on the IJG's scale, 1 to 100; where its tables are others', that of the nearest
    jpeg_ijg: bool  # the quantisation tables are the IJG's, so that the quality is exact
    subsampling: str  # of a JPEG's colours, such as 4:2:0
    progressive: bool
    icc_profile: str  # its description
    exif: bool
    xmp: bool
    camera: str  # make and model
    software: str
    c2pa: bool  # signed provenance (Content Credentials), not verified
    generator: str  # which of GENERATORS the metadata name, with commas


def read_header(image: Image.Image, name: str, size: int) -> Header:
    """Header of an image that was just opened; decodes nothing, and leaves the file where it was.

    Args:
        image: from `data.images.open_image`.
        name: of its file.
        size: of its file, in bytes.
    """
    width, height, kind = image.width, image.height, image.format or ""
    ending = name.lower().rpartition(".")[2]
    segments = list(_segments(image))
    exif = _exif(image, segments)
    quality, exact = jpeg_quality(image)
    metadata = b"\n".join(name + data for name, data in segments).replace(b"\0", b"")
    return Header(
        format=kind,
        ending=ending,
        ending_fits=ending in ENDING_OF.get(kind, (kind.lower(),)),
        bytes=size,
        width=width,
        height=height,
        aspect=width / height,
        megapixels=width * height / 1e6,
        divisible_by_8=width % 8 == height % 8 == 0,
        divisible_by_16=width % 16 == height % 16 == 0,
        divisible_by_64=width % 64 == height % 64 == 0,
        mode=image.mode,
        bits_per_pixel=8 * size / (width * height),
        jpeg_quality=quality,
        jpeg_ijg=exact,
        subsampling=_subsampling(image),
        progressive=bool(image.info.get("progressive")),
        icc_profile=_icc_description(image.info.get("icc_profile")),
        exif=bool(exif),
        xmp="xmp" in image.info or b"<x:xmpmeta" in metadata,
        camera=_text(exif, ExifTags.Base.Make, ExifTags.Base.Model),
        software=_text(exif, ExifTags.Base.Software),
        c2pa=any(name in (b"APP11", b"caBX", b"C2PA") and b"c2pa" in data for name, data in segments),
        generator=", ".join(known for known, pattern in GENERATORS.items() if re.search(pattern, metadata)),
    )


def jpeg_quality(image: Image.Image) -> tuple[float, bool]:
    """Quality 1 to 100 by the IJG's scale of an opened image's quantisation tables, and whether it is exact.

    Tables that are not the IJG's (cameras, Photoshop) get the quality whose tables are nearest, by the sum of absolute
    differences. NaN and False for an image that is no JPEG.
    """
    tables = getattr(image, "quantization", None)
    if not tables:
        return float("nan"), False
    found = np.array([tables[number] for number in sorted(tables)[:2]])
    distances = np.abs(IJG_TABLES[:, : len(found)] - found).sum((1, 2))
    return float(distances.argmin() + 1), bool(distances.min() == 0)


def _subsampling(image: Image.Image) -> str:
    layers = getattr(image, "layer", [])  # of a JPEG: name, horizontal and vertical sampling, table
    if len(layers) != 3:
        return ""
    across, down = (layers[0][axis] // max(layers[1][axis], 1) for axis in (1, 2))
    return SUBSAMPLING_OF.get((across, down), f"{across}x{down}")


def _segments(image: Image.Image) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each piece of metadata, pixels left out."""
    if image.format in ("JPEG", "MPO"):
        yield from ((name.encode(), data) for name, data in image.applist)
    elif image.format in ("PNG", "WEBP"):
        place = image.fp.tell()  # where the decoder goes on
        walk = _png_chunks if image.format == "PNG" else _webp_chunks
        yield from walk(image.fp)
        image.fp.seek(place)
    else:
        yield b"", image.info.get("comment", b"") if isinstance(image.info.get("comment"), bytes) else b""


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"IDAT", b"fdAT"):
            file.seek(length, 1)
        else:
            yield name, file.read(length)
        file.seek(4, 1)  # checksum


def _webp_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", head)
        if name in (b"EXIF", b"XMP ", b"C2PA"):
            yield name, file.read(length)
        else:
            file.seek(length, 1)
        file.seek(length % 2, 1)


def _exif(image: Image.Image, segments: list[tuple[bytes, bytes]]) -> Image.Exif:
    """The EXIF tags; none where they are damaged."""
    found = Image.Exif()
    with suppress(Exception), warnings.catch_warnings():  # damaged tags raise many kinds
        warnings.simplefilter("ignore")
        if image.format == "TIFF":
            return image.getexif()
        in_chunks = [data for name, data in segments if name in (b"eXIf", b"EXIF")]  # Pillow finds a PNG's on decoding
        found.load(image.info.get("exif") or (in_chunks or [b""])[0])
    return found


def _text(exif: Image.Exif, *tags: int) -> str:
    words = [str(exif.get(tag, "")).strip("\0 ") for tag in tags]
    return " ".join(word for word in words if word)


def _icc_description(profile: bytes | None) -> str:
    if not profile:
        return ""
    with suppress(Exception):  # of damaged profiles
        return ImageCms.getProfileDescription(ImageCms.getOpenProfile(BytesIO(profile))).strip()
    return "unreadable"
