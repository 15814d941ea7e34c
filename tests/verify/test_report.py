# SPDX-License-Identifier: MIT
"""The page and verify.json: valid, says what was simulated, keeps secrets, needs nothing from outside."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.verify.healthy import TOKEN, Doctored, healthy, lab_file, verify
from tests.verify.page import fetches, parsed


def broken() -> dict[str, Any]:
    observations = healthy()
    observations["system"]["addresses"] = ['<b>&"odd"</b>']
    observations["reach"] = {"error": f"gpu01: no SSH with {TOKEN} or {TOKEN.partition('=')[2]}", "fix": "look"}
    return observations


def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(broken()))

    assert fetches(parsed(run.html)) == []
    assert "url(" not in run.html and "<script" not in run.html and "@import" not in run.html
    assert "&lt;b&gt;" in run.html and "<b>" not in run.html
    # Readable without colour: the verdict stands there as a word.
    assert run.html.count("✘ fail<") == run.json["failed"]


def test_no_secret_reaches_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(broken()))

    said = capsys.readouterr().out
    for text in (run.html, (tmp_path / "report/verify.json").read_text(), said):
        assert TOKEN not in text and TOKEN.partition("=")[2] not in text
        assert "(secret)" in text


def test_real_lab_has_no_banner(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(healthy()))

    assert "SIMULATED" not in run.html
    assert run.json["simulated"] == []


def test_declared_stand_in_is_told_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = {"simulated": "rehearsal lab: GPU is a stand-in"}

    run = verify(lab_file(tmp_path, simulated, simulated), plugin=Doctored(healthy()))

    assert "SIMULATED" in run.html
    assert run.json["simulated"] == ["rehearsal lab: GPU is a stand-in"]
    assert all(result["simulated"] for result in run.json["results"])
    assert "simulated: rehearsal lab: GPU is a stand-in" in capsys.readouterr().out


def test_stand_in_that_nobody_declared_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observations = healthy()
    observations["nvidia"]["simulated"] = ["NVML"]

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.result("nvidia.gpu.visible")["simulated"] == "NVML (by its own word)"
    assert run.result("vm.running")["simulated"] == ""
    assert "SIMULATED" in run.html
    assert "simulated: NVML (by its own word)" in capsys.readouterr().out


def test_json_counts_and_names(tmp_path: Path) -> None:
    observations = healthy()
    observations["vm"]["status"] = "stopped"

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.json["checks"] == len(run.json["results"]) == run.json["passed"] + 4
    assert (run.json["failed"], run.json["inconclusive"], run.json["not_run"]) == (1, 0, 3)
    assert run.json["lab"] == "lab" and run.json["exit_status"] == run.status == 1
    assert run.result("vm.running") | {"duration_s": 0} == {
        "id": "vm.running",
        "host": "gpu01",
        "subject": "vm",
        "severity": "critical",
        "verdict": "fail",
        "message": "gpu01: VM 101 is stopped, expected running",
        "fix": f"pyinfra {tmp_path / 'lab.py'} deploy.py --limit gpu01",
        "duration_s": 0,
        "title": "VM runs",
        "promise": "vmid = 101",
        "simulated": "",
        "expected": False,
        "waiver": "",
    }


class Slow(Doctored):
    """A read that does not end before a check waits for it, and then takes a while."""

    WHILE_S = 0.2

    def __init__(self) -> None:
        super().__init__(healthy())
        self.waited_for = threading.Event()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        self.waited_for.set()

    def read(self, host: str, subject: str) -> dict[str, Any]:
        self.waited_for.wait()
        time.sleep(self.WHILE_S)
        return super().read(host, subject)


def test_waiting_for_a_read_counts_to_the_first_check_of_it(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), "-k", "system.address", plugin=Slow())

    assert run.result("system.address")["duration_s"] >= Slow.WHILE_S
    assert run.json["reads"]["gpu01"].keys() == {"system"}
    assert run.json["reads"]["gpu01"]["system"] >= Slow.WHILE_S


def test_page_says_when_and_of_what_revision(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(healthy()))

    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", run.json["when"])
    assert run.json["when"] in run.html
    assert run.json["revision"] in run.html
