# SPDX-License-Identifier: MIT
"""The reboot of a host and the wait for its return, told by its boot id."""

from __future__ import annotations

import time

from paramiko import SSHException
from pyinfra.api import Host, StringCommand

from inventory import GpulabError


def reboot_and_wait(host: Host, boot_id: str, timeout_s: float, hint: str = "look at its console") -> None:
    """Reboot and return when SSH answers from another boot than `boot_id`.

    Raises:
        GpulabError: the reboot could not be ordered, or the host is not back within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    # A timer of systemd's own outlives this connection, and its acceptance can be told from its effect.
    order = StringCommand(
        *("systemd-run", "--quiet", "--collect", "--on-active=500ms", "--timer-property=AccuracySec=100ms"),
        *("systemctl", "reboot"),
    )
    # run_shell_command does not look at the operation's global arguments by itself.
    sudo = bool((host.current_op_global_arguments or {}).get("_sudo", False))
    accepted, output = host.run_shell_command(order, print_output=False, print_input=False, _sudo=sudo)
    if not accepted:
        raise GpulabError(f"{host.name}: its systemd refused the reboot", output.stderr)
    last = "still the old boot"
    while (left := deadline - time.monotonic()) > 0:
        try:
            host.connector.reconnect(left)
            answered, output = host.run_shell_command(
                StringCommand("cat", "/proc/sys/kernel/random/boot_id"), print_output=False, print_input=False
            )
            if answered and output.stdout.strip() != boot_id:
                return
            last = "still the old boot" if answered else output.stderr
        except (GpulabError, SSHException, EOFError, OSError) as error:
            last = str(error)
        time.sleep(0.5)
    raise GpulabError(f"{host.name}: not back {timeout_s:.0f} s after its reboot", f"Last answer: {last}", hint)
