"""Measure a model on benchmarks with lm-eval, and store the score of every sample."""

from tuneline.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig"]
