"""What `fit` writes for TensorBoard with the setting `tensorboard`. docs/results.md, TensorBoard."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.calibration import calibration_curve
from torch import nn
from torch.utils.data import DataLoader

from training.evaluation import Predictions
from training.metrics import ECE_BINS
from training.progress import EpochRecord
from training.runtime import Runtime
from utils import UserError

PICTURES_EVERY = 5  # epochs
IMAGES, CROPS = 6, 8  # in the panel: validation images, and the crops of each with the largest effects
FAKE, REAL = (213, 94, 0), (0, 114, 178)  # frames of crops that are evidence for fake and for real


class Watch:
    """Writes the scalars of each epoch, and pictures every few epochs, to a folder for this training.

    When a training is resumed, TensorBoard hides what was written after the checkpoint it resumes from.

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

    def __exit__(self, *_: object) -> None:
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
        """A row per image: the resized image, then its crops, largest effect first, framed in the colour of the class
        that they are evidence for; uint8 (H, W, 3).
        """
        self.model.eval()
        dataset, rows = self.loader.dataset, []
        for position in np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int).tolist():
            view, crops, _ = dataset.__getitems__([(position, None)])
            global_view, local_crops = self.runtime.to_device(self.model, (view, crops))
            global_features = self.model.global_model(global_view)  # (1, D)
            crop_features = self.model.local_model(local_crops[0])  # (K, D)
            logits, _ = self.model.classify(global_features, crop_features[None])
            changes = logits - self.model.classify_without_each(global_features[0], crop_features)  # (K, 2)
            effects = changes[:, 0] - changes[:, 1]
            order = effects.abs().argsort(descending=True)[:CROPS].tolist()
            tiles = [_framed(view[0], (255, 255, 255))]
            tiles += [_framed(crops[0, k], FAKE if effects[k] > 0 else REAL) for k in order]
            rows.append(np.concatenate(tiles, axis=1))
        return np.concatenate(rows)


def _framed(view: torch.Tensor, colour: tuple[int, int, int]) -> np.ndarray:
    """A view (3, P, P) of 0 to 255 within a frame 4 pixels wide, uint8 (P + 8, P + 8, 3)."""
    pixels = view.movedim(0, -1).round().byte().numpy()
    return np.asarray(ImageOps.expand(Image.fromarray(pixels), 4, colour))


def _reliability(valid: Predictions) -> Figure:
    """Share of correct predictions against confidence."""
    confidence, correct = valid.probabilities.max(axis=1), valid.probabilities.argmax(axis=1) == valid.labels
    share, mean = calibration_curve(correct, confidence, n_bins=ECE_BINS)
    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axis.plot(mean, share, "o-", color="#d55e00")
    axis.set(xlim=(0.45, 1), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is correct")
    return figure
