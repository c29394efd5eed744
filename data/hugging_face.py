"""A Hugging Face data set -> image files with the bytes that it holds, and a list of them, which is a data set here."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.images import format_of
from data.layouts import LIST, PARTS
from data.lists import csv_line, read_csv, write_csv
from utils import UserError, first_line, locked_folder, replacing, write_text

COLUMNS = {  # of the list -> of data sets: the first that is there
    "label": ("label", "labels"),
    "split": ("split",),
    "generator": ("generator", "model", "model_name"),
    "source": ("source", "real_source"),
}
IMAGES = ("image", "image_data", "img")


def stream(names: Sequence[str], folder: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Write the images of a data set into `folder`, and list.csv once all are there; resumes; returns the list's rows.

    Args:
        names: a folder (of save_to_disk, or of parquet files) or a name on the hub; its configuration, if it has more.
        limit: of each split, the first so many rows only.

    Raises:
        UserError: no library, no such data set, other columns, or a folder that holds something else.
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
            write_text(progress, text[: text.rfind("\n") + 1])  # without a line that a kill cut short
            rows = read_csv(progress)
            for name, split in data.items() if isinstance(data, dict) else [(str(data.split or "all"), data)]:
                features = split.features or {}
                for column in [column for column, feature in features.items() if isinstance(feature, Image)]:
                    split = split.cast_column(column, Image(decode=False))
                done = sum(row["path"].startswith(f"{name}/") for row in rows)
                left = islice(split.skip(done), None if limit is None else max(0, limit - done))
                with open(progress, "a", encoding="utf-8", newline="") as file:
                    for number, item in enumerate(tqdm(left, desc=name, unit=" images", disable=None), done):
                        rows.append(_written(item, features, folder, name, number))
                        file.write(csv_line(list(rows[-1].values())) + "\n")
                        file.flush()
            rows.sort(key=lambda row: row["path"])  # whatever was interrupted
            write_csv(folder / LIST, ("path", *COLUMNS), (row.values() for row in rows))
    except UserError:
        raise
    except Exception as error:  # of many libraries: no network, no such name, a damaged file
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{said} cannot be read ({reason}): correct that and run this again, which goes on") from None
    return rows


def _written(item: Mapping[str, Any], features: Mapping[str, Any], folder: Path, split: str, number: int) -> dict:
    """A row of the list, after its image is in its file."""
    image = next((item[name] for name in IMAGES if name in item), None)
    if isinstance(image, dict):
        image = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    if not isinstance(image, bytes):
        raise UserError(f"row {number} has no image in {' or '.join(IMAGES)}: its columns are {', '.join(item)}")
    row = {"path": f"{split}/{number:08d}.{format_of(image) or 'unknown'}"}
    with replacing(folder / row["path"]) as temporary:
        temporary.write_bytes(image)
    for column, names in COLUMNS.items():
        name = next((name for name in names if item.get(name) is not None), "")
        value = item.get(name, split if column == "split" else "")
        if hasattr(features.get(name), "int2str") and value != -1:  # a number that has a name
            value = features[name].int2str(value)
        row[column] = " ".join(str(value).split())
    row["split"] *= row["split"].lower() in PARTS
    return row
