"""What the README and docs/ promise: commands with their flags, make targets, links, pictures, files of the source."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, help_of

README = REPOSITORY / "README.md"
DOCUMENTS = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
PICTURES = sorted(path for path in (REPOSITORY / "docs").rglob("*") if path.suffix in (".svg", ".png", ".jpg", ".gif"))
OTHER_PROGRAMS = (  # flags of Slurm, of GNU parallel, of torchrun, of TensorBoard
    "--array --cpus-per-task --gpus --job-name --mem --open-mode --output --requeue --signal --time "
    "--joblog --jobs --retries --termseq "
    "--logdir --max-restarts --nnodes --nproc_per_node --rdzv_backend --rdzv_endpoint --standalone"
)
PACKAGES = {path.parent.name for path in REPOSITORY.glob("[!.]*/__init__.py")}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


of_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=relative)


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def expanded(text: str) -> Iterator[str]:
    """`a_{b,c}` as the shell expands it: a_b and a_c."""
    match = re.search(r"{([^{}]*)}", text)
    if not match:
        yield text
        return
    for choice in match[1].split(","):
        yield from expanded(text[: match.start()] + choice + text[match.end() :])


def commands_of(document: Path) -> list[tuple[str, list[str]]]:
    """Module and flags of each `python -m module --flag ...` of this project."""
    return [
        (module, re.findall(r"(?<!\S)\[?(--[\w-]+)", rest.partition(" #")[0]))
        for modules, rest in re.findall(r"python3? -m ([\w.{},]+)([^\n`&;|]*)", text_of(document).replace("\\\n", " "))
        for module in expanded(modules)
        if module.split(".")[0] in PACKAGES
    ]


@cache
def flags_of(module: str) -> frozenset[str]:
    """The flags that a command's --help names, however it lays them out."""
    plain = help_of(REPOSITORY / f"{module.replace('.', '/')}.py")
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", plain))


@of_each_document
def test_every_command_exists_with_its_flags(document: Path) -> None:
    for module, flags in commands_of(document):
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").exists(), module
        assert set(flags) <= flags_of(module), f"{module} does not take all of {flags}"


@of_each_document
def test_every_flag_is_one_of_some_command(document: Path) -> None:
    known = {flag for other in DOCUMENTS for module, _ in commands_of(other) for flag in flags_of(module)}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(document))) <= known.union(OTHER_PROGRAMS.split())


@of_each_document
def test_every_make_target_exists(document: Path) -> None:
    wanted = re.findall(r"(?:^|`)\s*make ([a-z][\w-]*)", text_of(document), re.MULTILINE)
    assert set(wanted) <= set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_the_readme_and_the_paper_page_name_commands() -> None:
    assert len(commands_of(README)) >= 5
    assert len(commands_of(REPOSITORY / "docs" / "paper.md")) >= 20


def anchors_of(document: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_each_document
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in re.findall(r"\]\(([^()\s]+)\)", text_of(document)):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@of_each_document
def test_every_source_file_that_is_named_exists(document: Path) -> None:
    for name in re.findall(r"`([\w./]*/\w+\.py)`", text_of(document)):
        assert (REPOSITORY / name).exists(), name


def test_the_documents_and_sections_that_source_files_name_exist() -> None:
    sections = set(re.findall(r"^## (\w+)", text_of(REPOSITORY / "docs" / "method.md"), re.MULTILINE))
    for path in (*REPOSITORY.glob("*.py"), *(path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py"))):
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r"\bdocs/[\w/]+\.md", source):
            assert (REPOSITORY / name).exists(), f"{relative(path)} names {name}"
        assert set(re.findall(r"docs/method\.md, ([A-Z]\w+)", source)) <= sections, relative(path)


@pytest.mark.parametrize("picture", PICTURES, ids=relative)
def test_every_picture_is_small_and_shown_somewhere(picture: Path) -> None:
    assert picture.stat().st_size < 200_000
    assert any(f"/{picture.name})" in text or f"({picture.name})" in text for text in map(text_of, DOCUMENTS))


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 150


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {(README.parent / link).resolve() for link in re.findall(r"\]\(([^()\s#]+)[^()]*\)", text_of(README))}
    assert {path.resolve() for path in DOCUMENTS[1:]} <= linked
