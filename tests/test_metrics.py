"""Metrics equal to a reference and to values computed by hand."""

import json
import math

import numpy as np
import pytest

from tests.conftest import FIXTURES
from training.detection_metrics import DETECTION_METRICS, detection_metrics
from training.metrics import METRICS, compute_metrics, expected_calibration_error, fit_line

CASES = json.loads((FIXTURES / "metrics.json").read_text())["cases"]


def rows(*top: tuple[int, float]) -> np.ndarray:
    """(predicted class, confidence) -> probabilities (N, 2)."""
    return np.array([[c, 1 - c] if predicted == 0 else [1 - c, c] for predicted, c in top])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['labels'])} images")
def test_metrics_are_the_reference(case: dict) -> None:
    odds = np.exp(np.array(case["logits"]))
    probabilities, labels = odds / odds.sum(axis=1, keepdims=True), np.array(case["labels"])
    metrics, others = compute_metrics(probabilities, labels), detection_metrics(probabilities[:, 0], labels)
    assert {name: metrics[name] for name in case["expected"]} == pytest.approx(case["expected"], rel=1e-9)
    for table, values in ((METRICS, metrics), (DETECTION_METRICS, others)):
        assert [name for name in table if not table[name].low <= values[name] <= table[name].high] == []


def test_a_confidence_of_exactly_one_counts_in_the_calibration_error() -> None:
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert compute_metrics(rows((0, 1.0), (1, 1.0)), np.array([1, 1]))["ece"] == 0.5


def test_confidences_on_a_bin_edge_belong_to_the_upper_bin() -> None:
    # 0.6 is the edge of bins 9 and 10: with 0.62 its gap cancels, with 0.59 it would not.
    confidences, correct = np.array([9 / 15, 0.62]), np.array([False, True])
    assert expected_calibration_error(confidences, correct) == pytest.approx(abs(1 - 0.6 - 0.62) / 2)


@pytest.mark.filterwarnings("error")
def test_a_class_that_is_never_predicted_scores_zero_precision_without_a_warning() -> None:
    metrics = compute_metrics(rows((1, 0.9), (1, 0.8)), np.array([0, 1]))
    assert metrics["precision"] == 0.25 and metrics["f1_score"] == pytest.approx(1 / 3)


def test_metrics_are_undefined_where_no_image_is_of_their_kind() -> None:
    all_right = compute_metrics(rows((0, 0.9), (1, 0.8)), np.array([0, 1]))
    assert math.isnan(all_right["conf_incorrect"]) and all_right["conf_correct"] == pytest.approx(0.85)
    assert math.isnan(compute_metrics(rows((1, 0.9), (0, 0.8)), np.array([0, 1]))["conf_correct"])
    one_class = compute_metrics(rows((0, 0.9), (1, 0.8)), np.array([0, 0]))
    assert math.isnan(one_class["auc_score"]) and one_class["accuracy"] == 0.5


def test_a_fitted_line_by_hand() -> None:
    assert fit_line([1, 2, 3], [5, 7, 9]) == pytest.approx((3, 2, 1))
    intercept, slope, r_squared = fit_line([0, 1, 2], [0, 0, 3])
    assert (intercept, slope, r_squared) == pytest.approx((-0.5, 1.5, 0.75))
    assert all(map(math.isnan, fit_line([2, 2], [1, 3])))
    assert fit_line([1, 2], [3, 3]) == pytest.approx((3, 0, math.nan), nan_ok=True)
