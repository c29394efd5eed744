"""Helpers for the results root `trained`: its weights, its predictions, its detectors, commands on it."""

from pathlib import Path

from data.lists import read_csv
from model_training.inference.detector import Detector, PredictionOptions, load_detector
from tests.conftest import succeed

SAME = 1e-5  # logits; what the order of sums may change


def weights(results: Path, name: str = "glass_resnet", seed: int = 1) -> Path:
    return results / "demo" / name / f"seed_{seed}" / "model.safetensors"


def predictions_of(results: Path, name: str) -> list[dict[str, str]]:
    return read_csv(weights(results, name).with_name("predictions.csv"))


def predict_flags(path: Path, folder: Path) -> tuple[str | Path, ...]:
    """Flags of model_training.predict with the weights in `path`; it writes p.csv to `folder`."""
    return "--weights", path, "--device", "cpu", "--output", folder / "p.csv"


def detector_of(results: Path, name: str = "glass_resnet", seed: int = 1, **options: object) -> Detector:
    return load_detector(weights(results, name, seed), "cpu", options=PredictionOptions(**options))


def run_on(command: str, results: Path, data: Path, *flags: str | Path) -> str:
    roots = ("--preset", "demo", "--data-root", data, "--results-root", results, "--device", "cpu")
    return succeed(f"model_training.{command}", *roots, *flags)
