"""The splits are the paper's, index by index; by group, every group is kept whole, and sizes and classes are met."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data.datasets import load_splits
from data.splits import final_group_split, final_split, group_split_indices, groups_of, held_out, split_indices
from tests.conftest import FIXTURES, MakePreset
from utils import UserError

CASES = json.loads((FIXTURES / "splits.json").read_text())["splits"]
LABELS = [0] * 300 + [1] * 300
PAIRS = [f"{i:03d}" for i in range(300)] * 2
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


@pytest.mark.parametrize(("total", "held_out"), [(12_000, 3600), (11_994, 3601), (4000, 3600)])
def test_the_held_out_rows_are_those_of_scikit_learn(total: int, held_out: int) -> None:
    labels = [0] * (total // 2) + [1] * (total // 2)
    kept, others = train_test_split(range(total), test_size=3600 / total, stratify=labels, random_state=606)
    ours = split_indices(labels, 1800, 1800, 606)
    assert ours[0] == kept and sorted(ours[1] + ours[2]) == sorted(others) and len(others) == held_out


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
    with pytest.raises(UserError, match="final_valid_fraction"):
        final_split([0, 1, 2], [3], 0.05, seed=1)


def test_pairs_stay_together_and_sizes_and_classes_are_met_exactly() -> None:
    parts = group_split_indices(LABELS, PAIRS, set(), (0.15, 90), seed=606)
    assert [len(part) for part in parts] == [420, 90, 90] and set().union(*parts) == set(range(600))
    assert all(sum(LABELS[row] for row in part) * 2 == len(part) for part in parts)
    names = [{PAIRS[row] for row in part} for part in parts]
    assert [len(part) for part in names] == [210, 45, 45]  # as many as there are pairs: none is in two
    assert group_split_indices(LABELS, PAIRS, set(), (0.15, 90), seed=607)[2] != parts[2]
    final = final_group_split([*parts[0], *parts[1]], LABELS, PAIRS, 0.05, seed=606)
    assert [len(part) for part in final] == [486, 24]  # 25 of 510, in whole pairs
    assert not {PAIRS[row] for row in final[0]} & {PAIRS[row] for row in final[1]}


def test_sources_of_unequal_size_come_as_near_as_they_can() -> None:
    sources = [f"s{i % 7}" if i % 2 else f"t{i % 23}" for i in range(600)]
    train, valid, test = group_split_indices(LABELS, sources, {"s3"}, (100, 100), seed=1)
    for first, second in ((train, valid), (train, test), (valid, test)):
        assert not {sources[row] for row in first} & {sources[row] for row in second}
    outside = [row for row in test if sources[row] != "s3"]
    assert len(test) - len(outside) == sources.count("s3")
    for part in (valid, outside):
        assert 70 <= len(part) <= 130 and 0.4 < sum(LABELS[row] for row in part) / len(part) < 0.6


def test_a_test_split_of_held_out_groups_alone() -> None:
    _, _, test = group_split_indices(LABELS, PAIRS, {"007", "008"}, (60, 0), seed=606)
    assert test == [7, 8, 307, 308]


@pytest.mark.parametrize(
    ("groups", "out", "sizes"),
    [(["one"] * 600, set(), (100, 100)), (PAIRS, set(PAIRS), (10, 10)), (LABELS, set(), (100, 100))],
)
def test_groups_that_leave_a_split_without_a_class_are_refused(
    groups: list[str], out: set[str], sizes: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match="no images of both classes to"):
        group_split_indices(LABELS, [str(group) for group in groups], out, sizes, seed=606)


def test_what_a_group_is(tmp_path: Path) -> None:
    paths = ["fake/sd/a.png", "fake/b.png", "real/sd/a.jpg", "real/x/y/c.jpg"]
    assert groups_of(paths, "stem") == ["a", "b", "a", "c"]
    assert groups_of(paths, "folder", ["sd", "", "sd", "x"]) == ["sd", "fake/b.png", "sd", "x"]
    (tmp_path / "m.csv").write_text("camera,file\nK,a.png\nL,fake/b.png\nM,a.jpg\nN,c.jpg\n")
    assert groups_of(paths, f"{tmp_path}/m.csv:camera") == ["K", "L", "M", "N"]
    assert held_out(["K", "L", "LL"], ["L*"]) == {"L", "LL"}
    with pytest.raises(UserError, match="hold_out names X, and no group has this name: the groups are K, L"):
        held_out(["L", "K"], ["X"])
    with pytest.raises(UserError, match=r"m\.csv has no row for real/sd/d\.jpg"):
        groups_of([*paths, "real/sd/d.jpg"], f"{tmp_path}/m.csv:camera")
    (tmp_path / "two.csv").write_text("file,camera\na.png,K\na.png,L\n")
    with pytest.raises(UserError, match=r"two\.csv says of a\.png both K and L: name its files by their paths below"):
        groups_of(paths, f"{tmp_path}/two.csv:camera")
    with pytest.raises(UserError, match=r"m\.csv has no column lens: it has camera, file"):
        groups_of(paths, f"{tmp_path}/m.csv:lens")
    with pytest.raises(UserError, match=r"group_by is pairs: expected none, stem, folder or FILE\.csv:COLUMN"):
        groups_of(paths, "pairs")


def test_groups_of_one_image_each_are_no_error(toy_preset: MakePreset, capsys: pytest.CaptureFixture[str]) -> None:
    index, splits = load_splits(toy_preset(group_by="folder"))
    assert "--group-by folder: no two images of" in capsys.readouterr().out
    assert sorted(splits.train + splits.valid + splits.test) == list(range(len(index.records)))
    assert len(splits.valid) == len(splits.test) == 6


def test_hold_out_without_groups_and_lists_of_other_images_are_refused(toy_preset: MakePreset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold_out names groups, and group_by is none"):
        load_splits(toy_preset(hold_out=("a",)))
    (tmp_path / "list.csv").write_text("path\nfake/0000.png\nfake/none.png\n")
    with pytest.raises(UserError, match=r"list\.csv lists fake/none\.png, which is no image of"):
        load_splits(toy_preset(data_list=str(tmp_path / "list.csv")))
    with pytest.raises(UserError, match=r"nothing\.csv cannot be read as CSV \(No such file or directory\)"):
        load_splits(toy_preset(data_list=str(tmp_path / "nothing.csv")))
