# SPDX-License-Identifier: MIT
"""The whole job on the embedded lab: up, bootstrap, deploy, deploy again, plan, verify, down, and one line of verdict.

It runs the same commands as a user of a real lab; only the inventory differs. `full.py` has what comes after verify
in `make rehearse-full`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from inventory import GpulabError
from rehearsal import lab, paths

INVENTORY = "inventory/rehearsal.py"
REPORTS = Path("reports/rehearsal")

console = Console(stderr=True, highlight=False)


@dataclass
class RunFigures:
    """One pyinfra run, from its record: wall time, and remote commands per host."""

    seconds: float = 0
    remote_commands: dict[str, int] = field(default_factory=dict)
    api_requests: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    failed: int = 0


@dataclass
class Summary:
    """What stands in reports/rehearsal/summary.json and, in short, in the last line."""

    verdict: str = "FAIL"
    simulated: bool = True
    reason: str = ""
    hosts: int = 0
    changed_first: int = 0
    changed_second: int = 0
    checks: int = 0
    failed: int = 0
    inconclusive: int = 0
    not_run: int = 0
    seconds: float = 0
    first_run: RunFigures = field(default_factory=RunFigures)
    second_run: RunFigures = field(default_factory=RunFigures)
    dry_run: RunFigures = field(default_factory=RunFigures)
    #: With the benchmarks, and theirs: of the guest that took the longest.
    verify_seconds: float = 0
    benchmark_seconds: float = 0
    phases: dict[str, float] = field(default_factory=dict)
    #: What `make rehearse-full` did beyond that, and came through.
    survived: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The last line of `make rehearse`."""
        keys = ("hosts", "changed_first", "changed_second", "checks", "failed", "inconclusive", "not_run")
        counts = " ".join(f"{key}={getattr(self, key)}" for key in keys)
        more = f" survived={','.join(self.survived)}" if self.survived else ""
        return f"rehearsal: {self.verdict} {counts}{more} seconds={self.seconds:.0f}"


class Failed(GpulabError):
    """A phase of the rehearsal did not do what it should."""


def rehearse(keep: bool = False, more: Callable[[Summary], None] | None = None) -> int:
    """Rehearse, then do `more` on the verified lab; returns the exit status, 0 for PASS. `keep` leaves the lab up."""
    began = time.monotonic()
    summary = Summary()
    REPORTS.mkdir(parents=True, exist_ok=True)
    try:
        _phases(summary)
        if more is not None:
            more(summary)
        summary.verdict = "PASS"
    except GpulabError as error:
        summary.reason = error.brief
        console.print(str(error), style="red", markup=False)
    except KeyboardInterrupt:
        summary.reason = "interrupted"
    finally:
        try:
            if keep:
                _mark().unlink(missing_ok=True)
                console.print("The lab is left up: make lab-status, make lab-shell HOST=…, make lab-down.")
            elif _mark().exists():
                with phase(summary, "lab down"):
                    lab.down()
                _mark().unlink()
        except GpulabError as error:
            summary.verdict, summary.reason = "FAIL", error.brief
            console.print(str(error), style="red", markup=False)
        summary.seconds = round(time.monotonic() - began, 1)
        (REPORTS / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    report = REPORTS / "index.html"
    if report.exists():
        console.print(f"report: {report}", markup=False)
    console.print(f"figures: {REPORTS / 'summary.json'}", markup=False)
    print(summary.line(), flush=True)
    return 0 if summary.verdict == "PASS" else 1


def _phases(summary: Summary) -> None:
    for stale in ("index.html", "verify.json", "results.jsonl", "junit.xml", "verify.prom", "summary.json"):
        (REPORTS / stale).unlink(missing_ok=True)
    with phase(summary, "lab up"):
        _clear_the_way()
        _mark().write_text(str(os.getpid()))
        lab.up()
    with phase(summary, "bootstrap"):
        bootstrap()
    with phase(summary, "first deploy"):
        summary.first_run = pyinfra("first", "deploy.py", "-y")
        summary.hosts = len(summary.first_run.remote_commands)
        summary.changed_first = summary.first_run.changed
    with phase(summary, "second deploy"):
        summary.second_run = pyinfra("second", "deploy.py", "-y")
        summary.changed_second = summary.second_run.changed
        if summary.changed_second:
            raise Failed(
                f"The second deploy changed {summary.changed_second} things; expected none",
                "\n".join(f"  {name}" for name in _changed_names("second")),
                f"the whole output is in {log_of('second')}",
            )
    with phase(summary, "plan"):
        summary.dry_run = pyinfra("dry", "deploy.py", "--dry")
        if "plan: 0 changes, 0 reboots" not in log_of("dry").read_text():
            raise Failed("--dry plans changes on a converged lab", resolution=f"see {log_of('dry')}")
    with phase(summary, "verify"):
        verify(summary)


def bootstrap() -> None:
    """Make role, user and token on the lab's nodes, as an admin does once on a real lab."""
    command(
        "bootstrap",
        [
            program("pyinfra"),
            INVENTORY,
            "--limit",
            "nodes",
            "-y",
            "operations.proxmox.access.bootstrap",
            "name=Make role, user and API token",
        ],
    )


def _clear_the_way() -> None:
    """End what a killed rehearsal has left; a lab that somebody brought up by hand is theirs."""
    paths.cache().mkdir(parents=True, exist_ok=True)
    if _mark().exists() or not lab.is_up():
        lab.down()
        return
    raise Failed("A lab is up that this rehearsal did not start.", resolution="make lab-down, then make rehearse")


def _mark() -> Path:
    return paths.cache() / "rehearsing"


def pyinfra(name: str, *words: str) -> RunFigures:
    """Run pyinfra on the lab and read its figures from the run record."""
    runs = REPORTS / "runs" / name
    for old in runs.glob("*.jsonl"):
        old.unlink()
    began = time.monotonic()
    command(name, [program("pyinfra"), INVENTORY, *words], GPULAB_RUNS=str(runs))
    figures = RunFigures(seconds=round(time.monotonic() - began, 2))
    for line in record(name):
        if line["kind"] == "host":
            figures.remote_commands[line["host"]] = line["remote_commands"]
            figures.api_requests[line["host"]] = line["api_requests"]
        if line["kind"] == "operation":
            figures.changed += line["changed"]
            figures.failed += line["error"] is not None
    return figures


def record(name: str) -> Iterator[dict[str, Any]]:
    for path in sorted((REPORTS / "runs" / name).glob("*.jsonl")):
        yield from (json.loads(line) for line in path.read_text().splitlines())


def _changed_names(name: str) -> list[str]:
    return [f"{line['host']}: {line['name']}" for line in record(name) if line.get("changed")]


def verify(summary: Summary) -> None:
    began = time.monotonic()
    words = [program("pytest"), "verify", "--lab", INVENTORY, "--report", str(REPORTS), "--benchmarks", "full"]
    status = command("verify", words, check=False)
    summary.verify_seconds = round(time.monotonic() - began, 2)
    try:
        result: Mapping[str, Any] = json.loads((REPORTS / "verify.json").read_text())
    except FileNotFoundError:
        raise Failed("verify wrote no report", tail(log_of("verify"))) from None
    for key in ("checks", "failed", "inconclusive", "not_run"):
        setattr(summary, key, result[key])
    of_benchmarks = [
        sum(seconds for subject, seconds in reads.items() if subject.endswith("bench"))
        for reads in result["reads"].values()
    ]
    summary.benchmark_seconds = round(max(of_benchmarks, default=0.0), 2)
    if status != 0:
        raise Failed(f"verify ended with status {status}", tail(log_of("verify")))


def command(name: str, words: list[str], check: bool = True, **environment: str) -> int:
    """Run a command with its output in a log of its own; show the end of it when it fails."""
    log_of(name).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(name), "w") as log:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    if check and done.returncode != 0:
        raise Failed(
            f"{name}: exit status {done.returncode}", tail(log_of(name)), f"the whole output is in {log_of(name)}"
        )
    return done.returncode


def program(name: str) -> str:
    """The program of this virtual environment, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def log_of(name: str) -> Path:
    return REPORTS / "logs" / f"{name}.log"


def tail(path: Path, lines: int = 40) -> str:
    return "\n".join(f"  {line}" for line in path.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def phase(summary: Summary, name: str) -> Iterator[None]:
    """Show that a phase is going on, then how long it took."""
    began = time.monotonic()
    done: Callable[[], float] = lambda: round(time.monotonic() - began, 1)  # noqa: E731
    console.print(f"[bold]{name}[/] …")
    try:
        yield
    except BaseException:
        console.print(f"[bold red]{name}[/] failed after {done()} s")
        raise
    finally:
        summary.phases[name] = done()
    console.print(f"[bold green]{name}[/] {done()} s")
