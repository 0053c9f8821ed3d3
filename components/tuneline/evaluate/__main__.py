"""Run the step as `python -m tuneline.evaluate --label base --model DIR ...`."""

from tuneline.evaluate import EvaluateConfig
from tuneline.evaluate.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("evaluate", EvaluateConfig, run)
