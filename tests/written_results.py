"""Result files as experiments write them, with numbers that a test chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import optuna

import config
from config import Preset
from data.lists import read_csv, write_csv
from training.metrics import METRICS
from training.runs import resolved
from training.runtime import CUDA_MEMORY
from utils import find_experiment, write_json

PNG = b"\x89PNG\r\n\x1a\n"
GLASS = {100: 0.90, 200: 0.92, 300: 0.97}  # test accuracy of each seed
STANDARD = {100: 0.88, 200: 0.91, 300: 0.93}


def three_seeds(tmp_path: Path) -> Preset:
    """The demo preset with its results in tmp_path, where three seeds of all eighteen experiments are expected."""
    settings = replace(config.DEMO.settings, results_root=tmp_path)
    training = config.Training(seeds=(100, 200, 300))
    return replace(config.DEMO, settings=settings, training=training, reproduce=config.PAPER.reproduce)


def home(preset: Preset) -> Path:
    return preset.settings.results_root / preset.name


def write_run(preset: Preset, name: str, seed: int, accuracy: float | None, **metadata: object) -> None:
    """A run folder as model_training writes it; not finished if `accuracy` is None."""
    folder = home(preset) / name / f"seed_{seed}"
    settings = resolved(preset.settings, preset.training) | {"name": name, "seed": seed, "dropout_rate": 0.1}
    settings |= metadata.pop("settings", {})
    write_json(folder / "run.json", {"settings": settings, "dataset_fingerprint": "f1", "commit": "abc"} | metadata)
    columns = ("epoch", "train_loss", "valid_loss", "valid_accuracy", "epoch_seconds", "peak_memory_mb")
    rows = [(epoch, 1 / epoch, 1.1 / epoch, 1 - 0.5 / epoch, 2.0, 30.0) for epoch in (1, 2, 3)]
    write_csv(folder / "history.csv", columns, rows)
    if accuracy is not None:
        test = dict.fromkeys(METRICS, 0.5) | {"accuracy": accuracy}
        write_json(folder / "metrics.json", {"experiment": name, "seed": seed, "best_epoch": 3, "test": test})


def write_runs(preset: Preset, accuracies: Mapping[str, Mapping[int, float | None]]) -> None:
    for name, of_name in accuracies.items():
        for seed, accuracy in of_name.items():
            write_run(preset, name, seed, accuracy)


def write_costs(
    preset: Preset, study: str, rows: Sequence[tuple[object, ...]], kind: str = CUDA_MEMORY, **settings: object
) -> None:
    """`study` is its folder, such as num_crops/glass_vit/full."""
    folder = home(preset) / study
    settings = {"measured_steps": 7, "batch_size": 32, "author_runtime": True} | settings
    write_json(folder / "run.json", {"settings": settings, "memory_kind": kind, "hardware": {"cores": 2}})
    columns = ("num_crops", "peak_memory_mb", "epoch_seconds", "valid_accuracy", "warm_up_memory_mb")
    write_csv(folder / "costs.csv", columns[: len(rows[0])], rows)  # without the last: of an earlier version


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
    params = asdict(find_experiment(config.PAPER, "glass_resnet")) | {"lr_local": lr_local}
    params = {name: value for name, value in params.items() if name not in ("name", "backbone")}
    choice, real = optuna.distributions.CategoricalDistribution, optuna.distributions.FloatDistribution
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=value if state == "COMPLETE" else None,
        params=params,
        distributions={n: real(1e-7, 1e-1) if n[:2] in ("lr", "wd") else choice((v,)) for n, v in params.items()},
        intermediate_values={0: value},
    )


def csv_rows(preset: Preset, table: str) -> dict[str, dict[str, str]]:
    """Model -> its (last) row."""
    return {row["model"]: row for row in read_csv(home(preset) / "tables" / f"{table}.csv")}


def text(preset: Preset, name: str) -> str:
    return (home(preset) / "tables" / name).read_text(encoding="utf-8")


def line_of(preset: Preset, table: str, model: str) -> str:
    return next(line for line in text(preset, f"{table}.md").splitlines() if line.startswith(f"| {model} |"))
