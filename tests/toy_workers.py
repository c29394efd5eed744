"""Workers on one study whose trials sleep instead of training, and a campaign that kills them at random moments."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

import config
from config import Experiment, Preset
from hyperparameter_tuning.study import tune
from hyperparameter_tuning.trials import OnEpoch, Search
from tests.conftest import ENVIRONMENT
from tests.postgres import Postgres
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss
from training.progress import EpochRecord
from utils import find_experiment, run_command

NAME = "standard_vit"
EPOCHS = 4
FORKS = multiprocessing.get_context("forkserver")  # which imports the libraries once
FORKS.set_forkserver_preload(["tests.toy_workers"])


def workers_preset(data: Path, results: Path, url: str, trials: int, heartbeat: int = 1) -> Preset:
    """The demo preset with the index of the toy data (conftest's PREPROCESS_FLAGS) and a study of short trials."""
    toy = dict(data_root=data, results_root=results, patch_size=32, valid_size=6, test_size=6, device="cpu")
    tuning = dict(epochs=EPOCHS, trials=trials, min_resource=1, max_resource=EPOCHS, reduction_factor=2)
    tuning |= dict(study_storage=url, heartbeat_seconds=heartbeat)
    settings = replace(config.DEMO.settings, **toy)
    return replace(config.DEMO, settings=settings, tuning=replace(config.DEMO.tuning, **tuning))


@dataclass(frozen=True)
class Sleep:
    """A `Train` that sleeps instead of training and logs each start to a file; the trial of slot `fails` fails."""

    seconds: float  # per epoch
    starts: Path
    fails: int | None = None

    def __call__(self, search: Search, slot: int, experiment: Experiment, _: Checkpoint, on_epoch: OnEpoch) -> None:
        with open(self.starts, "a") as file:
            file.write(f"{slot}\n")
        if slot == self.fails:
            raise NonFiniteLoss("not a number")
        history: list[EpochRecord] = []
        for epoch in range(1, EPOCHS + 1):
            time.sleep(self.seconds)
            accuracy = 0.5 + 10 * experiment.lr + 0.01 * epoch
            history.append(EpochRecord(epoch, 0.0, 0.0, accuracy, 0.0, 0.0))
            on_epoch(history)


def work(preset: Preset, train: Sleep, log: Path) -> None:
    """Run the command in this new process."""
    os.setsid()
    with open(log, "a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        run_command("", lambda _: tune(preset, find_experiment(preset, NAME), train=train), argv=[])


def start(preset: Preset, seconds: float = 0.1, log: str = "log", **sleep: int) -> multiprocessing.process.BaseProcess:
    """Start a worker; its log and the starts of trials are files in the results root."""
    root = preset.settings.results_root
    os.environ.update(ENVIRONMENT)
    process = FORKS.Process(target=work, args=(preset, Sleep(seconds, root / "starts", **sleep), root / log))
    process.start()
    return process


def trials_of(results: Path) -> list[FrozenTrial]:
    """The trials of the exported study."""
    path = results / "demo" / "tuning" / NAME / "study.db"
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{path}").trials


def shake(server: Postgres, data: Path, results: Path, trials: int, kills: int, restarts: int, seed: int) -> list[str]:
    """At random moments, kill and replace a random one of four workers, or restart the server.

    Returns:
        A sentence for each thing that is wrong at the end.
    """
    moments, preset = random.Random(seed), workers_preset(data, results, server.url, trials)
    workers = [start(preset, moments.uniform(0.1, 0.3), f"log{n}") for n in range(4)]
    events = ["kill"] * kills + ["restart"] * restarts
    moments.shuffle(events)
    killed, starts = 0, results / "starts"

    def starts_so_far() -> int:
        return len(starts.read_text().split()) if starts.exists() else 0

    for number, event in enumerate(events):  # spread evenly over the study, plus a random delay
        until = time.monotonic() + 120
        while time.monotonic() < until and starts_so_far() <= number * trials / len(events):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1))
        if event == "restart":
            server.stop(moments.choice([signal.SIGINT, signal.SIGQUIT]))
            time.sleep(moments.uniform(0, 1))
            server.start()
            continue
        victim = moments.choice([n for n in range(4) if workers[n].is_alive()] or [0])
        workers[victim].kill()
        workers[victim].join()
        if workers[victim].exitcode == -signal.SIGKILL:
            killed += 1
            workers[victim] = start(preset, moments.uniform(0.1, 0.3), f"log{victim}")
    deadline, wrong = time.monotonic() + 30 + 5 * trials, []
    for number, worker in enumerate(workers):
        worker.join(max(0, deadline - time.monotonic()))
        if worker.exitcode != 0:
            text = (results / f"log{number}").read_text()[-500:]
            wrong.append(f"worker {number} ended with {worker.exitcode}: {text}")
            worker.kill()
    if wrong:
        return wrong
    found = trials_of(results)
    if [trial.user_attrs["slot"] for trial in found] != list(range(trials)):
        wrong.append(f"slots are {[trial.user_attrs['slot'] for trial in found]}")
    if states := {trial.state.name for trial in found} - {"COMPLETE", "PRUNED"}:
        wrong.append(f"there are trials in the states {states}")
    study = optuna.load_study(study_name=f"demo/{NAME}", storage=server.url)
    settled = Counter(t.user_attrs["slot"] for t in study.trials if t.state.name in ("COMPLETE", "PRUNED"))
    if settled != Counter(range(trials)):
        wrong.append(f"trials that finished, by slot: {settled}")
    if left := {trial.state.name for trial in study.trials} - {"COMPLETE", "PRUNED", "FAIL"}:
        wrong.append(f"trials were left {left}")
    started = starts_so_far()
    if started > trials + kills + 4 * restarts:
        wrong.append(f"{started} starts of {trials} trials, more than kills and restarts explain")
    if killed < kills:
        wrong.append(f"only {killed} of {kills} kills: the study was too short")
    print(f"{trials} trials, {killed} kills, {restarts} restarts of the server: {started} starts", file=sys.stderr)
    return wrong
