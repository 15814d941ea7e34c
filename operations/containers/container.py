# SPDX-License-Identifier: MIT
"""One container: pulled by digest, replaced exactly when its declaration changes, and never left half replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import step
from operations.containers.facts import EngineFacts
from operations.containers.spec import GIVEN, ContainerSpec, difference, familiar
from operations.facts import python
from operations.remote import program

_REPLACE = program(__file__, "replace")


@dataclass(frozen=True)
class Actions:
    """What has to happen to a container.

    `replace` and `start` say why, empty: it need not. `lines`: the difference between what is and what should be.
    """

    pull: bool = False
    replace: str = ""
    start: str = ""
    lines: tuple[str, ...] = ()

    def any(self) -> bool:
        return self.pull or bool(self.replace or self.start)


def decide(found: Mapping[str, Any], spec: ContainerSpec) -> Actions:
    """What has to happen for the container to be as declared.

    Raises:
        GpulabError: the engine does not answer, or a container of that name is not ours.
    """
    if found and found["info"] is None:
        raise GpulabError(
            f"{spec.name}: the container engine does not answer",
            found["error"],
            "`systemctl status docker` in the guest says why",
        )
    pull = familiar(spec.image) not in found.get("images", [])
    current = found.get("containers", {}).get(spec.name)
    if current is None:
        return Actions(pull, replace="it is absent", lines=difference("{}", spec))
    if current["spec"] != spec.digest():
        return Actions(pull, replace="its declaration changed", lines=difference(current["declaration"], spec))
    if current["gpu"] is not None and current["gpu"]["status"] != 0:
        return Actions(pull, replace="it lost the GPU", lines=(current["gpu"]["output"],))
    if current["status"] != "running":
        why = f"it is {current['status']} (exit status {current['exit_code']})"
        # A container that could not start may hold a specification of devices that are gone.
        return Actions(start=why, lines=(current["error"],) if current["error"] else ())
    answered = found["answers"].get(spec.name, {"status": 200})
    if answered["status"] != 200:
        return Actions(replace="its service does not answer", lines=(f"{spec.probe}: {answered['body']}",))
    if current["health"] == "unhealthy":
        return Actions(replace="its health check fails")
    return Actions()


def read(spec: ContainerSpec, **probes: str) -> dict[str, Any]:
    """The engine's state with what the service answers under its name; empty for a guest that does not exist yet."""
    asked = {spec.name: spec.probe, **probes} if spec.probe else probes
    found: dict[str, Any] = step.read(EngineFacts, probes=asked, inside=True)
    return found


def record(spec: ContainerSpec, actions: Actions) -> None:
    """Put what has to happen into the plan."""
    if actions.pull:
        step.changes(f"pull {spec.image}")
    if actions.replace:
        verb = "create" if actions.replace == "it is absent" else "recreate"
        step.changes(f"{verb} container {spec.name}: {actions.replace}", actions.lines)
    elif actions.start:
        step.changes(f"start container {spec.name}: {actions.start}", actions.lines)


def apply(spec: ContainerSpec, actions: Actions) -> step.Commands:
    """The commands. The image is there before the running container is touched."""
    if actions.pull:
        yield StringCommand("docker", "pull", "--quiet", QuoteString(spec.image))
    if actions.replace or actions.start:
        yield python(
            _REPLACE,
            {
                "do": "replace" if actions.replace else "start",
                "name": spec.name,
                "create": spec.create(),
                "network": "" if spec.network_name() in GIVEN else spec.network_name(),
                "mounts": list(spec.mounts),
                "folders": spec.folders(),
                "owned": spec.owned(),
                "probe": spec.probe,
                "gpu": bool(spec.devices),
                "stop_s": spec.stop_s,
                "deadline_s": spec.ready_s,
            },
            _stdin=json.dumps([asdict(secret) for secret in spec.secret_files()]),
        )


@step.step
def container(spec: ContainerSpec) -> step.Commands:
    """
    Ensure that a container of ours runs as declared, sees its GPU and answers.

    **Recreated** exactly when its declaration changes, when it lost its GPU, or when its service does not answer. A
    new container that does not get ready is taken away again, and the previous one started.

    + spec: the declaration
    """
    found = read(spec)
    actions = decide(found, spec)
    if not actions.any():
        step.noop(f"container {spec.name} runs as declared")
        return
    record(spec, actions)
    yield from apply(spec, actions)
