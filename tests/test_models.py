"""The six models are the author's: names, sizes and numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet50_Weights, swin_t

import config
from config import GlassExperiment, StandardExperiment
from models.backbones import TORCHVISION_BACKBONES, TorchvisionBackbone
from models.build import build_model
from tests.conftest import FIXTURES, Bomb
from training.optimizer import parameter_groups
from utils import UserError, find_experiment

REFERENCE = json.loads((FIXTURES / "models.json").read_text())["models"]
RANDOM = replace(config.PAPER.settings, pretrained=False)
SMALL = replace(config.DEMO.settings, patch_size=64)


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


@pytest.mark.parametrize("name", REFERENCE)
def test_names_sizes_and_logits_are_the_reference(name: str) -> None:
    expected, model = REFERENCE[name], build_model(find_experiment(config.PAPER, name), RANDOM).eval()
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    assert len(state) == expected["n_state"]
    normalisation = torch.cat([model.input_mean, model.input_std]).flatten().tolist()
    assert normalisation == pytest.approx([0.485, 0.456, 0.406, 0.229, 0.224, 0.225])
    for key, shape in (expected.get("state_shapes") or expected["head_shapes"]).items():
        assert list(state[key].shape) == shape
    with torch.no_grad():
        fill_by_formula(model)
        view = formula_input(2, 3, 224, 224, phase=0)
        if name.startswith("glass"):
            assert sorted(model.global_model.state_dict()) == sorted(expected["global_model_keys"])
            assert sorted(model.local_model.state_dict()) == sorted(expected["global_model_keys"])
            logits, attention = model.forward_with_attention(view, formula_input(2, 3, 3, 224, 224, phase=1))
            torch.testing.assert_close(attention, torch.tensor(expected["attention"]), rtol=1e-4, atol=1e-6)
        else:
            logits = model(view)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("experiment", config.DEMO.experiments, ids=lambda experiment: experiment.name)
def test_every_parameter_gets_a_gradient_and_lies_in_exactly_one_group(experiment: config.Experiment) -> None:
    model, views = build_model(experiment, SMALL), [torch.randn(2, 3, 64, 64)]
    if isinstance(experiment, GlassExperiment):
        views.append(torch.randn(2, 3, 3, 64, 64))
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero, at which some layers start and stop the gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    # In eval mode: stochastic depth would skip a layer for both images now and then.
    torch.nn.functional.cross_entropy(model.eval()(*views), torch.tensor([0, 1])).backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert set(still) <= {"attention.3.bias"}  # a constant cancels in the softmax
    grouped = [id(p) for group in parameter_groups(model, experiment) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def resnet_experiment(backbone: str) -> StandardExperiment:
    return replace(find_experiment(config.PAPER, "standard_resnet"), backbone=backbone)


def test_any_timm_model_serves_with_its_own_width_and_normalisation(tmp_path: Path) -> None:
    trained = timm.create_model("test_convnext")
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    settings = replace(SMALL, weights_files=(f"timm:test_convnext={tmp_path / 'weights.safetensors'}",))
    for name in ("standard_resnet", "glass_resnet"):
        model = build_model(replace(find_experiment(config.PAPER, name), backbone="timm:test_convnext"), settings)
        part = model.local_model if name.startswith("glass") else model[0]
        assert torch.equal(part.stem[0].weight, trained.stem[0].weight)
        assert model.input_mean.flatten().tolist() == list(trained.pretrained_cfg["mean"]) == [0.5] * 3
        assert "input_mean" not in model.state_dict()


def test_another_network_of_torchvision_takes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TORCHVISION_BACKBONES, "swin", TorchvisionBackbone("swin_t"))
    standard, glass = (
        build_model(replace(find_experiment(config.DEMO, name), backbone="swin"), SMALL).eval()
        for name in ("standard_resnet", "glass_resnet")
    )
    assert standard.head[1].weight.shape == (2, 768) and glass.classifier[0].weight.shape == (2 * 768,)
    assert glass.state_dict().keys() >= {f"local_model.{key}" for key in swin_t().state_dict() if key[:4] != "head"}
    view = torch.randn(2, 3, 64, 64)
    assert standard(view).shape == glass(view, view[:, None]).shape == (2, 2)


UNSAFE = r"is not a weights file that can be loaded safely \((?!.*This file can still be loaded)"
NO_STATE_DICT, OTHER = "something else than a state dict", "does not hold the weights of backbone resnet"
UNFIT = {  # content of a weights file, and the sentence
    "nothing": (b"", UNSAFE),
    "a web page": (b"<!doctype html><title>404</title>", UNSAFE),
    "a bomb": ({"weight": Bomb(Path("ran"))}, UNSAFE),
    "keys of two types": ({0: torch.zeros(1), "z": torch.zeros(1)}, NO_STATE_DICT),
    "a sparse tensor": ({"conv1.weight": torch.zeros(64, 3, 7, 7).to_sparse()}, NO_STATE_DICT),
    "a tensor without values": ({"conv1.weight": torch.zeros(64, 3, 7, 7, device="meta")}, NO_STATE_DICT),
    "another network": ({"patch_embedding.weight": torch.zeros(1)}, OTHER),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_weights_are_refused_and_never_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, sentence = UNFIT[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where torchvision keeps what it has downloaded
    file = tmp_path / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    own = replace(config.PAPER.settings, weights_files=(f"resnet={file}",))
    for settings in (own, config.PAPER.settings):  # named, and downloaded before
        with pytest.raises(UserError, match=sentence):
            build_model(resnet_experiment("resnet"), settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("backbone", "settings", "sentence"),
    [
        ("resnet18", RANDOM, "no backbone resnet18"),
        ("timm:no_such_model", RANDOM, "no backbone timm:no_such_model"),
        ("vit", replace(RANDOM, patch_size=100), "multiples of 16"),
        ("vit", replace(config.PAPER.settings, patch_size=64), "with ImageNet weights 224 alone"),
        ("resnet", replace(RANDOM, weights_files=("resnet=nowhere.pth",)), "nowhere.pth does not exist"),
        ("resnet", replace(RANDOM, weights_files=("rennet=resnet.pth",)), "no backbone rennet"),
        ("timm:test_vit", replace(RANDOM, patch_size=1), "timm:test_vit"),
    ],
)
def test_an_unavailable_backbone_is_one_sentence(backbone: str, settings: config.Settings, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_model(resnet_experiment(backbone), settings)
