"""Log likelihoods of several answers per prompt, where each prompt is computed only once.

A beginning that all prompts of a batch share, such as examples or a system prompt, is computed once
too. Logits are computed only for the tokens of answers, and not for all of them at once: with a
vocabulary of 128,000 entries, the logits of a token take as much memory as its keys and values in
all layers of an 8B model.

On a GPU, the layers of most families run fused (tuneline.kernels.inference) for prompts whose
answers share few tokens, e.g. one long answer per prompt, or several answers of one token. Prompts
with their answers then form packed rows without padding or a key-value cache.

The scores stay on the device until all batches have been launched. A GPU that the host asks for the
scores of each batch would idle while the host prepares the next one.

Shapes: P prompts, A answers to all prompts, S tokens of the longest prompt after the shared
beginning, T tokens of the longest answer, N tokens of all answers, H hidden size, V tokens of the
vocabulary.
"""

import os
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from tuneline.kernels.to_device import to_device
from tuneline.models.batches import Batches, Size

if TYPE_CHECKING:
    from tuneline.kernels.inference import FusedInference

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""Token IDs of a prompt and of an answer."""
Item = tuple[Tokens, list[Tokens]]
"""A prompt and its answers."""
Score = tuple[float, bool]
"""Log likelihood of an answer in nats, and whether greedy decoding would produce the answer."""

NEAR_TIE = 0.1
"""Two logits that differ by at most this much count as equal: rounding moves logits by a few
hundredths, also where both models are computed in 16 bits or more."""

_WORTH_SHARING = 1024
"""Number of tokens that need not be computed from which it is worth to compute a shared beginning
by itself."""
_LOGITS_BYTES = 2**28
"""Size of the logits that are computed at a time: 256 MiB."""


def num_same_choices(reference_TV: torch.Tensor, tested_TV: torch.Tensor) -> int:
    """Return at how many of T positions two models choose the same token, up to a near tie.

    Where the reference's logits of the two choices differ by at most NEAR_TIE, rounding decides
    which of the tokens is the most likely one.

    Args:
        reference_TV: logits or log probabilities of the reference, [T, V].
        tested_TV: those of the other model, [T, V].
    """
    choices_T1 = tested_TV.argmax(-1, keepdim=True)
    gaps_T = reference_TV.amax(-1) - reference_TV.gather(-1, choices_T1).squeeze(-1)
    return int((gaps_T <= NEAR_TIE).sum())


def score_answers(
    model: Any, pairs: Iterable[Pair], *, batches: Batches, fuses: bool = True
) -> dict[Pair, Score]:
    """Return the log likelihood of each answer given its prompt.

    Args:
        model: a causal language model with a key-value cache.
        pairs: (prompt, answer) as token IDs, neither empty.
        batches: limits of a batch, whose items are prompts with all of their answers.
        fuses: whether layers run fused if they can.

    Returns:
        A mapping: pair -> (log likelihood of the answer in nats, whether greedy decoding would
        produce the answer).
    """
    answers: dict[Tokens, dict[Tokens, None]] = {}
    for prompt, answer in pairs:
        answers.setdefault(prompt, {})[answer] = None
    items = [(prompt, list(group)) for prompt, group in answers.items()]
    # Prompts of similar length whose answers have similar lengths need little padding.
    items.sort(key=lambda item: (_longest(item[1]), item[0]))
    if not items:
        return {}
    longest = max(len(prompt) + _longest(group) for prompt, group in items)
    with _fused_layers(model) if fuses else nullcontext() as fused:
        takes_all = fused is not None and fused.takes(longest)

        def size_of(item: Item) -> Size:
            prompt, group = item
            inputs = {(prompt, answer[:-1]) for answer in group}
            is_padded = not (takes_all and _packs(inputs, [item]))
            return Size(len(group), len(prompt) + _longest(group), is_padded)

        scored = batches.run(
            items, size_of, lambda batch: _score_batch(model, fused, batch), called="prompts"
        )
    found = [(prompt, answer) for prompt, group in items for answer in group]
    lengths = [len(answer) for _, answer in found]
    log_probs, greedy = (
        torch.split(torch.cat(parts).cpu(), lengths) for parts in zip(*scored, strict=True)
    )
    scores = (
        (float(nats.sum()), bool(same.all())) for nats, same in zip(log_probs, greedy, strict=True)
    )
    return dict(zip(found, scores, strict=True))


def _fused_layers(model: Any) -> "AbstractContextManager[FusedInference | None]":
    """Return a context in which the model's layers run fused; None within it if they cannot."""
    if model.device.type != "cuda":
        return nullcontext()
    # Imported here, because the kernels import Triton, which exists for Linux alone.
    from tuneline.kernels.inference import fused_inference, runs_fused

    return fused_inference(model) if runs_fused(model) else nullcontext()


@torch.inference_mode()
def _score_batch(
    model: Any, fused: "FusedInference | None", batch: list[Item]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what `_of_tokens` returns for the tokens of all answers to each prompt."""
    # The last token of an answer is not an input, because no token after it is predicted. So
    # answers of one token to the same prompt have the same inputs.
    places: dict[Pair, int] = {}
    inputs = [
        places.setdefault((prompt, answer[:-1]), len(places))
        for prompt, group in batch
        for answer in group
    ]
    num_shared = _num_shared(model, [prompt for prompt, _ in batch])
    longest = max(len(prompt) + len(answer) for prompt, answer in places)
    if fused is not None and _packs(places, batch, num_shared) and fused.takes(longest):
        states = fused.hidden_states(
            [prompt + answer for prompt, answer in places],
            [len(prompt) - 1 for prompt, _ in places],
        )
        hidden_NH = torch.cat([states[place] for place in inputs])
        del states
    else:
        hidden_NH = _cached_hidden(model, batch, num_shared)
    ids_N = torch.tensor([token for _, group in batch for answer in group for token in answer])
    log_probs_N, greedy_N = _of_tokens(
        model, hidden_NH, to_device(ids_N, model.device), fused=fused is not None
    )
    counts = [sum(map(len, group)) for _, group in batch]
    parts = torch.split(log_probs_N, counts), torch.split(greedy_N, counts)
    return list(zip(*parts, strict=True))


def _packs(inputs: Collection[Pair], batch: list[Item], num_shared: int = 0) -> bool:
    """Return whether packed rows have no more tokens than padded batches with a cache."""
    num_packed = sum(len(prompt) + len(answer) for prompt, answer in inputs)
    num_prompt = max(len(prompt) for prompt, _ in batch) - num_shared
    num_continued = max(len(answer) for _, answer in inputs)
    num_answers = sum(len(group) for _, group in batch)
    num_padded = num_shared + len(batch) * num_prompt + num_answers * num_continued
    return num_packed <= num_padded


def _cached_hidden(model: Any, batch: list[Item], num_shared: int) -> torch.Tensor:
    """Return the hidden states that predict the tokens of all answers, [N, H].

    Each prompt is computed once, and its keys and values are cached for its answers.
    """
    device, decoder = model.device, model.base_model
    owners = [number for number, (_, group) in enumerate(batch) for _ in group]
    answer_ids_AT, answer_mask_AT = _padded([a for _, group in batch for a in group], device)
    continues = answer_ids_AT.shape[1] > 1
    prompts = [prompt for prompt, _ in batch]
    cache = None
    if num_shared:
        shared = to_device(torch.tensor([prompts[0][:num_shared]]), device)
        cache = decoder(input_ids=shared, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    # Prompts are padded on the left, so that all end just before the position where answers begin.
    prompt_ids_PS, own_mask_PS = (
        tensor.flip(1)
        for tensor in _padded([prompt[num_shared:][::-1] for prompt in prompts], device)
    )
    prompt_mask = torch.nn.functional.pad(own_mask_PS, (num_shared, 0), value=1)
    output = decoder(
        input_ids=prompt_ids_PS,
        attention_mask=prompt_mask,
        position_ids=_positions(prompt_mask)[:, num_shared:],
        past_key_values=cache,
        use_cache=continues or cache is not None,
    )
    owners_A = to_device(torch.tensor(owners), device)
    hidden_ATH = output.last_hidden_state[:, -1:][owners_A]
    if continues:
        cache = output.past_key_values
        del output
        if len(owners) > len(batch):
            cache.batch_select_indices(owners_A)
        mask = torch.cat([prompt_mask[owners_A], answer_mask_AT[:, :-1]], dim=1)
        continuation = decoder(
            input_ids=answer_ids_AT[:, :-1],
            attention_mask=mask,
            position_ids=_positions(mask)[:, prompt_mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        del cache
        hidden_ATH = torch.cat([hidden_ATH, continuation.last_hidden_state], dim=1)
        del continuation
    hidden_NH: torch.Tensor = hidden_ATH[answer_mask_AT == 1]
    return hidden_NH


def _num_shared(model: Any, prompts: list[Tokens]) -> int:
    """Return how many tokens at the start of all prompts are computed once; 0 if it saves little.

    Padding then stands between these tokens and the rest of a prompt. A layer with a sliding window
    counts the padding, so a model with such layers shares nothing.
    """
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    kinds = set(getattr(config, "layer_types", None) or ())
    if any(windows) or not kinds <= {"full_attention"}:
        return 0
    # At least one token of each prompt remains, whose hidden state predicts the answer.
    same = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return same if same * (len(prompts) - 1) >= _WORTH_SHARING else 0


def _of_tokens(
    model: Any, hidden_NH: torch.Tensor, ids_N: torch.Tensor, *, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probability of each token in float32, and whether it is the likeliest one.

    Args:
        model: the causal language model.
        hidden_NH: what its decoder returns where it predicts the tokens.
        ids_N: the tokens.
        fused: whether a kernel reads the logits once, in the model's dtype. Otherwise torch copies
            them to float32.
    """
    log_probs_of, itemsize = _label_log_probs, 4
    if fused:
        # Imported here, because the kernels import Triton, which exists for Linux alone.
        from tuneline.kernels.ops.cross_entropy import label_log_probs

        log_probs_of, itemsize = label_log_probs, model.dtype.itemsize
    size = max(1, _LOGITS_BYTES // (itemsize * model.config.get_text_config().vocab_size))
    parts = zip(torch.split(hidden_NH, size), torch.split(ids_N, size), strict=True)
    scores = [log_probs_of(_logits(model, some_NH), some_N) for some_NH, some_N in parts]
    log_probs, greedy = (torch.cat(values) for values in zip(*scores, strict=True))
    return log_probs, greedy


def _label_log_probs(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `tuneline.kernels.ops.cross_entropy.label_log_probs` in plain torch."""
    table = logits.log_softmax(-1, dtype=torch.float32)
    return table.gather(-1, labels[:, None])[:, 0], logits.argmax(-1) == labels


class _Given(torch.nn.Module):
    """A decoder that returns given hidden states."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self._hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self._hidden_states)


def _logits(model: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Return the logits of hidden states, [N, V].

    The model's own forward computes them, because some models scale or cap what their head returns.
    """
    name, decoder = model.base_model_prefix, model.base_model
    try:
        setattr(model, name, _Given(hidden_NH[None]))
        output = model(input_ids=torch.zeros_like(hidden_NH[None, :, 0], dtype=torch.long))
    finally:
        setattr(model, name, decoder)
    logits_NV: torch.Tensor = output.logits[0]
    return logits_NV


def _longest(answers: list[Tokens]) -> int:
    return max(map(len, answers))


def _padded(rows: list[Tokens], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows padded on the right with ID 0, and the mask: 1 for tokens, 0 for padding."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return to_device(ids, device), to_device(mask, device)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
