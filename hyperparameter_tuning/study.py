"""One Optuna study: `tune(preset, experiment)`. docs/method.md, Experiments 1.

Two Optuna studies hold the same trials. `stored` is an SQLite file that lasts. `live` is in memory and decides: it
suggests values and prunes. A restart rebuilds it by replaying the stored trials, so that its sampler and its pruner
arrive in the very state that they had, and the study continues as if it had never stopped.
"""

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from config import Experiment, GlassExperiment, Preset, SearchSpace, StandardExperiment, Tuning
from hyperparameter_tuning.search_spaces import search_space, suggest_experiment
from training import processes
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss
from training.loop import fit
from training.progress import EpochRecord
from training.runs import (
    RESTART,
    SETTINGS,
    RestartOption,
    RunFolder,
    Session,
    archive,
    build_job,
    open_run,
    open_session,
    resolved,
)
from training.runtime import OutOfMemory
from utils import UserError, database_problem, preset_folder, replacing, run_command

PAPER_OPTUNA = "4.6.0"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
HYPERPARAMETERS = {  # come from trials, not from the command line
    field.name for kind in (GlassExperiment, StandardExperiment) for field in fields(kind) if field.default is MISSING
} - {"name", "backbone"}
OnEpoch = Callable[[list[EpochRecord]], None]
# Trains a trial: called with the search, the trial's number and experiment, where it is resumed from, and what to call
# after each epoch with the history so far.
Train = Callable[["_Search", int, Experiment, Checkpoint, OnEpoch], object]


def main(name: str, doc: str) -> None:
    """The command of the study of experiment `name`."""
    run_command(
        doc,
        tune,
        groups=("tuning",),
        experiments=(name,),
        settings=SETTINGS,
        without=HYPERPARAMETERS,
        options=RestartOption,
    )


def fit_trial(
    search: "_Search", number: int, experiment: Experiment, checkpoint: Checkpoint, on_epoch: OnEpoch
) -> None:
    """The `Train` of the paper."""
    session = search.session
    seed, rows = session.settings.main_seed + number, (session.splits.train, session.splits.valid)
    job = build_job(session, experiment, seed, search.tuning.epochs, rows, f"{experiment.name} trial {number}")
    fit(job, checkpoint, session.stop, on_epoch=on_epoch)


def tune(preset: Preset, experiment: Experiment, restart: bool = False, train: Train = fit_trial) -> None:
    """Search the experiment's hyperparameters for the best validation accuracy, and print them.

    Writes results/<preset>/tuning/<experiment>/study.db (SQLite, opens in optuna-dashboard) and run.json.
    Killed and started again, it resumes the trial that was in progress, from its last finished epoch.

    Args:
        restart: archive what was started, and start over.
        train: what trains a trial.

    Raises:
        UserError: no index, no weights, a study that was started with other settings, or one that is in use.
        Stopped: a signal asked for it.
    """
    tuning, folder = preset.tuning, preset_folder(preset) / "tuning" / experiment.name
    if tuning.max_resource < tuning.min_resource:
        raise UserError(
            f"max_resource is {tuning.max_resource}: it must be at least min_resource = {tuning.min_resource}"
        )
    space = search_space(preset, experiment)
    fixed = {name: value for name, value in resolved(experiment).items() if name not in space}
    values = resolved(preset.settings, tuning) | fixed
    values["search_space"] = [f"{name}: {choices}" for name, choices in space.items()]
    values["study_name"] = live_study_name(experiment)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with open_session(preset) as session:
        if restart:
            archive(preset, [folder])
        with open_run(session, folder, values, results=("study.db",)) as run, _study_file(folder / "study.db"):
            if optuna.__version__ != PAPER_OPTUNA:
                run.metadata["suggestions"] = (
                    f"Optuna {optuna.__version__}: they differ from those of the paper's {PAPER_OPTUNA} from about "
                    f"trial 10 on"
                )
                print(f"{experiment.name}: suggestions of {run.metadata['suggestions']}")
            search = _Search(session, run, experiment, space, tuning, train)
            search.run_trials(tuning.trials_of(isinstance(experiment, StandardExperiment)))
            search.report()


def live_study_name(experiment: Experiment) -> str:
    """The author's name of the study: its hash assigns trials to Hyperband's brackets, and TPE sees one bracket."""
    kind = "gl" if isinstance(experiment, GlassExperiment) else "transfer"
    return f"{kind}_{experiment.backbone}_hyperparameters_optimization"


def build_live_study(name: str, seed: int, tuning: Tuning) -> optuna.Study:
    """An empty study in memory, with the paper's sampler and pruner."""
    return optuna.create_study(
        study_name=name,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.HyperbandPruner(
            min_resource=tuning.min_resource, max_resource=tuning.max_resource, reduction_factor=tuning.reduction_factor
        ),
    )


@dataclass
class _Search:
    """The study of one experiment; `live` and `stored` as the module says."""

    session: Session
    run: RunFolder
    experiment: Experiment
    space: SearchSpace
    tuning: Tuning
    train: Train

    def __post_init__(self) -> None:
        path, name = self.run.path / "study.db", self.experiment.name
        # Of several processes the others hold a copy in memory, which takes the same course.
        self.stored = _open_study(path, name) if processes.is_main() else optuna.create_study(direction="maximize")
        trials = processes.same(self.stored.trials)
        if not processes.is_main():
            self.stored.add_trials(trials)
        seed = self.session.settings.main_seed
        self.live = build_live_study(live_study_name(self.experiment), seed, self.tuning)

    def run_trials(self, total: int) -> None:
        """Replay the finished trials, then run the others up to `total`."""
        finished = [trial for trial in self.stored.trials if trial.state in FINISHED]
        for trial in finished:
            self.run.checkpoint(f"trial_{trial.number}").remove()  # a kill may have come between the two
            self._replay(trial)
        print(f"{self.experiment.name}: {len(finished)} of {total} trials are finished")
        if len(finished) < total:
            self.run.record(f"trial {len(finished)}")
        for number in range(len(finished), total):
            self.session.stop.raise_if_requested(f"before trial {number} of {self.experiment.name}")
            self._run_trial()

    def report(self) -> None:
        """Print the best trial.

        Raises:
            UserError: there is none.
        """
        if not any(trial.state == TrialState.COMPLETE for trial in self.stored.trials):
            raise UserError(f"no trial of the study {self.experiment.name} is complete: raise --trials")
        best = self.stored.best_trial
        print(f"best of {self.experiment.name}: trial {best.number}, validation accuracy {best.value:.4f}")
        for name, value in best.params.items():
            print(f"  {name} = {value!r}")

    def _replay(self, past: FrozenTrial) -> None:
        """Take `live` through a finished trial: the same draws, reports and pruning decisions as when it ran."""
        if past.state == TrialState.COMPLETE and past.value != max(past.intermediate_values.values(), default=None):
            raise UserError(
                f"trial {past.number} of the study {self.experiment.name} has the value {past.value}, which is not the "
                f"best of its epochs, so the study was edited: {RESTART}"
            )
        trial = self.live.ask()
        suggest_experiment(trial, self.space, self.experiment)
        self._check_values(trial, past)
        for epoch, accuracy in sorted(past.intermediate_values.items()):
            trial.report(accuracy, epoch)
            trial.should_prune()
        self.live.tell(trial, past.value if past.state == TrialState.COMPLETE else None, state=past.state)

    def _check_values(self, live: optuna.Trial, stored: optuna.Trial | FrozenTrial) -> None:
        if live.params != stored.params:
            raise UserError(
                f"trial {stored.number} of the study {self.experiment.name} has values that these search spaces, seed "
                f"and Optuna {optuna.__version__} do not suggest: restore them, or choose another --results-root or "
                f"--name"
            )

    def _run_trial(self) -> None:
        live = self.live.ask()
        suggested = suggest_experiment(live, self.space, self.experiment)
        stored = self._stored_trial(live.params)
        suggest_experiment(stored, self.space, self.experiment)
        self._check_values(live, stored)
        reported = self.stored.trials[stored.number].intermediate_values  # by an earlier process that was killed
        checkpoint = self.run.checkpoint(f"trial_{live.number}")
        start, accuracies = time.perf_counter(), []

        def on_epoch(history: list[EpochRecord]) -> None:
            step = history[-1].epoch - 1  # Hyperband counts from 0
            accuracy = reported.get(step, history[-1].valid_accuracy)  # what is stored is what `live` was told
            accuracies.append(accuracy)
            live.report(accuracy, step)
            if step not in reported:
                stored.report(accuracy, step)
            if live.should_prune():
                raise optuna.TrialPruned

        value, state, comment = None, TrialState.FAIL, ""
        try:
            past = checkpoint.history()  # of an earlier process
            for epochs in range(1, len(past) + 1):
                on_epoch(past[:epochs])
            with processes.errors_shared():
                self.train(self, live.number, suggested, checkpoint, on_epoch)
            value, state = max(accuracies), TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (OutOfMemory, NonFiniteLoss) as error:  # these values do not work here; the study continues without them
            if isinstance(error, OutOfMemory) and not any(t.state == TrialState.COMPLETE for t in self.stored.trials):
                raise  # nothing has ever fitted: more likely the device is taken than the values are at fault
            comment = f": {error}"
        self.live.tell(live, value, state=state)
        self.stored.tell(stored, value, state=state)
        checkpoint.remove()
        best = f"{max(accuracies):.4f}" if accuracies else "none"
        print(
            f"trial {live.number}: validation accuracy {best} after {len(accuracies)} epochs, {state.name.lower()}, "
            f"{time.perf_counter() - start:.0f} s, {live.params}{comment}",
            flush=True,
        )

    def _stored_trial(self, params: dict[str, Any]) -> optuna.Trial:
        """The stored trial for these values: the one that an earlier process did not finish, else a new one."""
        self.stored.sampler = optuna.samplers.PartialFixedSampler(params, optuna.samplers.RandomSampler())
        unfinished = [trial for trial in self.stored.trials if trial.state == TrialState.RUNNING]
        # Optuna has no public way to take up a trial of a process that is gone.
        return optuna.Trial(self.stored, unfinished[0]._trial_id) if unfinished else self.stored.ask()


# ------------------------------------------------------------------------------------------------ the SQLite file
@contextmanager
def _study_file(path: Path, *damages: type[Exception]) -> Iterator[None]:
    """What SQLite and Optuna say of a file that is damaged, held or unwritable, and `damages`, become a sentence."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, *damages) as error:
        problem = database_problem(path, error)
        raise UserError(
            f"cannot resume from {path} ({problem}): make room and let it be written, or, if it is damaged, pass "
            f"--restart to archive it and start over"
        ) from None


def _open_study(path: Path, name: str) -> optuna.Study:
    """The study in the SQLite file `path`, which is created, whole or not at all, if there is none."""

    def storage(file: Path) -> optuna.storages.RDBStorage:
        return optuna.storages.RDBStorage(str(URL.create("sqlite", database=str(file))))

    if not path.exists():
        with replacing(path) as temporary:
            created = storage(temporary)
            optuna.create_study(study_name=name, storage=created, direction="maximize")
            created.engine.dispose()
    with _study_file(path, KeyError, RuntimeError, TypeError, ValueError):  # of another study, version or content
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")  # here: Optuna would try for half a minute to add a trial
        study = optuna.load_study(study_name=name, storage=storage(path))
        study.get_trials(deepcopy=False)
    return study
