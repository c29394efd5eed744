"""How do detectors cope with what happens to images when they are shared: compression, resizing, blur, noise, cropping?

    python -m model_training.robustness --weights GLASS.safetensors STANDARD.safetensors --data-root ROOT

ROOT holds fake/ and real/. Every image is changed in memory, after decoding and before the model's views are made, by
each perturbation that data/perturbations.py lists. Prints and writes one table and one figure, a line for each model,
under results/<preset>/robustness/<NAME>; weights of several seeds give mean ± standard deviation. Scores are stored: an
interrupted command resumes. --precision trained computes as the run's own test did.

Hardware: a CUDA GPU if there is one, else the CPU; about 20 x the cost of model_training.evaluate.
"""

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field

from config import Preset
from data.perturbations import GRID
from model_training.evaluate import SHOWN, metric_of, metrics_row
from model_training.inference.scores import SETTINGS, ScoringOptions, score_data
from model_training.tables.figures import plot_strengths
from model_training.tables.table import Table, value_of
from training.detection_metrics import DETECTION_METRICS
from utils import run_command


@dataclass(frozen=True, kw_only=True)
class Options(ScoringOptions):
    """Which models and perturbations, and how to predict."""

    perturbations: Annotated[tuple[str, ...], Field(min_length=1)] = GRID  # kind and strength, such as jpeg_75
    metric: Literal[tuple(DETECTION_METRICS)] = "auc"  # of the figure


def measure_robustness(preset: Preset, **values: Any) -> None:
    """Score the preset's data set under every perturbation, and as it is; print and write the table and the figure.

    `values` are the fields of `Options`. Raises UserError for weights, images or perturbations that cannot be used.
    """
    options = Options(**values)
    kinds = list(dict.fromkeys(["native", *options.perturbations]))
    data = score_data(preset, options, kinds)
    folder, drawn = options.output_folder(preset, "robustness"), DETECTION_METRICS[options.metric]
    rows = {kind: {"model": kind, "missing": ""} for kind in kinds}  # a row is named after its perturbation
    lines = {model: {} for model in data.models}
    for (model, seeds), kind in product(data.models.items(), kinds):
        row = metrics_row(seeds, "calibrated", kind, data)
        rows[kind] |= {f"{model} {name}": value for name, value in row.items()}
        lines[model][kind] = [drawn.scale * row[f"{options.metric}_{part}"] for part in ("mean", "low", "high")]
    columns = {"perturbation": value_of("model")}
    for shown, model in product(SHOWN, data.models):
        columns[f"{DETECTION_METRICS[shown].label}, {model}"] = metric_of(f"{model} {shown}")
    note = (
        f"In percent, [{data.interval}]; balanced accuracy at the threshold that was best on the model's validation "
        f"images."
    )
    table = Table("robustness", "Robustness to perturbations", list(rows.values()), columns, [note, *data.notes()])
    table.write(folder)
    print(table.markdown())
    highest = drawn.scale * drawn.high
    plot_strengths(folder / "robustness.png", table.title, f"{drawn.label} ({drawn.unit})", highest, lines)
    data.report_written(folder)


if __name__ == "__main__":
    run_command(__doc__, measure_robustness, settings=SETTINGS, options=Options)
