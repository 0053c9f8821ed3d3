"""Check that everything that a recipe names exists in a cluster, and that the run may use it.

What the credentials are not allowed to read is reported as unknown and does not fail the plan.
"""

from collections.abc import Callable, Iterator, Set
from pathlib import Path

from tuneline import images
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.inputs import claims_of
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.kube_api import Refused, Right
from tuneline.pipelines.plan.check import Check, Verdict
from tuneline.pipelines.plan.controller import check_retries
from tuneline.pipelines.plan.nodes import check_nodes
from tuneline.pipelines.plan.quota import check_quota
from tuneline.pipelines.plan.registry import Unknown, has_image
from tuneline.pods import CA_PATH
from tuneline.recipe import Recipe
from tuneline.steps import STEPS
from tuneline.train.trainjob.client import JOBSETS
from tuneline.train.trainjob.manifest import GROUP, PLURAL

OPENSHIFT_CRD = "securitycontextconstraints.security.openshift.io"
SCHEDULES_CRD = "scheduledworkflows.kubeflow.org"
TRAINER_CRD = f"{PLURAL}.{GROUP}"
CRDS = {
    "workflows.argoproj.io": "Kubeflow Pipelines (its Argo Workflows) is not installed",
    SCHEDULES_CRD: "`tuneline schedule` will not work",
}
"""Custom resources to check for every recipe, and the message if one is absent."""

ON_A_NODE = "a node has them"
IN_REGISTRY = "the registry has them"
NOT_IN_REGISTRY = "neither a node nor the registry has them"
NOT_SEEN = "no visible node lists them, and placement.registry {} means that nodes do not pull"

RIGHTS = (
    Right("get", "pods"),
    Right("list", "pods"),
    Right("get", "pods", subresource="log"),
    Right("list", "events"),
    Right("list", "workflows", "argoproj.io"),
)
"""Rights that `tuneline doctor` needs; it uses the credentials of the person who runs it."""

LAUNCHER_RIGHTS = (
    *(Right(verb, PLURAL, GROUP) for verb in ("create", "get", "patch", "delete")),
    Right("get", "jobsets", JOBSETS[0]),
    Right("get", "pods"),
    Right("list", "pods"),
    Right("get", "pods", subresource="log"),
    Right("list", "events"),
)
"""Rights that the run's service account needs if the train step uses several nodes."""


def check_cluster(
    recipe: Recipe, kube: Kube, *, account: str | None = None, is_step: bool = False
) -> list[Check]:
    """Check a cluster for a recipe.

    Args:
        recipe: the recipe.
        kube: the cluster, and the namespace of the run.
        account: service account that the run will use; None if it is not known.
        is_step: whether `kube` uses the credentials of the run itself.

    Raises:
        ClusterError: the cluster is unreachable.
    """
    if is_step and recipe.placement.registry is None:
        # The file was compiled without a registry, for images that the nodes have.
        placement = recipe.placement.model_copy(update={"registry": images.LOCAL})
        recipe = recipe.model_copy(update={"placement": placement})
    checks = [Check("API", "ok", f"Kubernetes {kube.version()} at {kube.host}")]
    checks += _or_unknown("rights", _rights_of_run(recipe, kube, account, is_step))
    if not is_step:
        checks += _or_unknown("rights", _rights(kube))
    for name, check in _CHECKS.items():
        checks += _or_unknown(name, check(recipe, kube))
    return checks


def _or_unknown(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from checks
    except Refused as error:
        yield Check(name, "unknown", str(error))


def _crds(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    wanted = dict(CRDS)
    if recipe.placement.num_nodes > 1:
        wanted[TRAINER_CRD] = (
            "Kubeflow Trainer 2 is not installed, but placement.num_nodes is "
            f"{recipe.placement.num_nodes}"
        )
    for crd, absence in wanted.items():
        versions = kube.served_versions(crd)
        if versions:
            yield Check("CRDs", "ok", f"{crd} {', '.join(versions)}")
        else:
            verdict: Verdict = "warn" if crd == SCHEDULES_CRD else "fail"
            words = f"there is no {crd}: {absence}"
            yield Check("CRDs", verdict, words, "ask the owner of the platform to install it")


def _user(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    user = recipe.placement.run_as_user
    try:
        if user is None or not kube.served_versions(OPENSHIFT_CRD):
            return
    except Refused:
        # The check of the CRDs says so already.
        return
    words = f"this is OpenShift, whose constraint restricted-v2 refuses pods of user {user}"
    advice = "set placement.run_as_user to null, or let the service account use nonroot-v2"
    yield Check("user", "warn", words, advice)


def _rights_of_run(
    recipe: Recipe, kube: Kube, account: str | None, is_step: bool
) -> Iterator[Check]:
    if recipe.placement.num_nodes == 1:
        return
    if account is None and not is_step:
        words = "a run on several nodes needs rights that most service accounts do not have"
        advice = "name the run's service account with --service-account"
        yield Check("rights", "unknown", words, advice)
        return
    who = "the run's service account" if account is None else account
    missing = [str(right) for right in LAUNCHER_RIGHTS if not kube.may(right, account=account)]
    if missing:
        words = f"{who} may not {', '.join(missing)} in {kube.namespace}"
        advice = "apply manifests/components/trainer, and submit with tuneline-runner"
        yield Check("rights", "fail", words, advice)
    else:
        yield Check("rights", "ok", f"{who} may create and follow TrainJobs in {kube.namespace}")


def _rights(kube: Kube) -> Iterator[Check]:
    missing = [str(right) for right in RIGHTS if not kube.may(right)]
    if missing:
        words = f"you may not {', '.join(missing)} in {kube.namespace}"
        yield Check("rights", "warn", words, "`tuneline doctor` needs these rights")
    else:
        yield Check("rights", "ok", f"you may read runs, pods, logs and events in {kube.namespace}")


def _secrets(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    present = kube.secret_names()
    wanted = list(placement.secrets)
    if placement.hub_token_secret:
        wanted.insert(0, placement.hub_token_secret)
    for name in wanted:
        if name in present:
            yield Check("secrets", "ok", f"{name} exists")
        else:
            words = f"there is no secret {name} in {kube.namespace}: the steps run without it"
            yield Check("secrets", "warn", words, "manifests/secrets has the command to create it")
    for name in placement.image_pull_secrets:
        if name not in present:
            words = f"there is no image pull secret {name} in {kube.namespace}"
            yield Check(
                "secrets",
                "fail",
                words,
                "manifests/secrets/registry.yaml shows how",
            )


def _certificates(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    bundle = recipe.placement.ca_bundle
    if bundle is None:
        return
    where = f"the ConfigMap {bundle.config_map} in {kube.namespace}"
    mounted = Path(CA_PATH)
    # The service account of a run may not read ConfigMaps, but its pods have mounted this one.
    keys = {each.name for each in mounted.iterdir()} if mounted.is_dir() else None
    if keys is None:
        keys = kube.config_map_keys(bundle.config_map)
    if keys is None:
        words = f"there is no ConfigMap {bundle.config_map} in {kube.namespace}: pods would wait"
        advice = f"kubectl create configmap {bundle.config_map} --from-file {bundle.key}=FILE"
        yield Check("certificates", "fail", words, advice)
    elif bundle.key not in keys:
        words = f"{where} has no key {bundle.key}, only {', '.join(sorted(keys)) or 'none'}"
        yield Check("certificates", "fail", words, "correct placement.ca_bundle.key")
    else:
        yield Check("certificates", "ok", f"{where} has the key {bundle.key}")


def _volumes(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    if placement.cache_claim:
        remedy = "apply manifests/, or correct placement.cache_claim"
        yield _claim(kube, "cache", placement.cache_claim, remedy, "warn")
    if placement.shared_claim:
        if_for_one_node: Verdict = "fail" if placement.num_nodes > 1 else "ok"
        remedy = "apply manifests/, or correct placement.shared_claim"
        yield _claim(kube, "shared volume", placement.shared_claim, remedy, if_for_one_node)


def _data_claims(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    for step, check, field in (
        ("prepare", "data", "the source"),
        ("fetch", "model", "base_model"),
        ("publish", "target", "publish_to"),
    ):
        for name in claims_of(recipe, step):
            yield _claim(kube, check, name, f"create it, or correct {field}", "ok")


def _claim(kube: Kube, check: str, name: str, remedy: str, if_for_one_node: Verdict) -> Check:
    """Check a claim.

    Args:
        kube: the cluster.
        check: name of the check.
        name: name of the claim.
        remedy: what to do if there is no such claim.
        if_for_one_node: the verdict on a claim that pods of one node only can use at a time.
    """
    claim = kube.claim(name)
    if claim is None:
        words = f"there is no claim {name} in {kube.namespace}: pods would wait for it forever"
        return Check(check, "fail", words, remedy)
    modes = ", ".join(claim.spec.access_modes)
    words = f"{name} is {claim.status.phase}, {modes}, class {claim.spec.storage_class_name}"
    if claim.status.phase == "Lost":
        return Check(check, "fail", words, "its volume is lost: create the claim again")
    if "ReadWriteMany" not in claim.spec.access_modes:
        advice = "pods that run at the same time on several nodes need ReadWriteMany"
        return Check(check, if_for_one_node, words, "" if if_for_one_node == "ok" else advice)
    return Check(check, "ok", words)


def _queue(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    name = recipe.placement.queue
    if name is None:
        return
    queue = kube.local_queue(name)
    if queue is None:
        words = f"there is no LocalQueue {name} in {kube.namespace}: pods would stay gated"
        yield Check("queue", "fail", words, "apply manifests/components/kueue, or correct the name")
        return
    conditions = queue.get("status", {}).get("conditions", [])
    active = next((item for item in conditions if item["type"] == "Active"), None)
    if active is not None and active["status"] != "True":
        words = f"{name} admits no workloads: {active.get('message', active.get('reason', ''))}"
        yield Check("queue", "fail", words, "ask the administrator of Kueue about its ClusterQueue")
    else:
        waiting = queue.get("status", {}).get("pendingWorkloads", 0)
        yield Check("queue", "ok", f"{name}: {waiting} workloads waiting")


def _images(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    makers = {f"quantize-{kind}" for kind in EXPORT_KINDS if getattr(recipe.quantize, kind)}
    image_sets = dict.fromkeys(
        step.image for name, step in STEPS.items() if step.stage != "quantize" or name in makers
    )
    wanted = [images.of_set(name) for name in image_sets]
    registry = recipe.placement.registry
    if registry is None:
        words = "the recipe does not say where the nodes get the images"
        advice = f"set placement.registry to your registry, or to {images.LOCAL} if nodes have them"
        yield Check("images", "fail", words, advice)
        return
    try:
        on_nodes = {
            name
            for node in kube.nodes()
            for image in node.status.images or []
            for name in image.names or []
        }
    except Refused:
        on_nodes = set()
    by_place: dict[str, list[str]] = {}
    for image in (images.in_registry(name, registry) for name in wanted):
        by_place.setdefault(_where_is(image, registry, on_nodes), []).append(image)
    for where, names in by_place.items():
        words = f"{where}: {', '.join(names)}"
        if where in (ON_A_NODE, IN_REGISTRY):
            yield Check("images", "ok", words)
        elif where == NOT_IN_REGISTRY:
            yield Check("images", "fail", words, "push the images, or correct placement.registry")
        elif images.is_on_nodes(registry):
            advice = (
                "load the images onto every node (a node lists 50 images at most, so this may be "
                "wrong), or push them to a registry and name it in placement.registry"
            )
            yield Check("images", "unknown", words, advice)
        else:
            advice = "push the images to a registry, and set placement.registry to it"
            yield Check("images", "unknown", words, advice)


def _where_is(image: str, registry: str, on_nodes: Set[str]) -> str:
    # Container engines put the host of the default registry in front of a name without a host.
    if {image, f"docker.io/{image}", f"localhost/{image}"} & on_nodes:
        return ON_A_NODE
    if images.is_on_nodes(registry):
        return NOT_SEEN.format(registry)
    try:
        return IN_REGISTRY if has_image(image) else NOT_IN_REGISTRY
    except Unknown as error:
        return f"no visible node has them, and {error}"


_CHECKS: dict[str, Callable[[Recipe, Kube], Iterator[Check]]] = {
    "CRDs": _crds,
    "user": _user,
    "secrets": _secrets,
    "certificates": _certificates,
    "volumes": _volumes,
    "data": _data_claims,
    "queue": _queue,
    "quota": check_quota,
    "nodes": check_nodes,
    "images": _images,
    "retries": check_retries,
}
