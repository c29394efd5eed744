"""Experiment 2: final training and evaluation, the tables, and the complete reproduction."""
