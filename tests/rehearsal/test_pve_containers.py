# SPDX-License-Identifier: MIT
"""What surrounds a VM's container: the card's description, the node's PCI tree, the stand-in image."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rehearsal import host, image, paths
from rehearsal.host import HostSpec
from rehearsal.pve import containers, images
from rehearsal.pve.containers import ContainerPower
from rehearsal.pve.errors import TaskError
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
    monkeypatch.setattr(image, "key", lambda suite: {"suite": suite})
    path = images.write("debian13")
    assert b"simulated: " in path.read_bytes()
    described = images.description("10.66.0.1", "debian13")
    assert described["checksum"].startswith("sha512:")
    assert described["url"] == "http://10.66.0.1:18005/debian-13-lab.qcow2"
    assert images.write("debian12").read_bytes() != path.read_bytes()
    store = Store("pve1")
    storage = StorageApi(store, Tasks(store), MemoryPower(), path.parent.parent)
    volume = Volume(
        storage=path.parent.name, name=path.name, content="import", format="qcow2", size=path.stat().st_size, ctime=0
    )
    assert storage.image_size(volume) == images.VIRTUAL_SIZE


def test_a_guest_boots_from_the_image_that_its_disk_was_imported_from() -> None:
    """Also after a rebuild or a restore: the volume keeps its origin."""
    assert images.root_of("local:import/debian-12-lab.qcow2") == image.root("bookworm")
    assert images.root_of("local:import/debian-13-lab.qcow2") == image.root("trixie")
    with pytest.raises(TaskError, match=r"not noble\.img \(simulated\)"):
        images.root_of("local:import/noble.img")


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


def test_an_archive_holds_a_systems_tree_and_a_sparse_disk(lab: Path) -> None:
    """Volumes of one name on two storages keep apart."""
    power = ContainerPower("pve1", lab / "volumes", lab / "hosts.json", threading.Lock())
    made = {"storage": "one", "content": "images", "format": "raw", "ctime": 0, "size": 64 * 1024**2}
    system = Volume.model_validate(made | {"name": "vm-101-disk-0", "origin": "local:import/a.qcow2"})
    disk = Volume.model_validate(made | {"name": "vm-101-disk-0", "storage": "two"})
    copies = {
        "scsi0": system.model_copy(update={"name": "vm-901-disk-0"}),
        "scsi1": disk.model_copy(update={"name": "vm-901-disk-0"}),
    }
    for volume in (system, disk, *copies.values()):
        power.create_volume(volume)
    root = lab / "volumes/one/vm-101-disk-0"
    (root / "up/etc").mkdir()
    (root / "up/etc/hostname").write_text("gpu01")
    (root / "up/etc/link").symlink_to("/nowhere")
    os.link(root / "up/etc/hostname", root / "docker/same")
    (lab / "volumes/one/vm-901-disk-0/up/stale").write_text("of another life")
    with (lab / "volumes/two/vm-101-disk-0/disk.raw").open("r+b") as file:
        file.seek(48 * 1024**2)
        file.write(b"data")
    archive = lab / "archive.vma.dat"
    power.pack(archive, {"scsi0": system, "scsi1": disk})
    power.unpack(archive, copies)
    copied = lab / "volumes/one/vm-901-disk-0"
    assert (copied / "up/etc/hostname").read_text() == "gpu01"
    assert (copied / "up/etc/link").readlink() == Path("/nowhere")
    assert (copied / "docker/same").samefile(copied / "up/etc/hostname")
    assert not (copied / "up/stale").exists()
    assert (copied / "work").is_dir()
    raw, was = lab / "volumes/two/vm-901-disk-0/disk.raw", lab / "volumes/two/vm-101-disk-0/disk.raw"
    assert raw.read_bytes() == was.read_bytes()
    assert raw.stat().st_blocks * 512 < 1024**2
    assert sorted(path.name for path in (lab / "volumes").iterdir()) == ["one", "two"]


def test_an_archive_that_is_cut_off_leaves_the_volumes_as_they_were(lab: Path) -> None:
    power = ContainerPower("pve1", lab / "volumes", lab / "hosts.json", threading.Lock())
    disk = Volume(storage="two", name="vm-101-disk-0", content="images", format="raw", size=4096, ctime=0)
    power.create_volume(disk)
    raw = lab / "volumes/two/vm-101-disk-0/disk.raw"
    raw.write_bytes(os.urandom(4096))
    archive = lab / "archive.vma.dat"
    power.pack(archive, {"scsi1": disk})
    archive.write_bytes(archive.read_bytes()[:-100])
    raw.write_bytes(b"kept")
    with pytest.raises(TaskError, match="simulated"):
        power.unpack(archive, {"scsi1": disk})
    assert raw.read_bytes() == b"kept"
    assert sorted(path.name for path in (lab / "volumes").iterdir()) == ["two"]


def test_a_guest_whose_cable_is_pulled_is_off_the_bridge(lab: Path) -> None:
    spec = HostSpec("gpu01", "10.66.0.101", "10.66.0.1", lower=lab, upper=lab)
    assert "--network-veth" not in host.command(spec, lab)
    pulled = host.command(replace(spec, link_up=False), lab)
    assert "--network-veth" in pulled
    assert not any(word.startswith("--network-bridge") for word in pulled)
