# mypy: allow-subclassing-any
"""Load a model directory as lm-eval's model, and generate answers with it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.evaluate.encoding import encode_pair
from tuneline.models.likelihood import Pair, score_answers

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


# Any: the decorator that registers HFLM erases its type.
_HFLM: Any = cast(Any, HFLM)


class TemplatedHFLM(_HFLM):
    """lm-eval's Hugging Face model, which can also take prompts that are already templated.

    lm-eval moves white space at the end of a prompt into the answer, so for ChatML the newline
    after "assistant" would be scored as part of the answer. It also adds the BOS token. Within
    `templated()` neither happens, and the text of the prompt is used unchanged.

    Within `templated()` a prompt also passes through the model once for all its answers, and
    scores are shared between tasks. This takes a quarter of the time on a CPU.
    """

    _templated = False
    _cached_scores: dict[Pair, tuple[float, bool]] | None = None

    @contextlib.contextmanager
    def templated(self) -> Iterator[None]:
        """Use prompts unchanged within the body."""
        self._templated = True
        try:
            yield
        finally:
            self._templated = False

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._templated:
            return encode_pair(self.tokenizer, context, continuation)
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return ids

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        if not self._templated:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = [(tuple(prompt), tuple(answer)) for _, prompt, answer in requests]
        if self._cached_scores is None:
            self._cached_scores = {}
        missing = [pair for pair in pairs if pair not in self._cached_scores]
        self._cached_scores |= score_answers(self.model, missing, batch_size=self.batch_size)
        return [self._cached_scores[pair] for pair in pairs]


def load(model_dir: str | Path, tokenizer: Any, *, batch_size: int) -> TemplatedHFLM:
    """Load a model for evaluation, on a GPU if there is one.

    It computes in the dtype of its weights on a GPU and in float32 on a CPU: not all CPUs have
    bfloat16 units, and on one without them (AVX2) bfloat16 took several times as long.

    Raises:
        ModelError: transformers cannot load the model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype="auto" if device == "cuda" else torch.float32,
            local_files_only=True,
            trust_remote_code=_runs_own_code(model_dir),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_dir} is not a model that can be loaded: {str(error).splitlines()[0]}"
        ) from None
    logger.info("evaluating on %s in %s, batches of %d", device, model.dtype, batch_size)
    return TemplatedHFLM(
        pretrained=cast(Any, model).to(device),
        backend="causal",
        tokenizer=tokenizer,
        batch_size=batch_size,
    )


def generate(
    lm: TemplatedHFLM, rows: list[dict[str, Any]], *, max_new_tokens: int
) -> list[dict[str, str]]:
    """Answer the prompts of held-out rows greedily.

    Returns:
        Rows {"question", "prompt", "answer", "text"}: "answer" is the reference, "text" is the
        model's answer.
    """
    if not rows:
        return []
    tokenizer, model = lm.tokenizer, lm.model
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ends = tokenizer.encode(rows[0].get("end", "").rstrip(), add_special_tokens=False)
    if len(ends) == 1:
        stops.add(ends[0])
    # Left padding, because a generation continues from the last position.
    batch = tokenizer(
        [row["prompt"] for row in rows],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    start = batch["input_ids"].shape[1]
    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            # Explicit settings override the model's own defaults, which may sample.
            generation_config=cast(Any, transformers.GenerationConfig)(
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops) or None,
                pad_token_id=tokenizer.pad_token_id,
            ),
        )
    texts = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
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
    """Return whether the recipe trusts the code in the directory, as fetch recorded."""
    origin = Path(model_dir, ModelOrigin.filename)
    return origin.is_file() and bool(
        json.loads(origin.read_text(encoding="utf-8")).get("runs_own_code", False)
    )
