"""The six models are the author's: names, sizes and numbers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet50_Weights, resnet18, resnet50

import config
from config import GlassExperiment, StandardExperiment
from models.build import build_model
from tests.conftest import FIXTURES
from training.optimizer import parameter_groups
from utils import UserError, find_experiment

REFERENCE = json.loads((FIXTURES / "models.json").read_text())["models"]
RANDOM = replace(config.PAPER.settings, pretrained=False)
SMALL = replace(config.DEMO.settings, patch_size=64)
DEMO_NAMES = [experiment.name for experiment in config.DEMO.experiments]


def fill_by_formula(model: nn.Module) -> None:
    """The weights of the reference; its formula is in fixtures/models.json."""
    for j, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        i = torch.arange(tensor.numel(), dtype=torch.float64)
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            values = 1 + 0.1 * torch.sin(0.7 * i + j)
        elif tensor.ndim >= 2:
            noise = (12.9898 * i + 78.233 * j).sin().abs() * 43758.5453
            values = (noise.frac() - 0.5) * (24 / tensor[0].numel()) ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * torch.cos(0.3 * i + j)
        else:
            values = 0.05 * torch.sin(0.9 * i + j)
        tensor.copy_(values.reshape(tensor.shape))


def formula_input(*shape: int, phase: int) -> torch.Tensor:
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    noise = ((3.1 * i).sin().abs() * 10000).frac()
    return (torch.sin(0.0137 * i * (1 + phase) + 1.7 * (i / 150528).floor()) * 2 * noise).reshape(shape).float()


@pytest.mark.parametrize("experiment", config.PAPER_EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_names_sizes_and_logits_are_the_reference(experiment: config.Experiment) -> None:
    expected, model = REFERENCE[experiment.name], build_model(experiment, RANDOM).eval()
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    assert len(state) == expected["n_state"]
    for name, shape in (expected.get("state_shapes") or expected["head_shapes"]).items():
        assert list(state[name].shape) == shape
    with torch.no_grad():
        fill_by_formula(model)
        view = formula_input(2, 3, 224, 224, phase=0)
        if isinstance(experiment, GlassExperiment):
            assert sorted(model.global_model.state_dict()) == sorted(expected["global_model_keys"])
            assert sorted(model.local_model.state_dict()) == sorted(expected["global_model_keys"])
            logits, attention = model.forward_with_attention(view, formula_input(2, 3, 3, 224, 224, phase=1))
            torch.testing.assert_close(attention, torch.tensor(expected["attention"]), rtol=1e-4, atol=1e-6)
        else:
            logits = model(view)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=0)


def small_model(name: str) -> tuple[config.Experiment, nn.Module, list[torch.Tensor]]:
    experiment = find_experiment(config.DEMO, name)
    views = [torch.randn(2, 3, 64, 64)]
    if isinstance(experiment, GlassExperiment):
        views.append(torch.randn(2, 3, 3, 64, 64))
    return experiment, build_model(experiment, SMALL), views


@pytest.mark.parametrize("name", [name for name in DEMO_NAMES if name.startswith("glass")])
def test_glass_does_not_depend_on_crop_order_and_its_attention_sums_to_one(name: str) -> None:
    _, model, (global_view, crops) = small_model(name)
    with torch.no_grad():
        logits, attention = model.eval().forward_with_attention(global_view, crops)
        turned, turned_attention = model.forward_with_attention(global_view, crops[:, [2, 0, 1]])
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_attention, attention[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(global_view, crops + 1), logits) and not torch.equal(
        model(global_view + 1, crops), logits
    )


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_every_parameter_gets_a_gradient_and_lies_in_exactly_one_group(name: str) -> None:
    experiment, model, views = small_model(name)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero, where some layers begin and stop the gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.nn.functional.cross_entropy(model.train()(*views), torch.tensor([0, 1])).backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert set(still) <= {"attention.3.bias"}  # softmax does not feel a constant
    grouped = [id(p) for group in parameter_groups(model, experiment) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def test_parameter_groups_have_the_rates_and_decays_of_the_experiment() -> None:
    experiment, model, _ = small_model("glass_resnet")
    experiment = replace(experiment, lr_global=1, lr_local=2, lr_atten_class=3, wd_global=4, wd_local=5)
    groups = parameter_groups(model, experiment)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1, 4), (2, 5), (3, 0)]
    assert groups[0]["params"] == list(model.global_model.parameters())
    assert groups[1]["params"] == list(model.local_model.parameters())


def test_dropout_rate_reaches_attention_and_classifier() -> None:
    for name, count in (("glass_resnet", 2), ("standard_vit", 1)):
        experiment = replace(find_experiment(config.PAPER, name), dropout_rate=0.25)
        model = build_model(experiment, RANDOM)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.25] == [0.25] * count


def resnet_experiment(backbone: str) -> StandardExperiment:
    return replace(find_experiment(config.PAPER, "standard_resnet"), backbone=backbone)


def test_a_local_weights_file_takes_the_place_of_the_download(tmp_path: Path) -> None:
    trained = resnet50()
    torch.save(trained.state_dict(), tmp_path / "resnet.pth")
    save_file(trained.state_dict(), tmp_path / "resnet.safetensors")
    for file in ("resnet.pth", "resnet.safetensors"):
        settings = replace(config.PAPER.settings, weights_files=(f"resnet={tmp_path / file}",))
        model = build_model(find_experiment(config.PAPER, "glass_resnet"), settings)
        for part in (model.global_model, model.local_model):
            assert torch.equal(part.layer4[2].conv3.weight, trained.layer4[2].conv3.weight)


def test_any_timm_model_serves_with_its_own_width_and_normalisation(tmp_path: Path) -> None:
    trained = timm.create_model("test_convnext")
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    settings = replace(SMALL, weights_files=(f"timm:test_convnext={tmp_path / 'weights.safetensors'}",))
    for family in ("standard_resnet", "glass_resnet"):
        experiment = replace(find_experiment(config.PAPER, family), backbone="timm:test_convnext")
        model = build_model(experiment, settings)
        part = model.local_model if family.startswith("glass") else model[0]
        assert torch.equal(part.stem[0].weight, trained.stem[0].weight)
        assert model.input_mean.flatten().tolist() == list(trained.pretrained_cfg["mean"]) == [0.5] * 3
        assert "input_mean" not in model.state_dict()
    assert build_model(find_experiment(config.PAPER, "glass_vit"), RANDOM).input_mean[0].item() == pytest.approx(0.485)


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


NOT_SAFE = r"is not a weights file that can be loaded safely \((?!.*This file can still be loaded)"
NOT_PLAIN, NOT_ITS = "something else than a state dict", "does not hold the weights of backbone resnet"
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {  # what torch.save is given, in this folder; the sentence
    "a bomb": (lambda folder: {"weight": Harmful(folder / "ran")}, NOT_SAFE),
    "a module": (lambda folder: nn.Linear(2, 2), NOT_SAFE),
    "a number": (lambda folder: {"epoch": 3}, NOT_PLAIN),
    "a key that is a number": (lambda folder: {0: torch.zeros(1)}, NOT_PLAIN),
    "keys of two kinds": (lambda folder: {0: torch.zeros(1), "z": torch.zeros(1)}, NOT_PLAIN),
    "a sparse tensor": (lambda folder: {"conv1.weight": torch.zeros(64, 3, 7, 7).to_sparse()}, NOT_PLAIN),
    "a tensor without numbers": (lambda folder: {"conv1.weight": torch.zeros(64, 3, 7, 7, device="meta")}, NOT_PLAIN),
    "too little": (lambda folder: {"conv1.weight": torch.zeros(1)}, NOT_ITS),
    "another network": (lambda folder: resnet18().state_dict(), NOT_ITS),
}


@pytest.mark.parametrize("content", UNFIT)
@pytest.mark.parametrize("downloaded", [False, True])
def test_weights_of_another_kind_are_refused_and_never_run(
    downloaded: bool, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, sentence = UNFIT[content]
    settings = settings_with_weights(tmp_path, monkeypatch, downloaded, lambda file: torch.save(make(tmp_path), file))
    with pytest.raises(UserError, match=sentence):
        build_model(resnet_experiment("resnet"), settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"<!doctype html><title>404</title>"])
@pytest.mark.parametrize("downloaded", [False, True])
def test_a_file_that_holds_no_weights_is_one_sentence(
    downloaded: bool, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_with_weights(tmp_path, monkeypatch, downloaded, lambda file: file.write_bytes(content))
    with pytest.raises(UserError, match=NOT_SAFE):
        build_model(resnet_experiment("resnet"), settings)


def settings_with_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, downloaded: bool, write: Callable[[Path], object]
) -> config.Settings:
    """Settings with a weights file: the user's own, or where torchvision keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    file = folder / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    write(file)
    return config.PAPER.settings if downloaded else replace(config.PAPER.settings, weights_files=(f"resnet={file}",))


@pytest.mark.parametrize(
    ("backbone", "settings", "sentence"),
    [
        ("resnet18", RANDOM, "no backbone resnet18"),
        ("timm:no_such_model", RANDOM, "no model no_such_model"),
        ("vit", replace(RANDOM, patch_size=100), "multiples of 16"),
        ("vit", replace(config.PAPER.settings, patch_size=64), "for 224 pixels"),
        ("resnet", replace(RANDOM, weights_files=("resnet=nowhere.pth",)), "nowhere.pth does not exist"),
    ],
)
def test_a_backbone_that_cannot_be_had_is_one_sentence(backbone: str, settings: config.Settings, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_model(resnet_experiment(backbone), settings)
