"""One pod of a TrainJob: `python -m tuneline.train.trainjob.pod`; see `nodes` for what it goes by.

The first pod runs the train step. The others start ranks when it announces an attempt, and end
with it. A pod that fails ends the job: ranks wait for each other, so none can go on alone.
"""

import logging
import sys
import time

from tuneline.errors import RecipeError, TunelineError
from tuneline.runtime.step import step
from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.board import (
    ADAPTER_DIR,
    BASE_MODEL_DIR,
    CONFIG_FILE,
    CURVES_FILE,
    DATASET_DIR,
    DIRECTORY_VARIABLE,
    Nodes,
    Verdict,
)
from tuneline.train.run import run

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.2


def lead(nodes: Nodes) -> None:
    """Run the train step on the first node, and leave its verdict to the others."""
    board = nodes.board
    directory = board.directory
    for attempt in board.attempts():
        # Of this pod before it was started again: its ranks are gone.
        attempt.end()
    try:
        run(
            TrainConfig.parse((directory / CONFIG_FILE).read_text(encoding="utf-8")),
            base_model_dir=directory / BASE_MODEL_DIR,
            dataset_dir=directory / DATASET_DIR,
            adapter_dir=directory / ADAPTER_DIR,
            curves_path=directory / CURVES_FILE,
        )
    except TunelineError as error:
        board.conclude(Verdict(type(error).__name__, str(error)))
        raise
    except Exception as error:
        board.conclude(Verdict("TrainingError", f"{type(error).__name__}: {error}"))
        raise
    board.conclude(Verdict(""))


def follow(nodes: Nodes) -> int:
    """Take part in every attempt that the first node announces; return this pod's exit code."""
    from tuneline.train.ranks.launch import take_part

    done = {attempt.path for attempt in nodes.board.attempts() if attempt.is_over}
    with stop_on_sigterm() as stop:
        while not stop.is_made:
            verdict = nodes.board.verdict()
            if verdict is not None:
                logger.info("the first node is through: %s", verdict.kind or "well")
                return 1 if verdict.kind else 0
            fresh = [found for found in nodes.board.attempts() if found.path not in done]
            for attempt in fresh:
                done.add(attempt.path)
                take_part(attempt, nodes, stop)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return 143


def main() -> None:
    """Be the node that the environment says."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    nodes = None
    with step("train"):
        nodes = Nodes.from_environment()
        if nodes is None:
            raise RecipeError(f"{DIRECTORY_VARIABLE} is not set: a TrainJob of tuneline sets it")
        logger.info("node %d of %d, %d ranks each", nodes.number, nodes.count, nodes.ranks_each)
        if nodes.number == 0:
            lead(nodes)
    if nodes.number > 0:
        sys.exit(follow(nodes))


if __name__ == "__main__":
    main()
