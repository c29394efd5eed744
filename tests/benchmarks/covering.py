"""Which samplers' crops fall on what is fake? On the demo with local traces, whose masks say where that is.

    python -m tests.benchmarks.covering --data-root datasets/demo_local [--num-crops 8] [--patch-size 64]

Prints for each sampler the share of the crops of evaluation that lie mostly within the mask, and the share of the fake
images that have such a crop.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import DEMO_LOCAL
from data.images import pixel_key, read_image
from data.layouts import MASKS
from data.lists import render_table
from data.samplers import SAMPLERS
from data.views import Picture, ViewSettings

NAMES = [name for name in SAMPLERS if name not in ("five", "cooi", "all")]  # of K crops, by the image alone


def shares_within(root: Path, name: str, views: ViewSettings) -> dict[str, np.ndarray]:
    """Sampler -> the share of each crop (K,) of the fake image `name` that is within its mask."""
    mask = np.asarray(Image.open(root / MASKS / "fake" / f"{Path(name).stem}.png")) > 0
    image = read_image(root / "fake" / name, DEMO_LOCAL.settings.max_image_pixels)
    picture, found = Picture(image, pixel_key(image)), {}
    for sampler in NAMES:
        (boxes,) = picture.boxes(replace(views, crop_sampler=sampler), 1)
        found[sampler] = np.array([mask[y : y + h, x : x + w].mean() for y, x, h, w in boxes.tolist()])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=DEMO_LOCAL.settings.data_root)
    parser.add_argument("--num-crops", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=DEMO_LOCAL.settings.patch_size)
    arguments = parser.parse_args()
    views = ViewSettings(arguments.patch_size, arguments.num_crops, DEMO_LOCAL.settings.main_seed)
    names = sorted(path.name for path in (arguments.data_root / "fake").glob("[0-9]*"))
    every = [shares_within(arguments.data_root, name, views) for name in tqdm(names, unit=" images", disable=None)]
    mostly = {sampler: np.array([of_image[sampler] > 0.5 for of_image in every]) for sampler in NAMES}  # (images, K)
    rows = [(sampler, 100 * within.mean(), 100 * within.any(1).mean()) for sampler, within in mostly.items()]
    print(render_table(("sampler", "crops_within_%", "images_with_one_%"), rows, markdown=True))
