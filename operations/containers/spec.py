# SPDX-License-Identifier: MIT
"""What a container of ours is declared to be, what `docker create` is told of it, and how two declarations differ."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from operations.plan import key_diff

#: Labels: the service's name, the digest of its declaration, the declaration itself (for the plan's difference), and
#: the services that start before it, with commas between them.
SERVICE = "org.gpulab.service"
SPEC = "org.gpulab.spec"
DECLARATION = "org.gpulab.declaration"
AFTER = "org.gpulab.after"

#: The folder of secrets on the guest, root's alone: `SERVICE/PATH.DIGEST` for each.
SECRETS = "/etc/gpulab/secrets"

#: Networks of the engine's own, which are not made.
GIVEN = ("none", "host")

#: Folder on a data disk that a container without a folder of its own there is bound to.
MARK = ".gpulab"


@dataclass(frozen=True)
class Health:
    """A health check that the engine runs inside the container; the image needs a shell for it.

    `start_s`: failures in the first so many seconds do not count.
    """

    command: tuple[str, ...]
    interval_s: int = 10
    timeout_s: int = 5
    retries: int = 3
    start_s: int = 0

    def __str__(self) -> str:
        deadlines = f"timeout {self.timeout_s} s, {self.retries} retries, start {self.start_s} s"
        return f"{shlex.join(self.command)} (every {self.interval_s} s, {deadlines})"


@dataclass(frozen=True)
class Secret:
    """A secret as a file: `source` on the guest, `target` in the container, and who may read it."""

    source: str
    target: str
    content: str = field(repr=False)
    uid: int
    gid: int


@dataclass(frozen=True)
class ContainerSpec:
    """One service. It is recreated exactly when what the engine is told changes.

    No field but `secrets` may hold a secret: the others are shown in the plan and kept in labels.
    """

    name: str
    #: Name and digest, `ollama/ollama@sha256:…`.
    image: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Folder of the guest to path in the container. The folder is made when it is missing, and `user`'s where that
    #: is `uid:gid`.
    volumes: Mapping[str, str] = field(default_factory=dict)
    #: The same for folders of somebody else's, without which the container can't be made.
    binds: Mapping[str, str] = field(default_factory=dict)
    #: Mount points without which the container must not run: the system disk is not the data disk.
    mounts: tuple[str, ...] = ()
    #: Port on the guest's loopback address to port in the container.
    ports: Mapping[int, int] = field(default_factory=dict)
    #: CDI names: `nvidia.com/gpu=all`.
    devices: tuple[str, ...] = ()
    #: User (and group) inside; empty: the image's own. Numbers, `uid:gid`, where there are `secrets`.
    user: str = ""
    #: IPC namespace: `host`; empty: its own.
    ipc: str = ""
    #: The image's files can't be written; what must be lies in `volumes` and `tmpfs`.
    read_only: bool = True
    tmpfs: tuple[str, ...] = ("/tmp",)
    #: Capabilities that are given back; all others are dropped.
    capabilities: tuple[str, ...] = ()
    #: Limit of main memory, MiB; None: no limit.
    memory_mib: int | None = None
    #: Limit of processor time, in CPUs; of processes and threads; None: no limit.
    cpus: float | None = None
    pids: int | None = None
    #: Size of /dev/shm, MiB; None: the engine's default of 64. No use with `ipc`.
    shm_mib: int | None = None
    #: Limits of each process, soft and hard alike: `{"nofile": 65536}`; -1: none.
    ulimits: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    #: Path in the container to content: a file of `user`'s that nobody can write. Only a digest keyed with
    #: `secrets_key` (the lab's `containers.key`) is ever shown.
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets_key: str = field(default="", repr=False)
    #: None: the image's own program, health check.
    entrypoint: str | None = None
    health: Health | None = None
    #: When the engine starts it again by itself.
    restart: Literal["unless-stopped", "on-failure", "no"] = "unless-stopped"
    #: A network of another service's, `none` or `host`; empty: one of its own, `gpulab-NAME`.
    network: str = ""
    #: Other services that start before it.
    after: tuple[str, ...] = ()
    #: The guest's container engine: the same declaration is a container of Docker's or a unit of Podman's.
    engine: Literal["docker", "podman"] = "docker"
    #: URL on the guest's loopback address that answers 200 when the service is up.
    probe: str = ""
    #: Seconds that it may take to end, and to be ready after its start.
    stop_s: int = 30
    ready_s: int = 180

    def __post_init__(self) -> None:
        if self.secrets and not (self.secrets_key and _numbers(self.user)):
            raise ValueError(f"{self.name}: secrets need secrets_key, and a user in numbers (uid:gid): {self.user!r}")

    def secret_files(self) -> tuple[Secret, ...]:
        """The secrets as files. A changed one has another name: the container before keeps what it was given."""
        uid, gid = _numbers(self.user) or (0, 0)
        return tuple(
            Secret(
                f"{SECRETS}/{self.name}/{path.strip('/').replace('/', '-')}.{self._keyed(path)}",
                path,
                content,
                uid,
                gid,
            )
            for path, content in sorted(self.secrets.items())
        )

    def _keyed(self, path: str) -> str:
        """The shortened digest (HMAC-SHA256) of a secret; the same content has another for each service and path."""
        text = json.dumps([self.name, path, self.secrets[path]])
        return hmac.digest(self.secrets_key.encode(), text.encode(), "sha256").hex()[:12]

    def network_name(self) -> str:
        """The network that it is connected to."""
        return self.network or f"gpulab-{self.name}"

    def declaration(self) -> dict[str, str]:
        """What decides over recreation, key by key. Probe and deadlines do not: they are asked from outside."""
        values = {
            "image": self.image,
            "command": " ".join(self.command),
            "devices": ",".join(self.devices),
            "user": self.user,
            "ipc": self.ipc,
            "read_only": str(self.read_only).lower(),
            "tmpfs": ",".join(self.tmpfs),
            "capabilities": ",".join(self.capabilities),
            "memory_mib": str(self.memory_mib or ""),
            "entrypoint": self.entrypoint or "",
            "cpus": str(self.cpus or ""),
            "pids": str(self.pids or ""),
            "shm_mib": str(self.shm_mib or ""),
            "health": str(self.health or ""),
            "restart": self.restart,
            "network": self.network_name(),
            "after": ",".join(self.after),
            "stop_s": str(self.stop_s),
            **{f"environment.{key}": value for key, value in self.environment.items()},
            **{f"volume {source}": target for source, target in self.volumes.items()},
            **{f"bind {source}": target for source, target in self.binds.items()},
            **{f"port 127.0.0.1:{outside}": str(inside) for outside, inside in self.ports.items()},
            **{f"label {key}": value for key, value in self.labels.items()},
            **{f"ulimit {key}": str(value) for key, value in self.ulimits.items()},
            **{f"secret {path}": self._keyed(path) for path in self.secrets},
        }
        return {key: value for key, value in sorted(values.items()) if value}

    def digest(self) -> str:
        """SHA-256 of all that `docker create` is told: a change of our own options counts as well.

        For Podman see `quadlet.digest()`.
        """
        return hashlib.sha256(json.dumps(self._options()).encode()).hexdigest()

    def create(self) -> list[str]:
        """The words after `docker create --name NAME`."""
        declaration = json.dumps(self.declaration(), separators=(",", ":"))
        labels = [("--label", f"{SPEC}={self.digest()}"), ("--label", f"{DECLARATION}={declaration}")]
        return [*[word for pair in labels for word in pair], *self._options()]

    def guards(self) -> dict[str, str]:
        """Folders that are bound for the sake of `mounts` alone, with their paths in the container."""
        bare = [mount for mount in self.mounts if not any(_below(source, mount) for source in self.volumes)]
        return {f"{mount}/{MARK}": f"/run/gpulab{mount}" for mount in bare}

    def folders(self) -> list[str]:
        """Folders of the guest that must be there before the container is created."""
        return [*self.volumes, *self.guards()]

    def owned(self) -> dict[str, list[int]]:
        """Folders of `volumes` that must belong to `user`. None, where only the image knows who that is."""
        numbers = _numbers(self.user)
        return {folder: list(numbers) for folder in self.volumes} if numbers else {}

    def _options(self) -> list[str]:
        words = [f"--label={SERVICE}={self.name}", f"--restart={self.restart}", f"--hostname={self.name}"]
        words += [f"--label={AFTER}={','.join(self.after)}"] if self.after else []
        words += [f"--network={self.network_name()}", f"--stop-timeout={self.stop_s}"]
        words += ["--cap-drop=ALL", *[f"--cap-add={name}" for name in self.capabilities]]
        words += ["--security-opt=no-new-privileges"]
        words += ["--read-only"] if self.read_only else []
        words += [f"--tmpfs={path}" for path in self.tmpfs]
        words += [f"--env={key}={value}" for key, value in sorted(self.environment.items())]
        # The restart policy is for services that crash, and the engine obeys it at each of its own starts, before
        # any unit of ours could say no. `on-failure` would be no help: what a shutdown or a power failure ended has
        # another status than 0 (255), and is started anew. So it is the container itself that cannot start without
        # its data disk, whoever starts it: unlike `--volume`, this refuses a folder that is missing, and in the empty
        # and immutable mount point on the system disk nobody can make it.
        bound = sorted({**self.volumes, **self.binds}.items())
        words += [f"--mount=type=bind,source={source},target={path}" for source, path in bound]
        words += [f"--mount=type=bind,source={source},target={path},readonly" for source, path in self.guards().items()]
        words += [
            f"--mount=type=bind,source={secret.source},target={secret.target},readonly"
            for secret in self.secret_files()
        ]
        words += [f"--publish=127.0.0.1:{outside}:{inside}" for outside, inside in sorted(self.ports.items())]
        words += [f"--device={name}" for name in self.devices]
        words += [f"--user={self.user}"] if self.user else []
        words += [f"--ipc={self.ipc}"] if self.ipc else []
        words += [f"--memory={self.memory_mib}m"] if self.memory_mib is not None else []
        words += [f"--cpus={self.cpus:g}"] if self.cpus is not None else []
        words += [f"--pids-limit={self.pids}"] if self.pids is not None else []
        words += [f"--shm-size={self.shm_mib}m"] if self.shm_mib is not None else []
        words += [f"--ulimit={key}={value}:{value}" for key, value in sorted(self.ulimits.items())]
        words += [f"--entrypoint={self.entrypoint}"] if self.entrypoint is not None else []
        if health := self.health:
            words += [f"--health-cmd={shlex.join(health.command)}", f"--health-interval={health.interval_s}s"]
            words += [f"--health-timeout={health.timeout_s}s", f"--health-retries={health.retries}"]
            words += [f"--health-start-period={health.start_s}s"]
        words += [f"--label={key}={value}" for key, value in sorted(self.labels.items())]
        return [*words, self.image, *self.command]


def _numbers(user: str) -> tuple[int, int] | None:
    """`uid:gid` as numbers, None where only the image knows who that is."""
    parts = user.split(":")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdigit, parts)) else None


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def difference(current: str, wanted: ContainerSpec) -> tuple[str, ...]:
    """`key: old -> new` between the declaration label of a container and a spec."""
    try:
        before = json.loads(current)
    except ValueError:
        before = {}
    after = wanted.declaration()
    changed = key_diff(before, {**dict.fromkeys(before), **after})
    return changed or ("options of gpulab's own",)


def familiar(image: str) -> str:
    """An image's name as Docker lists it: `docker.io/library/` is left out."""
    return image.removeprefix("docker.io/").removeprefix("library/")
