"""Labels and a seed -> indices of the splits; pure. SPEC, Data."""

from collections.abc import Sequence

import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import random_split

from utils import UserError


def split_indices(
    labels: Sequence[int], valid_size: int | float, test_size: int | float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Stratified train, validation and test indices, in the paper's order.

    Args:
        labels: the class of each image, in data-set order.
        valid_size, test_size: numbers of images (int) or shares of the data set (float below 1).
        seed: of both shuffles; the paper's is 606.

    Returns:
        (train, valid, test): indices into `labels`.

    Raises:
        UserError: too few images for these sizes.
    """
    total = len(labels)
    valid, test = (size if isinstance(size, int) else round(size * total) for size in (valid_size, test_size))
    smallest = min((list(labels).count(label) for label in set(labels)), default=0)
    held_out = valid + test
    if len(set(labels)) < 2 or smallest < 3 or valid < 2 or test < 2 or total - held_out < 2:
        raise UserError(
            f"{total} images ({smallest} in the smaller class) are too few for {valid} to validate, {test} to test "
            f"and the rest to train with both classes in each: add images, or lower valid_size and test_size"
        )
    # Held out first, then halved: two draws with one seed, as the paper's indices come out.
    train_rows, held_out_rows = train_test_split(
        range(total), test_size=held_out, shuffle=True, stratify=labels, random_state=seed
    )
    valid_rows, test_rows = train_test_split(
        held_out_rows,
        test_size=test,
        shuffle=True,
        stratify=[labels[row] for row in held_out_rows],
        random_state=seed,
    )
    return train_rows, valid_rows, test_rows


def final_split(train: Sequence[int], valid: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and validation together, split anew for final training.

    Args:
        fraction: share that chooses the checkpoint, rounded down to whole images.

    Returns:
        (train, valid) indices; with the paper's data 9,690 and 510.

    Raises:
        UserError: the share is less than one image.
    """
    rows = [*train, *valid]
    held_out = int(len(rows) * fraction)
    if held_out < 1:
        raise UserError(
            f"final_valid_fraction = {fraction} of {len(rows)} images is less than one image to choose the "
            f"checkpoint by: raise it, or add images"
        )
    parts = random_split(rows, [len(rows) - held_out, held_out], generator=torch.Generator().manual_seed(seed))
    train_part, valid_part = ([rows[i] for i in part.indices] for part in parts)
    return train_part, valid_part
