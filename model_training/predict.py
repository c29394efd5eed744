"""Is it fake? Predictions of a trained model for images of your own.

    python -m model_training.predict --weights results/paper/glass_vit/seed_100/model.safetensors PATH...

A PATH is a file, a folder (searched recursively), a pattern such as "photos/**/*.jpg", or LIST.csv:COLUMN. Prints and
writes to predictions.csv the calibrated probability of fake of each image, and a verdict (fake, real or inconclusive)
by thresholds fitted on validation images. Files that get no prediction are listed, and make the exit code 1. The same
image gets the same prediction on every run. --precision trained computes as the run's own test did; the default, fp32,
is reproducible across devices. After an interruption, the same command resumes from the CSV: it keeps rows of the same
image, model, options and version.

--draws T draws the crops T times, to show how much the prediction depends on them: the probability is the mean over the
draws, ± their standard deviation, and flips is the share of the draws whose own verdict is not that of the mean. If
that is half of them or more, the verdict is inconclusive. Both are empty for an image as small as a crop.

--evidence DIR draws each image with its crops, the score of each alone and its effect on the score, and writes
DIR/index.html: all images on one page that needs no network, 0.15 MB an image (1,000 images: 150 MB). --evidence-map
slides crops over the whole image and maps both numbers: 0.25 MB an image, and minutes for a large one on the CPU. With
evidence, every image is predicted again.

Hardware: a CUDA GPU if there is one, else the CPU. Measured: docs/performance.md.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from tqdm import tqdm

from config import Preset, must_be
from data.images import IMAGE_ENDINGS, TRANSPARENT, TURNED, UnreadableImage
from data.lists import check_output, read_csv, render_table, write_csv
from data.pictures import find_images
from model_training.inference.detector import SMALL, UNLIKE, Outcome, PredictionOptions, load_detector
from model_training.inference.evidence import write_evidence
from models.weights import weights_file
from utils import UserError, one_line, reading, run_command, sha256_of, stat_of

COLUMNS = (
    "path", "probability_fake", "verdict", "standard_deviation", "flips", "raw_probability_fake", "width", "height",
    "note", "problem", "key",
)  # fmt: skip
NOTES = {
    SMALL: "a side smaller than a crop, so that part of what the model sees is padding or enlarged",
    TRANSPARENT: "transparent parts, whose hidden colours count too",
    TURNED: "an EXIF orientation, which is ignored, as in the paper: they are seen as they are stored",
    UNLIKE: "a format or size that none of its training images has, so that its verdict means little",
}
BAND = must_be(lambda band: band is None or 0 <= band[0] <= band[1] <= 1, "two probabilities, the smaller first")
TWO_NUMBERS = tyro.constructors.PrimitiveConstructorSpec(  # or a path after them would be read as a third
    nargs=2,
    metavar="LOW HIGH",
    instance_from_str=lambda texts: tuple(map(float, texts)),
    is_instance=lambda band: band is None or len(band) == 2,
    str_from_instance=lambda band: list(map(str, band or ["None"])),
)
SHOWN = 100  # rows on the terminal; the CSV has them all
SAVE_EVERY, SAVE_SHARE = 1.0, 0.05  # seconds between two writes of the CSV; its largest share of the time
PredictionRow = dict[str, str]  # by COLUMNS


@dataclass(frozen=True, kw_only=True)
class Options(PredictionOptions):
    """Which images and weights, what to write, and how to predict."""

    # a file, a folder (with all below it), a pattern such as "photos/**/*.jpg", or LIST.csv:COLUMN
    paths: tyro.conf.Positional[Annotated[tuple[str, ...], Field(min_length=1)]]
    weights: Path  # model.safetensors of a run, or hf:OWNER/NAME of the Hugging Face hub
    output: Path = Path("predictions.csv")  # the CSV to write
    # inconclusive from LOW up to HIGH, instead of the model's band
    band: Annotated[tuple[float, float] | None, TWO_NUMBERS, BAND] = None
    evidence: Path | None = None  # a folder: pictures and a page that explain the predictions
    evidence_map: bool = False  # with effect maps of whole images; much slower


def predict(preset: Preset, weights: Path, paths: Sequence[str], **others: Any) -> None:
    """Predict all images that `paths` name; print and write the predictions. The arguments are the fields of `Options`.

    Raises:
        UserError: no weights, no images, or invalid options.
        SystemExit: with code 1, after everything was written, if a file gets no prediction.
    """
    weights = weights_file(weights)
    options = Options(weights=weights, paths=tuple(paths), **others)
    output, evidence, draws = options.output, options.evidence, options.draws
    check_output(output, COLUMNS)
    if options.evidence_map and not evidence:
        raise UserError("--evidence-map needs --evidence DIR, the folder that it draws into")
    images, ignored = find_images(paths)
    if ignored:
        kinds = {
            "hidden" if name.lower().endswith(IMAGE_ENDINGS) else Path(name).suffix or "without an ending"
            for name in ignored
        }
        shown = ", ".join(sorted(kinds)[:5])
        print(f"Ignored, in folders: {len(ignored):,} files of other kinds ({shown}); name them to try them")
    detector = load_detector(weights, preset.settings.device, preset.settings.max_image_pixels, options)
    if not detector.num_crops and (draws > 1 or options.crops):
        options_given = f"--draws {draws}" if draws > 1 else " and ".join(options.crops)
        raise UserError(f"{options_given}: {detector.name} looks at the whole image and draws no crops")
    if draws > 1 and not detector.draws_differ:
        sampler = detector.experiment.crop_sampler
        raise UserError(f"--draws {draws}: {detector.name} has the same crops in every draw, by its sampler {sampler}")
    if options.band:
        calibration = replace(detector.calibration, real_below=options.band[0], fake_from=options.band[1])
        detector = replace(detector, calibration=calibration)
    if not detector.calibrated:
        threshold = "" if options.band else ", and the threshold is 0.5"
        print(f"{weights} has no calibration: probabilities are raw{threshold}", file=sys.stderr)
    elif detector.calibration.is_rough:
        few = f"{detector.calibration.fake_images} fake and {detector.calibration.real_images} real validation images"
        print(f"{weights} was calibrated on {few}, which are few: its thresholds are rough", file=sys.stderr)
    if detector.calibrated and detector.other_crops:
        print(f"{weights} was calibrated with other crops than {detector.other_crops}", file=sys.stderr)
    choices = [options.band, options.batch_size, options.chunk_size, preset.settings.max_image_pixels]
    keys = _hash_inputs(images, [sha256_of(weights), *choices, *detector.depends_on()])
    rows = {} if evidence else {row["path"]: row for row in _read(output) if row["key"] == keys.get(row["path"])}
    if rows:
        print(f"{len(rows):,} of the predictions are in {output} and are kept: delete it to start over")
    missing = [path for path in images if path not in rows]
    predictions = detector.predict_all(missing, preset.settings.num_workers)
    predictions = tqdm(predictions, total=len(missing), desc="predicting", unit=" images", disable=None)
    predictions = _save(predictions, missing, keys, rows, output)
    try:
        if evidence:
            write_evidence(evidence, detector, images, predictions, options.evidence_map)
        for _ in predictions:
            pass
    except KeyboardInterrupt:
        again = ", but --evidence starts over" if evidence else ""
        print(f"{len(rows):,} of {len(images):,} predictions are in {output}{again}", file=sys.stderr)
        raise
    finally:
        rows = {path: rows[path] for path in images if path in rows}
        if rows:
            _write(output, rows)
    print(_summary(rows, draws))
    print(f"\n{detector.name}: {one_line(detector.provenance.sentence)}")
    for note, meaning in NOTES.items():
        noted = [one_line(path) for path, row in rows.items() if note in row["note"]]
        if noted:
            print(f"{len(noted):,} with {meaning}: {', '.join(noted[:3])}{', ...' if len(noted) > 3 else ''}")
    print(f"\nWritten: {output}{f' and {evidence}/index.html' if evidence else ''}")
    left_out = {path: row["problem"] for path, row in rows.items() if row["problem"]}
    if left_out:
        print(f"\n{len(left_out):,} of {len(rows):,} files are left out:", file=sys.stderr)
        for path, reason in left_out.items():
            print(f"  {one_line(path)}: {reason}", file=sys.stderr)
        sys.exit(1)


def _hash_inputs(images: Sequence[str], others: Sequence[object]) -> dict[str, str]:
    """Image -> a hash of what its prediction depends on: the file's path, size and modification time, and `others`."""
    common, keys = json.dumps(others), {}
    for path in images:
        state = stat_of(Path(path))
        text = f"{common}{os.path.abspath(path)} {state and (state.st_size, state.st_mtime_ns)}"
        keys[path] = hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
    return keys


def _read(output: Path) -> list[PredictionRow]:
    """The predictions in `output`, if it exists; without files that got none, which are tried again."""
    if not output.exists():
        return []
    with reading(output, "delete it"):
        return [row for row in read_csv(output) if not row["problem"]]


def _save(
    predictions: Iterator[Outcome],
    paths: Sequence[str],
    keys: Mapping[str, str],
    rows: dict[str, PredictionRow],
    output: Path,
) -> Iterator[Outcome]:
    """Yield the predictions of `paths` as they come, and add them to `rows`, which are saved every few seconds."""
    due = time.monotonic() + SAVE_EVERY
    for path, found in zip(paths, predictions, strict=True):
        rows[path] = {"path": path, **_cells(found), "key": keys[path]}
        if (start := time.monotonic()) > due:
            _write(output, rows)
            due = time.monotonic() + max(SAVE_EVERY, (time.monotonic() - start) / SAVE_SHARE)
        yield found


def _write(output: Path, rows: Mapping[str, PredictionRow]) -> None:
    write_csv(output, COLUMNS, (row.values() for row in rows.values()))


def _cells(found: Outcome) -> PredictionRow:
    """The columns between path and key; NaN is empty."""
    if isinstance(found, UnreadableImage):
        return dict.fromkeys(COLUMNS[1:-2], "") | {"problem": str(found)}
    values = {name: getattr(found, name) for name in COLUMNS[1:-2]}
    return {name: "" if value != value else str(value) for name, value in values.items()} | {"problem": ""}


def _summary(rows: Mapping[str, PredictionRow], draws: int) -> str:
    """The first predictions as a table for the terminal, and the number of each verdict."""
    columns = ["path", "P(fake)", "verdict", "± over draws", "flips"][: 5 if draws > 1 else 3]
    forms = {"probability_fake": ".3f", "verdict": "", "standard_deviation": ".3f", "flips": ".0%"}
    table = []
    for path, row in list(rows.items())[:SHOWN]:
        cells = [format(float(row[name]), form) if form and row[name] else row[name] for name, form in forms.items()]
        table.append([one_line(path), *(("", "left out", "", "") if row["problem"] else cells)][: len(columns)])
    more = f"\n... and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    verdicts = [row["verdict"] for row in rows.values() if row["verdict"]]
    counts = ", ".join(f"{verdicts.count(name):,} {name}" for name in ("fake", "real", "inconclusive"))
    return f"{render_table(columns, table)}{more}\n\n{len(verdicts):,} image{'s' * (len(verdicts) != 1)}: {counts}"


if __name__ == "__main__":
    run_command(__doc__, predict, settings=("device", "max_image_pixels", "num_workers"), options=Options)
