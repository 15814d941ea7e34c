# SPDX-License-Identifier: MIT
"""A thin client over proxmoxer: retries that are safe, tasks with a deadline, errors that say what to do.

The API answers 59x while a node is busy, and a reply can be lost after the change was made. A GET is simply sent
again. A change is sent again only after a look at what the lost request has done: its task in the node's task list,
or the state that it was to bring about.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import requests
from proxmoxer import ProxmoxAPI
from proxmoxer.core import ResourceException
from pyinfra import logger
from pyinfra.api import Host
from requests.adapters import HTTPAdapter

from inventory import GpulabError, Node
from inventory.secrets import Secrets, variable
from operations.proxmox import errors
from operations.proxmox.errors import (
    AlreadyExists,
    ApiError,
    ApiUnreachable,
    DigestMismatch,
    InvalidParameter,
    Locked,
    NotFound,
    PermissionDenied,
    Request,
    RootOnly,
    TaskFailed,
    TaskUnfinished,
    Unauthorized,
)

__all__ = [
    "AlreadyExists",
    "ApiError",
    "ApiUnreachable",
    "Client",
    "DigestMismatch",
    "InvalidParameter",
    "Locked",
    "NotFound",
    "PermissionDenied",
    "RootOnly",
    "TaskFailed",
    "TaskUnfinished",
    "Unauthorized",
    "with_digest",
]

T = TypeVar("T")

#: pveproxy's own errors: it could not reach the daemon behind it (pve-http-server, AnyEvent.pm). 595: not even
#: a connection, so nothing was carried out. 50x come from a proxy in front of it.
PROXY_ERRORS = (502, 503, 504, *range(595, 600))
NOT_CARRIED_OUT = (503, 595)
#: Seconds until a connection is given up; `api.timeout_s` is for the answer.
CONNECT_S = 10.0
#: Seconds for which an unanswered request is tried again, and for which a lock is waited for.
RETRY_S = 60.0
#: Seconds of the first pause between two tries; each is twice the one before, up to the longest.
PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
#: Looks at what a lost request has done before it is sent again: a busy node may begin it late.
LOOKS = 3
#: Seconds between two looks at a task, at first and then.
POLL_S = (0.3, 1.0)
#: Seconds after which a task shows its progress, and between two lines of it.
PROGRESS_S = 5.0
#: Times that a change is made anew on what it then finds.
DIGEST_TRIES = 5

_CERTIFICATE = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|Fingerprints did not match|\[X509", re.I
)


class Patience:
    """Growing pauses until a deadline; at least one, however long the first try took."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._pause = PAUSE_S
        self._rested = seconds <= 0

    @property
    def over(self) -> bool:
        return self._rested and time.monotonic() >= self._end

    def rest(self) -> None:
        time.sleep(max(0.0, min(self._pause, self._end - time.monotonic())))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        self._rested = True


class Client:
    """The API of one node, with the lab's token. Every HTTP request counts for `host`, when one is given.

    The server is known by the cluster's CA (`make bootstrap` fetches it over SSH), or by the SHA-256 fingerprint of
    its certificate where the node's `api` has one.
    """

    def __init__(self, node: Node, retry_s: float | None = None, host: Host | None = None) -> None:
        token = Secrets(node.state).get(node.cluster_name, "api_token")
        if token is None:
            raise GpulabError(
                f"{node.name}: no API token for cluster {node.cluster_name}",
                f"Looked in {node.state / 'secrets.json'} and {variable(node.cluster_name, 'api_token')}.",
                "make bootstrap LAB=… creates role, user and token on the node and stores the token",
            )
        user, separator, rest = token.partition("!")
        token_name, equals, value = rest.partition("=")
        if not (separator and equals):
            raise GpulabError(f"{node.name}: the API token has the wrong form", "Expected user@realm!name=uuid.")
        self.fingerprint = node.api.fingerprint
        if self.fingerprint is None and not node.ca_file.is_file():
            raise GpulabError(
                f"{node.name}: no CA certificate to check the API with",
                f"Expected {node.ca_file}.",
                "make bootstrap LAB=… fetches it over SSH from /etc/pve/pve-root-ca.pem",
            )
        self.node = node
        self.retry_s = RETRY_S if retry_s is None else retry_s
        # Hosts of other connectors than ours count nothing.
        self.count: Callable[[], None] = getattr(getattr(host, "connector", None), "count_request", lambda: None)
        self._prefix = getattr(host, "print_prefix", f"[{node.name}] ")
        self._owner = (user, token_name)
        #: Tasks that this client has been given already, and how far the node's clock is ahead of ours, in seconds.
        self._tasks: set[str] = set()
        self._clock_ahead = 0.0
        self.api = ProxmoxAPI(
            node.api_host,
            port=node.api.port,
            user=user,
            token_name=token_name,
            token_value=value,
            # With a fingerprint the adapter below checks the certificate, before anything is sent.
            verify_ssl=str(node.ca_file) if self.fingerprint is None else False,
            timeout=(min(CONNECT_S, node.api.timeout_s), node.api.timeout_s),
        )
        session: requests.Session = self.api._store["session"]
        session.headers["User-Agent"] = "gpulab"
        session.hooks["response"].append(self._note_clock)
        if self.fingerprint is not None:
            session.mount("https://", _Pinned(self.fingerprint))

    @property
    def clock_ahead(self) -> float:
        """Seconds by which the node's clock is ahead of ours, as of the last answer."""
        return self._clock_ahead

    def get(self, *path: str | int, **parameters: Any) -> Any:
        """Read; sent again on 59x, time-outs and broken connections until the retry deadline."""
        return self._read(path, parameters, Patience(self.retry_s))

    def change(
        self,
        method: str,
        *path: str | int,
        task: str = "",
        applied: Callable[[], bool] | None = None,
        **parameters: Any,
    ) -> Any:
        """POST, PUT or DELETE. `task` is the PVE task type that the request starts, when it starts one.

        A request whose reply is lost is looked up among the node's tasks; its UPID is returned when it is there.
        One without a task is asked after by `applied()`: is the change in force? Where neither finds it, it is sent
        again; without both, too: PUT and DELETE of ours say the same twice. A lock is waited for.

        Raises:
            ApiError: PVE refused it, by the subclass that its words stand for.
            ApiUnreachable: no answer within the retry deadline; the change may have been made.
        """
        patience = Patience(self.retry_s)
        since = int(time.time() + self._clock_ahead) - 1
        lost = False

        def done() -> tuple[bool, str | None]:
            """Has a request whose reply was lost been carried out? With its task's UPID, if it has one."""
            if task and (upid := self._begun(task, path, parameters, since, patience)):
                return True, upid
            return (applied is not None and applied()), None

        while True:
            try:
                answer = self._send(method, path, parameters)
            except ApiUnreachable as error:
                lost = lost or error.lost
                for _ in range(LOOKS if error.lost and (task or applied) else 1):
                    if patience.over:
                        raise _unknown(error) if lost else error from None
                    patience.rest()
                    found, upid = done() if lost else (False, None)
                    if found:
                        return upid
            except (AlreadyExists, NotFound, DigestMismatch, Locked) as error:
                # The refusal of a second sending may be the first one's work.
                found, upid = done() if lost else (False, None)
                if found:
                    return upid
                if not isinstance(error, Locked):
                    raise
                if patience.over:
                    raise self._locked(error, path, parameters, patience) from None
                patience.rest()
            else:
                if isinstance(answer, str) and answer.startswith("UPID:"):
                    self._tasks.add(answer)
                return answer

    def run_task(self, method: str, *path: str | int, task: str, deadline_s: float, **parameters: Any) -> None:
        """Send a change that starts a task and wait until the task has ended well.

        Raises:
            Locked: the VM stayed locked, whether the request or its task found out.
            TaskFailed, TaskUnfinished: as `wait`.
        """
        patience = Patience(min(self.retry_s, deadline_s))
        while True:
            answer = self.change(method, *path, task=task, **parameters)
            if answer is None:
                # Some calls are done at once on some versions.
                return
            try:
                self.wait(answer, deadline_s)
                return
            except TaskFailed as error:
                if not error.before_work:
                    raise
                if patience.over:
                    request = self._request(method, path, parameters)
                    refusal = errors.classify(request, 500, error.exitstatus)
                    if not isinstance(refusal, Locked):
                        raise
                    raise self._locked(refusal, path, parameters, patience) from None
                patience.rest()

    def wait(self, upid: str, deadline_s: float) -> None:
        """Wait for a task; a long one shows the last line of its log every few seconds. Its warnings are shown.

        Raises:
            TaskFailed: it ended badly (with the last lines of its log).
            TaskUnfinished: it did not end, or the API did not tell, within `deadline_s` seconds.
        """
        kind = upid.split(":")[5]
        log = _Log(self, upid)
        patience = Patience(deadline_s)
        began = shown = time.monotonic()
        while True:
            try:
                status = self._read((*log.task, "status"), {}, patience)
            except ApiUnreachable as error:
                raise TaskUnfinished(upid, deadline_s, error.brief) from None
            if status["status"] == "stopped":
                break
            now = time.monotonic()
            if now - shown >= PROGRESS_S:
                shown, before = now, log.last
                log.read_on()
                if log.last != before:
                    logger.info(f"{self._prefix}{kind}: {log.last}")
            if now - began >= deadline_s:
                log.read_on()
                raise TaskUnfinished(upid, deadline_s, log.last)
            # Most tasks end within moments.
            time.sleep(POLL_S[0] if now - began < 5 else POLL_S[1])
        result = str(status.get("exitstatus", "no exit status"))
        if result == "OK":
            return
        log.read_on(self.retry_s)
        if not result.startswith("WARNINGS"):
            raise TaskFailed(upid, result, log.lines)
        logger.warning(f"{self._prefix}task {kind} ended with warnings")
        for line in log.warnings() or [result]:
            logger.warning(f"{self._prefix}  {line}")

    def log(self, upid: str) -> list[str]:
        """Every line of a task's log."""
        log = _Log(self, upid)
        log.read_on(self.retry_s)
        return log.lines

    def _read(self, path: tuple[str | int, ...], parameters: dict[str, Any], patience: Patience) -> Any:
        while True:
            try:
                return self._send("GET", path, parameters)
            except ApiUnreachable:
                if patience.over:
                    raise
                patience.rest()

    def _begun(
        self, task: str, path: tuple[str | int, ...], parameters: dict[str, Any], since: int, patience: Patience
    ) -> str | None:
        """The UPID of our own task of that type that began after `since` (the node's clock), if any.

        Ours: of our token, on the same object, and none that an earlier request was given.
        """
        ident = _ident(path, parameters) or str(parameters.get("filename", ""))
        query = {"source": "all", "typefilter": task, "since": since}
        for item in self._read(("nodes", self._node_of(path), "tasks"), query, patience):
            same = ident in ("", str(item.get("id"))) or str(item.get("id")).startswith(f"{ident}-")
            if same and item["upid"] not in self._tasks and (item.get("user"), item.get("tokenid")) == self._owner:
                self._tasks.add(str(item["upid"]))
                return str(item["upid"])
        return None

    def _locked(
        self, error: Locked, path: tuple[str | int, ...], parameters: dict[str, Any], patience: Patience
    ) -> Locked:
        ident = _ident(path, parameters)
        query = {"source": "active", **({"vmid": ident} if ident else {})}
        try:
            tasks = self._send("GET", ("nodes", self._node_of(path), "tasks"), query)
        except GpulabError:
            tasks = []
        # The list of active tasks holds some that have just ended.
        running = [task for task in tasks if "endtime" not in task]
        return errors.locked_by(error, self.node.name, patience.seconds, running, ident)

    def _node_of(self, path: tuple[str | int, ...]) -> str:
        """The node whose task list knows of the request: any node of a cluster answers for the others."""
        return str(path[1]) if path[0] == "nodes" else self.node.name

    def _note_clock(self, response: requests.Response, *_: Any, **__: Any) -> None:
        try:
            there = parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (KeyError, ValueError):
            return
        self._clock_ahead = there - time.time()

    def _request(self, method: str, path: tuple[str | int, ...], parameters: dict[str, Any]) -> Request:
        return Request(self.node.name, method, "/" + "/".join(str(part) for part in path), dict(parameters))

    def _send(self, method: str, path: tuple[str | int, ...], parameters: dict[str, Any]) -> Any:
        self.count()
        resource = self.api(*[[str(part) for part in path]])
        server = f"the API at https://{self.node.api_host}:{self.node.api.port}"
        try:
            match method:
                case "GET":
                    return resource.get(**parameters)
                case "POST":
                    return resource.post(**parameters)
                case "PUT":
                    return resource.put(**parameters)
                case _:
                    return resource.delete(**parameters)
        except ResourceException as error:
            request = self._request(method, path, parameters)
            message = str(error.content).strip()
            if error.status_code in PROXY_ERRORS:
                lost = error.status_code not in NOT_CARRIED_OUT
                brief = f"{self.node.name}: {request.where}: {error.status_code} {message}"
                raise ApiUnreachable(brief, lost=lost) from None
            found = error.errors if isinstance(error.errors, dict) else {}
            raise errors.classify(request, error.status_code, message, found, self.node.api.role) from None
        except requests.exceptions.RequestException as error:
            if isinstance(error, requests.exceptions.SSLError) and _CERTIFICATE.search(str(error)):
                raise self._wrong_certificate(error) from None
            raise ApiUnreachable(
                f"{self.node.name}: {server} does not answer", _reason(error), lost=_may_have_arrived(error)
            ) from None

    def _wrong_certificate(self, error: Exception) -> GpulabError:
        if self.fingerprint is not None:
            return GpulabError(
                f"{self.node.name}: the API's certificate is not the one whose fingerprint is pinned",
                _reason(error),
                f"`pvenode cert info` on {self.node.name}, over SSH or at its console, shows the right one; "
                "if it was renewed on purpose, write that into the node's `api`",
            )
        return GpulabError(
            f"{self.node.name}: the API's certificate does not check against {self.node.ca_file}",
            _reason(error),
            "if the node has a new certificate on purpose, `make bootstrap LAB=…` fetches the CA over SSH again",
        )


def with_digest(read: Callable[[], T], change: Callable[[T], None]) -> None:
    """`change(read())`, where the change sends the digest that was read; anew when somebody else was faster.

    Raises:
        DigestMismatch: somebody was faster each time.
    """
    for left in reversed(range(DIGEST_TRIES)):
        try:
            return change(read())
        except DigestMismatch:
            if not left:
                raise
            time.sleep(PAUSE_S)
    return None


class _Log:
    """A task's log as far as it has been read. That it cannot be read never matters more than its task."""

    _PAGE = 500

    def __init__(self, client: Client, upid: str) -> None:
        self._client = client
        self.task = ("nodes", upid.split(":")[1], "tasks", upid)
        self.lines: list[str] = []

    @property
    def last(self) -> str:
        """The last line that says something, fit for one line of a terminal: no dots of wget's."""
        lines = (re.sub(r"(?:\.{4,}\s*)+", "", line).strip() for line in reversed(self.lines))
        return next((line[:150] for line in lines if line), "")

    def read_on(self, retry_s: float = 0) -> None:
        patience = Patience(retry_s)
        while True:
            query = {"start": len(self.lines), "limit": self._PAGE}
            try:
                page = self._client._read((*self.task, "log"), query, patience)
            except (ApiUnreachable, ApiError):
                return
            # PVE's filler for a log that is still empty.
            page = [entry["t"] for entry in page if entry["t"] != "no content"]
            self.lines += page
            if len(page) < self._PAGE:
                return

    def warnings(self) -> list[str]:
        return [line for line in self.lines if re.match(r"WARN", line)]


class _Pinned(HTTPAdapter):
    """HTTPS to the one server whose certificate has this SHA-256 fingerprint, also through a proxy."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> Any:
        return super().init_poolmanager(*arguments, assert_fingerprint=self._fingerprint, **keywords)

    def proxy_manager_for(self, proxy: Any, **keywords: Any) -> Any:
        return super().proxy_manager_for(proxy, assert_fingerprint=self._fingerprint, **keywords)


def _ident(path: tuple[str | int, ...], parameters: dict[str, Any]) -> str:
    """The VM that a request is about, or ''."""
    below = path[2:] if path[0] == "nodes" else path
    return str(parameters.get("vmid") or next((part for part in map(str, below) if part.isdigit()), ""))


def _may_have_arrived(error: requests.exceptions.RequestException) -> bool:
    """Can the request have reached the server? Not when there never was a connection."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return False
    return "NewConnectionError" not in str(error) and "NameResolutionError" not in repr(error)


def _unknown(error: ApiUnreachable) -> ApiUnreachable:
    details = "\n".join(filter(None, (error.details, "The answer to a change was lost: it may have been made.")))
    return ApiUnreachable(error.brief, details, "deploy again: it reads first what is there", error.lost)


def _reason(error: Exception) -> str:
    """The innermost sentence of a network error, without object addresses."""
    while error.__context__ is not None and not isinstance(error, OSError):
        if not isinstance(error.__context__, Exception):
            break
        error = error.__context__
    text = re.sub(r"<[^>]*object at 0x[0-9a-f]+>:? ?", "", str(error))
    return text.rpartition("Caused by ")[2][:300]
