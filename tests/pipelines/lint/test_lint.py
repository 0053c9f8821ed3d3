"""The security lint: a bad example for each rule, and every shipped manifest.

test_finetune lints every shipped recipe where it compiles it.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl

from tuneline.errors import RecipeError
from tuneline.pipelines.lint.lint import Finding, lint_documents, lint_file
from tuneline.runtime.secrets import find_secrets, mask

ROOT = Path(__file__).parents[3]
MANIFESTS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "manifests").rglob("*.yaml") if path.is_file()
)
# Put together here, so that no scanner takes this file for a leak.
HUB_TOKEN = "hf_" + "abcdefgHIJKLMNOPqrstuvwxyz123456789"
GITHUB_TOKEN = "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345"
AWS_ID = "AKIA" + "IOSFODNN7EXAMPLE"

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "step"},
    "spec": {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532},
        "containers": [
            {
                "name": "main",
                "image": "registry.example:5000/tuneline/train:0.1.0",
                "command": ["python", "-m", "tuneline.train"],
                "env": [
                    {
                        "name": "HF_TOKEN",
                        "valueFrom": {"secretKeyRef": {"name": "huggingface", "key": "token"}},
                    }
                ],
                "securityContext": {"allowPrivilegeEscalation": False},
                "resources": {
                    "requests": {"cpu": "1", "memory": "1Gi"},
                    "limits": {"cpu": "2", "memory": "2Gi"},
                },
            }
        ],
    },
}


def changed(document: dict[str, Any], *keys: str | int, value: Any) -> dict[str, Any]:
    """A copy of `document` with one value set; None removes it."""
    copied = copy.deepcopy(document)
    node: Any = copied
    for key in keys[:-1]:
        node = node[key]
    if value is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return copied


def pod(*keys: str | int, value: Any) -> dict[str, Any]:
    return changed(POD, "spec", *keys, value=value)


def container(*keys: str | int, value: Any) -> dict[str, Any]:
    return pod("containers", 0, *keys, value=value)


MAIN = "spec.containers[0]"


@pytest.mark.parametrize(
    ("document", "path", "rule", "says"),
    [
        (container("args", value=[HUB_TOKEN]), f"{MAIN}.args[0]", "secret-value", "hf_a***"),
        (container("args", value=[GITHUB_TOKEN]), f"{MAIN}.args[0]", "secret-value", "ghp_***"),
        (container("args", value=[AWS_ID]), f"{MAIN}.args[0]", "secret-value", "AKIA***"),
        (
            container("env", value=[{"name": "DB_PASSWORD", "value": "hunter2hunter2"}]),
            f"{MAIN}.env[0].value",
            "secret-value",
            "DB_PASSWORD is hunt*** (14 characters)",
        ),
        (
            container("args", value=['{"api_key": "0123456789abcdef"}']),
            f"{MAIN}.args[0]",
            "secret-value",
            "a credential 0123***",
        ),
        (container("image", value="tuneline/train"), f"{MAIN}.image", "image-tag", "tuneline"),
        (
            container("image", value="registry.example:5000/tuneline/train"),
            f"{MAIN}.image",
            "image-tag",
            "registry.example:5000/tuneline/train",
        ),
        (container("image", value="train:latest"), f"{MAIN}.image", "image-tag", "train:latest"),
        (
            container("securityContext", "privileged", value=True),
            f"{MAIN}.securityContext.privileged",
            "privileged",
            "true",
        ),
        (
            container("securityContext", "allowPrivilegeEscalation", value=True),
            f"{MAIN}.securityContext.allowPrivilegeEscalation",
            "privilege-escalation",
            "true",
        ),
        (
            container("securityContext", value=None),
            f"{MAIN}.securityContext",
            "privilege-escalation",
            "not set",
        ),
        (
            pod("volumes", value=[{"name": "disk", "hostPath": {"path": "/var/run"}}]),
            "spec.volumes[0].hostPath",
            "host-path",
            "/var/run",
        ),
        (pod("hostNetwork", value=True), "spec.hostNetwork", "host-namespace", "true"),
        (pod("hostPID", value=True), "spec.hostPID", "host-namespace", "true"),
        (
            pod("securityContext", "runAsUser", value=0),
            "spec.securityContext.runAsUser",
            "root-user",
            "0",
        ),
        (
            pod("securityContext", value=None),
            f"{MAIN}.securityContext",
            "root-user",
            "runAsNonRoot is not set",
        ),
        (
            pod("securityContext", "runAsNonRoot", value=False),
            "spec.securityContext.runAsNonRoot",
            "root-user",
            "false",
        ),
        (
            container("resources", "limits", "memory", value=None),
            f"{MAIN}.resources",
            "resources",
            "no memory limit",
        ),
        (
            container("resources", value=None),
            f"{MAIN}.resources",
            "resources",
            "no cpu request, no memory request, no cpu limit, no memory limit",
        ),
        (
            pod("automountServiceAccountToken", value=None),
            "spec.automountServiceAccountToken",
            "automount",
            "default service account",
        ),
        (
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}},
            "automountServiceAccountToken",
            "automount",
            "not set",
        ),
        (
            container("command", value=["sh", "-c", "pip3 install -q torch && python x.py"]),
            f"{MAIN}.command",
            "pip-install",
            "pip3 install -q torch",
        ),
        (
            container("args", value=["python", "-m", "pip", "install", "torch"]),
            f"{MAIN}.args",
            "pip-install",
            "pip install torch",
        ),
        (
            {"apiVersion": "v1", "kind": "Secret", "stringData": {"token": "a-value"}},
            "stringData.token",
            "secret-value",
            "*** (7 characters)",
        ),
        (
            {"kind": "Kustomization", "secretGenerator": [{"literals": ["token=a-value"]}]},
            "secretGenerator[0].literals",
            "secret-value",
            "token=***",
        ),
        (
            {"kind": "Kustomization", "images": [{"name": "train", "newTag": "latest"}]},
            "images[0].newTag",
            "image-tag",
            "latest",
        ),
    ],
)
def test_a_bad_manifest_has_this_one_finding(
    document: dict[str, Any], path: str, rule: str, says: str
) -> None:
    (finding,) = lint_documents([document])
    assert (finding.path, finding.rule) == (path, rule)
    assert says in finding.value
    assert finding.fix
    for secret in (HUB_TOKEN, GITHUB_TOKEN, AWS_ID, "hunter2hunter2", "0123456789abcdef"):
        assert secret not in str(finding)


def test_a_good_pod_has_no_finding() -> None:
    assert lint_documents([POD]) == []
    # A pod that names an account of its own is meant to use the API.
    own = pod("serviceAccountName", value="tuneline-runner")
    del own["spec"]["automountServiceAccountToken"]
    assert lint_documents([own]) == []


def test_pods_inside_other_resources_are_found() -> None:
    template = {"metadata": {}, "spec": container("image", value="train")["spec"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": template}}
    (finding,) = lint_documents([{"apiVersion": "v1", "kind": "List", "items": [job]}])
    assert finding.path == "items[0].spec.template.spec.containers[0].image"


def test_a_patch_may_leave_out_what_its_base_says() -> None:
    patch = {"kind": "Deployment", "spec": {"containers": [{"name": "main", "env": []}]}}
    assert lint_documents([patch]) == []
    patch["spec"]["containers"][0]["securityContext"] = {"privileged": True}  # type: ignore[index]
    assert [finding.rule for finding in lint_documents([patch])] == ["privileged"]


@pytest.fixture(scope="module")
def demo() -> list[dict[str, Any]]:
    # The compiled demo, as test_finetune holds it to.
    path = Path(__file__).parents[1] / "golden" / "demo.yaml"
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_the_compiled_demo_passes(demo: list[dict[str, Any]]) -> None:
    assert lint_documents(demo) == []


EXECUTOR = ("deploymentSpec", "executors", "exec-train")
PLATFORM = ("platforms", "kubernetes", *EXECUTOR)


CONSTANT = ("runtimeValue", "constant")
EVALUATE = ("components", "comp-exit-handler-1", "dag", "tasks", "evaluate", "inputs")


@pytest.mark.parametrize("text", ["{{=1+1}}", "a {{item}}", "$(HOME)", "5$$", "[[CurrentTime]]"])
@pytest.mark.parametrize(
    ("part", "keys"),
    [
        (0, ("root", "inputDefinitions", "parameters", "dataset", "defaultValue")),
        (
            0,
            ("components", "comp-fetch", "inputDefinitions", "parameters", "source", "description"),
        ),
        (0, (*EVALUATE, "parameters", "label", *CONSTANT)),
        (0, (*EXECUTOR, "container", "env")),
        (1, (*PLATFORM, "nodeSelector")),
    ],
)
def test_text_that_would_be_replaced_is_found(
    demo: list[dict[str, Any]], part: int, keys: tuple[str, ...], text: str
) -> None:
    values = {"env": [{"name": "A", "value": text}], "nodeSelector": {"labels": {"a": text}}}
    documents = list(demo)
    documents[part] = changed(documents[part], *keys, value=values.get(keys[-1], text))
    (finding,) = lint_documents(documents)
    assert finding.rule == "replaced-text" and finding.path.startswith(".".join(keys))
    assert finding.value and finding.value in text
    if part == 0:
        version = {"kind": "PipelineVersion", "spec": {"pipelineSpec": documents[0]}}
        (finding,) = lint_documents([version])
        assert finding.path.startswith(".".join(("spec", "pipelineSpec", *keys)))


def test_keys_are_texts_too(demo: list[dict[str, Any]]) -> None:
    selector = {"labels": {"{{=1+1}}": "a"}}
    documents = [demo[0], changed(demo[1], *PLATFORM, "nodeSelector", value=selector)]
    (finding,) = lint_documents(documents)
    assert finding.path.endswith("exec-train.nodeSelector.labels.{{=1+1}}")


def test_placeholders_of_kfp_are_no_text(demo: list[dict[str, Any]]) -> None:
    keys = (*EVALUATE, "parameters", "label", *CONSTANT)
    text = "model {{$.inputs.parameters['pipelinechannel--loop-item-param-1']}}"
    assert lint_documents([changed(demo[0], *keys, value=text), demo[1]]) == []


def test_a_list_into_a_condition_is_found(tmp_path: Path) -> None:
    """The pipeline whose run is recorded in list-run.json: three went in, one arrived."""

    @dsl.component
    def make(text: str, model: dsl.Output[dsl.Model]) -> None: ...

    @dsl.component
    def use(models: dsl.Input[list[dsl.Model]]) -> None: ...

    @dsl.pipeline
    def several() -> list[dsl.Model]:
        with dsl.ParallelFor(["a", "b", "c"]) as item:
            made = make(text=item)
        return dsl.Collected(made.outputs["model"])

    def rules(pipeline: Any, name: str) -> set[tuple[str, str]]:
        compiler.Compiler().compile(pipeline, str(tmp_path / name))
        found = lint_documents(list(yaml.safe_load_all((tmp_path / name).read_text())))
        paths = {(finding.rule, finding.path.split(".")[1]) for finding in found}
        return {(rule, path) for rule, path in paths if rule == "list-into-dag"}

    @dsl.pipeline
    def outside(verdict: str = "promote") -> None:
        use(models=several().output)

    @dsl.pipeline
    def inside(verdict: str = "promote") -> None:
        made = several().output
        with dsl.If(verdict == "promote"):
            use(models=made)

    @dsl.pipeline
    def inner(models: dsl.Input[list[dsl.Model]]) -> None:
        use(models=models)

    @dsl.pipeline
    def nested() -> None:
        inner(models=several().output)

    assert rules(outside, "outside.yaml") == set()
    assert rules(inside, "inside.yaml") == {("list-into-dag", "comp-condition-1")}
    assert rules(nested, "nested.yaml") == {("list-into-dag", "comp-inner")}


@pytest.mark.parametrize(
    ("part", "keys", "value", "path", "rule"),
    [
        (0, (*EXECUTOR, "container", "image"), "train", ".container.image", "image-tag"),
        (
            0,
            (*EXECUTOR, "container", "resources", "resourceMemoryLimit"),
            None,
            ".container.resources",
            "resources",
        ),
        (
            0,
            (*EXECUTOR, "container", "command"),
            ["sh", "-c", "python3 -m pip install --quiet 'kfp==2.17.0'"],
            ".container.command",
            "pip-install",
        ),
        (
            0,
            (*EXECUTOR, "container", "env"),
            [{"name": "HF_TOKEN", "value": HUB_TOKEN}],
            ".container.env[0].value",
            "secret-value",
        ),
        (1, (*PLATFORM, "securityContext"), None, "", "root-user"),
        (
            1,
            (*PLATFORM, "securityContext", "runAsUser"),
            "0",
            ".securityContext.runAsUser",
            "root-user",
        ),
    ],
)
def test_a_bad_pipeline_has_this_one_finding(
    demo: list[dict[str, Any]],
    part: int,
    keys: tuple[str, ...],
    value: Any,
    path: str,
    rule: str,
) -> None:
    documents = list(demo)
    documents[part] = changed(documents[part], *keys, value=value)
    if "resourceMemoryLimit" in keys:
        # KFP writes each of them twice, as text and as a number.
        documents[part] = changed(documents[part], *keys[:-1], "memoryLimit", value=None)
    (finding,) = lint_documents(documents)
    assert finding.rule == rule
    assert finding.path.endswith(f"exec-train{path}")


def test_a_token_in_a_parameter_is_found(demo: list[dict[str, Any]]) -> None:
    keys = ("root", "inputDefinitions", "parameters", "train_config", "defaultValue")
    documents = [changed(demo[0], *keys, value='{"note": "' + HUB_TOKEN + '"}'), demo[1]]
    (finding,) = lint_documents(documents)
    assert finding == Finding(
        document=1,
        path=".".join(keys),
        rule="secret-value",
        value=f"a Hugging Face token {mask(HUB_TOKEN)}",
        fix="remove it, revoke it, and refer to a Kubernetes secret by name",
    )


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_shipped_manifest_passes(name: str) -> None:
    assert lint_file(ROOT / name) == []


@pytest.mark.parametrize(
    "text",
    [
        "unk_token=</s> eos_token: <|im_end|> max_new_tokens: 48",
        '"hub_token_secret":"huggingface"',
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct@main",
    ],
)
def test_what_only_looks_like_a_credential(text: str) -> None:
    assert find_secrets(text) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file contains no YAML document"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"name: demo\nbase_model: x\n", "neither a compiled KFP pipeline"),
    ],
)
def test_a_file_that_cannot_be_checked(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        lint_file(path)
    with pytest.raises(RecipeError, match="No such file"):
        lint_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize("odd", [None, "x", 3, ["x"], [None], {}])
def test_documents_of_any_shape_are_read(demo: list[dict[str, Any]], odd: Any) -> None:
    keys = [("deploymentSpec",), ("deploymentSpec", "executors"), EXECUTOR, ("pipelineInfo",)]
    for position in keys:
        lint_documents([{**demo[0], **nested(demo[0], position, odd)}, demo[1]])
    for position in [("spec",), ("spec", "containers"), ("spec", "securityContext"), ("metadata",)]:
        lint_documents([{**POD, **nested(POD, position, odd)}])
    for part in ("data", "stringData", "secretGenerator"):
        for kind in ("Secret", "Kustomization"):
            lint_documents([{"kind": kind, part: odd}])


def nested(document: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The top-level key of `keys`, with `value` put in at its end; None is put in, too."""
    copied = copy.deepcopy(document)
    node = copied
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return {keys[0]: copied[keys[0]]}


def test_the_command_ends_with_one_where_something_is_wrong(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(POD), encoding="utf-8")
    bad.write_text(yaml.safe_dump(container("args", value=[HUB_TOKEN])), encoding="utf-8")
    command = [sys.executable, "-m", "tuneline.pipelines.cli.main", "lint", str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1 file checked, nothing found\n")
    done = subprocess.run([*command, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "spec.containers[0].args[0]: secret-value: a Hugging Face token hf_a***" in done.stdout
    assert HUB_TOKEN not in done.stdout + done.stderr
