# SPDX-License-Identifier: MIT
"""PCI resource mappings and the node's PCI list: what fakepve only stubs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from rehearsal.pve import access
from rehearsal.pve.errors import TaskError, die
from rehearsal.pve.power import Hardware, PciDevice
from rehearsal.pve.routing import Call, Route, needs, needs_any
from rehearsal.pve.state import Mapping, Store
from rehearsal.pve.vmconfig import parse_properties

_DIGEST_CHANGED = "detected modified configuration - file changed by other user? Try again."
# What GET hardware/pci leaves out unless asked: memory controllers, bridges, processors.
_DEFAULT_BLACKLIST = "05;06;0b"


class MappingApi:
    """/cluster/mapping/pci and /nodes/N/hardware/pci, and the choice of a device when a VM starts."""

    def __init__(self, store: Store, hardware: Hardware) -> None:
        self._store = store
        self._hardware = hardware

    def routes(self) -> list[Route]:
        base = "/cluster/mapping/pci"
        one = base + "/{id}"
        acl = "/mapping/pci"
        return [
            Route("GET", base, self._list),
            Route("POST", base, self._create, needs(acl, "Mapping.Modify")),
            Route("GET", one, self._get, needs_any(acl + "/{id}", "Mapping.Use", "Mapping.Modify", "Mapping.Audit")),
            Route("PUT", one, self._update, needs(acl + "/{id}", "Mapping.Modify")),
            Route("DELETE", one, self._delete, needs(acl, "Mapping.Modify")),
            Route("GET", "/nodes/{node}/hardware/pci", self._hardware_pci, needs_any("/", "Sys.Audit", "Sys.Modify")),
        ]

    def devices_of(self, options: dict[str, str], taken: dict[str, int]) -> list[PciDevice]:
        """The functions that a hostpciN hands over; `taken` maps addresses to the VM that has them."""
        choices = [options["host"].split(";")] if "host" in options else self._choices(options["mapping"])
        if not self._hardware.iommu():
            raise TaskError("cannot prepare PCI pass-through, IOMMU not present")
        busy = ""
        for choice in choices:
            functions = [function for address in choice for function in self._functions(address)]
            holders = [(f.address, taken[f.address]) for f in functions if f.address in taken]
            if not holders:
                return functions
            busy = f"PCI device '{holders[0][0]}' already in use by VMID '{holders[0][1]}'"
        raise TaskError(busy)

    def _choices(self, name: str) -> list[list[str]]:
        """The alternatives of a mapping on this node, each a list of addresses; the first free one is used."""
        state = self._store.state
        mapping = state.mappings.get(name)
        if mapping is None:
            raise TaskError(f"PCI device mapping not found for '{name}'")
        entries = [parse_properties(text) for text in mapping.map]
        here = [entry for entry in entries if entry.get("node") == state.node]
        if not here:
            raise TaskError(f"PCI device mapping not found for '{name}'")
        for entry in here:
            problem = self._problem(name, entry)
            if problem:
                raise TaskError(f"PCI device mapping invalid (hardware probably changed): {problem}")
        return [entry["path"].split(";") for entry in here]

    def _functions(self, address: str) -> list[PciDevice]:
        full = address if address.count(":") == 2 else f"0000:{address}"
        found = [
            device for device in self._hardware.pci() if device.address == full or device.address.startswith(f"{full}.")
        ]
        if not found:
            raise TaskError(f"no PCI device found for '{address}'")
        return found

    def _problem(self, name: str, entry: dict[str, str]) -> str:
        """What check-node says about one entry: the declared ids against the hardware's, function .0 of a slot."""
        for path in entry.get("path", "").split(";"):
            address = path if "." in path else f"{path}.0"
            device = next((device for device in self._hardware.pci() if device.address == address), None)
            if device is None:
                return f"pci device '{address}' not found"
            expected = {"id": f"{device.vendor}:{device.device}"}
            if device.subsystem_vendor:
                expected["subsystem-id"] = f"{device.subsystem_vendor}:{device.subsystem_device}"
            if device.iommu_group >= 0:
                expected["iommugroup"] = str(device.iommu_group)
            for key in sorted(expected):
                if key not in entry:
                    return f"Invalid configuration: missing expected property '{key}' for device '{address}'"
                if entry[key] != expected[key]:
                    return f"'{key}' does not match for '{name}' ({expected[key]} != {entry[key]})"
        return ""

    def _digest(self) -> str:
        """The checksum of the whole file mapping/pci.cfg: every mapping has the same."""
        lines = [f"{name} {mapping.model_dump_json()}" for name, mapping in sorted(self._store.state.mappings.items())]
        return hashlib.sha1("\n".join(lines).encode(), usedforsecurity=False).hexdigest()

    def _view(self, name: str, mapping: Mapping) -> dict[str, Any]:
        view: dict[str, Any] = {"id": name, "type": "pci", "map": list(mapping.map), "digest": self._digest()}
        extra = {"description": mapping.description, "mdev": mapping.mdev, "live-migration-capable": mapping.live}
        return view | {key: value for key, value in extra.items() if value is not None}

    def _list(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        listed = []
        for name, mapping in sorted(state.mappings.items()):
            path = f"/mapping/pci/{name}"
            if not access.may(state, call.user, path, "Mapping.Modify", "Mapping.Use", "Mapping.Audit"):
                continue
            view = self._view(name, mapping)
            if "check-node" in call.params:
                view["checks"] = self._checks(name, mapping, call.text("check-node"))
            listed.append(view)
        return listed

    def _checks(self, name: str, mapping: Mapping, node: str) -> list[dict[str, str]]:
        entries = [entry for entry in map(parse_properties, mapping.map) if entry.get("node") == node]
        if not entries:
            return [{"severity": "warning", "message": f"No mapping for node {node}."}]
        problems = [self._problem(name, entry) for entry in entries]
        return [{"severity": "error", "message": f"{problem}\n"} for problem in problems if problem]

    def _get(self, call: Call) -> dict[str, Any]:
        name = call.text("id")
        mapping = self._store.state.mappings.get(name)
        if mapping is None:
            die(f"pci mapping '{name}' not found")
        view = self._view(name, mapping)
        return {key: value for key, value in view.items() if key != "id"}

    def _create(self, call: Call) -> None:
        name = call.text("id")
        if name in self._store.state.mappings:
            die(f"create hardware mapping failed: pci ID '{name}' already defined")
        mapping = Mapping(map=call.items("map"))
        _set_options(mapping, call)
        self._store.state.mappings[name] = mapping

    def _update(self, call: Call) -> None:
        name = call.text("id")
        if call.text("digest") not in ("", self._digest()):
            die(f"update hardware mapping failed: {_DIGEST_CHANGED}")
        mapping = self._store.state.mappings.get(name)
        if mapping is None:
            die(f"update hardware mapping failed: no such resource '{name}'")
        if "map" in call.params:
            mapping.map = call.items("map")
        _set_options(mapping, call)
        for key in call.names("delete"):
            if key == "map":
                die("update hardware mapping failed: unable to delete required option 'map'")
            setattr(mapping, {"live-migration-capable": "live"}.get(key, key), None)

    def _delete(self, call: Call) -> None:
        name = call.text("id")
        if self._store.state.mappings.pop(name, None) is None:
            die(f"pci ID '{name}' does not exist")

    def _hardware_pci(self, call: Call) -> list[dict[str, Any]]:
        blacklist = call.text("pci-class-blacklist", _DEFAULT_BLACKLIST)
        hidden = tuple(f"0x{part}" for part in blacklist.split(";") if part)
        return [
            _device_view(device)
            for device in sorted(self._hardware.pci(), key=lambda device: device.address)
            if not (hidden and device.pci_class.startswith(hidden))
        ]


def used_by(starts: dict[int, Sequence[PciDevice]]) -> dict[str, int]:
    """`{address: VM}` of the devices that running VMs hold."""
    return {device.address: vmid for vmid, devices in starts.items() for device in devices}


def _set_options(mapping: Mapping, call: Call) -> None:
    if "description" in call.params:
        mapping.description = call.text("description")
    if "mdev" in call.params:
        mapping.mdev = int(call.flag("mdev"))
    if "live-migration-capable" in call.params:
        mapping.live = int(call.flag("live-migration-capable"))


def _device_view(device: PciDevice) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": device.address,
        "class": device.pci_class,
        "vendor": f"0x{device.vendor}",
        "device": f"0x{device.device}",
        "iommugroup": device.iommu_group,
    }
    if device.subsystem_vendor:
        view["subsystem_vendor"] = f"0x{device.subsystem_vendor}"
        view["subsystem_device"] = f"0x{device.subsystem_device}"
    names = {"device_name": device.name, "vendor_name": device.vendor_name}
    return view | {key: value for key, value in names.items() if value}
