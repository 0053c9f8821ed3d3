"""A trainer that spends little time on the host between two kernel launches.

transformers and accelerate visit every module or parameter of the model four times per step. For
an 8B model with adapters, which has 2,700 modules, three of the visits take 50 ms on a fast host,
and the GPU waits meanwhile (one H100, packs of 8192 tokens: 518 ms per step including these 50 ms).
The fourth, which drops the gradients, takes 3 ms.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer


class QuickStepTrainer(Trainer):
    """A base of TRL's trainers that visits the whole model once per run instead of per step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_grad_norm: Callable[[], torch.Tensor] | None = None
        """Function that returns the gradient norm, if the optimizer itself clips the gradients; see
        `fuse.fuse_trainer`."""
        self.on_mode_change: Callable[[], None] = lambda: None
        """Function that is called before the first step of a call of `train`, and before the first
        one after an evaluation."""
        self._operations_per_token: float | None = None
        self._is_in_training_mode = False
        self._stepped: Any = None
        """The model whose `zero_grad` is the optimizer's, which visits trained parameters alone."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; before the call, the model may be in training or in evaluation mode."""
        self._is_in_training_mode = False
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._stepped is not None:
                del self._stepped.zero_grad
                self._stepped = None

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after its backward pass."""
        self.enter_training_mode(model)
        # DeepSpeed's engine keeps gradients elsewhere too.
        if self._stepped is None and not self.is_deepspeed_enabled:
            assert self.optimizer is not None
            model.zero_grad = self.optimizer.zero_grad
            self._stepped = model
        with _without_mode_changes(model):
            return super().training_step(model, *args, **kwargs)

    def enter_training_mode(self, model: torch.nn.Module) -> None:
        """Put a model and all its modules into training mode, unless they are in it.

        Args:
            model: The trainer's model, perhaps wrapped by DDP or DeepSpeed.
        """
        # A loaded base model is in evaluation mode, but new wrappers (of PEFT, DDP and DeepSpeed)
        # are in training mode. An evaluation changes the mode of the model inside the wrappers of
        # DDP and DeepSpeed, but not the mode of these wrappers.
        assert self.model is not None
        if not (self._is_in_training_mode and model.training and self.model.training):
            model.train()
            self._is_in_training_mode = True
            self.on_mode_change()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' FLOP estimate (parameters x tokens).

        The parameters are counted only on the first call.
        """
        num_tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) / num_tokens
        return int(self._operations_per_token * num_tokens)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.own_grad_norm is None:
            transformers: Any = super()
            return transformers._clip_grad_norm(model)
        return self.own_grad_norm()


@contextlib.contextmanager
def _without_mode_changes(model: Any) -> Iterator[None]:
    """Make `model.train()` do nothing."""
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train
