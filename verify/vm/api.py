# SPDX-License-Identifier: MIT
"""Reads the Proxmox API with the lab's token; the certificate is checked against the cluster's own CA."""

from __future__ import annotations

import re
import threading
from typing import Any

import requests
from proxmoxer import ProxmoxAPI
from proxmoxer.core import ResourceException
from requests.adapters import HTTPAdapter

from inventory import GpulabError, Guest, Node
from inventory.secrets import Secrets, variable
from verify.hosts import Unreadable

#: Seconds for one answer.
TIMEOUT_S = 10


class Api:
    """The API of one node. The first refusal that concerns all requests is remembered, and no more are sent."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._client: ProxmoxAPI | None = None
        self._answer: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def reach(self) -> dict[str, Any]:
        """Does the API answer with the lab's token? `version`, or `error` with the reason and a short `state`."""
        with self._lock:
            if self._answer is None:
                self._answer = self._reach()
            return self._answer

    def read_node(self) -> dict[str, Any]:
        """`reach()`, and as `vms` all VMs of the node: id, name and tags; none when the API is not reached.

        Raises:
            Unreadable: the list is refused.
        """
        found = self.reach()
        listed = [] if found["error"] else self._get("nodes", self.node.name, "qemu") or []
        vms = [{"id": int(vm["vmid"]), "name": vm.get("name", ""), "tags": str(vm.get("tags", ""))} for vm in listed]
        return {**found, "vms": sorted(vms, key=lambda vm: vm["id"])}

    def read_vm(self, guest: Guest) -> dict[str, Any]:
        """The guest's VM as the API shows it now, what is pending, why its agent does not answer (empty: it does, None:
        the VM does not run), and the mapping of its GPU.

        Raises:
            Unreadable: the API does not answer, refuses the token or lacks a privilege.
        """
        found = self.reach()
        if found["error"]:
            raise Unreadable(found["state"])
        where = ("nodes", self.node.name, "qemu", str(guest.vmid))
        config = self._get(*where, "config", absent="does not exist", current=1)
        if config is None:
            return {"exists": False}
        mapping = self._get("cluster", "mapping", "pci", guest.gpu, absent="") if guest.gpu else None
        status = self._get(*where, "status", "current")["status"]
        return {
            "exists": True,
            "config": config,
            "status": status,
            "agent": self._ping(*where) if status == "running" else None,
            "pending": [
                item["key"] for item in self._get(*where, "pending") if "pending" in item or item.get("delete")
            ],
            "mapping": mapping["map"] if mapping else None,
        }

    def _reach(self) -> dict[str, Any]:
        node = self.node
        where = f"https://{node.api_host}:{node.api.port}"
        try:
            token = Secrets(node.state).get(node.cluster_name, "api_token")
        except GpulabError as error:
            return refused(error.brief, f"{node.name}: the token cannot be read")
        found = re.fullmatch(r"(?P<user>[^!]+)!(?P<name>[^=]+)=(?P<value>.+)", token or "")
        if found is None:
            reason = "has the wrong form" if token else "is missing"
            place = f"{node.state / 'secrets.json'} and {variable(node.cluster_name, 'api_token')}"
            return refused(f"{node.name}: the API token {reason}; looked in {place}", "there is no API token")
        pinned = node.api.fingerprint
        if pinned is None and not node.ca_file.is_file():
            return refused(
                f"{node.name}: no CA certificate {node.ca_file} to check the API with", "there is no CA file"
            )
        self._client = ProxmoxAPI(
            node.api_host,
            port=node.api.port,
            user=found["user"],
            token_name=found["name"],
            token_value=found["value"],
            # With a fingerprint the adapter below checks the certificate, before anything is sent.
            verify_ssl=str(node.ca_file) if pinned is None else False,
            timeout=TIMEOUT_S,
        )
        if pinned is not None:
            self._client._store["session"].mount("https://", Pinned(pinned))
        try:
            version = self._client("version").get()
        except ResourceException as error:
            if error.status_code == 401:
                reason = f"{node.name}: {where} refuses the token {found['user']}!{found['name']}: {error.content}"
                return refused(reason.strip(), f"the API of {node.name} refuses the token")
            reason = f"{node.name}: {where}: {error.status_code} {error.content}"
            return refused(reason.strip(), f"the API of {node.name} does not answer")
        except requests.exceptions.SSLError:
            return refused(
                f"{node.name}: the certificate of {where} does not check against {pinned or node.ca_file}",
                f"the certificate of {node.name} is not the cluster's",
            )
        except requests.exceptions.RequestException as error:
            kind = "no answer in time" if isinstance(error, requests.exceptions.Timeout) else "no connection"
            return refused(f"{node.name}: {where}: {kind}", f"the API of {node.name} does not answer")
        simulated = ["the API"] if "simulated" in str(version).lower() else []
        return {"error": "", "state": "", "version": version["version"], "simulated": simulated}

    def _ping(self, *where: str) -> str:
        """What PVE says against a ping of the VM's agent; empty: it answered."""
        if self._client is None:
            raise Unreadable(f"the API of {self.node.name} was not reached")
        try:
            self._client([*where, "agent", "ping"]).post()
        except ResourceException as error:
            return f"{error.status_code} {error.content or error.status_message}".strip()
        except requests.exceptions.RequestException:
            return "no answer"
        return ""

    def _get(self, *path: str, absent: str | None = None, **parameters: Any) -> Any:
        """One GET. None when PVE says by 404, or by 500 with the words `absent`, that there is no such thing."""
        if self._client is None:
            raise Unreadable(f"the API of {self.node.name} was not reached")
        try:
            return self._client(list(path)).get(**parameters)
        except ResourceException as error:
            gone = error.status_code == 404 or (error.status_code == 500 and (absent or "") in str(error.content))
            if absent is not None and gone:
                return None
            what = f"GET /{'/'.join(path)}: {error.status_code} {error.content}"
            raise Unreadable(f"{self.node.name}: {what}".strip()) from None
        except requests.exceptions.RequestException:
            raise Unreadable(f"{self.node.name}: GET /{'/'.join(path)}: no answer") from None


class Pinned(HTTPAdapter):
    """HTTPS to the one server whose certificate has this SHA-256 fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> Any:
        return super().init_poolmanager(*arguments, assert_fingerprint=self._fingerprint, **keywords)


def refused(error: str, state: str) -> dict[str, Any]:
    """An API that cannot be used: the whole reason, and a short one for the checks that depend on it."""
    return {"error": error, "state": state, "version": None}


def options(value: str) -> dict[str, str]:
    """`a,b=1` of a VM's configuration as a mapping; a bare word stands under the empty key. on is 1, off is 0."""
    words = {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"}
    found = {}
    for part in value.split(","):
        key, separator, text = part.partition("=")
        if not separator:
            key, text = "", key
        found[key] = words.get(text, text)
    return found


def size_gib(volume: str) -> float | None:
    """The size that PVE states for a volume (`…,size=64G`), GiB; None when it states none."""
    found = re.search(r"(?:^|,)size=([0-9]+)([KMGT])(?:,|$)", volume)
    return int(found[1]) * {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}[found[2]] if found else None


def cpus(text: str) -> set[int]:
    """The numbers of a list of CPUs, `0-3,6`."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
