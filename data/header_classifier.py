"""Can the class be told from headers alone? A cross-validated forest on them, and what it goes by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn import config_context
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.tree import DecisionTreeClassifier

from data.headers import Header
from utils import UserError

FOLDS = 5
TREES = 100
RESAMPLES = 500  # of the bootstrap
FEATURES = (  # of Header, without what repeats another: ending is ending_fits and format, bytes is bits_per_pixel
    *("format", "ending_fits", "width", "height", "aspect", "megapixels", "divisible_by_8", "divisible_by_16"),
    *("divisible_by_64", "mode", "bits_per_pixel", "jpeg_quality", "jpeg_ijg", "subsampling", "progressive"),
    *("icc_profile", "exif", "xmp", "camera", "software", "c2pa", "generator"),
)
YES_OR_NO = ("camera", "software")  # is there one? A camera's own name would only be learnt by heart


FILE_SIZE = "bits_per_pixel"  # the one feature that the pixels have a say in: fine detail takes more bits


@dataclass(frozen=True)
class Feature:
    """What one feature gives away, out of fold."""

    name: str
    auc_alone: float  # of a small tree that sees nothing else; 0.5 or less is nothing
    importance: float  # what the forest's AUC loses when the feature is shuffled among the held-out images


@dataclass(frozen=True)
class Score:
    """An AUC out of fold: 1 tells the class without fail, 0.5 not at all. The interval resamples groups of images."""

    auc: float
    low: float  # of the 95% interval
    high: float


@dataclass(frozen=True)
class HeaderAudit:
    """How well headers tell the class."""

    all: Score
    without_file_size: Score
    fake_scores: np.ndarray  # of each image by all headers, out of fold, 0 to 1
    features: tuple[Feature, ...]  # by importance, the most important first


def header_matrix(headers: Sequence[Header]) -> np.ndarray:
    """`FEATURES` as numbers (images, features): texts are numbered in alphabetical order, NaN is -1."""
    columns = []
    for name in FEATURES:
        values = [getattr(header, name) for header in headers]
        if name in YES_OR_NO:
            values = [bool(value) for value in values]
        if isinstance(values[0], str):
            values = np.unique(values, return_inverse=True)[1]
        columns.append(np.nan_to_num(np.asarray(values, np.float64), nan=-1))
    return np.column_stack(columns)


def audit_headers(matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> HeaderAudit:
    """Cross-validate a random forest on headers.

    The images of a group stay in one fold. Where each image has its like in the other class, as in matched pairs, the
    forest would else learn of the like what is wrong for the image held out, and its AUC fall far below 0.5.

    Args:
        matrix: (images, features), from `header_matrix`.
        labels: 0 fake, 1 real.
        groups: a number for each image.
        seed: of folds, forests and resampling.

    Raises:
        UserError: too few images in a class.
    """
    few = min(len(np.unique(groups[labels == label])) for label in (0, 1))
    if few < FOLDS:
        raise UserError(f"{few} images in the smaller class are too few to cross-validate by: the audit needs {FOLDS}")
    repeats = max(1, min(3, 2000 // len(labels)))  # with few images, the luck of one partition is averaged away
    shape = (len(FEATURES), len(labels))
    forest, sizeless, trees, losses = np.zeros(shape[1]), np.zeros(shape[1]), np.zeros(shape), np.zeros(shape[0])
    for repeat in range(repeats):
        with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time with few images
            scores = _scores_out_of_fold(matrix, labels, groups, seed + repeat)
        forest += scores.forest / repeats
        sizeless += scores.without_file_size / repeats
        trees += scores.alone / repeats
        losses += [(auc(labels, scores.forest) - auc(labels, other)) / repeats for other in scores.shuffled]
    features = [
        Feature(name, auc(labels, scores), float(loss))
        for name, scores, loss in zip(FEATURES, trees, losses, strict=True)
    ]
    features.sort(key=lambda feature: (-feature.importance, -feature.auc_alone))
    by_all, by_others = (_score(labels, scores, groups, seed) for scores in (forest, sizeless))
    return HeaderAudit(by_all, by_others, forest, tuple(features))


def auc(labels: np.ndarray, fake_scores: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Area under the ROC curve of scores that are higher for fake images, label 0.

    As scikit-learn's, without the checks that would take ten times as long as the sum in each bootstrap sample.
    """
    levels = np.unique(fake_scores, return_inverse=True)[1]
    fake, real = (np.bincount(levels, weights * (labels == label)) for label in (0, 1))
    return float(fake @ (real.cumsum() - real / 2) / (fake.sum() * real.sum()))


@dataclass(frozen=True)
class _OutOfFold:
    """Scores of one partition."""

    forest: np.ndarray  # (images)
    without_file_size: np.ndarray  # (images)
    shuffled: np.ndarray  # the forest's, with each feature shuffled: (features, images)
    alone: np.ndarray  # by each feature alone: (features, images)


def _scores_out_of_fold(matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> _OutOfFold:
    images, count = matrix.shape
    rng, others = np.random.default_rng(seed), np.array(FEATURES) != FILE_SIZE
    varying = np.flatnonzero(np.ptp(matrix, axis=0))  # no other can tell anything
    found = _OutOfFold(*(np.full(shape, 0.5) for shape in ((images,), (images,), (count, images), (count, images))))
    for train, held_out in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(matrix, labels, groups):
        versions = np.repeat(matrix[held_out][None], len(varying) + 1, axis=0)
        for version, column in zip(versions, varying, strict=False):  # the last version stays as it is
            rng.shuffle(version[:, column])
        forest = RandomForestClassifier(TREES, min_samples_leaf=3, class_weight="balanced", random_state=seed)
        predicted = _fit_and_score(forest, matrix[train], labels[train], versions.reshape(-1, count))
        *changed, found.forest[held_out] = predicted.reshape(len(versions), -1)
        found.shuffled[:, held_out] = found.forest[held_out]
        for column, scores in zip(varying, changed, strict=True):
            found.shuffled[column, held_out] = scores
            found.alone[column, held_out] = _fit_and_score(
                DecisionTreeClassifier(
                    max_leaf_nodes=16, min_samples_leaf=max(3, len(train) // 200), class_weight="balanced"
                ),
                *(matrix[train, column, None], labels[train], matrix[held_out, column, None]),
            )
        found.without_file_size[held_out] = _fit_and_score(
            forest, matrix[np.ix_(train, others)], labels[train], matrix[np.ix_(held_out, others)]
        )
    return found


def _fit_and_score(model: ClassifierMixin, train: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """How fake the held-out rows look; rounded, so that what is equal but for the last bits ties."""
    return model.fit(train, labels).predict_proba(held_out)[:, 0].round(9)


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
