"""Load a GGUF file with llama.cpp to tokenise, render chats, generate and compute logits."""

import codecs
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import llama_cpp
import numpy
import numpy.typing
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tuneline.errors import ProofError
from tuneline.models.sampling import Request
from tuneline.models.tokenizer.chat_templates import REFUSALS
from tuneline.quantize.machine import num_threads
from tuneline.quantize.proof.generation import Generation

if TYPE_CHECKING:
    # `chat` loads GGUF files without torch, whose import takes seconds.
    from tuneline.models.likelihood import Pair, Tokens

TEMPLATE_KEY = "tokenizer.chat_template"
"""Name of the chat template in a GGUF file's metadata."""

_F16 = "1"
"""Value of general.file_type for files in f16 (llama.cpp's LLAMA_FTYPE_MOSTLY_F16)."""
_RANDOM_SEED = llama_cpp.LLAMA_DEFAULT_SEED
"""Value with which llama.cpp draws a seed itself."""
_DECODE_ADVICE = {
    1: "its context has no room for them, which is a fault of tuneline: report it",
    -2: "memory could not be allocated; raise the memory limit of quantize-gguf",
}
"""What to do by the code that llama_decode returns."""

Array = numpy.typing.NDArray[Any]


class LlamaFile:
    """A GGUF model that llama.cpp has loaded; use it in a `with` statement.

    Attributes:
        num_threads: number of CPU threads that the model computes on.
        chat_template: chat template in the file; "" if the file has none.
        adds_bos: whether llama.cpp by default puts the BOS token before a prompt.
    """

    def __init__(
        self,
        file: Path,
        *,
        num_context: int,
        num_batch: int | None = None,
        num_gpu_layers: int = 0,
        vocab_only: bool = False,
    ) -> None:
        """Load `file` with a context of `num_context` tokens.

        Args:
            file: the GGUF file.
            num_context: context length. Some models compute with other rotary angles if it exceeds
                the length that they were first trained with.
            num_batch: largest number of tokens to compute at a time; None: `num_context`.
            num_gpu_layers: number of layers to compute on a GPU if this build of llama.cpp can; -1
                is all.
            vocab_only: whether to load the tokenizer and the metadata only.

        Raises:
            ProofError: llama.cpp cannot load the file.
        """
        self._api = cast(Any, llama_cpp)
        self._name = file.name
        num_batch = num_batch or num_context
        self.num_threads = num_threads()
        try:
            self._model = llama_cpp.Llama(
                str(file),
                n_ctx=num_context,
                n_batch=num_batch,
                n_ubatch=num_batch,
                n_gpu_layers=num_gpu_layers,
                # Penalties of `stream` concern the whole text, as in transformers.
                last_n_tokens_size=num_context,
                vocab_only=vocab_only,
                n_threads=self.num_threads,
                n_threads_batch=self.num_threads,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ProofError(
                f"llama.cpp cannot load the export {file.name} ({error}): use another format, and "
                "report the model to llama.cpp"
            ) from error
        self._vocab = llama_cpp.llama_model_get_vocab(self._model.model)
        self.adds_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))
        self.chat_template = self._model.metadata.get(TEMPLATE_KEY, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def tokenise(self, text: str) -> list[int]:
        """Return the token IDs of a text; special tokens are recognised, but none are added."""
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def tokenise_as_server(self, text: str) -> list[int]:
        """Return the token IDs of a prompt as llama.cpp's server computes them.

        The server adds the tokens that the file asks for before and after a prompt, except those
        that the prompt's text has already.
        """
        if self.adds_bos:
            text = text.removeprefix(self._text_of(self._model.token_bos()))
        if self._api.llama_vocab_get_add_eos(self._vocab):
            text = text.removesuffix(self._text_of(self._model.token_eos()))
        return self._model.tokenize(text.encode(), add_bos=True, special=True)

    def is_stop(self, token: int) -> bool:
        """Return whether llama.cpp stops generating after `token`."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def render(
        self,
        messages: list[dict[str, str]],
        *,
        for_answer: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return a conversation rendered by the file's chat template.

        Args:
            messages: the conversation.
            for_answer: whether to end with the generation prompt.
            variables: further variables of the template, e.g. enable_thinking.

        Raises:
            ValueError: the template rejects the conversation.
        """
        formatter = Jinja2ChatFormatter(
            template=self.chat_template,
            bos_token=self._text_of(self._model.token_bos()),
            eos_token=self._text_of(self._model.token_eos()),
            add_generation_prompt=for_answer,
        )
        try:
            return formatter(messages=messages, **variables).prompt  # type: ignore[arg-type]
        except REFUSALS as error:
            raise ValueError(str(error)) from error

    def logits(self, ids: list[int]) -> Array:
        """Return the logits of every position, [tokens, vocabulary] in fp32.

        Raises:
            ProofError: a logit is not finite.
        """
        return self._decode(ids, position=0, all_positions=True)

    def score_answers(self, pairs: "list[Pair]") -> "dict[Pair, tuple[float, bool]]":
        """Score answers given prompts, as `likelihood.score_answers` does.

        For consecutive answers to the same prompt, the prompt is computed once and each answer is
        then removed from the model's memory. A model whose memory does not allow this (a recurrent
        one) computes the prompt again for each answer.
        """
        # Legend: A tokens of the answer, V vocabulary.
        scores = {}
        computed: Tokens | None = None
        for prompt, answer in pairs:
            if prompt != computed:
                first = self._decode(list(prompt), position=0)
            parts = [first]
            if len(answer) > 1:
                ids = list(answer[:-1])
                parts.append(self._decode(ids, position=len(prompt), all_positions=True))
            logits_AV = numpy.concatenate(parts)
            memory = self._api.llama_get_memory(self._model.ctx)
            removed = self._api.llama_memory_seq_rm(memory, 0, len(prompt), -1)
            computed = prompt if removed else None
            shifted_AV = logits_AV - logits_AV.max(-1, keepdims=True)
            totals_A = numpy.log(numpy.exp(shifted_AV).sum(-1, dtype=numpy.float64))
            chosen_A = shifted_AV[numpy.arange(len(answer)), answer]
            greedy = bool((logits_AV.argmax(-1) == numpy.array(answer)).all())
            scores[prompt, answer] = (float((chosen_A - totals_A).sum()), greedy)
        return scores

    def generate(self, prompt_ids: list[int], *, num_tokens: int) -> Generation:
        """Generate greedily, up to and including the first stop token.

        Raises:
            ProofError: a logit is not finite.
        """
        step, position = prompt_ids, 0
        ids: list[int] = []
        for _ in range(num_tokens):
            ids.append(int(self._decode(step, position=position)[-1].argmax()))
            if self.is_stop(ids[-1]):
                break
            position += len(step)
            step = ids[-1:]
        text = self._model.detokenize(ids, prev_tokens=prompt_ids).decode(errors="replace")
        return Generation(prompt_ids=prompt_ids, ids=ids, text=text)

    def stream(self, prompt_ids: list[int], request: Request) -> Generator[str, None, bool]:
        """Generate, and yield the text as it grows; no character is cut.

        llama.cpp keeps the tokens that a prompt shares with the text before it.

        Args:
            prompt_ids: the prompt.
            request: how to answer it.

        Returns:
            Whether the answer ended with a stop token, not with `request.num_tokens`.
        """
        model, sampling = self._model, request.sampling
        model.set_seed(_RANDOM_SEED if request.seed is None else request.seed)
        tokens = model.generate(
            prompt_ids,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=0.0,
            temp=0.0 if sampling.is_greedy else sampling.temperature,
            repeat_penalty=sampling.repetition_penalty,
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Some tokenizers drop the space before the first token of a text.
        before = prompt_ids[-1:]
        for number, token in enumerate(tokens, 1):
            if self.is_stop(token) or token in request.ends:
                break
            text = decoder.decode(model.detokenize([token], prev_tokens=before))
            before = [token]
            if text:
                yield text
            if number == request.num_tokens:
                return False
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest
        return True

    def tokens_per_second(self, ids: list[int], *, num_tokens: int) -> float:
        """Measure the speed of `num_tokens` single-token steps after a prompt of `ids`."""
        self._decode(ids, position=0)
        started = time.perf_counter()
        for step in range(num_tokens):
            self._decode(ids[-1:], position=len(ids) + step)
        return num_tokens / (time.perf_counter() - started)

    def _decode(self, ids: list[int], *, position: int, all_positions: bool = False) -> Array:
        """Compute tokens from `position` on; return the logits of the last token, or of all."""
        api, context = self._api, self._model.ctx
        if position == 0:
            api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index] = token
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = all_positions or index == len(ids) - 1
            failed = api.llama_decode(context, batch)
        finally:
            api.llama_batch_free(batch)
        if failed:
            raise ProofError(
                f"llama.cpp could not compute {len(ids)} tokens with {self._name} (code {failed}): "
                f"{_DECODE_ADVICE.get(failed, 'its log above says why; report it to llama.cpp')}"
            )
        shape = (len(ids) if all_positions else 1, self._model.n_vocab())
        # Copy the logits, because the next call of llama_decode overwrites the buffer.
        logits: Array = numpy.ctypeslib.as_array(api.llama_get_logits(context), shape).copy()
        if not numpy.isfinite(logits).all():
            is_f16 = self._model.metadata.get("general.file_type") == _F16
            raise ProofError(
                f"the export {self._name} computes logits that are not finite, where those of the "
                "merged model are: "
                + (
                    "its weights exceed 65504, the largest number of f16, or llama.cpp computes "
                    "them differently. More bits do not help, because all GGUF formats are made "
                    "from f16: set quantize.gguf to []"
                    if is_f16
                    else "the f16 file was finite, so the rounding is the cause; use another format"
                )
            )
        return logits

    def _text_of(self, token: int) -> str:
        text = self._api.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode(errors="replace") if text else ""
