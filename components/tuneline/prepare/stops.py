"""Check that generation would not stop in the middle of the answers that are learnt."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.sampling import stop_tokens
from tuneline.prepare.tokens.tokenise import TokenRow

_NUM_ROWS = 256
"""Number of training rows that are looked at."""
_NUM_LAST = 2
"""Number of tokens at the end of an answer that may stop it: a stop token and a line feed."""


def check_stops(rows: Iterable[TokenRow], base_model_dir: str, tokenizer: Any) -> None:
    """Refuse a base model that stops at a token which most answers have before their end.

    Such a token may be stated by mistake, e.g. that of a letter. Generation with the tuned model
    would end there, so its answers would be empty or cut off.

    Args:
        rows: training rows of which only the answers are learnt.
        base_model_dir: the base model's directory, whose generation_config.json lists stop tokens.
        tokenizer: the base model's tokenizer.

    Raises:
        ModelError: more than half of the rows have the stop token inside an answer.
    """
    stops = set(stop_tokens(Path(base_model_dir)))
    num_rows = 0
    cut: Counter[int] = Counter()
    for row in itertools.islice(rows, _NUM_ROWS):
        num_rows += 1
        found = {token for answer in _answers(row) for token in answer[:-_NUM_LAST]}
        cut.update(found & stops)
    for token, count in cut.items():
        if 2 * count > num_rows:
            raise ModelError(
                f"the base model stops generating at the token {token} "
                f"({tokenizer.decode([token])!r}), which {count} of the first {num_rows} training "
                "rows have inside an answer, so the tuned model's answers would be cut off there. "
                "Correct eos_token_id in the base model's generation_config.json or config.json"
            )


def _answers(row: TokenRow) -> Iterator[list[int]]:
    if row.answers is not None:
        yield from row.answers
        return
    pairs = zip(row.loss_mask, row.input_ids, strict=True)
    for is_learnt, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        if is_learnt:
            yield [token for _, token in run]
