# SPDX-License-Identifier: MIT
"""The HTTPS front of one node: authentication, permissions, our own endpoints, and fakepve for the rest."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import ssl
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from rehearsal.ca import Issued
from rehearsal.pve import access
from rehearsal.pve.accounts import AccountsApi
from rehearsal.pve.backup import BackupApi
from rehearsal.pve.cluster import ClusterApi
from rehearsal.pve.errors import ApiError, TaskError, no_permission
from rehearsal.pve.faults import Faults
from rehearsal.pve.jobs import JobsApi
from rehearsal.pve.mapping import MappingApi
from rehearsal.pve.power import Hardware, Power
from rehearsal.pve.qemu import QemuApi
from rehearsal.pve.routing import Call, Route, Value, compile_template
from rehearsal.pve.running import RunningApi
from rehearsal.pve.state import Store
from rehearsal.pve.storage import StorageApi
from rehearsal.pve.tasks import LOCK_WAIT, Tasks
from rehearsal.pve.upstream import Upstream

_FORMATS = ("/api2/json", "/api2/extjs")
_BODY_MAX = 64 * 1024**2
# The node's own commands (pveum, qm) speak for root@pam with this, a secret only the node's root can read.
NODE_SCHEME = "LabRoot "
# What the nodes of a cluster have in common.
_SHARED = ("users", "roles", "acl", "mappings", "backup_jobs")


@dataclass
class Secrets:
    """`password` logs root@pam in; `node` authenticates the node's own commands."""

    password: str
    node: str


@dataclass
class Emulator:
    """All parts of one node's API on one store. `folder` keeps the files of its storages."""

    store: Store
    power: Power
    hardware: Hardware
    certificate: Issued
    folder: Path
    secrets: Secrets
    lock_wait: float = LOCK_WAIT
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        self.tasks = Tasks(self.store, self.lock_wait)
        self.storage = StorageApi(self.store, self.tasks, self.power, self.folder)
        self.qemu = QemuApi(self.store, self.tasks, self.storage, self.power)
        self.mappings = MappingApi(self.store, self.hardware)
        self.running = RunningApi(self.store, self.tasks, self.storage, self.qemu, self.mappings, self.power)
        self.qemu.start_vm = self.running.start_vm
        self.backup = BackupApi(self.store, self.tasks, self.storage, self.qemu, self.running, self.power)
        self.qemu.restore = self.backup.restore
        self.jobs = JobsApi(self.store)
        self.cluster = ClusterApi(
            self.store, self.tasks, self.storage, self.qemu, self.running, self.power, self.certificate.certificate
        )
        self.accounts = AccountsApi(self.store, self.secrets.password)
        parts = (
            self.storage,
            self.qemu,
            self.mappings,
            self.running,
            self.backup,
            self.jobs,
            self.cluster,
            self.accounts,
        )
        self.routes = [(route, compile_template(route.template)) for part in parts for route in part.routes()]
        self.running.hold_again()
        self.backup.thaw_left()

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route of ours for a path, with the path's parameters."""
        for route, pattern in self.routes:
            match = pattern.fullmatch(path) if route.method == method else None
            if match is not None:
                return route, match.groupdict()
        return None


class Front:
    """Serves an emulator over HTTPS, and passes on what is about another node of its cluster.

    `peers`: those nodes. `offline`: names of nodes that cannot be reached.
    """

    def __init__(self, emulator: Emulator, upstream: Upstream, peers: Sequence[Emulator] = ()) -> None:
        self.emulator = emulator
        self.peers = {peer.store.state.node: peer for peer in peers}
        self.offline: set[str] = set()
        stores = [emulator.store, *(peer.store for peer in peers)]
        for store in stores:
            store.peers = [other for other in stores if other is not store]
        self._upstream = upstream
        self._runner: web.AppRunner | None = None
        # Handlers that wait for guests must not starve the others.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="api")
        # (method, path) of every request, for tests.
        self.requests: list[tuple[str, str]] = []

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses for 0."""
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.emulator.certificate.certificate, self.emulator.certificate.key)
        # A lab of several fronts restarts on the same port: the old connections may still linger.
        await web.TCPSite(self._runner, host, port, ssl_context=context, reuse_address=True).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await self._upstream.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, request: web.Request) -> web.Response:
        path = _api_path(request)
        if path is None:
            return _error(ApiError(501, f"Method '{request.method} {request.path}' not implemented"))
        self.requests.append((request.method, path))
        fault = self.emulator.faults.take(request.method, path)
        if fault is not None and fault.status and not fault.carried_out:
            return web.Response(status=fault.status, reason=fault.reason)
        response = await self._answer(request, path)
        if fault is not None and fault.status:
            return web.Response(status=fault.status, reason=fault.reason)
        if fault is not None and request.transport is not None:
            # The request was carried out, and nobody hears of it.
            request.transport.close()
        return response

    async def _answer(self, request: web.Request, path: str) -> web.Response:
        body = await request.read()
        try:
            if path == "/access/ticket" and request.method == "POST":
                form = _parameters(request, body)
                return _ok(self.emulator.accounts.login(str(form.get("username", "")), str(form.get("password", ""))))
            user = self._authenticate(request)
            return await self._dispatch(request, path, user, body)
        except ApiError as error:
            return _error(error)
        except TaskError as error:
            return _error(ApiError(500, str(error)))
        except Exception as error:
            logging.getLogger(__name__).exception("%s %s", request.method, path)
            return _error(ApiError(500, f"rehearsal: {type(error).__name__}: {error}"))

    def _authenticate(self, request: web.Request) -> str:
        header = request.headers.get("Authorization", "")
        state = self.emulator.store.state
        if header.startswith("PVEAPIToken="):
            return access.authenticate(state, header.removeprefix("PVEAPIToken="))
        if header.startswith(NODE_SCHEME):
            given = header.removeprefix(NODE_SCHEME)
            if not hmac.compare_digest(given.encode(), self.emulator.secrets.node.encode()):
                raise ApiError(401, "Authentication failed!")
            return access.ROOT
        ticket = request.cookies.get("PVEAuthCookie")
        if ticket is None:
            raise ApiError(401, "No ticket")
        csrf = request.headers.get("CSRFPreventionToken", "")
        writes = request.method not in ("GET", "HEAD")
        return self.emulator.accounts.ticket_user(urllib.parse.unquote(ticket), csrf, writes)

    async def _dispatch(self, request: web.Request, path: str, user: str, body: bytes) -> web.Response:
        parameters: dict[str, Value] = _parameters(request, body)
        emulator = self._node_of(path, parameters)
        if emulator is None:
            return web.Response(status=595, reason="No route to host")
        node = emulator.store.state.node
        found = emulator.find(request.method, path)
        if found is None or found[1].get("node", node) not in (node, "localhost"):
            return await self._pass_on(request, path, user, body)
        route, of_path = found
        call = Call(request.method, path, user, {**parameters, **of_path})
        if route.guard is not None:
            route.guard(emulator.store, call)
        refusal = await self._verified(request, path, body)
        if refusal is not None:
            return refusal
        return _ok(await asyncio.get_running_loop().run_in_executor(self._threads, self._handle, emulator, route, call))

    def _node_of(self, path: str, parameters: Mapping[str, Value]) -> Emulator | None:
        """The node that answers, None when it cannot be reached."""
        segments = path.split("/")
        name = segments[2] if segments[1:2] == ["nodes"] and len(segments) > 2 else parameters.get("check-node")
        if name in self.offline:
            return None
        peer = self.peers.get(str(name))
        if peer is None:
            return self.emulator
        for shared in _SHARED:
            setattr(peer.store.state, shared, getattr(self.emulator.store.state, shared))
        return peer

    @staticmethod
    def _handle(emulator: Emulator, route: Route, call: Call) -> Any:
        if route.unlocked:
            return route.handler(call)
        with emulator.store.lock:
            data = route.handler(call)
            if call.method != "GET":
                emulator.store.save()
            return data

    async def _verified(self, request: web.Request, path: str, body: bytes) -> web.Response | None:
        """fakepve's refusal of the parameters, if it has one."""
        status, reason, answer = await self._upstream.ask(
            request.method, path, request.query_string, body, request.content_type, verify_only=True
        )
        return _relay(status, reason, answer) if status == 400 else None

    async def _pass_on(self, request: web.Request, path: str, user: str, body: bytes) -> web.Response:
        """An endpoint fakepve answers alone. It knows no users of ours, so only administrators get through."""
        state = self.emulator.store.state
        privilege = "Sys.Audit" if request.method == "GET" else "Sys.Modify"
        if not access.may(state, user, "/", privilege):
            no_permission(f"/, {privilege}")
        segments = path.split("/")
        foreign = len(segments) > 2 and segments[1] == "nodes" and segments[2] not in (state.node, "localhost")
        if foreign:
            raise ApiError(
                500,
                f"hostname lookup '{segments[2]}' failed - failed to get address info for: {segments[2]}: "
                "Name or service not known",
            )
        status, reason, answer = await self._upstream.ask(
            request.method, path, request.query_string, body, request.content_type, verify_only=False
        )
        if status in (404, 405, 501):
            raise ApiError(501, f"Method '{request.method} {path}' not implemented")
        return _relay(status, reason, answer)


def _api_path(request: web.Request) -> str | None:
    raw = request.rel_url.raw_path
    for prefix in _FORMATS:
        if raw.startswith(f"{prefix}/"):
            return urllib.parse.unquote(raw.removeprefix(prefix))
    return None


def _parameters(request: web.Request, body: bytes) -> dict[str, Value]:
    """Query and body together; a repeated name is an array."""
    pairs = list(request.query.items())
    collected: dict[str, Value] = {}
    if body and request.content_type == "application/json":
        data = json.loads(body)
        if isinstance(data, Mapping):
            for key, value in data.items():
                collected[key] = [_text(item) for item in value] if isinstance(value, list) else _text(value)
    elif body:
        pairs += urllib.parse.parse_qsl(body.decode(), keep_blank_values=True)
    for key, value in pairs:
        known = collected.get(key)
        if known is None:
            collected[key] = value
        else:
            collected[key] = [*known, value] if isinstance(known, list) else [known, value]
    return collected


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _ok(data: object) -> web.Response:
    return web.json_response({"data": data})


def _error(error: ApiError) -> web.Response:
    reason = error.message.splitlines()[0]
    if error.status == 401:
        # PVE sends no body with these.
        return web.Response(status=401, reason=reason)
    body: dict[str, Any] = {"data": None, "message": f"{error.message}\n"}
    if error.errors:
        body["errors"] = error.errors
    return web.json_response(body, status=error.status, reason=reason)


def _relay(status: int, reason: str, body: bytes) -> web.Response:
    return web.Response(status=status, reason=reason, body=body, content_type="application/json")
