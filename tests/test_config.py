"""Every constant in config.py has an effect, shown on the real code, and the paper's are SPEC's."""

import ast
import inspect
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

import optuna
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.models import ResNet50_Weights, resnet50

import config
from config import Experiment, LogUniform, NumCrops, Preset, Reproduce, StandardMemory, Training, Tuning
from data.data_download import download
from data.data_preprocess import preprocess
from data.datasets import load_splits
from data.index import read_index
from data.loaders import build_loader
from data.views import standard_view
from hyperparameter_tuning.search_spaces import suggest_experiment
from hyperparameter_tuning.study import _build_judge, tune
from model_training.reproduce import _doors, reproduce
from model_training.run import train_and_evaluate
from models.build import build_model
from num_crops.sweep import sweep
from standard_memory.profile import profile
from tests.conftest import REPOSITORY, write_toy_images
from training.checkpoints import Checkpoint
from training.loop import Trainer, build_trainer
from training.optimizer import parameter_groups
from training.runtime import Runtime, build_runtime
from utils import (
    UserError,
    find_experiment,
    override,
    parse_command_line,
    preset_folder,
    read_csv,
    read_json,
    run_folder,
)

GLASS, STANDARD = (find_experiment(config.DEMO, name) for name in ("glass_convnext", "standard_convnext"))


@dataclass(frozen=True)
class Lab:
    """What a demonstration works with."""

    toy_preset: Callable[..., Preset]
    indexed: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def preset(self, **settings: object) -> Preset:
        """The toy preset, to look at."""
        return self.toy_preset(**settings)

    def preset_to_run(self, name: str = "results", **groups: object) -> Preset:
        """The toy preset with these groups, in a results root of its own, where it may write."""
        root = self.folder / name
        if not root.exists():
            (root / "demo").mkdir(parents=True)
            shutil.copytree(self.indexed / "demo" / "dataset", root / "demo" / "dataset")
        return replace(self.toy_preset(results_root=root), **groups)


@pytest.fixture
def lab(
    toy_preset: Callable[..., Preset],
    indexed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Lab:
    return Lab(toy_preset, indexed, tmp_path, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def _restored_torch_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    verbosity, threads = optuna.logging.get_verbosity(), torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are far slower with more, where other processes want the cores too
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
    optuna.logging.set_verbosity(verbosity)


# ---------------------------------------------------------------------- the table: constant -> demonstration
DEMONSTRATIONS: dict[str, Callable[[Lab], None]] = {}


def shows(*constants: str) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Enter a demonstration into the table, for these constants."""

    def enter(demonstration: Callable[[Lab], None]) -> Callable[[Lab], None]:
        assert not DEMONSTRATIONS.keys() & set(constants)
        DEMONSTRATIONS.update(dict.fromkeys(constants, demonstration))
        return demonstration

    return enter


def first_batch(preset: Preset, experiment: Experiment = GLASS) -> list[torch.Tensor]:
    index, splits = load_splits(preset)
    return next(iter(build_loader(preset, experiment, index, splits.valid)))


def trainer_of(preset: Preset, epochs: int = 2) -> Trainer:
    torch.manual_seed(0)
    return build_trainer(build_model(STANDARD, preset.settings), STANDARD, preset.settings, epochs)


def steps_of(action: Callable[..., None], *arguments: object) -> int:
    """How many optimizer steps `action(*arguments)` takes."""
    steps: list[None] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    try:
        action(*arguments)
    finally:
        hook.remove()
    return len(steps)


def trials_of(preset: Preset, experiment: Experiment) -> list[optuna.trial.FrozenTrial]:
    tune(preset, experiment)
    file = preset_folder(preset) / "tuning" / experiment.name / "study.db"
    return optuna.load_study(study_name=experiment.name, storage=f"sqlite:///{file}").trials


# ------------------------------------------------------------------------------------------------- Settings
@shows("Settings.data_root", "Settings.results_root")
def the_data_root_is_read_and_the_results_root_written(lab: Lab) -> None:
    write_toy_images(lab.folder / "data", images_per_class=2)
    preset = lab.preset(data_root=lab.folder / "data", results_root=lab.folder / "mine")
    preprocess(preset)
    assert (lab.folder / "mine" / "demo" / "dataset" / "index.csv").exists()
    assert len(read_index(preset).records) == 4 and len(read_index(lab.preset()).records) == 40


@shows("Settings.kaggle_dataset")
def the_kaggle_data_set_is_what_is_asked_for(lab: Lab) -> None:
    for name in ("one", "another"):  # not OWNER/NAME, and so refused before any network is needed
        with pytest.raises(UserError, match=f"kagglehub cannot fetch {name} "):
            download(replace(config.PAPER, settings=replace(config.PAPER.settings, kaggle_dataset=name)))


@shows("Settings.max_image_pixels")
def larger_images_than_max_image_pixels_are_refused(lab: Lab) -> None:
    first_batch(lab.preset())
    with pytest.raises(UserError, match="more than max_image_pixels = 1000"):
        first_batch(lab.preset(max_image_pixels=1000))


@shows(
    "Settings.patch_size", "GlassExperiment.num_crops", "GlassExperiment.batch_size", "StandardExperiment.batch_size"
)
def patch_size_crops_and_batch_size_are_the_shapes_of_a_batch(lab: Lab) -> None:
    for P, K, B in ((32, 4, 3), (48, 2, 5)):
        preset = lab.preset(patch_size=P)
        global_view, crops, labels = first_batch(preset, replace(GLASS, num_crops=K, batch_size=B))
        assert (global_view.shape, crops.shape, len(labels)) == ((B, 3, P, P), (B, K, 3, P, P), B)
        view, _ = first_batch(preset, replace(STANDARD, batch_size=B))
        assert view.shape == (B, 3, P, P)


@shows("Settings.main_seed", "Settings.valid_size", "Settings.test_size", "Settings.final_valid_fraction")
def the_split_follows_its_seed_and_sizes(lab: Lab) -> None:
    def lengths(**settings: object) -> list[int]:
        _, splits = load_splits(lab.preset(**settings))
        return [len(rows) for rows in (splits.train, splits.valid, splits.test, splits.final_train, splits.final_valid)]

    assert lengths() == [28, 6, 6, 31, 3]
    assert lengths(valid_size=10) == [24, 10, 6, 31, 3] and lengths(valid_size=0.25) == lengths(valid_size=10)
    assert lengths(test_size=10) == [24, 6, 10, 27, 3] and lengths(test_size=0.25) == lengths(test_size=10)
    assert lengths(final_valid_fraction=0.5) == [28, 6, 6, 17, 17]
    assert load_splits(lab.preset())[1].test != load_splits(lab.preset(main_seed=607))[1].test


@shows("Settings.data_list")
def only_the_listed_images_are_used(lab: Lab) -> None:
    every, _ = load_splits(lab.preset())
    chosen = [record.path for record in every.records if int(Path(record.path).stem) < 12]
    (lab.folder / "list.csv").write_text("path,remark\n" + "".join(f"{path},\n" for path in reversed(chosen)))
    index, splits = load_splits(lab.preset(data_list=str(lab.folder / "list.csv")))
    assert [record.path for record in index.records] == chosen and len(chosen) == 24
    assert index.fingerprint != every.fingerprint
    assert [len(rows) for rows in (splits.train, splits.valid, splits.test)] == [12, 6, 6]


@shows("Settings.group_by", "Settings.hold_out")
def groups_stay_whole_and_held_out_ones_are_tested(lab: Lab) -> None:
    preset = lab.preset(group_by="stem", hold_out=("000[0-2]",), test_size=4)  # each name is there fake and real
    index, splits = load_splits(preset)
    groups = [{index.groups[row] for row in rows} for rows in (splits.train, splits.valid, splits.test)]
    assert [len(of_split) for of_split in groups] == [12, 3, 5]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert {"0000", "0001", "0002"} <= groups[2] and len(splits.test) == 2 * len(groups[2]) == 10
    assert index.fingerprint != load_splits(lab.preset())[0].fingerprint


@shows("Settings.reencode_jpeg")
def images_are_saved_as_jpeg_before_their_views_are_made(lab: Lab) -> None:
    index, splits = load_splits(lab.preset())
    record = index.records[splits.valid[0]]
    image = Image.open(index.root / record.path).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    expected = torch.tensor(standard_view(Image.open(buffer).convert("RGB"), 32)).permute(2, 0, 1)
    assert torch.equal(first_batch(lab.preset(reencode_jpeg=30), STANDARD)[0][0], expected)
    assert not torch.equal(first_batch(lab.preset(), STANDARD)[0][0], expected)


def resnet_file(path: Path, value: float) -> Path:
    """Weights of ResNet-50, all the same number, in a small file."""
    path.parent.mkdir(parents=True)
    state = resnet50().state_dict()
    number = {dtype: torch.tensor(value, dtype=dtype) for dtype in (torch.float32, torch.int64)}
    torch.save({name: number[tensor.dtype].expand(tensor.shape) for name, tensor in state.items()}, path)
    return path


@shows("Settings.pretrained", "Settings.weights_files", "GlassExperiment.backbone", "StandardExperiment.backbone")
def weights_are_random_or_the_downloads_or_those_of_a_file(lab: Lab) -> None:
    lab.monkeypatch.setenv("TORCH_HOME", str(lab.folder))  # where torchvision finds what it downloaded before
    resnet_file(lab.folder / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name, 2.0)
    file = resnet_file(lab.folder / "mine" / "weights.pth", 3.0)

    def first_weights(**settings: object) -> torch.Tensor:
        network = build_model(replace(STANDARD, backbone="resnet"), lab.preset(**settings).settings)
        return network.conv1.weight

    assert len(first_weights(pretrained=False).unique()) > 1000
    assert first_weights(pretrained=True).unique().tolist() == [2.0]
    assert first_weights(weights_files=(f"resnet={file}",)).unique().tolist() == [3.0]
    both = build_model(replace(GLASS, backbone="resnet"), lab.preset(weights_files=(f"resnet={file}",)).settings)
    assert both.global_model.conv1.weight.unique().tolist() == both.local_model.conv1.weight.unique().tolist() == [3.0]


@shows("Settings.label_smoothing")
def label_smoothing_changes_the_loss_of_a_step(lab: Lab) -> None:
    view, labels = first_batch(lab.preset(), STANDARD)
    losses = [trainer_of(lab.preset(label_smoothing=s)).train_step([view], labels).item() for s in (0.1, 0.1, 0.4)]
    assert losses[0] == losses[1] != losses[2]


@shows("Settings.eta_min")
def the_last_learning_rate_is_eta_min(lab: Lab) -> None:
    for eta_min in (1e-6, 1e-7):
        trainer = trainer_of(lab.preset(eta_min=eta_min), epochs=2)
        trainer.optimizer.step()
        for _ in range(2):
            trainer.scheduler.step()
        assert trainer.scheduler.get_last_lr() == pytest.approx([eta_min])


@shows("Settings.device")
def the_device_is_the_one_that_was_asked_for(lab: Lab) -> None:
    assert build_runtime(lab.preset(device="cpu").settings).device.type == "cpu"
    assert (build_runtime(lab.preset(device="auto").settings).device.type == "cuda") == torch.cuda.is_available()
    with pytest.raises(UserError, match="device is cuda:99"):
        build_runtime(lab.preset(device="cuda:99").settings)


@shows("Settings.precision")
def precision_is_that_of_the_forward_pass_but_on_the_cpu(lab: Lab) -> None:
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        runtime = build_runtime(lab.preset(precision=name).settings)
        assert runtime.precision == "fp32"  # which is all that can be asked of a CPU; CUDA's part is below
        with replace(runtime, precision=name).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@shows("Settings.compile")
def compile_compiles_but_on_the_cpu(lab: Lab) -> None:
    for chosen in (True, False):
        trainer = trainer_of(lab.preset(compile=chosen))
        assert trainer.compiled_model is trainer.model  # as above
        compiled = replace(trainer.runtime, compile=chosen).compiled(trainer.model)
        assert (compiled is not trainer.model) == chosen


@shows("Settings.channels_last")
def channels_last_is_the_layout_of_weights(lab: Lab) -> None:
    for chosen in (True, False):
        weights = [p for p in trainer_of(lab.preset(channels_last=chosen)).model.parameters() if p.ndim == 4]
        channels_last = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
        assert all(channels_last) == chosen


@shows("Settings.deterministic", "Settings.matmul_precision")
def torchs_switches_are_set(lab: Lab) -> None:
    for deterministic, precision in ((True, "high"), (False, "highest"), (True, "medium")):
        build_runtime(lab.preset(deterministic=deterministic, matmul_precision=precision).settings)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert torch.get_float32_matmul_precision() == precision


@shows("Settings.checkpoint_every")
def the_state_is_saved_after_so_many_steps_and_after_each_epoch(lab: Lab) -> None:
    saves: list[int] = []
    save = Checkpoint.save
    lab.monkeypatch.setattr(Checkpoint, "save", lambda *arguments: saves.append(1) or save(*arguments))
    for every, expected in ((0, 2), (2, 2 + 2 * 4), (7, 2 + 2)):  # two epochs of eight steps
        saves.clear()
        preset = lab.preset_to_run(f"every {every}", training=Training(epochs=2, seeds=(1,)))
        preset = replace(preset, settings=replace(preset.settings, checkpoint_every=every))
        train_and_evaluate(preset, replace(STANDARD, batch_size=4))
        assert len(saves) == expected


@shows("Settings.num_workers")
def the_loader_has_the_number_of_workers(lab: Lab) -> None:
    for workers in (0, 1, 2):
        preset = lab.preset(num_workers=workers)
        index, splits = load_splits(preset)
        assert build_loader(preset, replace(GLASS, batch_size=2), index, splits.train).num_workers == workers


@shows("Settings.use_cache", "Settings.cache_root")
def a_cache_is_used_where_it_lies_unless_that_is_forbidden(lab: Lab) -> None:
    write_toy_images(lab.folder / "data", images_per_class=10)
    settings = {"data_root": lab.folder / "data", "results_root": lab.folder / "mine", "cache_root": lab.folder / "c"}
    preprocess(lab.preset(**settings), "pixels")
    decoded = first_batch(lab.preset(**settings | {"use_cache": False}))
    for path in (lab.folder / "data").rglob("*.*"):  # not images any more, though nobody could tell from outside
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for given, expected in zip(first_batch(lab.preset(**settings)), decoded, strict=True):
        assert torch.equal(given, expected)
    for other in ({"use_cache": False}, {"cache_root": lab.folder / "elsewhere"}):
        with pytest.raises(UserError, match="is not what it was"):
            first_batch(lab.preset(**settings | other))


@shows("Settings.cache_limit_gb")
def a_cache_does_not_grow_beyond_its_limit(lab: Lab) -> None:
    settings = {"results_root": lab.folder / "mine", "cache_root": lab.folder / "cache"}
    with pytest.raises(UserError, match="more than cache_limit_gb = 1e-05"):
        preprocess(lab.preset(**settings, cache_limit_gb=1e-5), "views")
    preprocess(lab.preset(**settings, cache_limit_gb=1.0), "views")


@shows("Settings.exact_resize")
def the_global_view_is_resized_in_float32_on_demand(lab: Lab) -> None:
    rounded, crops, labels = first_batch(lab.preset())
    exact, same_crops, same_labels = first_batch(lab.preset(exact_resize=True))
    assert (rounded.dtype, exact.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(crops, same_crops) and torch.equal(labels, same_labels)
    assert 0 < (rounded - exact).abs().max() < 1.001


# ------------------------------------------------------------------------------------- one class a room
@shows("Tuning.glass_trials", "Tuning.standard_trials", "Preset.tuning")
def a_study_runs_the_trials_of_its_kind_of_model(lab: Lab) -> None:
    for wanted in (1, 2):
        tuning = Tuning(epochs=1, glass_trials=wanted, standard_trials=3 - wanted, min_resource=1, max_resource=1)
        preset = lab.preset_to_run(f"{wanted}", tuning=tuning)
        assert len(trials_of(preset, GLASS)) == wanted and len(trials_of(preset, STANDARD)) == 3 - wanted


@shows("Tuning.epochs")
def a_trial_reports_each_of_its_epochs(lab: Lab) -> None:
    for epochs in (1, 2):
        tuning = Tuning(epochs=epochs, standard_trials=1)
        (trial,) = trials_of(lab.preset_to_run(f"{epochs}", tuning=tuning), STANDARD)
        assert sorted(trial.intermediate_values) == list(range(epochs))


@shows("Tuning.min_resource", "Tuning.max_resource", "Tuning.reduction_factor")
def hyperband_prunes_by_its_resources_and_factor(lab: Lab) -> None:
    def pruned_at(**tuning: int) -> set[int]:
        """The steps, counted from 0, at which ever worse trials are pruned."""
        preset = replace(lab.preset(), tuning=replace(Tuning(), **tuning))
        judge, steps = _build_judge(preset, STANDARD), set()
        for number in range(20):
            trial = judge.ask()
            for step in range(25):
                trial.report(-number, step)
                if trial.should_prune():
                    steps.add(step)
                    break
            judge.tell(trial, -number)
        return steps

    assert pruned_at() == {5, 15}
    assert pruned_at(min_resource=2) == {2, 6, 18}
    assert pruned_at(max_resource=14) == {5}
    assert pruned_at(reduction_factor=2) == {5, 10, 20}


@shows("Training.epochs", "Preset.training")
def a_history_has_a_line_an_epoch(lab: Lab) -> None:
    for epochs in (1, 2):
        preset = lab.preset_to_run(f"{epochs}", training=Training(epochs=epochs, seeds=(3,)))
        train_and_evaluate(preset, STANDARD)
        assert len(read_csv(run_folder(preset, STANDARD.name, 3) / "history.csv")) == epochs


@shows("Training.band_error")
def the_band_of_inconclusive_probabilities_follows_the_error_allowed_in_it(lab: Lab) -> None:
    widths = []
    for error in (0.0, 0.4):
        training = Training(epochs=1, seeds=(3,), band_error=error)
        preset = lab.preset_to_run(f"{error}", training=training)
        preset = replace(preset, settings=replace(preset.settings, final_valid_fraction=0.5))
        train_and_evaluate(preset, STANDARD)
        calibration = read_json(run_folder(preset, STANDARD.name, 3) / "metrics.json")["calibration"]
        assert calibration["band_error"] == error
        widths.append(calibration["fake_from"] - calibration["real_below"])
    assert widths[0] > widths[1] >= 0


@shows("Training.seeds", "GlassExperiment.name")
def a_run_folder_is_an_experiments_name_and_a_seed(lab: Lab) -> None:
    preset = lab.preset_to_run(training=Training(epochs=1, seeds=(3, 4)))
    train_and_evaluate(preset, replace(GLASS, name="renamed"))
    finished = preset_folder(preset).glob("renamed/*/metrics.json")
    assert sorted(file.parent.name for file in finished) == ["seed_3", "seed_4"]


def steps_by_mode(run: Callable[..., None], experiment: Experiment, make: Callable[..., Preset]) -> None:
    """Steps of a cost study that measures once, on 28 images."""
    assert steps_of(run, make(epochs=1, batch_size=14), experiment) == 2
    assert steps_of(run, make(epochs=2, batch_size=14), experiment) == 4
    assert steps_of(run, make(epochs=1, batch_size=7), experiment) == 4
    quick = dict(epochs=9, batch_size=4, quick=True)
    assert steps_of(run, make(**quick, warmup_steps=1, measured_steps=2), experiment) == 3
    assert steps_of(run, make(**quick, warmup_steps=3, measured_steps=2), experiment) == 5
    assert steps_of(run, make(**quick, warmup_steps=1, measured_steps=3), experiment) == 4


@shows(
    *(f"NumCrops.{name}" for name in ("epochs", "batch_size", "quick", "warmup_steps", "measured_steps")),
    "Preset.num_crops",
)
def the_sweep_takes_the_steps_of_its_mode(lab: Lab) -> None:
    def make(**study: object) -> Preset:
        return lab.preset_to_run(f"{study}", num_crops=NumCrops(crop_counts=(1,), **study))

    steps_by_mode(sweep, GLASS, make)


@shows("NumCrops.crop_counts")
def the_sweep_measures_each_crop_count(lab: Lab) -> None:
    for counts in ((2,), (1, 2, 3)):
        study = NumCrops(crop_counts=counts, batch_size=4, quick=True, warmup_steps=0, measured_steps=1)
        preset = lab.preset_to_run(num_crops=study)
        sweep(preset, GLASS)
        rows = read_csv(preset_folder(preset) / "num_crops" / GLASS.name / "quick" / "costs.csv")
        assert [int(row["num_crops"]) for row in rows] == list(counts)


@shows(
    *(f"StandardMemory.{field.name}" for field in fields(StandardMemory)),
    *("Preset.standard_memory", "StandardExperiment.name"),
)
def the_profile_takes_the_steps_of_its_mode(lab: Lab) -> None:
    def make(**study: object) -> Preset:
        return lab.preset_to_run(f"{study}", standard_memory=StandardMemory(**study))

    steps_by_mode(profile, replace(STANDARD, name="renamed"), make)
    assert len([*lab.folder.glob("*/demo/standard_memory/renamed/full/costs.csv")]) == 3
    assert len([*lab.folder.glob("*/demo/standard_memory/renamed/quick/costs.csv")]) == 3


@shows("Reproduce.stages", "Reproduce.experiments", "Preset.reproduce")
def stages_and_experiments_are_the_doors(lab: Lab) -> None:
    def doors(stages: tuple[str, ...], experiments: tuple[str, ...]) -> list[str]:
        preset = replace(lab.preset(), reproduce=Reproduce(stages=stages, experiments=experiments))
        return [door for _, door in _doors(preset)]

    assert doors(("training",), ("glass_vit",)) == ["model_training.glass_vit_training"]
    assert doors(("tuning",), ("glass_vit",)) == ["hyperparameter_tuning.glass_vit_tuning"]
    assert doors(("training",), ("standard_vit",)) == ["model_training.standard_vit_training"]
    assert len(_doors(config.PAPER)) == 18


@shows("Reproduce.demo_data")
def demo_data_are_written_first(lab: Lab) -> None:
    lab.monkeypatch.chdir(REPOSITORY)
    lab.folder.joinpath("file").touch()  # no folder can be made in it, so that the first door fails
    settings = lab.preset(data_root=lab.folder / "file" / "data", results_root=lab.folder).settings
    for demo_data, first in ((True, "data.data_download"), (False, "data.data_preprocess")):
        preset = replace(config.DEMO, settings=settings, reproduce=Reproduce(demo_data=demo_data))
        with pytest.raises(UserError, match=f"python -m {first} ended with exit code"):
            reproduce(preset, all_doors=False)


@shows("Reproduce.closing_words")
def the_closing_words_come_last(lab: Lab) -> None:
    for words in ("Farewell.", "Good night."):
        reproduce(replace(lab.preset(), reproduce=Reproduce(stages=(), closing_words=words)), all_doors=False)
        assert lab.capsys.readouterr().out.endswith(f"\n{words}\n")


# ---------------------------------------------------------------------------------------------- experiments
@shows(
    *(f"GlassExperiment.{name}" for name in ("lr_global", "lr_local", "lr_atten_class", "wd_global", "wd_local")),
    *("StandardExperiment.lr", "StandardExperiment.weight_decay"),
)
def rates_and_decays_reach_the_optimizer(lab: Lab) -> None:
    def groups(experiment: Experiment) -> list[tuple[float, float]]:
        model = build_model(experiment, lab.preset().settings)
        return [(group["lr"], group["weight_decay"]) for group in parameter_groups(model, experiment)]

    glass = replace(GLASS, lr_global=0.1, lr_local=0.2, lr_atten_class=0.3, wd_global=0.4, wd_local=0.5)
    assert groups(glass) == [(0.1, 0.4), (0.2, 0.5), (0.3, 0.0)]
    assert groups(replace(STANDARD, lr=0.1, weight_decay=0.2)) == [(0.1, 0.2)]


@shows("GlassExperiment.dropout_rate", "StandardExperiment.dropout_rate")
def the_dropout_rate_reaches_the_model(lab: Lab) -> None:
    for experiment in (GLASS, STANDARD):
        for rate in (0.15, 0.45):
            model = build_model(replace(experiment, dropout_rate=rate), lab.preset().settings)
            assert rate in [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


@shows("LogUniform.low", "LogUniform.high", "Preset.glass_space", "Preset.standard_space")
def suggestions_come_from_the_search_space(lab: Lab) -> None:
    spaces = ({"lr_local": LogUniform(3e-3, 4e-3), "num_crops": (5,)}, {"lr": LogUniform(5e-3, 6e-3)})
    preset = replace(lab.preset(), glass_space=spaces[0], standard_space=spaces[1])
    for seed in range(5):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        glass = suggest_experiment(study.ask(), preset, GLASS)
        standard = suggest_experiment(study.ask(), preset, STANDARD)
        assert 3e-3 <= glass.lr_local <= 4e-3 and glass.num_crops == 5 and glass.lr_global == GLASS.lr_global
        assert 5e-3 <= standard.lr <= 6e-3 and standard.batch_size == STANDARD.batch_size


# -------------------------------------------------------------------------------------------------- presets
@shows("Preset.name")
def a_presets_name_is_its_folder_and_its_flag(lab: Lab) -> None:
    for name, preset in config.PRESETS.items():
        assert preset_folder(preset).name == name
        assert parse_command_line("", argv=["--preset", name])[0] == preset


@shows("Preset.settings", "Preset.experiments")
def a_door_gets_the_presets_settings_and_its_experiment(lab: Lab) -> None:
    for name, preset in config.PRESETS.items():
        resolved, (experiment,), _ = parse_command_line("", experiments=["glass_resnet"], argv=["--preset", name])
        assert resolved.settings == preset.settings and experiment == find_experiment(preset, "glass_resnet")
    assert override(config.DEMO, {"patch_size": 32}, (), ()).settings.patch_size == 32


# --------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize(
    "demonstration", dict.fromkeys(DEMONSTRATIONS.values()), ids=lambda demonstration: demonstration.__name__
)
def test_every_constant_has_an_effect(demonstration: Callable[[Lab], None], lab: Lab) -> None:
    demonstration(lab)


def test_the_demonstrations_are_of_every_constant_and_of_nothing_else() -> None:
    classes = [item for item in vars(config).values() if inspect.isclass(item) and is_dataclass(item)]
    assert DEMONSTRATIONS.keys() == {f"{owner.__name__}.{field.name}" for owner in classes for field in fields(owner)}


def test_every_name_of_the_module_is_used() -> None:
    tree = ast.parse((REPOSITORY / "config.py").read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names = {target.id for target in targets if target.id.isupper()}
    read_here = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    sources = (path for path in REPOSITORY.glob("[!.]*/*.py") if path.parent.name != "tests")
    elsewhere = [ast.walk(ast.parse(path.read_text())) for path in (*sources, REPOSITORY / "utils.py")]
    read_elsewhere = {
        node.attr
        for nodes in elsewhere
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    assert {"PAPER", "PRESETS"} <= names and names <= read_here | read_elsewhere


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_precision_compile_and_matmul_precision_act_on_cuda() -> None:
    def runtime(**settings: object) -> Runtime:
        return build_runtime(replace(config.DEMO.settings, device="cuda", **settings))

    numbers = torch.randn(256, 256, device="cuda")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        chosen = runtime(precision=name)
        with chosen.autocast():
            assert (numbers @ numbers).dtype == dtype
        assert chosen.grad_scaler().is_enabled() == (name == "fp16")
    for chosen in (True, False):
        model = runtime().place(nn.Linear(256, 2))
        forward = runtime(compile=chosen).compiled(model)
        assert next(model.parameters()).is_cuda and (forward is not model) == chosen
        torch.testing.assert_close(forward(numbers), model(numbers), rtol=1e-2, atol=1e-2)  # TF32
    products = []
    for precision in ("highest", "high"):
        runtime(matmul_precision=precision)
        products.append(numbers @ numbers)
    assert not torch.equal(*products)  # high is TF32


def test_the_paper_preset_holds_the_numbers_of_the_specification() -> None:
    paper = config.PAPER
    assert asdict(paper.settings) | {
        "kaggle_dataset": "tristanzhang32/ai-generated-images-vs-real-images",
        "max_image_pixels": 200_000_000,
        "patch_size": 224,
        "main_seed": 606,
        "valid_size": 1800,
        "test_size": 1800,
        "final_valid_fraction": 0.05,
        "data_list": "",
        "group_by": "none",
        "hold_out": (),
        "reencode_jpeg": 0,
        "pretrained": True,
        "weights_files": (),
        "label_smoothing": 0.1,
        "eta_min": 1e-6,
        "precision": "fp16",
        "compile": True,
        "deterministic": True,
        "matmul_precision": "high",
    } == asdict(paper.settings)
    assert asdict(paper.tuning) == {
        "epochs": 25,
        "glass_trials": 100,
        "standard_trials": 50,
        "min_resource": 5,
        "max_resource": 25,
        "reduction_factor": 3,
    }
    assert asdict(paper.training) == {"epochs": 50, "seeds": (100, 200, 300, 400, 500), "band_error": 0.05}
    crop_counts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
    study = paper.num_crops
    assert (study.epochs, study.batch_size, study.crop_counts, study.quick) == (25, 32, crop_counts, False)
    study = paper.standard_memory
    assert (study.epochs, study.batch_size, study.quick) == (25, 32, False)
    assert len(_doors(paper)) == 6 + 6 + 3 + 3


def test_the_tuned_values_are_those_of_the_specification() -> None:
    glass = {  # batch, dropout, lr_global, lr_local, lr_atten_class, wd_global, wd_local, crops
        "vit": (
            *(64, 0.3, 1.5831167386006587e-05, 4.260040963378685e-05, 6.480235653979963e-05),
            *(3.1761532137124536e-05, 6.13778525618186e-06, 10),
        ),
        "convnext": (
            *(32, 0.2, 6.549128272517001e-06, 9.999570997037118e-05, 1.679984935907822e-05),
            *(2.852588208730554e-06, 3.8782167347490953e-07, 4),
        ),
        "resnet": (
            *(32, 0.3, 2.158777650700252e-06, 6.853800121248665e-05, 2.979509550261194e-05),
            *(1.7932951228672164e-07, 6.017513558414679e-07, 6),
        ),
    }
    standard = {  # batch, dropout, lr, weight_decay
        "vit": (128, 0.1, 7.480854951931871e-05, 0.0004369279810718895),
        "convnext": (128, 0.1, 7.124161487066723e-05, 2.1340317671998637e-06),
        "resnet": (32, 0.1, 4.59049376073978e-05, 3.642553424460737e-07),
    }
    expected = [config.GlassExperiment(f"glass_{name}", name, *values) for name, values in glass.items()]
    expected += [config.StandardExperiment(f"standard_{name}", name, *values) for name, values in standard.items()]
    assert config.PAPER.experiments == tuple(expected)


def test_the_search_spaces_are_those_of_the_specification() -> None:
    rates, decays = LogUniform(1e-6, 1e-4), LogUniform(1e-7, 1e-3)
    assert config.PAPER.glass_space == {
        "batch_size": (16, 32, 64),
        "dropout_rate": (0, 0.1, 0.2, 0.3),
        "lr_global": rates,
        "lr_local": rates,
        "lr_atten_class": LogUniform(5e-6, 1e-3),
        "wd_global": decays,
        "wd_local": decays,
        "num_crops": (2, 4, 6, 8, 10),
    }
    assert config.PAPER.standard_space == {
        "lr": rates,
        "weight_decay": decays,
        "batch_size": (32, 64, 128),
        "dropout_rate": (0, 0.1, 0.2, 0.3),
    }
