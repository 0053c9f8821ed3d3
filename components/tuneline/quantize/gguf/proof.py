"""Prove a GGUF file: llama.cpp tokenises, renders, stops and predicts as the merged model does.

Tokenizer and template of a quantised file are copied from the f16 file. They are checked in each
quantised file nevertheless, because people download these files.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tuneline.errors import ProofError
from tuneline.models.context import context_length
from tuneline.models.tokenizer.special_tokens import end_token
from tuneline.quantize.formats import Bound
from tuneline.quantize.gguf import modelfile
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof import probes, quality
from tuneline.quantize.proof.generation import Generation
from tuneline.quantize.proof.reference import BUILT_IN_PROMPT, Reference, Wording

SERVER_VARIABLES = {
    "enable_thinking": (
        True,
        "llama-server sets enable_thinking, with which the chat template renders another prompt "
        "than by default: start it with --reasoning off to get the default prompt",
    ),
    "date_string": (
        "1 Jan 2000",
        "llama-server writes today's date into prompts, where the chat template by default writes "
        "a fixed one",
    ),
}
"""Variables that llama-server hands to every chat template: a value, and a note for users of a
template that renders another prompt with it. transformers and vLLM do not set them."""


def prove(file: Path, *, format: str, reference: Reference, bound: Bound) -> dict[str, Any]:
    """Check a GGUF file, and write a Modelfile for Ollama to the file's directory.

    Args:
        file: the GGUF file.
        format: name of the file's format.
        reference: measurements of the merged model.
        bound: how close the file's predictions must be to the merged model's.

    Returns:
        Fields of the file's `QuantizedModel`.

    Raises:
        ProofError: the file fails a check; the message states what was measured.
    """
    # The context is that of Ollama's files, because the rotary angles may depend on its length.
    num_batch = reference.num_context + quality.NUM_SPEED_TOKENS
    num_context = max(num_batch, context_length(reference.model_dir))
    with LlamaFile(file, num_context=num_context, num_batch=num_batch) as loaded:
        num_texts, num_conversations, notes = check_wording(loaded, reference)
        generated = loaded.generate(
            reference.generation.prompt_ids, num_tokens=reference.num_tokens
        )
        stops: list[torch.Tensor] = []

        def logits() -> Iterator[torch.Tensor]:
            for row in reference.rows:
                row_logits = torch.from_numpy(loaded.logits(row.ids))
                stops.append(_stop_probability(row_logits, reference.stop_ids))
                yield row_logits

        distance = quality.compare(reference.rows, reference.logits, logits())
        quality.check_bounds(distance, bound, format)
        notes += _check_answer(format, generated, reference.generation)
        check_stops(format, stops, reference)
        speed = loaded.tokens_per_second(
            reference.generation.prompt_ids, num_tokens=quality.NUM_SPEED_TOKENS
        )
        scored = reference.benchmark.record(loaded) if reference.benchmark else {}
        notes += modelfile.write(file, reference=reference, adds_bos=loaded.adds_bos)
        num_threads = loaded.num_threads
    return {
        **distance.record(),
        **scored,
        "max_mean_kl": bound.max_mean_kl,
        "min_top1_agreement": bound.min_top1_agreement,
        "num_tokenizer_texts": num_texts,
        "num_conversations": num_conversations,
        "stop_tokens": reference.stop_texts,
        "tokens_per_second": round(speed, 2),
        "num_threads": num_threads,
        "num_context": num_context,
        "prompt": reference.prompt,
        "generated": generated.text,
        "reference": reference.generation.text,
        "notes": notes,
    }


def check_wording(loaded: LlamaFile, reference: Wording) -> tuple[int, int, list[str]]:
    """Check that llama.cpp tokenises, renders and stops as the merged model does.

    Returns:
        The number of texts that were tokenised, that of the conversations that were rendered, and
        notes for users.

    Raises:
        ProofError: a check failed.
    """
    # Conversations are tokenised too, because in them special tokens adjoin white space.
    texts = [*probes.texts(), *_prompts(reference)]
    check_tokenizer(texts, tested=loaded.tokenise, reference=reference.tokenise)
    num_conversations = check_template(loaded, reference)
    check_prompts(loaded, reference)
    stop_note = check_stop_tokens(loaded, reference)
    notes = [*([stop_note] if stop_note else []), *server_notes(loaded)]
    return len(texts), num_conversations, notes


def server_notes(loaded: LlamaFile) -> list[str]:
    """Return notes on prompts that llama-server renders differently from the template's default."""
    if not loaded.chat_template:
        return []
    conversations = probes.conversations()
    default = [_text_or_refusal(loaded.render, messages) for messages in conversations]
    return [
        note
        for name, (value, note) in SERVER_VARIABLES.items()
        if default
        != [
            _text_or_refusal(partial(loaded.render, variables={name: value}), messages)
            for messages in conversations
        ]
    ]


def check_tokenizer(
    texts: list[str],
    *,
    tested: Callable[[str], list[int]],
    reference: Callable[[str], list[int]],
) -> None:
    """Check that two tokenizers split every text into the same tokens.

    Args:
        texts: texts to tokenise.
        tested: the file's tokenizer.
        reference: the merged model's tokenizer.

    Raises:
        ProofError: a text is split differently; the message has the number of such texts and the
            first one.
    """
    wrong = [text for text in texts if tested(text) != reference(text)]
    if wrong:
        ours, theirs = tested(wrong[0]), reference(wrong[0])
        raise ProofError(
            f"the GGUF file's tokenizer splits {len(wrong)} of {len(texts)} texts differently from "
            f"the model's own, first {wrong[0][:40]!r}: {ours[:12]} against {theirs[:12]}; do not "
            "use this file; export as gptq, and report the model to llama.cpp"
        )


def check_template(loaded: LlamaFile, reference: Wording) -> int:
    """Check that the file's chat template renders as the merged model's; count the conversations.

    A conversation that the merged model's template rejects, mostly because of a system message,
    must be rejected by the file's template as well. The returned number is that of the
    conversations that both templates render.

    Raises:
        ProofError: the file's template is missing, or renders a different text.
    """
    if not reference.tokenizer.chat_template:
        return 0
    if not loaded.chat_template:
        raise ProofError(
            "the GGUF file has no chat template, but the merged model's tokenizer has one, so "
            "chat programs would guess it: convert again with a newer llama.cpp"
        )
    rendered = 0
    for messages in probes.conversations():
        ours = _text_or_refusal(loaded.render, messages)
        theirs = _text_or_refusal(reference.render, messages)
        if ours != theirs:
            where = _first_difference(ours or "", theirs or "")
            raise ProofError(
                "the chat template in the GGUF file renders a conversation of "
                f"{len(messages)} messages differently from the model's own, from character "
                f"{where} on: {_around(ours, where)} against {_around(theirs, where)}; do not use "
                "this file, and report the model to llama.cpp"
            )
        rendered += ours is not None
    return rendered


def check_prompts(loaded: LlamaFile, reference: Wording) -> None:
    """Check that a server gives the model the same tokens for a prompt as training gave it.

    Raises:
        ProofError: the file asks for other tokens before or after a prompt.
    """
    has_template = bool(reference.tokenizer.chat_template)
    for text in _prompts(reference):
        served, trained = loaded.tokenise_as_server(text), reference.tokenise_prompt(text)
        # Without held-out rows there is only a plain text, which no chat template wrote.
        if served == trained or (has_template and text == BUILT_IN_PROMPT):
            continue
        name = reference.tokenizer.convert_ids_to_tokens
        raise ProofError(
            f"served by llama.cpp, a prompt of {len(trained)} tokens has {len(served)}: it begins "
            f"with {name(served[:2])} and ends with {name(served[-2:])}, where training had "
            f"{name(trained[:2])} and {name(trained[-2:])}; do not use this file: set "
            "add_bos_token and add_eos_token in the base model's tokenizer_config.json to what its "
            "chat template writes"
        )


def _prompts(reference: Wording) -> list[str]:
    """Return the held-out prompts, and conversations that the chat template renders, if any."""
    rendered = [
        _text_or_refusal(reference.render, messages)
        for messages in (probes.conversations() if reference.tokenizer.chat_template else [])
    ]
    return [*filter(None, rendered), *reference.prompts]


def check_stop_tokens(loaded: LlamaFile, reference: Wording) -> str | None:
    """Check that llama.cpp stops where the merged model stops; return a note for users, or None.

    Raises:
        ProofError: llama.cpp would continue after the model's end of text or end of turn.
    """
    name = reference.tokenizer.convert_ids_to_tokens
    passed = [token for token in reference.stop_ids if not loaded.is_stop(token)]
    needed = set(reference.ends_of_turn()).intersection(passed)
    if needed:
        raise ProofError(
            f"llama.cpp does not stop at {name(min(needed))!r}, where the merged model stops, so "
            "answers would run on, although the conversion names this token as the end of a turn: "
            "take a chat template whose end of turn llama.cpp knows, or export as gptq"
        )
    if passed:
        # These stop tokens do not end a turn. For example, Phi-3 lists <|assistant|>, which the
        # model does not generate in an answer.
        return (
            f"llama.cpp does not stop at {', '.join(map(repr, name(passed)))}, which "
            "generation_config.json lists beside the end of an answer; the Modelfile does"
        )
    end = reference.end.strip()
    token = end_token(reference.tokenizer, end)
    if token is not None:
        if not loaded.is_stop(token):
            raise ProofError(
                f"llama.cpp does not stop at {end!r}, which the chat template puts after an "
                "answer, so answers would run on: take a template whose end of turn is a stop token"
            )
        return None
    if end:
        return f"the end of a turn, {end!r}, is not one special token: programs must stop on text"
    return None


def check_stops(format: str, stops: list[torch.Tensor], reference: Reference) -> None:
    """Check on the rows' answers that the file stops where the merged model stops.

    These are the positions where a stop token is the merged model's most likely next token. The
    check compares probabilities there, not the file's most likely token: if a model has hardly
    learned to stop, a stop token and another token are almost equally likely, and any rounding can
    change which of them is more likely.

    Args:
        format: name of the format, for the message.
        stops: for each row, the file's probability of a stop token at each position, [T].
        reference: measurements of the merged model.

    Raises:
        ProofError: the file's mean probability of stopping is less than half of the merged model's.
    """
    ours, theirs = [], []
    for row, stops_T, logits_TV in zip(reference.rows, stops, reference.logits, strict=True):
        answer = slice(max(row.start, 1) - 1, None)
        logits_AV = logits_TV[answer]
        places = torch.isin(logits_AV.argmax(-1), torch.tensor(reference.stop_ids))
        ours.append(stops_T[answer][places])
        theirs.append(_stop_probability(logits_AV, reference.stop_ids)[places])
    tested, expected = torch.cat(ours), torch.cat(theirs)
    if len(tested) and 2 * tested.mean() < expected.mean():
        raise ProofError(
            f"at {len(tested)} places where the merged model stops with a probability of "
            f"{expected.mean():.2f}, the export {format} stops with {tested.mean():.2f}, so its "
            f"answers would run on. {_sentence(quality.advice_on_answers(format))}"
        )


def _stop_probability(logits_TV: torch.Tensor, stop_ids: list[int]) -> torch.Tensor:
    return logits_TV.float().softmax(-1)[:, stop_ids].sum(-1)


def _check_answer(format: str, ours: Generation, theirs: Generation) -> list[str]:
    if format == "f16":
        note = quality.check_generation(ours, theirs)
        return [note] if note else []
    if not ours.text.strip() and theirs.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model generates "
            f"{theirs.text[:60]!r}. {_sentence(quality.advice_on_answers(format))}"
        )
    return []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text_or_refusal(
    render: Callable[[list[dict[str, str]]], str], messages: list[dict[str, str]]
) -> str | None:
    try:
        return render(messages)
    except ValueError:
        return None


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _around(text: str | None, place: int) -> str:
    return "a refusal" if text is None else repr(text[max(0, place - 10) : place + 30])
