"""Train a QLoRA adapter on a prepared data set.

Importing this loads neither kfp nor torch: a recipe is checked on machines that have neither, so
heavy imports stand inside the functions that need them.
"""

from tuneline.train.config import TrainConfig
from tuneline.train.run import run
from tuneline.train.trainjob.manifest import NodesConfig
from tuneline.train.trainjob.run import run_on_nodes

__all__ = ["NodesConfig", "TrainConfig", "run", "run_on_nodes"]
