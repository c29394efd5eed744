"""Is it fake? The answer of a trained model for your own images.

    python -m model_training.predict --weights results/paper/glass_vit/seed_100/model.safetensors PATH...

A PATH is a file, a folder (with all below it), a pattern such as "photos/**/*.jpg", or LIST.csv:COLUMN. Prints a row
an image and writes predictions.csv: the calibrated probability of fake, and what to make of it: fake, real or
inconclusive, by thresholds that were fitted on validation images when the model was trained. Files that give no image
are named, and make the exit code 1. The same picture gets the same answer on every run; --draws T draws its crops T
times, to show how much the answer depends on where they fall.

--evidence DIR draws each image with its crops, what each says alone and what it does to the score, and writes
DIR/index.html: all images on one page that needs no network, 0.15 MB an image (1,000 images: 150 MB). --evidence-map
slides crops over the whole image and maps both numbers: 0.25 MB an image, and minutes for a large one on the CPU.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from config import Preset
from data.images import UnreadableImage
from data.pictures import find_images, other_files
from model_training.detector import BATCH_SIZE, CHUNK_SIZE, Detector, Prediction, load_detector
from model_training.evidence import write_evidence
from utils import UserError, check_output, run_door, settings_without, write_csv

COLUMNS = (
    "path", "probability_fake", "verdict", "standard_deviation", "flips", "raw_probability_fake", "width", "height",
    "problem",
)  # fmt: skip
SHOWN = 100  # rows on the terminal; the CSV has them all
Answers = dict[str, Prediction | UnreadableImage]


def predict(
    preset: Preset,
    weights: Path,
    paths: Sequence[str],
    output: Path,
    draws: int = 1,
    band: Sequence[float] | None = None,
    precision: str = "fp32",
    batch_size: int = BATCH_SIZE,
    chunk_size: int = CHUNK_SIZE,
    evidence: Path | None = None,
    evidence_map: bool = False,
) -> None:
    """Predict all images that `paths` name; print and write the answers.

    Args:
        output: the CSV file.
        draws: T, how many times the crops of an image are drawn.
        band: calibrated probabilities between which the verdict is inconclusive, instead of the model's.
        evidence: a folder for pictures of what the answers rest on; see `write_evidence`.
        evidence_map: with a map of effects each.

    Raises:
        UserError: no weights, no images, or arguments that mean nothing.
        SystemExit: with code 1 after all was written, if a file gave no image.
    """
    if draws < 1:
        raise UserError(f"--draws {draws}: it must be at least 1")
    check_output(output, COLUMNS)
    if evidence_map and not evidence:
        raise UserError("--evidence-map draws into the folder of --evidence DIR: name one")
    settings, images = preset.settings, find_images(paths)
    passed_over = other_files(paths)
    if passed_over:
        endings = ", ".join(sorted({Path(name).suffix or "without an ending" for name in passed_over})[:5])
        print(f"Left out, in folders: {len(passed_over):,} files of other kinds ({endings}); name them to try them")
    detector = load_detector(weights, settings.device, precision, settings.max_image_pixels, batch_size, chunk_size)
    if band:
        detector = with_band(detector, *band)
    if not detector.calibrated:
        print(f"{weights} has no calibration: probabilities are raw, and 0.5 decides", file=sys.stderr)
    if not detector.num_crops and draws > 1:
        raise UserError(f"--draws {draws}: {detector.name} looks at the whole image and draws no crops")
    workers = None if settings.num_workers == "auto" else settings.num_workers
    answers = detector.predict_all(images, draws, workers)
    if evidence:
        answers = write_evidence(evidence, detector, images, answers, evidence_map)
    progress = tqdm(answers, total=len(images), desc="predicting", unit=" images", disable=None)
    found: Answers = dict(zip(images, progress, strict=True))
    write_csv(output, COLUMNS, [_row(path, answer) for path, answer in found.items()])
    print(render(found, draws))
    print(f"\nWritten: {output}{f' and {evidence}/index.html' if evidence else ''}")
    report_unreadable(found)


def with_band(detector: Detector, real_below: float, fake_from: float) -> Detector:
    """The detector with another band of inconclusive probabilities.

    Raises:
        UserError: no such band.
    """
    if not 0 <= real_below <= fake_from <= 1:
        raise UserError(f"--band {real_below} {fake_from}: expected two probabilities, the smaller first")
    return replace(detector, calibration=replace(detector.calibration, real_below=real_below, fake_from=fake_from))


def _row(path: str, answer: Prediction | UnreadableImage) -> list[object]:
    if isinstance(answer, UnreadableImage):
        return [path, "", "", "", "", "", "", "", str(answer)]
    values = [getattr(answer, name) for name in COLUMNS[1:-1]]
    return [path, *("" if value != value else value for value in values), ""]


def render(found: Answers, draws: int) -> str:
    """The answers as a table for the terminal."""
    names = ["path", "P(fake)", "verdict", *(["± over draws", "flips"] if draws > 1 else [])]
    rows = [names]
    for path, answer in list(found.items())[:SHOWN]:
        if isinstance(answer, UnreadableImage):
            rows.append([one_line(path), "", "no image", *([""] * (len(names) - 3))])
            continue
        rows.append([one_line(path), f"{answer.probability_fake:.3f}", answer.verdict])
        if draws > 1:
            rows[-1] += [f"{answer.standard_deviation:.3f}", f"{answer.flips:.0%}"]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(found) > SHOWN:
        lines.append(f"... and {len(found) - SHOWN:,} more")
    verdicts = [answer.verdict for answer in found.values() if isinstance(answer, Prediction)]
    counts = ", ".join(f"{verdicts.count(name):,} {name}" for name in ("fake", "real", "inconclusive"))
    return "\n".join([*lines, "", f"{len(verdicts):,} images: {counts}"])


def report_unreadable(found: Answers) -> None:
    """Name what gave no image, and leave with exit code 1 if anything did not."""
    unreadable = {path: answer for path, answer in found.items() if isinstance(answer, UnreadableImage)}
    if unreadable:
        print(f"\n{len(unreadable):,} of {len(found):,} files gave no image:", file=sys.stderr)
        for path, reason in unreadable.items():
            print(f"  {one_line(path)}: {reason}", file=sys.stderr)
        sys.exit(1)


def one_line(path: str) -> str:
    """A path as a terminal can show it: line ends, tabs and escape codes spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """How a model computes, for all doors that predict."""
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="on CUDA; default fp32")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images together; default {BATCH_SIZE}")
    parser.add_argument("--chunk-size", type=int, default=CHUNK_SIZE, help=f"views at a time; default {CHUNK_SIZE}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file, folder, pattern, or LIST.csv:COLUMN")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="model.safetensors of a run")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="the CSV to write")
    parser.add_argument("--draws", type=int, default=1, metavar="T", help="draw each image's crops T times; default 1")
    parser.add_argument(
        "--band",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="inconclusive from LOW up to HIGH; default the model's",
    )
    parser.add_argument("--evidence", type=Path, metavar="DIR", help="pictures and a page of what the answers rest on")
    parser.add_argument("--evidence-map", action="store_true", help="with maps of the whole images; takes far longer")
    add_weights(parser)


if __name__ == "__main__":
    run_door(
        __doc__,
        predict,
        without=settings_without("device", "max_image_pixels", "num_workers"),
        arguments=_add_arguments,
        usage="--weights FILE PATH... [--OPTION VALUE ...]",
    )
