"""Run as `python -m tuneline.report --config RECIPE_JSON --base-model DIR ... --page FILE`."""

from tuneline.artifacts import RunHeader
from tuneline.report.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("report", RunHeader, run)
