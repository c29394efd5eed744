"""Result files -> the paper's tables and figures: the numbers are right, and what is missing is named."""

import contextlib
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

import optuna
import pytest

import config
from config import Preset
from model_training.figures import plot_training_curve
from model_training.results_tables import METRICS, write_tables
from training.progress import EpochRecord
from utils import UserError, resolved, write_csv, write_json

PNG = b"\x89PNG\r\n\x1a\n"
GLASS = {100: 0.90, 200: 0.92, 300: 0.97}  # test accuracy of each seed
STANDARD = {100: 0.88, 200: 0.91, 300: 0.93}


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """The demo preset with its results in tmp_path, where three seeds of all eighteen experiments are expected."""
    settings = replace(config.DEMO.settings, results_root=tmp_path)
    training = config.Training(seeds=(100, 200, 300))
    return replace(config.DEMO, settings=settings, training=training, reproduce=config.PAPER.reproduce)


def test_what_a_preset_does_not_reproduce_is_not_missing(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    preset = replace(preset, reproduce=config.DEMO.reproduce)
    write_run(preset, "glass_resnet", 100, 0.9)
    write_tables(preset)
    printed = capsys.readouterr().out
    assert "standard_resnet: seed 100, 200, 300 not run" in printed and "vit" not in printed
    assert not (home(preset) / "tables" / "crop_costs.md").exists()


def home(preset: Preset) -> Path:
    return preset.settings.results_root / preset.name


def write_run(preset: Preset, name: str, seed: int, accuracy: float | None, **facts: object) -> None:
    """A run folder as model_training writes it; not finished if `accuracy` is None."""
    folder = home(preset) / name / f"seed_{seed}"
    settings = resolved(preset.settings, preset.training) | {"name": name, "seed": seed, "dropout_rate": 0.1}
    settings |= facts.pop("settings", {})
    write_json(folder / "run.json", {"settings": settings, "dataset_fingerprint": "f1", "commit": "abc"} | facts)
    history = [EpochRecord(epoch, 1 / epoch, 1.1 / epoch, 1 - 0.5 / epoch, 2.0, 30.0) for epoch in (1, 2, 3)]
    write_csv(folder / "history.csv", [item.name for item in fields(EpochRecord)], map(astuple, history))
    if accuracy is not None:
        test = dict.fromkeys(METRICS, 0.5) | {"accuracy": accuracy}
        write_json(folder / "metrics.json", {"experiment": name, "seed": seed, "best_epoch": 3, "test": test})


def write_runs(preset: Preset, accuracies: Mapping[str, Mapping[int, float | None]]) -> None:
    for name, of_name in accuracies.items():
        for seed, accuracy in of_name.items():
            write_run(preset, name, seed, accuracy)


def write_costs(preset: Preset, room: str, name: str, mode: str, kind: str, rows: Sequence[tuple[object, ...]]) -> None:
    folder = home(preset) / room / name / mode
    settings = {"measured_steps": 7, "batch_size": 32}
    write_json(folder / "run.json", {"settings": settings, "memory_kind": kind, "hardware": {"cores": 2}})
    write_csv(folder / "costs.csv", ("num_crops", "peak_memory_mb", "epoch_seconds", "valid_accuracy"), rows)


def write_study(preset: Preset, name: str, trials: Sequence[optuna.trial.FrozenTrial]) -> Path:
    folder = home(preset) / "tuning" / name
    settings = resolved(preset.settings, preset.tuning) | {"name": name, "backbone": "timm:test_vit"}
    write_json(folder / "run.json", {"settings": settings})
    path = folder / "study.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, storage=f"sqlite:///{path}", direction="maximize")
    study.add_trials(trials)
    return path


def glass_trial(value: float, lr_local: float, state: str = "COMPLETE") -> optuna.trial.FrozenTrial:
    params = {
        "batch_size": 32, "dropout_rate": 0.2, "lr_global": 1.5e-05, "lr_local": lr_local, "lr_atten_class": 0.0002,
        "wd_global": 1e-06, "wd_local": 2e-06, "num_crops": 6,
    }  # fmt: skip
    choice, real = optuna.distributions.CategoricalDistribution, optuna.distributions.FloatDistribution
    kinds = {
        name: real(1e-7, 1e-1, log=True) if name[:2] in ("lr", "wd") else choice((v,)) for name, v in params.items()
    }
    complete = state == "COMPLETE"
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=value if complete else None,
        params=params,
        distributions=kinds,
        intermediate_values={0: value},
    )


def csv_rows(preset: Preset, table: str) -> dict[str, dict[str, str]]:
    """Model -> its (last) row."""
    with open(home(preset) / "tables" / f"{table}.csv", newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def text(preset: Preset, name: str) -> str:
    return (home(preset) / "tables" / name).read_text(encoding="utf-8")


def line_of(preset: Preset, table: str, model: str) -> str:
    return next(line for line in text(preset, f"{table}.md").splitlines() if line.startswith(f"| {model} |"))


def test_mean_and_sample_standard_deviation_are_those_of_the_seeds(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS})
    write_tables(preset)
    row = csv_rows(preset, "test_metrics")["glass_vit"]
    assert (row["n"], row["seeds"], row["missing"]) == ("3", "100 200 300", "")
    assert float(row["accuracy_percent_mean"]) == pytest.approx(93)
    assert float(row["accuracy_percent_std"]) == pytest.approx((26 / 2) ** 0.5)  # squares 9 + 1 + 16, over n - 1
    assert "| 3 | 93.00 ± 3.61 | 50.00 ± 0.00 |" in line_of(preset, "test_metrics", "glass_vit")
    assert r"glass\_vit & 3 & 93.00 $\pm$ 3.61 &" in text(preset, "test_metrics.tex")


def test_the_difference_has_a_paired_t_interval_over_the_seeds_of_both(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS | {400: 0.1}, "standard_vit": STANDARD})
    write_tables(preset)
    row = csv_rows(preset, "differences")["glass_vit"]  # 2, 1 and 4 points: mean 7/3, variance 7/3
    half = 4.302652729911275 * (7 / 3) ** 0.5 / 3**0.5  # t of two degrees of freedom
    assert row["n"] == "3"
    assert float(row["accuracy_points"]) == pytest.approx(7 / 3)
    assert float(row["accuracy_points_low"]) == pytest.approx(7 / 3 - half)
    assert float(row["accuracy_points_high"]) == pytest.approx(7 / 3 + half)
    assert "+2.33 [-1.46, +6.13]" in line_of(preset, "differences", "glass_vit")
    assert r"+2.33 [$-$1.46, +6.13]" in text(preset, "differences.tex")


def test_one_seed_has_neither_a_standard_deviation_nor_an_interval(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9}, "standard_vit": {100: 0.8}})
    write_tables(preset)
    assert csv_rows(preset, "test_metrics")["glass_vit"]["accuracy_percent_std"] == ""
    assert "| 90.00 |" in line_of(preset, "test_metrics", "glass_vit")
    assert "+10.00 [n/a, n/a]" in line_of(preset, "differences", "glass_vit")
    assert "glass_vit: one seed in common with standard_vit" in text(preset, "differences.md")


def test_a_seed_that_was_not_asked_for_is_left_out_and_named(
    preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9, 200: 0.8}})
    write_run(preset, "glass_vit", 5, 0.1, settings={"epochs": 1})  # a quick try, which must not block the tables
    write_tables(preset)
    assert csv_rows(preset, "test_metrics")["glass_vit"]["n"] == "2"
    assert "glass_vit seed_5" in capsys.readouterr().out.split("Left out")[1]


def test_what_is_missing_is_named(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9, 200: None}})
    write_tables(preset)
    printed = capsys.readouterr().out
    for where in (printed, text(preset, "test_metrics.md"), text(preset, "test_metrics.tex").replace(r"\_", "_")):
        assert "glass_vit: seed 200 not finished; seed 300 not run" in where
        assert "standard_resnet: seed 100, 200, 300 not run" in where
    assert csv_rows(preset, "test_metrics")["standard_resnet"]["n"] == "0"
    assert "| missing |" in line_of(preset, "test_metrics", "standard_resnet")
    assert "glass_vit: no seed in common with standard_vit" in printed
    assert "best_hyperparameters: glass_vit: no study" in printed
    assert "crop_costs: glass_vit: not measured" in printed
    assert "standard_costs: standard_vit: not measured" in printed
    assert "training_curves_standard_vit.png: no run" in printed


def test_a_metric_that_one_seed_does_not_have_is_left_out_by_name(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS})
    path = home(preset) / "glass_vit" / "seed_200" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test"]["conf_incorrect"] = None
    write_json(path, metrics)
    write_tables(preset)
    assert float(csv_rows(preset, "test_metrics")["glass_vit"]["conf_incorrect_percent_mean"]) == pytest.approx(50)
    assert "glass_vit: Confidence, incorrect is not defined for seed 200" in text(preset, "test_metrics.md")


@pytest.mark.parametrize(
    ("facts", "named"),
    [({"settings": {"dropout_rate": 0.3}}, "dropout_rate = 0.1"), ({"dataset_fingerprint": "f2"}, "f2")],
)
def test_seeds_of_different_settings_or_data_are_not_averaged(preset: Preset, facts: dict, named: str) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    write_run(preset, "glass_vit", 200, 0.9, **facts)
    with pytest.raises(UserError, match=f"seed_100.*{named}|{named}.*seed_200") as refusal:
        write_tables(preset)
    assert "seed_100" in str(refusal.value) and "seed_200" in str(refusal.value)


def test_a_run_that_does_not_say_what_it_was_run_with_is_refused(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9, 200: 0.8}})
    (home(preset) / "glass_vit" / "seed_200" / "run.json").unlink()
    with pytest.raises(UserError, match=r"seed_200 has no run\.json to say what it was run with"):
        write_tables(preset)


def test_seeds_on_different_devices_are_averaged(preset: Preset) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    write_run(preset, "glass_vit", 200, 0.9, settings={"device": "cuda", "num_workers": 3, "seeds": [200]})
    write_tables(preset)
    assert csv_rows(preset, "test_metrics")["glass_vit"]["n"] == "2"


def test_models_of_different_data_are_not_subtracted(preset: Preset) -> None:
    for seed in GLASS:
        write_run(preset, "glass_vit", seed, 0.9)
        write_run(preset, "standard_vit", seed, 0.8, dataset_fingerprint="f2")
    write_tables(preset)
    assert csv_rows(preset, "differences")["glass_vit"]["accuracy_points"] == ""
    assert "glass_vit: standard_vit was trained on other data" in text(preset, "differences.md")


def test_an_experiment_of_the_users_own_has_its_row_and_its_pair(preset: Preset) -> None:
    write_runs(preset, {"glass_mine": GLASS, "standard_mine": STANDARD})
    write_tables(preset)
    assert list(csv_rows(preset, "test_metrics")) == [
        "standard_vit", "standard_convnext", "standard_resnet", "standard_mine",
        "glass_vit", "glass_convnext", "glass_resnet", "glass_mine",
    ]  # fmt: skip
    assert csv_rows(preset, "differences")["glass_mine"]["n"] == "3"
    assert (home(preset) / "tables" / "training_curves_glass_mine.png").read_bytes().startswith(PNG)


def test_the_best_trial_is_given_as_a_line_of_config(preset: Preset) -> None:
    trials = [
        glass_trial(0.8, 1e-3),
        glass_trial(0.95, 2e-3),
        glass_trial(0.95, 3e-3),
        glass_trial(0.99, 4e-3, "PRUNED"),
    ]
    path = write_study(preset, "glass_vit", trials)
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())
    write_tables(preset)
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before
    row = csv_rows(preset, "best_hyperparameters")["glass_vit"]
    assert (row["trials_complete"], row["trials_pruned"], row["trials_fail"]) == ("3", "1", "0")
    assert row["best_trial"] == "1"  # the first of the best
    assert float(row["valid_accuracy_percent"]) == pytest.approx(95)
    assert (float(row["lr_local"]), row["num_crops"], row["lr"]) == (2e-3, "6", "")
    code = text(preset, "best_hyperparameters.md").split("```")[1].removeprefix("python")
    (pasted,) = eval(f"({code.strip()})", vars(config))
    assert asdict(pasted) == {"name": "glass_vit", "backbone": "timm:test_vit", **trials[1].params}
    for figure in ("tuning_history_glass_vit.png", "tuning_importance_glass_vit.png"):
        assert (home(preset) / "tables" / figure).read_bytes().startswith(PNG)


def test_a_study_too_small_for_importances_says_so(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(preset, "glass_vit", [glass_trial(0.8, 1e-3), glass_trial(0.8, 2e-3)])
    write_study(preset, "glass_resnet", [glass_trial(0.8, 1e-3, "FAIL")])
    write_tables(preset)
    printed = capsys.readouterr().out
    assert "tuning_importance_glass_vit.png: needs two complete trials of different accuracy" in printed
    assert "best_hyperparameters: glass_vit: 2 of 4 trials" in printed
    assert "best_hyperparameters: glass_resnet: no complete trial" in printed
    assert "tuning_history_glass_resnet.png: no complete trial" in printed


@pytest.mark.parametrize("content", [b"", b"no database"])
def test_a_broken_study_is_one_sentence_and_stays_as_it_is(preset: Preset, content: bytes) -> None:
    path = home(preset) / "tuning" / "glass_vit" / "study.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"study\.db cannot be read"):
        write_tables(preset)
    assert path.read_bytes() == content


IMPOSSIBLE = dict.fromkeys(METRICS, 0.5) | {"accuracy": 12345}
DAMAGED = {
    "glass_vit/seed_100/history.csv": ["epoch\n1\n", "epoch,train_loss\n1\n", "epoch\n" + 200_000 * "1" + "\n"],
    "glass_vit/seed_100/run.json": ["", "{}", "[]", "5", '{"settings": 5}'],
    "glass_vit/seed_100/metrics.json": ["", "{}", "[]", '{"test": {}}', json.dumps({"test": IMPOSSIBLE})],
    "num_crops/glass_vit/full/costs.csv": ["num_crops\n1\n", "num_crops,peak_memory_mb\n1\n", "a,b\nx,y\n"],
    "num_crops/glass_vit/full/run.json": ["{}", "[]"],
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file in DAMAGED for content in DAMAGED[file]])
def test_a_damaged_result_is_one_sentence_that_names_it(preset: Preset, file: str, content: str) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    write_costs(preset, "num_crops", "glass_vit", "full", "cuda_max_memory_allocated", [(1, 2.0, 3.0, 0.9)])
    write_tables(preset)
    (home(preset) / file).write_text(content)
    with pytest.raises(UserError, match=f"{file} does not hold what this project writes there") as refusal:
        write_tables(preset)
    assert "\n" not in str(refusal.value)


def test_a_run_that_was_copied_under_another_seed_does_not_count_twice(preset: Preset) -> None:
    write_run(preset, "glass_vit", 100, 0.9)
    shutil.copytree(home(preset) / "glass_vit" / "seed_100", home(preset) / "glass_vit" / "seed_200")
    with pytest.raises(UserError, match=r"seed_200 holds a run of seed 100 \(run\.json\)"):
        write_tables(preset)


def test_a_trial_that_is_better_than_its_epochs_is_not_believed(preset: Preset) -> None:
    path = write_study(preset, "glass_vit", [glass_trial(0.8, 1e-3)])
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE trial_values SET value = 0.99")
    with pytest.raises(UserError, match=r"study\.db cannot be read .*trial 0 has the value 0\.99, not the best"):
        write_tables(preset)


def test_tables_can_be_printed_where_only_ascii_can(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": GLASS})
    command = [sys.executable, "-m", "model_training.results_tables", "--preset", "demo"]
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*command, "--seeds", "100", "200", "300", "--results-root", home(preset).parent],
        cwd=Path(config.__file__).parent, env=ascii_only, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"93.00 \xb1 3.61" in done.stdout


def test_fitted_lines_give_back_the_static_cost_and_the_cost_of_a_crop(preset: Preset) -> None:
    rows = [(k, 100 + 50 * k, 3 + 0.5 * k, 0.9 + 0.001 * k) for k in (1, 2, 4)]
    write_costs(preset, "num_crops", "glass_vit", "full", "cuda_max_memory_allocated", rows)
    write_tables(preset)
    row = {key: value for key, value in csv_rows(preset, "crop_cost_lines")["glass_vit"].items()}
    lines = {"memory_static_mb": 100, "memory_per_crop_mb": 50, "memory_r_squared": 1}
    lines |= {"time_static_seconds": 3, "time_per_crop_seconds": 0.5, "time_r_squared": 1}
    assert {key: float(row[key]) for key in lines} == pytest.approx(lines)
    assert "| glass_vit | full | 4 | 300.0 | 5.00 | 90.40 |" in text(preset, "crop_costs.md")
    assert "| glass_vit | full | 8 | missing | missing | missing |" in text(preset, "crop_costs.md")
    assert "glass_vit: full: K = 8 not measured" in text(preset, "crop_costs.md")
    assert (home(preset) / "tables" / "crop_costs_glass_vit.png").read_bytes().startswith(PNG)


def test_quick_costs_and_kinds_of_memory_are_labelled_and_kept_apart(preset: Preset) -> None:
    rows = [(k, 10 * k, k, "") for k in (1, 2, 4, 8)]
    write_costs(preset, "num_crops", "glass_vit", "quick", "saved_for_backward", rows)
    write_costs(preset, "standard_memory", "standard_vit", "quick", "cuda_max_memory_allocated", [("", 77, 2.5, "")])
    write_tables(preset)
    for table in ("crop_costs", "crop_cost_lines", "standard_costs"):
        assert "quick: epoch time extrapolated from 7 steps" in text(preset, f"{table}.md")
    assert "Memory kept for the backward pass, CPU (MB)" in text(preset, "crop_costs.md")
    standard = text(preset, "standard_costs.md")
    assert "Memory of different kinds cannot be compared." in standard
    gpu_then_cpu = "| standard_vit | quick | 77.0 |  | 2.50 | n/a | 4 |  | 40.0 | 4.00 | n/a |"
    assert gpu_then_cpu in standard


def test_the_standard_cost_stands_beside_glass_at_its_tuned_number_of_crops(preset: Preset) -> None:
    write_costs(
        preset, "num_crops", "glass_vit", "full", "cuda_max_memory_allocated", [(k, 10 * k, k, 0.9) for k in (1, 4)]
    )
    write_costs(preset, "standard_memory", "standard_vit", "full", "cuda_max_memory_allocated", [("", 7, 2.5, 0.8)])
    write_costs(preset, "standard_memory", "standard_resnet", "full", "cuda_max_memory_allocated", [("", 7, 2, 0.8)])
    write_tables(preset)
    assert "| standard_vit | full | 7.0 | 2.50 | 80.00 | 4 | 40.0 | 4.00 | 90.00 |" in text(preset, "standard_costs.md")
    assert "glass_resnet at its tuned K = 4 not measured" in text(preset, "standard_costs.md")


def test_a_figure_of_results_that_are_gone_goes_too(preset: Preset) -> None:
    write_runs(preset, {"glass_vit": {100: 0.9}})
    stale = home(preset) / "tables" / "training_curves_glass_resnet.png"
    stale.parent.mkdir()
    stale.write_bytes(PNG)
    write_tables(preset)
    assert not stale.exists()
    assert (home(preset) / "tables" / "test_metrics.png").read_bytes().startswith(PNG)


def test_without_any_result_the_door_says_what_to_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "model_training.results_tables",
        "--preset",
        "demo",
        "--results-root",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=Path(config.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no results yet: run python -m model_training.reproduce --preset demo" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_training_curve_of_a_run_of_one_epoch_can_be_drawn(tmp_path: Path) -> None:
    plot_training_curve(tmp_path / "curve.png", "glass_vit", {"seed 100": [EpochRecord(1, 0.7, 0.6, 0.5, 1.0, 1.0)]})
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
