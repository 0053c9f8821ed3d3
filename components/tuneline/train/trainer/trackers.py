"""Experiment trackers that a run reports to."""

import importlib.util
import logging
import os

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig

logger = logging.getLogger(__name__)

TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"
MLFLOW_VARIABLE = "MLFLOW_RUN_ID"
"""Environment variable that KFP sets if KFP has created an MLflow run for the pipeline run."""

_PACKAGES = {
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}


def trackers(config: TrainConfig) -> list[str]:
    """Return transformers' names of the trackers: the recipe's, and MLflow if KFP has set it up.

    Raises:
        RecipeError: a tracker is not installed here, or TensorBoard has no directory.
    """
    for name in config.track:
        if not _is_installed(name):
            raise RecipeError(
                f"train.track names {name}, but the package {' or '.join(_PACKAGES[name])} is not "
                "installed here: add it to the step's image, or remove it from train.track"
            )
    if "tensorboard" in config.track and not os.environ.get(TENSORBOARD_VARIABLE):
        raise RecipeError(
            "train.track names tensorboard: set the environment variable "
            f"{TENSORBOARD_VARIABLE} to a directory that outlives the step"
        )
    names: list[str] = list(config.track)
    if os.environ.get(MLFLOW_VARIABLE) and "mlflow" not in names:
        if _is_installed("mlflow"):
            names.append("mlflow")
        else:
            logger.warning(
                "%s is set but nothing is reported to MLflow: mlflow is not installed",
                MLFLOW_VARIABLE,
            )
    return names


def _is_installed(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])
