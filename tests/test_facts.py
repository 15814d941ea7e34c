# SPDX-License-Identifier: MIT
"""Fact cases: a command's output in, the fact's value out, in folders `facts/<package>.<module>.<Fact>`."""

from __future__ import annotations

from pathlib import Path

from pyinfra_testing.facts import make_fact_tests

HERE = Path(__file__).parent

for _folder in sorted((HERE / "facts").glob("*/")):
    globals()[f"Test_{_folder.name}"] = make_fact_tests("operations", _folder.name, _folder)
