"""Compare the sizes that a config.json or a GGUF file states with the tensors that are there.

transformers builds a model by these numbers before it looks at a weight: with a billion layers it
would build for days.
"""

from typing import Any

from tuneline.errors import ModelError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
"""Keys whose value is a number of layers; each layer has a tensor at least."""
_WIDTHS = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "head_dim"),
    *("num_attention_heads", "n_head", "embedding_length", "attention.head_count"),
)
"""Keys whose value is no larger than the longest side of some tensor."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "expert_count")
"""Keys whose value is a number of tensors, or the side of one."""


def check_sizes(
    config: dict[str, Any],
    *,
    num_tensors: int,
    largest: int,
    source: str,
    described_in: str = "config.json",
) -> None:
    """Check that a model's files can hold what its config.json describes.

    Args:
        config: the content of config.json, or the numbers of a GGUF file without the name of the
            architecture in front.
        num_tensors: number of tensors in the files.
        largest: longest side of a tensor in the files.
        source: the model's name, for messages.
        described_in: what has these numbers, for messages.

    Raises:
        ModelError: a number is larger than the files allow, or no number.
    """
    limits = {
        **dict.fromkeys(_LAYERS, num_tensors),
        **dict.fromkeys(_WIDTHS, largest),
        **dict.fromkeys(_EXPERTS, max(num_tensors, largest)),
    }
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for name, limit in limits.items():
            value = part.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ModelError(
                    f"{source}: {name} in {described_in} is {value!r:.100}, but must be a whole "
                    "number"
                )
            if value > limit:
                raise ModelError(
                    f"{source}: {name} in {described_in} is {value}, but the model's files hold "
                    f"{num_tensors} tensors, of which the longest side is {largest}: take weights "
                    f"and {described_in} of one model"
                )
