"""Is it fake? Predictions of a trained model for images of your own.

    python -m model_training.predict --weights results/paper/glass_vit/seed_100/model.safetensors PATH...

A PATH is a file, a folder (searched recursively), a pattern such as "photos/**/*.jpg", or LIST.csv:COLUMN. Prints and
writes to predictions.csv the calibrated probability of fake of each image, and a verdict (fake, real or inconclusive)
by thresholds fitted on validation images. Files that cannot be decoded are listed, and make the exit code 1. The same
image gets the same prediction on every run; --draws T draws its crops T times, to show how much the prediction depends
on them. --precision trained computes as the run's own test did; the default, fp32, is reproducible across devices.

--evidence DIR draws each image with its crops, the score of each alone and its effect on the score, and writes
DIR/index.html: all images on one page that needs no network, 0.15 MB an image (1,000 images: 150 MB). --evidence-map
slides crops over the whole image and maps both numbers: 0.25 MB an image, and minutes for a large one on the CPU.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from tqdm import tqdm

from config import Preset
from data.images import IMAGE_ENDINGS, UnreadableImage
from data.lists import check_output, render_table
from data.pictures import find_images
from model_training.inference.detector import SMALL, TRANSPARENT, Outcome, Prediction, PredictionOptions, load_detector
from model_training.inference.evidence import write_evidence
from utils import UserError, run_command, write_csv

COLUMNS = (
    "path", "probability_fake", "verdict", "standard_deviation", "flips", "raw_probability_fake", "width", "height",
    "note", "problem",
)  # fmt: skip
NOTES = {
    SMALL: "a side smaller than a crop, so that part of what the model sees is padding or enlarged",
    TRANSPARENT: "transparent parts, whose hidden colours count too",
}
SHOWN = 100  # rows on the terminal; the CSV has them all


@dataclass(frozen=True, kw_only=True)
class Options(PredictionOptions):
    """Which images and weights, what to write, and how to predict."""

    # a file, a folder (with all below it), a pattern such as "photos/**/*.jpg", or LIST.csv:COLUMN
    paths: tyro.conf.Positional[Annotated[tuple[str, ...], Field(min_length=1)]]
    weights: Path  # model.safetensors of a run
    output: Path = Path("predictions.csv")  # the CSV to write
    band: tuple[float, float] | None = None  # inconclusive from LOW up to HIGH, instead of the model's band
    evidence: Path | None = None  # a folder: pictures and a page that explain the predictions
    evidence_map: bool = False  # with effect maps of whole images; much slower


def predict(preset: Preset, weights: Path, paths: Sequence[str], **others: Any) -> None:
    """Predict all images that `paths` name; print and write the predictions. The arguments are fields of `Options`.

    Raises:
        UserError: no weights, no images, or invalid options.
        SystemExit: with code 1, after everything was written, if a file could not be decoded.
    """
    options = Options(weights=weights, paths=tuple(paths), **others)
    output, evidence, draws = options.output, options.evidence, options.draws
    check_output(output, COLUMNS)
    if options.evidence_map and not evidence:
        raise UserError("--evidence-map draws into the folder of --evidence DIR: name one")
    images, ignored = find_images(paths)
    if ignored:
        kinds = {
            "hidden" if name.lower().endswith(IMAGE_ENDINGS) else Path(name).suffix or "without an ending"
            for name in ignored
        }
        shown = ", ".join(sorted(kinds)[:5])
        print(f"Ignored, in folders: {len(ignored):,} files of other kinds ({shown}); name them to try them")
    detector = load_detector(weights, preset.settings.device, preset.settings.max_image_pixels, options)
    if options.band:
        real_below, fake_from = options.band
        if not 0 <= real_below <= fake_from <= 1:
            raise UserError(f"--band {real_below} {fake_from}: expected two probabilities, the smaller first")
        calibration = replace(detector.calibration, real_below=real_below, fake_from=fake_from)
        detector = replace(detector, calibration=calibration)
    if not detector.calibrated:
        print(f"{weights} has no calibration: probabilities are raw, and the threshold is 0.5", file=sys.stderr)
    if not detector.num_crops and draws > 1:
        raise UserError(f"--draws {draws}: {detector.name} looks at the whole image and draws no crops")
    predictions = detector.predict_all(images, preset.settings.num_workers)
    predictions = tqdm(predictions, total=len(images), desc="predicting", unit=" images", disable=None)
    if evidence:
        predictions = write_evidence(evidence, detector, images, predictions, options.evidence_map)
    found = dict(zip(images, predictions, strict=True))
    write_csv(output, COLUMNS, [_row(path, prediction) for path, prediction in found.items()])
    print(_summary(found, draws))
    for note, meaning in NOTES.items():
        noted = [_one_line(path) for path, one in found.items() if note in getattr(one, "note", "")]
        if noted:
            print(f"{len(noted):,} with {meaning}: {', '.join(noted[:3])}{', ...' if len(noted) > 3 else ''}")
    print(f"\nWritten: {output}{f' and {evidence}/index.html' if evidence else ''}")
    unreadable = {path: one for path, one in found.items() if isinstance(one, UnreadableImage)}
    if unreadable:
        print(f"\n{len(unreadable):,} of {len(found):,} files cannot be decoded:", file=sys.stderr)
        for path, reason in unreadable.items():
            print(f"  {_one_line(path)}: {reason}", file=sys.stderr)
        sys.exit(1)


def _row(path: str, found: Outcome) -> list[object]:
    if isinstance(found, UnreadableImage):
        return [path, *[""] * (len(COLUMNS) - 2), str(found)]
    values = [getattr(found, name) for name in COLUMNS[1:-1]]
    return [path, *("" if value != value else value for value in values), ""]


def _summary(found: Mapping[str, Outcome], draws: int) -> str:
    """The first predictions as a table for the terminal, and how many of each verdict there are."""
    columns = ["path", "P(fake)", "verdict", "± over draws", "flips"][: 5 if draws > 1 else 3]
    rows = []
    for path, one in list(found.items())[:SHOWN]:
        cells = ["", "not decoded", "", ""]
        if isinstance(one, Prediction):
            cells = [f"{one.probability_fake:.3f}", one.verdict, f"{one.standard_deviation:.3f}", f"{one.flips:.0%}"]
        rows.append([_one_line(path), *cells][: len(columns)])
    more = f"\n... and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    verdicts = [one.verdict for one in found.values() if isinstance(one, Prediction)]
    counts = ", ".join(f"{verdicts.count(name):,} {name}" for name in ("fake", "real", "inconclusive"))
    return f"{render_table(columns, rows)}{more}\n\n{len(verdicts):,} images: {counts}"


def _one_line(path: str) -> str:
    """A path as a terminal can show it: line ends, tabs and escape codes spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


if __name__ == "__main__":
    run_command(__doc__, predict, settings=("device", "max_image_pixels", "num_workers"), options=Options)
