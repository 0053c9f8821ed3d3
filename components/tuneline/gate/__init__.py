"""Decide whether a tuned model is better than its base model."""

from tuneline.gate.config import GateConfig

__all__ = ["GateConfig"]
