"""What was stopped resumes exactly; what must not be mixed is refused; what fails says why. Short campaigns."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.campaigns import kills, mutated_images
from tests.command_server import Process
from tests.conftest import (
    ENVIRONMENT,
    PREPROCESS_FLAGS,
    REPOSITORY,
    TOY_BACKBONE,
    TOY_FLAGS,
    copy_index,
    refused,
    start_module,
    succeed,
    wait_until,
)
from tests.proc import children_of, workers_of
from training.stopping import stop_signals
from utils import STOPPED, UserError, locked_folder, read_json, write_json

TRAINING = "model_training.standard_resnet_training"
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")


def stop(process: Process, there: Callable[[], bool]) -> tuple[str, str]:
    """Ask the command to stop once something is there; returns what it printed."""
    wait_until(there, process)
    process.terminate()
    printed = process.communicate(timeout=60)
    assert process.returncode == STOPPED, printed
    return printed


@dataclass(frozen=True)
class Run:
    """A training of three epochs, and what it leaves if nothing interrupts it."""

    data: Path
    results: Path
    uninterrupted: kills.State

    @property
    def folder(self) -> Path:
        return self.results / "demo" / "standard_resnet" / "seed_1"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def command(self, *more: str, module: str = TRAINING) -> list[str | Path]:
        flags = (*TOY_FLAGS, "--data-root", self.data, "--results-root", self.results, "--epochs", "3")
        return [module, *flags, *(("--seeds", "1", "--batch-size", "4") if module == TRAINING else ()), *more]

    def finish(self, *more: str) -> str:
        """Run to the end, which must be as if nothing had happened; returns what was printed."""
        printed = succeed(*self.command(*more))
        assert kills.state_of(self.results) == self.uninterrupted
        return printed


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> kills.State:
    run = Run(toy_data, copy_index(indexed, tmp_path_factory.mktemp("uninterrupted")), {})
    succeed(*run.command())
    return kills.state_of(run.results)


@pytest.fixture
def run(toy_data: Path, results: Path, uninterrupted: kills.State) -> Run:
    return Run(toy_data, results, uninterrupted)


@pytest.fixture(scope="module")
def stopped_once(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(toy_data, copy_index(indexed, tmp_path_factory.mktemp("stopped")), {})
    stop(start_module(*run.command()), run.checkpoint.exists)
    return run.results


@pytest.fixture
def stopped(run: Run, stopped_once: Path, tmp_path: Path) -> Run:
    """A training that was stopped after its first epoch."""
    return replace(run, results=shutil.copytree(stopped_once, tmp_path / "stopped"))


@pytest.mark.slow
@pytest.mark.parametrize(("campaign", "times"), [(kills.training("glass_resnet"), 1), (kills.TUNING, 1)])
def test_killed_commands_end_like_uninterrupted_ones(
    campaign: kills.Campaign, times: int, toy_data: Path, tmp_path: Path
) -> None:
    small = replace(campaign, flags=(*campaign.flags, "--backbone", TOY_BACKBONE))
    assert small.run(times, 1, toy_data, tmp_path) == []


@pytest.mark.slow
def test_damaged_files_start_no_program_and_end_no_command(tmp_path: Path) -> None:
    outcomes, wrong = mutated_images.run_commands(87, 3, tmp_path)
    assert wrong == [] and sum(outcomes.values()) == 87
    assert {outcome for _, outcome in outcomes} == {"image", "reason"}


def test_damaged_files_give_an_image_or_a_reason(tmp_path: Path) -> None:
    outcomes, wrong, longest, peak = mutated_images.run(300, 2, tmp_path)
    assert wrong == []
    assert sum(outcomes.values()) == 300 and longest < mutated_images.SECONDS and peak < mutated_images.MEGABYTES
    assert {outcome for _, outcome in outcomes} == {"image", "reason"}


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        pytest.param("SIGTERM", 0, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 1, marks=linux),
        pytest.param("SIGINT", 1, marks=[linux, pytest.mark.slow]),
    ],
)
def test_a_signal_to_all_of_a_jobs_processes_saves_and_leaves_with_its_own_code(
    name: str, workers: int, run: Run
) -> None:
    process = start_module(*run.command("--num-workers", str(workers)))
    if workers:  # while they start: a resource tracker is there, and a server that has yet to import what they need
        wait_until(lambda: len(children_of(process.pid)) == 2, process)
    else:
        wait_until(run.checkpoint.exists, process)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED, errors
    assert errors.splitlines()[0] == f"{name}: saving after this step"
    assert "stopped: saved" in errors and "run the same command again to resume" in errors and "Traceback" not in errors
    run.finish("--num-workers", str(workers))


@pytest.mark.parametrize("moment", ["the last epoch ends", "the test is over"])
def test_a_signal_between_two_trainings_is_not_lost(moment: str, run: Run) -> None:
    history, predictions = run.folder / "history.csv", run.folder / "predictions.csv"
    moments = {
        "the last epoch ends": lambda: history.exists() and history.read_text().count("\n") == 4,
        "the test is over": predictions.exists,
    }
    _, errors = stop(start_module(*run.command("--seeds", "1", "2")), moments[moment])
    assert errors.count("\n") == 2, errors
    second = run.folder.with_name("seed_2")
    assert not (second / "history.csv").exists()
    shutil.rmtree(second, ignore_errors=True)
    run.finish()


def test_an_interrupt_that_ends_the_reader_of_the_output_too_still_saves(run: Run) -> None:
    process = start_module(*run.command("--epochs", "50"))
    wait_until(run.checkpoint.exists, process)
    process.stdout.close()  # as Ctrl-C does in `... 2>&1 | tee log`
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == STOPPED and run.checkpoint.exists()


def test_a_data_error_in_a_loading_process_ends_the_command(run: Run, toy_data: Path, tmp_path: Path) -> None:
    own = replace(run, data=shutil.copytree(toy_data, tmp_path / "data"), results=tmp_path / "own")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", own.data, "--results-root", own.results)
    for image in (own.data / "real").iterdir():
        image.unlink()
    assert "has changed since preprocessing" in refused(*own.command("--num-workers", "1"))


@linux
def test_a_killed_loading_process_becomes_a_sentence_and_the_training_resumes(run: Run) -> None:
    process = start_module(*run.command("--num-workers", "1"))
    wait_until(run.checkpoint.exists, process)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert "a process that loads images was killed" in errors and "--num-workers" in errors
    run.finish("--num-workers", "1")


SMALL_SHARED_MEMORY = """
mount -t tmpfs -o size=1m tmpfs /dev/shm && "$@" & process=$!
until [ -e "$HISTORY" ]; do sleep 0.01; kill -0 $process 2> /dev/null || break; done
while kill -0 $process 2> /dev/null; do head -c 1000000 /dev/zero >> /dev/shm/filled 2> /dev/null; sleep 0.02; done
wait $process
"""


@linux
@pytest.mark.parametrize(
    ("batch_size", "epochs"),
    [(64, 1), pytest.param(4, 300, marks=pytest.mark.slow)],  # refused at first; filled after the first epoch
)
def test_shared_memory_that_is_too_small_or_full_is_one_sentence(batch_size: int, epochs: int, run: Run) -> None:
    namespace = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    environment = os.environ | ENVIRONMENT | {"HISTORY": str(run.folder / "history.csv")}
    more = ("--patch-size", "96", "--num-workers", "1", "--batch-size", str(batch_size), "--epochs", str(epochs))
    shell = [*namespace, "sh", "-c", SMALL_SHARED_MEMORY, "sh", sys.executable, "-m", *run.command(*more)]
    done = subprocess.run(shell, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "shared memory (/dev/shm) is full or too small: loading with --num-workers 1 needs" in done.stderr
    assert "--shm-size=1g or --ipc=host, or lower --num-workers (0 needs none)" in done.stderr
    assert (run.folder / "history.csv").exists() == (batch_size == 4)


def test_a_second_interrupt_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.requested
        os.kill(os.getpid(), signal.SIGTERM)  # is asked for already
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_process_on_a_run_folder_is_refused(toy_data: Path, results: Path) -> None:
    for module, folder in (
        (TRAINING, results / "demo" / "standard_resnet" / "seed_100"),
        ("hyperparameter_tuning.standard_resnet_tuning", results / "demo" / "tuning" / "standard_resnet"),
        ("standard_memory.standard_memory_resnet", results / "demo" / "standard_memory" / "standard_resnet" / "full"),
        ("data.data_preprocess", results / "demo" / "dataset"),
    ):
        with locked_folder(folder):
            of_command = PREPROCESS_FLAGS if module.startswith("data.") else TOY_FLAGS
            message = refused(module, *of_command, "--data-root", toy_data, "--results-root", results)
        assert f"{folder} is in use by another process" in message


def test_the_lock_and_half_written_files_of_a_dead_process_do_not_block(tmp_path: Path) -> None:
    holder = f"import sys, time; from pathlib import Path; from utils import locked_folder, replacing\n" \
        f"with locked_folder(Path({str(tmp_path)!r})), replacing(Path({str(tmp_path / 'x')!r})) as t:\n" \
        f"    t.write_text('half'); print('held', flush=True); time.sleep(60)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use by another process"), locked_folder(tmp_path):
        pass
    process.kill()
    process.communicate()
    (tmp_path / ".tmp6JDQYM").write_bytes(b"half")  # as safetensors names what it has not yet written whole
    assert len(list(tmp_path.iterdir())) == 3  # the lock, and halves of files
    with locked_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_stopped_training_is_not_resumed_with_other_settings(stopped: Run) -> None:
    for flag, difference in (
        (("--label-smoothing", "0.2"), "label_smoothing = 0.1, now 0.2"),
        (("--main-seed", "7"), "main_seed = 606, now 7"),
    ):
        message = refused(*stopped.command(*flag))
        assert difference in message and "pass --restart" in message
    metadata = stopped.folder / "run.json"
    for damage in (metadata.unlink, lambda: metadata.write_text("{")):
        damage()
        message = refused(*stopped.command("--label-smoothing", "0.2"))
        assert f"{metadata} cannot be read" in message and "pass --restart" in message


def test_a_training_resumed_under_other_versions_says_so_and_records_where(stopped: Run) -> None:
    path = stopped.folder / "run.json"
    metadata = read_json(path)
    (now,) = metadata["environments"]
    before = {"from": "epoch 1", "commit": "0123abc", "versions": now["versions"] | {"torch": "1.0"}}
    write_json(path, metadata | {"environments": [before]})
    epochs = len((stopped.folder / "history.csv").read_text().splitlines()) - 1
    text = stopped.finish()
    line = next(line for line in text.splitlines() if "resumes at" in line)
    assert re.search(rf"standard_resnet seed \d+: resumed at epoch ({epochs}|{epochs + 1}), step \d+\n", text), text
    assert f"commit 0123abc -> {now['commit']}, torch 1.0 -> {torch.__version__.partition('+')[0]}" in line
    found = read_json(path)["environments"]
    assert found == [before, now | {"from": found[1]["from"]}]
    assert found[1]["from"] in (f"epoch {epochs}", f"epoch {epochs + 1}")


def test_a_sweep_that_was_stopped_in_its_first_crop_count_is_not_resumed_with_other_settings(run: Run) -> None:
    flags = ("--no-quick", "--crop-counts", "1", "--epochs", "50")
    command = run.command(*flags, module="num_crops.num_crops_resnet")
    checkpoint = run.results / "demo" / "num_crops" / "glass_resnet" / "full" / "k_1" / "checkpoint.pt"
    stop(start_module(*command), checkpoint.exists)
    message = refused(*command, "--label-smoothing", "0.3")
    assert "label_smoothing = 0.1, now 0.3: pass --restart" in message


def test_restart_archives_what_was_started_and_starts_over(stopped: Run) -> None:
    before = {path.name: path.read_bytes() for path in stopped.folder.iterdir()}
    kept = stopped.results / "demo" / "archive" / "standard_resnet" / "seed_1_1"
    process = start_module(*stopped.command("--restart"))
    message, errors = stop(process, lambda: kept.exists() and stopped.checkpoint.exists())
    assert "run the same command without --restart again to resume" in errors
    assert f"archived: {kept}" in message
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    stopped.finish()
    assert list(kept.parent.iterdir()) == [kept]


def test_a_training_with_a_damaged_checkpoint_starts_over_without_it(stopped: Run) -> None:
    stopped.checkpoint.write_bytes(stopped.checkpoint.read_bytes()[:-100])
    message = refused(*stopped.command())
    assert f"cannot resume from {stopped.checkpoint}" in message and "delete it" in message and "--restart" in message
    stopped.checkpoint.unlink()
    stopped.finish()


def test_a_training_with_outputs_that_are_not_finite_is_refused(run: Run, tmp_path: Path) -> None:
    """What batch normalisation remembers counts in evaluation alone: training goes well, and validation cannot."""
    weights = timm.create_model(TOY_BACKBONE.removeprefix("timm:")).state_dict()
    for name in weights:
        if name.endswith("running_mean"):
            weights[name].fill_(-3e38)
    save_file(weights, file := tmp_path / "weights.safetensors")
    for _ in range(2):
        message = refused(*run.command("--weights-files", f"{TOY_BACKBONE}={file}"))
        assert "outputs are infinite or not a number for 3 of 3 images (fake/" in message
    assert not (run.folder / "history.csv").exists()
