"""A client of OCI registries: oras, which states what a registry answers and streams large files.

oras reads a file into memory before it sends it, repeats every fault six times over four minutes,
and replaces a refusal by a ValueError without the status. So the two methods through which all of
its requests go are written anew; paths, pages of tags, tokens and Docker's config are oras's own.
"""

import os
import urllib.parse
from pathlib import Path
from typing import IO, Any

import requests
from oras.container import Container
from oras.provider import Registry
from oras.utils import append_url_params

PLAIN_HTTP_VARIABLE = "TUNELINE_PLAIN_HTTP_REGISTRIES"
"""Environment variable with the registries, separated by commas, that have no TLS."""
USER_VARIABLE, PASSWORD_VARIABLE = "ORAS_USER", "ORAS_PASS"
"""Environment variables with the credentials, which oras reads too."""
CONFIG_VARIABLE = "DOCKER_CONFIG"
"""Environment variable with the directory of Docker's config.json."""
_TIMEOUT_SECONDS = (30, 300)
_LOCAL = ("localhost", "127.0.0.1")


class Client(Registry):  # type: ignore[misc]
    """One registry, with its credentials."""

    def __init__(self, host: str) -> None:
        """Read the credentials; nothing is requested yet.

        Args:
            host: host of the registry, with its port if it has one.
        """
        plain = os.environ.get(PLAIN_HTTP_VARIABLE, "").replace(" ", "").split(",")
        super().__init__(host, insecure=host in plain or host.partition(":")[0] in _LOCAL)
        user, password = (os.environ.get(each) for each in (USER_VARIABLE, PASSWORD_VARIABLE))
        if user and password:
            self.auth.set_basic_auth(user, password)
        else:
            directory = os.environ.get(CONFIG_VARIABLE)
            config = Path(directory or "") / "config.json"
            given = [str(config)] if directory and config.is_file() else []
            self.auth.load_configs(Container(f"{host}/any"), configs=given)

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: bytes | IO[bytes] | None = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        """Send one request, and send it again with credentials if the registry asks for them.

        Args:
            url: address.
            method: method of HTTP.
            data: body; a file is streamed.
            headers: headers.
            json: body, as JSON.
            stream: whether the body of the answer is left to be read.

        Raises:
            requests.HTTPError: the registry refused the request. 404 to HEAD is an answer.
        """
        headers = dict(headers or {})
        # An upload may go to another host, which has its own signature in the address.
        is_own = urllib.parse.urlsplit(url).netloc == self.hostname
        if is_own:
            headers |= self._known_credentials()

        def send() -> requests.Response:
            if data is not None and not isinstance(data, bytes):
                data.seek(0)
            return self.session.request(
                method,
                url,
                data=data,
                json=json,
                headers=headers,
                stream=stream,
                timeout=_TIMEOUT_SECONDS,
            )

        response = send()
        if response.status_code == 401 and is_own:
            response.close()
            if answer := self._answer_challenge(response):
                headers |= answer
                response = send()
        if response.status_code >= 400 and (method, response.status_code) != ("HEAD", 404):
            raise requests.HTTPError(_words(response), response=response)
        return response

    def put_upload(self, blob: str, container: Container, layer: dict[str, Any]) -> Any:
        """Send a file as a blob, without reading it into memory; see `Registry.put_upload`."""
        session = self.begin_upload(container)
        address = append_url_params(session, {"digest": layer["digest"]})
        headers = {"Content-Type": "application/octet-stream"}
        with open(blob, "rb") as file:
            # requests sends an empty file in chunks, which registries refuse.
            return self.do_request(address, "PUT", file if layer["size"] else b"", headers)

    def begin_upload(self, container: Container) -> str:
        """Begin the upload of a blob, which shows that these credentials may write.

        Returns:
            The address to which the blob is sent.
        """
        response = self.do_request(f"{self.prefix}://{container.upload_blob_url()}", "POST")
        address = self._get_location(response, container)
        if not address:
            raise requests.HTTPError("the answer names no address to send to", response=response)
        return str(address)

    def _known_credentials(self) -> dict[str, str]:
        token = getattr(self.auth, "token", None)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _answer_challenge(self, response: requests.Response) -> dict[str, str]:
        """Return the header with the credentials for which a registry asks; empty without them."""
        challenge = response.headers.get("Www-Authenticate", "")
        kind = challenge.partition(" ")[0].lower()
        basic = getattr(self.auth, "_basic_auth", None)
        if kind == "basic" and basic:
            return {"Authorization": f"Basic {basic}"}
        if kind == "bearer" and "realm=" in challenge:
            # A token is for one repository and for reading or writing: an older one is dropped.
            headers, changed = self.auth.authenticate_request(response, {}, refresh=True)
            return dict(headers) if changed else {}
        return {}


def _words(response: requests.Response) -> str:
    """Return what a registry says about a refusal: its status and the messages of its errors."""
    try:
        errors = response.json()["errors"]
        said = "; ".join(f"{each.get('code', '')} {each.get('message', '')}" for each in errors)
    except (ValueError, TypeError, KeyError, AttributeError):
        said = response.reason or ""
    return f"{response.status_code} {' '.join(said.split())[:200]}".strip()
