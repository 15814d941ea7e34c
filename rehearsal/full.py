# SPDX-License-Identifier: MIT
"""What `make rehearse-full` does to the verified lab: rebuild, roll back, destroy, restore; and that nothing is lost.

Before each part, things are left on the guest's data disk, in Milvus, and on its system disk; afterwards the data, the
models, the rows, what a search answers, and the VM's identity must be what they were.
"""

from __future__ import annotations

import json
import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pymilvus import MilvusClient, MilvusException

import inventory
from inventory import GpulabError
from inventory.access import milvus_login, token
from inventory.secrets import Secrets
from rehearsal import host
from rehearsal.rehearse import (
    INVENTORY,
    Failed,
    RunFigures,
    Summary,
    command,
    console,
    log_of,
    phase,
    program,
    pyinfra,
    record,
    verify,
)

GUEST, NODE, VMID = "gpu01", "pve1", "101"
MEASURED = "/srv/data/measured"
OF_THE_OLD_SYSTEM = "/etc/of-the-old-system"

#: The tenant and collection of inventory/rehearsal.py that rows are left in, and its vectors' numbers.
TENANT, COLLECTION, DIMENSION = "astro", "spectra", 128
ROWS = 500

#: What a rebuild's time goes into, by the names of its operations. Everything else is gpulab's own.
PVE = (
    "Shut the VM down",
    "Remove what an earlier rebuild left",
    "Import the new system disk, keep the old one",
    "Size the new disk, make cloud-init's drive anew",
    "Create or change the VM",
    "Delete the old system disk, or note how long it is kept",
)
BOOT = ("Start the VM and wait for cloud-init", "Forget the SSH host key of the system that went")
APT = (
    "Install base packages and keep the clock",
    "Add NVIDIA's repositories, keys and pins",
    "Install the driver",
    "Install the container engine",
    "Install the container toolkit and describe the GPU to it",
)


@dataclass(frozen=True)
class Kept:
    """What must be the same after every way of making the guest anew."""

    measured: str
    models: tuple[str, ...]
    #: How many rows Milvus has, and the keys of those nearest to the first one.
    rows: tuple[int, ...]
    identity: tuple[str, ...]


def phases(summary: Summary) -> None:
    """
    Raises:
        Failed: something did not work, or was lost.
    """
    kept = _leave_data()
    with phase(summary, "rebuild"):
        figures = pyinfra("rebuild", "rebuild.py", "-y", "--limit", GUEST)
        _compare(kept, "the rebuild", system_is_new=True)
    summary.survived.append("rebuild")
    console.print(f"  {shares(list(record('rebuild')), figures)}", markup=False)

    _mark_system()
    with phase(summary, "rebuild that fails verify, rolled back"):
        _failing_rebuild()
        _compare(kept, "the failed rebuild", system_is_new=True)
        pyinfra("rollback", "rebuild.py", "-y", "--limit", GUEST, "--data", "rollback=1")
        _compare(kept, "the rollback", system_is_new=False)
    summary.survived.append("rollback")

    with phase(summary, "destroy with the data kept"):
        words = ("--data", "destroy=1", "--data", f"confirm={GUEST}")
        pyinfra("destroy", "rebuild.py", "-y", "--limit", GUEST, *words)
        _compare(kept, "the destruction", system_is_new=True)
    summary.survived.append("destroy")

    with phase(summary, "backup, restored into a spare id"):
        pyinfra("restore", "restore.py", "-y", "--limit", GUEST, "--data", "fresh=1")
        _compare(kept, "the restore", system_is_new=True)
    summary.survived.append("restore")

    with phase(summary, "deploy and verify again"):
        summary.changed_second = pyinfra("after", "deploy.py", "-y").changed
        if summary.changed_second:
            raise Failed(f"The deploy after all this changed {summary.changed_second} things; expected none")
        verify(summary)


def shares(lines: list[dict[str, Any]], figures: RunFigures) -> str:
    """Wall time of a rebuild, and the share that is neither PVE's, nor the boot's, nor apt's."""
    spent = dict.fromkeys(("PVE", "boot", "apt"), 0.0)
    for line in lines:
        for kind, names in (("PVE", PVE), ("boot", BOOT), ("apt", APT)):
            # Those of an included deploy.py carry its name in front.
            if line["kind"] == "operation" and line["name"].rpartition(" | ")[2] in names:
                spent[kind] += line["seconds"]
    rest = figures.seconds - sum(spent.values())
    parts = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items())
    return f"{figures.seconds:.1f} s: {parts}, the rest {rest:.1f} s ({100 * rest / figures.seconds:.0f} %)"


def _on(name: str, *words: str) -> str:
    """A command in a host, as its console would run it.

    Raises:
        Failed: it ended badly.
    """
    done = host.run(name, list(words))
    if done.returncode != 0:
        raise Failed(f"{name}: {' '.join(words)}: exit status {done.returncode}", f"{done.stdout}{done.stderr}"[-500:])
    return str(done.stdout)


def _leave_data() -> Kept:
    text = secrets.token_hex(4096)
    _on(GUEST, "sh", "-c", f"echo {text} > {MEASURED}")
    _mark_system()
    numbers = random.Random(7)
    vectors = [[numbers.random() for _ in range(DIMENSION)] for _ in range(ROWS)]
    with _milvus() as milvus:
        milvus.upsert(COLLECTION, [{"id": key, "vector": vector} for key, vector in enumerate(vectors)])
    return _found()


@contextmanager
def _milvus() -> Iterator[MilvusClient]:
    """A user's own client, through the proxy."""
    lab = inventory.load(INVENTORY)
    guest = lab.guests[GUEST]
    service = guest.services.milvus
    assert service is not None
    password = Secrets(guest.state).get(lab.node_of(guest).cluster_name, token("milvus", TENANT), GUEST)
    client = MilvusClient(
        f"https://{guest.address.ip}:{service.port}",
        token=milvus_login(TENANT, password or ""),
        db_name=TENANT,
        server_pem_path=str(guest.services_ca),
        timeout=20,
    )
    try:
        yield client
    finally:
        client.close()


def _rows() -> tuple[int, ...]:
    """How many there are, and the keys of those that a search finds.

    Raises:
        Failed: the server does not answer. After a boot it has a while to start, and to load the collection.
    """
    # It logs each refused call with its traceback.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)
    deadline = time.monotonic() + 90
    while True:
        try:
            with _milvus() as milvus:
                found = milvus.query(COLLECTION, filter="", output_fields=["count(*)"], consistency_level="Strong")
                first = milvus.get(COLLECTION, ids=[0], output_fields=["vector"])[0]["vector"]
                hits = milvus.search(COLLECTION, data=[first], limit=10, consistency_level="Strong")[0]
            return int(found[0]["count(*)"]), *(int(hit["id"]) for hit in hits)
        except (MilvusException, IndexError) as error:
            if time.monotonic() > deadline:
                raise Failed(f"{GUEST}: Milvus does not answer of {COLLECTION}: {error}") from None
            time.sleep(1)


def _mark_system() -> None:
    _on(GUEST, "sh", "-c", f"touch {OF_THE_OLD_SYSTEM}; sync")


def _found() -> Kept:
    """What is there now."""
    # A system that has just booted may still be starting it.
    patience = ("--retry", "60", "--retry-delay", "1", "--retry-connrefused")
    tags = json.loads(_on(GUEST, "curl", "-sS", *patience, "http://127.0.0.1:11434/api/tags"))
    config = dict(line.split(": ", 1) for line in _on(NODE, "qm", "config", VMID).splitlines() if ": " in line)
    uuid = re.search(r"uuid=([0-9a-fA-F-]+)", config.get("smbios1", ""))
    mac = re.search(r"([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5})", config.get("net0", ""))
    identity = (uuid[1] if uuid else "", mac[1] if mac else "", config.get("hostpci0", ""), config.get("ipconfig0", ""))
    return Kept(
        _on(GUEST, "cat", MEASURED),
        tuple(sorted(f"{model['name']} {model['digest']}" for model in tags["models"])),
        _rows(),
        identity,
    )


def _compare(kept: Kept, after: str, system_is_new: bool) -> None:
    """
    Raises:
        Failed: something is not what it was.
    """
    found = _found()
    for what in ("measured", "models", "rows", "identity"):
        before, now = getattr(kept, what), getattr(found, what)
        if before != now or not now:
            raise Failed(f"{GUEST}: {what} is not what it was before {after}", f"{str(before)[:200]}\n{str(now)[:200]}")
    is_new = host.run(GUEST, ["test", "-e", OF_THE_OLD_SYSTEM]).returncode != 0
    if is_new != system_is_new:
        raise Failed(f"{GUEST}: after {after} it runs its {'new' if is_new else 'old'} system")


def _failing_rebuild() -> None:
    """A rebuild during which the card loses half of its lanes: the new system must not pass verify.

    Raises:
        Failed: it passed, or failed for another reason.
    """
    with _half_the_lanes():
        status = command("failing", [program("pyinfra"), INVENTORY, "rebuild.py", "-y", "--limit", GUEST], check=False)
    output = log_of("failing").read_text()
    if status == 0 or "does not pass verify" not in output or "nvidia.gpu.link" not in output:
        raise Failed(
            f"A rebuild with a card on 8 lanes ended with status {status}; expected verify to fail at nvidia.gpu.link",
            resolution=f"see {log_of('failing')}",
        )


@contextmanager
def _half_the_lanes() -> Iterator[None]:
    """The next system that boots sees its card with 8 lanes."""
    ended = threading.Event()
    old = host.leader(GUEST)

    def watch() -> None:
        while not ended.wait(0.5):
            # Not in the old system: its shutdown would wait 90 s for a process that is not its own.
            if host.leader(GUEST) in (None, old):
                continue
            with suppress(GpulabError):
                fault = "echo link_width=8 > /var/lib/lab-hardware/nvml.conf"
                if host.run(GUEST, ["sh", "-c", fault]).returncode == 0:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
