"""A prediction -> a picture that explains it: vermillion is evidence for fake, blue for real; numbers have signs."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from data.pictures import Picture
from model_training.inference.detector import Prediction
from model_training.inference.effect_map import EffectMap, spread
from model_training.tables.figures import BLUE, GREY, VERMILLION
from model_training.tables.table import show

INK, PAPER, FAINT = "#222222", "white", "#e4e4e4"
GAP, LINE = 16, 22  # pixels between parts, and from one line of text to the next
LARGEST, MAP_LARGEST, SMALLEST = 900, 500, 300  # sides of an image as it is shown
SHOWN_CROPS, SHOWN_ROWS, CAPTION_WIDTH = 4, 16, 190
ROUNDING = 0.0005  # smaller effects are shown as 0
BADGE = (24, 18)
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
PLAIN, BOLD = (ImageFont.truetype(FONTS / name, 13) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))


# ---------------------------------------------------------------------------------------------------- pictures
def draw_evidence(picture: Picture, prediction: Prediction) -> Image.Image:
    """The image with the crops of its first draw outlined and numbered by effect; some at native size; their table."""
    boxes, attention, alone, effects = ranked(prediction)
    parts = [outlined(picture, boxes[:SHOWN_ROWS], effects[:SHOWN_ROWS])]
    if len(boxes):
        crops = [_native_crop(picture, i + 1, boxes[i], effects[i]) for i in range(min(len(boxes), SHOWN_CROPS))]
        rows = [_joined(crops[i : i + 2]) for i in range(0, len(crops), 2)]
        parts.append(_joined([*rows, _table(attention, alone, effects)], below=True))
    return _page(_lines(prediction), parts)


def ranked(prediction: Prediction) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, attention, scores alone and effects of the first draw's crops, the largest effects first."""
    scores = prediction.scores
    effects = np.where(np.abs(scores.effects[0]) < ROUNDING, 0, scores.effects[0])
    order = np.lexsort((-scores.attention[0], -np.abs(effects)))
    return scores.boxes[0][order], scores.attention[0][order], scores.alone[0][order], effects[order]


def draw_map(picture: Picture, found: EffectMap) -> Image.Image:
    """`map_parts` in one picture."""
    return _page(*map_parts(picture, found))


def map_parts(picture: Picture, found: EffectMap, largest: int = MAP_LARGEST) -> tuple[list[str], list[Image.Image]]:
    """Lines of text; and pictures: the image, the scores of single tiles on it, and the map of effects on it."""
    N, score = len(found.boxes), found.scores.values[0]
    whole, _ = _shown(picture.image, largest)
    if N == 1:
        return [f"Map: the image is one tile, with no other to compare it with; score {score:+.2f}"], [whole]
    alone = spread(found.scores.alone[0], found.boxes, picture.image.height, picture.image.width)
    lines = [
        f"Map: {N:,} tiles over the whole image; with all of them as crops, the score is {score:+.2f}",
        "Alone: the score if a tile were the only crop. N x effect: without a tile the score falls by 1 / N of this; "
        "tiles are compared with each other, and the sum is about 0.",
    ]
    parts = [_titled("the image", whole)]
    for title, ends, values in (
        ("score of each tile alone", ("fake", "real"), alone),
        (f"N x effect on the score, N = {N:,}", ("to fake", "to real"), found.pixels),
    ):
        extreme = max(float(np.abs(values).max()), ROUNDING)
        share = np.asarray(Image.fromarray(values).resize(whole.size, Image.Resampling.BOX)) / extreme
        grey = np.asarray(whole.convert("L"), np.float32)[..., None].repeat(3, 2)
        tinted = _titled(title, Image.fromarray(_tinted(grey, share)))
        parts.append(_joined([tinted, _titled("", _colour_bar(extreme, ends, max(SMALLEST, whole.height)))]))
    return lines, parts


# ------------------------------------------------------------------------------------------------------ layout
def _page(lines: Sequence[str], parts: Sequence[Image.Image]) -> Image.Image:
    """Lines of text, the first one bold, and below them the parts side by side."""
    body = _joined(parts)
    width = max([body.width, *(int(BOLD.getlength(line)) for line in lines)])
    page = _blank(width + 2 * GAP, body.height + len(lines) * LINE + 3 * GAP)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((GAP, GAP + i * LINE), line, INK, PLAIN if i else BOLD)
    page.paste(body, (GAP, 2 * GAP + len(lines) * LINE))
    return page


def _joined(parts: Sequence[Image.Image], below: bool = False) -> Image.Image:
    """The parts side by side, or one below the other."""
    sizes = np.array([part.size for part in parts])
    along, across = (1, 0) if below else (0, 1)
    starts = np.cumsum([0, *(sizes[:, along] + GAP)]).tolist()
    size = (starts[-1] - GAP, int(sizes[:, across].max()))
    joined = _blank(*(reversed(size) if below else size))
    for part, start in zip(parts, starts, strict=False):
        joined.paste(part, (0, start) if below else (start, 0))
    return joined


def _titled(title: str, image: Image.Image) -> Image.Image:
    titled = _blank(max(image.width, int(BOLD.getlength(title))), image.height + LINE)
    ImageDraw.Draw(titled).text((0, 0), title, INK, BOLD)
    titled.paste(image, (0, LINE))
    return titled


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


# ------------------------------------------------------------------------------------------- parts of a picture
def _lines(prediction: Prediction) -> list[str]:
    """The text above the pictures."""
    (draws, K), deviation = prediction.scores.attention.shape, prediction.standard_deviation
    over_draws = f" ± {deviation:.3f} over {draws} draws, flips {prediction.flips:.0%}"
    over_draws = over_draws if deviation == deviation else ""
    first = " of the first draw, which is shown" if draws > 1 else ""
    score = f"score {prediction.scores.values[0]:+.2f}{first} (logit of fake minus logit of real)"
    crops = f"{K} crop{'s' if K > 1 else ''}" if K else "the model looks at the whole image, resized, and has no crops"
    return [
        f"P(fake) {prediction.probability_fake:.3f}{over_draws}: {prediction.verdict}",
        f"{prediction.width} x {prediction.height} pixels; {crops}; {score}",
        *([f"Note: {prediction.note}"] if prediction.note else []),
    ]


def _shown(image: Image.Image, largest: int) -> tuple[Image.Image, float]:
    """The image shrunk to `largest` pixels a side, or a tiny one enlarged by an integer; and its scale."""
    side = max(image.size)
    scale = largest / side if side > largest else max(1, SMALLEST // side)
    size = tuple(max(1, round(scale * length)) for length in image.size)
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return image.resize(size, method, reducing_gap=2.0 if scale < 1 else None), scale


def outlined(picture: Picture, boxes: np.ndarray, effects: np.ndarray) -> Image.Image:
    """The whole image with the boxes (N, 4) outlined and numbered."""
    whole, scale = _shown(picture.image, LARGEST)
    canvas = _blank(max(whole.width, SMALLEST), max(whole.height, SMALLEST))
    canvas.paste(whole)
    draw = ImageDraw.Draw(canvas)
    tops, lefts, heights, widths = boxes.T
    outlines = np.rint(scale * np.stack([lefts, tops, lefts + widths, tops + heights], 1)).astype(int)
    taken = outlines[:0]
    for (left, top, right, bottom), effect in zip(outlines.tolist(), effects, strict=True):
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=PAPER)
        draw.rectangle((left - 1, top - 1, right, bottom), outline=_colour(effect), width=3)
        if min(right - left, bottom - top) > 8:
            draw.rectangle((left + 2, top + 2, right - 3, bottom - 3), outline=PAPER)
    for number, (outline, effect) in enumerate(zip(outlines, effects, strict=True), 1):
        place = _free_place(outline, outlines, taken, canvas.size)
        _badge(draw, *place, number, effect)
        taken = np.concatenate([taken, [[*place, place[0] + BADGE[0], place[1] + BADGE[1]]]])
    return canvas


def _free_place(outline: np.ndarray, others: np.ndarray, badges: np.ndarray, size: tuple[int, int]) -> list[int]:
    """Where to put a number: at its outline, over no other number and, if possible, over no outline."""
    (left, top, right, bottom), (wide, tall) = outline.tolist(), BADGE
    columns = [*range(left - 2, right, 2), *range(left - 4, left - wide, -2)]
    rows = (top - 2 - tall, top + 3, bottom + 2, bottom - 3 - tall)  # above, below, inside
    places = np.clip([(x, y) for y in rows for x in columns], 0, np.subtract(size, BADGE))
    ends = places + BADGE

    def overlaps(boxes: np.ndarray) -> np.ndarray:
        apart = (ends[:, None] <= boxes[:, :2]) | (places[:, None] >= boxes[:, 2:])  # (places, boxes, 2)
        return ~apart.any(-1)

    inside = (places[:, None] >= others[:, :2] + 3) & (ends[:, None] <= others[:, 2:] - 3)
    on_line = (overlaps(others + np.array([-2, -2, 2, 2])) & ~inside.all(-1)).sum(1)
    return places[(1000 * overlaps(badges).sum(1) + on_line).argmin()].tolist()


def _badge(draw: ImageDraw.ImageDraw, left: int, top: int, number: int, effect: float) -> None:
    middle = (left + BADGE[0] / 2, top + BADGE[1] / 2)
    draw.rectangle((left, top, left + BADGE[0] - 1, top + BADGE[1] - 1), _colour(effect), PAPER)
    draw.text(middle, str(number), PAPER, BOLD, anchor="mm")


def _native_crop(picture: Picture, number: int, box: np.ndarray, effect: float) -> Image.Image:
    """The pixels of a crop, unscaled, under its number and effect."""
    top, left, height, width = box.tolist()
    crop = picture.image.crop((left, top, left + width, top + height))
    card = _blank(max(width + 2, CAPTION_WIDTH), height + LINE + 4)
    draw = ImageDraw.Draw(card)
    _badge(draw, 0, 0, number, effect)
    draw.text((BADGE[0] + 8, 1), f"effect {show(float(effect), '+.3f')}, 1:1", INK, PLAIN)
    draw.rectangle((0, LINE, width + 1, LINE + height + 1), outline=_colour(effect))
    card.paste(crop, (1, LINE + 1))
    return card


def _table(attention: np.ndarray, alone: np.ndarray, effects: np.ndarray) -> Image.Image:
    """A row for each crop: number, attention, score alone, effect, and a bar to the left (real) or right (fake)."""
    ends, middle, reach = (100, 160, 220), 310, 85
    largest, more = np.nanmax(np.abs(effects), initial=0) or 1, max(0, len(effects) - SHOWN_ROWS)
    attention, alone, effects = (values[:SHOWN_ROWS] for values in (attention, alone, effects))
    table = _blank(middle + reach + 5, (len(effects) + 3) * LINE)
    draw = ImageDraw.Draw(table)
    for end, heading in zip(ends, ("attention", "alone", "effect"), strict=True):
        draw.text((end, 0), heading, INK, BOLD, anchor="ra")
    draw.text((middle - 6, 0), "◂ to real", BLUE, BOLD, anchor="ra")
    draw.text((middle + 6, 0), "to fake ▸", VERMILLION, BOLD)
    for i, (weight, score, effect) in enumerate(zip(attention, alone, effects, strict=True), 1):
        y = i * LINE
        draw.line((0, y - 3, table.width, y - 3), FAINT)
        _badge(draw, 0, y, i, effect)
        cells = (f"{weight:.1%}", f"{score:+.2f}", show(float(effect), "+.3f"))
        for end, cell in zip(ends, cells, strict=True):
            draw.text((end, y), cell, INK, PLAIN, anchor="ra")
        if effect == effect:
            left, right = sorted((middle, middle + reach * effect / largest))
            draw.rectangle((left, y + 2, right, y + 14), _colour(effect))
    below = (len(effects) + 1) * LINE
    draw.line((middle, LINE, middle, below), GREY)
    if more:
        draw.text((table.width, below + 4), f"and {more} more", GREY, PLAIN, anchor="ra")
    draw.text((0, below + 4), "alone: the score if the crop were the only one", GREY, PLAIN)
    draw.text((0, below + LINE), "effect: how much the score falls without the crop", GREY, PLAIN)
    return table


def _colour(effect: float) -> str:
    return VERMILLION if effect > 0 else BLUE if effect < 0 else GREY


def _tinted(grey: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Grey levels (H, W, 3) tinted by shares (H, W) of the largest effect, from -1 to 1."""
    colours = np.array([ImageColor.getrgb(BLUE), ImageColor.getrgb(VERMILLION)], np.float32)[(share > 0).astype(int)]
    opacity = 0.85 * np.abs(share)[..., None] ** 0.75
    return np.rint(grey + opacity * (colours - grey)).astype(np.uint8)


def _colour_bar(largest: float, ends: Sequence[str], height: int) -> Image.Image:
    """The colour scale, from +largest at the top to -largest, with the texts `ends` above and below."""
    bar = _blank(90, height)
    draw = ImageDraw.Draw(bar)
    top, bottom = LINE, height - LINE
    shares = np.linspace(1, -1, bottom - top, dtype=np.float32)[:, None].repeat(24, 1)
    bar.paste(Image.fromarray(_tinted(np.full((*shares.shape, 3), 160, np.float32), shares)), (0, top))
    for share in (1, 0.5, 0, -0.5, -1):
        y = top + (1 - share) / 2 * (bottom - top - 1)
        draw.line((24, y, 30, y), INK)
        draw.text((36, y), f"{share * largest:+.2g}" if share else "0", INK, PLAIN, anchor="lm")
    draw.text((0, 0), ends[0], VERMILLION, BOLD)
    draw.text((0, height - 17), ends[1], BLUE, BOLD)
    return bar
