# SPDX-License-Identifier: MIT
"""A thin client over proxmoxer: retries that are safe, tasks with a deadline, errors that say what to do.

The API answers 59x while a node is busy, and a reply can be lost after the change was made. A GET is simply sent
again. A change is sent again only after the node's task list showed that it has not begun.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import requests
from proxmoxer import ProxmoxAPI
from proxmoxer.core import ResourceException
from pyinfra.api import Host

from inventory import GpulabError, Node
from inventory.secrets import Secrets, variable

#: pveproxy's own errors: it could not reach the daemon behind it (pve-http-server, AnyEvent.pm).
PROXY_ERRORS = range(595, 600)
#: Seconds between two tries and between two looks at a task.
INTERVAL_S = 1.0
#: Seconds for which an unanswered request is tried again.
RETRY_S = 60.0


class ApiError(GpulabError):
    """The API refused a request; `status` is its HTTP status, `message` its own sentence."""

    def __init__(self, status: int, message: str, brief: str, details: str = "", resolution: str = "") -> None:
        self.status = status
        self.message = message
        super().__init__(brief, details, resolution)


class ApiUnreachable(GpulabError):
    """No usable answer within the deadline."""


class Client:
    """The API of one node, with the lab's token. Every HTTP request counts for `host`, when one is given."""

    def __init__(self, node: Node, retry_s: float = RETRY_S, host: Host | None = None) -> None:
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
        if not node.ca_file.is_file():
            raise GpulabError(
                f"{node.name}: no CA certificate to check the API with",
                f"Expected {node.ca_file}.",
                "make bootstrap LAB=… fetches it over SSH from /etc/pve/pve-root-ca.pem",
            )
        self.node = node
        self.retry_s = retry_s
        # Hosts of other connectors than ours count nothing.
        self.count: Callable[[], None] = getattr(getattr(host, "connector", None), "count_request", lambda: None)
        self.api = ProxmoxAPI(
            node.api_host,
            port=node.api.port,
            user=user,
            token_name=token_name,
            token_value=value,
            verify_ssl=str(node.ca_file),
            timeout=node.api.timeout_s,
        )

    def get(self, *path: str | int, **parameters: Any) -> Any:
        """Read; sent again on 59x, time-outs and broken connections until the retry deadline."""
        deadline = time.monotonic() + self.retry_s
        while True:
            try:
                return self._send("GET", path, parameters)
            except ApiUnreachable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(INTERVAL_S)

    def change(self, method: str, *path: str | int, task: str = "", **parameters: Any) -> Any:
        """POST, PUT or DELETE. `task` is the PVE task type that the request starts, when it starts one.

        A request whose reply is lost is looked up among the node's tasks; its UPID is returned when it is there.
        A lost reply to a request without task is sent again: PUT and DELETE of ours say the same twice.
        """
        deadline = time.monotonic() + self.retry_s
        since = int(time.time()) - 1
        while True:
            try:
                return self._send(method, path, parameters)
            except ApiUnreachable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(INTERVAL_S)
                if task and (upid := self._begun(task, path, parameters, since)):
                    return upid

    def run_task(self, method: str, *path: str | int, task: str, deadline_s: float, **parameters: Any) -> None:
        """Send a change that starts a task and wait until the task has ended well."""
        self.wait(self.change(method, *path, task=task, **parameters), deadline_s)

    def wait(self, upid: str, deadline_s: float) -> None:
        """Wait for a task.

        Raises:
            GpulabError: it ended badly (with the last lines of its log) or not within `deadline_s` seconds.
        """
        node, kind = upid.split(":")[1], upid.split(":")[5]
        began = time.monotonic()
        while True:
            status = self.get("nodes", node, "tasks", upid, "status")
            if status["status"] == "stopped":
                break
            elapsed = time.monotonic() - began
            if elapsed >= deadline_s:
                raise GpulabError(
                    f"{node}: task {kind} has not ended after {deadline_s:.0f} s",
                    f"Task: {upid}",
                    "it may still end; look at it in the node's task list, then deploy again",
                )
            # Most tasks end within moments.
            time.sleep(0.3 if elapsed < 5 else INTERVAL_S)
        result = str(status.get("exitstatus", "no exit status"))
        if result != "OK" and not result.startswith("WARNINGS"):
            log = self.get("nodes", node, "tasks", upid, "log", limit=500)
            tail = [entry["t"] for entry in log][-5:]
            raise GpulabError(f"{node}: task {kind} failed: {result}", "\n".join(f"  {line}" for line in tail))

    def _begun(self, task: str, path: tuple[str | int, ...], parameters: dict[str, Any], since: int) -> str | None:
        """The UPID of our own task of that type that began after `since` (seconds since the epoch), if any."""
        vmid = parameters.get("vmid") or next((str(part) for part in path if str(part).isdigit()), None)
        tasks = self.get("nodes", self.node.name, "tasks", source="all", typefilter=task, since=since)
        ours = [item for item in tasks if vmid is None or str(item.get("id")) == str(vmid)]
        return str(ours[0]["upid"]) if ours else None

    def _send(self, method: str, path: tuple[str | int, ...], parameters: dict[str, Any]) -> Any:
        self.count()
        resource = self.api(*[[str(part) for part in path]])
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
            raise self._refused(method, path, error) from None
        except requests.exceptions.SSLError as error:
            raise GpulabError(
                f"{self.node.name}: the API's certificate does not check against {self.node.ca_file}",
                _reason(error),
                "if the node has a new certificate on purpose, `make bootstrap LAB=…` fetches the CA over SSH again",
            ) from None
        except requests.exceptions.RequestException as error:
            raise ApiUnreachable(
                f"{self.node.name}: the API at https://{self.node.api_host}:{self.node.api.port} does not answer",
                _reason(error),
            ) from None

    def _refused(self, method: str, path: tuple[str | int, ...], error: ResourceException) -> GpulabError:
        where = f"{method} /{'/'.join(str(part) for part in path)}"
        message = str(error.content).strip()
        brief = f"{self.node.name}: {where}: {error.status_code} {message}"
        if error.status_code in PROXY_ERRORS:
            return ApiUnreachable(brief)
        if error.status_code == 401:
            return ApiError(
                401,
                message,
                f"{self.node.name}: the API refuses the token ({message})",
                resolution="make bootstrap LAB=… makes a new one",
            )
        privilege = re.search(r"Permission check failed(?: \((?P<path>[^,]+), (?P<privilege>[^)]+)\))?", message)
        if error.status_code == 403 and privilege:
            missing = privilege["privilege"] or "a privilege that PVE does not name"
            return ApiError(
                403,
                message,
                f"{self.node.name}: the API token lacks {missing} on {privilege['path'] or 'an unnamed path'}",
                where,
                f"make bootstrap LAB=… gives the role {self.node.api.role} what this version of gpulab needs",
            )
        errors = error.errors if isinstance(error.errors, dict) else {}
        details = "\n".join(f"  {key}: {str(text).strip()}" for key, text in errors.items() if key != "errors")
        return ApiError(error.status_code, message, brief, details)


def _reason(error: Exception) -> str:
    """The innermost sentence of a network error, without object addresses."""
    while error.__context__ is not None and not isinstance(error, OSError):
        if not isinstance(error.__context__, Exception):
            break
        error = error.__context__
    text = re.sub(r"<[^>]*object at 0x[0-9a-f]+>:? ?", "", str(error))
    return text.rpartition("Caused by ")[2][:300]
