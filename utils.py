"""What every package needs: the command line, files that are never half-written, hashes.

Nothing here is about images, models or metrics.
"""

import argparse
import csv
import gc
import hashlib
import inspect
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field, fields, make_dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, NoReturn, get_type_hints

import filelock
import pydantic
import tyro

import config
from config import Experiment, GlassExperiment, LogUniform, Preset, SearchSpace, StandardExperiment


class UserError(Exception):
    """Something that the user can fix: one sentence that says what was found, where, and what to do."""


class Stopped(Exception):
    """A signal asked to stop, and everything needed to resume is saved."""


STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: try again


def first_line(error: BaseException) -> str:
    """The first line of an error message; the kind of error if it has no message."""
    if isinstance(error, UnpicklingError):  # torch's message explains how to load the file all the same
        return "it holds something else than tensors and plain values"
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def one_line(text: str) -> str:
    """Text that is safe to print: line ends, tabs and terminal escape codes are spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --------------------------------------------------------------------------------------------- command line
def run_command(doc: str, action: Callable[..., None], **flags: Any) -> NoReturn:
    """Read the command line, run `action` on the resolved preset, and exit.

    Args:
        doc: the command's docstring, shown by `--help`.
        action: what the command does; called with the resolved preset, then the resolved experiments, and the
            command's own options as keywords.
        flags: arguments of `parse_command_line`.

    Exit codes: 0 done, 2 a `UserError` or a wrong argument (one sentence on stderr), 75 stopped by a signal with the
    training's state saved, 130 interrupted, 141 nobody reads the output. A traceback is a bug of this project.
    """
    again = "run the same command again"
    if isinstance(sys.stdout, io.TextIOWrapper):  # for characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if find_spec("fcntl") is None:  # signals, worker processes and the pixel cache would not work either
            raise UserError("this project runs on Linux and macOS, not on Windows: use WSL, the Linux within Windows")
        preset, experiments, options = parse_command_line(doc, **flags)
        if "restart" not in options and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(f"torchrun is for commands that train: start python -m {command_name()} by itself")
        if options.get("restart"):
            again = "run the same command without --restart again"
        action(preset, *experiments, **options)
        sys.stdout.flush()  # here, where its errors are still caught
    except UserError as error:  # a worker's has a traceback before it
        _exit(2, f"error: {str(error).rpartition('utils.UserError: ')[2].strip()}")
    except Stopped as saved:
        _exit(STOPPED, f"stopped: {saved}; {again} to resume")
    except KeyboardInterrupt:
        _exit(130, f"interrupted: {again}; what is finished is kept")
    except BrokenPipeError:  # the reader of our output is gone, as in `... | head`
        _exit(141)
    except OSError as error:  # a read-only folder, a full disk, a name that is too long
        _exit(2, f"error: {error}")
    _exit(0)


def _exit(code: int, message: str = "") -> NoReturn:
    """Exit with `code` and `message` on stderr, even if nobody reads them: Ctrl-C in `... | tee` ends both."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, message and f"{one_line(message)}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:  # nobody reads it; else Python would exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    gc.freeze()  # else a last garbage collection over all libraries takes a second
    sys.exit(code)


def command_name() -> str:
    """The module that this process runs, as in `python -m module`."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else "(interactive)"


def parse_command_line(
    doc: str,
    groups: Sequence[str] = (),
    experiments: Sequence[str] = (),
    settings: Collection[str] | None = None,
    without: Collection[str] = (),
    options: type | None = None,
    argv: Sequence[str] | None = None,
) -> tuple[Preset, list[Experiment], dict[str, Any]]:
    """Settings of config.py, then of `--preset`, then of the command line.

    Args:
        doc: shown by `--help`.
        groups: fields of `Preset` whose settings are flags of this command, besides `settings`.
        experiments: names of the experiments whose hyperparameters are flags of this command.
        settings: names of the fields of `Settings` and of the groups that the command reads; only these are flags.
            None: all.
        without: hyperparameters of the experiments that are no flags.
        options: a dataclass of the command's own options; a comment beside a field is its help.

    Returns:
        The resolved preset, the resolved `experiments`, and the values of `options`.

    Raises:
        UserError: an unknown preset, or a value out of its range.
        SystemExit: 0 after `--help`, 2 for an argument that is unknown or of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", default="paper")  # read first: the other flags' defaults depend on it
    preset = load_preset(first.parse_known_args(argv)[0].preset or "paper")
    owners = {group: getattr(preset, group) for group in ("settings", *groups)}
    owners |= {name: find_experiment(preset, name) for name in experiments}
    hidden = dict.fromkeys(experiments, without)
    if settings is not None:
        hidden |= {key: {f.name for f in fields(owners[key])}.difference(settings) for key in ("settings", *groups)}
    flags = _flags_of(owners, hidden)
    lists = {f"--{name.replace('_', '-')}" for name, (_, _, default) in flags.items() if isinstance(default, tuple)}
    for argument, following in pairwise([*argv, "--"]):
        if argument in lists and following.startswith("--"):  # such as an empty shell variable
            raise UserError(f"{argument} needs at least one value")

    help_of_preset = f"{', '.join(config.PRESETS)}: a set of values in config.py"
    parts: list[tuple[str, Any, Any]] = [("preset", Annotated[str, tyro.conf.arg(help=help_of_preset)], "paper")]
    if options:
        parts.append(("command", options, field()))
    for key in owners:
        part = [(name, hint, default) for name, (first, hint, default) in flags.items() if first == key]
        if part:
            parts.append((key, kind := make_dataclass(key, part), field(default_factory=kind)))
    kind, prog = make_dataclass("CommandLine", parts, kw_only=True), f"python -m {command_name()}"
    given = tyro.cli(kind, prog=prog, description=doc, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    values = {name: getattr(getattr(given, first), name) for name, (first, _, _) in flags.items()}
    values = {name: value for name, value in values.items() if value != flags[name][2]}

    for key, owner in owners.items():
        names = {f.name for f in fields(owner)}.difference(hidden.get(key, ())) & values.keys()
        owners[key] = checked(replace(owner, **{name: values[name] for name in names}))
    every = tuple(owners.get(experiment.name, experiment) for experiment in preset.experiments)
    preset = replace(preset, **{group: owners[group] for group in ("settings", *groups)}, experiments=every)
    return preset, [owners[name] for name in experiments], vars(checked(given.command)) if options else {}


def _flags_of(owners: Mapping[str, Any], hidden: Mapping[str, Collection[str]]) -> dict[str, tuple[str, Any, Any]]:
    """Name of each field -> the first of its owners, its type with its help, and its default.

    One flag is for all owners that have the field. If their values differ, its default is None: each keeps its own.
    """
    flags: dict[str, tuple[str, Any, Any]] = {}
    for key, owner in owners.items():
        comments = _comments_of(type(owner))
        for name, hint in get_type_hints(type(owner), include_extras=True).items():
            if name in hidden.get(key, ()):
                continue
            default = getattr(owner, name)
            same = name not in flags or flags[name][2] == default
            described = Annotated[hint if same else hint | None, tyro.conf.arg(help=comments.get(name, ""))]
            flags[name] = (flags.get(name, (key,))[0], described, default if same else None)
    return flags


@cache
def _comments_of(kind: type) -> dict[str, str]:
    """Field -> the comment beside it in the source."""
    source = "".join(inspect.getsource(base) for base in reversed(kind.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))


def load_preset(name: str) -> Preset:
    """The preset called `name` in config.py. Raises UserError for a wrong value in any preset."""
    if name not in config.PRESETS:
        raise UserError(f"--preset {name}: config.py has {', '.join(config.PRESETS)}")
    for preset in config.PRESETS.values():
        for owner in (*vars(preset).values(), *preset.experiments):
            if hasattr(owner, "__dataclass_fields__"):
                checked(owner)
        for kind, space in ((GlassExperiment, preset.glass_space), (StandardExperiment, preset.standard_space)):
            _check_search_space(kind, space)
    return config.PRESETS[name]


def _check_search_space(kind: type[Experiment], space: SearchSpace) -> None:
    known = _adapters_of(kind)
    for name, choices in space.items():
        if name not in known:
            raise UserError(f"a search space in config.py has {name}, which is no field of {kind.__name__}: correct it")
        for value in vars(checked(choices)).values() if isinstance(choices, LogUniform) else choices:
            _check(name, value, known[name])


def checked(owner: Any) -> Any:
    """The dataclass `owner` itself. Raises UserError for a value of the wrong type or out of its range."""
    for name, adapter in _adapters_of(type(owner)).items():
        _check(name, getattr(owner, name), adapter)
    return owner


def _check(name: str, value: Any, adapter: pydantic.TypeAdapter) -> None:
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        deepest = max(len(each["loc"]) for each in error.errors())  # in a tuple, the items that are wrong
        texts = [each["msg"].removeprefix("Value error, ") for each in error.errors() if len(each["loc"]) == deepest]
        wrong = " or ".join(dict.fromkeys(f"{text[0].lower()}{text[1:]}" for text in texts))
        raise UserError(f"{name} is {value if isinstance(value, str) else repr(value)}: {wrong}") from None


@cache
def _adapters_of(kind: type) -> dict[str, pydantic.TypeAdapter]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: pydantic.TypeAdapter(hint) for name, hint in hints.items()}


def find_experiment(preset: Preset, name: str) -> Experiment:
    """The experiment called `name` in the preset, such as glass_vit."""
    known = {experiment.name: experiment for experiment in preset.experiments}
    if name not in known:
        raise UserError(f"preset {preset.name} has no experiment {name}, but {', '.join(known)}: add it in config.py")
    return known[name]


def as_flags(preset: Preset, groups: Sequence[str] = (), settings: Collection[str] | None = None) -> list[str]:
    """Command-line arguments for another command: the preset, and all values of these groups that differ from it."""
    original, flags = config.PRESETS[preset.name], ["--preset", preset.name]
    for group in ("settings", *groups):
        for name, value in vars(getattr(preset, group)).items():
            unread = settings is not None and name not in settings
            if unread or value == getattr(getattr(original, group), name):
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                flags += [f"--{flag}", *map(str, value)]
            else:
                flags.append(f"--{flag}={value}")  # one word, since a value may begin with "-"
    return flags


# -------------------------------------------------------------------------------------------------- folders
def preset_folder(preset: Preset) -> Path:
    """results/<preset>, where all results of a preset go."""
    return preset.settings.results_root / preset.name


@contextmanager
def locked_folder(folder: Path, wait: float = 0) -> Iterator[None]:
    """Lock `folder`, which is created if needed, against other processes; the lock ends with the process.

    Args:
        wait: seconds to wait for another process to release it.

    Raises:
        UserError: another process has locked it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=wait)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it, or end it") from None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): set another --results-root or --cache-root"
        ) from None
    try:
        # Left by a process that was killed in `replacing`, or while safetensors wrote a file.
        for leftover in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):
            leftover.unlink()
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------- files
def check_replaceable(path: Path) -> None:
    """Raises UserError if `path` is a pipe or a device: a file would replace it, and opening it may block."""
    status = stat_of(path)
    if status and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"{path} is a pipe or a device, and output is written completely or not at all: name a file")


os.umask(UMASK := os.umask(0))  # it can only be read by changing it, which other threads would see later


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` if the block ends without an error.

    A reader therefore sees the old file or the complete new one, even if this process is killed.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)  # like any new file; some libraries make theirs private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # for a full disk it names no file
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make room there, or choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, completely or not at all; file names that are not UTF-8 keep their bytes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=2) + "\n")


REBUILD = "move it away and run the command that writes it"


@contextmanager
def reading(path: Path, remedy: str = REBUILD) -> Iterator[None]:
    """For a block that parses `path`, a file of this project's: errors become one sentence.

    Raises:
        UserError: it cannot be read, or lacks something that the block reads; `remedy` is what to do.
    """
    try:
        yield
    except (OSError, csv.Error, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}): {remedy}") from None


def read_json(path: Path, remedy: str = REBUILD) -> dict[str, Any]:
    """Read a JSON file of this project's, which holds an object; raises UserError as `reading`."""
    with reading(path, remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {type(value).__name__}, not an object")
        return value


def stat_of(path: Path) -> os.stat_result | None:
    """Status of a file; None if it is unavailable."""
    try:
        return path.stat()
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
