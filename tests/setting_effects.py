"""The effects of config.Settings, shown on the real code; those of complete commands are in test_config.py."""

import io
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

import config
from config import Experiment, Preset, Training, Tuning
from data.data_preprocess import preprocess
from data.datasets import load_splits
from data.index import read_index
from data.loaders import ImageLoader, build_loader
from hyperparameter_tuning.trials import fit_trial
from hyperparameter_tuning.workers import Worker
from model_training.run import train_and_evaluate
from models.build import build_model
from models.checkpointing import blocks_of
from tests.conftest import MakePreset, copy_index, run_module, toy_job, write_toy_images
from training.checkpoints import save_model
from training.loop import Job
from training.runs import seed_folder
from training.runtime import build_runtime
from training.trainer import Trainer, build_trainer
from utils import UserError, find_experiment

GLASS, STANDARD = (find_experiment(config.DEMO, name) for name in ("glass_convnext", "standard_convnext"))


@dataclass(frozen=True)
class Lab:
    preset: MakePreset  # the toy preset with these settings, to look at
    indexed: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def running(self, **groups: object) -> Preset:
        """The toy preset with these groups, in a results root of its own."""
        root = self.folder / str(len(list(self.folder.iterdir())))
        return replace(self.preset(results_root=copy_index(self.indexed, root)), **groups)


Observe = Callable[[Lab, Any], object]
EFFECTS: dict[str, tuple[Observe, Mapping[Hashable, object]]] = {}


def effect(settings: str, expected: Mapping[Hashable, object]) -> Callable[[Observe], Observe]:
    """Register a function (lab, value) -> what can be observed, with the expected observation for each value."""

    def enter(observe: Observe) -> Observe:
        EFFECTS.update(dict.fromkeys(settings.split(), (observe, expected)))
        return observe

    return enter


def refusal(action: Callable[[], object]) -> str:
    """The sentence of its UserError; "" without one."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def loader_of(preset: Preset, experiment: Experiment = GLASS) -> ImageLoader:
    index, splits = load_splits(preset)
    return build_loader(preset.settings, experiment, index, splits.valid)


def batch(preset: Preset, experiment: Experiment = GLASS) -> list[torch.Tensor]:
    return next(iter(loader_of(preset, experiment)))


def trainer_of(preset: Preset, epochs: int = 2) -> Trainer:
    torch.manual_seed(0)
    settings = preset.settings
    return build_trainer(build_model(STANDARD, settings), STANDARD, settings, build_runtime(settings), epochs)


def split_sizes(preset: Preset) -> list[int]:
    splits = load_splits(preset)[1]
    return [len(rows) for rows in (splits.train, splits.valid, splits.test, splits.final_train, splits.final_valid)]


@effect("Settings.data_root Settings.results_root", {2: 4, 3: 6})
def images_below_the_data_root(lab: Lab, images: int) -> int:
    write_toy_images(lab.folder / str(images), images_per_class=images)
    preset = lab.preset(data_root=lab.folder / str(images), results_root=lab.folder / f"results {images}")
    preprocess(preset)
    assert (lab.folder / f"results {images}" / "demo" / "dataset" / "index.csv").exists()
    return len(read_index(preset).records)


effect("Settings.kaggle_dataset", {"one": True, "another": True})(  # not OWNER/NAME: refused before any network
    lambda lab, name: f" {name} " in run_module("data.data_download", "--kaggle-dataset", name).stderr
)
effect("Settings.max_image_pixels", {20_000: False, 1000: True})(
    lambda lab, n: f"more than max_image_pixels = {n}" in refusal(lambda: batch(lab.preset(max_image_pixels=n)))
)
effect(
    "Settings.valid_size Settings.test_size Settings.final_valid_fraction",
    {("valid_size", 6): [28, 6, 6, 31, 3], ("valid_size", 10): [24, 10, 6, 31, 3],
     ("valid_size", 0.2): [26, 8, 6, 31, 3], ("test_size", 10): [24, 6, 10, 27, 3],
     ("test_size", 0.2): [26, 6, 8, 29, 3], ("final_valid_fraction", 0.5): [28, 6, 6, 17, 17]},
)(lambda lab, changed: split_sizes(lab.preset(**dict([changed]))))  # fmt: skip
effect("Settings.main_seed", {606: True, 607: False})(  # whether the test images are those of seed 606
    lambda lab, seed: load_splits(lab.preset(main_seed=seed))[1].test == load_splits(lab.preset())[1].test
)


@effect("Tuning.heartbeat_seconds", {1: "timeout=11s", 60: "timeout=70s"})
def time_after_which_the_server_ends_a_sleeping_workers_lock(lab: Lab, seconds: int) -> str:
    pytest.importorskip("psycopg")
    tuning = Tuning(study_storage="postgresql+psycopg://me@host/database", heartbeat_seconds=seconds)
    worker = Worker(None, STANDARD, {}, tuning, fit_trial, lab.folder, {}, "demo/standard_convnext")
    return worker.connect_args["options"][-11:]


@effect("Training.initial_weights", {True: True, False: False})
def a_training_without_a_learning_rate_ends_where_it_starts(lab: Lab, given: bool) -> bool:
    start = build_model(STANDARD, lab.preset().settings)
    save_model(file := lab.folder / "start.safetensors", start.state_dict(), {})
    preset = lab.running(training=Training(epochs=1, seeds=(3,), initial_weights=str(file) if given else ""))
    train_and_evaluate(preset, replace(STANDARD, lr=0.0))
    ended = load_file(seed_folder(preset, STANDARD.name, 3) / "model.safetensors")
    return all(torch.equal(tensor, ended[name]) for name, tensor in start.state_dict().items())


effect("Settings.num_workers", {0: 0, 1: 1, 2: 2})(
    lambda lab, workers: loader_of(lab.preset(num_workers=workers), replace(GLASS, batch_size=2)).num_workers
)
effect("Settings.device", {"cuda:99": True, "abacus": True, "meta": True, "cpu": False})(
    lambda lab, name: f"device is {name}" in refusal(lambda: build_runtime(lab.preset(device=name).settings))
)


@effect(
    "Settings.patch_size GlassExperiment.num_crops GlassExperiment.batch_size StandardExperiment.batch_size",
    {(32, 4, 3): [(3, 3, 32, 32), (3, 4, 3, 32, 32), (3,), (3, 3, 32, 32)],
     (48, 2, 5): [(5, 3, 48, 48), (5, 2, 3, 48, 48), (5,), (5, 3, 48, 48)]},
)  # fmt: skip
def shapes(lab: Lab, sizes: tuple[int, int, int]) -> list[tuple[int, ...]]:
    P, K, B = sizes
    glass = batch(lab.preset(patch_size=P), replace(GLASS, num_crops=K, batch_size=B))
    return [tuple(part.shape) for part in (*glass, batch(lab.preset(patch_size=P), replace(STANDARD, batch_size=B))[0])]


@effect("Settings.data_list", {12: [12, 6, 6], 15: [18, 6, 6]})
def sizes_by_list(lab: Lab, per_class: int) -> list[int]:
    every, _ = load_splits(lab.preset())
    chosen = [record.path for record in every.records if int(Path(record.path).stem) < per_class]
    (lab.folder / "list.csv").write_text("path,remark\n" + "".join(f"{path},\n" for path in reversed(chosen)))
    preset = lab.preset(data_list=str(lab.folder / "list.csv"))
    index, _ = load_splits(preset)
    assert [record.path for record in index.records] == chosen and index.fingerprint != every.fingerprint
    return split_sizes(preset)[:3]


@effect("Settings.group_by Settings.hold_out", {("000[0-2]",): 10, ("000[0-4]",): 14})
def images_tested_with_held_out_groups(lab: Lab, patterns: tuple[str, ...]) -> int:
    preset = lab.preset(group_by="stem", hold_out=patterns, test_size=4)  # each name is there fake and real
    index, splits = load_splits(preset)
    groups = [{index.groups[row] for row in rows} for rows in (splits.train, splits.valid, splits.test)]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2] and "0002" in groups[2]
    return len(splits.test)


@effect("Settings.reencode_jpeg", {0: False, 30: True})
def the_first_image_was_saved_with_quality_30(lab: Lab, quality: int) -> bool:
    index, splits = load_splits(lab.preset())
    buffer = io.BytesIO()
    Image.open(index.root / index.records[splits.valid[0]].path).convert("RGB").save(buffer, "JPEG", quality=30)
    view = Image.open(buffer).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    return torch.equal(batch(lab.preset(reencode_jpeg=quality), STANDARD)[0][0], expected)


effect("Settings.exact_resize", {False: torch.uint8, True: torch.float32})(
    lambda lab, exact: batch(lab.preset(exact_resize=exact))[0].dtype
)


@effect(
    "Settings.use_cache Settings.cache_root", {(True, "c"): ["pixels", "views"], (False, "c"): [], (True, "other"): []}
)
def what_comes_from_the_cache(lab: Lab, value: tuple[bool, str]) -> list[str]:
    preprocess(lab.preset(results_root=lab.folder / "results", cache_root=lab.folder / "c"), ("pixels",))
    return load_splits(lab.preset(use_cache=value[0], cache_root=lab.folder / value[1]))[0].cached


def resnet_file(path: Path, value: float) -> Path:
    """Weights of ResNet-50, all the same number, in a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = resnet50().state_dict()
    number = {dtype: torch.tensor(value, dtype=dtype) for dtype in (torch.float32, torch.int64)}
    torch.save({name: number[tensor.dtype].expand(tensor.shape) for name, tensor in state.items()}, path)
    return path


@effect(
    "Settings.pretrained Settings.weights_files GlassExperiment.backbone StandardExperiment.backbone",
    {(True, ()): 2.0, (True, ("resnet=FILE",)): 3.0, (False, ()): None},
)
def the_value_of_all_first_weights(lab: Lab, value: tuple[bool, tuple[str, ...]]) -> float | None:
    lab.monkeypatch.setenv("TORCH_HOME", str(lab.folder))  # where torchvision finds what it downloaded before
    resnet_file(lab.folder / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name, 2.0)
    file = resnet_file(lab.folder / "mine" / "weights.pth", 3.0)
    files = tuple(item.replace("FILE", str(file)) for item in value[1])
    settings = lab.preset(pretrained=value[0], weights_files=files).settings
    glass = build_model(replace(GLASS, backbone="resnet"), settings)
    networks = (glass.global_model, glass.local_model, build_model(replace(STANDARD, backbone="resnet"), settings))
    values = {number for network in networks for number in network.conv1.weight.flatten()[:99].tolist()}
    return values.pop() if len(values) == 1 else None


@effect("Settings.label_smoothing", {0.1: 0.1, 0.4: 0.4})
def label_smoothing_of_the_training_loss(lab: Lab, smoothing: float) -> float:
    view, labels = batch(lab.preset(), STANDARD)
    trainer = trainer_of(lab.preset(label_smoothing=smoothing))
    trainer.model.eval()
    logits = trainer.model(*trainer.runtime.to_device(trainer.model, [view])).detach()
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return smoothing if trainer.train_step([view], labels).item() == pytest.approx(expected.item()) else -1


@effect("Settings.eta_min", {1e-6: 1e-6, 1e-7: 1e-7})
def the_last_learning_rate(lab: Lab, eta_min: float) -> float:
    trainer = trainer_of(lab.preset(eta_min=eta_min), epochs=2)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.scheduler.step()
    return round(trainer.scheduler.get_last_lr()[0], 12)


@effect("Settings.precision", {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32})
def dtype_of_a_forward_pass(lab: Lab, precision: str) -> torch.dtype:
    runtime = build_runtime(lab.preset(precision=precision).settings)
    assert runtime.precision == "fp32"  # always so on a CPU; CUDA's part is in test_gpu.py
    with replace(runtime, precision=precision).autocast():
        return nn.Linear(2, 2)(torch.ones(1, 2)).dtype


@effect("Settings.compile", {True: True, False: False})
def the_model_is_compiled(lab: Lab, chosen: bool) -> bool:
    trainer = trainer_of(lab.preset(compile=chosen))
    assert trainer.compiled_model is trainer.parallel_model  # as above
    return replace(trainer.runtime, compile=chosen).compiled(trainer.model) is not trainer.model


@effect("Settings.compile_blocks", {False: 0, True: 1})
def blocks_that_are_compiled(lab: Lab, chosen: bool) -> int:
    trainer = trainer_of(lab.preset(compile_blocks=chosen))
    whole = replace(trainer.runtime, compile=True).compiled(trainer.model)
    compiled = [module for module in trainer.model.modules() if type(module).__name__.startswith("Compiled")]
    assert (whole is trainer.model) == chosen and len(compiled) == len([*blocks_of(trainer.model)]) * chosen
    return bool(compiled)


def layouts(job: Job) -> set[str]:
    """The memory layouts of what a ResNet's convolutions give for a batch as it is loaded."""
    outputs: list[torch.Tensor] = []
    for module in job.trainer.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    *views, labels = next(iter(job.train_loader))
    job.trainer.train_step(views, labels)
    telling = [output for output in outputs if output.shape[-1] > 1]  # others are both
    return {"contiguous" if output.is_contiguous() else "channels_last" for output in telling}


@effect("Settings.channels_last", {"on": {"channels_last"}, "off": {"contiguous"}, "auto": {"channels_last"}})
def layout_of_activations(lab: Lab, chosen: str) -> set[str]:
    of_glass = layouts(toy_job(lab.preset(channels_last=chosen), "glass_resnet"))
    return layouts(toy_job(lab.preset(channels_last=chosen, exact_resize=True))) | of_glass


@effect("Settings.activation_checkpointing", {"off": 1, "on": 2, "auto": 1})
def passes_of_a_block_in_a_step(lab: Lab, chosen: str) -> int:
    job, passes = toy_job(lab.preset(activation_checkpointing=chosen), "glass_resnet"), []
    job.trainer.model.local_model.layer1[0].conv1.register_forward_hook(lambda *_: passes.append(1))
    *views, labels = next(iter(job.train_loader))
    job.trainer.train_step(views, labels)
    return len(passes)


@effect(
    "Settings.author_runtime",
    {True: (True, False, True, {"contiguous"}), False: (False, True, False, {"channels_last"})},
)
def runtime_of_the_author(lab: Lab, chosen: bool) -> tuple[bool, bool, bool, set[str]]:
    preset = lab.preset(author_runtime=chosen, channels_last="on", num_workers=1)
    job = toy_job(preset)
    foreach, persistent = job.trainer.optimizer.defaults["foreach"], job.train_loader.persistent_workers
    return foreach, persistent, job.trainer.runtime.compile_all, layouts(job)


@effect(
    "Settings.deterministic Settings.matmul_precision",
    {(True, "high"): (True, False, "high"), (False, "highest"): (False, True, "highest")},
)
def torchs_switches(lab: Lab, value: tuple[bool, str]) -> tuple[bool, bool, str]:
    with build_runtime(lab.preset(deterministic=value[0], matmul_precision=value[1]).settings).switched():
        switches = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        return *switches, torch.get_float32_matmul_precision()
