# SPDX-License-Identifier: MIT
"""The VM's steps against a Proxmox API that nobody of this project wrote the rules of (fakepve, its schema)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.state import StateStage

import inventory
from inventory import GpulabError
from operations.proxmox import vm
from operations.proxmox.client import Client
from operations.proxmox.node_shell import NodeShell
from tests.verify.healthy import Doctored, Verified, healthy, verify
from verify.vm.api import Api

from .conftest import Bench
from .sites import add_task, own, root_on_the_node


def read(api: Any) -> dict[str, Any]:
    keys: dict[str, Any] = api.api().nodes("pve1").qemu(101).config.get()
    return keys


def use_mapping(api: Any) -> None:
    entry = "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="a4000", map=[entry])


@pytest.fixture
def node_shell(api: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return root_on_the_node(api, monkeypatch)


def changing(api: Any) -> list[tuple[str, str]]:
    return [request for request in api.requests if request[0] != "GET" and not request[1].startswith("/access")]


FULL: dict[str, Any] = {
    "address": None,
    "gateway": None,
    "networks": [
        {"address": "192.0.2.101/24", "gateway": "192.0.2.1"},
        {"bridge": "vmbr1", "vlan": 30, "mtu": 9000, "mac": "bc:24:11:00:00:02"},
    ],
    "nameserver": ["192.0.2.53", "192.0.2.54"],
    "searchdomain": "lab.example",
    "numa_nodes": [{"cpus": "0-1", "memory_mib": 2048, "host_nodes": "0", "policy": "bind"}],
    "affinity": "0-1",
    "hugepages": "2M",
    "startup": {"order": 2, "up_s": 30},
    "tags": ["zed", "gpu"],
    "description": "The lab's GPU.  \nSecond line \n",
}


def test_created_vm_is_what_was_declared_and_stays_so(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)

    assert bench.apply(vm.create_or_update) == 1
    assert bench.commands(vm.create_or_update) == []

    keys = read(api)
    assert keys["tags"] == "gpulab"
    assert keys["hostpci0"] == "mapping=a4000,pcie=1"
    assert "size=64G" in keys["scsi0"]
    assert "size=200G" in keys["scsi1"]


def test_plan_shows_each_key_of_a_new_vm(api: Any, bench: Bench) -> None:
    bench.commands(vm.create_or_update)

    assert "create VM 101 on pve1" in bench.plan
    assert "memory: absent -> 2048" in bench.plan
    assert api.api().nodes("pve1").qemu.get() == []


def test_only_what_differs_is_changed(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1, description="hands off", hostpci1="mapping=a4000")

    bench.apply(vm.create_or_update)

    keys = read(api)
    assert (keys["cores"], keys["description"]) == (2, "hands off")
    assert "hostpci1" not in keys
    assert "cores: 1 -> 2" in bench.plan
    assert "hostpci1: mapping=a4000 -> absent" in bench.plan


def test_everything_that_can_be_declared_is_set_and_stays_so(
    api: Any, bench_of: Callable[..., Bench], node_shell: list[str]
) -> None:
    api.add_image()
    use_mapping(api)
    bench = bench_of(**FULL)

    bench.apply(vm.create_or_update)
    assert bench.commands(vm.create_or_update) == []

    keys = read(api)
    assert keys["net1"] == "virtio=BC:24:11:00:00:02,bridge=vmbr1,mtu=9000,tag=30"
    assert keys["tags"] == "gpu;gpulab;zed"
    assert keys["description"] == "The lab's GPU.  \nSecond line"
    assert (keys["affinity"], keys["hugepages"], keys["startup"]) == ("0-1", "2", "order=2,up=30")
    assert len(node_shell) == 1
    assert node_shell[0].startswith("qm set 101 --affinity 0-1 --hugepages 2 --startup order=2,up=30 --digest ")
    assert "affinity: absent -> 0-1" in bench.plan


def test_root_only_keys_go_when_nobody_declares_them(api: Any, bench: Bench, node_shell: list[str]) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.root().nodes("pve1").qemu(101).config.put(affinity="0", hugepages="2", numa=1, startup="order=9")
    api.requests.clear()

    bench.apply(vm.create_or_update)

    keys = read(api)
    assert "affinity" not in keys and "hugepages" not in keys
    assert (keys["numa"], keys["startup"]) == (1, "order=9")
    assert node_shell[0].startswith("qm set 101 --delete affinity,hugepages --digest ")


def test_change_of_somebody_else_before_the_command_on_the_node_is_read_again(
    api: Any, bench_of: Callable[..., Bench], node_shell: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.add_image()
    use_mapping(api)
    bench_of().apply(vm.create_or_update)
    run = NodeShell.run

    def slow(self: Any, *commands: Any) -> None:
        if not node_shell:
            api.api().nodes("pve1").qemu(101).config.put(cpulimit=3)
        run(self, *commands)

    monkeypatch.setattr(NodeShell, "run", slow)
    bench_of(affinity="0-1").apply(vm.create_or_update)

    assert (read(api)["affinity"], len(node_shell)) == ("0-1", 2)


def test_node_without_ssh_is_what_a_pinned_guest_fails_by(api: Any, bench_of: Callable[..., Bench]) -> None:
    """The command goes over the node's own connection; this node's host key was never pinned."""
    api.add_image()
    use_mapping(api)

    with pytest.raises(AssertionError, match="pve1: qm set 101 failed over SSH"):
        bench_of(affinity="0-1").apply(vm.create_or_update)
    assert read(api)["name"] == "gpu01"


@pytest.mark.parametrize("running", [False, True])
def test_vm_without_our_tag_is_never_touched(api: Any, bench: Bench, running: bool) -> None:
    api.add_vm(101, running=running, name="mail", memory=512)

    for step in (vm.preflight, vm.create_or_update, vm.started):
        with pytest.raises(GpulabError, match="a VM of that id that is not ours") as caught:
            bench.commands(step)
        assert "'mail'" in str(caught.value)
    assert changing(api) == []


@pytest.mark.parametrize("wanted", [{}, {"cores": 4, "system_disk_gib": 70, "affinity": "0"}])
def test_vm_that_loses_our_tag_before_the_change_is_not_touched(
    api: Any, bench_of: Callable[..., Bench], node_shell: list[str], wanted: dict[str, Any]
) -> None:
    api.add_image()
    use_mapping(api)
    if wanted:
        bench_of().apply(vm.create_or_update)
    bench = bench_of(**wanted)
    commands = bench.commands(vm.create_or_update)
    with api.lock:
        api.state.vms.pop(101, None)
    api.add_vm(101, name="mail", memory=512)
    api.requests.clear()

    assert commands[0].execute(bench.state, bench.host, {}) is False
    assert changing(api) == []
    assert node_shell == []


def test_protection_is_never_lifted(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    api.add_image()
    use_mapping(api)
    sent: list[object] = []
    change = Client.change
    monkeypatch.setattr(Client, "change", lambda *a, **k: [sent.append(k.get("protection", "1")), change(*a, **k)][1])
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1, protection=0)

    bench.apply(vm.create_or_update)

    assert read(api)["protection"] == 1
    assert set(sent) == {"1"}


@pytest.mark.parametrize(
    ("privilege", "path"),
    [
        ("VM.Config.Cloudinit", "/vms"),
        ("Datastore.AllocateSpace", "/storage/local-lvm"),
        ("Mapping.Use", "/mapping/pci"),
        ("Sys.AccessNetwork", "/nodes/pve1"),
        ("SDN.Use", "/sdn/zones/localnetwork"),
    ],
)
def test_missing_privilege_is_named_with_its_path(api: Any, bench: Bench, privilege: str, path: str) -> None:
    api.take_away(privilege)

    with pytest.raises(GpulabError, match=rf"the API token lacks {privilege} on {path}"):
        bench.commands(vm.preflight)


def test_revoked_token_is_named_and_not_shown(api: Any, bench: Bench) -> None:
    api.revoke_token()

    with pytest.raises(GpulabError, match="the API refuses the token") as caught:
        bench.commands(vm.preflight)
    assert api.token not in str(caught.value)


def test_storage_without_import_is_named(api: Any, bench: Bench) -> None:
    api.set_content("local", "iso,backup")

    with pytest.raises(GpulabError, match="storage local: expected content type import, seen: iso, backup"):
        bench.commands(vm.preflight)


def test_gpu_in_use_by_another_running_vm_is_named(api: Any, bench: Bench) -> None:
    use_mapping(api)
    api.add_vm(300, running=True, name="render", hostpci0="mapping=a4000,pcie=1")

    with pytest.raises(GpulabError, match=r"gpu = 'a4000': VM 300 \(render\) is using it"):
        bench.commands(vm.preflight)


def test_gpu_in_use_under_another_name_is_named(api: Any, bench: Bench) -> None:
    use_mapping(api)
    entry = "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="other", map=[entry])
    api.add_vm(300, running=True, name="render", hostpci0="mapping=other")

    with pytest.raises(GpulabError, match=r"gpu = 'a4000': VM 300 \(render\) is using it"):
        bench.commands(vm.preflight)


def test_gpu_that_a_running_guest_is_yet_to_get_is_looked_for_too(api: Any, bench: Bench) -> None:
    use_mapping(api)
    api.add_vm(101, running=True, name="gpu01", tags="gpulab")
    api.add_vm(300, running=True, name="render", hostpci0="mapping=a4000,pcie=1")

    with pytest.raises(GpulabError, match=r"gpu = 'a4000': VM 300 \(render\) is using it"):
        bench.commands(vm.preflight)


def test_more_memory_than_the_node_has_is_refused(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(memory_mib=2**24)

    with pytest.raises(GpulabError, match=r"memory_mib = 16777216: pve1 has \d+ MiB for it"):
        bench.commands(vm.preflight)


def test_storage_without_room_for_a_new_vm_is_refused(api: Any, bench_of: Callable[..., Bench]) -> None:
    with api.lock:
        api.state.storages["local-lvm"].total = 60 * 2**30

    with pytest.raises(
        GpulabError, match="pve1: storage local-lvm has 60 GiB left; the system disk of gpu01 needs 64 GiB"
    ):
        bench_of().commands(vm.preflight)
    assert bench_of(system_disk_gib=60).commands(vm.preflight) == []


def test_full_storage_is_no_reason_to_refuse_a_vm_that_exists(api: Any, bench: Bench) -> None:
    api.add_vm(101, name="gpu01", tags="gpulab", scsi0="local-lvm:vm-101-disk-0")
    with api.lock:
        api.state.storages["local-lvm"].total = 32 * 2**30

    assert bench.commands(vm.preflight) == []


def test_all_is_well_after_installation(api: Any, bench: Bench) -> None:
    assert bench.commands(vm.preflight) == []


def test_59x_is_tried_again(api: Any, bench: Bench) -> None:
    api.answer(599, times=2, method="GET")

    assert bench.commands(vm.preflight) == []


def test_lost_reply_to_a_creation_is_looked_up_and_not_sent_twice(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    api.drop_reply("POST", "/nodes/pve1/qemu$")

    bench.apply(vm.create_or_update)

    assert [path for method, path in api.requests if method == "POST"].count("/nodes/pve1/qemu") == 1
    assert read(api)["name"] == "gpu01"


def test_failed_task_is_shown_with_its_own_words(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    lab_client = Client(_node(bench))

    with pytest.raises(GpulabError, match="task resize failed: shrinking disks is not supported"):
        lab_client.run_task(
            "PUT", "nodes", "pve1", "qemu", 101, "resize", task="resize", deadline_s=20, disk="scsi0", size="1G"
        )


def test_wrong_certificate_is_refused(api: Any, bench: Bench) -> None:
    (bench.folder / "state" / "ca" / "pve1.pem").write_text(_other_ca())

    with pytest.raises(GpulabError, match="certificate does not check against"):
        bench.commands(vm.preflight)


def test_locked_vm_is_an_error_of_this_host(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operations.proxmox.client.RETRY_S", 0.2)
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1)
    api.lock_vm(101)

    with pytest.raises(AssertionError, match=r"VM is locked \(backup\)"):
        bench.apply(vm.create_or_update)


def test_change_of_somebody_else_in_between_is_read_again(
    api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What separates the VM from its declaration is found out anew; the other's undeclared key stays."""
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    one = api.api().nodes("pve1").qemu(101)
    one.config.put(cores=1)
    others = iter(["ours", ""])
    change = Client.change

    def slow(*arguments: Any, **keywords: Any) -> Any:
        if next(others, ""):
            one.config.put(cpulimit=3, onboot=0)
        return change(*arguments, **keywords)

    monkeypatch.setattr(Client, "change", slow)
    bench.apply(vm.create_or_update)

    keys = read(api)
    assert (keys["cores"], str(keys["cpulimit"]), keys["onboot"]) == (2, "3", 1)


def test_second_run_is_told_who_is_at_work(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import sets no lock: only the task list knows of it."""
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1)
    monkeypatch.setattr(vm, "BUSY_S", 0)
    task = add_task(api, "qmconfig", user="ann@pam")

    with pytest.raises(AssertionError, match="somebody else is at work on VM 101 on pve1; nothing was changed"):
        bench.apply(vm.create_or_update)
    assert read(api)["cores"] == 1

    with api.lock:
        task.exitstatus, task.endtime = "OK", int(time.time())
    bench.apply(vm.create_or_update)
    assert read(api)["cores"] == 2


def test_task_of_somebody_else_is_described(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "BUSY_S", 0)
    add_task(api, "vncproxy", user="ann@pam")
    add_task(api, "qmconfig", user="ann@pam!ci")
    guest = _lab(bench).guests["gpu01"]

    with pytest.raises(GpulabError) as caught:
        vm.await_idle(Client(_node(bench)), guest, _node(bench))
    assert "qmconfig of ann@pam!ci since " in str(caught.value)
    assert "vncproxy" not in str(caught.value)


def test_cut_off_creation_of_ours_is_cleared_over_ssh_and_made_anew(
    api: Any, bench: Bench, node_shell: list[str]
) -> None:
    api.add_image()
    use_mapping(api)
    api.add_vm(101, lock="create")
    add_task(api, "qmcreate", exitstatus="unexpected status")
    assert bench.commands(vm.preflight) == []

    bench.apply(vm.create_or_update)

    assert node_shell == ["qm unlock 101 && qm destroy 101"]
    assert read(api)["name"] == "gpu01"
    assert "which it left" not in bench.plan
    assert "clear VM 101 on pve1, a creation of ours that was cut off" in bench.plan
    assert bench.commands(vm.create_or_update) == []


def test_volumes_of_a_cut_off_creation_go_with_it_and_no_others(
    api: Any, bench: Bench, node_shell: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    api.add_image()
    use_mapping(api)
    api.add_vm(101, lock="create")
    began = add_task(api, "qmcreate", exitstatus="unexpected status").starttime
    born = {
        "local-lvm:vm-101-disk-0": began,
        "local-lvm:vm-101-disk-1": began + 5,
        "local-lvm:vm-101-cloudinit": began + 6,
        # Somebody's: of before, another VM's, another's from its next start on, of another id, of no such name.
        "local-lvm:vm-101-disk-2": began - 1,
        "local-lvm:vm-101-disk-3": began + 5,
        "local-lvm:vm-101-disk-4": began + 5,
        "local-lvm:vm-1011-disk-0": began + 5,
        "local-lvm:vm-101-state-x": began + 5,
        "local:101/vm-101-disk-0.qcow2": began + 5,
    }
    api.add_vm(300, name="theirs", **{f"scsi{n}": volid for n, volid in enumerate(born)})
    with api.lock:
        for volume in api.state.volumes:
            if volume.volid in born:
                volume.ctime = born[volume.volid]
                # PVE reads the owner from the name.
                volume.vmid = 1011 if "1011" in volume.volid else 101
        theirs = api.state.vms[300]
        theirs.config = {"name": "theirs", "unused0": "local-lvm:vm-101-disk-3"}
        theirs.pending = {"scsi5": "file=local-lvm:vm-101-disk-4,ssd=1"}

    bench.commands(vm.create_or_update)
    for line in (
        "remove local-lvm:vm-101-disk-0, which it left",
        "remove local-lvm:vm-101-disk-1, which it left",
        "remove local-lvm:vm-101-cloudinit, which it left",
        "leave local-lvm:vm-101-disk-2: it is older than the creation",
        "leave local-lvm:vm-101-disk-3: VM 300 has it",
        "leave local-lvm:vm-101-disk-4: VM 300 has it",
    ):
        assert line in bench.plan
    bench.apply(vm.create_or_update)

    freed = [word for word in node_shell[0].split(" && ") if word.startswith("pvesm")]
    mine = ("local-lvm:vm-101-cloudinit", "local-lvm:vm-101-disk-0", "local-lvm:vm-101-disk-1")
    assert freed == [f"pvesm free {volid}" for volid in mine]
    assert node_shell[0].endswith(" && qm unlock 101 && qm destroy 101")
    there = {volume.volid: volume.ctime for volume in api.state.volumes}
    assert {volid: there[volid] for volid in born if volid not in mine} == {
        volid: time_ for volid, time_ in born.items() if volid not in mine
    }
    assert read(api)["name"] == "gpu01"


def test_volume_that_a_vm_of_a_dead_node_may_have_is_left(
    api: Any, bench: Bench, node_shell: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.add_image()
    use_mapping(api)
    api.add_vm(101, scsi0="local-lvm:vm-101-disk-0")
    with api.lock:
        api.state.vms[101].config = {"lock": "create"}
        next(each for each in api.state.volumes if each.vmid == 101).ctime = int(time.time()) + 60
    add_task(api, "qmcreate", exitstatus="unexpected status")
    get = Client.get
    dead = {"type": "qemu", "vmid": 400, "node": "pve9", "status": "unknown"}

    def with_the_dead(self: Client, *path: Any, **parameters: Any) -> Any:
        found = get(self, *path, **parameters)
        return [*found, dead] if path == ("cluster", "resources") else found

    monkeypatch.setattr(Client, "get", with_the_dead)

    bench.apply(vm.create_or_update)

    assert "leave local-lvm:vm-101-disk-0: VM 400 on pve9 may have it, which does not answer" in bench.plan
    assert node_shell[0] == "qm unlock 101 && qm destroy 101"


@pytest.mark.parametrize("tasks", [[], ["ann@pam"], ["", "ann@pam"]], ids=["none", "another's", "another's last"])
def test_cut_off_creation_of_somebody_else_is_refused(
    api: Any, bench: Bench, node_shell: list[str], tasks: list[str]
) -> None:
    api.add_vm(101, lock="create")
    for number, user in enumerate(tasks):
        add_task(api, "qmcreate", user=user, exitstatus="unexpected status").starttime += number

    for step in (vm.preflight, vm.create_or_update, vm.started):
        with pytest.raises(GpulabError, match=r"a creation that was cut off \(lock: create\)"):
            bench.commands(step)
    assert node_shell == []


def test_creation_that_still_runs_is_not_cleared(api: Any, bench: Bench, node_shell: list[str]) -> None:
    api.add_vm(101, lock="create")
    add_task(api, "qmcreate")

    with pytest.raises(GpulabError, match="VM 101 on pve1 is being created") as caught:
        bench.commands(vm.create_or_update)
    assert f"qmcreate of {own(api)} since " in str(caught.value)
    assert node_shell == []


def running_guest(api: Any, bench_of: Callable[..., Bench], **changes: Any) -> Bench:
    """The guest runs as it was declared at first; the bench declares `changes` and is planning."""
    api.add_image()
    bench_of(gpu=None).apply(vm.create_or_update)
    api.power.snippets["snippets/gpulab-vendor.yaml"] = ""
    assert api.wait(api.api().nodes("pve1").qemu(101).status.start.post()) == "OK"
    bench = bench_of(**{"gpu": None, **changes})
    bench.state.current_stage = StateStage.Prepare
    # Its facts are read by other steps; nobody asks this guest.
    bench.host.connector.assumed = True
    return bench


def test_vm_that_loses_our_tag_is_not_shut_down(api: Any, bench_of: Callable[..., Bench]) -> None:
    """No digest goes with a start or a shutdown: the tag is looked at right before."""
    bench = running_guest(api, bench_of, cores=1)
    bench.apply(vm.create_or_update)
    restart, _ = bench.commands(vm.started)
    with api.lock:
        api.state.vms[101].config["tags"] = "theirs"
    api.requests.clear()

    assert restart.execute(bench.state, bench.host, {}) is False
    assert changing(api) == []


def test_lost_answer_to_a_change_of_keys_is_decided_by_reading(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1)
    api.requests.clear()
    api.drop_reply("PUT", "/101/config$")

    bench.apply(vm.create_or_update)

    assert changing(api) == [("PUT", "/nodes/pve1/qemu/101/config")]
    assert read(api)["cores"] == 2


def test_plan_knows_that_a_change_needs_a_restart(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, cores=1, onboot=False)

    bench.commands(vm.create_or_update)
    assert len(bench.commands(vm.started)) == 2
    assert "reboot: yes (a running VM cannot take cores)" in bench.plan
    assert "onboot: 1 -> 0" in bench.plan


def test_live_change_needs_no_restart(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, onboot=False, description="ours", tags=["x"], nameserver="192.0.2.53")

    bench.apply(vm.create_or_update)
    assert len(bench.commands(vm.started)) == 1
    assert "reboot: no" in bench.plan
    assert (read(api)["onboot"], read(api)["tags"]) == (0, "gpulab;x")


def test_change_that_needs_a_restart_waits_where_none_is_allowed(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, cores=1, allow_restart=False)
    bench.apply(vm.create_or_update)
    assert bench.commands(vm.create_or_update) == []

    (refusal,) = bench.commands(vm.started)
    assert "waits: gpu01 needs a restart for cores; allow_restart is false" in bench.plan
    assert "reboot: no" in bench.plan
    api.requests.clear()
    # On every run.
    for _ in range(2):
        assert refusal.execute(bench.state, bench.host, {}) is False
        (refusal,) = bench.commands(vm.started)
    assert changing(api) == []
    assert api.api().nodes("pve1").qemu(101).status.current.get()["status"] == "running"


def test_reboots_for_the_driver_are_another_matter(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, cores=1, allow_reboot=False)
    bench.apply(vm.create_or_update)

    assert len(bench.commands(vm.started)) == 2
    assert "reboot: yes (a running VM cannot take cores)" in bench.plan


def test_restart_applies_what_waits_and_then_nothing_does(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, cores=1)
    bench.apply(vm.create_or_update)

    restart, _ = bench.commands(vm.started)
    assert restart.execute(bench.state, bench.host, {}) is True
    assert api.api().nodes("pve1").qemu(101).config.get(current=1)["cores"] == 1
    assert len(bench.commands(vm.started)) == 1


def test_pending_key_of_somebody_else_is_told_and_no_reason_to_restart(
    api: Any, bench_of: Callable[..., Bench]
) -> None:
    bench = running_guest(api, bench_of)
    api.api().nodes("pve1").qemu(101).config.put(cpulimit=2)

    assert len(bench.commands(vm.started)) == 1
    assert "reboot: no" in bench.plan
    assert "pending, set by somebody else: cpulimit" in bench.plan
    assert "restart gpu01" not in bench.plan


def test_what_cloud_init_has_not_seen_is_told(
    api: Any, bench_of: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double's own list has no pending values; PVE's has."""
    bench = running_guest(api, bench_of)
    get = Client.get
    entry = {"key": "nameserver", "value": "192.0.2.1", "pending": "192.0.2.53"}
    monkeypatch.setattr(
        Client, "get", lambda self, *path, **k: [entry] if path[-1] == "cloudinit" else get(self, *path, **k)
    )

    bench.commands(vm.started)

    assert "cloud-init has not seen yet: nameserver" in bench.plan
    assert "reboot: no" in bench.plan


def test_disks_grow_and_a_smaller_one_is_refused(api: Any, bench_of: Callable[..., Bench]) -> None:
    api.add_image()
    use_mapping(api)
    bench_of().apply(vm.create_or_update)

    grown = bench_of(data_disk={"size_gib": 300})
    grown.apply(vm.create_or_update)
    assert "size=300G" in read(api)["scsi1"]
    assert "scsi1: grows to 300G" in grown.plan
    for smaller, message in (
        ({}, r"data_disk.size_gib = 200: the disk on scsi1 has 300 GiB already"),
        ({"data_disk": {"size_gib": 300}, "system_disk_gib": 63}, r"system_disk_gib = 63: the disk on scsi0 has 64"),
    ):
        api.requests.clear()
        # The first step of a run refuses it, before a node or another guest has been changed.
        for step in (vm.preflight, vm.create_or_update):
            with pytest.raises(GpulabError, match=message):
                bench_of(**smaller).commands(step)
        assert changing(api) == []


def test_only_a_rebuild_makes_a_smaller_system_disk(api: Any, bench_of: Callable[..., Bench]) -> None:
    api.add_image()
    use_mapping(api)
    bench_of().apply(vm.create_or_update)
    smaller = bench_of(system_disk_gib=63)
    smaller.host.connector.closed = True

    assert smaller.commands(vm.preflight) == []
    smaller = bench_of(system_disk_gib=63, data_disk={"size_gib": 199})
    smaller.host.connector.closed = True
    with pytest.raises(GpulabError, match=r"data_disk.size_gib = 199: the disk on scsi1 has 200 GiB already"):
        smaller.commands(vm.preflight)


def options_of(api: Any, disk: str, current: int = 0) -> set[str]:
    found = api.api().nodes("pve1").qemu(101).config.get(current=current)
    return set(str(found[disk]).split(","))


def test_options_of_a_stopped_vms_disks_are_set_on_the_volumes_that_are_there(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    one, before = api.api().nodes("pve1").qemu(101), read(api)
    for disk in ("scsi0", "scsi1"):
        one.config.put(**{disk: before[disk].replace("iothread=1", "cache=writeback").replace(",discard=on", "")})
    volumes = sorted(volume.volid for volume in api.state.volumes)

    bench.apply(vm.create_or_update)

    assert "scsi0: local-lvm:vm-101-disk" in bench.plan
    for disk in ("scsi0", "scsi1"):
        assert options_of(api, disk) == {*before[disk].split(","), "cache=writeback"}
    assert sorted(volume.volid for volume in api.state.volumes) == volumes
    assert bench.commands(vm.create_or_update) == []


def test_options_of_a_running_vms_disk_wait_for_its_restart(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of)
    before = read(api)["scsi0"]
    with api.lock:
        api.state.vms[101].config["scsi0"] = before.replace(",ssd=1", "").replace("size=64G", "size=60G")
    bench.commands(vm.create_or_update)
    bench.commands(vm.started)
    assert "reboot: yes (a running VM cannot take scsi0)" in bench.plan

    bench.apply(vm.create_or_update)

    # Grown first: what waits carries the new size, and nothing is left to do.
    assert bench.commands(vm.create_or_update) == []
    assert options_of(api, "scsi0", current=1) == {*before.split(",")} - {"ssd=1"}
    restart, _ = bench.commands(vm.started)
    assert restart.execute(bench.state, bench.host, {}) is True
    assert options_of(api, "scsi0", current=1) == {*before.split(",")}
    assert len(bench.commands(vm.started)) == 1


def test_backups_of_a_running_vms_data_disk_need_no_restart(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = running_guest(api, bench_of, data_disk={"backup": False})

    bench.apply(vm.create_or_update)

    assert "backup=0" in options_of(api, "scsi1", current=1)
    assert len(bench.commands(vm.started)) == 1
    assert "reboot: no" in bench.plan


def test_disk_is_never_sent_with_another_volume_than_the_one_in_use(api: Any, bench_of: Callable[..., Bench]) -> None:
    """Somebody has put another system disk in line for the next start."""
    bench = running_guest(api, bench_of)
    before = read(api)["scsi0"]
    with api.lock:
        api.state.vms[101].pending["scsi0"] = "local-lvm:vm-101-disk-77,size=64G"
    api.requests.clear()

    with pytest.raises(AssertionError, match=r"scsi0 of VM 101 is .*, and \S+:vm-101-disk-77 waits to take its"):
        bench.apply(vm.create_or_update)
    assert changing(api) == []
    assert api.state.vms[101].config["scsi0"] == before


def test_image_is_downloaded_once(api: Any, bench: Bench) -> None:
    assert len(bench.commands(vm.image)) == 1
    api.add_image()
    assert bench.commands(vm.image) == []


def _lab(bench: Bench) -> Any:
    import inventory

    return inventory.of_run(bench.state)


def _node(bench: Bench) -> Any:
    return _lab(bench).nodes["pve1"]


def _other_ca() -> str:
    import tempfile
    from pathlib import Path

    from rehearsal import ca

    with tempfile.TemporaryDirectory() as folder:
        return ca.authority(Path(folder)).certificate.read_text()


def test_verify_sees_the_vm_as_declared(
    api: Any, bench_of: Callable[..., Bench], node_shell: list[str], tmp_path: Path
) -> None:
    """With its own eyes and the same token; a guest whose agent is mute is seen, too."""
    api.add_image()
    use_mapping(api)
    bench_of(**FULL).apply(vm.create_or_update)
    api.power.snippets["snippets/gpulab-vendor.yaml"] = ""
    assert api.wait(api.api().nodes("pve1").qemu(101).status.start.post()) == "OK"
    lab = inventory.load(tmp_path / "lab.py")
    node, guest = lab.nodes["pve1"], lab.guests["gpu01"]
    process = {"pid": 9, "threads": [{"name": "CPU 0/KVM", "cpus": "0-1"}], "huge_mib": {"2048": guest.memory_mib}}

    def checked() -> Verified:
        seen = {**healthy(), "vm": Api(node).read_vm(guest), "process": process}
        return verify(tmp_path / "lab.py", "--limit", "gpu01", "-k", "test_vm.py", plugin=Doctored(seen))

    assert checked().ids("fail", "not run", "inconclusive") == set()
    api.power.mute.add(101)
    assert checked().ids("fail", "not run", "inconclusive") == {"vm.agent"}
