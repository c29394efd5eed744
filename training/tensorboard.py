"""What `fit` writes for TensorBoard, if the settings ask for it. docs/results.md, TensorBoard."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from torch import nn
from torch.utils.data import DataLoader

from training.evaluation import Predictions
from training.metrics import ECE_BINS
from training.progress import EpochRecord
from training.runtime import Runtime
from utils import UserError

PICTURES_EVERY = 5  # epochs
IMAGES, CROPS = 6, 8  # of the panel: validation images, and crops of each, those with the largest effects
FAKE, REAL = (213, 94, 0), (0, 114, 178)  # frames of crops that are evidence for each


class Watch:
    """Writes the scalars of each epoch, and every few epochs pictures, to a folder of a training's own.

    Of a training that is resumed, what was written after that moment is hidden.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, label: str, model: nn.Module, loader: DataLoader, runtime: Runtime) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs tensorboard: pip install -r requirements-tensorboard.txt") from None
        self.folder, self.kind = folder / re.sub(r"[^\w.-]+", "_", label), SummaryWriter
        self.model, self.loader, self.runtime = model, loader, runtime
        self.writer = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.writer:
            self.writer.close()

    def after_epoch(self, record: EpochRecord, rates: Sequence[float], valid: Predictions, last: bool) -> None:
        """Write an epoch, its learning rates and its validation."""
        if not self.writer:
            self.writer = self.kind(self.folder, purge_step=record.epoch)
        values = {name: value for name, value in asdict(record).items() if name != "epoch" and np.isfinite(value)}
        values |= {f"learning_rate/{group}": rate for group, rate in enumerate(rates)}
        for name, value in values.items():
            self.writer.add_scalar(name, value, record.epoch, new_style=True, double_precision=True)
        if last or record.epoch % PICTURES_EVERY == 0:
            self.writer.add_figure("reliability", _reliability(valid), record.epoch)
            if getattr(self.model, "local_model", None) and not self.model.num_chosen:
                self.writer.add_image("evidence", self._evidence(), record.epoch, dataformats="HWC")
        self.writer.flush()

    @torch.no_grad()
    def _evidence(self) -> np.ndarray:
        """A row an image: the whole, then its crops by the size of their effect, framed by what they are evidence for.

        uint8 (H, W, 3).
        """
        self.model.eval()
        dataset, rows = self.loader.dataset, []
        for position in np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int).tolist():
            whole, crops, _ = dataset.__getitems__([(position, None)])
            global_view, local_crops = self.runtime.to_device(self.model, (whole, crops))
            features = self.model.global_model(global_view), self.model.local_model(local_crops[0])  # (1, D), (K, D)
            logits, _ = self.model.classify(features[0], features[1][None])
            effects = (logits - self.model.classify_without_each(features[0][0], features[1])) @ logits.new_tensor(
                [1, -1]
            )
            order = effects.abs().argsort(descending=True)[:CROPS].tolist()
            tiles = [_framed(whole[0], (255, 255, 255))]
            tiles += [_framed(crops[0, k], FAKE if effects[k] > 0 else REAL) for k in order]
            rows.append(np.concatenate(tiles, axis=1))
        return np.concatenate(rows)


def _framed(view: torch.Tensor, colour: tuple[int, int, int], width: int = 4) -> np.ndarray:
    """A view (3, P, P) of 0 to 255 within a frame, uint8 (P + 2 `width`, ..., 3)."""
    pixels = view.movedim(0, -1).round().byte().numpy()
    framed = np.full((pixels.shape[0] + 2 * width, pixels.shape[1] + 2 * width, 3), colour, np.uint8)
    framed[width:-width, width:-width] = pixels
    return framed


def _reliability(valid: Predictions) -> Figure:
    """Share of right predictions against confidence."""
    confidence, right = valid.probabilities.max(axis=1), valid.probabilities.argmax(axis=1) == valid.labels
    share, mean = calibration_curve(right, confidence, n_bins=ECE_BINS)
    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axis.plot(mean, share, "o-", color="#d55e00")
    axis.set(xlim=(0.45, 1), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is right")
    return figure
