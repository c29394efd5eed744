"""Crop samplers, poolings and branches beside the paper's: their formulas, and what is trained is what predicts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import config
from data.datasets import load_splits
from data.lists import read_csv
from data.loaders import build_loader
from data.samplers import CANDIDATES, MAP_SIDE, SAMPLERS, frequency_scores
from models.build import build_model
from models.glass_models import places_of_interest
from models.pooling import build_pool
from tests.conftest import PREPROCESS_FLAGS, TOY_FLAGS, MakePreset, refused, succeed, untrained_weights
from training.optimizer import parameter_groups
from utils import find_experiment

SIZES = ((1, 1), (20, 50), (33, 70), (64, 64), (100, 150), (211, 97), (400, 300))  # pixels, height and width


@dataclass
class Noise:
    """An image whose grain differs from place to place."""

    height: int
    width: int
    channels: int = 3

    @cached_property
    def pixels(self) -> np.ndarray:
        random = np.random.default_rng([self.height, self.width])
        grain = np.hypot(*np.mgrid[: self.height, : self.width]) % 90
        noise = 128 + grain[..., None] * random.uniform(-1, 1, (self.height, self.width, 3))
        return np.concatenate([noise, 9 * noise[..., :1]], axis=2)[..., : self.channels].astype("i4").astype(np.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def textures(pixels: np.ndarray) -> np.ndarray:
    """Of each pixel, (H, W): the sum of its absolute differences from four neighbours, those that there are."""
    height, width, _ = pixels.shape
    values, sums = pixels[..., :3].astype(int), np.zeros((height, width), int)
    for y in range(height):
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            if y + down < height:
                first, last = max(0, -right), width - max(0, right)
                other = values[y + down, first + right : last + right]
                sums[y, first:last] += np.abs(values[y, first:last] - other).sum(axis=1)
    return sums


def dct_score(window: np.ndarray) -> float:
    """AIDE's score, sum by sum."""
    n = np.arange(32)
    basis = np.sqrt(np.where(n == 0, 1, 2) / 32)[:, None] * np.cos(math.pi * (2 * n + 1) * n[:, None] / 64)
    coefficients = np.stack([basis @ (window[..., c] / 255) @ basis.T for c in range(3)])
    logs, order, score = np.log(1 + np.abs(coefficients)).mean(0), n[:, None] + n, 0.0
    for band in range(6):
        score += 2**band * logs[(64 * band / 6 <= order) & (order <= 64 * (band + 1) / 6)].mean()
    return score


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_boxes_of_the_right_number_and_size_inside_the_image(name: str) -> None:
    for size in SIZES:
        for P, K in ((32, 5), (20, 1), (33, 5), (32, 16)):
            if name == "five" and K != 5:
                continue
            boxes = SAMPLERS[name](Noise(*size), K, P, seeded())
            assert boxes.dtype == np.int64 and boxes.shape == (MAP_SIDE**2 if name == "cooi" else K, 4)
            assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()
            assert (boxes[:, 2:] == np.minimum(size, P)).all()
            assert np.array_equal(boxes, SAMPLERS[name](Noise(*size), K, P, seeded()))
    fixed = {"grid", "five", "cooi"}
    draws = [SAMPLERS[name](Noise(400, 300), 5, 32, seeded(seed)).tolist() for seed in (1, 2)]
    assert (draws[0] == draws[1]) == (name in fixed)


@pytest.mark.parametrize("channels", (3, 4))
@pytest.mark.parametrize("size", SIZES[1:])
def test_texture_samplers_keep_the_extreme_candidates_of_a_plain_computation(size: tuple, channels: int) -> None:
    image = Noise(*size, channels)
    of_pixels = textures(image.pixels)

    def texture(box: np.ndarray) -> int:
        top, left, height, width = box
        return int(of_pixels[top : top + height, left : left + width].sum())

    for P in (32, 24, 33):
        many = SAMPLERS["texture_low"](image, CANDIDATES, P, seeded())  # all candidates, in the order of their texture
        many = many[: len({tuple(box) for box in many.tolist()})]  # where there are fewer, some come twice
        found = [texture(box) for box in many]
        assert found == sorted(found)
        low, high, mixed = (SAMPLERS[f"texture_{kind}"](image, 3, P, seeded()) for kind in ("low", "high", "mixed"))
        assert np.array_equal(low, np.resize(many, (3, 4))) and np.array_equal(mixed[:2], np.resize(many, (2, 4)))
        assert texture(high[0]) == texture(mixed[2]) == max(found)


def test_the_frequency_sampler_keeps_windows_of_the_extreme_scores_of_a_plain_computation() -> None:
    image, P = Noise(200, 300), 48
    windows = np.stack([image.pixels[y : y + 32, x : x + 32] for y in range(0, 169, 16) for x in range(0, 269, 16)])
    assert frequency_scores(windows) == pytest.approx([dct_score(window) for window in windows], rel=1e-4)
    boxes = SAMPLERS["frequency"](image, CANDIDATES, P, seeded())  # half from below, half from above
    tops, lefts = np.meshgrid(range(0, 169, 16), range(0, 269, 16), indexing="ij")
    score = {
        (min(max(top - 8, 0), 152), min(max(left - 8, 0), 252)): frequency_scores(window[None])[0]
        for top, left, window in zip(tops.ravel(), lefts.ravel(), windows, strict=True)
    }
    scores = [score[top, left] for top, left, *_ in boxes.tolist()]
    half = CANDIDATES // 2
    assert scores[:half] == sorted(scores[:half]) and scores[half:] == sorted(scores[half:], reverse=True)
    assert max(scores[:half]) <= min(scores[half:])


def test_boxes_of_grid_five_all_and_cooi_are_at_the_expected_places() -> None:
    image = Noise(100, 160)
    assert SAMPLERS["grid"](image, 4, 20, seeded())[:, :2].tolist() == [[0, 0], [0, 140], [80, 0], [80, 140]]
    assert SAMPLERS["grid"](image, 1, 20, seeded())[:, :2].tolist() == [[40, 70]]
    corners = [[40, 70], [0, 0], [0, 140], [80, 0], [80, 140]]
    assert SAMPLERS["five"](image, 5, 20, seeded())[:, :2].tolist() == corners
    tiles = SAMPLERS["all"](image, 0, 30, seeded())
    assert tiles[:, :2].tolist() == [[y, x] for y in (0, 30, 60, 70) for x in (0, 30, 60, 90, 120, 130)]
    some = SAMPLERS["all"](image, 7, 30, seeded()).tolist()
    assert len({tuple(box) for box in some}) == 7 and all(box in tiles.tolist() for box in some)
    middle = SAMPLERS["cooi"](image, 1, 20, seeded())[MAP_SIDE**2 // 2]
    assert middle[:2].tolist() == [40, 70]


def test_places_of_interest_are_those_of_a_plain_search() -> None:
    activations = torch.randn(5, 8, 7, 7, generator=seeded())
    for of_image, chosen in zip(activations.numpy(), places_of_interest(activations, 7, 12).tolist(), strict=True):
        summed, scores = of_image.sum(0), np.zeros((7, 7))
        for y in range(7):
            for x in range(7):
                scores[y, x] = summed[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean()
        scores, expected = np.round(1e4 * scores / np.abs(scores).max()), []
        while scores.max() > -np.inf:  # until nothing is left that is no neighbour of a chosen one
            y, x = np.unravel_index(scores.argmax(), scores.shape)
            expected.append(7 * y + x)
            scores[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = -np.inf
        assert chosen[: len(expected)] == expected[:12] and len(set(chosen)) == 12
    peak = torch.zeros(1, 1, 14, 14)
    peak[..., 12:, :2] = 1  # of a ViT
    assert places_of_interest(peak, 7, 1).item() in (42, 35, 36, 43)


@pytest.mark.parametrize("name", get_args(config.Pooling))
def test_poolings_compute_their_formulas_also_without_each_crop(name: str) -> None:
    pool, h = build_pool(name, 16, 0.3).double().eval(), torch.randn(2, 5, 16, generator=seeded()).double()
    pooled, weights = pool(h)
    assert pooled.shape == (2, 16) and weights.shape == (2, 5)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2).double())
    p = {key: value.numpy() for key, value in pool.state_dict().items()}
    x = h[0].numpy()
    if name == "max":
        expected = x.max(0)
    else:
        heads = 8 if name == "query" else 1
        scores = {
            "attention": lambda: np.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["3.weight"].T + p["3.bias"],
            "gated": lambda: (
                (
                    np.tanh(x @ p["hidden.weight"].T + p["hidden.bias"])
                    / (1 + np.exp(-(x @ p["gate.weight"].T + p["gate.bias"])))
                )
                @ p["score.weight"].T
            ),
            "query": lambda: np.einsum(
                "khw,hw->kh", (x @ p["key.weight"].T + p["key.bias"]).reshape(5, 8, 16), p["query"] / 4
            ),
            "mean": lambda: np.zeros((5, 1)),
        }[name]()
        share = np.exp(scores) / np.exp(scores).sum(0)
        expected = (share.repeat(16 // heads, axis=1) * x).sum(0)
        assert weights[0].detach().numpy() == pytest.approx(share.mean(1))
    assert pooled[0].detach().numpy() == pytest.approx(expected)
    without = pool.without_each(h[0])
    for crop in range(5):
        kept = [number for number in range(5) if number != crop]
        torch.testing.assert_close(without[crop], pool(h[:1, kept])[0][0])
    assert pool.without_each(h[0, :1]).isnan().all()


@pytest.mark.parametrize("branches", get_args(config.Branches))
def test_a_model_has_the_parameters_of_its_branches_each_in_one_group(branches: str) -> None:
    experiment = replace(find_experiment(config.DEMO, "glass_resnet"), branches=branches)
    model = build_model(experiment, replace(config.DEMO.settings, patch_size=32)).eval()
    parts = {name.partition(".")[0] for name, _ in model.named_parameters()}
    expected = {"both": {"global_model", "local_model"}, "global": {"global_model"}, "local": {"local_model"}}
    backbones = expected.get(branches, {"global_model"})  # a shared one is named once
    assert parts == backbones | {"classifier"} | ({"attention"} if branches != "global" else set())
    grouped = [id(p) for group in parameter_groups(model, experiment) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    if branches == "shared":
        assert parameter_groups(model, experiment)[0]["lr"] == experiment.lr_local
    view, crops = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 3, 32, 32)
    logits = model(view) if branches == "global" else model(view, crops)
    if branches in ("local", "both", "shared"):
        assert torch.equal(model(view + 1, crops), logits) == (branches == "local")


VARIANTS = (
    ("--crop-sampler", "random", "--pooling", "gated"),
    ("--crop-sampler", "five", "--pooling", "mean"),
    ("--crop-sampler", "texture_mixed", "--branches", "local"),
    ("--crop-sampler", "frequency", "--pooling", "query"),
    ("--crop-sampler", "all", "--pooling", "max"),
    ("--crop-sampler", "cooi", "--branches", "shared"),
    ("--branches", "global"),
)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_a_variant_is_trained_tested_and_predicts_the_same_from_its_file(
    variant: tuple[str, ...], results: Path, toy_data: Path, tmp_path: Path
) -> None:
    crops = ("--num-crops", "5") if "five" in variant else ("--num-crops", "3")
    roots = ("--data-root", toy_data, "--results-root", results)
    few = ("--epochs", "1", "--seeds", "1", "--name", "variant")
    succeed("model_training.glass_resnet_training", *TOY_FLAGS, *roots, *few, *crops, *variant)
    run = results / "demo" / "variant" / "seed_1"
    card = (run / "README.md").read_text()
    assert ("its global view alone" in card) == ("global" in variant) == ("num_crops" not in card)
    tested = {row["path"]: float(row["probability_fake"]) for row in read_csv(run / "predictions.csv")}
    images = [toy_data / path for path in tested]
    output = tmp_path / "predictions.csv"
    evidence = ("--evidence", tmp_path / "evidence")
    weights = ("--weights", run / "model.safetensors")
    succeed("model_training.predict", *weights, "--device", "cpu", "--output", output, *images, *evidence)
    predicted = [float(row["raw_probability_fake"]) for row in read_csv(output)]
    assert predicted == pytest.approx(list(tested.values()), abs=1e-5)


def test_views_of_every_sampler_are_the_same_from_files_and_from_the_cache(
    toy_data: Path, tmp_path: Path, toy_preset: MakePreset
) -> None:
    roots = ("--data-root", toy_data, "--results-root", tmp_path, "--cache-root", tmp_path / "cache")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots, "--cache")
    preset = toy_preset(results_root=tmp_path, cache_root=tmp_path / "cache")
    for name in SAMPLERS:
        experiment = replace(find_experiment(preset, "glass_resnet"), crop_sampler=name, num_crops=5)
        for seed in (None, 1):
            found = []
            for use_cache in (True, False):
                index, splits = load_splits(replace(preset, settings=replace(preset.settings, use_cache=use_cache)))
                assert (index.cache is not None) == use_cache
                found.append(list(build_loader(preset.settings, experiment, index, splits.train, seed)))
            for one, other in zip(*found, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_prediction_may_place_other_crops_than_the_training(results: Path, toy_data: Path, tmp_path: Path) -> None:
    roots = ("--data-root", toy_data, "--results-root", results)
    succeed("model_training.glass_resnet_training", *TOY_FLAGS, *roots, "--epochs", "1", "--seeds", "1")
    weights = ("--weights", results / "demo" / "glass_resnet" / "seed_1" / "model.safetensors")
    image, output = toy_data / "real" / "0003.jpg", tmp_path / "predictions.csv"

    def predicted(*options: str) -> tuple[float, str]:
        succeed("model_training.predict", *weights, "--device", "cpu", "--output", output, image, *options)
        (row,) = read_csv(output)
        return float(row["probability_fake"]), row["standard_deviation"]

    usual = predicted()
    assert predicted("--num-crops", "4") == usual and predicted("--num-crops", "9")[0] != usual[0]
    assert predicted("--crop-sampler", "all")[0] != usual[0]
    sentence = refused("model_training.predict", *weights, image, "--crop-sampler", "all", "--draws", "2")
    assert "--draws 2: glass_resnet has the same crops in every draw, by its sampler all" in sentence
    standard = ("--weights", untrained_weights(tmp_path / "standard.safetensors", "standard_resnet"))
    sentence = refused("model_training.predict", *standard, image, "--crop-sampler", "all")
    assert "crop_sampler: standard_resnet looks at the whole image and draws no crops" in sentence
    sentence = refused("model_training.predict", *weights, "--output", output, image, "--crop-sampler", "five")
    assert "num_crops is 4: crop_sampler five takes 5, the centre and corners" in sentence
    written = succeed(
        "model_training.evaluate", *weights, *roots[:2], "--results-root", results, "--crop-sampler", "all"
    )
    assert "Other crops than those of training and calibration. glass_resnet: crop_sampler = all." in written
    sentence = refused(
        "model_training.glass_resnet_training", *TOY_FLAGS, *roots, "--crop-sampler", "cooi", "--branches", "local"
    )
    assert "crop_sampler cooi asks the global view where to look, which branches local has none of" in sentence
    sentence = refused("num_crops.num_crops_resnet", *TOY_FLAGS, *roots, "--branches", "global")
    assert "glass_resnet has branches = global, and so no crops to be counted" in sentence
    shared = (*TOY_FLAGS, *roots, "--branches", "shared", "--name", "shared", "--initial-weights", weights[1])
    sentence = refused("model_training.glass_resnet_training", *shared)
    assert "holds two networks where this model has one for both views: global_model" in sentence


def test_a_model_without_crops_takes_no_sampler_or_pooling(results: Path, toy_data: Path) -> None:
    flags = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", results, "--branches", "global")
    for name, value in (("--crop-sampler", "all"), ("--pooling", "max")):
        said = refused("model_training.glass_resnet_training", *flags, name, value)
        assert "branches global has no crops: leave crop_sampler and pooling as they are" in said


def test_a_study_is_not_resumed_with_another_sampler(results: Path, toy_data: Path) -> None:
    flags = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", results, "--epochs", "1", "--trials", "1")
    succeed("hyperparameter_tuning.glass_resnet_tuning", *flags, "--pooling", "mean")
    sentence = refused("hyperparameter_tuning.glass_resnet_tuning", *flags, "--crop-sampler", "random")
    assert "was started with crop_sampler = stratified, now random" in sentence
