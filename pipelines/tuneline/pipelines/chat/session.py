"""A conversation with one model, or with two models side by side."""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from tuneline.errors import UserError
from tuneline.models.sampling import Request
from tuneline.pipelines.chat.settings import Settings
from tuneline.pipelines.chat.speakers import GgufSpeaker, Messages, Speaker, text_after_answer
from tuneline.pipelines.chat.subject import ModelFiles, Subject


class Answer:
    """An answer in the making: iterate over it to get its text as it grows.

    Attributes:
        text: what has been generated so far.
        is_cut: whether the answer reached the largest number of tokens before it ended.
    """

    def __init__(self, pieces: Generator[str, None, bool]) -> None:
        self._pieces = pieces
        self.text = ""
        self.is_cut = False

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                piece = next(self._pieces)
            except StopIteration as end:
                self.is_cut = not end.value
                return
            self.text += piece
            yield piece

    def close(self) -> None:
        """End the computation."""
        self._pieces.close()


@dataclass
class Voice:
    """One of the models of a conversation."""

    name: str
    """Who speaks: tuned or base."""
    title: str
    """Which model it is."""
    speaker: Speaker
    ends: frozenset[int] = frozenset()
    """Tokens at which its answers end, because the tuned model's template writes them."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """A model computes one answer at a time."""


class Session:
    """The models that answer; prompts of all are rendered by the tuned model's template.

    Attributes:
        name: name of the run or of the model.
        voices: the tuned model, and the base model if they are compared.
        settings: how the tuned model was published to sample.
        system: system message that conversations begin with; None: none.
    """

    def __init__(self, subject: Subject, *, compare: bool) -> None:
        self.name = subject.name
        tuned = _load(subject.tuned)
        self.voices = [Voice("tuned", subject.tuned.title, tuned)]
        if compare:
            assert subject.base is not None
            base = _load(subject.base)
            end = base.end_of(text_after_answer(tuned))
            ends = frozenset(() if end is None else (end,))
            self.voices.insert(0, Voice("base", subject.base.title, base, ends))
        self._tuned = tuned
        self.settings = Settings(tuned.published)
        self.system = subject.system

    @property
    def has_template(self) -> bool:
        """Return whether the model holds conversations; otherwise it continues texts."""
        return self._tuned.has_template

    def answer(self, voice: Voice, messages: Messages, settings: Settings) -> Answer:
        """Return the answer of a voice to a conversation, which ends with the user's message.

        Raises:
            UserError: the conversation does not fit into the model's context, or its template
                rejects it.
        """
        return Answer(self._generate(voice, messages, settings))

    def _generate(
        self, voice: Voice, messages: Messages, settings: Settings
    ) -> Generator[str, None, bool]:
        speaker = voice.speaker
        ids = speaker.tokenise(self._prompt(messages), is_rendered=self.has_template)
        room = speaker.num_context - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and the model {voice.name} holds "
                f"{speaker.num_context}: begin a new one"
            )
        num_tokens = min(settings.max_tokens, room)
        request = Request(num_tokens, settings.sampling, settings.seed, voice.ends)
        with voice.lock:
            return (yield from speaker.stream(ids, request))

    def _prompt(self, messages: Messages) -> str:
        if not self.has_template:
            return messages[-1]["content"]
        try:
            return self._tuned.render(messages)
        except ValueError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(
                f"the model's chat template rejects this conversation ({error}); its roles are "
                f"{roles}"
            ) from error


def _load(files: ModelFiles) -> Speaker:
    """Load a model.

    Raises:
        ModelError: transformers cannot load the model.
        ProofError: llama.cpp cannot load the model.
    """
    if files.kind == "gguf":
        return GgufSpeaker(files)
    # Imported here, because it imports torch.
    from tuneline.pipelines.chat.checkpoint import CheckpointSpeaker

    return CheckpointSpeaker(files)
