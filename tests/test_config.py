"""Every setting in config.py has an effect, shown on the real code, and the paper's are docs/method.md's."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import config
from config import CostSettings, LogUniform, NumCrops, Preset, Reproduce, StandardMemory, Training, Tuning
from data.views import ViewSettings
from hyperparameter_tuning.study import build_live_study
from hyperparameter_tuning.trials import suggest_experiment
from model_training.ablations import variants_of
from model_training.reproduce import commands_of
from model_training.run import train_and_evaluate
from models.build import build_model
from num_crops.sweep import sweep
from standard_memory.profile import profile
from tests.conftest import FIXTURES, MakePreset
from tests.setting_effects import EFFECTS, GLASS, STANDARD, Lab, Observe, effect
from training.checkpoints import Checkpoint
from training.optimizer import parameter_groups
from training.runs import seed_folder
from utils import preset_folder, read_json


@pytest.fixture
def lab(toy_preset: MakePreset, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield Lab(toy_preset, indexed, tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def steps_of(action: Callable[..., None], *arguments: object) -> int:
    """How many optimizer steps `action(*arguments)` takes."""
    steps: list[None] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    try:
        action(*arguments)
    finally:
        hook.remove()
    return len(steps)


@effect(
    "Tuning.min_resource Tuning.max_resource Tuning.reduction_factor",
    {(5, 25, 3): {5, 15}, (2, 25, 3): {2, 6, 18}, (5, 14, 3): {5}, (5, 25, 2): {5, 10, 20}},
)
def epochs_at_which_worse_and_worse_trials_are_pruned(lab: Lab, value: tuple[int, int, int]) -> set[int]:
    names = ("min_resource", "max_resource", "reduction_factor")
    study = build_live_study(STANDARD.name, 606, Tuning(**dict(zip(names, value, strict=True))))
    steps = set()
    for number in range(20):
        trial = study.ask()
        for step in range(25):
            trial.report(-number, step)
            if trial.should_prune():
                steps.add(step)
                break
        study.tell(trial, -number)
    return steps


@effect("Settings.checkpoint_every", {0: 2, 2: 2 + 2 * 4, 7: 2 + 2})  # two epochs of eight steps
def saves_of_the_state(lab: Lab, every: int) -> int:
    saves: list[int] = []
    save = Checkpoint.save
    lab.monkeypatch.setattr(
        Checkpoint, "save", lambda *arguments, **options: saves.append(1) or save(*arguments, **options)
    )
    preset = lab.running(training=Training(epochs=2, seeds=(1,)))
    preset = replace(preset, settings=replace(preset.settings, checkpoint_every=every))
    train_and_evaluate(preset, replace(STANDARD, batch_size=4))
    lab.monkeypatch.undo()
    return len(saves)


@effect("Training.band_error", {0.0: 0.0, 0.4: 0.4})
def error_of_the_band_of_inconclusive_probabilities(lab: Lab, error: float) -> float:
    preset = lab.running(training=Training(epochs=1, seeds=(3,), band_error=error))
    preset = replace(preset, settings=replace(preset.settings, final_valid_fraction=0.5))
    train_and_evaluate(preset, STANDARD)
    return read_json(seed_folder(preset, STANDARD.name, 3) / "metrics.json")["calibration"]["band_error"]


MODES = {  # epochs, batch_size, quick, warmup_steps, measured_steps -> steps of a training on 28 images, and one a size
    (1, 14, False, 3, 10): 2 + 1, (2, 14, False, 3, 10): 4 + 1, (1, 8, False, 3, 10): 4 + 2,
    (9, 4, True, 1, 2): 3 + 1, (9, 4, True, 3, 2): 5 + 1, (9, 4, True, 1, 3): 4 + 1,
}  # fmt: skip


@effect(
    " ".join(f"{study}.{field.name}" for study in ("NumCrops", "StandardMemory") for field in fields(CostSettings))
    + " GlassExperiment.name StandardExperiment.name",
    MODES,
)
def steps_of_cost_studies(lab: Lab, mode: tuple) -> int:
    preset = lab.running(num_crops=NumCrops(*mode, (1,)), standard_memory=StandardMemory(*mode))
    steps = {
        steps_of(sweep, preset, replace(GLASS, name="mine")),
        steps_of(profile, preset, replace(STANDARD, name="mine")),
    }
    for study in ("num_crops/mine/*/k_1", "standard_memory/mine/*"):
        (costs,) = preset_folder(preset).glob(f"{study}/costs.csv")
        assert ("quick" if mode[2] else "full") in costs.parts
    return steps.pop() if len(steps) == 1 else -1


VARIANTS = ["stratified_attention", "grid_mean", "local", "standard"]


@effect(
    " ".join(f"Ablations.{field.name}" for field in fields(config.Ablations)),
    {("samplers", ("random", "cooi")): [VARIANTS[0], "random_mean", "cooi_mean", *VARIANTS[2:]],
     ("samplers", ()): [VARIANTS[0], *VARIANTS[2:]],
     ("poolings", ("max", "mean")): [VARIANTS[0], "grid_max", *VARIANTS[1:]],
     ("branches", ("both", "shared")): [*VARIANTS[:2], "shared", "standard"],
     ("crop_counts", (2, 4, 9)): [*VARIANTS[:3], "k_2", "k_9", "standard"],
     ("learning_rates", (0.5, 1.0)): [f"{name}{end}" for name in VARIANTS for end in ("-lr0.5", "")],
     ("standard", False): VARIANTS[:3], ("experiment", "glass_resnet"): VARIANTS},
)  # fmt: skip
def trainings_of_ablations(lab: Lab, changed: tuple[str, object]) -> list[str]:
    grid = config.Ablations("glass_convnext", ("grid",), ("mean",), ("local",), (), (1.0,))
    preset = replace(lab.preset(), ablations=replace(grid, **dict([changed])))
    trials = [(factor, each) for of in variants_of(preset).values() for factor, each in of.items()]
    for factor, each in trials:
        own = next(known for known in preset.experiments if known.name == preset.ablations.experiment)
        assert (
            each.backbone == own.backbone and getattr(each, "lr_local", own.lr_local * factor) == own.lr_local * factor
        )
        shown = re.match(r"([a-z]+)_([a-z]+)", each.name)
        assert not shown or (each.crop_sampler, each.pooling, each.branches) == (*shown.groups(), "both")
    return [each.name for _, each in trials]


@effect(
    "Reproduce.stages Reproduce.experiments",
    {("training", "glass_vit"): ["model_training.glass_vit_training"],
     ("tuning", "standard_vit"): ["hyperparameter_tuning.standard_vit_tuning"],
     ("num_crops", "standard_vit"): []},
)  # fmt: skip
def commands_of_a_reproduction(lab: Lab, value: tuple[str, str]) -> list[str]:
    preset = replace(lab.preset(), reproduce=Reproduce(stages=value[:1], experiments=value[1:]))
    return [command for *_, command in commands_of(preset)]


@effect(
    " ".join(f"GlassExperiment.{name}" for name in ("lr_global", "lr_local", "lr_atten_class", "wd_global", "wd_local"))
    + " StandardExperiment.lr StandardExperiment.weight_decay",
    {"glass": [(0.1, 0.4), (0.2, 0.5), (0.3, 0.0)], "standard": [(0.1, 0.2)]},
)
def rates_and_decays_of_parameter_groups(lab: Lab, family: str) -> list[tuple[float, float]]:
    glass = replace(GLASS, lr_global=0.1, lr_local=0.2, lr_atten_class=0.3, wd_global=0.4, wd_local=0.5)
    experiment = glass if family == "glass" else replace(STANDARD, lr=0.1, weight_decay=0.2)
    groups = parameter_groups(model := build_model(experiment, lab.preset().settings), experiment)
    if family == "glass":
        for group, part in zip(groups, (model.global_model, model.local_model), strict=False):
            assert group["params"] == list(part.parameters())
    return [(group["lr"], group["weight_decay"]) for group in groups]


@effect("GlassExperiment.dropout_rate StandardExperiment.dropout_rate", {0.15: 0.15, 0.45: 0.45})
def dropout_rates(lab: Lab, rate: float) -> float:
    for experiment, count in ((GLASS, 2), (STANDARD, 1)):  # attention and classifier
        model = build_model(replace(experiment, dropout_rate=rate), lab.preset().settings)
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)].count(rate) == count
    return rate


@effect("GlassExperiment.crop_sampler", {"five": [[2, 2], [0, 0], [0, 5], [4, 0], [4, 5]], "grid": [[0, 0]]})
def places_of_crops(lab: Lab, sampler: str) -> list[list[int]]:
    image = SimpleNamespace(height=36, width=37)
    experiment = replace(GLASS, crop_sampler=sampler, num_crops=5)
    boxes = ViewSettings.of(lab.preset().settings, experiment, 0).boxes(image, "key")
    return boxes[: 5 if sampler == "five" else 1, :2].tolist()


@effect("GlassExperiment.pooling", {"attention": "AttentionPool", "max": "MaxPool"})
def kinds_of_pools(lab: Lab, pooling: str) -> str:
    return type(build_model(replace(GLASS, pooling=pooling), lab.preset().settings).attention).__name__


@effect("LogUniform.low LogUniform.high", {(3e-3, 4e-3): True, (5e-3, 6e-3): True})
def suggestions_lie_in_the_search_space(lab: Lab, value: tuple[float, float]) -> bool:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    space = {"lr_local": LogUniform(*value), "num_crops": (5,)}
    found = [suggest_experiment(study.ask(), space, GLASS) for _ in range(5)]
    assert all(each.num_crops == 5 and each.lr_global == GLASS.lr_global for each in found)
    return all(value[0] <= each.lr_local <= value[1] for each in found)


SHOWN_ELSEWHERE = {  # setting -> the tests that show its effect
    "Settings.cache_limit_gb": "test_pixel_cache.py",
    "Settings.data_layout": "test_layouts.py",
    "Settings.tensorboard": "test_tensorboard.py",
    "Tuning.study_storage": "test_workers.py",
    "Tuning.trials": "test_tuning.py",
    "Tuning.epochs": "test_tuning.py",
    "Training.epochs": "test_commands.py",
    "Training.seeds": "test_commands.py",
    "NumCrops.crop_counts": "test_commands.py",
    "Reproduce.demo_data": "test_demo_data.py",
    "Reproduce.demo_images": "test_demo_data.py",
    "Reproduce.closing_words": "test_commands.py",
    "GlassExperiment.branches": "test_samplers.py",
}
OBSERVATIONS = {observe: (setting, expected) for setting, (observe, expected) in reversed(EFFECTS.items())}


@pytest.mark.parametrize("observe", OBSERVATIONS, ids=lambda observe: OBSERVATIONS[observe][0])
def test_every_setting_has_its_effect(observe: Observe, lab: Lab) -> None:
    expected = OBSERVATIONS[observe][1]
    assert {value: observe(lab, value) for value in expected} == expected


def test_the_effect_of_every_setting_is_shown() -> None:
    classes = [
        item
        for item in vars(config).values()
        if inspect.isclass(item) and is_dataclass(item) and item.__module__ == "config"
    ]
    settings = {
        f"{owner.__name__}.{f.name}" for owner in classes if owner not in (Preset, CostSettings) for f in fields(owner)
    }
    missing = settings - EFFECTS.keys() - SHOWN_ELSEWHERE.keys()
    assert not missing, f"no test shows the effect of {missing}: add one to tests/setting_effects.py"
    assert EFFECTS.keys() | SHOWN_ELSEWHERE.keys() == settings and not EFFECTS.keys() & SHOWN_ELSEWHERE.keys()
    for setting, file in SHOWN_ELSEWHERE.items():
        name = setting.partition(".")[2]
        assert re.search(rf"\b{name}|--{name.replace('_', '-')}", (Path(__file__).parent / file).read_text()), setting


def test_the_paper_preset_holds_the_numbers_of_the_method() -> None:
    expected = json.loads((FIXTURES / "paper_preset.json").read_text())
    found = json.loads(json.dumps(asdict(config.PAPER), default=str))
    assert [config.PAPER.tuning.trials_of(standard) for standard in (False, True)] == [100, 50]
    found["experiments"] = {experiment["name"]: experiment for experiment in found["experiments"]}
    for group, values in expected.items():
        assert found[group] | values == found[group], group
    for space in ("glass_space", "standard_space"):  # the sampler's values depend on their order
        assert list(found[space]) == list(expected[space])
