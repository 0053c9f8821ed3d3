"""Tokens of a templated prompt and of the answer to it."""

from typing import Any


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Encode a prompt that holds its special tokens already, and the answer to it.

    The prompt's tokens are those that a generation starts from. The answer's are what follows
    them in the encoding of both together; where the tokenizer merges across the border, the
    answer is encoded by itself, since a generation cannot take back the prompt's last token.
    """
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    both = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if both[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, both[len(prompt_ids) :]
    return prompt_ids, tokenizer.encode(answer, add_special_tokens=False)
