"""Encodings are guessed or named, compressed files are read, and files of another kind refused."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneline.errors import DataError, RecipeError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.sources import proportion
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Remarks, Selection

KOREAN = [
    {"prompt": "\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294?", "completion": "\uc11c\uc6b8"},
    {"prompt": "\ud30c\ub4dc\ub780 \ubb34\uc5c7\uc778\uac00\uc694?", "completion": "plain"},
    {"prompt": "only ASCII", "completion": "4"},
]
JAPANESE = [
    {
        "prompt": "\u6771\u4eac\u306f\u3069\u3053\u3067\u3059\u304b?",
        "completion": "\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    }
]
CHINESE = [
    {
        "prompt": ("\u5317\u4eac\u5728\u54ea\u91cc?\u4ec0\u4e48\u662f\u5bb9\u5668\u7ec4?"),
        "completion": (
            "\u4e2d\u56fd\u7684\u9996\u90fd\u3002\u5b83\u662f\u6700\u5c0f\u7684"
            "\u90e8\u7f72\u5355\u5143"
        ),
    }
]
TRADITIONAL = [
    {
        "prompt": "\u81fa\u5317\u5728\u54ea\u88e1?\u4ec0\u9ebc\u662f\u5bb9\u5668?",
        "completion": (
            "\u81fa\u7063\u7684\u9996\u90fd\u3002\u5b83\u662f\u6700\u5c0f\u7684"
            "\u90e8\u7f72\u55ae\u5143\u3002"
        ),
    }
]
FRENCH = [
    {
        "prompt": "O\xf9 se trouve Paris ?",
        "completion": (
            "C'est la capitale, \xe0 c\xf4t\xe9 de Versailles, o\xf9 l'\xe9t\xe9 est agr\xe9able."
        ),
    }
]


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv(rows: list[dict[str, str]]) -> str:
    lines = ["prompt,completion", *(f'"{row["prompt"]}","{row["completion"]}"' for row in rows)]
    return "\r\n".join(lines) + "\r\n"


def tsv(rows: list[dict[str, str]]) -> str:
    return "".join(
        f"{a}\t{b}\n" for a, b in [("prompt", "completion"), *(row.values() for row in rows)]
    )


def read(path: Path, **selection: Any) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    remarks = Remarks()
    rows = list(read_rows(str(path), Selection(**selection), remarks))
    good = [row.values for row in rows if row.values is not None]
    return good, [row.reason for row in rows if row.values is None], remarks.sentences()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", jsonl),
        ("rows.json", lambda rows: json.dumps(rows, ensure_ascii=False, indent=1)),
        ("rows.csv", csv),
        ("rows.tsv", tsv),
    ],
)
@pytest.mark.parametrize(
    ("encoding", "rows", "named"),
    [
        ("cp949", KOREAN, "CP949"),
        ("euc_kr", KOREAN, "CP949"),
        ("utf-16", KOREAN, "UTF-16"),
        ("utf-16-le", KOREAN, "UTF-16-LE"),
        ("utf-16-be", KOREAN, "UTF-16-BE"),
        ("utf-8-sig", KOREAN, None),
        ("utf-8", KOREAN, None),
        ("cp932", JAPANESE, "CP932"),
        ("gb18030", CHINESE, "GB18030"),
        ("big5", TRADITIONAL, "BIG5"),
        ("cp1252", FRENCH, "CP1252"),
    ],
)
def test_the_encoding_is_guessed_and_named(
    tmp_path: Path,
    name: str,
    write: Callable[[list[dict[str, str]]], str],
    encoding: str,
    rows: list[dict[str, str]],
    named: str | None,
) -> None:
    path = tmp_path / name
    path.write_bytes(write(rows).encode(encoding))
    good, bad, remarks = read(path)
    assert (good, bad) == (rows, [])
    assert len(remarks) == (named is not None)
    if named is not None:
        assert remarks[0].startswith(f"{name}: read as {named},")


def test_the_encoding_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(FRENCH).encode("mac_roman"))
    assert read(path, encoding="mac_roman")[0] == FRENCH
    with pytest.raises(RecipeError, match="encoding 'klingon' is unknown: use a name that Python"):
        PrepareConfig.parse({"encoding": "klingon"})


def test_bytes_that_are_not_ascii_are_found_far_down(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ascii_rows = [{"prompt": "x" * 1000, "completion": "4"}] * 3000
    path.write_bytes(jsonl(ascii_rows + KOREAN).encode("cp949"))
    good, bad, remarks = read(path)
    assert good == ascii_rows + KOREAN and not bad
    assert remarks[0].startswith("rows.jsonl: read as CP949")


def test_single_lines_in_another_encoding_stay_unusable(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [jsonl(KOREAN).encode()] * 5 + [jsonl(KOREAN[:1]).encode("cp949")]
    path.write_bytes(b"".join(lines))
    good, bad, remarks = read(path)
    assert len(good) == 15 and not remarks
    assert bad == ["not UTF-8 text; convert the file, e.g. with iconv -f CP949 -t UTF-8"]


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_compressed_files(tmp_path: Path, compression: str) -> None:
    compress = COMPRESSORS[compression]
    many = [
        {"prompt": f"Question {number}?", "completion": f"{number**9}"} for number in range(9000)
    ]
    for name, text in {
        "rows.jsonl": jsonl(many),
        "rows.csv": csv(many),
        "rows.json": json.dumps(many),
    }.items():
        path = tmp_path / f"{name}{compression}"
        # Two parts, as when compressed files are joined.
        half = len(text) // 2
        path.write_bytes(compress(text[:half].encode()) + compress(text[half:].encode()))
        assert read(path)[0] == many
        path.write_bytes(compress(text.encode())[:-200])
        with pytest.raises(DataError, match=rf"{name}{compression} cannot be decompressed.*again"):
            read(path)
        path.write_bytes(text.encode())
        with pytest.raises(DataError, match="cannot be decompressed after line 0"):
            read(path)


def test_a_korean_file_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(csv(KOREAN).encode("cp949")))
    assert read(path)[0] == KOREAN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "rows.csv is a ZIP archive, e.g. an Excel workbook"),
        (b"PAR1\x15\x04", r"rows.csv is a Parquet file: give it a name that ends in \.parquet"),
        (b"\x1f\x8b\x08\0", r"compressed with gzip: add \.gz to its name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML page, perhaps of a login"),
        (b"%PDF-1.7", "a PDF document"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=12) | st.sampled_from([b'{"a": 1}', b"", b" "]), max_size=10))
def test_no_line_of_any_jsonl_is_lost(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "rows.jsonl"
    content = b"".join(line.replace(b"\n", b"") + b"\n" for line in lines)
    path.write_bytes(content)
    try:
        good, bad, _ = read(path)
    except DataError:
        return
    expected = sum(bool(line.strip()) for line in content.split(b"\n"))
    assert len(good) + len(bad) == expected or content.startswith((b"\xff\xfe", b"\xfe\xff"))


ROW = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.text(max_size=20) | st.integers() | st.none()
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ROW, max_size=6), st.booleans(), st.sampled_from(["rows.jsonl", "rows.json"]))
def test_what_the_json_module_writes_is_read(
    tmp_path: Path, rows: list[dict[str, Any]], ascii_only: bool, name: str
) -> None:
    path = tmp_path / name
    if name == "rows.json":
        text = json.dumps(rows, ensure_ascii=ascii_only)
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    good, bad, _ = read(path)
    assert good + bad == rows or bad
    assert len(good) + len(bad) == len(rows)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_made_to_fill_a_machine(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proportion, "FREE_BYTES", 4 << 20)
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda text: pyarrow.compress(text, codec="zstd", asbytes=True),
    }
    path = tmp_path / f"rows.jsonl{suffix}"
    line = json.dumps({"prompt": "a" * 3000, "completion": "b"}) + "\n"
    path.write_bytes(compress[suffix]((line * 3000).encode()))
    with pytest.raises(DataError, match=r"rows.jsonl.* more than 500 times as many, as only files"):
        list(read_rows(str(path), Selection(), Remarks()))
    # The same content is read if it is not compressed, or if there is less of it.
    path.write_bytes(compress[suffix]((line * 300).encode()))
    assert len(list(read_rows(str(path), Selection(), Remarks()))) == 300
