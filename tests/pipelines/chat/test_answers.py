"""A chat answers with the model as it was published, whichever library computes it."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS, UNLIMITED_TOP_K, Request, Sampling, set_sampling
from tuneline.pipelines.chat.published import read_context, read_published
from tuneline.pipelines.chat.session import Session
from tuneline.pipelines.chat.settings import Settings, describe
from tuneline.pipelines.chat.subject import ModelFiles, find_subject
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof.transformers_model import TransformersModel

NewSession = Callable[..., Session]
QUESTION = [{"role": "user", "content": "How many Mi are 3Gi?"}]


def say(session: Session, **numbers: float) -> str:
    settings = session.settings.with_numbers(None, **numbers)
    answer = session.answer(session.voices[-1], QUESTION, settings)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    assert answer.is_cut
    return answer.text


def test_a_checkpoint_answers_as_the_proof_of_an_export_lets_it(
    new_session: NewSession, merged_dir: Path
) -> None:
    model = TransformersModel(merged_dir)
    prompt = model.tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    expected = model.generate(model.tokenise(prompt), num_tokens=8).text
    assert expected
    assert say(new_session("merged")) == expected


def test_a_gguf_file_answers_as_its_proof_lets_it(new_session: NewSession, f16_dir: Path) -> None:
    (file,) = f16_dir.glob("*.gguf")
    with LlamaFile(file, num_context=128) as model:
        prompt_ids = model.tokenise_as_server(model.render(QUESTION))
        expected = model.generate(prompt_ids, num_tokens=8).text
    assert expected
    session = new_session("f16")
    assert say(session) == expected
    # The second time, llama.cpp has the prompt already.
    assert say(session) == expected


def test_a_gguf_file_answers_without_torch(run_dir: Path) -> None:
    program = """
import sys
from tuneline.pipelines.chat.session import Session
from tuneline.pipelines.chat.subject import find_subject

session = Session(find_subject(sys.argv[1], format="f16", base=None, needs_base=False),
                  compare=False)
question = [{"role": "user", "content": "How many Mi are 3Gi?"}]
assert any(session.answer(session.voices[0], question, session.settings))
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(run_dir)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


@pytest.mark.parametrize("format", ["merged", "f16"])
def test_a_seed_repeats_an_answer_and_a_temperature_changes_it(
    new_session: NewSession, format: str
) -> None:
    one, same, other = (say(new_session(format, seed=seed), temperature=2.0) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("format", ["merged", "f16"])
def test_an_answer_ends_at_the_token_that_the_template_writes(
    new_session: NewSession, format: str
) -> None:
    session = new_session(format)
    speaker = session.voices[-1].speaker
    prompt = speaker.tokenise(session._prompt(QUESTION), is_rendered=True)
    generated = speaker._model.generate(prompt, num_tokens=8)
    third = generated.ids[2]
    pieces = speaker.stream(prompt, Request(8, PRESETS["greedy"], ends={third}))
    short = ""
    with pytest.raises(StopIteration) as ended:
        while True:
            short += next(pieces)
    assert ended.value.value is True
    assert generated.text.startswith(short) and len(short) < len(generated.text)


@pytest.mark.parametrize("format", ["merged", "f16"])
def test_an_answer_that_is_closed_is_not_computed_to_its_end(
    new_session: NewSession, format: str
) -> None:
    session = new_session(format, max_tokens=1500)
    before = threading.active_count()
    answer = session.answer(session.voices[-1], QUESTION, session.settings)
    assert next(iter(answer))
    answer.close()
    assert threading.active_count() == before and not session.voices[-1].lock.locked()


@pytest.mark.parametrize("format", ["merged", "f16"])
def test_a_conversation_longer_than_the_context_is_refused(
    new_session: NewSession, format: str
) -> None:
    session = new_session(format)
    long = [{"role": "user", "content": "Mi " * 3000}]
    with pytest.raises(UserError, match=r"has \d{4} tokens, and the model tuned holds 2048"):
        list(session.answer(session.voices[-1], long, session.settings))


def test_a_gguf_file_samples_as_its_metadata_say(tmp_path: Path) -> None:
    """llama.cpp's converter writes these keys, with this package, from generation_config.json."""
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(50)
    writer.add_sampling_top_p(0.9)
    writer.add_sampling_penalty_repeat(1.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = ModelFiles(tmp_path / "model.gguf", "gguf", "model")
    assert read_published(files) == PRESETS["balanced"]
    assert read_context(files) == 4096


def test_a_checkpoint_samples_as_its_recipe_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    files = ModelFiles(tmp_path, "checkpoint", "merged model")
    assert read_published(files).top_k == 1
    for name, preset in PRESETS.items():
        set_sampling(tmp_path, name)
        assert read_published(files) == preset
    assert read_context(files) == 4096


def test_sampling_that_a_chat_cannot_express_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 0, "min_p": 0.05, "num_beams": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = read_published(ModelFiles(tmp_path, "checkpoint", "merged model"))
    assert found == Sampling(temperature=0.6, top_k=UNLIMITED_TOP_K)
    assert "asks for min_p 0.05, which is not used" in caplog.text


def test_numbers_replace_those_of_a_preset() -> None:
    settings = Settings(PRESETS["greedy"])
    assert describe(settings.sampling) == "greedy"
    assert settings.with_numbers("creative").sampling == PRESETS["creative"]
    assert settings.with_numbers("creative", top_p=0.5).sampling.top_p == 0.5
    # A temperature alone would do nothing if only the likeliest token is drawn from.
    assert settings.with_numbers(None, temperature=0.7).sampling == Sampling(temperature=0.7)
    assert settings.with_numbers("creative", temperature=0.0).sampling.top_k == 1
    with pytest.raises(UserError, match="temperature is 9, but must be a number above 0"):
        settings.with_numbers(None, temperature=9)
    with pytest.raises(UserError, match="no preset nice: choose one of greedy, factual, bal"):
        settings.with_numbers("nice")


def test_the_models_of_a_run(run_dir: Path) -> None:
    subject = find_subject(str(run_dir), format=None, base=None, needs_base=True)
    assert subject.formats == ("merged", "f16") and subject.tuned.title == "merged model"
    assert subject.tuned.path == run_dir.parent / "earlier" / "merge" / "merged"
    assert subject.system == "당신은 친절한 상담원입니다."
    assert subject.base is not None and subject.base.title == "tiny"
    export = find_subject(str(run_dir), format="f16", base=None, needs_base=False).tuned
    assert export.kind == "gguf"
    # A file inside a run has the run's base model and system message.
    inside = find_subject(str(export.path), format=None, base=None, needs_base=True)
    assert (inside.base, inside.system) == (subject.base, subject.system)
    folder = find_subject(str(export.path.parent), format="f16", base=None, needs_base=False)
    assert folder.tuned.path == export.path


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("{run}", "q4_k_m", r"tiny-run has no q4_k_m: choose --format from merged, f16"),
        (
            "{tmp}/empty",
            None,
            "is neither a run nor a model: it has no recipe.yaml, no config.json",
        ),
        ("{tmp}/none", None, "there is no run, directory or file"),
        ("{tmp}/broken.gguf", None, "broken.gguf is not a GGUF file"),
        ("{tmp}/two", None, "two has a-f16.gguf, a-q8_0.gguf: name one of these files"),
        ("{tmp}/lora", None, "lora is an adapter: name the merged model"),
        ("{tmp}/two/a-f16.gguf", None, "a-f16.gguf is not known: name its directory or"),
    ],
)
def test_what_is_no_model_is_explained(
    run_dir: Path, f16_dir: Path, tmp_path: Path, name: str, format: str | None, message: str
) -> None:
    (tmp_path / "broken.gguf").write_text("GUFF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (file,) = f16_dir.glob("*.gguf")
    for copy in ("a-f16.gguf", "a-q8_0.gguf"):
        (tmp_path / "two" / copy).symlink_to(file)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        find_subject(
            name.format(run=run_dir, tmp=tmp_path), format=format, base=None, needs_base=True
        )
