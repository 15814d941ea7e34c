# SPDX-License-Identifier: MIT
"""Resource mappings: the name under which a cluster knows a node's GPU, so that a token may hand it out."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyinfra import context
from pyinfra.api import Host, StringCommand

import inventory
from inventory import GpulabError, Node
from operations import step
from operations.facts import JsonFact
from operations.plan import key_diff
from operations.proxmox.client import AlreadyExists, Client, NotFound, with_digest

#: A mapping belongs to the cluster: its nodes change it one at a time.
_one_at_a_time: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class Device:
    """Function 0 of a GPU as the node's PCI tree shows it; PVE compares it at every start."""

    path: str
    id: str
    subsystem_id: str | None
    iommu_group: int

    def entry(self, node: str) -> str:
        """The device as an entry of a mapping, in the order in which PVE writes it."""
        keys = {"id": self.id, "iommugroup": str(self.iommu_group), "node": node, "path": self.path}
        if self.subsystem_id is not None:
            keys["subsystem-id"] = self.subsystem_id
        return ",".join(f"{key}={value}" for key, value in sorted(keys.items()))


def with_node(entries: list[str], node: str, wanted: str) -> list[str]:
    """The entries of a mapping with exactly one for `node`, those of other nodes kept."""
    others = [entry for entry in entries if f"node={node}" not in entry.split(",")]
    return sorted([*others, wanted])


def same(one: list[str], other: list[str]) -> bool:
    """Do two entry lists mean the same, whatever their order?"""
    return sorted(sorted(entry.split(",")) for entry in one) == sorted(sorted(entry.split(",")) for entry in other)


class PciDevices(JsonFact):
    """Function 0 of each given device: `{place: {path, id, subsystem_id, iommu_group} | None}`, group -1 without IOMMU.

    A place is an address (domain:bus:device), or a PCI id that one device alone has.
    """

    script = """
import json, os, sys
root = "/sys/bus/pci/devices/"
def word(path, name):
    with open(f"{root}{path}.0/{name}") as file:
        return file.read().strip().removeprefix("0x")
def id_of(path):
    return word(path, "vendor") + ":" + word(path, "device")
slots = [name[:-2] for name in sorted(os.listdir(root)) if name.endswith(".0")]
found = {}
for place in json.loads(sys.argv[1])["places"]:
    paths = [path for path in slots if place in (path, id_of(path))]
    if len(paths) != 1:
        found[place] = None
        continue
    path = paths[0]
    group = f"{root}{path}.0/iommu_group"
    found[place] = {
        "path": path,
        "id": id_of(path),
        "subsystem_id": word(path, "subsystem_vendor") + ":" + word(path, "subsystem_device"),
        "iommu_group": int(os.path.basename(os.path.realpath(group))) if os.path.exists(group) else -1,
    }
print(json.dumps(found))
"""

    def command(self, places: list[str]) -> StringCommand:
        return super().command(places=places)


@step.step
def mappings(devices: Mapping[str, str]) -> step.Commands:
    """
    Ensure that each resource mapping names this node's device; entries of other nodes are kept.

    + devices: mapping name to the device's address (domain:bus:device), or to its PCI id where it is the only one
    """
    host: Host = context.ctx_host.get()
    node = inventory.of_run(context.ctx_state.get()).nodes[host.name]
    client = Client(node, host=host)
    found = step.read(PciDevices, places=sorted(devices.values()))
    correct = True
    for name, place in devices.items():
        if found[place] is None:
            raise GpulabError(f"{node.name}: no PCI device {place} for mapping {name}, or several")
        current = read(client, name)
        entries = [] if current is None else list(current["map"])
        wanted = Device(**found[place]).entry(node.name)
        if same(entries, with_node(entries, node.name, wanted)):
            continue
        correct = False
        step.changes(f"mapping {name}", key_diff({node.name: _of(entries, node.name)}, {node.name: wanted}))
        yield step.call(_write, client, node, name, wanted)
    if correct:
        step.noop(f"{', '.join(devices)}: named as the PCI tree shows them")


def read(client: Client, name: str) -> dict[str, Any] | None:
    """The mapping, or None."""
    try:
        found: dict[str, Any] = client.get("cluster", "mapping", "pci", name)
    except NotFound:
        return None
    return found


def _of(entries: list[str], node: str) -> str | None:
    return next((entry for entry in entries if f"node={node}" in entry.split(",")), None)


def _write(client: Client, node: Node, name: str, wanted: str) -> None:
    """Give the mapping this entry for the node, whoever else changes the cluster's mappings meanwhile."""

    def in_force() -> bool:
        found = read(client, name)
        return found is not None and same(list(found["map"]), with_node(list(found["map"]), node.name, wanted))

    def change(current: dict[str, Any] | None) -> None:
        mappings = ("cluster", "mapping", "pci")
        if current is None:
            try:
                client.change("POST", *mappings, applied=in_force, id=name, map=[wanted])
                return
            except AlreadyExists:
                # Another node's deploy made it just now.
                if (current := read(client, name)) is None:
                    raise
        entries = with_node(list(current["map"]), node.name, wanted)
        client.change("PUT", *mappings, name, applied=in_force, map=entries, digest=current["digest"])

    with _one_at_a_time[node.cluster_name]:
        with_digest(lambda: read(client, name), change)
    problems = _checked(client, node, name)
    if problems:
        raise GpulabError(
            f"{node.name}: mapping {name} does not fit the node: {problems[0]}",
            "\n".join([f"  {wanted}", *(f"  {problem}" for problem in problems[1:])]),
            f"see the node's PCI tree: pvesh get /nodes/{node.name}/hardware/pci",
        )


def _checked(client: Client, node: Node, name: str) -> list[str]:
    """What PVE itself finds wrong with the mapping on this node; a VM with it would not start."""
    listed = client.get("cluster", "mapping", "pci", **{"check-node": node.name})
    found = next((item for item in listed if item["id"] == name), None)
    if found is None:
        return ["it is not there after it was made, or the token may not see it"]
    return [str(check["message"]).strip() for check in found.get("checks", []) if check.get("severity") == "error"]
