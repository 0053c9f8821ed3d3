"""Settings that fit the memory there is, without a change of what is learnt.

In this order, as far as needed: fewer rows a forward and more forwards a step, which keeps the rows
of every step; activations computed again; and, where the recipe allows it, shorter packs, which
cut no row. The same is done when memory runs out in spite of the estimate.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from tuneline.artifacts import DatasetManifest
from tuneline.errors import RecipeError
from tuneline.kernels.limits import HEAD_ROOM
from tuneline.strict_model import StrictModel
from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import GIB, MemoryEstimate, Settings, Shape, estimate_memory

logger = logging.getLogger(__name__)


class Plan(StrictModel):
    """The settings that memory depends on and the recipe leaves to us."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    max_seq_length: int
    kept_gib: float | None = 0.0
    """What our kernels may take to keep activations; null: what is free."""

    @property
    def train_values(self) -> dict[str, int | bool]:
        """What it says of a TrainConfig."""
        return self.model_dump(exclude={"max_seq_length", "kept_gib"})

    def shared_by(self, num_ranks: int) -> "Plan":
        """Return a plan with the rows of a step of this, whose forwards ranks can share equally.

        Raises:
            RecipeError: they cannot.
        """
        in_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if in_step % num_ranks:
            raise RecipeError(
                f"train: a step of {in_step} rows (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}) cannot be shared equally by {num_ranks} "
                f"ranks: make it a multiple of {num_ranks}, or set train.num_ranks to "
                f"{math.gcd(in_step, num_ranks)}"
            )
        share = in_step // num_ranks
        most = min(share, self.per_device_train_batch_size)
        rows = max(number for number in range(1, most + 1) if share % number == 0)
        return self.model_copy(
            update={
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": in_step // rows,
            }
        )

    def at_most(self, other: "Plan") -> "Plan":
        """Return a plan that takes no more memory than either, with the rows of a step of this."""
        rows = min(self.per_device_train_batch_size, other.per_device_train_batch_size)
        in_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.model_copy(
            update={
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": in_step // rows,
                "gradient_checkpointing": self.gradient_checkpointing
                or other.gradient_checkpointing,
                "kept_gib": 0.0 if other.kept_gib == 0 else self.kept_gib,
            }
        )

    def changes_from(self, other: "Plan") -> str:
        """Name the settings that another plan has differently."""
        values = other.model_dump()
        return ", ".join(
            f"{name} {_text(value)} instead of {_text(values[name])}"
            for name, value in self.model_dump().items()
            if value != values[name]
        )


def first_plan(
    config: TrainConfig, manifest: DatasetManifest, num_ranks: int = 1, *, fused: bool = False
) -> Plan:
    """Return the recipe's own settings, with a step's forwards such that ranks can share them.

    Args:
        config: the recipe's part.
        manifest: of the data set.
        num_ranks: who share a step.
        fused: whether our kernels run.

    Raises:
        RecipeError: see `Plan.shared_by`.
    """
    return Plan(
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        max_seq_length=manifest.max_seq_length,
        kept_gib=None if fused else 0.0,
    ).shared_by(num_ranks)


def smaller_plan(plan: Plan, *, min_length: int | None = None) -> Plan | None:
    """Return the next plan that takes less memory, or None.

    Args:
        plan: what is too large.
        min_length: no pack gets shorter; None: packs stay as they are.
    """
    if plan.kept_gib != 0:
        return plan.model_copy(update={"kept_gib": 0.0})
    rows, accumulated = plan.per_device_train_batch_size, plan.gradient_accumulation_steps
    if rows > 1:
        fewer = max(number for number in range(1, rows) if rows % number == 0)
        return plan.model_copy(
            update={
                "per_device_train_batch_size": fewer,
                "gradient_accumulation_steps": accumulated * (rows // fewer),
            }
        )
    if not plan.gradient_checkpointing:
        return plan.model_copy(update={"gradient_checkpointing": True})
    if min_length is not None and plan.max_seq_length // 2 >= min_length:
        # Half the tokens a pack, so twice the packs a step.
        return plan.model_copy(
            update={
                "max_seq_length": plan.max_seq_length // 2,
                "gradient_accumulation_steps": 2 * accumulated,
            }
        )
    return None


def min_pack_length(config: TrainConfig, manifest: DatasetManifest) -> int | None:
    """Return how short packs may get without a row being cut, or None if they stay."""
    if config.fit_min_length is None or manifest.method == "dpo" or not config.packing:
        return None
    if manifest.method == "cpt":
        return config.fit_min_length
    return max(config.fit_min_length, min(manifest.lengths.max, manifest.max_seq_length))


def fitting_plan(
    config: TrainConfig,
    manifest: DatasetManifest,
    shape: Shape,
    settings: Settings,
    available_bytes: int,
    num_ranks: int = 1,
) -> tuple[Plan, MemoryEstimate]:
    """Return the first plan whose estimate fits, and the estimate.

    Args:
        config: `fit` says whether a smaller plan may be taken, or is only named.
        manifest: of the data set.
        shape: of the base model.
        settings: of the run as the recipe has it.
        available_bytes: what is free on the device.
        num_ranks: who share a step.

    Raises:
        RecipeError: it does not fit as it is and `fit` is refuse, or nothing fits.
    """
    asked = first_plan(config, manifest, num_ranks)
    is_packed = config.packing and manifest.method != "dpo"
    longest = manifest.max_seq_length if is_packed else manifest.lengths.max
    needed = _estimate(shape, settings, asked, longest)
    usable = int(available_bytes * (1 - HEAD_ROOM))

    def filled(plan: Plan, estimate: MemoryEstimate) -> tuple[Plan, MemoryEstimate]:
        if settings.fused:
            kept = max(0, usable - estimate.total)
            gib = None if config.memory_gib is None else kept / GIB
            plan = plan.model_copy(update={"kept_gib": gib})
            estimate = _estimate(
                shape, dataclasses.replace(settings, kept_bytes=kept), plan, longest
            )
        logger.info("memory: %s estimated, %.2f GiB free", estimate, available_bytes / GIB)
        return plan, estimate

    if needed.total <= usable or config.fit == "off":
        return filled(asked, needed)
    where = (
        f"the run takes about {needed.total / GIB:.1f} GiB of memory, and {usable / GIB:.1f} of "
        f"{available_bytes / GIB:.1f} GiB free can be used"
    )
    smallest = needed
    for plan in _plans(asked, min_pack_length(config, manifest)):
        estimate = _estimate(shape, settings, plan, longest)
        smallest = min(smallest, estimate, key=lambda one: one.total)
        if estimate.total > usable:
            continue
        changes = plan.changes_from(asked)
        if config.fit == "refuse":
            raise RecipeError(
                f"train: {where}: take {changes}, which needs {estimate.total / GIB:.1f} GiB and "
                "learns the same, or train.fit: auto, which takes it by itself"
            )
        logger.warning(
            "%s: taking %s, %.1f GiB; every step learns from the same tokens",
            where,
            changes,
            estimate.total / GIB,
        )
        return filled(plan, estimate)
    raise RecipeError(
        f"train: {where}; the least it can do with is {smallest.total / GIB:.1f} GiB: lower "
        "prepare.max_seq_length or lora.r, take a smaller base model or a larger device, or set "
        "train.fit: off to try all the same"
    )


def run_settings(
    config: TrainConfig,
    manifest: DatasetManifest,
    *,
    itemsize: int,
    device: str,
    fused: bool,
    num_sharing: int = 1,
) -> Settings:
    """Return what the estimate needs to know of a run, of `num_sharing` ranks with ZeRO-2."""
    tiled = device != "cpu" or manifest.method == "dpo"
    return Settings(
        rows=config.per_device_train_batch_size,
        length=manifest.max_seq_length,
        recompute=config.gradient_checkpointing,
        quantized=config.load_in_4bit,
        itemsize=itemsize,
        optim=config.optim,
        method=manifest.method,
        loss="tiled" if tiled else "whole",
        fused=fused,
        num_ranks=num_sharing,
    )


def available_memory(config: TrainConfig, device: str, num_ranks: int = 1) -> int:
    """Return how many bytes a rank may still take: what is free, and what the recipe grants."""
    free = _free_memory(device, num_ranks)
    return free if config.memory_gib is None else min(free, int(config.memory_gib * GIB))


def _free_memory(device: str, num_ranks: int) -> int:
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    limit = _container_headroom()
    # Ranks on a CPU share its memory; on GPUs each has its own.
    return (free if limit is None else min(free, limit)) // num_ranks


def _container_headroom(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's memory limit leaves, or None where there is no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        details = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # The kernel gives back files that it only keeps in case they are read again.
    return None if limit == "max" else int(limit) - used + int(details["inactive_file"])


def _plans(plan: Plan, min_length: int | None) -> Iterator[Plan]:
    smaller = smaller_plan(plan, min_length=min_length)
    while smaller is not None:
        yield smaller
        smaller = smaller_plan(smaller, min_length=min_length)


def _estimate(shape: Shape, settings: Settings, plan: Plan, longest: int) -> MemoryEstimate:
    return estimate_memory(
        shape,
        dataclasses.replace(
            settings,
            rows=plan.per_device_train_batch_size,
            length=min(plan.max_seq_length, longest),
            recompute=plan.gradient_checkpointing,
        ),
    )


def _text(value: float | bool | None) -> str:
    if value is None:
        return "what is free"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
