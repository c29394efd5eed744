"""Parameter groups and learning-rate schedule. docs/method.md, Training."""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from config import Experiment, GlassExperiment


def parameter_groups(model: nn.Module, experiment: Experiment) -> list[dict]:
    """Every parameter exactly once, with its learning rate and weight decay."""
    if not isinstance(experiment, GlassExperiment):
        return [{"params": list(model.parameters()), "lr": experiment.lr, "weight_decay": experiment.weight_decay}]
    return [
        {
            "params": list(model.global_model.parameters()),
            "lr": experiment.lr_global,
            "weight_decay": experiment.wd_global,
        },
        {
            "params": list(model.local_model.parameters()),
            "lr": experiment.lr_local,
            "weight_decay": experiment.wd_local,
        },
        {
            "params": [*model.attention.parameters(), *model.classifier.parameters()],
            "lr": experiment.lr_atten_class,
            "weight_decay": 0.0,
        },
    ]


def build_optimizer(
    model: nn.Module, experiment: Experiment, epochs: int, eta_min: float, foreach: bool = False
) -> tuple[torch.optim.AdamW, CosineAnnealingLR]:
    """AdamW over `parameter_groups`, and cosine annealing to `eta_min` over `epochs` steps, one after each epoch.

    On CUDA, AdamW is fused, or with `foreach` torch's default.
    """
    on_cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(parameter_groups(model, experiment), foreach=foreach, fused=on_cuda and not foreach)
    return optimizer, CosineAnnealingLR(optimizer, T_max=epochs, eta_min=eta_min)
