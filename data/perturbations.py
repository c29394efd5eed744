"""What happens to an image on its way to us, done in memory: saved as JPEG or WebP, resized, blurred, cut; pure."""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from data.images import resaved

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


# Name -> what is done; a name is its kind and its strength.
PERTURBATIONS: dict[str, Perturbation] = {
    "native": unchanged,
    **{f"jpeg_{quality}": partial(jpeg, quality=quality) for quality in (95, 90, 75, 50, 30)},
    **{f"webp_{quality}": partial(webp, quality=quality) for quality in (80, 50)},
    **{f"rescale_{scale}": partial(rescaled, scale=scale) for scale in (0.75, 0.5, 0.25)},
    **{f"blur_{sigma}": partial(blurred, sigma=sigma) for sigma in (1, 2)},
    **{f"noise_{sigma}": partial(noisy, sigma=sigma) for sigma in (2, 5, 10)},
    **{f"crop_{share}": partial(centre_crop, share=share) for share in (0.75, 0.5)},
    "social": social,
}
