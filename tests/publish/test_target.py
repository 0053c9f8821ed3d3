"""What a recipe may name as the place to publish to."""

import pytest

from tuneline.errors import RecipeError
from tuneline.publish.target import check_target


@pytest.mark.parametrize(
    ("target", "is_one"),
    [
        *((name, True) for name in ("me/mine", "me_2/a.b-C_", "a/b", f"me/{'x' * 81}")),
        *((name, False) for name in ("me/my--model", "me/mine-", "me/mine.git", "me/x..y")),
        *((name, False) for name in ("m\u00e9/mine", "me-/mine", "me/-mine", "a/b/c", "mine")),
        (f"me/{'x' * 97}", False),
    ],
)
def test_the_hubs_client_agrees_on_names(target: str, is_one: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if is_one:
        check_target(target)
        validate_repo_id(f"{target}-gptq-4bit")
        return
    with pytest.raises(RecipeError, match="write namespace/name for the Hub, or dir:PATH"):
        check_target(target)
    if "/" in target:
        with pytest.raises(HFValidationError):
            [validate_repo_id(f"{target}{suffix}") for suffix in ("", "-lora")]


@pytest.mark.parametrize("target", ["dir:", "dir:~/out"])
def test_a_directory_has_its_path_in_full(target: str) -> None:
    with pytest.raises(RecipeError, match=f"publish_to is '{target}'. Write dir:PATH with"):
        check_target(target)


def test_a_claim_is_published_to_through_the_cache_claim() -> None:
    with pytest.raises(RecipeError, match="placement.cache_claim and write dir:/cache/PATH"):
        check_target("claim:models/published")
