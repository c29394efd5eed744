"""Every table and figure of the paper, from whatever results exist.

    python -m model_training.results_tables

Writes each table as CSV, Markdown and LaTeX and each figure as PNG to results/<preset>/tables/, prints the test
metrics, and names what is missing. Needs no GPU and takes seconds: run it as often as you like, also between
experiments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from config import Preset
from model_training import figures
from model_training.cost_tables import table_of_crop_cost_lines, table_of_crop_costs, table_of_standard_costs
from model_training.experiment_tables import (
    table_of_calibrated_metrics,
    table_of_differences,
    table_of_hyperparameters,
    table_of_test_metrics,
)
from model_training.read_results import (
    METRICS,
    CostStudy,
    Run,
    TuningStudy,
    percents,
    read_cost_studies,
    read_runs,
    read_tuning_studies,
)
from model_training.tables import Table
from utils import UserError, preset_folder, run_door


def write_tables(preset: Preset) -> None:
    """Write every table and figure to results/<preset>/tables/, print the test metrics, name what is missing.

    Raises:
        UserError: no results at all, results that must not be averaged, or an unreadable file.
    """
    results = preset_folder(preset)
    runs = read_runs(results, preset.training.seeds)
    studies = read_tuning_studies(results / "tuning")
    crop_costs = read_cost_studies(results / "num_crops")
    standard_costs = read_cost_studies(results / "standard_memory")
    if not (runs or studies or crop_costs or standard_costs):
        raise UserError(
            f"{results} holds no results yet: run python -m model_training.reproduce --preset {preset.name} first, "
            f"or one experiment, such as python -m model_training.{preset.experiments[0].name}_training "
            f"--preset {preset.name}"
        )
    # What the preset reproduces and has no results has its place too, so that the tables say what is missing.
    runs = {name: runs.get(name, []) for name in _names(preset, "training", runs)}
    studies = {name: studies.get(name) for name in _names(preset, "tuning", studies)}
    crop_costs = _with_unmeasured(preset, "num_crops", crop_costs, "glass_")
    standard_costs = _with_unmeasured(preset, "standard_memory", standard_costs, "standard_")

    folder = results / "tables"
    tables = [
        table_of_test_metrics(runs, preset.training.seeds),
        table_of_calibrated_metrics(runs),
        table_of_differences(runs),
        table_of_hyperparameters(preset, studies),
        table_of_crop_costs(crop_costs, preset.num_crops.crop_counts),
        table_of_crop_cost_lines(crop_costs),
        table_of_standard_costs(preset, standard_costs, crop_costs),
    ]
    tables = [table for table in tables if table.rows]
    for table in tables:
        table.write(folder)
    why_not = _draw_figures(folder, runs, studies, crop_costs)
    _report(folder, tables, why_not)
    wanted = {f"seed_{seed}" for seed in preset.training.seeds}
    others = sorted(f"{path.parent.name} {path.name}" for path in results.glob("*/seed_*") if path.name not in wanted)
    if others:
        print("\nLeft out, because their seeds are not among --seeds:", *others, sep="\n  ")


def _names(preset: Preset, stage: str, found: Iterable[str], family: str = "") -> list[str]:
    """What the preset reproduces (of a family) in a stage, and what is on disk: standard, then GLASS, then others."""
    reproduced = preset.reproduce.experiments if stage in preset.reproduce.stages else ()
    names = [name for name in reproduced if name.startswith(family)]
    names += sorted(set(found).difference(names))
    standard = [name for name in names if name.startswith("standard_")]
    glass = [name for name in names if name.startswith("glass_")]
    return standard + glass + [name for name in names if name not in standard + glass]


def _with_unmeasured(preset: Preset, stage: str, found: Sequence[CostStudy], family: str) -> list[CostStudy]:
    """What was found, experiment by experiment, and an empty study for each of the family that has none."""
    studies = []
    for name in _names(preset, stage, [study.experiment for study in found], family):
        of_name = [study for study in found if study.experiment == name]
        studies += of_name or [CostStudy(name)]
    return studies


def _report(folder: Path, tables: Sequence[Table], why_not: Mapping[str, str | None]) -> None:
    """Print the first two tables, how complete the others are, what was written and what is missing."""
    in_full = ("test_metrics", "differences")
    for table in tables:
        if table.name in in_full:
            print(table.markdown())
    for table in tables:
        if table.name in in_full:
            continue
        models = {row["model"] for row in table.rows}
        incomplete = {row["model"] for row in table.rows if row["missing"]}
        print(f"{table.title}: {len(models) - len(incomplete)} of {len(models)} models complete")
    written = [f"{table.name}.csv .md .tex" for table in tables]
    missing = [f"{table.name}: {sentence}" for table in tables for sentence in table.missing]
    for figure, reason in why_not.items():
        if reason:
            missing.append(f"{figure}.png: {reason}")
        else:
            written.append(f"{figure}.png")
    print(f"\nWritten to {folder}:", *written, sep="\n  ")
    if missing:
        print("\nMissing:", *missing, sep="\n  ")


# --------------------------------------------------------------------------------------------------- figures
# Each `_draw_` function draws to its path and returns None, or returns why there is nothing to draw.
def _draw_figures(
    folder: Path,
    runs: Mapping[str, Sequence[Run]],
    studies: Mapping[str, TuningStudy | None],
    crop_costs: Sequence[CostStudy],
) -> dict[str, str | None]:
    """Draw all; figure -> why it could not be drawn, or None."""
    why_not: dict[str, str | None] = {}

    def draw(figure: str, draw_to: Callable[..., str | None], *results: object) -> None:
        path = folder / f"{figure}.png"
        why_not[figure] = draw_to(path, *results)
        if why_not[figure]:
            path.unlink(missing_ok=True)  # drawn from results that are gone

    draw("test_metrics", _draw_test_metrics, runs)
    for name, of_name in runs.items():
        draw(f"training_curves_{name}", _draw_training_curves, name, of_name)
    for name, study in studies.items():
        draw(f"tuning_history_{name}", _draw_tuning_history, name, study)
    for name, study in studies.items():
        draw(f"tuning_importance_{name}", _draw_tuning_importance, name, study)
    for name in dict.fromkeys(study.experiment for study in crop_costs):
        full_or_quick = next(study for study in crop_costs if study.experiment == name)  # the full one comes first
        draw(f"crop_costs_{name}", _draw_crop_costs, full_or_quick)
    return why_not


def _draw_test_metrics(path: Path, runs: Mapping[str, Sequence[Run]]) -> str | None:
    if not any(run.test for of_name in runs.values() for run in of_name):
        return "no finished run"
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for name, of_name in runs.items():
        for metric in ("accuracy", "auc_score"):
            scores[name][f"{METRICS[metric]} on the test split (%)"] = percents(of_name, metric)
    figures.plot_test_metrics(path, "Mean ± standard deviation over n seeds", scores)
    return None


def _draw_training_curves(path: Path, name: str, runs: Sequence[Run]) -> str | None:
    histories = {}
    for run in runs:
        if run.history:
            label = f"seed {run.seed}" if run.test else f"seed {run.seed} (not finished)"
            histories[label] = run.history
    if not histories:
        return "no run"
    figures.plot_training_curve(path, f"{name}: training", histories)
    return None


def _draw_tuning_history(path: Path, name: str, study: TuningStudy | None) -> str | None:
    if not study:
        return "no study"
    if not study.complete:
        return "no complete trial"
    complete = {trial.number: 100 * trial.value for trial in study.complete}
    pruned = {}
    for trial in study.trials_in(TrialState.PRUNED):
        if trial.intermediate_values:
            pruned[trial.number] = 100 * trial.intermediate_values[trial.last_step]
    figures.plot_tuning_history(path, f"{name}: tuning", complete, pruned)
    return None


def _draw_tuning_importance(path: Path, name: str, study: TuningStudy | None) -> str | None:
    if not study:
        return "no study"
    n = len(study.complete)
    if len({trial.value for trial in study.complete}) < 2:
        return f"needs two complete trials of different accuracy, {n} complete"
    try:
        importances = get_param_importances(study.study, evaluator=FanovaImportanceEvaluator(seed=0))
    except (ValueError, RuntimeError) as error:
        return f"Optuna computes no importance: {error}"
    title = f"{name}: tuning\nimportance by fANOVA, {n} complete trials"
    figures.plot_tuning_importance(path, title, importances)
    return None


def _draw_crop_costs(path: Path, study: CostStudy) -> str | None:
    if not study.rows:
        return "not measured"
    labels = {
        "peak_memory_mb": f"{study.memory_text} (MB)".replace(" for", "\nfor"),
        "epoch_seconds": "epoch time (s)",
        "valid_accuracy_percent": "best validation accuracy (%)",
    }
    figures.plot_crop_costs(path, f"{study.experiment}\n{study.epoch_time_text}", study.rows, labels)
    return None


if __name__ == "__main__":
    run_door(__doc__, write_tables, groups=("reproduce", "tuning", "training", "num_crops"))
