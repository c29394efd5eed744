"""Experiment 3: cost and accuracy of GLASS against the number of crops."""
