"""The whole reproduction: data, experiments, tables and figures, one door after the other.

    python -m model_training.reproduce                 the paper: eighteen doors on the Kaggle data
    python -m model_training.reproduce --preset demo   two models on procedural images, minutes on two CPU cores
    python -m model_training.reproduce --preset demo --all   all eighteen doors at demo size

Each door is a process of its own. What is finished is not run again, so the command can be stopped and repeated.
Leaves the tables and figures of the paper in results/<preset>/tables/.
"""

import argparse
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import config
from config import Preset
from data.demo_dataset import MARKER
from data.index import index_path, list_images, read_index
from utils import STOPPED, Stopped, StopRequest, UserError, as_flags, run_door, stop_signals

STAGES = {
    "tuning": "hyperparameter_tuning.{family}_{backbone}_tuning",
    "training": "model_training.{family}_{backbone}_training",
    "num_crops": "num_crops.num_crops_{backbone}",
    "standard_memory": "standard_memory.standard_memory_{backbone}",
}
FAMILY_OF_STAGE = {"num_crops": "glass", "standard_memory": "standard"}  # the others have a door for both


def reproduce(preset: Preset, all_doors: bool) -> None:
    """Run the preset's doors in order and write the tables; a door that fails does not keep the others from running.

    Raises:
        UserError: the data are not to be had, a door is not known, or doors failed.
        Stopped: a signal asked for it.
    """
    with stop_signals() as stop:
        _reproduce(preset, all_doors, stop)


def _reproduce(preset: Preset, all_doors: bool, stop: StopRequest) -> None:
    if all_doors:
        preset = replace(preset, reproduce=replace(preset.reproduce, **_everything()))
    doors = _doors(preset)
    root = preset.settings.data_root
    if preset.reproduce.demo_data and (not root.exists() or (root / MARKER).exists()):
        _run(stop, "data.data_download", "--demo", str(root))  # completes what an interruption left
    if not index_path(preset).exists() or len(read_index(preset).records) != len(list_images(root)):
        _run(stop, "data.data_preprocess", *as_flags(preset))
    failed = []
    for number, (stage, door) in enumerate(doors, 1):
        print(f"\n[{number}/{len(doors)}] python -m {door}", flush=True)
        try:
            _run(stop, door, *as_flags(preset, (stage,)))
        except UserError:
            failed.append(door)
    print(flush=True)
    if len(failed) < len(doors):
        rooms = ("reproduce", "tuning", "training", "num_crops")
        _run(stop, "model_training.results_tables", *as_flags(preset, rooms))
    if failed:
        raise UserError(f"{len(failed)} of {len(doors)} doors failed, each with its reason above: {', '.join(failed)}")
    if preset.reproduce.closing_words:
        print(f"\n{preset.reproduce.closing_words}")


def _everything() -> dict[str, tuple[str, ...]]:
    whole = config.PAPER.reproduce
    return {"stages": whole.stages, "experiments": whole.experiments}


def _doors(preset: Preset) -> list[tuple[str, str]]:
    """(stage, module) of each door, stage by stage."""
    doors = []
    for stage in preset.reproduce.stages:
        for experiment in preset.reproduce.experiments:
            family, _, backbone = experiment.partition("_")
            if stage not in STAGES or experiment not in config.PAPER.reproduce.experiments:
                raise UserError(
                    f"there is no door for {stage} of {experiment}: stages are {', '.join(STAGES)}, "
                    f"experiments {', '.join(config.PAPER.reproduce.experiments)}"
                )
            if FAMILY_OF_STAGE.get(stage, family) == family:
                doors.append((stage, STAGES[stage].format(family=family, backbone=backbone)))
    return doors


def _run(stop: StopRequest, door: str, *arguments: str) -> None:
    start = time.perf_counter()
    stop.leave_if_asked(f"before python -m {door}")
    process = subprocess.Popen([sys.executable, "-m", door, *arguments])
    passed_on = False
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if stop.requested and not passed_on:  # Ctrl-C has reached the door already; a scheduler's signal may not
            process.terminate()  # it saves its state, which takes it a step
            passed_on = True
    if stop.requested or process.returncode == STOPPED:
        raise Stopped(f"python -m {door} ended with exit code {process.returncode}")
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise UserError(f"python -m {door} ended with exit code {process.returncode}")
    print(f"({door}: {time.perf_counter() - start:.0f} s)", flush=True)


def _add_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", dest="all_doors", action="store_true", help="all eighteen doors, whatever the preset")


if __name__ == "__main__":
    rooms = ("reproduce", *STAGES)
    run_door(__doc__, reproduce, groups=rooms, arguments=_add_all)
