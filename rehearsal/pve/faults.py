# SPDX-License-Identifier: MIT
"""Faults of the API on demand: gateway errors, replies that are lost or late, tasks that end badly or not at all."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_REASONS = {595: "No route to host", 596: "Broken pipe", 597: "Connection timed out", 599: "Too many redirections"}


@dataclass
class Fault:
    """`status` 0: the request is carried out and the connection closed without an answer.

    `carried_out`: it is carried out before it gets its status. `skip`: so many such requests are spared first.
    """

    method: str
    path: re.Pattern[str]
    status: int
    reason: str
    times: int
    carried_out: bool = False
    skip: int = 0


@dataclass
class Trouble:
    """What befalls a request that is otherwise answered.

    `hang_up`: the connection is closed before the request is looked at. `meanwhile`: somebody does this first.
    `delay`: seconds that the answer comes late. `skip`: so many such requests are spared first.
    """

    method: str
    path: re.Pattern[str]
    times: int
    hang_up: bool = False
    meanwhile: Callable[[], None] | None = None
    delay: float = 0.0
    skip: int = 0


@dataclass
class TaskTrouble:
    """What befalls a task of this type: it fails with `status` without doing anything, logs `warnings` after its
    work, or, with `status` and `warnings` empty, begins only when `released` is set.

    `after`: it befalls the task in the middle of its work, right after it has logged a line with this text; `killed`
    then ends the worker as SIGKILL would. `skip`: so many such tasks are spared first.
    """

    kind: str
    times: int
    status: str = ""
    log: Sequence[str] = ()
    warnings: Sequence[str] = ()
    after: str = ""
    killed: bool = False
    skip: int = 0
    released: threading.Event = field(default_factory=threading.Event)


class Faults:
    """The faults waiting to happen, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._troubles: list[Trouble] = []
        self._task_troubles: list[TaskTrouble] = []
        self._held: list[threading.Event] = []
        self._never: list[Fault | Trouble | TaskTrouble] = []
        self._lock = threading.Lock()

    @property
    def never_happened(self) -> list[Fault | Trouble | TaskTrouble]:
        """The faults that nothing has run into since `clear()`."""
        with self._lock:
            return list(self._never)

    def trouble(self, trouble: Trouble) -> None:
        with self._lock:
            self._troubles.append(trouble)
            self._never.append(trouble)

    def take_trouble(self, method: str, path: str) -> Trouble | None:
        """What befalls this request, counted off."""
        with self._lock:
            for trouble in self._troubles:
                if trouble.method in ("*", method) and trouble.path.search(path):
                    if trouble.skip > 0:
                        trouble.skip -= 1
                        continue
                    trouble.times -= 1
                    self._has_happened(trouble)
                    if trouble.times <= 0:
                        self._troubles.remove(trouble)
                    return trouble
        return None

    def task_trouble(self, trouble: TaskTrouble) -> None:
        with self._lock:
            self._task_troubles.append(trouble)
            self._held.append(trouble.released)
            self._never.append(trouble)

    def take_task_trouble(self, kind: str) -> TaskTrouble | None:
        """What befalls the task that begins now, counted off."""
        with self._lock:
            for trouble in self._task_troubles:
                if trouble.kind == kind:
                    if trouble.skip > 0:
                        trouble.skip -= 1
                        continue
                    trouble.times -= 1
                    self._has_happened(trouble)
                    if trouble.times <= 0:
                        self._task_troubles.remove(trouble)
                    return trouble
        return None

    def add(
        self,
        status: int,
        times: int,
        method: str,
        path: str,
        reason: str = "",
        carried_out: bool = False,
        skip: int = 0,
    ) -> None:
        """The next `times` requests of this method (`*`: any) whose path matches the expression get `status`."""
        reason = reason or _REASONS.get(status, "Internal Server Error")
        fault = Fault(method, re.compile(path), status, reason, times, carried_out, skip)
        with self._lock:
            self._waiting.append(fault)
            self._never.append(fault)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that this request runs into, counted off."""
        with self._lock:
            for fault in self._waiting:
                if fault.method in ("*", method) and fault.path.search(path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    self._has_happened(fault)
                    if fault.times <= 0:
                        self._waiting.remove(fault)
                    return fault
        return None

    def _has_happened(self, one: Fault | Trouble | TaskTrouble) -> None:
        self._never = [other for other in self._never if other is not one]

    def clear(self) -> None:
        with self._lock:
            self._never.clear()
            self._waiting.clear()
            self._troubles.clear()
            self._task_troubles.clear()
            for held in self._held:
                held.set()
            self._held.clear()
