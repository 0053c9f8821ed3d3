"""The sizes of the values of Arrow arrays, without the sharing that Arrow's layouts allow.

In a dictionary, a view or a run, many rows can refer to one value, so a small array can hold rows
that fill a machine once each row has its own copy.
"""

from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from tuneline.errors import DataError
from tuneline.prepare.sources.proportion import check_proportion

OTHER_BYTES = 8
"""Size that is counted for a number, and for each reference of a list to a value."""


def check_size(file: str, num_bytes: int, num_stored: int) -> None:
    """Refuse an Arrow or Parquet file whose content is out of proportion to the file's own size.

    Args:
        file: the file's name, for the message.
        num_bytes: number of bytes of content, so far or in all.
        num_stored: number of bytes of the file.

    Raises:
        DataError: the content is out of proportion.
    """
    stored = f"its {num_stored:,} bytes"
    check_proportion(file, num_bytes, stored, num_stored, "save its rows as JSON Lines")


def sizes(array: Any) -> Any:
    """Return the size of each value of an array.

    Args:
        array: an Arrow array whose contents were validated.

    Returns:
        NumPy array of 64-bit integers of the array's length, in bytes. The size of a null value
        may be that of what its slot refers to.

    Raises:
        DataError: the array has a type that cannot be read.
    """
    kind = array.type
    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return sizes(array.storage)
    if types.is_union(kind):
        raise DataError(
            f"columns of the type {kind} cannot be read: store each in a column of its own"
        )
    if types.is_dictionary(kind):
        own = sizes(array.dictionary)
        indices = _numbers(array.indices)
        return own[indices] if len(own) else numpy.zeros(len(array), numpy.int64)
    if types.is_run_end_encoded(kind):
        own = pyarrow.array(sizes(array.values))
        runs = pyarrow.RunEndEncodedArray.from_arrays(array.run_ends, own)
        runs = runs.slice(array.offset, len(array))
        return _numbers(pyarrow.compute.run_end_decode(runs))
    if types.is_struct(kind):
        return sum(
            (sizes(field) for field in array.flatten()), numpy.zeros(len(array), numpy.int64)
        )
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        first = _numbers(array.offsets)
        return _of_ranges(array.values, first, first + _numbers(array.sizes))
    if types.is_fixed_size_list(kind):
        places = (numpy.arange(len(array) + 1) + array.offset) * kind.list_size
        return _of_ranges(array.values, places[:-1], places[1:])
    if types.is_nested(kind):
        offsets = _numbers(array.offsets)
        return _of_ranges(array.values, offsets[:-1], offsets[1:])
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # A view is 16 bytes, of which the first 4 are its length.
        views = numpy.frombuffer(array.buffers()[1], "<i4")[::4]
        return views[array.offset : array.offset + len(array)].astype(numpy.int64)
    if _has_length(kind):
        return _numbers(pyarrow.compute.binary_length(array))
    return numpy.full(len(array), OTHER_BYTES)


def _has_length(kind: Any) -> bool:
    types = pyarrow.types
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _of_ranges(values: Any, first: Any, behind: Any) -> Any:
    """Return the size of each range of an array's values, and of the references to them."""
    before = numpy.concatenate(([0], numpy.cumsum(sizes(values) + OTHER_BYTES)))
    return before[behind] - before[first]


def _numbers(array: Any) -> Any:
    if array.null_count:
        array = array.fill_null(0)
    return array.to_numpy(zero_copy_only=False).astype(numpy.int64)
