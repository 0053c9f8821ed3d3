"""Make GGUF exports with llama.cpp: the model is converted once to f16, then quantised per format.

`convert` and `export` run in a child process (child_process.py), on inputs that the parent process
has checked. The parent imports this module too, so llama.cpp, torch and transformers are imported
only within functions: the parent, which only waits, needs none of them, and the GPTQ image has no
llama.cpp.
"""

import contextlib
import ctypes
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tuneline.artifacts import ImportanceMatrix, MergeProof, QuantizedModel
from tuneline.errors import ToolError
from tuneline.quantize import formats
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.formats import Bound
from tuneline.quantize.gguf import converter, importance, importance_file
from tuneline.quantize.gguf import tensors as gguf_tensors
from tuneline.quantize.machine import few_threads, raise_if_full

if TYPE_CHECKING:
    from tuneline.quantize.proof.reference import Reference

NUM_CONVERT_TOKENS = 24
"""Number of tokens to generate when a conversion is checked. It is a constant because the
conversion does not get the recipe."""


def convert(merge: MergeProof, *, merged_dir: Path, target: Path) -> QuantizedModel:
    """Convert the merged model to f16, check the file and write its record.

    Args:
        merge: record of the merged model.
        merged_dir: directory of the merged model.
        target: directory to write the file to.
    """
    from tuneline.quantize.proof import reference

    started = time.monotonic()
    with few_threads():
        file = target / _file_name("f16")
        merged = reference.measure(
            merged_dir, dataset_dir=None, num_rows=0, num_tokens=NUM_CONVERT_TOKENS
        )
        converter.convert(
            merged_dir, file, end_of_turn=merged.further_end(), adds_bos=merged.adds_bos()
        )
        bound = formats.FORMATS["f16"].bound
        record = _prove(file, format="f16", reference=merged, bound=bound)
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
    """Make and check one GGUF file.

    Args:
        config: the `quantize` section of the recipe.
        merge: record of the merged model.
        format: name of the format.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made.
        target: directory to write the file to.
        scratch: directory for intermediate files.
        gguf_dir: output of `convert`; None: convert first.
        importance_dir: output of `measure_importance`; None: measure an importance matrix first, if
            format and config ask for one.

    Returns:
        The record of the file, and the record of the importance matrix if one was used.
    """
    from tuneline.quantize.proof import reference

    if gguf_dir is None:
        gguf_dir = scratch / "f16"
        gguf_dir.mkdir()
        convert(merge, merged_dir=merged_dir, target=gguf_dir)
    takes_matrix = formats.FORMATS[format].importance != "unused"
    if takes_matrix and importance_dir is None and config.num_importance_rows:
        importance_dir = scratch / "importance"
        importance_dir.mkdir()
        importance.measure(
            config, gguf_dir=gguf_dir, dataset_dir=dataset_dir, target=importance_dir
        )
    matrix = ImportanceMatrix.read(importance_dir) if takes_matrix and importance_dir else None
    with few_threads():
        file = quantise(
            gguf_dir,
            target,
            format=format,
            importance=importance_dir / matrix.file if importance_dir and matrix else None,
        )
        merged = reference.for_export(config, merged_dir, dataset_dir)
        bound = formats.bound_of(format, config.max_mean_kl, config.min_top1_agreement)
        record = _prove(file, format=format, reference=merged, bound=bound)
    if matrix is None:
        return record, None
    note = f"importance matrix from {matrix.num_rows} training rows, {matrix.num_tokens} tokens"
    noted = record.model_copy(
        update={"num_importance_rows": matrix.num_rows, "notes": [*record.notes, note]}
    )
    return noted, matrix


def quantise(f16_dir: Path, target: Path, *, format: str, importance: Path | None = None) -> Path:
    """Quantise the f16 file to one format, without checking the result; return the new file.

    Args:
        f16_dir: output of `convert`.
        target: directory to write the file to.
        format: name of the format.
        importance: file of an importance matrix.

    Raises:
        ToolError: llama.cpp failed.
        OSError: the disk is full.
    """
    f16 = f16_dir / QuantizedModel.read(f16_dir).file
    file = target / _file_name(format)
    if format == "f16":
        _link(f16, file)
    else:
        _quantise(f16, file, format, importance)
    return file


def _prove(file: Path, *, format: str, reference: "Reference", bound: Bound) -> QuantizedModel:
    """Check a GGUF file, write a Modelfile to the file's directory and return the file's record.

    Raises:
        ProofError: the file fails a check.
    """
    from tuneline.quantize.gguf import proof as gguf_proof

    tensors = gguf_tensors.read(file)
    fallback = gguf_tensors.fallback_note(tensors, format)
    proof = gguf_proof.prove(file, format=format, reference=reference, bound=bound)
    notes = [*([fallback] if fallback else []), *proof.pop("notes")]
    return QuantizedModel(
        format=format,
        kind="gguf",
        file=file.name,
        num_bytes=file.stat().st_size,
        bits_per_weight=round(gguf_tensors.bits_per_weight(tensors), 4),
        tensor_types=gguf_tensors.count_types(tensors),
        notes=notes,
        **proof,
    )


def _quantise(source: Path, file: Path, format: str, importance: Path | None) -> None:
    import llama_cpp

    # Any: llama-cpp-python's type annotations do not allow the array and the reference that are
    # passed here, but ctypes accepts them.
    api = cast(Any, llama_cpp)
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
    parameters.nthread = len(os.sched_getaffinity(0))
    # `parameters` only points to the entries, so `entries` must stay alive until the call returns.
    entries = _entries(importance) if importance else None
    if entries is not None:
        parameters.imatrix = entries
    failed = api.llama_model_quantize(
        os.fsencode(source), os.fsencode(file), ctypes.byref(parameters)
    )
    if failed:
        raise_if_full(file)
        raise ToolError(
            f"llama.cpp could not quantise to {format} (code {failed}); its log above says why"
        )


def _entries(file: Path) -> "ctypes.Array[Any]":
    """Return the importance matrix in llama.cpp's form: an array whose last entry is empty."""
    from llama_cpp.llama_cpp import llama_model_imatrix_data as Entry

    matrix = importance_file.read(file)
    entries = (Entry * (len(matrix) + 1))()
    for entry, (name, inputs) in zip(entries, matrix.items(), strict=False):
        values = (ctypes.c_float * len(inputs.mean))(*inputs.mean)
        entry.name, entry.data, entry.size = name.encode(), values, len(values)
    return entries


def _link(source: Path, file: Path) -> None:
    """Hard-link `source` to `file`, or copy it if the two paths are on different volumes."""
    with contextlib.suppress(OSError):
        os.link(source, file)
        return
    shutil.copyfile(source, file)


def _file_name(format: str) -> str:
    return f"model-{format.upper()}.gguf"
