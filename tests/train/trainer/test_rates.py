import pytest

from tuneline.errors import RecipeError
from tuneline.train import TrainConfig
from tuneline.train.trainer.rates import auto_learning_rate


@pytest.mark.parametrize(
    ("method", "num_rows", "low", "high"),
    [
        ("sft", 10, 5e-5, 1e-4),
        ("sft", 999, 5e-5, 1e-4),
        ("sft", 1_000, 2e-4, 2e-4),
        ("sft", 99_999, 2e-4, 2e-4),
        ("sft", 100_000, 1e-4, 1e-4),
        ("cpt", 10, 1e-5, 5e-5),
        ("cpt", 10**6, 1e-5, 5e-5),
        ("dpo", 5_000, 5e-7, 5e-7),
    ],
)
def test_the_rate_is_in_the_guides_range(method, num_rows, low, high):
    assert low <= auto_learning_rate(method, num_rows) <= high


def test_a_word_that_is_not_auto_is_refused():
    assert TrainConfig.parse({"learning_rate": "auto"}).learning_rate == "auto"
    allowed = "must be a number above 0 or auto"
    with pytest.raises(RecipeError, match=f'learning_rate is "high", but {allowed}'):
        TrainConfig.parse({"learning_rate": "high"})
    with pytest.raises(RecipeError, match=f"learning_rate is 0.0, but {allowed}"):
        TrainConfig.parse({"learning_rate": 0.0})
