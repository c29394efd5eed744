"""Calibration of scores: a temperature and thresholds, fitted on the validation split only.

A score s is the logit of fake minus that of real. The probability of fake is 1 / (1 + exp(-s)), the calibrated one
1 / (1 + exp(-s / T)). The temperature T (Guo et al., arXiv 1706.04599) minimises the negative log-likelihood with a
prior on log T around 0: the likelihood alone has no minimum where a small validation split is classified without an
error. T stays 1 unless a likelihood-ratio test rejects that: a few images fit anything.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import chi2

from training.detection_metrics import detection_metrics

PRIOR_DEVIATION = 0.5  # of log T
SIGNIFICANT = float(chi2.isf(0.05, 1))

Verdict = Literal["fake", "real", "inconclusive"]


@dataclass(frozen=True)
class Calibration:
    """Thresholds are on the calibrated probability of fake; an image at a threshold is classified as fake.

    They are fitted on a single draw of each image's crops, as validation makes it; a mean over draws varies less.
    The verdict is inconclusive between `real_below` and `fake_from`, which are equal where the classes hardly overlap.
    """

    temperature: float
    balanced: float  # threshold with the best balanced accuracy
    fpr_1: float  # threshold with at most 1% false positives
    fpr_5: float  # the same with 5%
    real_below: float  # at most a share `band_error` of the fake images is below it
    fake_from: float  # at most a share `band_error` of the real images is above it
    band_error: float
    fake_images: int  # that it was fitted on; 1% of fewer than 100 images is none
    real_images: int

    def __post_init__(self) -> None:
        """Raises ValueError for values from a damaged file."""
        if not (0 < self.temperature < np.inf and 0 <= self.real_below <= self.fake_from and 0 <= self.balanced < 2):
            raise ValueError(f"not a calibration: {self}")

    @property
    def is_rough(self) -> bool:
        """Whether the share `band_error` of a class is less than one image."""
        return min(self.fake_images, self.real_images) * self.band_error < 1

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of fake."""
        return expit(np.asarray(scores, np.float64) / self.temperature)

    def verdict(self, probability: float) -> Verdict:
        """The verdict for an image of this calibrated probability."""
        return "fake" if probability >= self.fake_from else "real" if probability < self.real_below else "inconclusive"

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """`detection_metrics` of calibrated probabilities at the balanced threshold, and how the thresholds perform.

        fpr_at_1_threshold and fpr_at_5_threshold are false positive rates; inconclusive is the share of all images,
        conclusive_accuracy the accuracy of the other verdicts.
        """
        fake, labels = self.probabilities(scores), np.asarray(labels)
        real = fake[labels == 1]
        verdicts = np.array([self.verdict(probability) for probability in fake])
        conclusive = verdicts != "inconclusive"
        right = verdicts[conclusive] == np.array(["fake", "real"])[labels[conclusive]]
        return detection_metrics(fake, labels, self.balanced) | {
            "fpr_at_1_threshold": _share(real >= self.fpr_1),
            "fpr_at_5_threshold": _share(real >= self.fpr_5),
            "inconclusive": _share(~conclusive),
            "conclusive_accuracy": _share(right),
        }


def calibrate(scores: np.ndarray, labels: np.ndarray, band_error: float) -> Calibration | None:
    """Fit temperature and thresholds; None where all validation images are of one class.

    Args:
        scores: (N,), logit of fake minus logit of real.
        labels: (N,), 0 fake, 1 real.
    """
    scores, is_fake = np.asarray(scores, np.float64), np.asarray(labels) == 0
    if is_fake.all() or not is_fake.any():
        return None
    temperature = fit_temperature(scores, is_fake)
    probabilities = expit(scores / temperature)
    fake, real = np.sort(probabilities[is_fake]), np.sort(probabilities[~is_fake])
    fake_from = _threshold_over(real, band_error)
    real_below = max(0.0, 1 - _threshold_over(np.sort(1 - fake), band_error))  # the threshold may be just above 1
    balanced = _balanced_threshold(fake, real)
    if real_below > fake_from:
        real_below = fake_from = min(max(balanced, fake_from), real_below)
    return Calibration(
        temperature, balanced, _threshold_over(real, 0.01), _threshold_over(real, 0.05), real_below, fake_from,
        band_error, len(fake), len(real),
    )  # fmt: skip


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if len(chosen) else float("nan")


def fit_temperature(scores: np.ndarray, is_fake: np.ndarray) -> float:
    """T, between 1/20 and 20; 1 where it does not differ from 1 significantly (likelihood-ratio test, 5%)."""
    margins, bound = np.where(is_fake, scores, -scores), np.log(20)

    def loss(log_temperature: float) -> float:
        return -log_expit(margins / np.exp(log_temperature)).sum()

    fitted = minimize_scalar(
        lambda value: loss(value) + 0.5 * (value / PRIOR_DEVIATION) ** 2,
        bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6},
    ).x  # fmt: skip
    return float(np.exp(fitted)) if 2 * (loss(0) - loss(fitted)) > SIGNIFICANT else 1.0


def _threshold_over(probabilities: np.ndarray, share: float) -> float:
    """A threshold halfway between two of the sorted `probabilities`, with at most this share of them above it."""
    above = int(share * len(probabilities))
    lower, upper = np.append(probabilities, 1.0)[-above - 2 : len(probabilities) + 1 - above]
    return float(max((lower + upper) / 2, np.nextafter(lower, 2)))


def _balanced_threshold(fake: np.ndarray, real: np.ndarray) -> float:
    """The midpoint of neighbouring probabilities with the best balanced accuracy; the one nearest to 1/2 if several."""
    values = np.unique(np.concatenate([[0.0], fake, real, [1.0]]))
    middles = (values[1:] + values[:-1]) / 2
    recall = 1 - np.searchsorted(fake, middles) / len(fake)
    specificity = np.searchsorted(real, middles) / len(real)
    best = middles[np.isclose(recall + specificity, (recall + specificity).max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - 0.5).argmin()])
