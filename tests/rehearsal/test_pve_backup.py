# SPDX-License-Identifier: MIT
"""Backups of the emulated node: vzdump, what is kept, restores, jobs; refusals in PVE's words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxmoxer import ResourceException

from rehearsal.pve import retention
from rehearsal.pve.errors import ApiError
from rehearsal.pve.testing import FakeLab

DAY = 86400
CARD = "node=pve1,path=0000:01:00,id=10de:24b0,subsystem-id=10de:14ad,iommugroup=14"


@pytest.fixture(scope="module")
def running_lab() -> Iterator[FakeLab]:
    with FakeLab() as lab:
        yield lab


@pytest.fixture
def lab(running_lab: FakeLab) -> FakeLab:
    """A node with VM 101: a system disk, a data disk, a third one left out of backups, a cloud-init drive."""
    running_lab.reset()
    running_lab.root().cluster.mapping.pci.post(id="a4000", map=CARD)
    running_lab.add_vm(
        101,
        name="gpu01",
        memory="2048",
        agent="enabled=1",
        description="kept by hand",
        tags="gpulab",
        onboot=1,
        hostpci0="mapping=a4000,pcie=1",
        net0="virtio=BC:24:11:AA:BB:CC,bridge=vmbr0",
        smbios1="uuid=11111111-2222-3333-4444-555555555555",
        vmgenid="11111111-2222-3333-4444-666666666666",
        ide2="local-lvm:vm-101-cloudinit,media=cdrom",
        scsi0="local-lvm:vm-101-disk-0,discard=on,size=32G",
        scsi1="local-lvm:vm-101-disk-1,size=32G",
        scsi2="local-lvm:vm-101-disk-2,backup=0,size=32G",
    )
    return running_lab


@pytest.fixture
def node(lab: FakeLab) -> Any:
    return lab.api().nodes("pve1")


def refused(act: Callable[[], object]) -> tuple[int, str, object]:
    """(status, reason line, parameter errors) of a call that must fail."""
    with pytest.raises(ResourceException) as info:
        act()
    return info.value.status_code, info.value.content, info.value.errors


def back_up(lab: FakeLab, **options: object) -> str:
    """The volume id of a backup that the operator's token makes now."""
    known = {volume.volid for volume in lab.state.volumes}
    request = {"vmid": 101, "storage": "local", "mode": "snapshot", "compress": "zstd"} | options
    assert lab.wait(lab.api().nodes("pve1").vzdump.post(**request)) == "OK"
    (made,) = [volume.volid for volume in lab.state.volumes if volume.volid not in known]
    return made


def log_of(lab: FakeLab, kind: str) -> list[str]:
    return [task.log for task in lab.state.tasks if task.type == kind][-1]


def contents(lab: FakeLab, vmid: int) -> dict[str, str]:
    """What each drive of a VM holds, by its key."""
    config = lab.state.vms[vmid].config
    by_id = {volume.volid: volume for volume in lab.state.volumes}
    drives = {key: str(config[key]).partition(",")[0] for key in config if key.startswith("scsi") and key != "scsihw"}
    return {key: by_id[volid].content_id for key, volid in drives.items()}


# vzdump.


def test_a_backup_is_listed_with_what_a_token_needs_to_know(lab: FakeLab, node: Any) -> None:
    before = int(time.time())
    volid = back_up(lab, **{"notes-template": "{{guestname}} {{vmid}} on {{node}}\\nsecond"}, protected=1)
    (entry,) = node.storage("local").content.get(content="backup", vmid=101)
    assert volid.startswith("local:backup/vzdump-qemu-101-")
    assert volid.endswith(".vma.zst")
    assert entry["ctime"] >= before
    assert entry["size"] > 0
    assert {key: entry[key] for key in entry if key not in ("ctime", "size")} == {
        "volid": volid,
        "content": "backup",
        "format": "vma.zst",
        "subtype": "qemu",
        "vmid": 101,
        "notes": "gpu01 101 on pve1",
        "protected": 1,
    }
    shown = node.storage("local").content(volid).get()
    assert shown["notes"] == "gpu01 101 on pve1\nsecond"
    assert shown["path"] == f"/var/lib/vz/dump/{volid.rpartition('/')[2]}"


def test_a_task_of_a_backup_is_of_its_guest_and_says_what_it_leaves_out(lab: FakeLab, node: Any) -> None:
    upid = node.vzdump.post(vmid=101, storage="local")
    assert lab.wait(upid) == "OK"
    assert upid.split(":")[5:7] == ["vzdump", "101"]
    log = log_of(lab, "vzdump")
    assert "INFO: include disk 'scsi1' 'local-lvm:vm-101-disk-1' 32G" in log
    assert "INFO: exclude disk 'scsi2' 'local-lvm:vm-101-disk-2' (backup=no)" in log
    assert log[-2:] == ["INFO: Backup job finished successfully", "TASK OK"]


def test_the_guest_is_locked_while_it_is_backed_up(lab: FakeLab, node: Any) -> None:
    release = lab.hold_task("vzdump", after="started backup task")
    upid = node.vzdump.post(vmid=101, storage="local")
    until(lambda: node.qemu(101).config.get().get("lock") == "backup")
    assert refused(lambda: node.qemu(101).config.put(cores=3))[:2] == (500, "VM is locked (backup)")
    release()
    assert lab.wait(upid) == "OK"
    assert "lock" not in node.qemu(101).config.get()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_locked_guest_is_not_backed_up(lab: FakeLab, node: Any) -> None:
    lab.lock_vm(101, "migrate")
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "job errors"
    assert "ERROR: Backup of VM 101 failed - VM is locked (migrate)" in log_of(lab, "vzdump")
    assert lab.state.vms[101].lock == "migrate"


def test_an_unknown_guest_fails_in_the_task(lab: FakeLab, node: Any) -> None:
    assert lab.wait(node.vzdump.post(vmid=999, storage="local")) == "job errors"
    assert "ERROR: Backup of VM 999 failed - unable to find VM '999'" in log_of(lab, "vzdump")


def test_a_storage_without_backups_fails_in_the_task(lab: FakeLab, node: Any) -> None:
    assert lab.wait(node.vzdump.post(vmid=101, storage="local-lvm")) == (
        "could not get storage information for 'local-lvm': "
        "can't use storage 'local-lvm' for backups - wrong content type"
    )


def test_a_stopped_guest_whose_card_is_another_ones_cannot_be_backed_up(lab: FakeLab, node: Any) -> None:
    """QEMU is started for it, with all that the VM has."""
    lab.add_vm(102, running=True, hostpci0="mapping=a4000")
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "job errors"
    assert "ERROR: Backup of VM 101 failed - PCI device '0000:01:00.0' already in use by VMID '102'" in log_of(
        lab, "vzdump"
    )
    assert lab.state.vms[101].lock == ""


def test_what_a_token_may_not_ask_for(lab: FakeLab, node: Any) -> None:
    ask = {"vmid": 101, "storage": "local"}
    assert refused(lambda: node.vzdump.post(**ask, **{"prune-backups": "keep-last=1"}))[:2] == (
        403,
        "Permission check failed (/storage/local, Datastore.Allocate)",
    )
    assert refused(lambda: node.vzdump.post(**ask, dumpdir="/tmp"))[2] == {"dumpdir": "Only root may set this option."}
    assert refused(lambda: node.vzdump.post(**ask, bwlimit=100))[:2] == (
        403,
        "Permission check failed (/, Sys.Modify)",
    )
    assert refused(lambda: node.vzdump.post(storage="local"))[2] == {"vmid": "property is missing"}
    assert refused(lambda: node.vzdump.post(**ask, all=1))[2] == {"all": "option conflicts with option 'vmid'"}
    notes = {"notes-template": "{{host}}"}
    assert refused(lambda: node.vzdump.post(**ask, **notes))[2] == {
        "notes-template": "found unknown: variable 'host' at char 2\n"
    }
    lab.take_away("Datastore.AllocateSpace")
    assert refused(lambda: node.vzdump.post(**ask))[:2] == (
        403,
        "Permission check failed (/storage/local, Datastore.AllocateSpace)",
    )


def test_a_guest_that_is_not_the_callers_fails_in_the_task(lab: FakeLab, node: Any) -> None:
    lab.take_away("VM.Backup")
    status = lab.wait(node.vzdump.post(vmid=101, storage="local"))
    assert status == "403 Permission check failed (/vms/101, VM.Backup)"


def test_a_running_guest_is_frozen_and_thawed_also_when_the_copy_fails(lab: FakeLab, node: Any) -> None:
    run(lab, 101)
    back_up(lab)
    assert lab.power.freezes == [("freeze", 101), ("thaw", 101)]
    lab.power.freezes.clear()
    lab.power.fail_copy = "no space left on device"
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "job errors"
    assert lab.power.freezes == [("freeze", 101), ("thaw", 101)]
    assert "ERROR: Backup of VM 101 failed - no space left on device" in log_of(lab, "vzdump")
    assert lab.state.vms[101].lock == ""
    assert len(node.storage("local").content.get(content="backup")) == 1


def run(lab: FakeLab, vmid: int) -> None:
    assert lab.wait(lab.root().nodes("pve1").qemu(vmid).status.start.post()) == "OK"


def test_a_guest_that_says_so_is_not_frozen(lab: FakeLab) -> None:
    lab.state.vms[101].config["agent"] = "enabled=1,freeze-fs-on-backup=0"
    run(lab, 101)
    back_up(lab)
    assert lab.power.freezes == []
    assert "INFO: skipping guest-agent 'fs-freeze', disabled in VM options" in log_of(lab, "vzdump")


def test_mode_stop_brings_the_guest_back(lab: FakeLab) -> None:
    run(lab, 101)
    back_up(lab, mode="stop")
    assert "INFO: stopping virtual guest" in log_of(lab, "vzdump")
    assert 101 in lab.power.started


def test_a_worker_that_is_killed_leaves_the_lock_and_no_backup(lab: FakeLab, node: Any) -> None:
    lab.kill_task("vzdump", after="started backup task")
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "unexpected status"
    assert node.qemu(101).config.get()["lock"] == "backup"
    assert node.storage("local").content.get(content="backup") == []
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "job errors"


@pytest.mark.parametrize(
    ("line", "backups"),
    [("issuing guest-agent 'fs-freeze'", 0), ("started backup task", 0), ("fs-thaw", 1), ("archive file size", 1)],
)
def test_a_worker_that_is_told_to_stop_cleans_up(lab: FakeLab, node: Any, line: str, backups: int) -> None:
    run(lab, 101)
    lab.fail_task("vzdump", "interrupted by signal", after=line)
    assert lab.wait(node.vzdump.post(vmid=101, storage="local")) == "interrupted by signal"
    assert "lock" not in node.qemu(101).config.get()
    assert lab.power.freezes in ([], [("freeze", 101), ("thaw", 101)])
    assert len(node.storage("local").content.get(content="backup")) == backups
    assert list((lab.folder / "storage/local/backup").glob("*.dat")) == []


# Whose backups are seen and removed.


def test_backups_of_a_guest_that_is_not_the_callers_are_not_listed(lab: FakeLab, node: Any) -> None:
    volid = back_up(lab)
    lab.take_away("VM.Backup")
    assert node.storage("local").content.get(content="backup") == []
    wanted = (403, "Permission check failed (/vms/101, VM.Backup)")
    assert refused(lambda: node.storage("local").content(volid).get())[:2] == wanted
    assert refused(lambda: node.storage("local").content(volid).delete())[:2] == wanted
    lab.grant(lab.user, "/storage/local", "Datastore.Allocate Datastore.AllocateSpace")
    assert [entry["volid"] for entry in node.storage("local").content.get(content="backup")] == [volid]


def test_a_protected_backup_stays(lab: FakeLab, node: Any) -> None:
    volid = back_up(lab, protected=1)
    status = lab.wait(node.storage("local").content(volid).delete())
    assert status == f"cannot remove protected volume '{volid.partition(':')[2]}' on 'local'"
    node.storage("local").content(volid).put(protected=0)
    upid = node.storage("local").content(volid).delete()
    assert lab.wait(upid) == "OK"
    assert upid.split(":")[5:7] == ["imgdel", "101@local"]
    assert node.storage("local").content.get(content="backup") == []


def test_a_token_may_keep_five_protected_backups(lab: FakeLab, node: Any) -> None:
    for day in range(5):
        lab.add_backup(101, 1_700_000_000 + day * DAY, protected=True)
    assert lab.wait(node.vzdump.post(vmid=101, storage="local", protected=1)) == "job errors"
    assert (
        "ERROR: Backup of VM 101 failed - The number of protected backups per guest is limited to 5 on storage 'local'"
        in log_of(lab, "vzdump")
    )


# Retention.

KEEP = st.dictionaries(
    st.sampled_from([name for name in retention.OPTIONS if name != "keep-all"]),
    st.integers(1, 4),
    min_size=1,
    max_size=3,
)
# Many on a day and many days: what the periods have to tell apart.
TIMES = st.builds(
    lambda day, minute: 1_700_000_000 + day * DAY + minute * 60,
    st.integers(0, 12) | st.integers(0, 60),
    st.integers(0, 24 * 60 - 1),
)
BACKUPS = st.lists(st.tuples(TIMES, st.booleans()), unique_by=lambda backup: backup[0], max_size=30)


@given(BACKUPS, KEEP)
def test_nothing_that_is_asked_for_is_pruned(backups: list[tuple[int, bool]], keep: dict[str, int]) -> None:
    marks = retention.marks(backups, keep)
    kept = {ctime for (ctime, _), mark in zip(backups, marks, strict=True) if mark == "keep"}
    open_to_it = sorted((ctime for ctime, protected in backups if not protected), reverse=True)
    assert all((mark == "protected") == protected for (_, protected), mark in zip(backups, marks, strict=True))
    assert set(open_to_it[: keep.get("keep-last", 0)]) <= kept
    assert set(open_to_it[:1]) <= kept
    assert len(kept) <= sum(keep.values())
    for option, stamp in (("keep-daily", "%F"), ("keep-weekly", "%G-%V"), ("keep-monthly", "%Y-%m")):
        periods = list(dict.fromkeys(time.strftime(stamp, time.localtime(ctime)) for ctime in open_to_it))
        covered = {time.strftime(stamp, time.localtime(ctime)) for ctime in kept}
        assert set(periods[: keep.get(option, 0)]) <= covered


@given(BACKUPS)
def test_without_a_count_all_stay(backups: list[tuple[int, bool]]) -> None:
    for keep in (retention.parse(""), retention.parse("keep-all=1"), retention.parse("keep-last=0")):
        assert "remove" not in retention.marks(backups, keep)


def test_of_one_day_the_newest_stays() -> None:
    noon = 1_700_000_000 // DAY * DAY + DAY // 2
    backups = [(noon, False), (noon - 60, False), (noon - DAY, False), (noon - DAY - 60, False)]
    assert retention.marks(backups, {"keep-daily": 2}) == ["keep", "remove", "keep", "remove"]


def test_the_last_days_of_a_year_are_of_the_next_ones_first_week() -> None:
    first, last = (int(time.mktime((2024, month, day, 12, 0, 0, 0, 0, -1))) for month, day in ((1, 2), (12, 31)))
    assert retention.marks([(first, False), (last, False)], {"keep-weekly": 2}) == ["keep", "keep"]


def test_a_day_that_keep_last_covers_does_not_count_for_keep_daily() -> None:
    noon = 1_700_000_000 // DAY * DAY + DAY // 2
    backups = [(noon - day * DAY, False) for day in range(6)] + [(noon - 60, False)]
    assert retention.marks(backups, {"keep-last": 1, "keep-daily": 2}) == [
        "keep", "keep", "keep", "remove", "remove", "remove", "remove",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keep-all=1,keep-last=2", "keep-all cannot be set together with other options.\n"),
        ("keep-last=two", "type check ('integer') failed - got 'two'"),
        ("keep-minutely=2", "property is not defined in schema"),
    ],
)
def test_a_wrong_retention_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ApiError) as info:
        retention.parse(text)
    assert info.value.errors is not None
    assert problem in info.value.errors["prune-backups"]


def test_a_backup_prunes_as_its_storage_says(lab: FakeLab, node: Any) -> None:
    lab.root().storage("local").put(**{"prune-backups": "keep-last=2"})
    now = int(time.time())
    old = [lab.add_backup(101, now - day * DAY) for day in (1, 2, 3)]
    kept = lab.add_backup(101, now - 9 * DAY, protected=True)
    other = lab.add_backup(102, now - 9 * DAY, name="other")
    made = back_up(lab)
    listed = {volume.volid for volume in lab.state.volumes if volume.content == "backup"}
    assert listed == {made, old[0], kept, other}
    assert "INFO: pruned 2 backup(s) not covered by keep-retention policy" in log_of(lab, "vzdump")


def test_without_remove_the_limit_is_a_refusal(lab: FakeLab, node: Any) -> None:
    lab.root().storage("local").put(**{"prune-backups": "keep-last=1"})
    lab.add_backup(101, 1_700_000_000)
    assert lab.wait(node.vzdump.post(vmid=101, storage="local", remove=0)) == "job errors"
    assert any("There is a max backup limit of 1 enforced by" in line for line in log_of(lab, "vzdump"))


def test_prunebackups_shows_and_then_removes(lab: FakeLab, node: Any) -> None:
    new, old = lab.add_backup(101, 1_700_000_000 + DAY), lab.add_backup(101, 1_700_000_000)
    wanted = {"prune-backups": "keep-last=1", "vmid": 101}
    shown = node.storage("local").prunebackups.get(**wanted)
    assert {entry["volid"]: entry["mark"] for entry in shown} == {new: "keep", old: "remove"}
    assert lab.wait(node.storage("local").prunebackups.delete(**wanted)) == "OK"
    assert [entry["volid"] for entry in node.storage("local").content.get(content="backup")] == [new]
    assert refused(lambda: node.storage("local").prunebackups.delete(**{"prune-backups": "keep-last=1"}))[:2] == (
        403,
        "Permission check failed (/storage/local, Datastore.Allocate)",
    )
    assert refused(lambda: node.storage("local").prunebackups.get())[:2] == (
        500,
        "no prune-backups options configured for storage 'local'",
    )
    assert refused(lambda: node.storage("local-lvm").prunebackups.get(**wanted))[:2] == (
        500,
        "storage 'local-lvm' does not support backups",
    )


# Restoring.


def restore(lab: FakeLab, volid: str, vmid: int = 901, **options: object) -> str:
    request = {"vmid": vmid, "archive": volid, "storage": "local-lvm"} | options
    return lab.wait(lab.api().nodes("pve1").qemu.post(**request))


def test_a_guest_restored_beside_its_original(lab: FakeLab, node: Any) -> None:
    original = contents(lab, 101)
    before = dict(lab.state.vms[101].config)
    assert restore(lab, back_up(lab), unique=1) == "OK"
    made, was = node.qemu(901).config.get(), lab.state.vms[101].config
    assert was == before
    assert contents(lab, 901) == {key: original[key] for key in ("scsi0", "scsi1")}
    for key in ("name", "memory", "agent", "tags", "onboot", "hostpci0"):
        assert made[key] == was[key]
    for key in ("net0", "smbios1", "vmgenid"):
        assert made[key] != was[key]
    assert made["net0"].startswith("virtio=BC:24:11:")
    assert made["net0"].endswith(",bridge=vmbr0")
    assert made["scsi0"].startswith("local-lvm:vm-901-disk-")
    assert made["scsi0"].endswith(",discard=on,size=32G")
    assert made["ide2"] == "local-lvm:vm-901-cloudinit,media=cdrom"
    assert "lock" not in made
    assert log_of(lab, "qmrestore")[-1] == "TASK OK"


def test_without_unique_only_the_generation_changes(lab: FakeLab, node: Any) -> None:
    assert restore(lab, back_up(lab)) == "OK"
    made, was = node.qemu(901).config.get(), lab.state.vms[101].config
    assert (made["net0"], made["smbios1"]) == (was["net0"], was["smbios1"])
    assert made["vmgenid"] != was["vmgenid"]


def test_a_drive_that_was_left_out_comes_back_as_a_line_of_the_description(lab: FakeLab, node: Any) -> None:
    assert restore(lab, back_up(lab)) == "OK"
    made = node.qemu(901).config.get()
    assert "scsi2" not in made
    assert made["description"] == "kept by hand\nscsi2: local-lvm:vm-101-disk-2,backup=0,size=32G"


def test_a_restore_in_place_brings_the_old_content_and_keeps_what_was_not_in_it(lab: FakeLab, node: Any) -> None:
    volid, original = back_up(lab), contents(lab, 101)
    for volume in lab.state.volumes:
        if volume.vmid == 101 and volume.content == "images":
            volume.data = f"written since: {volume.name}"
    assert restore(lab, volid, 101, force=1) == "OK"
    assert contents(lab, 101) == {key: original[key] for key in ("scsi0", "scsi1")}
    assert node.qemu(101).config.get()["unused0"] == "local-lvm:vm-101-disk-2"


def test_what_a_restore_refuses(lab: FakeLab, node: Any) -> None:
    volid = back_up(lab)
    ask = {"vmid": 901, "archive": volid, "storage": "local-lvm"}
    missing = "local:backup/vzdump-qemu-101-2026_01_01-00_00_00.vma.zst"
    assert refused(lambda: node.qemu.post(**ask | {"vmid": 101}))[:2] == (
        500,
        "unable to restore VM 101 - VM 101 already exists on node 'pve1'",
    )
    assert refused(lambda: node.qemu.post(**ask | {"archive": missing}))[:2] == (
        500,
        f"volume '{missing}' does not exist",
    )
    assert refused(lambda: node.qemu.post(**ask | {"archive": "local:backup/mine.vma"}))[:2] == (
        500,
        "unable to parse directory volume name 'backup/mine.vma'",
    )
    assert refused(lambda: node.qemu.post(**ask | {"archive": "local-lvm:vm-101-disk-0"}))[:2] == (
        500,
        "unable to use volume local-lvm:vm-101-disk-0 - content type needs to be 'backup'",
    )
    assert refused(lambda: node.qemu.post(**ask | {"archive": "/var/lib/vz/dump/x.vma"}))[:2] == (
        500,
        "Only root can pass arbitrary filesystem paths.",
    )
    assert refused(lambda: node.qemu.post(**ask, scsi5="local-lvm:5"))[2] == {
        "scsi5": "option conflicts with option 'archive'"
    }
    lab.lock_vm(101)
    assert refused(lambda: node.qemu.post(**ask | {"vmid": 101, "force": 1}))[:2] == (
        500,
        "unable to restore VM 101 - VM is locked (backup)",
    )
    assert 901 not in lab.state.vms


@pytest.mark.parametrize(
    ("privilege", "where"),
    [
        ("VM.Allocate", ""),
        ("VM.Backup", " (/vms/101, VM.Backup)"),
        ("Datastore.AllocateSpace", " (/storage/local-lvm, Datastore.AllocateSpace)"),
    ],
)
def test_a_restore_without_a_right(lab: FakeLab, node: Any, privilege: str, where: str) -> None:
    volid = back_up(lab)
    lab.take_away(privilege)
    ask = {"vmid": 901, "archive": volid, "storage": "local-lvm"}
    assert refused(lambda: node.qemu.post(**ask))[:2] == (403, f"Permission check failed{where}")


def test_a_card_or_a_bridge_that_is_not_the_callers_fails_in_the_task(lab: FakeLab) -> None:
    volid = back_up(lab)
    lab.take_away("Mapping.Use")
    assert restore(lab, volid) == "403 Permission check failed (/mapping/pci/a4000, Mapping.Use)"


def test_a_storage_without_images_fails_in_the_task_and_leaves_an_empty_guest(lab: FakeLab) -> None:
    assert restore(lab, back_up(lab), storage="local") == "Content type 'images' is not available on storage 'local'"
    assert lab.state.vms[901].config == {}


def test_a_running_or_protected_guest_is_not_overwritten(lab: FakeLab) -> None:
    volid = back_up(lab)
    before = contents(lab, 101)
    run(lab, 101)
    assert restore(lab, volid, 101, force=1) == "unable to restore VM 101 - vm is running"
    lab.power.stop(101)
    lab.state.vms[101].config["protection"] = 1
    assert restore(lab, volid, 101, force=1) == "unable to restore VM 101 - - protection mode enabled"
    assert contents(lab, 101) == before
    assert lab.state.vms[101].lock == ""


def test_a_copy_that_fails_frees_the_new_volumes_and_leaves_the_guest_empty(lab: FakeLab) -> None:
    volid = back_up(lab)
    lab.power.fail_copy = "unexpected end of file"
    assert restore(lab, volid) == "unexpected end of file"
    assert lab.state.vms[901].config == {"memory": "128"}
    assert [volume for volume in lab.state.volumes if volume.vmid == 901] == []
    assert any("VM 901 state is NOT cleaned up." in line for line in log_of(lab, "qmrestore"))


def test_a_restore_that_is_killed_leaves_its_lock_and_volumes_that_nobody_names(lab: FakeLab) -> None:
    volid = back_up(lab)
    lab.kill_task("qmrestore", after="progress 1%")
    assert restore(lab, volid) == "unexpected status"
    assert lab.state.vms[901].config == {"memory": "128", "lock": "create"}
    assert len([volume for volume in lab.state.volumes if volume.vmid == 901]) == 3


def test_a_backup_of_a_guest_that_is_gone_can_be_read_and_restored(lab: FakeLab, node: Any) -> None:
    volid = back_up(lab)
    assert "hostpci0: mapping=a4000,pcie=1\n" in node.vzdump.extractconfig.get(volume=volid)
    assert lab.wait(node.qemu(101).delete(purge=1)) == "OK"
    assert restore(lab, volid, 101, start=1) == "OK"
    lab.emulator.tasks.join(30)
    assert 101 in lab.power.started


def test_a_cable_that_is_pulled_starts_without_a_link(lab: FakeLab, node: Any) -> None:
    assert restore(lab, back_up(lab), unique=1) == "OK"
    net = f"{node.qemu(901).config.get()['net0']},link_down=1"
    node.qemu(901).config.put(net0=net, delete="hostpci0")
    run(lab, 901)
    assert not lab.power.started[901].link_up
    run(lab, 101)
    assert lab.power.started[101].link_up


# A disk on its way to another guest.


def test_a_move_that_is_killed_between_the_rename_and_the_configuration(lab: FakeLab, node: Any) -> None:
    lab.add_vm(901, memory="16")
    lab.kill_task("qmmove", after="removing disk 'scsi1'")
    move = {"disk": "scsi1", "target-vmid": 901, "target-disk": "scsi5"}
    assert lab.wait(node.qemu(101).move_disk.post(**move)) == "unexpected status"
    assert node.qemu(101).config.get()["scsi1"].startswith("local-lvm:vm-101-disk-1")
    assert "scsi5" not in node.qemu(901).config.get()
    assert lab.wait(node.qemu(101).status.start.post()) == "no such logical volume local-lvm/vm-101-disk-1"
    node.qemu(901).config.put(scsi5="local-lvm:vm-901-disk-0")
    assert contents(lab, 901)["scsi5"].startswith("local-lvm:vm-101-disk-1@")


# Jobs.

JOB = {"id": "gpulab-101", "schedule": "03:00", "vmid": "101", "storage": "local", "prune-backups": "keep-daily=7"}


def test_a_job_is_kept_changed_and_removed_by_root(lab: FakeLab) -> None:
    jobs = lab.root().cluster.backup
    jobs.post(**JOB, mode="snapshot", compress="zstd", comment="by gpulab", **{"notes-template": "{{guestname}}"})
    (job,) = jobs.get()
    assert (job["id"], job["type"], job["enabled"], job["vmid"]) == ("gpulab-101", "vzdump", 1, "101")
    assert job["prune-backups"] == {"keep-daily": "7"}
    jobs("gpulab-101").put(schedule="mon..fri 02:30", enabled=0, delete="comment")
    job = jobs("gpulab-101").get()
    assert (job["schedule"], job["enabled"], "comment" in job) == ("mon..fri 02:30", 0, False)
    assert refused(lambda: jobs.post(**JOB))[:2] == (500, "Job 'gpulab-101' already exists")
    jobs("gpulab-101").delete()
    assert jobs.get() == []
    assert refused(lambda: jobs("gpulab-101").get())[2] == {"id": "No such job 'gpulab-101'"}
    assert refused(lambda: jobs("gpulab-101").put(enabled=1))[:2] == (500, "no such vzdump job")


def test_a_token_may_neither_read_nor_write_jobs(lab: FakeLab) -> None:
    jobs = lab.api().cluster.backup
    assert refused(jobs.get)[:2] == (403, "Permission check failed (/, Sys.Audit)")
    assert refused(lambda: jobs.post(**JOB))[:2] == (403, "Permission check failed (/, Sys.Modify)")
    assert lab.state.backup_jobs == {}


@pytest.mark.parametrize("schedule", ["03:00", "daily", "mon..fri 22:30", "*/15", "sat 3:15", "*-*-1 02:00", "0/2:30"])
def test_calendar_events_that_pve_takes(lab: FakeLab, schedule: str) -> None:
    lab.root().cluster.backup.post(**JOB | {"schedule": schedule})
    assert lab.root().cluster.backup.get()[0]["schedule"] == schedule


@pytest.mark.parametrize("schedule", ["at three", "3 o'clock", "03:00:00:00", "fry 03:00"])
def test_calendar_events_that_pve_refuses(lab: FakeLab, schedule: str) -> None:
    errors = refused(lambda: lab.root().cluster.backup.post(**JOB | {"schedule": schedule}))[2]
    assert isinstance(errors, dict)
    assert f"invalid calendar event '{schedule}'" in errors["schedule"]


def test_a_job_needs_a_time_and_guests(lab: FakeLab) -> None:
    jobs = lab.root().cluster.backup
    without = {key: value for key, value in JOB.items() if key != "schedule"}
    assert refused(lambda: jobs.post(**without))[2] == {"schedule": "neither 'starttime' nor 'schedule' were set"}
    without = {key: value for key, value in JOB.items() if key != "vmid"}
    assert refused(lambda: jobs.post(**without))[2] == {"vmid": "property is missing"}


def test_a_purge_takes_the_guest_out_of_its_jobs(lab: FakeLab, node: Any) -> None:
    jobs = lab.root().cluster.backup
    jobs.post(**JOB)
    jobs.post(**JOB | {"id": "two", "vmid": "101,102"})
    assert lab.wait(node.qemu(101).delete(purge=1)) == "OK"
    assert [(job["id"], job["vmid"]) for job in jobs.get()] == [("two", "102")]


def test_without_purge_the_jobs_stay(lab: FakeLab, node: Any) -> None:
    lab.root().cluster.backup.post(**JOB)
    assert [entry["vmid"] for entry in lab.root().cluster("backup-info")("not-backed-up").get()] == []
    assert lab.wait(node.qemu(101).delete()) == "OK"
    assert [job["vmid"] for job in lab.root().cluster.backup.get()] == ["101"]
