# SPDX-License-Identifier: MIT
"""One container: pulled by digest, replaced exactly when its declaration changes, and never left half replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from pyinfra.api import QuoteString

from inventory import GpulabError
from operations import step
from operations.containers import quadlet
from operations.containers.facts import EngineFacts
from operations.containers.spec import GIVEN, ContainerSpec, difference, familiar
from operations.remote import program
from operations.told import Live, Told

_PULL = program(__file__, "pull")
_PROGRAMS = {"docker": program(__file__, "service", "replace"), "podman": program(__file__, "service", "quadlet")}

#: Seconds until the first line of progress of a pull; each next one takes twice as long.
PROGRESS_S = 10

#: What engines and registries say of a pull that fails, and what that means.
_REASONS = {
    "no space left on device": (
        "the guest's disk is full",
        "make room (`docker system df` or `podman system df` in the guest), or a larger `system_disk_gib`; then deploy "
        "again",
    ),
    "manifest unknown": ("its registry has no such digest", "take a digest that the publisher still has"),
    "not found": ("its registry has no such digest", "take a digest that the publisher still has"),
    "unauthorized": ("its registry wants a login", "`docker login` (`podman login`) in the guest, as root"),
    "certificate signed by unknown authority": (
        "its registry's certificate is of an unknown CA",
        "`registry_ca` of the guest: the registry's `host:port` and its CA",
    ),
    "connection refused": ("its registry does not answer", "when the registry is back: deploy again"),
    "no such host": ("its registry's name has no address", "check the image's name, and the guest's `nameserver`"),
    "i/o timeout": ("its registry does not answer", "when the registry is back: deploy again"),
    "Client.Timeout": ("its registry does not answer", "when the registry is back: deploy again"),
}


@dataclass(frozen=True)
class Check:
    """A command of the guest that a new container has to pass once it answers.

    Where it fails, the one before comes back. `resolution`: what to do then.
    """

    words: tuple[str, ...]
    seconds: int
    resolution: str = ""


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


def view(found: Mapping[str, Any], engine: str) -> Mapping[str, Any]:
    """What an `EngineFacts` fact says of one engine: `images`, `containers`, and whether it is `up`, or its `error`.

    Empty for a guest that does not exist yet.
    """
    if not found:
        return {}
    if engine == "docker":
        return {**found, "up": found["info"] is not None}
    podman = found["podman"] or {"version": None, "error": "it is not installed", "images": [], "containers": {}}
    return {**podman, "up": podman["version"] is not None}


def decide(found: Mapping[str, Any], spec: ContainerSpec) -> Actions:
    """What has to happen for the container to be as declared.

    Raises:
        GpulabError: the engine does not answer, or a container of that name is not ours.
    """
    engine = view(found, spec.engine)
    if engine and not engine["up"]:
        hint = "`systemctl status docker`" if spec.engine == "docker" else "`podman info`"
        raise GpulabError(
            f"{spec.name}: the container engine does not answer", engine["error"], f"{hint} in the guest says why"
        )
    if spec.name in found.get("foreign", {}) and spec.engine == "docker":
        raise GpulabError(
            f"{spec.name}: a container of that name is not gpulab's",
            "It was left as it is.",
            f"`docker rename {spec.name} SOMETHING` in the guest",
        )
    podman = spec.engine == "podman"
    image = quadlet.qualified(spec.image) if podman else familiar(spec.image)
    wanted = quadlet.digest(spec) if podman else spec.digest()
    pull = image not in engine.get("images", [])
    current = engine.get("containers", {}).get(spec.name)
    if current is None:
        return Actions(pull, replace="it is absent", lines=difference("{}", spec))
    if current["spec"] != wanted:
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


def apply(spec: ContainerSpec, actions: Actions, check: Check | None = None) -> step.Commands:
    """The commands. The image is there before the running container is touched.

    + check: what a container that takes another's place has to pass beside being ready
    """
    if actions.pull:
        yield pull(spec.name, spec.image, spec.engine)
    if actions.replace or actions.start:
        secrets = [asdict(secret) for secret in spec.secret_files()]
        podman = spec.engine == "podman"
        order: dict[str, Any] = {
            "do": "replace" if actions.replace else "start",
            "name": spec.name,
            "mounts": list(spec.mounts),
            "folders": spec.folders(),
            "owned": spec.owned(),
            "probe": spec.probe,
            "gpu": bool(spec.devices),
            "stop_s": spec.stop_s,
            "deadline_s": spec.ready_s,
        }
        if check:
            order["check"] = {"words": list(check.words), "seconds": check.seconds}
        given: dict[str, Any] = {"secrets": secrets}
        if podman:
            given["files"] = quadlet.files(spec)
        else:
            order["network"] = "" if spec.network_name() in GIVEN else spec.network_name()
            order["create"] = spec.create()
        yield Told(
            *_words(_PROGRAMS[spec.engine], order), explain=partial(_not_ready, spec, check), _stdin=json.dumps(given)
        )


def _words(script: str, argument: Any) -> tuple[Any, ...]:
    return "python3", "-c", QuoteString(script.strip()), QuoteString(json.dumps(argument))


def pull(name: str, image: str, engine: str) -> Live:
    """The command that pulls an image for what is called `name`, and tells how far it is."""
    qualified = quadlet.qualified(image) if engine == "podman" else image
    order = {"engine": engine, "image": qualified, "every_s": PROGRESS_S}
    return Live(*_words(_PULL, order), explain=partial(_not_pulled, name, image))


def _not_pulled(name: str, image: str, output: str) -> GpulabError:
    """Why a pull failed. No container was touched."""
    said = (output.strip().splitlines() or ["it said nothing"])[-1].strip()
    known = (meaning for words, meaning in _REASONS.items() if words.lower() in said.lower())
    reason, hint = next(known, ("its image could not be pulled", "the line above is the engine's own"))
    return GpulabError(f"{name}: {reason}", f"{image}\n{said}\nNo container was stopped or changed.", hint)


def _not_ready(spec: ContainerSpec, check: Check | None, output: str) -> GpulabError:
    lines = output.strip().splitlines() or ["its replacement ended without a word"]
    brief = lines[0] if spec.name in lines[0] else f"{spec.name}: {lines[0]}"
    return GpulabError(brief, "\n".join(lines[1:]), check.resolution if check else "")


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


@step.step
def undeclared(
    names: Sequence[str], engine: Literal["docker", "podman"] = "docker", prune: bool = False
) -> step.Commands:
    """
    Ensure that no container of ours runs that the inventory does not declare, if that is asked for.

    Only containers with our label count. Their data on the data disk stay in any case.

    + names: the declared services
    + engine: the guest's container engine
    + prune: remove those that are not declared, with their networks and secrets; False: only name them
    """
    containers = view(step.read(EngineFacts), engine).get("containers", {})
    # One that is being replaced belongs to its service.
    gone = sorted({each["service"] for each in containers.values()} - set(names))
    if not gone:
        step.noop(f"no container of gpulab's beside the {len(names)} declared")
        return
    if not prune:
        for name in gone:
            step.notes(f"container {name} is not declared", ("`--data prune=1` removes it; its data stay",))
        step.noop(f"containers that are not declared stay: {', '.join(gone)}")
        return
    for name in gone:
        step.changes(f"remove container {name}: it is not declared; its data stay")
    order = {"do": "remove", "names": gone, "stop_s": 30, "secrets_too": True}
    yield Told(
        *_words(_PROGRAMS[engine], order),
        explain=lambda output: GpulabError(f"{', '.join(gone)}: {output.strip()}"),
        _stdin="{}",
    )
