"""Run as `python -m tuneline.fetch --source ... --base-model DIR`."""

from tuneline.fetch import FetchConfig
from tuneline.fetch.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("fetch", FetchConfig, run)
