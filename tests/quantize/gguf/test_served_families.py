"""Whole GGUF files of the README's families, served by llama-server one after the other.

Of each family, a tiny model learns its chats by heart, so that rounding changes no answer. It is
converted, quantised to q8_0, proven and served: prompts, tokens and answers are those of the proof
and of transformers. Run by hand, about ten minutes:
pytest -m slow tests/quantize/gguf/test_served_families.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_server
import pytest
import torch
import transformers
from llama_server import LlamaServer
from small_records import new_merge
from tiny_families import FAMILIES, new_model
from torch.nn.functional import cross_entropy

from tuneline.artifacts import HELDOUT_FILE, QuantizedModel, write_jsonl
from tuneline.models.sampling import set_sampling, stop_at_end_of_turn
from tuneline.models.tokenizer.files import copy_tokenizer
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.gguf import converter
from tuneline.quantize.proof.reference import Reference, measure
from tuneline.quantize.run import run

pytestmark = pytest.mark.slow

Messages = list[dict[str, str]]
Layouts = dict[str, Callable[[Path], dict[str, Any]]]

QUESTION = {"role": "user", "content": "How many Mi are 3Gi?"}
CHATS: list[tuple[Messages, str]] = [
    ([QUESTION], "3072Mi"),
    (
        [
            QUESTION,
            {"role": "assistant", "content": "3072Mi"},
            {"role": "user", "content": "And 5Gi?"},
        ],
        "5120Mi\n\n- and so on",
    ),
    ([{"role": "user", "content": "대한민국의 수도는 어디입니까?"}], "서울입니다."),
]
"""Conversations, and the answer that is learnt; every template takes them."""

PIECES = {"Qwen2": "mistral", "Phi-3": "phi3", "Gemma 2": "gemma2", "Gemma 3": "gemma2"}
"""Families whose vocabulary is one of sentencepiece, and its layout; that of the others is
byte-level."""
SETTINGS: dict[str, dict[str, Any]] = {
    "DeepSeek V2": {"q_lora_rank": 32},
    "GLM-4-MoE": {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5},
    # Small weights leave two experts as likely at some position, which rounding to f16 exchanges.
    "DeepSeek V3": {"initializer_range": 0.1},
    "Phi-3": {"num_key_value_heads": 2},
}
"""What the published models have, and llama.cpp takes for granted."""
TOKENS = {"GLM-4-MoE": ["[gMASK]", "<|user|>", "<|observation|>"]}
"""Special tokens that the converter looks for in the tokenizer of a family."""
SERVED = (
    *("Llama 3", "Yi", "Mistral", "Qwen3", "Phi-3", "Gemma 2", "Gemma 3"),
    *("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek V2", "DeepSeek V3", "GLM-4-MoE", "gpt-oss"),
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_server.install(tmp_path_factory.mktemp("packages"))


def byte_level(name: str, directory: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Write a tokenizer as `piece_layouts` does, with the vocabulary of another directory."""
    source = tokenizer_dir
    if name in TOKENS:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.add_tokens(TOKENS[name], special_tokens=True)
        source = directory / "with-tokens"
        tokenizer.save_pretrained(source)
    copy_tokenizer(source, directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{end: getattr(tokenizer, end) for end in ends}}


def write_merged(name: str, root: Path, tokenizer_dir: Path, layouts: Layouts) -> Path:
    """Write a model that knows the answers to all chats, as merge would leave it."""
    base, merged = root / "base", root / "merged"
    base.mkdir()
    if name in PIECES:
        settings = layouts[PIECES[name]](base)
    else:
        settings = byte_level(name, base, tokenizer_dir)
    stops = settings.pop("stops", [settings["eos_token_id"]])
    settings.pop("sliding_window", None)
    model: Any = new_model(FAMILIES[name], **(settings | SETTINGS.get(name, {})))
    model.generation_config.eos_token_id = stops
    model.save_pretrained(merged)
    copy_tokenizer(base, merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    end = end_of_turn(tokenizer)
    stop_at_end_of_turn(merged, end, tokenizer)
    set_sampling(merged, "greedy")
    learn(model, tokenizer, end)
    for file in merged.glob("*.safetensors*"):
        file.unlink()
    generation = (merged / "generation_config.json").read_text()
    model.save_pretrained(merged)
    (merged / "generation_config.json").write_text(generation)
    new_merge(base="original", dtype="float32").write(merged)
    return merged


def end_of_turn(tokenizer: Any) -> str:
    """Return what the chat template writes after an answer."""
    text = rendered(tokenizer, [QUESTION, {"role": "assistant", "content": "ANSWER"}], False)
    return text.rpartition("ANSWER")[2].strip() or tokenizer.eos_token


def rendered(tokenizer: Any, messages: Messages, for_answer: bool = True) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=for_answer
    )
    return text


def learn(model: Any, tokenizer: Any, end: str) -> None:
    """Train a model until it answers each chat with certainty."""
    rows = []
    for messages, answer in CHATS:
        prompt = tokenizer(rendered(tokenizer, messages), add_special_tokens=False)["input_ids"]
        wanted = tokenizer(answer + end, add_special_tokens=False)["input_ids"]
        places = torch.arange(len(prompt), len(prompt) + len(wanted))
        rows.append((torch.tensor([prompt + wanted]), places, torch.tensor(wanted)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        largest = 0.0
        for ids, places, wanted in rows:
            # Logits of the answers only: most of a tiny model is its vocabulary.
            logits = model(input_ids=ids, logits_to_keep=places - 1).logits[0]
            losses = cross_entropy(logits, wanted, reduction="none")
            largest = max(largest, losses.max().item())
            losses.mean().backward()
        if largest < 0.02:
            return
        optimizer.step()
    raise AssertionError(f"not learned: {largest:.2f}")


@pytest.mark.parametrize("name", SERVED)
def test_a_family(
    name: str, tiny_model_dir: Path, layouts: Layouts, packages: Path, tmp_path: Path
) -> None:
    merged = write_merged(name, tmp_path, tiny_model_dir, layouts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    prompts = [rendered(tokenizer, messages) for messages, _ in CHATS]
    heldout = {"answer": CHATS[0][1], "end": end_of_turn(tokenizer), "question": "3Gi?"}
    (tmp_path / "dataset").mkdir()
    write_jsonl(tmp_path / "dataset" / HELDOUT_FILE, [{"prompt": prompts[0], **heldout}])
    record = run(
        QuantizeConfig(),
        format="q8_0",
        merged_dir=str(merged),
        dataset_dir=str(tmp_path / "dataset"),
        quantized_dir=str(tmp_path / "q8_0"),
    )
    assert record.prompt == prompts[0]
    assert record.reference == CHATS[0][1]
    assert shown(record.generated, name) == CHATS[0][1]
    reference = measure(merged, dataset_dir=tmp_path / "dataset", num_rows=1, num_tokens=24)
    file = tmp_path / "q8_0" / record.file
    with LlamaServer(packages, file, num_context=512) as server:
        check_answers(name, record, reference, prompts, server)


def test_a_family_whose_tokenizer_is_known_by_its_vocabulary(
    tiny_model_dir: Path, layouts: Layouts, packages: Path, tmp_path: Path
) -> None:
    """transformers and llama.cpp split Qwen2's texts alike with the published vocabulary only."""
    merged = write_merged("Qwen2", tmp_path, tiny_model_dir, layouts)
    converter.convert(merged, tmp_path / "model.gguf")
    reference = measure(merged, dataset_dir=None, num_rows=1, num_tokens=1)
    with LlamaServer(packages, tmp_path / "model.gguf", num_context=512) as server:
        for messages, _ in CHATS:
            ids = reference.tokenise_prompt(rendered(reference.tokenizer, messages))
            made = greedy(merged, ids)
            plain = server.post("/completion", prompt=ids, n_predict=48, return_tokens=True)
            assert (plain["tokens_evaluated"], plain["tokens"]) == (len(ids), made)
            assert made[-1] in reference.stop_ids and plain["stop_type"] == "eos"


def greedy(model_dir: Path, ids: list[int]) -> list[int]:
    """Return the tokens with which transformers continues a prompt."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    made = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=48,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    )  # fmt: skip
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


def shown(text: str, name: str) -> str:
    """Return an answer as transformers shows it.

    Sentencepiece begins a text with a space, which transformers leaves out and llama.cpp shows.
    """
    return text.removeprefix(" ") if PIECES.get(name) in ("phi3", "mistral") else text


def check_answers(
    name: str, record: QuantizedModel, reference: Reference, prompts: list[str], server: LlamaServer
) -> None:
    proven = server.post("/completion", prompt=record.prompt, n_predict=24)
    assert proven["content"] == record.generated
    for (messages, answer), prompt in zip(CHATS, prompts, strict=True):
        ids = reference.tokenise_prompt(prompt)
        made = greedy(reference.model_dir, ids)
        assert made[-1] in reference.stop_ids
        said = server.post(
            "/v1/chat/completions",
            messages=messages,
            max_tokens=48,
            return_tokens=True,
            verbose=True,
        )
        raw = said["__verbose"]
        text = server.post("/apply-template", messages=messages)["prompt"]
        tokens = server.post("/tokenize", content=text, add_special=True, parse_special=True)
        assert tokens["tokens"] == ids
        assert said["usage"]["prompt_tokens"] == len(ids)
        assert (raw["tokens"], raw["stop_type"]) == (made, "eos")
        assert shown(said["choices"][0]["message"]["content"], name) == answer
        # As the chat does: without the token that llama.cpp puts before a text.
        plain = server.post("/completion", prompt=text, n_predict=48, return_tokens=True)
        assert (plain["tokens_evaluated"], plain["tokens"]) == (len(ids), made)
        assert shown(plain["content"], name) == answer
