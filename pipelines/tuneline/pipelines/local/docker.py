"""Requests to the container engine that KFP's Docker runner does not make itself."""

import contextlib

from tuneline.errors import ToolError, UserError
from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe

RUN_LABEL = "tuneline.run"
"""Label of every container of a run; its value is the run's directory."""
STOP_SECONDS = 60
"""Seconds between SIGTERM and SIGKILL, in which training writes a checkpoint."""


def check_images(recipe: Recipe) -> None:
    """Check that the container engine answers and has the images of a recipe's steps.

    KFP would pull a missing image from the engine's default registry, where a stranger may have
    published an image of the same name.

    Raises:
        ToolError: no container engine answers.
        UserError: an image is missing.
    """
    import docker
    from docker import errors

    try:
        client = docker.from_env()
        present = {tag for image in client.images.list() for tag in image.tags}
        client.close()
    except (errors.DockerException, OSError) as error:
        raise ToolError(
            f"no container engine answers ({' '.join(str(error).split())[:200]}): start Docker, or "
            "set DOCKER_HOST to the socket of another engine"
        ) from None
    absent = sorted(_images_of(recipe) - present)
    if absent:
        raise UserError(
            f"the engine has no {', '.join(absent)}: build them with `make images` (TORCH=cpu "
            "without a GPU)"
        )


def stop_containers(run_dir: str) -> None:
    """Stop the containers of a run; they do not end with the process that waits for them."""
    import docker
    from docker import errors

    client = docker.from_env(timeout=STOP_SECONDS + 30)
    running = client.containers.list(filters={"label": f"{RUN_LABEL}={run_dir}"})
    # A container that ended in the meantime is not an error.
    for container in running:
        with contextlib.suppress(errors.APIError):
            # Signal every process: the first one is KFP's shell, which forwards no signal.
            container.exec_run(["sh", "-c", "kill -TERM -1"])
    for container in running:
        with contextlib.suppress(errors.APIError):
            container.stop(timeout=STOP_SECONDS)


def _images_of(recipe: Recipe) -> set[str]:
    spec = finetune(recipe, on_cluster=False).pipeline_spec
    executors = spec.deployment_spec["executors"].values()
    return {executor["container"]["image"] for executor in executors if "container" in executor}
