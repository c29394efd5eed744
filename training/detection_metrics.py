"""Probabilities of fake and labels -> what detectors are compared by, with bootstrap intervals; no torch.

"Fake" is the positive class: a false alarm is a real image that is called fake. The paper's own test metrics, which
differ (F1 weighted over both classes, for one), are in training.metrics.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from training.metrics import ECE_BINS

DETECTION_METRICS = {  # name -> what tables call it
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "average_precision": "average precision",
    "f1": "F1",
    "tpr_at_1_fpr": "TPR at 1% FPR",
    "tpr_at_5_fpr": "TPR at 5% FPR",
    "ece": "ECE",
    "nll": "negative log-likelihood",
}
RESAMPLES = 1000
_CHUNK = 100  # resamples at a time, so that memory does not grow with their number


def detection_metrics(fake: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The metrics of DETECTION_METRICS, as fractions (nll in nats); NaN for those that need a class that is not there.

    Args:
        fake: (N,), probability of fake.
        labels: (N,), 0 fake, 1 real.
        threshold: an image is called fake from this probability on.
    """
    weighted = _weighted_metrics(fake, labels, threshold, np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in weighted.items()}


def bootstrap_intervals(
    fakes: Sequence[np.ndarray],
    labels: np.ndarray,
    thresholds: Sequence[float],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the mean of `detection_metrics` over models, images drawn anew within each class.

    Args:
        fakes: for each model (the seeds of one experiment, say) its probabilities of fake for the same images.
        thresholds: for each model.
    """
    generator, drawn = np.random.default_rng(seed), []
    for count in _chunks(resamples):
        weights = np.zeros((count, len(labels)))
        for label in (0, 1):
            rows = np.flatnonzero(labels == label)
            if len(rows):
                weights[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), count)
        of_models = [
            _weighted_metrics(fake, labels, threshold, weights)
            for fake, threshold in zip(fakes, thresholds, strict=True)
        ]
        drawn.append({name: np.mean([values[name] for values in of_models], axis=0) for name in DETECTION_METRICS})
    return {
        name: tuple(np.quantile(np.concatenate([part[name] for part in drawn]), (0.025, 0.975)).tolist())
        for name in DETECTION_METRICS
    }


def _chunks(total: int) -> Iterator[int]:
    for begin in range(0, total, _CHUNK):
        yield min(_CHUNK, total - begin)


def _weighted_metrics(
    fake: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric (R,), where image n counts weights[r, n] times."""
    order = np.argsort(-fake, kind="stable")
    fake, is_fake, weights = fake[order], labels[order] == 0, weights[:, order]
    fakes, reals = weights[:, is_fake].sum(1), weights[:, ~is_fake].sum(1)
    last_of_ties = np.flatnonzero(np.append(fake[1:] != fake[:-1], True))  # an ROC has no point within a tie
    hits = np.cumsum(weights * is_fake, axis=1)[:, last_of_ties]  # fake images called fake, threshold by threshold
    alarms = np.cumsum(weights * ~is_fake, axis=1)[:, last_of_ties]  # real images called fake
    new_hits, new_alarms = (np.diff(counts, axis=1, prepend=0) for counts in (hits, alarms))

    called_fake = fake >= threshold
    true_hits, true_alarms = (weights * is_fake) @ called_fake, (weights * ~is_fake) @ called_fake
    recall, specificity = _ratio(true_hits, fakes), 1 - _ratio(true_alarms, reals)
    confidences, correct = np.maximum(fake, 1 - fake), (fake >= 0.5) == is_fake
    bins = np.minimum((confidences * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = (weights * (correct - confidences)) @ np.eye(ECE_BINS)[bins]
    likelihoods = np.where(is_fake, fake, 1 - fake).clip(np.finfo(float).tiny)
    return {
        "accuracy": _ratio(true_hits + reals - true_alarms, fakes + reals),
        "balanced_accuracy": (recall + specificity) / 2,
        "auc": _ratio((new_alarms * (hits - new_hits / 2)).sum(1), fakes * reals),
        "average_precision": _ratio((new_hits * _ratio(hits, hits + alarms, 0)).sum(1), fakes),
        "f1": np.where(fakes > 0, _ratio(2 * true_hits, true_hits + true_alarms + fakes), np.nan),
        "tpr_at_1_fpr": _tpr_at(0.01, hits, alarms, fakes, reals),
        "tpr_at_5_fpr": _tpr_at(0.05, hits, alarms, fakes, reals),
        "ece": _ratio(np.abs(gaps).sum(1), fakes + reals),
        "nll": _ratio(-(weights @ np.log(likelihoods)), fakes + reals),
    }


def _tpr_at(fpr: float, hits: np.ndarray, alarms: np.ndarray, fakes: np.ndarray, reals: np.ndarray) -> np.ndarray:
    """The most fake images found with at most this share of false alarms, without interpolation."""
    allowed = alarms <= fpr * reals[:, None] + 1e-9
    return np.where(reals > 0, _ratio(np.where(allowed, hits, 0).max(1), fakes), np.nan)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Their quotient; `otherwise` where it is not defined."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), float(otherwise)), where=denominator > 0)
