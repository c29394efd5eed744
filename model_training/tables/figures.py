"""Numbers -> figures, as PNG, without a display. Reads no result files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from data.perturbations import kind_and_strength
from training.cost import Cost
from training.detection_metrics import detection_metrics
from training.metrics import ECE_BINS, fit_line
from training.progress import EpochRecord
from utils import replacing

# Okabe and Ito's colours, which readers with colour blindness can tell apart.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#666666"
LINES = [(colour, line) for line in ("-", "--", ":") for colour in (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)]
FAMILY_COLOURS = {"standard": GREY, "glass": BLUE}  # of other models: green
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "figure.titlesize": 9, "legend.frameon": False, "savefig.dpi": 160,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4,
}  # fmt: skip


@contextmanager
def _panels(
    path: Path, title: str, count: int, size: tuple[float, float], sharey: bool = False
) -> Iterator[list[Axes]]:
    """`count` axes side by side, each of `size` inches; written to `path` when the block ends without an error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
        figure.suptitle(title, parse_math=False)  # it may contain a folder's name with "$"
        yield list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _count_along_x(axis: Axes, what: str) -> None:
    axis.set_xlabel(what)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _legend_below(axis: Axes, columns: int) -> None:
    """A legend of what `axis` shows, for all panels of the figure."""
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def plot_training_curve(path: Path, title: str, histories: Mapping[str, Sequence[EpochRecord]]) -> None:
    """Training loss, validation loss and validation accuracy per epoch of named runs; a ring marks the best epoch."""
    ring = {"marker": "o", "markersize": 7, "fillstyle": "none", "linestyle": ""}
    with _panels(path, title, 3, (2.7, 2.7)) as axes:
        for (label, records), (colour, line) in zip(histories.items(), cycle(LINES), strict=False):
            points = [(r.epoch, r.train_loss, r.valid_loss, 100 * r.valid_accuracy) for r in records]
            epochs, *curves = zip(*points, strict=True)
            best = curves[2].index(max(curves[2]))  # the first maximum
            for axis, curve in zip(axes, curves, strict=True):
                axis.plot(epochs, curve, line, color=colour, marker=".", markersize=3, label=label)
            for axis, curve in zip(axes[1:], curves[1:], strict=True):
                axis.plot(epochs[best], curve[best], color=colour, **ring)
        axes[2].plot([], [], color=GREY, label="best epoch", **ring)
        for axis, name in zip(axes, ("training loss", "validation loss", "validation accuracy (%)"), strict=True):
            axis.set_title(name)
            _count_along_x(axis, "epoch")
        _legend_below(axes[2], 4)


def plot_reliability(path: Path, title: str, probabilities: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Accuracy against confidence, and a histogram; a panel for each probabilities (N,) of fake; labels are (N,)."""
    with _panels(path, title, len(probabilities), (2.9, 3.0)) as axes:
        for axis, (name, fake) in zip(axes, probabilities.items(), strict=True):
            confidence, right = np.maximum(fake, 1 - fake), (fake >= 0.5) == (labels == 0)
            share, mean = calibration_curve(right, confidence, n_bins=ECE_BINS)
            counts, edges = np.histogram(confidence, ECE_BINS, (0, 1))
            error = detection_metrics(fake, labels)["ece"]
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
            axis.bar(edges[:-1], 0.25 * counts / counts.max(), 1 / ECE_BINS, align="edge", color=SKY, alpha=0.5)
            axis.plot(mean, share, "o-", color=VERMILLION)
            axis.set(title=f"{name}\nECE {100 * error:.1f}%", xlim=(0.45, 1), ylim=(-0.02, 1.02))
            axis.set(xlabel="confidence: probability of the predicted class")
        axes[0].set_ylabel("share that is right; bars: number of images")


def plot_roc(path: Path, title: str, models: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """ROC of each model: fake images found against false positives, and the left end of it on a logarithmic axis.

    `models` has the probabilities of fake (N,) of each; `labels` (N,) are 0 fake, 1 real.
    """
    with _panels(path, title, 2, (3.1, 3.0)) as axes:
        for (name, fake), (colour, line) in zip(models.items(), cycle(LINES), strict=False):
            false_positives, found, _ = roc_curve(labels == 0, fake, drop_intermediate=False)
            auc = detection_metrics(fake, labels)["auc"]
            for axis in axes:
                axis.step(false_positives, found, line, where="post", color=colour, label=f"{name}, AUC {auc:.3f}")
        for axis in axes:
            axis.plot(np.geomspace(1e-4, 1), np.geomspace(1e-4, 1), color=GREY, linewidth=0.8)
            axis.set(xlabel="false positives (real images called fake)", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
        axes[0].set_ylabel("fake images found")
        axes[1].set(xscale="log", xlim=(1 / max(2, (labels == 1).sum()), 1.05))
        _legend_below(axes[0], 2)


def plot_aucs(path: Path, title: str, aucs: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Row -> model -> its AUC and the ends of its interval, in percent; the dotted line is chance."""
    models = list(dict.fromkeys(model for of_row in aucs.values() for model in of_row))
    with _panels(path, title, 1, (5.5, 1.1 + len(aucs) * (0.14 + 0.12 * len(models)))) as (axis,):
        axis.axvline(50, color=GREY, linewidth=0.8, linestyle=":")
        for number, (model, (colour, _)) in enumerate(zip(models, cycle(LINES), strict=False)):
            places = [place for place, of_row in enumerate(aucs.values()) if model in of_row]
            mean, low, high = np.array([of_row[model] for of_row in aucs.values() if model in of_row]).T
            shift = 0.16 * (number - (len(models) - 1) / 2)
            style = {"color": colour, "marker": "osD^v"[number % 5], "linestyle": "", "capsize": 2, "elinewidth": 0.9}
            ends = np.maximum(0, [mean - low, high - mean])
            axis.errorbar(mean, np.array(places) + shift, xerr=ends, label=model, **style)
        axis.set_yticks(range(len(aucs)), [label.replace("$", r"\$") for label in aucs])
        axis.set(xlabel="AUC (%), 95% interval", ylim=(len(aucs) - 0.5, -0.5))
        axis.grid(visible=False, axis="y")
        _legend_below(axis, columns=3)


def plot_score_histograms(path: Path, title: str, models: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Histograms of the probabilities of fake for fake and for real images, a panel a model."""
    edges = np.linspace(0, 1, 31)
    with _panels(path, title, len(models), (3.0, 2.6), sharey=True) as axes:
        for axis, (name, fake) in zip(axes, models.items(), strict=True):
            for label, (what, colour) in enumerate((("fake", VERMILLION), ("real", BLUE))):
                axis.hist(fake[labels == label], edges, color=colour, alpha=0.55, label=f"{what} images")
            axis.set(title=name, xlabel="calibrated probability of fake", xlim=(0, 1))
        axes[0].set_ylabel("images")
        _legend_below(axes[0], 2)


def ticks_by_kind(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Kind of perturbation -> name -> tick; native first in each."""
    kinds: dict[str, dict[str, str]] = {}
    for name in names:
        kind, strength = kind_and_strength(name)
        if name != "native":
            kinds.setdefault(kind, {"native": "native"})[name] = name if strength is None else f"{strength:g}"
    return kinds


def plot_strengths(
    path: Path, title: str, metric: str, highest: float, models: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """A metric against the strength of each kind of perturbation, a line a model; bars are 95% intervals.

    `models` has (metric, low, high) of each model and perturbation, native too, in the order to be shown; the metric is
    `highest` at most.
    """
    kinds = ticks_by_kind(next(iter(models.values())))
    with _panels(path, title, len(kinds), (1.75, 2.7), sharey=True) as axes:
        for axis, (kind, ticks) in zip(axes, kinds.items(), strict=True):
            for offset, ((model, values), (colour, line)) in enumerate(zip(models.items(), cycle(LINES), strict=False)):
                middle, low, high = np.array([values[name] for name in ticks]).T
                x = np.arange(len(ticks)) + 0.08 * (offset - (len(models) - 1) / 2)
                bars = np.maximum([middle - low, high - middle], 0)
                style = {"fmt": f"o{line}", "color": colour, "capsize": 2, "markersize": 3, "clip_on": False}
                axis.errorbar(x, middle, bars, label=model, **style)
            axis.set_xticks(range(len(ticks)), ticks.values(), rotation=45, ha="right", rotation_mode="anchor")
            axis.set(title=kind, xlim=(-0.4, len(ticks) - 0.6))
        axes[0].set_ylabel(metric)
        axes[0].set_ylim(top=min(axes[0].get_ylim()[1], highest))
        _legend_below(axes[0], 4)


def plot_crop_costs(path: Path, title: str, costs: Mapping[int, Cost], labels: Mapping[str, str]) -> None:
    """One panel a cost against the number of crops K, with the least-squares line of memory and of time.

    `labels` names the axis of each field of `Cost`; accuracies are in percent, and left out if they were not measured.
    """
    columns = {name: [getattr(cost, name) for cost in costs.values()] for name in labels}
    shown = {name: values for name, values in columns.items() if None not in values}
    with _panels(path, title, len(shown), (3.1, 2.6)) as axes:
        for axis, (name, y) in zip(axes, shown.items(), strict=True):
            x, is_accuracy = list(costs), name == "valid_accuracy"
            axis.plot(x, [100 * share for share in y] if is_accuracy else y, "o:" if is_accuracy else "o", color=BLUE)
            axis.set_ylabel(labels[name])
            _count_along_x(axis, "number of crops K")
            if len(x) > 1 and not is_accuracy:
                intercept, slope, r_squared = fit_line(x, y)
                ends = [min(x), max(x)]
                axis.plot(ends, [intercept + slope * end for end in ends], color=VERMILLION, zorder=1)
                axis.set_title(f"static {intercept:.5g}, per crop {slope:.4g}, R² = {r_squared:.4f}")


def plot_test_metrics(path: Path, title: str, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Mean and standard deviation over seeds of each metric, a line a model; the small dots are single seeds.

    `scores` has, of each experiment and metric, the value for each seed; GLASS comes under its standard model.
    """
    family = {name: name.partition("_")[0] for name in scores}
    backbone = {name: name.partition("_")[2] if family[name] in FAMILY_COLOURS else name for name in scores}
    backbones = list(dict.fromkeys(backbone.values()))
    order = sorted(scores, key=lambda name: backbones.index(backbone[name]))
    # From the top, with a gap before each backbone.
    at = {name: 1.5 + place + 0.5 * backbones.index(backbone[name]) for place, name in enumerate(order)}
    metrics = list(dict.fromkeys(metric for of_name in scores.values() for metric in of_name))
    with _panels(path, title, len(metrics), (3.2, 0.9 + 0.3 * max(at.values())), sharey=True) as axes:
        for axis, metric in zip(axes, metrics, strict=True):
            for name, y in at.items():
                values, colour = scores[name][metric], FAMILY_COLOURS.get(family[name], GREEN)
                if len(values):
                    spread = np.std(values, ddof=1) if len(values) > 1 else None
                    axis.errorbar(np.mean(values), y, xerr=spread, fmt="none", ecolor=colour, capsize=2.5)
                    axis.plot(np.mean(values), y, "D", color=colour, clip_on=False)
                    seeds = {"alpha": 0.6, "markersize": 2.5, "mew": 0, "clip_on": False}
                    axis.plot(values, [y + 0.28] * len(values), "o", color=colour, **seeds)
            axis.set_xlabel(metric)
            axis.set_xlim(right=min(axis.get_xlim()[1], 100))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
        n = {name: max(map(len, of_name.values())) for name, of_name in scores.items()}
        axes[0].set_yticks(list(at.values()), [f"{name} (n = {n[name]})" for name in at])
        axes[0].set_ylim(max(at.values()) + 0.7, 0.9)


def plot_tuning_history(path: Path, title: str, complete: Mapping[int, float], pruned: Mapping[int, float]) -> None:
    """Validation accuracy in percent of numbered trials, and the best so far; pruned trials at their last report."""
    with _panels(path, title, 1, (4.6, 2.8)) as (axis,):
        if pruned:
            axis.plot(list(pruned), list(pruned.values()), "x", color=ORANGE, label="pruned, last epoch")
        axis.plot(list(complete), list(complete.values()), "o", color=BLUE, label="complete")
        best = list(accumulate(complete.values(), max))
        axis.plot(list(complete), best, color=VERMILLION, drawstyle="steps-post", label="best so far", zorder=1)
        axis.set_ylabel("validation accuracy (%)")
        _count_along_x(axis, "trial")
        _legend_below(axis, 3)


def plot_tuning_importance(path: Path, title: str, importances: Mapping[str, float]) -> None:
    """Share of each hyperparameter in the spread of validation accuracy, the largest on top."""
    with _panels(path, title, 1, (4.6, 0.9 + 0.24 * len(importances))) as (axis,):
        bars = axis.barh(list(importances), list(importances.values()), color=BLUE, height=0.65)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set(xlabel="importance", xlim=(0, 1.1 * max(importances.values())))
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()


def plot_ablations(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """AUC of each variant, with its standard deviation over seeds; and against its training speed.

    `rows` come from the table of ablations, the paper's setting first; rows without a value get a label only.
    """
    styles = [(colour, marker) for marker in "osD^v" for colour in (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)]
    with _panels(path, title, 2, (3.6, 1.2 + 0.19 * max(8, len(rows)))) as (by_name, by_speed):
        for place, (row, (colour, marker)) in enumerate(zip(rows, chain([("k", "*")], cycle(styles)), strict=False)):
            mean = row["auc_score_percent_mean"]
            style = {"color": colour, "marker": marker, "markersize": 5 + 4 * (place == 0)}
            if mean is not None:
                by_name.errorbar(mean, place, xerr=row["auc_score_percent_std"], capsize=2, elinewidth=0.8, **style)
                by_speed.plot(row["images_per_second"], mean, **style)
                if place == 0:
                    by_name.axvline(mean, color=GREY, linewidth=0.8, linestyle=":")
        labels = [row["model"] + " (paper)" * (place == 0) for place, row in enumerate(rows)]
        by_name.set_yticks(range(len(rows)), labels)
        by_name.set(xlabel="AUC on the test split (%)", ylim=(len(rows) - 0.5, -0.5))
        by_speed.set(xlabel="training images per second", ylabel="AUC on the test split (%)")
        by_speed.set_title("marks as on the left")
