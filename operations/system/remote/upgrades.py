# SPDX-License-Identifier: MIT
"""Runs on the guest: does it upgrade itself?"""

from typing import Any

from operations.remote.common import answer, packages, text, units


def read(package: str, path: str, timers: list[str]) -> dict[str, Any]:
    """The package's version, the text of our file, and the units that start it."""
    return {"package": packages([package])[package], "file": text(path), "timers": units(timers)}


if __name__ == "__main__":
    answer(read)
