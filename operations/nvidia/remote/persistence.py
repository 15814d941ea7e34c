# SPDX-License-Identifier: MIT
"""Runs on the guest: the persistence daemon, and whether the driver stays initialized without a client."""

from typing import Any

from operations.remote.common import answer, run, units


def read(unit: str) -> dict[str, Any]:
    """The daemon's unit, and `mode`: what nvidia-smi says for each GPU (Enabled, Disabled)."""
    query = run("nvidia-smi", "--query-gpu=persistence_mode", "--format=csv,noheader")
    return {"unit": units([unit])[unit], "mode": query[1].split() if query[0] == 0 else []}


if __name__ == "__main__":
    answer(read)
