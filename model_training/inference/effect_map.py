"""Where in an image a GLASS model finds its evidence: crops that cover all of it, each with its effect on the score."""

from dataclasses import dataclass

import numpy as np

from data.crops import crop_generator, tile_boxes
from data.pictures import Picture
from model_training.inference.detector import Detector, Scores
from utils import UserError

TILES = -1  # in place of a draw's number


@dataclass(frozen=True)
class EffectMap:
    """The N tiles of an image, scored together as the crops of one draw."""

    pixels: np.ndarray  # float32 (H, W), N x the effect of a tile, averaged over the tiles that cover a pixel
    scores: Scores  # with T = 1, K = N; effects shrink as 1 / N, so that N x effect does not depend on the grid

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4)."""
        return self.scores.boxes[0]


def effect_map(detector: Detector, picture: Picture) -> EffectMap:
    """The effect of each part of the picture on the score, compared with the rest of it.

    Effects sum to about zero, because a tile is left out in favour of the others: the map shows which parts look more
    generated than the rest of this picture. Neighbouring tiles overlap by about half.
    Raises UserError for a model without crops.
    """
    P, (width, height) = detector.settings.patch_size, picture.image.size
    if not detector.num_crops:
        raise UserError(f"{detector.name} looks at the whole image and has no crops, which an effect map needs")
    generator = crop_generator(detector.settings.main_seed, picture.key, TILES)
    boxes = tile_boxes(height, width, P, max(1, P // 2), generator)
    (scores,) = detector.score([picture], boxes=boxes[None])
    return EffectMap(spread(len(boxes) * scores.effects[0], boxes, height, width), scores)


def spread(values: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values (N,) of boxes (N, 4) that cover an image -> float32 (H, W): each pixel's mean over the boxes on it."""
    total, count = np.zeros((2, height, width), np.float32)
    for value, (top, left, tall, wide) in zip(values, boxes.tolist(), strict=True):
        covered = np.s_[top : top + tall, left : left + wide]
        total[covered] += value
        count[covered] += 1
    total /= count
    return total
