"""Learning rates: the value of `learning_rate: auto`, and a separate rate for embeddings."""

from collections.abc import Iterable

import torch

from tuneline.artifacts import Method

# Values of the guide that this project started from: its "Learning Rate Guide", and its examples
# for DPO and continued pre-training. Where the guide has a range, the value here is the geometric
# mean of the ends of the range, rounded.
_DPO = 5e-7
_KTO = 1e-6  # not in the guide: the default of TRL's KTOTrainer
_CPT = 2e-5  # 1e-5 to 5e-5
_SFT_SMALL = 7e-5  # 5e-5 to 1e-4, below 1,000 rows
_SFT = 2e-4
_SFT_LARGE = 1e-4  # from 100,000 rows

NUM_SMALL = 1_000
NUM_LARGE = 100_000


def auto_learning_rate(method: Method, num_rows: int) -> float:
    """Return the learning rate for a method and a number of training rows (not of packs)."""
    if method == "dpo":
        return _DPO
    if method == "kto":
        return _KTO
    if method == "cpt":
        return _CPT
    if num_rows < NUM_SMALL:
        return _SFT_SMALL
    return _SFT if num_rows < NUM_LARGE else _SFT_LARGE


def set_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], rate: float
) -> None:
    """Move some parameters of a new optimizer to parameter groups with a rate of their own."""
    apart = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in apart]
        if moved:
            group["params"] = [one for one in group["params"] if id(one) not in apart]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
