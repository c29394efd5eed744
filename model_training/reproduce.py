"""The whole reproduction: data, experiments, tables and figures, one command after the other.

    python -m model_training.reproduce                 the paper: eighteen commands on the Kaggle data
    python -m model_training.reproduce --preset demo   two models on procedural images, minutes on two CPU cores
    python -m model_training.reproduce --preset demo_local   the same, where only a region of each fake image is fake
    python -m model_training.reproduce --preset demo --all   every command of every stage at demo size

Each command is a process of its own. What is finished is not run again, so this one can be stopped and repeated.
Hardware: as its commands; one CUDA GPU and many CPU cores for the paper. Hours: docs/hours.md.
Output: the results of its commands, and the tables and figures of the paper in results/<preset>/tables/.
"""

import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated

import tyro

from config import Preset
from data.demo_dataset import write_demo_dataset
from data.index import MARKER, PREPROCESS_SETTINGS, index_path, list_images, read_index
from model_training.results_tables import write_tables
from training.runs import SETTINGS
from training.stopping import StopRequest, stop_signals
from utils import STOPPED, Stopped, UserError, as_flags, find_experiment, run_command

STAGES = {  # stage -> its command for the experiment <family>_<backbone>
    "tuning": "hyperparameter_tuning.{family}_{backbone}_tuning",
    "training": "model_training.{family}_{backbone}_training",
    "num_crops": "num_crops.num_crops_{backbone}",
    "standard_memory": "standard_memory.standard_memory_{backbone}",
}
FAMILY_OF_STAGE = {"num_crops": "glass", "standard_memory": "standard"}  # the other stages are for both


@dataclass(frozen=True)
class Options:
    """How much of it."""

    # every command of every stage, whatever the preset
    all_commands: Annotated[bool, tyro.conf.arg(name="all")] = False


def reproduce(preset: Preset, all_commands: bool = False) -> None:
    """Run the preset's commands in order and write the tables; a command that fails does not stop the others.

    Raises:
        UserError: the data are unavailable, a stage, experiment or command does not exist, or commands failed.
        Stopped: a signal asked for it.
    """
    if all_commands:
        names = sorted([e.name for e in preset.experiments], key=lambda name: name.startswith("glass"))
        preset = replace(preset, reproduce=replace(preset.reproduce, stages=tuple(STAGES), experiments=tuple(names)))
    commands = commands_of(preset)
    root, failed = preset.settings.data_root, []
    with stop_signals() as stop:
        if preset.reproduce.demo_data and (not root.exists() or (root / MARKER).exists()):
            # it completes what an interruption left
            write_demo_dataset(root, preset.reproduce.demo_images, preset.reproduce.demo_data)
        if not index_path(preset).exists() or len(read_index(preset).records) != len(list_images(root)):
            _run(stop, "data.data_preprocess", *as_flags(preset, settings=PREPROCESS_SETTINGS))
        for number, (stage, command) in enumerate(commands, 1):
            print(f"\n[{number}/{len(commands)}] python -m {command}", flush=True)
            try:
                _run(stop, command, *as_flags(preset, (stage,), settings=SETTINGS))
            except UserError:
                failed.append(command)
        print(flush=True)
        if len(failed) < len(commands):
            write_tables(preset)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(commands)} commands failed, each with its reason above: {', '.join(failed)}"
        )
    if preset.reproduce.closing_words:
        print(f"\n{preset.reproduce.closing_words}")


def commands_of(preset: Preset) -> list[tuple[str, str]]:
    """(stage, module) of each command, stage by stage."""
    commands = []
    for stage in preset.reproduce.stages:
        if stage not in STAGES:
            raise UserError(f"there is no stage {stage}: choose from {', '.join(STAGES)}")
        for name in preset.reproduce.experiments:
            find_experiment(preset, name)
            family, _, backbone = name.partition("_")
            module = STAGES[stage].format(family=family, backbone=backbone)
            if FAMILY_OF_STAGE.get(stage, family) != family:
                continue
            if not find_spec(module):
                raise UserError(
                    f"there is no command for {stage} of {name}: add {module.replace('.', '/')}.py, "
                    f"or choose other --experiments or --stages"
                )
            commands.append((stage, module))
    return commands


def _run(stop: StopRequest, command: str, *arguments: str) -> None:
    start = time.perf_counter()
    stop.raise_if_requested(f"before python -m {command}")
    process = subprocess.Popen([sys.executable, "-m", command, *arguments])
    passed_on = False
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if stop.requested and not passed_on:  # Ctrl-C has reached the command already; a scheduler's signal may not
            process.terminate()  # it saves its state, which takes it a step
            passed_on = True
    if stop.requested or process.returncode == STOPPED:
        raise Stopped(f"python -m {command} ended with exit code {process.returncode}")
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise UserError(f"python -m {command} ended with exit code {process.returncode}")
    print(f"({command}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    run_command(__doc__, reproduce, groups=("reproduce", *STAGES), options=Options)
