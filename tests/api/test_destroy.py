# SPDX-License-Identifier: MIT
"""destroy=1 against the API double: the whole way, killed between any two calls, and all that it refuses.

After every single request: the data disk is there, one configuration names it, and nobody else's VM has changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fakepve import schema as fakepve

from inventory import GpulabError
from operations.proxmox import backup, destroy, keeper, order, swap, vm
from operations.proxmox.client import ApiError, Client, NotFound

from . import sites, test_requests_match_schema
from .conftest import make_bench
from .sites import (
    DATA,
    DATA_BORN,
    DESTROY,
    NEW_KEY,
    OLD,
    REBUILD,
    ROLLBACK,
    SYSTEM_BORN,
    Fault,
    Site,
    add_task,
    command_line,
    killed_after,
    killed_before,
    lost_on_the_way,
    prepare,
    reply_lost,
    root_on_the_node,
    run_with,
    stand_in,
    stations,
    sweep,
)

#: What a plain deploy does to the VM.
DEPLOY = (vm.preflight, vm.image, vm.create_or_update, vm.started)
SECOND_BORN = 5
GIB = 2**30
ROOT = Path(__file__).parents[2]


class Destruction(Site):
    """A site whose runs are of rebuild.py with destroy=1, watched after every request."""

    def __init__(self, api: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(api, folder, monkeypatch)
        #: Keys of the guest that differ from the usual.
        self.guest: dict[str, Any] = {}
        self.born = {DATA_BORN}
        self.strict = True
        monkeypatch.setattr(sites, "make_bench", lambda *words: make_bench(*words, **self.guest))
        real = Client._send

        def watched(client: Client, *words: Any) -> Any:
            try:
                return real(client, *words)
            finally:
                self.unharmed()

        self.settled = False
        monkeypatch.setattr(Client, "_send", watched)

    def rebuild(self, **words: Any) -> None:
        self.until(destroy.finished, **words)

    def until(self, last: Any, **words: Any) -> None:
        self.begin(**{"destroy": True, **words})
        for step in DESTROY[: DESTROY.index(last) + 1]:
            self.step(step)

    def plain(self, steps: tuple[Any, ...], **words: Any) -> None:
        """A run without destroy=1: of rebuild.py, or of its deploy alone."""
        self.begin(**words)
        assert self.bench is not None
        if steps is DEPLOY:
            del order._orders[self.bench.state]
            self.bench.host.connector.closed = False
        for step in steps:
            self.step(step)

    def settle(self) -> None:
        super().settle()
        self.uuid = swap.identity(self.config())["uuid"]
        self.others = {vmid: self.config(vmid) for vmid in (200, 201, 202)}
        self.settled = True

    def kept(self) -> dict[int, dict[str, Any]]:
        """The keepers."""
        with self.api.lock:
            vms = self.api.state.vms.items()
            return {vmid: dict(vm.config) for vmid, vm in vms if keeper.TAG in str(vm.config.get("tags"))}

    def keeper_id(self) -> int:
        (vmid,) = self.kept()
        return vmid

    def unharmed(self) -> None:
        if not self.settled:
            return
        with self.api.lock:
            state = self.api.state
            configs = {vmid: dict(vm.config) for vmid, vm in state.vms.items()}
            volumes = [volume.model_copy() for volume in state.volumes]
        for born in self.born:
            (data,) = (volume for volume in volumes if volume.ctime == born)
            named = [vmid for vmid, config in configs.items() if data.volid in map(swap.volume, config.values())]
            assert len(named) == 1 or not self.strict, f"{data.volid} is named by {named}"
            assert {data.vmid} == set(named) or not self.strict
        for config in configs.values():
            for key, value in config.items():
                if key == "scsi1":
                    found = [volume.ctime for volume in volumes if volume.volid == swap.volume(value)]
                    assert found in ([DATA_BORN], []), "another disk in place of the data disk"
        assert {vmid: configs[vmid] for vmid in self.others} == self.others

    def protected(self) -> None:
        """At rest nothing of ours is without protection."""
        for vmid in (101, *self.kept()):
            if vmid in self.api.state.vms and "lock" not in self.config(vmid):
                assert self.config(vmid)["protection"] == 1, vmid

    def finished(self, *besides: str) -> None:
        self.unharmed()
        config = self.config()
        assert SYSTEM_BORN not in self.volumes().values()
        assert self.volumes()[swap.volume(config["scsi1"])] == DATA_BORN
        assert "discard=on" in config["scsi1"]
        assert "size=64G" in config["scsi0"]
        assert swap.identity(config)["uuid"] == self.uuid
        assert config["net0"] == self.net
        assert (config["protection"], config.get("description", "")) == (1, "")
        assert self.kept() == {}
        with self.api.lock:
            assert sorted(self.api.state.vms) == [101, 200, 201, 202]
        expected = {swap.volume(config[key]) for key in ("scsi0", "scsi1", "efidisk0", "ide2")}
        assert {volid for volid in self.volumes() if ":backup/" not in volid} == expected | set(besides)
        assert not swap.unused(config)
        assert self.api.power.running(101)
        assert self.keys() == [NEW_KEY]

    def untouched(self) -> None:
        self.unharmed()
        assert self.changes() == []

    def add_disk(self, key: str, name: str, born: int, gib: int = 32) -> None:
        """Another disk of the VM."""
        with self.api.lock:
            known = next(volume for volume in self.api.state.volumes if volume.ctime == DATA_BORN)
            new = known.model_copy(update={"name": name, "ctime": born, "size": gib * GIB, "vmid": 101})
            self.api.state.volumes.append(new)
            self.api.state.vms[101].config[key] = f"{new.volid},discard=on,size={gib}G"
            self.fresh = self.api.state.model_copy(deep=True)


def made(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **guest: Any) -> Destruction:
    stand_in(monkeypatch)
    monkeypatch.chdir(tmp_path)
    site = Destruction(api, tmp_path, monkeypatch)
    site.guest = guest
    prepare(site)
    return site


@pytest.fixture
def site(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Destruction]:
    site = made(api, tmp_path, monkeypatch)
    yield site
    site.end()


def again(site: Destruction) -> Callable[[], None]:
    """The user runs the same command again."""

    def run() -> None:
        site.rebuild()
        site.finished()

    return run


# The whole way.


def test_destroyed_guest_is_new_and_has_its_identity_and_data(site: Destruction) -> None:
    genid = site.config()["vmgenid"]
    site.rebuild()

    site.finished()
    assert site.config()["vmgenid"] != genid


def test_deletion_comes_last_and_frees_nothing_unreferenced(site: Destruction) -> None:
    sent = run_with(site, 0, killed_before, only="changes")
    kinds = [line.partition(" [")[0] for line in sent]

    assert kinds[0] == "POST nodes/pve1/qemu/101/status/shutdown"
    away = next(line for line in sent if "101/move_disk" in line)
    assert away.endswith("['digest', 'disk', 'target-digest', 'target-disk', 'target-vmid']")
    gone = sent.index("DELETE nodes/pve1/qemu/101 ['purge']")
    # Protection is lifted by the call right before.
    assert sent[gone - 1] == "PUT nodes/pve1/qemu/101/config ['digest', 'protection']"
    assert sent.index(away) < gone < kinds.index("POST nodes/pve1/qemu/100/move_disk")
    assert kinds.index("POST nodes/pve1/qemu/100/move_disk") < kinds.index("POST nodes/pve1/qemu/101/status/start")
    assert not [line for line in sent if "destroy-unreferenced-disks" in line]


def test_keeper_never_runs_and_notes_the_identity(site: Destruction) -> None:
    site.until(destroy.deleted)
    config = site.config(site.keeper_id())
    noted = keeper.note(config)

    assert (config["name"], config["tags"]) == ("gpu01-keeper", "gpulab;gpulab-keeper")
    assert (config["memory"], config["onboot"], config["protection"]) == ("16", 0, 1)
    assert not [key for key in config if key.startswith(("net", "efidisk", "hostpci", "ide"))]
    assert noted is not None
    assert (noted.guest, noted.vmid, noted.uuid) == ("gpu01", 101, site.uuid)
    assert noted.mac in f"net0={site.net.lower()}".replace("virtio=", "")
    assert noted.disks == {"scsi1": (DATA, 200 * GIB)}
    assert 101 not in site.api.state.vms


def test_steps_are_those_of_rebuild_py() -> None:
    text = (ROOT / "rebuild.py").read_text()
    calls = re.findall(r"^ +(\w+\.\w+)\(", text, re.M)
    names = [f"{step.__module__.rpartition('.')[2]}.{step._inner.__name__}" for step in DESTROY]
    at = names.index("vm.create_or_update")
    wanted = [*names[:at], "local.include", *names[at + 2 :]]
    assert any(calls[start : start + len(wanted)] == wanted for start in range(len(calls)))


def test_declared_keeper_id_is_taken(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = made(api, tmp_path, monkeypatch, keeper_vmid=950)
    site.until(destroy.keeper_made)

    assert site.keeper_id() == 950
    site.rebuild()
    site.finished()


def test_next_free_id_is_none_that_the_inventory_declares(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = {"storage": "local", "spare_vmid": 100}
    site = made(api, tmp_path, monkeypatch, backup=declared)
    site.until(destroy.keeper_made)

    assert site.keeper_id() == 102


def test_declared_mac_is_the_new_vms(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = made(api, tmp_path, monkeypatch)
    card = {"bridge": "vmbr0", "address": "192.0.2.101/24", "gateway": "192.0.2.1", "mac": "BC:24:11:00:00:07"}
    site.guest = {"networks": [card], "address": None, "gateway": None}
    site.net = "virtio=BC:24:11:00:00:07,bridge=vmbr0"
    site.rebuild()
    site.finished()


def test_two_data_disks_come_back_to_their_keys(site: Destruction) -> None:
    site.add_disk("virtio3", "vm-101-disk-7", SECOND_BORN)
    site.born = {DATA_BORN, SECOND_BORN}
    site.rebuild()

    config = site.config()
    assert site.volumes()[swap.volume(config["scsi1"])] == DATA_BORN
    assert site.volumes()[swap.volume(config["virtio3"])] == SECOND_BORN
    assert site.kept() == {}


def test_disks_of_file_storages_keep_their_kind_of_name(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.add_storage("files", "images,import")
    monkeypatch.setattr(sites, "OLD", "files:101/vm-101-disk-1.qcow2")
    monkeypatch.setattr(sites, "DATA", "files:101/vm-101-disk-2.qcow2")
    site = made(api, tmp_path, monkeypatch, disk_storage="files")
    site.until(destroy.deleted)
    assert swap.volume(site.config(site.keeper_id())["scsi1"]) == f"files:{site.keeper_id()}/vm-100-disk-0.qcow2"
    site.rebuild()
    site.finished()
    assert re.fullmatch(r"files:101/vm-101-disk-\d\.qcow2", swap.volume(site.config()["scsi1"]))


def test_guest_that_does_not_exist_is_created(site: Destruction) -> None:
    with site.api.lock:
        del site.api.state.vms[101]
        site.api.state.volumes = [volume for volume in site.api.state.volumes if volume.vmid != 101]
    site.api.power.stop(101)
    site.settled = False
    site.rebuild()
    assert site.config()["name"] == "gpu01"


def test_requests_match_the_schemas(site: Destruction) -> None:
    """Those of the whole way and of a repair, as they went over the wire."""
    before = len(site.api.calls)
    site.until(destroy.keeper_made)
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()
    again(site)()
    sent = [call for call in site.api.calls[before:] if call.agent == "gpulab"]
    made = {(call.method, fakepve.load().match(call.path).template) for call in sent}

    assert {
        ("POST", "/nodes/{node}/qemu/{vmid}/move_disk"),
        ("DELETE", "/nodes/{node}/qemu/{vmid}"),
        ("GET", "/cluster/nextid"),
        ("GET", "/cluster/resources"),
    } <= made
    assert test_requests_match_schema.problems(fakepve.load(), sent) == []


# Killed, and run again.


@pytest.mark.faults
def test_destruction_killed_between_any_two_calls_goes_on(site: Destruction) -> None:
    places, requests = stations(site)
    assert requests > 100
    assert len(places) > 15
    for number in places:
        site.restore()
        sent = run_with(site, number, killed_before)
        sites.check(site, again(site), f"killed before request {number}: {sent[-1]}")


@pytest.mark.faults
def test_destruction_killed_after_any_change_goes_on(site: Destruction) -> None:
    assert sweep(site, killed_after, again(site), only="changes") >= 14


@pytest.mark.faults
@pytest.mark.parametrize("fault", [lost_on_the_way, reply_lost])
def test_change_without_an_answer_does_no_harm(site: Destruction, fault: Fault) -> None:
    def then() -> None:
        site.finished()
        site.protected()

    assert sweep(site, fault, then, only="changes") >= 14


@pytest.mark.faults
def test_change_that_is_refused_leaves_everything_protected(site: Destruction) -> None:
    def refused(send: Callable[[], Any]) -> Any:
        raise ApiError(500, "no space left", "pve1: 500 no space left")

    number, failures = 0, 0
    while True:
        number += 1
        site.restore()
        sent: list[str] = []
        with suppress(AssertionError):
            sent = run_with(site, number, refused, only="changes")
        if sent:
            break
        failures += 1
        site.unharmed()
        site.protected()
        again(site)()
    assert failures >= 12


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/qemu$"),
        ("POST", "/qemu/101/move_disk$"),
        ("DELETE", "/qemu/101$"),
        ("POST", "/qemu/100/move_disk$"),
        ("DELETE", "/qemu/100$"),
    ],
)
@pytest.mark.parametrize("how", ["595", "596", "599", "dropped", "hung up"])
def test_lost_answer_of_a_proxy_is_looked_up(site: Destruction, method: str, path: str, how: str) -> None:
    match how:
        case "dropped":
            site.api.drop_reply(method, path, times=2)
        case "hung up":
            site.api.hang_up(method, path, times=2)
        case _:
            site.api.answer(int(how), 2, method, path)
    site.rebuild()
    site.finished()
    tasks = [task.type for task in site.api.state.tasks if task.type in ("qmmove", "qmdestroy")]
    assert sorted(tasks) == ["qmdestroy", "qmdestroy", "qmmove", "qmmove"]


def test_deletion_that_only_the_vms_absence_tells_of_is_one(site: Destruction) -> None:
    """Its answer was lost, and the node has forgotten the task."""

    def vanished(send: Callable[[], Any]) -> Any:
        send()
        site.api.emulator.tasks.join(10)
        raise NotFound(500, "Configuration file 'nodes/pve1/qemu-server/101.conf' does not exist", "gone")

    sent = run_with(site, 0, killed_before, only="changes")
    number = 1 + next(at for at, line in enumerate(sent) if line.startswith("DELETE nodes/pve1/qemu/101"))
    site.restore()
    run_with(site, number, vanished, only="changes")
    site.finished()


@pytest.mark.parametrize("until", [destroy.disks_away, destroy.deleted, destroy.created])
def test_nobody_makes_or_starts_the_vm_while_a_keeper_holds_its_data(site: Destruction, until: Any) -> None:
    site.until(until)
    site.api.requests.clear()

    for steps in (DEPLOY, REBUILD):
        with pytest.raises(GpulabError, match="gpu01: its data disk lies with the keeper VM 100 on pve1") as caught:
            site.plain(steps)
        assert "rebuild.py --limit gpu01 --data destroy=1` goes on from there" in str(caught.value)
    with pytest.raises(GpulabError, match="there is no old system disk to go back to"):
        site.plain(ROLLBACK, rollback=True)
    assert site.changes() == []
    again(site)()


def test_creation_looks_again_for_a_keeper(site: Destruction) -> None:
    """One that came to hold the data after the deploy's preflight."""
    site.until(destroy.deleted)
    with pytest.raises(AssertionError):
        site.plain((vm.create_or_update,))
    assert "its data disk lies with the keeper VM 100" in site.failure()


@pytest.mark.parametrize("until", [destroy.marked, destroy.keeper_made, destroy.keeper_removed])
def test_deploy_works_while_all_disks_are_with_the_vm(site: Destruction, until: Any) -> None:
    site.until(until)
    site.plain(DEPLOY)
    assert site.api.power.running(101)
    again(site)()


def test_rebuild_of_another_time_goes_on_from_an_empty_keeper(site: Destruction) -> None:
    site.until(destroy.disks_back)
    site.plain(REBUILD)
    assert site.kept()
    genid = site.config()["vmgenid"]
    site.rebuild()
    site.finished()
    assert site.config()["vmgenid"] != genid


# Tasks that are killed.


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("gone", [False, True], ids=["source names it", "nobody names it"])
def test_move_killed_after_the_rename_is_repaired(site: Destruction, nth: int, gone: bool) -> None:
    site.until(destroy.keeper_made if nth == 1 else destroy.created)
    source = 101 if nth == 1 else site.keeper_id()
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()
    assert "task qmmove failed: unexpected status" in site.failure()
    if gone:
        with site.api.lock:
            del site.api.state.vms[source].config["scsi1"]
    site.protected()
    with pytest.raises(GpulabError, match="its data disk lies with the keeper VM 100"):
        site.plain(DEPLOY)

    site.until(destroy.disks_away if nth == 1 else destroy.disks_back)
    site.protected()
    site.strict = True
    again(site)()


@pytest.mark.faults
@pytest.mark.parametrize("nth", [1, 2])
def test_repair_of_a_move_killed_at_any_change_goes_on(site: Destruction, nth: int) -> None:
    site.until(destroy.keeper_made if nth == 1 else destroy.created)
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()
    site.fresh = site.api.state.model_copy(deep=True)
    site.started = {}

    assert sweep(site, killed_after, again(site), only="changes") >= 10


def test_repair_takes_no_volume_that_was_there_before(site: Destruction) -> None:
    """Of the size of the data disk, under the keeper's id: left by a VM that once had it."""
    with site.api.lock:
        known = next(volume for volume in site.api.state.volumes if volume.volid == DATA)
        site.api.state.volumes.append(known.model_copy(update={"name": "vm-100-disk-0", "vmid": 100, "ctime": 8}))
    site.until(destroy.keeper_made)
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()

    again(site)()
    assert 8 in [volume.ctime for volume in site.api.state.volumes]


def test_disk_that_cannot_be_told_is_not_guessed(site: Destruction) -> None:
    site.until(destroy.keeper_made)
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()
    with site.api.lock:
        known = next(volume for volume in site.api.state.volumes if volume.ctime == DATA_BORN)
        site.api.state.volumes.append(known.model_copy(update={"name": "vm-100-disk-5", "ctime": 9}))
    site.api.requests.clear()
    with pytest.raises(AssertionError):
        site.rebuild()

    assert (
        f"scsi1 is {DATA}, which its storage does not list; volumes of 200 GiB there that no VM names: "
        "local-lvm:vm-100-disk-0, local-lvm:vm-100-disk-5" in site.failure()
    )
    assert not [path for method, path in site.changes() if method == "DELETE"]


@pytest.mark.parametrize(
    ("kind", "after", "until"),
    [
        ("qmcreate", "efidisk0: successfully", destroy.deleted),
        ("qmdestroy", "removing the configuration", destroy.disks_away),
        ("qmdestroy", "successfully removed", destroy.disks_away),
        ("qmdestroy", "removing the configuration", destroy.disks_back),
    ],
    ids=["create", "delete at its end", "delete in the middle", "delete of the keeper"],
)
def test_killed_task_is_cleared_and_done_again(
    site: Destruction, monkeypatch: pytest.MonkeyPatch, kind: str, after: str, until: Any
) -> None:
    shell = root_on_the_node(site.api, monkeypatch)
    site.until(until)
    site.api.kill_task(kind, after)
    with pytest.raises(AssertionError):
        site.rebuild()
    assert f"task {kind} failed: unexpected status" in site.failure()
    site.unharmed()

    site.rebuild()
    assert site.volumes()[swap.volume(site.config()["scsi1"])] == DATA_BORN
    assert site.kept() == {}
    assert sorted(site.api.state.vms) == [101, 200, 201, 202]
    if after != "successfully removed":
        assert [line for line in shell if "qm unlock" in line]


def test_volume_that_is_there_after_all_is_not_dropped(site: Destruction) -> None:
    """It came back under the old name while the repair was at work: the key's removal would free it."""
    site.until(destroy.keeper_made)
    site.strict = False
    site.api.kill_task("qmmove", "removing disk")
    with pytest.raises(AssertionError):
        site.rebuild()
    real = destroy.machine.protect

    def protect(client: Client, guest: Any, value: int) -> None:
        real(client, guest, value)
        with site.api.lock:
            volumes = site.api.state.volumes
            known = next(volume for volume in volumes if volume.ctime == DATA_BORN)
            if DATA not in [volume.volid for volume in volumes]:
                name = DATA.partition(":")[2]
                volumes.append(known.model_copy(update={"name": name, "vmid": 101, "ctime": 9}))

    site.settled = False
    site.monkeypatch.setattr(destroy.machine, "protect", protect)
    with pytest.raises(AssertionError):
        site.rebuild()
    assert f"scsi1 of VM 101 is {DATA}, which is there after all" in site.failure()
    assert swap.volume(site.config()["scsi1"]) == DATA
    site.protected()


def test_killed_creation_of_the_keeper_is_cleared(site: Destruction, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = root_on_the_node(site.api, monkeypatch)
    site.until(destroy.backed_up)
    site.api.add_vm(100, lock="create")
    task = add_task(site.api, "qmcreate", exitstatus="unexpected status")
    with site.api.lock:
        task.id = "100"
    again(site)()
    assert "qm unlock 100 && qm destroy 100" in shell


# What goes wrong on the way.


def test_failed_verify_says_what_there_is(site: Destruction, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = "local:backup/vzdump-qemu-101-2026_11_22-03_00_00.vma.zst"
    taken: list[str] = []
    monkeypatch.setattr(backup, "back_up", lambda client, guest, node: taken.append(guest.name) or archive)
    site.guest = {"backup": {"storage": "local", "spare_vmid": 901}}
    site.verify(1, "FAIL nvidia.driver.loaded[gpu01]: no driver")
    with pytest.raises(AssertionError):
        site.rebuild()
    assert site.failure() == "gpu01: the new system does not pass verify (exit status 1)"
    assert site.bench is not None
    said = order._orders[site.bench.state].way_on
    assert said is not None
    assert said.lines == [
        "gpu01: the old VM 101 is deleted; rollback=1 has nothing to go back to.",
        f"gpu01: the data disk on scsi1 of VM 101 is {swap.volume(site.config()['scsi1'])}; it was not touched.",
        f"gpu01: the backup of before is {archive}; on pve1 `qmrestore {archive} FREE_ID --unique 1` "
        "restores it as another VM",
        "hint: repair what failed, then `pyinfra lab.py rebuild.py --limit gpu01 --data destroy=1` goes on from here",
    ]

    genid = site.config()["vmgenid"]
    site.verify(0)
    again(site)()
    assert (taken, site.config()["vmgenid"]) == (["gpu01"], genid)


def test_failure_with_the_data_at_the_keeper_says_so(site: Destruction) -> None:
    site.until(destroy.deleted)
    site.api.fail_task("qmcreate", "unable to create VM 101 - no space left", after="successfully created")
    with pytest.raises(AssertionError):
        site.rebuild()
    assert "no space left" in site.failure()
    site.protected()
    assert site.bench is not None
    said = order._orders[site.bench.state].way_on
    assert said is not None
    assert "gpu01: the data disk on scsi1 of the keeper VM 100 is local-lvm:vm-100-disk-0; it was not touched." in (
        said.lines
    )
    assert "gpu01: there is no backup of before: none is declared" in said.lines
    again(site)()


def test_backup_is_taken_before_anything_is_moved(site: Destruction) -> None:
    """By vzdump of the double, from the VM that still has everything."""
    site.guest = {"backup": {"storage": "local", "spare_vmid": 901}}
    sent = run_with(site, 0, killed_before, only="changes")

    assert [line.partition(" [")[0] for line in sent].count("POST nodes/pve1/vzdump") == 1
    taken = next(number for number, line in enumerate(sent) if "vzdump" in line)
    moved = next(number for number, line in enumerate(sent) if "move_disk" in line)
    assert taken < moved
    site.finished()


def test_backup_is_not_taken_again_by_the_next_run(site: Destruction) -> None:
    site.guest = {"backup": {"storage": "local", "spare_vmid": 901}}
    site.until(destroy.backed_up)
    mark = swap.marker(site.config())
    assert mark is not None
    assert mark.archive.startswith("local:backup/vzdump-qemu-101-")
    site.api.requests.clear()
    again(site)()
    assert ("POST", "/nodes/pve1/vzdump") not in site.changes()


def test_backup_of_a_guest_that_has_run_since_is_taken_again(site: Destruction) -> None:
    site.guest = {"backup": {"storage": "local", "spare_vmid": 901}}
    site.until(destroy.backed_up)
    site.api.wait(site.api.api().nodes("pve1").qemu(101).status.start.post())
    site.api.requests.clear()
    again(site)()
    assert ("POST", "/nodes/pve1/vzdump") in site.changes()


def test_protection_that_somebody_sets_again_stops_the_deletion(site: Destruction) -> None:
    site.until(destroy.disks_away)

    def protect() -> None:
        with site.api.lock:
            site.api.state.vms[101].config["protection"] = 1

    site.api.meanwhile("DELETE", "/qemu/101$", protect)
    with pytest.raises(AssertionError):
        site.rebuild()
    assert "can't remove VM 101 - protection mode enabled" in site.failure()
    site.protected()
    again(site)()


def test_disk_that_came_after_the_note_is_not_deleted(site: Destruction) -> None:
    site.until(destroy.disks_away)
    site.add_disk("scsi4", "vm-101-disk-9", SECOND_BORN)
    site.born = {DATA_BORN, SECOND_BORN}
    site.step(destroy.deleted)
    assert 101 in site.api.state.vms

    site.rebuild()
    assert site.volumes()[swap.volume(site.config()["scsi4"])] == SECOND_BORN


def test_disk_that_comes_right_before_the_deletion_stops_it(site: Destruction) -> None:
    """Between the step's first look and the last one, which the protection is lifted after."""
    site.until(destroy.disks_away)
    site.born = {DATA_BORN, SECOND_BORN}
    real = keeper.not_deletable

    def late(now: keeper.Situation) -> list[str]:
        if "scsi4" not in site.config():
            site.add_disk("scsi4", "vm-101-disk-9", SECOND_BORN)
        return real(now)

    site.born = {DATA_BORN}
    site.monkeypatch.setattr(keeper, "not_deletable", late)
    with pytest.raises(AssertionError):
        site.step(destroy.deleted)
    assert "VM 101 on pve1 is not deleted: scsi4 is still local-lvm:vm-101-disk-9" in site.failure()
    site.protected()


def test_rights_lost_by_the_deletion_stop_the_creation(site: Destruction) -> None:
    site.until(destroy.disks_away)

    def lose() -> None:
        site.api.take_away("VM.Config.HWType")

    site.step(destroy.deleted)
    lose()
    with pytest.raises(AssertionError):
        site.step(destroy.created)
    assert "the API token lacks VM.Config.HWType on /vms" in site.failure()
    assert 101 not in site.api.state.vms
    site.unharmed()


def test_rights_on_the_vms_own_path_go_with_it(site: Destruction) -> None:
    """What is left on its path after the deletion counts, not what is on /vms."""
    site.until(destroy.deleted)
    site.api.grant(site.api.user, "/vms/101", "VM.Audit")
    site.api.requests.clear()
    with pytest.raises(AssertionError):
        site.step(destroy.created)
    assert "the API token lacks VM.Allocate on /vms/101" in site.failure()
    assert [path for method, path in site.changes() if path.endswith("/qemu")] == []


def test_vm_that_is_started_right_before_the_deletion_is_not_deleted(site: Destruction) -> None:
    site.until(destroy.disks_away)
    site.api.meanwhile("DELETE", "/qemu/101$", lambda: site.api.power.started.update({101: site.started[101]}))
    with pytest.raises(AssertionError):
        site.step(destroy.deleted)
    assert "VM 101 is running - destroy failed" in site.failure()
    site.protected()
    again(site)()


# What is refused before anything has changed.


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda site: site.api.lock_vm(101), r"it is locked \(backup\)"),
        (lambda site: site.put(cores=1), r"it has pending changes \(cores\); restart it or revert them first"),
        (
            lambda site: site.api.state.vms[101].config.update(unused0="local-lvm:vm-101-disk-8"),
            "unused0 is local-lvm:vm-101-disk-8, which the deletion would free; attach it or delete it first",
        ),
        (lambda site: site.api.state.vms[101].config.pop("scsi1"), "it has no data disk; expected one on scsi1"),
        (
            lambda site: site.put(description=swap.Marker(old=OLD, run="me@here:1:1").line()),
            r"it is in the middle of a rebuild \(before the swap\); finish that or roll it back first",
        ),
    ],
    ids=["lock", "pending", "unused disk", "no data disk", "rebuild"],
)
def test_vm_that_cannot_be_destroyed_is_refused(
    site: Destruction, break_it: Callable[[Destruction], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    site.settled = False
    break_it(site)
    site.api.requests.clear()

    with pytest.raises(GpulabError, match=f"gpu01: VM 101 on pve1 cannot be destroyed and made anew: {words}"):
        site.rebuild()
    assert site.changes() == []


def test_snapshot_of_the_disk_is_refused(site: Destruction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destroy.machine, "snapshots", lambda client, guest: ("before",))
    with pytest.raises(GpulabError, match=r"it has snapshots \(before\); delete them first"):
        site.rebuild()
    site.untouched()


def test_vm_without_our_tag_is_never_touched(site: Destruction) -> None:
    site.put(tags="theirs")
    site.api.requests.clear()
    site.begin(destroy=True)
    for step in DESTROY:
        with suppress(GpulabError, AssertionError):
            site.step(step)
    assert [line for line in site.changes() if "/qemu" in line[1]] == []


def test_keeper_id_of_somebody_else_is_refused_with_its_name(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = made(api, tmp_path, monkeypatch, keeper_vmid=200)
    with pytest.raises(GpulabError, match="gpu01: keeper_vmid = 200: VM 200 on pve1 is not its keeper") as caught:
        site.rebuild()
    assert "Its name is 'mail'; expected 'gpu01-keeper' with the tags gpulab and gpulab-keeper." in str(caught.value)
    site.untouched()


def test_keeper_of_another_guest_of_that_name_is_not_ours(site: Destruction) -> None:
    line = keeper.Note(guest="gpu01", vmid=7101, run="x").line()
    site.api.add_vm(333, name="gpu01-keeper", tags="gpulab;gpulab-keeper", description=line)
    site.until(destroy.keeper_made)
    assert sorted(site.kept()) == [100, 333]
    assert site.config(333)["description"] == line


def test_two_keepers_are_refused(site: Destruction) -> None:
    line = keeper.Note(guest="gpu01", vmid=101, run="x").line()
    for vmid in (333, 334):
        site.api.add_vm(vmid, name="gpu01-keeper", tags="gpulab;gpulab-keeper", description=line)
    with pytest.raises(GpulabError, match="gpu01: VMs 333, 334 on pve1 are its keepers"):
        site.rebuild()
    site.untouched()


def test_missing_right_on_the_keeper_is_named(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = made(api, tmp_path, monkeypatch, keeper_vmid=950)
    api.grant(api.user, "/vms/950", "VM.Audit VM.Allocate VM.Config.Memory VM.Config.Options")
    with pytest.raises(GpulabError, match=r"pve1: the API token lacks VM\.Config\.Disk on /vms/950") as caught:
        site.rebuild()
    assert "make bootstrap LAB=…" in str(caught.value)
    site.untouched()


def test_keeper_that_lost_its_disk_makes_nothing(site: Destruction) -> None:
    site.until(destroy.deleted)
    site.settled = False
    with site.api.lock:
        del site.api.state.vms[site.keeper_id()].config["scsi1"]
    site.api.requests.clear()
    with pytest.raises(GpulabError, match=r"with its keeper: scsi1, which was \S+ \(200 GiB\), is not there"):
        site.rebuild()
    with pytest.raises(GpulabError, match="its data disk lies with the keeper VM 100"):
        site.plain(DEPLOY)
    assert site.changes() == []


def test_creation_looks_at_the_keeper_again(site: Destruction) -> None:
    site.until(destroy.deleted)
    site.settled = False
    with site.api.lock:
        del site.api.state.vms[site.keeper_id()].config["scsi1"]
    with pytest.raises(AssertionError):
        site.step(destroy.created)
    assert "VM 101 is not created: with its keeper: scsi1, which was" in site.failure()
    assert 101 not in site.api.state.vms


def test_vm_of_a_keepers_name_without_its_tags_is_nobodys_business(site: Destruction) -> None:
    line = keeper.Note(guest="gpu01", vmid=101, run="x").line()
    site.api.add_vm(333, name="gpu01-keeper", description=line)
    theirs = site.config(333)
    site.until(destroy.keeper_made)
    assert sorted(site.kept()) == [100]
    site.rebuild()
    assert site.config(333) == theirs


# Two at once.


@pytest.mark.parametrize("until", [destroy.marked, destroy.deleted, destroy.disks_back])
def test_second_run_is_told_who_is_at_work(site: Destruction, until: Any) -> None:
    site.until(until)
    first, site.bench = site.bench, None
    site.api.requests.clear()
    with pytest.raises(GpulabError, match=rf"gpu01: somebody is at work on VM 101: the run me@\S+:{site.runs}:1"):
        site.rebuild()
    assert site.changes() == []
    assert first is not None
    order.release(first.state)
    again(site)()


@pytest.mark.parametrize("until", [destroy.marked, destroy.deleted, destroy.disks_back])
def test_run_of_another_machine_is_named_and_can_be_taken_over(site: Destruction, until: Any) -> None:
    site.until(until, host="laptop")
    site.api.requests.clear()
    with pytest.raises(GpulabError, match="somebody is at work on VM 101: the run me@laptop:"):
        site.rebuild()
    assert site.changes() == []
    site.rebuild(take_over=True)
    site.finished()


@pytest.mark.parametrize("until", [destroy.keeper_made, destroy.deleted, destroy.created])
def test_run_that_was_taken_over_does_nothing_more(site: Destruction, until: Any) -> None:
    site.until(until)
    slow, site.bench = site.bench, None
    assert slow is not None
    order.release(slow.state)
    site.until(destroy.marked)
    second, site.bench = site.bench, slow
    site.api.requests.clear()
    with pytest.raises(GpulabError, match="VM 101 is no longer this run's: the run"):
        for step in DESTROY[DESTROY.index(until) + 1 :]:
            site.step(step)
    assert site.changes() == []
    site.bench = second
    again(site)()


def theirs(site: Destruction) -> None:
    """Another machine's run marks the VM as its own."""
    mark = swap.Marker(run="me@laptop:7:7", keeper=100)
    with site.api.lock:
        config = site.api.state.vms[101].config
        config["description"] = swap.described(config, mark)


def test_live_run_of_another_machine_that_marked_first_is_left_alone(site: Destruction) -> None:
    site.until(destroy.stopped)
    theirs(site)
    with pytest.raises(AssertionError):
        site.step(destroy.marked)
    assert "VM 101 is no longer this run's: the run me@laptop:7:7 has taken over" in site.failure()


def test_run_that_is_taken_over_right_before_the_deletion_does_not_delete(site: Destruction) -> None:
    site.until(destroy.disks_away)
    site.api.meanwhile("PUT", "/qemu/101/config$", lambda: theirs(site))
    with pytest.raises(AssertionError):
        site.step(destroy.deleted)
    assert "VM 101 is no longer this run's: the run me@laptop:7:7 has taken over" in site.failure()
    site.protected()


def test_task_of_somebody_else_is_named(site: Destruction) -> None:
    add_task(site.api, "vzdump", "root@pam")
    with pytest.raises(GpulabError, match="somebody is at work on VM 101: task vzdump of root@pam since"):
        site.rebuild()
    site.untouched()


# The command line.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-y"], "destroy=1 deletes the VM of gpu01: its name was not given; nothing was done."),
        (
            ["-y", "--data", "confirm=gpu02"],
            "destroy=1 deletes the VM of gpu01: 'gpu02' is not its name; nothing was done.",
        ),
        (
            ["--dry", "--data", "rollback=1"],
            "destroy=1 deletes the VM, rollback=1 brings an old system disk back: one of them at a time.",
        ),
    ],
    ids=["no name", "wrong name", "rollback"],
)
def test_run_without_the_name_ends_before_any_connection(site: Destruction, words: list[str], says: str) -> None:
    site.api.requests.clear()
    done = command_line(site, "--limit", "gpu01", "--data", "destroy=1", *words)

    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert site.api.requests == []


def test_terminal_asks_for_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.prompt", lambda text, **_: asked.append(text) or "gpu01")
    assert order._destroy("gpu01", {"destroy": 1})
    assert asked == ["destroy=1 deletes the VM of gpu01 and makes it anew. Its name, to go on"]
    monkeypatch.setattr("click.prompt", lambda text, **_: "")
    with pytest.raises(Exception, match="its name was not given; nothing was done"):
        order._destroy("gpu01", {"destroy": 1})
    assert not order._destroy("gpu01", {"destroy": 0})


def test_plan_is_whole_asks_nothing_and_touches_nothing(site: Destruction) -> None:
    site.api.requests.clear()
    done = command_line(site, "--limit", "gpu01", "--dry", "--data", "destroy=1")

    assert done.returncode == 0, done.stderr

    for line in (
        "destroy VM 101 on pve1 and make it anew (assumed)",
        "      shut down",
        "      no backup is declared: none is taken",
        f"      scsi1: {DATA} (200 GiB) -> keeper VM 100, and back",
        f"      delete VM 101 with local-lvm:vm-101-disk-0, local-lvm:vm-101-cloudinit, {OLD}, and all that the "
        "inventory does not declare",
        "      from there on rollback=1 has nothing to go back to",
        f"      create it with the same SMBIOS UUID {site.uuid}, net0 ",
        "  reboot: yes (the VM is made anew) (assumed)",
    ):
        assert line in done.stderr, done.stderr
    assert site.changes() == []
    site.unharmed()


def test_plan_of_one_that_was_cut_off_says_where_it_is(site: Destruction) -> None:
    site.until(destroy.deleted)
    site.api.requests.clear()
    done = command_line(site, "--limit", "gpu01", "--dry", "--data", "destroy=1")

    assert done.returncode == 0, done.stderr

    assert "go on: destroy VM 101 on pve1 and make it anew (assumed)" in done.stderr
    assert "it is there: the old VM is deleted; keeper VM 100 of 1 data disks" in done.stderr
    assert "create VM 101" not in done.stderr
    assert site.changes() == []
