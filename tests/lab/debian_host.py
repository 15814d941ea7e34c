# SPDX-License-Identifier: MIT
"""One host of the lab that says it runs a Debian kernel, with that kernel, its headers and the real DKMS on it.

`DebianHost.driver()` runs the real steps of a deploy there: NVIDIA's repositories and the driver.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rehearsal import host, image, lab, machine, network, paths, running_kernel
from rehearsal.host import HostSpec
from rehearsal.nvidia import guest, service
from rehearsal.pve.containers import GPU_FILE, gpu_file
from rehearsal.pve.power import A4000
from rehearsal.rehearse import program
from tests.lab.conftest import Outcome, run

NAME = "dkms01"
SUBNET = "10.66.98.0/24"
PACKAGES = "dkms gcc linux-headers-amd64 linux-image-amd64"
INVENTORY = """\
hosts = [("{name}", {{"ssh_hostname": "{address}", "ssh_user": "root", "ssh_key": "{key}",
    "ssh_strict_host_key_checking": "yes", "ssh_known_hosts_file": "{known}"}})]
"""
DEPLOY = """\
from pyinfra import state

from inventory.packages import DEBIAN_13, TOOLKIT
from operations import nvidia, record

record.of_run(state)
nvidia.repository(
    name="Add NVIDIA's repositories, keys and pins",
    distribution_path=DEBIAN_13.nvidia_repository,
    url={repository!r},
    toolkit_url={toolkit_repository!r},
    branch="580",
    version={version!r},
    toolkit=TOOLKIT,
    toolkit_version="1.20.0-1",
    key_sha256={key_sha256!r},
    toolkit_key_sha256={toolkit_key_sha256!r},
)
nvidia.driver(
    name="Install the driver",
    packages=DEBIAN_13.driver,
    headers=DEBIAN_13.headers,
    branch="580",
    version={version!r},
)
"""


@dataclass(frozen=True)
class DebianHost:
    """`kernel`: the release that it says it runs; `folder`: where the test's own files go."""

    kernel: str
    folder: Path
    repository: service.Repository

    def sh(self, script: str) -> str:
        """What a script prints, run as root without SSH."""
        done = host.run(NAME, ["sh", "-ec", f"export DEBIAN_FRONTEND=noninteractive INITRD=No; {script}"])
        assert done.returncode == 0, (script, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def driver(self, version: str | None = None, broken: bool = False) -> Outcome:
        """Deploy repositories and driver. `broken`: from the repository whose newest driver does not build."""
        words = {**vars(self.repository), "version": version}
        if broken:
            words["repository"] = self.repository.repository.replace(service.CUDA, f"{service.BROKEN}/{service.CUDA}")
        deploy = self.folder / "deploy.py"
        deploy.write_text(DEPLOY.format(**words))
        command = [program("pyinfra"), str(self.folder / "inventory.py"), str(deploy), "-y"]
        return run(command, GPULAB_RUNS=str(self.folder / "runs"))

    def changed(self) -> dict[str, bool]:
        """Which steps of the newest run changed something."""
        newest = max((self.folder / "runs").glob("*.jsonl"))
        lines = [json.loads(line) for line in newest.read_text().splitlines()]
        return {line["name"]: line["changed"] for line in lines if line["kind"] == "operation"}

    def status(self) -> list[str]:
        """DKMS' lines on our module."""
        return [line for line in self.sh("dkms status").splitlines() if line.startswith("nvidia")]

    def module(self, kernel: str = "") -> str:
        """The version of the module on disk for a kernel; empty when there is none."""
        return self.sh(f"modinfo -k {kernel or self.kernel} -F version nvidia 2>/dev/null || true").strip()


@contextmanager
def debian_host(folder: Path) -> Iterator[DebianHost]:
    """The host, in a lab of its own beside any that is up. About a minute, two with nothing in the cache."""
    machine.check()
    ready = image.ensure().parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPULAB_CACHE", str(folder))
        patch.setenv("GPULAB_SUBNET", SUBNET)
        (folder / "image").symlink_to(ready)
        try:
            yield _started(folder)
        finally:
            lab.down()


def _started(folder: Path) -> DebianHost:
    net = network.current()
    network.up(net)
    paths.lab().mkdir(exist_ok=True)
    repository = service.prepare()
    service.start()
    host_key = folder / "keys/host"
    for path in (paths.ssh_key(), host_key):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    public = host_key.with_suffix(".pub").read_text()
    address = net.address(101)
    known = folder / "known_hosts"
    known.write_text(f"{address} {' '.join(public.split()[:2])}\n")
    spec = HostSpec(
        name=NAME,
        address=address,
        gateway=net.gateway,
        lower=image.root(),
        upper=paths.lab() / "disks" / "101",
        files={
            "/root/.ssh/authorized_keys": (paths.ssh_key().with_suffix(".pub").read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key": (host_key.read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (public, 0o644),
            GPU_FILE: (gpu_file("pve1", A4000), 0o644),
            **guest.files(),
        },
    )
    host.start(spec)
    host.wait_ssh(address)
    (folder / "inventory.py").write_text(INVENTORY.format(name=NAME, address=address, key=paths.ssh_key(), known=known))
    made = DebianHost("", folder, repository)
    made.sh(f"apt-get -qq update; apt-get -qq -y --no-install-recommends install {PACKAGES}")
    kernel = made.sh("ls /boot/vmlinuz-*").split()[-1].partition("vmlinuz-")[2]
    running_kernel.run_as(NAME, kernel)
    return DebianHost(kernel, folder, repository)
