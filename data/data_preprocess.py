"""Check and measure every image of the data set, and write the index that all other commands read.

    python -m data.data_preprocess [--preset demo] [--data-root DIR] [--num-workers N]
    python -m data.data_preprocess --cache          and store the decoded images and their views: training is faster
    python -m data.data_preprocess --cache views    and store the views only: enough for the standard models

Reads DATA_ROOT/{fake,real} and never writes there. Writes into results/<preset>/dataset: index.csv and
statistics.json, the printed tables as CSV and Markdown, unreadable.csv and sizes_and_formats.png. Unreadable files
are normal (the paper's data has some): they are named with their reason and left out of everything after.

The pixel cache goes to CACHE_ROOT; the command says first how many bytes it takes, 3 for each pixel, and stops if
they are not free. It can be interrupted at any time: given again, it goes on where it was. Given again later, it
decodes only the images that are new or have changed.

Hardware: CPU cores only, all of them by default. Measured: docs/performance.md. A process takes 0.6 GB of memory
for an image of 143 megapixels; images above 32 megapixels are decoded one at a time.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext

from config import Preset
from data.cache_builder import one_builder, plan_cache
from data.checks import File, check_images
from data.index import CLASSES, index_path, list_images, write_index
from data.pixel_cache import PIXELS, VIEWS, Kind
from data.report import draw_sizes_and_formats, measure, render_table, report_left_out, tables
from utils import UserError, dataset_folder, run_door, sha256_of, sole_process, write_csv, write_json, write_text

KINDS: dict[str | None, tuple[Kind, ...]] = {None: (), "views": (VIEWS,), "pixels": (PIXELS, VIEWS)}


def preprocess(preset: Preset, cache: str | None = None) -> None:
    """Check and measure the preset's data set; print and write what was found.

    Args:
        cache: what to store in the pixel cache: nothing, "views", or "pixels", which is both.

    Raises:
        UserError: no readable image in a class, results or cache inside the data root, no space, or too little memory.
    """
    root, folder = preset.settings.data_root, dataset_folder(preset)
    if folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder} is inside the data root {root}, which is never written to: set --results-root")
    files = list_images(root)
    with sole_process(folder):  # now, and not after all the checking
        _preprocess(preset, files, cache)


def _preprocess(preset: Preset, files: Sequence[File], cache: str | None) -> None:
    root, folder = preset.settings.data_root, dataset_folder(preset)
    started = time.perf_counter()
    with one_builder(preset) if cache else nullcontext():
        packs = plan_cache(preset, KINDS[cache], files)
        for pack in packs.values():
            pack.begin()
        images = check_images(preset, files, packs)
        for pack in packs.values():
            pack.seal()
    records = [image.record for image in images]
    for label, class_name in enumerate(CLASSES):
        problems = [record.problem for record in records if record.label == label]
        if all(problems):
            raise UserError(
                f"none of the {len(problems)} images under {root / class_name} can be read "
                f"(the first: {problems[0]}): mend them, or set --data-root"
            )
    statistics = measure(root, records, [image.sums for image in images])
    (folder / "statistics.json").unlink(missing_ok=True)
    write_index(index_path(preset), records)
    # After the index, which it vouches for: that it is whole, and of which data root.
    write_json(folder / "statistics.json", statistics | {"index_sha256": sha256_of(index_path(preset))})
    print(f"Checked {len(files):,} images of {root.absolute()} in {time.perf_counter() - started:.1f} s")
    for kind, pack in packs.items():
        print(f"Pixel cache: {kind} of {pack.images:,} images in {pack.path}")
    for name, (columns, rows) in tables(statistics).items():
        print(f"\n{name.replace('_', ' ').capitalize()}\n{render_table(columns, rows)}")
        write_csv(folder / f"{name}.csv", columns, rows)
        write_text(folder / f"{name}.md", render_table(columns, rows, markdown=True) + "\n")
    draw_sizes_and_formats(folder / "sizes_and_formats.png", records)
    report_left_out(folder, records, statistics["passed_over"])
    print(f"\nIndex, statistics, tables and sizes_and_formats.png: {folder}")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        nargs="?",
        choices=["pixels", "views"],
        const="pixels",
        help="store decoded images and views (pixels, the default), or views only, under CACHE_ROOT",
    )


if __name__ == "__main__":
    run_door(__doc__, preprocess, arguments=_add_cache)
