"""The optimizers and learning-rate schedules that a run can use, by transformers' names.

transformers has more of both. An optimizer is listed here if the train step's image has its
package, and a schedule if its learning rate is known before the first step. The tests compare both
tables with transformers.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad"),
    *("ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop", "rmsprop_bnb"),
    *("rmsprop_bnb_32bit", "rmsprop_bnb_8bit", "sgd", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
"""Values of `train.optim`."""

_MISSING_PACKAGES = {
    "galore": "galore_torch",
    "lomo": "lomo-optim",
    "adalomo": "lomo-optim",
    "apollo": "apollo_torch",
    "schedule_free": "schedulefree",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
}
# Packages that the train step's image does not have, by the beginning of an optimizer's name.


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule and its settings, which `train.lr_scheduler_kwargs` sets."""

    settings: tuple[str, ...] = ()
    """Names of the settings."""
    needed: tuple[str, ...] = ()
    """Settings of which exactly one has to be set."""


_FLOOR = ("min_lr", "min_lr_rate")
SCHEDULES = {
    "cosine": Schedule(("num_cycles",)),
    "linear": Schedule(),
    "constant": Schedule(),
    "constant_with_warmup": Schedule(),
    "polynomial": Schedule(("lr_end", "power")),
    "inverse_sqrt": Schedule(("timescale",)),
    "cosine_with_restarts": Schedule(("num_cycles",)),
    "cosine_with_min_lr": Schedule(("num_cycles", *_FLOOR), needed=_FLOOR),
    "cosine_warmup_with_min_lr": Schedule(("num_cycles", "warmup_lr_rate", *_FLOOR), needed=_FLOOR),
    "warmup_stable_decay": Schedule(
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio")
        + ("num_cycles",),
        needed=("num_decay_steps",),
    ),
}
"""Values of `train.lr_scheduler_type`."""

_MEASURED = ("reduce_lr_on_plateau", "greedy")
# Schedules that follow the evaluation loss.


def check_optimizer(name: str) -> None:
    """Refuse the name of an optimizer that the train step's image does not have.

    Raises:
        ValueError: there is no such optimizer, or its package is absent.
    """
    if name in OPTIMIZERS:
        return
    packages = (package for start, package in _MISSING_PACKAGES.items() if name.startswith(start))
    if package := next(packages, None):
        raise ValueError(
            f"optim {name} needs the package {package}, which the train step does not have: use "
            f"one of {', '.join(OPTIMIZERS)}"
        )
    raise ValueError(f"no optim '{name}'; {_nearest(name, OPTIMIZERS)}")


def check_schedule(name: str, settings: Iterable[str]) -> None:
    """Refuse the name of a schedule that a run cannot follow, and settings that it does not have.

    Args:
        name: The value of `train.lr_scheduler_type`.
        settings: The keys of `train.lr_scheduler_kwargs`.

    Raises:
        ValueError: there is no such schedule, or it lacks a setting, or has no such setting.
    """
    if name in _MEASURED:
        raise ValueError(
            f"lr_scheduler_type {name} changes the rate by the measured loss, which this step does "
            f"not support: use one of {', '.join(SCHEDULES)}"
        )
    if name not in SCHEDULES:
        raise ValueError(f"no lr_scheduler_type '{name}'; {_nearest(name, SCHEDULES)}")
    schedule, given = SCHEDULES[name], set(settings)
    if unknown := sorted(given - set(schedule.settings)):
        known = ", ".join(schedule.settings) or "no settings"
        raise ValueError(
            f"lr_scheduler_kwargs sets {', '.join(unknown)}, but lr_scheduler_type {name} has "
            f"{known}: remove the others, or use another schedule"
        )
    num_given = len(given.intersection(schedule.needed))
    if schedule.needed and num_given != 1:
        raise ValueError(
            f"lr_scheduler_type {name} needs {' or '.join(schedule.needed)} in "
            f"lr_scheduler_kwargs, of which {num_given or 'none'} is set: set one, or use a "
            f"schedule that needs no setting ({', '.join(_without_settings())})"
        )


def _without_settings() -> list[str]:
    return [name for name, schedule in SCHEDULES.items() if not schedule.needed]


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"use one of {', '.join(names)}"
