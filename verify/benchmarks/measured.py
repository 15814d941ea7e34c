# SPDX-License-Identifier: MIT
"""A run of a benchmark on a guest, judged by what its lab measured before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verify.benchmarks import contract, history, judging
from verify.benchmarks.contract import Report
from verify.benchmarks.history import History
from verify.benchmarks.judging import Judgement


@dataclass(frozen=True)
class Measured:
    """The report, the runs before it, the verdict on each metric. `simulated`: what stood in for the card."""

    report: Report
    runs: History
    judgements: Mapping[str, Judgement]
    revision: str
    simulated: str = ""

    def keep(self, path: Path) -> None:
        """Add the run to the lab's history if it measured anything that later ones may be compared with.

        Raises:
            OSError: the file cannot be written.
        """
        past = history.past(self.report, self.revision)
        if past is not None:
            history.append(path, past)


def measured(
    printed: Mapping[str, Any], path: Path, revision: str, simulated: str = "", bare: Report | None = None
) -> Measured:
    """Judge what was printed. `path`: the lab's history; `revision`: that of the configuration under test; `bare`: what
    gpubench measured in the same run, for a framework to be compared with.

    A simulated lab learns no baseline: its figures are of a machine that does other things meanwhile.

    Raises:
        BadReport: it is no report of a benchmark.
    """
    report = contract.read(json.dumps(printed))
    runs = history.read(path)
    judgements = {each.metric: each for each in judging.judge(report, runs, revision, bare, learn=not simulated)}
    return Measured(report, runs, judgements, revision, simulated)
