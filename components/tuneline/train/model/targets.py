"""Which modules an adapter is attached to: what the recipe's `lora.target_modules` means.

peft attaches the adapter to most of them. In a model with routed experts, however, it understands
gate_proj, up_proj and down_proj as the weights of the experts, which had these names before
transformers 5. There, shared experts and dense MLPs get their adapter from `attach_to_the_rest`.
"""

import copy
import difflib
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from tuneline.errors import ModelError, TrainingError
from tuneline.models.linear_layers import (
    has_experts,
    is_linear,
    linear_layers,
    short_names,
    trained_by_default,
    unmergeable,
)
from tuneline.models.nf4 import empty_model
from tuneline.train.config import LoraConfig
from tuneline.train.model.expert_targets import check_experts, target_experts

logger = logging.getLogger(__name__)

_NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names that peft takes for those of routers and experts in a model that has experts."""


def check_targets(lora: LoraConfig, base_model_dir: str | Path) -> None:
    """Check that the base model has the modules that the recipe names, without reading weights.

    Raises:
        ModelError: a name matches no module, or a module that cannot be trained in this way.
    """
    model: Any = empty_model(base_model_dir)
    check_experts(lora, model)
    modules = adapted_modules(model, lora)
    for module, reason in unmergeable(model, modules).items():
        raise ModelError(
            f"an adapter on '{module}' cannot be merged, because this layer {reason}: name other "
            f"linear layers of {type(model).__name__} in lora.target_modules, or use another base "
            "model"
        )
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    for module in _named(model, "modules_to_save", lora.modules_to_save):
        if is_tied and model.get_submodule(module) in ends:
            raise ModelError(
                f"lora.modules_to_save names '{module}', but the input and output embeddings of "
                f"{type(model).__name__} are one matrix here (tie_word_embeddings): an adapter "
                "cannot replace both as one; remove it from lora.modules_to_save"
            )
    logger.info("%s", _reach(model, modules, lora))


def adapted_modules(model: Any, lora: LoraConfig) -> list[str]:
    """Return the full names of the linear layers that get an adapter.

    Args:
        model: the base model, with or without weights, before it has an adapter.
        lora: the recipe's LoRA settings.

    Raises:
        ModelError: a name of the recipe matches no linear layer, or only the output layer.
    """
    if lora.target_modules == "all-linear":
        modules = list(linear_layers(model))
    elif lora.target_modules == "auto":
        modules = trained_by_default(model)
    else:
        modules = _named(model, "target_modules", lora.target_modules)
        head = model.get_output_embeddings()
        for module in modules:
            if model.get_submodule(module) is head:
                raise ModelError(
                    f"lora.target_modules names '{module}', the output layer, which cannot have an "
                    "adapter: remove it, or train it in full as one of lora.modules_to_save"
                )
    # A module that is trained in full gets no adapter.
    saved = lora.modules_to_save
    modules = [name for name in modules if not any(f".{each}." in f".{name}." for each in saved)]
    if not modules:
        raise ModelError(
            f"{type(model).__name__} has no linear layers that can have an adapter: use another "
            "base model"
        )
    return modules


def lora_config(lora: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """Return peft's settings of the adapter, for the modules that peft can attach it to.

    Args:
        lora: the recipe's LoRA settings.
        model: the base model, before it has an adapter.
    """
    modules = adapted_modules(model, lora)
    if has_experts(model):
        modules = [name for name in modules if _last(name) not in _NAMES_OF_EXPERTS]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=short_names(model, modules) or DUMMY_TARGET_MODULES,
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
    )
    target_experts(config, lora, model)
    return config


def attach_to_the_rest(model: peft.PeftModel, modules: list[str]) -> None:
    """Attach the adapter to those of the modules to which peft alone did not attach it.

    The adapter's settings name their weights as `target_parameters`. peft reads these literally
    when it loads the adapter, and a linear layer whose weight has a low-rank update computes the
    same as one with an adapter.

    Args:
        model: the model, which has the adapter on its other modules.
        modules: full names of all linear layers that get an adapter.

    Raises:
        TrainingError: other linear layers than these have an adapter now.
    """
    base: Any = model.get_base_model()
    settings: Any = model.peft_config["default"]
    rest = [name for name in modules if not isinstance(base.get_submodule(name), LoraLayer)]
    weights = {f"{name}.weight" for name in short_names(base, rest)}
    for stack in dict.fromkeys(_stack(base, name) for name in rest):
        layers = base.get_submodule(stack)
        # peft asks the module that it is given whether linear layers are in 4 bits.
        layers.is_loaded_in_4bit = getattr(base, "is_loaded_in_4bit", False)
        names = [name.removeprefix(f"{stack}.") for name in rest if name.startswith(f"{stack}.")]
        # A list of layers has no config, by whose model type peft would know a model with experts.
        within = copy.copy(settings)
        within.target_modules, within.modules_to_save = set(names), None
        within.target_parameters = None
        peft.inject_adapter_in_model(within, layers)
    if rest:
        settings.target_parameters = sorted({*weights, *(settings.target_parameters or ())})
        if settings.target_modules == DUMMY_TARGET_MODULES:
            settings.target_modules = set()
    adapted = {
        name
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    }
    if adapted != set(modules):
        odd = sorted(adapted ^ set(modules))
        raise TrainingError(
            f"peft has attached the adapter to other modules than asked for: {len(odd)} differ, "
            f"first {odd[0]}. Name the modules in lora.target_modules by their full names"
        )


def _stack(model: nn.Module, name: str) -> str:
    """Return the name of the outermost list of layers that a module is in."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next(path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList))


def _reach(model: Any, modules: list[str], lora: LoraConfig) -> str:
    """Say which linear layers of the model get an adapter, and which do not."""
    counts = Counter(map(_last, modules))
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    others = sorted({_last(name) for name in set(linear_layers(model)) - set(modules)})
    without = [*others, *(["the routed experts"] if has_experts(model) else [])]
    if lora.experts:
        words += ") and all routed experts"
        without.remove("the routed experts")
    else:
        words += ")"
    return f"the adapter is on {len(modules)} linear layers ({words}" + (
        f"; without an adapter: {', '.join(without)}" if without else ""
    )


def _named(model: PreTrainedModel, key: str, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that the recipe's names for a key refer to."""
    what = "linear layer" if key == "target_modules" else "linear layer or embedding"
    candidates = [
        name
        for name, module in model.named_modules()
        if is_linear(module) or (key == "modules_to_save" and isinstance(module, nn.Embedding))
    ]
    modules = []
    for wanted in names:
        matched = [name for name in candidates if is_called(name, wanted)]
        if not matched:
            raise ModelError(
                f"lora.{key} names '{wanted}', but {type(model).__name__} has no {what} of this "
                f"name: {_hint(model, wanted, candidates)}"
            )
        modules += matched
    return list(dict.fromkeys(modules))


def _hint(model: PreTrainedModel, wanted: str, candidates: list[str]) -> str:
    """Say what to write instead of a name that no module has."""
    if has_experts(model) and _last(wanted) in _NAMES_OF_EXPERTS:
        return (
            "its routed experts are not linear layers of their own; set lora.target_modules to "
            "auto, and lora.experts to true for an adapter on the experts too"
        )
    ends = sorted(set(map(_last, candidates)))
    near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"set lora.target_modules to auto, or name some of {', '.join(ends)}"


def is_called(module: str, name: str) -> bool:
    """Return whether a module's full name equals a name in the recipe, or ends with that name."""
    return module == name or module.endswith(f".{name}")


def _last(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]
