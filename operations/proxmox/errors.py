# SPDX-License-Identifier: MIT
"""What the API can say no with, told apart by PVE's own words.

PVE has no 404 and no 409: not found, exists, locked and changed meanwhile are all status 500, and only the sentence
tells which (notes of PVE 8.4 and 9.2). Pure: nothing here talks to anything.

    GpulabError
    ├── ApiUnreachable          no usable answer
    ├── TaskFailed              a task ended badly
    ├── TaskUnfinished          a task has not ended in time
    └── ApiError                the API refused a request
        ├── Unauthorized        the token
        ├── PermissionDenied    a privilege on a path
        ├── RootOnly            no token may do it
        ├── InvalidParameter    one message for each parameter
        ├── NotFound
        ├── AlreadyExists
        ├── Locked              somebody is at work
        └── DigestMismatch      changed by somebody else since it was read
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from inventory import GpulabError

_SECRET = re.compile(r"password|secret|token|(^|-)key$", re.I)
#: Characters of a value that a message shows.
_SHOWN = 60


@dataclass(frozen=True)
class Request:
    """One request to the API of `node` (our name for it)."""

    node: str
    method: str
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def where(self) -> str:
        return f"{self.method} {self.path}"

    def shown(self) -> dict[str, str]:
        """The parameters as a message may show them: no secrets, long values cut."""
        return {name: _shown(name, value) for name, value in self.parameters.items() if value is not None}

    def without_secrets(self, text: str) -> str:
        """A sentence of PVE's in which no secret of this request is quoted."""
        for name, value in self.parameters.items():
            if _SECRET.search(name) and value not in (None, ""):
                for form in (str(value), quote(str(value), safe="")):
                    text = text.replace(form, "***")
        return _without_login(text)


def _without_login(text: str) -> str:
    """URLs lose the user and password that they may carry."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _shown(name: str, value: Any) -> str:
    if _SECRET.search(name):
        return "***"
    text = _without_login(str(value))
    length = 24 if name == "sshkeys" else _SHOWN
    return text if len(text) <= length else text[:length] + "…"


class ApiError(GpulabError):
    """The API refused a request; `status` is its HTTP status, `message` its own sentence.

    `method`, `path` and `parameters` (without secrets) say what was asked.
    """

    def __init__(
        self,
        status: int,
        message: str,
        brief: str,
        details: str = "",
        resolution: str = "",
        request: Request | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.method = request.method if request else ""
        self.path = request.path if request else ""
        self.parameters = request.shown() if request else {}
        super().__init__(brief, details, resolution)


class Unauthorized(ApiError):
    """401: the token is unknown, wrong or expired."""


class PermissionDenied(ApiError):
    """403: the token lacks `privilege` on `acl_path`; PVE does not always name them."""

    privilege: str | None = None
    acl_path: str | None = None


class RootOnly(ApiError):
    """Only the login root@pam may do this, no token, not even one of root's."""


class InvalidParameter(ApiError):
    """400; `errors` has PVE's sentence for each parameter."""

    errors: Mapping[str, str] = {}


class NotFound(ApiError):
    """There is no such thing."""


class AlreadyExists(ApiError):
    """The name or id is taken."""


class Locked(ApiError):
    """Somebody is at work on it. `lock` is PVE's word for it (`backup`); empty for a lock that has none."""

    lock = ""


class DigestMismatch(ApiError):
    """Somebody else changed it between our read and our change."""


class ApiUnreachable(GpulabError):
    """No usable answer within the deadline. `lost`: the request may have been carried out all the same."""

    def __init__(self, brief: str, details: str = "", resolution: str = "", lost: bool = True) -> None:
        self.lost = lost
        super().__init__(brief, details, resolution)


class TaskFailed(GpulabError):
    """A task ended badly, with `exitstatus`; `reason` is the class that an answer with these words would have."""

    def __init__(self, upid: str, exitstatus: str, log: Sequence[str] = (), tail: int = 5) -> None:
        self.upid = upid
        self.node, self.kind = upid.split(":")[1], upid.split(":")[5]
        self.exitstatus = exitstatus = _without_login(exitstatus)
        self.log = tuple(_without_login(line) for line in log)
        self.reason = kind_of(500, exitstatus)
        lines = [line for line in self.log if line.removeprefix("TASK ERROR: ") != exitstatus][-tail:]
        super().__init__(
            f"{self.node}: task {self.kind} failed: {exitstatus}",
            "\n".join(f"  {line}" for line in lines),
            _RESOLUTION.get(self.reason, ""),
        )

    @property
    def before_work(self) -> bool:
        """Did the task end at the VM's lock, before it did anything?"""
        return _AT_THE_LOCK.match(self.exitstatus) is not None


class TaskUnfinished(GpulabError):
    """A task has not ended within its deadline; it may still."""

    def __init__(self, upid: str, deadline_s: float, last: str = "") -> None:
        self.upid = upid
        node, kind = upid.split(":")[1], upid.split(":")[5]
        super().__init__(
            f"{node}: task {kind} has not ended after {deadline_s:.0f} s",
            f"Task: {upid}" + (f"\nLast: {last}" if last else ""),
            "it may still end; look at it in the node's task list, then deploy again",
        )


_LOCK = re.compile(r"\b(?:VM|CT|guest) is locked \((?P<lock>[\w-]+)\)")
_FILE_LOCK = re.compile(r"can't lock file '[^']+'|cfs[- ]lock '[^']+'|got lock (?:request )?timeout")
_AT_THE_LOCK = re.compile(r"(?:VM|CT) is locked \(|can't lock file '/(?:var|run)/lock/(?:qemu-server|lxc)/")
_PERMISSION = re.compile(r"Permission check failed(?: \((?P<path>/[^,()]*), (?P<privilege>[^)]+)\))?")

# The first that matches counts. Words of qemu-server, pve-storage, pve-guest-common and pve-cluster.
_WORDS: tuple[tuple[type[ApiError], re.Pattern[str]], ...] = (
    (RootOnly, re.compile(r"\bonly root(?:@pam)? (?:can|may)\b|user != root@pam", re.I)),
    (PermissionDenied, re.compile(r"Permission check failed")),
    (Locked, re.compile(f"{_LOCK.pattern}|{_FILE_LOCK.pattern}".replace("?P<lock>", ""))),
    (DigestMismatch, re.compile(r"checksum mismatch \(file change|detected modified configuration")),
    (AlreadyExists, re.compile(r"already exists?\b|already defined|does already exist|name '[^']+' already used")),
    (NotFound, re.compile(r"does(?: not|n't) exist|\bno such\b|\bnot found\b")),
)
_RESOLUTION: dict[type[ApiError], str] = {
    RootOnly: "gpulab sets over SSH, as root, what no token may; do the same for this on the node",
    PermissionDenied: "make bootstrap LAB=… gives the token's role what this version of gpulab needs",
    DigestMismatch: "deploy again: it reads the present state first",
}


def kind_of(status: int, message: str, errors: Mapping[str, str] | None = None) -> type[ApiError]:
    """The class of a refusal, from its HTTP status and PVE's words.

    Root-only rules are found under every status: PVE says 500 or 400, other servers of the same API say 403.
    """
    if status == 401:
        return Unauthorized
    if any(_WORDS[0][1].search(text) for text in (message, *(errors or {}).values())):
        return RootOnly
    if status == 403:
        return PermissionDenied
    if status == 400:
        return InvalidParameter
    if status == 404:
        return NotFound
    return next((kind for kind, words in _WORDS if words.search(message)), ApiError) if status == 500 else ApiError


def classify(
    request: Request, status: int, message: str, errors: Mapping[str, Any] | None = None, role: str = "gpulab"
) -> ApiError:
    """The error for a refused request, with everything that its reader needs. `role`: the role of our token."""
    message = request.without_secrets(message.strip())
    found = {
        str(name): request.without_secrets(str(text).strip())
        for name, text in (errors or {}).items()
        # proxmoxer puts an answer that is not JSON here, as bytes.
        if not isinstance(text, bytes)
    }
    kind = kind_of(status, message, found)
    brief = f"{request.node}: {request.where}: {status} {message}"
    details = "\n".join(_of_parameter(name, text, request) for name, text in found.items())
    resolution = _RESOLUTION.get(kind, "")
    bootstrap = "make bootstrap LAB=…"
    if kind is Unauthorized:
        brief = f"{request.node}: the API refuses the token ({message})"
        resolution = f"{bootstrap} makes a new one"
    elif kind is PermissionDenied:
        missing = _PERMISSION.search(message)
        privilege, path = (missing["privilege"], missing["path"]) if missing else (None, None)
        lacks = (privilege or "a privilege that PVE does not name").replace("|", " or ")
        brief = f"{request.node}: the API token lacks {lacks} on {path or 'an unnamed path'}"
        details = f"{request.where}: {message}"
        resolution = f"{bootstrap} gives the role {role} what this version of gpulab needs"
        denied = PermissionDenied(status, message, brief, details, resolution, request)
        denied.privilege, denied.acl_path = privilege, path
        return denied
    elif kind is RootOnly:
        details = "\n".join(filter(None, (details, "PVE lets only the login root@pam do this, never an API token.")))
    elif kind is DigestMismatch:
        details = "Somebody else changed it between our read and our change; nothing of ours was applied."
    error = kind(status, message, brief, details, resolution, request)
    if isinstance(error, InvalidParameter):
        error.errors = found
    if isinstance(error, Locked) and (lock := _LOCK.search(message)):
        error.lock = lock["lock"]
    return error


def _of_parameter(name: str, text: str, request: Request) -> str:
    sent = request.shown().get(name)
    lines = text.splitlines() or [""]
    return "\n    ".join([f"  {name}: {lines[0]}", *lines[1:], *([f"sent: {sent}"] if sent is not None else [])])


def locked_by(error: Locked, node: str, waited_s: float, tasks: Sequence[Mapping[str, Any]], vmid: str) -> Locked:
    """The same error after waiting, with who is at work: `tasks` are entries of the node's list of running tasks."""
    busy = [f"  {task.get('type')} of {task.get('id') or 'the node'} by {_who(task)}" for task in tasks]
    if busy:
        at_work = "\n".join(["At work on the node now:", *busy])
        resolution = "deploy again when that has ended"
    else:
        at_work = "No task is at work on the node."
        unlock = f"when nothing holds it any more: qm unlock {vmid} on {node}, then "
        resolution = (unlock if error.lock and vmid else "") + "deploy again"
    found = Locked(error.status, error.message, error.brief, f"Still so after {waited_s:.0f} s. {at_work}", resolution)
    found.lock = error.lock
    found.method, found.path, found.parameters = error.method, error.path, error.parameters
    return found


def _who(task: Mapping[str, Any]) -> str:
    token = task.get("tokenid")
    return f"{task.get('user')}!{token}" if token else str(task.get("user"))
