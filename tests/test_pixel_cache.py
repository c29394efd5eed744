"""The pixel cache gives the pixels of the files, survives whatever happens to it, and is never read when unsound."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import Preset
from data import cache_builder
from data.checks import check_images
from data.data_preprocess import preprocess
from data.datasets import ImageDataset, load_splits
from data.index import list_images
from data.loaders import build_loader
from data.pixel_cache import PIXELS, STRIP_WIDTH, VIEWS, Entry, cache_folder, pack_facts, pack_path, read_table
from tests.campaigns.full_disk import small_disk
from tests.conftest import REPOSITORY, TOY_FLAGS, run_module, succeed, write_toy_images
from utils import UserError, find_experiment

RNG = np.random.default_rng(3)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_odd_images(root: Path) -> None:
    """Sizes and modes at the edges: of a strip, of a patch, of what formats can hold."""
    for class_name in ("fake", "real"):
        (root / class_name).mkdir(parents=True)
    fake, real = root / "fake", root / "real"
    noise(1, 1).save(fake / "pixel.png")
    noise(5000, 1).save(fake / "row.png")
    noise(1, 5000).save(fake / "column.png")
    noise(STRIP_WIDTH - 1, 31).save(fake / "below a strip.png")
    noise(STRIP_WIDTH, 32).save(fake / "one strip.png")
    noise(2 * STRIP_WIDTH + 1, 33).save(fake / "above two strips.png")
    noise(300, 200).save(fake / "photo.jpg", quality=90, subsampling=2)
    noise(301, 203).save(fake / "progressive.jpg", progressive=True)
    Image.fromarray(np.tile(np.arange(6000, dtype=np.uint16).astype(np.uint8), (4700, 1))).save(fake / "28 MP.jpg")
    noise(150, 140).convert("L").save(real / "grey.jpg")
    noise(150, 140).convert("LA").save(real / "grey alpha.png")
    noise(64, 64).quantize(16).save(real / "palette.png", transparency=bytes([0, 50] + [255] * 14))
    noise(260, 250).convert("RGBA").save(real / "alpha.png")
    noise(260, 250).convert("CMYK").save(real / "cmyk.jpg")
    noise(90, 80).convert("1").save(real / "bits.png")
    Image.fromarray(RNG.integers(0, 65536, (140, 130), dtype=np.uint16)).save(real / "grey16.png")
    noise(120, 130).save(real / "line\nbreak, é.png")
    with open(os.fsencode(real) + b"/no text \xff.png", "wb") as file:
        noise(121, 130).save(file, "PNG")
    (real / "truncated.jpg").write_bytes((fake / "photo.jpg").read_bytes()[:9000])


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    write_odd_images(root)
    return root


@pytest.fixture
def preset(toy_preset: Callable[..., Preset], tmp_path: Path) -> Preset:
    """The toy preset with images, results and cache of its own."""
    write_toy_images(tmp_path / "images", images_per_class=10)
    roots = {"data_root": tmp_path / "images", "results_root": tmp_path / "results", "cache_root": tmp_path / "cache"}
    return toy_preset(**roots)


def flags(preset: Preset) -> list[str | Path]:
    settings = preset.settings
    roots = ("--data-root", settings.data_root, "--results-root", settings.results_root)
    return [*TOY_FLAGS, *roots, "--cache-root", settings.cache_root]


def files_of(preset: Preset, *endings: str) -> dict[str, bytes]:
    folder = cache_folder(preset)
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (endings or (".bin", ".csv"))
    }


def pack(preset: Preset, kind: str) -> Path:
    return next(cache_folder(preset).glob(f"{kind}_*.bin"))


def table_of(preset: Preset, kind: str, ending: str = ".csv") -> dict[str, Entry]:
    return read_table(pack_path(preset, kind).with_suffix(ending), pack_facts(preset, kind))


def without_cache(preset: Preset) -> Preset:
    return replace(preset, settings=replace(preset.settings, use_cache=False))


def views_of_all(
    preset: Preset, num_crops: int | None, epoch: int | None = None, **settings: object
) -> list[torch.Tensor]:
    """The views of every readable image, through a loader."""
    preset = replace(preset, settings=replace(preset.settings, **settings))
    index, _ = load_splits(preset)
    name = "standard_resnet" if num_crops is None else "glass_resnet"
    experiment = replace(find_experiment(preset, name), batch_size=3)
    if num_crops is not None:
        experiment = replace(experiment, num_crops=num_crops)
    loader = build_loader(preset, experiment, index, index.readable(range(len(index.records))))
    return [torch.cat(views) for views in list(zip(*loader, strict=True))[:-1]]


def assert_same(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(given) == len(expected) and all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


# --------------------------------------------------------------------------------------------- the same pixels
@pytest.mark.parametrize("patch_size", [32, 224])
def test_views_of_odd_images_are_the_same_with_and_without_a_cache(
    odd_data: Path, tmp_path: Path, toy_preset: Callable[..., Preset], patch_size: int
) -> None:
    roots = {"data_root": odd_data, "results_root": tmp_path / "results", "cache_root": tmp_path / "cache"}
    preset = toy_preset(patch_size=patch_size, valid_size=4, test_size=4, final_valid_fraction=0.1, **roots)
    preprocess(preset, "views")
    decoded = {K: views_of_all(preset, K, use_cache=False) for K in (None, 5)}
    assert len(decoded[5][1]) == 18 and decoded[5][1].shape[1:] == (5, 3, patch_size, patch_size)
    for K, expected in decoded.items():  # views from the cache, crops from the files
        assert_same(views_of_all(preset, K), expected)
    preprocess(preset, "pixels")
    for K, expected in decoded.items():
        assert_same(views_of_all(preset, K), expected)
        assert_same(views_of_all(preset, K, num_workers=2), expected)
    exact = views_of_all(preset, 5, exact_resize=True, use_cache=False)
    assert_same(views_of_all(preset, 5, exact_resize=True), exact)
    pack(preset, VIEWS).unlink()  # views from the pixels of the cache
    for K, expected in decoded.items():
        assert_same(views_of_all(preset, K), expected)


def test_training_crops_of_later_epochs_are_the_same_with_and_without_a_cache(preset: Preset) -> None:
    preprocess(preset, "pixels")
    index, _ = load_splits(preset)
    rows = list(range(len(index.records)))
    cached, decoded = (ImageDataset(which, rows, 32, 3, 100, 10**9) for which in (index, replace(index, cache=None)))
    for epoch in (None, 0, 7):
        items = [(row, epoch) for row in rows]
        assert_same(list(cached.__getitems__(items)), list(decoded.__getitems__(items)))


def test_a_training_ends_the_same_with_and_without_a_cache(preset: Preset) -> None:
    succeed("data.data_preprocess", *flags(preset), "--cache")
    run = ("model_training.glass_resnet_training", *flags(preset), "--epochs", "2", "--seeds", "1", "--batch-size", "8")
    said = succeed(*run, "--name", "with")
    assert "pixels_112 of 20 of 20 images; views_32 of 20 of 20 images" in said
    assert "Pixel cache" not in succeed(*run, "--name", "without", "--no-use-cache")
    folders = [preset.settings.results_root / "demo" / name / "seed_1" for name in ("with", "without")]
    assert len({(folder / "predictions.csv").read_bytes() for folder in folders}) == 1
    histories = [(folder / "history.csv").read_text().splitlines() for folder in folders]
    assert [line.split(",")[:4] for line in histories[0]] == [line.split(",")[:4] for line in histories[1]]


def test_what_preprocessing_finds_is_the_same_with_and_without_a_cache(
    odd_data: Path, tmp_path: Path, toy_preset: Callable[..., Preset]
) -> None:
    found = []
    for name, cache in (("without", None), ("with", "pixels"), ("again", "pixels")):
        preset = toy_preset(data_root=odd_data, results_root=tmp_path / name, cache_root=tmp_path / "cache")
        preprocess(preset, cache)
        folder = tmp_path / name / "demo" / "dataset"
        found.append({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"})
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------------------------- built once and for all
def test_a_second_build_decodes_nothing_and_changes_nothing(preset: Preset) -> None:
    preprocess(preset, "pixels")
    before = files_of(preset, ".bin", ".csv", ".json")
    spoil = {path: path.stat() for path in preset.settings.data_root.rglob("*.*")}
    for path, status in spoil.items():  # not images any more, though nobody could tell from outside
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    preprocess(preset, "pixels")
    assert files_of(preset, ".bin", ".csv", ".json") == before


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker processes in /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_build_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(preset: Preset, workers: int) -> None:
    for number in range(60):
        noise(900, 700).save(preset.settings.data_root / "fake" / f"more {number}.png")
    elsewhere = replace(preset, settings=replace(preset.settings, cache_root=preset.settings.cache_root / "whole"))
    preprocess(elsewhere, "pixels")
    kills = 0
    command = [sys.executable, "-m", "data.data_preprocess", *map(str, flags(preset)), "--cache"]
    while kills < 2:
        process = subprocess.Popen(
            [*command, "--num-workers", str(workers)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        journal = cache_folder(preset) / f"views_{preset.settings.patch_size}.journal"
        seen = len(table_of(preset, VIEWS, ".journal"))
        while process.poll() is None and len(table_of(preset, VIEWS, ".journal")) < seen + 9:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 1:  # as if the journal's last line had not been written out
            torn = journal.read_bytes()
            journal.write_bytes(torn[: len(torn) - 20])
    assert kills > 0
    succeed("data.data_preprocess", *flags(preset), "--cache")
    assert files_of(preset) == files_of(elsewhere)
    assert not list(cache_folder(preset).glob("*.journal"))


def test_an_unfinished_cache_is_said_and_not_used(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(preset, "pixels")
    expected = views_of_all(preset, 3, use_cache=False)
    for kind in (PIXELS, VIEWS):
        path = pack(preset, kind)
        path.with_suffix(".json").unlink()
        path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    assert_same(views_of_all(preset, 3), expected)
    assert capsys.readouterr().out.count("is unfinished and not used") == 2


# ------------------------------------------------------------------------------------------------ changed sources
def test_only_images_whose_file_changed_are_written_again(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(preset, "pixels")
    before, old = table_of(preset, PIXELS), pack(preset, PIXELS).read_bytes()
    fake, real = (preset.settings.data_root / name for name in ("fake", "real"))
    noise(50, 40).save(fake / "0000.png")  # another image
    os.utime(fake / "0002.png", ns=(1, 1))  # the same image, touched
    noise(60, 40).save(real / "new.png")
    (real / "0000.png").unlink()
    capsys.readouterr()
    preprocess(preset, "pixels")
    assert "still to be written" in capsys.readouterr().out
    after = table_of(preset, PIXELS)
    moved = {name for name in after if name not in before or after[name].offset != before[name].offset}
    assert moved == {"fake/0000.png", "fake/0002.png", "real/new.png"}
    assert "real/0000.png" not in after
    assert pack(preset, PIXELS).read_bytes()[: len(old)] == old  # whoever is reading sees the old pixels
    assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))


def test_training_decodes_an_image_that_changed_after_it_was_cached(
    preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    path = preset.settings.data_root / "fake" / "0000.png"
    noise(50, 40).save(path, "BMP")
    preprocess(preset, "pixels")
    before = views_of_all(preset, 3)
    noise(50, 40).save(path, "BMP")  # of the same size, which the index cannot tell
    capsys.readouterr()
    after = views_of_all(preset, 3)
    assert "pixels_112 of 19 of 20 images" in capsys.readouterr().out
    assert_same(after, views_of_all(preset, 3, use_cache=False))
    assert not torch.equal(after[0][0], before[0][0]) and torch.equal(after[0][1:], before[0][1:])


def test_a_file_that_is_gone_or_truncated_is_named_though_it_was_cached(preset: Preset) -> None:
    preprocess(preset, "pixels")
    gone, short = (preset.settings.data_root / "fake" / name for name in ("0000.png", "0001.jpg"))
    short.write_bytes(short.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"0001\.jpg is not what it was when the index was made"):
        views_of_all(preset, 3)
    gone.unlink()
    with pytest.raises(UserError, match=r"0000\.png is not what it was when the index was made"):
        views_of_all(preset, 3)


def test_a_file_is_made_anew_when_most_of_it_is_of_images_that_are_gone(preset: Preset) -> None:
    preprocess(preset, "pixels")
    for path in sorted((preset.settings.data_root / "real").iterdir())[3:]:
        path.unlink()
    for path in (preset.settings.data_root / "fake").iterdir():
        noise(40, 40).save(path)
    preprocess(preset, "pixels")
    anew = replace(preset, settings=replace(preset.settings, cache_root=preset.settings.cache_root / "anew"))
    preprocess(anew, "pixels")
    assert files_of(preset) == files_of(anew)


def test_another_patch_size_adds_views_and_leaves_the_pixels(preset: Preset) -> None:
    preprocess(preset, "pixels")
    before = files_of(preset, ".bin", ".csv", ".json")
    larger = replace(preset, settings=replace(preset.settings, patch_size=48))
    preprocess(larger, "pixels")
    after = files_of(preset, ".bin", ".csv", ".json")
    assert after.keys() - before.keys() == {"views_48.bin", "views_48.csv", "views_48.json"}
    assert {name: after[name] for name in before} == before


# -------------------------------------------------------------------------------------------- damaged, foreign, torn
def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "its size differs"),
    "a flipped bit": (flip_a_byte, "its time of modification differs"),
    "another table": (lambda path: flip_a_byte(path.with_suffix(".csv")), "its table differs"),
    "no table": (lambda path: path.with_suffix(".csv").unlink(), "its table differs"),
    "a torn seal": (lambda path: path.with_suffix(".json").write_text('{"format": 1,'), "seal that cannot be read"),
    "no object": (lambda path: path.with_suffix(".json").write_text("[]"), "seal that cannot be read"),
}


@pytest.mark.parametrize("kind", [PIXELS, VIEWS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_named_never_read_and_mended(preset: Preset, kind: str, damage: str) -> None:
    preprocess(preset, "pixels")
    whole = files_of(preset)
    hurt, reason = DAMAGE[damage]
    hurt(pack(preset, kind))
    with pytest.raises(UserError, match=rf"{kind}_.*{reason}.*--cache checks and mends it"):
        load_splits(preset)
    load_splits(without_cache(preset))
    preprocess(preset, "pixels")
    assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))
    if damage in ("truncated", "a torn seal", "no object"):  # what is sound stays where it is
        table = table_of(preset, kind)
        assert len(table) == 20 and len(files_of(preset)) == len(whole)


def test_a_copied_cache_is_checked_once_and_then_trusted(preset: Preset) -> None:
    preprocess(preset, "pixels")
    whole = files_of(preset)
    folder = cache_folder(preset)
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    with pytest.raises(UserError, match="time of modification"):
        load_splits(preset)
    preprocess(preset, "pixels")
    assert files_of(preset) == whole
    load_splits(preset)


def test_a_cache_of_another_data_root_or_format_is_named(preset: Preset, tmp_path: Path) -> None:
    preprocess(preset, "pixels")
    other = replace(preset, settings=replace(preset.settings, data_root=tmp_path / "other"))
    shutil.copytree(preset.settings.data_root, tmp_path / "other")
    preprocess(other, None)
    shutil.copytree(cache_folder(preset), cache_folder(other))
    with pytest.raises(UserError, match=r"has data_root = .*images, not .*other"):
        load_splits(other)
    seal = pack(preset, PIXELS).with_suffix(".json")
    preprocess(preset, None)
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="has format = 2, not 1"):
        load_splits(preset)


def test_an_image_that_cannot_be_decoded_is_left_out_and_remembered(preset: Preset) -> None:
    path = preset.settings.data_root / "fake" / "0001.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    preprocess(preset, "pixels")
    before = files_of(preset, ".bin", ".csv", ".json")
    assert json.loads(before["pixels_112.json"])["images"] == 19
    preprocess(preset, "pixels")
    assert files_of(preset, ".bin", ".csv", ".json") == before
    assert load_splits(preset)[0].records[1].problem.startswith("image file is truncated")


def test_a_pack_is_not_read_under_what_would_decode_or_resize_otherwise(preset: Preset) -> None:
    preprocess(preset, "pixels")
    path = pack(preset, VIEWS)
    seal = json.loads(path.with_suffix(".json").read_text())
    assert "libjpeg_turbo" in seal["decoders"] and seal["resize"].startswith("torch ")
    path.with_suffix(".json").write_text(json.dumps(seal | {"resize": "torch 1.0, DEFAULT"}))
    with pytest.raises(UserError, match=r"has resize = torch 1\.0, DEFAULT, not torch "):
        load_splits(preset)


# ------------------------------------------------------------------------------------- while somebody is reading
def reader_of(preset: Preset) -> tuple[ImageDataset, list[tuple[int, None]]]:
    index, _ = load_splits(preset)
    rows = list(range(len(index.records)))
    return ImageDataset(index, rows, 32, 3, 0, 10**9), [(row, None) for row in rows]


def test_a_cache_made_anew_before_a_process_opens_it_is_not_read_but_said(
    preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(preset, "pixels")
    expected = list(reader_of(without_cache(preset))[0].__getitems__(reader_of(preset)[1]))
    here, items = reader_of(preset)
    sent = pickle.dumps(here)  # as to a worker process
    shutil.rmtree(cache_folder(preset))
    noise(90, 80).save(preset.settings.data_root / "fake" / "000.png")  # all offsets move
    for build in (lambda: None, lambda: preprocess(preset, "pixels")):
        build()
        capsys.readouterr()
        assert_same(list(pickle.loads(sent).__getitems__(items)), expected)
        assert capsys.readouterr().err.count("is not what it was when this began: decoding the files") == 2
        assert_same(list(here.__getitems__(items)), expected)  # this process has the old file still
        assert capsys.readouterr().err == ""


def test_whoever_reads_sees_the_old_bytes_whatever_is_built_meanwhile(preset: Preset) -> None:
    real = preset.settings.data_root / "real"
    preprocess(preset, "pixels")
    reader, items = reader_of(preset)
    expected = [part.clone() for part in reader.__getitems__(items)]
    last = sorted(real.iterdir())[-1]
    last.unlink()
    preprocess(preset, "pixels")
    noise(64, 64).save(last.with_name("0099.png"))
    preprocess(preset, "pixels")
    for path in sorted(real.iterdir())[:8]:
        path.unlink()
    noise(1, 1).save(real / "0100.png")
    preprocess(preset, "pixels")
    assert_same(list(reader.__getitems__(items)), expected)


def test_a_build_killed_before_its_seal_ends_with_the_same_bytes_though_its_last_image_is_damaged(
    preset: Preset,
) -> None:
    photo = preset.settings.data_root / "fake" / "0001.jpg"
    (preset.settings.data_root / "real" / "zz.jpg").write_bytes(photo.read_bytes()[:-300])
    preprocess(preset, "pixels")
    whole = files_of(preset)
    for kind in (PIXELS, VIEWS):
        pack(preset, kind).with_suffix(".json").unlink()
        pack(preset, kind).with_suffix(".journal").write_text("began at byte 0\n")
    preprocess(preset, "pixels")
    assert files_of(preset) == whole


def test_an_image_saved_anew_while_the_cache_is_planned_is_read_all_the_same(preset: Preset) -> None:
    files = list_images(preset.settings.data_root)
    with cache_builder.one_builder(preset):
        packs = cache_builder.plan_cache(preset, (PIXELS, VIEWS), files)
        for writer in packs.values():
            writer.begin()
        noise(77, 55).save(preset.settings.data_root / "fake" / "0000.png")
        images = check_images(preset, files, packs)
        for writer in packs.values():
            writer.seal()
    assert not any(image.record.problem for image in images)
    preprocess(preset, "pixels")
    assert table_of(preset, PIXELS)["fake/0000.png"].image.record.width == 77
    assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))


@pytest.mark.parametrize("change", [(",PNG,", ',"NG,'), (",0,", ",99999999999999999999,"), ("fake/0002", "fake/0003")])
def test_a_damaged_line_of_a_table_is_not_believed(preset: Preset, change: tuple[str, str]) -> None:
    preprocess(preset, "pixels")
    index = (preset.settings.results_root / "demo" / "dataset" / "index.csv").read_bytes()
    statistics = (preset.settings.results_root / "demo" / "dataset" / "statistics.json").read_bytes()
    for kind in (PIXELS, VIEWS):
        table = pack(preset, kind).with_suffix(".csv")
        table.write_text(table.read_text().replace(*change, 1))
    preprocess(preset, "pixels")
    assert (preset.settings.results_root / "demo" / "dataset" / "index.csv").read_bytes() == index
    assert (preset.settings.results_root / "demo" / "dataset" / "statistics.json").read_bytes() == statistics
    assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))


def test_a_refused_build_keeps_what_there_was(preset: Preset) -> None:
    preprocess(preset, "pixels")
    before = files_of(preset, ".bin", ".csv", ".json")
    for path in sorted(preset.settings.data_root.rglob("*.*"))[5:]:
        os.utime(path, ns=(1, 1))
    limited = replace(preset, settings=replace(preset.settings, cache_limit_gb=1e-6))
    with pytest.raises(UserError, match="more than cache_limit_gb"):
        preprocess(limited, "pixels")
    assert files_of(preset, ".bin", ".csv", ".json") == before


def test_a_linked_data_root_has_the_same_cache(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(preset.settings.data_root)
    linked = replace(preset, settings=replace(preset.settings, data_root=tmp_path / "link"))
    assert cache_folder(linked) == cache_folder(preset)


# ------------------------------------------------------------------------------------------------- space and company
def test_bytes_and_free_space_are_said_first_and_too_little_is_refused(
    preset: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [Image.open(preset.settings.data_root / name).size for name, _ in list_images(preset.settings.data_root)]
    stored = sum(3 * width * height for width, height in images) + len(images) * 2 * 3 * 32**2
    needed = stored + 2 * len(images) * cache_builder.BYTES_OF_A_LINE
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, needed - 1))
    with pytest.raises(UserError, match=r"needs 0\.\d MB more and 0\.\d MB are free.*--cache views takes less"):
        preprocess(preset, "pixels")
    assert not [*cache_folder(preset).glob("*.bin"), *preset.settings.results_root.glob("demo/dataset/*")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, needed))
    preprocess(preset, "pixels")
    assert "Pixel cache" in capsys.readouterr().out
    assert sum(path.stat().st_size for path in cache_folder(preset).glob("*.bin")) == stored


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="only root mounts a small file system")
def test_a_disk_that_fills_up_while_it_is_written_loses_nothing(preset: Preset, tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 2))
        except subprocess.CalledProcessError:
            pytest.skip("may not mount a small file system here")
        preset = replace(preset, settings=replace(preset.settings, cache_root=disk))
        done = run_module("data.data_preprocess", *flags(preset), "--cache", "--patch-size", "224")
        assert done.returncode == 2 and "make room" in done.stderr and done.stderr.count("\n") == 1
        files = list_images(preset.settings.data_root)
        with cache_builder.one_builder(preset):
            packs = cache_builder.plan_cache(preset, (PIXELS, VIEWS), files)
            for writer in packs.values():
                writer.begin()
            filler = disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
                check_images(preset, files, packs)
        filler.unlink()
        assert 0 < len(table_of(preset, PIXELS, ".journal")) < 20
        preprocess(preset, "pixels")
        assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))


def test_a_second_builder_says_who_is_at_it(preset: Preset) -> None:
    with cache_builder.one_builder(preset):
        done = run_module("data.data_preprocess", *flags(preset), "--cache")
        assert done.returncode == 2
        assert f"is in use by process {os.getpid()} on" in done.stderr and done.stderr.count("\n") == 1
    succeed("data.data_preprocess", *flags(preset), "--cache")


def test_a_cache_inside_the_data_root_is_refused(preset: Preset) -> None:
    inside = replace(preset, settings=replace(preset.settings, cache_root=preset.settings.data_root / "cache"))
    with pytest.raises(UserError, match="never written to"):
        preprocess(inside, "pixels")
    assert not (preset.settings.data_root / "cache").exists()


def test_a_worker_process_is_sent_numbers_not_names_nor_pixels(preset: Preset) -> None:
    preprocess(preset, "pixels")
    index, _ = load_splits(preset)
    rows = [*range(20)] * 500
    dataset = ImageDataset(index, rows, 32, 3, 0, 10**9)
    dataset[0, None]  # maps the files here, which must not travel
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 80 * len(rows)
    assert_same(list(copy[7, 1]), list(dataset[7, 1]))
    assert list(copy.names) == [index.records[row].path for row in rows]
