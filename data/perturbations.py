"""What happens to images on the internet (JPEG, resizing, social networks), simulated in memory by pure functions.

To add a perturbation, write its function here and its row in KINDS: nothing else lists them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from data.images import pillow_unlimited, pixel_key, resaved
from utils import UserError

Perturbation = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes back from a JPEG file of that quality, with Pillow's own 4:2:0 subsampling."""
    return resaved(image, "JPEG", quality=quality)


def webp(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes back from a lossy WebP file of that quality, shrunk to WebP's 16,383 pixels a side."""
    image = image.copy()
    image.thumbnail((16_383, 16_383), Image.Resampling.LANCZOS)
    return resaved(image, "WEBP", quality=quality)


def rescaled(image: Image.Image, scale: float) -> Image.Image:
    """The image resized by `scale`, and back to its size."""
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur; sigma in pixels (Pillow's approximation by three box blurs)."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian noise of that standard deviation in grey levels; its seed is the hash of the image's pixels."""
    pixels = np.asarray(image)
    noise = np.random.default_rng(int(pixel_key(image), 16)).standard_normal(pixels.shape, np.float32)
    noise *= sigma
    noise += pixels
    return Image.fromarray(noise.round().clip(0, 255).astype(np.uint8))


def centre_crop(image: Image.Image, share: float) -> Image.Image:
    """The middle of the image, `share` of each side."""
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    with pillow_unlimited():
        return image.crop((left, top, left + width, top + height))


def social(image: Image.Image) -> Image.Image:
    """What a social network does: no side above 1080 pixels, JPEG of quality 75."""
    image = image.copy()
    image.thumbnail((1080, 1080), Image.Resampling.LANCZOS)
    return jpeg(image, 75)


class PerturbationKind(NamedTuple):
    """A row of KINDS. `change` takes an image and, unless `bounds` is None, a strength."""

    change: Callable[..., Image.Image]
    bounds: tuple[float, float] | None = None  # lowest and highest strength; ints: whole numbers only
    tried: tuple[float, ...] = ()  # strengths that model_training.robustness tries


KINDS = {
    "native": PerturbationKind(lambda image: image),
    "jpeg": PerturbationKind(jpeg, (1, 100), (95, 90, 75, 50, 30)),
    "webp": PerturbationKind(webp, (1, 100), (80, 50)),
    "rescale": PerturbationKind(rescaled, (0.01, 1.0), (0.75, 0.5, 0.25)),
    "blur": PerturbationKind(blurred, (0.1, 100.0), (1, 2)),
    "noise": PerturbationKind(noisy, (0.1, 255.0), (2, 5, 10)),
    "crop": PerturbationKind(centre_crop, (0.01, 1.0), (0.75, 0.5)),
    "social": PerturbationKind(social),
}
GRID = tuple(  # names of all that model_training.robustness tries
    name for kind, row in KINDS.items() for name in ([f"{kind}_{s:g}" for s in row.tried] if row.bounds else [kind])
)


def perturbation(name: str) -> Perturbation:
    """The function that a name stands for: a kind and its strength, such as jpeg_75, or a kind without a strength.

    Raises:
        UserError: no such kind or strength.
    """
    kind, strength = kind_and_strength(name)
    row = KINDS.get(kind)
    if row and row.bounds is None and strength is None:
        return row.change
    if row and row.bounds and strength is not None and row.bounds[0] <= strength <= row.bounds[1]:
        if strength.is_integer():
            return lambda image: row.change(image, int(strength))
        if isinstance(row.bounds[0], float):
            return lambda image: row.change(image, strength)
    known = (f"{kind}_{row.bounds[0]:g} to {row.bounds[1]:g}" if row.bounds else kind for kind, row in KINDS.items())
    raise UserError(f"there is no perturbation {name}: expected {', '.join(known)}")


def kind_and_strength(name: str) -> tuple[str, float | None]:
    """("jpeg", 75.0) of jpeg_75; ("native", None) of a name without a strength."""
    kind, _, strength = name.rpartition("_")
    try:
        return kind, float(strength)
    except ValueError:
        return name, None
