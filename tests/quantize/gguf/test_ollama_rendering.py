"""Ollama's own packages render and read our files; the Hub's guess, which they replace, is shown.

Slow, and needs the network: Go compiles Ollama's packages, and npm installs the Hub's converter.
"""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from template_families import TEMPLATES
from transformers import AutoTokenizer

from tuneline.artifacts import MODELFILE, OLLAMA_PARAMS
from tuneline.models.sampling import PRESETS, set_sampling
from tuneline.prepare.tokens import templates
from tuneline.quantize.gguf import modelfile
from tuneline.quantize.proof import probes
from tuneline.quantize.proof.reference import Wording

PROGRAM = Path(__file__).parents[2] / "data" / "ollama" / "main.go"
OLLAMA = "github.com/ollama/ollama@v0.17.4"
BRIDGE = "@huggingface/ollama-utils@0.0.18"
"""The converter with which the Hub guesses a template for `ollama run hf.co/...`."""
CONVERT = """
const { convertGGUFTemplateToOllama } = require("@huggingface/ollama-utils");
const models = JSON.parse(require("fs").readFileSync(0, "utf8"));
const guesses = models.map((model) => convertGGUFTemplateToOllama(model)?.ollama ?? null);
process.stdout.write(JSON.stringify(guesses));
"""
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
CONVERSATIONS = [
    [{**message, "content": message["content"].strip()} for message in messages]
    for messages in (*probes.conversations(), *HARD)
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("go") is None, reason="needs Go"),
]

Job = dict[str, Any]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    module = tmp_path_factory.mktemp("ollama")
    shutil.copy(PROGRAM, module)
    for arguments in (["mod", "init", "reader"], ["get", OLLAMA], ["build", "-o", "reader", "."]):
        go(*arguments, directory=module)
    return module / "reader"


def go(*arguments: str, directory: Path) -> None:
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}
    done = subprocess.run(
        ["go", *arguments], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run(program: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    done = subprocess.run([program], input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def wording(model_dir: Path, tokenizer: Any, template: str) -> Wording:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return Wording(model_dir=model_dir, tokenizer=tokenizer, stop_ids=[2], prompts=[], end="")


@pytest.fixture(scope="module")
def framed(tiny_model_dir: Path) -> dict[str, tuple[Wording, str]]:
    """Chat templates that have a Go template, by name."""
    texts = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))}
    texts |= {f"ours {name}": template.text for name, template in templates.TEMPLATES.items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    found = {}
    for name, text in texts.items():
        own = wording(tiny_model_dir, tokenizer, text)
        framing = modelfile.pieces(own, bos="")
        if framing is not None:
            found[name] = (own, framing.go_template())
    return found


def conversations_of(own: Wording) -> list[tuple[Any, str]]:
    """Return the conversations that a chat template accepts, and their texts."""
    rendered = []
    for messages in CONVERSATIONS:
        try:
            rendered.append((messages, own.render(messages)))
        except ValueError:
            continue  # The template refuses it, and Ollama cannot.
    return rendered


def test_ollama_renders_what_the_chat_template_renders(
    framed: dict[str, tuple[Wording, str]], program: Path
) -> None:
    assert set(FRAMING) | {"ours chatml", "ours llama3"} <= set(framed)
    expected = {name: conversations_of(own) for name, (own, _) in framed.items()}
    jobs = [
        {"template": framed[name][1], "conversations": [messages for messages, _ in pairs]}
        for name, pairs in expected.items()
    ]
    assert sum(len(pairs) for pairs in expected.values()) > 60
    for (name, pairs), result in zip(expected.items(), run(program, jobs), strict=True):
        assert result["Texts"] == [text for _, text in pairs], name


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_what_the_hub_would_guess_without_our_template(
    framed: dict[str, tuple[Wording, str]], program: Path, tmp_path: Path
) -> None:
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", BRIDGE]
    subprocess.run(install, cwd=tmp_path, check=True)
    models = [
        {"chat_template": own.tokenizer.chat_template, "bos_token": "", "eos_token": "<|im_end|>"}
        for own, _ in framed.values()
    ]
    done = subprocess.run(
        ["node", "-e", CONVERT],
        cwd=tmp_path,
        input=json.dumps(models),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    guesses = dict(zip(framed, json.loads(done.stdout), strict=True))
    wrong, right = set(), set()
    for name, guess in guesses.items():
        pairs = conversations_of(framed[name][0])
        texts = None
        if guess is not None:
            job = {"template": guess["template"], "conversations": [each for each, _ in pairs]}
            (result,) = run(program, [job])
            texts = result["Texts"]
        (right if texts == [text for _, text in pairs] else wrong).add(name)
    # Alpaca loses its opening sentence, and Qwen 2.5 the system message of every training row.
    assert {"ours alpaca", "qwen2_5"} <= wrong, (wrong, right)


@pytest.mark.parametrize("preset", PRESETS)
def test_ollama_reads_the_same_from_modelfile_and_params(
    preset: Any, merged_dir: Path, program: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "merged"
    shutil.copytree(merged_dir, model_dir)
    set_sampling(model_dir, preset)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    own = wording(model_dir, tokenizer, templates.TEMPLATES["alpaca"].text)
    file = tmp_path / "export" / "model.gguf"
    file.parent.mkdir()
    assert modelfile.write(file, reference=own, adds_bos=False) == []
    (result,) = run(
        program,
        [
            {
                "modelfile": (file.parent / MODELFILE).read_text(),
                "params": json.loads((file.parent / OLLAMA_PARAMS).read_text()),
            }
        ],
    )
    framing = modelfile.pieces(own, bos="")
    assert framing is not None and result["Template"] == framing.go_template()
    options = result["Options"]
    assert options == result["ParamsOptions"]
    numbers = PRESETS[preset]
    assert options["num_ctx"] == 2048 and options["stop"] == own.stop_texts
    assert options.get("temperature", 0) == pytest.approx(
        0 if numbers.is_greedy else numbers.temperature
    )
    assert options["repeat_penalty"] == pytest.approx(numbers.repetition_penalty)
    if not numbers.is_greedy:
        assert options["top_p"] == pytest.approx(numbers.top_p)
        assert options["top_k"] == numbers.top_k and options.get("min_p", 0) == 0
    # The penalty of transformers concerns the whole text.
    assert numbers.repetition_penalty == 1 or options["repeat_last_n"] == options["num_ctx"]
