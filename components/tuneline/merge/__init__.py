"""Merge an adapter into its base, and prove that the result is what was trained.

Importing this loads neither kfp nor torch: a recipe is checked on machines that have neither, so
heavy imports stand inside the functions that need them.
"""

from tuneline.merge.config import MergeConfig
from tuneline.merge.run import run

__all__ = ["MergeConfig", "run"]
