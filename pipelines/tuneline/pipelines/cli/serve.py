"""The command that serves a published model on a cluster."""

from typing import Annotated

import typer
import yaml

from tuneline.errors import UserError
from tuneline.pipelines.cli.cluster import PANEL
from tuneline.pipelines.cli.options import ContextOption
from tuneline.pipelines.cli.terminal import say

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Local run, directory that was published into, or Hub ID of a repository.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Form to serve: merged, lora, or the format of an export.",
            show_default="all with --dry-run, otherwise the only one",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resources, and apply nothing.")
    ] = False,
    namespace: Annotated[
        str, typer.Option(metavar="NAMESPACE", help="Namespace to serve in.")
    ] = "default",
    context: ContextOption = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Where the files of a published directory are now, e.g. pvc://models.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="Image of the server, e.g. in a mirror.", show_default="published"
        ),
    ] = None,
    service_account: Annotated[
        str | None,
        typer.Option(
            metavar="ACCOUNT", help="Service account with the credentials for the storage."
        ),
    ] = None,
) -> None:
    """Serve a published model with KServe (vLLM or llama.cpp)."""
    # Imported here only, because huggingface_hub and kubernetes take a moment.
    from tuneline.pipelines.serving import adapt, apply, check_storage, find_services

    services = find_services(model).only(format)
    if image is not None and len(services.by_form) > 1:
        raise UserError(
            f"--image is the image of one server, but {model} has {', '.join(services.by_form)}: "
            "choose one with --format"
        )
    for service in services.by_form.values():
        adapt(service, storage=storage, image=image, account=service_account)
    if dry_run:
        for service in services.by_form.values():
            service["metadata"]["namespace"] = namespace
        documents = services.by_form.values()
        typer.echo(yaml.safe_dump_all(documents, sort_keys=False, width=100), nl=False)
        for note in services.notes:
            typer.echo(f"# {note}")
        return
    if len(services.by_form) > 1:
        raise UserError(
            f"{model} can be served as {', '.join(services.by_form)}: choose one with --format, or "
            "print them with --dry-run"
        )
    for service in services.by_form.values():
        check_storage(service)
    for line in apply(services, namespace=namespace, context=context):
        say(line)
