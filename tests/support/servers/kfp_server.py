"""A small server for the part of KFP's v2beta1 REST API that tuneline uses.

It stands in for a cluster. Requests come from the unmodified kfp.Client. Bodies are checked against
the models that KFP generates from its API specification (an unknown key or a value of another type
is answered with 400), and pipelines against KFP's own protobuf messages. The server stores objects
and returns them; it runs nothing.

Runs with tasks are those that KFP 2.17.0 on Argo 4.0.5 recorded: excerpts of its answers in
tests/data/kfp-2.17/run-NAME.json (the pipelines without inputs and images, the tasks without their
histories). A log that the server does not have is answered as KFP 2.17 answers: status 200, and the
error as the text.
"""

import datetime
import json
import re
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

PREFIX = "/apis/v2beta1/"
RECORDED = Path(__file__).parents[2] / "data" / "kfp-2.17"
SIX_FIELDS = re.compile(r"\S+( \S+){5}")


class Refused(Exception):
    """An error response, worded like those of grpc-gateway."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpServer:
    """The state behind the API, and a record of the requests.

    Set `refuse` to (status, message) to refuse every request, `page` to an HTML text to answer
    every request with it, and `fail_creation` to refuse the creation of recurring runs.
    """

    def __init__(self, *, multi_user: bool = False) -> None:
        self.multi_user = multi_user
        self.requests: list[tuple[str, str, Any]] = []
        self.tokens: list[str | None] = []
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurringruns: dict[str, dict[str, Any]] = {}
        self.logs: dict[tuple[str, str], str] = {}
        self.log_version = "v1alpha1"
        self.refuse: tuple[int, str] | None = None
        self.page: str | None = None
        self.fail_creation = False
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True)
        self.host = f"http://127.0.0.1:{self._httpd.server_port}"

    def __enter__(self) -> "KfpServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def writes(self) -> list[str]:
        """Return methods and paths of the requests that changed something."""
        return [f"{method} {path}" for method, path, _ in self.requests if method != "GET"]

    def replay(self, name: str, **values: Any) -> dict[str, Any]:
        """Store the recorded run of a name, with some values replaced, and return it."""
        text = (RECORDED / f"run-{name}.json").read_text(encoding="utf-8")
        run: dict[str, Any] = json.loads(text) | values
        self.runs[run["run_id"]] = run
        return run

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        log = re.fullmatch(r"/apis/(v2beta1|v1alpha1)/runs/([^/]+)/nodes/([^/]+)/log", path)
        if log and log[1] == self.log_version:
            message = f"BadRequestError: Failed to read logs for run {log[2]}"
            missing = json.dumps({"error_message": message, "error_details": message})
            return self.logs.get((log[2], log[3]), missing.replace('": "', '":"'))
        if log or not path.startswith(PREFIX):
            raise Refused(404, "Not Found")
        kind, _, rest = path.removeprefix(PREFIX).partition("/")
        identity, _, verb = rest.partition(":")
        if kind == "healthz":
            return {"multi_user": self.multi_user, "pipeline_store": "database"}
        if (method, rest) == ("POST", ""):
            return getattr(self, f"_create_{kind}")(body)
        store = getattr(self, kind)
        if (method, rest) == ("GET", ""):
            return self._list(kind, store, query)
        if identity not in store:
            raise Refused(404, f"Failed to get {kind}: ResourceNotFoundError: {identity}")
        if method == "DELETE":
            del store[identity]
            return {}
        if method == "POST":
            return self._act(store[identity], verb)
        return store[identity]

    def _list(
        self, kind: str, store: dict[str, dict[str, Any]], query: dict[str, str]
    ) -> dict[str, Any]:
        if self.multi_user and not query.get("namespace") and not query.get("experiment_id"):
            raise Refused(400, "Invalid input error: Namespace is empty")
        found = list(store.values())
        if query.get("filter"):
            for predicate in json.loads(query["filter"])["predicates"]:
                # protobuf's JSON accepts an enum's name or its number, and kfp sends both.
                _require(predicate["operation"] in ("EQUALS", 1), predicate, "Filter")
                key, value = predicate["key"], predicate["stringValue"]
                found = [each for each in found if each[key] == value]
        if query.get("namespace"):
            found = [each for each in found if each.get("namespace") == query["namespace"]]
        if query.get("sort_by"):
            _require(query["sort_by"] == "created_at desc", query["sort_by"], "sort_by")
            found = found[::-1]
        start = int(query.get("page_token") or 0)
        end = start + int(query.get("page_size") or 20)
        name = "recurringRuns" if kind == "recurringruns" else kind
        # As on a real server, the runs of a list come without their tasks.
        page = [{**each, "run_details": None} for each in found[start:end]]
        return {name: page, "next_page_token": str(end) if end < len(found) else ""}

    def _create_experiments(self, body: dict[str, Any]) -> dict[str, Any]:
        check_body(body, "V2beta1Experiment")
        made = {**body, "experiment_id": str(uuid.uuid4()), "created_at": _now()}
        self.experiments[made["experiment_id"]] = made
        return made

    def _create_runs(self, body: dict[str, Any]) -> dict[str, Any]:
        check_body(body, "V2beta1Run")
        self._check_pipeline(body)
        owner = self.experiments[body["experiment_id"]]
        made = {**body, "run_id": str(uuid.uuid4()), "state": "PENDING", "created_at": _now()}
        self.runs[made["run_id"]] = {**made, "namespace": owner.get("namespace")}
        return made

    def _create_recurringruns(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.fail_creation:
            raise Refused(500, "Internal error: the database is unreachable")
        check_body(body, "V2beta1RecurringRun")
        self._check_pipeline(body)
        cron = body["trigger"].get("cron_schedule", {}).get("cron")
        if cron is not None and not SIX_FIELDS.fullmatch(cron):
            raise Refused(400, f"Invalid input error: cron {cron}")
        owner = self.experiments[body["experiment_id"]]
        made = {**body, "recurring_run_id": str(uuid.uuid4()), "created_at": _now()}
        made |= {"status": f"{body['mode']}D", "namespace": owner.get("namespace")}
        self.recurringruns[made["recurring_run_id"]] = made
        return made

    def _check_pipeline(self, body: dict[str, Any]) -> None:
        if body["experiment_id"] not in self.experiments:
            raise Refused(404, "no such experiment")
        spec = body["pipeline_spec"]
        _require(set(spec) == {"pipeline_spec", "platform_spec"}, list(spec), "pipeline_spec")
        json_format.ParseDict(spec["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(spec["platform_spec"], pipeline_spec_pb2.PlatformSpec())

    def _act(self, stored: dict[str, Any], verb: str) -> dict[str, Any]:
        if verb == "terminate":
            self._set_state(stored, "CANCELING")
        elif verb == "retry":
            _require(stored["state"] == "FAILED", stored["state"], "Run")
            self._set_state(stored, "RUNNING")
        elif verb in ("enable", "disable"):
            stored |= {"mode": verb.upper(), "status": f"{verb.upper()}D"}
        else:
            raise Refused(404, "Not Found")
        return {}

    def _set_state(self, run: dict[str, Any], state: str) -> None:
        run["state"] = state
        entry = {"update_time": _now(), "state": state}
        run["state_history"] = [*run.get("state_history", []), entry]


def check_body(value: Any, type_name: str) -> None:
    """Check JSON against a type of the API's specification, which kfp_server_api contains."""
    if type_name.startswith("list["):
        for each in value:
            check_body(each, type_name.removeprefix("list[").removesuffix("]"))
    elif type_name.startswith("dict("):
        for each in value.values():
            check_body(each, type_name.removeprefix("dict(").removesuffix(")").split(", ")[1])
    elif type_name == "str":
        # 64-bit integers are strings in the specification; protobuf's JSON accepts both.
        _require(isinstance(value, str | int) and not isinstance(value, bool), value, type_name)
    elif type_name in ("bool", "int"):
        _require(type(value).__name__ == type_name, value, type_name)
    elif type_name == "datetime":
        datetime.datetime.fromisoformat(value)
    elif type_name == "object":
        pass
    else:
        model = getattr(kfp_server_api, type_name)
        if hasattr(model, "allowable_values"):
            _require(value in model.allowable_values, value, type_name)
            return
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        for key, each in value.items():
            _require(key in names, key, type_name)
            check_body(each, model.openapi_types[names[key]])


def _require(holds: bool, value: Any, type_name: str) -> None:
    if not holds:
        raise Refused(400, f"proto: unexpected {value!r} in {type_name}")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(address.query))
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            path = urllib.parse.unquote(address.path)
            server.requests.append((self.command, path, body))
            server.tokens.append(self.headers.get("authorization"))
            if server.page is not None:
                self._send(200, "text/html", server.page)
                return
            try:
                if server.refuse:
                    raise Refused(*server.refuse)
                answer = server.answer(self.command, path, query, body)
            except Refused as error:
                words = {"error": str(error), "code": 0, "message": str(error), "details": []}
                self._send(error.status, "application/json", json.dumps(words))
                return
            if isinstance(answer, str):
                self._send(200, "text/plain", answer)
            else:
                self._send(200, "application/json", json.dumps(answer))

        do_POST = do_DELETE = do_GET

        def _send(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
