"""A model directory as lm-eval's model."""

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
from tuneline.models.likelihood import score_answers

logger = logging.getLogger(__name__)


def load_tokenizer(model_dir: str | Path) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        ModelError: it has none that transformers can load.
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


class TemplatedHFLM(HFLM):
    """lm-eval's Hugging Face model, which can also take prompts that are templated already.

    lm-eval moves white space at the end of a prompt into the answer, so that for ChatML the
    newline after "assistant" would be scored as the model's own; and it adds the tokenizer's
    beginning-of-sequence token. Within `templated()` neither happens: the prompt's text is all.
    There a prompt also goes through the model once for all its answers, and an answer that
    another task asked for is not computed again: a quarter of the time on a CPU.
    """

    _templated = False

    @contextlib.contextmanager
    def templated(self) -> Iterator[None]:
        """Take prompts as they stand."""
        self._templated = True
        try:
            yield
        finally:
            self._templated = False

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._templated:
            return encode_pair(self.tokenizer, context, continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        if not self._templated:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = [(tuple(prompt), tuple(answer)) for _, prompt, answer in requests]
        known = self.__dict__.setdefault("_known", {})
        missing = [pair for pair in pairs if pair not in known]
        known.update(score_answers(self.model, missing, batch_size=self.batch_size))
        return [known[pair] for pair in pairs]


def load(model_dir: str | Path, tokenizer: Any, *, batch_size: int) -> TemplatedHFLM:
    """Load the model for evaluation, on the GPU where there is one.

    The weights' own type on a GPU; float32 on a CPU: of the CPUs in use only some have bfloat16
    units, and on one without (AVX2) bfloat16 took several times as long.

    Raises:
        ModelError: transformers cannot load it.
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
        Rows {"question", "prompt", "answer", "text"}: the reference and what the model wrote.
    """
    if not rows:
        return []
    tokenizer, model = lm.tokenizer, lm.model
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ends = tokenizer.encode(rows[0].get("end", "").rstrip(), add_special_tokens=False)
    if len(ends) == 1:
        stops.add(ends[0])
    # Left padding: a generation goes on from the last position.
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
            # What stands here is not filled in from the model's own defaults, which may sample.
            generation_config=transformers.GenerationConfig(
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
    """Say whether fetch was told, by name, to trust the code in the directory."""
    origin = Path(model_dir, ModelOrigin.filename)
    return origin.is_file() and bool(
        json.loads(origin.read_text(encoding="utf-8")).get("runs_own_code", False)
    )
