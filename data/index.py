"""The index of a data set: one row per image file, written by `data.data_preprocess`, read by everything else."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from config import Preset, Settings
from data.cache.pixel_cache import PixelCache
from data.layouts import PLAIN, DataSet
from data.lists import comparable, read_columns, read_csv, write_csv
from data.records import ImageRecord
from utils import UserError, as_flags, preset_folder, read_json, reading, sha256_of

PREPROCESS_SETTINGS = (  # that data.data_preprocess reads
    "data_root", "results_root", "max_image_pixels", "num_workers", "cache_root", "cache_limit_gb", "patch_size",
    "reencode_jpeg", "data_layout",
)  # fmt: skip
GIVEN = ("part", "source")  # columns that only data sets have that are not plain
COLUMNS = tuple(field.name for field in fields(ImageRecord) if field.name not in (*GIVEN, "sums"))


@dataclass(frozen=True)
class Index:
    """A data set in the order of torchvision's ImageFolder: all fake files by name, then all real ones.

    Equal data sets have equal fingerprints, in whichever folder. `cache` has their decoded pixels, if there is one.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    cache: PixelCache | None = None
    groups: tuple[str, ...] = ()  # of each image, if splits must not divide a group

    @property
    def labels(self) -> list[int]:
        """The class of each image: 0 fake, 1 real."""
        return [record.label for record in self.records]

    @property
    def cached(self) -> list[str]:
        """The kinds of files (pixels, views) that the pixel cache holds for every readable image."""
        return list(self.cache.kinds) if self.cache else []

    @cached_property
    def fingerprint(self) -> str:
        """Number of images, and 16 hexadecimal digits over their names, labels, contents, readability and groups."""
        rows = [f"{r.path}\0{r.label}\0{r.content}\0{not r.problem}" for r in self.records]
        if self.groups:
            rows = [f"{row}\0{group}" for row, group in zip(rows, self.groups, strict=True)]
        if any(record.part for record in self.records):
            rows = [f"{row}\0in {record.part}" for row, record in zip(rows, self.records, strict=True)]
        rows.sort()
        digest = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{len(rows)}-{digest[:16]}"

    def readable(self, rows: list[int]) -> list[int]:
        """`rows` without the images that cannot be decoded, in the same order."""
        return [row for row in rows if not self.records[row].problem]


def dataset_folder(preset: Preset) -> Path:
    """results/<preset>/dataset: the index of the data set, its statistics, tables and figures."""
    return preset_folder(preset) / "dataset"


def index_path(preset: Preset) -> Path:
    """The index of the preset's data set: results/<preset>/dataset/index.csv."""
    return dataset_folder(preset) / "index.csv"


def write_index(path: Path, records: Sequence[ImageRecord], plain: bool) -> None:
    """Write the index as CSV, one image a row, complete or not at all; `plain` as in `DataSet`."""
    columns = COLUMNS if plain else COLUMNS + GIVEN
    write_csv(path, columns, map(attrgetter(*columns), records))


def read_index(preset: Preset) -> Index:
    """The index of the preset's data set.

    Raises:
        UserError: it does not exist, was changed, or belongs to another data root or layout.
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
        raise UserError(f"{path} belongs to {indexed_root}, not {root.absolute()}: run {command} (or set --data-root)")
    layout, wanted = written.get("layout", PLAIN), preset.settings.data_layout
    if wanted not in ("auto", layout):
        raise UserError(f"{path} has the layout {layout}, not {wanted}: run {command} (or set --data-layout)")
    rows = read_csv(path) if digest == sha256_of(path) else []
    if not rows or rows[0].keys() - set(GIVEN) != set(COLUMNS):
        raise UserError(f"{path} was changed, or was written by an earlier version: run {command}")
    numbers, records = dict.fromkeys(("label", "bytes", "width", "height"), int), []
    for row in rows:
        values = {name: numbers.get(name, str)(text) for name, text in row.items()}
        folders = row["path"].split("/")[1:-1]  # in a plain data set, whose source is the first
        records.append(ImageRecord(**{"source": "".join(folders[:1])} | values))
    return Index(root, tuple(records))


def used_images(data: DataSet, settings: Settings) -> list[ImageRecord]:
    """The images of the data set, or only those that `data_list` names; prints their layout unless it is plain.

    Raises:
        UserError: as `read_list`.
    """
    if not data.plain:
        print(data.described())
    if not settings.data_list:
        return data.images
    wanted = read_list(settings.data_list, settings.data_root, [image.path for image in data.images])
    return [image for image in data.images if image.path in wanted]


def read_list(file: str, root: Path, known: Sequence[str]) -> set[str]:
    """The paths that a CSV lists in its column `path`, spelt as in `known`: all paths of the data root `root`.

    Raises:
        UserError: the file cannot be read, or lists an image that the data set does not have.
    """
    listed = {comparable(path): path for (path,) in read_columns(Path(file), ["path"])}
    missing = sorted(listed.keys() - set(map(comparable, known)))
    if missing:
        raise UserError(
            f"{file} lists {listed[missing[0]]}, which is no image of {root}: paths are relative to the data root"
        )
    return {path for path in known if comparable(path) in listed}
