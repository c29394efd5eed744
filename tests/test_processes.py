"""Several processes of one training, under torchrun: the same numbers, errors of all, signals and kills."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import optuna
import pytest

from data.loaders import EpochBatches
from tests.conftest import PREPROCESS_FLAGS, TOY_FLAGS, copy_index, run_module, start_module, succeed, torchrun
from tests.proc import children_of
from utils import read_csv, read_json

# Small steps: Adam would turn differences of rounding into differences of weights where gradients are close to zero.
RATES = ("--dropout-rate", "0", "--lr-global", "2e-7", "--lr-local", "5e-7", "--lr-atten-class", "1e-5")
TRAINING = ("--epochs", "3", "--seeds", "1", "--batch-size", "8", "--checkpoint-every", "1", *RATES)


def command(experiment: str, data: Path, results: Path, *flags: str) -> tuple[str | Path, ...]:
    roots = ("--data-root", data, "--results-root", results)
    return (f"model_training.{experiment}_training", *TOY_FLAGS, *roots, *TRAINING, *flags)


def losses_and_predictions(results: Path, experiment: str) -> tuple[np.ndarray, np.ndarray]:
    folder = results / "demo" / experiment / "seed_1"
    history, predictions = read_csv(folder / "history.csv"), read_csv(folder / "predictions.csv")
    assert len(history) == 3
    return (
        np.array([[float(row[name]) for name in ("train_loss", "valid_loss")] for row in history]),
        np.array([[float(row[name]) for name in ("probability_fake", "label")] for row in predictions]),
    )


def assert_alike(one: Path, other: Path, experiment: str) -> None:
    (losses, predictions), (same_losses, same_predictions) = (
        losses_and_predictions(results, experiment) for results in (one, other)
    )
    np.testing.assert_allclose(losses, same_losses, rtol=1e-5)
    np.testing.assert_allclose(predictions, same_predictions, atol=1e-4)


@pytest.fixture(scope="module")
def by_one(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Results of one process, trained when they are first asked for."""
    found: dict[str, Path] = {}

    def results_of(experiment: str) -> Path:
        if experiment not in found:
            found[experiment] = copy_index(indexed, tmp_path_factory.mktemp("one") / "results")
            succeed(*command(experiment, toy_data, found[experiment]))
        return found[experiment]

    return results_of


@pytest.mark.parametrize(("experiment", "processes"), [("glass_vit", 2)])
def test_several_processes_train_and_test_as_one(
    experiment: str, processes: int, toy_data: Path, results: Path, by_one: Callable[[str], Path]
) -> None:
    done = succeed(*torchrun(processes, *command(experiment, toy_data, results)))
    assert done.count("epoch 1/3") == 1  # main alone prints
    assert_alike(results, by_one(experiment), experiment)
    run = read_json(results / "demo" / experiment / "seed_1" / "run.json")
    assert run["environments"][0]["processes"] == processes


def stopped(processes: int, *arguments: str | Path, epoch: int) -> subprocess.CompletedProcess:
    """A command that is asked to stop after it has finished an epoch: its launcher, or one process alone."""
    process = start_module(*torchrun(processes, *arguments))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f"epoch {epoch}/3" in line:
            os.kill(process.pid if processes != 2 else children_of(process.pid)[1], signal.SIGTERM)
    errors = process.stderr.read()
    return subprocess.CompletedProcess([], process.wait(60), "".join(lines), errors)


def test_a_training_goes_on_with_another_number_of_processes(
    toy_data: Path, results: Path, by_one: Callable[[str], Path]
) -> None:
    arguments = command("glass_resnet", toy_data, results)
    first, second = (stopped(processes, *arguments, epoch=epoch) for epoch, processes in ((1, 1), (2, 2)))
    assert (first.returncode, second.returncode) == (75, 1)  # torchrun's own code, whatever those of its processes are
    for done in (first, second):
        assert done.stderr.count("stopped: saved") == 1, done.stderr
    assert len(re.findall(r"exitcode +: 75", second.stderr)) == 2
    third = succeed(*torchrun(3, *arguments))
    assert "processes 2 -> 3" in third and "resumed at epoch" in third
    assert_alike(results, by_one("glass_resnet"), "glass_resnet")


def test_processes_share_every_batch() -> None:
    def batches(rank: int, size: int, training: bool) -> list[list[tuple[int, int | None]]]:
        sampler = EpochBatches(23, 5, training, batch_size=7, share=(rank, size))
        sampler.set_epoch(2, first=3)
        found = list(sampler)
        assert len(sampler) == len(found) <= sampler.rounds
        return found

    whole = batches(0, 1, training=True)
    assert [len(batch) for batch in whole] == [7, 7, 6]
    for size in (2, 3, 5):
        shares = [batches(rank, size, training=True) for rank in range(size)]
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
        rounds = chain(*(batches(rank, size, training=False) for rank in range(size)))
        assert sorted(chain(*rounds)) == [(n, None) for n in range(3, 23)]


def test_what_one_process_cannot_do_ends_all_with_one_sentence(toy_data: Path, tmp_path: Path) -> None:
    data, results = shutil.copytree(toy_data, tmp_path / "data"), tmp_path / "results"
    roots = ("--data-root", data, "--results-root", results)
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
    for path in list(data.glob("*/*"))[::7]:
        path.write_bytes(bytes(path.stat().st_size))
    done = run_module(*torchrun(2, *command("standard_resnet", data, results)[: -len(RATES)]))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert "is not what it was when the index was made" in done.stderr


def test_a_batch_that_is_too_small_for_the_processes_is_refused(toy_data: Path, results: Path) -> None:
    done = run_module(*torchrun(2, *command("glass_resnet", toy_data, results, "--batch-size", "10")))
    assert "in batches of 10 leave a batch of 1 for 2 processes: start fewer" in done.stderr
    assert (
        done.stderr.count("error: ") == 1 and not (results / "demo" / "glass_resnet" / "seed_1" / "run.json").exists()
    )


def test_two_processes_run_a_study(toy_data: Path, indexed: Path, tmp_path: Path) -> None:
    studies = []
    for processes in (1, 2):
        results = copy_index(indexed, tmp_path / str(processes))
        roots = ("--data-root", toy_data, "--results-root", results)
        flags = ("--epochs", "2", "--trials", "3", "--min-resource", "1", "--max-resource", "2")
        rest = (*TOY_FLAGS, *roots, *flags, "--reduction-factor", "2")
        done = succeed(*torchrun(processes, "hyperparameter_tuning.standard_convnext_tuning", *rest))
        assert done.count("best of standard_convnext") == 1
        storage = f"sqlite:///{results / 'demo' / 'tuning' / 'standard_convnext' / 'study.db'}"
        studies.append(optuna.load_study(study_name="standard_convnext", storage=storage).trials)
    assert [trial.params for trial in studies[0]] == [trial.params for trial in studies[1]]
    assert all(trial.state.is_finished() and trial.intermediate_values for trial in studies[1])
