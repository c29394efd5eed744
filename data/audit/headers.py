"""Reads an image file's header, without decoding pixels: sizes, compression, camera, generator."""

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

ENDING_OF = {  # format -> endings that fit it
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),  # a JPEG with further pictures behind the first
    "PPM": ("ppm", "pgm"),
    "TIFF": ("tif", "tiff"),
}
PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"VP8 ", b"VP8L", b"ALPH", b"ANMF")  # of PNG and WebP
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


_QUALITIES = np.arange(1, 101)[:, None, None]
_PERCENT = np.where(_QUALITIES < 50, 5000 // _QUALITIES, 200 - 2 * _QUALITIES)
# The IJG's quantisation tables (Annex K of the JPEG standard, scaled) of qualities 1 to 100: (100, 2, 64).
IJG_TABLES = ((np.array([_LUMINANCE, _CHROMINANCE]) * _PERCENT + 50) // 100).clip(1, 255)


def read_header(image: Image.Image, name: str, size: int) -> dict[str, Any]:
    """The header of an image that `data.images.open_image` has just opened, as a row of a table; `size` is in bytes.

    What a format does not have is NaN (numbers) or empty (texts).
    """
    width, height, kind = image.width, image.height, image.format or ""
    ending, segments = name.lower().rpartition(".")[2], list(_segments(image))
    exif, (quality, exact) = _exif(image, segments), jpeg_quality(image)
    metadata = b"\n".join(name + data for name, data in segments).replace(b"\0", b"")
    return {
        "format": kind,  # of the content, such as JPEG
        "ending": ending,  # of the name, in lower case and without its dot
        "ending_fits": ending in ENDING_OF.get(kind, (kind.lower(),)),
        "bytes": size,
        "width": width,
        "height": height,
        "aspect": width / height,
        "megapixels": width * height / 1e6,
        **{f"divisible_by_{n}": width % n == height % n == 0 for n in (8, 16, 64)},
        "mode": image.mode,  # Pillow's, such as RGB or P
        "bits_per_pixel": 8 * size / (width * height),  # of the whole file
        "jpeg_quality": quality,  # 1 to 100, see `jpeg_quality`
        "jpeg_ijg": exact,  # the quantisation tables are the IJG's, so that the quality is exact
        "subsampling": _subsampling(image),  # of a JPEG's colours, such as 4:2:0
        "progressive": bool(image.info.get("progressive")),
        "icc_profile": _icc_description(image.info.get("icc_profile")),
        "exif": bool(exif),
        "xmp": "xmp" in image.info or b"<x:xmpmeta" in metadata,
        "camera": _text(exif, ExifTags.Base.Make, ExifTags.Base.Model),
        "software": _text(exif, ExifTags.Base.Software),
        # signed provenance (Content Credentials), not verified
        "c2pa": any(name in (b"APP11", b"caBX", b"C2PA") and b"c2pa" in data for name, data in segments),
        "generator": ", ".join(known for known, pattern in GENERATORS.items() if re.search(pattern, metadata)),
    }


def jpeg_quality(image: Image.Image) -> tuple[float, bool]:
    """An opened image's JPEG quality (1 to 100, by the IJG's quantisation tables), and whether it is exact; or NaN.

    Other tables (cameras, Photoshop) get the quality of the nearest, by the sum of absolute differences.
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
    """Name and content of each piece of metadata, without the pixels."""
    if image.format in ("JPEG", "MPO"):
        yield from ((name.encode(), data) for name, data in image.applist)
    elif image.format in ("PNG", "WEBP"):
        is_png = image.format == "PNG"
        with open(image.filename, "rb") as file:
            file.seek(8 if is_png else 12)
            while len(head := file.read(8)) == 8:
                length, name = struct.unpack(">I4s", head) if is_png else struct.unpack("<4sI", head)[::-1]
                if name in PIXEL_CHUNKS:
                    file.seek(length, 1)
                else:
                    yield name, file.read(length)
                file.seek(4 if is_png else length % 2, 1)  # checksum, or padding
    else:
        comment = image.info.get("comment")
        yield b"", comment if isinstance(comment, bytes) else b""


def _exif(image: Image.Image, segments: list[tuple[bytes, bytes]]) -> Image.Exif:
    """The EXIF tags; none if they are damaged."""
    found = Image.Exif()
    with suppress(Exception), warnings.catch_warnings():  # Pillow raises many kinds on damaged tags
        warnings.simplefilter("ignore")
        if image.format == "TIFF":
            return image.getexif()
        in_chunks = [data for name, data in segments if name in (b"eXIf", b"EXIF")]  # Pillow finds a PNG's on decoding
        found.load(image.info.get("exif") or (in_chunks or [b""])[0])
    return found


def _text(exif: Image.Exif, *tags: int) -> str:
    return " ".join(filter(None, (str(exif.get(tag, "")).strip("\0 ") for tag in tags)))


def _icc_description(profile: bytes | None) -> str:
    if not profile:
        return ""
    with suppress(Exception):  # of damaged profiles
        return ImageCms.getProfileDescription(ImageCms.getOpenProfile(BytesIO(profile))).strip()
    return "unreadable"
