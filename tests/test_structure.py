"""The architecture: who may import whom, no circles, and what happens in one place only."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LEVELS = (  # a file imports from its own package and from those on levels before it
    {"config"},
    {"utils"},
    {"data", "models"},
    {"training"},
    {"hyperparameter_tuning", "model_training", "num_crops", "standard_memory"},
    {"tests"},
)
PACKAGES = set().union(*LEVELS)
SOURCES = [
    path
    for path in sorted(REPOSITORY.rglob("*.py"))
    if path.relative_to(REPOSITORY).parts[0].removesuffix(".py") in PACKAGES - {"tests"}
]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def module_of(path: Path) -> str:
    return named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it; `from data import x` counts as data.x too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}: a relative import hides the package"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call in a file, with the dotted name of what is called."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_packages_are_those_of_the_dependency_rule() -> None:
    packages = {path.parent.name for path in REPOSITORY.glob("[!.]*/*.py")}
    assert packages | {path.stem for path in REPOSITORY.glob("*.py")} == PACKAGES


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_imports_only_from_its_own_package_and_from_levels_below(path: Path) -> None:
    own = module_of(path).split(".")[0]
    level = next(number for number, packages in enumerate(LEVELS) if own in packages)
    allowed = set().union({own}, *LEVELS[:level])
    assert {name.split(".")[0] for name in imports_of(path)} & PACKAGES <= allowed


def test_no_imports_go_in_a_circle() -> None:
    modules = {module_of(path): path for path in SOURCES}
    imports = {name: (imports_of(path) & modules.keys()) - {name} for name, path in modules.items()}
    while leaves := {name for name, imported in imports.items() if not imported & imports.keys()}:
        imports = {name: imported for name, imported in imports.items() if name not in leaves}
    assert not imports


def places_of(*names: str) -> set[str]:
    return {named(path) for path in SOURCES for called, _ in calls_of(path) if called in names}


def test_loaders_are_built_and_images_opened_in_one_place() -> None:
    assert places_of("ImageLoader", "DataLoader", "data.DataLoader", "torch.utils.data.DataLoader") == {
        "data/loaders.py"
    }
    openers = ("Image.open", "PIL.Image.open", "cv2.imread", "imread", "read_file", "decode_image", "decode_jpeg")
    assert places_of(*openers) == {"data/images.py"}
    opened = [call for called, call in calls_of(REPOSITORY / "data" / "images.py") if called == "Image.open"]
    assert all("formats" in {keyword.arg for keyword in call.keywords} for call in opened)  # or programs may be started


def test_one_file_uses_torch_distributed() -> None:
    knowing = {
        named(path) for path in SOURCES if any(name.startswith("torch.distributed") for name in imports_of(path))
    }
    assert knowing == {"training/processes.py"}
    assert not any(called.startswith("torch.distributed") for path in SOURCES for called, _ in calls_of(path))


def test_nothing_is_ever_unpickled() -> None:
    for path in SOURCES:
        for called, call in calls_of(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if called == "torch.load" or called.endswith((".get_state_dict", "load_state_dict_from_url")):
                assert given.get("weights_only") == "True", f"{named(path)}:{call.lineno}"
            assert not re.fullmatch(r"(pickle|dill|joblib|cloudpickle)\.\w*(load|loads|Unpickler)", called), named(path)
            assert given.get("allow_pickle", "False") == "False", named(path)
        assert not imports_of(path) & {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}, named(path)
