"""Generate greedily with llama.cpp and with transformers, and compare the two."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError, ProofError

NEAR_TIE = 0.1
"""Logits: f16 against fp32 differ by some hundredths, so a token this close to the best may win."""


@dataclass(frozen=True)
class Generation:
    """What a model generated from a prompt, greedily; an end-of-text token is the last one."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    logits: object | None = None
    """numpy (num_ids, vocabulary), float32: what each id was chosen from; transformers only."""


def with_llama_cpp(file: Path, prompt: str, *, num_tokens: int) -> Generation:
    """Load a GGUF file on the CPU and generate.

    Raises:
        ProofError: it does not load, or computes a logit that is not finite.
    """
    import llama_cpp
    import numpy

    try:
        model = llama_cpp.Llama(
            str(file), n_ctx=0, n_gpu_layers=0, n_threads=_num_threads(), verbose=False
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ProofError(f"llama.cpp does not load the export {file.name}: {error}") from error
    try:
        prompt_ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
        if not prompt_ids:
            prompt_ids = [model.token_bos()]
        step = prompt_ids
        ids: list[int] = []
        for _ in range(min(num_tokens, model.n_ctx() - len(prompt_ids))):
            model.eval(step)
            logits = numpy.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)
            )
            if not numpy.isfinite(logits).all():
                raise ProofError(
                    f"the export {file.name} computes logits that are not finite after "
                    f"{len(ids)} tokens: the merged model has weights that the format cannot hold"
                )
            ids.append(int(logits.argmax()))
            if llama_cpp.llama_vocab_is_eog(model._model.vocab, ids[-1]):
                break
            step = ids[-1:]
        text = model.detokenize(ids, prev_tokens=prompt_ids).decode(errors="replace")
        return Generation(prompt_ids=prompt_ids, ids=ids, text=text)
    finally:
        model.close()


def with_transformers(
    model_dir: Path, prompt: str, *, num_tokens: int, dtype: str = "float32"
) -> Generation:
    """Load a model directory on the CPU and generate.

    Raises:
        ProofError: it computes a logit that is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        # Any: what generate returns depends on its flags, which types do not tell.
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), device_map="cpu"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers does not load {model_dir}: {error}") from error
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [
        model.config.bos_token_id
    ]
    batch = torch.tensor([prompt_ids])
    with torch.inference_mode():
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.cat(output.logits).float()
    if not torch.isfinite(logits).all():
        raise ProofError(f"the model in {model_dir} computes logits that are not finite")
    ids = output.sequences[0, len(prompt_ids) :].tolist()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Generation(prompt_ids=prompt_ids, ids=ids, text=text, logits=logits.numpy())


def hold_against(tested: Generation, reference: Generation) -> str | None:
    """Check that two greedy generations are one, but for a near tie; return a note on that tie.

    From the first token that differs on, the two continue different texts, so only that token
    says anything: the reference's logit for it may lie below the best by NEAR_TIE at most.

    Raises:
        ProofError: the tokenizers or the models disagree.
    """
    if tested.prompt_ids != reference.prompt_ids:
        raise ProofError(
            "the GGUF file's tokenizer splits the prompt differently from the model's own "
            f"({tested.prompt_ids[:12]} against {reference.prompt_ids[:12]}): do not use this "
            "file; export as gptq, and report the model to llama.cpp"
        )
    for index, (ours, theirs) in enumerate(zip(tested.ids, reference.ids, strict=False)):
        if ours == theirs:
            continue
        row = reference.logits[index]  # type: ignore[index]
        gap = float(row[theirs] - row[ours])
        if gap > NEAR_TIE:
            raise ProofError(
                f"the GGUF file in f16 and the merged model part at token {index} of a greedy "
                f"answer, by {gap:.3f} in the logits where at most {NEAR_TIE} is rounding: "
                f"{tested.text[:60]!r} against {reference.text[:60]!r}"
            )
        return f"parts from the merged model at token {index}, a near tie ({gap:.4f} in the logits)"
    return None


def _num_threads() -> int:
    import os

    return len(os.sched_getaffinity(0))
