"""Make one export of the merged model and check that it loads and answers."""

import logging
import tempfile
import time
import typing
from pathlib import Path

from tuneline.artifacts import (
    HELDOUT_FILE,
    INPUT_IDS,
    PROMPT_IDS,
    TRAIN_FILE,
    MergeProof,
    QuantizedModel,
    new_directory,
    read_jsonl,
)
from tuneline.errors import DataError, ModelError, RecipeError
from tuneline.quantize.config import GgufFormat, GptqFormat, QuantizeConfig

logger = logging.getLogger(__name__)

BUILT_IN_PROMPT = "The capital of France is"
"""Where a data set keeps no held-out rows, and for the conversion, which sees no data set."""


def convert(*, merged_dir: str, gguf_dir: str) -> QuantizedModel:
    """Convert the merged model to GGUF in f16 and hold it against transformers.

    Raises:
        ModelError: the directory is not a merged model.
        ToolError: the converter is missing or refused the model.
        ProofError: the file does not answer as the merged model does.
    """
    from tuneline.quantize import gguf

    started = time.monotonic()
    _check_model(merged_dir)
    with new_directory(gguf_dir) as target:
        record = gguf.convert(
            Path(merged_dir), target, prompt=BUILT_IN_PROMPT, num_tokens=24
        ).model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        record.write(target)
    _log(record)
    return record


def run(
    config: QuantizeConfig,
    *,
    format: str,
    merged_dir: str,
    dataset_dir: str,
    quantized_dir: str,
    gguf_dir: str | None = None,
) -> QuantizedModel:
    """Make the export `format` and check it.

    Args:
        config: the recipe's part.
        format: one of the GGUF or GPTQ formats.
        merged_dir: the merged model.
        dataset_dir: held-out prompts for the check, training rows for GPTQ's calibration.
        quantized_dir: where the export is put; must not exist or be empty.
        gguf_dir: what `convert` made, so that formats share it; default: convert first.

    Raises:
        RecipeError: the format is unknown.
        ModelError: the directory is not a merged model, or cannot be quantised.
        DataError: no training rows to calibrate on.
        ToolError: a converter or a quantiser is missing or failed.
        ProofError: the export does not load, or does not answer.
    """
    started = time.monotonic()
    gguf_formats, gptq_formats = typing.get_args(GgufFormat), typing.get_args(GptqFormat)
    if format not in gguf_formats + gptq_formats:
        raise RecipeError(
            f"the export format '{format}' is not known; known are "
            f"{', '.join(gguf_formats + gptq_formats)}"
        )
    _check_model(merged_dir)
    prompt = _heldout_prompt(Path(dataset_dir))
    with new_directory(quantized_dir) as target:
        if format in gptq_formats:
            from tuneline.quantize import gptq

            rows = _calibration_rows(Path(dataset_dir), config.num_calibration_rows)
            record = gptq.quantize(
                Path(merged_dir),
                target,
                format=format,
                rows=rows,
                group_size=config.group_size,
                desc_act=config.desc_act,
                prompt=prompt,
                num_tokens=config.num_check_tokens,
            )
        else:
            from tuneline.quantize import gguf

            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                source = gguf_dir
                if source is None:
                    source = f"{scratch}/f16"
                    convert(merged_dir=merged_dir, gguf_dir=source)
                record = gguf.quantize(
                    Path(merged_dir),
                    Path(source),
                    target,
                    format=format,
                    prompt=prompt,
                    num_tokens=config.num_check_tokens,
                )
        record = record.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        record.write(target)
    _log(record)
    return record


def _check_model(path: str) -> None:
    """Refuse what the tools would refuse later and less clearly."""
    MergeProof.read(path)
    missing = [
        name for name in ("config.json", "tokenizer_config.json") if not Path(path, name).is_file()
    ]
    if missing:
        raise ModelError(
            f"{path} lacks {' and '.join(missing)}, so it is not a whole model: run merge again"
        )


def _heldout_prompt(dataset_dir: Path) -> str:
    path = dataset_dir / HELDOUT_FILE
    rows = read_jsonl(path) if path.is_file() else []
    return rows[0]["prompt"] if rows else BUILT_IN_PROMPT


def _calibration_rows(dataset_dir: Path, num_rows: int) -> list[list[int]]:
    """Read the token ids of the first training rows; they were shuffled when prepared."""
    import pyarrow.parquet

    path = dataset_dir / TRAIN_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist, and GPTQ calibrates on training rows: run prepare")
    file = pyarrow.parquet.ParquetFile(path)
    column = INPUT_IDS if INPUT_IDS in file.schema_arrow.names else PROMPT_IDS
    rows: list[list[int]] = []
    for batch in file.iter_batches(batch_size=num_rows, columns=[column]):
        rows += batch.column(column).to_pylist()
        if len(rows) >= num_rows:
            break
    if not rows:
        raise DataError(f"{path} has no rows, and GPTQ calibrates on training rows: run prepare")
    if len(rows) < num_rows:
        logger.warning("num_calibration_rows is %d, the data set has %d", num_rows, len(rows))
    return rows[:num_rows]


def _log(record: QuantizedModel) -> None:
    logger.info(
        "%s: %.1f MB, %.2f bits a weight, %.1f s%s",
        record.format,
        record.num_bytes / 1e6,
        record.bits_per_weight,
        record.seconds,
        "".join(f"; {note}" for note in record.notes),
    )
