"""Experiment 1: one Optuna study per model."""
