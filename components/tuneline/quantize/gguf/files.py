"""Make GGUF files with llama.cpp: converted once to f16, then quantised a format at a time."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ToolError
from tuneline.quantize.disk import raise_if_full
from tuneline.quantize.formats import Bound
from tuneline.quantize.gguf import converter, importance_file
from tuneline.quantize.gguf import tensors as gguf_tensors
from tuneline.quantize.proof.reference import Reference


def convert(model_dir: Path, target: Path) -> Path:
    """Convert to f16; return the file."""
    file = target / _file_name("f16")
    converter.convert(model_dir, file)
    return file


def quantize(f16_dir: Path, target: Path, *, format: str, importance: Path | None = None) -> Path:
    """Make one format from the f16 file; return the file.

    Args:
        f16_dir: what `convert` made.
        target: gets the file.
        format: its name.
        importance: file of an importance matrix.

    Raises:
        ToolError: llama.cpp did not make it.
        OSError: the disk is full.
    """
    f16 = f16_dir / QuantizedModel.read(f16_dir).file
    file = target / _file_name(format)
    if format == "f16":
        _link(f16, file)
    else:
        _quantize(f16, file, format, importance)
    return file


def prove(file: Path, *, format: str, reference: Reference, bound: Bound) -> QuantizedModel:
    """Check a file and return its record; a Modelfile is put beside it.

    Raises:
        ProofError: it fails a check.
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


def _quantize(source: Path, file: Path, format: str, importance: Path | None) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
    parameters.nthread = len(os.sched_getaffinity(0))
    # Kept until the call returns: the parameters only point into it.
    entries = _entries(importance) if importance else None
    if entries is not None:
        parameters.imatrix = entries
    failed = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(file), ctypes.byref(parameters)
    )
    if failed:
        raise_if_full(file)
        raise ToolError(
            f"llama.cpp could not quantise to {format} (code {failed}); its log above says why"
        )


def _entries(file: Path) -> ctypes.Array:
    """Return the importance matrix as llama.cpp takes it: an array that an empty entry ends."""
    from llama_cpp.llama_cpp import llama_model_imatrix_data as Entry

    found = importance_file.read(file)
    entries = (Entry * (len(found) + 1))()
    for entry, (name, importance) in zip(entries, found.items(), strict=False):
        values = (ctypes.c_float * len(importance.mean))(*importance.mean)
        entry.name, entry.data, entry.size = name.encode(), values, len(values)
    return entries


def _link(source: Path, file: Path) -> None:
    """Give the file a second name; copy it where the two are on different volumes."""
    with contextlib.suppress(OSError):
        os.link(source, file)
        return
    shutil.copyfile(source, file)


def _file_name(format: str) -> str:
    return f"model-{format.upper()}.gguf"
