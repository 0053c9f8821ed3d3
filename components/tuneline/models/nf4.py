"""The 4-bit base that training sees: how it is made, which layers are in it, what they hold.

Train and merge must agree on every bit of it, so the rule is here, once. Torch and transformers
are imported when a function is called: this module is importable without them.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

logger = logging.getLogger(__name__)

BLOCKSIZE = 64


def keep_plain_layout_on_cpu() -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, Linear4bit rewrites its weights in place at the first forward in eval mode. Afterwards
    gradients through the frozen base are wrong without a sign of it, and dequantising returns
    garbage (bitsandbytes 0.50.2). Call before a model is made; calling twice does no harm.
    """
    import bitsandbytes.nn.modules as modules

    modules.has_avx512bf16 = lambda: False


def quantization_config(compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """Return NF4 in blocks of 64 whose scales are themselves quantised to 8 bits."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(
    base_model_dir: str | Path,
    *,
    dtype: "torch.dtype",
    device: str,
    quantized: bool,
) -> "PreTrainedModel":
    """Load a causal language model from a directory, its linear layers in NF4 if `quantized`.

    Args:
        base_model_dir: safetensors and config.json.
        dtype: type of everything that is not 4-bit, and of the computation.
        device: "cpu", "cuda" or "cuda:N".
        quantized: whether linear layers are kept in 4 bits.

    Raises:
        ModelError: transformers cannot make a model of the directory.
    """
    from transformers import AutoModelForCausalLM

    keep_plain_layout_on_cpu()
    try:
        with _no_progress_bar():
            return AutoModelForCausalLM.from_pretrained(
                str(base_model_dir),
                dtype=dtype,
                device_map={"": device},
                quantization_config=quantization_config(dtype) if quantized else None,
                use_safetensors=True,
            )
    except (ValueError, OSError) as error:
        raise ModelError(f"transformers cannot load {base_model_dir}: {error}") from error


def empty_model(base_model_dir: str | Path) -> "PreTrainedModel":
    """Build the model of a directory without its weights: names and shapes only.

    Raises:
        ModelError: config.json is missing or names no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(base_model_dir, "config.json").is_file():
        raise ModelError(
            f"{base_model_dir} has no config.json: give a model directory, as fetch makes it"
        )
    try:
        config = AutoConfig.from_pretrained(str(base_model_dir))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise ModelError(f"transformers knows no model for {base_model_dir}: {error}") from error


def quantized_modules(model: "PreTrainedModel") -> set[str]:
    """Name the modules of an empty model that `load_base(quantized=True)` keeps in 4 bits.

    transformers itself is asked: it leaves out the output embeddings, what is tied to them, and
    what an architecture wants in fp32.
    """
    import bitsandbytes
    import torch
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer

    config = quantization_config(torch.float32)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(
        model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    replaced = replace_with_bnb_linear(
        model, modules_to_not_convert=skipped, quantization_config=config
    )
    return {
        name
        for name, module in replaced.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def file_names(model: "PreTrainedModel") -> dict[str, str]:
    """Name the weights of an empty model as its checkpoints do, by the model's own names.

    transformers renames some families' weights on the way (Gemma-3 with its vision tower), and is
    asked for the way back. Weights that it would also cut or join are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = model.state_dict()
    names = {id(weight): name for name, weight in weights.items()}
    saved = revert_weight_conversion(model, weights)
    return {names[id(weight)]: name for name, weight in saved.items() if id(weight) in names}


def round_trip(weight: "torch.Tensor", *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """Return what a weight is worth after NF4 with double quantisation, in fp32 on the CPU.

    Args:
        weight: as the base's file has it, any floating type.
        dtype: the type in which training loaded the base; quantising starts from it.
        device: where to quantise; rounding may differ in the last bit between devices.
    """
    import bitsandbytes.functional as bnb
    import torch

    packed, state = bnb.quantize_4bit(
        weight.to(device=device, dtype=dtype).contiguous(),
        blocksize=BLOCKSIZE,
        compress_statistics=True,
        quant_type="nf4",
    )
    # The product of code and scale is rounded to this type; fp32 keeps all of it.
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state).cpu()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
