"""The files of a checkpoint beside its weights."""

import json
import shutil
from pathlib import Path

from tuneline.models import sampling
from tuneline.models.tokenizer import files as tokenizer_files

_SETTINGS_FILE = "quantize_config.json"
"""File in which gptqmodel repeats the settings of the quantisation."""
_LOG_FILE = "quant_log.csv"
"""File in which gptqmodel lists the loss and the seconds of each layer."""


def take_companions(model_dir: Path, target: Path) -> None:
    """Give a checkpoint the tokenizer and the settings of the merged model.

    gptqmodel saves these files with transformers 5. transformers 4 and servers built on it cannot
    load the tokenizer from such files, or compute with other rotary angles. The files also contain
    a temporary path of this machine. Of the settings that are in `target` already, only
    `quantization_config` is kept. The log of gptqmodel is removed, because its times differ from
    one run to the next.

    Args:
        model_dir: directory of the merged model.
        target: directory of the checkpoint, whose config.json has `quantization_config`.
    """
    quantization = json.loads((target / "config.json").read_text(encoding="utf-8"))
    quantization = quantization["quantization_config"]
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    _drop(quantization, "offload_to_disk_path")
    _write(target / "config.json", {**settings, "quantization_config": quantization})
    if (target / _SETTINGS_FILE).is_file():
        _write(target / _SETTINGS_FILE, quantization)
    (target / _LOG_FILE).unlink(missing_ok=True)
    tokenizer_files.copy_tokenizer(model_dir, target)
    generation = model_dir / sampling.FILE
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _drop(node: object, key: str) -> None:
    if isinstance(node, dict):
        node.pop(key, None)
        for value in node.values():
            _drop(value, key)
