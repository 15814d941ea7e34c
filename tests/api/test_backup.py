# SPDX-License-Identifier: MIT
"""Backups against the API double: the job, one taken now, and a restore whose data is compared with the guest's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import StringCommand
from pyinfra.connectors.util import CommandOutput, OutputLine

import inventory
from connectors.base import LabConnector
from inventory import GpulabError
from operations import plan, record
from operations.proxmox import backup, client, manifest, order, restore, vm
from operations.proxmox.client import Client
from operations.proxmox.remote import manifest as remote
from rehearsal.pve import node_cli

from .conftest import Bench, make_bench

BACKUP = {"storage": "local", "spare_vmid": 901}
#: The steps of restore.py in its order.
STEPS = (
    restore.preflight,
    restore.cleared,
    backup.taken,
    restore.restored,
    restore.started,
    restore.compared,
    restore.removed,
)


class Site:
    """A guest that runs, its node's own shell, and what lies on its data disk and in its backups."""

    def __init__(self, api: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api, self.folder, self.monkeypatch = api, folder, monkeypatch
        self.commands: list[str] = []
        #: The data disk of the guest, and of the VM that is restored.
        self.live, self.archived = folder / "live", folder / "archived"
        self.mounted = {str(self.live), str(self.archived)}
        #: What `qm guest exec` prints in place of the program's answer.
        self.agent_says: str | None = None
        self.changes: dict[str, Any] = {"backup": BACKUP}
        settings = folder / "lab-front.json"
        settings.write_text(
            json.dumps({"url": api.url, "secret": api.node_secret, "ca": str(api.ca), "node": api.node})
        )
        monkeypatch.setattr(node_cli, "SETTINGS", str(settings))
        monkeypatch.setattr(LabConnector, "run_shell_command", self.run)
        monkeypatch.setattr(remote, "mounted", lambda mount: mount in self.mounted)

    def run(self, command: StringCommand, *_: Any, **__: Any) -> tuple[bool, CommandOutput]:
        raise AssertionError("replaced below")

    def begin(self, **words: Any) -> Bench:
        """A new process, with words of `--data`; the one before has ended."""
        if hasattr(self, "bench"):
            order.release(self.bench.state)
        self.bench = make_bench(self.api, self.folder, self.monkeypatch, **self.changes)
        restore._asked[self.bench.state] = restore.Asked(run="me@here:1:1", **words)
        return self.bench

    def test(self, until: Any = None, **words: Any) -> None:
        """A run of restore.py, up to and with the step `until`.

        Raises:
            GpulabError, AssertionError: a step refused, or failed while it executed.
        """
        bench = self.begin(**words)
        for each in STEPS:
            if each is not backup.taken or words.get("fresh"):
                bench.apply(each)
            if each is until:
                return

    def back_up(self, age_s: float = 0) -> str:
        """A backup of the guest, begun a minute from now unless it is older: what is there now is unchanged since."""
        shutil.rmtree(self.archived, ignore_errors=True)
        shutil.copytree(self.live, self.archived, symlinks=True)
        volid: str = self.api.add_backup(101, int(time.time() + 60 - age_s))
        return volid

    def job(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = next(iter(self.api.root().cluster.backup.get()), None)
        return found

    def spare(self) -> dict[str, Any] | None:
        with self.api.lock:
            found = self.api.state.vms.get(901)
            return None if found is None else dict(found.config)

    def writes(self, vmid: int) -> list[tuple[str, str]]:
        """Requests that changed this VM."""
        return [one for one in self.api.requests if one[0] != "GET" and f"/qemu/{vmid}" in one[1]]


@pytest.fixture
def site(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in ("PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(client, name, 0.01)
    monkeypatch.setattr(client, "POLL_S", (0.01, 0.01))
    site = Site(api, tmp_path, monkeypatch)

    def run(self: LabConnector, command: StringCommand, *_: Any, **__: Any) -> tuple[bool, CommandOutput]:
        return on_host(site, self.host.name, command.get_raw_value())

    monkeypatch.setattr(LabConnector, "run_shell_command", run)
    (site.live / "models").mkdir(parents=True)
    (site.live / "models" / "tiny").write_bytes(b"weights" * 1000)
    (site.live / "notes").write_text("hello")
    (site.live / "newest").symlink_to("models/tiny")
    api.add_image()
    entry = "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="a4000", map=[entry])
    api.power.snippets["snippets/gpulab-vendor.yaml"] = "#cloud-config\n"
    site.begin().apply(vm.create_or_update)
    assert api.wait(api.api().nodes("pve1").qemu(101).status.start.post()) == "OK"
    api.requests.clear()
    return site


def on_host(site: Site, host: str, text: str) -> tuple[bool, CommandOutput]:
    """A command on the guest (the program that lists files) or on the node (PVE's own commands)."""
    if host != "pve1":
        argument = json.loads(shlex.split(text)[-1])
        assert argument["mount"] == "/srv/data"
        return True, CommandOutput([OutputLine("stdout", json.dumps(remote.read(mount=str(site.live))))])
    site.commands.append(text)
    output = []
    for line in split(shlex.split(text)):
        if line[:3] == ["qm", "guest", "exec"]:
            assert line[3] == "901" and json.loads(line[-1])["mount"] == "/srv/data"
            found = json.dumps(remote.read(mount=str(site.archived)))
            answer = {"exited": 1, "exitcode": 0, "out-data": found}
            output.append(json.dumps(answer) if site.agent_says is None else site.agent_says)
            continue
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            status = node_cli.main(line)
        output.append(printed.getvalue())
        if status:
            return False, CommandOutput([OutputLine("stderr", errors.getvalue())])
    return True, CommandOutput([OutputLine("stdout", each) for text in output for each in text.splitlines()])


def split(words: list[str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            lines.append([])
        else:
            lines[-1].append(word)
    return lines


def failures(site: Site) -> str:
    return " ".join(record.of_run(site.bench.state).failures.values())


# The job.


def test_job_is_made_as_declared_and_stays_so(site: Site) -> None:
    site.bench.apply(backup.scheduled)
    site.commands.clear()

    assert site.bench.commands(backup.scheduled) == []
    assert len(site.commands) == 1
    job = site.job()
    assert job is not None
    assert {key: job[key] for key in ("id", "schedule", "storage", "vmid", "mode", "compress", "node", "enabled")} == {
        "id": "gpulab-gpu01",
        "schedule": "03:00",
        "storage": "local",
        "vmid": "101",
        "mode": "snapshot",
        "compress": "zstd",
        "node": "pve1",
        "enabled": 1,
    }
    assert job["prune-backups"] == {"keep-daily": "7", "keep-weekly": "4"}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("schedule", "sun 02:30", "schedule: sun 02:30 -> 03:00"),
        ("prune-backups", "keep-last=1", "prune-backups: keep-last=1 -> keep-daily=7,keep-weekly=4"),
        ("enabled", "0", "enabled: 0 -> 1"),
        ("storage", "other", "storage: other -> local"),
        ("mode", "stop", "mode: stop -> snapshot"),
        ("vmid", "102", "vmid: 102 -> 101"),
    ],
)
def test_key_of_the_job_that_somebody_changed_is_set_back(site: Site, key: str, value: str, line: str) -> None:
    site.api.add_storage("other", "backup")
    site.bench.apply(backup.scheduled)
    site.api.root().cluster.backup("gpulab-gpu01").put(**{key: value, "mailto": "admin@example.org"})

    site.begin().apply(backup.scheduled)

    assert line in site.bench.plan
    assert site.bench.commands(backup.scheduled) == []
    job = site.job()
    assert job is not None and job["mailto"] == "admin@example.org"


def test_job_that_nobody_declares_any_more_is_removed_and_others_stay(site: Site) -> None:
    site.bench.apply(backup.scheduled)
    for name in ("gpulab-gpu010", "nightly"):
        site.api.root().cluster.backup.post(id=name, vmid="101", schedule="04:00", storage="local")
    site.changes = {}
    site.begin().apply(backup.scheduled)

    assert "remove backup job gpulab-gpu01" in site.bench.plan
    assert [job["id"] for job in site.api.root().cluster.backup.get()] == ["gpulab-gpu010", "nightly"]
    assert site.bench.commands(backup.scheduled) == []


def test_job_for_all_guests_under_our_name_becomes_ours_alone(site: Site) -> None:
    site.api.root().cluster.backup.post(id="gpulab-gpu01", all=1, exclude="105", schedule="03:00", storage="local")

    site.bench.apply(backup.scheduled)

    assert site.bench.commands(backup.scheduled) == []
    job = site.job()
    assert job is not None and not job.get("all") and job["vmid"] == "101"


def test_node_that_refuses_the_job_is_named(site: Site) -> None:
    site.changes = {"backup": {**BACKUP, "schedule": "03:00"}}
    site.monkeypatch.setattr(backup, "job_id", lambda guest: "1 wrong id")

    with pytest.raises(AssertionError, match="pve1: pvesh create /cluster/backup failed over SSH"):
        site.begin().apply(backup.scheduled)


# What a deploy refuses.


@pytest.mark.parametrize(("storage", "seen"), [("local-lvm", "images, rootdir"), ("gone", "no such storage")])
def test_storage_that_takes_no_backups_is_refused(site: Site, storage: str, seen: str) -> None:
    site.changes = {"backup": {**BACKUP, "storage": storage}}

    with pytest.raises(GpulabError, match=f"storage {storage}: expected content type backup, seen: {seen}"):
        site.begin().commands(vm.preflight)


@pytest.mark.parametrize("privilege", ["VM.Backup", "Datastore.AllocateSpace", "Datastore.Audit"])
def test_right_that_backups_need_is_missed_where_they_are_declared(site: Site, privilege: str) -> None:
    site.api.add_storage("nas", "backup")
    site.changes = {"backup": {**BACKUP, "storage": "nas"}}
    site.api.take_away(privilege)

    path = "/vms" if privilege == "VM.Backup" else "/storage/nas"
    with pytest.raises(GpulabError) as caught:
        site.begin().commands(vm.preflight)
    assert f"{privilege} on {path}" in str(caught.value)


def test_right_to_back_up_is_not_missed_where_none_is_declared(site: Site) -> None:
    site.changes = {}
    site.api.take_away("VM.Backup")

    assert site.begin().commands(vm.preflight) == []


# The data disk in or out of backups.


def test_data_disk_is_left_out_of_backups_and_taken_in_again(site: Site) -> None:
    def disk() -> list[str]:
        return str(site.api.api().nodes("pve1").qemu(101).config.get()["scsi1"]).split(",")

    before = disk()
    for changes, expected in (({"data_disk": {"backup": False}}, True), ({"backup": BACKUP}, False)):
        site.changes = changes
        site.begin().apply(vm.create_or_update)
        assert ("backup=0" in disk()) == expected
        assert disk()[0] == before[0]
        assert site.bench.commands(vm.create_or_update) == []


# One backup, now.


def test_backup_taken_now_is_returned_by_its_volume_id(site: Site) -> None:
    lab = inventory.of_run(site.bench.state)
    node, guest = lab.nodes["pve1"], lab.guests["gpu01"]

    volid = backup.back_up(Client(node), guest, node)

    listed = site.api.api().nodes("pve1").storage("local").content.get(content="backup")
    assert [item["volid"] for item in listed] == [volid]
    sent = next(call for call in site.api.calls[::-1] if call.path.endswith("/vzdump")).parameters
    assert sent["mode"] == "snapshot" and "prune-backups" not in sent


def test_backup_keeps_to_the_retention_where_the_token_may_say_so(site: Site) -> None:
    site.changes = {"backup": {**BACKUP, "keep": {"last": 2}}}
    site.api.grant(site.api.user, "/storage/local", "Datastore.Allocate Datastore.AllocateSpace Datastore.Audit")
    old = [site.api.add_backup(101, int(time.time()) - days * 86400) for days in (3, 2, 1)]
    site.begin().apply(backup.taken)

    left = {item["volid"] for item in site.api.api().nodes("pve1").storage("local").content.get(content="backup")}
    assert len(left) == 2 and left & set(old) == {old[2]}


def test_backup_whose_answer_is_lost_is_taken_once(site: Site) -> None:
    site.api.drop_reply("POST", "/vzdump$")

    site.bench.apply(backup.taken)

    assert len(site.api.api().nodes("pve1").storage("local").content.get(content="backup")) == 1


def test_backup_that_fails_shows_the_end_of_its_log(site: Site) -> None:
    site.api.power.fail_copy = "vma_queue_write: write error - No space left on device"

    with pytest.raises(AssertionError, match="job errors"):
        site.bench.apply(backup.taken)


def test_backup_of_a_guest_without_one_declared_is_refused(site: Site) -> None:
    site.changes = {}

    with pytest.raises(GpulabError, match="gpu01: backup: not declared"):
        site.begin().commands(backup.taken)


# A restore, compared.


def test_restored_data_is_compared_and_the_spare_vm_goes(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    volid = site.back_up()
    smbios = site.api.state.vms[101].config["smbios1"]

    with caplog.at_level("INFO"):
        site.test()

    assert f"{volid}: compared 3 files, 0.0 MiB: equal; 0 changed since the backup" in caplog.text
    assert site.spare() is None
    assert site.writes(101) == []
    assert site.api.state.vms[101].config["smbios1"] == smbios
    with site.api.lock:
        assert [volume.volid for volume in site.api.state.volumes if volume.vmid == 901] == []


def test_restored_vm_is_harmless_before_it_starts(site: Site) -> None:
    site.changes = {
        "backup": BACKUP,
        "memory_mib": 4096,
        "networks": [{"address": "192.0.2.101/24", "gateway": "192.0.2.1"}, {"bridge": "vmbr0"}],
        "address": None,
        "gateway": None,
        "numa_nodes": [{"cpus": "0-1", "memory_mib": 4096}],
        "affinity": "0-1",
    }
    status = site.api.api().nodes("pve1").qemu(101).status
    site.api.wait(status.stop.post())
    site.begin().apply(vm.create_or_update)
    assert site.api.wait(status.start.post()) == "OK"
    site.api.requests.clear()
    site.back_up()
    seen: list[dict[str, Any]] = []
    site.api.meanwhile("POST", "/qemu/901/status/start$", lambda: seen.append(site.spare() or {}))

    site.test(until=restore.started)

    (config,) = seen
    assert not [key for key in config if key.startswith(("hostpci", "numa", "affinity"))]
    assert (config["onboot"], config["protection"], config["memory"]) == (0, 0, "2048")
    assert (config["name"], config["tags"]) == ("gpu01-restored", "gpulab;gpulab-restore")
    for key in ("net0", "net1"):
        assert "link_down=1" in config[key].split(",")
        assert site.api.state.vms[101].config[key].split(",")[0] not in config[key]
    assert "ro=1" in config["scsi1"].split(",")
    assert site.writes(101) == []


def test_vm_that_stays_dangerous_is_not_started(site: Site) -> None:
    site.back_up()
    site.test(until=restore.restored)
    with site.api.lock:
        site.api.state.vms[901].config["hostpci3"] = "mapping=a4000"

    with pytest.raises(AssertionError, match="VM 901 is not started: it still has hostpci3"):
        site.bench.apply(restore.started)
    assert ("POST", "/nodes/pve1/qemu/901/status/start") not in site.api.requests


def test_changed_byte_in_the_restored_data_fails_by_name(site: Site) -> None:
    site.back_up()
    damaged = site.archived / "models" / "tiny"
    damaged.write_bytes(b"Weights" + damaged.read_bytes()[7:])

    with pytest.raises(AssertionError, match="1 of 3 files of the restored data are not the guest's"):
        site.test()
    spare = site.spare()
    assert spare is not None and 901 not in site.api.power.started
    assert site.writes(101) == []


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda disk: (disk / "notes").unlink(), "notes: missing"),
        (lambda disk: ((disk / "newest").unlink(), (disk / "newest").symlink_to("notes")), "newest: leads to notes"),
        (lambda disk: ((disk / "notes").unlink(), (disk / "notes").mkdir()), "notes: a folder, expected a file"),
        (lambda disk: shutil.rmtree(disk / "models"), "models: missing"),
    ],
)
def test_what_is_wrong_with_restored_data_is_named(
    site: Site, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], line: str
) -> None:
    site.back_up()
    damage(site.archived)

    with pytest.raises(AssertionError):
        site.test()
    assert line in caplog.text
    assert "VM 901 is left, stopped, to be looked at; the next run removes it" in caplog.text


def test_what_changed_since_the_backup_says_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.back_up()
    later = time.time() + 3600
    (site.live / "notes").write_text("something else")
    os.utime(site.live / "notes", (later, later))
    (site.live / "new").write_text("x")
    os.utime(site.live / "new", (later, later))

    with caplog.at_level("INFO"):
        site.test()

    assert "compared 2 files, 0.0 MiB: equal; 2 changed since the backup" in caplog.text


def test_nothing_compared_is_no_success(site: Site) -> None:
    """The backup is taken now, so that each file is younger than it, or too close to tell."""
    site.back_up(age_s=3600)
    with pytest.raises(AssertionError, match="no file was compared: each one on the data disk is younger"):
        site.test(fresh=True)


def test_empty_data_disk_compares_to_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(site.live)
    site.live.mkdir()
    site.back_up()

    with caplog.at_level("INFO"):
        site.test()
    assert "compared 0 files" in caplog.text


@pytest.mark.parametrize("where", ["live", "archived"])
def test_data_disk_that_is_not_mounted_fails(site: Site, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site.back_up()
    site.mounted.discard(str(getattr(site, where)))

    with pytest.raises(AssertionError, match="nothing is mounted at /srv/data"):
        site.test()


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("", "its agent gave no answer"),
        ('{"pid": 7}', "did not end in time"),
        ('{"exited": 1, "exitcode": 1, "err-data": "Traceback"}', "failed (exit status 1)"),
        ('{"exited": 1, "exitcode": 0, "out-data": "{", "out-truncated": 1}', "cut the list of files short"),
        ('{"exited": 1, "exitcode": 0, "out-data": "nonsense"}', "list of files cannot be understood"),
    ],
)
def test_agent_that_does_not_answer_well_fails(site: Site, says: str, words: str) -> None:
    site.back_up()
    site.agent_says = says

    with pytest.raises(AssertionError) as caught:
        site.test()
    assert words in str(caught.value)


def test_restored_system_without_agent_fails_and_is_stopped(site: Site) -> None:
    site.changes = {"backup": BACKUP, "boot_timeout_s": 10}
    site.monkeypatch.setattr(restore.time, "sleep", lambda seconds: None)
    clock = iter(range(0, 10_000, 5))
    site.monkeypatch.setattr(restore.time, "monotonic", lambda: float(next(clock)))
    site.back_up()
    site.api.power.mute = {901}

    with pytest.raises(AssertionError, match="agent has not answered after 10 s"):
        site.test()
    assert 901 not in site.api.power.started


def test_named_archive_is_restored_and_not_the_newest(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    old = site.back_up(age_s=20)
    site.api.add_backup(101, int(time.time() + 60))

    with caplog.at_level("INFO"):
        site.test(archive=old)
    assert f"{old}: compared 3 files" in caplog.text


def test_archive_of_another_guest_is_refused(site: Site) -> None:
    mine = site.back_up()
    site.api.add_vm(102, name="mail", memory=512)
    theirs = site.api.add_backup(102, int(time.time()))

    with pytest.raises(GpulabError, match="local has no such backup of VM 101") as caught:
        site.begin(archive=theirs).commands(restore.preflight)
    assert mine in str(caught.value)


def test_kept_vm_stays_stopped_and_the_next_run_removes_it(site: Site) -> None:
    site.back_up()
    site.test(keep=True)
    spare = site.spare()
    assert spare is not None and 901 not in site.api.power.started
    site.begin().commands(restore.preflight)
    assert "remove VM 901 on pve1, which an earlier test left" in site.bench.plan

    site.test()

    assert site.spare() is None


@pytest.mark.parametrize("last", STEPS)
def test_run_that_was_killed_after_any_step_is_run_again(site: Site, last: Any) -> None:
    site.monkeypatch.setattr(manifest, "CLOCK_S", -3600.0)
    site.back_up()
    site.test(until=last, fresh=last is backup.taken)

    site.test()

    assert site.spare() is None
    assert site.writes(101) == []


@pytest.mark.parametrize("after", ["restore vma archive", "new volume ID", "progress 1%"])
def test_restore_whose_worker_was_killed_is_done_again(site: Site, after: str) -> None:
    """It leaves a locked configuration without name and tag, and perhaps volumes."""
    site.back_up()
    site.api.kill_task("qmrestore", after=after)
    with pytest.raises(AssertionError):
        site.test()
    left = site.spare()
    assert left is not None and left["lock"] == "create"

    site.test()

    assert site.spare() is None
    assert [line for line in site.commands if line.endswith("qm unlock 901 && qm destroy 901")]
    with site.api.lock:
        assert [volume.volid for volume in site.api.state.volumes if volume.vmid == 901] == []


def test_restore_that_failed_is_done_again(site: Site) -> None:
    """It leaves a configuration without lock, name and tag."""
    site.back_up()
    site.api.power.fail_copy = "error during read: Input/output error"
    with pytest.raises(AssertionError, match="Input/output error"):
        site.test()
    assert site.spare() == {"memory": "128"}

    site.test()

    assert site.spare() is None


def test_restore_whose_answer_is_lost_is_made_once(site: Site) -> None:
    site.back_up()
    site.api.drop_reply("POST", "/qemu$")

    site.test()

    assert len(site.api.api().nodes("pve1").tasks.get(source="all", typefilter="qmrestore")) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"name": "mail"},
        {"name": "gpu07", "tags": "gpulab"},
        {"name": "keeper", "tags": "gpulab;gpulab-keeper"},
        {"memory": "128"},
    ],
    ids=["foreign", "guest that left the inventory", "keeper of data", "somebody's unfinished one"],
)
def test_spare_id_of_somebody_else_is_refused_and_not_touched(site: Site, config: dict[str, Any]) -> None:
    site.back_up()
    site.api.add_vm(901, **config)

    for each in (restore.preflight, restore.cleared):
        with pytest.raises(GpulabError, match="spare_vmid = 901: the id is not free") as caught:
            site.begin().commands(each)
        assert repr(config.get("name", "(none)")) in str(caught.value)
    assert site.writes(901) == []


def test_vm_that_comes_to_the_spare_id_meanwhile_is_not_touched(site: Site) -> None:
    site.back_up()
    site.test(until=restore.cleared)
    site.api.add_vm(901, name="mail")

    with pytest.raises(AssertionError, match="spare_vmid = 901: the id is not free"):
        site.bench.apply(restore.restored)
    assert site.spare() == {"name": "mail"}


# What a restore refuses.


def test_guest_without_any_backup_is_refused(site: Site) -> None:
    with pytest.raises(GpulabError, match="local on pve1 has no backup of VM 101") as caught:
        site.begin().commands(restore.preflight)
    assert "--data fresh=1" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "gpu01: backup: not declared"),
        ({"backup": BACKUP, "data_disk": {"backup": False}}, "data_disk.backup = False"),
    ],
)
def test_guest_whose_backups_prove_nothing_is_refused(site: Site, changes: dict[str, Any], words: str) -> None:
    site.back_up()
    site.changes = changes

    with pytest.raises(GpulabError, match=words):
        site.begin().commands(restore.preflight)


def test_guest_that_does_not_run_is_refused(site: Site) -> None:
    site.back_up()
    bench = site.begin()
    bench.host.connector.assumed = True

    with pytest.raises(GpulabError, match="gpu01 does not run: there is nothing to compare"):
        bench.commands(restore.preflight)


def test_node_without_memory_for_another_vm_is_refused(site: Site) -> None:
    site.back_up()
    with site.api.lock:
        site.api.state.memory = 8 * 2**30

    with pytest.raises(GpulabError, match="MiB of memory for the restored VM, which takes 2048 MiB"):
        site.begin().commands(restore.preflight)


def test_storage_without_space_for_the_archive_is_refused(site: Site) -> None:
    site.back_up()
    with site.api.lock:
        used = sum(each.size for each in site.api.state.volumes if each.storage == "local-lvm")
        site.api.state.storages["local-lvm"].total = used + 2**20

    with pytest.raises(GpulabError, match="GiB free; local:backup/vzdump-qemu-101"):
        site.begin().commands(restore.preflight)


def test_second_run_on_this_machine_is_refused(site: Site) -> None:
    site.back_up()
    site.begin().apply(restore.preflight)
    first = site.bench
    other = make_bench(site.api, site.folder, site.monkeypatch, **site.changes)
    restore._asked[other.state] = restore.Asked(run="you@here:2:2")

    with pytest.raises(GpulabError, match="somebody is at work on VM 101: the run me@here:1:1"):
        other.commands(restore.preflight)
    order.release(first.state)


def test_plan_shows_the_whole_test_and_touches_nothing(site: Site) -> None:
    volid = site.back_up()
    bench = site.begin()
    site.api.requests.clear()
    site.commands.clear()
    for each in STEPS:
        bench.commands(each)

    text = plan.of_run(bench.state).render(["gpu01"])
    assert "test a backup of gpu01 in VM 901 on pve1" in text
    assert f"restore {volid} to local-lvm" in text
    assert "VM 101 is not touched" in text
    assert {method for method, _ in site.api.requests} == {"GET"}
    assert site.commands == []
