# SPDX-License-Identifier: MIT
"""What breaks in a running service and what gpulab-heal makes of it, without a deploy: what the guest's admin sees."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rehearsal import host
from tests.lab.commands import Deployed

GUEST = "gpu01"
#: Seconds for what a few looks do; a hanging process is given its time to end.
PATIENCE_S = 150
FOLDER = "/var/lib/gpulab/heal"
#: Makes the simulated card answer differently: see rehearsal/nvidia/source/gpu.h.
CARD = "/var/lib/lab-hardware/nvml.conf"

#: As after a daemon-reload that takes a container's devices: it runs on, and its driver finds no card.
LOSE_GPU = """pid=$(docker inspect --format '{{.State.Pid}}' ollama)
umount --namespace "$pid" /dev/nvidiactl 2> /dev/null || rm -f "/proc/$pid/root/dev/nvidiactl"
! docker exec ollama nvidia-smi -L"""
HANG = "kill -STOP $(docker inspect --format '{{.State.Pid}}' ollama)"


@dataclass(frozen=True)
class Healed:
    """`note`: stands in the note of the restart that mends it."""

    injected: str
    script: str
    note: str


#: Each is mended by one restart.
HEALED = [
    Healed("a container that lost its GPU", LOSE_GPU, "its container has lost the GPU"),
    Healed("a service that hangs", HANG, "it does not answer"),
]


def notes() -> list[dict[str, str]]:
    told = host.run(GUEST, ["cat", f"{FOLDER}/notes.jsonl"]).stdout
    return [json.loads(line) for line in told.splitlines()]


def looks() -> dict[str, Any]:
    """The last look."""
    found: dict[str, Any] = json.loads(host.run(GUEST, ["cat", f"{FOLDER}/look.json"]).stdout or "{}")
    return found


def alarms() -> set[str]:
    return set(host.run(GUEST, ["ls", f"{FOLDER}/alarm"]).stdout.split())


def well() -> bool:
    return looks().get("services", {}).get("ollama", "").startswith("well")


def until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s: {looks()} {notes()[-3:]}"
        time.sleep(1)


def after_looks(count: int) -> None:
    """Wait for so many looks that begin from now on."""
    # One that is under way has begun before.
    seen, remaining = looks().get("time"), count + 1
    deadline = time.monotonic() + PATIENCE_S
    while remaining:
        assert time.monotonic() < deadline, "nobody looks"
        time.sleep(0.5)
        if (now := looks().get("time")) != seen:
            seen, remaining = now, remaining - 1


def lose_until_alarm(deployed: Deployed) -> None:
    """A container that loses its GPU after each restart, until nobody restarts it any more."""
    # An hour has passed, as far as earlier faults go.
    deployed.on(GUEST, "gpulab-heal", "--reset", "ollama")
    before = len(notes())
    for restarts in range(1, 5):
        deployed.on(GUEST, "sh", "-ec", LOSE_GPU)
        until(f"note {restarts}", lambda restarts=restarts: len(notes()) >= before + restarts)  # type: ignore[misc]
    assert alarms() == {"ollama"}
