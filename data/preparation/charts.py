"""Charts that compare the fake and the real images of a data set; they import matplotlib when they are drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data.records import CLASSES
from utils import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("tab:orange", "tab:blue")  # of fake and real
MARKERS = (  # of fake and real; neither hides the other at the same size
    {"marker": "o", "s": 30, "facecolor": "none", "edgecolor": COLOURS[0]},
    {"marker": "x", "s": 18, "facecolor": COLOURS[1]},
)
ByClass = Sequence[pd.DataFrame]  # one row an image: the fake ones, then the real ones


def new_figure(size: tuple[float, float], panels: tuple[int, int]) -> tuple["Figure", np.ndarray]:
    """A figure of `size` inches, and its panels (rows, columns) from left to right, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*panels, squeeze=False).ravel()


def save_figure(figure: "Figure", path: Path, legend: "Axes") -> None:
    """Write a figure as PNG, the legend of one panel below all of them."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*legend.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def draw_sizes(axes: "Axes", by_class: ByClass) -> None:
    """Width against height of each image."""
    for images, class_name, marker in zip(by_class, CLASSES, MARKERS, strict=True):
        axes.scatter(images["width"], images["height"], linewidth=1, alpha=0.7, label=class_name, **marker)
    for axis in (axes.xaxis, axes.yaxis):
        scale_axis(axis)
    axes.set(title="Size", xlabel="width (pixels)", ylabel="height (pixels)")


def draw_histogram(axes: "Axes", by_class: ByClass, column: str, bins: int | np.ndarray) -> None:
    """Shares of each class in bins of a column, side by side; a missing value is in no bin.

    `bins` are their edges, or their number: bins of equal ratio over all values, which must be positive.
    """
    values = [images[column].dropna() for images in by_class]
    weights = [np.full(len(known), 100 / len(images)) for known, images in zip(values, by_class, strict=True)]
    every = pd.concat(values)
    edges = np.geomspace(every.min() / 1.05, every.max() * 1.05, bins + 1) if isinstance(bins, int) else bins
    axes.hist(values, edges, weights=weights, color=COLOURS, label=CLASSES)
    axes.set_ylabel("share of class (%)")
    if isinstance(bins, int):
        scale_axis(axes.xaxis)


def draw_categories(axes: "Axes", by_class: ByClass, column: str, title: str) -> None:
    """Bars: the share of each class that has each of the six most common values of a column of texts."""
    named = [images[column].replace("", "none") for images in by_class]
    values = pd.concat(named).value_counts().index[:6]
    draw_shares(axes, values, [of.value_counts(normalize=True).reindex(values, fill_value=0) for of in named])
    axes.set_title(title)


def draw_shares(axes: "Axes", names: Sequence[str], shares: Sequence[pd.Series]) -> None:
    """A bar for each class and name, `shares` from 0 to 1."""
    for label, of_class in enumerate(shares):
        bars = axes.bar(np.arange(len(names)) + 0.4 * label - 0.2, 100 * of_class, 0.38, color=COLOURS[label])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="share of class (%)", xlim=(-0.7, max(len(names), 3) - 0.3), ylim=(0, 109))


def scale_axis(axis: "Axis") -> None:
    """Make an axis of positive numbers logarithmic if they span a factor of eight; smaller ranges stay linear."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    if high > 8 * max(low, high / 1000):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter("{x:g}")
