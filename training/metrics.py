"""Probabilities and labels -> the paper's test metrics; no torch. docs/method.md, Experiments 2."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

NAN = float("nan")
ECE_BINS = 15


@dataclass(frozen=True)
class Metric:
    """All that result files and tables need to know about a metric.

    Attributes:
        label: its name within a sentence.
        compute: returns its value, NaN where it is not defined; None if it is computed elsewhere.
        unit: "%" if it is a fraction that is shown in percent.
        low, high: its range.
    """

    label: str
    compute: Callable[..., Any] | None = None
    unit: str = "%"
    low: float = 0.0
    high: float = 1.0

    @property
    def heading(self) -> str:
        """Its name as the heading of a column."""
        return self.label[0].upper() + self.label[1:]

    @property
    def scale(self) -> int:
        """What its value is multiplied by to be shown."""
        return 100 if self.unit == "%" else 1


def in_percent(metrics: Mapping[str, Metric]) -> str:
    """For titles and notes: "in percent", and which of the metrics are not."""
    others = [
        f"{metric.label}{metric.unit and f' ({metric.unit})'}" for metric in metrics.values() if metric.unit != "%"
    ]
    return f"in percent, except for {', '.join(others)}" if others else "in percent"


def compute_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of METRICS, as fractions; NaN where one is not defined.

    Args:
        probabilities: (N, 2), of fake and of real.
        labels: (N,), 0 fake, 1 real.
    """
    return {name: float(metric.compute(probabilities, labels)) for name, metric in METRICS.items()}


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Mean over ECE_BINS equal-width bins of |accuracy - confidence|, weighted by the bins' sizes.

    Bins include their lower edge, the last one its upper edge too: a confidence of exactly 1 counts.

    Args:
        confidences: (N,), top probability of each prediction.
        correct: (N,), whether it is right.
    """
    gaps = np.bincount(bins_of(confidences), weights=correct - confidences)  # bin size times (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(confidences))


def bins_of(probabilities: np.ndarray) -> np.ndarray:
    """The bin of `expected_calibration_error` that each probability is in, from 0."""
    edges = np.linspace(0, 1, ECE_BINS + 1)
    return np.minimum(np.searchsorted(edges, probabilities, side="right") - 1, ECE_BINS - 1)


def _weighted(score: Callable[..., float], p: np.ndarray, labels: np.ndarray) -> float:
    """A score of each class, weighted by class size."""
    return score(labels, p.argmax(axis=1), average="weighted", zero_division=0)


def _confidence(p: np.ndarray, labels: np.ndarray, correct: bool) -> float:
    """Mean of the top probability over the correct predictions, or over the others."""
    among = (p.argmax(axis=1) == labels) == correct
    return p.max(axis=1)[among].mean() if among.any() else NAN


METRICS = {  # by name in `test` of metrics.json; computed from the arguments of `compute_metrics`
    "accuracy": Metric("accuracy", lambda p, labels: (p.argmax(axis=1) == labels).mean()),
    "auc_score": Metric("AUC", lambda p, labels: roc_auc_score(labels, p[:, 1]) if len(set(labels)) == 2 else NAN),
    "f1_score": Metric("F1", partial(_weighted, f1_score)),
    "precision": Metric("precision", partial(_weighted, precision_score)),
    "recall": Metric("recall", partial(_weighted, recall_score)),
    "conf_correct": Metric("confidence, correct", partial(_confidence, correct=True)),
    "conf_incorrect": Metric("confidence, incorrect", partial(_confidence, correct=False)),
    "overall_conf": Metric("confidence, all", lambda p, labels: p.max(axis=1).mean()),
    "ece": Metric("ECE", lambda p, labels: expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == labels)),
}


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least-squares line through points: (intercept, slope, R squared). docs/method.md, Experiments 3.

    NaN for all three where fewer than two different x are given; R squared is NaN where all y are equal.
    """
    if len(set(x)) < 2:
        return NAN, NAN, NAN
    line = stats.linregress(x, y)
    return float(line.intercept), float(line.slope), float(line.rvalue**2)
