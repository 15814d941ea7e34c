# SPDX-License-Identifier: MIT
"""What the program prints, up to the last verdict and drawing that verify makes of it: on the simulated driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.conftest import TINY, Driver
from verify.benchmarks import history
from verify.benchmarks.contract import TOOLS
from verify.benchmarks.figures import figures
from verify.benchmarks.measured import measured
from verify.verdicts import Verdict

#: As the other tests' program, but with as many samples as an interval takes.
ENOUGH = TINY.replace("0.0001, 2, 2,", "0.0001, 6, 2,").replace("TOTAL_S", "60.0").replace("GRACE\n", "60.0\n")


def test_measured_run_is_understood_judged_drawn_and_kept(driver: Driver, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENOUGH, "--quick"]
    done = subprocess.run(command, env=driver.environment(), capture_output=True, text=True, timeout=120, check=True)
    path = tmp_path / "gpu01.jsonl"

    run = measured(json.loads(done.stdout), path, "a1b2c3d")

    judged = {name: each.verdict for name, each in run.judgements.items()}
    assert judged.keys() == TOOLS["gpubench"].keys()
    # The simulated card, an RTX A4000 by its id, has a memory as fast as the real one's and computes on the processor.
    assert {name for name, verdict in judged.items() if verdict is not Verdict.PASS} == {"fp32.fma"}
    assert judged["fp32.fma"] is Verdict.FAIL
    assert "at least 7.5 TFLOP/s" in run.judgements["fp32.fma"].sentence
    assert "learning a baseline, run 1 of 5" in run.judgements["h2d.pinned"].sentence
    assert [each.title for each in figures("gpu01", run)] == [
        "gpu01: share of the card's own limit",
        "gpu01: roofline",
        "gpu01: the last runs",
        "gpu01: the card meanwhile",
    ]
    run.keep(path)
    (kept,) = history.read(path).runs
    assert (kept.revision, kept.driver, kept.figures["h2d.pinned"].median) == ("a1b2c3d", "580.95.05", 20.0)


def test_run_of_too_few_samples_is_inconclusive(driver: Driver, tmp_path: Path) -> None:
    run = measured(driver.run().result, tmp_path / "gpu01.jsonl", "a1b2c3d")

    judged = {name: each.verdict for name, each in run.judgements.items()}
    assert judged.pop("memory.pattern") is Verdict.PASS
    assert set(judged.values()) == {Verdict.INCONCLUSIVE}
    run.keep(tmp_path / "gpu01.jsonl")
    assert history.read(tmp_path / "gpu01.jsonl").runs == []
