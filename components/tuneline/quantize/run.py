"""Make one export of the merged model and check that it loads and answers."""

import logging
import tempfile
import time
from pathlib import Path

from tuneline.artifacts import (
    ImportanceMatrix,
    MergeProof,
    QuantizedModel,
    new_directory,
)
from tuneline.errors import ModelError, RecipeError
from tuneline.quantize import child_process, formats
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.child_process import STOPPED
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gguf import export
from tuneline.quantize.threads import few_threads
from tuneline.record import Record
from tuneline.runtime.signals import raised_on_sigterm

logger = logging.getLogger(__name__)


@raised_on_sigterm(STOPPED, once=True)
def convert(*, merged_dir: str, gguf_dir: str) -> QuantizedModel:
    """Convert the merged model to GGUF in f16 and hold it against transformers.

    Raises:
        ModelError: the directory is not a merged model.
        ToolError: the converter is missing or refused the model.
        ProofError: the file does not split, render, stop or predict as the merged model does.
        StoppedError: SIGTERM came; nothing is kept.
    """
    merge = _check_model(merged_dir)
    with new_directory(gguf_dir) as target:
        record = child_process.call(
            export.convert, merge, merged_dir=Path(merged_dir), target=target
        )
    _log(record)
    return record


@raised_on_sigterm(STOPPED, once=True)
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
        config: the recipe's part.
        format: one of the GGUF or GPTQ formats.
        merged_dir: the merged model.
        dataset_dir: held-out prompts for the check, training rows for GPTQ's calibration.
        quantized_dir: where the export is put; must not exist or be empty.
        gguf_dir: what `convert` made, so that formats share it; default: convert first.
        importance_dir: what `measure_importance` made, likewise; default: measure it first where
            the config asks for it. GPTQ has no use for it.

    Raises:
        RecipeError: the format is unknown, or needs an importance matrix.
        ModelError: the directory is not a merged model, or cannot be quantised; or `gguf_dir` or
            `importance_dir` was made from another.
        DataError: no training rows to calibrate on.
        ToolError: a converter or a quantiser is missing or failed.
        WorldError: a file of theirs is not the one that its step left.
        ProofError: the export does not load, or is not the merged model but for rounding.
        StoppedError: SIGTERM came; nothing is kept.
    """
    started = time.monotonic()
    try:
        formats.known(format)
        if importance_dir is None:
            formats.check_importance([format], config.num_importance_rows)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    merge = _check_model(merged_dir)
    merged, dataset = Path(merged_dir), Path(dataset_dir)
    with new_directory(quantized_dir) as target:
        parents: list[Record] = [merge]
        if format in formats.GPTQ:
            record = _gptq(config, format, merged, dataset, target)
        else:
            record, matrix = _gguf(
                config, format, merge, merged, dataset, target, gguf_dir, importance_dir
            )
            parents += [matrix] if matrix else []
        record = record.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        record.write(target, config, parents=parents)
    _log(record)
    return record


def _gguf(
    config: QuantizeConfig,
    format: str,
    merge: MergeProof,
    merged_dir: Path,
    dataset_dir: Path,
    target: Path,
    gguf_dir: str | None,
    importance_dir: str | None,
) -> tuple[QuantizedModel, ImportanceMatrix | None]:
    if gguf_dir is not None:
        source = QuantizedModel.read(gguf_dir)
        again = "convert this model to GGUF again"
        _check_source(gguf_dir, source, merge, merged_dir, again)
        source.check_files(gguf_dir)
    if importance_dir is not None:
        matrix = ImportanceMatrix.read(importance_dir)
        again = "measure the importance matrix of this model"
        _check_source(importance_dir, matrix, merge, merged_dir, again)
        matrix.check_files(importance_dir)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        return child_process.call(
            export.export,
            config,
            merge,
            format=format,
            merged_dir=merged_dir,
            dataset_dir=dataset_dir,
            target=target,
            scratch=Path(scratch),
            gguf_dir=Path(gguf_dir) if gguf_dir else None,
            importance_dir=Path(importance_dir) if importance_dir else None,
        )


def _gptq(
    config: QuantizeConfig,
    format: str,
    merged_dir: Path,
    dataset_dir: Path,
    target: Path,
) -> QuantizedModel:
    from tuneline.quantize.gptq import quantize
    from tuneline.quantize.proof import reference
    from tuneline.quantize.proof.transformers_model import choose_device

    device = choose_device(merged_dir)
    rows = read_rows(
        dataset_dir,
        config.num_calibration_rows,
        setting="num_calibration_rows",
        purpose="GPTQ calibrates",
    )
    with few_threads():
        return quantize.quantize(
            merged_dir,
            target,
            format=format,
            rows=rows,
            group_size=config.group_size,
            desc_act=config.desc_act,
            reference=reference.for_export(config, merged_dir, dataset_dir, device),
            bound=formats.bound_of(format, config.max_mean_kl, config.min_top1_agreement),
            device=device,
        )


def _check_model(path: str) -> MergeProof:
    """Return the model's record; refuse what the tools would refuse later and less clearly."""
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


def _check_source(
    directory: str, made: Record, merge: MergeProof, merged_dir: Path, again: str
) -> None:
    """Refuse what was made from another merged model: of a near one, the proof sees no difference.

    Args:
        directory: of what was made.
        made: its record.
        merge: the merged model's record.
        merged_dir: the merged model.
        again: what to do about it.
    """
    made_from = made.made_from.get(MergeProof.role)
    expected = merge.content_sha256()
    if made_from is None or made_from.sha256 != expected:
        found = f"the merged model {made_from.sha256[:12]}" if made_from else "no merged model"
        raise ModelError(
            f"{directory} was made from {found}, as its record says, and {merged_dir} is "
            f"{expected[:12]}: {again}, or name the merged model that it was made from"
        )


def _log(record: QuantizedModel) -> None:
    logger.info(
        "%s: %.1f MB, %.2f bits a weight, %.1f s%s",
        record.format,
        record.num_bytes / 1e6,
        record.bits_per_weight,
        record.seconds,
        "".join(f"; {note}" for note in record.notes),
    )
