# SPDX-License-Identifier: MIT
"""What a check of a service needs before it can say anything."""

from __future__ import annotations

from typing import Any

from verify.observations import Observation
from verify.verdicts import not_run


def answering(containers: Observation) -> None:
    """The check is not run when the engine does not answer."""
    if not containers["engine"]["version"]:
        not_run("the container engine does not answer")


def existing(containers: Observation, service: str) -> dict[str, Any]:
    """The container's state; the check is not run when the engine does not answer."""
    answering(containers)
    found: dict[str, Any] = containers["services"][service]
    return found


def running(containers: Observation, service: str) -> dict[str, Any]:
    """The state of a container that runs; else the check is not run."""
    found = existing(containers, service)
    if not found["running"]:
        not_run(f"container {service} does not run")
    return found
