"""SIGKILL at random moments: what is started again must end as what was never interrupted, byte for byte.

    python -m tests.campaigns.kills training [--kills 40] [--seed 1]    GLASS and standard models in turn
    python -m tests.campaigns.kills tuning [--kills 20] [--seed 1]      a study with pruning
    python -m tests.campaigns.kills preprocessing [--kills 20] [--seed 1]    with --cache, and what it reads unchanged

Toy size, on the CPU. A moment is drawn between the command's first line of work and its expected end; a command that
finishes first is begun again in another folder, until there were as many kills. Exit code 1 if a single file differs.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from safetensors.numpy import load_file

from tests.conftest import TOY_FLAGS, start_module, succeed, write_toy_images
from utils import read_csv

State = dict[str, object]  # what must come out the same, by name


@dataclass
class Campaign:
    """A command, and how to see what it left.

    Args:
        command: module and flags, for a folder that holds results and cache.
        state: of such a folder.
        begun: whether work is under way there, so that a kill counts.
    """

    command: Callable[[Path], list[str]]
    state: Callable[[Path], State]
    begun: Callable[[Path], bool]

    def start(self, folder: Path) -> subprocess.Popen:
        """The command, in a process group of its own."""
        return start_module(*self.command(folder))

    def finish(self, folder: Path) -> None:
        """Run the command to its end."""
        process = self.start(folder)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    def run(self, kills: int, seed: int, make_folder: Callable[[int], Path]) -> list[str]:
        """Kill so many times; returns a sentence for each file that came out different.

        Args:
            make_folder: gives the n-th folder, ready for the command.
        """
        random_ = random.Random(seed)
        begun = time.perf_counter()
        self.finish(whole := make_folder(0))
        seconds = time.perf_counter() - begun
        expected: State = self.state(whole)
        differences, killed, number = [], 0, 1
        while killed < kills:
            folder, here = make_folder(number), 0
            while True:
                process = self.start(folder)
                while process.poll() is None and not self.begun(folder):
                    time.sleep(0.01)
                if killed < kills:
                    try:
                        process.wait(random_.uniform(0, seconds / 3))
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        killed, here = killed + 1, here + 1
                _, errors = process.communicate()
                if process.returncode == 0:
                    break
                if process.returncode != -signal.SIGKILL:
                    differences.append(f"{folder}: exit code {process.returncode}: {errors.strip()[-300:]}")
                    break
            differences += self.differences(expected, folder, f"{here} kills")
            print(f"{killed} of {kills} kills, {len(differences)} differences", file=sys.stderr)
            number += 1
        return differences

    def differences(self, expected: State, folder: Path, what: str) -> list[str]:
        """A sentence for each part of the folder's state that is not as expected."""
        found = self.state(folder)
        return [
            f"{folder} ({what}): {name} differs"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]


def digest(data: bytes) -> str:
    """Short enough to compare and print."""
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------- training
def training_state(folder: Path) -> State:
    """History without its seconds, metrics, predictions and weights of each finished seed, and what else lies there."""
    state: State = {}
    for seed in sorted((folder / "demo").glob("*/seed_*")):
        name = f"{seed.parent.name}/{seed.name}"
        rows = read_csv(seed / "history.csv")
        state[f"{name}/history"] = [{key: row[key] for key in row if key != "epoch_seconds"} for row in rows]
        for file in ("metrics.json", "predictions.csv"):
            state[f"{name}/{file}"] = (seed / file).read_bytes()
        state[f"{name}/weights"] = {
            key: digest(value.tobytes()) for key, value in load_file(seed / "model.safetensors").items()
        }
        state[f"{name}/files"] = sorted(path.name for path in seed.iterdir())
    return state


def training(data: Path, experiment: str) -> Campaign:
    """Two seeds of four epochs, saved every second step."""

    def command(folder: Path) -> list[str]:
        return [
            f"model_training.{experiment}_training", *TOY_FLAGS, "--data-root", str(data),
            *("--results-root", str(folder)),
            *("--epochs", "4", "--seeds", "1", "2", "--batch-size", "4", "--checkpoint-every", "2"),
        ]  # fmt: skip

    return Campaign(command, training_state, lambda folder: any((folder / "demo").glob("*/seed_*/run.json")))


# ------------------------------------------------------------------------------------------------------ tuning
def tuning_state(folder: Path) -> State:
    """Every trial: values, reports, state; and what else lies there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (study_folder,) = (folder / "demo" / "tuning").iterdir()
    study = optuna.load_study(study_name=study_folder.name, storage=f"sqlite:///{study_folder / 'study.db'}")
    trials = [(t.number, t.params, t.intermediate_values, t.state.name, t.value) for t in study.trials]
    return {"trials": json.dumps(trials), "files": sorted(path.name for path in study_folder.iterdir())}


def tuning(data: Path) -> Campaign:
    """Eight trials of the standard model, with pruning."""

    def command(folder: Path) -> list[str]:
        return [
            "hyperparameter_tuning.standard_convnext_tuning", *TOY_FLAGS, "--data-root", str(data),
            *("--results-root", str(folder), "--epochs", "3", "--standard-trials", "8", "--min-resource", "1"),
            *("--max-resource", "3", "--reduction-factor", "2", "--checkpoint-every", "2"),
        ]  # fmt: skip

    return Campaign(command, tuning_state, lambda folder: any((folder / "demo" / "tuning").glob("*/study.db")))


# ----------------------------------------------------------------------------------------------- preprocessing
def preprocessing_state(folder: Path) -> State:
    """Index, statistics and tables; the cache's bytes; and that no temporary file is left."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".png")]
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files}


def preprocessing(data: Path) -> Campaign:
    """Index and pixel cache, with two processes."""

    def command(folder: Path) -> list[str]:
        return [
            "data.data_preprocess", *TOY_FLAGS, "--data-root", str(data), "--results-root", str(folder / "results"),
            *("--cache-root", str(folder / "cache"), "--cache", "--num-workers", "2"),
        ]  # fmt: skip

    return Campaign(command, preprocessing_state, lambda folder: any((folder / "cache").glob("*/*.bin")))


def indexed_folders(data: Path, scratch: Path) -> Callable[[int], Path]:
    """Results roots that hold the index already."""
    index = scratch / "index"
    succeed("data.data_preprocess", *TOY_FLAGS, "--data-root", data, "--results-root", index)

    def make(number: int) -> Path:
        if not (scratch / str(number)).exists():
            shutil.copytree(index, scratch / str(number))
        return scratch / str(number)

    return make


def empty_folders(scratch: Path) -> Callable[[int], Path]:
    """Folders without anything."""

    def make(number: int) -> Path:
        (scratch / str(number)).mkdir(exist_ok=True)
        return scratch / str(number)

    return make


def main() -> None:
    """Run one campaign, say what came of it, and leave with the code that tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["training", "tuning", "preprocessing"])
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kills = arguments.kills or {"training": 40, "tuning": 20, "preprocessing": 20}[arguments.what]
    scratch = Path(tempfile.mkdtemp(prefix="kills_"))
    data = scratch / "data"
    write_toy_images(data, images_per_class=20 if arguments.what != "preprocessing" else 1500)
    before = {path: digest(path.read_bytes()) for path in data.rglob("*.*")}
    start, differences = time.perf_counter(), []
    if arguments.what == "training":
        for part, experiment in enumerate(("glass_resnet", "standard_convnext")):
            (scratch / experiment).mkdir()
            share = (kills + 1 - part) // 2
            differences += training(data, experiment).run(
                share, arguments.seed, indexed_folders(data, scratch / experiment)
            )
    elif arguments.what == "tuning":
        differences = tuning(data).run(kills, arguments.seed, indexed_folders(data, scratch))
    else:
        differences = preprocessing(data).run(kills, arguments.seed, empty_folders(scratch))
    differences += [f"{path} changed" for path in before if digest(path.read_bytes()) != before[path]]
    print("\n".join(differences))
    print(
        f"{arguments.what}: {kills} kills, seed {arguments.seed}: {len(differences)} differences, "
        f"{time.perf_counter() - start:.0f} s"
    )
    if differences:
        sys.exit(1)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
