# SPDX-License-Identifier: MIT
"""What a node's own programs see of its guests (simulated): /etc/pve as pmxcfs shows it, and who runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from rehearsal import paths
from rehearsal.pve.state import Store

#: Folder of the control machine, below `folder()`, to the node's.
SHOWN = {"qemu-server": "/etc/pve/qemu-server", "mapping": "/etc/pve/mapping", "run": "/run/qemu-server"}
#: The VM runs in a container of its own: the node shows a process that is always there.
PROCESS = "1\n"
_POLL_S = 0.3


def folder(node: str) -> Path:
    return paths.lab() / "pve" / node / "etc-pve"


def binds(node: str) -> list[str]:
    """For `HostSpec.binds`; the folders are made here, since they must be there before the node starts."""
    for name in SHOWN:
        (folder(node) / name).mkdir(parents=True, exist_ok=True)
    return [f"{folder(node) / name}:{target}" for name, target in SHOWN.items()]


async def keep_up(node: str, store: Store, running: Callable[[int], bool]) -> None:
    """Write what changes, some times a second, until cancelled. `running`: is this VM on?"""
    while True:
        try:
            await asyncio.to_thread(write, folder(node), store, running)
        except OSError as error:
            logging.warning("%s: /etc/pve: %s", node, error)
        await asyncio.sleep(_POLL_S)


def write(target: Path, store: Store, running: Callable[[int], bool]) -> None:
    """Make the files as the API's state is now."""
    with store.lock:
        configs = {vm.vmid: dict(vm.config) for vm in store.state.vms.values()}
        mappings = {name: list(mapping.map) for name, mapping in store.state.mappings.items()}
    wanted = {f"qemu-server/{vmid}.conf": _config(config) for vmid, config in configs.items()}
    wanted |= {f"run/{vmid}.pid": PROCESS for vmid in configs if running(vmid)}
    wanted["mapping/pci.cfg"] = "".join(
        f"{name}\n" + "".join(f"\tmap {entry}\n" for entry in entries) + "\n" for name, entries in mappings.items()
    )
    for path in target.glob("*/*"):
        if str(path.relative_to(target)) not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _config(config: Mapping[str, object]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in sorted(config.items()) if "\n" not in str(value))
