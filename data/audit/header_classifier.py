"""Do headers alone separate the classes? A cross-validated random forest, and the features that it relies on."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn import config_context
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.tree import DecisionTreeClassifier

from utils import UserError

FOLDS = 5
TREES = 100
RESAMPLES = 500  # of the bootstrap
FEATURES = (  # of `read_header`, without what others imply: ending (ending_fits, format), bytes (bits_per_pixel)
    *("format", "ending_fits", "width", "height", "aspect", "megapixels", "divisible_by_8", "divisible_by_16"),
    *("divisible_by_64", "mode", "bits_per_pixel", "jpeg_quality", "jpeg_ijg", "subsampling", "progressive"),
    *("icc_profile", "exif", "xmp", "camera", "software", "c2pa", "generator"),
)
YES_OR_NO = ("camera", "software")  # used as present or not: the name of a camera would only be memorised
FILE_SIZE = "bits_per_pixel"  # the only feature that depends on the pixels: fine detail takes more bits


@dataclass(frozen=True)
class Score:
    """An AUC out of fold: 1 separates the classes perfectly, 0.5 not at all. The interval resamples groups."""

    auc: float
    low: float  # of the 95% interval
    high: float


@dataclass(frozen=True)
class HeaderAudit:
    """How well headers separate the classes."""

    all: Score
    without_file_size: Score
    fake_scores: np.ndarray  # of each image by all headers, out of fold, 0 to 1
    # A row per feature, the most important first: auc_alone, of a small tree that sees only it, and importance, what
    # the forest's AUC loses when the feature is shuffled among the held-out images.
    features: pd.DataFrame


def header_matrix(table: pd.DataFrame) -> np.ndarray:
    """`FEATURES` as numbers (images, features): texts are numbered in alphabetical order, NaN is -1."""
    columns = table[list(FEATURES)].copy()
    for name in columns:
        if name in YES_OR_NO:
            columns[name] = columns[name] != ""
        elif not pd.api.types.is_numeric_dtype(columns[name]):
            columns[name] = pd.factorize(columns[name], sort=True)[0]
    return columns.to_numpy(np.float64, na_value=-1)


def audit_headers(matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> HeaderAudit:
    """Cross-validate a random forest on headers (images, features), from `header_matrix`; labels are 0 fake, 1 real.

    The images of a group, which have the same number, stay in one fold. If each image has a counterpart in the other
    class, as in matched pairs, the forest would otherwise learn the wrong class from the counterpart of a held-out
    image: an AUC far below 0.5.

    Raises UserError for too few images in a class.
    """
    few = min(len(np.unique(groups[labels == label])) for label in (0, 1))
    if few < FOLDS:
        raise UserError(f"{few} images in the smaller class are too few to cross-validate: the audit needs {FOLDS}")
    repeats = max(1, min(3, 2000 // len(labels)))  # with few images, the mean over several partitions
    partitions, losses = [], []
    for repeat in range(repeats):
        with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time with few images
            forest, sizeless, shuffled, alone = _scores_out_of_fold(matrix, labels, groups, seed + repeat)
        partitions.append(np.vstack([forest, sizeless, alone]) / repeats)
        losses.append([(auc(labels, forest) - auc(labels, other)) / repeats for other in shuffled])
    forest, sizeless, *alone = sum(partitions)
    measured = {"auc_alone": [auc(labels, scores) for scores in alone], "importance": np.sum(losses, axis=0)}
    features = pd.DataFrame(measured, FEATURES).sort_values(["importance", "auc_alone"], ascending=False)
    by_all, by_others = (_score(labels, scores, groups, seed) for scores in (forest, sizeless))
    return HeaderAudit(by_all, by_others, forest, features)


def auc(labels: np.ndarray, fake_scores: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Area under the ROC curve of scores that are higher for fake images, label 0.

    Equal to scikit-learn's, whose checks would take ten times as long as this sum, in each bootstrap sample.
    """
    levels = np.unique(fake_scores, return_inverse=True)[1]
    fake, real = (np.bincount(levels, weights * (labels == label)) for label in (0, 1))
    return float(fake @ (real.cumsum() - real / 2) / (fake.sum() * real.sum()))


def _scores_out_of_fold(
    matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fake scores of each image in one partition: by all features (images), by all but the file size (images), by all
    with each feature shuffled among the held-out images (features, images), and by each alone (features, images).
    """
    images, count = matrix.shape
    rng, others = np.random.default_rng(seed), np.array(FEATURES) != FILE_SIZE
    varying = np.flatnonzero(np.ptp(matrix, axis=0))  # the others separate nothing
    forest_scores, sizeless = np.full((2, images), 0.5)
    shuffled, alone = np.full((2, count, images), 0.5)
    for train, held_out in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(matrix, labels, groups):
        known, classes, unknown = matrix[train], labels[train], matrix[held_out]
        versions = np.repeat(unknown[None], len(varying) + 1, axis=0)
        for version, column in zip(versions, varying, strict=False):  # the last version is not shuffled
            rng.shuffle(version[:, column])
        forest = RandomForestClassifier(TREES, min_samples_leaf=3, class_weight="balanced", random_state=seed)
        scores = _fit_and_score(forest, known, classes, versions.reshape(-1, count)).reshape(len(versions), -1)
        forest_scores[held_out] = shuffled[:, held_out] = scores[-1]
        shuffled[np.ix_(varying, held_out)] = scores[:-1]
        least = max(3, len(train) // 200)
        tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=least, class_weight="balanced")
        for column in varying:
            alone[column, held_out] = _fit_and_score(tree, known[:, [column]], classes, unknown[:, [column]])
        sizeless[held_out] = _fit_and_score(forest, known[:, others], classes, unknown[:, others])
    return forest_scores, sizeless, shuffled, alone


def _fit_and_score(model: ClassifierMixin, known: np.ndarray, labels: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Fake scores of the unknown rows; rounded, so that scores that differ in the last bits only are ties."""
    return model.fit(known, labels).predict_proba(unknown)[:, 0].round(9)


def _score(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, seed: int) -> Score:
    """The AUC, and the middle 95% of it over bootstrap samples of the groups."""
    rng, (names, group) = np.random.default_rng(seed), np.unique(groups, return_inverse=True)
    found = []
    for _ in range(RESAMPLES):
        weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[group]
        if all(weights[labels == label].any() for label in (0, 1)):
            found.append(auc(labels, scores, weights))
    low, high = np.quantile(found, (0.025, 0.975))
    return Score(auc(labels, scores), float(low), float(high))
