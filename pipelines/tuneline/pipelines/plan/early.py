"""The checks of what a recipe names: model, data, target, webhooks, trackers and packages.

They take a second or two, load no model and no torch, and find in advance what the steps would find
after minutes or hours. `plan`, `run` and `submit` make them.
"""

import contextlib
import glob
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tuneline.errors import CredentialsError, HubError, StorageError, UserError
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.plan.check import Check, Verdict
from tuneline.publish.target import Target, short_name
from tuneline.recipe import Recipe
from tuneline.runtime.retries import SECONDS_VARIABLE
from tuneline.runtime.source_names import claim_problem, is_claim, is_hub_id, path_on_claim
from tuneline.steps import STEPS

_PACKAGES: dict[str, tuple[str, ...]] = {
    "train": (
        *("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"),
        *("safetensors", "huggingface_hub"),
    ),
    "gguf": ("llama_cpp", "gguf"),
    "gptq": ("gptqmodel", "compressed_tensors"),
    "evaluate": ("lm_eval",),
}
"""Modules that the steps import, by the extra of pyproject.toml that installs them."""

HELDOUT_CHOICE = "heldout_choice"


def check_early(recipe: Recipe, *, is_local: bool, has_packages: bool = False) -> list[Check]:
    """Check what a recipe names.

    Args:
        recipe: the recipe.
        is_local: whether the run is on this machine. Otherwise, what is missing here may be there:
            that is a warning.
        has_packages: whether the steps have their packages anyway, e.g. in containers.
    """
    checks: list[Check] = []
    with no_retries():
        for name, look, sources in (
            ("model", _model, [recipe.base_model]),
            ("data", _data, recipe.data_sources),
        ):
            elsewhere = [] if is_local else _elsewhere(sources)
            if elsewhere:
                words = f"{', '.join(elsewhere)} is not on this machine, so it is not checked here"
                checks.append(Check(name, "unknown", words))
            else:
                checks += _look(name, look, recipe, is_local)
        if is_local:
            for target in recipe.targets:
                checks += _look("target", partial(_target, target=target), recipe, is_local)
    checks += _webhooks(recipe, is_local)
    if is_local and not has_packages:
        checks += _packages(recipe)
        checks += _look("trackers", _trackers, recipe, is_local)
    return checks


def _look(
    name: str, look: Callable[[Recipe], Iterator[Check]], recipe: Recipe, is_local: bool
) -> Iterator[Check]:
    """Yield the checks of a function, and the error that ends it as a check."""
    try:
        yield from look(recipe)
    except (HubError, StorageError) as error:
        yield Check(name, "unknown", str(error))
    except UserError as error:
        # The pods of a cluster may have another token than this machine.
        depends_on_token = isinstance(error, CredentialsError) or _uses_hub(recipe, name)
        verdict: Verdict = "warn" if depends_on_token and not is_local else "fail"
        yield Check(name, verdict, str(error))
    except ModuleNotFoundError as error:
        words = f"not checked, because the package {error.name} is not installed here"
        yield Check(name, "unknown", words)


def _uses_hub(recipe: Recipe, name: str) -> bool:
    sources = [recipe.base_model] if name == "model" else recipe.data_sources
    return any(is_hub_id(source) and not Path(source).exists() for source in sources)


def _elsewhere(sources: list[str]) -> list[str]:
    """Return the sources that only the pods of a cluster have: on claims, and in images."""
    return [
        source
        for source in sources
        if is_claim(source)
        or (source.startswith("/") and not glob.has_magic(source) and not Path(source).exists())
    ]


def _model(recipe: Recipe) -> Iterator[Check]:
    from tuneline.fetch import early

    yield Check("model", "ok", early.check(recipe.fetch, source=recipe.base_model))


def _data(recipe: Recipe) -> Iterator[Check]:
    from tuneline.prepare import first_rows

    heldout = recipe.prepare.heldout
    for found in first_rows.check(recipe.prepare, data=recipe.data):
        yield Check("data", "ok", found.words)
        holds_questions = found.is_heldout or heldout.source is None
        if (
            HELDOUT_CHOICE in recipe.evaluate.tasks
            and holds_questions
            and found.has_choices is False
        ):
            words = f"evaluate.tasks has {HELDOUT_CHOICE}, but {found.source} has no column choices"
            advice = (
                "set evaluate.tasks to [heldout_perplexity] or [heldout_exact], and "
                "gate.target_tasks likewise, or add a column with wrong answers"
            )
            yield Check("tasks", "fail", words, advice)
            return


def _target(recipe: Recipe, target: Target) -> Iterator[Check]:
    match target.kind:
        case "directory":
            yield _directory(Path(target.path))
        case "claim":
            if problem := claim_problem(target.text):
                yield Check("target", "fail", f"publish_to: {problem}")
            else:
                yield _directory(Path(path_on_claim(target.text)))
        case "store":
            from tuneline.publish.targets.in_store import InStore

            InStore(target.text, recipe.publish).check_access()
            words = (
                f"{target.text} can be listed; writing to it is not tried before the model is made"
            )
            yield Check("target", "ok", words)
        case "registry":
            from tuneline.publish.targets.in_registry import InRegistry

            name = short_name(recipe.targets, recipe.name)
            InRegistry(target.text, recipe.publish).check_access(name)
            yield Check("target", "ok", f"{target.text}/{name} can be written")
        case "mlflow":
            from tuneline.publish.targets.on_mlflow import OnMlflow

            OnMlflow(target.text, recipe.publish).check_access()
            words = (
                f"models can be looked up for {target.text}; writing is not tried before the model "
                "is made"
            )
            yield Check("target", "ok", words)
        case "model-registry":
            from tuneline.publish.targets.on_model_registry import OnModelRegistry

            OnModelRegistry(target.text, recipe.publish).check_access()
            words = f"models can be looked up for {target.text}; registering is not tried"
            yield Check("target", "ok", words)
        case "hub":
            from tuneline.publish.account import check_account, read_token

            name = check_account(read_token(target.text), target.text)
            yield Check("target", "ok", f"{name} may write to {target.text}")


def _directory(path: Path) -> Check:
    there = next(each for each in (path, *path.parents) if each.exists())
    advice = "name another directory in publish_to"
    if not there.is_dir():
        return Check("target", "fail", f"publish_to is {path}, but {there} is a file", advice)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check("target", "fail", f"publish_to is {path}, but {there} is read-only", advice)
    return Check("target", "ok", f"{path} can be written")


def _packages(recipe: Recipe) -> Iterator[Check]:
    extras = ["train", "evaluate"]
    kinds = [kind for kind in EXPORT_KINDS if getattr(recipe.quantize, kind)]
    extras += dict.fromkeys(STEPS[f"quantize-{kind}"].image for kind in kinds)
    for extra in extras:
        missing = [name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None]
        if missing:
            words = f"the modules {', '.join(missing)} are not installed here"
            advice = f"run `make install`, or `pip install 'tuneline[{extra}]'`"
            yield Check("packages", "fail", words, advice)


def _trackers(recipe: Recipe) -> Iterator[Check]:
    from tuneline.train.trainer.trackers import trackers

    names = trackers(recipe.train)
    if names:
        yield Check("trackers", "ok", ", ".join(names))


def _webhooks(recipe: Recipe, is_local: bool) -> Iterator[Check]:
    given = {name for keys in recipe.placement.secrets.values() for name in keys.values()}
    given |= set(recipe.placement.environment)
    for variable in dict.fromkeys(each.webhook for each in recipe.notify):
        words = f"notify names the environment variable {variable}, which "
        if is_local and not os.environ.get(variable):
            advice = f"export {variable}='https://...', or remove the entry from notify"
            yield Check("notify", "fail", f"{words}is not set here", advice)
        elif not is_local and variable not in given:
            advice = f"add {{my-webhook: {{url: {variable}}}}} to placement.secrets"
            yield Check("notify", "warn", f"{words}no secret of placement.secrets sets", advice)
        else:
            where = "set" if is_local else "set by placement"
            yield Check("notify", "ok", f"{variable} is {where}")


@contextlib.contextmanager
def no_retries() -> Iterator[None]:
    """Make one attempt per request in the body, because the steps are the ones to wait."""
    before = os.environ.get(SECONDS_VARIABLE)
    os.environ[SECONDS_VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SECONDS_VARIABLE]
        else:
            os.environ[SECONDS_VARIABLE] = before
