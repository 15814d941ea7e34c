# SPDX-License-Identifier: MIT
"""Where the rehearsal lab keeps its files: caches that survive `down`, and the running lab's state, which does not.

Everything lies below one folder (`$GPULAB_CACHE`), so that two labs with different folders and subnets never meet.
"""

from __future__ import annotations

import os
from pathlib import Path

#: The checkout that this package belongs to: `python -m rehearsal...` works from there.
REPOSITORY = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The root of everything: `$GPULAB_CACHE`, else `$XDG_CACHE_HOME/gpulab`, else `~/.cache/gpulab`."""
    if chosen := os.environ.get("GPULAB_CACHE"):
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").resolve() / "gpulab"


def image(suite: str) -> Path:
    """Cache: the image of every host of one Debian suite (`root/`, `key.json`)."""
    return cache() / "image" / suite


def debs() -> Path:
    """Cache: downloaded packages that the hosts share."""
    return cache() / "image" / "apt"


def lab() -> Path:
    """State of the running lab; `down` removes it."""
    return cache() / "lab"


def lock() -> Path:
    """Held by `up` and `down`; outside of `lab()`, because `down` removes that."""
    return cache() / "lab.lock"


def hosts() -> Path:
    """One folder a host: its spec, log and mounted root."""
    return lab() / "hosts"


def host(name: str) -> Path:
    """The folder of one host."""
    return hosts() / name


def root_secret(node: str) -> Path:
    """What a node's own commands show to the API front to be root@pam there."""
    return host(node) / "root-secret"


def ca() -> Path:
    """The lab's certificate authority."""
    return lab() / "ca"


def ssh_key() -> Path:
    """Private key that opens the nodes as root and is given to the guests."""
    return lab() / "ssh" / "id_ed25519"


def known_hosts() -> Path:
    """Host keys of the lab's hosts, in OpenSSH's format."""
    return lab() / "state" / "known_hosts"


def logs() -> Path:
    """Output of the lab's processes on the control machine."""
    return lab() / "log"


def processes() -> Path:
    """One file for each process that the lab started."""
    return lab() / "processes"
