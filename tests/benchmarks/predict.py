"""Images a second, and peak memory, of a detector: one image after the other, and while others are decoded.

    python -m tests.benchmarks.predict [--data-root DIR] [--repeats 1] [--num-crops 10] [--images 50] [--megapixels 24]
                                       [--patch-size 224] [--small-backbone 0|1] [--json FILE] [--markdown FILE]

A GLASS of two ResNet-50 with random weights (with --small-backbone 1, of two ResNet-10), on all cores. Without
--data-root, one synthetic image of so many megapixels, under as many names as there are images.
"""

import argparse
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Experiment, Settings
from data.pictures import find_images
from model_training.detector import load_detector
from models.build import build_model
from tests.benchmarks.common import (
    MAX_PIXELS,
    Measured,
    Repeat,
    Table,
    Way,
    in_turn,
    make_preset,
    measured,
    median,
    run,
)
from training.checkpoints import save_model
from utils import find_experiment, resolved


def write_one_image(root: Path, arguments: argparse.Namespace) -> None:
    """Images in root/fake and root/real, all links to the first: smooth at all scales, with a little noise."""
    random, height = np.random.default_rng(0), round((arguments.megapixels * 1e6 / 1.5) ** 0.5)
    width = height * 3 // 2
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells in (5, 20, 80, 320):
        small = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += (np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) - np.float32(128)) / cells**0.4
    pixels += random.standard_normal(pixels.shape, np.float32) * 2
    for class_name in ("fake", "real"):
        (root / class_name).mkdir(parents=True)
    first = root / "fake" / "0000.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(first, quality=90)
    for number in range(1, arguments.images):
        (root / ("fake", "real")[number % 2] / f"{number:04d}.jpg").symlink_to(first)


def write_weights(path: Path, experiment: Experiment, settings: Settings) -> None:
    """Random ones, with what a training says of its model."""
    torch.manual_seed(0)
    about = {"experiment": asdict(experiment), "settings": resolved(settings), "seed": 0}
    save_model(path, build_model(experiment, settings), about)


def nothing(weights: Path) -> Repeat:
    """The model loaded, and one tiny picture: the memory of what is always there."""
    detector = load_detector(weights, "cpu", max_image_pixels=MAX_PIXELS)

    def once(_: int) -> Measured:
        with measured() as result:
            detector.predict(Image.new("RGB", (300, 300)))
        return result | {"peak": peak_mb()}

    return once


def one_by_one(weights: Path, images: list[str]) -> Repeat:
    """What a loop over `detector.predict` does."""
    detector = load_detector(weights, "cpu", max_image_pixels=MAX_PIXELS)

    def once(_: int) -> Measured:
        with measured() as result:
            for image in images:
                detector.predict(image)
        return result | {"peak": peak_mb()}

    return once


def all_together(weights: Path, images: list[str]) -> Repeat:
    """What model_training.predict does."""
    detector = load_detector(weights, "cpu", max_image_pixels=MAX_PIXELS)

    def once(_: int) -> Measured:
        with measured() as result:
            for _ in detector.predict_all(images):
                pass
        return result | {"peak": peak_mb()}

    return once


def peak_mb() -> float:
    """Of this process so far, in megabytes of 10**6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    """The one table."""
    preset = make_preset(arguments.data_root, scratch, patch_size=arguments.patch_size)
    experiment = replace(find_experiment(preset, "glass_resnet"), num_crops=arguments.num_crops)
    if arguments.small_backbone:
        experiment = replace(experiment, backbone="timm:resnet10t")
    weights = scratch / "model.safetensors"
    write_weights(weights, experiment, preset.settings)
    images = find_images([str(arguments.data_root)])
    images = [images[i % len(images)] for i in range(arguments.images)]
    ways = {
        "the model alone": Way(nothing, weights, one_core=False),
        "one by one": Way(one_by_one, weights, images, one_core=False),
        "model_training.predict": Way(all_together, weights, images, one_core=False),
    }
    results = in_turn(ways, arguments.repeats)
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
    run(__doc__, measure, repeats=1, write=write_one_image, **options)
