"""Compilation of a network block by block: once for all equal blocks, in a few seconds each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from models.checkpointing import repeated_blocks


def compile_blocks(model: nn.Module) -> None:
    """Compile the model's repeated blocks, for training and evaluation and for batches of any size.

    Parameters and buffers keep their names. Raises UserError if there are no such blocks.
    """
    blocks = repeated_blocks(model, "compile_blocks")
    # For torch, blocks of several widths, in training and in evaluation, are one function that it recompiles.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.__class__ = _compiled(type(block))


class _Compiled:
    """Base class of a compiled block."""

    compiled_forward: Callable[..., Any]

    def forward(self, x: Any, *inputs: Any, **options: Any) -> Any:
        """The block's own forward pass, compiled."""
        for tensor in tree_leaves(x):  # some blocks take a list
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the batches of both branches, and the smaller last one
        return type(self).compiled_forward(self, x, *inputs, **options)


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    forward = staticmethod(torch.compile(kind.forward, dynamic=False))
    return type(f"Compiled{kind.__name__}", (_Compiled, kind), {"compiled_forward": forward})
