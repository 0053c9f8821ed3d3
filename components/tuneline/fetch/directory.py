"""Copy a model directory, and check that the model can be tuned."""

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.artifacts import RECORD_FILES
from tuneline.errors import ModelError
from tuneline.fetch.config_sizes import check_sizes
from tuneline.fetch.model_card import made_from
from tuneline.fetch.quantised import SETTINGS_FILES, Quantisation, quantisation_of
from tuneline.fetch.weight_headers import (
    check_complete,
    count_parameters,
    files_in_index,
    longest_side,
    read_headers,
)
from tuneline.models.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from tuneline.models.multimodal import loaded_part
from tuneline.models.stored_quantisation import in_dtype
from tuneline.models.tokenizer.files import TEMPLATES_DIR, copy_templates
from tuneline.models.weight_files import INDEX_FILE, SINGLE_FILE
from tuneline.runtime.source_names import check_link

logger = logging.getLogger(__name__)

_MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read. The tokenizer.json of Gemma, with 262,144 tokens, has 35 MB."""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_READ_LATER = (
    *("generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.json"),
)
"""Files that later steps read as JSON objects, if there are any."""
# Each of these sets of files is a complete tokenizer.
_TOKENIZER_FILES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
)


@dataclass(frozen=True)
class Facts:
    """Properties of a checked model directory."""

    architecture: str
    """First entry of `architectures` in config.json."""
    num_parameters: int
    weights: list[Path]
    """Paths of the weight files that transformers loads."""
    runs_own_code: bool
    """Whether loading the model runs Python code from the model's directory."""
    quantisation: Quantisation | None
    """How the weights are quantised; None: they are not."""


def take(path: Path, target: Path, *, source: str, trusted: bool) -> Quantisation | None:
    """Copy the files of the model in `path` to the empty directory `target`.

    Weights are hard-linked where the file system allows it, because they are large and no step
    modifies them. Quantised weights that training cannot use are converted to bfloat16.

    Args:
        path: the model directory.
        target: an empty directory.
        source: the model's name, for messages.
        trusted: whether the model's own Python code may be run.

    Returns:
        How the weights in `path` are quantised; None: they are not.

    Raises:
        ModelError: the model in `path` cannot be tuned.
    """
    facts = check(path, source=source, trusted=trusted)
    converts = facts.quantisation is not None and not facts.quantisation.is_kept
    weights = {file.name for file in facts.weights}
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name in RECORD_FILES:
            continue
        if file.suffix == ".safetensors":
            if file.name in weights and not converts:
                _link(file, target / file.name)
        elif file.suffix == ".py":
            if trusted:
                shutil.copyfile(file, target / file.name)
        elif converts and file.name in (INDEX_FILE, *SETTINGS_FILES):
            continue
        elif not file.name.endswith((*_PICKLE_SUFFIXES, ".gguf")):
            shutil.copyfile(file, target / file.name)
    copy_templates(path, target)
    if facts.quantisation is not None and converts:
        _dequantise(path, target, facts.quantisation, source)
    if not trusted:
        for name in ("config.json", "tokenizer_config.json"):
            _drop_auto_map(target / name)
    return facts.quantisation


def _dequantise(path: Path, target: Path, quantisation: Quantisation, source: str) -> None:
    # Imported here because it needs torch, which takes seconds, and most models need no conversion.
    from tuneline.fetch.dequantise import write_dequantised

    num_converted = write_dequantised(path, target, quantisation)
    settings = in_dtype(_json(target / "config.json", source), "bfloat16")
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "converted %d weights of %s from %s to bfloat16", num_converted, source, quantisation.name
    )


def check(path: Path, *, source: str, trusted: bool) -> Facts:
    """Check that `path` is a causal language model with a tokenizer and safetensors weights.

    Raises:
        ModelError: the model lacks one of these, or cannot be tuned for another reason.
    """
    names = {file.name for file in path.iterdir()}
    check_complete((path / name for name in sorted(names) if _is_read(name)), source)
    if not (path / "config.json").is_file():
        if ADAPTER_CONFIG in names:
            raise ModelError(
                f"{source} is a LoRA adapter, not a complete model: name the base model that its "
                f"{ADAPTER_CONFIG} points to, or merge the two first"
            )
        if not any(name.endswith(".safetensors") for name in names):
            raise ModelError(_explain_no_model(path, source, sorted(names)))
        raise ModelError(f"{source} has no config.json: it is not a transformers model directory")
    if ADAPTER_CONFIG in names:
        # transformers would load the base model that this file names, with its adapter.
        raise ModelError(
            f"{source} holds a complete model and a LoRA adapter ({ADAPTER_CONFIG}), and "
            "transformers loads the adapter's base model in place of the complete one. Put the one "
            "to be tuned into a directory of its own: either without the adapter's files, or "
            "merged with the adapter"
        )
    for file in (*sorted(path.iterdir()), *(path / TEMPLATES_DIR).glob("*")):
        # Weights may be links to a store: no file but one of weights can pass for them.
        if file.is_file() and file.suffix != ".safetensors":
            check_link(file, path, ModelError)
    weights = _weights(path, source)
    check_complete(weights, source)
    if not any(files <= names for files in _TOKENIZER_FILES):
        raise ModelError(
            f"{source} has no tokenizer (no tokenizer.json, tokenizer.model, or vocab.json with "
            "merges.txt): copy the tokenizer files of the original model into the same directory"
        )
    config = _json(path / "config.json", source)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(x, str) for x in architectures):
        raise ModelError(
            f"{source}: architectures in config.json is {architectures!r:.100}, but must be a list "
            'of names, e.g. ["LlamaForCausalLM"]'
        )
    if not architectures:
        raise ModelError(
            f"{source} names no architecture in config.json: "
            'add e.g. "architectures": ["LlamaForCausalLM"]'
        )
    runs_own_code = _check_own_code(path, config, source=source, trusted=trusted)
    for name in _READ_LATER:
        if (path / name).is_file():
            _json(path / name, source)
    loaded_part(config, source=source)
    quantisation = quantisation_of(config, source=source, original=made_from(path))
    shapes = read_headers(weights, source)
    check_sizes(config, num_tensors=len(shapes), largest=longest_side(shapes), source=source)
    if quantisation and quantisation.is_kept and any(".experts." in name for name in shapes):
        # transformers stacks experts when it loads them, and cannot stack packed ones.
        quantisation = dataclasses.replace(quantisation, is_kept=False)
    return Facts(
        architecture=architectures[0],
        num_parameters=count_parameters(shapes),
        weights=weights,
        runs_own_code=runs_own_code,
        quantisation=quantisation,
    )


def _is_read(name: str) -> bool:
    """Return whether a file of a model is read whatever the index of its weights names."""
    return name == SINGLE_FILE or name.endswith((".json", ".jinja", ".model", ".txt"))


def _explain_no_model(path: Path, source: str, names: list[str]) -> str:
    """Return the error message for a directory that is no model; checkpoints in it are named."""
    within = [name for name in names if (path / name / "config.json").is_file()]
    if within:
        # Trainers save checkpoint-500, checkpoint-1000 and so on.
        within.sort(key=lambda name: (len(name), name))
        return (
            f"{source} is not a model, but holds {len(within)} of them: name one, e.g. "
            f"{source}/{within[-1]}"
        )
    adapters = [name for name in names if (path / name / ADAPTER_CONFIG).is_file()]
    if adapters:
        return (
            f"{source} holds only LoRA adapters ({', '.join(adapters[:3])}), not complete models: "
            f"name the base model that the {ADAPTER_CONFIG} of one points to, or merge the two "
            "first"
        )
    return explain_missing_weights(source, names)


def explain_missing_weights(source: str, names: list[str]) -> str:
    """Return the error message for a model whose files `names` include no safetensors file."""
    pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if pickled:
        return (
            f"{source} has its weights only as pickle ({pickled[0]}), which can run code when it "
            "is opened: name a revision with safetensors, or, if you trust the file, convert it "
            "by loading it in transformers and calling save_pretrained"
        )
    if gguf:
        return (
            f"{source} has its weights only as GGUF ({gguf[0]}): name that .gguf file itself or, "
            "preferably, the safetensors model that it was made from"
        )
    return f"{source} has no safetensors weights: it is not a model that can be tuned"


def _weights(path: Path, source: str) -> list[Path]:
    """Return the weight files that transformers loads."""
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).is_file():
        shards = files_in_index(_json(path / INDEX_FILE, source).get("weight_map"), source)
        missing = [name for name in shards if not (path / name).is_file()]
        if missing or not shards:
            raise ModelError(
                f"{source} lacks {len(missing)} of the {len(shards)} weight files that "
                f"{INDEX_FILE} names ({', '.join(missing[:3])}): download it again"
            )
        return [path / name for name in shards]
    names = sorted(file.name for file in path.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{source} has safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE}: it is "
            "not a complete transformers model"
        )
    raise ModelError(explain_missing_weights(source, names))


def _check_own_code(path: Path, config: dict[str, Any], *, source: str, trusted: bool) -> bool:
    """Return whether the model's own code will run; raise ModelError if needed but not trusted."""
    tokenizer_config = path / "tokenizer_config.json"
    tokenizer = _json(tokenizer_config, source) if tokenizer_config.is_file() else {}
    if not config.get("auto_map") and not tokenizer.get("auto_map"):
        return False
    if trusted:
        logger.warning("%s runs Python code of its own: trust_remote_code allows it", source)
        return True
    # Many repositories still contain code that was written before transformers supported their
    # model; it is neither needed nor run. (Imported here because transformers takes seconds.)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        needed_for = f"model ({config.get('model_type')})"
    elif tokenizer.get("auto_map") and not (path / "tokenizer.json").is_file():
        needed_for = "tokenizer"
    else:
        logger.info("%s has code of its own, which is not run: transformers supports it", source)
        return False
    raise ModelError(
        f"{source} needs Python code of its own for its {needed_for}, which is not run by default: "
        f"read that code, then set fetch.trust_remote_code: {source}"
    )


def _drop_auto_map(file: Path) -> None:
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.pop("auto_map", None) is not None:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _json(file: Path, source: str) -> dict[str, Any]:
    num_bytes = file.stat().st_size
    if num_bytes > _MAX_JSON_BYTES:
        raise ModelError(
            f"{source}: {file.name} has {num_bytes:,} bytes, but at most {_MAX_JSON_BYTES:,} are "
            "read: no model has such a file"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: {file.name} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(
            f"{source}: {file.name} contains a {type(values).__name__}, but must be a mapping of "
            "keys to values"
        )
    return values


def _link(file: Path, target: Path) -> None:
    # Files in the Hub's cache are symlinks to blobs. The hard link must point to the blob, not to
    # the symlink.
    real = file.resolve()
    try:
        os.link(real, target)
    except OSError:
        # The target is on another file system, or on one without hard links.
        shutil.copyfile(real, target)
