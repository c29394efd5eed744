"""How well do trained models detect the fakes of another labelled data set, and of each generator in it?

    python -m model_training.evaluate --weights results/paper/glass_vit/seed_*/model.safetensors --data-root ROOT

ROOT holds fake/ and real/, each with a folder for each generator or source, if you have them. Prints a row for all
images and one for each generator: the usual metrics with 95% bootstrap intervals; weights of several seeds give mean ±
standard deviation, those of several models the differences from the first. If real/ has several sources, a control: the
AUC between them, which should be near one half. With fake/ or real/ alone: the share called fake at each of the
model's thresholds. --format-matched 90 adds the same images, all saved as JPEG of quality 90 first: a detector of file
formats, not of fakes, does worse there. Images that one of the models was trained or validated on are left out, unless
--data-list names them. Intervals are over pairs with the same file name, or over the groups of --group-by, if there are
any. Writes tables and figures to results/<preset>/evaluation/<NAME>; NAME comes from the data root and the choice of
images. Scores are stored: an interrupted evaluation resumes. --precision trained computes as the run's own test did.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from config import Preset
from data.records import CLASSES
from model_training.inference.scores import SETTINGS, ScoredData, ScoredModel, ScoringOptions, score_data
from model_training.tables.figures import plot_aucs, plot_reliability, plot_roc, plot_score_histograms
from model_training.tables.table import UNDEFINED, Cell, Row, Table, interval_of, mean_and_std_of, show, value_of
from training.detection_metrics import (
    DETECTION_METRICS,
    bootstrap_intervals,
    detection_metrics,
    paired_differences,
    sources_apart,
)
from training.metrics import in_percent
from utils import run_command

SHOWN = ("auc", "balanced_accuracy")  # in tables with models or formats side by side
OPTIONAL_FILES = ("evaluation_raw.*", "formats.*", "differences.*", "auc.png", "roc.png", "calibration.png")
PARTS = ("mean", "std", "low", "high")  # columns of the CSV for each metric
COUNTS = {key: value_of(key) for key in ("model", "images", "fake", "real")}  # the first columns
THRESHOLDS = {  # fields of Calibration
    "balanced": "fake at best balanced accuracy",
    "fpr_1": "fake at 1% false positives",
    "fpr_5": "fake at 5% false positives",
    "real_below": "verdict fake or inconclusive",
    "fake_from": "verdict fake",
}
NOTE = (
    "Values are {}; [{}]; fake is the positive class. An interval of zero width says that all resamples of these "
    "images give the same value, such as 100%, not that other images would."
)
ABOVE = (
    "The score depends on what sets real images of these sources apart, such as camera, compression or subject: if "
    "fakes come from other sources than the real images, this may be part of its AUC. Near copies within a source "
    "(bursts) raise the control's AUC, too. "
)


@dataclass(frozen=True, kw_only=True)
class Options(ScoringOptions):
    """Which models and images, and how to predict."""

    # also with all images saved as JPEG of this quality first
    format_matched: Annotated[int, Field(ge=1, le=100)] | None = None


def evaluate_weights(preset: Preset, **values: Any) -> None:
    """Score the preset's data set with all weights; print and write tables and figures.

    `values` are the fields of `Options`. Raises UserError for weights or images that cannot be used.
    """
    options = Options(**values)
    kinds = ["native"] if options.format_matched is None else ["native", f"jpeg_{options.format_matched}"]
    data = score_data(preset, options, kinds, classes=1)
    folder = options.output_folder(preset, "evaluation", *kinds[1:])
    both = len(set(data.labels)) == len(CLASSES)
    tables = _tables(data, kinds) if both else [_table_of_one_class(data, kinds)]
    for old in (path for pattern in OPTIONAL_FILES for path in folder.glob(pattern)):
        old.unlink()
    for table in tables:
        table.write(folder)
        if table.name != "evaluation_raw":
            print(f"\n{table.markdown()}")
    _draw(folder, data, tables[0].rows if both else ())
    data.report_written(folder)


def _tables(data: ScoredData, kinds: Sequence[str]) -> list[Table]:
    notes, controls = [NOTE.format(in_percent(DETECTION_METRICS), data.interval), *data.notes()], _controls(data, kinds)
    calibrated = _rows(data, kinds, "calibrated") + controls
    columns = COUNTS | {metric.label: metric_of(name) for name, metric in DETECTION_METRICS.items()}
    title = "Evaluation: calibrated probabilities, the model's own threshold"
    native = [row for row in calibrated if row["format"] == "native"]
    tables = [Table("evaluation", title, native, columns, notes + _sentences(native))]
    title, raw = "Evaluation: raw probabilities, threshold 0.5", _rows(data, ["native"], "raw")
    tables.append(Table("evaluation_raw", title, raw, columns, notes))
    if len(kinds) > 1:
        wide: dict[tuple[str, str], Row] = {}
        for row in calibrated:
            key = row["model"], row["images"]
            names = [f"{metric}_{part}" for metric, part in product(SHOWN, (*PARTS, "chance"))]
            wide.setdefault(key, dict(zip(("model", "images"), key, strict=True)) | {"missing": ""})
            wide[key] |= {f"{row['format']} {name}": row[name] for name in names if name in row}
        columns = {"model": value_of("model"), "images": value_of("images")}
        for metric, kind in product(SHOWN, kinds):
            columns[f"{DETECTION_METRICS[metric].label}, {kind.replace('_', ' ')}"] = metric_of(f"{kind} {metric}")
        title = "Native, and all images in one format"
        tables.append(Table("formats", title, list(wide.values()), columns, notes + _sentences(calibrated)))
    return tables + ([differences(data, kinds)] if len(data.models) > 1 else [])


def differences(data: ScoredData, kinds: Sequence[str]) -> Table:
    """Each model minus the first one, from calibrated probabilities."""
    (first, of_first), *_ = data.models.items()
    rows = []
    for row, models, chosen in _counted(data, kinds, "calibrated"):
        if models is not of_first:
            (a, at_a), (b, at_b) = (_outputs(each, "calibrated", row["format"], chosen) for each in (of_first, models))
            found = paired_differences(a, b, data.labels[chosen], (at_a, at_b), data.groups[chosen])
            rows.append(row | {"minus": first})
            for metric, values in found.items():
                rows[-1] |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), values, strict=True))
    columns: dict[str, Cell] = {"model": lambda row: f"{row['model']} minus {row['minus']}"}
    columns |= {key: value_of(key) for key in ("images", "format")}
    columns |= {DETECTION_METRICS[key].label: interval_of(key, DETECTION_METRICS[key].scale, "+.1f") for key in SHOWN}
    note = (
        f"In percentage points; [{data.interval}, the same resamples for both models]; the spread over seeds is not "
        f"included."
    )
    return Table("differences", f"Differences from {first} on the same images", rows, columns, [note, *data.notes()])


def _table_of_one_class(data: ScoredData, kinds: Sequence[str]) -> Table:
    """For images of one class: the share that is called fake at each threshold of the models."""
    rows, columns = [], COUNTS | {"format": value_of("format")}
    columns |= {title: mean_and_std_of(name, 100, ".1f") for name, title in THRESHOLDS.items()}
    missing = ", ".join(metric.label for name, metric in DETECTION_METRICS.items() if name != "accuracy")
    for row, models, chosen in _counted(data, kinds, "calibrated"):
        row["missing"] = f"{missing}: they need fake and real images"
        fake = np.stack([model.probabilities["calibrated", row["format"]][chosen] for model in models])  # (seeds, N)
        for name in THRESHOLDS:
            thresholds = np.array([getattr(model.calibration, name) for model in models])
            shares = (fake >= thresholds[:, None]).mean(axis=1)
            row[f"{name}_mean"] = float(shares.mean())
            row[f"{name}_std"] = _std(shares)
        rows.append(row)
    if controls := _controls(data, kinds):
        columns["AUC"] = metric_of("auc")
    title = "Evaluation of one class: share called fake, at each threshold that was set on the validation images"
    return Table("evaluation", title, rows + controls, columns, ["In percent.", *data.notes(), *_sentences(controls)])


def _counted(
    data: ScoredData, kinds: Sequence[str], which: str
) -> Iterator[tuple[Row, Sequence[ScoredModel], np.ndarray]]:
    """For each perturbation, model and subset of the images: the first columns of a row, the seeds, the images (N,)."""
    for kind, (name, models), (subset, chosen) in product(kinds, data.models.items(), subsets(data).items()):
        fakes = int((data.labels[chosen] == 0).sum())
        row = {"model": name, "images": subset, "format": kind, "probabilities": which, "seeds": len(models)}
        yield row | {"fake": fakes, "real": int(chosen.sum()) - fakes, "missing": ""}, models, chosen


def _rows(data: ScoredData, kinds: Sequence[str], which: str) -> list[Row]:
    """A row for each perturbation, model and subset of the images, from calibrated or raw probabilities."""
    return [
        row | metrics_row(models, which, row["format"], data, chosen)
        for row, models, chosen in _counted(data, kinds, which)
    ]


def _controls(data: ScoredData, kinds: Sequence[str]) -> list[Row]:
    """A row for each perturbation and model: how well it separates the sources of real images, if there are several."""
    rows, real = [], data.labels == CLASSES.index("real")
    for kind, (name, models) in product(kinds, data.models.items()):
        found = sources_apart(_outputs(models, "calibrated", kind, real)[0], data.sources[real], data.groups[real])
        if found:
            row = {"model": name, "images": f"control: {len(found.names)} real sources apart", "format": kind}
            row |= {"probabilities": "calibrated", "seeds": len(models), "fake": 0, "real": found.images, "missing": ""}
            row |= {"auc_mean": float(found.aucs.mean()), "auc_std": _std(found.aucs), "auc_chance": found.chance}
            rows.append(row | {"most_apart": " and ".join(found.pair), "most_apart_auc": found.pair_auc})
    return rows


def _sentences(rows: Sequence[Row]) -> list[str]:
    """A note for each row that is a control."""
    sentences = []
    for row in rows:
        if "auc_chance" in row:
            auc, chance, most = (show(row[key], ".1f", 100) for key in ("auc_mean", "auc_chance", "most_apart_auc"))
            above = row["auc_mean"] > row["auc_chance"]
            sentences.append(
                f"{row['images'].capitalize()}, {row['model']}, {row['format'].replace('_', ' ')}: AUC {auc}, "
                f"{'more' if above else 'no more'} than chance gives (at most {chance} in 95% of their shuffles). "
                f"{ABOVE if above else ''}Most apart are {row['most_apart']} ({most})."
            )
    return sentences


def subsets(data: ScoredData) -> dict[str, np.ndarray]:
    """Name -> which images (N,): all; each generator against all real images, and against the real images of the
    source of the same name."""
    is_fake = data.labels == 0
    found = {"all": np.ones(len(is_fake), bool)}

    def add(name: str, chosen: np.ndarray) -> None:
        while name in found:  # a generator may be called "all"
            name += " (group)"
        found[name] = chosen

    for generator in sorted(set(data.sources[is_fake]) - {""}):
        of_generator, same_source = ((data.sources == generator) & of_class for of_class in (is_fake, ~is_fake))
        add(generator, of_generator | ~is_fake)
        if same_source.any():
            add(f"{generator}, same source", of_generator | same_source)
    return found


def metrics_row(
    models: Sequence[ScoredModel], which: str, kind: str, data: ScoredData, chosen: np.ndarray | slice = np.s_[:]
) -> Row:
    """Each metric's mean and standard deviation over models, and the 95% interval of the mean; nll in nats.

    Args:
        which: "calibrated" or "raw" probabilities.
        kind: the perturbation.
        chosen: which images.
    """
    labels, (probabilities, thresholds) = data.labels[chosen], _outputs(models, which, kind, chosen)
    values = [detection_metrics(fake, labels, at) for fake, at in zip(probabilities, thresholds, strict=True)]
    intervals = bootstrap_intervals(probabilities, labels, thresholds, data.groups[chosen])
    row: Row = {}
    for metric in DETECTION_METRICS:
        of_models = np.array([of_model[metric] for of_model in values])
        of_metric = (float(of_models.mean()), _std(of_models), *intervals[metric])
        row |= {f"{metric}_{part}": value for part, value in zip(PARTS, of_metric, strict=True)}
    return row


def _outputs(
    models: Sequence[ScoredModel], which: str, kind: str, chosen: np.ndarray | slice
) -> tuple[list[np.ndarray], list[float]]:
    """The probabilities of fake for the chosen images, and the threshold, of each model."""
    return [model.probabilities[which, kind][chosen] for model in models], [model.threshold(which) for model in models]


def _std(of_models: np.ndarray) -> float:
    return float(of_models.std(ddof=1)) if len(of_models) > 1 else float("nan")


def metric_of(key: str) -> Cell:
    """Mean ± standard deviation [95% interval] of a metric, or of "<prefix> <metric>"."""
    metric = DETECTION_METRICS[key.rpartition(" ")[2]]
    scale, form = metric.scale, ".1f" if metric.unit == "%" else ".3f"
    mean_and_std = mean_and_std_of(key, scale, form)

    def cell(row: Row) -> str:
        text = mean_and_std(row)
        if f"{key}_chance" in row:
            return f"{text} (chance: up to {show(row[f'{key}_chance'], form, scale)})"
        if text in ("", UNDEFINED):  # a control has an AUC only
            return text
        low, high = (show(row[f"{key}_{end}"], form, scale) for end in ("low", "high"))
        return f"{text} [{low}, {high}]"

    return cell


def _draw(folder: Path, data: ScoredData, rows: Sequence[Row]) -> None:
    """Figures of each model's probabilities, averaged over its seeds; without `rows` (one class) the histogram only."""
    title = f"{data.root.name}: {len(data.labels):,} images"
    panels = {
        f"{name}, {which}": np.mean([model.probabilities[which, "native"] for model in models], axis=0)
        for (name, models), which in product(data.models.items(), ("raw", "calibrated"))
    }
    calibrated = {name: panels[f"{name}, calibrated"] for name in data.models}
    if rows:
        aucs: dict[str, dict[str, tuple[float, float, float]]] = {}
        names = {row["images"] for row in rows}
        for row in rows:
            better = f"{row['images']}, same source" in names
            # A control has no interval.
            if "auc_low" in row and row["auc_mean"] == row["auc_mean"] and not better:
                values = tuple(100 * row[f"auc_{part}"] for part in ("mean", "low", "high"))
                aucs.setdefault(row["images"], {})[row["model"]] = values
        plot_aucs(folder / "auc.png", title, aucs)
        plot_roc(folder / "roc.png", title, calibrated, data.labels)
        plot_reliability(folder / "calibration.png", title, panels, data.labels)
    plot_score_histograms(folder / "scores.png", title, calibrated, data.labels)


if __name__ == "__main__":
    run_command(__doc__, evaluate_weights, settings=SETTINGS, options=Options)
