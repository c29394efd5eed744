"""The grid of ablations, by its command at toy size: what is chosen, what the table says, how it is resumed."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from data.lists import read_csv
from tests.campaigns.kills import state_of
from tests.conftest import TOY_SETTINGS, copy_index, refused, start_module, succeed, wait_until
from training.detection_metrics import paired_differences
from utils import STOPPED

COMMAND = "model_training.ablations"
GRID = ("--samplers", "random", "--poolings", "mean", "--branches", "local", "--learning-rates", "1", "0.01")
FLAGS = (
    *(*TOY_SETTINGS, "--test-size", "10", "--final-valid-fraction", "0.4", "--group-by", "stem"),
    *("--epochs", "1", "--seeds", "1", "2"),
)
VARIANTS = ("stratified_attention", "random_mean", "local", "standard")


@pytest.fixture(scope="module")
def finished(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root in which the whole grid was trained without an interruption."""
    results = copy_index(indexed, tmp_path_factory.mktemp("ablations"))
    succeed(COMMAND, *FLAGS, *GRID, "--data-root", toy_data, "--results-root", results, timeout=900)
    return results


def table_of(results: Path) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in read_csv(results / "demo" / "ablations" / "glass_resnet" / "ablations.csv")}


def predictions_of(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities of fake, labels, and the pair of each image."""
    rows = read_csv(folder / "predictions.csv")
    values = [np.array([float(row[column]) for row in rows]) for column in ("probability_fake", "label")]
    return *values, [Path(row["path"]).stem for row in rows]


def test_the_table_is_what_histories_and_predictions_say(finished: Path) -> None:
    folder, table = finished / "demo" / "ablations" / "glass_resnet", table_of(finished)
    assert tuple(table) == VARIANTS and not any(row["missing"] for row in table.values())
    fakes = {}
    for name, row in table.items():
        folders = {factor: f"{name}{end}" for factor, end in (("1.0", ""), ("0.01", "-lr0.01"))}
        epochs = {f: read_csv(folder / of / "seed_1" / "history.csv")[0] for f, of in folders.items()}
        order = {f: (-float(e["valid_accuracy"]), float(e["valid_loss"])) for f, e in epochs.items()}
        assert row["factor"] == min(order, key=order.get)
        assert [(folder / of / "seed_2").exists() for of in folders.values()] == [f == row["factor"] for f in folders]

        seeds = [folder / folders[row["factor"]] / f"seed_{seed}" for seed in (1, 2)]
        found = [predictions_of(seed) for seed in seeds]
        fakes[name], labels, pairs = [fake for fake, *_ in found], found[0][1], found[0][2]
        accuracies = [100 * ((fake < 0.5) == labels).mean() for fake in fakes[name]]
        areas = [100 * roc_auc_score(labels == 0, fake) for fake in fakes[name]]
        histories = [read_csv(seed / "history.csv")[0] for seed in seeds]
        validations = [100 * float(epoch["valid_accuracy"]) for epoch in histories]
        for metric, values in (("accuracy", accuracies), ("auc_score", areas), ("valid_accuracy", validations)):
            assert float(row[f"{metric}_percent_mean"]) == pytest.approx(np.mean(values))
            assert float(row[f"{metric}_percent_std"]) == pytest.approx(np.std(values, ddof=1))
        assert float(row["images_per_second"]) == np.median([float(epoch["images_per_second"]) for epoch in histories])
        assert float(row["peak_memory_mb"]) == max(float(epoch["peak_memory_mb"]) for epoch in histories)

    assert {row["factor"] for row in table.values()} != {"1.0"}  # so that the first is no answer
    assert table["standard"]["sampler"] == ""
    for name in VARIANTS[1:]:
        by_pairs = paired_differences(fakes[VARIANTS[0]], fakes[name], labels, ([0.5] * 2,) * 2, pairs)
        for metric, values in (("auc_score", by_pairs["auc"]), ("accuracy", by_pairs["accuracy"])):
            columns = [f"{metric}_points{end}" for end in ("", "_low", "_high")]
            assert [float(table[name][column]) for column in columns] == pytest.approx(
                [100 * value for value in values]
            )
            means = [float(table[each][f"{metric}_percent_mean"]) for each in (name, VARIANTS[0])]
            assert float(table[name][columns[0]]) == pytest.approx(means[0] - means[1])
    markdown = (folder / "ablations.md").read_text()
    assert "| stratified_attention | stratified | attention | both | 4 |" in markdown and "over 5 groups" in markdown
    assert (folder / "ablations.tex").exists() and (folder / "ablations.png").stat().st_size > 5000


@pytest.mark.slow
def test_an_interrupted_grid_ends_like_an_uninterrupted_one_and_can_be_extended(
    finished: Path, toy_data: Path, results: Path
) -> None:
    command = (COMMAND, *FLAGS, *GRID, "--data-root", toy_data, "--results-root", results)
    folder = results / "demo" / "ablations" / "glass_resnet"
    for killed, there in (
        (signal.SIGKILL, "random_mean/seed_1/checkpoint.pt"),
        (signal.SIGTERM, "local/seed_1/run.json"),
    ):
        process = start_module(*command, "--checkpoint-every", "2")
        wait_until((folder / there).exists, process)
        os.killpg(process.pid, killed)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == (-killed if killed == signal.SIGKILL else STOPPED), errors
        rows = table_of(results)
        assert not rows[VARIANTS[0]]["missing"] and "not tried" in rows["standard"]["missing"]
    printed = succeed(*command, timeout=900)
    assert f"[4/4] {VARIANTS[3]}, about" in printed and printed.count("(finished before)") >= 6

    whole, found = (state_of(root / "demo" / "ablations" / "glass_resnet") for root in (finished, results))
    tables = {f"ablations.{end}" for end in ("csv", "md", "tex")}  # which have the speed, that differs
    assert {k: v for k, v in found.items() if k not in tables} == {k: v for k, v in whole.items() if k not in tables}
    without_speed = [
        {name: {k: v for k, v in row.items() if k != "images_per_second"} for name, row in table_of(root).items()}
        for root in (finished, results)
    ]
    assert without_speed[0] == without_speed[1]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed_*/model.safetensors")}
    printed = succeed(*command, "--crop-counts", "2", "--samplers", "random")
    assert [*table_of(results)] == [*VARIANTS[:3], "k_2", "standard"] and table_of(results)["k_2"]["num_crops"] == "2"
    assert printed.count("(finished before)") == len(before) == 4 * 3
    assert before == {path: path.stat().st_mtime_ns for path in before}
    message = refused("model_training.results_tables", "--preset", "demo", "--results-root", results)
    assert "holds no results yet" in message  # of its own
    assert "label_smoothing = 0.1, now 0.3: pass --restart" in refused(*command, "--label-smoothing", "0.3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samplers", "five"), "num_crops is 4: crop_sampler five takes 5"),
        (("--experiment", "standard_resnet"), "standard_resnet is no GLASS model"),
        (("--learning-rates", "1", "5000"), "lr_global is 5.0: input should be less than or equal to 1"),
        (("--learning-rates", "1", "1"), "it must be one or more values, each once"),
    ],
)  # fmt: skip
def test_an_impossible_grid_is_refused(flags: tuple[str, ...], message: str, toy_data: Path, results: Path) -> None:
    assert message in refused(COMMAND, *FLAGS, *flags, "--data-root", toy_data, "--results-root", results)
    assert not (results / "demo" / "ablations").exists()


def test_a_training_that_fails_does_not_stop_the_others(toy_data: Path, results: Path, tmp_path: Path) -> None:
    weights = timm.create_model("resnet10t").state_dict()
    for name in weights:
        if name.endswith("running_mean"):
            weights[name].fill_(-3e38)  # counts in validation only
    save_file(weights, file := tmp_path / "weights.safetensors")
    grid = "--samplers random --poolings mean --branches both --learning-rates 1 --no-standard"
    flags = (*FLAGS, *grid.split(), "--weights-files", f"timm:resnet10t={file}")
    message = refused(COMMAND, *flags, "--data-root", toy_data, "--results-root", results)
    assert "2 trainings failed: stratified_attention seed 1 failed: the model's outputs are infinite" in message
    assert [row["missing"] for row in table_of(results).values()] == ["seed 1, 2 not run"] * 2
