"""Decoded pixels -> what a model sees of them: resized views and native-resolution crops, as bytes. SPEC, Views."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F


def global_view(pixels: np.ndarray, patch_size: int, exact: bool = False) -> np.ndarray:
    """GLASS's global view: antialiased bilinear resize of the whole image, aspect ratio not kept.

    Args:
        pixels: uint8 (H, W, 3 or 4), of any size; a fourth channel is not looked at.
        patch_size: P.
        exact: resize in float32. The resize of bytes rounds after each direction, and stays within one grey level.

    Returns:
        (P, P, 3), values 0 to 255: uint8, or float32 if `exact`.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if exact:
        image = image[:3].float()
    view = F.resize(image, [patch_size, patch_size], antialias=True)
    return np.ascontiguousarray(view[:3].permute(1, 2, 0).numpy())


def standard_view(image: Image.Image, patch_size: int) -> np.ndarray:
    """The standard models' view: Pillow's bilinear resize of the 8-bit image; uint8 (P, P, 3)."""
    return np.asarray(image.resize((patch_size, patch_size), Image.Resampling.BILINEAR))


def cut_crops(pixels: np.ndarray, boxes: np.ndarray, crops: np.ndarray) -> None:
    """Copy crops out of an image.

    Args:
        pixels: uint8 (H, W, 3 or 4).
        boxes: (K, 4), as `sample_crop_boxes` gives them.
        crops: uint8 (K, P, P, 3), written to where a box is valid; the padding is the caller's.
    """
    for crop, (top, left, height, width) in zip(crops, boxes.tolist(), strict=True):
        crop[:height, :width] = pixels[top : top + height, left : left + width, :3]
