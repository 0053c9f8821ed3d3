"""Find the nodes of a run's Argo workflow among the tasks that KFP's API returns.

The tasks of KFP 2.17 are the nodes of the workflow, without their IDs and names: a task has the
last part of its node's name ("executor(0)") and the IDs of the nodes below and after its own. An ID
is the workflow's name and a hash of the node's full name. A node is therefore found by computing
its ID, and its task by the computed IDs of the nodes below it.
"""

import datetime
from dataclasses import dataclass
from typing import Any

FIRST = "(0)"


@dataclass(frozen=True)
class Node:
    """A node of a workflow."""

    name: str
    """Full name, e.g. line-x(0).root(0).train(0)."""
    last: str
    """Last part of the name, which is the display name of the node's task: train(0)."""

    def below(self, part: str) -> "Node":
        """Return the node whose name has one more part: a task (".train") or an item ("(1:1)")."""
        last = part[1:] if part.startswith(".") else self.last + part
        return Node(self.name + part, last)


class Nodes:
    """The nodes of a run."""

    def __init__(self, tasks: list[Any]) -> None:
        """Read the tasks of a run, as KFP's API returns them."""
        children = [child.pod_name for task in tasks for child in task.child_tasks or []]
        self._known = {name for name in children if name}
        self.workflow = next((name.rpartition("-")[0] for name in self._known), "")
        self._tasks: dict[str, list[Any]] = {}
        for task in tasks:
            # A result that KFP puts into its cache is a task too, without a name.
            if task.display_name:
                self._tasks.setdefault(task.display_name, []).append(task)
        self.wraps = self._is_known(Node(self.workflow, self.workflow).below(FIRST))
        """Whether the controller adds retries to every node."""

    def find(self, path: tuple[str, ...]) -> list[Node]:
        """Return the nodes at a path, one per attempt of the nodes above them, oldest first."""
        found = [Node(self.workflow, self.workflow)]
        for part in path:
            found = [inner.below(part) for node in found for inner in self.attempts(node)]
        return [node for node in found if self._is_known(node)]

    def attempts(self, node: Node) -> list[Node]:
        """Return the nodes of the attempts at a node, oldest first; the node if it has none."""
        found: list[Node] = []
        while self._is_known(attempt := node.below(f"({len(found)})")):
            found.append(attempt)
        return found or [node]

    def task(self, node: Node, *below: str) -> Any | None:
        """Return a node's task; None if it cannot be told from others of the same name.

        Args:
            node: the node.
            below: parts of the names of nodes that may be directly below it.
        """
        named = self._tasks.get(node.last, [])
        wanted = {node_id(self.workflow, node.below(part).name) for part in (FIRST, *below)}
        for task in named:
            if wanted & {child.pod_name for child in task.child_tasks or []}:
                return task
        return named[-1] if len({task.state for task in named}) == 1 else None

    def states_at(self, node: Node, start: datetime.datetime | None) -> set[str]:
        """Return the states of the tasks that may be a node without nodes below: same name, start.

        The second in which a node started is not always that in which the node above it did.
        """
        return {
            str(task.state)
            for task in self._tasks.get(node.last, [])
            if start and task.start_time and 0 <= (task.start_time - start).total_seconds() <= 2
        }

    def _is_known(self, node: Node) -> bool:
        return node_id(self.workflow, node.name) in self._known


def node_id(workflow: str, node: str) -> str:
    """Return the ID of the node that has a name."""
    return workflow if node == workflow else f"{workflow}-{_hash(node)}"


def pod_name(workflow: str, template: str, node: Node) -> str:
    """Return the name of a node's pod."""
    return f"{workflow}-{template}-{_hash(node.name)}"


def _hash(text: str) -> int:
    """Return the 32-bit FNV-1a hash, which Argo puts into the names of nodes and pods."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value
