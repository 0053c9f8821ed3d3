"""Check that the files of an adapter and of a merged model say what the records say.

Hashes show that a file was changed after its step. They do not show that a step wrote something
else than it recorded, such as an adapter of another rank or a tokenizer with another chat template.
This module is importable without torch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    DatasetManifest,
    MergeProof,
    QuantizedModel,
    TrainingSummary,
)
from tuneline.kinds import KINDS
from tuneline.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tuneline.models.tokenizer.files import read_chat_template
from tuneline.models.weight_files import read_header
from tuneline.record import Record

_LORA_SETTINGS = ("r", "lora_alpha", "use_rslora")
_LORA_A = ".lora_A.weight"


@dataclass(frozen=True)
class Stored:
    """An artifact: its record, and its directory if that is known."""

    record: Record
    directory: Path | None


def disagreements(found: Stored, ancestors: Mapping[str, Stored]) -> Iterator[str]:
    """Yield a sentence for each statement of the records that the files of an artifact contradict.

    Args:
        found: the artifact, with its directory.
        ancestors: the artifacts that it was made from, by their keys in `made_from`.
    """
    directory, record = found.directory, found.record
    assert directory is not None
    dataset = ancestors.get(DatasetManifest.role)
    try:
        if isinstance(record, TrainingSummary):
            yield from _adapter(directory, record)
            yield from _template(directory, dataset)
        elif isinstance(record, MergeProof):
            yield from _modules(record, ancestors.get(TrainingSummary.role))
            yield from _template(directory, dataset)
        elif isinstance(record, QuantizedModel) and KINDS[record.kind].has_repo_per_format:
            yield from _template(directory, dataset)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        yield f"cannot be compared with its record: {type(error).__name__}: {error}"


def _adapter(directory: Path, record: TrainingSummary) -> Iterator[str]:
    path = directory / CONFIG_FILE
    settings = record.settings.get("lora")
    if settings is None or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in _LORA_SETTINGS:
        if name in config and name in settings and config[name] != settings[name]:
            yield (
                f"{CONFIG_FILE} has {name} {config[name]}, but {record.filename} says that the "
                f"adapter was trained with {settings[name]}"
            )


def _modules(record: MergeProof, adapter: Stored | None) -> Iterator[str]:
    path = adapter.directory / WEIGHTS_FILE if adapter and adapter.directory else None
    if path is None or not path.is_file():
        return
    number = sum(name.endswith(_LORA_A) for name in read_header(path))
    if number != record.num_merged_modules:
        yield (
            f"{record.filename} says that {record.num_merged_modules} modules were merged, but "
            f"the adapter has {number}"
        )


def _template(directory: Path, dataset: Stored | None) -> Iterator[str]:
    """Compare the chat template with that of the dataset, which has a file if the recipe chose."""
    wanted = dataset.record.files.get(CHAT_TEMPLATE_FILE) if dataset else None
    if wanted is None:
        return
    template = read_chat_template(directory)
    # Reading a template turns \r\n into \n, as Jinja does.
    texts = [] if template is None else [template, template.replace("\n", "\r\n")]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    if wanted not in hashes:
        yield (
            "the chat template of the tokenizer is not that of the dataset: its SHA-256 is "
            f"{hashes[0][:12] if hashes else 'none'}, that of {CHAT_TEMPLATE_FILE} {wanted[:12]}"
        )
