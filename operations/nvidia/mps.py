# SPDX-License-Identifier: MIT
"""How the card is shared: MPS with its limits and one service user, or no MPS; and each tenant's profile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from inventory.sharing import LOG_DIRECTORY, PIPE_DIRECTORY, SERVICE_USER, TENANTS
from operations import files, step
from operations.files import File, render
from operations.nvidia.facts import MpsFacts
from operations.nvidia.remote.mps import ORDER
from operations.nvidia.units import PROGRAMS, installed, restart
from operations.units import as_wanted

UNIT = "gpulab-mps.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = f"{PROGRAMS}/mps-limits"
USER_FILE = "/etc/sysusers.d/gpulab-gpu.conf"
FILES = (ORDER, UNIT_FILE, PROGRAM, USER_FILE)

#: What needs no quotes, neither for a shell nor for `docker run --env-file`, which would keep them.
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+-]+")


@dataclass(frozen=True)
class Actions:
    """What has to happen. `limits`: those that the live daemon has otherwise; nobody loses it for them."""

    files: Mapping[str, File | None] = field(default_factory=dict)
    user: bool = False
    folder: bool = False
    limits: tuple[str, ...] = ()
    start: str = ""
    stop: bool = False

    def any(self) -> bool:
        return bool(self.files or self.user or self.folder or self.limits or self.start or self.stop)


def profile(environment: Mapping[str, str]) -> str:
    """A tenant's environment file, for `docker run --env-file` and for `set -a; . FILE` alike.

    Raises:
        GpulabError: a value that the two would read differently.
    """
    for key, value in environment.items():
        if not _PLAIN.fullmatch(value):
            raise GpulabError(f"{key} = {value!r} can't stand in an environment file", "Expected no blanks or quotes.")
    return render("nvidia/tenant.env.j2", environment=environment)


def wanted_files(sharing: str, uid: int, order: Mapping[str, Any]) -> dict[str, File | None]:
    if sharing != "mps":
        return dict.fromkeys(FILES)
    return {
        USER_FILE: File(render("nvidia/sysusers.conf.j2", user=SERVICE_USER, uid=uid)),
        PROGRAM: installed("mps"),
        ORDER: File(json.dumps(dict(order), indent=2) + "\n"),
        UNIT_FILE: File(
            render(
                "nvidia/gpulab-mps.service.j2",
                user=SERVICE_USER,
                program=PROGRAM,
                pipe=PIPE_DIRECTORY,
                log=LOG_DIRECTORY,
            )
        ),
    }


def profiles(found: Mapping[str, Any], tenants: Mapping[str, Mapping[str, str]]) -> dict[str, File | None]:
    """Every tenant's file; None for those of tenants that are no longer declared."""
    wanted: dict[str, File | None] = {path: None for path in found.get("files", {}) if path.startswith(f"{TENANTS}/")}
    return wanted | {f"{TENANTS}/{name}.env": File(profile(environment)) for name, environment in tenants.items()}


def foreign_user(found: Mapping[str, Any], uid: int) -> str:
    """Who has the service's name or number and is not it, empty: nobody."""
    who = found.get("user", {})
    for kind, number, name in (("user", who.get("uid"), who.get("user")), ("group", who.get("gid"), who.get("group"))):
        if number not in (None, uid):
            return f"{kind} {SERVICE_USER} has the id {number}, expected {uid}"
        if name not in (None, SERVICE_USER):
            return f"{kind} {name} has the id {uid}, which is to be {SERVICE_USER}'s"
    return ""


def decide(
    found: Mapping[str, Any],
    sharing: str,
    uid: int,
    order: Mapping[str, Any],
    tenants: Mapping[str, Mapping[str, str]],
) -> Actions:
    """What has to happen for the card to be shared as declared.

    Raises:
        GpulabError: the service's user or number belongs to somebody else.
    """
    there, unit = found.get("files", {}), found.get("unit", {})
    changing = files.differing(there, {**wanted_files(sharing, uid, order), **profiles(found, tenants)})
    if sharing != "mps":
        running = unit.get("active") in ("active", "activating", "failed") or unit.get("enabled") == "enabled"
        return Actions(changing, stop=running, folder=found.get("pipe") is not None)
    if foreign := foreign_user(found, uid):
        raise GpulabError(
            f"The MPS clients' user can't be made: {foreign}", resolution="set nvidia.service_uid to a free number"
        )
    who, pipe = found.get("user", {}), found.get("pipe")
    start = ""
    if not as_wanted(unit):
        start = f"it is {unit.get('active') or 'absent'}"
    elif UNIT_FILE in changing:
        start = "its unit changes"
    elif found["limits"] is None:
        start = found["error"] or "its folder is gone"
    return Actions(
        changing,
        user=who.get("uid") is None or who.get("gid") is None,
        folder=not start and pipe != {"uid": uid, "gid": uid, "mode": 0o700},
        limits=() if start else tuple(found["wrong"]),
        start=start,
    )


@step.step
def sharing(
    mode: str,
    uid: int,
    active_thread_percentage: int,
    pinned_memory_limit_mib: int | None,
    tenants: Mapping[str, Mapping[str, str]],
) -> step.Commands:
    """
    Ensure that MPS runs with its limits, closed to all users but the service's, or does not run.

    Limits that somebody changed are set again in the running daemon: its clients stay. A change of the unit, or of
    the way of sharing, ends them.

    + mode: `mps`, `time-slice` or `exclusive`
    + uid: number of the service's user and group
    + active_thread_percentage: share of the card's SMs that a client may occupy
    + pinned_memory_limit_mib: device memory that one client process may pin; None: all of it
    + tenants: of each tenant what its processes need in their environment
    """
    order = {
        "pipe": PIPE_DIRECTORY,
        "uid": uid,
        "active_thread_percentage": active_thread_percentage,
        "pinned_memory_limit_mib": pinned_memory_limit_mib,
    }
    found = read(order)
    actions = decide(found, mode, uid, order, tenants)
    if not actions.any():
        limits = f" at {active_thread_percentage} %" if mode == "mps" else ""
        step.noop(f"the GPU is shared by {mode}{limits}, with {len(tenants)} tenants' profiles")
        return
    _record(found, actions, mode)
    if actions.stop:
        yield StringCommand("systemctl", "disable", "--now", UNIT)
    if actions.files:
        yield files.write(actions.files)
    if UNIT_FILE in actions.files:
        yield StringCommand("systemctl", "daemon-reload")
    if mode != "mps":
        if actions.folder:
            yield StringCommand("rm", "-rf", QuoteString(PIPE_DIRECTORY))
        return
    if actions.user:
        yield StringCommand("systemd-sysusers", QuoteString(USER_FILE))
    if actions.folder:
        owner = ("-o", SERVICE_USER, "-g", SERVICE_USER, "-m", "0700")
        yield StringCommand("install", "-d", *owner, QuoteString(PIPE_DIRECTORY))
    if actions.start:
        yield StringCommand("systemctl", "enable", UNIT)
        yield restart(UNIT)
    elif actions.limits or ORDER in actions.files:
        yield StringCommand(PROGRAM)
    yield step.call(check, order)


def read(order: Mapping[str, Any]) -> dict[str, Any]:
    """The state of MPS; empty for a guest that does not exist yet."""
    found: dict[str, Any] = step.read(
        MpsFacts,
        paths=list(FILES),
        unit=UNIT,
        pipe=PIPE_DIRECTORY,
        tenants=TENANTS,
        user=SERVICE_USER,
        uid=order["uid"],
        order=order,
    )
    return found


def _record(found: Mapping[str, Any], actions: Actions, mode: str) -> None:
    if actions.stop:
        step.changes(f"disable {UNIT}: the card is shared by {mode}", ("its clients lose the card",))
    for path, file in actions.files.items():
        if path == PROGRAM and file is not None:
            step.changes(f"file {path}")
        else:
            files.record(found.get("files", {}), {path: file})
    if actions.user:
        step.changes(f"user and group {SERVICE_USER}")
    if actions.folder:
        words = "close" if mode == "mps" else "remove"
        step.changes(f"{words} folder {PIPE_DIRECTORY}")
    if actions.start:
        lost = () if found.get("unit", {}).get("active") != "active" else ("its clients lose the card",)
        step.changes(f"start {UNIT}: {actions.start}", lost)
    if actions.limits:
        step.changes("set the limits of MPS", actions.limits)


def check(order: Mapping[str, Any]) -> None:
    """
    Raises:
        GpulabError: the daemon does not run, keeps other limits, or lets others in.
    """
    found = read(order)
    wrong = [*found["wrong"]]
    if found["limits"] is None:
        wrong.append(found["error"] or "its folder is missing")
    if not as_wanted(found["unit"]):
        wrong.append(f"{UNIT} is {found['unit']['active'] or 'absent'}, {found['unit']['enabled'] or 'not enabled'}")
    uid = order["uid"]
    if found["pipe"] is not None and found["pipe"] != {"uid": uid, "gid": uid, "mode": 0o700}:
        wrong.append(f"{PIPE_DIRECTORY}: {found['pipe']}")
    if wrong:
        raise GpulabError("MPS does not run as declared", "\n".join(wrong), f"`journalctl -u {UNIT}` in the guest")
