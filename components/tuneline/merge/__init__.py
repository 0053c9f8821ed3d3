"""Merge an adapter into its base model, and prove that the result predicts as trained."""

from tuneline.merge.config import MergeConfig

__all__ = ["MergeConfig"]
