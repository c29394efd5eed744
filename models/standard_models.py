"""Standard transfer learning: one backbone on the resized image. SPEC, Model."""

import torch
from torch import nn

from models.backbones import NUM_CLASSES, Backbone


def build_standard(backbone: Backbone, dropout_rate: float) -> nn.Module:
    """The backbone with its last layer replaced by dropout and a linear layer.

    Takes a normalised view (B, 3, P, P) and gives logits (B, 2). `input_mean` and `input_std` (3, 1, 1) are what a
    view in [0, 1] is normalised with.
    """
    model = backbone.with_head(nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(backbone.width, NUM_CLASSES)))
    model.register_buffer("input_mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
    model.register_buffer("input_std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
    return model
