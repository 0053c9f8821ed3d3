"""Load a model directory with transformers, to tokenise, to generate and to read logits."""

from pathlib import Path
from typing import Any

import torch

from tuneline.errors import ModelError, ProofError
from tuneline.quantize.generation import Generation


class TransformersModel:
    """A model on the CPU.

    Attributes:
        tokenizer: the directory's own.
        stop_ids: tokens after which it stops.
    """

    def __init__(self, model_dir: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Load it.

        Raises:
            ModelError: transformers cannot.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._name = model_dir
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
            # Any: what generate returns depends on its flags, which types do not tell.
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, device_map="cpu"
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers does not load {model_dir}: {error}") from error
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        own = self.tokenizer.eos_token_id
        self.stop_ids = sorted({end for end in (*ends, own) if end is not None})

    def tokenise(self, text: str) -> list[int]:
        """Return the token ids of a text, its special tokens recognised and none added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return the logits of every position, [tokens, vocabulary] in fp32."""
        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([ids])).logits[0].float()

    def generate(self, prompt: str, *, num_tokens: int) -> Generation:
        """Generate greedily.

        Raises:
            ProofError: it computes a logit that is not finite.
        """
        prompt_ids = self.tokenise(prompt) or [self._model.config.bos_token_id]
        batch = torch.tensor([prompt_ids])
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
        logits = torch.cat(output.logits).float()
        if not torch.isfinite(logits).all():
            raise ProofError(f"the model in {self._name} computes logits that are not finite")
        ids = output.sequences[0, len(prompt_ids) :].tolist()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Generation(prompt_ids=prompt_ids, ids=ids, text=text, logits=logits.numpy())
