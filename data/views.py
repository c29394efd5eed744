"""Makes what a model sees of decoded pixels: resized views and crops at native resolution, as bytes.

docs/method.md, Views. Training, evaluation and prediction all make their views here.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from config import CropSampler, Experiment, GlassExperiment, Settings
from data.crops import crop_generator
from data.images import pixels_of
from data.samplers import MAP_SIDE, SAMPLERS, SampledImage
from utils import UserError


@dataclass(frozen=True)
class ViewSettings:
    """What a model sees of an image, and how its crops are placed.

    Args:
        patch_size: P, the side of all views in pixels.
        num_crops: K for GLASS; 0 for a model that sees the whole image only.
        seed: of the crops.
        exact_resize: resize GLASS's global view in float32.
        standard: the whole image is resized as for a standard model.
        crop_sampler: how crops are placed.
    """

    patch_size: int
    num_crops: int = 0
    seed: int = 0
    exact_resize: bool = False
    standard: bool = False
    crop_sampler: CropSampler = "stratified"

    @staticmethod
    def of(settings: Settings, experiment: Experiment, seed: int) -> "ViewSettings":
        """The views of an experiment's model; raises UserError for a K that its sampler does not take."""
        P = settings.patch_size
        if not isinstance(experiment, GlassExperiment):
            return ViewSettings(P, 0, seed, standard=True)
        K, sampler = experiment.crops_per_image, experiment.crop_sampler
        if K and sampler == "five" and K != 5:
            raise UserError(f"num_crops is {K}: crop_sampler five takes 5, the centre and corners; change one of them")
        if sampler == "cooi" and K > MAP_SIDE**2:
            raise UserError(f"num_crops is {K}: crop_sampler cooi takes at most {MAP_SIDE**2}; change one of them")
        return ViewSettings(P, K, seed, settings.exact_resize, crop_sampler=sampler)

    @property
    def every_tile(self) -> bool:
        """Whether an image has as many crops as it has tiles, in evaluation."""
        return self.num_crops > 0 and self.crop_sampler == "all"

    def most_crops(self, sizes: Iterable[tuple[int, int]], training: bool) -> int:
        """The largest number of crops of any image, for images of these heights and widths in pixels."""
        if self.num_crops and self.crop_sampler == "cooi":
            return MAP_SIDE**2
        if not self.every_tile or training:
            return self.num_crops
        P = self.patch_size  # as `tile_boxes` lays them
        return max(math.prod(-(-max(0, side - P) // P) + 1 for side in size) for size in sizes)

    def boxes(self, image: SampledImage, key: str, number: int = 0, training: bool = False) -> np.ndarray:
        """The crops of an image, int64 (N, 4), as `data.samplers` gives them.

        N is K; with `all` in evaluation the number of tiles; with `cooi` the number of places that the model chooses
        from.

        Args:
            key, number: as for `crop_generator`.
        """
        K = 0 if self.every_tile and not training else self.num_crops
        return SAMPLERS[self.crop_sampler](image, K, self.patch_size, crop_generator(self.seed, key, number))


@dataclass(frozen=True)
class Picture:
    """A decoded RGB image.

    `key` is the `data.images.pixel_key` of the pixels in the file: an image gets the same crops under any name and,
    if its size stays and the sampler ignores pixels, also after a perturbation.
    """

    image: Image.Image
    key: str
    notes: tuple[str, ...] = ()  # of the file: data.images.TRANSPARENT, TURNED
    format: str = ""  # of the file, such as JPEG, if there is one

    @property
    def height(self) -> int:
        """In pixels."""
        return self.image.height

    @property
    def width(self) -> int:
        """In pixels."""
        return self.image.width

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 4)."""
        return pixels_of(self.image)

    def resized(self, views: ViewSettings) -> np.ndarray:
        """The whole image (P, P, 3) as GLASS or a standard model sees it; uint8, or float32 with `exact_resize`."""
        if views.standard:
            return standard_view(self.image, views.patch_size)
        return global_view(self.pixels, views.patch_size, views.exact_resize)

    def boxes(self, views: ViewSettings, draws: int) -> np.ndarray:
        """The crops of draw 0 to `draws` - 1, int64 (draws, N, 4); evaluation uses draw 0."""
        return np.stack([views.boxes(self, self.key, draw) for draw in range(draws)])

    def crops(self, boxes: np.ndarray, patch_size: int) -> Iterator[np.ndarray]:
        """Each box (N, 4) as uint8 (P, P, 3), padded with black."""
        for box in boxes:
            crop = np.empty((1, patch_size, patch_size, 3), np.uint8)
            cut_crops(self.pixels, box[None], crop)
            yield crop[0]


def global_view(pixels: np.ndarray, patch_size: int, exact: bool = False) -> np.ndarray:
    """GLASS's global view: antialiased bilinear resize of the whole image, aspect ratio not kept.

    Args:
        pixels: uint8 (H, W, 3 or 4); a fourth channel is ignored.
        patch_size: P.
        exact: resize in float32. Resizing bytes rounds after each direction, with an error of at most one grey level.

    Returns:
        (P, P, 3), values 0 to 255: uint8, or float32 if `exact`.
    """
    image = torch.from_dlpack(pixels).permute(2, 0, 1)
    if exact:
        image = image[:3].float()
    view = F.resize(image, [patch_size, patch_size], antialias=True)
    return np.ascontiguousarray(view[:3].permute(1, 2, 0).numpy())


def standard_view(image: Image.Image, patch_size: int) -> np.ndarray:
    """The standard models' view: Pillow's bilinear resize of the 8-bit image; uint8 (P, P, 3)."""
    return np.asarray(image.resize((patch_size, patch_size), Image.Resampling.BILINEAR))


def cut_crops(pixels: np.ndarray, boxes: np.ndarray, crops: np.ndarray) -> None:
    """Copy crops out of an image.

    Args:
        pixels: uint8 (H, W, 3 or 4).
        boxes: (K, 4), as `sample_crop_boxes` gives them.
        crops: uint8 (K, P, P, 3), overwritten; black where a box is smaller than P.
    """
    for crop, (top, left, height, width) in zip(crops, boxes.tolist(), strict=True):
        if crop.shape[:2] != (height, width):
            crop[:] = 0
        crop[:height, :width] = pixels[top : top + height, left : left + width, :3]
