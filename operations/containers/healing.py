# SPDX-License-Identifier: MIT
"""Self-healing: a timer on the guest that restarts a service which has lost the GPU or does not answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyinfra import host, logger
from pyinfra.api import StringCommand

from inventory import GpulabError
from inventory.services import Milvus, Ollama, Services
from operations import files, step
from operations.containers.facts import HealingFacts
from operations.containers.remote.heal import CONFIGURATION, UNIT
from operations.files import File, render
from operations.remote import program
from operations.units import as_wanted, present, withdraw

TIMER = "gpulab-heal.timer"
TIMER_FILE = f"/etc/systemd/system/{TIMER}"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = "/usr/local/bin/gpulab-heal"
FILES = (CONFIGURATION, TIMER_FILE, UNIT_FILE, PROGRAM)


def watched(services: Services, gpu: bool) -> dict[str, dict[str, str]]:
    """What gpulab-heal has to know of each service: the URL that answers 200 when it is up, and how it `shows` that
    it uses the GPU.

    `ps`: Ollama's own list of loaded models; `memory`: once it held some of the card's memory it always does, as
    Milvus' pool; `visible`: the GPU must be seen in its container, no more; empty: it has none.
    """
    found = {}
    for name, each in services.served().items():
        where = f"http://127.0.0.1:{each.port}"
        if isinstance(each, Ollama):
            found[name] = {"probe": f"{where}/api/version", "shows": "ps", "ps": f"{where}/api/ps"}
        elif isinstance(each, Milvus):
            found[name] = {"probe": f"http://127.0.0.1:{each.metrics_port}/healthz", "shows": "memory"}
        else:
            found[name] = {"probe": where, "shows": "visible"}
    return {name: each if gpu else {**each, "shows": ""} for name, each in found.items()}


def wanted_files(
    policy: Mapping[str, Any] | None, engine: str, data: str, gpu: bool, services: Mapping[str, Mapping[str, str]]
) -> dict[str, File | None]:
    if policy is None or not services:
        return dict.fromkeys(FILES)
    configuration = {**policy, "engine": engine, "data": data, "gpu": gpu, "services": services}
    return {
        PROGRAM: File(f"#!/usr/bin/python3 -I\n{program(__file__, 'heal')}\n", mode=0o755),
        UNIT_FILE: File(render("containers/gpulab-heal.service.j2", program=PROGRAM)),
        TIMER_FILE: File(render("containers/gpulab-heal.timer.j2", interval_s=policy["interval_s"])),
        CONFIGURATION: File(json.dumps(configuration, indent=2) + "\n"),
    }


def read() -> dict[str, Any]:
    """What is on the guest; empty for one that does not exist yet."""
    found: dict[str, Any] = step.read(HealingFacts, paths=list(FILES), unit=TIMER)
    return found


@step.step
def healing(
    policy: Mapping[str, Any] | None,
    engine: str,
    data: str,
    gpu: bool,
    services: Mapping[str, Mapping[str, str]],
) -> step.Commands:
    """
    Ensure that services which lose the GPU or stop answering are restarted, or that nobody restarts them.

    Each restart is a note: `gpulab-heal --status` on the guest shows them. An alarm that stands is told as a warning;
    it ends with `gpulab-heal --reset NAME`, or when the container is recreated.

    + policy: `interval_s`, `failures` within `window_s`, and `grace_s` after a start; None: nobody looks
    + engine: `docker` or `podman`
    + data: mount point of the data disk, without which nothing is touched
    + gpu: has the guest a GPU?
    + services: what `watched()` says; empty: there is nothing to look after
    """
    wanted = wanted_files(policy, engine, data, gpu, services)
    found = read()
    changing = files.differing(found.get("files", {}), wanted)
    unit = found.get("unit", {})
    if policy is None or not services:
        why = "no healing is declared" if policy is None else "no service is declared"
        if not changing and not present(unit):
            step.noop(f"{why}, and none is there")
            return
        yield from withdraw(TIMER, unit, found.get("files", {}), changing)
        # An alarm of before would keep it among the failed units.
        yield StringCommand("systemctl", "reset-failed", UNIT, "||", "true")
        return
    for name, words in found.get("alarms", {}).items():
        logger.warning(f"{host.print_prefix}alarm {name}: {words}; `gpulab-heal --reset {name}` when it is mended")
    if not changing and as_wanted(unit):
        alarms = ", ".join(found["alarms"])
        step.noop(
            f"{TIMER} looks after {', '.join(services)} every {policy['interval_s']} s"
            + (f"; alarm of {alarms}" if alarms else "")
        )
        return
    for path, file in changing.items():
        if path == PROGRAM:
            step.changes(f"file {path}")
        else:
            files.record(found.get("files", {}), {path: file})
    if changing:
        yield files.write(changing)
    if not changing.keys().isdisjoint((UNIT_FILE, TIMER_FILE)):
        yield StringCommand("systemctl", "daemon-reload")
    if not as_wanted(unit) or TIMER_FILE in changing:
        step.changes(f"start {TIMER}")
        yield StringCommand("systemctl", "enable", TIMER)
        yield StringCommand("systemctl", "restart", TIMER)
        yield step.call(check)


def check() -> None:
    """
    Raises:
        GpulabError: the timer does not run.
    """
    unit = read()["unit"]
    if not as_wanted(unit):
        raise GpulabError(f"{TIMER} is {unit['active']}", resolution=f"`systemctl status {TIMER}` in the guest")
