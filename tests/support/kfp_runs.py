"""Runs that a real cluster recorded: their workflow and pods, as Kubernetes returned them.

Kubernetes 1.36.2, Argo 4.0.5, KFP 2.17.0. tests/cluster/outcome_probe.py made the runs probe-*;
demo-nodes is the demo recipe. Parts of runs on a busy machine: demo-young-pod has fetch when it had
just started; demo-cancelled and demo-cancelled-early have a step and the exit handler after a
cancel. Fields that tuneline does not read were left out.
"""

import json
from pathlib import Path
from typing import Any

from kube_server import KubeServer

FOLDER = Path(__file__).parents[1] / "data" / "kfp-2.17"


def recorded(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the pods and the workflow of a recorded run."""
    run = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return run["pods"], run["workflow"]


def put_recorded(server: KubeServer, name: str, *, run_id: str = "") -> str:
    """Put a recorded run into a server, under another ID if one is given; return its ID."""
    pods, workflow = recorded(name)
    run_id = run_id or workflow["metadata"]["labels"]["pipeline/runid"]
    for plural, bodies in (("pods", pods), ("workflows", [workflow])):
        for body in bodies:
            body["metadata"]["labels"]["pipeline/runid"] = run_id
            server.put(plural, body["metadata"]["name"], **body)
    return run_id
