# SPDX-License-Identifier: MIT
"""The lab as a whole: up, down, status. It makes the nodes and what they need; guests are made by a deploy."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inventory import GpulabError
from rehearsal import host, image, machine, network, node, paths, processes
from rehearsal.host import HostSpec
from rehearsal.network import Network

NODES = ("pve1",)
#: What the guests of the nodes are, in order; those after them are as the first. One node's guest is Debian 13, so
#: that a lab of one needs one image.
GUESTS = ("debian13", "debian12")
FIRST_NODE = 11
FIRST_PORT = 18006
SSH_S = 60.0
API_S = 60.0
STOP_S = 5.0
LOOP_S = 5.0

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class LabNode:
    """A node of the lab. `front_port`: where the control machine answers its API."""

    name: str
    index: int
    address: str

    @property
    def front_port(self) -> int:
        return FIRST_PORT + self.index

    @property
    def guest(self) -> str:
        """The distribution of its guest."""
        return GUESTS[self.index] if self.index < len(GUESTS) else GUESTS[0]


@dataclass(frozen=True)
class Lab:
    """What `lab.json` says of a lab that is up."""

    network: Network
    nodes: list[LabNode]

    @property
    def distributions(self) -> list[str]:
        """Of its guests."""
        return sorted({entry.guest for entry in self.nodes})

    @property
    def services(self) -> list[str]:
        """What serves its hosts beside the API: Debian 12 has no Docker of its own that knows a GPU."""
        return ["nvidia", "registry", "python_index", *(["docker"] if "debian12" in self.distributions else [])]


@dataclass(frozen=True)
class Row:
    """One line of `status`: `state` is up or down."""

    kind: str
    name: str
    address: str
    state: str
    detail: str


def plan(names: Sequence[str] = NODES, net: Network | None = None) -> Lab:
    """The lab of these nodes, in the order of their addresses."""
    chosen = net or network.current()
    nodes = [LabNode(name, index, chosen.address(FIRST_NODE + index)) for index, name in enumerate(names)]
    return Lab(chosen, nodes)


def up(names: Sequence[str] = NODES, hardware: Path = node.MACHINE) -> None:
    """Bring the lab up; beside one that is up and well, say so and leave it.

    Raises:
        GpulabError: this machine cannot run it, another lab is up, or one that is up has lost a part.
    """
    machine.check()
    with _locked():
        wanted = plan(names)
        if _beside(wanted):
            return
        if paths.lab().exists() or processes.members():
            _say("clearing what an interrupted run has left")
            _take_down()
        machine.install(_say)
        machine.raise_limits(_say)
        began = time.monotonic()
        for suite in dict.fromkeys([image.SUITE, *(image.SUITES[name] for name in wanted.distributions)]):
            image.ensure(_say, suite)
        for name in wanted.services:
            _say(f"preparing the {name} stand-ins")
            _service(name).prepare()
        _bring_up(wanted, hardware)
        _say(f"the lab is up ({time.monotonic() - began:.1f} s): {_describe(wanted)}")


def down() -> list[str]:
    """End everything that belongs to the lab, whatever state it is in, and return what was ended. Caches stay."""
    machine.check()
    if machine.missing_packages() and not paths.lab().exists():
        return []  # Nothing can be up where not even the tools are that would have to end it.
    with _locked():
        return _take_down()


def is_up() -> bool:
    """Did an `up` come to its end, with no `down` since?"""
    return (paths.lab() / "lab.json").exists()


def current() -> Lab | None:
    """The lab that is up; None when none is."""
    try:
        known = json.loads((paths.lab() / "lab.json").read_text())
    except FileNotFoundError:
        return None
    return plan(list(known["nodes"]))


def problems(lab: Lab) -> list[str]:
    """What of a lab that came up is missing now; empty when it is well."""
    found = []
    if not network.is_up(lab.network):
        found.append(f"no bridge {lab.network.bridge}")
    found += [f"{entry.name} is down" for entry in lab.nodes if not host.running(entry.name)]
    names = [name for name in processes.names() if not name.startswith("host-")]
    found += [f"the process {name} has ended" for name in names if not processes.running(name)]
    return found


def status() -> list[Row]:
    """Nodes, guests and processes of the lab, running or not."""
    lab = current()
    rows = []
    addresses = {entry.name: entry.address for entry in lab.nodes} if lab else {}
    for folder in sorted(paths.hosts().glob("*/spec.json")) if paths.hosts().is_dir() else []:
        name = folder.parent.name
        kind = "node" if name in addresses else "guest"
        address = json.loads(folder.read_text())["address"]
        init = host.leader(name)
        if host.running(name):
            rows.append(Row(kind, name, address, "up", f"init {init}" if init else "between two boots"))
        else:
            rows.append(Row(kind, name, address, "down", ""))
    for name in processes.names():
        if name.startswith("host-"):
            continue
        process = processes.recorded(name)
        detail = f"pid {process.pid}" if process else f"see {paths.logs().name}/{name}.log"
        rows.append(Row("process", name, "", "up" if process else "down", detail))
    net = network.current()
    if network.is_up(net):
        rows.append(Row("network", net.bridge, str(net.subnet), "up", f"gateway {net.gateway}"))
    return rows


def show_status() -> None:
    """Print `status` as a table."""
    rows = status()
    if not rows:
        print("The rehearsal lab is down.")
        return
    title = "rehearsal lab (simulated)" + ("" if is_up() else ": not complete, `make lab-down` clears it")
    table = Table(title=title)
    for column in ("kind", "name", "address", "state", "detail"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        state = f"[{'green' if row.state == 'up' else 'red'}]{row.state}[/]"
        table.add_row(row.kind, row.name, row.address, state, row.detail)
    Console().print(table)
    print(f"state and logs: {paths.lab()}")


def shell(name: str) -> int:
    """Open a root shell in a host, without SSH; returns its exit status."""
    return subprocess.run([*host.enter(name), "bash", "--login"], check=False).returncode


def write_ssh_config(path: Path) -> None:
    """Write an OpenSSH configuration that reaches the nodes by name, with the lab's key and known_hosts.

    Raises:
        GpulabError: no lab is up.
    """
    running = current()
    if running is None:
        raise GpulabError("The rehearsal lab is down.", resolution="make lab-up")
    blocks = [
        f"Host {entry.name}\n  HostName {entry.address}\n  User root\n  IdentityFile {paths.ssh_key()}\n"
        f"  UserKnownHostsFile {paths.known_hosts()}\n  StrictHostKeyChecking yes\n"
        for entry in running.nodes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(blocks))


def node_spec(lab: Lab, entry: LabNode, hardware: Path = node.MACHINE) -> HostSpec:
    """What a node is made of. Its configuration files are laid down once: a node that is started again keeps them."""
    upper = paths.lab() / "nodes" / entry.name
    files = _service("pve").node_files(entry.name, entry.index)
    if not (upper / "up").exists():
        files |= node.files(f"{lab.network.gateway}:{entry.front_port}", hardware)
        files |= {
            "/root/.ssh/authorized_keys": (paths.ssh_key().with_suffix(".pub").read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key": (_node_key(entry.name).read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (_node_key(entry.name).with_suffix(".pub").read_text(), 0o644),
        }
    return HostSpec(
        name=entry.name,
        address=entry.address,
        gateway=lab.network.gateway,
        lower=image.root(),
        upper=upper,
        files=files,
        binds=_service("pve").node_binds(entry.name),
    )


def _bring_up(lab: Lab, hardware: Path) -> None:
    paths.lab().mkdir(parents=True)
    for warning in network.up(lab.network):
        _say(f"warning: {warning}")
    _make_keys(lab)
    pve = _service("pve")
    known: dict[str, Any] = {
        "simulated": True,
        "network": lab.network.gateway.rpartition(".")[0],
        "nodes": {entry.name: entry.address for entry in lab.nodes},
        "nameserver": lab.network.resolvers[0],
        "guests": [entry.guest for entry in lab.nodes],
        "cloud_images": pve.prepare(lab.distributions),
    }
    _say("starting the API, the package repositories and the image registry")
    pve.start([(entry.name, entry.address) for entry in lab.nodes])
    for name in lab.services:
        known |= _service(name).start()
    _say(f"starting {', '.join(entry.name for entry in lab.nodes)}")
    for entry in lab.nodes:
        host.start(node_spec(lab, entry, hardware))
    for entry in lab.nodes:
        host.wait_ssh(entry.address, SSH_S)
        _wait_api(entry)
    _write_json(paths.lab() / "lab.json", known)


def _beside(wanted: Lab) -> bool:
    """Is the wanted lab up and well already?"""
    running = current()
    if running is None:
        return False
    missing = problems(running)
    if missing:
        raise GpulabError("A lab is up, but not whole", "\n".join(missing), "make lab-down, then make lab-up")
    if running != wanted:
        raise GpulabError(f"Another lab is up: {_describe(running)}", f"Wanted: {_describe(wanted)}", "make lab-down")
    _say(f"the lab is up already: {_describe(running)}")
    return True


def _describe(lab: Lab) -> str:
    nodes = ", ".join(f"{entry.name} {entry.address}" for entry in lab.nodes)
    return f"{nodes} on {lab.network.bridge}"


def _take_down() -> list[str]:
    # Guests before nodes before the API: a node that powers off asks its API to stop the guests, and waits for that.
    known = current()
    nodes = {entry.name for entry in known.nodes} if known else set()
    ended = _stop_hosts(lambda name: name not in nodes)
    ended += _stop_hosts(lambda name: True)
    for name in processes.names():
        if not name.startswith("host-") and processes.stop(name):
            ended.append(f"process {name}")
    if strays := processes.end_members(None, timeout=5):
        ended.append(f"{strays} processes without a record")
    # What somebody has started through the API meanwhile.
    ended += _stop_hosts(lambda name: True)
    ended += host.remove_cgroups(f"*-{network.current().bridge}")
    ended += _detach_loops()
    ended += _unmount_rest()
    ended += network.down(network.current())
    if paths.lab().exists():
        shutil.rmtree(paths.lab())
        ended.append(f"state in {paths.lab()}")
    return ended


def _stop_hosts(chosen: Callable[[str], bool]) -> list[str]:
    """Power off the chosen hosts side by side and clear what they leave, those that nobody looks after included."""
    up_now = {name for name, _ in host.inits()}
    folders = {path.name for path in paths.hosts().iterdir()} if paths.hosts().is_dir() else set()
    names = sorted(name for name in up_now | folders if chosen(name))
    if names:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: host.stop(name, STOP_S), names))
    return [f"host {name}" for name in names if name in up_now]


def _detach_loops() -> list[str]:
    """Loop devices on files of the lab. The kernel lets go of one only when its last mount has gone, so wait for that.

    Raises:
        GpulabError: one is still in use.
    """
    found = _loops()
    for name in found:
        subprocess.run(["losetup", "--detach", name], check=True)
    deadline = time.monotonic() + LOOP_S
    while left := _loops():
        if time.monotonic() > deadline:
            raise GpulabError(f"{', '.join(left)}: still in use", resolution=f"`fuser --mount {left[0]}` shows by whom")
        time.sleep(0.05)
    return [f"loop device {name}" for name in found]


def _loops() -> list[str]:
    """A deleted file's name ends in ` (deleted)`, and still begins with its path."""
    listing = subprocess.run(["losetup", "--json", "--list"], capture_output=True, text=True, check=True).stdout
    entries = json.loads(listing)["loopdevices"] if listing.strip() else []
    return [entry["name"] for entry in entries if entry["back-file"].startswith(f"{paths.lab()}/")]


def _unmount_rest() -> list[str]:
    """Whatever is still mounted below the state folder: that is deleted next, and nothing behind a mount may be."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [path for path in reversed(mounts) if path.startswith(f"{paths.lab()}/")]
    for path in found:
        subprocess.run(["umount", "--lazy", path], check=True)
    return [f"mount {path}" for path in found]


def _make_keys(lab: Lab) -> None:
    """The lab's own SSH key, and each node's host key: made here, so known_hosts needs no trust on first use."""
    _keygen(paths.ssh_key(), "gpulab rehearsal lab")
    lines = []
    for entry in lab.nodes:
        key = _node_key(entry.name)
        _keygen(key, f"root@{entry.name}")
        lines.append(f"{entry.address} {' '.join(key.with_suffix('.pub').read_text().split()[:2])}\n")
    paths.known_hosts().parent.mkdir(mode=0o700)
    paths.known_hosts().write_text("".join(lines))


def _node_key(name: str) -> Path:
    return paths.ssh_key().with_name(f"host-{name}")


def _keygen(path: Path, comment: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], check=True)


def _wait_api(entry: LabNode) -> None:
    """Wait until the node's own port answers as the API does: any HTTP status will do."""
    context = ssl.create_default_context(cafile=str(paths.ca() / "ca.pem"))
    deadline = time.monotonic() + API_S
    while True:
        try:
            urllib.request.urlopen(
                f"https://{entry.address}:8006/api2/json/version", timeout=5, context=context
            ).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise GpulabError(
                    f"{entry.name}: no API on {entry.address}:8006 after {API_S:.0f} s", str(error)
                ) from None
        time.sleep(0.1)


def _service(name: str) -> Any:
    """A service of the lab, read when it is needed: `status` and `down` do without them."""
    return importlib.import_module(f"rehearsal.{name}.service")


@contextmanager
def _locked() -> Iterator[None]:
    """One `up` or `down` at a time. The kernel lets go of the lock when its holder dies, however it dies."""
    paths.cache().mkdir(parents=True, exist_ok=True)
    with open(paths.lock(), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise GpulabError(f"Another `up` or `down` of the lab is running (pid {file.read().strip()})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _say(text: str) -> None:
    console.print(f"lab: {text}", markup=False)
