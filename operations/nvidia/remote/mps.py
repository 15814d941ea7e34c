# SPDX-License-Identifier: MIT
"""MPS on the guest: with an argument it prints the state, without one it gives the daemon its limits.

Installed for gpulab-mps.service, which runs it after each start: a daemon that was killed comes back without limits.
The control tool's exit status is 0 whatever it is asked, and a value that it does not understand leaves the old one:
so each is read back.
"""

import contextlib
import glob
import grp
import json
import os
import pwd
import re
import stat
import subprocess
import sys
import time
from typing import Any

from operations.remote.common import answer, files, same_memory, text, units

CONTROL = "nvidia-cuda-mps-control"
ORDER = "/etc/gpulab/mps.json"
#: Seconds until the daemon must answer, and until its server must have the card.
START_S = 10.0
#: Seconds that one question may take: a daemon that hangs must not hang the deploy.
ASK_S = 5.0


class Refused(Exception):
    """What the daemon did not take, or that there is none."""


def ask(pipe: str, *commands: str) -> str:
    """What the daemon answers to all the commands."""
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipe, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [CONTROL], input="\n".join([*commands, ""]), env=environment, capture_output=True, text=True, timeout=ASK_S
        )
    except FileNotFoundError:
        raise Refused(f"{CONTROL} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"the MPS control daemon does not answer within {ASK_S:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise Refused(said or f"{CONTROL} ended with status {done.returncode} at: {'; '.join(commands)}")
    return done.stdout.strip()


def same_percentage(told: str, wanted: int) -> bool:
    """Is `40.0` the 40 that was asked for?"""
    return re.fullmatch(r"[0-9]+(\.[0-9]+)?", told) is not None and float(told) == wanted


def limits(pipe: str, server: str = "") -> dict[str, str]:
    """The limits in force, in the daemon's words: those of a server, or those that the next one gets."""
    words = f" {server}" if server else ""
    default = "" if server else "default_"
    return {
        "percentage": ask(pipe, f"get_{default}active_thread_percentage{words}"),
        "memory": ask(pipe, f"get_{default}device_pinned_mem_limit{words} 0"),
    }


def servers(pipe: str) -> list[str]:
    """Process ids of the servers."""
    return [word for word in ask(pipe, "get_server_list").split() if word.isdigit()]


def wrong(told: dict[str, str], order: dict[str, Any]) -> list[str]:
    """What the daemon has otherwise than it is declared."""
    percentage, memory = order["active_thread_percentage"], order["pinned_memory_limit_mib"]
    problems = []
    if not same_percentage(told["percentage"], percentage):
        problems.append(f"active thread percentage: declared {percentage}, in force {told['percentage']}")
    if not same_memory(told["memory"], memory):
        declared = "none" if memory is None else f"{memory}M"
        problems.append(f"pinned memory limit: declared {declared}, in force {told['memory'] or 'none'}")
    return problems


def set_limits(pipe: str, order: dict[str, Any], server: str = "") -> None:
    """Set what differs and read it back, for a server or for those to come.

    Raises:
        Refused: the daemon has another value than the one it was given.
    """
    if not wrong(limits(pipe, server), order):
        return
    memory = order["pinned_memory_limit_mib"]
    words, default = (f" {server}", "") if server else ("", "default_")
    ask(
        pipe,
        f"set_{default}active_thread_percentage{words} {order['active_thread_percentage']}",
        # 0 takes the limit away.
        f"set_{default}device_pinned_mem_limit{words} 0 {'0' if memory is None else f'{memory}M'}",
    )
    if problems := wrong(limits(pipe, server), order):
        raise Refused("\n".join(problems))


def await_daemon(pipe: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            ask(pipe, "get_default_active_thread_percentage")
            return
        except Refused:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def start_server(pipe: str, uid: int) -> None:
    """Have the server take the card before anybody else does. Without a GPU that it can use, none stays."""
    if servers(pipe):
        return
    # The tool fails, and says nothing, when the server ends before it has its answer.
    with contextlib.suppress(Refused):
        ask(pipe, f"start_server -uid {uid}")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        running = servers(pipe)
        if not running:
            print(f"no MPS server stays for uid {uid}: the first client will start one", file=sys.stderr)
            return
        if "ACTIVE" in ask(pipe, f"get_server_status {running[0]}"):
            return


def apply(order: dict[str, Any]) -> None:
    """Give the daemon and its servers the limits, and a server to the service's user.

    Raises:
        Refused: there is no daemon, or it has other limits than it was given.
    """
    pipe = order["pipe"]
    await_daemon(pipe)
    set_limits(pipe, order)
    for server in servers(pipe):
        # Only clients to come get them: those that there are keep what they have.
        set_limits(pipe, order, server)
    start_server(pipe, order["uid"])


def read(
    paths: list[str], unit: str, pipe: str, tenants: str, user: str, uid: int, order: dict[str, Any]
) -> dict[str, Any]:
    """The state. `limits` and `servers` are the live daemon's, None when it does not answer, with `error`."""
    found: dict[str, Any] = {
        "files": files([*paths, *sorted(glob.glob(f"{tenants}/*.env"))]),
        "unit": units([unit])[unit],
        "user": owner(user, uid),
        "pipe": folder(pipe),
        "limits": None,
        "servers": {},
        "wrong": [],
        "error": "",
    }
    try:
        if found["pipe"] is not None:
            found["limits"] = limits(pipe)
            found["servers"] = {server: limits(pipe, server) for server in servers(pipe)}
    except Refused as refused:
        found |= {"limits": None, "servers": {}, "error": str(refused)}
    if found["limits"] is not None:
        for told in (found["limits"], *found["servers"].values()):
            found["wrong"] += [line for line in wrong(told, order) if line not in found["wrong"]]
    return found


def owner(user: str, uid: int) -> dict[str, Any]:
    """Who has the name and who has the number, users and groups: None: nobody."""
    found: dict[str, Any] = {"uid": None, "gid": None, "user": None, "group": None}
    with contextlib.suppress(KeyError):
        found["uid"] = pwd.getpwnam(user).pw_uid
    with contextlib.suppress(KeyError):
        found["gid"] = grp.getgrnam(user).gr_gid
    with contextlib.suppress(KeyError):
        found["user"] = pwd.getpwuid(uid).pw_name
    with contextlib.suppress(KeyError):
        found["group"] = grp.getgrgid(uid).gr_name
    return found


def folder(path: str) -> dict[str, Any] | None:
    """Owner and mode of a folder, None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return {"uid": status.st_uid, "gid": status.st_gid, "mode": stat.S_IMODE(status.st_mode)}


def main() -> int:
    try:
        apply(json.loads(text(ORDER) or ""))
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{ORDER}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(read)
    else:
        sys.exit(main())
