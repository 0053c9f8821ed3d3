"""Hidden states of many sequences without gradients, in packed rows and fused layers.

    with fused_inference(model) as fused:
        if fused.takes(longest):
            hidden_states = fused.hidden_states(sequences, firsts)

A packed row has neither padding nor a KV cache, and its last layer computes o_proj and the MLP only
for the tokens whose hidden states are wanted. The host does not wait for the device, so that it
prepares the next row while the device computes. Within the `with` statement every other forward of
the model, such as one with a KV cache, is the stock one.

Shapes: n tokens of a sequence, T tokens of a row, N of them whose hidden states are wanted, H
hidden size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from tuneline.kernels.limits import MIN_CAPABILITY
from tuneline.kernels.ops.copy_rows import copy_rows
from tuneline.kernels.patching import fuses_every_layer, patch, unpatch
from tuneline.kernels.to_device import to_device

logger = logging.getLogger(__name__)

ROW_TOKENS = 2**14
"""Approximate number of tokens of a packed row, unless one sequence is longer. More tokens at a
time are computed hardly faster, but need more memory."""


def runs_fused(model: Any) -> bool:
    """Return whether the device, the dtype and the storage of a model's weights allow fused layers.

    A quantised model is left to the library that loaded it.
    """
    return (
        model.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(model.device) >= MIN_CAPABILITY
        and model.dtype in (torch.bfloat16, torch.float16)
        and getattr(model, "hf_quantizer", None) is None
        and _compiles(model.device)
    )


class FusedInference:
    """The stack of layers of a model that is patched for inference."""

    def __init__(self, model: nn.Module) -> None:
        """Take a patched causal LM."""
        self._model: Any = model

    def takes(self, longest: int) -> bool:
        """Return whether all layers compute sequences of up to `longest` tokens fused."""
        with torch.no_grad():
            return fuses_every_layer(self._model, longest)

    @torch.no_grad()
    def hidden_states(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> list[Tensor]:
        """Return what the decoder returns for the last tokens of each sequence, [n, H] each.

        Args:
            sequences: Token IDs; no sequence is empty, and `takes` is true for the longest one.
            firsts: Index in each sequence of the first token whose hidden state is returned.
        """
        states: list[Tensor] = []
        for rows in _rows(sequences):
            states += self._row(sequences[rows], firsts[rows])
        return states

    def _row(self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> Iterable[Tensor]:
        device = self._model.device
        lengths = [len(sequence) for sequence in sequences]
        ids_T = torch.tensor(list(chain.from_iterable(sequences)))
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        firsts_T = torch.tensor(firsts).repeat_interleave(torch.tensor(lengths))
        wanted_N = (positions_T >= firsts_T).nonzero()[:, 0]
        hidden_states = self._model.base_model(
            input_ids=to_device(ids_T[None], device),
            position_ids=to_device(positions_T[None], device),
            sequence_starts=[0, *accumulate(lengths[:-1])],
            selected=to_device(wanted_N, device),
            use_cache=False,
        ).last_hidden_state
        counts = [length - first for length, first in zip(lengths, firsts, strict=True)]
        return torch.split(hidden_states[0], counts)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Return whether Triton can compile and run a kernel; log the reason if it cannot.

    Triton compiles part of a kernel's launcher with the machine's C compiler.
    """
    numbers = torch.arange(64.0, device=device).view(2, 32)
    copied = torch.empty_like(numbers)
    try:
        copy_rows(numbers, copied)
    except Exception as error:  # The compiler, the loader and the driver raise errors of their own.
        logger.warning(
            "transformers' layers run instead of fused ones, because Triton cannot compile a "
            "kernel (%s): install gcc and the headers of Python and of the C library",
            f"{type(error).__name__}: {error}".splitlines()[0],
        )
        return False
    return torch.equal(copied, numbers)


@contextmanager
def fused_inference(model: Any) -> Iterator[FusedInference]:
    """Patch a causal LM in eval mode for inference within the body of the `with` statement.

    Only frozen weights are fused, so the parameters require no gradient within the body.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        patch(model, inference=True)
        yield FusedInference(model)
    finally:
        unpatch(model)
        for parameter in trained:
            parameter.requires_grad_(True)


def _rows(sequences: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Return which sequences form each row; a short last row would leave much of the GPU idle."""
    total = sum(map(len, sequences))
    per_row = total / max(1, round(total / ROW_TOKENS))
    first = num_tokens = num_rows = 0
    for index, sequence in enumerate(sequences):
        num_tokens += len(sequence)
        if num_tokens >= (num_rows + 1) * per_row or index == len(sequences) - 1:
            yield slice(first, index + 1)
            first, num_rows = index + 1, num_rows + 1
