# SPDX-License-Identifier: MIT
"""Runs on the guest: try nginx' new files beside the old ones, put them in place, and see nginx run with them.

The files come over stdin. nginx that refuses them, or does not take them up, keeps or gets back what it had.
"""

import base64
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import time
from typing import Any

from operations.containers.remote.proxy_state import UNIT, running
from operations.remote.common import run

ROOT = "/etc/nginx"
#: Debian's own site, on port 80. Its text stays in sites-available.
DEFAULT = f"{ROOT}/sites-enabled/default"
#: Seconds until nginx runs with a new configuration: its old workers end their answers meanwhile.
TAKEN_S = 20.0

Files = dict[str, dict[str, Any] | None]


class Failed(Exception):
    """What went wrong, for stderr."""


def main() -> int:
    order = json.loads(sys.argv[1])
    files: Files = json.load(sys.stdin)
    try:
        apply(order, files)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def apply(order: dict[str, Any], files: Files) -> None:
    # The log is a record of persons: not for every user of the guest to read, as nginx would make it.
    if order["log"] and not os.path.exists(order["log"]):
        os.makedirs(os.path.dirname(order["log"]), exist_ok=True)
        os.close(os.open(order["log"], os.O_CREAT | os.O_WRONLY, 0o640))
    if not order["stop"]:
        try_out(order, files)
    before = {path: kept(path) for path in files}
    write(files, order["folder"])
    if order["no_default"] and os.path.lexists(DEFAULT):
        os.unlink(DEFAULT)
    if order["unit_changed"]:
        systemctl("daemon-reload")
    if order["resolver_changed"]:
        systemctl("try-restart", "systemd-resolved.service")
    if order["stop"]:
        systemctl("disable", "--now", UNIT)
        return
    active = run("systemctl", "is-active", UNIT)[1].strip() == "active"
    old = accepting(order["pid_file"])
    try:
        if order["generation"]:
            systemctl("unmask", "--runtime", UNIT)
            systemctl("enable", UNIT)
        systemctl("restart" if order["restart"] or not active else "reload", UNIT)
        if order["generation"]:
            taken(order, old)
    except Failed as error:
        write(before, order["folder"])
        if order["unit_changed"]:
            run("systemctl", "daemon-reload")
        if active:
            run("systemctl", "reload-or-restart", UNIT)
        else:
            run("systemctl", "stop", UNIT)
        raise Failed(f"{error}\nThe files before are back.") from None


def try_out(order: dict[str, Any], files: Files) -> None:
    """`nginx -t` on a copy of all that nginx reads, with our files as they will be."""
    place = tempfile.mkdtemp(prefix="gpulab-nginx-", dir=order["scratch"])
    try:
        copy = f"{place}/nginx"
        shutil.copytree(ROOT, copy, symlinks=True)
        moved = {f"{ROOT}/": f"{copy}/", f"{os.path.dirname(order['socket'])}/": f"{place}/"}
        for path, file in files.items():
            if path.startswith(f"{ROOT}/"):
                put(copy + path[len(ROOT) :], file)
        if order["no_default"] and os.path.lexists(f"{copy}/sites-enabled/default"):
            os.unlink(f"{copy}/sites-enabled/default")
        for path in glob.glob(f"{copy}/**", recursive=True):
            if os.path.isfile(path) and not os.path.islink(path):
                redirect(path, moved)
        status, output, error = run("nginx", "-t", "-q", "-c", f"{copy}/nginx.conf")
        if status != 0:
            said = (error or output).strip().replace(copy, ROOT)
            if ".tenants" in said:
                # Where it stands, not what stands there.
                said = re.sub(r'"[^"\n]*"', '"…"', said)
            raise Failed(f"nginx refuses the new files; the ones before stay, and nginx runs with them:\n{said}")
    finally:
        shutil.rmtree(place)


def redirect(path: str, moved: dict[str, str]) -> None:
    with open(path, encoding="latin-1") as file:
        text = file.read()
    new = text
    for old, to in moved.items():
        new = new.replace(old, to)
    if new != text:
        with open(path, "w", encoding="latin-1") as file:
            file.write(new)


def kept(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            content = file.read()
            mode = os.fstat(file.fileno()).st_mode & 0o7777
    except FileNotFoundError:
        return None
    return {"content": base64.b64encode(content).decode(), "mode": mode}


def write(files: Files, folder: str) -> None:
    if any(file is not None for path, file in files.items() if path.startswith(f"{folder}/")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
    for path, file in files.items():
        put(path, file)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def put(path: str, file: dict[str, Any] | None) -> None:
    """A whole file or none, never a part of one, and never readable for longer than it should be."""
    if file is None:
        if os.path.lexists(path):
            os.unlink(path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = f"{path}.gpulab-new"
    with open(new, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as stream:
        os.fchmod(stream.fileno(), file["mode"])
        stream.write(base64.b64decode(file["content"]))
        os.fsync(stream.fileno())
    os.rename(new, path)


def accepting(pid_file: str) -> set[str]:
    """The processes of nginx' workers that let new connections in."""
    try:
        with open(pid_file) as file:
            master = file.read().strip()
        with open(f"/proc/{master}/task/{master}/children") as file:
            children = file.read().split()
    except OSError:
        return set()
    found = set()
    for child in children:
        try:
            with open(f"/proc/{child}/cmdline", "rb") as file:
                title = file.read().rstrip(b"\0 ")
        except OSError:
            continue
        if title == b"nginx: worker process":
            found.add(child)
    return found


def taken(order: dict[str, Any], old: set[str]) -> None:
    """Wait until nginx answers with the new configuration, and by no worker of the `old` one.

    A reload itself says nothing of how it went, and for a moment workers of both let connections in.
    """
    deadline = time.monotonic() + order.get("taken_s", TAKEN_S)
    found = running(order["socket"])
    while found != order["generation"] or old & accepting(order["pid_file"]):
        if time.monotonic() > deadline:
            log = run("tail", "-n", "3", "/var/log/nginx/error.log")[1].strip()
            raise Failed(f"nginx does not run with the new files (it runs with {found or 'none of ours'}):\n{log}")
        time.sleep(0.1)
        found = running(order["socket"])


def systemctl(*words: str) -> None:
    status, output, error = run("systemctl", *words)
    if status != 0:
        journal = run("journalctl", "-u", UNIT, "-n", "6", "-o", "cat", "--no-pager")[1].strip()
        said = "\n".join(filter(None, [(error or output).strip(), journal]))
        raise Failed(f"systemctl {' '.join(words)}: {said}")


if __name__ == "__main__":
    sys.exit(main())
