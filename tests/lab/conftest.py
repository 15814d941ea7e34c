# SPDX-License-Identifier: MIT
"""A lab of two nodes and two guests, deployed once, for tests that break it by hand. Needs root: `make test-lab`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rehearsal import lab
from rehearsal.rehearse import bootstrap
from tests.lab.commands import Deployed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/lab" in str(item.path):
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two nodes and two guests, up and converged."""
    if lab.is_up():
        pytest.fail("a lab is up that these tests did not start: make lab-down")
    lab.up(["pve1", "pve2"])
    try:
        bootstrap()
        hosts = Deployed(tmp_path_factory.mktemp("reports"))
        done = hosts.deploy()
        assert done.status == 0, done.output[-4000:]
        yield hosts
    finally:
        lab.down()
