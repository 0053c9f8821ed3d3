"""Push 20 GB of shards to a Hub on localhost through a cut connection; run by hand.

    python tests/measure/publish_large.py --directory /tmp/large

The shards are sparse files that differ in a few bytes, so they take no disk space. The server
counts what it receives, in parts of 64 MiB like the Hub, and drops it. One part is interrupted and
sent again by the client. In the middle of the fourth shard the connection breaks for good, and a
second run completes the push. The script prints bytes, seconds and the client's peak of resident
memory. xet is off, because its storage would deduplicate the zeros.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO, PART_BYTES = "me/large", 64 << 20


def push(directory: Path) -> None:
    """Push in this process as the step does; print the outcome and the peak of memory."""
    from tuneline.errors import HubError
    from tuneline.publish.config import PublishConfig
    from tuneline.publish.hub import push
    from tuneline.publish.staging import StagedRepo

    outcome = ""
    try:
        push(
            [StagedRepo(REPO, "merged", directory)],
            token=os.environ["HF_TOKEN"],
            config=PublishConfig(max_attempts=1),
        )
    except HubError as error:
        outcome = str(error)
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    print(json.dumps({"outcome": outcome, "peak_bytes": peak}))


def main() -> None:
    """Make the shards, push twice, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--shard-bytes", type=int, default=4 << 30)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        push(arguments.directory)
        return

    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "servers"))
    import hub_server

    arguments.directory.mkdir()
    (arguments.directory / "tuneline.json").write_text("{}")
    for number in range(1, arguments.shards + 1):
        with open(arguments.directory / f"{number}.safetensors", "wb") as file:
            file.write(number.to_bytes(8))
            file.truncate(arguments.shard_bytes)
    total = arguments.shards * arguments.shard_bytes
    with open(arguments.directory / "4.safetensors", "rb") as file:
        fourth = hashlib.file_digest(file, "sha256").hexdigest()
    hub = hub_server.Hub()
    hub.part_bytes, hub.keeps_content = PART_BYTES, False
    hub.faults = [(r"PUT /part/\w+/7$", "half", 1), (f"PUT /part/{fourth}/9$", "cut", 99)]
    print(f"{arguments.shards} shards, {total / 1e9:.2f} GB, parts of {PART_BYTES >> 20} MiB")
    for name in ("first run", "second run"):
        began, before = time.monotonic(), hub.num_received_bytes
        done = subprocess.run(
            [sys.executable, __file__, "--directory", str(arguments.directory), "--child"],
            env=os.environ
            | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        child = json.loads(done.stdout.splitlines()[-1])
        received = hub.num_received_bytes - before
        print(
            f"{name}: {child['outcome'] or 'published'}; {received / 1e9:.2f} GB sent, "
            f"{time.monotonic() - began:.0f} s, {child['peak_bytes'] / 2**20:.0f} MiB resident",
            flush=True,
        )
        hub.faults = []
    kept = hub.repos[REPO]
    assert len(kept["files"]) == arguments.shards + 1 and len(kept["commits"]) == 2
    print(f"in all {hub.num_received_bytes / 1e9:.2f} GB for {total / 1e9:.2f} GB, one commit")
    hub.close()
    shutil.rmtree(arguments.directory)


if __name__ == "__main__":
    main()
