# SPDX-License-Identifier: MIT
"""Backups as data: schedules, retention, the job's difference, archives, and two manifests compared."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import inventory
from inventory import GpulabError, InventoryError
from inventory.schema import Backup, Guest, Keep, Node, Passthrough, PassthroughDevice
from operations.proxmox import backup, config, manifest, restore
from operations.proxmox.manifest import Entry, Manifest
from operations.proxmox.remote import manifest as remote

NODE = Node(
    name="pve1", ssh_hostname="192.0.2.11", passthrough=Passthrough(devices=[PassthroughDevice(address="0000:01:00")])
)
BACKUP: dict[str, Any] = {"spare_vmid": 901}


def guest(**keys: Any) -> Guest:
    return Guest.model_validate(
        {
            "name": "gpu01",
            "ssh_hostname": "192.0.2.101",
            "node": "pve1",
            "vmid": 101,
            "address": "192.0.2.101/24",
            "gateway": "192.0.2.1",
            "ssh_public_key": "ssh-ed25519 AAAA a@b",
            "image": {"url": "https://i.example/d.qcow2", "checksum": "sha256:" + 64 * "a", "filename": "d.qcow2"},
            "backup": BACKUP,
            **keys,
        }
    )


# What may be declared.


@pytest.mark.parametrize(
    "event",
    [
        *("03:00", "3:15", "sun 02:30", "*/6:00", "mon..fri 22:00", "mon,wed,sat 8..17:00", "*:0/30", "*/15", "daily"),
        *("sat *-1..7 15:00", "*-*-01 04:00", "2026-12-31 23:59", "12-24 18:00", "monday 4:00", "weekly", "03:00:30"),
    ],
)
def test_calendar_events_of_pve_are_taken(event: str) -> None:
    assert Backup(spare_vmid=901, schedule=event).schedule == event


def test_calendar_event_has_one_spelling() -> None:
    assert Backup(spare_vmid=901, schedule=" Sun   02:30 ").schedule == "sun 02:30"


@pytest.mark.parametrize(
    "event",
    [
        *("", " ", "noon", "25:00", "03:60", "03-00", "13-01 03:00", "mon fri 3:00", "3:00 sun", "mon..fri at 22:00"),
        *("0 3 * * *", "*/6:00:00:00", "someday 03:00", "3am", "every day", "daily 03:00", "-03:00", "1-32 04:00"),
    ],
)
def test_anything_else_is_no_schedule(event: str) -> None:
    with pytest.raises(ValidationError, match="a calendar event of PVE, such as 03:00"):
        Backup(spare_vmid=901, schedule=event)


def test_retention_said_in_part_is_the_whole() -> None:
    assert backup.retention(Backup(spare_vmid=901)) == "keep-daily=7,keep-weekly=4"
    assert backup.retention(Backup(spare_vmid=901, keep=Keep(last=3))) == "keep-last=3"


@pytest.mark.parametrize("keep", [{}, {"daily": 0, "weekly": 0}])
def test_retention_that_keeps_nothing_is_refused(keep: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="at least one backup to stay"):
        Keep.model_validate(keep)


@pytest.mark.parametrize(
    ("spare", "cluster", "wrong"), [(101, None, True), (102, None, False), (102, "one", True), (901, "one", False)]
)
def test_spare_id_is_no_guest_s_of_the_cluster(tmp_path: Path, spare: int, cluster: str | None, wrong: bool) -> None:
    def node(number: int) -> tuple[str, dict[str, Any]]:
        passthrough = {"devices": [{"address": "0000:01:00"}]}
        keys = {"ssh_hostname": f"192.0.2.1{number}", "passthrough": passthrough}
        return f"@node/pve{number}", keys | ({"cluster": cluster} if cluster else {})

    def host(number: int, **keys: Any) -> tuple[str, dict[str, Any]]:
        image = {"url": "https://i.example/d.qcow2", "checksum": "sha256:" + 64 * "a", "filename": "d.qcow2"}
        return f"@guest/gpu0{number}", {
            "node": f"pve{number}",
            "vmid": 100 + number,
            "address": f"192.0.2.10{number}/24",
            "gateway": "192.0.2.1",
            "ssh_public_key": "ssh-ed25519 AAAA a@b",
            "image": image,
            **keys,
        }

    guests = [host(1, backup={"spare_vmid": spare}), host(2)]
    file = tmp_path / "lab.py"
    file.write_text(f"nodes = {[node(1), node(2)]!r}\nguests = {guests!r}\n")

    if wrong:
        with pytest.raises(InventoryError, match=f"gpu01: backup.spare_vmid = {spare}: expected an id that no guest"):
            inventory.load(file)
    else:
        assert inventory.load(file).guests["gpu01"].backup


@pytest.mark.parametrize("changes", [{}, {"backup": None}])
def test_disk_left_out_of_backups_says_so_when_it_is_made(changes: dict[str, Any]) -> None:
    assert "backup=0" not in config.volumes(guest(**changes), NODE)["scsi1"]
    left_out = guest(data_disk={"backup": False}, **changes)
    assert config.volumes(left_out, NODE)["scsi1"].endswith(",backup=0")


@pytest.mark.parametrize(
    ("keys", "disk", "expected"),
    [
        ({}, "lvm:vm-101-disk-1,backup=0,size=200G", "lvm:vm-101-disk-1,size=200G"),
        ({}, "lvm:vm-101-disk-1,backup=1,size=200G", None),
        ({}, "lvm:vm-101-disk-1,size=200G", None),
        ({"data_disk": {"backup": False}}, "lvm:vm-101-disk-1,size=200G", "lvm:vm-101-disk-1,size=200G,backup=0"),
        ({"data_disk": {"backup": False}}, "lvm:vm-101-disk-1,size=200G,backup=off", None),
        # Nobody said anything about backups: somebody's `backup=0` stays.
        ({"backup": None}, "lvm:vm-101-disk-1,backup=0,size=200G", None),
    ],
)
def test_disk_that_is_there_comes_into_backups_or_leaves_them(
    keys: dict[str, Any], disk: str, expected: str | None
) -> None:
    options = ",discard=on,iothread=1,ssd=1,size="
    change = config.change({"scsi1": disk.replace(",size=", options)}, guest(**keys), NODE)

    assert change.disks.get("scsi1") == (expected and expected.replace(",size=", options))
    assert "scsi1" not in change.restart


# The job.


JOB = backup.job(guest(), NODE, Backup(spare_vmid=901))
COUNTS = st.dictionaries(
    st.sampled_from(["keep-last", "keep-hourly", "keep-daily", "keep-weekly", "keep-monthly", "keep-yearly"]),
    st.integers(0, 99),
)


@given(counts=COUNTS, order=st.randoms())
def test_retention_means_the_same_in_every_form_of_pve(counts: dict[str, int], order: Any) -> None:
    pairs = list(counts.items())
    order.shuffle(pairs)
    text = ",".join(f"{name}={count}" for name, count in pairs)

    meant = backup.canonical("prune-backups", text)
    assert meant == backup.canonical("prune-backups", {name: str(count) for name, count in counts.items()})
    assert meant == {name: count for name, count in counts.items() if count}


@given(one=COUNTS, other=COUNTS)
def test_two_retentions_are_equal_when_they_keep_the_same(one: dict[str, int], other: dict[str, int]) -> None:
    same = {key: count for key, count in one.items() if count} == {key: count for key, count in other.items() if count}
    assert (backup.canonical("prune-backups", one) == backup.canonical("prune-backups", other)) == same


def read_back(**changes: Any) -> dict[str, Any]:
    """The declared job as PVE shows it."""
    retention = {"keep-weekly": "4", "keep-daily": "7"}
    return {**JOB, "id": "gpulab-gpu01", "type": "vzdump", "enabled": 1, "prune-backups": retention, **changes}


def test_job_as_pve_reads_it_back_does_not_differ() -> None:
    assert backup.difference(read_back(mailto="a@b", **{"notes-template": "x", "all": 0}), JOB) == {}


def test_job_that_is_enabled_because_nobody_says_otherwise_does_not_differ() -> None:
    job = read_back()
    del job["enabled"], job["mode"]
    assert backup.difference(job, JOB) == {}


@pytest.mark.parametrize("key", sorted(JOB))
def test_each_key_of_the_job_that_is_gone_or_changed_differs(key: str) -> None:
    changed = read_back(**{key: "keep-last=9" if key == "prune-backups" else "0" if key == "enabled" else "other"})
    assert backup.difference(changed, JOB) == {key: JOB[key]}


def test_job_that_does_not_exist_differs_in_everything() -> None:
    assert backup.difference(None, JOB) == JOB


def test_what_chooses_other_guests_goes() -> None:
    assert backup.difference(read_back(all=1, pool="p"), JOB) == {"all": None, "pool": None}


# Archives.


def stored(volid: str, ctime: int, **keys: Any) -> dict[str, Any]:
    return {"volid": volid, "ctime": ctime, "size": 5, "vmid": 101, **keys}


def test_newest_usable_backup_of_the_guest_comes_first() -> None:
    content = [
        stored("old", 1),
        stored("newest", 3),
        stored("empty", 9, size=0),
        stored("damaged", 9, verification={"state": "failed"}),
        stored("checked", 2, verification={"state": "ok"}),
        stored("another's", 9, vmid=102),
    ]
    assert [each.volid for each in backup.archives(content, 101)] == ["newest", "checked", "old"]


# The restored VM.


RESTORED = {
    "name": "gpu01-restored",
    "tags": "gpulab;gpulab-restore",
    "memory": "2048",
    "net0": "virtio=BC:24:11:00:00:09,bridge=vmbr0,link_down=1",
    "scsi0": "lvm:vm-901-disk-0,size=64G",
    "scsi1": "lvm:vm-901-disk-1,ro=1,size=200G",
    "serial0": "socket",
    "onboot": 0,
}


def test_harmless_vm_is_left_as_it_is() -> None:
    assert restore.harmless(RESTORED, guest()) == ({}, [])


@pytest.mark.parametrize(
    "key",
    ["hostpci0", "hostpci15", "usb1", "numa", "numa0", "affinity", "hugepages", "args", "hookscript", "virtiofs0"],
)
def test_what_ties_it_to_the_node_goes(key: str) -> None:
    assert restore.harmless({**RESTORED, key: "x"}, guest()) == ({}, [key])


def test_serial_port_of_the_node_goes_and_the_socket_stays() -> None:
    assert restore.harmless({**RESTORED, "serial1": "/dev/ttyS0"}, guest()) == ({}, ["serial1"])


@pytest.mark.parametrize(
    ("found", "setting"),
    [
        ({"onboot": 1}, {"onboot": "0"}),
        ({"protection": 1}, {"protection": "0"}),
        ({"tags": "gpulab"}, {"tags": "gpulab;gpulab-restore"}),
        ({"memory": "65536"}, {"memory": "2048"}),
        ({"net0": "virtio=A,bridge=vmbr0"}, {"net0": "virtio=A,bridge=vmbr0,link_down=1"}),
        ({"net1": "e1000=B,link_down=0,tag=3"}, {"net1": "e1000=B,tag=3,link_down=1"}),
        ({"scsi1": "lvm:vm-901-disk-1,size=200G"}, {"scsi1": "lvm:vm-901-disk-1,size=200G,ro=1"}),
    ],
)
def test_what_could_disturb_is_set(found: dict[str, Any], setting: dict[str, str]) -> None:
    assert restore.harmless({**RESTORED, **found}, guest()) == (setting, [])


def test_disk_copied_while_nothing_held_it_may_be_written() -> None:
    """Its journal has to be replayed."""
    found = {**RESTORED, "scsi1": "lvm:vm-901-disk-1,size=200G"}
    assert restore.harmless(found, guest(backup={**BACKUP, "mode": "suspend"})) == ({}, [])


@pytest.mark.parametrize(
    ("tags", "ours"),
    [("gpulab;gpulab-restore", True), ("gpulab", False), ("gpulab;gpulab-keeper", False), ("gpulab-restore", False)],
)
def test_only_what_a_restore_made_may_be_removed(tags: str, ours: bool) -> None:
    assert restore.is_restored({"tags": tags}) == ours


# Manifests.


T = 1_000_000.0


def file(digest: str = "a", changed: float = T - 100, **keys: Any) -> Entry:
    return replace(Entry("file", 10, changed, digest), **keys)


def folder(changed: float = T - 100) -> Entry:
    return Entry("folder", 4096, changed, "")


def of(**entries: Entry) -> Manifest:
    return Manifest(True, T + 50, {name.replace("__", "/"): entry for name, entry in entries.items()})


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
FILES = st.dictionaries(PATHS, st.builds(file, digest=st.sampled_from("xyz"), changed=st.sampled_from([T - 9, T + 9])))


@given(entries=FILES)
def test_a_disk_equals_itself(entries: dict[str, Entry]) -> None:
    disk = Manifest(True, T, entries)
    outcome = manifest.compare(disk, disk, T)
    old = [entry for entry in entries.values() if entry.changed < T]
    assert (outcome.equal, outcome.changed, outcome.wrong) == (len(old), len(entries) - len(old), ())
    assert outcome.size == 10 * len(old)


@given(live=FILES, spare=FILES)
def test_every_old_file_is_equal_or_named(live: dict[str, Entry], spare: dict[str, Entry]) -> None:
    outcome = manifest.compare(Manifest(True, T, live), Manifest(True, T, spare), T)
    old = {path for path, entry in live.items() if entry.changed < T}
    wrong = {line.partition(":")[0] for line in outcome.wrong}
    assert wrong == {path for path in old if path not in spare or spare[path].digest != live[path].digest}
    assert outcome.equal == len(old - wrong)


@given(live=FILES, data=st.data())
def test_any_one_damaged_file_is_found(live: dict[str, Entry], data: Any) -> None:
    old = sorted(path for path, entry in live.items() if entry.changed < T)
    if not old:
        return
    path = data.draw(st.sampled_from(old))
    spare = {**live, path: replace(live[path], digest="damaged")}
    outcome = manifest.compare(Manifest(True, T, live), Manifest(True, T, spare), T)
    assert outcome.wrong == (f"{path}: differs",)
    assert manifest.verdict(outcome, Manifest(True, T, live)) is not None


def test_file_that_is_as_old_as_the_backup_counts_as_changed() -> None:
    outcome = manifest.compare(of(a=file("new", T)), of(a=file("old")), T)
    assert (outcome.equal, outcome.changed, outcome.wrong) == (0, 1, ())


def test_what_lies_in_a_renamed_folder_counts_as_changed() -> None:
    """Its own times say nothing of it."""
    live = of(new=folder(T + 5), new__a=file(), new__sub=folder(), new__sub__b=file())
    spare = of(old=folder(), old__a=file(), old__sub=folder(), old__sub__b=file())
    outcome = manifest.compare(live, spare, T)
    assert (outcome.equal, outcome.changed, outcome.wrong) == (0, 2, ())


def test_file_missing_from_a_folder_that_only_gained_others_is_missing() -> None:
    live = of(d=folder(T + 5), d__a=file(), d__new=file("n", T + 5))
    outcome = manifest.compare(live, of(d=folder()), T)
    assert outcome.wrong == ("d/a: missing",)


@pytest.mark.parametrize("where", ["live", "spare"])
def test_unreadable_file_equals_nothing(where: str) -> None:
    broken = file("unreadable: Input/output error")
    outcome = manifest.compare(of(a=broken), of(a=broken if where == "live" else file()), T)
    assert outcome.wrong[0].startswith("a: unreadable: Input/output error in the")


def test_verdict_names_ten_files_and_counts_the_rest() -> None:
    live = of(**{f"f{number:02}": file() for number in range(13)})
    error = manifest.verdict(manifest.compare(live, of(), T), live)
    assert error is not None
    assert error.brief == "13 of 13 files of the restored data are not the guest's"
    lines = error.details.splitlines()
    assert lines[0] == "  f00: missing" and lines[-1] == "  and 3 more" and len(lines) == 11


def test_nothing_compared_is_a_failure_unless_there_is_nothing() -> None:
    young, empty = of(a=file("x", T + 1)), of(d=folder())
    assert manifest.verdict(manifest.compare(young, of(), T), young) is not None
    assert manifest.verdict(manifest.compare(empty, empty, T), empty) is None


@pytest.mark.parametrize(
    "answer", ["", "{}", '{"mounted": true, "now": 1, "packed": "!!"}', '{"mounted": true, "now": 1, "packed": "AAAA"}']
)
def test_answer_that_is_no_manifest_is_refused(answer: str) -> None:
    with pytest.raises(GpulabError, match="VM 901: its list of files cannot be understood"):
        manifest.parse(answer, "VM 901")


def test_cut_answer_is_refused() -> None:
    packed = base64.b64encode(gzip.compress(json.dumps([["a", "file", 1, 2.0, "d"]]).encode())[:-9]).decode()
    with pytest.raises(GpulabError, match="cannot be understood"):
        manifest.parse(json.dumps({"mounted": True, "now": 1.0, "packed": packed}), "VM 901")


# The program that reads a disk.


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "disk"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"content")
    (folder / "link").symlink_to("deep/file")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"caf\xe9")).write_text("no UTF-8")
    monkeypatch.setattr(remote, "mounted", lambda mount: mount == str(folder))
    return folder


def test_program_lists_everything_with_its_digest(disk: Path) -> None:
    before = time.time()
    found = manifest.parse(json.dumps(remote.read(str(disk))), "gpu01")

    assert before <= found.now <= time.time()
    assert {path: entry.kind for path, entry in found.entries.items()} == {
        "deep": "folder",
        "deep/file": "file",
        "link": "link",
        "pipe": "other",
        "caf\udce9": "file",
    }
    entry = found.entries["deep/file"]
    assert (entry.size, entry.digest) == (7, "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73")
    assert found.entries["link"].digest == "deep/file"


def test_program_sees_a_changed_byte_behind_an_old_time(disk: Path) -> None:
    before = manifest.parse(remote.read(str(disk)), "gpu01")
    (disk / "deep" / "file").write_bytes(b"Content")
    os.utime(disk / "deep" / "file", (1, 1))
    after = manifest.parse(remote.read(str(disk)), "gpu01")

    # The change's own time cannot be set back.
    assert after.entries["deep/file"].changed >= before.entries["deep/file"].changed
    assert manifest.compare(before, after, time.time() + 60).wrong == ("deep/file: differs",)


def test_program_leaves_other_file_systems_out(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = os.lstat(disk).st_dev
    real = os.lstat

    class Elsewhere:
        st_dev = device + 1
        st_mode = 0o40755

    monkeypatch.setattr(remote.os, "lstat", lambda path: Elsewhere() if str(path).endswith("deep") else real(path))
    assert not [path for path in manifest.parse(remote.read(str(disk)), "x").entries if path.startswith("deep")]


def test_program_says_when_nothing_is_mounted(disk: Path) -> None:
    shutil.rmtree(disk / "deep")
    assert remote.read(str(disk / "elsewhere")) | {"now": 0} == {"mounted": False, "now": 0, "packed": ""}
    assert not manifest.parse(remote.read(str(disk / "elsewhere")), "x").mounted


def test_mount_points_are_told_from_folders() -> None:
    assert remote.mounted("/proc") and not remote.mounted("/proc/self")
