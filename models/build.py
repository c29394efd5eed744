"""Experiment -> model."""

from torch import nn

from config import Experiment, GlassExperiment, Settings
from models.backbones import load_backbone
from models.glass_models import GlassModel
from models.standard_models import build_standard


def build_model(experiment: Experiment, settings: Settings) -> nn.Module:
    """The experiment's model with its initial weights, on the CPU; called as `model(*views)` it gives logits (B, 2).

    New layers are drawn from torch's global generator: seed it first. Raises UserError as `load_backbone` does.
    """
    if isinstance(experiment, GlassExperiment):
        global_backbone, local_backbone = (load_backbone(experiment.backbone, settings) for _ in range(2))
        return GlassModel(global_backbone, local_backbone, experiment.dropout_rate)
    return build_standard(load_backbone(experiment.backbone, settings), experiment.dropout_rate)
