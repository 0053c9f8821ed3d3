"""Models that answer: a directory that transformers loads, or a GGUF file that llama.cpp loads.

A speaker answers as the model was published: with its chat template and its stop tokens. A GGUF
file answers without torch and transformers, whose imports take longer than loading the file.
"""

from collections.abc import Generator
from typing import Protocol

from tuneline.models.sampling import Request, Sampling
from tuneline.pipelines.chat.published import read_context, read_published
from tuneline.pipelines.chat.subject import ModelFiles

Messages = list[dict[str, str]]

_NUM_BATCH = 512
"""Tokens of a prompt that llama.cpp computes at a time."""
_ANSWER = "ANSWER"


class Speaker(Protocol):
    """A loaded model."""

    where: str
    """What computes, for the user."""
    num_context: int
    """Largest number of tokens of a conversation, answer included."""
    published: Sampling
    """How the model samples unless its user says otherwise."""
    has_template: bool

    def render(self, messages: Messages, *, for_answer: bool = True) -> str:
        """Return a conversation rendered by the model's chat template.

        Raises:
            ValueError: the template rejects the conversation.
        """

    def tokenise(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return the token IDs of a prompt; a rendered one has its special tokens already."""

    def end_of(self, text: str) -> int | None:
        """Return the token at which an answer ends that a template closes with `text`."""

    def stream(self, prompt_ids: list[int], request: Request) -> Generator[str, None, bool]:
        """Yield the text of an answer as it grows; return whether a stop token ended it."""


def text_after_answer(speaker: Speaker) -> str:
    """Return what the speaker's template puts after an answer, e.g. <|im_end|>."""
    if not speaker.has_template:
        return ""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return speaker.render(messages, for_answer=False).rpartition(_ANSWER)[2]
    except ValueError:
        return ""


class GgufSpeaker:
    """A GGUF file, loaded with llama.cpp; its layers are on a GPU if this llama.cpp can use one."""

    def __init__(self, files: ModelFiles) -> None:
        from tuneline.quantize.gguf.llama_model import LlamaFile

        self.num_context = read_context(files)
        self.published = read_published(files)
        self._model = LlamaFile(
            files.path,
            num_context=self.num_context,
            num_batch=min(_NUM_BATCH, self.num_context),
            num_gpu_layers=-1,
        )
        self.where = "llama.cpp"
        self.has_template = bool(self._model.chat_template)
        self.render = self._model.render
        self.stream = self._model.stream

    def tokenise(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return the token IDs of a prompt, as llama.cpp's server computes them."""
        return self._model.tokenise_as_server(text)

    def end_of(self, text: str) -> int | None:
        """Return the token at which an answer ends that a template closes with `text`."""
        ids = self._model.tokenise(text.strip())
        return ids[-1] if ids else None
