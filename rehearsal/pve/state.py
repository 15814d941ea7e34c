# SPDX-License-Identifier: MIT
"""What one emulated node remembers, and the file it survives a restart of the front in."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pydantic import BaseModel, Field

GIB = 1024**3
MIB = 1024**2
# Finished tasks kept; PVE's own archive is longer, nobody here looks further back.
TASKS_KEPT = 500

ConfigValue = int | str
Config = dict[str, ConfigValue]
# A backup job's options as text, its id left out.
BackupJob = dict[str, str]


class Archived(BaseModel):
    """One drive of a backup. `data` says which content it holds (see `Volume.content_id`)."""

    volid: str
    storage: str
    format: str
    size: int
    origin: str
    data: str


class Archive(BaseModel):
    """What a backup holds: the guest's configuration, and its drives by key."""

    config: Config
    drives: dict[str, Archived]


class Volume(BaseModel):
    """A file of a storage. `size` is in bytes; `origin` is the image a system disk was imported from.

    `data` names the content where it came from somewhere else: from a backup, or under another name before.
    `archive`, `notes` and `protected` are a backup's.
    """

    storage: str
    name: str
    content: str
    format: str
    size: int
    ctime: int
    vmid: int | None = None
    origin: str = ""
    data: str = ""
    archive: Archive | None = None
    notes: str = ""
    protected: bool = False

    @property
    def volid(self) -> str:
        return f"{self.storage}:{self.name}"

    @property
    def content_id(self) -> str:
        """Equal for two volumes when one is a copy of the other, as far as the API was what copied it."""
        return self.data or f"{self.volid}@{self.ctime}"


class Storage(BaseModel):
    """An entry of storage.cfg. `total` is the simulated size in bytes."""

    type: str
    content: list[str]
    total: int
    path: str = ""
    vgname: str = ""
    thinpool: str = ""
    prune_backups: str = ""

    @property
    def holds_files(self) -> bool:
        return self.type == "dir"


class Vm(BaseModel):
    """A VM: `config` is what a running one uses, `pending` what the next start adds (None: removes).

    `started` is the Unix time of the last start, None when it was stopped through the API.
    """

    vmid: int
    config: Config = Field(default_factory=dict)
    pending: dict[str, ConfigValue | None] = Field(default_factory=dict)
    started: float | None = None

    @property
    def lock(self) -> str:
        return str(self.config.get("lock", ""))

    def future(self) -> Config:
        """The configuration with the pending changes merged in, as GET config shows it."""
        merged = {key: value for key, value in self.config.items() if self.pending.get(key, "") is not None}
        merged.update({key: value for key, value in self.pending.items() if value is not None})
        return merged

    def apply_pending(self) -> None:
        self.config = self.future()
        self.pending = {}


class Token(BaseModel):
    """An API token; only a digest of its secret is kept."""

    digest: str
    privsep: bool = True
    comment: str = ""
    expire: int = 0


class User(BaseModel):
    """A user of user.cfg. Passwords are not modelled."""

    enable: bool = True
    comment: str = ""
    expire: int = 0
    tokens: dict[str, Token] = Field(default_factory=dict)


class Acl(BaseModel):
    """One line of the access control list; `kind` is `user` or `token`."""

    path: str
    kind: str
    who: str
    role: str
    propagate: bool = True


class Mapping(BaseModel):
    """A PCI resource mapping: one property string per device and node."""

    map: list[str]
    description: str | None = None
    mdev: int | None = None
    live: int | None = None


class Task(BaseModel):
    """A worker: `exitstatus` is None while it runs. Times are Unix seconds."""

    upid: str
    node: str
    pid: int
    pstart: int
    starttime: int
    type: str
    id: str
    user: str
    endtime: int | None = None
    exitstatus: str | None = None
    log: list[str] = Field(default_factory=list)


def default_storages() -> dict[str, Storage]:
    """What a fresh installation has, with the content types the tool needs switched on."""
    return {
        "local": Storage(
            type="dir",
            content=["backup", "import", "iso", "snippets", "vztmpl"],
            total=100 * GIB,
            path="/var/lib/vz",
        ),
        "local-lvm": Storage(
            type="lvmthin", content=["images", "rootdir"], total=800 * GIB, vgname="pve", thinpool="data"
        ),
    }


class NodeState(BaseModel):
    """Everything of one standalone node. `memory` is in bytes; `release` is the API version it answers as."""

    node: str
    release: str = "9.1.1"
    cores: int = 16
    memory: int = 64 * GIB
    storages: dict[str, Storage] = Field(default_factory=default_storages)
    volumes: list[Volume] = Field(default_factory=list)
    vms: dict[int, Vm] = Field(default_factory=dict)
    users: dict[str, User] = Field(default_factory=lambda: {"root@pam": User()})
    roles: dict[str, list[str]] = Field(default_factory=dict)
    acl: list[Acl] = Field(default_factory=list)
    mappings: dict[str, Mapping] = Field(default_factory=dict)
    backup_jobs: dict[str, BackupJob] = Field(default_factory=dict)
    tasks: list[Task] = Field(default_factory=list)
    next_pid: int = 0x4000


class Store:
    """A node's state behind one lock, written to `path` by `save()`; in memory only when there is no path."""

    def __init__(self, node: str, path: Path | None = None) -> None:
        self.lock = threading.RLock()
        #: The other nodes of its cluster.
        self.peers: list[Store] = []
        self._path = path
        if path is not None and path.exists():
            self.state = NodeState.model_validate_json(path.read_bytes())
            self._end_lost_tasks()
        else:
            self.state = NodeState(node=node)

    def cluster(self) -> list[NodeState]:
        """The states of all nodes, this one's first."""
        return [self.state, *(peer.state for peer in self.peers)]

    def save(self) -> None:
        """Replace the file as a whole, so that a killed front leaves the last state and never half of one."""
        if self._path is None:
            return
        with self.lock:
            del self.state.tasks[:-TASKS_KEPT]
            text = self.state.model_dump_json(indent=1)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_suffix(".new")
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            scratch.replace(self._path)

    def _end_lost_tasks(self) -> None:
        for task in self.state.tasks:
            if task.exitstatus is None:
                task.exitstatus = "unexpected status"
                task.endtime = task.starttime
