"""Cost and accuracy of a standard transfer-learning model. docs/method.md, Experiments 4."""

from config import Preset, StandardExperiment
from training.cost import run_cost_study
from training.runs import SETTINGS, RestartOption
from utils import run_command


def main(name: str, doc: str) -> None:
    """The command of experiment `name`."""
    flags = {"groups": ("standard_memory",), "experiments": (name,), "without": ("batch_size",)}
    run_command(doc, profile, settings=SETTINGS, options=RestartOption, **flags)


def profile(preset: Preset, experiment: StandardExperiment, restart: bool = False) -> None:
    """`run_cost_study` of one training, without crops."""
    run_cost_study(preset, experiment, "standard_memory", restart)
