"""How good is a detector without any network? The baseline that a GLASS has to beat, on the same splits.

    python -m tests.benchmarks.handmade --preset own --data-root ROOT
        [--predictions results/own/NAME/seed_100/predictions.csv ...] [--test-root OTHER] [--scores FILE]

Gradient-boosted trees on histograms of second differences and radial power spectra of the whole image, of its luma and
chroma. They are trained on the training and validation images of the preset's split (settings as for a training:
--group-by, --hold-out, ...; data.data_preprocess has to have indexed ROOT) and tested on its test images, or on all
images of OTHER. With --predictions, those of trained models stand beside them, with their paired differences from the
trees. AUC, and accuracy at 0.5; mean ± standard deviation over seeds, 95% bootstrap intervals over pairs or groups.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from tqdm import tqdm

from config import Preset, Seeds, Settings
from data.images import UnreadableImage, read_image, reencoded
from data.index import read_index
from data.layouts import read_data_set
from data.lists import check_output, write_csv
from data.splits import split_index
from model_training.evaluate import differences, metric_of, metrics_row
from model_training.inference.detector import UNCALIBRATED
from model_training.inference.scores import ScoredData, ScoredModel, sources_and_groups
from model_training.tables.read_results import read_fakes
from model_training.tables.table import Table, value_of
from utils import UserError, run_command

SETTINGS = (  # that decide the split, and what is decoded
    "data_root", "results_root", "max_image_pixels", "main_seed", "valid_size", "test_size", "final_valid_fraction",
    "data_layout", "data_list", "group_by", "hold_out", "reencode_jpeg",
)  # fmt: skip
Images = list[tuple[str, int]]  # path below the data root, and label
LIMIT = 8  # grey levels; larger second differences count as this
RINGS = 32  # of the spectrum, from 0 to 1/2 cycle per pixel
NAME = "hand-made"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the trees are tested on and compared with."""

    test_root: Path | None = None  # test on all images of this folder, instead of the test split
    predictions: tuple[Path, ...] = ()  # predictions.csv of trained models, of the same test images
    scores: Path | None = None  # write the probabilities of fake there, as CSV
    seeds: Seeds = (100, 200, 300)  # of the trees, each of which sees half of the features at each split


def features(pixels: np.ndarray) -> np.ndarray:
    """Of each channel of an image (H, W, 3): histograms of its second differences along columns and rows, as shares;
    the logarithm of its power at each radius, from its mean; and how this changes from ring to ring."""
    found = []
    window = np.outer(*map(np.hanning, pixels.shape[:2]))
    radius = np.hypot(np.fft.fftfreq(len(pixels))[:, None], np.fft.rfftfreq(pixels.shape[1]))
    ring = np.minimum(2 * RINGS * radius, RINGS).astype(int).ravel()  # the last: beyond 1/2, in the corners
    sizes = np.bincount(ring, minlength=RINGS + 1)
    for channel in np.moveaxis(pixels.astype(np.int16), 2, 0):
        for axis in (0, 1):
            second = np.diff(channel, n=2, axis=axis).clip(-LIMIT, LIMIT) + LIMIT
            found.append(np.bincount(second.ravel(), minlength=2 * LIMIT + 1) / max(1, second.size))
        power = np.abs(np.fft.rfft2((channel - channel.mean()) * window)) ** 2
        levels = np.log(np.bincount(ring, power.ravel(), RINGS + 1) / np.maximum(1, sizes) + 1e-9)
        found += [levels - levels.mean(), np.diff(levels)]
    return np.concatenate(found)


def features_of(root: Path, images: Images, settings: Settings) -> tuple[np.ndarray, Images, dict[str, str]]:
    """Features (N, F) of the images that can be decoded; these images; and for each other one the reason."""
    found, readable, unreadable = [], [], {}
    for path, label in tqdm(images, desc=f"features of {root.name}", unit=" images", disable=None):
        try:
            image = reencoded(read_image(root / path, settings.max_image_pixels), settings.reencode_jpeg)
        except UnreadableImage as error:
            unreadable[path] = str(error)
        else:
            found.append(features(np.asarray(image.convert("YCbCr"))))  # a decoder's traces are in the chroma
            readable.append((path, label))
    if not found:
        raise UserError(f"none of {len(images)} images of {root} can be decoded: name another folder")
    return np.array(found), readable, unreadable


def measure(preset: Preset, **values: Any) -> None:
    """Train, test, print the tables and write the scores; raises UserError for images or files that cannot be used."""
    options, settings = Options(**values), preset.settings
    keys = [(NAME, f"seed_{seed}") for seed in options.seeds]
    keys += [(file.absolute().parent.parent.name, file.absolute().parent.name) for file in options.predictions]
    if len(set(keys)) < len(keys):
        raise UserError("two files of --predictions lie in folders NAME/seed_N of the same names: name each model once")
    heading = ("path", "label", *(f"{name} {seed}" for name, seed in keys))
    if options.scores:
        check_output(options.scores, heading)
    index, splits = split_index(read_index(preset), settings)
    images = [(record.path, record.label) for record in index.records]
    x, trained, _ = features_of(index.root, [images[row] for row in (*splits.train, *splits.valid)], settings)
    is_fake, tested = [label == 0 for _, label in trained], [images[row] for row in splits.test]
    if options.test_root:
        settings = replace(settings, data_root=options.test_root, data_list="", group_by="none")  # intervals over pairs
        tested = [(image.path, image.label) for image in read_data_set(options.test_root).images]
    of_tested, tested, unreadable = features_of(settings.data_root, tested, settings)
    paths, labels = [path for path, _ in tested], np.array([label for _, label in tested])
    trees = [HistGradientBoostingClassifier(max_features=0.5, random_state=seed) for seed in options.seeds]
    fakes = [tree.fit(x, is_fake).predict_proba(of_tested)[:, 1] for tree in trees]
    fakes += [read_fakes(file, paths) for file in options.predictions]
    models: dict[str, list[ScoredModel]] = {}
    for (name, seed), fake in zip(keys, fakes, strict=True):
        probabilities = {(which, "native"): fake for which in ("calibrated", "raw")}
        models.setdefault(name, []).append(ScoredModel(seed.removeprefix("seed_"), UNCALIBRATED, probabilities))
    every = read_data_set(settings.data_root, settings.data_layout).images
    listed = {image.path: image for image in every}
    grouped = sources_and_groups(settings, [listed[path] for path in paths], every)
    data = ScoredData(settings.data_root.resolve(), settings.data_list, labels, *grouped, models, unreadable, [])
    rows = [{"model": name, "missing": ""} | metrics_row(of, "raw", "native", data) for name, of in models.items()]
    columns = {"model": value_of("model"), "AUC": metric_of("auc"), "accuracy": metric_of("accuracy")}
    notes = [f"In percent; [{data.interval}]. Trees: trained on {len(trained)} images of {index.root}.", *data.notes()]
    tables = [Table("handmade", "Hand-made features, and trained models", rows, columns, notes)]
    for table in tables + ([differences(data, ["native"])] if len(models) > 1 else []):
        print(f"\n{table.markdown()}")
    if options.scores:
        write_csv(options.scores, heading, zip(paths, labels, *fakes, strict=True))


if __name__ == "__main__":
    run_command(__doc__, measure, settings=SETTINGS, options=Options)
