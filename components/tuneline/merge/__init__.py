"""Merge an adapter into its base model, and prove that the merged model predicts as trained."""

from tuneline.merge.config import MergeConfig

__all__ = ["MergeConfig"]
