"""A trained model as a detector for images of your own: `load_detector(weights).predict("photo.jpg").verdict`.

The same image gives the same prediction on every run, whatever its name and whatever else is predicted with it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import expit
from torch import nn

from config import Count, Crops, CropSampler, Experiment, GlassExperiment, Settings, StandardExperiment
from data.images import UnreadableImage
from data.pictures import Picture, Source, read_pictures
from data.samplers import FIXED
from data.views import ViewSettings
from data.workers import loading_processes
from model_training.inference.provenance import Provenance
from models.build import build_model
from models.weights import read_state_dict, written_by_torch
from training.calibration import Calibration, Verdict
from training.checkpoints import load_model, read_about
from training.evaluation import sizes_of
from training.runs import git_commit, library_versions
from training.runtime import Runtime, build_runtime
from utils import UserError, checked

HEADS = {"heads.head.1.weight", "classifier.2.1.weight", "fc.1.weight"}  # last layers of standard vit, convnext, resnet
SMALL, UNLIKE = "smaller than a crop", "unlike its training images"  # notes
UNCALIBRATED = Calibration(1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0, 0)


@dataclass(frozen=True)
class PredictionOptions:
    """How a detector predicts; batch and chunk size change its results by rounding at most."""

    draws: Count = 1  # T, how often each image's crops are drawn; the mean counts, if most draws confirm it
    # of the forward pass on CUDA; fp32 is without TF32; trained: as in the model's own test (predictions.csv)
    precision: Literal["fp32", "bf16", "fp16", "trained"] = "fp32"
    batch_size: Count = 8  # images that are processed together
    chunk_size: Count = 64  # views that a backbone encodes at a time
    backbone: str | None = None  # of a checkpoint (.pt) of the author's code, which does not say it: vit, resnet, ...
    num_crops: Crops | None = None  # likewise, for a GLASS model; for other weights: instead of the K of their training
    crop_sampler: CropSampler | None = None  # instead of the sampler of the training, such as all: every tile

    def __post_init__(self) -> None:
        checked(self)

    @property
    def crops(self) -> dict[str, Any]:
        """Those options that choose a GLASS model's crops, if they are given."""
        return {name: value for name in ("num_crops", "crop_sampler") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Scores:
    """The outputs of a model for one image and T draws of its K crops; for a standard model T = 1 and K = 0."""

    values: np.ndarray  # (T,), logit of fake minus logit of real
    boxes: np.ndarray  # (T, K, 4)
    attention: np.ndarray  # (T, K); sums to one over the crops
    effects: np.ndarray  # (T, K), evidence for fake: how much the score falls without the crop; NaN if K = 1
    alone: np.ndarray  # (T, K), the score if a crop were the only one


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image; probabilities are means over the draws.

    The thresholds were fitted on single draws: the mean's verdict stands if more than half of the draws have it too.
    """

    probability_fake: float  # calibrated
    verdict: Verdict
    standard_deviation: float  # of the calibrated probability over the draws; NaN if all have the same crops
    flips: float  # share of the draws whose own verdict is not that of the mean; NaN likewise
    raw_probability_fake: float  # uncalibrated, as in the paper's metrics
    width: int  # of the image, in pixels
    height: int
    scores: Scores
    note: str = ""  # what makes it less reliable: SMALL, notes of `data.images.notes_on`, UNLIKE (and how)


Outcome = Prediction | UnreadableImage  # for a file


@dataclass(frozen=True)
class Detector:
    """A model with everything that its predictions depend on; see `load_detector`."""

    model: nn.Module = field(repr=False)
    experiment: Experiment
    settings: Settings = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    calibration: Calibration
    runtime: Runtime
    options: PredictionOptions = PredictionOptions()
    other_crops: str = ""  # the crop options that differ from those of its training, as "num_crops = 3"
    provenance: Provenance = field(default_factory=Provenance)  # what it was trained and tested on

    @property
    def name(self) -> str:
        """The model's name in tables, shared by its seeds."""
        return self.experiment.name

    @property
    def calibrated(self) -> bool:
        """Whether the weights came with a calibration."""
        return self.calibration.fake_images > 0

    @property
    def num_crops(self) -> int:
        """K, or 0 for a model without crops."""
        return ViewSettings.of(self.settings, self.experiment, 0).num_crops

    @property
    def draws_differ(self) -> bool:
        """Whether two draws may have different crops."""
        return self.num_crops > 0 and getattr(self.experiment, "crop_sampler", None) not in FIXED

    def depends_on(self) -> list[Any]:
        """What its scores depend on besides weights and images, for JSON; batch sizes change rounding only."""
        numerics = self.runtime.precision, self.settings.matmul_precision, self.runtime.device.type
        sampler = getattr(self.experiment, "crop_sampler", "")
        model = self.experiment.backbone, self.num_crops, sampler, self.options.draws
        return [*model, *numerics, git_commit(), library_versions()]

    def predict(self, image: Source) -> Prediction:
        """The prediction for one file or PIL image; raises UnreadableImage if the file cannot be decoded."""
        (prediction,) = self.predict_all([image], workers=0)
        if isinstance(prediction, UnreadableImage):
            raise prediction
        return prediction

    def predict_all(
        self,
        sources: Iterable[Source],
        workers: int | Literal["auto"] = "auto",
        perturbations: Sequence[str] = ("native",),
    ) -> Iterator[Outcome]:
        """The prediction for each source under each perturbation, in order, while `workers` threads decode the next."""
        if workers == "auto":
            workers = loading_processes(cpu_computes=self.runtime.device.type == "cpu")
        settings = self.settings
        pictures = read_pictures(sources, settings.max_image_pixels, workers, perturbations, settings.reencode_jpeg)
        while group := list(self.predict_pictures(islice(pictures, self.options.batch_size))):
            yield from group

    def predict_pictures(self, pictures: Iterable[Picture | UnreadableImage]) -> Iterator[Outcome]:
        """The predictions for one batch; each picture is released once its views are made."""
        seen: list[tuple[int, int, tuple[str, ...], str] | UnreadableImage] = []  # width, height, notes, format

        def readable() -> Iterator[Picture]:
            for picture in pictures:
                broken = isinstance(picture, UnreadableImage)
                seen.append(picture if broken else (*picture.image.size, picture.notes, picture.format))
                if not broken:
                    yield picture

        scores = iter(self.score(readable()))
        for one in seen:
            yield one if isinstance(one, UnreadableImage) else self._prediction(next(scores), *one)

    def _prediction(self, scores: Scores, width: int, height: int, notes: tuple[str, ...], format: str) -> Prediction:
        if not np.isfinite(scores.values).all():  # else NaN would be called inconclusive
            raise UserError(
                f"{self.name} gives outputs that are infinite or not a number: use other weights, or --precision fp32"
            )
        fake = self.calibration.probabilities(scores.values)
        mean, raw = float(fake.mean()), float(expit(scores.values).mean())
        verdict, deviation, flips = self.calibration.verdict(mean), float("nan"), float("nan")
        if (scores.boxes != scores.boxes[0]).any():  # not if T = 1, or if the image is as small as a crop
            deviation = float(fake.std(ddof=1))
            flips = float(np.mean([self.calibration.verdict(one) != verdict for one in fake]))
            verdict = verdict if flips < 0.5 else "inconclusive"
        found = [SMALL] * (min(width, height) < self.settings.patch_size) + [*notes]
        if unlike := self.provenance.unlike(width, height, format):
            found.append(f"{UNLIKE} ({', '.join(unlike)})")
        note = "; ".join(found)
        return Prediction(mean, verdict, deviation, flips, raw, width, height, scores, note)

    def score(self, pictures: Iterable[Picture], boxes: np.ndarray | None = None) -> list[Scores]:
        """Scores of pictures, which are consumed one by one; if `boxes` (T, K, 4) are given, no crops are drawn."""
        with torch.no_grad(), self.runtime.switched():
            return self._score(pictures, boxes)

    def _score(self, pictures: Iterable[Picture], boxes: np.ndarray | None) -> list[Scores]:
        views = ViewSettings.of(self.settings, self.experiment, self.settings.main_seed)
        if not views.num_crops:
            logits = self._encode(self.model, (picture.resized(views) for picture in pictures))
            nothing = np.zeros((1, 0))
            return [Scores(_scores(row[None]), np.zeros((1, 0, 4), int), nothing, nothing, nothing) for row in logits]
        drawn, global_views, encoded = [], [], []

        def crops() -> Iterator[np.ndarray]:
            for picture in pictures:
                of_picture = picture.boxes(views, self.options.draws) if boxes is None else boxes
                global_views.append(picture.resized(views))
                if boxes is None and self.model.num_chosen:
                    features, chosen = self._choose_crops(global_views[-1], of_picture.shape[1])
                    encoded.append(features)
                    of_picture = of_picture[:, chosen]
                drawn.append(of_picture)
                yield from picture.crops(of_picture.reshape(-1, 4), views.patch_size)

        crop_features = self._encode(self.model.local_model, crops())
        global_features = torch.cat(encoded) if encoded else self._encode(self.model.global_model, global_views)
        of_pictures = crop_features.split([of_picture.shape[0] * of_picture.shape[1] for of_picture in drawn])
        return list(map(self._classify, global_features, of_pictures, drawn))

    def _choose_crops(self, global_view: np.ndarray, places: int) -> tuple[torch.Tensor, np.ndarray]:
        """Features (1, D) of a global view, and which K of the `places` the model looks at."""
        batch = self.runtime.to_device(self.model, [torch.from_numpy(global_view)[None].movedim(-1, -3)])
        with self.runtime.autocast():
            features, chosen = self.model.choose(*batch, places)
            return features.float(), chosen[0].cpu().numpy()

    def _encode(self, network: Callable[[torch.Tensor], torch.Tensor], views: Iterable[np.ndarray]) -> torch.Tensor:
        """Outputs (N, ...) in float32 on the device for N views (P, P, 3), `chunk_size` at a time."""
        remaining, outputs = iter(views), []
        while chunk := list(islice(remaining, self.options.chunk_size)):
            batch = torch.from_numpy(np.stack(chunk)).movedim(-1, -3)
            with self.runtime.memory_for(f"predicting {sizes_of([batch])}"), self.runtime.autocast():
                outputs.append(network(*self.runtime.to_device(self.model, [batch])).float())
        return torch.cat(outputs) if outputs else torch.zeros(0)

    def _classify(self, global_features: torch.Tensor, crop_features: torch.Tensor, boxes: np.ndarray) -> Scores:
        """Features (D,) and (T x K, D) of an image -> its scores with all crops, without each, and with each alone."""
        draws = []
        for features in crop_features.unflatten(0, boxes.shape[:2]):
            with self.runtime.autocast():  # as the model is tested; differences of scores need all their digits
                tested, _ = self.model.classify(global_features[None], features[None])
            exact, weights = self.model.classify(global_features[None], features[None])
            without = self.model.classify_without_each(global_features, features)
            each, _ = self.model.classify(global_features.expand(len(features), -1), features[:, None])
            effects = _scores(exact) - _scores(without)
            draws.append((_scores(tested)[0], weights[0].double().cpu().numpy(), effects, _scores(each)))
        values, attention, effects, alone = map(np.stack, zip(*draws, strict=True))
        return Scores(values, boxes, attention, effects, alone)


def _scores(logits: torch.Tensor) -> np.ndarray:
    fake, real = logits.double().cpu().numpy().T
    return fake - real


def load_detector(
    path: str | Path,
    device: str = "auto",
    max_image_pixels: int = Settings.max_image_pixels,
    options: PredictionOptions | None = None,
) -> Detector:
    """The model in a weights file, which holds everything needed to rebuild it: nothing is downloaded or unpickled.

    For a checkpoint of the author's code, the options say what the file does not.

    In fp32, CPU and GPU agree to about 1e-5; with `PredictionOptions(precision="trained")` the detector differs from
    the predictions.csv of the run by the rounding of its precision at most. A model that chooses its crops itself
    (cooi) may choose otherwise after rounding.

    Raises:
        UserError: not a weights file of this project, or weights that do not fit the model it describes.
    """
    path, options = Path(path), options or PredictionOptions()
    about = _about_checkpoint(path, options) if written_by_torch(path) else read_about(path)
    try:
        experiment, settings, calibration = _parse_about(about)
        provenance = Provenance.read(about)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} does not describe a model of this version ({error}): train it again") from None
    if options.backbone not in (None, experiment.backbone):
        raise UserError(f"{path} has the backbone {experiment.backbone}, not {options.backbone}: leave out --backbone")
    other_crops = ""
    if experiment.crops_per_image:
        trained, experiment = asdict(experiment), replace(experiment, **options.crops)
        changed = {name: value for name, value in options.crops.items() if trained[name] != value}
        other_crops = ", ".join(f"{name} = {value}" for name, value in changed.items())
    if options.precision != "trained":
        settings = replace(settings, precision=options.precision, matmul_precision="highest")
    settings = replace(settings, device=device, max_image_pixels=max_image_pixels, compile=False, pretrained=False)
    ViewSettings.of(settings, experiment, 0)  # refuses crops that cannot be drawn
    runtime = build_runtime(checked(settings))
    model = build_model(experiment, settings)
    load_model(path, model)
    runtime.place(model).eval()
    return Detector(model, experiment, settings, about, calibration, runtime, options, other_crops, provenance)


def _about_checkpoint(path: Path, options: PredictionOptions) -> dict[str, Any]:
    """Metadata for a checkpoint of the author's code, in the form of `read_about`, without a calibration.

    Raises:
        UserError: it is something else, or options are missing that it needs.
    """
    state, backbone = read_state_dict(path), options.backbone or ""
    name = re.sub(r"[^\w.-]", "_", path.stem).lstrip(".")
    if "attention.0.weight" not in state:
        if not HEADS & state.keys():
            raise UserError(
                f"{path} holds {len(state)} tensors ({', '.join(list(state)[:3])}, ...), neither of a GLASS model "
                f"(global_model.*) nor of a standard one ({', '.join(sorted(HEADS))}): name another file"
            )
        what, experiment = "a standard model", StandardExperiment(name, backbone, 1, 0.0, 0.0, 0.0)
    else:
        what = f"a GLASS model of width {state['attention.0.weight'].shape[-1]}"
        experiment = GlassExperiment(name, backbone, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, options.num_crops or 0)
    lacking = {"--backbone": backbone, "--num-crops": getattr(experiment, "num_crops", 1)}
    options_lacking = " and ".join(flag for flag, value in lacking.items() if not value)
    if options_lacking:
        raise UserError(f"{path} is {what} of the author's code and does not say all of it: pass {options_lacking}")
    return {"experiment": asdict(experiment), "settings": {}}


def _parse_about(about: Mapping[str, Any]) -> tuple[Experiment, Settings, Calibration]:
    """What the metadata of a weights file describes; settings about the training's files and device are ignored."""
    kind = GlassExperiment if "num_crops" in about["experiment"] else StandardExperiment
    experiment = checked(kind(**about["experiment"]))
    left_out = {"data_root", "results_root", "cache_root", "weights_files", "channels_last", "author_runtime"}
    known = {field.name for field in fields(Settings)} - left_out
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items() if k in known}
    calibration = Calibration(**about["calibration"]) if about.get("calibration") else UNCALIBRATED
    return experiment, checked(replace(Settings(), **values)), calibration
