"""One pod of a TrainJob, that is, one node: `python -m tuneline.train.trainjob.pod`.

The pod of node 0 runs the train step and announces each attempt. The pods of the other nodes run
their ranks in every attempt, and exit when node 0 has written the outcome of the step. See
`ranks.nodes` for this protocol. A pod that fails ends the whole job, because the ranks of the
other pods cannot go on without it.
"""

import logging
import sys
import time

from tuneline.errors import RecipeError, TunelineError
from tuneline.runtime.step import step
from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.launch import take_part
from tuneline.train.ranks.nodes import (
    ADAPTER_DIR,
    BASE_MODEL_DIR,
    CONFIG_FILE,
    CURVES_FILE,
    DATASET_DIR,
    DIRECTORY_VARIABLE,
    Node,
    Outcome,
)
from tuneline.train.run import run
from tuneline.train.trainjob.lease import stop_without_launcher

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def lead(node: Node) -> None:
    """Run the train step as node 0, and write its outcome for the other nodes."""
    shared = node.shared
    for attempt in shared.attempts():
        # This pod has restarted, so the ranks of its earlier attempts are gone.
        attempt.end()
    try:
        run(
            TrainConfig.parse((shared.path / CONFIG_FILE).read_text(encoding="utf-8")),
            base_model_dir=shared.path / BASE_MODEL_DIR,
            dataset_dir=shared.path / DATASET_DIR,
            adapter_dir=shared.path / ADAPTER_DIR,
            curves_path=shared.path / CURVES_FILE,
        )
    except TunelineError as error:
        shared.write_outcome(Outcome(type(error).__name__, str(error)))
        raise
    except Exception as error:
        shared.write_outcome(Outcome("TrainingError", f"{type(error).__name__}: {error}"))
        raise
    shared.write_outcome(Outcome(""))


def follow(node: Node) -> int:
    """Run this node's ranks in every attempt that node 0 announces; return the exit code."""
    handled = {attempt.path for attempt in node.shared.attempts() if attempt.is_over}
    with stop_on_sigterm() as stop:
        while not stop.is_made:
            outcome = node.shared.read_outcome()
            if outcome is not None:
                logger.info("the step on node 0 has ended: %s", outcome.kind or "success")
                return 1 if outcome.kind else 0
            for attempt in node.shared.attempts():
                if attempt.path not in handled:
                    handled.add(attempt.path)
                    take_part(attempt, node, stop)
            time.sleep(_POLL_SECONDS)
    return 143


def main() -> None:
    """Run the node that the environment describes."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    node = None
    with step("train"):
        node = Node.from_environment()
        if node is None:
            raise RecipeError(
                f"{DIRECTORY_VARIABLE} is not set: run this module only in a TrainJob of tuneline, "
                "which sets it, or train on one machine with `python -m tuneline.train`"
            )
        logger.info(
            "node %d of %d, %d ranks per node", node.number, node.num_nodes, node.ranks_per_node
        )
        stop_without_launcher(node.shared)
        if node.number == 0:
            lead(node)
    if node.number > 0:
        sys.exit(follow(node))


if __name__ == "__main__":
    main()
