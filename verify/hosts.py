# SPDX-License-Identifier: MIT
"""One testinfra connection a host, with the host keys that deploy pinned and no others."""

from __future__ import annotations

import functools
import io
import json
import re
import secrets
import selectors
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import testinfra.host
from paramiko.pkey import UnknownKeyType
from testinfra.backend.paramiko import ParamikoBackend

from inventory import Guest, Node

ROOM = Path(__file__).parent
#: Has to be the first statement of a program.
FUTURE = "from __future__ import annotations\n"
#: Seconds until a host that does not answer is given up.
CONNECT_S = 10.0
#: Bytes that are taken from a stream at once.
CHUNK = 1 << 16


class Unreachable(Exception):
    """No connection; `fix` says what to do about it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


class Unreadable(Exception):
    """The host is there, but a read on it did not come to an end."""


class Next(threading.local):
    """How the next command of this thread is run: two may read one host at once, over a channel each."""

    limit_s = 60.0
    #: What it reads: who can list processes sees its words, and nobody this.
    stdin = b""
    #: Is told each line that it prints on stderr, while it runs.
    tell: Callable[[str], None] | None = None


class StrictBackend(ParamikoBackend):
    """testinfra's paramiko backend with strict host keys, also when it opens its connection again.

    The original accepts any key with a warning and obeys a `StrictHostKeyChecking no` of the user's own
    configuration.
    """

    def __init__(self, machine: Node | Guest) -> None:
        super().__init__(machine.ssh_hostname)
        self.machine = machine
        self.next = Next()

    @functools.cached_property
    def client(self) -> paramiko.SSHClient:
        machine = self.machine
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        known_hosts = machine.state / "known_hosts"
        if known_hosts.is_file():
            client.load_host_keys(str(known_hosts))
        client.connect(
            machine.ssh_hostname,
            port=machine.ssh_port,
            username=machine.ssh_user,
            pkey=private_key(machine.ssh_key),
            look_for_keys=machine.ssh_key is None,
            timeout=CONNECT_S,
            banner_timeout=CONNECT_S,
            auth_timeout=CONNECT_S,
        )
        return client

    def _exec_command(self, command: bytes) -> tuple[int, bytes, bytes]:
        transport = self.client.get_transport()
        if transport is None:
            raise paramiko.SSHException("the connection is closed")
        with transport.open_session(timeout=CONNECT_S) as channel:
            channel.settimeout(self.next.limit_s)
            channel.exec_command(command)
            channel.sendall(self.next.stdin)
            channel.shutdown_write()
            stdout, stderr = self._output(channel)
            return channel.recv_exit_status(), stdout, stderr

    def _output(self, channel: paramiko.Channel) -> tuple[bytes, bytes]:
        """Stdout and stderr to their ends, whichever comes first: the host waits where one of them is not taken.

        Raises:
            TimeoutError: neither had anything for `next.limit_s`.
        """
        stdout, stderr, told = bytearray(), bytearray(), 0
        with selectors.DefaultSelector() as ready:
            ready.register(channel, selectors.EVENT_READ)
            while True:
                if not ready.select(self.next.limit_s):
                    raise TimeoutError
                # Asked before the streams are: nothing comes after the end.
                ended = channel.eof_received or channel.closed
                if channel.recv_ready():
                    stdout += channel.recv(CHUNK)
                elif channel.recv_stderr_ready():
                    stderr += channel.recv_stderr(CHUNK)
                elif ended:
                    break
                while self.next.tell and (end := stderr.find(b"\n", told)) >= 0:
                    self.next.tell(stderr[told:end].decode(errors="replace"))
                    told = end + 1
        return bytes(stdout), bytes(stderr)


class Connection:
    """A host's SSH connection, opened by the first read."""

    def __init__(self, machine: Node | Guest) -> None:
        self.machine = machine
        self._backend = StrictBackend(machine)
        self.host = testinfra.host.Host(self._backend)
        self._backend.set_host(self.host)
        self._refused: Unreachable | None = None
        self._opening = threading.Lock()

    def open(self) -> None:
        """Connect, once.

        Raises:
            Unreachable: with the reason; asked again it answers the same without another try.
        """
        with self._opening:
            if self._refused is not None:
                raise self._refused
            try:
                self._backend.client  # noqa: B018
            except (paramiko.SSHException, OSError, EOFError) as error:
                self._refused = refusal(self.machine, error)
                raise self._refused from error

    def read(
        self,
        script: Path,
        arguments: dict[str, Any],
        limit_s: float = 60.0,
        secret: object = None,
        tell: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Run a Python script of ours on the host, as root, and return the JSON object that it prints.

        `secret` goes over its standard input, as JSON, and so into no list of processes. `tell` is called with each
        line of its stderr as it comes, in this thread.

        Raises:
            Unreachable: no connection.
            Unreadable: the script did not end well within `limit_s` seconds without output.
        """
        what = f"{script.parent.name} of {self.machine.name}"
        command = ["python3", "-I", "-c", whole(script), json.dumps(arguments)]
        stdin = b"" if secret is None else json.dumps(secret).encode()
        status, stdout, stderr = self.run(what, command, stdin, limit_s, tell)
        if status != 0:
            last = (stderr.strip().splitlines() or [f"exit status {status}"])[-1]
            raise Unreadable(f"reading {what} failed: {last}")
        try:
            found: dict[str, Any] = json.loads(stdout)
        except ValueError:
            raise Unreadable(f"reading {what} gave no JSON: {stdout[:80]!r}") from None
        return found

    def run(
        self,
        what: str,
        command: list[str],
        stdin: bytes,
        limit_s: float,
        tell: Callable[[str], None] | None = None,
    ) -> tuple[int, str, str]:
        """Run a command on the host, as root; its exit status and what it printed on stdout and stderr. `what`: is
        read, for errors. `tell`: as `read`.

        Raises:
            Unreachable, Unreadable: as `read`, but for the exit status.
        """
        self.open()
        if self.machine.ssh_user != "root":
            command = ["sudo", "-n", *command]
        self._backend.next.limit_s, self._backend.next.stdin, self._backend.next.tell = limit_s, stdin, tell
        try:
            answer = self.host.run(shlex.join(command))
        except TimeoutError:
            raise Unreadable(f"reading {what} took more than {limit_s:.0f} s") from None
        except (paramiko.SSHException, OSError, EOFError, AttributeError) as error:
            # AttributeError: of two reads the other one was first to drop the dead connection, as testinfra does.
            raise Unreadable(f"the connection broke while reading {what}: {error}") from error
        return answer.rc, answer.stdout, answer.stderr

    def send(self, name: str, text: bytes) -> str:
        """Write a file of that name into a new private folder below the host's /tmp and return that folder.

        Raises:
            Unreachable, Unreadable: as `read`.
        """
        self.open()
        folder = f"/tmp/gpulab-verify-{secrets.token_hex(8)}"
        try:
            with self._backend.client.open_sftp() as sftp:
                sftp.mkdir(folder, 0o700)
                sftp.putfo(io.BytesIO(text), f"{folder}/{name}", confirm=False)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise Unreadable(f"{self.machine.name} takes no file by SFTP: {error}") from error
        return folder

    def close(self) -> None:
        """End the connection if there is one."""
        client = vars(self._backend).get("client")
        if client is not None:
            client.close()


def whole(script: Path) -> str:
    """The text of a script with the modules of verify that it imports in front of it: nothing is installed there."""
    parts: dict[Path, str] = {}

    def add(path: Path) -> None:
        text = path.read_text()
        for line, module in re.findall(r"^(from verify\.([\w.]+) import .*\n)", text, re.MULTILINE):
            imported = ROOM / f"{module.replace('.', '/')}.py"
            if imported not in parts:
                add(imported)
            text = text.replace(line, "")
        parts[path] = text.replace(FUTURE, "")

    add(script)
    return FUTURE + "".join(parts.values())


def private_key(file: str | None) -> paramiko.PKey | None:
    """The key in a file; None: there is none that can be used without asking, so the agent's turn has come.

    Given a file's name, paramiko tries it as every type of key in turn and reports the last type that it is not.
    """
    if file is None:
        return None
    try:
        return paramiko.PKey.from_path(Path(file).expanduser())
    except (OSError, ValueError, paramiko.SSHException, UnknownKeyType):
        return None


def refusal(machine: Node | Guest, error: Exception) -> Unreachable:
    """Why a connection failed, in words, and what to do."""
    where = f"{machine.ssh_user}@{machine.ssh_hostname}:{machine.ssh_port}"
    known_hosts = machine.state / "known_hosts"
    node = isinstance(machine, Node)
    pin = "make bootstrap LAB={lab}" if node else "pyinfra {lab} deploy.py --limit {host}"
    match error:
        case paramiko.BadHostKeyException():
            return Unreachable(
                f"{machine.name}: {where} shows another host key than the one pinned in {known_hosts}",
                f"if the host was made anew on purpose: {pin}; otherwise find out who answers there",
            )
        case paramiko.SSHException() if "authentication" in str(error).lower():
            return Unreachable(
                f"{machine.name}: {where} refuses the key {machine.ssh_key or '(agent and default keys)'}",
                f"ssh-copy-id {machine.ssh_user}@{machine.ssh_hostname}" if node else pin,
            )
        case paramiko.SSHException() if "known_hosts" in str(error):
            return Unreachable(f"{machine.name}: no host key of {where} is pinned in {known_hosts}", pin)
        case TimeoutError():
            reason = f"no answer within {CONNECT_S:.0f} s"
        case paramiko.ssh_exception.NoValidConnectionsError():
            reason = ", ".join(
                sorted({str(getattr(cause, "strerror", None) or cause) for cause in error.errors.values()})
            )
        case OSError(strerror=str() as words):
            reason = words
        case _:
            reason = str(error) or type(error).__name__
    fix = "look at its console" if node else "pyinfra {lab} deploy.py --limit {host}"
    return Unreachable(f"{machine.name}: no SSH to {where}: {reason}", fix)
