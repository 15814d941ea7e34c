# SPDX-License-Identifier: MIT
"""What a VM's configuration should be, and the least change that makes it so."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError, Guest, Node
from inventory.schema import DataDisk, Image, Passthrough, PassthroughDevice
from operations.proxmox import config

NODE = Node(
    name="pve1",
    ssh_hostname="192.0.2.11",
    passthrough=Passthrough(devices=[PassthroughDevice(address="0000:01:00")]),
)
GUEST = Guest(
    name="gpu01",
    node="pve1",
    vmid=101,
    ssh_hostname="192.0.2.101",
    address=IPv4Interface("192.0.2.101/24"),
    gateway=IPv4Address("192.0.2.1"),
    ssh_public_key="ssh-ed25519 AAAAC3 a@b",
    image=Image(url="https://images.example/d.qcow2", checksum="sha256:" + 64 * "a", filename="d.qcow2"),
    data_disk=DataDisk(size_gib=200),
)
WANTED = config.declared(GUEST, NODE)

#: How PVE 9.2 read such a VM back: order and form changed, generated keys added (data/pve-transcripts).
READ_BACK = {
    **WANTED,
    "net0": "virtio=BC:24:11:DE:E2:24,bridge=vmbr0",
    "hostpci0": "pcie=1,mapping=a4000",
    "memory": "16384",
    "balloon": 0,
    "cores": 8,
    "onboot": 1,
    "protection": 1,
    "ciupgrade": 0,
    "tags": "gpulab",
    "sshkeys": quote("ssh-ed25519 AAAAC3 a@b\n", safe=""),
    "scsi0": "local-lvm:vm-101-disk-1,discard=on,iothread=1,size=64G,ssd=1",
    "scsi1": "local-lvm:vm-101-disk-2,discard=on,iothread=1,size=200G,ssd=1",
    "efidisk0": "local-lvm:vm-101-disk-0,efitype=4m,pre-enrolled-keys=0,size=4M",
    "meta": "creation-qemu=10.0.2,ctime=1795340439",
    "smbios1": "uuid=00000000-0000-0000-0000-000000000002",
    "vmgenid": "00000000-0000-0000-0000-000000000001",
    "digest": "4c7d70875c040baccb25749f0003c3ab354a0fa6",
}


def test_vm_as_pve_reads_it_back_needs_no_change() -> None:
    assert config.difference(READ_BACK, WANTED) == ({}, [])
    assert config.growth(READ_BACK, GUEST) == {}


@pytest.mark.parametrize("key", sorted(WANTED))
def test_each_declared_key_that_differs_is_set(key: str) -> None:
    setting, deleting = config.difference({**READ_BACK, key: "something-else"}, WANTED)

    assert set(setting) == {key}
    assert deleting == []


@pytest.mark.parametrize("key", sorted(WANTED))
def test_each_declared_key_that_is_absent_is_set(key: str) -> None:
    setting, _ = config.difference({name: value for name, value in READ_BACK.items() if name != key}, WANTED)

    assert setting == {key: WANTED[key]}


def test_changed_bridge_keeps_the_mac_address() -> None:
    setting, _ = config.difference({**READ_BACK, "net0": "virtio=BC:24:11:DE:E2:24,bridge=vmbr7"}, WANTED)

    assert setting == {"net0": "virtio=BC:24:11:DE:E2:24,bridge=vmbr0"}


@pytest.mark.parametrize("key", ["hostpci1", "net3", "ipconfig1"])
def test_undeclared_member_of_our_families_goes(key: str) -> None:
    assert config.difference({**READ_BACK, key: "x"}, WANTED) == ({}, [key])


@pytest.mark.parametrize("key", ["description", "scsi2", "unused0", "usb0", "numa", "hookscript"])
def test_keys_that_nobody_declared_stay(key: str) -> None:
    assert config.difference({**READ_BACK, key: "x"}, WANTED) == ({}, [])


def test_disk_grows_and_never_shrinks() -> None:
    assert config.growth({**READ_BACK, "scsi1": "l:d,size=100G"}, GUEST) == {"scsi1": "200G"}
    with pytest.raises(GpulabError, match=r"data_disk.size_gib = 200: the disk on scsi1 has 300 GiB already"):
        config.growth({**READ_BACK, "scsi1": "l:d,size=300G"}, GUEST)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.text("xyz019:/.-", min_size=1)), unique_by=lambda pair: pair[0])
)
def test_order_of_options_means_nothing(pairs: list[tuple[str, str]]) -> None:
    words = [f"{key}={value}" for key, value in pairs]

    assert config.canonical("hostpci0", ",".join(words)) == config.canonical("hostpci0", ",".join(reversed(words)))


@given(st.dictionaries(st.sampled_from([*WANTED, "description", "hostpci4"]), st.text("abc=,:1", max_size=12)))
def test_applying_the_difference_leaves_none(current: dict[str, str]) -> None:
    setting, deleting = config.difference(current, WANTED)
    after = {key: value for key, value in {**current, **setting}.items() if key not in deleting}

    assert config.difference(after, WANTED) == ({}, [])


@pytest.mark.parametrize(
    ("tags", "ours"), [("gpu;gpulab", True), ("gpulab-old", False), ("", False), ("a, gpulab", True)]
)
def test_vm_is_ours_by_its_tag(tags: str, ours: bool) -> None:
    assert config.is_ours({"tags": tags}) is ours
