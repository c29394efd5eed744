"""GLASS: one backbone for the global view, one for the crops, attention over the crops. docs/method.md, Model."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.backbones import NUM_CLASSES, Backbone, features_and_map
from models.pooling import Pool

CROPS_A_PASS = 64  # of one image, where it has more, as with every tile: what bounds memory


class GlassModel(nn.Module):
    """Global-Local Attention with Stratified Sampling, of two networks of the same width D, both trained.

    Args:
        global_backbone: None: the model does not look at the global view.
        local_backbone: None: it does not look at crops; the global view's: one network for both.
        pool: of the crops' features.
        dropout_rate: before the last layer.
        num_chosen: K, if the model chooses its crops by the map of the global view; 0: it takes those that it is given.
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
        known = [each for each in (global_backbone, local_backbone) if each]
        D = known[0].width * len(known)
        self.global_model = global_backbone.without_head() if global_backbone else _NoFeatures()
        if local_backbone:
            self.local_model, self.attention = local_backbone.without_head(), pool
        self.classifier = nn.Sequential(nn.LayerNorm(D), nn.Dropout(dropout_rate), nn.Linear(D, NUM_CLASSES))
        self.num_chosen, self.last_map = num_chosen, known[0].last_map
        known[0].register_normalisation(self)

    def forward(self, global_view: torch.Tensor, local_crops: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised views (B, 3, P, P) and (B, K, 3, P, P), None without crops -> logits (B, 2)."""
        if local_crops is None:
            return self.classifier(self.global_model(global_view))
        return self.forward_with_attention(global_view, local_crops)[0]

    def forward_with_attention(
        self, global_view: torch.Tensor, local_crops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, and the attention weights (B, K), which sum to one over the crops."""
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
        """Features (B, D) of the global view, and which of `places` crops, laid as a square, it points to (B, K)."""
        global_features, activations = features_and_map(self.global_model, self.last_map, global_view)
        side = math.isqrt(places)
        return global_features, places_of_interest(activations.detach(), side, self.num_chosen)

    def classify(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the backbones: features (B, D) and (B, K, D) -> logits (B, 2), attention weights (B, K)."""
        local_features, attention_weights = self.attention(crop_features)  # (B, D), (B, K)
        logits = self.classifier(torch.cat([global_features, local_features], dim=1))  # (B, 2)
        return logits, attention_weights

    def classify_without_each(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> torch.Tensor:
        """Features (D,) and (K, D) of one image -> logits (K, 2), row k as if there were no crop k.

        The attention of the other crops sums to one again; with one crop alone the row is NaN.
        """
        local_features = self.attention.without_each(crop_features)
        return self.classifier(torch.cat([global_features.expand(len(crop_features), -1), local_features], dim=1))


class _NoFeatures(nn.Module):
    """In place of a branch that a model lacks: features of width 0."""

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        """(B, 3, P, P) -> (B, 0)."""
        return view.new_zeros(len(view), 0)


def places_of_interest(activations: torch.Tensor, side: int, K: int) -> torch.Tensor:
    """COOI: where the global branch's last map is strongest (Fusing, arXiv 2203.13964; GLFF, 2211.08615).

    Three-by-three means of the map summed over its channels; K times the highest one is taken, and it and its
    neighbours come after all others from then on.

    Args:
        activations: (B, C, h, w); resized to `side` where it has another size.

    Returns:
        int64 (B, K): numbers of cells, row by row, of a grid of `side` x `side`.
    """
    scores = activations.float().sum(dim=1, keepdim=True)  # (B, 1, h, w)
    if scores.shape[-2:] != (side, side):
        scores = F.interpolate(scores, (side, side), mode="bilinear", antialias=True)
    scores = F.avg_pool2d(scores, 3, stride=1, padding=1, count_include_pad=False).flatten(1)  # (B, side * side)
    # Places whose scores differ by rounding alone count as equal, of which the first is taken.
    scores = (1e4 * scores / scores.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)).round()
    cells = torch.arange(side * side, device=scores.device)
    rows, columns, chosen = cells // side, cells % side, []
    for _ in range(K):
        cell = scores.argmax(dim=1)  # (B,)
        chosen.append(cell)
        near = [(part - part[cell][:, None]).abs() <= 1 for part in (rows, columns)]  # (B, side * side) each
        scores = scores - 3e4 * (near[0] & near[1]) * (1 + (cells == cell[:, None]) * K)
    return torch.stack(chosen, dim=1)
