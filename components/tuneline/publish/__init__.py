"""Publish the adapter, the merged model and the exports, each as one commit."""

from tuneline.publish.config import PublishConfig
from tuneline.publish.run import run

__all__ = ["PublishConfig", "run"]
