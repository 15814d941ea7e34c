# SPDX-License-Identifier: MIT
"""Debian's own open driver (550.163.01) against Debian's newest kernel headers: a real build that really fails.

It takes five minutes and more: `make test-slow`, as root.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from operations import nvidia
from operations.remote import program
from rehearsal import host
from tests.lab.debian_host import NAME, debian_host

pytestmark = pytest.mark.slow
PACKAGE = "nvidia-open-kernel-dkms"
INSTALL = f"DEBIAN_FRONTEND=noninteractive INITRD=No apt-get -y --no-install-recommends install {PACKAGE} 2>&1"


def test_failed_build_of_the_real_driver_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with debian_host(tmp_path) as debian:
        installed = host.run(NAME, ["sh", "-c", INSTALL])
        status = debian.sh("dkms status")
        found = read(debian.kernel)
    with capsys.disabled():
        print(f"\n{installed.stdout[-2500:]}\n{status}\n{json.dumps(found['build_failure'], indent=1)}")
    assert installed.returncode != 0
    assert ": installed" not in status
    failure = found["build_failure"]
    # The kernel's function has one argument more than the driver of 2025 gives it.
    assert "pci_resize_resource" in failure["error"]
    assert failure["file"].endswith(".c")
    assert failure["line"] > 0


def read(kernel: str) -> dict[str, Any]:
    """What the driver step reads on the host."""
    words = {"package_names": [PACKAGE], "blacklist": "/nowhere", "policy": False}
    text = program(str(nvidia.__file__), "driver")
    done = host.run(NAME, ["python3", "-c", text, json.dumps(words)])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["kernel"] == kernel
    return found
