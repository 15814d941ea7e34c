# SPDX-License-Identifier: MIT
"""Debian's docker-registry as a process: its settings, and a short-lived one on the loopback address to push to."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from inventory import GpulabError
from rehearsal.registry.oci import Registry

START_S = 10.0
EXECUTABLE = "usr/bin/docker-registry"


def program(unpacked: Path | None = None) -> Path:
    """The registry's executable: the installed one, or that below the folder that `fetch` was given.

    Raises:
        GpulabError: there is neither.
    """
    if installed := shutil.which("docker-registry"):
        return Path(installed)
    if unpacked is None or not (unpacked / EXECUTABLE).exists():
        raise GpulabError("docker-registry is not installed", resolution="apt install docker-registry")
    return unpacked / EXECUTABLE


def fetch(folder: Path, report: Callable[[str], None] = print) -> None:
    """Unpack Debian's package into `folder` unless it is installed or there already.

    It is not installed: its postinst would start a registry of its own on this machine.

    Raises:
        GpulabError: apt cannot download it.
    """
    if shutil.which("docker-registry") or (folder / EXECUTABLE).exists():
        return
    report("fetching docker-registry")
    with tempfile.TemporaryDirectory() as scratch:
        # apt downloads as its own user into the working folder.
        Path(scratch).chmod(0o755)
        argv = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "docker-registry"]
        done = subprocess.run(argv, cwd=scratch, capture_output=True, text=True, check=False)
        found = list(Path(scratch).glob("*.deb"))
        if done.returncode != 0 or not found:
            raise GpulabError("apt cannot download docker-registry", done.stderr.strip(), "run `apt-get update`")
        subprocess.run(["dpkg-deb", "-x", str(found[0]), str(folder)], check=True)


def write_settings(
    path: Path, store: Path, address: str, port: int, certificate: Path | None = None, key: Path | None = None
) -> Path:
    """Write the registry's configuration file; JSON is YAML. Without certificate it speaks plain HTTP."""
    http: dict[str, object] = {"addr": f"{address}:{port}", "secret": secrets.token_hex(16)}
    if certificate and key:
        http["tls"] = {"certificate": str(certificate), "key": str(key)}
    settings = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(store)}},
        "http": http,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2))
    # It holds the registry's secret.
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def temporary(store: Path, settings: Path, executable: Path) -> Iterator[Registry]:
    """A registry over `store` on a free port of the loopback address, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    write_settings(settings, store, "127.0.0.1", port)
    with open(settings.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([str(executable), "serve", str(settings)], stdout=log, stderr=log)
    registry = Registry(f"http://127.0.0.1:{port}")
    try:
        wait(registry, process)
        yield registry
    finally:
        process.terminate()
        process.wait()


def wait(registry: Registry, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until the registry answers.

    Raises:
        GpulabError: it does not, within seconds.
    """
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(requests.ConnectionError):
            verify = str(registry.ca) if registry.ca else True
            with requests.Session() as session:
                session.trust_env = False
                if session.get(f"{registry.url}/v2/", timeout=2, verify=verify).status_code == 200:
                    return
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise GpulabError(f"The lab's registry does not answer at {registry.url}", f"waited {START_S:.0f} s")
        time.sleep(0.02)
