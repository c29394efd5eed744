"""Crops and views are those of the specification, whoever asks for them and when."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import Preset
from data.crops import crop_generator, sample_crop_boxes
from data.data_preprocess import preprocess
from data.datasets import ImageDataset, load_splits
from data.images import read_image
from data.loaders import build_loader
from data.views import cut_crops, global_view, standard_view
from tests.conftest import FIXTURES, write_toy_images
from utils import UserError, find_experiment

CROP_CASES = json.loads((FIXTURES / "crop_positions.json").read_text())["cases"]
GLOBAL_VIEWS = json.loads((FIXTURES / "global_views.json").read_text())["views"]


def reference_image(size: str) -> np.ndarray:
    height, width = map(int, size.split("x"))
    y, x = np.mgrid[:height, :width]
    red, green = 7 * y + 13 * x + (y * x) % 31, 3 * y + 5 * x + ((y // 7) * (x // 5)) % 97
    return (np.stack([red, green, (y ^ x) * 11], axis=-1) % 256).astype(np.uint8)


def crops_of(pixels: np.ndarray, num_crops: int, patch_size: int, generator: torch.Generator) -> np.ndarray:
    boxes = sample_crop_boxes(*pixels.shape[:2], num_crops, patch_size, generator)
    crops = np.zeros((num_crops, patch_size, patch_size, 3), np.uint8)
    cut_crops(pixels, boxes, crops)
    return crops


@pytest.mark.parametrize("case", CROP_CASES, ids=lambda c: f"{c['height']}x{c['width']}-K{c['num_crops']}-s{c['seed']}")
def test_crop_boxes_are_the_reference_draw_for_draw(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    boxes = sample_crop_boxes(case["height"], case["width"], case["num_crops"], 224, generator)
    assert boxes.dtype == np.int64
    assert boxes.tolist() == case["boxes"]


def test_crops_never_leave_the_image_and_lie_in_distinct_cells() -> None:
    sizes = torch.randint(1, 400, (200, 2), generator=torch.Generator().manual_seed(3)).tolist()
    for seed, (height, width) in enumerate(sizes):
        for num_crops in (1, 4, 10):
            boxes = sample_crop_boxes(height, width, num_crops, 32, torch.Generator().manual_seed(seed))
            top, left, valid_height, valid_width = boxes.T
            assert boxes.min() >= 0
            assert (top + valid_height <= height).all() and (left + valid_width <= width).all()
            assert (valid_height == min(height, 32)).all() and (valid_width == min(width, 32)).all()
            grid = min(min(height, width) // 32, 8)
            if grid * grid >= num_crops:  # cells are wider than P, so that a corner tells its cell
                cells = {(t // (height // grid), x // (width // grid)) for t, x in boxes[:, :2].tolist()}
                assert len(cells) == num_crops


@pytest.mark.parametrize("size", GLOBAL_VIEWS)
def test_global_views_are_the_reference_within_one_grey_level(size: str) -> None:
    pixels, expected = reference_image(size), np.array(GLOBAL_VIEWS[size])
    from_bytes, from_floats = global_view(pixels, 224), global_view(pixels, 224, exact=True)
    assert from_bytes.dtype == np.uint8 and from_floats.dtype == np.float32
    assert from_bytes.shape == from_floats.shape == (224, 224, 3)
    for view, tolerance in ((from_bytes, 1 / 255), (from_floats, 1e-5)):
        np.testing.assert_allclose(view.transpose(2, 0, 1)[:, ::16, ::16] / 255, expected, rtol=0, atol=tolerance)


def test_local_crops_are_the_pixels_of_the_image_at_native_resolution() -> None:
    pixels = reference_image("300x500")
    crops = crops_of(pixels, 6, 64, torch.Generator().manual_seed(5))
    boxes = sample_crop_boxes(300, 500, 6, 64, torch.Generator().manual_seed(5))
    for crop, (top, left, *_) in zip(crops, boxes.tolist(), strict=True):
        assert np.array_equal(crop, pixels[top : top + 64, left : left + 64])


def test_standard_view_is_pillows_bilinear_resize_of_bytes() -> None:
    image = Image.fromarray(reference_image("97x151"))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(standard_view(image, 32), expected)


def test_crop_generators_tell_seed_epoch_and_image_apart() -> None:
    keys = [(1, "a", None), (1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0)]
    draws = [torch.randint(2**62, (), generator=crop_generator(*key)).item() for key in keys]
    again = [torch.randint(2**62, (), generator=crop_generator(*key)).item() for key in keys]
    assert draws == again and len(set(draws)) == len(keys)


def batches(preset: Preset, training_seed: int | None, epoch: int, batch_size: int = 5) -> dict[str, torch.Tensor]:
    """Image name -> its views, as a loader of the preset gives them in an epoch."""
    index, splits = load_splits(preset)
    experiment = replace(find_experiment(preset, "glass_resnet"), batch_size=batch_size)
    loader = build_loader(preset, experiment, index, splits.train, training_seed)
    loader.sampler.set_epoch(epoch)
    names = [loader.dataset.names[position] for position in loader.sampler.order()]
    views = [pair for global_views, crops, _ in loader for pair in zip(global_views, crops, strict=True)]
    return dict(zip(names, views, strict=True))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_views_do_not_depend_on_workers_or_batch_size(toy_preset: Callable[..., Preset]) -> None:
    for training_seed in (None, 100):
        here = batches(toy_preset(), training_seed, 3)
        assert equal(here, batches(toy_preset(num_workers=2), training_seed, 3, batch_size=4))


def test_training_crops_change_with_seed_and_epoch_and_evaluation_crops_with_neither(
    toy_preset: Callable[..., Preset],
) -> None:
    first = batches(toy_preset(), 100, 0)
    assert equal(first, batches(toy_preset(), 100, 0))
    assert not equal(first, batches(toy_preset(), 100, 1))
    assert not equal(first, batches(toy_preset(), 200, 0))
    assert equal(batches(toy_preset(), None, 0), batches(toy_preset(), None, 7))


def test_training_order_is_a_new_shuffle_each_epoch_of_all_images(toy_preset: Callable[..., Preset]) -> None:
    orders = [list(batches(toy_preset(), 100, epoch)) for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_evaluation_crops_follow_the_main_seed(toy_preset: Callable[..., Preset]) -> None:
    index, splits = load_splits(toy_preset())
    experiment = find_experiment(toy_preset(), "glass_resnet")
    views = []
    for seed in (606, 606, 607):
        loader = build_loader(toy_preset(main_seed=seed), experiment, index, splits.test)
        views.append(next(iter(loader))[1])
        name = loader.dataset.names[0]
        pixels = np.asarray(read_image(index.root / name, 10**6))
        expected = crops_of(pixels, experiment.num_crops, 32, crop_generator(seed, name))
        assert np.array_equal(views[-1][0].permute(0, 2, 3, 1), expected)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_a_file_that_changed_after_preprocessing_is_named(tmp_path: Path, toy_preset: Callable[..., Preset]) -> None:
    write_toy_images(tmp_path / "images", images_per_class=10)
    preset = toy_preset(data_root=tmp_path / "images", results_root=tmp_path / "results")
    preprocess(preset)
    index, splits = load_splits(preset)
    dataset = ImageDataset(index, splits.train, 32, None, 0, max_pixels=10**6)
    path = index.root / dataset.names[0]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match=rf"{dataset.names[0]} is not what it was .*its size in bytes has changed"):
        dataset[0, None]
    path.unlink()
    with pytest.raises(UserError, match=rf"{dataset.names[0]} is not what it was .*No such file"):
        dataset[0, None]
    with pytest.raises(UserError, match="more than max_image_pixels = 10: raise it"):
        ImageDataset(index, splits.train, 32, None, 0, max_pixels=10)
