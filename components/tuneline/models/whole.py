"""Load a model only if each of its weights comes from the model's files, and each weight is used.

transformers initialises a weight that the files lack with random values, and ignores a tensor that
the model has no place for. It reports both, in its log alone.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.extra_layers import check_experts, without_mtp_layers
from tuneline.models.stored_quantisation import stored_type, use_dtype

_NUM_NAMED = 3
"""Number of tensors that an error message names."""


def load_whole(model_dir: str | Path, *, called: str | None = None, **arguments: Any) -> Any:
    """Load a causal language model with transformers; refuse one that is not whole.

    The model generates greedily: of its generation settings only the special tokens are kept.

    Args:
        model_dir: the model directory.
        called: the model's name in messages; None: the directory.
        **arguments: arguments of `from_pretrained`.

    Raises:
        ModelError: weights are missing, left over or of another shape; the message names them.
        OSError: transformers cannot load the model.
        ValueError: transformers cannot load the model.
    """
    # Imported here because fetch and the memory estimate import this package without torch.
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # Any: transformers does not annotate these.
    auto: Any = AutoModelForCausalLM
    generation_config: Any = GenerationConfig
    model, report = auto.from_pretrained(
        str(model_dir),
        output_loading_info=True,
        # Otherwise the names stand in the log only. `check_report` refuses them.
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        **arguments,
    )
    called = called or str(model_dir)
    report["unexpected_keys"] = without_mtp_layers(
        set(report["unexpected_keys"]), model.config, called=called
    )
    check_report(report, called)
    dtype = arguments.get("dtype")
    if isinstance(dtype, torch.dtype) and stored_type(model_dir) is not None:
        use_dtype(model, dtype)
    # All steps generate greedily. A base model's penalties would make that something else.
    given = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = generation_config(
        **{name: getattr(given, name, None) for name in names}
    )
    return model


def check_report(report: dict[str, Any], called: str) -> None:
    """Check what transformers reports about loading the model that is `called` so.

    Raises:
        ModelError: weights are missing, left over or of another shape; the message names them.
    """
    shapes = [
        f"{name} of shape {tuple(found)} for {tuple(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    for names, what in (
        (shapes, "has weights of other shapes than its config.json describes"),
        (report["missing_keys"], "lacks weights of its architecture, which would be random"),
        (report["unexpected_keys"], "has weights that its architecture does not use"),
    ):
        if names:
            raise ModelError(
                f"{called} {what}: {_some(names)}. Take weights and config.json of one model, and "
                "a model that this version of transformers supports"
            )
    if report["error_msgs"]:
        raise ModelError(f"transformers cannot load {called}: {report['error_msgs'][0]}")


def check_names(model_dir: str | Path, *, called: str) -> None:
    """Check that a model is whole by the headers of its files, without reading weights.

    Raises:
        ModelError: the model is not whole, or transformers does not support it.
    """
    check_experts(Path(model_dir), called=called)
    try:
        if stored_type(model_dir) is None:
            load_whole(model_dir, called=called, device_map="meta")
        else:
            _check_4bit_names(model_dir, called)
    except ModelError:
        raise  # the message is complete
    except Exception as error:
        # A config.json of others can hold any value, and its classes check few of them.
        raise ModelError(
            f"transformers does not support the model {called} "
            f"({' '.join(str(error).split())[:200]}): use another base model"
        ) from error


def _check_4bit_names(model_dir: str | Path, called: str) -> None:
    """Check the names and the true shapes of 4-bit weights, which transformers can only unpack."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneline.models.checkpoint import Checkpoint

    config = AutoConfig.from_pretrained(str(model_dir))
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model_class: Any = type(auto.from_config(config))
    _, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict={
            name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for name, spec in Checkpoint(model_dir).specs.items()
        },
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map="meta",
    )
    check_report(report, called)


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:_NUM_NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
