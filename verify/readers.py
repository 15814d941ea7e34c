# SPDX-License-Identifier: MIT
"""The subjects: which of them a host has, and how each is read."""

from __future__ import annotations

import functools
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inventory import Guest, Lab, Node, sharing
from inventory.access import milvus_name, tenants_of, token
from inventory.packages import TOOLKIT
from inventory.secrets import Secrets
from inventory.services import Ollama, Service
from inventory.sharing import LOG_DIRECTORY, PIPE_DIRECTORY, SERVICE_USER, TENANTS
from verify.benchmarks import program
from verify.containers import access, indexes
from verify.hosts import Connection, Unreachable, Unreadable, whole
from verify.selection import worker
from verify.vm.api import Api

ROOM = Path(__file__).parent
#: Subjects in the order in which a host's lane reads them. Each is also the name of a fixture.
SUBJECTS = (
    "reach",
    "hypervisor",
    "system",
    "nvidia",
    "containers",
    # The first of the two that are read beside the others: it begins with the network, not with the guest's processor,
    # while the guest's clock is looked at.
    "access",
    "milvus",
    "pytorch",
    "ollama_load",
    "ports",
    "daemon_reload",
    "engine_restart",
    "api",
    "vm",
    "process",
    "backup",
    "gpubench",
    "mpsbench",
    "torchbench",
    "ollamabench",
    "milvusbench",
)
#: What is read beside the others, unless the card is to be measured undisturbed: it asks the services, not the card.
BESIDE = ("access", "milvus")
#: What sets the card at boot, watches its temperature and shares it.
GPU_UNITS = ("gpulab-gpu-settings.service", "gpulab-gpu-thermal.service", "gpulab-mps.service")
#: What starts a service again that does not answer.
HEALING_TIMER = "gpulab-heal.timer"
#: What a service is asked on its port, beside what its own checks ask.
ASKS: dict[str, dict[str, Any]] = {"ollama": {"version": "/api/version", "tags": "/api/tags"}}
#: Seconds until a port that does not answer counts as closed.
PORT_S = 2.0
#: Seconds for a container to be started, disturbed and removed.
DISTURB_S = 300.0
#: Seconds for a model to come from the disk into the GPU's memory.
LOAD_S = 300.0
#: Seconds for Milvus to be asked everything: each answer has a limit of its own.
MILVUS_S = 60.0
#: Seconds for a job of PyTorch that only says what it sees.
JOB_S = 150.0
#: Seconds for the benchmarks: they end by themselves before that. Draining, services stop and start around them.
BENCH_S = {"quick": 90.0, "full": 180.0}
DRAIN_S = 900.0
#: Seconds that a program of tier 1 samples, and about as many more to begin and to end.
TIER_1_S = 25.0


class Readers:
    """Reads any subject of any host of a lab, over one connection a host and one client an API."""

    def __init__(
        self,
        lab: Lab,
        benchmarks: str = "quick",
        drain: bool = False,
        tell: Callable[[str, str], None] = lambda host, line: None,
    ) -> None:
        """`benchmarks`: off, quick or full; `drain`: stop the services for them where those use the card; `tell`: is
        called with a host and a line of how far a long read of it is, in the thread that reads.
        """
        self._lab = lab
        self._tell = tell
        self._benchmarks, self._drain = benchmarks, drain
        self._benches = {name: threading.Lock() for name in lab.nodes}
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._apis: dict[str, Api] = {}
        self._ways: dict[str, Callable[[Any], dict[str, Any]]] = {
            "reach": self._reach,
            "hypervisor": self._hypervisor,
            "system": self._system,
            "nvidia": self._nvidia,
            "containers": self._containers,
            "milvus": self._milvus,
            "pytorch": self._pytorch,
            "ollama_load": self._ollama_load,
            "ports": self._ports,
            "access": self._access,
            "daemon_reload": lambda guest: self._disturb(guest, "daemon-reload"),
            "engine_restart": lambda guest: self._disturb(guest, "engine-restart"),
            "api": lambda node: self._api(node).read_node(),
            "vm": lambda guest: self._api(self._lab.node_of(guest)).read_vm(guest),
            "process": self._process,
            "backup": self._backup,
            "gpubench": self._gpubench,
            "mpsbench": self._mpsbench,
            "torchbench": self._torchbench,
            "ollamabench": self._ollamabench,
            "milvusbench": self._milvusbench,
        }

    def read(self, host: str, subject: str) -> dict[str, Any]:
        """One subject of one host. Raises Unreachable or Unreadable."""
        return self._ways[subject](machine(self._lab, host))

    def lane(self, host: str, subject: str) -> str:
        """What has to wait for one another: the reads of one host, most of which use its card.

        The benchmarks are among them, as the last: other reads use the card and the processor too.
        """
        if subject in BESIDE and self._benchmarks == "off":
            return f"beside {host}"
        if subject == "ports":
            return f"ports of {host}"
        if subject == "vm":
            return f"api of {self._lab.guests[host].node}"
        if subject in ("process", "backup"):
            return self._lab.guests[host].node
        return f"api of {host}" if subject == "api" else host

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _connection(self, host: Node | Guest) -> Connection:
        with self._lock:
            if host.name not in self._connections:
                self._connections[host.name] = Connection(host)
            return self._connections[host.name]

    def _api(self, node: Node) -> Api:
        with self._lock:
            return self._apis.setdefault(node.name, Api(node))

    def _reach(self, host: Node | Guest) -> dict[str, Any]:
        try:
            self._connection(host).open()
        except Unreachable as error:
            return {"error": str(error), "fix": error.fix}
        return {"error": "", "fix": ""}

    def _hypervisor(self, node: Node) -> dict[str, Any]:
        return self._connection(node).read(ROOM / "hypervisor/remote.py", {})

    def _process(self, guest: Guest) -> dict[str, Any]:
        """QEMU's process, which the node has."""
        return self._on_node(guest, "process_remote.py", {"vmid": guest.vmid, "memory": guest.hugepages is not None})

    def _backup(self, guest: Guest) -> dict[str, Any]:
        """Over the node's connection: the token sees no jobs."""
        backup = guest.backup
        if backup is None:
            return {"job": None, "backups": [], "error": "", "meta": None, "now": time.time()}
        arguments = {"job": f"gpulab-{guest.name}", "storage": backup.storage, "vmid": guest.vmid}
        return self._on_node(guest, "remote.py", arguments)

    def _on_node(self, guest: Guest, script: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a script of the VM's finds on the guest's node. That nobody is there is told by the node's own check."""
        node = self._lab.node_of(guest)
        try:
            return self._connection(node).read(ROOM / "vm" / script, arguments)
        except Unreachable:
            raise Unreadable(f"{node.name} is not reachable") from None

    def _system(self, guest: Guest) -> dict[str, Any]:
        connection = self._connection(guest)
        connection.open()
        arguments = {"mount": guest.data_disk.mount, "packages": guest.packages.base}
        sent = time.time()
        found = connection.read(ROOM / "system/remote.py", arguments)
        return {**found, "sent": sent, "received": time.time()}

    def _nvidia(self, guest: Guest) -> dict[str, Any]:
        connection = self._connection(guest)
        arguments = {
            "folder": connection.send("pynvml.py", pynvml()),
            "packages": [*guest.packages.driver, *TOOLKIT],
            "repositories": [guest.nvidia.repository, guest.nvidia.toolkit_repository],
            "cuda": guest.nvidia.cuda,
            "units": GPU_UNITS,
            "mps": {
                "user": SERVICE_USER,
                "pipe": PIPE_DIRECTORY,
                "log": LOG_DIRECTORY,
                "clients": guest.nvidia.sharing == "mps",
            },
            "tenants": TENANTS,
        }
        return connection.read(ROOM / "nvidia/remote.py", arguments)

    def _containers(self, guest: Guest) -> dict[str, Any]:
        arguments = {
            "engine": guest.engine.kind,
            "mount": guest.data_disk.mount,
            "services": {
                name: {"ports": each.ports(), "asks": ASKS.get(name, {}) | shown(each)}
                for name, each in guest.services.served().items()
            },
        }
        return self._connection(guest).read(ROOM / "containers/remote.py", arguments)

    def _pytorch(self, guest: Guest) -> dict[str, Any]:
        service = guest.services.pytorch
        if service is None:
            raise Unreadable(f"{guest.name} declares no PyTorch")
        arguments = {"image": service.image, "tenant": worker(guest)}
        return self._connection(guest).read(ROOM / "containers/pytorch_remote.py", arguments, limit_s=JOB_S)

    def _milvus(self, guest: Guest) -> dict[str, Any]:
        """With the passwords that the lab's secrets have now, as users are told them."""
        service = guest.services.milvus
        if service is None:
            raise Unreadable(f"{guest.name} declares no Milvus")
        kept, cluster = Secrets(guest.state), self._lab.node_of(guest).cluster_name
        tenants = tenants_of(guest, "milvus")
        passwords = {milvus_name(each): kept.get(cluster, token("milvus", each), guest.name) for each in tenants}
        arguments = {
            "port": service.port,
            "metrics_port": service.metrics_port,
            "databases": {milvus_name(each): indexes.to_be_searched(service, each) for each in tenants},
        }
        return self._connection(guest).read(
            ROOM / "containers/milvus_remote.py",
            arguments,
            limit_s=MILVUS_S,
            secret={"root": kept.get(cluster, "milvus.root", guest.name), **passwords},
        )

    def _ollama_load(self, guest: Guest) -> dict[str, Any]:
        ollama = guest.services.ollama
        if ollama is None or not ollama.models:
            return {"load": None, "ps": None}
        arguments = {"port": ollama.port, "model": ollama.models[0].name, "limit_s": LOAD_S}
        return self._connection(guest).read(ROOM / "containers/remote.py", arguments, limit_s=LOAD_S + 20)

    def _gpubench(self, guest: Guest) -> dict[str, Any]:
        """What gpubench printed. One card of a node at a time: they share its memory and its processor."""
        words = ["--quick"] if self._benchmarks == "quick" else []
        if guest.nvidia.sharing == "mps":
            words += ["--user", SERVICE_USER, "--mps-pipe", PIPE_DIRECTORY]
        connection, limit_s = self._connection(guest), BENCH_S[self._benchmarks]
        tell = functools.partial(self._tell, guest.name)
        with self._benches[guest.node]:
            found = bench(connection, ["python3", "-I", "-", *words], program().encode(), limit_s, tell)
            if not self._drain or not in_use(found):
                return found
            tell("services are stopped for the benchmarks, and started again after them")
            folder = connection.send("gpubench.py", program().encode())
            command = ["python3", "-I", f"{folder}/gpubench.py", *words, "--drain", *drained(guest)]
            found = bench(connection, command, b"", limit_s + DRAIN_S, tell)
            # While a service is still to be started, systemd needs the program.
            if found.get("verdict") != "failed":
                connection.run(f"benchmarks of {guest.name}", ["rm", "-r", folder], b"", limit_s)
            if self._benchmarks == "full":
                until_ready(connection, guest)
            return found

    def _mpsbench(self, guest: Guest) -> dict[str, Any]:
        with self._lent(guest, "gpubench.py", program().encode()) as folder:
            arguments = {
                "program": f"{folder}/gpubench.py",
                "pipe": PIPE_DIRECTORY,
                "user": SERVICE_USER,
                "clients": min(max(len(guest.tenants), 2), 4),
            }
            return self._measure(guest, "mpsbench.py", arguments)

    def _torchbench(self, guest: Guest) -> dict[str, Any]:
        arguments = {"tenant": worker(guest), "job": whole(ROOM / "benchmarks/torchjob.py")}
        return self._measure(guest, "torchbench.py", arguments)

    def _ollamabench(self, guest: Guest) -> dict[str, Any]:
        ollama = guest.services.ollama
        if ollama is None or not ollama.models:
            raise Unreadable(f"{guest.name} declares no model of Ollama")
        model = ollama.models[0]
        return self._measure(
            guest, "ollamabench.py", {"port": ollama.port, "model": model.name, "digest": model.digest}
        )

    def _milvusbench(self, guest: Guest) -> dict[str, Any]:
        milvus = guest.services.milvus
        if milvus is None or not milvus.indexes:
            raise Unreadable(f"{guest.name} declares no index of Milvus")
        password = Secrets(guest.state).get(self._lab.node_of(guest).cluster_name, "milvus.root", guest.name)
        arguments = {"port": milvus.port, "metrics_port": milvus.metrics_port, **indexes.to_be_measured(milvus)}
        return self._measure(guest, "milvusbench.py", arguments, {"root": password})

    def _measure(self, guest: Guest, script: str, arguments: dict[str, Any], secret: object = None) -> dict[str, Any]:
        """What a program of tier 1 printed. One card of a node at a time, as `_gpubench`."""
        with self._lent(guest, "pynvml.py", pynvml()) as folder, self._benches[guest.node]:
            common = {"folder": folder, "containers": list(guest.services.served()), "limit_s": TIER_1_S}
            return self._connection(guest).read(
                ROOM / "benchmarks" / script,
                common | arguments,
                2 * TIER_1_S + 60,
                secret,
                functools.partial(self._tell, guest.name),
            )

    @contextmanager
    def _lent(self, guest: Guest, name: str, text: bytes) -> Iterator[str]:
        """A folder on the guest with a file of that name, for as long as a benchmark takes."""
        connection = self._connection(guest)
        folder = connection.send(name, text)
        try:
            yield folder
        finally:
            connection.run(f"benchmarks of {guest.name}", ["rm", "-r", folder], b"", TIER_1_S)

    def _ports(self, guest: Guest) -> dict[str, Any]:
        """Which of its services' ports the control machine can open on the guest's address."""
        ports = [port for each in guest.services.served().values() for port in each.ports()]
        return {str(port): opens(guest.ssh_hostname, port) for port in ports}

    def _access(self, guest: Guest) -> dict[str, Any]:
        """What callers on the network get, then what the guest has of it, and which of its listeners are reached."""
        services = access.observe(self._lab, guest)
        arguments = {"folder": access.FOLDER, "log": access.LOG, "requests": list(access.requests_of(services))}
        on_guest = self._connection(guest).read(ROOM / "containers/access_remote.py", arguments)
        listeners = {each["port"]: each for each in on_guest["listens"]}
        reached = [each for port, each in listeners.items() if opens(str(guest.address.ip), port)]
        return {"services": services, "guest": on_guest, "open": reached}

    def _disturb(self, guest: Guest, disturbance: str) -> dict[str, Any]:
        """A GPU container of verify's own, as the user that the sharing mode asks for."""
        arguments = {
            "engine": guest.engine.kind,
            "disturbance": disturbance,
            "image_of": "ollama",
            "user": sharing.client(guest).user,
        }
        return self._connection(guest).read(ROOM / "containers/disturb.py", arguments, limit_s=DISTURB_S)


def pynvml() -> bytes:
    """The text of nvidia-ml-py, through which a guest reads NVML."""
    module = importlib.util.find_spec("pynvml")
    if module is None or module.origin is None:
        raise ModuleNotFoundError("nvidia-ml-py is not installed here; hint: make setup")
    return Path(module.origin).read_bytes()


def bench(
    connection: Connection, command: list[str], stdin: bytes, limit_s: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run gpubench; `tell` is called with each line of its progress.

    Its exit status says what the object that it prints says, too.

    Raises:
        Unreachable, Unreadable: it did not come to its end, or printed no object.
    """
    what = f"benchmarks of {connection.machine.name}"
    status, stdout, stderr = connection.run(what, command, stdin, limit_s, tell)
    try:
        found: dict[str, Any] = json.loads(stdout)
        return dict(found)
    except (TypeError, ValueError):
        last = (stderr.strip().splitlines() or ["no word"])[-1]
        raise Unreadable(f"the {what} ended with exit status {status}: {last}") from None


#: Waits for a container to be healthy; words: the engine, its name.
HEALTHY = """until [ "$("$0" inspect --format '{{.State.Health.Status}}' "$1")" = healthy ]; do sleep 1; done"""


def until_ready(connection: Connection, guest: Guest) -> None:
    """Wait for services that have just been started, each as long as the inventory gives it. Who is not there then says
    so by itself.
    """
    for name, service in guest.services.served().items():
        command = ["timeout", str(service.ready_s), "sh", "-c", HEALTHY, guest.engine.kind, name]
        connection.run(f"benchmarks of {guest.name}", command, b"", service.ready_s + PORT_S)


def in_use(printed: Mapping[str, Any]) -> bool:
    """Did gpubench leave the card to others?"""
    return printed.get("verdict") == "inconclusive" and str(printed.get("reason")).startswith("GPU in use")


def drained(guest: Guest) -> list[str]:
    """What gpubench stops while it runs: the services that may use the card, and first what would start them again."""
    names = guest.services.served()
    units = [HEALING_TIMER] if names and guest.healing is not None else []
    if guest.engine.kind == "podman":
        return [word for name in [*units, *(f"{name}.service" for name in names)] for word in ("--unit", name)]
    found = [word for name in units for word in ("--unit", name)]
    return found + [word for name in names for word in ("--container", name)]


def opens(address: str, port: int) -> bool:
    """Can the control machine open a TCP connection there?"""
    try:
        with socket.create_connection((address, port), timeout=PORT_S):
            return True
    except OSError:
        return False


def shown(service: Service) -> dict[str, Any]:
    """What to ask for the models that Ollama made of files: it says of which."""
    models = service.models if isinstance(service, Ollama) else []
    return {f"show {each.name}": ["/api/show", {"model": each.name}] for each in models if each.gguf is not None}


def machine(lab: Lab, host: str) -> Node | Guest:
    """The host of that name."""
    return lab.nodes[host] if host in lab.nodes else lab.guests[host]
