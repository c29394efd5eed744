"""One training with 1, 2 and 3 processes, and resumed with another number of them: how much the numbers differ.

    python -m tests.campaigns.processes [--epochs 3]

Demo models without dropout, float32, on the CPU, toy images; small learning rates, since Adam turns rounding into steps
where a gradient is close to zero. Exit code 1 if a loss differs by more than 1e-5 of itself, or a prediction by 1e-4.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

from data.lists import read_csv
from tests.conftest import PREPROCESS_FLAGS, TOY_SETTINGS, copy_index, start_module, succeed, torchrun, write_toy_images

MODELS = ("glass_resnet", "glass_convnext", "glass_vit")
RATES = ("--dropout-rate", "0", "--lr-global", "2e-7", "--lr-local", "5e-7", "--lr-atten-class", "1e-5")


def command(experiment: str, data: Path, results: Path, *flags: str) -> tuple[str | Path, ...]:
    """A training of one seed that saves after each step."""
    roots = ("--data-root", data, "--results-root", results)
    saving = ("--seeds", "1", "--batch-size", "8", "--checkpoint-every", "1")
    return (f"model_training.{experiment}_training", *TOY_SETTINGS, *roots, *saving, *RATES, *flags)


def numbers(results: Path, experiment: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a finished training: losses (epochs, 2) of training and validation, predictions (images, 2) with labels."""
    folder = results / "demo" / experiment / "seed_1"
    history, predictions = read_csv(folder / "history.csv"), read_csv(folder / "predictions.csv")
    return (
        np.array([[float(row[name]) for name in ("train_loss", "valid_loss")] for row in history]),
        np.array([[float(row[name]) for name in ("probability_fake", "label")] for row in predictions]),
    )


def differences(one: Path, other: Path, experiment: str) -> tuple[float, float]:
    """The largest relative difference of a loss, and the largest one of a prediction."""
    (losses, predictions), (same_losses, same_predictions) = (numbers(path, experiment) for path in (one, other))
    return np.abs(losses / same_losses - 1).max(), np.abs(predictions - same_predictions).max()


def stop_after(epoch: int, processes: int, *arguments: str | Path) -> tuple[int, str]:
    """Start a command and send SIGTERM, to its launcher if it has one, after an epoch; exit code and messages."""
    process = start_module(*torchrun(processes, *arguments))
    for line in process.stdout:
        if f"epoch {epoch}/" in line:
            os.kill(process.pid, signal.SIGTERM)
    return process.wait(60), process.stderr.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", default="3")
    epochs = parser.parse_args().epochs
    scratch, wrong = Path(tempfile.mkdtemp(prefix="processes_")), False
    write_toy_images(data := scratch / "data")
    roots = ("--data-root", data, "--results-root", scratch / "index")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
    print("| model | processes | loss, relative | prediction |\n|---|---|---:|---:|", flush=True)
    for experiment in MODELS:
        for path in ((1,), (2,), (3,), (1, 2, 1), (1, 3, 1)):
            results = copy_index(scratch / "index", scratch / experiment / "-".join(map(str, path)))
            arguments = command(experiment, data, results, "--epochs", epochs)
            for epoch, processes in enumerate(path[:-1], 1):
                stop_after(epoch, processes, *arguments)
            succeed(*torchrun(path[-1], *arguments))
            loss, prediction = differences(scratch / experiment / "1", results, experiment)
            wrong |= loss > 1e-5 or prediction > 1e-4
            print(f"| {experiment} | {', then '.join(map(str, path))} | {loss:.1e} | {prediction:.1e} |", flush=True)
    shutil.rmtree(scratch)
    sys.exit(int(wrong))
