# SPDX-License-Identifier: MIT
"""What breaks in a guest's services, one thing at a time, on a lab of real hosts: what its admin sees, what heals it.

One lab for all of them, so one process. Needs root.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from rehearsal import host
from tests.lab.commands import Deployed
from tests.lab.leaks import leaks, places_of, secrets_of, watched_processes

from . import healing, table
from .healing import GUEST, Healed
from .services import SERVICES
from .table import Row, Verdict

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")


@pytest.fixture(scope="module", autouse=True)
def looked_at(deployed: Deployed) -> None:
    healing.until("the first look", healing.well)


def told(injected: str, message: str) -> None:
    table.ROWS.append(Row(GUEST, injected, Verdict.SURVIVED, message))


def marked(fault: Healed) -> Any:
    marks = [pytest.mark.typical] if fault.injected == "a container that lost its GPU" else []
    return pytest.param(fault, id=fault.injected.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("fault", [marked(fault) for fault in healing.HEALED])
def test_service_is_healed_without_a_deploy(deployed: Deployed, fault: Healed) -> None:
    deployed.on(GUEST, "gpulab-heal", "--reset", "ollama")
    before = len(healing.notes())

    deployed.on(GUEST, "sh", "-ec", fault.script)
    healing.until("a restart", lambda: len(healing.notes()) > before)
    healing.until("a service that is well", healing.well)

    note = healing.notes()[before]
    assert fault.note in note["seen"] and note["done"] == "restarted (1 of 3 within 60 min)"
    journal = deployed.on(GUEST, "journalctl", "-u", "gpulab-heal", "-p", "warning", "-o", "cat", "--no-pager")
    assert f"ollama: {note['seen']}; restarted" in journal
    assert note["seen"] in deployed.on(GUEST, "gpulab-heal", "--status")
    done, failed = deployed.verify("--limit", GUEST)
    assert (done.status, failed) == (0, set()), done.output[-3000:]
    told(fault.injected, f"{note['seen']}; {note['done']}")


def test_service_that_was_stopped_by_hand_stays_down(deployed: Deployed) -> None:
    deployed.on(GUEST, "docker", "stop", "ollama")
    before = len(healing.notes())

    healing.after_looks(3)

    assert len(healing.notes()) == before
    assert "stopped by hand" in healing.looks()["services"]["ollama"]
    # The proxy lets its tenants in, and then there is nobody to answer.
    failed = {f"containers.ollama.{name}[{GUEST}]" for name in ("running", "token.accepted")}
    assert deployed.verify("--limit", GUEST)[1] == failed
    assert deployed.deploy("--limit", GUEST).status == 0
    healing.until("a service that is well", healing.well)
    told("a service stopped by hand", "stopped by hand: `docker start` or a deploy starts it again")


def test_third_failure_ends_the_healing_and_raises_the_alarm(deployed: Deployed) -> None:
    healing.lose_until_alarm(deployed)

    assert "gpulab-heal.service" in deployed.on(GUEST, "systemctl", "--failed", "--no-legend", "--plain")
    alert = deployed.on(GUEST, "journalctl", "-u", "gpulab-heal", "-p", "alert", "-o", "cat", "--no-pager")
    assert alert.startswith("ALARM ollama: its container has lost the GPU")
    restarts = len(healing.notes())
    healing.after_looks(2)
    assert len(healing.notes()) == restarts
    _, failed = deployed.verify("--limit", GUEST)
    assert f"containers.healing[{GUEST}]" in failed
    results = json.loads((deployed.reports / "verify.json").read_text())["results"]
    message = next(item["message"] for item in results if item["id"] == "containers.healing")
    # A deploy recreates a container that has lost its GPU, and the new one begins with nothing against it.
    assert deployed.deploy("--limit", GUEST).status == 0
    healing.until("no alarm", lambda: healing.alarms() == set())
    healing.until("a service that is well", healing.well)
    done, failed = deployed.verify("--limit", GUEST)
    assert (done.status, failed) == (0, set()), done.output[-3000:]
    told("three failures in an hour", message)


def test_reset_by_hand_ends_the_alarm(deployed: Deployed) -> None:
    healing.lose_until_alarm(deployed)

    deployed.on(GUEST, "docker", "restart", "ollama")
    deployed.on(GUEST, "gpulab-heal", "--reset", "ollama")
    healing.after_looks(2)
    healing.until("a service that is well", healing.well)

    assert healing.alarms() == set()
    assert "gpulab-heal" not in deployed.on(GUEST, "systemctl", "--failed", "--no-legend", "--plain")
    told("an alarm, mended and reset by hand", healing.looks()["services"]["ollama"])


@pytest.mark.typical
def test_guest_that_lost_its_gpu_restarts_nothing(deployed: Deployed) -> None:
    started = deployed.on(GUEST, "docker", "inspect", "--format", "{{.State.StartedAt}}", "ollama")
    deployed.on(GUEST, "sh", "-ec", f"echo lost=1 > {healing.CARD}")
    try:
        healing.until("the alarm", lambda: healing.alarms() == {"gpu"})
        message = healing.looks()["services"]["ollama"]
    finally:
        deployed.on(GUEST, "rm", healing.CARD)
    healing.until("no alarm", lambda: healing.alarms() == set())

    assert deployed.on(GUEST, "docker", "inspect", "--format", "{{.State.StartedAt}}", "ollama") == started
    assert host.run(GUEST, ["systemctl", "is-failed", "gpulab-heal.service"]).stdout.strip() != "failed"
    told("the guest's GPU lost", message)


@pytest.mark.typical
def test_no_fault_and_no_deploy_tells_a_secret(deployed: Deployed) -> None:
    """After all other faults of the session, whose logs are still there; with all that gets a secret made anew."""
    again = "docker rm --force milvus; rm -r /etc/nginx/gpulab /etc/gpulab/milvus.root.json"
    deployed.on(GUEST, "sh", "-ec", again)
    with watched_processes() as seen:
        done = deployed.deploy("--limit", GUEST, "-vvv")
        verified, failed = deployed.verify("--limit", GUEST)
    assert (done.status, failed) == (0, set()), done.output[-3000:] + verified.output[-3000:]
    assert any("milvus-tools/bin/python" in line for line in seen), "no process of Milvus' accounts was seen"

    secrets, places = secrets_of(), places_of(deployed, GUEST)
    looked_for = set(" ".join(secrets).replace(",", "").split())
    assert {"token.ollama.astro", "milvus.root", "milvus.astro", "milvus.storage", "containers.key"} <= looked_for
    assert {f"{GUEST}: docker {what} {name}" for what in ("inspect", "logs") for name in SERVICES} <= places.keys()
    found = leaks(deployed, secrets=secrets, processes=str(seen), deploy=done.output, verify=verified.output)
    assert found == []
    told("secrets looked for", f"none of {len(secrets)} in {len(places)} logs, inspections and reports, or any process")
