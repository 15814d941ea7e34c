# SPDX-License-Identifier: MIT
"""JUnit XML, JSON lines and metrics, each read back by a reader of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.verify.healthy import Doctored, healthy, lab_file, verify
from tests.verify.test_page import recorded
from verify.report.outputs import json_lines, junit, prometheus
from verify.report.run import Run
from verify.verdicts import Result, Severity, Verdict


@pytest.fixture
def run() -> Run:
    return recorded("now")


def cases(run: Run) -> dict[str, ElementTree.Element]:
    return {case.get("name", ""): case for case in ElementTree.fromstring(junit(run)).iter("testcase")}


def test_junit_has_a_suite_a_subject_and_counts_that_add_up(run: Run) -> None:
    root = ElementTree.fromstring(junit(run))

    assert [suite.get("name") for suite in root] == ["hypervisor", "vm", "nvidia", "containers", "waiver"]
    for suite in [*root, root]:
        found = list(suite.iter("testcase"))
        assert suite.get("tests") == str(len(found))
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(key) == str(sum(case.find(tag) is not None for case in found))
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("15", "4", "2", "4")


def test_junit_tells_each_verdict_in_its_way(run: Run) -> None:
    found = cases(run)

    failure = found["vm.cores"].find("failure")
    assert failure is not None and failure.get("type") == "major"
    assert failure.get("message") == "gpu01: 4 cores, expected 8"
    assert failure.text == "gpu01: 4 cores, expected 8\nfix: pyinfra inventory/lab.py deploy.py --limit gpu01"
    error = found["nvidia.gpu.temperature"].find("error")
    assert error is not None and "does not answer for its temperature" in error.get("message", "")
    skipped = {name: case.find("skipped") for name, case in found.items()}
    assert (each := skipped["containers.milvus.loopback"]) is not None
    assert each.get("message") == "not run: container milvus does not run"
    assert (each := skipped["nvidia.mps.server"]) is not None
    assert each.get("message") == "not run, as expected: MPS' server does not run without a real GPU"
    assert (each := skipped["nvidia.gpu.link"]) is not None
    assert each.get("message", "").startswith(
        "waived (the slot has 8 lanes; a new board is ordered, until 2099-01-31): "
    )
    assert found["nvidia.gpu.clocks"].findtext("system-out") == "1545 MHz at work"
    assert [child.tag for child in found["vm.running"]] == ["properties"]


def test_junit_carries_what_the_check_is_about(run: Run) -> None:
    case = cases(run)["vm.cores"]

    assert case.get("classname") == "gpu01"
    assert {each.get("name"): each.get("value") for each in case.iter("property")} == {
        "title": "VM has its cores",
        "severity": "major",
        "promise": "cores = 8",
        "simulated": "rehearsal lab: GPU is a stand-in",
    }


ODD = 'a "quoted" \\ back\nsecond line <b>\x00\x1b[31m'


def odd(run: Run) -> Run:
    result = Result("a.b", 'h"\\\n', "a", Severity.MAJOR, Verdict.FAIL, ODD, ODD, title=ODD, promise=ODD)
    return replace(run, lab='l"\\\n', results=[result])


def test_whatever_a_host_says_can_be_read_back(run: Run) -> None:
    strange = odd(run)

    failure = cases(strange)["a.b"].find("failure")
    assert failure is not None and failure.text is not None
    assert failure.text.startswith('a "quoted" \\ back\nsecond line <b>\ufffd\ufffd[31m')
    (line,) = json_lines(strange).splitlines()
    assert json.loads(line)["message"] == ODD
    families = list(text_string_to_metric_families(prometheus(strange)))
    assert families[0].samples[0].labels == {"lab": 'l"\\\n', "host": 'h"\\\n', "id": "a.b", "severity": "major"}


def test_json_lines_say_all_of_a_result(run: Run) -> None:
    lines = [json.loads(line) for line in json_lines(run).splitlines()]

    assert len(lines) == len(run.results)
    (found,) = [line for line in lines if line["id"] == "vm.cores"]
    assert found == {
        "lab": "lab",
        "when": run.when,
        "began": run.began,
        "id": "vm.cores",
        "host": "gpu01",
        "subject": "vm",
        "severity": "major",
        "verdict": "fail",
        "message": "gpu01: 4 cores, expected 8",
        "fix": "pyinfra inventory/lab.py deploy.py --limit gpu01",
        "duration_s": found["duration_s"],
        "title": "VM has its cores",
        "promise": "cores = 8",
        "simulated": "rehearsal lab: GPU is a stand-in",
        "expected": False,
        "waiver": "",
    }


def test_metrics_say_what_each_check_came_to(run: Run) -> None:
    families = {family.name: family for family in text_string_to_metric_families(prometheus(run))}

    values = {sample.labels["id"]: sample.value for sample in families["gpulab_verify_check"].samples}
    assert len(values) == len(run.results)
    assert [values[id_] for id_ in ("vm.running", "vm.cores", "nvidia.gpu.link")] == [1, 0, 2]
    assert [values[id_] for id_ in ("nvidia.gpu.temperature", "nvidia.mps.server")] == [3, 4]
    assert "1 pass, 2 waived, 3 inconclusive, 4 not run" in families["gpulab_verify_check"].documentation
    counts = {sample.labels["verdict"]: sample.value for sample in families["gpulab_verify_checks"].samples}
    assert counts == {"pass": 5, "fail": 4, "inconclusive": 2, "not run": 3, "waived": 1}
    single = {name: family.samples[0].value for name, family in families.items() if len(family.samples) == 1}
    assert single == {
        "gpulab_verify_exit_status": 1,
        "gpulab_verify_simulated": 1,
        "gpulab_verify_run_timestamp_seconds": pytest.approx(run.began, abs=0.001),
        "gpulab_verify_run_duration_seconds": pytest.approx(run.duration_s, abs=0.001),
    }


def test_metrics_are_what_the_textfile_collector_takes(run: Run) -> None:
    """It refuses time stamps, a sample that comes twice, and a family in two pieces."""
    for text in (prometheus(run), prometheus(odd(run))):
        families = list(text_string_to_metric_families(text))
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.timestamp is None for sample in samples)
        assert len({(sample.name, *sorted(sample.labels.items())) for sample in samples}) == len(samples)
        assert len({family.name for family in families}) == len(families) == text.count("# TYPE ")
        assert all(family.type == "gauge" and family.documentation for family in families)
        assert text.endswith("\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool_finds_nothing_to_complain_of(run: Run) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=prometheus(run), capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_writes_them_all(tmp_path: Path) -> None:
    verify(lab_file(tmp_path), plugin=Doctored(healthy()))

    folder = tmp_path / "report"
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "verify.json", "results.jsonl", "junit.xml", "verify.prom", "history"}
    # Whoever collects the metrics is not root.
    assert (folder / "verify.prom").stat().st_mode & 0o044


def test_run_of_a_part_leaves_the_metrics_of_the_whole(tmp_path: Path) -> None:
    lab = lab_file(tmp_path)
    broken = healthy()
    broken["vm"]["config"]["cores"] = 4
    verify(lab, plugin=Doctored(broken))
    before = (tmp_path / "report/verify.prom").read_text()

    for options in (["-k", "vm.cores"], ["--limit", "pve1"], ["-m", "critical"]):
        verify(lab, *options, plugin=Doctored(healthy()))
        assert (tmp_path / "report/verify.prom").read_text() == before

    verify(lab, plugin=Doctored(healthy()))
    assert (tmp_path / "report/verify.prom").read_text() != before
