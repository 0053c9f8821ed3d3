"""Run as `python -m tuneline.prepare --source ... --base-model DIR --dataset DIR ...`."""

from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("prepare", PrepareConfig, run)
