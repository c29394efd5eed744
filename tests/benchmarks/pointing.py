"""Does the effect map point at the generated half of an image that is half generated, half real?

    python -m tests.benchmarks.pointing --weights results/demo/glass_resnet/seed_100/model.safetensors
        [--images 50] [--seed 1] [--device cpu] [--save DIR]

Each image is one scene of the demo's generator, rendered with the sensor's noise in one half and with the decoder's
traces in the other (left, right, top and bottom in turn), then saved as the demo's files are; the seed is another than
the demo's, so that no model has seen the scenes. Pointing accuracy is the share of images whose map is largest in the
generated half; 0.5 by chance. --save keeps images and maps to look at.
"""

import argparse
import copy
import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from data.demo_dataset import CLASSES, SCENES, draw_scene, encode, render
from data.pictures import Picture, read_pictures
from model_training.inference.detector import Detector, load_detector
from model_training.inference.effect_map import effect_map, spread
from model_training.inference.evidence_pictures import draw_map

SIDES = ("left", "right", "top", "bottom")


def side_of(index: int) -> int:
    """Which side is generated: each in turn, for each of the four kinds of scene."""
    return index // len(SCENES) % len(SIDES)


def half_fake(seed: int, index: int) -> tuple[Image.Image, np.ndarray]:
    """An image, and where it is generated: bool (H, W)."""
    scene, generator = draw_scene(seed, CLASSES[index % 2], index)
    fake, real = (np.asarray(render(scene, name, copy.deepcopy(generator))) for name in ("fake", "real"))
    height, width = fake.shape[:2]
    row, column = np.ogrid[:height, :width]
    halves = (2 * column < width, 2 * column >= width, 2 * row < height, 2 * row >= height)
    generated = np.broadcast_to(halves[side_of(index)], (height, width))
    _, content = encode(Image.fromarray(np.where(generated[..., None], fake, real)), seed, index)
    return Image.open(io.BytesIO(content)), generated


def points_there(pixels: np.ndarray, generated: np.ndarray) -> bool:
    """Whether most of the largest pixels of a map (H, W) are in the generated half."""
    return bool(generated[pixels == pixels.max()].mean() > 0.5)


def auc(pixels: np.ndarray, generated: np.ndarray) -> float:
    """How well a map separates the pixels of the halves, on every eighth pixel of every eighth row."""
    return float(roc_auc_score(generated[::8, ::8].ravel(), pixels[::8, ::8].ravel()))


def pointing(detector: Detector, image: Image.Image, generated: np.ndarray, save: Path | None) -> dict[str, float]:
    (picture,) = read_pictures([image], detector.settings.max_image_pixels)
    assert isinstance(picture, Picture)
    found = effect_map(detector, picture)
    maps = {"effect": found.pixels}
    for name, values in (("attention", found.scores.attention[0]), ("tile alone", found.scores.alone[0])):
        maps[name] = spread(values, found.boxes, *generated.shape)
    if save:
        draw_map(picture, found).save(save)
    return {
        **{f"{name}: pointing accuracy": points_there(pixels, generated) for name, pixels in maps.items()},
        **{f"{name}: AUC of pixels": auc(pixels, generated) for name, pixels in maps.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    detector = load_detector(arguments.weights, arguments.device)
    results = []
    for index in tqdm(range(arguments.images), desc="pointing", unit=" images", disable=None):
        save = arguments.save and arguments.save / f"{index:04d}_{SIDES[side_of(index)]}.png"
        if save:
            save.parent.mkdir(parents=True, exist_ok=True)
        results.append(pointing(detector, *half_fake(arguments.seed, index), save))
    print(f"{arguments.weights}, {arguments.images} images, seed {arguments.seed}")
    for name in results[0]:
        print(f"{name}: {np.mean([result[name] for result in results]):.2f}")
