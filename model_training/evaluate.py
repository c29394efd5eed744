"""How well do trained models detect the fakes of another labelled data set, and of each generator in it?

    python -m model_training.evaluate --weights results/paper/glass_vit/seed_*/model.safetensors --data-root ROOT

ROOT holds fake/ and real/, each with a folder for each generator or source, if you have them. Prints a row for all
images and one for each generator: the usual metrics with 95% bootstrap intervals; weights of several seeds give mean ±
standard deviation. --format-matched 90 adds the same images, all saved as JPEG of quality 90 first: a detector of file
formats, not of fakes, does worse there. Writes tables and figures to results/<preset>/evaluation/<NAME>. Scores are
stored: an interrupted evaluation resumes. --precision trained computes as the run's own test did.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from config import Preset
from model_training.inference.scores import SETTINGS, ScoredData, ScoredModel, ScoringOptions, score_data
from model_training.tables.figures import plot_reliability, plot_roc, plot_score_histograms
from model_training.tables.table import Cell, Row, Table, show, value_of
from training.detection_metrics import DETECTION_METRICS, bootstrap_intervals, detection_metrics
from utils import run_command

SHOWN = ("auc", "balanced_accuracy")  # where models or formats stand side by side
PARTS = ("mean", "std", "low", "high")  # of a metric


@dataclass(frozen=True, kw_only=True)
class Options(ScoringOptions):
    """Which models and images, and how to predict."""

    # also with all images saved as JPEG of this quality first
    format_matched: Annotated[int, Field(ge=1, le=100)] | None = None


def evaluate_weights(preset: Preset, **values: Any) -> None:
    """Score the preset's data set with all weights; print and write tables and figures.

    `values` are of the fields of `Options`; raises UserError for weights or images that cannot be used.
    """
    options = Options(**values)
    kinds = ["native"] if options.format_matched is None else ["native", f"jpeg_{options.format_matched}"]
    data = score_data(preset, options.weights, kinds, options)
    folder = options.output_folder(preset, "evaluation")
    notes, calibrated = _notes(data), _rows(data, kinds, "calibrated")
    columns = {key: value_of(key) for key in ("model", "images", "fake", "real")}
    columns |= {metric.label: metric_of(name) for name, metric in DETECTION_METRICS.items()}
    title = "Evaluation: calibrated probabilities, the model's own threshold"
    tables = [Table("evaluation", title, [row for row in calibrated if row["format"] == "native"], columns, notes)]
    raw = _rows(data, ["native"], "raw")
    Table("evaluation_raw", "Evaluation: raw probabilities, threshold 0.5", raw, columns, notes).write(folder)
    if len(kinds) > 1:
        wide: dict[tuple[str, str], Row] = {}
        for row in calibrated:
            key = row["model"], row["images"]
            names = [f"{metric}_{part}" for metric, part in product(SHOWN, PARTS)]
            wide.setdefault(key, dict(zip(("model", "images"), key, strict=True)) | {"missing": ""})
            wide[key] |= {f"{row['format']} {name}": row[name] for name in names}
        columns = {"model": value_of("model"), "images": value_of("images")}
        for metric, kind in product(SHOWN, kinds):
            columns[f"{DETECTION_METRICS[metric].label}, {kind.replace('_', ' ')}"] = metric_of(f"{kind} {metric}")
        tables.append(Table("formats", "Native, and all images in one format", list(wide.values()), columns, notes))
    for table in tables:
        table.write(folder)
        print(f"\n{table.markdown()}")
    _draw(folder, data)
    data.report_written(folder)


def _rows(data: ScoredData, kinds: Sequence[str], which: str) -> list[Row]:
    """A row for each perturbation, model and subset of the images, from calibrated or raw probabilities."""
    rows = []
    for kind, (name, models), (subset, chosen) in product(kinds, data.models.items(), subsets(data).items()):
        row = {"model": name, "images": subset, "format": kind, "probabilities": which, "seeds": len(models)}
        fakes = int((data.labels[chosen] == 0).sum())
        row |= {"fake": fakes, "real": int(chosen.sum()) - fakes, "missing": ""}
        rows.append(row | metrics_row(models, which, kind, data.labels, chosen))
    return rows


def subsets(data: ScoredData) -> dict[str, np.ndarray]:
    """Name -> which images (N,): all; each generator against all real images, and against the real images of the
    source of the same name."""
    is_fake = data.labels == 0
    found = {"all": np.ones(len(is_fake), bool)}
    for generator in sorted(set(data.sources[is_fake]) - {""}):
        of_generator, same_source = ((data.sources == generator) & of_class for of_class in (is_fake, ~is_fake))
        found[generator] = of_generator | ~is_fake
        if same_source.any():
            found[f"{generator}, same source"] = of_generator | same_source
    return found


def metrics_row(
    models: Sequence[ScoredModel], which: str, kind: str, labels: np.ndarray, chosen: np.ndarray | slice = np.s_[:]
) -> Row:
    """Each metric's mean and standard deviation over models, and the 95% interval of the mean; nll in nats.

    Of the `chosen` images under a perturbation, by "calibrated" or "raw" probabilities.
    """
    labels, thresholds = labels[chosen], [model.threshold(which) for model in models]
    probabilities = [model.probabilities[which, kind][chosen] for model in models]
    values = [detection_metrics(fake, labels, at) for fake, at in zip(probabilities, thresholds, strict=True)]
    intervals = bootstrap_intervals(probabilities, labels, thresholds)
    row: Row = {}
    for metric in DETECTION_METRICS:
        of_models = np.array([of_model[metric] for of_model in values])
        std = float(of_models.std(ddof=1)) if len(of_models) > 1 else float("nan")
        of_metric = (float(of_models.mean()), std, *intervals[metric])
        row |= {f"{metric}_{part}": value for part, value in zip(PARTS, of_metric, strict=True)}
    return row


def metric_of(key: str) -> Cell:
    """Mean ± standard deviation [95% interval] of a metric, or of "<prefix> <metric>"."""
    metric = DETECTION_METRICS[key.rpartition(" ")[2]]
    scale, form = metric.scale, ".1f" if metric.unit == "%" else ".3f"

    def cell(row: Row) -> str:
        mean, std, low, high = (scale * row[f"{key}_{part}"] for part in PARTS)
        spread = "" if std != std else f" ± {show(std, form)}"
        return f"{show(mean, form)}{spread} [{show(low, form)}, {show(high, form)}]" if mean == mean else show(mean)

    return cell


def _notes(data: ScoredData) -> list[str]:
    notes = [
        "In percent, except for the negative log-likelihood (nats); [95% bootstrap interval over images]; fake is the "
        "positive class. An interval of zero width says that all of these images were classified correctly (or none), "
        "not that all images would be."
    ]
    for name, models in data.models.items():
        seeds = ", ".join(str(model.seed) for model in models)
        smallest = min(min(model.calibration.fake_images, model.calibration.real_images) for model in models)
        calibrated = f"calibrated on {smallest} validation images of the smaller class"
        notes.append(f"{name}: seeds {seeds}; {calibrated if smallest else 'not calibrated: raw probabilities'}")
    if data.unreadable:
        notes.append(f"{len(data.unreadable)} files cannot be decoded and are left out.")
    return notes


def _draw(folder: Path, data: ScoredData) -> None:
    """Figures of the probabilities of each model, averaged over its seeds."""
    title = f"{data.name}: {len(data.labels):,} images"
    panels = {
        f"{name}, {which}": np.mean([model.probabilities[which, "native"] for model in models], axis=0)
        for (name, models), which in product(data.models.items(), ("raw", "calibrated"))
    }
    calibrated = {name: panels[f"{name}, calibrated"] for name in data.models}
    plot_roc(folder / "roc.png", title, calibrated, data.labels)
    plot_reliability(folder / "calibration.png", title, panels, data.labels)
    plot_score_histograms(folder / "scores.png", title, calibrated, data.labels)


if __name__ == "__main__":
    run_command(__doc__, evaluate_weights, settings=SETTINGS, options=Options)
