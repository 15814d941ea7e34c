# SPDX-License-Identifier: MIT
"""The front with VMs that only exist in memory, for tests of whatever talks to the API."""

from __future__ import annotations

import asyncio
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import proxmoxer
from aiohttp import web

from rehearsal import ca
from rehearsal.pve import vmconfig
from rehearsal.pve.access import digest_of
from rehearsal.pve.errors import Killed, TaskError
from rehearsal.pve.faults import TaskTrouble, Trouble
from rehearsal.pve.front import Emulator, Front, Secrets, _parameters
from rehearsal.pve.power import GuestStart, MemoryHardware, MemoryPower
from rehearsal.pve.routing import Value
from rehearsal.pve.state import GIB, Acl, Archive, Archived, NodeState, Storage, Store, Token, User, Vm, Volume
from rehearsal.pve.tasks import Body, Log
from rehearsal.pve.upstream import FakepveProcess, Upstream

# Waiting for the front's own thread, never for a test's subject.
_START_TIMEOUT = 60.0
_LOCK_WAIT = 0.5

# The smallest role for everything the tool does with a token, as (path, privileges).
OPERATOR: tuple[tuple[str, str], ...] = (
    (
        "/vms",
        "VM.Allocate VM.Audit VM.PowerMgmt VM.Backup VM.Config.CPU VM.Config.Memory VM.Config.Disk "
        "VM.Config.HWType VM.Config.Options VM.Config.Network VM.Config.Cloudinit VM.Config.CDROM "
        "VM.GuestAgent.Audit VM.GuestAgent.FileRead VM.GuestAgent.Unrestricted",
    ),
    ("/storage", "Datastore.AllocateSpace Datastore.AllocateTemplate Datastore.Audit"),
    ("/nodes", "Sys.Audit Sys.AccessNetwork"),
    ("/mapping/pci", "Mapping.Use Mapping.Modify Mapping.Audit"),
    ("/sdn/zones/localnetwork", "SDN.Use"),
)


@dataclass(frozen=True)
class Exchange:
    """One request and what became of it. `agent`: the User-Agent that sent it."""

    method: str
    path: str
    parameters: Mapping[str, Value]
    agent: str
    status: int


class _TroubledFront(Front):
    """The front as its callers meet it on a bad day; it also remembers what it was asked."""

    def __init__(self, emulator: Emulator, upstream: Upstream, peers: Sequence[Emulator] = ()) -> None:
        super().__init__(emulator, upstream, peers)
        self.exchanges: list[Exchange] = []

    async def _answer(self, request: web.Request, path: str) -> web.Response:
        trouble = self.emulator.faults.take_trouble(request.method, path)
        if trouble is not None and trouble.hang_up and request.transport is not None:
            request.transport.close()
            return web.Response()
        if trouble is not None and trouble.meanwhile is not None:
            await asyncio.get_running_loop().run_in_executor(None, trouble.meanwhile)
        response = await super()._answer(request, path)
        parameters = _parameters(request, await request.read())
        agent = request.headers.get("User-Agent", "")
        self.exchanges.append(Exchange(request.method, path, parameters, agent, response.status))
        if trouble is not None and trouble.delay:
            await asyncio.sleep(trouble.delay)
        return response


def _with_trouble(body: Body, trouble: TaskTrouble) -> Body:
    def troubled(log: Log) -> None:
        for line in trouble.log:
            log(line)
        if trouble.after:
            body(_interrupted(log, trouble))
            return
        if trouble.status:
            raise TaskError(trouble.status)
        if not trouble.warnings:
            trouble.released.wait()
        body(log)
        for line in trouble.warnings:
            log(line)
        if trouble.warnings:
            raise TaskError(f"WARNINGS: {len(trouble.warnings)}")

    return troubled


def _interrupted(log: Log, trouble: TaskTrouble) -> Log:
    """A log that the trouble comes from once its line is written."""
    waiting = [trouble.after]

    def watched(line: str) -> None:
        log(line)
        if not waiting or waiting[0] not in line:
            return
        waiting.clear()
        if trouble.killed:
            raise Killed
        if trouble.status:
            raise TaskError(trouble.status)
        trouble.released.wait()

    return watched


class FakeLab:
    """One node's API on a loopback port.

    Use it in `with`: `host`, `port`, `url`, `ca` (PEM path), `user`, `token_name`, `token` then say how to get in;
    the token holds `OPERATOR`. `power` and `hardware` are in memory and may be changed at any time; so may
    `state`, under `lock`.
    """

    user = "gpulab@pve"
    token_name = "deploy"

    def __init__(self, node: str = "pve1", release: str = "9.1.1", others: Sequence[str] = ()) -> None:
        self.node = node
        #: The other nodes of its cluster; they are reached through this one.
        self.others = {name: MemoryPower() for name in others}
        self.host = "127.0.0.1"
        self.port = 0
        self.power = MemoryPower()
        self.hardware = MemoryHardware()
        self.root_password = "rehearsal"
        self._release = release
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    def __enter__(self) -> FakeLab:
        self.folder = Path(tempfile.mkdtemp(prefix="gpulab-pve-"))
        authority = ca.authority(self.folder / "ca")
        self.ca = authority.certificate
        self._fakepve = FakepveProcess(self.folder, authority)
        self._authority = authority
        self._thread = threading.Thread(target=self._serve, daemon=True, name="fake-lab")
        self._thread.start()
        if not self._ready.wait(_START_TIMEOUT) or self._failure is not None:
            self._fakepve.stop()
            raise RuntimeError("the front did not start") from self._failure
        self.token = self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._front.stop(), self._loop).result(_START_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_TIMEOUT)
        self._loop.close()
        self._fakepve.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    @property
    def state(self) -> NodeState:
        return self.emulator.store.state

    def at(self, node: str) -> NodeState:
        """The state of any node of the cluster."""
        return next(state for state in self.emulator.store.cluster() if state.node == node)

    @property
    def offline(self) -> set[str]:
        """Names of other nodes of the cluster that cannot be reached."""
        return self._front.offline

    @property
    def lock(self) -> threading.RLock:
        return self.emulator.store.lock

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path) of every request so far, the path without /api2/json."""
        return self._front.requests

    @property
    def calls(self) -> list[Exchange]:
        """Every request since this lab began that was looked at, with its parameters and its answer's status."""
        return self._front.exchanges

    @property
    def node_secret(self) -> str:
        """What the node's own commands authenticate with."""
        return self.emulator.secrets.node

    def reset(self) -> str:
        """Back to a fresh node with one operator token, whose secret is returned (and kept as `token`)."""
        self.power.start_gate.set()
        self.emulator.faults.clear()
        self.emulator.tasks.join(_START_TIMEOUT)
        self._front.requests.clear()
        for vmid in list(self.power.started):
            self.power.stop(vmid)
        self.power.__dict__.update(MemoryPower().__dict__)
        self.hardware.__dict__.update(MemoryHardware().__dict__)
        self._front.offline.clear()
        for name, peer in self._front.peers.items():
            peer.tasks.join(_START_TIMEOUT)
            self.others[name].__dict__.update(MemoryPower().__dict__)
            peer.store.state = NodeState(node=name, release=self._release, next_pid=peer.store.state.next_pid)
        with self.lock:
            # Pids go on counting: a task of an earlier test must not come back under its UPID.
            fresh = NodeState(node=self.node, release=self._release, next_pid=self.state.next_pid)
            self.emulator.store.state = fresh
        self.token = self.add_token(self.user, self.token_name, privsep=False)
        for path, privileges in OPERATOR:
            self.grant(self.user, path, privileges)
        return self.token

    # How to talk to it.

    def api(self, token: str | None = None, user: str = "", name: str = "", timeout: float = 10.0) -> Any:
        """proxmoxer with the operator's token, or with the one given."""
        return proxmoxer.ProxmoxAPI(
            self.host,
            port=self.port,
            user=user or self.user,
            token_name=name or self.token_name,
            token_value=token or self.token,
            verify_ssl=str(self.ca),
            timeout=timeout,
        )

    def root(self) -> Any:
        """proxmoxer with a root@pam ticket."""
        return proxmoxer.ProxmoxAPI(
            self.host,
            port=self.port,
            user="root@pam",
            password=self.root_password,
            verify_ssl=str(self.ca),
            timeout=10,
        )

    def wait(self, upid: str) -> str:
        """The exit status of a task, once it has ended."""
        self.emulator.tasks.join(_START_TIMEOUT)
        return self.emulator.tasks.find(upid).exitstatus or "running"

    # Changing the node behind the API's back.

    def add_token(self, user: str, name: str, *, privsep: bool = True) -> str:
        """A token (and its user, when there is none); returns the secret. It may do nothing yet."""
        secret = f"{user}-{name}-secret"
        with self.lock:
            known = self.state.users.setdefault(user, User())
            known.tokens[name] = Token(digest=digest_of(secret), privsep=privsep)
        return secret

    def grant(self, who: str, path: str, privileges: str) -> None:
        """Give a user or a token (`user!name`) these privileges on a path and below, by a role of its own."""
        role = f"{who}-{path}".replace("/", "-").replace("@", "-").replace("!", "-")
        with self.lock:
            known = self.state.release.startswith("8.")
            wanted = [p for p in privileges.split() if not (known and p.startswith("VM.GuestAgent"))]
            self.state.roles[role] = wanted + (["VM.Monitor"] if known and path.startswith("/vms") else [])
            kind = "token" if "!" in who else "user"
            self.state.acl = [e for e in self.state.acl if (e.path, e.who) != (path, who)]
            self.state.acl.append(Acl(path=path, kind=kind, who=who, role=role))

    def take_away(self, privilege: str) -> None:
        """Remove one privilege from every role of the operator."""
        with self.lock:
            for name, privileges in self.state.roles.items():
                self.state.roles[name] = [known for known in privileges if known != privilege]

    def revoke_token(self, user: str = "", name: str = "") -> None:
        """The token is gone: 401 from now on."""
        with self.lock:
            del self.state.users[user or self.user].tokens[name or self.token_name]

    def add_image(self, filename: str = "debian-13.qcow2", size: int = 3 * GIB, storage: str = "local") -> str:
        """An image ready to import, of this virtual size in bytes; returns its volume id."""
        path = self.folder / "storage" / storage / "import" / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"QFI\xfb" + struct.pack(">IQIIQ", 3, 0, 0, 16, size) + bytes(480))
        volume = Volume(
            storage=storage,
            name=f"import/{filename}",
            content="import",
            format="qcow2",
            size=path.stat().st_size,
            ctime=1_700_000_000,
        )
        with self.lock:
            self.state.volumes.append(volume)
        return volume.volid

    def add_vm(self, vmid: int, running: bool = False, **config: str | int) -> None:
        """A VM that is there already, with this configuration; volumes it names are made."""
        with self.lock:
            self.state.vms[vmid] = Vm(vmid=vmid, config=dict(config))
            for volid in vmconfig.volumes(config):
                storage, _, name = volid.partition(":")
                self.state.volumes.append(
                    Volume(
                        storage=storage,
                        name=name,
                        content="images",
                        format="raw",
                        size=32 * GIB,
                        ctime=1_700_000_000,
                        vmid=vmid,
                    )
                )
        if running:
            self.power.start(
                GuestStart(
                    node=self.node,
                    vmid=vmid,
                    name=str(config.get("name", "")),
                    system=None,
                    data=[],
                    seed={},
                    address="",
                    gateway="",
                    gpus=[],
                    memory_mib=512,
                    agent=vmconfig.agent_enabled(config),
                )
            )
            self.emulator.running.hold_again()

    def add_backup(
        self, vmid: int, ctime: int, *, notes: str = "", protected: bool = False, storage: str = "local", **config: Any
    ) -> str:
        """A backup of a VM that was made at this Unix time; returns its volume id.

        Without `config` it holds the VM as it is now, its drives included; with it, only that configuration.
        """
        with self.lock:
            kept = config or {k: v for k, v in self.state.vms[vmid].config.items() if k != "lock"}
            drives = {}
            for key, (volid, _) in vmconfig.disks({} if config else kept).items():
                volume = self.emulator.storage.find(volid)
                if volume is not None:
                    drives[key] = Archived(
                        volid=volid,
                        storage=volume.storage,
                        format=volume.format,
                        size=volume.size,
                        origin=volume.origin,
                        data=volume.content_id,
                    )
            stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(ctime))
            made = Volume(
                storage=storage,
                name=f"backup/vzdump-qemu-{vmid}-{stamp}.vma.zst",
                content="backup",
                format="vma.zst",
                size=1 * GIB,
                ctime=ctime,
                vmid=vmid,
                notes=notes,
                protected=protected,
                archive=Archive(config=kept, drives=drives),
            )
            self.state.volumes.append(made)
        return made.volid

    def add_storage(self, name: str, content: str, kind: str = "dir") -> None:
        with self.lock:
            self.state.storages[name] = Storage(type=kind, content=content.split(","), total=500 * GIB)

    def set_content(self, storage: str, content: str) -> None:
        """The content types of a storage, comma-separated."""
        with self.lock:
            self.state.storages[storage].content = content.split(",")

    def lock_vm(self, vmid: int, lock: str = "backup") -> None:
        """The VM is locked from now on; '' unlocks it."""
        with self.lock:
            if lock:
                self.state.vms[vmid].config["lock"] = lock
            else:
                self.state.vms[vmid].config.pop("lock", None)

    # `skip`: so many such requests or tasks are spared first.

    def answer(
        self,
        status: int,
        times: int = 1,
        method: str = "*",
        path: str = "",
        carried_out: bool = False,
        skip: int = 0,
    ) -> None:
        """The next requests whose path matches the expression get this status, e.g. 596.

        They are not carried out, unless `carried_out`.
        """
        self.emulator.faults.add(status, times, method, path, carried_out=carried_out, skip=skip)

    def drop_reply(self, method: str, path: str, times: int = 1, skip: int = 0) -> None:
        """The next such requests are carried out and their connection closed without an answer."""
        self.emulator.faults.add(0, times, method, path, skip=skip)

    def hang_up(self, method: str, path: str, times: int = 1, skip: int = 0) -> None:
        """The next such requests find their connection closed, as a kept-alive one may be; nothing is carried out."""
        self.emulator.faults.trouble(Trouble(method, re.compile(path), times, hang_up=True, skip=skip))

    def slow_reply(self, method: str, path: str, seconds: float, times: int = 1, skip: int = 0) -> None:
        """The next such requests are carried out and answered this many seconds late."""
        self.emulator.faults.trouble(Trouble(method, re.compile(path), times, delay=seconds, skip=skip))

    def meanwhile(self, method: str, path: str, action: Callable[[], None], times: int = 1, skip: int = 0) -> None:
        """Just before the next such requests are looked at, somebody else does this."""
        self.emulator.faults.trouble(Trouble(method, re.compile(path), times, meanwhile=action, skip=skip))

    def fail_task(
        self, kind: str, status: str, log: Sequence[str] = (), times: int = 1, after: str = "", skip: int = 0
    ) -> None:
        """The next tasks of this type do nothing but log these lines and end with this status.

        With `after` they work until they have logged a line with that text, fail there and clean up as they would.
        """
        self.emulator.faults.task_trouble(TaskTrouble(kind, times, status=status, log=log, after=after, skip=skip))

    def kill_task(self, kind: str, after: str, times: int = 1, skip: int = 0) -> None:
        """The worker of the next such tasks is killed once it has logged a line with this text; nothing cleans up."""
        self.emulator.faults.task_trouble(TaskTrouble(kind, times, after=after, killed=True, skip=skip))

    def warn_task(self, kind: str, *warnings: str, times: int = 1) -> None:
        """The next tasks of this type do their work, log these lines and end with `WARNINGS: n`."""
        self.emulator.faults.task_trouble(TaskTrouble(kind, times, warnings=warnings))

    def hold_task(self, kind: str, log: Sequence[str] = (), after: str = "") -> Callable[[], None]:
        """The next task of this type logs these lines and stands still until the returned function is called.

        With `after` it stands still once it has logged a line with that text. Only for `vzdump` and `qmrestore`: in
        the middle of others the whole node stands still.
        """
        trouble = TaskTrouble(kind, 1, log=log, after=after)
        self.emulator.faults.task_trouble(trouble)
        return trouble.released.set

    def _troubled(self, start: Callable[..., str]) -> Callable[..., str]:
        """The start of a task, for tasks that meet their trouble."""

        def start_task(kind: str, ident: object, user: str, body: Body, vmid: int | None = None) -> str:
            trouble = self.emulator.faults.take_task_trouble(kind)
            return start(kind, ident, user, body if trouble is None else _with_trouble(body, trouble), vmid)

        return start_task

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._start())
        except BaseException as error:
            self._failure = error
            self._ready.set()
            return
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        certificate = self._authority.issue(self.node, [self.node, "localhost", self.host])
        self.emulator = Emulator(
            store=Store(self.node),
            power=self.power,
            hardware=self.hardware,
            certificate=certificate,
            folder=self.folder / "storage",
            secrets=Secrets(self.root_password, "node-secret"),
            lock_wait=_LOCK_WAIT,
        )
        peers = [
            Emulator(
                store=Store(name),
                power=power,
                hardware=self.hardware,
                certificate=certificate,
                folder=self.folder / f"storage-{name}",
                secrets=Secrets(self.root_password, "node-secret"),
                lock_wait=_LOCK_WAIT,
            )
            for name, power in self.others.items()
        ]
        # Every part of an emulator starts its tasks here.
        for each in (self.emulator, *peers):
            vars(each.tasks)["start"] = self._troubled(each.tasks.start)
        self._front = _TroubledFront(self.emulator, Upstream(self._fakepve), peers)
        self.port = await self._front.start(self.host, 0)
