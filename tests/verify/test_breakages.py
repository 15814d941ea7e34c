# SPDX-License-Identifier: MIT
"""The table of `make test-verify`: a check that no test has broken can't hide in it."""

from __future__ import annotations

from tests.lab.breakages import CASES, Breakage, reasonless, wrong
from tests.verify.conftest import Breakages, checks, rows, table
from verify.verdicts import Severity

CHECKS = {"a.{service}.image": Severity.MAJOR, "a.special.image": Severity.MAJOR, "b.c": Severity.CRITICAL}


def test_checks_that_were_caught_leave_nothing() -> None:
    ids = {"a.ollama.image", "a.special.image", "b.c"}

    found = rows(Breakages(ids, ids, ids), CHECKS)

    assert [(row.checks, row.breakable, row.broken, row.caught) for row in found] == [
        (1, 1, 1, 1),
        (2, 2, 2, 2),
        (0, 0, 0, 0),
    ]
    assert not any(row.left for row in found)


def test_check_that_was_not_broken_is_named() -> None:
    lines = table(rows(Breakages(passed={"a.ollama.image", "b.c"}, broken={"b.c"}), CHECKS))

    assert lines[1:] == [
        "               checks  breakable     broken     caught",
        "critical            1          1          1          0",
        "major               2          1          0          0",
        "minor               0          0          0          0",
        "all                 3          2          1          0",
        "b.c [critical]: not caught",
        "a.{service}.image [major]: never broken",
        "a.special.image [major]: never passed",
    ]


def test_special_check_does_not_stand_for_the_one_of_each_part() -> None:
    ids = {"a.special.image", "b.c"}

    (left,) = [row.left for row in rows(Breakages(ids, ids, ids), CHECKS) if row.left]

    assert left == {"a.{service}.image": "never passed"}


def test_checks_are_those_of_verify_itself() -> None:
    found = checks()

    assert found["vm.cores"] is Severity.MAJOR
    assert found["containers.{service}.running"] is Severity.CRITICAL
    # Of kinds that the lab of these tests has no host of, and that interrupt services.
    assert {"nvidia.mps.off", "containers.gpu.engine_restart.real"} <= found.keys()


def test_every_check_is_broken_on_a_lab_or_says_why_not() -> None:
    """A new check needs a line in CASES of tests/lab/breakages.py, or one in REASONS."""
    found = checks()

    assert reasonless(found) == []
    assert "a.new.check has neither a breakage nor a reason" in reasonless([*found, "a.new.check"])
    assert f"{CASES[0].check} is no check" in reasonless(found.keys() - {CASES[0].check})


def test_breakage_is_seen_by_exactly_its_checks() -> None:
    case = Breakage("vm.cores", besides=("vm.memory",), unseen=("vm.a*", "system.*"))
    both = {"vm.cores[gpu01]", "vm.memory[gpu01]"}
    left_out = {"vm.agent[gpu01]", "system.time[gpu01]"}

    assert wrong(case, both, left_out) == []
    assert wrong(case, {"vm.cores[gpu01]"}, left_out) == ["vm.memory[gpu01] does not fail"]
    assert wrong(case, {*both, "vm.api.reachable[pve1]"}, left_out) == ["vm.api.reachable[pve1] fails, too"]
    assert wrong(case, both, {*left_out, "vm.gpu[gpu01]"}) == ["vm.gpu is not run"]
    assert wrong(case, both, {"vm.agent[gpu01]"}) == ["nothing like system.* is left out"]
