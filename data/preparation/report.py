"""Statistics, tables and a figure of a data set, and the files in it that are not used."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.index import Index
from data.layouts import DataSet
from data.lists import render_table, write_csv
from data.preparation.charts import draw_categories, draw_histogram, draw_sizes, new_figure, save_figure
from data.records import CLASSES, ImageRecord
from utils import one_line

CHANNELS = ("red", "green", "blue")
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
SHOWN = 20  # unreadable files that are printed; unreadable.csv holds all


# ------------------------------------------------------------------------------------------------ statistics
def measure(root: Path, records: Sequence[ImageRecord], data: DataSet) -> dict[str, Any]:
    """What statistics.json holds, of the checked `records` of `data`. All but `images` is over readable images.

    Sizes are in pixels, `mean` and `std` (population) of values in [0, 1], red, green, blue, exact to the last digit.
    """
    statistics: dict[str, Any] = {
        "data_root": str(root.absolute()),
        "layout": data.layout,
        "fingerprint": Index(root, tuple(records)).fingerprint,
        "images": len(records),
        "unreadable": sum(bool(record.problem) for record in records),
        "passed_over": list(data.ignored),
        **moments(records),
        "classes": {},
    }
    table = readable_table(records)
    for label, class_name in enumerate(CLASSES):
        members, count = table[table["label"] == label], sum(record.label == label for record in records)
        statistics["classes"][class_name] = {
            "images": count,
            "unreadable": count - len(members),
            "mean_width": float(members["width"].mean()),
            "mean_height": float(members["height"].mean()),
            "modes": members["mode"].value_counts().to_dict(),
            "formats": members["format"].value_counts().to_dict(),
            "common_sizes": members["size"].value_counts().head(5).to_dict(),
            **members[["width", "height", "megapixels"]]
            .quantile(list(QUANTILES.values()))
            .set_axis(list(QUANTILES))
            .to_dict(),
            **moments([record for record in records if record.label == label]),
        }
    return statistics


def readable_table(records: Sequence[ImageRecord]) -> pd.DataFrame:
    """Label, format, mode and sizes of the readable images."""
    columns = ["label", "format", "mode", "width", "height"]
    table = pd.DataFrame([[getattr(record, name) for name in columns] for record in records], columns=columns)
    sizes = [f"{record.width}x{record.height}" for record in records]
    table = table.assign(size=sizes, megapixels=table["width"] * table["height"] / 1e6)
    return table[[not record.problem for record in records]]


def moments(records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Number of pixels, and their mean and population standard deviation per channel, of the readable images."""
    pixels = sum(record.width * record.height for record in records)
    sums = np.array([record.sums for record in records if not record.problem], object)
    values, squares = sums.sum(0).reshape(2, 3)  # Python integers: products are beyond 64 bits
    deviations = [math.sqrt(variance) / 255 for variance in (pixels * squares - values**2) / pixels**2]
    return {"pixels": pixels, "mean": (values / (255 * pixels)).tolist(), "std": deviations}


# ---------------------------------------------------------------------------------------------------- tables
def tables(statistics: dict[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The report's tables, as columns and rows, by name, which is also the name of their file."""
    classes = statistics["classes"].items()
    modes = list(dict.fromkeys(mode for _, values in classes for mode in values["modes"]))
    averages = ("images", "unreadable", "mean_width", "mean_height")

    def shares(kind: str) -> list[list[Any]]:
        counts = [
            (n, v["images"] - v["unreadable"], value, count) for n, v in classes for value, count in v[kind].items()
        ]
        return [[name, value, count, 100 * count / readable] for name, readable, value, count in counts]

    modes_of = [[values["modes"].get(mode, 0) for mode in modes] for _, values in classes]
    return {
        "classes": (
            ["class", *averages, *(f"mode_{mode}" for mode in modes)],
            [[name, *(v[key] for key in averages), *of] for (name, v), of in zip(classes, modes_of, strict=True)],
        ),
        "channels": (
            ["class", *(f"{quantity}_{channel}" for quantity in ("mean", "std") for channel in CHANNELS)],
            [[name, *values["mean"], *values["std"]] for name, values in (*classes, ("both", statistics))],
        ),
        "sizes": (
            ["class", "quantity", *QUANTILES],
            [[name, key, *v[key].values()] for name, v in classes for key in ("width", "height", "megapixels")],
        ),
        "common_sizes": (["class", "size", "images", "percent"], shares("common_sizes")),
        "formats": (["class", "format", "images", "percent"], shares("formats")),
    }


def report_left_out(folder: Path, problems: Sequence[tuple[str, str]], ignored: Sequence[str] = ()) -> None:
    """Print and write the unreadable files with their reasons, and print the ignored files.

    `problems` are the path and reason of all images; the reason is empty for a readable one.
    """
    unreadable = [(path, problem) for path, problem in problems if problem]
    write_csv(folder / "unreadable.csv", ["path", "problem"], unreadable)
    if unreadable:
        print(f"\nUnreadable: {len(unreadable):,} of {len(problems):,} images, left out of all that follows")
        shown = [[one_line(path), one_line(problem)] for path, problem in unreadable[:SHOWN]]
        print(render_table(["file", "reason"], shown))
    if len(unreadable) > SHOWN:
        print(f"... and {len(unreadable) - SHOWN:,} more in {folder / 'unreadable.csv'}")
    if ignored:
        names = ", ".join(map(one_line, ignored[:3])) + (", ..." if len(ignored) > 3 else "")
        print(f"\nIgnored, as hidden or without the ending of an image: {len(ignored):,} ({names})")


def draw_sizes_and_formats(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write a figure of the sizes, areas and file formats of each class, as PNG."""
    table = readable_table(records)
    by_class = [table[table["label"] == label] for label in range(len(CLASSES))]
    figure, (sizes, areas, formats) = new_figure((11, 3.6), (1, 3))
    draw_sizes(sizes, by_class)
    draw_histogram(areas, by_class, "megapixels", bins=20)
    areas.set(title="Area", xlabel="megapixels")
    draw_categories(formats, by_class, "format", "File format")
    save_figure(figure, path, legend=sizes)
