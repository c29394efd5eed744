"""Standard transfer learning: one backbone on the resized image. docs/method.md, Model."""

from torch import nn

from models.backbones import NUM_CLASSES, Backbone


def build_standard(backbone: Backbone, dropout_rate: float) -> nn.Module:
    """The backbone with its last layer replaced by dropout and a linear layer.

    Takes a normalised view (B, 3, P, P) and returns logits (B, 2).
    """
    model = backbone.with_head(nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(backbone.width, NUM_CLASSES)))
    backbone.register_normalisation(model)
    return model
