"""Encode a prompt, to which the chat template was already applied, and its answer."""

from typing import Any


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token IDs of a prompt and of its answer.

    No special tokens are added, because the prompt's text contains them already. The prompt's IDs
    are those that a generation would start from. The answer's IDs are those that follow the
    prompt's IDs when prompt and answer are encoded as one text. If a token of that text spans the
    end of the prompt and the start of the answer, the answer is encoded alone, because a generation
    cannot change the prompt's last token.
    """
    prompt_ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    both: list[int] = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if both[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, both[len(prompt_ids) :]
    answer_ids: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return prompt_ids, answer_ids
