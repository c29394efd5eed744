"""Activation checkpointing: a network's blocks compute their activations again in the backward pass.

Only the input of each block is kept. The numbers are the same; a block costs one more forward pass.
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
LAYERS = 3  # with parameters: the fewest of a block; a convolution with its normalisation is not one


def checkpoint_blocks(model: nn.Module) -> None:
    """Checkpoint the blocks of the crops' backbone, or of the only backbone of a model without crops.

    Parameters and buffers keep their names. Raises UserError if there are no blocks.
    """
    for block in repeated_blocks(getattr(model, "local_model", model), "activation_checkpointing"):
        block.__class__ = _checkpointed(type(block))


def repeated_blocks(network: nn.Module, setting: str) -> list[nn.Module]:
    """The blocks of a network's parts.

    Raises:
        UserError: there are none; `setting` is the setting that needs them.
    """
    blocks = [block for part in network.children() for block in blocks_of(part)]
    if not blocks:
        raise UserError(
            f"the backbone has no repeated blocks, which {setting} is for: set {setting} off, or take another backbone"
        )
    return blocks


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that are items of a sequence and have several layers; so in timm and in torchvision."""
    for child in module.children():
        inner = [*blocks_of(child)]
        item = isinstance(module, SEQUENCES) and not isinstance(child, SEQUENCES)
        if item and not inner and sum(any(True for _ in m.parameters(False)) for m in child.modules()) >= LAYERS:
            yield child
        yield from inner


class _Checkpointed:
    """Base class of a checkpointed block."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The block's own forward pass; in training, repeated in the backward pass."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*inputs, **options)
        if torch.compiler.is_compiling():  # compiled code changes buffers in the first pass only
            return checkpoint(super().forward, *inputs, use_reentrant=False, **options)
        contexts = {"context_fn": lambda: (nullcontext(), _buffers_unchanged(self))}  # of the first and second pass
        return checkpoint(super().forward, *inputs, use_reentrant=False, **contexts, **options)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})


@contextmanager
def _buffers_unchanged(block: nn.Module) -> Iterator[None]:
    """Within it, running statistics and counters are copies, which change instead of them."""
    kept = [(module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers("", False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
