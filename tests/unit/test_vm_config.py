# SPDX-License-Identifier: MIT
"""Whatever an inventory declares, PVE's way of writing it down is no difference, and one change is enough.

`pve_rewrite` is written from what PVE 8.4 and 9.2 made of such values (notes, 11.5), not from operations/.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inventory import Guest, Node
from inventory.schema import Passthrough, PassthroughDevice
from operations.proxmox import config

NODE = Node(
    name="pve1",
    ssh_hostname="192.0.2.11",
    passthrough=Passthrough(devices=[PassthroughDevice(address="0000:01:00")]),
)
BASE: dict[str, Any] = {
    "name": "gpu01",
    "node": "pve1",
    "vmid": 101,
    "ssh_hostname": "192.0.2.101",
    "ssh_public_key": "ssh-ed25519 AAAAC3 a+b@c",
    "image": {"url": "https://images.example/d.qcow2", "checksum": "sha256:" + 64 * "a", "filename": "d.qcow2"},
}
SIMPLE = {"address": "192.0.2.101/24", "gateway": "192.0.2.1"}
TRUE, FALSE = ("1", "on", "yes", "true"), ("0", "off", "no", "false")
INTEGERS = ("cores", "balloon", "onboot", "numa", "protection", "ciupgrade")
SHORT = {"machine": "type", "cpu": "cputype", "vga": "type", "agent": "enabled", "memory": "current"}


def guest(**changes: Any) -> Guest:
    return Guest.model_validate({**BASE, **({} if "networks" in changes else SIMPLE), **changes})


macs = st.lists(st.integers(0, 255), min_size=3, max_size=3).map(
    lambda tail: "bc:24:11:" + ":".join(f"{byte:02x}" for byte in tail)
)
cards = st.fixed_dictionaries(
    {"bridge": st.sampled_from(["vmbr0", "vmbr1"])},
    optional={
        "vlan": st.integers(1, 4094),
        "mtu": st.sampled_from([1, 1500, 9000]),
        "mac": st.one_of(macs, macs.map(str.upper)),
        "address": st.sampled_from(["198.51.100.7/24", "203.0.113.9/28"]),
    },
)
networks = st.lists(cards, max_size=3, unique_by=lambda card: card.get("mac", str(card)).lower()).map(
    lambda others: [{"address": "192.0.2.101/24", "gateway": "192.0.2.1"}, *others]
)
numa = st.sampled_from(
    [
        {},
        {"numa": False},
        {"numa": True},
        {"numa": True, "hugepages": "1G"},
        {"numa_nodes": [{"cpus": "0-3,7", "memory_mib": 16384, "host_nodes": "0,2", "policy": "bind"}]},
        {"numa_nodes": [{"cpus": "0-3", "memory_mib": 8192}, {"cpus": "4-7", "memory_mib": 8192}], "hugepages": "2M"},
    ]
)
lines = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=20)
options = st.fixed_dictionaries(
    {},
    optional={
        "cores": st.integers(1, 64),
        "cpu_type": st.sampled_from(["host", "x86-64-v3", "custom-gpu"]),
        "machine": st.sampled_from(["q35", "pc-q35-9.2+pve1"]),
        "gpu": st.sampled_from(["a4000", None]),
        "onboot": st.booleans(),
        "protection": st.booleans(),
        "tags": st.lists(st.sampled_from(["gpu", "lab-1", "z_1"]), max_size=3),
        "description": st.lists(lines, max_size=3).map("\n".join),
        "affinity": st.sampled_from(["0-3", "0,5,8-11"]),
        "startup": st.sampled_from([{"order": 3}, {"up_s": 10, "down_s": 5}, {"order": 0, "up_s": 1}]),
        "nameserver": st.sampled_from(["192.0.2.53", ["192.0.2.53", "2001:db8::53"]]),
        "searchdomain": st.just("lab.example"),
        "networks": networks,
        "system_disk_gib": st.sampled_from([64, 96]),
        "data_disk": st.sampled_from([{}, {"backup": False}, {"backup": True}]),
    },
)
guests = st.builds(lambda some, more: guest(**some, **more), options, numa)


def pve_rewrite(keys: dict[str, str], draw: Any) -> dict[str, Any]:
    """How PVE reads back what was sent. Where it keeps the text, any other form of the same value is drawn."""
    return {key: value for key in keys if (value := _rewritten(key, keys[key], draw)) not in ("", None)}


def _rewritten(key: str, value: str, draw: Any) -> Any:
    if key in INTEGERS:
        return int(value)
    if key == "tags":
        separator = draw(st.sampled_from([";", ",", " "]))
        return ";".join(sorted(set(value.replace(";", separator).lower().split(separator))))
    if key == "description":
        return value.rstrip()
    if key == "sshkeys":
        return value if draw(st.booleans()) else value.removesuffix("%0A")
    if re.fullmatch(r"net\d", key):
        model, *rest = value.split(",")
        card = model if "=" in model else f"{model}={draw(macs).upper()}"
        return ",".join([card, *sorted(rest)])
    if re.fullmatch(r"scsi\d", key):
        volume, *rest = value.split(",")
        return ",".join([volume.removeprefix("file="), *sorted(as_numbers(word) for word in rest)])
    if key in SHORT or re.fullmatch(r"(hostpci|ipconfig|numa)\d|startup", key):
        return _another_form(key, value, draw)
    return value


def as_numbers(option: str) -> str:
    """on and off of a disk's booleans are read back as 1 and 0; `discard` is a word of its own."""
    name, _, text = option.partition("=")
    if name not in ("iothread", "ssd", "backup"):
        return option
    return f"{name}={int(text in TRUE)}"


def _another_form(key: str, value: str, draw: Any) -> str:
    words = draw(st.permutations(value.split(",")))
    for number, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name in ("pcie", "enabled") and equals:
            words[number] = f"{name}={draw(st.sampled_from(TRUE if text == '1' else FALSE))}"
        elif not equals and draw(st.booleans()):
            words[number] = f"{SHORT[key]}={word}"
    if re.fullmatch(r"hostpci\d", key) and draw(st.booleans()):
        words.append("rombar=1")
    return ",".join(words)


def disk_as_read(volume: str, size: str, backed_up: bool, draw: Any) -> str:
    """A disk with our options in whatever form, and with options of somebody else."""
    true = st.sampled_from(TRUE)
    words = [f"discard={draw(true)}", f"iothread={draw(true)}", f"ssd={draw(true)}", f"size={size}"]
    words += draw(st.sampled_from([[], [f"backup={draw(true)}"]])) if backed_up else [f"backup={draw(others_words)}"]
    words += draw(st.lists(st.sampled_from(OTHERS_OPTIONS), unique=True, max_size=2))
    return ",".join([draw(st.sampled_from(["", "file="])) + volume, *draw(st.permutations(words))])


others_words = st.sampled_from(FALSE)
OTHERS_OPTIONS = ("cache=writeback", "aio=native", "mbps_rd=10")


def as_read(declared: Guest, draw: Any) -> dict[str, Any]:
    """A VM that was made as declared, as GET config shows it."""
    keys = {**config.declared(declared, NODE), **config.root_declared(declared)}
    return {
        **pve_rewrite(keys, draw),
        "scsi0": disk_as_read("local-lvm:vm-101-disk-1", f"{declared.system_disk_gib}G", True, draw),
        "scsi1": disk_as_read("local-zfs:vm-101-disk-2", "204800M", declared.data_disk.backup, draw),
        "efidisk0": "local-lvm:vm-101-disk-0,efitype=4m,pre-enrolled-keys=0,size=4M",
        "ide2": "local-lvm:vm-101-cloudinit,media=cdrom,size=4M",
        "smbios1": "uuid=00000000-0000-0000-0000-000000000002",
        "vmgenid": "00000000-0000-0000-0000-000000000001",
        "meta": "creation-qemu=10.1.2,ctime=1795340439",
        "digest": "4c7d70875c040baccb25749f0003c3ab354a0fa6",
    }


@settings(max_examples=300, deadline=None)
@given(guests, st.data())
def test_no_rewriting_of_pve_is_a_difference(declared: Guest, data: st.DataObject) -> None:
    assert not config.change(as_read(declared, data.draw), declared, NODE)


@settings(max_examples=300, deadline=None)
@given(guests, guests, st.data())
def test_one_change_settles(before: Guest, after: Guest, data: st.DataObject) -> None:
    after = after.model_copy(update={"system_disk_gib": max(before.system_disk_gib, after.system_disk_gib)})
    found = as_read(before, data.draw)

    change = config.change(found, after, NODE)
    sent = {key: value for key, value in change.keys.items() if value is not None}
    now = {key: value for key, value in found.items() if key not in change.keys} | pve_rewrite(sent, data.draw)
    for disk, size in change.growing.items():
        now[disk] = re.sub(r"size=\w+", f"size={size}", now[disk])

    assert not config.change(now, after, NODE)


@settings(max_examples=200, deadline=None)
@given(guests, guests, st.data())
def test_change_keeps_addresses_of_cards_and_what_nobody_declared(
    before: Guest, after: Guest, data: st.DataObject
) -> None:
    found = {**as_read(before, data.draw), "usb0": "spice", "scsi5": "local-lvm:vm-101-disk-9", "cpulimit": "3"}
    change = config.change(
        found, after.model_copy(update={"system_disk_gib": max(before.system_disk_gib, after.system_disk_gib)}), NODE
    )

    assert not {"usb0", "cpulimit", "smbios1", "vmgenid", "meta"} & set(change.keys)
    assert not [key for key in change.keys if re.match("scsi[0-9]|ide|efidisk|unused", key) and key not in change.disks]
    for number, card in enumerate(after.cards):
        sent, old = change.setting.get(f"net{number}"), str(found.get(f"net{number}", ""))
        if sent is not None and old and card.mac is None:
            assert sent.split(",")[0] == old.split(",")[0]


DISK_WORDS = {
    "discard": st.sampled_from(["on", "ignore"]),
    "iothread": st.sampled_from([*TRUE, *FALSE]),
    "ssd": st.sampled_from([*TRUE, *FALSE]),
    "backup": st.sampled_from([*TRUE, *FALSE]),
    "cache": st.sampled_from(["none", "writeback"]),
    "aio": st.sampled_from(["native", "io_uring"]),
    "mbps_rd": st.just("10"),
}
disk_options = st.fixed_dictionaries({}, optional=DISK_WORDS)


@settings(max_examples=300, deadline=None)
@given(disk_options, disk_options, st.booleans(), st.booleans(), st.data())
def test_options_of_disks_settle_on_the_volume_that_is_there(
    system: dict[str, str], data_disk: dict[str, str], in_backups: bool, backups: bool, data: st.DataObject
) -> None:
    """Options that nobody declares stay as they are, and so do the sizes."""
    wanted = guest(data_disk={"backup": in_backups}, **({"backup": {"spare_vmid": 900}} if backups else {}))
    found = {}
    for key, options in (("scsi0", system), ("scsi1", data_disk)):
        size = "size=64G" if key == "scsi0" else "size=200G"
        words = data.draw(st.permutations([*(f"{name}={text}" for name, text in options.items()), size]))
        found[key] = ",".join([f"local-lvm:vm-101-{key}", *words])

    change = config.change(found, wanted, NODE)
    assert not {"scsi0", "scsi1"} & {*change.setting, *change.deleting}
    now = {**found, **pve_rewrite(dict(change.disks), data.draw)}

    assert not config.change(now, wanted, NODE).disks
    for key, options in (("scsi0", system), ("scsi1", data_disk)):
        before, after = found[key].split(","), now[key].split(",")
        assert after[0] == before[0]
        kept = [name for name in options if name in ("cache", "aio", "mbps_rd")]
        kept += ["backup"] if key == "scsi0" or (in_backups and not backups) else []
        for name in (*kept, "size"):
            values = [[as_numbers(word) for word in disk if word.startswith(f"{name}=")] for disk in (before, after)]
            assert values[0] == values[1]
        assert {"discard=on", "iothread=1", "ssd=1"} <= {as_numbers(word) for word in after}
    assert ("backup=0" in map(as_numbers, now["scsi1"].split(","))) == (
        not in_backups or (not backups and data_disk.get("backup") in FALSE)
    )


def test_what_a_running_vm_takes_of_a_disk_is_known_beforehand() -> None:
    plain = "local-lvm:vm-101-disk-2,discard=on,iothread=1,size=200G,ssd=1"
    left_out = guest(data_disk={"backup": False})

    assert config.change({**config.declared(left_out, NODE), "scsi1": plain}, left_out, NODE).restart == []
    other = plain.replace("iothread=1,", "")
    assert config.change({**config.declared(left_out, NODE), "scsi1": other}, left_out, NODE).restart == ["scsi1"]


@pytest.mark.parametrize(
    ("value", "pending", "expected"),
    [
        ("l:vm-101-disk-1,ssd=1", "l:vm-101-disk-1,discard=on,ssd=1", ["scsi0"]),
        # Another volume is nobody's but whoever put it there.
        ("l:vm-101-disk-1,ssd=1", "l:vm-101-disk-7,discard=on,ssd=1", []),
        ("l:vm-101-disk-1,ssd=1", "file=l:vm-101-disk-1,ssd=on,backup=1", []),
    ],
)
def test_options_that_wait_are_ours_and_volumes_are_not(value: str, pending: str, expected: list[str]) -> None:
    entry = {"key": "scsi0", "value": value, "pending": pending}

    assert config.own_disks_waiting([entry, {"key": "scsi4", "value": "a:b", "pending": "a:b,ssd=1"}]) == expected


@given(guests)
def test_every_changed_key_can_be_named(declared: Guest) -> None:
    """A new VM's keys are all set, by the token or by root, and none by both."""
    change = config.change({}, declared, NODE)

    assert not set(change.setting) & set(change.root_setting)
    assert set(change.root_setting) <= {"affinity", "hugepages", "startup"}
    assert not {"affinity", "hugepages", "startup"} & set(change.setting)


FULL = guest(
    networks=[
        {"bridge": "vmbr0", "address": "192.0.2.101/24", "gateway": "192.0.2.1"},
        {"bridge": "vmbr1", "vlan": 30, "mtu": 9000, "mac": "bc:24:11:00:00:02"},
    ],
    nameserver=["192.0.2.53", "192.0.2.54"],
    searchdomain="lab.example",
    numa_nodes=[{"cpus": "0-3,7", "memory_mib": 16384, "host_nodes": "0", "policy": "bind"}],
    affinity="0-7",
    hugepages="1G",
    startup={"order": 2, "up_s": 30, "down_s": 60},
    tags=["gpu"],
)


def test_declared_values_have_the_form_that_pve_documents() -> None:
    keys = config.declared(FULL, NODE)

    assert keys["net0"] == "virtio,bridge=vmbr0"
    assert keys["net1"] == "virtio=BC:24:11:00:00:02,bridge=vmbr1,mtu=9000,tag=30"
    assert (keys["ipconfig0"], keys["ipconfig1"]) == ("ip=192.0.2.101/24,gw=192.0.2.1", "ip=dhcp")
    assert (keys["nameserver"], keys["searchdomain"]) == ("192.0.2.53 192.0.2.54", "lab.example")
    assert (keys["numa"], keys["numa0"]) == ("1", "cpus=0-3;7,memory=16384,hostnodes=0,policy=bind")
    assert keys["tags"] == "gpu;gpulab"
    assert unquote(keys["sshkeys"]) == "ssh-ed25519 AAAAC3 a+b@c\n"
    assert config.root_declared(FULL) == {"affinity": "0-7", "hugepages": "1024", "startup": "order=2,up=30,down=60"}


def test_other_mac_than_the_declared_one_is_replaced() -> None:
    current = {**config.declared(FULL, NODE), "net1": "virtio=BC:24:11:00:00:99,bridge=vmbr1,mtu=9000,tag=30"}

    assert config.difference(current, config.declared(FULL, NODE))[0] == {
        "net1": "virtio=BC:24:11:00:00:02,bridge=vmbr1,mtu=9000,tag=30"
    }


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("affinity", "0-3", ("affinity",)),
        ("hugepages", "1024", ("hugepages",)),
        ("startup", "order=1", ()),
    ],
)
def test_root_only_families_that_nobody_declares_go(key: str, value: str, expected: tuple[str, ...]) -> None:
    plain = guest()
    change = config.change({**config.declared(plain, NODE), key: value}, plain, NODE)

    assert (change.setting, change.deleting, change.root_deleting) == ({}, (), expected)


def test_numa_nodes_are_ours_only_where_numa_is_declared() -> None:
    node = {"numa0": "cpus=0,memory=1", "numa1": "cpus=1,memory=1"}

    assert config.difference({**config.declared(guest(), NODE), **node}, config.declared(guest(), NODE)) == ({}, [])
    wanted = config.declared(FULL, NODE)
    assert config.difference({**wanted, **node, "numa0": wanted["numa0"]}, wanted) == ({}, ["numa1"])


def test_marker_of_a_rebuild_survives_a_new_description() -> None:
    marker = "gpulab-rebuild old=local-lvm:vm-101-disk-1 run=me"
    declared = guest(description="ours")
    current = config.declared(declared, NODE)

    assert config.difference({**current, "description": f"ours\n{marker}"}, current) == ({}, [])
    setting, _ = config.difference({**current, "description": f"theirs\n{marker}"}, current)
    assert setting == {"description": f"ours\n{marker}"}


@pytest.mark.parametrize(
    ("change", "restart"),
    [
        ({"onboot": False, "tags": ["x"], "description": "d", "nameserver": "192.0.2.53", "protection": False}, []),
        ({"startup": {"order": 1}}, []),
        ({"cores": 2}, ["cores"]),
        ({"gpu": None}, ["hostpci0"]),
        ({"affinity": "0-3", "numa": True, "hugepages": "any"}, ["affinity", "hugepages", "numa"]),
    ],
)
def test_what_a_running_vm_cannot_take_is_known_beforehand(change: dict[str, Any], restart: list[str]) -> None:
    assert config.change(config.declared(guest(), NODE), guest(**change), NODE).restart == restart


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"key": "cores", "value": 2, "pending": 4}, ["cores"]),
        ({"key": "cores", "value": 2}, []),
        ({"key": "memory", "value": "2048", "pending": "current=2048"}, []),
        (
            {
                "key": "net0",
                "value": "virtio=BC:24:11:00:00:01,bridge=a",
                "pending": "virtio=BC:24:11:00:00:02,bridge=a",
            },
            ["net0"],
        ),
        ({"key": "hostpci1", "value": "mapping=x", "delete": 1}, ["hostpci1"]),
        ({"key": "hostpci1", "delete": 1}, []),
        ({"key": "ipconfig0", "pending": "ip=dhcp"}, ["ipconfig0"]),
    ],
)
def test_stale_pending_values_are_nothing_to_wait_for(entry: dict[str, Any], expected: list[str]) -> None:
    assert config.waiting([entry]) == expected


def test_pending_key_of_others_is_told_from_ours() -> None:
    ours = [
        key
        for key in ("cores", "hostpci3", "affinity", "usb0", "scsi4", "numa0", "args")
        if config.is_declared(key, guest(), NODE)
    ]

    assert ours == ["cores", "hostpci3", "affinity"]
    assert config.is_declared("numa7", FULL, NODE)
