# SPDX-License-Identifier: MIT
"""pyinfra's own inventory loader, for programs that are not pyinfra's command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent.monkey
from pyinfra.api import Inventory, State
from pyinfra.context import ctx_state

if "pyinfra_cli" not in sys.modules:
    # Importing pyinfra's command line replaces the sockets of the whole process by gevent's. A pytest run or the
    # rehearsal must keep its own, and loading an inventory needs none.
    _patch_all, gevent.monkey.patch_all = gevent.monkey.patch_all, lambda **_: None
    try:
        import pyinfra_cli  # noqa: F401
    finally:
        gevent.monkey.patch_all = _patch_all

from pyinfra_cli.exceptions import CliError, UnexpectedExternalError
from pyinfra_cli.inventory import make_inventory
from pyinfra_cli.util import PYTHON_CODES, parse_cli_arg

__all__ = ["CliError", "UnexpectedExternalError", "parse_cli_arg", "resolve"]


def resolve(path: str | Path, override: Mapping[str, Any]) -> Inventory:
    """The inventory as `pyinfra PATH` sees it: group data, host data and `--data` merged, no host contacted."""
    PYTHON_CODES.clear()  # pyinfra keeps compiled files by name; a file that was edited must be read again
    with ctx_state.use(State()):
        return make_inventory(str(path), override_data=dict(override), cwd=str(Path.cwd()))
