"""GLASS: one backbone for the global view, one for the crops, attention over the crops. docs/method.md, Model."""

import torch
from torch import nn

from models.backbones import NUM_CLASSES, Backbone

ATTENTION_WIDTH = 128
ROWS_AT_A_TIME = 1024  # of a K x K matrix, where the crops are the thousands of tiles of a whole image


class GlassModel(nn.Module):
    """Global-Local Attention with Stratified Sampling, of two networks of the same width D, both trained."""

    def __init__(self, global_backbone: Backbone, local_backbone: Backbone, dropout_rate: float) -> None:
        super().__init__()
        D = global_backbone.width
        self.global_model = global_backbone.without_head()
        self.local_model = local_backbone.without_head()
        self.attention = nn.Sequential(
            nn.Linear(D, ATTENTION_WIDTH), nn.Tanh(), nn.Dropout(dropout_rate), nn.Linear(ATTENTION_WIDTH, 1)
        )
        self.classifier = nn.Sequential(nn.LayerNorm(2 * D), nn.Dropout(dropout_rate), nn.Linear(2 * D, NUM_CLASSES))
        global_backbone.register_normalisation(self)

    def forward(self, global_view: torch.Tensor, local_crops: torch.Tensor) -> torch.Tensor:
        """Normalised views (B, 3, P, P) and (B, K, 3, P, P) -> logits (B, 2)."""
        return self.forward_with_attention(global_view, local_crops)[0]

    def forward_with_attention(
        self, global_view: torch.Tensor, local_crops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, and the attention weights (B, K), which sum to one over the crops."""
        B, K = local_crops.shape[:2]
        global_features = self.global_model(global_view)  # (B, D)
        crop_features = self.local_model(local_crops.flatten(0, 1)).unflatten(0, (B, K))  # (B, K, D)
        return self.classify(global_features, crop_features)

    def classify(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the backbones: features (B, D) and (B, K, D) -> logits (B, 2), attention weights (B, K)."""
        attention_scores = self.attention(crop_features)  # (B, K, 1)
        attention_weights = attention_scores.softmax(dim=1)  # (B, K, 1)
        local_features = (attention_weights * crop_features).sum(dim=1)  # (B, D)

        logits = self.classifier(torch.cat([global_features, local_features], dim=1))  # (B, 2)
        return logits, attention_weights.squeeze(-1)

    def classify_without_each(self, global_features: torch.Tensor, crop_features: torch.Tensor) -> torch.Tensor:
        """Features (D,) and (K, D) of one image -> logits (K, 2), row k as if there were no crop k.

        The attention of the other crops sums to one again; with one crop alone the row is NaN.
        """
        K, logits = len(crop_features), []
        all_crops = torch.arange(K, device=crop_features.device)
        attention_scores = self.attention(crop_features).squeeze(-1)  # (K,)
        for crops in all_crops.split(ROWS_AT_A_TIME):
            left_out = crops[:, None] == all_crops  # (rows, K)
            attention_weights = attention_scores.expand(len(crops), K).masked_fill(left_out, -torch.inf).softmax(dim=1)
            both = [global_features.expand(len(crops), -1), attention_weights @ crop_features]  # (rows, D) each
            logits.append(self.classifier(torch.cat(both, dim=1)))
        return torch.cat(logits)
