"""Draws the boxes of local crops, from an image's size and a generator. docs/method.md, Views."""

import hashlib

import numpy as np
import torch

MAX_GRID = 8  # cells a side at most


def sample_crop_boxes(
    height: int, width: int, num_crops: int, patch_size: int, generator: torch.Generator
) -> np.ndarray:
    """Draw crops by spatially stratified sampling: distinct cells of a grid, a random place in each.

    Where the image has too few cells for `num_crops`, each crop is drawn from the whole image.
    The order of the draws is that of the author's code, so that equal generators give equal boxes.

    Args:
        height, width: of the image, in pixels, at least 1.
        num_crops: K.
        patch_size: P, the side of a crop in pixels.
        generator: a CPU generator; it is advanced.

    Returns:
        int64 (K, 4): top, left, valid height, valid width. The valid size is P, or less where the image is
        smaller than P; the rest of the crop is padding.
    """
    P, K = patch_size, num_crops
    last_top, last_left = max(0, height - P), max(0, width - P)
    grid = min(min(height, width) // P, MAX_GRID)
    tops = lefts = 0  # of the cells that crops are drawn in; the whole image is one if it has too few
    free_height, free_width = last_top, last_left
    if grid * grid >= K:
        cell_height, cell_width = height // grid, width // grid
        rows, columns = np.divmod(torch.randperm(grid * grid, generator=generator)[:K].numpy(), grid)
        tops, lefts = rows * cell_height, columns * cell_width
        free_height, free_width = max(0, cell_height - P), max(0, cell_width - P)

    draws = torch.empty(K, 2, dtype=torch.int64)
    for top, left in (draw.unbind() for draw in draws.unbind()):
        top.random_(0, free_height + 1, generator=generator)  # y first: the order of the draws counts
        left.random_(0, free_width + 1, generator=generator)
    boxes = np.empty((K, 4), np.int64)
    boxes[:, 0] = np.minimum(tops + draws[:, 0].numpy(), last_top)
    boxes[:, 1] = np.minimum(lefts + draws[:, 1].numpy(), last_left)
    boxes[:, 2:] = min(height, P), min(width, P)
    return boxes


def tile_boxes(height: int, width: int, patch_size: int, stride: int, generator: torch.Generator) -> np.ndarray:
    """Crops that cover the image: a grid, in which each crop is moved at random, but not so far that a gap opens.

    A generator's traces repeat every 8 or 16 pixels; crops at equal distances would all see them in the same phase, and
    a model that was trained on all phases may find nothing in that one.

    Args:
        height, width: of the image, in pixels, at least 1.
        patch_size: P.
        stride: of the grid in pixels, from 1 to P; with P, nothing is moved.
        generator: a CPU generator; it is advanced.

    Returns:
        int64 (N, 4), as `sample_crop_boxes`, row by row; the first and last row and column are flush with the border.
    """
    P, reach, sides = patch_size, (patch_size - stride) // 2, (height, width)
    last = [max(0, side - P) for side in sides]
    tops, lefts = ([*range(0, end, stride), end] for end in last)
    boxes = np.array([(top, left, min(height, P), min(width, P)) for top in tops for left in lefts], np.int64)
    moves = torch.randint(-reach, reach + 1, (len(boxes), 2), generator=generator).numpy()
    inside = (boxes[:, :2] > 0) & (boxes[:, :2] < last)
    boxes[:, :2] = np.clip(boxes[:, :2] + moves * inside, 0, last)
    return boxes


def crop_generator(seed: int, key: str, number: int = 0) -> torch.Generator:
    """The generator of one image's crops, which do not depend on the number of workers, the batch size or a restart.

    Args:
        key: of the image: its path below the data root in training, `data.images.pixel_key` in evaluation and
            prediction, which does not depend on the file's name.
        number: the epoch in training, else the draw: evaluation uses draw 0, prediction can average over several.
    """
    return torch.Generator().manual_seed(derived_seed(seed, key, number))


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone, the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
