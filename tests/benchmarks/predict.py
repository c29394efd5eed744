"""Images per second and peak memory of a detector: one image after the other, and with others decoded meanwhile.

    python -m tests.benchmarks.predict [--data-root DIR] [--repeats 1] [--num-crops 10] [--images 50] [--megapixels 24]
                                       [--patch-size 224] [--small-backbone 0|1] [--json FILE] [--markdown FILE]

A GLASS of two ResNet-50 with random weights (with --small-backbone 1, of two ResNet-10), on all cores. Without
--data-root, one synthetic image of --megapixels, under --images names.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.pictures import find_images
from model_training.inference.detector import Detector, load_detector
from models.build import build_model
from tests.benchmarks import common
from tests.benchmarks.common import MAX_PIXELS, Repeat, Table, Way, median, timed
from tests.proc import peak_bytes
from training.checkpoints import save_model
from training.runs import resolved
from utils import find_experiment


def write_one_image(root: Path, arguments: argparse.Namespace) -> None:
    """Images in root/fake and root/real, all links to the first."""
    height = round((arguments.megapixels * 1e6 / 1.5) ** 0.5)
    for class_name in ("fake", "real"):
        (root / class_name).mkdir(parents=True)
    first = root / "fake" / "0000.jpg"
    common.photograph(np.random.default_rng(0), height, height * 3 // 2).save(first, quality=90)
    for number in range(1, arguments.images):
        (root / ("fake", "real")[number % 2] / f"{number:04d}.jpg").symlink_to(first)


# What each way does, with a detector and the images' paths: the first is the memory that is always used.
WORK: dict[str, Callable[[Detector, list[str]], object]] = {
    "the model alone": lambda detector, _: detector.predict(Image.new("RGB", (300, 300))),
    "one by one": lambda detector, images: [detector.predict(image) for image in images],
    "model_training.predict": lambda detector, images: list(detector.predict_all(images)),
}


def predicting(way: str, weights: Path, images: list[str]) -> Repeat:
    """A way of WORK, measured, with the peak memory of its process."""
    detector = load_detector(weights, "cpu", max_image_pixels=MAX_PIXELS)
    once = timed(lambda _: WORK[way](detector, images))
    return lambda repeat: once(repeat) | {"peak": peak_bytes() / 1e6}


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    preset = common.make_preset(arguments.data_root, scratch, patch_size=arguments.patch_size)
    experiment = replace(find_experiment(preset, "glass_resnet"), num_crops=arguments.num_crops)
    if arguments.small_backbone:
        experiment = replace(experiment, backbone="timm:resnet10t")
    weights = scratch / "model.safetensors"
    torch.manual_seed(0)
    about = {"experiment": asdict(experiment), "settings": resolved(preset.settings), "seed": 0}
    save_model(weights, build_model(experiment, preset.settings).state_dict(), about)
    images, _ = find_images([str(arguments.data_root)])
    images = [images[i % len(images)] for i in range(arguments.images)]
    ways = {name: Way(predicting, name, weights, images, one_core=False) for name in WORK}
    results = common.take_turns(ways, arguments.repeats)
    rates = {name: len(images) / median(found) for name, found in list(results.items())[1:]}
    rows = [
        (name, rates.get(name), rates[name] / rates["one by one"] if name in rates else None, median(found, "peak"))
        for name, found in results.items()
    ]
    title = f"{len(images)} images, K = {arguments.num_crops}, P = {arguments.patch_size}, {experiment.backbone}"
    note = "Peak memory is that of the whole process, the libraries included."
    return [Table(title, ("", "images/s", "x one by one", "peak MB"), rows, note, results)]


if __name__ == "__main__":
    options = dict(images=50, megapixels=24, patch_size=224, small_backbone=0)
    common.run(__doc__, measure, repeats=1, write=write_one_image, **options)
