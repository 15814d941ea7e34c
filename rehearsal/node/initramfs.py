# SPDX-License-Identifier: MIT
"""The archives that update-initramfs writes, and a place in which their scripts can be run (simulated)."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

#: The scripts that run before udev, in the order that update-initramfs has noted.
ORDER = "scripts/init-top/ORDER"
#: Seconds for a whole boot's scripts; one that waits for something would keep a real node from booting, too.
_TIMEOUT = 60
#: Where `rehearsal` lies, in the repository as on a node.
_PACKAGES = Path(__file__).resolve().parents[2]


class NotRun(Exception):
    """The scripts could not be run; the text says why."""


def unpack(data: bytes) -> dict[str, str]:
    """Path to text of the files in a gzipped cpio archive of format newc."""
    archive = gzip.decompress(data)
    files: dict[str, str] = {}
    position = 0
    while archive[position : position + 6] == b"070701":
        numbers = [int(archive[position + start : position + start + 8], 16) for start in range(6, 110, 8)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = archive[position + 110 : position + 110 + name_size - 1].decode()
        start = _padded(position + 110 + name_size)
        if name == "TRAILER!!!":
            break
        if mode & 0o170000 == 0o100000:
            files[name.removeprefix("./")] = archive[start : start + size].decode(errors="replace")
        position = _padded(start + size)
    return files


def pack(files: Mapping[str, str], executable: Collection[str] = ()) -> bytes:
    """A gzipped cpio archive of format newc with these files (path to text) and the folders that they lie in."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."}
    archive = bytearray()
    for number, path in enumerate([*sorted(folders | set(files)), "TRAILER!!!"], start=1):
        data = files.get(path, "").encode()
        kind = 0o040755 if path in folders else 0o100644 if path in files else 0
        mode = kind | (0o111 if path in executable else 0)
        # Inode, mode, owner, group, links, time, size, device and its node's numbers, length of the name, checksum.
        numbers = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path.encode()) + 1, 0]
        archive += b"070701" + "".join(f"{value:08X}" for value in numbers).encode() + path.encode() + b"\0"
        archive += bytes(_padded(len(archive)) - len(archive)) + data
        archive += bytes(_padded(len(archive)) - len(archive))
    return gzip.compress(bytes(archive), compresslevel=1, mtime=0)


def pack_folder(folder: Path, target: Path) -> None:
    """Write the archive of a folder, for update-initramfs."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    executable = {name for name, path in paths.items() if path.stat().st_mode & 0o100}
    target.write_bytes(pack({name: path.read_text() for name, path in paths.items()}, executable))


def _padded(position: int) -> int:
    return (position + 3) // 4 * 4


def scripts(files: Mapping[str, str]) -> list[str]:
    """The scripts that an initramfs (path to text) runs before udev, as paths in it, in their order."""
    words = [line.split() for line in files.get(ORDER, "").splitlines()]
    return [line[0].lstrip("/") for line in words if line and line[0].startswith("/scripts/init-top/")]


def modules(files: Mapping[str, str]) -> set[str]:
    """The modules that an initramfs holds, by the kernel's names for them."""
    paths = [PurePosixPath(path) for path in files if re.match(r"(usr/)?lib/modules/.*\.ko$", path)]
    return {path.stem.replace("-", "_") for path in paths}


def in_namespace(module: str, argument: Mapping[str, Any]) -> Any:
    """Call `main(argument)` of a module in a process with mounts of its own, and return what it returns; JSON each way.

    A user who is not root becomes it inside, where the kernel allows that.

    Raises:
        NotRun: the kernel does not, or the process failed.
    """
    code = (
        f"import json, sys; sys.path.insert(0, {str(_PACKAGES)!r}); from {module} import main; "
        "print(json.dumps(main(json.load(sys.stdin))))"
    )
    unshare = ["unshare", "--mount", "--map-root-user"] if _unprivileged() else ["unshare", "--mount"]
    try:
        done = subprocess.run(
            [*unshare, "--", sys.executable, "-IS", "-c", code],
            input=json.dumps(argument), capture_output=True, text=True, timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise NotRun("there is no command `unshare` (package util-linux)") from error
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"the scripts of the initramfs did not end within {_TIMEOUT} s") from error
    if done.returncode != 0:
        raise NotRun(done.stderr.strip() or f"unshare ended with {done.returncode}")
    return json.loads(done.stdout)


def _unprivileged() -> bool:
    # Mounting takes more than uid 0: a container's root may lack it, and then its own namespace grants it.
    effective = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    sys_admin = 1 << 21
    return effective is None or not int(effective[1], 16) & sys_admin
