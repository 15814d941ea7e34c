# SPDX-License-Identifier: MIT
"""A service's declaration as files of Quadlet, of which Podman makes systemd units: see podman-systemd.unit(5).

What is Docker's option has its key here; what Quadlet 5.4 has none for goes into `PodmanArgs`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable

from operations.containers.spec import DECLARATION, GIVEN, SERVICE, SPEC, ContainerSpec

#: The section in which a file says whose it is; systemd ignores sections of this kind.
OURS = "X-Gpulab"

_RESTART = {"unless-stopped": "always", "on-failure": "on-failure", "no": "no"}

Pairs = Iterable[tuple[str, str]]


def mount_unit(path: str) -> str:
    """systemd's name of the unit for a mount point (systemd-escape --path)."""
    parts = [part for part in path.split("/") if part]
    escaped = "-".join(
        "".join(
            char if re.fullmatch(r"[A-Za-z0-9:_.]", char) and not (number == place == 0 and char == ".") else _hex(char)
            for place, char in enumerate(part)
        )
        for number, part in enumerate(parts)
    )
    return f"{escaped or '-'}.mount"


def _hex(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def digest(spec: ContainerSpec) -> str:
    """SHA-256 of all that Podman is told: a change of our own keys counts as well."""
    texts = [_container(spec, ()), _network(spec.network_name())]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def files(spec: ContainerSpec) -> dict[str, str]:
    """The service's files below /etc/containers/systemd, by name."""
    ours = [(SERVICE, spec.name), (SPEC, digest(spec))]
    declaration = json.dumps(spec.declaration(), separators=(",", ":"))
    text = _container(spec, ours) + "\n" + _section(OURS, [*ours, (DECLARATION, declaration)])
    found = {f"{spec.name}.container": text}
    if spec.network_name() not in GIVEN:
        found[f"{spec.network_name()}.network"] = _network(spec.network_name())
    return found


def qualified(image: str) -> str:
    """An image's name with its registry, as Podman wants and lists it: Docker's own where none is given."""
    first, separator, _ = image.partition("/")
    if separator and (any(char in first for char in ".:") or first == "localhost"):
        return image
    return f"docker.io/{image}" if separator else f"docker.io/library/{image}"


def _section(name: str, pairs: Pairs) -> str:
    return "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in pairs), ""])


def _network(name: str) -> str:
    service = name.removeprefix("gpulab-")
    pairs = [("NetworkName", name), ("Label", _word(f"{SERVICE}={service}"))]
    return "# Written by gpulab.\n" + _section("Network", pairs)


def _container(spec: ContainerSpec, labels: Pairs) -> str:
    sections = {
        "Unit": _unit(spec),
        "Container": [*_told(spec), *(("Label", _word(f"{key}={value}")) for key, value in labels)],
        "Service": [
            ("Restart", _RESTART[spec.restart]),
            # As Docker: again and again, each time a little later.
            ("RestartSec", "1"),
            ("RestartSteps", "6"),
            ("RestartMaxDelaySec", "60"),
            ("TimeoutStopSec", str(spec.stop_s + 30)),
        ],
        "Install": [("WantedBy", " ".join(["multi-user.target", *map(mount_unit, spec.mounts)]))],
    }
    return "# Written by gpulab.\n" + "\n".join(_section(name, pairs) for name, pairs in sections.items())


def _unit(spec: ContainerSpec) -> Pairs:
    yield "Description", f"{spec.name} (gpulab)"
    yield "StartLimitIntervalSec", "0"
    # Not without the data disk, and down with it: `Requires` alone would let it go on when the disk is unmounted.
    for mount in spec.mounts:
        yield "RequiresMountsFor", mount.replace("%", "%%")
        yield "BindsTo", mount_unit(mount)
    for other in spec.after:
        yield "Requires", f"{other}.service"
        yield "After", f"{other}.service"


def _told(spec: ContainerSpec) -> Pairs:
    yield "ContainerName", spec.name
    yield "HostName", spec.name
    yield "Image", qualified(spec.image)
    # The image was pulled before the container of before was stopped.
    yield "Pull", "never"
    if spec.entrypoint is not None:
        yield "Entrypoint", _escaped(spec.entrypoint)
    if spec.command:
        yield "Exec", " ".join(map(_word, spec.command))
    yield "DropCapability", "all"
    for name in spec.capabilities:
        yield "AddCapability", name
    yield "NoNewPrivileges", "true"
    yield "ReadOnly", str(spec.read_only).lower()
    for path in spec.tmpfs:
        yield "Tmpfs", _escaped(path)
    for key, value in sorted(spec.environment.items()):
        yield "Environment", _word(f"{key}={value}")
    # As with Docker, a folder that is missing is refused, and not made.
    for source, target in sorted({**spec.volumes, **spec.binds}.items()):
        yield "Mount", _escaped(f"type=bind,source={source},target={target}")
    readonly = {**spec.guards(), **{secret.source: secret.target for secret in spec.secret_files()}}
    for source, target in readonly.items():
        yield "Mount", _escaped(f"type=bind,source={source},target={target},ro=true")
    for outside, inside in sorted(spec.ports.items()):
        yield "PublishPort", f"127.0.0.1:{outside}:{inside}"
    for name in spec.devices:
        yield "AddDevice", name
    if spec.user:
        user, _, group = spec.user.partition(":")
        yield "User", user
        if group:
            yield "Group", group
    network = spec.network_name()
    yield "Network", network if network in GIVEN else f"{network}.network"
    if spec.pids is not None:
        yield "PidsLimit", str(spec.pids)
    # With the guest's own IPC namespace, its /dev/shm is the container's.
    if spec.shm_mib is not None and spec.ipc != "host":
        yield "ShmSize", f"{spec.shm_mib}m"
    for key, limit in sorted(spec.ulimits.items()):
        yield "Ulimit", f"{key}={limit}:{limit}"
    if health := spec.health:
        yield "HealthCmd", _escaped(shlex.join(health.command))
        yield "HealthInterval", f"{health.interval_s}s"
        yield "HealthTimeout", f"{health.timeout_s}s"
        yield "HealthRetries", str(health.retries)
        yield "HealthStartPeriod", f"{health.start_s}s"
    yield "StopTimeout", str(spec.stop_s)
    for key, value in sorted(spec.labels.items()):
        yield "Label", _word(f"{key}={value}")
    further = [f"--ipc={spec.ipc}"] if spec.ipc else []
    further += [f"--memory={spec.memory_mib}m"] if spec.memory_mib is not None else []
    further += [f"--cpus={spec.cpus:g}"] if spec.cpus is not None else []
    if further:
        yield "PodmanArgs", " ".join(further)


def _escaped(value: str) -> str:
    """A value that stands alone in its line: what systemd would put something else in place of."""
    return value.replace("%", "%%").replace("$", "$$")


def _word(text: str) -> str:
    """One word of a list of words, quoted as systemd.syntax(7) has it."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{_escaped(quoted)}"'
