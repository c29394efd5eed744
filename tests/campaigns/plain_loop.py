"""The training of docs/method.md written down plainly beside the project's, on the same batches, in float64.

    python -m tests.campaigns.plain_loop [--images 12] [--epochs 3]    the paper's six models, at its image size

Prints the largest relative difference of a loss and of a weight; exit code 1 if one is above 1e-7 or 1e-12.
"""

import argparse
import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import config
from config import Experiment, GlassExperiment, Preset
from data.datasets import ImageDataset, load_splits
from tests.conftest import succeed, write_toy_images
from training.loop import fit
from training.runs import Session, build_job, seed_everything
from training.runtime import build_runtime
from training.stopping import StopRequest

SEED = 100


@dataclass(frozen=True)
class Difference:
    """Relative differences between the two loops, and the losses that were compared.

    weight: norm of the difference over norm, of all weights and statistics together; not one by one, since Adam makes
    steps of rounding noise for a bias whose true gradient is zero, as before batch normalisation.
    """

    loss: float  # the largest
    weight: float
    losses: list[tuple[float, float]]  # training and validation, an epoch each


def compare(preset: Preset, experiment: Experiment, epochs: int) -> Difference:
    """Train the experiment's model both ways, from the same weights."""
    index, splits = load_splits(preset)
    session = Session(preset.settings, index, splits, build_runtime(preset.settings), StopRequest())
    job = build_job(session, experiment, SEED, epochs, (splits.train, splits.valid), experiment.name)
    model = copy.deepcopy(job.trainer.model.double())
    seed_everything(SEED)  # dropout and stochastic depth draw from torch's own generator
    ours = [(record.train_loss, record.valid_loss) for record in fit(job)]
    images, state = (job.train_loader.dataset, job.valid_loader.dataset), job.trainer.model.state_dict()
    del job  # two ViT-B/16 in float64 with their moments are 6 GB
    seed_everything(SEED)
    plain = plainly(model, experiment, preset, images, epochs)
    loss = max(abs(a - b) / b for pairs in zip(ours, plain, strict=True) for a, b in zip(*pairs, strict=True))
    states = [{k: v for k, v in m.items() if v.is_floating_point()} for m in (state, model.state_dict())]
    a, b = (torch.cat([v.flatten() for v in s.values()]) for s in states)
    weight = ((a - b).norm() / b.norm()).item()
    return Difference(loss, weight, ours)


def plainly(
    model: nn.Module, experiment: Experiment, preset: Preset, images: tuple[ImageDataset, ImageDataset], epochs: int
) -> list[tuple[float, float]]:
    """The equations of docs/method.md, in order; returns training and validation loss of each epoch."""
    glass, smoothing, eta_min = isinstance(experiment, GlassExperiment), preset.settings.label_smoothing, 1e-6
    groups = [(list(model.parameters()), getattr(experiment, "lr", 0), getattr(experiment, "weight_decay", 0))]
    if glass:
        groups = [
            (list(model.global_model.parameters()), experiment.lr_global, experiment.wd_global),
            (list(model.local_model.parameters()), experiment.lr_local, experiment.wd_local),
            ([*model.attention.parameters(), *model.classifier.parameters()], experiment.lr_atten_class, 0),
        ]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for parameters, _, _ in groups for p in parameters}

    def logits_of(views: Sequence[torch.Tensor]) -> torch.Tensor:
        views = [(view.float() / 255 - model.input_mean) / model.input_std for view in views]
        if not glass:
            return model(*views)
        whole, crops = views
        h_global, h = model.global_model(whole), model.local_model(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        hidden = F.dropout(torch.tanh(model.attention[0](h)), experiment.dropout_rate, model.training)
        a = torch.exp(model.attention[3](hidden))
        local = (a * h).sum(1) / a.sum(1)
        both = F.dropout(model.classifier[0](torch.cat([h_global, local], 1)), experiment.dropout_rate, model.training)
        return both @ model.classifier[2].weight.T + model.classifier[2].bias

    train, valid = images
    shuffled = DataLoader(
        range(len(train)), experiment.batch_size, shuffle=True, generator=torch.Generator().manual_seed(SEED)
    )
    losses, step = [], 0
    for epoch in range(epochs):
        model.train()
        total, annealed = 0.0, (1 + math.cos(math.pi * epoch / epochs)) / 2
        for positions in shuffled:
            *views, labels = train.__getitems__([(position, epoch) for position in positions.tolist()])
            log_p = torch.log_softmax(logits_of(views), 1)
            wanted = log_p[torch.arange(len(labels)), labels]
            loss = -((1 - smoothing) * wanted + smoothing * log_p.mean(1)).mean()
            model.zero_grad()
            loss.backward()
            step += 1
            with torch.no_grad():
                for parameters, lr, decay in groups:
                    rate = eta_min + (lr - eta_min) * annealed
                    for p in parameters:
                        m, v = moments[p]
                        p -= rate * decay * p
                        m += 0.1 * (p.grad - m)
                        v += 0.001 * (p.grad**2 - v)
                        p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            total += loss.item() * len(labels)
        model.eval()
        with torch.no_grad():
            *views, labels = valid.__getitems__([(position, None) for position in range(len(valid))])
            valid_loss = F.nll_loss(torch.log_softmax(logits_of(views), 1), labels).item()
        losses.append((total / len(train), valid_loss))
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12, help="of each class")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    worst = Difference(0.0, 0.0, [])
    with tempfile.TemporaryDirectory() as scratch:
        data, results = Path(scratch, "data"), Path(scratch, "results")
        write_toy_images(data, arguments.images)
        succeed("data.data_preprocess", "--num-workers", "0", "--data-root", data, "--results-root", results)
        settings = replace(
            config.PAPER.settings, data_root=data, results_root=results, pretrained=False, num_workers=0, device="cpu",
            valid_size=4, test_size=4, final_valid_fraction=0.1,
        )  # fmt: skip
        preset = replace(config.PAPER, settings=settings)
        for experiment in preset.experiments:
            smaller = {"batch_size": 6} | ({"num_crops": 2} if isinstance(experiment, GlassExperiment) else {})
            found = compare(preset, replace(experiment, **smaller), arguments.epochs)
            print(
                f"{experiment.name}: losses {found.losses}, loss {found.loss:.1e}, weight {found.weight:.1e}",
                flush=True,
            )
            worst = Difference(max(worst.loss, found.loss), max(worst.weight, found.weight), [])
    return int(worst.loss > 1e-7 or worst.weight > 1e-12)


if __name__ == "__main__":
    raise SystemExit(main())
