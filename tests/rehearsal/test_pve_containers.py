# SPDX-License-Identifier: MIT
"""What surrounds a VM's container: the card's description, the node's PCI tree, the stand-in image."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from rehearsal import host, image, paths
from rehearsal.pve import containers, images
from rehearsal.pve.containers import ContainerPower
from rehearsal.pve.hardware import NodeHardware
from rehearsal.pve.power import A4000, MemoryPower, PciDevice
from rehearsal.pve.state import Store, Volume
from rehearsal.pve.storage import StorageApi
from rehearsal.pve.tasks import Tasks


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lab's folder of this test's own."""
    monkeypatch.setenv("GPULAB_CACHE", str(tmp_path))
    return paths.lab()


def test_cards_get_slots_of_their_own_in_the_guest() -> None:
    second = PciDevice("0000:41:00.0", "0x030000", "10de", "24b0", "10de", "14ad", 15, "RTX A4000")
    told = json.loads(containers.gpu_file("pve1", [*A4000, second]))
    assert told["simulated"] is True
    addresses = [device["address"] for device in told["devices"]]
    assert addresses == ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]
    card, audio, other = (device["uuid"] for device in told["devices"])
    assert card == audio != other


def test_a_card_keeps_its_uuid_whatever_else_is_handed_over() -> None:
    alone = json.loads(containers.gpu_file("pve1", A4000[:1]))
    both = json.loads(containers.gpu_file("pve1", A4000))
    assert alone["devices"][0]["uuid"] == both["devices"][0]["uuid"]


def test_pci_tree_is_what_the_nodes_boot_laid_out(lab: Path) -> None:
    tree = lab / "hosts/pve1/root/var/lib/lab-hardware/sys"
    device = tree / "bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    values = {"vendor": "0x10de", "device": "0x24b0", "class": "0x030000"}
    for name, value in values.items():
        (device / name).write_text(f"{value}\n")
    (device / "iommu_group").symlink_to("../../../kernel/iommu_groups/14")
    hardware = NodeHardware("pve1")
    found = hardware.pci()[0]
    assert (found.address, found.vendor, found.device, found.pci_class) == ("0000:01:00.0", "10de", "24b0", "0x030000")
    assert found.iommu_group == 14
    assert not hardware.iommu()
    (tree / "class/iommu/dmar0").mkdir(parents=True)
    assert hardware.iommu()


def test_a_node_that_is_down_has_no_devices() -> None:
    assert list(NodeHardware("pve1").pci()) == []


def test_stand_in_image_says_its_size_and_that_it_is_one(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "key", lambda: {"suite": "trixie"})
    path = images.write()
    assert b"simulated: " in path.read_bytes()
    described = images.description("10.66.0.1")
    assert described["checksum"].startswith("sha512:")
    assert described["url"] == f"http://10.66.0.1:18005/{images.FILENAME}"
    store = Store("pve1")
    storage = StorageApi(store, Tasks(store), MemoryPower(), path.parent.parent)
    volume = Volume(
        storage=path.parent.name, name=path.name, content="import", format="qcow2", size=path.stat().st_size, ctime=0
    )
    assert storage.image_size(volume) == images.VIRTUAL_SIZE


def test_a_vm_runs_only_while_its_own_disk_does(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another VM may have taken its name since."""
    power = ContainerPower("pve1", lab / "volumes", lab / "hosts.json", threading.Lock())
    lab.mkdir(parents=True)
    (lab / "hosts.json").write_text(json.dumps({"101": ["gpu01", "/disks/one"]}))
    monkeypatch.setattr(host, "running", lambda name: name == "gpu01")
    spec = paths.host("gpu01") / "spec.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"upper": "/disks/one"}))
    assert power.running(101)
    spec.write_text(json.dumps({"upper": "/disks/two"}))
    assert not power.running(101)
