"""`python -m tuneline.train --base-model DIR --dataset DIR --adapter DIR --curves FILE`."""

from tuneline.runtime.step import main
from tuneline.train import TrainConfig
from tuneline.train.run import run

if __name__ == "__main__":
    main("train", TrainConfig, run)
