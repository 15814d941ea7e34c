# SPDX-License-Identifier: MIT
"""What nodes and guests have in common: strict host keys, counted commands, connections that survive a reboot."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paramiko import SSHException
from pyinfra.api import Host, State, StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.connectors.sshuserclient.client import get_host_keys
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra_cli.exceptions import CliError

import inventory
from inventory import GpulabError, InventoryError, Lab
from operations import run
from operations.proxmox import host_keys

#: Milliseconds after which data that the other side has not acknowledged ends the connection.
UNACKNOWLEDGED_MS = 30_000


class LabConnector(SSHConnector):
    """SSH to a host of the lab.

    The whole inventory is validated when the first connector is made, before any connection. `remote_commands`
    counts every command and file transfer, `api_requests` every request to the PVE API.
    """

    handles_execution = True
    #: Is the host planned from nothing, because it does not exist yet?
    assumed = False

    def __init__(self, state: State, host: Host) -> None:
        try:
            self.lab: Lab = inventory.of_run(state)
        except InventoryError as error:
            raise CliError(str(error)) from None
        if state.limit_hosts is not None and not list(state.limit_hosts):
            raise CliError(
                "--limit matches no host; nothing was done.\n"
                f"The inventory has {', '.join(known.name for known in state.inventory)}."
            )
        run.current(state)
        super().__init__(state, host)
        self.remote_commands = 0
        self.api_requests = 0
        self.client: Any = None
        declared = self.lab.nodes.get(host.name) or self.lab.guests[host.name]
        self.data.update(
            ssh_hostname=declared.ssh_hostname,
            ssh_user=declared.ssh_user,
            ssh_port=declared.ssh_port,
            ssh_key=declared.ssh_key and str(Path(declared.ssh_key).expanduser()),
            ssh_known_hosts_file=str(host_keys.known_hosts(declared.state)),
            ssh_strict_host_key_checking="yes",
        )
        self.address = (declared.ssh_hostname, declared.ssh_port)
        self.lab_state: Path = declared.state

    @staticmethod
    def make_names_data(name: str) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        yield name, {}, []

    def connect(self) -> None:
        self.open()

    def open(self) -> None:
        """Connect now. pyinfra remembers known_hosts files for the whole run; ours changes within one."""
        get_host_keys.cache.clear()
        if not host_keys.known(self.lab_state, *self.address):
            raise ConnectError(
                f"no host key is known for {host_keys.label(*self.address)} in "
                f"{host_keys.known_hosts(self.lab_state)}; `make bootstrap LAB=…` asks for it"
            )
        super().connect()
        transport = self.client.get_transport()
        transport.set_keepalive(10)
        transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)

    def close(self) -> None:
        """Drop the connection; the next command opens a new one."""
        self.get_file_transfer_connection.cache.clear()
        if self.client is not None:
            self.client.close()
            self.client = None

    def disconnect(self) -> None:
        self.close()

    def count_request(self) -> None:
        """One more request to the PVE API for this host."""
        self.api_requests += 1

    def reconnect(self, deadline_s: float) -> None:
        """Wait until the host answers SSH again.

        Raises:
            GpulabError: it does not within `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            self.close()
            try:
                self.open()
                return
            except ConnectError as error:
                if time.monotonic() >= deadline:
                    raise GpulabError(
                        f"{self.host.name}: no SSH after {deadline_s:.0f} s",
                        f"Last answer: {error}",
                        "look at its console; when it is up, deploy again",
                    ) from None
                time.sleep(0.3)

    def await_usable(self, deadline_s: float) -> None:
        """Wait until the host answers SSH, unless it does so over the connection that is open.

        Raises:
            GpulabError: it does not within `deadline_s` seconds.
        """
        try:
            self._usable()
        except ConnectError:
            self.reconnect(deadline_s)

    def run_shell_command(
        self, command: StringCommand, print_output: bool = False, print_input: bool = False, **arguments: Any
    ) -> tuple[bool, CommandOutput]:
        """Run a command; a connection that a reboot made stale is opened again once, before anything is sent."""
        self.remote_commands += 1
        try:
            self._usable()
        except ConnectError as error:
            # pyinfra ends the whole run on a ConnectError here; a failed command ends only this host.
            return False, CommandOutput([OutputLine("stderr", str(error))])
        result: tuple[bool, CommandOutput] = super().run_shell_command(command, print_output, print_input, **arguments)
        return result

    def put_file(self, *arguments: Any, **keywords: Any) -> bool:
        self.remote_commands += 1
        self._usable()
        return bool(super().put_file(*arguments, **keywords))

    def get_file(self, *arguments: Any, **keywords: Any) -> bool:
        self.remote_commands += 1
        self._usable()
        return bool(super().get_file(*arguments, **keywords))

    def _usable(self) -> None:
        if self.client is not None:
            transport = self.client.get_transport()
            if transport is not None and transport.is_active():
                try:
                    transport.open_session(timeout=10).close()
                    return
                except (SSHException, EOFError, OSError):
                    pass
            self.close()
        self.open()
