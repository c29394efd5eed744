"""Building the pixel cache: how many bytes it takes, which images it holds, and writing the others."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import Settings
from data.cache.pixel_cache import MEASURED_BYTES, PIXELS, VIEWS, Kind, PixelCache, cache_folder, cache_of, strips
from data.images import UnreadableImage, open_image, pixels_of, reencoded
from data.records import ImageRecord
from utils import UserError, locked_folder, replacing

DISK_BLOCK = 4096  # bytes; a disk allocates files in such blocks
MEASURED = ("format", "mode", "width", "height", "problem", "key", "sums")  # fields that follow from a file's content
EMPTY = {"path": "", "label": 0, "bytes": 0}  # stored too; left empty, since equal files share a cached file


@dataclass(frozen=True)
class CacheBuilder:
    """Writes images to a pixel cache, in any process; `kinds` are those to write."""

    cache: PixelCache
    kinds: tuple[Kind, ...]
    reencode_jpeg: int

    def find(self, image: ImageRecord) -> ImageRecord | None:
        """`image` with what was measured when its files were written; None unless all of them are there."""
        try:
            with open(self.cache.path(VIEWS, image), "rb") as file:
                file.seek(2 * 3 * self.cache.patch_size**2)
                values = json.loads(file.read())
        except (OSError, ValueError):
            return None
        checked = replace(image, **{name: values[name] for name in MEASURED} | {"sums": tuple(values["sums"])})
        return checked if all(self.cache.holds(kind, checked) for kind in self.kinds) else None

    def write(self, checked: ImageRecord, image: Image.Image) -> None:
        """Write the missing files of a decoded image; each appears complete or not at all.

        Raises:
            UserError: a file cannot be written.
        """
        image = reencoded(image, self.reencode_jpeg)
        for kind in self.kinds:
            if not self.cache.holds(kind, checked):
                parts = strips(pixels_of(image)) if kind == PIXELS else self._views(checked, image)
                with replacing(self.cache.path(kind, checked)) as temporary, open(temporary, "wb") as file:
                    for part in parts:
                        file.write(part)

    def _views(self, checked: ImageRecord, image: Image.Image) -> Iterator[np.ndarray | bytes]:
        from data.views import global_view, standard_view  # here, because checking alone needs no torch

        yield global_view(pixels_of(image), self.cache.patch_size)
        yield np.ascontiguousarray(standard_view(image, self.cache.patch_size))
        measured = {name: getattr(checked, name) for name in MEASURED}
        yield json.dumps(EMPTY | {"content": checked.content} | measured).encode().ljust(MEASURED_BYTES)


@contextmanager
def building(settings: Settings, kinds: Sequence[Kind], images: Sequence[ImageRecord]) -> Iterator[CacheBuilder]:
    """A builder for these images, while no other process builds the cache of their data root.

    Prints the bytes that the cache takes and those that are free.

    Raises:
        UserError: the cache would lie inside the data root, is being built by another process, or takes more bytes
            than are free or than `cache_limit_gb`.
    """
    folder, root = cache_folder(settings), settings.data_root.resolve()
    if folder.resolve().is_relative_to(root):
        raise UserError(f"{folder} is inside the data root {root}, which is never written to: set --cache-root")
    with locked_folder(folder):
        for leftover in folder.glob("*/*/.*.tmp"):  # of a process that was killed
            leftover.unlink()
        cache = cache_of(settings)
        _check_space(settings, cache, kinds, images)
        yield CacheBuilder(cache, tuple(kinds), settings.reencode_jpeg)


def _check_space(settings: Settings, cache: PixelCache, kinds: Sequence[Kind], images: Sequence[ImageRecord]) -> None:
    """Compare the bytes of the cache with the free space; see `building`."""
    folder, total, needed = cache_folder(settings), 0, 0
    for image in tqdm(images, desc="sizes", unit=" images", disable=None):
        try:
            with open_image(settings.data_root / image.path, settings.max_image_pixels) as opened:
                image = replace(image, width=opened.width, height=opened.height)
        except UnreadableImage:
            continue  # the check will say why
        size = sum(cache.bytes_of(kind, image) for kind in kinds)
        total, needed = total + size, needed + size + DISK_BLOCK * len(kinds)
    held = sum(path.stat().st_size + DISK_BLOCK for kind in kinds for path in cache.folders[kind].glob("*/*"))
    missing, free = max(0, needed - held), shutil.disk_usage(folder).free
    print(
        f"Pixel cache {folder}: {_format_bytes(total)}, about {_format_bytes(min(total, missing))} of it still to be "
        f"written; {_format_bytes(free)} are free there",
        flush=True,
    )
    views = "; --cache views takes less, and spares the standard models all decoding" if PIXELS in kinds else ""
    if missing > free:
        raise UserError(
            f"{folder} needs {_format_bytes(missing)} more and {_format_bytes(free)} are free: delete files there, or "
            f"set --cache-root to a larger disk{views}"
        )
    if settings.cache_limit_gb != "disk" and total > settings.cache_limit_gb * 1e9:
        raise UserError(
            f"{folder} would take {_format_bytes(total)}, more than cache_limit_gb = {settings.cache_limit_gb}: raise "
            f"it{views}"
        )


def _format_bytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
