"""Which part of GLASS does the work? Variants of one GLASS experiment, trained alike: one table, one figure.

    python -m model_training.ablations [--preset own] [--samplers random grid] [--poolings mean max] [--branches local]

The variants are crop samplers x poolings, then branches and numbers of crops with the paper's sampler and pooling, and
the standard model of the same backbone; the paper's setting is always among them. Each is trained with each factor of
--learning-rates on the first seed; the one with the best validation accuracy (then the lowest validation loss) is used
for the other seeds. Test metrics are not used to choose anything. A training that diverges or does not fit in memory
does not stop the others. Run again, also with another grid, the command trains only what is not finished.

Hardware: as final training, for (factors + seeds - 1) trainings a variant: docs/ablations.md.
Output: results/<preset>/ablations/<experiment>/: a folder <variant>/seed_<seed>/ for each training, and
ablations.csv, .md, .tex and .png, written after each variant.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

from config import Ablations, Experiment, GlassExperiment, Preset, StandardExperiment
from data.views import ViewSettings
from model_training.run import hash_of_start, train_seed
from model_training.tables.ablation_table import Variant, table_of_ablations
from model_training.tables.experiment_tables import missing_seeds
from model_training.tables.figures import plot_ablations
from model_training.tables.read_results import Run, is_finished, read_run
from model_training.tables.table import Table
from training import processes
from training.evaluation import NonFiniteLoss
from training.progress import best_epoch, duration
from training.runs import SETTINGS, RestartOption, Session, archive, open_session, seed_folder
from training.runtime import OutOfMemory
from utils import UserError, checked, find_experiment, preset_folder, run_command

Variants = Mapping[str, Mapping[float, Experiment]]  # name -> factor of its learning rates -> what is trained


def ablate(preset: Preset, restart: bool = False) -> None:
    """Train every variant of the preset, and write the table and the figure of those that are finished.

    Args:
        restart: archive the started runs of these variants, and start over.

    Raises:
        UserError: an impossible grid, whatever `train_and_evaluate` refuses, or, at the end, variants that failed.
        Stopped: a signal asked for it.
    """
    variants = variants_of(preset)
    with open_session(preset) as session:
        grid = _Grid(session, preset, variants, hash_of_start(preset.training))
        if restart:
            every = product(variants.values(), preset.training.seeds)
            archive(preset, [grid.folder(trial, seed) for trials, seed in every for trial in trials.values()])
        grid.train()
        print(processes.on_main(grid.write).markdown())
        if grid.failed:
            raise UserError(f"{len(grid.failed)} trainings failed: {'; '.join(grid.failed.values())}")


def variants_of(preset: Preset) -> Variants:
    """All variants, the paper's first.

    Raises:
        UserError: there is no such experiment, or one that cannot be trained.
    """
    grid = preset.ablations
    glass = find_experiment(preset, grid.experiment)
    if not isinstance(glass, GlassExperiment):
        raise UserError(f"{glass.name} is no GLASS model, so it has no parts to vary: choose another --experiment")
    paper = replace(glass, crop_sampler="stratified", pooling="attention", branches="both")
    found: dict[str, Experiment] = {"stratified_attention": paper}
    for sampler, pooling in product(grid.samplers, grid.poolings):
        found[f"{sampler}_{pooling}"] = replace(paper, crop_sampler=sampler, pooling=pooling)
    found |= {name: replace(paper, branches=name) for name in grid.branches if name != "both"}
    found |= {f"k_{count}": replace(paper, num_crops=count) for count in grid.crop_counts if count != paper.num_crops}
    if grid.standard:
        known = [each for each in preset.experiments if isinstance(each, StandardExperiment)]
        standard = [each for each in known if each.backbone == glass.backbone]
        if not standard:
            raise UserError(f"config.py has no standard experiment of {glass.backbone}: add it, or pass --no-standard")
        found["standard"] = standard[0]
    for each in found.values():
        ViewSettings.of(preset.settings, each, 0)  # refuses crops that cannot be drawn
    return {name: {f: _scale_rates(each, name, f) for f in grid.learning_rates} for name, each in found.items()}


def _scale_rates(experiment: Experiment, name: str, factor: float) -> Experiment:
    rates = {f.name: factor * getattr(experiment, f.name) for f in fields(experiment) if f.name.startswith("lr")}
    return checked(replace(experiment, name=name if factor == 1 else f"{name}-lr{factor:g}", **rates))


@dataclass
class _Grid:
    """All trainings of the command; finished ones are read from their folders."""

    session: Session
    preset: Preset
    variants: Variants
    start: dict[str, str]
    failed: dict[Path, str] = field(default_factory=dict)  # folder -> the reason

    def folder(self, experiment: Experiment, seed: int) -> Path:
        """The run folder of one training."""
        return seed_folder(self.preset, f"ablations/{self.preset.ablations.experiment}/{experiment.name}", seed)

    def train(self) -> None:
        """Do all unfinished trainings, variant by variant; the table is written after each."""
        first, *others = self.preset.training.seeds
        unfinished = processes.on_main(lambda: [name for name in self.variants if self.variant(name).missing])
        begin, trained = time.monotonic(), 0
        for number, (name, trials) in enumerate(self.variants.items(), 1):
            seconds = (time.monotonic() - begin) / max(1, trained) * (len(unfinished) - trained)
            left = f", about {duration(seconds)} left" if trained else ""
            print(f"[{number}/{len(self.variants)}] {name}{left}", flush=True)
            for trial in trials.values():
                self._train_seed(trial, first)
            chosen = processes.on_main(lambda name=name: self.variant(name).factor)
            for seed in others if chosen is not None else ():
                self._train_seed(trials[chosen], seed)
            if name in unfinished:
                trained += 1
                processes.on_main(self.write)

    def _train_seed(self, experiment: Experiment, seed: int) -> None:
        folder = self.folder(experiment, seed)
        try:
            with processes.errors_shared():
                train_seed(self.session, self.preset.training, experiment, seed, folder, self.start)
        except (NonFiniteLoss, OutOfMemory) as error:  # with other hyperparameters it may work
            self.failed[folder] = f"{experiment.name} seed {seed} failed: {error}"
            print(self.failed[folder], flush=True)

    def variant(self, name: str) -> Variant:
        """A variant with its finished runs."""
        trials, seeds = self.variants[name], self.preset.training.seeds
        tried = {factor: run for factor, trial in trials.items() if (run := self._read_finished(trial, seeds[0]))}
        wanted = [factor for factor, trial in trials.items() if self.folder(trial, seeds[0]) not in self.failed]
        factor, runs = None, []
        if wanted and tried.keys() == set(wanted):
            factor = max(tried, key=lambda each: _rank(tried[each]))  # the first of equals
            runs = [run for seed in seeds if (run := self._read_finished(trials[factor], seed))]
        missing = [f"learning rates x {each:g} not tried" for each in trials if each not in tried and each in wanted]
        experiment = next(iter(trials.values()))
        return Variant(name, experiment, factor, runs, missing or missing_seeds(runs, seeds))

    def _read_finished(self, experiment: Experiment, seed: int) -> Run | None:
        folder = self.folder(experiment, seed)
        return read_run(folder, seed) if is_finished(folder) else None

    def write(self) -> Table:
        """Write the table and the figure of all finished runs; returns the table."""
        splits = self.session.splits
        folder = preset_folder(self.preset) / "ablations" / self.preset.ablations.experiment
        variants, title = list(map(self.variant, self.variants)), f"Variants of {self.preset.ablations.experiment}"
        table = table_of_ablations(title, variants, self.session.index, splits.test, list(self.failed.values()))
        table.write(folder)
        plot_ablations(folder / "ablations.png", table.title, table.rows)
        return table


def _rank(run: Run) -> tuple[float, float]:
    """By which the learning rates are chosen, the higher the better."""
    best = best_epoch(run.history)
    return best.valid_accuracy, -best.valid_loss


if __name__ == "__main__":
    settings = [*SETTINGS, *(each.name for each in fields(Ablations))]
    run_command(__doc__, ablate, groups=("training", "ablations"), settings=settings, options=RestartOption)
