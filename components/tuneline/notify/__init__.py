"""Tell people and programs how a run ended: the `notify` section of a recipe."""

from tuneline.notify.config import NotifyConfig

__all__ = ["NotifyConfig"]
