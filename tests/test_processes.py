"""Several processes of one training, under torchrun: the same numbers as one, shared errors, signals."""

import re
import shutil
import socket
import subprocess
from dataclasses import replace
from itertools import chain
from pathlib import Path

import optuna
import pytest

from config import DEMO
from data.loaders import EpochBatches
from hyperparameter_tuning.study import build_live_study
from hyperparameter_tuning.trials import author_study_name, suggest_experiment
from tests.campaigns.processes import RATES, command, differences, stop_after
from tests.conftest import (
    PREPROCESS_FLAGS,
    TOY_BACKBONE,
    TOY_FLAGS,
    copy_index,
    refused,
    run_module,
    start_module,
    succeed,
    torchrun,
)
from utils import find_experiment, read_json

EPOCHS = ("--epochs", "3")


def toy(experiment: str, *places: Path) -> tuple[str | Path, ...]:
    """`command` with timm's smallest model of this kind, since it saves after each step."""
    return (*command(experiment, *places), *EPOCHS, "--backbone", f"timm:test_{experiment.partition('_')[2]}")


def assert_as_with_one_process(experiment: str, results: Path, data: Path, indexed: Path, folder: Path) -> None:
    one = copy_index(indexed, folder / "one process")
    succeed(*toy(experiment, data, one))
    loss, prediction = differences(one, results, experiment)
    assert loss <= 1e-5 and prediction <= 1e-4


def test_two_processes_train_and_test_as_one(toy_data: Path, indexed: Path, results: Path, tmp_path: Path) -> None:
    more = ("--activation-checkpointing", "on")  # the backward pass then repeats sums over processes
    done = succeed(*torchrun(2, *toy("glass_vit", toy_data, results), *more))
    assert done.count("epoch 1/3") == 1  # main alone prints
    assert_as_with_one_process("glass_vit", results, toy_data, indexed, tmp_path)
    run = read_json(results / "demo" / "glass_vit" / "seed_1" / "run.json")
    assert run["environments"][0]["processes"] == 2


@pytest.mark.slow
def test_a_training_resumes_with_another_number_of_processes(
    toy_data: Path, indexed: Path, results: Path, tmp_path: Path
) -> None:
    arguments = toy("glass_resnet", toy_data, results)
    for epoch, processes, expected in ((1, 1, 75), (2, 2, 1)):  # torchrun exits with 1 if a process fails
        code, errors = stop_after(epoch, processes, *arguments)
        assert code == expected and errors.count("stopped: saved") == 1, errors
    third = succeed(*torchrun(3, *arguments))
    assert "processes 2 -> 3" in third and "resumed at epoch" in third
    assert_as_with_one_process("glass_resnet", results, toy_data, indexed, tmp_path)


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


def test_an_error_of_one_process_ends_all_with_one_sentence(toy_data: Path, tmp_path: Path) -> None:
    data, results = shutil.copytree(toy_data, tmp_path / "data"), tmp_path / "results"
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", data, "--results-root", results)
    arguments = (*command("standard_resnet", data, results)[: -len(RATES)], "--backbone", TOY_BACKBONE)
    (late := results / "demo" / "standard_resnet" / "seed_2" / "predictions.csv").mkdir(parents=True)
    unwritable = run_module(*torchrun(2, *arguments, "--seeds", "2"))  # by main, when the other has finished
    late.rmdir()
    for path in list(data.glob("*/*"))[::7]:
        path.write_bytes(bytes(path.stat().st_size))
    unreadable = run_module(*torchrun(2, *arguments))
    assert_refused(unwritable, f"{late} cannot be written")
    assert_refused(unreadable, "has changed since preprocessing")


@pytest.mark.slow
def test_a_batch_of_fewer_images_than_processes_is_refused(toy_data: Path, results: Path) -> None:
    arguments = (*command("standard_resnet", toy_data, results)[: -len(RATES)], "--backbone", TOY_BACKBONE)
    done = run_module(*torchrun(2, *arguments, "--batch-size", "10"))
    assert_refused(done, "in batches of 10 leave a batch of 1 for 2 processes: start fewer")


def assert_refused(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("error: ") == 1, done.stderr


@pytest.mark.slow
def test_two_processes_measure_costs_that_one_prints(toy_data: Path, results: Path) -> None:
    flags = ("--data-root", toy_data, "--results-root", results, "--epochs", "1", "--batch-size", "8")
    sweep = torchrun(2, "num_crops.num_crops_resnet", *TOY_FLAGS, *flags, "--crop-counts", "1", "3")
    printed = succeed(*sweep)
    for line in ("K = 1: ", "K = 3: ", "peak_memory_mb = ", "epoch_seconds = "):
        assert printed.count(line) == 1


@pytest.mark.slow
def test_machines_that_are_started_with_different_settings_are_refused(toy_data: Path, results: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = ("--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", at, "-m")
    arguments = (*command("standard_resnet", toy_data, results)[: -len(RATES)], "--backbone", TOY_BACKBONE)
    machines = [
        start_module("torch.distributed.run", *launcher, *arguments, "--lr", rate) for rate in ("0.001", "0.002")
    ]
    errors = "".join(machine.communicate(timeout=200)[1] for machine in machines)
    assert [machine.returncode for machine in machines] == [1, 1], errors
    assert re.findall(
        r"error: process 1 of this command has standard_resnet\.lr = 0.00\d, and process 0 has 0.00\d: start", errors
    )
    assert errors.count("error: ") == 1 and not list(results.glob("*/standard_resnet"))


def test_commands_that_do_not_train_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "torchrun is for commands that train: start python -m model_training.reproduce by itself" in refused(
        "model_training.reproduce", "--preset", "demo"
    )


@pytest.mark.slow
def test_two_processes_run_a_study(toy_data: Path, results: Path) -> None:
    name, tuning = "standard_convnext", replace(DEMO.tuning, epochs=2, trials=3, min_resource=1, max_resource=2)
    flags = ("--epochs", "2", "--trials", "3", "--min-resource", "1", "--max-resource", "2")
    rest = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", results, *flags)
    done = succeed(*torchrun(2, f"hyperparameter_tuning.{name}_tuning", *rest))
    assert done.count(f"best of {name}") == 1
    storage = f"sqlite:///{results / 'demo' / 'tuning' / name / 'study.db'}"
    trials = optuna.load_study(study_name=name, storage=storage).trials
    assert all(trial.state.is_finished() and trial.intermediate_values for trial in trials)
    experiment = find_experiment(DEMO, name)
    plain = build_live_study(author_study_name(experiment), DEMO.settings.main_seed, tuning)
    expected = [vars(suggest_experiment(plain.ask(), DEMO.standard_space, experiment)) for _ in trials]
    assert [vars(experiment) | trial.params for trial in trials] == expected
