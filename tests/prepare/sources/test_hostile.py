"""Files whose content is far larger than the file, or that state lengths that they do not have."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from tuneline.errors import DataError
from tuneline.prepare.sources import (
    arrow_files,
    arrow_messages,
    content,
    csv_files,
    files,
    json_files,
    proportion,
)
from tuneline.prepare.sources.arrow_sizes import sizes
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Remarks, Selection, SourceRow

FAR_MORE = "rows.* bytes of content in its .* bytes, more than 500 times .* save its rows as JSON"
LONG = 1 << 17


def read(path: Path) -> list[SourceRow]:
    return list(read_rows(str(path), Selection(), Remarks()))


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds at which the files of these tests take milliseconds."""
    monkeypatch.setattr(proportion, "FREE_BYTES", 4 * LONG)
    for module in (arrow_files, content, csv_files, files, json_files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 2 * LONG)


def shared(num_rows: int) -> Any:
    """Rows that all refer to one long text."""
    places = pyarrow.array(numpy.zeros(num_rows, dtype=numpy.int32))
    return pyarrow.DictionaryArray.from_arrays(places, pyarrow.array(["a" * LONG]))


def one_list(values: Any) -> Any:
    """One row: a list of all the values."""
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)


def messages(num_rows: int) -> Any:
    return one_list(pyarrow.StructArray.from_arrays([shared(num_rows)], names=["content"]))


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(lambda: shared(100), id="a text of many rows"),
        pytest.param(lambda: messages(100), id="a text of many messages"),
        pytest.param(lambda: one_list(pyarrow.nulls(LONG, pyarrow.int32())), id="a long list"),
        pytest.param(lambda: pyarrow.nulls(LONG, pyarrow.string()), id="many rows"),
        pytest.param(lambda: pyarrow.array(["a" * 9 * LONG]), id="a long page"),
    ],
)
def test_a_parquet_file_that_is_made_to_fill_a_machine(
    column: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": column()})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 9000
    with pytest.raises(DataError, match=FAR_MORE):
        read(path)


def write(path: Path, column: Any, compression: str | None = None) -> None:
    table = pyarrow.table({"prompt": column})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table)


def views(num_rows: int) -> Any:
    _, one, text = pyarrow.array(["a" * LONG], pyarrow.string_view()).buffers()
    many = pyarrow.py_buffer(one.to_pybytes()[:16] * num_rows)
    return pyarrow.Array.from_buffers(pyarrow.string_view(), num_rows, [None, many, text])


def runs(num_rows: int) -> Any:
    ends = pyarrow.array([num_rows], pyarrow.int32())
    return pyarrow.RunEndEncodedArray.from_arrays(ends, pyarrow.array(["a" * LONG]))


def overlapping(num_rows: int) -> Any:
    first, length = (
        pyarrow.array([value] * num_rows, pyarrow.int32()) for value in (0, LONG // 16)
    )
    return pyarrow.ListViewArray.from_arrays(first, length, pyarrow.nulls(LONG // 16))


@pytest.mark.parametrize("column", [shared, views, runs, overlapping])
def test_an_arrow_file_whose_rows_are_one_value(
    column: Callable[[int], Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.arrow"
    write(path, column(9000))
    rows = read_rows(str(path), Selection(), Remarks())
    with pytest.raises(DataError, match=FAR_MORE):
        for number, row in enumerate(rows):
            assert row.values is not None and number < 4000
    # A few rows are read, and have their values.
    kept = column(3)
    write(path, kept)
    assert [row.values for row in read(path)] == pyarrow.table({"prompt": kept}).to_pylist()


def test_an_arrow_file_of_very_many_empty_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    write(path, pyarrow.nulls(10**7))
    with pytest.raises(DataError, match=FAR_MORE):
        read(path)


def test_sizes_are_those_of_the_values() -> None:
    texts = [["a", "bcd"], [], ["ef"]]
    plain = [4 + 2 * 8, 0, 2 + 8]
    kind = pyarrow.list_(pyarrow.string())
    for each in (
        kind,
        pyarrow.large_list(pyarrow.string_view()),
        pyarrow.list_view(kind.value_type),
    ):
        assert sizes(pyarrow.array(texts, each)).tolist() == plain
        assert sizes(pyarrow.array(texts, each).slice(1)).tolist() == plain[1:]
    pairs = pyarrow.array([[("k", "v" * 5)], []], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    assert sizes(pairs).tolist() == [6 + 8, 0]
    fixed = pyarrow.array([[1, 2], [3, 4], [5, 6]], pyarrow.list_(pyarrow.int8(), 2))
    assert sizes(fixed.slice(1)).tolist() == [32, 32]
    structs = pyarrow.array([{"a": "xyz", "b": 1}, {"a": "x", "b": 1}])
    assert sizes(structs.slice(1)).tolist() == [1 + 8]
    runs_of_two = pyarrow.RunEndEncodedArray.from_arrays(
        pyarrow.array([2, 4], pyarrow.int32()), pyarrow.array(["a", "bcd"])
    )
    assert sizes(runs_of_two.slice(1)).tolist() == [1, 3, 3]
    shares = pyarrow.array(["a", None, "bcd"]).dictionary_encode()
    assert sizes(shares)[[0, 2]].tolist() == [1, 3]


def test_a_compressed_arrow_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.arrow"
    write(path, pyarrow.array(["a" * 9 * LONG]), "zstd")
    with pytest.raises(DataError, match=FAR_MORE):
        read(path)
    write(path, pyarrow.array(["a" * LONG, "b"]), "lz4")
    assert [len(row.values["prompt"]) for row in read(path) if row.values] == [LONG, 1]
    monkeypatch.setattr(arrow_messages, "_MAX_BATCH_BYTES", LONG // 2)
    with pytest.raises(DataError, match="a batch of rows of 131,[0-9]* bytes after decompress"):
        read(path)


@pytest.mark.parametrize("length", [1 << 20, 1 << 62, -8])
def test_lengths_that_an_arrow_file_does_not_have(length: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    write(path, pyarrow.array(["a" * 1000, "b"]))
    right = path.read_bytes()
    reader = pyarrow.ipc.MessageReader.open_stream(right[8:])
    sizes_of_bodies = [message.body.size for message in reader if message.body is not None]
    body = struct.pack("<q", max(sizes_of_bodies))
    for place in [place for place in range(len(right) - 8) if right[place : place + 8] == body]:
        path.write_bytes(right[:place] + struct.pack("<q", length) + right[place + 8 :])
        try:
            rows = read(path)
        except DataError as error:
            assert "not a complete Arrow file" in str(error) or "500 times" in str(error)
        else:
            # That length stands in the list of the batches, which is not read.
            assert [row.values for row in rows] == [{"prompt": "a" * 1000}, {"prompt": "b"}]
    text = struct.pack("<3i", 0, 1000, 1001)
    assert right.count(text) == 1
    path.write_bytes(right.replace(text, struct.pack("<3i", 0, 1000, 1 << 30)))
    with pytest.raises(DataError, match="not a complete Arrow file: row 1 cannot be read"):
        read(path)


def test_any_damaged_byte_of_an_arrow_file_ends_in_rows_or_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    write(path, messages(1), "lz4")
    right = path.read_bytes()
    for place in range(0, len(right), 37):
        for value in (0x7F, 0xFF):
            path.write_bytes(right[:place] + bytes([value]) + right[place + 1 :])
            try:
                read(path)
            except DataError as error:
                assert "rows.arrow" in str(error)


LINES = {
    "rows.jsonl": ('{"a": "%s"}\n', ""),
    "rows.csv": ("%s,1\n", "a,b\n"),
    "rows.tsv": ("%s\t1\n", "a\tb\n"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_too_long(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    line, header = LINES[name]
    path.write_text(header + line % "x" + line % ("y" * 5 * LONG) + line % "z")
    reason = "larger than the 67,108,864 bytes that one row can have; divide its text"
    if name == "rows.jsonl":
        good, bad, last = read(path)
        assert (good.values, last.values) == ({"a": "x"}, {"a": "z"})
        assert (bad.line, bad.reason, last.line) == (2, reason, 3)
        path.write_text(path.read_text(), encoding="utf-16")
        assert [row.reason for row in read(path)] == ["", reason, ""]
    else:
        with pytest.raises(DataError, match=f"{name}: line 3 is {reason}"):
            read(path)


def test_a_quote_that_never_closes_in_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1,'\n".replace("'", '"') + "3,4\n" * LONG)
    with pytest.raises(DataError, match="the quote that opens in line 3 .* never closes"):
        read(path)


def test_a_value_of_an_array_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": "x"}, {"a": "y" * 9 * LONG}], indent=0))
    with pytest.raises(DataError, match=r"the value that begins in line 5 does not end within"):
        read(path)


def test_a_document_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("words " * LONG)
    assert [row.reason for row in read(path)] == [proportion.TOO_LARGE]
