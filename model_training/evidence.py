"""Predictions with what they rest on: a folder of pictures, and one page that shows them all and needs no network."""

import base64
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from data.images import UnreadableImage
from data.pictures import Picture, read_pictures
from model_training.detector import Detector, Prediction
from model_training.effect_map import effect_map
from model_training.evidence_pictures import draw_evidence, draw_map
from model_training.tables import show
from utils import UserError, replacing, sole_process, write_text

TEMPLATE, ROWS = Path(__file__).with_name("evidence.html"), "<!-- rows -->"
MARKER = ".evidence"  # in a folder that this module made
THUMBNAIL = (192, 128)  # shown at half its size
FILE_QUALITY = {"quality": 92, "subsampling": "4:4:4"}  # of a file; single pixels of crops can still be told apart
PAGE_QUALITY = {"quality": 70}  # of the same picture in the page


def write_evidence(
    folder: Path,
    detector: Detector,
    paths: Sequence[str],
    answers: Iterable[Prediction | UnreadableImage],
    with_map: bool = False,
) -> Iterator[Prediction | UnreadableImage]:
    """Give the answers on, each when its pictures are in `folder`; index.html is there when they have all been taken.

    Each image is decoded once more, so that no more than a few are in memory, however many there are.

    Args:
        folder: new, empty, or of an earlier call, whose pictures are removed.
        paths: of the answers.
        with_map: an effect map of each image too.

    Raises:
        UserError: a folder that holds something else, or a map of a model without crops.
    """
    if with_map and not detector.num_crops:
        raise UserError(f"--evidence-map: {detector.name} looks at the whole image and has no crops to map")
    _check_folder(folder, paths)
    settings, unreadable = detector.settings, {}
    pictures = read_pictures(paths, settings.max_image_pixels, workers=1, reencode_jpeg=settings.reencode_jpeg)
    before, after = TEMPLATE.read_text(encoding="utf-8").split(ROWS)
    with sole_process(folder), replacing(folder / "index.html") as temporary:
        _begin(folder)
        with open(temporary, "w", encoding="utf-8") as page:
            page.write(_filled(before, **_about(detector)))
            for number, (path, answer, picture) in enumerate(zip(paths, answers, pictures, strict=True), 1):
                reason = _problem(answer, picture)
                if reason:
                    unreadable[path] = reason
                else:
                    page.write(_image_rows(folder, number, path, answer, picture, detector if with_map else None))
                yield answer
            page.write(_filled(after, unreadable=_unreadable(unreadable)))


def _check_folder(folder: Path, paths: Sequence[str]) -> None:
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--evidence {folder}: it holds something else; name a folder that is new or empty")
    inside = next((path for path in paths if folder.resolve() in Path(path).resolve().parents), None)
    if inside:
        raise UserError(f"--evidence {folder}: {inside} is an image in it; name another folder")


def _problem(answer: Prediction | UnreadableImage, picture: Picture | UnreadableImage) -> str | None:
    for result in (answer, picture):
        if isinstance(result, UnreadableImage):
            return str(result)
    changed = picture.image.size != (answer.width, answer.height)
    return "it changed between two looks at it" if changed else None


def _begin(folder: Path) -> None:
    write_text(folder / MARKER, "")
    for picture in folder.glob("[0-9][0-9][0-9][0-9]*_*.jpg"):  # of an earlier run
        picture.unlink()


# -------------------------------------------------------------------------------------------------------- page
def _filled(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def _image_rows(
    folder: Path, number: int, path: str, answer: Prediction, picture: Picture, mapping: Detector | None
) -> str:
    """Write an image's pictures, and give its part of the table: a row to see and a row to open."""
    harmless = re.sub(r"[^\w.-]+", "_", Path(path).stem)
    stem = f"{number:04d}_{harmless[:40]}"  # 160 bytes at most, as file systems count
    drawn = {f"{stem}.jpg": draw_evidence(picture, answer)}
    if mapping:
        drawn[f"{stem}_map.jpg"] = draw_map(picture, effect_map(mapping, picture))
    for name, image in drawn.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(_jpeg(image, **FILE_QUALITY))
    evidence = "".join(
        f'<a href="{quote(name)}"><img loading="lazy" alt="{kind}" src="{_embedded(image)}"></a>'
        for (name, image), kind in zip(drawn.items(), ("evidence", "map of effects"), strict=False)
    )
    thumbnail = picture.image.copy() if max(picture.image.size) < 1024 else picture.image.reduce(4)
    thumbnail.thumbnail(THUMBNAIL)
    cells = [
        f'<td><button aria-expanded="false" aria-label="evidence"><img alt="" src="{_embedded(thumbnail)}"></button>',
        _cell(_printable(path), f"<bdi>{escape(_printable(path))}</bdi>"),
        _number(answer.probability_fake, ".3f"),
        _cell(answer.verdict, f'<span class="verdict {answer.verdict}">{answer.verdict}</span>'),
        _number(answer.standard_deviation, ".3f"),
        _number(answer.scores.values.mean(), "+.2f"),
    ]
    return (
        f'<tbody data-verdict="{answer.verdict}"><tr class="image">{"".join(cells)}\n'
        f'<tr class="evidence" hidden><td colspan="{len(cells)}">{evidence}</tbody>\n'
    )


def _cell(value: str, shown: str, kind: str = "") -> str:
    """A cell that sorts by `value`."""
    return f'<td{kind} data-value="{escape(value)}">{shown}'


def _number(value: float, form: str) -> str:
    return _cell("" if value != value else repr(float(value)), show(value, form), ' class="number"')


def _embedded(image: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(image, **PAGE_QUALITY)).decode()}"


def _jpeg(image: Image.Image, **options: int | str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _printable(path: str) -> str:
    """The path with a question mark in a box for what is no UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _about(detector: Detector) -> dict[str, str]:
    """What the page says of the model."""
    low, high = detector.calibration.real_below, detector.calibration.fake_from
    return {
        "model": escape(detector.name),
        "family": "glass" if detector.num_crops else "standard",
        "probability": "calibrated probability" if detector.calibrated else "probability, not calibrated,",
        "band": f"real below {low:.3f}, fake from {high:.3f}" + (", inconclusive between" if low < high else ""),
        "num_crops": str(detector.num_crops),
        "patch_size": str(detector.settings.patch_size),
    }


def _unreadable(reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    items = "\n".join(f"<li><bdi>{escape(_printable(path))}</bdi>: {escape(why)}" for path, why in reasons.items())
    return f"<h2>Files that gave no image: {len(reasons):,}</h2>\n<ul>\n{items}\n</ul>"
