"""Runs and Optuna studies -> the tables of test metrics, of GLASS against standard, of hyperparameters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

import numpy as np
from optuna.trial import TrialState
from scipy import stats

from config import GlassExperiment, Preset, StandardExperiment
from model_training.read_results import CALIBRATED_METRICS, METRICS, NAN, Run, TuningStudy, percents
from model_training.tables import Row, Table, interval_of, listed, mean_and_std_of, note_of_values, value_of
from utils import first_difference

COMPARED_METRICS = ("accuracy", "auc_score", "f1_score", "ece")

# What an experiment sets for itself, each name once: here a GLASS model and its standard model are meant to differ.
HYPERPARAMETERS = [
    name
    for name in dict.fromkeys(field.name for field in (*fields(StandardExperiment), *fields(GlassExperiment)))
    if name not in ("name", "backbone")
]


# --------------------------------------------------------------------------------------------- test metrics
def table_of_test_metrics(runs: Mapping[str, Sequence[Run]], expected_seeds: Sequence[int]) -> Table:
    """A row an experiment: each metric over its finished seeds."""
    rows, notes = [], ["F1, precision and recall are weighted by class size."]
    for name, of_name in runs.items():
        finished = [run for run in of_name if run.test]
        row: Row = {"model": name, "n": len(finished), "seeds": " ".join(str(run.seed) for run in finished)}
        for metric, heading in METRICS.items():
            values = percents(finished, metric)
            mean = std = NAN if finished else None
            if values:
                mean = float(np.mean(values))
            if len(values) > 1:
                std = float(np.std(values, ddof=1))
            row |= {f"{metric}_percent_mean": mean, f"{metric}_percent_std": std}
            undefined = [run.seed for run in finished if np.isnan(run.test[metric])]
            if undefined:
                notes.append(f"{name}: {heading} is not defined for seed {listed(undefined)} and left out of its mean.")
        row["missing"] = _missing_seeds(of_name, expected_seeds)
        rows.append(row)

    all_finished = [(name, run) for name, of_name in runs.items() for run in of_name if run.test]
    for label, fact in (
        ("Data set fingerprint", "dataset_fingerprint"),
        ("Commit", "commit"),
        ("Versions", "versions"),
        ("Hardware", "hardware"),
    ):
        notes += note_of_values(label, [(name, run.facts.get(fact)) for name, run in all_finished])
    columns = {"Model": value_of("model"), "n": value_of("n")}
    for metric, heading in METRICS.items():
        columns[heading] = mean_and_std_of(f"{metric}_percent")
    title = "Test metrics in percent, mean ± sample standard deviation over n seeds"
    return Table("test_metrics", title, rows, columns, notes)


def table_of_calibrated_metrics(runs: Mapping[str, Sequence[Run]]) -> Table:
    """A row an experiment that was calibrated: each metric over its seeds."""
    rows = []
    for name, of_name in runs.items():
        calibrated = [run for run in of_name if run.calibrated]
        if not calibrated:
            continue
        row: Row = {"model": name, "n": len(calibrated), "missing": ""}
        for metric in CALIBRATED_METRICS:
            scale = 1 if metric == "nll" else 100
            values = [scale * run.calibrated[metric] for run in calibrated]
            row[f"{metric}_mean"] = float(np.mean(values))
            row[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else NAN
        rows.append(row)
    columns = {"Model": value_of("model"), "n": value_of("n")}
    columns |= {heading: mean_and_std_of(metric) for metric, heading in CALIBRATED_METRICS.items()}
    notes = [
        "In percent, but the negative log-likelihood (nats); fake is the positive class. Probabilities are calibrated, "
        "and the thresholds chosen, on the images that chose the checkpoint; accuracy, balanced accuracy and F1 are at "
        "the threshold that was the best for balanced accuracy there.",
    ]
    title = "Calibrated test metrics, mean ± sample standard deviation over n seeds"
    return Table("calibrated_metrics", title, rows, columns, notes)


def _missing_seeds(runs: Sequence[Run], expected: Sequence[int]) -> str:
    begun = [run.seed for run in runs]
    unfinished = [run.seed for run in runs if not run.test]
    absent = [seed for seed in expected if seed not in begun]
    parts = []
    if unfinished:
        parts.append(f"seed {listed(unfinished)} not finished")
    if absent:
        parts.append(f"seed {listed(absent)} not run")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------- GLASS against standard
def table_of_differences(runs: Mapping[str, Sequence[Run]]) -> Table:
    """A row for each GLASS experiment whose standard one is there: glass_mine minus standard_mine, seed by seed."""
    rows, notes = [], ["Over the seeds that both models have; Student's t interval of the paired differences."]
    for glass in runs:
        standard = glass.replace("glass_", "standard_", 1)
        if standard == glass or standard not in runs:
            continue
        glass_runs = {run.seed: run for run in runs[glass] if run.test}
        standard_runs = {run.seed: run for run in runs[standard] if run.test}
        seeds = sorted(glass_runs.keys() & standard_runs.keys())
        missing = ""
        if not seeds:
            missing = f"no seed in common with {standard}"
        elif len(seeds) == 1:
            missing = f"one seed in common with {standard}"
        if seeds:
            one, other = glass_runs[seeds[0]].facts, standard_runs[seeds[0]].facts
            difference = first_difference(one, other, ignore=("seed", "name", *HYPERPARAMETERS))
            if one["dataset_fingerprint"] != other["dataset_fingerprint"]:
                seeds, missing = [], f"{standard} was trained on other data"
            elif difference:
                notes.append(f"{glass} and {standard} were not trained alike ({difference}).")

        row: Row = {"model": glass, "standard": standard, "n": len(seeds)}
        for metric in COMPARED_METRICS:
            points = [100 * (glass_runs[seed].test[metric] - standard_runs[seed].test[metric]) for seed in seeds]
            mean, low, high = _paired_interval(points)
            row |= {f"{metric}_points": mean, f"{metric}_points_low": low, f"{metric}_points_high": high}
        row["missing"] = missing
        rows.append(row)

    columns = {"Model": value_of("model"), "minus": value_of("standard"), "n": value_of("n")}
    for metric in COMPARED_METRICS:
        columns[METRICS[metric]] = interval_of(f"{metric}_points")
    title = "GLASS minus standard in percentage points, with 95% intervals over n paired seeds"
    return Table("differences", title, rows, columns, notes)


def _paired_interval(differences: Sequence[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """Mean of the differences, and both ends of its 95% t interval; NaN where they are not defined."""
    if not differences:
        return None, None, None
    defined = [difference for difference in differences if not np.isnan(difference)]
    n, mean, half = len(defined), NAN, NAN
    if n > 0:
        mean = float(np.mean(defined))
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * np.std(defined, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


# --------------------------------------------------------------------------------------------------- tuning
def table_of_hyperparameters(preset: Preset, studies: Mapping[str, TuningStudy | None]) -> Table:
    """A row a study: its trials, and the best one's values; below, these as lines of config.py."""
    rows, code = [], []
    for name, study in studies.items():
        row: Row = {"model": name}
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            row[f"trials_{state.name.lower()}"] = len(study.trials_in(state)) if study else None
        best = study.best if study else None
        row["best_trial"] = best.number if best else None
        row["valid_accuracy_percent"] = 100 * best.value if best else None
        for key in HYPERPARAMETERS:
            row[key] = best.params.get(key, NAN) if best else None
        row["missing"] = _missing_trials(preset, name, study)
        rows.append(row)
        if best:
            code.append(_line_of_config(preset, name, study))

    columns = {
        "Model": value_of("model"),
        "Complete": value_of("trials_complete"),
        "Pruned": value_of("trials_pruned"),
        "Failed": value_of("trials_fail"),
        "Best trial": value_of("best_trial"),
        "Validation accuracy (%)": value_of("valid_accuracy_percent", ".2f"),
    }
    for key in HYPERPARAMETERS:
        columns[key] = value_of(key, ".4g")
    title = "Best hyperparameters of the studies, and their validation accuracy"
    return Table("best_hyperparameters", title, rows, columns, code=code)


def _missing_trials(preset: Preset, name: str, study: TuningStudy | None) -> str:
    if not study:
        return "no study"
    if not study.best:
        return "no complete trial"
    expected = preset.tuning.standard_trials if name.startswith("standard_") else preset.tuning.glass_trials
    finished = sum(trial.state.is_finished() for trial in study.trials)
    return f"{expected - finished} of {expected} trials" if finished < expected else ""


def _line_of_config(preset: Preset, name: str, study: TuningStudy) -> str:
    """The experiment with the best trial's values, to paste into config.py; the others are as in the study's run."""
    known = {experiment.name: asdict(experiment) for experiment in preset.experiments}
    values = {**known.get(name, {}), **study.settings, **study.best.params, "name": name}
    kind = StandardExperiment if "lr" in values else GlassExperiment
    given = [f"{field.name}={json.dumps(values[field.name])}" for field in fields(kind) if field.name in values]
    return f"{kind.__name__}({', '.join(given)}),"
