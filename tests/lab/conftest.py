# SPDX-License-Identifier: MIT
"""A lab of two nodes and two guests, deployed once, for tests that break it by hand. Needs root: `make test-lab`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.commands import Deployed, deployed_lab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/lab" in str(item.path):
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two nodes and two guests, up and converged."""
    with deployed_lab(tmp_path_factory.mktemp("reports"), ("pve1", "pve2")) as hosts:
        yield hosts
