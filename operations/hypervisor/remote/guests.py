# SPDX-License-Identifier: MIT
"""Runs on the node: shuts guests down for a reboot, in PVE's order, and starts them again.

The note of who was shut down is written before the first is asked: a run that is killed leaves them to the next.
Paths are relative to the root folder.
"""

import os
import subprocess
import sys
import time

from operations.remote.common import answer, text

#: Seconds in which a process ends after its guest's shutdown was reported.
SETTLE_S = 5


def noted(note: str) -> list[int]:
    return [int(vmid) for vmid in (text(note) or "").strip().split(",") if vmid.isdigit()]


def write(note: str, guests: list[int]) -> None:
    os.makedirs(os.path.dirname(note), exist_ok=True)
    with open(note + ".new", "w") as file:
        file.write(",".join(str(vmid) for vmid in guests) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(note + ".new", note)


def pve(action: str, guests: list[int], *options: str) -> None:
    """One of PVE's bulk actions, which knows the guests' start order."""
    ids = ",".join(str(vmid) for vmid in guests)
    subprocess.run(["pvesh", "create", f"/nodes/localhost/{action}", "--vms", ids, *options], stdout=sys.stderr)


def running(guests: list[int]) -> list[int]:
    """Those that have a process. The bulk actions end well whatever became of a single guest."""
    return [vmid for vmid in guests if vm_runs(vmid) or container_runs(vmid)]


def still_running(guests: list[int]) -> list[int]:
    """Those that have one after a while: a process may outlive its task by a moment."""
    deadline = time.monotonic() + SETTLE_S
    while (left := running(guests)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def vm_runs(vmid: int) -> bool:
    process = (text(f"run/qemu-server/{vmid}.pid") or "").strip()
    return bool(process) and os.path.exists(f"proc/{process}")


def container_runs(vmid: int) -> bool:
    return "populated 1" in (text(f"sys/fs/cgroup/lxc/{vmid}/cgroup.events") or "")


def act(
    root: str, note: str, stop: list[int] | None = None, start: list[int] | None = None, timeout_s: int = 180
) -> list[int]:
    """Stop or start guests; returns those that it concerned.

    Raises:
        SystemExit: one did not stop, then all are started again; or one did not start.
    """
    os.chdir(root)
    note = note.lstrip("/")
    if stop:
        everyone = sorted({*noted(note), *stop})
        write(note, everyone)
        pve("stopall", stop, "--force-stop", "0", "--timeout", str(timeout_s))
        if left := still_running(stop):
            started(everyone, timeout_s)
            os.unlink(note)
            sys.exit(f"guests that did not shut down in {timeout_s} s: {left}; the others were started again")
        return stop
    wanted = start or []
    if left := started(wanted, timeout_s):
        sys.exit(f"guests that were shut down for a reboot and do not start: {left}; see their task logs")
    os.unlink(note)
    return wanted


def started(guests: list[int], timeout_s: int) -> list[int]:
    """Start them; returns those that do not run. Right after a boot PVE's own services may not answer yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        pve("startall", guests, "--force", "1")
        left = [vmid for vmid in guests if vmid not in running(guests)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(2)


if __name__ == "__main__":
    answer(act)
