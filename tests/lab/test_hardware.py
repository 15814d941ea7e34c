# SPDX-License-Identifier: MIT
"""Hardware cases (`tests/hardware/`) laid out in the rehearsal's node, and deployed to as a user would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal import lab
from rehearsal.rehearse import bootstrap

from .commands import INVENTORY, Deployed

CASES = Path(__file__).parents[1] / "hardware"


@pytest.fixture
def node_of(tmp_path: Path) -> Iterator[Callable[..., tuple[Deployed, Path]]]:
    """Brings a node of that hardware up; returns a user's commands and an inventory with the case's own declaration."""
    if lab.is_up():
        pytest.fail("a lab is up that this test did not start: make lab-down")

    def up(name: str, **passthrough: Any) -> tuple[Deployed, Path]:
        case = yaml.safe_load((CASES / f"{name}.yaml").read_text())
        hardware, path = tmp_path / "hardware.json", tmp_path / "lab.py"
        hardware.write_text(json.dumps(case["machine"]))
        lab.up(["pve1"], hardware)
        bootstrap()
        declared = {**case["node"]["passthrough"], "headroom_gib": 0, **passthrough}
        path.write_text(f"{Path(INVENTORY).read_text()}\nguests = []\nnodes[0][1]['passthrough'] = {declared!r}\n")
        return Deployed(tmp_path), path

    try:
        yield up
    finally:
        lab.down()


def driver(node: Deployed, address: str) -> str:
    return node.on("pve1", "readlink", f"/sys/bus/pci/devices/{address}/driver").strip().rpartition("/")[2]


def test_twin_of_the_declared_card_stays_with_the_host(node_of: Any) -> None:
    node, path = node_of("two-a4000-shim")

    done = node.pyinfra("deploy.py", "-y", lab=path)

    assert done.status == 0, done.output[-3000:]
    cards = node.on("pve1", "sh", "-c", "grep -l 0x24b0 /sys/bus/pci/devices/*/device").split()
    assert sorted(driver(node, card.split("/")[5]) for card in cards) == ["nouveau", "vfio-pci"]
    assert node.pyinfra("deploy.py", "-y", lab=path).status == 0
    assert node.changed() == []


def test_group_that_an_inactive_iommu_hid_is_refused_after_the_reboot_with_nothing_bound(node_of: Any) -> None:
    """Kernel 6.5 on Intel: the group with the SATA controller is visible only once our word is on its command line."""
    devices = [{"name": "a4000", "address": "0000:01:00"}]
    node, path = node_of("xeon-e3-shared-sata", devices=devices, allow_unsafe_interrupts=False)
    before = node.on("pve1", "cat", "/proc/sys/kernel/random/boot_id")

    for _ in range(2):
        done = node.pyinfra("deploy.py", "-y", lab=path)

        assert done.status == 1
        assert "IOMMU group 1 of 0000:01:00 (a4000) also holds 0000:02:00.0 1b21:0612 (SATA storage" in done.output
        assert "intel_iommu=on" in node.on("pve1", "cat", "/proc/cmdline")
        assert driver(node, "0000:01:00.0") == "nouveau" and driver(node, "0000:02:00.0") == "ahci"
    assert node.on("pve1", "cat", "/proc/sys/kernel/random/boot_id") != before
    log = node.on("pve1", "dmesg")
    assert "gpulab: 0000:01:00 is left to the host: its IOMMU group also holds 0000:02:00.0" in log


def test_options_and_a_pinned_kernel_are_taken_by_the_next_boot(node_of: Any) -> None:
    """The only display of the node: no boot framebuffer, idle cards awake, another kernel."""
    node, path = node_of("b550-only-display")
    case = yaml.safe_load((CASES / "b550-only-display.yaml").read_text())

    done = node.pyinfra("deploy.py", "-y", lab=path)

    assert done.status == 0, done.output[-3000:]
    assert "initcall_blacklist=sysfb_init" in node.on("pve1", "cat", "/proc/cmdline")
    assert node.on("pve1", "cat", "/proc/sys/kernel/osrelease").strip() == case["node"]["passthrough"]["kernel"]
    assert node.on("pve1", "cat", "/sys/module/vfio_pci/parameters/disable_idle_d3").strip() == "Y"
    assert node.pyinfra("deploy.py", "-y", lab=path).status == 0
    assert node.changed() == []
    # Back: the pin that was not there before is taken off by PVE's own tool.
    assert node.pyinfra("rollback.py", "-y", lab=path).status == 0
    assert "initcall_blacklist" not in node.on("pve1", "cat", "/proc/cmdline")
    assert "Pinned kernel" not in node.on("pve1", "proxmox-boot-tool", "kernel", "list")
