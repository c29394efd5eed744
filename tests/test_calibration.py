"""Calibration of scores: metrics against scikit-learn's, intervals, temperature, thresholds and verdicts."""

from dataclasses import asdict

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics

from training.calibration import Calibration, calibrate
from training.detection_metrics import bootstrap_intervals, detection_metrics, paired_differences, sources_apart
from training.metrics import compute_metrics


def scored(n: int, seed: int = 0, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels that are calibrated: the score is the log-odds of fake."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, n)
    return random.normal(np.where(labels == 0, apart, -apart), np.sqrt(2 * apart)), labels


@pytest.mark.parametrize("digits", [15, 1])  # without ties, and with many
def test_metrics_are_those_of_scikit_learn(digits: int) -> None:
    scores, labels = scored(400)
    fake = expit(scores).round(digits)
    found, positive = detection_metrics(fake, labels, 0.6), labels == 0
    alarms, hits, _ = metrics.roc_curve(positive, fake, drop_intermediate=False)
    expected = {
        "accuracy": metrics.accuracy_score(positive, fake >= 0.6),
        "balanced_accuracy": metrics.balanced_accuracy_score(positive, fake >= 0.6),
        "auc": metrics.roc_auc_score(positive, fake),
        "average_precision": metrics.average_precision_score(positive, fake),
        "f1": metrics.f1_score(positive, fake >= 0.6),
        "tpr_at_1_fpr": hits[alarms <= 0.01].max(),
        "tpr_at_5_fpr": hits[alarms <= 0.05].max(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    if digits == 15:
        assert found["nll"] == pytest.approx(metrics.log_loss(positive, fake))
        probabilities = np.stack([fake, 1 - fake], axis=1)
        assert found["ece"] == pytest.approx(compute_metrics(probabilities, labels)["ece"])


def test_metrics_that_need_both_classes_are_nan_for_one() -> None:
    found = detection_metrics(np.array([0.2, 0.9]), np.array([1, 1]))
    assert found["accuracy"] == 0.5
    undefined = [name for name, value in found.items() if np.isnan(value)]
    assert undefined == ["balanced_accuracy", "auc", "average_precision", "f1", "tpr_at_1_fpr", "tpr_at_5_fpr"]


def test_intervals_agree_with_a_plain_bootstrap() -> None:
    scores, labels = scored(500)
    fake = expit(scores)
    classes = [np.flatnonzero(labels == label) for label in (0, 1)]
    random, aucs = np.random.default_rng(5), []
    for _ in range(300):
        rows = np.concatenate([random.choice(of_class, len(of_class)) for of_class in classes])
        aucs.append(detection_metrics(fake[rows], labels[rows])["auc"])
    expected = np.quantile(aucs, (0.025, 0.975))
    assert bootstrap_intervals([fake], labels, [0.5])["auc"] == pytest.approx(tuple(expected), abs=0.012)
    both = bootstrap_intervals([fake, fake], labels, [0.5, 0.5])
    assert both["auc"] == bootstrap_intervals([fake], labels, [0.5])["auc"]  # the mean of two equal models


def test_whole_groups_are_resampled() -> None:
    """Ten copies of each image in one group give the interval of one; pairs that share their noise a smaller one."""
    scores, labels = scored(60)
    fake = expit(scores)
    single = bootstrap_intervals([fake], labels, [0.5])["auc"]
    copies = bootstrap_intervals([fake.repeat(10)], labels.repeat(10), [0.5], np.arange(60).repeat(10))["auc"]
    assert copies == pytest.approx(single)
    assert np.ptp(bootstrap_intervals([fake.repeat(10)], labels.repeat(10), [0.5])["auc"]) < 0.5 * np.ptp(single)
    scene = np.random.default_rng(3).normal(0, 3, 100)
    pairs = expit(np.concatenate([scene + 1, scene - 1])), np.repeat([0, 1], 100)
    grouped = bootstrap_intervals([pairs[0]], pairs[1], [0.5], np.tile(np.arange(100), 2))["auc"]
    assert np.ptp(grouped) < 0.5 * np.ptp(bootstrap_intervals([pairs[0]], pairs[1], [0.5])["auc"])


def test_paired_differences_are_those_of_a_plain_bootstrap_of_pairs() -> None:
    """One seed against two, on 40 pairs; the same pairs are drawn for both."""
    random, labels, pairs = np.random.default_rng(7), np.repeat([0, 1], 40), np.tile(np.arange(40), 2)
    scores = random.normal(0, 2, 40)[pairs] + np.where(labels == 0, 0.7, -0.7)  # the same images are hard for all
    one, *two = (expit(scores + random.normal(0, noise, 80)) for noise in (0.6, 0.3, 0.4))
    found = paired_differences([one], two, labels, ([0.5], [0.4, 0.6]), pairs, resamples=200)

    def plain(rows: np.ndarray) -> tuple[float, float]:
        fake = labels[rows] == 0
        aucs = [metrics.roc_auc_score(fake, each[rows]) for each in (one, *two)]
        calls = [
            metrics.balanced_accuracy_score(fake, each[rows] >= at)
            for each, at in zip((one, *two), (0.5, 0.4, 0.6), strict=True)
        ]
        return tuple((each[1] + each[2]) / 2 - each[0] for each in (aucs, calls))

    draws = np.random.default_rng(0)
    counts = [draws.multinomial(40, np.full(40, 1 / 40)) for _ in range(200)]
    drawn = np.array([plain(np.repeat(np.arange(80), count[pairs])) for count in counts])
    for name, value, of_draws in zip(("auc", "balanced_accuracy"), plain(np.arange(80)), drawn.T, strict=True):
        assert found[name] == pytest.approx((value, *np.quantile(of_draws, (0.025, 0.975))))
    alone = bootstrap_intervals(two, labels, [0.4, 0.6], pairs)["auc"]
    assert found["auc"][2] - found["auc"][1] < np.ptp(alone)
    swapped = paired_differences(two, [one], labels, ([0.4, 0.6], [0.5]), pairs, resamples=200)
    assert swapped["nll"] == pytest.approx((-found["nll"][0], -found["nll"][2], -found["nll"][1]))


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4])
@pytest.mark.parametrize("n", [10, 30, 100, 1000])
def test_calibration_does_not_raise_the_calibration_error_with_few_images_and_lowers_it_with_many(
    n: int, factor: float
) -> None:
    """Means over 20 validation sets, on 5,000 other images."""
    scores, labels = scored(5000, seed=1, apart=2)
    raw, errors = detection_metrics(expit(factor * scores), labels)["ece"], []
    for seed in range(20):
        valid_scores, valid_labels = scored(n, 100 + seed, apart=2)
        calibration = calibrate(factor * valid_scores, valid_labels, 0.05)
        errors.append(detection_metrics(calibration.probabilities(factor * scores), labels)["ece"])
    assert np.mean(errors) < raw + 0.01
    assert n < 1000 or np.mean(errors) < 0.02


def test_calibration_lowers_the_calibration_error_on_other_images() -> None:
    calibration = calibrate(4 * scored(500)[0], scored(500)[1], 0.05)
    scores, labels = scored(5000, seed=1)
    raw, calibrated = detection_metrics(expit(4 * scores), labels), calibration.metrics(4 * scores, labels)
    assert raw["ece"] > 0.1 and calibrated["ece"] < 0.03
    assert calibrated["auc"] == pytest.approx(raw["auc"], abs=1e-3)
    assert 0.002 < calibrated["fpr_at_1_threshold"] < 0.03 < calibrated["fpr_at_5_threshold"] < 0.1
    assert calibrated["conclusive_accuracy"] > calibrated["accuracy"] + 0.05


def test_thresholds_keep_their_error_rates_on_the_images_they_were_fitted_on() -> None:
    scores, labels = scored(1000)
    calibration = calibrate(scores, labels, 0.05)
    fake = calibration.probabilities(scores)
    reals, fakes = (labels == 1).sum(), (labels == 0).sum()
    assert (fake[labels == 1] >= calibration.fpr_1).sum() == int(0.01 * reals)
    assert (fake[labels == 1] >= calibration.fpr_5).sum() == int(0.05 * reals)
    assert (fake[labels == 1] >= calibration.fake_from).sum() == int(0.05 * reals)
    assert (fake[labels == 0] < calibration.real_below).sum() == int(0.05 * fakes)
    best = max(metrics.balanced_accuracy_score(labels == 0, fake >= at) for at in np.linspace(0, 1, 501))
    assert detection_metrics(fake, labels, calibration.balanced)["balanced_accuracy"] >= best
    middle = (calibration.real_below + calibration.fake_from) / 2
    verdicts = [calibration.verdict(p) for p in (0.0, calibration.real_below, middle, calibration.fake_from, 1.0)]
    assert verdicts == ["real", "inconclusive", "inconclusive", "fake", "fake"]


def test_separable_classes_have_no_inconclusive_images_and_a_finite_temperature() -> None:
    scores, labels = np.concatenate([np.linspace(2, 3, 20), np.linspace(-3, -2, 20)]), np.repeat([0, 1], 20)
    calibration = calibrate(scores, labels, 0.05)
    assert 0.5 < calibration.temperature < 1.5 and calibration.real_below == calibration.fake_from
    assert calibration.metrics(scores, labels)["conclusive_accuracy"] == 1


def test_probabilities_of_exactly_0_and_1_give_valid_thresholds() -> None:
    scores, labels = np.array([-800, 5, 5, -5, -5, -5], float), np.repeat([0, 1], 3)
    calibration = calibrate(scores, labels, 0.05)
    assert calibration.real_below == 0 and Calibration(**asdict(calibration)) == calibration
    assert calibration.verdict(0.0) != "real"


def test_ties_at_a_threshold_are_not_false_positives() -> None:
    scores, labels = np.array([1.0] * 10 + [1.0] * 10), np.repeat([0, 1], 10)
    calibration = calibrate(scores, labels, 0.1)
    assert (calibration.probabilities(scores[labels == 1]) >= calibration.fpr_5).sum() == 0
    assert calibrate(scores, np.ones(20, int), 0.1) is None


def test_the_chance_level_of_telling_sources_apart_permutes_whole_groups() -> None:
    random = np.random.default_rng(3)
    group = np.repeat(np.arange(12), 4)  # bursts of four near copies
    fakes = [random.uniform(size=12)[group] + random.normal(0, 1e-3, 48) for _ in range(2)]
    sources = np.array(["a", "b", "c"])[group // 4]
    found = sources_apart(fakes, sources, group.astype(str), permutations=200)

    def plain(names: np.ndarray) -> float:
        aucs = [
            [(fake[names == a][:, None] > fake[names == b]).mean() for a, b in ("ab", "ac", "bc")] for fake in fakes
        ]
        return np.maximum(aucs, 1 - np.array(aucs)).mean()

    order, again = np.argsort(np.unique(group.astype(str)).astype(int)), np.random.default_rng(0)
    by_name = np.array(["a", "b", "c"])[np.unique(group.astype(str)).astype(int) // 4]  # of the groups, by their names
    by_chance = [plain(again.permutation(by_name)[order][group]) for _ in range(200)]
    assert found.aucs.mean() == pytest.approx(plain(sources))
    assert found.chance == pytest.approx(np.quantile(by_chance, 0.95))
    assert found.chance > sources_apart(fakes, sources, np.arange(48).astype(str), permutations=200).chance + 0.03
