"""Decide whether a tuned model is better than its base."""

from tuneline.gate.config import GateConfig

__all__ = ["GateConfig"]
