"""`ollama run hf.co/...` gets the template and the parameters that were proven."""

from pathlib import Path

import pytest
from small_records import new_export

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ProofError
from tuneline.publish import staging
from tuneline.publish.sources import Repository
from tuneline.publish.usage import USAGE

TEMPLATE = "{{ range .Messages }}\r\n{{ .Content }}{{ end }}\n"


def export(directory: Path, format: str, **files: str) -> tuple[Path, QuantizedModel]:
    path = directory / format
    path.mkdir()
    for name, text in {"Modelfile": "FROM ./m.gguf\n", "m.gguf": "", **files}.items():
        (path / name).write_bytes(text.encode())
    new_export(format=format, file="m.gguf", num_context=2048).write(path)
    return path, QuantizedModel.read(path)


def test_files_that_the_hub_reads(tmp_path: Path) -> None:
    exports = dict(
        export(tmp_path, format, template=TEMPLATE, params='{"temperature": 0}\n')
        for format in ("q8_0", "q4_k_m")
    )
    repo = Repository("me/mine-gguf", "gguf", exports)
    assert staging._modelfiles(repo) == {
        "Modelfile-q8_0": "FROM ./mine-q8_0.gguf\n",
        "Modelfile-q4_k_m": "FROM ./mine-q4_k_m.gguf\n",
        "template": TEMPLATE,
        "params": '{"temperature": 0}\n',
    }
    lines = USAGE["gguf"](None, repo)
    assert "ollama run hf.co/me/mine-gguf:Q4_K_M" in lines
    assert "llama-cli -hf me/mine-gguf:Q4_K_M -cnv -c 2048" in lines
    (tmp_path / "q8_0/params").write_text("{}")
    with pytest.raises(ProofError, match="params was changed after it was proven"):
        staging._modelfiles(repo)


def test_no_template_that_one_export_does_not_have(tmp_path: Path) -> None:
    exports = dict([export(tmp_path, "q8_0", template="a"), export(tmp_path, "q4_k_m")])
    repo = Repository("me/mine-gguf", "gguf", exports)
    assert set(staging._modelfiles(repo)) == {"Modelfile-q8_0", "Modelfile-q4_k_m"}
    assert "hf.co" not in USAGE["gguf"](None, repo)
