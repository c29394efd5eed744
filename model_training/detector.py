"""A trained model as a detector of one's own images.

    from model_training.detector import load_detector

    detector = load_detector("results/paper/glass_vit/seed_100/model.safetensors")
    prediction = detector.predict("photo.jpg")          # or a PIL image
    print(prediction.probability_fake, prediction.verdict)

The same picture gives the same answer on every run, whatever it is called and whatever else is predicted with it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import nn

from config import Experiment, GlassExperiment, Settings, StandardExperiment
from data.images import UnreadableImage
from data.pictures import Picture, Source, read_pictures
from models.build import build_model
from training.calibration import Calibration, Verdict
from training.checkpoints import load_model, read_about
from training.evaluation import sizes_of
from training.runtime import Runtime, build_runtime
from utils import UserError, checked, loading_processes

BATCH_SIZE, CHUNK_SIZE = 8, 64  # pictures whose views are encoded together, and views at a time
UNCALIBRATED = Calibration(1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0, 0)


@dataclass(frozen=True)
class Scores:
    """What a model says of a picture, draw by draw; T is 1 for standard models, which draw nothing.

    Attributes:
        values: (T,), logit of fake minus logit of real.
        boxes: (T, K, 4), or (1, 0, 4).
        attention: (T, K); sums to one over the crops.
        effects: (T, K), how much the score falls when a crop is left out and the attention of the others sums to one
            again: what the crop speaks for fake. NaN where it is the only one.
        alone: (T, K), the score if a crop were the only one.
    """

    values: np.ndarray
    boxes: np.ndarray
    attention: np.ndarray
    effects: np.ndarray
    alone: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture.

    Attributes:
        probability_fake: calibrated; mean over the draws.
        verdict: fake, real or inconclusive.
        standard_deviation: of the calibrated probability over the draws; NaN for one draw.
        flips: share of the draws whose own verdict is another; NaN for one draw.
        raw_probability_fake: as the paper's metrics have it, not calibrated; mean over the draws.
        width, height: of the picture, in pixels.
        scores: all there is.
    """

    probability_fake: float
    verdict: Verdict
    standard_deviation: float
    flips: float
    raw_probability_fake: float
    width: int
    height: int
    scores: Scores


@dataclass(frozen=True)
class Detector:
    """A model with all that its answers depend on; see `load_detector`."""

    model: nn.Module = field(repr=False)
    experiment: Experiment
    settings: Settings = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    calibration: Calibration
    runtime: Runtime
    batch_size: int = BATCH_SIZE
    chunk_size: int = CHUNK_SIZE

    @property
    def name(self) -> str:
        """What tables call the model; its seeds share it."""
        return self.experiment.name

    @property
    def calibrated(self) -> bool:
        """Whether the weights came with a calibration."""
        return self.calibration is not UNCALIBRATED

    @property
    def num_crops(self) -> int:
        """K, or 0."""
        return getattr(self.experiment, "num_crops", 0)

    def predict(self, image: Source, draws: int = 1) -> Prediction:
        """The answer for one file or PIL image.

        Args:
            draws: T, how many times the crops are drawn.

        Raises:
            UnreadableImage: the file gives no image.
        """
        (prediction,) = self.predict_all([image], draws, workers=0)
        if isinstance(prediction, UnreadableImage):
            raise prediction
        return prediction

    def predict_all(
        self,
        sources: Iterable[Source],
        draws: int = 1,
        workers: int | None = None,
        perturbations: Sequence[str] = ("native",),
    ) -> Iterator[Prediction | UnreadableImage]:
        """The answer for each source under each perturbation, in their order, while they are read.

        Args:
            workers: threads that decode ahead; None: by the cores.
        """
        if workers is None:
            workers = loading_processes(cpu_computes=self.runtime.device.type == "cpu")
        settings = self.settings
        pictures = read_pictures(sources, settings.max_image_pixels, workers, perturbations, settings.reencode_jpeg)
        while group := list(self._score_group(islice(pictures, self.batch_size), draws)):
            yield from group

    def _score_group(
        self, pictures: Iterator[Picture | UnreadableImage], draws: int
    ) -> Iterator[Prediction | UnreadableImage]:
        """A batch; a picture's pixels are let go as soon as its views are made."""
        sizes: list[tuple[int, int] | UnreadableImage] = []

        def readable() -> Iterator[Picture]:
            for picture in pictures:
                broken = isinstance(picture, UnreadableImage)
                sizes.append(picture if broken else picture.image.size)
                if not broken:
                    yield picture

        scores = iter(self.score(readable(), draws))
        for size in sizes:
            yield size if isinstance(size, UnreadableImage) else self._answer(next(scores), *size)

    def _answer(self, scores: Scores, width: int, height: int) -> Prediction:
        if not np.isfinite(scores.values).all():  # which every comparison with a threshold would call inconclusive
            raise UserError(
                f"{self.name} gives outputs that are infinite or not a number: use other weights, or --precision fp32"
            )
        fake, raw = self.calibration.probabilities(scores.values), expit(scores.values)
        verdict = self.calibration.verdict(float(fake.mean()))
        several = len(fake) > 1
        flips = np.mean([self.calibration.verdict(one) != verdict for one in fake]) if several else float("nan")
        deviation = float(fake.std(ddof=1)) if several else float("nan")
        return Prediction(
            float(fake.mean()), verdict, deviation, float(flips), float(raw.mean()), width, height, scores
        )

    @torch.no_grad()
    def score(self, pictures: Iterable[Picture], draws: int = 1, boxes: np.ndarray | None = None) -> list[Scores]:
        """Scores of pictures, which are taken one by one.

        Args:
            draws: T.
            boxes: (T, K, 4), instead of drawing them.
        """
        P = self.settings.patch_size
        if isinstance(self.experiment, StandardExperiment):
            logits = self._encode(self.model, (picture.standard_view(P) for picture in pictures))
            nothing = np.zeros((1, 0))
            return [Scores(_scores(row[None]), np.zeros((1, 0, 4), int), nothing, nothing, nothing) for row in logits]
        drawn, global_views = [], []

        def crops() -> Iterator[np.ndarray]:
            for picture in pictures:
                of_picture = (
                    picture.boxes(self.num_crops, P, draws, self.settings.main_seed) if boxes is None else boxes
                )
                drawn.append(of_picture)
                global_views.append(picture.global_view(P, self.settings.exact_resize))
                yield from picture.crops(of_picture.reshape(-1, 4), P)

        crop_features = self._encode(self.model.local_model, crops())
        global_features = self._encode(self.model.global_model, global_views)
        ends = np.cumsum([0, *(of_picture.shape[0] * of_picture.shape[1] for of_picture in drawn)])
        return [
            self._classify(features, crop_features[begin:end].unflatten(0, of_picture.shape[:2]), of_picture)
            for features, begin, end, of_picture in zip(global_features, ends, ends[1:], drawn, strict=False)
        ]

    def _encode(self, network: Callable[[torch.Tensor], torch.Tensor], views: Iterable[np.ndarray]) -> torch.Tensor:
        """Outputs (N, ...) in float32 on the device for N views (P, P, 3), `chunk_size` at a time."""
        remaining, outputs = iter(views), []
        while chunk := list(islice(remaining, self.chunk_size)):
            batch = torch.from_numpy(np.stack(chunk)).movedim(-1, -3)
            with self.runtime.memory_for(f"predicting {sizes_of([batch])}"), self.runtime.autocast():
                outputs.append(network(*self.runtime.to_device(self.model, [batch])).float())
        return torch.cat(outputs) if outputs else torch.zeros(0)

    def _classify(self, global_features: torch.Tensor, crop_features: torch.Tensor, boxes: np.ndarray) -> Scores:
        """Features (D,) and (T, K, D) of a picture -> its scores with all, without each and with one of its crops."""
        values, attention, effects, alone = [], [], [], []
        for features in crop_features:
            logits, weights = self.model.classify(global_features[None], features[None])
            without = self.model.classify_without_each(global_features, features)
            each, _ = self.model.classify(global_features.expand(len(features), -1), features[:, None])
            values.append(_scores(logits))
            attention.append(weights.double().cpu().numpy())
            effects.append(values[-1] - _scores(without))
            alone.append(_scores(each))
        return Scores(np.concatenate(values), boxes, np.concatenate(attention), np.stack(effects), np.stack(alone))


def _scores(logits: torch.Tensor) -> np.ndarray:
    fake, real = logits.double().cpu().numpy().T
    return fake - real


def load_detector(
    path: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    max_image_pixels: int = Settings.max_image_pixels,
    batch_size: int = BATCH_SIZE,
    chunk_size: int = CHUNK_SIZE,
) -> Detector:
    """The model of a weights file, which holds all that rebuilds it; nothing is downloaded, nothing unpickled.

    Args:
        precision: of the forward pass on CUDA; in fp32 (and without TF32) CPU and GPU agree to about 1e-5.
        max_image_pixels: larger images are not decoded.
        batch_size: images that are worked on together.
        chunk_size: views that the backbones are given at a time. Neither changes a result by more than rounding.

    Raises:
        UserError: no weights file of this project, or weights that do not fit what it says of itself.
    """
    path = Path(path)
    if batch_size < 1 or chunk_size < 1:
        raise UserError(f"batch_size = {batch_size} and chunk_size = {chunk_size}: both must be at least 1")
    about = read_about(path)
    try:
        kind = GlassExperiment if "num_crops" in about["experiment"] else StandardExperiment
        experiment = checked(kind(**about["experiment"]))
        known = {field.name for field in fields(Settings)} - {"data_root", "results_root", "cache_root"}
        values = {name: value for name, value in about["settings"].items() if name in known}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        calibration = Calibration(**about["calibration"]) if about.get("calibration") else UNCALIBRATED
        settings = checked(replace(Settings(), **values))
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} does not say how its model is built ({error}): train it anew") from None
    settings = replace(
        settings, device=device, precision=precision, max_image_pixels=max_image_pixels,
        matmul_precision="highest", compile=False, pretrained=False, weights_files=(),
    )  # fmt: skip
    runtime = build_runtime(checked(settings))
    model = build_model(experiment, settings)
    load_model(path, model)
    runtime.place(model).eval()
    return Detector(model, experiment, settings, about, calibration, runtime, batch_size, chunk_size)
