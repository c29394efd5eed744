"""Trial -> experiment. SPEC, Experiments 1."""

from dataclasses import replace

import optuna

from config import Experiment, GlassExperiment, LogUniform, Preset


def suggest_experiment(trial: optuna.Trial, preset: Preset, experiment: Experiment) -> Experiment:
    """The experiment with a trial's suggestions, in the order of the preset's search space, for its hyperparameters."""
    space = preset.glass_space if isinstance(experiment, GlassExperiment) else preset.standard_space
    values = {
        name: trial.suggest_float(name, choices.low, choices.high, log=True)
        if isinstance(choices, LogUniform)
        else trial.suggest_categorical(name, choices)
        for name, choices in space.items()
    }
    return replace(experiment, **values)
