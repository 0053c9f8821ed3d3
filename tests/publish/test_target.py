"""What a recipe may name as the places to publish to."""

import pytest

from tuneline.errors import RecipeError
from tuneline.publish.target import check_target, check_targets, family_name, parse_targets
from tuneline.runtime.parameter_text import encode_list


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
    with pytest.raises(RecipeError, match="write namespace/name for the Hub, dir:PATH, claim:"):
        check_target(target)
    if "/" in target:
        with pytest.raises(HFValidationError):
            [validate_repo_id(f"{target}{suffix}") for suffix in ("", "-lora")]


@pytest.mark.parametrize("target", ["dir:", "dir:~/out"])
def test_a_directory_has_its_path_in_full(target: str) -> None:
    with pytest.raises(RecipeError, match=f"publish_to is '{target}'. Write dir:PATH with"):
        check_target(target)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "publish_to is an empty list. Name at least one target: namespace/name"),
        (["dir:/a/", "dir:/a"], "publish_to names dir:/a 2 times"),
        (["me/a", "you/b"], r"names 2 repositories on the Hub \(me/a, you/b\)"),
        ("claim:Models/x", "write claim:NAME/PATH, with the name of a PersistentVolumeClaim"),
        ("claim:models/../x", "write claim:NAME/PATH"),
        *((f"mlflow:{name}", "write mlflow:NAME, e.g. mlflow:supp") for name in ("", "a/b", "a:1")),
        ("model-registry:", "write model-registry:NAME, e.g. model-registry:support"),
        ("oci://bucket@namespace/x", "Oracle's object storage cannot be written to"),
        *((f"oci://{path}", "write oci://HOST/PATH without") for path in ("h", "h/a:v1", "h/Team")),
        ("ftp://host/x", "ftp:// cannot be written to.*the stores are s3://, gs://"),
        ("https://host/x", "https:// cannot be written to"),
        *((f"s3://{path}", "write s3://BUCKET/PATH, without wildcards") for path in ("/", "b//c")),
        *((f"s3://{path}", "write s3://BUCKET/PATH") for path in ("b/*", "b/../c", "b/a b", "..")),
    ],
)
def test_what_no_target_is_gets_a_sentence(given: str | list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        check_targets(given)


def test_several_targets_are_one_parameter() -> None:
    given = ["S3://bucket/models/", "claim:models/team/", "dir:/a, b", "me/mine"]
    given += ["oci://host:5000/team/a_b/", "mlflow:Support", "model-registry:s"]
    text = encode_list(given)
    targets = parse_targets(text)
    assert [(target.kind, target.text) for target in targets] == [
        ("hub", "me/mine"),
        ("store", "s3://bucket/models"),
        ("claim", "claim:models/team"),
        ("directory", "dir:/a, b"),
        ("registry", "oci://host:5000/team/a_b"),
        ("mlflow", "mlflow:Support"),
        ("model-registry", "model-registry:s"),
    ]
    assert family_name(targets, "recipe") == "me/mine"
    assert family_name(targets[1:], "recipe") == "recipe"
    assert [target.text for target in parse_targets("dir:/a, b")] == ["dir:/a, b"]
    with pytest.raises(RecipeError, match="begins like a list, but is not one"):
        parse_targets("[me/mine]")
