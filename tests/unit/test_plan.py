# SPDX-License-Identifier: MIT
"""The plan says what changes, by how much, and whether a reboot comes with it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from operations.plan import Entry, Kind, Plan, file_diff, key_diff


def test_host_without_entries_has_nothing_to_change() -> None:
    text = Plan().render(["pve1"])

    assert text.splitlines() == ["pve1", "  nothing to change", "  reboot: no", "plan: 0 changes, 0 reboots"]


def test_reboot_stands_with_its_reason_at_the_end_of_its_host() -> None:
    plan = Plan()
    plan.add(Entry("pve1", "reboot", ("iommu=pt is missing",), Kind.REBOOT))
    plan.add(Entry("pve1", "file /etc/x", ("+a",)))

    assert plan.render(["pve1"]).splitlines() == [
        "pve1",
        "  file /etc/x",
        "      +a",
        "  reboot: yes (iommu=pt is missing)",
        "plan: 1 changes, 1 reboots",
    ]


def test_what_is_planned_from_nothing_says_so() -> None:
    plan = Plan()
    plan.add(Entry("gpu01", "create VM 101", assumed=True))

    assert "  create VM 101 (assumed)" in plan.render(["gpu01"])


def test_refusal_is_counted_and_no_change() -> None:
    plan = Plan()
    plan.add(Entry("pve1", "pve1: no such card", ("hint: look",), Kind.REFUSED))

    assert plan.render(["pve1"]).splitlines()[1] == "  refused: pve1: no such card"
    assert plan.render(["pve1"]).endswith("plan: 0 changes, 0 reboots, 1 refused")


def test_note_is_no_change() -> None:
    plan = Plan()
    plan.add(Entry("gpu01", "models that nobody declares stay", ("old:1b",), Kind.NOTE))

    assert plan.render(["gpu01"]).splitlines() == [
        "gpu01",
        "  nothing to change",
        "  note: models that nobody declares stay",
        "      old:1b",
        "  reboot: no",
        "plan: 0 changes, 0 reboots",
    ]


def test_step_that_is_evaluated_twice_stands_once() -> None:
    plan = Plan()
    for _ in range(2):
        plan.add(Entry("pve1", "file /etc/x", ("+a",)))

    assert len(plan.of("pve1")) == 1


LINES = st.lists(st.text("ab #=-+@", max_size=6), max_size=8)


@given(LINES, LINES)
def test_file_diff_is_empty_exactly_when_the_lines_are_the_same(before: list[str], after: list[str]) -> None:
    diff = file_diff("\n".join(before), "\n".join(after))

    assert (diff == ()) == ("\n".join(before).splitlines() == "\n".join(after).splitlines())


@given(LINES)
def test_new_file_shows_every_line_as_added(lines: list[str]) -> None:
    text = "\n".join(lines)

    assert file_diff(None, text) == tuple(f"+{line}" for line in text.splitlines())


def test_key_diff_names_old_and_new() -> None:
    assert key_diff({"cores": "2", "name": "a"}, {"cores": "4", "name": "a", "balloon": None}) == ("cores: 2 -> 4",)
    assert key_diff({"net1": "x"}, {"net1": None}) == ("net1: x -> absent",)
