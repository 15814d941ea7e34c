# SPDX-License-Identifier: MIT
"""Drawings of what was measured, for the report's page."""

from __future__ import annotations

from verify.benchmarks.measured import Measured
from verify.report import Figure


def figures(host: str, measured: Measured) -> list[Figure]:
    """What a guest's benchmarks look like; none where nothing was measured."""
    return []
