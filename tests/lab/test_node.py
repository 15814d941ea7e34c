# SPDX-License-Identifier: MIT
"""A node's whole life on the lab: a kernel upgrade, reboots that stop guests, and the way back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from .commands import INVENTORY

PVE1 = ("--limit", "pve1")
NEW = "6.17.2-1-pve"
WORD = "hugepagesz=2M hugepages=4"
#: A change that only a reboot brings in force, given to every node by an inventory beside the lab's own.
HUGEPAGES = """
for _, data in nodes:
    data["passthrough"]["hugepages"] = {"size": "2M", "count": 4}
"""


@pytest.fixture
def changed_lab(tmp_path: Path) -> Path:
    """The lab's inventory with huge pages declared."""
    path = tmp_path / "lab.py"
    path.write_text(Path(INVENTORY).read_text() + HUGEPAGES)
    return path


def boot_id(deployed: Any, node: str = "pve1") -> str:
    return str(deployed.on(node, "cat", "/proc/sys/kernel/random/boot_id"))


def install_kernel(deployed: Any, vfio: bool) -> None:
    """What a kernel package does to /boot and /usr/lib/modules."""
    script = f"""set -e
cp /boot/vmlinuz-6.14.8-2-pve /boot/vmlinuz-{NEW}
mkdir -p /usr/lib/modules/{NEW}
cp -r /usr/lib/modules/6.14.8-2-pve/. /usr/lib/modules/{NEW}/
{"" if vfio else f"sed -i /vfio/d /usr/lib/modules/{NEW}/modules.dep"}
update-initramfs -c -k {NEW}
update-grub"""
    deployed.on("pve1", "sh", "-c", script)


def remove_kernel(deployed: Any) -> None:
    script = f"rm -rf /boot/*-{NEW} /usr/lib/modules/{NEW} && update-grub"
    deployed.on("pve1", "sh", "-c", script)


def failed(deployed: Any) -> set[str]:
    found: set[str] = deployed.verify("--limit", "pve1")[1]
    return found


def test_guests_are_not_cut_off_by_a_reboot_unasked(deployed: Any, changed_lab: Path) -> None:
    before = boot_id(deployed)

    done = deployed.pyinfra("deploy.py", "-y", *PVE1, "--data", "allow_guest_shutdown=False", lab=changed_lab)

    assert done.status == 1
    assert f"needs a reboot: {WORD} is not on the running command line; it would cut off VM 101 (gpu01)" in done.output
    assert deployed.on("pve1", "cat", "/etc/default/grub.d/gpulab.cfg").count("hugepages") == 0
    assert boot_id(deployed) == before


def test_reboot_shuts_guests_down_and_starts_them_again(deployed: Any, changed_lab: Path) -> None:
    guest, node = boot_id(deployed, "gpu01"), boot_id(deployed)

    done = deployed.pyinfra("deploy.py", "-y", *PVE1, lab=changed_lab)

    assert done.status == 0, done.output[-3000:]
    assert boot_id(deployed) != node and boot_id(deployed, "gpu01") != guest
    assert WORD in deployed.on("pve1", "cat", "/proc/cmdline")
    # Undeclared again: the word goes, with one more reboot, and all is as it was.
    assert deployed.deploy().status == 0
    assert WORD not in deployed.on("pve1", "cat", "/proc/cmdline")
    assert failed(deployed) == set()


@pytest.mark.parametrize(("vfio", "broken"), [(True, set()), (False, {"hypervisor.next_boot.kernel[pve1]"})])
def test_verify_judges_the_next_boot_after_a_kernel_upgrade(deployed: Any, vfio: bool, broken: set[str]) -> None:
    install_kernel(deployed, vfio)
    try:
        assert (
            broken
            <= failed(deployed)
            <= broken
            | {
                "hypervisor.reboot_pending[pve1]",
                *({"hypervisor.next_boot.initramfs[pve1]"} if broken else set()),
            }
        )
    finally:
        remove_kernel(deployed)
    assert failed(deployed) == set()


def test_kernel_without_vfio_is_refused_by_the_preflight(deployed: Any) -> None:
    install_kernel(deployed, vfio=False)
    try:
        done = deployed.deploy("--limit", "pve1")
    finally:
        remove_kernel(deployed)

    assert done.status == 1
    assert f"pve1: the next boot's kernel {NEW} has no vfio-pci" in done.output


def test_rollback_restores_the_node_and_a_deploy_prepares_it_again(deployed: Any) -> None:
    files = "find /etc /usr/share/initramfs-tools -type f ! -path '/etc/pve/*' | sort | xargs sha256sum"
    ours = [
        line for line in deployed.on("pve2", "sh", "-c", files).splitlines() if "gpulab" in line and "lab-" not in line
    ]
    assert ours

    done = deployed.pyinfra("rollback.py", "-y", "--limit", "pve2")

    assert done.status == 0, done.output[-3000:]
    left = deployed.on("pve2", "sh", "-c", files)
    assert not [line for line in left.splitlines() if line in ours]
    assert "iommu=pt" not in deployed.on("pve2", "cat", "/proc/cmdline")
    assert deployed.on("pve2", "readlink", "/sys/bus/pci/devices/0000:01:00.0/driver").strip().endswith("nouveau")
    # The VM was shut down for the reboot and runs again; its vendor data stays, since it names it.
    assert "gpulab-vendor.yaml stays: VM 102 (gpu02) names it in its cicustom" in done.output
    assert boot_id(deployed, "gpu02")

    assert deployed.pyinfra("rollback.py", "-y", "--limit", "pve2").status == 0
    assert deployed.changed() == []
    done = deployed.deploy()
    assert done.status == 0, done.output[-3000:]
    assert deployed.verify()[0].status == 0


def test_killed_rollback_can_be_run_again_and_its_guests_come_back(deployed: Any) -> None:
    """Before, while and after the guest is shut down and the node reboots."""
    for seconds in (2.0, 3.5, 6.0):
        deployed.killed(seconds, "rollback.py", "-y", "--limit", "pve2")
    deadline = time.monotonic() + 120
    while (done := deployed.pyinfra("rollback.py", "-y", "--limit", "pve2")).status != 0:
        # The node may be on its way up.
        assert time.monotonic() < deadline, done.output[-3000:]
        time.sleep(2)

    assert "iommu=pt" not in deployed.on("pve2", "cat", "/proc/cmdline")
    assert deployed.on("pve2", "ls", "/var/lib/gpulab").split().count("shut-down-guests") == 0
    assert "running" in deployed.on("pve2", "qm", "status", "102")
    assert deployed.deploy().status == 0
    assert deployed.verify()[0].status == 0
