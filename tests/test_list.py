"""`model_training.reproduce --list`: the work that is left, as commands that a scheduler can run at once."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.lists import read_csv
from tests.conftest import ENVIRONMENT, REPOSITORY, TOY_SETTINGS, copy_index, refused, run_module, succeed

REPRODUCE = "model_training.reproduce"
WORK = (
    *("--stages", "tuning", "training", "num_crops", "standard_memory", "--experiments", "standard_resnet"),
    *("glass_resnet", "--epochs", "1", "--seeds", "1", "2", "--crop-counts", "1", "3", "--trials", "1"),
    *("--max-resource", "1", "--batch-size", "8"),
)
SHELL = os.environ | ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where python is


def listed(*arguments: str | Path) -> list[str]:
    """The lines of --list, beside which it prints nothing but a sentence on stderr."""
    done = run_module(REPRODUCE, *arguments, "--list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr.startswith(f"commands left: {len(lines)},"), done.stderr
    return lines


def run_lines(lines: list[str]) -> None:
    """Run commands through a shell, at once."""
    running = [subprocess.Popen(line, shell=True, cwd=REPOSITORY, env=SHELL) for line in lines]
    assert [process.wait(300) for process in running] == [0] * len(lines)


@pytest.mark.slow
def test_the_list_names_the_work_that_is_left_and_its_lines_run_at_the_same_time(
    indexed: Path, toy_data: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path / "the user's results")
    work = (*TOY_SETTINGS, *WORK, "--data-root", toy_data, "--results-root", results)
    settings = f"--data-root={toy_data} {shlex.quote(f'--results-root={results}')} --patch-size=32 --valid-size=6"
    settings += " --test-size=6 --final-valid-fraction=0.1 --device=cpu --num-workers=0"
    parts = {
        "hyperparameter_tuning.{}_tuning": ["--epochs=1 --trials=1 --max-resource=1"],
        "model_training.{}_training": [f"--epochs=1 --seeds {seed}" for seed in (1, 2)],
        "num_crops.num_crops_{}": [f"--epochs=1 --batch-size=8 --crop-counts {k}" for k in (1, 3)],
        "standard_memory.standard_memory_{}": ["--epochs=1 --batch-size=8"],
    }
    names = [("standard_resnet", "glass_resnet")] * 2 + [("resnet",)] * 2
    expected = [
        f"python -m {module.format(name)} --preset demo {settings} {part}"
        for (module, own), of in zip(parts.items(), names, strict=True)
        for name in of
        for part in own
    ]
    assert sorted(map(shlex.split, listed(*work))) == sorted(map(shlex.split, expected))
    lines = listed(*work)
    two_crop_counts = [line for line in lines if "num_crops_resnet" in line]
    run_lines([*two_crop_counts, lines[0], lines[2]])
    assert listed(*work) == [line for line in lines if line not in (*two_crop_counts, lines[0], lines[2])]
    more = listed(*work, "--trials", "2", "--seeds", "1", "3", "--crop-counts", "3", "4")
    assert [line.split()[2] for line in more if "standard_resnet" in line or "num_crops_" in line] == [
        "hyperparameter_tuning.standard_resnet_tuning",  # started
        "model_training.standard_resnet_training",
        "num_crops.num_crops_resnet",
    ]

    folder = results / "demo" / "num_crops" / "glass_resnet" / "full"
    files = [folder / f"k_{k}" / "costs.csv" for k in (1, 3)]
    rows = [read_csv(file) for file in files]
    assert [[row["num_crops"] for row in of] for of in rows] == [["1"], ["3"]]
    assert rows[0][0].keys() == rows[1][0].keys() and float(rows[1][0]["peak_memory_mb"]) > 0
    sweep = shlex.split(two_crop_counts[0])[2:-2]
    printed = succeed(*sweep, "--crop-counts", "1", "3")
    assert "peak_memory_mb = " in printed and "R squared 1.0" in printed  # through two points
    # As an earlier version kept them: all K in one file.
    (folder / "costs.csv").write_text(files[0].read_text() + files[1].read_text().splitlines()[1] + "\n")
    (folder / "k_1" / "run.json").rename(folder / "run.json")
    for file in files:
        shutil.rmtree(file.parent)
    assert succeed(*sweep, "--crop-counts", "1", "3") == printed
    assert not any("num_crops_" in line for line in listed(*work)) and not list(folder.glob("k_*"))


def test_without_an_index_the_list_names_what_comes_first(toy_data: Path, tmp_path: Path) -> None:
    work = ("--preset", "demo", "--results-root", tmp_path, "--demo-images", "2", "--data-root")
    said = refused(REPRODUCE, *work, tmp_path / "demo data", "--list")
    command = shlex.split(said[said.index(" run python -m") : said.index(" first")])[3:]
    succeed(*command)
    assert len(list((tmp_path / "demo data").glob("[fr]*/*"))) == 4 and not (tmp_path / "demo" / "tables").exists()
    assert len(listed(*work, tmp_path / "demo data")) == 4
    assert "give one of them" in refused(REPRODUCE, "--preset", "demo", "--list", "--prepare")


def has_gnu_parallel() -> bool:
    """Whether the program `parallel` is GNU's."""
    found = shutil.which("parallel")
    return bool(found) and b"GNU" in subprocess.run([found, "--version"], capture_output=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not has_gnu_parallel(), reason="GNU parallel is not installed")
def test_the_tables_through_gnu_parallel_are_those_of_the_plain_command(
    indexed: Path, toy_data: Path, tmp_path: Path
) -> None:
    work = (*TOY_SETTINGS, *WORK, "--stages", "training", "--experiments", "glass_resnet")
    work = (*work, "--data-root", toy_data, "--results-root")
    plain, at_once = (copy_index(indexed, tmp_path / name) for name in ("plain", "at once"))
    succeed(REPRODUCE, *work, plain)
    lines, log = listed(*work, at_once), tmp_path / "log"
    command = ["parallel", "--jobs", "2", "--joblog", log]
    done = subprocess.run(
        command, input="\n".join(lines), cwd=REPOSITORY, env=SHELL, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0 and len(log.read_text().splitlines()) == 1 + len(lines), done.stderr
    nothing = run_module(REPRODUCE, *work, at_once, "--list")
    assert nothing.stdout == "" and nothing.stderr.startswith("commands left: 0,")
    succeed(*shlex.split(nothing.stderr.partition("after them: ")[2])[2:])

    (one, other) = ({path.name: path for path in root.glob("demo/tables_seeds_1_2/*")} for root in (plain, at_once))
    assert one.keys() == other.keys() and len(one) >= 5
    for name in one:
        assert one[name].read_bytes() == other[name].read_bytes(), name
