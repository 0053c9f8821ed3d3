"""Fetch a base model: from the Hub, a directory, a GGUF file or an installed package."""

from tuneline.fetch.config import FetchConfig

__all__ = ["FetchConfig"]
