# SPDX-License-Identifier: MIT
"""Break each promise on a deployed lab: verify fails at exactly the checks that are about it.

What is run each time: the whole of verify, without benchmarks, on one node and its guest, which takes about ten
seconds; its disruptive check in the case that is about it alone. All is mended by hand, not by a deploy. Which check is
not broken here, and why, stands below the table that is printed at the end.

The marker `typical` is of a dozen of them that stand for the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

import inventory
from inventory import GpulabError
from rehearsal import host
from tests.lab.breakages import CASES, GUEST, NODE, REASONS, TABLE, Breakage, labelled, wrong
from tests.lab.commands import INVENTORY, Outcome
from tests.verify.conftest import Breakages, checks, rows, table

BAD = ("fail", "inconclusive")
#: The second node and its guest are not looked at.
LIMIT = ("--limit", NODE, "--limit", GUEST)

Results = dict[str, dict[str, Any]]


class Lab:
    """The deployed lab, and what was found of its checks by now. `spoilt`: the last case did not leave it whole."""

    def __init__(self, deployed: Any) -> None:
        self.deployed = deployed
        self.found = Breakages()
        self.spoilt = False
        self.healthy: Results = {}

    def look(self, *words: str) -> tuple[Outcome, Results]:
        """The outcome of verify, and its results by `id[host]`."""
        # What an earlier run left must not be taken for this one's.
        (self.deployed.reports / "verify.json").unlink(missing_ok=True)
        done, _ = self.deployed.verify(*LIMIT, *words)
        results = json.loads((self.deployed.reports / "verify.json").read_text())["results"]
        self.found.passed |= {each["id"] for each in results if each["verdict"] == "pass"}
        return done, {f"{each['id']}[{each['host']}]": each for each in results}

    def heal(self) -> None:
        """By a deploy, after a case that did not mend what it broke."""
        if self.spoilt:
            done = self.deployed.deploy(*LIMIT)
            assert done.status == 0, done.output[-3000:]
            self.spoilt = False


@pytest.fixture(scope="module")
def lab(deployed: Any) -> Iterator[Lab]:
    lab = Lab(deployed)
    done, lab.healthy = lab.look()
    assert done.status == 0, done.output[-3000:]
    yield lab
    lines = table(rows(lab.found, checks()))
    # What was left out of this run is no news, and what can't be broken here has its reason.
    left = [line for line in lines[6:] if line.endswith(": not caught")]
    TABLE[:] = [*lines[:6], *left, *(f"{name}: {reason}" for name, reason in REASONS.items())]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.check, marks=[pytest.mark.typical] if case.typical else []) for case in CASES],
)
def test_broken_promise_is_seen_by_exactly_its_checks(lab: Lab, case: Breakage) -> None:
    lab.heal()
    lab.found.broken.add(case.check)
    lab.spoilt = True
    try:
        script(case.on, case.breaks)
        _, results = lab.look(*declaring(case), *case.words)
    finally:
        script(case.on, case.mends)
        script(GUEST, case.back)

    failed = {name for name, each in results.items() if each["verdict"] in BAD}
    unseen = {
        name
        for name, each in results.items()
        if each["verdict"] == "not run" and lab.healthy.get(name, {}).get("verdict") != "not run"
    }
    told = [f"{name}: {results[name]['message']}" for name in sorted(failed)]
    assert wrong(case, failed, unseen) == [], told
    assert results[labelled(case.check)]["fix"], "it says nothing of what would heal it"
    lab.spoilt = False
    lab.found.caught.add(case.check)


def test_lab_is_whole_again(lab: Lab) -> None:
    """After all that was broken and mended by hand, nothing is left that verify or a deploy would see."""
    lab.heal()

    done, results = lab.look()

    assert done.status == 0, done.output[-3000:]
    verdicts = [{name: each["verdict"] for name, each in found.items()} for found in (lab.healthy, results)]
    assert verdicts[0] == verdicts[1]


def script(on: str, text: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            done = host.run(on, ["bash", "-ec", text])
            break
        except GpulabError:
            # Between two boots there is nobody to ask.
            assert time.monotonic() < deadline, f"{on} does not come back"
            time.sleep(0.5)
    assert done.returncode == 0, (text, done.stdout[-1000:], done.stderr[-1000:])


def declaring(case: Breakage) -> tuple[str, ...]:
    """Words of a verify whose inventory promises something else. A list's items are named by their numbers."""
    if case.declares is None:
        return ()
    (root, *path), value = case.declares[0].split("."), case.declares[1]
    loaded = inventory.load(INVENTORY)
    owner = loaded.nodes[case.on] if case.on == NODE else loaded.guests[case.on]
    if path:
        whole = getattr(owner, root).model_dump(mode="json", exclude_unset=True)
        at = whole
        for key in path[:-1]:
            at = at[int(key) if isinstance(at, list) else key]
        at[path[-1]] = value
        value = whole
    return ("--data", f"{root}={json.dumps(value)}")
