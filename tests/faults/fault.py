# SPDX-License-Identifier: MIT
"""One fault of a guest: how it is injected, what its admin is told, and who puts it right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import inventory
from tests.lab.commands import INVENTORY, Deployed

from .table import Verdict

GUEST = "gpu01"
S, R, H = Verdict.SURVIVED, Verdict.REFUSED, Verdict.HEALED

Act = Callable[[Deployed], object]
Words = tuple[str, ...]


def nothing(deployed: Deployed) -> None:
    """Nobody has to do anything."""


@dataclass(frozen=True)
class Fault:
    """`says`: stands in what the first deploy prints, and `checks`: what verify fails at before it.

    `words`: of that deploy alone. `mend`: what only somebody else than a deploy can put right.
    """

    injected: str
    expected: Verdict
    inject: Act
    says: str = ""
    checks: tuple[str, ...] = ()
    words: Callable[[], Words] = tuple
    mend: Act = nothing


def sh(script: str) -> Act:
    """A shell script in the guest, without SSH."""
    return lambda deployed: deployed.on(GUEST, "sh", "-ec", script)


def meanwhile(script: str) -> Act:
    """The same, going on beside what comes next."""
    return lambda deployed: deployed.on(GUEST, "systemd-run", "--quiet", "--collect", "sh", "-ec", script)


def both(*acts: Act) -> Act:
    return lambda deployed: [act(deployed) for act in acts]


def service(name: str, **keys: Any) -> Words:
    """Words of a deploy in which a service is declared otherwise."""
    declared = inventory.load(INVENTORY).guests[GUEST].services.model_dump(exclude_unset=True)
    return ("--data", f"services={json.dumps({**declared, name: {**declared[name], **keys}})}")
