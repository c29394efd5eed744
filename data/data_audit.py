"""Can the class be told from file headers alone? And which images occur twice?

    python -m data.data_audit [--preset demo] [--data-root DIR] [--num-workers N]
    python -m data.data_audit --data-root DIR --match OUT.csv     and list a subset whose headers are matched
    python -m data.data_audit --data-root DIR --data-list OUT.csv audit the listed files only

Reads DATA_ROOT, in any layout, and never writes there; needs no preprocessing. Prints the cross-validated AUC of a
classifier that sees headers only (format, size, compression, metadata), which of them separate the classes, and exact
and near duplicates, across the classes and the preset's splits. Writes audit.json, audit.csv (one row a file), tables
and figures into results/<preset>/dataset/audit/<NAME>, NAME after data root and list. --match pairs fake images with
real ones of the same format, colour mode, subsampling and, within 5, JPEG quality, whose other headers look equally
fake; the images of a pair are in neighbouring lines.

Hardware: CPU cores only; with 12,000 images, the classifier adds half a minute.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from config import Preset, Settings
from data.audit import report
from data.audit.duplicates import HASH_BITS, NEAR_BITS, Pair, exact_duplicates, near_duplicates
from data.audit.files import AuditedFile, audit_files
from data.audit.header_classifier import HeaderAudit, auc, audit_headers, header_matrix
from data.audit.matching import CALIPER, match_pairs
from data.index import Index, dataset_folder, used_images
from data.layouts import LABELS, read_data_set
from data.lists import check_output, name_of_root, render_table, write_csv
from data.preparation.report import report_left_out
from data.records import CLASSES, ImageRecord
from utils import UserError, locked_folder, run_command, write_json, write_text

MATCHED_PAIRS = 15  # least number to train a classifier on; with fewer it learns the opposite of the held-out fold
MATCH_COLUMNS = ("path", "label")
QUALITY_BAND = 5  # JPEG qualities 0 to 4 are matched with each other, 5 to 9 and so on

SETTINGS = (  # that are read
    "data_root", "results_root", "data_layout", "data_list", "max_image_pixels", "num_workers",
    "main_seed", "valid_size", "test_size", "final_valid_fraction", "group_by", "hold_out",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How duplicates are found and images matched."""

    match: Path | None = None  # a CSV to write: a subset matched between the classes
    # of --match: largest difference of a pair, in standard deviations of the score's logit
    caliper: Annotated[float, Field(ge=0, allow_inf_nan=False)] = CALIPER
    # largest difference of near duplicates, of 256 bits
    near_bits: Annotated[int, Field(ge=0, lt=HASH_BITS // 2)] = NEAR_BITS


def audit(preset: Preset, match: Path | None = None, caliper: float = CALIPER, near_bits: int = NEAR_BITS) -> None:
    """Audit the preset's data set; print and write the results. The arguments are those of `Options`.

    Raises UserError for too few images, a file to be written inside the data root, or no pairs to match.
    """
    settings = preset.settings
    layout = [settings.data_layout] * (settings.data_layout != "auto")
    folder = dataset_folder(preset) / "audit" / name_of_root(settings.data_root, settings.data_list, *layout)
    root, seed = settings.data_root, settings.main_seed
    for path in (folder, match):
        if path and path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path} is inside the data root {root}, which is never written to: choose another place")
    if match:
        check_output(match, MATCH_COLUMNS)
    files = used_images(read_data_set(settings.data_root, settings.data_layout), settings)
    with locked_folder(folder):
        found = audit_files(settings, files)
        parts = parts_of_splits(settings, files)
        report_left_out(folder, [(file.path, file.problem) for file in found])
        images = [file for file in found if not file.problem]
        if not images:
            raise UserError(f"no image of the {len(files)} under {root} can be decoded: fix them, or set --data-root")
        table = report.image_table(images, [part for file, part in zip(found, parts, strict=True) if not file.problem])
        labels = np.array([image.label for image in images])
        headers = audit_headers(header_matrix(table), labels, connected_groups(names_of(table), table["content"]), seed)
        table["fake_score"] = headers.fake_scores
        results = {"data_root": str(root.absolute()), "seed": seed, **_report_headers(folder, table, headers)}
        results |= _report_duplicates(folder, images, table[["path", "class", *parts[0]]], near_bits)
        write_json(folder / "audit.json", results)
        if match:
            results["matched"] = _match(match, table, headers.all.auc, caliper, seed)
            write_json(folder / "audit.json", results)
        print(f"\nTables and figures: {folder}")


def parts_of_splits(settings: Settings, files: Sequence[ImageRecord]) -> list[dict[str, str]]:
    """For each file its part of the two splits; if there are too few files, prints that, and gives none."""
    from data.splits import split_index  # here: torch takes seconds

    try:
        _, splits = split_index(Index(settings.data_root, tuple(files)), settings)
    except UserError as error:
        print(f"Splits are left out of the audit: {error}")
        return [{} for _ in files]
    parts = [{"split": "test", "final_split": "test"} for _ in files]
    for prefix, part in product(("", "final_"), ("train", "valid")):
        for row in getattr(splits, prefix + part):
            parts[row][f"{prefix}split"] = part
    return parts


def strata_of(table: pd.DataFrame) -> list[list[Hashable]]:
    """What images must share to be matched, from the strictest condition to the loosest, for `match_pairs`."""
    columns = table.assign(name=names_of(table), quality_band=table["jpeg_quality"] // QUALITY_BAND)
    columns = columns.fillna({"jpeg_quality": -1, "quality_band": -1})
    coding = ["format", "mode", "subsampling", "progressive"]
    strata = (["quality_band", "name"], ["jpeg_quality", "jpeg_ijg", "width", "height"], ["quality_band"])
    return [list(columns[[*coding, *shared]].itertuples(index=False, name=None)) for shared in strata]


def connected_groups(*keys: Sequence[Hashable]) -> np.ndarray:
    """A number for each image, equal for images that share one of the keys, directly or through other images."""
    first: dict[tuple[int, Hashable], int] = {}
    edges = [(row, first.setdefault((n, key), row)) for n, column in enumerate(keys) for row, key in enumerate(column)]
    images = len(keys[0])
    a, b = np.array(edges).T
    return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(images, images)))[1]


def names_of(table: pd.DataFrame) -> list[str]:
    """The paths without class folders and ending, which are equal for the two images of a pair."""
    return [
        "/".join(name for name in path.rpartition(".")[0].split("/") if name not in LABELS) for path in table["path"]
    ]


def _report_headers(folder: Path, table: pd.DataFrame, headers: HeaderAudit) -> dict[str, Any]:
    columns, rows = report.feature_table(table, headers)
    write_csv(folder / "audit.csv", list(table), table.astype(object).where(table.notna(), "").itertuples(index=False))
    write_csv(folder / "features.csv", columns, rows)
    write_text(folder / "features.md", render_table(columns, rows, markdown=True) + "\n")
    report.draw_headers(folder / "headers.png", table)
    report.draw_separation(folder / "giveaway.png", table, headers)
    shown = [row for row in rows if row[-1] or row[-2] != 0.5]  # importance, AUC alone
    if shown:
        print(f"\n{render_table(columns, shown)}")
    print(f"\nHeaders: of {len(table):,} images, {report.verdict(headers)}.")
    images = {name: int((table["class"] == name).sum()) for name in CLASSES}
    return {"images": images, **_scores(headers), "features": headers.features.to_dict("index")}


def _scores(headers: HeaderAudit) -> dict[str, Any]:
    scores = {"all_headers": asdict(headers.all), "without_file_size": asdict(headers.without_file_size)}
    return {"verdict": report.verdict(headers)} | scores


def _report_duplicates(
    folder: Path, images: Sequence[AuditedFile], table: pd.DataFrame, near_bits: int
) -> dict[str, Any]:
    exact = exact_duplicates([image.content for image in images])
    rows = sorted(set(range(len(images))) - {pair.other for pair in exact})
    hashes, thumbnails = (np.stack([getattr(images[row], name) for row in rows]) for name in ("hash", "thumbnail"))
    near, nearest = near_duplicates(hashes, thumbnails, near_bits)
    pairs = exact + [Pair(rows[pair.first], rows[pair.other], pair.bits) for pair in near]
    columns, lines, counts = report.duplicate_table(table, pairs)
    write_csv(folder / "duplicates.csv", columns, lines)
    report.draw_nearest(folder / "nearest.png", nearest, near_bits)
    for kind, numbers in counts.items():
        counted = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in numbers.items())
        print(f"{kind.capitalize()} duplicates: {counted}.")
    flat = int((nearest < 0).sum())
    if flat:
        print(f"Flat: {flat:,} images are too uniform to search for near duplicates.")
    return {"near_bits": near_bits, "duplicates": counts, "flat": flat}


def _match(path: Path, table: pd.DataFrame, auc_of_all: float, caliper: float, seed: int) -> dict[str, Any]:
    labels, fake_scores = table["class"].map(CLASSES.index).to_numpy(), table["fake_score"].to_numpy()
    pairs = match_pairs(strata_of(table), labels, fake_scores, caliper)
    if not len(pairs):
        raise UserError(
            f"none of the {(labels == 0).sum():,} fake images can be paired with a real one of the same format and "
            f"quality whose headers look equally fake: raise --caliper above {caliper:g}, or add images"
        )
    rows = pairs.ravel()
    matched, labels = table.iloc[rows], labels[rows]
    write_csv(path, MATCH_COLUMNS, zip(matched["path"], labels.tolist(), strict=True))
    print(f"\nMatched: {len(pairs):,} fake and {len(pairs):,} real images of {len(table):,}, listed in {path}")
    same = auc(labels, fake_scores[rows])
    print(f"The classifier trained on all images has AUC {same:.2f} on these, instead of {auc_of_all:.2f}.")
    results: dict[str, Any] = {"caliper": caliper, "pairs": len(pairs), "auc_of_the_same_classifier": same}
    groups = connected_groups(np.arange(len(rows)) // 2, names_of(matched))
    if len(np.unique(groups)) < MATCHED_PAIRS:
        print(f"They are too few to train another classifier on: that needs {MATCHED_PAIRS} pairs.")
        return results
    headers = audit_headers(header_matrix(table)[rows], labels, groups, seed)
    print(f"One trained on these alone: {report.verdict(headers)}.")
    return results | _scores(headers)


if __name__ == "__main__":
    run_command(__doc__, audit, settings=SETTINGS, options=Options)
