"""Readers: the same rows from every kind of file, faults with their line."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tuneline.errors import DataError
from tuneline.prepare.sources.builtin import BUILTINS
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Remarks, SourceRow

ROWS = [
    {"prompt": 'line\nbreak, "quotes"', "completion": "caf\u00e9"},
    {"prompt": "\ud55c\uad6d\uc5b4", "completion": "4"},
]


def good(source: object) -> list[dict | None]:
    return [row.values for row in read_rows(str(source))]


def bad(source: object) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in read_rows(str(source)) if row.values is None]


def write_all(folder: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text("\ufeff" + text + "\n", encoding="utf-8")
    (folder / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (folder / "c.csv").write_text(
        'prompt,completion\n"line\nbreak, ""quotes""",caf\u00e9\n\ud55c\uad6d\uc5b4,4\n',
        encoding="utf-8",
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.csv", "d.parquet"])
def test_every_kind_of_file_gives_the_rows(tmp_path: Path, name: str) -> None:
    write_all(tmp_path)
    assert good(tmp_path / name) == ROWS


def test_directory_and_glob(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "notes.docx").write_text("x")
    remarks = Remarks()
    assert [row.values for row in read_rows(str(tmp_path), remarks=remarks)] == ROWS * 4
    assert remarks.sentences() == [f"{tmp_path}: files of other types are left out: notes.docx"]
    assert good(tmp_path / "[ab].*") == ROWS * 2


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One\n\nText.\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("Two\n")
    assert good(tmp_path) == [{"text": "# One\n\nText.\n"}, {"text": "Two\n"}]


def test_json_array_is_read_piece_by_piece(tmp_path: Path) -> None:
    rows = [{"text": "x" * 50_000 + str(number), "n": [number, {"a": "]"}]} for number in range(40)]
    path = tmp_path / "big.json"
    path.write_text(json.dumps(rows, indent=2))
    read = list(read_rows(str(path)))
    assert [row.values for row in read] == rows
    # Each object takes 9 lines; it ends on the 9th behind the bracket.
    assert [row.line for row in read[:3]] == [10, 19, 28]
    path.write_text("[]")
    assert good(path) == []
    path.write_text("")
    assert good(path) == []


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert good(path) == [{"a": 1}, {"a": 2}]


def test_jsonl_faults_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \xff}\n{a: 1}\n\n[1]\n{"a": "cut o')
    assert good(path)[0] == {"a": 1}
    (second, third, fifth, sixth) = bad(path)
    assert second[0] == 2 and second[1].startswith("not UTF-8 text; convert the file")
    assert third == (
        3,
        "not JSON: Expecting property name enclosed in double quotes at column 2",
    )
    assert fifth == (5, "an array instead of an object with columns")
    assert sixth == (6, "the line ends inside a JSON value: the file was cut off")


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.json", "array.json", "utf16.jsonl"])
def test_a_key_that_an_object_has_twice(tmp_path: Path, name: str) -> None:
    rows = ['{"a": 1, "b": 2}', '{"a": 1, "a": 2}', '{"a": [{"b": 1, "c": 2, "b": 1}]}', '{"a": 3}']
    text = f"[{', '.join(rows)}]" if name == "array.json" else "\n".join(rows) + "\n"
    path = tmp_path / name
    path.write_text(text, encoding="utf-16" if name == "utf16.jsonl" else "utf-8")
    assert good(path) == [{"a": 1, "b": 2}, None, None, {"a": 3}]
    reasons = [reason for _, reason in bad(path)]
    assert reasons == [
        f"an object has the key '{key}' twice, so which value counts is not clear" for key in "ab"
    ]


def test_csv_faults_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a,b\n1,2\n1,2,3\n\xb0,2\n3,4\n")
    assert [row.values for row in read_rows(str(path)) if row.values] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]
    assert [line for line, _ in bad(path)] == [3, 4]
    assert bad(path)[0][1] == "3 fields, but the header has 2"
    assert bad(path)[1][1].startswith("not UTF-8 text")


def test_tsv_keeps_quotes_inside_a_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('a\tb\r\n"Old" film\t"say ""yes"""\r\n')
    assert good(path) == [{"a": '"Old" film', "b": 'say "yes"'}]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\ud55c".encode("cp949"))
    assert [line for line, _ in bad(path)] == [2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n {"a": 2', r"ends unexpectedly in or before line 2"),
        ("a.json", b'"text"', "neither an array of objects nor JSON Lines"),
        ("a.json", b'[{"a": "\xff"}]', "is not UTF-8 text"),
        ("a.parquet", b"PAR1 and then nothing", "not a complete Parquet file"),
        ("a.docx", b"x", r"has a type that cannot be read; supported types: \.jsonl"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(path)))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or directory"):
        read_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="has no file that can be read"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="is not a file, a directory or a Hub ID"):
        read_rows("two words")
    with pytest.raises(DataError, match="no built-in dataset 'x'.*builtin:kubernetes-quantities"):
        read_rows("builtin:x")


def test_every_builtin_has_more_rows_than_it_holds_out() -> None:
    for name, builtin in BUILTINS.items():
        assert 0 < builtin.num_heldout < len(list(read_rows(f"builtin:{name}")))


def test_builtin_rows_are_numbered() -> None:
    first = next(iter(read_rows("builtin:kubernetes-quantities")))
    assert isinstance(first, SourceRow)
    assert (first.line, set(first.values or {})) == (1, {"prompt", "completion", "choices"})
