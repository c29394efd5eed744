"""Scores of trained models on a labelled data set, stored in files so that nothing is computed twice.

`results/<preset>/scores/<model>_<key>.csv` has a row for each image and perturbation, written when it is computed.
The key covers what the scores depend on besides the images: data root, weights, draws, precision, device, commit and
library versions. An image whose file size or modification time has changed is scored again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from config import Name, Preset, Settings
from data.images import UnreadableImage
from data.index import used_images
from data.layouts import read_data_set
from data.lists import comparable, csv_line, name_of_root, read_csv, write_csv
from data.perturbations import perturbation
from data.records import CLASSES, ImageRecord, identity
from data.splits import groups_of
from model_training.inference.detector import Detector, Outcome, PredictionOptions, load_detector
from models.weights import weights_file, written_by_torch
from training.calibration import Calibration
from training.checkpoints import read_about
from training.runs import git_commit
from utils import UserError, locked_folder, preset_folder, reading, sha256_of, stat_of

SETTINGS = (  # that evaluate and robustness read
    "data_root", "results_root", "data_layout", "data_list", "group_by", "device", "max_image_pixels", "num_workers",
)  # fmt: skip
COLUMNS = ("path", "perturbation", "bytes", "mtime_ns", "probability_fake", "raw_probability_fake", "problem")
Key = tuple[str, str, str, str]  # path, perturbation, bytes, mtime_ns
Scores = tuple[float, float, str]  # calibrated and raw probability of fake, problem


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(PredictionOptions):
    """Options of the commands that score a data set: which models, how they predict, where the results go."""

    weights: Annotated[tuple[Path, ...], Field(min_length=1)]  # model.safetensors files, or hf:OWNER/NAME
    name: Name | None = None  # of the results folder; by default made of the data root and the choice of images
    all_images: bool = False  # also those that a model was trained on, which are left out unless --data-list names them

    def output_folder(self, preset: Preset, section: str, *variant: str) -> Path:
        """results/<preset>/<section>/<name>."""
        settings = preset.settings
        images = settings.data_list, settings.group_by.removeprefix("none"), "all" * self.all_images
        # For a checkpoint of the author's code, they describe the model.
        crops = {} if any(map(written_by_torch, self.weights)) else self.crops
        layout = [settings.data_layout] * (settings.data_layout != "auto")
        choices = *images, *layout, *(f"{name}-{value}" for name, value in crops.items()), *variant
        return preset_folder(preset) / section / (self.name or name_of_root(settings.data_root, *choices))


@dataclass(frozen=True)
class ScoredModel:
    """The scores of one weights file."""

    seed: int | str  # "unknown" of weights that do not say it
    calibration: Calibration
    probabilities: dict[tuple[str, str], np.ndarray]  # ("calibrated" or "raw", perturbation) -> (N,), of fake

    def threshold(self, which: str) -> float:
        """For calibrated probabilities the best one on the validation images, for raw ones 0.5."""
        return self.calibration.balanced if which == "calibrated" else 0.5


@dataclass(frozen=True)
class ScoredData:
    """The N images of a data set that could be decoded, and the models that scored them."""

    root: Path  # that it was read from
    data_list: str  # as the setting
    labels: np.ndarray  # (N,), 0 fake, 1 real
    sources: np.ndarray  # (N,), generator or origin of each image; "" where it has none
    groups: np.ndarray  # (N,); images of a group are not independent and are resampled together
    kind_of_groups: str
    models: dict[str, list[ScoredModel]]  # name -> its seeds
    unreadable: dict[str, str]  # path of each image that could not be decoded -> the reason
    warnings: list[str]  # sentences: images that a model was trained on, other crops than in training

    @property
    def interval(self) -> str:
        """What the intervals in a table are, for its notes."""
        return f"95% bootstrap interval over {len(set(self.groups)):,} {self.kind_of_groups}"

    def notes(self) -> list[str]:
        """Notes below a table: which images, and how each model was calibrated."""
        images = f"{len(self.labels):,} images of {self.root}, {int((self.labels == 0).sum()):,} of them fake"
        notes = [f"{images}{f', listed in {self.data_list}' if self.data_list else ''}.", *self.warnings]
        for name, models in self.models.items():
            seeds = ", ".join(str(model.seed) for model in models)
            smallest = min(min(model.calibration.fake_images, model.calibration.real_images) for model in models)
            calibrated = f"calibrated on {smallest} validation images of the smaller class"
            uncalibrated = "not calibrated: raw probabilities, threshold 0.5"
            notes.append(f"{name}: seeds {seeds}; {calibrated if smallest else uncalibrated}.")
        if self.unreadable:
            notes.append(f"Left out, since they cannot be decoded: {len(self.unreadable)}.")
        return notes

    def report_written(self, folder: Path) -> None:
        """Print where the results are, and which images are not in them."""
        print(f"Written: {folder}")
        for path, problem in self.unreadable.items():
            print(f"left out, cannot be decoded: {path} ({problem})")


def score_data(
    preset: Preset, options: ScoringOptions, perturbations: Sequence[str], classes: int = len(CLASSES)
) -> ScoredData:
    """Score the preset's data set with each weights file; only scores that are not stored yet are computed.

    Raises UserError for weights, images or perturbations that cannot be used, or readable images of fewer than
    `classes` classes.
    """
    for name in perturbations:
        perturbation(name)
    settings, scored, unreadable = preset.settings, [], {}
    root, data_list = settings.data_root, settings.data_list
    data = read_data_set(root, settings.data_layout, classes)
    chosen = used_images(data, settings)
    digests, abouts = _identify([weights_file(name) for name in options.weights])
    seen = _find_trained_on(root, [image.path for image in chosen], abouts.values())
    left_out = seen if not (data_list or options.all_images) else frozenset()
    images = [image for image in chosen if image.path not in left_out]
    paths, labels = [image.path for image in images], np.array([image.label for image in images], int)
    if len(set(labels)) < classes:
        besides = ", besides those that a model was trained on (--all-images keeps these)" if left_out else ""
        raise UserError(f"{data_list or root} has no images of both classes{besides}: both are needed")
    of_author = {path: written_by_torch(path) for path in digests}
    other_crops: dict[str, None] = {}
    for path, digest in digests.items():
        # If there are checkpoints of the author's code, these two options describe them, not the other models.
        others = any(of_author.values()) and not of_author[path]
        own = replace(options, backbone=None, num_crops=None) if others else options
        detector = load_detector(path, settings.device, settings.max_image_pixels, own)
        if detector.other_crops:
            other_crops[f"{detector.name}: {detector.other_crops}"] = None
        values = _score_or_read(preset, detector, digest, paths, perturbations)
        unreadable |= {image: problem for (image, _), (_, _, problem) in values.items() if problem}
        scored.append((detector.name, detector.about.get("seed", "unknown"), detector.calibration, values))
    readable = np.array([path not in unreadable for path in paths], bool)
    if len(set(labels[readable])) < classes:
        missing = CLASSES[next(label for label in range(len(CLASSES)) if label not in labels[readable])]
        raise UserError(f"no {missing} image of {root} can be decoded: set another --data-root")
    models: dict[str, list[ScoredModel]] = {}
    for model, seed, calibration, values in scored:
        probabilities = {
            (which, name): np.array([values[path, name][column] for path in paths if path not in unreadable])
            for column, which in enumerate(("calibrated", "raw"))
            for name in perturbations
        }
        models.setdefault(model, []).append(ScoredModel(seed, calibration, probabilities))
    sources, groups, kind = sources_and_groups(settings, images, data.images)
    warnings = _warn_of_training_images(settings, abouts, len(seen), bool(left_out))
    if other_crops:
        warnings.append(f"Other crops than those of training and calibration. {'; '.join(other_crops)}.")
    columns = (labels[readable], sources[readable], groups[readable])
    return ScoredData(root.resolve(), data_list, *columns, kind, models, unreadable, warnings)


def sources_and_groups(
    settings: Settings, images: Sequence[ImageRecord], every: Sequence[ImageRecord]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Source and group of each image, as `ScoredData` has them, and what the groups are.

    Sources are those of the images, unless `group_by` names a CSV. Groups are those of `group_by`; without it they are
    pairs, if `every` image of the data root has one namesake, in the other class. Raises UserError as `groups_of` does.
    """
    group_by, paths, given = settings.group_by, [image.path for image in images], [image.source for image in images]
    groups = groups_of(paths, "folder" if group_by in ("none", "stem") else group_by, given)  # pairs are no sources
    sources = np.array(["" if group == comparable(path) else group for path, group in zip(paths, groups, strict=True)])
    if group_by != "none":
        return sources, np.array(groups_of(paths, group_by, given)), f"groups ({group_by})"
    stems, every_stem = groups_of(paths, "stem"), groups_of([image.path for image in every], "stem")
    count = Counter((stem, image.label) for stem, image in zip(every_stem, every, strict=True))
    paired = all(count[stem, label] == 1 for stem in stems for label in (0, 1)) and len(set(stems)) < len(stems)
    kind = "pairs" if 2 * len(set(stems)) == len(stems) else "pairs and single images"
    return (sources, np.array(stems), kind) if paired else (sources, np.array(paths), "images")


def _identify(weights: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, dict[str, Any]]]:
    """SHA-256 and metadata of each weights file; refuses one that would be counted as two seeds."""
    digests: dict[Path, str] = {}
    abouts: dict[Path, dict[str, Any]] = {}
    first: dict[object, Path] = {}
    for path in weights:
        about = abouts[path] = {} if written_by_torch(path) else read_about(path)
        digests[path] = sha256_of(path)
        name_and_seed = about.get("experiment", {}).get("name"), about.get("seed")
        for key in (digests[path], *([] if None in name_and_seed else [name_and_seed])):
            if first.setdefault(key, path) is not path:
                raise UserError(f"{first[key]} and {path} are the same model and seed: name each once")
    return digests, abouts


def _find_trained_on(root: Path, paths: Sequence[str], abouts: Iterable[Mapping[str, Any]]) -> Set[str]:
    """The images that one of the models was trained or validated on, by content, according to its metadata."""
    lists = [about["trained_on"] for about in abouts if isinstance(about.get("trained_on"), list)]
    known = {str(one) for of_model in lists for one in of_model}
    sizes = {one.partition("-")[0] for one in known}

    def is_known(path: Path) -> bool:
        with suppress(OSError):
            size = path.stat().st_size
            return str(size) in sizes and path.is_file() and identity(size, sha256_of(path)) in known
        return False

    return {path for path in paths if is_known(root / path)}


def _warn_of_training_images(
    settings: Settings, abouts: Mapping[Path, Mapping[str, Any]], seen: int, left_out: bool
) -> list[str]:
    """Sentences on the images that a model was trained on, or may have been."""
    notes = []
    if seen and left_out:
        notes.append(f"Left out, since a model was trained or validated on them (--all-images keeps them): {seen:,}.")
    elif seen:
        notes.append(f"A model was trained or validated on {seen:,} of these images: nothing follows for others.")
    for path, about in abouts.items():
        root = about.get("settings", {}).get("data_root")
        if "trained_on" not in about and root and Path(root).absolute() == settings.data_root.absolute():
            notes.append(f"{path} was trained on images of this folder and does not say on which.")
    return notes


def _score_or_read(
    preset: Preset, detector: Detector, weights_digest: str, paths: Sequence[str], perturbations: Sequence[str]
) -> dict[tuple[str, str], Scores]:
    """(path, perturbation) -> the detector's scores; only those that are not stored are computed."""
    root, folder = preset.settings.data_root.resolve(), preset_folder(preset) / "scores"
    key = json.dumps([str(root), weights_digest, *detector.depends_on()])
    file = folder / f"{detector.name}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.csv"
    states = {path: stat_of(root / path) for path in paths}
    stamps = {path: (str(s.st_size), str(s.st_mtime_ns)) if s else ("", "") for path, s in states.items()}
    with locked_folder(folder):
        known = _read(file)
        missing = [path for path in paths if not all((path, kind, *stamps[path]) in known for kind in perturbations)]
        if known:
            print(f"{len(known):,} scores are in {file} (commit {git_commit()}) and are kept: delete it to start over")
        images = [root / path for path in missing]
        predictions = detector.predict_all(images, preset.settings.num_workers, perturbations)
        # Rewritten without a row that a kill cut short.
        write_csv(file, COLUMNS, [[*row, *values] for row, values in known.items()])
        with (
            open(file, "a", encoding="utf-8", errors="surrogateescape", newline="") as output,
            tqdm(total=len(missing), desc=file.stem, unit=" images", disable=None) as bar,
        ):
            for path in missing:
                rows = {(path, kind, *stamps[path]): _scores_of(next(predictions)) for kind in perturbations}
                output.write("".join(csv_line([*row, *values]) + "\n" for row, values in rows.items()))
                output.flush()
                known |= rows
                bar.update()
    return {(path, kind): known[path, kind, *stamps[path]] for path in paths for kind in perturbations}


def _scores_of(found: Outcome) -> Scores:
    if isinstance(found, UnreadableImage):
        return float("nan"), float("nan"), str(found)
    return found.probability_fake, found.raw_probability_fake, ""


def _read(file: Path) -> dict[Key, Scores]:
    """The stored scores, without rows that a kill cut short, and without unreadable images, which are tried again."""
    if not file.exists():
        return {}
    with reading(file):
        rows = [[row[column] for column in COLUMNS] for row in read_csv(file) if row["problem"] == ""]
        return {tuple(row[:4]): (float(row[4]), float(row[5]), row[6]) for row in rows}
