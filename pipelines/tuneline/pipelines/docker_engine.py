"""Look at the container engine before a run asks it for anything."""

from tuneline.errors import ToolError, UserError
from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe


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


def _images_of(recipe: Recipe) -> set[str]:
    spec = finetune(recipe, on_cluster=False).pipeline_spec
    executors = spec.deployment_spec["executors"].values()
    return {executor["container"]["image"] for executor in executors if "container" in executor}
