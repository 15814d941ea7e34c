# SPDX-License-Identifier: MIT
"""What was read of each host: every subject once a session, hosts beside one another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from verify.hosts import Unreachable, Unreadable
from verify.verdicts import not_run

#: Reads one subject of one host. Raises Unreachable or Unreadable.
Reader = Callable[[str, str], dict[str, Any]]

#: Who reads, in pytest's configuration; tests put their own there.
READER = pytest.StashKey[Reader]()

#: Lanes that run at once. Each waits for a network, none computes.
LANES = 16


class Observation(dict[str, Any]):
    """One subject of one host, as its script printed it. `simulated`: what said so of itself."""

    @property
    def simulated(self) -> str:
        names = self.get("simulated", [])
        return f"{', '.join(names)} (by its own word)" if names else ""


class Observations:
    """Reads ahead in threads and hands each observation to whoever asks for it."""

    def __init__(self, reader: Reader, lane_of: Callable[[str, str], str] = lambda host, subject: host) -> None:
        self._reader = reader
        self._lane_of = lane_of
        self._futures: dict[tuple[str, str], Future[Observation]] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._closed = threading.Event()

    def start(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Begin to read the given (host, subject) pairs: those of one lane in order, lanes at once."""
        lanes: dict[str, list[tuple[str, str]]] = {}
        for key in dict.fromkeys(wanted):
            self._futures[key] = Future()
            lanes.setdefault(self._lane_of(*key), []).append(key)
        if lanes:
            self._pool = ThreadPoolExecutor(min(LANES, len(lanes)), thread_name_prefix="verify")
            for keys in lanes.values():
                self._pool.submit(self._work, keys)

    def get(self, host: str, subject: str) -> Observation:
        """The observation, read now unless it was begun; one that could not be read makes the check `not run`."""
        if (host, subject) not in self._futures:
            self._futures[host, subject] = Future()
            self._read((host, subject))
        try:
            return self._futures[host, subject].result()
        except Unreachable:
            not_run(f"{host} is not reachable")
        except Unreadable as error:
            not_run(str(error))

    def awaits(self, host: str, subject: str, seconds: float = 0.0) -> bool:
        """Is it being read, or still to be, after waiting for it for so long? What was not begun is not waited for."""
        future = self._futures.get((host, subject))
        return future is not None and bool(wait([future], seconds).not_done)

    def known(self) -> dict[tuple[str, str], Observation]:
        """All that has been read by now, by host and subject."""
        done = {key: future for key, future in self._futures.items() if future.done() and not future.cancelled()}
        return {key: future.result() for key, future in done.items() if future.exception() is None}

    def seconds(self) -> dict[str, dict[str, float]]:
        """How long each read took, by host and subject; also one that failed."""
        found: dict[str, dict[str, float]] = {}
        for (host, subject), seconds in list(self._seconds.items()):
            found.setdefault(host, {})[subject] = round(seconds, 3)
        return found

    def close(self) -> None:
        """Wait for reads that are under way and drop those that have not begun."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _work(self, keys: list[tuple[str, str]]) -> None:
        for key in keys:
            if self._closed.is_set():
                return
            self._read(key)

    def _read(self, key: tuple[str, str]) -> None:
        began = time.monotonic()
        try:
            found = Observation(self._reader(*key))
        except BaseException as error:  # it is raised again where the observation is asked for
            self._seconds[key] = time.monotonic() - began
            self._futures[key].set_exception(error)
        else:
            self._seconds[key] = time.monotonic() - began
            self._futures[key].set_result(found)
