"""Measure a model on benchmarks with lm-eval, and keep every sample's score.

Importing this loads neither kfp nor torch: a recipe is checked on machines that have neither, so
heavy imports stand inside the functions that need them.
"""

from tuneline.evaluate.config import EvaluateConfig
from tuneline.evaluate.run import run

__all__ = ["EvaluateConfig", "run"]
