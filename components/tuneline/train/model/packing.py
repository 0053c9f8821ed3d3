"""Whether a model keeps the rows of a pack apart.

A pack is one sequence whose position IDs begin at 0 with each row. Most models of transformers
derive from these a mask that separates the rows. Layers that pass a state along the sequence do not
(Mamba, linear attention, convolutions: Qwen3.5, Falcon-H1, Jamba, RecurrentGemma, ...), and nor do
models whose attention takes no position IDs. Some of them raise an error, others would let a row
see the rows before it. No property of the model's class tells all of them, so the model is asked.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

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
    name = type(model).__name__
    try:
        first, second = _second_rows(model)
    except (ValueError, TypeError, NotImplementedError, IndexError) as error:
        return f"{name} does not take packs ({' '.join(str(error).split())[:160]})"
    change = float((first - second).abs().max() / first.std())
    if change > _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE):
        return f"in {name} a row of a pack would see the rows before it"
    return ""


@torch.no_grad()
def _second_rows(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the same second row in two packs with different first rows."""
    network: Any = model
    embedding = network.get_input_embeddings().weight
    device, num_ids = embedding.device, embedding.shape[0]
    rows = torch.arange(3 * _LENGTH, device=device).remainder(num_ids).view(3, _LENGTH)
    positions = torch.arange(_LENGTH, device=device).repeat(2)[None]
    was_training = network.training
    network.eval()
    logits = []
    for other in rows[:2]:
        pack = torch.cat([other, rows[2]])[None]
        output = network(input_ids=pack, position_ids=positions, use_cache=False)
        logits.append(output.logits[0, _LENGTH:].float())
    network.train(was_training)
    return logits[0], logits[1]
