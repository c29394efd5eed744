"""Name -> network with its ImageNet weights, its width and its normalisation. SPEC, Model.

`vit`, `convnext` and `resnet` are the paper's, from torchvision; `timm:<model>` is any model of timm.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import WeightsEnum

from config import Settings
from utils import UserError, first_line, misfit

NUM_CLASSES = 2  # 0 fake, 1 real
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # SPEC's normalisation, of the paper's three backbones
IMAGENET_STD = (0.229, 0.224, 0.225)
PAPER_BACKBONES = {
    "vit": (torchvision_models.vit_b_16, torchvision_models.ViT_B_16_Weights.IMAGENET1K_V1, 768),
    "convnext": (
        torchvision_models.convnext_tiny,
        torchvision_models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
        768,
    ),
    "resnet": (torchvision_models.resnet50, torchvision_models.ResNet50_Weights.IMAGENET1K_V1, 2048),
}


@dataclass(frozen=True)
class Backbone:
    """A network with its classification head still on, and what a model needs to know of it.

    `width` is D, the number of features before the head; `mean` and `std` normalise RGB in [0, 1].
    """

    name: str
    network: nn.Module
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def without_head(self) -> nn.Module:
        """The network as (B, 3, P, P) -> (B, D). ConvNeXt loses the LayerNorm of its classifier too."""
        if self.name == "vit":
            self.network.heads = nn.Identity()
        elif self.name == "convnext":
            self.network.classifier = nn.Flatten(1)
        elif self.name == "resnet":
            self.network.fc = nn.Identity()
        return self.network

    def with_head(self, head: nn.Module) -> nn.Module:
        """The network as (B, 3, P, P) -> logits, with `head` for its last linear layer."""
        if self.name == "vit":
            self.network.heads.head = head
        elif self.name == "convnext":
            self.network.classifier[2] = head
        elif self.name == "resnet":
            self.network.fc = head
        else:
            return nn.Sequential(self.network, head)
        return self.network


def load_backbone(name: str, settings: Settings) -> Backbone:
    """Build the network called `name` and load its initial weights.

    The weights are the file that `settings.weights_files` names for it, else downloaded ones if
    `settings.pretrained`, else random.

    Raises:
        UserError: no such network, weights out of reach or of another network, or a patch size it cannot take.
    """
    files = dict(item.split("=", 1) for item in settings.weights_files)
    for key in files:  # a mistyped name would silently leave its file unused
        if key not in PAPER_BACKBONES and not timm.is_model(key.removeprefix("timm:").split(".")[0]):
            raise UserError(f"weights_files names {key}: a backbone is {', '.join(PAPER_BACKBONES)} or timm:<model>")
        if key not in PAPER_BACKBONES and not key.startswith("timm:"):
            raise UserError(f"weights_files names {key}: a timm model is written timm:{key}")
    file = Path(files[name]) if name in files else None
    if name in PAPER_BACKBONES:
        return _load_torchvision(name, settings, file)
    if name.startswith("timm:"):
        return _load_timm(name, settings, file)
    raise UserError(f"there is no backbone {name}: choose {', '.join(PAPER_BACKBONES)} or timm:<model>")


def _load_torchvision(name: str, settings: Settings, file: Path | None) -> Backbone:
    build, weights, width = PAPER_BACKBONES[name]
    trained = file is not None or settings.pretrained
    if name == "vit" and settings.patch_size % 16:
        raise UserError(f"patch_size is {settings.patch_size}: backbone vit takes multiples of 16 pixels")
    if name == "vit" and trained and settings.patch_size != 224:
        raise UserError(
            f"patch_size is {settings.patch_size}: the ImageNet weights of backbone vit are for 224 pixels; "
            f"set patch_size to 224, or choose a backbone timm:<model>"
        )
    network = build(image_size=settings.patch_size) if name == "vit" else build()
    if file is None and settings.pretrained:
        file = _imagenet_file(name, weights)
    if file is not None:
        _load_strictly(network, read_weights(file), name, file)
    return Backbone(name, network, width, IMAGENET_MEAN, IMAGENET_STD)


def _imagenet_file(name: str, weights: WeightsEnum) -> Path:
    """Where torchvision keeps downloaded weights; downloads them if they are not there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    if not file.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the ImageNet weights of backbone {name} could not be downloaded ({error}): fetch {weights.url} "
                f"on a machine with internet and put it at {file}, or name it with --weights-files {name}=FILE "
                f"(weights_files in config.py)"
            ) from None
    return file


def _load_timm(name: str, settings: Settings, file: Path | None) -> Backbone:
    model, P = name.removeprefix("timm:"), settings.patch_size
    if not timm.is_model(model.split(".")[0]):
        raise UserError(f"timm {timm.__version__} has no model {model}: python -c 'import timm; timm.list_models()'")
    cfg = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
    size = {"img_size": P} if cfg.fixed_input_size else {}
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our sentence says it once
    try:
        network = timm.create_model(model, pretrained=settings.pretrained and file is None, **size)
    except Exception as error:  # timm, its hub clients and the networks raise many kinds
        reason = first_line(error)
        if not settings.pretrained or file is not None:
            raise UserError(f"timm cannot build {name} for patch_size {P}: {reason}") from None
        raise UserError(
            f"backbone {name} could not be built with its pretrained weights ({reason}): if they cannot be downloaded, "
            f"fetch {cfg.hf_hub_id or cfg.url or 'them'} elsewhere and name the file with --weights-files {name}=FILE "
            f"(weights_files in config.py)"
        ) from None
    if file is not None:
        _load_strictly(network, read_weights(file), name, file)
    network.reset_classifier(0)
    training = network.training
    try:
        with torch.no_grad():  # timm's own attributes do not tell the width of every network
            features = network.eval()(torch.zeros(1, 3, P, P))
    except Exception as error:
        raise UserError(f"backbone {name} does not take {P} x {P} pixels ({error}): change patch_size") from None
    if features.ndim != 2:
        raise UserError(f"backbone {name} gives features of shape {tuple(features.shape)}, not (B, D): choose another")
    network.train(training)
    mean, std = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
    return Backbone(name, network, features.shape[1], mean, std)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file or a .pth of tensors; nothing in it is executed.

    Raises:
        UserError: no such file, or not a plain state dict.
    """
    if not file.is_file():
        raise UserError(f"the weights file {file} does not exist: correct weights_files")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no weights file makes the readers raise nearly anything
        reason = first_line(error)
        raise UserError(
            f"{file} is not a weights file that can be loaded safely ({reason}): fetch it anew, or name another"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(state[name]) for name in state):
        raise UserError(f"{file} holds something else than a state dict (name -> tensor): save model.state_dict()")
    return state


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with its numbers in memory, each of them."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _load_strictly(network: nn.Module, state: dict[str, torch.Tensor], name: str, file: Path) -> None:
    problem = misfit(state, network.state_dict())
    if problem:
        raise UserError(
            f"{file} does not hold the weights of backbone {name} ({problem}): fetch it anew, or name another"
        )
    network.load_state_dict(state)
