"""The base model in 4 bits (NF4): load it, find its quantised layers, compute their weights.

Train and merge must use exactly the same quantised weights, so only this module defines them.
Torch, transformers and bitsandbytes are imported inside the functions, because memory estimates for
`tuneline plan` import this module on machines without these packages.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneline.errors import ModelError
from tuneline.models.nf4_layout import BLOCKSIZE
from tuneline.models.stored_quantisation import quantization_in, stored_type
from tuneline.models.whole import load_whole

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def keep_plain_layout_on_cpu() -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    On such a CPU, Linear4bit rewrites its weights in place in the first forward pass in eval mode.
    Afterwards gradients through the frozen base are silently wrong, and dequantising returns
    garbage (bitsandbytes 0.50.2). Call this before loading a model; further calls do nothing.
    """
    import bitsandbytes.nn

    modules: Any = bitsandbytes.nn.modules
    modules.has_avx512bf16 = lambda: False


def quantization_config(compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """Return the settings for NF4 with blocks of 64 and double quantisation, experts included.

    Double quantisation means that the scales of the blocks are quantised too, to 8 bits.
    """
    from tuneline.models.experts.loading import ExpertsConfig

    config_class: Any = ExpertsConfig
    config: BitsAndBytesConfig = config_class(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return config


def load_base(
    base_model_dir: str | Path,
    *,
    dtype: "torch.dtype",
    device: str,
    quantized: bool,
) -> "PreTrainedModel":
    """Load a causal language model from a directory.

    Args:
        base_model_dir: directory with safetensors and config.json.
        dtype: type to compute in, and type of all weights that are not quantised.
        device: "cpu", "cuda" or "cuda:N".
        quantized: whether to quantise the linear layers and the stacks of experts to NF4. Weights
            that the files hold in 4 bits stay as they are.

    Raises:
        ModelError: transformers cannot load the model, or not all of its weights; or the files hold
            4-bit weights, but `quantized` is false.
    """
    keep_plain_layout_on_cpu()
    stored = stored_type(base_model_dir)
    if stored and not quantized:
        raise ModelError(
            f"the weights of {base_model_dir} are stored in 4 bits ({stored}), but unquantised "
            "ones are asked for: set train.load_in_4bit to true, or take the model in 16 bits that "
            "it was made from as base_model"
        )
    # Given as None, it would make transformers forget how the files are quantised.
    quantization: dict[str, Any] = {}
    if quantized and not stored:
        quantization = {"quantization_config": quantization_config(dtype)}
    try:
        with _no_progress_bar():
            model: PreTrainedModel = load_whole(
                base_model_dir,
                dtype=dtype,
                device_map={"": device},
                **quantization,
            )
            return model
    except ModelError:
        raise  # the message is complete
    except (ValueError, OSError) as error:
        raise ModelError(
            f"transformers cannot load {base_model_dir} ({error}): run the step that made it "
            "again, or use another base model"
        ) from error


def quantization_type(
    base_model_dir: str | Path, load_in_4bit: bool
) -> Literal["nf4", "fp4", "none"]:
    """Return the number format of a base model's weights after `load_base`, for records.

    Args:
        base_model_dir: directory of the base model.
        load_in_4bit: whether it is loaded with `quantized`.
    """
    return stored_type(base_model_dir) or ("nf4" if load_in_4bit else "none")


def empty_model(base_model_dir: str | Path) -> "PreTrainedModel":
    """Return the model of a directory on the meta device: names and shapes without weights.

    Raises:
        ModelError: config.json is missing or names no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(base_model_dir, "config.json").is_file():
        raise ModelError(
            f"{base_model_dir} has no config.json: give the directory that the fetch step made"
        )
    try:
        config = AutoConfig.from_pretrained(str(base_model_dir))
        auto_model: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = auto_model.from_config(config)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"transformers does not support the model in {base_model_dir} ({error}): use another "
            "base model"
        ) from error
    return model


def quantized_modules(model: "PreTrainedModel") -> set[str]:
    """Return the names of the linear layers that `load_base(quantized=True)` quantises.

    It quantises stacks of experts too; `experts.quantized_experts` returns these.
    transformers selects the modules: it leaves out the output embeddings, modules tied to them and
    modules that the architecture requires in fp32. Side effect: the selected layers of `model` are
    replaced by 4-bit layers.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    config = quantization_config(torch.float32)
    stored = quantization_in(model.config.to_dict())
    if stored is not None:
        config = AutoQuantizationConfig.from_dict(stored)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(
        model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    replaced = replace_with_bnb_linear(
        model, modules_to_not_convert=skipped, quantization_config=config
    )
    return {name for name, module in replaced.named_modules() if isinstance(module, Linear4bit)}


def quantized_fraction(model: "PreTrainedModel") -> float:
    """Return the fraction, 0 to 1, of a loaded model's parameters that are held in 4 bits."""
    from bitsandbytes.nn.modules import Params4bit

    from tuneline.models.experts import expert_modules

    in_4_bits: int = sum(
        weight.quant_state.shape.numel()
        for weight in model.parameters()
        if isinstance(weight, Params4bit)
    )
    for module in expert_modules(model).values():
        in_4_bits += sum(stack.numel for stack in getattr(module, "nf4_stacks", {}).values())
    others = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and ".lora_" not in name and ".modules_to_save." not in name
    )
    return in_4_bits / (in_4_bits + others)


def file_names(model: "PreTrainedModel") -> dict[str, str]:
    """Return a mapping from a weight's name in the model to its name in the checkpoint files.

    transformers renames the weights of some model families when it loads them (e.g. Gemma-3 with a
    vision tower). This function reverts the renaming with transformers' own code. Weights that
    transformers splits or joins on loading are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = model.state_dict()
    names = {id(weight): name for name, weight in weights.items()}
    saved = revert_weight_conversion(model, weights)
    return {names[id(weight)]: name for name, weight in saved.items() if id(weight) in names}


def round_trip(weight: "torch.Tensor", *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """Return a weight after NF4 quantisation and dequantisation, in fp32 on the CPU.

    Args:
        weight: a weight of the base model, in any floating-point type.
        dtype: type in which training loaded the weight before quantising it.
        device: device to quantise on; rounding may differ in the last bit between devices.
    """
    import bitsandbytes.functional as bnb
    import torch

    packed, state = bnb.quantize_4bit(
        weight.to(device=device, dtype=dtype).contiguous(),
        blocksize=BLOCKSIZE,
        compress_statistics=True,
        quant_type="nf4",
    )
    # Dequantising multiplies code and scale and rounds the product to this type. fp32 needs no
    # rounding.
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state).cpu()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    progress_bar: Any = transformers_logging
    was_enabled = progress_bar.is_progress_bar_enabled()
    progress_bar.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            progress_bar.enable_progress_bar()
