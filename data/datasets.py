"""Index row -> `(*views, label)`, uint8, cut from the decoded image. SPEC, Views and Data."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from config import Preset
from data.crops import crop_generator, sample_crop_boxes
from data.images import UnreadableImage, read_image
from data.index import Index, read_index
from data.splits import final_split, split_indices
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
    """The preset's data set and its splits.

    The splits are computed over all files and unreadable ones dropped after, so that a broken file moves no other.
    """
    index, settings = read_index(preset), preset.settings
    train, valid, test = split_indices(index.labels, settings.valid_size, settings.test_size, settings.main_seed)
    final_train, final_valid = final_split(train, valid, settings.final_valid_fraction, settings.main_seed)
    splits = Splits(
        train=index.readable(train),
        valid=index.readable(valid),
        test=index.readable(test),
        final_train=index.readable(final_train),
        final_valid=index.readable(final_valid),
    )
    for name, rows in vars(splits).items():
        if not rows:
            raise UserError(
                f"no image of the split {name} of {index.root} can be read: add images, or enlarge the split"
            )
    return index, splits


def generate_views(
    image: torch.Tensor, num_crops: int, patch_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """GLASS's two views of one image.

    Args:
        image: (3, H, W), float in [0, 1] or uint8, of any size.
        num_crops: K.
        patch_size: P.
        generator: of the crops; it is advanced as `sample_crop_boxes` says.

    Returns:
        global_view (3, P, P), the whole image resized (antialiased bilinear, aspect ratio not kept), and
        local_crops (K, 3, P, P) at native resolution, zero-padded at the bottom and right; of the image's dtype.
    """
    _, height, width = image.shape
    global_view = F.resize(image, [patch_size, patch_size], antialias=True)
    boxes = sample_crop_boxes(height, width, num_crops, patch_size, generator)
    local_crops = image.new_zeros(num_crops, 3, patch_size, patch_size)
    for crop, (top, left, valid_height, valid_width) in zip(local_crops, boxes.tolist(), strict=True):
        crop[:, :valid_height, :valid_width] = image[:, top : top + valid_height, left : left + valid_width]
    return global_view, local_crops


def standard_view(image: Image.Image, patch_size: int) -> torch.Tensor:
    """The standard models' view: Pillow's bilinear resize of the 8-bit image; uint8 (3, P, P)."""
    return to_tensor(image.resize((patch_size, patch_size), Image.Resampling.BILINEAR))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An 8-bit RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageDataset(Dataset):
    """Images of an index, as the views of one kind of model.

    An item is asked for by (position, epoch), epoch None in evaluation, and is `(*views, label)`:
    `global_view (3, P, P), local_crops (K, 3, P, P)` if `num_crops` is set, else the standard `view (3, P, P)`.

    Args:
        index: the data set.
        rows: which of its rows, in which order.
        patch_size: P.
        num_crops: K for GLASS, None for standard models.
        seed: of the crops.
        max_pixels: larger images are refused.
    """

    def __init__(
        self,
        index: Index,
        rows: list[int],
        patch_size: int,
        num_crops: int | None,
        seed: int,
        max_pixels: int,
    ) -> None:
        self.root = index.root
        self.names = [index.records[row].path for row in rows]
        self.labels = [index.records[row].label for row in rows]
        self.sizes = [index.records[row].bytes for row in rows]
        self.patch_size, self.num_crops, self.seed, self.max_pixels = patch_size, num_crops, seed, max_pixels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor | int, ...]:
        position, epoch = item
        name = self.names[position]
        try:
            if (self.root / name).stat().st_size != self.sizes[position]:
                raise UnreadableImage("its size has changed")
            image = read_image(self.root / name, self.max_pixels)
        except (UnreadableImage, OSError) as error:
            raise UserError(
                f"{self.root / name} is not what it was when the index was made ({error}): "
                f"mend it, or run python -m data.data_preprocess again"
            ) from None
        if self.num_crops is None:
            views = (standard_view(image, self.patch_size),)
        else:
            generator = crop_generator(self.seed, name, epoch)
            views = generate_views(to_tensor(image), self.num_crops, self.patch_size, generator)
        return *views, self.labels[position]
