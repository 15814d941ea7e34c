# SPDX-License-Identifier: MIT
"""Storages and their volumes: listing, downloads that are verified, allocation and release of disks."""

from __future__ import annotations

import hashlib
import re
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rehearsal.pve import access, retention
from rehearsal.pve.errors import ApiError, TaskError, bad_parameters, die, no_permission
from rehearsal.pve.power import Power
from rehearsal.pve.routing import Call, Route, needs, needs_any
from rehearsal.pve.state import MIB, Storage, Store, Volume
from rehearsal.pve.tasks import Log, Tasks

# A guest's backup, by the name that vzdump gives it.
BACKUP_NAME = re.compile(
    r"vzdump-qemu-(?P<vmid>\d+)-(?P<stamp>\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d)\.(?P<format>vma(?:\.(?:zst|gz|lzo))?)"
)
# Where a file storage keeps backups, beneath its path.
_BACKUP_FOLDER = "dump"
_EXTENSIONS = {
    "import": r"[^/]+\.(?:ova|ovf|qcow2|raw|vmdk)",
    "iso": r"[^/]+\.(?:iso|img)",
    "vztmpl": r"[^/]+\.tar\.(?:gz|xz|zst|bz2)",
}
# LVM hands out whole extents.
_EXTENT = 4 * MIB
_EFI_VARIABLES = 528 * 1024
_TPM_STATE = 4 * MIB
_CLOUD_INIT_DRIVE = 4 * MIB
_QCOW2_MAGIC = b"QFI\xfb"
# A download gives up when its server is silent for so many seconds.
_SILENCE = 30


class StorageApi:
    """`folder` holds the files of file storages, one folder per content type."""

    def __init__(self, store: Store, tasks: Tasks, power: Power, folder: Path) -> None:
        self._store = store
        self._tasks = tasks
        self._power = power
        self._folder = folder

    def routes(self) -> list[Route]:
        node = "/nodes/{node}/storage"
        content = node + "/{storage}/content"
        audit = needs_any("/storage/{storage}", "Datastore.Audit", "Datastore.AllocateSpace")
        return [
            Route("GET", "/storage", self._list_config),
            Route("GET", "/storage/{storage}", self._get_config, needs("/storage/{storage}", "Datastore.Allocate")),
            Route("PUT", "/storage/{storage}", self._set_config, needs("/storage", "Datastore.Allocate")),
            Route("GET", node, self._list),
            Route("GET", node + "/{storage}/status", self._status, audit),
            Route("GET", content, self._content, audit),
            Route("GET", content + "/{volume}", self._volume),
            Route("PUT", content + "/{volume}", self._set_attributes),
            Route("DELETE", content + "/{volume}", self._delete),
            Route("POST", node + "/{storage}/download-url", self._download, self._may_download),
        ]

    # What the VMs' part of the API needs. Callers hold the store's lock.

    def storage(self, name: str) -> Storage:
        found = self._store.state.storages.get(name)
        if found is None:
            die(f"storage '{name}' does not exist")
        return found

    def find(self, volid: str) -> Volume | None:
        return next((volume for volume in self._store.state.volumes if volume.volid == volid), None)

    def allocate(
        self, storage: str, vmid: int, size: int, *, origin: str = "", fmt: str = "", suffix: str = ""
    ) -> Volume:
        """A new disk of `size` bytes with the first free name, or the VM's `suffix` volume."""
        where = self.storage(storage)
        fmt = (fmt or "qcow2") if where.holds_files else "raw"
        base = f"vm-{vmid}-{suffix}" if suffix else self._free_name(storage, vmid)
        name = f"{vmid}/{base}.{fmt}" if where.holds_files else base
        if self.find(f"{storage}:{name}") is not None:
            raise TaskError(f"unable to create image: disk image '{name}' already exists")
        if not where.holds_files:
            size = -(-size // _EXTENT) * _EXTENT
        volume = Volume(
            storage=storage,
            name=name,
            content="images",
            format=fmt,
            size=size,
            ctime=int(time.time()),
            vmid=vmid,
            origin=origin,
        )
        self._power.create_volume(volume)
        self._store.state.volumes.append(volume)
        return volume

    def allocate_cloud_init(self, storage: str, vmid: int) -> Volume:
        return self.allocate(storage, vmid, _CLOUD_INIT_DRIVE, suffix="cloudinit")

    def fixed_size(self, key: str) -> int | None:
        """Bytes of a drive whose size nobody declares."""
        return {"efidisk0": _EFI_VARIABLES, "tpmstate0": _TPM_STATE}.get(key)

    def free(self, volid: str) -> None:
        """Release a volume; one that is gone already is no error."""
        volume = self.find(volid)
        if volume is not None:
            self._power.remove_volume(volume)
            self._store.state.volumes.remove(volume)

    def free_backup(self, volume: Volume) -> None:
        """Remove a backup, its file included."""
        self.path(volume).unlink(missing_ok=True)
        self._store.state.volumes.remove(volume)

    def require_backup_access(self, call: Call, storage: str, owner: int, vmid: int | None = None) -> None:
        """PVE's rule for reading a backup: the store's administrator, the guest `vmid` itself, or both rights."""
        state = self._store.state
        if access.may(state, call.user, f"/storage/{storage}", "Datastore.Allocate") or owner == vmid:
            return
        access.require(state, call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
        access.require(state, call.user, f"/vms/{owner}", "VM.Backup")

    def rename(self, volid: str, vmid: int) -> Volume:
        """Give a disk to another VM under that VM's next free name."""
        volume = self.find(volid)
        if volume is None:
            raise TaskError(f"no such volume '{volid}'")
        name = self._free_name(volume.storage, vmid)
        if self.storage(volume.storage).holds_files:
            name = f"{vmid}/{name}.{volume.format}"
        renamed = volume.model_copy(update={"name": name, "vmid": vmid, "data": volume.content_id})
        self._power.rename_volume(volume, renamed)
        self._store.state.volumes[self._store.state.volumes.index(volume)] = renamed
        return renamed

    def image_size(self, volume: Volume) -> int:
        """The virtual size in bytes of a disk image, from its header when it is qcow2."""
        path = self.path(volume)
        with path.open("rb") as file:
            header = file.read(32)
        if len(header) == 32 and header.startswith(_QCOW2_MAGIC):
            return int(struct.unpack_from(">Q", header, 24)[0])
        return path.stat().st_size

    def used(self, name: str) -> int:
        return sum(volume.size for volume in self._store.state.volumes if volume.storage == name)

    def _free_name(self, storage: str, vmid: int) -> str:
        names = {volume.name for volume in self._store.state.volumes if volume.storage == storage}
        taken = {int(match[1]) for name in names if (match := re.search(rf"vm-{vmid}-disk-(\d+)", name))}
        return f"vm-{vmid}-disk-{next(n for n in range(1000) if n not in taken)}"

    # The API.

    def _visible(self, call: Call) -> dict[str, Storage]:
        state = self._store.state
        return {
            name: storage
            for name, storage in sorted(state.storages.items())
            if access.may(state, call.user, f"/storage/{name}", "Datastore.Audit", "Datastore.AllocateSpace")
        }

    def _list_config(self, call: Call) -> list[dict[str, Any]]:
        wanted = call.text("type")
        return [
            self._config_view(name, storage)
            for name, storage in self._visible(call).items()
            if wanted in ("", storage.type)
        ]

    def _get_config(self, call: Call) -> dict[str, Any]:
        name = call.text("storage")
        return self._config_view(name, self.storage(name))

    def _set_config(self, call: Call) -> dict[str, Any]:
        name = call.text("storage")
        if name not in self._store.state.storages:
            die(f"update storage failed: storage '{name}' does not exist")
        storage = self.storage(name)
        if "content" in call.params:
            storage.content = sorted(call.names("content"))
        if "prune-backups" in call.params:
            storage.prune_backups = retention.text(retention.parse(call.text("prune-backups")))
        if "prune-backups" in call.names("delete"):
            storage.prune_backups = ""
        return {"storage": name, "type": storage.type}

    def _config_view(self, name: str, storage: Storage) -> dict[str, Any]:
        view: dict[str, Any] = {"storage": name, "type": storage.type, "content": ",".join(storage.content)}
        extra = {
            "path": storage.path,
            "vgname": storage.vgname,
            "thinpool": storage.thinpool,
            "prune-backups": storage.prune_backups,
        }
        view.update({key: value for key, value in extra.items() if value})
        view["digest"] = hashlib.sha1(
            repr(sorted(self._store.state.storages.items())).encode(), usedforsecurity=False
        ).hexdigest()
        return view

    def _list(self, call: Call) -> list[dict[str, Any]]:
        wanted = set(call.names("content"))
        return [
            {"storage": name, **self._status_view(name, storage)}
            for name, storage in self._visible(call).items()
            if (not wanted or wanted & set(storage.content)) and call.text("storage") in ("", name)
        ]

    def _status(self, call: Call) -> dict[str, Any]:
        name = call.text("storage")
        return self._status_view(name, self.storage(name))

    def _status_view(self, name: str, storage: Storage) -> dict[str, Any]:
        used = self.used(name)
        return {
            "type": storage.type,
            "content": ",".join(storage.content),
            "active": 1,
            "enabled": 1,
            "shared": 0,
            "total": storage.total,
            "used": used,
            "avail": storage.total - used,
            "used_fraction": used / storage.total,
        }

    def _content(self, call: Call) -> list[dict[str, Any]]:
        name = call.text("storage")
        self.storage(name)
        # AllocateSpace alone opens the list, and shows nothing in it but backups of guests that are the caller's.
        audits = access.may(self._store.state, call.user, f"/storage/{name}", "Datastore.Audit", "Datastore.Allocate")
        return [
            self._volume_view(volume)
            for volume in self._store.state.volumes
            if volume.storage == name
            and (self._reads_backup(call, volume) if volume.content == "backup" else audits)
            and call.text("content") in ("", volume.content)
            and call.text("vmid") in ("", str(volume.vmid))
        ]

    def _reads_backup(self, call: Call, volume: Volume) -> bool:
        try:
            self.require_backup_access(call, volume.storage, volume.vmid or 0)
        except ApiError:
            return False
        return True

    def _volume_view(self, volume: Volume) -> dict[str, Any]:
        view: dict[str, Any] = {
            "volid": volume.volid,
            "content": volume.content,
            "format": volume.format,
            "size": volume.size,
            "ctime": volume.ctime,
        }
        if volume.vmid is not None:
            view["vmid"] = volume.vmid
        if volume.content == "backup":
            view["subtype"] = "qemu"
            # The list shows the first line, and the flag only where it is set.
            view.update({"notes": volume.notes.partition("\n")[0]} if volume.notes else {})
            view.update({"protected": 1} if volume.protected else {})
        return view

    def _named(self, call: Call) -> tuple[str, Volume | None]:
        """The volume of a path, which may leave the storage out."""
        text = urllib.parse.unquote(call.text("volume"))
        volid = text if ":" in text else f"{call.text('storage')}:{text}"
        return volid, self.find(volid)

    def _volume(self, call: Call) -> dict[str, Any]:
        volid, volume = self._named(call)
        if (owner := self._backup_owner(volid)) is not None:
            self.require_backup_access(call, call.text("storage"), owner)
        else:
            path = f"/storage/{call.text('storage')}"
            access.require_any(self._store.state, call.user, path, "Datastore.Audit", "Datastore.Allocate")
        if volume is None:
            die(f"volume '{volid}' does not exist")
        view = self._volume_view(volume)
        if volume.content == "backup":
            shown = {"path": self.shown_path(volume), "used": volume.size, "protected": int(volume.protected)}
            shown.update({"notes": volume.notes} if volume.notes else {})
            return {key: view[key] for key in ("format", "size")} | shown
        return {key: view[key] for key in ("format", "size")} | {"path": str(self.path(volume)), "used": volume.size}

    @staticmethod
    def _backup_owner(volid: str) -> int | None:
        """The guest that a volume id says it is a backup of."""
        match = BACKUP_NAME.fullmatch(volid.partition(":")[2].removeprefix("backup/"))
        return int(match["vmid"]) if match is not None else None

    def _set_attributes(self, call: Call) -> None:
        """The notes of a backup, and whether it is protected."""
        volid, volume = self._named(call)
        owner = self._backup_owner(volid)
        if owner is None:
            access.require(self._store.state, call.user, f"/storage/{call.text('storage')}", "Datastore.Allocate")
            die(f"attribute 'notes' is not supported for storage type '{self.storage(call.text('storage')).type}'")
        self.require_backup_access(call, call.text("storage"), owner)
        if volume is None:
            die(f"volume '{volid}' does not exist")
        if "notes" in call.params:
            volume.notes = call.text("notes")
        if "protected" in call.params:
            volume.protected = call.flag("protected")

    def _delete(self, call: Call) -> str:
        storage = call.text("storage")
        volid, volume = self._named(call)
        owner = self._backup_owner(volid)
        if owner is not None:
            access.require(self._store.state, call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
            access.require(self._store.state, call.user, f"/vms/{owner}", "VM.Backup")
        else:
            access.require(self._store.state, call.user, f"/storage/{storage}", "Datastore.Allocate")
            owner = volume.vmid if volume is not None else None
        self.storage(storage)

        def body(log: Log) -> None:
            with self._store.lock:
                if volume is not None and volume.protected:
                    name = volid.partition(":")[2]
                    raise TaskError(f"cannot remove protected volume '{name}' on '{storage}'")
                self.free(volid)
                if volume is not None and volume.content != "images":
                    self.path(volume).unlink(missing_ok=True)
                log(f"Removed volume '{volid}'")

        return self._tasks.start("imgdel", f"{owner}@{storage}" if owner else storage, call.user, body)

    @staticmethod
    def _may_download(store: Store, call: Call) -> None:
        access.require(store.state, call.user, f"/storage/{call.text('storage')}", "Datastore.AllocateTemplate")
        on_root = access.held(store.state, call.user, "/")
        if {"Sys.Audit", "Sys.Modify"} <= set(on_root):
            return
        if not access.may(store.state, call.user, f"/nodes/{call.text('node')}", "Sys.AccessNetwork"):
            no_permission()

    def _download(self, call: Call) -> str:
        name, content, filename = call.text("storage"), call.text("content"), call.text("filename")
        storage = self.storage(name)
        if not storage.holds_files:
            die(f"can't upload to storage type '{storage.type}', not a file based storage!")
        if content not in storage.content:
            die(f"storage '{name}' is not configured for content-type '{content}'")
        if not re.fullmatch(_EXTENSIONS.get(content, ""), filename):
            bad_parameters({"filename": "invalid filename or wrong extension"})
        url, algorithm, expected = call.text("url"), call.text("checksum-algorithm"), call.text("checksum").lower()
        if bool(algorithm) != bool(expected):
            bad_parameters(
                {"checksum": "missing property required by 'checksum-algorithm'"}
                if algorithm
                else {"checksum-algorithm": "missing property required by 'checksum'"}
            )

        def body(log: Log) -> None:
            target = self._folder / name / content / filename
            log(f"downloading {url} to {storage.path}/{content}/{filename}")
            if algorithm and target.exists() and _checksum(target, algorithm) == expected:
                log("OK, got correct file already, no need to download")
            else:
                _fetch(url, target, algorithm, expected, log)
            volume = Volume(
                storage=name,
                name=f"{content}/{filename}",
                content=content,
                format=filename.rpartition(".")[2],
                size=target.stat().st_size,
                ctime=int(time.time()),
            )
            with self._store.lock:
                volumes = self._store.state.volumes
                volumes[:] = [known for known in volumes if known.volid != volume.volid] + [volume]

        return self._tasks.start("download", filename, call.user, body)

    def path(self, volume: Volume) -> Path:
        """The file of a volume of a file storage, on the control machine."""
        return self._folder / volume.storage / volume.name

    def shown_path(self, volume: Volume) -> str:
        """The file of a backup as a node would name it."""
        base = self.storage(volume.storage).path or f"/mnt/pve/{volume.storage}"
        return f"{base}/{_BACKUP_FOLDER}/{volume.name.rpartition('/')[2]}"


def _checksum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _fetch(url: str, target: Path, algorithm: str, expected: str, log: Log) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.tmp_dwnl")
    host = urllib.parse.urlsplit(url)
    port = host.port or (443 if host.scheme == "https" else 80)
    # As a node would: straight to the address, whatever proxies the control machine uses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_SILENCE) as answer, scratch.open("wb") as file:
            while block := answer.read(MIB):
                log(f"transferred {file.tell() + len(block)} bytes")
                file.write(block)
        if algorithm:
            got = _checksum(scratch, algorithm)
            if got != expected:
                raise TaskError(f"checksum mismatch: got '{got}' != expect '{expected}'")
            log("OK, checksum verified")
        scratch.replace(target)
    except urllib.error.HTTPError as error:
        raise TaskError(
            f"download failed: HTTP request sent, awaiting response... {error.code} {error.reason}"
        ) from error
    except (TimeoutError, urllib.error.URLError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        words = getattr(reason, "strerror", None) or reason
        raise TaskError(f"download failed: Connecting to {host.hostname}:{port}... failed: {words}.") from error
    finally:
        scratch.unlink(missing_ok=True)
