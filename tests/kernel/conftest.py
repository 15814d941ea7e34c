# SPDX-License-Identifier: MIT
"""The kernel tier: one scenario in stages, each a fixture that takes the machine from one boot to the next.

`fresh` (a Debian 13 kernel, nothing of ours) -> `waiting` (configured, the reboot not allowed) -> `deployed` (rebooted
once) -> `rolled_back` (rebooted again). `amd` is a second machine that goes on from the deployed disk. Simulated are
the cards (functions with the A4000's ids), the firmware's IOMMU (QEMU's), the PVE API (fakepve) and `pveversion`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inventory.secrets import Secrets
from operations.hypervisor.facts import NodeFacts
from rehearsal.kernel import qemu, topology
from rehearsal.kernel.machine import KernelMachine
from rehearsal.kernel.qemu import Iommu
from rehearsal.pve.power import PciDevice
from rehearsal.pve.testing import FakeLab
from rehearsal.rehearse import program

ROOT = Path(__file__).parents[2]
#: The declared card: options that a real kernel must be seen to take.
PASSTHROUGH = {
    "devices": [{"name": "a4000", "address": topology.CARD.rpartition(".")[0]}],
    "headroom_gib": 0.25,
    "disable_idle_d3": True,
    "hugepages": {"size": "2M", "count": 16},
}
#: Everything that a boot is made from, but for what is made from it.
CONFIGURATION = "find /etc /usr/share/initramfs-tools /var/lib/vz -type f | sort | xargs -d '\\n' sha256sum"

_timings: list[tuple[str, float]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = qemu.missing() if any("tests/kernel" in str(item.path) for item in items) else None
    for item in items:
        if "tests/kernel" in str(item.path):
            item.add_marker(pytest.mark.kernel)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _timings:
        return
    terminalreporter.section(f"kernel tier ({qemu.accelerator()})")
    for label, seconds in [*_timings, ("together", sum(seconds for _, seconds in _timings))]:
        terminalreporter.write_line(f"{seconds:7.1f} s  {label}")


@contextmanager
def timed(label: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    _timings.append((label, time.monotonic() - began))


@dataclass
class Outcome:
    """One command as a user runs it: exit status and all that it printed, colours removed."""

    status: int
    output: str


@dataclass
class Stage:
    """The machine at one stage: what it is now, and what the run that brought it there said."""

    machine: KernelMachine
    lab: Path
    runs: Path
    #: What `CONFIGURATION` printed and the kernel's log, when the stage began.
    manifest: str
    kernel_log: str
    boot_id: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The node's fact, as the operations read it."""
        found: dict[str, Any] = json.loads(self.machine.run(NodeFacts().command().get_raw_value()).stdout)
        return found

    def function(self, address: str) -> dict[str, Any]:
        return next(function for function in self.facts()["pci"] if function["address"] == address)

    def pyinfra(self, *words: str, lab: Path | None = None) -> Outcome:
        return _run([program("pyinfra"), str(lab or self.lab), *words], GPULAB_RUNS=str(self.runs))

    def verify(self) -> tuple[Outcome, dict[str, str]]:
        """The outcome, and verdict by check id."""
        report = self.runs.parent / "report"
        done = _run([program("pytest"), "verify", "--lab", str(self.lab), "--report", str(report)])
        found = json.loads((report / "verify.json").read_text())["results"]
        return done, {item["id"]: item["verdict"] for item in found}

    def record(self) -> list[dict[str, Any]]:
        """The newest run record."""
        newest = max(self.runs.glob("*.jsonl"))
        return [json.loads(line) for line in newest.read_text().splitlines()]

    def changed(self) -> list[str]:
        """The steps of the newest run that changed something."""
        return [line["name"] for line in self.record() if line.get("changed")]


def _run(words: list[str], **environment: str) -> Outcome:
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return Outcome(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))


@pytest.fixture(scope="session")
def api() -> Iterator[FakeLab]:
    with FakeLab() as fake:
        fake.set_content("local", "iso,vztmpl,backup,import,snippets")
        yield fake


@pytest.fixture(scope="session")
def inventory_of(api: FakeLab, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an inventory for a machine; keywords are keys of the node."""

    def write(machine: KernelMachine, **keys: Any) -> Path:
        folder = tmp_path_factory.mktemp("lab")
        state = folder / "state"
        (state / "ca").mkdir(parents=True)
        shutil.copy(api.ca, state / "ca/pve1.pem")
        (state / "known_hosts").write_text(machine.ssh.known_hosts_line)
        Secrets(state).put("pve1", "api_token", f"{api.user}!{api.token_name}={api.token}")
        node = {
            "ssh_hostname": machine.ssh.host,
            "ssh_port": machine.ssh.port,
            "ssh_key": str(machine.ssh.key),
            "state_dir": str(state),
            "api": {"host": api.host, "port": api.port, "token_name": api.token_name},
            "reboot_timeout_s": 400,
            "simulated": "kernel tier: the cards and the PVE API are stand-ins; kernel, GRUB and initramfs are real",
            "passthrough": PASSTHROUGH,
            **keys,
        }
        path = folder / "lab.py"
        path.write_text(f"nodes = [('@node/pve1', {node!r})]\n")
        return path

    return write


def boot(folder: Path, label: str, iommu: Iommu = "intel") -> KernelMachine:
    machine = KernelMachine(folder, iommu=iommu)
    machine.start()
    with timed(label):
        machine.wait_ssh()
    return machine


def stage(machine: KernelMachine, lab: Path, runs: Path) -> Stage:
    # SSH answers before the last driver was tried on the last device.
    machine.run("udevadm settle --timeout 120")
    log = machine.run("dmesg").stdout
    return Stage(machine, lab, runs, machine.run(CONFIGURATION).stdout, log, machine.boot_id())


def show_to_api(api: FakeLab, now: Stage) -> None:
    """The API's double is told the machine's own PCI tree: PVE checks mappings against it."""
    api.hardware.devices = [
        PciDevice(
            found["address"],
            found["pci_class"] + "00",
            *found["id"].split(":"),
            *found["subsystem"].split(":"),
            iommu_group=-1 if found["iommu_group"] is None else found["iommu_group"],
            is_bridge=found["bridge"],
        )
        for found in now.facts()["pci"]
    ]


@pytest.fixture(scope="session")
def fresh(api: FakeLab, inventory_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The machine as its installer left it."""
    folder = tmp_path_factory.mktemp("kernel")
    machine = boot(folder / "machine", "first boot (disk included where it was not built yet)")
    try:
        now = stage(machine, inventory_of(machine), folder / "runs")
        show_to_api(api, now)
        yield now
    finally:
        machine.stop()


@pytest.fixture(scope="session")
def waiting(fresh: Stage, inventory_of: Callable[..., Path]) -> Stage:
    """Configured by a deploy that may not reboot, and deployed to once more."""
    lab = inventory_of(fresh.machine, allow_reboot=False)
    with timed("deploy without reboot: files, update-initramfs, update-grub"):
        first = fresh.pyinfra("deploy.py", "-y", lab=lab)
    with timed("the same again"):
        again = fresh.pyinfra("deploy.py", "-y", lab=lab)
    now = stage(fresh.machine, fresh.lab, fresh.runs)
    now.outcomes = {"first": first, "again": again}
    return now


@pytest.fixture(scope="session")
def deployed(waiting: Stage) -> Stage:
    """Deployed with leave to reboot."""
    with timed("deploy with its reboot"):
        done = waiting.pyinfra("deploy.py", "-y")
    changed = waiting.changed()
    now = stage(waiting.machine, waiting.lab, waiting.runs)
    now.outcomes = {"deploy": done, "changed": Outcome(0, "\n".join(changed))}
    return now


@pytest.fixture(scope="session")
def amd_disk(deployed: Stage) -> Path:
    """The deployed machine's disk as it lies there now, for another machine."""
    deployed.machine.run("sync")
    copy = deployed.machine.folder.parent / "amd"
    copy.mkdir()
    shutil.copy(deployed.machine.folder / "disk.qcow2", copy / "disk.qcow2")
    return copy


@pytest.fixture(scope="session")
def amd(amd_disk: Path, inventory_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The deployed disk in a machine with an AMD processor and IOMMU."""
    machine = boot(amd_disk, "boot with an AMD IOMMU", "amd")
    try:
        yield stage(machine, inventory_of(machine), tmp_path_factory.mktemp("amd") / "runs")
    finally:
        machine.stop()


@pytest.fixture(scope="session")
def rolled_back(deployed: Stage, amd_disk: Path) -> Stage:
    """Rolled back, with one file changed by hand since the deploy."""
    deployed.machine.run("echo 'options snd_hda_intel power_save=1' >> /etc/modprobe.d/gpulab-vfio.conf")
    with timed("rollback with its reboot"):
        done = deployed.pyinfra("rollback.py", "-y")
    now = stage(deployed.machine, deployed.lab, deployed.runs)
    now.outcomes = {"rollback": done}
    return now


def initrd_configuration(machine: KernelMachine) -> str:
    """What the initrd holds of configuration: the names of all its files, and the content of those that decide."""
    script = """
cd $(mktemp -d)
unmkinitramfs /boot/initrd.img-$(uname -r) . && cd main 2>/dev/null
find . -type f | sort
find etc conf scripts -type f ! -name uuid | sort | xargs sha256sum
"""
    return machine.run(script).stdout
