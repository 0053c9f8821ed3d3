"""What a registry answers, asked by HTTP."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tuneline.pipelines.plan.registry import Unknown, has_image


class Registry(BaseHTTPRequestHandler):
    """One image, public for who has fetched the token that anybody gets; one that is private."""

    def do_HEAD(self) -> None:
        name = self.path.removeprefix("/v2/")
        token = self.headers.get("Authorization")
        if "oci.image.manifest" not in self.headers.get("Accept", ""):
            code = 400
        elif name.startswith("team/private/") or token != "Bearer for team/train pull":
            code = 401
        else:
            code = 200 if name == "team/train/manifests/0.1.0" else 404
        self.send_response(code)
        if code == 401 and "private" not in name:
            host = self.headers["Host"]
            scope = f'service="here",scope="repository:{name}:pull"'
            self.send_header("WWW-Authenticate", f'Bearer realm="http://{host}/token",{scope}')
        self.end_headers()

    def do_GET(self) -> None:
        assert self.path.startswith("/token?service=here&scope=repository")
        body = b'{"token": "for team/train pull"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_registry_says_whether_it_has_an_image(host: str) -> None:
    assert has_image(f"{host}/team/train:0.1.0")
    assert not has_image(f"{host}/team/train:0.2.0")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("{}/team/private:1", "asks for credentials, which the cluster may have"),
    ],
)
def test_answers_that_say_nothing(host: str, image: str, says: str) -> None:
    with pytest.raises(Unknown, match=says):
        has_image(image.format(host))


def test_a_registry_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Unknown, match=f"{host} cannot be reached from here"):
        has_image(f"{host}/team/train:1")
