"""Name -> network with its initial weights, its width and its normalisation. docs/method.md, Model.

`vit`, `convnext` and `resnet` are the paper's, from torchvision; `timm:<model>` is any model of timm. To add a network
of torchvision, add an entry to `TORCHVISION_BACKBONES`.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from config import Settings
from models.attention import pack_self_attention
from models.weights import read_state_dict, state_dict_mismatch
from utils import UserError, first_line

NUM_CLASSES = 2  # 0 fake, 1 real
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # for all of torchvision's ImageNet weights
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224  # pixels a side


@dataclass(frozen=True)
class TorchvisionBackbone:
    """A network of torchvision whose last layer is linear; its weights are IMAGENET1K_V1."""

    model: str  # its name in torchvision.models.list_models()
    norm: str | None = None  # path of the normalisation before the last layer, if GLASS removes it too
    # Path of the layer whose output is the last map, (B, C, h, w) or tokens (B, N, C), before any normalisation of each
    # place, after which all places have the same sum.
    last_map: str | None = None
    vit_patch: int | None = None  # side of a ViT's patches: the network is built for one image size, a multiple of it


TORCHVISION_BACKBONES = {
    "vit": TorchvisionBackbone("vit_b_16", last_map="encoder.layers", vit_patch=16),
    "convnext": TorchvisionBackbone("convnext_tiny", norm="classifier.0", last_map="features"),
    "resnet": TorchvisionBackbone("resnet50", last_map="layer4"),
}


@dataclass(frozen=True)
class Backbone:
    """A network (B, 3, P, P) -> (B, D) without its last layer, and what a model needs to know about it."""

    network: nn.Module
    width: int  # D
    mean: tuple[float, ...]  # with std, normalises RGB in [0, 1]
    std: tuple[float, ...]
    last: str | None = None  # path of the removed last layer; None: the network has none
    norm: str | None = None  # as in TorchvisionBackbone
    last_map: str | None = None  # likewise; None for timm's networks, in which it is found

    def without_head(self) -> nn.Module:
        """The network as GLASS uses it, (B, 3, P, P) -> (B, D)."""
        if self.norm:
            self.network.set_submodule(self.norm, nn.Identity(), strict=True)
        return self.network

    def with_head(self, head: nn.Module) -> nn.Module:
        """The network as (B, 3, P, P) -> logits, with `head` as its last layer."""
        if self.last is None:
            return nn.Sequential(self.network, head)
        self.network.set_submodule(self.last, head)
        return self.network

    def register_normalisation(self, model: nn.Module) -> None:
        """Give `model` the buffers `input_mean` and `input_std` (3, 1, 1), which normalise views in [0, 1]."""
        for name, values in (("input_mean", self.mean), ("input_std", self.std)):
            model.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)


def normalised(model: nn.Module, view: torch.Tensor) -> torch.Tensor:
    """A view (..., 3, P, P) of 0 to 255 as float32, normalised with the model's mean and standard deviation."""
    if not getattr(model, "channels_last", True):  # views arrive so, and convolutions follow the layout of their input
        view = view.contiguous()
    # In place, because the tiles of a large image take gigabytes.
    return torch.div(view, 255).to(model.input_mean.dtype).sub_(model.input_mean).div_(model.input_std)


class NormalisedInput(nn.Module):
    """A model that takes views of 0 to 255; compiled, one pass over their bytes gives half precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *views: torch.Tensor) -> torch.Tensor:
        """Views (..., 3, P, P) -> logits (B, 2)."""
        return self.model(*(normalised(self.model, view) for view in views))


def features_and_map(network: nn.Module, last_map: str | None, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, D) of a backbone without its last layer, and its last map (B, C, h, w), for a view (B, 3, P, P).

    Args:
        last_map: as in `Backbone`.
    """
    maps: list[torch.Tensor] = []
    if last_map is not None:
        handle = network.get_submodule(last_map).register_forward_hook(lambda *call: maps.append(call[-1]))
    else:
        layer = getattr(network, "norm", None) or nn.Identity()
        handle = layer.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    try:
        if last_map is not None:
            features = network(view)
        else:
            maps_of_features = network.forward_features(view)
            features = network.forward_head(maps_of_features)
            maps.append(maps_of_features)  # used if the network has no such norm
    finally:
        handle.remove()
    activations = maps[0]
    tokens = getattr(activations, "ndim", 0) == 3
    if tokens:
        places = activations[:, 1 if last_map else getattr(network, "num_prefix_tokens", 0) :]
        activations = places.transpose(1, 2)
        side = math.isqrt(places.shape[1])
        activations = activations.unflatten(2, (side, side)) if side**2 == places.shape[1] else None
    if getattr(activations, "ndim", 0) != 4:
        raise UserError(
            f"{type(network).__name__} has no square map of places, by which crop_sampler cooi chooses crops: take "
            f"another backbone or sampler"
        )
    if not tokens and activations.shape[1] == activations.shape[2] != activations.shape[3]:
        activations = activations.movedim(-1, 1)  # some of timm's networks have channels last
    return features, activations


def load_backbone(name: str, settings: Settings) -> Backbone:
    """The network `name` with its weights from `settings.weights_files`, else downloaded if `pretrained`, else random.

    Raises:
        UserError: no such network, weights that are unavailable or another network's, or a patch size it cannot take.
    """
    files = dict(item.split("=", 1) for item in settings.weights_files)
    for key in (name, *files):  # otherwise the file of a mistyped name would silently be unused
        model = key.removeprefix("timm:")
        if key not in TORCHVISION_BACKBONES and (model == key or not timm.is_model(model.split(".")[0])):
            raise UserError(
                f"there is no backbone {key}: choose {', '.join(TORCHVISION_BACKBONES)} or timm:<model> with a model "
                f"of timm.list_models(), or add it to models/backbones.py"
            )
    load = _load_torchvision if name in TORCHVISION_BACKBONES else _load_timm
    return load(name, settings, Path(files[name]) if name in files else None)


def _load_torchvision(name: str, settings: Settings, file: Path | None) -> Backbone:
    entry, P = TORCHVISION_BACKBONES[name], settings.patch_size
    trained = file or settings.pretrained
    if entry.vit_patch and (P % entry.vit_patch or (trained and P != IMAGENET_SIZE)):
        raise UserError(
            f"patch_size is {P}: backbone {name} takes multiples of {entry.vit_patch} pixels, and with ImageNet "
            f"weights {IMAGENET_SIZE} alone; change patch_size, or choose a backbone timm:<model>"
        )
    network = get_model(entry.model, weights=None, **({"image_size": P} if entry.vit_patch else {}))
    if trained:
        _load_weights(network, name, file or _imagenet_file(name, get_model_weights(entry.model).IMAGENET1K_V1))
    if not settings.author_runtime:
        pack_self_attention(network)
    last, layer = [*network.named_modules()][-1]  # heads.head, classifier.2 and fc in the paper's three
    if not isinstance(layer, nn.Linear):
        raise UserError(f"backbone {name} does not end in a linear layer, which the models replace: choose another")
    network.set_submodule(last, nn.Identity())
    return Backbone(network, layer.in_features, IMAGENET_MEAN, IMAGENET_STD, last, entry.norm, entry.last_map)


def _imagenet_file(name: str, weights: WeightsEnum) -> Path:
    """The file in which torchvision keeps downloaded weights; downloads them if there is none."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    if not file.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the ImageNet weights of backbone {name} could not be downloaded ({error}): fetch {weights.url} "
                f"on a machine with internet and put it at {file}, or name it with --weights-files {name}=FILE"
            ) from None
    return file


def _load_timm(name: str, settings: Settings, file: Path | None) -> Backbone:
    model, P = name.removeprefix("timm:"), settings.patch_size
    cfg = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
    size = {"img_size": P} if cfg.fixed_input_size else {}
    download = settings.pretrained and not file
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error below says it once
    try:
        network = timm.create_model(model, pretrained=download, **size)
    except Exception as error:  # timm, its hub clients and the networks raise many types
        source = cfg.hf_hub_id or cfg.url or "its weights"
        remedy = f": if {source} cannot be downloaded, name a file with --weights-files {name}=FILE" if download else ""
        raise UserError(f"timm cannot build {name} for patch_size {P} ({first_line(error)}){remedy}") from None
    if file:
        _load_weights(network, name, file)
    network.reset_classifier(0)
    try:
        with torch.no_grad():  # timm does not know the width of every network
            features = network.eval()(torch.zeros(1, 3, P, P))
    except Exception as error:
        text = f"backbone {name} does not take {P} x {P} pixels ({first_line(error)}): change patch_size"
        raise UserError(text) from None
    if features.ndim != 2:
        raise UserError(f"backbone {name} gives features of shape {tuple(features.shape)}, not (B, D): choose another")
    network.train()
    return Backbone(network, features.shape[1], *(tuple(network.pretrained_cfg[key]) for key in ("mean", "std")))


def _load_weights(network: nn.Module, name: str, file: Path) -> None:
    """Load a state dict from a .safetensors file or a .pth of tensors; nothing in it is executed."""
    if not file.is_file():
        raise UserError(f"the weights file {file} does not exist: correct weights_files")
    state = read_state_dict(file)
    problem = state_dict_mismatch(state, network.state_dict())
    if problem:
        raise UserError(f"{file} does not hold the weights of backbone {name} ({problem}): name another file")
    network.load_state_dict(state)
