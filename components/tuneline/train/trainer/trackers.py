"""Which trackers of experiments a run reports to."""

import importlib.util
import logging
import os

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig

logger = logging.getLogger(__name__)

TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"
MLFLOW_VARIABLE = "MLFLOW_RUN_ID"
"""Kubeflow Pipelines sets it where it keeps a run of its own in MLflow."""

_PACKAGES = {
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}


def trackers(config: TrainConfig) -> list[str]:
    """Return the trackers by transformers' names: the recipe's, and the run that KFP injects.

    Raises:
        RecipeError: one is not installed here, or TensorBoard has no directory.
    """
    for name in config.track:
        if not _is_installed(name):
            raise RecipeError(
                f"train.track names {name}, and no package {' or '.join(_PACKAGES[name])} is "
                "installed here: add it to the step's image, or leave it out"
            )
    if "tensorboard" in config.track and not os.environ.get(TENSORBOARD_VARIABLE):
        raise RecipeError(
            "train.track names tensorboard, which needs a directory that outlives the step in the "
            f"environment variable {TENSORBOARD_VARIABLE}"
        )
    names: list[str] = list(config.track)
    if os.environ.get(MLFLOW_VARIABLE) and "mlflow" not in names:
        if _is_installed("mlflow"):
            names.append("mlflow")
        else:
            logger.warning(
                "%s is set, and nothing is reported to it: mlflow is not installed", MLFLOW_VARIABLE
            )
    return names


def _is_installed(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])
