"""Whether a model keeps the rows of a pack apart.

A pack is one sequence whose position IDs begin at 0 with each row. Most models of transformers
derive from these a mask that separates the rows. Layers that pass a state along the sequence do not
(Mamba, linear attention, convolutions: Qwen3.5, Falcon-H1, Jamba, RecurrentGemma, ...), and nor do
models whose attention takes no position IDs, or whose masks do not depend on them (gpt-oss). Some
of them raise an error, others would let a row see the rows before it. No property of the model's
class tells all of them, so the model is asked, unless it is of a family whose packs are tested.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from tuneline.kernels.spec import family_spec

_LENGTH = 12
"""Tokens of each of the two rows: more than a convolution of these models is wide."""
_TOLERANCE = {torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 0.1
# Largest change of a logit, in standard deviations of the logits, that is taken for rounding.


def reason_not_to_pack(model: PreTrainedModel) -> str:
    """Return why a model cannot train on packs, in words; "" if it can.

    Two packs are compared that differ only in their first rows: the logits of their second rows
    have to be equal.
    """
    if _is_known_to_pack(model):
        return ""
    name = type(model).__name__
    try:
        first, second = _second_rows(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever a model raises at a pack, it does not take packs.
        return f"{name} does not take packs ({' '.join(str(error).split())[:160]})"
    change = float((first - second).abs().max() / first.std())
    if change > _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE):
        return f"in {name} a row of a pack would see the rows before it"
    return ""


def _is_known_to_pack(model: Any) -> bool:
    """Return whether all layers are attention of families with fused layers, which tests pack."""
    layers = getattr(model.get_decoder(), "layers", ())
    is_known = [family_spec(layer) is not None and hasattr(layer, "self_attn") for layer in layers]
    return bool(is_known) and all(is_known)


@torch.no_grad()
def _second_rows(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the same second row in two packs with different first rows."""
    network: Any = model
    embedding = network.get_input_embeddings().weight
    device, num_ids = embedding.device, embedding.shape[0]
    rows = torch.arange(3 * _LENGTH, device=device).remainder(num_ids).view(3, _LENGTH)
    packs = torch.stack([torch.cat([other, rows[2]]) for other in rows[:2]])
    positions = torch.arange(_LENGTH, device=device).repeat(2, 2)
    was_training = network.training
    network.eval()
    logits = network(input_ids=packs, position_ids=positions, use_cache=False).logits
    network.train(was_training)
    first, second = logits[:, _LENGTH:].float()
    return first, second
