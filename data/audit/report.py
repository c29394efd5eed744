"""The results of the audit: a verdict, tables and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.audit.duplicates import HASH_BITS, Pair
from data.audit.files import AuditedFile
from data.audit.header_classifier import YES_OR_NO, HeaderAudit, Score
from data.preparation import charts
from data.records import CLASSES

WEAK = 0.6  # below this AUC, headers separate the classes only slightly
DISCRIMINATIVE = 0.005  # least importance (in AUC) of a feature that the verdict names
METADATA = ("progressive", "icc_profile", "exif", "camera", "software", "xmp", "c2pa", "generator")


def image_table(files: Sequence[AuditedFile], parts: Sequence[dict[str, str]]) -> pd.DataFrame:
    """One row an image: path, class, its part of each split, the fields of its header, and the hash of its content."""
    table = pd.DataFrame(
        {"class": CLASSES[file.label], **part, **file.header, "content": file.content}
        for file, part in zip(files, parts, strict=True)
    )
    table.insert(0, "path", np.array([file.path for file in files], object))  # names need not be UTF-8
    return table


def split_by_class(table: pd.DataFrame) -> charts.ByClass:
    """The rows of the fake images, and those of the real ones."""
    return [table[table["class"] == class_name] for class_name in CLASSES]


# --------------------------------------------------------------------------------------------------- sentences
def verdict(audit: HeaderAudit) -> str:
    """How well the headers separate the classes, in one sentence."""
    score, others = audit.all, audit.without_file_size
    found = f"AUC {_format_score(score, '95% interval ')}, or {_format_score(others)} without the file size"
    if score.low > 0.5:
        slightly = "" if score.auc >= WEAK else " slightly"
        *names, last = [name.replace("_", " ") for name in discriminative_features(audit)]
        by = f"{', '.join(names)} and {last}" if names else last
        return f"the headers alone separate fake from real{slightly}, {found}: mainly by {by}"
    if score.high < 0.5:
        return (
            f"the headers do not help, {found}: below 0.5, as happens with few images, or where each has a counterpart "
            f"in the other class, so that what is learned from one is wrong for the other"
        )
    return f"no evidence that the headers separate the classes, {found}"


def _format_score(score: Score, what: str = "") -> str:
    return f"{score.auc:.2f} ({what}{score.low:.2f} to {score.high:.2f})"


def discriminative_features(audit: HeaderAudit) -> list[str]:
    """Up to four features that the forest relies on; if none matters by itself, the one with the highest AUC alone."""
    importance = audit.features["importance"]
    names = importance.index[importance >= max(DISCRIMINATIVE, importance.iloc[0] / 5)][:4]
    return list(names) or [audit.features["auc_alone"].idxmax()]


# ------------------------------------------------------------------------------------------------------ tables
def feature_table(table: pd.DataFrame, audit: HeaderAudit) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each feature's values in each class, and how well it separates them.

    Texts and booleans as shares of the class; numbers as median (5% to 95%), the JPEG quality of JPEGs only.
    """
    rows = [
        [name.replace("_", " "), *(_summarise(images[name]) for images in split_by_class(table)), alone, importance]
        for name, alone, importance in audit.features.itertuples()
    ]
    return ["feature", *CLASSES, "auc_alone", "importance"], rows


def _summarise(values: pd.Series) -> str:
    if values.name in YES_OR_NO:
        values = values != ""
    if values.dtype == bool:
        return f"{values.mean():.0%}"
    if not pd.api.types.is_numeric_dtype(values):
        common = values.replace("", "none").value_counts(normalize=True).head(3)
        return ", ".join(f"{value} {share:.0%}" for value, share in common.items())
    if values.isna().all():
        return "none"
    low, middle, high = values.quantile((0.05, 0.5, 0.95))
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def duplicate_table(
    images: pd.DataFrame, pairs: Sequence[Pair]
) -> tuple[list[str], list[list[Any]], dict[str, dict[str, int]]]:
    """Columns and rows of duplicates.csv, one row a pair, and how many pairs of each kind cross classes and splits.

    `images` has path and class of all images, and their part of each split.
    """
    first, other = (images.iloc[[getattr(pair, side) for pair in pairs]].to_numpy() for side in ("first", "other"))
    kinds = np.array(["exact" if pair.bits is None else "near" for pair in pairs], object)
    rows = [[k, pair.bits or 0, *a, *b] for k, pair, a, b in zip(kinds, pairs, first, other, strict=True)]
    names = ["pairs", "across_classes", *(f"across_{split}" for split in images.columns[2:])]
    differ = first != other  # paths always differ, so that their column counts the pairs
    counts = {k: dict(zip(names, differ[kinds == k].sum(0).tolist(), strict=True)) for k in ("exact", "near")}
    return ["kind", "bits", *(f"{name}_{side}" for side in "ab" for name in images)], rows, counts


# ----------------------------------------------------------------------------------------------------- figures
def draw_headers(path: Path, table: pd.DataFrame) -> None:
    """Write a figure of the headers of each class, as PNG."""
    by_class = split_by_class(table)
    figure, (sizes, density, quality, formats, sampling, metadata) = charts.new_figure((11, 6.4), (2, 3))
    charts.draw_sizes(sizes, by_class)
    charts.draw_histogram(density, by_class, "bits_per_pixel", bins=24)
    density.set(title="File size", xlabel="bits per pixel")
    charts.draw_histogram(quality, by_class, "jpeg_quality", np.arange(0.5, 101.5, 4))
    quality.set(title="JPEG quality (IJG)", xlabel="quality", xlim=(0, 102))
    charts.draw_categories(formats, by_class, "format", "Format")
    charts.draw_categories(sampling, by_class, "subsampling", "Chroma subsampling")
    present = [images[list(METADATA)].astype(bool).mean() for images in by_class]
    names = [name.split("_")[0] for name in METADATA]
    charts.draw_shares(metadata, names, present)
    metadata.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    metadata.set_title("Metadata")
    charts.save_figure(figure, path, sizes)


def draw_separation(path: Path, table: pd.DataFrame, audit: HeaderAudit) -> None:
    """Write a figure of how well headers separate the classes, and by which features, as PNG."""
    from sklearn.metrics import roc_curve

    figure, (roc, scores, features) = charts.new_figure((11, 4.2), (1, 3))
    false_positives, true_positives, _ = roc_curve(table["class"] == "fake", table["fake_score"])
    roc.plot([0, 1], [0, 1], ":", color="grey")
    roc.plot(false_positives, true_positives, color="black")
    roc.set(title=f"AUC {_format_score(audit.all)}", aspect="equal")
    roc.set(xlabel="false positive rate (real called fake)", ylabel="true positive rate (fake called fake)")
    charts.draw_histogram(scores, split_by_class(table), "fake_score", np.linspace(0, 1, 21))
    scores.set(title="Score from headers alone", xlabel="fake score (out of fold)")
    shown = audit.features.sort_values("auc_alone", kind="stable", ascending=False).head(12).iloc[::-1]
    names = [name.replace("_", " ") for name in shown.index]
    alone, importance = shown["auc_alone"], shown["importance"]
    features.barh(names, alone - 0.5, left=0.5, height=0.65, color="lightgrey", label="AUC of this feature alone")
    features.plot(0.5 + importance, names, "D", color="black", markersize=4, label="0.5 + AUC lost by shuffling it")
    features.axvline(0.5, color="black", linewidth=0.8)
    features.set(title="Discriminative features", xlim=(0.4, 1.0), ylim=(-2.2, len(shown) - 0.4))  # above the legend
    features.legend(loc="lower right", frameon=False, fontsize=8)
    charts.save_figure(figure, path, scores)


def draw_nearest(path: Path, nearest: np.ndarray, limit: int) -> None:
    """Write a histogram of each image's distance to the most similar one, in bits of the hash, as PNG."""
    figure, (panel,) = charts.new_figure((5, 3.2), (1, 1))
    panel.hist(nearest[nearest >= 0], np.arange(-2, HASH_BITS // 2 + 4, 4), color="grey")
    panel.axvline(limit, color="black", linestyle=":", label=f"near duplicates: at most {limit} of {HASH_BITS} bits")
    panel.set(xlabel="bits to the most similar image", ylabel="images")
    charts.save_figure(figure, path, panel)
