"""Load a GGUF file with llama.cpp, to tokenise, to render chats, to generate and to read logits."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tuneline.errors import ProofError
from tuneline.models.likelihood import Pair, Tokens
from tuneline.quantize.proof.generation import Generation
from tuneline.quantize.threads import num_threads

TEMPLATE_KEY = "tokenizer.chat_template"


class LlamaFile:
    """A GGUF file on the CPU; use it in a `with` statement.

    Attributes:
        num_threads: threads that it computes on.
        chat_template: as the file carries it, "" for none.
        adds_bos: whether llama.cpp puts the token that begins a text before a prompt by itself.
    """

    def __init__(self, file: Path, *, num_context: int) -> None:
        """Load it, with room for so many tokens.

        Raises:
            ProofError: llama.cpp does not load it.
        """
        import llama_cpp

        self._api: Any = llama_cpp
        self._name = file.name
        self.num_threads = num_threads()
        try:
            self._model = llama_cpp.Llama(
                str(file),
                n_ctx=num_context,
                n_batch=num_context,
                n_ubatch=num_context,
                n_gpu_layers=0,
                n_threads=self.num_threads,
                n_threads_batch=self.num_threads,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ProofError(f"llama.cpp does not load the export {file.name}: {error}") from error
        self._vocab = llama_cpp.llama_model_get_vocab(self._model.model)
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        self.chat_template = self._model.metadata.get(TEMPLATE_KEY, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._model.close()

    def tokenise(self, text: str) -> list[int]:
        """Return the token ids of a text, its special tokens recognised and none added."""
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def is_stop(self, token: int) -> bool:
        """Tell whether llama.cpp ends a text after a token."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt that the file's chat template makes, for an answer to follow.

        Raises:
            ValueError: the template refuses the conversation.
        """
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        formatter = Jinja2ChatFormatter(
            template=self.chat_template,
            bos_token=self._text_of(self._model.token_bos()),
            eos_token=self._text_of(self._model.token_eos()),
        )
        try:
            return formatter(messages=messages).prompt  # type: ignore[arg-type]
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def logits(self, ids: list[int]) -> Any:
        """Return the logits of every position, numpy [tokens, vocabulary] in fp32.

        Raises:
            ProofError: one of them is not finite.
        """
        return self._decode(ids, position=0, all_positions=True)

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]:
        """Score answers given prompts, as `likelihood.score_answers` does.

        A prompt is computed once for the answers that follow each other, but for a model that
        keeps no state of each position.
        """
        import numpy

        # A answers' tokens, V vocabulary.
        scores = {}
        computed: Tokens | None = None
        for prompt, answer in pairs:
            if prompt != computed:
                first = self._decode(list(prompt), position=0)
            found = [first]
            if len(answer) > 1:
                rest = list(answer[:-1])
                found.append(self._decode(rest, position=len(prompt), all_positions=True))
            logits_AV = numpy.concatenate(found)
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
        """Generate greedily; a token that ends the text is the last one.

        Raises:
            ProofError: it computes a logit that is not finite.
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

    def tokens_per_second(self, ids: list[int], *, num_tokens: int) -> float:
        """Time so many single steps after a prompt, whatever it would say."""
        self._decode(ids, position=0)
        started = time.perf_counter()
        for step in range(num_tokens):
            self._decode(ids[-1:], position=len(ids) + step)
        return num_tokens / (time.perf_counter() - started)

    def _decode(self, ids: list[int], *, position: int, all_positions: bool = False) -> Any:
        """Run tokens that stand at `position`; return logits of the last, or of all of them."""
        import numpy

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
                f"llama.cpp could not compute {len(ids)} tokens with {self._name} (code {failed})"
            )
        shape = (len(ids) if all_positions else 1, self._model.n_vocab())
        # A copy: the next call writes over it.
        logits = numpy.ctypeslib.as_array(api.llama_get_logits(context), shape).copy()
        if not numpy.isfinite(logits).all():
            raise ProofError(
                f"the export {self._name} computes logits that are not finite: the merged model "
                "has weights that the format cannot hold"
            )
        return logits

    def _text_of(self, token: int) -> str:
        text = self._api.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode(errors="replace") if text else ""
