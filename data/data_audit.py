"""Can the class be read without looking at the picture? And which pictures are there twice?

    python -m data.data_audit [--preset demo] [--data-root DIR] [--num-workers N]
    python -m data.data_audit --data-root DIR --match OUT.csv     and list a subset whose headers tell less
    python -m data.data_audit --data-root DIR --data-list OUT.csv of the listed files only

Reads DATA_ROOT/{fake,real} and never writes there; needs no preprocessing. Prints a verdict: the cross-validated AUC
of a classifier that sees headers only (format, size, compression, metadata), and what gives the class away. Names
exact and near duplicates, across the classes and across the parts of the preset's splits. Writes into
results/<preset>/dataset/audit: audit.json, audit.csv (one row a file), features.csv and .md, duplicates.csv,
unreadable.csv, and the figures headers.png, giveaway.png and nearest.png.

--match pairs fake images with real ones of the same format, colour mode, subsampling and, within 5, JPEG quality,
whose sizes and other headers look equally fake, and lists as many as it can, a pair in two neighbouring lines.

Hardware: CPU cores only. Each image is decoded as coarsely as its format allows; with 12,000 images, the
classifier adds half a minute.
"""

import argparse
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import roc_auc_score

from config import Preset
from data.audit_files import AuditedFile, audit_files
from data.audit_report import (
    Splits,
    count_duplicates,
    draw_giveaway,
    draw_headers,
    draw_nearest,
    feature_table,
    verdict,
    write_audit_csv,
    write_duplicates_csv,
)
from data.checks import File
from data.duplicates import HASH_BITS, NEAR_BITS, Pair, exact_duplicates, near_duplicates
from data.header_classifier import HeaderAudit, audit_headers, header_matrix
from data.headers import Header
from data.index import CLASSES, ImageRecord, Index, list_images, read_list
from data.matching import CALIPER, match_pairs
from data.report import render_table, report_left_out
from utils import UserError, check_output, dataset_folder, run_door, sole_process, write_csv, write_json, write_text

MATCHED_PAIRS = 15  # to train a classifier on; of fewer it learns the opposite of what it is tested on
MATCH_COLUMNS = ("path", "label")
QUALITY_BAND = 5  # JPEG qualities that are matched with each other: 0 to 4, 5 to 9 and so on


def audit(
    preset: Preset,
    match: Path | None = None,
    caliper: float = CALIPER,
    near_bits: int = NEAR_BITS,
) -> None:
    """Audit the preset's data set; print and write what was found.

    Args:
        match: CSV to write, of a subset matched between the classes.
        caliper: largest difference of a matched pair, in standard deviations.
        near_bits: largest difference of near duplicates, in bits of 256.

    Raises:
        UserError: too few images, a file to be written inside the data root, or nothing that can be matched.
    """
    root, folder = preset.settings.data_root, dataset_folder(preset) / "audit"
    for path in (folder, *([match] if match else [])):
        if path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path} is inside the data root {root}, which is never written to: choose another place")
    if not 0 <= near_bits < HASH_BITS // 2:
        raise UserError(f"--near-bits {near_bits}: expected 0 to {HASH_BITS // 2 - 1}, of {HASH_BITS}")
    if match:
        check_output(match, MATCH_COLUMNS)
    if caliper < 0:
        raise UserError(f"--caliper {caliper}: it must be at least 0")
    files = list_images(root)
    if preset.settings.data_list:
        wanted = read_list(preset.settings.data_list, root, [name for name, _ in files])
        files = [file for file in files if file[0] in wanted]
    with sole_process(folder):
        _audit(preset, files, folder, near_bits, match, caliper)


def _audit(
    preset: Preset, files: Sequence[File], folder: Path, near_bits: int, match: Path | None, caliper: float
) -> None:
    found = audit_files(preset, files)
    rows = [row for row, file in enumerate(found) if isinstance(file, AuditedFile)]
    readable = [found[row] for row in rows]
    labels = np.array([file.label for file in readable])
    splits = {name: [parts[row] for row in rows] for name, parts in splits_of(preset, files).items()}
    report_left_out(folder, found, passed_over=[])
    seed = preset.settings.main_seed
    matrix = header_matrix([file.header for file in readable])
    names = [_name(file.path) for file in readable]
    headers = audit_headers(matrix, labels, groups_of(names, [file.content for file in readable]), seed)
    facts = {"data_root": str(preset.settings.data_root.absolute()), "seed": seed}
    facts |= _report_headers(folder, readable, labels, splits, headers)
    facts |= _report_duplicates(folder, readable, splits, near_bits)
    write_json(folder / "audit.json", facts)
    if match:
        facts |= _match(match, readable, labels, matrix, headers, caliper, seed)
        write_json(folder / "audit.json", facts)
    print(f"\nTables and figures: {folder}")


def splits_of(preset: Preset, files: Sequence[File]) -> Splits:
    """The part of the preset's two splits that each file is in; says so and gives none if there are too few files."""
    from data.datasets import split_index  # here: torch takes seconds

    records = tuple(ImageRecord(name, label, 0, "", "", "", 0, 0, "") for name, label in files)
    try:
        _, splits = split_index(Index(preset.settings.data_root, records), preset.settings)
    except UserError as error:
        print(f"Splits are left out of the audit: {error}")
        return {}
    parts = {
        "split": {"train": splits.train, "valid": splits.valid, "test": splits.test},
        "final_split": {"train": splits.final_train, "valid": splits.final_valid, "test": splits.test},
    }
    return {
        kind: [part for _, part in sorted((row, part) for part, rows in of_kind.items() for row in rows)]
        for kind, of_kind in parts.items()
    }


def strata_of(headers: Sequence[Header], names: Sequence[str]) -> list[list[Hashable]]:
    """What images must share to be matched, from the closest likeness to the loosest, for `match_pairs`."""
    coding = [(h.format, h.mode, h.subsampling, h.progressive) for h in headers]
    exact = [
        (*kind, str(h.jpeg_quality), h.jpeg_ijg, h.width, h.height) for kind, h in zip(coding, headers, strict=True)
    ]
    loose = [(*kind, str(h.jpeg_quality // QUALITY_BAND)) for kind, h in zip(coding, headers, strict=True)]
    return [[(*kind, name) for kind, name in zip(loose, names, strict=True)], exact, loose]


def groups_of(*keys: Sequence[Hashable]) -> np.ndarray:
    """A number for each image, the same for images that share any of the keys, directly or by others in between."""
    first: dict[tuple[int, Hashable], int] = {}
    edges = [(row, first.setdefault((kind, key), row)) for kind, of in enumerate(keys) for row, key in enumerate(of)]
    images = len(keys[0])
    a, b = np.array(edges).T
    return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(images, images)))[1]


def _name(path: str) -> str:
    """A path without its class and its ending, which the two images of a pair have in common."""
    return path.partition("/")[2].rpartition(".")[0]


def _report_headers(
    folder: Path, files: Sequence[AuditedFile], labels: np.ndarray, splits: Splits, headers: HeaderAudit
) -> dict[str, Any]:
    columns, rows = feature_table(files, headers)
    write_audit_csv(folder / "audit.csv", files, splits, headers.fake_scores)
    write_csv(folder / "features.csv", columns, rows)
    write_text(folder / "features.md", render_table(columns, rows, markdown=True) + "\n")
    draw_headers(folder / "headers.png", files)
    draw_giveaway(folder / "giveaway.png", labels, headers)
    telling = [
        row
        for row, feature in zip(rows, headers.features, strict=True)
        if feature.importance or feature.auc_alone != 0.5
    ]
    if telling:
        print(f"\n{render_table(columns, telling)}")
    print(f"\nHeaders: of {len(files):,} images, {verdict(headers)}.")
    return {
        "images": {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)},
        **_facts(headers),
        "features": {f.name: {"auc_alone": f.auc_alone, "importance": f.importance} for f in headers.features},
    }


def _facts(headers: HeaderAudit) -> dict[str, Any]:
    scores = {"all_headers": headers.all, "without_file_size": headers.without_file_size}
    return {"verdict": verdict(headers)} | {name: asdict(score) for name, score in scores.items()}


def _report_duplicates(folder: Path, files: Sequence[AuditedFile], splits: Splits, near_bits: int) -> dict[str, Any]:
    exact = exact_duplicates([file.content for file in files])
    copies = {pair.other for pair in exact}
    rows = [row for row in range(len(files)) if row not in copies]
    hashes, thumbnails = (np.stack([getattr(files[row], name) for row in rows]) for name in ("hash", "thumbnail"))
    near, nearest = near_duplicates(hashes, thumbnails, near_bits)
    pairs = exact + [Pair(rows[pair.first], rows[pair.other], pair.bits) for pair in near]
    counts = count_duplicates(files, splits, pairs)
    write_duplicates_csv(folder / "duplicates.csv", files, splits, pairs)
    draw_nearest(folder / "nearest.png", nearest, near_bits)
    for kind, of_kind in counts.items():
        counted = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in of_kind.items())
        print(f"{kind.capitalize()} duplicates: {counted}.")
    flat = int((nearest < 0).sum())
    if flat:
        print(f"Flat: {flat:,} images are too uniform to look for near duplicates of.")
    return {"near_bits": near_bits, "duplicates": counts, "flat": flat}


def _match(
    path: Path,
    files: Sequence[AuditedFile],
    labels: np.ndarray,
    matrix: np.ndarray,
    headers: HeaderAudit,
    caliper: float,
    seed: int,
) -> dict[str, Any]:
    names = [_name(file.path) for file in files]
    headers_of = [file.header for file in files]
    pairs = match_pairs(strata_of(headers_of, names), labels, headers.fake_scores, caliper)
    if not len(pairs):
        raise UserError(
            f"no fake image of {len(files):,} has a real one of its format and quality whose headers look as fake: "
            f"raise --caliper above {caliper:g}, or add images"
        )
    rows = pairs.ravel()
    write_csv(path, MATCH_COLUMNS, [[files[row].path, files[row].label] for row in rows])
    print(f"\nMatched: {len(pairs):,} fake and {len(pairs):,} real images of {len(files):,}, listed in {path}")
    auc = float(roc_auc_score(labels[rows] == 0, headers.fake_scores[rows]))
    print(f"The classifier trained on all has AUC {auc:.2f} on these, instead of {headers.all.auc:.2f}.")
    facts: dict[str, Any] = {"caliper": caliper, "pairs": len(pairs), "auc_of_the_same_classifier": auc}
    groups = groups_of(np.arange(len(rows)) // 2, [names[row] for row in rows])
    if len(np.unique(groups)) >= MATCHED_PAIRS:
        matched = audit_headers(matrix[rows], labels[rows], groups, seed)
        print(f"One trained on these alone: {verdict(matched)}.")
        facts |= _facts(matched)
    else:
        print(f"They are too few to train another on: that takes {MATCHED_PAIRS} pairs.")
    return {"matched": facts}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--match", type=Path, metavar="OUT.csv", help="list a subset matched between the classes")
    parser.add_argument(
        "--caliper",
        type=float,
        default=CALIPER,
        metavar="NUMBER",
        help=f"of --match: largest difference of a pair, in standard deviations of the score's logit; {CALIPER:g}",
    )
    parser.add_argument(
        "--near-bits",
        type=int,
        default=NEAR_BITS,
        metavar="INTEGER",
        help=f"largest difference of near duplicates, of {HASH_BITS} bits; {NEAR_BITS}",
    )


if __name__ == "__main__":
    run_door(__doc__, audit, arguments=_add_arguments)
