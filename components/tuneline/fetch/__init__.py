"""Fetch a base model: from the Hub, a directory, a GGUF file or an installed package.

Importing this loads neither kfp nor torch: a recipe is checked on machines that have neither, so
heavy imports stand inside the functions that need them.
"""

from tuneline.fetch.config import FetchConfig
from tuneline.fetch.fingerprint import fingerprint
from tuneline.fetch.run import run

__all__ = ["FetchConfig", "run", "fingerprint"]
