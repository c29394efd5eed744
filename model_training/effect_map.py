"""Where in an image a GLASS model finds what it says: crops slid over all of it, each with its effect on the score.

from model_training.effect_map import effect_map

found = effect_map(detector, picture)               # a data.pictures.Picture
row, column = divmod(found.pixels.argmax(), found.pixels.shape[1])
"""

from dataclasses import dataclass

import numpy as np

from data.crops import tile_boxes
from data.pictures import Picture
from model_training.detector import Detector
from utils import UserError


@dataclass(frozen=True)
class EffectMap:
    """The tiles of an image, scored together as the crops of one draw.

    Attributes:
        pixels: float32 (H, W), N times the effect of a tile, averaged over the tiles that cover a pixel.
        boxes: (N, 4).
        effects: (N,), as `Scores.effects`; they shrink as 1 / N, and N times as much does not depend on the grid.
        attention: (N,).
        alone: (N,), the score if a tile were the only crop.
        score: logit of fake minus logit of real, from the global view and all tiles.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    effects: np.ndarray
    attention: np.ndarray
    alone: np.ndarray
    score: float


def effect_map(detector: Detector, picture: Picture, stride: int | None = None) -> EffectMap:
    """What each part of the picture does to the score, compared with the rest of it.

    Effects sum to about zero, for a tile is left out in favour of the others: the map says which parts look more
    generated than the rest of this picture. What a part says by itself is its score alone.

    Args:
        stride: pixels from one tile to the next, at most the patch size P; None: P / 2.

    Raises:
        UserError: a model without crops, or a stride that leaves gaps.
    """
    P = detector.settings.patch_size
    stride = P // 2 if stride is None else stride
    if not detector.num_crops:
        raise UserError(f"{detector.name} looks at the whole image and has no crops: an effect map needs a GLASS model")
    if not 1 <= stride <= P:
        raise UserError(f"stride = {stride}: it must be from 1 to the patch size, {P}")
    boxes = tile_boxes(picture.image.height, picture.image.width, P, stride)
    (scores,) = detector.score([picture], boxes=boxes[None])
    (effects,), (attention,), (alone,) = scores.effects, scores.attention, scores.alone
    pixels = spread(len(boxes) * effects, boxes, picture.image.height, picture.image.width)
    return EffectMap(pixels, boxes, effects, attention, alone, float(scores.values[0]))


def spread(values: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values (N,) of boxes (N, 4) that cover an image -> float32 (H, W), the mean of those that cover a pixel."""
    total, count = np.zeros((2, height, width), np.float32)
    for value, (top, left, tall, wide) in zip(values, boxes.tolist(), strict=True):
        covered = np.s_[top : top + tall, left : left + wide]
        total[covered] += value
        count[covered] += 1
    total /= count
    return total
