"""Matches pairs, to get a subset of a data set whose headers separate the classes as little as possible."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import logit

CALIPER = 0.2  # standard deviations of the logit; Austin 2011, Pharmaceutical Statistics 10(2)


def match_pairs(
    strata: Sequence[Sequence[Hashable]], labels: np.ndarray, fake_scores: np.ndarray, caliper: float
) -> np.ndarray:
    """Rows (pairs, 2) of a fake and a real image each whose headers look equally fake: propensity score matching.

    Args:
        strata: for each image a value that both images of a pair must share; one such list for each condition, from
            the strictest to the loosest. As many images as possible are paired by the first, the rest by the next.
        labels, fake_scores: of each image, 0 fake and 1 real; out of fold, 0 to 1.
        caliper: largest difference of a pair's logits, in standard deviations of all logits.
    """
    logits = logit(fake_scores.clip(0.01, 0.99))
    pairs: list[tuple[int, int]] = []
    free = np.argsort(logits, kind="stable").tolist()
    for kind in strata:
        members: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for row in free:
            members[kind[row]][labels[row]].append(row)
        for fake, real in members.values():
            pairs += _pair_up(fake, real, logits, caliper * logits.std() + 1e-9)
        taken = {row for pair in pairs for row in pair}
        free = [row for row in free if row not in taken]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _pair_up(fake: Sequence[int], real: Sequence[int], logits: np.ndarray, limit: float) -> list[tuple[int, int]]:
    """The largest number of pairs that differ by at most `limit`; `fake` and `real` are sorted by logit."""
    pairs, a, b = [], 0, 0
    while a < len(fake) and b < len(real):
        difference = logits[fake[a]] - logits[real[b]]
        if abs(difference) <= limit:
            pairs.append((fake[a], real[b]))
        a += difference <= limit
        b += difference >= -limit
    return pairs
