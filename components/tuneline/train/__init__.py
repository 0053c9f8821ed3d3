"""Train a QLoRA adapter on a prepared dataset."""

from tuneline.train.config import TrainConfig

__all__ = ["TrainConfig"]
