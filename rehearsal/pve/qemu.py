# SPDX-License-Identifier: MIT
"""VMs: create, configure, resize, move disks, destroy. Power and the guest agent are in `running.py`.

The order of the checks is PVE's: privileges, then root-only keys, then locks and checksums.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from typing import Any

from rehearsal.pve import access, cloudinit, jobs, vmconfig
from rehearsal.pve.errors import ApiError, TaskError, bad_parameters, die, no_permission
from rehearsal.pve.power import Power
from rehearsal.pve.routing import Call, Route, needs
from rehearsal.pve.state import Config, ConfigValue, Store, Vm
from rehearsal.pve.storage import StorageApi
from rehearsal.pve.tasks import Log, Tasks
from rehearsal.pve.vmconfig import DISK_KEY, HOSTPCI_KEY, NEW_DISK, UNUSED_KEY

_QEMU_VERSION = "10.1.2"
# Parameters of create that are no configuration keys.
CREATE_ONLY = frozenset(
    [
        "node",
        "vmid",
        "archive",
        "bwlimit",
        "force",
        "ha-managed",
        "import-working-storage",
        "live-restore",
        "pool",
        "start",
        "storage",
        "unique",
    ]
)
# Parameters of a configuration write that are no configuration keys.
_WRITE_ONLY = frozenset(
    ["node", "vmid", "digest", "delete", "revert", "skiplock", "force", "background_delay", "import-working-storage"]
)
_ANY_CONFIG = [
    "VM.Config." + part for part in ["Disk", "CDROM", "CPU", "Memory", "Network", "HWType", "Options", "Cloudinit"]
]


class QemuApi:
    """/nodes/N/qemu: everything that changes what a VM is."""

    def __init__(self, store: Store, tasks: Tasks, storage: StorageApi, power: Power) -> None:
        self._store = store
        self._tasks = tasks
        self._storage = storage
        self._power = power
        # Called with (call, vmid) after a create that asked for `start`.
        self.start_vm: Any = None
        # Called with (call) for a create from an archive.
        self.restore: Any = None

    def routes(self) -> list[Route]:
        vms = "/nodes/{node}/qemu"
        one = vms + "/{vmid}"
        audit = needs("/vms/{vmid}", "VM.Audit")
        disk = needs("/vms/{vmid}", "VM.Config.Disk")
        return [
            Route("GET", vms, self._list),
            Route("POST", vms, self._create),
            Route("DELETE", one, self._destroy, needs("/vms/{vmid}", "VM.Allocate")),
            Route("GET", one + "/config", self._get_config, audit),
            Route("PUT", one + "/config", self._put_config, self._may_configure, unlocked=True),
            Route("POST", one + "/config", self._post_config, self._may_configure),
            Route("GET", one + "/pending", self._pending, audit),
            Route("PUT", one + "/resize", self._resize, disk),
            Route("POST", one + "/move_disk", self._move_disk, disk),
            Route("PUT", one + "/unlink", self._unlink, disk, unlocked=True),
            Route("GET", one + "/cloudinit", self._cloud_init, audit),
            Route("PUT", one + "/cloudinit", self._regenerate, needs("/vms/{vmid}", "VM.Config.Cloudinit")),
            Route("GET", one + "/cloudinit/dump", self._dump, audit),
            Route("GET", one + "/snapshot", self._snapshots, audit),
            Route("POST", one + "/snapshot", self._snapshot, needs("/vms/{vmid}", "VM.Snapshot")),
        ]

    # Shared with the power part. Callers hold the store's lock.

    def vm(self, vmid: int) -> Vm:
        found = self._store.state.vms.get(vmid)
        if found is None:
            die(f"Configuration file 'nodes/{self._store.state.node}/qemu-server/{vmid}.conf' does not exist")
        return found

    def running(self, vmid: int) -> bool:
        return self._power.running(vmid)

    def summary(self, vm: Vm) -> dict[str, Any]:
        """The figures that the VM list, the status and the cluster's resources share."""
        config = vm.config
        running = self.running(vm.vmid)
        memory = vmconfig.memory_mib(config) * 1024**2
        sizes = [
            options.get("size", "0")
            for key, (_, options) in vmconfig.disks(config).items()
            if not key.startswith(("efidisk", "tpmstate"))
        ]
        view: dict[str, Any] = {
            "vmid": vm.vmid,
            "name": str(config.get("name", f"VM{vm.vmid}")),
            "status": "running" if running else "stopped",
            "cpus": vmconfig.cpus(config),
            "cpu": 0,
            "maxmem": memory,
            "mem": memory if running else 0,
            "memhost": memory if running else 0,
            "maxdisk": vmconfig.parse_size(sizes[0]) if sizes else 0,
            "disk": 0,
            "netin": 0,
            "netout": 0,
            "uptime": max(1, int(time.time() - vm.started)) if running and vm.started else 0,
        }
        if running:
            view["pid"] = 1000 + vm.vmid
        for key in ("tags", "lock"):
            if key in config:
                view[key] = config[key]
        return view

    # Reading.

    def _list(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        return [
            self.summary(vm)
            for vmid, vm in sorted(state.vms.items())
            if access.may(state, call.user, f"/vms/{vmid}", "VM.Audit")
        ]

    def _get_config(self, call: Call) -> dict[str, Any]:
        vm = self.vm(call.vmid)
        config = dict(vm.config if call.flag("current") else vm.future())
        return config | {"digest": vmconfig.digest(vm.config, vm.pending)}

    def _pending(self, call: Call) -> list[dict[str, Any]]:
        vm = self.vm(call.vmid)
        entries: list[dict[str, Any]] = [{"key": "digest", "value": vmconfig.digest(vm.config, vm.pending)}]
        for key in sorted({*vm.config, *vm.pending}):
            entry: dict[str, Any] = {"key": key}
            if key in vm.config:
                entry["value"] = vm.config[key]
            if key in vm.pending:
                value = vm.pending[key]
                entry.update({"delete": 1} if value is None else {"pending": value})
            entries.append(entry)
        return entries

    def _cloud_init(self, call: Call) -> list[dict[str, Any]]:
        config = self.vm(call.vmid).future()
        keys = [
            key
            for key in sorted(config)
            if key in ("ciuser", "cicustom", "sshkeys", "nameserver", "searchdomain")
            or re.fullmatch(r"ipconfig\d+", key)
        ]
        return [{"key": key, "value": config[key]} for key in keys]

    def _regenerate(self, call: Call) -> None:
        self.vm(call.vmid)

    def _dump(self, call: Call) -> str:
        vm = self.vm(call.vmid)
        config = vm.future()
        kind = call.text("type")
        if kind == "user":
            return cloudinit.user_data(vm.vmid, config)
        return cloudinit.network_config(config) if kind == "network" else cloudinit.meta_data(vm.vmid, config)

    def _snapshots(self, call: Call) -> list[dict[str, Any]]:
        vm = self.vm(call.vmid)
        checksum = vmconfig.digest(vm.config, vm.pending)
        running = int(self.running(vm.vmid))
        return [{"name": "current", "description": "You are here!", "digest": checksum, "running": running}]

    def _snapshot(self, call: Call) -> str:
        """Never possible in the lab: a container's folder cannot be rolled back while the API looks on."""

        def body(log: Log) -> None:
            raise TaskError("snapshot feature is not available")

        self.vm(call.vmid)
        return self._tasks.start("qmsnapshot", call.vmid, call.user, body, call.vmid)

    # Creating.

    def _create(self, call: Call) -> str:
        state, vmid = self._store.state, call.vmid
        if call.text("archive"):
            return str(self.restore(call))
        if not access.may(state, call.user, f"/vms/{vmid}", "VM.Allocate"):
            no_permission()
        changes = {key: call.text(key) for key in call.params if key not in CREATE_ONLY}
        self.check_new_keys(call, vmid, changes)
        for each in self._store.cluster():
            if vmid in each.vms:
                die(f"unable to create VM {vmid} - VM {vmid} already exists on node '{each.node}'")
        vm = Vm(vmid=vmid, config={"lock": "create"})
        state.vms[vmid] = vm

        def body(log: Log) -> None:
            with self._store.lock:
                made: list[str] = []
                try:
                    config = self._new_config(vmid, changes, made, log)
                except (TaskError, ApiError) as error:
                    for volid in made:
                        self._storage.free(volid)
                    del state.vms[vmid]
                    raise TaskError(f"unable to create VM {vmid} - {error}") from error
                vm.config = config
                self._store.save()
            if call.flag("start"):
                self.start_vm(call, vmid)

        return self._tasks.start("qmcreate", vmid, call.user, body)

    def check_new_keys(self, call: Call, vmid: int, changes: dict[str, str]) -> None:
        """May the caller set these keys of a VM that is being made?"""
        self._check_booleans(call)
        self._check_keys(call, vmid, changes, [], creating=True)

    def _new_config(self, vmid: int, changes: dict[str, str], made: list[str], log: Log) -> Config:
        config: Config = {}
        for key in sorted(changes):
            value = changes[key]
            stored = (
                self._place_disk(vmid, key, value, made, log)
                if DISK_KEY.fullmatch(key)
                else vmconfig.normalised(key, value, new_mac())
            )
            if stored is not None:
                config[key] = stored
        config.setdefault("boot", f"order={self._first_disk(config)}")
        config.setdefault("smbios1", f"uuid={uuid.uuid4()}")
        config.setdefault("vmgenid", str(uuid.uuid4()))
        config["meta"] = f"creation-qemu={_QEMU_VERSION},ctime={int(time.time())}"
        return config

    @staticmethod
    def _first_disk(config: Config) -> str:
        return ";".join([key for key in vmconfig.disks(config) if not key.startswith(("efidisk", "tpmstate"))][:1])

    def _place_disk(self, vmid: int, key: str, value: str, made: list[str], log: Log) -> str:
        """What a drive becomes: a new volume, an imported one, or one that exists; `made` collects new volumes."""
        volume, options = vmconfig.parse_disk(value)
        if volume in ("none", "cdrom"):
            return vmconfig.disk_text(volume, options)
        if volume.endswith(":cloudinit"):
            new = self._storage.allocate_cloud_init(volume.partition(":")[0], vmid)
            options["media"] = "cdrom"
        elif (request := NEW_DISK.fullmatch(volume)) is not None:
            origin = options.get("import-from", "")
            size = self._import_size(origin) if origin else self._new_size(key, request["size"])
            if origin:
                log(f"create full clone of drive ({origin})")
            fmt = options.get("format", "")
            new = self._storage.allocate(request["storage"], vmid, size, origin=origin, fmt=fmt)
            options["size"] = vmconfig.size_text(new.size)
        else:
            known = self._storage.find(volume)
            if known is None:
                die(f"volume '{volume}' does not exist")
            if known.content == "images":
                options["size"] = vmconfig.size_text(known.size)
            return vmconfig.disk_text(volume, options)
        made.append(new.volid)
        text = vmconfig.disk_text(new.volid, options)
        log(f"{key}: successfully created disk '{text}'")
        return text

    def _new_size(self, key: str, gib: str) -> int:
        fixed = self._storage.fixed_size(key)
        return fixed if fixed is not None else vmconfig.parse_size(f"{gib}G")

    def _import_size(self, volid: str) -> int:
        image = self._storage.find(volid)
        if image is None:
            die(f"volume '{volid}' does not exist")
        return self._storage.image_size(image) if image.content == "import" else image.size

    # Configuring.

    @staticmethod
    def _may_configure(store: Store, call: Call) -> None:
        access.require_any(store.state, call.user, f"/vms/{call.vmid}", *_ANY_CONFIG)

    def _put_config(self, call: Call) -> None:
        changes, deletes = self._checked_write(call)
        with self._tasks.config_file(call.vmid), self._store.lock:
            self._write(call, changes, deletes, lambda line: None)

    def _post_config(self, call: Call) -> str:
        changes, deletes = self._checked_write(call)

        def body(log: Log) -> None:
            with self._store.lock:
                self._write(call, changes, deletes, log)

        return self._tasks.start("qmconfig", call.vmid, call.user, body, call.vmid)

    def _checked_write(self, call: Call) -> tuple[dict[str, str], list[str]]:
        """The checks that PVE makes before it takes the file's lock, and that answer at once."""
        with self._store.lock:
            self._check_booleans(call)
            changes = {key: call.text(key) for key in call.params if key not in _WRITE_ONLY}
            deletes = call.names("delete")
            if call.flag("skiplock") and not call.is_root:
                bad_parameters({"skiplock": "Only root may use this option."})
            for key in deletes:
                if key in changes:
                    bad_parameters({"delete": f"you can't use '-{key}' and -delete {key}' at the same time"})
            self._check_keys(call, call.vmid, changes, deletes, creating=False)
            self._check_write_state(call, self.vm(call.vmid))
        return changes, deletes

    def _check_write_state(self, call: Call, vm: Vm) -> None:
        if vm.lock and not call.flag("skiplock"):
            die(f"VM is locked ({vm.lock})")
        if call.text("digest") not in ("", vmconfig.digest(vm.config, vm.pending)):
            die("checksum mismatch (file change by other user?)")

    def _write(self, call: Call, changes: dict[str, str], deletes: list[str], log: Log) -> None:
        """Apply a checked write; the state is looked at again because a lock was waited for."""
        vm = self.vm(call.vmid)
        self._check_write_state(call, vm)
        running = self.running(vm.vmid)
        hotplug = str(vm.config.get("hotplug", "network,disk,usb"))
        for key in deletes:
            self._delete_key(vm, key, running, hotplug)
        made: list[str] = []
        try:
            for key, value in sorted(changes.items()):
                self._set_key(vm, key, value, running, hotplug, made, log)
        except (TaskError, ApiError):
            for volid in made:
                if volid not in vmconfig.volumes(vm.config):
                    self._storage.free(volid)
            raise
        if not running:
            vm.apply_pending()
        self._store.save()

    def _set_key(self, vm: Vm, key: str, value: str, running: bool, hotplug: str, made: list[str], log: Log) -> None:
        old = vm.future().get(key)
        stored: ConfigValue | None
        if DISK_KEY.fullmatch(key):
            if running and old is not None and self._changes_volume(old, value):
                bad_parameters({key: f"hotplug problem - error unplugging device '{key}'\n"})
            stored = self._place_disk(vm.vmid, key, value, made, log)
        else:
            stored = vmconfig.normalised(key, value, cloudinit.mac_of(str(old)) if old else new_mac())
        if running and not vmconfig.live(key, hotplug, stored, old):
            vm.pending[key] = stored
            return
        if stored is None:
            vm.config.pop(key, None)
        else:
            self._replace_volume(vm, key, str(stored))
            vm.config[key] = stored
            if running and DISK_KEY.fullmatch(key) and old is None:
                self._plug(vm.vmid, key, str(stored))
        vm.pending.pop(key, None)

    def _plug(self, vmid: int, key: str, stored: str) -> None:
        volume = self._storage.find(vmconfig.parse_disk(stored)[0])
        if volume is not None and volume.content == "images":
            self._power.attach(vmid, key, volume)

    @staticmethod
    def _changes_volume(old: ConfigValue, new: str) -> bool:
        return vmconfig.parse_disk(old)[0] != vmconfig.parse_disk(new)[0] and not vmconfig.is_cdrom(old)

    def _replace_volume(self, vm: Vm, key: str, stored: str) -> None:
        """A drive that gets another volume leaves its old one behind as unusedN, never deleted."""
        if not DISK_KEY.fullmatch(key):
            return
        new = vmconfig.parse_disk(stored)[0]
        for other in [k for k in vm.config if UNUSED_KEY.fullmatch(k) and vm.config[k] == new]:
            del vm.config[other]
        old = vmconfig.parse_disk(vm.config[key])[0] if key in vm.config else ""
        if old and old != new and ":" in old:
            if vmconfig.is_cdrom(vm.config[key]):
                self._free_cloud_init(vm, key)
            else:
                vm.config[vmconfig.free_number("unused", vm.config)] = old

    def _free_cloud_init(self, vm: Vm, key: str) -> None:
        volume = vmconfig.parse_disk(vm.config[key])[0]
        if re.search(rf"vm-{vm.vmid}-cloudinit", volume):
            self._storage.free(volume)

    def _delete_key(self, vm: Vm, key: str, running: bool, hotplug: str) -> None:
        if key not in vm.future():
            vm.pending.pop(key, None)
            return
        protected = bool(vm.config.get("protection"))
        if UNUSED_KEY.fullmatch(key):
            volume = str(vm.config[key])
            if protected:
                die(f"can't remove unused disk {volume} - protection mode enabled")
            self._storage.free(volume)
        elif DISK_KEY.fullmatch(key) and not vmconfig.is_cdrom(vm.future()[key]) and protected:
            die(f"can't remove drive '{key}' - protection mode enabled")
        if running and not vmconfig.live(key, hotplug, None, vm.config.get(key)):
            if key in vm.config:
                vm.pending[key] = None
            else:
                vm.pending.pop(key)
            return
        self._drop_drive(vm, key)
        vm.config.pop(key, None)
        vm.pending.pop(key, None)

    def _drop_drive(self, vm: Vm, key: str) -> None:
        """Taking a drive away frees a cloud-init drive and keeps a disk as unusedN."""
        if not DISK_KEY.fullmatch(key) or key not in vm.config:
            return
        volume = vmconfig.parse_disk(vm.config[key])[0]
        if vmconfig.is_cdrom(vm.config[key]):
            self._free_cloud_init(vm, key)
        elif ":" in volume:
            vm.config[vmconfig.free_number("unused", vm.config)] = volume

    def apply_pending(self, vm: Vm) -> None:
        """What a start or a stop does with the pending section; a drive that goes leaves its volume as unusedN."""
        for key, value in vm.pending.items():
            if value is None:
                self._drop_drive(vm, key)
            else:
                self._replace_volume(vm, key, str(value))
        vm.apply_pending()

    # Privileges and root-only keys.

    def _check_booleans(self, call: Call) -> None:
        """Booleans are 0 or 1 on the wire; fakepve also takes words, PVE does not."""
        for key in call.params:
            if key in vmconfig.BOOLEAN_KEYS and call.text(key) not in ("0", "1"):
                bad_parameters({key: f"type check ('boolean') failed - got '{call.text(key)}'"})

    def _check_keys(
        self, call: Call, vmid: int, changes: dict[str, str], deletes: list[str], *, creating: bool
    ) -> None:
        current = self._store.state.vms[vmid].future() if vmid in self._store.state.vms else {}
        for key in sorted({*changes, *deletes}):
            value = changes.get(key)
            if HOSTPCI_KEY.fullmatch(key):
                self._check_hostpci(call, vmid, key, value)
            elif DISK_KEY.fullmatch(key) or UNUSED_KEY.fullmatch(key):
                self._check_drive(call, vmid, key, value, current.get(key), creating=creating)
            elif re.fullmatch(r"serial\d", key):
                self._require(call, vmid, "VM.Config.HWType")
                if value not in (None, "socket") and not call.is_root:
                    die(f"only root can set '{key}' config")
            elif re.fullmatch(r"usb\d+", key):
                self._require(call, vmid, "VM.Config.HWType")
                if value is not None and not value.startswith("spice") and not call.is_root:
                    die(f"only root can set '{key}' config")
            else:
                self._check_plain_key(call, vmid, key, value)
        for key, value in changes.items():
            if re.fullmatch(r"net\d+", key):
                self._check_bridge(call, value)

    def _check_plain_key(self, call: Call, vmid: int, key: str, value: str | None) -> None:
        if key == "hookscript" and value is not None:
            bad_parameters({"hookscript": f"script '{value}' does not exist\n"})
        privilege = vmconfig.privilege_for(key)
        if privilege is None:
            if not call.is_root:
                die(f"only root can set '{key}' config")
            return
        if key == "startup":
            # It changes when the host starts, not only the VM.
            access.require(self._store.state, call.user, "/", "Sys.Modify")
        self._require(call, vmid, *privilege.split("|"))

    def _require(self, call: Call, vmid: int, *privileges: str) -> None:
        access.require_any(self._store.state, call.user, f"/vms/{vmid}", *privileges)

    def _check_hostpci(self, call: Call, vmid: int, key: str, value: str | None) -> None:
        state = self._store.state
        old = state.vms[vmid].future().get(key) if vmid in state.vms else None
        options = vmconfig.check_hostpci(key, value, state.release) if value is not None else {}
        if not call.is_root:
            if "romfile" in options:
                bad_parameters({key: "only root@pam can set 'romfile' option"})
            for known in filter(None, [options, vmconfig.parse_properties(str(old or ""), "host")]):
                if "host" in known:
                    die(f"only root can set '{key}' config for non-mapped devices")
                access.require(state, call.user, f"/mapping/pci/{known['mapping']}", "Mapping.Use")
        self._require(call, vmid, "VM.Config.HWType")

    def _check_drive(
        self, call: Call, vmid: int, key: str, value: str | None, old: ConfigValue | None, *, creating: bool
    ) -> None:
        state = self._store.state
        if value is None:
            self._require(call, vmid, "VM.Config.CDROM" if vmconfig.is_cdrom(old or "") else "VM.Config.Disk")
            return
        volume, options = vmconfig.parse_disk(value)
        if vmconfig.is_cdrom(value):
            if not creating:
                self._require(call, vmid, "VM.Config.CDROM")
        else:
            self._require(call, vmid, "VM.Config.Disk")
        for path in (volume, options.get("import-from", "")):
            if path.startswith("/") and not call.is_root:
                die("Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651.")
        new = NEW_DISK.fullmatch(volume)
        if new is not None or volume.endswith(":cloudinit"):
            storage = volume.partition(":")[0]
            access.require(state, call.user, f"/storage/{storage}", "Datastore.AllocateSpace")
            if "images" not in self._storage.storage(storage).content:
                bad_parameters({"storage": f"storage '{storage}' does not support vm images"})
        source = options.get("import-from", "")
        if source:
            storage = source.partition(":")[0]
            self._storage.storage(storage)
            access.require_any(state, call.user, f"/storage/{storage}", "Datastore.Audit", "Datastore.AllocateSpace")

    def _check_bridge(self, call: Call, net: str) -> None:
        bridge = vmconfig.parse_properties(net, "model").get("bridge")
        if bridge:
            access.require(self._store.state, call.user, f"/sdn/zones/localnetwork/{bridge}", "SDN.Use")

    # Disks of an existing VM.

    def _resize(self, call: Call) -> str:
        vm = self.vm(call.vmid)
        self._check_write_state(call, vm)
        key, wanted = call.text("disk"), call.text("size")
        if key not in vmconfig.disks(vm.config):
            die(f"disk '{key}' does not exist")

        def body(log: Log) -> None:
            with self._store.lock:
                volid, options = vmconfig.parse_disk(vm.config[key])
                volume = self._storage.find(volid)
                if volume is None:
                    raise TaskError(f"volume '{volid}' does not exist")
                access.require(self._store.state, call.user, f"/storage/{volume.storage}", "Datastore.AllocateSpace")
                size = vmconfig.parse_size(wanted.lstrip("+")) + (volume.size if wanted.startswith("+") else 0)
                if size < volume.size:
                    raise TaskError("shrinking disks is not supported")
                volume.size = size
                self._power.resize(vm.vmid, volume)
                options["size"] = vmconfig.size_text(size)
                vm.config[key] = vmconfig.disk_text(volid, options)
                log("Image resized.")

        return self._tasks.start("resize", vm.vmid, call.user, body, vm.vmid)

    def _move_disk(self, call: Call) -> str:
        """Only the form the tool needs: a disk goes to another VM of the node, `target-vmid` and `target-disk`."""
        source, key = self.vm(call.vmid), call.text("disk")
        if not call.text("target-vmid"):
            die("moving a disk between storages is not possible in the rehearsal lab (simulated)")
        target = self.vm(call.number("target-vmid"))
        slot = call.text("target-disk", key)
        access.require(self._store.state, call.user, f"/vms/{target.vmid}", "VM.Config.Disk")
        self._check_write_state(call, source)
        if call.text("target-digest") not in ("", vmconfig.digest(target.config, target.pending)):
            die(f"VM {target.vmid}: checksum mismatch (file change by other user?)")
        if key not in source.config:
            die(f"Disk '{key}' for VM '{source.vmid}' does not exist")
        if slot in target.config:
            die(f"Target disk key '{slot}' is already in use for VM '{target.vmid}'")
        if self.running(source.vmid) and not UNUSED_KEY.fullmatch(key):
            die("Cannot move disk of running VM to another VM")

        def body(log: Log) -> None:
            with self._store.lock:
                volid, options = vmconfig.parse_disk(source.config[key])
                log(f"moving disk '{key}' from VM '{source.vmid}' to '{target.vmid}'")
                volume = self._storage.rename(volid, target.vmid)
                # A worker killed here leaves the volume with its new owner and no configuration that names it.
                log(f"removing disk '{key}' from VM '{source.vmid}' config")
                del source.config[key]
                text = volume.volid if UNUSED_KEY.fullmatch(slot) else vmconfig.disk_text(volume.volid, options)
                target.config[slot] = text

        return self._tasks.start("qmmove", source.vmid, call.user, body, source.vmid)

    def _unlink(self, call: Call) -> None:
        """Detach drives; `force` deletes them, as deleting the unusedN they become would."""
        keys = call.names("idlist")
        with self._tasks.config_file(call.vmid), self._store.lock:
            vm = self.vm(call.vmid)
            self._check_write_state(call, vm)
            for key in keys:
                volume = vmconfig.parse_disk(vm.config[key])[0] if key in vm.config else ""
                self._delete_key(vm, key, running=False, hotplug="")
                if call.flag("force"):
                    for unused in [k for k in vm.config if UNUSED_KEY.fullmatch(k) and vm.config[k] == volume]:
                        self._delete_key(vm, unused, running=False, hotplug="")
            self._store.save()

    # Destroying.

    def _destroy(self, call: Call) -> str:
        self._check_booleans(call)
        if call.flag("skiplock") and not call.is_root:
            bad_parameters({"skiplock": "Only root may use this option."})
        vm = self.vm(call.vmid)
        if vm.config.get("protection"):
            die(f"can't remove VM {vm.vmid} - protection mode enabled")
        if self.running(vm.vmid):
            die(f"VM {vm.vmid} is running - destroy failed")

        def body(log: Log) -> None:
            with self._store.lock:
                if vm.lock and not call.flag("skiplock"):
                    raise TaskError(f"VM is locked ({vm.lock})")
                self._free_disks(vm, call.flag("destroy-unreferenced-disks"), log)
                state = self._store.state
                # Until the end the id is taken: a worker killed here leaves a VM that is no more than this.
                vm.config, vm.pending = {"lock": "destroyed"}, {}
                log(f"removing the configuration of VM {vm.vmid}")
                del state.vms[vm.vmid]
                # PVE forgets the VM's access rules too: whoever makes it again needs rights on /vms.
                state.acl[:] = [entry for entry in state.acl if entry.path != f"/vms/{vm.vmid}"]
                if call.flag("purge"):
                    log(f"purging VM {vm.vmid} from related configurations..")
                    jobs.forget_guest(self._store, vm.vmid)

        return self._tasks.start("qmdestroy", vm.vmid, call.user, body, vm.vmid)

    def _free_disks(self, vm: Vm, unreferenced: bool, log: Log) -> None:
        named = set(vmconfig.volumes(vm.config))
        owned = {volume.volid for volume in self._store.state.volumes if volume.vmid == vm.vmid}
        for volid in sorted(owned if unreferenced else owned & named):
            log(f'  Logical volume "{volid.partition(":")[2]}" successfully removed.')
            self._storage.free(volid)


def new_mac() -> str:
    """A MAC in Proxmox' own range."""
    return "BC:24:11:" + ":".join(f"{byte:02X}" for byte in secrets.token_bytes(3))
