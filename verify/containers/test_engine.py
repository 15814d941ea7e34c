# SPDX-License-Identifier: MIT
"""Does the container engine run, and can it hand the GPU to a container?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
KIND = "nvidia.com/gpu"


@pytest.mark.critical
@pytest.mark.promise("containers.engine.active", fix=DEPLOY)
def test_engine_runs(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    engine = containers["engine"]
    assert engine["active"] == "active", f"{guest.name}: docker.service is {engine['active'] or 'absent'}"
    assert engine["version"], f"{guest.name}: docker.service is active, but the engine does not answer"
    seen(f"Docker {engine['version']}")


@pytest.mark.critical
@pytest.mark.promise("containers.cdi", fix=DEPLOY)
def test_engine_knows_the_gpu_as_cdi_device(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    engine = containers["engine"]
    if not engine["version"]:
        not_run("the container engine does not answer")
    assert engine["cdi_folders"], f"{guest.name}: CDI is off in Docker {engine['version']}"
    devices = [name for name in containers["cdi"] if name.startswith(f"{KIND}=")]
    assert devices, (
        f"{guest.name}: no device {KIND} in {', '.join(engine['cdi_folders'])}; "
        "nvidia-cdi-refresh writes it when driver and GPU are there"
    )
    seen(", ".join(devices))
