"""Experiment -> model."""

from torch import nn

from config import Experiment, GlassExperiment, Settings
from models.backbones import load_backbone
from models.glass_models import GlassModel
from models.pooling import build_pool
from models.standard_models import build_standard
from utils import UserError


def build_model(experiment: Experiment, settings: Settings) -> nn.Module:
    """The experiment's model with its initial weights, on the CPU; `model(*views)` returns logits (B, 2).

    New layers are drawn from torch's global generator: seed it first. Raises UserError as `load_backbone` does, and
    for a combination of branches, sampler and pooling that makes no sense.
    """
    name, rate = experiment.backbone, experiment.dropout_rate
    if not isinstance(experiment, GlassExperiment):
        return build_standard(load_backbone(name, settings), rate)
    branches, K = experiment.branches, experiment.num_crops if experiment.crop_sampler == "cooi" else 0
    if branches == "global" and (experiment.crop_sampler, experiment.pooling) != ("stratified", "attention"):
        raise UserError("branches global has no crops: leave crop_sampler and pooling as they are, or change branches")
    if branches == "local" and K:
        raise UserError("crop_sampler cooi asks the global view where to look, which branches local has none of")
    global_backbone = None if branches == "local" else load_backbone(name, settings)
    local_backbone = global_backbone
    if branches != "shared":
        local_backbone = None if branches == "global" else load_backbone(name, settings)
    pool = build_pool(experiment.pooling, (global_backbone or local_backbone).width, rate)
    return GlassModel(global_backbone, local_backbone, pool, rate, K if local_backbone else 0)
