# SPDX-License-Identifier: MIT
"""Docker's packages for Debian 12, made of the real programs of Debian's own packages.

Engine, CLI and containerd are those of Debian 13, which need no newer C library than Debian 12 has; runc is Debian
12's, because Debian 13's does; docker-init is tini, as in Docker's own packages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rehearsal.nvidia.deb import File, Link, Package, text

#: Debian's packages that the programs come from, by suite.
DEBIAN = {"trixie": ("docker.io", "docker-cli", "containerd", "tini"), "bookworm": ("runc",)}
#: Where each program lies in Debian's packages, by its path in Docker's.
ENGINE = {
    "/usr/bin/dockerd": "/usr/sbin/dockerd",
    "/usr/bin/docker-proxy": "/usr/sbin/docker-proxy",
    "/usr/bin/docker-init": "/usr/bin/tini-static",
}
CLI = {"/usr/bin/docker": "/usr/bin/docker"}
CONTAINERD = {
    "/usr/bin/containerd": "/usr/bin/containerd",
    "/usr/bin/containerd-shim-runc-v2": "/usr/bin/containerd-shim-runc-v2",
    "/usr/bin/ctr": "/usr/bin/ctr",
    "/usr/bin/runc": "/usr/sbin/runc",
}
UNITS = "/usr/lib/systemd/system"

DOCKER_UNIT = """\
[Unit]
Description=Docker Application Container Engine
Documentation=https://docs.docker.com
After=network-online.target nss-lookup.target docker.socket firewalld.service containerd.service time-set.target
Wants=network-online.target containerd.service
Requires=docker.socket
StartLimitBurst=3
StartLimitIntervalSec=60

[Service]
Type=notify
ExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock
ExecReload=/bin/kill -s HUP $MAINPID
TimeoutStartSec=0
RestartSec=2
Restart=always
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
Delegate=yes
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""

SOCKET_UNIT = """\
[Unit]
Description=Docker Socket for the API

[Socket]
ListenStream=/run/docker.sock
SocketMode=0660
SocketUser=root
SocketGroup=docker

[Install]
WantedBy=sockets.target
"""

CONTAINERD_UNIT = """\
[Unit]
Description=containerd container runtime
Documentation=https://containerd.io
After=network.target local-fs.target dbus.service

[Service]
ExecStartPre=-/sbin/modprobe overlay
ExecStart=/usr/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
LimitNPROC=infinity
LimitCORE=infinity
LimitNOFILE=infinity
TasksMax=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


def upstream(version: str) -> str:
    """`26.1.5` of Debian's `26.1.5+dfsg1-9+b1`."""
    return re.split("[-+~]", version.rpartition(":")[2])[0]


def docker_packages(files: Mapping[str, File | Link], versions: Mapping[str, str]) -> list[Package]:
    """docker-ce, docker-ce-cli and containerd.io.

    `files` are those of Debian's packages by path, `versions` the versions of these packages by name.
    """
    engine, containerd = upstream(versions["docker.io"]), upstream(versions["containerd"])
    full = f"5:{engine}-1~debian.12~bookworm"

    def package(name: str, version: str, what: str, held: Mapping[str, File | Link], **fields: str) -> Package:
        scripts: dict[str, str] = {key: fields.pop(key) for key in ("postinst", "prerm", "postrm") if key in fields}
        summary = f"real {what} under Docker's package names"
        settings = tuple(path for path in held if path.startswith("/etc/"))
        return Package(name, version, summary, held, fields, scripts, settings, kind="rehearsal")

    def programs(places: Mapping[str, str]) -> dict[str, File | Link]:
        return {path: files[source] for path, source in places.items()}

    return [
        package(
            "docker-ce",
            full,
            f"Docker Engine {engine} of Debian 13",
            {
                **programs(ENGINE),
                f"{UNITS}/docker.service": text(DOCKER_UNIT),
                f"{UNITS}/docker.socket": text(SOCKET_UNIT),
            },
            Depends="containerd.io (>= 1.7.24), docker-ce-cli, iptables, nftables, libc6 (>= 2.34), libsystemd0",
            Recommends="apparmor, ca-certificates, git, pigz, procps, xz-utils",
            Conflicts="docker (<< 1.5~), docker-engine, docker.io",
            Replaces="docker-engine, docker-ce-cli (<< 5:28.0.0)",
            postinst="getent group docker > /dev/null || groupadd --system docker\n"
            + _start("docker.socket", "docker.service"),
            prerm=_stop("docker.service", "docker.socket"),
            postrm=_RELOAD,
        ),
        package(
            "docker-ce-cli",
            full,
            f"Docker CLI {upstream(versions['docker-cli'])} of Debian 13",
            programs(CLI),
            Depends="libc6 (>= 2.34)",
            Conflicts="docker (<< 1.5~), docker-engine, docker.io, docker-cli",
            Replaces="docker-ce (<< 5:0), docker-cli",
            Breaks="docker-ce (<< 5:0)",
        ),
        package(
            "containerd.io",
            f"{containerd}-1",
            f"containerd {containerd} of Debian 13 and runc {upstream(versions['runc'])} of Debian 12",
            {
                **programs(CONTAINERD),
                f"{UNITS}/containerd.service": text(CONTAINERD_UNIT),
                "/etc/containerd/config.toml": text('disabled_plugins = ["cri"]\n'),
            },
            Depends="libc6 (>= 2.34), libseccomp2 (>= 2.5.0)",
            Provides="containerd, runc",
            Conflicts="containerd, runc",
            Replaces="containerd, runc",
            postinst=_start("containerd.service"),
            prerm=_stop("containerd.service"),
            postrm=_RELOAD,
        ),
    ]


_RELOAD = "if [ -d /run/systemd/system ]; then\n    systemctl daemon-reload\nfi\n"


def _start(*units: str) -> str:
    # As deb-systemd-invoke would: a policy that forbids starting services is kept to.
    names = " ".join(units)
    return (
        f'if [ "$1" = configure ]; then\n    systemctl enable --quiet {names}\nfi\n{_RELOAD}'
        f'if [ -d /run/systemd/system ] && [ -n "$2" ]; then\n    deb-systemd-invoke restart {names}\n'
        f"elif [ -d /run/systemd/system ]; then\n    deb-systemd-invoke start {names}\nfi\n"
    )


def _stop(*units: str) -> str:
    return f'if [ "$1" = remove ]; then\n    systemctl disable --quiet --now {" ".join(units)}\nfi\n'
