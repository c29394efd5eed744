"""Metrics by reference and by hand."""

import json
import math

import numpy as np
import pytest

from tests.conftest import FIXTURES
from training.metrics import compute_metrics, expected_calibration_error, fit_line

CASES = json.loads((FIXTURES / "metrics.json").read_text())["cases"]


def rows(*top: tuple[int, float]) -> np.ndarray:
    """(predicted class, confidence) -> probabilities (N, 2)."""
    return np.array([[c, 1 - c] if predicted == 0 else [1 - c, c] for predicted, c in top])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['labels'])} images")
def test_metrics_are_the_reference(case: dict) -> None:
    odds = np.exp(np.array(case["logits"]))
    metrics = compute_metrics(odds / odds.sum(axis=1, keepdims=True), np.array(case["labels"]))
    assert metrics == pytest.approx(case["expected"], rel=1e-9)


def test_metrics_by_hand() -> None:
    # Two of fake are right at 0.8 and wrong at 0.6; two of real are right at 0.9 and at 0.7.
    metrics = compute_metrics(rows((0, 0.8), (1, 0.6), (1, 0.9), (1, 0.7)), np.array([0, 0, 1, 1]))
    assert metrics["accuracy"] == metrics["recall"] == 0.75
    assert metrics["precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["f1_score"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["auc_score"] == 1  # 0.9 and 0.7 for real lie above 0.2 and 0.6 for fake
    assert (metrics["conf_correct"], metrics["conf_incorrect"]) == pytest.approx((0.8, 0.6))
    assert metrics["overall_conf"] == pytest.approx(0.75)
    # 15 bins: each confidence is alone in its own.
    assert metrics["ece"] == pytest.approx((0.2 + 0.6 + 0.1 + 0.3) / 4)


def test_a_confidence_of_exactly_one_counts_in_the_calibration_error() -> None:
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert compute_metrics(rows((0, 1.0), (1, 1.0)), np.array([1, 1]))["ece"] == 0.5


def test_confidences_on_a_bin_edge_belong_to_the_upper_bin() -> None:
    # 0.6 is the edge of bins 9 and 10: with 0.62 its gap cancels, with 0.59 it would not.
    confidences, correct = np.array([9 / 15, 0.62]), np.array([False, True])
    assert expected_calibration_error(confidences, correct) == pytest.approx(abs(1 - 0.6 - 0.62) / 2)


def test_a_class_that_is_never_predicted_scores_zero_precision_without_complaint() -> None:
    metrics = compute_metrics(rows((1, 0.9), (1, 0.8)), np.array([0, 1]))
    assert metrics["precision"] == 0.25 and metrics["f1_score"] == pytest.approx(1 / 3)


def test_confidence_of_wrong_predictions_is_undefined_when_there_are_none() -> None:
    metrics = compute_metrics(rows((0, 0.9), (1, 0.8)), np.array([0, 1]))
    assert math.isnan(metrics["conf_incorrect"]) and metrics["conf_correct"] == pytest.approx(0.85)
    assert math.isnan(compute_metrics(rows((1, 0.9), (0, 0.8)), np.array([0, 1]))["conf_correct"])


def test_auc_is_undefined_with_one_class_only() -> None:
    metrics = compute_metrics(rows((0, 0.9), (1, 0.8)), np.array([0, 0]))
    assert math.isnan(metrics["auc_score"]) and metrics["accuracy"] == 0.5


def test_a_fitted_line_by_hand() -> None:
    assert fit_line([1, 2, 3], [5, 7, 9]) == pytest.approx((3, 2, 1))
    intercept, slope, r_squared = fit_line([0, 1, 2], [0, 0, 3])
    assert (intercept, slope, r_squared) == pytest.approx((-0.5, 1.5, 0.75))
    assert all(map(math.isnan, fit_line([2, 2], [1, 3])))
