"""A published repository is downloaded: a checkpoint, or the one GGUF file that is chosen."""

import subprocess
import sys
from pathlib import Path

from hub_server import client_environment, downloaded, serve_files

PROGRAM = """
import sys
from tuneline.pipelines.chat.subject import find_subject
for format in sys.argv[1:]:
    try:
        found = find_subject("org/model", format=format or None, base=None, needs_base=False)
        print(found.tuned.kind, found.tuned.path.name, found.tuned.title)
    except ValueError as error:
        print(error)
"""


def find(model_dir: Path, home: Path, *formats: str) -> tuple[list[str], set[str]]:
    """Return what the program prints for each format, and the names of downloaded files."""
    with serve_files(model_dir) as (url, handler):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *formats],
            env=client_environment(url, home),
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), downloaded(handler)


def test_one_gguf_file_of_several(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for name in ("bot-q4_k_m.gguf", "bot-q8_0.gguf", "README.md", "tuneline.json"):
        (model_dir / name).write_text("GGUF")
    lines, fetched = find(model_dir, tmp_path, "q8_0", "", "q2_k")
    assert lines[0] == "gguf bot-q8_0.gguf bot-q8_0"
    for line in lines[1:]:
        assert line.startswith("org/model has bot-q4_k_m.gguf, bot-q8_0.gguf: name the end of one")
    assert fetched == {"bot-q8_0.gguf"}


def test_a_checkpoint(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (model_dir / name).write_text("{}")
    lines, fetched = find(model_dir, tmp_path, "")
    assert len(lines) == 1 and lines[0].endswith("merged model")
    assert fetched == {"config.json", "model.safetensors"}
