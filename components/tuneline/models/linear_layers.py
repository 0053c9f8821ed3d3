"""Which linear layers of a model an adapter can be attached to.

Only PyTorch's own linear layers, and bitsandbytes' in 4 bits, count. Subclasses of other names,
such as the routers of some families, compute something else; and the merge step cannot add an
adapter to convolutions, or to GPT-2's Conv1D.

Routed experts are not linear layers: transformers keeps those of a layer in two parameters with
three dimensions, in a module that is called experts in all families.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from tuneline.errors import ModelError
from tuneline.models.nf4 import empty_model

_KINDS = frozenset({"Linear", "Linear4bit"})

_ROUTING = re.compile(r"(^|\.)(router|gate|\w*expert_gate|indexer)(\.|$)")
"""Parts of the names of layers that decide to which experts, or to which earlier tokens, a token
goes."""


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return all linear layers but the output layer, by their names."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    }


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, in 4 bits or not."""
    return isinstance(module, nn.Linear) and type(module).__name__ in _KINDS


def trained_by_default(model: Any) -> list[str]:
    """Return the names of the linear layers of attention, MLPs and shared experts of the text.

    Routers are left out, and so are the encoders of images and sounds, and layers that share their
    weight with another one.
    """
    layers = linear_layers(model)
    inside = {id(module) for module in model.get_decoder().modules()}
    if not any(id(layer) in inside for layer in layers.values()):
        # A model whose output layer is called decoder.
        inside = {id(layer) for layer in layers.values()}
    shared = _shared(model)
    return [
        name
        for name, layer in layers.items()
        if id(layer) in inside and not _ROUTING.search(name) and f"{name}.weight" not in shared
    ]


def check_layers(model_dir: str | Path, *, called: str) -> None:
    """Check that a model has linear layers to train, without reading weights.

    Raises:
        ModelError: there are none.
    """
    model = empty_model(model_dir)
    if not trained_by_default(model):
        raise ModelError(
            f"{called} ({type(model).__name__}) has no linear layers that can have an adapter: use "
            "another base model"
        )


def unmergeable(model: Any, names: Collection[str]) -> dict[str, str]:
    """Return which of the layers the merge step cannot add an adapter to, and why, in words.

    Args:
        model: a model without weights, as `nf4.empty_model` returns it.
        names: names of linear layers.
    """
    shared = _shared(model)
    joined = [
        re.compile(pattern)
        for conversion in get_model_conversion_mapping(model)
        if getattr(conversion, "operations", None)
        for pattern in conversion.target_patterns
    ]
    reasons = {}
    for name in names:
        weight = f"{name}.weight"
        if weight in shared:
            reasons[name] = "shares its weight with another layer"
        elif any(pattern.search(weight) for pattern in joined):
            reasons[name] = "has a weight that the model's files join with others"
    return reasons


def has_experts(model: nn.Module) -> bool:
    """Return whether a model routes tokens to experts."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def short_names(model: nn.Module, wanted: Collection[str]) -> list[str]:
    """Return the shortest ends of names that together name these modules, and no other module.

    If all layers of the attention of a Llama are wanted: k_proj, o_proj, q_proj and v_proj.
    """
    kept = set(wanted)
    taken = {end for name, _ in model.named_modules() if name not in kept for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in taken), name) for name in kept})


def _shared(model: Any) -> set[str]:
    """Return the names of weights that two modules share."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, shortest first; the last one is the whole name."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
