"""Run folders: opened, locked, compared with the settings they were started with, resumed, archived.

`run.json` holds a run's metadata: resolved settings, fingerprint of the data, command, hardware, and `environments`, a
list of the commits and library versions that it ran under, and from which epoch. A run is not resumed with other
settings or data, because its numbers would belong to neither; code and libraries are only recorded.
"""

import hashlib
import itertools
import json
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import metadata as installed
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

import config
from config import NO_EFFECT, Experiment, Preset, Settings
from data.datasets import load_splits
from data.index import Index
from data.loaders import ImageLoader, build_loader
from data.splits import Splits
from data.workers import available_cores
from models.build import build_model
from training import processes
from training.checkpoints import Checkpoint
from training.loop import Job
from training.runtime import Runtime, build_runtime
from training.stopping import StopRequest, stop_signals
from training.trainer import build_trainer
from utils import UserError, command_name, first_line, locked_folder, preset_folder, read_json, sha256_of, write_json

STUDIES = (config.Tuning, config.Training, config.NumCrops, config.StandardMemory)
SETTINGS = [  # read by the commands of experiments
    field.name
    for kind in (Settings, *STUDIES)
    for field in fields(kind)
    if field.name not in ("kaggle_dataset", "cache_limit_gb")
]
MACHINE_SETTINGS = [  # they may differ between machines
    f"settings.{name}" for name in ("data_root", "results_root", "cache_root", "weights_files", "num_workers")
]
RESTART = "pass --restart to archive that folder and start over, or choose another --results-root or, for a run, --name"


# ------------------------------------------------------------------------------------------------- a command
@dataclass(frozen=True)
class RestartOption:
    """The flag of commands whose results can be started over."""

    restart: bool = False  # archive what was started, and start over


@dataclass(frozen=True)
class Session:
    """What all runs of a command share."""

    settings: Settings
    index: Index
    splits: Splits
    runtime: Runtime
    stop: StopRequest

    def loader(self, experiment: Experiment, rows: list[int], training_seed: int | None = None) -> ImageLoader:
        """`build_loader` for this process's share."""
        share = (processes.rank(), processes.size())
        return build_loader(self.settings, experiment, self.index, rows, training_seed, share)


@contextmanager
def open_session(preset: Preset) -> Iterator[Session]:
    """The preset's data set and splits, the device, and one stop request for the whole command.

    Raises:
        UserError: no index, a data set that has changed since, an unavailable device, or processes that were started
            with different settings.
    """
    with processes.joined(preset.settings.device), stop_signals() as stop:
        index, splits = load_splits(preset)
        if processes.size() > 1:
            processes.check_alike(_shared_values(preset, index))
        runtime = build_runtime(preset.settings)
        with runtime.switched():
            yield Session(preset.settings, index, splits, runtime, stop)


def _shared_values(preset: Preset, index: Index) -> dict[str, Any]:
    """What must be the same in all processes of a training: settings, data, code and libraries."""
    owners = {e.name: e for e in preset.experiments} | {k: v for k, v in vars(preset).items() if is_dataclass(v)}
    values = {f"{k}.{name}": value for k, owner in owners.items() for name, value in vars(owner).items()}
    shared = {name: value for name, value in values.items() if name not in MACHINE_SETTINGS}
    return shared | {"dataset_fingerprint": index.fingerprint, "commit": git_commit(), **library_versions()}


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_job(
    session: Session, experiment: Experiment, seed: int, epochs: int, rows: tuple[list[int], list[int]], label: str
) -> Job:
    """Seed, then build model, trainer and loaders; random draws depend on this order.

    Args:
        rows: of the index, to train on and to validate on.

    Raises:
        UserError: the model's weights are unavailable, or the device has no memory for it.
    """
    settings, (train, valid) = session.settings, rows
    seed_everything(seed)
    model = build_model(experiment, settings)
    trainer = build_trainer(model, experiment, settings, session.runtime, epochs)
    train_loader, valid_loader = session.loader(experiment, train, seed), session.loader(experiment, valid)
    if not processes.is_main():  # so that dropout differs between processes
        torch.manual_seed(seed + 1_000_003 * processes.rank())
    return Job(label, trainer, train_loader, valid_loader, epochs, settings.tensorboard)


# ---------------------------------------------------------------------------------------------- a run folder
def seed_folder(preset: Preset, experiment: str, seed: int) -> Path:
    """results/<preset>/<experiment>/seed_<seed>."""
    return preset_folder(preset) / experiment / f"seed_{seed}"


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process has locked."""

    path: Path
    metadata: dict[str, Any]
    checkpoint_every: int

    def checkpoint(self, name: str = "checkpoint", **options: Any) -> Checkpoint:
        """The checkpoint of an unfinished training in this folder; `options` are the `Checkpoint`'s."""
        return Checkpoint(self.path / f"{name}.pt", self.checkpoint_every, **options)

    def record(self, start: str) -> None:
        """Write run.json; the current commit and library versions count from `start` on, such as "epoch 1".

        Prints a line if they have changed.
        """
        if not processes.is_main():
            return
        environments, now = self.metadata["environments"], {"commit": git_commit(), "versions": library_versions()}
        if processes.size() > 1:
            now["processes"] = processes.size()
        changes = environment_changes(environments[-1], now) if environments else ""
        if changes:
            print(f"{self.path} resumes at {start} with {changes}", flush=True)
        if changes or not environments:
            environments.append({"from": start, **now})
        write_json(self.path / "run.json", self.metadata)


@contextmanager
def open_run(
    session: Session,
    folder: Path,
    values: Mapping[str, Any],
    results: Sequence[str],
    remedy: str = RESTART,
    wait: float = 0,
) -> Iterator[RunFolder]:
    """Lock `folder`, and compare its metadata with the settings of this command.

    Args:
        values: all settings that the numbers depend on.
        results: patterns of files without which a folder is not compared: a run that failed before it wrote one may
            start over with other settings.
        remedy: what the user can do where settings differ.
        wait: seconds, for a process that may hold the lock for a moment.

    Raises:
        UserError: the folder was started with other settings or data, does not say with which, or is in use.
    """
    if not processes.is_main():  # main reads and writes for all
        yield RunFolder(folder, {}, session.settings.checkpoint_every)
        return
    with locked_folder(folder, wait):
        metadata = run_metadata({**values, **session.runtime.resolved()}, session.index.fingerprint)
        metadata["memory_kind"] = session.runtime.memory_kind
        if any(path for pattern in results for path in folder.glob(pattern)):
            before = read_metadata(folder / "run.json")
            if difference := first_difference(before, metadata):
                raise UserError(f"{folder} was started with {difference}: {remedy}")
            metadata["environments"] = before["environments"]
        yield RunFolder(folder, metadata, session.settings.checkpoint_every)


def archive(preset: Preset, folders: Iterable[Path]) -> None:
    """Move those of these folders that exist from results/<preset>/<path> to results/<preset>/archive/<path>_<n>.

    Raises:
        UserError: another process has locked one of them.
    """
    results = preset_folder(preset)
    for folder in folders if processes.is_main() else ():
        if folder.exists():
            with locked_folder(folder):
                stem = results / "archive" / folder.relative_to(results)
                names = (stem.with_name(f"{stem.name}_{n}") for n in itertools.count(1))
                destination = next(path for path in names if not path.exists())
                destination.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(destination)
            print(f"archived: {destination}", flush=True)


# -------------------------------------------------------------------------------------------------- metadata
def resolved(*owners: Any) -> dict[str, Any]:
    """All fields of the settings dataclasses `owners`, as JSON-ready values."""
    values = {name: value for owner in owners for name, value in asdict(owner).items()}
    return json.loads(json.dumps(values, default=str))


def run_metadata(values: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The content of run.json, with no `environments` yet."""
    return {
        "settings": {**values, "weights_sha256": _weights_hashes(values.get("weights_files", ()))},
        "dataset_fingerprint": fingerprint,
        "command": shlex.join(["python", "-m", command_name(), *sys.argv[1:]]),
        "hardware": hardware(),
        "environments": [],
    }


def read_metadata(path: Path) -> dict[str, Any]:
    """The content of a run.json; an earlier version's commit and versions become its only environment.

    Raises:
        UserError: it is missing or damaged.
    """
    metadata = read_json(path, RESTART)
    if not isinstance(metadata.get("settings"), dict):
        raise UserError(f"{path} does not say with which settings it was started: {RESTART}")
    only = {"from": "its start", "commit": metadata.get("commit"), "versions": metadata.get("versions", {})}
    return {"dataset_fingerprint": None, "environments": [only], **metadata}


def _weights_hashes(weights_files: Iterable[str]) -> dict[str, str]:
    """Backbone -> hash of its local weights file, by which they are compared: its path may change."""
    pairs = (item.partition("=")[::2] for item in weights_files)
    return {backbone: sha256_of(Path(path)) for backbone, path in pairs if Path(path).is_file()}


@cache
def _known_settings() -> tuple[dict[str, Any], set[str]]:
    """The default of each setting that has one, and the names of those that have no effect on numbers."""
    defaults, free = {}, {"glass_trials", "standard_trials"}  # settings of an earlier version
    for kind in (Settings, *STUDIES, config.GlassExperiment, config.StandardExperiment):
        defaults |= {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        hints = get_type_hints(kind, include_extras=True)
        free |= {name for name, hint in hints.items() if NO_EFFECT in getattr(hint, "__metadata__", ())}
    return defaults, free


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str] = ()) -> str | None:
    """The first setting with an effect on numbers in which two runs differ, with both values; None if there is none.

    A setting that one of them lacks, because it was added later, has its default there.

    Args:
        before, now: metadata of each run.
        ignore: settings that are meant to differ, such as "seed".
    """
    if before["dataset_fingerprint"] != now["dataset_fingerprint"]:
        return f"dataset_fingerprint = {before['dataset_fingerprint']}, now {now['dataset_fingerprint']}"
    defaults, free = _known_settings()
    old, new = before["settings"], now["settings"]
    for name in sorted((old.keys() | new.keys()) - free - set(ignore)):
        default = defaults.get(name)
        values = [
            settings.get(name, list(default) if isinstance(default, tuple) else default) for settings in (old, new)
        ]
        if values[0] != values[1]:
            return f"{name} = {values[0]}, now {values[1]}"
    return None


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences in commit, processes and library versions, in words; empty if there are none."""
    old, new = (
        {"commit": each["commit"], "processes": each.get("processes", 1), **each["versions"]} for each in (before, now)
    )
    return ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name])


@cache
def git_commit() -> str | None:
    """The commit of this checkout, with "+" and a hash of the changes if tracked files differ; None without git."""

    def git(*arguments: str) -> bytes:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout

    try:
        changes = git("diff", "HEAD")
        commit = git("rev-parse", "HEAD").decode().strip()
        return f"{commit}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers can depend on."""
    names = ("torch", "torchvision", "timm", "optuna", "numpy", "pillow", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = installed.version(name)
        except installed.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware() -> dict[str, Any]:
    """Processor, number of cores that this process may use, and the GPU with its memory if there is one."""
    found: dict[str, Any] = {"processor": platform.machine(), "cores": available_cores()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": properties.name, "gpu_memory_mb": round(properties.total_memory / 2**20)}
    return found


def database_problem(path: Path, error: Exception) -> str:
    """What SQLite or Optuna says is wrong with the file `path`, on one line.

    Raises:
        UserError: nothing is: another program has locked it.
    """
    reason = first_line(error.__cause__ or error)
    if "database is locked" in reason:
        raise UserError(f"{path} is in use by another program: wait, or close it") from None
    return reason
