# SPDX-License-Identifier: MIT
"""Where a destruction stands and what comes next, from the two VMs and their volumes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from operations.proxmox import keeper, swap
from operations.proxmox.keeper import Act, Move, Next, Note, Situation
from operations.proxmox.swap import Marker, Subject
from operations.proxmox.vm_state import VmState

from .test_rebuild import DATA, GIB, GUEST, NODE, OLD, PLAIN, SIZES

MOVED, BACK = "lvm:vm-901-disk-0", "lvm:vm-101-disk-5"
VM: dict[str, Any] = {**PLAIN, "vmgenid": "old", "protection": 1}
BARE = {key: value for key, value in VM.items() if key != "scsi1"}
NEW = {**BARE, "vmgenid": "new"}
NOTE = Note(
    guest="gpu01",
    vmid=101,
    run="me",
    genid="old",
    uuid="5f0e2e9c-0000-4000-8000-000000000001",
    mac="net0=bc:24:11:aa:bb:cc",
    data=f"scsi1={DATA}@{200 * GIB}",
    options="scsi1=discard=on;ssd=1",
)
MARK = Marker(run="me", keeper=901)
MADE = replace(MARK, made=1)
AWAY = {**{volid: size for volid, size in SIZES.items() if volid != DATA}, MOVED: 200 * GIB}
THERE = {**{volid: size for volid, size in SIZES.items() if volid != DATA}, BACK: 200 * GIB}


def marked(config: Mapping[str, Any], mark: Marker, **keys: Any) -> dict[str, Any]:
    return {**config, "description": swap.described(config, mark), **keys}


def kept(note: Note = NOTE, **keys: Any) -> dict[str, Any]:
    found = {"name": "gpu01-keeper", "tags": "gpulab;gpulab-keeper", "description": note.line(), "protection": 1}
    return {**found, **keys}


HELD = kept(scsi1=f"{MOVED},discard=on,size=200G")


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        (Situation(), Next.DEPLOY),
        (Situation(VM, True, None, 901, SIZES), Next.STOP),
        (Situation(VM, False, None, 901, SIZES), Next.MARK),
        (Situation(marked(VM, MARK), False, None, 902, SIZES), Next.MARK),
        (Situation(marked(VM, replace(MARK, run="other")), False, None, 901, SIZES), Next.MARK),
        (Situation(marked(VM, MARK), False, None, 901, SIZES), Next.BACK_UP),
        (Situation(marked(VM, replace(MARK, archive="a")), False, None, 901, SIZES), Next.KEEP),
        (Situation(marked(VM, MARK), False, kept(), 901, SIZES), Next.BACK_UP),
        (Situation(marked(VM, replace(MARK, archive="a")), False, kept(), 901, SIZES), Next.MOVE_AWAY),
        (Situation(marked(VM, MARK), False, kept(replace(NOTE, run="other")), 901, SIZES), Next.MARK),
        # Killed after the rename: the key dangles, or nobody has it.
        (Situation(marked(VM, MARK), False, kept(), 901, AWAY), Next.MOVE_AWAY),
        (Situation(marked(BARE, MARK), False, kept(), 901, AWAY), Next.MOVE_AWAY),
        (Situation(marked({**BARE, "unused0": DATA}, MARK), False, HELD, 901, AWAY), Next.MOVE_AWAY),
        (Situation(marked(BARE, MARK), False, HELD, 901, AWAY), Next.DELETE),
        (Situation(None, False, HELD, 901, AWAY), Next.CREATE),
        (Situation(None, False, {**HELD, "description": replace(NOTE, run="x").line()}, 901, AWAY), Next.MARK),
        (Situation(marked(NEW, MADE), False, HELD, 901, AWAY), Next.MOVE_BACK),
        (Situation(marked(NEW, MADE), True, HELD, 901, AWAY), Next.STOP),
        # Its note was removed: the generation id still tells the new one.
        (Situation(NEW, False, HELD, 901, AWAY), Next.MARK),
        (Situation(marked(NEW, MADE), False, HELD, 901, THERE), Next.MOVE_BACK),
        (Situation(marked(NEW, MADE), False, kept(), 901, THERE), Next.MOVE_BACK),
        (Situation(marked(NEW, MADE, scsi1=BACK), False, kept(unused0=MOVED), 901, THERE), Next.MOVE_BACK),
        (Situation(marked(NEW, MADE, scsi1=BACK), False, kept(), 901, THERE), Next.REMOVE),
        (Situation(marked(NEW, MADE, scsi1=BACK), True, kept(), 901, THERE), Next.REMOVE),
        (Situation(marked(NEW, MADE, scsi1=BACK), False, None, 901, THERE, debris=True), Next.REMOVE),
        (Situation(marked(NEW, MADE, scsi1=BACK), False, None, 901, THERE), Next.DEPLOY),
        # An empty keeper of an earlier time does not make a VM the new one.
        (Situation(marked(NEW, MARK, scsi1=BACK), False, kept(), 901, THERE), Next.BACK_UP),
    ],
)
def test_next_step(now: Situation, wanted: Next) -> None:
    assert keeper.next_step(now, "me", backup=True) is wanted


def test_old_vm_without_a_generation_id_is_not_taken_for_the_new_one() -> None:
    old = {key: value for key, value in marked(BARE, MARK).items() if key != "vmgenid"}
    noted = keeper.first_note(Situation({**old, "scsi1": DATA}, False, None, 901, SIZES), GUEST, "me")
    held = kept(noted, scsi1=MOVED)

    assert not Situation(old, False, held, 901, AWAY).made
    assert Situation({**old, "vmgenid": "new"}, False, held, 901, AWAY).made


def test_note_is_read_as_it_was_written() -> None:
    noted = replace(NOTE, kept=("lvm:vm-101-disk-9", MOVED), archive="local:backup/a.vma.zst")
    config = {"description": f"somebody's words\n{noted.line()}\n"}

    assert keeper.note(config) == noted
    assert noted.disks == {"scsi1": (DATA, 200 * GIB)}
    assert keeper.described(config, NOTE).splitlines() == ["somebody's words", NOTE.line()]


def moved(source: Mapping[str, Any], target: Mapping[str, Any], sizes: Mapping[str, int], note: Note = NOTE) -> Move:
    return keeper.move("scsi1", source, target, note, sizes, 901)


def test_parts_of_a_move_and_of_its_repair() -> None:
    assert moved(VM, kept(), SIZES) == Move(Act.MOVE, "scsi1", DATA)
    assert moved(VM, kept(), AWAY) == Move(Act.ATTACH, "scsi1", MOVED)
    assert moved(BARE, kept(), AWAY) == Move(Act.ATTACH, "scsi1", MOVED)
    assert moved(VM, HELD, AWAY) == Move(Act.DROP, "scsi1", DATA)
    assert moved({**BARE, "unused0": DATA}, HELD, AWAY) == Move(Act.DROP, "unused0", DATA)
    assert moved(BARE, HELD, AWAY) == Move(Act.DONE)
    assert keeper.attached(NOTE, "scsi1", MOVED) == f"{MOVED},discard=on,ssd=1"
    assert keeper.attached(Note(), "scsi1", MOVED) == MOVED


@pytest.mark.parametrize(
    ("source", "target", "sizes", "note", "words"),
    [
        (VM, HELD, {**SIZES, **AWAY}, NOTE, f"scsi1 is {DATA} with one VM and {MOVED} with the other"),
        # The storage is not readable: nothing is taken for gone.
        (VM, kept(), {}, NOTE, f"scsi1 is {DATA}, which its storage does not list"),
        (VM, HELD, {}, NOTE, f"scsi1 is {MOVED}, which its storage does not list"),
        (VM, kept(), {**AWAY, "lvm:vm-901-disk-1": 200 * GIB}, NOTE, "that no VM names: lvm:vm-901-disk-0, lvm:vm-9"),
        (VM, kept(), {**AWAY, MOVED: 199 * GIB}, NOTE, "volumes of 200 GiB there that no VM names: none"),
        (VM, kept(), AWAY, replace(NOTE, kept=(MOVED,)), "volumes of 200 GiB there that no VM names: none"),
        (BARE, kept(), SIZES, NOTE, f"scsi1 was {DATA} and is with neither VM"),
    ],
)
def test_disk_that_cannot_be_told_is_refused(
    source: Mapping[str, Any], target: Mapping[str, Any], sizes: Mapping[str, int], note: Note, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        moved(source, target, sizes, note)


def test_unused_volume_that_its_storage_lists_is_never_dropped() -> None:
    both = {**AWAY, "lvm:vm-101-disk-8": GIB}
    assert moved({**BARE, "unused0": "lvm:vm-101-disk-8"}, HELD, both) == Move(Act.DONE)
    # Nor one of a storage whose list shows nothing of ours.
    assert moved({**BARE, "unused0": "other:vm-101-disk-8"}, HELD, AWAY) == Move(Act.DONE)


@pytest.mark.parametrize(
    ("vm", "held", "sizes", "wrong"),
    [
        (BARE, HELD, AWAY, []),
        (BARE, None, AWAY, ["there is no keeper VM with its data disks"]),
        (BARE, kept(), AWAY, [f"with the keeper: scsi1, which was {DATA} (200 GiB), is not there"]),
        (
            BARE,
            HELD,
            {**AWAY, MOVED: GIB},
            [f"with the keeper: scsi1 is {MOVED}, which has 1 GiB; it was {DATA} (200 GiB)"],
        ),
        ({**BARE, "virtio2": "lvm:x"}, HELD, AWAY, ["virtio2 is still lvm:x"]),
        ({**BARE, "unused3": "lvm:y"}, HELD, AWAY, ["unused3 is lvm:y"]),
        (
            marked({**BARE, "unused3": "lvm:y"}, Marker(waste=(f"lvm:y@{GIB}",))),
            HELD,
            {**AWAY, "lvm:y": GIB},
            [],
        ),
        (
            marked({**BARE, "unused3": "lvm:y"}, Marker(waste=(f"lvm:y@{GIB}",))),
            HELD,
            {**AWAY, "lvm:y": 2 * GIB},
            ["unused3 is lvm:y"],
        ),
    ],
)
def test_vm_with_anything_to_lose_is_not_deleted(
    vm: Mapping[str, Any], held: Mapping[str, Any] | None, sizes: Mapping[str, int], wrong: list[str]
) -> None:
    assert keeper.not_deletable(Situation(vm, False, held, 901, sizes)) == wrong


@pytest.mark.parametrize(
    ("held", "sizes", "wrong"),
    [
        (kept(), THERE, []),
        (kept(unused0="lvm:z"), THERE, ["unused0 is lvm:z"]),
        (kept(efidisk0="lvm:z,size=4M"), THERE, ["efidisk0 is lvm:z"]),
        (kept(), {**THERE, MOVED: GIB}, [f"{MOVED} is its own"]),
        (kept(replace(NOTE, kept=(MOVED,))), {**THERE, MOVED: GIB}, []),
        (kept(), AWAY, [f"with the VM: scsi1 is {BACK}, which is not listed", f"{MOVED} is its own"]),
    ],
)
def test_keeper_with_anything_to_lose_is_not_deleted(
    held: Mapping[str, Any], sizes: Mapping[str, int], wrong: list[str]
) -> None:
    found = keeper.not_removable(Situation({**NEW, "scsi1": BACK}, False, held, 901, sizes))
    assert [line[: len(start)] for line, start in zip(found, wrong, strict=True)] == wrong


def test_new_vm_has_the_old_ones_identity_and_no_data_disk() -> None:
    keys = keeper.new_keys(GUEST, NODE, NOTE, MADE)

    assert "scsi1" not in keys
    assert keys["smbios1"] == "uuid=5f0e2e9c-0000-4000-8000-000000000001"
    assert keys["net0"] == "virtio=BC:24:11:AA:BB:CC,bridge=vmbr0"
    assert swap.marker(keys) == MADE


def test_disk_that_the_vm_was_given_later_is_noted_before_it_moves() -> None:
    config = marked({**VM, "sata2": "lvm:vm-101-disk-7,ssd=1,size=8G"}, replace(MARK, archive="a"))
    sizes = {**SIZES, "lvm:vm-101-disk-7": 8 * GIB, "lvm:vm-901-disk-4": GIB}
    noted = keeper.before_move(Situation(config, False, kept(), 901, sizes), NOTE)

    assert noted.disks == {"scsi1": (DATA, 200 * GIB), "sata2": ("lvm:vm-101-disk-7", 8 * GIB)}
    assert noted.kept == ("lvm:vm-901-disk-4",)
    assert keeper.attached(noted, "sata2", "x") == "x,ssd=1"
    assert noted.archive == "a"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"unused0": "lvm:vm-101-disk-8"}, "unused0 is lvm:vm-101-disk-8, which the deletion would free"),
        ({"lock": "backup"}, "it is locked (backup)"),
    ],
)
def test_problems(keys: Mapping[str, Any], words: str) -> None:
    found = Subject(VmState("stopped", lock=keys.get("lock"), config={**VM, **keys}), sizes=SIZES, free=GIB)
    assert [line for line in keeper.problems(found, GUEST, NODE) if line.startswith(words)]


def test_space_of_the_old_system_disk_counts() -> None:
    found = Subject(VmState("stopped", config=VM), sizes=SIZES, free=0)
    assert keeper.problems(found, GUEST, NODE) == []
    small = replace(found, sizes={**SIZES, OLD: 10 * GIB})
    assert keeper.problems(small, GUEST, NODE) == [
        "storage lvm has 0 GiB left and 10 GiB of the old system disk; the new one needs 64 GiB"
    ]
