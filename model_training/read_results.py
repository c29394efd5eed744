"""Result folders -> dataclasses: runs, cost studies and Optuna studies. Reads only, and knows no table."""

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from training.detection_metrics import DETECTION_METRICS
from training.progress import EpochRecord
from training.runtime import CPU_MEMORY, CUDA_MEMORY
from utils import UserError, as_share, first_difference, first_line, read_csv, read_json, reading

NAN = float("nan")
METRICS = {  # of metrics.json -> heading
    "accuracy": "Accuracy",
    "auc_score": "AUC",
    "f1_score": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "conf_correct": "Confidence, correct",
    "conf_incorrect": "Confidence, incorrect",
    "overall_conf": "Confidence, all",
    "ece": "ECE",
}
CALIBRATED_METRICS = {  # of metrics.json's test_calibrated -> heading
    **{name: label[0].upper() + label[1:] for name, label in DETECTION_METRICS.items()},
    "fpr_at_1_threshold": "FPR at the 1% threshold",
    "fpr_at_5_threshold": "FPR at the 5% threshold",
    "inconclusive": "Inconclusive",
    "conclusive_accuracy": "Accuracy of the others",
}
MEMORY_KINDS = {
    CUDA_MEMORY: "peak GPU memory",
    CPU_MEMORY: "memory kept for the backward pass, CPU",
}


def _read_facts(folder: Path) -> dict[str, Any]:
    """What run.json says, as `utils.run_facts` wrote it; no settings if there is none."""
    path = folder / "run.json"
    facts = read_json(path) if path.exists() else {"settings": {}}
    with reading(path):
        return {"dataset_fingerprint": None, **facts, "settings": dict(facts["settings"])}


# ----------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Run:
    """One seed of one experiment."""

    folder: Path
    seed: int
    facts: Mapping[str, Any]
    history: list[EpochRecord]
    test: Mapping[str, float] | None  # None: not finished; a metric is NaN where it is not defined
    calibrated: Mapping[str, float] | None = None  # None: not finished, or not calibrated


def read_runs(results: Path, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Experiment -> its runs of these seeds, in their order; runs that failed before their first epoch are no runs.

    Raises:
        UserError: a file cannot be read, a run is of another seed than its folder's, or two finished runs of one
            experiment differ in a setting or in their data, so that no mean may be taken.
    """
    runs = defaultdict(list)
    for folder in results.glob("*/seed_*"):
        if (folder / "history.csv").exists() and folder.name in {f"seed_{seed}" for seed in seeds}:
            runs[folder.parent.name].append(_read_run(folder))
    for of_experiment in runs.values():
        of_experiment.sort(key=lambda run: run.seed)
        _check_comparable(of_experiment)
    return dict(runs)


def percents(runs: Iterable[Run], metric: str) -> list[float]:
    """A metric of the finished runs, in percent, where it is defined."""
    values = [100 * run.test[metric] for run in runs if run.test]
    return [value for value in values if not math.isnan(value)]


def _read_run(folder: Path) -> Run:
    history: list[EpochRecord] = []
    path = folder / "history.csv"
    if path.exists():
        with reading(path):
            for row in read_csv(path):
                values: dict[str, Any] = {name: float(text) for name, text in row.items()}
                values |= {"epoch": int(row["epoch"]), "valid_accuracy": as_share(row["valid_accuracy"])}
                history.append(EpochRecord(**values))
    test: dict[str, float] | None = None
    calibrated: dict[str, float] | None = None
    path = folder / "metrics.json"
    if path.exists():
        with reading(path):
            found = read_json(path)
            values, values_calibrated = found["test"], found.get("test_calibrated")
            test = {name: NAN if values[name] is None else as_share(values[name]) for name in METRICS}
            if values_calibrated:
                calibrated = {name: NAN if value is None else float(value) for name, value in values_calibrated.items()}
                calibrated = {name: calibrated[name] for name in CALIBRATED_METRICS}
    seed, facts = int(folder.name.removeprefix("seed_")), _read_facts(folder)
    ran = facts["settings"].get("seed", seed)
    if ran != seed:
        raise UserError(f"{folder} holds a run of seed {ran} (run.json), and would count as another: move it away")
    return Run(folder, seed, facts, history, test, calibrated)


def _check_comparable(runs: list[Run]) -> None:
    finished = [run for run in runs if run.test]
    for run in finished:
        if not run.facts["settings"]:
            raise UserError(
                f"{run.folder} has no run.json to say what it was run with: move that folder away and run it again"
            )
    for run in finished[1:]:
        difference = first_difference(finished[0].facts, run.facts, ignore=("seed",))
        if difference:
            raise UserError(
                f"{finished[0].folder} and {run.folder} differ ({difference}), "
                f"so a mean of both would mean nothing: move one of them away"
            )


# --------------------------------------------------------------------------------------------- cost studies
@dataclass(frozen=True)
class CostStudy:
    """What was measured in one mode: a row for each crop count, or one row for a standard model."""

    experiment: str
    mode: str | None = None  # full or quick; None: nothing was measured
    facts: Mapping[str, Any] = field(default_factory=lambda: {"settings": {}})
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What notes call it."""
        return f"{self.experiment} {self.mode}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it ran with."""
        return self.facts["settings"]

    @property
    def memory_kind(self) -> str | None:
        """What its memory is; numbers of two kinds cannot be compared."""
        return self.facts.get("memory_kind")

    @property
    def memory_text(self) -> str:
        """The kind of its memory, in words."""
        return MEMORY_KINDS.get(self.memory_kind, str(self.memory_kind))

    @property
    def epoch_time_text(self) -> str:
        """How its epoch time was found, in words."""
        if self.mode == "full":
            return "full: mean of whole epochs"
        return f"quick: epoch time extrapolated from {self.settings.get('measured_steps')} steps"

    def row_at(self, num_crops: int | None) -> dict[str, float] | None:
        """What it measured with this number of crops, if it did."""
        return next((row for row in self.rows if row["num_crops"] == num_crops), None)


def read_cost_studies(room: Path) -> list[CostStudy]:
    """The full studies, then the quick ones; `room` is results/<preset>/num_crops or .../standard_memory."""
    studies = []
    for mode in ("full", "quick"):
        for path in room.glob(f"*/{mode}/costs.csv"):
            name = path.parent.parent.name
            studies.append(CostStudy(name, mode, _read_facts(path.parent), _read_costs(path)))
    return studies


def _read_costs(path: Path) -> list[dict[str, float]]:
    rows = []
    with reading(path):
        for texts in read_csv(path):
            row = {name: NAN if text == "" else float(text) for name, text in texts.items()}
            if not math.isnan(row["num_crops"]):
                row["num_crops"] = int(row["num_crops"])
            row["valid_accuracy_percent"] = 100 * row["valid_accuracy"]
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------- Optuna studies
@dataclass(frozen=True)
class TuningStudy:
    """One Optuna study, and the settings that it ran with."""

    study: optuna.Study
    settings: Mapping[str, Any]
    trials: list[FrozenTrial]

    def trials_in(self, state: TrialState) -> list[FrozenTrial]:
        """Its trials that ended so."""
        return [trial for trial in self.trials if trial.state == state]

    @property
    def complete(self) -> list[FrozenTrial]:
        """The trials that ran to their end."""
        return self.trials_in(TrialState.COMPLETE)

    @property
    def best(self) -> FrozenTrial | None:
        """The first of the best complete trials."""
        return max(self.complete, key=lambda trial: trial.value, default=None)


def read_tuning_studies(room: Path) -> dict[str, TuningStudy]:
    """Experiment -> its study; `room` is results/<preset>/tuning."""
    studies = {}
    for path in room.glob("*/study.db"):
        study, trials = _load_study(path)
        studies[path.parent.name] = TuningStudy(study, _read_facts(path.parent)["settings"], trials)
    return studies


def _load_study(path: Path) -> tuple[optuna.Study, list[FrozenTrial]]:
    """The study in `path`, a file that is opened for reading only, and its trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"{path.resolve().as_uri()}?mode=ro"
    try:
        connection = {"creator": lambda: sqlite3.connect(url, uri=True)}
        storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=connection)
        study = optuna.load_study(study_name=path.parent.name, storage=storage)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            epochs = [as_share(value) for value in trial.intermediate_values.values()]
            if trial.state == TrialState.COMPLETE and trial.value != max(epochs, default=None):
                raise ValueError(f"trial {trial.number} has the value {trial.value}, not the best of its epochs")
    except (SQLAlchemyError, sqlite3.Error, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as the Optuna study {path.parent.name} ({first_line(error)}): "
            f"run its tuning command again, or move the file away"
        ) from None
    return study, trials
