"""Ask a registry whether it has an image, without credentials (OCI distribution)."""

import json
import re
import urllib.parse

import urllib3

SECONDS = 5.0
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


class Unknown(Exception):
    """Why the registry's answer says nothing about what a node can pull."""


def has_image(image: str) -> bool:
    """Say whether the registry in an image's name has it.

    Raises:
        Unknown: the name has no registry, or it cannot be reached from here, or wants credentials.
    """
    host, _, path = image.partition("/")
    if not path or not (":" in host or "." in host or host == "localhost"):
        raise Unknown("their names have no registry")
    name, _, tag = path.rpartition(":")
    # As container engines do: no TLS on this machine.
    scheme = "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"
    address = f"{scheme}://{host}/v2/{name}/manifests/{tag}"
    headers = {"Accept": ", ".join(MANIFESTS)}
    http = urllib3.PoolManager(timeout=SECONDS, retries=urllib3.Retry(3, connect=0))
    try:
        answer = http.request("HEAD", address, headers=headers)
        if answer.status == 401:
            token = _anonymous_token(http, answer.headers.get("WWW-Authenticate", ""))
            if token:
                headers["Authorization"] = f"Bearer {token}"
                answer = http.request("HEAD", address, headers=headers)
    except urllib3.exceptions.HTTPError as error:
        raise Unknown(f"{host} cannot be reached from here ({type(error).__name__})") from None
    if answer.status in (200, 404):
        return answer.status == 200
    if answer.status in (401, 403):
        raise Unknown(f"{host} wants credentials, which the cluster may have")
    raise Unknown(f"{host} answered {answer.status}")


def _anonymous_token(http: urllib3.PoolManager, challenge: str) -> str | None:
    """Return the token that anybody gets, or None."""
    if not challenge.lower().startswith("bearer "):
        return None
    values = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = values.pop("realm", "")
    if not realm.startswith("http"):
        return None
    answer = http.request("GET", f"{realm}?{urllib.parse.urlencode(values)}")
    if answer.status != 200:
        return None
    try:
        found = json.loads(answer.data)
    except ValueError:
        return None
    return found.get("token") or found.get("access_token")
