"""Messages to webhooks when a run has ended: the `notify` section of a recipe."""

from tuneline.notify.config import NotifyConfig

__all__ = ["NotifyConfig"]
