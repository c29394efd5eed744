"""What preprocessing tells of a data set: statistics, tables, a figure, and the files that it leaves out."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data.images import IMAGE_ENDINGS
from data.index import CLASSES, ImageRecord, Index, list_files
from utils import replacing, write_csv

if TYPE_CHECKING:
    from matplotlib.axis import Axis

CHANNELS = ("red", "green", "blue")
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
SHOWN = 20  # unreadable files that are printed; unreadable.csv holds all


# ------------------------------------------------------------------------------------------------ statistics
def measure(root: Path, records: Sequence[ImageRecord], sums: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What statistics.json holds. All but `images` is over readable images; mean and std are over their pixels.

    `sums` are each image's, as `CheckedImage` has them. Sizes are in pixels, `mean` and `std` (population) of values
    in [0, 1], red, green, blue, exact to the last digit.
    """
    index = Index(root, tuple(records))
    readable = np.array([not record.problem for record in records])
    statistics: dict[str, Any] = {
        "data_root": str(root.absolute()),
        "fingerprint": index.fingerprint,
        "images": len(records),
        "unreadable": int((~readable).sum()),
        "passed_over": files_passed_over(root),
        **moments(records, sums),
        "classes": {},
    }
    for label, class_name in enumerate(CLASSES):
        rows = np.flatnonzero(readable & (np.array(index.labels) == label))
        members = [records[row] for row in rows]
        statistics["classes"][class_name] = {
            "images": index.labels.count(label),
            "unreadable": index.labels.count(label) - len(members),
            "mean_width": sum(record.width for record in members) / len(members),
            "mean_height": sum(record.height for record in members) / len(members),
            "modes": dict(Counter(record.mode for record in members).most_common()),
            "formats": dict(Counter(record.format for record in members).most_common()),
            "common_sizes": dict(Counter(f"{r.width}x{r.height}" for r in members).most_common(5)),
            "width": quantiles([record.width for record in members]),
            "height": quantiles([record.height for record in members]),
            "megapixels": quantiles([record.width * record.height / 1e6 for record in members]),
            **moments(members, [sums[row] for row in rows]),
        }
    return statistics


def files_passed_over(root: Path) -> list[str]:
    """Files under root/fake and root/real whose ending is no image's, relative to `root`."""
    return [
        name
        for class_name in CLASSES
        for name in list_files(root, class_name)
        if not name.lower().endswith(IMAGE_ENDINGS)
    ]


def moments(records: Sequence[ImageRecord], sums: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Number of pixels, and their mean and population standard deviation per channel, from integer `sums`."""
    pixels = sum(record.width * record.height for record in records)
    totals = [sum(column) for column in zip(*sums, strict=True)]  # Python integers: the products are beyond 64 bits
    variances = [
        (pixels * squares - total**2) / pixels**2 for total, squares in zip(totals[:3], totals[3:], strict=True)
    ]
    return {
        "pixels": pixels,
        "mean": [total / (255 * pixels) for total in totals[:3]],
        "std": [math.sqrt(variance) / 255 for variance in variances],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`QUANTILES` of `values`, linear between neighbours."""
    return dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------- tables
def tables(statistics: dict[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The report's tables, as columns and rows, by name, which is their file's name too."""
    classes = statistics["classes"].items()
    modes = list(dict.fromkeys(mode for _, values in classes for mode in values["modes"]))
    averages = ("images", "unreadable", "mean_width", "mean_height")
    measured = ("width", "height", "megapixels")

    def shares(kind: str) -> list[list[Any]]:
        return [
            [name, value, count, 100 * count / (values["images"] - values["unreadable"])]
            for name, values in classes
            for value, count in values[kind].items()
        ]

    return {
        "classes": (
            ["class", *averages, *(f"mode_{mode}" for mode in modes)],
            [
                [name, *(v[key] for key in averages), *(v["modes"].get(mode, 0) for mode in modes)]
                for name, v in classes
            ],
        ),
        "channels": (
            ["class", *(f"{quantity}_{channel}" for quantity in ("mean", "std") for channel in CHANNELS)],
            [[name, *values["mean"], *values["std"]] for name, values in (*classes, ("both", statistics))],
        ),
        "sizes": (
            ["class", "quantity", *QUANTILES],
            [[name, key, *values[key].values()] for name, values in classes for key in measured],
        ),
        "common_sizes": (["class", "size", "images", "percent"], shares("common_sizes")),
        "formats": (["class", "format", "images", "percent"], shares("formats")),
    }


def render_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """A table as aligned text, or as Markdown: numbers to the right, text to the left."""
    table = []
    for column, values in zip(columns, zip(*rows, strict=True), strict=True):
        is_text = isinstance(values[0], str)
        digits = 0 if isinstance(values[0], int) else 4 if not is_text and max(values) <= 1 else 2
        cells = [column.replace("_", " "), *(value if is_text else f"{value:,.{digits}f}" for value in values)]
        width = max(map(len, cells))
        if markdown:
            cells.insert(1, "-" * width if is_text else "-" * (width - 1) + ":")
        table.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = zip(*table, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)


class Looked(Protocol):
    """A file that was looked at; `problem` is empty if it is a readable image."""

    path: str
    problem: str


def report_left_out(folder: Path, records: Sequence[Looked], passed_over: Sequence[str]) -> None:
    """Name the unreadable files with their reasons, and the files that are no images by their ending."""
    unreadable = [[record.path, record.problem] for record in records if record.problem]
    write_csv(folder / "unreadable.csv", ["path", "problem"], unreadable)
    if unreadable:
        print(f"\nUnreadable: {len(unreadable):,} of {len(records):,} images; all that follows leaves them out")
        shown = [[_printable(path), _printable(problem)] for path, problem in unreadable[:SHOWN]]
        print(render_table(["file", "reason"], shown))
    if len(unreadable) > SHOWN:
        print(f"... and {len(unreadable) - SHOWN:,} more in {folder / 'unreadable.csv'}")
    if passed_over:
        names = ", ".join(map(_printable, passed_over[:3])) + (", ..." if len(passed_over) > 3 else "")
        print(f"\nPassed over: {len(passed_over):,} files whose ending is no image's ({names})")


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)  # a name may hold a line break, or bytes that are no text


# ---------------------------------------------------------------------------------------------------- figure
def draw_sizes_and_formats(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write a figure of the sizes, areas and file formats of each class, as PNG."""
    from matplotlib.figure import Figure  # here, because worker processes import this module too and draw nothing

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    sizes, areas, formats = figure.subplots(1, 3)
    members = [[record for record in records if record.label == label and not record.problem] for label in (0, 1)]
    kinds = [kind for kind, _ in Counter(record.format for of_class in members for record in of_class).most_common()]
    megapixels = [[record.width * record.height / 1e6 for record in of_class] for of_class in members]
    edges = np.geomspace(min(map(min, megapixels)) / 1.1, max(map(max, megapixels)) * 1.1, 21)
    colours = ("tab:orange", "tab:blue")
    for label, class_name in enumerate(CLASSES):
        sizes.scatter(
            [record.width for record in members[label]],
            [record.height for record in members[label]],
            marker="ox"[label],  # so that neither class hides the other where sizes are shared
            s=(30, 18)[label],
            facecolor=("none", colours[1])[label],
            edgecolor=("tab:orange", None)[label],
            linewidth=1,
            alpha=0.7,
            label=class_name,
        )
        counts = Counter(record.format for record in members[label])
        shares = [100 * counts[kind] / len(members[label]) for kind in kinds]
        bars = formats.bar(np.arange(len(kinds)) + 0.4 * label - 0.2, shares, 0.38, color=colours[label])
        formats.bar_label(bars, fmt="%.1f", fontsize=8)
    areas.hist(
        megapixels, edges, weights=[np.full(len(values), 100 / len(values)) for values in megapixels], color=colours
    )
    for axis in (sizes.xaxis, sizes.yaxis, areas.xaxis):
        scale_axis(axis)
    sizes.set(title="Size", xlabel="width (pixels)", ylabel="height (pixels)")
    areas.set(title="Area", xlabel="megapixels", ylabel="share of class (%)")
    formats.set(title="File format", ylabel="share of class (%)", xlim=(-0.7, max(len(kinds), 3) - 0.3))
    formats.set_xticks(range(len(kinds)), kinds)
    for axes in (sizes, areas, formats):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def scale_axis(axis: "Axis") -> None:
    """Make an axis of positive numbers logarithmic if they span a factor of eight; fewer read better as they are."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    if high > 8 * max(low, high / 1000):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter("{x:g}")
