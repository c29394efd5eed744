"""What only a CUDA device can show: `pytest -m gpu`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import config
from config import Preset
from data.datasets import load_splits
from data.loaders import build_loader
from models.build import build_model
from standard_memory.profile import profile
from tests.conftest import MakePreset, toy_job
from training.copies import Copies
from training.loop import fit
from training.progress import EpochRecord
from training.runtime import CUDA_MEMORY, OutOfMemory, Runtime, build_runtime
from training.trainer import Trainer
from utils import find_experiment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAMES = [experiment.name for experiment in config.DEMO.experiments]


def train(preset: Preset, name: str, epochs: int = 2, **changes: object) -> tuple[Trainer, list[EpochRecord]]:
    job = toy_job(preset, name, epochs, **changes)
    with job.trainer.runtime.switched():
        return job.trainer, fit(job)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_pinned_memory_and_on_the_device_unchanged(workers: int, toy_preset: MakePreset) -> None:
    preset = toy_preset(device="cuda", num_workers=workers)
    index, splits = load_splits(preset)
    loader = build_loader(preset.settings, find_experiment(preset, "glass_resnet"), index, splits.test)
    model = build_model(find_experiment(preset, "glass_resnet"), preset.settings)
    runtime = build_runtime(preset.settings)
    runtime.place(model)
    expected = loader.dataset.__getitems__([(position, None) for position in loader.batch_sampler.order()])
    batches = list(loader)
    assert all(part.is_pinned() for batch in batches for part in batch)
    for given, wanted in zip(zip(*batches, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(given), wanted)
    for *views, _ in batches:
        for view, on_device in zip(views, runtime.to_device(model, views), strict=True):
            normalised = (view.float() / 255 - model.input_mean.cpu()) / model.input_std.cpu()
            torch.testing.assert_close(on_device.cpu(), normalised, rtol=0, atol=1e-6)


def test_batches_that_are_copied_during_a_computation_arrive_complete() -> None:
    to_device, sums = Copies(torch.device("cuda")), []
    batches = [torch.randint(0, 256, (2**24,), dtype=torch.uint8).pin_memory() for _ in range(12)]
    busy = torch.randn(4096, 4096, device="cuda")
    for batch in batches:
        (given,) = to_device([batch])
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(given.long().sum())
        del given
    assert [int(each) for each in sums] == [int(batch.long().sum()) for batch in batches]


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in NAMES), ("glass_vit", True)])
def test_same_seed_gives_the_same_bits_on_cuda(name: str, compiled: bool, toy_preset: MakePreset) -> None:
    runs = [train(toy_preset(device="cuda", compile=compiled), name) for _ in range(2)]
    records = [[(r.train_loss, r.valid_loss, r.valid_accuracy) for r in history] for _, history in runs]
    assert records[0] == records[1]
    states = [trainer.model.state_dict() for trainer, _ in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("name", "precision", "compiled", "tolerance"),
    [
        *((name, "fp32", False, 5e-3) for name in NAMES),
        *((name, "fp16", False, 3e-2) for name in NAMES),
        ("glass_resnet", "bf16", False, 6e-2),
        ("glass_resnet", "fp32", True, 5e-3),
    ],
)
def test_losses_agree_with_fp32_on_the_cpu(
    name: str, precision: str, compiled: bool, tolerance: float, toy_preset: MakePreset
) -> None:
    _, expected = train(toy_preset(device="cpu"), name, epochs=1, dropout_rate=0.0)
    preset = toy_preset(device="cuda", precision=precision, compile=compiled)
    _, history = train(preset, name, epochs=1, dropout_rate=0.0)
    assert history[0].train_loss == pytest.approx(expected[0].train_loss, rel=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_changes_no_loss(compiled: bool, toy_preset: MakePreset) -> None:
    off, on = (
        train(toy_preset(device="cuda", compile=compiled, activation_checkpointing=chosen), "glass_resnet", epochs=1)
        for chosen in ("off", "on")
    )
    assert on[1][0].train_loss == pytest.approx(off[1][0].train_loss, rel=1e-3 if compiled else 1e-5)
    assert on[1][0].valid_loss == pytest.approx(off[1][0].valid_loss, rel=1e-2 if compiled else 1e-4)


def test_convolutional_weights_are_channels_last_and_others_are_not(toy_preset: MakePreset) -> None:
    for backbone, expected in (("timm:resnet10t", True), ("timm:test_vit", False)):
        trainer, _ = train(toy_preset(device="cuda", compile=False), "glass_vit", epochs=1, backbone=backbone)
        weights = [p for p in trainer.model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1 and p.shape[2] > 1]
        assert any(p.is_contiguous(memory_format=torch.channels_last) for p in weights) == expected


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(precision: str, toy_preset: MakePreset) -> None:
    job = toy_job(toy_preset(device="cuda", compile=False, precision=precision))
    steps, weight = [], next(iter(job.trainer.model.parameters()))
    weight.register_hook(lambda gradient: steps.append(weight.detach().clone()) or gradient / (len(steps) != 3))
    assert [record.skipped_steps for record in fit(job)] == [1, 0] and torch.equal(steps[2], steps[3])


@pytest.mark.parametrize("author", [False, True])
def test_a_cost_study_compiles_before_its_epochs_and_as_the_author_every_forward_pass(
    author: bool, toy_preset: MakePreset, results: Path
) -> None:
    preset = toy_preset(device="cuda", author_runtime=author, results_root=results)
    stats, graphs = torch._dynamo.utils.counters["stats"], []
    stats.clear()
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: graphs.append((stats["unique_graphs"], optimizer)))
    try:
        profile(preset, find_experiment(preset, "standard_resnet"))
    finally:
        hook.remove()
    assert len(graphs) == 2 + 4  # batches of 8 and 4, then the epoch
    assert stats["unique_graphs"] == graphs[2][0] >= (3 if author else 1)  # none since the epoch's first step
    assert graphs[0][1].defaults["foreach"] == author and graphs[0][1].defaults["fused"] != author


def test_memory_is_the_allocators_peak(toy_preset: MakePreset) -> None:
    trainer, history = train(toy_preset(device="cuda", compile=False), "glass_resnet", epochs=1)
    assert trainer.runtime.memory_kind == CUDA_MEMORY
    assert history[0].peak_memory_mb == pytest.approx(torch.cuda.max_memory_allocated() / 2**20)


def test_an_out_of_memory_error_names_the_batch(toy_preset: MakePreset) -> None:
    job = toy_job(toy_preset(device="cuda", compile=False), "glass_resnet", num_crops=16)
    torch.cuda.empty_cache()
    placed = torch.cuda.memory_reserved() + 2**21  # and nothing that a step needs
    torch.cuda.set_per_process_memory_fraction(placed / torch.cuda.get_device_properties().total_memory)
    try:
        with pytest.raises(OutOfMemory, match=r"8x3x32x32 and 8x16x3x32x32 .* in fp16: lower --batch-size"):
            fit(job)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_precision_compile_and_matmul_precision_act_on_cuda() -> None:
    def runtime(**settings: object) -> Runtime:
        return build_runtime(replace(config.DEMO.settings, device="cuda", **settings))

    numbers = torch.randn(256, 256, device="cuda")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        chosen = runtime(precision=name)
        with chosen.autocast():
            assert (numbers @ numbers).dtype == dtype
        assert chosen.grad_scaler().get_scale() == (65536 if name == "fp16" else 1)
    for chosen in (True, False):
        model = runtime().place(nn.Linear(256, 2))
        forward = runtime(compile=chosen).compiled(model)
        assert next(model.parameters()).is_cuda and (forward is not model) == chosen
        torch.testing.assert_close(forward(numbers), model(numbers), rtol=1e-2, atol=1e-2)  # TF32
    products = []
    for precision in ("highest", "high"):
        with runtime(matmul_precision=precision).switched():
            products.append(numbers @ numbers)
    assert not torch.equal(*products)  # high is TF32
