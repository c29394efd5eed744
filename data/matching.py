"""A subset of a data set in which headers tell as little of the class as possible: matched pairs."""

from collections.abc import Hashable, Sequence

import numpy as np

CALIPER = 0.2  # standard deviations of the logit; Austin 2011, Pharmaceutical Statistics 10(2)


def match_pairs(
    cells: Sequence[Hashable], names: Sequence[str], labels: np.ndarray, fake_scores: np.ndarray, caliper: float
) -> np.ndarray:
    """Pairs of a fake and a real image whose headers look equally fake: propensity score matching.

    Within a cell, the score sums up sizes, quality and all else that tells the classes apart, by how well it does.
    Images that share a name are paired first; of the rest, as many as the caliper allows.

    Args:
        cells: of each image, what both of a pair have in common exactly, such as the format.
        names: of each image, without its class.
        labels: 0 fake, 1 real.
        fake_scores: out of fold, 0 to 1.
        caliper: largest difference of a pair's logits, in standard deviations of all logits.

    Returns:
        Rows of the fake and of the real image of each pair, (pairs, 2).
    """
    clipped = fake_scores.clip(0.01, 0.99)
    logits = np.log(clipped / (1 - clipped))
    limit = caliper * logits.std() + 1e-9
    free = np.ones(len(labels), bool)
    pairs = []
    real_of = {(cells[row], names[row]): row for row in np.flatnonzero(labels == 1)}
    for row in np.flatnonzero(labels == 0):
        like = real_of.get((cells[row], names[row]))
        if like is not None and free[like] and abs(logits[row] - logits[like]) <= limit:
            pairs.append((row, like))
            free[[row, like]] = False
    for cell in dict.fromkeys(cells):
        members = np.array([other == cell for other in cells]) & free
        fake, real = (np.flatnonzero(members & (labels == label)) for label in (0, 1))
        pairs += _pair_up(fake[logits[fake].argsort()], real[logits[real].argsort()], logits, limit)
    return np.array(pairs, np.int64).reshape(-1, 2)


def _pair_up(fake: np.ndarray, real: np.ndarray, logits: np.ndarray, limit: float) -> list[tuple[int, int]]:
    """The most pairs that differ by at most `limit`, both sorted by logit: pass over whichever lies too far below."""
    pairs, a, b = [], 0, 0
    while a < len(fake) and b < len(real):
        difference = logits[fake[a]] - logits[real[b]]
        if abs(difference) <= limit:
            pairs.append((fake[a], real[b]))
        a += difference <= limit
        b += difference >= -limit
    return pairs
