"""Does a detector survive what happens to images on their way? Saved as JPEG or WebP, resized, blurred, cut, shared.

    python -m model_training.robustness --weights GLASS.safetensors STANDARD.safetensors --data-root ROOT

ROOT holds fake/ and real/. Every image is changed in memory, after decoding and before the model's views are made:
JPEG 95 to 30, WebP 80 and 50, made smaller by 0.75 to 0.25 and larger again, Gaussian blur, noise, the centre cut out,
and what a social network does. Prints and writes one table and one figure, a line a model, under
results/<preset>/robustness/<NAME>; weights of several seeds give mean ± standard deviation. Scores are kept: when it is
killed, it goes on where it was.

Hardware: a CUDA GPU if there is one, else the CPU; about twenty times the cost of model_training.evaluate.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from config import Preset
from data.perturbations import GRID
from model_training.evaluate import READ, cell_of, metrics_row
from model_training.figures import plot_strengths
from model_training.predict import add_weights
from model_training.scores import score_data
from model_training.tables import Row, Table, value_of
from training.detection_metrics import DETECTION_METRICS
from utils import UserError, preset_folder, run_door, settings_without, wanted_name

SHOWN = ("auc", "balanced_accuracy")


def measure_robustness(
    preset: Preset,
    weights: Sequence[Path],
    name: str | None = None,
    perturbations: Sequence[str] = GRID,
    metric: str = "auc",
    **how: str | int,
) -> None:
    """Score the preset's data set under every perturbation; print and write the table and the figure.

    Args:
        name: of the folder under results/<preset>/robustness; the data root's if it is None.
        perturbations: their names; "native" is added in front.
        metric: of DETECTION_METRICS, which the figure shows.
        how: draws, precision, batch_size and chunk_size.

    Raises:
        UserError: weights, images or perturbations that cannot be used.
    """
    if name is not None and wanted_name(name):
        raise UserError(f"--name {name}: it must be {wanted_name(name)}")
    kinds = list(dict.fromkeys(["native", *perturbations]))
    data = score_data(preset, weights, kinds, **how)
    labels, rows = data.images.labels, []
    for model, seeds in data.by_name.items():
        thresholds = [seed.calibration.balanced for seed in seeds]
        for kind in kinds:
            row = metrics_row([seed.calibrated[kind] for seed in seeds], labels, thresholds)
            rows.append({"model": model, "perturbation": kind, "seeds": len(seeds)} | row | {"missing": ""})
    folder = preset_folder(preset) / "robustness" / (name or preset.settings.data_root.resolve().name)
    notes = [
        f"{len(labels):,} images of {data.images.root.resolve().name}, {int((labels == 0).sum()):,} of them fake; in "
        f"percent, [95% bootstrap interval over images]; balanced accuracy at the threshold that was the best on the "
        f"model's validation images."
    ]
    table = _table(rows, list(data.by_name), kinds, notes)
    table.write(folder)
    print(table.markdown())
    scale = 1 if metric == "nll" else 100
    lines: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = [scale * row[f"{metric}_{part}"] for part in ("mean", "low", "high")]
        lines.setdefault(row["model"], {})[row["perturbation"]] = values
    unit = "nats" if metric == "nll" else "%"
    plot_strengths(folder / "robustness.png", table.title, f"{DETECTION_METRICS[metric]} ({unit})", lines)
    print(f"Written: {folder}")
    for path, problem in data.unreadable.items():
        print(f"left out, no image: {path} ({problem})")


def _table(rows: Sequence[Row], models: Sequence[str], kinds: Sequence[str], notes: list[str]) -> Table:
    """A row a perturbation, the models side by side."""
    wide: dict[str, Row] = {kind: {"model": kind, "missing": ""} for kind in kinds}
    for row in rows:
        values = {key: value for key, value in row.items() if isinstance(value, float)}
        wide[row["perturbation"]] |= {f"{row['model']} {key}": value for key, value in values.items()}
    columns = {"perturbation": value_of("model")}
    for metric in SHOWN:
        for model in models:
            columns[f"{DETECTION_METRICS[metric]}, {model}"] = lambda row, metric=metric, model=model: cell_of(
                f"{model} {metric}", row
            )
    return Table("robustness", "Robustness to perturbations", list(wide.values()), columns, notes)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="FILE", help="model.safetensors files"
    )
    parser.add_argument("--name", help="folder under results/<preset>/robustness; default the data root's name")
    parser.add_argument("--perturbations", nargs="+", default=GRID, metavar="KIND_STRENGTH", help="default: all above")
    parser.add_argument("--metric", default="auc", choices=list(DETECTION_METRICS), help="of the figure; default auc")
    parser.add_argument("--draws", type=int, default=1, metavar="T", help="draw each image's crops T times; default 1")
    add_weights(parser)


if __name__ == "__main__":
    run_door(__doc__, measure_robustness, without=settings_without(*READ), arguments=_add_arguments)
