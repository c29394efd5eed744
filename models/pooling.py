"""Poolings: features of an image's K crops -> one feature vector. docs/method.md, Model and Beyond the paper."""

import math

import torch
from torch import nn

from config import Pooling

WIDTH = 128  # of the hidden layer that scores a crop
HEADS = 8  # of the learned query
ROWS_AT_A_TIME = 1024  # of a K x K matrix: an image may have thousands of tiles


class Pool(nn.Module):
    """The mean over the crops' features, weighted by the softmax over K of their `scores`."""

    def scores(self, crop_features: torch.Tensor) -> torch.Tensor:
        """(..., K, D) -> (..., K, H): one score for each D / H neighbouring features."""
        raise NotImplementedError

    def forward(self, crop_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, D) -> (B, D), and the crops' weights (B, K), means over H, which sum to one over the crops."""
        weights = self.scores(crop_features).softmax(dim=1)  # (B, K, H)
        H, D = weights.shape[-1], crop_features.shape[-1]
        by_feature = weights if H == 1 else weights.repeat_interleave(D // H, dim=-1)
        return (by_feature * crop_features).sum(dim=1), weights.mean(dim=-1)

    def without_each(self, crop_features: torch.Tensor) -> torch.Tensor:
        """(K, D) of one image -> (K, D), row k as if there were no crop k; with a single crop, the row is NaN."""
        K, pooled, scores = len(crop_features), [], self.scores(crop_features)
        by_head = crop_features.unflatten(1, (scores.shape[1], -1))  # (K, H, D / H)
        all_crops = torch.arange(K, device=crop_features.device)
        for crops in all_crops.split(ROWS_AT_A_TIME):
            left_out = (crops[:, None] == all_crops)[..., None]  # (rows, K, 1)
            weights = scores.expand(len(crops), -1, -1).masked_fill(left_out, -torch.inf).softmax(dim=1)
            pooled.append(torch.einsum("rkh,khd->rhd", weights, by_head).flatten(1))
        return torch.cat(pooled)


class AttentionPool(Pool, nn.Sequential):
    """The paper's attention; an nn.Sequential, so that its parameters have the names of the author's checkpoints."""

    def __init__(self, D: int, dropout_rate: float) -> None:
        super().__init__(nn.Linear(D, WIDTH), nn.Tanh(), nn.Dropout(dropout_rate), nn.Linear(WIDTH, 1))

    def scores(self, crop_features: torch.Tensor) -> torch.Tensor:
        """As in `Pool`, H = 1."""
        return nn.Sequential.forward(self, crop_features)


class GatedPool(Pool):
    """Gated attention (Ilse, Tomczak and Welling 2018, arXiv 1802.04712)."""

    def __init__(self, D: int, dropout_rate: float) -> None:
        super().__init__()
        self.hidden, self.gate, self.score = nn.Linear(D, WIDTH), nn.Linear(D, WIDTH), nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(dropout_rate)

    def scores(self, crop_features: torch.Tensor) -> torch.Tensor:
        """As in `Pool`, H = 1."""
        return self.score(self.dropout(self.hidden(crop_features).tanh() * self.gate(crop_features).sigmoid()))


class QueryPool(Pool):
    """Attention of a learned query with several heads (SPAI, arXiv 2411.19417), each for a part of the features."""

    def __init__(self, D: int, dropout_rate: float) -> None:
        super().__init__()
        heads = math.gcd(D, HEADS)
        self.key, self.dropout = nn.Linear(D, WIDTH), nn.Dropout(dropout_rate)
        self.query = nn.Parameter(torch.randn(heads, WIDTH // heads))

    def scores(self, crop_features: torch.Tensor) -> torch.Tensor:
        """As in `Pool`, H = 8, or less where D is not a multiple of 8."""
        keys = self.dropout(self.key(crop_features)).unflatten(-1, self.query.shape)
        return (keys * self.query).sum(dim=-1) / self.query.shape[1] ** 0.5


class MeanPool(Pool):
    """The plain mean."""

    def scores(self, crop_features: torch.Tensor) -> torch.Tensor:
        """As in `Pool`, H = 1."""
        return torch.zeros_like(crop_features[..., :1])


class MaxPool(Pool):
    """The maximum of each feature; a crop's weight is the share of features of which it has the maximum."""

    def forward(self, crop_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `Pool`."""
        highest, crops = crop_features.max(dim=1)  # (B, D) each
        is_highest = crops[:, None] == torch.arange(crop_features.shape[1], device=crops.device)[:, None]  # (B, K, D)
        return highest, is_highest.to(highest.dtype).mean(dim=-1)

    def without_each(self, crop_features: torch.Tensor) -> torch.Tensor:
        """As in `Pool`."""
        K = len(crop_features)
        if K == 1:
            return torch.full_like(crop_features, torch.nan)
        (highest, second), (crops, _) = crop_features.topk(2, dim=0)
        return torch.where(crops == torch.arange(K, device=crops.device)[:, None], second, highest)


def build_pool(pooling: Pooling, D: int, dropout_rate: float) -> Pool:
    """The pooling of this name, for features of width D."""
    if pooling in ("mean", "max"):
        return MeanPool() if pooling == "mean" else MaxPool()
    return {"attention": AttentionPool, "gated": GatedPool, "query": QueryPool}[pooling](D, dropout_rate)
