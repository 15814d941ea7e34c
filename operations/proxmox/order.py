# SPDX-License-Identifier: MIT
"""What one run of rebuild.py was asked for, that it is the only one at work, and what it says when a step fails."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

import click
from pyinfra import context, logger
from pyinfra.api import Host, State
from pyinfra.api.state import BaseStateCallback

import inventory
from inventory import GpulabError, Guest, Lab
from inventory.resolve import CliError


@dataclass
class Order:
    """What this run of rebuild.py was asked for. `keep_old`: days; None: nobody said."""

    lab: str
    run: str
    rollback: bool = False
    destroy: bool = False
    keep_old: int | None = None
    take_over: bool = False
    #: The run whose marker the VM carried when this one began: the only one that it goes on from.
    began: str = ""
    #: Words of `--data`, for verify.
    data: tuple[str, ...] = ()
    #: Set while an old disk is there to go back to.
    way_back: WayBack | None = None
    #: Set once the old VM is deleted and there is no way back.
    way_on: WayOn | None = None


_orders: WeakKeyDictionary[State, Order] = WeakKeyDictionary()
#: Held while a run is at work, by state: the kernel lets go of it when the process ends, however it ends.
_locks: WeakKeyDictionary[State, IO[str]] = WeakKeyDictionary()


def begun(state: State, lab: Lab) -> bool:
    """Is this a run of rebuild.py? It is then checked to be about exactly one guest, before any connection.

    Raises:
        CliError: it is about several hosts, none, or a node.
    """
    found = only_guest(state, lab, "rebuild.py", "rebuilds")
    if found is None:
        return False
    if state not in _orders:
        file, chosen = found
        words = dict(state.inventory.override_data)
        _orders[state] = Order(
            lab=file,
            run=this_run(),
            rollback=bool(words.get("rollback")),
            destroy=_destroy(chosen, words),
            # Zero that somebody wrote means more than the default: a disk that is kept goes now.
            keep_old=state.inventory.get_host(chosen).data.get("keep_old"),
            take_over=bool(words.get("take_over")),
            data=tuple(f"{key}={_word(value)}" for key, value in words.items() if key not in inventory.RUN_WORDS),
        )
    return True


def _destroy(guest: str, words: Mapping[str, Any]) -> bool:
    """Is the guest's VM to be deleted? Who runs this has to name it, before anything else; not for a plan.

    Raises:
        CliError: the name is wrong or missing, or the words do not go together.
    """
    if not words.get("destroy"):
        return False
    if words.get("rollback"):
        raise CliError(
            "destroy=1 deletes the VM, rollback=1 brings an old system disk back: one of them at a time.\n"
            "Nothing was done."
        )
    command = click.get_current_context(silent=True)
    if command is not None and command.params.get("dry"):
        return True
    said = words.get("confirm")
    if said is None and sys.stdin.isatty():
        question = f"destroy=1 deletes the VM of {guest} and makes it anew. Its name, to go on"
        said = click.prompt(question, err=True, default="", show_default=False)
    if str(said) != guest:
        seen = f"{said!r} is not its name" if said else "its name was not given"
        raise CliError(
            f"destroy=1 deletes the VM of {guest}: {seen}; nothing was done.\n"
            f"hint: type {guest} when you are asked, or add --data confirm={guest}"
        )
    return True


def destroying(state: State) -> bool:
    """Is this a run of rebuild.py with destroy=1?"""
    return state in _orders and _orders[state].destroy


def only_guest(state: State, lab: Lab, program: str, does: str) -> tuple[str, str] | None:
    """The inventory's file and the one guest that a run of `program` is about; None: this is no run of it.

    Raises:
        CliError: it is about several hosts, none, or a node.
    """
    command = click.get_current_context(silent=True)
    files = [Path(str(word)).name for word in (command.params.get("operations") or ())] if command else []
    if command is None or program not in files:
        return None
    limit = state.limit_hosts
    chosen = [host.name for host in state.inventory if limit is None or host in limit]
    if len(chosen) != 1 or chosen[0] not in lab.guests:
        raise CliError(
            f"{program} {does} exactly one guest; nothing was done.\n"
            f"This run is about {', '.join(chosen) or 'no host'}.\n"
            f"hint: --limit with one of {', '.join(lab.guests)}"
        )
    return str(command.params["inventory"]), chosen[0]


def this_run() -> str:
    """Who, where, which process and since when."""
    return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}:{int(time.time())}"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def current() -> Order:
    """This run's order, for rebuild.py.

    Raises:
        GpulabError: the file is read in a run that no guest's connector has seen.
    """
    found = _orders.get(context.ctx_state.get())
    if found is None:
        raise GpulabError(
            "rebuild.py rebuilds exactly one guest; nothing was done.",
            resolution="pyinfra inventory/lab.py rebuild.py --limit gpu01",
        )
    return found


def lock(state: State, guest: Guest, run: str) -> None:
    """Be the only rebuild of this guest on this machine until the process ends.

    Raises:
        GpulabError: another one is at work.
    """
    if state in _locks:
        return
    path = guest.state / f"rebuild-{guest.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = open(path, "a")  # noqa: SIM115  (held until the run ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise busy(guest, f"the run {path.read_text().strip()}") from None
    file.truncate(0)
    file.write(run + "\n")
    file.flush()
    _locks[state] = file


def busy(guest: Guest, who: str, hint: str = "wait until it has ended") -> GpulabError:
    return GpulabError(f"{guest.name}: somebody is at work on VM {guest.vmid}: {who}", "Nothing was done.", hint)


def release(state: State) -> None:
    """Let go of the run's lock."""
    if state in _locks:
        _locks.pop(state).close()


class WayBack(BaseStateCallback):
    """Says after any failed step what lies where, and how to go on or back."""

    def __init__(self, guest: Guest, lab: str, old: str) -> None:
        self.guest, self.lab, self.old = guest, lab, old

    def operation_host_error(
        self, state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        for line in way_back(self.guest, self.lab, self.old) if self.old else ():
            logger.error(f"{host.print_prefix}{line}")


def way_back(guest: Guest, lab: str, old: str) -> list[str]:
    """What a user is told when the new system is in place and something failed."""
    command = f"pyinfra {lab} rebuild.py --limit {guest.name}"
    return [
        f"{guest.name}: the old system disk {old} is kept; the data disk was not touched.",
        f"hint: repair what failed, then `{command}` goes on from here; `{command} --data rollback=1` goes back",
    ]


class WayOn(BaseStateCallback):
    """Says after any failed step, once the old VM is deleted, what there is. `lines` are those of the last step."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def operation_host_error(
        self, state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        for line in self.lines:
            logger.error(f"{host.print_prefix}{line}")
