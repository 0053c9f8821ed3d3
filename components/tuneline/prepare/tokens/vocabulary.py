"""Refuse token IDs for which the model has no embedding."""

import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow
from safetensors import safe_open

from tuneline.artifacts import LABEL, LOSS_MASK
from tuneline.errors import DataError
from tuneline.models.multimodal import text_config

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")
# Ends of the names that models give their embedding matrix.
_NUM_NAMED = 5
"""Number of tokens that an error names."""


class Vocabulary:
    """The tokens of a tokenizer, and how many of them the model has an embedding for."""

    def __init__(self, tokenizer: Any, model_dir: str | Path) -> None:
        self._tokenizer = tokenizer
        self._num_rows = _num_embeddings(Path(model_dir))
        beyond = max(tokenizer.get_vocab().values(), default=0)
        self._is_whole = self._num_rows is None or beyond < self._num_rows

    def check(self, batch: pyarrow.RecordBatch) -> None:
        """Check the token IDs of a batch of examples.

        Raises:
            DataError: a token has no embedding.
        """
        if self._is_whole:
            return
        for name in batch.schema.names:
            if name not in (LOSS_MASK, LABEL):
                self._check(batch.column(name).flatten().to_numpy())

    def _check(self, ids: "numpy.ndarray[Any, Any]") -> None:
        beyond = numpy.unique(ids[ids >= self._num_rows])
        if not len(beyond):
            return
        names = self._tokenizer.convert_ids_to_tokens(beyond[:_NUM_NAMED].tolist())
        named = ", ".join(
            f"{token!r} (ID {number})" for token, number in zip(names, beyond, strict=False)
        )
        more = f" and {len(beyond) - _NUM_NAMED} more" if len(beyond) > _NUM_NAMED else ""
        raise DataError(
            f"the rows contain the token {named}{more}, but the model's embedding ends at ID "
            f"{self._num_rows - 1 if self._num_rows else -1}, so it cannot read them: use the "
            "tokenizer that belongs to this model, a model whose embedding was resized for these "
            "tokens, or a chat template without them, or replace them in the rows"
        )


def _num_embeddings(model_dir: Path) -> int | None:
    """Return the number of rows of the model's embedding; None if it is not known."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith(_EMBEDDINGS) and "position" not in name:
                    return int(tensors.get_slice(name).get_shape()[0])
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    size = text_config(config).get("vocab_size")
    return size if isinstance(size, int) else None
