"""Splits a data set by a seed, stratified by class or by groups. docs/method.md, Data."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np
import torch
from torch.utils.data import random_split

from config import Settings
from data.index import Index, read_list
from data.lists import comparable, read_columns
from utils import UserError

NAME_COLUMN = "path|file|name"  # of a CSV with groups: paths below the data root, or file names


@dataclass(frozen=True)
class Splits:
    """Rows of the index, readable images only.

    Tuning and the cost studies train on `train` and validate on `valid`; final training trains on `final_train`,
    chooses its checkpoint on `final_valid` (both are train + valid, split again) and reports `test`.
    """

    train: list[int]
    valid: list[int]
    test: list[int]
    final_train: list[int]
    final_valid: list[int]


def split_index(index: Index, settings: Settings) -> tuple[Index, Splits]:
    """The images that the settings use, and their splits, any of which may be empty.

    The splits are drawn from all files and unreadable ones dropped afterwards, so that a broken file moves no other.
    Raises UserError for too few images, and for lists and groups that do not exist.
    """
    if settings.data_list:
        listed = read_list(settings.data_list, index.root, [record.path for record in index.records])
        index = replace(index, records=tuple(record for record in index.records if record.path in listed))
    labels, sizes = index.labels, (settings.valid_size, settings.test_size)
    fraction, seed = settings.final_valid_fraction, settings.main_seed
    if settings.group_by == "none":
        if settings.hold_out:
            raise UserError("hold_out names groups, and group_by is none: set --group-by")
    else:
        paths, sources = ([getattr(record, name) for record in index.records] for name in ("path", "source"))
        groups = groups_of(paths, settings.group_by, sources)
        if len(set(groups)) == len(groups):
            print(f"--group-by {settings.group_by}: no two images of {index.root} have the same group")
        index = replace(index, groups=tuple(groups))
    if any(record.part for record in index.records):
        return index, Splits(*map(index.readable, given_split(index, settings)))
    if not index.groups:
        train, valid, test = split_indices(labels, *sizes, seed)
        final = final_split(train, valid, fraction, seed)
    else:
        train, valid, test = group_split_indices(labels, groups, held_out(groups, settings.hold_out), sizes, seed)
        final = final_group_split([*train, *valid], labels, groups, fraction, seed)
    return index, Splits(*map(index.readable, (train, valid, test, *final)))


def given_split(index: Index, settings: Settings) -> tuple[list[int], ...]:
    """The parts of `Splits` that the data set gives; if it gives no validation part, one is drawn from train.

    A given validation part is also that of final training. Groups in `hold_out` move to test from any part; drawn parts
    divide no group. Raises UserError for a part without images of both classes.
    """
    labels, groups, seed = index.labels, index.groups or [record.path for record in index.records], settings.main_seed
    out = held_out(index.groups, settings.hold_out)
    parts = ["test" if groups[row] in out else record.part for row, record in enumerate(index.records)]
    given, valid, test = ([row for row, part in enumerate(parts) if part == of] for of in ("train", "valid", "test"))
    train, final, drawn = given, (given, valid), "" if valid else f" (of the {len(given):,} of train)"
    if drawn:
        train, valid = _draw_groups(given, labels, groups, counts_of([settings.valid_size], len(given))[0], seed)
    for name, rows in (("train", train), ("validate", valid), ("test", test)):
        if len({labels[row] for row in rows}) < 2:
            raise UserError(
                f"the split that {index.root} gives leaves no images of both classes to {name}: set another "
                f"--data-root, or, if validation images are drawn, a smaller --valid-size"
            )
    if drawn:
        final = final_group_split(given, labels, groups, settings.final_valid_fraction, seed)
    print(f"Split as given: {len(train):,} train, {len(valid):,} valid{drawn}, {len(test):,} test", flush=True)
    return train, valid, test, *final


def split_indices(
    labels: Sequence[int], valid_size: int | float, test_size: int | float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Stratified train, validation and test indices into `labels`, in the paper's order.

    Sizes are numbers of images (int) or shares of the data set (float below 1); the paper's seed is 606. Raises
    UserError for too few images.
    """
    from sklearn.model_selection import train_test_split  # a second, which processes that load images do without

    total = len(labels)
    valid, test = counts_of((valid_size, test_size), total)
    smallest = min(list(labels).count(label) for label in (0, 1))
    if smallest < 3 or valid < 2 or test < 2 or total - valid - test < 2:
        raise UserError(
            f"{total} images ({smallest} in the smaller class) are too few for {valid} to validate, {test} to test "
            f"and the rest to train with both classes in each: add images, lower valid_size and test_size, or use "
            f"--preset own, whose sizes are shares of the data set"
        )
    # Held out together, then divided, both with the same seed: this gives the paper's indices. scikit-learn rounds
    # shares up, and one that is not exact in binary may give an image more: of 11,994 images it holds out 3,601.
    split = partial(train_test_split, shuffle=True, random_state=seed)
    train_rows, held_out_rows = split(range(total), test_size=(valid + test) / total, stratify=labels)
    share, held_out_labels = test / (valid + test), [labels[row] for row in held_out_rows]
    valid_rows, test_rows = split(held_out_rows, test_size=share, stratify=held_out_labels)
    return train_rows, valid_rows, test_rows


def counts_of(sizes: Sequence[int | float], total: int) -> list[int]:
    """Sizes as numbers of images: ints unchanged, floats as shares of `total`."""
    return [size if isinstance(size, int) else round(size * total) for size in sizes]


def final_split(train: Sequence[int], valid: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and validation together, split again for final training; 9,690 and 510 images of the paper's data.

    Raises UserError if the share is less than one image.
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
    labels: Sequence[int], groups: Sequence[str], test_groups: Set[str], sizes: tuple[int | float, ...], seed: int
) -> tuple[list[int], list[int], list[int]]:
    """As `split_indices`, but no group is divided; sizes and class shares are met as well as the groups allow.

    `test_groups` go to the test split in addition to its size, which may then be 0.
    Raises UserError for too few groups.
    """
    valid, test = counts_of(sizes, len(labels))
    chosen = {row for row, group in enumerate(groups) if group in test_groups}
    rest, test_rows = _draw_groups(sorted(set(range(len(labels))) - chosen), labels, groups, test, seed)
    train_rows, valid_rows = _draw_groups(rest, labels, groups, valid, seed)
    test_rows = sorted(chosen.union(test_rows))
    for name, rows in (("train", train_rows), ("validate", valid_rows), ("test", test_rows)):
        if len({labels[row] for row in rows}) < 2:
            raise UserError(
                f"too few groups ({len(set(groups))} of {len(labels)} images, {len(test_groups)} held out), so that "
                f"there are no images of both classes to {name}: add images, or change group_by, hold_out or the sizes"
            )
    return train_rows, valid_rows, test_rows


def final_group_split(
    rows: Sequence[int], labels: Sequence[int], groups: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """As `final_split` of train and validation `rows`, but no group is divided, and both parts have both classes.

    Raises UserError if there are too few groups.
    """
    parts = _draw_groups(sorted(rows), labels, groups, max(2, int(len(rows) * fraction)), seed)
    if any(len({labels[row] for row in part}) < 2 for part in parts):
        raise UserError(
            f"final_valid_fraction = {fraction} of {len(rows)} images in groups leaves no images of both classes to "
            f"choose the checkpoint by: raise it, or choose another group_by"
        )
    return parts


def _draw_groups(
    rows: Sequence[int], labels: Sequence[int], groups: Sequence[str], size: int, seed: int
) -> tuple[list[int], list[int]]:
    """Divide `rows` in two parts without dividing a group; the second has about `size` rows, and the same class shares.

    Groups come in an order drawn with `seed`; each is taken if that brings the two class counts, taken together, nearer
    to those that are wanted.
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
    return [row for row in rows if groups[row] not in taken], [row for row in rows if groups[row] in taken]


# ---------------------------------------------------------------------------------------------------- groups
def groups_of(paths: Sequence[str], group_by: str, sources: Sequence[str] = ()) -> list[str]:
    """The group of each image; names are normalised by `comparable`.

    `group_by` is stem (the file name without its ending, which the images of a pair share), folder (the source; an
    image without one is a group of its own; only this needs `sources`), or FILE.csv:COLUMN.
    Raises UserError for another kind, and for a CSV that cannot be read, lacks an image or gives one name two groups.
    """
    paths = list(map(comparable, paths))
    if group_by == "stem":
        return [PurePosixPath(path).stem for path in paths]
    if group_by == "folder":
        return [comparable(source) if source else path for source, path in zip(sources, paths, strict=True)]
    file, _, column = group_by.rpartition(":")
    if not file or not column:
        raise UserError(f"group_by is {group_by}: expected none, stem, folder or FILE.csv:COLUMN")
    listed: dict[str, str] = {}
    for name, group in read_columns(Path(file), (NAME_COLUMN, column)):
        if listed.setdefault(comparable(name), group) != group:
            raise UserError(
                f"{file} says of {name} both {listed[comparable(name)]} and {group}: name its files by their paths "
                f"below the data root, such as {paths[0]}"
            )
    groups = [listed.get(path, listed.get(PurePosixPath(path).name)) for path in paths]
    if None in groups:
        raise UserError(f"{file} has no row for {paths[groups.index(None)]}: add it, or choose another group_by")
    return groups


def held_out(groups: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The groups that `patterns`, such as "camera_*", match; raises UserError for one that matches none."""
    chosen: set[str] = set()
    for pattern in patterns:
        spelled = normalize("NFC", pattern)
        named = {
            name for name in groups if spelled == normalize("NFC", name) or fnmatchcase(normalize("NFC", name), spelled)
        }
        if not named:
            raise UserError(
                f"hold_out names {pattern}, and no group has this name: the groups are "
                f"{', '.join(sorted(set(groups))[:5])}{', ...' if len(set(groups)) > 5 else ''}"
            )
        chosen |= named
    return chosen
