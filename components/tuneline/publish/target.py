"""The targets of publish: the forms that they have in a recipe.

`publish_to` of a recipe is one target or a list; `runtime/parameter_text.py` writes it as one text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tuneline.errors import RecipeError
from tuneline.runtime.parameter_text import decode_list
from tuneline.runtime.source_names import claim_name

DIRECTORY_PREFIX = "dir:"
CLAIM_PREFIX = "claim:"
OCI_PREFIX = "oci://"
MLFLOW_PREFIX = "mlflow:"
MODEL_REGISTRY_PREFIX = "model-registry:"
OCI_REPOSITORY = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
"""A part of a repository's path in an OCI registry, as OCI's distribution specification has it."""
STORE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az")
"""Schemes of the stores that can be written to."""
MAX_NAME_LENGTH = 81
"""Maximum length of a model's name. The Hub allows 96 characters, and the names of exports have a
suffix such as -gptq-4bit or -fp8."""

Kind = Literal["hub", "directory", "claim", "store", "registry", "mlflow", "model-registry"]
FORMS = (
    "namespace/name for the Hub, dir:PATH, claim:NAME/PATH, s3://BUCKET/PATH (gs://, abfs://), "
    "oci://HOST/PATH, mlflow:NAME or model-registry:NAME"
)

_ADDRESSED: tuple[Kind, ...] = ("hub", "store", "registry", "claim")
"""Kinds of targets whose addresses others can read."""
_ORDER: dict[Kind, int] = {"hub": -1, "model-registry": 1}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_TARGET = re.compile(rf"{_PART}/(?P<name>{_PART})")
_OCI_PATH = re.compile(rf"[A-Za-z0-9.-]+(?::\d+)?(?:/{OCI_REPOSITORY})+")
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z0-9]+)://")


@dataclass(frozen=True)
class Target:
    """One place to which a run publishes."""

    kind: Kind
    text: str
    """The target as a recipe names it, without slashes at its end."""

    @property
    def path(self) -> str:
        """Return the path of a directory target."""
        return self.text.removeprefix(DIRECTORY_PREFIX)


def check_target(target: str) -> str:
    """Check the form of one target when the recipe is read, hours before it is used.

    Returns:
        The target without slashes at its end.

    Raises:
        RecipeError: the target has none of the forms of FORMS.
    """
    return _parse_one(target).text


def check_targets(given: str | Sequence[str]) -> str | list[str]:
    """Check `publish_to`; return it without slashes at the ends of targets.

    Raises:
        RecipeError: a target has no known form, the list is empty, a target is in it twice,
            several of them are on the Hub, or a registry of addresses has none to register.
    """
    if isinstance(given, str):
        target = _parse_one(given)
        _check_addresses([target])
        return target.text
    targets = [_parse_one(each) for each in given]
    names = [target.text for target in targets]
    if not names:
        raise RecipeError(f"publish_to is an empty list. Name at least one target: {FORMS}")
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"publish_to names {name} {names.count(name)} times. Name it once")
    on_hub = [target.text for target in targets if target.kind == "hub"]
    if len(on_hub) > 1:
        raise RecipeError(
            f"publish_to names {len(on_hub)} repositories on the Hub ({', '.join(on_hub)}), but "
            "the model cards can name one. Keep one of them"
        )
    _check_addresses(targets)
    return names


def _check_addresses(targets: Sequence[Target]) -> None:
    """Check that a target which holds addresses has one to hold.

    Raises:
        RecipeError: no other target has an address that others can read.
    """
    registries = [target.text for target in targets if target.kind == "model-registry"]
    if registries and not any(target.kind in _ADDRESSED for target in targets):
        raise RecipeError(
            f"publish_to names {registries[0]}, which registers the address of a model and holds "
            "no files. Name a target with an address too: the Hub, s3://BUCKET/PATH (gs://, "
            "abfs://), oci://HOST/PATH or claim:NAME/PATH"
        )


def parse_targets(text: str) -> list[Target]:
    """Return the targets of a text that is a target or that `encode_list` wrote.

    The Hub is first, because it names the model; registries of addresses are last.

    Raises:
        RecipeError: see `check_targets`.
    """
    checked = check_targets(decode_list(text))
    targets = [_parse_one(each) for each in ([checked] if isinstance(checked, str) else checked)]
    return sorted(targets, key=lambda target: _ORDER.get(target.kind, 0))


def short_name(targets: Sequence[Target], recipe_name: str) -> str:
    """Return the name of the merged model without a namespace: the Hub's, or else the recipe's."""
    return family_name(targets, recipe_name).rpartition("/")[2]


def family_name(targets: Sequence[Target], recipe_name: str) -> str:
    """Return the name of the merged model's repository, which is the same at every target.

    Args:
        targets: all targets of the run.
        recipe_name: name of the recipe, which is taken if no target is on the Hub.
    """
    return next((target.text for target in targets if target.kind == "hub"), recipe_name)


def _parse_one(target: str) -> Target:
    if target.startswith(DIRECTORY_PREFIX):
        return Target("directory", _directory(target))
    given, target = target, target.strip().rstrip("/")
    if target.startswith(CLAIM_PREFIX):
        return Target("claim", _claim(given, target))
    if target.startswith(MLFLOW_PREFIX):
        return Target("mlflow", _registered(given, target, MLFLOW_PREFIX))
    if target.startswith(MODEL_REGISTRY_PREFIX):
        return Target("model-registry", _registered(given, target, MODEL_REGISTRY_PREFIX))
    if found := _ADDRESS.match(given.strip()):
        scheme, path = found["scheme"].lower(), given.strip()[found.end() :].rstrip("/")
        if f"{scheme}://" == OCI_PREFIX:
            return Target("registry", _registry(given, path))
        return Target("store", _store(given, scheme, path))
    match = _HUB_TARGET.fullmatch(target)
    forbidden = re.search(r"--|\.\.|\.git$", target)
    if not match or forbidden or len(match["name"]) > MAX_NAME_LENGTH:
        raise RecipeError(
            f"publish_to is '{given}': write {FORMS}. A Hub name has "
            "ASCII letters, digits, '-', '_' and '.'; it starts with a letter or digit, does "
            "not end with '-', '.' or '.git', has no '--' and no '..', and the model's name has at "
            f"most {MAX_NAME_LENGTH} characters"
        )
    return Target("hub", target)


def _directory(target: str) -> str:
    path = target.removeprefix(DIRECTORY_PREFIX)
    path = path.rstrip("/") or path[:1]
    if not path or path.startswith("~"):
        raise RecipeError(
            f"publish_to is '{target}'. Write dir:PATH with a full path: the home directory of "
            "a step may differ from yours"
        )
    return f"{DIRECTORY_PREFIX}{path}"


def _claim(given: str, target: str) -> str:
    if claim_name(target) is None or ".." in target.split("/"):
        raise RecipeError(
            f"publish_to is '{given}': write claim:NAME/PATH, with the name of a "
            "PersistentVolumeClaim and a path on it, e.g. claim:models/team"
        )
    return target


def _registered(given: str, target: str, prefix: str) -> str:
    name = target.removeprefix(prefix)
    if not re.fullmatch(_PART, name) or len(name) > MAX_NAME_LENGTH:
        raise RecipeError(
            f"publish_to is '{given}': write {prefix}NAME, e.g. {prefix}support. NAME has ASCII "
            "letters, digits, '-', '_' and '.', starts with a letter or digit, and has at most "
            f"{MAX_NAME_LENGTH} characters"
        )
    return target


def _store(given: str, scheme: str, path: str) -> str:
    if scheme not in STORE_SCHEMES:
        known = ", ".join(f"{each}://" for each in STORE_SCHEMES)
        raise RecipeError(
            f"publish_to is '{given}': {scheme}:// cannot be written to. Write {FORMS}; the stores "
            f"are {known}"
        )
    if not path or re.search(r"[\[\]?#*\s]|//|(^|/)\.\.?(/|$)", path):
        raise RecipeError(
            f"publish_to is '{given}': write {scheme}://BUCKET/PATH, without wildcards and "
            "spaces, and with no part that is empty, '.' or '..'"
        )
    return f"{scheme}://{path}"


def _registry(given: str, path: str) -> str:
    if "@" in path:
        raise RecipeError(
            f"publish_to is '{given}': in publish_to, oci:// is a registry of OCI artifacts, and "
            "Oracle's object storage cannot be written to. Write oci://HOST/PATH, or another target"
        )
    if not _OCI_PATH.fullmatch(path):
        raise RecipeError(
            f"publish_to is '{given}': write oci://HOST/PATH without a tag, e.g. "
            "oci://registry.example.com/team. Parts of PATH have small letters, digits, and '.', "
            "'_' or dashes between them"
        )
    return f"{OCI_PREFIX}{path}"
