"""Certified robustness by randomized smoothing: train, certify, predict and compare smoothed classifiers."""

__version__ = "0.1.0"
