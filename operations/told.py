# SPDX-License-Identifier: MIT
"""A shell command whose failure is told in words instead of a dump of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyinfra.api import Host, State, StringCommand
from pyinfra.connectors.util import CommandOutput

from inventory import GpulabError
from operations import step


class Told(StringCommand):
    """A command that calls `explain` with its output when it fails, and fails the host with that error.

    `explain` may read facts. With `-v` and more, pyinfra has printed the whole output already.
    """

    def __init__(self, *bits: Any, explain: Callable[[str], GpulabError], **arguments: Any) -> None:
        super().__init__(*bits, **arguments)
        self.explain = explain

    def execute(self, state: State, host: Host, connector_arguments: Any) -> tuple[bool, CommandOutput]:
        done, output = self.run(state, host, connector_arguments)
        if done:
            return done, output
        try:
            error = self.explain(output.output)
        except GpulabError as other:
            error = other
        # Returned without the output, which pyinfra would print behind the message.
        return step.refuse(state, host, error), CommandOutput([])

    def run(self, state: State, host: Host, connector_arguments: Any) -> tuple[bool, CommandOutput]:
        """Run it; whether it succeeded, and its output."""
        result: tuple[bool, CommandOutput] = super().execute(state, host, connector_arguments)
        return result


class Live(Told):
    """The same for a command that takes its time: each of its lines is printed as it comes."""

    def run(self, state: State, host: Host, connector_arguments: Any) -> tuple[bool, CommandOutput]:
        connector_arguments.update(self.connector_arguments)
        result: tuple[bool, CommandOutput] = host.run_shell_command(
            self, print_output=True, print_input=state.print_input, **connector_arguments
        )
        return result
