"""Prepare a dataset: rows in any known format become token IDs with a loss mask."""

from tuneline.prepare.config import HeldoutConfig, PrepareConfig

__all__ = ["HeldoutConfig", "PrepareConfig"]
