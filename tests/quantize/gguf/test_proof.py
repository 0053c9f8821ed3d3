"""Each fault of a GGUF file that the proof is there for, made on purpose."""

import dataclasses
import json
import math
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tuneline.artifacts import HELDOUT_FILE, MODELFILE, read_jsonl, write_jsonl
from tuneline.errors import DataError, ProofError
from tuneline.models.context import context_length
from tuneline.models.heldout_rows import MAX_ROW_TOKENS, Row, read_rows
from tuneline.quantize.formats import FORMATS, Bound
from tuneline.quantize.gguf import llama_model, modelfile
from tuneline.quantize.gguf import proof as gguf_proof
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof import probes, quality
from tuneline.quantize.proof.reference import Reference, measure
from tuneline.quantize.proof.transformers_model import TransformersModel

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The shape of Llama 3's: stripped contents, a header round each role, and its own first token.
HEADERS = (
    "{{ '<|endoftext|>' }}{% for message in messages %}{{ '<h>' + message['role'] + '</h>\n\n' + "
    "message['content'] | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<h>assistant</h>\n\n' }}{% endif %}"
)
# The shape of Gemma's: no system role, and another word for the assistant.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{{ '<t>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] + '</t>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<t>model\n' }}{% endif %}"
)
COUNTING = (
    "{% for message in messages %}{{ loop.index ~ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def reference(merged_dir: Path, dataset_dir: Path) -> Reference:
    return measure(merged_dir, dataset_dir=dataset_dir, num_rows=4, num_tokens=4)


@pytest.fixture
def f16_file(f16_dir: Path, tmp_path: Path) -> Path:
    """The f16 file in a directory of its own, which a Modelfile is written into."""
    return Path(shutil.copy(f16_dir / "model-F16.gguf", tmp_path))


def with_template(reference: Reference, template: str | None, **changes: Any) -> Reference:
    import copy

    tokenizer = copy.deepcopy(reference.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(reference, tokenizer=tokenizer, **changes)


def prove(
    file: Path, reference: Reference, *, bound: Bound = FORMATS["f16"].bound
) -> dict[str, Any]:
    return gguf_proof.prove(file, format="f16", reference=reference, bound=bound)


def test_texts_cover_what_they_say() -> None:
    texts = probes.texts()
    assert len(set(texts)) == len(texts) >= 200
    together = "".join(texts)
    names = {unicodedata.name(letter, "").split(" ")[0] for letter in together}
    for script in ("HANGUL", "CJK", "CYRILLIC", "ARABIC", "DEVANAGARI", "THAI", "HEBREW", "GREEK"):
        assert script in names
    assert "\u200d" in together and "\U0001f1f0" in together  # joined emoji, flags
    assert sum(text.strip() == "" for text in texts) >= 12
    assert any(text.isdigit() and len(text) > 10 for text in texts)
    assert any("def f(x):\n    return" in text for text in texts)
    assert [messages[0]["role"] for messages in probes.conversations()].count("system") == 2


def test_kl_and_perplexity_by_hand() -> None:
    # Two positions, two tokens: p = (1/2, 1/2), q = (1/4, 3/4), then equal. The answer is token 1.
    rows = [Row([0, 1], 1)]
    p = [torch.tensor([[0.0, 0.0], [1.0, 3.0]])]
    q = [torch.tensor([[0.0, math.log(3)], [1.0, 3.0]])]
    found = quality.compare(rows, p, q)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.mean_kl == pytest.approx(by_hand / 2, rel=1e-6)
    assert found.top1_agreement == 1.0  # Both tokens are as likely in p.
    assert found.perplexity == pytest.approx(4 / 3, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(2, rel=1e-6)


def test_a_flat_distribution_is_no_disagreement() -> None:
    # 8B parameters with random weights: f16 had a KL divergence of 1.6e-5, but 6 of 276 positions
    # had another most likely token, because the two best logits were closer than rounding.
    p = torch.tensor([[0.0, 0.004, -2.0]] * 4)
    found = quality.compare([Row([0, 1, 1, 0], 1)], [p], [p[:, [1, 0, 2]]])
    quality.check_bounds(found, FORMATS["f16"].bound, "f16")
    turned = quality.compare([Row([0, 1, 1, 0], 1)], [p * 100], [100 * p[:, [1, 0, 2]]])
    with pytest.raises(ProofError, match=r"same most likely token at 0\.0% of positions"):
        quality.check_bounds(turned, FORMATS["f16"].bound, "f16")


def test_rows_begin_to_count_at_the_answer(reference: Reference, dataset_dir: Path) -> None:
    first = read_jsonl(dataset_dir / HELDOUT_FILE)[0]
    rows = read_rows(dataset_dir, 3, reference.tokenise)
    row = rows[0]
    assert reference.tokenizer.decode(row.ids[: row.start]) == first["prompt"]
    assert reference.tokenizer.decode(row.ids[row.start :]) == first["answer"] + first["end"]
    # Then training rows, all of which counts.
    assert len(rows) == 3
    assert reference.tokenizer.decode(rows[1].ids) == "1Gi is 1024Mi of memory."


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row to compare"):
        read_rows(tmp_path, 3, lambda text: [1])


@pytest.mark.parametrize("broken", [float("nan"), 5.0])
def test_a_bound_holds_numbers_that_are_not_finite_too(broken: float) -> None:
    found = quality.Quality(broken, 0.5, 2.0, 1.5, 8, 400)
    with pytest.raises(
        ProofError,
        match=rf"q8_0 has a mean KL divergence of {broken:g} nats .* at 50\.0% of positions",
    ):
        quality.check_bounds(found, FORMATS["q8_0"].bound, "q8_0")
    with pytest.raises(ProofError, match=r"at least 93\.0%"):
        quality.check_bounds(dataclasses.replace(found, mean_kl=0.0), FORMATS["q8_0"].bound, "q8_0")


def test_advice_after_a_violated_bound_is_what_can_help() -> None:
    """Random experts are mended neither by more bits nor by another bound."""

    def advice(kl: float, top1: float, name: str) -> str:
        with pytest.raises(ProofError) as raised:
            bound = dataclasses.replace(FORMATS[name].bound, max_mean_kl=1e-9)
            quality.check_bounds(quality.Quality(kl, top1, 2.0, 1.5, 8, 400), bound, name)
        return str(raised.value)

    assert "use a format with more bits (q4_k_s, iq4_nl, q4_k_m), or set" in advice(
        0.7, 0.7, "q4_0"
    )
    assert "use a format with more bits (gptq-8bit), or set" in advice(0.7, 0.7, "gptq-4bit")
    assert "more bits" not in advice(0.06, 0.95, "gptq-8bit")
    assert "set quantize.max_mean_kl" in advice(0.06, 0.95, "gptq-8bit")
    for kl, top1, name in ((9.0, 0.05, "gptq-4bit"), (math.nan, 0.9, "q8_0"), (0.1, 0.99, "f16")):
        assert "if you accept it" not in advice(kl, top1, name)
        assert "neither more bits nor another bound is the remedy" in advice(kl, top1, name)


@pytest.mark.parametrize(
    ("kl", "top1", "num_positions", "is_few"),
    [(0.007, 0.921, 76, True), (0.007, 0.921, 4000, False), (0.06, 0.921, 76, False)],
)
def test_more_rows_are_advised_where_chance_can_be_the_cause(
    kl: float, top1: float, num_positions: int, is_few: bool
) -> None:
    found = quality.Quality(kl, top1, 2.0, 1.5, 4, num_positions)
    with pytest.raises(ProofError, match=f"over {num_positions} positions of 4 rows") as raised:
        quality.check_bounds(found, FORMATS["q8_0"].bound, "q8_0")
    assert ("raise quantize.num_proof_prompts" in str(raised.value)) == is_few


def test_more_bits_are_advised_only_where_rounding_can_be_the_cause() -> None:
    assert quality.advice_on_answers("q4_k_s") == (
        "use a format with more bits (iq4_nl, q4_k_m, q4_1)"
    )
    assert "gptq-8bit" in quality.advice_on_answers("gptq-3bit")
    for name in ("f16", "bf16", "q8_0", "gptq-8bit"):
        assert "more bits" not in quality.advice_on_answers(name)
        assert "report the model" in quality.advice_on_answers(name)
    assert quality.more_bits("f16") == quality.more_bits("gptq-8bit") == ""


def test_a_file_that_stops_nowhere_or_says_nothing(reference: Reference) -> None:
    never = [torch.zeros(len(row.ids)) for row in reference.rows]
    stop = reference.stop_ids[0]
    logits = [torch.zeros(len(row.ids), 8 + stop) for row in reference.rows]
    for row in logits:
        row[:, stop] = 9.0
    always = dataclasses.replace(reference, logits=logits)
    for name, says in (("q4_0", "Use a format with more bits"), ("f16", "The file does not hold")):
        with pytest.raises(ProofError, match=f"the export {name} stops with 0.00, .*{says}"):
            gguf_proof.check_stops(name, never, always)
    empty = dataclasses.replace(reference.generation, text=" ")
    with pytest.raises(ProofError, match="q8_0 generates nothing .*The file does not hold"):
        gguf_proof._check_answer("q8_0", empty, dataclasses.replace(empty, text="3072Mi"))


@pytest.mark.parametrize(
    ("file_type", "says"),
    [
        ("1", "More bits do not help, because all"),
        ("2", "the f16 file was finite, so the rounding"),
    ],
)
def test_logits_that_are_not_finite(
    f16_file: Path, monkeypatch: pytest.MonkeyPatch, file_type: str, says: str
) -> None:
    with LlamaFile(f16_file, num_context=16) as loaded:
        loaded._model.metadata["general.file_type"] = file_type
        monkeypatch.setattr(
            llama_model.numpy, "isfinite", lambda logits: numpy.zeros(1, dtype=bool)
        )
        with pytest.raises(ProofError, match=says):
            loaded.logits([1, 2, 3])


def test_a_computation_that_llama_cpp_refuses(f16_file: Path) -> None:
    with LlamaFile(f16_file, num_context=256) as loaded:
        loaded._decode([1] * 256, position=0)
        with pytest.raises(ProofError, match=r"code 1\): its context has no room") as raised:
            loaded._decode([1], position=256)
    assert "memory" not in str(raised.value)


def test_a_tokenizer_that_splits_otherwise(reference: Reference) -> None:
    def digits_in_one(text: str) -> list[int]:
        return [0] if text.isdigit() else reference.tokenise(text)

    with pytest.raises(ProofError, match=r"splits \d+ of 2\d\d texts differently .* first '0'"):
        gguf_proof.check_tokenizer(
            probes.texts(), tested=digits_in_one, reference=reference.tokenise
        )


def test_another_template(f16_file: Path, reference: Reference) -> None:
    template = CHATML.replace("'\n' }}{% endfor", "'\n\n' }}{% endfor")
    with pytest.raises(ProofError, match=r"a conversation of 1 messages differently .* from"):
        prove(f16_file, with_template(reference, template))
    with pytest.raises(ProofError, match="against a refusal"):
        prove(f16_file, with_template(reference, "{{ raise_exception('never') }}"))
    assert not (f16_file.parent / MODELFILE).exists()


def test_a_model_without_a_template(f16_file: Path, reference: Reference) -> None:
    proof = prove(f16_file, with_template(reference, None))
    assert proof["num_conversations"] == 0
    assert "TEMPLATE" not in (f16_file.parent / MODELFILE).read_text()


def test_a_stop_token_that_does_not_stop(f16_file: Path, reference: Reference) -> None:
    (plain,) = reference.tokenise("a")
    unframed = with_template(reference, None)
    with pytest.raises(ProofError, match="does not stop at 'a', where the merged model stops"):
        prove(f16_file, dataclasses.replace(unframed, stop_ids=[plain]))
    ending_in_a = with_template(reference, CHATML.replace("<|im_end|>", "a"))
    with pytest.raises(ProofError, match="does not stop at 'a', where the merged model stops"):
        with LlamaFile(f16_file, num_context=16) as loaded:
            ends = dataclasses.replace(ending_in_a, stop_ids=[*reference.stop_ids, plain])
            gguf_proof.check_stop_tokens(loaded, ends)
    more = dataclasses.replace(reference, stop_ids=[*reference.stop_ids, plain])
    assert "does not stop at 'a', which generation_config.json" in prove(f16_file, more)["notes"][0]
    with pytest.raises(ProofError, match=r"does not stop at '<\|im_start\|>', which the chat"):
        prove(f16_file, dataclasses.replace(reference, end="<|im_start|>"))
    proof = prove(f16_file, dataclasses.replace(reference, end="### End\n"))
    assert "'### End', is not one special token" in proof["notes"][0]
    assert 'PARAMETER stop "### End"' in (f16_file.parent / MODELFILE).read_text()


def test_a_file_that_runs_on(f16_file: Path, reference: Reference) -> None:
    (stop,) = reference.stop_ids
    stopping = [logits.clone() for logits in reference.logits]
    for logits in stopping:
        logits[:, stop] = logits.max() + 1
    merged = dataclasses.replace(reference, logits=stopping)
    own = [logits.softmax(-1)[:, stop] for logits in stopping]
    gguf_proof.check_stops("q2_k", own, merged)
    gguf_proof.check_stops("q2_k", [0.6 * p for p in own], merged)
    with pytest.raises(
        ProofError, match=r"at \d+ places .* probability of 0\.\d\d, the export q2_k"
    ):
        gguf_proof.check_stops("q2_k", [0.4 * p for p in own], merged)
    # A merged model that stops nowhere asks nothing.
    silent = dataclasses.replace(reference, logits=[x.clone() for x in reference.logits])
    for logits in silent.logits:
        logits[:, stop] = logits.min() - 1
    gguf_proof.check_stops("q2_k", [0 * p for p in own], silent)


def test_generation_ends_at_a_stop_token(f16_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaFile(f16_file, num_context=64) as loaded:
        prompt_ids = loaded.tokenise("How many")
        long = loaded.generate(prompt_ids, num_tokens=6).ids
        third = long[2]
        monkeypatch.setattr(loaded, "is_stop", lambda token: token == third)
        assert loaded.generate(prompt_ids, num_tokens=6).ids == long[: long.index(third) + 1]


def test_a_long_prompt_is_cut_as_the_rows_are(
    merged_dir: Path, f16_file: Path, tmp_path: Path
) -> None:
    """What is planned of a pod's memory counts so many tokens per row."""
    prompt = "".join(f"{number}Gi is {1024 * number}Mi. " for number in range(1, 60))
    write_jsonl(tmp_path / HELDOUT_FILE, [{"prompt": prompt, "answer": "7", "end": "<|im_end|>"}])
    long = measure(merged_dir, dataset_dir=tmp_path, num_rows=1, num_tokens=4)
    whole = long.tokenise(prompt)
    assert len(whole) > 2 * MAX_ROW_TOKENS
    assert long.generation.prompt_ids == whole[-MAX_ROW_TOKENS:]
    assert long.num_context == MAX_ROW_TOKENS + 4
    # The reference: the same tokens as a prompt of their own, and the file goes on as it does.
    last = TransformersModel(merged_dir).logits(whole[-MAX_ROW_TOKENS:])[-1]
    assert long.generation.ids[0] == int(last.argmax())
    proof = prove(f16_file, long)
    assert proof["generated"] == proof["reference"] == long.generation.text
    assert proof["prompt"] == prompt


def test_weights_of_another_model(f16_file: Path, reference: Reference) -> None:
    other = [torch.roll(logits, 1, dims=-1) for logits in reference.logits]
    with pytest.raises(
        ProofError, match="export f16 has a mean KL divergence of .* nats per token"
    ):
        prove(f16_file, dataclasses.replace(reference, logits=other))


@pytest.mark.parametrize("template", [CHATML, HEADERS, NO_SYSTEM])
def test_pieces_render_what_the_template_does(reference: Reference, template: str) -> None:
    tested = with_template(reference, template)
    found = modelfile.pieces(tested, bos="<|endoftext|>")
    assert found is not None
    assert (found.system is None) == (template == NO_SYSTEM)
    messages = probes.conversations()[4]
    text = tested.render(messages)
    assert found.render(messages) == text.removeprefix("<|endoftext|>")


def test_a_default_system_message(reference: Reference) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
        "{% endif %}" + CHATML
    )
    found = modelfile.pieces(with_template(reference, template), bos="")
    assert found is not None
    assert found.no_system == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert "{{ else }}<|im_start|>system\nBe kind." in found.go_template()


def test_a_template_that_is_more_than_frames(f16_file: Path, reference: Reference) -> None:
    assert modelfile.pieces(with_template(reference, COUNTING), bos="") is None
    counting = with_template(reference, COUNTING)
    (note,) = modelfile.write(f16_file, reference=counting, adds_bos=False)
    assert note.startswith("no Ollama template: the chat template does more")
    assert "TEMPLATE" not in (f16_file.parent / MODELFILE).read_text()


def test_the_modelfile(f16_file: Path, reference: Reference, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    sampling = {"temperature": 0.6, "repetition_penalty": 1.1, "do_sample": True}
    (model_dir / "generation_config.json").write_text(json.dumps(sampling))
    tested = dataclasses.replace(with_template(reference, CHATML), model_dir=model_dir)
    assert modelfile.write(f16_file, reference=tested, adds_bos=False) == []
    assert (f16_file.parent / MODELFILE).read_text() == (
        "FROM ./model-F16.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}'
        '{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n'
        '{{ .Content }}<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        '{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 2048\n"
        "PARAMETER temperature 0.6\n"
        "PARAMETER repeat_penalty 1.1\n"
        "PARAMETER repeat_last_n 2048\n"
    )
    # The Hub's bridge to Ollama reads no Modelfile.
    params = json.loads((f16_file.parent / "params").read_text())
    assert params == {
        "stop": ["<|im_end|>"],
        "num_ctx": 2048,
        "temperature": 0.6,
        "repeat_penalty": 1.1,
        "repeat_last_n": 2048,
    }
    template = (f16_file.parent / "template").read_text()
    assert f'TEMPLATE """{template}"""' in (f16_file.parent / MODELFILE).read_text()


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.9},
        {"do_sample": True, "top_k": 1, "temperature": 1.0, "repetition_penalty": 1.0},
    ],
)
def test_a_greedy_model_is_greedy_in_ollama(
    f16_file: Path, reference: Reference, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 99999}')
    (tmp_path / "model/generation_config.json").write_text(json.dumps(sampling))
    tested = dataclasses.replace(reference, model_dir=tmp_path / "model")
    modelfile.write(f16_file, reference=tested, adds_bos=False)
    params = json.loads((f16_file.parent / "params").read_text())
    assert params.pop("stop") == ["<|im_end|>"]
    assert params == {"num_ctx": 8192, "temperature": 0, "repeat_penalty": 1.0}


def test_a_context_that_changes_no_angles(tmp_path: Path) -> None:
    settings = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert context_length(tmp_path) == 4096
    settings["rope_scaling"] = {"rope_type": "llama3"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert context_length(tmp_path) == 8192


def test_what_llama_server_adds_to_a_prompt_is_noted(f16_dir: Path) -> None:
    thinks = "{% if enable_thinking %}<think>{% endif %}"
    dated = "{{ date_string if date_string is defined else '26 Jul 2024' }}"
    # Qwen3's way: thinking is the default, so the server's value changes nothing.
    default = "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    with LlamaFile(f16_dir / "model-F16.gguf", num_context=16, vocab_only=True) as loaded:
        found = {}
        for name, text in {"thinks": thinks, "dated": dated, "default": default}.items():
            loaded.chat_template = CHATML + text
            found[name] = gguf_proof.server_notes(loaded)
    notes = {name: [note] for name, (_, note) in gguf_proof.SERVER_VARIABLES.items()}
    assert found == {
        "thinks": notes["enable_thinking"], "dated": notes["date_string"], "default": [],
    }  # fmt: skip
