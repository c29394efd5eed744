"""The index of a data set: one row per image file, written by `data.data_preprocess`, read by everything else."""

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from config import Preset
from data.images import IMAGE_ENDINGS
from utils import (
    UserError,
    as_flags,
    dataset_folder,
    read_columns,
    read_csv,
    read_json,
    reading,
    sha256_of,
    write_csv,
)

if TYPE_CHECKING:
    from data.pixel_cache import PixelCache

CLASSES = ("fake", "real")  # label 0 and label 1: folder names in alphabetical order
MAX_WAYS = 100  # in which links may lead to a folder


@dataclass(frozen=True)
class ImageRecord:
    """What one file is. `problem` is empty for a readable image, else the reason; width and height are then 0."""

    path: str  # relative to the data root, with forward slashes
    label: int
    bytes: int
    content: str  # SHA-256 of the bytes; empty if they cannot be read
    format: str  # of the content, such as JPEG, whatever the ending
    mode: str  # Pillow's, such as RGB or P
    width: int
    height: int
    problem: str


@dataclass(frozen=True)
class Index:
    """A data set in the order of torchvision's ImageFolder: all fake files by name, then all real ones.

    Equal data sets have equal fingerprints, wherever they lie. `cache` is where their decoded pixels are, if anywhere.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    cache: "PixelCache | None" = None
    groups: tuple[str, ...] = ()  # of each image, where splits keep groups whole

    @property
    def labels(self) -> list[int]:
        """The class of each image: 0 fake, 1 real."""
        return [record.label for record in self.records]

    @property
    def cached(self) -> list[str]:
        """What of its images the pixel cache holds."""
        return self.cache.kinds if self.cache else []

    @cached_property
    def fingerprint(self) -> str:
        """Number of images, and 16 hexadecimal digits over their names, labels, contents, readability and groups."""
        rows = [f"{r.path}\0{r.label}\0{r.content}\0{not r.problem}" for r in self.records]
        if self.groups:
            rows = [f"{row}\0{group}" for row, group in zip(rows, self.groups, strict=True)]
        rows.sort()
        digest = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{len(rows)}-{digest[:16]}"

    def readable(self, rows: list[int]) -> list[int]:
        """`rows` without the images that cannot be read; the others keep their order."""
        return [row for row in rows if not self.records[row].problem]


def list_files(root: Path, class_name: str) -> list[str]:
    """Relative path of every file under root/class_name, in ImageFolder's order, which decides the split.

    Links are followed, but not back to a folder that they lie in.

    Raises:
        UserError: a folder in it cannot be listed, or can be reached over links in too many ways.
    """
    found: list[tuple[str, list[str]]] = []
    ways: Counter[tuple[int, int]] = Counter()
    to_visit = [(str(root / class_name), frozenset[tuple[int, int]]())]  # each with the folders that it lies in
    while to_visit:  # not a function that calls itself: folders can be nested deeper than calls
        folder, above = to_visit.pop()
        try:
            status, names = os.stat(folder), os.listdir(folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be listed ({error.strerror}): mend that, or move it away") from None
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        ways[here] += 1
        if ways[here] > MAX_WAYS:  # folders that link to each other can be walked through in every order
            raise UserError(f"{folder} can be reached over links in more than {MAX_WAYS} ways: remove some of them")
        folders = [name for name in names if os.path.isdir(os.path.join(folder, name))]
        found.append((folder, sorted(set(names) - set(folders))))
        below = above | {here}
        to_visit += [(os.path.join(folder, name), below) for name in folders]
    return [(Path(folder) / name).relative_to(root).as_posix() for folder, names in sorted(found) for name in names]


def list_images(root: Path) -> list[tuple[str, int]]:
    """Relative path and label of every image file under root/fake and root/real, in ImageFolder's order.

    Raises:
        UserError: a class folder is missing or holds no image file.
    """
    found = []
    for label, class_name in enumerate(CLASSES):
        folder = root / class_name
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist: data_root must hold the folders fake/ and real/ "
                f"(python -m data.data_download fetches the paper's data, or writes demo data with --demo DIR)"
            )
        names = [name for name in list_files(root, class_name) if name.lower().endswith(IMAGE_ENDINGS)]
        found += [(name, label) for name in names]
        if not names:
            raise UserError(f"{folder} holds no image file ({', '.join(IMAGE_ENDINGS)})")
    return found


def index_path(preset: Preset) -> Path:
    """Where the index of the preset's data set lies: results/<preset>/dataset/index.csv."""
    return dataset_folder(preset) / "index.csv"


def write_index(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write the index as CSV, one image a row, whole or not at all."""
    write_csv(path, [field.name for field in fields(ImageRecord)], map(astuple, records))


def read_index(preset: Preset) -> Index:
    """The index of the preset's data set.

    Raises:
        UserError: there is none yet, it is not the one that was written, or it is of another data root.
    """
    path, root = index_path(preset), preset.settings.data_root
    command = shlex.join(["python", "-m", "data.data_preprocess", *as_flags(preset)])
    if not root.is_dir():
        raise UserError(f"the data root {root} does not exist: set data_root in config.py, or pass --data-root")
    if not path.exists():
        raise UserError(f"{path} does not exist: run {command} first")
    statistics = path.with_name("statistics.json")
    with reading(statistics, f"run {command}"):
        facts = read_json(statistics, f"run {command}")
        indexed_root, digest = Path(facts["data_root"]), facts.get("index_sha256")
    if indexed_root != root.absolute():
        raise UserError(f"{path} is of {indexed_root}, not of {root.absolute()}: run {command} (or set --data-root)")
    if digest != sha256_of(path):
        raise UserError(f"{path} was changed, or was written by an earlier version: run {command}")
    numbers = ("label", "bytes", "width", "height")
    with reading(path, f"run {command}"):
        rows = [
            ImageRecord(**{name: int(text) if name in numbers else text for name, text in row.items()})
            for row in read_csv(path)
        ]
    return Index(root, tuple(rows))


def read_list(file: str, root: Path, known: Sequence[str]) -> set[str]:
    """The images that a CSV lists in its column `path`.

    Args:
        known: all images below the data root `root`.

    Raises:
        UserError: the file cannot be read, or lists an image that the data set has not.
    """
    listed = {path for (path,) in read_columns(Path(file), ["path"])}
    missing = sorted(listed.difference(known))
    if missing:
        raise UserError(f"{file} lists {missing[0]}, which is no image of {root}: paths are relative to the data root")
    return listed
