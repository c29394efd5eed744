"""SIGKILL at random moments: a command that is started again must end as if never interrupted, byte for byte.

    python -m tests.campaigns.kills training [--kills 40] [--seed 1]    GLASS and standard models in turn
    python -m tests.campaigns.kills processes [--kills 20] [--seed 1]   one of a training's two processes, at random
    python -m tests.campaigns.kills tuning [--kills 20] [--seed 1]      a study with pruning
    python -m tests.campaigns.kills reference [--kills 20] [--seed 1]   the author's studies, with training replaced
    python -m tests.campaigns.kills preprocessing [--kills 20] [--seed 1]    with --cache, and what it reads unchanged
    python -m tests.campaigns.kills workers [--kills 12] [--seed 1]     four of 40 trials; two restarts of the server

Toy size, on the CPU. A moment is drawn between the command's first line of work and its expected end; a command that
finishes first is started in another folder, until there were enough kills. Exit code 1 if a single file differs; for
workers (tests/toy_workers.py), if a trial is lost or doubled, or a worker hangs or fails.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
from safetensors.numpy import load_file

from data.lists import read_csv
from tests.command_server import Process
from tests.conftest import PREPROCESS_FLAGS, TOY_SETTINGS, start_module, succeed, torchrun, write_toy_images
from tests.postgres import Postgres
from tests.proc import children_of
from tests.reference_studies import STUDIES
from tests.toy_workers import shake

MEASURED = ("epoch_seconds", "images_per_second", "data_wait_share")  # columns of a history that differ between runs
State = dict[str, object]  # file -> what must be the same in it


@dataclass(frozen=True)
class Campaign:
    """A command to kill.

    Args:
        started: pattern of a file below a folder of results and cache that exists once the command works.
        indexed: whether the command needs the index of its data.
        processes: number that torchrun starts; one of them is killed.
    """

    module: str
    flags: tuple[str, ...]
    started: str
    indexed: bool = True
    processes: int = 1

    def command(self, data: Path, folder: Path) -> list[str | Path]:
        places = ("--results-root", folder / "results", "--cache-root", folder / "cache")
        return torchrun(self.processes, self.module, *self.flags, "--data-root", data, *places)

    def kill(self, process: Process, random_: random.Random) -> int:
        """Kill the command, or one of the processes of torchrun; returns the number of kills, 0 if all had ended."""
        if self.processes == 1:
            os.killpg(process.pid, signal.SIGKILL)
            return 1
        running = children_of(process.pid)
        for one in random_.sample(running, min(1, len(running))):
            os.kill(one, signal.SIGKILL)
        return min(1, len(running))

    def folder(self, data: Path, path: Path) -> Path:
        """Prepare `path` for the command; returns it."""
        if self.indexed:
            roots = ("--data-root", data, "--results-root", path / "results")
            succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
        return path

    def run(self, kills: int, seed: int, data: Path, scratch: Path) -> list[str]:
        """Kill this many times; returns a sentence for each file that is different in the end."""
        random_, ready = random.Random(seed), self.folder(data, scratch / "ready")
        ready.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        succeed(*self.command(data, whole := shutil.copytree(ready, scratch / "whole")))
        seconds = time.perf_counter() - start
        expected, differences, killed = state_of(whole), [], 0
        while killed < kills:
            folder, here = shutil.copytree(ready, scratch / f"after {killed} kills"), 0
            while True:
                process = start_module(*self.command(data, folder))
                while process.poll() is None and not any(folder.glob(self.started)):
                    time.sleep(0.01)
                if killed < kills:
                    try:
                        process.wait(random_.uniform(0, seconds / 3))
                    except subprocess.TimeoutExpired:
                        kills_now = self.kill(process, random_)
                        killed, here = killed + kills_now, here + kills_now
                _, errors = process.communicate()
                if process.returncode == 0:
                    break
                if process.returncode != (-signal.SIGKILL if self.processes == 1 else 1):
                    differences.append(f"{folder}: exit code {process.returncode}: {errors.strip()[-300:]}")
                    break
            differences += different(expected, state_of(folder), f"{folder} ({here} kills)")
            print(f"{killed} of {kills} kills, {len(differences)} differences", file=sys.stderr)
        return differences


class Workers:
    """Four workers on one study, three trials and more for each kill, with two restarts of the server."""

    def run(self, kills: int, seed: int, data: Path, scratch: Path) -> list[str]:
        """Kill this many times; returns a sentence for each thing that is wrong."""
        results = scratch / "results"
        succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", data, "--results-root", results)
        with Postgres() as server:
            return shake(server, data, results, trials=max(40, 3 * kills), kills=kills, restarts=2, seed=seed)


def training(experiment: str, processes: int = 1) -> Campaign:
    """Two seeds of four epochs, saved every second step."""
    flags = (*TOY_SETTINGS, "--epochs", "4", "--seeds", "1", "2", "--batch-size", "4", "--checkpoint-every", "2")
    return Campaign(f"model_training.{experiment}_training", flags, "results/demo/*/seed_*/run.json", True, processes)


TRIALS = ("--epochs", "3", "--trials", "8", "--min-resource", "1", "--max-resource", "3")
TUNING = Campaign(
    "hyperparameter_tuning.standard_convnext_tuning",
    (*TOY_SETTINGS, *TRIALS, "--reduction-factor", "2", "--checkpoint-every", "2"),
    "results/demo/tuning/*/study.db",
)
PREPROCESSING = Campaign(
    "data.data_preprocess", (*PREPROCESS_FLAGS, "--cache", "--num-workers", "2"), "cache/*/views_*/*/*", indexed=False
)
CAMPAIGNS = {  # and the default number of kills
    "training": ((training("glass_resnet"), training("standard_convnext")), 40),
    "processes": ((training("glass_resnet", 2), training("standard_convnext", 3)), 20),
    "tuning": ((TUNING,), 20),
    "reference": (tuple(Campaign("tests.reference_studies", (name,), TUNING.started) for name in STUDIES), 20),
    "preprocessing": ((PREPROCESSING,), 20),
    "workers": ((Workers(),), 12),
}


def different(expected: State, found: State, where: str) -> list[str]:
    """A sentence for each part of a state that is not as expected."""
    names = sorted(expected.keys() | found.keys())
    return [f"{where}: {name} differs" for name in names if expected.get(name) != found.get(name)]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def state_of(folder: Path) -> State:
    """What a folder holds, file by file, without archives.

    Histories without their times, studies as their trials, weights by tensor, pictures and metadata only by name.
    """
    state: State = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "archive" in path.relative_to(folder).parts:
            continue
        if path.name == "history.csv":
            state[name] = [{key: row[key] for key in row if key not in MEASURED} for row in read_csv(path)]
        elif path.name == "study.db":
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            study = optuna.load_study(study_name=path.parent.name, storage=f"sqlite:///{path}")
            trials = [(t.number, t.params, t.intermediate_values, t.state.name, t.value) for t in study.trials]
            state[name] = json.dumps(trials)
        elif path.suffix == ".safetensors":
            state[name] = {key: digest(value.tobytes()) for key, value in load_file(path).items()}
        else:
            metadata = path.suffix == ".png" or path.name in (".lock", "run.json")
            state[name] = "" if metadata else digest(path.read_bytes())
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CAMPAIGNS))
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    campaigns, usual = CAMPAIGNS[arguments.what]
    kills, scratch = arguments.kills or usual, Path(tempfile.mkdtemp(prefix="kills_"))
    write_toy_images(data := scratch / "data", images_per_class=20 if arguments.what != "preprocessing" else 1500)
    before = {path: digest(path.read_bytes()) for path in data.rglob("*.*")}
    start, differences = time.perf_counter(), []
    for part, campaign in enumerate(campaigns):
        share = (kills + len(campaigns) - 1 - part) // len(campaigns)
        differences += campaign.run(share, arguments.seed, data, scratch / str(part))
    differences += [f"{path} changed" for path in before if digest(path.read_bytes()) != before[path]]
    print("\n".join(differences))
    took = f"{time.perf_counter() - start:.0f} s"
    print(f"{arguments.what}: {kills} kills, seed {arguments.seed}: {len(differences)} differences, {took}")
    if differences:
        sys.exit(1)
    shutil.rmtree(scratch)
