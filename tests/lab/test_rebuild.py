# SPDX-License-Identifier: MIT
"""Rebuild a guest of the lab, killed and refused: what lies on its data disk is there afterwards.

The undisturbed ways (rebuild, rollback, destroy, restore) are those of `make rehearse-full`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rehearsal import paths

OURS = "/srv/data/measured.txt"
ON_THE_SYSTEM = "/etc/of-the-old-system"
SNIPPET = "/var/lib/vz/snippets/gpulab-vendor.yaml"


def rebuild(deployed: Any, *words: str, **environment: str) -> Any:
    return deployed.pyinfra("rebuild.py", "-y", "--limit", "gpu01", *words, **environment)


def models(deployed: Any) -> list[tuple[str, str]]:
    """Ollama's models with their digests."""
    answer = json.loads(deployed.on("gpu01", "curl", "-s", "http://127.0.0.1:11434/api/tags"))
    return [(model["name"], model["digest"]) for model in answer["models"]]


def config(deployed: Any) -> dict[str, str]:
    """The VM's configuration, as the node's root sees it."""
    lines = deployed.on("pve1", "qm", "config", "101").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def pinned() -> list[str]:
    return (paths.lab() / "state" / "known_hosts").read_text().splitlines()


def leave_traces(deployed: Any) -> None:
    deployed.on("gpu01", "sh", "-c", f"echo 42 > {OURS}; touch {ON_THE_SYSTEM}; sync")


def has(deployed: Any, path: str) -> bool:
    return str(deployed.on("gpu01", "sh", "-c", f"test -e {path} && echo yes || echo no")).strip() == "yes"


def test_rebuild_without_one_guest_is_refused(deployed: Any) -> None:
    for words in ((), ("--limit", "guests"), ("--limit", "pve1"), ("--limit", "gpu01", "--limit", "pve1")):
        done = deployed.pyinfra("rebuild.py", "-y", *words)
        assert done.status == 1
        assert "rebuild.py rebuilds exactly one guest; nothing was done." in done.output
        assert "Connecting to hosts" not in done.output
        assert "Traceback" not in done.output


def test_plan_of_a_rebuild_touches_nothing(deployed: Any) -> None:
    leave_traces(deployed)
    before = config(deployed)
    done = deployed.pyinfra("rebuild.py", "--dry", "--limit", "gpu01")

    assert done.status == 0, done.output[-3000:]
    assert "rebuild VM 101 on pve1 (assumed)" in done.output
    assert "when verify passes: the old disk local-lvm:" in done.output
    assert "reboot: yes (the system disk is replaced)" in done.output
    assert config(deployed) == before
    assert has(deployed, ON_THE_SYSTEM)


def test_rebuilt_guest_keeps_its_data_and_its_identity(deployed: Any) -> None:
    leave_traces(deployed)
    kept, before, keys = models(deployed), config(deployed), pinned()
    began = time.monotonic()
    done = rebuild(deployed)
    seconds = time.monotonic() - began

    assert done.status == 0, done.output[-5000:]
    assert kept and models(deployed) == kept
    assert deployed.on("gpu01", "cat", OURS) == "42\n"
    assert not has(deployed, ON_THE_SYSTEM)
    after = config(deployed)
    for key in ("net0", "smbios1", "hostpci0", "scsi1", "tags", "protection"):
        assert after[key] == before[key], key
    assert after["scsi0"] != before["scsi0"]
    assert not [key for key in after if key.startswith("unused")]
    assert "gpulab-rebuild" not in after.get("description", "")
    # Exactly this guest's host key has been replaced.
    address = after["ipconfig0"].partition("/")[0].removeprefix("ip=")
    assert [line for line in pinned() if not line.startswith(f"{address} ")] == [
        line for line in keys if not line.startswith(f"{address} ")
    ]
    assert len([line for line in pinned() if line.startswith(f"{address} ")]) == 1
    assert deployed.deploy().status == 0
    assert deployed.changed() == []
    report_seconds(deployed, seconds)


def report_seconds(deployed: Any, seconds: float) -> None:
    """Wall time of the rebuild, step by step; the slowest first."""
    runs = sorted((Path(deployed.reports) / "runs").glob("*.jsonl"))
    lines = [json.loads(line) for line in runs[-2].read_text().splitlines()]
    steps = sorted((line for line in lines if line["kind"] == "operation"), key=lambda line: -line["seconds"])
    print(f"\nrebuild: {seconds:.0f} s")
    for line in steps[:8]:
        print(f"  {line['seconds']:6.1f} s  {line['name']}")


def test_rebuild_whose_new_system_does_not_start_goes_on_later(deployed: Any) -> None:
    leave_traces(deployed)
    deployed.on("pve1", "mv", SNIPPET, f"{SNIPPET}.away")
    try:
        done = rebuild(deployed)
        assert done.status == 1
        assert "gpulab-vendor.yaml' does not exist" in done.output
        assert "is kept; the data disk was not touched" in done.output
    finally:
        deployed.on("pve1", "mv", f"{SNIPPET}.away", SNIPPET)

    done = rebuild(deployed)
    assert done.status == 0, done.output[-4000:]
    assert deployed.on("gpu01", "cat", OURS) == "42\n"
    assert not [key for key in config(deployed) if key.startswith("unused")]


def test_killed_rebuild_goes_on_where_it_was(deployed: Any) -> None:
    """Killed for good, wherever it happens to be: shutting down, importing, booting, installing."""
    leave_traces(deployed)
    kept, before = models(deployed), config(deployed)
    for seconds in (2.5, 4, 8, 16):
        deployed.killed(seconds, "rebuild.py", "-y", "--limit", "gpu01")
        assert config(deployed)["scsi1"] == before["scsi1"]

    done = rebuild(deployed)
    assert done.status == 0, done.output[-4000:]
    assert models(deployed) == kept
    assert deployed.on("gpu01", "cat", OURS) == "42\n"
    after = config(deployed)
    assert not [key for key in after if key.startswith("unused")]
    assert after["protection"] == "1"
    assert "gpulab-rebuild" not in after.get("description", "")


def test_killed_destroy_goes_on_where_it_was(deployed: Any) -> None:
    """Killed while it backs up, moves the data disk away, deletes, creates, moves it back, installs."""
    leave_traces(deployed)
    kept, before = models(deployed), config(deployed)
    words = ("rebuild.py", "-y", "--limit", "gpu01", "--data", "destroy=1", "--data", "confirm=gpu01")
    for seconds in (2.5, 4, 6, 8, 12):
        deployed.killed(seconds, *words)

    done = deployed.pyinfra(*words)
    assert done.status == 0, done.output[-4000:]
    assert models(deployed) == kept
    assert deployed.on("gpu01", "cat", OURS) == "42\n"
    assert not has(deployed, ON_THE_SYSTEM)
    after = config(deployed)
    for key in ("net0", "smbios1", "hostpci0", "tags", "protection"):
        assert after[key] == before[key], key
    # The keeper has gone, and nothing of another VM came with it.
    assert deployed.on("pve1", "qm", "list").count("gpu01") == 1
    assert deployed.deploy().status == 0
    assert deployed.changed() == []
