"""A pod with the cache claim, mounted where the steps have it."""

from typing import Any

from tuneline.images import USER_ID
from tuneline.pods import CACHE_PATH


def claim_pod(claim: str, image: str, script: str, *, pulls: bool = True) -> dict[str, Any]:
    """Return the manifest of a pod that runs a shell script; it keeps Pod Security restricted.

    Args:
        claim: the claim, mounted at `CACHE_PATH`.
        image: an image with a shell.
        script: the script.
        pulls: whether the node may pull the image.
    """
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent" if pulls else "Never",
        "command": ["sh", "-ec", script],
        "volumeMounts": [{"name": "cache", "mountPath": CACHE_PATH}],
        "resources": {
            "requests": {"cpu": "50m", "memory": "32Mi"},
            "limits": {"cpu": "1", "memory": "128Mi"},
        },
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    user = {
        "runAsUser": USER_ID,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {
        "metadata": {"generateName": "tuneline-e2e-"},
        "spec": {
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": claim}}],
            "securityContext": {**user, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    }
