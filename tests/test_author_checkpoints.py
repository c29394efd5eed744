"""Checkpoints of the author's code, which are state dicts without metadata: used with flags, or refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import config
from data.images import pixel_key, read_image
from data.lists import read_csv
from data.views import Picture, ViewSettings
from model_training.inference.detector import PredictionOptions, load_detector
from models.build import build_model
from tests.conftest import Bomb, refused, run_module, succeed
from tests.test_models import RANDOM, fill_by_formula
from utils import UserError, find_experiment

K = 3


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    found = {}
    for name in ("glass_resnet", "standard_resnet"):
        found[name] = build_model(find_experiment(config.PAPER, name), RANDOM).eval()
        with torch.no_grad():
            fill_by_formula(found[name])
    return found


@pytest.fixture(scope="module")
def checkpoints(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glass_resnet.pt is of a compiled model, within a dictionary; standard_resnet.pt is a plain state dict."""
    folder = tmp_path_factory.mktemp("checkpoints")
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in models["glass_resnet"].state_dict().items()}
    torch.save({"epoch": 7, "model_state_dict": compiled}, folder / "glass_resnet.pt")
    torch.save(models["standard_resnet"].state_dict(), folder / "standard_resnet.pt")
    return folder


def direct_probability(model: nn.Module, path: Path, num_crops: int) -> float:
    """The probability of fake, computed with the model directly."""
    image = read_image(path, 10**9)
    picture, views = Picture(image, pixel_key(image)), ViewSettings(224, num_crops, 606, standard=not num_crops)
    resized, boxes = picture.resized(views), picture.boxes(views, 1)[0] if num_crops else []
    arrays = [resized[None], *([np.stack([*picture.crops(boxes, 224)])[None]] if num_crops else [])]
    with torch.no_grad():
        tensors = [torch.tensor(array).movedim(-1, -3).float() / 255 for array in arrays]
        return model(*((t - model.input_mean) / model.input_std for t in tensors)).double().softmax(1)[0, 0].item()


def test_a_checkpoint_gives_the_numbers_of_its_model(
    models: dict[str, nn.Module], checkpoints: Path, toy_data: Path, tmp_path: Path
) -> None:
    files = [toy_data / "fake" / "0000.png", toy_data / "real" / "0001.jpg"]
    flags = ("--backbone", "resnet", "--num-crops", str(K), "--device", "cpu")
    expected = {
        name: [direct_probability(models[name], file, K * (name[0] == "g")) for file in files] for name in models
    }
    output = ("--output", tmp_path / "p.csv")
    done = run_module("model_training.predict", "--weights", checkpoints / "glass_resnet.pt", *flags, *output, *files)
    assert done.returncode == 0 and "has no calibration: probabilities are raw, and the threshold is 0.5" in done.stderr
    rows = read_csv(tmp_path / "p.csv")
    assert [float(row["probability_fake"]) for row in rows] == pytest.approx(expected["glass_resnet"], abs=1e-5)
    assert abs(expected["glass_resnet"][0] - expected["glass_resnet"][1]) > 1e-3

    (tmp_path / "list.csv").write_text("path\nfake/0000.png\nreal/0001.jpg\n")
    roots = ("--data-root", toy_data, "--data-list", tmp_path / "list.csv", "--results-root", tmp_path)
    said = succeed("model_training.evaluate", "--weights", *checkpoints.glob("*.pt"), *roots, *flags)
    assert "glass_resnet: seeds unknown; not calibrated: raw probabilities, threshold 0.5" in said
    for name in models:
        (scores,) = (tmp_path / "paper" / "scores").glob(f"{name}_*.csv")
        found = [float(row["raw_probability_fake"]) for row in read_csv(scores)]
        assert found == pytest.approx(expected[name], abs=1e-5)


def test_a_checkpoint_of_another_kind_or_without_the_flags_it_needs_is_one_sentence(
    checkpoints: Path, tmp_path: Path
) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"model": {}, "optimizer": 1, "history": []}, tmp_path / "state.pt")
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    (tmp_path / "page.pt").write_text("<!doctype html><title>404</title>")
    glass, unsaid = checkpoints / "glass_resnet.pt", "of the author's code and does not say all of it: pass --backbone"
    for path, options, sentence in (
        (glass, {}, f"{glass} is a GLASS model of width 2048 {unsaid} and --num-crops"),
        (checkpoints / "standard_resnet.pt", {}, f"is a standard model {unsaid}"),
        (glass, {"backbone": "vit", "num_crops": 3}, "does not fit this model"),
        (tmp_path / "other.pt", {}, "holds 1 tensors (features.0.weight, ...), neither of a GLASS model"),
        (tmp_path / "state.pt", {}, "a dict of model, optimizer, history: save"),
        (tmp_path / "bomb.pt", {}, "loaded safely (it holds something else than tensors and plain values)"),
        (tmp_path / "page.pt", {}, "is not a weights file of this project, nor a checkpoint of the author's code: it"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_detector(path, "cpu", options=PredictionOptions(**options))
    assert "pass --backbone and --num-crops" in refused("model_training.predict", "--weights", glass, "README.md")
    assert not (tmp_path / "ran").exists()
