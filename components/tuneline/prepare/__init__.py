"""Prepare a data set: rows in any known format become token ids with a loss mask.

Importing this loads neither kfp nor torch: a recipe is checked on machines that have neither, so
heavy imports stand inside the functions that need them.
"""

from tuneline.prepare.config import HeldoutConfig, PrepareConfig
from tuneline.prepare.fingerprint import fingerprint
from tuneline.prepare.run import run

__all__ = ["HeldoutConfig", "PrepareConfig", "run", "fingerprint"]
