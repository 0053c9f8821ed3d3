"""Print the outcome of a push when the Hub or the network fails; run by hand.

    python tests/measure/publish_faults.py

The real client pushes a merged model and an adapter to a server on localhost. A temporary fault
occurs once, at each request in turn; a permanent one occurs every time. test_faults.py asserts each
of these outcomes; this script prints them.
"""

import collections
import logging
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("support", "support/servers", "publish")]

import hub_server  # noqa: E402
import test_faults  # noqa: E402

PASSING = (429, 500, 503, "cut", "half", "lost")
STAYING = (401, 403, 404, 409, 412, 422, 429, 503, "cut")
WORDS = {
    "cut": "the connection is cut before a response",
    "half": "the connection is cut in the middle of the request",
    "lost": "the request arrives, but its response is lost",
}


def outcome(root: Path, route: str, fault, count: int) -> str:
    """Push once to a new Hub with one fault; return "one commit each" or the error message."""
    from tuneline.errors import TunelineError
    from tuneline.publish.config import PublishConfig
    from tuneline.publish.hub import push
    from tuneline.publish.staging import StagedRepo

    server = hub_server.Hub()
    os.environ["HF_ENDPOINT"] = server.url
    server.faults = [(route, fault, count)]
    staged = [
        StagedRepo("me/mine-lora", "adapter", root / "lora"),
        StagedRepo("me/mine", "merged", root / "merged"),
    ]
    try:
        push(staged, token=hub_server.TOKEN, config=PublishConfig(max_attempts=3))
        commits = {len(kept["commits"]) - 1 for kept in server.repos.values()}
        return "one commit each" if commits == {1} else f"commits: {sorted(commits)}"
    except TunelineError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        server.close()


def main() -> None:
    """Print two tables in Markdown."""
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    logging.disable(logging.ERROR)
    from huggingface_hub.utils import _http

    import tuneline.publish.hub

    for client in (_http, tuneline.publish.hub):
        client.time.sleep = lambda seconds: None  # the client does not wait
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("lora", "merged"):
            (root / name).mkdir()
            (root / name / "tuneline.json").write_text("{}")
            (root / name / "1.safetensors").write_bytes(os.urandom(100_000))
        print("| once, at any request | outcome |\n|---|---|")
        for fault in PASSING:
            routes = test_faults.ROUTES if fault != "half" else ("send", "commit")
            outcomes = collections.Counter(
                outcome(root, test_faults.ROUTES[route], fault, 1) for route in routes
            )
            shown = "; ".join(f"{text} ({count} requests)" for text, count in outcomes.items())
            print(f"| {WORDS.get(fault, fault)} | {shown} |", flush=True)
        print("\n| every time, at the commit | outcome |\n|---|---|")
        for fault in STAYING:
            text = outcome(root, test_faults.ROUTES["commit"], fault, 999)
            print(f"| {WORDS.get(fault, fault)} | {text} |", flush=True)


if __name__ == "__main__":
    main()
