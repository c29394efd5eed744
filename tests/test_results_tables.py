"""Results of runs -> the paper's tables: the numbers are right, and what is missing is named."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import config
from config import Preset
from data.lists import read_csv
from model_training.results_tables import write_tables
from tests.conftest import run_module, start_afresh, succeed
from tests.written_results import (
    GLASS,
    PNG,
    STANDARD,
    csv_rows,
    glass_trial,
    home,
    line_of,
    text,
    three_seeds,
    write_costs,
    write_run,
    write_runs,
    write_study,
)
from training.metrics import METRICS
from utils import UserError, read_json, write_json


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return three_seeds(tmp_path)


def test_other_experiments_than_the_presets_are_not_missing(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    preset = replace(preset, reproduce=config.DEMO.reproduce)
    write_run(preset, "glass_resnet", 100, 0.9)
    write_tables(preset)
    printed = capsys.readouterr().out
    assert "standard_resnet: seed 100, 200, 300 not run" in printed and "vit" not in printed
    assert not (home(preset) / "tables" / "crop_costs.md").exists()


def test_means_deviations_and_paired_differences_are_those_of_the_seeds(preset: Preset) -> None:
    one = {"glass_resnet": {100: 0.9}, "standard_resnet": {100: 0.8}}
    write_runs(preset, {"glass_vit": GLASS | {400: 0.1}, "standard_vit": STANDARD} | one)
    write_tables(preset)
    row = csv_rows(preset, "test_metrics")["glass_vit"]
    assert (row["n"], row["seeds"], row["missing"]) == ("3", "100 200 300", "")
    assert float(row["accuracy_percent_mean"]) == pytest.approx(93)
    assert float(row["accuracy_percent_std"]) == pytest.approx((26 / 2) ** 0.5)  # squares 9 + 1 + 16, over n - 1
    assert "| 3 | 93.00 ± 3.61 | 50.00 ± 0.00 |" in line_of(preset, "test_metrics", "glass_vit")
    assert r"glass\_vit & 3 & 93.00 $\pm$ 3.61 &" in text(preset, "test_metrics.tex")
    row = csv_rows(preset, "differences")["glass_vit"]  # 2, 1 and 4 points: mean 7/3, variance 7/3
    half = 4.302652729911275 * (7 / 3) ** 0.5 / 3**0.5  # t of two degrees of freedom
    expected = {"": 7 / 3, "_low": 7 / 3 - half, "_high": 7 / 3 + half}
    assert {end: float(row[f"accuracy_points{end}"]) for end in expected} == pytest.approx(expected) and row["n"] == "3"
    assert "+2.33 [-1.46, +6.13]" in line_of(preset, "differences", "glass_vit")
    assert r"+2.33 [$-$1.46, +6.13]" in text(preset, "differences.tex")
    assert csv_rows(preset, "test_metrics")["glass_resnet"]["accuracy_percent_std"] == ""  # of one seed
    assert "| 90.00 |" in line_of(preset, "test_metrics", "glass_resnet")
    assert "+10.00 [n/a, n/a]" in line_of(preset, "differences", "glass_resnet")
    assert "glass_resnet: only one seed in common with standard_resnet" in text(preset, "differences.md")


def test_models_of_other_data_are_not_subtracted_and_copies_do_not_count_twice(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS})
    for seed in GLASS:
        write_run(preset, "standard_vit", seed, 0.8, dataset_fingerprint="f2")
    write_tables(preset)
    assert csv_rows(preset, "differences")["glass_vit"]["accuracy_points"] == ""
    assert "glass_vit: standard_vit was trained on other data" in text(preset, "differences.md")
    shutil.rmtree(home(preset) / "glass_vit" / "seed_200")
    shutil.copytree(home(preset) / "glass_vit" / "seed_100", home(preset) / "glass_vit" / "seed_200")
    with pytest.raises(UserError, match=r"seed_200 holds a run of seed 100 \(run\.json\)"):
        write_tables(preset)


def test_missing_results_and_ignored_seeds_are_named(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9, 200: None}})
    write_run(preset, "glass_vit", 5, 0.1, settings={"epochs": 1})  # a quick try, which must not block the tables
    gone = home(preset) / "tables" / "training_curves_glass_resnet.png"
    gone.parent.mkdir()
    gone.write_bytes(PNG)  # of an earlier result
    write_tables(preset)
    printed = capsys.readouterr().out
    assert not gone.exists() and (gone.parent / "test_metrics.png").read_bytes().startswith(PNG)
    for where in (printed, text(preset, "test_metrics.md"), text(preset, "test_metrics.tex").replace(r"\_", "_")):
        assert "glass_vit: seed 200 not finished; seed 300 not run" in where
        assert "standard_resnet: seed 100, 200, 300 not run" in where
    assert "glass_vit seed_5" in printed.split("Ignored")[1]
    assert [csv_rows(preset, "test_metrics")[name]["n"] for name in ("glass_vit", "standard_resnet")] == ["1", "0"]
    assert "| missing |" in line_of(preset, "test_metrics", "standard_resnet")
    assert "glass_vit: no seed in common with standard_vit" in printed
    assert "best_hyperparameters: glass_vit: no study" in printed
    assert "crop_costs: glass_vit: not measured" in printed
    assert "standard_costs: standard_vit: not measured" in printed
    assert "training_curves_standard_vit.png: no run" in printed


def change_metrics(preset: Preset, run: str, change: Callable[[dict], object]) -> None:
    path = home(preset) / run / "metrics.json"
    metrics = read_json(path)
    change(metrics["test"])
    write_json(path, metrics)


def test_a_metric_that_is_newer_than_a_result_or_not_defined_for_a_seed_is_named_and_left_out(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS, "standard_vit": STANDARD})
    write_tables(preset)
    before = csv_rows(preset, "test_metrics")["glass_vit"]
    change_metrics(preset, "glass_vit/seed_200", lambda test: test.pop("ece"))
    change_metrics(preset, "glass_vit/seed_200", lambda test: test.update(a_metric_of_another_version=7))
    change_metrics(preset, "standard_vit/seed_200", lambda test: test.update(conf_incorrect=None))
    write_tables(preset)
    standard = csv_rows(preset, "test_metrics")["standard_vit"]
    assert float(standard["conf_incorrect_percent_mean"]) == pytest.approx(50)
    assert "standard_vit: Confidence, incorrect is not defined for seed 200" in text(preset, "test_metrics.md")
    changed = {"ece_percent_mean": "", "ece_percent_std": "", "missing": "ECE of seed 200"}
    assert csv_rows(preset, "test_metrics")["glass_vit"] == before | changed
    assert "| missing |" in line_of(preset, "test_metrics", "glass_vit")
    assert line_of(preset, "differences", "glass_vit").endswith("| +0.00 [+0.00, +0.00] | missing |")


def test_the_terminal_shows_the_columns_that_fit_and_names_the_others(
    preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(preset, {"glass_vit": GLASS, "standard_vit": STANDARD})
    write_tables(preset)
    printed = capsys.readouterr().out.splitlines()
    head = next(line for line in printed if line.startswith("Model "))
    others = next(line for line in printed if line.startswith("- In the files also: "))
    every = line_of(preset, "test_metrics", "Model").strip("| ").replace(" | ", ", ")
    assert len(head) <= 80
    assert re.sub("  +", ", ", head.strip()) + ", " + others.removeprefix("- In the files also: ") == f"{every}."


def test_the_notes_say_where_each_commit_and_library_version_holds_from(preset: Preset) -> None:
    first = {"from": "epoch 1", "commit": "abc", "versions": {"torch": "2.11"}}
    later = {"from": "epoch 7", "commit": "def", "versions": {"torch": "2.11"}}
    write_run(preset, "glass_vit", 100, 0.9, environments=[first, later])
    write_run(preset, "glass_resnet", 100, 0.9, environments=[later])
    write_run(preset, "glass_convnext", 100, 0.9, commit="old", versions={"torch": "2.11"})  # as it was written before
    write_tables(preset)
    notes = text(preset, "test_metrics.md")
    assert "- Versions: torch 2.11.\n" in notes
    commits = "abc from epoch 1, then def from epoch 7 (glass_vit); old (glass_convnext); def (glass_resnet)"
    assert f"- Commit: {commits}.\n" in notes


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"settings": {"dropout_rate": 0.3}}, "dropout_rate = 0.1"),
        ({"dataset_fingerprint": "f2"}, "f2"),
        ({"settings": {"device": "cuda", "num_workers": 3, "seeds": [200]}}, None),  # where and how fast it ran
    ],
)
def test_seeds_of_different_settings_or_data_are_not_averaged(
    preset: Preset, metadata: dict, named: str | None
) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    write_run(preset, "glass_vit", 200, 0.9, **metadata)
    with pytest.raises(UserError, match=rf"seed_100 .*seed_200 .*{named}") if named else nullcontext():
        write_tables(preset)
        assert csv_rows(preset, "test_metrics")["glass_vit"]["n"] == "2"


def test_other_seeds_leave_the_tables_of_the_preset_as_they_are(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS, "standard_vit": STANDARD})
    write_tables(preset)
    before = {path: path.read_bytes() for path in (home(preset) / "tables").iterdir()}
    write_run(preset, "glass_resnet", 1, 0.7)
    flags = ("--preset", "demo", "--results-root", home(preset).parent, "--seeds", "1")
    printed = succeed("model_training.results_tables", *flags)
    assert {path: path.read_bytes() for path in (home(preset) / "tables").iterdir()} == before
    rows = read_csv(home(preset) / "tables_seeds_1" / "test_metrics.csv")
    assert {row["model"]: row["n"] for row in rows if row["n"] != "0"} == {"glass_resnet": "1"}
    assert "standard_resnet: seed 1 not run" in printed and "glass_vit seed_100" in printed.split("Ignored")[1]
    done = run_module("model_training.results_tables", *flags, "--epochs", "1")  # which it does not read
    assert done.returncode == 2 and "--epochs" in done.stderr


def test_an_experiment_of_the_users_own_has_its_row_and_its_pair(
    preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(preset, {"glass_mine": GLASS, "standard_mine": STANDARD})
    write_tables(preset)
    assert list(csv_rows(preset, "test_metrics")) == ["standard_mine", "glass_mine"]
    assert csv_rows(preset, "differences")["glass_mine"]["n"] == "3"
    assert (home(preset) / "tables" / "training_curves_glass_mine.png").read_bytes().startswith(PNG)
    assert "vit" not in capsys.readouterr().out  # nothing of the preset's own is missed
    write_run(preset, "glass_vit", 100, 0.9)
    write_tables(preset)
    assert list(csv_rows(preset, "test_metrics")) == [
        "standard_vit", "standard_convnext", "standard_resnet", "standard_mine",
        "glass_vit", "glass_convnext", "glass_resnet", "glass_mine",
    ]  # fmt: skip


IMPOSSIBLE = json.dumps({"test": dict.fromkeys(METRICS, 0.5) | {"accuracy": 12345}})
DAMAGED = [
    ("glass_vit/seed_100/history.csv", "epoch\n1\n"),
    ("glass_vit/seed_100/run.json", ""),
    ("glass_vit/seed_100/run.json", None),
    ("glass_vit/seed_100/metrics.json", "{}"),
    ("glass_vit/seed_100/metrics.json", IMPOSSIBLE),
    ("num_crops/glass_vit/full/costs.csv", "num_crops\n1\n"),
    ("num_crops/glass_vit/full/costs.csv", "num_crops,peak_memory_mb,epoch_seconds,valid_accuracy\n1,1,x,0.5\n"),
    ("tuning/glass_vit/study.db", "no database"),
]


@pytest.mark.parametrize(("file", "content"), DAMAGED)
def test_a_damaged_or_absent_file_is_one_sentence_that_names_it(preset: Preset, file: str, content: str | None) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    write_costs(preset, "num_crops/glass_vit/full", [(1, 2.0, 3.0, 0.9)])
    write_study(preset, "glass_vit", [glass_trial(0.8, 1e-3)])
    write_tables(preset)
    (home(preset) / file).unlink()
    if content is not None:
        (home(preset) / file).write_text(content)
    named = r"accuracy is 12345, not between 0 and 1" if content == IMPOSSIBLE else ""
    with pytest.raises(UserError, match=f"{file} .*{named}") as refusal:
        write_tables(preset)
    assert "\n" not in str(refusal.value)
    assert content is None or (home(preset) / file).read_text() == content


def test_tables_can_be_printed_where_only_ascii_can(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(preset, {"glass_vit": GLASS})
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    flags = ("--preset", "demo", "--seeds", "100", "200", "300", "--results-root", home(preset).parent)
    assert r"93.00 \xb1 3.61" in start_afresh("model_training.results_tables", *flags).communicate(timeout=100)[0]


def test_without_any_result_the_command_says_what_to_run(tmp_path: Path) -> None:
    done = run_module("model_training.results_tables", "--preset", "demo", "--results-root", tmp_path)
    assert done.returncode == 2
    assert "holds no results yet: run python -m model_training.reproduce --preset demo" in done.stderr
    assert list(tmp_path.iterdir()) == []
