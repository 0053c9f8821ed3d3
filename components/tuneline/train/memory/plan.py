"""The settings that memory depends on, and how they are reduced until a run fits.

They are reduced in this order, until the run fits: smaller micro-batches, with the same examples
per optimizer step; recomputed activations; the input embedding and the head in host memory, if
fused kernels run and do not train them; and, if the recipe allows it, shorter packs, as long as no
row is cut. None of these changes what is learned. If memory runs out in spite of the estimate,
fused kernels first stop keeping activations. Then the first three reductions are made in the same
order, but packs keep their length.
"""

import dataclasses
import logging
from collections.abc import Iterator

from tuneline.artifacts import PREFERENCE_METHODS, DatasetManifest
from tuneline.errors import RecipeError
from tuneline.kernels.limits import HEAD_ROOM
from tuneline.strict_model import StrictModel
from tuneline.train.batch_size import BatchSize, largest_micro_batch
from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import GIB, MemoryEstimate, Settings, Shape, estimate_memory

logger = logging.getLogger(__name__)

_PLACES = {
    True: "the input embedding and the head in host memory",
    False: "the input embedding and the head in device memory",
}
# In words, by `Plan.tables_on_host`.


class Plan(StrictModel):
    """The settings that memory depends on. Training reads them from its plan, not the config."""

    global_batch_size: int
    """Examples per optimizer step, over all ranks. The number doubles if packs get half as long."""
    micro_batch_size: int
    """Examples per forward and backward pass on one rank."""
    gradient_checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    max_seq_length: int
    """Tokens per pack."""
    kept_gib: float | None = 0.0
    """GiB in which fused kernels may keep activations. null: all memory that is free."""
    tables_on_host: bool = False
    """Whether fused kernels keep the input embedding and the head in host memory."""

    def accumulation_steps(self, num_ranks: int) -> int:
        """Return the number of micro-batches per optimizer step on one rank."""
        return self.global_batch_size // (self.micro_batch_size * num_ranks)

    def divided_over(self, num_ranks: int) -> "Plan":
        """Return this plan with a micro-batch that divides a rank's part of the global batch.

        Raises:
            RecipeError: the ranks cannot divide the global batch equally.
        """
        size = largest_micro_batch(self.global_batch_size, self.micro_batch_size, num_ranks)
        return self.model_copy(update={"micro_batch_size": size})

    def at_most(self, other: "Plan") -> "Plan":
        """Return this plan, changed so that it takes no more memory than another plan.

        The length and number of packs do not change. Call `divided_over` on the result, because its
        micro-batch may not divide a rank's part of the global batch.
        """
        return self.model_copy(
            update={
                "micro_batch_size": min(self.micro_batch_size, other.micro_batch_size),
                "gradient_checkpointing": self.gradient_checkpointing
                or other.gradient_checkpointing,
                "kept_gib": 0.0 if other.kept_gib == 0 else self.kept_gib,
                "tables_on_host": self.tables_on_host or other.tables_on_host,
            }
        )

    def changes_from(self, other: "Plan") -> str:
        """Return a human-readable list of the settings in which this plan differs from another."""
        values = other.model_dump()
        return ", ".join(
            _PLACES[bool(value)]
            if name == "tables_on_host"
            else f"{name} {_text(value)} instead of {_text(values[name])}"
            for name, value in self.model_dump().items()
            if value != values[name]
        )

    def as_settings(self, other: "Plan") -> str:
        """Return the changes from another plan as keys of a recipe and their new values.

        No key decides where the tables are, so `tables_on_host` has to be the same in both plans.
        """
        assert self.tables_on_host == other.tables_on_host
        sections = {"max_seq_length": "prepare"}
        values = other.model_dump()
        return " and ".join(
            f"{sections.get(name, 'train')}.{name} to {_text(value)}"
            for name, value in self.model_dump().items()
            if value != values[name]
        )


def recipe_plan(config: TrainConfig, size: BatchSize, max_seq_length: int) -> Plan:
    """Return the plan that a recipe asks for, before it is made to fit.

    Raises:
        RecipeError: the ranks cannot divide the global batch equally.
    """
    return Plan(
        global_batch_size=size.global_batch_size,
        micro_batch_size=size.micro_batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        max_seq_length=max_seq_length,
    ).divided_over(size.num_ranks)


def smaller_plan(
    plan: Plan, *, min_length: int | None = None, moves_tables: bool = False
) -> Plan | None:
    """Return the next plan that takes less memory, or None if there is none.

    Args:
        plan: The plan that takes too much memory.
        min_length: Tokens below which no pack may be shortened. None: packs keep their length.
        moves_tables: Whether the input embedding and the head can be in host memory.
    """
    if plan.kept_gib != 0:
        return plan.model_copy(update={"kept_gib": 0.0})
    if plan.micro_batch_size > 1:
        return _with_fewer_examples(plan)
    if not plan.gradient_checkpointing:
        return plan.model_copy(update={"gradient_checkpointing": True})
    if moves_tables and not plan.tables_on_host:
        return plan.model_copy(update={"tables_on_host": True})
    if min_length is not None and plan.max_seq_length // 2 >= min_length:
        # Half the tokens per pack, so twice the packs per optimizer step.
        return plan.model_copy(
            update={
                "max_seq_length": plan.max_seq_length // 2,
                "global_batch_size": 2 * plan.global_batch_size,
            }
        )
    return None


def min_pack_length(config: TrainConfig, manifest: DatasetManifest) -> int | None:
    """Return the tokens of the shortest pack that cuts no row; None to keep the pack length."""
    if config.fit_min_length is None or not config.packs(manifest.method):
        return None
    if manifest.method == "cpt":
        return config.fit_min_length
    return max(config.fit_min_length, min(manifest.lengths.max, manifest.max_seq_length))


def run_settings(
    config: TrainConfig,
    manifest: DatasetManifest,
    asked: Plan,
    *,
    itemsize: int,
    optimizer: str,
    device: str,
    fused: bool,
    num_sharing: int = 1,
) -> Settings:
    """Return the settings of a run that its memory estimate needs.

    Args:
        config: The `train` section of the recipe.
        manifest: Record of the dataset.
        asked: The plan that the recipe asks for.
        itemsize: Bytes per number in the compute type.
        optimizer: The optimizer's name, as in transformers.
        device: "cpu" or "cuda".
        fused: Whether fused kernels run.
        num_sharing: Ranks over which ZeRO-2 divides the optimizer state.
    """
    tiled = device != "cpu" or manifest.method in PREFERENCE_METHODS
    return Settings(
        rows=asked.micro_batch_size,
        length=asked.max_seq_length if config.packs(manifest.method) else manifest.lengths.max,
        recompute=asked.gradient_checkpointing,
        quantized=config.load_in_4bit,
        itemsize=itemsize,
        optim=optimizer,
        method=manifest.method,
        loss="tiled" if tiled else "whole",
        fused=fused,
        fp8=config.kernels == "fp8",
        num_ranks=num_sharing,
    )


def largest_that_fits(asked: Plan, shape: Shape, settings: Settings, available_bytes: int) -> Plan:
    """Return the plan with the largest micro-batch that fits, or with 1 if no micro-batch fits.

    Args:
        asked: A plan with the largest micro-batch to try.
        shape: Shape of the base model.
        settings: Settings of the run, see `run_settings`.
        available_bytes: Memory that a rank may take on its device.
    """
    plan = asked
    while plan.micro_batch_size > 1:
        if _estimate(shape, settings, plan).total <= _usable(available_bytes):
            break
        plan = _with_fewer_examples(plan)
    return plan


def fitting_plan(
    config: TrainConfig,
    asked: Plan,
    shape: Shape,
    settings: Settings,
    *,
    available_bytes: int,
    min_length: int | None = None,
    moves_tables: bool = False,
) -> tuple[Plan, MemoryEstimate]:
    """Return the first plan whose estimate fits, and its estimate.

    Args:
        config: The `train` section of the recipe. Its `fit` decides whether a smaller plan may be
            used, or is only suggested in the error.
        asked: The plan that the recipe asks for.
        shape: Shape of the base model.
        settings: Settings of the run, see `run_settings`.
        available_bytes: Memory that a rank may take on its device.
        min_length: See `min_pack_length`.
        moves_tables: Whether the input embedding and the head can be in host memory.

    Raises:
        RecipeError: the recipe's own plan does not fit and `fit` is refuse, or no plan fits.
    """
    needed = _estimate(shape, settings, asked)
    usable = _usable(available_bytes)

    def filled(plan: Plan, estimate: MemoryEstimate) -> tuple[Plan, MemoryEstimate]:
        if settings.fused:
            kept = max(0, usable - estimate.total)
            gib = None if config.memory_gib is None else kept / GIB
            plan = plan.model_copy(update={"kept_gib": gib})
            estimate = _estimate(shape, dataclasses.replace(settings, kept_bytes=kept), plan)
        logger.info("memory: %s estimated, %.2f GiB free", estimate, available_bytes / GIB)
        return plan, estimate

    if needed.total <= usable or config.fit == "off":
        return filled(asked, needed)
    where = (
        f"the run takes about {needed.total / GIB:.1f} GiB of memory, but only "
        f"{usable / GIB:.1f} of {available_bytes / GIB:.1f} GiB free can be used"
    )
    smallest = needed
    moves_tables = moves_tables and _tables_save_memory(asked, shape, settings)
    for plan in _plans(asked, min_length, moves_tables):
        estimate = _estimate(shape, settings, plan)
        smallest = min(smallest, estimate, key=lambda one: one.total)
        if estimate.total > usable:
            continue
        changes = plan.changes_from(asked)
        if config.fit == "refuse":
            needs = f"(needs {estimate.total / GIB:.1f} GiB, same result)"
            if plan.tables_on_host:
                raise RecipeError(
                    f"train: {where}: set train.fit to auto, which trains with {changes} {needs}"
                )
            raise RecipeError(
                f"train: {where}: set {plan.as_settings(asked)} {needs}, or set train.fit to auto, "
                "which makes this change"
            )
        logger.warning(
            "%s: using %s, which needs %.1f GiB; every step learns from the same tokens",
            where,
            changes,
            estimate.total / GIB,
        )
        return filled(plan, estimate)
    raise RecipeError(
        f"train: {where}, and the smallest plan needs {smallest.total / GIB:.1f} GiB: lower "
        "prepare.max_seq_length or train.lora.r, use a smaller base model or a larger device, or "
        "set train.fit to off to try anyway"
    )


def _with_fewer_examples(plan: Plan) -> Plan:
    micro = plan.micro_batch_size
    fewer = max(size for size in range(1, micro) if micro % size == 0)
    return plan.model_copy(update={"micro_batch_size": fewer})


def _tables_save_memory(asked: Plan, shape: Shape, settings: Settings) -> bool:
    """Return whether a run takes less memory if its tables are in host memory.

    It does not if the input embedding is tied to the head, which is copied for the loss, and the
    loss takes more memory than a layer's backward pass.
    """
    least = asked.model_copy(update={"micro_batch_size": 1, "gradient_checkpointing": True})
    moved = least.model_copy(update={"tables_on_host": True})
    on_host, on_device = (_estimate(shape, settings, plan) for plan in (moved, least))
    # That tables on the host do without graphs is no reason to move them.
    return on_host.total < on_device.total - on_device.graphs


def _plans(plan: Plan, min_length: int | None, moves_tables: bool) -> Iterator[Plan]:
    smaller = smaller_plan(plan, min_length=min_length, moves_tables=moves_tables)
    while smaller is not None:
        yield smaller
        smaller = smaller_plan(smaller, min_length=min_length, moves_tables=moves_tables)


def _usable(available_bytes: int) -> int:
    return int(available_bytes * (1 - HEAD_ROOM))


def _estimate(shape: Shape, settings: Settings, plan: Plan) -> MemoryEstimate:
    return estimate_memory(
        shape,
        dataclasses.replace(
            settings,
            rows=plan.micro_batch_size,
            length=min(plan.max_seq_length, settings.length),
            recompute=plan.gradient_checkpointing,
            tables_on_host=plan.tables_on_host,
        ),
    )


def _text(value: float | bool | None) -> str:
    if value is None:
        return "all that is free"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
