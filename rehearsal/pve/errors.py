# SPDX-License-Identifier: MIT
"""How a request or a task ends badly, in the statuses and words of Proxmox VE."""

from __future__ import annotations

from typing import NoReturn


class ApiError(Exception):
    """An HTTP answer other than 200: `errors` names parameters, as in PVE's 400."""

    def __init__(self, status: int, message: str, errors: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.errors = errors


class TaskError(Exception):
    """A task that ends with this text as its exit status."""


class Killed(BaseException):
    """A worker ends here as by SIGKILL: nothing of it cleans up. Not an `Exception`, so that no handler holds it."""


def die(message: str) -> NoReturn:
    """PVE's `die`: there is no 404 and no 409, everything that is not a parameter is a 500."""
    raise ApiError(500, message)


def bad_parameters(errors: dict[str, str]) -> NoReturn:
    """PVE's 400: one message per parameter."""
    raise ApiError(400, "Parameter verification failed.", errors)


def no_permission(reason: str = "") -> NoReturn:
    """PVE's 403; `reason` is mostly `/path, Privilege`, and sometimes there is none."""
    raise ApiError(403, f"Permission check failed ({reason})" if reason else "Permission check failed")
