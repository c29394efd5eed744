"""What the audit tells of a data set: a verdict, tables and figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.audit_files import AuditedFile
from data.duplicates import HASH_BITS, Pair
from data.header_classifier import YES_OR_NO, HeaderAudit, Score
from data.headers import Header
from data.index import CLASSES
from data.report import scale_axis
from utils import replacing, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Splits = Mapping[str, Sequence[str]]  # kind of split -> the part that each image is in
LITTLE = 0.6  # AUC below which headers tell a little at most
TELLING = 0.005  # AUC that a feature is worth at least, to be named in the verdict
COLOURS = ("tab:orange", "tab:blue")  # of fake and real


# --------------------------------------------------------------------------------------------------- sentences
def verdict(audit: HeaderAudit) -> str:
    """What the headers tell, in one sentence."""
    score, others = audit.all, audit.without_file_size
    found = f"AUC {_in_digits(score, '95% interval ')}, or {_in_digits(others)} without the file size"
    if score.low > 0.5:
        names = [name.replace("_", " ") for name in giveaways(audit)]
        by = f"{', '.join(names[:-1])} and {names[-1]} give" if len(names) > 1 else f"{names[0]} gives"
        told = "tell fake from real" if score.auc >= LITTLE else "tell a little of the class"
        return f"the headers alone {told}, {found}: {by} it away"
    if score.high < 0.5:
        return (
            f"the headers are no help, {found}: below 0.5, as happens with few images, or where each has its like in "
            f"the other class, so that what is learnt of one is wrong for the other"
        )
    return f"no sign that the headers tell the class, {found}"


def _in_digits(score: Score, what: str = "") -> str:
    return f"{score.auc:.2f} ({what}{score.low:.2f} to {score.high:.2f})"


def giveaways(audit: HeaderAudit) -> list[str]:
    """Up to four features that the forest goes by; where each can stand for another, those that tell most alone."""
    least = max(TELLING, audit.features[0].importance / 5)
    telling = [feature.name for feature in audit.features if feature.importance >= least][:4]
    return telling or [max(audit.features, key=lambda feature: feature.auc_alone).name]


# ------------------------------------------------------------------------------------------------------ tables
def feature_table(files: Sequence[AuditedFile], audit: HeaderAudit) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the summary: each feature in each class, and what it gives away.

    Texts and yes or no as shares of the class; numbers as median (5% to 95%), the JPEG quality of JPEGs only.
    """
    headers = [[file.header for file in files if file.label == label] for label in (0, 1)]
    rows = [
        [
            *(feature.name.replace("_", " "), *(_in_words(feature.name, of_class) for of_class in headers)),
            *(feature.auc_alone, feature.importance),
        ]
        for feature in audit.features
    ]
    return ["feature", *CLASSES, "auc_alone", "importance"], rows


def _in_words(name: str, headers: Sequence[Header]) -> str:
    values = [getattr(header, name) for header in headers]
    if name in YES_OR_NO or isinstance(values[0], bool):
        return f"{100 * sum(map(bool, values)) / len(values):.0f}%"
    if isinstance(values[0], str):
        common = Counter(value or "none" for value in values).most_common(3)
        return ", ".join(f"{value} {100 * count / len(values):.0f}%" for value, count in common)
    known = [value for value in values if value == value]  # only NaN differs from itself
    if not known:
        return "none"
    low, middle, high = np.quantile(known, (0.05, 0.5, 0.95))
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def write_audit_csv(path: Path, files: Sequence[AuditedFile], splits: Splits, fake_scores: np.ndarray) -> None:
    """One row a file: its class, its parts of the splits, its header, and how fake the header looks out of fold."""
    columns = ["path", "class", *splits, *(field.name for field in fields(Header)), "content", "fake_score"]
    rows = [
        [
            *(file.path, CLASSES[file.label], *(parts[row] for parts in splits.values())),
            *("" if value != value else value for value in astuple(file.header)),
            *(file.content, float(score)),
        ]
        for row, (file, score) in enumerate(zip(files, fake_scores, strict=True))
    ]
    write_csv(path, columns, rows)


def write_duplicates_csv(path: Path, files: Sequence[AuditedFile], splits: Splits, pairs: Sequence[Pair]) -> None:
    """One row a pair: its kind, its bits, and path, class and parts of the splits of both files."""
    columns = [f"{what}_{which}" for which in ("a", "b") for what in ("path", "class", *splits)]

    def about(row: int) -> list[str]:
        return [files[row].path, CLASSES[files[row].label], *(parts[row] for parts in splits.values())]

    rows = [[_kind(pair), pair.bits or 0, *about(pair.first), *about(pair.other)] for pair in pairs]
    write_csv(path, ["kind", "bits", *columns], rows)


def count_duplicates(files: Sequence[AuditedFile], splits: Splits, pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Exact and near duplicates: how many pairs, and how many of them across the classes and across each split."""
    counts = {}
    for kind in ("exact", "near"):
        of_kind = [pair for pair in pairs if _kind(pair) == kind]
        counts[kind] = {
            "pairs": len(of_kind),
            "across_classes": sum(files[pair.first].label != files[pair.other].label for pair in of_kind),
        }
        for name, parts in splits.items():
            counts[kind][f"across_{name}"] = sum(parts[pair.first] != parts[pair.other] for pair in of_kind)
    return counts


def _kind(pair: Pair) -> str:
    return "exact" if pair.bits is None else "near"


# ----------------------------------------------------------------------------------------------------- figures
def draw_headers(path: Path, files: Sequence[AuditedFile]) -> None:
    """Write a figure of the headers of each class, as PNG."""
    headers = [[file.header for file in files if file.label == label] for label in (0, 1)]
    figure, panels = _figure((11, 6.4), 2, 3)
    sizes, density, quality, formats, sampling, marks = panels.ravel()
    for label, class_name in enumerate(CLASSES):
        sizes.scatter(
            [header.width for header in headers[label]],
            [header.height for header in headers[label]],
            marker="ox"[label],  # so that neither class hides the other where sizes are shared
            s=(30, 18)[label],
            facecolor=("none", COLOURS[1])[label],
            edgecolor=(COLOURS[0], None)[label],
            linewidth=1,
            alpha=0.7,
            label=class_name,
        )
    for axis in (sizes.xaxis, sizes.yaxis):
        scale_axis(axis)
    sizes.set(title="Size", xlabel="width (pixels)", ylabel="height (pixels)")
    bits = [[header.bits_per_pixel for header in of_class] for of_class in headers]
    _histogram(density, bits, np.geomspace(min(map(min, bits)) / 1.05, max(map(max, bits)) * 1.05, 25))
    scale_axis(density.xaxis)
    density.set(title="File size", xlabel="bits per pixel")
    qualities = [[h.jpeg_quality for h in of_class if h.jpeg_quality == h.jpeg_quality] for of_class in headers]
    _histogram(quality, qualities, np.arange(0.5, 101.5, 4), total=list(map(len, headers)))
    quality.set(title="JPEG quality (IJG)", xlabel="quality", xlim=(0, 102))
    _shares(formats, headers, "format")
    _shares(sampling, headers, "subsampling")
    formats.set_title("Format")
    sampling.set_title("Chroma subsampling")
    _marks(marks, headers)
    _save(figure, path, sizes)


def draw_giveaway(path: Path, labels: np.ndarray, audit: HeaderAudit) -> None:
    """Write a figure of how well headers tell the class, and by what, as PNG."""
    from sklearn.metrics import roc_curve

    figure, ((roc, scores, features),) = _figure((11, 4.2), 1, 3)
    false_rate, true_rate, _ = roc_curve(labels == 0, audit.fake_scores)
    roc.plot([0, 1], [0, 1], ":", color="grey")
    roc.plot(false_rate, true_rate, color="black")
    roc.set(
        title=f"AUC {_in_digits(audit.all)}",
        xlabel="share of real taken for fake",
        ylabel="share of fake recognised",
        aspect="equal",
    )
    _histogram(scores, [audit.fake_scores[labels == label] for label in (0, 1)], np.linspace(0, 1, 21))
    scores.set(title="Score from headers alone", xlabel="how fake (out of fold)")
    shown = sorted(audit.features, key=lambda feature: feature.auc_alone)[-12:]
    names = [feature.name.replace("_", " ") for feature in shown]
    alone = [feature.auc_alone - 0.5 for feature in shown]
    features.barh(names, alone, left=0.5, height=0.65, color="lightgrey", label="AUC of it alone")
    importances = [0.5 + feature.importance for feature in shown]
    features.plot(importances, names, "D", color="black", markersize=4, label="0.5 + AUC lost by shuffling it")
    features.axvline(0.5, color="black", linewidth=0.8)
    features.set(title="What tells the class", xlim=(0.4, 1.0), ylim=(-2.2, len(shown) - 0.4))  # room for the legend
    features.legend(loc="lower right", frameon=False, fontsize=8)
    _save(figure, path, scores)


def draw_nearest(path: Path, nearest: np.ndarray, limit: int) -> None:
    """Write a histogram of each image's distance to the image most like it, in bits of the hash, as PNG."""
    figure, ((panel,),) = _figure((5, 3.2), 1, 1)
    panel.hist(nearest[nearest >= 0], np.arange(-2, HASH_BITS // 2 + 4, 4), color="grey")
    panel.axvline(limit, color="black", linestyle=":", label=f"near duplicates: at most {limit} of {HASH_BITS} bits")
    panel.set(xlabel="bits to the image most alike", ylabel="images")
    _save(figure, path, panel)


def _figure(size: tuple[float, float], rows: int, columns: int) -> tuple["Figure", np.ndarray]:
    from matplotlib.figure import Figure  # here, because worker processes may import this module, and draw nothing

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: Path, legend: "Axes") -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*legend.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _histogram(
    axes: "Axes", values: Sequence[Sequence[float]], edges: np.ndarray, total: Sequence[int] | None = None
) -> None:
    """Shares of each class, side by side; `total` is the size of each class, if not all of it has a value."""
    totals = total or list(map(len, values))
    weights = [np.full(len(of_class), 100 / count) for of_class, count in zip(values, totals, strict=True)]
    axes.hist(values, edges, weights=weights, color=COLOURS, label=CLASSES)
    axes.set_ylabel("share of class (%)")


def _shares(axes: "Axes", headers: Sequence[Sequence[Header]], name: str) -> None:
    counts = [Counter(getattr(header, name) or "none" for header in of_class) for of_class in headers]
    kinds = [kind for kind, _ in (counts[0] + counts[1]).most_common(6)]
    _bars(axes, kinds, [[100 * c[kind] / c.total() for kind in kinds] for c in counts])


def _marks(axes: "Axes", headers: Sequence[Sequence[Header]]) -> None:
    """Shares of images that hold each kind of metadata."""
    kinds = ("progressive", "icc_profile", "exif", "camera", "software", "xmp", "c2pa", "generator")
    shares = [
        [100 * sum(bool(getattr(h, kind)) for h in of_class) / len(of_class) for kind in kinds] for of_class in headers
    ]
    _bars(axes, [kind.split("_")[0] for kind in kinds], shares)
    axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_title("Metadata")


def _bars(axes: "Axes", names: Sequence[str], shares: Sequence[Sequence[float]]) -> None:
    for label, of_class in enumerate(shares):
        bars = axes.bar(np.arange(len(names)) + 0.4 * label - 0.2, of_class, 0.38, color=COLOURS[label])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="share of class (%)", xlim=(-0.7, max(len(names), 3) - 0.3), ylim=(0, 109))
