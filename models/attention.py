"""The self-attention of torchvision's ViT, without the copies that `nn.MultiheadAttention` makes of its projections."""

import torch
from torch import nn
from torch.nn import functional as F


class SelfAttention(nn.MultiheadAttention):
    """Its base class for one tensor as query, key and value, with the same parameters; equal up to rounding."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, need_weights: bool = False
    ) -> tuple[torch.Tensor, None]:
        """Tokens (B, N, D), three times -> tokens (B, N, D), and no weights."""
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 D)
        q, k, v = packed.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(seen.transpose(1, 2).flatten(2)), None


def pack_self_attention(network: nn.Module) -> None:
    """Turn a network's attention layers into `SelfAttention`; each of them must attend to its own input."""
    for module in network.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = SelfAttention
