"""Activation checkpointing: a network's blocks compute their activations again in the backward pass.

Of each block only the input is kept. Slower by at most one forward pass of it; the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import UserError

SEQUENCES = nn.Sequential | nn.ModuleList
LAYERS = 3  # with parameters, that a block has at least; a convolution with its normalisation is none


def checkpoint_blocks(model: nn.Module) -> None:
    """Make the blocks of the crops' backbone, without one of the only backbone, compute again in backward.

    Parameters and buffers keep their names.

    Raises UserError if there are none.
    """
    for block in repeated_blocks(getattr(model, "local_model", model), "activation_checkpointing"):
        block.__class__ = _checkpointed(type(block))


def repeated_blocks(network: nn.Module, setting: str) -> list[nn.Module]:
    """The blocks of a network's parts.

    Raises:
        UserError: no block is found; `setting` is what needs one.
    """
    blocks = [block for part in network.children() for block in blocks_of(part)]
    if not blocks:
        raise UserError(
            f"the backbone has no repeated blocks, which {setting} is for: set {setting} off, or take another backbone"
        )
    return blocks


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that are items of a sequence and have several layers, in timm and torchvision alike."""
    for child in module.children():
        inner = [*blocks_of(child)]
        item = isinstance(module, SEQUENCES) and not isinstance(child, SEQUENCES)
        if item and not inner and sum(any(True for _ in m.parameters(False)) for m in child.modules()) >= LAYERS:
            yield child
        yield from inner


class _Checkpointed:
    """Of a block, in training."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the block's own."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*inputs, **options)
        if torch.compiler.is_compiling():  # which records the buffers' changes apart from what it computes again
            return checkpoint(super().forward, *inputs, use_reentrant=False, **options)
        both = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _spared(self))}  # first and second pass
        return checkpoint(super().forward, *inputs, **both, **options)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})


@contextmanager
def _spared(block: nn.Module) -> Iterator[None]:
    """In the block of code, running statistics and counters are copies, which change in their place."""
    kept = [(module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers("", False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
