# SPDX-License-Identifier: MIT
"""pyinfra's command line with nodes that are pyinfra's own `@fake` hosts; guests keep their real connector."""

import pyinfra_cli  # noqa: F401  (replaces sockets, so it comes first)
from pyinfra.connectors.fake import FakeConnector
from pyinfra_cli.main import main

from connectors.node import NodeConnector


class FakeNode(FakeConnector):
    """`@fake` under a plain name, as an inventory's nodes have."""

    __module__ = FakeConnector.__module__
    remote_commands = 0

    @staticmethod
    def make_names_data(name=None):
        yield name, {}, []


if __name__ == "__main__":
    import pyinfra.api.connectors
    import pyinfra.api.inventory

    real = pyinfra.api.inventory.get_all_connectors

    def connectors():
        return {name: FakeNode if found is NodeConnector else found for name, found in real().items()}

    pyinfra.api.inventory.get_all_connectors = connectors
    pyinfra.api.inventory.get_execution_connectors = lambda: {
        name: found for name, found in connectors().items() if found.handles_execution
    }
    main()
