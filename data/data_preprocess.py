"""Check and measure every image of the data set, and write the index that all other commands read.

    python -m data.data_preprocess [--preset demo] [--data-root DIR] [--num-workers N]
    python -m data.data_preprocess --cache          and store the decoded images and their views: training is faster
    python -m data.data_preprocess --cache views    and store the views only: enough for the standard models

Reads DATA_ROOT, in one of the layouts of docs/own_images.md (printed), and never writes there. Writes into
results/<preset>/dataset: index.csv and statistics.json, the printed tables as CSV and Markdown, unreadable.csv and
sizes_and_formats.png. Unreadable files are normal (the paper's data has some): they are named with their reason and
not used by any other command.

The pixel cache goes to CACHE_ROOT, a file for each image; the command first prints how many bytes it takes, 3 for each
pixel, and stops if they are not free. It can be interrupted at any time: run again, it decodes only images that are
missing, new or changed. Files of deleted images stay; the folder can be deleted at any time.

Hardware: CPU cores only, all of them by default. Measurements: docs/performance.md. A process needs 0.6 GB of memory
for an image of 143 megapixels; images above 32 megapixels are decoded one at a time.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from config import Preset
from data.cache.builder import building
from data.cache.pixel_cache import PIXELS, VIEWS, Kind
from data.index import PREPROCESS_SETTINGS, dataset_folder, index_path, write_index
from data.layouts import read_data_set
from data.lists import render_table, write_csv
from data.preparation.checks import check_images
from data.preparation.report import draw_sizes_and_formats, measure, report_left_out, tables
from data.records import CLASSES
from utils import UserError, locked_folder, run_command, sha256_of, write_json, write_text


@dataclass(frozen=True)
class Options:
    """What to store in the pixel cache."""

    # pixels (the default): decoded images and views; views: views only. Under CACHE_ROOT
    cache: tuple[Literal["pixels", "views"], ...] | None = None


def preprocess(preset: Preset, cache: Sequence[Kind] | None = None) -> None:
    """Check and measure the preset's data set; print and write the results.

    Args:
        cache: what to store in the pixel cache: None for nothing, ("views",), or ("pixels",) or () for both.

    Raises:
        UserError: no readable image in a class, results or cache inside the data root, no space, or too little memory.
    """
    root, folder = preset.settings.data_root, dataset_folder(preset)
    if folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder} is inside the data root {root}, which is never written to: set --results-root")
    kinds: tuple[Kind, ...] = () if cache is None else (VIEWS,) if cache == (VIEWS,) else (PIXELS, VIEWS)
    data, started = read_data_set(root, preset.settings.data_layout), time.perf_counter()
    print(data.described(), flush=True)
    caching = building(preset.settings, kinds, data.images) if kinds else nullcontext()
    with locked_folder(folder), caching as builder:  # which may refuse, before images are checked
        records = check_images(preset.settings, data.images, builder)
        for label, class_name in enumerate(CLASSES):
            problems = [record.problem for record in records if record.label == label]
            if all(problems):
                raise UserError(
                    f"none of the {len(problems)} {class_name} images under {root} can be decoded "
                    f"(the first: {problems[0]}): fix them, or set --data-root"
                )
        statistics = measure(root, records, data)
        (folder / "statistics.json").unlink(missing_ok=True)
        write_index(index_path(preset), records, data.plain)
        # After the index, since it says that the index is complete, and to which data root it belongs.
        write_json(folder / "statistics.json", statistics | {"index_sha256": sha256_of(index_path(preset))})
        print(f"Checked {len(records):,} images of {root.absolute()} in {time.perf_counter() - started:.1f} s")
        for kind in kinds:
            readable = statistics["images"] - statistics["unreadable"]
            print(f"Pixel cache: {kind} of {readable:,} images in {builder.cache.folders[kind]}")
        for name, (columns, rows) in tables(statistics).items():
            print(f"\n{name.replace('_', ' ').capitalize()}\n{render_table(columns, rows)}")
            write_csv(folder / f"{name}.csv", columns, rows)
            write_text(folder / f"{name}.md", render_table(columns, rows, markdown=True) + "\n")
        draw_sizes_and_formats(folder / "sizes_and_formats.png", records)
        problems = [(record.path, record.problem) for record in records]
        report_left_out(folder, problems, statistics["passed_over"])
        print(f"\nIndex, statistics, tables and sizes_and_formats.png: {folder}")


if __name__ == "__main__":
    run_command(__doc__, preprocess, settings=PREPROCESS_SETTINGS, options=Options)
