"""The pixel cache: for each image a file of its decoded pixels and a file of its views, read instead of decoding.

cache_root/<name of the data root>-<hash of its path>/ has a folder `pixels_<strip width>_<digest>` and a folder
`views_<P>_<digest>`; the digest covers what the bytes depend on besides the image: decoders, `reencode_jpeg`, and for
views the resizing library and the processor. In them an image's file is <first two digits>/<other digits> of the
SHA-256 of the source file. So a file of that name and of the expected size is right, and an image without one, or with
one of another version, is decoded. Files never change, and can be deleted at any time.

Pixels are stored in strips of STRIP_WIDTH columns, one strip after the other, each from top to bottom, so that a crop
is two to four runs of neighbouring bytes however wide the image is: a cold disk reads little more than the crop.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, features

from config import Settings
from data.lists import name_of_root
from data.records import ImageRecord
from utils import stat_of

FORMAT = 1  # of the files; files of another are not read
STRIP_WIDTH = 112  # columns; by measurement, see docs/performance.md
MEASURED_BYTES = 1024  # at the end of a file of views: what was measured of the image, see data.cache.builder
Kind = Literal["pixels", "views"]
PIXELS: Kind = "pixels"
VIEWS: Kind = "views"
GLOBAL_VIEW, STANDARD_VIEW = 0, 1  # the order of an image's two views


def cache_folder(settings: Settings) -> Path:
    """The folder of the data root's pixel cache."""
    return settings.cache_root / name_of_root(settings.data_root)


def layout_folder(settings: Settings, kind: Kind) -> Path:
    """The folder of files of one kind; its name follows from all that their bytes depend on besides the image.

    Lossy formats decode slightly differently with another version of their library, and torch resizes bytes slightly
    differently with another processor's instructions.
    """
    depends: dict[str, Any] = {name: features.version(name) for name in ("libjpeg_turbo", "webp", "avif")}
    depends |= {"format": FORMAT, "reencode_jpeg": settings.reencode_jpeg}
    if kind == VIEWS:
        import torch  # here: checking alone needs none

        depends |= {"pillow": Image.__version__, "torch": torch.__version__}
        depends["processor"] = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
    return cache_folder(settings) / f"{kind}_{STRIP_WIDTH if kind == PIXELS else settings.patch_size}_{digest}"


def strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The strips (H, up to STRIP_WIDTH, 3) of an image (H, W, 3 or 4), in their order in a file."""
    for left in range(0, pixels.shape[1], STRIP_WIDTH):
        yield np.ascontiguousarray(pixels[:, left : left + STRIP_WIDTH, :3])


@dataclass(frozen=True)
class PixelCache:
    """The cache of one data set, for one patch size. It is small, and is sent to worker processes.

    For an image that it does not hold, `crops` returns False and the others None.

    Args:
        folders: of each kind, see `layout_folder`.
        patch_size: P, of the views.
        kinds: those that hold every readable image of the data set.
    """

    folders: dict[Kind, Path]
    patch_size: int
    kinds: tuple[Kind, ...] = ()

    def path(self, kind: Kind, record: ImageRecord) -> Path:
        """An image's file."""
        return self.folders[kind] / record.content[:2] / record.content[2:]

    def bytes_of(self, kind: Kind, record: ImageRecord) -> int:
        """The size of an image's file."""
        if kind == PIXELS:
            return 3 * record.height * record.width
        return 2 * 3 * self.patch_size**2 + MEASURED_BYTES

    def holds(self, kind: Kind, record: ImageRecord) -> bool:
        """Whether the cache has an image's complete file."""
        status = stat_of(self.path(kind, record))
        return status is not None and status.st_size == self.bytes_of(kind, record)

    def crops(self, record: ImageRecord, boxes: np.ndarray, crops: np.ndarray) -> bool:
        """As `data.views.cut_crops`, from an image's strips."""
        file = self._file(PIXELS, record)
        if file is None:
            return False
        height, width, runs = record.height, record.width, []
        for crop, (top, left, rows, columns) in zip(crops, boxes.tolist(), strict=True):
            if crop.shape[:2] != (rows, columns):
                crop[:] = 0
            column, right = left, left + columns
            while column < right:  # strip by strip
                first = column - column % STRIP_WIDTH
                strip = min(STRIP_WIDTH, width - first)
                stop = min(first + strip, right)
                begin = 3 * (height * first + top * strip)
                end = begin + 3 * rows * strip
                file.announce(begin, end)
                target = crop[:rows, column - left : stop - left]
                runs.append((target, begin, end, (rows, strip, 3), slice(column - first, stop - first)))
                column = stop
        for target, begin, end, shape, chosen in runs:
            target[:] = file.bytes[begin:end].reshape(shape)[:, chosen]
        return True

    def pixels(self, record: ImageRecord) -> np.ndarray | None:
        """The whole image, uint8 (H, W, 3)."""
        file = self._file(PIXELS, record)
        if file is None:
            return None
        file.announce(0, len(file.bytes))
        pixels = np.empty((record.height, record.width, 3), np.uint8)
        for left in range(0, record.width, STRIP_WIDTH):
            strip, begin = pixels[:, left : left + STRIP_WIDTH], 3 * record.height * left
            strip[:] = file.bytes[begin : begin + strip.size].reshape(strip.shape)
        return pixels

    def view(self, record: ImageRecord, which: int) -> np.ndarray | None:
        """GLOBAL_VIEW or STANDARD_VIEW of an image, uint8 (P, P, 3), read-only."""
        file = self._file(VIEWS, record)
        if file is None:
            return None
        begin, end = (3 * self.patch_size**2 * number for number in (which, which + 1))
        file.announce(begin, end)
        return file.bytes[begin:end].reshape(self.patch_size, self.patch_size, 3)

    def _file(self, kind: Kind, record: ImageRecord) -> "_MappedFile | None":
        content = record.content
        return mapped_files()(f"{self.folders[kind]}/{content[:2]}/{content[2:]}", self.bytes_of(kind, record))


class _MappedFile:
    """An image's file, mapped into memory."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map, self.bytes = mapped, np.frombuffer(mapped, np.uint8)

    def announce(self, begin: int, end: int) -> None:
        """Let the kernel read all these bytes at once, before they are used page by page."""
        begin -= begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)


def _kept_files() -> int:
    """How many files a process keeps mapped: each stays open, and the number of open files is limited."""
    import resource  # here: Windows lacks it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < (wanted := hard if 0 <= hard < 2**16 else 2**16):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 2**14 if soft == resource.RLIM_INFINITY else min(2**14, max(0, soft - 64) // 4)


@functools.cache
def mapped_files() -> Callable[[str, int], _MappedFile | None]:
    """(path, size) -> an image's file, or None if it is missing or incomplete; the latest ones stay mapped."""
    return functools.lru_cache(_kept_files())(_map_file)  # a mapped file is faster than a newly opened one


def _map_file(path: str, size: int) -> _MappedFile | None:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == size:
                mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
                mapped.madvise(mmap.MADV_RANDOM)  # otherwise the kernel reads far around each page
                return _MappedFile(mapped)
    except FileNotFoundError:
        return None
    remedy = "python -m data.data_preprocess --cache writes it again"
    print(f"{path} is truncated and not used: {remedy}", file=sys.stderr, flush=True)
    return None


def cache_of(settings: Settings) -> PixelCache:
    """The pixel cache of the settings' data root, which may be empty."""
    return PixelCache({kind: layout_folder(settings, kind) for kind in (PIXELS, VIEWS)}, settings.patch_size)


def open_cache(settings: Settings, records: Sequence[ImageRecord]) -> tuple[PixelCache | None, str]:
    """The pixel cache of the settings' data root, and a sentence that says how many of `records` it holds.

    The cache is None if it holds none; the sentence is empty if there is no cache or the settings do not use it.
    """
    folder = cache_folder(settings)
    if not settings.use_cache or not folder.is_dir():
        return None, ""
    cache, readable = cache_of(settings), [record for record in records if not record.problem]
    held = {kind: sum(cache.holds(kind, record) for record in readable) for kind in cache.folders}
    complete = tuple(kind for kind, images in held.items() if images == len(readable))
    found = "; ".join(f"{kind} of {images:,} of {len(readable):,} images" for kind, images in held.items())
    if VIEWS not in complete or held[PIXELS] not in (0, len(readable)):
        found += " (python -m data.data_preprocess --cache adds the missing ones)"
    cache = replace(cache, kinds=complete) if any(held.values()) else None
    return cache, f"Pixel cache {folder}: {found}"
