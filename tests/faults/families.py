# SPDX-License-Identifier: MIT
"""Faults that come in families: one for each call, task or privilege, enumerated from a good run or from the code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from inventory import Node
from operations.proxmox import access
from tests.api.conftest import PASSTHROUGH

from .table import Verdict
from .world import Call, Case, Recording, World

#: Seconds that a request is given, and after which a slow one is answered.
PATIENCE_S, SLOW_S = 0.5, 0.8


def _hasty(world: World) -> None:
    world.timeout_s = PATIENCE_S


def _slow(world: World, method: str, path: str, skip: int, times: int = 1) -> None:
    _hasty(world)
    world.api.slow_reply(method, path, SLOW_S, times=times, skip=skip)


#: What may befall a change and its answer.
ANSWERS: dict[str, Callable[[World, Call], object]] = {
    "595, never arrived": lambda world, call: world.api.answer(595, 1, call.method, call.pattern, skip=call.number),
    "596, never arrived": lambda world, call: world.api.answer(596, 1, call.method, call.pattern, skip=call.number),
    "596, but carried out": lambda world, call: world.api.answer(
        596, 1, call.method, call.pattern, carried_out=True, skip=call.number
    ),
    "599, never arrived": lambda world, call: world.api.answer(599, 1, call.method, call.pattern, skip=call.number),
    "599, but carried out": lambda world, call: world.api.answer(
        599, 1, call.method, call.pattern, carried_out=True, skip=call.number
    ),
    "read timeout, but carried out": lambda world, call: _slow(world, call.method, call.pattern, call.number),
    "connection closed, but carried out": lambda world, call: world.api.drop_reply(
        call.method, call.pattern, skip=call.number
    ),
    "kept-alive connection closed when reused": lambda world, call: world.api.hang_up(
        call.method, call.pattern, skip=call.number
    ),
}


def lost_answers(job: str, recording: Recording) -> Iterator[Case]:
    """Each change of a run, and all that may befall it: none of it is a reason to fail, or to do it twice."""
    for call in recording.changes:
        for words, befall in ANSWERS.items():
            yield Case(job, call.name, words, Verdict.SURVIVED, _bound(befall, call))


def _bound(befall: Callable[[World, Call], object], call: Call) -> Callable[[World], object]:
    return lambda world: befall(world, call)


def nobody_answers(job: str, recording: Recording) -> Iterator[Case]:
    """From each change on the node is offline for good."""
    for call in recording.changes:

        def gone(world: World, call: Call = call) -> None:
            world.patience_s = 0.1

            def look() -> None:
                world.api.answer(595, 10**6)

            world.api.meanwhile(call.method, call.pattern, look, skip=call.number)

        yield Case(job, call.name, "carried out, then the node is offline for good", Verdict.HEALED, gone, LOST_SIGHT)


def task_errors(job: str, recording: Recording, nothing_changed: tuple[str, ...]) -> Iterator[Case]:
    """Each task of a run ends badly. `nothing_changed`: those before which the run had not changed anything."""
    for number, kind in enumerate(recording.tasks):
        skip = recording.tasks[:number].count(kind)
        status, after = TASK_WORDS[kind]
        if job == "destroy" and kind == "qmcreate" and skip == 0:
            # The keeper has no disk.
            after = ""

        def fail(world: World, kind: str = kind, status: str = status, after: str = after, skip: int = skip) -> None:
            world.api.fail_task(kind, status, log=["one line", "and another"], after=after, skip=skip)

        expected = Verdict.REFUSED if kind in nothing_changed else Verdict.HEALED
        says = rf"^pve1: task {kind} failed: .*{re.escape(status)}"
        yield Case(job, f"task {kind}", f"ends with: {status[:60]}", expected, fail, says)


#: What a run says that nobody answers any more: of a request, or of the task that it waits for.
LOST_SIGHT = r"^(gpu01|pve1): (?s:.*)595 No route to host"
#: How each task fails in PVE's words, and the line after which it does, where it has to clean up.
TASK_WORDS = {
    "download": ("download failed: Connecting to 192.0.2.9:443... failed: No route to host.", ""),
    "qmcreate": ("lvcreate 'pve/vm-101-disk-1' error: insufficient free space", "successfully created disk"),
    "qmconfig": ("lvcreate 'pve/vm-101-disk-3' error: insufficient free space", "create full clone"),
    "resize": ("command '/sbin/lvextend -L 64G' failed: exit code 5", ""),
    "qmstart": ("start failed: QEMU exited with code 1", ""),
    "qmshutdown": ("VM quit/powerdown failed - got timeout", ""),
    "qmmove": ("lvrename 'pve/vm-101-disk-2' error: device is busy", ""),
    "qmdestroy": ("lvremove 'pve/vm-101-disk-1' error: device is busy", ""),
}


def polls(job: str, recording: Recording) -> Iterator[Case]:
    """What may befall the question how a task fares."""
    for kind in dict.fromkeys(recording.tasks):
        path = rf"/tasks/UPID:[^/]*:{kind}:[^/]*/status$"
        for status in (595, 596, 599):

            def answer(world: World, status: int = status, path: str = path) -> None:
                world.api.answer(status, 3, "GET", path)

            yield Case(job, f"status of task {kind}", f"{status}, three times", Verdict.SURVIVED, answer)

        def slow(world: World, path: str = path) -> None:
            _slow(world, "GET", path, 0)

        def closed(world: World, path: str = path) -> None:
            world.api.hang_up("GET", path)

        yield Case(job, f"status of task {kind}", "read timeout", Verdict.SURVIVED, slow)
        yield Case(job, f"status of task {kind}", "kept-alive connection closed", Verdict.SURVIVED, closed)

        def silent(world: World, path: str = path) -> None:
            world.patience_s = 0.2
            world.api.answer(599, 10**6, "GET", path)

        if kind == "qmshutdown" and job != "update":
            # It is enough that the VM is seen to be stopped.
            yield Case(job, f"status of task {kind}", "599 for good", Verdict.SURVIVED, silent)
            continue
        yield Case(
            job,
            f"status of task {kind}",
            "599 for good",
            Verdict.HEALED,
            silent,
            rf"^pve1: task {kind} has not ended after \d+ s\nTask: UPID:.*\nLast: pve1: GET .*: 599 Too many",
        )


def digests(job: str, recording: Recording) -> Iterator[Case]:
    """Somebody changes the same file between our read and our change, at each change that sends a digest."""
    for call in recording.changes:
        if "digest" in call.parameters:

            def meanwhile(world: World, call: Call = call) -> None:
                world.api.meanwhile(call.method, call.pattern, lambda: _somebody(world, call), skip=call.number)

            yield Case(job, call.name, "somebody else changes it first", Verdict.SURVIVED, meanwhile)


def _somebody(world: World, call: Call) -> None:
    with world.api.lock:
        if "/mapping/" in call.path:
            world.api.state.mappings["theirs"].description = "somebody's"
        else:
            world.api.state.vms[101].config["cpulimit"] = 3


def kills(job: str, recording: Recording) -> Iterator[Case]:
    """The process is killed between any two calls: before the first that follows a change, and right after each."""
    for number in recording.stations:

        def before(world: World, number: int = number) -> None:
            world.kill_before = number

        def after(world: World, number: int = number) -> None:
            world.kill_after = number

        name = f"request {number} of {recording.requests}"
        yield Case(job, name, "killed before it", Verdict.HEALED, before)
        yield Case(job, name, "killed after it", Verdict.HEALED, after)


@dataclass(frozen=True)
class Right:
    major: int
    path: str
    privilege: str


def rights() -> list[Right]:
    """Every privilege on every path that a deploy asks for, on both versions."""
    node = Node(name="pve1", ssh_hostname="192.0.2.11", passthrough=PASSTHROUGH)
    found = []
    for major in (8, 9):
        for line in access.missing({}, node, major, {"local-lvm"}):
            privilege, _, path = line.partition(" on ")
            found.append(Right(major, path, privilege))
    return found


def missing_rights(job: str) -> Iterator[Case]:
    """The token without one privilege on one path."""
    for right in rights():

        def take(world: World, right: Right = right) -> None:
            world.rights(right.major)
            kept = [name for name in _held(world, right.path) if name != right.privilege]
            world.api.grant(world.api.user, right.path, " ".join(kept))
            if right.privilege == "VM.Monitor":
                world.api.take_away("VM.Monitor")

        def give(world: World, right: Right = right) -> None:
            world.rights(right.major)

        # Without VM.Audit not even the guest's connection can be decided on: PVE itself says it first.
        lacks = rf"^(waits for )?pve1: the API token lacks {right.privilege} on {right.path}(/101)?\n"
        says = rf"{lacks}.*\nhint: make bootstrap LAB="
        where = f"token on PVE {right.major}"
        yield Case(job, where, f"lacks {right.privilege} on {right.path}", Verdict.REFUSED, take, says, give)


def _held(world: World, path: str) -> list[str]:
    """What the token holds on a path or, without an entry of its own, above it."""
    entries: dict[str, Any] = {entry.path: entry for entry in world.api.state.acl if entry.who == world.api.user}
    parts = path.split("/")
    known = next(entries[up] for n in range(len(parts), 0, -1) if (up := "/".join(parts[:n])) in entries)
    return list(world.api.state.roles[known.role])
