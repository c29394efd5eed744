"""The command line: what wins, which values are taken, what is refused and how; and the files behind it."""

import ast
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import config
from config import Experiment, Preset
from data.crops import derived_seed
from data.lists import read_csv, write_csv
from tests.conftest import REPOSITORY, help_of, refused
from training.runs import first_difference, run_metadata
from utils import UserError, _comments_of, as_flags, parse_command_line, replacing, run_command, write_text

GROUPS = ("tuning", "training", "num_crops", "standard_memory", "reproduce")
PACKAGES = ("data", "hyperparameter_tuning", "model_training", "num_crops", "standard_memory")
COMMANDS = [
    path
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]


def parse(*argv: str) -> tuple[Preset, Experiment, Experiment]:
    """As a command that reads every setting, of the demo preset unless --preset says otherwise."""
    argv = argv if "--preset" in argv else ("--preset", "demo", *argv)
    preset, experiments, options = parse_command_line("", GROUPS, ("glass_vit", "standard_vit"), argv=argv)
    assert options == {}
    return preset, *experiments


def test_the_command_line_wins_over_the_preset_and_the_preset_over_config() -> None:
    assert config.Training.epochs == 50 and config.DEMO.training.epochs == 4
    assert parse_command_line("", ("training",), argv=[])[0] == config.PAPER
    preset, *_ = parse("--epochs", "3")
    assert preset.training == replace(config.DEMO.training, epochs=3) and preset.tuning.epochs == 3
    assert preset.settings == config.DEMO.settings and preset.settings.label_smoothing == 0.1
    assert (parse()[0].training, parse()[0].tuning) == (config.DEMO.training, config.DEMO.tuning)


def test_hyperparameters_are_overridden_in_the_commands_own_experiments_only() -> None:
    preset, glass, standard = parse("--dropout-rate", "0.25", "--lr", "0.5", "--name", "mine")
    assert (glass.dropout_rate, standard.dropout_rate, standard.lr, glass.name) == (0.25, 0.25, 0.5, "mine")
    assert [other for other in preset.experiments if other.name != "mine"] == [
        other for other in config.DEMO.experiments if other.name not in ("glass_vit", "standard_vit")
    ]


def another(value: Any) -> Any:
    """A different value of the same kind, with characters that a shell or a parser may stumble over."""
    if value in ("auto", "disk", "paper"):
        return 7
    if isinstance(value, tuple):
        return tuple(map(another, value)) or ("resnet=a=b c",)
    changes = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 3, str: lambda: f"{value} 'x"}
    return Path("-a", value, "b c") if isinstance(value, Path) else changes[type(value)]()


@pytest.mark.parametrize("group", ["settings", *GROUPS])
def test_every_kind_of_value_is_read_as_it_was_passed_on(group: str) -> None:
    choices = {"precision": "bf16", "channels_last": "on", "matmul_precision": "medium", "device": "cuda:1"}
    choices |= {"demo_data": "local", "data_layout": "ai_nature", "activation_checkpointing": "auto"}
    for preset in config.PRESETS.values():
        owner = getattr(preset, group)
        changed = {field.name: another(getattr(owner, field.name)) for field in fields(owner)}
        changed |= {name: choice for name, choice in choices.items() if name in changed}
        overridden = replace(preset, **{group: replace(owner, **changed)})
        groups = () if group == "settings" else (group,)
        assert parse_command_line("", groups, argv=as_flags(overridden, groups))[0] == overridden
        assert as_flags(preset, groups) == ["--preset", preset.name]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--epochs 0", "epochs is 0: input should be greater than or equal to 1"),
        ("--dropout-rate 1", "dropout_rate is 1.0: input should be less than 1"),
        ("--seeds", "--seeds needs at least one value"),
        ("--hold-out --epochs 3", "--hold-out needs at least one value"),
        ("--seeds 1 1", "seeds is (1, 1): it must be one or more values, each once"),
        ("--seeds 1 -1", "seeds is (1, -1): input should be greater than or equal to 0"),
        ("--lr nan", "lr is nan: input should be"),
        ("--valid-size 0", "valid_size is 0: input should be greater than or equal to 1 or input should be greater"),
        ("--test-size 1.5", "test_size is 1.5: input should be a valid integer or input should be less than 1"),
        ("--num-workers -1", "num_workers is -1: input should be greater than or equal to 0 or input should be 'auto'"),
        ("--weights-files foo", "weights_files is ('foo',): it must be BACKBONE=FILE"),
        ("--name ../x", "name is ../x: it must be a folder name of"),
        ("--preset nope", "--preset nope: config.py has paper, demo"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_that_names_it(argv: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse(*argv.split())
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--epochs x", ["--epochs", "'x'"]),
        ("--precision fp8", ["--precision", "fp16", "fp8"]),
        ("--checkpoint-evry 3", ["--checkpoint-evry", "--checkpoint-every"]),
        ("--zzz", ["--zzz", "--help"]),
    ],
)
def test_an_unknown_or_wrong_argument_is_named(argv: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv.split())
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and all(word in printed.err for word in words), printed.err


def test_a_flag_that_a_command_does_not_read_is_unknown_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--min-resource", "3"], ["--lr", "1"], ["--eta-min", "1"], ["--num-crops", "3"]):
        with pytest.raises(SystemExit):
            parse_command_line(
                "", ("training",), ("glass_vit",), settings=["data_root"], without=["num_crops"], argv=argv
            )
        assert argv[0] in capsys.readouterr().err


def test_a_bad_value_in_config_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for group, wrong, sentence in (
        ("training", config.Training(epochs="9"), "epochs is 9: input should be a valid integer"),
        ("settings", config.Settings(weights_files="vit=x"), "weights_files is vit=x: input should be a valid tuple"),
        ("settings", config.Settings(deterministic=1), "deterministic is 1: input should be a valid boolean"),
        ("num_crops", config.NumCrops(crop_counts=()), "crop_counts is (): it must be one or more values"),
    ):
        monkeypatch.setitem(config.PRESETS, "mine", replace(config.PAPER, name="mine", **{group: wrong}))
        with pytest.raises(UserError) as refusal:
            parse("--preset", "mine")
        assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(None, 0, ""), (UserError("what to do"), 2, "error: what to do\n"), (KeyboardInterrupt(), 130, "interrupted: ")],
    ids=["well", "user error", "interrupted"],
)
def test_each_way_to_end_has_its_exit_code(
    error: BaseException | None, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(preset: Preset) -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as end:
        run_command("", action, argv=[])
    out, err = capsys.readouterr()
    assert end.value.code == code and err.startswith(words) and err.count("\n") == bool(words) and out == ""
    with pytest.raises(ZeroDivisionError):  # our own bug is a traceback
        run_command("", lambda preset: 1 / 0, argv=[])


def test_a_missing_index_is_one_sentence_that_names_the_command(toy_data: Path, tmp_path: Path) -> None:
    roots = ("--data-root", toy_data, "--results-root", tmp_path)
    message = refused("standard_memory.standard_memory_resnet", "--preset", "demo", *roots)
    assert "index.csv does not exist: run python -m data.data_preprocess --preset demo" in message
    assert str(toy_data) in message


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_every_command_has_its_docstring_and_flags_in_its_help(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(command)
    first_line = ast.get_docstring(ast.parse(command.read_text())).splitlines()[0]
    assert first_line in text and f"python -m {command.parent.name}.{command.stem}" in text
    assert "--preset" in text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "new"


def test_csv_keeps_every_digit_and_every_character(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1 / 3, 6.02e23, 5e-324, 1e16, -0.0, math.pi]
    names = ["a,b", 'say "x"', "line\nbreak", "größe", "\udcff", "", " x "]
    write_csv(tmp_path / "a.csv", ("name", "number"), zip(names, numbers, strict=True))
    rows = read_csv(tmp_path / "a.csv")
    assert [float(row["number"]) for row in rows] == numbers and [row["name"] for row in rows] == names


def test_derived_seeds_never_change() -> None:
    assert derived_seed(606, "fake/0001.jpg", "all") == 606491399151189609
    assert derived_seed(100, "real/a.png", 3) == 5870255219284821045
    assert derived_seed(1, "2") != derived_seed("1", 2) != derived_seed("12")


def test_local_weights_are_compared_by_content_and_not_by_path(tmp_path: Path) -> None:
    metadata = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        metadata.append(run_metadata({"weights_files": [f"vit={tmp_path / name}"]}, "print"))
    assert first_difference(metadata[0], metadata[1]) is None
    assert "weights_sha256" in str(first_difference(metadata[0], metadata[2]))


def test_settings_that_change_numbers_are_compared_and_unknown_ones_have_their_defaults() -> None:
    settings = {"epochs": 5, "patch_size": 224, "eta_min": 0.1, "data_root": "a", "device": "cpu"}

    def difference(fingerprint: str = "print", **changes: object) -> str | None:
        return first_difference(run_metadata(settings, "print"), run_metadata(settings | changes, fingerprint))

    assert difference() is None
    assert difference(data_root="b", results_root="c", device="cuda", num_workers=3, seeds=[1], trials=7) is None
    assert difference(patch_size=64, epochs=6) == "epochs = 5, now 6"
    assert difference(fingerprint="other") == "dataset_fingerprint = print, now other"
    assert difference(exact_resize=False, hold_out=[], crop_counts=[2]) is None  # added since, and off
    assert difference(exact_resize=True) == "exact_resize = False, now True"


WITHOUT_UNIX = """
import runpy, sys
sys.modules.update(dict.fromkeys(("fcntl", "resource")))  # as on Windows
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["data.data_preprocess", "model_training.glass_resnet_training"])
def test_windows_is_refused_in_one_sentence(module: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_UNIX, module]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "WSL" in done.stderr
    assert done.stderr.startswith("error: this project runs on Linux and macOS, not on Windows")


def test_each_setting_has_a_line_of_help_beside_it() -> None:
    owners = [getattr(config.PAPER, group) for group in ("settings", *GROUPS, "ablations")]
    for owner in (*owners, *config.PAPER.experiments):
        missing = {field.name for field in fields(owner)} - _comments_of(type(owner)).keys()
        assert not missing, type(owner)
