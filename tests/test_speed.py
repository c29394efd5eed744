"""Optimisations of a training step change no number."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torchvision.models import get_model

from models.attention import SelfAttention, pack_self_attention
from models.checkpointing import blocks_of
from tests.conftest import MakePreset, toy_job
from training.evaluation import evaluate
from training.loop import Job, check_smallest_batch
from utils import UserError


def test_packed_attention_is_that_of_torchvision() -> None:
    plain = get_model("vit_b_16", weights=None, image_size=32)
    torch.nn.init.normal_(plain.heads.head.weight)  # zeros, as torchvision makes it
    packed = copy.deepcopy(plain)
    pack_self_attention(packed)
    assert sum(isinstance(module, SelfAttention) for module in packed.modules()) == 12
    views, found = torch.randn(3, 3, 32, 32), []
    for network in (plain, packed):
        outputs = network.train()(views)
        outputs.square().mean().backward()
        found.append((outputs, {name: each.grad for name, each in network.named_parameters()}, network.eval()(views)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="torch.compile needs a C compiler")
@pytest.mark.parametrize(  # torch 2.11 compiles the complete glass_resnet wrongly on the CPU
    ("name", "chosen"),
    [("glass_vit", {}), ("glass_vit", {"compile_blocks": True}), ("glass_resnet", {"compile_blocks": True})],
)
def test_compiled_steps_and_evaluation_are_those_of_the_uncompiled_model(
    name: str, chosen: dict[str, bool], toy_preset: MakePreset
) -> None:
    found = []
    for compiled in (False, True):
        job = toy_job(toy_preset(), name, backbone=f"timm:test_{name[6:]}", num_crops=2, dropout_rate=0.0)
        trainer = job.trainer
        trainer = replace(trainer, runtime=replace(trainer.runtime, compile=compiled, **chosen))
        torch.compiler.reset()
        trainer.model.train()
        losses = [trainer.train_step(views, labels) for *views, labels in job.train_loader]  # the last one is smaller
        scores = evaluate(trainer.valid_model, job.valid_loader, trainer.runtime).scores
        gradients = {parameter: each.grad for parameter, each in trainer.model.named_parameters()}
        found.append((losses, gradients, torch.from_numpy(scores)))
        blocks = [*blocks_of(trainer.model)]
        kinds = {type(block).__name__ for block in blocks}
        assert kinds and all(kind.startswith("Compiled") == (compiled and bool(chosen)) for kind in kinds)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)


def compiled_in_blocks(toy_preset: MakePreset, **changes: object) -> Job:
    """A training of the toy glass_resnet as on CUDA with --compile-blocks; nothing is compiled yet."""
    job = toy_job(toy_preset(), "glass_resnet", **changes)
    trainer = job.trainer
    runtime = replace(trainer.runtime, compile=True, compile_blocks=True)
    return replace(job, trainer=replace(trainer, runtime=runtime))


def test_compiling_blocks_of_a_network_without_any_is_refused_and_errors_stay_sentences(toy_preset: MakePreset) -> None:
    with pytest.raises(UserError, match="has no repeated blocks, which compile_blocks is for: set compile_blocks off"):
        compiled_in_blocks(toy_preset, backbone="timm:vgg11")
    with pytest.raises(UserError, match="batch of one image, which batch normalisation does not take here"):
        check_smallest_batch(compiled_in_blocks(toy_preset, batch_size=9))  # 27 + 1 images


def test_blocks_that_take_a_list_can_be_compiled(toy_preset: MakePreset) -> None:
    job = compiled_in_blocks(toy_preset, backbone="timm:selecsls42", num_crops=1, batch_size=2)
    *views, labels = next(iter(job.train_loader))
    with torch.compiler.set_stance("force_eager"):
        assert job.trainer.train_step(views, labels).isfinite()
