# SPDX-License-Identifier: MIT
"""Faults of which there is one each."""

from __future__ import annotations

import pytest

from . import table
from .cases import CASES
from .world import Case, World


@pytest.mark.parametrize("case", CASES, ids=[f"{case.job}-{case.where}-{case.injected}" for case in CASES])
def test_fault(world: World, case: Case) -> None:
    row, wrong = world.suffer(case)
    table.ROWS.append(row)
    assert not wrong, "\n".join(["", *wrong])
