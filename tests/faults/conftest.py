# SPDX-License-Identifier: MIT
"""One lab for all faults, and their table at the end of the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.pve.testing import FakeLab

from . import table
from .world import World

REPORT = Path("reports/faults.txt")


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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not table.ROWS:
        return
    text = table.render(table.ROWS)
    path = config.rootpath / REPORT
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    terminalreporter.section("what was broken on purpose")
    terminalreporter.write(text)
    terminalreporter.write_line(f"also in {REPORT}")
