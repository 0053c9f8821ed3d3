"""Go's text/template, which Ollama uses, renders our templates as the chat templates of families.

Slow, because Go compiles its library first.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from template_families import TEMPLATES
from transformers import AutoTokenizer

from tuneline.prepare.tokens import templates
from tuneline.quantize.gguf import modelfile
from tuneline.quantize.proof import probes
from tuneline.quantize.proof.reference import Wording

PROGRAM = Path(__file__).parents[2] / "data" / "ollama.go"
FRAMING = ("qwen2_5", "llama3", "gemma", "phi3", "cohere")
"""Templates of families that do nothing but frame messages."""
HARD = [
    [{"role": "user", "content": text}]
    for text in (
        '"quoted" \\n {{ .System }} {{ end }}',
        "<b>&amp;</b>",
        "`x` 'y' \U0001f44d\r\nz",
        "{{",
    )
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("go") is None, reason="needs Go"),
]


def wording(model_dir: Path, template: str) -> Wording:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = template
    return Wording(model_dir=model_dir, tokenizer=tokenizer, stop_ids=[2], prompts=[], end="")


def test_ollama_renders_what_the_chat_template_renders(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    texts = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))}
    texts |= {f"ours {name}": template.text for name, template in templates.TEMPLATES.items()}
    framed = {}
    for name, text in texts.items():
        own = wording(tiny_model_dir, text)
        found = modelfile.pieces(own, bos="")
        if found is not None:
            framed[name] = (own, found.go_template())
    assert set(FRAMING) | {"ours chatml", "ours llama3"} <= set(framed)
    conversations = [
        [{**message, "content": message["content"].strip()} for message in messages]
        for messages in (*probes.conversations(), *HARD)
    ]
    expected: dict[str, list[tuple[Any, str]]] = {}
    for name, (own, _) in framed.items():
        expected[name] = []
        for messages in conversations:
            try:
                expected[name].append((messages, own.render(messages)))
            except ValueError:
                continue  # The template refuses it, and Ollama cannot.
    jobs = [
        {"template": framed[name][1], "conversations": [messages for messages, _ in pairs]}
        for name, pairs in expected.items()
    ]
    done = subprocess.run(
        ["go", "run", str(PROGRAM)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={"PATH": str(Path(shutil.which("go") or "").parent), "GOCACHE": str(tmp_path / "cache"),
             "HOME": str(tmp_path), "GOTOOLCHAIN": "local", "GOMAXPROCS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rendered = json.loads(done.stdout)
    assert sum(len(pairs) for pairs in expected.values()) > 60
    for (name, pairs), ours in zip(expected.items(), rendered, strict=True):
        assert ours == [text for _, text in pairs], name
