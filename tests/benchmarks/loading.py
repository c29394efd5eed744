"""Processor time to load an image: decoding alone, the standard model's view, GLASS's views.

    python -m tests.benchmarks.loading --data-root DIR [--num-crops 10] [--repeats 3]

Takes every image under DIR/fake and DIR/real, in one thread; prints medians over the repeats.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from config import PAPER
from data.crops import crop_generator
from data.datasets import generate_views, standard_view, to_tensor
from data.images import read_image
from data.index import list_images


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--num-crops", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name, _ in list_images(arguments.data_root)]
    limit, patch_size = PAPER.settings.max_image_pixels, PAPER.settings.patch_size

    def glass(name: str) -> None:
        image = to_tensor(read_image(arguments.data_root / name, limit))
        generate_views(image, arguments.num_crops, patch_size, crop_generator(0, name))

    ways: dict[str, Callable[[str], object]] = {
        "decoding alone": lambda name: read_image(arguments.data_root / name, limit),
        "standard view": lambda name: standard_view(read_image(arguments.data_root / name, limit), patch_size),
        f"GLASS, K = {arguments.num_crops}": glass,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, load in ways.items():  # in turn, so that a machine that slows down slows all of them
            start = time.process_time()
            for name in names:
                load(name)
            seconds[way].append(time.process_time() - start)
    print(f"{len(names)} images, {arguments.repeats} repeats")
    base = statistics.median(seconds["decoding alone"])
    for way, measured in seconds.items():
        median = statistics.median(measured)
        print(
            f"{way:18} {1000 * median / len(names):8.1f} ms of processor time an image, {median / base:5.2f} x decoding"
        )


if __name__ == "__main__":
    main()
