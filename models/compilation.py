"""Compilation of a network block by block: once for all blocks that are alike, in a few seconds each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from models.checkpointing import blocks_of


def compile_blocks(model: nn.Module) -> None:
    """Compile the model's repeated blocks, for training and evaluation alike and for batches of any size.

    Parameters and buffers keep their names; a model without such blocks stays as it is.
    """
    blocks = [*blocks_of(model)]
    # Blocks of several widths, in training and in evaluation, are one function to torch.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.__class__ = _compiled(type(block))


class _Compiled:
    """Of a block."""

    compiled_forward: Callable[..., Any]

    def forward(self, x: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        """As the block's own."""
        torch._dynamo.maybe_mark_dynamic(x, 0)  # both branches' batches and the last, smaller one
        return type(self).compiled_forward(self, x, *inputs, **options)


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    forward = staticmethod(torch.compile(kind.forward, dynamic=False))
    return type(f"Compiled{kind.__name__}", (_Compiled, kind), {"compiled_forward": forward})
