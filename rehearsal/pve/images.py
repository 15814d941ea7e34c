# SPDX-License-Identifier: MIT
"""The stand-in cloud images: a qcow2 header that says how large it is, and text that says what it stands for."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from rehearsal import image, paths
from rehearsal.pve.errors import TaskError
from rehearsal.pve.state import GIB

#: By distribution, as an inventory names it.
FILENAMES = {"debian12": "debian-12-lab.qcow2", "debian13": "debian-13-lab.qcow2"}
# Virtual size of the disk in bytes, as of Debian's genericcloud images.
VIRTUAL_SIZE = 3 * GIB
PORT = 18005
_QCOW2_VERSION = 3
_CLUSTER_BITS = 16


def folder() -> Path:
    """What the front serves over HTTP."""
    return paths.lab() / "pve" / "images"


def write(distribution: str) -> Path:
    """Write the stand-in; its content, and so its checksum, changes when the lab's image does."""
    key = hashlib.sha256(json.dumps(image.key(image.SUITES[distribution]), sort_keys=True).encode()).hexdigest()
    text = f"simulated: stands for the rehearsal lab's {distribution} root file system {key}\n"
    path = folder() / FILENAMES[distribution]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_header().ljust(512, b"\0") + text.encode())
    return path


def description(gateway: str, distribution: str) -> dict[str, str]:
    """The inventory's `image`: url, checksum, filename."""
    name = FILENAMES[distribution]
    data = (folder() / name).read_bytes()
    return {
        "url": f"http://{gateway}:{PORT}/{name}",
        "checksum": f"sha512:{hashlib.sha512(data).hexdigest()}",
        "filename": name,
    }


def root_of(origin: str) -> Path:
    """The root file system that a system disk stands for, by the volume that it was imported from.

    Raises:
        TaskError: that is no image of the lab.
    """
    name = origin.rpartition("/")[2]
    for distribution, filename in FILENAMES.items():
        if name == filename:
            return image.root(image.SUITES[distribution])
    raise TaskError(f"the rehearsal lab boots {', '.join(FILENAMES.values())}, not {name} (simulated)")


def _header() -> bytes:
    """The first fields of a qcow2 header: magic, version, no backing file, cluster bits, virtual size."""
    return b"QFI\xfb" + struct.pack(">IQIIQ", _QCOW2_VERSION, 0, 0, _CLUSTER_BITS, VIRTUAL_SIZE)
