# SPDX-License-Identifier: MIT
"""Lets one host of the lab say that it runs a Debian kernel (simulated): `uname -r`, Python and DKMS then see that one.

All hosts share the control machine's kernel, which has no headers in Debian; a real DKMS builds nothing for it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from inventory import GpulabError
from rehearsal import host

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "/usr/lib/gpulab-lab/libuname.so"
RELEASE = "/etc/lab-kernel"
PRELOAD = "/etc/ld.so.preload"


def build(target: Path) -> Path:
    """Compile the library.

    Raises:
        GpulabError: the compiler cannot.
    """
    argv = ["gcc", "-O1", "-Wall", "-Wextra", "-s", "-shared", "-fPIC", "-o", str(target), str(SOURCE)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())
    return target


def run_as(name: str, release: str) -> None:
    """Make a running host say that its kernel is `release`, from the next program on and over its reboots."""
    root = host.root(name)
    library = host.inside(root, LIBRARY)
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        build(library)
    host.inside(root, RELEASE).write_text(f"{release}\n")
    # The last: a library that is not there yet would be complained of by every program.
    host.inside(root, PRELOAD).write_text(f"{LIBRARY}\n")
