"""Bills of materials in CycloneDX: of the locks, and of the images.

Packages of Python are listed by cyclonedx-py: from a lock here, and from what is installed when an
image is built (images/Dockerfile). An image's bill is extended with the packages of Debian.
"""

import json
import urllib.parse
from pathlib import Path
from typing import Any

from release.commands import output_of

QUERY = "${Package}\\t${Version}\\t${Architecture}\\t${source:Package}\\t${db:Status-Status}\\n"
"""Fields of a package of Debian, for dpkg-query."""

_VALIDATE = """
import json, sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
text = sys.stdin.read()
version = SchemaVersion.from_version(json.loads(text)["specVersion"])
error = JsonStrictValidator(version).validate_str(text)
sys.exit(f"not a CycloneDX document: {error}" if error else 0)
"""


def bill_of_locks(locks: list[Path], python: Path, subject: dict[str, Any], epoch: int) -> str:
    """Return the bill of the packages in locks.

    Args:
        locks: the locks; no package is in two of them.
        python: a Python that has cyclonedx-py.
        subject: the component that the packages belong to.
        epoch: time of the bill, in seconds since 1970.
    """
    # The whole document is validated below, once.
    options = ["--output-reproducible", "--no-validate", "-"]
    command = [str(python), "-m", "cyclonedx_py", "requirements", *options]
    text = "\n".join(lock.read_text(encoding="utf-8") for lock in locks)
    bill = json.loads(output_of(command, text=text, variables={"SOURCE_DATE_EPOCH": str(epoch)}))
    bill.setdefault("metadata", {})["component"] = subject
    return _checked(bill, python)


def bill_of_image(
    bill: dict[str, Any], packages: str, release: str, subject: dict[str, Any], python: Path
) -> str:
    """Return the bill of an image: what it lists of Python, and the packages of Debian.

    Args:
        bill: the image's own /opt/tuneline/sbom.cdx.json.
        packages: answer of dpkg-query to QUERY.
        release: the image's /etc/os-release.
        subject: the component that the packages belong to.
        python: a Python that has cyclonedx-py.
    """
    return _checked(with_debian(bill, packages, release, subject), python)


def with_debian(
    bill: dict[str, Any], packages: str, release: str, subject: dict[str, Any]
) -> dict[str, Any]:
    """Return a bill with the installed packages of Debian; see `bill_of_image`."""
    lines = (line.partition("=") for line in release.splitlines() if "=" in line)
    system = {key: value.strip('"') for key, _, value in lines}
    name, number = system.get("ID", "linux"), system.get("VERSION_ID", "")
    components = list(bill.get("components", []))
    components.append(
        {"type": "operating-system", "bom-ref": "operating-system", "name": name, "version": number}
    )
    for line in packages.splitlines():
        package, version, architecture, origin, status = line.split("\t")
        # Packages that were removed may have left their settings, and are listed too.
        if status != "installed":
            continue
        quoted = urllib.parse.quote(version, safe="")
        purl = f"pkg:deb/{name}/{package}@{quoted}?arch={architecture}&distro={name}-{number}"
        component: dict[str, Any] = {
            "type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl,
        }  # fmt: skip
        if origin and origin != package:
            component["properties"] = [{"name": "debian:source-package", "value": origin}]
        components.append(component)
    metadata = {**bill.get("metadata", {}), "component": subject}
    return {**bill, "metadata": metadata, "components": components}


def _checked(bill: dict[str, Any], python: Path) -> str:
    """Return a bill as text, after the validator of CycloneDX has read it."""
    text = json.dumps(bill, indent=2, ensure_ascii=False) + "\n"
    output_of([python, "-c", _VALIDATE], text=text)
    return text
