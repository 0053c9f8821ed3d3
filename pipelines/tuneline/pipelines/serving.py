"""Find the InferenceServices of a published model, adapt them to a cluster, and apply them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from tuneline.artifacts import Published
from tuneline.bounded_yaml import load_yaml
from tuneline.errors import DataError, UserError
from tuneline.fetch import hub
from tuneline.pipelines.kube_api import KubeApi
from tuneline.pipelines.local.run_dir import LocalRun, find_local_run
from tuneline.runtime.source_names import is_hub_id
from tuneline.serving.inference_service import GROUP, KIND, PLURAL, VERSION
from tuneline.serving.manifests import FOLDER, README
from tuneline.serving.storage import UNKNOWN_STORAGE


@dataclass(frozen=True)
class Services:
    """The InferenceServices of one model, by the form in which it is served."""

    by_form: dict[str, dict[str, Any]]
    """merged, lora, or the format of an export -> InferenceService."""
    notes: tuple[str, ...] = ()
    """Sentences about the forms that cannot be served."""

    def only(self, form: str | None) -> "Services":
        """Return the services, or that of one form.

        Raises:
            UserError: there is no such form, or none at all.
        """
        if not self.by_form:
            raise UserError(" ".join(["nothing can be served:", *self.notes]))
        if form is None:
            return self
        if form not in self.by_form:
            told = " ".join(note for note in self.notes if note.startswith(f"{form}:"))
            raise UserError(
                f"there is no InferenceService for {form}: choose --format from "
                f"{', '.join(self.by_form)}. {told}".strip()
            )
        return Services({form: self.by_form[form]}, self.notes)


def find_services(subject: str) -> Services:
    """Return the InferenceServices of a model that was published.

    Args:
        subject: a local run's directory or name, a directory that was published into or one
            repository in it, or the Hub ID of a repository.

    Raises:
        UserError: there is no such model, or it was not published.
    """
    run = find_local_run(subject)
    if run is not None:
        return _read(_published_dir(run) / FOLDER)
    path = Path(subject)
    if path.is_dir():
        return _read(path)
    if "/" in subject and is_hub_id(subject):
        with hub.translated_errors(subject, None):
            return _read(Path(snapshot_download(subject, allow_patterns=[f"{FOLDER}/*"])))
    raise UserError(
        f"there is no local run, no directory and no Hub repository {subject}: name one. Of a run "
        "on a cluster, name the repository that it published (ORG/NAME)"
    )


def _published_dir(run: LocalRun) -> Path:
    for place in run.artifact_dirs():
        if (place / Published.filename).is_file():
            return place
    raise UserError(
        f"{run.name} ({run.state()}) published nothing, so there is nothing to serve: `tuneline "
        f"status {run.name}` shows its steps and the verdict"
    )


def _read(directory: Path) -> Services:
    """Read the folders `serving/` of a repository, or of all repositories in a directory."""
    services: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    # The folder of a run has a folder per repository.
    patterns = ["*/*"] if directory.name == FOLDER else [f"{FOLDER}/*", f"*/{FOLDER}/*"]
    for path in (path for pattern in patterns for path in sorted(directory.glob(pattern))):
        if path.name == README:
            lines = path.read_text(encoding="utf-8").splitlines()
            notes += [line.removeprefix("- ") for line in lines if ": not served. " in line]
        elif path.suffix == ".yaml":
            services[path.stem] = _load(path)
    if not services and not notes:
        raise UserError(
            f"{directory} has no {FOLDER}/: an older version of tuneline published it. Publish it "
            "again"
        )
    return Services(services, tuple(notes))


def _load(path: Path) -> dict[str, Any]:
    try:
        service = load_yaml(path.read_text(encoding="utf-8"))
        if service["kind"] == KIND and service["spec"]["predictor"]["containers"][0]:
            return dict(service)
    except (yaml.YAMLError, DataError, UnicodeDecodeError, KeyError, IndexError, TypeError):
        pass
    raise UserError(f"{path} is not an {KIND} of tuneline: publish the model again")


def adapt(
    service: dict[str, Any],
    *,
    storage: str | None,
    image: str | None,
    account: str | None,
) -> None:
    """Change an InferenceService in place, as a user asks.

    Args:
        service: the InferenceService.
        storage: URI of the directory that holds the repositories; None: as published.
        image: image of the server, e.g. in a mirror; None: as published.
        account: service account with the credentials for the storage; None: the default one.
    """
    predictor = service["spec"]["predictor"]
    for source in predictor["storageUris"]:
        if storage is not None and source["uri"].startswith(UNKNOWN_STORAGE):
            folder = source["uri"].removeprefix(UNKNOWN_STORAGE)
            source["uri"] = f"{storage.rstrip('/')}{folder}"
    if image is not None:
        predictor["containers"][0]["image"] = image
    if account is not None:
        predictor["serviceAccountName"] = account


def check_storage(service: dict[str, Any]) -> None:
    """Check that KServe can download the files.

    Raises:
        UserError: they are in a directory.
    """
    for source in service["spec"]["predictor"]["storageUris"]:
        if source["uri"].startswith(UNKNOWN_STORAGE):
            folder = source["uri"].rpartition("/")[2]
            raise UserError(
                f"{folder} was published into a directory, which KServe cannot read: copy it to a "
                "claim or a bucket, and give the directory there, e.g. --storage pvc://models or "
                "--storage s3://bucket/models"
            )


def apply(services: Services, *, namespace: str, context: str | None) -> Iterator[str]:
    """Write InferenceServices to a cluster; yield a sentence for each.

    Args:
        services: the InferenceServices.
        namespace: their namespace.
        context: context of the kubeconfig; None: the current one.

    Raises:
        UserError: there are no credentials, KServe is not installed, or a name is taken.
        ClusterError: Kubernetes cannot be reached, or refuses an object.
    """
    cluster = KubeApi(namespace, context=context)
    for service in services.by_form.values():
        done = cluster.write(GROUP, VERSION, PLURAL, service)
        yield f"inferenceservice {service['metadata']['name']}: {done} in namespace {namespace}"
