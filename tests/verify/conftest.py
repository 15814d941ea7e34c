# SPDX-License-Identifier: MIT
"""Keeps count of which checks the tests have broken: `--breakages` prints the table and fails where one is left.

A check is breakable if the healthy lab of a test makes it pass; it was broken if a test changed what it reads so that
it fails, and caught if that test passed and no other check failed with it.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.verify import healthy
from verify.verdicts import Severity

BAD = ("fail", "inconclusive")


@dataclass
class Breakages:
    """Ids of checks that passed somewhere, that were to be broken, and that were caught."""

    passed: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    caught: set[str] = field(default_factory=set)


@dataclass
class Row:
    """The checks of one severity. `left`: those that were not caught, with what is missing."""

    severity: Severity
    checks: int = 0
    breakable: int = 0
    broken: int = 0
    caught: int = 0
    left: dict[str, str] = field(default_factory=dict)


BREAKAGES = pytest.StashKey[Breakages]()
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--breakages", action="store_true", help="print which checks were broken, and fail where one is left"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BREAKAGES] = Breakages()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    healthy.VERIFIED.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Note what the verify runs of a test came to; they count as caught once the test has passed."""
    found, case = item.config.stash[BREAKAGES], getattr(item, "callspec", None)
    declared = case.params.get("case") if case is not None else None
    broken = {declared[0]} if isinstance(declared, tuple) else set()
    found.broken |= broken
    yield
    for run in healthy.VERIFIED:
        found.passed |= run.ids("pass")
        failed = run.ids(*BAD)
        if len(failed) == 1:
            broken |= failed
    found.broken |= broken
    found.caught |= broken


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--breakages"):
        return
    session.config.stash[ROWS] = rows(session.config.stash[BREAKAGES], checks())
    if any(row.left for row in session.config.stash[ROWS]):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if ROWS in config.stash:
        for line in table(config.stash[ROWS]):
            terminalreporter.write_line(line)


def rows(found: Breakages, checks: Mapping[str, Severity]) -> list[Row]:
    """What became of every check, a row for each severity."""
    table = {level: Row(level) for level in Severity}
    for name, level in checks.items():
        # What has an id of its own is none of a check that is made for each part.
        others = checks.keys() - {name}
        passed, broken, caught = (
            any(matches(name, id_) for id_ in ids - others) for ids in (found.passed, found.broken, found.caught)
        )
        row = table[level]
        row.checks, row.breakable = row.checks + 1, row.breakable + passed
        row.broken, row.caught = row.broken + broken, row.caught + caught
        if not caught:
            row.left[name] = "not caught" if broken else "never broken" if passed else "never passed"
    return list(table.values())


def table(rows: list[Row]) -> list[str]:
    """The rows as text, and below them a line for each check that is left."""
    keys = ("checks", "breakable", "broken", "caught")
    lines = ["", f"{'':10}" + "".join(f"{key:>11}" for key in keys)]
    lines += [f"{row.severity:10}" + "".join(f"{getattr(row, key):11}" for key in keys) for row in rows]
    lines.append(f"{'all':10}" + "".join(f"{sum(getattr(row, key) for row in rows):11}" for key in keys))
    left = [f"{pattern} [{row.severity}]: {why}" for row in rows for pattern, why in row.left.items()]
    return [*lines, *left]


def matches(pattern: str, id_: str) -> bool:
    """Is it the id of that check? A pattern may have a place for a part: `containers.{service}.image`."""
    return re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(pattern)), id_) is not None


def checks() -> Mapping[str, Severity]:
    """Every check of verify by its id, read from the functions themselves: also one that no host of a test has."""
    found: dict[str, Severity] = {}

    class Collector:
        def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
            mark = metafunc.definition.get_closest_marker("promise")
            levels = [level for level in Severity if metafunc.definition.get_closest_marker(level.value)]
            if mark is not None:
                found[mark.args[0]] = levels[0]

    quiet = ["-q", "--collect-only", "--disruptive", "-pno:cacheprovider", f"--rootdir={healthy.ROOT}"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        lab = healthy.lab_file(Path(folder))
        status = pytest.main([str(healthy.ROOT / "verify"), *quiet, f"--lab={lab}"], plugins=[Collector()])
    if status != pytest.ExitCode.OK or not found:
        raise pytest.UsageError(f"the checks of verify can't be collected: pytest ended with status {status}")
    return found
