"""Merge an adapter into its base model, and prove that the result is what was trained."""

from tuneline.merge.config import MergeConfig

__all__ = ["MergeConfig"]
