"""Ask a registry without credentials whether it has an image (OCI distribution API)."""

import json
import re
import urllib.parse

import urllib3

from tuneline.runtime.http_pool import http_pool

TIMEOUT_SECONDS = 5.0
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


class Unknown(Exception):
    """Nothing can be said about the image; the message is the reason.

    A node of the cluster may still be able to pull the image.
    """


def has_image(image: str) -> bool:
    """Return whether the registry in an image's name has the image.

    Raises:
        Unknown: the registry is unreachable or wants credentials.
    """
    host, _, path = image.partition("/")
    name, _, tag = path.rpartition(":")
    # Container engines also use no TLS for a registry on the same machine.
    scheme = "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"
    address = f"{scheme}://{host}/v2/{name}/manifests/{tag}"
    headers = {"Accept": ", ".join(MANIFESTS)}
    http = http_pool(address, timeout=TIMEOUT_SECONDS, retries=urllib3.Retry(3, connect=0))
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
        raise Unknown(f"{host} asks for credentials, which the cluster may have")
    raise Unknown(f"{host} answered {answer.status}")


def _anonymous_token(http: urllib3.PoolManager, challenge: str) -> str | None:
    """Return the token that the registry gives to anonymous clients, or None."""
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
        body: dict[str, str] = json.loads(answer.data)
    except ValueError:
        return None
    return body.get("token") or body.get("access_token")
