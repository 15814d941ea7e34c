# SPDX-License-Identifier: MIT
"""`python -m operations.proxmox.trust INVENTORY`: pin the nodes' SSH host keys, after the admin has compared them.

No key is accepted blindly: a key that the user's own known_hosts holds is taken over, any other is shown with its
fingerprint and needs a yes typed by hand (or the fingerprint given beforehand as `--fingerprint`).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import sys
from pathlib import Path

import paramiko
from pyinfra.api.exceptions import PyinfraError

import inventory
from inventory import GpulabError, Node
from operations.proxmox import host_keys


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: every node's key is pinned. 1: one was refused or a node does not answer."""
    parser = argparse.ArgumentParser(prog="python -m operations.proxmox.trust", description=__doc__)
    parser.add_argument("inventory")
    parser.add_argument("--fingerprint", action="append", default=[], help="SHA256:… of a node, read at its console")
    options = parser.parse_args(arguments)
    try:
        for node in inventory.load(options.inventory).nodes.values():
            trust(node, options.fingerprint)
    except PyinfraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def trust(node: Node, fingerprints: list[str]) -> None:
    """Pin the node's key.

    Raises:
        GpulabError: nobody vouched for the key, or the node does not answer.
    """
    if host_keys.known(node.state, node.ssh_hostname, node.ssh_port):
        print(f"{node.name}: host key is pinned")
        return
    offered = _offered(node)
    key = f"{offered.get_name()} {offered.get_base64()}"
    print(f"{node.name} at {host_keys.label(node.ssh_hostname, node.ssh_port)} offers {fingerprint(key)}")
    if _in_users_file(node, key):
        print("  your own known_hosts has it: taken over")
    elif fingerprint(key) not in fingerprints and not _confirmed():
        raise GpulabError(
            f"{node.name}: host key not accepted",
            resolution="compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at the node's console",
        )
    host_keys.pin(node.state, node.ssh_hostname, node.ssh_port, [key])


def fingerprint(key: str) -> str:
    """OpenSSH's SHA256 fingerprint of `type base64`."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _offered(node: Node) -> paramiko.PKey:
    """The ed25519 key of the node, the one that gpulab pins everywhere."""
    try:
        transport = paramiko.Transport((node.ssh_hostname, node.ssh_port))
        try:
            transport.get_security_options().key_types = ("ssh-ed25519",)
            transport.start_client(timeout=10)
            return transport.get_remote_server_key()
        finally:
            transport.close()
    except (OSError, paramiko.SSHException) as error:
        raise GpulabError(f"{node.name}: no SSH at {node.ssh_hostname}:{node.ssh_port}", str(error)) from error


def _in_users_file(node: Node, key: str) -> bool:
    own = Path("~/.ssh/known_hosts").expanduser()
    if not own.is_file():
        return False
    entries = paramiko.HostKeys(str(own)).lookup(host_keys.label(node.ssh_hostname, node.ssh_port))
    return entries is not None and any(f"{name} {value.get_base64()}" == key for name, value in entries.items())


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    return input("  compare it with the node's console. Accept? [yes/no] ").strip() == "yes"


if __name__ == "__main__":
    raise SystemExit(main())
