"""Loop, evaluation, metrics and checkpoints of all six models."""
