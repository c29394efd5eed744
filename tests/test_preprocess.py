"""Preprocessing: every file is checked once and named, numbers are exact, and the data set is never touched."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from data.images import pixel_key, read_image
from data.index import read_index
from data.layouts import read_data_set
from data.lists import read_csv
from data.preparation.report import moments
from data.records import ImageRecord
from tests.conftest import (
    REPOSITORY,
    MakePreset,
    copy_index,
    edit_index,
    refused,
    start_module,
    succeed,
    wait_until,
    write_toy_images,
)
from tests.odd_images import PROBLEMS, noise, saved, write_odd_images
from tests.proc import workers_of
from utils import UserError, write_text


def state(root: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class Checked:
    """One run of the command with two processes, and what it left."""

    def __init__(self, folder: Path) -> None:
        self.root, results = folder / "images", folder / "results"
        write_odd_images(self.root)
        self.before = state(self.root)
        roots = ("--data-root", self.root, "--results-root", results)
        self.printed = succeed("data.data_preprocess", *roots, "--num-workers", "2")
        self.dataset = results / "paper" / "dataset"
        self.index = read_index(self.preset(results))
        self.statistics = json.loads((self.dataset / "statistics.json").read_text())

    def preset(self, results: Path) -> config.Preset:
        settings = replace(config.PAPER.settings, data_root=self.root, results_root=results)
        return replace(config.PAPER, settings=settings)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked(tmp_path_factory.mktemp("awkward"))


def test_unreadable_files_are_named_with_their_reason(checked: Checked) -> None:
    found = {record.path: record.problem for record in checked.index.records if record.problem}
    assert found.keys() == PROBLEMS.keys()
    for path, reason in PROBLEMS.items():
        assert found[path].startswith(reason)
        assert any(line.startswith(path) and reason in line for line in checked.printed.splitlines())
    assert {row["path"]: row["problem"] for row in read_csv(checked.dataset / "unreadable.csv")} == found


def test_the_index_lists_every_image_file_in_order(checked: Checked) -> None:
    index = checked.index
    listed = read_data_set(checked.root).images
    assert [(record.path, record.label) for record in index.records] == [(image.path, image.label) for image in listed]
    assert "real/line\nbreak, é.png" in [record.path for record in index.records]
    sizes = {record.path: (record.format, record.mode, record.width, record.height) for record in index.records}
    assert sizes["fake/really a png.jpg"] == ("PNG", "RGB", 100, 50)
    assert sizes["real/palette.png"] == ("PNG", "P", 64, 64)
    assert sizes["real/cmyk.jpg"] == ("JPEG", "CMYK", 260, 250)
    assert sizes["fake/nested/deep/pixel.bmp"] == ("BMP", "RGB", 1, 1)
    assert sizes["real/grey16.PNG"] == ("PNG", "I;16", 130, 140)
    assert sizes["fake/truncated.jpg"][2:] == (0, 0)
    assert checked.statistics["fingerprint"] == index.fingerprint
    keys = {record.path: record.key for record in index.records}
    assert {path for path, key in keys.items() if not key} == PROBLEMS.keys()
    assert keys["real/palette.png"] == pixel_key(read_image(checked.root / "real" / "palette.png", 10**6))
    assert keys["fake/photo.JPG"] == keys["real/the same photo.jpg"]


DAMAGES = [  # a file of the index, and what happens to it
    ("index.csv", lambda text: "\n".join(text.splitlines()[:-4])),
    ("index.csv", lambda text: text.replace("PNG", "GIF", 1)),
    *(("statistics.json", lambda text, new=new: new) for new in ("{}", "")),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_index_is_refused_with_the_command_that_fixes_it(
    file: str, damage: Callable[[str], str], checked: Checked, tmp_path: Path
) -> None:
    preset, dataset = checked.preset(tmp_path), tmp_path / "paper" / "dataset"
    path = shutil.copytree(checked.dataset, dataset) / file
    assert read_index(preset) == checked.index
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as text:
        write_text(path, damage(text.read()))
    with pytest.raises(UserError, match=rf"{file} .*: run python -m data\.data_preprocess --preset paper") as refusal:
        read_index(preset)
    assert "\n" not in str(refusal.value)


def test_mean_and_deviation_are_those_of_the_pixels(checked: Checked) -> None:
    statistics = checked.statistics
    for label, measured in ((0, statistics["classes"]["fake"]), (1, statistics["classes"]["real"]), (None, statistics)):
        records = [r for r in checked.index.records if not r.problem and label in (None, r.label)]
        pixels = [np.asarray(read_image(checked.root / r.path, 10**9), np.float64).reshape(-1, 3) for r in records]
        values = np.concatenate(pixels) / 255
        assert measured["pixels"] == len(values)
        np.testing.assert_allclose(measured["mean"], values.mean(0), rtol=1e-10)
        np.testing.assert_allclose(measured["std"], values.std(0), rtol=1e-10)


def test_sums_stay_exact_where_floats_and_64_bits_do_not() -> None:
    sums = (*[255 * 10**12 - 1] * 3, *[255**2 * 10**12 - (2 * 255 - 1)] * 3)
    measured = moments([ImageRecord(width=10**6, height=10**6, sums=sums)])  # all pixels 255 but one, which is 254
    assert measured["mean"] == [(255 * 10**12 - 1) / (255 * 10**12)] * 3
    assert measured["std"] == pytest.approx([1e-6 / 255] * 3, rel=1e-9)


def test_the_report_has_the_numbers_of_the_authors(checked: Checked) -> None:
    fake = checked.statistics["classes"]["fake"]
    assert (fake["images"], fake["unreadable"]) == (14, 4)
    assert fake["mean_width"] == (1 + 5000 + 1 + 111 + 112 + 225 + 100 + 300 + 301 + 6000) / 10
    assert fake["modes"] == {"RGB": 9, "L": 1} and fake["formats"] == {"PNG": 6, "JPEG": 3, "BMP": 1}
    for table in ("classes", "channels", "sizes", "common_sizes", "formats"):
        assert (checked.dataset / f"{table}.md").read_text().splitlines()[0].startswith("| class |")
    rows = [(row["class"], row["format"], float(row["percent"])) for row in read_csv(checked.dataset / "formats.csv")]
    assert ("fake", "PNG", 60.0) in rows and ("real", "WEBP", 10.0) in rows
    with Image.open(checked.dataset / "sizes_and_formats.png") as figure:
        assert figure.format == "PNG" and figure.width > 1000


def test_other_files_are_counted_and_the_data_set_is_never_touched(checked: Checked) -> None:
    assert "Ignored, as hidden or without the ending of an image: 2 (fake/notes.txt, real/Thumbs.db)" in checked.printed
    assert state(checked.root) == checked.before


def test_the_number_of_workers_changes_nothing(checked: Checked, tmp_path: Path) -> None:
    succeed("data.data_preprocess", "--data-root", checked.root, "--results-root", tmp_path, "--num-workers", "0")
    written = sorted(path for path in checked.dataset.iterdir() if path.suffix in (".csv", ".md", ".json"))
    assert len(written) == 13
    for path in written:
        assert (tmp_path / "paper" / "dataset" / path.name).read_bytes() == path.read_bytes()


def test_a_class_without_a_readable_image_and_results_inside_the_data_are_refused(tmp_path: Path) -> None:
    write_toy_images(root := tmp_path / "images", images_per_class=1)
    (root / "real" / "0000.png").write_text("no image")
    for results, reason in (
        (tmp_path / "results", "none of the 1 real images under .* can be decoded .*not an image"),
        (root / "results", "never written to"),
    ):
        said = refused("data.data_preprocess", "--data-root", root, "--results-root", results, "--num-workers", "0")
        assert re.search(reason, said)
        assert not (results / "paper" / "dataset" / "index.csv").exists()
    assert not (root / "results").exists()
    (root / "real").rename(root / "REAL")
    said = refused("data.data_preprocess", "--data-root", root, "--results-root", tmp_path / "results")
    assert f"{root} has a folder REAL, to be called real: rename it" in said


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker processes in /proc")
@pytest.mark.parametrize(
    ("interrupt", "code", "said"),
    [(True, 130, "interrupted"), (False, 2, r"a worker process was killed.*--num-workers")],
    ids=["interrupt", "killed worker"],
)
def test_a_killed_worker_or_an_interrupt_ends_it_soon(tmp_path: Path, interrupt: bool, code: int, said: str) -> None:
    write_toy_images(root := tmp_path / "images", images_per_class=1)
    (root / "real" / "large.jpg").write_bytes(saved(noise(3000, 3000), "JPEG"))
    for number in range(1000):  # more than it can finish soon
        (root / "real" / f"{number}.jpg").symlink_to("large.jpg")
    roots = ("--data-root", root, "--results-root", tmp_path / "results")
    process = start_module("data.data_preprocess", *roots, "--num-workers", "2")
    try:
        wait_until(lambda: len(workers_of(process)) >= 2)
        time.sleep(0.5)
        if interrupt:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers_of(process)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)  # all the images would take minutes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and re.search(said, errors) and errors.count("\n") == 1


def test_the_command_starts_without_torch() -> None:
    command = [sys.executable, "-c", "import data.data_preprocess, sys; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_index_of_an_earlier_version_is_refused_with_the_command_that_fixes_it(
    toy_preset: MakePreset, indexed: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    edit_index(results, lambda text: "\n".join(line.rpartition(",")[0] for line in text.splitlines()) + "\n")  # no key
    with pytest.raises(UserError, match=r"by an earlier version: run python -m data\.data_preprocess --preset demo"):
        read_index(toy_preset(results_root=results))
