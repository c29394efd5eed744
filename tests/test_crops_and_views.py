"""Crops and views are those of docs/method.md, the same in evaluation and prediction, whatever a file is called."""

import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import Preset
from data.crops import crop_generator, sample_crop_boxes
from data.data_preprocess import preprocess
from data.datasets import ImageDataset, load_splits
from data.images import pixel_key, pixels_of, read_image
from data.index import read_index
from data.loaders import EpochBatches, build_loader
from data.perturbations import GRID, kind_and_strength, perturbation
from data.pictures import read_pictures
from data.views import Picture, ViewSettings, cut_crops, global_view
from tests.conftest import FIXTURES, REPOSITORY, MakePreset, write_toy_images
from utils import UserError, find_experiment

CROP_CASES = json.loads((FIXTURES / "crop_positions.json").read_text())["cases"]
GLOBAL_VIEWS = json.loads((FIXTURES / "global_views.json").read_text())["views"]


def reference_image(size: str) -> np.ndarray:
    height, width = map(int, size.split("x"))
    y, x = np.mgrid[:height, :width]
    red, green = 7 * y + 13 * x + (y * x) % 31, 3 * y + 5 * x + ((y // 7) * (x // 5)) % 97
    return (np.stack([red, green, (y ^ x) * 11], axis=-1) % 256).astype(np.uint8)


@pytest.mark.parametrize("case", CROP_CASES, ids=lambda c: f"{c['height']}x{c['width']}-K{c['num_crops']}-s{c['seed']}")
def test_crop_boxes_are_the_reference_draw_for_draw(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    boxes = sample_crop_boxes(case["height"], case["width"], case["num_crops"], 224, generator)
    assert boxes.dtype == np.int64
    assert boxes.tolist() == case["boxes"]


@pytest.mark.parametrize("size", GLOBAL_VIEWS)
def test_global_views_are_the_reference_within_one_grey_level(size: str) -> None:
    pixels, expected = reference_image(size), np.array(GLOBAL_VIEWS[size])
    from_bytes, from_floats = global_view(pixels, 224), global_view(pixels, 224, exact=True)
    assert from_bytes.dtype == np.uint8 and from_floats.dtype == np.float32
    assert from_bytes.shape == from_floats.shape == (224, 224, 3)
    for view, tolerance in ((from_bytes, 1 / 255), (from_floats, 1e-5)):
        np.testing.assert_allclose(view.transpose(2, 0, 1)[:, ::16, ::16] / 255, expected, rtol=0, atol=tolerance)


def test_local_crops_are_the_pixels_of_the_image_at_native_resolution() -> None:
    pixels, crops = reference_image("300x500"), np.empty((6, 64, 64, 3), np.uint8)
    boxes = sample_crop_boxes(300, 500, 6, 64, torch.Generator().manual_seed(5))
    cut_crops(pixels, boxes, crops)
    for crop, (top, left, *_) in zip(crops, boxes.tolist(), strict=True):
        assert np.array_equal(crop, pixels[top : top + 64, left : left + 64])


def test_crop_generators_differ_by_seed_image_and_epoch_or_draw() -> None:
    keys = [(1, "a"), (1, "a", 1), (1, "b"), (1, "b", 1), (2, "a"), (2, "a", 1)]
    draws = [torch.randint(2**62, (), generator=crop_generator(*key)).item() for key in keys]
    again = [torch.randint(2**62, (), generator=crop_generator(*key)).item() for key in keys]
    assert draws == again and len(set(draws)) == len(keys)


def test_the_key_of_an_image_follows_from_its_pixels_alone(tmp_path: Path) -> None:
    image = Image.fromarray(reference_image("300x500"))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    assert pixel_key(image) == "ec5c0f912a80b5c25abb3011e872cd59"
    assert {pixel_key(read_image(tmp_path / name, 10**9)) for name in ("a.png", "b.bmp")} == {pixel_key(image)}
    others = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.crop((0, 0, 499, 300)))
    assert pixel_key(image) not in map(pixel_key, others)


def test_the_pixels_of_an_image_are_read_without_a_copy_and_outlive_it() -> None:
    expected = reference_image("97x151")
    pixels = pixels_of(Image.fromarray(expected))  # nothing else refers to this image any more
    assert pixels.shape == (97, 151, 4) and np.array_equal(pixels[:, :, :3], expected)
    with pytest.raises(ValueError, match="mode L is not decoded"):
        pixels_of(Image.fromarray(expected[:, :, 0]))


def batches(preset: Preset, training_seed: int | None, epoch: int, batch_size: int = 5) -> dict[str, torch.Tensor]:
    """Image name -> its views, as a loader of the preset gives them in an epoch."""
    index, splits = load_splits(preset)
    experiment = replace(find_experiment(preset, "glass_resnet"), batch_size=batch_size)
    loader = build_loader(preset.settings, experiment, index, splits.train, training_seed)
    loader.batch_sampler.set_epoch(epoch)
    names = [loader.dataset.names[position] for position in loader.batch_sampler.order()]
    views = [pair for global_views, crops, _ in loader for pair in zip(global_views, crops, strict=True)]
    return dict(zip(names, views, strict=True))


@pytest.mark.parametrize(
    "case", json.loads((FIXTURES / "orders.json").read_text())["cases"], ids=lambda case: f"{case['rows']} rows"
)
def test_the_order_of_batches_is_the_authors(case: dict) -> None:
    sampler = EpochBatches(case["rows"], case["seed"], training=True)
    for epoch in (2, 0, 1):  # any epoch without those before it, as after a resume
        sampler.set_epoch(epoch)
        expected, order = case["epochs"][epoch], np.array(sampler.order(), dtype="<i8")
        assert order[:8].tolist() == expected["first"] and sha256(order.tobytes()).hexdigest() == expected["sha256"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_training_crops_and_order_change_with_seed_and_epoch_and_those_of_evaluation_with_neither(
    toy_preset: MakePreset,
) -> None:
    first, second = (batches(toy_preset(), 100, epoch) for epoch in (0, 1))
    assert not equal(first, second)
    assert list(first) != list(second) and sorted(first) == sorted(second)  # by name, in the order of the batches
    assert not equal(first, batches(toy_preset(), 200, 0)) and equal(first, batches(toy_preset(), 100, 0, batch_size=4))
    assert equal(batches(toy_preset(), None, 0), batches(toy_preset(), None, 7))


def test_evaluation_and_prediction_use_the_same_views(toy_preset: MakePreset) -> None:
    for name in ("glass_resnet", "standard_resnet"):
        for how in ({}, {"reencode_jpeg": 40}, {"exact_resize": True}, {"main_seed": 607}):
            settings = toy_preset(**how).settings
            index, splits = load_splits(toy_preset(**how))
            experiment = find_experiment(toy_preset(), name)
            *views, _ = next(iter(build_loader(settings, experiment, index, splits.test)))
            records = [index.records[row] for row in splits.test]
            files = [index.root / record.path for record in records]
            of_model = ViewSettings.of(settings, experiment, settings.main_seed)
            for number, picture in enumerate(read_pictures(files, 10**6, reencode_jpeg=settings.reencode_jpeg)):
                assert isinstance(picture, Picture) and picture.key == records[number].key
                assert np.array_equal(views[0][number].permute(1, 2, 0), picture.resized(of_model))
                if of_model.num_crops:
                    crops = np.stack(list(picture.crops(picture.boxes(of_model, draws=2)[0], 32)))
                    assert np.array_equal(views[1][number].permute(0, 2, 3, 1), crops)


@pytest.fixture
def own_preset(tmp_path: Path, toy_preset: MakePreset) -> Preset:
    """The toy preset with images of the test's own, which it may change."""
    write_toy_images(tmp_path / "images", images_per_class=10)
    return toy_preset(data_root=tmp_path / "images", results_root=tmp_path / "results")


def test_a_renamed_image_keeps_its_crops_of_evaluation(own_preset: Preset) -> None:
    found = []
    for _ in range(2):
        preprocess(own_preset)
        index = read_index(own_preset)
        dataset = ImageDataset(index, range(20), ViewSettings(32, num_crops=3), 10**6)
        contents = [record.content for record in index.records]
        crops = dataset.__getitems__([(row, None) for row in range(20)])[1]
        found.append(dict(zip(contents, zip(crops, strict=True), strict=True)))
        for number, path in enumerate(sorted((index.root / "fake").iterdir())):
            path.rename(path.with_name(f"{100 - number}{path.suffix}"))
    assert list(found[0]) != list(found[1]) and equal(*found)


def test_a_file_that_changed_after_preprocessing_is_named(own_preset: Preset) -> None:
    preprocess(own_preset)
    index, splits = load_splits(own_preset)
    dataset = ImageDataset(index, splits.train, ViewSettings(32, standard=True), max_pixels=10**6)
    path = index.root / dataset.names[0]
    path.write_bytes(path.read_bytes() + b"more")
    changed = f"{dataset.names[0]} has changed since preprocessing"
    with pytest.raises(UserError, match=rf"{changed} \(its size in bytes differs\)"):
        dataset[0, None]
    path.unlink()
    with pytest.raises(UserError, match=rf"{changed} \(.*No such file"):
        dataset[0, None]
    with pytest.raises(UserError, match="more than max_image_pixels = 10: raise it"):
        ImageDataset(index, splits.train, ViewSettings(32, standard=True), max_pixels=10)


def test_perturbations_do_what_their_names_say() -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (300, 1300, 3), dtype=np.uint8)).resize((1300, 300))
    pixels = np.asarray(image).astype(float)
    changed = {name: perturbation(name)(image) for name in GRID}
    sizes = {name: new.size for name, new in changed.items() if new.size != image.size}
    assert sizes == {"crop_0.75": (975, 225), "crop_0.5": (650, 150), "social": (1080, 249)}
    assert all(new.mode == "RGB" for new in changed.values()) and changed["native"] is image
    assert (np.asarray(changed["crop_0.5"]) == pixels[75:225, 325:975]).all()

    def distance(name: str) -> float:
        return float(np.abs(np.asarray(changed[name]) - pixels).mean())

    for kind in ("jpeg", "webp", "rescale", "blur", "noise"):
        distances = [distance(name) for name in GRID if kind_and_strength(name)[0] == kind]
        assert distances == sorted(distances) and distances[0] > 1, kind
    assert np.std(np.asarray(changed["noise_2"]) - np.clip(pixels, 0, 255)) == pytest.approx(2, rel=0.05)
    for name in ("jpeg_0", "jpeg_75.5", "jpeg", "rescale_2", "sepia_1", "social_1"):
        with pytest.raises(UserError, match=f"there is no perturbation {name}"):
            perturbation(name)


@pytest.mark.slow
def test_a_process_that_another_one_started_ends_although_its_loader_is_still_there(
    indexed: Path, toy_data: Path
) -> None:
    roots = (f"--data-root={toy_data}", f"--results-root={indexed}", "--num-workers=1")
    code = f"""
import multiprocessing
def load():
    from tests.conftest import TOY_SETTINGS, load_splits
    from data.loaders import build_loader
    from utils import find_experiment, parse_command_line
    preset, _, _ = parse_command_line("", argv=[*TOY_SETTINGS, *{roots}])
    index, splits = load_splits(preset)
    global loader
    loader = build_loader(preset.settings, find_experiment(preset, "glass_resnet"), index, splits.train, 1)
    next(iter(loader))
if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=100)
