# SPDX-License-Identifier: MIT
"""Ollama: its container, its share of the card's memory, and its models on the data disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inventory.sharing import Client
from operations import step
from operations.containers.container import apply, decide, read, record
from operations.containers.spec import ContainerSpec
from operations.facts import python
from operations.remote import program

#: The port that Ollama listens on inside its container.
PORT = 11434

#: Ollama's home inside its container: the image's own, /root, is closed to any other user.
HOME = "/var/lib/ollama"

#: A card that asks nothing of its clients.
ANY_CLIENT = Client()

_PULL = program(__file__, "pull_models")

#: Settings that an inventory may overrule. The context length is Ollama's main consumer of memory beside the model;
#: left alone, it is chosen by the size of the whole card.
DEFAULTS: Mapping[str, str] = {"OLLAMA_CONTEXT_LENGTH": "8192", "OLLAMA_NO_CLOUD": "1"}


def ollama_spec(
    image: str,
    port: int,
    memory_budget_mib: int,
    card_memory_mib: int,
    data: str,
    environment: Mapping[str, str],
    client: Client = ANY_CLIENT,
    engine: Literal["docker", "podman"] = "docker",
) -> ContainerSpec:
    """The container of Ollama; see `ollama()` for the values."""
    ours = {
        **client.environment,
        "HOME": HOME,
        "OLLAMA_HOST": f"0.0.0.0:{PORT}",
        # Bytes that Ollama leaves to others, per GPU: this is how its budget is kept.
        "OLLAMA_GPU_OVERHEAD": str((card_memory_mib - memory_budget_mib) * 2**20),
    }
    return ContainerSpec(
        name="ollama",
        image=image,
        environment={**DEFAULTS, **environment, **ours},
        volumes={f"{data}/ollama": f"{HOME}/.ollama"},
        binds=client.mounts,
        mounts=(data,),
        ports={port: PORT},
        devices=("nvidia.com/gpu=all",),
        # Said in any case: what a client of MPS has written has to become root's again without it.
        user=client.user or "0:0",
        ipc=client.ipc,
        probe=f"http://127.0.0.1:{port}/api/version",
        engine=engine,
    )


def full_name(model: str) -> str:
    """A model's name with its tag, as `/api/tags` lists it."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def missing_models(answer: Mapping[str, Any] | None, wanted: Sequence[str]) -> list[str]:
    """The models that the service does not list; all of them when it lists nothing."""
    body = (answer or {}).get("body")
    listed = (body.get("models") or []) if isinstance(body, Mapping) else []
    present = {full_name(item["name"]) for item in listed}
    return [model for model in wanted if full_name(model) not in present]


@step.step
def ollama(
    image: str,
    port: int,
    memory_budget_mib: int,
    card_memory_mib: int,
    data: str,
    models: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    client: Client = ANY_CLIENT,
    engine: Literal["docker", "podman"] = "docker",
) -> step.Commands:
    """
    Ensure that Ollama runs on the GPU within its memory budget and has its models.

    It listens on the guest's loopback address only, as its API has no authentication. Models lie under
    `<data>/ollama`, which belongs to the user that it runs as; undeclared ones stay.

    + image: name and digest
    + port: port on the guest's loopback address
    + memory_budget_mib: device memory that Ollama may use
    + card_memory_mib: device memory of the card
    + data: mount point of the data disk
    + models: models that must be present; absent ones are pulled
    + environment: further settings of Ollama
    + client: what the way of sharing asks of a process that uses the card
    + engine: the guest's container engine
    """
    spec = ollama_spec(image, port, memory_budget_mib, card_memory_mib, data, environment or {}, client, engine)
    url = f"http://127.0.0.1:{port}"
    found = read(spec, models=f"{url}/api/tags")
    actions = decide(found, spec)
    answer = found.get("answers", {}).get("models")
    missing = missing_models(answer, models)
    if not actions.any() and not missing:
        step.noop(f"Ollama runs as declared and has its {len(models)} models")
        return
    record(spec, actions)
    if missing and (answer or {}).get("status") == 200:
        step.changes("pull models", tuple(missing))
    elif missing:
        # The models of a service that is down can't be listed. They lie on the data disk, which may have them.
        step.changes("pull models that are not on the data disk yet", tuple(missing))
    yield from apply(spec, actions)
    if missing:
        yield python(_PULL, {"url": url, "models": missing})
