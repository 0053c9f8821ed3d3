"""Metrics, progress, answers and the page of a training run."""
