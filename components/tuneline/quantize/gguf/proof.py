"""Prove a GGUF file: llama.cpp reads, splits, renders, stops and predicts as the merged model.

Quantised files carry the tokenizer and the template of the f16 file, and are checked all the same:
it is these files that people download.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tuneline.errors import ProofError
from tuneline.quantize.formats import Bound
from tuneline.quantize.gguf import modelfile
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof import probes, quality
from tuneline.quantize.proof.generation import Generation, hold_against
from tuneline.quantize.proof.reference import Reference

NUM_SPEED_TOKENS = 16


def prove(file: Path, *, format: str, reference: Reference, bound: Bound) -> dict[str, Any]:
    """Check a file, and write a Modelfile for Ollama beside it.

    Returns:
        Fields of its `QuantizedModel`.

    Raises:
        ProofError: it fails a check; the message has the numbers.
    """
    num_context = reference.num_context + NUM_SPEED_TOKENS
    with LlamaFile(file, num_context=num_context) as loaded:
        # Conversations too: in them special tokens stand beside white space.
        rendered = (_text_or_refusal(reference.render, each) for each in probes.conversations())
        texts = [*probes.texts(), *filter(None, rendered), *reference.prompts]
        check_tokenizer(texts, tested=loaded.tokenise, reference=reference.tokenise)
        num_conversations = check_template(loaded, reference)
        stop_note = check_stop_tokens(loaded, reference)
        notes = [stop_note] if stop_note else []
        generated = loaded.generate(
            reference.generation.prompt_ids, num_tokens=reference.num_tokens
        )
        stops: list[torch.Tensor] = []

        def logits() -> Iterator[torch.Tensor]:
            for row in reference.rows:
                row_logits = torch.from_numpy(loaded.logits(row.ids))
                stops.append(_stop_probability(row_logits, reference.stop_ids))
                yield row_logits

        found = quality.compare(reference.rows, reference.logits, logits())
        quality.hold(found, bound, format)
        notes += _check_answer(format, generated, reference.generation)
        check_stops(format, stops, reference)
        speed = loaded.tokens_per_second(
            reference.generation.prompt_ids, num_tokens=NUM_SPEED_TOKENS
        )
        scored = reference.benchmark.record(loaded) if reference.benchmark else {}
        notes += modelfile.write(file, reference=reference, adds_bos=loaded.adds_bos)
        num_threads = loaded.num_threads
    return {
        **found.record(),
        **scored,
        "max_mean_kl": bound.max_mean_kl,
        "min_top1_agreement": bound.min_top1_agreement,
        "num_tokenizer_texts": len(texts),
        "num_conversations": num_conversations,
        "stop_tokens": reference.stop_texts,
        "tokens_per_second": round(speed, 2),
        "num_threads": num_threads,
        "prompt": reference.prompt,
        "generated": generated.text,
        "reference": reference.generation.text,
        "notes": notes,
    }


def check_tokenizer(
    texts: list[str],
    *,
    tested: Callable[[str], list[int]],
    reference: Callable[[str], list[int]],
) -> None:
    """Check that every text is split as the merged model's own tokenizer does.

    Raises:
        ProofError: with the number of texts and the first one that differs.
    """
    wrong = [text for text in texts if tested(text) != reference(text)]
    if wrong:
        ours, theirs = tested(wrong[0]), reference(wrong[0])
        raise ProofError(
            f"the GGUF file's tokenizer splits {len(wrong)} of {len(texts)} texts differently from "
            f"the model's own, first {wrong[0][:40]!r}: {ours[:12]} against {theirs[:12]}; do not "
            "use this file; export as gptq, and report the model to llama.cpp"
        )


def check_template(loaded: LlamaFile, reference: Reference) -> int:
    """Check that conversations are rendered to the same text; return how many were.

    A conversation that the model's template refuses (a system role, mostly) has to be refused by
    the file's as well.

    Raises:
        ProofError: the template is missing, or renders otherwise.
    """
    if not reference.tokenizer.chat_template:
        return 0
    if not loaded.chat_template:
        raise ProofError(
            "the GGUF file carries no chat template, and the merged model's tokenizer has one: "
            "chat programs would guess it; convert again with a newer llama.cpp"
        )
    rendered = 0
    for messages in probes.conversations():
        ours = _text_or_refusal(loaded.render, messages)
        theirs = _text_or_refusal(reference.render, messages)
        if ours != theirs:
            where = _first_difference(ours or "", theirs or "")
            raise ProofError(
                "the chat template in the GGUF file renders a conversation of "
                f"{len(messages)} messages otherwise than the model's own, from character {where}: "
                f"{_around(ours, where)} against {_around(theirs, where)}"
            )
        rendered += ours is not None
    return rendered


def check_stop_tokens(loaded: LlamaFile, reference: Reference) -> str | None:
    """Check that llama.cpp ends a text where the merged model does; return a note.

    Raises:
        ProofError: it would run on after the model's end of a text or of an answer.
    """
    name = reference.tokenizer.convert_ids_to_tokens
    passed = [token for token in reference.stop_ids if not loaded.is_stop(token)]
    needed = set(_ends(reference)).intersection(passed)
    if needed:
        raise ProofError(
            f"llama.cpp does not stop at {name(min(needed))!r}, where the merged model stops: "
            "answers would run on; set eos_token_id in the base model's generation_config.json"
        )
    if passed:
        # Phi-3 names <|assistant|>, which no answer of a whole model has.
        return (
            f"llama.cpp does not stop at {', '.join(map(repr, name(passed)))}, which "
            "generation_config.json names beside the end of an answer; the Modelfile does"
        )
    end = reference.end.strip()
    ids = reference.tokenise(end) if end else []
    if len(ids) == 1 and ids[0] in reference.tokenizer.added_tokens_decoder:
        if not loaded.is_stop(ids[0]):
            raise ProofError(
                f"llama.cpp does not stop at {end!r}, which the chat template puts after an "
                "answer: answers would run on; take a template whose end of turn is a stop token"
            )
        return None
    if ids:
        return f"the end of a turn, {end!r}, is not one special token: programs must stop on text"
    return None


def _ends(reference: Reference) -> list[int]:
    """Return the stop tokens that end a text, or an answer in the chat template; else all."""
    if not reference.tokenizer.chat_template:
        return reference.stop_ids
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}
    try:
        text = reference.render([user, answer], for_answer=False)
    except ValueError:
        return reference.stop_ids
    after = reference.tokenise(text.rpartition(answer["content"])[2])
    return [t for t in reference.stop_ids if t in after or t == reference.tokenizer.eos_token_id]


def check_stops(format: str, stops: list[torch.Tensor], reference: Reference) -> None:
    """Check on the rows' answers that the file stops where the merged model does.

    By probability, not by the most likely token: a model that hardly learned to stop is near to a
    draw at these places, and any rounding turns it over.

    Args:
        format: for the message.
        stops: a row's probabilities of a stop token [positions].
        reference: the merged model.

    Raises:
        ProofError: it stops with less than half of the merged model's probability.
    """
    ours, theirs = [], []
    for row, stops_T, logits_TV in zip(reference.rows, stops, reference.logits, strict=True):
        answer = slice(max(row.start, 1) - 1, None)
        logits_AV = logits_TV[answer]
        places = torch.isin(logits_AV.argmax(-1), torch.tensor(reference.stop_ids))
        ours.append(stops_T[answer][places])
        theirs.append(_stop_probability(logits_AV, reference.stop_ids)[places])
    own, other = torch.cat(ours), torch.cat(theirs)
    if len(own) and 2 * own.mean() < other.mean():
        raise ProofError(
            f"at {len(own)} places where the merged model stops, with a probability of "
            f"{other.mean():.2f}, the export {format} stops with {own.mean():.2f}: its answers "
            "would run on; take a format with more bits"
        )


def _stop_probability(logits_TV: torch.Tensor, stop_ids: list[int]) -> torch.Tensor:
    return logits_TV.float().softmax(-1)[:, stop_ids].sum(-1)


def _check_answer(format: str, ours: Generation, theirs: Generation) -> list[str]:
    if format == "f16":
        note = hold_against(ours, theirs)
        return [note] if note else []
    if not ours.text.strip() and theirs.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model says "
            f"{theirs.text[:60]!r}: take a format with more bits"
        )
    return []


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
