"""What was stopped goes on exactly; what must not be mixed is refused; what fails says why. Short campaigns."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.index import list_images
from tests.campaigns import kills, mutated_images
from tests.conftest import REPOSITORY, TOY_FLAGS, copy_index, run_module, succeed
from utils import STOPPED, UserError, read_json, sole_process, stop_signals

TRAINING = "model_training.standard_resnet_training"


def flags(toy_data: Path, results: Path, *more: str) -> list[str | Path]:
    run = ("--epochs", "3", "--seeds", "1", "--batch-size", "4")
    return [*TOY_FLAGS, "--data-root", toy_data, "--results-root", results, *run, *more]


def seed_folder(results: Path) -> Path:
    return results / "demo" / "standard_resnet" / "seed_1"


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> kills.State:
    results = copy_index(indexed, tmp_path_factory.mktemp("uninterrupted"))
    succeed(TRAINING, *flags(toy_data, results))
    return kills.training_state(results)


# --------------------------------------------------------------------------------------------- short campaigns
def test_killed_trainings_end_as_if_they_had_not_been(toy_data: Path, tmp_path: Path) -> None:
    make_folder = kills.indexed_folders(toy_data, tmp_path)
    assert kills.training(toy_data, "glass_resnet").run(2, 1, make_folder) == []


def test_killed_studies_end_as_if_they_had_not_been(toy_data: Path, tmp_path: Path) -> None:
    assert kills.tuning(toy_data).run(1, 1, kills.indexed_folders(toy_data, tmp_path)) == []


def test_damaged_files_give_an_image_or_a_reason(tmp_path: Path) -> None:
    outcomes, wrong, longest, peak = mutated_images.run(300, 2, tmp_path)
    assert wrong == []
    assert sum(outcomes.values()) == 300 and longest < mutated_images.SECONDS and peak < mutated_images.MEGABYTES
    assert {outcome for _, outcome in outcomes} == {"image", "reason"}


# ----------------------------------------------------------------------------------------------------- signals
def started(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", TRAINING, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def wait_for(there: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_to_all_of_a_jobs_processes_saves_and_leaves_with_its_own_code(
    name: str, workers: str, toy_data: Path, indexed: Path, tmp_path: Path, uninterrupted: kills.State
) -> None:
    results = copy_index(indexed, tmp_path)
    arguments = flags(toy_data, results, "--num-workers", workers)
    process = started(*arguments)
    wait_for((seed_folder(results) / "checkpoint.pt").exists, process)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED, errors
    assert errors.splitlines()[0] == f"{name}: saving after this step"
    assert "stopped: saved" in errors and "the same command goes on from there" in errors and "Traceback" not in errors
    succeed(TRAINING, *arguments)
    assert kills.training_state(results) == uninterrupted


def test_a_second_interrupt_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # is asked for already
        os.kill(os.getpid(), signal.SIGINT)


# ------------------------------------------------------------------------------------- one writer, the same ground
def test_a_second_process_on_a_run_folder_says_who_holds_it(toy_data: Path, indexed: Path, tmp_path: Path) -> None:
    results = copy_index(indexed, tmp_path)
    for module, folder in (
        (TRAINING, results / "demo" / "standard_resnet" / "seed_100"),
        ("hyperparameter_tuning.standard_resnet_tuning", results / "demo" / "tuning" / "standard_resnet"),
        ("num_crops.num_crops_resnet", results / "demo" / "num_crops" / "glass_resnet" / "full"),
        ("standard_memory.standard_memory_resnet", results / "demo" / "standard_memory" / "standard_resnet" / "full"),
        ("data.data_preprocess", results / "demo" / "dataset"),
    ):
        with sole_process(folder):
            done = run_module(module, *TOY_FLAGS, "--data-root", toy_data, "--results-root", results)
        assert done.returncode == 2, module
        assert f"{folder} is in use by process {os.getpid()} on" in done.stderr and done.stderr.count("\n") == 1
        assert not (folder / "lock").exists()


def test_a_lock_and_half_files_of_a_process_that_died_do_not_block(tmp_path: Path) -> None:
    holder = f"import sys, time; from pathlib import Path; from utils import sole_process, replacing\n" \
        f"with sole_process(Path({str(tmp_path)!r})), replacing(Path({str(tmp_path / 'x')!r})) as t:\n" \
        f"    t.write_text('half'); print('held', flush=True); time.sleep(60)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on"), sole_process(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert len(list(tmp_path.iterdir())) == 2  # the lock, and half a file
    with sole_process(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stopped(toy_data: Path, indexed: Path, tmp_path: Path) -> Path:
    """A results root with a training that was stopped after its first epoch."""
    results = copy_index(indexed, tmp_path)
    process = started(*flags(toy_data, results))
    wait_for((seed_folder(results) / "checkpoint.pt").exists, process)
    process.terminate()
    process.communicate()
    assert process.returncode == STOPPED
    return results


def test_a_stopped_training_does_not_go_on_on_other_ground(stopped: Path, toy_data: Path) -> None:
    run = seed_folder(stopped) / "run.json"
    original = run.read_text()
    facts = read_json(run)
    for change, difference in (
        (("--label-smoothing", "0.2"), "label_smoothing = 0.1, now 0.2"),
        ((), "another version of data, models or training"),
        ((), "torch 1.0, now "),
    ):
        if "version" in difference:
            run.write_text(original.replace(facts["code"], "0" * 16))
        if "torch" in difference:
            run.write_text(original.replace(f'"torch": "{facts["versions"]["torch"]}"', '"torch": "1.0"'))
        done = run_module(TRAINING, *flags(toy_data, stopped, *change))
        run.write_text(original)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert difference in done.stderr and "pass --restart" in done.stderr


def test_restart_keeps_what_was_begun_and_begins_anew(
    stopped: Path, toy_data: Path, uninterrupted: kills.State
) -> None:
    before = {path.name: path.read_bytes() for path in seed_folder(stopped).iterdir()}
    said = succeed(TRAINING, *flags(toy_data, stopped, "--restart"))
    kept = stopped / "demo" / "before" / "standard_resnet" / "seed_1_1"
    assert f"kept aside: {kept}" in said
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert kills.training_state(stopped) == uninterrupted


def test_a_damaged_checkpoint_is_named(stopped: Path, toy_data: Path, uninterrupted: kills.State) -> None:
    path = seed_folder(stopped) / "checkpoint.pt"
    for damage in (path.read_bytes()[:-100], b"", b"no checkpoint"):
        path.write_bytes(damage)
        done = run_module(TRAINING, *flags(toy_data, stopped))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{path} cannot be gone on from" in done.stderr and "--restart" in done.stderr
    succeed(TRAINING, *flags(toy_data, stopped, "--restart"))
    assert kills.training_state(stopped) == uninterrupted


# ---------------------------------------------------------------------------------------------- untrusted weights
class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(stopped: Path, toy_data: Path) -> None:
    target = stopped / "the code ran"
    torch.save({"model": _Bomb(target)}, seed_folder(stopped) / "checkpoint.pt")
    done = run_module(TRAINING, *flags(toy_data, stopped))
    assert done.returncode == 2 and "cannot be gone on from" in done.stderr
    assert not target.exists()
    torch.load(seed_folder(stopped) / "checkpoint.pt", weights_only=False)  # it is no dud
    assert target.exists()


# ------------------------------------------------------------------------------------------------- awkward folders
def test_links_back_to_a_folder_above_are_not_followed_for_ever(tmp_path: Path) -> None:
    for class_name in ("fake", "real"):
        (tmp_path / class_name / "deep").mkdir(parents=True)
        (tmp_path / class_name / "deep" / "a.jpg").write_bytes(b"x")
        (tmp_path / class_name / "deep" / "back").symlink_to(tmp_path / class_name)
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real" / "deep")  # a second way, not a loop
    names = [name for name, _ in list_images(tmp_path)]
    assert names == ["fake/deep/a.jpg", "real/again/a.jpg", "real/deep/a.jpg"]


def test_pipes_and_devices_are_not_opened(toy_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "fake").mkdir(parents=True)
    (root / "real").symlink_to(toy_data / "real")
    (root / "fake" / "good.png").write_bytes(next((toy_data / "fake").glob("*.png")).read_bytes())
    os.mkfifo(root / "fake" / "pipe.jpg")
    (root / "fake" / "zero.jpg").symlink_to("/dev/zero")
    said = succeed(
        "data.data_preprocess", *TOY_FLAGS, "--data-root", root, "--results-root", tmp_path / "results",
        "--cache-root", tmp_path / "cache", "--cache", timeout=60,
    )  # fmt: skip
    assert "fake/pipe.jpg  not a file" in said and "fake/zero.jpg  not a file" in said
