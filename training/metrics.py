"""Probabilities and labels -> the paper's test metrics; no torch. SPEC, Experiments 2."""

import numpy as np
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

ECE_BINS = 15


def compute_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The paper's nine metrics, as fractions; NaN where one is not defined.

    Args:
        probabilities: (N, 2), of fake and of real.
        labels: (N,), 0 fake, 1 real.

    Returns:
        accuracy; auc_score, with the probability of real as score (NaN if only one class is there); f1_score,
        precision and recall, weighted by class size; conf_correct, conf_incorrect (NaN if no prediction is of
        that kind) and overall_conf, means of the top probability; ece.
    """
    predictions, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predictions == labels
    precision, recall, f1_score, _ = precision_recall_fscore_support(
        labels, predictions, average="weighted", zero_division=0
    )
    return {
        "accuracy": float(correct.mean()),
        "auc_score": float(roc_auc_score(labels, probabilities[:, 1])) if len(set(labels)) == 2 else float("nan"),
        "f1_score": float(f1_score),
        "precision": float(precision),
        "recall": float(recall),
        "conf_correct": float(confidences[correct].mean()) if correct.any() else float("nan"),
        "conf_incorrect": float(confidences[~correct].mean()) if not correct.all() else float("nan"),
        "overall_conf": float(confidences.mean()),
        "ece": expected_calibration_error(confidences, correct),
    }


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Mean over equal-width bins of |accuracy - confidence|, weighted by the bins' sizes.

    Bins are closed below and open above, but the last one is closed: a confidence of exactly 1 counts.

    Args:
        confidences: (N,), top probability of each prediction.
        correct: (N,), whether it is right.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.minimum(np.searchsorted(edges, confidences, side="right") - 1, bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidences, minlength=bins)  # bin size times (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(confidences))


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least-squares line through points: (intercept, slope, R squared). SPEC, Experiments 3.

    NaN for all three where fewer than two different x are given; R squared is NaN where all y are equal.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(x)) < 2:
        return float("nan"), float("nan"), float("nan")
    slope, intercept = np.polyfit(x, y, 1)
    residual, total = ((y - intercept - slope * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return float(intercept), float(slope), float(1 - residual / total) if total > 0 else float("nan")
