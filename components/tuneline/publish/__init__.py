"""Publish the adapter, the merged model and the exports, each as one commit."""

from tuneline.publish.config import PublishConfig

__all__ = ["PublishConfig"]
