"""Trial -> experiment. docs/method.md, Experiments 1."""

from dataclasses import replace

import optuna

from config import Experiment, GlassExperiment, LogUniform, Preset, SearchSpace


def search_space(preset: Preset, experiment: Experiment) -> SearchSpace:
    """The preset's search space for GLASS or for standard models, as the experiment is."""
    return preset.glass_space if isinstance(experiment, GlassExperiment) else preset.standard_space


def suggest_experiment(trial: optuna.Trial, space: SearchSpace, experiment: Experiment) -> Experiment:
    """The experiment with the hyperparameters that the trial suggests, in the order of the search space."""
    values = {
        name: trial.suggest_float(name, choices.low, choices.high, log=True)
        if isinstance(choices, LogUniform)
        else trial.suggest_categorical(name, choices)
        for name, choices in space.items()
    }
    return replace(experiment, **values)
