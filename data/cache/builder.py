"""Building the pixel cache: how much room it takes, which images it holds, and writing the others."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import Settings
from data.cache.pixel_cache import MEASURED_BYTES, PIXELS, VIEWS, Kind, PixelCache, cache_folder, cache_of, strips
from data.images import UnreadableImage, open_image, pixels_of, reencoded
from data.records import CheckedImage, ImageRecord
from utils import UserError, locked_folder, replacing

BLOCK = 4096  # bytes that a disk gives away at a time


@dataclass(frozen=True)
class CacheBuilder:
    """Writes images to a pixel cache, in whichever process; `kinds` are those to write."""

    cache: PixelCache
    kinds: tuple[Kind, ...]
    reencode_jpeg: int

    def known(self, content: str) -> CheckedImage | None:
        """What was found when the image was written; None unless all its files are there.

        Args:
            content: of the source file, as in its record. Path, label and bytes of the answer are empty.
        """
        try:
            with open(self.cache.path(VIEWS, _unmeasured(content)), "rb") as file:
                file.seek(2 * 3 * self.cache.patch_size**2)
                values = json.loads(file.read())
        except (OSError, ValueError):
            return None
        sums = tuple(values.pop("sums"))
        record = ImageRecord(**values)
        return CheckedImage(record, sums) if all(self.cache.holds(kind, record) for kind in self.kinds) else None

    def write(self, checked: CheckedImage, image: Image.Image) -> None:
        """Write the files that are missing of a decoded image; each appears whole or not at all.

        Raises:
            UserError: a file cannot be written.
        """
        image = reencoded(image, self.reencode_jpeg)
        for kind in self.kinds:
            if not self.cache.holds(kind, checked.record):
                parts = strips(pixels_of(image)) if kind == PIXELS else self._views(checked, image)
                with replacing(self.cache.path(kind, checked.record)) as temporary, open(temporary, "wb") as file:
                    for part in parts:
                        file.write(part)

    def _views(self, checked: CheckedImage, image: Image.Image) -> Iterator[np.ndarray | bytes]:
        from data.views import global_view, standard_view  # here, because checking alone needs no torch

        yield global_view(pixels_of(image), self.cache.patch_size)
        yield np.ascontiguousarray(standard_view(image, self.cache.patch_size))
        record = replace(checked.record, path="", label=0, bytes=0)  # equal images share their files
        yield json.dumps(asdict(record) | {"sums": checked.sums}).encode().ljust(MEASURED_BYTES)


def _unmeasured(content: str) -> ImageRecord:
    return ImageRecord("", 0, 0, content, "", "", 0, 0, "")


@contextmanager
def building(settings: Settings, kinds: Sequence[Kind], files: Sequence[tuple[str, int]]) -> Iterator[CacheBuilder]:
    """A builder for these images, while no other process builds the cache of their data root.

    Prints the bytes that the cache takes and those that are free.

    Args:
        files: relative path and label of each image.

    Raises:
        UserError: the cache would lie inside the data root, is being built by another process, or takes more bytes
            than are free or than `cache_limit_gb`.
    """
    folder, root = cache_folder(settings), settings.data_root.resolve()
    if folder.resolve().is_relative_to(root):
        raise UserError(f"{folder} is inside the data root {root}, which is never written to: set --cache-root")
    with locked_folder(folder):
        for left_over in folder.glob("*/*/.*.tmp"):  # by a process that was killed
            left_over.unlink()
        cache = cache_of(settings)
        _check_space(settings, cache, kinds, files)
        yield CacheBuilder(cache, tuple(kinds), settings.reencode_jpeg)


def _check_space(
    settings: Settings, cache: PixelCache, kinds: Sequence[Kind], files: Sequence[tuple[str, int]]
) -> None:
    """Compare the bytes of the cache with the space that there is; see `building`."""
    folder, total, needed = cache_folder(settings), 0, 0
    for name, _ in tqdm(files, desc="sizes", unit=" images", disable=None):
        try:
            with open_image(settings.data_root / name, settings.max_image_pixels) as image:
                record = replace(_unmeasured(""), width=image.width, height=image.height)
        except UnreadableImage:
            continue  # the check will say why
        total += sum(cache.bytes_of(kind, record) for kind in kinds)
        needed += sum(cache.bytes_of(kind, record) + BLOCK for kind in kinds)
    held = sum(path.stat().st_size + BLOCK for kind in kinds for path in cache.folders[kind].glob("*/*"))
    missing, free = max(0, needed - held), shutil.disk_usage(folder).free
    print(
        f"Pixel cache {folder}: {_size(total)}, about {_size(min(total, missing))} of it still to be written; "
        f"{_size(free)} are free there",
        flush=True,
    )
    views = "; --cache views takes less, and spares the standard models all decoding" if PIXELS in kinds else ""
    if missing > free:
        raise UserError(
            f"{folder} needs {_size(missing)} more and {_size(free)} are free: make room, or set "
            f"--cache-root to a larger disk{views}"
        )
    if settings.cache_limit_gb != "disk" and total > settings.cache_limit_gb * 1e9:
        raise UserError(
            f"{folder} would take {_size(total)}, more than cache_limit_gb = {settings.cache_limit_gb}: raise it{views}"
        )


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
