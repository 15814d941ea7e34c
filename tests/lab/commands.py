# SPDX-License-Identifier: MIT
"""What a user types at a lab, and the lab's own trusted way into its hosts, for tests that look at what comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rehearsal import host, lab
from rehearsal.rehearse import bootstrap, program

INVENTORY = "inventory/rehearsal.py"


@dataclass
class Outcome:
    """One command as a user runs it: exit status and everything that it printed, colours removed."""

    status: int
    output: str


@dataclass
class Deployed:
    """The commands of a user, and the lab's own trusted way into its hosts."""

    reports: Path

    def pyinfra(self, *words: str, lab: Path | str = INVENTORY, **environment: str) -> Outcome:
        return run([program("pyinfra"), str(lab), *words], GPULAB_RUNS=str(self.reports / "runs"), **environment)

    def killed(self, seconds: float, *words: str) -> None:
        """The same, killed with all its processes after so many seconds."""
        end = time.monotonic() + seconds
        self.killed_when(lambda: time.monotonic() >= end, *words)

    def killed_when(self, happened: Callable[[], bool], *words: str) -> None:
        """The same, killed as soon as something has happened, which it must within five minutes."""
        command = [program("pyinfra"), INVENTORY, *words]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "GPULAB_RUNS": str(self.reports / "runs")},
        )
        deadline = time.monotonic() + 300
        try:
            while not happened():
                assert time.monotonic() < deadline, f"never happened: {' '.join(command)}"
                time.sleep(0.05)
        finally:
            # A run that has ended before its time is nobody's group any more.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def deploy(self, *words: str) -> Outcome:
        return self.pyinfra("deploy.py", "-y", *words)

    def plan(self, *words: str) -> Outcome:
        return self.pyinfra("deploy.py", "--dry", *words)

    def verify(self, *words: str, lab: Path | str = INVENTORY) -> tuple[Outcome, set[str]]:
        """The outcome, and `id[host]` of each check that failed."""
        done = run([program("pytest"), "verify", "--lab", str(lab), "--report", str(self.reports), *words])
        result = json.loads((self.reports / "verify.json").read_text())
        return done, {f"{item['id']}[{item['host']}]" for item in result["results"] if item["verdict"] == "fail"}

    def on(self, name: str, *words: str) -> str:
        """Run a command in a host as its console would, without SSH."""
        done = host.run(name, list(words))
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return str(done.stdout)

    def record(self) -> list[dict[str, Any]]:
        """The newest run record."""
        newest = max((self.reports / "runs").glob("*.jsonl"))
        return [json.loads(line) for line in newest.read_text().splitlines()]

    def changed(self) -> list[str]:
        """What the newest run changed."""
        return [f"{line['host']}: {line['name']}" for line in self.record() if line.get("changed")]


@contextmanager
def deployed_lab(reports: Path, nodes: Sequence[str] = lab.NODES) -> Iterator[Deployed]:
    """These nodes with a guest each, up and converged; down afterwards. What the commands leave lies in `reports`."""
    if lab.is_up():
        pytest.fail("a lab is up that these tests did not start: make lab-down")
    try:
        lab.up(nodes)
        bootstrap()
        hosts = Deployed(reports)
        done = hosts.deploy()
        assert done.status == 0, done.output[-4000:]
        yield hosts
    finally:
        lab.down()


def run(words: list[str], **environment: str) -> Outcome:
    done = subprocess.run(
        words,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return Outcome(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
