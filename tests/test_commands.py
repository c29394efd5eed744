"""All eighteen experiments, the tables and the reproduction, run as a user runs them, at toy size."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from data.lists import read_csv
from tests.benchmarks.handmade import features
from tests.conftest import (
    PREPROCESS_FLAGS,
    TOY_SETTINGS,
    copy_index,
    refused,
    run_module,
    succeed,
    write_toy_images,
)

BACKBONES = {"vit": "timm:test_vit", "convnext": "timm:test_convnext", "resnet": "timm:test_resnet"}  # tiny ones
NAMES = [f"{family}_{backbone}" for family in ("standard", "glass") for backbone in BACKBONES]
TUNING = "--epochs 2 --trials 2 --min-resource 1 --max-resource 2"
SWEEP = "--quick --crop-counts 1 2 4 --measured-steps 2 --batch-size 8"
FLAGS_OF_A_COMMAND = {
    **{f"hyperparameter_tuning.{name}_tuning": TUNING for name in NAMES},
    **{f"model_training.{name}_training": "--epochs 2 --seeds 1 2" for name in NAMES},
    **{f"num_crops.num_crops_{backbone}": SWEEP for backbone in BACKBONES},
    **{f"standard_memory.standard_memory_{backbone}": "--epochs 1 --no-quick" for backbone in BACKBONES},
}
COMMANDS = {
    name: [*TOY_SETTINGS, "--backbone", tiny, *flags.split()]
    for name, flags in FLAGS_OF_A_COMMAND.items()
    for backbone, tiny in BACKBONES.items()
    if backbone in name
}


@pytest.fixture(scope="module")
def results(indexed: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root after all eighteen commands and the tables."""
    root = copy_index(indexed, tmp_path_factory.mktemp("commands"))
    places = ("--data-root", toy_data, "--results-root", root)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: succeed(command, *COMMANDS[command], *places), COMMANDS))
    asked = (*TUNING.split()[2:4], "--seeds", "1", "2", "--crop-counts", "1", "2", "4")
    succeed("model_training.results_tables", "--preset", "demo", "--results-root", root, *asked)
    return root / "demo"


@pytest.mark.parametrize("name", NAMES)
def test_each_command_leaves_its_results(name: str, results: Path) -> None:
    family, _ = name.split("_")
    for seed in (1, 2):
        folder = results / name / f"seed_{seed}"
        assert len(read_csv(folder / "history.csv")) == 2
        assert 0 <= json.loads((folder / "metrics.json").read_text())["test"]["accuracy"] <= 1
        assert len(read_csv(folder / "predictions.csv")) == 6
        Image.open(folder / "training_curve.png").verify()
    assert (results / "tuning" / name / "study.db").stat().st_size > 0
    if family == "glass":
        folder = results / "num_crops" / name / "quick"
        rows = [row for crops in (1, 2, 4) for row in read_csv(folder / f"k_{crops}" / "costs.csv")]
        assert [int(row["num_crops"]) for row in rows] == [1, 2, 4]
        memory = [float(row["peak_memory_mb"]) for row in rows]
        assert [float(row["warm_up_memory_mb"]) for row in rows] == pytest.approx(memory)  # of the same batch on a CPU
        assert memory[2] - memory[1] == pytest.approx(2 * (memory[1] - memory[0]), rel=0.05)
    else:
        (row,) = read_csv(results / "standard_memory" / name / "full" / "costs.csv")
        assert float(row["peak_memory_mb"]) > 0 and 0 <= float(row["valid_accuracy"]) <= 1


def test_every_table_is_complete(results: Path) -> None:
    tables = results / "tables_seeds_1_2"
    for name in ("test_metrics", "best_hyperparameters", "crop_costs", "crop_cost_lines"):
        for ending in ("md", "tex"):
            assert "missing" not in (tables / f"{name}.{ending}").read_text().lower(), name
    assert [row["n"] for row in read_csv(tables / "test_metrics.csv")] == ["2"] * len(NAMES)
    for png in tables.glob("*.png"):
        Image.open(png).verify()
    assert {png.stem for png in tables.glob("training_curves_*.png")} == {f"training_curves_{name}" for name in NAMES}


def test_a_command_run_again_does_nothing_twice(results: Path, toy_data: Path) -> None:
    before = {
        path: path.read_bytes() for path in results.rglob("*") if path.suffix in (".csv", ".safetensors", ".json")
    }
    left_over = [  # by a kill between a result and the end of its checkpoint
        results / "tuning" / "glass_resnet" / "trial_1.pt",
        results / "glass_resnet" / "seed_2" / "checkpoint.pt",
        results / "num_crops" / "glass_vit" / "quick" / "k_4" / "checkpoint.pt",
        results / "standard_memory" / "standard_vit" / "full" / "checkpoint.pt",
    ]
    for path in left_over:
        path.write_bytes(b"")
    studies = ("num_crops.num_crops_vit", "standard_memory.standard_memory_vit")
    for command in ("hyperparameter_tuning.glass_resnet_tuning", "model_training.glass_resnet_training", *studies):
        succeed(command, *COMMANDS[command], "--data-root", toy_data, "--results-root", results.parent)
    after = {path: path.read_bytes() for path in before}
    changed = [path.name for path in before if before[path] != after[path]]
    assert set(changed) <= {"run.json"}  # which tells of the latest command
    assert not any(path.exists() for path in left_over)


def test_the_reproduction_runs_its_commands_then_the_tables_and_says_why(toy_data: Path, tmp_path: Path) -> None:
    arguments = [*TOY_SETTINGS, "--data-root", toy_data, "--results-root", tmp_path, "--epochs", "1", "--seeds", "3"]
    printed = succeed("model_training.reproduce", *arguments)
    order = [printed.index(f"-m model_training.{name}_training") for name in ("standard_resnet", "glass_resnet")]
    assert order == sorted(order) and printed.index("no evidence about real generators") > order[1]  # closing_words
    assert (tmp_path / "demo" / "tables_seeds_3" / "test_metrics.md").exists()
    assert (tmp_path / "demo" / "glass_resnet" / "seed_3" / "metrics.json").exists()


@pytest.mark.slow
def test_the_reproduction_names_the_commands_that_failed(toy_data: Path, tmp_path: Path) -> None:
    arguments = [*TOY_SETTINGS, "--data-root", toy_data, "--results-root", tmp_path, "--epochs", "1"]
    arguments += ["--final-valid-fraction", "0.05"]  # 33 images to train: four batches and one image
    done = run_module("model_training.reproduce", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("does not take here") == 2
    assert "2 of 2 commands failed" in done.stderr and "glass_resnet_training" in done.stderr


@pytest.mark.slow
def test_the_benchmark_of_training_leaves_a_table(tmp_path: Path) -> None:
    report, data = tmp_path / "report.md", tmp_path / "report.json"
    succeed("tests.benchmarks.training", "--cases", "1", "--minutes", "4", "--json", data, "--markdown", report)
    found = json.loads(data.read_text())
    assert len(found["ceilings"]) == 10 and all(value > 0 for _, value, _ in found["ceilings"])
    (case, first), *_ = found["cases"]
    assert case["model"] == "glass_vit" and first["images/s"] > 0 and first["loss after 2"] < 2
    assert "### Training" in report.read_text() and "| glass_vit |" in report.read_text()


def test_hand_made_features_are_compared_with_trained_models(toy_data: Path, tmp_path: Path) -> None:
    write_toy_images(root := tmp_path / "data", 60)
    places = ("--preset", "demo", "--data-root", root, "--results-root", tmp_path, "--group-by", "stem")
    split = ("--valid-size", "0.15", "--test-size", "0.25", "--final-valid-fraction", "0.1")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, *places[2:6])
    training = ("--patch-size", "32", "--num-workers", "0", "--device", "cpu", "--epochs", "1", "--seeds", "1")
    succeed("model_training.standard_resnet_training", *places, *split, *training)
    predictions, scores = tmp_path / "demo" / "standard_resnet" / "seed_1" / "predictions.csv", tmp_path / "scores.csv"
    floor = ("tests.benchmarks.handmade", *places, "--seeds", "1", "2")
    printed = succeed(*floor, *split, "--predictions", predictions, "--scores", scores)
    rows = read_csv(scores)
    names = ["hand-made seed_1", "hand-made seed_2", "standard_resnet seed_1"]
    assert list(rows[0]) == ["path", "label", *names] and len(rows) == 30
    labels, values = [int(row["label"]) for row in rows], [[float(row[name]) for row in rows] for name in names]
    assert {row["path"]: row[names[2]] for row in rows} == {
        row["path"]: row["probability_fake"] for row in read_csv(predictions)
    }
    aucs = [100 * roc_auc_score(np.array(labels) == 0, fake) for fake in values]
    assert min(aucs[:2]) > 95  # the toy fakes' pixels are repeated
    assert f"| hand-made | {np.mean(aucs[:2]):.1f} ± {np.std(aucs[:2], ddof=1):.1f} [" in printed
    assert f"| standard_resnet minus hand-made | all | native | {aucs[2] - np.mean(aucs[:2]):+.1f} [" in printed
    printed = succeed(*floor, *split, "--test-root", toy_data)
    assert f"40 images of {toy_data}, 20 of them fake" in printed and "interval over 20 pairs]" in printed
    message = refused(*floor, "--valid-size", "0.15", "--test-size", "0.2", "--predictions", predictions)
    assert f"{predictions} cannot be read (ValueError: it has 30 images, and not those 24 that are tested)" in message


def test_hand_made_features_of_a_known_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 10, (40, 50, 3)).astype(np.uint8)
    found = features(pixels).reshape(3, -1)
    for channel, axis in product(range(3), (0, 1)):
        second = np.diff(pixels[..., channel].astype(int), n=2, axis=axis).clip(-8, 8)
        assert found[channel, 17 * axis :][:17] == pytest.approx([np.mean(second == value) for value in range(-8, 9)])
    waves = np.broadcast_to(np.cos(2 * np.pi * np.arange(64) / 4)[:, None, None], (64, 64, 3))  # of 1/4 cycle per pixel
    levels = features((100 + 50 * waves).round().astype(np.uint8))[34:67]
    assert levels.argmax() == 16 and levels.mean() == pytest.approx(0, abs=1e-9)
