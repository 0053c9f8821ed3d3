"""Publish the adapter, the merged model and the exports, with one commit per repository."""

from tuneline.publish.config import PublishConfig

__all__ = ["PublishConfig"]
