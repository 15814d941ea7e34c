# SPDX-License-Identifier: MIT
"""A kernel machine as a test holds it: started on an overlay of the cached disk, reached over SSH, ended without trace.

It reboots as hardware does, and every boot is a new QEMU process on the same overlay (see `supervisor`).
"""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inventory import GpulabError
from rehearsal import paths
from rehearsal.kernel import image, qemu
from rehearsal.kernel.qemu import Accelerator, Iommu, Spec
from rehearsal.kernel.topology import TOPOLOGY, Part

HOST = "127.0.0.1"
#: Below those that the kernel gives to outgoing connections: between two boots nobody may take it.
PORTS = range(20000, 32000)
#: A boot under TCG takes well below a minute on an idle machine with two cores.
BOOT_S = 300.0
POLL_S = 0.5
STOP_S = 20.0
#: The order of our reboot operation: accepted at once, carried out when SSH has gone.
REBOOT = "systemd-run --quiet --collect --on-active=500ms --timer-property=AccuracySec=100ms systemctl reboot"
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Ssh:
    """How to reach the machine as root. `host_key`: type and base64 text of its public host key."""

    host: str
    port: int
    key: Path
    host_key: str

    @property
    def known_hosts_line(self) -> str:
        """For a known_hosts file, in OpenSSH's format, with its line end."""
        return f"[{self.host}]:{self.port} {self.host_key}\n"


class KernelMachine:
    """One machine, with its files in `folder`: `disk.qcow2`, `serial.log`, `supervisor.log`, `known_hosts`.

    Use it as a context manager, or call `stop()`; should this process die, the machine ends too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        iommu: Iommu = "intel",
        accelerator: Accelerator | None = None,
        parts: tuple[Part, ...] = TOPOLOGY,
        memory_mib: int = 1024,
        cpus: int = 1,
    ) -> None:
        """`accelerator`: None takes KVM where it works, else TCG."""
        self.folder = folder.absolute()
        self.spec = Spec(
            disk=self.folder / "disk.qcow2",
            serial=self.folder / "serial.log",
            port=_free_port(),
            iommu=iommu,
            accelerator=accelerator or qemu.accelerator(),
            parts=parts,
            memory_mib=memory_mib,
            cpus=cpus,
        )
        self._supervisor: subprocess.Popen[bytes] | None = None
        #: Not in `folder`: the path of a socket must be short.
        self._sockets: Path | None = None

    def __enter__(self) -> KernelMachine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ssh(self) -> Ssh:
        """How to reach it."""
        return Ssh(HOST, self.spec.port, image.ssh_key(), image.host_key())

    def start(self) -> None:
        """Switch on and return at once. A machine that was stopped goes on with the disk that it had.

        Raises:
            GpulabError: no kernel machine can run here, or its disk could not be built.
        """
        if reason := qemu.missing():
            raise GpulabError(f"No kernel machine can run here: {reason}")
        if self._supervisor is not None:
            raise GpulabError(f"The kernel machine in {self.folder} runs already")
        base = image.ensure()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.spec.disk.exists():
            overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(self.spec.disk)]
            subprocess.run(overlay, check=True)
        (self.folder / "known_hosts").write_text(self.ssh.known_hosts_line)
        spec = self.folder / "spec.json"
        spec.write_text(json.dumps(self.spec.plain(), indent=2))
        self._sockets = Path(tempfile.mkdtemp(prefix="gpulab-"))
        with open(self.folder / "supervisor.log", "ab") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "rehearsal.kernel.supervisor", str(spec)],
                cwd=paths.REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # An interrupt at the terminal is for the test, which then stops the machine.
                start_new_session=True,
            )

    def stop(self) -> None:
        """Switch off, as pulling the plug does. The disk stays."""
        if self._sockets is not None:
            subprocess.run([*self._ssh_words("-O", "exit"), HOST], capture_output=True, check=False)
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None
        if self._supervisor is not None:
            try:
                # It ends with its stdin, which this closes.
                self._supervisor.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
            self._supervisor = None

    def running(self) -> bool:
        """Is it on? A machine that was powered off from inside is not."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def wait_ssh(self, deadline_s: float = BOOT_S) -> None:
        """Wait until root can log in.

        Raises:
            GpulabError: not within `deadline_s` seconds, or the machine is off; with the end of its serial console.
        """
        deadline = time.monotonic() + deadline_s
        while self.running() and (left := deadline - time.monotonic()) > 0:
            if self._greets(left) and self._lets_in(left):
                return
            time.sleep(POLL_S)
        raise GpulabError(
            f"No SSH on {HOST}:{self.spec.port} after {deadline_s:.0f} s" if self.running() else "The machine is off",
            f"Its console ended with:\n{_tail(self.spec.serial)}\nIts supervisor said:\n{self._supervisor_log()}",
            f"the whole console: {self.spec.serial}",
        )

    def run(
        self, command: str, *, input: bytes | None = None, timeout: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root in the machine. `input` goes to its stdin.

        Raises:
            GpulabError: it ended with another status than 0 and `check` is true; 255 may be SSH's own.
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        done = subprocess.run(
            [*self._ssh_words(), HOST, command], input=input or b"", capture_output=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace").strip()
            raise GpulabError(f"`{command}` ended with {done.returncode} in the kernel machine", said)
        stdout, stderr = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the machine, its folder included."""
        target, folder = shlex.quote(path), shlex.quote(str(Path(path).parent))
        self.run(f"mkdir -p {folder} && cat > {target} && chmod {mode:o} {target}", input=text.encode())

    def vfio_probe(self, address: str) -> dict[str, Any]:
        """What `vfio_probe` sees of the function at a PCI address, as a program that uses it would.

        Raises:
            GpulabError: it cannot be opened.
        """
        program = Path(__file__).with_name("vfio_probe.py").read_bytes()
        answer: dict[str, Any] = json.loads(self.run(f"python3 - {shlex.quote(address)}", input=program).stdout)
        return answer

    def boot_id(self) -> str:
        """The kernel's id of this boot."""
        return self.run(BOOT_ID).stdout.strip()

    def reboot(self, deadline_s: float = BOOT_S) -> None:
        """Reboot from inside and wait until root can log in again.

        Raises:
            GpulabError: not within `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        before = self.boot_id()
        self.run(REBOOT)
        while True:
            self.wait_ssh(deadline - time.monotonic())
            # It may still be on its way down.
            with contextlib.suppress(GpulabError, subprocess.TimeoutExpired):
                if self.run(BOOT_ID, timeout=max(1.0, deadline - time.monotonic())).stdout.strip() != before:
                    return
            time.sleep(POLL_S)

    def _greets(self, timeout: float) -> bool:
        """Does an SSH server say its name? QEMU accepts a connection before the guest does."""
        try:
            with socket.create_connection((HOST, self.spec.port), timeout=min(timeout, 15)) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _lets_in(self, timeout: float) -> bool:
        try:
            return self.run("true", timeout=timeout, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _ssh_words(self, *options: str) -> list[str]:
        # One connection for all commands: each new one costs an emulated key exchange.
        settings = {
            "ControlMaster": "auto", "ControlPersist": "600", "ControlPath": f"{self._sockets}/ssh",
            "UserKnownHostsFile": self.folder / "known_hosts", "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes", "IdentitiesOnly": "yes", "BatchMode": "yes", "ConnectTimeout": "60",
            "ServerAliveInterval": "10", "LogLevel": "ERROR",
        }  # fmt: skip
        words = ["ssh", "-F", "none", "-p", str(self.spec.port), "-i", str(self.ssh.key), "-l", "root"]
        return [*words, *(f"-o{name}={value}" for name, value in settings.items()), *options]

    def _supervisor_log(self) -> str:
        return _tail(self.folder / "supervisor.log")


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((HOST, port))
            except OSError:
                continue
            return port
    raise GpulabError(f"No free port on {HOST} from {PORTS.start} to {PORTS.stop}")


def _tail(path: Path, lines: int = 25) -> str:
    if not path.exists():
        return f"{path} does not exist"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
