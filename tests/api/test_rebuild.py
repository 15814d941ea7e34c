# SPDX-License-Identifier: MIT
"""A rebuild against the API double: the whole way, killed between any two calls, back again, and all it refuses."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import StringCommand
from pyinfra.api.exceptions import ConnectError

from inventory import GpulabError
from operations.proxmox import host_keys, machine, order, rebuild, swap, vm
from operations.proxmox.client import ApiError, ApiUnreachable, Client
from rehearsal.pve.state import Task

from .conftest import Bench
from .sites import (
    DATA,
    OLD,
    REBUILD,
    ROLLBACK,
    SYSTEM_BORN,
    Fault,
    Site,
    check,
    command_line,
    killed_after,
    killed_before,
    lost_on_the_way,
    prepare,
    reply_lost,
    run_with,
    stand_in,
    stations,
    sweep,
)


@pytest.fixture
def site(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    site = Site(api, tmp_path, monkeypatch)
    prepare(site)
    yield site
    site.end()


# The whole way.


def test_rebuilt_guest_has_a_new_system_and_its_own_identity(site: Site) -> None:
    site.rebuild()

    site.finished()
    # Of all host keys exactly this guest's was replaced.
    assert host_keys.known(site.folder / "state", "192.0.2.11", 22) == ["ssh-ed25519 AAAAnode"]


def test_system_disk_is_replaced_alone_in_its_call(site: Site) -> None:
    sent = run_with(site, 0, killed_before, only="changes")

    assert "POST nodes/pve1/qemu/101/config ['digest', 'scsi0']" in sent
    assert not [line for line in sent if "PUT" in line and "scsi0" in line]
    assert sent.index("POST nodes/pve1/qemu/101/status/shutdown ['forceStop', 'timeout']") == 0


def test_guest_that_does_not_exist_is_created(api: Any, site: Site) -> None:
    with api.lock:
        del api.state.vms[101]
        api.state.volumes = [volume for volume in api.state.volumes if volume.vmid != 101]
    api.power.stop(101)
    site.begin()
    for step in REBUILD:
        assert site.bench is not None
        site.bench.apply(step)

    assert site.config()["name"] == "gpu01"
    assert api.power.running(101)


def test_steps_are_those_of_rebuild_py() -> None:
    """This file's lists are the file's own, without the rest of the deploy and the steps of destroy=1."""
    text = (Path(__file__).parents[2] / "rebuild.py").read_text()
    calls = re.findall(r"^ +(\w+\.\w+)\(", text, re.M)
    names = [f"{step.__module__.rpartition('.')[2]}.{step._inner.__name__}" for step in (*ROLLBACK, *REBUILD)]
    deploy = ["vm.create_or_update", "vm.started"]
    at = names.index("vm.create_or_update")
    names[at : at + len(deploy)] = ["local.include"]
    back, rest = names[: len(ROLLBACK)], names[len(ROLLBACK) :]
    assert (calls[: len(back)], calls[-len(rest) :]) == (back, rest)


def test_connection_stays_closed_until_the_swap(bench: Bench) -> None:
    connector = bench.host.connector
    connector.closed = True
    connector.connect()

    assert connector.assumed
    assert (connector.api_requests, connector.remote_commands) == (0, 0)
    with pytest.raises(ConnectError, match="gpu01: its connection stays closed until the new system disk is in place"):
        connector.open()
    done, output = connector.run_shell_command(StringCommand("id"))
    assert (done, output.stdout_lines) == (False, [])


# Killed, and run again. Before one change is after the one before it, so most sweeps do with the latter.


def test_rebuild_killed_between_any_two_calls_goes_on(site: Site) -> None:
    places, requests = stations(site)
    assert requests > 50
    assert len(places) > 10

    def again() -> None:
        site.rebuild()
        site.finished()

    for number in places:
        site.restore()
        sent = run_with(site, number, killed_before)
        check(site, again, f"killed before request {number}: {sent[-1]}")


def test_rebuild_killed_after_any_change_goes_on(site: Site) -> None:
    def again() -> None:
        site.rebuild()
        site.finished()

    assert sweep(site, killed_after, again, only="changes") >= 10


def test_killed_rebuild_can_be_rolled_back(site: Site) -> None:
    """As long as the old disk is there. Where there is none, it says so and does nothing."""

    def go_back() -> None:
        if swap.stage(site.config()) in (swap.Stage.IDLE, swap.Stage.DELETED):
            with pytest.raises(GpulabError, match="there is no old system disk to go back to"):
                site.rebuild(rollback=True)
            return
        site.rebuild(rollback=True)
        site.back()

    assert sweep(site, killed_after, go_back, only="changes") >= 10


def test_rollback_killed_at_any_change_goes_on(site: Site) -> None:
    _fail_verify(site)
    site.fresh = site.api.state.model_copy(deep=True)
    site.started = dict(site.api.power.started)

    def again() -> None:
        if swap.stage(site.config()) is not swap.Stage.IDLE:
            site.rebuild(rollback=True)
        site.back()

    assert sweep(site, killed_after, again, only="changes", rollback=True) >= 4


@pytest.mark.parametrize("fault", [lost_on_the_way, reply_lost])
def test_change_without_an_answer_does_no_harm(site: Site, fault: Fault) -> None:
    assert sweep(site, fault, site.finished, only="changes") >= 10


def test_gateway_errors_on_every_read_are_waited_out(site: Site) -> None:
    real, failed = Client._send, set()

    def send(self: Client, method: str, path: Any, parameters: Any) -> Any:
        call = (site.api.requests.__len__(), path)
        if method == "GET" and call not in failed:
            failed.add(call)
            raise ApiUnreachable("599 Too many redirections")
        return real(self, method, path, parameters)

    site.monkeypatch.setattr(Client, "_send", send)
    site.rebuild()
    site.finished()
    assert len(failed) > 50


# What a cut-off rebuild leaves.


def test_orphan_of_a_killed_import_is_removed(site: Site) -> None:
    site.until(rebuild.marked)
    site.add_volume("vm-101-disk-3", born=3)

    site.rebuild()
    site.finished()


def test_removal_of_an_orphan_killed_at_any_change_goes_on(site: Site) -> None:
    """Half of the way the orphan is a drive of the VM, and must not be taken for a data disk."""
    site.until(rebuild.marked)
    site.add_volume("vm-101-disk-3", born=3)
    site.fresh = site.api.state.model_copy(deep=True)
    site.started = {}

    def again() -> None:
        site.rebuild()
        site.finished()

    assert sweep(site, killed_after, again, only="changes") >= 15


def test_orphan_of_a_rebuild_that_was_rolled_back_is_removed_by_the_next(site: Site) -> None:
    site.until(rebuild.marked)
    site.add_volume("vm-101-disk-3", born=3)
    site.rebuild(rollback=True)
    assert site.volumes()["local-lvm:vm-101-disk-3"] == 3

    site.rebuild()
    site.finished()


def test_volume_that_nobody_names_and_that_was_there_before_stays(site: Site) -> None:
    """It may be the data disk of a VM that was there once."""
    site.add_volume("vm-101-disk-3", born=3)
    site.until(rebuild.marked)

    site.rebuild()
    site.finished("local-lvm:vm-101-disk-3")
    assert site.volumes()["local-lvm:vm-101-disk-3"] == 3


def test_new_volume_under_the_old_disks_name_is_not_deleted(site: Site) -> None:
    """Killed after the deletion: somebody then makes a disk, PVE gives it the freed name, and it is detached."""
    site.until(rebuild.verified)
    config = site.config()
    with site.api.lock:
        old = next(volume for volume in site.api.state.volumes if volume.ctime == SYSTEM_BORN)
        old.ctime, old.size = 4, 8 * 2**30
    site.verified = True

    site.rebuild()

    assert site.volumes()[OLD] == 4
    after = site.config()
    assert (after["scsi0"], list(swap.unused(after).values())) == (config["scsi0"], [OLD])
    assert (after["protection"], swap.marker(after)) == (1, None)


def test_dead_runs_task_is_waited_for(api: Any, site: Site) -> None:
    site.until(rebuild.connection_opened)
    api.power.start_gate.clear()
    api.api().nodes("pve1").qemu(101).status.start.post()
    threading.Timer(0.3, api.power.start_gate.set).start()

    site.rebuild()
    site.finished()


# What goes wrong on the way.


def _fail_verify(site: Site) -> None:
    site.verify(1, "FAIL nvidia.driver.loaded[gpu01]: no driver")
    with pytest.raises(AssertionError):
        site.rebuild()
    site.verify(0)


def test_failed_verify_keeps_the_old_disk_and_says_why(site: Site) -> None:
    _fail_verify(site)

    site.unharmed()
    assert site.failure() == "gpu01: the new system does not pass verify (exit status 1)"
    config = site.config()
    assert OLD in swap.unused(config).values()
    assert config["protection"] == 1
    assert swap.stage(config) is swap.Stage.SWAPPED

    site.rebuild()
    site.finished()


def test_any_failure_after_the_swap_says_how_to_go_back(site: Site) -> None:
    site.until(rebuild.connection_opened)
    assert site.bench is not None
    handler = order._orders[site.bench.state].way_back
    assert handler is not None

    lines = order.way_back(handler.guest, handler.lab, handler.old)
    assert lines == [
        f"gpu01: the old system disk {OLD} is kept; the data disk was not touched.",
        "hint: repair what failed, then `pyinfra lab.py rebuild.py --limit gpu01` goes on from here; "
        "`pyinfra lab.py rebuild.py --limit gpu01 --data rollback=1` goes back",
    ]


def test_rolled_back_guest_has_its_old_system_and_is_rebuilt_later(site: Site) -> None:
    _fail_verify(site)

    site.rebuild(rollback=True)
    site.back()
    assert len(swap.unused(site.config())) == 1

    site.rebuild()
    site.finished()


def test_rollback_keeps_what_somebody_wrote_beside_our_note(site: Site) -> None:
    _fail_verify(site)
    site.rebuild(rollback=True)

    assert site.config()["description"].startswith(f"ours: hands off\n{swap.WORD} ")


def test_rollback_without_a_rebuild_is_refused(site: Site) -> None:
    with pytest.raises(GpulabError, match="gpu01: there is no old system disk to go back to"):
        site.rebuild(rollback=True)
    site.untouched()


def test_failed_import_leaves_the_old_system_to_go_on_with(api: Any, site: Site) -> None:
    site.until(rebuild.leftovers_removed)
    with api.lock:
        images = [volume for volume in api.state.volumes if volume.content == "import"]
        api.state.volumes = [volume for volume in api.state.volumes if volume not in images]

    with pytest.raises(AssertionError):
        site.step(rebuild.swapped)
    assert "task qmconfig failed: volume 'local:import/debian-13.qcow2' does not exist" in site.failure()
    assert swap.stage(site.config()) is swap.Stage.BEFORE
    site.unharmed()

    with api.lock:
        api.state.volumes += images
    site.rebuild()
    site.finished()


def test_new_system_that_does_not_start_is_rolled_back(api: Any, site: Site) -> None:
    api.power.fail_start = "start failed: QEMU exited with code 1"
    with pytest.raises(AssertionError):
        site.rebuild()
    assert "start failed: QEMU exited with code 1" in site.failure()

    api.power.fail_start = ""
    site.rebuild(rollback=True)
    site.back()


def test_protection_is_back_when_the_deletion_fails(site: Site) -> None:
    def refused(send: Callable[[], Any]) -> Any:
        raise ApiError(500, "lvremove failed", "pve1: PUT /nodes/pve1/qemu/101/config: 500 lvremove failed")

    sent = run_with(site, 0, refused, only="changes")
    site.restore()
    number = next(number for number, line in enumerate(sent, 1) if "'delete'" in line)
    with pytest.raises(AssertionError):
        run_with(site, number, refused, only="changes")

    assert "lvremove failed" in site.failure()
    assert site.config()["protection"] == 1
    assert SYSTEM_BORN in site.volumes().values()
    site.rebuild()
    site.finished()


def test_guest_that_ignores_the_shutdown_is_switched_off(api: Any, site: Site) -> None:
    api.power.stubborn.add(101)

    site.rebuild()
    site.finished()


def test_vm_that_somebody_starts_again_is_not_swapped(api: Any, site: Site) -> None:
    site.until(rebuild.leftovers_removed)
    found = vm.VmState("stopped", config=site.config())
    api.wait(api.api().nodes("pve1").qemu(101).status.start.post())
    site.monkeypatch.setattr(machine, "found", lambda client, guest: replace(found, config=read(client)))

    with pytest.raises(AssertionError):
        site.step(rebuild.swapped)
    assert "VM 101 runs; its disks are only touched while it is stopped" in site.failure()
    assert swap.stage(site.config()) is swap.Stage.BEFORE


def read(client: Client) -> Any:
    return client.get("nodes", "pve1", "qemu", 101, "config")


def test_vm_that_changed_meanwhile_keeps_its_old_disk(site: Site) -> None:
    site.until(rebuild.verified)
    site.put(net0="virtio=BC:24:11:00:00:01,bridge=vmbr0")
    site.net = site.config()["net0"]

    with pytest.raises(AssertionError):
        site.step(rebuild.old_disk_deleted)
    assert "VM 101 is not the VM whose rebuild began: the MAC address of net0 was" in site.failure()
    assert SYSTEM_BORN in site.volumes().values()


# keep_old.


def test_kept_disk_stays_until_its_day(site: Site) -> None:
    site.rebuild(keep_old=7)

    mark = swap.marker(site.config())
    assert mark is not None
    assert mark.until - mark.verified == 7 * 86400
    assert OLD in swap.unused(site.config()).values()
    assert site.config()["protection"] == 1

    with pytest.raises(GpulabError, match=f"the old system disk {OLD} is kept until") as caught:
        site.rebuild()
    assert "--data keep_old=0` deletes it now" in str(caught.value)

    site.rebuild(keep_old=0)
    site.finished()


def test_kept_disk_can_be_gone_back_to(site: Site) -> None:
    site.rebuild(keep_old=7)
    site.rebuild(rollback=True)
    site.back()


def test_kept_disk_goes_with_the_first_run_after_its_day(site: Site) -> None:
    site.rebuild(keep_old=7)
    later = time.time() + 8 * 86400
    site.monkeypatch.setattr(time, "time", lambda: later)

    site.rebuild()
    site.finished()


# What is refused before anything has changed.


def test_vm_without_our_tag_is_never_touched(site: Site) -> None:
    site.put(tags="theirs")
    site.api.requests.clear()

    for steps in (REBUILD, ROLLBACK):
        site.begin(rollback=steps is ROLLBACK)
        for step in steps:
            with suppress(GpulabError, AssertionError):
                site.step(step)
            assert [line for line in site.changes() if "/qemu/" in line[1]] == []
    site.unharmed()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda site: site.api.lock_vm(101), r"it is locked \(backup\)"),
        (lambda site: site.put(cores=1), r"it has pending changes \(cores\); restart it or revert them first"),
        (
            lambda site: site.api.add_volume_use("local-lvm", 480),
            r"storage local-lvm has \d+ GiB left; a second system disk needs 64 GiB",
        ),
        (
            lambda site: site.api.state.vms[101].config.update(scsi1="elsewhere:vm-101-disk-9"),
            "scsi1 is elsewhere:vm-101-disk-9, which its storage does not list",
        ),
        (lambda site: site.api.state.vms[101].config.pop("scsi1"), "it has no data disk; expected one on scsi1"),
        (
            lambda site: site.api.state.vms[101].config.update(scsi2=f"{DATA},size=200G"),
            f"scsi1 is {DATA}, which is on another drive too",
        ),
    ],
    ids=["lock", "pending", "space", "unknown storage", "no data disk", "same volume twice"],
)
def test_vm_that_cannot_be_rebuilt_is_refused(
    site: Site, break_it: Callable[[Site], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.api.add_storage("elsewhere", "images")

    def use(storage: str, gib: int) -> None:
        with site.api.lock:
            known = next(volume for volume in site.api.state.volumes if volume.volid == DATA)
            big = {"name": "vm-300-disk-0", "vmid": 300, "storage": storage, "size": gib * 2**30}
            site.api.state.storages[storage].total = (gib + 400) * 2**30
            site.api.state.volumes.append(known.model_copy(update=big))

    monkeypatch.setattr(site.api, "add_volume_use", use, raising=False)
    break_it(site)
    site.api.requests.clear()

    with pytest.raises(GpulabError, match=f"gpu01: VM 101 on pve1 cannot be rebuilt: {words}"):
        site.begin().apply(rebuild.preflight)
    assert site.changes() == []


def test_second_run_on_this_machine_is_told_who_is_at_work(api: Any, site: Site) -> None:
    site.until(rebuild.marked)
    first, site.bench = site.bench, None
    api.requests.clear()

    with pytest.raises(GpulabError, match=rf"gpu01: somebody is at work on VM 101: the run me@\S+:{site.runs}:1"):
        site.rebuild()
    assert site.changes() == []

    assert first is not None
    order.release(first.state)
    site.rebuild()
    site.finished()


def test_run_of_another_machine_is_named_and_can_be_taken_over(api: Any, site: Site) -> None:
    site.until(rebuild.marked, host="laptop")
    api.requests.clear()

    with pytest.raises(GpulabError, match="somebody is at work on VM 101: the run me@laptop:") as caught:
        site.rebuild()
    assert "ask on laptop; when that run is dead, --data take_over=1 goes on in its place" in str(caught.value)
    assert site.changes() == []

    site.rebuild(take_over=True)
    site.finished()


def test_run_that_was_taken_over_does_nothing_more(site: Site) -> None:
    site.until(rebuild.swapped)
    slow = site.bench
    site.bench = None
    assert slow is not None
    order.release(slow.state)
    site.until(rebuild.verified)
    second = site.bench

    site.bench = slow
    with pytest.raises(AssertionError):
        site.step(rebuild.old_disk_deleted)
    assert f"VM 101 is no longer this run's: the run me@{socket.gethostname()}:" in site.failure()
    assert SYSTEM_BORN in site.volumes().values()
    site.bench = second


def test_task_of_somebody_else_is_named(api: Any, site: Site) -> None:
    upid = "UPID:pve1:0000AAAA:00000001:6B000000:vzdump:101:root@pam:"
    with api.lock:
        task = Task(upid=upid, node="pve1", pid=1, pstart=1, starttime=1, type="vzdump", id="101", user="root@pam")
        api.state.tasks.append(task)

    with pytest.raises(GpulabError, match="somebody is at work on VM 101: task vzdump of root@pam since"):
        site.rebuild()
    site.untouched()


def shutting_down(api: Any, seconds: float) -> threading.Timer:
    """The shutdown that a run asked for before it was killed: nothing but its token tells whose it is."""
    user = f"{api.user}!{api.token_name}"
    upid = f"UPID:pve1:0000AAAA:00000001:6B000000:qmshutdown:101:{user}:"
    task = Task(upid=upid, node="pve1", pid=1, pstart=1, starttime=1, type="qmshutdown", id="101", user=user)
    with api.lock:
        api.state.tasks.append(task)

    def ended() -> None:
        with api.lock:
            task.exitstatus, task.endtime = "OK", int(time.time())

    timer = threading.Timer(seconds, ended)
    timer.start()
    return timer


def test_shutdown_of_a_killed_run_is_waited_for(api: Any, site: Site) -> None:
    timer = shutting_down(api, 1.5)
    site.rebuild()
    timer.join()
    site.finished()


def test_live_run_of_another_machine_that_was_shutting_down_is_not_taken_over(api: Any, site: Site) -> None:
    timer = shutting_down(api, 0.5)
    site.begin()
    site.step(vm.preflight)
    site.step(rebuild.preflight)
    timer.join()
    mark = swap.Marker(old=OLD, run="me@laptop:7:7")
    site.put(description=swap.described(site.config(), mark))
    site.step(rebuild.stopped)

    with pytest.raises(AssertionError):
        site.step(rebuild.marked)
    assert "VM 101 is no longer this run's: the run me@laptop:7:7 has taken over" in site.failure()
    assert swap.marker(site.config()) == mark


# The command line.


@pytest.mark.parametrize(
    ("words", "chosen"),
    [((), "pve1, gpu01"), (("--limit", "pve1"), "pve1"), (("--limit", "pve1", "--limit", "gpu01"), "pve1, gpu01")],
)
def test_anything_but_one_guest_is_refused_before_any_connection(
    site: Site, words: tuple[str, ...], chosen: str
) -> None:
    done = command_line(site, "-y", *words)

    assert done.returncode == 1
    assert "rebuild.py rebuilds exactly one guest; nothing was done." in done.stderr
    assert f"This run is about {chosen}." in done.stderr
    assert "hint: --limit with one of gpu01" in done.stderr
    assert "Connecting to hosts" not in done.stderr
    assert "Traceback" not in done.stderr
    assert site.api.requests == []


def test_keep_old_that_is_no_number_is_refused(site: Site) -> None:
    done = command_line(site, "-y", "--limit", "gpu01", "--data", "keep_old=week")

    assert done.returncode == 1
    assert "gpu01: keep_old = 'week': expected a valid integer" in done.stderr


def test_plan_shows_the_whole_rebuild_and_touches_nothing(site: Site) -> None:
    """The guest does not answer SSH here: of the system that goes, nothing is asked."""
    done = command_line(site, "--dry", "--limit", "gpu01", "--data", "keep_old=7")

    assert done.returncode == 0, done.stderr
    for line in (
        "rebuild VM 101 on pve1 (assumed)",
        "      shut down",
        f"      scsi0: {OLD} -> a new disk of 64 GiB from local:import/debian-13.qcow2",
        f"      scsi1: {DATA} stays as it is",
        f"      when verify passes: the old disk {OLD} is kept for 7 days",
        "install the NVIDIA driver (assumed)",
        "  reboot: yes (the system disk is replaced) (assumed)",
    ):
        assert line in done.stderr, done.stderr
    assert site.changes() == []
    site.unharmed()


def test_plan_of_a_rebuild_may_make_the_system_disk_smaller(site: Site) -> None:
    """A deploy never could: PVE cannot shrink a disk."""
    done = command_line(site, "--dry", "--limit", "gpu01", "--data", "system_disk_gib=32")

    assert done.returncode == 0, done.stderr
    assert f"scsi0: {OLD} -> a new disk of 32 GiB from local:import/debian-13.qcow2" in done.stderr
    assert site.changes() == []


def test_plan_of_a_rebuild_that_was_cut_off_says_so(site: Site) -> None:
    _fail_verify(site)
    site.api.requests.clear()
    done = command_line(site, "--dry", "--limit", "gpu01")

    assert done.returncode == 0, done.stderr
    assert "go on with the rebuild of VM 101 on pve1 (assumed)\n      it is there: swapped" in done.stderr
    assert site.changes() == []


def test_plan_of_a_rollback_shows_both_disks(site: Site) -> None:
    _fail_verify(site)
    new = swap.volume(site.config()["scsi0"])
    site.api.requests.clear()
    done = command_line(site, "--dry", "--limit", "gpu01", "--data", "rollback=1")

    assert done.returncode == 0, done.stderr
    assert f"scsi0: {new} -> {OLD}" in done.stderr
    assert "install the NVIDIA driver" not in done.stderr
    assert site.changes() == []


def test_refused_rebuild_is_one_readable_error(site: Site) -> None:
    site.api.lock_vm(101)
    done = command_line(site, "-y", "--limit", "gpu01")

    assert done.returncode == 1
    assert "gpu01: VM 101 on pve1 cannot be rebuilt: it is locked (backup)" in done.stderr
    assert "Traceback" not in done.stderr
    assert site.changes() == []
