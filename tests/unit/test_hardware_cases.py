# SPDX-License-Identifier: MIT
"""The hardware cases: each machine of `tests/hardware` read, judged, configured, booted and read again.

A case is laid out as a node shows itself, by the rehearsal's simulated boot. The program that reads a node runs on it
for real, and so do the program that writes files, the stand-ins for update-initramfs and update-grub, and the script
that binds the devices.

A case has: `origin` (published: somebody else's listing of a real machine; constructed: after the documents that it
names), `source`, `about`, `constructed_part` (of a published one); `machine` (the form of rehearsal/node/hardware.json,
so that the lab can boot it too); `boot` (what the firmware and the boot loader say and start from, `cmdline`: that of
the first boot); `guests`; `node` (that part of the inventory); `expected`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory import GpulabError
from inventory.cards import RTX_A4000
from inventory.schema import Node
from operations import files
from operations.files import File
from operations.hypervisor import boot, devices, goal, passthrough, restart
from operations.hypervisor.devices import VFIO, Wanted
from operations.hypervisor.facts import BOOT_FILES, KERNEL_CMDLINE, SHUT_DOWN, STAMP, NodeFacts, NodeState, PciFunction
from operations.hypervisor.goal import Goal, Loader
from rehearsal import node as rehearsal_node
from rehearsal.node import grub, hardware, initramfs

Case = Mapping[str, Any]

NAME = "pve1"
FOLDER = Path(__file__).parent.parent / "hardware"
CASES: dict[str, Case] = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
REFUSED = [name for name, case in CASES.items() if case["expected"]["refused"]]
ACCEPTED = [name for name in CASES if name not in REFUSED]

#: The EFI variable in which a boot loader names itself.
LOADER_INFO = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
#: The root file system that the stand-in for grub-mkconfig writes for every node.
STAND_IN_ROOT = "root=/dev/mapper/pve-root"
#: Where the copies lie that are really booted from, when proxmox-boot-tool looks after the EFI partitions.
ESP = "esp"
TICKS = os.sysconf("SC_CLK_TCK")


class CaseNode:
    """The node of a case: its file system in a folder, its commands as scripts."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        machine = folder / "machine.json"
        machine.write_text(json.dumps(case["machine"]))
        self.machine = hardware.read_machine(machine.read_text())
        self.root = folder / "root"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._install(machine)
        self.bring(["update-initramfs -c -k all", *self._loader_commands()])
        # Made by the installer, long before this boot and without gpulab.
        (self.root / STAMP[1:]).unlink()
        for path in [*self.root.glob("boot/initrd.img-*"), *self.root.glob("boot/grub/grub.cfg")]:
            os.utime(path, (1000, 1000))
        self.boot(seconds_ago=100)

    @property
    def managed(self) -> bool:
        return self.case["boot"]["boot_tool_uuids"] is not None

    @property
    def systemd_boot(self) -> bool:
        return (self.case["boot"]["loader_info"] or "").startswith("systemd-boot")

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(mode)

    def command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def _install(self, machine: Path) -> None:
        """What the installer left: kernels, boot loader, PVE."""
        set_up = self.case["boot"]
        for path, (text, mode) in rehearsal_node.files("192.0.2.1:18006", machine).items():
            self.write(path, text, mode)
        for path, text in {
            "etc/default/grub": set_up.get("default_grub"),
            "etc/kernel/cmdline": set_up["kernel_cmdline"],
            "etc/kernel/proxmox-boot-uuids": set_up["boot_tool_uuids"],
        }.items():
            if text is not None:
                self.write(path, text)
        self._install_commands()
        for guest in self.case.get("guests", []):
            self.write(f"etc/pve/qemu-server/{guest['vmid']}.conf", guest["config"])

    def _install_commands(self) -> None:
        set_up = self.case["boot"]
        version = self.case.get("pve_version", "9.1.2")
        self.command("dpkg-query", f"printf 'pve-manager\\t{version}\\tinstalled\\n'")
        self._answer("efibootmgr", set_up["efibootmgr"])
        if set_up["boot_tool_status"] is not None:
            self._answer("proxmox-boot-tool", set_up["boot_tool_status"])

    def _answer(self, command: str, text: str) -> None:
        self.command(command, f"while read -r line; do echo \"$line\"; done <<'END'\n{text.rstrip()}\nEND")

    def _loader_commands(self) -> list[str]:
        refresh = ["proxmox-boot-tool refresh"] if self.managed else []
        return refresh if self.systemd_boot else ["update-grub", *refresh]

    def bring(self, commands: Sequence[str]) -> None:
        """Run what brings files into the next boot, the moment before it noted as the operation does."""
        self.write(STAMP + ".new", "")
        for command in commands:
            self._refresh_partitions() if command == "proxmox-boot-tool refresh" else self._run(command)
        (self.root / f"{STAMP[1:]}.new").rename(self.root / STAMP[1:])

    def _run(self, command: str) -> None:
        """Run a stand-in of the rehearsal's node on this root."""
        environment = {"LAB_ROOT": str(self.root), "PATH": f"{self.root}/usr/sbin:{os.environ['PATH']}"}
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _refresh_partitions(self) -> None:
        """What proxmox-boot-tool does, whose stand-in knows no EFI partitions."""
        if self.systemd_boot:
            self.write(f"{ESP}/cmdline", (self.root / "etc/kernel/cmdline").read_text().splitlines()[0])
        else:
            self._run(f"grub-mkconfig -o /{ESP}/grub.cfg")

    def _next_boot(self) -> tuple[str, str]:
        """The kernel that the boot loader starts, and the command line that it hands over."""
        if self.systemd_boot:
            kernel, words = self.machine.kernel, (self.root / ESP / "cmdline").read_text()
            return kernel, rf"initrd=\EFI\proxmox\{kernel}\initrd.img-{kernel} {words}"
        entry = grub.default_entry((self.root / (ESP if self.managed else "boot/grub") / "grub.cfg").read_text())
        return entry.kernel, entry.cmdline.replace(STAND_IN_ROOT, self.case["boot"]["root"])

    def boot(self, seconds_ago: float = 0) -> None:
        """Boot it from what its boot loader and its initramfs hold."""
        kernel, cmdline = self._next_boot()
        machine = replace(self.machine, kernel=kernel)
        packed = initramfs.unpack((self.root / f"boot/initrd.img-{kernel}").read_bytes())
        try:
            done_first = hardware.run_init_top(machine, cmdline, packed) if initramfs.scripts(packed) else None
        except initramfs.NotRun as why:
            pytest.skip(f"the script that binds the devices could not be run: {why}")
        config = hardware.module_config(packed, cmdline)
        hardware.lay_out(self.root, hardware.boot(machine, cmdline, config, done_first))
        self._show_times(seconds_ago)
        if self.case["boot"]["firmware"] == "efi":
            self._show_firmware()
        for guest in self.case.get("guests", []):
            if guest["running"]:
                self.write(f"proc/{guest['vmid']}0/comm", "kvm")
                self.write(f"run/qemu-server/{guest['vmid']}.pid", f"{guest['vmid']}0\n")

    def _show_times(self, seconds_ago: float) -> None:
        uptime = Path("/proc/uptime").read_text()
        started = int((float(uptime.split()[0]) - seconds_ago) * TICKS)
        self.write("proc/uptime", uptime)
        self.write("proc/1/stat", f"1 (systemd) S {' '.join(18 * ['0'])} {started} 0 0\n")
        self.write("proc/sys/kernel/random/boot_id", f"{uuid.uuid4()}\n")

    def _show_firmware(self) -> None:
        (self.root / "sys/firmware/efi/efivars").mkdir(parents=True)
        if self.case["boot"]["loader_info"] is not None:
            self.write(LOADER_INFO, b"\x06\0\0\0" + f"{self.case['boot']['loader_info']}\0".encode("utf-16-le"))

    def read(self) -> NodeState:
        argument = {"root": str(self.root), "files": list(BOOT_FILES), "stamp": STAMP, "shut_down": SHUT_DOWN}
        # Only the node's commands: a tool of this machine must not answer for it.
        done = subprocess.run(
            [sys.executable, "-c", NodeFacts.script, json.dumps(argument)],
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return NodeState.of(NodeFacts().process(done.stdout.splitlines()))

    def write_files(self, changing: Mapping[str, File | None], ours: bool) -> None:
        """Write them with the program that writes on a real node, below this root."""
        command = files.write(changing, ours)
        argument = json.dumps({**json.loads(command.bits[3].obj), "root": str(self.root)})
        subprocess.run(
            [sys.executable, "-c", command.bits[2].obj, argument],
            input=command.connector_arguments["_stdin"],
            text=True,
            check=True,
        )

    def apply(self, state: NodeState, aim: Goal, ours: bool = True) -> None:
        """Write what is due, bring it into the next boot, and boot."""
        due = boot.pending(NAME, state, aim)
        self.write_files(due.files, ours)
        self.bring(boot.refresh_commands(state, aim, due))
        self.boot()


@dataclass(frozen=True)
class Seen:
    """A case and its node as it was found."""

    case: Case
    node: Node
    state: NodeState

    @property
    def expected(self) -> Any:
        return self.case["expected"]

    @property
    def wanted(self) -> Wanted:
        return devices.located(NAME, self.state, devices.wanted(self.node))

    @property
    def cards(self) -> list[PciFunction]:
        """The RTX A4000 of the machine."""
        return [function for function in self.state.pci if function.id == RTX_A4000.functions[0]]


def declared(case: Case) -> Node:
    return Node.model_validate({"name": NAME, "ssh_hostname": "192.0.2.11", **case["node"]})


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Every case, read once."""
    return {
        name: Seen(case, declared(case), CaseNode(case, tmp_path_factory.mktemp(name)).read())
        for name, case in CASES.items()
    }


def refusals(case: Seen) -> list[GpulabError]:
    """What the preflight would say, in its order: each look only where the one before found nothing."""
    policy = {"allow_reboot": case.node.allow_reboot, "allow_guest_shutdown": case.node.allow_guest_shutdown}
    try:
        return (
            passthrough.host_problems(NAME, case.state)
            or devices.identity_problems(NAME, case.state, case.wanted)
            or passthrough.preflight_problems(NAME, case.state, case.wanted, **policy)
        )
    except GpulabError as error:
        return [error]


def unsettled(state: NodeState, node: Node) -> list[object]:
    """What a deploy would still do or complain of after the boot."""
    wanted = devices.located(NAME, state, devices.wanted(node))
    aim = goal.as_declared(NAME, state, wanted)
    due = boot.pending(NAME, state, aim)
    problems = [
        *passthrough.preflight_problems(NAME, state, wanted, allow_guest_shutdown=node.allow_guest_shutdown),
        *devices.identity_problems(NAME, state, wanted),
        *devices.reset_problems(NAME, state, wanted),
        *passthrough.running_problems(NAME, state, wanted, aim),
        *filter(None, [restart.unapplied(NAME, state, aim, due)]),
    ]
    return [*due.files, *boot.refresh_commands(state, aim, due), *restart.differences(state, aim, due), *problems]


def drivers(state: NodeState) -> dict[str, str | None]:
    return {function.address: function.driver for function in state.pci}


def boot_files(node: CaseNode) -> dict[str, bytes | None]:
    paths = [node.root / path[1:] for path in BOOT_FILES]
    return {str(path): path.read_bytes() if path.exists() else None for path in paths}


@pytest.mark.parametrize("name", CASES)
def test_node_is_read_as_the_case_describes_it(name: str, seen: dict[str, Seen]) -> None:
    case, state = seen[name].case, seen[name].state

    described = {entry["address"]: entry for entry in case["machine"]["devices"]}
    assert {function.address: function.id for function in state.pci} == {
        address: entry["id"] for address, entry in described.items()
    }
    for function in state.pci:
        entry = described[function.address]
        assert (function.pci_class, function.subsystem) == (entry["class"][:4], entry["subsystem"])
        assert function.iommu_group == (entry["group"] if state.iommu else None)
        assert (function.bridge, function.boot_vga) == ("secondary_bus" in entry, entry.get("boot_vga", False))
        assert list(function.bars) == entry.get("bars", list(function.bars))
        assert list(function.reset_methods) == entry.get("reset_methods", list(function.reset_methods))
    assert state.cmdline == case["boot"]["cmdline"]
    assert state.memory_mib == case["machine"]["memory_mib"]


@pytest.mark.parametrize("name", CASES)
def test_boot_loader_is_the_one_that_booted(name: str, seen: dict[str, Seen]) -> None:
    assert goal.boot_loader(NAME, seen[name].state).name == seen[name].expected["loader"]


@pytest.mark.parametrize("name", CASES)
def test_preflight_refuses_what_it_should_and_nothing_else(name: str, seen: dict[str, Seen]) -> None:
    problems = refusals(seen[name])

    assert [problem.brief for problem in problems] == seen[name].expected["refused"]
    if "remedy" in seen[name].expected:
        assert [problem.resolution for problem in problems] == [seen[name].expected["remedy"]]


@pytest.mark.parametrize("name", ACCEPTED)
def test_plan_writes_the_words_where_they_count(name: str, seen: dict[str, Seen]) -> None:
    case = seen[name]
    aim = goal.as_declared(NAME, case.state, case.wanted)
    due = boot.pending(NAME, case.state, aim)

    assert aim.phrases == case.expected["words"]
    assert set(due.files) == set(case.expected["writes"])
    for path, words in case.expected["writes"].items():
        file = due.files[path]
        assert file is not None
        assert [word for word in words if word not in file.content] == []
    assert restart.needed(case.state, aim, due) == case.expected["reboot"]
    assert [str(guest) for guest in case.state.running_guests] == case.expected.get("guests_shut_down", [])


@pytest.mark.parametrize("name", ACCEPTED)
def test_boot_hands_over_the_declared_devices_and_no_other(name: str, tmp_path: Path) -> None:
    node, policy, bound = CaseNode(CASES[name], tmp_path), declared(CASES[name]), CASES[name]["expected"]["bound"]
    before = node.read()

    node.apply(before, goal.of(NAME, before, devices.wanted(policy)))

    after = node.read()
    assert drivers(after) == drivers(before) | dict.fromkeys(bound, VFIO)
    assert after.iommu
    assert unsettled(after, policy) == []


@pytest.mark.parametrize("name", ACCEPTED)
def test_node_boots_as_before_once_it_is_rolled_back(name: str, tmp_path: Path) -> None:
    node, policy = CaseNode(CASES[name], tmp_path), declared(CASES[name])
    before, untouched = node.read(), boot_files(node)
    node.apply(before, goal.of(NAME, before, devices.wanted(policy)))

    state = node.read()
    node.apply(state, goal.of(NAME, state, None), ours=False)

    after = node.read()
    assert boot_files(node) == untouched
    assert drivers(after) == drivers(before)
    assert (after.kernel, after.cmdline) == (before.kernel, before.cmdline)


@pytest.mark.parametrize("name", CASES)
def test_case_says_where_it_comes_from(name: str) -> None:
    case, text = CASES[name], (FOLDER / f"{name}.yaml").read_text()

    assert case["origin"] in ("published", "constructed")
    assert case["about"].endswith(".")
    assert "recorded" not in text.lower()
    if case["origin"] == "published":
        assert "https://" in case["source"] and "icence" in case["source"]
        assert case["constructed_part"]
    else:
        assert ".adoc" in case["source"] or "Documentation/" in case["source"]


@pytest.mark.parametrize("name", CASES)
def test_tree_of_a_case_is_one_that_a_machine_could_have(name: str) -> None:
    tree = CASES[name]["machine"]["devices"]
    addresses = [entry["address"] for entry in tree]
    behind = [f"{entry['address'][:5]}{entry['secondary_bus']}" for entry in tree if "secondary_bus" in entry]

    assert addresses == sorted(set(addresses))
    assert len(behind) == len(set(behind))
    assert [entry["class"] for entry in tree if "secondary_bus" in entry] == ["060400"] * len(behind)
    assert sum(entry.get("boot_vga", False) for entry in tree) == 1
    assert all(entry["class"] == "030000" for entry in tree if entry.get("boot_vga"))


def test_cases_cover_the_machines_and_boot_set_ups_that_matter(seen: dict[str, Seen]) -> None:
    """From what was read, not from names."""
    cases = list(seen.values())
    assert len(cases) >= 8
    assert {case.case["origin"] for case in cases} == {"published", "constructed"}

    assert {case.state.cpu_vendor for case in cases} == {"GenuineIntel", "AuthenticAMD"}
    assert {goal.boot_loader(NAME, case.state) for case in cases} == set(Loader)
    assert any(
        goal.boot_loader(NAME, case.state) is Loader.SHIM and case.state.files[KERNEL_CMDLINE] is not None
        for case in cases
    )
    assert any(
        goal.boot_loader(NAME, case.state) is Loader.SYSTEMD_BOOT and "boot=zfs" in case.state.words for case in cases
    )
    assert {1, 2} <= {len(case.cards) for case in cases}
    assert {len(case.node.passthrough.devices) for case in cases if len(case.cards) == 2} == {1, 2}
    assert any(shares_with_sata(case) for case in cases)
    assert any(card.boot_vga for case in cases for card in case.cards)
    assert {bool(case.state.firmware_iommu) for case in cases if not case.state.iommu} == {True, False}


def shares_with_sata(case: Seen) -> bool:
    groups = {card.iommu_group for card in case.cards} - {None}
    return any(function.iommu_group in groups and function.pci_class == "0106" for function in case.state.pci)
