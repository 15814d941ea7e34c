# SPDX-License-Identifier: MIT
"""What the programs on a host share. Standard library only; Python 3.11 and up."""

import base64
import contextlib
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: Held by whoever replaces, starts or restarts a container of ours.
CONTAINERS_LOCK = "/run/gpulab/containers.lock"


def run(*argv: str, timeout: float = 60) -> tuple[int, str, str]:
    """Exit status, stdout, stderr; 127 when there is no such tool, 124 when it did not end in `timeout` seconds."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=environment, errors="replace")
    except FileNotFoundError:
        return 127, "", f"{argv[0]}: not found"
    except subprocess.TimeoutExpired:
        return 124, "", f"{argv[0]}: no end after {timeout:.0f} s"
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def locked(path: str, wait: bool = True) -> Iterator[bool]:
    """Alone with what the lock stands for; False without `wait`: somebody else has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def text(path: str) -> str | None:
    """A file's content, None when it can't be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return None


def files(paths: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """Content (base64), mode and time of each file, None where there is none: what `operations.files.Files` has."""
    found: dict[str, dict[str, Any] | None] = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                content, status = file.read(), os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            found[path] = None
            continue
        mode = stat.S_IMODE(status.st_mode)
        found[path] = {"content": base64.b64encode(content).decode(), "mode": mode, "mtime": status.st_mtime}
    return found


def packages(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each fully installed package, None for the others. A name may be a pattern of dpkg-query."""
    wanted = list(names)
    found: dict[str, str | None] = {name: None for name in wanted if "*" not in name}
    if wanted:
        listing = run("dpkg-query", "-W", "-f", "${Package}\t${Version}\t${db:Status-Status}\n", *wanted)[1]
        for line in listing.splitlines():
            name, version, status = line.split("\t")
            if status == "installed":
                found[name] = version
    return found


def units(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each unit: `load`, `enabled`, `active` (systemd's words) and `skipped`: a condition kept it from starting."""
    wanted = list(names)
    properties = "LoadState,UnitFileState,ActiveState,ConditionResult,ConditionTimestampMonotonic"
    blocks = run("systemctl", "show", "-p", properties, *wanted)[1].split("\n\n")
    found = {}
    for name, block in zip(wanted, blocks, strict=False):
        keys = dict(line.partition("=")[::2] for line in block.splitlines())
        # A unit that was never tried has a result of "no", too, but no time of it.
        tried = keys.get("ConditionTimestampMonotonic", "0") not in ("", "0")
        found[name] = {
            "load": keys.get("LoadState", ""),
            "enabled": keys.get("UnitFileState", ""),
            "active": keys.get("ActiveState", ""),
            "skipped": tried and keys.get("ConditionResult") == "no",
        }
    return found


def pip_words(version: str, index: str, bundle: str) -> list[str]:
    """What tells `pip install` where to look.

    + version: what `pip --version` prints
    + index: URL; empty: pip's own
    + bundle: PEM file of the only CA to trust; empty: pip's own
    """
    words = ["--index-url", index] if index else []
    if bundle:
        words += ["--cert", bundle]
        number = (version.split()[1:2] or ["0"])[0]
        # From 24.2 on it asks the system's store, too, and fails with an index that is named by its address.
        if [int(part) for part in number.split(".")[:2] if part.isdigit()] >= [24, 2]:
            words += ["--use-deprecated", "legacy-certs"]
    return words


def same_memory(told: str, wanted: int | None) -> bool:
    """Does MPS' daemon mean that many MiB? It tells 1 GiB and more in whole GiB, rounded down: 4095 is `3G`.

    + wanted: None: no limit, which it tells by saying nothing
    """
    amount = re.fullmatch(r"([0-9]+)([GM])", told)
    if wanted is None or amount is None:
        return wanted is None and not told
    return int(amount[1]) == (wanted if amount[2] == "M" else wanted // 1024)


def answer(read: Callable[..., Any]) -> None:
    """Print what `read` returns for the arguments in `sys.argv[1]`, as JSON."""
    print(json.dumps(read(**json.loads(sys.argv[1]))))
