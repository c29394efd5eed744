"""What happens to an image on its way to us, done in memory: saved as JPEG or WebP, resized, blurred, cut; pure."""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from data.images import resaved
from utils import UserError

Perturbation = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes back from a JPEG file of that quality, with Pillow's own 4:2:0 subsampling."""
    return resaved(image, "JPEG", quality=quality)


def webp(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes back from a lossy WebP file of that quality; a side above 16,383, which WebP has not, is
    shrunk to it."""
    image = image.copy()
    image.thumbnail((16_383, 16_383), Image.Resampling.LANCZOS)
    return resaved(image, "WEBP", quality=quality)


def rescaled(image: Image.Image, scale: float) -> Image.Image:
    """The image made smaller by `scale`, and as large as before again."""
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur; sigma in pixels (Pillow's approximation by three box blurs)."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian noise of that standard deviation in grey levels, the same for images of one size."""
    pixels = np.asarray(image)
    noise = np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    noise *= sigma
    noise += pixels
    return Image.fromarray(noise.round().clip(0, 255).astype(np.uint8))


def centre_crop(image: Image.Image, share: float) -> Image.Image:
    """The middle of the image, `share` of each side."""
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def social(image: Image.Image) -> Image.Image:
    """What a social network does: no side above 1080 pixels, JPEG of quality 75."""
    image = image.copy()
    image.thumbnail((1080, 1080), Image.Resampling.LANCZOS)
    return jpeg(image, 75)


def unchanged(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


_KINDS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float]] = {  # and strengths from, to
    "jpeg": (jpeg, 1, 100),
    "webp": (webp, 1, 100),
    "rescale": (rescaled, 0.01, 1),
    "blur": (blurred, 0.1, 100),
    "noise": (noisy, 0.1, 255),
    "crop": (centre_crop, 0.01, 1),
}
GRID = (
    "native",
    *("jpeg_95", "jpeg_90", "jpeg_75", "jpeg_50", "jpeg_30"),
    *("webp_80", "webp_50"),
    *("rescale_0.75", "rescale_0.5", "rescale_0.25"),
    *("blur_1", "blur_2"),
    *("noise_2", "noise_5", "noise_10"),
    *("crop_0.75", "crop_0.5"),
    "social",
)


def perturbation(name: str) -> Perturbation:
    """What a name stands for: native, social, or a kind and its strength, such as jpeg_75.

    Raises:
        UserError: no such kind or strength.
    """
    if name in ("native", "social"):
        return social if name == "social" else unchanged
    kind, strength = kind_and_strength(name)
    known = kind in _KINDS and strength is not None and _KINDS[kind][1] <= strength <= _KINDS[kind][2]
    if not known or (kind in ("jpeg", "webp") and strength != int(strength)):
        ranges = ", ".join(f"{kind}_{low:g} to {high:g}" for kind, (_, low, high) in _KINDS.items())
        raise UserError(f"there is no perturbation {name}: expected native, social, {ranges}")
    whole = int(strength) if strength == int(strength) else strength
    return partial(_apply, _KINDS[kind][0], whole)


def kind_and_strength(name: str) -> tuple[str, float | None]:
    """("jpeg", 75.0) of jpeg_75; ("native", None) of a name without a strength."""
    kind, _, strength = name.partition("_")
    try:
        return kind, float(strength)
    except ValueError:
        return kind, None


def _apply(change: Callable[[Image.Image, float], Image.Image], strength: float, image: Image.Image) -> Image.Image:
    return change(image, strength)
