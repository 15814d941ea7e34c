# SPDX-License-Identifier: MIT
"""Runs on the guest: nginx, our files in it, and which configuration it really runs."""

import hashlib
import os
import socket
import stat
from typing import Any

from operations.remote.common import answer, packages, run, text, units

UNIT = "nginx.service"
#: Where others put what nginx shall serve beside us.
PLACES = ("/etc/nginx/conf.d", "/etc/nginx/sites-enabled")


def read(
    package_names: list[str], shown: list[str], secret: list[str], folder: str, socket_path: str
) -> dict[str, Any]:
    """`shown`: files whose text is wanted; `secret`: those of which only mode and SHA-256 are told."""
    return {
        "packages": packages(package_names),
        "unit": units([UNIT])[UNIT],
        "files": {path: text(path) for path in shown},
        "secret": {path: digest(path) for path in secret},
        # Files of services that are no longer declared.
        "left": sorted(f"{folder}/{name}" for name in listed(folder)),
        "folder_mode": mode(folder),
        "others": [f"{place}/{name}" for place in PLACES for name in listed(place)],
        "running": running(socket_path),
        "version": version(),
    }


def version() -> str:
    """`1.22.1`; empty: there is no nginx."""
    return run("nginx", "-v")[2].partition("nginx/")[2].split(" ")[0].strip()


def listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def mode(path: str) -> int | None:
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return None


def digest(path: str) -> dict[str, Any] | None:
    """A file that nobody is shown."""
    try:
        with open(path, "rb") as file:
            content, status = file.read(), os.fstat(file.fileno())
    except OSError:
        return None
    return {"sha256": hashlib.sha256(content).hexdigest(), "mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid}


def running(path: str) -> str | None:
    """The generation of the configuration that nginx runs; None: it does not answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(path)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            found = b""
            while part := connection.recv(4096):
                found += part
        except OSError:
            return None
    return found.decode(errors="replace").rpartition("\r\n\r\n")[2].strip()


if __name__ == "__main__":
    answer(read)
