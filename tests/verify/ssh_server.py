# SPDX-License-Identifier: MIT
"""A small SSH server on a loopback port: runs commands on this machine, takes files into this machine's folders."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from subprocess import PIPE
from types import TracebackType
from typing import IO, Any

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from paramiko.sftp import SFTP_OK


class Files(paramiko.SFTPServerInterface):
    """Enough of SFTP to make a folder and write a file in it."""

    def mkdir(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        os.mkdir(path, attr.st_mode or 0o777)
        return SFTP_OK

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle:
        handle = paramiko.SFTPHandle(flags)
        handle.writefile = handle.readfile = os.fdopen(os.open(path, flags, 0o600), "wb")  # type: ignore[attr-defined]
        return handle


class Session(paramiko.ServerInterface):
    def __init__(self, accepts: bool) -> None:
        self.accepts = accepts

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if self.accepts else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self.execute, args=(channel, command), daemon=True).start()
        return True

    @staticmethod
    def execute(channel: paramiko.Channel, command: bytes) -> None:
        given = channel.makefile("rb").read()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(given)
            stdin.seek(0)
            with subprocess.Popen(command, shell=True, stdin=stdin, stdout=PIPE, stderr=PIPE) as process:
                assert process.stdout is not None and process.stderr is not None
                # As a real server: what is printed goes out at once, and a stream that nobody takes holds its writer.
                errors = threading.Thread(target=pass_on, args=(process.stderr, channel.sendall_stderr))
                errors.start()
                pass_on(process.stdout, channel.sendall)
                errors.join()
            channel.send_exit_status(process.returncode)
            channel.close()


def pass_on(stream: IO[bytes], send: Callable[[bytes], None]) -> None:
    # A caller that has gone takes nothing more.
    with suppress(OSError):
        while chunk := os.read(stream.fileno(), 1 << 16):
            send(chunk)


class SshServer:
    """Listens on 127.0.0.1 while its context is open. `connections` counts those that were taken."""

    def __init__(self, accepts: bool = True) -> None:
        self.key = paramiko.RSAKey.generate(2048)
        self.accepts = accepts
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._transports: list[paramiko.Transport] = []

    def line(self, key: paramiko.PKey | None = None) -> str:
        """The server's line of known_hosts, or one with another key."""
        key = key or self.key
        return f"[127.0.0.1]:{self.port} {key.get_name()} {key.get_base64()}\n"

    def __enter__(self) -> SshServer:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def drop(self) -> None:
        """End all connections."""
        for transport in self._transports:
            transport.close()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._socket.close()
        self.drop()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            transport = paramiko.Transport(client)
            transport.add_server_key(self.key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
            self._transports.append(transport)
            try:
                transport.start_server(server=Session(self.accepts))
            except (paramiko.SSHException, EOFError):
                continue
