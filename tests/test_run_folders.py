"""Run folders: the results of a finished training, the same bytes every time, and what is refused."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import Preset, Training
from data.datasets import load_splits
from data.lists import read_csv
from data.loaders import build_loader
from model_training.inference.detector import load_detector
from model_training.run import train_and_evaluate
from models.build import build_model
from tests.campaigns.kills import state_of
from tests.conftest import TOY_BACKBONE, TOY_FLAGS, MakePreset, copy_index, edit_index, succeed
from training.checkpoints import load_model
from training.evaluation import evaluate
from training.metrics import compute_metrics
from training.runs import seed_folder
from training.runtime import build_runtime
from utils import UserError, find_experiment, read_json


def train(preset: Preset, name: str) -> Path:
    train_and_evaluate(preset, find_experiment(preset, name))
    return seed_folder(preset, name, preset.training.seeds[0])


@pytest.mark.parametrize("name", ["standard_convnext", "glass_vit"])
def test_same_seed_gives_the_same_bytes_with_0_and_2_workers(
    name: str, toy_preset: MakePreset, indexed: Path, tmp_path: Path
) -> None:
    states = []
    for workers in (0, 2):
        results = copy_index(indexed, tmp_path / str(workers))
        states.append(state_of(train(toy_preset(num_workers=workers, results_root=results), name)))
    assert states[0] == states[1] and len(states[0]["history.csv"]) == 2
    assert states[0].keys() >= {"predictions.csv", "metrics.json", "model.safetensors"}


@pytest.fixture(scope="module")
def finished(indexed: Path, toy_preset: MakePreset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Preset, Path]:
    """A preset and the folder of a finished run of glass_resnet under it."""
    results = copy_index(indexed, tmp_path_factory.mktemp("finished") / "results")
    preset = toy_preset(results_root=results, test_size=10, final_valid_fraction=0.05)
    preset = replace(preset, training=Training(epochs=3, seeds=(7,)))
    return preset, train(preset, "glass_resnet")


def test_a_run_folder_holds_the_files_and_metadata_of_the_readme(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    assert sorted(file.name for file in folder.iterdir()) == [
        ".lock", "README.md", "history.csv", "metrics.json", "model.safetensors", "predictions.csv", "run.json",
        "training_curve.png",
    ]  # fmt: skip
    rows = [{name: float(text) for name, text in row.items()} for row in read_csv(folder / "history.csv")]
    assert len(rows) == 3
    for row in rows:  # 27 images, and validation takes time too
        assert 0 < row["data_wait_share"] < 1 and row["images_per_second"] > 27 / row["epoch_seconds"]
    run = read_json(folder / "run.json")
    assert run["settings"]["lr_local"] == find_experiment(preset, "glass_resnet").lr_local
    assert run["settings"]["seed"] == 7 and run["settings"]["epochs"] == 3
    assert {"command", "hardware", "dataset_fingerprint"} <= run.keys()
    (environment,) = run["environments"]
    assert environment["from"] == "epoch 1" and environment["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_every_metric_can_be_recomputed_from_the_predictions(finished: tuple[Preset, Path]) -> None:
    _, folder = finished
    rows = read_csv(folder / "predictions.csv")
    probabilities = np.array([[float(row["probability_fake"]), float(row["probability_real"])] for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    stored = {k: math.nan if v is None else v for k, v in read_json(folder / "metrics.json")["test"].items()}
    assert compute_metrics(probabilities, labels) == pytest.approx(stored, rel=1e-15, nan_ok=True)
    assert all(row["path"].startswith(("fake/", "real/")[int(row["label"])]) for row in rows)


def test_the_checkpoint_is_the_first_best_epoch_and_gives_the_predictions(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    accuracies = [float(row["valid_accuracy"]) for row in read_csv(folder / "history.csv")]
    metrics = read_json(folder / "metrics.json")
    assert metrics["best_epoch"] == accuracies.index(max(accuracies)) + 1
    experiment = find_experiment(preset, "glass_resnet")
    model = build_model(experiment, preset.settings)
    about = load_model(folder / "model.safetensors", model)
    assert about["epoch"] == metrics["best_epoch"] and about["experiment"]["num_crops"] == experiment.num_crops
    index, splits = load_splits(preset)
    loader = build_loader(preset.settings, experiment, index, splits.test)
    again = evaluate(model, loader, build_runtime(preset.settings))
    written = [float(row["probability_real"]) for row in read_csv(folder / "predictions.csv")]
    assert again.probabilities[:, 1] == pytest.approx(written, rel=1e-6)


def test_a_finished_seed_is_skipped_and_a_new_one_is_run(
    finished: tuple[Preset, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    preset, folder = finished

    def contents() -> dict[Path, tuple[int, bytes]]:
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}

    before = contents()
    train(replace(preset, training=replace(preset.training, seeds=(7, 8))), "glass_resnet")
    assert before == contents()
    assert (folder.parent / "seed_8" / "metrics.json").exists()
    assert "seed 7" in (out := capsys.readouterr().out) and "finished before" in out


def test_a_folder_of_other_settings_or_data_is_refused(finished: tuple[Preset, Path], tmp_path: Path) -> None:
    preset, _ = finished
    with pytest.raises(UserError, match=r"label_smoothing = 0\.1, now 0\.2"):
        train(replace(preset, settings=replace(preset.settings, label_smoothing=0.2)), "glass_resnet")
    results = shutil.copytree(preset.settings.results_root, tmp_path / "results")
    edit_index(results, lambda text: text.replace(".jpg", ".JPG", 1))
    with pytest.raises(UserError, match=r"dataset_fingerprint = .*, now "):
        train(replace(preset, settings=replace(preset.settings, results_root=results)), "glass_resnet")


@pytest.mark.parametrize("file", ["run.json", "metrics.json"])
def test_a_damaged_file_of_a_finished_run_is_one_sentence(finished: tuple[Preset, Path], file: str) -> None:
    preset, folder = finished
    original = (folder / file).read_text()
    for content in ("{}", "[]", "{", ""):
        (folder / file).write_text(content)
        with pytest.raises(UserError, match=rf"seed_7/{file} (cannot be read|does not say)"):
            train(preset, "glass_resnet")
    (folder / file).write_text(original)


def test_a_run_that_failed_before_its_first_epoch_may_start_over_with_other_settings(
    toy_preset: MakePreset, results: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        train(toy_preset(results_root=results, weights_files=(f"{TOY_BACKBONE}=nowhere.pth",)), "standard_resnet")
    folder = train(toy_preset(results_root=results), "standard_resnet")
    assert read_json(folder / "run.json")["settings"]["weights_files"] == []


def test_an_unreadable_file_keeps_every_other_image_in_its_split(toy_preset: MakePreset, results: Path) -> None:
    preset = toy_preset(results_root=results)
    _, before = load_splits(preset)
    broken = before.train[3]

    def break_one(text: str) -> str:
        lines = text.splitlines(keepends=True)
        start = lines[broken + 1].rsplit(",", 3)[0]  # before height, problem and key
        lines[broken + 1] = f"{start},0,truncated,\n"
        return "".join(lines)

    edit_index(results, break_one)
    _, splits = load_splits(preset)
    for name, rows in vars(before).items():
        assert getattr(splits, name) == [row for row in rows if row != broken]


def test_torchs_switches_are_restored_after_a_run_and_a_prediction(
    finished: tuple[Preset, Path], toy_data: Path
) -> None:
    _, folder = finished

    def switches() -> tuple[object, ...]:
        determinism = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        return *determinism, torch.get_float32_matmul_precision(), torch.get_num_threads()

    before = switches()
    assert before[:3] == (False, True, "highest")
    load_detector(folder / "model.safetensors", "cpu").predict(toy_data / "fake" / "0000.png")
    assert switches() == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "0.5", "--final-valid-fraction", "0.4"),  # probabilities of exactly 0, to be calibrated
        ("--backbone", "timm:coat_lite_tiny"),  # whose blocks share layers
    ],
)
def test_a_training_that_reaches_its_last_epoch_finishes(flags: tuple[str, ...], results: Path, toy_data: Path) -> None:
    roots = ("--data-root", toy_data, "--results-root", results)
    said = succeed(
        "model_training.standard_resnet_training", *TOY_FLAGS, *roots, "--epochs", "1", "--seeds", "2", *flags
    )
    assert "standard_resnet seed 2: test accuracy" in said
    path = results / "demo" / "standard_resnet" / "seed_2" / "model.safetensors"
    detector = load_detector(path, "cpu")
    row = read_csv(path.with_name("predictions.csv"))[0]
    found = detector.predict(toy_data / row["path"]).raw_probability_fake
    assert found == pytest.approx(float(row["probability_fake"]), abs=1e-5)
