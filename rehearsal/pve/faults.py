# SPDX-License-Identifier: MIT
"""Faults of the API on demand: gateway errors, and replies that are lost after the work was done."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

_REASONS = {595: "No route to host", 596: "Broken pipe", 597: "Connection timed out", 599: "Too many redirections"}


@dataclass
class Fault:
    """`status` 0: the request is carried out and the connection closed without an answer."""

    method: str
    path: re.Pattern[str]
    status: int
    reason: str
    times: int


class Faults:
    """The faults waiting to happen, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, status: int, times: int, method: str, path: str, reason: str = "") -> None:
        """The next `times` requests of this method (`*`: any) whose path matches the expression get `status`."""
        fault = Fault(method, re.compile(path), status, reason or _REASONS.get(status, "Internal Server Error"), times)
        with self._lock:
            self._waiting.append(fault)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that this request runs into, counted off."""
        with self._lock:
            for fault in self._waiting:
                if fault.method in ("*", method) and fault.path.search(path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._waiting.remove(fault)
                    return fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
