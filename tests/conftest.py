"""Tiny images, a toy preset and a way to run commands as a user does."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
from config import NumCrops, Preset, StandardMemory, Training, Tuning
from utils import read_json, sha256_of, write_json

REPOSITORY = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
# With a data root and a results root, the toy preset below as a user would ask for it.
TOY_FLAGS = (
    *("--preset", "demo", "--patch-size", "32", "--valid-size", "6", "--test-size", "6"),
    *("--final-valid-fraction", "0.1", "--num-workers", "0", "--device", "cpu"),
)


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


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of commands: tiny models, on busy cores


def run_module(module: str, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """`python -m module arguments` in the repository, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_module(module: str, *arguments: str | Path) -> subprocess.Popen:
    """`python -m module arguments` in the repository, in a process group of its own, not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=REPOSITORY, env=os.environ | ENVIRONMENT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def children_of(parent: int) -> list[int]:
    """Process numbers of a process's children (Linux)."""
    return [int(n) for file in Path(f"/proc/{parent}/task").glob("*/children") for n in file.read_text().split()]


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process numbers of a command's workers (Linux): the children of its child that forks them."""
    return [worker for child in children_of(process.pid) for worker in children_of(child)]


def succeed(module: str, *arguments: str | Path, timeout: float = 300) -> str:
    """`run_module`, which must end well; returns what it printed."""
    done = run_module(module, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of 40 toy images; read-only by agreement."""
    root = tmp_path_factory.mktemp("data")
    write_toy_images(root)
    return root


@pytest.fixture(scope="session")
def indexed(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root that holds nothing but the index of the toy data, made by the real command."""
    results = tmp_path_factory.mktemp("indexed")
    succeed("data.data_preprocess", *TOY_FLAGS, "--data-root", toy_data, "--results-root", results)
    return results


def copy_index(source: Path, results: Path) -> Path:
    """`results`, made a results root of its own with the index of `source`."""
    shutil.copytree(source / "demo" / "dataset", results / "demo" / "dataset")
    return results


@contextmanager
def edited_index(results: Path, change: Callable[[str], str]) -> Iterator[None]:
    """In the block, the index under `results` is another, and vouched for as if preprocessing had written it."""
    index, statistics = (results / "demo" / "dataset" / name for name in ("index.csv", "statistics.json"))
    before = [(path, path.read_bytes()) for path in (index, statistics)]
    try:
        index.write_text(change(index.read_text()))
        write_json(statistics, read_json(statistics) | {"index_sha256": sha256_of(index)})
        yield
    finally:
        for path, content in before:
            path.write_bytes(content)


@pytest.fixture(scope="session")
def make_preset(toy_data: Path, indexed: Path) -> Callable[..., Preset]:
    """As `toy_preset`."""

    def make(**settings: object) -> Preset:
        toy = dict(
            data_root=toy_data,
            results_root=indexed,
            patch_size=32,
            valid_size=6,
            test_size=6,
            final_valid_fraction=0.1,
            num_workers=0,
            device="cpu",
        )
        return replace(
            config.DEMO,
            settings=replace(config.DEMO.settings, **(toy | settings)),
            tuning=Tuning(epochs=2, glass_trials=2, standard_trials=2, min_resource=1, max_resource=2),
            training=Training(epochs=2, seeds=(1,)),
            num_crops=NumCrops(epochs=1, batch_size=8, crop_counts=(1, 3)),
            standard_memory=StandardMemory(epochs=1, batch_size=8),
        )

    return make


@pytest.fixture
def toy_preset(make_preset: Callable[..., Preset]) -> Callable[..., Preset]:
    """The preset of TOY_FLAGS with the given settings changed; results go to `indexed` unless changed."""
    return make_preset


@pytest.fixture(scope="module")
def module_preset(make_preset: Callable[..., Preset]) -> Preset:
    """The preset of TOY_FLAGS."""
    return make_preset()


@pytest.fixture(autouse=True)
def _same_torch_state() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models on busy cores: two threads wait for each other far longer than they compute
