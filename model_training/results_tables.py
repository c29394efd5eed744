"""Every table and figure of the paper, from the results that exist.

    python -m model_training.results_tables

Writes each table as CSV, Markdown and LaTeX and each figure as PNG to results/<preset>/tables/, prints the first test
metrics, and names what is missing. If --seeds lacks some of the preset's seeds, it writes to another folder, such as
tables_seeds_1, and leaves the preset's tables as they are. Needs no GPU and takes seconds: run it as often as you
like, also between experiments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

import config
from config import Preset
from model_training.tables import cost_tables, experiment_tables, figures, read_results
from model_training.tables.read_results import CostStudy, Run, TuningStudy
from model_training.tables.table import Table
from training.metrics import METRICS
from utils import UserError, preset_folder, run_command

SETTINGS = ("results_root", "stages", "experiments", "trials", "seeds", "crop_counts")  # that this command reads


def write_tables(preset: Preset) -> None:
    """Write every table and figure, print the test metrics, name what is missing.

    Raises UserError if there are no results, if results must not be averaged, or if a file cannot be read.
    """
    results = preset_folder(preset)
    runs = read_results.read_runs(results, preset.training.seeds)
    studies = read_results.read_tuning_studies(results / "tuning")
    crop_costs = read_results.read_cost_studies(results / "num_crops")
    standard_costs = read_results.read_cost_studies(results / "standard_memory")
    if not (runs or studies or crop_costs or standard_costs):
        flags, name = f"--preset {preset.name}", preset.experiments[0].name
        raise UserError(
            f"{results} holds no results yet: run python -m model_training.reproduce {flags} first, or one experiment, "
            f"such as python -m model_training.{name}_training {flags}"
        )
    found = {*runs, *studies, *(study.experiment for study in (*crop_costs, *standard_costs))}
    if found.isdisjoint(preset.reproduce.experiments):  # only the user's own: the preset's are not called missing
        preset = replace(preset, reproduce=replace(preset.reproduce, experiments=()))
    # Experiments of the preset without results are listed too, so that the tables say what is missing.
    runs = {name: runs.get(name, []) for name in _names(preset, "training", runs)}
    studies = {name: studies.get(name) for name in _names(preset, "tuning", studies)}
    crop_costs = _with_unmeasured(preset, "num_crops", crop_costs, "glass_")
    standard_costs = _with_unmeasured(preset, "standard_memory", standard_costs, "standard_")

    chosen = preset.training.seeds
    complete = set(config.PRESETS[preset.name].training.seeds) <= set(chosen)
    folder = results / ("tables" if complete else f"tables_seeds_{'_'.join(map(str, sorted(chosen)))}")
    tables = [
        experiment_tables.table_of_test_metrics(runs, preset.training.seeds),
        experiment_tables.table_of_calibrated_metrics(runs),
        experiment_tables.table_of_differences(runs),
        experiment_tables.table_of_hyperparameters(preset, studies),
        cost_tables.table_of_crop_costs(crop_costs, preset.num_crops.crop_counts),
        cost_tables.table_of_crop_cost_lines(crop_costs),
        cost_tables.table_of_standard_costs(preset, standard_costs, crop_costs),
    ]
    tables = [table for table in tables if table.rows]
    for table in tables:
        table.write(folder)
    drawings = [*_drawings_of_runs(runs), *_drawings_of_studies(studies), *_drawings_of_costs(crop_costs)]
    for name, reason, draw in drawings:
        if reason:
            (folder / f"{name}.png").unlink(missing_ok=True)  # drawn from results that are gone
        else:
            draw(folder / f"{name}.png")
    _report(folder, tables, {name: reason for name, reason, _ in drawings})
    seeds = {f"seed_{seed}" for seed in preset.training.seeds}
    others = sorted(f"{path.parent.name} {path.name}" for path in results.glob("*/seed_*") if path.name not in seeds)
    if others:
        print("\nIgnored, because their seeds are not among --seeds:", *others, sep="\n  ")


def _names(preset: Preset, stage: str, found: Iterable[str], family: str = "") -> list[str]:
    """Names of the preset's experiments (of a family) in a stage and of those found: standard, GLASS, then others."""
    reproduced = preset.reproduce.experiments if stage in preset.reproduce.stages else ()
    names = [name for name in reproduced if name.startswith(family)]
    names += sorted(set(found).difference(names))
    return sorted(names, key=lambda name: (not name.startswith("standard_"), not name.startswith("glass_")))


def _with_unmeasured(preset: Preset, stage: str, found: Sequence[CostStudy], family: str) -> list[CostStudy]:
    """The studies found, by experiment, and an empty one for each experiment of the family without any."""
    names = _names(preset, stage, [study.experiment for study in found], family)
    by_name = [[study for study in found if study.experiment == name] or [CostStudy(name)] for name in names]
    return list(chain.from_iterable(by_name))


def _report(folder: Path, tables: Sequence[Table], why_not: Mapping[str, str]) -> None:
    """Print two of the tables, how complete the others are, what was written and what is missing."""
    printed = ("test_metrics", "differences")
    for table in sorted(tables, key=lambda table: table.name not in printed):
        if table.name in printed:
            print(table.text())
        else:
            models = {row["model"] for row in table.rows}
            incomplete = {row["model"] for row in table.rows if row["missing"]}
            print(f"{table.title}: {len(models) - len(incomplete)} of {len(models)} models complete")
    written = [f"{table.name}.csv .md .tex" for table in tables]
    written += [f"{figure}.png" for figure, reason in why_not.items() if not reason]
    missing = [f"{table.name}: {sentence}" for table in tables for sentence in table.missing]
    missing += [f"{figure}.png: {reason}" for figure, reason in why_not.items() if reason]
    print(f"\nWritten to {folder}:", *written, sep="\n  ")
    if missing:
        print("\nMissing:", *missing, sep="\n  ")


# --------------------------------------------------------------------------------------------------- figures
Drawing = tuple[str, str, Callable[[Path], None]]  # a figure's name; why it cannot be drawn, or ""; draws it to a path


def _drawings_of_runs(runs: Mapping[str, Sequence[Run]]) -> Iterator[Drawing]:
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for metric in ("accuracy", "auc_score"):
        for name, of_name in runs.items():
            values = np.array([run.test[metric] for run in of_name if run.test], dtype=float)  # NaN if it is missing
            scores[name][f"{METRICS[metric].heading} on the test split (%)"] = 100 * values[~np.isnan(values)]
    reason = "" if any(run.test for of_name in runs.values() for run in of_name) else "no finished run"
    title = "Mean ± standard deviation over n seeds"
    yield "test_metrics", reason, partial(figures.plot_test_metrics, title=title, scores=scores)
    for name, of_name in runs.items():
        histories = {f"seed {run.seed}" + ("" if run.test else " (not finished)"): run.history for run in of_name}
        draw = partial(figures.plot_training_curve, title=f"{name}: training", histories=histories)
        yield f"training_curves_{name}", "" if histories else "no run", draw


def _drawings_of_studies(studies: Mapping[str, TuningStudy | None]) -> Iterator[Drawing]:
    for name, study in studies.items():
        title, no_study = f"{name}: tuning", "" if study else "no study"
        trials = study.trials if study else []
        complete = {trial.number: 100 * trial.value for trial in trials if trial.state == TrialState.COMPLETE}
        pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.intermediate_values]
        last = {trial.number: 100 * trial.intermediate_values[trial.last_step] for trial in pruned}
        draw = partial(figures.plot_tuning_history, title=title, complete=complete, pruned=last)
        yield f"tuning_history_{name}", no_study or ("" if complete else "no complete trial"), draw

        title, reason, importances = f"{title}\nimportance by fANOVA, {len(complete)} complete trials", no_study, {}
        if len(set(complete.values())) < 2:
            reason = no_study or f"needs two complete trials of different accuracy, {len(complete)} complete"
        else:
            try:
                importances = get_param_importances(study.study, evaluator=FanovaImportanceEvaluator(seed=0))
            except (ValueError, RuntimeError) as error:
                reason = f"Optuna computes no importance: {error}"
        draw = partial(figures.plot_tuning_importance, title=title, importances=importances)
        yield f"tuning_importance_{name}", reason, draw


def _drawings_of_costs(crop_costs: Sequence[CostStudy]) -> Iterator[Drawing]:
    for name in dict.fromkeys(study.experiment for study in crop_costs):
        study = next(study for study in crop_costs if study.experiment == name)  # the full one comes first
        labels = {
            "peak_memory_mb": f"{study.memory_text} (MB)".replace(" for", "\nfor"),
            "epoch_seconds": "epoch time (s)",
            "valid_accuracy": "best validation accuracy (%)",
        }
        title = f"{name}\n{study.epoch_time_text}"
        draw = partial(figures.plot_crop_costs, title=title, costs=study.costs, labels=labels)
        yield f"crop_costs_{name}", "" if study.costs else "not measured", draw


if __name__ == "__main__":
    groups = ("reproduce", "tuning", "training", "num_crops")
    run_command(__doc__, write_tables, groups=groups, settings=SETTINGS)
