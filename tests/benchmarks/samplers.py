"""One core's time to load an image from the warm pixel cache, by the crop sampler, beside the paper's.

    python -m tests.benchmarks.samplers [--data-root DIR] [--repeats 5] [--num-crops 5] [--json FILE] [--markdown FILE]

All views of each image; and the sampler alone, with the image's pixels at hand. Default: 12 images of a megapixel.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from config import PAPER, CropSampler
from data.datasets import ImageDataset
from data.index import Index
from data.records import CLASSES
from data.samplers import SAMPLERS
from data.views import ViewSettings
from data.workers import keep_freed_memory
from tests.benchmarks import common
from tests.benchmarks.common import MAX_PIXELS, Repeat, Table, Way, median, timed

P = PAPER.settings.patch_size


class _Pixels:
    """An image whose pixels have been read."""

    def __init__(self, dataset: ImageDataset, position: int) -> None:
        self.record = dataset.records[position]
        self.height, self.width = self.record.height, self.record.width
        self.pixels = dataset.cache.pixels(self.record)


def write_images(root: Path) -> None:
    """12 photographs of a megapixel."""
    random = np.random.default_rng(0)
    for i in range(12):
        (root / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        common.photograph(random, 1000, 1000).save(root / CLASSES[i % 2] / f"{i:02d}.jpg", quality=90)


def loading(index: Index, rows: list[int], sampler: CropSampler, num_crops: int, alone: bool) -> Repeat:
    """A pass over the images as training draws them; `alone`: of the boxes only."""
    torch.set_num_threads(1)
    keep_freed_memory()
    views = ViewSettings(P, num_crops, crop_sampler=sampler)
    dataset = ImageDataset(index, rows, views, MAX_PIXELS)
    images = [_Pixels(dataset, position) for position in range(len(rows))] if alone else []

    def epoch(number: int) -> None:
        for position in range(len(rows)):
            if alone:
                views.boxes(images[position], images[position].record.path, number, training=True)
            else:
                dataset[position, number]

    return timed(epoch)


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    index, K = common.cached_index(common.make_preset(arguments.data_root, scratch)), arguments.num_crops
    rows = index.readable(range(len(index.records)))
    names = [name for name in SAMPLERS if name != "five" or K == 5]
    ways = {(name, alone): Way(loading, index, rows, name, K, alone) for name in names for alone in (False, True)}
    results = common.take_turns(ways, arguments.repeats)
    megapixels = sum(index.records[row].width * index.records[row].height for row in rows) / len(rows) / 1e6
    table = []
    for name in names:
        views, alone = (1000 * median(results[name, which]) / len(rows) for which in (False, True))
        of_paper = 1000 * median(results["stratified", False]) / len(rows)
        table.append((name, alone, alone / megapixels, views, 1000 / views, views / of_paper))
    return [
        Table(
            f"Crop samplers on one core, K = {K}, P = {P}, images of {megapixels:.2f} megapixels in the mean",
            ("sampler", "alone, ms an image", "... a megapixel", "all views, ms", "images/s", "time / stratified"),
            table,
            "Alone: the boxes, with the pixels in memory. cooi: the 49 crops that the model chooses from. Medians.",
            {" ".join((name, "alone" if alone else "all views")): found for (name, alone), found in results.items()},
        )
    ]


if __name__ == "__main__":
    common.run(__doc__, measure, num_crops=5, write=lambda root, _: write_images(root))
