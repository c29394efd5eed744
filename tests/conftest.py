"""Tiny images, a toy preset and a way to run commands as a user does."""

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
from config import NumCrops, Preset, StandardMemory, Training, Tuning
from data.datasets import load_splits
from models.build import build_model
from tests.command_server import Process, Server
from training.checkpoints import save_model
from training.loop import Job
from training.runs import Session, build_job, resolved
from training.runtime import build_runtime
from training.stopping import StopRequest
from utils import find_experiment, read_json, sha256_of, write_json

REPOSITORY = Path(__file__).parents[1]
MakePreset = Callable[..., Preset]  # the toy preset with these settings
LONG = (  # test files, the longest first
    "reliability processes commands predict evaluate workers list layouts tuning samplers config ablations training "
    "checkpointing"
)
FIXTURES = Path(__file__).parent / "fixtures"
# With a data root and a results root, the toy preset below on the command line.
TOY_SETTINGS = (
    *("--preset", "demo", "--patch-size", "32", "--valid-size", "6", "--test-size", "6"),
    *("--final-valid-fraction", "0.1", "--num-workers", "0", "--device", "cpu"),
)
TOY_BACKBONE = "timm:test_resnet"  # half a million parameters, a tenth of the demo's
TOY_FLAGS = (*TOY_SETTINGS, "--backbone", TOY_BACKBONE)
PREPROCESS_FLAGS = ("--preset", "demo", "--patch-size", "32", "--num-workers", "0")  # the same for data_preprocess


def write_toy_images(root: Path, images_per_class: int = 20) -> None:
    """Noise of two kinds, 40 to 120 pixels a side, half JPEG and half PNG."""
    random = np.random.default_rng(0)
    for label, class_name in enumerate(("fake", "real")):
        (root / class_name).mkdir(parents=True)
        for i in range(images_per_class):
            height, width = random.integers(40, 120, 2)
            pixels = random.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
            pixels = pixels.repeat(2, 0).repeat(2, 1) if label == 0 else np.tile(pixels, (2, 2, 1))
            Image.fromarray(pixels).save(root / class_name / f"{i:04d}.{'jpg' if i % 2 else 'png'}")


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # for commands: tiny models, on busy cores


_servers = threading.local()  # one for each thread


def _server() -> Server:
    if not hasattr(_servers, "server"):
        _servers.server = Server(REPOSITORY, os.environ | ENVIRONMENT)
    return _servers.server


def run_module(module: str, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """`python -m module arguments` in the repository, without a terminal; libraries are imported already."""
    return _server().run([module, *map(str, arguments)], os.environ | ENVIRONMENT, timeout)


def start_module(module: str, *arguments: str | Path) -> Process:
    """The same without waiting for it: in a process group of its own, its output in pipes."""
    return _server().start([module, *map(str, arguments)], os.environ | ENVIRONMENT)


def start_afresh(module: str, *arguments: str | Path) -> subprocess.Popen:
    """The same in a new interpreter, for environment variables that libraries read when they are imported."""
    command, environment = [sys.executable, "-m", module, *map(str, arguments)], os.environ | ENVIRONMENT
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so do their commands
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **options)


def torchrun(processes: int, module: str, *arguments: str | Path) -> list[str | Path]:
    """The arguments for `start_module` and the others that run a command with this number of processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "-m", module, *arguments] if processes > 1 else [module, *arguments]


def succeed(module: str, *arguments: str | Path, timeout: float = 300) -> str:
    """`run_module`, which must succeed; returns what it printed."""
    done = run_module(module, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(module: str, *arguments: str | Path) -> str:
    """`run_module`, which must end with exit code 2; returns its one sentence on stderr."""
    done = run_module(module, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def wait_until(there: Callable[[], object], process: Process | None = None) -> None:
    """Wait until `there()` is true or the process has ended, two minutes at most."""
    deadline = time.monotonic() + 120
    while not there() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def help_of(command: Path) -> str:
    """What the command in this file prints for --help."""
    argv, printed = sys.argv, io.StringIO()
    sys.argv = [command.name, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(command), run_name="__main__")
    finally:
        sys.argv = argv
    return re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue())


def untrained_weights(path: Path, name: str) -> Path:
    """Write the initial weights of the demo's experiment `name`, with patches of 32 pixels; returns `path`."""
    torch.manual_seed(0)
    settings = replace(config.DEMO.settings, patch_size=32, device="cpu")
    experiment = find_experiment(config.DEMO, name)
    about = {"experiment": asdict(experiment), "settings": resolved(settings)}
    save_model(path, build_model(experiment, settings).state_dict(), about)
    return path


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of 40 toy images; no test writes to it."""
    root = tmp_path_factory.mktemp("data")
    write_toy_images(root)
    return root


@pytest.fixture(scope="session")
def indexed(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root with only the index of the toy data, made by the real command."""
    results = tmp_path_factory.mktemp("indexed")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", toy_data, "--results-root", results)
    return results


def copy_index(source: Path, results: Path) -> Path:
    """Make `results` a results root with a copy of the index in `source`; returns it."""
    shutil.copytree(source / "demo" / "dataset", results / "demo" / "dataset")
    return results


@pytest.fixture(scope="session")
def trained(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root with a GLASS model of two seeds and a standard model of one, a batch of training each."""
    root = copy_index(indexed, tmp_path_factory.mktemp("own") / "results")
    flags = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", root, "--epochs", "1")
    flags += ("--final-valid-fraction", "0.4")  # enough of both classes to calibrate by
    succeed("model_training.glass_resnet_training", *flags, "--seeds", "1", "2")
    succeed("model_training.standard_resnet_training", *flags, "--seeds", "1")
    return root


@pytest.fixture
def results(indexed: Path, tmp_path: Path) -> Path:
    """A new results root with the index of the toy data."""
    return copy_index(indexed, tmp_path / "results")


def edit_index(results: Path, change: Callable[[str], str]) -> None:
    """Change the index under `results`, with a matching hash, as if preprocessing had written it."""
    index, statistics = (results / "demo" / "dataset" / name for name in ("index.csv", "statistics.json"))
    index.write_text(change(index.read_text()))
    write_json(statistics, read_json(statistics) | {"index_sha256": sha256_of(index)})


@pytest.fixture(scope="session")
def toy_preset(toy_data: Path, indexed: Path) -> MakePreset:
    """The preset of TOY_FLAGS with the given settings changed; results go to `indexed` unless changed."""
    toy = dict(data_root=toy_data, results_root=indexed, patch_size=32, valid_size=6, test_size=6)
    toy |= dict(final_valid_fraction=0.1, num_workers=0, device="cpu")

    def make(**settings: object) -> Preset:
        return replace(
            config.DEMO,
            settings=replace(config.DEMO.settings, **(toy | settings)),
            experiments=tuple(
                replace(e, backbone=f"timm:test_{e.name.partition('_')[2]}") for e in config.DEMO.experiments
            ),
            tuning=Tuning(epochs=2, trials=2, min_resource=1, max_resource=2),
            training=Training(epochs=2, seeds=(1,)),
            num_crops=NumCrops(epochs=1, batch_size=8, crop_counts=(1, 3)),
            standard_memory=StandardMemory(epochs=1, batch_size=8),
        )

    return make


class Bomb:
    """Creates the folder `target` when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def toy_job(preset: Preset, name: str = "standard_resnet", epochs: int = 2, **changes: object) -> Job:
    """A training of the preset's experiment `name`, with batches of 8 and these hyperparameters changed, of seed 1."""
    experiment = replace(find_experiment(preset, name), **{"batch_size": 8, **changes})
    index, splits = load_splits(preset)
    session = Session(preset.settings, index, splits, build_runtime(preset.settings), StopRequest())
    return build_job(session, experiment, 1, epochs, (splits.train, splits.valid), name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left with one while the others have nothing to do."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def _same_torch_state() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on busy cores, threads of tiny models wait for each other longer than they compute
