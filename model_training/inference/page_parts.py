"""Parts of the pages that show predictions: templates, and pictures embedded in them."""

import base64
import io
from functools import cache

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from PIL import Image

from data.images import UnreadableImage
from data.pictures import Picture
from model_training.inference.detector import UNLIKE, Detector, Outcome
from model_training.inference.effect_map import effect_map
from model_training.inference.evidence_pictures import SHOWN_CROPS, SHOWN_ROWS, map_parts, outlined, ranked
from model_training.tables.table import show

FILE_QUALITY = {"quality": 92, "subsampling": "4:4:4"}  # keeps single pixels of crops distinct
MAP_SIDE = 380  # pixels
PAGE_QUALITY = {"quality": 70}  # for larger pictures in a page


@cache
def template(name: str) -> Template:
    """One of the templates beside this file."""
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"], environment.globals["UNLIKE"] = show, UNLIKE
    return environment.get_template(name)


def jpeg_bytes(image: Image.Image, **options: int | str) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def embedded(image: Image.Image, **options: int | str) -> str:
    """The image as the source of an <img>."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(image, **(options or PAGE_QUALITY))).decode()}"


def card(detector: Detector, number: int, name: str, found: Outcome, picture: Picture | UnreadableImage) -> str:
    """The HTML for one image: its verdict and evidence, or why there is none. `number` is its anchor in the page."""
    parts = template("card.html").module
    if isinstance(found, UnreadableImage):
        return parts.problem(number, name, str(found))
    boxes, attention, alone, effects = ranked(found)
    crops = [picture.image.crop((x, y, x + wide, y + tall)) for y, x, tall, wide in boxes[:SHOWN_CROPS].tolist()]
    rows = list(zip(attention, alone, effects, strict=True))[:SHOWN_ROWS]
    largest = float(np.nanmax(np.abs(effects), initial=0)) or 1.0
    whole = outlined(picture, boxes[:SHOWN_ROWS], effects[:SHOWN_ROWS])
    return parts.card(
        number, name, found, detector, detector.calibration.probabilities(found.scores.values), whole.size,
        embedded(whole), [(crop.size, embedded(crop, **FILE_QUALITY)) for crop in crops], rows, largest, len(effects),
    )  # fmt: skip


def map_card(detector: Detector, picture: Picture) -> str:
    """The HTML of the effect map of an image."""
    lines, pictures = map_parts(picture, effect_map(detector, picture), MAP_SIDE)
    return template("card.html").module.map(lines, [(one.size, embedded(one, **FILE_QUALITY)) for one in pictures])
