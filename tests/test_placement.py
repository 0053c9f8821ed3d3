"""PlacementConfig and its profiles: who wins, what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from tuneline import images
from tuneline.errors import RecipeError
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.placement import (
    CA_VARIABLES,
    PROFILES,
    PlacementConfig,
    plain_variables,
    quantity_value,
)
from tuneline.runtime.environment import NO_USAGE_REPORTS
from tuneline.steps import STEPS
from tuneline.version import VERSION


def test_the_schema_lists_the_names_of_both_tables() -> None:
    properties = PlacementConfig.model_json_schema()["properties"]
    assert properties["profile"]["enum"] == ["local", "small", *GPU_PROFILES] == list(PROFILES)
    assert properties["steps"]["propertyNames"]["enum"] == list(STEPS)


def test_local_is_the_defaults() -> None:
    assert PlacementConfig.parse({"profile": "local"}) == PlacementConfig()
    assert PlacementConfig().num_accelerators == 0


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_a_profile_describes_a_node_that_can_exist(name: str) -> None:
    config = PlacementConfig.parse({"profile": name})
    node = config.accelerated
    assert node.memory_request and node.memory_limit and config.shared_memory
    assert config.num_accelerators == 1
    assert config.tolerations[0].key == config.accelerator == GPU_PROFILES[name].resource
    # What a pod keeps in /dev/shm counts towards its memory.
    assert quantity_value(config.shared_memory) < quantity_value(node.memory_request) / 2


def test_what_a_recipe_says_wins_over_the_profile() -> None:
    config = PlacementConfig.parse(
        {"profile": "h100", "num_accelerators": 8, "accelerated": {"memory_limit": "1Ti"}}
    )
    assert config.num_accelerators == 8
    assert config.accelerated.memory_limit == "1Ti"
    assert config.accelerated.cpu_limit is None
    assert config.shared_memory == "16Gi"


def test_small_fits_a_node_of_two_cores_and_16_gib() -> None:
    steps = PlacementConfig.parse({"profile": "small"}).steps
    assert set(steps) == set(STEPS)
    for step in steps.values():
        assert step.cpu_request == "100m" and step.memory_limit and step.memory_request
        assert quantity_value(step.memory_limit) <= quantity_value("6Gi")
        # Of 16 GiB, Kubernetes and KFP take about three; GGUF formats run four at a time.
        assert quantity_value(step.memory_request) * 4 < quantity_value("13Gi")


def test_a_recipe_changes_one_step_of_small_and_keeps_the_rest() -> None:
    config = PlacementConfig.parse(
        {
            "profile": "small",
            "steps": {"train": {"timeout_hours": 1, "memory_request": "8Gi"}, "plan": {}},
        }
    )
    train, plain = config.steps["train"], PlacementConfig.parse({"profile": "small"})
    assert (train.cpu_request, train.timeout_hours) == ("100m", 1)
    # A request above the profile's limit raises the limit.
    assert (train.memory_request, train.memory_limit) == ("8Gi", "8Gi")
    assert config.steps["plan"] == plain.steps["plan"]
    assert config.steps["evaluate"] == plain.steps["evaluate"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_saved_config_reads_as_the_same(name: str) -> None:
    config = PlacementConfig.parse({"profile": name, "shared_memory": None})
    assert PlacementConfig.parse(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", 0.5), ("2", 2), ("1.5", 1.5), ("2k", 2000), ("2Ki", 2048), ("1Ti", 2**40)],
)
def test_quantities(text: str, value: float) -> None:
    assert quantity_value(text) == value


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"profile": "v100"}, "profile is .* one of local, small, t4, a10g"),
        (
            {"accelerated": {"memory_request": "2Gi", "memory_limit": "1500Mi"}},
            "accelerated: memory_request 2Gi is more than memory_limit 1500Mi",
        ),
        (
            {"accelerated": {"cpu_request": "two"}},
            'accelerated.cpu_request is "two", but must be text that matches',
        ),
        (
            {"steps": {"trian": {"cpu_limit": "2"}}},
            "steps.trian: unknown key; did you mean 'train'",
        ),
        (
            {"steps": {"train": {"timeout_hours": 0}}},
            "timeout_hours is 0, but must be a number above 0",
        ),
        ({"profile": "t4", "shared_memory": "14Gi"}, "shared_memory 14Gi counts towards"),
        ({"tolerations": [{"key": "a", "value": "b"}]}, "of a with operator Exists takes no value"),
        ({"tolerations": [{"key": "a", "operator": "Equal"}]}, "operator Equal needs a value"),
        ({"workload_priority_class": "high"}, "'high' has no effect without `queue`"),
        ({"secrets": {"s3": {"id": "AWS ID"}}}, "secrets.s3: 'AWS ID' is not a name"),
        ({"secrets": {"S3": {}}}, "secrets: 'S3' is not the name of a Kubernetes secret"),
        ({"secrets": {"s3": {"{{=1}}": "A"}}}, "secrets.s3: '{{=1}}' is not a key of a secret"),
        ({"node_selector": {"$(A)": "b"}}, r"node_selector: '\$\(A\)' is not the key of a"),
        ({"node_selector": {"a": "{{=1}}"}}, "node_selector.a is .* text that matches"),
        ({"tolerations": [{"key": "$$"}]}, "tolerations.0..key is .* text that matches"),
        ({"accelerator": "a{{b}}"}, "accelerator is .* text that matches"),
        ({"accelerator_products": ["a $(B)"]}, "accelerator_products.0. is .* text that matches"),
        ({"hub_token_secret": "{{a}}"}, "hub_token_secret is .* text that matches"),
        ({"image_pull_secrets": ["{{a}}"]}, "image_pull_secrets.0. is .* text that matches"),
        ({"run_as_user": 0}, "run_as_user is 0, but must be a whole number at least 1"),
        ({"cache_claim": "Model_Cache"}, "cache_claim is .* text that matches"),
        ({"shm": "1Gi"}, "shm: unknown key"),
        ({"environment": {"A B": "1"}}, "'A B' is not a name of an environment variable"),
        ({"environment": {"A": 1}}, 'environment.A is 1, but must be text: write "1", in quotes'),
        ({"environment": {"A": "$(B)"}}, r"environment.A contains '\$\(B\)', which Kubernetes"),
        ({"environment": {"A": "{{=1}}"}}, "environment.A contains '{{=1}}', which Kubernetes"),
        ({"environment": {"A": "b\nc"}}, "environment.A contains a line break"),
        ({"environment": {"PIP_INDEX_URL": "x"}}, "PIP_INDEX_URL: no step installs packages"),
        ({"environment": {"HF_HOME": "/x"}}, "HF_HOME: placement.cache_claim sets it"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN: placement.hub_token_secret sets it"),
        ({"environment": {"TUNELINE_EVENTS": "x"}}, "that begin with TUNELINE_ are tuneline's own"),
        ({"environment": {"WORLD_SIZE": "2"}}, "WORLD_SIZE: the train step sets it for each rank"),
        (
            {"environment": {"W": "1"}, "secrets": {"s": {"k": "W"}}},
            "environment.W is also set by `secrets`",
        ),
        ({"environment": {"HTTPS_PROXY": "http://p:3128"}}, "set HTTPS_PROXY but not NO_PROXY"),
        ({"environment": {"http_proxy": "http://p:3128"}}, "set http_proxy but not NO_PROXY"),
        ({"secrets": {"p": {"url": "HTTPS_PROXY"}}}, "set HTTPS_PROXY but not NO_PROXY"),
        (
            {"environment": {"SSL_CERT_FILE": "/x"}, "ca_bundle": {"config_map": "ca"}},
            "SSL_CERT_FILE: ca_bundle sets it: remove one of the two",
        ),
        ({"ca_bundle": {"config_map": "CA"}}, "ca_bundle.config_map is .* text that matches"),
        ({"ca_bundle": {"config_map": "ca", "key": "a/b"}}, "ca_bundle.key is .* text that match"),
    ],
)
def test_a_mistake_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        PlacementConfig.parse(values)


SECRET = "hf_" + "s" * 34


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("A", SECRET, "a Hugging Face token"),
        ("HTTPS_PROXY", "http://me:pa55word@proxy:3128", "a URL with a password"),
        ("WANDB_API_KEY", "0123456789abcdef0123", "a credential"),
    ],
)
def test_a_credential_is_refused_and_not_repeated(name: str, value: str, kind: str) -> None:
    with pytest.raises(RecipeError, match=f"environment.{name} holds {kind}") as caught:
        PlacementConfig.parse({"environment": {name: value, "NO_PROXY": ".svc"}})
    assert f"placement.secrets, as {{my-secret: {{value: {name}}}}}" in str(caught.value)
    assert "pa55word" not in str(caught.value) and value not in str(caught.value)


def test_what_the_images_set_cannot_be_set() -> None:
    text = (Path(__file__).parents[1] / "images" / "Dockerfile").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ENV (.*?[^\\])$", text, re.M | re.S)
    values = dict(re.findall(r"(\w+)=(\S+)", block))
    names = values.keys()
    assert NO_USAGE_REPORTS.items() <= values.items()
    assert "TUNELINE_IMAGE" in names and "TRITON_CACHE_DIR" in names
    for name in set(names) - {"TQDM_MININTERVAL", *NO_USAGE_REPORTS}:
        with pytest.raises(RecipeError, match=f"environment.{name}: "):
            PlacementConfig.parse({"environment": {name: "x"}})


def test_a_bundle_is_named_to_every_client() -> None:
    values = {"environment": {"HF_ENDPOINT": "https://hub"}, "ca_bundle": {"config_map": "ca"}}
    file = "/etc/tuneline/ca/ca.crt"
    assert plain_variables(PlacementConfig.parse(values)) == {
        "HF_ENDPOINT": "https://hub", **dict.fromkeys(CA_VARIABLES, file)
    }  # fmt: skip
    # An image of one's own may bring the file.
    own = {"environment": {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"}}
    assert plain_variables(PlacementConfig.parse(own)) == own["environment"]


@pytest.mark.parametrize(
    "values",
    [
        {"environment": {"HTTPS_PROXY": "http://p:3128", "no_proxy": ".svc"}},
        {"environment": {"NO_PROXY": ".svc"}, "secrets": {"p": {"url": "HTTPS_PROXY"}}},
        {"secrets": {"p": {"url": "HTTPS_PROXY", "not": "NO_PROXY"}}},
    ],
)
def test_a_proxy_may_come_from_a_secret(values: dict[str, Any]) -> None:
    assert PlacementConfig.parse(values).proxies == ["HTTPS_PROXY"]


@pytest.mark.parametrize(
    ("values", "train"),
    [
        ({}, "localhost/tuneline/train"),
        ({"registry": "local"}, "localhost/tuneline/train"),
        ({"registry": "local:tuneline"}, "tuneline/train"),
        ({"registry": "local:host.example/a"}, "host.example/a/train"),
        ({"registry": "docker.io/team"}, "docker.io/team/train"),
        ({"registry": "registry:5000/team"}, "registry:5000/team/train"),
        ({"registry": "registry.example.com"}, "registry.example.com/train"),
    ],
)
def test_names_of_images(values: dict[str, Any], train: str) -> None:
    registry = PlacementConfig.parse(values).registry
    assert images.in_registry(images.TRAIN, registry) == f"{train}:{VERSION}"
    assert images.is_on_nodes(registry) == str(values.get("registry", "local")).startswith("local")


@pytest.mark.parametrize("registry", ["tuneline", "team/models", "library"])
def test_a_registry_without_a_host_could_be_anybodys(registry: str) -> None:
    with pytest.raises(RecipeError) as refused:
        PlacementConfig.parse({"registry": registry})
    assert f"registry '{registry}' names no host, and nodes would pull" in str(refused.value)
    assert f"or local:{registry} if the nodes have the images" in str(refused.value)


def test_nodes_of_a_trainjob_cannot_pull_a_strangers_image() -> None:
    nodes = {"num_nodes": 2, "shared_claim": "shared"}
    for registry in ("local", "local:host.example/team", "host.example/team"):
        PlacementConfig.parse({**nodes, "registry": registry})
    with pytest.raises(RecipeError, match="a TrainJob cannot forbid it. Set registry to local"):
        PlacementConfig.parse({**nodes, "registry": "local:tuneline"})
