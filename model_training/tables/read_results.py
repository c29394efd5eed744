"""Result folders -> dataclasses: runs, cost studies and Optuna studies. Writes nothing."""

import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data.lists import read_csv
from training.cost import Cost, read_costs
from training.detection_metrics import CALIBRATED_METRICS
from training.metrics import METRICS, NAN, Metric
from training.progress import EpochRecord
from training.runs import database_problem, first_difference, read_metadata
from training.runtime import CPU_MEMORY, CUDA_MEMORY
from utils import UserError, read_json, reading

MEMORY_KINDS = {CUDA_MEMORY: "peak GPU memory", CPU_MEMORY: "memory kept for the backward pass, CPU"}


def provenance_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Where a table's numbers come from, for its notes: label -> text."""
    environments = metadata["environments"]
    return {
        "Data set fingerprint": _as_text(metadata.get("dataset_fingerprint")),
        "Commit": _describe_changes(environments, "commit"),
        "Versions": _describe_changes(environments, "versions"),
        "Hardware": _as_text(metadata.get("hardware")),
    }


def _describe_changes(environments: Sequence[Mapping[str, Any]], key: str) -> str:
    """The value, if it never changed, else as "abc from epoch 1, then def from epoch 7"."""
    by_text = groupby(environments, key=lambda environment: _as_text(environment[key]))
    changes = [(text, next(same)["from"]) for text, same in by_text]
    return changes[0][0] if len(changes) == 1 else ", then ".join(f"{text} from {start}" for text, start in changes)


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value or "unknown")


# ----------------------------------------------------------------------------------------------------- runs
Values = Mapping[str, float | None]  # metric -> value; None: the file is older than the metric; NaN: not defined


@dataclass(frozen=True)
class Run:
    """One seed of one experiment."""

    folder: Path
    seed: int
    metadata: Mapping[str, Any]
    history: list[EpochRecord]
    test: Values | None = None  # None: not finished
    calibrated: Values | None = None  # None: not finished, or not calibrated


def read_runs(results: Path, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Experiment -> its runs, by seed; runs that failed before the end of their first epoch are ignored.

    Raises UserError if a file cannot be read, if a run has another seed than its folder, or if the settings of two
    finished runs differ.
    """
    runs = defaultdict(list)
    for seed in sorted(seeds):
        for path in results.glob(f"*/seed_{seed}/history.csv"):
            runs[path.parent.parent.name].append(read_run(path.parent, seed))
    for of_experiment in runs.values():
        _check_alike([(run.folder, run.metadata) for run in of_experiment if run.test], "a mean of both")
    return dict(runs)


def _check_alike(found: Sequence[tuple[Path, Mapping[str, Any]]], what: str) -> None:
    """Raise UserError if two of these runs have different settings, so that `what` would mean nothing."""
    for folder, metadata in found[1:]:
        first, difference = found[0][0], first_difference(found[0][1], metadata, ignore=("seed",))
        if difference:
            raise UserError(
                f"{first} and {folder} differ ({difference}), so {what} would mean nothing: move one of them away"
            )


def is_finished(folder: Path) -> bool:
    """Whether the training in this run folder is finished and will not be repeated: metrics.json is written last."""
    return (folder / "metrics.json").exists()


def read_run(folder: Path, seed: int) -> Run:
    """The run of this seed in `folder`, which must have a history.csv; raises UserError as `read_runs`."""
    metadata, path = read_metadata(folder / "run.json"), folder / "history.csv"
    if metadata["settings"].get("seed", seed) != seed:
        raise UserError(
            f"{folder} holds a run of seed {metadata['settings']['seed']} (run.json), which would be counted as "
            f"another: move it away"
        )
    with reading(path):
        history = [_epoch_record(row) for row in read_csv(path)]
    if not is_finished(folder):
        return Run(folder, seed, metadata, history)
    with reading(path := folder / "metrics.json"):
        found = read_json(path)
        calibrated = found.get("test_calibrated") and _values(CALIBRATED_METRICS, found["test_calibrated"])
        return Run(folder, seed, metadata, history, _values(METRICS, found["test"]), calibrated)


def read_fakes(path: Path, names: Sequence[str]) -> np.ndarray:
    """Probability of fake of each test image (N,), from the predictions.csv of a finished run.

    Raises UserError if the file cannot be read, or has other images than these `names`.
    """
    with reading(path, "give the data root and the settings of that training, or run it again"):
        rows = read_csv(path)
        if sorted(row["path"] for row in rows) != sorted(names):
            raise ValueError(f"it has {len(rows)} images, and not those {len(names)} that are tested")
        found = {row["path"]: float(row["probability_fake"]) for row in rows}
        return np.array([found[name] for name in names])


def _epoch_record(row: Mapping[str, str]) -> EpochRecord:
    """A row of history.csv; NaN for columns that a file of an older version lacks."""
    names = [item.name for item in fields(EpochRecord)]
    values: dict[str, Any] = {name: float(row[name] or "") if name in row else NAN for name in names}
    return EpochRecord(**values | {"epoch": int(row["epoch"]), "valid_accuracy": float(row["valid_accuracy"])})


def _values(metrics: Mapping[str, Metric], found: Mapping[str, Any]) -> Values:
    """The values of these metrics in a file; raises ValueError for one that is out of its range."""
    if not isinstance(found, dict):
        raise ValueError(f"metrics are {found}")
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        value = found.get(name)
        if value is not None and not metric.low <= float(value) <= metric.high:
            raise ValueError(f"{name} is {value}, not between {metric.low:g} and {metric.high:g}")
        values[name] = (NAN if name in found else None) if value is None else float(value)
    return values


# --------------------------------------------------------------------------------------------- cost studies
@dataclass(frozen=True)
class CostStudy:
    """The costs measured in one mode, by crop count, which is None for a standard model."""

    experiment: str
    mode: str | None = None  # full or quick; None: nothing was measured
    metadata: Mapping[str, Any] = field(default_factory=lambda: {"settings": {}})
    costs: Mapping[int | None, Cost] = field(default_factory=dict)

    @property
    def memory_kind(self) -> str | None:
        """How memory was measured; numbers of two kinds cannot be compared."""
        return self.metadata.get("memory_kind")

    @property
    def memory_text(self) -> str:
        """The kind of memory, for a heading."""
        return MEMORY_KINDS.get(self.memory_kind, str(self.memory_kind))

    @property
    def epoch_time_text(self) -> str:
        """How the epoch time was measured, for a heading."""
        if self.mode == "full":
            compilation = self.metadata["settings"].get("compilation", "in the first epoch")  # in earlier versions
            return f"full: mean of whole epochs, compilation {compilation}"
        return f"quick: epoch time extrapolated from {self.metadata['settings'].get('measured_steps')} steps"


def read_cost_studies(folder: Path) -> list[CostStudy]:
    """The full studies, then the quick ones; `folder` is results/<preset>/num_crops or .../standard_memory.

    Raises UserError if a file cannot be read, or if crop counts of a study were measured with different settings.
    """
    studies = []
    for mode in ("full", "quick"):
        for home in folder.glob(f"*/{mode}"):
            paths = (home / "costs.csv", *home.glob("k_*/costs.csv"))  # the first: standard, or an earlier version
            parts = [(read_costs(path), path.parent) for path in paths if path.exists()]
            parts.sort(key=lambda part: [k or 0 for k in part[0]])
            found = [(folder, read_metadata(folder / "run.json")) for _, folder in parts]
            _check_alike(found, "a line through both")
            if parts:
                costs = {k: cost for part, _ in parts for k, cost in part.items()}
                environments = [each for _, metadata in found for each in metadata["environments"]]
                costs = dict(sorted(costs.items(), key=lambda item: item[0] or 0))
                studies.append(CostStudy(home.parent.name, mode, found[0][1] | {"environments": environments}, costs))
    return studies


# ------------------------------------------------------------------------------------------- Optuna studies
@dataclass(frozen=True)
class TuningStudy:
    """One Optuna study, and the metadata of its run."""

    study: optuna.Study
    metadata: Mapping[str, Any]
    trials: list[FrozenTrial]

    def trials_in(self, state: TrialState) -> list[FrozenTrial]:
        """Its trials in this state."""
        return [trial for trial in self.trials if trial.state == state]

    def trials_left(self, total: int) -> int:
        """How many trials are left; pruned and failed ones count as done."""
        return max(0, total - sum(trial.state.is_finished() for trial in self.trials))

    @property
    def best(self) -> FrozenTrial | None:
        """The first of the best complete trials."""
        return max(self.trials_in(TrialState.COMPLETE), key=lambda trial: trial.value, default=None)


def read_tuning_studies(folder: Path) -> dict[str, TuningStudy]:
    """Experiment -> its study, opened read-only; `folder` is results/<preset>/tuning."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = {}
    for path in folder.glob("*/study.db"):
        name, url = path.parent.name, f"{path.resolve().as_uri()}?mode=ro"
        try:
            connection = {"creator": partial(sqlite3.connect, url, uri=True)}
            storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=connection)
            study = optuna.load_study(study_name=name, storage=storage)
            trials = study.get_trials(deepcopy=False)
            for trial in trials:
                best = max(trial.intermediate_values.values(), default=None)
                if trial.state == TrialState.COMPLETE and trial.value != best:
                    raise ValueError(f"trial {trial.number} has the value {trial.value}, not {best}, its best epoch's")
        except (SQLAlchemyError, StorageInternalError, sqlite3.Error, KeyError, RuntimeError, ValueError) as error:
            problem = database_problem(path, error)
            raise UserError(
                f"{path} cannot be read as the Optuna study {name} ({problem}): run its tuning command again, or move "
                f"the file away"
            ) from None
        studies[name] = TuningStudy(study, read_metadata(path.with_name("run.json")), trials)
    return studies
