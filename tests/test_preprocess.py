"""Preprocessing: every file is checked once and named, numbers are exact, and the data set is never touched."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from data import checks
from data.images import read_image
from data.index import ImageRecord, Index, list_images, read_index
from data.report import moments
from tests.conftest import start_module, workers_of
from utils import UserError, write_json, write_text

REPOSITORY = Path(__file__).parents[1]
RNG = np.random.default_rng(606)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def jpeg_bytes(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise(width, height).save(buffer, "JPEG")
    return buffer.getvalue()


def write_awkward_images(root: Path) -> None:
    """What real folders hold: damaged files, wrong endings, rare modes, odd names."""
    fake, real = root / "fake", root / "real"
    (fake / "nested" / "deep").mkdir(parents=True)
    real.mkdir()
    noise(300, 200).save(fake / "plain.jpg")
    noise(100, 50).save(fake / "really a png.jpg", format="PNG")
    noise(64, 64).quantize(16).save(fake / "palette.png", transparency=bytes([0, 50] + [255] * 14))
    noise(90, 80).convert("CMYK").save(fake / "cmyk.JPG")
    noise(1, 1).save(fake / "nested" / "deep" / "pixel.bmp")
    noise(20, 10).save(fake / "line\nbreak, é.png")
    with open(os.fsencode(fake) + b"/no text \xff.png", "wb") as file:
        noise(20, 20).save(file, "PNG")
    (fake / "text.jpg").write_text("hello")
    (fake / "empty.png").write_bytes(b"")
    (fake / "truncated.jpg").write_bytes(jpeg_bytes(400, 400)[:20000])
    (fake / "gone.jpg").symlink_to("nowhere.jpg")
    (fake / "notes.txt").write_text("no image")
    Image.fromarray(RNG.integers(0, 65536, (40, 30), dtype=np.uint16)).save(real / "grey16.PNG")
    noise(500, 300).convert("RGBA").save(real / "alpha.webp", lossless=True)
    noise(50, 60).convert("1").save(real / "bits.tiff")
    noise(640, 480).save(real / "photo.jpeg")
    (real / "Thumbs.db").write_bytes(b"\0")


def state(root: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def door(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.data_preprocess", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, **options)


class Checked:
    """One run of the door with two processes, and what it left."""

    def __init__(self, folder: Path) -> None:
        self.root, self.results = folder / "images", folder / "results"
        write_awkward_images(self.root)
        self.before = state(self.root)
        self.done = door("--data-root", self.root, "--results-root", self.results, "--num-workers", 2)
        self.dataset = self.results / "paper" / "dataset"

    def index(self) -> Index:
        settings = replace(config.PAPER.settings, data_root=self.root, results_root=self.results)
        return read_index(replace(config.PAPER, settings=settings))

    def statistics(self) -> dict:
        return json.loads((self.dataset / "statistics.json").read_text())


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    run = Checked(tmp_path_factory.mktemp("awkward"))
    assert run.done.returncode == 0, run.done.stderr
    return run


PROBLEMS = {
    "fake/text.jpg": "not an image",
    "fake/empty.png": "not an image",
    "fake/truncated.jpg": "image file is truncated",
    "fake/gone.jpg": "No such file or directory",
}


def test_unreadable_files_are_named_with_their_reason(checked: Checked) -> None:
    found = {record.path: record.problem for record in checked.index().records if record.problem}
    assert found.keys() == PROBLEMS.keys()
    for path, reason in PROBLEMS.items():
        assert found[path].startswith(reason)
        assert any(line.startswith(path) and reason in line for line in checked.done.stdout.splitlines())
    with open(checked.dataset / "unreadable.csv", newline="") as file:
        assert {row["path"]: row["problem"] for row in csv.DictReader(file)} == found


def test_the_index_lists_every_image_file_in_order(checked: Checked) -> None:
    index = checked.index()
    assert [(record.path, record.label) for record in index.records] == list_images(checked.root)
    assert "fake/line\nbreak, é.png" in [record.path for record in index.records]
    sizes = {record.path: (record.format, record.mode, record.width, record.height) for record in index.records}
    assert sizes["fake/really a png.jpg"] == ("PNG", "RGB", 100, 50)
    assert sizes["fake/palette.png"] == ("PNG", "P", 64, 64)
    assert sizes["fake/cmyk.JPG"] == ("JPEG", "CMYK", 90, 80)
    assert sizes["fake/nested/deep/pixel.bmp"] == ("BMP", "RGB", 1, 1)
    assert sizes["real/grey16.PNG"] == ("PNG", "I;16", 30, 40)
    assert sizes["fake/truncated.jpg"][2:] == (0, 0)
    assert checked.statistics()["fingerprint"] == index.fingerprint


def without_rows(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-4])


DAMAGES = {  # what happens to a file of the index, and what is said of it
    "index.csv": [without_rows, lambda text: text[:-30], lambda text: text.replace("PNG", "GIF", 1), lambda text: ""],
    "statistics.json": [lambda text, new=new: new for new in ("{}", "[]", '{"data_root": 5}', "{", "")],
}


@pytest.mark.parametrize(("file", "damage"), [(file, damage) for file in DAMAGES for damage in DAMAGES[file]])
def test_a_damaged_index_is_one_sentence_with_the_command_that_mends_it(
    file: str, damage: Callable[[str], str], checked: Checked, tmp_path: Path
) -> None:
    shutil.copytree(checked.dataset, tmp_path / "paper" / "dataset")
    settings = replace(config.PAPER.settings, data_root=checked.root, results_root=tmp_path)
    preset, path = replace(config.PAPER, settings=settings), tmp_path / "paper" / "dataset" / file
    assert read_index(preset) == checked.index()
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as text:
        write_text(path, damage(text.read()))
    with pytest.raises(UserError, match=rf"{file} .*: run python -m data\.data_preprocess --preset paper") as refusal:
        read_index(preset)
    assert "\n" not in str(refusal.value)


def test_an_index_without_its_digest_is_of_an_earlier_version(checked: Checked, tmp_path: Path) -> None:
    shutil.copytree(checked.dataset, tmp_path / "paper" / "dataset")
    statistics = checked.statistics()
    del statistics["index_sha256"]
    write_json(tmp_path / "paper" / "dataset" / "statistics.json", statistics)
    settings = replace(config.PAPER.settings, data_root=checked.root, results_root=tmp_path)
    with pytest.raises(UserError, match=r"by an earlier version: run python -m data\.data_preprocess"):
        read_index(replace(config.PAPER, settings=settings))


def test_mean_and_deviation_are_those_of_the_pixels(checked: Checked) -> None:
    statistics = checked.statistics()
    for label, measured in ((0, statistics["classes"]["fake"]), (1, statistics["classes"]["real"]), (None, statistics)):
        records = [r for r in checked.index().records if not r.problem and label in (None, r.label)]
        pixels = [np.asarray(read_image(checked.root / r.path, 10**9), np.float64).reshape(-1, 3) for r in records]
        values = np.concatenate(pixels) / 255
        assert measured["pixels"] == len(values)
        np.testing.assert_allclose(measured["mean"], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(measured["std"], values.std(0), rtol=1e-11)


def test_sums_stay_exact_where_floats_and_64_bits_do_not() -> None:
    record = ImageRecord("fake/a.png", 0, 1, "", "PNG", "RGB", 10**6, 10**6, "")
    sums = [*[255 * 10**12 - 1] * 3, *[255**2 * 10**12 - (2 * 255 - 1)] * 3]
    measured = moments([record], [sums])  # all pixels 255 but one, which is 254
    assert measured["mean"] == [(255 * 10**12 - 1) / (255 * 10**12)] * 3
    assert measured["std"] == pytest.approx([1e-6 / 255] * 3, rel=1e-9)


def test_the_report_holds_what_the_authors_does(checked: Checked) -> None:
    fake = checked.statistics()["classes"]["fake"]
    assert (fake["images"], fake["unreadable"]) == (11, 4)
    assert fake["mean_width"] == (300 + 100 + 64 + 90 + 1 + 20 + 20) / 7
    assert fake["mean_height"] == (200 + 50 + 64 + 80 + 1 + 10 + 20) / 7
    assert fake["modes"] == {"RGB": 5, "CMYK": 1, "P": 1}
    assert fake["formats"] == {"PNG": 4, "JPEG": 2, "BMP": 1}
    assert fake["megapixels"]["min"] == 1e-6 and fake["megapixels"]["max"] == 0.06
    for table in ("classes", "channels", "sizes", "common_sizes", "formats"):
        assert (checked.dataset / f"{table}.csv").stat().st_size
        assert (checked.dataset / f"{table}.md").read_text().splitlines()[0].startswith("| class |")
    with open(checked.dataset / "formats.csv", newline="") as file:
        rows = [(row["class"], row["format"], float(row["percent"])) for row in csv.DictReader(file)]
    assert ("fake", "PNG", 400 / 7) in rows and ("real", "WEBP", 25.0) in rows
    with Image.open(checked.dataset / "sizes_and_formats.png") as figure:
        assert figure.format == "PNG" and figure.width > 1000


def test_files_that_are_no_images_by_their_ending_are_counted(checked: Checked) -> None:
    assert "Passed over: 2 files whose ending is no image's (fake/notes.txt, real/Thumbs.db)" in checked.done.stdout


def test_the_data_set_is_never_touched(checked: Checked) -> None:
    assert state(checked.root) == checked.before


@pytest.mark.parametrize("workers", [0, 1])
def test_the_number_of_workers_changes_nothing(checked: Checked, tmp_path: Path, workers: int) -> None:
    done = door("--data-root", checked.root, "--results-root", tmp_path, "--num-workers", workers)
    assert done.returncode == 0, done.stderr
    written = sorted(path for path in checked.dataset.iterdir() if path.suffix != ".png")
    assert len(written) == 13
    for path in written:
        assert (tmp_path / "paper" / "dataset" / path.name).read_bytes() == path.read_bytes()


def test_only_the_first_unreadable_files_are_printed(tmp_path: Path) -> None:
    for class_name in ("fake", "real"):
        (tmp_path / "images" / class_name).mkdir(parents=True)
        noise(8, 8).save(tmp_path / "images" / class_name / "good.png")
    for number in range(25):
        (tmp_path / "images" / "real" / f"junk_{number:02d}.jpg").write_bytes(b"junk")
    done = door("--data-root", tmp_path / "images", "--results-root", tmp_path / "results", "--num-workers", 0)
    unreadable = tmp_path / "results" / "paper" / "dataset" / "unreadable.csv"
    assert done.stdout.count("junk_") == 20 and f"5 more in {unreadable}" in done.stdout
    assert unreadable.read_text().count("junk_") == 25


def one_image_a_class(root: Path) -> Path:
    for class_name in ("fake", "real"):
        (root / class_name).mkdir(parents=True)
        (root / class_name / "a.jpg").write_bytes(jpeg_bytes(30, 20))
    return root


def test_a_class_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    root = one_image_a_class(tmp_path / "images")
    (root / "real" / "a.jpg").write_text("no image")
    done = door("--data-root", root, "--results-root", tmp_path / "results", "--num-workers", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "none of the 1 images under" in done.stderr and "not an image" in done.stderr
    assert not (tmp_path / "results" / "paper" / "dataset" / "index.csv").exists()


def test_images_above_the_pixel_limit_are_not_decoded(tmp_path: Path) -> None:
    root = one_image_a_class(tmp_path / "images")
    noise(40, 20).save(root / "fake" / "b.png")
    results = tmp_path / "results"
    done = door("--data-root", root, "--results-root", results, "--max-image-pixels", 600, "--num-workers", 0)
    assert done.returncode == 0, done.stderr
    assert "fake/b.png  40x20 pixels are more than max_image_pixels = 600" in done.stdout


def test_results_inside_the_data_root_are_refused(tmp_path: Path) -> None:
    root = one_image_a_class(tmp_path)
    done = door("--data-root", root, "--results-root", root / "results")
    assert done.returncode == 2 and "never written to" in done.stderr
    assert not (root / "results").exists()


def test_a_results_root_that_cannot_be_made_is_said_before_any_checking(tmp_path: Path) -> None:
    root = one_image_a_class(tmp_path / "images")
    (tmp_path / "file").write_text("in the way")
    done = door("--data-root", root, "--results-root", tmp_path / "file")
    assert done.returncode == 2 and "--results-root" in done.stderr and done.stderr.count("\n") == 1


def test_a_disk_that_is_full_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    root = one_image_a_class(tmp_path / "images")
    for number in range(20):
        (root / "real" / f"{number}.jpg").symlink_to("a.jpg")
    arguments = ("--data-root", root, "--results-root", tmp_path / "results", "--num-workers", 0)
    done = door(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    index = tmp_path / "results" / "paper" / "dataset" / "index.csv"
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {index} cannot be written (") and "make room" in done.stderr
    assert list(index.parent.iterdir()) == []


def test_memory_that_runs_out_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = one_image_a_class(tmp_path)

    def no_memory(_: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", no_memory)
    with pytest.raises(UserError, match="not enough memory"):
        checks.check_image(("fake/a.jpg", 0), [], root, 10**9, 224)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lock(contextlib.AbstractContextManager):
        entered = 0

        def __exit__(self, *_: object) -> None:
            self.entered += 1

    root, lock = one_image_a_class(tmp_path), Lock()
    monkeypatch.setattr(checks, "_large_images", lock)
    for limit, entered in ((600, 0), (599, 1)):  # the image has 30 x 20 pixels
        monkeypatch.setattr(checks, "LARGE_PIXELS", limit)
        checks.check_image(("fake/a.jpg", 0), [], root, 10**9, 224)
        assert lock.entered == entered


@contextlib.contextmanager
def busy_door(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The door at work on more images than it can finish soon, in a process group of its own."""
    root = one_image_a_class(tmp_path / "images")
    (root / "real" / "large.jpg").write_bytes(jpeg_bytes(3000, 3000))
    for number in range(1000):
        (root / "real" / f"{number}.jpg").symlink_to("large.jpg")
    roots = ("--data-root", root, "--results-root", tmp_path / "results")
    process = start_module("data.data_preprocess", *roots, "--num-workers", "2")
    try:
        deadline = time.monotonic() + 30
        while len(workers_of(process)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker processes in /proc")
def test_a_killed_worker_becomes_one_sentence(tmp_path: Path) -> None:
    with busy_door(tmp_path) as process:
        os.kill(workers_of(process)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "a worker process was killed" in errors and "--num-workers" in errors and errors.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker processes in /proc")
def test_an_interrupt_ends_it_promptly_and_quietly(tmp_path: Path) -> None:
    with busy_door(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)  # all the images would take minutes
    assert process.returncode == 130 and "Traceback" not in errors


def test_the_door_starts_without_torch() -> None:
    command = [sys.executable, "-c", "import data.data_preprocess, sys; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
