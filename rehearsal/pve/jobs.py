# SPDX-License-Identifier: MIT
"""/cluster/backup: the backup jobs of the data centre (jobs.cfg).

They are kept and shown, and nothing runs them: the rehearsal has no scheduler (simulated). What a job would do is
done by hand with `POST /nodes/N/vzdump`.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from rehearsal.pve import access, retention
from rehearsal.pve.errors import bad_parameters, die
from rehearsal.pve.routing import Call, Route, needs
from rehearsal.pve.state import BackupJob, Store

_ROOT_ONLY = ("tmpdir", "dumpdir", "script")
_LIMITS = ("bwlimit", "ionice", "performance")
_INTEGERS = frozenset(["bwlimit", "ionice", "lockwait", "maxfiles", "pigz", "stopwait", "zstd"])
_BOOLEANS = frozenset(["all", "enabled", "protected", "quiet", "remove", "repeat-missed", "stdexcludes", "stop"])
_NOTE_NAMES = ("cluster", "guestname", "node", "vmid")

_DAY = r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
_NUMBER = r"\d+(?:\.\.\d+)?(?:/\d+)?"
_NUMBERS = rf"(?:\*(?:/\d+)?|{_NUMBER}(?:,{_NUMBER})*)"
_EVENT = re.compile(
    rf"(?:{_DAY}(?:\.\.{_DAY})?(?:,{_DAY}(?:\.\.{_DAY})?)*)?"
    rf"\s*(?:(?:{_NUMBERS}-)?{_NUMBERS}-{_NUMBERS})?"
    rf"\s*(?:{_NUMBERS}(?::{_NUMBERS}){{0,2}})?",
    re.IGNORECASE,
)
_WORDS = frozenset(
    [
        *("minutely", "hourly", "daily", "weekly", "monthly", "quarterly"),
        *("semiannually", "semi-annually", "annually", "yearly"),
    ]
)


class JobsApi:
    """Only who may change the whole data centre may write here: root, and no token of ours."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        base = "/cluster/backup"
        one = base + "/{id}"
        audit, modify = needs("/", "Sys.Audit"), needs("/", "Sys.Modify")
        return [
            Route("GET", base, self._list, audit),
            Route("POST", base, self._create, modify),
            Route("GET", one, self._get, audit),
            Route("PUT", one, self._update, modify),
            Route("DELETE", one, self._delete, modify),
            Route("GET", "/cluster/backup-info/not-backed-up", self._not_backed_up, audit),
        ]

    def _list(self, call: Call) -> list[dict[str, Any]]:
        return [self._view(ident, job) for ident, job in sorted(self._store.state.backup_jobs.items())]

    @staticmethod
    def _view(ident: str, job: BackupJob) -> dict[str, Any]:
        view: dict[str, Any] = {"id": ident, "type": "vzdump"}
        for key, value in job.items():
            if key in _INTEGERS | _BOOLEANS:
                view[key] = int(value)
            else:
                # As PVE's: the list has this one as an object, with its numbers as text.
                view[key] = {k: str(n) for k, n in retention.parse(value).items()} if key == "prune-backups" else value
        return view

    def _known(self, call: Call) -> BackupJob:
        ident = call.text("id")
        if ident not in self._store.state.backup_jobs:
            bad_parameters({"id": f"No such job '{ident}'"})
        return self._store.state.backup_jobs[ident]

    def _get(self, call: Call) -> dict[str, Any]:
        return self._view(call.text("id"), self._known(call))

    def _create(self, call: Call) -> None:
        job = self._checked(call)
        check_options(job)
        if "starttime" not in call.params and "schedule" not in call.params:
            bad_parameters({"schedule": "neither 'starttime' nor 'schedule' were set"})
        require_guests(job)
        ident = call.text("id") or f"backup-{secrets.token_hex(4)}-{secrets.token_hex(2)}"
        if ident in self._store.state.backup_jobs:
            die(f"Job '{ident}' already exists")
        job.setdefault("enabled", "1")
        self._store.state.backup_jobs[ident] = job

    def _update(self, call: Call) -> None:
        deletes = call.names("delete")
        changes = self._checked(call)
        if not changes and not deletes:
            die("no options specified")
        check_options(changes)
        ident = call.text("id")
        known = self._store.state.backup_jobs.get(ident)
        if known is None:
            die("no such vzdump job")
        job = dict(known)
        for key in deletes:
            if key not in _INTEGERS | _BOOLEANS and not re.fullmatch(r"[a-z][a-z-]*", key):
                bad_parameters({"delete": f"unknown option '{key}'"})
            job.pop(key, None)
        job.update(changes)
        # A job is for named guests or for all: what is given now replaces the other.
        if "vmid" in changes:
            for key in ("all", "exclude", "pool"):
                job.pop(key, None)
        elif "all" in changes or "pool" in changes:
            job.pop("vmid", None)
        check_options(job)
        require_guests(job)
        self._store.state.backup_jobs[ident] = job

    def _checked(self, call: Call) -> BackupJob:
        """A request's options as jobs.cfg keeps them, after PVE's checks of who may set them."""
        check_rights(self._store, call)
        job = {key: call.text(key) for key in call.params if key not in ("id", "delete", "starttime", "dow")}
        job.update({key: str(int(call.flag(key))) for key in job if key in _BOOLEANS})
        if "starttime" in call.params:
            if "schedule" in job:
                bad_parameters({"starttime": "'starttime' and 'schedule' cannot both be set"})
            job["schedule"] = f"{call.text('dow')} {call.text('starttime')}".strip()
        if "schedule" in job:
            check_schedule(job["schedule"])
        if "prune-backups" in job:
            job["prune-backups"] = retention.text(retention.parse(job["prune-backups"]))
        return job

    def _delete(self, call: Call) -> None:
        self._known(call)
        del self._store.state.backup_jobs[call.text("id")]

    def _not_backed_up(self, call: Call) -> list[dict[str, Any]]:
        """Guests that no job names; a disabled job counts, as in PVE."""
        state = self._store.state
        covered: set[int] = set()
        for job in state.backup_jobs.values():
            excluded = _ids(job.get("exclude", ""))
            covered |= set(state.vms) - excluded if job.get("all") == "1" else _ids(job.get("vmid", ""))
        return [
            {"vmid": vmid, "type": "qemu", "name": str(vm.config.get("name", f"VM{vmid}"))}
            for vmid, vm in sorted(state.vms.items())
            if vmid not in covered
        ]


def forget_guest(store: Store, vmid: int) -> None:
    """A destroy with `purge`: the guest leaves every job, and a job that was for it alone goes."""
    jobs = store.state.backup_jobs
    for ident, job in list(jobs.items()):
        for key in ("vmid", "exclude"):
            if key not in job:
                continue
            rest = [part for part in re.split(r"[\s,;]+", job[key]) if part and part != str(vmid)]
            if rest:
                job[key] = ",".join(rest)
            elif key == "vmid":
                del jobs[ident]
            else:
                del job[key]
            break


def check_rights(store: Store, call: Call) -> None:
    """What a backup and a backup job ask for beside the guest and the storage."""
    if call.is_root:
        return
    for key in _ROOT_ONLY:
        if key in call.params:
            bad_parameters({key: "Only root may set this option."})
    if any(key in call.params for key in _LIMITS):
        access.require(store.state, call.user, "/", "Sys.Modify")


def check_options(options: BackupJob) -> None:
    """The options that exclude each other, and the template for the notes."""
    for key in ("all", "exclude", "pool"):
        if options.get(key, "0") != "0" and "vmid" in options:
            bad_parameters({key: "option conflicts with option 'vmid'"})
    if "prune-backups" in options and "maxfiles" in options:
        bad_parameters({"prune-backups": "option conflicts with option 'maxfiles'"})
    template = options.get("notes-template", "")
    if "\n" in template:
        bad_parameters({"notes-template": "contains a line feed\n"})
    unknown = [
        f"escape sequence '{match[0]}' at char {match.start()}"
        for match in re.finditer(r"\\(.)", template)
        if match[1] not in ("n", "\\")
    ]
    unknown += [
        f"variable '{match[1]}' at char {match.start(1)}"
        for match in re.finditer(r"\{\{([^\s{}]+)\}\}", template)
        if match[1] not in _NOTE_NAMES
    ]
    if unknown:
        bad_parameters({"notes-template": f"found unknown: {', '.join(unknown)}\n"})


def require_guests(options: BackupJob) -> None:
    """One of these says whom it is about."""
    if not any(options.get(key, "0") not in ("", "0") for key in ("all", "stop", "pool", "vmid", "exclude")):
        bad_parameters({"vmid": "property is missing"})


def check_schedule(text: str) -> None:
    """PVE's calendar events, by their shape only (simulated: the numbers' ranges are not looked at)."""
    if not text.strip():
        problem = "unable to parse calendar event - event is empty"
    elif text.strip().lower() in _WORDS or _EVENT.fullmatch(text.strip()):
        return
    else:
        problem = "unable to parse calendar event"
    bad_parameters({"schedule": f"invalid format - invalid calendar event '{text}' - {problem}\n"})


def _ids(text: str) -> set[int]:
    return {int(part) for part in re.split(r"[\s,;]+", text) if part.isdecimal()}
