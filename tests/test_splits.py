"""The splits are the paper's, index by index."""

import hashlib
import json

import numpy as np
import pytest

from data.splits import final_split, split_indices
from tests.conftest import FIXTURES
from utils import UserError

CASES = json.loads((FIXTURES / "splits.json").read_text())["splits"]
PARTS = ("train", "valid", "test", "final_train", "final_valid")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['fake']}+{case['real']}")
def test_splits_are_the_reference(case: dict) -> None:
    labels = [0] * case["fake"] + [1] * case["real"]
    train, valid, test = split_indices(labels, case["valid_size"], case["test_size"], case["seed"])
    parts = dict(zip(PARTS, (train, valid, test, *final_split(train, valid, 0.05, 606)), strict=True))
    assert [len(parts[name]) for name in PARTS] == case["sizes"] + case["final_sizes"]
    for name, rows in parts.items():
        assert rows[:10] == case["first10"][name]
        assert hashlib.sha256(np.array(rows, dtype="<i8").tobytes()).hexdigest() == case["sha256"][name]
        assert rows == case.get("all", parts)[name]


@pytest.mark.parametrize("sizes", [(6, 10), (0.15, 0.25), (3, 0.25)])
def test_splits_of_any_size_are_a_stratified_partition(sizes: tuple[int | float, int | float]) -> None:
    labels = [0] * 17 + [1] * 23
    train, valid, test = split_indices(labels, *sizes, seed=1)
    assert sorted(train + valid + test) == list(range(40))
    assert (len(valid), len(test)) == (6 if sizes[0] != 3 else 3, 10)
    for part in (train, valid, test):
        assert abs(np.mean([labels[row] for row in part]) - 23 / 40) < 1 / len(part) + 1e-9


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [([0, 1] * 3, (1800, 1800)), ([0, 0, 0, 1], (1, 1)), ([0] * 40, (6, 6)), ([], (2, 2)), ([0, 1] * 5, (0.01, 0.3))],
)
def test_too_few_images_is_one_sentence(labels: list[int], sizes: tuple[int | float, int | float]) -> None:
    with pytest.raises(UserError, match="too few"):
        split_indices(labels, *sizes, seed=1)


def test_a_final_validation_share_of_less_than_one_image_is_one_sentence() -> None:
    with pytest.raises(UserError, match="final_valid_fraction"):
        final_split([0, 1, 2], [3], 0.05, seed=1)
