"""Models that answer: a directory that transformers loads, or a GGUF file that llama.cpp loads.

A speaker answers as the model was published: with its chat template, its stop tokens, and the
sampling of its generation_config.json, which a GGUF file repeats in its metadata.
"""

import json
import logging
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, Protocol

import torch

from tuneline.models import sampling
from tuneline.models.sampling import Sampling, published_sampling
from tuneline.models.special_tokens import end_token
from tuneline.pipelines.chat.subject import ModelFiles
from tuneline.quantize.formats import MAX_CONTEXT
from tuneline.quantize.gguf.modelfile import context_length
from tuneline.quantize.proof.reference import Wording
from tuneline.quantize.proof.transformers_model import TransformersModel, choose_device

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

_NUM_BATCH = 512
"""Tokens of a prompt that llama.cpp computes at a time."""
_ANSWER = "ANSWER"
_GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Key of a GGUF file -> name in generation_config.json."""


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

    def stream(
        self,
        prompt_ids: list[int],
        *,
        num_tokens: int,
        sampling: Sampling,
        seed: int | None = None,
        ends: Collection[int] = (),
    ) -> Generator[str, None, bool]:
        """Yield the text of an answer as it grows; return whether a stop token ended it."""


def load(files: ModelFiles) -> Speaker:
    """Load a model.

    Raises:
        ModelError: transformers cannot load the model.
        ProofError: llama.cpp cannot load the model.
    """
    return GgufSpeaker(files) if files.kind == "gguf" else CheckpointSpeaker(files)


def read_published(files: ModelFiles) -> Sampling:
    """Return how a model samples unless its user says otherwise, without loading its weights."""
    if files.kind == "gguf":
        settings = _gguf_settings(_metadata(files.path))
    else:
        file = files.path / sampling.FILE
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found, left = published_sampling(settings)
    if left:
        logger.warning("%s asks for %s, which is not used", files.path.name, ", ".join(left))
    return found


def read_context(files: ModelFiles) -> int:
    """Return the largest number of tokens of a conversation, without loading the weights."""
    if files.kind == "checkpoint":
        return context_length(files.path)
    metadata = _metadata(files.path)
    prefix = metadata.get("general.architecture", "")
    longest = int(metadata.get(f"{prefix}.context_length", MAX_CONTEXT))
    if metadata.get(f"{prefix}.rope.scaling.type") == "longrope":
        # llama.cpp computes with other rotary angles beyond this length, as context_length says.
        longest = int(metadata.get(f"{prefix}.rope.scaling.original_context_length", longest))
    return min(longest, MAX_CONTEXT)


def text_after_answer(speaker: Speaker) -> str:
    """Return what the speaker's template puts after an answer, e.g. <|im_end|>."""
    if not speaker.has_template:
        return ""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return speaker.render(messages, for_answer=False).rpartition(_ANSWER)[2]
    except ValueError:
        return ""


class CheckpointSpeaker:
    """A model directory, loaded with transformers on a GPU if it fits there, else on the CPU."""

    def __init__(self, files: ModelFiles) -> None:
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


def _metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file but its lists, which are the vocabulary."""
    # Imported here, because an installation without GGUF's packages can talk to checkpoints.
    from gguf import GGUFReader, GGUFValueType

    return {
        name: field.contents()
        for name, field in GGUFReader(file).fields.items()
        if GGUFValueType.ARRAY not in field.types
    }


def _gguf_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling of a GGUF file, under the names of generation_config.json."""
    given = {
        # The file has float32; generation_config.json has the shortest number that rounds to it.
        name: float(f"{metadata[key]:.6g}") if isinstance(metadata[key], float) else metadata[key]
        for key, name in _GGUF_SAMPLING.items()
        if key in metadata
    }
    return {**given, "do_sample": bool(given)}
