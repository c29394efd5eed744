"""What was stopped goes on exactly; what must not be mixed is refused; what fails says why. Short campaigns."""

import hashlib
import io
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import config
from config import Preset
from data.data_preprocess import preprocess
from data.datasets import load_splits
from data.images import read_image
from data.index import list_files, list_images, read_index
from data.loaders import build_loader
from models.build import build_model
from tests.campaigns import kills, mutated_images
from tests.conftest import (
    REPOSITORY,
    TOY_FLAGS,
    children_of,
    copy_index,
    run_module,
    start_module,
    succeed,
    workers_of,
)
from training.checkpoints import Checkpoint, load_model, save_model
from training.loop import Trainer, build_trainer, fit
from utils import STOPPED, UserError, find_experiment, read_json, sole_process, stop_signals

TRAINING = "model_training.standard_resnet_training"
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")


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
def wait_for(there: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("name", "workers"), [("SIGTERM", 0), *(pytest.param(name, 1, marks=linux) for name in ("SIGTERM", "SIGINT"))]
)
def test_a_signal_to_all_of_a_jobs_processes_saves_and_leaves_with_its_own_code(
    name: str, workers: int, toy_data: Path, indexed: Path, tmp_path: Path, uninterrupted: kills.State
) -> None:
    results = copy_index(indexed, tmp_path)
    arguments = flags(toy_data, results, "--num-workers", str(workers))
    process = start_module(TRAINING, *arguments)
    if workers:  # while they start: a resource tracker is there, and a server that has yet to import what they need
        wait_for(lambda: len(children_of(process.pid)) == 2, process)
    else:
        wait_for((seed_folder(results) / "checkpoint.pt").exists, process)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED, errors
    assert errors.splitlines()[0] == f"{name}: saving after this step"
    assert "stopped: saved" in errors and "the same command goes on from there" in errors and "Traceback" not in errors
    succeed(TRAINING, *arguments)
    assert kills.training_state(results) == uninterrupted


@pytest.mark.parametrize("moment", ["the last epoch ends", "the test is over"])
def test_a_signal_between_two_trainings_is_not_lost(
    moment: str, toy_data: Path, indexed: Path, tmp_path: Path, uninterrupted: kills.State
) -> None:
    results = copy_index(indexed, tmp_path)
    process = start_module(TRAINING, *flags(toy_data, results, "--seeds", "1", "2"))
    history, predictions = (seed_folder(results) / name for name in ("history.csv", "predictions.csv"))
    if moment == "the last epoch ends":
        wait_for(lambda: history.exists() and history.read_text().count("\n") == 4, process)
    else:
        wait_for(predictions.exists, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED and errors.count("\n") == 2, errors
    second = seed_folder(results).with_name("seed_2")
    assert not (second / "history.csv").exists() and not list(results.rglob("lock"))
    shutil.rmtree(second, ignore_errors=True)
    succeed(TRAINING, *flags(toy_data, results))
    assert kills.training_state(results) == uninterrupted


def test_an_interrupt_that_ends_the_reader_of_the_output_too_still_saves(
    toy_data: Path, indexed: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    process = start_module(TRAINING, *flags(toy_data, results, "--epochs", "50"))
    checkpoint = seed_folder(results) / "checkpoint.pt"
    wait_for(checkpoint.exists, process)
    process.stdout.close()  # as Ctrl-C does in `... 2>&1 | tee log`
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == STOPPED and checkpoint.exists()


def test_a_data_error_in_a_loading_process_ends_the_command(toy_data: Path, tmp_path: Path) -> None:
    data, results = shutil.copytree(toy_data, tmp_path / "data"), tmp_path / "results"
    succeed("data.data_preprocess", *TOY_FLAGS, "--data-root", data, "--results-root", results)
    for image in (data / "real").iterdir():
        image.unlink()
    done = run_module(TRAINING, *flags(data, results, "--num-workers", "1"), timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "is not what it was when the index was made" in done.stderr


@linux
def test_a_killed_loading_process_becomes_a_sentence_and_the_training_goes_on(
    toy_data: Path, indexed: Path, tmp_path: Path, uninterrupted: kills.State
) -> None:
    results = copy_index(indexed, tmp_path)
    arguments = flags(toy_data, results, "--num-workers", "1")
    process = start_module(TRAINING, *arguments)
    wait_for((seed_folder(results) / "checkpoint.pt").exists, process)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "a process that loads images was killed" in errors and "--num-workers" in errors
    assert errors.count("\n") == 1
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


def test_a_folder_that_was_moved_takes_no_other_process_its_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ExitStack() as first:
        first.enter_context(sole_process(folder))
        folder.rename(tmp_path / "aside")
        with sole_process(folder):
            first.close()
            with pytest.raises(UserError, match="is in use by"), sole_process(folder):
                pass


@pytest.fixture
def stopped(toy_data: Path, indexed: Path, tmp_path: Path) -> Path:
    """A results root with a training that was stopped after its first epoch."""
    results = copy_index(indexed, tmp_path)
    process = start_module(TRAINING, *flags(toy_data, results))
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
    run.unlink()
    done = run_module(TRAINING, *flags(toy_data, stopped, "--label-smoothing", "0.2"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{run} does not hold" in done.stderr and "pass --restart" in done.stderr


def test_a_sweep_that_was_stopped_in_its_first_crop_count_does_not_go_on_on_other_ground(
    toy_data: Path, indexed: Path, tmp_path: Path
) -> None:
    results, door = copy_index(indexed, tmp_path), "num_crops.num_crops_resnet"
    arguments = [*TOY_FLAGS, "--data-root", toy_data, "--results-root", results, "--no-quick", "--crop-counts", "1"]
    process = start_module(door, *arguments, "--epochs", "50")
    wait_for((results / "demo" / "num_crops" / "glass_resnet" / "full" / "checkpoint_1.pt").exists, process)
    process.terminate()
    process.communicate()
    assert process.returncode == STOPPED
    done = run_module(door, *arguments, "--epochs", "50", "--label-smoothing", "0.3")
    assert done.returncode == 2 and "label_smoothing = 0.1, now 0.3: pass --restart" in done.stderr


def test_restart_keeps_what_was_begun_and_begins_anew(
    stopped: Path, toy_data: Path, uninterrupted: kills.State
) -> None:
    before = {path.name: path.read_bytes() for path in seed_folder(stopped).iterdir()}
    process = start_module(TRAINING, *flags(toy_data, stopped, "--restart"))
    kept = stopped / "demo" / "before" / "standard_resnet" / "seed_1_1"
    wait_for(lambda: kept.exists() and (seed_folder(stopped) / "checkpoint.pt").exists(), process)
    process.terminate()
    said, errors = process.communicate()
    assert process.returncode == STOPPED and "the same command without --restart goes on from there" in errors
    assert f"kept aside: {kept}" in said
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    succeed(TRAINING, *flags(toy_data, stopped))
    assert list(kept.parent.iterdir()) == [kept]
    assert kills.training_state(stopped) == uninterrupted


def edited(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit


def first_moments(state: dict) -> dict[str, torch.Tensor]:
    return next(iter(state["optimizer"]["state"].values()))


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 100),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_bytes(b"no checkpoint"),
    "another end": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a number": lambda path: torch.save(5, path),
    "no progress": edited(lambda state: state.update(progress={})),
    "an empty epoch": edited(lambda state: state["progress"].update(history=[{}])),
    "another optimizer": edited(lambda state: state.update(optimizer=5)),
    "another shape": edited(lambda state: first_moments(state).update(exp_avg=torch.zeros(2))),
    "a word for a number": edited(lambda state: state["scheduler"].update(last_epoch="x")),
    "another learning rate": edited(lambda state: state["optimizer"]["param_groups"][0].update(lr=0.7)),
    "epochs that were not": edited(lambda state: state["progress"].update(history=state["progress"]["history"] * 40)),
}


@pytest.fixture(scope="module")
def saved_state(module_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A training, and its checkpoint after an epoch."""
    folder = tmp_path_factory.mktemp("checkpoint") / "standard_resnet" / "seed_1"
    experiment = replace(find_experiment(module_preset, "standard_resnet"), backbone="timm:test_convnext", batch_size=8)
    index, splits = load_splits(module_preset)
    trainer = build_trainer(build_model(experiment, module_preset.settings), experiment, module_preset.settings, 1)
    loaders = (build_loader(module_preset, experiment, index, rows, 1) for rows in (splits.train, splits.valid))
    fit(trainer, *loaders, 1, checkpoint=Checkpoint(folder / "checkpoint.pt"))
    return trainer, folder / "checkpoint.pt"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, saved_state: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, sound = saved_state
    path = shutil.copytree(sound.parents[1], tmp_path / "standard_resnet") / "seed_1" / "checkpoint.pt"
    assert len(Checkpoint(path).history()) == Checkpoint(path).load(trainer).epoch == 1
    DAMAGES[damage](path)
    for read in (lambda checkpoint: checkpoint.load(trainer), Checkpoint.history):
        with pytest.raises(UserError, match=r"checkpoint\.pt cannot be gone on from \(it is not what was saved"):
            read(Checkpoint(path))


def test_a_checkpoint_of_another_place_or_model_is_refused(saved_state: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, sound = saved_state
    for elsewhere in ("seed_1/trial_2.pt", "seed_2/checkpoint.pt"):
        path = tmp_path / "standard_resnet" / elsewhere
        path.parent.mkdir(parents=True)
        shutil.copy(sound, path)
        with pytest.raises(UserError, match="it is not what was saved there: damaged, edited, copied"):
            Checkpoint(path).load(trainer)
    other = replace(trainer, model=nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"cannot be gone on from .*state_dict"):
        Checkpoint(sound).load(other)


def test_a_training_with_a_damaged_checkpoint_begins_anew_without_it(
    stopped: Path, toy_data: Path, uninterrupted: kills.State
) -> None:
    path = seed_folder(stopped) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    done = run_module(TRAINING, *flags(toy_data, stopped))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{path} cannot be gone on from" in done.stderr and "delete it" in done.stderr and "--restart" in done.stderr
    path.unlink()
    succeed(TRAINING, *flags(toy_data, stopped))
    assert kills.training_state(stopped) == uninterrupted


# ---------------------------------------------------------------------------------------------- untrusted weights
class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    saved_state: tuple[Trainer, Path], tmp_path: Path
) -> None:
    path, target = tmp_path / "standard_resnet" / "seed_1" / "checkpoint.pt", tmp_path / "the code ran"

    class Hostile(Checkpoint):
        """Writes the right digest of the wrong things."""

        def hide(self) -> None:
            path.parent.mkdir(parents=True)
            torch.save({"model": _Bomb(target)}, path)
            with open(path, "r+b") as file:
                file.write(self._digest(file, path.stat().st_size))

    Hostile(path).hide()
    with pytest.raises(UserError, match=r"cannot be gone on from \(it holds something else than tensors"):
        Checkpoint(path).load(saved_state[0])
    assert not target.exists()
    torch.load(path, weights_only=False)  # it is no dud
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


def test_folders_that_link_to_each_other_are_a_sentence_and_no_endless_walk(tmp_path: Path) -> None:
    folders = [tmp_path / "fake" / f"{number:02d}" for number in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(b"x")
    for folder in folders[:4]:
        for other in folders[:4]:
            (folder / f"to_{other.name}").symlink_to(other)
    # from a folder to any of the others, in each order: 1 + 3 + 3 * 2 + 3 * 2 * 1 ways from each of four
    assert len(list_files(tmp_path, "fake")) == 4 * 16 + 8
    for folder in folders[4:]:
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other)
    with pytest.raises(UserError, match="can be reached over links in more than 100 ways: remove some of them"):
        list_files(tmp_path, "fake")


def test_folders_nested_deeper_than_calls_can_be_are_listed(tmp_path: Path) -> None:
    below = "/d" * 400
    folders = [f"{tmp_path}/fake{below[:end]}" for end in range(0, len(below) + 1, 2)]
    for folder in folders:
        os.mkdir(folder)
    Path(folders[-1], "a.jpg").write_bytes(b"x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        names = list_files(tmp_path, "fake")
    finally:
        sys.setrecursionlimit(limit)
    Path(folders[-1], "a.jpg").unlink()
    for folder in reversed(folders):  # what pytest clears away with goes by calls
        os.rmdir(folder)
    assert names == [f"fake{below}/a.jpg"]


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


# ------------------------------------------------------------------------------------------------------ bad images
def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of this size with one grey row of data, and these chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (min(width, 5000) + 1))
    parts = (chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
FRAMES = {"save_all": True, "append_images": [NOISE.rotate(180), NOISE.rotate(90, expand=False)]}
EXIF = b"Exif\0\0" + bytes(range(200))
BAD = {  # name: content, beginning of its reason; None where it gives an image
    "truncated.jpg": (saved(NOISE, "JPEG")[:-700], "image file is truncated"),
    "truncated.png": (saved(NOISE, "PNG")[:-7000], "image file is truncated"),
    "truncated.webp": (saved(NOISE, "WEBP")[:-700], "could not create decoder object"),
    "header only.jpg": (saved(NOISE, "JPEG")[:200], ""),
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"hello", "not an image"),
    "page.png": (b"<!doctype html><title>404</title>", "not an image"),
    "really a png.jpg": (saved(NOISE, "PNG"), None),
    "animated gif.png": (saved(NOISE.quantize(8), "GIF", **FRAMES), None),
    "animated.webp": (saved(NOISE, "WEBP", lossless=True, **FRAMES), None),
    "animated.png": (saved(NOISE, "PNG", **FRAMES), None),
    "two pictures.jpg": (saved(NOISE, "MPO", **FRAMES), None),
    "bomb.png": (png(50_000, 50_000), "50000x50000 pixels are more than max_image_pixels = 200000000"),
    "lies.png": (png(10_000, 10_000), "image file is truncated"),
    "no width.png": (png(0, 10), ""),
    "no height.jpg": (saved(NOISE, "JPEG").replace(b"\0\x3c\0\x50", b"\0\0\0\x50", 1), ""),
    "text bomb.png": (png(1, 1, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "Decompressed data too large"),
    "icc.jpg": (saved(NOISE, "JPEG", icc_profile=b"no profile" * 9000), None),
    "exif.jpg": (saved(NOISE, "JPEG", exif=EXIF), None),
    "much metadata.jpg": (saved(NOISE, "JPEG", comment=b"x" * 65_000, icc_profile=bytes(2_000_000)), None),
    "cmyk.jpg": (saved(NOISE.convert("CMYK"), "JPEG"), None),
    "ycck.jpg": (saved(NOISE.convert("CMYK"), "JPEG").replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"), None),
    "16 bit.tif": (saved(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "TIFF"), None),
    "1 bit.png": (saved(NOISE.convert("1"), "PNG"), None),
    "transparent palette.png": (saved(NOISE.quantize(8), "PNG", transparency=b"\0\x7f"), None),
    ".hidden.jpg": (saved(NOISE, "JPEG"), None),
    "UPPER.JPG": (saved(NOISE, "JPEG"), None),
    "a 'quoted', \n \"name\"\t.jpg": (saved(NOISE, "JPEG"), None),
}


def test_each_bad_file_is_an_image_or_has_its_reason(tmp_path: Path, toy_preset: Callable[..., Preset]) -> None:
    root = tmp_path / "images"
    (root / "real" / "folder called x.jpg").mkdir(parents=True)
    NOISE.save(root / "real" / "folder called x.jpg" / "inside.png")
    (root / "fake").mkdir()
    for name, (content, _) in BAD.items():
        (root / "fake" / name).write_bytes(content)
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "fake" / name).write_bytes(b"\0")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    preset = toy_preset(data_root=root, results_root=tmp_path / "results", cache_root=tmp_path / "cache")
    preprocess(preset, "pixels")
    records = {record.path: record for record in read_index(preset).records}
    assert records.keys() == {*(f"fake/{name}" for name in BAD), "real/folder called x.jpg/inside.png"}
    for name, (content, reason) in BAD.items():
        record = records[f"fake/{name}"]
        assert record.content == hashlib.sha256(content).hexdigest()
        if reason is None:
            assert (record.problem, min(record.width, record.height) > 0) == ("", True), name
        else:
            assert record.problem and record.problem.startswith(reason), (name, record.problem)
    first = np.asarray(NOISE)
    for name in ("animated.webp", "animated.png", "really a png.jpg"):
        assert np.array_equal(np.asarray(read_image(root / "fake" / name, 10**9)), first), name
    assert np.asarray(read_image(root / "fake" / "16 bit.tif", 10**9)).min() == 255
    assert {path: path.read_bytes() for path in before} == before


# ------------------------------------------------------------------------------------------------ untrusted weights
def altered(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, torch.Tensor]], dict]:
    def apply(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        change(state)
        return state

    return apply


HEAD = "1.1.weight"
WEIGHTS = {
    "a missing key": (altered(lambda s: s.pop(HEAD)), rf"it lacks 1 tensors \({HEAD}\)"),
    "another key": (
        altered(lambda s: s.update(more=torch.zeros(1))),
        r"it has, besides the model's, 1 tensors \(more\)",
    ),
    "another shape": (
        altered(lambda s: s.update({HEAD: torch.zeros(3, 512)})),
        rf"{HEAD} is \(3, 512\), expected",
    ),
    "another dtype": (
        altered(lambda s: s.update({HEAD: s[HEAD].half()})),
        rf"{HEAD} is torch.float16, expected torch.float32",
    ),
    "a negative variance": (
        altered(lambda s: s["0.bn1.running_var"][0].fill_(-1)),
        r"0\.bn1\.running_var has variances below zero",
    ),
    "a NaN": (altered(lambda s: s[HEAD][0].fill_(math.nan)), rf"{HEAD} has values that are infinite or not a number"),
}


@pytest.mark.parametrize("problem", WEIGHTS)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    problem: str, tmp_path: Path, toy_preset: Callable[..., Preset]
) -> None:
    change, reason = WEIGHTS[problem]
    model = build_model(find_experiment(config.DEMO, "standard_resnet"), toy_preset().settings)
    save_model(tmp_path / "model.safetensors", model, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_model(tmp_path / "model.safetensors", model) == {}
    changed = change({name: tensor.clone() for name, tensor in before.items()})
    save_file(changed, tmp_path / "model.safetensors", metadata={"about": "{}"})
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path / "model.safetensors", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_outputs_that_are_no_numbers_are_not_believed(toy_data: Path, indexed: Path, tmp_path: Path) -> None:
    """What batch normalisation remembers counts in evaluation alone: training goes well, and validation cannot."""
    results, file = copy_index(indexed, tmp_path), tmp_path / "weights.safetensors"
    weights = timm.create_model("resnet10t").state_dict()
    for name in weights:
        if name.endswith("running_mean"):
            weights[name].fill_(-3e38)
    save_file(weights, file)
    arguments = flags(toy_data, results, "--weights-files", f"timm:resnet10t={file}")
    for _ in range(2):
        done = run_module(TRAINING, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "outputs are infinite or not a number for 3 of 3 images (fake/" in done.stderr
    assert not (seed_folder(results) / "history.csv").exists()


def test_a_weights_file_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, toy_preset: Callable[..., Preset]
) -> None:
    target = tmp_path / "the code ran"
    torch.save({"conv1.weight": _Bomb(target)}, tmp_path / "weights.pth")
    settings = toy_preset(weights_files=(f"timm:resnet10t={tmp_path / 'weights.pth'}",)).settings
    with pytest.raises(UserError, match=r"weights\.pth is not a weights file that can be loaded safely"):
        build_model(find_experiment(config.DEMO, "standard_resnet"), settings)
    assert not target.exists()
    (tmp_path / "weights.pth").rename(tmp_path / "model.safetensors")
    model = build_model(find_experiment(config.DEMO, "standard_resnet"), toy_preset().settings)
    with pytest.raises(UserError, match="is not a weights file of this project"):
        load_model(tmp_path / "model.safetensors", model)
    assert not target.exists()
