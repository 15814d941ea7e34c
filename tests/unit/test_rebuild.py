# SPDX-License-Identifier: MIT
"""Where a rebuild stands and what comes next, from the VM's configuration alone, in every state a crash can leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.schema import Guest, Node, Passthrough, PassthroughDevice
from operations.proxmox import rebuild, swap
from operations.proxmox.order import Order
from operations.proxmox.swap import Marker, Next, Stage, Subject
from operations.proxmox.vm import VmState

GIB = 2**30
OLD, NEW, DATA = "lvm:vm-101-disk-1", "lvm:vm-101-disk-3", "lvm:vm-101-disk-2"
NODE = Node(
    name="pve1", ssh_hostname="192.0.2.11", passthrough=Passthrough(devices=[PassthroughDevice(address="0000:01:00")])
)
GUEST = Guest.model_validate(
    {
        "name": "gpu01",
        "ssh_hostname": "192.0.2.101",
        "node": "pve1",
        "vmid": 101,
        "address": "192.0.2.101/24",
        "gateway": "192.0.2.1",
        "disk_storage": "lvm",
        "ssh_public_key": "ssh-ed25519 AAAA a@b",
        "image": {
            "url": "https://images.example/debian-13.qcow2",
            "checksum": "sha256:" + 64 * "a",
            "filename": "debian-13.qcow2",
        },
    }
)
PLAIN: dict[str, Any] = {
    "name": "gpu01",
    "tags": "gpulab",
    "description": "hands off",
    "smbios1": "uuid=5F0E2E9C-0000-4000-8000-000000000001",
    "net0": "virtio=BC:24:11:AA:BB:CC,bridge=vmbr0",
    "efidisk0": "lvm:vm-101-disk-0,efitype=4m,size=528K",
    "ide2": "lvm:vm-101-cloudinit,media=cdrom,size=4M",
    "scsi0": f"{OLD},cache=writeback,discard=on,iothread=1,size=64G,ssd=1",
    "scsi1": f"{DATA},discard=on,size=200G",
}
SIZES = {"lvm:vm-101-disk-0": 4 * 2**20, "lvm:vm-101-cloudinit": 4 * 2**20, OLD: 64 * GIB, DATA: 200 * GIB}
MARK = swap.first_mark(Subject(VmState("stopped", config=PLAIN), sizes=SIZES), GUEST, "me@here:1:1")


def marked(config: Mapping[str, Any], mark: Marker | None = MARK, **keys: Any) -> dict[str, Any]:
    merged = {**config, "description": swap.described(config, mark), **keys}
    return {key: value for key, value in merged.items() if value is not None}


BEFORE = marked(PLAIN)
SWAPPED = marked(PLAIN, scsi0=f"{NEW},discard=on,size=3G", unused0=OLD)
VERIFIED = marked(SWAPPED, replace(MARK, verified=1))
DELETED = marked(SWAPPED, replace(MARK, verified=1), unused0=None)


# The marker.


def test_marker_is_read_back_as_it_was_written() -> None:
    mark = replace(MARK, kept=("lvm:vm-101-disk-8",), waste=(f"{NEW}@{3 * GIB}",), verified=7, until=8)

    assert swap.marker({"description": f"text\n{mark.line()}\nmore"}) == mark
    assert swap.marker(PLAIN) is None
    assert swap.marker({}) is None


def test_marker_names_old_volume_run_and_identity() -> None:
    assert MARK.line() == (
        f"gpulab-rebuild old={OLD} run=me@here:1:1 bytes={64 * GIB} "
        "options=cache=writeback,discard=on,iothread=1,ssd=1 "
        f"uuid=5f0e2e9c-0000-4000-8000-000000000001 mac=net0=bc:24:11:aa:bb:cc data=scsi1={DATA}"
    )


def test_other_lines_of_the_description_stay() -> None:
    text = swap.described({"description": "one\ngpulab-rebuild old=x run=y\n\ntwo"}, MARK)

    assert text.splitlines() == ["one", "", "two", MARK.line()]
    assert swap.described({"description": text}, None) == "one\n\ntwo"


def test_nonsense_in_the_marker_is_no_state() -> None:
    assert swap.stage({**PLAIN, "description": "gpulab-rebuild bytes=many verified=yes"}) is Stage.IDLE


# How far it has come.


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, Stage.IDLE),
        (BEFORE, Stage.BEFORE),
        (SWAPPED, Stage.SWAPPED),
        (VERIFIED, Stage.VERIFIED),
        (DELETED, Stage.DELETED),
        # Another number than unused0, beside an unused volume of somebody's.
        (marked(SWAPPED, unused0="lvm:vm-101-disk-7", unused5=OLD), Stage.SWAPPED),
        # unused0 was given away again: the key is there, the volume is another.
        (marked(SWAPPED, unused0="lvm:vm-101-disk-7"), Stage.DELETED),
        # The freed name was given to a disk that the VM uses.
        (marked(VERIFIED, unused0=None, scsi2=f"{OLD},size=8G"), Stage.DELETED),
        (marked(VERIFIED, scsi2=f"{OLD},size=8G"), Stage.DELETED),
        # Rolled back: the marker only names what may go.
        (marked({**PLAIN, "unused0": NEW}, Marker(run="r", waste=(f"{NEW}@1",))), Stage.IDLE),
        # The system disk was taken away by hand.
        (marked(SWAPPED, scsi0=None), Stage.SWAPPED),
    ],
)
def test_stage_is_told_by_volume_ids(config: dict[str, Any], expected: Stage) -> None:
    assert swap.stage(config) is expected


def test_volume_of_another_size_under_the_old_name_is_not_the_old_disk() -> None:
    assert swap.stage(VERIFIED, {**SIZES, OLD: 8 * GIB}) is Stage.DELETED
    assert swap.stage(VERIFIED, SIZES) is Stage.VERIFIED


# What comes next.


@pytest.mark.parametrize(
    ("config", "running", "run", "expected"),
    [
        (None, False, "me@here:1:1", Next.CREATE),
        (PLAIN, True, "me@here:1:1", Next.STOP),
        (PLAIN, False, "me@here:1:1", Next.MARK),
        (BEFORE, False, "me@here:1:1", Next.IMPORT),
        (BEFORE, True, "me@here:1:1", Next.STOP),
        (BEFORE, False, "me@here:2:2", Next.MARK),
        (SWAPPED, False, "me@here:1:1", Next.PREPARE),
        (SWAPPED, True, "me@here:1:1", Next.DEPLOY),
        (SWAPPED, False, "me@here:2:2", Next.MARK),
        # The new system is never stopped for a run that goes on.
        (SWAPPED, True, "me@here:2:2", Next.MARK),
        (VERIFIED, True, "me@here:2:2", Next.MARK),
        (VERIFIED, True, "me@here:1:1", Next.DEPLOY),
        (DELETED, True, "me@here:1:1", Next.DEPLOY),
        (DELETED, False, "me@here:1:1", Next.DEPLOY),
    ],
)
def test_next_step_of_a_rebuild(config: dict[str, Any] | None, running: bool, run: str, expected: Next) -> None:
    assert swap.next_step(config, running, run) is expected


def test_leftovers_go_before_the_import_only() -> None:
    assert swap.next_step(BEFORE, False, MARK.run, [NEW]) is Next.CLEAN
    assert swap.next_step(SWAPPED, False, MARK.run, ["lvm:vm-101-disk-9"]) is Next.PREPARE


def test_note_of_waste_that_is_gone_goes_before_the_import() -> None:
    """The import may be given the name that was freed."""
    noted = marked(PLAIN, replace(MARK, waste=(f"{NEW}@1",)))

    assert swap.next_step(noted, False, MARK.run, []) is Next.CLEAN


GOING_BACK = swap.going_back(MARK, SWAPPED, {NEW: 64 * GIB})


@pytest.mark.parametrize(
    ("config", "running", "run", "expected"),
    [
        (SWAPPED, True, MARK.run, Next.STOP),
        (VERIFIED, True, MARK.run, Next.STOP),
        # The new disk must be noted before it becomes one unusedN among others.
        (SWAPPED, False, MARK.run, Next.MARK),
        (marked(SWAPPED, GOING_BACK), False, MARK.run, Next.PUT_BACK),
        (marked(SWAPPED, GOING_BACK), False, "me@here:2:2", Next.MARK),
        (marked({**PLAIN, "unused0": NEW}, GOING_BACK), False, MARK.run, Next.START),
        (BEFORE, True, MARK.run, Next.START),
    ],
)
def test_next_step_of_a_rollback(config: dict[str, Any], running: bool, run: str, expected: Next) -> None:
    assert swap.next_step(config, running, run, rollback=True) is expected


def test_run_that_takes_over_before_the_swap_takes_the_vm_as_it_is() -> None:
    changed = {**BEFORE, "scsi2": "lvm:vm-101-disk-6,size=8G"}

    assert swap.taken_over(MARK, changed, "me@here:2:2").data == f"scsi1={DATA},scsi2=lvm:vm-101-disk-6"
    # After it, the VM must be what it was.
    assert swap.taken_over(MARK, {**SWAPPED, "scsi2": "lvm:vm-101-disk-6"}, "x").data == f"scsi1={DATA}"


# What may be freed.


def left(config: Mapping[str, Any], **sizes: int) -> list[str]:
    volumes = {**SIZES, **{f"lvm:vm-101-disk-{name[1:]}": size for name, size in sizes.items()}}
    return swap.leftovers(config, volumes, "lvm", 101)


def test_orphan_of_a_killed_import_may_go() -> None:
    assert left(BEFORE, d3=3 * GIB) == [NEW]


def test_orphan_from_before_the_rebuild_stays() -> None:
    """It may be the data disk of an earlier VM."""
    assert left(marked(PLAIN, replace(MARK, kept=(NEW,))), d3=3 * GIB) == []
    assert left(PLAIN, d3=3 * GIB) == []


@pytest.mark.parametrize(
    "volid", ["lvm:vm-102-disk-0", "lvm:base-101-disk-0", "lvm:vm-101-state-x", "dir:vm-101-disk-3"]
)
def test_only_disks_of_this_vm_on_its_storage_are_orphans(volid: str) -> None:
    assert swap.leftovers(BEFORE, {**SIZES, volid: 1}, "lvm", 101) == []


def test_orphan_on_a_directory_is_known_by_its_file_name() -> None:
    assert swap.orphans({}, {"dir:101/vm-101-disk-3.qcow2": 1}, "dir", 101) == ["dir:101/vm-101-disk-3.qcow2"]


def test_waste_of_a_rollback_may_go_while_it_is_the_same_volume() -> None:
    config = marked({**PLAIN, "unused0": NEW}, replace(MARK, waste=(f"{NEW}@{3 * GIB}",)))

    assert left(config, d3=3 * GIB) == [NEW]
    assert left(config, d3=4 * GIB) == []


@pytest.mark.parametrize("volid", [OLD, DATA])
def test_waste_is_never_the_system_disk_or_a_data_disk(volid: str) -> None:
    """Even where the marker says so: PVE gives freed names away again."""
    assert left(marked(PLAIN, replace(MARK, waste=(f"{volid}@{SIZES[volid]}",)))) == []
    assert left(marked(SWAPPED, replace(MARK, waste=(f"{volid}@{SIZES[volid]}",))), d3=3 * GIB) == []


def test_data_disk_that_was_detached_during_the_rebuild_is_no_leftover() -> None:
    config = marked(PLAIN, replace(MARK, waste=(f"{DATA}@{200 * GIB}",)), scsi1=None, unused0=DATA)

    assert left(config) == []


def test_waste_is_carried_over_only_while_it_is_the_same_and_lies_idle() -> None:
    gone, resized, attached = "lvm:vm-101-disk-7@1", "lvm:vm-101-disk-8@1", f"{DATA}@{200 * GIB}"
    before = Marker(run="r", waste=(f"{NEW}@1", gone, resized, attached))
    rolled_back = marked({**PLAIN, "unused0": NEW, "unused1": "lvm:vm-101-disk-8"}, before)
    sizes = {**SIZES, NEW: 1, "lvm:vm-101-disk-8": 2}
    mark = swap.first_mark(Subject(VmState("stopped", config=rolled_back), sizes=sizes), GUEST, "r2")

    assert (mark.waste, mark.kept) == ((f"{NEW}@1",), ())


def test_orphan_that_a_rollback_noted_is_carried_over() -> None:
    """Else it would be taken for a volume that was there before every rebuild."""
    rolled_back = marked(PLAIN, Marker(run="r", waste=(f"{NEW}@1",)))
    sizes = {**SIZES, NEW: 1, "lvm:vm-101-disk-9": 5}
    mark = swap.first_mark(Subject(VmState("stopped", config=rolled_back), sizes=sizes), GUEST, "r2")

    assert (mark.waste, mark.kept) == ((f"{NEW}@1",), ("lvm:vm-101-disk-9",))


def test_adopted_orphan_is_no_data_disk() -> None:
    config = marked(PLAIN, replace(MARK, waste=(f"{NEW}@{3 * GIB}",)), scsi30=NEW)

    assert swap.data_disks(config) == {"scsi1": DATA}
    assert left(config, d3=3 * GIB) == [NEW]


# Who the VM is.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"smbios1": "uuid=00000000-0000-4000-8000-000000000002"}, "its SMBIOS UUID was 5f0e2e9c"),
        ({"net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0"}, "the MAC address of net0 was bc:24:11:aa:bb:cc"),
        ({"scsi1": "lvm:vm-101-disk-9,size=200G"}, f"the data disk on scsi1 was {DATA}, it is lvm:vm-101-disk-9"),
        ({"scsi1": None}, f"the data disk on scsi1 was {DATA}, it is gone"),
    ],
)
def test_changed_identity_is_named(keys: dict[str, Any], words: str) -> None:
    found = swap.changed_identity(marked(SWAPPED, **keys))

    assert len(found) == 1
    assert found[0].startswith(words)


def test_what_the_vm_gained_is_no_change_of_identity() -> None:
    assert swap.changed_identity(SWAPPED) == []
    assert swap.changed_identity(marked(SWAPPED, scsi2="lvm:vm-101-disk-6", net1="virtio=BC:24:11:00:00:09")) == []


# Why it cannot be rebuilt.


def subject(config: Mapping[str, Any] = PLAIN, **changes: Any) -> Subject:
    lock = changes.pop("lock", None)
    known = Subject(VmState("running", lock=lock, config=config), sizes=SIZES, free=64 * GIB)
    return replace(known, **changes)


def test_vm_in_order_has_no_problem() -> None:
    assert swap.problems(subject(), GUEST, NODE) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lock": "backup"}, "it is locked (backup)"),
        ({"pending": ("memory",)}, "it has pending changes (memory); restart it or revert them first"),
        ({"snapshots": ("s1", "s2")}, "it has snapshots (s1, s2); delete them first"),
        ({"image": False}, "the image local:import/debian-13.qcow2 is not on the node"),
        ({"free": 63 * GIB}, "storage lvm has 63 GiB left; a second system disk needs 64 GiB"),
        ({"config": {key: PLAIN[key] for key in PLAIN if key != "scsi0"}}, "it has no system disk on scsi0"),
        (
            {"config": {key: PLAIN[key] for key in PLAIN if key != "scsi1"}},
            "it has no data disk; expected one on scsi1",
        ),
        ({"config": {**PLAIN, "scsi30": "lvm:vm-101-disk-0"}}, "scsi30 is in use (lvm:vm-101-disk-0)"),
    ],
)
def test_problem_is_named(changes: dict[str, Any], words: str) -> None:
    found = swap.problems(subject(**changes), GUEST, NODE)

    assert found
    assert found[0].startswith(words)


def test_space_that_a_leftover_takes_counts_as_free() -> None:
    """Else a run killed in the import could not go on."""
    mine = subject(BEFORE, sizes={**SIZES, NEW: 60 * GIB}, free=4 * GIB)

    assert swap.problems(mine, GUEST, NODE) == []


def test_swapped_vm_needs_no_space_but_must_be_the_same() -> None:
    assert swap.problems(subject(SWAPPED, free=0, snapshots=("s1",)), GUEST, NODE) == []
    assert swap.problems(subject(marked(SWAPPED, scsi1=None)), GUEST, NODE) == [
        f"the data disk on scsi1 was {DATA}, it is gone"
    ]


def test_new_disk_keeps_options_that_nobody_declares() -> None:
    assert swap.new_disk(PLAIN, GUEST, NODE) == (
        "lvm:0,import-from=local:import/debian-13.qcow2,discard=on,iothread=1,ssd=1,cache=writeback"
    )


# Verify.


def test_new_system_is_measured_in_full_before_the_old_disk_goes() -> None:
    words = rebuild.verify_command(GUEST, Order("inventory/lab.py", "run", data=("cores=3",)), Path("/reports"))

    assert words[1:4] == ["-m", "pytest", "verify"]
    assert " ".join(words[6:]) == "--limit gpu01 --report /reports --benchmarks full --drain --data cores=3"
