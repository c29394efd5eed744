"""Shared by studies in one process and by many workers: suggesting and training a trial, the SQLite file."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from config import Experiment, GlassExperiment, LogUniform, SearchSpace, StandardExperiment, Tuning
from training import processes
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss
from training.loop import fit
from training.progress import EpochRecord
from training.runs import Session, build_job, database_problem
from training.runtime import OutOfMemory
from utils import UserError, replacing

OnEpoch = Callable[[list[EpochRecord]], None]
# Trains a trial: called with the search, the trial's number and experiment, its checkpoint, and a function to call with
# the history after each epoch.
Train = Callable[["Search", int, Experiment, Checkpoint, OnEpoch], object]


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended, its validation accuracy after each epoch, and why it failed."""

    state: TrialState
    accuracies: list[float]
    seconds: float
    failure: str = ""

    @property
    def value(self) -> float | None:
        """The best accuracy of a complete trial."""
        return max(self.accuracies) if self.state == TrialState.COMPLETE else None

    def print(self, number: int, params: dict[str, Any]) -> None:
        """Print a line about the trial."""
        best = f"{max(self.accuracies):.4f}" if self.accuracies else "none"
        print(
            f"trial {number}: validation accuracy {best} after {len(self.accuracies)} epochs, "
            f"{self.state.name.lower()}, {self.seconds:.0f} s, {params}{self.failure and f': {self.failure}'}",
            flush=True,
        )


@dataclass
class Search:
    """A search for hyperparameters, and how it trains a trial."""

    session: Session
    experiment: Experiment
    space: SearchSpace
    tuning: Tuning
    train: Train

    @property
    def total(self) -> int:
        """The number of trials of the study."""
        return self.tuning.trials_of(isinstance(self.experiment, StandardExperiment))

    def train_trial(
        self,
        number: int,
        experiment: Experiment,
        checkpoint: Checkpoint,
        report: Callable[[float, int], tuple[float, bool]],
        study: optuna.Study,
    ) -> TrialOutcome:
        """Train trial `number` of `study`, resumed from `checkpoint`.

        Args:
            report: called with the accuracy of each epoch and its number, from 0, also for epochs of an earlier
                process; returns the accuracy that counts, and whether to prune the trial.

        Raises:
            OutOfMemory: no trial of the study has fitted into memory so far.
        """
        start, accuracies, state, failure = time.perf_counter(), [], TrialState.COMPLETE, ""

        def on_epoch(history: list[EpochRecord]) -> None:
            accuracy, prune = report(history[-1].valid_accuracy, history[-1].epoch - 1)  # Hyperband counts from 0
            accuracies.append(accuracy)
            if prune:
                raise optuna.TrialPruned

        try:
            earlier = checkpoint.history()
            for epochs in range(1, len(earlier) + 1):
                on_epoch(earlier[:epochs])
            with processes.errors_shared():
                self.train(self, number, experiment, checkpoint, on_epoch)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (OutOfMemory, NonFiniteLoss) as error:  # these values do not work here; the study continues without them
            if isinstance(error, OutOfMemory) and not study.get_trials(False, (TrialState.COMPLETE,)):
                raise  # nothing has fitted so far: probably others use the device, and the values are not the cause
            state, failure = TrialState.FAIL, str(error)
        return TrialOutcome(state, accuracies, time.perf_counter() - start, failure)


def fit_trial(search: Search, number: int, experiment: Experiment, checkpoint: Checkpoint, on_epoch: OnEpoch) -> None:
    """The `Train` of the commands: train the trial's experiment, with a seed of its own."""
    session = search.session
    seed, rows = session.settings.main_seed + number, (session.splits.train, session.splits.valid)
    job = build_job(session, experiment, seed, search.tuning.epochs, rows, f"{experiment.name} trial {number}")
    fit(job, checkpoint, session.stop, on_epoch=on_epoch)


def suggest_experiment(trial: optuna.Trial, space: SearchSpace, experiment: Experiment) -> Experiment:
    """The experiment with the hyperparameters that the trial suggests, in the order of the search space."""
    values = {
        name: trial.suggest_float(name, choices.low, choices.high, log=True)
        if isinstance(choices, LogUniform)
        else trial.suggest_categorical(name, choices)
        for name, choices in space.items()
    }
    return replace(experiment, **values)


def author_study_name(experiment: Experiment) -> str:
    """The author's name of the study. Its hash assigns trials to Hyperband's brackets, and TPE sees one bracket."""
    kind = "gl" if isinstance(experiment, GlassExperiment) else "transfer"
    return f"{kind}_{experiment.backbone}_hyperparameters_optimization"


def resources(tuning: Tuning) -> dict[str, int]:
    """The arguments of Hyperband."""
    return {name: getattr(tuning, name) for name in ("min_resource", "max_resource", "reduction_factor")}


class SlotPruner(optuna.pruners.HyperbandPruner):
    """Hyperband with the brackets of the author's study, by a trial's user attribute "slot" instead of its number."""

    def __init__(self, author_study_name: str, tuning: Tuning) -> None:
        super().__init__(**resources(tuning))
        self.author_study_name = author_study_name
        self._try_initialization(None)  # now, not at the first pruning: until then the sampler would see all brackets

    def _get_bracket_id(self, _: optuna.Study, trial: FrozenTrial) -> int:
        if trial.state == TrialState.FAIL:
            return -1  # no bracket: a trial that is repeated must not compete with itself
        slot = SimpleNamespace(study_name=self.author_study_name, number=trial.user_attrs.get("slot"))
        return super()._get_bracket_id(slot, slot)


def print_best(study: optuna.Study, name: str) -> None:
    """Print the best trial of the study of experiment `name`.

    Raises:
        UserError: there is none.
    """
    if not study.get_trials(False, (TrialState.COMPLETE,)):
        raise UserError(f"no trial of the study {name} is complete: raise --trials")
    best = study.best_trial
    print(f"best of {name}: trial {best.number}, validation accuracy {best.value:.4f}")
    for parameter, value in best.params.items():
        print(f"  {parameter} = {value!r}")


# ------------------------------------------------------------------------------------------------ the SQLite file
@contextmanager
def study_file(path: Path, *damages: type[Exception]) -> Iterator[None]:
    """Errors of SQLite and Optuna (a damaged, locked or unwritable file), and `damages`, become a UserError."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, *damages) as error:
        problem = database_problem(path, error)
        raise UserError(
            f"cannot resume from {path} ({problem}): make room and let it be written, or, if it is damaged, pass "
            f"--restart to archive it and start over"
        ) from None


def write_study(path: Path, name: str, trials: Iterable[FrozenTrial] = ()) -> None:
    """Write an SQLite file with the study `name` of `trials`, numbered from 0; never a part of it."""
    with replacing(path) as temporary:
        storage = _storage(temporary)
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        study.add_trials(trials)
        storage.engine.dispose()


def open_study(path: Path, name: str) -> optuna.Study:
    """The study in the SQLite file `path`, which is created if there is none."""
    if not path.exists():
        write_study(path, name)
    with study_file(path, KeyError, RuntimeError, TypeError, ValueError):  # another study, version or content
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")  # fails at once where Optuna would retry for half a minute
        study = optuna.load_study(study_name=name, storage=_storage(path))
        study.get_trials(deepcopy=False)
    return study


def _storage(file: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(str(URL.create("sqlite", database=str(file))))
