"""Decide whether a tuned model is better than its base."""

from tuneline.gate.config import GateConfig
from tuneline.gate.run import run

__all__ = ["GateConfig", "run"]
