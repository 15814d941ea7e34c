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
from verify.vm.api import cpus, options, size_gib

pytestmark = pytest.mark.on("guests")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
TAG = "gpulab"
REBUILD = "gpulab-rebuild"
SLOTS = ("scsi0", "scsi1")
#: What no inventory changes: OVMF and a fixed memory for the GPU, a controller for each disk, the boot from the system
#: disk.
FIXED = {"bios": "ovmf", "balloon": "0", "scsihw": "virtio-scsi-single", "boot": "order=scsi0"}
#: What each means where it is absent.
DEFAULTS = {"bios": "seabios", "scsihw": "lsi"}
#: Sizes of pages in KiB that each declaration allows.
PAGES_KIB = {"2M": ("2048",), "1G": ("1048576",), "any": ("2048", "1048576")}
#: A thread of QEMU's that is a CPU of the guest.
VCPU = re.compile(r"CPU [0-9]+/KVM")


@pytest.mark.critical
@pytest.mark.promise("vm.exists", "vmid", "node", fix=DEPLOY)
def test_vm_is_there_and_ours(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    assert vm["exists"], f"{guest.name}: {guest.node} has no VM {guest.vmid}"
    tags = re.split(r"[;, ]+", str(vm["config"].get("tags", "")))
    assert TAG in tags, f"{guest.name}: VM {guest.vmid} has the tags {', '.join(tags) or '(none)'}, expected {TAG}"
    seen(f"VM {guest.vmid}, tags {', '.join(tags)}")


@pytest.mark.critical
@pytest.mark.promise("vm.running", "vmid", fix=DEPLOY)
def test_vm_runs(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    config(guest, vm)
    assert vm["status"] == "running", f"{guest.name}: VM {guest.vmid} is {vm['status']}, expected running"
    seen(vm["status"])


@pytest.mark.major
@pytest.mark.promise("vm.cores", "cores", fix=DEPLOY)
def test_vm_has_its_cores(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    cores = int(keys.get("cores", 1)) * int(keys.get("sockets", 1))
    assert cores == guest.cores, f"{guest.name}: {cores} cores, expected {guest.cores}"
    seen(f"{cores} cores")


@pytest.mark.major
@pytest.mark.promise("vm.memory", "memory_mib", fix=DEPLOY)
def test_vm_has_its_memory(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    memory = options(str(config(guest, vm).get("memory", 512)))
    mib = int(memory.get("current", memory.get("", "0")))
    assert mib == guest.memory_mib, f"{guest.name}: {mib} MiB of memory, expected {guest.memory_mib}"
    seen(f"{mib} MiB")


@pytest.mark.major
@pytest.mark.promise("vm.machine", "machine", fix=DEPLOY)
def test_vm_is_a_q35_machine(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    machine = str(config(guest, vm).get("machine", "(PVE's default, i440fx)"))
    type_ = options(machine).get("type", options(machine).get(""))
    assert type_ == guest.machine, f"{guest.name}: machine {machine}, expected {guest.machine}: PCI Express needs q35"
    seen(machine)


@pytest.mark.major
@pytest.mark.promise("vm.hardware", fix=DEPLOY)
def test_vm_has_the_hardware_of_every_guest(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    found = {key: str(keys.get(key, DEFAULTS.get(key, "(not set)"))) for key in FIXED}
    wrong = [f"{key} {found[key]}, expected {wanted}" for key, wanted in FIXED.items() if found[key] != wanted]
    assert not wrong, f"{guest.name}: {'; '.join(wrong)}"
    seen(", ".join(f"{key} {value}" for key, value in found.items()))


@pytest.mark.major
@pytest.mark.promise(
    "vm.agent", fix="systemctl status qemu-guest-agent on {host}; if it does not run, restart the VM on {node}"
)
def test_guest_agent_answers(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    """Backups hold the file systems still by it, and a deploy reads the host key of a new guest by it."""
    keys = running(guest, vm)
    enabled = options(str(keys.get("agent", "0")))
    if enabled.get("enabled", enabled.get("")) != "1":
        raise Broken(f"{guest.name}: agent {keys.get('agent', '(not set)')}, expected enabled=1", DEPLOY)
    assert not vm["agent"], f"{guest.name}: the agent of VM {guest.vmid} does not answer: {vm['agent']}"
    seen("it answers")


@pytest.mark.major
@pytest.mark.promise("vm.gpu", "gpu", fix=DEPLOY)
def test_vm_is_given_its_gpu_and_no_other(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    given = {key: str(value) for key, value in config(guest, vm).items() if re.fullmatch(r"hostpci[0-9]+", key)}
    shown = ", ".join(f"{key}={value}" for key, value in given.items()) or "no hostpci"
    if guest.gpu is None:
        assert not given, f"{guest.name}: {shown}; expected none"
        return
    wanted = f"hostpci0=mapping={guest.gpu},pcie=1"
    assert list(given) == ["hostpci0"], f"{guest.name}: {shown}; expected exactly {wanted}"
    found = options(given["hostpci0"])
    assert (found.get("mapping"), found.get("pcie")) == (guest.gpu, "1"), f"{guest.name}: {shown}; expected {wanted}"
    seen(shown)


@pytest.mark.major
@pytest.mark.promise("vm.onboot", "onboot", fix=DEPLOY)
def test_vm_starts_with_its_node_as_declared(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    onboot = bool(int(config(guest, vm).get("onboot", 0)))
    assert onboot == guest.onboot, f"{guest.name}: onboot is {onboot}, expected {guest.onboot}"
    seen("it does" if onboot else "it does not")


@pytest.mark.major
@pytest.mark.promise("vm.network", "bridge", "networks", fix=DEPLOY)
def test_vm_has_its_network_cards_and_no_others(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = {key: str(value) for key, value in config(guest, vm).items() if re.fullmatch(r"net[0-9]+", key)}
    expected = [f"net{number}" for number in range(len(guest.cards))]
    assert sorted(keys) == expected, f"{guest.name}: {', '.join(sorted(keys)) or 'no card'}, expected {expected}"
    for key, card in zip(expected, guest.cards, strict=True):
        found = options(keys[key])
        for option, wanted in (("bridge", card.bridge), ("tag", card.vlan), ("mtu", card.mtu)):
            value = found.get(option)
            told = f"{guest.name}: {key}: {option} {value or '(none)'}, expected {wanted or 'none'}"
            assert value == (None if wanted is None else str(wanted)), told
        mac = found.get("virtio", "no virtio card").lower()
        assert card.mac in (None, mac) or card.mac.lower() == mac, (
            f"{guest.name}: {key}: MAC {mac}, expected {card.mac}"
        )
    seen("; ".join(f"{key}={value}" for key, value in keys.items()))


@pytest.mark.major
@pytest.mark.promise("vm.cloudinit", "address", "gateway", "nameserver", "searchdomain", "ssh_user", fix=DEPLOY)
def test_cloud_init_is_told_addresses_and_names(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    for number, card in enumerate(guest.cards):
        found = options(str(keys.get(f"ipconfig{number}", "ip=dhcp")))
        wanted = str(card.address or "dhcp"), None if card.gateway is None else str(card.gateway)
        told = f"{guest.name}: ipconfig{number}: {keys.get(f'ipconfig{number}')}, expected {wanted[0]} by {wanted[1]}"
        assert (found.get("ip"), found.get("gw")) == wanted, told
    servers = re.split(r"[;, ]+", str(keys.get("nameserver", "")))
    wanted_servers = [str(server) for server in guest.nameserver]
    if wanted_servers:
        assert servers == wanted_servers, f"{guest.name}: nameserver {servers}, expected {wanted_servers}"
    user, upgrade = keys.get("ciuser"), str(keys.get("ciupgrade", 1))
    assert user == guest.ssh_user, f"{guest.name}: ciuser {user or '(not set)'}, expected {guest.ssh_user}"
    assert upgrade == "0", f"{guest.name}: ciupgrade {upgrade}, expected 0: it would upgrade the driver at a first boot"
    domain = keys.get("searchdomain")
    assert guest.searchdomain in (None, domain), f"{guest.name}: searchdomain {domain}, expected {guest.searchdomain}"
    seen(", ".join(str(keys.get(f"ipconfig{number}", "ip=dhcp")) for number in range(len(guest.cards))))


@pytest.mark.major
@pytest.mark.promise("vm.cpu_type", "cpu_type", fix=DEPLOY)
def test_vm_has_its_type_of_cpu(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    found = options(str(config(guest, vm).get("cpu", "kvm64")))
    cpu = found.get("cputype", found.get(""))
    assert cpu == guest.cpu_type, f"{guest.name}: cpu {cpu}, expected {guest.cpu_type}"
    seen(str(cpu))


@pytest.mark.major
@pytest.mark.promise("vm.numa", "numa", "numa_nodes", fix=DEPLOY)
def test_vm_has_its_numa_nodes(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    if guest.numa is None and not guest.numa_nodes:
        seen("none declared")
        return
    on = bool(int(keys.get("numa", 0)))
    assert on == (guest.numa is not False), f"{guest.name}: numa is {on}, expected {guest.numa is not False}"
    found = {key: options(str(value)) for key, value in keys.items() if re.fullmatch(r"numa[0-9]+", key)}
    wanted = {
        f"numa{number}": {"cpus": each.cpus.replace(",", ";"), "memory": str(each.memory_mib)}
        | ({"hostnodes": each.host_nodes.replace(",", ";"), "policy": str(each.policy)} if each.host_nodes else {})
        for number, each in enumerate(guest.numa_nodes)
    }
    assert found == wanted, f"{guest.name}: NUMA nodes {found}, expected {wanted}"
    seen(f"{len(found)} NUMA nodes")


@pytest.mark.major
@pytest.mark.promise("vm.pinning", "affinity", "hugepages", fix=DEPLOY)
def test_vm_runs_on_its_cpus_and_pages(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    affinity, pages = keys.get("affinity"), keys.get("hugepages")
    assert affinity == guest.affinity, (
        f"{guest.name}: affinity {affinity or 'none'}, expected {guest.affinity or 'none'}"
    )
    wanted = {None: None, "2M": "2", "1G": "1024", "any": "any"}[guest.hugepages]
    assert (None if pages is None else str(pages)) == wanted, (
        f"{guest.name}: hugepages {pages or 'none'}, expected {wanted or 'none'}"
    )
    seen(f"affinity {affinity or 'none'}, hugepages {pages or 'none'}")


@pytest.mark.major
@pytest.mark.on("pinned")
@pytest.mark.promise("vm.pinning.cpus", "affinity", fix="stop and start VM of {host} on {node}; then " + DEPLOY)
def test_process_of_the_vm_runs_on_its_cpus(
    guest: Guest, vm: Observation, process: Observation, seen: Callable[[str], None]
) -> None:
    """As the scheduler of the node has it of each thread, whatever the configuration says."""
    threads = qemu(guest, vm, process)["threads"]
    wanted = cpus(guest.affinity or "")
    astray = [f"{each['name']} on {each['cpus']}" for each in threads if not cpus(each["cpus"]) <= wanted]
    assert not astray, (
        f"{guest.name}: of QEMU ({process['pid']}) on {guest.node} {', '.join(astray[:3])} "
        f"{'and others may run' if len(astray) > 3 else 'may run'}, expected {guest.affinity} alone"
    )
    vcpus = [each for each in threads if VCPU.fullmatch(each["name"])]
    assert vcpus, f"{guest.name}: QEMU ({process['pid']}) on {guest.node} has no thread of a CPU of the guest"
    used: set[int] = set().union(*(cpus(each["cpus"]) for each in vcpus))
    assert used == wanted, (
        f"{guest.name}: the guest's CPUs may run on {', '.join(map(str, sorted(used)))} of {guest.node} alone, "
        f"expected {guest.affinity}"
    )
    seen(f"{len(threads)} threads of QEMU, {len(vcpus)} of them CPUs of the guest, on {guest.affinity}")


@pytest.mark.major
@pytest.mark.on("huge")
@pytest.mark.promise(
    "vm.pinning.pages", "hugepages", "memory_mib", fix="stop and start VM of {host} on {node}; then " + DEPLOY
)
def test_memory_of_the_vm_lies_on_huge_pages(
    guest: Guest, vm: Observation, process: Observation, seen: Callable[[str], None]
) -> None:
    """As the kernel of the node has mapped it."""
    pages = qemu(guest, vm, process)["huge_mib"]
    found = sum(pages.get(size, 0) for size in PAGES_KIB[guest.hugepages or "any"])
    told = ", ".join(f"{mib} MiB on pages of {size} KiB" for size, mib in sorted(pages.items())) or "none on huge pages"
    assert found >= guest.memory_mib, (
        f"{guest.name}: the memory of QEMU ({process['pid']}) on {guest.node} lies {told}, "
        f"expected {guest.memory_mib} MiB on {guest.hugepages}"
    )
    seen(told)


@pytest.mark.minor
@pytest.mark.promise("vm.startup", "startup", fix=DEPLOY)
def test_vm_starts_in_its_order(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    if guest.startup is None:
        seen("none declared")
        return
    text = str(config(guest, vm).get("startup", ""))
    found = options(text)
    wanted = {"order": guest.startup.order, "up": guest.startup.up_s, "down": guest.startup.down_s}
    declared = {"order": found.get("order", found.get("")) or None, "up": found.get("up"), "down": found.get("down")}
    assert declared == {key: None if value is None else str(value) for key, value in wanted.items()}, (
        f"{guest.name}: startup {text or 'none'}, expected {wanted}"
    )
    seen(text)


@pytest.mark.major
@pytest.mark.promise("vm.protection", "protection", fix=DEPLOY)
def test_vm_is_protected_as_declared(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    found = bool(int(config(guest, vm).get("protection", 0)))
    assert found == guest.protection, f"{guest.name}: protection is {found}, expected {guest.protection}"
    seen("it is" if found else "it is not")


@pytest.mark.minor
@pytest.mark.promise("vm.labels", "tags", "description", fix=DEPLOY)
def test_vm_carries_its_tags_and_description(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    keys = config(guest, vm)
    # Our own tag is what vm.exists is about.
    tags = sorted(set(filter(None, re.split(r"[;, ]+", str(keys.get("tags", ""))))) - {TAG})
    wanted = sorted({*guest.tags} - {TAG})
    assert tags == wanted, f"{guest.name}: tags {', '.join(tags) or 'none'}, expected {', '.join(wanted)}"
    if guest.description is not None:
        # A rebuild notes its progress in a line of its own.
        lines = [line for line in str(keys.get("description", "")).splitlines() if line.split(" ")[0] != REBUILD]
        assert "\n".join(lines).rstrip() == guest.description.rstrip(), (
            f"{guest.name}: description {' '.join(lines)!r}, expected {guest.description!r}"
        )
    seen(f"tags {', '.join(tags) or 'none'}")


@pytest.mark.major
@pytest.mark.promise("vm.disks", "system_disk_gib", "data_disk.size_gib", fix=DEPLOY)
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
@pytest.mark.promise("vm.disks.options", "data_disk.backup", fix=DEPLOY)
def test_disks_have_their_options(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    """What `vm.disks` calls absent has none."""
    wrong = []
    for key, value in disks(guest, vm).items():
        found = options(value)
        backup = "1" if key == "scsi0" or guest.data_disk.backup else "0"
        for option, default, wanted in (
            ("discard", "ignore", "1"),
            ("iothread", "0", "1"),
            ("ssd", "0", "1"),
            # Without declared backups PVE's own hands may have been at it.
            *([("backup", "1", backup)] if guest.backup is not None or backup == "0" else []),
        ):
            is_now = found.get(option, default)
            if is_now != wanted:
                wrong.append(f"{key} has {option}={is_now}, expected {wanted}")
    assert not wrong, f"{guest.name}: {'; '.join(wrong)}"
    seen(", ".join(disks(guest, vm).values()))


@pytest.mark.minor
@pytest.mark.promise("vm.disks.storage", "disk_storage", fix="qm disk move, on {node}: no deploy moves a disk")
def test_disks_lie_on_the_declared_storage(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    found = {key: value.partition(":")[0] for key, value in disks(guest, vm).items()}
    wrong = [f"{key} on {storage}" for key, storage in found.items() if storage != guest.disk_storage]
    assert not wrong, f"{guest.name}: {', '.join(wrong)}, expected {guest.disk_storage}"
    seen(guest.disk_storage)


@pytest.mark.major
@pytest.mark.promise("vm.mapping", "gpu", fix=DEPLOY)
def test_mapping_leads_to_the_declared_card(
    guest: Guest, node: Node, vm: Observation, pci_tree: Callable[[], Observation], seen: Callable[[str], None]
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
    seen(f"{path} on {node.name}")


@pytest.mark.minor
@pytest.mark.promise("vm.pending", fix=DEPLOY)
def test_no_change_waits_for_a_restart(guest: Guest, vm: Observation, seen: Callable[[str], None]) -> None:
    config(guest, vm)
    assert not vm["pending"], f"{guest.name}: changes wait for a restart: {', '.join(vm['pending'])}"
    seen("none")


def config(guest: Guest, vm: Observation) -> dict[str, Any]:
    """The VM's configuration; the check is not run when there is no VM."""
    if not vm["exists"]:
        not_run(f"VM {guest.vmid} does not exist")
    found: dict[str, Any] = vm["config"]
    return found


def running(guest: Guest, vm: Observation) -> dict[str, Any]:
    """The configuration of a VM that runs; else the check is not run."""
    found = config(guest, vm)
    if vm["status"] != "running":
        not_run(f"VM {guest.vmid} is {vm['status']}")
    return found


def qemu(guest: Guest, vm: Observation, process: Observation) -> Observation:
    """The process of a VM that runs; the check is not run where the VM does not, or is none of QEMU's."""
    running(guest, vm)
    if process["pid"] is None and guest.simulated:
        not_run("a simulated VM has no process of QEMU")
    assert process["pid"] is not None, f"{guest.name}: {guest.node} has no process of VM {guest.vmid}, which runs"
    return process


def disks(guest: Guest, vm: Observation) -> dict[str, str]:
    """The two disks by their places, without those that are absent."""
    keys = config(guest, vm)
    return {key: str(keys[key]) for key in SLOTS if keys.get(key)}
