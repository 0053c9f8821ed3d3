"""Publish the adapter, the merged model and the exports to every target of a recipe."""

from tuneline.publish.config import PublishConfig

__all__ = ["PublishConfig"]
