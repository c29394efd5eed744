"""The model card beside each model.safetensors: README.md as the Hugging Face hub reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment

from config import Experiment
from model_training.inference.provenance import Provenance
from training.calibration import Calibration
from training.detection_metrics import DETECTION_METRICS, bootstrap_intervals, detection_metrics
from training.evaluation import Predictions
from utils import one_line, write_text

TEMPLATE = Path(__file__).with_name("model_card.md")
SHOWN = ("accuracy", "balanced_accuracy", "auc", "average_precision", "ece")  # of DETECTION_METRICS
STANDARD = "A standard transfer-learning model"
GLASS = dict.fromkeys(("both", "shared"), "A GLASS model (global view and native-resolution crops)")  # by branches
GLASS |= {"global": "A GLASS model (its global view alone)", "local": "A GLASS model (native-resolution crops alone)"}
OF_CROPS = ("num_crops", "crop_sampler", "pooling")
SETTINGS = ("patch_size", "pretrained", "label_smoothing", "group_by", "reencode_jpeg", "main_seed")


def write_model_card(
    folder: Path,
    about: Mapping[str, Any],
    experiment: Experiment,
    calibration: Calibration | None,
    test: Predictions,
    groups: Sequence[str] | None,
) -> None:
    """Write README.md to a run folder.

    Args:
        about: the metadata of its model.safetensors.
        test: the model's predictions on its own test images.
        groups: of each test image, if images belong together; intervals are over these groups.
    """
    provenance, fake = Provenance.read(about), test.probabilities[:, 0]
    values = {name: value for name, value in detection_metrics(fake, test.labels).items() if np.isfinite(value)}
    intervals = bootstrap_intervals([fake], test.labels, [0.5], groups)
    metrics = [
        (DETECTION_METRICS[name].heading, *(100 * each for each in (values[name], *intervals[name])))
        for name in SHOWN
        if name in values
    ]
    data = provenance.data[-1]
    results = [
        EvalResult("image-classification", data.name, data.name, name, values[name], dataset_split="test")
        for name in ("accuracy", "auc")
        if name in values
    ]
    card_data = ModelCardData(
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["ai-generated-image-detection", "glass", experiment.backbone],
        model_name=f"{experiment.name} seed {about['seed']}",
        eval_results=results,
    )
    page = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=True, finalize=in_a_cell
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    settings = dict(about["experiment"]) | {name: about["settings"].get(name) for name in SETTINGS}
    if not experiment.crops_per_image:
        settings = {name: value for name, value in settings.items() if name not in OF_CROPS}
    text = page.render(
        card_data=card_data.to_yaml(),
        name=f"{experiment.name}, seed {about['seed']}, epoch {about['epoch']}",
        what=GLASS.get(getattr(experiment, "branches", None), STANDARD),
        data=provenance.data,
        images=len(test.labels),
        settings=settings,
        unit="groups of images that belong together" if groups else "images",
        metrics=metrics,
        calibration=calibration,
    )
    write_text(folder / "README.md", text)


def in_a_cell(value: Any) -> Any:
    """A value, such as a folder's name, escaped for a cell of a Markdown table."""
    return value if hasattr(value, "__html__") else one_line(str(value)).replace("|", r"\|")
