# mypy: allow-subclassing-any
"""Load a model directory as lm-eval's model, and generate answers with it."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.evaluate.encoding import encode_pair
from tuneline.evaluate.examples import without_begin
from tuneline.models.batches import Batches, Size
from tuneline.models.likelihood import Pair, Score, Tokens, score_answers
from tuneline.models.whole import load_whole

logger = logging.getLogger(__name__)


def load_tokenizer(model_dir: str | Path) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        ModelError: the directory has no tokenizer that transformers can load.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=_runs_own_code(model_dir)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_dir} has no tokenizer that can be loaded ({str(error).splitlines()[0]}): "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from None


_NUM_WINDOWS = 1024
"""Windows of a long text that lm-eval passes to `_loglikelihood_tokens` at a time."""

# Any: the decorator that registers the class HFLM with lm-eval hides the type of HFLM from mypy.
_HFLM: Any = cast(Any, HFLM)


class TemplatedHFLM(_HFLM):
    """lm-eval's Hugging Face model, extended to take prompts with the chat template applied.

    lm-eval moves white space at the end of a prompt into the answer, so for ChatML the newline
    after "assistant" would be scored as part of the answer. lm-eval also adds the BOS token. Within
    `templated()` neither happens, and the text of the prompt is used unchanged.

    Within `showing(examples)`, these examples stand before each templated prompt.

    Requests of all tasks are computed in `batches`, whose sequences have similar lengths. Each
    prompt is computed only once for all its answers, and log likelihoods are computed in float32
    (lm-eval computes them in the model's dtype). Tasks share the scores of equal templated prompts
    and answers.
    """

    batches: Batches
    """How many sequences are computed at a time."""
    fuses = True
    """Whether layers may run fused."""
    _templated = False
    _examples: tuple[int, ...] = ()
    _cached_scores: dict[Pair, Score] | None = None

    @contextlib.contextmanager
    def templated(self) -> Iterator[None]:
        """Use the text of prompts unchanged within the body of the `with` statement."""
        self._templated = True
        try:
            yield
        finally:
            self._templated = False

    @contextlib.contextmanager
    def showing(self, examples: Sequence[Tokens]) -> Iterator[None]:
        """Put examples before each templated prompt within the body of the `with` statement."""
        self._examples = tuple(token for example in examples for token in example)
        try:
            yield
        finally:
            self._examples = ()

    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Return the log likelihood of each answer after its templated prompt, in nats."""
        requests = [
            ((prompt, answer), *encode_pair(self.tokenizer, prompt, answer))
            for prompt, answer in pairs
        ]
        with self.templated():
            return [nats for nats, _is_greedy in self._loglikelihood_tokens(requests)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._templated:
            prompt, answer = encode_pair(self.tokenizer, context, continuation)
            if self._examples:
                begin = self.tokenizer.bos_token_id
                prompt = [*self._examples, *without_begin(tuple(prompt), begin)]
            return prompt, answer
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return ids

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        pairs = [(tuple(prompt), tuple(answer)) for _, prompt, answer in requests]
        if not self._templated:
            pairs = [self._cut(*pair) for pair in pairs]
            scores = self._score(pairs)
            return [scores[pair] for pair in pairs]
        if self._cached_scores is None:
            self._cached_scores = {}
        missing = [pair for pair in pairs if pair not in self._cached_scores]
        self._cached_scores |= self._score(missing)
        return [self._cached_scores[pair] for pair in pairs]

    def _score(self, pairs: list[Pair]) -> dict[Pair, Score]:
        return score_answers(self.model, pairs, batches=self.batches, fuses=self.fuses)

    def _cut(self, prompt: Tokens, answer: Tokens) -> Pair:
        """Remove the start of a prompt that is too long for the model, as lm-eval does.

        Raises:
            ModelError: no token of the prompt would remain.
        """
        if len(answer) > self.max_length:
            raise ModelError(
                f"an answer has {len(answer)} tokens, but the model can read only "
                f"{self.max_length}: leave the task out of evaluate.tasks, or use a model with a "
                "longer context"
            )
        # The last token of the answer is no input of the model.
        num_left_out = len(prompt) + len(answer) - 1 - self.max_length
        if num_left_out > 0:
            logger.warning(
                "the first %d of %d tokens of a prompt are left out: with its answer it is longer "
                "than the %d tokens that the model can read",
                *(num_left_out, len(prompt), self.max_length),
            )
        return prompt[max(0, num_left_out) :], answer

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for each request of lm-eval."""

        def size_of(request: Any) -> Size:
            prompt, settings = request.args
            num_new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            return Size(1, len(self.tok_encode(prompt)) + num_new)

        def compute(batch: list[Any]) -> list[str]:
            self.batch_size_per_gpu = len(batch)
            texts: list[str] = super(TemplatedHFLM, self).generate_until(batch, disable_tqdm=True)
            return texts

        try:
            return self.batches.run(requests, size_of, compute, called="prompts")
        finally:
            self.batch_size_per_gpu = _NUM_WINDOWS


def load(
    model_dir: str | Path, tokenizer: Any, *, batch_size: int | Literal["auto"]
) -> TemplatedHFLM:
    """Load a model for evaluation, on a GPU if there is one.

    Args:
        model_dir: the model directory.
        tokenizer: its tokenizer.
        batch_size: sequences per batch; "auto": as many as fit into memory.

    On a GPU the model computes in the dtype of its weights, on a CPU in float32: many CPUs have no
    instructions for bfloat16, and on such a CPU (AVX2) bfloat16 took several times as long.

    Raises:
        ModelError: transformers cannot load the model, or not all of its weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load_whole(
            model_dir,
            dtype="auto" if device == "cuda" else torch.float32,
            local_files_only=True,
            trust_remote_code=_runs_own_code(model_dir),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_dir} is not a model that can be loaded: {str(error).splitlines()[0]}"
        ) from None
    lm = TemplatedHFLM(
        pretrained=cast(Any, model).to(device),
        backend="causal",
        tokenizer=tokenizer,
        batch_size=_NUM_WINDOWS,
    )
    if batch_size == "auto":
        lm.batches = Batches.that_fit(lm.model)
    else:
        lm.batches = Batches(max_items=batch_size)
    logger.info("evaluating on %s in %s, %s per batch", device, model.dtype, lm.batches)
    return lm


def generate(
    lm: TemplatedHFLM, rows: list[dict[str, Any]], *, max_new_tokens: int
) -> list[dict[str, str]]:
    """Answer the prompts of held-out rows greedily. Rows of documents have none, and are left out.

    Returns:
        One dictionary per row, with the keys "question", "prompt", "answer" (the row's reference
        answer) and "text" (the model's answer).
    """
    rows = [row for row in rows if row["prompt"]]
    if not rows:
        return []
    tokenizer, model = lm.tokenizer, lm.model
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ends = tokenizer.encode(rows[0].get("end", "").rstrip(), add_special_tokens=False)
    if len(ends) == 1:
        stops.add(ends[0])
    settings = cast(Any, transformers.GenerationConfig)(
        # Set explicitly, because the model's own generation settings may ask for sampling.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
    )

    def answers_to(prompts: list[str]) -> list[str]:
        # Pad on the left, because generation continues from the last position of each row.
        batch = tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=settings,
            )
        start = batch["input_ids"].shape[1]
        texts: list[str] = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
        return texts

    def size_of(prompt: str) -> Size:
        return Size(1, len(tokenizer.encode(prompt, add_special_tokens=False)) + max_new_tokens)

    prompts = [row["prompt"] for row in rows]
    texts = lm.batches.run(prompts, size_of, answers_to, called="answers")
    return [
        {
            "question": row.get("question", row["prompt"]),
            "prompt": row["prompt"],
            "answer": row["answer"],
            "text": text.strip(),
        }
        for row, text in zip(rows, texts, strict=True)
    ]


def _runs_own_code(model_dir: str | Path) -> bool:
    """Return whether the record of the fetch step says that the model's own code may be run."""
    origin = Path(model_dir, ModelOrigin.filename)
    return origin.is_file() and bool(
        json.loads(origin.read_text(encoding="utf-8")).get("runs_own_code", False)
    )
