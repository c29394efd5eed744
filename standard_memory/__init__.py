"""Experiment 4: cost and accuracy of the standard models."""
