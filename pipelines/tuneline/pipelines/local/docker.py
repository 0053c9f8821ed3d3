"""What a run in containers needs of their engine beside what KFP asks of it."""

import contextlib

from tuneline.errors import ToolError, UserError
from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe

RUN_LABEL = "tuneline.run"
"""Of every container of a run: its directory."""
STOP_SECONDS = 60
"""For a step to end by itself: training writes a checkpoint."""


def check_images(recipe: Recipe) -> None:
    """Look whether the engine answers and has the images of a recipe's steps.

    KFP would pull what is absent, from whoever has that name in the engine's default registry.

    Raises:
        ToolError: no engine answers.
        UserError: an image is not there.
    """
    import docker

    try:
        client = docker.from_env()
        present = {tag for found in client.images.list() for tag in found.tags}
        client.close()
    except (docker.errors.DockerException, OSError) as error:
        raise ToolError(
            f"no container engine answers ({' '.join(str(error).split())[:200]}): start Docker, or "
            "name another one's socket in DOCKER_HOST"
        ) from None
    absent = sorted(_images_of(recipe) - present)
    if absent:
        raise UserError(
            f"the engine has no {', '.join(absent)}: build them with `make images` (TORCH=cpu "
            "without a GPU)"
        )


def stop_containers(run_dir: str) -> None:
    """End the containers of a run, which do not end with the process that waits for them."""
    import docker

    client = docker.from_env(timeout=STOP_SECONDS + 30)
    running = client.containers.list(filters={"label": f"{RUN_LABEL}={run_dir}"})
    # What is gone meanwhile is no error.
    for container in running:
        with contextlib.suppress(docker.errors.APIError):
            # To the step itself: the first process is KFP's shell, which passes no signal on.
            container.exec_run(["sh", "-c", "kill -TERM -1"])
    for container in running:
        with contextlib.suppress(docker.errors.APIError):
            container.stop(timeout=STOP_SECONDS)


def _images_of(recipe: Recipe) -> set[str]:
    spec = finetune(recipe, on_cluster=False).pipeline_spec
    executors = spec.deployment_spec["executors"].values()
    return {executor["container"]["image"] for executor in executors if "container" in executor}
