# SPDX-License-Identifier: MIT
"""Every call, every task and every privilege, broken one at a time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from . import families, table
from .world import JOBS, Case, World, record

#: Tasks before which a run has changed nothing yet.
NOTHING_YET = dict.fromkeys(("rebuild", "rollback", "destroy"), ("qmshutdown",))
#: Jobs that start tasks.
WITH_TASKS = [job for job in JOBS if job != "mapping"]


def suffer_all(world: World, cases: Iterable[Case]) -> int:
    """Each case gets its line of the table; then all that was not as it should be."""
    wrong: list[str] = []
    count = 0
    for case in cases:
        count += 1
        row, found = world.suffer(case)
        table.ROWS.append(row)
        if found:
            wrong += [f"{row.where}, {row.injected}: {row.verdict.value}", *(f"    {line}" for line in found)]
    assert not wrong, "\n".join(["", *wrong])
    return count


@pytest.mark.parametrize("job", JOBS)
def test_answer_to_each_change_may_be_lost(world: World, job: str) -> None:
    found = record(world, job)
    assert suffer_all(world, families.lost_answers(job, found)) == len(found.changes) * len(families.ANSWERS)


@pytest.mark.parametrize("job", JOBS)
def test_node_may_go_offline_at_each_change(world: World, job: str) -> None:
    found = record(world, job)
    assert suffer_all(world, families.nobody_answers(job, found)) == len(found.changes) > 0


@pytest.mark.parametrize("job", WITH_TASKS)
def test_each_task_may_fail(world: World, job: str) -> None:
    assert suffer_all(world, families.task_errors(job, record(world, job), NOTHING_YET.get(job, ()))) >= 2


@pytest.mark.parametrize("job", WITH_TASKS)
def test_question_after_each_task_may_not_be_answered(world: World, job: str) -> None:
    assert suffer_all(world, families.polls(job, record(world, job))) >= 12


@pytest.mark.parametrize("job", ["mapping", "update", "rebuild", "rollback", "destroy"])
def test_somebody_else_may_change_the_same_in_between(world: World, job: str) -> None:
    assert suffer_all(world, families.digests(job, record(world, job))) >= 1


@pytest.mark.parametrize("job", JOBS)
def test_run_may_be_killed_between_any_two_calls(world: World, job: str) -> None:
    assert suffer_all(world, families.kills(job, record(world, job))) >= 4


@pytest.mark.parametrize("job", ["create", "rebuild"])
def test_token_may_lack_any_privilege(world: World, job: str) -> None:
    assert suffer_all(world, families.missing_rights(job)) >= 30
