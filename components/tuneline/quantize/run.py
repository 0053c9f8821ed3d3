"""Make one export of the merged model, and check that the export answers like the merged model."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import (
    ImportanceMatrix,
    MergeProof,
    QuantizedModel,
    new_directory,
)
from tuneline.errors import ModelError, RecipeError
from tuneline.kinds import ExportKind
from tuneline.quantize import child_process, formats
from tuneline.quantize.child_process import ADVICE_ON_SIGTERM
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gguf import export as gguf_export
from tuneline.record import Record
from tuneline.runtime.scratch import scratch_directory
from tuneline.runtime.signals import raised_on_sigterm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """The inputs from which an export is made."""

    merge: MergeProof
    """Record of the merged model."""
    merged_dir: Path
    dataset_dir: Path
    gguf_dir: Path | None
    importance_dir: Path | None


@raised_on_sigterm(ADVICE_ON_SIGTERM, once=True)
def convert(*, merged_dir: str, gguf_dir: str) -> QuantizedModel:
    """Convert the merged model to GGUF in f16, and compare the file with the merged model.

    Raises:
        ModelError: `merged_dir` is not a merged model.
        ToolError: the converter is missing, or does not support the model.
        ProofError: the file does not tokenise, render, stop or predict as the merged model does.
        StoppedError: the process received SIGTERM; no output is kept.
    """
    merge = _check_model(merged_dir)
    with new_directory(gguf_dir) as target:
        record = child_process.call(
            gguf_export.convert, merge, merged_dir=Path(merged_dir), target=target
        )
    _log(record)
    return record


@raised_on_sigterm(ADVICE_ON_SIGTERM, once=True)
def run(
    config: QuantizeConfig,
    *,
    format: str,
    merged_dir: str,
    dataset_dir: str,
    quantized_dir: str,
    gguf_dir: str | None = None,
    importance_dir: str | None = None,
) -> QuantizedModel:
    """Make the export `format` and check it.

    Args:
        config: the `quantize` section of the recipe.
        format: name of a format of any kind.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made. Its held-out prompts are used for the check, and
            its training rows for calibration.
        quantized_dir: directory to create for the export; it may exist if it is empty.
        gguf_dir: output of `convert`, which all GGUF formats can share. Default: convert first.
        importance_dir: output of `measure_importance`; only GGUF uses it. Default: measure an
            importance matrix first, if format and config ask for one.

    Raises:
        RecipeError: the format is unknown, or requires an importance matrix but there is none.
        ModelError: `merged_dir` is not a merged model or cannot be quantised, or `gguf_dir` or
            `importance_dir` was made from another model.
        DataError: there are no training rows to calibrate on.
        ToolError: a converter or a quantiser is missing or failed.
        WorldError: an input file has changed since the step that made it recorded its hash.
        ProofError: the export cannot be loaded, or differs from the merged model by more than the
            recipe allows.
        StoppedError: the process received SIGTERM; no output is kept.
    """
    started = time.monotonic()
    try:
        formats.check_name(format)
        if importance_dir is None:
            formats.check_importance([format], config.num_importance_rows)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    inputs = _Inputs(
        merge=_check_model(merged_dir),
        merged_dir=Path(merged_dir),
        dataset_dir=Path(dataset_dir),
        gguf_dir=Path(gguf_dir) if gguf_dir else None,
        importance_dir=Path(importance_dir) if importance_dir else None,
    )
    with new_directory(quantized_dir) as target:
        make = EXPORTERS[formats.FORMATS[format].kind]
        record, parents = make(config, format, inputs, target)
        record = record.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        record.write(target, config, parents=[inputs.merge, *parents])
    _log(record)
    return record


def _gguf(
    config: QuantizeConfig, format: str, inputs: _Inputs, target: Path
) -> tuple[QuantizedModel, list[Record]]:
    """Make a GGUF file in a child process; return its record, and that of the matrix used, if any.

    The matrix is an importance matrix.
    """
    gguf_dir, importance_dir = inputs.gguf_dir, inputs.importance_dir
    if gguf_dir is not None:
        source = QuantizedModel.read(gguf_dir)
        _check_source(gguf_dir, source, inputs, "convert this model to GGUF again")
        source.check_files(gguf_dir)
    if importance_dir is not None:
        given = ImportanceMatrix.read(importance_dir)
        _check_source(importance_dir, given, inputs, "measure the importance matrix of this model")
        given.check_files(importance_dir)
    with scratch_directory(target.parent) as scratch:
        record, matrix = child_process.call(
            gguf_export.export,
            config,
            inputs.merge,
            format=format,
            merged_dir=inputs.merged_dir,
            dataset_dir=inputs.dataset_dir,
            target=target,
            scratch=scratch,
            gguf_dir=gguf_dir,
            importance_dir=importance_dir,
        )
    return record, [matrix] if matrix else []


def _checkpoint(
    config: QuantizeConfig, format: str, inputs: _Inputs, target: Path
) -> tuple[QuantizedModel, list[Record]]:
    """Make a checkpoint of one of the other kinds; return its record, and no further parents."""
    # Imported here, because they import torch, whose memory a GGUF export's parent does not need.
    match formats.FORMATS[format].kind:
        case "awq":
            from tuneline.quantize.awq.export import export
        case "fp8":
            from tuneline.quantize.fp8.export import export
        case _:
            from tuneline.quantize.gptq.export import export
    record = export(
        config,
        format=format,
        merged_dir=inputs.merged_dir,
        dataset_dir=inputs.dataset_dir,
        target=target,
    )
    return record, []


Exporter = Callable[[QuantizeConfig, str, _Inputs, Path], tuple[QuantizedModel, list[Record]]]
EXPORTERS: dict[ExportKind, Exporter] = {
    "gguf": _gguf,
    "gptq": _checkpoint,
    "awq": _checkpoint,
    "fp8": _checkpoint,
}
"""Kind of export -> function that makes such an export and returns the export's record, and the
records of inputs that it was made from in addition to the merged model."""


def _check_model(path: str) -> MergeProof:
    """Return the record of a merged model; refuse an incomplete model before any tool is run."""
    proof = MergeProof.read(path)
    missing = [
        name for name in ("config.json", "tokenizer_config.json") if not Path(path, name).is_file()
    ]
    if missing:
        raise ModelError(
            f"{path} lacks {' and '.join(missing)}, so it is not a whole model: run merge again"
        )
    proof.check_files(path)
    return proof


def _check_source(directory: Path, made: Record, inputs: _Inputs, advice: str) -> None:
    """Refuse an input that was made from another merged model.

    The proof would not detect such an input, because the bounds are wider than e.g. the difference
    between the models of two epochs.

    Args:
        directory: directory of the input.
        made: record of the input.
        inputs: all inputs of the export.
        advice: what the user should do, for the message.
    """
    made_from = made.made_from.get(MergeProof.role)
    expected = inputs.merge.content_sha256()
    if made_from is None or made_from.sha256 != expected:
        origin = f"the merged model {made_from.sha256[:12]}" if made_from else "no merged model"
        raise ModelError(
            f"{directory} was made from {origin}, according to its record, but "
            f"{inputs.merged_dir} is {expected[:12]}: {advice}, or name the merged model that it "
            "was made from"
        )


def _log(record: QuantizedModel) -> None:
    logger.info(
        "%s: %.1f MB, %.2f bits per weight, %.1f s%s",
        record.format,
        record.num_bytes / 1e6,
        record.bits_per_weight,
        record.seconds,
        "".join(f"; {note}" for note in record.notes),
    )
