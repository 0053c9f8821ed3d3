"""Run as `python -m tuneline.prepare --source ... --base-model DIR --dataset DIR ...`."""

from tuneline.prepare import PrepareConfig
from tuneline.runtime.step import main
from tuneline.runtime.torch_free import hide_torch

if __name__ == "__main__":
    hide_torch()  # Before the next import, which imports transformers.
    from tuneline.prepare.run import run

    main("prepare", PrepareConfig, run)
