"""An export, opened by the programs that people use, gives the prompts and answers of the proof.

A tiny model is trained until it knows its chats by heart, so every answer and its end are known,
and no rounding changes them. Run by hand, about two minutes:
pytest -m slow tests/quantize/gguf/test_readers.py
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import llama_server
import pytest
import torch
from app_server import serving
from llama_server import LlamaServer
from template_families import TEMPLATES, TOOLS
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from tuneline.artifacts import MergeProof, QuantizedModel
from tuneline.models.sampling import PRESETS, Preset, set_sampling
from tuneline.quantize.gguf import converter
from tuneline.quantize.gguf import proof as gguf_proof
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof import probes
from tuneline.quantize.proof.reference import Reference, measure
from tuneline.quantize.run import convert

pytestmark = pytest.mark.slow

Messages = list[dict[str, Any]]

USER = {"role": "user", "content": "How many Mi are 3Gi?"}
CALL = {"name": "get_weather", "arguments": {"city": "Busan"}}


@dataclass(frozen=True)
class Chat:
    """A conversation, and the text with which the model answers it."""

    messages: Messages
    answer: str
    tools: Any = None


CHATS = {
    "one turn": Chat([USER], "3072Mi"),
    "system": Chat([{"role": "system", "content": "Be brief."}, USER], "3072"),
    "turns": Chat(
        [USER, {"role": "assistant", "content": "3072Mi"}, {"role": "user", "content": "And 5Gi?"}],
        "5120Mi\n\n- and so on",
    ),
    "Korean": Chat(
        [{"role": "user", "content": "대한민국의 수도는 어디입니까?"}],
        "서울입니다.",
    ),
    "emoji": Chat([{"role": "user", "content": "\U0001f44d\U0001f3fd or ☕?"}], "☕ \U0001f389"),
    "tool": Chat(
        [{"role": "user", "content": "Busan?"}],
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        TOOLS,
    ),
}


def prompt_of(reference: Reference, chat: Chat) -> str:
    text: str = reference.tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=True
    )
    return text


def learn(directory: Path, prompts: dict[str, str], reference: Reference) -> None:
    """Train the model in a directory until it answers each prompt with certainty."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows, places = [], []
    for number, (name, prompt) in enumerate(prompts.items()):
        start = reference.tokenise_prompt(prompt)
        answer = [*reference.tokenise(CHATS[name].answer), reference.tokenizer.eos_token_id]
        rows.append(torch.tensor(start + answer))
        places += [(number, len(start) + index, token) for index, token in enumerate(answer)]
    # Padding comes last, where no answer sees it.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    row, position, answers = torch.tensor(places).T
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        # Logits of the answers only: most of this model is its vocabulary.
        hidden = model.model(ids).last_hidden_state[row, position - 1]
        losses = cross_entropy(model.lm_head(hidden), answers, reduction="none")
        if losses.max() < 0.1:
            model.save_pretrained(directory)
            return
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    raise AssertionError(f"not learned: {losses}")


@dataclass(frozen=True)
class Export:
    """A proven GGUF file, and the merged model that it was made from."""

    file: Path
    record: QuantizedModel
    reference: Reference
    prompts: dict[str, str]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_server.install(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def export(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("readers")
    merged = root / "merged"
    shutil.copytree(merged_dir, merged)
    template = (TEMPLATES / "qwen2_5.jinja").read_text()
    (merged / "chat_template.jinja").write_text(template)
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (merged / "tokenizer_config.json").write_text(json.dumps(settings))
    set_sampling(merged, "greedy")
    before = measure(merged, dataset_dir=None, num_rows=1, num_tokens=1)
    prompts = {name: prompt_of(before, chat) for name, chat in CHATS.items()}
    learn(merged, prompts, before)
    MergeProof.read(merged).write(merged)
    record = convert(merged_dir=str(merged), gguf_dir=str(root / "gguf"))
    reference = measure(merged, dataset_dir=None, num_rows=1, num_tokens=1)
    return Export(root / "gguf" / record.file, record, reference, prompts)


def test_llama_server(export: Export, packages: Path) -> None:
    reference = export.reference
    with LlamaServer(packages, export.file, num_context=export.record.num_context) as server:
        props = server.get("/props")
        assert props["default_generation_settings"]["n_ctx"] == export.record.num_context
        proven = server.post("/completion", prompt=export.record.prompt, n_predict=24)
        assert proven["content"] == export.record.generated
        for name, chat in CHATS.items():
            prompt = export.prompts[name]
            num_prompt_tokens = len(reference.tokenise_prompt(prompt))
            ids = [*reference.tokenise(chat.answer), reference.tokenizer.eos_token_id]
            tools = {"tools": chat.tools} if chat.tools else {}
            reply = server.post(
                "/v1/chat/completions",
                messages=chat.messages,
                max_tokens=64,
                return_tokens=True,
                verbose=True,
                **tools,
            )
            said = reply["__verbose"]
            assert said["prompt"] == prompt, name
            assert reply["usage"]["prompt_tokens"] == num_prompt_tokens, name
            assert (said["tokens"], said["stop_type"]) == (ids, "eos"), name
            (choice,) = reply["choices"]
            if chat.tools:
                (call,) = choice["message"]["tool_calls"]
                assert call["function"]["name"] == CALL["name"]
                assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
                assert choice["finish_reason"] == "tool_calls"
            else:
                assert choice["message"]["content"] == chat.answer
                assert choice["finish_reason"] == "stop"
            plain = server.post("/completion", prompt=prompt, n_predict=64, return_tokens=True)
            assert plain["tokens_evaluated"] == num_prompt_tokens, name
            assert (plain["tokens"], plain["stop_type"]) == (ids, "eos"), name
            assert plain["content"] == chat.answer


@pytest.fixture
def port(export: Export) -> Iterator[int]:
    """The server of `tuneline chat --serve`."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from tuneline.pipelines.chat.published import read_published
    from tuneline.pipelines.chat.serve import gguf_app
    from tuneline.pipelines.chat.subject import find_subject

    subject = find_subject(str(export.file), format=None, base=None, needs_base=False)
    app = gguf_app(subject, read_published(subject.tuned))
    with serving(app) as port:
        yield port


def test_our_own_server(export: Export, port: int) -> None:
    for name, chat in CHATS.items():
        body = {"model": "x", "messages": chat.messages, "tools": chat.tools, "max_tokens": 64}
        request = Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as answer:
            reply = json.load(answer)
        ids = export.reference.tokenise(chat.answer)
        num_prompt_tokens = len(export.reference.tokenise_prompt(export.prompts[name]))
        assert reply["usage"]["prompt_tokens"] == num_prompt_tokens, name
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == chat.answer, name
        assert choice["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] in (len(ids), len(ids) + 1), name


RENDERED = {
    **dict.fromkeys(("qwen2_5", "qwen3", "phi3", "cohere", "gptoss", "lfm2", "glm4moe"), ""),
    "qwen3_5_nothink": "enable_thinking",
    "gemma4": "enable_thinking",
    "llama3_1": "date_string",
}
"""Chat templates, and the variable with which llama-server changes their prompts."""


@pytest.mark.parametrize("name", RENDERED)
def test_llama_server_renders_a_family(
    name: str, f16_dir: Path, merged_dir: Path, packages: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    file = f16_dir / QuantizedModel.read(f16_dir).file
    changed = {"enable_thinking": True, "date_string": time.strftime("%d %b %Y")}

    def expected(messages: Messages, **variables: Any) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
        return text

    with LlamaFile(file, num_context=16, vocab_only=True) as loaded:
        loaded.chat_template = tokenizer.chat_template
        notes = gguf_proof.server_notes(loaded)
    variable = RENDERED[name]
    assert notes == ([gguf_proof.SERVER_VARIABLES[variable][1]] if variable else [])
    for reasoning in (-1, 0) if variable == "enable_thinking" else (-1,):
        now = {variable: changed[variable]} if variable and reasoning else {}
        with LlamaServer(
            packages, file, num_context=64, template=tokenizer.chat_template, reasoning=reasoning
        ) as server:
            for messages in probes.conversations():
                got = server.post("/apply-template", messages=messages)["prompt"]
                assert got == expected(messages, **now)
                assert not variable or (got == expected(messages)) == (not now)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "greedy"])
def test_a_preset_means_the_same_in_llama_server(
    preset: Preset, merged_dir: Path, packages: Path, tmp_path: Path
) -> None:
    """The probabilities of the next token, after all that the preset does to them."""
    merged = tmp_path / "merged"
    shutil.copytree(merged_dir, merged)
    set_sampling(merged, preset)
    converter.convert(merged, tmp_path / "model.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    reference = measure(merged, dataset_dir=None, num_rows=1, num_tokens=1)
    # Random weights know no text; larger logits give the probabilities of a trained model.
    text = "How many Mi are 3Gi? " * 12
    ids = torch.tensor([reference.tokenise_prompt(text)])
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    processors: LogitsProcessorList = model._get_logits_processor(
        model.generation_config, input_ids_seq_length=ids.shape[1], logits_processor=None,
        device="cpu",
    )  # fmt: skip
    expected = processors(ids, logits).softmax(-1)[0]
    with LlamaServer(packages, tmp_path / "model.gguf", num_context=512) as server:
        reply = server.post(
            "/completion",
            prompt=text,
            n_predict=1,
            n_probs=50,
            post_sampling_probs=True,
        )
    (place,) = reply["completion_probabilities"]
    got = {each["id"]: each["prob"] for each in place["top_probs"]}
    assert sum(got.values()) == pytest.approx(1, abs=1e-3)
    assert {token for token, prob in got.items() if prob > 0} == {
        int(token) for token in expected.nonzero()
    }
    for token, prob in got.items():
        assert prob == pytest.approx(float(expected[token]), abs=2e-3), token
