"""The index of a data set: one row per image file, written by `data.data_preprocess`, read by everything else."""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from config import Preset, Settings
from data.cache.pixel_cache import PixelCache
from data.images import IMAGE_ENDINGS, is_image_name
from data.lists import comparable, read_columns
from data.records import CLASSES, ImageRecord
from utils import UserError, as_flags, preset_folder, read_csv, read_json, reading, sha256_of, write_csv

PREPROCESS_SETTINGS = (  # that data.data_preprocess reads
    "data_root", "results_root", "max_image_pixels", "num_workers", "cache_root", "cache_limit_gb", "patch_size",
    "reencode_jpeg",
)  # fmt: skip
MARKER, MASKS = ".demo_dataset.json", "masks"  # of a demo data set: what marks it, and a folder that is not of images


@dataclass(frozen=True)
class Index:
    """A data set in the order of torchvision's ImageFolder: all fake files by name, then all real ones.

    Equal data sets have equal fingerprints, wherever they lie. `cache` is where their decoded pixels are, if anywhere.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    cache: PixelCache | None = None
    groups: tuple[str, ...] = ()  # of each image, where splits keep groups whole

    @property
    def labels(self) -> list[int]:
        """The class of each image: 0 fake, 1 real."""
        return [record.label for record in self.records]

    @property
    def cached(self) -> list[str]:
        """Which files of all its readable images the pixel cache holds."""
        return list(self.cache.kinds) if self.cache else []

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
        """`rows` without the images that cannot be decoded; the others keep their order."""
        return [row for row in rows if not self.records[row].problem]


def list_files(root: Path, class_name: str) -> list[str]:
    """Relative path of every file under root/class_name, in ImageFolder's order, which decides the split.

    Links are followed, but not back to a folder that they lie in. The masks of demo data are left out.

    Raises:
        UserError: a folder in it cannot be listed.
    """

    def cannot_list(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): fix that, or move it away")

    found: list[tuple[str, list[str]]] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}  # the folders that a folder lies in
    for folder, folders, names in os.walk(root / class_name, followlinks=True, onerror=cannot_list):
        status, lies_in = os.stat(folder), above.pop(folder, frozenset())
        here = (status.st_dev, status.st_ino)
        if here in lies_in:
            folders.clear()
            continue
        if MARKER in names and MASKS in folders:
            folders.remove(MASKS)
        found.append((folder, sorted(names)))
        above |= {os.path.join(folder, name): lies_in | {here} for name in folders}
    return [(Path(folder) / name).relative_to(root).as_posix() for folder, names in sorted(found) for name in names]


def list_images(root: Path, classes: int = len(CLASSES)) -> list[tuple[str, int]]:
    """Relative path and label of each image under root/fake and root/real, in ImageFolder's order; no hidden ones.

    Raises:
        UserError: fewer than `classes` class folders hold an image file, or one is spelt with capitals.
    """
    found: list[tuple[str, int]] = []
    for label, class_name in enumerate(CLASSES):
        if (root / class_name).is_dir():
            names = [name for name in list_files(root, class_name) if is_image_name(name)]
            found += [(name, label) for name in names]
        elif other := next((path for path in root.glob("*") if path.name.lower() == class_name), None):
            raise UserError(f"{other} must be called {class_name}, in lower case: rename it, or link to it")
    present = {label for _, label in found}
    if len(present) >= classes:
        return found
    folder = root / next(name for label, name in enumerate(CLASSES) if label not in present)
    if folder.is_dir():
        raise UserError(f"{folder} holds no image file ({', '.join(IMAGE_ENDINGS)}), but {_contents(folder)}")
    raise UserError(
        f"{folder} does not exist: data_root must hold the folders fake/ and real/, and {root} holds {_contents(root)} "
        f"(python -m data.data_download fetches the paper's data, or writes demo data with --demo DIR)"
    )


def _contents(folder: Path) -> str:
    """What a folder holds, in words: the first names."""
    if not folder.is_dir():
        return f"nothing, since it {'is no folder' if folder.exists() else 'does not exist'}"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "") or "nothing"


def dataset_folder(preset: Preset) -> Path:
    """results/<preset>/dataset: the index of the data set, its statistics, tables and figures."""
    return preset_folder(preset) / "dataset"


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
    command = shlex.join(["python", "-m", "data.data_preprocess", *as_flags(preset, settings=PREPROCESS_SETTINGS)])
    if not root.is_dir():
        raise UserError(f"the data root {root} does not exist: set data_root in config.py, or pass --data-root")
    if not path.exists():
        raise UserError(f"{path} does not exist: run {command} first")
    statistics = path.with_name("statistics.json")
    with reading(statistics, f"run {command}"):
        written = read_json(statistics, f"run {command}")
        indexed_root, digest = Path(written["data_root"]), written["index_sha256"]
    if indexed_root.resolve() != root.resolve():
        raise UserError(f"{path} is of {indexed_root}, not of {root.absolute()}: run {command} (or set --data-root)")
    rows = read_csv(path) if digest == sha256_of(path) else []
    if not rows or rows[0].keys() != {field.name for field in fields(ImageRecord)}:
        raise UserError(f"{path} was changed, or was written by an earlier version: run {command}")
    numbers = dict.fromkeys(("label", "bytes", "width", "height"), int)
    records = [ImageRecord(**{name: numbers.get(name, str)(text) for name, text in row.items()}) for row in rows]
    return Index(root, tuple(records))


def used_images(settings: Settings, classes: int = len(CLASSES)) -> list[tuple[str, int]]:
    """`list_images` of the data root, or those of them that `data_list` names.

    Raises:
        UserError: as `list_images` and `read_list`.
    """
    images = list_images(settings.data_root, classes)
    if not settings.data_list:
        return images
    wanted = read_list(settings.data_list, settings.data_root, [path for path, _ in images])
    return [(path, label) for path, label in images if path in wanted]


def read_list(file: str, root: Path, known: Sequence[str]) -> set[str]:
    """Those of the images `known`, which are all below the data root `root`, that a CSV lists in its column `path`.

    Raises:
        UserError: the file cannot be read, or lists an image that the data set has not.
    """
    listed = {comparable(path): path for (path,) in read_columns(Path(file), ["path"])}
    missing = sorted(listed.keys() - set(map(comparable, known)))
    if missing:
        raise UserError(
            f"{file} lists {listed[missing[0]]}, which is no image of {root}: paths are relative to the data root"
        )
    return {path for path in known if comparable(path) in listed}
