# SPDX-License-Identifier: MIT
"""The verdicts themselves: harm that is done on purpose is seen, and nothing is called by a kinder name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import GpulabError
from operations.proxmox import config as declared
from operations.proxmox import vm
from tests.api.sites import DATA, OLD

from .cases import CONFIG, IMPORT, at
from .cases import config as of_vm
from .table import Row, Verdict, render
from .world import Case, World


def gone(volid: str) -> Callable[[World], object]:
    """Somebody deletes a volume."""

    def delete(world: World) -> None:
        with world.api.lock:
            world.api.state.volumes[:] = [volume for volume in world.api.state.volumes if volume.volid != volid]

    return delete


def changed(vmid: int, **keys: Any) -> Callable[[World], object]:
    return lambda world: of_vm(world, vmid).update(keys)


@pytest.mark.parametrize(
    ("job", "harm", "words"),
    [
        ("update", at(CONFIG, gone(DATA)), "the data disk is gone"),
        ("update", at(CONFIG, lambda world: of_vm(world).pop("scsi1")), "the data disk is not attached"),
        ("update", at(CONFIG, changed(200, name="other")), "VM 200 of somebody else was changed"),
        ("update", at(CONFIG, changed(201, cores=9)), "VM 201 of somebody else was changed"),
        (
            "update",
            at(CONFIG, lambda world: world.api.power.stop(202)),
            "VM 202 of somebody else was started or stopped",
        ),
        (
            "update",
            at(CONFIG, gone("local-lvm:vm-200-disk-0")),
            "vm-200-disk-0 of somebody else is gone",
        ),
        (
            "mapping",
            at(("PUT", "/mapping/pci"), lambda world: world.api.state.mappings["theirs"].map.clear()),
            "mapping theirs was changed",
        ),
        ("rebuild", at(IMPORT, gone(OLD)), "the old system disk is gone before verify has passed"),
        ("rebuild", at(IMPORT, changed(101, smbios1="uuid=1")), "our VM has another identity"),
        ("destroy", at(("POST", "/move_disk$"), gone(DATA)), "the data disk is gone"),
        ("create", lambda world: world.api.fail_task("qmstart", f"no {world.api.token}"), "holds the token"),
    ],
)
def test_harm_is_seen(world: World, job: str, harm: Callable[[World], object], words: str) -> None:
    row, wrong = world.suffer(Case(job, "x", "harm", Verdict.SURVIVED, harm))

    assert row.verdict is Verdict.LOST
    assert any(words in line for line in wrong), wrong


def test_run_that_leaves_protection_lifted_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = declared.declared
    monkeypatch.setattr(declared, "declared", lambda *words: {**real(*words), "protection": "0"})

    row, wrong = world.suffer(Case("update", "x", "harm", Verdict.SURVIVED, lambda world: None))

    assert row.verdict is Verdict.LOST
    assert "protection is lifted" in wrong


def test_run_that_never_converges_is_lost(world: World) -> None:
    """PVE's answer is never what was declared."""

    def restless(world: World) -> None:
        world.set(vm, "_waiting", lambda *_: vm._Waiting(("cores",)))
        # It outlives the fault.
        world._undo.pop()

    real = vm._waiting
    try:
        row, wrong = world.suffer(Case("update", "x", "harm", Verdict.SURVIVED, restless))
    finally:
        vm._waiting = real  # type: ignore[assignment]

    assert row.verdict is Verdict.LOST
    assert any(line.startswith("the last deploy still did") for line in wrong), wrong


def test_failure_without_a_clear_message_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def vague(*_: Any) -> None:
        raise GpulabError("it did not work")

    monkeypatch.setattr(vm, "_check_memory", vague)
    row, wrong = world.suffer(Case("create", "x", "harm", Verdict.REFUSED, lambda world: None))

    assert row.verdict is Verdict.LOST
    assert "the message does not begin with the host" in wrong


def test_other_verdict_or_message_than_expected_is_said(world: World) -> None:
    row, wrong = world.suffer(Case("update", "x", "nothing", Verdict.REFUSED, lambda world: None, "no such words"))

    assert row.verdict is Verdict.SURVIVED
    assert wrong[:2] == ["expected: refused, found: survived", "expected a message like 'no such words'"]


def test_table_counts_its_verdicts() -> None:
    rows = [Row("pve1", "nothing", Verdict.SURVIVED, ""), Row("VM 101", "all", Verdict.LOST, "gpu01: gone")]

    assert render(rows) == (
        "host or call | what was injected | verdict  | first line of what the user saw\n"
        "-------------+-------------------+----------+--------------------------------\n"
        "pve1         | nothing           | survived |\n"
        "VM 101       | all               | LOST     | gpu01: gone\n"
        "\n"
        "    1 survived: the run went on to its end\n"
        "    0 refused: nothing was changed, and a message says why\n"
        "    0 healed: this run failed, the next one did the rest\n"
        "    1 LOST: something that must hold was broken\n"
        "    2 faults\n"
    )


def test_fault_that_never_happens_proves_nothing(world: World) -> None:
    case = Case("update", "x", "nothing", Verdict.SURVIVED, lambda world: world.api.answer(596, path="/no/such/path"))
    row, wrong = world.suffer(case)

    assert row.verdict is Verdict.LOST
    assert wrong[0].startswith("this never happened: Fault(")
