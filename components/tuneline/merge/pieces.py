"""The weights that merge writes, in pieces: W' + s B A, by the name of the files' tensor.

A piece is one matrix, or one matrix of a stack of experts. W' is the base model's weight as
training saw it. Experts in NF4 are quantised as in training: one expert at a time, with the
matrices joined that transformers joins.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from tuneline.artifacts import TrainingSummary
from tuneline.errors import ModelError
from tuneline.merge.adapter import Adapter, Update
from tuneline.merge.expert_parts import Part, parts_of
from tuneline.models.checkpoint import Checkpoint
from tuneline.models.experts import Stack, quantized_experts, round_trip_experts
from tuneline.models.nf4 import empty_model, file_names, quantized_modules, round_trip

Base = Literal["dequantized", "original"]
"""Weights that an adapter is added to, as in `MergeConfig.base`."""

_NUM_KEPT = 2
"""Number of experts that stay in memory, because their matrices are written one after the other."""


@dataclass(frozen=True)
class Piece:
    """A weight as training saw it, and its update."""

    base: torch.Tensor
    update: Update | None = None

    def merged(self) -> torch.Tensor:
        """Return the merged weight, in fp32 if it has an update."""
        return self.base if self.update is None else self.update.add_to(self.base)


class Names:
    """Which tensors of the base model's files an adapter updates or replaces.

    Attributes:
        model: the base model, empty.
        linears: the adapter's entry and the model's parameter, by the name of the file's tensor.
        replaced: weights that were trained in full, by the name of the file's tensor.
        stacks: shapes of the model's stacks of experts, by parameter.
        parts: what a tensor of the files holds of a stack of experts, by its name.
        updated_stacks: the adapter's entry by parameter, for each stack with an update.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, base_model_dir: Path) -> None:
        """Find the tensors.

        Raises:
            ModelError: the files lack a tensor that the adapter updates or replaces.
        """
        self.model: PreTrainedModel = empty_model(base_model_dir)
        self._checkpoint, self._directory = checkpoint, base_model_dir
        self._renamed = file_names(self.model)
        self.stacks: dict[str, Stack] = quantized_experts(self.model)
        targets = adapter.targets(self.model)
        self.parts: dict[str, Part] = {}
        for name, stack in self.stacks.items():
            self.parts |= self._parts_of(name, stack)
        self.updated_stacks = {name: key for name, key in targets.items() if name in self.stacks}
        self.linears = {
            self.stored(name): (key, name)
            for name, key in targets.items()
            if name not in self.stacks
        }
        self.replaced = {self.stored(name): weight for name, weight in adapter.replaced.items()}
        self.check({*self.linears, *self.replaced})

    def stored(self, name: str) -> str:
        """Return the name in the files of a weight that the model calls `name`."""
        renamed = self._renamed.get(name, name)
        # A checkpoint may already contain the weights under the model's own names.
        return renamed if renamed in self._checkpoint.specs else name

    def check(self, needed: set[str]) -> None:
        """Check that the base model's files have the tensors of these names.

        Raises:
            ModelError: they lack one.
        """
        missing = sorted(needed - set(self._checkpoint.specs))
        if missing:
            raise ModelError(
                f"{self._directory} has no tensor {missing[0]} ({len(missing)} tensors are "
                "missing): the adapter belongs to another model, or this architecture's files name "
                "or fuse weights differently from the model, which is not supported"
            )

    def _parts_of(self, name: str, stack: Stack) -> dict[str, Part]:
        stored = self.stored(name)
        if stored in self._checkpoint.specs:
            shape = (stack.num_experts, stack.rows, stack.columns)
            if self._checkpoint.specs[stored].shape == shape:
                return {stored: Part(name, None, 0, stack.rows, is_transposed=False)}
        parts = parts_of(self.model, name, stack)
        self.check(set(parts))
        return parts


class Pieces:
    """The pieces of each tensor of a merged model.

    Attributes:
        checkpoint: the base model's files.
        names: the tensors that the adapter updates.
        in_4bit: names of the tensors that training quantised.
    """

    def __init__(
        self,
        base_model_dir: Path,
        adapter: Adapter,
        training: TrainingSummary,
        *,
        base: Base,
        device: str,
    ) -> None:
        """Find what was quantised, and what is updated.

        Args:
            base_model_dir: directory of the base model.
            adapter: the adapter.
            training: record of the training run, which says how the base model was loaded.
            base: weights that the adapter is added to.
            device: device for the NF4 round trip, "cpu" or "cuda".

        Raises:
            ModelError: a weight that training quantised or updated is not in the base model's files
                under the expected name.
        """
        self.checkpoint = Checkpoint(base_model_dir)
        self.names = Names(self.checkpoint, adapter, base_model_dir)
        self._adapter, self._device = adapter, device
        self._dtype: torch.dtype = getattr(torch, training.compute_dtype)
        self.in_4bit: set[str] = set()
        # Weights that the files hold in 4 bits are dequantised as they are read.
        if training.base_quantization != "none" and base == "dequantized":
            if not self.checkpoint.packed:
                linears = quantized_modules(empty_model(base_model_dir))
                self.in_4bit = {self.names.stored(f"{name}.weight") for name in linears}
                self.in_4bit |= set(self.names.parts)
                self.names.check(self.in_4bit)
        self._read_expert = functools.lru_cache(_NUM_KEPT)(self._read_expert_uncached)

    def __call__(self, name: str) -> Iterator[Piece]:
        """Return the pieces of a tensor of the files, in their order along its first dimension."""
        part = self.names.parts.get(name)
        replaced = self.names.replaced.get(name)
        if replaced is not None:
            yield Piece(replaced)
        elif part is None:
            weight = self.checkpoint.read(name)
            if name in self.in_4bit:
                weight = round_trip(weight, dtype=self._dtype, device=self._device)
            linear = self.names.linears.get(name)
            yield Piece(weight, self._adapter.update(*linear) if linear else None)
        elif part.expert is not None:
            yield self._of_expert(part, part.expert)
        else:
            for expert in range(self.names.stacks[part.stack].num_experts):
                yield self._of_expert(part, expert)

    def _of_expert(self, part: Part, expert: int) -> Piece:
        """Return the piece of one expert, as the files have it."""
        weight = self._read_expert(part.stack, expert)[part.start : part.stop]
        stack, key = self.names.stacks[part.stack], self.names.updated_stacks.get(part.stack)
        update = None
        if key is not None:
            update = self._adapter.expert_update(key, part.stack, expert, stack.num_experts)
            update = update.transposed if stack.is_transposed else update
            update = update.rows(part.start, part.stop)
        if part.is_transposed:
            return Piece(weight.T, update.transposed if update else None)
        return Piece(weight, update)

    def _read_expert_uncached(self, stack: str, expert: int) -> torch.Tensor:
        """Return one expert's weight as the model stores it, and as training saw it."""
        matrices = []
        for name, part in self._parts_by_stack[stack]:
            if part.expert not in (None, expert):
                continue
            if part.expert is None:
                matrix = self.checkpoint.read_slice(name, expert)
            else:
                matrix = self.checkpoint.read(name)
            matrices.append((part.start, matrix.T if part.is_transposed else matrix))
        weight = torch.cat([matrix for _, matrix in sorted(matrices, key=lambda item: item[0])])
        if stack in self._stacks_in_4bit:
            weight = round_trip_experts(weight, dtype=self._dtype, device=self._device)
        return weight

    @functools.cached_property
    def _parts_by_stack(self) -> dict[str, list[tuple[str, Part]]]:
        parts: dict[str, list[tuple[str, Part]]] = {}
        for name, part in self.names.parts.items():
            parts.setdefault(part.stack, []).append((name, part))
        return parts

    @functools.cached_property
    def _stacks_in_4bit(self) -> set[str]:
        return {part.stack for name, part in self.names.parts.items() if name in self.in_4bit}
