# SPDX-License-Identifier: MIT
"""`make bench`: the design's budgets beside what the last rehearsal measured."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from inventory import GpulabError
from rehearsal.rehearse import REPORTS

#: Remote commands that an unchanged host may cost (design, Budgets).
PER_GUEST, PER_NODE = 30, 10


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Lines of the table: work, host, seconds, remote commands (with the budget), API requests."""
    table = []
    for key, work, budgeted in (
        ("first_run", "first deploy", False),
        ("second_run", "second deploy, nothing to do", True),
        ("dry_run", "--dry on a converged lab", True),
    ):
        run = summary[key]
        for position, (host, commands) in enumerate(sorted(run["remote_commands"].items())):
            budget = PER_NODE if host.startswith("pve") else PER_GUEST
            shown = f"{commands} of {budget}" if budgeted else str(commands)
            seconds = f"{run['seconds']:.1f}" if position == 0 else ""
            table.append((work if position == 0 else "", host, seconds, shown, str(run["api_requests"][host])))
    without = summary["verify_seconds"] - summary["benchmark_seconds"]
    table.append(("verify without benchmarks", "", f"{without:.1f} of 10", "", ""))
    table.append(("benchmarks of the services", "", f"{summary['benchmark_seconds']:.1f}", "", ""))
    table.append(("make rehearse", "", f"{summary['seconds']:.0f} of 180", "", ""))
    return table


def bench() -> int:
    """Print the table of the last rehearsal. Nothing is asserted: figures are read, not tested."""
    try:
        summary = json.loads((REPORTS / "summary.json").read_text())
    except FileNotFoundError:
        raise GpulabError("No rehearsal has been measured here.", resolution="make rehearse") from None
    table = Table("work", "host", "seconds", "remote commands", "API requests", title="budgets (simulated lab)")
    for row in rows(summary):
        table.add_row(*row)
    Console().print(table)
    return 0
