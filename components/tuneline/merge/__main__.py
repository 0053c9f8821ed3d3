"""Run the step as `python -m tuneline.merge --base-model DIR --adapter DIR ...`."""

from tuneline.merge import MergeConfig
from tuneline.merge.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("merge", MergeConfig, run)
