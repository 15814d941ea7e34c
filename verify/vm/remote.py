# SPDX-License-Identifier: MIT
"""Runs on the node, as root, with the standard library alone: backup jobs and backups as JSON; changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any


def observe(job: str, storage: str, vmid: int) -> dict[str, Any]:
    """The job of that id (None: there is none), the backups of the VM on the storage, and the node's clock.

    `error`: the storage cannot be read. `meta`: what PVE noted when it made the VM; None: there is no VM.
    """
    jobs = get("/cluster/backup")
    error, found = "", []
    meta: str | None
    try:
        found = get(f"/nodes/localhost/storage/{storage}/content", "--content", "backup", "--vmid", str(vmid))
    except ValueError as refusal:
        error = str(refusal)
    try:
        meta = str(get(f"/nodes/localhost/qemu/{vmid}/config").get("meta", ""))
    except ValueError as refusal:
        if "does not exist" not in str(refusal):
            raise
        meta = None
    return {
        "job": next((each for each in jobs if each.get("id") == job), None),
        "backups": [
            {
                "volid": each["volid"],
                "ctime": each.get("ctime", 0),
                "size": each.get("size", 0),
                "verification": (each.get("verification") or {}).get("state"),
            }
            for each in found
        ],
        "error": error,
        "meta": meta,
        "now": time.time(),
    }


def get(path: str, *options: str) -> Any:
    """What `pvesh get` says.

    Raises:
        ValueError: it refuses, in its own words.
    """
    words = ["pvesh", "get", path, *options, "--output-format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    if done.returncode != 0:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(observe(**json.loads(sys.argv[1]))))
