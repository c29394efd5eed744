"""Where crops fall: the paper's sampler, and those of other detectors. docs/method.md, Beyond the paper.

A sampler is a function (image, K, P, generator) -> boxes, int64 (K, 4), each as `sample_crop_boxes` gives it. Samplers
that look at pixels draw candidates first and keep the extreme ones, so that each epoch has other crops.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from scipy.fft import dctn

from config import CropSampler
from data.crops import sample_crop_boxes, tile_boxes

CANDIDATES = 64  # boxes or windows that are scored
BLOCK = 16  # pixels from one candidate to the next; texture is summed over blocks of this side, or of a divisor of P
STRIP = 150_000  # values whose texture is computed at a time: they fit in a processor's cache
WINDOW, STRIDE, BANDS = 32, 16, 6  # of AIDE's score: side of a window, pixels to the next, bands of frequencies
RGB_OF_FOUR = np.array([255, 255, 255, 0], np.uint8).view(np.uint32)  # masks the fourth byte of a pixel
MAP_SIDE = 7  # positions a side that the global branch chooses from, as in ResNet-50's last feature map


class SampledImage(Protocol):
    """What a sampler needs of an image."""

    height: int
    width: int

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3 or 4), a fourth channel is ignored; read on first use."""


Sampler = Callable[[SampledImage, int, int, torch.Generator], np.ndarray]


def stratified(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """The paper's (GLASS, arXiv 2601.00141): one crop in each of K cells."""
    return sample_crop_boxes(image.height, image.width, K, P, generator)


def uniform(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """Anywhere in the image, each crop independently of the others."""
    places = [torch.randint(0, last + 1, (K,), generator=generator).numpy() for last in _last_corner(image, P)]
    return _make_boxes(image, *places, P)


def grid(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """K places spread evenly over the smallest square grid of at least K places; always the same."""
    side = math.isqrt(K - 1) + 1
    cells = np.linspace(0, side**2 - 1, K).round().astype(int)
    shares = np.linspace(0, 1, side) if side > 1 else np.array([0.5])
    tops, lefts = ((last * shares).round() for last in _last_corner(image, P))
    return _make_boxes(image, tops[cells // side], lefts[cells % side], P)


def five(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """The centre and the four corners (B-Free, arXiv 2412.17671); always the same, and K is 5."""
    bottom, right = _last_corner(image, P)
    tops, lefts = np.array([(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]).T
    return _make_boxes(image, tops, lefts, P)


def every_tile(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """Tiles that cover the image, the last ones flush with the border (SPAI, arXiv 2411.19417).

    In training K of them at random, repeated if there are fewer; all of them if K is 0.
    """
    tiles = tile_boxes(image.height, image.width, P, P, generator)
    return tiles[np.resize(torch.randperm(len(tiles), generator=generator).numpy(), K)] if K else tiles


def feature_map_cells(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """A box around each position of the global branch's feature map (COOI: Fusing, GLFF), row by row.

    The model keeps K of them: `models.glass_models.places_of_interest`.
    """
    tops, lefts = (
        ((np.arange(MAP_SIDE) + 0.5) * side / MAP_SIDE - P / 2).round().clip(0, last)
        for side, last in zip((image.height, image.width), _last_corner(image, P), strict=True)
    )
    return _make_boxes(image, np.repeat(tops, MAP_SIDE), np.tile(lefts, MAP_SIDE), P)


def texture(image: SampledImage, K: int, P: int, generator: torch.Generator, *, lowest: float) -> np.ndarray:
    """The boxes of lowest and highest texture among CANDIDATES (SSP, arXiv 2402.01123; PatchCraft, 2311.12397).

    A box's texture is the sum, over its pixels and RGB, of the absolute differences from the pixels to the right,
    below, below to the right and below to the left, also where these lie outside the box. Candidates lie on a grid of
    BLOCK pixels with a random origin.

    Args:
        lowest: share of the K boxes with the lowest texture, rounded up; the others have the highest.
    """
    sides, corner = (min(image.height, P), min(image.width, P)), _last_corner(image, P)
    block = math.gcd(*sides, BLOCK)
    origin = [int(torch.randint(0, min(BLOCK - 1, last) + 1, (), generator=generator)) for last in corner]
    rows, columns = ((last - first) // BLOCK + 1 for first, last in zip(origin, corner, strict=True))
    chosen = torch.randperm(rows * columns, generator=generator)[:CANDIDATES].numpy()
    down, right = np.divmod(chosen, columns)
    boxes = _make_boxes(image, origin[0] + down * BLOCK, origin[1] + right * BLOCK, P)
    box = [side // block for side in sides]
    if len(boxes) * P * P < image.height * image.width:  # a large image: read the candidates only
        scores = np.array([block_textures(image.pixels, place, box, block).sum() for place in boxes[:, :2].tolist()])
    else:
        step = BLOCK // block
        shape = [(count - 1) * step + side for count, side in zip((rows, columns), box, strict=True)]
        sums, down, right = block_textures(image.pixels, origin, shape, block), down * step, right * step
        total = np.pad(sums.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        bottom, end = down + box[0], right + box[1]
        scores = total[bottom, end] - total[down, end] - total[bottom, right] + total[down, right]
    return boxes[_find_extremes(scores, K, lowest)]


def frequency(image: SampledImage, K: int, P: int, generator: torch.Generator) -> np.ndarray:
    """Boxes around the windows of lowest and of highest frequencies, half each (AIDE, arXiv 2406.19435).

    Candidates are CANDIDATES windows of 32 x 32 pixels on a grid of 16.
    """
    rows, columns = (max(0, side - WINDOW) // STRIDE + 1 for side in (image.height, image.width))
    chosen = torch.randperm(rows * columns, generator=generator)[:CANDIDATES].numpy()
    tops, lefts = (STRIDE * part for part in np.divmod(chosen, columns))
    windows = np.zeros((len(chosen), WINDOW, WINDOW, 3), np.uint8)
    for window, top, left in zip(windows, tops, lefts, strict=True):
        part = image.pixels[top : top + WINDOW, left : left + WINDOW, :3]
        window[: part.shape[0], : part.shape[1]] = part
    kept = _find_extremes(frequency_scores(windows), K, lowest=0.5)
    shift, corner = (WINDOW - P) // 2, _last_corner(image, P)
    places = ((part[kept] + shift).clip(0, last) for part, last in zip((tops, lefts), corner, strict=True))
    return _make_boxes(image, *places, P)


FIXED: Collection[CropSampler] = ("grid", "five", "cooi", "all")  # the same boxes in every draw, in evaluation
SAMPLERS: Mapping[CropSampler, Sampler] = {
    "stratified": stratified,
    "random": uniform,
    "grid": grid,
    "five": five,
    "texture_low": partial(texture, lowest=1.0),
    "texture_high": partial(texture, lowest=0.0),
    "texture_mixed": partial(texture, lowest=0.5),
    "frequency": frequency,
    "cooi": feature_map_cells,
    "all": every_tile,
}


# --------------------------------------------------------------------------------------------------- scores
def block_textures(pixels: np.ndarray, origin: Sequence[int], shape: Sequence[int], block: int) -> np.ndarray:
    """The texture of a grid of blocks of `block` x `block` pixels, int64 of `shape`.

    Args:
        pixels: uint8 (H, W, 3 or 4).
        origin: y and x of the first block, in pixels.
        shape: rows and columns of blocks.
    """
    (top, left), (rows, columns), channels = origin, shape, pixels.shape[2]
    right = left + columns * block
    step = max(1, STRIP // (block * (right - left) * channels))  # rows of blocks
    sums = np.zeros((rows, columns), np.int64)
    before, after = min(left, 1), min(pixels.shape[1] - right, 1)  # neighbours at the sides
    within = slice(before * channels, (before + right - left) * channels)
    for row in range(0, rows, step):
        first, last = (top + block * end for end in (row, min(row + step, rows)))
        part = pixels[first : last + 1, left - before : right + after]
        if channels == 4:
            part = (part.view(np.uint32) & RGB_OF_FOUR).view(np.uint8)
        textures = _texture(part.reshape(len(part), -1).astype(np.int16), last - first, channels)[:, within]
        # At most BLOCK rows of at most 4 x 255: no overflow.
        row_sums = textures.reshape(-1, block, textures.shape[1]).sum(1, dtype=np.int16)
        sums[row : row + step] = row_sums.reshape(len(row_sums), columns, -1).sum(2, dtype=np.int64)
    return sums


def _texture(values: np.ndarray, rows: int, channels: int) -> np.ndarray:
    """The texture of each value, int16 (rows, N), from values of those rows and of the one below, if there is one."""
    own, upper, lower = values[:rows], values[: len(values) - 1], values[1:]
    sums, buffer = np.empty_like(own), np.empty_like(own)
    across = np.subtract(own[:, :-channels], own[:, channels:], out=sums[:, :-channels])
    np.abs(across, out=across)
    sums[:, -channels:] = 0
    for first, second, target in (
        (upper[:rows], lower[:rows], sums[: len(lower)]),
        (upper[:rows, :-channels], lower[:rows, channels:], sums[: len(lower), :-channels]),
        (upper[:rows, channels:], lower[:rows, :-channels], sums[: len(lower), channels:]),
    ):
        difference = np.subtract(first, second, out=buffer[: len(first), : first.shape[1]])
        target += np.abs(difference, out=difference)
    return sums


def frequency_scores(windows: np.ndarray) -> np.ndarray:
    """AIDE's score of windows, uint8 (N, 32, 32, 3) -> (N,): higher where high frequencies are strong."""
    spectrum = np.log1p(np.abs(dctn(windows.astype(np.float32) / 255, axes=(1, 2), norm="ortho")))
    order = np.add.outer(np.arange(WINDOW), np.arange(WINDOW))
    width = 2 * WINDOW / BANDS
    bands = np.stack([(width * band <= order) & (order <= width * (band + 1)) for band in range(BANDS)])
    weights = (2.0 ** np.arange(BANDS) / bands.sum((1, 2))) @ bands.reshape(BANDS, -1)  # (1024,)
    return spectrum.mean(axis=3).reshape(len(windows), -1) @ weights.astype(np.float32)


def _find_extremes(scores: np.ndarray, K: int, lowest: float) -> np.ndarray:
    """Positions of K scores: a share `lowest` (rounded up) are the smallest, the others the largest.

    If there are fewer than K, some are repeated.
    """
    order, low = np.argsort(scores, kind="stable"), math.ceil(lowest * K)
    return np.concatenate([np.resize(order, low), np.resize(order[::-1], K - low)])


def _last_corner(image: SampledImage, P: int) -> tuple[int, int]:
    """Top and left of the last box, in the lower right corner."""
    return max(0, image.height - P), max(0, image.width - P)


def _make_boxes(image: SampledImage, tops: np.ndarray, lefts: np.ndarray, P: int) -> np.ndarray:
    boxes = np.empty((len(tops), 4), np.int64)
    boxes[:, 0], boxes[:, 1], boxes[:, 2:] = tops, lefts, (min(image.height, P), min(image.width, P))
    return boxes
