# SPDX-License-Identifier: MIT
"""`@guest/NAME`: a VM that may not exist yet, planned from nothing until it does and configured in the same run.

The API is asked first. Absent or stopped: nothing is read, every fact is empty, the plan says `assumed`. Running
and reachable: a host like any other. Running but unreachable: the host fails, in `--dry` too, since an outage must
not plan as "build everything".

During a rebuild the connection stays closed until the new system disk is in place: nothing is decided from what the
old system says, and one that cannot be reached can be rebuilt.
"""

from __future__ import annotations

import time
from typing import Any

from pyinfra.api import Host, State, StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.state import StateStage
from pyinfra.connectors.util import CommandOutput

from connectors.base import LabConnector
from inventory import GpulabError
from operations.proxmox import host_keys, order, restore, vm
from operations.proxmox.client import Client


class GuestConnector(LabConnector):
    """SSH to a guest, opened when the guest is there. `closed`: it is about to get another system."""

    def __init__(self, state: State, host: Host) -> None:
        super().__init__(state, host)
        self.closed = order.begun(state, self.lab)
        restore.begun(state, self.lab)

    def connect(self) -> None:
        """Decide which of the three cases holds.

        Raises:
            ConnectError: the node's API does not answer, or the guest runs and cannot be reached.
        """
        if self.closed:
            self.assumed = True
            return
        guest = self.lab.guests[self.host.name]
        node = self.lab.node_of(guest)
        try:
            client = Client(node, retry_s=5, host=self.host)
            found = vm.read_state(client, guest.vmid)
        except GpulabError as error:
            raise ConnectError(f"waits for {node.name}: {str(error).removeprefix(f'{node.name}: ')}") from None
        if found is None or not vm.is_ours(found.config) or found.status != "running":
            self.assumed = True
            return
        # A guest that is still booting (a killed run can leave one) gets the rest of its boot time.
        deadline = time.monotonic() + max(5.0, guest.boot_timeout_s - found.uptime_s)
        while True:
            try:
                if not host_keys.known(self.lab_state, *self.address):
                    vm.pin_host_keys(client, guest, self.lab_state)
                self.open()
                return
            except (ConnectError, GpulabError) as error:
                if found.uptime_s >= guest.boot_timeout_s or time.monotonic() >= deadline:
                    raise ConnectError(
                        f"{self.host.name} runs (VM {guest.vmid} on {node.name}) and cannot be reached: {error}"
                    ) from None
                if "does not match" in str(error) or "Authentication" in str(error):
                    raise ConnectError(str(error)) from None
            time.sleep(1)

    def open(self) -> None:
        """As over SSH, unless the guest is about to get another system."""
        if self.closed:
            raise ConnectError(f"{self.host.name}: its connection stays closed until the new system disk is in place")
        super().open()

    def run_shell_command(
        self, command: StringCommand, print_output: bool = False, print_input: bool = False, **arguments: Any
    ) -> tuple[bool, CommandOutput]:
        """As over SSH; while a guest that does not exist yet is planned, every command succeeds with nothing."""
        if self._only_planned():
            return True, CommandOutput([])
        return super().run_shell_command(command, print_output, print_input, **arguments)

    def put_file(self, *arguments: Any, **keywords: Any) -> bool:
        if self._only_planned():
            return True
        return super().put_file(*arguments, **keywords)

    def get_file(self, *arguments: Any, **keywords: Any) -> bool:
        if self._only_planned():
            return True
        return super().get_file(*arguments, **keywords)

    def _only_planned(self) -> bool:
        return self.assumed and self.state.current_stage < StateStage.Execute
