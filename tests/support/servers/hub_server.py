"""A small Hub on localhost for the unmodified huggingface_hub client.

It keeps repositories, blobs and commits in memory and injects faults. Large files arrive through
LFS, whole or in parts, or through xet, with a directory instead of xet's storage. `HubHandler` has
the read-only routes alone, with the files of a directory.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import local_http

TOKEN = "hf_" + "t" * 34


def new_repo(private: bool = True, **files: bytes) -> dict:
    kept = {name: ("regular", content) for name, content in files.items()}
    return {"private": private, "files": kept, "commits": ["0" * 40], "tags": {}, "old": {}}


def add_commit(repo: dict, commit: str, **files: bytes) -> None:
    """Replace files of a repository in a new commit; the commits before it keep theirs."""
    repo["old"][repo["commits"][-1]] = repo["files"]
    repo["files"] = repo["files"] | {name: ("regular", content) for name, content in files.items()}
    repo["commits"].append(commit)


class Hub:
    """State of the server, and its settings."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[tuple[str, int | str, int]] = []
        """(pattern of method and path, status or kind, number of times). "cut" ends the connection
        before the request is handled, "half" in the middle of the request's body, and "lost" after
        the request was handled, before the response."""
        self.retry_after = "0"
        """Header Retry-After of the responses that a fault makes."""
        self.says = "injected"
        """Message of the responses that a fault makes."""
        self.account: dict = {"name": "me", "orgs": [], "auth": {}}
        """What the Hub says of the account of TOKEN."""
        self.requests: list[str] = []
        self.part_bytes: int | None = None
        """Larger files are sent in parts of this size."""
        self.keeps_content = True
        """Whether content is kept. If not, bytes are only counted: for files larger than memory."""
        self.parts: dict[str, dict[int, bytes | int]] = {}
        self.sizes: dict[str, int] = {}
        self.num_received_bytes = 0
        """Bytes received of large files, whole or interrupted."""
        self.xet_dir: Path | None = None
        """Directory in which hf_xet stores its chunks."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def content(self, repo: str, path: str) -> bytes:
        kind, value = self.repos[repo]["files"][path]
        return self.blobs[value] if kind == "lfs" else value

    def sent(self, repo: str) -> int:
        """Return how often large files of the repository were sent."""
        files = self.repos[repo]["files"].values()
        return sum(self.requests.count(f"PUT /blob/{oid}") for kind, oid in files if kind == "lfs")

    def fault(self, line: str) -> int | str | None:
        for index, (pattern, status, times) in enumerate(self.faults):
            if times and re.search(pattern, line):
                self.faults[index] = (pattern, status, times - 1)
                return status
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # One packet per response: two would wait 40 ms for each other.
            wbufsize = -1
            disable_nagle_algorithm = True

            def log_message(self, *arguments: object) -> None:
                pass

            def answer(self, body: object = None, status: int = 200, **headers: str) -> None:
                data = b"" if body is None else json.dumps(body).encode()
                if getattr(self, "lost", False):
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def handle_request(self) -> None:
                path = unquote(urlparse(self.path).path)
                line = f"{self.command} {path}"
                hub.requests.append(line)
                fault = hub.fault(line)
                size = int(self.headers.get("Content-Length") or 0)
                is_large = path.startswith(("/blob/", "/part/"))
                if fault == "half":
                    hub.num_received_bytes += is_large * len(self.rfile.read(size // 2))
                    self.close_connection = True
                    return
                self.body = self.rfile.read(size)
                hub.num_received_bytes += is_large * len(self.body)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    self.body = self.read_chunks()
                self.lost = fault == "lost"
                if fault == "cut":
                    self.close_connection = True
                elif isinstance(fault, int):
                    names = {404: "RepoNotFound"} if "/models/" in path else {}
                    headers = {"X_Error_Code": names[fault]} if fault in names else {}
                    headers["Retry_After"] = hub.retry_after
                    self.answer({"error": hub.says}, fault, **headers)
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and (
                    not path.startswith(("/blob/", "/part/", "/complete/"))
                ):
                    self.answer({"error": "Invalid user token."}, 401)
                else:
                    self.route(line)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_request

            def read_chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def route(self, line: str) -> None:
                for pattern, action in ROUTES:
                    match = re.fullmatch(pattern, line)
                    if match:
                        repo = match.groupdict().get("repo")
                        if repo is not None and repo not in hub.repos:
                            self.answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
                            return
                        action(self, **match.groupdict())
                        return
                self.answer({"error": f"unknown route {line}"}, 404, X_Error_Code="EntryNotFound")

            def whoami(self) -> None:
                self.answer({"type": "user", **hub.account})

            def create(self) -> None:
                wanted = json.loads(self.body)
                owner = wanted.get("organization") or "me"
                repo = f"{owner}/{wanted['name']}"
                url = {"url": f"{hub.url}/{repo}"}
                if repo in hub.repos:
                    self.answer({**url, "error": "exists"}, 409)
                    return
                private = wanted.get("private", wanted.get("visibility") == "private")
                hub.repos[repo] = new_repo(private)
                self.answer(url)

            def delete(self) -> None:
                name = json.loads(self.body)
                repo = f"{name.get('organization') or 'me'}/{name['name']}"
                found = hub.repos.pop(repo, None)
                self.answer({}, 404 if found is None else 200)

            def info(self, repo: str, revision: str | None = None) -> None:
                found = hub.repos[repo]
                self.answer(
                    {
                        "id": repo,
                        "modelId": repo,
                        "private": found["private"],
                        "sha": revision if revision in found["old"] else found["commits"][-1],
                        "siblings": [{"rfilename": name} for name in self.files(repo, revision)],
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                    }
                )

            def files(self, repo: str, revision: str | None) -> dict[str, tuple]:
                """Return the files at a commit; at any other revision, those of the last commit."""
                found = hub.repos[repo]
                files: dict[str, tuple] = found["old"].get(revision, found["files"])
                return files

            def tree(self, repo: str, revision: str) -> None:
                files = self.files(repo, revision.split("/")[0])
                self.answer([entry(name, file) for name, file in files.items()])

            def resolve(self, repo: str, revision: str, name: str) -> None:
                """Answer with a file, or with the part of it that the header Range names."""
                files = self.files(repo, revision)
                if name not in files:
                    self.answer({"error": "no"}, 404, X_Error_Code="EntryNotFound")
                    return
                kind, value = files[name]
                data = hub.blobs[value] if kind == "lfs" else value
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                part, headers = data, {}
                if wanted:
                    first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                    part = data[first : last + 1]
                    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
                self.send_response(206 if wanted else 200)
                headers["Content-Length"] = str(len(part))
                old = revision in hub.repos[repo]["old"]
                headers["X-Repo-Commit"] = revision if old else hub.repos[repo]["commits"][-1]
                headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
                for header, value in headers.items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(part)

            def paths_info(self, repo: str, revision: str) -> None:
                files = self.files(repo, revision)
                wanted = json.loads(self.body)["paths"]
                self.answer([entry(name, files[name]) for name in wanted if name in files])

            def preupload(self, repo: str) -> None:
                files = hub.repos[repo]["files"]
                answers = []
                for file in json.loads(self.body)["files"]:
                    large = file["path"].endswith((".safetensors", ".gguf"))
                    old = files.get(file["path"])
                    answers.append(
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if large else "regular",
                            "shouldIgnore": False,
                            "oid": entry(file["path"], old)["oid"] if old else None,
                        }
                    )
                self.answer({"files": answers})

            def lfs_batch(self, repo: str) -> None:
                objects = []
                for wanted in json.loads(self.body)["objects"]:
                    item = {"oid": wanted["oid"], "size": wanted["size"]}
                    if wanted["oid"] not in hub.blobs:
                        item["actions"] = {"upload": self.upload_of(**item)}
                    objects.append(item)
                self.answer({"transfer": "basic", "objects": objects})

            def upload_of(self, oid: str, size: int) -> dict:
                hub.sizes[oid] = size
                if hub.part_bytes is None or size <= hub.part_bytes:
                    return {"href": f"{hub.url}/blob/{oid}", "header": {}}
                numbers = range(1, -(-size // hub.part_bytes) + 1)
                header = {str(number): f"{hub.url}/part/{oid}/{number}" for number in numbers}
                header["chunk_size"] = str(hub.part_bytes)
                return {"href": f"{hub.url}/complete/{oid}", "header": header}

            def put_part(self, oid: str, number: str) -> None:
                kept = self.body if hub.keeps_content else len(self.body)
                hub.parts.setdefault(oid, {})[int(number)] = kept
                self.answer({}, ETag=f'"{oid[:8]}-{number}"')

            def complete(self, oid: str) -> None:
                named = [part["partNumber"] for part in json.loads(self.body)["parts"]]
                parts = hub.parts[oid]
                whole = named == sorted(parts)
                if hub.keeps_content:
                    content = b"".join(parts[number] for number in sorted(parts))
                    whole = whole and hashlib.sha256(content).hexdigest() == oid
                else:
                    content, whole = b"", whole and sum(parts.values()) == hub.sizes[oid]
                if whole:
                    hub.blobs[oid] = content
                self.answer({}, 200 if whole else 422)

            def xet_token(self, repo: str) -> None:
                if hub.xet_dir is None:
                    self.answer({"error": "no xet here"}, 404)
                    return
                self.answer(
                    {
                        "accessToken": "xet",
                        "exp": int(time.time()) + 3600,
                        "casUrl": f"local://{hub.xet_dir}",
                    }
                )

            def put_blob(self, oid: str) -> None:
                right = hashlib.sha256(self.body).hexdigest() == oid
                if right:
                    hub.blobs[oid] = self.body
                self.answer({}, 200 if right else 422)

            def commit(self, repo: str) -> None:
                found = hub.repos[repo]
                header = json.loads(self.body.decode().splitlines()[0])["value"]
                if header.get("parentCommit", found["commits"][-1]) != found["commits"][-1]:
                    self.answer({"error": "A commit has happened since."}, 412)
                    return
                for text in self.body.decode().splitlines():
                    operation = json.loads(text)
                    value = operation["value"]
                    if operation["key"] == "file":
                        data = base64.b64decode(value["content"])
                        found["files"][value["path"]] = ("regular", data)
                    elif operation["key"] == "lfsFile":
                        if hub.xet_dir is None:
                            assert value["oid"] in hub.blobs, "committed before it was sent"
                        hub.sizes[value["oid"]] = value["size"]
                        found["files"][value["path"]] = ("lfs", value["oid"])
                    elif operation["key"] == "deletedFile":
                        found["files"].pop(value["path"], None)
                oid = hashlib.sha1(repr(found).encode()).hexdigest()
                found["commits"].append(oid)
                url = f"{hub.url}/{repo}/commit/{oid}"
                self.answer({"success": True, "commitOid": oid, "commitUrl": url})

            def refs(self, repo: str) -> None:
                tags = [
                    {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                    for name, commit in hub.repos[repo]["tags"].items()
                ]
                self.answer({"branches": [], "converts": [], "tags": tags})

            def tag(self, repo: str, revision: str) -> None:
                tags, name = hub.repos[repo]["tags"], json.loads(self.body)["tag"]
                if name in tags:
                    self.answer({"error": "exists"}, 409)
                    return
                assert revision in hub.repos[repo]["commits"]
                tags[name] = revision
                self.answer({})

            def validate(self) -> None:
                card = json.loads(self.body)["content"]
                if re.search(r"^license: .*research", card, re.MULTILINE):
                    message = '"license" must be one of [apache-2.0, mit, other]'
                    self.answer({"errors": [{"message": message}], "warnings": []}, 400)
                else:
                    self.answer({"errors": [], "warnings": []})

        def entry(name: str, file: tuple) -> dict:
            kind, value = file
            data = hub.blobs.get(value, b"") if kind == "lfs" else value
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            found = {"type": "file", "path": name, "size": len(data), "oid": git}
            if kind == "lfs":
                found["oid"] = value
                found["size"] = hub.sizes.get(value, len(data))
                found["lfs"] = {"oid": value, "size": found["size"], "pointerSize": 130}
            return found

        repo = r"(?P<repo>[^/ ]+/[^/ ]+)"
        kind = "(?:models|datasets)"
        ROUTES = [
            (r"GET /api/whoami-v2", Handler.whoami),
            (r"POST /api/repos/create", Handler.create),
            (r"DELETE /api/repos/delete", Handler.delete),
            (r"POST /api/validate-yaml", Handler.validate),
            (rf"GET /api/{kind}/{repo}", Handler.info),
            (rf"GET /api/{kind}/{repo}/revision/(?P<revision>.+)", Handler.info),
            (rf"GET /api/{kind}/{repo}/tree/(?P<revision>.+)", Handler.tree),
            (
                rf"(GET|HEAD) (/datasets)?/{repo}/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
                Handler.resolve,
            ),
            (rf"GET /api/models/{repo}/refs", Handler.refs),
            (rf"POST /api/models/{repo}/tag/(?P<revision>.+)", Handler.tag),
            (rf"POST /api/{kind}/{repo}/paths-info/(?P<revision>.+)", Handler.paths_info),
            (rf"POST /api/models/{repo}/preupload/.+", Handler.preupload),
            (rf"POST /api/models/{repo}/commit/.+", Handler.commit),
            (rf"POST /{repo}\.git/info/lfs/objects/batch", Handler.lfs_batch),
            (rf"GET /api/models/{repo}/xet-write-token/.+", Handler.xet_token),
            (r"PUT /blob/(?P<oid>[0-9a-f]{64})", Handler.put_blob),
            (r"PUT /part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", Handler.put_part),
            (r"POST /complete/(?P<oid>[0-9a-f]{64})", Handler.complete),
        ]
        return Handler


COMMIT = "0123456789abcdef0123456789abcdef01234567"
# repository -> (error code, status) for those that cannot be read
REFUSED = {"org/gated": ("GatedRepo", 403), "org/none": ("RepoNotFound", 404)}


class HubHandler(http.server.BaseHTTPRequestHandler):
    model_dir: Path
    requests: list[str]
    head = COMMIT
    """The commit that each branch and tag names."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *unused: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.requests.append(path)
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        names = sorted(file.name for file in self.model_dir.iterdir())
        if repo in REFUSED:
            code, status = REFUSED[repo]
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, with_body)
        elif path.startswith("/api/models/"):
            revision = path.split("/revision/")[1] if "/revision/" in path else "main"
            if revision not in ("main", "v1", COMMIT, self.head):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
                return
            if "/tree/" in path:
                body: object = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in names
                ]
            else:
                body = {
                    "id": repo,
                    "sha": COMMIT if revision == COMMIT else self.head,
                    "cardData": {"license": "llama3"},
                    "siblings": [{"rfilename": name} for name in names],
                }
            headers = {"Content-Type": "application/json"}
            self._send(200, json.dumps(body).encode(), headers, with_body)
        elif "/resolve/" not in path:
            self._send(404, b"", {}, with_body)
        else:
            content = (self.model_dir / path.rsplit("/", 1)[1]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            commit = path.split("/resolve/")[1].split("/")[0]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            self._send(200, content, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextlib.contextmanager
def serve_files(model_dir: Path) -> Iterator[tuple[str, type[HubHandler]]]:
    """Serve a directory as every repository; yield the URL, and the class that has the requests."""
    handler = type("Handler", (HubHandler,), {"model_dir": model_dir, "requests": []})
    with local_http.serving(handler) as address:
        yield f"http://{address}", handler


def client_environment(url: str, home: Path) -> dict[str, str]:
    """Return an environment whose client asks a server; it reads its settings when imported."""
    # gptqmodel, where another test imported it, has set HF_HUB_CACHE, which goes before HF_HOME.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


def downloaded(handler: type[HubHandler]) -> set[str]:
    """Return the names of the files whose content was asked for."""
    return {path.rsplit("/", 1)[1] for path in handler.requests if "/resolve/" in path}
