"""Encode a templated prompt and its answer."""

from typing import Any


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token IDs of a prompt, which contains its special tokens, and of its answer.

    A generation starts from the prompt's tokens. The answer's tokens are those that follow them
    when both are encoded together. If a token crosses the border, the answer is encoded alone,
    because a generation cannot change the prompt's last token.
    """
    prompt_ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    both: list[int] = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if both[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, both[len(prompt_ids) :]
    answer_ids: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return prompt_ids, answer_ids
