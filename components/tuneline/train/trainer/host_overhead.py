"""A trainer that does little on the host between two launches of its GPU.

transformers and accelerate look at every module or parameter of the model three times in each
step. An 8B model with adapters has 2,700 modules, which takes a fast host 50 ms in which the GPU
waits (one H100, packed to 8192 tokens: 518 ms a step with it).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer


class QuickStepTrainer(Trainer):
    """A base before TRL's trainers: what a step asks of the whole model is asked once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_grad_norm: Callable[[], torch.Tensor] | None = None
        """The norm from an optimizer that clips inside its step; see `kernels.fuse_trainer`."""
        self._operations_a_token: float | None = None
        self._is_turned = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from a model in any mode."""
        self._is_turned = False
        return super().train(*args, **kwargs)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after its backward pass."""
        # A loaded base is in evaluation mode, new wrappers (PEFT's, DDP's, DeepSpeed's) are not.
        # An evaluation turns what is inside, and leaves DDP's and DeepSpeed's as they are.
        assert self.model is not None
        if not (self._is_turned and model.training and self.model.training):
            model.train()
            self._is_turned = True
        with _mode_stays(model):
            return super().training_step(model, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate: parameters times tokens, the parameters counted once."""
        num_tokens = inputs["input_ids"].numel()
        if self._operations_a_token is None:
            self._operations_a_token = super().floating_point_ops(inputs) / num_tokens
        return int(self._operations_a_token * num_tokens)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.own_grad_norm is None:
            return super()._clip_grad_norm(model)
        return self.own_grad_norm()


@contextlib.contextmanager
def _mode_stays(model: Any) -> Iterator[None]:
    """Let `model.train()` do nothing."""
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train
