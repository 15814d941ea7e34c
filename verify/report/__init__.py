# SPDX-License-Identifier: MIT
"""The reports of a run: a page for people, and JSON, JUnit XML and metrics for programs. docs/verify.md lists them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from inventory import GpulabError
from inventory.secrets import Secrets
from verify.report import history
from verify.report.history import Changes
from verify.report.outputs import json_lines, junit, prometheus
from verify.report.page import html
from verify.report.run import Figure, Run

__all__ = ["Figure", "Run", "html", "masked", "revision", "secret_words", "write"]


def write(run: Run, folder: Path, states: Iterable[Path]) -> tuple[Run, Changes | None]:
    """Write the reports into `folder` and keep the run; secrets kept in `states` are masked, should one be in a text.

    A run of chosen checks leaves the metrics of the last whole run as they are, and one that leaves out benchmarks or
    disruptive checks has what they came to last. Returns the run as it was written,
    and what is new since the one before.
    """
    run = without_secrets(dataclasses.replace(run, folder=folder), secret_words(states))
    past = history.earlier(folder, run.selection)
    since = history.changes(past[0], run, past[1:]) if past else None
    run = dataclasses.replace(run, unmeasured=history.unmeasured(run, past))
    place = history.place(folder, run.began)
    put(folder / "verify.json", json.dumps(run.as_json(), indent=2) + "\n")
    put(folder / "index.html", html(run, since, history.failing_since(run, past)))
    put(folder / "results.jsonl", json_lines(run))
    put(folder / "junit.xml", junit(run))
    if not run.selection:
        put(folder / "verify.prom", prometheus(run, [result for _, result in history.last(run.left_out, past)]))
    for name in ("verify.json", "index.html"):
        shutil.copyfile(folder / name, place / name)
    return run, since


def put(path: Path, text: str) -> None:
    """Write the file in one step: who reads it has the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


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


def without_secrets(run: Run, secrets: list[str]) -> Run:
    """The run with every text of it masked."""
    results = [
        dataclasses.replace(
            result,
            message=masked(result.message, secrets),
            fix=masked(result.fix, secrets),
            promise=masked(result.promise, secrets),
            waiver=masked(result.waiver, secrets),
        )
        for result in run.results
    ]
    facts = {host: {name: masked(told, secrets) for name, told in each.items()} for host, each in run.facts.items()}
    figures = [
        Figure(*(masked(text, secrets) for text in (figure.title, figure.svg, figure.note))) for figure in run.figures
    ]
    needless = [masked(line, secrets) for line in run.needless]
    return dataclasses.replace(run, results=results, facts=facts, figures=figures, needless=needless)


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
