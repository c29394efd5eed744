"""The command line: what wins, which values are taken, what is refused and how; and the writes behind it."""

import ast
import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import config
from config import Experiment, Preset
from tests.conftest import REPOSITORY, run_module, succeed
from utils import (
    UserError,
    as_flags,
    check_same_ground,
    derived_seed,
    first_difference,
    parse_command_line,
    read_csv,
    read_json,
    reading,
    replacing,
    run_door,
    run_facts,
    write_csv,
    write_json,
    write_text,
)

GROUPS = ("tuning", "training", "num_crops", "standard_memory", "reproduce")
EXPERIMENT_ROOMS = ("hyperparameter_tuning", "model_training", "num_crops", "standard_memory")
DOORS = [
    path
    for room in ("data", *EXPERIMENT_ROOMS)
    for path in sorted((REPOSITORY / room).glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]


def parse(*argv: str) -> tuple[Preset, Experiment, Experiment]:
    """As a door that reads every setting, of the demo preset unless told otherwise."""
    argv = argv if "--preset" in argv else ("--preset", "demo", *argv)
    preset, experiments, extra = parse_command_line("", GROUPS, ("glass_vit", "standard_vit"), argv=argv)
    assert extra == {}
    return preset, *experiments


# ------------------------------------------------------------------------------------------------- what wins
def test_the_command_line_wins_over_the_preset_and_the_preset_over_config() -> None:
    assert config.Training.epochs == 50 and config.DEMO.training.epochs == 4
    assert parse_command_line("", ("training",), argv=[])[0] == config.PAPER
    assert parse("--preset", "demo")[0] == config.DEMO
    preset, *_ = parse("--epochs", "3")
    assert preset.training == replace(config.DEMO.training, epochs=3) and preset.tuning.epochs == 3
    assert preset.settings == config.DEMO.settings and preset.settings.label_smoothing == 0.1


def test_hyperparameters_are_overridden_in_the_doors_own_experiments_only() -> None:
    preset, glass, standard = parse("--dropout-rate", "0.25", "--lr", "0.5", "--name", "mine")
    assert (glass.dropout_rate, standard.dropout_rate, standard.lr, glass.name) == (0.25, 0.25, 0.5, "mine")
    assert [other for other in preset.experiments if other.name != "mine"] == [
        other for other in config.DEMO.experiments if other.name not in ("glass_vit", "standard_vit")
    ]


@pytest.mark.parametrize(
    ("argv", "group", "name", "value"),
    [
        (["--epochs", "7"], "training", "epochs", 7),
        (["--eta-min", "1e-7"], "settings", "eta_min", 1e-7),
        (["--pretrained"], "settings", "pretrained", True),
        (["--pretrained", "--epochs", "7"], "settings", "pretrained", True),
        (["--pretrained", "true"], "settings", "pretrained", True),
        (["--compile", "False"], "settings", "compile", False),
        (["--no-compile"], "settings", "compile", False),
        (["--seeds", "1", "2"], "training", "seeds", (1, 2)),
        (["--weights-files", "vit=a=b"], "settings", "weights_files", ("vit=a=b",)),
        (["--data-root", "my photos/test"], "settings", "data_root", Path("my photos/test")),
        (["--precision", "bf16"], "settings", "precision", "bf16"),
        (["--valid-size", "30"], "settings", "valid_size", 30),
        (["--valid-size", "0.5"], "settings", "valid_size", 0.5),
        (["--num-workers", "auto"], "settings", "num_workers", "auto"),
        (["--num-workers=3"], "settings", "num_workers", 3),
        (["--device", "cuda:1"], "settings", "device", "cuda:1"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_every_kind_of_value_is_read(argv: list[str], group: str, name: str, value: object) -> None:
    found = getattr(getattr(parse(*argv)[0], group), name)
    assert found == value and type(found) is type(value)


def another(value: Any, hint: Any) -> Any:
    """A value of the type `hint` that is not `value`."""
    if get_origin(hint) is tuple:
        return tuple(another(item, get_args(hint)[0]) for item in value) or ("vit=a b",)
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if get_args(hint):
        return 3 if value == "auto" else 7
    return {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value / 3,
        Path: lambda: value / "a b",
        str: lambda: f"{value} 'x",
    }[hint]()


@pytest.mark.parametrize("group", ["settings", *GROUPS])
def test_overrides_survive_being_passed_on_as_flags(group: str) -> None:
    for preset in config.PRESETS.values():
        owner = getattr(preset, group)
        hints = get_type_hints(type(owner))
        changed = {name: another(getattr(owner, name), hint) for name, hint in hints.items()}
        assert all(changed[field.name] != getattr(owner, field.name) for field in fields(owner))
        overridden = replace(preset, **{group: replace(owner, **changed)})
        groups = () if group == "settings" else (group,)
        assert parse_command_line("", groups, argv=as_flags(overridden, groups))[0] == overridden
        assert as_flags(preset, groups) == ["--preset", preset.name]


# --------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--epochs 0", ["epochs", "at least 1"]),
        ("--epochs x", ["--epochs", "INTEGER"]),
        ("--epochs 1.5", ["--epochs", "INTEGER"]),
        ("--epochs", ["--epochs", "expected one argument"]),
        ("--dropout-rate 1", ["dropout_rate", "below 1"]),
        ("--label-smoothing -0.1", ["label_smoothing", "at least 0"]),
        ("--seeds", ["--seeds", "at least one"]),
        ("--seeds 1 1", ["seeds", "each once"]),
        ("--seeds 1 -1", ["seeds", "at least 0"]),
        ("--crop-counts 0", ["crop_counts", "at least 1"]),
        ("--lr nan", ["--lr", "NUMBER"]),
        ("--lr inf", ["--lr", "NUMBER"]),
        ("--lr -1", ["lr", "at least 0"]),
        ("--precision fp8", ["--precision", "fp16|bf16|fp32"]),
        ("--compile maybe", ["--compile", "true|false"]),
        ("--no-compile maybe", ["maybe"]),
        ("--valid-size 0", ["valid_size", "between 0 and 1"]),
        ("--test-size 1.5", ["test_size", "between 0 and 1"]),
        ("--final-valid-fraction 1", ["final_valid_fraction", "between 0 and 1"]),
        ("--reduction-factor 1", ["reduction_factor", "at least 2"]),
        ("--num-workers -1", ["num_workers", "auto"]),
        ("--num-workers many", ["--num-workers", "auto"]),
        ("--weights-files foo", ["weights_files", "BACKBONE=FILE"]),
        ("--name ../x", ["name", "folder name"]),
        ("--name .", ["name", "folder name"]),
        ("--preset nope", ["--preset nope", "paper, demo"]),
        ("--epoch 3", ["--epoch", "did you mean --epochs?"]),
        ("--patchsize=3", ["--patchsize=3", "did you mean --patch-size?"]),
        ("--zzz", ["--zzz", "--help"]),
        ("zzz", ["zzz", "--help"]),
    ],
)
def test_a_bad_argument_is_one_sentence_that_names_it(argv: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse(*argv.split())
    sentence = str(refusal.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_a_flag_that_a_door_does_not_read_is_unknown_to_it() -> None:
    for argv in (["--min-resource", "3"], ["--lr", "1"], ["--eta-min", "1"]):
        with pytest.raises(UserError, match=f"unknown argument {argv[0]}"):
            parse_command_line("", ("training",), ("glass_vit",), without=("eta_min",), argv=argv)


def test_a_bad_value_in_config_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for group, wrong, sentence in (
        ("training", config.Training(epochs="9"), "epochs is '9': expected INTEGER"),
        ("settings", config.Settings(weights_files="vit=x"), "weights_files is 'vit=x': expected a tuple"),
        ("settings", config.Settings(deterministic=1), "deterministic is 1: expected true|false"),
        ("training", config.Training(seeds=()), "at least one value"),
    ):
        monkeypatch.setitem(config.PRESETS, "mine", replace(config.PAPER, name="mine", **{group: wrong}))
        with pytest.raises(UserError) as refusal:
            parse("--preset", "mine")
        assert sentence in str(refusal.value)


# ------------------------------------------------------------------------------------------------------ doors
def raise_(error: BaseException) -> Callable[[Preset], None]:
    def action(preset: Preset) -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        (lambda preset: None, 0, ""),
        (raise_(UserError("what to do")), 2, "error: what to do\n"),
        (raise_(KeyboardInterrupt()), 130, "interrupted: "),
    ],
    ids=["well", "user error", "interrupted"],
)
def test_the_exit_code_tells_the_truth(
    action: Callable[[Preset], None], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_door("", action, argv=[])
    out, err = capsys.readouterr()
    assert end.value.code == code and err.startswith(words) and err.count("\n") == bool(words) and out == ""


def test_our_own_bug_is_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_door("", raise_(ZeroDivisionError()), argv=[])


def test_a_misspelt_flag_of_a_real_door_ends_with_2_and_a_suggestion() -> None:
    done = run_module("model_training.glass_vit_training", "--epoch", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown argument --epoch: did you mean --epochs?\n"


def test_a_missing_index_is_one_sentence_that_names_the_command(toy_data: Path, tmp_path: Path) -> None:
    roots = ("--data-root", toy_data, "--results-root", tmp_path)
    done = run_module("standard_memory.standard_memory_resnet", "--preset", "demo", *roots)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "index.csv does not exist: run python -m data.data_preprocess --preset demo" in done.stderr
    assert str(toy_data) in done.stderr


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.stem)
def test_help_of_every_door_is_its_docstring_and_its_settings(
    door: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [door.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(door), run_name="__main__")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert ast.get_docstring(ast.parse(door.read_text()), clean=False).strip() in text
    assert f"python -m {door.parent.name}.{door.stem}" in text
    assert "--preset" in text and "overriding config.py" in text


def test_there_are_22_doors() -> None:
    assert len(DOORS) == 18 + 4


def test_help_comes_from_the_command_too() -> None:
    assert "--kaggle-dataset" in succeed("data.data_download", "--help")


# ------------------------------------------------------------------------------------------------ safe writes
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


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], 3: True})
    assert read_json(tmp_path / "new" / "a.json") == {"a": None, "b": [None, [1.5, None]], "3": True}


def test_damaged_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(UserError, match=r"run\.json does not hold what .*: move it away"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"test": {}}', '{"test": {"n": "x"}}', "[" * 9999, "\udcff"])
def test_json_of_another_content_is_one_sentence_too(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, content)
    with (
        pytest.raises(UserError, match=r"metrics\.json does not hold what .*: run that$") as refusal,
        reading(path, "run that"),
    ):
        float(read_json(path, "run that")["test"]["n"])
    assert "\n" not in str(refusal.value)


def test_csv_keeps_every_digit_and_every_character(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1 / 3, 6.02e23, 5e-324, 1e16, -0.0, math.pi]
    names = ["a,b", 'say "x"', "line\nbreak", "größe", "\udcff", "", " x "]
    write_csv(tmp_path / "a.csv", ("name", "number"), zip(names, numbers, strict=True))
    rows = read_csv(tmp_path / "a.csv")
    assert [float(row["number"]) for row in rows] == numbers and [row["name"] for row in rows] == names


# -------------------------------------------------------------------------------------------- seeds and ground
def test_derived_seeds_never_change() -> None:
    assert derived_seed(606, "fake/0001.jpg", "all") == 606491399151189609
    assert derived_seed(100, "real/a.png", 3) == 5870255219284821045
    assert derived_seed(606, "shuffle", 0) == 8768215489134950572
    assert derived_seed(1, "2") != derived_seed("1", 2) != derived_seed("12")


def test_local_weights_are_compared_by_content_and_not_by_path(tmp_path: Path) -> None:
    facts = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        facts.append(run_facts({"weights_files": [f"vit={tmp_path / name}"]}, "print"))
    assert first_difference(facts[0], facts[1]) is None
    assert "weights_sha256" in str(first_difference(facts[0], facts[2]))


def test_a_folder_of_other_settings_is_refused_by_the_first_that_differs(tmp_path: Path) -> None:
    before = run_facts({"epochs": 5, "patch_size": 224, "eta_min": 0.1, "data_root": "a", "device": "cpu"}, "print")
    check_same_ground(tmp_path, before, "run.json")  # nothing there yet
    write_json(tmp_path / "run.json", before)

    def again(fingerprint: str = "print", **settings: object) -> None:
        check_same_ground(tmp_path, run_facts(before["settings"] | settings, fingerprint), "run.json")

    again()
    again(data_root="b", results_root="c", device="cuda", num_workers=3, seeds=[1], glass_trials=7, crop_counts=[2])
    with pytest.raises(UserError, match=r"started with epochs = 5, now 6: pass --restart to move that folder"):
        again(patch_size=64, epochs=6)
    with pytest.raises(UserError, match=r"started with lr = None, now 0\.1"):
        again(lr=0.1)
    with pytest.raises(UserError, match="started with dataset_fingerprint = print, now other"):
        again(fingerprint="other")
