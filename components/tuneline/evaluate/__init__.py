"""Measure a model on benchmarks with lm-eval, and keep every sample's score."""

from tuneline.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig"]
