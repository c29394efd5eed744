"""Optuna studies and cost studies -> the paper's tables and figures."""

import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

import config
from config import Preset
from model_training.results_tables import write_tables
from tests.written_results import PNG, csv_rows, glass_trial, home, text, three_seeds, write_costs, write_study
from training.runtime import CPU_MEMORY
from utils import UserError, read_json, write_json


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return three_seeds(tmp_path)


def test_the_best_trial_is_given_as_a_line_of_config(preset: Preset) -> None:
    trials = [glass_trial(value, lr_local) for value, lr_local in ((0.8, 1e-3), (0.95, 2e-3), (0.95, 3e-3))]
    trials.append(glass_trial(0.99, 4e-3, "PRUNED"))
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


def test_a_trial_whose_value_is_not_that_of_its_best_epoch_is_refused(preset: Preset) -> None:
    with closing(sqlite3.connect(write_study(preset, "glass_vit", [glass_trial(0.8, 1e-3)]))) as database, database:
        database.execute("UPDATE trial_values SET value = 0.99")
    with pytest.raises(UserError, match=r"study\.db cannot be read .*trial 0 has the value 0\.99, not 0\.8"):
        write_tables(preset)


def test_fitted_lines_reproduce_the_costs_of_crops_and_standard_costs_are_compared_with_glass(preset: Preset) -> None:
    for k in (1, 2, 4):
        write_costs(preset, f"num_crops/glass_vit/full/k_{k}", [(k, 100 + 50 * k, 3 + 0.5 * k, 0.9 + 0.001 * k)])
    write_costs(
        preset,
        "standard_memory/standard_vit/full",
        [("", 7, 2.5, 0.8, 9)],
        author_runtime=False,
        compilation="before them",
    )
    write_costs(preset, "standard_memory/standard_resnet/full", [("", 7, 2, 0.8)])
    write_tables(preset)
    row = csv_rows(preset, "crop_cost_lines")["glass_vit"]
    lines = {"memory_static_mb": 100, "memory_per_crop_mb": 50, "memory_r_squared": 1}
    lines |= {"time_static_seconds": 3, "time_per_crop_seconds": 0.5, "time_r_squared": 1}
    assert {key: float(row[key]) for key in lines} == pytest.approx(lines)
    assert "| glass_vit | full | 4 | 300.0 | n/a | 5.00 | 90.40 |" in text(preset, "crop_costs.md")
    assert "| glass_vit | full | 8 | missing | missing | missing | missing |" in text(preset, "crop_costs.md")
    assert "glass_vit: full: K = 8 not measured" in text(preset, "crop_costs.md")
    assert (home(preset) / "tables" / "crop_costs_glass_vit.png").read_bytes().startswith(PNG)
    notes = text(preset, "crop_costs.md")
    assert "compilation in the first epoch." in notes and "Computed: as the author's code." in notes  # as once
    costs = text(preset, "standard_costs.md")  # beside GLASS at its tuned number of crops
    assert "| standard_vit | full | 7.0 | 9.0 | 2.50 | 80.00 | 4 | 300.0 | n/a | 5.00 | 90.40 |" in costs
    assert "reports the larger of the two: the maximum over all epochs, including the first, which compiles" in costs
    assert "glass_resnet at its tuned K = 4 not measured" in costs
    assert "Computed: as config.py says (standard_vit full); as the author's code (" in costs
    assert "compilation before them (standard_vit full)" in costs


def test_crop_counts_that_were_measured_with_different_settings_are_refused(preset: Preset) -> None:
    for k in (10, 9, 2):
        write_costs(preset, f"num_crops/glass_vit/full/k_{k}", [(k, 2.0, 3.0, 0.9)], measured_steps=7 + (k == 2))
    with pytest.raises(UserError, match=r"k_2 and .*k_9 differ \(measured_steps = 8, now 7\), so a line through both"):
        write_tables(preset)
    write_costs(preset, "num_crops/glass_vit/full/k_2", [(2, 2.0, 3.0, 0.9)])
    path = home(preset) / "num_crops" / "glass_vit" / "full" / "k_10" / "run.json"
    write_json(path, read_json(path) | {"commit": "def"})
    write_tables(preset)
    assert "Commit: unknown from its start, then def from its start." in text(preset, "crop_cost_lines.md")


def test_quick_costs_and_kinds_of_memory_are_labelled_and_kept_apart(preset: Preset) -> None:
    rows = [(k, 10 * k, k, "") for k in (1, 2, 4, 8)]
    write_costs(preset, "num_crops/glass_vit/quick", rows, kind=CPU_MEMORY)
    write_costs(preset, "standard_memory/standard_vit/quick", [("", 77, 2.5, "")])
    write_tables(preset)
    for table in ("crop_costs", "crop_cost_lines", "standard_costs"):
        assert "quick: epoch time extrapolated from 7 steps" in text(preset, f"{table}.md")
    assert "Memory kept for the backward pass, CPU (MB)" in text(preset, "crop_costs.md")
    standard = text(preset, "standard_costs.md")
    assert "Memory of different kinds cannot be compared." in standard
    line = "| standard_vit | quick | 77.0 | n/a |  |  | 2.50 | n/a | 4 |  |  | 40.0 | n/a | 4.00 | n/a |"
    assert line in standard  # GPU, then CPU
