"""What trained models say of a labelled data set, kept in files, so that nothing is computed twice.

`results/<preset>/scores/<model>_<key>.csv` has a row for each image and perturbation, written as it is computed. The
key is of all that the numbers depend on but the images: data root, weights, draws, precision, code and libraries. An
image whose size or time of modification has changed is computed anew.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from config import Preset
from data.groups import groups_of
from data.images import UnreadableImage
from data.index import list_images, read_list
from data.perturbations import perturbation
from model_training.detector import Detector, Prediction, load_detector
from training.calibration import Calibration
from training.checkpoints import read_about
from utils import (
    UserError,
    code_version,
    csv_line,
    library_versions,
    preset_folder,
    read_csv,
    reading,
    sha256_of,
    sole_process,
    stat_of,
    write_csv,
)

COLUMNS = ("path", "perturbation", "bytes", "mtime_ns", "probability_fake", "raw_probability_fake", "problem")
Key = tuple[str, str, str, str]  # path, perturbation, bytes, mtime_ns
Values = tuple[float, float, str]  # calibrated and raw probability of fake, problem


@dataclass(frozen=True)
class LabelledImages:
    """Images of a folder with fake/ and real/ in it.

    `labels` (N,) is 0 fake, 1 real; `sources` is the generator or origin of each image, "" where it has none.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    sources: list[str]

    def only(self, chosen: np.ndarray) -> "LabelledImages":
        """The images where `chosen` (N,) is true."""
        rows = np.flatnonzero(chosen)
        return LabelledImages(
            self.root, [self.paths[row] for row in rows], self.labels[rows], [self.sources[row] for row in rows]
        )


def labelled_images(preset: Preset) -> LabelledImages:
    """The images of the preset's data root, or those that its data_list names.

    Sources are the folders below fake/ and real/, unless `group_by` names a CSV.

    Raises:
        UserError: no such folders, or a class without an image.
    """
    settings = preset.settings
    listed = list_images(settings.data_root)
    if settings.data_list:
        wanted = read_list(settings.data_list, settings.data_root, [path for path, _ in listed])
        listed = [(path, label) for path, label in listed if path in wanted]
    paths, labels = [path for path, _ in listed], np.array([label for _, label in listed])
    if len(set(labels.tolist())) < 2:
        raise UserError(f"{settings.data_list or settings.data_root} has images of one class only: both are needed")
    kind = "folder" if settings.group_by in ("none", "stem") else settings.group_by  # pairs are no sources
    groups = groups_of(paths, kind)
    return LabelledImages(settings.data_root, paths, labels, ["" if group in paths else group for group in groups])


@dataclass(frozen=True)
class ScoredModel:
    """What one weights file says of N images.

    `calibrated` and `raw` are the probabilities of fake (N,) under each perturbation.
    """

    name: str
    seed: int
    calibration: Calibration
    calibrated: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]


@dataclass(frozen=True)
class ScoredData:
    """Models and the images that all of them could score; `unreadable` are the others, with the reason."""

    images: LabelledImages
    models: list[ScoredModel]
    unreadable: dict[str, str]

    @property
    def by_name(self) -> dict[str, list[ScoredModel]]:
        """Model -> its seeds."""
        found: dict[str, list[ScoredModel]] = {}
        for model in self.models:
            found.setdefault(model.name, []).append(model)
        return found


def score_data(
    preset: Preset,
    weights: Sequence[Path],
    perturbations: Sequence[str] = ("native",),
    draws: int = 1,
    **how: str | int,
) -> ScoredData:
    """Score the preset's data set with each weights file; what was scored before is not scored again.

    Args:
        how: precision, batch_size and chunk_size of `load_detector`.

    Raises:
        UserError: weights or images that cannot be used, or no readable image of a class.
    """
    for name in perturbations:
        perturbation(name)
    if draws < 1:
        raise UserError(f"--draws {draws}: it must be at least 1")
    images, scored, unreadable = labelled_images(preset), [], {}
    _check_weights(weights)
    for path in weights:
        settings = preset.settings
        detector = load_detector(path, settings.device, max_image_pixels=settings.max_image_pixels, **how)
        _warn_of_training_images(preset, detector, path)
        values = _scores_of(preset, detector, path, images, perturbations, draws)
        by_kind = np.array([[values[name, image][:2] for image in images.paths] for name in perturbations])
        unreadable |= {image: problem for (_, image), (_, _, problem) in values.items() if problem}
        scored.append((detector, by_kind))
    readable = np.array([path not in unreadable for path in images.paths])
    for label, class_name in enumerate(("fake", "real")):
        if not (readable & (images.labels == label)).any():
            raise UserError(f"no image under {images.root / class_name} can be read: mend them, or set --data-root")
    models = []
    for detector, by_kind in scored:
        calibrated, raw = (
            {name: by_kind[row, readable, column] for row, name in enumerate(perturbations)} for column in (0, 1)
        )
        models.append(
            ScoredModel(detector.name, int(detector.about.get("seed", 0)), detector.calibration, calibrated, raw)
        )
    return ScoredData(images.only(readable), models, unreadable)


def _check_weights(weights: Sequence[Path]) -> None:
    """Refuse what would count as another seed and is none."""
    seen: dict[object, Path] = {}
    for path in weights:
        about = read_about(path)
        name = (about.get("experiment") or {}).get("name") if isinstance(about.get("experiment"), dict) else None
        for key in (sha256_of(path), (name, about.get("seed"))):
            if key in seen:
                raise UserError(f"{seen[key]} and {path} are the same model and seed: name each once")
            seen[key] = path


def _warn_of_training_images(preset: Preset, detector: Detector, path: Path) -> None:
    trained_on = detector.about["settings"].get("data_root", "")
    if Path(trained_on).absolute() == preset.settings.data_root.absolute() and not preset.settings.data_list:
        print(
            f"{path} was trained on images of this folder: for its test split alone, "
            f"pass --data-list {path.with_name('predictions.csv')}"
        )


def _scores_of(
    preset: Preset,
    detector: Detector,
    weights: Path,
    images: LabelledImages,
    perturbations: Sequence[str],
    draws: int,
) -> dict[tuple[str, str], Values]:
    """(perturbation, path) -> what the detector says."""
    folder = preset_folder(preset) / "scores"
    root = str(images.root.resolve())
    facts = [root, sha256_of(weights), draws, detector.runtime.precision, code_version(), library_versions()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    path = folder / f"{detector.name}_{key}.csv"
    states = {name: stat_of(images.root / name) for name in images.paths}
    stamps = {name: (str(s.st_size), str(s.st_mtime_ns)) if s else ("", "") for name, s in states.items()}
    with sole_process(folder):
        known = _read(path)
        wanted = [
            name for name in images.paths if not all((name, kind, *stamps[name]) in known for kind in perturbations)
        ]
        workers = None if preset.settings.num_workers == "auto" else preset.settings.num_workers
        answers = detector.predict_all([images.root / name for name in wanted], draws, workers, perturbations)
        with (
            _adding_to(path, known) as file,
            tqdm(total=len(wanted), desc=path.stem, unit=" images", disable=None) as bar,
        ):
            for name in wanted:
                rows = {(name, kind, *stamps[name]): _values(next(answers)) for kind in perturbations}
                file.write("".join(csv_line([*row, *values]) + "\n" for row, values in rows.items()))
                file.flush()
                known |= rows
                bar.update()
    return {(kind, name): known[name, kind, *stamps[name]] for kind in perturbations for name in images.paths}


def _values(answer: Prediction | UnreadableImage) -> Values:
    if isinstance(answer, UnreadableImage):
        return float("nan"), float("nan"), str(answer)
    return answer.probability_fake, answer.raw_probability_fake, ""


def _read(path: Path) -> dict[Key, Values]:
    """What was written before; a row that a kill cut short is not there."""
    if not path.exists():
        return {}
    with reading(path):
        rows = [tuple(row.values()) for row in read_csv(path)]
        return {row[:4]: (float(row[4]), float(row[5]), row[6]) for row in rows if None not in row}


@contextmanager
def _adding_to(path: Path, known: dict[Key, Values]) -> Iterator[TextIO]:
    """The file, with what is known in it whole, open for more."""
    write_csv(path, COLUMNS, [[*row, *values] for row, values in known.items()])
    with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file
