# SPDX-License-Identifier: MIT
"""Workers: each has a UPID, runs in a thread of its own, and ends with an exit status and a log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from rehearsal.pve import access
from rehearsal.pve.errors import ApiError, Killed, TaskError, die
from rehearsal.pve.state import Store, Task

Log = Callable[[str], None]
Body = Callable[[Log], None]
# How long a second writer waits for a VM's configuration file, in seconds.
LOCK_WAIT = 10.0


class Tasks:
    """The workers of a node, and the lock of each VM's configuration file that they hold."""

    def __init__(self, store: Store, lock_wait: float = LOCK_WAIT) -> None:
        self._store = store
        self._lock_wait = lock_wait
        self._threads: dict[str, threading.Thread] = {}
        self._aborted: set[str] = set()
        self._file_locks: dict[int, threading.Lock] = {}

    def start(self, kind: str, ident: object, user: str, body: Body, vmid: int | None = None) -> str:
        """Run `body` as a worker and return its UPID; with `vmid` it holds that VM's configuration file."""
        task = self._register(kind, str(ident), user)
        thread = threading.Thread(target=self._run, args=(task, body, vmid), name=task.upid, daemon=True)
        self._threads[task.upid] = thread
        thread.start()
        return task.upid

    def config_file(self, vmid: int) -> FileLock:
        """The configuration file's lock, for use in `with`; ApiError when another worker keeps it."""
        with self._store.lock:
            lock = self._file_locks.setdefault(vmid, threading.Lock())
        return FileLock(lock, vmid, self._lock_wait)

    def abort(self, upid: str) -> None:
        """DELETE of a task: a body that looks at its log finds itself interrupted."""
        self._aborted.add(upid)

    def find(self, upid: str) -> Task:
        with self._store.lock:
            for task in self._store.state.tasks:
                if task.upid == upid:
                    return task
        die(f"unable to parse worker upid '{upid}'" if not upid.startswith("UPID:") else "no such task")

    def wait(self, upid: str) -> str:
        """Wait until a worker has ended; its exit status."""
        if (thread := self._threads.get(upid)) is not None:
            thread.join()
        return self.find(upid).exitstatus or "unexpected status"

    def join(self, timeout: float) -> None:
        """Wait until no worker runs, those included that others start; at most `timeout` seconds for each."""
        while threads := [thread for thread in list(self._threads.values()) if thread.is_alive()]:
            for thread in threads:
                thread.join(timeout)
                if thread.is_alive():
                    return

    def _register(self, kind: str, ident: str, user: str) -> Task:
        with self._store.lock:
            state = self._store.state
            pid, now = state.next_pid, int(time.time())
            state.next_pid += 1
            # A worker's start in clock ticks since boot; unique here by the pid.
            started = int(time.monotonic() * 100) & 0xFFFFFFFF
            upid = f"UPID:{state.node}:{pid:08X}:{started:08X}:{now:08X}:{kind}:{ident}:{user}:"
            task = Task(
                upid=upid, node=state.node, pid=pid, pstart=started, starttime=now, type=kind, id=ident, user=user
            )
            state.tasks.append(task)
            self._store.save()
        return task

    def _run(self, task: Task, body: Body, vmid: int | None) -> None:
        def log(line: str) -> None:
            if task.upid in self._aborted:
                raise TaskError("interrupted by signal")
            task.log.append(line)

        status = "OK"
        try:
            if vmid is None:
                body(log)
            else:
                with self.config_file(vmid):
                    body(log)
        except (TaskError, ApiError) as error:
            status = str(error)
        except Killed:
            status = "unexpected status"
        except Exception as error:  # a worker's crash must be seen as a failed task, not as one that runs for ever
            logging.getLogger(__name__).exception("worker %s", task.upid)
            status = f"rehearsal: {type(error).__name__}: {error}"
        with self._store.lock:
            if status != "unexpected status":
                task.log.append("TASK OK" if status == "OK" else f"TASK ERROR: {status}")
            task.endtime = int(time.time())
            task.exitstatus = status
            self._store.save()
        self._threads.pop(task.upid, None)


class FileLock:
    """One VM's configuration file, as flock would hold it."""

    def __init__(self, lock: threading.Lock, vmid: int, wait: float) -> None:
        self._lock = lock
        self._vmid = vmid
        self._wait = wait

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._wait):
            die(f"can't lock file '/var/lock/qemu-server/lock-{self._vmid}.conf' - got timeout")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def status_view(task: Task) -> dict[str, Any]:
    """GET /nodes/N/tasks/UPID/status."""
    view = _common_view(task)
    view["status"] = "running" if task.exitstatus is None else "stopped"
    if task.exitstatus is not None:
        view["exitstatus"] = task.exitstatus
    return view


def list_view(task: Task) -> dict[str, Any]:
    """An entry of GET /nodes/N/tasks, where `status` is the exit status."""
    view = _common_view(task)
    if task.exitstatus is not None:
        view.update(status=task.exitstatus, endtime=task.endtime)
    return view


def is_owner(user: str, task: Task) -> bool:
    """A user owns the tasks of its tokens too; a token only its own."""
    return user in (task.user, task.user.partition("!")[0], access.ROOT)


def _common_view(task: Task) -> dict[str, Any]:
    user, _, token_id = task.user.partition("!")
    view: dict[str, Any] = {
        "upid": task.upid,
        "node": task.node,
        "pid": task.pid,
        "pstart": task.pstart,
        "starttime": task.starttime,
        "type": task.type,
        "id": task.id,
        "user": user,
    }
    if token_id:
        view["tokenid"] = token_id
    return view
