# SPDX-License-Identifier: MIT
"""The run record: one JSON-lines file under `runs/` for each pyinfra run.

pyinfra's own `--json` prints nothing when all hosts fail; this record is written line by line as things happen.
Lines: `run` (who, when, revision), `operation` (host, name, changed, seconds, remote commands, error),
`host` (totals at disconnect). Only operation names and error briefs of ours are recorded, never arguments or
output, so no secret can enter it.
"""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pyinfra.api import Host, State
from pyinfra.api.state import BaseStateCallback, StateStage

_records: WeakKeyDictionary[State, Record] = WeakKeyDictionary()


def of_run(state: State) -> Record:
    """The record of a pyinfra run; the first call begins it and has pyinfra call it back."""
    if state not in _records:
        _records[state] = Record(state)
        state.add_callback_handler(_records[state])
    return _records[state]


def note_failure(state: State, host: Host, reason: str) -> None:
    """Remember why a host failed: the first reason counts."""
    of_run(state).failures.setdefault(host.name, reason)


class Record(BaseStateCallback):
    """Writes the record; an instance is one file."""

    def __init__(self, state: State) -> None:
        moment = datetime.now(UTC)
        folder = Path(os.environ.get("GPULAB_RUNS", "runs"))
        folder.mkdir(exist_ok=True, parents=True)
        self.path = folder / f"{moment:%Y%m%dT%H%M%S.%fZ}-{os.getpid()}.jsonl"
        self.began = time.monotonic()
        self.open: dict[tuple[str, str], tuple[float, int, int]] = {}
        self.ended: dict[str, list[tuple[Host, dict[str, Any]]]] = {}
        #: Why each failed host failed, for the guests that wait for it.
        self.failures: dict[str, str] = {}
        self.write(
            kind="run",
            started=moment.isoformat(),
            user=getpass.getuser(),
            revision=_revision(),
            # Host names and file names only: `--data` may hold anything.
            command=[word for word in sys.argv[1:] if word.endswith(".py") or word in ("--dry", "-y", "--yes")],
            hosts=[host.name for host in state.inventory],
        )

    def write(self, **line: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def operation_host_start(self, state: State, host: Host, op_hash: str) -> None:
        self.open[host.name, op_hash] = (time.monotonic(), *_counters(host))

    def operation_host_success(self, state: State, host: Host, op_hash: str, retry_count: int = 0) -> None:
        self._operation(state, host, op_hash, None)

    def operation_host_error(
        self, state: State, host: Host, op_hash: str, retry_count: int = 0, max_retries: int = 0
    ) -> None:
        names = ", ".join(sorted(state.op_meta[op_hash].names))
        note_failure(state, host, f"{names!r} failed")
        self._operation(state, host, op_hash, self.failures[host.name])

    def operation_end(self, state: State, op_hash: str) -> None:
        """pyinfra knows whether an operation changed something only after the callbacks above."""
        for host, line in self.ended.pop(op_hash, []):
            meta = state.ops[host][op_hash].operation_meta
            self.write(**line, changed=bool(meta.did_change()))

    def host_connect_error(self, state: State, host: Host, error: Exception) -> None:
        note_failure(state, host, str(error).splitlines()[0])
        self.write(kind="connect", host=host.name, error=str(error).splitlines()[0])

    def host_disconnect(self, state: State, host: Host) -> None:
        # The operation that failed the last host has no end of its own.
        for op_hash in list(self.ended):
            self.operation_end(state, op_hash)
        commands, requests = _counters(host)
        results = state.get_results_for_host(host)
        self.write(
            kind="host",
            host=host.name,
            failed=host in state.failed_hosts,
            executed=state.current_stage >= StateStage.Execute,
            operations=results.ops,
            remote_commands=commands,
            api_requests=requests,
            seconds=round(time.monotonic() - self.began, 3),
        )

    def _operation(self, state: State, host: Host, op_hash: str, error: str | None) -> None:
        started, commands, requests = self.open.pop((host.name, op_hash))
        now_commands, now_requests = _counters(host)
        line = {
            "kind": "operation",
            "host": host.name,
            "name": ", ".join(sorted(state.op_meta[op_hash].names)),
            "seconds": round(time.monotonic() - started, 3),
            "remote_commands": now_commands - commands,
            "api_requests": now_requests - requests,
            "error": error,
        }
        self.ended.setdefault(op_hash, []).append((host, line))


def _counters(host: Host) -> tuple[int, int]:
    """Remote commands and API requests that the host's connector has sent so far."""
    connector = host.connector
    return getattr(connector, "remote_commands", 0), getattr(connector, "api_requests", 0)


def _revision() -> str | None:
    """The git revision of this checkout, with `+` when it has changes; None outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
