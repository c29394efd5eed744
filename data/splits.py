"""Labels and a seed -> indices of the splits; pure. SPEC, Data."""

from collections.abc import Sequence, Set

import numpy as np
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


def group_split_indices(
    labels: Sequence[int],
    groups: Sequence[str],
    held_out: Set[str],
    valid_size: int | float,
    test_size: int | float,
    seed: int,
) -> tuple[list[int], list[int], list[int]]:
    """As `split_indices`, but no group is torn apart; sizes and class shares are met as well as groups allow.

    Args:
        groups: the group of each image.
        held_out: groups that go to the test split, and besides `test_size`, which may then be 0.

    Raises:
        UserError: too few groups for these sizes.
    """
    total = len(labels)
    valid, test = (size if isinstance(size, int) else round(size * total) for size in (valid_size, test_size))
    rest = [row for row in range(total) if groups[row] not in held_out]
    test_rows = _draw_groups(rest, labels, groups, test, seed)
    rest = sorted(set(rest) - set(test_rows))
    valid_rows = _draw_groups(rest, labels, groups, valid, seed)
    train_rows = sorted(set(rest) - set(valid_rows))
    test_rows = sorted({*test_rows, *(row for row in range(total) if groups[row] in held_out)})
    for name, rows in (("train", train_rows), ("validate", valid_rows), ("test", test_rows)):
        if len({labels[row] for row in rows}) < 2:
            raise UserError(
                f"{len(set(groups))} groups ({len(held_out)} held out) leave no images of both classes to {name}: "
                f"choose another group_by or hold_out, or other sizes"
            )
    return train_rows, valid_rows, test_rows


def final_group_split(
    train: Sequence[int],
    valid: Sequence[int],
    labels: Sequence[int],
    groups: Sequence[str],
    fraction: float,
    seed: int,
) -> tuple[list[int], list[int]]:
    """As `final_split`, but no group is torn apart, and both parts have both classes.

    Raises:
        UserError: there are too few groups.
    """
    rows = sorted([*train, *valid])
    valid_part = _draw_groups(rows, labels, groups, max(2, int(len(rows) * fraction)), seed)
    train_part = sorted(set(rows) - set(valid_part))
    if not all(len({labels[row] for row in part}) == 2 for part in (train_part, valid_part)):
        raise UserError(
            f"final_valid_fraction = {fraction} of {len(rows)} images in groups leaves no images of both classes to "
            f"choose the checkpoint by: raise it, or choose another group_by"
        )
    return train_part, valid_part


def _draw_groups(rows: Sequence[int], labels: Sequence[int], groups: Sequence[str], size: int, seed: int) -> list[int]:
    """Rows of whole groups, about `size` of them, with about the class shares of `rows`.

    Groups are looked at in an order drawn with `seed`; each is taken if that brings the numbers of both classes
    together nearer to what is wanted.
    """
    counts: dict[str, np.ndarray] = {group: np.zeros(2) for group in sorted({groups[row] for row in rows})}
    for row in rows:
        counts[groups[row]][labels[row]] += 1
    wanted = sum(counts.values(), np.zeros(2)) * size / max(1, len(rows))
    taken, names = set(), list(counts)
    for i in np.random.default_rng(seed).permutation(len(names)):
        count = counts[names[i]]
        if np.square(wanted - count).sum() < np.square(wanted).sum():
            wanted = wanted - count
            taken.add(names[i])
    return [row for row in rows if groups[row] in taken]
