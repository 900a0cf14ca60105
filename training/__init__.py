"""Trainer: `train.py`, `evaluate.py` and the modules that they use."""
