"""The learning rate that a recipe gets for `learning_rate: auto`."""

from tuneline.artifacts import Method

# From the guide that this project started from, "Learning Rate Guide" and its examples for DPO
# and continued pre-training. Where it gives a range, the geometric middle of it, rounded.
_DPO = 5e-7
_CPT = 2e-5  # 1e-5 to 5e-5
_SFT_SMALL = 7e-5  # 5e-5 to 1e-4, under 1,000 rows
_SFT = 2e-4
_SFT_LARGE = 1e-4  # from 100,000 rows

NUM_SMALL = 1_000
NUM_LARGE = 100_000


def auto_learning_rate(method: Method, num_rows: int) -> float:
    """Return the rate for a method and a number of training rows, before packing."""
    if method == "dpo":
        return _DPO
    if method == "cpt":
        return _CPT
    if num_rows < NUM_SMALL:
        return _SFT_SMALL
    return _SFT if num_rows < NUM_LARGE else _SFT_LARGE
