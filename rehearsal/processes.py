# SPDX-License-Identifier: MIT
"""Processes of the lab on the control machine: started in a session of their own, found again after any crash.

Each carries a marker in its environment that names the lab and the process, and its children inherit it. That, and not
a pid file, decides what belongs to the lab: a pid may be recycled, and a `kill -9` may come before a file is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from inventory import GpulabError
from rehearsal import paths

MARKER = "GPULAB_LAB_PROCESS"
POLL_S = 0.02

_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Process:
    """A process as /proc knows it. `started` is in clock ticks since boot: with the pid it is unique."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Does exactly this process (not another of the same pid) still run?"""
        found = look_up(self.pid)
        return found is not None and found.started == self.started

    def send(self, number: int) -> None:
        """Send a signal, unless the process is gone or its pid belongs to another one by now."""
        with contextlib.suppress(ProcessLookupError):
            # The pidfd pins the process: between the check and the signal the pid cannot change hands.
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


def look_up(pid: int) -> Process | None:
    """The process of that pid; None when there is none, or only its zombie."""
    fields = stat_fields(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return Process(pid, int(fields[19]))


def stat_fields(pid: int) -> list[str] | None:
    """`/proc/PID/stat` from the third field (state) on, so that index 1 is the parent and 19 the start time."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in brackets and may hold blanks and brackets itself.
    return text.rpartition(")")[2].split()


def all_pids() -> Iterator[int]:
    """Every process of the machine."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            yield int(entry.name)


def start(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
) -> int:
    """Start a process of the lab in a session of its own and return its pid.

    It inherits this environment, changed by `env`; its output goes to `log` (default: `log/NAME.log` of the lab).

    Raises:
        GpulabError: one of that name runs already.
    """
    if running(name):
        raise GpulabError(f"The lab's process {name} runs already")
    output = log or paths.logs() / f"{name}.log"
    for folder in (output.parent, paths.processes()):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **(env or {}), MARKER: _marker(name)}
    search = [str(paths.REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in search if part)
    with open(output, "ab") as sink:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd or paths.REPOSITORY,
            start_new_session=True,
        )
    found = look_up(child.pid)
    record = {**asdict(found or Process(child.pid, 0)), "argv": list(argv), "log": str(output)}
    (paths.processes() / f"{name}.json").write_text(json.dumps(record))
    _children.append(child)
    return child.pid


def recorded(name: str) -> Process | None:
    """The process started as `name`, if it still runs."""
    try:
        record = json.loads((paths.processes() / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    process = Process(record["pid"], record["started"])
    return process if process.alive() else None


def running(name: str) -> bool:
    """Does the process started as `name` run?"""
    _reap()
    return recorded(name) is not None


def stop(name: str, timeout: float = 10) -> bool:
    """End `name` and its children: SIGTERM, and SIGKILL after `timeout` seconds. True if there was one to end."""
    ended = end_members(name, timeout) > 0
    (paths.processes() / f"{name}.json").unlink(missing_ok=True)
    return ended


def members(name: str | None = None) -> list[Process]:
    """What carries the marker of this lab: of the process `name` and its children, or (None) of all of them."""
    wanted = f"{MARKER}={_marker(name or '')}".encode()
    own = _own_ancestors()
    found = []
    for pid in all_pids():
        if pid in own:
            continue
        process = look_up(pid)
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        matches = any(word == wanted if name else word.startswith(wanted) for word in words)
        if process is not None and matches:
            found.append(process)
    return found


def end_members(name: str | None, timeout: float) -> int:
    """End all `members(name)`, those included that are forked meanwhile; returns how many there were."""
    count = 0
    while found := members(name):
        count += len(found)
        end(found, timeout)
        # The rest were children of what has been asked politely already.
        timeout = 0
    return count


def names() -> list[str]:
    """The names that were recorded, whether they still run or not."""
    if not paths.processes().is_dir():
        return []
    return sorted(path.stem for path in paths.processes().glob("*.json"))


def end(processes: Iterable[Process], timeout: float) -> bool:
    """SIGTERM to all, SIGKILL to those that are left after `timeout` seconds. True if any ran.

    Raises:
        GpulabError: one survives SIGKILL (it hangs in the kernel).
    """
    left = [process for process in processes if process.alive()]
    found = bool(left)
    for number, deadline in ((signal.SIGTERM, timeout), (signal.SIGKILL, 10.0)):
        for process in left:
            process.send(number)
        left = wait_gone(left, deadline)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise GpulabError(f"Processes survive SIGKILL: {pids}", resolution="`ps -o pid,stat,wchan,args` shows where")
    return found


def wait_gone(processes: Iterable[Process], timeout: float) -> list[Process]:
    """Wait until all of them are gone, at most `timeout` seconds; returns those that are not."""
    deadline = time.monotonic() + timeout
    while True:
        _reap()
        left = [process for process in processes if process.alive()]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(POLL_S)


def _marker(name: str) -> str:
    return f"{paths.cache()}:{name}"


def _own_ancestors() -> set[int]:
    """This process and those above it: whoever calls from inside the lab must not end itself."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 1 and pid not in found:
        found.add(pid)
        fields = stat_fields(pid)
        pid = int(fields[1]) if fields else 0
    return found


def _reap() -> None:
    """Collect the children of this process that have ended."""
    _children[:] = [child for child in _children if child.poll() is None]
