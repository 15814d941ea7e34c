# SPDX-License-Identifier: MIT
"""Root on a guest's node, for what the API lets no token do."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from pyinfra.api import Host, QuoteString, State, StringCommand

from inventory import GpulabError, Node

#: Guests of a node share its connection.
_one_at_a_time: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class NodeShell:
    """The node's own SSH connection. It opens in a run that is limited to guests too."""

    def __init__(self, state: State, node: Node) -> None:
        self.node = node
        self.host: Host = state.inventory.get_host(node.name)

    def run(self, *commands: Sequence[str]) -> None:
        """Run the commands as one, each if the one before it went well.

        Raises:
            GpulabError: the node does not answer or a command failed.
        """
        self._run(commands)

    def output(self, *words: str) -> str:
        """What one command prints.

        Raises:
            GpulabError: as `run`.
        """
        return self._run([words])

    def _run(self, commands: Sequence[Sequence[str]]) -> str:
        lines = [StringCommand(*(QuoteString(word) for word in words)) for words in commands]
        command = StringCommand(*lines[:1], *(part for line in lines[1:] for part in ("&&", line)))
        with _one_at_a_time[self.node.name]:
            done, output = self.host.run_shell_command(command, print_output=False, print_input=False)
        if not done:
            what = " ".join(commands[0][:3])
            raise GpulabError(f"{self.node.name}: {what} failed over SSH", output.stderr.strip()[-2000:])
        return str(output.stdout)
