"""Ask before training whether the exports of a recipe can be made of its base model.

Tokenizer, chat template, stop tokens, names and widths of the layers are those of the merged model
already, so all checks of an export that need no trained weight are done on the base model.
"""

import logging
from pathlib import Path

from tuneline.quantize import child_process
from tuneline.quantize.child_process import ADVICE_ON_SIGTERM
from tuneline.quantize.config import QuantizeConfig
from tuneline.runtime.signals import raised_on_sigterm

logger = logging.getLogger(__name__)


@raised_on_sigterm(ADVICE_ON_SIGTERM, once=True)
def check_exports(config: QuantizeConfig, *, base_model_dir: str, dataset_dir: str) -> None:
    """Check that each kind of export that the recipe asks for can be made of the base model.

    Args:
        config: the `quantize` section of the recipe.
        base_model_dir: directory that fetch made.
        dataset_dir: directory that prepare made.

    Raises:
        ModelError: an export cannot be made; the message says why, and what to change.
        ToolError: llama.cpp is not installed.
        StoppedError: the process received SIGTERM.
    """
    if config.gptq or config.awq or config.fp8:
        child_process.call(_check_checkpoints, config, Path(base_model_dir))
    if config.gguf:
        child_process.call(_check_gguf, Path(base_model_dir), Path(dataset_dir))


def _check_checkpoints(config: QuantizeConfig, base_dir: Path) -> None:
    from tuneline.quantize.awq.export import check as check_awq
    from tuneline.quantize.fp8.export import check as check_fp8
    from tuneline.quantize.gptq.export import check as check_gptq

    if config.gptq:
        size, note = check_gptq(config, base_dir)
        logger.info("GPTQ can store this model: %s", note or f"group size {size}")
    if config.awq:
        size, note = check_awq(config, base_dir)
        logger.info("AWQ can store this model: %s", note or f"group size {size}")
    if config.fp8:
        logger.info("FP8 can store this model: %d layers", len(check_fp8(base_dir)))


def _check_gguf(base_dir: Path, dataset_dir: Path) -> None:
    from tuneline.quantize.gguf.early import check

    check(base_dir, dataset_dir)
