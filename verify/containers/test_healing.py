# SPDX-License-Identifier: MIT
"""Does somebody look after the services, and is there nothing that they could not mend?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.observations import Observation

pytestmark = [pytest.mark.on("healing"), pytest.mark.usefixtures("guest_sees_gpu")]

#: Looks that may be missing, and seconds that one may take: a service is restarted in it.
INTERVALS, LOOK_S = 5, 60


@pytest.mark.major
@pytest.mark.promise(
    "containers.healing",
    "healing.interval_s",
    fix="gpulab-heal --status on {host} says what was tried; mend it, then gpulab-heal --reset NAME, or deploy",
)
def test_services_are_looked_after(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    found, healing = containers["healing"], guest.healing
    assert healing is not None
    assert (found["active"], found["enabled"]) == ("active", "enabled"), (
        f"{guest.name}: gpulab-heal.timer is {found['active'] or 'absent'} and {found['enabled'] or 'not enabled'}, "
        "expected active and enabled"
    )
    told = "; ".join(f"{name}: {words}" for name, words in found["alarms"].items())
    assert not told, f"{guest.name}: alarm of {told}"
    age, limit = found["age_s"], INTERVALS * healing.interval_s + LOOK_S
    assert age is not None, f"{guest.name}: nobody has looked at the services yet, expected a look within {limit} s"
    assert age <= limit, f"{guest.name}: the last look at the services is {age:.0f} s old, expected at most {limit} s"
    seen(f"last look {age:.0f} s ago, no alarm")
