"""What every room needs and none owns: settings from the command line, run folders, safe writes, seeds, facts.

Knows nothing of images, models or metrics.
"""

import argparse
import ast
import csv
import ctypes
import difflib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin, get_type_hints

import config
from config import Experiment, GlassExperiment, Preset, Settings, StandardExperiment


class UserError(Exception):
    """Something that the user can mend: one sentence of what was found, where, and what to do."""


class Stopped(Exception):
    """A signal asked to stop, and all that is needed to go on is saved."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line; its kind where it says nothing."""
    if isinstance(error, UnpicklingError):  # where torch explains how to load the file all the same
        return "it holds something else than tensors and plain values"
    return (str(error).splitlines() or [""])[0] or type(error).__name__


STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: try again


# --------------------------------------------------------------------------------------------- command line
def run_door(
    doc: str,
    action: Callable[..., None],
    groups: Sequence[str] = (),
    experiments: Sequence[str] = (),
    without: Sequence[str] = (),
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
    usage: str = "[--preset NAME] [--SETTING VALUE ...]",
) -> NoReturn:
    """Read the command line, run `action` on the resolved preset, and exit with a code that tells the truth.

    Args:
        doc: the door's docstring, shown by `--help`.
        action: what the door does; called with the resolved preset, then the resolved `experiments`, and its
            own `arguments` as keywords.
        groups: fields of `Preset` whose settings can be overridden here, besides `settings`.
        experiments: names of the experiments whose hyperparameters can be overridden here.
        without: names that this door does not read and therefore does not accept.
        arguments: adds the door's own options to the parser.
        usage: what follows the command's name.

    Exit codes: 0 done, 2 a `UserError` (one sentence on stderr), 75 stopped by a signal with the training's state
    saved, 130 interrupted, 141 nobody reads the output; a traceback is our own bug.
    """
    extra: dict[str, Any] = {}
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters of tables and of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        preset, chosen, extra = parse_command_line(doc, groups, experiments, without, arguments, argv, usage)
        action(preset, *chosen, **extra)
        sys.stdout.flush()  # here, where an error of it still counts
    except UserError as error:
        _leave(2, f"error: {str(error).rpartition('utils.UserError: ')[2].strip()}")  # or a worker's
    except Stopped as saved:
        _leave(STOPPED, f"stopped: {saved}; the same command{_without(extra)} goes on from there")
    except KeyboardInterrupt:
        _leave(
            130,
            f"interrupted: give the same command{_without(extra)} again; finished seeds, trials, crop counts, scores "
            f"and cached images are kept, an unfinished one goes on from what was saved last",
        )
    except BrokenPipeError:  # the reader of our output is gone, as in `... | head`
        _leave(141)
    except OSError as error:  # a read-only folder, a full disk, a name that is too long
        _leave(2, f"error: {error}")
    _leave(0)


def _without(extra: Mapping[str, Any]) -> str:
    return " without --restart" if extra.get("restart") else ""  # which would begin anew again


def _leave(code: int, words: str = "") -> NoReturn:
    """Exit with `code`, `words` on stderr, even if nobody reads any more: Ctrl-C in `... | tee` ends both."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, words and f"{words}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:  # what is left to write is for nobody; Python would exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_command_line(
    doc: str,
    groups: Sequence[str] = (),
    experiments: Sequence[str] = (),
    without: Sequence[str] = (),
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
    usage: str = "",
) -> tuple[Preset, list[Experiment], dict[str, Any]]:
    """Settings of config.py, then of `--preset`, then of the command line; see `run_door`.

    Returns:
        The resolved preset, the resolved `experiments`, and the values of the door's own `arguments`.

    Raises:
        UserError: an unknown name, or a value that is not of its setting's kind.
    """
    parser = _Parser(
        prog=f"python -m {_door_name()}",
        usage=f"%(prog)s {usage}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="paper", help=f"one of {', '.join(config.PRESETS)}; default paper")
    if arguments:
        arguments(parser)
    own = {action.dest for action in parser._actions}
    flags = overridable_fields(config.PAPER, groups, experiments, without)
    defaults = resolved(config.PAPER.settings, *(getattr(config.PAPER, group) for group in groups)) | resolved(
        *(find_experiment(config.PAPER, name) for name in experiments)
    )
    section = parser.add_argument_group("settings, overriding config.py and the preset")
    for name, hint in flags.items():
        several = get_origin(hint) is tuple
        section.add_argument(
            _flag(name),
            nargs="*" if several else "?" if hint is bool else None,
            const="true" if hint is bool else None,
            default=argparse.SUPPRESS,
            metavar=_metavar(hint),
            help=f"paper: {_shown(defaults[name])}",
        )
        if hint is bool:
            section.add_argument(
                "--no-" + _flag(name)[2:],
                dest=name,
                action="store_const",
                const="false",
                default=argparse.SUPPRESS,
            )
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings if option != "--help"]
        close = [option for option in options if option.startswith(f"{unknown[0]}-")]
        close = close or difflib.get_close_matches(unknown[0], options, n=1)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the settings that this command takes"
        raise UserError(f"unknown argument {unknown[0]}: {hint}")
    given = vars(namespace)
    preset = load_preset(given.pop("preset"))
    extra = {name: given.pop(name) for name in list(given) if name in own}
    values = {name: parse_value(name, text, flags[name]) for name, text in given.items()}
    resolved_preset = override(preset, values, groups, experiments)
    order = [experiment.name for experiment in preset.experiments]  # --name may have changed a name, not its place
    return resolved_preset, [resolved_preset.experiments[order.index(name)] for name in experiments], extra


def _door_name() -> str:
    door = sys.modules["__main__"].__spec__
    return door.name if door else "(interactive)"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def load_preset(name: str) -> Preset:
    """The preset called `name` in config.py, its values checked."""
    if name not in config.PRESETS:
        raise UserError(f"--preset {name}: config.py has {', '.join(config.PRESETS)}")
    preset = config.PRESETS[name]
    for space, kind in ((preset.glass_space, GlassExperiment), (preset.standard_space, StandardExperiment)):
        for parameter in space.keys() - {field.name for field in fields(kind)}:
            raise UserError(
                f"a search space of preset {name} has {parameter}, which {kind.__name__} in config.py has not"
            )
    for group in ("settings", *_ROOMS):
        checked(getattr(preset, group))
    for experiment in preset.experiments:
        checked(experiment)
    return preset


def settings_without(*read: str) -> tuple[str, ...]:
    """Names of all settings but those that a door reads; for its `without`."""
    return tuple(field.name for field in fields(Settings) if field.name not in read)


def find_experiment(preset: Preset, name: str) -> Experiment:
    """The experiment called `name` in the preset, such as glass_vit."""
    for experiment in preset.experiments:
        if experiment.name == name:
            return experiment
    known = ", ".join(experiment.name for experiment in preset.experiments)
    raise UserError(f"preset {preset.name} has no experiment {name}: it has {known}")


def overridable_fields(
    preset: Preset, groups: Sequence[str], experiments: Sequence[str], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Setting name -> its type, for the groups and experiments that a door reads."""
    owners = [preset.settings, *(getattr(preset, group) for group in groups)]
    owners += [find_experiment(preset, name) for name in experiments]
    hints: dict[str, Any] = {}
    for owner in owners:
        hints |= {name: hint for name, hint in get_type_hints(type(owner)).items() if name not in without}
    return hints


def override(preset: Preset, values: Mapping[str, Any], groups: Sequence[str], experiments: Sequence[str]) -> Preset:
    """The preset with `values` in place of the fields of those names."""

    def update(owner: Any) -> Any:
        names = {field.name for field in fields(owner)}
        return checked(replace(owner, **{name: value for name, value in values.items() if name in names}))

    changed = {group: update(getattr(preset, group)) for group in ("settings", *groups)}
    changed["experiments"] = tuple(
        update(experiment) if experiment.name in experiments else experiment for experiment in preset.experiments
    )
    return replace(preset, **changed)


def as_flags(preset: Preset, groups: Sequence[str] = ()) -> list[str]:
    """Command-line arguments that give another door the same preset and the same overrides of these groups."""
    original, flags = load_preset(preset.name), ["--preset", preset.name]
    for group in ("settings", *groups):
        for field in fields(getattr(preset, group)):
            value = getattr(getattr(preset, group), field.name)
            if value != getattr(getattr(original, group), field.name):
                if isinstance(value, tuple):
                    flags += [_flag(field.name), *map(_text, value)]
                else:
                    flags.append(f"{_flag(field.name)}={_text(value)}")  # as one word: a value may begin with "-"
    return flags


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_value(name: str, text: Any, hint: Any) -> Any:
    """`text` from the command line as the type `hint` of a setting.

    Raises:
        UserError: the text does not say such a value.
    """
    if get_origin(hint) is tuple:
        if not text:
            raise UserError(f"{_flag(name)} needs at least one value")
        return tuple(parse_value(name, item, get_args(hint)[0]) for item in text)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    for kind in (hint,) if not get_args(hint) or choices else get_args(hint):
        try:
            if get_origin(kind) is Literal:
                return next(choice for choice in get_args(kind) if choice == text)
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            value = kind(text)
            if kind is float and not math.isfinite(value):
                raise ValueError
            return value
        except (ValueError, KeyError, StopIteration):
            continue
    raise UserError(f"{_flag(name)} {text}: expected {_metavar(hint)}")


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return _metavar(get_args(hint)[0])
    if get_args(hint):
        return "|".join(_metavar(kind) for kind in get_args(hint))
    return {bool: "true|false", int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}[hint]


# ------------------------------------------------------------------------------------------ checks of values
_ROOMS = ("tuning", "training", "num_crops", "standard_memory", "reproduce")
_AT_LEAST_ONE = (
    "patch_size", "max_image_pixels", "epochs", "batch_size", "glass_trials", "standard_trials", "min_resource",
    "max_resource", "num_crops", "crop_counts", "measured_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "checkpoint_every",
    "main_seed", "seeds", "eta_min", "warmup_steps", "lr", "weight_decay", "lr_global", "lr_local", "lr_atten_class",
    "wd_global", "wd_local",
)  # fmt: skip


def checked(owner: Any) -> Any:
    """`owner` itself, a settings dataclass, if each value is of its field's type and in its range."""
    for name, hint in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if not _is_a(value, hint):
            several = "a tuple, such as (1, 2) or (1,), of " if get_origin(hint) is tuple else ""
            raise UserError(f"{type(owner).__name__}.{name} is {value!r}: expected {several}{_metavar(hint)}")
        for item in value if isinstance(value, tuple) else (value,):
            wanted = _wanted(name, item)
            if wanted:
                raise UserError(f"{name} is {item}: it must be {wanted}")
        if name == "max_resource" and value < owner.min_resource:
            raise UserError(f"max_resource is {value}: it must be at least min_resource = {owner.min_resource}")
        if name in ("seeds", "crop_counts") and (not value or len(set(value)) < len(value)):
            raise UserError(f"{name} is {value}: it must hold at least one value, each once")
    return owner


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(_is_a(value, kind) for kind in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _wanted(name: str, value: Any) -> str | None:
    """What `value` of setting `name` should have been, or None if it is in range."""
    if name in _AT_LEAST_ONE and value < 1:
        return "at least 1"
    if name in ("main_seed", "seeds") and value >= 2**32:
        return "below 2**32"
    if name in _NOT_NEGATIVE and value < 0:
        return "at least 0"
    if name.startswith("lr") and value > 1:
        return "at most 1"
    if name in ("dropout_rate", "label_smoothing") and not 0 <= value < 1:
        return "at least 0 and below 1"
    if name == "band_error" and not 0 <= value < 0.5:
        return "at least 0 and below 0.5"
    if name == "final_valid_fraction" and not 0 < value < 1:
        return "between 0 and 1"
    least = {"valid_size": 1, "test_size": 0}.get(name)  # of held-out groups alone is a test split too
    if least is not None and not (value >= least if isinstance(value, int) else 0 < value < 1):
        return "a number of images, or a share between 0 and 1"
    if name == "reencode_jpeg" and not 0 <= value <= 100:
        return "a JPEG quality from 1 to 100, or 0"
    if name == "reduction_factor" and value < 2:
        return "at least 2"
    if name == "cache_limit_gb" and value != "disk" and value <= 0:
        return "disk, or above 0"
    if name == "num_workers" and value != "auto" and value < 0:
        return "auto, or at least 0"
    if name == "weights_files" and not all(value.partition("=")):
        return "BACKBONE=FILE"
    if name == "name" and value in (*_ROOMS, "dataset", "tables", "before", "scores", "evaluation", "robustness"):
        return "no name of a folder that has another use there"
    if name == "name":
        return wanted_name(value)
    if name in ("num_crops", "crop_counts") and value > 1024:
        return "at most 1024"
    if name == "patch_size" and value > 4096:
        return "at most 4096"
    return None


def wanted_name(name: str) -> str | None:
    """What a folder's name should have been, or None if it is one."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "_-." for c in name):
        return "a folder name of letters, digits, '_', '-' and '.'"
    return None


# ----------------------------------------------------------------------------------------------- run folders
def preset_folder(preset: Preset) -> Path:
    """results/<preset>: all that a preset writes."""
    return preset.settings.results_root / preset.name


def dataset_folder(preset: Preset) -> Path:
    """results/<preset>/dataset: the index of the data set, its statistics, tables and figures."""
    return preset_folder(preset) / "dataset"


def run_folder(preset: Preset, experiment: str, seed: int) -> Path:
    """results/<preset>/<experiment>/seed_<seed>."""
    return preset_folder(preset) / experiment / f"seed_{seed}"


# Settings that say where and how fast, not what: two runs that differ only here may be compared and resumed.
_DO_NOT_CHANGE_NUMBERS = (
    "data_root", "data_list", "results_root", "weights_files", "kaggle_dataset", "num_workers", "device",
    "max_image_pixels", "use_cache", "cache_root", "cache_limit_gb", "checkpoint_every", "seeds", "glass_trials",
    "standard_trials", "crop_counts",
)  # fmt: skip


def resolved(*owners: Any) -> dict[str, Any]:
    """All fields of the settings dataclasses `owners`, as JSON-ready values."""
    values: dict[str, Any] = {}
    for owner in owners:
        values |= {name: str(value) if isinstance(value, Path) else value for name, value in asdict(owner).items()}
    return json.loads(json.dumps(values))


def run_facts(values: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a result needs to explain itself: resolved settings, data fingerprint, commit, versions, hardware."""
    return {
        "settings": dict(values) | {"weights_sha256": _weights_hashes(values.get("weights_files", ()))},
        "dataset_fingerprint": fingerprint,
        "command": shlex.join(["python", "-m", _door_name(), *sys.argv[1:]]),
        "commit": git_commit(),
        "code": code_version(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "hardware": hardware(),
    }


def _weights_hashes(weights_files: Iterable[str]) -> dict[str, str]:
    """Backbone -> hash of its local weights file: the same file under another path is the same weights."""
    hashes = {}
    for item in weights_files:
        backbone, _, path = item.partition("=")
        if Path(path).is_file():  # where not, loading the weights will say so
            hashes[backbone] = sha256_of(Path(path))
    return hashes


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str] = ()) -> str | None:
    """The first setting in which two runs differ so that their numbers may, with both values; None if there is none.

    Args:
        before, now: what `run_facts` gave for each.
        ignore: settings that are meant to differ, such as "seed".
    """
    if before["dataset_fingerprint"] != now["dataset_fingerprint"]:
        return f"dataset_fingerprint = {before['dataset_fingerprint']}, now {now['dataset_fingerprint']}"
    old, new = before["settings"], now["settings"]
    for name in sorted((old.keys() | new.keys()) - {*_DO_NOT_CHANGE_NUMBERS, *ignore}):
        if old.get(name) != new.get(name):
            return f"{name} = {old.get(name)}, now {new.get(name)}"
    return None


def check_same_ground(folder: Path, facts: Mapping[str, Any], results: str, unfinished: bool = False) -> None:
    """Refuse to go on in `folder` if the results in it were begun under other settings or data.

    Args:
        results: name of the file whose presence says that there are any; what failed before it wrote one may be
            begun anew under other settings.
        unfinished: the results are to be added to; then the code and the libraries must be the same too.

    Raises:
        UserError: names the first difference, or says that run.json does not tell what they were begun under.
    """
    if not (unfinished or (folder / results).exists()):
        return
    remedy = "pass --restart to move that folder aside and begin anew, or choose another --name or --results-root"
    with reading(folder / "run.json", remedy):
        before = read_json(folder / "run.json", remedy)
        difference = first_difference(before, facts)
        if not difference and unfinished:
            difference = _other_code(before, facts)
    if difference:
        raise UserError(f"{folder} was started with {difference}: {remedy}")


def _other_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if before.get("code") != now["code"]:
        commits = [facts.get("commit") or "an unknown commit" for facts in (before, now)]
        return f"another version of data, models or training ({commits[0][:20]}, now {commits[1][:20]})"
    old, new = before["versions"], now["versions"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, now {new.get(name)}"
    return None


@functools.cache
def code_version() -> str:
    """16 hexadecimal digits over the code that numbers come from: data, models and training, without their comments."""
    digest = hashlib.sha256()
    for room in ("data", "models", "training"):
        for path in sorted((Path(__file__).parent / room).glob("*.py")):
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                    and ast.get_docstring(node) is not None
                ):
                    node.body[0].value.value = ""
            digest.update(f"{room}/{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def add_restart(parser: argparse.ArgumentParser) -> None:
    """The option of the doors whose results can be begun anew."""
    parser.add_argument(
        "--restart", action="store_true", help="move what was begun to results/<preset>/before, and begin anew"
    )


def set_aside(preset: Preset, folder: Path) -> None:
    """Move a folder of the preset's results, if it exists, to results/<preset>/before/<its path there>_<n>.

    Raises:
        UserError: another process works in it.
    """
    if not folder.exists():
        return
    results = preset_folder(preset)
    with sole_process(folder):
        stem = results / "before" / folder.relative_to(results)
        names = (stem.with_name(f"{stem.name}_{n}") for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        (aside / "lock").unlink()  # ours; the folder's next one may be another's already
    print(f"kept aside: {aside}", flush=True)


@contextmanager
def sole_process(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be, so that no other process works in it; one that has died holds nothing.

    Raises:
        UserError: says who holds it, or that it cannot be made.
    """
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): set another --results-root or --cache-root"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"{folder} is in use by {holder}: wait for it, or end it") from None
        except OSError as error:
            lock.close()
            raise UserError(f"{folder} is where files cannot be locked ({error.strerror}): choose another") from None
        if _is_open_as(lock, path):
            break
        lock.close()  # its last holder has just removed it
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        for left_over in folder.glob(".*.tmp"):  # by a process that was killed within `replacing`
            left_over.unlink()
        try:
            yield
        finally:
            if _is_open_as(lock, path):  # `set_aside` has moved it, and another process may have made its own
                path.unlink()


def _is_open_as(file: TextIO, path: Path) -> bool:
    status = stat_of(path)
    return status is not None and os.path.samestat(os.fstat(file.fileno()), status)


def stat_of(path: Path) -> os.stat_result | None:
    """State of a file; None if it cannot be had."""
    try:
        return path.stat()
    except OSError:
        return None


def misfit(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What keeps the tensors `state` from being loaded where `wanted` are expected, in words; None if nothing does."""
    lacking = {name for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")}  # old files
    for names, what in ((lacking, "lacks"), (state.keys() - wanted.keys(), "has, besides the model's,")):
        if names:
            first = ", ".join(sorted(names)[:3])
            return f"it {what} {len(names)} tensors ({first}{', ...' if len(names) > 3 else ''})"
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            return f"{name} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
        if tensor.dtype != wanted[name].dtype:
            return f"{name} is {tensor.dtype}, expected {wanted[name].dtype}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} has values that are infinite or not a number"
        if name.endswith("running_var") and (tensor < 0).any():  # of batch normalisation, which takes its root
            return f"{name} has variances below zero"
    return None


def git_commit() -> str | None:
    """The commit of this checkout, with "+changes" if tracked files differ from it; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return None


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers can depend on."""
    names = ("torch", "torchvision", "timm", "optuna", "numpy", "pillow", "scikit-learn")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware() -> dict[str, Any]:
    """Processor, number of cores this process may use, GPU and its memory if there is one."""
    import torch  # here, so that commands without a model do not wait for it

    facts: dict[str, Any] = {"processor": platform.machine(), "cores": available_cores()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_mb": round(properties.total_memory / 2**20)}
    return facts


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading_processes(cpu_computes: bool) -> int:
    """How many processes load images where the settings leave it open.

    One a core, 16 at most; where the CPU computes too, a quarter of the cores, so that neither waits
    for the other: threads that compute together on cores that are taken are many times slower, not a little.
    """
    return max(1, available_cores() // 4) if cpu_computes else min(available_cores(), 16)


def worker_context(*modules: str) -> BaseContext:
    """How worker processes start: forked from a server process that holds no GPU and no threads.

    What this process has imported of ours, and `modules`, is imported there, once for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    rooms = {file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")}
    ours = [name for name in sys.modules if name.partition(".")[0] in rooms]
    context.set_forkserver_preload([*ours, *modules])
    return context


def leave_with_parent() -> None:
    """In a worker process: end as soon as the parent has ended, however it did."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> None:
    """In a process that does nothing but decode: keep what is freed, up to 256 MB, for the next image.

    Else each large image gets new pages from the system, which on some machines takes longer than copying it. Only
    glibc can be told so; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**28)


# --------------------------------------------------------------------------------------------------- signals
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """Whether a signal has asked to stop."""

    requested: bool = False

    def leave_if_asked(self, saved: str) -> None:
        """Where all that is needed to go on is saved; `saved` says what that is, or where the work was left.

        Raises:
            Stopped: a signal has asked for it.
        """
        if self.requested:
            raise Stopped(saved)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """In the block, SIGTERM and SIGINT only ask to stop; a second SIGINT is a `KeyboardInterrupt`.

    Clusters send SIGTERM some time before they kill. A command holds one block around all its work, so that there is
    no moment between two trainings at which a signal is lost. Only the main thread can listen; elsewhere nothing
    changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, _: Any) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request.requested:
            request.requested = True
            with suppress(OSError, RuntimeError):  # nobody reads it, or the signal came within another print
                print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in _STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """In the block, SIGTERM and SIGINT wait; processes that are started in it are deaf to them for good.

    Both are sent to all processes of a job, and it is for the first to decide when the others end.
    """
    resource_tracker.ensure_running()  # or the first worker starts it, which lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ----------------------------------------------------------------------------------------------- safe writes
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; takes the place of `path` if the block ends well.

    A reader therefore sees the old file or the whole new one, never a part, whenever this process is killed.

    Raises:
        UserError: the system does not let it be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # as any new file; some libraries make theirs private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk names no file
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make room there, or choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; bytes of file names that are not UTF-8 survive."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; a number that is not finite becomes null, which is what JSON has."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


WRITE_ANEW = "move it away and run the command that writes it"


@contextmanager
def reading(path: Path, mend: str = WRITE_ANEW) -> Iterator[None]:
    """In the block `path`, a small file of this project's, is read and used: its damages become one sentence.

    Raises:
        UserError: it cannot be read, or does not hold what was used of it; `mend` is what to do.
    """
    try:
        yield
    except (
        *(OSError, csv.Error, RecursionError),
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    ) as error:
        raise UserError(
            f"{path} does not hold what this project writes there ({type(error).__name__}: {first_line(error)}): {mend}"
        ) from None


def as_share(value: Any) -> float:
    """`value`, such as an accuracy in one of our files, as a number from 0 to 1.

    Raises:
        TypeError, ValueError: it is none.
    """
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{value} is not between 0 and 1")
    return number


def read_json(path: Path, mend: str = WRITE_ANEW) -> Any:
    """Read a JSON file that this project wrote.

    Raises:
        UserError: it cannot be read; `mend` is what to do.
    """
    with reading(path, mend):
        return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all; floats keep all their digits."""
    write_text(path, "".join(f"{csv_line(row)}\n" for row in (columns, *rows)))


def csv_line(row: Sequence[Any]) -> str:
    """A line of a CSV file, without its end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(row)  # this terminator makes it quote "\r" in names
    return buffer.getvalue().removesuffix("\r\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file that this project wrote, as column -> text."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def check_output(path: Path, columns: Sequence[str]) -> None:
    """Refuse to write a table over a file that is not such a table.

    Raises:
        UserError: there is another file.
    """
    if not (path.exists() or path.is_symlink()):
        return
    heading = csv_line(columns).encode()
    with suppress(OSError), open(path, "rb") as file:
        if file.readline(2 * len(heading)).rstrip() == heading:
            return
    raise UserError(f"{path} is there already, and is not a table that this command wrote: name another file")


def read_columns(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """These columns of a CSV file of the user's, row by row; "a|b" is column a or, without one, b.

    Raises:
        UserError: it cannot be read, or lacks a column or a row.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read as CSV ({reason}): correct its name, or mend it") from None
    chosen = [next((name for name in column.split("|") if name in names), None) for column in columns]
    if None in chosen:
        wanted = columns[chosen.index(None)].replace("|", " or ")
        raise UserError(f"{path} has no column {wanted}: it has {', '.join(names) or 'none'}")
    if not rows:
        raise UserError(f"{path} has a heading and no rows: add some")
    return [tuple(row[name] or "" for name in chosen) for row in rows]


# ----------------------------------------------------------------------------------------------------- seeds
def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone, the same on every machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
