# SPDX-License-Identifier: MIT
"""The lab's known_hosts: exactly one host's entry changes at a time."""

from __future__ import annotations

from pathlib import Path

from operations.proxmox import host_keys
from operations.proxmox.trust import fingerprint


def test_pinning_replaces_only_that_host(tmp_path: Path) -> None:
    host_keys.pin(tmp_path, "192.0.2.1", 22, ["ssh-ed25519 AAAA one@host"])
    host_keys.pin(tmp_path, "192.0.2.2", 2222, ["ssh-ed25519 BBBB"])
    host_keys.pin(tmp_path, "192.0.2.1", 22, ["ssh-ed25519 CCCC"])

    assert host_keys.known(tmp_path, "192.0.2.1", 22) == ["ssh-ed25519 CCCC"]
    assert host_keys.known(tmp_path, "192.0.2.2", 2222) == ["ssh-ed25519 BBBB"]
    assert host_keys.known(tmp_path, "192.0.2.2", 22) == []
    assert host_keys.known_hosts(tmp_path).read_text().count("\n") == 2


def test_fingerprint_is_openssh_s() -> None:
    # ssh-keygen -lf of a key made for this test.
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGK1gMYgqz1DlJ3IzjR3G1Jc8g2oP6ZQHq6XhQ3vTn1v"

    assert fingerprint(key).startswith("SHA256:")
    assert len(fingerprint(key)) == len("SHA256:") + 43
