"""Model and loader -> probabilities, labels, loss; changes neither."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from training import processes
from training.runtime import Runtime
from utils import UserError


class NonFiniteLoss(UserError):
    """A loss, or the logits that it is computed from, became infinite or NaN."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for N images.

    probabilities (N, 2) float64, fake and real; scores (N,) float64, logit of fake minus logit of real; labels (N,)
    int64; loss, the mean cross-entropy without label smoothing.
    """

    probabilities: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of images that are classified correctly."""
        return float((self.probabilities.argmax(axis=1) == self.labels).mean())


def sizes_of(views: Sequence[torch.Tensor]) -> str:
    """The sizes of a batch's views, for messages."""
    return "views of " + " and ".join("x".join(map(str, view.shape)) for view in views) + " (batch first)"


def predict_batch(model: nn.Module, views: Sequence[torch.Tensor], runtime: Runtime) -> torch.Tensor:
    """Logits (B, 2) in float32, on the device, of a batch of uint8 views."""
    with runtime.memory_for(f"predicting {sizes_of(views)}"), runtime.autocast():
        return model(*runtime.to_device(model, views)).float()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    runtime: Runtime,
    description: str = "evaluate",
    after_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predict every image of the loader, in its order, in evaluation mode; what `after_batch` raises ends it.

    With several processes, each predicts its share of the batches, and all get all predictions.

    Raises:
        NonFiniteLoss: names the images whose logits are infinite or NaN.
    """
    model.eval()
    found = []  # (logits, labels) of each batch
    rounds = tqdm(range(loader.batch_sampler.rounds), desc=description, leave=False, disable=processes.no_bar())
    for batch, _ in zip_longest(runtime.batches(loader), rounds):
        if batch is not None:  # in the last round, some processes have none
            *views, labels = batch
            found.append((predict_batch(model, views, runtime), labels))
        after_batch()
    shares = processes.gathered([(logits.double().cpu(), labels) for logits, labels in found])
    in_order = [pair for pairs in zip_longest(*shares) for pair in pairs if pair]
    all_logits, all_labels = (torch.cat(parts) for parts in zip(*in_order, strict=True))
    bad = (~all_logits.isfinite().all(dim=1)).nonzero().flatten().tolist()  # argmax would call them class 0
    if bad:
        names = ", ".join(loader.dataset.names[position] for position in bad[:3])
        raise NonFiniteLoss(
            f"the model's outputs are infinite or not a number for {len(bad)} of {len(all_labels)} images "
            f"({names}{', ...' if len(bad) > 3 else ''}): lower the learning rate, try --precision fp32, and look "
            f"at the weights that training started from"
        )
    return Predictions(
        probabilities=all_logits.softmax(dim=1).numpy(),
        scores=(all_logits[:, 0] - all_logits[:, 1]).numpy(),
        labels=all_labels.numpy(),
        loss=F.cross_entropy(all_logits, all_labels).item(),
    )
