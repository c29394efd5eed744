"""Which parts of an image become local crops: image size and generator -> boxes, pure. SPEC, Views."""

import torch

from utils import derived_seed

MAX_GRID = 8  # cells a side at most


def sample_crop_boxes(
    height: int, width: int, num_crops: int, patch_size: int, generator: torch.Generator
) -> torch.Tensor:
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
    P = patch_size
    valid_height, valid_width = min(height, P), min(width, P)
    last_top, last_left = max(0, height - P), max(0, width - P)

    def draw(last: int) -> int:
        return int(torch.randint(0, last + 1, (1,), generator=generator))

    grid = min(min(height, width) // P, MAX_GRID)
    boxes = []
    if grid * grid < num_crops:
        for _ in range(num_crops):
            top, left = draw(last_top), draw(last_left)  # y first: the order of the draws counts
            boxes.append((top, left, valid_height, valid_width))
    else:
        cell_height, cell_width = height // grid, width // grid
        for cell in torch.randperm(grid * grid, generator=generator)[:num_crops].tolist():
            row, column = divmod(cell, grid)
            top = min(row * cell_height + draw(max(0, cell_height - P)), last_top)
            left = min(column * cell_width + draw(max(0, cell_width - P)), last_left)
            boxes.append((top, left, valid_height, valid_width))
    return torch.tensor(boxes, dtype=torch.int64).reshape(num_crops, 4)


def crop_generator(seed: int, image_name: str, epoch: int | None = None) -> torch.Generator:
    """The generator of one image's crops: a function of (seed, epoch, image) in training, of (seed, image) else.

    So crops do not depend on the number of workers, on the batch size or on a restart.

    Args:
        image_name: path of the image relative to the data root, with forward slashes.
        epoch: None in evaluation.
    """
    return torch.Generator().manual_seed(derived_seed(seed, image_name, "all" if epoch is None else epoch))
