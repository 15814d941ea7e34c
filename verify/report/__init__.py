# SPDX-License-Identifier: MIT
"""The report of a run: one JSON file for programs and one self-contained HTML file for people."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from inventory import GpulabError
from inventory.secrets import Secrets
from verify.verdicts import Result, Severity, Verdict, count


@dataclass(frozen=True)
class Run:
    """A whole verify run. `began`: seconds since the epoch; `simulated`: what the inventory says stands in."""

    lab: str
    file: str
    began: float
    duration_s: float
    revision: str
    exit_status: int
    results: list[Result]
    limits: tuple[str, ...] = ()
    simulated: list[str] = field(default_factory=list)
    #: Real guests whose `expected_not_run` is not empty: it excuses nothing.
    unexcused: list[str] = field(default_factory=list)
    #: Where it was written.
    folder: Path | None = None

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.began))

    @property
    def stand_ins(self) -> list[str]:
        """Everything that stood in for the real thing, declared or seen."""
        return sorted({*self.simulated, *(result.simulated for result in self.results if result.simulated)})

    def of(self, verdict: Verdict) -> list[Result]:
        """The results of that verdict, the most severe first."""
        levels = list(Severity)
        found = [result for result in self.results if result.verdict is verdict]
        return sorted(found, key=lambda result: levels.index(result.severity))

    def as_json(self) -> dict[str, Any]:
        """What verify.json holds."""
        return {
            "lab": self.lab,
            "file": self.file,
            "when": self.when,
            "duration_s": round(self.duration_s, 3),
            "revision": self.revision,
            "limit": list(self.limits),
            "simulated": self.stand_ins,
            "exit_status": self.exit_status,
            "checks": len(self.results),
            "passed": count(self.results, Verdict.PASS),
            "failed": count(self.results, Verdict.FAIL),
            "inconclusive": count(self.results, Verdict.INCONCLUSIVE),
            "not_run": count(self.results, Verdict.NOT_RUN),
            "expected_not_run": sorted({result.id for result in self.results if result.expected}),
            "results": [dataclasses.asdict(result) for result in self.results],
        }


def write(run: Run, folder: Path, states: Iterable[Path]) -> Run:
    """Write verify.json and index.html into `folder`; secrets kept in `states` are masked, should one be in a message.

    Returns the run as it was written.
    """
    hidden = secret_words(states)
    results = [
        dataclasses.replace(result, message=masked(result.message, hidden), fix=masked(result.fix, hidden))
        for result in run.results
    ]
    run = dataclasses.replace(run, results=results, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verify.json").write_text(json.dumps(run.as_json(), indent=2) + "\n")
    (folder / "index.html").write_text(html(run))
    return run


def html(run: Run) -> str:
    """The page: no script, no outside asset, readable without colour."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    hosts: dict[str, dict[str, list[Result]]] = {}
    for result in run.results:
        hosts.setdefault(result.host, {}).setdefault(result.subject, []).append(result)
    return environment.get_template("index.html.j2").render(run=run, counts=run.as_json(), hosts=hosts)


def revision(root: Path) -> str:
    """The checked-out commit, marked when there are changes on top; empty outside of git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def secret_words(states: Iterable[Path]) -> list[str]:
    """Every stored secret, and of API tokens also the part behind the name, the longest first."""
    words: set[str] = set()
    for state in set(states):
        try:
            values = Secrets(state).values()
        except GpulabError:
            continue
        words.update(values, (value.rpartition("=")[2] for value in values))
    return sorted((word for word in words if len(word) >= 6), key=len, reverse=True)


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` without the given words."""
    for secret in secrets:
        text = text.replace(secret, "(secret)")
    return text
