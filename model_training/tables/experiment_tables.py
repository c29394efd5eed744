"""Runs and Optuna studies -> the tables of test metrics, of GLASS against standard, of hyperparameters."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

import pandas as pd
from optuna.trial import TrialState
from scipy import stats

from config import GlassExperiment, Preset, StandardExperiment
from model_training.tables.read_results import Run, TuningStudy, Values, provenance_of
from model_training.tables.table import Cell, Row, Table, interval_of, listed, mean_and_std_of, notes_of, value_of
from training.detection_metrics import CALIBRATED_METRICS
from training.metrics import METRICS, NAN, Metric, in_percent
from training.runs import first_difference

COMPARED_METRICS = ("accuracy", "auc_score", "f1_score", "ece")

# The fields of both kinds of experiments; a GLASS model and its standard model may differ in these.
_names = dict.fromkeys(field.name for kind in (StandardExperiment, GlassExperiment) for field in fields(kind))
HYPERPARAMETERS = [name for name in _names if name not in ("name", "backbone")]


# --------------------------------------------------------------------------------------------- test metrics
def table_of_test_metrics(runs: Mapping[str, Sequence[Run]], expected_seeds: Sequence[int]) -> Table:
    """A row an experiment: each metric over its finished seeds."""
    experiments = []
    for name, of_name in runs.items():
        finished = {run.seed: run.test for run in of_name if run.test}
        row: Row = {"model": name, "n": len(finished), "seeds": " ".join(map(str, finished))}
        experiments.append((row, finished, missing_seeds(of_name, expected_seeds)))
    columns, rows, undefined = means(METRICS, experiments, "_percent")
    finished_runs = [(name, run) for name, of_name in runs.items() for run in of_name if run.test]
    about = notes_of((name, provenance_of(run.metadata)) for name, run in finished_runs)
    notes = ["F1, precision and recall are weighted by class size.", *undefined, *about]
    title = f"Test metrics {in_percent(METRICS)}, mean ± sample standard deviation over n seeds"
    return Table("test_metrics", title, rows, columns, notes)


def table_of_calibrated_metrics(runs: Mapping[str, Sequence[Run]]) -> Table:
    """A row an experiment that was calibrated: each metric over its seeds."""
    by_seed = {name: {run.seed: run.calibrated for run in of_name if run.calibrated} for name, of_name in runs.items()}
    experiments = [({"model": name, "n": len(found)}, found, []) for name, found in by_seed.items() if found]
    columns, rows, undefined = means(CALIBRATED_METRICS, experiments)
    note = (
        f"Values are {in_percent(CALIBRATED_METRICS)}; fake is the positive class. Probabilities are "
        "calibrated, and thresholds chosen, on the validation images; accuracy, balanced accuracy and F1 are at the "
        "threshold with the best balanced accuracy there."
    )
    title = "Calibrated test metrics, mean ± sample standard deviation over n seeds"
    return Table("calibrated_metrics", title, rows, columns, [note, *undefined])


def means(
    metrics: Mapping[str, Metric], experiments: Iterable[tuple[Row, Mapping[int, Values], list[str]]], percent: str = ""
) -> tuple[dict[str, Cell], list[Row], list[str]]:
    """Columns and rows of means and standard deviations, and notes on undefined values, which are left out of means.

    A metric that one of the seeds lacks has no mean: it would be over fewer seeds than the row says.

    Args:
        experiments: for each row its first columns, the values by seed, and sentences on what is missing.
        percent: suffix of the CSV's columns that are in percent.
    """
    keys = {name: name + percent * (metric.unit == "%") for name, metric in metrics.items()}
    rows, notes = [], []
    for row, by_seed, missing in experiments:
        for metric, about in metrics.items():
            values = about.scale * pd.Series({seed: found[metric] for seed, found in by_seed.items()}, dtype=float)
            lacking = [seed for seed, found in by_seed.items() if found[metric] is None]  # NaN among the values
            without = values.index[values.isna()]
            mean, std = (None, None) if lacking or not by_seed else (values.mean(), values.std())
            row |= {f"{keys[metric]}_mean": mean, f"{keys[metric]}_std": std}
            if lacking:
                missing.append(f"{about.label} of seed {listed(lacking)}")
            elif len(without):
                left_out = f"{about.heading} is not defined for seed {listed(without)} and left out of its mean."
                notes.append(f"{row['model']}: {left_out}")
        rows.append(row | {"missing": "; ".join(missing)})
    columns = {"Model": value_of("model"), "n": value_of("n")}
    columns |= {about.heading: mean_and_std_of(keys[metric]) for metric, about in metrics.items()}
    return columns, rows, notes


def missing_seeds(runs: Sequence[Run], expected: Sequence[int]) -> list[str]:
    """A sentence for the seeds that are not finished, and one for those without a run."""
    unfinished = [run.seed for run in runs if not run.test]
    absent = [seed for seed in expected if seed not in [run.seed for run in runs]]
    seeds = {"not finished": unfinished, "not run": absent}
    return [f"seed {listed(of_kind)} {what}" for what, of_kind in seeds.items() if of_kind]


# ---------------------------------------------------------------------------------- GLASS against standard
def table_of_differences(runs: Mapping[str, Sequence[Run]]) -> Table:
    """A row for each GLASS experiment with a standard one: glass_mine minus standard_mine, seed by seed."""
    rows: list[Row] = []
    notes = [
        "Over the seeds that both models have, on the same test images; Student's t interval of the paired "
        "differences: for other seeds, not other images; with two or three seeds, it may reach beyond what is possible."
    ]
    for glass in runs:
        standard = glass.replace("glass_", "standard_", 1)
        if standard == glass or standard not in runs:
            continue
        glass_runs, standard_runs = ({run.seed: run for run in runs[name] if run.test} for name in (glass, standard))
        seeds = sorted(glass_runs.keys() & standard_runs.keys())
        missing = "" if len(seeds) > 1 else f"{'only one' if seeds else 'no'} seed in common with {standard}"
        if seeds:
            one, other = glass_runs[seeds[0]].metadata, standard_runs[seeds[0]].metadata
            difference = first_difference(one, other, ignore=("seed", "name", *HYPERPARAMETERS))
            if one["dataset_fingerprint"] != other["dataset_fingerprint"]:
                seeds, missing = [], f"{standard} was trained on other data"
            elif difference:
                notes.append(f"{glass} and {standard} were trained under different settings ({difference}).")

        row: Row = {"model": glass, "standard": standard, "n": len(seeds)}
        for metric in COMPARED_METRICS:
            pairs = [(glass_runs[seed].test[metric], standard_runs[seed].test[metric]) for seed in seeds]
            keys = (f"{metric}_points", f"{metric}_points_low", f"{metric}_points_high")
            row |= dict(zip(keys, _paired_interval(pairs), strict=True))
        rows.append(row | {"missing": missing})

    columns = {"Model": value_of("model"), "minus": value_of("standard"), "n": value_of("n")}
    columns |= {METRICS[metric].heading: interval_of(f"{metric}_points") for metric in COMPARED_METRICS}
    title = "GLASS minus standard in percentage points, with 95% intervals over n paired seeds"
    return Table("differences", title, rows, columns, notes)


def _paired_interval(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, ...]:
    """Mean difference in percentage points, and both ends of its 95% t interval; NaN where they are not defined."""
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None, None, None
    points = pd.Series([100 * (one - other) for one, other in pairs]).dropna()
    mean, half = points.mean(), stats.t.ppf(0.975, len(points) - 1) * points.sem()
    return mean, mean - half, mean + half


# --------------------------------------------------------------------------------------------------- tuning
def table_of_hyperparameters(preset: Preset, studies: Mapping[str, TuningStudy | None]) -> Table:
    """A row a study: its trials, and the values of the best one; below the table, these as lines of config.py."""
    rows, code = [], []
    for name, study in studies.items():
        best = study.best if study else None
        row: Row = {"model": name}
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            row[f"trials_{state.name.lower()}"] = len(study.trials_in(state)) if study else None
        row |= {"best_trial": best and best.number, "valid_accuracy_percent": best and 100 * best.value}
        row |= {key: best and best.params.get(key, NAN) for key in HYPERPARAMETERS}
        rows.append(row | {"missing": _missing_trials(preset, name, study)})
        if best:
            code.append(_line_of_config(preset, name, study))
    headings = {"model": "Model", "trials_complete": "Complete", "trials_pruned": "Pruned", "trials_fail": "Failed"}
    columns = {heading: value_of(key) for key, heading in (headings | {"best_trial": "Best trial"}).items()}
    columns["Validation accuracy (%)"] = value_of("valid_accuracy_percent", ".2f")
    searched = {name for space in (preset.glass_space, preset.standard_space) for name in space}
    columns |= {key: value_of(key, ".4g") for key in HYPERPARAMETERS if key in searched}
    title = "Best hyperparameters of the studies, and their validation accuracy"
    notes = notes_of((name, provenance_of(study.metadata)) for name, study in studies.items() if study)
    return Table("best_hyperparameters", title, rows, columns, notes, code)


def _missing_trials(preset: Preset, name: str, study: TuningStudy | None) -> str:
    if not study:
        return "no study"
    if not study.best:
        return "no complete trial"
    expected = preset.tuning.trials_of(name.startswith("standard_"))
    left = study.trials_left(expected)
    return f"{left} of {expected} trials" if left else ""


def _line_of_config(preset: Preset, name: str, study: TuningStudy) -> str:
    """The experiment with the best trial's values, to paste into config.py; other fields as in the study's run."""
    known = {experiment.name: asdict(experiment) for experiment in preset.experiments}
    values = {**known.get(name, {}), **study.metadata["settings"], **study.best.params, "name": name}
    kind = StandardExperiment if "lr" in values else GlassExperiment
    given = [f"{field.name}={json.dumps(values[field.name])}" for field in fields(kind) if field.name in values]
    return f"{kind.__name__}({', '.join(given)}),"
