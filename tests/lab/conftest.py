# SPDX-License-Identifier: MIT
"""A lab of two nodes and two guests, deployed once, for tests that break it by hand. Needs root: `make test-lab`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab.breakages import TABLE
from tests.lab.commands import Deployed, deployed_lab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.lab)
    names = {item: getattr(item, "fixturenames", ()) for item in ours}
    shared = {item.path for item in ours if "deployed" in names[item]}
    spoilt = {item.path for item in ours if "spoilt" in names[item]}
    # Files with a lab of their own come first: the shared one stays up to the end. What ruins that comes last.
    items.sort(key=lambda item: (item.path in shared) + (item.path in spoilt))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in TABLE:
        terminalreporter.write_line(line)


class Shared:
    """One lab for all files, brought up for the first of them, and again after one that has ruined it."""

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        self.hosts: Deployed | None = None
        self._lab = ExitStack()

    def up(self) -> Deployed:
        if self.hosts is None:
            self.hosts = self._lab.enter_context(deployed_lab(self.reports, ("pve1", "pve2")))
        return self.hosts

    def down(self) -> None:
        self.hosts = None
        self._lab.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    lab = Shared(tmp_path_factory.mktemp("reports"))
    yield lab
    lab.down()


@pytest.fixture(scope="module")
def deployed(shared: Shared) -> Iterator[Deployed]:
    """Two nodes and two guests, up and converged, as the file must leave them to the next one."""
    hosts = shared.up()
    yield hosts
    if shared.hosts is None:
        return
    done = hosts.deploy()
    if done.status != 0 or hosts.changed():
        shared.down()
        pytest.fail(f"the lab was not left as it was found: {hosts.changed()}\n{done.output[-3000:]}")


@pytest.fixture
def spoilt(shared: Shared) -> Iterator[None]:
    """For the last test of a file, after which nobody has any use for the lab."""
    yield
    shared.down()
