"""Trained variants of a GLASS experiment -> their table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from config import Experiment
from data.index import Index
from model_training.tables.experiment_tables import means
from model_training.tables.read_results import MEMORY_KINDS, Run, provenance_of, read_fakes
from model_training.tables.table import Row, Table, interval_of, notes_of, value_of
from training.detection_metrics import paired_differences
from training.metrics import METRICS, NAN, Metric
from training.progress import best_epoch

SHOWN = {"valid_accuracy": Metric("validation accuracy")} | {name: METRICS[name] for name in ("accuracy", "auc_score")}
COMPARED = {"auc_score": "auc", "accuracy": "accuracy"}  # name in METRICS -> name in DETECTION_METRICS


@dataclass(frozen=True)
class Variant:
    """A variant, and its finished runs with the learning rates that were chosen for it."""

    name: str
    experiment: Experiment  # whose learning rates do not matter
    factor: float | None  # of its learning rates; None: not all factors are tried yet
    runs: Sequence[Run]  # one a seed
    missing: Sequence[str]  # sentences


def table_of_ablations(
    title: str, variants: Sequence[Variant], index: Index, test: Sequence[int], notes: Sequence[str]
) -> Table:
    """A row for each variant; differences are from the first, on the `test` rows of the index."""
    experiments, paper = [], variants[0]
    for variant in variants:
        by_seed = {
            run.seed: {**run.test, "valid_accuracy": best_epoch(run.history).valid_accuracy} for run in variant.runs
        }
        experiments.append((_row(variant), by_seed, list(variant.missing)))
    columns, rows, undefined = means(SHOWN, experiments, "_percent")
    for variant, row in zip(variants, rows, strict=True):
        row |= _differences(paper, variant, index, test) | _costs(variant.runs)
    described = {"Sampler": "sampler", "Pooling": "pooling", "Branches": "branches", "K": "num_crops"}
    described |= {"Learning rates x": "factor"}
    columns = {"Model": value_of("model")} | {name: value_of(key) for name, key in described.items()} | columns
    columns |= {f"{METRICS[metric].heading} difference": interval_of(f"{metric}_points") for metric in COMPARED}
    columns |= {"Images/s": value_of("images_per_second", ".1f"), "Peak memory (MB)": value_of("peak_memory_mb", ".1f")}
    groups = {index.groups[row] for row in test} if index.groups else test
    kind = "groups of the split" if index.groups else "images"
    every_tile = any(getattr(each.experiment, "crop_sampler", "") == "all" for each in variants)
    about = [(each.name, _about(run)) for each in variants for run in each.runs]
    notes = [
        "In percent, mean ± sample standard deviation over n seeds; learning rates are those of config.py times the "
        "factor that was best in validation.",
        f"Differences are from {paper.name} (the paper's setting) in percentage points, with 95% bootstrap intervals "
        f"over {len(groups):,} {kind} of the test split, for these seeds.",
        "Images/s: of training, the median over epochs; memory: the peak over epochs.",
        *(["K is that of training; in the test, the sampler all takes every tile."] if every_tile else []),
        *notes, *undefined, *notes_of(about),
    ]  # fmt: skip
    return Table("ablations", title, rows, columns, notes)


def _row(variant: Variant) -> Row:
    """The first columns of a row, which describe the variant; NaN for parts that it does not have."""
    experiment, row = variant.experiment, {"model": variant.name}
    for column, name in (("sampler", "crop_sampler"), ("pooling", "pooling"), ("num_crops", "num_crops")):
        row[column] = getattr(experiment, name) if experiment.crops_per_image else NAN
    row["branches"] = getattr(experiment, "branches", NAN)
    seeds = " ".join(str(run.seed) for run in variant.runs)
    return row | {"factor": variant.factor, "n": len(variant.runs), "seeds": seeds}


def _differences(paper: Variant, variant: Variant, index: Index, test: Sequence[int]) -> Row:
    """Variant minus paper in percentage points, over the seeds that both have."""
    seeds = {run.seed for run in paper.runs} & {run.seed for run in variant.runs}
    found = dict.fromkeys(COMPARED.values(), (NAN if variant is paper else None,) * 3)
    if seeds and variant is not paper:
        records = [index.records[row] for row in test]
        names, labels = [record.path for record in records], np.array([record.label for record in records])
        runs = ([run for run in each.runs if run.seed in seeds] for each in (paper, variant))
        fakes = [[read_fakes(run.folder / "predictions.csv", names) for run in of_each] for of_each in runs]
        groups = [index.groups[row] for row in test] if index.groups else None
        found = paired_differences(*fakes, labels, ([0.5] * len(seeds),) * 2, groups)
    row: Row = {}
    for metric, known in COMPARED.items():
        values = [value and 100 * value for value in found[known]]
        row |= dict(zip((f"{metric}_points", f"{metric}_points_low", f"{metric}_points_high"), values, strict=True))
    return row


def _costs(runs: Sequence[Run]) -> Row:
    epochs = [epoch for run in runs for epoch in run.history]
    return {
        "images_per_second": float(np.median([epoch.images_per_second for epoch in epochs])) if epochs else None,
        "peak_memory_mb": max((epoch.peak_memory_mb for epoch in epochs), default=None),
    }


def _about(run: Run) -> dict[str, str]:
    kind = run.metadata.get("memory_kind")
    return {"Memory": MEMORY_KINDS.get(kind, str(kind))} | provenance_of(run.metadata)
