"""Every client of the steps accepts a server with a variable of `placement.ca_bundle`, and none
without: real clients, and a TLS server on localhost with an authority of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from authority import Authority, make_authority
from local_http import LocalHandler, serving

from tuneline.placement import CA_VARIABLES
from tuneline.runtime.retries import SECONDS_VARIABLE

CLIENTS = {
    "huggingface_hub": "from huggingface_hub import HfApi; HfApi(endpoint=url).model_info('a/b')",
    "hf_xet": """
import hf_xet
file = hf_xet.PyXetDownloadInfo(destination_path="/dev/null", hash="0" * 64, file_size=9)
hf_xet.download_files([file], endpoint=url, token_info=("t", 9999999999), token_refresher=None,
                      progress_updater=None)
""",
    "datasets": """
import os
os.environ["HF_ENDPOINT"] = url
import datasets
datasets.load_dataset("a/b")
""",
    "urllib3 in notify": """
import os
from tuneline.notify.config import NotifyConfig
from tuneline.notify import send
os.environ["HOOK"] = url
send._request("POST", url, json={})
""",
    "urllib3 in plan": """
import os
os.environ["HF_ENDPOINT"] = url
from tuneline.pipelines.plan.model_files import read_model
read_model("a/b")
""",
    "s3fs": """
import fsspec
settings = {"key": "k", "secret": "s", "endpoint_url": url}
fsspec.filesystem("s3", **settings, config_kwargs={"retries": {"max_attempts": 1}}).info("s3://b/k")
""",
    # For the JSON API of Google's store; its gRPC API is tested below.
    "gcsfs": """
import os
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
import fsspec
from tuneline.runtime.source_names import store_options
settings = {"token": "anon", "endpoint_url": url, "project": "p", **store_options("gs://bucket")}
fsspec.filesystem("gs", **settings).info("gs://bucket/key")
""",
    # The library of adlfs, which sets no number of retries.
    "azure": """
import asyncio
from azure.storage.blob.aio import BlobServiceClient
text = f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey=a2V5;BlobEndpoint={url}/a;"
async def ask():
    async with BlobServiceClient.from_connection_string(text, retry_total=0) as client:
        await client.get_blob_client("container", "key").get_blob_properties()
asyncio.run(ask())
""",
    "aiohttp for https://": """
from tuneline.prepare.sources.stored import _file_system
fs, path = _file_system(f"{url}/rows.jsonl")
fs.info(path)
""",
    "oras": """
from tuneline.publish.targets.registry_client import Client
client = Client(url.removeprefix("https://"))
client.do_request(f"{url}/v2/")
""",
    "mlflow": """
from mlflow import MlflowClient
MlflowClient(tracking_uri=url).get_experiment_by_name("e")
""",
    "model-registry": """
import asyncio, os
os.environ["MODEL_REGISTRY_URL"] = url
from tuneline.publish.config import PublishConfig
from tuneline.publish.targets.on_model_registry import OnModelRegistry
OnModelRegistry("model-registry:x", PublishConfig(max_attempts=1)).check_access()
""",
}
"""A program per client that sends a request to `url`."""
VARIABLES = {
    "s3fs": "AWS_CA_BUNDLE",
    **dict.fromkeys(("oras", "mlflow"), "REQUESTS_CA_BUNDLE"),
}
"""The variable that a client reads; SSL_CERT_FILE if there is none here."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server(authority: Authority) -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []

    class Handler(LocalHandler):
        def handle_any(self) -> None:
            requests.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(404)
            self.send_header("Content-Length", "2")
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{}")
            self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    with serving(Handler, tls=authority.context) as host:
        yield f"https://localhost:{host.rpartition(':')[2]}", requests


def said(program: str, url: str, home: Path, variables: dict[str, str]) -> str:
    """Run a client's program; return what it wrote, with its error."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in CA_VARIABLES and not name.lower().endswith("_proxy")
    }
    own = {
        **{"HOME": str(home), "HF_HOME": str(home), SECONDS_VARIABLE: "0"},
        **{"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0"},
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nurl = sys.argv[1]\n{program}", url],
        env={**kept, **own, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


# gcsfs tries six times, with pauses, before it says that the certificate is not accepted.
@pytest.mark.parametrize(
    "client",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gcsfs")) for name in CLIENTS],
)
def test_a_client_accepts_the_server_only_with_the_bundle(
    client: str, server: tuple[str, list[str]], authority: Authority, tmp_path: Path
) -> None:
    url, requests = server
    variable = VARIABLES.get(client, "SSL_CERT_FILE")
    assert variable in CA_VARIABLES
    refused = said(CLIENTS[client], url, tmp_path, {})
    assert not requests, refused
    accepted = said(CLIENTS[client], url, tmp_path, {variable: str(authority.bundle)})
    assert requests, accepted
    assert "CERTIFICATE_VERIFY_FAILED" not in accepted
    page = (Path(__file__).parents[2] / "docs" / "air-gapped.md").read_text(encoding="utf-8")
    name = client.split()[0]
    (row,) = [line for line in page.splitlines() if re.match(rf"\| [^|]*\b{name}\b", line)]
    assert f"`{variable}`" in row


def test_grpc_reads_a_variable_of_its_own(authority: Authority, tmp_path: Path) -> None:
    """gcsfs asks the gRPC API of Google's store what kind of bucket it reads."""
    server = grpc.server(ThreadPoolExecutor(1))
    chain = (authority.bundle.parent / "server.pem").read_bytes()
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(chain, chain)]))
    server.start()
    program = """
import grpc
channel = grpc.secure_channel(url.removeprefix("https://"), grpc.ssl_channel_credentials())
grpc.channel_ready_future(channel).result(timeout=3)
print("ready")
"""
    try:
        for file, ready in ((None, False), (authority.bundle, True)):
            variables = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(file)} if file else {}
            text = said(program, f"https://localhost:{port}", tmp_path, variables)
            assert ("ready\n" in text) == ready, text
            assert ("CERTIFICATE_VERIFY_FAILED" in text) != ready
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    "client",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gcsfs")) for name in CLIENTS],
)
def test_a_client_asks_the_proxy(client: str, tmp_path: Path) -> None:
    """With the variables that `placement.environment` sets."""
    asked: list[str] = []

    class Proxy(LocalHandler):
        def do_CONNECT(self) -> None:  # noqa: N802
            asked.append(self.path)
            self.send_error(403)
            self.close_connection = True

    with serving(Proxy) as host:
        variables = {"HTTPS_PROXY": f"http://{host}", "NO_PROXY": ".svc,.kubeflow"}
        text = said(CLIENTS[client], "https://server.invalid", tmp_path, variables)
    assert "server.invalid:443" in asked, text[-800:]
