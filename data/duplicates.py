"""Images that occur twice: the same bytes, or the same picture saved anew."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

HASH_SIDE = 16  # a hash has 16 x 16 bits
HASH_BITS = HASH_SIDE**2
THUMBNAIL_SIDE = 4 * HASH_SIDE  # pixels; what ImageHash resizes to
# Of 256 bits. Measured: the same photograph at another JPEG quality (10, 50) or size differs in up to 12, a fifth
# brighter in up to 36, cropped by 2% at each edge in up to 46; different ones in 80 and more.
NEAR_BITS = 40
ALIKE = 0.9  # least correlation of two thumbnails; of the above copies, the lowest is 0.90
FLAT = 3.0  # grey levels; below this standard deviation of a thumbnail, the bits of its hash are noise


@dataclass(frozen=True)
class Pair:
    """Two images that are duplicates: numbers of the first and of the other."""

    first: int
    other: int
    bits: int | None  # by which their hashes differ; None for the same bytes


def perceptual_hash(thumbnail: Image.Image) -> np.ndarray:
    """ImageHash's phash of a grey thumbnail: signs of its lowest frequencies against their median, uint64 (4,)."""
    import imagehash  # here, because it is not needed to search

    return np.packbits(imagehash.phash(thumbnail, hash_size=HASH_SIDE).hash).view(np.uint64)


def exact_duplicates(contents: Sequence[str]) -> list[Pair]:
    """Each image whose content, as a SHA-256, occurred before, with the first of that content."""
    first: dict[str, int] = {}
    return [Pair(first[c], row, None) for row, c in enumerate(contents) if first.setdefault(c, row) != row]


def near_duplicates(
    hashes: np.ndarray, thumbnails: np.ndarray, limit: int = NEAR_BITS
) -> tuple[list[Pair], np.ndarray]:
    """Images that look alike: their hashes differ in at most `limit` bits, and their thumbnails correlate.

    Flat images are left out: what little they hold is noise, and one blank page is not a copy of another.

    Args:
        hashes: uint64 (images, 4), from `perceptual_hash`.
        thumbnails: uint8 (images, side, side).

    Returns:
        The pairs, and of each image the fewest bits to another (-1 for flat ones, and for an image alone).
    """
    centred = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    centred -= centred.mean(1, keepdims=True)
    deviations = centred.std(1)
    rows = np.flatnonzero(deviations >= FLAT)
    unit = centred[rows] / (deviations[rows, None] * np.sqrt(centred.shape[1]))
    pairs, nearest = [], np.full(len(hashes), -1)
    for start, bits in _distances(hashes[rows]):
        own = np.arange(len(bits))
        bits[own, start + own] = HASH_BITS + 1
        if len(rows) > 1:
            nearest[rows[start + own]] = bits.min(1)
        for a, b in np.argwhere(bits <= limit):
            if start + a < b and unit[start + a] @ unit[b] >= ALIKE:
                pairs.append(Pair(int(rows[start + a]), int(rows[b]), int(bits[a, b])))
    return pairs, nearest


def _distances(hashes: np.ndarray, block: int = 64) -> Iterator[tuple[int, np.ndarray]]:
    """Differing bits of a block of hashes to all: the block's first number, and (block, images)."""
    for start in range(0, len(hashes), block):
        different = hashes[start : start + block, None] ^ hashes[None]
        yield start, np.bitwise_count(different).sum(2, dtype=np.int16)
