"""Make GGUF files with llama.cpp: converted once to f16, then quantised a format at a time."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ProofError, ToolError
from tuneline.quantize import converter, generation, gguf_tensors


def convert(model_dir: Path, target: Path, *, prompt: str, num_tokens: int) -> QuantizedModel:
    """Convert to f16 and hold the file against the model in transformers, in fp32."""
    file = target / _file_name("f16")
    converter.convert(model_dir, file)
    return _check_f16(model_dir, file, prompt=prompt, num_tokens=num_tokens)


def quantize(
    model_dir: Path, f16_dir: Path, target: Path, *, format: str, prompt: str, num_tokens: int
) -> QuantizedModel:
    """Make one format from the f16 file and check it.

    f16 is held against the merged model in transformers; the others' `reference` is what the f16
    file generates, which is cheap and is the merged model but for rounding.
    """
    f16 = f16_dir / QuantizedModel.read(f16_dir).file
    file = target / _file_name(format)
    if format == "f16":
        _link(f16, file)
        return _check_f16(model_dir, file, prompt=prompt, num_tokens=num_tokens)
    _quantize(f16, file, format)
    generated = generation.with_llama_cpp(file, prompt, num_tokens=num_tokens)
    reference = generation.with_llama_cpp(f16, prompt, num_tokens=num_tokens)
    return _record(file, format, prompt, generated, reference, note=None)


def _check_f16(model_dir: Path, file: Path, *, prompt: str, num_tokens: int) -> QuantizedModel:
    generated = generation.with_llama_cpp(file, prompt, num_tokens=num_tokens)
    reference = generation.with_transformers(model_dir, prompt, num_tokens=num_tokens)
    note = generation.hold_against(generated, reference)
    return _record(file, "f16", prompt, generated, reference, note)


def _record(
    file: Path,
    format: str,
    prompt: str,
    generated: generation.Generation,
    reference: generation.Generation,
    note: str | None,
) -> QuantizedModel:
    if not generated.text.strip() and reference.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model says "
            f"{reference.text[:60]!r}: take a format with more bits"
        )
    tensors = gguf_tensors.read(file)
    fallback = gguf_tensors.fallback_note(tensors, format)
    return QuantizedModel(
        format=format,
        kind="gguf",
        file=file.name,
        num_bytes=file.stat().st_size,
        bits_per_weight=round(gguf_tensors.bits_per_weight(tensors), 4),
        tensor_types=gguf_tensors.count_types(tensors),
        notes=[text for text in (fallback, note) if text],
        prompt=prompt,
        generated=generated.text,
        reference=reference.text,
    )


def _quantize(source: Path, file: Path, format: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
    parameters.nthread = len(os.sched_getaffinity(0))
    failed = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(file), ctypes.byref(parameters)
    )
    if failed:
        raise ToolError(
            f"llama.cpp could not quantise to {format} (code {failed}); its log above says why"
        )


def _link(source: Path, file: Path) -> None:
    """Give the file a second name; copy it where the two are on different volumes."""
    with contextlib.suppress(OSError):
        os.link(source, file)
        return
    shutil.copyfile(source, file)


def _file_name(format: str) -> str:
    return f"model-{format.upper()}.gguf"
