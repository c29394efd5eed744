"""Makes batches of `(*views, labels)`, uint8, from rows of the index: from the pixel cache or from the files.

docs/method.md, Views.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from config import Preset
from data.cache.pixel_cache import GLOBAL_VIEW, STANDARD_VIEW, open_cache
from data.images import UnreadableImage, check_reencoding, read_image, reencoded
from data.index import Index, read_index
from data.records import ImageRecord
from data.splits import Splits, split_index
from data.views import Picture, ViewSettings, cut_crops
from utils import UserError


def load_splits(preset: Preset) -> tuple[Index, Splits]:
    """The preset's data set, with its pixel cache if there is one, and its splits; prints what the cache holds.

    Raises:
        UserError: no index, or a split without a readable image.
    """
    index, splits = split_index(read_index(preset), preset.settings)
    for name, rows in vars(splits).items():
        if not rows:
            raise UserError(
                f"no image of the split {name} of {index.root} can be decoded: add images, or enlarge the split"
            )
    cache, found = open_cache(preset.settings, index.records)
    if found:
        print(found, flush=True)
    return replace(index, cache=cache), splits


class ImageDataset(Dataset):
    """Images of an index, as the views of one kind of model.

    A loader asks for a batch by a list of (position, epoch), epoch None in evaluation, and gets `(*views, labels)`:
    `global_view (B, 3, P, P), local_crops (B, K, 3, P, P)` for GLASS, else the standard `view (B, 3, P, P)`; uint8,
    channels last in memory; labels int64 (B,). With `exact_resize`, global_view is float32, 0 to 255. A single item is
    a batch of one without its first dimension.

    Args:
        index: the data set, and its pixel cache.
        rows: its rows to use, in this order.
        views: P, K, and the seed of the crops.
        max_pixels: larger images are refused.
        reencode_jpeg: the setting.

    Raises:
        UserError: an image is larger, or too long to be saved as JPEG, or its file has changed since preprocessing.
    """

    def __init__(
        self, index: Index, rows: Sequence[int], views: ViewSettings, max_pixels: int, reencode_jpeg: int = 0
    ) -> None:
        self.root, self.cache, self.records = index.root, index.cache, [index.records[row] for row in rows]
        self.labels = torch.tensor([record.label for record in self.records], dtype=torch.int64)
        self.views, self.max_pixels, self.reencode_jpeg = views, max_pixels, reencode_jpeg
        for record in self.records:
            if record.width * record.height > max_pixels:
                raise UserError(
                    f"{index.root / record.path} has {record.width}x{record.height} pixels, more than "
                    f"max_image_pixels = {max_pixels}: raise it, or run python -m data.data_preprocess again"
                )
            try:
                check_reencoding((record.width, record.height), reencode_jpeg)
            except UnreadableImage as error:
                raise UserError(
                    f"{index.root / record.path}: {error}; to leave it out, run python -m data.data_preprocess "
                    f"--reencode-jpeg {reencode_jpeg} again"
                ) from None

    @property
    def names(self) -> list[str]:
        """Path of each image, relative to the data root."""
        return [record.path for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([item]))

    def __getitems__(self, items: list[tuple[int, int | None]]) -> tuple[torch.Tensor, ...]:
        """A batch, written directly to the memory from which the training process reads it."""
        B, P = len(items), self.views.patch_size
        resized, crops = _batch((B, P, P, 3), torch.float32 if self.views.exact_resize else torch.uint8), None
        for place, (position, epoch) in enumerate(items):
            image = _IndexedImage(self, self.records[position])
            image.write_view(resized[place])
            if self.views.num_crops:
                boxes = image.boxes(epoch)
                if crops is None:  # all images have as many, or there is only one (every_tile)
                    crops = _batch((B, len(boxes), P, P, 3), torch.uint8)
                image.write_crops(boxes, crops[place])
        views = [view.movedim(-1, -3) for view in (resized, crops) if view is not None]
        # There too: if shared memory is full, torch's own thread would silently drop the batch.
        labels = _batch((B,), torch.int64)
        labels[:] = self.labels[[position for position, _ in items]]
        return *views, labels

    def read(self, record: ImageRecord) -> Image.Image:
        """Decode the image from its file."""
        path = self.root / record.path
        try:
            if path.stat().st_size != record.bytes:
                raise UnreadableImage("its size in bytes differs")
            image = read_image(path, self.max_pixels)
            if image.size != (record.width, record.height):
                raise UnreadableImage("its width or height differs")
            return reencoded(image, self.reencode_jpeg)
        except (UnreadableImage, OSError) as error:
            raise UserError(
                f"{path} has changed since preprocessing ({error}): "
                f"restore it, or run python -m data.data_preprocess again"
            ) from None


class _IndexedImage:
    """An image of a data set, read lazily: a `SampledImage`."""

    def __init__(self, dataset: ImageDataset, record: ImageRecord) -> None:
        self.dataset, self.record, self.cache, self.views = dataset, record, dataset.cache, dataset.views
        self.height, self.width = record.height, record.width

    @functools.cached_property
    def cached(self) -> np.ndarray | None:
        """The pixels in the cache, uint8 (H, W, 3), or None."""
        return self.cache.pixels(self.record) if self.cache else None

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3 or 4)."""
        return self.picture.pixels if self.cached is None else self.cached

    @functools.cached_property
    def picture(self) -> Picture:
        """The decoded image."""
        image = self.dataset.read(self.record) if self.cached is None else Image.fromarray(self.cached)
        return Picture(image, self.record.key)

    def write_view(self, view: torch.Tensor) -> None:
        """Write the resized image (P, P, 3)."""
        cached = None
        if self.cache and not self.views.exact_resize:
            cached = self.cache.view(self.record, STANDARD_VIEW if self.views.standard else GLOBAL_VIEW)
        view.numpy()[:] = self.picture.resized(self.views) if cached is None else cached

    def boxes(self, epoch: int | None) -> np.ndarray:
        """The boxes of the crops in a training epoch, or in evaluation if `epoch` is None."""
        key, number = (self.record.key, 0) if epoch is None else (self.record.path, epoch)
        return self.views.boxes(self, key, number, training=epoch is not None)

    def write_crops(self, boxes: np.ndarray, crops: torch.Tensor) -> None:
        """Write the crops (N, P, P, 3)."""
        if not (self.cache and self.cache.crops(self.record, boxes, crops.numpy())):
            cut_crops(self.picture.pixels, boxes, crops.numpy())


def _batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; in a worker process, in memory that it shares with the training process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    empty = torch.empty(0, dtype=dtype)
    storage = empty._typed_storage()._new_shared(size, device=empty.device)  # as torch's own default_collate
    return empty.new(storage).resize_(shape)
