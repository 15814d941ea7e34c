# SPDX-License-Identifier: MIT
"""Where a lab's secrets must not turn up: logs, process lists, containers, records, reports, anybody's output.

with watched_processes() as seen:
    done = deployed.deploy()
assert leaks(deployed, output=done.output, processes=seen) == []
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inventory
from inventory.access import milvus_login
from inventory.secrets import Secrets
from rehearsal import host
from tests.lab.commands import INVENTORY, Deployed

#: What is shorter is no secret that a search could find.
LEAST = 12
#: Logs of the guest that systemd keeps in a form of its own, read through journalctl.
JOURNAL = "journal"
#: Folders of the guest whose files tell of runs: logs, jobs' logs among them, and notes of the healing.
TOLD = ("var/log", "var/lib/gpulab")


def secrets_of(lab: str = INVENTORY) -> dict[str, str]:
    """Every secret of the lab's file by a name, with what clients make of it (base64), and lines of private keys."""
    state = next(iter(inventory.load(lab).nodes.values())).state
    found: dict[str, str] = {}
    stored: dict[str, Any] = json.loads(Secrets(state).path.read_text())
    for cluster, hosts in stored.items():
        for owner, names in hosts.items():
            for name, value in names.items():
                found[f"{cluster} {owner} {name}"] = value
                if name.startswith("milvus."):
                    login = base64.b64encode(milvus_login(name.split(".")[1], value).encode()).decode()
                    found[f"{cluster} {owner} {name}, as pymilvus sends it"] = login
    for key in sorted((state / "ca/services").glob("*.key")):
        found[f"key {key.name}"] = key.read_text().splitlines()[1]
    return {name: value for name, value in found.items() if len(value) >= LEAST}


def leaks(
    deployed: Deployed, guest: str = "gpu01", secrets: Mapping[str, str] | None = None, **texts: str
) -> list[str]:
    """`place: name of the secret` for each secret that stands where it must not.

    Looked at are the guest's /var/log, /var/lib/gpulab and journal, what its engine says of each container, its
    environment included, and its logs, Quadlet's files, the run records and verify's reports; and whatever else is
    given as `texts`.
    """
    secrets = secrets_of() if secrets is None else secrets
    places = {**places_of(deployed, guest), **texts}
    return [f"{place}: {name}" for place, text in places.items() for name, value in secrets.items() if value in text]


def places_of(deployed: Deployed, guest: str) -> dict[str, str]:
    """The texts in which secrets are looked for."""
    found = {}
    root = host.root(guest)
    for folder in (*(root / each for each in TOLD), root / "etc/containers/systemd"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and JOURNAL not in path.relative_to(folder).parts:
                found[f"{guest}:/{path.relative_to(root)}"] = path.read_text(errors="replace")
    found[f"{guest}: journal"] = said(guest, "journalctl", "--no-pager", "--output=export", "--all")
    assert found[f"{guest}: journal"], "the journal cannot be read"
    for engine in ("docker", "podman"):
        # The other of the two is absent, or stopped.
        for name in host.run(guest, [engine, "ps", "--all", "--format={{.Names}}"]).stdout.split():
            for words in ("inspect", "logs"):
                found[f"{guest}: {engine} {words} {name}"] = said(guest, engine, words, name)
    for folder in (deployed.reports, Path("reports")):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file():
                found[str(path)] = path.read_text(errors="replace")
    return found


def said(guest: str, *words: str) -> str:
    """What a command says, bytes that are no text included: a journal has some."""
    done = subprocess.run([*host.enter(guest), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode(errors="replace")


class Seen(set[str]):
    """Command lines that were seen."""

    def __str__(self) -> str:
        return "\n".join(self)


@contextmanager
def watched_processes() -> Iterator[Seen]:
    """Every command line of this machine, and so of the lab's hosts in it, looked at some hundred times a second."""
    seen, over = Seen(), threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    seen.add((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
