# SPDX-License-Identifier: MIT
"""Ollama: its container, its share of the card's memory, and its models on the data disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pyinfra import host
from pyinfra.api import StringCommand

from inventory import GpulabError, budgets
from inventory.services import Ollama, OllamaModel
from inventory.sharing import Client
from operations import step
from operations.containers.container import apply, decide, record
from operations.containers.spec import ContainerSpec, Health
from operations.facts import JsonFact, python
from operations.remote import program
from operations.told import Live

#: The port that Ollama listens on inside its container.
PORT = 11434

#: Ollama's home inside its container: the image's own, /root, is closed to any other user.
HOME = "/var/lib/ollama"

#: Processes and threads: the server, and a runner for each loaded model.
PIDS = 1024

#: A card that asks nothing of its clients.
ANY_CLIENT = Client()

_MODELS = program(__file__, "engine", "ollama", "models")


class OllamaFacts(JsonFact):
    """The engine's state, and what Ollama says of its models: see `remote/ollama.py`."""

    script = program(__file__, "engine", "ollama")

    def command(self, probes: Mapping[str, str], url: str, of_files: Sequence[str]) -> StringCommand:
        engine = {"package_names": [], "unit_names": [], "files": [], "probes": dict(probes), "inside": True}
        return python(self.script, {"url": url, "of_files": list(of_files), **engine})


@dataclass(frozen=True)
class Models:
    """What has to happen to the models. `undeclared`: those that stay though nobody declares them."""

    make: tuple[OllamaModel, ...] = ()
    pull: tuple[OllamaModel, ...] = ()
    remove: tuple[str, ...] = ()
    undeclared: tuple[str, ...] = ()
    #: Why each of `make` and `pull` is to be had.
    lines: tuple[str, ...] = ()

    def any(self) -> bool:
        return bool(self.make or self.pull or self.remove)


def ollama_spec(
    declared: Ollama,
    card_memory_mib: int,
    data: str,
    client: Client = ANY_CLIENT,
    engine: Literal["docker", "podman"] = "docker",
) -> ContainerSpec:
    """The container of Ollama; see `ollama()` for the values."""
    ours = {
        **client.environment,
        "HOME": HOME,
        "OLLAMA_HOST": f"0.0.0.0:{PORT}",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_CONTEXT_LENGTH": str(declared.context_length),
        "OLLAMA_NUM_PARALLEL": str(declared.parallel),
        "OLLAMA_MAX_LOADED_MODELS": str(declared.max_loaded_models),
        "OLLAMA_MAX_QUEUE": str(declared.max_queue),
        "OLLAMA_KEEP_ALIVE": declared.keep_alive,
        "OLLAMA_LOAD_TIMEOUT": declared.load_timeout,
        "OLLAMA_FLASH_ATTENTION": "1" if declared.flash_attention else "0",
        "OLLAMA_KV_CACHE_TYPE": declared.kv_cache_type,
        "OLLAMA_GPU_OVERHEAD": str(budgets.ollama_overhead_bytes(declared.memory_budget_mib, card_memory_mib)),
    }
    return ContainerSpec(
        name="ollama",
        image=declared.image,
        environment={**declared.environment, **ours},
        volumes={f"{data}/ollama": f"{HOME}/.ollama"},
        binds=client.mounts,
        mounts=(data,),
        ports={declared.port: PORT},
        devices=("nvidia.com/gpu=all",),
        # Said in any case: what a client of MPS has written has to become root's again without it.
        user=client.user or "0:0",
        ipc=client.ipc,
        memory_mib=declared.host_memory_mib,
        pids=PIDS,
        # The image has no curl. `ps` asks the server what it has loaded.
        health=Health(("ollama", "ps"), interval_s=15, timeout_s=10, start_s=30),
        probe=f"http://127.0.0.1:{declared.port}/api/version",
        ready_s=declared.ready_s,
        engine=engine,
    )


def full_name(model: str) -> str:
    """A model's name with its tag, as `/api/tags` lists it."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def listed(answer: Mapping[str, Any] | None) -> dict[str, str]:
    """Digest by full name of what `/api/tags` answered; nothing of a service that does not answer."""
    body = (answer or {}).get("body")
    models = (body.get("models") or []) if isinstance(body, Mapping) else []
    return {full_name(item["name"]): str(item.get("digest", "")) for item in models}


def decide_models(found: Mapping[str, Any], wanted: Sequence[OllamaModel], prune: bool) -> Models:
    """What has to happen for the models to be as declared.

    A model of a file is known by its weights' SHA-256, a pulled one by its own digest, where one is declared.
    """
    there = listed(found.get("answers", {}).get("models"))
    make, pull, lines = [], [], []
    for model in wanted:
        name, digest = model.name, there.get(model.full_name)
        if model.gguf is not None:
            made_of = found.get("made_of", {}).get(name)
            if digest is None:
                lines.append(f"{name}: of {model.gguf}")
            elif made_of != model.gguf_sha256:
                lines.append(f"{name}: weights {made_of or 'unknown'} -> {model.gguf_sha256}")
            else:
                continue
            make.append(model)
        elif digest is None or model.digest not in (None, digest):
            lines.append(name if digest is None else f"{name}: digest {digest} -> {model.digest}")
            pull.append(model)
    others = tuple(sorted(there.keys() - {model.full_name for model in wanted}))
    return Models(tuple(make), tuple(pull), others if prune else (), () if prune else others, tuple(lines))


def record_models(models: Models, answers: bool, unknown: bool) -> None:
    """Put what has to happen to the models into the plan.

    `answers`: the service says what it has; `unknown`: there may be some to be removed.
    """
    if models.make or models.pull:
        # The models of a service that is down can't be listed. They lie on the data disk, which may have them.
        what = " and ".join(verb for verb, those in (("make", models.make), ("pull", models.pull)) if those)
        step.changes(f"{what} models" if answers else f"{what} models that are not on the data disk yet", models.lines)
    if models.remove or unknown:
        step.changes("remove models that nobody declares", models.remove or ("Ollama does not say yet which",))
    if models.undeclared:
        step.notes("models that nobody declares stay (`prune_models` removes them)", models.undeclared)


def not_had(name: str, output: str) -> GpulabError:
    """What Ollama, or its file, says of each model that could not be had."""
    lines = [line for line in output.splitlines() if line.startswith("model ")] or output.splitlines()[-3:]
    return GpulabError(
        f"{name}: ollama: {lines[0] if lines else 'its models could not be changed'}",
        "\n".join(lines[1:]),
        "Ollama runs on with the models that it has; docs/ollama.md, section Models",
    )


@step.step
def ollama(
    declared: Mapping[str, Any],
    card_memory_mib: int,
    data: str,
    client: Client = ANY_CLIENT,
    engine: Literal["docker", "podman"] = "docker",
) -> step.Commands:
    """
    Ensure that Ollama runs on the GPU within its memory budget, with its settings, and has its models.

    It listens on the guest's loopback address only, as its API has no authentication. Models lie under
    `<data>/ollama`, which belongs to the user that it runs as. What cannot be pulled or made is told in Ollama's
    words, and leaves the container and the other models as they are.

    + declared: `services.ollama` of the inventory
    + card_memory_mib: device memory of the card
    + data: mount point of the data disk
    + client: what the way of sharing asks of a process that uses the card
    + engine: the guest's container engine
    """
    service = Ollama.model_validate(declared)
    spec = ollama_spec(service, card_memory_mib, data, client, engine)
    url = f"http://127.0.0.1:{service.port}"
    found = step.read(
        OllamaFacts,
        probes={spec.name: spec.probe, "models": f"{url}/api/tags"},
        url=url,
        of_files=[model.name for model in service.models if model.gguf is not None],
    )
    actions = decide(found, spec)
    answers = found.get("answers", {}).get("models", {}).get("status") == 200
    models = decide_models(found, service.models, service.prune_models)
    # What a service has that does not answer is only known once it does.
    unknown = service.prune_models and not answers
    record(spec, actions)
    record_models(models, answers, unknown)
    if not actions.any() and not models.any():
        others = f"; {len(models.undeclared)} that nobody declares" if models.undeclared else ""
        step.noop(f"Ollama runs as declared and has its {len(service.models)} models{others}")
        return
    yield from apply(spec, actions)
    if models.any() or unknown:
        order = {
            "url": url,
            "make": [{"name": each.name, "gguf": each.gguf, "sha256": each.gguf_sha256} for each in models.make],
            "pull": [{"name": each.name, "digest": each.digest} for each in models.pull],
            # All others go.
            "keep": [model.full_name for model in service.models] if service.prune_models else None,
        }
        yield Live(*python(_MODELS, order).bits, explain=partial(not_had, host.name))
