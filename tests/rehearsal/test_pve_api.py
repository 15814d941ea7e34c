# SPDX-License-Identifier: MIT
"""The API as proxmoxer sees it: statuses and words of transcripts that were taken from real nodes (PVE 9.2 and 8.4)."""

from __future__ import annotations

import hashlib
import http.server
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from proxmoxer import ResourceException

from rehearsal.pve.front import Emulator
from rehearsal.pve.power import A4000, PciDevice
from rehearsal.pve.state import Store
from rehearsal.pve.testing import FakeLab

GOOD_MAP = "node=pve1,path=0000:01:00,id=10de:24b0,subsystem-id=10de:14ad,iommugroup=14"
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPLACEHOLDER a@b\n"


@pytest.fixture(scope="module")
def running_lab() -> Iterator[FakeLab]:
    with FakeLab() as lab:
        yield lab


@pytest.fixture
def lab(running_lab: FakeLab) -> FakeLab:
    running_lab.reset()
    return running_lab


@pytest.fixture
def node(lab: FakeLab) -> Any:
    return lab.api().nodes("pve1")


def refused(act: Callable[[], object]) -> tuple[int, str, object]:
    """(status, reason line, parameter errors) of a call that must fail."""
    with pytest.raises(ResourceException) as info:
        act()
    return info.value.status_code, info.value.content, info.value.errors


def create(lab: FakeLab, vmid: int = 101, **more: object) -> str:
    """Create a VM with the operator's token as the tool would; returns the exit status."""
    volid = "local:import/debian-13.qcow2"
    if all(volume.volid != volid for volume in lab.state.volumes):
        lab.add_image()
    values: dict[str, object] = {
        "name": f"gpu{vmid}",
        "machine": "q35",
        "bios": "ovmf",
        "memory": 2048,
        "efidisk0": "local-lvm:0,efitype=4m,pre-enrolled-keys=0",
        "scsi0": f"local-lvm:0,import-from={volid},discard=on,iothread=1,ssd=on",
        "scsi1": "local-lvm:40,discard=on",
        "ide2": "local-lvm:cloudinit",
        "ipconfig0": "ip=10.0.0.5/24,gw=10.0.0.1",
        "net0": "virtio,bridge=vmbr0",
        "agent": "enabled=1",
        "boot": "order=scsi0",
        "tags": "GPU,iac",
        "sshkeys": urllib.parse.quote(SSH_KEY, safe=""),
    }
    return lab.wait(lab.api().nodes("pve1").qemu.post(vmid=vmid, **(values | more)))


# Creating and reading.


def test_a_new_vm_reads_back_as_on_a_real_node(lab: FakeLab, node: Any) -> None:
    assert create(lab) == "OK"
    config = node.qemu(101).config.get()
    assert config["scsi0"] == "local-lvm:vm-101-disk-1,discard=on,iothread=1,size=3G,ssd=1"
    assert config["scsi1"] == "local-lvm:vm-101-disk-2,discard=on,size=40G"
    assert config["efidisk0"] == "local-lvm:vm-101-disk-0,efitype=4m,pre-enrolled-keys=0,size=4M"
    assert config["ide2"] == "local-lvm:vm-101-cloudinit,media=cdrom"
    assert config["tags"] == "gpu;iac"
    assert config["memory"] == "2048"
    assert config["sshkeys"].endswith("%0A")
    assert config["net0"].startswith("virtio=BC:24:11:")
    assert {"meta", "smbios1", "vmgenid", "digest"} <= set(config)


def test_creating_it_again_is_a_500(lab: FakeLab, node: Any) -> None:
    create(lab)
    status, reason, errors = refused(lambda: node.qemu.post(vmid=101, name="gpu"))
    assert (status, errors) == (500, None)
    assert reason == "unable to create VM 101 - VM 101 already exists on node 'pve1'"


def test_a_missing_image_fails_the_task_and_leaves_no_vm(lab: FakeLab, node: Any) -> None:
    status = create(lab, scsi0="local-lvm:0,import-from=local:import/gone.qcow2")
    assert status == "unable to create VM 101 - volume 'local:import/gone.qcow2' does not exist"
    assert node.qemu.get() == []
    assert node.storage("local-lvm").content.get() == []


def test_an_absolute_path_is_for_root(lab: FakeLab, node: Any) -> None:
    path = "local-lvm:0,import-from=/var/lib/vz/import/d12.qcow2"
    status, reason, _ = refused(lambda: node.qemu.post(vmid=102, scsi0=path))
    assert status == 500
    assert reason.startswith("Only root can pass arbitrary filesystem paths.")


def test_a_vm_that_is_not_there_is_a_500(node: Any) -> None:
    assert refused(lambda: node.qemu(104).config.get())[:2] == (
        500,
        "Configuration file 'nodes/pve1/qemu-server/104.conf' does not exist",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bogus", "1", "property is not defined in schema and the schema does not allow additional properties"),
        ("cores", "x", "type check ('integer') failed - got 'x'"),
        ("onboot", "True", "type check ('boolean') failed - got 'True'"),
        ("onboot", "yes", "type check ('boolean') failed - got 'yes'"),
        ("sshkeys", "ssh-ed25519 AAAA", "invalid format - invalid urlencoded string"),
        ("hostpci0", "mapping=a4000,pcie=2", "invalid format - format error\nhostpci0.pcie: value"),
    ],
)
def test_wrong_parameters_are_a_400_that_names_them(
    lab: FakeLab, node: Any, key: str, value: str, message: str
) -> None:
    create(lab)
    status, reason, errors = refused(lambda: node.qemu(101).config.put(**{key: value}))
    assert (status, reason) == (400, "Parameter verification failed.")
    assert isinstance(errors, dict)
    assert errors[key].startswith(message)


def test_an_unknown_endpoint_is_a_501(lab: FakeLab) -> None:
    assert refused(lambda: lab.root().nodes("pve1").nosuch.get())[:2] == (
        501,
        "Method 'GET /nodes/pve1/nosuch' not implemented",
    )


def test_what_the_front_does_not_know_fakepve_answers_for_an_administrator(lab: FakeLab, node: Any) -> None:
    assert {entry["service"] for entry in lab.root().nodes("pve1").services.get()} >= {"pveproxy"}
    assert refused(lambda: node.services.get())[:2] == (403, "Permission check failed (/, Sys.Audit)")


# Changing.


def test_a_stale_digest_is_refused(lab: FakeLab, node: Any) -> None:
    create(lab)
    status, reason, _ = refused(lambda: node.qemu(101).config.put(cores=4, digest="0" * 40))
    assert (status, reason) == (500, "checksum mismatch (file change by other user?)")
    node.qemu(101).config.put(cores=4, digest=node.qemu(101).config.get()["digest"])
    assert node.qemu(101).config.get()["cores"] == 4


def test_setting_and_deleting_a_key_at_once_is_refused(lab: FakeLab, node: Any) -> None:
    create(lab)
    status, _, errors = refused(lambda: node.qemu(101).config.put(cores=2, delete="cores"))
    assert (status, errors) == (400, {"delete": "you can't use '-cores' and -delete cores' at the same time"})
    node.qemu(101).config.put(delete="rng0")


@pytest.mark.parametrize("key, value", [("hugepages", "1024"), ("affinity", "0-3"), ("args", "-S")])
def test_root_only_keys_are_refused_to_any_token(lab: FakeLab, node: Any, key: str, value: str) -> None:
    create(lab)
    assert refused(lambda: node.qemu(101).config.post(**{key: value}))[:2] == (500, f"only root can set '{key}' config")
    root_token = lab.add_token("root@pam", "all", privsep=False)
    as_root = lab.api(root_token, "root@pam", "all").nodes("pve1").qemu(101).config
    assert refused(lambda: as_root.put(**{key: value}))[:2] == (500, f"only root can set '{key}' config")
    lab.root().nodes("pve1").qemu(101).config.put(**{key: value})
    assert node.qemu(101).config.get()[key] == value


def test_a_host_device_without_mapping_is_for_root(lab: FakeLab, node: Any) -> None:
    create(lab)
    assert refused(lambda: node.qemu(101).config.put(hostpci0="host=0000:01:00"))[:2] == (
        500,
        "only root can set 'hostpci0' config for non-mapped devices",
    )
    status, _, errors = refused(lambda: node.qemu(101).config.put(hostpci0="mapping=a4000,romfile=a.rom"))
    assert (status, errors) == (400, {"hostpci0": "only root@pam can set 'romfile' option"})


def test_startup_takes_a_right_on_the_root_path(lab: FakeLab, node: Any) -> None:
    create(lab)
    assert refused(lambda: node.qemu(101).config.put(startup="order=1"))[:2] == (
        403,
        "Permission check failed (/, Sys.Modify)",
    )


def test_a_running_vm_keeps_what_it_cannot_change_pending(lab: FakeLab, node: Any) -> None:
    lab.add_vm(101, running=True, memory="2048", cores=2, agent="enabled=1")
    node.qemu(101).config.put(memory=1024, cores=1, description="now", delete="agent")
    changed = [entry for entry in node.qemu(101).pending.get() if "pending" in entry or "delete" in entry]
    assert changed == [
        {"key": "cores", "value": 2, "pending": 1},
        {"key": "memory", "value": "2048", "pending": "1024"},
    ]
    assert node.qemu(101).config.get()["memory"] == "1024"
    assert node.qemu(101).config.get(current=1)["memory"] == "2048"
    assert lab.wait(node.qemu(101).status.reboot.post()) == "OK"
    assert node.qemu(101).config.get(current=1)["memory"] == "1024"


def test_a_locked_vm_refuses_at_once_or_in_its_task(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.lock_vm(101, "backup")
    assert refused(lambda: node.qemu(101).config.put(cores=3))[:2] == (500, "VM is locked (backup)")
    assert node.qemu(101).status.current.get()["lock"] == "backup"
    assert lab.wait(node.qemu(101).status.start.post()) == "VM is locked (backup)"
    assert lab.wait(node.qemu(101).delete()) == "VM is locked (backup)"
    status, _, errors = refused(lambda: node.qemu(101).delete(skiplock=1))
    assert (status, errors) == (400, {"skiplock": "Only root may use this option."})


def test_a_disk_grows_and_does_not_shrink(lab: FakeLab, node: Any) -> None:
    create(lab)
    assert lab.wait(node.qemu(101).resize.put(disk="scsi0", size="16G")) == "OK"
    assert "size=16G" in node.qemu(101).config.get()["scsi0"]
    shrink = node.qemu(101).resize.put(disk="scsi0", size="100M")
    assert lab.wait(shrink) == "shrinking disks is not supported"
    assert node.tasks(shrink).log.get()[-1]["t"] == "TASK ERROR: shrinking disks is not supported"


def test_system_disk_is_swapped_and_put_back(lab: FakeLab, node: Any) -> None:
    """The rebuild's sequence: the old disk stays as unusedN until it is deleted, and can return."""
    create(lab)
    node.qemu(101).config.put(protection=1)
    old = node.qemu(101).config.get()["scsi0"].partition(",")[0]
    swap = node.qemu(101).config.post(scsi0="local-lvm:0,import-from=local:import/debian-13.qcow2,discard=on")
    assert lab.wait(swap) == "OK"
    swapped = node.qemu(101).config.get()
    assert swapped["unused0"] == old
    assert swapped["scsi0"].partition(",")[0] != old
    assert swapped["scsi1"].startswith("local-lvm:vm-101-disk-2")
    status, reason, _ = refused(lambda: node.qemu(101).config.put(delete="unused0"))
    assert (status, reason) == (500, f"can't remove unused disk {old} - protection mode enabled")
    node.qemu(101).config.put(scsi0=f"{old},discard=on")
    back = node.qemu(101).config.get()
    assert back["scsi0"].startswith(f"{old},")
    assert back["unused0"] == swapped["scsi0"].partition(",")[0]
    node.qemu(101).config.put(protection=0)
    node.qemu(101).config.put(delete="unused0")
    volumes = {entry["volid"] for entry in node.storage("local-lvm").content.get()}
    assert old in volumes
    assert back["unused0"] not in volumes


def test_system_disk_of_a_running_vm_is_not_swapped(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.wait(node.qemu(101).status.start.post())
    swap = node.qemu(101).config.post(scsi0="local-lvm:0,import-from=local:import/debian-13.qcow2")
    assert lab.wait(swap) != "OK"
    assert node.qemu(101).config.get()["scsi0"].startswith("local-lvm:vm-101-disk-1")


def test_data_disk_moves_to_a_keeper_and_back(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.wait(node.qemu.post(vmid=901, memory=16, protection=1))
    move = node.qemu(101).move_disk.post(disk="scsi1", **{"target-vmid": 901, "target-disk": "scsi5"})
    assert lab.wait(move) == "OK"
    assert "scsi1" not in node.qemu(101).config.get()
    assert node.qemu(901).config.get()["scsi5"] == "local-lvm:vm-901-disk-0,discard=on,size=40G"
    assert lab.wait(node.qemu(101).delete(purge=1)) == "OK"
    assert [entry["volid"] for entry in node.storage("local-lvm").content.get()] == ["local-lvm:vm-901-disk-0"]


def test_destroy_is_refused_while_protected_or_running(lab: FakeLab, node: Any) -> None:
    create(lab, protection=1)
    assert refused(lambda: node.qemu(101).delete(purge=1))[:2] == (500, "can't remove VM 101 - protection mode enabled")
    node.qemu(101).config.put(delete="protection")
    lab.wait(node.qemu(101).status.start.post())
    assert refused(lambda: node.qemu(101).delete(purge=1))[:2] == (500, "VM 101 is running - destroy failed")
    lab.wait(node.qemu(101).status.stop.post())
    assert lab.wait(node.qemu(101).delete(purge=1)) == "OK"
    assert node.storage("local-lvm").content.get() == []


# Tasks.


def test_task_fields_and_upid(lab: FakeLab, node: Any) -> None:
    upid = node.qemu.post(vmid=101, memory=512)
    lab.wait(upid)
    parts = upid.split(":")
    assert (parts[0], parts[1], parts[5:]) == ("UPID", "pve1", ["qmcreate", "101", "gpulab@pve!deploy", ""])
    task = node.tasks(upid).status.get()
    assert (task["status"], task["exitstatus"], task["user"], task["tokenid"]) == (
        "stopped",
        "OK",
        "gpulab@pve",
        "deploy",
    )
    assert node.tasks.get(vmid=101, typefilter="qmcreate")[0]["status"] == "OK"
    assert node.tasks(upid).log.get()[-1]["t"] == "TASK OK"


def test_a_running_task_has_no_exit_status(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.power.start_gate.clear()
    upid = node.qemu(101).status.start.post()
    try:
        task = node.tasks(upid).status.get()
        assert task["status"] == "running"
        assert "exitstatus" not in task
        assert [entry["upid"] for entry in node.tasks.get(source="active")] == [upid]
        # The worker holds the configuration file: a second writer gives up after a while.
        assert refused(lambda: node.qemu(101).config.put(cores=2))[:2] == (
            500,
            "can't lock file '/var/lock/qemu-server/lock-101.conf' - got timeout",
        )
    finally:
        lab.power.start_gate.set()
    assert lab.wait(upid) == "OK"


def test_others_tasks_take_an_audit_right(lab: FakeLab) -> None:
    upid = lab.root().nodes("pve1").qemu.post(vmid=101, memory=512)
    secret = lab.add_token("low@pve", "tt")
    low = lab.api(secret, "low@pve", "tt").nodes("pve1")
    assert refused(lambda: low.tasks(upid).status.get())[:2] == (
        403,
        "Permission check failed (/nodes/pve1, Sys.Audit)",
    )
    assert low.tasks.get() == []


# Permissions.


def test_a_token_without_rights_sees_nothing(lab: FakeLab) -> None:
    lab.add_vm(101)
    secret = lab.add_token("low@pve", "tt")
    lab.grant("low@pve", "/vms/101", "VM.Audit")
    low = lab.api(secret, "low@pve", "tt")
    node = low.nodes("pve1")
    assert refused(lambda: node.qemu(101).config.get())[:2] == (403, "Permission check failed (/vms/101, VM.Audit)")
    assert refused(lambda: node.qemu.post(vmid=102, memory=512))[:2] == (403, "Permission check failed")
    assert low.cluster.mapping.pci.get() == []
    assert refused(lambda: low.cluster.mapping.pci.post(id="xx", map=GOOD_MAP))[:2] == (
        403,
        "Permission check failed (/mapping/pci, Mapping.Modify)",
    )
    assert refused(lambda: node.qemu(101).config.put(hostpci0="mapping=m3"))[:2] == (
        403,
        "Permission check failed (/vms/101, VM.Config.Disk|VM.Config.CDROM|VM.Config.CPU|VM.Config.Memory|"
        "VM.Config.Network|VM.Config.HWType|VM.Config.Options|VM.Config.Cloudinit)",
    )
    assert refused(lambda: node.status.post(command="reboot"))[:2] == (
        403,
        "Permission check failed (/nodes/pve1, Sys.PowerMgmt)",
    )
    assert low.access.permissions.get() == {}
    assert node.qemu.get() == []


@pytest.mark.parametrize(
    ("privilege", "change", "where"),
    [
        ("VM.Config.CPU", {"cores": 2}, "/vms/101, VM.Config.CPU"),
        ("VM.Config.Memory", {"memory": 512}, "/vms/101, VM.Config.Memory"),
        ("VM.Config.Options", {"tags": "a"}, "/vms/101, VM.Config.Options"),
        ("VM.Config.HWType", {"machine": "q35"}, "/vms/101, VM.Config.HWType"),
        ("Mapping.Use", {"hostpci0": "mapping=a4000"}, "/mapping/pci/a4000, Mapping.Use"),
        ("SDN.Use", {"net0": "virtio,bridge=vmbr0"}, "/sdn/zones/localnetwork/vmbr0, SDN.Use"),
        ("Datastore.AllocateSpace", {"scsi3": "local-lvm:1"}, "/storage/local-lvm, Datastore.AllocateSpace"),
    ],
)
def test_the_missing_privilege_and_its_path_are_named(
    lab: FakeLab, node: Any, privilege: str, change: dict[str, object], where: str
) -> None:
    lab.add_vm(101)
    lab.take_away(privilege)
    assert refused(lambda: node.qemu(101).config.put(**change))[:2] == (403, f"Permission check failed ({where})")


def test_revoked_token_and_wrong_secret_are_a_401_without_a_body(lab: FakeLab) -> None:
    api = lab.api()
    assert api.version.get()["release"] == "9.1"
    lab.revoke_token()
    assert refused(lambda: api.version.get()) == (401, "Authentication failed!", {"errors": b""})


def test_no_credentials_are_no_ticket(lab: FakeLab) -> None:
    answer = requests.get(f"{lab.url}/api2/json/version", verify=str(lab.ca), timeout=10)
    assert (answer.status_code, answer.reason, answer.content) == (401, "No ticket", b"")


def test_a_ticket_writes_only_with_its_csrf_token(lab: FakeLab) -> None:
    login = {"username": "root@pam", "password": lab.root_password}
    base = f"{lab.url}/api2/json"
    ticket = requests.post(f"{base}/access/ticket", data=login, verify=str(lab.ca), timeout=10).json()["data"]
    cookies = {"PVEAuthCookie": ticket["ticket"]}
    answer = requests.post(
        f"{base}/access/users", data={"userid": "a@pve"}, cookies=cookies, verify=str(lab.ca), timeout=10
    )
    assert answer.status_code == 401
    assert requests.get(f"{base}/version", cookies=cookies, verify=str(lab.ca), timeout=10).ok
    wrong = {"username": "root@pam", "password": "no"}
    assert not requests.post(f"{base}/access/ticket", data=wrong, verify=str(lab.ca), timeout=10).ok


def test_permissions_of_a_path(lab: FakeLab) -> None:
    held = lab.api().access.permissions.get(path="/mapping/pci/a4000")
    assert held == {"/mapping/pci/a4000": {"Mapping.Audit": 1, "Mapping.Modify": 1, "Mapping.Use": 1}}
    assert "/vms" in lab.api().access.permissions.get()


def test_destroying_a_vm_forgets_its_access_rules(lab: FakeLab) -> None:
    lab.add_vm(101)
    lab.grant("gpulab@pve", "/vms/101", "VM.Allocate VM.Audit")
    lab.wait(lab.root().nodes("pve1").qemu(101).delete())
    assert all(rule.path != "/vms/101" for rule in lab.state.acl)


def test_bootstrap_makes_role_user_rights_and_token(lab: FakeLab) -> None:
    root = lab.root().access
    root.roles.post(roleid="Small", privs="VM.Audit")
    root.users.post(userid="auto@pve")
    root.acl.put(path="/vms", users="auto@pve", roles="Small")
    made = root.users("auto@pve").token("iac").post(privsep=0)
    assert made["full-tokenid"] == "auto@pve!iac"
    lab.add_vm(101)
    assert len(lab.api(made["value"], "auto@pve", "iac").nodes("pve1").qemu.get()) == 1
    status, _, errors = refused(lambda: root.users("auto@pve").token("iac").post(privsep=0))
    assert (status, errors) == (400, {"tokenid": "Token already exists."})
    status, _, errors = refused(lambda: root.roles.post(roleid="Old", privs="VM.Monitor"))
    assert (status, errors) == (400, {"privs": "invalid privilege 'VM.Monitor'\n"})


# Mappings and hardware.


def test_mapping_life(lab: FakeLab) -> None:
    mappings = lab.api().cluster.mapping.pci
    assert mappings.post(id="a4000", map=[GOOD_MAP], description="card") is None
    assert refused(lambda: mappings.post(id="a4000", map=GOOD_MAP))[:2] == (
        500,
        "create hardware mapping failed: pci ID 'a4000' already defined",
    )
    found = mappings("a4000").get()
    assert (found["type"], found["map"], found["description"]) == ("pci", [GOOD_MAP], "card")
    assert refused(lambda: mappings("a4000").put(map=GOOD_MAP, digest="0" * 40))[:2] == (
        500,
        "update hardware mapping failed: detected modified configuration - file changed by other user? Try again.",
    )
    mappings("a4000").put(map=GOOD_MAP, delete="description", digest=found["digest"])
    assert "description" not in mappings("a4000").get()
    assert mappings("a4000").delete() is None
    assert mappings.get() == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (GOOD_MAP, None),
        (GOOD_MAP.replace("=14", "=15"), "'iommugroup' does not match for 'a4000' (14 != 15)\n"),
        (
            "node=pve1,path=0000:01:00,id=10de:24b0",
            "Invalid configuration: missing expected property 'iommugroup' for device '0000:01:00.0'\n",
        ),
    ],
)
def test_check_node_compares_a_mapping_with_the_hardware(lab: FakeLab, entry: str, message: str | None) -> None:
    mappings = lab.api().cluster.mapping.pci
    mappings.post(id="a4000", map=entry)
    checks = mappings.get(**{"check-node": "pve1"})[0]["checks"]
    assert checks == ([] if message is None else [{"severity": "error", "message": message}])


def test_pci_list_hides_bridges_unless_asked(lab: FakeLab) -> None:
    """The right to read it sits on `/`: the operator has none there."""
    assert refused(lambda: lab.api().nodes("pve1").hardware.pci.get())[:2] == (
        403,
        "Permission check failed (/, Sys.Audit|Sys.Modify)",
    )
    hardware = lab.root().nodes("pve1").hardware.pci
    shown = {entry["id"] for entry in hardware.get()}
    assert shown == {"0000:00:02.0", "0000:01:00.0", "0000:01:00.1"}
    everything = hardware.get(**{"pci-class-blacklist": ""})
    assert "0000:00:01.0" in {entry["id"] for entry in everything}
    card = next(entry for entry in everything if entry["id"] == "0000:01:00.0")
    assert (card["vendor"], card["device"], card["iommugroup"]) == ("0x10de", "0x24b0", 14)


# Power.


def start(lab: FakeLab, vmid: int = 101) -> str:
    return lab.wait(lab.api().nodes("pve1").qemu(vmid).status.start.post())


def test_start_stop_and_what_the_guest_is_given(lab: FakeLab, node: Any) -> None:
    lab.power.snippets["snippets/v.yml"] = "#cloud-config\n"
    lab.api().cluster.mapping.pci.post(id="a4000", map=GOOD_MAP)
    create(lab, hostpci0="mapping=a4000,pcie=1", cicustom="vendor=local:snippets/v.yml", ciupgrade=0)
    assert start(lab) == "OK"
    guest = lab.power.started[101]
    assert [device.address for device in guest.gpus] == ["0000:01:00.0", "0000:01:00.1"]
    assert [slot for slot, _ in guest.data] == ["scsi1"]
    assert guest.system is not None
    assert guest.system.volid == "local-lvm:vm-101-disk-1"
    assert guest.address == "10.0.0.5/24"
    assert guest.seed["vendor-data"] == "#cloud-config\n"
    assert "package_upgrade: false" in guest.seed["user-data"]
    assert node.qemu(101).status.current.get()["status"] == "running"
    assert start(lab) == "VM 101 already running"
    assert lab.wait(node.qemu(101).status.stop.post()) == "OK"
    assert lab.wait(node.qemu(101).status.stop.post()) == "OK"
    assert node.qemu(101).status.current.get()["status"] == "stopped"


def test_start_fails_in_pves_words(lab: FakeLab, node: Any) -> None:
    create(lab, hostpci0="mapping=nope")
    assert start(lab) == "PCI device mapping not found for 'nope'"
    mappings = lab.api().cluster.mapping.pci
    mappings.post(id="nope", map=GOOD_MAP.replace("=14", "=15"))
    assert start(lab) == (
        "PCI device mapping invalid (hardware probably changed): 'iommugroup' does not match for 'nope' (14 != 15)"
    )
    mappings("nope").put(map=GOOD_MAP)
    lab.hardware.iommu_on = False
    assert start(lab) == "cannot prepare PCI pass-through, IOMMU not present"
    lab.hardware.iommu_on = True
    node.qemu(101).config.put(cicustom="user=local:snippets/u.yml")
    assert start(lab) == "volume 'local:snippets/u.yml' does not exist"
    node.qemu(101).config.put(delete="cicustom", cores=64)
    assert start(lab) == "MAX 16 vcpus allowed per VM on this node"


def test_a_card_has_one_vm_at_a_time(lab: FakeLab, node: Any) -> None:
    lab.api().cluster.mapping.pci.post(id="a4000", map=GOOD_MAP)
    for vmid in (101, 102):
        create(lab, vmid, hostpci0="mapping=a4000")
    assert start(lab, 101) == "OK"
    assert start(lab, 102) == "PCI device '0000:01:00.0' already in use by VMID '101'"
    lab.wait(node.qemu(101).status.stop.post())
    assert start(lab, 102) == "OK"


def test_the_first_free_card_of_a_mapping_is_taken(lab: FakeLab) -> None:
    second = PciDevice("0000:02:00.0", "0x030000", "10de", "24b0", "10de", "14ad", 15, "RTX A4000")
    lab.hardware.devices.append(second)
    entry = GOOD_MAP.replace("01:00", "02:00").replace("=14", "=15")
    lab.api().cluster.mapping.pci.post(id="a4000", map=[GOOD_MAP, entry])
    for vmid in (101, 102):
        create(lab, vmid, hostpci0="mapping=a4000")
        assert start(lab, vmid) == "OK"
    assert lab.power.started[101].gpus[0] == A4000[0]
    assert lab.power.started[102].gpus == [second]


def test_a_guest_that_ignores_the_shutdown(lab: FakeLab, node: Any) -> None:
    create(lab)
    start(lab)
    lab.power.stubborn.add(101)
    assert lab.wait(node.qemu(101).status.shutdown.post(timeout=1)) == "VM quit/powerdown failed - got timeout"
    assert lab.wait(node.qemu(101).status.shutdown.post(timeout=1, forceStop=1)) == "OK"
    assert 101 not in lab.power.started


def test_a_guest_that_goes_down_by_itself_is_stopped_and_frees_its_card(lab: FakeLab, node: Any) -> None:
    lab.api().cluster.mapping.pci.post(id="a4000", map=GOOD_MAP)
    for vmid in (101, 102):
        create(lab, vmid, hostpci0="mapping=a4000")
    start(lab, 101)
    lab.power.stop(101)
    assert node.qemu(101).status.current.get()["status"] == "stopped"
    assert start(lab, 102) == "OK"


# The guest agent.


def test_agent_answers_when_it_is_configured_and_runs(lab: FakeLab, node: Any) -> None:
    create(lab)
    agent = node.qemu(101).agent
    assert refused(lambda: agent("network-get-interfaces").get())[:2] == (500, "VM 101 is not running")
    start(lab)
    lab.power.agents.clear()
    assert refused(lambda: agent.ping.post())[:2] == (500, "QEMU guest agent is not running")
    lab.power.agents.add(101)
    lab.power.answers["hostname"] = (0, b"unused")
    lab.power.answers["cat", "/etc/hostname"] = (3, b"gpu\n")
    pid = agent.exec.post(command=["cat", "/etc/hostname"])["pid"]
    status = {"exited": 0}
    while not status["exited"]:
        status = agent("exec-status").get(pid=pid)
    assert status == {"exited": 1, "exitcode": 3, "out-data": "gpu\n"}
    lab.power.answers["cat", "--", "/etc/key.pub"] = (0, b"ssh-ed25519 AAAA\n")
    assert agent("file-read").get(file="/etc/key.pub")["content"] == "ssh-ed25519 AAAA\n"


def test_agent_that_is_not_configured(lab: FakeLab, node: Any) -> None:
    lab.add_vm(101, running=True)
    assert refused(lambda: node.qemu(101).agent.ping.post())[:2] == (500, "No QEMU guest agent configured")


def test_agent_rights_by_release(lab: FakeLab, node: Any) -> None:
    lab.add_vm(101, running=True, agent="enabled=1")
    lab.take_away("VM.GuestAgent.Unrestricted")
    assert refused(lambda: node.qemu(101).agent.exec.post(command=["id"]))[:2] == (
        403,
        "Permission check failed (/vms/101, VM.GuestAgent.Unrestricted)",
    )
    lab.state.release = "8.4.21"
    assert refused(lambda: node.qemu(101).agent.ping.post())[:2] == (
        403,
        "Permission check failed (/vms/101, VM.Monitor)",
    )


# Storage and images.


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """An HTTP server with one small image."""
    (tmp_path / "d.qcow2").write_bytes(b"QFI\xfb image")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(tmp_path))

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_is_checked(lab: FakeLab, node: Any, mirror: str) -> None:
    download = node.storage("local")("download-url")
    right = hashlib.sha512(b"QFI\xfb image").hexdigest()
    wanted = {"content": "import", "filename": "d.qcow2", "url": f"{mirror}/d.qcow2", "checksum-algorithm": "sha512"}
    wrong = lab.wait(download.post(**wanted, checksum="00"))
    assert wrong == f"checksum mismatch: got '{right}' != expect '00'"
    assert node.storage("local").content.get(content="import") == []
    assert lab.wait(download.post(**wanted, checksum=right)) == "OK"
    entry = node.storage("local").content.get(content="import")[0]
    assert (entry["volid"], entry["format"], entry["size"]) == ("local:import/d.qcow2", "qcow2", 10)


def test_download_that_nobody_answers(lab: FakeLab, node: Any) -> None:
    upid = node.storage("local")("download-url").post(
        content="import", filename="d.qcow2", url="http://127.0.0.1:1/d.qcow2"
    )
    assert lab.wait(upid) == "download failed: Connecting to 127.0.0.1:1... failed: Connection refused."


def test_download_needs_a_name_that_can_be_imported(node: Any) -> None:
    download = node.storage("local")("download-url")
    wanted = {"content": "import", "filename": "d.img", "url": "http://127.0.0.1:1/d.img"}
    status, _, errors = refused(lambda: download.post(**wanted))
    assert (status, errors) == (400, {"filename": "invalid filename or wrong extension"})


def test_storage_without_the_content_type_refuses(lab: FakeLab, node: Any) -> None:
    lab.set_content("local", "iso,backup")
    wanted = {"content": "import", "filename": "d.qcow2", "url": "http://127.0.0.1:1/d.qcow2"}
    assert refused(lambda: node.storage("local")("download-url").post(**wanted))[:2] == (
        500,
        "storage 'local' is not configured for content-type 'import'",
    )
    assert next(s for s in node.storage.get() if s["storage"] == "local")["content"] == "iso,backup"


def test_content_is_empty_without_an_audit_right(lab: FakeLab, node: Any) -> None:
    """Silence, not a refusal: why the tool compares rights instead of probing lists."""
    lab.add_image()
    assert len(node.storage("local").content.get()) == 1
    lab.take_away("Datastore.Audit")
    assert node.storage("local").content.get() == []


def test_node_says_what_memory_is_left(lab: FakeLab, node: Any) -> None:
    before = node.status.get()["memory"]
    lab.add_vm(101, running=True, memory="4096")
    after = node.status.get()["memory"]
    assert before["free"] - after["free"] == 4096 * 1024**2


def test_next_free_id_is_text(lab: FakeLab) -> None:
    lab.add_vm(100)
    assert lab.api().cluster.nextid.get() == "101"
    status, _, errors = refused(lambda: lab.api().cluster.nextid.get(vmid=100))
    assert (status, errors) == (400, {"vmid": "VM 100 already exists"})


# Faults and persistence.


def test_gateway_errors_on_demand(lab: FakeLab) -> None:
    lab.answer(596, times=2, path="/version")
    api = lab.api()
    for _ in range(2):
        assert refused(lambda: api.version.get())[:2] == (596, "Broken pipe")
    assert api.version.get()["version"] == "9.1.1"


def test_a_dropped_reply_has_been_carried_out(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.drop_reply("POST", "/status/start")
    with pytest.raises(requests.exceptions.ConnectionError):
        node.qemu(101).status.start.post()
    assert node.tasks.get(vmid=101, source="all")[0]["type"] == "qmstart"


def test_a_gateway_error_may_hide_what_was_carried_out(lab: FakeLab, node: Any) -> None:
    create(lab)
    lab.answer(599, method="POST", path="/status/start", carried_out=True)
    assert refused(lambda: node.qemu(101).status.start.post())[:2] == (599, "Too many redirections")
    assert node.tasks.get(vmid=101, source="all")[0]["type"] == "qmstart"


def test_a_fault_spares_the_first_requests(lab: FakeLab) -> None:
    lab.answer(596, path="/version", skip=1)
    api = lab.api()
    assert api.version.get()["version"] == "9.1.1"
    assert refused(lambda: api.version.get())[:2] == (596, "Broken pipe")


def test_an_expired_token_is_refused(lab: FakeLab) -> None:
    lab.state.users[lab.user].tokens[lab.token_name].expire = 1
    assert refused(lambda: lab.api().version.get())[:2] == (401, "token expired - access denied")


def test_a_cluster_is_reached_through_one_node() -> None:
    with FakeLab(others=["pve2"]) as lab:
        lab.add_vm(101)
        lab.at("pve2").vms[102] = lab.state.vms[101].model_copy(update={"vmid": 102})
        api = lab.root()
        assert [vm["vmid"] for vm in api.nodes("pve1").qemu.get()] == [101]
        assert [vm["vmid"] for vm in api.nodes("pve2").qemu.get()] == [102]
        assert refused(lambda: api.nodes("pve2").qemu.post(vmid=101))[1].startswith(
            "unable to create VM 101 - VM 101 already exists on node 'pve1'"
        )
        assert api.cluster.nextid.get() == "100"
        api.cluster.mapping.pci.post(id="a4000", map=["node=pve2,path=0000:01:00,id=10de:24b0"])
        checked = api.cluster.mapping.pci.get(**{"check-node": "pve2"})[0]["checks"]
        assert "missing expected property 'iommugroup'" in checked[0]["message"]
        lab.offline.add("pve2")
        assert refused(lambda: api.nodes("pve2").qemu.get())[:2] == (595, "No route to host")
        assert api.nodes("pve1").qemu.get()


def test_state_survives_a_restart_of_the_front(lab: FakeLab, tmp_path: Path) -> None:
    create(lab)
    path = tmp_path / "state.json"
    store = Store("pve1", path)
    store.state = lab.state.model_copy(deep=True)
    store.save()
    assert path.stat().st_mode & 0o777 == 0o600
    again = Store("pve1", path)
    assert again.state == store.state
    assert lab.token not in path.read_text()


def test_every_route_of_ours_is_found_by_its_own_path(lab: FakeLab) -> None:
    """An earlier template must not swallow a later one's path."""
    emulator: Emulator = lab.emulator
    for route, _ in emulator.routes:
        path = route.template.replace("{volume}", "local:import/x.qcow2")
        for name in ("node", "vmid", "upid", "storage", "id", "userid", "tokenid", "roleid"):
            path = path.replace(f"{{{name}}}", f"a-{name}")
        found = emulator.find(route.method, path)
        assert found is not None
        assert found[0] is route
