"""Parameter groups and learning-rate schedule. docs/method.md, Training."""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from config import Experiment, GlassExperiment


def parameter_groups(model: nn.Module, experiment: Experiment) -> list[dict]:
    """Every parameter exactly once, with its learning rate and weight decay."""
    if not isinstance(experiment, GlassExperiment):
        return [{"params": list(model.parameters()), "lr": experiment.lr, "weight_decay": experiment.weight_decay}]
    local = list(model.local_model.parameters()) if hasattr(model, "local_model") else []
    shared = {id(parameter) for parameter in local}  # one network for both views has the crops' learning rate
    of_global = [parameter for parameter in model.global_model.parameters() if id(parameter) not in shared]
    head = [*(model.attention.parameters() if local else ()), *model.classifier.parameters()]
    groups = (
        (of_global, experiment.lr_global, experiment.wd_global),
        (local, experiment.lr_local, experiment.wd_local),
        (head, experiment.lr_atten_class, 0.0),
    )
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params]


def build_optimizer(
    model: nn.Module, experiment: Experiment, epochs: int, eta_min: float, foreach: bool = False
) -> tuple[torch.optim.AdamW, CosineAnnealingLR]:
    """AdamW over `parameter_groups`, and cosine annealing to `eta_min` over `epochs` steps, one after each epoch.

    On CUDA, AdamW is fused, or torch's default with `foreach`.
    """
    on_cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(parameter_groups(model, experiment), foreach=foreach, fused=on_cuda and not foreach)
    return optimizer, CosineAnnealingLR(optimizer, T_max=epochs, eta_min=eta_min)
