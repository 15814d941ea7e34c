# SPDX-License-Identifier: MIT
"""What the lab calls: the stand-in image, the fronts' process, and the files a node needs to talk to its own."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from inventory import GpulabError
from rehearsal import ca, network, paths, processes
from rehearsal.pve import etc_pve, images

#: The process that serves every node's API.
PROCESS = "pve-front"
#: The first node's front listens here, on the control machine's address on the bridge; the next one port higher.
FIRST_PORT = 18006
_START_TIMEOUT = 30.0
_COMMANDS = (
    *("/usr/sbin/pveum", "/usr/sbin/pvesm", "/usr/sbin/qm", "/usr/sbin/qmrestore"),
    *("/usr/bin/pvesh", "/usr/bin/pvenode", "/usr/bin/vzdump"),
)
_GUESTS_UNIT = """\
# Starts and stops the node's VMs with it, as PVE's own unit of that name does.
[Unit]
Description=PVE guests (simulated)
Wants=network-online.target
After=network-online.target ssh.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/pvesh create /nodes/localhost/startall
ExecStop=/usr/bin/pvesh create /nodes/localhost/stopall
# As PVE: each guest has its own deadline.
TimeoutStopSec=infinity

[Install]
WantedBy=multi-user.target
"""


def prepare(distributions: Iterable[str]) -> dict[str, dict[str, str]]:
    """Make the CA and the stand-in cloud images; returns an inventory's `image` (url, checksum, filename) of each."""
    ca.authority(paths.ca())
    found = {}
    for distribution in distributions:
        images.write(distribution)
        found[distribution] = images.description(network.current().gateway, distribution)
    return found


def start(nodes: list[tuple[str, str]]) -> None:
    """Start the fronts of these nodes, `(name, address)` in the order of their ports, and wait until they listen.

    After `prepare()`, which makes what they serve.

    Raises:
        GpulabError: one does not within half a minute.
    """
    if processes.running(PROCESS):
        return
    for name, _ in nodes:
        root_secret(name)
    words = [f"{name}={address}:{FIRST_PORT + index}" for index, (name, address) in enumerate(nodes)]
    processes.start(PROCESS, [sys.executable, "-m", "rehearsal.pve", *words])
    deadline = time.monotonic() + _START_TIMEOUT
    for index, (name, _) in enumerate(nodes):
        _wait_for(network.current().gateway, FIRST_PORT + index, name, deadline)


def root_secret(node: str) -> str:
    """What the node's own commands show to be root@pam; made the first time."""
    path = paths.root_secret(node)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_text().strip()


def node_files(node: str, index: int) -> dict[str, tuple[str, int]]:
    """Files of a node for `HostSpec.files`: the CA, the commands, the unit that starts its VMs."""
    program = (Path(__file__).parent / "node_cli.py").read_text()
    settings = {
        "node": node,
        "url": f"https://{network.current().gateway}:{FIRST_PORT + index}",
        "secret": root_secret(node),
        "ca": "/etc/pve/pve-root-ca.pem",
    }
    files = {
        "/etc/pve/pve-root-ca.pem": (ca.authority(paths.ca()).certificate.read_text(), 0o644),
        "/etc/lab-front.json": (json.dumps(settings), 0o600),
        "/etc/systemd/system/pve-guests.service": (_GUESTS_UNIT, 0o644),
        "/var/lib/vz/snippets/.keep": ("", 0o644),
    }
    return files | dict.fromkeys(_COMMANDS, (program, 0o755))


def node_binds(node: str) -> list[str]:
    """Folders of a node for `HostSpec.binds`: its guests' configuration, and which of them run."""
    return etc_pve.binds(node)


def _wait_for(address: str, port: int, node: str, deadline: float) -> None:
    while True:
        try:
            with socket.create_connection((address, port), timeout=1):
                return
        except OSError as error:
            if time.monotonic() > deadline or not processes.running(PROCESS):
                log = paths.logs() / f"{PROCESS}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
                raise GpulabError(f"{node}: its API does not answer on {address}:{port}: {error}", tail) from error
        time.sleep(0.05)
