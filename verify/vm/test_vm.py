# SPDX-License-Identifier: MIT
"""Is the guest's VM there, running and made as declared?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest, Node
from verify.hypervisor.declared import slot
from verify.observations import Observation
from verify.verdicts import Broken, not_run
from verify.vm.api import options, size_gib

pytestmark = pytest.mark.on("guests")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
TAG = "gpulab"


@pytest.mark.critical
@pytest.mark.promise("vm.exists", fix=DEPLOY)
def test_vm_is_there_and_ours(guest: Guest, vm: Observation) -> None:
    assert vm["exists"], f"{guest.name}: {guest.node} has no VM {guest.vmid}"
    tags = re.split(r"[;, ]+", str(vm["config"].get("tags", "")))
    assert TAG in tags, f"{guest.name}: VM {guest.vmid} has the tags {', '.join(tags) or '(none)'}, expected {TAG}"


@pytest.mark.critical
@pytest.mark.promise("vm.running", fix=DEPLOY)
def test_vm_runs(guest: Guest, vm: Observation) -> None:
    config(guest, vm)
    assert vm["status"] == "running", f"{guest.name}: VM {guest.vmid} is {vm['status']}, expected running"


@pytest.mark.major
@pytest.mark.promise("vm.cores", fix=DEPLOY)
def test_vm_has_its_cores(guest: Guest, vm: Observation) -> None:
    keys = config(guest, vm)
    cores = int(keys.get("cores", 1)) * int(keys.get("sockets", 1))
    assert cores == guest.cores, f"{guest.name}: {cores} cores, expected {guest.cores}"


@pytest.mark.major
@pytest.mark.promise("vm.memory", fix=DEPLOY)
def test_vm_has_its_memory(guest: Guest, vm: Observation) -> None:
    memory = options(str(config(guest, vm).get("memory", 512)))
    mib = int(memory.get("current", memory.get("", "0")))
    assert mib == guest.memory_mib, f"{guest.name}: {mib} MiB of memory, expected {guest.memory_mib}"


@pytest.mark.major
@pytest.mark.promise("vm.machine", fix=DEPLOY)
def test_vm_is_a_q35_machine(guest: Guest, vm: Observation) -> None:
    machine = str(config(guest, vm).get("machine", "(PVE's default, i440fx)"))
    assert "q35" in machine, f"{guest.name}: machine {machine}, expected q35: PCI Express needs it"


@pytest.mark.major
@pytest.mark.promise("vm.gpu", fix=DEPLOY)
def test_vm_is_given_its_gpu_and_no_other(guest: Guest, vm: Observation) -> None:
    given = {key: str(value) for key, value in config(guest, vm).items() if re.fullmatch(r"hostpci[0-9]+", key)}
    shown = ", ".join(f"{key}={value}" for key, value in given.items()) or "no hostpci"
    if guest.gpu is None:
        assert not given, f"{guest.name}: {shown}; expected none"
        return
    wanted = f"hostpci0=mapping={guest.gpu},pcie=1"
    assert list(given) == ["hostpci0"], f"{guest.name}: {shown}; expected exactly {wanted}"
    found = options(given["hostpci0"])
    assert (found.get("mapping"), found.get("pcie")) == (guest.gpu, "1"), f"{guest.name}: {shown}; expected {wanted}"


@pytest.mark.major
@pytest.mark.promise("vm.onboot", fix=DEPLOY)
def test_vm_starts_with_its_node_as_declared(guest: Guest, vm: Observation) -> None:
    onboot = bool(int(config(guest, vm).get("onboot", 0)))
    assert onboot == guest.onboot, f"{guest.name}: onboot is {onboot}, expected {guest.onboot}"


@pytest.mark.major
@pytest.mark.promise("vm.network", fix=DEPLOY)
def test_vm_is_on_its_bridge(guest: Guest, vm: Observation) -> None:
    net = options(str(config(guest, vm).get("net0", "")))
    assert net.get("bridge") == guest.bridge, f"{guest.name}: bridge {net.get('bridge')}, expected {guest.bridge}"


@pytest.mark.major
@pytest.mark.promise("vm.disks", fix=DEPLOY)
def test_vm_has_both_disks_in_their_sizes(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    told = []
    for key, name, wanted in (
        ("scsi0", "system", guest.system_disk_gib),
        ("scsi1", "data", guest.data_disk.size_gib),
    ):
        size = size_gib(str(config(guest, vm).get(key, "")))
        found = "absent" if size is None else f"{size:g} GiB"
        assert size == wanted, f"{guest.name}: the {name} disk ({key}) is {found}, expected {wanted} GiB"
        told.append(f"{name} {found}")
    seen(", ".join(told))


@pytest.mark.major
@pytest.mark.promise("vm.mapping", fix=DEPLOY)
def test_mapping_leads_to_the_declared_card(
    guest: Guest, node: Node, vm: Observation, pci_tree: Callable[[], Observation]
) -> None:
    config(guest, vm)
    if guest.gpu is None:
        assert not vm["mapping"]
        return
    device = node.device(guest.gpu)
    assert vm["mapping"] is not None, f"{guest.name}: the cluster has no mapping {guest.gpu}"
    here = [found for entry in vm["mapping"] if (found := options(entry)).get("node") == node.name]
    assert len(here) == 1, f"{guest.name}: mapping {guest.gpu} has {len(here)} entries for {node.name}, expected one"
    path, id_ = here[0].get("path", ""), here[0].get("id")
    try:
        # Only a card without address has to be looked for.
        wanted = device.address or slot(node, pci_tree(), device)
    except Broken as error:
        not_run(str(error))
    # `0000:01:00` is the whole device, `0000:01:00.0;0000:01:00.1` its functions.
    places = {part.partition(".")[0] for part in path.split(";")}
    assert places == {wanted}, f"{guest.name}: mapping {guest.gpu} leads to {path} on {node.name}, expected {wanted}"
    assert id_ == device.id, f"{guest.name}: mapping {guest.gpu} is for {id_}, expected {device.id}"


@pytest.mark.minor
@pytest.mark.promise("vm.pending", fix=DEPLOY)
def test_no_change_waits_for_a_restart(guest: Guest, vm: Observation) -> None:
    config(guest, vm)
    assert not vm["pending"], f"{guest.name}: changes wait for a restart: {', '.join(vm['pending'])}"


def config(guest: Guest, vm: Observation) -> dict[str, Any]:
    """The VM's configuration; the check is not run when there is no VM."""
    if not vm["exists"]:
        not_run(f"VM {guest.vmid} does not exist")
    found: dict[str, Any] = vm["config"]
    return found
