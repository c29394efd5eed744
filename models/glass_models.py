"""GLASS: one backbone for the global view, one for the crops, attention over the crops. docs/method.md, Model."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.backbones import NUM_CLASSES, Backbone, features_and_map
from models.pooling import Pool

CROPS_A_PASS = 64  # in evaluation of one image: bounds memory where it has more crops, as with every tile


class GlassModel(nn.Module):
    """Global-Local Attention with Stratified Sampling: two networks of the same width D, both trained.

    Args:
        global_backbone: None: the model does not see the global view.
        local_backbone: None: it sees no crops; the same as `global_backbone`: one network for both.
        pool: pools the crops' features.
        dropout_rate: before the last layer.
        num_chosen: K, if the model chooses its crops by the map of the global view; 0: it takes all crops it is given.
    """

    def __init__(
        self,
        global_backbone: Backbone | None,
        local_backbone: Backbone | None,
        pool: Pool,
        dropout_rate: float,
        num_chosen: int = 0,
    ) -> None:
        super().__init__()
        backbones = [each for each in (global_backbone, local_backbone) if each]
        D = backbones[0].width * len(backbones)
        self.global_model = global_backbone.without_head() if global_backbone else _NoFeatures()
        if local_backbone:
            self.local_model, self.attention = local_backbone.without_head(), pool
        self.classifier = nn.Sequential(nn.LayerNorm(D), nn.Dropout(dropout_rate), nn.Linear(D, NUM_CLASSES))
        self.num_chosen, self.last_map = num_chosen, backbones[0].last_map
        backbones[0].register_normalisation(self)

    def forward(self, global_view: torch.Tensor, local_crops: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised views (B, 3, P, P) and (B, K, 3, P, P), None without crops -> logits (B, 2)."""
        if local_crops is None:
            return self.classifier(self.global_model(global_view))
        return self.forward_with_attention(global_view, local_crops)[0]

    def forward_with_attention(
        self, global_view: torch.Tensor, local_crops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of `forward`, and the attention weights (B, K), which sum to one over the crops."""
        if self.num_chosen:
            global_features, chosen = self.choose(global_view, local_crops.shape[1])
            local_crops = local_crops[torch.arange(len(chosen), device=chosen.device)[:, None], chosen]
        else:
            global_features = self.global_model(global_view)  # (B, D)
        B, K = local_crops.shape[:2]
        crops = local_crops.flatten(0, 1)
        passes = crops.split(CROPS_A_PASS) if B == 1 and not self.training else [crops]
        crop_features = torch.cat([self.local_model(some) for some in passes]).unflatten(0, (B, K))  # (B, K, D)
        return self.classify(global_features, crop_features)

    def choose(self, global_view: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D) of the global view, and which crops (B, K) of a square of `places` it chooses."""
        global_features, activations = features_and_map(self.global_model, self.last_map, global_view)
        side = math.isqrt(places)
        return global_features, places_of_interest(activations.detach(), side, self.num_chosen)

    def classify(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D) and (B, K, D) of the backbones -> logits (B, 2), attention weights (B, K)."""
        local_features, attention_weights = self.attention(crop_features)  # (B, D), (B, K)
        logits = self.classifier(torch.cat([global_features, local_features], dim=1))  # (B, 2)
        return logits, attention_weights

    def classify_without_each(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> torch.Tensor:
        """Features (D,) and (K, D) of one image -> logits (K, 2), row k as if there were no crop k.

        The attention over the other crops sums to one again; with a single crop, the row is NaN.
        """
        local_features = self.attention.without_each(crop_features)
        return self.classifier(torch.cat([global_features.expand(len(crop_features), -1), local_features], dim=1))


class _NoFeatures(nn.Module):
    """Takes the place of a missing branch: features of width 0."""

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        """(B, 3, P, P) -> (B, 0)."""
        return view.new_zeros(len(view), 0)


def places_of_interest(activations: torch.Tensor, side: int, K: int) -> torch.Tensor:
    """COOI: where the global branch's last map is strongest (Fusing, arXiv 2203.13964; GLFF, 2211.08615).

    The map is summed over its channels and averaged over 3 x 3 places. K times, the highest place is chosen; from then
    on it and its neighbours rank below all others.

    Args:
        activations: (B, C, h, w); resized to `side` where it has another size.

    Returns:
        int64 (B, K): numbers of cells of a `side` x `side` grid, counted row by row.
    """
    scores = activations.float().sum(dim=1, keepdim=True)  # (B, 1, h, w)
    if scores.shape[-2:] != (side, side):
        scores = F.interpolate(scores, (side, side), mode="bilinear", antialias=True)
    scores = F.avg_pool2d(scores, 3, stride=1, padding=1, count_include_pad=False).flatten(1)  # (B, side * side)
    # Scores that differ only by rounding count as equal; the first of equal places is chosen.
    scores = (1e4 * scores / scores.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)).round()
    cells = torch.arange(side * side, device=scores.device)
    rows, columns, chosen = cells // side, cells % side, []
    for _ in range(K):
        cell = scores.argmax(dim=1)  # (B,)
        chosen.append(cell)
        near = [(part - part[cell][:, None]).abs() <= 1 for part in (rows, columns)]  # (B, side * side) each
        scores = scores - 3e4 * (near[0] & near[1]) * (1 + (cells == cell[:, None]) * K)
    return torch.stack(chosen, dim=1)
