# SPDX-License-Identifier: MIT
"""One lab for all faults, and their table at the end of the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.pve.testing import FakeLab
from tests.lab.commands import Deployed, deployed_lab

from . import table
from .world import World

REPORT = Path("reports/faults.txt")
PROPERTY = "fault"
#: Of all tests that have ended, in that order.
ALL: list[table.Row] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with FakeLab() as api, pytest.MonkeyPatch.context() as monkeypatch:
        world = World(api, tmp_path_factory.mktemp("world"), monkeypatch)
        yield world
        world.end()
        world.server.stop()


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """One node and one guest, up and converged. Each fault leaves them so."""
    with deployed_lab(tmp_path_factory.mktemp("reports")) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def rows(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """What a test adds to the table goes with its report, out of the process that ran it."""
    table.ROWS.clear()
    yield
    for row in table.ROWS:
        record_property(PROPERTY, row.cells())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        ALL.extend(table.row(cells) for name, cells in report.user_properties if name == PROPERTY)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ALL:
        return
    text = table.render(ALL)
    path = config.rootpath / REPORT
    path.parent.mkdir(exist_ok=True)
    # The API's faults and the guest's are two runs.
    with path.open("a") as file:
        file.write(text)
    terminalreporter.section("what was broken on purpose")
    terminalreporter.write(text)
    terminalreporter.write_line(f"also in {REPORT}")
