# SPDX-License-Identifier: MIT
"""What changed since the last run: kept runs, comparison, and the list that `make report` prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.verify.healthy import Doctored, healthy, lab_file, verify
from tests.verify.test_page import recorded
from verify.report import history, write
from verify.report.__main__ import main
from verify.report.run import Run
from verify.verdicts import Result, Severity, Verdict


def result(id_: str, verdict: Verdict = Verdict.PASS) -> Result:
    return Result(id_, "gpu01", "a", Severity.MAJOR, verdict)


def run_of(*results: Result, began: float = 1_795_942_977, **keys: object) -> Run:
    return replace(recorded("now"), results=list(results), began=began, facts={}, **keys)  # type: ignore[arg-type]


def ids(results: list[Result]) -> list[str]:
    return [each.id for each in results]


def test_changes_are_told_by_kind() -> None:
    fail, inconclusive, not_run, waived = Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.NOT_RUN, Verdict.WAIVED
    before = [
        result("same"),
        result("breaks"),
        result("heals", fail),
        result("stays", fail),
        result("stops"),
        result("goes"),
    ]
    before += [result("unclear", inconclusive), result("accepted", fail)]
    now = [result("same"), result("breaks", fail), result("heals"), result("stays", fail), result("stops", not_run)]
    now += [result("comes"), result("unclear", fail), result("accepted", waived)]

    found = history.changes(run_of(*before), run_of(*now))

    assert (ids(found.broken), ids(found.healed)) == (["breaks"], ["heals"])
    assert [(was.value, each.id) for was, each in found.other] == [
        ("pass", "stops"),
        ("inconclusive", "unclear"),
        ("fail", "accepted"),
    ]
    assert (ids(found.added), ids(found.gone)) == (["comes"], ["goes"])


def test_same_again_is_no_change() -> None:
    assert not history.changes(run_of(result("a")), run_of(result("a")))


def test_check_of_another_host_is_another_check() -> None:
    other = replace(result("a", Verdict.FAIL), host="gpu02")

    found = history.changes(run_of(result("a")), run_of(other))

    assert (found.broken, ids(found.added), ids(found.gone)) == ([], ["a"], ["a"])


def test_checks_that_are_left_out_come_and_go_without_a_word() -> None:
    """Daily without the benchmarks, weekly with them."""
    daily = run_of(result("a"), left_out=[("gpu01", "speed")])
    weekly = run_of(result("a"), result("speed"))

    assert not history.changes(weekly, daily) and not history.changes(daily, weekly)
    assert not history.changes(daily, weekly, [daily, weekly])
    # One of another host, and one that is no longer there, are another thing.
    assert ids(history.changes(weekly, replace(daily, left_out=[("gpu02", "speed")])).gone) == ["speed"]
    assert ids(history.changes(replace(daily, left_out=[]), weekly).added) == ["speed"]
    assert ids(history.changes(daily, run_of(result("a")), [weekly]).gone) == ["speed"]


def test_check_that_was_left_out_is_compared_with_the_last_run_that_made_it() -> None:
    daily = run_of(result("a"), left_out=[("gpu01", "speed")])
    good, bad = run_of(result("a"), result("speed")), run_of(result("a"), result("speed", Verdict.FAIL))

    assert ids(history.changes(daily, bad, [daily, good, bad]).broken) == ["speed"]
    assert ids(history.changes(daily, good, [daily, bad, good]).healed) == ["speed"]
    assert not history.changes(daily, bad, [daily, bad, good])
    # What the run before it did make is not looked up in older ones.
    assert not history.changes(good, good, [bad])


def test_figures_that_were_not_measured_are_told_with_what_they_came_to_last() -> None:
    figures = [("gpu01", "benchmarks.gpu.a"), ("gpu01", "benchmarks.mps.b")]
    daily = run_of(result("a"), left_out=[*figures, ("gpu01", "system.restart")])
    card = run_of(result("benchmarks.gpu.a", Verdict.FAIL))
    weekly = run_of(result("benchmarks.gpu.a"), result("benchmarks.mps.b"), began=1_795_000_000)

    assert history.unmeasured(weekly, [card]) == []
    assert history.unmeasured(daily, [daily]) == [
        "gpu01: 2 figures were not measured, nor before; --benchmarks full measures them"
    ]
    assert history.unmeasured(daily, [daily, card, weekly]) == [
        f"gpu01: 2 figures were not measured; when last they were, on {weekly.when} or later: 1 failed, 1 passed "
        "(benchmarks.gpu.a)"
    ]


def test_failing_since_looks_past_runs_that_left_the_check_out() -> None:
    daily = run_of(result("a"), left_out=[("gpu01", "speed")])
    bad = [run_of(result("speed", Verdict.FAIL), began=1_795_000_000 - weeks * 604800) for weeks in range(3)]

    when, runs = history.failing_since(bad[0], [daily, bad[1], daily, daily, bad[2], daily])["gpu01", "speed"]

    assert (when, runs) == (bad[2].when, 3)


def test_facts_and_revision_that_differ_are_told() -> None:
    before = replace(run_of(revision="1"), facts={"gpu01": {"NVIDIA driver": "580.95.05", "kernel": "6.12"}})
    now = replace(run_of(revision="2"), facts={"gpu01": {"NVIDIA driver": "580.105.08", "Ollama": "0.32"}, "gpu02": {}})

    # What one of them does not know has not changed.
    assert history.changes(before, now).facts == [
        ("", "revision", "1", "2"),
        ("gpu01", "NVIDIA driver", "580.95.05", "580.105.08"),
    ]


def test_failing_since_counts_back_to_the_last_good_run() -> None:
    bad, waived, unknown = result("a", Verdict.FAIL), result("a", Verdict.WAIVED), result("a", Verdict.NOT_RUN)
    past = [run_of(each, began=1_795_000_000 - hours * 3600) for hours, each in enumerate((bad, unknown, waived))]
    past += [run_of(result("a"), began=1_700_000_000), run_of(bad, began=1_600_000_000)]

    when, runs = history.failing_since(run_of(bad), past)["gpu01", "a"]

    assert (when, runs) == (past[2].when, 3)


def test_runs_are_kept_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT", 3)
    foreign = tmp_path / "history/mine"
    foreign.mkdir(parents=True)

    for second in range(5):
        write(run_of(result("a"), began=1_795_942_977 + second), tmp_path, [])

    names = [path.name for path in history.kept(tmp_path)]
    assert names == ["20261129T090301Z", "20261129T090300Z", "20261129T090259Z"]
    assert foreign.exists()
    assert {path.name for path in (tmp_path / "history" / names[0]).iterdir()} == {"verify.json", "index.html"}


def test_two_runs_of_one_second_are_both_kept(tmp_path: Path) -> None:
    for verdict in (Verdict.FAIL, Verdict.PASS):
        _, since = write(run_of(result("a", verdict)), tmp_path, [])

    assert [path.name for path in history.kept(tmp_path)] == ["20261129T090257Z-2", "20261129T090257Z"]
    assert since is not None and ids(since.healed) == ["a"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"lab": "lab"}'])
def test_kept_run_that_cannot_be_read_is_passed_over(tmp_path: Path, text: str) -> None:
    write(run_of(result("a")), tmp_path, [])
    (history.kept(tmp_path)[0] / "verify.json").write_text(text)

    _, since = write(run_of(result("a")), tmp_path, [])

    assert since is None


def test_run_of_other_checks_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = lab_file(tmp_path)
    broken = healthy()
    broken["vm"]["config"]["cores"] = 4
    verify(lab, plugin=Doctored(healthy()))

    verify(lab, "-k", "vm.cores", plugin=Doctored(broken))
    assert "since " not in capsys.readouterr().out

    page = verify(lab, plugin=Doctored(broken)).html
    said = capsys.readouterr().out
    assert "    new failures: vm.cores on gpu01\n" in said
    assert "New failures:" in page
    assert json.loads((tmp_path / "report/verify.json").read_text())["selection"] == ""


def test_list_shows_runs_and_compares_the_last_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run_of(result("a"), began=1_795_942_977, revision="1", exit_status=0, simulated=[]), tmp_path, [])
    write(run_of(result("a"), began=1_795_942_978, selection="-k a", exit_status=0), tmp_path, [])
    write(run_of(result("a", Verdict.FAIL), began=1_795_942_979, revision="2", exit_status=1), tmp_path, [])

    assert main([str(tmp_path)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20261129T090257Z    PASS        1 of 1 passed; revision 1"
    assert "only -k a" in lines[1] and lines[1].endswith("; simulated")
    assert lines[2].startswith("20261129T090259Z    FAIL        0 of 1 passed, 1 failed; revision 2")
    assert lines[5:] == ["    new failures: a on gpu01", "    found: revision 1, now 2"]


def test_list_compares_the_runs_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for second, verdict in enumerate((Verdict.PASS, Verdict.FAIL, Verdict.FAIL)):
        write(run_of(result("a", verdict), began=1_795_942_977 + second), tmp_path, [])

    assert main([str(tmp_path), "20261129T090258Z", "20261129T090257Z"]) == 0
    assert capsys.readouterr().out.endswith("    healed: a on gpu01\n")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("    no change\n")
    assert main([str(tmp_path), "20261129T090258Z", "x"]) == 2
    assert f"x: no such run in {tmp_path / 'history'}" in capsys.readouterr().err


def test_benchmarks_now_and_then_are_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: each run with its own choice of them."""
    lab, slow = lab_file(tmp_path), healthy()
    slow["gpubench"]["metrics"]["memory.copy"]["wrong"] = 3
    report = str(tmp_path / "report")

    def said() -> str:
        out = capsys.readouterr().out
        assert "checked then" not in out and "no longer checked" not in out
        return out

    verify(lab, plugin=Doctored(healthy()))
    daily = verify(lab, "--benchmarks", "off", plugin=Doctored(healthy()))
    assert ["gpu01", "benchmarks.gpu.memory.copy"] in daily.json["left_out"]
    assert "figures were not measured; when last they were" in daily.html
    assert main([report]) == 0 and said().endswith("    no change\n")

    weekly = verify(lab, plugin=Doctored(slow))
    assert "    new failures: benchmarks.gpu.memory.copy on gpu01\n" in said()
    assert "New failures:" in weekly.html
    assert main([report]) == 0 and "    new failures: benchmarks.gpu.memory.copy on gpu01\n" in said()

    verify(lab, "--benchmarks", "off", "--disruptive", plugin=Doctored(healthy()))
    # Nobody has looked again.
    failing = 'gpulab_verify_check{lab="lab",host="gpu01",id="benchmarks.gpu.memory.copy",severity="major"} 0\n'
    assert failing in (tmp_path / "report/verify.prom").read_text()
    again = verify(lab, plugin=Doctored(slow))
    assert "since " + weekly.json["when"] in again.html and ", in 2 runs" in again.html
    assert "new failures" not in said()


def test_list_of_nothing_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no runs are kept here\nhint: make verify\n"
