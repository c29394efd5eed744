"""What happens to an image on its way to us, done in memory: saved as JPEG or WebP, resized, blurred, cut; pure."""

import io

from PIL import Image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image as it comes back from a JPEG file of that quality, with Pillow's own 4:2:0 subsampling."""
    return _saved(image, "JPEG", quality=quality)


def _saved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    with Image.open(buffer) as saved:
        return saved.convert("RGB")
