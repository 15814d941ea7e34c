# SPDX-License-Identifier: MIT
"""python -m verify.report FOLDER [BEFORE NOW]: lists the runs that are kept there and compares two of them.

Without names the newest run is compared with the one before it that made the same checks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verify.report.history import FOLDER, changes, kept, read
from verify.report.run import Run
from verify.report.summary import news


def main(words: list[str]) -> int:
    """0; 2 when there is nothing to list, or no run of a given name."""
    parser = argparse.ArgumentParser(prog="python -m verify.report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("folder", type=Path, help="a lab's report folder, such as reports/lab")
    parser.add_argument("names", nargs="*", metavar="RUN", help="two runs to compare, as they are listed")
    given = parser.parse_args(words)
    if len(given.names) not in (0, 2):
        parser.error("expected two runs to compare, or none")
    runs = {path.name: run for path in kept(given.folder) if (run := read(path)) is not None}
    if not runs:
        print(f"{given.folder}: no runs are kept here\nhint: make verify", file=sys.stderr)
        return 2
    unknown = [name for name in given.names if name not in runs]
    if unknown:
        print(f"{', '.join(unknown)}: no such run in {given.folder / FOLDER}", file=sys.stderr)
        return 2
    for name, run in reversed(runs.items()):
        print(line(name, run))
    if given.names:
        (before, now), older = (runs[name] for name in given.names), []
    else:
        now = next(iter(runs.values()))
        same = [run for run in runs.values() if run is not now and run.selection == now.selection]
        if not same:
            return 0
        before, *older = same
    print(f"\n{now.when} compared with {before.when}:")
    print("\n".join(news(changes(before, now, older))[1:]) or "    no change")
    return 0


def line(name: str, run: Run) -> str:
    """A run in one line."""
    counts = run.as_json()
    parts = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("failed", "inconclusive", "not_run", "waived")]
    told = ", ".join(
        [f"{counts['passed']} of {counts['checks']} passed", *(each for each in parts if each[:2] != "0 ")]
    )
    rest = [f"revision {run.revision}"] if run.revision else []
    rest += [f"only {run.selection}"] if run.selection else []
    rest += [f"{len(run.left_out)} left out"] if run.left_out else []
    rest += ["simulated"] if run.stand_ins else []
    return "  ".join([f"{name:18}", f"{run.word:10}", "; ".join([told, *rest])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
