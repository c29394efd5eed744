"""Index rows -> batches of `(*views, labels)`, uint8, from the pixel cache or from the decoded files. SPEC, Views."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from config import Preset, Settings
from data.crops import crop_generator, sample_crop_boxes
from data.groups import groups_of, held_out
from data.images import UnreadableImage, pixels_of, read_image
from data.index import Index, read_index, read_list
from data.perturbations import jpeg
from data.pixel_cache import GLOBAL_VIEW, STANDARD_VIEW, open_cache
from data.splits import final_group_split, final_split, group_split_indices, split_indices
from data.views import cut_crops, global_view, standard_view
from utils import UserError


@dataclass(frozen=True)
class Splits:
    """Rows of the index, readable images only.

    Tuning and the cost studies train on `train` and look at `valid`; final training trains on `final_train`, chooses
    its checkpoint by `final_valid` (both are train + valid, split anew) and reports `test`.
    """

    train: list[int]
    valid: list[int]
    test: list[int]
    final_train: list[int]
    final_valid: list[int]


def load_splits(preset: Preset) -> tuple[Index, Splits]:
    """The preset's data set, with its pixel cache if there is one, and its splits; says what the cache holds.

    Raises:
        UserError: no index, a split without a readable image, or a pixel cache that is damaged.
    """
    index, splits = split_index(read_index(preset), preset.settings)
    for name, rows in vars(splits).items():
        if not rows:
            raise UserError(
                f"no image of the split {name} of {index.root} can be read: add images, or enlarge the split"
            )
    cache, found = open_cache(preset, index.records)
    if found:
        print(found, flush=True)
    return replace(index, cache=cache), splits


def split_index(index: Index, settings: Settings) -> tuple[Index, Splits]:
    """What of the data set the settings use, and its splits, any of which may be empty.

    The splits are computed over all files and unreadable ones dropped after, so that a broken file moves no other.

    Raises:
        UserError: too few images, or lists, groups and sources that are not there.
    """
    if settings.data_list:
        wanted = read_list(settings.data_list, index.root, [record.path for record in index.records])
        index = replace(index, records=tuple(record for record in index.records if record.path in wanted))
    labels, seed = index.labels, settings.main_seed
    sizes = (settings.valid_size, settings.test_size)
    if settings.group_by == "none":
        if settings.hold_out:
            raise UserError("hold_out names groups, and group_by is none: set --group-by")
        train, valid, test = split_indices(labels, *sizes, seed)
        final_train, final_valid = final_split(train, valid, settings.final_valid_fraction, seed)
    else:
        groups = groups_of([record.path for record in index.records], settings.group_by)
        if len(set(groups)) == len(groups):
            raise UserError(f"group_by = {settings.group_by} makes every image of {index.root} a group of its own")
        index = replace(index, groups=tuple(groups))
        train, valid, test = group_split_indices(labels, groups, held_out(groups, settings.hold_out), *sizes, seed)
        final_train, final_valid = final_group_split(train, valid, labels, groups, settings.final_valid_fraction, seed)
    return index, Splits(*map(index.readable, (train, valid, test, final_train, final_valid)))


class Names(Sequence[str]):
    """Names in one block of memory: a worker process is sent two arrays, not a list of thousands of strings."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> str:
        position = range(len(self))[position]
        return os.fsdecode(self._bytes[self._ends[position] : self._ends[position + 1]].tobytes())


class ImageDataset(Dataset):
    """Images of an index, as the views of one kind of model.

    A loader asks for a batch by a list of (position, epoch), epoch None in evaluation, and gets `(*views, labels)`:
    `global_view (B, 3, P, P), local_crops (B, K, 3, P, P)` if `num_crops` is set, else the standard `view
    (B, 3, P, P)`; uint8, channels last in memory; labels int64 (B,). With `exact_resize`, global_view is float32, 0 to
    255. Item i is the batch of one, without its first dimension.

    Args:
        index: the data set, and its pixel cache.
        rows: which of its rows, in which order.
        patch_size: P.
        num_crops: K for GLASS, None for standard models.
        seed: of the crops.
        max_pixels: larger images are refused.
        exact_resize: resize the global view in float32.
        reencode_jpeg: save the image as JPEG of this quality before the views are made; 0: as it is.

    Raises:
        UserError: an image is larger, or its file is not what it was when the index was made.
    """

    def __init__(
        self,
        index: Index,
        rows: list[int],
        patch_size: int,
        num_crops: int | None,
        seed: int,
        max_pixels: int,
        exact_resize: bool = False,
        reencode_jpeg: int = 0,
    ) -> None:
        records = [index.records[row] for row in rows]
        for record in records:
            if record.width * record.height > max_pixels:
                raise UserError(
                    f"{index.root / record.path} has {record.width}x{record.height} pixels, more than "
                    f"max_image_pixels = {max_pixels}: raise it, or run python -m data.data_preprocess again"
                )
        self.root, self.rows = index.root, np.array(rows, np.int64)
        self.names = Names([record.path for record in records])
        self.labels = torch.tensor([record.label for record in records], dtype=torch.int64)
        self.file_bytes, self.heights, self.widths = (
            np.array([getattr(record, name) for record in records], np.int64) for name in ("bytes", "height", "width")
        )
        self.patch_size, self.num_crops, self.seed, self.max_pixels = patch_size, num_crops, seed, max_pixels
        self.exact_resize, self.reencode_jpeg = exact_resize and num_crops is not None, reencode_jpeg
        self._pixels = index.cache.pixels if index.cache else None
        self._views = index.cache.views if index.cache and not self.exact_resize else None
        self._opened = False  # in this process
        self._has_pixels, self._has_views = (
            np.array([bool(pack and pack.has(row)) for row in rows]) for pack in (self._pixels, self._views)
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([item]))

    def __getitems__(self, items: list[tuple[int, int | None]]) -> tuple[torch.Tensor, ...]:
        """A batch, written once, to where the process that trains will read it."""
        if not self._opened:
            self._open_packs()
        B, P, K = len(items), self.patch_size, self.num_crops
        resized = _batch((B, P, P, 3), torch.float32 if self.exact_resize else torch.uint8)
        crops = None if K is None else _batch((B, K, P, P, 3), torch.uint8)
        for place, (position, epoch) in enumerate(items):
            self._write_views(position, epoch, resized[place].numpy(), None if K is None else crops[place].numpy())
        views = [view.movedim(-1, -3) for view in (resized, crops) if view is not None]
        return *views, self.labels[[position for position, _ in items]]

    def _open_packs(self) -> None:
        """Once in each process: a cache that was removed or made anew since is not read, but said."""
        for pack, has in ((self._pixels, self._has_pixels), (self._views, self._has_views)):
            if pack is not None and not pack.open():
                has[:] = False
                print(
                    f"{pack.path} is not what it was when this began: decoding the files", file=sys.stderr, flush=True
                )
        self._opened = True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": False}

    def _write_views(self, position: int, epoch: int | None, resized: np.ndarray, crops: np.ndarray | None) -> None:
        row, height, width, P = int(self.rows[position]), *self._size(position), self.patch_size
        pixels = None
        if self._has_views[position]:
            resized[:] = self._views.view(row, STANDARD_VIEW if crops is None else GLOBAL_VIEW, P)
        elif crops is None:
            resized[:] = standard_view(self._image(position), P)
        else:
            pixels = self._image_pixels(position)
            resized[:] = global_view(pixels, P, self.exact_resize)
        if crops is None:
            return
        generator = crop_generator(self.seed, self.names[position], epoch)
        boxes = sample_crop_boxes(height, width, len(crops), P, generator)
        if min(height, width) < P:
            crops[:] = 0  # the padding
        if self._has_pixels[position]:
            self._pixels.crops(row, height, width, boxes, crops)
        else:
            cut_crops(self._image_pixels(position) if pixels is None else pixels, boxes, crops)

    def _size(self, position: int) -> tuple[int, int]:
        return int(self.heights[position]), int(self.widths[position])

    def _image_pixels(self, position: int) -> np.ndarray:
        """The whole image, (H, W, 3 or 4)."""
        if self._has_pixels[position]:
            return self._pixels.pixels(int(self.rows[position]), *self._size(position))
        return pixels_of(self._image(position))

    def _image(self, position: int) -> Image.Image:
        """The whole image."""
        if self._has_pixels[position]:
            return Image.fromarray(self._image_pixels(position))
        path = self.root / self.names[position]
        try:
            if path.stat().st_size != self.file_bytes[position]:
                raise UnreadableImage("its size in bytes has changed")
            image = read_image(path, self.max_pixels)
            if image.size != self._size(position)[::-1]:
                raise UnreadableImage("its width or height has changed")
            return jpeg(image, self.reencode_jpeg) if self.reencode_jpeg else image
        except (UnreadableImage, OSError) as error:
            raise UserError(
                f"{path} is not what it was when the index was made ({error}): "
                f"mend it, or run python -m data.data_preprocess again"
            ) from None


def _batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; in a worker process, in memory that the process that trains can read."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    empty = torch.empty(0, dtype=dtype)
    storage = empty._typed_storage()._new_shared(size, device=empty.device)  # as torch's own default_collate
    return empty.new(storage).resize_(shape)
