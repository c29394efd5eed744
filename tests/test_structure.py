"""The house: who may import whom, what a door is, what happens in one place only, and what the README promises."""

import ast
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import config
from tests.conftest import REPOSITORY

MIDDLE_ROOMS = ("data", "models", "training")
EXPERIMENT_ROOMS = ("hyperparameter_tuning", "model_training", "num_crops", "standard_memory")
ROOMS = {"config", "utils", *MIDDLE_ROOMS, *EXPERIMENT_ROOMS, "tests"}
ENGINES = {  # of each experiment room's doors
    "hyperparameter_tuning": "hyperparameter_tuning.study",
    "model_training": "model_training.run",
    "num_crops": "num_crops.sweep",
    "standard_memory": "standard_memory.profile",
}
BACKBONES = ("vit", "convnext", "resnet")
DOORS = {  # of the experiments: module -> experiment
    **{
        f"{room}.{family}_{backbone}_{ending}": f"{family}_{backbone}"
        for room, ending in (("hyperparameter_tuning", "tuning"), ("model_training", "training"))
        for family in ("glass", "standard")
        for backbone in BACKBONES
    },
    **{f"num_crops.num_crops_{backbone}": f"glass_{backbone}" for backbone in BACKBONES},
    **{f"standard_memory.standard_memory_{backbone}": f"standard_{backbone}" for backbone in BACKBONES},
}
README = REPOSITORY / "README.md"
SOURCES = [  # all but the tests
    *sorted(REPOSITORY.glob("*.py")),
    *(path for room in (*MIDDLE_ROOMS, *EXPERIMENT_ROOMS) for path in sorted((REPOSITORY / room).rglob("*.py"))),
]
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it; `from data import x` counts as data.x too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}: a relative import hides the room"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call in a file, with the dotted name of what is called."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --------------------------------------------------------------------------------------------- the import law
def test_the_rooms_are_those_of_the_import_law() -> None:
    packages = {path.parent.name for path in REPOSITORY.glob("[!.]*/*.py")}
    assert packages | {path.stem for path in REPOSITORY.glob("*.py")} == ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_imports_only_from_the_rooms_below_its_own(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0].removesuffix(".py")
    allowed = {"config": set(), "utils": {"config"}}
    allowed |= {middle: {"config", "utils", middle} for middle in MIDDLE_ROOMS}
    allowed |= {upper: {"config", "utils", *MIDDLE_ROOMS, upper} for upper in EXPERIMENT_ROOMS}
    assert {name.split(".")[0] for name in imports_of(path)} & ROOMS <= allowed[room]


def test_config_imports_only_the_standard_library() -> None:
    assert {name.split(".")[0] for name in imports_of(REPOSITORY / "config.py")} <= sys.stdlib_module_names


def test_metrics_know_no_torch() -> None:
    assert not [name for name in imports_of(REPOSITORY / "training" / "metrics.py") if name.startswith("torch")]


# ------------------------------------------------------------------------------------------------------ doors
def test_there_are_eighteen_doors_each_of_one_experiment() -> None:
    endings = r"(glass|standard)_\w+_(tuning|training)|(num_crops|standard_memory)_\w+"
    found = [path for path in SOURCES if path.parent.name in ENGINES and re.fullmatch(endings, path.stem)]
    assert len(DOORS) == 18 and {f"{path.parent.name}.{path.stem}" for path in found} == DOORS.keys()
    assert set(DOORS.values()) == {experiment.name for experiment in config.PAPER.experiments}
    assert set(DOORS.values()) == {experiment.name for experiment in config.DEMO.experiments}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_a_docstring_one_import_and_one_guarded_call(door: str) -> None:
    room, path = door.split(".")[0], REPOSITORY / f"{door.replace('.', '/')}.py"
    assert len(path.read_text().splitlines()) <= 15
    docstring, imported, guard = tree_of(path).body
    assert f"    python -m {door}" in ast.literal_eval(docstring.value)
    assert ast.unparse(imported) == f"from {ENGINES[room]} import main"
    assert ast.unparse(guard) == f"if __name__ == '__main__':\n    main('{DOORS[door]}', __doc__)"


# ------------------------------------------------------------------------------------------ in one place only
def places_of(*names: str) -> list[str]:
    return [named(path) for path in SOURCES for called, _ in calls_of(path) if called in names]


def test_loaders_are_built_and_images_opened_in_one_place() -> None:
    loaders = ("ImageLoader", "DataLoader", "data.DataLoader", "torch.utils.data.DataLoader")
    assert places_of(*loaders) == ["data/loaders.py"]
    openers = ("Image.open", "PIL.Image.open", "cv2.imread", "imread", "read_file", "decode_image", "decode_jpeg")
    assert set(places_of(*openers)) == {"data/images.py"}


def test_nothing_is_ever_unpickled() -> None:
    for path in SOURCES:
        for called, call in calls_of(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if called == "torch.load" or called.endswith((".get_state_dict", "load_state_dict_from_url")):
                assert given.get("weights_only") == "True", f"{named(path)}:{call.lineno}"
            assert not re.fullmatch(r"(pickle|dill|joblib|cloudpickle)\.\w*(load|loads|Unpickler)", called), named(path)
            assert given.get("allow_pickle", "False") == "False", named(path)
        assert not imports_of(path) & {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}, named(path)


# ------------------------------------------------------------------------------------------------- docstrings
def public_without_docstring(node: ast.AST) -> Iterator[str]:
    """Public functions, classes and methods that say nothing; __init__ is told of by its class."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if not ast.get_docstring(child):
                yield child.name
            if isinstance(child, ast.ClassDef):
                yield from (f"{child.name}.{name}" for name in public_without_docstring(child))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_file_and_everything_public_in_it_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))
    assert list(public_without_docstring(tree_of(path))) == []


# ----------------------------------------------------------------------------------------------------- README
def expanded(text: str) -> Iterator[str]:
    """`a_{b,c}` as the shell reads it: a_b and a_c."""
    match = re.search(r"{([^{}]*)}", text)
    if not match:
        yield text
        return
    for choice in match[1].split(","):
        yield from expanded(text[: match.start()] + choice + text[match.end() :])


def readme_commands() -> list[tuple[str, list[str]]]:
    """Module and flags of each `python -m module --flag ...` of ours in the README."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        (module, re.findall(r"(?<!\S)\[?(--[\w-]+)", rest.partition(" #")[0]))
        for modules, rest in re.findall(r"python3? -m ([\w.{},]+)([^\n`&;|]*)", text)
        for module in expanded(modules)
        if module.split(".")[0] in ROOMS - {"tests"}
    ]


@cache
def help_of(module: str) -> str:
    """What a door prints for --help."""
    path, before, printed = REPOSITORY / f"{module.replace('.', '/')}.py", sys.argv, io.StringIO()
    sys.argv = [path.name, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()


@needs_readme
def test_every_command_of_the_readme_exists_with_its_flags() -> None:
    commands = readme_commands()
    assert commands
    for module, flags in commands:
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").exists(), module
        settings = help_of(module).partition("options:")[2]
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", settings), f"{module} does not take {flag}"


@needs_readme
def test_every_make_target_of_the_readme_exists() -> None:
    wanted = set(re.findall(r"(?:^|`)\s*make ([a-z][\w-]*)", README.read_text(encoding="utf-8"), re.MULTILINE))
    makefile = REPOSITORY / "Makefile"
    targets = re.findall(r"^([\w-]+):", makefile.read_text(), re.MULTILINE) if makefile.exists() else []
    assert wanted <= set(targets)
