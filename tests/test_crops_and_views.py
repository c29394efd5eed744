"""Crops and views are those of the specification, whoever asks for them and when."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from config import Preset
from data.crops import crop_generator, sample_crop_boxes
from data.datasets import ImageDataset, generate_views, load_splits, standard_view, to_tensor
from data.images import read_image
from data.loaders import build_loader
from tests.conftest import FIXTURES
from utils import UserError, find_experiment

CROP_CASES = json.loads((FIXTURES / "crop_positions.json").read_text())["cases"]
GLOBAL_VIEWS = json.loads((FIXTURES / "global_views.json").read_text())["views"]


def reference_image(size: str) -> torch.Tensor:
    height, width = map(int, size.split("x"))
    y, x = np.mgrid[:height, :width]
    red, green = 7 * y + 13 * x + (y * x) % 31, 3 * y + 5 * x + ((y // 7) * (x // 5)) % 97
    return torch.from_numpy((np.stack([red, green, (y ^ x) * 11]) % 256).astype(np.uint8))


@pytest.mark.parametrize("case", CROP_CASES, ids=lambda c: f"{c['height']}x{c['width']}-K{c['num_crops']}-s{c['seed']}")
def test_crop_boxes_are_the_reference_draw_for_draw(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    boxes = sample_crop_boxes(case["height"], case["width"], case["num_crops"], 224, generator)
    assert boxes.dtype == torch.int64
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
    image, expected = reference_image(size), torch.tensor(GLOBAL_VIEWS[size])
    from_bytes, _ = generate_views(image, 1, 224, torch.Generator())
    from_floats, _ = generate_views(image.float() / 255, 1, 224, torch.Generator())
    assert from_bytes.dtype == torch.uint8
    torch.testing.assert_close(from_bytes[:, ::16, ::16] / 255, expected, rtol=0, atol=1 / 255)
    torch.testing.assert_close(from_floats[:, ::16, ::16], expected, rtol=0, atol=1e-5)


def test_local_crops_are_the_pixels_of_the_image_at_native_resolution() -> None:
    image = reference_image("300x500")
    _, crops = generate_views(image, 6, 64, torch.Generator().manual_seed(5))
    boxes = sample_crop_boxes(300, 500, 6, 64, torch.Generator().manual_seed(5))
    for crop, (top, left, *_) in zip(crops, boxes.tolist(), strict=True):
        assert torch.equal(crop, image[:, top : top + 64, left : left + 64])


def test_small_images_are_padded_with_zeros_at_the_bottom_and_right() -> None:
    image = torch.full((3, 20, 10), 7, dtype=torch.uint8)
    _, crops = generate_views(image, 2, 32, torch.Generator())
    assert (crops[:, :, :20, :10] == 7).all()
    assert crops[:, :, 20:].sum() == 0 and crops[:, :, :, 10:].sum() == 0


def test_standard_view_is_pillows_bilinear_resize_of_bytes() -> None:
    image = Image.fromarray(reference_image("97x151").permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(standard_view(image, 32).permute(1, 2, 0).numpy(), expected)
    assert torch.equal(to_tensor(image), reference_image("97x151"))


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
        image = to_tensor(read_image(index.root / name, 10**6))
        expected = generate_views(image, experiment.num_crops, 32, crop_generator(seed, name))[1]
        assert torch.equal(views[-1][0], expected)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_a_file_that_vanished_after_preprocessing_is_named(toy_preset: Callable[..., Preset]) -> None:
    index, splits = load_splits(toy_preset())
    dataset = ImageDataset(index, splits.train, 32, None, 0, max_pixels=10)
    with pytest.raises(UserError, match=dataset.names[0]):
        dataset[0, None]
