"""Numbers -> figures, as PNG and without a display; knows no result file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

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
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 160,
}


@contextmanager
def _panels(
    path: Path, title: str, count: int, size: tuple[float, float], sharey: bool = False
) -> Iterator[list[Axes]]:
    """`count` axes side by side, each of `size` inches; written to `path` when the block ends well."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
        figure.suptitle(title)
        yield list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _count_along_x(axis: Axes, what: str) -> None:
    axis.set_xlabel(what)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def plot_training_curve(path: Path, title: str, histories: Mapping[str, Sequence[EpochRecord]]) -> None:
    """Training loss, validation loss and validation accuracy per epoch; a ring marks the best epoch.

    Args:
        histories: what to call a run, such as "seed 100" -> its records; a colour each.
    """
    ring = {"marker": "o", "markersize": 7, "fillstyle": "none", "linestyle": ""}
    with _panels(path, title, 3, (2.7, 2.7)) as axes:
        for (label, records), (colour, line) in zip(histories.items(), cycle(LINES), strict=False):
            epochs = [record.epoch for record in records]
            curves = (
                [record.train_loss for record in records],
                [record.valid_loss for record in records],
                [100 * record.valid_accuracy for record in records],
            )
            best = curves[2].index(max(curves[2])) if records else None  # the first maximum
            for axis, curve in zip(axes, curves, strict=True):
                axis.plot(epochs, curve, line, color=colour, marker=".", markersize=3, label=label)
                if best is not None and curve is not curves[0]:
                    axis.plot(epochs[best], curve[best], color=colour, **ring)
        axes[2].plot([], [], color=GREY, label="best epoch", **ring)
        for axis, name in zip(axes, ("training loss", "validation loss", "validation accuracy (%)"), strict=True):
            axis.set_title(name)
            _count_along_x(axis, "epoch")
        axes[0].figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def plot_reliability(path: Path, title: str, probabilities: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Share of fake images against their predicted probability of being fake, a panel each; how many, below.

    Args:
        probabilities: what a panel shows, such as "raw" -> (N,).
        labels: (N,), 0 fake, 1 real.
    """
    edges = np.linspace(0, 1, ECE_BINS + 1)
    with _panels(path, title, len(probabilities), (2.9, 3.0)) as axes:
        for axis, (name, fake) in zip(axes, probabilities.items(), strict=True):
            bins = np.minimum((fake * ECE_BINS).astype(int), ECE_BINS - 1)
            counts = np.bincount(bins, minlength=ECE_BINS)
            filled = counts > 0
            mean, share = (
                np.bincount(bins, weights=values, minlength=ECE_BINS)[filled] / counts[filled]
                for values in (fake, labels == 0)
            )
            error = detection_metrics(fake, labels)["ece"]
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
            axis.bar(edges[:-1], 0.25 * counts / counts.max(), 1 / ECE_BINS, align="edge", color=SKY, alpha=0.5)
            axis.plot(mean, share, "o-", color=VERMILLION)
            axis.set(title=f"{name}\nECE {100 * error:.1f}%", xlim=(0, 1), ylim=(-0.02, 1.02))
            axis.set(xlabel="predicted probability of fake")
        axes[0].set_ylabel("share that is fake; bars: number of images")


def plot_roc(path: Path, title: str, models: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """ROC of each model: fake images found against false alarms, and the left end of it on a logarithmic axis.

    Args:
        models: name -> (probability of fake, labels), each (N,).
    """
    with _panels(path, title, 2, (3.1, 3.0)) as axes:
        for (name, (fake, labels)), (colour, line) in zip(models.items(), cycle(LINES), strict=False):
            alarms, found, _ = roc_curve(labels == 0, fake, drop_intermediate=False)
            auc = detection_metrics(fake, labels)["auc"]
            for axis in axes:
                axis.plot(alarms, found, line, color=colour, drawstyle="steps-post", label=f"{name}, AUC {auc:.3f}")
        for axis in axes:
            axis.plot(np.geomspace(1e-4, 1), np.geomspace(1e-4, 1), color=GREY, linewidth=0.8)
            axis.set(xlabel="false alarms on real images", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
        axes[0].set_ylabel("fake images found")
        reals = max(int((labels == 1).sum()) for _, labels in models.values())
        axes[1].set(xscale="log", xlim=(min(0.5, 1 / max(2, reals)), 1.05))
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def plot_score_histograms(path: Path, title: str, models: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """How probabilities of fake are spread over fake and real images, a panel a model."""
    edges = np.linspace(0, 1, 31)
    with _panels(path, title, len(models), (3.0, 2.6), sharey=True) as axes:
        for axis, (name, fake) in zip(axes, models.items(), strict=True):
            for label, (what, colour) in enumerate((("fake", VERMILLION), ("real", BLUE))):
                axis.hist(fake[labels == label], edges, color=colour, alpha=0.55, label=f"{what} images")
            axis.set(title=name, xlabel="calibrated probability of fake", xlim=(0, 1))
        axes[0].set_ylabel("images")
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def plot_strengths(path: Path, title: str, metric: str, models: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A metric against the strength of each kind of perturbation, a line a model; bars are 95% intervals.

    Args:
        metric: what the axis is called.
        models: name -> perturbation, as jpeg_75 -> (metric, low, high), in the order to be shown; native comes first.
    """
    names = list(next(iter(models.values())))
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name != "native":
            kinds.setdefault(name.partition("_")[0], []).append(name)
    with _panels(path, title, len(kinds), (1.75, 2.7), sharey=True) as axes:
        for axis, (kind, of_kind) in zip(axes, kinds.items(), strict=True):
            shown = [name for name in ("native", *of_kind) if name in names]
            for offset, ((model, values), (colour, line)) in enumerate(zip(models.items(), cycle(LINES), strict=False)):
                middle, low, high = np.array([values[name] for name in shown]).T
                x = np.arange(len(shown)) + 0.08 * (offset - (len(models) - 1) / 2)
                bars = np.maximum([middle - low, high - middle], 0)
                axis.errorbar(x, middle, bars, fmt=f"o{line}", color=colour, capsize=2, markersize=3, label=model)
            ticks = [name if name in ("native", "social") else name.partition("_")[2] for name in shown]
            axis.set_xticks(range(len(shown)), ticks, rotation=45, ha="right", rotation_mode="anchor")
            axis.set(title=kind, xlim=(-0.4, len(shown) - 0.6))
        axes[0].set_ylabel(metric)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def plot_crop_costs(path: Path, title: str, rows: Sequence[Mapping[str, float]], labels: Mapping[str, str]) -> None:
    """One panel a cost against the number of crops K, with the least-squares line of memory and of time.

    Args:
        rows: num_crops and costs of each K.
        labels: cost -> what its axis is called; a cost that was measured for no K has no panel.
    """
    shown = [name for name in labels if any(row[name] == row[name] for row in rows)]
    with _panels(path, title, len(shown), (3.1, 2.6)) as axes:
        for axis, name in zip(axes, shown, strict=True):
            points = [(row["num_crops"], row[name]) for row in rows if row[name] == row[name]]
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o", color=BLUE)
            axis.set_ylabel(labels[name])
            _count_along_x(axis, "number of crops K")
            intercept, slope, r_squared = fit_line(x, y)
            if name == "valid_accuracy_percent":
                axis.plot(x, y, ":", color=BLUE)
            elif slope == slope:
                ends = [min(x), max(x)]
                axis.plot(ends, [intercept + slope * end for end in ends], color=VERMILLION, zorder=1)
                axis.set_title(f"static {intercept:.5g}, per crop {slope:.4g}, R² = {r_squared:.4f}")


def plot_test_metrics(path: Path, title: str, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Mean and standard deviation over seeds of each metric, a line a model; the small dots are single seeds.

    Args:
        scores: experiment -> what the metric is called -> its value for each seed, in percent. GLASS is drawn under
            the standard model of its backbone.
    """
    family = {name: name.partition("_")[0] for name in scores}
    pair = {name: name.partition("_")[2] if family[name] in FAMILY_COLOURS else name for name in scores}
    groups = {of_pair: [name for name in scores if pair[name] == of_pair] for of_pair in pair.values()}
    heights = {name: 1.0 for names in groups.values() for name in names}
    heights |= {names[0]: 1.5 for names in groups.values()}  # a new backbone stands a little apart
    at = dict(zip(heights, accumulate(heights.values()), strict=True))
    metrics = list(dict.fromkeys(metric for of_name in scores.values() for metric in of_name))
    with _panels(path, title, len(metrics), (3.2, 0.9 + 0.3 * max(at.values())), sharey=True) as axes:
        for axis, metric in zip(axes, metrics, strict=True):
            for name, y in at.items():
                values, colour = scores[name][metric], FAMILY_COLOURS.get(family[name], GREEN)
                if values:
                    spread = np.std(values, ddof=1) if len(values) > 1 else None
                    axis.errorbar(np.mean(values), y, xerr=spread, fmt="D", color=colour, capsize=2.5)
                    axis.plot(values, [y + 0.28] * len(values), "o", color=colour, alpha=0.6, markersize=2.5, mew=0)
            axis.set_xlabel(metric)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
        n = {name: max(map(len, of_name.values())) for name, of_name in scores.items()}
        axes[0].set_yticks(list(at.values()), [f"{name} (n = {n[name]})" for name in at])
        axes[0].set_ylim(max(at.values()) + 0.7, 0.9)


def plot_tuning_history(path: Path, title: str, complete: Mapping[int, float], pruned: Mapping[int, float]) -> None:
    """Validation accuracy against the trial's number, and the best so far; pruned trials at their last report.

    Args:
        complete, pruned: trial number -> validation accuracy in percent.
    """
    with _panels(path, title, 1, (4.6, 2.8)) as (axis,):
        if pruned:
            axis.plot(list(pruned), list(pruned.values()), "x", color=ORANGE, label="pruned, last epoch")
        axis.plot(list(complete), list(complete.values()), "o", color=BLUE, label="complete")
        best = list(accumulate(complete.values(), max))
        axis.plot(list(complete), best, color=VERMILLION, drawstyle="steps-post", label="best so far", zorder=1)
        axis.set_ylabel("validation accuracy (%)")
        _count_along_x(axis, "trial")
        axis.figure.legend(loc="outside lower center", ncols=3)


def plot_tuning_importance(path: Path, title: str, importances: Mapping[str, float]) -> None:
    """Share of each hyperparameter in the spread of validation accuracy, the largest on top."""
    with _panels(path, title, 1, (4.6, 0.9 + 0.24 * len(importances))) as (axis,):
        bars = axis.barh(list(importances), list(importances.values()), color=BLUE, height=0.65)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set(xlabel="importance", xlim=(0, 1.1 * max(importances.values())))
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
