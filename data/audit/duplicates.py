"""Finds images that occur twice: the same bytes, or the same picture encoded again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

HASH_SIDE, HASH_BITS = 16, 256
THUMBNAIL_SIDE = 4 * HASH_SIDE  # pixels; what ImageHash resizes to
# Measured: the same photograph at another JPEG quality (10, 50) or size differs in up to 12 of 256 bits, a fifth
# brighter in up to 36, cropped by 2% at each edge in up to 46; different photographs differ in 80 and more.
NEAR_BITS = 40
SIMILAR = 0.9  # least correlation of two thumbnails; the copies above have at least 0.90
FLAT = 3.0  # grey levels; below this standard deviation of a thumbnail, the bits of its hash are noise
BLOCK = 64  # images whose distances to all others are in memory at a time


@dataclass(frozen=True)
class Pair:
    """Two duplicates, by their rows."""

    first: int
    other: int
    bits: int | None  # by how many their hashes differ; None for the same bytes


def perceptual_hash(thumbnail: Image.Image) -> np.ndarray:
    """ImageHash's phash of a grey thumbnail: signs of its lowest frequencies against their median, uint64 (4,)."""
    import imagehash  # here: only the workers hash

    return np.packbits(imagehash.phash(thumbnail, hash_size=HASH_SIDE).hash).view(np.uint64)


def exact_duplicates(contents: Sequence[str]) -> list[Pair]:
    """Each image whose content (SHA-256) occurred before, with the first image of that content."""
    first: dict[str, int] = {}
    return [Pair(first[c], row, None) for row, c in enumerate(contents) if first.setdefault(c, row) != row]


def near_duplicates(
    hashes: np.ndarray, thumbnails: np.ndarray, limit: int = NEAR_BITS
) -> tuple[list[Pair], np.ndarray]:
    """Images that look alike: their hashes (images, 4) differ in at most `limit` bits, and their thumbnails (images,
    side, side) correlate; and each image's distance to the nearest other in bits (-1 for flat ones, and if alone).

    Flat images are left out: their little content is noise, and one blank page is not a copy of another.
    """
    centred = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    centred -= centred.mean(1, keepdims=True)
    deviations = centred.std(1)
    rows = np.flatnonzero(deviations >= FLAT)
    unit = centred[rows] / (deviations[rows, None] * np.sqrt(centred.shape[1]))
    pairs, nearest = [], np.full(len(hashes), -1)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        bits = np.bitwise_count(hashes[block, None] ^ hashes[rows]).sum(2, dtype=np.int16)
        bits[np.arange(len(block)), start + np.arange(len(block))] = HASH_BITS + 1  # to itself
        if len(rows) > 1:
            nearest[block] = bits.min(1)
        for a, b in np.argwhere(bits <= limit):
            if start + a < b and unit[start + a] @ unit[b] >= SIMILAR:
                pairs.append(Pair(int(block[a]), int(rows[b]), int(bits[a, b])))
    return pairs, nearest
