"""Probabilities of fake and labels -> the usual metrics of detectors, with bootstrap intervals; no torch.

Fake is the positive class. The paper's own test metrics, which differ (its F1 is weighted over both classes, for
example), are in training.metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from training.metrics import ECE_BINS, Metric, bins_of

RESAMPLES = 1000
SOURCE_IMAGES = 5  # sources with fewer images are not compared
MOST_SOURCES = 40  # that are compared: all pairs of them, a thousand times
_CHUNK = 100  # resamples at a time, so that memory does not grow with their number


def detection_metrics(fake: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The metrics of DETECTION_METRICS, as fractions (nll in nats); NaN for those that need a class that is missing.

    Args:
        fake: (N,), probability of fake.
        labels: (N,), 0 fake, 1 real.
        threshold: an image with at least this probability is called fake.
    """
    counts = _Counts(fake, labels, threshold, np.ones((1, len(labels))))
    return {name: float(metric.compute(counts)[0]) for name, metric in DETECTION_METRICS.items()}


def bootstrap_intervals(
    fakes: Sequence[np.ndarray],
    labels: np.ndarray,
    thresholds: Sequence[float],
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the mean of `detection_metrics` over models, images resampled within each class.

    Args:
        fakes: for each model (the seeds of one experiment, say) its probabilities of fake for the same images.
        labels: (N,), 0 fake, 1 real.
        thresholds: for each model.
        groups: of each image, such as its pair or source. Images of a group are not independent: whole groups are
            resampled, separately those of fake images only, of real ones only, and of both. If all images of a class
            are in one group, such as one generator's, they are resampled one by one.
    """
    drawn = _resampled(fakes, labels, thresholds, groups, resamples, seed)
    return {name: _interval(values.mean(axis=1)) for name, values in drawn.items()}


def paired_differences(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    labels: np.ndarray,
    thresholds: tuple[Sequence[float], Sequence[float]],
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Mean of `detection_metrics` over the models of `second` minus that over the models of `first`, with the ends of
    its 95% percentile interval. Both get the same resamples, so that images that are hard for both cancel out.

    The interval is over images, for these models; it does not include differences between seeds.

    Args:
        first, second: as `fakes` of `bootstrap_intervals`, on the same images, each with any number of models.
        thresholds: for each model of `first`, and of `second`.
        labels, groups: as for `bootstrap_intervals`.
    """
    models, at = [*first, *second], [*thresholds[0], *thresholds[1]]
    values = [detection_metrics(fake, labels, threshold) for fake, threshold in zip(models, at, strict=True)]
    drawn = _resampled(models, labels, at, groups, resamples, seed)

    def difference(by_model: np.ndarray) -> np.ndarray:
        return by_model[..., len(first) :].mean(axis=-1) - by_model[..., : len(first)].mean(axis=-1)

    found = {name: difference(np.array([each[name] for each in values])) for name in DETECTION_METRICS}
    return {name: (float(value), *_interval(difference(drawn[name]))) for name, value in found.items()}


def _resampled(
    fakes: Sequence[np.ndarray],
    labels: np.ndarray,
    thresholds: Sequence[float],
    groups: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Each metric (R, models) of each model in each resample; all models get the same resamples."""
    _, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    for members in (np.flatnonzero(labels == label) for label in (0, 1)):
        if len(set(group[members])) == 1:
            group[members] = group.max() + 1 + np.arange(len(members))
    classes = sum((label + 1) * (np.bincount(group, labels == label) > 0) for label in (0, 1))  # 1, 2, or 3 for both
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in DETECTION_METRICS}
    for start in range(0, resamples, _CHUNK):
        weights = np.zeros((min(_CHUNK, resamples - start), len(classes)))
        for kind in (1, 2, 3):
            chosen = np.flatnonzero(classes == kind)
            if n := len(chosen):
                weights[:, chosen] = generator.multinomial(n, np.full(n, 1 / n), len(weights))
        by_model = [_Counts(fake, labels, at, weights[:, group]) for fake, at in zip(fakes, thresholds, strict=True)]
        for name, metric in DETECTION_METRICS.items():
            drawn[name].append(np.stack([metric.compute(counts) for counts in by_model], axis=1))
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


@dataclass(frozen=True)
class SourcesApart:
    """What `sources_apart` found; AUCs are fractions.

    Attributes:
        names, images: the sources that were compared, and how many images they have together.
        aucs: for each model, the mean over all pairs of sources.
        chance: 95% of the means over models are below it if sources are shuffled.
        pair, pair_auc: the two sources that are told apart best, and their AUC, mean over models.
    """

    names: tuple[str, ...]
    images: int
    aucs: np.ndarray
    chance: float
    pair: tuple[str, str]
    pair_auc: float


def sources_apart(
    fakes: Sequence[np.ndarray],
    sources: np.ndarray,
    groups: np.ndarray,
    permutations: int = RESAMPLES,
    seed: int = 0,
) -> SourcesApart | None:
    """How well a score tells sources of real images apart, which a detector of fakes should not: AUC near one half.

    The AUC between each two sources with at least SOURCE_IMAGES images is folded, since neither is the positive class:
    the larger of AUC and 1 - AUC. Then the mean over all pairs is taken (Hand and Till, Machine Learning 45, 2001).
    Folded AUCs of few images are above one half by chance: `chance` is the 95% quantile of the same mean with sources
    permuted among the groups of images, or among the images where no source has two groups. Near copies that are not
    grouped exceed it easily. None for fewer than two sources.

    Args:
        fakes: for each model its probabilities of fake for the same N images, all real.
        sources: (N,), names; images without one ("") are left out, and only the MOST_SOURCES largest sources count.
        groups: (N,), as for `bootstrap_intervals`.
    """
    every, counts = np.unique(sources, return_counts=True)
    enough = np.flatnonzero((counts >= SOURCE_IMAGES) & (every != ""))
    names = np.sort(every[enough[np.argsort(-counts[enough], kind="stable")][:MOST_SOURCES]])
    if len(names) < 2:
        return None
    chosen, ranked = np.isin(sources, names), []
    source = np.searchsorted(names, sources[chosen])
    _, one_of, group = np.unique(groups[chosen], return_index=True, return_inverse=True)
    if len(one_of) <= len(names):
        one_of = group = np.arange(len(source))
    upper = np.triu_indices(len(names), 1)
    for fake in fakes:
        order = np.argsort(fake[chosen])
        scores = fake[chosen][order]
        ranked.append((order, *(np.searchsorted(scores, scores, side) for side in ("left", "right"))))

    def folded(source: np.ndarray) -> np.ndarray:
        """AUC of each model and pair of sources: (models, pairs)."""
        found, pairs = [], np.outer(*2 * (np.bincount(source),))
        for order, below, not_above in ranked:
            ones = np.eye(len(names))[source[order]]  # (images, sources), lowest score first
            counted = np.vstack([np.zeros(len(names)), np.cumsum(ones, axis=0)])
            auc = ones.T @ (counted[below] + counted[not_above]) / 2 / pairs  # a tie counts half
            found.append(np.maximum(auc, auc.T)[upper])
        return np.array(found)

    generator, aucs = np.random.default_rng(seed), folded(source)
    by_chance = [folded(generator.permutation(source[one_of])[group]).mean() for _ in range(permutations)]
    most = aucs.mean(axis=0).argmax()
    return SourcesApart(
        names=tuple(names.tolist()),
        images=len(source),
        aucs=aucs.mean(axis=1),
        chance=float(np.quantile(by_chance, 0.95)),
        pair=tuple(str(names[index[most]]) for index in upper),
        pair_auc=float(aucs[:, most].mean()),
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    return tuple(np.quantile(values, (0.025, 0.975)).tolist())


class _Counts:
    """Images counted by class and call, in R resamples.

    Attributes:
        fake, is_fake: (N,), probability and label of each image, highest probability first.
        weights: (R, N), how often each image counts.
        fakes, reals: (R,), images of each class.
        tp, fp: (R,), true and false positives at the threshold.
        tps, fps: (R, T), the same at each distinct probability as threshold, in falling order.
        new_tps, new_fps: (R, T), their increase since the previous threshold.
    """

    def __init__(self, fake: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray) -> None:
        order = np.argsort(-fake, kind="stable")
        self.fake, self.is_fake, self.weights = fake[order], labels[order] == 0, weights[:, order]
        self.fakes, self.reals = self.weights[:, self.is_fake].sum(1), self.weights[:, ~self.is_fake].sum(1)
        last_of_ties = np.flatnonzero(np.append(self.fake[1:] != self.fake[:-1], True))  # an ROC has no point in a tie
        by_class = self.weights * self.is_fake, self.weights * ~self.is_fake
        self.tp, self.fp = (counts @ (self.fake >= threshold) for counts in by_class)
        self.tps, self.fps = (np.cumsum(counts, axis=1)[:, last_of_ties] for counts in by_class)
        self.new_tps, self.new_fps = (np.diff(counts, axis=1, prepend=0) for counts in (self.tps, self.fps))


def _tpr_at(fpr: float, c: _Counts) -> np.ndarray:
    """The highest true positive rate with at most this false positive rate, without interpolation."""
    allowed = c.fps <= fpr * c.reals[:, None] + 1e-9
    return np.where(c.reals > 0, _ratio(np.where(allowed, c.tps, 0).max(1), c.fakes), np.nan)


def _ece(c: _Counts) -> np.ndarray:
    confidences, correct = np.maximum(c.fake, 1 - c.fake), (c.fake >= 0.5) == c.is_fake
    gaps = (c.weights * (correct - confidences)) @ np.eye(ECE_BINS)[bins_of(confidences)]
    return _ratio(np.abs(gaps).sum(1), c.fakes + c.reals)


def _nll(c: _Counts) -> np.ndarray:
    likelihoods = np.where(c.is_fake, c.fake, 1 - c.fake).clip(np.finfo(float).tiny)
    return _ratio(-(c.weights @ np.log(likelihoods)), c.fakes + c.reals)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """The quotient; `otherwise` where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), float(otherwise)), where=denominator > 0)


DETECTION_METRICS = {  # computed from `_Counts`, for each resample (R,)
    "accuracy": Metric("accuracy", lambda c: _ratio(c.tp + c.reals - c.fp, c.fakes + c.reals)),
    "balanced_accuracy": Metric(
        "balanced accuracy", lambda c: (_ratio(c.tp, c.fakes) + (1 - _ratio(c.fp, c.reals))) / 2
    ),
    "auc": Metric("AUC", lambda c: _ratio((c.new_fps * (c.tps - c.new_tps / 2)).sum(1), c.fakes * c.reals)),
    "average_precision": Metric(
        "average precision", lambda c: _ratio((c.new_tps * _ratio(c.tps, c.tps + c.fps, 0)).sum(1), c.fakes)
    ),
    "f1": Metric("F1", lambda c: np.where(c.fakes > 0, _ratio(2 * c.tp, c.tp + c.fp + c.fakes), np.nan)),
    "tpr_at_1_fpr": Metric("TPR at 1% FPR", partial(_tpr_at, 0.01)),
    "tpr_at_5_fpr": Metric("TPR at 5% FPR", partial(_tpr_at, 0.05)),
    "ece": Metric("ECE", _ece),
    "nll": Metric("negative log-likelihood", _nll, unit="nats", high=float("inf")),
}
CALIBRATED_METRICS = DETECTION_METRICS | {  # `test_calibrated` of metrics.json; `Calibration.metrics` has these four
    "fpr_at_1_threshold": Metric("FPR at the 1% threshold"),
    "fpr_at_5_threshold": Metric("FPR at the 5% threshold"),
    "inconclusive": Metric("inconclusive"),
    "conclusive_accuracy": Metric("accuracy of the others"),
}
