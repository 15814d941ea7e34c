# SPDX-License-Identifier: MIT
"""A VM's power and its guest agent."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from rehearsal.pve import access, cloudinit, vmconfig
from rehearsal.pve.errors import ApiError, TaskError, bad_parameters, die
from rehearsal.pve.mapping import MappingApi, used_by
from rehearsal.pve.power import GuestStart, PciDevice, Power
from rehearsal.pve.qemu import QemuApi
from rehearsal.pve.routing import Call, Guard, Route, needs
from rehearsal.pve.state import MIB, Config, Store, Vm
from rehearsal.pve.storage import StorageApi
from rehearsal.pve.tasks import Body, Log, Tasks

# Seconds a guest gets to shut down when the request names none; for all guests of a node, and the most it may name.
_SHUTDOWN_TIMEOUT = 60
_STOP_ALL_TIMEOUT = 180
_STOP_ALL_TIMEOUT_MAX = 7200
# What the node itself needs, in MiB; a VM beyond the rest does not start.
HOST_MEMORY_MIB = 2048
# PVE returns at most this much of a file, in bytes.
_FILE_READ_MAX = 16 * MIB


class RunningApi:
    """/nodes/N/qemu/ID/status and /agent."""

    def __init__(
        self, store: Store, tasks: Tasks, storage: StorageApi, qemu: QemuApi, mappings: MappingApi, power: Power
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._storage = storage
        self._qemu = qemu
        self._mappings = mappings
        self._power = power
        # Devices of VMs that run or are being started.
        self._held: dict[int, Sequence[PciDevice]] = {}
        self._commands: dict[tuple[int, int], _AgentCommand] = {}
        self._pids = itertools.count(2000)

    def routes(self) -> list[Route]:
        one = "/nodes/{node}/qemu/{vmid}"
        status, agent = one + "/status", one + "/agent"
        power = needs("/vms/{vmid}", "VM.PowerMgmt")
        return [
            Route("GET", status + "/current", self._current, needs("/vms/{vmid}", "VM.Audit")),
            Route("POST", status + "/start", self._start, power),
            Route("POST", status + "/stop", self._stop, power),
            Route("POST", status + "/shutdown", self._shutdown, power),
            Route("POST", status + "/reboot", self._reboot, power),
            Route("POST", status + "/reset", self._reset, power),
            Route("POST", agent + "/ping", self._ping, _agent_guard("Audit")),
            Route("GET", agent + "/network-get-interfaces", self._interfaces, _agent_guard("Audit"), unlocked=True),
            Route("GET", agent + "/get-host-name", self._host_name, _agent_guard("Audit"), unlocked=True),
            Route("POST", agent + "/exec", self._exec, _agent_guard("Unrestricted"), unlocked=True),
            Route("GET", agent + "/exec-status", self._exec_status, _agent_guard("Unrestricted")),
            Route(
                "GET", agent + "/file-read", self._file_read, _agent_guard("FileRead", "Unrestricted"), unlocked=True
            ),
            Route("POST", "/nodes/{node}/startall", self._start_all, _bulk_guard),
            Route("POST", "/nodes/{node}/stopall", self._stop_all, _bulk_guard),
        ]

    # Power.

    def start_vm(self, call: Call, vmid: int) -> str:
        """Start a VM as a worker of the caller's."""

        def body(log: Log) -> None:
            self.bring_up(vmid)

        return self._tasks.start("qmstart", vmid, call.user, body, vmid)

    def release_stopped(self) -> None:
        """Forget the devices of guests that ended by themselves; callers hold the store's lock."""
        for vmid in [vmid for vmid in self._held if not self._power.running(vmid)]:
            del self._held[vmid]

    def bring_up(self, vmid: int, skiplock: bool = False) -> None:
        """Start a VM, as part of another worker."""
        with self._store.lock:
            vm = self._qemu.vm(vmid)
            if vm.lock and not skiplock:
                raise TaskError(f"VM is locked ({vm.lock})")
            if self._qemu.running(vmid):
                raise TaskError(f"VM {vmid} already running")
            if vm.config.get("template"):
                raise TaskError("you can't start a vm if it's a template")
            self._qemu.apply_pending(vm)
            guest = self._prepared(vm)
            self._held[vmid] = guest.gpus
            self._store.save()
        try:
            self._power.start(guest)
        except TaskError:
            with self._store.lock:
                self._held.pop(vmid, None)
            raise
        with self._store.lock:
            vm.started = time.time()
            self._store.save()

    def check_start(self, vm: Vm) -> None:
        """What would keep the VM from starting now; callers hold the store's lock.

        Raises:
            TaskError: in the words of the start.
        """
        self._prepared(vm)

    def _prepared(self, vm: Vm) -> GuestStart:
        """All checks of a start, in PVE's order; callers hold the store's lock."""
        config = vm.config
        self._check_resources(config)
        vendor = self._custom_data(config)
        system, data = None, []
        for slot, (volid, _) in vmconfig.disks(config).items():
            volume = self._storage.find(volid)
            if volume is None:
                raise TaskError(f"no such logical volume {volid.replace(':vm-', '/vm-')}")
            if slot.startswith(("efidisk", "tpmstate")):
                continue
            if volume.origin:
                system = volume
            else:
                data.append((slot, volume))
        address, gateway = cloudinit.address_of(config)
        seed = {
            "user-data": cloudinit.user_data(vm.vmid, config),
            "meta-data": cloudinit.meta_data(vm.vmid, config),
            "network-config": cloudinit.network_config(config, interface="host0"),
        }
        return GuestStart(
            node=self._store.state.node,
            vmid=vm.vmid,
            name=str(config.get("name", f"VM{vm.vmid}")),
            system=system,
            data=data,
            seed=seed | vendor,
            address=address,
            gateway=gateway,
            gpus=self._devices(vm),
            memory_mib=vmconfig.memory_mib(config),
            agent=vmconfig.agent_enabled(config),
            link_up=vmconfig.link_up(config),
        )

    def _check_resources(self, config: Config) -> None:
        state = self._store.state
        cores = vmconfig.cpus(config)
        if cores > state.cores:
            raise TaskError(f"MAX {state.cores} vcpus allowed per VM on this node")
        if vmconfig.memory_mib(config) > self.free_memory_mib():
            raise TaskError("start failed: QEMU exited with code 1")

    def free_memory_mib(self) -> int:
        """MiB left on the node beside its own needs and the VMs that run."""
        state = self._store.state
        running = [vm for vm in state.vms.values() if self._qemu.running(vm.vmid)]
        return state.memory // MIB - HOST_MEMORY_MIB - sum(vmconfig.memory_mib(vm.config) for vm in running)

    def _custom_data(self, config: Config) -> dict[str, str]:
        """The files that cicustom names, by the NoCloud file they replace or add."""
        names = {"user": "user-data", "vendor": "vendor-data", "network": "network-config", "meta": "meta-data"}
        found = {}
        for kind, volid in vmconfig.parse_properties(str(config.get("cicustom", ""))).items():
            storage, _, path = volid.partition(":")
            if "snippets" not in self._storage.storage(storage).content:
                raise TaskError(f"storage '{storage}' is not configured for content-type 'snippets'")
            text = self._power.snippet(path)
            if text is None:
                raise TaskError(f"volume '{volid}' does not exist")
            found[names[kind]] = text
        return found

    def _devices(self, vm: Vm) -> list[PciDevice]:
        self.release_stopped()
        taken = used_by({vmid: devices for vmid, devices in self._held.items() if vmid != vm.vmid})
        devices: list[PciDevice] = []
        for key in sorted(key for key in vm.config if vmconfig.HOSTPCI_KEY.fullmatch(key)):
            for device in self._mappings.devices_of(vmconfig.parse_properties(str(vm.config[key]), "host"), taken):
                if device in devices:
                    raise TaskError(f"device '{device.address}' assigned more than once")
                devices.append(device)
        return devices

    def hold_again(self) -> None:
        """After a restart of the front: the devices of VMs that kept running are still theirs."""
        with self._store.lock:
            for vm in self._store.state.vms.values():
                if self._qemu.running(vm.vmid):
                    try:
                        self._held[vm.vmid] = self._devices(vm)
                    except (TaskError, ApiError):
                        self._held[vm.vmid] = []

    def _current(self, call: Call) -> dict[str, Any]:
        vm = self._qemu.vm(call.vmid)
        view = self._qemu.summary(vm)
        view.update(qmpstatus=view["status"], ha={"managed": 0}, agent=int(vmconfig.agent_enabled(vm.config)))
        if "serial0" in vm.config:
            view["serial"] = 1
        return view

    def _start(self, call: Call) -> str:
        self._qemu.vm(call.vmid)
        return self.start_vm(call, call.vmid)

    def _unlocked_vm(self, call: Call) -> Vm:
        vm = self._qemu.vm(call.vmid)
        if vm.lock and not (call.flag("skiplock") and call.is_root):
            die(f"VM is locked ({vm.lock})")
        return vm

    def _stop(self, call: Call) -> str:
        vm = self._unlocked_vm(call)

        def body(log: Log) -> None:
            self._power.stop(vm.vmid)
            self._ended(vm)

        return self._tasks.start("qmstop", vm.vmid, call.user, body, vm.vmid)

    def _shutdown(self, call: Call) -> str:
        vm = self._unlocked_vm(call)
        if not self._qemu.running(vm.vmid):
            die(f"VM {vm.vmid} not running")
        timeout = call.number("timeout", _SHUTDOWN_TIMEOUT)
        return self._shut_down(vm, call.user, timeout, call.flag("forceStop"))

    def _shut_down(self, vm: Vm, user: str, timeout: float, force: bool) -> str:
        """A worker that shuts the VM down, and with `force` stops one that still runs after `timeout` seconds."""
        body: Body = lambda log: self.power_down(vm, timeout, force, log)  # noqa: E731
        return self._tasks.start("qmshutdown", vm.vmid, user, body, vm.vmid)

    def power_down(self, vm: Vm, timeout: float, force: bool, log: Log) -> None:
        """Shut a VM down, as part of another worker."""
        if not self._power.shutdown(vm.vmid, timeout):
            if not force:
                raise TaskError("VM quit/powerdown failed - got timeout")
            log("VM still running - terminating now with SIGTERM")
            self._power.stop(vm.vmid)
        self._ended(vm)

    def _ended(self, vm: Vm) -> None:
        with self._store.lock:
            vm.started = None
            self._held.pop(vm.vmid, None)
            self._qemu.apply_pending(vm)
            self._store.save()

    def _reboot(self, call: Call) -> str:
        """PVE's reboot is a shutdown and a start: pending changes take effect, unlike a reboot from inside."""
        vm = self._unlocked_vm(call)
        if not self._qemu.running(vm.vmid):
            die(f"VM {vm.vmid} not running")

        def body(log: Log) -> None:
            self.power_down(vm, call.number("timeout", _SHUTDOWN_TIMEOUT), call.flag("forceStop"), log)
            self.bring_up(vm.vmid)

        return self._tasks.start("qmreboot", vm.vmid, call.user, body, vm.vmid)

    def _reset(self, call: Call) -> str:
        vm = self._unlocked_vm(call)
        if not self._qemu.running(vm.vmid):
            die(f"VM {vm.vmid} not running")

        def body(log: Log) -> None:
            with self._store.lock:
                guest = self._prepared(vm)
            self._power.stop(vm.vmid)
            self._power.start(guest)

        return self._tasks.start("qmreset", vm.vmid, call.user, body, vm.vmid)

    def _start_all(self, call: Call) -> str:
        """What pve-guests.service does when a node has booted; `force`: also guests without `onboot`.

        Those of one order are started together, then their tasks are waited for. PVE also lets three seconds pass
        after each to spread the load; here only a delay that `startup` asks for is kept.
        """

        def body(log: Log) -> None:
            for vms in self._in_order(call, only_onboot=not call.flag("force")):
                started = {}
                for vm, startup in vms:
                    if self._qemu.running(vm.vmid):
                        continue
                    log(f"Starting VM {vm.vmid}")
                    started[vm.vmid] = self.start_vm(call, vm.vmid)
                    if delay := int(startup.get("up", 0)):
                        log(f"Waiting for {delay} seconds (startup delay)")
                        time.sleep(delay)
                for vmid, upid in started.items():
                    if (status := self._tasks.wait(upid)) != "OK":
                        log(f"Starting VM {vmid} failed: {status}")

        return self._tasks.start("startall", "", call.user, body)

    def _stop_all(self, call: Call) -> str:
        """What pve-guests.service does before a node goes down: a shutdown task for each guest that runs.

        As in PVE this task ends well also when one of those did not.
        """
        timeout, force = call.number("timeout", _STOP_ALL_TIMEOUT), call.flag("force-stop", True)
        if not 0 <= timeout <= _STOP_ALL_TIMEOUT_MAX:
            side = "minimum value of 0" if timeout < 0 else f"maximum value of {_STOP_ALL_TIMEOUT_MAX}"
            bad_parameters({"timeout": f"value must have a {side}\n"})

        def body(log: Log) -> None:
            for vms in reversed(self._in_order(call)):
                workers = []
                for vm, startup in reversed(vms):
                    if not self._qemu.running(vm.vmid):
                        continue
                    seconds = int(startup.get("down", timeout))
                    log(f"Stopping VM {vm.vmid} (timeout = {seconds} seconds)")
                    if vm.lock:
                        log(f"VM is locked ({vm.lock})")
                        continue
                    workers.append(self._shut_down(vm, call.user, seconds, force))
                for upid in workers:
                    self._tasks.wait(upid)

        return self._tasks.start("stopall", "", call.user, body)

    def _in_order(self, call: Call, only_onboot: bool = False) -> list[list[tuple[Vm, dict[str, str]]]]:
        """The VMs that a call for many is about, with what `startup` says of each, in the order in which they start.

        One list for each `order`, those without one last; in it by their ids. `vms` leaves out all others.
        """
        wanted = {int(name) for name in call.names("vms")}
        orders: dict[float, list[tuple[Vm, dict[str, str]]]] = {}
        with self._store.lock:
            for vmid, vm in sorted(self._store.state.vms.items()):
                if (wanted and vmid not in wanted) or vm.config.get("template"):
                    continue
                if only_onboot and not vm.config.get("onboot"):
                    continue
                startup = vmconfig.parse_properties(str(vm.config.get("startup", "")), "order")
                orders.setdefault(float(startup.get("order", "inf")), []).append((vm, startup))
        return [orders[order] for order in sorted(orders)]

    # The guest agent.

    def _agent_vm(self, call: Call) -> int:
        with self._store.lock:
            vm = self._qemu.vm(call.vmid)
            if not self._qemu.running(vm.vmid):
                die(f"VM {vm.vmid} is not running")
            if not vmconfig.agent_enabled(vm.config):
                die("No QEMU guest agent configured")
        if not self._power.agent_runs(vm.vmid):
            die("QEMU guest agent is not running")
        return vm.vmid

    def _ping(self, call: Call) -> dict[str, Any]:
        self._agent_vm(call)
        return {"result": {}}

    def _interfaces(self, call: Call) -> dict[str, Any]:
        vmid = self._agent_vm(call)
        output = self._power.run(vmid, ["ip", "-o", "address", "show"], b"").stdout.decode()
        links = self._power.run(vmid, ["ip", "-o", "link", "show"], b"").stdout.decode()
        return {"result": interfaces_view(output, links)}

    def _host_name(self, call: Call) -> dict[str, Any]:
        vmid = self._agent_vm(call)
        name = self._power.run(vmid, ["cat", "/proc/sys/kernel/hostname"], b"").stdout.decode().strip()
        return {"result": {"host-name": name}}

    def _exec(self, call: Call) -> dict[str, Any]:
        vmid = self._agent_vm(call)
        command = _AgentCommand(self._power, vmid, call.items("command"), call.text("input-data").encode())
        pid = next(self._pids)
        self._commands[vmid, pid] = command
        return {"pid": pid}

    def _exec_status(self, call: Call) -> dict[str, Any]:
        vmid = self._agent_vm(call)
        command = self._commands.get((vmid, call.number("pid")))
        if command is None:
            die(f"Agent error: Invalid parameter 'pid' (PID {call.text('pid')} does not exist)")
        view = command.view()
        if view["exited"]:
            # As the agent does: a result is handed out once.
            del self._commands[vmid, call.number("pid")]
        return view

    def _file_read(self, call: Call) -> dict[str, Any]:
        vmid, path = self._agent_vm(call), call.text("file")
        read = self._power.run(vmid, ["cat", "--", path], b"")
        if read.returncode:
            die(f"Agent error: failed to open file '{path}' (mode: 'r'): No such file or directory")
        content = read.stdout[:_FILE_READ_MAX]
        return {"content": content.decode("latin-1"), "bytes-read": len(content)}


class _AgentCommand:
    """A command that the agent started; it runs in a thread of the front, in the guest."""

    def __init__(self, power: Power, vmid: int, argv: Sequence[str], stdin: bytes) -> None:
        self._result: subprocess.CompletedProcess[bytes] | None = None
        self._thread = threading.Thread(target=self._run, args=(power, vmid, argv, stdin), daemon=True)
        self._thread.start()

    def _run(self, power: Power, vmid: int, argv: Sequence[str], stdin: bytes) -> None:
        try:
            self._result = power.run(vmid, argv, stdin)
        except (OSError, TaskError) as error:
            self._result = subprocess.CompletedProcess(list(argv), 127, b"", str(error).encode())

    def view(self) -> dict[str, Any]:
        if self._result is None:
            return {"exited": 0}
        view: dict[str, Any] = {"exited": 1, "exitcode": self._result.returncode}
        if self._result.returncode < 0:
            view = {"exited": 1, "signal": -self._result.returncode}
        for key, data in (("out-data", self._result.stdout), ("err-data", self._result.stderr)):
            if data:
                view[key] = data.decode(errors="replace")
        return view


def interfaces_view(addresses: str, links: str) -> list[dict[str, Any]]:
    """The agent's list of interfaces, from the one-line output of `ip address` and `ip link`."""
    found: dict[str, dict[str, Any]] = {}
    for line in links.splitlines():
        parts = line.split()
        name = parts[1].rstrip(":").partition("@")[0]
        kind = next((part for part in parts if part.startswith("link/")), "")
        entry: dict[str, Any] = {"name": name, "ip-addresses": []}
        if kind:
            entry["hardware-address"] = parts[parts.index(kind) + 1]
        found[name] = entry
    for line in addresses.splitlines():
        _, name, family, address = line.split()[:4]
        ip, _, prefix = address.partition("/")
        if family in ("inet", "inet6") and name in found:
            kind = "ipv4" if family == "inet" else "ipv6"
            found[name]["ip-addresses"].append({"ip-address": ip, "ip-address-type": kind, "prefix": int(prefix)})
    return list(found.values())


def _bulk_guard(store: Store, call: Call) -> None:
    """The right to switch all guests of a node, or each of those that are named.

    Raises:
        ApiError: it is missing, or `vms` is no list of ids.
    """
    names = call.names("vms")
    if not all(name.isdigit() for name in names):
        bad_parameters({"vms": f"invalid format - value does not look like a valid VM ID list: {call.text('vms')}\n"})
    if not names or access.may(store.state, call.user, "/", "VM.PowerMgmt"):
        access.require(store.state, call.user, "/", "VM.PowerMgmt")
        return
    for name in names:
        access.require(store.state, call.user, f"/vms/{name}", "VM.PowerMgmt")


def _agent_guard(*privileges: str) -> Guard:
    """The agent's privileges: VM.GuestAgent.* from release 9 on (Unrestricted includes all), VM.Monitor before."""

    def check(store: Store, call: Call) -> None:
        state = store.state
        if state.release.startswith("8."):
            access.require(state, call.user, f"/vms/{call.vmid}", "VM.Monitor")
            return
        names = list(dict.fromkeys(f"VM.GuestAgent.{name}" for name in (*privileges, "Unrestricted")))
        access.require_any(state, call.user, f"/vms/{call.vmid}", *names)

    return check
