"""The index of a data set: one row per image file, written by `data.data_preprocess`, read by everything else."""

import hashlib
import shlex
from collections.abc import Sequence, Set
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from config import Preset, Settings
from data.cache.pixel_cache import PixelCache
from data.layouts import PLAIN, DataSet, Listed
from data.lists import comparable, read_columns, read_csv, write_csv
from data.records import ImageRecord
from utils import UserError, as_flags, preset_folder, read_json, reading, sha256_of

PREPROCESS_SETTINGS = (  # that data.data_preprocess reads
    "data_root", "results_root", "max_image_pixels", "num_workers", "cache_root", "cache_limit_gb", "patch_size",
    "reencode_jpeg", "data_layout",
)  # fmt: skip
GIVEN = ("part", "source")  # columns of data sets that are not plain: as `Listed` has them


@dataclass(frozen=True)
class Index:
    """A data set in the order of torchvision's ImageFolder: all fake files by name, then all real ones.

    Equal data sets have equal fingerprints, wherever they lie. `cache` is where their decoded pixels are, if anywhere.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    cache: PixelCache | None = None
    groups: tuple[str, ...] = ()  # of each image, where splits keep groups whole
    parts: tuple[str, ...] = ()  # of each image, where the data set gives them: train, valid or test
    sources: tuple[str, ...] = ()  # of each image, where its path alone does not tell it

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
        if any(self.parts):
            rows = [f"{row}\0in {part}" for row, part in zip(rows, self.parts, strict=True)]
        rows.sort()
        digest = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{len(rows)}-{digest[:16]}"

    def of(self, paths: Set[str]) -> "Index":
        """The part of it that has these paths."""
        rows = [row for row, record in enumerate(self.records) if record.path in paths]
        of_each = {name: getattr(self, name) for name in ("records", "groups", "parts", "sources")}
        return replace(self, **{name: tuple(values[row] for row in rows) for name, values in of_each.items() if values})

    def readable(self, rows: list[int]) -> list[int]:
        """`rows` without the images that cannot be decoded; the others keep their order."""
        return [row for row in rows if not self.records[row].problem]


def dataset_folder(preset: Preset) -> Path:
    """results/<preset>/dataset: the index of the data set, its statistics, tables and figures."""
    return preset_folder(preset) / "dataset"


def index_path(preset: Preset) -> Path:
    """Where the index of the preset's data set lies: results/<preset>/dataset/index.csv."""
    return dataset_folder(preset) / "index.csv"


def write_index(path: Path, records: Sequence[ImageRecord], images: Sequence[Listed] = ()) -> None:
    """Write the index as CSV, one image a row, whole or not at all; `images` are given if the data set is not plain."""
    columns, rows = [field.name for field in fields(ImageRecord)], map(astuple, records)
    if images:
        columns += GIVEN
        rows = ((*row, image.part, image.source) for row, image in zip(rows, images, strict=True))
    write_csv(path, columns, rows)


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
    layout, asked = written.get("layout", PLAIN), preset.settings.data_layout
    if asked not in ("auto", layout):
        raise UserError(f"{path} is of the layout {layout}, not of {asked}: run {command} (or set --data-layout)")
    rows = read_csv(path) if digest == sha256_of(path) else []
    if not rows or rows[0].keys() - set(GIVEN) != {field.name for field in fields(ImageRecord)}:
        raise UserError(f"{path} was changed, or was written by an earlier version: run {command}")
    given = {f"{name}s": tuple(row.pop(name) for row in rows) for name in GIVEN if name in rows[0]}
    numbers = dict.fromkeys(("label", "bytes", "width", "height"), int)
    records = [ImageRecord(**{name: numbers.get(name, str)(text) for name, text in row.items()}) for row in rows]
    return Index(root, tuple(records), **given)


def used_images(data: DataSet, settings: Settings) -> list[Listed]:
    """The images of the data set, or those of them that `data_list` names; prints their layout unless it is plain.

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
