# SPDX-License-Identifier: MIT
"""What a container of ours is declared to be, what `docker create` is told of it, and how two declarations differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from operations.plan import key_diff

#: Labels: the service's name, the digest of its declaration, and the declaration itself (for the plan's difference).
SERVICE = "org.gpulab.service"
SPEC = "org.gpulab.spec"
DECLARATION = "org.gpulab.declaration"

#: Folder on a data disk that a container without a folder of its own there is bound to.
MARK = ".gpulab"


@dataclass(frozen=True)
class ContainerSpec:
    """One service. It is recreated exactly when what `docker create` is told changes.

    No field may hold a secret: all of them are shown in the plan and kept in labels.
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
    #: User (and group) inside; empty: the image's own.
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
    labels: Mapping[str, str] = field(default_factory=dict)
    #: URL on the guest's loopback address that answers 200 when the service is up.
    probe: str = ""
    #: Seconds that it may take to end, and to be ready after its start.
    stop_s: int = 30
    ready_s: int = 180

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
            **{f"environment.{key}": value for key, value in self.environment.items()},
            **{f"volume {source}": target for source, target in self.volumes.items()},
            **{f"bind {source}": target for source, target in self.binds.items()},
            **{f"port 127.0.0.1:{outside}": str(inside) for outside, inside in self.ports.items()},
            **{f"label {key}": value for key, value in self.labels.items()},
        }
        return {key: value for key, value in sorted(values.items()) if value}

    def digest(self) -> str:
        """SHA-256 of all that `docker create` is told: a change of our own options counts as well."""
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
        numbers = self.user.split(":")
        known = len(numbers) == 2 and all(map(str.isdigit, numbers))
        return {folder: [int(number) for number in numbers] for folder in self.volumes} if known else {}

    def _options(self) -> list[str]:
        words = [f"--label={SERVICE}={self.name}", "--restart=unless-stopped", f"--hostname={self.name}"]
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
        words += [f"--publish=127.0.0.1:{outside}:{inside}" for outside, inside in sorted(self.ports.items())]
        words += [f"--device={name}" for name in self.devices]
        words += [f"--user={self.user}"] if self.user else []
        words += [f"--ipc={self.ipc}"] if self.ipc else []
        words += [f"--memory={self.memory_mib}m"] if self.memory_mib is not None else []
        words += [f"--label={key}={value}" for key, value in sorted(self.labels.items())]
        return [*words, self.image, *self.command]


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
