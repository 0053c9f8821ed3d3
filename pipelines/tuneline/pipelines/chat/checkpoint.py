"""A model directory that transformers loads, as a model that answers."""

import logging
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tuneline.models.tokenizer.special_tokens import end_token
from tuneline.pipelines.chat.published import read_context, read_published
from tuneline.pipelines.chat.speakers import Messages
from tuneline.pipelines.chat.subject import ModelFiles
from tuneline.quantize.proof.reference import Wording
from tuneline.quantize.proof.transformers_model import TransformersModel, choose_device


class CheckpointSpeaker:
    """A model directory, loaded with transformers on a GPU if it fits there, else on the CPU."""

    def __init__(self, files: ModelFiles) -> None:
        _quieten()
        path = files.path
        device = choose_device(path)
        dtype: Any = "auto" if device == "cuda" else torch.float32
        self._model = TransformersModel(path, dtype=dtype, device=device)
        self._wording = Wording(path, self._model.tokenizer, self._model.stop_ids, [], "")
        self.where = f"transformers on the {'GPU' if device == 'cuda' else 'CPU'}"
        self.num_context = read_context(files)
        self.published = read_published(files)
        self.has_template = bool(self._model.tokenizer.chat_template)
        self.stream = self._model.stream

    def render(self, messages: Messages, *, for_answer: bool = True) -> str:
        """Return a conversation rendered by the chat template."""
        return self._wording.render(messages, for_answer=for_answer)

    def tokenise(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return the token IDs of a prompt."""
        tokenizer = self._model.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=not is_rendered)["input_ids"]
        return ids or [self._model.begin_id]

    def end_of(self, text: str) -> int | None:
        """Return the token at which an answer ends that a template closes with `text`."""
        return end_token(self._model.tokenizer, text)


def _quieten() -> None:
    """Keep what libraries log while they load out of the conversation."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
