# SPDX-License-Identifier: MIT
"""The README's table of steps: each step of deploy.py has its row, in the order of the run; none is of nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps(file: str) -> list[str]:
    """The operations that a deploy file calls: those with a `name`."""
    calls = [node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if any(keyword.arg == "name" for keyword in call.keywords)]
    return [ast.unparse(call.func) for call in sorted(named, key=lambda call: call.lineno)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the README."""
    section = (ROOT / "README.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = section[section.index("|") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_each_step_of_a_deploy_says_what_it_reads_and_changes() -> None:
    found = rows("What each step reads and changes")

    names = [re.sub("`", "", row[0]) for row in found]
    assert names == steps("deploy.py")
    assert [row for row in found if len(row) != 6 or not all(row)] == []
