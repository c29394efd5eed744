"""Predictions with their evidence: a folder of pictures, and one page that shows them all and needs no network."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from data.images import UnreadableImage
from data.pictures import Picture, read_pictures
from model_training.inference.detector import Detector, Outcome, Prediction
from model_training.inference.effect_map import effect_map
from model_training.inference.evidence_pictures import draw_evidence, draw_map
from model_training.inference.page_parts import FILE_QUALITY, embedded, jpeg_bytes, template
from utils import UserError, locked_folder, replacing, write_text

MARKER = ".evidence"  # in a folder that this module made
THUMBNAIL = (192, 128)  # pixels; shown at half this size


def write_evidence(
    folder: Path, detector: Detector, paths: Sequence[str], predictions: Iterable[Outcome], with_map: bool = False
) -> None:
    """Write the pictures of each image and index.html to `folder`, while the predictions are computed.

    Each image is decoded a second time and drawn at once, so that only a few are in memory. Pictures of an earlier call
    are removed. Raises UserError for a folder that holds something else.
    """
    _check_folder(folder, paths)
    settings = detector.settings
    pictures = read_pictures(paths, settings.max_image_pixels, workers=1, reencode_jpeg=settings.reencode_jpeg)
    unreadable: dict[str, str] = {}  # filled by images(), which the page uses first

    def images() -> Iterator[tuple[str, Prediction, str, list[tuple[str, str, str]]]]:
        for number, (path, prediction, picture) in enumerate(zip(paths, predictions, pictures, strict=True), 1):
            problem = next((str(one) for one in (prediction, picture) if isinstance(one, UnreadableImage)), None)
            if problem:
                unreadable[path] = problem
                continue
            files = [_save(folder, number, path, "evidence", draw_evidence(picture, prediction))]
            if with_map:
                drawn = draw_map(picture, effect_map(detector, picture))
                files.append(_save(folder, number, path, "map of effects", drawn))
            yield path, prediction, _thumbnail(picture), files

    page = template("evidence.html").stream(detector=detector, images=images(), unreadable=unreadable)
    with locked_folder(folder), replacing(folder / "index.html") as temporary:
        write_text(folder / MARKER, "")
        for picture in folder.glob("[0-9][0-9][0-9][0-9]*_*.jpg"):  # of an earlier run
            picture.unlink()
        with open(temporary, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:  # of names that are not UTF-8
            page.dump(file)


def _check_folder(folder: Path, paths: Sequence[str]) -> None:
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--evidence {folder}: it holds other files; name a folder that is new or empty")
    inside = next((path for path in paths if folder.resolve() in Path(path).resolve().parents), None)
    if inside:
        raise UserError(f"--evidence {folder}: {inside} is an image in it; name another folder")


def _save(folder: Path, number: int, path: str, kind: str, image: Image.Image) -> tuple[str, str, str]:
    """Write a picture; returns its file name, its kind, and the picture for the page."""
    stem = re.sub(r"[^\w.-]+", "_", Path(path).stem)[:40]  # 160 bytes in UTF-8 at most
    name = f"{number:04d}_{stem}{'' if kind == 'evidence' else '_map'}.jpg"
    with replacing(folder / name) as temporary:
        temporary.write_bytes(jpeg_bytes(image, **FILE_QUALITY))
    return name, kind, embedded(image)


def _thumbnail(picture: Picture) -> str:
    small = picture.image.copy() if max(picture.image.size) < 1024 else picture.image.reduce(4)
    small.thumbnail(THUMBNAIL)
    return embedded(small)
