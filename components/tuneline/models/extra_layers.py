"""Tensors that a checkpoint has beside its architecture's, and experts that it lacks.

Layers for multi-token prediction (MTP) come after the last layer, under the next layer numbers.
transformers has no place for them, and knows only the numbers of the original models.
"""

import json
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE, read_header

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..+)$")


def without_mtp_layers(names: set[str], config: Any, *, called: str) -> set[str]:
    """Return the names of tensors without those of layers for multi-token prediction.

    Args:
        names: names of tensors that the model has no place for.
        config: the model's config.
        called: the model's name, for the log.
    """
    text = config.get_text_config()
    first = text.num_hidden_layers
    end = first + (getattr(text, "num_nextn_predict_layers", None) or 0)
    ignored = set()
    for name in names:
        layer = _LAYER.search(name)
        if layer is not None and first <= int(layer[1]) < end:
            ignored.add(name)
    if ignored:
        logger.info(
            "%s has layers for multi-token prediction, which transformers does not use: %d tensors "
            "are not trained",
            called,
            len(ignored),
        )
    return names - ignored


def check_experts(model_dir: Path, *, called: str) -> None:
    """Check that each layer with experts has the weights of the same experts.

    transformers stacks the experts of a layer when it loads them, and does not say which one is
    missing.

    Raises:
        ModelError: a weight of an expert is missing; the message names it.
    """
    numbers = defaultdict(set)
    for name in _tensor_names(model_dir):
        expert = _EXPERT.match(name)
        if expert is not None:
            numbers[expert[1], expert[3]].add(int(expert[2]))
    expected = set().union(*numbers.values())
    missing = [
        f"{stem}{number}{end}"
        for (stem, end), found in sorted(numbers.items())
        for number in sorted(expected - found)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{called} lacks weights of experts: {missing[0]}{more}. Download the model again"
        )


def _tensor_names(model_dir: Path) -> list[str]:
    index = model_dir / INDEX_FILE
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return [name for file in model_dir.glob("*.safetensors") for name in read_header(file)]
