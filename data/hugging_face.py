"""Writes the images of a Hugging Face data set to files, with the bytes that it holds, and a list of them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from data.images import format_of
from data.layouts import COLUMNS as LISTED
from data.layouts import LIST, PARTS
from data.lists import csv_line, read_csv, write_csv
from utils import UserError, first_line, locked_folder, replacing, write_text

COLUMNS = {names[0]: names for names in (column.rstrip("|").split("|") for column in LISTED[1:])}  # of the list
IMAGES = ("image", "image_data", "img")


def stream(names: Sequence[str], folder: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Write the images of a data set into `folder`, then list.csv; resumes if interrupted; returns the list's rows.

    Args:
        names: a folder (of save_to_disk, or of parquet files) or a name on the hub; then its configuration, if it has
            several.
        limit: at most so many rows of each split.

    Raises:
        UserError: no library, no such data set, unknown columns, or a folder that holds something else.
    """
    try:
        from datasets import Image, load_dataset, load_from_disk
    except ImportError:
        raise UserError("--hugging-face needs datasets: pip install -r requirements-datasets.txt") from None
    said = " ".join(names)
    progress = folder / f".{hashlib.sha256(said.encode()).hexdigest()[:12]}.csv"
    if any(folder.glob("[!.]*")) and not progress.exists():
        raise UserError(f"{folder} holds something else than {said}: name another --folder")
    try:
        saved = any((Path(names[0]) / name).exists() for name in ("state.json", "dataset_dict.json"))
        data = load_from_disk(names[0]) if saved else load_dataset(*names, streaming=True)
        with locked_folder(folder):
            text = progress.read_text("utf-8") if progress.exists() else csv_line(("path", *COLUMNS)) + "\n"
            write_text(progress, text[: text.rfind("\n") + 1])  # without an incomplete line, which a kill leaves
            rows = read_csv(progress)
            for name, split in data.items() if isinstance(data, dict) else [(str(data.split or "all"), data)]:
                if not re.fullmatch(r"\w[\w.-]*", str(name)):
                    raise UserError(f"{said} has a split {name!r}, which is no folder name: name another data set")
                features = split.features or {}
                images = [column for column, feature in features.items() if isinstance(feature, Image)]
                for column in images:
                    split = split.cast_column(column, Image(decode=False))
                done = sum(row["path"].startswith(f"{name}/") for row in rows)
                left = islice(split.skip(done), None if limit is None else max(0, limit - done))
                with open(progress, "a", encoding="utf-8", newline="") as file:
                    for number, item in enumerate(tqdm(left, desc=name, unit=" images", disable=None), done):
                        image = _image_bytes(item, (*IMAGES, *images), number, Path(names[0]))
                        rows.append(_write_image(image, item, features, folder / name / f"{number:08d}"))
                        file.write(csv_line(list(rows[-1].values())) + "\n")
                        file.flush()
            rows.sort(key=lambda row: row["path"])  # the same order after an interruption
            write_csv(folder / LIST, ("path", *COLUMNS), (row.values() for row in rows))
    except UserError:
        raise
    except Exception as error:  # of many libraries: no network, no such name, a damaged file
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{said} cannot be read ({reason}): fix that and run this again to resume") from None
    return rows


def _image_bytes(item: Mapping[str, Any], columns: Sequence[str], number: int, source: Path) -> bytes:
    """The image of a row, from the first of the `columns` that it has, or from the file that this names.

    Raises UserError if it has none, or if the file is neither on the hub nor below `source`.
    """
    image = next((item[name] for name in columns if name in item), None)
    if isinstance(image, dict) and image["bytes"] is None and image["path"]:
        place = image["path"].rpartition("::")[2]  # of its archive, if it is in one
        if not place.startswith("hf://") and source.resolve() not in Path(place).resolve().parents:
            raise UserError(f"row {number} has its image in {place}, outside of {source}: copy it there")
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    image = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        raise UserError(f"row {number} has no bytes in {' or '.join(columns)}: its columns are {', '.join(item)}")
    return image


def _write_image(image: bytes, item: Mapping[str, Any], features: Mapping[str, Any], place: Path) -> dict[str, str]:
    """Write an image to `place`, with the ending of its format; returns its row of the list."""
    file, split = place.with_suffix(f".{format_of(image) or 'unknown'}"), place.parent.name
    row = {"path": f"{split}/{file.name}"}
    with replacing(file) as temporary:
        temporary.write_bytes(image)
    for column, names in COLUMNS.items():
        name = next((name for name in names if item.get(name) is not None), "")
        value = item.get(name, split if column == "split" else "")
        if hasattr(features.get(name), "int2str") and value != -1:  # the number of a named class
            value = features[name].int2str(value)
        row[column] = " ".join(str(value).split())
    row["split"] *= row["split"].lower() in PARTS
    return row
