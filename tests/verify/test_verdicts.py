# SPDX-License-Identifier: MIT
"""What a run comes to: verdicts, exit status, usage errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.verify.healthy import GUEST, ROOT, Doctored, api_refused, healthy, lab_file, verify
from verify.hosts import Unreadable
from verify.verdicts import FAILED, INCOMPLETE, PASSED, Result, Severity, Verdict, exit_status


def result(severity: Severity, verdict: Verdict, expected: bool = False) -> Result:
    return Result("x.y", "gpu01", "x", severity, verdict, expected=expected)


GOOD = result(Severity.CRITICAL, Verdict.PASS)


@pytest.mark.parametrize(
    ("others", "status"),
    [
        ([], PASSED),
        ([result(Severity.MINOR, Verdict.FAIL)], PASSED),
        ([result(Severity.MINOR, Verdict.NOT_RUN)], PASSED),
        ([result(Severity.MINOR, Verdict.INCONCLUSIVE)], PASSED),
        ([result(Severity.MAJOR, Verdict.FAIL)], FAILED),
        ([result(Severity.CRITICAL, Verdict.FAIL)], FAILED),
        ([result(Severity.MAJOR, Verdict.INCONCLUSIVE)], FAILED),
        ([result(Severity.MAJOR, Verdict.NOT_RUN)], INCOMPLETE),
        ([result(Severity.CRITICAL, Verdict.NOT_RUN)], INCOMPLETE),
        ([result(Severity.CRITICAL, Verdict.NOT_RUN, expected=True)], PASSED),
        ([result(Severity.MAJOR, Verdict.NOT_RUN), result(Severity.CRITICAL, Verdict.FAIL)], FAILED),
    ],
)
def test_exit_status_follows_the_worst_critical_or_major_check(others: list[Result], status: int) -> None:
    assert exit_status([GOOD, *others]) == status


def test_nothing_collected_is_incomplete(tmp_path: Path) -> None:
    assert exit_status([]) == INCOMPLETE
    assert verify(lab_file(tmp_path), "-k", "no.such.check", plugin=Doctored(healthy())).status == INCOMPLETE


def test_minor_failure_is_shown_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observations = healthy()
    observations["vm"]["pending"] = ["memory"]

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.status == PASSED
    assert "FAIL vm.pending [minor] gpu01" in capsys.readouterr().out


def test_revoked_token_fails_one_check_and_says_why_the_others_did_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(api_refused()))

    assert run.ids("fail") == {"vm.api.reachable"}
    of_the_vm = {result["id"] for result in run.json["results"] if result["subject"] == "vm"}
    # Backups are read over SSH to the node.
    over_ssh = {"vm.api.reachable", "vm.backup.job", "vm.backup.age"}
    assert run.ids("not run") == of_the_vm - over_ssh
    assert run.status == FAILED
    said = capsys.readouterr().out
    # Once for the guest's checks, once for the node's.
    assert said.count("the API of pve1 refuses the token") == 2
    assert "fix: make bootstrap LAB=" in said


@pytest.mark.parametrize("host", ["pve1", "gpu01"])
def test_unreachable_host_fails_one_check_and_the_rest_of_it_is_not_run(tmp_path: Path, host: str) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(healthy(), down=(host,)))

    assert run.ids("fail") == {"hypervisor.reachable" if host == "pve1" else "system.reachable"}
    unread = [result for result in run.json["results"] if result["host"] == host and result["subject"] != "vm"]
    assert {result["verdict"] for result in unread} == {"fail", "not run"}
    assert {result["message"] for result in unread if result["verdict"] == "not run"} == {f"{host} is not reachable"}


def test_broken_read_is_not_run(tmp_path: Path) -> None:
    observations = {**healthy(), "nvidia": Unreadable("reading nvidia of gpu01 took more than 60 s")}

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.status == INCOMPLETE
    assert run.result("nvidia.gpu.visible")["message"] == "reading nvidia of gpu01 took more than 60 s"


def test_expected_not_run_is_excused_by_name_in_a_simulated_lab(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"containers.ollama.{name}" for name in ("context", "gpu", "memory")]
    guest: dict[str, Any] = {"simulated": "rehearsal", "expected_not_run": ids}
    image = healthy()["containers"]["services"]["ollama"]["digests"][0]
    guest["services"] = {**GUEST["services"], "ollama": {"image": image}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.status == PASSED
    assert sorted(run.json["expected_not_run"]) == ids
    said = "expected not to run on gpu01: no model declared\n    containers.ollama.gpu, containers.ollama."
    assert said in capsys.readouterr().out


def test_expected_not_run_excuses_no_failure(tmp_path: Path) -> None:
    observations = healthy()
    observations["ollama_load"]["load"] = {"error": "HTTP 500"}
    guest = {"simulated": "rehearsal", "expected_not_run": ["containers.ollama.gpu"]}

    assert verify(lab_file(tmp_path, guest=guest), plugin=Doctored(observations)).status == FAILED


def test_expected_not_run_excuses_nothing_on_real_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest: dict[str, Any] = {"expected_not_run": ["containers.ollama.gpu"]}
    image = healthy()["containers"]["services"]["ollama"]["digests"][0]
    guest["services"] = {**GUEST["services"], "ollama": {"image": image}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.status == INCOMPLETE
    assert "gpu01: expected_not_run excuses nothing here" in capsys.readouterr().out


def test_checks_after_a_stop_are_not_run(tmp_path: Path) -> None:
    observations = healthy()
    observations["hypervisor"]["iommus"] = []

    run = verify(lab_file(tmp_path), "-x", plugin=Doctored(observations))

    assert run.status == FAILED
    assert run.result("containers.ollama.gpu")["message"] == "the run was stopped before it"


def test_limit_chooses_hosts_and_the_api_that_answers_for_them(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), "--limit", "guests", plugin=Doctored(healthy()))

    of_the_node = {result["id"] for result in run.json["results"] if result["host"] == "pve1"}
    assert of_the_node == {"vm.api.reachable", "vm.undeclared"}
    assert run.status == PASSED


@pytest.mark.parametrize(
    ("options", "only", "chosen"),
    [
        (["-m", "critical"], "verify", lambda result: result["severity"] == "critical"),
        (["-k", "milvus"], "verify", lambda result: "milvus" in result["id"]),
        (["-k", "nvidia.driver"], "verify", lambda result: result["id"].startswith("nvidia.driver.")),
        ([], "verify/nvidia", lambda result: result["subject"] == "nvidia"),
        (
            ["--limit", "gpu01", "-k", "gpu.link"],
            "verify/nvidia/test_gpu.py",
            lambda result: "gpu.link" in result["id"],
        ),
    ],
)
def test_part_of_the_checks_is_chosen(
    tmp_path: Path, options: list[str], only: str, chosen: Callable[[dict[str, Any]], bool]
) -> None:
    """All of what is chosen and nothing else, and what is not chosen does not fail the run."""
    observations = healthy()
    observations["hypervisor"]["cmdline"] = "quiet"
    lab = lab_file(tmp_path)
    whole = verify(lab, plugin=Doctored(observations))
    (lab.parent / "report/verify.prom").unlink()

    run = verify(lab, *options, only=only, plugin=Doctored(observations))

    assert (whole.status, run.status, run.ids("fail")) == (FAILED, PASSED, set())
    assert run.ids("pass") == {result["id"] for result in whole.results if chosen(result)}
    assert not (lab.parent / "report/verify.prom").exists()


def test_choice_of_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = verify(lab_file(tmp_path), "--limit", "pve1", "-k", "milvus", plugin=Doctored(healthy()))

    assert (run.status, run.results) == (INCOMPLETE, [])
    assert "nothing was checked: no check is of --limit pve1 -k 'milvus'" in capsys.readouterr().out


def test_data_reaches_the_inventory(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), "--data", "cores=3", plugin=Doctored(healthy()))

    assert run.result("vm.cores")["message"] == "gpu01: 8 cores, expected 3"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "verify needs an inventory"),
        (["--lab", "{missing}"], "no such inventory file"),
        (["--lab", "{lab}", "--limit", "gpu9"], "--limit gpu9 matches no host; the inventory has pve1, gpu01"),
        (["--lab", "{lab}", "--data", "cores=many"], "gpu01: cores = 'many': expected a valid integer"),
    ],
)
def test_wrong_use_is_answered_in_words(tmp_path: Path, options: list[str], said: str) -> None:
    places = {"lab": lab_file(tmp_path), "missing": tmp_path / "missing.py"}
    command = [sys.executable, "-m", "pytest", "verify", "-p", "no:cacheprovider"]

    done = subprocess.run(
        [*command, *(option.format(**places) for option in options)], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 4
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
