"""One Optuna study on many machines: each runs `Worker.run`. docs/cluster.md.

The study has slots 0 .. n - 1, one trial each. A trial whose worker died or was stopped is failed without a reason,
and `reconcile` gives its slot a new one with the same values. What all workers share is changed under one lock of the
server, which ends with its holder; a change that was interrupted at any moment is completed by the next `reconcile`.
"""

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from config import Experiment
from hyperparameter_tuning.trials import (
    Search,
    SlotPruner,
    author_study_name,
    open_study,
    print_best,
    suggest_experiment,
    write_study,
)
from training.checkpoints import Checkpoint
from training.runs import RunFolder, first_difference, open_run
from utils import UserError, first_line, write_json

GRACE = 5  # heartbeats that a worker may miss, and that it waits for a server that is away
REPEATS = 3  # of a trial whose worker died each time
AWAY = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)  # raised where the database is away
LOCK = sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


def attempts_of(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Slot -> its trials, by number."""
    slots = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        if "slot" in trial.user_attrs:  # not one that somebody added by hand
            slots[trial.user_attrs["slot"]].append(trial)
    return slots


def counting(attempts: list[FrozenTrial]) -> list[FrozenTrial]:
    """A slot's trials without those that failed without a reason: first finished, then running, then waiting ones."""
    found = [trial for trial in attempts if trial.state != TrialState.FAIL or "failure" in trial.user_attrs]
    return sorted(found, key=lambda trial: (not trial.state.is_finished(), trial.state.value, trial.number))


def reconcile(study: optuna.Study, storage: RDBStorage, total: int) -> dict[int, FrozenTrial]:
    """Fail the trials of dead workers, and give each of `total` slots one trial that counts. Call it under the lock.

    Returns:
        Slot -> that trial, for all slots: an earlier worker may have wanted more than `total`.
    """
    fail_stale_trials(study)
    slots = attempts_of(study)
    for slot in range(max([total, *(slot + 1 for slot in slots)])):
        for double in counting(slots[slot])[1:]:  # a worker lost the lock with its connection and did not notice
            with suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(double._trial_id, TrialState.FAIL)
        if not slots[slot]:
            study.enqueue_trial({}, {"slot": slot})
        elif not counting(slots[slot]):
            last = slots[slot][-1]
            died = sum("given_back" not in trial.user_attrs for trial in slots[slot])
            if died <= REPEATS:
                values = last.system_attrs.get("fixed_params", {}) | last.params
                study.enqueue_trial(values, {"slot": slot, "repeats": last.number})
                continue
            failure = f"its worker died {died} times: see the machines' logs, most often for main memory"
            print(f"trial {slot} is given up: {failure}", flush=True)
            own = {"params": last.params, "distributions": last.distributions}
            about = {"slot": slot, "repeats": last.number, "failure": failure}
            study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=about, **own))
    return {slot: counting(attempts)[0] for slot, attempts in sorted(attempts_of(study).items())}


@dataclass
class Worker(Search):
    """One of the processes that work on a study.

    Args:
        folder: for results; workers may share it.
        values: all settings that the numbers depend on.
        name: the study's name in the database.
    """

    folder: Path
    values: dict[str, Any]
    name: str

    def __post_init__(self) -> None:
        self.slots: dict[int, FrozenTrial] = {}  # what `reconcile` last returned
        self.heartbeat = self.tuning.heartbeat_seconds
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # `_patiently` handles what it warns about
        # One clock for all workers; and one that is suspended does not keep the lock for long.
        options = f"-c timezone=UTC -c lock_timeout=10s -c idle_in_transaction_session_timeout={10 + self.heartbeat}s"
        self.connect_args = {"connect_timeout": 10, "tcp_user_timeout": 60_000, "options": options}
        try:
            url = sqlalchemy.make_url(self.tuning.study_storage)
            self.shown = url.render_as_string()  # without the password
            if url.drivername != "postgresql+psycopg":
                raise UserError(f"study_storage is {self.shown}: it must be postgresql+psycopg://USER@HOST/DATABASE")
            self.engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=self.connect_args)
        except sqlalchemy.exc.ArgumentError as error:
            raise UserError(f"study_storage is not the URL of a database: {first_line(error)}") from None
        except ImportError:
            raise UserError("study_storage needs psycopg: pip install -r requirements-distributed.txt") from None

    def run(self) -> None:
        """Work on trials until none is left, then write study.db and run.json to the folder, and print the best.

        Raises:
            UserError: the study or the folder was started with other settings, or the database is away.
            Stopped: a signal asked to stop; the trial in progress was given back.
        """
        self._patiently(self._open)
        while not all(trial.state.is_finished() for trial in self.slots.values()):
            self.session.stop.raise_if_requested(f"between two trials of {self.name}")
            if taken := self._patiently(self._take):
                self._work(*taken)
            else:
                self._pause()  # others are running; one may die
        self._patiently(self._export)

    # ------------------------------------------------------------------------------------- under the lock
    @contextmanager
    def _locked(self) -> Iterator[None]:
        """In the block, no other worker changes what all share; the server ends the lock of a worker that dies."""
        with self.engine.begin() as connection:
            connection.execute(LOCK, {"name": self.name})
            yield

    def _open(self) -> None:
        with self._locked():  # Optuna fails if two processes create its tables at once
            url, engine = self.tuning.study_storage, {"pool_pre_ping": True, "connect_args": self.connect_args}
            beats = {"heartbeat_interval": self.heartbeat, "grace_period": GRACE * self.heartbeat}
            self.storage = RDBStorage(url, engine, **beats)
            new = {"study_name": self.name, "direction": "maximize", "load_if_exists": True}
            study = optuna.create_study(storage=self.storage, **new)
            self.created = study.user_attrs.get("created", datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
            study.set_user_attr("created", self.created)
            self.values |= {"database_study": self.created, "study_storage": self.shown}
            self.values |= {"optuna": optuna.__version__, "heartbeat": self.heartbeat}  # must be the same for all
            with self._run_folder(study) as run:
                self.slots = reconcile(study, self.storage, self.total)
                finished = sum(trial.state.is_finished() for trial in self.slots.values())
                run.record(f"trial {finished}")
                study.set_user_attr("metadata", run.metadata)
        print(f"{self.experiment.name}: {finished} of {len(self.slots)} trials are finished", flush=True)

    @contextmanager
    def _run_folder(self, study: optuna.Study) -> Iterator[RunFolder]:
        """The locked folder with the study's metadata, after both are compared with this worker's settings."""
        other = "choose another --name or"
        with open_run(self.session, self.folder, self.values, ("study.db",), f"{other} --results-root", wait=10) as run:
            run.metadata["command"] = run.metadata["command"].replace(self.tuning.study_storage, self.shown)
            metadata = study.user_attrs.get("metadata", run.metadata)
            if difference := first_difference(metadata, run.metadata):
                raise UserError(f"the study {self.name} was started with {difference}: {other} --study-storage")
            yield replace(run, metadata=metadata)

    def _take(self) -> tuple[optuna.Trial, int, Experiment] | None:
        """Set a waiting trial to running; returns it with its slot and experiment, None if there is none."""
        with self._locked():
            pruner = SlotPruner(author_study_name(self.experiment), self.tuning)
            study = optuna.load_study(study_name=self.name, storage=self.storage, pruner=pruner)
            self.slots = reconcile(study, self.storage, self.total)
            for slot, found in self.slots.items():
                if found.state != TrialState.WAITING:
                    continue
                seed, number = self.session.settings.main_seed + slot, found._trial_id
                study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                # Not `ask`, which may make a new trial. If the lock was lost, another worker may have failed this one.
                with suppress(UpdateFinishedTrialError):
                    self.storage.record_heartbeat(number)  # first: without a heartbeat it would never become stale
                    if self.storage.set_trial_state_values(number, TrialState.RUNNING):
                        trial = optuna.Trial(study, number)
                        return trial, slot, suggest_experiment(trial, self.space, self.experiment)
        return None

    def _export(self) -> None:
        name, study = self.experiment.name, optuna.load_study(study_name=self.name, storage=self.storage)
        with self._locked(), self._run_folder(study) as run:
            write_json(run.path / "run.json", run.metadata)
            write_study(run.path / "study.db", name, self.slots.values())
            checkpoints = run.path / "checkpoints"
            for leftover in checkpoints.glob("*/*.pt"):
                leftover.unlink(missing_ok=True)
            for folder in (*checkpoints.glob("*"), checkpoints):
                with suppress(OSError):  # it has files for TensorBoard, or does not exist
                    folder.rmdir()
            print_best(open_study(run.path / "study.db", name), name)

    # -------------------------------------------------------------------------------------------- a trial
    def _work(self, trial: optuna.Trial, slot: int, experiment: Experiment) -> None:
        """Train a trial and store how it ended; give it back if anything else interrupts it."""
        over = threading.Event()

        def report(accuracy: float, step: int) -> tuple[float, bool]:
            self._patiently(lambda: trial.report(accuracy, step))
            return accuracy, self._patiently(trial.should_prune)

        def tell() -> None:
            if outcome.failure:
                trial.set_user_attr("failure", outcome.failure)
            values = {TrialState.COMPLETE: [outcome.value], TrialState.PRUNED: outcome.accuracies[-1:]}
            self.storage.set_trial_state_values(trial._trial_id, outcome.state, values.get(outcome.state))

        def beat() -> None:
            while not over.wait(self.heartbeat):
                with suppress(*AWAY):  # the next heartbeat will do
                    self.storage.record_heartbeat(trial._trial_id)

        threading.Thread(target=beat, daemon=True).start()
        try:
            checkpoints = self._checkpoints(trial, slot)
            outcome = self.train_trial(slot, experiment, checkpoints[-1], report, trial.study)
            self._patiently(tell)
        except UpdateFinishedTrialError:
            print(f"trial {slot} was given to another worker, for which this one was too slow to answer", flush=True)
            return
        except BaseException:
            with suppress(UpdateFinishedTrialError, *AWAY):
                trial.set_user_attr("given_back", True)
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            raise
        finally:
            over.set()
        for checkpoint in checkpoints:
            checkpoint.remove()
        outcome.print(slot, trial.params)

    def _checkpoints(self, trial: optuna.Trial, slot: int) -> list[Checkpoint]:
        """Checkpoints of the slot's trials up to this one, which takes over the file of the one before.

        Each trial has a file of its own, since two workers may train the same slot for a while.
        """
        numbers = [each.number for each in self._patiently(lambda: attempts_of(trial.study))[slot]]
        folder = self.folder / "checkpoints" / self.created  # apart from those of another study of this name
        paths = [folder / f"trial_{number}.pt" for number in numbers if number <= trial.number]
        if there := [path for path in paths if path.exists()]:
            there[-1].rename(paths[-1])
        return [Checkpoint(path, self.session.settings.checkpoint_every) for path in paths]

    # --------------------------------------------------------------------------------------- the database
    def _pause(self) -> None:
        until = time.monotonic() + random.uniform(0.5, 1) * min(2, self.heartbeat)
        while time.monotonic() < until and not self.session.stop.requested:
            time.sleep(0.1)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Call `action` until the database is not away; returns what it returns.

        Raises:
            UserError: the database stays away.
            Stopped: a signal asked to stop.
        """
        seconds = 10 + GRACE * self.heartbeat
        deadline = time.monotonic() + seconds
        for attempt in itertools.count():
            try:
                return action()
            except UpdateFinishedTrialError:
                raise
            except (KeyError, RuntimeError) as error:  # the study was deleted, or has another version
                raise UserError(f"{self.shown} has no usable {self.name} ({first_line(error)}): start again") from None
            except AWAY as error:
                problem = f"{self.shown} is away ({first_line(error.__cause__ or error)})"
            if time.monotonic() > deadline:
                remedy = "start the server, or correct --study-storage, and run the same command again"
                raise UserError(f"{problem}, for more than {seconds} s: {remedy}")
            if not attempt:
                print(f"{problem}: waiting", flush=True)
            self._pause()
            self.session.stop.raise_if_requested(f"while {self.shown} is away")
