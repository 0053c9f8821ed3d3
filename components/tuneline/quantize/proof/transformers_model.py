"""Load a model directory with transformers to tokenise, generate and compute logits."""

import json
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    AwqConfig,
    GenerationConfig,
    GPTQConfig,
    TextIteratorStreamer,
)

from tuneline.errors import ModelError, ProofError
from tuneline.models.batches import Batches
from tuneline.models.likelihood import Pair, score_answers
from tuneline.models.sampling import Request
from tuneline.models.stored_quantisation import quantization_in
from tuneline.models.whole import load_whole
from tuneline.quantize.machine import few_threads
from tuneline.quantize.proof import widening
from tuneline.quantize.proof.compressed import keep_compressed
from tuneline.quantize.proof.generation import Generation

ROOM_BYTES = 2 << 30
"""GPU memory to leave for the activations of a row, in addition to the weights."""
BATCH_TOKENS = 2048
"""Number of tokens, of prompts with their answers, to compute at a time."""


def choose_device(model_dir: Path) -> str:
    """Return "cuda" if a GPU has room for the weights and a row's activations, else "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    num_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if num_bytes + ROOM_BYTES < free else "cpu"


class TransformersModel:
    """A model that transformers has loaded on one device.

    Attributes:
        tokenizer: the model's tokenizer.
        stop_ids: tokens after which the model stops.
    """

    def __init__(
        self, model_dir: Path, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
    ) -> None:
        """Load the model.

        Args:
            model_dir: the model directory.
            dtype: dtype to compute in; "auto": the dtype of the weights in the files. If it is
                float32 on a CPU, 16-bit weights stay mapped from their files (widening.py).
            device: "cpu" or "cuda".

        Raises:
            ModelError: transformers cannot load the model, or not all of its weights.
        """
        self._name = model_dir
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
            # Any, because the type of the result of `generate` depends on its arguments.
            self._model: Any = _load(model_dir, dtype, device)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"transformers cannot load {model_dir} ({error}): run the step that made it again"
            ) from error
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        eos = self.tokenizer.eos_token_id
        self.stop_ids = sorted({end for end in (*ends, eos) if end is not None})

    @property
    def begin_id(self) -> int:
        """Token that replaces an empty prompt: BOS, or EOS if there is no BOS, as in lm-eval.

        Raises:
            ModelError: the tokenizer has neither BOS nor EOS.
        """
        token: int | None
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ModelError(
            f"the tokenizer of {self._name} has neither bos_token nor eos_token, and a held-out "
            "row has an empty prompt: name one in its tokenizer_config.json"
        )

    def tokenise(self, text: str) -> list[int]:
        """Return the token IDs of a text; special tokens are recognised, but none are added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return the logits of every position, [tokens, vocabulary] in fp32."""
        with torch.inference_mode():
            batch = torch.tensor([ids], device=self._model.device)
            logits_TV: torch.Tensor = self._model(input_ids=batch).logits[0]
            return logits_TV.float().cpu()

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]:
        """Score answers given prompts, as `likelihood.score_answers` does."""
        return score_answers(self._model, pairs, batches=Batches(max_tokens=BATCH_TOKENS))

    def generate(self, prompt_ids: list[int], *, num_tokens: int) -> Generation:
        """Generate greedily, up to and including the first stop token.

        Raises:
            ProofError: a logit is not finite.
        """
        batch = torch.tensor([prompt_ids], device=self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logits = torch.cat(output.logits).float().cpu()
        if not torch.isfinite(logits).all():
            raise ProofError(
                f"the model in {self._name} computes logits that are not finite: "
                f"{_why_not_finite(_method(self._name))}"
            )
        ids = output.sequences[0, len(prompt_ids) :].tolist()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Generation(prompt_ids=prompt_ids, ids=ids, text=text, logits=logits.numpy())

    def stream(self, prompt_ids: list[int], request: Request) -> Generator[str, None, bool]:
        """Generate, and yield the text as it grows, word by word.

        A consumer that closes the generator ends the computation.

        Args:
            prompt_ids: the prompt.
            request: how to answer it.

        Returns:
            Whether the answer ended with a stop token, not with `request.num_tokens`.
        """
        stops = sorted({*self.stop_ids, *request.ends})
        sampling = request.sampling
        # transformers warns of numbers for sampling if it does not sample.
        numbers = {} if sampling.is_greedy else sampling.model_dump()
        config: Any = GenerationConfig
        settings = config(
            **numbers | {"repetition_penalty": sampling.repetition_penalty},
            do_sample=not sampling.is_greedy,
            max_new_tokens=request.num_tokens,
            eos_token_id=stops or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        streamer: Any = TextIteratorStreamer(
            self.tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        batch = torch.tensor([prompt_ids], device=self._model.device)
        closed = threading.Event()
        outcome: list[Any] = []

        def generate() -> None:
            try:
                if request.seed is not None:
                    torch.manual_seed(request.seed)
                with few_threads(), torch.inference_mode():
                    output = self._model.generate(
                        batch,
                        attention_mask=torch.ones_like(batch),
                        generation_config=settings,
                        streamer=streamer,
                        stopping_criteria=[lambda *_: closed.is_set()],
                    )
                outcome.append(int(output[0, -1]) in stops)
            except Exception as error:  # raised below, in the thread of the consumer
                outcome.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            closed.set()
            thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return bool(outcome[0])

    def tokens_per_second(self, ids: list[int], *, num_tokens: int) -> float:
        """Measure the speed of `num_tokens` single-token steps after a prompt of `ids`."""
        batch = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            cache = self._model(input_ids=batch, use_cache=True).past_key_values
            started = time.perf_counter()
            for _ in range(num_tokens):
                step = self._model(input_ids=batch[:, -1:], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
        return num_tokens / (time.perf_counter() - started)


def _load(model_dir: Path, dtype: torch.dtype | str, device: str) -> Any:
    narrow = widening.narrow_dtype(model_dir)
    if dtype == torch.float32 and device == "cpu" and narrow:
        return widening.load(model_dir, narrow)
    model = load_whole(
        model_dir, dtype=dtype, device_map={"": device}, **_kernels(model_dir, device)
    )
    if _method(model_dir) == "compressed-tensors":
        keep_compressed(model)
    return model


def _kernels(model_dir: Path, device: str) -> dict[str, Any]:
    """Return arguments that load GPTQ and AWQ weights on a GPU with torch's kernels.

    By default gptqmodel chooses a kernel that is compiled when the model is loaded, but the images
    contain no compiler.
    """
    quantization = _quantization(model_dir)
    # Any: transformers does not annotate these.
    gptq: Any = GPTQConfig
    awq: Any = AwqConfig
    method = quantization.get("quant_method")
    if device == "cpu" or method not in ("gptq", "awq"):
        return {}
    if method == "gptq":
        settings = gptq(bits=quantization["bits"], backend="torch")
    else:
        settings = awq(bits=quantization["bits"], backend="torch_awq")
    return {"quantization_config": settings}


def _quantization(model_dir: Path) -> dict[str, Any]:
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return quantization_in(settings) or {}


def _method(model_dir: Path) -> str | None:
    return _quantization(model_dir).get("quant_method")


def _why_not_finite(method: str | None) -> str:
    """Return the likely cause of logits that are not finite, and what to do about it.

    The merged model is asked first, so its own logits are finite if those of an export are asked.
    """
    if method is None:
        return "the training diverged; train with a lower train.learning_rate"
    if method == "gptq":
        return (
            "GPTQ computes in float16, whose largest number is 65504, and the merged model's own "
            "are finite. More bits do not help: set quantize.gptq to []"
        )
    kind = "fp8" if method == "compressed-tensors" else method
    return f"the merged model's own are finite, so the export is broken: set quantize.{kind} to []"
