# SPDX-License-Identifier: MIT
"""How verify starts a job of a tenant's. Goes to the guest in front of the programs that do."""

from __future__ import annotations

import os

PROGRAM = "/usr/local/bin/gpulab-run"


def as_root() -> dict[str, str]:
    """The environment for gpulab-run, which behind sudo asks for the groups of the user that verify logs in as."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}
