"""The pixel cache gives the pixels of the files, and whatever happens to it costs time only."""

import functools
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import PIL.features
import pytest
import torch
from PIL import Image

from config import Preset
from data.cache.builder import building
from data.cache.pixel_cache import PIXELS, VIEWS, cache_folder, layout_folder, mapped_files
from data.data_preprocess import preprocess
from data.datasets import ImageDataset, load_splits
from data.loaders import build_loader
from data.views import ViewSettings
from tests.conftest import PREPROCESS_FLAGS, REPOSITORY, MakePreset, refused, start_module, succeed, write_toy_images
from tests.odd_images import noise, write_odd_images
from utils import UserError, find_experiment


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    write_odd_images(root)
    return root


@pytest.fixture
def preset(toy_preset: MakePreset, tmp_path: Path) -> Preset:
    """The toy preset with images, results and cache of its own."""
    write_toy_images(tmp_path / "images", images_per_class=10)
    roots = {"data_root": tmp_path / "images", "results_root": tmp_path / "results", "cache_root": tmp_path / "cache"}
    return toy_preset(**roots)


def changed(preset: Preset, **settings: object) -> Preset:
    return replace(preset, settings=replace(preset.settings, **settings))


def flags(preset: Preset) -> list[str | Path]:
    settings = preset.settings
    roots = ("--data-root", settings.data_root, "--results-root", settings.results_root)
    return [*PREPROCESS_FLAGS, *roots, "--cache-root", settings.cache_root]


def files_of(preset: Preset) -> dict[str, tuple[bytes, int]]:
    """Content and time of modification of every file of an image, by its path in the cache."""
    folder = cache_folder(preset.settings)
    files = [path for path in folder.glob("*/*/*") if not path.name.endswith(".tmp")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(preset: Preset) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_of(preset).items()}


def dataset_files(preset: Preset) -> dict[str, bytes]:
    folder = preset.settings.results_root / "demo" / "dataset"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".json", ".md")}


def views_of_all(preset: Preset, num_crops: int, **settings: object) -> list[torch.Tensor]:
    """The views of every readable image, through a loader."""
    preset = changed(preset, **settings)
    index, _ = load_splits(preset)
    experiment = replace(find_experiment(preset, "glass_resnet" if num_crops else "standard_resnet"), batch_size=3)
    if num_crops:
        experiment = replace(experiment, num_crops=num_crops)
    loader = build_loader(preset.settings, experiment, index, index.readable(range(len(index.records))))
    return [torch.cat(views) for views in list(zip(*loader, strict=True))[:-1]]


def assert_same(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(given) == len(expected) and all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize(("patch_size", "reencode_jpeg"), [(32, 60), pytest.param(224, 0, marks=pytest.mark.slow)])
def test_views_and_statistics_of_odd_images_are_the_same_with_and_without_a_cache(
    odd_data: Path, tmp_path: Path, toy_preset: MakePreset, patch_size: int, reencode_jpeg: int
) -> None:
    roots = {"data_root": odd_data, "results_root": tmp_path / "results", "cache_root": tmp_path / "cache"}
    sizes = {"patch_size": patch_size, "valid_size": 4, "test_size": 4, "final_valid_fraction": 0.1}
    preset = toy_preset(reencode_jpeg=reencode_jpeg, **sizes, **roots)
    preprocess(preset)
    found = dataset_files(preset)
    preprocess(preset, (VIEWS,))
    assert dataset_files(preset) == found
    decoded = {K: views_of_all(preset, K, use_cache=False) for K in (0, 5)}
    assert len(decoded[5][1]) == 20 and decoded[5][1].shape[1:] == (5, 3, patch_size, patch_size)
    for K, expected in decoded.items():  # views from the cache, crops from the files
        assert_same(views_of_all(preset, K), expected)
    preprocess(preset, (PIXELS,))
    assert dataset_files(preset) == found
    for K, expected in decoded.items():
        assert_same(views_of_all(preset, K), expected)
        assert_same(views_of_all(preset, K, num_workers=2), expected)
    exact = views_of_all(preset, 5, exact_resize=True, use_cache=False)
    assert_same(views_of_all(preset, 5, exact_resize=True), exact)
    shutil.rmtree(layout_folder(preset.settings, VIEWS))  # views from the pixels of the cache
    for K, expected in decoded.items():
        assert_same(views_of_all(preset, K), expected)


def test_crops_of_every_epoch_are_the_same_with_a_cache_without_one_and_when_it_is_deleted(preset: Preset) -> None:
    preprocess(preset, (PIXELS,))
    index, _ = load_splits(preset)
    views = ViewSettings(32, num_crops=3, seed=100)
    cached, decoded = (ImageDataset(which, range(20), views, 10**9) for which in (index, replace(index, cache=None)))
    assert len(pickle.dumps(cached)) < 300 * 20  # neither pixels nor open files travel to a worker process
    expected = {epoch: decoded.__getitems__([(row, epoch) for row in range(20)]) for epoch in (None, 0, 7)}
    for _ in range(2):
        for epoch, of_epoch in expected.items():
            sent = pickle.loads(pickle.dumps(cached))
            assert_same(list(sent.__getitems__([(row, epoch) for row in range(20)])), list(of_epoch))
        shutil.rmtree(cache_folder(preset.settings), ignore_errors=True)
        mapped_files.cache_clear()  # as in another process


def test_a_second_build_decodes_nothing_and_changes_nothing(preset: Preset) -> None:
    preprocess(preset, (PIXELS,))
    views = [path for path in layout_folder(preset.settings, VIEWS).glob("*/*") if b'"JPEG"' in path.read_bytes()]
    for path in views:  # what is not decoded is reported as it was found when it was written
        path.write_bytes(path.read_bytes().replace(b'"JPEG"', b'"OPEN"'))
    before = files_of(preset)
    preprocess(preset, (PIXELS,))
    assert files_of(preset) == before
    assert dataset_files(preset)["index.csv"].count(b",OPEN,") == len(views) == 10


def test_a_killed_build_resumes_and_gives_the_same_files(preset: Preset) -> None:
    for number in range(40):
        noise(900, 700).save(preset.settings.data_root / "fake" / f"more {number}.png")
    elsewhere = changed(preset, cache_root=preset.settings.cache_root / "whole")
    preprocess(elsewhere, (PIXELS,))
    process = start_module("data.data_preprocess", *flags(preset), "--cache", "--num-workers", "2")
    while process.poll() is None and len(files_of(preset)) < 9:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    seen = files_of(preset)
    next(layout_folder(preset.settings, PIXELS).glob("*")).joinpath(".left over.1.tmp").write_bytes(b"torn")
    succeed("data.data_preprocess", *flags(preset), "--cache")
    assert seen.items() <= files_of(preset).items()  # what was there was not written again
    assert contents(preset) == contents(elsewhere) and not list(cache_folder(preset.settings).rglob("*.tmp"))


def test_only_new_images_and_views_of_another_size_are_written(preset: Preset) -> None:
    preprocess(preset, (PIXELS,))
    before = files_of(preset)
    fake, real = (preset.settings.data_root / name for name in ("fake", "real"))
    noise(50, 40).save(fake / "0000.png")  # another image
    os.utime(fake / "0002.png", ns=(1, 1))  # the same image, touched
    (fake / "0004.png").rename(fake / "renamed.png")
    shutil.copy(fake / "0006.png", fake / "copied.png")
    noise(60, 40).save(real / "new.png")
    (real / "0000.png").unlink()
    preprocess(preset, (PIXELS,))
    after = files_of(preset)
    assert before.items() <= after.items()  # whoever is reading sees the old pixels
    assert len(after) == len(before) + 4  # pixels and views of two images
    assert_same(views_of_all(preset, 3), views_of_all(preset, 3, use_cache=False))
    preprocess(changed(preset, patch_size=48), (PIXELS,))
    assert after.items() <= files_of(preset).items()
    assert {name.partition("/")[0][:9] for name in files_of(preset).keys() - after.keys()} == {"views_48_"}


@pytest.mark.parametrize("kind", [PIXELS, VIEWS])
def test_a_truncated_file_is_named_once_never_used_and_written_again(
    preset: Preset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(preset, (PIXELS,))
    whole = contents(preset)
    path = next(layout_folder(preset.settings, kind).glob("*/*"))
    os.truncate(path, path.stat().st_size - 1)
    expected = views_of_all(preset, 3, use_cache=False)
    capsys.readouterr()
    for _ in range(2):
        assert_same(views_of_all(preset, 3), expected)
    said = capsys.readouterr()
    assert said.err.count(f"{path} is truncated and not used: python -m data.data_preprocess --cache writes") == 1
    assert f"{kind} of 19 of 20 images" in said.out and "--cache adds the missing ones" in said.out
    assert kind not in load_splits(preset)[0].cached and len(load_splits(preset)[0].cached) == 1
    preprocess(preset, (PIXELS,))
    assert contents(preset) == whole


def test_a_cache_of_other_decoders_is_not_used(
    preset: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(preset, (PIXELS,))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(PIL.features, "version", lambda name: "another")
        assert load_splits(preset)[0].cache is None
    assert "pixels of 0 of 20 images; views of 0 of 20 images (python -m data" in capsys.readouterr().out
    assert load_splits(preset)[0].cached == [PIXELS, VIEWS]


def test_bytes_and_free_space_are_printed_first_and_too_little_is_refused(
    preset: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="more than cache_limit_gb"):
        preprocess(changed(preset, cache_limit_gb=1e-6), (PIXELS,))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 400_000))
    with pytest.raises(UserError, match=r"needs 0\.8 MB more and 0\.4 MB are free.*--cache views takes less"):
        preprocess(preset, (PIXELS,))
    assert not files_of(preset) and not [*preset.settings.results_root.glob("demo/dataset/*.csv")]
    preprocess(preset, (VIEWS,))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 800_000))
    preprocess(preset, (PIXELS,))  # what is there already needs no more room
    assert "MB of it still to be written; 0.8 MB are free there" in capsys.readouterr().out
    sizes = [Image.open(path).size for path in preset.settings.data_root.glob("*/*")]
    stored = sum(3 * width * height for width, height in sizes) + len(sizes) * (2 * 3 * 32**2 + 1024)
    assert sum(map(len, contents(preset).values())) == stored


def test_a_file_that_cannot_be_written_is_named_and_what_was_written_stays(preset: Preset) -> None:
    command = [sys.executable, "-m", "data.data_preprocess", *map(str, flags(preset)), "--cache"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))  # as if the disk were full
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(r"pixels_112_\w+/\w\w/\w+ cannot be written \(.*make room", done.stderr)
    written = files_of(preset)
    preprocess(preset, (PIXELS,))
    assert written and written.items() <= files_of(preset).items() and len(files_of(preset)) == 40


def test_a_second_builder_is_refused_and_one_inside_the_data_root_too(preset: Preset, tmp_path: Path) -> None:
    with building(preset.settings, (VIEWS,), []):
        assert "is in use by" in refused("data.data_preprocess", *flags(preset), "--cache")
    with pytest.raises(UserError, match="never written to"):
        preprocess(changed(preset, cache_root=preset.settings.data_root / "cache"), (PIXELS,))
    assert not (preset.settings.data_root / "cache").exists()
    (tmp_path / "link").symlink_to(preset.settings.data_root)
    assert cache_folder(changed(preset, data_root=tmp_path / "link").settings) == cache_folder(preset.settings)


def test_more_cached_images_than_a_process_may_open_files_are_all_read_from_the_cache(preset: Preset) -> None:
    succeed("data.data_preprocess", *flags(preset), "--cache")
    argv = [*map(str, flags(preset)), "--final-valid-fraction", "0.2"]
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "from data.cache import pixel_cache; from data.datasets import *; from utils import parse_command_line\n"
        f"index, _ = load_splits(parse_command_line('', argv={argv!r})[0])\n"
        "index.root.joinpath('fake').rename(index.root / 'gone')  # so that nothing can be decoded\n"
        "dataset = ImageDataset(index, range(20), ViewSettings(32, 4), 10**6)\n"
        "for epoch in range(4): dataset.__getitems__([(row, epoch) for row in range(20)])\n"
        "print(pixel_cache.mapped_files().cache_info().maxsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
