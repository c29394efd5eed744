"""How good are trained models on another labelled data set, and on the images of which generator?

    python -m model_training.evaluate --weights results/paper/glass_vit/seed_*/model.safetensors --data-root ROOT

ROOT holds fake/ and real/, each with a folder for each generator or source, if you have them. Prints and writes a row
for all images and one for each generator: accuracy, balanced accuracy, AUC, average precision, F1, TPR at 1% and 5%
false alarms, calibration error, negative log-likelihood, with 95% bootstrap intervals; weights of several seeds give
mean ± standard deviation. --format-matched 90 adds the same images, all saved as JPEG of quality 90 first: a detector
of formats, not of fakes, falls there. Leaves results/<preset>/evaluation/<NAME>: tables as CSV, Markdown and LaTeX,
and figures. Scores are kept: an evaluation that is killed goes on where it was.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import Preset
from model_training.figures import plot_reliability, plot_roc, plot_score_histograms
from model_training.predict import add_weights
from model_training.scores import ScoredData, ScoredModel, score_data
from model_training.tables import Row, Table, show, value_of
from training.detection_metrics import DETECTION_METRICS, bootstrap_intervals, detection_metrics
from utils import UserError, preset_folder, run_door, settings_without, wanted_name

ALL = "all"


def evaluate_weights(
    preset: Preset,
    weights: Sequence[Path],
    name: str | None = None,
    format_matched: int | None = None,
    draws: int = 1,
    **how: str | int,
) -> None:
    """Score the preset's data set with all weights; print and write tables and figures.

    Args:
        name: of the folder under results/<preset>/evaluation; the data root's if it is None.
        format_matched: JPEG quality of the second look at the images; None: none.
        draws: T, how many times the crops of an image are drawn; probabilities are means.
        how: precision, batch_size and chunk_size.

    Raises:
        UserError: weights or images that cannot be used.
    """
    if name is not None and wanted_name(name):
        raise UserError(f"--name {name}: it must be {wanted_name(name)}")
    kinds = ["native", *([f"jpeg_{format_matched}"] if format_matched is not None else [])]
    data = score_data(preset, weights, kinds, draws, **how)
    folder = preset_folder(preset) / "evaluation" / (name or preset.settings.data_root.resolve().name)
    rows = [row for kind in kinds for row in rows_of(data, kind)]
    notes = _notes(data)
    native = [row for row in rows if row["format"] == "native"]
    calibrated, raw = ([row for row in native if row["probabilities"] == which] for which in ("calibrated", "raw"))
    tables = [
        _table("evaluation", "Evaluation: calibrated probabilities, the model's own threshold", calibrated, notes),
        _table("evaluation_raw", "Evaluation: raw probabilities, threshold 0.5", raw, notes),
    ]
    if len(kinds) > 1:
        tables.append(_table_of_formats(rows, kinds, notes))
    for table in tables:
        table.write(folder)
        if table is not tables[1]:
            print(f"\n{table.markdown()}")
    _draw(folder, data)
    print(f"Written: {folder}")
    for path, problem in data.unreadable.items():
        print(f"left out, no image: {path} ({problem})")


def rows_of(data: ScoredData, kind: str) -> list[Row]:
    """A row for each model, subset of the images, and calibrated or raw probabilities; see `subsets`."""
    rows = []
    for name, models in data.by_name.items():
        for subset, chosen in subsets(data).items():
            for which in ("calibrated", "raw"):
                probabilities = [getattr(model, which)[kind][chosen] for model in models]
                thresholds = [model.calibration.balanced if which == "calibrated" else 0.5 for model in models]
                labels = data.images.labels[chosen]
                row = {"model": name, "images": subset, "format": kind, "probabilities": which, "seeds": len(models)}
                row |= {"fake": int((labels == 0).sum()), "real": int((labels == 1).sum())}
                rows.append(row | metrics_row(probabilities, labels, thresholds) | {"missing": ""})
    return rows


def subsets(data: ScoredData) -> dict[str, np.ndarray]:
    """What a row is about -> which images (N,): all; each generator against all real images, and against the real
    ones of the source of its name."""
    is_fake, sources = data.images.labels == 0, np.array(data.images.sources)
    found = {ALL: np.ones(len(sources), bool)}
    for generator in sorted(set(sources[is_fake]) - {""}):
        of_generator = is_fake & (sources == generator)
        found[generator] = of_generator | ~is_fake
        same_source = ~is_fake & (sources == generator)
        if same_source.any():
            found[f"{generator}, same source"] = of_generator | same_source
    return found


def metrics_row(probabilities: Sequence[np.ndarray], labels: np.ndarray, thresholds: Sequence[float]) -> Row:
    """Each metric's mean and standard deviation over models, and the 95% interval of the mean; nll in nats."""
    pairs = list(zip(probabilities, thresholds, strict=True))
    values = [detection_metrics(fake, labels, threshold) for fake, threshold in pairs]
    intervals = bootstrap_intervals(probabilities, labels, thresholds)
    row: Row = {}
    for metric in DETECTION_METRICS:
        of_models = np.array([of_model[metric] for of_model in values])
        row[f"{metric}_mean"] = float(of_models.mean())
        row[f"{metric}_std"] = float(of_models.std(ddof=1)) if len(of_models) > 1 else float("nan")
        row[f"{metric}_low"], row[f"{metric}_high"] = intervals[metric]
    return row


def cell_of(metric: str, row: Row) -> str:
    """Mean ± standard deviation [95% interval], in percent but for nll."""
    scale, form = (1, ".3f") if metric == "nll" else (100, ".1f")
    mean, std, low, high = (scale * row[f"{metric}_{part}"] for part in ("mean", "std", "low", "high"))
    spread = "" if std != std else f" ± {show(std, form)}"
    return f"{show(mean, form)}{spread} [{show(low, form)}, {show(high, form)}]" if mean == mean else show(mean)


def _table(name: str, title: str, rows: list[Row], notes: list[str]) -> Table:
    columns = {"model": value_of("model"), "images": value_of("images")}
    columns |= {"fake": value_of("fake"), "real": value_of("real")}
    for metric, label in DETECTION_METRICS.items():
        columns[label] = lambda row, metric=metric: cell_of(metric, row)
    return Table(name, title, rows, columns, notes)


def _table_of_formats(rows: list[Row], kinds: Sequence[str], notes: list[str]) -> Table:
    """Native and format-matched side by side: a row for each model and subset, calibrated."""
    wide: dict[tuple[str, str], Row] = {}
    shown = ("auc", "balanced_accuracy")
    for row in rows:
        if row["probabilities"] == "calibrated":
            of_subset = wide.setdefault((row["model"], row["images"]), {"model": row["model"], "images": row["images"]})
            parts = ("mean", "std", "low", "high")
            of_subset |= {f"{row['format']} {m}_{part}": row[f"{m}_{part}"] for m in shown for part in parts}
            of_subset["missing"] = ""
    columns = {"model": value_of("model"), "images": value_of("images")}
    for metric in shown:
        for kind in kinds:
            columns[f"{DETECTION_METRICS[metric]}, {kind.replace('_', ' ')}"] = lambda row, metric=metric, kind=kind: (
                cell_of(f"{kind} {metric}", row)
            )
    return Table("formats", "Native, and all images in one format", list(wide.values()), columns, notes)


def _notes(data: ScoredData) -> list[str]:
    notes = [
        "In percent, but for the negative log-likelihood (nats); [95% bootstrap interval over images]; fake is the "
        "positive class. An interval without width says that none of these images was taken wrongly (or all), not that "
        "none could be."
    ]
    for name, models in data.by_name.items():
        seeds = ", ".join(str(model.seed) for model in models)
        smallest = min(min(model.calibration.fake_images, model.calibration.real_images) for model in models)
        notes.append(
            f"{name}: seeds {seeds}; calibrated on {smallest} validation images of the smaller class"
            if smallest
            else f"{name}: seeds {seeds}; its weights have no calibration, raw probabilities stand for it"
        )
    if data.unreadable:
        notes.append(f"{len(data.unreadable)} files gave no image and are left out.")
    return notes


def pooled(models: Sequence[ScoredModel], which: str, kind: str = "native") -> np.ndarray:
    """Mean probability of fake over the seeds of a model."""
    return np.mean([getattr(model, which)[kind] for model in models], axis=0)


def _draw(folder: Path, data: ScoredData) -> None:
    title, labels = f"{data.images.root.resolve().name}: {len(data.images.paths):,} images", data.images.labels
    calibrated = {name: pooled(models, "calibrated") for name, models in data.by_name.items()}
    plot_roc(folder / "roc.png", title, {name: (fake, labels) for name, fake in calibrated.items()})
    both = {}
    for name, models in data.by_name.items():
        both |= {f"{name}, {which}": pooled(models, which) for which in ("raw", "calibrated")}
    plot_reliability(folder / "calibration.png", title, both, labels)
    plot_score_histograms(folder / "scores.png", title, calibrated, labels)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="FILE", help="model.safetensors files"
    )
    parser.add_argument("--name", help="folder under results/<preset>/evaluation; default the data root's name")
    parser.add_argument("--format-matched", type=int, metavar="QUALITY", help="also with all images saved as JPEG")
    parser.add_argument("--draws", type=int, default=1, metavar="T", help="draw each image's crops T times; default 1")
    add_weights(parser)


READ = ("data_root", "results_root", "data_list", "group_by", "device", "max_image_pixels", "num_workers")

if __name__ == "__main__":
    run_door(__doc__, evaluate_weights, without=settings_without(*READ), arguments=_add_arguments)
