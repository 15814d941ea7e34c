# SPDX-License-Identifier: MIT
"""A site: one node with a deployed guest, runs of rebuild.py on it as processes of their own, and what must hold."""

from __future__ import annotations

import hashlib
import http.server
import os
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import StringCommand
from pyinfra.connectors.util import CommandOutput, OutputLine

from connectors.guest import GuestConnector
from inventory import GpulabError
from operations import record
from operations.proxmox import client, destroy, host_keys, order, rebuild, swap, vm
from operations.proxmox.client import ApiUnreachable, Client
from rehearsal.pve.power import A4000
from rehearsal.pve.state import GIB, Task

from .conftest import Bench, make_bench

ROOT = Path(__file__).parents[2]
OLD, DATA = "local-lvm:vm-101-disk-1", "local-lvm:vm-101-disk-2"
OLD_KEY, NEW_KEY = "ssh-ed25519 AAAAold", "ssh-ed25519 AAAAnew"
PUBLIC_KEY = ("cat", "--", "/etc/ssh/ssh_host_ed25519_key.pub")
ADDRESS = ("192.0.2.101", 22)

#: The steps of rebuild.py in its order, with the two of deploy.py that work on the VM.
REBUILD = (
    vm.preflight,
    vm.image,
    rebuild.preflight,
    rebuild.stopped,
    rebuild.marked,
    rebuild.leftovers_removed,
    rebuild.swapped,
    rebuild.prepared,
    rebuild.connection_opened,
    vm.create_or_update,
    vm.started,
    rebuild.verified,
    rebuild.old_disk_deleted,
)
ROLLBACK = (
    rebuild.rollback_preflight,
    rebuild.stopped,
    rebuild.marked,
    rebuild.old_disk_back,
    rebuild.connection_opened,
    vm.started,
    rebuild.rollback_finished,
)
#: The steps of rebuild.py with destroy=1 in its order, with the two of deploy.py that work on the VM.
DESTROY = (
    vm.preflight,
    vm.image,
    destroy.preflight,
    destroy.stopped,
    destroy.marked,
    destroy.backed_up,
    destroy.keeper_made,
    destroy.disks_away,
    destroy.deleted,
    destroy.created,
    destroy.disks_back,
    destroy.keeper_removed,
    destroy.connection_opened,
    vm.create_or_update,
    vm.started,
    rebuild.verified,
    destroy.finished,
)


class Killed(BaseException):
    """The process ends here: nothing of it goes on, `finally` included."""


#: How the volumes of the first deploy are known whatever name they get later: by their time of creation.
SYSTEM_BORN, DATA_BORN = 1, 2


class Site:
    """A lab with one guest that runs, and runs of rebuild.py on it, each a process of its own."""

    def __init__(self, api: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api, self.folder, self.monkeypatch = api, folder, monkeypatch
        self.runs = 0
        self.verified = False
        self.bench: Bench | None = None

    def rebuild(self, **words: Any) -> None:
        """A run of rebuild.py from its first to its last step.

        Raises:
            GpulabError, AssertionError: a step refused, or failed while it executed.
        """
        self.begin(**words)
        for step in ROLLBACK if words.get("rollback") else REBUILD:
            self.step(step)

    def begin(self, **words: Any) -> Bench:
        """A new process; the one before has ended."""
        self.end()
        self.runs += 1
        self.bench = make_bench(self.api, self.folder, self.monkeypatch)
        host = words.pop("host", socket.gethostname())
        order._orders[self.bench.state] = order.Order("lab.py", f"me@{host}:{self.runs}:1", **words)
        self.bench.host.connector.closed = self.bench.host.connector.assumed = True
        return self.bench

    def end(self) -> None:
        """The kernel lets go of the process's lock."""
        if self.bench is not None:
            order.release(self.bench.state)

    def step(self, step: Any) -> None:
        assert self.bench is not None
        self.bench.apply(step)
        self.unharmed()

    def until(self, last: Any, **words: Any) -> None:
        """A run that ends after this step."""
        self.begin(**words)
        steps = ROLLBACK if words.get("rollback") else REBUILD
        for step in steps[: steps.index(last) + 1]:
            self.step(step)

    def config(self, vmid: int = 101) -> dict[str, Any]:
        with self.api.lock:
            return dict(self.api.state.vms[vmid].config)

    def put(self, **keys: Any) -> None:
        """Somebody changes the VM."""
        self.api.api().nodes("pve1").qemu(101).config.put(**keys)

    def volumes(self) -> dict[str, int]:
        """The VM's volumes, with their time of creation."""
        with self.api.lock:
            return {volume.volid: volume.ctime for volume in self.api.state.volumes if volume.vmid == 101}

    def add_volume(self, name: str, born: int) -> None:
        with self.api.lock:
            known = next(volume for volume in self.api.state.volumes if volume.volid == DATA)
            self.api.state.volumes.append(known.model_copy(update={"name": name, "ctime": born}))

    def settle(self) -> None:
        """Remember what must stay, and be able to `restore()` it."""
        config = self.config()
        self.smbios, self.net = config["smbios1"], config["net0"]
        with self.api.lock:
            self.foreign = {vmid: dict(vm.config) for vmid, vm in self.api.state.vms.items() if vmid != 101}
            for volume in self.api.state.volumes:
                volume.ctime = {OLD: SYSTEM_BORN, DATA: DATA_BORN}.get(volume.volid, volume.ctime)
            self.fresh = self.api.state.model_copy(deep=True)
        self.started = dict(self.api.power.started)

    def restore(self) -> None:
        """The lab as it was at `settle()`."""
        self.api.emulator.tasks.join(60)
        self.verified = False
        with self.api.lock:
            pid = self.api.state.next_pid
            self.api.emulator.store.state = self.fresh.model_copy(deep=True, update={"next_pid": pid})
        self.api.power.started = dict(self.started)
        self.api.power.agents = set(self.started)
        self.api.requests.clear()
        host_keys.pin(self.folder / "state", *ADDRESS, [OLD_KEY])

    def unharmed(self) -> None:
        """The data disk is there and attached, the VM next door is as it was, and so is the VM's identity."""
        config = self.config()
        assert self.volumes().get(swap.volume(config["scsi1"])) == DATA_BORN
        assert {vmid: self.config(vmid) for vmid in self.foreign} == self.foreign
        assert (config["smbios1"], config["net0"]) == (self.smbios, self.net)
        if not self.verified:
            assert SYSTEM_BORN in self.volumes().values()

    def finished(self, *besides: str) -> None:
        """The new system is in place, the old disk is gone, the VM is protected and carries no note."""
        self.unharmed()
        config = self.config()
        assert SYSTEM_BORN not in self.volumes().values()
        assert "size=64G" in config["scsi0"]
        assert not swap.unused(config), config
        assert "scsi30" not in config
        assert (config["protection"], config["description"]) == (1, "ours: hands off")
        expected = {swap.volume(config[key]) for key in ("scsi0", "scsi1", "efidisk0", "ide2")}
        assert set(self.volumes()) == expected | set(besides)
        assert self.api.power.running(101)
        assert self.keys() == [NEW_KEY]

    def untouched(self) -> None:
        """Nothing has been changed."""
        self.unharmed()
        assert self.changes() == []

    def back(self) -> None:
        """The old system runs again, protected; the new disk lies idle."""
        self.unharmed()
        config = self.config()
        assert self.volumes()[swap.volume(config["scsi0"])] == SYSTEM_BORN
        mark = swap.marker(config)
        idle = list(swap.unused(config).values())
        assert (mark.old if mark else "") == ""
        assert [entry.rpartition("@")[0] for entry in mark.waste] == idle if mark else idle == []
        assert config["protection"] == 1
        assert self.api.power.running(101)

    def keys(self) -> list[str]:
        return host_keys.known(self.folder / "state", *ADDRESS)

    def failure(self) -> str:
        assert self.bench is not None
        return record.of_run(self.bench.state).failures["gpu01"]

    def verify(self, status: int, words: str = "") -> None:
        """What verify will say from now on."""

        def command(*_: Any) -> list[str]:
            self.verified = self.verified or status == 0
            return [sys.executable, "-c", f"print({words!r}); raise SystemExit({status})"]

        self.monkeypatch.setattr(rebuild, "verify_command", command)

    def changes(self) -> list[tuple[str, str]]:
        """The changing requests since `restore()`."""
        return [(method, path) for method, path in self.api.requests if method != "GET"]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a clock, and the guests answer to SSH whatever they are asked."""
    monkeypatch.setattr(client, "POLL_S", (0.01, 0.02), raising=False)
    monkeypatch.setattr(client, "PAUSE_S", 0.01, raising=False)
    monkeypatch.setattr(GuestConnector, "reconnect", lambda self, _: self.open())
    monkeypatch.setattr(GuestConnector, "open", _open)
    monkeypatch.setattr(GuestConnector, "run_shell_command", lambda *_, **__: (True, CommandOutput([])))


def _open(self: GuestConnector) -> None:
    assert not self.closed, "the old system was contacted"


def next_door(api: Any) -> None:
    """VMs that are nobody's business: one without a tag, one that another tool tagged, one with a card of its own."""
    second = [replace(device, address=device.address.replace(":01:", ":02:"), iommu_group=15) for device in A4000]
    api.hardware.devices = [*api.hardware.devices, *second]
    entry = "id=10de:24b0,iommugroup=15,node=pve1,path=0000:02:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="theirs", map=[entry])
    api.add_vm(200, name="mail", scsi0="local-lvm:vm-200-disk-0", description="old=x")
    api.add_vm(201, running=True, name="web", tags="terraform", scsi0="local-lvm:vm-201-disk-0", protection=1)
    api.add_vm(202, running=True, name="render", scsi0="local-lvm:vm-202-disk-0", hostpci0="mapping=theirs,pcie=1")


def prepare(site: Site) -> None:
    """The lab with one guest, deployed and running, and the VMs next door."""
    api = site.api
    api.add_image()
    entry = "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="a4000", map=[entry])
    api.power.snippets["snippets/gpulab-vendor.yaml"] = "#cloud-config\n"
    next_door(api)
    site.begin().apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(description="ours: hands off")
    api.wait(api.api().nodes("pve1").qemu(101).status.start.post())
    host_keys.pin(site.folder / "state", *ADDRESS, [OLD_KEY])
    host_keys.pin(site.folder / "state", "192.0.2.11", 22, ["ssh-ed25519 AAAAnode"])
    api.power.answers[PUBLIC_KEY] = (0, NEW_KEY.encode() + b" root@gpu01\n")
    site.verify(0)
    site.settle()
    site.restore()


Fault = Callable[[Callable[[], Any]], Any]


def killed_before(send: Callable[[], Any]) -> Any:
    raise Killed


def killed_after(send: Callable[[], Any]) -> Any:
    send()
    raise Killed


def lost_on_the_way(send: Callable[[], Any]) -> Any:
    raise ApiUnreachable("no answer")


def reply_lost(send: Callable[[], Any]) -> Any:
    send()
    raise ApiUnreachable("no answer")


def run_with(site: Site, number: int, fault: Fault, only: str = "", every: bool = False, **words: Any) -> list[str]:
    """A run in which the `number`-th request (or `every` one) meets a fault. `only` "changes": GETs do not count.

    What it sent, as `METHOD path [parameters]`; shorter than `number`: no fault happened.
    """
    sent: list[str] = []
    dead = False
    real = Client._send

    def send(self: Client, method: str, path: Any, parameters: Any) -> Any:
        nonlocal dead
        if dead:
            raise Killed
        if only == "changes" and method == "GET":
            return real(self, method, path, parameters)
        sent.append(f"{method} {'/'.join(str(part) for part in path)} {sorted(parameters)}")
        if len(sent) != number and not every:
            return real(self, method, path, parameters)
        try:
            return fault(lambda: real(self, method, path, parameters))
        except Killed:
            dead = True
            raise

    with site.monkeypatch.context() as patch:
        patch.setattr(Client, "_send", send)
        with suppress(Killed):
            site.rebuild(**words)
    return sent


def sweep(site: Site, fault: Fault, then: Callable[[], None], only: str = "", **words: Any) -> int:
    """Let the fault happen at the 1st request of a run, then at the 2nd of another, to the last; how many there were.

    After each run, `then()` is what a user does and expects.
    """
    number = 0
    while True:
        number += 1
        site.restore()
        sent = run_with(site, number, fault, only, **words)
        if len(sent) < number:
            return number - 1
        check(site, then, f"{fault.__name__}, request {number}: {sent[-1]}")


def check(site: Site, then: Callable[[], None], what: str) -> None:
    site.unharmed()
    try:
        then()
    except (AssertionError, GpulabError) as error:
        raise AssertionError(what) from error


def stations(site: Site) -> tuple[list[int], int]:
    """The requests before which something has changed since the request before, and how many requests there are.

    A process killed before any other request leaves just what one killed before the last of these has left.
    """
    seen: list[object] = []

    def look(send: Callable[[], Any]) -> Any:
        with site.api.lock:
            state = site.api.state
            vms = {vmid: (dict(vm.config), dict(vm.pending)) for vmid, vm in state.vms.items()}
            volumes = [volume.model_dump() for volume in state.volumes]
        known_hosts = (site.folder / "state" / "known_hosts").read_text()
        seen.append((vms, volumes, sorted(site.api.power.started), known_hosts))
        return send()

    site.restore()
    run_with(site, 0, look, every=True)
    return [number for number in range(1, len(seen) + 1) if number == 1 or seen[number - 1] != seen[number - 2]], len(
        seen
    )


def root_on_the_node(api: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The node's own SSH connection, with `qm` as root behind it; the commands that went over it."""
    seen: list[str] = []

    def run(self: Any, command: StringCommand, *_: Any, **__: Any) -> tuple[bool, CommandOutput]:
        seen.append(command.get_raw_value())
        try:
            for line in command.get_raw_value().split(" && "):
                words = shlex.split(line)
                if words[:2] == ["pvesm", "free"]:
                    storage = words[2].partition(":")[0]
                    api.wait(api.root().nodes("pve1").storage(storage).content(words[2]).delete())
                    continue
                qm(api.root().nodes("pve1").qemu(words[2]), words[1], words[3:])
        except Exception as error:
            return False, CommandOutput([OutputLine("stderr", str(error))])
        return True, CommandOutput([])

    monkeypatch.setattr("connectors.node.NodeConnector.run_shell_command", run)
    return seen


def qm(one: Any, verb: str, words: list[str]) -> None:
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    match verb:
        case "set":
            one.config.put(**options)
        case "unlock":
            one.config.put(delete="lock", skiplock=1)
        case "destroy":
            one.delete()
        case _:
            raise ValueError(verb)


def add_task(api: Any, kind: str, user: str = "", exitstatus: str | None = None) -> Any:
    """A task on VM 101 in the node's list that no worker of the double stands behind."""
    now = int(time.time())
    with api.lock:
        pid = api.state.next_pid
        api.state.next_pid += 1
        task = Task(
            upid=f"UPID:pve1:{pid:08X}:00000001:{now:08X}:{kind}:101:{user or own(api)}:",
            node="pve1",
            pid=pid,
            pstart=1,
            starttime=now,
            type=kind,
            id="101",
            user=user or own(api),
            endtime=None if exitstatus is None else now,
            exitstatus=exitstatus,
        )
        api.state.tasks.append(task)
    return task


def own(api: Any) -> str:
    return f"{api.user}!{api.token_name}"


def command_line(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """`pyinfra lab.py rebuild.py …` with a node that has no backup jobs; the guest keeps its real connector."""
    path = site.folder / "lab.py"
    fake = "'fake_responses': {'pvesh': '[]'}, 'fake_delay': 0, 'fake_delay_jitter': 0, 'ssh_hostname'"
    if "fake_responses" not in path.read_text():
        path.write_text(path.read_text().replace("'ssh_hostname'", fake, 1))
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/api/fake_pyinfra.py"), str(path), "rebuild.py", *words],
        cwd=ROOT,
        env={**os.environ, "GPULAB_RUNS": str(site.folder / "runs"), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


class ImageServer:
    """A cloud image on loopback: `image` is what an inventory says of it, `content` what is really sent."""

    #: 3 GiB, as far as its header says.
    CONTENT = b"QFI\xfb" + struct.pack(">IQIIQ", 3, 0, 0, 16, 3 * GIB) + bytes(480)

    def __init__(self) -> None:
        self.content = self.CONTENT
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}/debian-13.qcow2"
        checksum = f"sha256:{hashlib.sha256(self.CONTENT).hexdigest()}"
        self.image = {"url": url, "checksum": checksum, "filename": "debian-13.qcow2"}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
