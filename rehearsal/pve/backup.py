# SPDX-License-Identifier: MIT
"""vzdump and qmrestore: backups of whole guests as files of a storage, what is kept of them, and guests made of them.

The refusals, the log and what a failure leaves behind are PVE's. The format inside an archive is this lab's own
(simulated): real nodes write VMA.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehearsal.pve import access, jobs, retention, vmconfig
from rehearsal.pve.errors import ApiError, TaskError, bad_parameters, die, no_permission
from rehearsal.pve.power import Power
from rehearsal.pve.qemu import CREATE_ONLY, QemuApi, new_mac
from rehearsal.pve.routing import Call, Route, needs_any
from rehearsal.pve.running import RunningApi
from rehearsal.pve.state import GIB, MIB, Archive, Archived, Config, Store, Vm, Volume
from rehearsal.pve.storage import BACKUP_NAME, StorageApi
from rehearsal.pve.tasks import Log, Tasks
from rehearsal.pve.vmconfig import DISK_KEY, UNUSED_KEY

_EXTENSIONS = {"0": "vma", "": "vma", "1": "vma.lzo", "lzo": "vma.lzo", "gzip": "vma.gz", "zstd": "vma.zst"}
# Protected backups of a guest that somebody without Datastore.Allocate may keep.
_MAX_PROTECTED = 5
_STOP_WAIT = 600


class BackupApi:
    """/nodes/N/vzdump, a storage's prunebackups, and the restore behind POST /nodes/N/qemu."""

    def __init__(
        self, store: Store, tasks: Tasks, storage: StorageApi, qemu: QemuApi, running: RunningApi, power: Power
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._storage = storage
        self._qemu = qemu
        self._running = running
        self._power = power
        # One vzdump at a time, as /var/run/vzdump.lock makes it.
        self._one = threading.Lock()

    def routes(self) -> list[Route]:
        node = "/nodes/{node}"
        prune = node + "/storage/{storage}/prunebackups"
        audit = needs_any("/storage/{storage}", "Datastore.Audit", "Datastore.AllocateSpace")
        return [
            Route("POST", node + "/vzdump", self._vzdump),
            Route("GET", node + "/vzdump/extractconfig", self._extract_config),
            Route("GET", prune, self._prune_preview, audit),
            Route("DELETE", prune, self._prune),
        ]

    # Making one.

    def _vzdump(self, call: Call) -> str:
        state = self._store.state
        if call.flag("stdout"):
            bad_parameters({"stdout": "option is only allowed on the command line interface."})
        options = {key: call.text(key) for key in call.params if key != "node"}
        jobs.check_rights(self._store, call)
        storage = call.text("storage", "local")
        if {"prune-backups", "maxfiles"} & set(options):
            access.require(state, call.user, f"/storage/{storage}", "Datastore.Allocate")
        jobs.check_options(options)
        jobs.require_guests(options)
        if "prune-backups" in options:
            retention.parse(options["prune-backups"])
        access.require(state, call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
        vmids = self._vmids(call)

        def body(log: Log) -> None:
            keep = self._keep(storage, options)
            if not self._one.acquire(blocking=False):
                log("INFO: trying to get global lock - waiting...")
                self._one.acquire()
                log("INFO: got global lock")
            try:
                self._back_up_all(call, vmids, storage, keep, options, log)
            finally:
                # A lock on a file goes with its process, a killed one included.
                self._one.release()

        ident = str(vmids[0]) if len(vmids) == 1 else ""
        return self._tasks.start("vzdump", ident, call.user, body)

    def _vmids(self, call: Call) -> list[int]:
        if "vmid" in call.params:
            return sorted({int(name) for name in call.names("vmid")})
        excluded = {int(name) for name in call.names("exclude")}
        return sorted(set(self._store.state.vms) - excluded)

    def _keep(self, name: str, options: Mapping[str, str]) -> retention.Keep:
        """How many backups stay: the request's word, else the storage's, else all.

        Raises:
            TaskError: the storage is none for backups.
        """
        known = self._store.state.storages.get(name)
        prefix = f"could not get storage information for '{name}': "
        if known is None:
            missing = f"storage '{name}' does not exist"
            raise TaskError(f"could not activate storage '{name}': {missing} {prefix}{missing}")
        if "backup" not in known.content:
            raise TaskError(f"{prefix}can't use storage '{name}' for backups - wrong content type")
        if "maxfiles" in options:
            return {"keep-last": int(options["maxfiles"])}
        return retention.parse(options.get("prune-backups") or known.prune_backups)

    def _back_up_all(
        self, call: Call, vmids: list[int], storage: str, keep: retention.Keep, options: Mapping[str, str], log: Log
    ) -> None:
        shown = " ".join(f"--{key} {value}" for key, value in sorted(options.items()) if key != "vmid")
        log(f"INFO: starting new backup job: vzdump {' '.join(map(str, vmids))} {shown}".rstrip())
        todo = []
        for vmid in vmids:
            if vmid in self._store.state.vms:
                path = f"/vms/{vmid}"
                if call.flag("all") and not access.may(self._store.state, call.user, path, "VM.Backup"):
                    continue
                require_in_task(self._store, call, path, "VM.Backup")
            todo.append(vmid)
        failed = 0
        for vmid in todo:
            try:
                _Backup(self, call, vmid, storage, keep, options, log).run()
            except (TaskError, ApiError) as error:
                failed += 1
                log(f"ERROR: Backup of VM {vmid} failed - {error}")
                log(f"INFO: Failed at {time.strftime('%F %H:%M:%S')}")
                if str(error) == "interrupted by signal":
                    raise
        log(f"INFO: Backup job finished {'with errors' if failed else 'successfully'}")
        if failed:
            raise TaskError("job errors")

    def of_guest(self, storage: str, vmid: int | None) -> list[Volume]:
        """The backups of a guest on a storage, or of all guests."""
        return [
            volume
            for volume in self._store.state.volumes
            if volume.storage == storage and volume.content == "backup" and vmid in (None, volume.vmid)
        ]

    # What is kept.

    def _marked(self, storage: str, vmid: int | None, keep: retention.Keep) -> list[tuple[Volume, str]]:
        groups: dict[int | None, list[Volume]] = {}
        for volume in self.of_guest(storage, vmid):
            groups.setdefault(volume.vmid, []).append(volume)
        found: list[tuple[Volume, str]] = []
        for volumes in groups.values():
            decided = retention.marks([(volume.ctime, volume.protected) for volume in volumes], keep)
            found += zip(volumes, decided, strict=True)
        return found

    def prune(self, storage: str, vmid: int | None, keep: retention.Keep, log: Log, prefix: str = "") -> int:
        """Remove what the retention leaves over; how many those were. Callers hold the store's lock."""
        doomed = [volume for volume, mark in self._marked(storage, vmid, keep) if mark == "remove"]
        for volume in doomed:
            log(f"{prefix}removing backup '{volume.volid}'")
            self._storage.free_backup(volume)
        self._store.save()
        return len(doomed)

    def _prune_options(self, call: Call) -> retention.Keep:
        name = call.text("storage")
        known = self._storage.storage(name)
        if "backup" not in known.content:
            die(f"storage '{name}' does not support backups")
        given = call.text("prune-backups") or known.prune_backups
        if not given:
            die(f"no prune-backups options configured for storage '{name}'")
        return retention.parse(given)

    def _prune_preview(self, call: Call) -> list[dict[str, Any]]:
        keep = self._prune_options(call)
        return [
            {"volid": volume.volid, "ctime": volume.ctime, "mark": mark, "type": "qemu", "vmid": volume.vmid}
            for volume, mark in self._marked(call.text("storage"), call.number("vmid") or None, keep)
        ]

    def _prune(self, call: Call) -> str:
        state, storage, vmid = self._store.state, call.text("storage"), call.number("vmid") or None
        if "prune-backups" in call.params:
            retention.parse(call.text("prune-backups"))
        if vmid is None:
            access.require(state, call.user, f"/storage/{storage}", "Datastore.Allocate")
        else:
            access.require(state, call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
            access.require(state, call.user, f"/vms/{vmid}", "VM.Backup")

        def body(log: Log) -> None:
            with self._store.lock:
                self.prune(storage, vmid, self._prune_options(call), log)

        return self._tasks.start("prunebackups", f"{vmid}@{storage}" if vmid else storage, call.user, body)

    def _extract_config(self, call: Call) -> str:
        volume = self._archive(call, call.text("volume"), vmid=None)
        access.require(self._store.state, call.user, f"/vms/{volume.vmid}", "VM.Backup")
        assert volume.archive is not None
        config = volume.archive.config
        described = [f"#{line}" for line in str(config.get("description", "")).splitlines()]
        lines = [f"{key}: {config[key]}" for key in sorted(config) if key != "description"]
        mapped = [
            f"#qmdump#map:{key}:drive-{key}:{drive.storage}:{drive.format}:"
            for key, drive in sorted(volume.archive.drives.items())
        ]
        return "".join(f"{line}\n" for line in [*described, *lines, *mapped])

    # Restoring.

    def _archive(self, call: Call, volid: str, vmid: int | None) -> Volume:
        """The backup that a request names, after PVE's check of who may read it.

        Raises:
            ApiError: it is none, is not there or is not the caller's to read.
        """
        if volid.startswith("/") or ":" not in volid:
            if not call.is_root:
                die("Only root can pass arbitrary filesystem paths.")
            die(f"can't find file '{volid}'")
        storage, _, name = volid.partition(":")
        self._storage.storage(storage)
        if not name.startswith("backup/"):
            if self._storage.find(volid) is None and "/" not in name and not name.startswith("vm-"):
                die(f"unable to parse volume ID '{volid}'")
            die(f"unable to use volume {volid} - content type needs to be 'backup'")
        match = BACKUP_NAME.fullmatch(name.removeprefix("backup/"))
        if match is None:
            die(f"unable to parse directory volume name '{name}'")
        self._storage.require_backup_access(call, storage, int(match["vmid"]), vmid)
        volume = self._storage.find(volid)
        if volume is None or volume.archive is None:
            die(f"volume '{volid}' does not exist")
        return volume

    def restore(self, call: Call) -> str:
        """POST /nodes/N/qemu with `archive`: a guest made anew from a backup; `force` puts it in the place of one."""
        state, vmid = self._store.state, call.vmid
        target = call.text("storage")
        if target:
            access.require(state, call.user, f"/storage/{target}", "Datastore.AllocateSpace")
        if call.flag("start"):
            access.require(state, call.user, f"/vms/{vmid}", "VM.PowerMgmt")
        replaces = call.flag("force") and vmid in state.vms
        allocates = access.may(state, call.user, f"/vms/{vmid}", "VM.Allocate")
        if not allocates and not (replaces and access.may(state, call.user, f"/vms/{vmid}", "VM.Backup")):
            no_permission()
        changes = {key: call.text(key) for key in call.params if key not in CREATE_ONLY}
        for key in sorted(changes):
            if DISK_KEY.fullmatch(key):
                bad_parameters({key: "option conflicts with option 'archive'"})
        volume = self._archive(call, call.text("archive"), vmid)
        self._qemu.check_new_keys(call, vmid, changes)
        reason = f"unable to restore VM {vmid} -"
        known = state.vms.get(vmid)
        if known is not None and not call.flag("force"):
            die(f"{reason} VM {vmid} already exists on node '{state.node}'")
        if known is not None and known.lock:
            die(f"{reason} VM is locked ({known.lock})")
        vm = known or Vm(vmid=vmid)
        vm.config["lock"] = "create"
        state.vms[vmid] = vm

        def body(log: Log) -> None:
            restore = _Restore(self, call, vm, volume, changes, log)
            try:
                restore.run(reason)
            except (TaskError, ApiError):
                with self._store.lock:
                    vm.config.pop("lock", None)
                    self._store.save()
                log(
                    "error before or during data restore, some or all disks were not completely restored. "
                    f"VM {vmid} state is NOT cleaned up."
                )
                raise
            if call.flag("start"):
                log("Execute autostart")
                self._running.start_vm(call, vmid)

        return self._tasks.start("qmrestore", vmid, call.user, body)

    def thaw_left(self) -> None:
        """After a restart of the front: what it froze for a copy that it did not end is not to stay so.

        A real node freezes for an instant only; here it lasts as long as the copy.
        """
        for vmid, vm in self._store.state.vms.items():
            if vm.lock == "backup" and self._power.running(vmid):
                with contextlib.suppress(TaskError):
                    self._power.thaw(vmid)

    # What the two workers below share.

    @property
    def store(self) -> Store:
        return self._store

    @property
    def tasks(self) -> Tasks:
        return self._tasks

    @property
    def storage(self) -> StorageApi:
        return self._storage

    @property
    def qemu(self) -> QemuApi:
        return self._qemu

    @property
    def running(self) -> RunningApi:
        return self._running

    @property
    def power(self) -> Power:
        return self._power


class _Backup:
    """One guest of a vzdump."""

    def __init__(
        self,
        api: BackupApi,
        call: Call,
        vmid: int,
        storage: str,
        keep: retention.Keep,
        options: Mapping[str, str],
        log: Log,
    ) -> None:
        self._api = api
        self._store = api.store
        self._call = call
        self._vmid = vmid
        self._storage = storage
        self._keep = keep
        self._options = options
        self._log = log

    def _info(self, line: str) -> None:
        self._log(f"INFO: {line}")

    def run(self) -> None:
        began = time.time()
        with self._store.lock:
            vm = self._store.state.vms.get(self._vmid)
            if vm is None:
                raise TaskError(f"unable to find VM '{self._vmid}'")
            self._check_limits()
            running = self._api.qemu.running(self._vmid)
        self._info(f"Starting Backup of VM {self._vmid} (qemu)")
        self._info(f"Backup started at {time.strftime('%F %H:%M:%S')}")
        self._info(f"status = {'running' if running else 'stopped'}")
        with self._api.tasks.config_file(self._vmid), self._store.lock:
            if vm.lock:
                raise TaskError(f"VM is locked ({vm.lock})")
            vm.config["lock"] = "backup"
            self._store.save()
        try:
            self._archived(vm, running)
        except (TaskError, ApiError):
            self._unlock(vm)
            raise
        self._unlock(vm)
        seconds = int(time.time() - began)
        self._info(
            f"Finished Backup of VM {self._vmid} ({seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02})"
        )
        self._info(f"Backup finished at {time.strftime('%F %H:%M:%S')}")

    def _check_limits(self) -> None:
        known = self._api.of_guest(self._storage, self._vmid)
        protected = [volume for volume in known if volume.protected]
        limit = sum(number for name, number in self._keep.items() if name != "keep-all")
        if self._call.flag("protected"):
            path = f"/storage/{self._storage}"
            unlimited = access.may(self._store.state, self._call.user, path, "Datastore.Allocate")
            if not unlimited and len(protected) >= _MAX_PROTECTED:
                raise TaskError(
                    f"The number of protected backups per guest is limited to {_MAX_PROTECTED} "
                    f"on storage '{self._storage}'"
                )
        elif limit and not self._removes and len(known) - len(protected) >= limit:
            raise TaskError(
                f"There is a max backup limit of {limit} enforced by the target storage or the vzdump parameters. "
                "Either increase the limit or delete old backups."
            )

    @property
    def _removes(self) -> bool:
        return self._call.flag("remove", default=True)

    def _unlock(self, vm: Vm) -> None:
        with self._store.lock:
            if vm.lock == "backup":
                del vm.config["lock"]
            self._store.save()

    def _archived(self, vm: Vm, running: bool) -> None:
        wanted = self._options.get("mode", "snapshot")
        mode = wanted if running else "stop"
        self._info(f"backup mode: {mode}")
        self._info("ionice priority: 7")
        if "name" in vm.config:
            self._info(f"VM Name: {vm.config['name']}")
        drives, volumes = self._drives(vm)
        config = self._config(vm)
        restart = mode == "stop" and running
        if restart:
            self._info("stopping virtual guest")
            self._api.running.power_down(vm, _STOP_WAIT, force=False, log=self._log)
        try:
            made = self._copied(vm, mode, running, drives, volumes, config)
        except (TaskError, ApiError):
            if restart:
                self._restart()
            raise
        if restart:
            self._restart()
        self._finish(made)

    def _restart(self) -> None:
        """Only a worker that is killed leaves the guest stopped; one that was told to stop ends at its next line."""
        self._api.running.bring_up(self._vmid, skiplock=True)
        self._info("restarting vm")

    def _drives(self, vm: Vm) -> tuple[dict[str, Archived], dict[str, Volume]]:
        """The drives that go into the archive, with their volumes."""
        drives: dict[str, Archived] = {}
        volumes: dict[str, Volume] = {}
        with self._store.lock:
            for key, (volid, options) in vmconfig.disks(vm.config).items():
                if vmconfig.switched_off(options, "backup"):
                    self._info(f"exclude disk '{key}' '{volid}' (backup=no)")
                    continue
                volume = self._api.storage.find(volid)
                if volume is None:
                    raise TaskError(f"cannot determine size of volume '{volid}' - no such logical volume")
                self._info(f"include disk '{key}' '{volid}' {options.get('size', '')}".rstrip())
                volumes[key] = volume
                drives[key] = Archived(
                    volid=volid,
                    storage=volume.storage,
                    format=volume.format,
                    size=volume.size,
                    origin=volume.origin,
                    data=volume.content_id,
                )
        return drives, volumes

    def _config(self, vm: Vm) -> Config:
        for key in sorted(key for key in vm.config if UNUSED_KEY.fullmatch(key)):
            self._info(f"skip unused drive '{vm.config[key]}' (not included into backup)")
        if vm.pending:
            self._info("pending configuration changes found (not included into backup)")
        return {key: value for key, value in vm.config.items() if key != "lock" and not UNUSED_KEY.fullmatch(key)}

    def _copied(
        self,
        vm: Vm,
        mode: str,
        running: bool,
        drives: dict[str, Archived],
        volumes: dict[str, Volume],
        config: Config,
    ) -> Volume:
        extension = _EXTENSIONS[self._options.get("compress", "0")]
        volume = self._new_volume(extension, Archive(config=config, drives=drives))
        target = self._api.storage.path(volume)
        scratch = target.with_name(target.name.rpartition(".")[0] + ".dat")
        self._info(f"creating vzdump archive '{self._api.storage.shown_path(volume)}'")
        if not running and drives:
            self._info("starting kvm to execute backup task")
            with self._store.lock:
                # QEMU starts for this, with all that the VM has: also with a card that another one may hold now.
                self._api.running.check_start(vm)
        frozen = mode != "stop" and running and self._freeze(vm)
        total = sum(drive.size for drive in drives.values())
        try:
            self._info(f"started backup task '{uuid.uuid4()}'" if drives else "backup contains no disks")
            self._info(f"  0% (0 B of {_shown(total)}) in 0s, read: 0 B/s, write: 0 B/s")
            self._copy(scratch, volumes)
        except (TaskError, ApiError):
            scratch.unlink(missing_ok=True)
            if frozen:
                self._thaw()
            self._info("aborting backup job")
            raise
        # It is whole, and stays whatever befalls the task from here on: a real storage lists the files it finds.
        scratch.replace(target)
        volume.size = target.stat().st_size
        with self._store.lock:
            self._store.state.volumes.append(volume)
            self._store.save()
        if frozen:
            self._thaw()
        self._info(f"100% ({_shown(total)} of {_shown(total)})")
        self._info(f"archive file size: {_shown(volume.size)}")
        return volume

    def _copy(self, scratch: Path, volumes: dict[str, Volume]) -> None:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        self._api.power.pack(scratch, volumes)

    def _new_volume(self, extension: str, archive: Archive) -> Volume:
        now = int(time.time())
        while True:
            stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(now))
            name = f"backup/vzdump-qemu-{self._vmid}-{stamp}.{extension}"
            if self._api.storage.find(f"{self._storage}:{name}") is None:
                break
            # Only a lab makes two within a second.
            now += 1
        return Volume(
            storage=self._storage,
            name=name,
            content="backup",
            format=extension,
            size=0,
            ctime=now,
            vmid=self._vmid,
            archive=archive,
        )

    def _freeze(self, vm: Vm) -> bool:
        if not vmconfig.agent_enabled(vm.config):
            return False
        if not self._api.power.agent_runs(self._vmid):
            self._info("skipping guest-agent 'fs-freeze', agent configured but not running?")
            return False
        options = vmconfig.parse_properties(str(vm.config.get("agent", "")), "enabled")
        if any(vmconfig.switched_off(options, name) for name in ("guest-fsfreeze", "freeze-fs-on-backup")):
            self._info("skipping guest-agent 'fs-freeze', disabled in VM options")
            return False
        self._info("issuing guest-agent 'fs-freeze' command")
        try:
            self._api.power.freeze(self._vmid)
        except TaskError as error:
            self._log(f"ERROR: {error}")
        return True

    def _thaw(self) -> None:
        """Before the line that says so: a task that was told to stop ends at its next line."""
        problem = ""
        try:
            self._api.power.thaw(self._vmid)
        except TaskError as error:
            problem = str(error)
        self._info("issuing guest-agent 'fs-thaw' command")
        if problem:
            self._log(f"ERROR: {problem}")

    def _finish(self, volume: Volume) -> None:
        template = self._options.get("notes-template", "")
        with self._store.lock:
            if template:
                self._info("adding notes to backup")
                volume.notes = self._notes(template)
            if self._call.flag("protected"):
                self._info("marking backup as protected")
                volume.protected = True
            self._store.save()
            if self._removes and not self._keep.get("keep-all"):
                shown = ", ".join(f"{name}={self._keep[name]}" for name in sorted(self._keep))
                self._info(f"prune older backups with retention: {shown}")
                pruned = self._api.prune(self._storage, self._vmid, self._keep, self._log, "INFO: ")
                extra = " not covered by keep-retention policy" if pruned else ""
                self._info(f"pruned {pruned} backup(s){extra}")

    def _notes(self, template: str) -> str:
        vm = self._store.state.vms[self._vmid]
        known = {
            "cluster": "",
            "guestname": str(vm.config.get("name", f"VM {self._vmid}")),
            "node": self._store.state.node,
            "vmid": str(self._vmid),
        }
        text = re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], template)
        return re.sub(r"\{\{(\w+)\}\}", lambda match: known[match[1]], text)


class _Restore:
    """One qmrestore."""

    def __init__(self, api: BackupApi, call: Call, vm: Vm, volume: Volume, changes: dict[str, str], log: Log) -> None:
        assert volume.archive is not None
        self._api = api
        self._store = api.store
        self._call = call
        self._vm = vm
        self._volume = volume
        self._archive = volume.archive
        self._changes = changes
        self._log = log

    def run(self, reason: str) -> None:
        vm = self._vm
        with self._store.lock:
            if vm.config.get("protection"):
                raise TaskError(f"{reason} - protection mode enabled")
            if self._api.qemu.running(vm.vmid):
                raise TaskError(f"{reason} vm is running")
            self._check_config({**self._archive.config, **self._changes})
            targets = self._targets()
            old = dict(vm.config)
            vm.config, vm.pending = {"memory": "128", "lock": "create"}, {}
            self._store.save()
        self._log(f"restore vma archive: {self._api.storage.shown_path(self._volume)} (simulated format)")
        made: dict[str, Volume] = {}
        try:
            with self._store.lock:
                self._free_old(old, targets)
                for key, (storage, drive) in sorted(targets.items()):
                    made[key] = self._allocate(key, storage, drive)
                    self._log(f"new volume ID is '{made[key].volid}'")
                self._store.save()
            self._copy(made)
        except (TaskError, ApiError):
            with self._store.lock:
                for volume in made.values():
                    self._api.storage.free(volume.volid)
                self._store.save()
            for volume in made.values():
                self._log(f"temporary volume '{volume.volid}' successfully removed")
            raise
        with self._store.lock:
            vm.config = self._new_config(made)
            self._log("rescan volumes...")
            self._add_unreferenced()
            self._store.save()

    def _check_config(self, config: Mapping[str, int | str]) -> None:
        """Bridges and PCI mappings of the archive's configuration are the caller's to use, too."""
        if self._call.is_root:
            return
        for key, value in sorted(config.items()):
            if re.fullmatch(r"net\d+", key):
                bridge = vmconfig.parse_properties(str(value), "model").get("bridge")
                if bridge:
                    require_in_task(self._store, self._call, f"/sdn/zones/localnetwork/{bridge}", "SDN.Use")
            elif vmconfig.HOSTPCI_KEY.fullmatch(key):
                options = vmconfig.parse_properties(str(value), "host")
                if "host" in options:
                    raise TaskError(f"only root can set '{key}' config for non-mapped devices")
                require_in_task(self._store, self._call, f"/mapping/pci/{options['mapping']}", "Mapping.Use")

    def _targets(self) -> dict[str, tuple[str, Archived | None]]:
        """Where each drive goes: (storage, what the archive has of it); None for a cloud-init drive, made anew."""
        wanted = self._call.text("storage")
        found: dict[str, tuple[str, Archived | None]] = {
            key: (wanted or drive.storage, drive) for key, drive in self._archive.drives.items()
        }
        for key, value in self._archive.config.items():
            volume = vmconfig.parse_disk(value)[0]
            if DISK_KEY.fullmatch(key) and re.search(r"vm-\d+-cloudinit", volume):
                found[key] = (wanted or volume.partition(":")[0], None)
        for storage, _ in found.values():
            if "images" not in self._api.storage.storage(storage).content:
                raise TaskError(f"Content type 'images' is not available on storage '{storage}'")
            require_in_task(self._store, self._call, f"/storage/{storage}", "Datastore.AllocateSpace")
        return found

    def _free_old(self, old: Config, targets: Mapping[str, object]) -> None:
        """The drives that the backup brings replace those under their keys; others of the guest become unusedN."""
        for key, (volid, _) in _drives_of(old).items():
            volume = self._api.storage.find(volid)
            if key in targets and volume is not None and volume.vmid == self._vm.vmid:
                self._api.storage.free(volid)

    def _allocate(self, key: str, storage: str, drive: Archived | None) -> Volume:
        if drive is None:
            return self._api.storage.allocate_cloud_init(storage, self._vm.vmid)
        volume = self._api.storage.allocate(storage, self._vm.vmid, drive.size, origin=drive.origin, fmt=drive.format)
        volume.data = drive.data
        return volume

    def _copy(self, made: Mapping[str, Volume]) -> None:
        drives = {key: volume for key, volume in made.items() if key in self._archive.drives}
        for key, volume in drives.items():
            self._log(f"map 'drive-{key}' to '{volume.volid}' (write zeros = 0)")
        total = sum(volume.size for volume in drives.values())
        self._log("progress 1% (read 0 bytes, duration 0 sec)")
        self._api.power.unpack(self._api.storage.path(self._volume), drives)
        self._log(f"total bytes read {total}, sparse bytes 0 (0%)")

    def _new_config(self, made: Mapping[str, Volume]) -> Config:
        config: Config = {}
        unique = self._call.flag("unique")
        absent: list[str] = []
        for key, value in self._archive.config.items():
            if unique and re.fullmatch(r"net\d+", key):
                config[key] = re.sub(r"(?<==)(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", new_mac(), str(value), count=1)
            elif key == "vmgenid":
                config[key] = str(uuid.uuid4()) if str(value) != "0" else value
            elif unique and key == "smbios1":
                options = vmconfig.parse_properties(str(value)) | {"uuid": str(uuid.uuid4())}
                config[key] = ",".join(f"{name}={text}" for name, text in options.items())
            elif DISK_KEY.fullmatch(key):
                _, options = vmconfig.parse_disk(value)
                if vmconfig.switched_off(options, "backup"):
                    # PVE comments such a line out, and a comment in the file is part of the description.
                    absent.append(f"{key}: {value}")
                else:
                    config[key] = vmconfig.disk_text(made[key].volid, options) if key in made else value
            else:
                config[key] = value
        if absent:
            config["description"] = "\n".join([*str(config.get("description", "")).splitlines(), *absent])
        for key, text in self._changes.items():
            stored = vmconfig.normalised(key, text, new_mac())
            if stored is not None:
                config[key] = stored
        return config

    def _add_unreferenced(self) -> None:
        vm = self._vm
        named = vmconfig.volumes(vm.config)
        for volume in self._store.state.volumes:
            if volume.vmid == vm.vmid and volume.content == "images" and volume.volid not in named:
                key = vmconfig.free_number("unused", vm.config)
                vm.config[key] = volume.volid
                self._log(f"VM {vm.vmid} add unreferenced volume '{volume.volid}' as '{key}' to config")


def require_in_task(store: Store, call: Call, path: str, privilege: str) -> None:
    """A right that only the worker asks for: where PVE prints an exception, its status comes first.

    Raises:
        TaskError: it is missing.
    """
    try:
        access.require(store.state, call.user, path, privilege)
    except ApiError as error:
        raise TaskError(f"{error.status} {error}") from error


def _drives_of(config: Config) -> dict[str, tuple[str, dict[str, str]]]:
    """Every drive with a volume, cloud-init ones included."""
    return {
        key: vmconfig.parse_disk(config[key])
        for key in sorted(config)
        if DISK_KEY.fullmatch(key) and ":" in vmconfig.parse_disk(config[key])[0]
    }


def _shown(size: int) -> str:
    return f"{size / GIB:.2f}GB" if size >= GIB else f"{size // MIB}MB" if size >= MIB else f"{size // 1024}KB"
