"""The complete reproduction: data, experiments, tables and figures, one command after the other.

    python -m model_training.reproduce                 the paper: eighteen commands on the Kaggle data
    python -m model_training.reproduce --preset demo   two models on procedural images, minutes on two CPU cores
    python -m model_training.reproduce --preset demo_local   the same, where only a region of each fake image is fake
    python -m model_training.reproduce --preset demo --all   every command of every stage at demo size
    python -m model_training.reproduce --list          run nothing: print the commands that are left, one a line

Each command is a process of its own. Finished work is skipped, so this command can be stopped and repeated.
The commands of --list, one for each study, seed, number of crops and profile, can run at once: docs/cluster.md.
Hardware: as its commands; one CUDA GPU and many CPU cores for the paper. Hours: docs/hours.md.
Output: the results of its commands, and the tables and figures of the paper in results/<preset>/tables/.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated

import tyro

from config import Preset
from data.demo_dataset import write_demo_dataset
from data.index import PREPROCESS_SETTINGS, index_path, read_index
from data.layouts import MARKER, read_data_set
from model_training import results_tables
from model_training.tables.read_results import is_finished, read_tuning_studies
from training.cost import find_cost
from training.runs import SETTINGS, seed_folder
from training.stopping import StopRequest, stop_signals
from utils import STOPPED, Stopped, UserError, as_flags, find_experiment, preset_folder, run_command

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
    # run nothing: print the commands that are left, which can run at once
    list_units: Annotated[bool, tyro.conf.arg(name="list")] = False
    # only write what the commands of --list need: the demo images, if the preset has them, and the index
    prepare: bool = False


def reproduce(preset: Preset, all_commands: bool = False, list_units: bool = False, prepare: bool = False) -> None:
    """Run the preset's commands in order and write the tables; a command that fails does not stop the others.

    Args:
        list_units: print the commands that are left instead, see `units_of`.
        prepare: stop before the first command.

    Raises:
        UserError: the data are unavailable, a stage, experiment or command does not exist, or commands failed.
        Stopped: a signal asked for it.
    """
    if all_commands:
        names = sorted([e.name for e in preset.experiments], key=lambda name: name.startswith("glass"))
        preset = replace(preset, reproduce=replace(preset.reproduce, stages=tuple(STAGES), experiments=tuple(names)))
    if list_units and prepare:
        raise UserError("--prepare comes before --list: give one of them")
    if list_units:
        _print_units(preset)
        return
    commands = commands_of(preset)
    root, failed = preset.settings.data_root, []
    with stop_signals() as stop:
        if preset.reproduce.demo_data and (not root.exists() or (root / MARKER).exists()):
            # also completes images that an interruption left unfinished
            write_demo_dataset(root, preset.reproduce.demo_images, preset.reproduce.demo_data)
        if not _is_prepared(preset):
            _run(stop, "data.data_preprocess", *as_flags(preset, settings=PREPROCESS_SETTINGS))
        if prepare:
            return
        for number, (stage, _, command) in enumerate(commands, 1):
            print(f"\n[{number}/{len(commands)}] python -m {command}", flush=True)
            try:
                _run(stop, command, *as_flags(preset, (stage,), settings=SETTINGS))
            except UserError:
                failed.append(command)
        print(flush=True)
        if len(failed) < len(commands):
            results_tables.write_tables(preset)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(commands)} commands failed, each with its reason above: {', '.join(failed)}"
        )
    if preset.reproduce.closing_words:
        print(f"\n{preset.reproduce.closing_words}")


def _is_prepared(preset: Preset) -> bool:
    """Whether there is an index, with as many images as the data set has."""
    root, layout = preset.settings.data_root, preset.settings.data_layout
    if not (root.exists() and index_path(preset).exists()):
        return False
    return len(read_index(preset).records) == len(read_data_set(root, layout).images)


def commands_of(preset: Preset) -> list[tuple[str, str, str]]:
    """(stage, experiment, module) of each command, stage by stage."""
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
            commands.append((stage, name, module))
    return commands


def _print_units(preset: Preset) -> None:
    """Print a command for each unfinished unit, and on stderr the command for the tables."""
    if not _is_prepared(preset):
        flags = as_flags(preset, ("reproduce",), settings=(*PREPROCESS_SETTINGS, "demo_data", "demo_images"))
        command = _line("model_training.reproduce", *flags, "--prepare")
        raise UserError(f"{index_path(preset)} is missing or lacks images: run {command} first")
    lines = [line for line, finished in units_of(preset) if not finished]
    print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    groups = ("reproduce", "tuning", "training", "num_crops")
    tables = _line("model_training.results_tables", *as_flags(preset, groups, settings=results_tables.SETTINGS))
    print(f"commands left: {len(lines)}, which can run at once; after them: {tables}", file=sys.stderr)


def units_of(preset: Preset) -> Iterator[tuple[str, bool]]:
    """The command of each study, seed, number of crops and profile, and whether it is finished.

    They depend on the index only, and each works in a folder of its own, so they can all run at once. A unit that was
    finished with other settings counts as finished here; its command, the command of its stage or the tables refuse it.
    """
    studies = read_tuning_studies(preset_folder(preset) / "tuning")
    for stage, name, module in commands_of(preset):
        settings = getattr(preset, stage)
        units: list[tuple[dict[str, tuple[int, ...]], bool]]  # the settings of one unit, and whether it is finished
        if stage == "tuning":
            total = settings.trials_of(name.startswith("standard_"))
            units = [({}, name in studies and not studies[name].trials_left(total))]
        elif stage == "training":
            units = [({"seeds": (seed,)}, is_finished(seed_folder(preset, name, seed))) for seed in settings.seeds]
        else:
            counts = getattr(settings, "crop_counts", (None,))
            units = [({"crop_counts": (k,)} if k else {}, bool(find_cost(preset, stage, name, k)[1])) for k in counts]
        for own, finished in units:
            unit = replace(preset, **{stage: replace(settings, **own)})
            yield _line(module, *as_flags(unit, (stage,), settings=SETTINGS)), finished


def _line(module: str, *arguments: str) -> str:
    """A command, quoted for a shell."""
    return shlex.join(["python", "-m", module, *arguments])


def _run(stop: StopRequest, command: str, *arguments: str) -> None:
    start = time.perf_counter()
    stop.raise_if_requested(f"before python -m {command}")
    process = subprocess.Popen([sys.executable, "-m", command, *arguments])
    passed_on = False
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if stop.requested and not passed_on:  # Ctrl-C also reaches the command itself; a scheduler's signal may not
            process.terminate()  # it saves its state after the current step
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
