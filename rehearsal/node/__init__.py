# SPDX-License-Identifier: MIT
"""What makes a clone of the image a Proxmox VE node: its files, its stand-in commands, its simulated hardware."""

from __future__ import annotations

from pathlib import Path

from rehearsal.node.hardware import HARDWARE, kernel_files, read_machine

_FOLDER = Path(__file__).parent
#: Files of a node as they lie on it.
ROOT = _FOLDER / "root"
#: The default machine: an iGPU for the screen and one RTX A4000.
MACHINE = _FOLDER / "hardware.json"
#: Python runs a folder by its `__main__.py`, and finds the modules that lie in it.
PROGRAM = "/usr/lib/gpulab-lab/node"
API_FORWARD = "/etc/gpulab-lab-api"


def files(front: str, machine: Path = MACHINE) -> dict[str, tuple[str, int]]:
    """Path to (text, mode). `front`: ADDRESS:PORT of what answers the node's API on the control machine."""
    found = {}
    for path in sorted(ROOT.rglob("*")):
        if path.is_file():
            text = path.read_text()
            found[f"/{path.relative_to(ROOT)}"] = (text, 0o755 if text.startswith("#!") else 0o644)
    for kernel in read_machine(machine.read_text()).kernels:
        found |= {path: (text, 0o644) for path, text in kernel_files(kernel).items()}
    return found | {
        f"{PROGRAM}/__main__.py": ((_FOLDER / "__main__.py").read_text(), 0o644),
        f"{PROGRAM}/rehearsal/__init__.py": ((_FOLDER.parent / "__init__.py").read_text(), 0o644),
        **{f"{PROGRAM}/rehearsal/node/{path.name}": (path.read_text(), 0o644) for path in _FOLDER.glob("*.py")},
        HARDWARE: (machine.read_text(), 0o644),
        API_FORWARD: (f"FRONT={front}\n", 0o644),
    }
