"""Write the settings of rotary embeddings (RoPE) where both transformers 4 and 5 read them.

transformers 5 keeps all of them in `rope_parameters`, which transformers 4 ignores: version 4 would
silently compute with its default frequency and without scaling.
"""

import copy
from typing import Any

# Keys of `rope_parameters` that transformers 4 reads beside `rope_scaling`, not in it.
_BESIDE = ("rope_theta", "partial_rotary_factor")
# The only keys that Phi-3's config class of transformers 4 accepts in `rope_scaling`.
_PHI3_KEYS = ("type", "short_factor", "long_factor")


def with_old_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the names of transformers 4 added.

    Names that are there already are kept. Names are left out if transformers 5 would then read
    other values than it reads from `settings`.
    """
    named = copy.deepcopy(settings)
    for part in (named, named.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict):
            _add_names(part)
    return named if named == settings or _reads_the_same(settings, named) else settings


def _add_names(part: dict[str, Any]) -> None:
    parameters = part["rope_parameters"]
    local: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):
        # One dictionary per type of layer. Version 4 has names for the types of Gemma-3.
        local = parameters.get("sliding_attention") or {}
        parameters = parameters["full_attention"]
    for name in _BESIDE:
        if parameters.get(name) is not None:
            part.setdefault(name, parameters[name])
    if local.get("rope_theta") is not None:
        part.setdefault("rope_local_base_freq", local["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind == "default" or part.get("rope_scaling"):
        return
    scaling = {name: value for name, value in parameters.items() if name not in _BESIDE}
    if part.get("model_type") == "phi3":
        length = scaling.get("original_max_position_embeddings")
        if length is not None:
            part.setdefault("original_max_position_embeddings", length)
        scaling = {"type": kind, **{k: v for k, v in scaling.items() if k in _PHI3_KEYS}}
    part["rope_scaling"] = scaling


def _reads_the_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    # Imported here because transformers takes seconds, and most models need no names.
    from transformers import AutoConfig

    def read(settings: dict[str, Any]) -> Any:
        config = AutoConfig.for_model(**copy.deepcopy(settings)).get_text_config()
        return _without(config.rope_parameters, "type")

    try:
        return bool(read(one) == read(other))
    except (ValueError, KeyError, AttributeError):
        return False


def _without(node: Any, key: str) -> Any:
    if not isinstance(node, dict):
        return node
    return {name: _without(value, key) for name, value in node.items() if name != key}
