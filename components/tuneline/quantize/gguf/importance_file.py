"""Read and write the file of an importance matrix.

The file contains, for each weight matrix, the sum of squares of every input and the number of
tokens. The format is the GGUF format of llama-imatrix, so llama-quantize can read the file too.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import numpy.typing

from tuneline.errors import ToolError
from tuneline.quantize.gguf.ggml import F32, ContextParams, InitParams, library

SUMS, COUNTS = ".in_sum2", ".counts"
"""Suffixes of the names of the two tensors that the file contains per weight matrix."""

Float64s = numpy.typing.NDArray[numpy.float64]


@dataclass
class Importance:
    """Statistics of the inputs of one weight matrix."""

    sums: Float64s
    """Sum of squares of each input over all tokens, [num_inputs]."""
    count: int
    """Number of tokens."""

    @property
    def mean(self) -> Float64s:
        """Mean square of each input, [num_inputs]."""
        return self.sums / max(self.count, 1)


def write(file: Path, matrix: dict[str, Importance], *, source: str, num_rows: int) -> None:
    """Write an importance matrix.

    Args:
        file: path of the new file.
        matrix: the statistics by GGUF name of the weight.
        source: name of the dataset, for llama.cpp's metadata.
        num_rows: number of rows that were measured; llama.cpp calls them chunks.

    Raises:
        ToolError: ggml could not write the file.
    """
    ggml = library()
    num_bytes = sum(
        2 * ggml.ggml_tensor_overhead() + 4 * len(entry.sums) + 4 + 64 for entry in matrix.values()
    )
    with _freed(ggml.ggml_init(ContextParams(num_bytes, None, False)), ggml.ggml_free) as tensors:
        with _freed(ggml.gguf_init_empty(), ggml.gguf_free) as gguf:
            ggml.gguf_set_val_str(gguf, b"general.type", b"imatrix")
            sources = (ctypes.c_char_p * 1)(source.encode())
            ggml.gguf_set_arr_str(gguf, b"imatrix.datasets", sources, 1)
            ggml.gguf_set_val_u32(gguf, b"imatrix.chunk_count", num_rows)
            longest = max((entry.count for entry in matrix.values()), default=0)
            ggml.gguf_set_val_u32(gguf, b"imatrix.chunk_size", max(1, longest // num_rows))
            for name, entry in sorted(matrix.items()):
                for suffix, values in ((SUMS, entry.sums), (COUNTS, [entry.count])):
                    data = numpy.asarray(values, dtype=numpy.float32)
                    tensor = ggml.ggml_new_tensor_2d(tensors, F32, len(data), 1)
                    ggml.ggml_set_name(tensor, (name + suffix).encode())
                    ctypes.memmove(ggml.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
                    ggml.gguf_add_tensor(gguf, tensor)
            if not ggml.gguf_write_to_file(gguf, os.fsencode(file), False):
                raise ToolError(
                    f"the importance matrix could not be written to {file}: make its directory "
                    "writable, and free some space"
                )


def read(file: Path) -> dict[str, Importance]:
    """Read an importance matrix; return the statistics by GGUF name of the weight.

    Raises:
        ToolError: the file is not an importance matrix.
    """
    ggml = library()
    tensors = ctypes.c_void_p()
    parameters = InitParams(no_alloc=False, ctx=ctypes.pointer(tensors))
    gguf = ggml.gguf_init_from_file(os.fsencode(file), parameters)
    if not gguf:
        raise ToolError(
            f"{file} is not a GGUF file that llama.cpp can read: run measure-importance again"
        )
    with _freed(gguf, ggml.gguf_free), _freed(tensors, ggml.ggml_free):
        values = {}
        for index in range(ggml.gguf_get_n_tensors(gguf)):
            name = ggml.gguf_get_tensor_name(gguf, index)
            # Data of another type has another size; reading it as float32 would go past its end.
            if ggml.gguf_get_tensor_type(gguf, index) != F32:
                continue
            tensor = ggml.ggml_get_tensor(tensors, name)
            pointer = ctypes.cast(ggml.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
            shape = (ggml.ggml_nelements(tensor),)
            values[name.decode()] = numpy.ctypeslib.as_array(pointer, shape).astype(numpy.float64)
    names = [name.removesuffix(SUMS) for name in values if name.endswith(SUMS)]
    if not names or any(name + COUNTS not in values for name in names):
        raise ToolError(
            f"{file} contains no importance matrix: use the file that measure-importance wrote"
        )
    return {name: Importance(values[name + SUMS], int(values[name + COUNTS][0])) for name in names}


@contextlib.contextmanager
def _freed(pointer: Any, free: Any) -> Iterator[Any]:
    try:
        yield pointer
    finally:
        free(pointer)
