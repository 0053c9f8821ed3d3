"""Make GGUF exports of a merged model from files that were checked, in this process."""

import time
from pathlib import Path

from tuneline.artifacts import ImportanceMatrix, MergeProof, QuantizedModel
from tuneline.quantize import formats
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.threads import few_threads

NUM_CONVERT_TOKENS = 24
"""Tokens that the conversion's check generates; it sees no recipe."""


def convert(merge: MergeProof, *, merged_dir: Path, target: Path) -> QuantizedModel:
    """Convert to f16, check the file and write its record.

    Args:
        merge: the merged model's record.
        merged_dir: the merged model.
        target: gets the file.
    """
    from tuneline.quantize.gguf import files
    from tuneline.quantize.proof import reference

    started = time.monotonic()
    with few_threads():
        file = files.convert(merged_dir, target)
        merged = reference.measure(
            merged_dir, dataset_dir=None, num_rows=0, num_tokens=NUM_CONVERT_TOKENS
        )
        record = files.prove(file, format="f16", reference=merged, bound=formats.GGUF["f16"])
    record = record.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    record.write(target, parents=(merge,))
    return record


def export(
    config: QuantizeConfig,
    merge: MergeProof,
    *,
    format: str,
    merged_dir: Path,
    dataset_dir: Path,
    target: Path,
    scratch: Path,
    gguf_dir: Path | None,
    importance_dir: Path | None,
) -> tuple[QuantizedModel, ImportanceMatrix | None]:
    """Make one format and check it; return its record, and that of the matrix it was rounded by.

    Args:
        config: the recipe's part.
        merge: the merged model's record.
        format: its name.
        merged_dir: the merged model.
        dataset_dir: what prepare made.
        target: gets the file.
        scratch: for what is made on the way.
        gguf_dir: what `convert` made; None: convert first.
        importance_dir: likewise what `measure_importance` made.
    """
    from tuneline.quantize.gguf import files, importance
    from tuneline.quantize.proof import reference

    if gguf_dir is None:
        gguf_dir = scratch / "f16"
        gguf_dir.mkdir()
        convert(merge, merged_dir=merged_dir, target=gguf_dir)
    weighed = format in formats.WEIGHED
    if weighed and importance_dir is None and config.num_importance_rows:
        importance_dir = scratch / "importance"
        importance_dir.mkdir()
        importance.measure(
            config, gguf_dir=gguf_dir, dataset_dir=dataset_dir, target=importance_dir
        )
    matrix = ImportanceMatrix.read(importance_dir) if weighed and importance_dir else None
    with few_threads():
        file = files.quantize(
            gguf_dir,
            target,
            format=format,
            importance=importance_dir / matrix.file if importance_dir and matrix else None,
        )
        merged = reference.for_export(config, merged_dir, dataset_dir)
        bound = formats.bound_of(format, config.max_mean_kl, config.min_top1_agreement)
        record = files.prove(file, format=format, reference=merged, bound=bound)
    if matrix is None:
        return record, None
    note = f"importance matrix from {matrix.num_rows} training rows, {matrix.num_tokens} tokens"
    noted = record.model_copy(
        update={"num_importance_rows": matrix.num_rows, "notes": [*record.notes, note]}
    )
    return noted, matrix
